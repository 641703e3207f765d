"""mmkit.json: what a model folder's own format has no place for (kind, encoder path and fingerprint, ...)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mmkit.errors import InputError
from mmkit.files import read_json, write_json

META_FILE = "mmkit.json"


def write_meta(folder: Path, kind: str, meta: dict[str, Any]) -> None:
    """Write mmkit.json with ``kind`` and the rest."""
    # The kind wins over one in meta: what is handed on from a parent's file must not rename the model.
    write_json(folder / META_FILE, {**meta, "kind": kind})


def read_meta(folder: str | Path, kind: str) -> dict[str, Any]:
    """The mmkit.json of a model folder, its kind checked.

    Raises:
        InputError: When it is missing, damaged or of another kind.
    """
    meta = read_json(Path(folder) / META_FILE, mend="give the model folder of an mmkit run")
    # Checked before any weights are read: otherwise the first error would be about missing keys.
    found = meta.get("kind") if isinstance(meta, dict) else None
    if found != kind:
        raise InputError(f"this model's kind is {found!r}, not {kind!r}", where=folder, mend="give another folder")
    return meta
