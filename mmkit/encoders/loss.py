"""The SuperClass loss on ragged labels: no target matrix, and logits only a few rows at a time."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from mmkit.encoders.loss_kinds import ChunkLabels, LabelLoss, make_kind
from mmkit.encoders.ragged import first_in_row, row_of_label

# A bf16 product of 8,192 x 768 is 12 MiB; for the whole vocabulary it would be 76 MB on top of the fp32 accumulator.
_HEAD_SLICE = 8192


def soft_label_loss(
    features: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    ids: Tensor,
    offsets: Tensor,
    label_weights: Tensor,
    *,
    kind: str | LabelLoss = "softmax",
    # 25 MB of bf16 logits at V = 49,408. Not the 16 rows of Liger's rule: the head's weight would be read anew for each chunk.
    chunk_rows: int = 256,
) -> Tensor:
    """Mean over the rows that have labels of the soft-label loss; 0 if no row has any.

    For ``softmax``, with logits ``z = x A^T + b``, a row's label weights w and ``W = sum(w)``:
    ``L = W * logsumexp(z) - sum_c w_c z_c``, which for W = 1 is ``-sum_c w_c log_softmax(z)_c`` of x-cls/superclass
    (open_clip/loss.py:436-463; arXiv 2411.03313, equation 2). Gradient: ``dL/dz = W * softmax(z) - w``.
    The other kinds: `mmkit.encoders.loss_kinds`.

    Args:
        features: float[B, D].
        weight: float[V, D].
        bias: float[V] or None.
        ids: i64[L] ragged labels (CSR), each below V; the weights of repeats in a row add up.
        offsets: i64[B + 1]; rows may be empty.
        label_weights: float[L], usually from `mmkit.encoders.idf.row_normalised`; constants, no gradient.
        kind: The loss: a name of `mmkit.encoders.loss_kinds.KINDS`, or what its `make_kind` gives for other numbers.
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
    kind: str | LabelLoss = "softmax",
    chunk_rows: int = 256,
) -> Tensor:
    """Sum of the loss over the rows; divide by the global number of rows with labels.

    Arguments, dtypes and errors are those of `soft_label_loss`.
    """
    loss = make_kind(kind) if isinstance(kind, str) else kind
    _check(features, weight, ids, offsets, label_weights, chunk_rows)
    device = features.device
    # Callers may keep labels on the CPU: L ids are little beside the features.
    ids, offsets = ids.to(device), offsets.to(device)
    rows = row_of_label(offsets, ids.numel())
    # Weights are statistics of the data; a gradient into them would reward making labels unimportant.
    label_weights = label_weights.detach().to(device)
    if not torch.is_grad_enabled():
        # A custom function is told of needed gradients even under no_grad, and would compute all three for nothing.
        features, weight, bias = features.detach(), weight.detach(), None if bias is None else bias.detach()
    total: Tensor = _ChunkedLoss.apply(features, weight, bias, ids, rows, label_weights, loss, chunk_rows)
    return total


def _check(features: Tensor, weight: Tensor, ids: Tensor, offsets: Tensor, label_weights: Tensor, chunk_rows: int) -> None:
    """Assert the contract between the tensors, as far as shapes tell; values only where that costs no sync."""
    assert features.ndim == 2, f"features must be [B, D], not {tuple(features.shape)}"
    assert weight.ndim == 2 and weight.shape[1] == features.shape[1], f"weight {tuple(weight.shape)} must be [V, D]"
    assert offsets.shape == (len(features) + 1,), f"{len(features)} rows need {len(features) + 1} offsets"
    assert ids.shape == label_weights.shape, f"{tuple(ids.shape)} ids, {tuple(label_weights.shape)} label weights"
    assert chunk_rows > 0, f"chunk_rows must be positive, not {chunk_rows}"
    # On a GPU reading the last offset would make the host wait in every step; tensors of a plan (mmkit/plan) have no values.
    if offsets.device.type == "cpu" and not isinstance(offsets, FakeTensor):
        assert int(offsets[-1]) == ids.numel(), f"offsets end at {int(offsets[-1])}, there are {ids.numel()} ids"


