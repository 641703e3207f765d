"""METEOR 1.5 (Denkowski and Lavie 2014) as coco-caption has it: its jar matches words, the formula is here.

The jar gives 23 sums for each image. The official corpus score is the formula on their totals, not the mean over images,
so totals of a bootstrap's resamples have a METEOR, too. (NLTK's and Hugging Face's METEOR is another metric.)
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from mmkit.errors import InputError
from mmkit.eval.scorers.java import java_program, package_file, run_java

# Of an image: words and function words of hypothesis and reference; matched content and function words of both for each of
# four matchers; chunks; all matched words of both.
COLUMNS = 23
# English parameters of METEOR 1.5 ("rank" task): alpha, beta, gamma, delta, and weights of exact, stem, synonym, paraphrase.
ALPHA, BETA, GAMMA, DELTA = 0.85, 0.2, 0.6, 0.75
WEIGHTS = np.array([1.0, 0.6, 0.8, 0.6])
_WHERE = "metrics=meteor"
_JAR = "meteor/meteor-1.5.jar"
# Start with its 62 MB of paraphrases takes 6 s on an idle machine, and 5,000 images 2 s after that.
_START_SECONDS, _IMAGE_SECONDS = 300.0, 0.1


def check_meteor() -> None:
    """Refuse METEOR where it cannot run.

    Raises:
        InputError: Java or the jar is missing.
    """
    java_program(_WHERE)
    package_file(_JAR, _WHERE)


def meteor_statistics(hypotheses: Sequence[str], references: Sequence[Sequence[str]]) -> NDArray[np.float64]:
    """Have the jar match each hypothesis with its references.

    Args:
        hypotheses: N tokenised captions.
        references: For each image at least one tokenised reference.

    Returns:
        f64[N, 23], of each image's best reference; chunks are 0 where both sides match whole, in one.

    Raises:
        InputError: Java or the jar is missing, fails, hangs, or answers in another form.
    """
    jar = package_file(_JAR, _WHERE)
    lines = [_request(hypothesis, captions) for hypothesis, captions in zip(hypotheses, references, strict=True)]
    arguments = ["-Xmx2G", "-jar", str(jar), "-", "-", "-stdio", "-l", "en", "-norm"]
    seconds = _START_SECONDS + _IMAGE_SECONDS * len(lines)
    # All requests at once: the jar answers a line each and ends with its input.
    out = run_java(arguments, where=_WHERE, seconds=seconds, text="".join(lines), folder=jar.parent).splitlines()
    if len(out) != len(lines):
        what = f"METEOR gave {len(out)} lines for {len(lines)} images"
        raise InputError(what, where=_WHERE, mend="leave meteor out of metrics=")
    rows = np.array([_row(line) for line in out]).reshape(-1, COLUMNS)
    # A hypothesis that is its reference word for word has no chunk too many; the official totals leave its one out.
    whole = (rows[:, 20] == 1) & (rows[:, 21:23] == rows[:, 0:2]).all(axis=1)
    rows[whole, 20] = 0
    return rows


def _request(hypothesis: str, references: Sequence[str]) -> str:
    """A line of the jar's protocol; what would end the line or a field early is taken out of all texts.

    Upstream takes ``|||`` and double spaces out of the hypothesis alone, and a line end there stops it for good.
    """
    fields = [" ".join(text.replace("|||", "").split()) for text in (*references, hypothesis)]
    return " ||| ".join(("SCORE", *fields)) + "\n"


def _row(line: str) -> list[float]:
    """The numbers of an answer."""
    try:
        numbers = [float(word) for word in line.split()]
    except ValueError:
        numbers = []
    if len(numbers) != COLUMNS:
        raise InputError(
            f"METEOR answered {line[:80]!r}, not {COLUMNS} numbers", where=_WHERE, mend="leave meteor out of metrics="
        )
    return numbers


def meteor_from_statistics(statistics: NDArray[np.floating]) -> NDArray[np.float64]:
    """METEOR of statistics summed over any set of images.

    ``P = sum_m w_m (d c_m + (1 - d) f_m) / (d C + (1 - d) F)`` with content and function words matched (c, f) and in all
    (C, F), R alike over the reference; ``F_mean = P R / (a P + (1 - a) R)``; the score is
    ``(1 - g (chunks / matched)^b) F_mean``, matched being the mean of both sides.

    Args:
        statistics: [..., 23], one image or sums.

    Returns:
        f64[...], fractions.
    """
    values = np.asarray(statistics, dtype=np.float64)
    matches = values[..., 4:20].reshape(*values.shape[:-1], 4, 4)
    words, function = values[..., 0:2], values[..., 2:4]
    # Columns of `matches`: content of hypothesis and reference, then function words of both.
    weighted = DELTA * matches[..., 0:2] + (1 - DELTA) * matches[..., 2:4]
    matched = np.einsum("...ms,m->...s", weighted, WEIGHTS)
    length = DELTA * (words - function) + (1 - DELTA) * function
    precision, recall = np.moveaxis(_ratio(matched, length), -1, 0)
    mean = _ratio(precision * recall, ALPHA * precision + (1 - ALPHA) * recall)
    chunks, both = values[..., 20], values[..., 21:23]
    penalty = GAMMA * _ratio(chunks, both.mean(axis=-1)) ** BETA
    return (1 - penalty) * mean


def _ratio(top: NDArray[np.float64], bottom: NDArray[np.float64]) -> NDArray[np.float64]:
    """Divide; 0 where nothing matched or a side is empty."""
    return np.divide(top, bottom, out=np.zeros_like(np.asarray(top)), where=np.asarray(bottom) > 0)
