"""Probes on features whose answer is known, and against slow twins."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from mmkit.encoders import knn, linear_probe
from mmkit.encoders.probe import _schedule, _train_bank, _with_one
from mmkit.errors import InputError


def blobs(count: int, classes: int = 4, seed: int = 0, noise: float = 0.3) -> tuple[Tensor, Tensor]:
    """Gaussian blobs around fixed random centres, with a large common offset and scale."""
    centres = torch.randn(classes, 8, generator=torch.Generator().manual_seed(99))
    generator = torch.Generator().manual_seed(seed)
    y = torch.randint(0, classes, (count,), generator=generator)
    return 100 * (centres[y] + noise * torch.randn(count, 8, generator=generator)) + 500, y


def test_both_probes_separate_blobs() -> None:
    train, test = blobs(400), blobs(100, seed=1)
    result = linear_probe(*train, *test, num_classes=4, epochs=10, batch_size=64)
    assert result.accuracy > 0.97 and len(result.correct) == 100
    assert result.accuracy == pytest.approx(sum(result.correct) / 100)
    train_x, test_x = train[0] - 500, test[0] - 500  # cosine needs the offset away; BatchNorm above did not
    assert knn(train_x, train[1], test_x, test[1]).accuracy > 0.97


def test_features_without_information_stay_at_chance() -> None:
    (_, train_y), (_, test_y) = blobs(400), blobs(400, seed=1)
    noise = torch.Generator().manual_seed(5)
    train_x, test_x = torch.randn(400, 8, generator=noise), torch.randn(400, 8, generator=noise)
    assert linear_probe(train_x, train_y, test_x, test_y, num_classes=4, epochs=3).accuracy < 0.4
    assert knn(train_x, train_y, test_x, test_y).accuracy < 0.4


def test_the_bank_trains_each_head_as_if_alone() -> None:
    """The twin: nn.Linear, autograd, torch.optim.SGD, the same batches, one learning rate at a time."""
    x, y = blobs(64)
    lrs = torch.tensor([0.05, 0.5])
    norm, heads = _train_bank(x, y, 4, lrs, 3, 16, torch.Generator().manual_seed(7))
    for index, lr in enumerate(lrs.tolist()):
        generator = torch.Generator().manual_seed(7)
        batch_norm = torch.nn.BatchNorm1d(8, affine=False, eps=1e-6)
        linear = torch.nn.Linear(8, 4)
        torch.nn.init.zeros_(linear.weight)
        torch.nn.init.zeros_(linear.bias)
        optimiser = torch.optim.SGD(linear.parameters(), lr=lr, momentum=0.9)
        for step in range(12):
            if step % 4 == 0:
                order = torch.randperm(64, generator=generator)
            batch = order[step % 4 * 16 :][:16]
            optimiser.param_groups[0]["lr"] = lr * _schedule(step, 12)
            optimiser.zero_grad()
            F.cross_entropy(linear(batch_norm(x[batch])), y[batch]).backward()
            optimiser.step()
        torch.testing.assert_close(heads[index, :-1], linear.weight.T, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(heads[index, -1], linear.bias, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(norm.running_mean, batch_norm.running_mean)


def test_the_test_set_chooses_nothing() -> None:
    train, (test_x, test_y) = blobs(200, noise=1.0), blobs(50, seed=1, noise=1.0)
    right = linear_probe(*train, test_x, test_y, num_classes=4, epochs=3)
    wrong = linear_probe(*train, test_x, (test_y + 1) % 4, num_classes=4, epochs=3)
    assert right.settings == wrong.settings
    assert right.settings["train"] == 180
    best = max(right.settings["held_out"].values())
    assert right.settings["held_out"][str(right.settings["lr"])] == best


def test_the_same_seed_gives_the_same_result() -> None:
    train, test = blobs(100, noise=1.5), blobs(100, seed=1, noise=1.5)
    assert linear_probe(*train, *test, num_classes=4, epochs=2) == linear_probe(*train, *test, num_classes=4, epochs=2)


def test_knn_equals_a_loop() -> None:
    (train_x, train_y), (test_x, test_y) = blobs(60, noise=2.0), blobs(30, seed=1, noise=2.0)
    train_x, test_x = train_x - 500, test_x - 500
    expected = []
    for x, y in zip(test_x, test_y.tolist(), strict=True):
        similarity = F.cosine_similarity(x[None], train_x)
        votes = [0.0] * 4
        for index in similarity.argsort(descending=True)[:5].tolist():
            votes[int(train_y[index])] += float((similarity[index] / 0.07).exp())
        expected.append(votes.index(max(votes)) == y)
    assert knn(train_x, train_y, test_x, test_y, k=5).correct == expected


def test_fewer_neighbours_than_k_are_all_used() -> None:
    (x, y) = blobs(12)
    assert knn(x - 500, y, x - 500, y, k=50).settings["k"] == 12


def test_schedule_warms_up_and_ends_near_zero() -> None:
    values = [_schedule(step, 100) for step in range(100)]
    assert values[0] == pytest.approx(0.1) and max(values) == 1.0 and values[-1] < 0.001
    assert _with_one(torch.zeros(2, 3))[:, -1].tolist() == [1.0, 1.0]


def test_sets_that_do_not_fit_are_refused() -> None:
    x, y = blobs(20)
    with pytest.raises(InputError, match="probe test set: 20 features, 19 labels"):
        knn(x, y, x, y[1:])
    with pytest.raises(InputError, match="at least 10"):
        linear_probe(x[:5], y[:5], x, y, num_classes=4)
