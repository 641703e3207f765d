"""Training on kept features of a frozen encoder: the losses of training on pixels, without the encoder at work."""

from __future__ import annotations

import json
import shutil

import pytest
import torch

from mmkit.models.llava import load_mllm, tower_features
from tests import pipeline


def kept(run):
    return sorted((run.parent / ".features").glob("*.bin"))


@pytest.mark.parametrize("more", [[], ["batching.kind=packed", "batching.max_tokens=600"], ["train.micro_batch_size=1"]])
def test_kept_features_train_as_pixels_do(more, tmp_path):
    # Micro-batches of one: some have no picture.
    assert pipeline.mmkit(*pipeline.finetune(tmp_path / "pixels", *more)) == 0
    assert pipeline.mmkit(*pipeline.finetune(tmp_path / "kept", *more, "cache_features=true")) == 0
    assert pipeline.losses(tmp_path / "kept") == pytest.approx(pipeline.losses(tmp_path / "pixels"), abs=2e-5)
    assert pipeline.largest_difference(tmp_path / "pixels", tmp_path / "kept") < 2e-5
    assert len(kept(tmp_path / "kept")) == 1


def test_both_stages_share_a_file_and_the_tower_does_not_run_twice(tmp_path, caplog):
    data = [f"data.train={pipeline.root()}/world/llava_train.json"]
    assert pipeline.mmkit(*pipeline.align(tmp_path / "align", "cache_features=true")) == 0
    first = kept(tmp_path / "align")
    assert pipeline.mmkit(*pipeline.finetune(tmp_path / "a", *data, "cache_features=true")) == 0
    assert pipeline.mmkit(*pipeline.finetune(tmp_path / "b", *data, "cache_features=true", "train.lr=1e-4")) == 0
    # Another data file has other pictures; another learning rate has not.
    assert len(kept(tmp_path / "a")) == len(first) + 1
    assert caplog.text.count("extracting features") == 2


def test_what_is_kept_is_what_the_projector_reads():
    model, _, meta = load_mllm(pipeline.trained("align") / "model")
    pixels = torch.randn(2, 3, meta["image_size"], meta["image_size"])
    with torch.no_grad():
        features = tower_features(model, pixels)
        whole = torch.cat(tuple(model.get_image_features(pixels).pooler_output))
        torch.testing.assert_close(model.model.multi_modal_projector(features).flatten(0, 1), whole)
    assert features.shape[1] == meta["num_image_tokens"]


def test_exchanged_pictures_get_new_features_and_unreadable_ones_are_listed(tmp_path):
    world = tmp_path / "world"
    shutil.copytree(pipeline.root() / "world", world)
    items = [item for item in json.loads((world / "llava_train.json").read_text()) if "image" in item]
    (world / items[0]["image"]).write_bytes(b"no picture")
    arguments = [f"data.train={world}/llava_train.json", "data.max_skipped=0.5", "cache_features=true", "train.steps=12"]
    run = tmp_path / "run"
    assert pipeline.mmkit(*pipeline.finetune(run, *arguments)) == 0
    skipped = pipeline.rows(run / "skipped.jsonl")
    assert skipped and all("picture" in row["reason"] or "read" in row["reason"] for row in skipped)
    shutil.copy(world / items[1]["image"], world / items[0]["image"])
    assert pipeline.mmkit(*pipeline.finetune(tmp_path / "again", *arguments)) == 0
    assert len(kept(run)) == 2 and not (tmp_path / "again" / "skipped.jsonl").exists()


def test_features_of_an_encoder_that_trains_are_refused(tmp_path, capsys):
    assert pipeline.mmkit(*pipeline.finetune(tmp_path / "run", "cache_features=true", "train_encoder=true")) == 2
    assert "cache_features keeps the features of a frozen encoder" in capsys.readouterr().err


@pytest.mark.slow
def test_kept_features_under_zero3_where_one_process_alone_has_weights(tmp_path):
    assert pipeline.mmkit(*pipeline.finetune(tmp_path / "one", "train.micro_batch_size=1")) == 0
    more = ["train.micro_batch_size=1", "cache_features=true", "train.deepspeed=zero3"]
    done = pipeline.torchrun(*pipeline.finetune(tmp_path / "two", *more))
    assert done.returncode == 0, done.stderr
    assert pipeline.losses(tmp_path / "two") == pytest.approx(pipeline.losses(tmp_path / "one"), abs=1e-4)


@pytest.mark.slow
def test_four_bit_weights_under_zero3_are_refused(tmp_path):
    more = ["tune=lora", "lora.r=4", "lora.quantization=nf4", "train.deepspeed=zero3"]
    done = pipeline.torchrun(*pipeline.finetune(tmp_path / "run", *more))
    assert done.returncode != 0 and "4-bit weights cannot be cut up by ZeRO-3" in done.stderr


def test_models_that_read_another_layer_have_other_features(tmp_path):
    # The recipe of the second stage says nothing of the layer: it is the model's.
    found = []
    for layer in ("-2", "-1"):
        assert pipeline.mmkit(*pipeline.align(tmp_path / f"align{layer}", f"feature_layer={layer}")) == 0
        more = [f"model={tmp_path}/align{layer}"]
        assert pipeline.mmkit(*pipeline.finetune(tmp_path / f"kept{layer}", *more, "cache_features=true")) == 0
        assert pipeline.mmkit(*pipeline.finetune(tmp_path / f"pixels{layer}", *more)) == 0
        assert pipeline.losses(tmp_path / f"kept{layer}") == pytest.approx(pipeline.losses(tmp_path / f"pixels{layer}"), abs=2e-5)
        found.append(pipeline.losses(tmp_path / f"kept{layer}"))
    assert found[0] != found[1] and len(kept(tmp_path / "kept-2")) == 2
