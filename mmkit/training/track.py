"""Trackers: curves and pictures in TensorBoard, Weights & Biases or trackio, besides metrics.jsonl."""

from __future__ import annotations

import importlib.util
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from mmkit.config import TrackConfig
from mmkit.errors import InputError
from mmkit.files import write_text

Picture = np.ndarray[Any, np.dtype[np.uint8]]
# Looked up, not imported: checking a recipe must stay quick.
_PACKAGE = {"tensorboard": "tensorboard", "wandb": "wandb", "trackio": "trackio"}


class Tracker(Protocol):
    """Where the main process shows how a run goes."""

    def scalars(self, step: int, numbers: dict[str, float]) -> None:
        """Show numbers at a step."""
        ...

    def picture(self, step: int, name: str, picture: Picture) -> None:
        """Show a picture, uint8 ``[H, W, 3]``."""
        ...

    def close(self) -> None:
        """Write what is pending."""
        ...


class NoTracker:
    """Shows nothing: ``track.kind=none``, and every process but the main one."""

    def scalars(self, step: int, numbers: dict[str, float]) -> None:
        """Nothing."""

    def picture(self, step: int, name: str, picture: Picture) -> None:
        """Nothing."""

    def close(self) -> None:
        """Nothing."""


class TensorBoardTracker:
    """Event files in ``RUN/tensorboard``; ``tensorboard --logdir runs`` shows all runs."""

    def __init__(self, folder: Path, *, start: int) -> None:
        """Open the folder; what was shown after ``start`` (before an interruption) is taken back."""
        # Imported here: processes that show nothing need not pay for it.
        from torch.utils.tensorboard import SummaryWriter

        # Steps after the checkpoint were shown before the interruption and will come again.
        self._writer = SummaryWriter(str(folder / "tensorboard"), purge_step=start + 1 if start else None)

    def scalars(self, step: int, numbers: dict[str, float]) -> None:
        """Each number is a curve."""
        for name, value in numbers.items():
            self._writer.add_scalar(name, value, step)

    def picture(self, step: int, name: str, picture: Picture) -> None:
        """A picture with a slider over the steps."""
        self._writer.add_image(name, picture, step, dataformats="HWC")

    def close(self) -> None:
        """Flush and close the file."""
        self._writer.close()


class OnlineTracker:
    """Weights & Biases or trackio, which share their interface."""

    def __init__(self, kind: str, folder: Path, config: TrackConfig, settings: dict[str, Any]) -> None:
        """Start or, for a run that goes on, resume."""
        self._module = importlib.import_module(kind)
        # Two parts: of runs/demo/superclass/encoder and runs/demo/random/encoder the last one says nothing.
        name = config.name or "/".join(folder.absolute().parts[-2:])
        # allow: goes on with a run that is known there, and begins one where none is.
        options: dict[str, Any] = {"project": config.project, "name": name, "config": settings, "resume": "allow"}
        if kind == "wandb":
            # Kept in the run directory: a run that goes on finds its curves again; --restart empties it and begins new ones.
            note = folder / "wandb-id.txt"
            if not note.is_file():
                write_text(note, uuid.uuid4().hex[:16] + "\n")
            options |= {"id": note.read_text(encoding="utf-8").strip(), "dir": str(folder)}
        self._module.init(**options)

    def scalars(self, step: int, numbers: dict[str, float]) -> None:
        """Each number is a curve."""
        self._module.log(dict(numbers), step=step)

    def picture(self, step: int, name: str, picture: Picture) -> None:
        """A picture at a step."""
        self._module.log({name: self._module.Image(picture)}, step=step)

    def close(self) -> None:
        """Upload what is pending."""
        self._module.finish()


def check_tracker(config: TrackConfig) -> None:
    """Refuse a tracker whose package is not installed, before anything starts.

    Raises:
        InputError: The package is missing.
    """
    package = _PACKAGE.get(config.kind)
    if package is not None and importlib.util.find_spec(package) is None:
        raise InputError(
            f"the package {package} is not installed",
            where=f"track.kind={config.kind}",
            mend=f"pip install {package}, or track.kind=none",
        )


def make_tracker(config: TrackConfig, folder: Path, *, start: Callable[[], int], settings: dict[str, Any]) -> Tracker:
    """Open the tracker of a run.

    Args:
        config: The recipe's track section.
        folder: Run directory.
        start: Updates that the run has behind it; asked only where it matters.
        settings: The resolved recipe, shown beside the curves.

    Raises:
        InputError: The package is missing.
    """
    check_tracker(config)
    if config.kind == "none":
        return NoTracker()
    if config.kind == "tensorboard":
        return TensorBoardTracker(folder, start=start())
    return OnlineTracker(config.kind, folder, config, settings)
