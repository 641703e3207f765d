from __future__ import annotations

import pytest

from mmkit.eval.metrics import METRICS, describe, headline


@pytest.mark.parametrize(
    ("name", "value", "printed"),
    [
        ("accuracy", 0.7528, "Accuracy 75.3 %"),
        ("CIDEr", 1.1331, "CIDEr 113.3 ×100"),
        ("Bleu_4", 0.2455, "BLEU-4 24.6 ×100"),
        ("perception", 1510.72, "Perception 1510.7 points"),
        ("accuracy_yes/no", 0.5, "Accuracy, yes/no 50.0 %"),
        ("f1_adversarial", 0.845, "F1, adversarial 84.5 %"),
        ("anls", 0.12345, "ANLS 12.3 %"),
        ("distribution", 1.8123, "Distribution 1.81 "),
        ("my_own", 3.0, "my_own 3.000 "),
    ],
)
def test_figures_are_printed_as_papers_do(name: str, value: float, printed: str) -> None:
    metric = describe(name)
    assert f"{metric.heading} {metric.show(value)} {metric.unit}" == printed


def test_only_means_over_samples_can_be_paired() -> None:
    assert {name for name, metric in METRICS.items() if metric.mean} == {
        *("accuracy", "CIDEr", "ROUGE_L", "SPICE", "anls", "validity", "plausibility")
    }
    assert not describe("accuracy_number").mean
    assert not describe("yes_ratio").ranked and describe("f1").ranked


@pytest.mark.parametrize(
    ("suite", "metrics", "expected"),
    [
        ("coco-caption", "Bleu_1 Bleu_4 ROUGE_L CIDEr", "CIDEr Bleu_4 ROUGE_L"),
        ("vqav2", "accuracy accuracy_number", "accuracy"),
        ("pope", "accuracy f1 f1_random precision yes_ratio", "f1 accuracy"),
        ("mme", "existence perception cognition", "perception cognition"),
        # Of a suite from elsewhere the metrics themselves tell.
        ("mine", "x CIDEr", "CIDEr"),
        ("mine", "x accuracy", "accuracy"),
        ("mine", "x y z", "x y"),
    ],
)
def test_headlines(suite: str, metrics: str, expected: str) -> None:
    assert headline(suite, dict.fromkeys(metrics.split(), 0.5)) == expected.split()
