"""The findings of an inspection as files: a self-contained HTML page, its Markdown twin, JSON, and lists for programs."""

from __future__ import annotations

import base64
import dataclasses
import io
import json
import os.path
import random
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jinja2
from markupsafe import Markup
from PIL import Image

from mmkit.data.images import decode_image
from mmkit.data.pairs import PairSource
from mmkit.data.scan.duplicates import Groups, first_of_each
from mmkit.data.scan.tally import LARGEST, Tally
from mmkit.data.skipped import SampleError
from mmkit.files import write_text

if TYPE_CHECKING:
    from mmkit.data.inspect import Inspection

_TEMPLATES = Path(__file__).parent / "templates"
_SEED = 0
_SIDE = 320  # px: longer sides are made smaller before inlining; twice what a phone shows, for dense screens
_SMALL = 96  # px: smaller pictures are shown enlarged, pixel by pixel
_GROUPS = 12
_MEMBERS = 4
_REPEATED = 20
_LONGEST = 300  # characters of a caption on the page


@dataclasses.dataclass(frozen=True)
class Shown:
    """A pair on the page; ``uri`` is empty and ``missing`` says why when its picture could not be read again."""

    source: str
    key: str
    caption: str
    uri: str = ""
    width: int = 0
    height: int = 0
    missing: str = ""

    @property
    def pixels(self) -> bool:
        """Whether it is so small that its pixels are shown as squares."""
        return 0 < max(self.width, self.height) <= _SMALL


def write_pages(out: Path, found: Inspection, source: PairSource, *, sample: int) -> Path:
    """Write ``inspect.html``, ``inspect.md``, ``inspect.json`` and ``duplicates.jsonl`` into a folder.

    The same data gives the same files, byte for byte.

    Args:
        out: The folder, made where it is missing.
        found: The findings.
        source: What was inspected; pictures to show are read from it again.
        sample: Pictures to show.

    Returns:
        Path of the HTML page.

    Raises:
        OSError: The folder cannot be written.
    """
    view = _view(found, source, sample)
    pages = {
        "inspect.json": json.dumps(found.to_json(), indent=1, allow_nan=False) + "\n",
        "duplicates.jsonl": "".join(json.dumps(row) + "\n" for row in duplicate_rows(found, source)),
        "inspect.md": to_markdown(view),
        # Last, so that its presence says that the others are there.
        "inspect.html": to_html(view),
    }
    for name, text in pages.items():
        # Member names may hold bytes that are no UTF-8, which came as surrogates.
        write_text(out / name, text.encode("utf-8", "replace").decode("utf-8"))
    return out / "inspect.html"


def to_html(view: dict[str, Any]) -> str:
    """The page; everything from the data is escaped, the drawings of `histogram` alone are markup."""
    environment = jinja2.Environment(loader=jinja2.FileSystemLoader(_TEMPLATES), autoescape=True, trim_blocks=True)
    environment.globals.update(histogram=histogram)
    return environment.get_template("inspect.html.j2").render(view)


def to_markdown(view: dict[str, Any]) -> str:
    """The same without pictures; every value is escaped, so no pipe or newline of the data can break a table."""
    from mmkit.eval.report.exports import escape_markdown

    environment = jinja2.Environment(loader=jinja2.FileSystemLoader(_TEMPLATES), finalize=escape_markdown, trim_blocks=True)
    return environment.get_template("inspect.md.j2").render(view).strip() + "\n"


def duplicate_rows(found: Inspection, source: PairSource) -> Iterator[dict[str, Any]]:
    """Each picture that comes twice: ``kind`` (``equal`` or ``alike``), ``group``, ``source``, ``key``, for other programs."""
    if found.pictures is None:
        return
    for kind, groups in (("equal", found.pictures.equal), ("alike", found.pictures.alike)):
        for number in range(len(groups)):
            for index in groups.group(number).tolist():
                place, key = source.describe(index)
                yield {"kind": kind, "group": number, "source": place, "key": key}


