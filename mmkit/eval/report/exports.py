"""The report for other programs: Markdown, CSV, JSON; latex.py has the tables for papers."""

from __future__ import annotations

import csv
import io
import json
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

import mmkit
from mmkit.eval.report.conditions import settings_of
from mmkit.eval.report.curves import HELD_OUT, Curve
from mmkit.eval.report.gallery import Entry
from mmkit.eval.report.systems import Row
from mmkit.eval.report.tables import MISSING, NO_SPREAD, Cell, Column, Group, column_score, groups_of
from mmkit.eval.report.view import REASONS, Report, duration

# What Markdown (GitHub's flavour included) would take for markup inside a paragraph or a table cell.
_MARKDOWN = re.compile(r"([\\`*_{}\[\]|~$#])")
# Spreadsheets run a cell that begins with one of these.
_FORMULA = ("=", "+", "-", "@", "\t", "\r")
_SPEED = ("samples_per_second", "data_wait")
FIELDS = (
    "system", "published", "task", "metric", "value", "low", "high", "n", "difference", "p", "p_holm", "unit", "printed", "best",
    "comparable", "conditions", "source", "warnings",
)  # fmt: skip


def to_markdown(report: Report) -> str:
    """The page without pictures; every value is escaped, so no pipe or newline of the data can break a table."""
    # finalize sees every printed value; autoescape knows HTML alone.
    loader = jinja2.FileSystemLoader(Path(__file__).parent / "templates")
    environment = jinja2.Environment(loader=loader, finalize=escape_markdown, trim_blocks=True, lstrip_blocks=True)
    environment.filters["duration"] = duration
    environment.globals.update(missing=MISSING, no_spread=NO_SPREAD, most_reasons=REASONS, Markup=Markup)
    # Sections without content leave runs of empty lines behind.
    return re.sub(r"\n{3,}", "\n\n", environment.get_template("report.md.j2").render(r=report)).strip() + "\n"


def escape_markdown(value: Any) -> Any:
    """Make a value inert in Markdown: markup escaped, HTML as entities, on one line.

    Args:
        value: Anything a template prints.

    Returns:
        The text; ``Markup`` passes as it is.
    """
    if isinstance(value, (Markup, jinja2.Undefined)):
        return value
    # A line break inside a value would end the row of its table.
    text = " ".join(str(value).split())
    # The ampersand first, or it would escape the entities that follow.
    text = text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return _MARKDOWN.sub(r"\\\1", text)


def to_csv(report: Report) -> str:
    """One line for each figure of the main tables and each published one, in long form; figures as stored."""
    out = io.StringIO()
    writer = csv.DictWriter(out, FIELDS, lineterminator="\n")
    writer.writeheader()
    tests = {(d.system, d.column): d for d in report.differences}
    for table, rows in [*((t, report.rows) for t in report.tables), *((t, report.probe_rows) for t in report.probes)]:
        by_label = {row.label: row for row in rows}
        for label, cells in table.rows:
            for column, cell in cells:
                score = column_score(by_label[label], column)
                if score is None or cell.text == MISSING:
                    continue
                low, high = score.ci95.get(column.metric, ("", ""))
                test = tests.get((label, column))
                writer.writerow(
                    {
                        **_csv_cell(label, column, cell),
                        "value": score.metrics[column.metric],
                        "low": low,
                        "high": high,
                        "n": score.n,
                        **({"difference": test.value, "p": test.p, "p_holm": test.p_holm} if test else {}),
                    }
                )
        for label, cells in table.references:
            for column, cell in cells:
                if cell.text != MISSING:
                    told = dict(cell.conditions)
                    row = {"published": "yes", "source": told["Source"], "conditions": told["Conditions"]}
                    writer.writerow({**_csv_cell(label, column, cell), "value": cell.value, **_plain(row)})
    return out.getvalue()


def _csv_cell(label: str, column: Column, cell: Cell) -> dict[str, Any]:
    """The fields that a measured and a published figure share."""
    texts = {
        "system": label,
        "published": "no",
        "task": column.task,
        "metric": column.metric,
        "unit": column.unit,
        "best": "yes" if cell.best else "no",
        "comparable": "; ".join(cell.apart) or "yes",
        "conditions": "; ".join(f"{name}: {value}" for name, value in cell.conditions),
        "warnings": "; ".join(cell.warnings),
    }
    return {**_plain(texts), "printed": cell.text}


