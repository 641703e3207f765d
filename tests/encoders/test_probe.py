"""Probes on features whose answer is known, and against slow twins."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from mmkit.encoders import knn, linear_probe, probe
from mmkit.encoders.kshot import USUAL_L2, draw_shots, kshot
from mmkit.encoders.probe import _schedule, _train_bank, _with_one, ranked_result
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
    values = [_schedule(step, 90) for step in range(90)]  # MAE: 10 of 90 epochs
    assert values[0] == pytest.approx(0.1) and values[9] == max(values) == 1.0 and values[-1] < 0.001
    assert _with_one(torch.zeros(2, 3))[:, -1].tolist() == [1.0, 1.0]


def test_sets_that_do_not_fit_are_refused() -> None:
    x, y = blobs(20)
    with pytest.raises(InputError, match="probe test set: 20 features, 19 labels"):
        knn(x, y, x, y[1:])
    with pytest.raises(InputError, match="at least 10"):
        linear_probe(x[:5], y[:5], x, y, num_classes=4)


def test_lars_steps_equal_those_of_one_head_by_hand() -> None:
    """The twin: MAE's optimizer written out for one head at a time, with autograd for the gradient."""
    x, y = blobs(64)
    lrs = torch.tensor([2.0, 20.0])
    norm, heads = _train_bank(x, y, 4, lrs, 3, 16, torch.Generator().manual_seed(7), lars=True)
    for index, lr in enumerate(lrs.tolist()):
        generator = torch.Generator().manual_seed(7)
        weight = (0.01 * torch.randn(8, 4, generator=generator)).requires_grad_()
        bias = torch.zeros(4, requires_grad=True)
        batch_norm = torch.nn.BatchNorm1d(8, affine=False, eps=1e-6)
        buffers = [torch.zeros(8, 4), torch.zeros(4)]
        for step in range(12):
            if step % 4 == 0:
                order = torch.randperm(64, generator=generator)
            batch = order[step % 4 * 16 :][:16]
            loss = F.cross_entropy(batch_norm(x[batch]) @ weight + bias, y[batch])
            gradients = list(torch.autograd.grad(loss, (weight, bias)))
            gradients[0] = gradients[0] * 0.001 * weight.detach().norm() / gradients[0].norm()
            with torch.no_grad():
                for parameter, buffer, gradient in zip((weight, bias), buffers, gradients, strict=True):
                    buffer.mul_(0.9).add_(gradient)
                    parameter -= lr * _schedule(step, 12) * buffer
        torch.testing.assert_close(heads[index, :-1], weight.detach(), rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(heads[index, -1], bias.detach(), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(norm.running_var, batch_norm.running_var)


def test_a_trust_ratio_without_size_or_gradient_is_one() -> None:
    weights = torch.stack([torch.zeros(3, 2), torch.ones(3, 2), 2 * torch.ones(3, 2)])
    gradients = torch.stack([torch.ones(3, 2), torch.zeros(3, 2), torch.ones(3, 2)])
    assert probe._trust_ratios(weights, gradients).flatten().tolist() == pytest.approx([1.0, 1.0, 0.002])


def test_lars_takes_over_at_large_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    train, test = blobs(400), blobs(100, seed=1)
    small = linear_probe(*train, *test, num_classes=4, epochs=2, batch_size=64)
    assert small.settings["optimizer"] == "sgd"
    monkeypatch.setattr(probe, "LARS_FROM", 64)
    large = linear_probe(*train, *test, num_classes=4, epochs=20, batch_size=64, lrs=(1.0, 10.0, 40.0))
    assert large.settings["optimizer"] == "lars" and large.accuracy > 0.97
    # A batch larger than the training set is cut to it, and the rule looks at what is left.
    assert linear_probe(*blobs(60), *test, num_classes=4, epochs=1, batch_size=64).settings["optimizer"] == "sgd"
    forced = linear_probe(*train, *test, num_classes=4, epochs=2, batch_size=32, optimizer="lars")
    assert forced.settings["optimizer"] == "lars"


def ridge_twin(x: Tensor, y: Tensor, test_x: Tensor, l2: float) -> Tensor:
    """Scores by least squares on a matrix with sqrt(l2) I below: no decomposition of ours."""
    mean, std = x.double().mean(0), x.double().std(0, unbiased=False) + 1e-5
    inputs = torch.cat([(x.double() - mean) / std, torch.full((len(x), 1), 100.0, dtype=torch.float64)], 1)
    targets = torch.where(F.one_hot(y, 4) == 1, 1.0, -1.0).double()
    below = torch.eye(inputs.shape[1], dtype=torch.float64) * l2**0.5
    stacked = torch.cat([inputs, below]), torch.cat([targets, torch.zeros(len(below), 4, dtype=torch.float64)])
    weights = torch.linalg.lstsq(*stacked, driver="gelsd").solution
    queries = torch.cat([(test_x.double() - mean) / std, torch.full((len(test_x), 1), 100.0, dtype=torch.float64)], 1)
    return queries @ weights


@pytest.mark.parametrize("shots", [2, 5])  # 8 and 20 samples: fewer than features, and more
def test_kshot_equals_least_squares_on_its_draws(shots: int) -> None:
    train, (test_x, test_y) = blobs(200, noise=0.8), blobs(150, seed=1, noise=0.8)
    for l2 in (2.0**-4, 2.0**10):
        result = kshot(*train, test_x, test_y, num_classes=4, shots=shots, draws=3, seed=5, l2=[l2])
        accuracies, correct = [], torch.zeros(150, dtype=torch.float64)
        for draw in range(3):
            kept = draw_shots(train[1].numpy(), 4, shots, seed=[5, draw])
            assert train[1][kept].tolist() == [c for c in range(4) for _ in range(shots)] and len(set(kept.tolist())) == 4 * shots
            right = ridge_twin(train[0][kept], train[1][kept], test_x, l2).argmax(1) == test_y
            accuracies.append(float(right.double().mean()))
            correct += right / 3
        assert result.settings["accuracies"] == pytest.approx(accuracies, abs=1e-6)
        assert result.settings["std"] == pytest.approx(torch.tensor(accuracies).std().item(), abs=1e-5)
        assert result.accuracy == pytest.approx(sum(accuracies) / 3) and result.correct == pytest.approx(correct.tolist())


def test_kshot_chooses_its_strength_by_leaving_one_out() -> None:
    """The twin leaves each shot out for real, with the statistics of all."""
    train, test = blobs(200, noise=1.5), blobs(50, seed=1, noise=1.5)
    strengths = [2.0**10, 2.0**4, 2.0**20]
    chosen = kshot(*train, *test, num_classes=4, shots=6, draws=1, seed=2, l2=strengths).settings["l2"][0]
    kept = draw_shots(train[1].numpy(), 4, 6, seed=[2, 0])
    x, y = train[0][kept], train[1][kept]
    mean, std = x.double().mean(0), x.double().std(0, unbiased=False) + 1e-5
    inputs = torch.cat([(x.double() - mean) / std, torch.full((24, 1), 100.0, dtype=torch.float64)], 1)
    targets = 2.0 * F.one_hot(y, 4).double() - 1
    found = {}
    for l2 in strengths:
        right = 0
        for i in range(24):
            rest = [j for j in range(24) if j != i]
            gram = inputs[rest].T @ inputs[rest] + l2 * torch.eye(9, dtype=torch.float64)
            right += int((inputs[i] @ torch.linalg.solve(gram, inputs[rest].T @ targets[rest])).argmax() == y[i])
        found[l2] = right
    assert found[chosen] == max(found.values()) and len(set(found.values())) > 1
    assert min(abs(torch.tensor(l2 / USUAL_L2).log2()) for l2 in found if found[l2] == max(found.values())) == abs(
        torch.tensor(chosen / USUAL_L2).log2()
    )


def test_kshot_with_one_shot_takes_the_usual_strength() -> None:
    train, test = blobs(200), blobs(50, seed=1)
    result = kshot(*train, *test, num_classes=4, shots=1, draws=2)
    assert result.settings["l2"] == [USUAL_L2, USUAL_L2] and result.accuracy > 0.8
    assert kshot(*train, *test, num_classes=4, shots=1, draws=1).settings["std"] is None
    assert kshot(*train, *test, num_classes=4, shots=1, draws=2, seed=1).correct != result.correct


def test_kshot_names_a_class_with_too_few_pictures() -> None:
    (x, y), names = blobs(40), ["a", "b", "c", "d"]
    y[:] = torch.tensor([0] * 20 + [1] * 15 + [2] * 3 + [3] * 2)
    with pytest.raises(InputError, match=r"class c has 3 training pictures, for 5 shots \(and 1 more classes .*lower shots"):
        kshot(x, y, x, y, num_classes=4, shots=5, names=names)


def test_top_five_counts_where_it_says_something() -> None:
    top = torch.tensor([[0, 1, 2, 3, 4], [5, 6, 0, 1, 2], [6, 5, 4, 3, 2]])
    result = ranked_result(top, torch.tensor([0, 2, 0]), 7, probe="x")
    assert result.correct == [1, 0, 0] and result.top5 == [1, 1, 0] and result.settings == {"probe": "x", "num_classes": 7}
    assert ranked_result(top, torch.tensor([0, 2, 0]), 5).top5 is None
