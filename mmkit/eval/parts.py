"""Answers on disk as they come: an interrupted evaluation goes on from them.

Each process appends to a file of its own in the run directory, batch by batch; when all questions have their answer they become
``predictions.jsonl`` and the parts go.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mmkit.data.skipped import LeftOut
from mmkit.eval.examples import Id
from mmkit.run import append_jsonl, read_jsonl

_PATTERN = "predictions.part-*.jsonl"


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
    """

    texts: dict[Id, str] = field(default_factory=dict)
    from_cache: set[Id] = field(default_factory=set)
    cut: set[Id] = field(default_factory=set)
    lost: dict[Id, LeftOut] = field(default_factory=dict)
    speeds: dict[str, Speed] = field(default_factory=dict)

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


def remove_parts(run: Path) -> None:
    """Remove all parts, once ``predictions.jsonl`` has their rows."""
    for path in part_files(run):
        path.unlink(missing_ok=True)


def part_files(run: Path) -> Iterable[Path]:
    """The parts of a run."""
    return sorted(run.glob(_PATTERN))
