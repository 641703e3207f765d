"""Answers on disk as they come: an interrupted evaluation goes on from them.

Each process appends to a file of its own in the run directory, batch by batch; when all questions have their answer they become
``predictions.jsonl`` and the parts go. Where the scoring of a finished run changes, they come back from there.
"""

from __future__ import annotations

import json
import logging
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mmkit.data.skipped import LeftOut
from mmkit.errors import InputError
from mmkit.eval.examples import Id
from mmkit.files import read_json, write_text
from mmkit.run import append_jsonl, read_jsonl

logger = logging.getLogger(__name__)
_PATTERN = "predictions.part-*.jsonl"
# Settings of a score that tell how its answers were made.
_MADE = ("batch_size", "cache", "answers_from_cache", "speed")


@dataclass
class Speed:
    """What answering took on one process.

    Attributes:
        answers: Written by the model: not those of another run.
        seconds: From the first question to the last answer.
        pictures: Encoded.
        batch_size: Questions answered together, at the end.
    """

    answers: int = 0
    seconds: float = 0.0
    pictures: int = 0
    batch_size: int = 0


@dataclass
class Answers:
    """What is known of a task.

    Attributes:
        texts: Answers by id; empty ones of pictures that cannot be used, too.
        from_cache: Ids of those that another run had written.
        cut: Ids of those that reached the longest length before their end.
        lost: Questions whose picture could not be used when it was tried last.
        speeds: One for each process and start.
        settings: Of the score that a finished run had, as far as they tell how its answers were made.
    """

    texts: dict[Id, str] = field(default_factory=dict)
    from_cache: set[Id] = field(default_factory=set)
    cut: set[Id] = field(default_factory=set)
    lost: dict[Id, LeftOut] = field(default_factory=dict)
    speeds: dict[str, Speed] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)

    @property
    def left_out(self) -> list[LeftOut]:
        """The lost questions as ``skipped.jsonl`` lists them."""
        return list(self.lost.values())

    def speed(self) -> dict[str, Any]:
        """Speed of all processes together, as a score's settings have it; empty where the model wrote nothing."""
        speeds = [speed for speed in self.speeds.values() if speed.answers]
        if not speeds:
            return {}
        return {
            # Processes work at the same time, starts one after the other; both are summed within a process's own file.
            "answers_per_second": round(sum(s.answers / max(s.seconds, 1e-9) for s in speeds), 2),
            "pictures_encoded": sum(s.pictures for s in speeds),
            "batch_size_used": min(s.batch_size for s in speeds),
            "processes": len(speeds),
        }


class Part:
    """The file of one process."""

    def __init__(self, run: Path, rank: int) -> None:
        self.path = run / _PATTERN.replace("*", f"{rank:05d}")

    def add(self, task: str, texts: Mapping[Id, str], *, cut: Collection[Id] = (), from_cache: bool = False) -> None:
        """Append answers; on return they survive the end of the process.

        Args:
            task: Name of the task.
            texts: Answers by id.
            cut: Those that reached the longest length before their end.
            from_cache: Whether another run had written them.
        """
        rows: list[dict[str, Any]] = [{"task": task, "id": i, "prediction": text} for i, text in texts.items()]
        for row in rows:
            # Only where it is so: most rows have neither.
            row |= {"from_cache": True} if from_cache else {}
            row |= {"cut": True} if row["id"] in cut else {}
        # append_jsonl repairs what a kill cut off, so the next row begins on a line of its own.
        append_jsonl(self.path, rows)

    def leave_out(self, task: str, rows: Mapping[Id, LeftOut]) -> None:
        """Append questions that get an empty answer, since a picture of theirs cannot be used."""
        append_jsonl(self.path, [{"task": task, "id": i, "prediction": "", "left_out": row.row()} for i, row in rows.items()])

    def took(self, task: str, speed: Speed) -> None:
        """Append what answering took."""
        append_jsonl(self.path, [{"task": task, "speed": vars(speed)}])


def read_parts(run: Path) -> dict[str, Answers]:
    """Task -> all that any process has appended; a last line that a kill cut off is no answer."""
    found: dict[str, Answers] = defaultdict(Answers)
    for path in sorted(run.glob(_PATTERN)):
        for row in read_jsonl(path):
            _take(found[row["task"]], row, path.name)
    return found


def _take(answers: Answers, row: dict[str, Any], part: str) -> None:
    """Take in one row of a part."""
    if "settings" in row:
        answers.settings |= row["settings"]
        return
    if "speed" in row:
        new, speed = row["speed"], answers.speeds.setdefault(part, Speed())
        speed.answers += new["answers"]
        speed.seconds += new["seconds"]
        speed.pictures += new["pictures"]
        speed.batch_size = new["batch_size"]
        return
    if "left_out" in row:
        # Another start, whose part may come first by name, may have found the picture in order.
        if row["id"] not in answers.texts or row["id"] in answers.lost:
            answers.lost[row["id"]] = LeftOut(**row["left_out"])
            answers.texts[row["id"]] = ""
        return
    answers.texts[row["id"]] = row["prediction"]
    answers.lost.pop(row["id"], None)
    if row.get("from_cache"):
        answers.from_cache.add(row["id"])
    if row.get("cut"):
        answers.cut.add(row["id"])


def restore_parts(run: Path, prompts: Mapping[str, Mapping[Id, str]]) -> None:
    """Make a part of what a finished run keeps, so that its answers can be scored again.

    Complete or absent, and in step with ``predictions.jsonl`` whenever a kill comes: until the run is begun anew it counts as
    finished, and the part goes.

    Args:
        run: Run directory with ``predictions.jsonl``, ``scores.json`` and, where pictures were lost, ``skipped.jsonl``: those
            are tried again, as by every start.
        prompts: What each task asks now, by id: a setting may choose other questions, and their answers are not there.

    Raises:
        InputError: One of the two is gone, or was edited.
    """
    try:
        rows, scores = read_jsonl(run / "predictions.jsonl"), read_json(run / "scores.json")["tasks"]
        lost = {row["key"] for row in read_jsonl(run / "skipped.jsonl")}
        kept: list[dict[str, Any]] = [
            {"task": row["task"], "id": row["id"], "prediction": row["prediction"], **({"cut": True} if "cut" in row else {})}
            for row in rows
            if prompts.get(row["task"], {}).get(row["id"]) == row["prompt"] and (row["prediction"] or str(row["id"]) not in lost)
        ]
    except (OSError, ValueError, KeyError, TypeError) as error:
        what = f"predictions.jsonl or scores.json cannot be scored again ({type(error).__name__}: {error})"
        raise InputError(what, where=run, mend="start anew with --restart; answers of earlier runs are kept") from None
    count = Counter(row["task"] for row in kept)
    for task, score in scores.items():
        # How fast and with which batches is told by the run that answered, as long as nothing is left to ask.
        if count[task] == len(prompts.get(task, {})):
            kept.append({"task": task, "settings": {key: score["settings"][key] for key in _MADE if key in score["settings"]}})
    write_text(run / _PATTERN.replace("*", f"{0:05d}"), "".join(json.dumps(row) + "\n" for row in kept))
    logger.info("%s: scored again; its %d answers stay", run, count.total())


def remove_parts(run: Path) -> None:
    """Remove all parts, once ``predictions.jsonl`` has their rows."""
    for path in part_files(run):
        path.unlink(missing_ok=True)


def part_files(run: Path) -> Iterable[Path]:
    """The parts of a run."""
    return sorted(run.glob(_PATTERN))
