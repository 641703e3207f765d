"""``mmkit bench clipcap``: beam search and training steps against loops that do what the published code does.

The published code (facts/clipcap.md 3, 5, 7) writes captions for one picture at a time and computes the whole sequence anew for
every token; it pads every caption to one length, makes logits of all positions, and computes gradients of a frozen GPT-2.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from mmkit.bench.measure import interleaved
from mmkit.config import DecodingConfig
from mmkit.models.clipcap import ClipCap, build_clipcap
from mmkit.models.llm import build_llm

# Tokens of a COCO caption in GPT-2's vocabulary, about: ten and a half words, few over twenty, and some of fifty.
_MEAN, _DEVIATION, _LONGEST = 11.5, 2.5, 50
# GPT-2's full stop, and the numbers of a CLIP B/32 feature.
_STOP, _FEATURE = 13, 512


def run(
    *,
    repeats: int = 2,
    pictures: int = 12,
    batch: int = 12,
    beams: int = 5,
    prefix: int = 10,
    length: int = 12,
    width: int = 256,
    layers: int = 4,
    vocab: int = 16_384,
    train_batch: int = 16,
) -> dict[str, Any]:
    """Compare captions a second and training pictures a second on one random GPT-2 and mapper, in one process.

    Args:
        repeats: Timed rounds, interleaved.
        pictures: Pictures that are captioned in a round.
        batch: Of them at one time, for mmkit.
        beams: Beams of both sides.
        prefix: Prefix length P.
        length: Tokens of a caption, about.
        width: Of GPT-2; GPT-2 small has 768.
        layers: Of GPT-2; GPT-2 small has 12.
        vocab: Tokens; GPT-2 has 50,257.
        train_batch: Captions of a training step; the paper's 40.

    Returns:
        Conditions, pictures a second of both sides, and ratios.

    Raises:
        AssertionError: A caption or a loss differs between the sides.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    made = make_model(width=width, layers=layers, vocab=vocab, prefix=prefix, length=length).to(device)
    features = torch.randn(pictures, _FEATURE, generator=torch.Generator().manual_seed(0)).to(device)
    stop = [_STOP]
    # 67: the published limit, entry_length (clipcap.md 5).
    how = DecodingConfig(decoding="paper", num_beams=beams, max_new_tokens=67)

    def ours() -> list[list[int]]:
        return [ids for part in features.split(batch) for ids in _cut(made.generate(part, how, stop=stop), stop)]

    def published() -> list[list[int]]:
        return [beams_without_cache(made, row, beams=beams, longest=67, stop=stop) for row in features]

    captions = ours()
    # Speed with other captions would be worth nothing.
    assert captions == published(), "captions differ from the loop without cache"
    # Warm by now: the captions above were a round of each.
    seconds = interleaved({"mmkit": ours, "published": published}, repeats=repeats, warmup=0)
    sizes = [len(ids) for ids in captions]
    found: dict[str, Any] = {
        "conditions": f"{device.type}, {torch.get_num_threads()} threads, GPT-2 of width {width} and {layers} layers, V={vocab}, "
        f"P={prefix}, median of {repeats}",
        "captions": f"{pictures} of {min(sizes)}-{np.mean(sizes):.1f}-{max(sizes)} tokens, beam {beams}, {batch} at a time",
        "equal captions": f"{pictures} of {pictures}",
        **{f"{name}, captions/s": round(pictures / took, 2) for name, took in seconds.items()},
        "captioning, mmkit / published": round(seconds["published"] / seconds["mmkit"], 1),
    }
    for frozen in (False, True):
        steps = TrainingSteps(made, count=train_batch, frozen=frozen)
        assert steps.losses_agree(), "losses differ from the published step's"
        took = interleaved({"mmkit": steps.ours, "published": steps.published}, repeats=repeats)
        name = "GPT-2 frozen" if frozen else "GPT-2 tuned"
        found |= {f"{side}, {name}, pictures/s": round(train_batch / each, 1) for side, each in took.items()}
        found[f"training, {name}, mmkit / published"] = round(took["published"] / took["mmkit"], 2)
    return found


