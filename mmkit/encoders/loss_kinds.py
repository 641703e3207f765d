"""The losses of the paper's ablation (arXiv 2411.03313, table 6), each as what it does to one chunk of logits.

A kind sees ``z`` float[R, V], the logits of R rows, and leaves its gradient in the same memory. With a row's label set s, label
weights w (from the IDF or equal, summing to ``W`` = 1, or 0 for a row that has none), K labels and ``u_c = K * w_c``, which is 1
for every label without IDF:

========== =========================================================================================================
softmax    ``W lse(z) - sum_s w_c z_c``: cross-entropy with soft targets, the method itself
bce        ``sum_s u_c softplus(-z_c) + W sum_{not s} softplus(z_c)``: V yes-or-no questions
soft_margin  bce / V: `torch.nn.MultiLabelSoftMarginLoss`. AdamW hides the factor V but for its epsilon, which is why the paper's
           two rows differ by 0.1 only
asl        bce with focusing and a margin (arXiv 2009.14119, equations 4 to 6)
two_way    softmax-like over the labels of a picture and over the pictures of a label (Kobayashi, CVPR 2023, equation 8)
========== =========================================================================================================

The paper's ablation is without IDF; with it, the weights above are this project's choice.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from mmkit.errors import InputError


class ChunkLabels(NamedTuple):
    """The labels of all rows, seen from one chunk of R rows.

    Labels of other chunks stay in the list, marked: picking them out would need the offsets on the host, a synchronisation for
    each chunk. They point at their row modulo R and weigh 0.

    Attributes:
        row: i64[L], row within the chunk.
        ids: i64[L].
        inside: bool[L], whether the label belongs to a row of this chunk.
        weights: float[L], w; 0 outside.
        counts: float[L], K of the label's row.
        row_weight: float[R], W.
    """

    row: Tensor
    ids: Tensor
    inside: Tensor
    weights: Tensor
    counts: Tensor
    row_weight: Tensor


class LabelLoss(Protocol):
    """One kind of loss, without state: everything it must remember between chunks travels in ``seen``."""

    columns: bool

    def look(self, z: Tensor, labels: ChunkLabels, seen: Any) -> Any:
        """First sweep, where ``columns`` asks for one: statistics over the rows so far."""
        ...

    def chunk(self, z: Tensor, labels: ChunkLabels, seen: Any) -> Tensor:
        """Loss sum of the chunk, scalar; ``z`` float[R, V] holds its gradient afterwards."""
        ...


@dataclasses.dataclass(frozen=True)
class Softmax:
    """Cross-entropy with soft targets."""

    columns = False

    def look(self, z: Tensor, labels: ChunkLabels, seen: Any) -> Any:
        """Needs nothing of other rows."""

    def chunk(self, z: Tensor, labels: ChunkLabels, seen: Any) -> Tensor:
        """``W lse(z) - sum w z``, gradient ``W softmax(z) - w``."""
        # Labels of other chunks point at some row of this one, with weight 0 here and in the gradient below.
        at = (labels.row, labels.ids)
        total = -(z[at] * labels.weights).sum()
        # One exponential serves both: its row sums give the log-sum-exp, itself scaled is the softmax. In place, so a
        # chunk costs one [R, V] buffer.
        peak = z.amax(dim=1)
        mass = z.sub_(peak[:, None]).exp_().sum(dim=1)
        total += (labels.row_weight * (peak + mass.log())).sum()
        z.mul_((labels.row_weight / mass)[:, None]).index_put_(at, -labels.weights, accumulate=True)
        return total


@dataclasses.dataclass(frozen=True)
class BinaryCrossEntropy:
    """V yes-or-no questions; ``mean`` divides by V as soft-margin does."""

    mean: bool = False
    columns = False

    def look(self, z: Tensor, labels: ChunkLabels, seen: Any) -> Any:
        """Needs nothing of other rows."""

    def chunk(self, z: Tensor, labels: ChunkLabels, seen: Any) -> Tensor:
        """Gradients: ``sigmoid(z)`` of negatives, ``-u sigmoid(-z)`` of positives."""
        # Folded into the weights: dividing at the end would be another pass over the logits.
        scale = 1.0 / z.shape[1] if self.mean else 1.0
        # Read before the next line hides them.
        positive, strength = z[labels.row, labels.ids], labels.weights * labels.counts * scale
        exclude_labels(z, labels)
        # W is 0 for a row without labels, which would otherwise teach that its picture shows none of V things.
        row_scale = labels.row_weight * scale
        # The labels are -inf by now, where softplus and its slope are 0: no mask is needed.
        total = (F.softplus(z).sum(dim=1) * row_scale).sum() + (F.softplus(-positive) * strength).sum()
        z.sigmoid_().mul_(row_scale[:, None])
        # Accumulated, because repeats, and labels of other chunks (which weigh 0), meet at one place.
        z.index_put_((labels.row, labels.ids), -strength * torch.sigmoid(-positive), accumulate=True)
        return total


@dataclasses.dataclass(frozen=True)
class Asymmetric:
    """ASL: with ``p = sigmoid(z)`` and ``q = max(p - clip, 0)``, positives ``-(1-p)^g+ ln p``, negatives ``-q^g- ln(1-q)``.

    The gradient is that of the formula; the authors' code by default treats the focusing factors as constants.
    """

    # Defaults of the authors' code.
    gamma_positive: float = 1.0
    gamma_negative: float = 4.0
    clip: float = 0.05
    columns = False

    def look(self, z: Tensor, labels: ChunkLabels, seen: Any) -> Any:
        """Needs nothing of other rows."""

    def chunk(self, z: Tensor, labels: ChunkLabels, seen: Any) -> Tensor:
        """Both derivatives by hand: autograd would keep five [R, V] buffers."""
        positive, strength = z[labels.row, labels.ids], labels.weights * labels.counts
        exclude_labels(z, labels)
        total = (self._negatives(z) * labels.row_weight).sum()
        z.mul_(labels.row_weight[:, None])
        p, log_p, g = torch.sigmoid(positive), F.logsigmoid(positive), self.gamma_positive
        # Not (1 - p) ** g: the difference rounds to 0 where p is nearly 1, and takes the gradient with it.
        focus = torch.sigmoid(-positive) ** g
        total += (-focus * log_p * strength).sum()
        slope = g * p * focus * log_p - focus * torch.sigmoid(-positive)
        z.index_put_((labels.row, labels.ids), slope * strength, accumulate=True)
        return total

    def _negatives(self, z: Tensor) -> Tensor:
        """Loss of each row's negatives, float[R]; their slopes replace z float[R, V]."""
        g = self.gamma_negative
        # In place where it can be: every [R, V] tensor is as large as the chunk of logits.
        p = z.sigmoid_()
        q = (p - self.clip).clamp_(min=0)
        rest = torch.log1p(-q).clamp_(min=_LOG_TINY)  # ln(1 - q), kept finite where a sure mistake rounds to q = 1
        focus = q**g
        loss = -(focus * rest).sum(dim=1)
        # d/dz = p (1 - p) [q > 0] (q^g / (1 - q) - g q^(g - 1) ln(1 - q)); where q is 0 a power below 0 must not be taken.
        slope = torch.where(q > 0, focus / (1 - q).clamp_(min=_TINY) - g * q.clamp(min=_TINY) ** (g - 1) * rest, 0.0)
        p.mul_(1 - p).mul_(slope)
        return loss


