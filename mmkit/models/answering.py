"""Many questions about few pictures at once: the language model's side of an answer.

What stands before a question (template, picture tokens) is read once and its keys and values are shared by all questions on the
picture; in LLaVA-1.5 that is 576 of about 640 tokens. Questions of different length are padded on the left, masks and positions
come from lengths, and an answered row leaves the batch. So an answer depends on its own row alone, up to the rounding of
floating-point sums, whose order another batch may change: in fp32 the tokens are the same, which tests hold it to.
"""

from __future__ import annotations

import contextlib
import inspect
import math
from collections.abc import Collection, Hashable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from mmkit.config import DecodingConfig
from mmkit.errors import InputError
from mmkit.models.decoding import RowDraws, search_arguments, shaping_steps
from mmkit.models.projectors import VisionLanguageModel

CacheKind = Literal["dynamic", "static"]
# Share of finished rows from which on the others go on without them: leaving costs a copy of what stays.
_LEAVE = 0.25
# Tokens of an answer that there is memory for from the start.
_ROOM = 64


class Prompt(NamedTuple):
    """Token ids of a question.

    Attributes:
        beginning: Up to the last picture and with it; empty for text alone.
        rest: What comes after it.
    """

    beginning: tuple[int, ...] = ()
    rest: tuple[int, ...] = ()

    def whole(self) -> Prompt:
        """The same without a beginning that could be shared."""
        return Prompt((), self.beginning + self.rest)


@dataclass(frozen=True)
class Asked:
    """A question as the language model reads it.

    Attributes:
        ids: The prompt, image tokens expanded.
        features: f[N, H] for its N image tokens, in order; None for text alone.
        shared: How many of the first ids other rows have too; the image tokens lie among them. 0 shares nothing.
        key: Names the shared beginning: rows of one key have the same first ids and the same features.
        draw: Seed of the row's draws, where an answer is sampled.
    """

    ids: Sequence[int]
    features: Tensor | None = None
    shared: int = 0
    key: Hashable = None
    draw: int = 0


class RoomyLayer(DynamicLayer):
    """Keys and values of one layer in memory with room for more.

    transformers' own layer copies all of them for every new token; here a token is written behind the others.
    """

    def __init__(self, room: int) -> None:
        """Make a layer with room for so many tokens; further ones make it grow."""
        super().__init__()
        self._room = room
        self._buffers: tuple[Tensor, Tensor] | None = None

    def begin(self, rows: Sequence[tuple[Tensor, Tensor] | None], width: int) -> None:
        """Fill the first ``width`` places with each row's keys and values f[heads, L, D], as far right as they go."""
        some = next(row for row in rows if row is not None)
        self._make(len(rows), some[0][None], some[1][None])
        for buffer, part in zip(self._filled(width), (0, 1), strict=True):
            for place, row in enumerate(rows):
                length = 0 if row is None else row[part].shape[1]
                # Not left as it was: what padding holds is multiplied by zero, which is no help against NaN.
                buffer[place, :, : width - length] = 0
                if row is not None:
                    buffer[place, :, width - length :] = row[part]

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Write f[B, heads, T, D] behind what is there; returns all."""
        before = self.keys.shape[2] if self.is_initialized else 0
        length = before + key_states.shape[2]
        if not self.is_initialized:
            self._room = max(self._room, length)
            self._make(len(key_states), key_states, value_states)
        elif length > self._room:
            # By half, so that copying costs little however long an answer gets.
            self._room = max(length, self._room * 3 // 2)
            keys, values = self.keys, self.values
            self._make(len(keys), keys, values)
            new_keys, new_values = self._filled(before)
            new_keys[:], new_values[:] = keys, values
        keys, values = self._filled(length)
        keys[:, :, before:], values[:, :, before:] = key_states, value_states
        return keys, values

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep these rows."""
        assert self._buffers is not None
        length = self.keys.shape[2]
        self._buffers = (self._buffers[0][indices], self._buffers[1][indices])
        self._filled(length)

    def _make(self, count: int, keys: Tensor, values: Tensor) -> None:
        """Take the memory, for rows like these."""
        self.dtype, self.device, self.is_initialized = keys.dtype, keys.device, True
        self._buffers = tuple(like.new_empty(count, like.shape[1], self._room, like.shape[3]) for like in (keys, values))  # type: ignore[assignment]

    def _filled(self, length: int) -> tuple[Tensor, Tensor]:
        """Show the first ``length`` places."""
        assert self._buffers is not None and length <= self._room
        self.keys, self.values = self._buffers[0][:, :, :length], self._buffers[1][:, :, :length]
        return self.keys, self.values


