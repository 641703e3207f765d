"""Tasks: which pictures, which questions, which references."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Sequence
from pathlib import Path

from mmkit.config import TaskConfig
from mmkit.errors import InputError
from mmkit.eval.examples import Example
from mmkit.eval.score import check_task_settings
from mmkit.eval.suites import find_suite


def check_places(tasks: Sequence[TaskConfig]) -> None:
    """Refuse tasks whose files are not where they say, all at once: a list of nine tasks is mended in one go.

    Raises:
        InputError: A file or folder is missing; names each with its key.
    """
    missing = [
        f"tasks.{i}.{key} {place}"
        for i, task in enumerate(tasks)
        for key in ("annotations", "questions", "image_root")
        if (place := getattr(task, key)) is not None and not Path(place).exists()
    ]
    if missing:
        # Relative paths of shipped tasks start with $DATA, or `data` where mmkit is started.
        mend = f"set DATA, or give those keys; paths are relative to {Path.cwd()}"
        raise InputError(f"no such file or folder: {', '.join(missing)}", where="tasks", mend=mend)


def load_task(config: TaskConfig) -> list[Example]:
    """All examples of a task, in the order of its files.

    Raises:
        InputError: Broken files, an image name that cannot be made, or settings that scoring would refuse.
    """
    check_task_settings(config)
    return find_suite(config.task).examples(config)[: config.limit]


def shuffle_pictures(examples: list[Example], seed: int) -> list[Example]:
    """The blind baseline: every picture is replaced by another one, all questions of a picture by the same other one.

    Raises:
        InputError: Fewer than two pictures.
    """
    # Pictures are shuffled, not questions: another question about the same picture could take its place.
    pictures = list(dict.fromkeys(picture for e in examples for picture in e.images))
    if len(pictures) < 2:
        raise InputError("blind needs at least two pictures", where="blind", mend="use a larger limit")
    shuffled = pictures.copy()
    random.Random(seed).shuffle(shuffled)
    # A cycle through all pictures leaves none in its place.
    other = dict(zip(shuffled, shuffled[1:] + shuffled[:1], strict=True))
    return [dataclasses.replace(e, images=tuple(other[picture] for picture in e.images)) for e in examples]
