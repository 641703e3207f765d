"""Writes the report: one self-contained HTML file, its Markdown twin, and the figures as JSON."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

import mmkit
from mmkit.errors import InputError
from mmkit.eval.report.collect import collect
from mmkit.eval.report.gallery import Entry
from mmkit.eval.report.plots import Curve
from mmkit.eval.report.tables import MISSING, Row
from mmkit.eval.report.view import REASONS, Report, assemble, duration
from mmkit.files import write_text

_TEMPLATES = Path(__file__).parent / "templates"
# What Markdown (GitHub's flavour included) would take for markup inside a paragraph or a table cell.
_MARKDOWN = re.compile(r"([\\`*_{}\[\]|~$#])")


def build_report(runs: Sequence[Path], out: Path, *, title: str = "mmkit report", gallery: int = 12, seed: int = 0) -> Path:
    """Compare runs: scores, differences, conditions, curves, a gallery, what was left out, lineage.

    The same runs give the same files, byte for byte.

    Args:
        runs: Finished eval, probe or train run directories; the first system named is the one others are compared with.
        out: Folder for ``report.html``, ``report.md`` and ``report.json``.
        title: Heading of the report.
        gallery: How many held-out pictures to show.
        seed: Seed of the gallery's draw and of the bootstrap.

    Returns:
        Path of ``report.html``.

    Raises:
        InputError: A run is missing, unfinished or damaged; `out` cannot be a folder; `gallery` is negative.
    """
    if gallery < 0:
        raise InputError(f"gallery is {gallery}", where="report", mend="give the number of pictures, 0 for none")
    if out.exists() and not out.is_dir():
        raise InputError("is a file, not a folder", where=out, mend="name a folder for the report")
    report = assemble(collect(runs), title=title, gallery=gallery, seed=seed)
    # All made before the first is written: a fault leaves no mixture of old and new. The HTML is written last, so
    # that its presence says that the others are there.
    pages = {"report.md": to_markdown(report), "report.json": to_json(report), "report.html": to_html(report)}
    for name, text in pages.items():
        # Captions may hold lone surrogates (legal in JSON), which no file can hold as UTF-8.
        write_text(out / name, text.encode("utf-8", "replace").decode("utf-8"))
    return out / "report.html"


def to_html(report: Report) -> str:
    """The page; everything from data is escaped, the drawings of `plots` alone are markup."""
    # Escaped by default: captions and answers come from models and data sets, and a browser opens the page.
    return _render(jinja2.Environment(loader=_loader(), autoescape=True, **_BLOCKS), "report.html.j2", report)


def to_markdown(report: Report) -> str:
    """The same without pictures; every value is escaped, so no pipe or newline of the data can break a table."""
    # finalize sees every printed value; autoescape knows HTML alone.
    environment = jinja2.Environment(loader=_loader(), finalize=escape_markdown, **_BLOCKS)
    # Sections without content leave runs of empty lines behind.
    return re.sub(r"\n{3,}", "\n\n", _render(environment, "report.md.j2", report)).strip() + "\n"


def to_json(report: Report) -> str:
    """The report's figures (fractions, not scaled) for other programs; NaN becomes null."""
    content = {
        "mmkit": mmkit.__version__,
        "title": report.title,
        "seed": report.seed,
        "summary": report.summary,
        "facts": dict(report.facts),
        "systems": [_row(row) for row in report.rows],
        "differences": [
            {
                "system": d.system,
                "baseline": d.baseline,
                "task": d.column.task,
                "metric": d.column.metric,
                "n": d.n,
                "difference": d.value,
                "ci95": [d.low, d.high],
                "verdict": d.verdict,
            }
            for d in report.differences
        ],
        "not_compared": report.not_compared,
        "conditions": {task: [vars(c) for c in lines] for task, lines in report.conditions.items()},
        "probes": [_row(row) for row in report.probe_rows],
        "curves": [{"stage": p.title, "curves": [_curve(c) for c in p.curves]} for p in report.panels],
        # Names and answers; the pixels would make the JSON as large as the page.
        "gallery": [_entry(entry, report.gallery.systems) for entry in report.gallery.entries],
        "missing_pictures": [{"name": p.name, "reason": p.missing} for p in report.gallery.missing()],
        "skipped": [{"run": s.run, "total": s.total, "reasons": dict(s.reasons)} for s in report.skipped],
        "notes": report.notes,
        "runs": [
            {"name": run.name, "path": str(run.path), "manifest": run.manifest, "recipe": run.recipe} for run in report.runs
        ],
    }
    # allow_nan=False: Python would write NaN, which is no JSON, and other parsers stop there.
    return json.dumps(_finite(content), indent=1, allow_nan=False) + "\n"


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


_BLOCKS: dict[str, Any] = {"trim_blocks": True, "lstrip_blocks": True}


def _loader() -> jinja2.BaseLoader:
    return jinja2.FileSystemLoader(_TEMPLATES)


def _render(environment: jinja2.Environment, name: str, report: Report) -> str:
    environment.filters["duration"] = duration
    environment.globals.update(missing=MISSING, most_reasons=REASONS, Markup=Markup)
    return environment.get_template(name).render(r=report)


def _row(row: Row) -> dict[str, Any]:
    """A system without its per-sample scores, which its runs hold."""
    return {
        "system": row.label,
        # Recipes and manifests whole: what is left to repeat a run when its directory is gone.
        "runs": [run.name for run in row.runs],
        "tasks": {
            name: {"task": s.task, "metrics": s.metrics, "ci95": s.ci95, "n": s.n, "settings": s.settings}
            for name, s in row.scores.items()
        },
    }


def _curve(curve: Curve) -> dict[str, Any]:
    return {
        "system": curve.label,
        "run": curve.run,
        "loss": list(zip(curve.steps, curve.loss, strict=True)),
        "val_loss": list(zip(curve.val_steps, curve.val_loss, strict=True)),
    }


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
