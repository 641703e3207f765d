"""Shapes of well-known language models, for plans on machines that do not hold their ``config.json``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import AutoConfig
from transformers.configuration_utils import PreTrainedConfig

from mmkit.config import LlmConfig
from mmkit.errors import InputError
from mmkit.models.llm import llm_config


def _family(model_type: str, sizes: dict[str, tuple[int, ...]], **common: Any) -> dict[str, dict[str, Any]]:
    """Rows of (width, MLP width, layers, heads, key-value heads, vocabulary) as transformers fields, by lower-case hub name."""
    names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "vocab_size")
    fields = {"model_type": model_type, **common}
    return {name: {**fields, **dict(zip(names, row, strict=True))} for name, row in sizes.items()}


def _gpt2(sizes: dict[str, tuple[int, int, int]]) -> dict[str, dict[str, Any]]:
    """Rows of (width, layers, heads) as GPT-2 fields."""
    return {n: {"model_type": "gpt2", "n_embd": w, "n_layer": d, "n_head": h} for n, (w, d, h) in sizes.items()}


_7B, _13B = (4096, 11008, 32, 32, 32, 32000), (5120, 13824, 40, 40, 40, 32000)
_8B, _MISTRAL = (4096, 14336, 32, 32, 8, 128256), (4096, 14336, 32, 32, 8, 32000)
_70B = (8192, 28672, 80, 64, 8, 128256)
# Source of each row: the config.json of the hub repository of that name. Instruction-tuned names have their base's shape
# (`find`). The tests hold every row to the parameter count on the repository's page.
SHAPES: dict[str, dict[str, Any]] = {
    **_family("llama", {"lmsys/vicuna-7b-v1.5": _7B, "lmsys/vicuna-13b-v1.5": _13B}),
    **_family("llama", {"meta-llama/llama-2-7b-hf": _7B, "meta-llama/llama-2-13b-hf": _13B}),
    **_family("llama", {"meta-llama/meta-llama-3-8b": _8B, "meta-llama/llama-3.1-8b": _8B}),
    **_family("llama", {"meta-llama/meta-llama-3-70b": _70B, "meta-llama/llama-3.1-70b": _70B}),
    **_family(
        "llama",
        {
            "meta-llama/llama-3.2-1b": (2048, 8192, 16, 32, 8, 128256),
            "huggingfacetb/smollm2-135m": (576, 1536, 30, 9, 3, 49152),
            "huggingfacetb/smollm2-360m": (960, 2560, 32, 15, 5, 49152),
            "huggingfacetb/smollm2-1.7b": (2048, 8192, 24, 32, 32, 49152),
        },
        tie_word_embeddings=True,
    ),
    **_family("llama", {"meta-llama/llama-3.2-3b": (3072, 8192, 28, 24, 8, 128256)}, tie_word_embeddings=True, head_dim=128),
    **_family("mistral", {"mistralai/mistral-7b-v0.1": _MISTRAL, "mistralai/mistral-7b-v0.2": _MISTRAL}),
    **_family("mistral", {"mistralai/mistral-7b-v0.3": (*_MISTRAL[:5], 32768)}),
    **_family(
        "qwen2",
        {
            "qwen/qwen2.5-0.5b": (896, 4864, 24, 14, 2, 151936),
            "qwen/qwen2.5-1.5b": (1536, 8960, 28, 12, 2, 151936),
            "qwen/qwen2.5-3b": (2048, 11008, 36, 16, 2, 151936),
        },
        tie_word_embeddings=True,
    ),
    **_family(
        "qwen2",
        {
            "qwen/qwen2.5-7b": (3584, 18944, 28, 28, 4, 152064),
            "qwen/qwen2.5-14b": (5120, 13824, 48, 40, 8, 152064),
            "qwen/qwen2.5-32b": (5120, 27648, 64, 40, 8, 152064),
            "qwen/qwen2.5-72b": (8192, 29568, 80, 64, 8, 152064),
        },
        # From 7B on the head has a weight of its own.
        tie_word_embeddings=False,
    ),
    **_family(
        "qwen3",
        {
            "qwen/qwen3-0.6b": (1024, 3072, 28, 16, 8, 151936),
            "qwen/qwen3-1.7b": (2048, 6144, 28, 16, 8, 151936),
            "qwen/qwen3-4b": (2560, 9728, 36, 32, 8, 151936),
        },
        tie_word_embeddings=True,
        # Not width / heads, as elsewhere: 1024 / 16 would be 64.
        head_dim=128,
    ),
    **_family(
        "qwen3",
        {
            "qwen/qwen3-8b": (4096, 12288, 36, 32, 8, 151936),
            "qwen/qwen3-14b": (5120, 17408, 40, 40, 8, 151936),
            "qwen/qwen3-32b": (5120, 25600, 64, 64, 8, 151936),
        },
        tie_word_embeddings=False,
        head_dim=128,
    ),
    **_gpt2({"gpt2": (768, 12, 12), "gpt2-medium": (1024, 24, 16), "gpt2-large": (1280, 36, 20), "gpt2-xl": (1600, 48, 25)}),
    **_gpt2({"distilgpt2": (768, 6, 12)}),
}
# On the hub GPT-2's models have these owners; the names without one still work there.
_OWNERS = ("openai-community/", "distilbert/")
_TUNED = ("-instruct", "-chat", "-base")


def find(name: str) -> dict[str, Any] | None:
    """Fields of a well-known model by hub name, whatever its case, instruction-tuned or not; None if it is none."""
    key = name.lower()
    for owner in _OWNERS:
        key = key.removeprefix(owner)
    # mistral-7b-instruct-v0.2, llama-2-7b-chat-hf, qwen2.5-7b-instruct: the word stands at another place in each family.
    for word in _TUNED:
        key = key.replace(word, "")
    return SHAPES.get(key)


def shape_of(llm: LlmConfig) -> PreTrainedConfig:
    """Configuration of a recipe's language model, without its weights and without the network.

    Raises:
        InputError: Neither on this machine nor well known.
    """
    if llm.config is not None:
        return llm_config(llm.config)
    assert llm.name is not None  # the recipe's schema sees to it
    # A folder says its own shape, whatever it is called.
    if not Path(llm.name).is_dir():
        # The table before the cache of the hub: no file is touched, and a plan is the same on every machine.
        fields = find(llm.name)
        if fields is not None:
            return llm_config(fields)
    try:
        return AutoConfig.from_pretrained(llm.name, local_files_only=True)
    except (OSError, ValueError):
        raise InputError(
            f"the shape of {llm.name} is not known here",
            where="llm.name",
            mend="download its config.json first, or plan with llm.name=null "
            "'llm.config={model_type: llama, hidden_size: 4096, ...}' llm.tokenizer=NAME",
        ) from None
