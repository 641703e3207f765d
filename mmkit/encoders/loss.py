"""The SuperClass loss on ragged labels: no target matrix, and logits only a few rows at a time."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mmkit.encoders.ragged import row_of_label
from mmkit.errors import InputError

KINDS = ("softmax",)


def soft_label_loss(
    features: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    ids: Tensor,
    offsets: Tensor,
    label_weights: Tensor,
    *,
    kind: str = "softmax",
    chunk_rows: int = 256,
) -> Tensor:
    """Mean over the rows that have labels of the soft-label loss; 0 if no row has any.

    With logits ``z = x A^T + b``, a row's label weights w and ``W = sum(w)``:
    ``L = W * logsumexp(z) - sum_c w_c z_c``, which for W = 1 is ``-sum_c w_c log_softmax(z)_c`` of x-cls/superclass
    (open_clip/loss.py:436-463; arXiv 2411.03313, equation 2). Gradient: ``dL/dz = W * softmax(z) - w``.

    Args:
        features: float[B, D].
        weight: float[V, D].
        bias: float[V] or None.
        ids: i64[L] ragged labels (CSR), each below V; the weights of repeats in a row add up.
        offsets: i64[B + 1]; rows may be empty.
        label_weights: float[L], usually from `mmkit.encoders.idf.row_normalised`; constants, no gradient.
        kind: The loss; one of `KINDS`.
        chunk_rows: Rows of logits that exist at one time.

    Returns:
        Scalar, float32 (float64 for float64 inputs).

    Raises:
        InputError: If `kind` is unknown.
    """
    total = soft_label_loss_sum(features, weight, bias, ids, offsets, label_weights, kind=kind, chunk_rows=chunk_rows)
    # Stays on the device: an .item() here would make the host wait in every step.
    labelled = (offsets.to(total.device).diff() > 0).sum()
    return total / labelled.clamp_min(1)


def soft_label_loss_sum(
    features: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    ids: Tensor,
    offsets: Tensor,
    label_weights: Tensor,
    *,
    kind: str = "softmax",
    chunk_rows: int = 256,
) -> Tensor:
    """Sum of the loss over the rows; divide by the global number of rows with labels.

    Arguments, dtypes and errors are those of `soft_label_loss`.
    """
    if kind not in KINDS:
        raise InputError(f"unknown loss {kind!r}", where="loss.kind", mend=f"known: {', '.join(KINDS)}")
    _check(features, weight, ids, offsets, label_weights, chunk_rows)
    device = features.device
    ids, offsets = ids.to(device), offsets.to(device)
    rows = row_of_label(offsets, ids.numel())
    # Weights are statistics of the data; a gradient into them would reward making labels unimportant.
    label_weights = label_weights.detach().to(device)
    total: Tensor = _ChunkedSoftmax.apply(features, weight, bias, ids, rows, label_weights, chunk_rows)
    return total


def _check(features: Tensor, weight: Tensor, ids: Tensor, offsets: Tensor, label_weights: Tensor, chunk_rows: int) -> None:
    """Assert the contract between the tensors, as far as shapes tell; values only where that costs no sync."""
    assert features.ndim == 2, f"features must be [B, D], not {tuple(features.shape)}"
    assert weight.ndim == 2 and weight.shape[1] == features.shape[1], f"weight {tuple(weight.shape)} must be [V, D]"
    assert offsets.shape == (len(features) + 1,), f"{len(features)} rows need {len(features) + 1} offsets"
    assert ids.shape == label_weights.shape, f"{tuple(ids.shape)} ids, {tuple(label_weights.shape)} label weights"
    assert chunk_rows > 0, f"chunk_rows must be positive, not {chunk_rows}"
    if offsets.device.type == "cpu":
        assert int(offsets[-1]) == ids.numel(), f"offsets end at {int(offsets[-1])}, there are {ids.numel()} ids"


class _ChunkedSoftmax(torch.autograd.Function):
    """Loss and gradients in one sweep over row chunks; backward only scales (the idea of Liger's fused loss)."""

    @staticmethod
    def forward(
        ctx: Any,
        features: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        ids: Tensor,
        rows: Tensor,
        label_weights: Tensor,
        chunk_rows: int,
    ) -> Tensor:
        """Sum of the loss over rows: features f[B, D], weight f[V, D], ids/rows i64[L], label_weights f[L]."""
        compute = _compute_dtype(features, weight)
        # Sums, exponentials and accumulated gradients are never narrower than fp32: a bf16 log-sum-exp of about
        # ln(49408) = 10.8 has steps of 0.06.
        wide = torch.promote_types(compute, torch.float32)
        x, head, w = features.to(compute), weight.to(compute), label_weights.to(wide)
        row_weight = w.new_zeros(len(x)).index_add_(0, rows, w)
        need_x, need_head, need_bias = ctx.needs_input_grad[:3]
        grad_x = torch.empty_like(x) if need_x else None
        grad_head = torch.zeros_like(weight, dtype=wide) if need_head else None
        grad_bias = torch.zeros_like(bias, dtype=wide) if need_bias and bias is not None else None
        total = w.new_zeros(())
        with torch.autocast(features.device.type, enabled=False):
            for start in range(0, len(x), chunk_rows):
                part = x[start : start + chunk_rows]
                z = (part @ head.T).to(wide)
                if bias is not None:
                    z += bias
                # Labels of other chunks stay in the list with weight 0 (at their row modulo the chunk): selecting
                # them would need the offsets on the host, a synchronisation per chunk.
                inside = (rows >= start) & (rows < start + len(part))
                at = ((rows - start) % len(part), ids)
                w_inside = w * inside
                total -= (z[at] * w_inside).sum()
                # One exponential serves both: its row sums give the log-sum-exp, itself scaled is the softmax. In
                # place, so a chunk costs one [chunk, V] buffer.
                peak = z.amax(dim=1)
                mass = z.sub_(peak[:, None]).exp_().sum(dim=1)
                weights_here = row_weight[start : start + len(part)]
                total += (weights_here * (peak + mass.log())).sum()
                if not (need_x or need_head or need_bias):
                    continue
                z.mul_((weights_here / mass)[:, None]).index_put_(at, -w_inside, accumulate=True)
                if grad_bias is not None:
                    grad_bias += z.sum(dim=0)
                gradient = z.to(compute)
                if grad_x is not None:
                    torch.mm(gradient, head, out=grad_x[start : start + len(part)])
                if grad_head is not None:
                    _accumulate(grad_head, gradient, part)
        ctx.save_for_backward(grad_x, grad_head, grad_bias)
        ctx.dtypes = (features.dtype, weight.dtype, bias.dtype if bias is not None else None)
        return total

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_total: Tensor) -> tuple[Tensor | None, ...]:
        """Scale the stored gradients by the gradient of the scalar."""
        # Not in place: with retain_graph the stored gradients are read again.
        grads = tuple(
            None if grad is None else (grad * grad_total).to(dtype)
            for grad, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        )
        return (*grads, None, None, None, None)


def _compute_dtype(features: Tensor, weight: Tensor) -> torch.dtype:
    """The dtype of the matrix products: autocast's where it is on, otherwise what the inputs promote to."""
    # A custom function is not cast by autocast, so it follows the rule of F.linear by itself; gradcheck needs the
    # exception for float64.
    device = features.device.type
    if torch.is_autocast_enabled(device) and features.dtype != torch.float64:
        return torch.get_autocast_dtype(device)
    return torch.promote_types(features.dtype, weight.dtype)


def _accumulate(grad_head: Tensor, gradient: Tensor, part: Tensor) -> None:
    """Add ``gradient^T part`` f[V, D] to an accumulator that may be wider than the factors."""
    if gradient.dtype == grad_head.dtype:
        grad_head.addmm_(gradient.T, part)
    else:
        grad_head += gradient.T @ part
