"""k-shot classification: a ridge regression in closed form on a few pictures of each class, over several draws."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from mmkit.encoders.probe import ProbeResult
from mmkit.errors import InputError

# big_vision's fixed strength (configs/common_fewshot.py) is the middle of the sweep.
USUAL_L2 = 2.0**10
# Steps of 4 over twelve powers of ten: inputs are standardised, so one range serves every encoder.
L2_SWEEP = tuple(2.0**power for power in range(-10, 31, 2))
# The constant feature is so large that the bias is hardly held back (big_vision fewshot_lsr.py).
_BIAS = 100.0


def kshot(
    train_x: Tensor,
    train_y: Tensor,
    test_x: Tensor,
    test_y: Tensor,
    *,
    num_classes: int,
    shots: int = 10,
    draws: int = 3,
    seed: int = 0,
    names: Sequence[str] | None = None,
    l2: Sequence[float] = L2_SWEEP,
) -> ProbeResult:
    """Mean accuracy over draws of ``shots`` training pictures a class.

    The classifier is big_vision's (evaluators/fewshot_lsr.py), which CapPa and SuperClass report: features standardised by the
    shots, a bias feature, least squares with L2 on targets of -1 and 1. Its strength is chosen for each draw by the
    leave-one-out accuracy on the shots: the test set chooses nothing. Of equals, and so with a single shot, the one nearest to
    big_vision's ``2**10`` is taken.

    Args:
        train_x: float[N, D] features.
        train_y: i64[N], classes 0..C-1.
        test_x: float[M, D].
        test_y: i64[M].
        num_classes: C.
        shots: Pictures of each class.
        draws: How many times they are drawn.
        seed: Of the draws.
        names: Of the classes, for messages.
        l2: Strengths to choose from.

    Returns:
        The mean over draws; ``settings`` has the accuracy and the strength of each, and the standard deviation over them.

    Raises:
        InputError: A class has fewer training pictures than shots.
    """
    check_shots(train_y, names or [str(c) for c in range(num_classes)], shots)
    # The usual one first: argmax takes the first of equals.
    strengths = torch.tensor(sorted(l2, key=lambda value: abs(np.log2(value / USUAL_L2))), dtype=torch.float64)
    hits, chosen = [], []
    for draw in range(draws):
        # A list of seeds, since seed + draw would make draw 1 of seed 0 the same as draw 0 of seed 1.
        kept = draw_shots(train_y.cpu().numpy(), num_classes, shots, seed=[seed, draw]).to(train_x.device)
        found = _fit(train_x[kept], train_y[kept], num_classes, strengths.to(train_x.device))
        # In parts: float64 inputs of a whole test set would take twice its own memory again.
        hits.append(torch.cat([found.predict(part) for part in test_x.split(4096)]) == test_y)
        chosen.append(found.l2)
    correct = torch.stack(hits).double()  # [draws, M]
    accuracies = correct.mean(dim=1)
    settings: dict[str, Any] = {
        "probe": "kshot",
        "shots": shots,
        "draws": draws,
        "accuracies": [round(value, 6) for value in accuracies.tolist()],
        # One draw says nothing about how draws differ.
        "std": round(float(accuracies.std()), 6) if draws > 1 else None,
        "l2": chosen,
        "seed": seed,
        "num_classes": num_classes,
    }
    return ProbeResult(float(accuracies.mean()), correct.mean(dim=0).tolist(), settings)


def check_shots(train_y: Tensor, names: Sequence[str], shots: int) -> None:
    """Refuse a training set in which a class has too few pictures.

    Args:
        train_y: i64[N], classes 0..C-1.
        names: Of the C classes.
        shots: Pictures of each class that are needed.

    Raises:
        InputError: A class has fewer.
    """
    have = torch.bincount(train_y.cpu(), minlength=len(names)).tolist()
    if few := [c for c in range(len(names)) if have[c] < shots]:
        which = f"class {names[few[0]]} has {have[few[0]]} training pictures"
        more = f" (and {len(few) - 1} more classes have too few)" if len(few) > 1 else ""
        raise InputError(f"{which}, for {shots} shots{more}", where="k-shot probe", mend="lower shots, or raise data.limit")


def draw_shots(train_y: np.ndarray[Any, Any], num_classes: int, shots: int, *, seed: Sequence[int]) -> Tensor:
    """Numbers of ``shots`` random samples of each class, i64[C * shots], class by class."""
    # NumPy on the host: the same shots on every device.
    rng = np.random.default_rng(list(seed))
    return torch.from_numpy(
        np.concatenate([rng.permutation(np.flatnonzero(train_y == c))[:shots] for c in range(num_classes)]).astype(np.int64)
    )


class _Ridge(NamedTuple):
    """A fitted classifier: statistics float64[D], weights float64[D + 1, C], and the strength that was chosen."""

    mean: Tensor
    std: Tensor
    weights: Tensor
    l2: float

    def predict(self, x: Tensor) -> Tensor:
        """Classes i64[M] of features float[M, D]."""
        return (_inputs(x, self.mean, self.std) @ self.weights).argmax(dim=1)


def _inputs(x: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """Standardised features with the bias feature, float64[M, D + 1]."""
    # float64, because strengths reach from far below to far above the squared singular values.
    return F.pad((x.double() - mean) / std, (0, 1), value=_BIAS)


def _fit(x: Tensor, y: Tensor, num_classes: int, strengths: Tensor) -> _Ridge:
    """Least squares with L2 for all strengths from one decomposition, and the best by leave-one-out accuracy.

    With X = U S V^T the weights are V (S / (S^2 + l)) U^T Y. A sample's prediction by the fit without it is
    ``(f - h y) / (1 - h)`` with the fit f = X W and its leverage h = sum_k U_k^2 S_k^2 / (S_k^2 + l) (Hastie et al., The
    Elements of Statistical Learning, equation 7.64).
    """
    # Deviation over n, not n - 1, and 1e-5 added after the root: as fewshot_lsr.py has them.
    # By the shots alone: the statistics of the whole set would be more pictures than the probe allows. The epsilon is for
    # features that are constant over the shots.
    mean, std = x.double().mean(dim=0), x.double().std(dim=0, correction=0) + 1e-5
    inputs = _inputs(x, mean, std)
    # -1 and 1, as in big_vision's fewshot_lsr.py.
    targets = 2.0 * F.one_hot(y, num_classes).double() - 1.0
    # Once for all strengths, which differ only in how much of each direction they keep.
    left, scale, right = torch.linalg.svd(inputs, full_matrices=False)
    projected = left.T @ targets
    scores = []
    for strength in strengths:
        shrink = scale.square() / (scale.square() + strength)
        leverage = (left.square() @ shrink)[:, None]
        fitted = left @ (shrink[:, None] * projected)
        # A sample that the fit passes through has leverage 1 (up to rounding), and nothing is known without it.
        without = (fitted - leverage * targets) / (1 - leverage).clamp(min=1e-12)
        scores.append((without.argmax(dim=1) == y).double().mean())
    # The first of equals.
    best = int(torch.stack(scores).argmax())
    weights = right.T @ ((scale / (scale.square() + strengths[best]))[:, None] * projected)
    return _Ridge(mean, std, weights, float(strengths[best]))
