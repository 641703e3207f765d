"""Every metric of every suite: heading, scale, unit, and which figures a table shows first.

The scales are those of the papers: accuracies and F1 as percentages, caption metrics times 100, MME in points.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from decimal import ROUND_HALF_UP, Decimal


@dataclass(frozen=True)
class Metric:
    """How one metric is printed.

    Attributes:
        heading: Name as papers print it.
        scale: Factor from the stored figure to the printed one.
        unit: Unit of the printed figure; empty where the file's own figure is printed.
        digits: Decimals of the printed figure.
        mean: Whether the figure of a set is the mean over its samples, so that samples can be paired and resampled.
        ranked: Whether more is better; a share of "yes" has no best.
    """

    heading: str
    scale: float = 100.0
    unit: str = "%"
    digits: int = 1
    mean: bool = False
    ranked: bool = True

    def show(self, value: float) -> str:
        """A stored figure as printed, without its unit; halves are rounded away from zero, as people do."""
        # The ninth digit is noise of adding: 91.25 and 91.250000000000014 are one figure, and must not print as two.
        exact = Decimal(repr(round(value * self.scale, 9)))
        return f"{exact.quantize(Decimal(1).scaleb(-self.digits), ROUND_HALF_UP):f}"


METRICS = {
    "accuracy": Metric("Accuracy", mean=True),
    "CIDEr": Metric("CIDEr", unit="×100", mean=True),
    "ROUGE_L": Metric("ROUGE-L", unit="×100", mean=True),
    "SPICE": Metric("SPICE", unit="×100", mean=True),
    # BLEU's counts and METEOR's statistics are pooled over the set before they are divided: no mean of sentences gives them.
    "METEOR": Metric("METEOR", unit="×100"),
    **{f"Bleu_{n}": Metric(f"BLEU-{n}", unit="×100") for n in range(1, 5)},
    # F1, precision and recall are ratios of counts over the set, and MME's points count pairs of questions.
    "f1": Metric("F1"),
    "precision": Metric("Precision"),
    "recall": Metric("Recall"),
    "yes_ratio": Metric("Yes", ranked=False),
    "perception": Metric("Perception", 1.0, "points"),
    "cognition": Metric("Cognition", 1.0, "points"),
    "points": Metric("Points", 1.0, ""),
    "anls": Metric("ANLS", mean=True),
    # A distance between distributions: less is better.
    "distribution": Metric("Distribution", 1.0, "", 2, ranked=False),
    "consistency": Metric("Consistency"),
    "validity": Metric("Validity", mean=True),
    "plausibility": Metric("Plausibility", mean=True),
    "unanswerable_average_precision": Metric("Unanswerable AP"),
    "unanswerable_f1": Metric("Unanswerable F1"),
}
# Suite -> what its main table shows, most important first. BLEU-1 to 3 are left out: papers print BLEU-4 alone.
HEADLINES = {
    "coco-caption": ("CIDEr", "Bleu_4", "METEOR", "ROUGE_L", "SPICE"),
    "pope": ("f1", "f1_pooled", "accuracy"),
    "mme": ("perception", "cognition"),
}
_CAPTIONS, _ANSWERS = HEADLINES["coco-caption"], ("accuracy", "f1")


def describe(name: str) -> Metric:
    """How a metric is printed.

    Args:
        name: As in ``scores.json``; a part of a set has the metric's name and its own (``accuracy_number``, ``f1_random``).

    Returns:
        The metric; one of unknown name is printed as it is stored, with three decimals and without a unit.
    """
    if name in METRICS:
        return METRICS[name]
    base, _, part = name.partition("_")
    if part and base in METRICS:
        whole = METRICS[base]
        # Never tested in pairs: the samples outside of the part would have to be left out first.
        return Metric(f"{whole.heading}, {part.replace('_', ' ')}", whole.scale, whole.unit, whole.digits, False, whole.ranked)
    return Metric(name, 1.0, "", 3)


def headline(suite: str, metrics: Mapping[str, float]) -> list[str]:
    """The metrics of a score that belong in the main table, most important first.

    Args:
        suite: Name of the suite that scored it; of an unknown one the metrics themselves tell.
        metrics: The score's metrics.

    Returns:
        Names, only of metrics that the score has.
    """
    order = HEADLINES.get(suite) or (_CAPTIONS if "CIDEr" in metrics else _ANSWERS)
    # Of an unknown task the first two, so that a long list of figures does not fill a table.
    return [name for name in order if name in metrics] or list(metrics)[:2]
