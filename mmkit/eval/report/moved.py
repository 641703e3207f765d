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
        The two folders that end where the old and the new path begin to be the same; None for a run in its place, one that
        was named relative to a folder, and one whose own folder was renamed.
    """
    found = _RUN.search(recipe)
    old = PurePath(found.group("path")) if found else PurePath()
    if not old.is_absolute() or Path(old).is_dir():
        return None
    count = 0
    for then, now in zip(reversed(old.parts[1:]), reversed(run.parts[1:]), strict=False):
        if then != now:
            break
        count += 1
    return (old.parents[count - 1], run.parents[count - 1]) if count else None


def follow(name: str, move: Move | None) -> Path | None:
    """A path from a moved run's files in its new place, None where it was outside of the folder that was moved."""
    if move is None:
        return None
    try:
        return move[1] / PurePath(name).relative_to(move[0])
    except ValueError:
        return None
