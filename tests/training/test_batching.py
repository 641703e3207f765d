"""Plain, grouped and packed batches through the real command line: the same losses, the same weights, nothing lost."""

from __future__ import annotations

import json
import math
import shutil

import pytest

from tests import pipeline

PACKED = ["batching.kind=packed", "batching.max_tokens=400"]


def rows(run):
    return [row for row in pipeline.rows(run / "metrics.jsonl") if "loss" in row]


@pytest.mark.parametrize("tune", ["full", "lora"])
def test_packed_training_equals_padded_training(tune, tmp_path):
    more = ["tune=lora", "lora.r=4", "lora.dropout=0"] if tune == "lora" else ["tune=full"]
    assert pipeline.mmkit(*pipeline.finetune(tmp_path / "padded", *more)) == 0
    assert pipeline.mmkit(*pipeline.finetune(tmp_path / "packed", *more, *PACKED)) == 0
    padded, packed = rows(tmp_path / "padded"), rows(tmp_path / "packed")
    assert [r["loss"] for r in packed] == pytest.approx([r["loss"] for r in padded], abs=1e-5)
    assert [r["grad_norm"] for r in packed] == pytest.approx([r["grad_norm"] for r in padded], rel=1e-4)
    assert pipeline.largest_difference(tmp_path / "padded", tmp_path / "packed") < 1e-5
    # The same samples and the same supervised tokens, without a padded position.
    for key in ("batch_digest", "counted", "supervised_per_sample", "cut"):
        assert [r[key] for r in packed] == [r[key] for r in padded]
    assert {r["padding"] for r in packed} == {0.0} and all(r["padding"] > 0 for r in padded)
    assert all(r["tokens_per_second"] > 0 for r in packed)


def test_the_bound_on_tokens_changes_the_cut_and_not_the_step(tmp_path):
    assert pipeline.mmkit(*pipeline.finetune(tmp_path / "one", "batching.kind=packed", "batching.max_tokens=10000")) == 0
    assert pipeline.mmkit(*pipeline.finetune(tmp_path / "many", "batching.kind=packed", "batching.max_tokens=200")) == 0
    assert pipeline.losses(tmp_path / "one") == pytest.approx(pipeline.losses(tmp_path / "many"), abs=1e-5)
    assert pipeline.largest_difference(tmp_path / "one", tmp_path / "many") < 1e-5


def test_packed_runs_continue_bit_for_bit(tmp_path, monkeypatch):
    from tests.training.test_stages import stop_after

    assert pipeline.mmkit(*pipeline.finetune(tmp_path / "straight", *PACKED)) == 0
    with monkeypatch.context() as patch:
        stop_after(patch, 2)
        assert pipeline.mmkit(*pipeline.finetune(tmp_path / "run", *PACKED)) == 75
    assert pipeline.mmkit(*pipeline.finetune(tmp_path / "run", *PACKED)) == 0
    assert pipeline.losses(tmp_path / "run") == pipeline.losses(tmp_path / "straight")
    assert pipeline.largest_difference(tmp_path / "run", tmp_path / "straight") == 0.0


@pytest.mark.slow
def test_two_processes_pack_as_one(tmp_path):
    assert pipeline.mmkit(*pipeline.finetune(tmp_path / "one", *PACKED)) == 0
    done = pipeline.torchrun(*pipeline.finetune(tmp_path / "two", *PACKED))
    assert done.returncode == 0, done.stderr
    assert pipeline.losses(tmp_path / "two") == pytest.approx(pipeline.losses(tmp_path / "one"), abs=1e-5)
    assert [r["batch_digest"] for r in rows(tmp_path / "two")] == [r["batch_digest"] for r in rows(tmp_path / "one")]
    assert pipeline.largest_difference(tmp_path / "one", tmp_path / "two") < 1e-5


def test_grouped_batches_pad_less_and_see_every_sample_as_often(tmp_path):
    length = ["train.steps=null", "train.epochs=1"]
    found = {}
    for kind in ("plain", "grouped"):
        assert pipeline.mmkit(*pipeline.finetune(tmp_path / kind, *length, f"batching.kind={kind}")) == 0
        found[kind] = rows(tmp_path / kind)
    assert len(found["plain"]) == len(found["grouped"]) > 4
    padding = {kind: sum(r["padding"] for r in each) for kind, each in found.items()}
    assert padding["grouped"] < padding["plain"] / 2
    assert [r["batch_digest"] for r in found["plain"]] != [r["batch_digest"] for r in found["grouped"]]


