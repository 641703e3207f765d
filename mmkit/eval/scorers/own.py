"""Metrics for users' own questions: a few exact definitions, and functions of other packages by entry point.

Other packages add theirs by an entry point of the group ``mmkit.scorers`` that names a function
``(prediction: str, answers: list[str]) -> float``, which gives a score from 0 to 1 (in ``pyproject.toml``:
``[project.entry-points."mmkit.scorers"]``, ``my-metric = "my_package.metrics:my_metric"``).
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from importlib.metadata import entry_points

from mmkit.errors import InputError
from mmkit.eval.result import nearest
from mmkit.eval.scorers.anls import anls
from mmkit.eval.scorers.normalise import NUMBERS, normalise_vqa
from mmkit.eval.scorers.textvqa import textvqa_accuracy
from mmkit.eval.scorers.vqa import leave_one_out, rule_always

GROUP = "mmkit.scorers"
Metric = Callable[[str, list[str]], float]
# Sign, digits in threes by commas or plain, decimals, exponent: "-1,250.5", ".5", "3e8". A comma elsewhere ends a number.
_NUMBER = re.compile(
    r"(?<![\w.])[-+]?(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)?(?:(?<=\d)\.\d*|\.\d+)?(?:(?<=[\d.])[eE][-+]?\d+)?", re.ASCII
)


def exact(prediction: str, answers: list[str]) -> float:
    """1 where an answer is the same text, apart from letter case, runs of white space and one final period."""
    return float(_plain(prediction) in {_plain(answer) for answer in answers})


def _plain(text: str) -> str:
    """What `exact` compares."""
    return " ".join(text.lower().split()).removesuffix(".").rstrip()


def normalised(prediction: str, answers: list[str]) -> float:
    """1 where an answer is the same after VQA's processing: no punctuation and articles, number words as digits."""
    return float(normalise_vqa(prediction) in {normalise_vqa(answer) for answer in answers})


def contains(prediction: str, answers: list[str]) -> float:
    """1 where the words of an answer stand in the prediction, in order and together, after VQA's processing of both."""
    # With spaces around both, so that "art" is not found in "party".
    text = f" {normalise_vqa(prediction)} "
    return float(any(f" {words} " in text for answer in answers if (words := normalise_vqa(answer))))


def numeric(prediction: str, answers: list[str], tolerance: float = 0.0) -> float:
    """1 where the last number of the prediction is that of an answer.

    Args:
        prediction: The model's answer; without digits, a number word up to ten counts.
        answers: True answers, with a number each.
        tolerance: Share of the true number that it may be off (0.05 is ChartQA's relaxed rule for numbers).
    """
    said = last_number(prediction)
    truths = [number for answer in answers if (number := last_number(answer)) is not None]
    # Beyond the tolerance, what a decimal loses as a float.
    return float(said is not None and any(abs(said - t) <= (tolerance + 1e-9) * abs(t) for t in truths))


def last_number(text: str) -> float | None:
    """The last number of a text: models say their answer at the end. A percent sign does not change it; None without any."""
    found = [number for number in _NUMBER.findall(text) if any(c.isdigit() for c in number)]
    if not found:
        words = [NUMBERS[word] for word in re.findall(r"[a-z]+", text.lower()) if word in NUMBERS]
        return float(words[-1]) if words else None
    value = float(found[-1].replace(",", ""))
    # "1e999" is infinite to Python, and would equal every other such number.
    return value if math.isfinite(value) else None


def vqa(prediction: str, answers: list[str]) -> float:
    """VQA accuracy, each of the ten answers left out once, with VQA's processing on both sides always (rule=always of vqav2)."""
    return leave_one_out(*rule_always(prediction, answers))


METRICS: dict[str, Metric] = {
    "exact": exact,
    "normalised": normalised,
    "contains": contains,
    "numeric": numeric,
    "anls": anls,
    "vqa": vqa,
    "m4c": textvqa_accuracy,
}
# Leave-one-out over fewer answers would give scores that nobody else's VQA accuracy means.
TEN_ANSWERS = ("vqa", "m4c")
# Scores of whole short answers; an entry point's rule is not known.
SHORT = ("exact", "normalised", "anls", "vqa", "m4c")


def metric_names() -> list[str]:
    """All known metrics: those of mmkit first, then those of other packages."""
    return [*METRICS, *sorted({point.name for point in entry_points(group=GROUP)} - set(METRICS))]


def find_metric(name: str) -> tuple[Metric, str]:
    """The metric of this name, and where it is from.

    Raises:
        InputError: No such metric (with the nearest one), or an entry point that gives no function.
    """
    if name in METRICS:
        return METRICS[name], f"mmkit {name}"
    points = {point.name: point for point in entry_points(group=GROUP)}
    if name not in points:
        raise InputError(f"unknown metric {name!r}", where="metric", mend=nearest(name, metric_names()))
    point = points[name]
    try:
        found = point.load()
    except (ImportError, AttributeError) as error:
        what = f"entry point {point.value} of metric {name} cannot be loaded ({error})"
        raise InputError(what, where=GROUP, mend="install the package anew, or mend its entry point") from None
    if not callable(found):
        what = f"entry point {point.value} of metric {name} is {type(found).__name__}, not a function"
        raise InputError(what, where=GROUP, mend="let it name a function (prediction, answers) -> score")
    # The version belongs to the conditions: another one may score otherwise.
    package = f" ({point.dist.name} {point.dist.version})" if point.dist is not None else ""
    return _checked(found, name), f"{point.value}{package}"


def _checked(function: Metric, name: str) -> Metric:
    """The function of another package, whose scores are looked at."""

    def scored(prediction: str, answers: list[str]) -> float:
        # A copy: a scorer that sorts its answers must not change what the next one sees.
        value = function(prediction, list(answers))
        # NaN fails the comparison, too; a score beyond 1 would be a percentage among fractions. numpy's floats are floats.
        if not isinstance(value, (int, float)) or not 0 <= value <= 1:
            what = f"metric {name} gave {value!r:.40} for {prediction!r:.40}, not a number from 0 to 1"
            raise InputError(what, where=GROUP, mend="let the scorer return a fraction")
        return float(value)

    return scored
