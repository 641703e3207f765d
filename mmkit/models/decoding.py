"""From decoding settings to what transformers' ``generate`` takes; draws that do not depend on the batch."""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from mmkit.config import DecodingConfig
from mmkit.errors import InputError


def choose_decoding(saved: DecodingConfig, given: Mapping[str, Any]) -> DecodingConfig:
    """Settings that were asked for, on top of saved ones.

    Args:
        saved: A model's own, for what is not given. Where ``decoding`` is given, only its length is taken.
        given: Keys of `DecodingConfig`; None is not given.

    Raises:
        InputError: An unknown key, or values that do not go together.
    """
    asked = {key: value for key, value in given.items() if value is not None}
    # Whoever names the way names all of it: an evaluation must not take over what its conditions do not say.
    merged = {"max_new_tokens": saved.max_new_tokens, **asked} if "decoding" in asked else {**saved.model_dump(), **asked}
    if merged.get("num_beams") == 1 and "length_penalty" not in asked:
        merged.pop("length_penalty", None)
    try:
        return DecodingConfig(**merged)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"]))
        what = first["msg"].removeprefix("Value error, ")
        known = ", ".join(DecodingConfig.model_fields)
        raise InputError(f"{key}: {what}" if key else what, where="decoding", mend=f"known settings: {known}") from None


def bare_settings(own: GenerationConfig) -> GenerationConfig:
    """A model's special tokens without its other generation settings.

    transformers fills what a call leaves open from the model's own settings: a repetition penalty of a chat model would change
    every text without a word.
    """
    return GenerationConfig(bos_token_id=own.bos_token_id, eos_token_id=own.eos_token_id, pad_token_id=own.pad_token_id)


class RowDraws(LogitsProcessor):
    """Sampling with a stream of random numbers for each row, so that a text does not depend on the batch it is written in.

    The exponential race: the smallest of E_v / p_v, E_v drawn from Exp(1), is token v with probability p_v. The scores become
    logarithms of p_v / E_v, of which greedy search then takes the largest.
    """

    def __init__(self, seeds: Sequence[int]) -> None:
        """One seed a row."""
        # On the CPU, so that a seed means the same draws on every device.
        self._streams = [torch.Generator().manual_seed(seed) for seed in seeds]

    def keep(self, rows: Sequence[int]) -> None:
        """Go on with these rows alone."""
        self._streams = [self._streams[row] for row in rows]

    def __call__(self, input_ids: Tensor | None, scores: Tensor) -> Tensor:
        """Scores f[B, V] -> f[B, V], the drawn token largest in each row."""
        noise = torch.empty(scores.shape, dtype=torch.float32)
        for row, stream in zip(noise, self._streams, strict=True):
            row.exponential_(generator=stream)
        return scores - noise.log().to(scores.device)


def draw_seed(seed: int, content: bytes) -> int:
    """Seed of one text's draws: the same for the same content, whatever stands beside it in the batch."""
    # Both into 32 bits: torch's generator on the CPU leaves out what is above.
    return zlib.crc32(content, zlib.crc32(str(seed).encode()))


def search_arguments(
    how: DecodingConfig, *, stop: Sequence[int], fill: int, draws: Sequence[int] | None = None
) -> dict[str, Any]:
    """Arguments of transformers' ``generate`` for greedy search, beams and sampling; the model's own must be bare.

    Args:
        how: Settings; not ``paper``, which transformers does not have.
        stop: Tokens that end a text; none: only the length does.
        fill: What fills finished rows.
        draws: With ``sample``: a seed for each row, from :func:`draw_seed`.
    """
    assert how.decoding != "paper"
    # Only where it has an effect: transformers warns otherwise.
    more = {"length_penalty": how.length_penalty or 1.0} if how.num_beams > 1 else {}
    settings = GenerationConfig(
        max_new_tokens=how.max_new_tokens,
        num_beams=how.num_beams,
        # Also when sampling: the draw is in the processor, and the largest score is what was drawn.
        do_sample=False,
        eos_token_id=list(stop) or None,
        pad_token_id=fill,
        use_cache=True,
        **more,
    )
    if how.decoding != "sample":
        return {"generation_config": settings}
    assert draws is not None, "sampling needs a seed for each row"
    return {"generation_config": settings, "logits_processor": LogitsProcessorList([*shaping_steps(how), RowDraws(draws)])}


def shaping_steps(how: DecodingConfig) -> list[LogitsProcessor]:
    """What is done to the scores before a token is drawn; nothing where none is drawn."""
    # transformers' order. Top-p is taken of what top-k left.
    steps: list[LogitsProcessor] = []
    if how.temperature is not None:
        steps.append(TemperatureLogitsWarper(how.temperature))
    if how.top_k is not None:
        steps.append(TopKLogitsWarper(how.top_k))
    if how.top_p is not None:
        steps.append(TopPLogitsWarper(how.top_p))
    return steps


def saved_settings(how: DecodingConfig, *, stop: Sequence[int], fill: int, bos: int | None) -> GenerationConfig:
    """The same settings as other programs read them from a model's folder; ``paper`` appears there as plain beams."""
    more: dict[str, Any] = {}
    if how.decoding == "sample":
        chosen = {"temperature": how.temperature, "top_p": how.top_p, "top_k": how.top_k}
        # 0 switches transformers' own top-k of 50 off.
        more = {"do_sample": True, "top_k": 0, **{name: value for name, value in chosen.items() if value is not None}}
    if how.length_penalty is not None:
        more["length_penalty"] = how.length_penalty
    return GenerationConfig(
        max_new_tokens=how.max_new_tokens,
        num_beams=how.num_beams,
        bos_token_id=bos,
        eos_token_id=list(stop) or None,
        pad_token_id=fill,
        **more,
    )