class _BeginningRead(Exception):
    """The last keys and values of a beginning are there."""


class _LastLayer(DynamicLayer):
    """Ends a forward pass of which only keys and values are wanted: the rest of the last layer would be computed for nobody."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Keep f[B, heads, T, D]. Raises _BeginningRead, always."""
        super().update(key_states, value_states)
        raise _BeginningRead


class AnswerWriter:
    """Writes the answers of one model."""

    def __init__(self, model: VisionLanguageModel, *, stop: Sequence[int], fill: int) -> None:
        """Take a model.

        Args:
            model: In eval mode, its own generation settings bare (`mmkit.models.decoding.bare_settings`).
            stop: Tokens that end an answer.
            fill: Token that pads; it is never attended to.
        """
        self.model, self.stop, self.fill = model, list(stop), fill
        self._lm: Any = model.model.language_model
        known = inspect.signature(self._lm.forward).parameters
        # transformers renamed the argument in 5.24, and takes the old name until 5.40.
        self._cache_name = "cache" if "cache" in known else "past_key_values"
        self._plain = _takes_padding_anywhere(self._lm.config, known)
        self._reach = _reach(self._lm.config)
        # Key -> for each layer keys and values f[heads, L, width] of the beginning's L tokens.
        self._beginnings: dict[Hashable, list[tuple[Tensor, Tensor]]] = {}

    @torch.inference_mode()
    def write(
        self, rows: Sequence[Asked], how: DecodingConfig, *, cache: CacheKind = "dynamic", keep: Collection[Hashable] = ()
    ) -> list[list[int]]:
        """Answer a batch.

        Args:
            rows: At least one.
            how: Decoding; not ``paper``.
            cache: ``static``: transformers' cache of fixed size, which it compiles for on a GPU; nothing is shared then.
            keep: Keys of beginnings that later batches will ask for; all others are forgotten.

        Returns:
            Token ids of each answer, the end token included.

        Raises:
            InputError: A static cache for a language model that has none.
        """
        if cache == "static" and not self._lm._can_compile_fullgraph:
            # transformers would go on: GPT-Neo's masks are then off by the places that are not filled yet.
            what = f"{type(self._lm).__name__} cannot be used with a static cache"
            raise InputError(what, where="generation.cache", mend="use dynamic")
        if max(len(row.ids) for row in rows) + how.max_new_tokens > self._reach:
            return [self._alone(row, how, cache) for row in rows]
        if how.num_beams > 1 or cache == "static" or not self._plain:
            return self._by_transformers(rows, how, cache)
        kept: dict[Hashable, list[tuple[Tensor, Tensor]]] = {}
        try:
            self._read_beginnings(rows)
            written = self._search(rows, how)
            # Copies: what is kept would hold the memory of the whole batch that it was read in.
            kept = {key: [(k.clone(), v.clone()) for k, v in self._beginnings[key]] for key in keep if key in self._beginnings}
        finally:
            # However it ended: memory may have run out, and after a Ctrl-C in a notebook a key may come to name another picture.
            self._beginnings = kept
        return written

    def _read_beginnings(self, rows: Sequence[Asked]) -> None:
        """Run the language model over the shared beginnings that it has not read yet, all of them at once."""
        new = {row.key: row for row in rows if row.shared and row.key not in self._beginnings}
        if not new:
            return
        cache = DynamicCache(config=self._lm.config)
        embeds, mask = self._embedded([row.ids[: row.shared] for row in new.values()], [row.features for row in new.values()])
        cache.layers[-1] = _LastLayer()
        with contextlib.suppress(_BeginningRead):
            self._forward(embeds, mask, cache)
        for place, (key, row) in enumerate(new.items()):
            layers = ((layer.keys[place], layer.values[place]) for layer in cache.layers)
            # Without the padding in front.
            self._beginnings[key] = [(keys[:, -row.shared :], values[:, -row.shared :]) for keys, values in layers]

    def _search(self, rows: Sequence[Asked], how: DecodingConfig) -> list[list[int]]:
        """Greedy search, or sampling by draws of each row's own."""
        draws = RowDraws([row.draw for row in rows]) if how.decoding == "sample" else None
        steps = [*shaping_steps(how), *([draws] if draws is not None else [])]
        embeds, mask = self._embedded(
            [row.ids[row.shared :] for row in rows], [None if row.shared else row.features for row in rows]
        )
        # Most answers are far shorter than they may be.
        cache, before = self._beginning_cache(rows, room=mask.shape[1] + min(how.max_new_tokens, _ROOM))
        mask = torch.cat([before, mask], dim=1)
        written: list[list[int]] = [[] for _ in rows]
        # Row of the batch -> place in `written`; done rows stay for a while, nothing more is taken from them.
        places, done = list(range(len(rows))), [False] * len(rows)
        hidden = self._forward(embeds, mask, cache)
        for left in range(how.max_new_tokens, 0, -1):
            scores = self.model.lm_head(hidden[:, -1]).float()
            for step in steps:
                scores = step(None, scores)
            chosen = scores.argmax(dim=-1)
            for row, token in enumerate(chosen.tolist()):
                if not done[row]:
                    written[places[row]].append(token)
                    done[row] = token in self.stop
            if left == 1 or all(done):
                break
            if sum(done) >= _LEAVE * len(done):
                stay = [row for row, finished in enumerate(done) if not finished]
                index = torch.tensor(stay, device=chosen.device)
                cache.batch_select_indices(index)
                mask, chosen, places, done = mask[index], chosen[index], [places[row] for row in stay], [False] * len(stay)
                if draws is not None:
                    draws.keep(stay)
            mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
            hidden = self._forward(self.model.get_input_embeddings()(chosen[:, None]), mask, cache)
        return written

    def _beginning_cache(self, rows: Sequence[Asked], room: int) -> tuple[DynamicCache, Tensor]:
        """Keys and values of each row's beginning, padded on the left, with room for more tokens; and its mask i64[B, L]."""
        width = max(row.shared for row in rows)
        mask = torch.zeros(len(rows), width, dtype=torch.int64)
        for i, row in enumerate(rows):
            mask[i, width - row.shared :] = 1
        cache = DynamicCache(config=self._lm.config)
        cache.layers = [RoomyLayer(width + room) for _ in cache.layers]
        if width:
            for number, layer in enumerate(cache.layers):
                beginnings = [self._beginnings[row.key][number] if row.shared else None for row in rows]
                layer.begin(beginnings, width)
        return cache, mask.to(self.model.device)

    def _by_transformers(self, rows: Sequence[Asked], how: DecodingConfig, cache: CacheKind) -> list[list[int]]:
        """The same by transformers' ``generate``, over the whole prompts."""
        embeds, mask = self._embedded([row.ids for row in rows], [row.features for row in rows])
        arguments = search_arguments(how, stop=self.stop, fill=self.fill, draws=[row.draw for row in rows])
        if cache == "static":
            arguments["generation_config"].cache_implementation = "static"
        # Of embeddings alone only the answer comes back, without the prompt.
        found: Tensor = self.model.generate(inputs_embeds=embeds, attention_mask=mask, **arguments)
        return [_up_to_end(ids, self.stop) for ids in found.tolist()]

    def _alone(self, row: Asked, how: DecodingConfig, cache: CacheKind) -> list[int]:
        """One answer by transformers, with rotary positions that no row before has turned."""
        # Dynamic NTK keeps those of the longest row so far until it sees a short one.
        self._lm(inputs_embeds=self.model.get_input_embeddings()(torch.tensor([[self.fill]], device=self.model.device)))
        return self._by_transformers([row], how, cache)[0]

    def _embedded(self, ids: Sequence[Sequence[int]], features: Iterable[Tensor | None]) -> tuple[Tensor, Tensor]:
        """Embeddings f[B, T, H] with pictures in the places of their tokens, and the mask i64[B, T]; padded on the left."""
        padded, mask = left_padded(ids, self.fill)
        padded = padded.to(self.model.device)
        embeds: Tensor = self.model.get_input_embeddings()(padded)
        seen = [found for found in features if found is not None]
        if seen:
            # Row by row, as the rows' features follow each other.
            embeds[padded == self.model.config.image_token_id] = torch.cat(seen).to(embeds.dtype)
        return embeds, mask.to(self.model.device)

    def _forward(self, embeds: Tensor, mask: Tensor, cache: DynamicCache) -> Tensor:
        """Last hidden states f[B, T, H] of the newest T places; ``cache`` grows by them.

        Args:
            embeds: f[B, T, H].
            mask: i64[B, L + T], of the cache's L places too.
            cache: Keys and values of the L places before.
        """
        # From the mask, so that padding moves nothing. What padding itself gets has no effect.
        positions = (mask.cumsum(dim=1) - 1).clamp(min=0)[:, -embeds.shape[1] :]
        more = {self._cache_name: cache, "position_ids": positions}
        out = self._lm(inputs_embeds=embeds, attention_mask=mask, use_cache=True, **more)
        hidden: Tensor = out.last_hidden_state
        return hidden


