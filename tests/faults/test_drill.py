"""The drill: runs that are killed ten times and more, and continued, end like runs that nobody touched, bit for bit."""

from __future__ import annotations

import dataclasses
import itertools
import json
import random
import shutil
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pipeline
import pytest
import torch
from zygote import Zygote

from mmkit.recipes import recipe_folders

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(torch.cuda.is_available(), reason="DeepSpeed on CPUs and CUDA do not mix in one environment"),
]
KILLS = 11
# A life gets eight steps far at most, and a few more while it is being watched.
STEPS = {1: 200, 2: 120}
# How far a life gets before it is killed; in turns, so that every kind comes in every drill.
AIMS = ("rows", "save", "rows", "save", "start", "rows")
TIMINGS = {"samples_per_second", "tokens_per_second", "data_wait", "memory_gib", "seconds"}
TIMINGS |= {"save_stall_seconds", "save_write_seconds"}


@pytest.fixture(scope="module")
def dirty() -> Path:
    """The world's training data with one picture cut off and one missing, met in every epoch."""
    folder = pipeline.root() / "dirty"
    shutil.copytree(pipeline.root() / "world", folder)
    pictures = sorted((folder / "images" / "train").glob("*.jpg"))
    pictures[3].write_bytes(pictures[3].read_bytes()[:300])
    pictures[5].unlink()
    return folder


@dataclasses.dataclass
class Drill:
    """One run that is killed and continued."""

    zygote: Zygote
    run: Path
    arguments: list[str]
    processes: int
    random: random.Random
    start_seconds: float = 0.0
    step_seconds: float = 0.0
    kills: int = 0
    inside_saves: int = 0

    def log(self) -> str:
        """What all lives wrote."""
        path = self.run.with_suffix(".log")
        return path.read_text(errors="replace") if path.exists() else ""

    def start(self) -> list[int]:
        return self.zygote.start(self.arguments, self.run.with_suffix(".log"), processes=self.processes)

    def size(self) -> int:
        path = self.run / "metrics.jsonl"
        return path.stat().st_size if path.exists() else 0

    def done(self) -> bool:
        return pipeline.manifest(self.run)["status"] == "done"

    def saving(self) -> bool:
        return any((self.run / "checkpoints").glob(".step-????????"))

    def until(self, true: Callable[[], bool], seconds: float = 60) -> None:
        """Look every millisecond."""
        deadline = time.monotonic() + seconds
        while not true():
            assert time.monotonic() < deadline, self.log()[-3000:]
            time.sleep(0.001)

    def life(self, aim: str) -> None:
        """Start, let it get somewhere, kill all processes at once."""
        began = time.time()
        pids = self.start()
        if aim == "start":
            # Anywhere from the first import to the first step.
            time.sleep(self.random.uniform(0.0, self.start_seconds))
        else:
            manifest = self.run / "manifest.json"
            # A leftover of the life before is neither a step nor a save of this one: it is gone when the manifest is new.
            self.until(lambda: manifest.exists() and manifest.stat().st_mtime > began)
            self.until(lambda: not self.saving(), 5)
            before = self.size()
            # Rows of steps that are made again are dropped first, so any growth is a step of this life.
            self.until(lambda: self.size() > before or self.saving() or self.done())
            assert not self.done(), "the run came to its end before it was killed often enough: too few steps"
            if aim == "save":
                self.until(self.saving)
            else:
                time.sleep(self.random.uniform(0.0, 8 * self.step_seconds))
        inside = self.saving()
        codes = self.zygote.kill(pids)
        # A leftover counts only if it was there when the signal came and is there still: then nothing completed it.
        self.inside_saves += inside and self.saving()
        self.kills += codes == [-9] * self.processes

    def die_in_product(self) -> None:
        """Run to the end of training, and be killed while the product is being written."""
        pids = self.start()
        self.until(lambda: any(self.run.glob(".model.*")) or (self.run / "model").exists())
        codes = self.zygote.kill(pids)
        # On a busy machine a product of some kilobytes may be there before it was seen to begin; that is no kill inside it.
        self.kills += codes == [-9] * self.processes and not (self.run / "model").exists()

    def finish(self) -> None:
        """Run to the end."""
        began, pids = time.monotonic(), self.start()
        self.until(lambda: self.size() > 0)
        self.start_seconds = time.monotonic() - began
        assert [self.zygote.wait(pid) for pid in pids] == [0] * self.processes, self.log()[-3000:]
        # What a step takes on this machine, so that the delays of the kills fit it.
        self.step_seconds = statistics.median(row["seconds"] for row in pipeline.rows(self.run / "metrics.jsonl"))


def metrics(run: Path) -> list[dict[str, Any]]:
    """Rows without what depends on the clock."""
    return [{k: v for k, v in row.items() if k not in TIMINGS} for row in pipeline.rows(run / "metrics.jsonl")]


def skipped(run: Path) -> list[tuple[str, str, str]]:
    return sorted((row["source"], row["key"], row["reason"]) for row in pipeline.rows(run / "skipped.jsonl"))


def arguments_of(stage: str, run: Path, dirty: Path, processes: int) -> list[str]:
    data = {"finetune": "llava_train.json"}.get(stage, "pairs_train.jsonl")
    more = [f"data.train={dirty / data}", f"data.image_root={dirty}", "data.max_skipped=0.1", "track.kind=none"]
    more += [f"train.steps={STEPS[processes]}", "train.checkpoint_every=2"]
    # One of the drills with loader processes, which outlive a killed parent for a while.
    more.append(f"data.workers={2 if stage == 'superclass' and processes == 1 else 0}")
    if processes > 1:
        more.append(f"train.deepspeed={recipe_folders()['deepspeed'] / 'zero2.json'}")
    return pipeline.STAGES[stage](run, *more)


@pytest.mark.parametrize("processes", [1, 2], ids=["one", "zero2"])
@pytest.mark.parametrize("stage", ["superclass", "clipcap", "finetune"])
def test_killed_ten_times_and_continued_is_bit_equal(zygote, dirty, tmp_path, stage, processes):
    run, straight = tmp_path / "run", tmp_path / "straight"
    arguments = arguments_of(stage, run, dirty, processes)
    drill = Drill(zygote, run, arguments, processes, random.Random(f"{stage} {processes}"))
    drill.finish()
    shutil.move(run, straight)
    for aim in itertools.islice(itertools.cycle(AIMS), KILLS):
        drill.life(aim)
    drill.die_in_product()
    drill.finish()
    assert drill.kills >= 10 and drill.inside_saves >= 1, (drill.kills, drill.inside_saves, drill.log()[-3000:])
    assert "bug in mmkit" not in drill.log(), drill.log()[-3000:]
    # Loader processes whose parent was killed end with one of their own.
    assert "Traceback" not in drill.log() or "data.workers=2" in arguments, drill.log()[-3000:]
    rows = metrics(run)
    assert [row["step"] for row in rows] == list(range(1, STEPS[processes] + 1))
    assert rows == metrics(straight)
    assert pipeline.largest_difference(run, straight) == 0.0
    one, other = pipeline.weights(run), pipeline.weights(straight)
    assert all(torch.equal(one[k], other[k]) for k in one)
    assert skipped(run) == skipped(straight) and len(skipped(run)) >= 2
    # Nothing of the killed lives is left but what a run has anyway.
    assert sorted(p.name for p in run.iterdir()) == sorted(p.name for p in straight.iterdir())
    assert sorted(p.name for p in (run / "checkpoints").iterdir()) == sorted(p.name for p in (straight / "checkpoints").iterdir())
    assert json.loads((run / "manifest.json").read_text())["status"] == "done"
