"""The chunked loss against textbook dense twins: values, gradients, memory."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from mmkit.encoders import pack_labels, row_normalised, soft_label_loss, soft_label_loss_sum
from mmkit.encoders.loss_kinds import KINDS, make_kind
from mmkit.encoders.ragged import row_of_label
from mmkit.errors import InputError

from .helpers import packed, random_rows

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA"))]


def dense_target(ids: Tensor, offsets: Tensor, label_weights: Tensor, vocab_size: int) -> Tensor:
    """The [B, V] target the kit never builds."""
    target = torch.zeros(len(offsets) - 1, vocab_size, dtype=label_weights.dtype)
    rows = row_of_label(offsets, len(ids))
    for row, label, weight in zip(rows.tolist(), ids.tolist(), label_weights, strict=True):
        target[row, label] += weight
    return target


def dense_loss(x: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, labelled: Tensor) -> Tensor:
    """Textbook soft cross-entropy, mean over the rows that have labels."""
    loss = -(target * F.log_softmax(F.linear(x, weight, bias), dim=1)).sum(dim=1)
    return loss[labelled].sum() / max(1, int(labelled.sum()))


def parts(batch: int, width: int, vocab_size: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(batch + width + vocab_size)
    shapes = [(batch, width), (vocab_size, width), (vocab_size,)]
    x, weight, bias = (torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes)
    return x.requires_grad_(), weight.requires_grad_(), bias.requires_grad_()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("batch", "vocab_size"), [(1, 7), (5, 7), (13, 101), (9, 49408)])
@pytest.mark.parametrize("chunk_rows", [1, 4, 256])
def test_value_and_gradients_equal_the_dense_twin(batch: int, vocab_size: int, chunk_rows: int, device: str) -> None:
    x, weight, bias = parts(batch, 8, vocab_size)
    ids, offsets = packed(batch, vocab_size)
    label_weights = torch.rand(len(ids), dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    expected = dense_loss(x, weight, bias, dense_target(ids, offsets, label_weights, vocab_size), offsets.diff() > 0)
    wanted = torch.autograd.grad(expected, (x, weight, bias))
    moved = [value.detach().to(device).requires_grad_() for value in (x, weight, bias)]
    loss = soft_label_loss(*moved, ids, offsets, label_weights, chunk_rows=chunk_rows)
    torch.testing.assert_close(loss.cpu(), expected, rtol=1e-12, atol=1e-12)
    for got, want in zip(torch.autograd.grad(loss, moved), wanted, strict=True):
        torch.testing.assert_close(got.cpu(), want, rtol=1e-10, atol=1e-12)


def dense_bce(z: Tensor, positive: Tensor, u: Tensor, row_weight: Tensor) -> Tensor:
    """V yes-or-no questions, positives weighted by u; [B] row losses."""
    negative = (~positive * F.softplus(z)).sum(1) * row_weight
    return negative + (u * F.softplus(-z)).sum(1)


def dense_asl(z: Tensor, positive: Tensor, u: Tensor, row_weight: Tensor, gp: float, gn: float, clip: float) -> Tensor:
    """arXiv 2009.14119, equations 4 to 6, by autograd."""
    p = z.sigmoid()
    q = (p - clip).clamp(min=0)
    negative = -(q**gn * torch.log1p(-q)) * ~positive
    return negative.sum(1) * row_weight + (-u * (1 - p) ** gp * F.logsigmoid(z)).sum(1)


def dense_two_way(z: Tensor, member: Tensor, u: Tensor, row_weight: Tensor, tp: float, tn: float) -> Tensor:
    """Kobayashi, CVPR 2023, equation 8: mean over the pictures plus mean over the labels that occur, times the pictures."""
    used_rows = row_weight > 0
    z, positive, u = z[used_rows], (u > 0)[used_rows], u[used_rows]
    negative = ~member[used_rows]

    def direction(z: Tensor, positive: Tensor, u: Tensor, negative: Tensor) -> Tensor:
        used = positive.any(1)  # before the sums: the gradient of an empty log-sum-exp is NaN
        log_u = torch.where(positive, u, 1.0).log()
        pos = torch.where(positive, -z / tp + log_u, -torch.inf)[used].logsumexp(1) * tp
        neg = torch.where(negative, z / tn, -torch.inf)[used]
        some = negative[used].any(1)
        return F.softplus(pos[some] + neg[some].logsumexp(1) * tn).sum() / max(1, int(used.sum()))

    every = (z, positive, u, negative)
    return (direction(*every) + direction(*(part.T for part in every))) * len(z)


def dense_kind(kind: str, z: Tensor, ids: Tensor, offsets: Tensor, label_weights: Tensor, **options: float) -> Tensor:
    """The sum over rows of any kind, from dense matrices."""
    w = dense_target(ids, offsets, label_weights, z.shape[1])
    positive = dense_target(ids, offsets, torch.ones_like(label_weights), z.shape[1]) > 0
    u, row_weight = w * positive.sum(1, keepdim=True), w.sum(1)
    if kind == "softmax":
        return -(w * F.log_softmax(z, dim=1)).sum()
    if kind in ("bce", "soft_margin"):
        return dense_bce(z, positive, u, row_weight).sum() / (z.shape[1] if kind == "soft_margin" else 1)
    if kind == "asl":
        gp, gn, clip = options.get("gamma_positive", 1), options.get("gamma_negative", 4), options.get("clip", 0.05)
        return dense_asl(z, positive, u, row_weight, gp, gn, clip).sum()
    return dense_two_way(
        z, positive, u, row_weight, options.get("temperature_positive", 4), options.get("temperature_negative", 1)
    )


VARIANTS = [
    ("softmax", {}),
    ("bce", {}),
    ("soft_margin", {}),
    ("asl", {}),
    ("asl", {"gamma_positive": 0.0, "gamma_negative": 0.5, "clip": 0.1}),
    ("asl", {"gamma_positive": 2.0, "gamma_negative": 0.0, "clip": 0.0}),
    ("two_way", {}),
    ("two_way", {"temperature_positive": 1.5, "temperature_negative": 2.0}),
]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("idf", [True, False])
@pytest.mark.parametrize(("batch", "vocab_size"), [(1, 7), (5, 7), (13, 101), (7, 49408)])
@pytest.mark.parametrize(("kind", "options"), VARIANTS)
def test_every_kind_equals_its_dense_twin(kind, options, batch, vocab_size, idf, device) -> None:
    x, weight, bias = parts(batch, 8, vocab_size)
    rows = random_rows(batch, vocab_size)
    rows[0] = [*rows[0], rows[0][0]]  # a repeat
    ids, offsets = pack_labels(rows)
    generator = torch.Generator().manual_seed(3)
    by_label = torch.rand(vocab_size, generator=generator) if idf else torch.ones(vocab_size)
    label_weights = row_normalised(by_label, ids, offsets).double()
    sums = torch.zeros(batch, dtype=torch.float64).index_add_(0, row_of_label(offsets, len(ids)), label_weights)
    label_weights /= sums[row_of_label(offsets, len(ids))]  # the twin takes rows to weigh 1 exactly, float32 gives 1e-8
    expected = dense_kind(kind, F.linear(x, weight, bias), ids, offsets, label_weights, **options)
    expected = expected / max(1, int((offsets.diff() > 0).sum()))
    wanted = torch.autograd.grad(expected, (x, weight, bias))
    moved = [value.detach().to(device).requires_grad_() for value in (x, weight, bias)]
    loss = soft_label_loss(*moved, ids, offsets, label_weights, kind=make_kind(kind, **options), chunk_rows=4)
    torch.testing.assert_close(loss.cpu(), expected, rtol=1e-10, atol=1e-12)
    for got, want in zip(torch.autograd.grad(loss, moved), wanted, strict=True):
        # 1e-8: above 20 torch's softplus is the identity, the slopes here are exact
        torch.testing.assert_close(got.cpu(), want, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize(
    ("kind", "torch_loss"), [("bce", F.binary_cross_entropy_with_logits), ("soft_margin", F.multilabel_soft_margin_loss)]
)
def test_without_idf_they_are_torchs_losses(kind, torch_loss) -> None:
    x, weight, bias = parts(6, 5, 40, torch.float32)
    ids, offsets = pack_labels([[1, 4], [2], [39], [0, 1, 2, 3], [7], [8, 9]])
    target = dense_target(ids, offsets, torch.ones(len(ids)), 40)
    expected = torch_loss(F.linear(x, weight, bias), target) * (40 if kind == "bce" else 1)  # torch takes means over the labels
    got = soft_label_loss(x, weight, bias, ids, offsets, row_normalised(torch.ones(40), ids, offsets), kind=kind)
    torch.testing.assert_close(got, expected)


@pytest.mark.parametrize(("kind", "options"), VARIANTS)
def test_rows_without_labels_change_nothing(kind, options) -> None:
    x, weight, bias = parts(4, 5, 30)
    full, holes = [[1, 2], [3], [2, 9], [4]], [[1, 2], [], [3], [2, 9], [], [4]]
    apart = torch.cat([x[:1], 9 * x[:1], x[1:3], -9 * x[:1], x[3:]])
    losses = []
    for features, rows in ((x, full), (apart, holes)):
        ids, offsets = pack_labels(rows)
        w = row_normalised(torch.ones(30), ids, offsets).double()
        losses.append(soft_label_loss(features, weight, bias, ids, offsets, w, kind=make_kind(kind, **options), chunk_rows=2))
    torch.testing.assert_close(losses[1], losses[0])


@pytest.mark.parametrize(("kind", "options"), VARIANTS)
def test_extreme_logits_stay_finite(kind, options) -> None:
    x, weight, bias = parts(4, 5, 30, torch.float32)
    ids, offsets = pack_labels([[1, 2], [3], [], [4]])
    w = row_normalised(torch.ones(30), ids, offsets)
    loss = soft_label_loss(200 * x, weight, bias, ids, offsets, w, kind=make_kind(kind, **options), chunk_rows=2)
    grads = torch.autograd.grad(loss, (x, weight, bias))
    assert loss.isfinite() and all(g.isfinite().all() for g in grads)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("with_bias", [True, False])
def test_gradcheck(with_bias: bool, kind: str) -> None:
    x, weight, bias = parts(5, 3, 7)
    ids, offsets = pack_labels([[0, 3, 3], [], [6], [1, 2, 4], []])  # a repeat, empty rows, an empty last row
    label_weights = torch.rand(len(ids), dtype=torch.float64)

    def loss(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        return soft_label_loss(x, weight, bias, ids, offsets, label_weights, kind=kind, chunk_rows=2)

    assert torch.autograd.gradcheck(loss, (x, weight, bias) if with_bias else (x, weight))


@pytest.mark.parametrize("kind", KINDS)
def test_a_graph_can_be_walked_twice(kind: str) -> None:
    x, weight, bias = parts(5, 3, 7)
    ids, offsets = packed(5, 7)
    loss = soft_label_loss(x, weight, bias, ids, offsets, torch.rand(len(ids)), kind=kind, chunk_rows=2)
    first = torch.autograd.grad(loss, (x, weight, bias), retain_graph=True)
    kept = [g.clone() for g in first]
    second = torch.autograd.grad(3 * loss, (x, weight, bias))
    for one, before, two in zip(first, kept, second, strict=True):
        torch.testing.assert_close(one, before, rtol=0, atol=0)
        torch.testing.assert_close(two, 3 * one)


def test_equals_the_reference_implementation() -> None:
    """x-cls/superclass open_clip/loss.py:436-463 in its own words, on rows that all have labels."""
    vocab_size, rows = 50, [[1, 5, 9], [2], [5, 9, 30, 49]]
    x, weight, bias = parts(3, 6, vocab_size, torch.float32)
    idf = torch.rand(vocab_size)
    k_hot = torch.zeros(3, vocab_size)
    for row, labels in enumerate(rows):
        k_hot[row, labels] = 1.0
    target = F.normalize(k_hot * idf, p=1, dim=1)
    expected = -(target * F.log_softmax(F.linear(x, weight, bias), dim=1)).sum(dim=1).mean()
    ids, offsets = pack_labels(rows)
    loss = soft_label_loss(x, weight, bias, ids, offsets, row_normalised(idf, ids, offsets))
    torch.testing.assert_close(loss, expected)
    for got, want in zip(
        torch.autograd.grad(loss, (x, weight, bias)), torch.autograd.grad(expected, (x, weight, bias)), strict=True
    ):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-6)


def test_sum_is_mean_times_labelled_rows_and_splits_over_batches() -> None:
    x, weight, bias = parts(12, 4, 20)
    ids, offsets = packed(12, 20)
    label_weights = torch.rand(len(ids), dtype=torch.float64)
    whole = soft_label_loss_sum(x, weight, bias, ids, offsets, label_weights)
    mean = soft_label_loss(x, weight, bias, ids, offsets, label_weights)
    torch.testing.assert_close(whole, mean * (offsets.diff() > 0).sum())
    cut = int(offsets[5])
    halves = soft_label_loss_sum(x[:5], weight, bias, ids[:cut], offsets[:6], label_weights[:cut])
    halves = halves + soft_label_loss_sum(x[5:], weight, bias, ids[cut:], offsets[5:] - cut, label_weights[cut:])
    torch.testing.assert_close(halves, whole)


def test_no_labels_at_all_gives_zero_and_zero_gradients() -> None:
    x, weight, bias = parts(3, 4, 7)
    ids, offsets = pack_labels([[], [], []])
    loss = soft_label_loss(x, weight, bias, ids, offsets, torch.zeros(0))
    loss.backward()
    assert loss.item() == 0.0
    assert not any(value.grad.any() for value in (x, weight, bias))  # type: ignore[union-attr]


def test_autocast_sums_in_float32_and_keeps_the_parameters_dtype() -> None:
    x, weight, bias = parts(16, 32, 2000, torch.float32)
    ids, offsets = packed(16, 2000)
    label_weights = row_normalised(torch.ones(2000), ids, offsets)
    exact = soft_label_loss(x.double(), weight.double(), bias.double(), ids, offsets, label_weights.double())
    wanted = torch.autograd.grad(exact, (x, weight, bias))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = soft_label_loss(x, weight, bias, ids, offsets, label_weights, chunk_rows=5)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss.double(), exact, rtol=5e-3, atol=0)
    for got, want in zip(torch.autograd.grad(loss, (x, weight, bias)), wanted, strict=True):
        assert got.dtype == torch.float32
        assert F.cosine_similarity(got.flatten(), want.flatten(), dim=0) > 0.999


def test_bfloat16_parameters_get_bfloat16_gradients() -> None:
    x, weight, bias = parts(4, 8, 30, torch.bfloat16)
    ids, offsets = packed(4, 30)
    loss = soft_label_loss(x, weight, bias, ids, offsets, torch.ones(len(ids)))
    loss.backward()
    assert loss.dtype == torch.float32
    assert {value.grad.dtype for value in (x, weight, bias)} == {torch.bfloat16}  # type: ignore[union-attr]


def test_frozen_parts_and_scaled_losses() -> None:
    x, weight, bias = parts(4, 8, 30)
    ids, offsets = packed(4, 30)
    ones = torch.ones(len(ids))
    (plain,) = torch.autograd.grad(soft_label_loss(x, weight, bias, ids, offsets, ones), (weight,))
    (scaled,) = torch.autograd.grad(3 * soft_label_loss(x.detach(), weight, bias, ids, offsets, ones), (weight,))
    torch.testing.assert_close(scaled, 3 * plain)
    assert not soft_label_loss(x.detach(), weight.detach(), None, ids, offsets, ones).requires_grad


class _Largest(TorchDispatchMode):
    """Remembers the largest tensor any operation returns."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor):
            self.numel = max(self.numel, result.numel())
        return result


