"""``predictions.jsonl``: every answer with its question, its pictures and its score, for the report and for whoever looks."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from mmkit.eval.examples import Example, Id, Picture
from mmkit.eval.pictures import content_hash
from mmkit.files import Writing, new_file

FOLDER = "pictures"
# Everything else in a name would need care in a path, in a URL or on another system.
_ODD = re.compile(r"[^A-Za-z0-9._-]+")
# Where the usual ending is not the format's name.
_ENDINGS = {"jpeg": "jpg", "tiff": "tif"}


def write_predictions(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Write all rows at once; an older file is replaced.

    Raises:
        InputError: The disk is full, read-only or broken.
    """
    with Writing(path), new_file(path) as file:
        for row in rows:
            # A lone surrogate (a file name that is not UTF-8) has no UTF-8 form, but \\udcff inside a JSON string is legal.
            file.write((json.dumps(row, ensure_ascii=False) + "\n").encode("utf-8", "backslashreplace"))


class PictureFiles:
    """Where the report finds each picture: its own file, or one in the run directory for bytes of a data set's table."""

    def __init__(self, run: Path) -> None:
        self._folder = run / FOLDER
        self._names: dict[Picture, str] = {}

    def path(self, picture: Picture) -> str:
        """The file of a picture, written if need be.

        Raises:
            InputError: The disk is full, read-only or broken.
        """
        if picture.data is None:
            return picture.name
        if picture not in self._names:
            self._names[picture] = self._write(picture, picture.data)
        return self._names[picture]

    def _write(self, picture: Picture, data: bytes) -> str:
        """Write a picture's bytes under a name of its own; returns the path."""
        odd = Path(_ODD.sub("_", picture.name).strip("._") or "picture")
        # Names of tables need not be names of files: without an ending, or the same in two tables.
        path = self._folder / f"{odd.stem[:100]}-{content_hash(data)[:8]}{_ending(data) or odd.suffix}"
        # Complete or absent, and the content is in the name: what is there is right.
        if not path.exists():
            with Writing(path), new_file(path, flush=False) as file:
                file.write(data)
        return str(path)


def _ending(data: bytes) -> str:
    """The usual ending of a picture's format; none where it cannot be told."""
    try:
        with Image.open(io.BytesIO(data)) as image:
            kind = (image.format or "").lower()
    # Unreadable pictures are kept too: somebody will want to look at them.
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return ""
    return f".{_ENDINGS.get(kind, kind)}" if kind else ""


def prediction_rows(
    name: str,
    examples: Sequence[Example],
    shown: Sequence[Example],
    texts: Mapping[Id, str],
    per_sample: Iterable[Mapping[str, Any]],
    files: PictureFiles,
    *,
    cut: Collection[Id] = (),
) -> list[dict[str, Any]]:
    """Rows of one task.

    Args:
        name: The task's name.
        examples: As the data set has them.
        shown: As the model saw them: other pictures in a blind run, no prompt for a captioner.
        texts: Answers by id.
        per_sample: Of the score; a sample may be missing, where the rule leaves it out.
        files: Gives the paths of the pictures.
        cut: Ids of answers that reached the longest length before their end.
    """
    scored = {row["id"]: row for row in per_sample}
    rows = []
    for truth, seen in zip(examples, shown, strict=True):
        score = scored.get(truth.id, {})
        images = [files.path(picture) for picture in truth.images]
        # Differs from "image" in a blind run; the report shows both.
        image_shown = files.path(seen.images[0]) if seen.images else ""
        rows.append(
            {
                "task": name,
                "id": truth.id,
                "image": images[0] if images else "",
                "image_shown": image_shown,
                **({"images": images} if len(images) > 1 else {}),
                "prompt": seen.prompt,
                "question": truth.question,
                "prediction": texts[truth.id],
                **({"cut": True} if truth.id in cut else {}),
                **({"parsed": score["parsed"]} if "parsed" in score else {}),
                "type": truth.type,
                "references": truth.references,
                # Metrics are the floats of a row; the id is a whole number or a name.
                "score": {key: value for key, value in score.items() if isinstance(value, float)},
            }
        )
    return rows
