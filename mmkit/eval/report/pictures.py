"""Pictures as a page can carry them: read by the loader's own decoder, scaled, encoded anew, inlined."""

from __future__ import annotations

import base64
import io
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from mmkit.data.images import ImageRef, decode_image
from mmkit.data.skipped import SampleError
from mmkit.eval.report.lmms_eval_files import PROGRAM
from mmkit.eval.report.moved import follow
from mmkit.eval.report.runs import Run

SMALL = 160  # px: up to here a picture is shown enlarged, pixel by pixel, instead of being re-encoded with losses
WIDEST = 320  # px: longer sides are scaled down before inlining
UNLOGGED = "picture not logged"


@dataclass(frozen=True)
class Picture:
    """An inlined picture; `uri` is empty and `missing` says why when it could not be read."""

    name: str
    uri: str = ""
    width: int = 0
    height: int = 0
    pixelated: bool = False
    missing: str = ""


def read_picture(name: str, run: Run, *, side: int) -> Picture:
    """Read, scale and encode one picture for a high-density screen.

    Args:
        name: Path as the predictions have it: absolute, or relative to the working directory or the run.
        run: The run whose predictions name it.
        side: Longest side on the page, px.

    Returns:
        The picture, or a placeholder that says what is wrong.
    """
    label = Path(name).name or "(no name)"
    image = _open(name, run)
    if isinstance(image, str):
        return Picture(label, missing=image)
    longest = max(image.size)
    if longest <= SMALL:
        # A whole factor, so that every pixel of a small drawing becomes a square of one size.
        factor = max(1, side // longest) if side >= longest else side / longest
        # PNG, since JPEG would smear the very pixels that are shown enlarged.
        uri = _encode(image, "PNG") if side >= longest else _encode(_scaled(image, 2 * side), "JPEG")
        width, height = round(image.width * factor), round(image.height * factor)
        return Picture(label, uri, width, height, pixelated=side >= longest)
    # Twice the size on the page, for screens of high density, within the limit on file size.
    factor = side / longest
    uri = _encode(_scaled(image, min(WIDEST, 2 * side)), "JPEG")
    return Picture(label, uri, max(1, round(image.width * factor)), max(1, round(image.height * factor)))


def read_thumbnail(name: str, run: Run, *, side: int) -> Picture:
    """Read one picture as a thumbnail of few bytes: thousands of them share a page.

    Args:
        name: As of `read_picture`.
        run: The run whose predictions name it.
        side: Longest side in the file and on the page, px; a smaller picture keeps its size.

    Returns:
        The picture, or a placeholder that says what is wrong.
    """
    label = Path(name).name or "(no name)"
    image = _open(name, run)
    if isinstance(image, str):
        return Picture(label, missing=image)
    small = max(image.size) <= side
    image = _scaled(image, side)
    # WebP takes two thirds of JPEG's bytes at this size.
    uri = _encode(image, "WEBP", quality=60, method=4)
    if small:
        # Small drawings without loss, since they are shown enlarged; not noise and photographs, which that makes large.
        exact = _encode(image, "WEBP", lossless=True)
        uri = exact if len(exact) < 2 * len(uri) else uri
    return Picture(label, uri, image.width, image.height, pixelated=small)


def read_thumbnails(names: Sequence[tuple[str, Run]], *, side: int) -> list[Picture]:
    """`read_thumbnail` of many, on all cores (decoding and encoding leave the interpreter free).

    Args:
        names: Picture and the run that names it.
        side: Longest side, px.

    Returns:
        The pictures, in the same order.
    """
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return list(pool.map(lambda pair: read_thumbnail(*pair, side=side), names))


def _open(name: str, run: Run) -> Image.Image | str:
    """The decoded picture, or what is wrong with it."""
    # Most often absolute or relative to where the command was started, which is most often a folder above the runs.
    places = [name, *(os.path.join(folder, name) for folder in (run.path, *run.path.parents))]  # noqa: PTH118
    places += [str(there)] if (there := follow(name, run.move)) is not None else []
    # Names from elsewhere may be longer than a file name can be, or hold a null byte; pathlib's is_file raises at them.
    path = next((p for p in dict.fromkeys(places) if os.path.isfile(p)), None)  # noqa: PTH113
    if path is None:
        # Results of another program may tell no picture; the name that stands for one begins with the program's.
        return UNLOGGED if run.imported and name.startswith(f"{PROGRAM}/") else "file not found"
    try:
        # The loader's own decoder: what is shown is what the model saw. Encoding anew below also drops what the page must
        # not carry (GPS position, embedded previews, trailing bytes).
        return decode_image(ImageRef(str(path)).read())
    except SampleError as error:
        return str(error)


def _scaled(image: Image.Image, side: int) -> Image.Image:
    """Down to `side` px, never up."""
    # thumbnail works in place.
    image = image.copy()
    image.thumbnail((side, side), Image.Resampling.LANCZOS)
    return image


def _encode(image: Image.Image, kind: str, **how: object) -> str:
    """As a data URI."""
    file = io.BytesIO()
    image.save(file, kind, **(how or ({"quality": 82, "optimize": True} if kind == "JPEG" else {"optimize": True})))
    return f"data:image/{kind.lower()};base64,{base64.b64encode(file.getvalue()).decode('ascii')}"