def test_captions_are_grouped_by_length(tmp_path):
    found = {}
    for kind in ("plain", "grouped"):
        assert pipeline.mmkit(*pipeline.clipcap(tmp_path / kind, f"batching.kind={kind}", "train.steps=25")) == 0
        found[kind] = rows(tmp_path / kind)
    padding = {kind: sum(r["padding"] for r in each) for kind, each in found.items()}
    assert padding["grouped"] < padding["plain"] / 2


def conversations(tmp_path, *odd):
    world = pipeline.root() / "world"
    items = json.loads((world / "llava_train.json").read_text())[:20]
    file = tmp_path / "data.json"
    file.write_text(json.dumps([*items, *odd]))
    return [f"data.train={file}", f"data.image_root={world}", "data.max_skipped=0.2"]


def test_what_cannot_be_encoded_is_left_out_before_training(tmp_path):
    # One turn whose question alone is longer than max_length.
    long = {"id": "long", "conversations": [{"from": "human", "value": "what " * 2000}, {"from": "gpt", "value": "no"}]}
    run = tmp_path / "run"
    assert pipeline.mmkit(*pipeline.finetune(run, *conversations(tmp_path, long), *PACKED)) == 0
    skipped = pipeline.rows(run / "skipped.jsonl")
    assert [row["key"] for row in skipped] == ["long"] and "384 tokens" in skipped[0]["reason"]
    assert pipeline.manifest(run)["samples_in_data"] == 20


def test_nothing_that_can_be_encoded_is_refused(tmp_path, capsys):
    arguments = pipeline.finetune(tmp_path / "run", *conversations(tmp_path), "max_length=8", "batching.kind=grouped")
    assert pipeline.mmkit(*arguments) == 2
    assert "none of 20 conversations can be used" in capsys.readouterr().err


def test_a_bound_below_the_longest_sample_is_refused(tmp_path, capsys):
    assert pipeline.mmkit(*pipeline.finetune(tmp_path / "run", "batching.kind=packed", "batching.max_tokens=20")) == 2
    said = capsys.readouterr().err
    assert "batching.max_tokens: the longest sample has" in said and "a micro-batch at most 20" in said


def test_lengths_are_counted_once_and_kept(tmp_path, monkeypatch):
    monkeypatch.setenv("MMKIT_CACHE", str(tmp_path / "cache"))
    data = conversations(tmp_path)
    assert pipeline.mmkit(*pipeline.finetune(tmp_path / "a", *data, *PACKED)) == 0
    kept = list((tmp_path / "cache" / "lengths").iterdir())
    assert len(kept) == 1
    before = kept[0].stat().st_mtime_ns
    assert pipeline.mmkit(*pipeline.finetune(tmp_path / "b", *data, *PACKED)) == 0
    assert [f.stat().st_mtime_ns for f in (tmp_path / "cache" / "lengths").iterdir()] == [before]
    # Another maximum length is another length of some.
    assert pipeline.mmkit(*pipeline.finetune(tmp_path / "c", *data, *PACKED, "max_length=300")) == 0
    assert len(list((tmp_path / "cache" / "lengths").iterdir())) == 2


def test_validation_keeps_the_bound(tmp_path):
    world = pipeline.root() / "world"
    val = [f"data.val={world}/llava_train.json", "train.val_every=2", "train.val_batches=2"]
    assert pipeline.mmkit(*pipeline.finetune(tmp_path / "padded", *val)) == 0
    assert pipeline.mmkit(*pipeline.finetune(tmp_path / "packed", *val, "batching.kind=packed", "batching.max_tokens=800")) == 0
    losses = [
        [r["val_loss"] for r in pipeline.rows(tmp_path / n / "metrics.jsonl") if "val_loss" in r] for n in ("padded", "packed")
    ]
    assert losses[0] == pytest.approx(losses[1], abs=1e-5) and all(math.isfinite(v) for v in losses[0])


def test_lengths_are_counted_again_when_another_picture_is_missing(tmp_path, monkeypatch):
    monkeypatch.setenv("MMKIT_CACHE", str(tmp_path / "cache"))
    world = tmp_path / "world"
    shutil.copytree(pipeline.root() / "world", world)
    items = json.loads((world / "llava_train.json").read_text())
    pictures = [world / item["image"] for item in items if "image" in item][:2]
    data = [f"data.train={world}/llava_train.json", "data.max_skipped=0.2", "train.steps=1"]
    for number, picture in enumerate(pictures):
        picture.rename(tmp_path / "away")
        assert pipeline.mmkit(*pipeline.finetune(tmp_path / str(number), *data, *PACKED)) == 0
        (tmp_path / "away").rename(picture)
    assert len(list((tmp_path / "cache" / "lengths").iterdir())) == 2
