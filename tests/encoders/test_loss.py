"""The chunked loss against textbook dense twins: values, gradients, memory."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from mmkit.encoders import pack_labels, row_normalised, soft_label_loss, soft_label_loss_sum
from mmkit.encoders.ragged import row_of_label
from mmkit.errors import InputError

from .helpers import packed

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


@pytest.mark.parametrize("with_bias", [True, False])
def test_gradcheck(with_bias: bool) -> None:
    x, weight, bias = parts(5, 3, 7)
    ids, offsets = pack_labels([[0, 3, 3], [], [6], [1, 2, 4], []])  # a repeat, empty rows, an empty last row
    label_weights = torch.rand(len(ids), dtype=torch.float64)

    def loss(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        return soft_label_loss(x, weight, bias, ids, offsets, label_weights, chunk_rows=2)

    assert torch.autograd.gradcheck(loss, (x, weight, bias) if with_bias else (x, weight))


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
