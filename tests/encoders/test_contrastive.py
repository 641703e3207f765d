"""The contrastive losses against open_clip's, value and gradients, whole and in shares of processes."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from open_clip.loss import ClipLoss, SigLipLoss
from torch import Tensor

from mmkit.encoders.contrastive import infonce_rows, infonce_sum, sigmoid_rows, sigmoid_sum

KINDS = ["infonce", "sigmoid"]


def inputs(rows: int = 10, size: int = 6, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """Normalised pictures and captions, scale, bias; leaves with gradient."""
    generator = torch.Generator().manual_seed(0)
    made = [F.normalize(torch.randn(rows, size, generator=generator, dtype=dtype), dim=1) for _ in range(2)]
    return [t.requires_grad_() for t in (*made, torch.tensor(14.0, dtype=dtype), torch.tensor(-3.0, dtype=dtype))]


def ours(kind: str, made: list[Tensor], *, shares: int = 1, chunk_rows: int = 256) -> Tensor:
    """Sum over the shares of as many processes."""
    image, text, scale, bias = made
    size = len(image) // shares
    total = torch.zeros((), dtype=image.dtype)
    for start in range(0, len(image), size):
        i, t = image[start : start + size], text[start : start + size]
        if kind == "infonce":
            total = total + infonce_sum(i, t, image, text, scale, start, chunk_rows=chunk_rows)
        else:
            total = total + sigmoid_sum(i, text, scale, bias, start, chunk_rows=chunk_rows)
    return total


def reference(kind: str, made: list[Tensor]) -> Tensor:
    image, text, scale, bias = made
    if kind == "infonce":
        return ClipLoss()(image, text, scale) * len(image)
    return SigLipLoss()(image, text, scale, bias) * len(image)


def gradients(kind: str, loss: Tensor, made: list[Tensor]) -> tuple[Tensor, ...]:
    return torch.autograd.grad(loss, made if kind == "sigmoid" else made[:3])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("shares", "chunk_rows"), [(1, 256), (1, 3), (1, 1), (2, 256), (5, 1)])
def test_value_and_gradients_are_open_clips(kind, shares, chunk_rows):
    made = inputs()
    found, wanted = ours(kind, made, shares=shares, chunk_rows=chunk_rows), reference(kind, made)
    assert found.item() == pytest.approx(wanted.item(), rel=1e-12)
    for mine, theirs in zip(gradients(kind, found, made), gradients(kind, wanted, made), strict=True):
        assert torch.allclose(mine, theirs, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_two_rows_by_hand(kind):
    image, text = torch.tensor([[1.0, 0.0], [0.0, 1.0]]), torch.tensor([[1.0, 0.0], [0.6, 0.8]])
    z = [[2.0, 1.2], [0.0, 1.6]]
    if kind == "infonce":
        found = infonce_rows(image, text, image, text, torch.tensor(2.0), 0)
        both = [[math.log(sum(map(math.exp, v))) for v in side] for side in (z, zip(*z, strict=True))]
        wanted = [(both[0][i] + both[1][i]) / 2 - z[i][i] for i in range(2)]
    else:
        found = sigmoid_rows(image, text, torch.tensor(2.0), torch.tensor(-1.0), 0)
        wanted = [sum(math.log1p(math.exp((1 - 2 * (i == j)) * (z[i][j] - 1))) for j in range(2)) for i in range(2)]
    assert found.tolist() == pytest.approx(wanted, rel=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_reductions_are_fp32_under_autocast(kind):
    made = inputs(64, 32, torch.float32)
    wanted = reference(kind, [t.double() for t in made])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = ours(kind, made, chunk_rows=16)
    assert found.dtype == torch.float32
    # bf16 logits of up to 14 would be off by 0.03 each.
    assert found.item() == pytest.approx(wanted.item(), rel=1e-6)


def test_features_in_bf16_are_compared_in_fp32():
    made = [t.detach().bfloat16() for t in inputs(32, 16, torch.float32)[:2]]
    found = infonce_sum(*made, *made, torch.tensor(100.0), 0)
    wide = [t.double() for t in made]
    assert found.dtype == torch.float32
    assert found.item() == pytest.approx(32 * ClipLoss()(*wide, torch.tensor(100.0)).item(), rel=1e-5)


def test_pictures_without_captions_are_a_programming_error():
    image, text, scale, _ = inputs()
    with pytest.raises(AssertionError, match="pairs"):
        infonce_sum(image, text[:-1], image, text, scale, 0)