def _takes_padding_anywhere(config: Any, arguments: Collection[str]) -> bool:
    """Whether padding between a beginning and a question moves nothing: plain keys and values, and positions that are told.

    A sliding window counts places in the cache, padding included, and so do slopes over the distance (MPT's); a recurrent state
    has no places at all. Such models are left to transformers' own loop, which pads in front alone.
    """
    plain = all(type(layer) is DynamicLayer for layer in DynamicCache(config=config).layers)
    # GPT-Neo's window is not in its cache, but in its masks.
    local = "local" in (getattr(config, "attention_layers", None) or ())
    return plain and not local and "position_ids" in arguments


def _reach(config: Any) -> float:
    """Tokens up to which rotary positions stay as they are.

    Beyond, some kinds (dynamic NTK, LongRoPE) turn faster or slower by the longest row of the batch; rows must then be alone, or
    the answer to a short one would depend on its neighbours.
    """
    found = getattr(config, "rope_parameters", None) or {}
    # One for all layers, or one for each kind of layer.
    kinds = [found] if "rope_type" in found else [part for part in found.values() if isinstance(part, dict)]
    moving = [kind for kind in kinds if kind.get("rope_type") in ("dynamic", "longrope")]
    if not moving:
        return math.inf
    known = [kind.get("original_max_position_embeddings") for kind in moving]
    known += [getattr(config, name, None) for name in ("original_max_position_embeddings", "max_position_embeddings")]
    return min(length for length in known if length)


def left_padded(rows: Sequence[Sequence[int]], fill: int) -> tuple[Tensor, Tensor]:
    """Ids and mask i64[B, T] of rows of any length, padded on the left: the last token of every row is in the last place."""
    width = max(map(len, rows))
    ids = torch.full((len(rows), width), fill, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for i, row in enumerate(rows):
        ids[i, width - len(row) :] = torch.as_tensor(row, dtype=torch.int64)
        mask[i, width - len(row) :] = 1
    return ids, mask


def _up_to_end(ids: list[int], stop: Sequence[int]) -> list[int]:
    """A row up to and with its end token."""
    return ids[: next((i + 1 for i, token in enumerate(ids) if token in stop), len(ids))]
