"""Captions as text: where one ends, in training and in writing, and how tokens become a line again."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

from torch import Tensor
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from mmkit.config import DecodingConfig
from mmkit.errors import InputError
from mmkit.models.clipcap import ClipCap
from mmkit.models.generation import stop_ids

CaptionEnd = Literal["eos", "period", "none"]


def period_token(tokenizer: PreTrainedTokenizerBase) -> int:
    """The token of a full stop behind a word.

    Raises:
        InputError: The tokenizer has none: it writes the stop together with the letters before it.
    """
    # Behind a word, because SentencePiece has another token for a stop that stands alone.
    last: int = tokenizer("a dog.", add_special_tokens=False)["input_ids"][-1]
    if tokenizer.decode([last]).strip() != ".":
        raise InputError("this tokenizer has no token for a full stop", where="caption_end", mend="use caption_end: eos")
    return last


def end_token(tokenizer: PreTrainedTokenizerBase, end: CaptionEnd) -> int:
    """The token at which writing stops, for captions that were trained with this end.

    Raises:
        InputError: The tokenizer has no such token.
    """
    # "none" too: nothing else ends a caption there, as in the published code.
    if end != "eos":
        return period_token(tokenizer)
    found: int | None = tokenizer.eos_token_id
    if found is None:
        raise InputError("this tokenizer has no end token", where="caption_end", mend="use caption_end: period")
    return found


def caption_ids(
    tokenizer: PreTrainedTokenizerBase, captions: Sequence[str], *, end: CaptionEnd, max_length: int
) -> list[list[int]]:
    """Token ids of captions as they are learnt, cut to ``max_length``, their end always last (so that the model learns to stop).

    Args:
        tokenizer: The language model's. No start token is added: the prefix stands in its place.
        captions: Texts.
        end: ``eos`` ends them with the end token, ``period`` with a full stop (ClipCap on Conceptual Captions), ``none`` not at
            all (ClipCap on COCO, whose captions mostly have their own).
        max_length: Tokens, with the end.

    Raises:
        InputError: The tokenizer has no such end.
    """
    if end == "period":
        # One stop, and no space before it: " ." is another token in GPT-2's vocabulary.
        captions = [caption.replace(" .", ".").rstrip(". ") for caption in captions]
    # All at once: a fast tokenizer works on a list in parallel.
    encoded: list[list[int]] = tokenizer(list(captions), add_special_tokens=False)["input_ids"]
    if end == "none":
        return [ids[:max_length] for ids in encoded]
    last = end_token(tokenizer, end)
    return [[*ids[: max_length - 1], last] for ids in encoded]


def stop_tokens(model: ClipCap, tokenizer: PreTrainedTokenizerBase, how: DecodingConfig) -> list[int]:
    """What ends a caption in writing: the end it was trained with, and with the paper's decoding the full stop too."""
    ends = stop_ids(model.lm)
    # mmkit departs from the published code, which knows no end token: a caption that was trained with one may have no full stop.
    return [*ends, *{period_token(tokenizer)} - {*ends}] if how.decoding == "paper" else ends


def write_captions(
    model: ClipCap,
    tokenizer: PreTrainedTokenizerBase,
    features: Tensor,
    how: DecodingConfig,
    *,
    draws: Sequence[int] | None = None,
    together: Callable[[bool], bool] | None = None,
) -> list[str]:
    """One line for each picture.

    Args:
        model: The captioner.
        tokenizer: Its own.
        features: f[B, D] or f[B, N, D], on the model's device.
        how: Decoding.
        draws: As in :meth:`ClipCap.generate`.
        together: As in :meth:`ClipCap.generate`.
    """
    stop = stop_tokens(model, tokenizer, how)
    rows = model.generate(features, how, stop=stop, draws=draws, together=together).tolist()
    # Up to the stop: what fills a finished row may be a token that shows.
    ends = [next((i + 1 for i, token in enumerate(row) if token in stop), len(row)) for row in rows]
    texts = tokenizer.batch_decode([row[:end] for row, end in zip(rows, ends, strict=True)], skip_special_tokens=True)
    # A caption is one line, here as in the result files of evaluation.
    return [" ".join(text.split()) for text in texts]
