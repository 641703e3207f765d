"""Which runs speak for which system, and what holds for their scores."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from mmkit.eval.report.runs import Prediction, Run, Score


@dataclass(frozen=True)
class Row:
    """A system and the runs that speak for it."""

    label: str
    runs: list[Run]

    @property
    def scores(self) -> dict[str, Score]:
        """Task name -> score over all runs of the row."""
        return {task: score for run in self.runs for task, score in run.scores.items()}

    @property
    def predictions(self) -> list[Prediction]:
        """Predictions of all runs of the row."""
        return [p for run in self.runs for p in run.predictions]

    def run_of(self, task: str) -> Run:
        """The run that scored `task`."""
        return next(run for run in self.runs if task in run.scores)


@dataclass(frozen=True)
class Condition:
    """One setting of one task, and the systems it holds for (all of the task's when `systems` is empty)."""

    name: str
    value: str
    systems: list[str]


def system_rows(runs: Sequence[Run]) -> list[Row]:
    """One row per system in the order of first mention.

    Runs of one system merge (a captioner and an MLLM) unless two of them score the same task: then each keeps its own row,
    with the run's name behind the system's.

    Args:
        runs: Eval runs, or probe runs.

    Returns:
        The rows.
    """
    groups: dict[str, list[Run]] = {}
    for run in runs:
        # A run without a label speaks for itself alone.
        groups.setdefault(run.system or run.name, []).append(run)
    rows = []
    for label, members in groups.items():
        tasks = [task for run in members for task in run.scores]
        # Two scores of one task in one row would hide one of them.
        if len(tasks) == len(set(tasks)):
            rows.append(Row(label, members))
        else:
            rows.extend(Row(f"{label} ({run.name})", [run]) for run in members)
    return rows
