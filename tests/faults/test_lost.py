"""A process that dies takes the others down within a minute, with a line that says so."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pipeline
import pytest
import torch
from zygote import Zygote

from mmkit.recipes import recipe_folders

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(torch.cuda.is_available(), reason="DeepSpeed on CPUs and CUDA do not mix in one environment"),
]
# The requirement itself, not a measure of speed.
MINUTE = 60
LONG = ["train.steps=100000", "train.checkpoint_every=50", "track.kind=none"]
# Rank 0 alone is busy, as when it extracts the features of a large data set; the other waits for it.
BUSY = """
import time
from mmkit.distributed.engine import Engine
main_first = Engine.main_first
def slowly(self, work):
    def busy():
        open(PATH, "w").close()
        time.sleep(SECONDS)
        return work()
    return main_first(self, busy if self.is_main else work)
Engine.main_first = slowly
"""
# Collectives, and whatever else goes by the process group's timeout, give up after four seconds.
IMPATIENT = """
import datetime, torch.distributed as dist
begin = dist.init_process_group
def impatient(*args, **more):
    begin(*args, **{**more, "timeout": datetime.timedelta(seconds=4)})
dist.init_process_group = impatient
"""


def until(true: Callable[[], bool], text: Callable[[], str], seconds: float = 90) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, text()
        time.sleep(0.01)


def lines(log: Path, lost: int) -> list[str]:
    """What the log says of a loss; it must say nothing worse."""
    text = log.read_text(errors="replace")
    assert "bug in mmkit" not in text and "Traceback" not in text, text[-3000:]
    return [line for line in text.splitlines() if f"process {lost} of 2 was lost; run the same command to go on" in line]


def survives(zygote: Zygote, pids: list[int], log: Path, victim: int) -> None:
    """Kill one of two processes: the other one must end, in time, with 1 and one line."""
    began = time.monotonic()
    assert zygote.kill([pids[victim]]) == [-9]
    assert zygote.wait(pids[1 - victim]) == 1, log.read_text(errors="replace")[-3000:]
    assert time.monotonic() - began < MINUTE
    assert len(lines(log, victim)) == 1, log.read_text(errors="replace")[-3000:]


@pytest.mark.parametrize("victim", [0, 1])
@pytest.mark.parametrize("mode", ["ddp", "zero2"])
def test_started_by_hand(zygote, tmp_path, mode, victim):
    run, log = tmp_path / "run", tmp_path / "log"
    more = [f"train.deepspeed={recipe_folders()['deepspeed'] / 'zero2.json'}"] if mode == "zero2" else []
    pids = zygote.start(pipeline.superclass(run, *LONG, *more), log, processes=2)
    until(lambda: len(pipeline.rows(run / "metrics.jsonl")) > 3, log.read_text)
    survives(zygote, pids, log, victim)


@pytest.mark.parametrize("victim", [0, 1])
def test_while_rank_0_alone_is_busy(zygote, tmp_path, victim):
    run, log, busy = tmp_path / "run", tmp_path / "log", tmp_path / "busy"
    before = f"PATH, SECONDS = {str(busy)!r}, 600\n" + BUSY
    pids = zygote.start(pipeline.clipcap(run, "track.kind=none"), log, processes=2, before=before)
    until(busy.exists, log.read_text)
    time.sleep(0.5)
    survives(zygote, pids, log, victim)


def test_a_busy_rank_0_is_waited_for(zygote, tmp_path):
    # Every timeout of the process group is far below the time that rank 0 takes.
    run, log, busy = tmp_path / "run", tmp_path / "log", tmp_path / "busy"
    before = f"PATH, SECONDS = {str(busy)!r}, 12\n" + BUSY + IMPATIENT
    codes = [zygote.wait(p) for p in zygote.start(pipeline.clipcap(run, "track.kind=none"), log, processes=2, before=before)]
    assert codes == [0, 0], log.read_text()[-3000:]


def test_a_slow_disk_is_waited_for(zygote, tmp_path):
    # Only rank 0 writes; the other has nothing to do but to wait for it, at the next save and at the end.
    run, log = tmp_path / "run", tmp_path / "log"
    slow = """
import time
from mmkit.training.checkpoint import Saver
write = Saver._write_files
def slowly(self, files, step):
    time.sleep(8 if files else 0)
    return write(self, files, step)
Saver._write_files = slowly
"""
    arguments = pipeline.superclass(run, "train.steps=3", "train.checkpoint_every=2", "track.kind=none")
    codes = [zygote.wait(p) for p in zygote.start(arguments, log, processes=2, before=slow + IMPATIENT)]
    assert codes == [0, 0], log.read_text()[-3000:]


def test_under_torchrun(tmp_path):
    run, log = tmp_path / "run", tmp_path / "log"
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m", "mmkit"]
    with (
        log.open("w") as out,
        subprocess.Popen(
            [*launch, *map(str, pipeline.superclass(run, *LONG))],
            env=pipeline.environment(),
            cwd=tmp_path,
            stdout=out,
            stderr=out,
        ) as launcher,
    ):
        until(lambda: len(pipeline.rows(run / "metrics.jsonl")) > 3, log.read_text)
        children = Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children").read_text().split()
        ranks = {int(pid): _rank(pid) for pid in children if _rank(pid) is not None}
        assert sorted(ranks.values()) == ["0", "1"], ranks
        began = time.monotonic()
        os.kill(next(pid for pid, rank in ranks.items() if rank == "1"), signal.SIGKILL)
        assert launcher.wait(MINUTE) == 1
        assert time.monotonic() - began < MINUTE
    assert not any(Path(f"/proc/{pid}").exists() for pid in ranks)
    assert "bug in mmkit" not in log.read_text()


def _rank(pid: str) -> str | None:
    """RANK in the environment of a process."""
    pairs = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    return next((p.split(b"=")[1].decode() for p in pairs if p.startswith(b"RANK=")), None)
