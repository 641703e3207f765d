"""``mmkit bench packing``: supervised tokens a second, packed against padded batches, on the lengths of instruction data.

The padded side is LLaVA's ``group_by_modality_length``: mega-batches of one modality, whose samples are dealt to the processes so
that these have equally many words; within a process's batch short rows are padded to the longest. A second padded side is mmkit's
own grouping, which sorts by length over many batches. Model, loss and samples are the same on all sides.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import LlamaConfig, LlamaForCausalLM

from mmkit.bench.measure import interleaved
from mmkit.data.batching import GroupedOrder, Lengths, PackedBatches, Share
from mmkit.data.conversations import IGNORE_INDEX
from mmkit.data.layout import Layout
from mmkit.data.order import make_order
from mmkit.data.packing import pack_sequences, pad_sequences
from mmkit.errors import InputError
from mmkit.models.lm_loss import use_loss_head
from mmkit.models.packed import allow_packing, packed_arguments

# Sizes of the mixture's parts (haotian-liu/LLaVA#702); median and log-deviation of their text tokens are our assumption, from the
# number of turns and the kind of answer. A file of real lengths takes their place by `lengths`.
_PARTS = (
    (157_712, True, 200, 0.6),  # LLaVA-Instruct: conversations, details, reasoning
    (40_688, False, 900, 0.9),  # ShareGPT, text only
    (82_783, True, 130, 0.4),  # VQAv2
    (72_140, True, 200, 0.5),  # GQA
    (75_158, True, 110, 0.3),  # OKVQA, A-OKVQA
    (80_000, True, 140, 0.4),  # OCR-VQA
    (21_953, True, 80, 0.3),  # TextCaps
    (134_847, True, 250, 0.7),  # RefCOCO, Visual Genome
)
# LLaVA-1.5's: 336 px in patches of 14.
_IMAGE_TOKENS = 576
# vicuna_v1's system sentence, about.
_SYSTEM_TOKENS = 40
# Of the rest of the text. It makes a tenth of all tokens, the lower end of what performance.md 6 gives.
_SHARE_SUPERVISED = 0.35


class _Samples(NamedTuple):
    """Lengths, and tokens and labels of each sample."""

    lengths: Lengths
    ids: list[list[int]]
    labels: list[list[int]]


def run(
    *,
    # Several global batches, or there is nothing that mmkit's own grouping could regroup.
    samples: int = 256,
    micro_batch: int = 16,
    world_size: int = 4,
    max_tokens: int = 16384,
    max_length: int = 2048,
    width: int = 128,
    layers: int = 1,
    vocab_size: int = 8000,
    lengths: str = "",
    repeats: int = 3,
    threads: int = 0,
) -> dict[str, Any]:
    """Forward and backward over the same samples, cut into batches in three ways.

    Args:
        samples: How many; a multiple of ``micro_batch * world_size``, the global batch.
        micro_batch: Samples of a padded batch (LLaVA's 16).
        world_size: Processes that the global batch is dealt to; this process computes the batches of all of them.
        max_tokens: Of a packed batch.
        max_length: Longer samples are cut.
        width: Hidden size of the Llama that is trained.
        layers: Its blocks.
        vocab_size: Its tokens.
        lengths: ``.npz`` with ``tokens`` and ``text_only``, as a run keeps it in its data cache; empty: assumed ones.
        repeats: Timed rounds, interleaved.
        threads: CPU threads; 0 leaves torch's choice.

    Returns:
        Conditions, shares of padding, supervised tokens a second of each side and their ratios.

    Raises:
        InputError: Sizes that do not fit each other.
    """
    if threads:
        torch.set_num_threads(threads)
    batch_size = micro_batch * world_size
    if samples % batch_size:
        raise InputError(f"{samples} samples are no multiple of the global batch {batch_size}", where="samples")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    known = _read(Path(lengths), samples) if lengths else _mixture(samples, max_length)
    drawn = _draw(known, vocab_size)
    order = make_order(Layout.flat(samples), 0)
    common = {"lengths": known, "batch_size": batch_size}
    steps = samples // batch_size
    grouped = GroupedOrder(order, seed=0, steps=steps, epoch=samples, **common)  # type: ignore[arg-type]
    # Rank by rank, since no piece holds samples of two processes.
    ours = [
        [p.index for p in batch]
        for step in range(steps)
        for rank in range(world_size)
        for batch in PackedBatches(order, max_tokens=max_tokens, share=Share(rank, world_size), **common).step(step)  # type: ignore[arg-type]
    ]
    index = [p.index for p in grouped.positions(0, samples)]
    cuts: dict[str, list[list[int]]] = {
        "packed": ours,
        "modality-grouped": _llava_batches(known, micro_batch, world_size),
        "length-grouped": [index[i : i + micro_batch] for i in range(0, samples, micro_batch)],
    }
    model = _model(width, layers, vocab_size, max_length, device)
    work = {name: _Side(model, drawn, batches, device, packed=name == "packed") for name, batches in cuts.items()}
    losses = {name: side() for name, side in work.items()}
    # The same samples under the same weights: another sum would mean that one side leaves tokens out or lets them see others.
    spread = max(losses.values()) / min(losses.values()) - 1
    assert spread < 1e-3, f"the sides disagree: {losses}"
    # Warm by now: the losses above were a round of each.
    seconds = interleaved(work, repeats=repeats, warmup=0)
    # Without the first position, which nothing predicts.
    supervised = sum(label != IGNORE_INDEX for labels in drawn.labels for label in labels[1:])
    return {
        "conditions": f"{samples} samples, {int(known.tokens.sum())} tokens, {supervised} supervised "
        f"({'file' if lengths else 'assumed lengths'}), Llama {layers} x {width}, V={vocab_size}, {device.type}, "
        f"{torch.get_num_threads()} threads",
        **{f"{name} padding": round(1 - int(known.tokens.sum()) / side.positions, 3) for name, side in work.items()},
        **{f"{name} supervised tokens/s": round(supervised / seconds[name]) for name in work},
        "speed, packed / modality-grouped": round(seconds["modality-grouped"] / seconds["packed"], 3),
        "speed, packed / length-grouped": round(seconds["length-grouped"] / seconds["packed"], 3),
        "largest difference of the loss": spread,
    }


def _mixture(samples: int, max_length: int) -> Lengths:
    """Lengths as of the 665 k mixture: its parts by their sizes, text tokens log-normal in each."""
    rng = np.random.default_rng(0)
    sizes = np.asarray([part[0] for part in _PARTS], dtype=np.float64)
    chosen = rng.choice(len(_PARTS), samples, p=sizes / sizes.sum())  # i64[samples], the part of each
    medians, spreads = (np.asarray([part[i] for part in _PARTS]) for i in (2, 3))
    text = np.exp(np.log(medians[chosen]) + spreads[chosen] * rng.standard_normal(samples)).astype(int)
    pictured = np.asarray([part[1] for part in _PARTS])[chosen]  # bool[samples]
    tokens = np.minimum(text + _SYSTEM_TOKENS + pictured * _IMAGE_TOKENS, max_length)
    return Lengths(tokens.astype(np.int32), ~pictured)


def _read(path: Path, samples: int) -> Lengths:
    """Some lengths of a real data set, drawn at random."""
    try:
        with np.load(path) as found:
            tokens, text_only = found["tokens"], found["text_only"]
    except (OSError, KeyError, ValueError) as error:
        raise InputError(f"is no file of lengths ({error})", where=path, mend="give tokens and text_only in one .npz") from None
    # No tokens stand for what could not be encoded.
    usable = np.flatnonzero(tokens)
    if len(usable) < samples:
        raise InputError(f"holds {len(usable)} usable lengths, fewer than {samples}", where=path, mend="use fewer samples")
    index = np.random.default_rng(0).choice(usable, samples, replace=False)
    return Lengths(tokens[index].astype(np.int32), text_only[index])


def _draw(known: Lengths, vocab_size: int) -> _Samples:
    """Random tokens of the given lengths; of the text after picture and system sentence a share at the end is supervised."""
    rng = np.random.default_rng(1)
    ids = [rng.integers(vocab_size, size=int(n)) for n in known.tokens]
    labels = []
    for tokens, text_only in zip(ids, known.text_only, strict=True):
        text = len(tokens) - _SYSTEM_TOKENS - (0 if text_only else _IMAGE_TOKENS)
        first = len(tokens) - max(1, int(_SHARE_SUPERVISED * max(1, text)))
        labels.append([IGNORE_INDEX] * first + tokens[first:].tolist())
    return _Samples(known, [tokens.tolist() for tokens in ids], labels)


def _llava_batches(known: Lengths, micro_batch: int, world_size: int) -> list[list[int]]:
    """LLaVA's rule: one modality a mega-batch, dealt to the processes by words (image tokens not counted)."""
    rng = np.random.default_rng(0)
    words = known.tokens - np.where(known.text_only, 0, _IMAGE_TOKENS)
    whole, rest = [], []
    for modality in (False, True):
        index: NDArray[np.int64] = rng.permutation(np.flatnonzero(known.text_only == modality))
        mega = [index[i : i + micro_batch * world_size] for i in range(0, len(index), micro_batch * world_size)]
        whole += [m for m in mega if len(m) == micro_batch * world_size]
        rest += [int(i) for m in mega if len(m) < micro_batch * world_size for i in m]
    # What fills no mega-batch of its own is mixed in one, as there.
    groups: list[Sequence[int]] = [m.tolist() for m in whole]
    groups += [rest[i : i + micro_batch * world_size] for i in range(0, len(rest), micro_batch * world_size)]
    return [[group[i] for i in part] for group in groups for part in _even(words[list(group)].tolist(), world_size, micro_batch)]


def _even(words: list[int], world_size: int, micro_batch: int) -> list[list[int]]:
    """Parts of ``micro_batch`` each with about equally many words: the longest first, each to the shortest that has room."""
    parts: list[list[int]] = [[] for _ in range(world_size)]
    weights = [0] * world_size
    for index in sorted(range(len(words)), key=lambda i: -words[i]):
        chosen = min((p for p in range(world_size) if len(parts[p]) < micro_batch), key=lambda p: weights[p])
        parts[chosen].append(index)
        weights[chosen] += words[index]
    # The last group may be too small for every process to get some.
    return [part for part in parts if part]


def _model(width: int, layers: int, vocab_size: int, max_length: int, device: torch.device) -> LlamaForCausalLM:
    """A small Llama that can read both kinds of batches."""
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=width,
        intermediate_size=3 * width,
        num_hidden_layers=layers,
        num_attention_heads=max(1, width // 64),
        max_position_embeddings=max_length,
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).to(device)
    use_loss_head(model)
    allow_packing(model)
    return model


class _Side:
    """Loss and gradients over all batches of one side."""

    def __init__(
        self, model: LlamaForCausalLM, samples: _Samples, batches: list[list[int]], device: torch.device, *, packed: bool
    ) -> None:
        self.model, self.device = model, device
        self.rows = [(_packed if packed else _padded)(samples, batch) for batch in batches]
        self.positions = sum(row["input_ids"].numel() for row in self.rows)

    def __call__(self) -> float:
        """The summed loss; gradients are computed and thrown away."""
        total = 0.0
        for row in self.rows:
            batch = {k: v.to(self.device) if isinstance(v, torch.Tensor) else v for k, v in row.items()}
            labels = batch.pop("labels")
            lengths: Any = batch.pop("document_lengths", None)
            how = {} if lengths is None else packed_arguments(lengths, self.device)
            # bf16 on a GPU, where attention of packed rows takes halves alone.
            with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.device.type == "cuda"):
                hidden = self.model.model(use_cache=False, **batch, **how).last_hidden_state
                chosen = labels[:, 1:] != IGNORE_INDEX
                loss = self.model.lm_head(hidden[:, :-1][chosen], labels[:, 1:][chosen])
            loss.backward()
            self.model.zero_grad(set_to_none=True)
            total += loss.item()
        return total


def _packed(samples: _Samples, batch: list[int]) -> dict[str, Any]:
    """All samples of a batch in one row."""
    return pack_sequences([samples.ids[i] for i in batch], [samples.labels[i] for i in batch])


def _padded(samples: _Samples, batch: list[int]) -> dict[str, Any]:
    """A row a sample."""
    return pad_sequences([samples.ids[i] for i in batch], [samples.labels[i] for i in batch], 0)
