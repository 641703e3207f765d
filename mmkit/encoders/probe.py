"""How good frozen features are: a linear probe and weighted k-nearest neighbours. See also `kshot` and `zeroshot`."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from mmkit.errors import InputError

DEFAULT_LRS = (0.003, 0.01, 0.03, 0.1, 0.3, 1.0)
# From this batch on LARS takes over from SGD; MAE probes with 16384.
LARS_FROM = 4096


@dataclasses.dataclass(frozen=True)
class ProbeResult:
    """One probe on one test set.

    Attributes:
        accuracy: Share of test samples that are right.
        correct: 1 or 0 for each test sample (their mean over the draws of a k-shot probe), in order, for confidence intervals.
        settings: Everything that was chosen, so that the number can be made again.
        top5: 1 or 0 for each test sample: its class is among the five likeliest; None where that was not looked at.
    """

    accuracy: float
    correct: list[float]
    settings: dict[str, Any]
    top5: list[float] | None = None


def linear_probe(
    train_x: Tensor,
    train_y: Tensor,
    test_x: Tensor,
    test_y: Tensor,
    *,
    num_classes: int,
    lrs: Sequence[float] = DEFAULT_LRS,
    epochs: int = 30,
    batch_size: int = 256,
    seed: int = 0,
    optimizer: Literal["auto", "sgd", "lars"] = "auto",
) -> ProbeResult:
    """MAE's linear probe: BatchNorm without affine, one linear layer, no weight decay, warm-up for 10 of 90 epochs, cosine.

    MAE (facebookresearch/mae, main_linprobe.py; arXiv 2111.06377, appendix A.1) trains with LARS at batch 16384 and a base
    learning rate of 0.1; at small batches plain momentum SGD does the same. All learning rates are trained in one pass as a
    bank of heads, and one is chosen on a held-out tenth of the *training* set: the test set chooses nothing.

    Args:
        train_x: float[N, D] features; they are used as they are, so cache them once.
        train_y: i64[N], classes 0..C-1.
        test_x: float[M, D].
        test_y: i64[M].
        num_classes: C.
        lrs: Learning rates for a batch of 256; scaled linearly with the batch.
        epochs: Passes over nine tenths of the training set.
        batch_size: Samples a step.
        seed: Of the split, the order and LARS's first weights (SGD starts at 0).
        optimizer: ``auto`` takes LARS from a batch of 4096 on.

    Returns:
        The result of the chosen head; ``settings["held_out"]`` has the accuracy of every learning rate.

    Raises:
        InputError: If sizes do not match, or there are fewer than ten training samples.
    """
    _check(train_x, train_y, test_x, test_y)
    if len(train_x) < 10:
        raise InputError(f"{len(train_x)} training samples", where="linear probe", mend="a probe needs at least 10")
    # A CPU generator gives the same split and order on every device.
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(train_x), generator=generator).to(train_x.device)
    held, fit = order[: len(order) // 10], order[len(order) // 10 :]
    # A batch larger than the set is cut to it, and the choice of optimiser looks at what is left.
    batch_size = min(batch_size, len(fit))
    # The linear scaling rule, by which MAE states its base rate too.
    scaled = torch.tensor(lrs, device=train_x.device) * batch_size / 256
    lars = batch_size >= LARS_FROM if optimizer == "auto" else optimizer == "lars"
    norm, heads = _train_bank(train_x[fit], train_y[fit], num_classes, scaled, epochs, batch_size, generator, lars=lars)
    scores = (_bank_predict(train_x[held], norm, heads) == train_y[held]).float().mean(dim=1)
    # The first of equals, which is the smallest learning rate if they are given in order.
    best = int(scores.argmax())
    # The test set is looked at once, by the chosen head.
    correct = _bank_predict(test_x, norm, heads[best : best + 1])[0] == test_y
    return _result(
        correct,
        probe="linear",
        optimizer="lars" if lars else "sgd",
        lr=float(lrs[best]),
        held_out={str(lr): round(score, 6) for lr, score in zip(lrs, scores.tolist(), strict=True)},
        epochs=epochs,
        batch_size=batch_size,
        seed=seed,
        num_classes=num_classes,
        train=len(fit),
    )


def knn(
    train_x: Tensor, train_y: Tensor, test_x: Tensor, test_y: Tensor, *, k: int = 20, temperature: float = 0.07
) -> ProbeResult:
    """Weighted k-nearest neighbours by cosine, as DINO's (facebookresearch/dino, eval_knn.py; arXiv 2104.14294).

    The k nearest training samples vote for their class with weight ``exp(similarity / temperature)``.

    Args:
        train_x: float[N, D] features.
        train_y: i64[N].
        test_x: float[M, D].
        test_y: i64[M].
        k: Neighbours; all of them if there are fewer.
        temperature: Of the weights.

    Returns:
        The result.

    Raises:
        InputError: If sizes do not match.
    """
    _check(train_x, train_y, test_x, test_y)
    k = min(k, len(train_x))
    classes = int(max(train_y.max(), test_y.max())) + 1
    bank = F.normalize(train_x.float(), dim=1)
    # 1024 at a time: the similarity matrix of ImageNet would be 50,000 x 1.28 M.
    predictions = []
    for part in test_x.split(1024):
        similarity, nearest = (F.normalize(part.float(), dim=1) @ bank.T).topk(k, dim=1)
        # Votes only where a neighbour is; a class without one stays at 0, below every exp.
        votes = torch.zeros(len(part), classes, device=part.device)
        votes.scatter_add_(1, train_y[nearest], (similarity / temperature).exp())
        predictions.append(votes.argmax(dim=1))
    return _result(torch.cat(predictions) == test_y, probe="knn", k=k, temperature=temperature, train=len(train_x))


def _train_bank(
    x: Tensor,
    y: Tensor,
    num_classes: int,
    lrs: Tensor,
    epochs: int,
    batch_size: int,
    generator: torch.Generator,
    *,
    lars: bool = False,
) -> tuple[torch.nn.BatchNorm1d, Tensor]:
    """Train R heads side by side; returns the norm and weights float[R, D + 1, C], the last row being the bias."""
    # MAE's: no affine part, and its epsilon.
    norm = torch.nn.BatchNorm1d(x.shape[1], affine=False, eps=1e-6).to(x.device)
    # The loss is convex, so a start at 0 is as good as any, and needs no seed.
    heads = torch.zeros(len(lrs), x.shape[1] + 1, num_classes, device=x.device)
    if lars:
        # LARS scales a step by the size of the weights, so they cannot start at 0; MAE's 0.01, the same for every head.
        heads[:, :-1] = 0.01 * torch.randn(heads.shape[1] - 1, num_classes, generator=generator).to(x.device)
    # Written out instead of torch.optim: a rate for each head, and one matrix product for all (a test holds them to
    # torch's SGD).
    momentum = torch.zeros_like(heads)
    steps_per_epoch = len(x) // batch_size
    total = epochs * steps_per_epoch
    for step in range(total):
        # A new order each epoch, the same for every rate: they are compared on the same batches.
        if step % steps_per_epoch == 0:
            order = torch.randperm(len(x), generator=generator).to(x.device)
        # The incomplete last batch is left out: BatchNorm on one or two samples would spoil its running means.
        index = order[step % steps_per_epoch * batch_size :][:batch_size]
        inputs = _with_one(norm(x[index].float()))
        # Gradient of the mean cross-entropy of every head at once: X^T (softmax - onehot) / B. The heads share no
        # parameter, so each gets exactly the gradient it would get alone.
        error = (inputs @ heads).softmax(dim=2) - F.one_hot(y[index], num_classes)
        gradient = inputs.T @ error / len(index)
        if lars:
            gradient[:, :-1] *= _trust_ratios(heads[:, :-1], gradient[:, :-1])
        momentum.mul_(0.9).add_(gradient)
        heads -= (lrs * _schedule(step, total))[:, None, None] * momentum
    return norm.eval(), heads


def _trust_ratios(weights: Tensor, gradients: Tensor) -> Tensor:
    """LARS's factors on the gradients of R heads, 0.001 ||w|| / ||g||, or 1 where either is 0 (arXiv 1708.03888, equation 6).

    As facebookresearch/mae util/lars.py: without weight decay, and not on the bias.

    Args:
        weights: float[R, D, C].
        gradients: float[R, D, C].

    Returns:
        float[R, 1, 1].
    """
    size, change = (torch.linalg.vector_norm(t, dim=(1, 2), keepdim=True) for t in (weights, gradients))
    return torch.where((size > 0) & (change > 0), 0.001 * size / change, torch.ones_like(size))


def _schedule(step: int, total: int) -> float:
    """Linear warm-up over the first ninth (MAE: 10 of 90 epochs), then a half cosine to 0."""
    warm = max(1, total // 9)
    if step < warm:
        return (step + 1) / warm
    return 0.5 * (1.0 + math.cos(math.pi * (step - warm) / max(1, total - warm)))


def _bank_predict(x: Tensor, norm: torch.nn.BatchNorm1d, heads: Tensor) -> Tensor:
    """Predicted classes i64[R, M] of R heads for float[M, D], in pieces that keep memory small."""
    # R x 4,096 x C scores exist at a time.
    parts = [(_with_one(norm(part.float())) @ heads).argmax(dim=2) for part in x.split(4096)]
    return torch.cat(parts, dim=1)


def _with_one(x: Tensor) -> Tensor:
    """Append a column of ones for the bias: float[B, D] to float[B, D + 1]."""
    return F.pad(x, (0, 1), value=1.0)


def _check(train_x: Tensor, train_y: Tensor, test_x: Tensor, test_y: Tensor) -> None:
    """Refuse empty sets and features that do not belong to the labels."""
    for name, x, y in (("train", train_x, train_y), ("test", test_x, test_y)):
        if len(x) != len(y) or not len(x):
            raise InputError(f"{len(x)} features, {len(y)} labels", where=f"probe {name} set", mend="give one of each")


def _result(correct: Tensor, **settings: Any) -> ProbeResult:
    """Bring the outcome to plain Python."""
    return ProbeResult(float(correct.double().mean()), correct.double().tolist(), settings)


def ranked_result(top: Tensor, test_y: Tensor, num_classes: int, **settings: Any) -> ProbeResult:
    """Top-1, and top-5 where it says something.

    Args:
        top: i64[M, 5] (fewer with fewer classes), the likeliest classes, best first.
        test_y: i64[M].
        num_classes: C; with five or fewer every top-5 is right, so there is none.
        settings: Of the result.
    """
    if not len(top) or len(top) != len(test_y):
        raise InputError(f"{len(top)} features, {len(test_y)} labels", where="probe test set", mend="give one of each")
    hits = top == test_y.to(top.device)[:, None]
    result = _result(hits[:, 0], **settings, num_classes=num_classes)
    if num_classes <= 5:
        return result
    return dataclasses.replace(result, top5=hits.any(dim=1).double().tolist())