@dataclasses.dataclass(frozen=True)
class TwoWay:
    """``softplus(Tn lse_neg(z / Tn) + Tp lse_pos(-z / Tp))`` over each row, and over each column that has a label.

    Averaged over the rows, and over the columns: a column's part counts as often as there are labelled rows, so that the sum
    divided by the rows is the sum of the two means. Weights u enter as ``sum u exp(-z / Tp)``. Columns compare the pictures of
    one micro-batch, so accumulation changes them, as it changes every loss between samples.
    """

    # Defaults of the author's code.
    temperature_positive: float = 4.0
    temperature_negative: float = 1.0
    columns = True

    def look(self, z: Tensor, labels: ChunkLabels, seen: Any) -> Any:
        """Log-sum-exps of every column over the rows so far: negatives float[V], positives float[V], and the labelled rows."""
        negative, positive, rows = seen if seen is not None else (*z.new_full((2, z.shape[1]), -torch.inf), z.new_zeros(()))
        # Before the labels are excluded: their logits are still there.
        here = self._positive_terms(z[labels.row, labels.ids], labels)
        # In the log domain, so that chunks add up as if they were one, without an overflow on the way.
        positive = torch.logaddexp(positive, scatter_logsumexp(here, labels.ids, z.shape[1]))
        exclude_labels(z, labels)
        z.div_(self.temperature_negative).masked_fill_((labels.row_weight == 0)[:, None], -torch.inf)
        return torch.logaddexp(negative, z.logsumexp(dim=0)), positive, rows + (labels.row_weight > 0).sum()

    def chunk(self, z: Tensor, labels: ChunkLabels, seen: Any) -> Tensor:
        """Row part of this chunk, and this chunk's share of the gradient of the column part."""
        tp, tn, at = self.temperature_positive, self.temperature_negative, (labels.row, labels.ids)
        column_negative, column_positive, rows = seen
        here = self._positive_terms(z[at], labels)
        labelled = labels.row_weight > 0
        exclude_labels(z, labels)
        # What is -inf stays out of every sum below, and its gradient is 0.
        z.div_(tn).masked_fill_(~labelled[:, None], -torch.inf)
        row_positive = scatter_logsumexp(here, labels.row, len(z))
        row_negative = z.logsumexp(dim=1)
        row_margin = tn * row_negative + tp * row_positive
        column_margin = tn * column_negative + tp * column_positive
        # Columns without a label in the batch have no positive side and would be softplus(-inf) = 0: out of the mean too.
        used = column_positive > -torch.inf
        count = used.sum().clamp(min=1)
        # Rows and columns without a label have a margin of -inf: softplus gives 0, and so does its slope.
        total = (F.softplus(row_margin) * labels.row_weight).sum()
        # Of the whole batch; each chunk adds the share of its rows.
        total += torch.where(used, F.softplus(column_margin), 0.0).sum() / count * labelled.sum()
        # Chain rule: softplus gives the sigmoid of the margin, the log-sum-exps give softmax shares of it.
        row_slope = torch.sigmoid(row_margin) * labels.row_weight
        column_slope = torch.where(used, torch.sigmoid(column_margin), 0.0) * rows / count
        by_column = torch.exp(z - finite(column_negative)).mul_(column_slope)
        z.sub_(finite(row_negative)[:, None]).exp_().mul_(row_slope[:, None]).add_(by_column)
        slope = torch.exp(here - finite(row_positive)[labels.row]) * row_slope[labels.row]
        slope += torch.exp(here - finite(column_positive)[labels.ids]) * column_slope[labels.ids]
        z.index_put_(at, -slope, accumulate=True)
        return total

    def _positive_terms(self, positive: Tensor, labels: ChunkLabels) -> Tensor:
        """``-z / Tp + ln u`` of every label, float[L]; -inf for labels of other chunks."""
        return -positive / self.temperature_positive + torch.log(labels.weights * labels.counts)