@torch.no_grad()
def make_model(*, width: int, layers: int, vocab: int, prefix: int, length: int) -> ClipCap:
    """A random captioner that writes another text for every picture, of about ``length`` tokens with the stop token.

    The stop token grows likelier from place to place: its embedding is added to those of the positions, more and more. So all
    beams of a picture come to their end as those of a trained captioner do, and not at the limit.
    """
    # Wide weights: at GPT-2's own 0.02 a random model writes the same token over and over.
    shape = {"n_embd": width, "n_layer": layers, "n_head": max(1, width // 64), "vocab_size": vocab, "initializer_range": 0.15}
    # Without dropout both sides compute the same losses; without an end token the full stop alone ends a caption.
    plain = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "bos_token_id": None, "eos_token_id": None}
    lm = build_llm(None, config={"model_type": "gpt2", "n_positions": 256, **shape, **plain}, seed=0)
    model = build_clipcap(lm, feature_dim=_FEATURE, prefix_length=prefix)
    # How long the vectors are that the last block reads: what is added has to be seen beside them.
    ids = torch.arange(8)[None] % vocab
    hidden = lm.base_model(input_ids=ids, output_hidden_states=True).hidden_states[-2].norm(dim=-1).mean()
    tokens, positions = lm.get_input_embeddings().weight, lm.base_model.wpe.weight
    late = (torch.arange(len(positions)) - prefix - length / 3).clamp(min=0) / (2 * length / 3)
    # 0.5: tried; the report says what lengths came of it.
    positions += 0.5 * hidden * late[:, None] * F.normalize(tokens[_STOP], dim=0)
    return model


def _cut(ids: Tensor, stop: list[int]) -> list[list[int]]:
    """Rows up to and with their stop token."""
    return [row[: next((i + 1 for i, t in enumerate(row) if t in stop), len(row))] for row in ids.tolist()]


@torch.no_grad()
def beams_without_cache(model: ClipCap, feature: Tensor, *, beams: int, longest: int, stop: list[int]) -> list[int]:
    """The published beam search for one picture, its sequences computed anew for every token; returns the best one's ids."""
    embeds = model.prefix(feature[None])  # [1, P, H]
    ends = torch.tensor(stop, device=embeds.device)
    scores, tokens = _last(model, embeds).topk(beams)
    scores, tokens = scores[0], tokens[0][:, None]  # f[beams], i64[beams, 1]
    embeds = torch.cat([embeds.expand(beams, -1, -1), model.get_input_embeddings()(tokens)], dim=1)
    lengths, stopped = torch.ones(beams, device=embeds.device), torch.isin(tokens[:, 0], ends)
    for _ in range(longest - 1):
        if bool(stopped.all()):
            break
        logp = _last(model, embeds)
        # A finished beam goes on with id 0 at no cost, so that it stays in the comparison.
        logp[stopped] = -torch.inf
        logp[stopped, 0] = 0
        lengths[~stopped] += 1
        # By the average over its own length, f[beams * V]; what is stopped grows no longer.
        average, chosen = ((scores[:, None] + logp) / lengths[:, None]).flatten().topk(beams)
        source, token = chosen // logp.shape[1], chosen % logp.shape[1]  # i64[beams]
        # A beam is whatever came first: what belongs to its source goes along.
        lengths = lengths[source]
        scores = average * lengths
        tokens = torch.cat([tokens[source], token[:, None]], dim=1)
        embeds = torch.cat([embeds[source], model.get_input_embeddings()(token)[:, None]], dim=1)
        stopped = stopped[source] | torch.isin(token, ends)
    best = int((scores / lengths).argmax())
    return [int(token) for token in tokens[best, : int(lengths[best])]]


def _last(model: ClipCap, embeds: Tensor) -> Tensor:
    """Log-probabilities f[N, V] after the last position; logits of all positions are made, as in the published code."""
    logits = model.lm(inputs_embeds=embeds, use_cache=False).logits
    return logits[:, -1].float().log_softmax(-1)


class TrainingSteps:
    """One training step of both sides on the same model and captions."""

    def __init__(self, model: ClipCap, *, count: int, frozen: bool) -> None:
        """Draw captions and make an optimizer of what trains."""
        rng = np.random.default_rng(0)
        device = next(model.parameters()).device
        lengths = np.clip(np.rint(rng.normal(_MEAN, _DEVIATION, count)), 5, _LONGEST).astype(int)
        # Above 0, which the published loss takes for padding.
        self.ids = [torch.as_tensor(rng.integers(1, model.lm.config.vocab_size, n)) for n in lengths.tolist()]
        self.features = torch.as_tensor(rng.standard_normal((count, model.config.feature_dim)), dtype=torch.float32).to(device)
        self.model, self.frozen, self.device = model, frozen, device
        model.set_only_mapper(frozen)
        trained = [p for _, p in model.trainable_parameters()]
        # A rate of 0: both sides compute all of the update and neither changes what the other computes next.
        # eps and decay are those of transformers' AdamW, which the published code uses (clipcap.md 4).
        self.optimizer = torch.optim.AdamW(trained, lr=0.0, weight_decay=0.0, eps=1e-6)

    def ours(self) -> float:
        """Padded to the longest of the batch, logits of supervised positions, nothing computed for what is frozen."""
        self.model.set_only_mapper(self.frozen)
        ids = torch.nn.utils.rnn.pad_sequence(self.ids, batch_first=True, padding_value=-100).to(self.device)
        mask = (ids >= 0).long()
        out = self.model(self.features, ids.clamp(min=0), mask, ids)
        return self._update(out.loss_sum / out.num_tokens)

    def published(self) -> float:
        """Padded to one length of the data set, logits of all positions, gradients of a frozen GPT-2 too (clipcap.md 7.6)."""
        self.model.lm.requires_grad_(True)
        # The published data set's: mean and ten deviations, the longest at most (clipcap.md 2).
        width = min(int(_MEAN + 10 * _DEVIATION), _LONGEST)
        ids = torch.zeros(len(self.ids), width, dtype=torch.int64)
        mask = torch.zeros_like(ids)
        for row, found in enumerate(self.ids):
            ids[row, : len(found)] = found[:width]
            mask[row, : len(found)] = 1
        ids, mask = ids.to(self.device), mask.to(self.device)
        prefix = self.model.prefix(self.features)
        embeds = torch.cat([prefix, self.model.get_input_embeddings()(ids)], dim=1)  # [B, P + T, H]
        mask = torch.cat([mask.new_ones(prefix.shape[:2]), mask], dim=1)
        # Position P - 1 + t predicts token t.
        logits = self.model.lm(inputs_embeds=embeds, attention_mask=mask, use_cache=False).logits[:, prefix.shape[1] - 1 : -1]
        return self._update(F.cross_entropy(logits.flatten(0, 1), ids.flatten(), ignore_index=0))

    def _update(self, loss: Tensor) -> float:
        """Backward and optimizer step; returns the loss."""
        loss.backward()
        self.optimizer.step()
        self.model.zero_grad(set_to_none=True)
        return float(loss.detach())

    def losses_agree(self) -> bool:
        """Whether both sides compute the same loss."""
        first, second = self.ours(), self.published()
        return abs(first - second) < 1e-3 * abs(first)
