"""A process that has imported everything once and forks a child for every start: a drill pays for the imports once.

Run as a script it obeys lines of JSON on standard input; :class:`Zygote` is the other end of it.
"""

from __future__ import annotations

import importlib
import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any


class Zygote:
    """Starts the command line in forked children, which can be killed."""

    def __init__(self, environment: dict[str, str]) -> None:
        command = [sys.executable, __file__]
        # DS_ACCELERATOR: DeepSpeed reads it when it is imported.
        environment = {**environment, "DS_ACCELERATOR": "cpu"}
        self._process = subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self._alive: set[int] = set()

    def _ask(self, **order: Any) -> Any:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(json.dumps(order) + "\n")
        self._process.stdin.flush()
        return json.loads(self._process.stdout.readline())

    def start(self, arguments: list[str], log: Path, *, processes: int = 1, before: str = "") -> list[int]:
        """Process ids of a start by hand, rank after rank; both output streams go to ``log``.

        ``before`` is Python that each child runs first, to put something in the way of the command.
        """
        worlds: list[dict[str, str]] = [{}]
        if processes > 1:
            with socket.socket() as free:
                free.bind(("127.0.0.1", 0))
                port = str(free.getsockname()[1])
            shared = {"WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
            worlds = [{**shared, "RANK": str(r), "LOCAL_RANK": str(r)} for r in range(processes)]
        arguments = list(map(str, arguments))
        found = [int(self._ask(arguments=arguments, env=world, log=str(log), before=before)) for world in worlds]
        self._alive.update(found)
        return found

    def wait(self, pid: int) -> int:
        """Exit code of a child, negative for a signal."""
        self._alive.discard(pid)
        return int(self._ask(wait=pid))

    def kill(self, pids: list[int]) -> list[int]:
        """Kill children at once; their exit codes."""
        for pid in pids:
            os.kill(pid, signal.SIGKILL)
        return [self.wait(pid) for pid in pids]

    def close(self) -> None:
        """End what is left."""
        self.kill(list(self._alive))
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(10)


def _child(order: dict[str, Any]) -> None:
    """Become the command line."""
    os.environ.update(order["env"])
    log = os.open(order["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    from mmkit import cli

    exec(order["before"], {})
    cli.main(order["arguments"])


def _serve() -> None:
    """Import what every stage needs, then fork as told."""
    import torch
    import torch.utils.tensorboard
    import torchvision  # noqa: F401

    # By name: outside mmkit/distributed nothing may import it, and what a start needs most time for is just that.
    importlib.import_module("deepspeed")
    import mmkit.commands
    import mmkit.distributed.engine
    import mmkit.eval.run
    import mmkit.training.loop
    import mmkit.training.stages.clipcap
    import mmkit.training.stages.llava
    import mmkit.training.stages.superclass  # noqa: F401

    torch.set_num_threads(1)
    for line in sys.stdin:
        order = json.loads(line)
        if "wait" in order:
            print(os.waitstatus_to_exitcode(os.waitpid(order["wait"], 0)[1]), flush=True)
            continue
        pid = os.fork()
        if pid == 0:
            _child(order)
        print(pid, flush=True)


if __name__ == "__main__":
    # A child's exit must not wait for what the parent's libraries registered; the children themselves leave as usual.
    _serve()
