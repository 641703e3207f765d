"""Processes that meet without computing together."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
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


def test_one_that_is_told_to_stop_waits_for_one_in_the_middle_of_its_work(tmp_path):
    """Otherwise that one would speak of a lost process, and end with 1."""
    body = """
from mmkit.distributed.liveness import Liveness
close = Liveness.close
# Half a minute is two seconds here.
Liveness.close = lambda self, *, patience=30.0: close(self, patience=patience / 15)
try:
    if ranks.is_main:
        os.kill(os.getpid(), signal.SIGTERM)
        ranks.look()
    time.sleep(5)
    ranks.look()
except StoppedError as error:
    print(str(error).split(";")[0])
    ranks.close()
"""
    found = together(body, tmp_path)
    assert [out for _, out, _ in found] == ["stopped by SIGTERM\n", "another process was told to stop\n"], found


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


@pytest.mark.parametrize("finder", [0, 1])
def test_what_one_process_finds_wrong_is_heard_by_all(tmp_path, finder):
    body = f"""
error = None
try:
    if ranks.rank == {finder}:
        raise InputError("too long", where="row 7", mend="shorten it")
    for turn in range(200):
        time.sleep(0.05)
        ranks.look()
except InputError as caught:
    ranks.refuse(caught)
    ranks.close()
    print(caught)
    # Whoever refuses after that has nobody to wait for.
    ranks.refuse(caught)
"""
    assert together(body, tmp_path) == [(0, "row 7: too long; shorten it\n", "")] * 2


WAITING = """
import sys
from mmkit.distributed.preemption import Preemption
from mmkit.distributed.ranks import Ranks
from mmkit.errors import LostError, StoppedError
with Preemption() as preemption:
    print("waiting", flush=True)
    try:
        Ranks(preemption)
    except (StoppedError, LostError) as error:
        print(error, flush=True)
        sys.exit(75 if isinstance(error, StoppedError) else 1)
"""


def alone(tmp_path: Path, **more: str) -> subprocess.Popen[str]:
    """The first of two processes, which waits for one that never comes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    world = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, **more}
    environment = {**os.environ, **world, "PYTHONPATH": str(pipeline.REPOSITORY), "CUDA_VISIBLE_DEVICES": ""}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "cwd": tmp_path}
    return subprocess.Popen([sys.executable, "-c", WAITING], env=environment, **pipes)


def test_a_signal_is_heard_while_the_others_are_waited_for(tmp_path):
    process = alone(tmp_path)
    assert process.stdout.readline() == "waiting\n"
    time.sleep(1)
    process.terminate()
    out, err = process.communicate(timeout=20)
    assert process.returncode == 75 and out.startswith("stopped by SIGTERM before the processes had met"), (out, err)


def test_torchrun_that_is_gone_is_not_waited_for(tmp_path):
    began = time.monotonic()
    process = alone(tmp_path, TORCHELASTIC_USE_AGENT_STORE="True")
    out, err = process.communicate(timeout=60)
    assert process.returncode == 1 and "torchrun's store at 127.0.0.1:" in out and "the answers so far" in out, (out, err)
    assert time.monotonic() - began < 60


def test_torchrun_that_is_killed_takes_its_workers_along(tmp_path):
    """In the middle of the work and while the processes are waiting for each other: each ends with one line, none goes on."""
    script = tmp_path / "work.py"
    script.write_text(
        HEAD
        + """
    open(f"there-{ranks.rank}", "w").write(str(os.getpid()))
    try:
        if ranks.is_main:
            while True:
                time.sleep(0.1)
                ranks.look()
        ranks.meet()
    except RuntimeError as error:
        open(f"told-{ranks.rank}", "w").write(f"{type(ranks.explain(error)).__name__}: {ranks.explain(error)}")
"""
    )
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(script)]
    with (tmp_path / "log").open("w") as log:
        launcher = subprocess.Popen([sys.executable, *launch], env=pipeline.environment(), cwd=tmp_path, stdout=log, stderr=log)
    wait_for(lambda: all((tmp_path / f"there-{rank}").exists() for rank in (0, 1)), tmp_path / "log", 120)
    launcher.kill()
    launcher.wait()
    wait_for(lambda: all((tmp_path / f"told-{rank}").exists() for rank in (0, 1)), tmp_path / "log", 30)
    time.sleep(0.1)
    told = [(tmp_path / f"told-{rank}").read_text() for rank in (0, 1)]
    assert all(text.startswith("LostError: ") for text in told), told
    assert any("torchrun, which started this process, is gone" in text for text in told), told


def wait_for(true, log: Path, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, log.read_text()[-3000:]
        time.sleep(0.05)


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
    current: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "set_device", current.append)
    monkeypatch.setenv("LOCAL_RANK", "3")
    ranks = Ranks(Preemption())
    assert ranks.device == torch.device("cuda", 3) and current[-1] == torch.device("cuda", 3)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert ranks.device == torch.device("cpu")
