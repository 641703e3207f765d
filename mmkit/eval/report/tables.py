"""Scores of several systems as tables: a row per system, a column per metric, references of papers below."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from mmkit.eval.metrics import Metric, describe, headline
from mmkit.eval.report.conditions import departures, settings_of, variant_of
from mmkit.eval.report.runs import Score
from mmkit.eval.report.systems import Row

# Columns of one table before the next begins: what fits a page of 1280 px and a sheet of paper.
COLUMNS_PER_TABLE = 7
MISSING = "–"
# Stands for an interval from samples that all have one figure: resampling them gives a point, which is no measure of doubt.
NO_SPREAD = "no spread"


@dataclass(frozen=True)
class Column:
    """One metric of one task, under one rule and OCR mode; `variant` names the two where the task has several."""

    task: str
    metric: str
    variant: tuple[tuple[str, str], ...] = ()

    @property
    def known(self) -> Metric:
        """How the metric is printed."""
        return describe(self.metric)

    @property
    def heading(self) -> str:
        """Metric name as papers print it."""
        return self.known.heading

    @property
    def unit(self) -> str:
        """Unit of the printed figure."""
        return self.known.unit

    def show(self, value: float | None) -> str:
        """A figure as printed."""
        return MISSING if value is None or not math.isfinite(value) else self.known.show(value)

    def signed(self, value: float) -> str:
        """A difference with its sign, a real minus; none where it prints as zero, since its side cannot be seen."""
        text = self.show(abs(value))
        return text if text == MISSING or float(text) == 0 else ("+" if value > 0 else "−") + text


@dataclass(frozen=True)
class Cell:
    """A printed figure and what is to know of it.

    Attributes:
        text: The figure.
        interval: Its 95 % interval.
        best: Whether it is the best of those that compare.
        delta: The difference to the first row, where that compares.
        mark: ``*`` where the paired test, corrected for all of the report, finds the difference to be real.
        warnings: What makes the figure doubtful.
        apart: Why it does not compare with the column's first figure.
        conditions: Printed settings, in the order of the page.
        key: The cell's name on the page.
        value: The figure as it is stored.
    """

    text: str
    interval: str = ""
    best: bool = False
    delta: str = ""
    mark: str = ""
    warnings: list[str] = field(default_factory=list)
    apart: list[str] = field(default_factory=list)
    conditions: list[tuple[str, str]] = field(default_factory=list)
    key: str = ""
    value: float | None = None


@dataclass(frozen=True)
class Group:
    """The columns of one task (in one variant) in a table."""

    task: str
    variant: str
    columns: list[Column]


@dataclass(frozen=True)
class Table:
    """Some columns (grouped by task) of the score table over all rows; `references` are published figures."""

    groups: list[Group]
    rows: list[tuple[str, list[tuple[Column, Cell]]]]
    references: list[tuple[str, list[tuple[Column, Cell]]]]

    @property
    def variants(self) -> list[str]:
        """What is to be known of each column's task."""
        return [group.variant for group in self.groups for _ in group.columns]

    @property
    def even(self) -> bool:
        """Whether some figure has no interval because all its samples are alike."""
        return any(cell.interval == NO_SPREAD for _, cells in self.rows for _, cell in cells)


def apart_lines(tables: Sequence[Table]) -> list[str]:
    """Figures that do not compare with the first of their column, and why; a line for each system and reason."""
    tasks: dict[tuple[str, str], dict[str, None]] = {}
    for table in tables:
        for label, cells in table.rows:
            for column, cell in cells:
                if cell.apart:
                    tasks.setdefault((label, "; ".join(cell.apart)), {})[column.task] = None
    return [f"{label}, {', '.join(names)}: {why}" for (label, why), names in tasks.items()]


def task_columns(rows: Sequence[Row]) -> list[tuple[str, list[Column]]]:
    """Tasks in order of first mention, each with the headline metrics that any row has, variants apart."""
    tasks: dict[str, dict[tuple[tuple[str, str], ...], dict[str, Column]]] = {}
    for row in rows:
        for task, score in row.scores.items():
            variant = variant_of(score)
            for metric in headline(score.task, score.metrics):
                # A metric that only a later system has still gets its column, behind the first one's.
                tasks.setdefault(task, {}).setdefault(variant, {}).setdefault(metric, Column(task, metric, variant))
    return [(task, [c for columns in variants.values() for c in columns.values()]) for task, variants in tasks.items()]


def groups_of(rows: Sequence[Row]) -> list[Group]:
    """The columns of all tasks, one group for each task and variant, labelled by what is to be known of it."""
    groups = []
    for task, columns in task_columns(rows):
        variants = list(dict.fromkeys(column.variant for column in columns))
        for variant in variants:
            # OCR always, since a figure with it says nothing of one without; the rule where it is not the same for all.
            told = [
                f"{name} {value}" for name, value in variant if name == "OCR" or not all((name, value) in v for v in variants)
            ]
            groups.append(Group(task, ", ".join(told), [c for c in columns if c.variant == variant]))
    return groups


