"""CLIP, SigLIP and LiT: exact accumulation, a tower that stays locked, and runs through the command line."""

from __future__ import annotations

import json
import logging
import os
import pickle
import shutil
import signal
from pathlib import Path

import pipeline
import pytest
import torch
from open_clip.loss import ClipLoss, SigLipLoss
from torch import Tensor

from mmkit.encoders.save import load_encoder
from mmkit.encoders.text import CaptionTokens, TextTower, load_text, text_settings
from mmkit.encoders.vit import build_encoder
from mmkit.training import loop
from mmkit.training.stages.contrastive import CaptionedBatch, ContrastiveObjective
from mmkit.training.stages.pairs import PairSample

TINY = {"embed_dim": 32, "depth": 2, "num_heads": 2}
WORDS = ["red", "blue", "green", "white", "black", "brown", "small", "large"]


def alone(features: Tensor) -> tuple[Tensor, int]:
    """The gather of a single process."""
    return features, 0


def make(kind: str = "infonce", *, frozen: bool = False, gather=alone, **model_args) -> ContrastiveObjective:
    """Tiny towers in float64, so that equal means equal."""
    encoder = build_encoder("vit_tiny_patch16_224", image_size=32, patch_size=8, model_args={**TINY, **model_args}, seed=0)
    torch.manual_seed(1)
    tower = TextTower(32, **text_settings(32, context_length=8), kind=kind)
    made = ContrastiveObjective(encoder, tower, kind=kind, gather=gather, frozen_encoder=frozen, chunk_rows=5)
    return made.double().train()


def batch(rows: int = 8, *, keep: bool = False, seed: int = 0) -> dict:
    generator = torch.Generator().manual_seed(seed)
    tower = TextTower(32, **text_settings(32, context_length=8))
    found = {
        "pixels": torch.randint(0, 256, (rows, 3, 32, 32), generator=generator, dtype=torch.uint8),
        "text": tower.tokenize([f"a {WORDS[i % 8]} {WORDS[i // 8]} wall" for i in range(rows)]),
        "keys": [str(i) for i in range(rows)],
    }
    if keep:
        found["keep"] = torch.stack([torch.randperm(16, generator=generator)[:9].sort().values for _ in range(rows)])
    return found


def parts(whole: dict, size: int) -> list[dict]:
    return [{k: v[i : i + size] for k, v in whole.items()} for i in range(0, len(whole["text"]), size)]


