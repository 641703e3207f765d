"""The captioning benchmark compares equal captions and equal losses; how fast it is, is no test."""

from __future__ import annotations

import pytest
import torch

from mmkit.bench import clipcap, run_bench
from mmkit.bench.clipcap import TrainingSteps, make_model

SMALL = {"repeats": "1", "pictures": "3", "batch": "2", "width": "64", "layers": "2", "vocab": "300", "train_batch": "3"}


def test_gives_figures_of_both_sides() -> None:
    found = run_bench("clipcap", SMALL)
    numbers = {key: value for key, value in found.items() if not isinstance(value, str)}
    assert all(value > 0 for value in numbers.values()), numbers
    assert {"captioning, mmkit / published", "training, GPT-2 tuned, mmkit / published"} <= set(numbers)
    assert "training, GPT-2 frozen, mmkit / published" in numbers
    assert found["equal captions"] == "3 of 3" and "V=300" in found["conditions"] and "beam 5, 2 at a time" in found["captions"]


def test_other_captions_end_the_benchmark(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clipcap, "beams_without_cache", lambda *_, **__: [1, 2, 3])
    with pytest.raises(AssertionError, match="captions differ"):
        run_bench("clipcap", SMALL)


def test_captions_end_by_themselves_and_differ() -> None:
    model = make_model(width=64, layers=2, vocab=300, prefix=10, length=8)
    features = torch.randn(4, 512, generator=torch.Generator().manual_seed(1))
    texts = [clipcap.beams_without_cache(model, row, beams=2, longest=67, stop=[13]) for row in features]
    assert all(text[-1] == 13 and len(text) < 40 for text in texts) and len({tuple(text) for text in texts}) > 1


@pytest.mark.parametrize("frozen", [True, False])
def test_both_training_steps_give_the_gradient_of_the_mapper(frozen: bool) -> None:
    steps = TrainingSteps(make_model(width=64, layers=2, vocab=300, prefix=4, length=8), count=3, frozen=frozen)
    found = []
    for side in (steps.ours, steps.published):
        weight = steps.model.mapper.layers[0].weight
        before = weight.clone()
        zero_grad, steps.model.zero_grad = steps.model.zero_grad, lambda **_: None
        side()
        found.append(weight.grad.clone())
        steps.model.zero_grad = zero_grad
        steps.model.zero_grad(set_to_none=True)
        assert torch.equal(weight, before), "neither side may change what the other computes next"
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-6)