def test_logits_never_exist_in_full() -> None:
    batch, width, vocab_size, chunk = 64, 4, 1000, 8
    x, weight, bias = parts(batch, width, vocab_size, torch.float32)
    ids, offsets = packed(batch, vocab_size)
    with _Largest() as largest:
        soft_label_loss(x, weight, bias, ids, offsets, torch.ones(len(ids)), chunk_rows=chunk).backward()
    assert largest.numel <= chunk * vocab_size


def test_without_grad_no_gradient_is_computed(monkeypatch) -> None:
    from mmkit.encoders import loss as module

    needs: list[tuple[bool, ...]] = []
    sweep = module._sweep
    monkeypatch.setattr(module, "_sweep", lambda *given: needs.append(given[-1]) or sweep(*given))
    x, weight, bias = parts(3, 4, 7)
    ids, offsets = packed(3, 7)
    given = (x, weight, bias, ids, offsets, torch.ones(len(ids)))
    with torch.no_grad():
        quiet = soft_label_loss(*given)
    assert torch.equal(quiet, soft_label_loss(*given)) and needs == [(False,) * 3, (True,) * 3]


def test_options_of_another_kind_are_refused() -> None:
    assert make_kind("asl", clip=None, gamma_negative=2.0) == make_kind("asl", gamma_negative=2.0)
    with pytest.raises(InputError, match=r"loss bce has no option clip; it has none|loss: loss bce has no option clip"):
        make_kind("bce", clip=0.1)
    with pytest.raises(InputError, match="temperature_negative"):
        make_kind("two_way", gamma_negative=1.0)


def test_an_unknown_kind_names_the_known_ones() -> None:
    x, weight, bias = parts(1, 2, 3)
    ids, offsets = pack_labels([[0]])
    with pytest.raises(InputError, match=r"unknown loss 'hinge'.*known: softmax"):
        soft_label_loss(x, weight, bias, ids, offsets, torch.ones(1), kind="hinge")


def test_offsets_that_do_not_fit_are_refused() -> None:
    x, weight, bias = parts(2, 2, 3)
    ids, _ = pack_labels([[0], [1]])
    with pytest.raises(AssertionError, match="offsets"):
        soft_label_loss(x, weight, bias, ids, torch.tensor([0, 1]), torch.ones(2))
    with pytest.raises(AssertionError, match="offsets end at 1"):
        soft_label_loss(x, weight, bias, ids, torch.tensor([0, 1, 1]), torch.ones(2))
