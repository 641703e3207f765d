"""Tokenizers of the demo world, trained on its own texts."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from mmkit.files import new_folder, read_json


def make_tokenizers(world: Path) -> None:
    """Train ``tokenizers/bpe`` (for the captioner) and ``tokenizers/sentencepiece`` (for the MLLM) in a world's folder, once.

    Args:
        world: A finished demo world.
    """
    # Imported late: drawing a world needs no torch and no transformers.
    from mmkit.models.llm import train_bpe_tokenizer, train_sentencepiece_tokenizer

    captions = [row["caption"] for row in read_json(world / "captions_train.json")["annotations"]]
    # As the template writes them: the role words must be tokens of their own, not nine byte tokens in every turn.
    roles = {"human": "USER: ", "gpt": "ASSISTANT: "}
    turns = [roles[t["from"]] + t["value"] for item in read_json(world / "llava_train.json") for t in item["conversations"]]
    makers: dict[str, tuple[Callable[..., object], list[str], int]] = {
        "bpe": (train_bpe_tokenizer, captions, 512),
        "sentencepiece": (train_sentencepiece_tokenizer, captions + turns, 768),
    }
    for name, (train, texts, vocab_size) in makers.items():
        folder = world / "tokenizers" / name
        # A tokenizer is there whole or not at all (new_folder), so an interrupted run makes only the missing one.
        if not folder.is_dir():
            with new_folder(folder) as new:
                train(texts, new, vocab_size=vocab_size)
