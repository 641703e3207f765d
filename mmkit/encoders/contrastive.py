"""Losses that compare every picture of a batch with every caption: InfoNCE (CLIP) and the sigmoid loss (SigLIP).

Local losses: a process compares its own B rows with the G rows of all processes, and the sum over the processes is the
loss of the whole batch (open_clip's ``local_loss`` with ``gather_with_grad``, without its division by the batch).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from mmkit.encoders.loss import autocast_device


def infonce_sum(
    image: Tensor,
    text: Tensor,
    all_image: Tensor,
    all_text: Tensor,
    logit_scale: Tensor,
    offset: int,
    *,
    chunk_rows: int = 256,
) -> Tensor:
    """Sum of `infonce_rows`; over B on one process it equals ``open_clip.loss.ClipLoss`` (arXiv 2103.00020, figure 3).

    Returns:
        float32 scalar; divide by the global number of rows.
    """
    return infonce_rows(image, text, all_image, all_text, logit_scale, offset, chunk_rows=chunk_rows).sum()


def infonce_rows(
    image: Tensor,
    text: Tensor,
    all_image: Tensor,
    all_text: Tensor,
    logit_scale: Tensor,
    offset: int,
    *,
    chunk_rows: int = 256,
) -> Tensor:
    """Half the cross entropy of picture to caption plus half that of caption to picture, for each local row.

    Args:
        image: float[B, E], normalised pictures of this process.
        text: float[B, E], their captions.
        all_image: float[G, E], those of all processes.
        all_text: float[G, E].
        logit_scale: Factor on the cosines (the exponential of the learned parameter), scalar.
        offset: Row of `all_image` and `all_text` at which this process's own begin.
        chunk_rows: Rows of logits that exist at one time.

    Returns:
        float32[B].
    """
    assert image.shape == text.shape and all_image.shape == all_text.shape, "pictures and captions come in pairs"
    # i64[B]: where the other side of each local pair lies among the G of all processes.
    own = torch.arange(offset, offset + len(image), device=image.device)

    def part(start: int, end: int) -> Tensor:
        target = own[start:end]
        to_text = F.cross_entropy(_logits(image[start:end], all_text, logit_scale), target, reduction="none")
        to_image = F.cross_entropy(_logits(text[start:end], all_image, logit_scale), target, reduction="none")
        return (to_text + to_image) / 2

    return _in_chunks(part, image, chunk_rows)


def sigmoid_sum(
    image: Tensor, all_text: Tensor, logit_scale: Tensor, logit_bias: Tensor, offset: int, *, chunk_rows: int = 256
) -> Tensor:
    """Sum of `sigmoid_rows`; over B on one process it equals ``open_clip.loss.SigLipLoss`` (arXiv 2303.15343, algorithm 1).

    Returns:
        float32 scalar; divide by the global number of rows.
    """
    return sigmoid_rows(image, all_text, logit_scale, logit_bias, offset, chunk_rows=chunk_rows).sum()


def sigmoid_rows(
    image: Tensor, all_text: Tensor, logit_scale: Tensor, logit_bias: Tensor, offset: int, *, chunk_rows: int = 256
) -> Tensor:
    """Sum over all captions of ``-log sigmoid(z * (2 * same - 1))``, for each local picture.

    Args:
        image: float[B, E], normalised pictures of this process.
        all_text: float[G, E], captions of all processes.
        logit_scale: Factor on the cosines, scalar.
        logit_bias: Added to every logit z, scalar.
        offset: Row of `all_text` at which this process's own captions begin.
        chunk_rows: Rows of logits that exist at one time.

    Returns:
        float32[B].
    """
    own = torch.arange(offset, offset + len(image), device=image.device)
    # i64[G]; compared with `own` it marks a chunk's pairs without a B x G matrix of targets.
    column = torch.arange(len(all_text), device=image.device)

    def part(start: int, end: int) -> Tensor:
        z = _logits(image[start:end], all_text, logit_scale) + logit_bias
        # The sign goes inside: softplus(z) - z would cancel where a pair fits well.
        same = column == own[start:end, None]
        return -F.logsigmoid(torch.where(same, z, -z)).sum(dim=1)

    return _in_chunks(part, image, chunk_rows)


def _logits(rows: Tensor, others: Tensor, scale: Tensor) -> Tensor:
    """Scaled cosines float32[b, G]; the product too is fp32, for a cosine in bf16 times 100 is off by 0.2."""
    # At least fp32 and not fp32 itself: float64, in which the tests hold it to the reference, stays.
    wide = torch.promote_types(rows.dtype, torch.float32)
    # The factor goes on the b x E rows and not on the b x G product, which would be one more tensor of that size.
    return (scale * rows.to(wide)) @ others.to(wide).T


def _in_chunks(part: Callable[[int, int], Tensor], rows: Tensor, chunk_rows: int) -> Tensor:
    """``part(start, end)`` over chunks of rows, float[B]; several chunks recompute their logits in backward."""
    assert chunk_rows > 0, f"chunk_rows must be positive, not {chunk_rows}"
    with torch.autocast(autocast_device(rows), enabled=False):
        # Autocast would take the product back to bf16.
        # A single chunk would need the same memory again in backward, and its product twice.
        if len(rows) <= chunk_rows:
            return part(0, len(rows))
        # Logits, their softmax and its gradient are each B x G in fp32: more than a tower's activations at large batches.
        chunks = [
            # The reentrant kind gives no gradient here, for no argument is a tensor; nothing inside draws random numbers.
            checkpoint(part, start, min(start + chunk_rows, len(rows)), use_reentrant=False, preserve_rng_state=False)
            for start in range(0, len(rows), chunk_rows)
        ]
        return torch.cat(chunks)
