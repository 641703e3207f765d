"""``mmkit bench superclass-loss``: head and loss, forward and backward, against the published dense maths and torch's own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from mmkit.bench.measure import interleaved, peak_bytes
from mmkit.encoders.loss import soft_label_loss


def run(
    *,
    batch: int = 1024,
    width: int = 768,
    vocab_size: int = 49408,
    labels: int = 24,
    chunk_rows: int = 256,
    kind: str = "softmax",
    precision: str = "fp32",
    repeats: int = 5,
    threads: int = 0,
) -> dict[str, Any]:
    """Compare time and peak memory.

    Args:
        batch: Rows B.
        width: Feature size D.
        vocab_size: Labels V.
        labels: Labels of a row.
        chunk_rows: Rows of logits at one time.
        kind: Our loss; the peers are always the softmax loss.
        precision: ``fp32``, or ``bf16`` under autocast.
        repeats: Timed rounds, interleaved.
        threads: CPU threads; 0 leaves torch's choice.

    Returns:
        Conditions, seconds, MiB beyond inputs, weights and their gradients, ratios to each peer, largest gradient difference.
    """
    # Before the first operation, so that every contender has the same number.
    if threads:
        torch.set_num_threads(threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    # On the CPU, for the same numbers on every device.
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(batch, width, generator=generator).to(device).requires_grad_()
    # The reference's initialisation of the head: logits of a size that occurs in training.
    weight = (torch.randn(vocab_size, width, generator=generator) * width**-0.5).to(device).requires_grad_()
    bias = torch.zeros(vocab_size, device=device).requires_grad_()
    # Without repeats: a K-hot matrix counts a repeated label once.
    ids = torch.stack([torch.randperm(vocab_size, generator=generator)[:labels] for _ in range(batch)]).to(device)
    offsets = torch.arange(0, batch * labels + 1, labels)
    # Away from 0, or some labels would weigh nothing and the work would differ from row to row.
    idf = torch.rand(vocab_size, generator=generator).to(device) + 0.5
    inputs = (x, weight, bias)

    def ours() -> tuple[Tensor, ...]:
        # On the clock, since the peers make their targets on it too.
        raw = idf[ids]
        w = (raw / raw.sum(1, keepdim=True)).flatten()
        loss = soft_label_loss(*inputs, ids.flatten(), offsets, w, kind=kind, chunk_rows=chunk_rows)
        # grad, not backward: nothing accumulates in .grad from round to round.
        return torch.autograd.grad(loss, inputs)

    def published() -> tuple[Tensor, ...]:
        return torch.autograd.grad(_published(inputs, ids, idf, device), inputs)

    def cross_entropy() -> tuple[Tensor, ...]:
        return torch.autograd.grad(F.cross_entropy(F.linear(*inputs), _dense_target(ids, idf, vocab_size)), inputs)

    contenders = {
        name: _under(precision, device, f) for name, f in (("mmkit", ours), ("published", published), ("torch", cross_entropy))
    }
    # Apart from the times: torch's profiler, which counts the bytes on a CPU, slows what it watches.
    memory = {name: peak_bytes(work, device) for name, work in contenders.items()}
    seconds = interleaved(contenders, repeats=repeats)
    found: dict[str, Any] = {
        "conditions": f"B={batch} D={width} V={vocab_size} labels={labels} chunk={chunk_rows} {kind} {precision} {device.type}, "
        f"{torch.get_num_threads()} threads, torch {torch.__version__}, median of {repeats}",
    }
    for name in contenders:
        found[f"{name} seconds"], found[f"{name} MiB"] = round(seconds[name], 4), round(memory[name] / 2**20, 1)
    for peer in ("published", "torch"):
        found[f"time, mmkit / {peer}"] = round(seconds["mmkit"] / seconds[peer], 3)
        found[f"memory, mmkit / {peer}"] = round(memory["mmkit"] / memory[peer], 4)
    # The peers know the softmax loss only, so other kinds have nothing to agree with.
    if kind == "softmax":
        pairs = zip(contenders["mmkit"](), contenders["published"](), strict=True)
        found["largest gradient difference"] = max(float((a - b).abs().max()) for a, b in pairs)
    return found


def _under(precision: str, device: torch.device, work: Callable[[], tuple[Tensor, ...]]) -> Callable[[], tuple[Tensor, ...]]:
    """The function under autocast, or as it is."""
    if precision == "fp32":
        return work

    def cast() -> tuple[Tensor, ...]:
        with torch.autocast(device.type, dtype=torch.bfloat16):
            return work()

    return cast


def _dense_target(ids: Tensor, idf: Tensor, vocab_size: int) -> Tensor:
    """Weighted labels as a matrix float[B, V], rows summing to 1."""
    # Made on the device, in the peer's favour; torch takes soft targets as a dense matrix only.
    hot = torch.zeros(len(ids), vocab_size, device=ids.device).scatter_(1, ids, 1.0)
    return F.normalize(hot * idf, p=1, dim=1)


def _published(inputs: tuple[Tensor, Tensor, Tensor], ids: Tensor, idf: Tensor, device: torch.device) -> Tensor:
    """The steps of x-cls/superclass (open_clip/loss.py:436-463): a matrix made on the host, weighted, normalised, log-softmax."""
    logits = F.linear(*inputs)
    # On the host and then copied, as the reference does: that copy is part of its cost.
    hot = torch.zeros(len(ids), logits.shape[1], dtype=torch.float32).scatter_(1, ids.cpu(), 1.0).to(device)
    target = F.normalize(hot * idf, p=1, dim=1)
    return -(target * F.log_softmax(logits, dim=1)).sum(dim=1).mean()