class _Sweep(NamedTuple):
    """What one pass over the chunks gives."""

    total: Tensor
    grad_x: Tensor | None
    grad_head: Tensor | None
    grad_bias: Tensor | None


class _ChunkedLoss(torch.autograd.Function):
    """Loss and gradients in one sweep over row chunks; backward only scales (the idea of Liger's fused loss).

    Recomputing the logits in backward instead would cost a fourth matrix product beside the three.
    """

    @staticmethod
    def forward(
        ctx: Any,
        features: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        ids: Tensor,
        rows: Tensor,
        label_weights: Tensor,
        loss: LabelLoss,
        chunk_rows: int,
    ) -> Tensor:
        """Sum of the loss over rows: features f[B, D], weight f[V, D], ids/rows i64[L], label_weights f[L]."""
        # The dtype is kept: backward may run outside the autocast block that chose it.
        ctx.loss, ctx.chunk_rows, ctx.compute = loss, chunk_rows, _compute_dtype(features, weight)
        inputs = (features, weight, bias, ids, rows, label_weights)
        # Inputs only, which live anyway: no logits wait for backward.
        ctx.save_for_backward(*inputs)
        swept = _sweep(inputs, loss, chunk_rows, ctx.compute, ctx.needs_input_grad[:3])
        ctx.grads = swept[1:]
        return swept.total

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_total: Tensor) -> tuple[Tensor | None, ...]:
        """Scale the stored gradients by the gradient of the scalar."""
        # In place, and given away: a copy of the head's gradient would cost V x D again. A second backward of the same
        # graph (retain_graph) finds nothing stored and sweeps anew.
        grads, ctx.grads = ctx.grads, None
        if grads is None:
            grads = _sweep(ctx.saved_tensors, ctx.loss, ctx.chunk_rows, ctx.compute, ctx.needs_input_grad[:3])[1:]
        scaled = [
            None if grad is None else grad.mul_(grad_total.to(grad.dtype)).to(like.dtype)
            for grad, like in zip(grads, ctx.saved_tensors[:3], strict=True)
        ]
        return (*scaled, None, None, None, None, None)


def _sweep(inputs: tuple[Any, ...], loss: LabelLoss, chunk_rows: int, compute: torch.dtype, needs: tuple[bool, ...]) -> _Sweep:
    """Loss sum and the gradients that are needed; ``inputs`` are the tensors of `_ChunkedLoss.forward`."""
    features, weight, bias, ids, rows, label_weights = inputs
    # Sums, exponentials and accumulated gradients are never narrower than fp32: a bf16 log-sum-exp of about
    # ln(49408) = 10.8 has steps of 0.06.
    wide = torch.promote_types(compute, torch.float32)
    x, head, w = features.to(compute), weight.to(compute), label_weights.to(wide)
    labels = _AllLabels.of(ids, rows, w, len(x), len(weight))
    # Chunks write whole rows of grad_x, so it needs no zeros; into the head's and the bias's gradient they add up.
    grad_x = torch.empty_like(x) if needs[0] else None
    grad_head = torch.zeros_like(weight, dtype=wide) if needs[1] else None
    grad_bias = torch.zeros_like(bias, dtype=wide) if needs[2] and bias is not None else None
    total, seen = w.new_zeros(()), None

    # Logits live in one buffer for all chunks, in bf16 with a second one in fp32: fresh memory for each chunk would be held
    # twice at a time, and on the CPU its page faults cost more than the arithmetic on it.
    narrow = x.new_empty(min(chunk_rows, len(x)), len(head))
    logits = narrow if compute == wide else narrow.new_empty(narrow.shape, dtype=wide)
    product = head.new_empty(_HEAD_SLICE, head.shape[1]) if compute != wide and grad_head is not None else None

    def forward(start: int) -> Tensor:
        """Logits of a chunk, float[R, V], in the wide buffer."""
        part = x[start : start + chunk_rows]
        torch.mm(part, head.T, out=narrow[: len(part)])
        z = logits[: len(part)]
        if compute != wide:
            z.copy_(narrow[: len(part)])
        # After widening, so that the bias is not rounded to bf16 together with the product.
        return z if bias is None else z.add_(bias)

    # The dtypes are chosen above; what a kind of loss computes on the wide buffer must stay wide.
    with torch.autocast(autocast_device(features), enabled=False):
        starts = range(0, len(x), chunk_rows)
        # A kind that compares the pictures of a label needs whole columns before its first gradient: one more product.
        for start in starts if loss.columns else ():
            z = forward(start)
            seen = loss.look(z, labels.chunk(start, len(z)), seen)
        for start in starts:
            z = forward(start)
            total += loss.chunk(z, labels.chunk(start, len(z)), seen)
            # From here z holds the gradient and no longer the logits.
            if grad_bias is not None:
                grad_bias += z.sum(dim=0)
            if grad_x is None and grad_head is None:
                continue
            part = x[start : start + chunk_rows]
            gradient = z if compute == wide else narrow[: len(part)].copy_(z)
            if grad_x is not None:
                torch.mm(gradient, head, out=grad_x[start : start + chunk_rows])
            if grad_head is not None:
                _accumulate(grad_head, gradient, part, product)
    return _Sweep(total, grad_x, grad_head, grad_bias)


