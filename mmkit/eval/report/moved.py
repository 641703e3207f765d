"""Runs that lie elsewhere than when they were written: a folder copied from a cluster still shows its pictures and parents."""

from __future__ import annotations

import re
from pathlib import Path, PurePath

_RUN = re.compile(r"^run:[ \t]*(['\"]?)(?P<path>.+?)\1[ \t]*$", re.MULTILINE)

# The folder above a run when it was written, and where that folder is now.
Move = tuple[PurePath, Path]


def move_of(run: Path, recipe: str) -> Move | None:
    """Where a run was moved from.

    Args:
        run: The run directory as it is now, resolved.
        recipe: Text of its ``recipe.yaml``, whose ``run`` is the directory as it was.

    Returns:
        The two folders below which the old and the new path are the same; an old one that is relative, to where the command was
        started, stays so. None for a run that is still in its place, that was renamed itself, or whose recipe does not tell.
    """
    found = _RUN.search(recipe)
    old = PurePath(found.group("path")) if found else PurePath()
    if not old.name or (old.is_absolute() and Path(old).is_dir()):
        return None
    then, now = old.parts[bool(old.anchor) :], run.parts[1:]
    count = next(
        (i for i, (a, b) in enumerate(zip(reversed(then), reversed(now), strict=False)) if a != b), min(len(then), len(now))
    )
    return (old.parents[count - 1], run.parents[count - 1]) if count else None


def follow(name: str, move: Move | None) -> Path | None:
    """A path from a moved run's files in its new place, None where it was outside of the folder that was moved."""
    if move is None:
        return None
    try:
        return move[1] / PurePath(name).relative_to(move[0])
    except ValueError:
        return None
