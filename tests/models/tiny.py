"""Tiny parts shared by the tests: tokenizers trained on a few lines, towers and language models of width 32."""

from __future__ import annotations

import functools
import tempfile
from pathlib import Path

import torch
from transformers import AddedToken, AutoTokenizer, CLIPVisionConfig, CLIPVisionModel, SiglipVisionConfig, SiglipVisionModel

from mmkit.models.llm import build_llm, train_bpe_tokenizer, train_sentencepiece_tokenizer

WORDS = ["a", "red", "blue", "green", "circle", "square", "on", "the", "table", "near", "two", "three", "big"]
WORDS += ["small", "dog", "bus", "what", "is", "this", "how", "many"]
TEXTS = [" ".join(WORDS[i % 7 : i % 7 + 4 + i % 5]) + ("." if i % 2 else "?") for i in range(60)]
TEXTS += ["Coloured shapes.", "What is this?", "USER: hi ASSISTANT: hello", "It's 3, not 12!", "Describe the picture."]
LLAMA = {
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
}
GPT2 = {"model_type": "gpt2", "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128}


@functools.cache
def _folder(kind: str) -> Path:
    folder = Path(tempfile.mkdtemp(prefix=f"mmkit-{kind}-"))
    if kind == "bpe":
        train_bpe_tokenizer(TEXTS, folder, vocab_size=330)
    else:
        train_sentencepiece_tokenizer(TEXTS, folder, vocab_size=340)
    return folder


def tokenizer(kind: str, *, image: bool = True, chatml: bool = False):
    """A fresh copy, so that tests may add tokens."""
    made = AutoTokenizer.from_pretrained(_folder(kind))
    extra = ["<image>"] * image + ["<|im_start|>", "<|im_end|>"] * chatml
    if extra:
        made.add_special_tokens({"extra_special_tokens": [AddedToken(t, special=True, normalized=False) for t in extra]})
    return made


def siglip(seed: int = 0, size: int = 32) -> SiglipVisionModel:
    torch.manual_seed(seed)
    config = SiglipVisionConfig(
        hidden_size=24,
        intermediate_size=32,
        num_hidden_layers=3,
        num_attention_heads=4,
        image_size=size,
        patch_size=16,
        vision_use_head=False,
    )
    return SiglipVisionModel(config).eval()


def clip(seed: int = 0) -> CLIPVisionModel:
    torch.manual_seed(seed)
    config = CLIPVisionConfig(
        hidden_size=24,
        intermediate_size=32,
        num_hidden_layers=3,
        num_attention_heads=4,
        image_size=32,
        patch_size=16,
    )
    return CLIPVisionModel(config).eval()


def llama(tok=None, *, seed: int = 0, **more):
    return build_llm(None, config={**LLAMA, **more}, seed=seed, tokenizer=tok)


def gpt2(tok=None, *, seed: int = 0, **more):
    return build_llm(None, config={**GPT2, **more}, seed=seed, tokenizer=tok)
