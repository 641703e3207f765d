"""Processes that meet without computing together."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pipeline
import pytest
import torch

from mmkit.distributed.preemption import Preemption
from mmkit.distributed.ranks import Ranks
from mmkit.errors import InputError, StoppedError

HEAD = """
import os, signal, sys, time
from mmkit.distributed.preemption import Preemption
from mmkit.distributed.ranks import Ranks
from mmkit.errors import InputError, LostError, StoppedError
with Preemption() as preemption:
    ranks = Ranks(preemption)
"""


def together(body: str, tmp_path: Path, processes: int = 2) -> list[tuple[int, str, str]]:
    """Exit code and output of each process that runs ``body``, started by hand."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    started = []
    for rank in range(processes):
        world = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1"}
        environment = {k: v for k, v in os.environ.items() if k != "MMKIT_DEMO"}
        environment |= {**world, "MASTER_PORT": port, "PYTHONPATH": str(pipeline.REPOSITORY), "CUDA_VISIBLE_DEVICES": ""}
        code = HEAD + "\n".join("    " + line for line in body.strip().splitlines())
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "cwd": tmp_path}
        started.append(subprocess.Popen([sys.executable, "-c", code], env=environment, **pipes))
    return [(process.returncode, out, err) for process in started for out, err in [process.communicate(timeout=120)]]


def test_they_meet_and_leave_in_order(tmp_path):
    body = """
for turn in range(3):
    if not ranks.is_main:
        time.sleep(0.1)
        open(f"there-{ranks.rank}-{turn}", "w").close()
    ranks.meet()
    assert all(os.path.exists(f"there-{rank}-{turn}") for rank in range(1, ranks.world_size))
done = []
ranks.on_main(lambda: done.append(ranks.rank))
print(ranks.rank, done)
ranks.close()
"""
    found = together(body, tmp_path, processes=3)
    assert [code for code, _, _ in found] == [0, 0, 0], found
    assert [out.strip() for _, out, _ in found] == ["0 [0]", "1 []", "2 []"]


def test_what_the_main_process_cannot_do_ends_all_alike(tmp_path):
    body = """
def work():
    raise InputError("is full", where="the disk", mend="free some space")
try:
    ranks.on_main(work)
except InputError as error:
    print(error)
"""
    assert together(body, tmp_path) == [(0, "the disk: is full; free some space\n", "")] * 2


def test_one_that_is_told_to_stop_stops_one_that_waits(tmp_path):
    body = """
try:
    if ranks.rank == 1:
        os.kill(os.getpid(), signal.SIGTERM)
        ranks.look()
    ranks.meet()
except StoppedError as error:
    print(str(error).split(";")[0])
    ranks.close()
"""
    found = together(body, tmp_path)
    assert [out for _, out, _ in found] == ["another process was told to stop\n", "stopped by SIGTERM\n"], found


@pytest.mark.parametrize("victim", [0, 1])
def test_one_that_waits_hears_at_once_of_a_loss(tmp_path, victim):
    body = f"""
if ranks.rank == {victim}:
    time.sleep(0.5)
    os._exit(9)
began = time.monotonic()
try:
    ranks.meet()
except (LostError, RuntimeError) as error:
    print(ranks.explain(error))
    assert isinstance(ranks.explain(error), LostError) and time.monotonic() - began < 10
os._exit(0)
"""
    found = together(body.replace("os._exit(0)", "sys.stdout.flush(); os._exit(0)"), tmp_path)
    code, out, err = found[1 - victim]
    assert code == 0 and f"process {victim} of 2 was lost" in out, (out, err)


def test_one_process_needs_nobody(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    with Preemption() as preemption:
        ranks = Ranks(preemption)
        assert (ranks.rank, ranks.world_size, ranks.is_main) == (0, 1, True)
        ranks.meet()
        with pytest.raises(InputError):
            ranks.on_main(lambda: (_ for _ in ()).throw(InputError("no")))
        ranks.look()
        os.kill(os.getpid(), signal.SIGUSR1)
        with pytest.raises(StoppedError, match="stopped by SIGUSR1; the same command goes on"):
            ranks.look()
        ranks.close()
    error = RuntimeError("a bug")
    assert ranks.explain(error) is error


def test_each_process_has_a_gpu_of_its_own(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setenv("LOCAL_RANK", "3")
    ranks = Ranks(Preemption())
    assert ranks.device == torch.device("cuda", 3)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert ranks.device == torch.device("cpu")
