"""Two processes that have imported everything once and obey one order after another: a gate pays for the start once.

Run as a script it obeys lines of JSON on standard input; :class:`Pair` is the other end of it.
"""

from __future__ import annotations

import importlib
import json
import os
import select
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

LAUNCHED = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


class Pair:
    """Processes of one machine; each order makes a new group of them, and they stay for the next."""

    def __init__(self, environment: dict[str, str], log: Path, *, processes: int = 2) -> None:
        # DS_ACCELERATOR: DeepSpeed reads it when it is imported.
        environment = {**environment, "DS_ACCELERATOR": "cpu"}
        shared = {"WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1"}
        self.log, self._processes = log, []
        # The last is for orders to one process: DeepSpeed numbers modules from the first it ever saw, and all ranks must agree.
        for rank in [*range(processes), None]:
            own = {} if rank is None else {**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)}
            with log.open("ab") as errors:
                pipes: Any = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": errors}
                made = subprocess.Popen([sys.executable, __file__], env={**environment, **own}, text=True, **pipes)
            self._processes.append(made)
        # Imports take a while on a busy machine; the orders' time-outs are for what hangs.
        assert [self._answer(process, 300) for process in self._processes] == ["ready"] * len(self._processes), log.read_text()

    def __call__(self, arguments: list[str], *, alone: bool = False, timeout: float = 60.0) -> None:
        """Run a command line (as after ``mmkit``) on all processes, or on one alone, as without a launcher."""
        self._order({"arguments": list(map(str, arguments))}, alone=alone, timeout=timeout)

    def call(self, place: str, *, alone: bool = False, timeout: float = 60.0, **more: Any) -> None:
        """Call ``module:function`` of the tests with keyword arguments that JSON can hold, on all processes or one."""
        self._order({"place": place, "more": more}, alone=alone, timeout=timeout)

    def _order(self, order: dict[str, Any], *, alone: bool, timeout: float) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = str(free.getsockname()[1])
        taking = self._processes[-1:] if alone else self._processes[:-1]
        for process in taking:
            assert process.stdin is not None
            process.stdin.write(json.dumps({**order, "port": port}) + "\n")
            process.stdin.flush()
        codes = [self._answer(process, timeout) for process in taking]
        assert codes == ["0"] * len(taking), (codes, self.log.read_text()[-6000:])

    def _answer(self, process: subprocess.Popen[str], timeout: float) -> str:
        """A process's exit code; one that waits for the other for ever is ended."""
        assert process.stdout is not None
        if not select.select([process.stdout], [], [], timeout)[0]:
            process.kill()
            return f"no answer in {timeout} s"
        return process.stdout.readline().strip()

    def close(self) -> None:
        """End the processes."""
        for process in self._processes:
            assert process.stdin is not None and process.stdout is not None
            process.stdin.close()
            process.wait(20)
            process.stdout.close()


def _obey(order: dict[str, Any]) -> int:
    """Carry out one order; its exit code."""
    from mmkit import cli

    kept = {name: os.environ[name] for name in LAUNCHED if name in os.environ}
    if kept:
        os.environ["MASTER_PORT"] = order["port"]
    try:
        if "place" in order:
            module, _, name = order["place"].partition(":")
            getattr(importlib.import_module(module), name)(**order["more"])
            return 0
        cli.main(order["arguments"])
    except SystemExit as left:
        return int(left.code or 0)
    finally:
        for name in LAUNCHED:
            os.environ.pop(name, None)
        os.environ.update(kept)


def _serve() -> None:
    """Import what every order needs, then obey."""
    import torch

    # By name: outside mmkit/distributed nothing may import it, and what a start needs most time for is just that.
    importlib.import_module("deepspeed")
    importlib.import_module("mmkit.training.stages.llava")
    torch.set_num_threads(1)
    # What the command prints goes to the log: the pipe is for answers.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    print("ready", file=answers, flush=True)
    for line in sys.stdin:
        print(_obey(json.loads(line)), file=answers, flush=True)


if __name__ == "__main__":
    _serve()