# The floor of ASL's authors (eps), and its logarithm.
_TINY = 1e-8
_LOG_TINY = -18.420680743952367

KINDS: dict[str, type[Any]] = {
    "softmax": Softmax,
    "bce": BinaryCrossEntropy,
    "soft_margin": BinaryCrossEntropy,
    "asl": Asymmetric,
    "two_way": TwoWay,
}


def make_kind(name: str, **options: float | None) -> LabelLoss:
    """A loss by name.

    Args:
        name: One of `KINDS`.
        options: Numbers of that kind (``gamma_positive`` ...); None leaves the default.

    Returns:
        The loss, for ``soft_label_loss(..., kind=...)``.

    Raises:
        InputError: If the name is unknown, or the kind has no such option.
    """
    if name not in KINDS:
        raise InputError(f"unknown loss {name!r}", where="loss.kind", mend=f"known: {', '.join(KINDS)}")
    # None is what a recipe has for a number that it leaves to the kind.
    given: dict[str, Any] = {key: value for key, value in options.items() if value is not None}
    # mean is what makes soft_margin of bce, and no number for a recipe to set.
    known = {field.name for field in dataclasses.fields(KINDS[name])} - {"mean"}
    if unknown := sorted(given.keys() - known):
        has = f"it has {', '.join(sorted(known))}" if known else "it has none"
        raise InputError(f"loss {name} has no option {', '.join(unknown)}", where="loss", mend=has)
    if name == "soft_margin":
        given["mean"] = True
    kind: LabelLoss = KINDS[name](**given)
    return kind


def exclude_labels(z: Tensor, labels: ChunkLabels) -> None:
    """Set the logits of a row's own labels to -inf in place, so that what remains are the negatives."""
    values = torch.where(labels.inside, -torch.inf, torch.inf).to(z.dtype)
    # The smaller of the two: repeats do no harm, and +inf changes nothing for labels of other chunks.
    z.view(-1).scatter_reduce_(0, labels.row * z.shape[1] + labels.ids, values, "amin")


def scatter_logsumexp(values: Tensor, groups: Tensor, count: int) -> Tensor:
    """Log-sum-exp of values float[L] in each of ``count`` groups i64[L]: float[count], -inf for an empty one."""
    # Each group is shifted by its own peak: one peak for all would underflow groups that lie far below it.
    peak = values.new_full((count,), -torch.inf).scatter_reduce_(0, groups, values, "amax")
    mass = values.new_zeros(count).index_add_(0, groups, torch.exp(values - finite(peak)[groups]))
    return mass.log() + finite(peak)


def finite(value: Tensor) -> Tensor:
    """Zeros in place of infinities, so that -inf minus it stays -inf instead of NaN."""
    return torch.where(value.isfinite(), value, 0.0)
