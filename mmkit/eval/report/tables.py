"""Scores of several runs as tables: one row per system, paired differences, and the conditions behind each number."""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

from mmkit.eval.report.collect import Prediction, Run, Score
from mmkit.eval.statistics import paired_bootstrap

# Metric name in scores.json -> heading, factor, unit. CIDEr and its kin are printed x100, as papers do.
METRICS = {
    "accuracy": ("Accuracy", 100.0, "%"),
    "CIDEr": ("CIDEr", 100.0, "×100"),
    "Bleu_4": ("BLEU-4", 100.0, "×100"),
    "METEOR": ("METEOR", 100.0, "×100"),
    "ROUGE_L": ("ROUGE-L", 100.0, "×100"),
    "SPICE": ("SPICE", 100.0, "×100"),
    "f1": ("F1", 100.0, "%"),
}
# Columns of one table before the next begins: what fits a page of 1280 px and a sheet of paper.
COLUMNS_PER_TABLE = 7
MISSING = "–"


@dataclass(frozen=True)
class Row:
    """A system and the runs that speak for it."""

    label: str
    runs: list[Run]

    @property
    def scores(self) -> dict[str, Score]:
        """Task name -> score over all runs of the row."""
        return {task: score for run in self.runs for task, score in run.scores.items()}

    @property
    def predictions(self) -> list[Prediction]:
        """Predictions of all runs of the row."""
        return [p for run in self.runs for p in run.predictions]

    def run_of(self, task: str) -> Run:
        """The run that scored `task`."""
        return next(run for run in self.runs if task in run.scores)


@dataclass(frozen=True)
class Column:
    """One metric of one task."""

    task: str
    metric: str

    @property
    def heading(self) -> str:
        """Metric name as papers print it."""
        return METRICS.get(self.metric, (self.metric, 1.0, ""))[0]

    @property
    def scale(self) -> float:
        """Factor from the stored fraction to the printed figure."""
        return METRICS.get(self.metric, (self.metric, 1.0, ""))[1]

    @property
    def unit(self) -> str:
        """Unit of the printed figure; empty where the file's own figure is printed."""
        return METRICS.get(self.metric, (self.metric, 1.0, ""))[2]

    def show(self, value: float | None) -> str:
        """A figure as printed: one decimal after scaling, three for metrics without a known scale."""
        if value is None or not math.isfinite(value):
            return MISSING
        # One decimal of a percentage, as papers print; an unknown metric may live between 0 and 1.
        return f"{value * self.scale:.{1 if self.metric in METRICS else 3}f}"


@dataclass(frozen=True)
class Cell:
    """A printed figure, its 95 % interval, and whether it is the best of its column."""

    text: str
    interval: str
    best: bool


@dataclass(frozen=True)
class Table:
    """Some columns (grouped by task) of the score table over all rows."""

    tasks: list[tuple[str, list[Column]]]
    rows: list[tuple[str, list[tuple[Column, Cell]]]]


@dataclass(frozen=True)
class Difference:
    """A system against the first one on the same samples; fractions, `verdict` is higher, lower or unclear."""

    system: str
    baseline: str
    column: Column
    n: int
    value: float
    low: float
    high: float

    @property
    def verdict(self) -> str:
        """Which side of zero the whole interval lies on."""
        # Zero inside the interval is no verdict, however large the difference.
        return "higher" if self.low > 0 else "lower" if self.high < 0 else "unclear"

    def show(self, value: float) -> str:
        """A signed figure with a real minus sign."""
        text = self.column.show(abs(value))
        # A figure that prints as 0.0 gets no sign: which side it is on cannot be seen.
        return text if float(text) == 0 else ("+" if value > 0 else "−") + text


@dataclass(frozen=True)
class Condition:
    """One setting of one task, and the systems it holds for (all of the task's when `systems` is empty)."""

    name: str
    value: str
    systems: list[str]


def system_rows(runs: Sequence[Run]) -> list[Row]:
    """One row per system in the order of first mention.

    Runs of one system merge (a captioner and an MLLM) unless two of them score the same task: then each keeps its own row,
    with the run's name behind the system's.

    Args:
        runs: Eval runs, or probe runs.

    Returns:
        The rows.
    """
    groups: dict[str, list[Run]] = {}
    for run in runs:
        # A run without a label speaks for itself alone.
        groups.setdefault(run.system or run.name, []).append(run)
    rows = []
    for label, members in groups.items():
        tasks = [task for run in members for task in run.scores]
        # Two scores of one task in one row would hide one of them.
        if len(tasks) == len(set(tasks)):
            rows.append(Row(label, members))
        else:
            rows.extend(Row(f"{label} ({run.name})", [run]) for run in members)
    return rows


def headline_metrics(score: Score) -> list[str]:
    """The metrics of a task that belong in the main table, most important first."""
    # BLEU-1 to 3 stay in the JSON: papers print BLEU-4 alone.
    if "CIDEr" in score.metrics:
        return [m for m in ("CIDEr", "Bleu_4", "METEOR", "ROUGE_L", "SPICE") if m in score.metrics]
    if "accuracy" in score.metrics:
        return [m for m in ("accuracy", "f1") if m in score.metrics]
    # Of an unknown task the first two, so that a long list of figures does not fill a table.
    return list(score.metrics)[:2]


