"""The table of well-known language models against the parameter counts on their pages."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM

from mmkit.config import LlmConfig
from mmkit.errors import InputError
from mmkit.plan.known import SHAPES, find, shape_of

# Parameters as the hub's pages count them (safetensors metadata, tied weights once).
COUNTS = {
    "lmsys/vicuna-7b-v1.5": 6_738_415_616,
    "lmsys/vicuna-13b-v1.5": 13_015_864_320,
    "meta-llama/llama-2-7b-hf": 6_738_415_616,
    "meta-llama/llama-2-13b-hf": 13_015_864_320,
    "meta-llama/meta-llama-3-8b": 8_030_261_248,
    "meta-llama/llama-3.1-8b": 8_030_261_248,
    "meta-llama/meta-llama-3-70b": 70_553_706_496,
    "meta-llama/llama-3.1-70b": 70_553_706_496,
    "meta-llama/llama-3.2-1b": 1_235_814_400,
    "meta-llama/llama-3.2-3b": 3_212_749_824,
    "huggingfacetb/smollm2-135m": 134_515_008,
    "huggingfacetb/smollm2-360m": 361_821_120,
    "huggingfacetb/smollm2-1.7b": 1_711_376_384,
    "mistralai/mistral-7b-v0.1": 7_241_732_096,
    "mistralai/mistral-7b-v0.2": 7_241_732_096,
    "mistralai/mistral-7b-v0.3": 7_248_023_552,
    "qwen/qwen2.5-0.5b": 494_032_768,
    "qwen/qwen2.5-1.5b": 1_543_714_304,
    "qwen/qwen2.5-3b": 3_085_938_688,
    "qwen/qwen2.5-7b": 7_615_616_512,
    "qwen/qwen2.5-14b": 14_770_033_664,
    "qwen/qwen2.5-32b": 32_763_876_352,
    "qwen/qwen2.5-72b": 72_706_203_648,
    "qwen/qwen3-0.6b": 596_049_920,
    "qwen/qwen3-1.7b": 1_720_574_976,
    "qwen/qwen3-4b": 4_022_468_096,
    "qwen/qwen3-8b": 8_190_735_360,
    "qwen/qwen3-14b": 14_768_307_200,
    "qwen/qwen3-32b": 32_762_123_264,
    "gpt2": 124_439_808,
    "gpt2-medium": 354_823_168,
    "gpt2-large": 774_030_080,
    "gpt2-xl": 1_557_611_200,
    "distilgpt2": 81_912_576,
}


def test_every_row_has_its_count() -> None:
    assert SHAPES.keys() == COUNTS.keys()


@pytest.mark.parametrize("name", SHAPES)
def test_shape_has_the_published_number_of_parameters(name: str) -> None:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(shape_of(LlmConfig(name=name)))
    assert sum(p.numel() for p in model.parameters()) == COUNTS[name]


@pytest.mark.parametrize(
    ("name", "row"),
    [
        ("openai-community/gpt2-xl", "gpt2-xl"),
        ("Qwen/Qwen2.5-7B-Instruct", "qwen/qwen2.5-7b"),
        ("meta-llama/Llama-2-7b-chat-hf", "meta-llama/llama-2-7b-hf"),
        ("mistralai/Mistral-7B-Instruct-v0.2", "mistralai/mistral-7b-v0.2"),
        ("Qwen/Qwen3-8B-Base", "qwen/qwen3-8b"),
    ],
)
def test_tuned_names_have_their_bases_shape(name: str, row: str) -> None:
    assert find(name) == SHAPES[row]


def test_an_unknown_model_is_asked_for() -> None:
    with pytest.raises(InputError, match=r"llm\.config"):
        shape_of(LlmConfig(name="nobody/nothing-7b"))
    assert shape_of(LlmConfig(config={"model_type": "llama", "hidden_size": 64}, tokenizer="x")).hidden_size == 64


def test_a_folder_says_its_own_shape(tmp_path) -> None:
    shape_of(LlmConfig(name="distilgpt2")).save_pretrained(tmp_path / "gpt2")
    assert shape_of(LlmConfig(name=str(tmp_path / "gpt2"))).n_layer == 6