class _AllLabels(NamedTuple):
    """The labels of the batch: i64[L] ids and rows, float[L] weights and counts, float[B] weight of each row."""

    ids: Tensor
    rows: Tensor
    weights: Tensor
    counts: Tensor
    row_weight: Tensor

    @classmethod
    def of(cls, ids: Tensor, rows: Tensor, weights: Tensor, batch: int, vocab_size: int) -> _AllLabels:
        """Count each row's distinct labels and add up its weights."""
        # A repeated label adds its weight twice, but is one label of the set whose size is K.
        first = first_in_row(ids, rows, vocab_size).to(weights.dtype)
        distinct = weights.new_zeros(batch).index_add_(0, rows, first)
        return cls(ids, rows, weights, distinct[rows], weights.new_zeros(batch).index_add_(0, rows, weights))

    def chunk(self, start: int, count: int) -> ChunkLabels:
        """The same labels seen from ``count`` rows beginning at ``start``."""
        # Weights are multiplied by it rather than picked by it: the length of a selection is known to the device only.
        inside = (self.rows >= start) & (self.rows < start + count)
        row_weight = self.row_weight[start : start + count]
        return ChunkLabels((self.rows - start) % count, self.ids, inside, self.weights * inside, self.counts, row_weight)


def _compute_dtype(features: Tensor, weight: Tensor) -> torch.dtype:
    """The dtype of the matrix products: autocast's where it is on, otherwise what the inputs promote to."""
    # A custom function is not cast by autocast, so it follows the rule of F.linear by itself; gradcheck needs the
    # exception for float64.
    device = autocast_device(features)
    if torch.is_autocast_enabled(device) and features.dtype != torch.float64:
        return torch.get_autocast_dtype(device)
    return torch.promote_types(features.dtype, weight.dtype)


def autocast_device(tensor: Tensor) -> str:
    """The device type whose autocast rules hold; meta tensors (shapes only, for plans and checks) follow the CPU's."""
    return "cpu" if tensor.device.type == "meta" else tensor.device.type


def _accumulate(grad_head: Tensor, gradient: Tensor, part: Tensor, product: Tensor | None) -> None:
    """Add ``gradient^T part`` f[V, D] to an accumulator; ``product`` f[slice, D] is scratch for factors narrower than it."""
    if product is None:
        grad_head.addmm_(gradient.T, part)
        return
    # In slices: the product in the narrow dtype would be another V x D at once.
    for start in range(0, len(grad_head), _HEAD_SLICE):
        here = grad_head[start : start + _HEAD_SLICE]
        here += torch.mm(gradient[:, start : start + _HEAD_SLICE].T, part, out=product[: len(here)])
