"""CLIP and LiT on two gloo processes give what one process gives, with micro-batches and without."""

from __future__ import annotations

from pathlib import Path

import pipeline
import pytest

pytestmark = pytest.mark.slow


def clip(run: Path, *more: str) -> list[str]:
    """A tiny CLIP run of three steps with validation, one of whose pictures more falls to the first process."""
    world = pipeline.root() / "world"
    # Adam's usual eps would turn rounding in gradients near zero into steps of the learning rate's size.
    common = ["train.eps=1e-3", "stage=clip", "text.context_length=16", "train.steps=3", "train.val_every=3", "data.limit=30"]
    common += [f"data.val={world / 'captions_heldout.json'}", f"data.val_image_root={world / 'images' / 'heldout'}"]
    return pipeline.superclass(run, *common, *more)


def same(one: Path, two: Path) -> None:
    assert pipeline.losses(two) == pytest.approx(pipeline.losses(one), abs=1e-6)
    norms = [[row["grad_norm"] for row in pipeline.rows(run / "metrics.jsonl") if "loss" in row] for run in (one, two)]
    assert norms[1] == pytest.approx(norms[0], rel=1e-5)
    assert pipeline.largest_difference(one, two) < 1e-6


@pytest.mark.parametrize(
    ("more", "micro"),
    [
        (["loss.kind=infonce", "encoder.patch_drop=0.5"], "2"),
        (["stage=lit", "loss.kind=sigmoid"], "null"),
    ],
    ids=["clip-accumulated", "lit-sigmoid"],
)
def test_two_processes_equal_one(tmp_path, more, micro):
    if "stage=lit" in more:
        more = [*more, f"encoder.init={pipeline.trained('superclass')}"]
    one, two = tmp_path / "one", tmp_path / "two"
    # One process takes the batch in one piece: the plainest way there is.
    assert pipeline.mmkit(*clip(one, *more)) == 0
    done = pipeline.torchrun(*clip(two, *more, f"train.micro_batch_size={micro}"))
    assert done.returncode == 0, done.stderr[-3000:]
    same(one, two)
    checked = pipeline.rows(two / "metrics.jsonl")[-1]
    assert {"val_loss", "val_image_to_text@1", "val_text_to_image@1"} <= checked.keys()
