"""Families of caption metrics as additive columns: one formula then serves images, the corpus and bootstrap resamples."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from mmkit.errors import InputError
from mmkit.eval.scorers.bleu import COLUMNS, MAX_N, bleu_from_statistics, bleu_table
from mmkit.eval.scorers.cider import cider_table
from mmkit.eval.scorers.meteor import check_meteor, meteor_from_statistics, meteor_statistics
from mmkit.eval.scorers.ngrams import NgramTable, ngram_table
from mmkit.eval.scorers.rouge import rouge_l
from mmkit.eval.scorers.spice import check_spice, spice_scores
from mmkit.eval.statistics import Floats, ratio_of_sums

BLEU_NAMES = tuple(f"Bleu_{n}" for n in range(1, MAX_N + 1))
# In the order of coco-caption's own table; the value says whether Java is needed.
FAMILIES = {"bleu": False, "meteor": True, "rouge": False, "cider": False, "spice": True}
DEFAULT = ",".join(name for name, java in FAMILIES.items() if not java)


@dataclass(frozen=True)
class Family:
    """A family's share of the statistics.

    Attributes:
        names: Its metrics.
        columns: f64[N, K], a row for each image.
        formula: f64[B, K] sums of rows -> f64[B, len(names)].
    """

    names: tuple[str, ...]
    columns: Floats
    formula: Callable[[Floats], Floats]


def chosen_families(text: str) -> list[str]:
    """Read ``metrics=``.

    Args:
        text: Names of `FAMILIES`, with commas.

    Returns:
        The names without repeats, in the order of the table.

    Raises:
        InputError: An unknown name (with the nearest one), or none at all.
    """
    names = [name for part in text.split(",") if (name := part.strip().lower())]
    for name in names:
        if name not in FAMILIES:
            near = difflib.get_close_matches(name, FAMILIES, n=1)
            hint = f"did you mean {near[0]}? " if near else ""
            raise InputError(f"unknown metric {name!r}", where="metrics", mend=f"{hint}known: {', '.join(FAMILIES)}")
    if not names:
        raise InputError("no metric named", where="metrics", mend=f"metrics={DEFAULT}")
    return [name for name in FAMILIES if name in names]


def check_java(names: Sequence[str]) -> None:
    """Refuse metrics whose Java programs are not here, without starting one.

    Args:
        names: As from `chosen_families`.

    Raises:
        InputError: Java or a part of it is missing.
    """
    for name in names:
        if FAMILIES[name]:
            _CHECKS[name]()


def compute_families(
    names: Sequence[str], ids: Sequence[int], hypotheses: Sequence[str], references: Sequence[Sequence[str]]
) -> dict[str, Family]:
    """Compute the statistics of each family that was asked for, and of no other: Java starts only where it is needed.

    Args:
        names: As from `chosen_families`.
        ids: N image ids.
        hypotheses: One tokenised caption for each.
        references: For each image at least one tokenised reference.

    Returns:
        Families by name, in the order of ``names``.

    Raises:
        InputError: From the Java programs.
    """
    # Java first: where it is missing, or fails, nothing else is computed in vain.
    found = {name: _JAVA[name](ids, hypotheses, references) for name in names if FAMILIES[name]}
    table = ngram_table(hypotheses, references) if {"bleu", "cider"} & set(names) else None
    for name in names:
        if name == "rouge":
            found[name] = _mean("ROUGE_L", [rouge_l(h, r) for h, r in zip(hypotheses, references, strict=True)])
        elif table is not None and not FAMILIES[name]:
            found[name] = _TABLE[name](table)
    return {name: found[name] for name in names}


def combined(families: Sequence[Family]) -> tuple[Floats, Callable[[Floats], Floats]]:
    """All columns side by side, f64[N, K], and the formula f64[B, K] -> f64[B, M] of all metrics."""
    cuts = np.cumsum([family.columns.shape[1] for family in families])[:-1]

    def formula(sums: Floats) -> Floats:
        """Each family's formula on its columns."""
        parts = np.split(sums, cuts, axis=1)
        return np.concatenate([family.formula(part) for family, part in zip(families, parts, strict=True)], axis=1)

    return np.concatenate([family.columns for family in families], axis=1), formula


def _mean(name: str, values: Sequence[float] | Floats) -> Family:
    """A metric that is a mean over the images that have a value."""
    column = np.asarray(values, dtype=np.float64)
    known = ~np.isnan(column)
    return Family((name,), np.column_stack([np.where(known, column, 0.0), known]).astype(np.float64), ratio_of_sums)


def _bleu(table: NgramTable) -> Family:
    """BLEU, whose corpus value is a formula of summed counters."""
    columns = bleu_table(table).astype(np.float64)
    assert columns.shape[1] == COLUMNS
    return Family(BLEU_NAMES, columns, bleu_from_statistics)


def _cider(table: NgramTable) -> Family:
    """CIDEr-D as finished scores: new document frequencies for every resample would be a whole evaluation each."""
    return _mean("CIDEr", cider_table(table))


def _meteor(ids: Sequence[int], hypotheses: Sequence[str], references: Sequence[Sequence[str]]) -> Family:
    """METEOR, whose corpus value is a formula of summed statistics."""
    rows = meteor_statistics(hypotheses, references)
    return Family(("METEOR",), rows, lambda sums: meteor_from_statistics(sums)[:, None])


def _spice(ids: Sequence[int], hypotheses: Sequence[str], references: Sequence[Sequence[str]]) -> Family:
    """SPICE; images without a number are left out of the mean, and the score says how many."""
    scores = spice_scores(ids, hypotheses, references)
    if np.isnan(scores).all():
        raise InputError("SPICE has no value for any image", where="metrics=spice", mend="leave spice out of metrics=")
    return _mean("SPICE", scores)


_JAVA = {"meteor": _meteor, "spice": _spice}
_CHECKS = {"meteor": check_meteor, "spice": check_spice}
_TABLE = {"bleu": _bleu, "cider": _cider}