def score_tables(
    rows: Sequence[Row], marks: Mapping[tuple[str, Column], str] | None = None, *, key: str = "score"
) -> list[Table]:
    """The table of scores, cut between tasks into as many tables as keep it narrow.

    Args:
        rows: Systems; the first is the one that differences refer to.
        marks: (system, column) -> ``*`` for differences that a test found to be real.
        key: Begins the cells' names, which are anchors on a page that has several kinds of tables.

    Returns:
        The tables; keys of cells are distinct over all of them.
    """
    parts: list[list[Group]] = [[]]
    for group in groups_of(rows):
        # Never inside a task: its metrics are read side by side.
        if parts[-1] and sum(len(g.columns) for g in parts[-1]) + len(group.columns) > COLUMNS_PER_TABLE:
            parts.append([])
        parts[-1].append(group)
    return [_table(part, rows, marks or {}, f"{key}{i}") for i, part in enumerate(parts) if part]


def column_score(row: Row, column: Column) -> Score | None:
    """A row's score in a column, None where it was not scored under that column's conditions."""
    score = row.scores.get(column.task)
    return score if score is not None and variant_of(score) == column.variant else None


def _table(groups: list[Group], rows: Sequence[Row], marks: Mapping[tuple[str, Column], str], key: str) -> Table:
    """Fill the cells and mark the best of each column (only where there is something to compare)."""
    columns = [column for group in groups for column in group.columns]
    cells: dict[tuple[int, int], Cell] = {}
    for j, column in enumerate(columns):
        best, first = _best(rows, column), _first(rows, column)
        for i, row in enumerate(rows):
            cells[i, j] = _cell(row, column, first, rows[0], best, marks, f"{key}-{i}-{j}")
    lines = [(row.label, [(column, cells[i, j]) for j, column in enumerate(columns)]) for i, row in enumerate(rows)]
    # A system that was not scored on any of these tasks would be a row of dashes.
    shown = [(label, line) for label, line in lines if any(cell.text != MISSING for _, cell in line)]
    return Table(groups, shown, _references(rows, columns, f"{key}-r"))


def _first(rows: Sequence[Row], column: Column) -> Score | None:
    """The column's first score, which the others are held against."""
    return next((score for row in rows if (score := column_score(row, column)) is not None), None)


def _best(rows: Sequence[Row], column: Column) -> str | None:
    """The best figure of a column as printed, of those that compare; None where there is no choice, or more is not better."""
    first = _first(rows, column)
    values = []
    for row in rows:
        score = column_score(row, column)
        value = score.metrics.get(column.metric) if score else None
        if score and first and value is not None and math.isfinite(value) and not departures(score, first):
            values.append(value)
    # The best of one is no distinction.
    return column.show(max(values)) if len(values) > 1 and column.known.ranked else None


def _cell(
    row: Row,
    column: Column,
    first: Score | None,
    baseline: Row,
    best: str | None,
    marks: Mapping[tuple[str, Column], str],
    key: str,
) -> Cell:
    """Ties at the printed precision are all best: the digits that are not shown decide nothing."""
    score = column_score(row, column)
    value = score.metrics.get(column.metric) if score else None
    text = column.show(value)
    if score is None or first is None or value is None or text == MISSING:
        return Cell(MISSING)
    ci = score.ci95.get(column.metric)
    apart = departures(score, first)
    base = column_score(baseline, column)
    against = base.metrics.get(column.metric) if base and row is not baseline and not apart else None
    delta = "" if against is None or not math.isfinite(against) else column.signed(value - against)
    return Cell(
        text,
        interval=_interval(column, ci) if ci else "",
        best=best is not None and text == best and not apart,
        delta=delta,
        # A star without its difference would speak of nothing.
        mark=marks.get((row.label, column), "") if delta else "",
        warnings=warnings_of(score),
        apart=apart,
        conditions=list(settings_of(score, column.task, row.run_of(column.task)).items()),
        key=key,
        value=value,
    )


def _interval(column: Column, ci: tuple[float, float]) -> str:
    """An interval as printed."""
    return NO_SPREAD if ci[0] == ci[1] else f"{column.show(ci[0])} to {column.show(ci[1])}"


def warnings_of(score: Score) -> list[str]:
    """The score's own notes, and the answers that were counted without having been understood."""
    lines = list(score.notes)
    total = score.answers.get("total", 0)
    for kind, meaning in (("unparsed", "no answer was found in"), ("defaulted", "a default was counted for")):
        count = score.answers.get(kind, 0)
        # The suite may have put it in words already.
        if count and not any(re.search(rf"\b{count} of {total}\b", note) for note in score.notes):
            lines.append(f"{meaning} {count} of {total} texts")
    return lines


def _references(rows: Sequence[Row], columns: Sequence[Column], key: str) -> list[tuple[str, list[tuple[Column, Cell]]]]:
    """Published figures, a row per system; under another source or conditions the same system has another row."""
    found: dict[str, dict[Column, Cell]] = {}
    seen: set[tuple[Column, str]] = set()
    for column in columns:
        for row in rows:
            score = column_score(row, column)
            for entry in score.published if score else []:
                value = entry.metrics.get(column.metric)
                # Every run of the task brings the same references along.
                if value is None or (column, entry.key) in seen:
                    continue
                seen.add((column, entry.key))
                label = entry.system
                if column in found.get(label, {}):
                    label = f"{entry.system} ({', '.join(filter(None, (entry.source, entry.conditions)))})"
                told = [("Published for", entry.system), ("Source", entry.source or "not given")]
                told.append(("Conditions", entry.conditions or "not given"))
                found.setdefault(label, {})[column] = Cell(
                    column.show(value), conditions=told, key=f"{key}{len(seen)}", value=value
                )
    return [(label, [(c, line.get(c, Cell(MISSING))) for c in columns]) for label, line in found.items()]