def _plain(texts: dict[str, str]) -> dict[str, str]:
    """Texts that a spreadsheet shows and does not run."""
    return {key: f"'{text}" if text.startswith(_FORMULA) else text for key, text in texts.items()}


def to_json(report: Report) -> str:
    """The report's figures (as stored, not scaled) for other programs; NaN becomes null."""
    content = {
        "mmkit": mmkit.__version__,
        "title": report.title,
        "seed": report.seed,
        "summary": report.summary,
        "facts": dict(report.facts),
        "systems": [_row(row) for row in report.rows],
        "columns": [_group(group) for group in groups_of(report.rows)],
        "published": _published(report.rows),
        "differences": [
            {
                "system": d.system,
                "baseline": d.baseline,
                "task": d.column.task,
                "metric": d.column.metric,
                "n": d.n,
                "pictures": d.pictures,
                "difference": d.value,
                "ci95": [d.low, d.high],
                "p": d.p,
                "p_holm": d.p_holm,
                "verdict": d.verdict,
                "unlike": d.unlike,
            }
            for d in report.differences
        ],
        "not_compared": report.not_compared,
        "not_comparable": [*report.apart, *report.probe_apart],
        "rules": report.rules,
        "conditions": {task: [vars(c) for c in lines] for task, lines in report.conditions.items()},
        "probes": [_row(row) for row in report.probe_rows],
        "curves": [{"stage": p.title, "curves": [_curve(c, ("loss", "lr")) for c in p.curves]} for p in report.panels],
        # Apart from the curves, which the same data and seed give again: these two depend on the machine.
        "speed": [
            {"stage": p.title, "curves": [_curve(c, ("samples_per_second", "data_wait")) for c in p.curves]}
            for p in report.panels
        ],
        # Names and answers of the sample; the pixels would make the JSON as large as the page.
        "gallery": [_entry(entry, report.gallery.systems) for entry in report.gallery.entries],
        "missing_pictures": [{"name": p.name, "reason": p.missing} for p in report.missing_pictures],
        "data": [vars(use) for use in report.data],
        "skipped": [{"run": s.run, "total": s.total, "reasons": dict(s.reasons)} for s in report.skipped],
        "notes": report.notes,
        "runs": [
            {"name": run.name, "path": str(run.path), "manifest": run.manifest, "recipe": run.recipe} for run in report.runs
        ],
    }
    # allow_nan=False: Python would write NaN, which is no JSON, and other parsers stop there.
    return json.dumps(_finite(content), indent=1, allow_nan=False) + "\n"


def _row(row: Row) -> dict[str, Any]:
    """A system without its per-sample scores, which its runs hold."""
    return {
        "system": row.label,
        # Recipes and manifests whole: what is left to repeat a run when its directory is gone.
        "runs": [run.name for run in row.runs],
        "imported": [run.imported for run in row.runs if run.imported],
        "tasks": {
            name: {
                "task": s.task,
                "metrics": s.metrics,
                "ci95": s.ci95,
                "n": s.n,
                "settings": s.settings,
                "answers": s.answers,
                "conditions": settings_of(s, name, row.run_of(name)),
            }
            for name, s in row.scores.items()
        },
    }


def _group(group: Group) -> dict[str, Any]:
    """Which figures share a column: those of one task under one rule and OCR mode."""
    return {"task": group.task, "variant": group.variant, "metrics": [column.metric for column in group.columns]}


def _published(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """References of papers, each once."""
    found = {(task, entry.key): entry for row in rows for task, score in row.scores.items() for entry in score.published}
    return [{"task": task, **vars(entry)} for (task, _), entry in found.items()]


def _curve(curve: Curve, keys: Sequence[str]) -> dict[str, Any]:
    parts = [part for key in keys for part in (key, HELD_OUT.get(key)) if part]
    return {"system": curve.label, "run": curve.run, **{part: curve.points(part) for part in parts}}


def _entry(entry: Entry, systems: Sequence[str]) -> dict[str, Any]:
    """A gallery picture by name; its pixels stay in the HTML."""
    return {
        "picture": entry.picture.name,
        "items": [
            {
                "task": item.task,
                "id": item.id,
                "question": item.question or None,
                "truth": [item.truth, *item.more_truths],
                "answers": {
                    system: {"text": a.text, "mark": a.mark, "shown": a.shown.name if a.shown else None}
                    for system, a in zip(systems, item.answers, strict=True)
                    if a is not None
                },
            }
            for item in entry.items
        ],
    }


def _finite(value: Any) -> Any:
    """Replace what JSON cannot say (NaN, infinities) by null, all the way down."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return value