def histogram(tally: Tally, unit: str) -> Markup:
    """A histogram as an SVG element in the page's colours; no text in it comes from the data.

    Args:
        tally: What to draw; nothing is drawn of nothing.
        unit: What the values are, for whoever hears the page read out.
    """
    bars = tally.bars()
    if not bars:
        return Markup()
    width, height = 320, 120
    # Not too wide: a single value would be drawn as a wall.
    step = min(40.0, width / len(bars))
    top = max(count for _, _, count in bars)
    parts = []
    for place, (first, last, count) in enumerate(bars):
        tall = count / top * (height - 4)
        span = f"{first}" if first == last else f"{first} to {last if last < LARGEST else tally.most}"
        gap = min(1.0, step / 8)
        box = f'x="{place * step + gap:.1f}" y="{height - tall:.1f}" width="{step - 2 * gap:.1f}" height="{tall:.1f}"'
        parts.append(f'<rect class="bar" {box}><title>{span} {unit}: {count}</title></rect>')
    for place in sorted({round(i * (len(bars) - 1) / 4) for i in range(5)}):
        # The outer labels grow inwards, or the drawing's edge would cut them off.
        anchor = "start" if place == 0 and len(bars) > 2 else "end" if place == len(bars) - 1 and len(bars) > 2 else "middle"
        at = {"start": place * step, "end": (place + 1) * step, "middle": (place + 0.5) * step}[anchor]
        value = tally.most if place == len(bars) - 1 else bars[place][0]  # the last bar by its end
        parts.append(f'<text x="{at:.1f}" y="{height + 17}" text-anchor="{anchor}">{value:,}</text>')
    label = f"histogram, {unit}: least {tally.quantile(0)}, median {tally.quantile(0.5)}, most {tally.most}"
    line = f'<path class="axis" d="M0 {height + 0.5}H{width}"/>'
    # Every part is made of numbers and of the unit, which is ours.
    return Markup(f'<svg viewBox="0 0 {width} {height + 22}" role="img" aria-label="{label}">{line}{"".join(parts)}</svg>')


def _view(found: Inspection, source: PairSource, sample: int) -> dict[str, Any]:
    """What the templates print."""
    facts = found.pictures
    captions = [
        ("Characters", "characters", found.survey.characters),
        ("Words", "words", found.survey.words),
        ("Labels", "labels", found.labels),
    ]
    pictures, shown = [], []
    if facts is not None:
        names = (("Width", "width", "px"), ("Height", "height", "px"), ("Aspect", "aspect", "width per 100 of height"))
        pictures = [(title, unit, facts.tallies[name]) for title, name, unit in (*names, ("Size of the file", "kib", "KiB"))]
        shown = [_show(source, index) for index in _drawn(found, sample)]
    repeated = found.repeated
    # The most frequent first: a sentence that stands a thousand times is boilerplate of a web shop, not a caption.
    order = sorted(range(len(repeated)), key=lambda i: (-len(repeated.group(i)), i))[:_REPEATED]
    return {
        "found": found,
        "name": os.path.basename(found.location.rstrip("/")) or found.location,  # noqa: PTH119  an address is no Path
        "facts": facts,
        "distributions": [("Captions", captions), *([("Pictures", pictures)] if pictures else [])],
        "columns": ("n", "least", "5%", "25%", "median", "75%", "95%", "most", "mean"),
        "shown": shown,
        "seed": _SEED,
        "equal": _groups(facts.equal, source) if facts else [],
        "alike": _groups(facts.alike, source) if facts else [],
        "repeated": [(len(repeated.group(i)), _cut(_caption(source, int(repeated.group(i)[0])))) for i in order],
    }


def _drawn(found: Inspection, count: int) -> list[int]:
    """Pairs to show: drawn from all of them with a fixed seed, no picture twice."""
    usable = found.survey.usable()
    pool = first_of_each(found.survey.records["picture"][usable], usable)
    # In the order of the data set: what lies together was often collected together.
    places = random.Random(_SEED).sample(range(len(pool)), min(count, len(pool)))
    return sorted(int(pool[place]) for place in places)


def _groups(groups: Groups, source: PairSource) -> list[tuple[int, list[Shown]]]:
    """The first few groups: members, and the first few of them."""
    some = [groups.group(number) for number in range(min(len(groups), _GROUPS))]
    return [(len(group), [_show(source, index) for index in group[:_MEMBERS].tolist()]) for group in some]


def _show(source: PairSource, index: int) -> Shown:
    """A pair with its picture, made small and encoded anew, which drops what a page must not carry (GPS position, previews)."""
    place, key = source.describe(index)
    try:
        pair = source.read(index)
        image = decode_image(pair.image.read())
    except SampleError as error:  # it was sound a moment ago, but remote shards come and go
        return Shown(place, key, "", missing=str(error))
    # A comment of the file would go into the new one.
    image.info = {}
    small = max(image.size) <= _SMALL
    if not small:
        image.thumbnail((_SIDE, _SIDE), Image.Resampling.LANCZOS)
    file = io.BytesIO()
    # PNG of the small ones, since JPEG would smear the very pixels that are shown enlarged.
    image.save(file, "PNG" if small else "JPEG", optimize=True, **({} if small else {"quality": 80}))
    uri = f"data:image/{'png' if small else 'jpeg'};base64,{base64.b64encode(file.getvalue()).decode('ascii')}"
    return Shown(place, key, _cut(pair.caption), uri, *image.size)


def _caption(source: PairSource, index: int) -> str:
    try:
        return source.read(index).caption
    except SampleError as error:
        return f"({error})"


def _cut(text: str) -> str:
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}\u2026 ({len(text)} characters)"