def task_columns(rows: Sequence[Row]) -> list[tuple[str, list[Column]]]:
    """Tasks in order of first mention, each with the headline metrics that any row has."""
    tasks: dict[str, dict[str, Column]] = {}
    for row in rows:
        for task, score in row.scores.items():
            for metric in headline_metrics(score):
                # A metric that only a later system has still gets its column, behind the first one's.
                tasks.setdefault(task, {}).setdefault(metric, Column(task, metric))
    return [(task, list(columns.values())) for task, columns in tasks.items()]


def score_tables(rows: Sequence[Row]) -> list[Table]:
    """The table of scores, cut between tasks into as many tables as keep it narrow."""
    parts: list[list[tuple[str, list[Column]]]] = [[]]
    for task, columns in task_columns(rows):
        # Never inside a task: its metrics are read side by side.
        if parts[-1] and sum(len(c) for _, c in parts[-1]) + len(columns) > COLUMNS_PER_TABLE:
            parts.append([])
        parts[-1].append((task, columns))
    return [_table(part, rows) for part in parts if part]


def differences(rows: Sequence[Row], *, seed: int) -> tuple[list[Difference], list[str]]:
    """Every other system against the first, per task, on the samples both have (paired bootstrap over pictures).

    Args:
        rows: The score table's rows; the first is the baseline.
        seed: Seed of the resampling.

    Returns:
        The differences, and a line for each pair that cannot be compared.
    """
    found: list[Difference] = []
    without: list[str] = []
    # Tasks of the first system only: what it was not scored on cannot be compared with it.
    for task, columns in task_columns(rows[:1]):
        # The headline metric alone. Its corpus score is the mean over samples, which BLEU's is not, so the paired
        # bootstrap of means is right for it.
        column = columns[0]
        first = per_sample(rows[0], column)
        for row in rows[1:]:
            if task not in row.scores:
                continue
            other = per_sample(row, column)
            # Paired on what both have; a smaller set than either's is told below instead of passed over.
            shared = [key for key in first if key in other]
            # One sample has no spread, so its interval would be a point.
            if len(shared) < 2:
                without.append(f"{row.label}, {task}: fewer than two samples in common with {rows[0].label}")
                continue
            mine: dict[Hashable, float] = {k: other[k] for k in shared}
            base: dict[Hashable, float] = {k: first[k] for k in shared}
            # By the picture asked about: a blind system was shown another one.
            pictures = {p.id: p.image for p in row.run_of(task).predictions if p.task == task}
            # Questions on one picture are not independent: they are drawn together.
            clusters: dict[Hashable, Hashable] = {k: pictures.get(k, k) for k in shared}
            found.append(_difference(row.label, rows[0].label, column, mine, base, clusters, seed=seed))
            if len(shared) < max(len(first), len(other)):
                total = f"{len(shared)} of {max(len(first), len(other))}"
                without.append(f"{row.label}, {task}: only {total} samples are shared with {rows[0].label}")
    return found, without


def _difference(
    system: str,
    baseline: str,
    column: Column,
    mine: dict[Hashable, float],
    base: dict[Hashable, float],
    clusters: dict[Hashable, Hashable],
    *,
    seed: int,
) -> Difference:
    """Bootstrap one pair of systems; all three mappings have the same sample ids."""
    value, low, high, n = paired_bootstrap(mine, base, clusters=clusters, seed=seed)
    return Difference(system, baseline, column, n, value, low, high)


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


def _table(tasks: list[tuple[str, list[Column]]], rows: Sequence[Row]) -> Table:
    """Fill the cells and mark the best of each column (only where there is something to compare)."""
    columns = [column for _, group in tasks for column in group]
    best: dict[Column, str] = {}
    for column in columns:
        values = [v for row in rows if (v := _value(row, column)) is not None and math.isfinite(v)]
        # The best of one is no distinction.
        if len(values) > 1:
            best[column] = column.show(max(values))
    lines = []
    for row in rows:
        cells = [(column, _cell(row, column, best.get(column))) for column in columns]
        # A system that was not scored on any of these tasks would be a row of dashes.
        if any(cell.text != MISSING for _, cell in cells):
            lines.append((row.label, cells))
    return Table(tasks, lines)


def _value(row: Row, column: Column) -> float | None:
    score = row.scores.get(column.task)
    return None if score is None else score.metrics.get(column.metric)


def _cell(row: Row, column: Column, best: str | None) -> Cell:
    """Ties at the printed precision are all best: the digits that are not shown decide nothing."""
    text = column.show(_value(row, column))
    ci = row.scores[column.task].ci95.get(column.metric) if text != MISSING else None
    interval = f"{column.show(ci[0])} to {column.show(ci[1])}" if ci else ""
    return Cell(text, interval, best is not None and text == best)
