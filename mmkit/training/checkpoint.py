"""Checkpoints that are complete or absent.

A checkpoint is written into a hidden folder beside, flushed, and renamed; so a folder with the right name is whole. Random
numbers are not part of it: the loop seeds them from (seed, step, rank), so they are a function of the step, like the data order.
"""

from __future__ import annotations

import re
import shutil
from pathlib import Path

from mmkit.distributed.engine import Engine
from mmkit.files import read_json, sync_folder, write_json

# Eight digits, so that names sort as steps do; x-cls/superclass picks an older file because step_ sorts behind epoch_.
_NAME = re.compile(r"step-(\d{8})")


def save_checkpoint(engine: Engine, folder: Path, step: int, *, keep: int) -> None:
    """Write ``folder/step-XXXXXXXX`` (a collective call) and remove all but the newest ``keep``.

    Args:
        engine: Holds weights and optimizer.
        folder: The run's ``checkpoints``.
        step: Updates done so far.
        keep: How many to keep.
    """
    target = folder / f"step-{step:08d}"
    temporary = folder / f".step-{step:08d}"
    if engine.is_main:
        # Left by a kill in the middle of an earlier save.
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
    # Under ZeRO every rank writes its piece into the folder that the main process has just made.
    engine.barrier()
    engine.save(temporary)
    engine.barrier()
    if engine.is_main:
        # Last: a folder without it is no checkpoint, whatever else is in it.
        write_json(temporary / "state.json", {"step": step, "world_size": engine.world_size})
        sync_folder(temporary)
        # A step may be saved again after a continued run was stopped at it; rename needs the name to be free.
        shutil.rmtree(target, ignore_errors=True)
        temporary.replace(target)
        # Only after the new one is complete: at no time are there fewer than before.
        for old in list_checkpoints(folder)[:-keep]:
            shutil.rmtree(old)
    engine.barrier()


def list_checkpoints(folder: Path) -> list[Path]:
    """Complete checkpoints, oldest first."""
    if not folder.is_dir():
        return []
    return sorted(p for p in folder.iterdir() if _NAME.fullmatch(p.name) and (p / "state.json").is_file())


def newest_step(folder: Path) -> int:
    """Updates that the newest complete checkpoint has behind it; 0 without one."""
    found = list_checkpoints(folder)
    return int(read_json(found[-1] / "state.json")["step"]) if found else 0


def load_newest(engine: Engine, folder: Path) -> int:
    """Load the newest complete checkpoint.

    Returns:
        Updates done so far; 0 when there is no checkpoint.
    """
    found = list_checkpoints(folder)
    if not found:
        return 0
    # The step is read from the same folder afterwards, so weights and step cannot be of two checkpoints.
    engine.load(found[-1])
    return newest_step(folder)
