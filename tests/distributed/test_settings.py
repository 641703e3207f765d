from __future__ import annotations

import json

import pytest

from mmkit.distributed.settings import deepspeed_settings
from mmkit.errors import InputError
from mmkit.recipes import recipe_folders


def settings(path, **more):
    return deepspeed_settings(path, **{"micro_batch_size": 4, "accumulation": 2, "clip": 1.0, "precision": "bf16", **more})


def test_the_recipes_numbers_are_filled_in(tmp_path):
    path = tmp_path / "zero2.json"
    path.write_text('{"zero_optimization": {"stage": 2}}')
    found = settings(path)
    assert found["zero_optimization"] == {"stage": 2}
    assert found["train_micro_batch_size_per_gpu"] == 4 and found["gradient_accumulation_steps"] == 2
    assert found["gradient_clipping"] == 1.0 and found["bf16"] == {"enabled": True}
    assert settings(path, clip=None, precision="fp32")["gradient_clipping"] == 0.0
    assert settings(path, precision="fp32")["bf16"] == {"enabled": False}


def test_gradients_of_micro_batches_are_added_up_in_fp32_unless_the_file_says_otherwise(tmp_path):
    path = tmp_path / "zero.json"
    for stage, precision, expected in ((2, "bf16", {"grad_accum_dtype": "fp32"}), (0, "bf16", None), (2, "fp32", None)):
        path.write_text(json.dumps({"zero_optimization": {"stage": stage}}))
        assert settings(path, precision=precision).get("data_types") == expected
    path.write_text(json.dumps({"zero_optimization": {"stage": 2}}))
    # One piece: there is nothing to add up, and the memory stays DeepSpeed's.
    assert "data_types" not in settings(path, accumulation=1)
    path.write_text(json.dumps({"zero_optimization": {"stage": 2}, "data_types": {"grad_accum_dtype": "bf16"}}))
    assert settings(path)["data_types"] == {"grad_accum_dtype": "bf16"}


@pytest.mark.parametrize("key", ["train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "train_batch_size", "fp16"])
def test_a_number_has_one_place(tmp_path, key):
    path = tmp_path / "own.json"
    path.write_text(json.dumps({key: "auto", "zero_optimization": {"stage": 2}}))
    with pytest.raises(InputError, match=rf"own\.json: sets {key}; remove it"):
        settings(path)


@pytest.mark.parametrize("text", ["{", "", "\xff"])
def test_no_json_is_said_in_one_line(tmp_path, text):
    path = tmp_path / "bad.json"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(InputError, match=r"bad\.json: is not JSON") as error:
        settings(path)
    assert "\n" not in str(error.value)


def test_every_shipped_file_can_be_filled_in():
    shipped = sorted(recipe_folders()["deepspeed"].glob("*.json"))
    for path in shipped:
        assert settings(path)["zero_optimization"]["stage"] in (0, 1, 2, 3), path.name


@pytest.mark.parametrize("part", ["offload_optimizer", "offload_param"])
def test_offloading_to_where_no_checkpoint_reaches_is_refused(tmp_path, part):
    path = tmp_path / "zero.json"
    path.write_text(json.dumps({"zero_optimization": {"stage": 3, part: {"device": "nvme"}}}))
    with pytest.raises(InputError, match=f"{part} to nvme has no checkpoints; use device cpu"):
        settings(path)
