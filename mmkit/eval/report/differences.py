"""Every other system against the first, task by task, on the samples both have.

The interval is the paired bootstrap over pictures, the p-value that of a paired permutation test over pictures, corrected by
Holm's method for all tests of a report (`mmkit.eval.statistics`).
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field, replace

from mmkit.eval.report.conditions import other_data, unlike, variant_of
from mmkit.eval.report.runs import Score
from mmkit.eval.report.systems import Row
from mmkit.eval.report.tables import Column, task_columns
from mmkit.eval.statistics import holm, paired_bootstrap, paired_permutation, smallest_p

PERMUTATIONS = 5000  # sign patterns of a test, where a report has no more than a hundred
LEVEL = 0.05  # of the family of all tests in a report
WORDS = {"unclear": "no clear difference", "few": "too few pictures to decide"}


@dataclass(frozen=True)
class Difference:
    """A system against the first one on the same samples; figures as stored.

    `p` is of the permutation test, `p_holm` corrected for all tests of the report, and `least` the smallest `p_holm` that any
    answers on this many pictures could have given. `unlike` says in what the two were asked otherwise, so that the difference
    may be that of the conditions.
    """

    system: str
    baseline: str
    column: Column
    n: int
    value: float
    low: float
    high: float
    p: float
    p_holm: float
    pictures: int
    least: float = 0.0
    unlike: list[str] = field(default_factory=list)

    @property
    def significant(self) -> bool:
        """Whether the corrected p-value is below `LEVEL`."""
        return self.p_holm < LEVEL

    @property
    def verdict(self) -> str:
        """higher, lower, unclear where the corrected test does not tell, few where no data could have made it tell."""
        if self.least >= LEVEL:
            return "few"
        # Not told by the interval: of twenty of them one misses zero by chance alone.
        return "unclear" if not self.significant else "higher" if self.value > 0 else "lower"

    @property
    def words(self) -> str:
        """The verdict as it is printed."""
        return WORDS.get(self.verdict, self.verdict)

    def show(self, value: float) -> str:
        """A signed figure with a real minus sign."""
        return self.column.signed(value)


def differences(rows: Sequence[Row], *, seed: int) -> tuple[list[Difference], list[str]]:
    """Every other system against the first, per task, on the samples both have.

    One metric of a task is tested, the first whose figure is a mean over samples: each further test would cost all others
    some of their power.

    Args:
        rows: The score table's rows; the first is the baseline.
        seed: Seed of the resampling.

    Returns:
        The differences, and a line for each pair that cannot be compared.
    """
    found: list[Difference] = []
    without: list[str] = []
    patterns = sign_patterns(rows)
    # Tasks of the first system only: what it was not scored on cannot be compared with it.
    for task, columns in task_columns(rows[:1]):
        base = rows[0].scores[task]
        # A suite whose figures are no means (MME's points) still says which answers are right.
        column = next((c for c in columns if c.known.mean), Column(task, "accuracy", columns[0].variant))
        for row in rows[1:]:
            if task not in row.scores:
                continue
            # A difference between two rules, or with and without OCR, is none between two systems.
            if (why := _conditions_differ(row.scores[task], base)) is not None:
                without.append(f"{row.label}, {task}: not compared with {rows[0].label}, {why}")
            # The same ids may name other questions there.
            elif (marks := other_data(row.scores[task], base)) is not None:
                without.append(f"{row.label}, {task}: no paired test, its data {marks[0]} are not {rows[0].label}'s {marks[1]}")
            elif not per_sample(rows[0], column) or not per_sample(row, column):
                without.append(f"{row.label}, {task}: no paired test, single samples are not in the scores")
            else:
                _compare(row, rows[0], column, found, without, seed=seed, patterns=patterns)
    alone = [task for task in dict.fromkeys(t for row in rows[1:] for t in row.scores) if task not in rows[0].scores]
    if alone:
        without.append(
            f"{', '.join(alone)}: no differences, for {rows[0].label} was not scored on {'them' if alone[1:] else 'it'}"
        )
    adjusted = holm([d.p for d in found])
    # Holm's method is monotone: where even the smallest p-values of all tests do not pass, no data could have passed.
    least = holm([smallest_p(d.pictures) for d in found])
    return [replace(d, p_holm=p, least=q) for d, p, q in zip(found, adjusted, least, strict=True)], without


def sign_patterns(rows: Sequence[Row]) -> int:
    """How many sign patterns each test draws: so many that Holm's correction leaves the smallest p-value well below `LEVEL`."""
    most = sum(task in row.scores for row in rows[1:] for task in rows[0].scores)
    # p is at least one over the patterns, and with 250 tests of 5,000 patterns nothing could ever be called different.
    return max(PERMUTATIONS, math.ceil(2.5 / LEVEL) * most)


