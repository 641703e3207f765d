"""Yes or no: the parsing rules of POPE and MME, and POPE's figures from their counters."""

from __future__ import annotations

import re
from collections.abc import Callable

import numpy as np

from mmkit.eval.statistics import Floats

# Columns of a split's counters in `pope_figures`.
COUNTERS = ("TP", "FP", "TN", "FN", "n")
FIGURES = ("f1", "accuracy", "precision", "recall", "yes_ratio")


def pope_official(text: str) -> str:
    """POPE's evaluate.py (AoiDragon/POPE, 08d957b): no where "No", "not" or "no" is a word of the first sentence, else yes.

    Args:
        text: The answer, as it is.

    Returns:
        ``yes`` or ``no``. Odd answers are yes: "NO", "Nothing", "There isn't", "No" before a line break, and nothing at all.
    """
    # Split at spaces only, as the original does: a line break sticks to its word.
    words = text.split(".")[0].replace(",", "").split(" ")
    return "no" if {"No", "not", "no"} & set(words) else "yes"


def pope_defaulted(text: str) -> bool:
    """Whether `pope_official` says yes though the answer's first sentence has no "yes" in it."""
    return pope_official(text) == "yes" and "yes" not in re.findall(r"[a-z]+", text.split(".")[0].lower())


def pope_lmms(text: str) -> str | None:
    """lmms-eval's POPE: the whole answer is yes or no, ignoring case and spaces around it; None for anything else."""
    word = text.lower().strip()
    return word if word in {"yes", "no"} else None


def mme_official(text: str) -> str | None:
    """MME's calculation.py: yes or no within the first four characters, yes first; None where it says "other".

    Args:
        text: The answer, as it is. "know" and "none" are no.
    """
    # Not stripped, as in the original: with two spaces in front "yes" is out of sight.
    start = text.lower()[:4]
    return "yes" if "yes" in start else "no" if "no" in start else None


def mme_lmms(text: str) -> str | None:
    """lmms-eval's MME: the official rule without spaces around and periods, and a single y or n."""
    bare = text.lower().strip().replace(".", "")
    return {"y": "yes", "n": "no"}.get(bare) if len(bare) == 1 else mme_official(bare)


# Rules of `mmkit score pope` and `mme`, the first of each is the default.
POPE_RULES: dict[str, Callable[[str], str | None]] = {"official": pope_official, "lmms": pope_lmms}
MME_RULES: dict[str, Callable[[str], str | None]] = {"official": mme_official, "lmms": mme_lmms}


def pope_figures(counters: Floats) -> Floats:
    """F1, accuracy, precision, recall and yes ratio of a split; yes is the positive class.

    Args:
        counters: f64[B, 5], the columns of `COUNTERS`; n counts unparsed answers, too.

    Returns:
        f64[B, 5], the columns of `FIGURES`. Where nobody said yes, precision, recall and F1 are 0 (the official program divides
        by zero); NaN where there is no sample at all.
    """
    # Counters of any number of draws at once: the corpus and its resamples share one formula.
    tp, fp, tn, fn, n = counters.T
    # maximum: 0 / 1 where the true quotient is 0 / 0. Counters are whole numbers, so nothing else changes.
    precision, recall = tp / np.maximum(tp + fp, 1), tp / np.maximum(tp + fn, 1)
    # 2 P R / (P + R) as the official program has it: the same to the last digit.
    total = precision + recall
    f1 = np.divide(2 * precision * recall, total, out=np.zeros_like(total), where=total > 0)
    with np.errstate(invalid="ignore"):
        figures = np.stack([f1, (tp + tn) / n, precision, recall, (tp + fp) / n], axis=1)
    return np.where(n[:, None] > 0, figures, np.nan)
