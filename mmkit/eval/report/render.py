"""Writes the report: one self-contained HTML file, and its tables and figures as Markdown, LaTeX, CSV and JSON."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Sequence
from pathlib import Path

import jinja2
from markupsafe import Markup

from mmkit.errors import InputError
from mmkit.eval.report.collect import collect
from mmkit.eval.report.exports import to_csv, to_json, to_markdown
from mmkit.eval.report.latex import to_latex
from mmkit.eval.report.lineage import WIDTH
from mmkit.eval.report.tables import MISSING, NO_SPREAD
from mmkit.eval.report.view import MISSING_LISTED, REASONS, Report, assemble, duration
from mmkit.files import write_text

TEMPLATES = Path(__file__).parent / "templates"
# About 4 MB of thumbnails of photographs at the default size; twice that still opens at once.
GALLERY, THUMBNAIL = 1000, 128
_THUMBNAILS = (32, 512)


def build_report(
    runs: Sequence[Path],
    out: Path,
    *,
    title: str = "mmkit report",
    gallery: int = GALLERY,
    thumbnail: int = THUMBNAIL,
    seed: int = 0,
) -> Path:
    """Compare runs: scores, differences, conditions, curves, a gallery, what was left out, lineage.

    The same runs give the same files, byte for byte.

    Args:
        runs: Finished eval, probe or train run directories, or result files of lmms-eval; the first system named is the one
            others are compared with.
        out: Folder for ``report.html`` and ``.md``, ``.tex``, ``.csv``, ``.json`` of the same name.
        title: Heading of the report.
        gallery: How many held-out pictures to show, with everything that was asked about them.
        thumbnail: Longest side of the gallery's thumbnails, px.
        seed: Seed of the gallery's draw and of the tests.

    Returns:
        Path of ``report.html``.

    Raises:
        InputError: A run is missing, unfinished or damaged; `out` cannot be a folder; `gallery` or `thumbnail` is out of range.
    """
    if gallery < 0:
        raise InputError(f"gallery is {gallery}", where="report", mend="give the number of pictures, 0 for none")
    low, high = _THUMBNAILS
    if not low <= thumbnail <= high:
        raise InputError(f"thumbnail is {thumbnail}", where="report", mend=f"give the longest side in px, from {low} to {high}")
    if out.exists() and not out.is_dir():
        raise InputError("is a file, not a folder", where=out, mend="name a folder for the report")
    report = assemble(collect(runs), title=title, gallery=gallery, thumbnail=thumbnail, seed=seed)
    # All made before the first is written: a fault leaves no mixture of old and new. The HTML is written last, so
    # that its presence says that the others are there.
    pages = {
        "report.md": to_markdown(report),
        "report.tex": to_latex(report),
        "report.csv": to_csv(report),
        "report.json": to_json(report),
        "report.html": to_html(report),
    }
    for name, text in pages.items():
        # Captions may hold lone surrogates (legal in JSON), which no file can hold as UTF-8.
        write_text(out / name, text.encode("utf-8", "replace").decode("utf-8"))
    return out / "report.html"


def to_html(report: Report) -> str:
    """The page; everything from data is escaped, the drawings of `plots` and the viewer's JSON alone are markup."""
    # Escaped by default: captions and answers come from models and data sets, and a browser opens the page.
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters.update(duration=duration, probability=probability, source_hash=source_hash)
    environment.globals.update(
        missing=MISSING,
        no_spread=NO_SPREAD,
        most_reasons=REASONS,
        most_missing=MISSING_LISTED,
        box_width=WIDTH,
    )
    css = environment.get_template("report.css.j2").render().strip()
    # One script element, so that the policy names one hash.
    js = "\n".join((TEMPLATES / name).read_text(encoding="utf-8") for name in ("figures.js", "gallery.js"))
    return environment.get_template("report.html.j2").render(r=report, css=Markup(css), js=Markup(js))


def source_hash(source: str) -> str:
    """What a Content-Security-Policy calls an inline script or style by: it allows these very bytes and no others."""
    return "sha256-" + base64.b64encode(hashlib.sha256(source.encode()).digest()).decode("ascii")


def probability(p: float) -> str:
    """A p-value with as many digits as mean something."""
    return "<\u00a00.001" if p < 0.001 else f"{p:.3f}" if p < 0.1 else f"{p:.2f}"
