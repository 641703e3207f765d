"""ClipCap's own beam search: scores averaged over length, a stop token that stays in the text (facts/clipcap.md 5).

The published code writes for one picture at a time and computes the whole sequence anew for every token. Here all pictures of a
batch go together, with a cache of keys and values, and a picture leaves the batch when all its beams have stopped; the captions
are the same.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.modeling_utils import PreTrainedModel


class _Beams(NamedTuple):
    """The beams of the pictures that are still being written: A pictures, K beams each.

    Attributes:
        row: i64[A], place of the picture in the batch.
        tokens: i64[A, K, T].
        sums: f32[A, K], log-probabilities summed.
        lengths: i64[A, K], tokens up to and with the stop token.
        stopped: bool[A, K].
    """

    row: Tensor
    tokens: Tensor
    sums: Tensor
    lengths: Tensor
    stopped: Tensor

    def of(self, keep: Tensor) -> _Beams:
        """Those of some pictures, bool[A]."""
        return _Beams(*(part[keep] for part in self))

    def best(self) -> list[list[int]]:
        """The beam of the highest average of each picture, cut at its length."""
        chosen = (self.sums / self.lengths).argmax(dim=1)
        rows = zip(self.tokens, self.lengths, chosen.tolist(), strict=True)
        return [tokens[k, : int(lengths[k])].tolist() for tokens, lengths, k in rows]


@torch.no_grad()
def length_averaged_beams(
    lm: PreTrainedModel,
    prefix: Tensor,
    *,
    num_beams: int,
    max_new_tokens: int,
    stop: Sequence[int],
    together: Callable[[bool], bool] | None = None,
) -> list[list[int]]:
    """Write a text after each prefix.

    Args:
        lm: Causal language model.
        prefix: f[B, P, H], input embeddings.
        num_beams: K.
        max_new_tokens: A text without a stop token is returned whole at this length.
        stop: Tokens that end a text.
        together: Whether some process has something left to write, given whether this one has. With it every process makes the
            same number of forward passes, as ZeRO-3 needs.

    Returns:
        B lists of token ids, the stop token included.
    """
    written: list[list[int]] = [[] for _ in prefix]
    cache = DynamicCache(config=lm.config)
    # transformers renamed the argument in 5.24, and takes the old name until 5.40.
    name = "cache" if "cache" in inspect.signature(lm.forward).parameters else "past_key_values"
    more = {name: cache, "use_cache": True, **({"logits_to_keep": 1} if lm._supports_logits_to_keep() else {})}
    out = lm(inputs_embeds=prefix, **more)
    logp, ids = _likeliest(out.logits, num_beams)
    ends = torch.tensor(list(stop), device=ids.device)
    places = torch.arange(len(prefix), device=ids.device)
    beams = _Beams(places, ids[..., None], logp, torch.ones_like(ids), torch.isin(ids, ends))
    # Rows of the cache that the beams go on from: at first every beam of a picture has the same past.
    past = places.repeat_interleave(num_beams)
    for _ in range(max_new_tokens - 1):
        done = beams.stopped.all(dim=1)
        # In step with others nothing leaves the batch, since forward passes may have to be made with nothing to write.
        if together is None and bool(done.any()):
            _collect(beams.of(done), written)
            past = past.view(-1, num_beams)[~done].flatten()
            beams, done = beams.of(~done), done[~done]
        unfinished = not bool(done.all())
        if not (unfinished if together is None else together(unfinished)):
            break
        cache.batch_select_indices(past)
        out = lm(input_ids=beams.tokens[..., -1].reshape(-1, 1), **more)
        beams, source = _grow(beams, out, ends)
        offset = torch.arange(len(source), device=source.device)[:, None] * num_beams
        past = (offset + source).flatten()
    _collect(beams, written)
    return written


def _grow(beams: _Beams, out: Any, ends: Tensor) -> tuple[_Beams, Tensor]:
    """One token more for every beam that has not stopped.

    Returns:
        The beams, and which beam each came from, i64[A, K].
    """
    count = beams.sums.shape[1]
    # No beam can have more than K among the best K, so K tokens of each are enough.
    logp, ids = (part.view(-1, count, count) for part in _likeliest(out.logits, count))
    # A stopped beam goes on with token 0 at no cost, once; the token lies beyond its length and is never shown.
    first = torch.arange(count, device=ids.device) == 0
    stopped = beams.stopped[..., None]
    logp = torch.where(stopped, torch.where(first, 0.0, -torch.inf), logp)
    ids = torch.where(stopped, 0, ids)
    sums = beams.sums[..., None] + logp
    lengths = beams.lengths + ~beams.stopped
    # The rule of the published code: by the average, so that a long beam is no worse for being long.
    chosen = (sums / lengths[..., None]).flatten(1).topk(count, dim=1).indices
    source = chosen // count
    token = ids.flatten(1).gather(1, chosen)
    history = beams.tokens.gather(1, source[..., None].expand_as(beams.tokens))
    grown = _Beams(
        beams.row,
        torch.cat([history, token[..., None]], dim=2),
        sums.flatten(1).gather(1, chosen),
        lengths.gather(1, source),
        # Asked of the token too: id 0 after a stop is none of its own.
        beams.stopped.gather(1, source) | torch.isin(token, ends),
    )
    return grown, source


def _likeliest(logits: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Log-probabilities f32[N, K] and ids i64[N, K] of the K likeliest next tokens, from logits f[N, T, V] of the last place."""
    last = logits[:, -1].float()
    best, ids = last.topk(count, dim=-1)
    # Without a second matrix of the vocabulary's width.
    return best - last.logsumexp(dim=-1, keepdim=True), ids


def _collect(beams: _Beams, written: list[list[int]]) -> None:
    """Put the best text of each picture into its place."""
    for row, ids in zip(beams.row.tolist(), beams.best(), strict=True):
        written[row] = ids
