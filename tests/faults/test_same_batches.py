"""The same global batches for any number of loader workers and processes, before and after continuing (batch_digest)."""

from __future__ import annotations

import functools
import io
import json
import shutil
import tarfile
from pathlib import Path

import pipeline
import pytest

STEPS = ["train.steps=8", "train.checkpoint_every=4", "train.keep_checkpoints=9"]


@functools.cache
def shards() -> Path:
    """The world's pictures in eight small shards, one of which has a cut picture."""
    folder = pipeline.root() / "eight-shards"
    folder.mkdir()
    rows = [json.loads(line) for line in (pipeline.root() / "world" / "pairs_train.jsonl").read_text().splitlines()]
    pictures = list(dict.fromkeys(row["image"] for row in rows))
    caption = {row["image"]: row["caption"] for row in rows}
    for number in range(8):
        with tarfile.open(folder / f"{number}.tar", "w", format=tarfile.USTAR_FORMAT) as tar:
            for i, image in enumerate(pictures[5 * number : 5 * number + 5]):
                data = (pipeline.root() / "world" / image).read_bytes()
                cut = data[: len(data) // 2] if (number, i) == (3, 2) else data
                for suffix, content in ((".jpg", cut), (".txt", caption[image].encode())):
                    member = tarfile.TarInfo(f"{5 * number + i:04d}{suffix}")
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))
    return folder


def arguments(run: Path, *more: str) -> list[str]:
    """A run over the shards in windows of two or three of them, through more than one epoch."""
    data = [f"data.train={shards()}", "data.shuffle_window=10", "data.max_skipped=0.1", "train.micro_batch_size=4"]
    return pipeline.superclass(run, *STEPS, *data, *more)


def torchrun(*words: str) -> int:
    """The exit code of two processes; what they said is shown when a test fails."""
    done = pipeline.torchrun(*words)
    print(done.stderr[-3000:])
    return done.returncode


def digests(run: Path) -> dict[int, int]:
    """Step to the digest of its global batch."""
    return {row["step"]: row["batch_digest"] for row in pipeline.rows(run / "metrics.jsonl")}


@functools.cache
def reference() -> Path:
    """The run that all others must equal: one process, no workers, never interrupted."""
    run = pipeline.root() / "same-batches"
    assert pipeline.mmkit(*arguments(run)) == 0
    return run


def test_the_reference_sees_something() -> None:
    found = digests(reference())
    assert list(found) == list(range(1, 9)) and len(set(found.values())) == 8
    skipped = pipeline.rows(reference() / "skipped.jsonl")
    assert [(Path(row["source"]).name, row["key"]) for row in skipped] == [("3.tar", "0017")]


@pytest.mark.parametrize("workers", [1, 2, 5])
def test_any_number_of_workers(tmp_path: Path, workers: int) -> None:
    run = tmp_path / "run"
    assert pipeline.mmkit(*arguments(run, f"data.workers={workers}", "data.prefetch=1")) == 0
    assert digests(run) == digests(reference())
    assert pipeline.losses(run) == pipeline.losses(reference())
    assert pipeline.largest_difference(run, reference()) == 0
    assert (run / "skipped.jsonl").read_text() == (reference() / "skipped.jsonl").read_text()


@pytest.mark.slow
def test_two_processes_and_continuing_on_another_number_of_them(tmp_path: Path) -> None:
    run = tmp_path / "two"
    done = pipeline.torchrun(*arguments(run, "data.workers=2"))
    assert done.returncode == 0, done.stderr[-3000:]
    assert digests(run) == digests(reference())
    # What two processes began, one continues from step 4, and the other way round.
    for began, goes_on in ((run, pipeline.mmkit), (reference(), torchrun)):
        again = tmp_path / f"again-{began.name}"
        shutil.copytree(began, again)
        shutil.rmtree(again / "model")
        for checkpoint in sorted((again / "checkpoints").glob("step-*"))[1:]:
            shutil.rmtree(checkpoint)
        state = json.loads((again / "manifest.json").read_text())
        (again / "manifest.json").write_text(json.dumps({**state, "status": "running"}))
        # The recipe is the run's own, but for its place.
        recipe = (again / "recipe.yaml").read_text().replace(f"run: {began}", f"run: {again}")
        (again / "recipe.yaml").write_text(recipe)
        workers = "data.workers=2" if began is run else "data.workers=0"
        assert goes_on(*arguments(again, workers)) == 0
        assert digests(again) == digests(reference())
