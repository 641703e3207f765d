"""``mmkit bench lm-loss``: head and cross-entropy at supervised positions, in chunks, against the same over full logits."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mmkit.bench.measure import interleaved, peak_bytes
from mmkit.data.conversations import IGNORE_INDEX
from mmkit.models.lm_loss import CHUNK_ROWS, token_loss_sum


def run(
    *,
    batch: int = 4,
    length: int = 1024,
    width: int = 512,
    vocab_size: int = 32000,
    supervised: float = 0.1,
    chunk_rows: int = CHUNK_ROWS,
    precision: str = "fp32",
    repeats: int = 3,
    threads: int = 0,
) -> dict[str, Any]:
    """Compare time and peak memory of loss and gradients.

    Args:
        batch: Rows B.
        length: Positions of a row T.
        width: Hidden size D.
        vocab_size: V.
        supervised: Share of the positions with a label.
        chunk_rows: Rows of logits that mmkit has at one time.
        precision: ``fp32``, or ``bf16`` under autocast.
        repeats: Timed rounds, interleaved.
        threads: CPU threads; 0 leaves torch's choice.

    Returns:
        Conditions, seconds, MiB beyond inputs and their gradients, ratios, largest difference of the gradients.
    """
    # Before the first operation, so that both sides have the same number.
    if threads:
        torch.set_num_threads(threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    # On the CPU, for the same numbers on every device.
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(batch, length, width, generator=generator).to(device).requires_grad_()
    # Logits of a size that occurs in training.
    weight = (torch.randn(vocab_size, width, generator=generator) * width**-0.5).to(device).requires_grad_()
    labels = torch.randint(vocab_size, (batch, length), generator=generator)
    labels[torch.rand(batch, length, generator=generator) >= supervised] = IGNORE_INDEX
    labels = labels.to(device)

    def autocast() -> Any:
        return torch.autocast(device.type, dtype=torch.bfloat16) if precision == "bf16" else nullcontext()

    def ours() -> tuple[Tensor, ...]:
        # Position t predicts token t + 1.
        targets = labels[:, 1:]
        chosen = targets != IGNORE_INDEX
        with autocast():
            loss = token_loss_sum(hidden[:, :-1][chosen], weight, targets[chosen], chunk_rows=chunk_rows)
        # grad, not backward: nothing accumulates in .grad from round to round.
        return torch.autograd.grad(loss, (hidden, weight))

    def full() -> tuple[Tensor, ...]:
        with autocast():
            logits = F.linear(hidden, weight)
        # As transformers' causal loss and LLaVA's: all logits in float32, positions without a label ignored afterwards.
        shifted = logits.float()[:, :-1].reshape(-1, vocab_size)
        loss = F.cross_entropy(shifted, labels[:, 1:].reshape(-1), ignore_index=IGNORE_INDEX, reduction="sum")
        return torch.autograd.grad(loss, (hidden, weight))

    contenders = {"mmkit": ours, "full logits": full}
    # Apart from the times: torch's profiler, which counts the bytes on a CPU, slows what it watches.
    memory = {name: peak_bytes(work, device) for name, work in contenders.items()}
    seconds = interleaved(contenders, repeats=repeats)
    difference = max(float((a - b).abs().max()) for a, b in zip(ours(), full(), strict=True))
    count = int((labels[:, 1:] != IGNORE_INDEX).sum())
    return {
        "conditions": f"B={batch} T={length} D={width} V={vocab_size}, {count} supervised, {precision}, {device.type}, "
        f"{torch.get_num_threads()} threads",
        **{f"{name} s": round(value, 4) for name, value in seconds.items()},
        **{f"{name} MiB": round(value / 2**20, 1) for name, value in memory.items()},
        "time, mmkit / full logits": round(seconds["mmkit"] / seconds["full logits"], 3),
        "memory, mmkit / full logits": round(memory["mmkit"] / memory["full logits"], 3),
        "largest gradient difference": difference,
    }