def per_sample(row: Row, column: Column) -> dict[str, float]:
    """Sample id -> score on one metric; from ``scores.json``, else from the predictions."""
    score = row.scores[column.task]
    metric = column.metric
    values = {str(s["id"]): float(s[metric]) for s in score.per_sample if "id" in s and s.get(metric) is not None}
    # Another program's scores may lack single samples; the predictions beside them need not.
    if not values:
        run = row.run_of(column.task)
        values = {p.id: p.score[metric] for p in run.predictions if p.task == column.task and metric in p.score}
    return values


def _conditions_differ(score: Score, base: Score) -> str | None:
    """Why two scores of a task stand in two columns, None where they share one."""
    own, other = dict(variant_of(score)), dict(variant_of(base))
    names = [name for name in dict.fromkeys([*own, *other]) if own.get(name) != other.get(name)]
    words = [f"{name} is {own.get(name, 'not recorded')}, there {other.get(name, 'not recorded')}" for name in names]
    return "; ".join(words) or None


def _compare(
    row: Row, first: Row, column: Column, found: list[Difference], without: list[str], *, seed: int, patterns: int
) -> None:
    """Test one pair of systems; adds the difference to `found`, or to `without` what stood against it."""
    task = column.task
    base, mine = per_sample(first, column), per_sample(row, column)
    # Paired on what both have; a smaller set than either's is told below instead of passed over.
    shared = [key for key in base if key in mine]
    # One sample has no spread, so its interval would be a point.
    if len(shared) < 2:
        without.append(f"{row.label}, {task}: fewer than two samples in common with {first.label}")
        return
    # By the picture asked about: a blind system was shown another one.
    pictures = {p.id: p.image for p in row.run_of(task).predictions if p.task == task}
    # Questions on one picture are not independent: they are drawn together.
    clusters: dict[Hashable, Hashable] = {key: pictures.get(key, key) for key in shared}
    own: dict[Hashable, float] = {key: mine[key] for key in shared}
    theirs: dict[Hashable, float] = {key: base[key] for key in shared}
    asked = [f"{here}, {first.label} has {there}" for here, there in unlike(row.scores[task], first.scores[task])]
    tested = _difference(row.label, first.label, column, own, theirs, clusters, seed=seed, patterns=patterns)
    found.append(replace(tested, unlike=asked))
    if len(shared) < max(len(base), len(mine)):
        total = f"{len(shared)} of {max(len(base), len(mine))}"
        without.append(f"{row.label}, {task}: only {total} samples are shared with {first.label}")


def _difference(
    system: str,
    baseline: str,
    column: Column,
    mine: dict[Hashable, float],
    base: dict[Hashable, float],
    clusters: dict[Hashable, Hashable],
    *,
    seed: int,
    patterns: int,
) -> Difference:
    """Interval and p-value of one pair; all three mappings have the same sample ids in the same order."""
    value, low, high, n = paired_bootstrap(mine, base, clusters=clusters, seed=seed)
    p = paired_permutation(mine, base, clusters=clusters, resamples=patterns, seed=seed)
    # Corrected when all tests of the report are known.
    return Difference(system, baseline, column, n, value, low, high, p, p, len(set(clusters.values())))