def train_step(objective: ContrastiveObjective, batches: list[dict]) -> tuple[float, dict[str, Tensor]]:
    """Loss sum and gradients of a step as the loop takes it."""
    objective.zero_grad()
    objective.prepare(batches)
    total = 0.0
    for part in batches:
        loss = objective(part)
        (loss / 8).backward()
        total += loss.item()
    return total, {n: p.grad.clone() for n, p in objective.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("kind", ["infonce", "sigmoid"])
def test_loss_is_open_clips(kind):
    objective, data = make(kind), batch()
    found = objective.tower(objective.encoder(data["pixels"]), data["text"])
    mean = ClipLoss()(*found[:3]) if kind == "infonce" else SigLipLoss()(*found)
    assert objective(data).item() == pytest.approx(mean.item() * 8, rel=1e-12) and objective.count(data) == 8


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("kind", ["infonce", "sigmoid"])
@pytest.mark.parametrize("size", [1, 2, 3])
def test_accumulated_micro_batches_equal_the_whole_batch(kind, frozen, size):
    objective, data = make(kind, frozen=frozen), batch(keep=not frozen)
    loss, wanted = train_step(objective, [data])
    shares, found = train_step(objective, parts(data, size))
    assert shares == pytest.approx(loss, rel=1e-12) and found.keys() == wanted.keys()
    assert all(torch.allclose(found[name], wanted[name], rtol=1e-9, atol=1e-12) for name in wanted)
    assert any(n.startswith("encoder.") for n in wanted) != frozen
    assert {"tower.image_projection.weight", "tower.logit_scale", "tower.text.text_projection"} <= wanted.keys()
    assert all(float(g.abs().sum()) > 0 for g in wanted.values())


def test_both_passes_drop_the_same_paths():
    objective, data = make(drop_path_rate=0.5, depth=4), parts(batch(), 2)
    torch.manual_seed(5)
    loss, found = train_step(objective, data)
    torch.manual_seed(5)
    objective.zero_grad()
    features = torch.cat([objective.encoder(part["pixels"]) for part in data])
    embedded = objective.tower(features, torch.cat([part["text"] for part in data]))
    wanted = ClipLoss()(*embedded[:3])
    wanted.backward()
    assert loss == pytest.approx(wanted.item() * 8, rel=1e-9)
    assert all(torch.allclose(found[n], p.grad, rtol=1e-6, atol=1e-12) for n, p in objective.named_parameters())


def test_a_frozen_encoder_runs_once_for_each_micro_batch():
    objective = make(frozen=True)
    seen = []
    objective.encoder.register_forward_hook(lambda *_: seen.append(1))
    train_step(objective, parts(batch(), 2))
    assert len(seen) == 4


def test_micro_batches_in_another_order_are_a_programming_error():
    objective, data = make(), parts(batch(), 4)
    objective.prepare(data)
    with pytest.raises(AssertionError, match="order"):
        objective(data[1])


def test_a_locked_encoder_never_trains():
    objective = make(frozen=True, drop_path_rate=0.5)
    assert objective.train().tower.training and not any(m.training for m in objective.encoder.modules())
    assert not any(p.requires_grad for p in objective.encoder.parameters())
    first, second = objective(batch()), objective(batch())
    assert torch.equal(first, second)


def test_validation_stays_within_the_batch():
    def never(features: Tensor) -> tuple[Tensor, int]:
        raise AssertionError("shares of the validation set differ between processes")

    objective, data = make(gather=never).eval(), batch()
    with torch.no_grad():
        loss = objective(data)
        found = objective.tower(objective.encoder(data["pixels"]), data["text"])
    assert loss.item() == pytest.approx(8 * ClipLoss()(*found[:3]).item())
    cosines = found.image @ found.text.T
    hits = [sum(int(side[i].argmax()) == i for i in range(8)) for side in (cosines, cosines.T)]
    assert objective.evaluate(data) == {"image_to_text@1": hits[0], "text_to_image@1": hits[1]}


def test_validation_between_steps_disturbs_nothing():
    objective, data = make(), parts(batch(), 4)
    wanted = train_step(objective, data)
    objective.eval()(batch(seed=1))
    found = train_step(objective.train(), data)
    assert found[0] == wanted[0] and all(torch.equal(found[1][n], wanted[1][n]) for n in wanted[1])


def test_the_towers_are_compiled_and_the_loss_is_not():
    objective = make()
    objective.compile_parts()
    compiled = {name for name, module in objective.named_modules() if module._compiled_call_impl is not None}
    assert compiled == {"encoder.backbone", "tower.text"}


def test_collate_keeps_rows_together():
    rng = torch.Generator().manual_seed(0)
    pictures = [torch.randint(0, 256, (3, 4, 4), generator=rng, dtype=torch.uint8).numpy() for _ in range(2)]
    collate = pickle.loads(pickle.dumps(CaptionedBatch(CaptionTokens(5))))
    found = collate([PairSample(p, caption, caption, None) for p, caption in zip(pictures, ("0", "a red bus"), strict=True)])
    assert (
        found["text"].tolist() == [CaptionTokens(5)(caption) for caption in ("0", "a red bus")]
        and found["text"].dtype == torch.int64
    )
    assert found["pixels"].shape == (2, 3, 4, 4) and found["keys"] == ["0", "a red bus"] and "keep" not in found


def clip(run: Path, *more: str) -> list[str]:
    """The SuperClass demo turned into CLIP by one word."""
    return pipeline.superclass(run, "stage=clip", "text.context_length=16", *more)


def lit(run: Path, *more: str) -> list[str]:
    return clip(run, "stage=lit", f"encoder.init={pipeline.trained('superclass')}", *more)


def heldout() -> list[str]:
    world = pipeline.root() / "world"
    return [f"data.val={world}/captions_heldout.json", f"data.val_image_root={world}/images/heldout", "train.val_every=2"]


@pytest.mark.parametrize("kind", ["infonce", "sigmoid"])
def test_clip_through_the_command_line(kind, tmp_path):
    assert pipeline.mmkit(*clip(tmp_path / "run", f"loss.kind={kind}", *heldout())) == 0
    rows = pipeline.rows(tmp_path / "run" / "metrics.jsonl")
    checked = [row for row in rows if "val_loss" in row]
    assert len(checked) == 2 and all(0 <= row[f"val_{n}"] <= 1 for row in checked for n in ("image_to_text@1", "text_to_image@1"))
    model = tmp_path / "run" / "model"
    tower, encoder = load_text(model), load_encoder(model)
    assert tower.settings["kind"] == kind and tower.context_length == 16
    assert tower.encode_image(encoder(torch.zeros(1, 3, 32, 32))).shape == tower.encode_text(tower.tokenize(["a cat"])).shape
    noted = json.loads((model / "mmkit.json").read_text())["extra"]
    assert noted == {"stage": "clip", "loss": kind, "seed": 0}


def test_lit_leaves_the_encoder_as_it_was(tmp_path, caplog):
    with caplog.at_level(logging.INFO):
        assert pipeline.mmkit(*lit(tmp_path / "run", "encoder.patch_drop=0.5", "train.micro_batch_size=4")) == 0
    assert "the locked one sees all patches" in caplog.text
    before, after = (load_encoder(run).state_dict() for run in (pipeline.trained("superclass"), tmp_path / "run"))
    assert before.keys() == after.keys() and all(torch.equal(before[k], after[k]) for k in before)
    start = tmp_path / "start"
    assert pipeline.mmkit(*lit(start, "train.steps=0")) == 0
    first, last = (load_text(run / "model").state_dict() for run in (start, tmp_path / "run"))
    assert not any(torch.equal(first[k], last[k]) for k in ("image_projection.weight", "logit_scale", "text.text_projection"))
    assert [p["role"] for p in pipeline.manifest(tmp_path / "run")["parents"]] == ["encoder"]


def test_patch_dropping_and_accumulation_leave_the_run_the_same(tmp_path):
    for micro in (8, 2):
        run = tmp_path / str(micro)
        # eps: with Adam's 1e-8 the rounding of gradients near zero would be blown up to whole steps.
        assert pipeline.mmkit(*clip(run, "encoder.patch_drop=0.5", "train.eps=1e-3", f"train.micro_batch_size={micro}")) == 0
    assert pipeline.losses(tmp_path / "2") == pytest.approx(pipeline.losses(tmp_path / "8"), abs=1e-6)
    assert pipeline.mmkit(*clip(tmp_path / "all")) == 0
    assert pipeline.losses(tmp_path / "all") != pytest.approx(pipeline.losses(tmp_path / "8"), abs=1e-4)


@pytest.mark.parametrize("arguments", [clip, lit])
def test_stopped_and_continued_is_bit_equal_to_straight(arguments, tmp_path, monkeypatch):
    # A scale at its bound is what the next step must find clamped in the same way.
    run = tmp_path / "run"
    command = arguments(run, "train.steps=6", "train.micro_batch_size=4", "train.lr=0.05", "train.checkpoint_every=100")
    assert pipeline.mmkit(*command) == 0
    shutil.move(run, tmp_path / "straight")
    scale = loop.lr_scale

    def stopping(at: int, **more):
        if at == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return scale(at, **more)

    with monkeypatch.context() as patch:
        patch.setattr(loop, "lr_scale", stopping)
        assert pipeline.mmkit(*command) == 75
    assert pipeline.manifest(run)["status"] == "stopped"
    assert pipeline.mmkit(*command) == 0
    assert pipeline.losses(run) == pipeline.losses(tmp_path / "straight")
    assert pipeline.largest_difference(run, tmp_path / "straight") == 0.0
