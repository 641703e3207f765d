"""What the report is made from: runs, their scores and their predictions, as plain data."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mmkit.eval.report.moved import Move


@dataclass(frozen=True)
class Published:
    """Figures that a paper gives for a system on this task; never one of the runs compared."""

    system: str
    metrics: dict[str, float]
    source: str
    conditions: str

    @property
    def key(self) -> str:
        """The whole entry as text: two of the same content are one."""
        return repr(self)


@dataclass(frozen=True)
class Score:
    """One entry of ``scores.json``: metrics as stored, with intervals and the conditions they hold under.

    ``data`` is the run's data fingerprint and the tasks whose files it is of; None where the run tells none.
    """

    task: str
    metrics: dict[str, float]
    ci95: dict[str, tuple[float, float]]
    n: int
    settings: dict[str, Any]
    per_sample: list[dict[str, Any]]
    answers: dict[str, int] = field(default_factory=dict)
    published: list[Published] = field(default_factory=list)
    breakdown: dict[str, dict[str, dict[str, float]]] = field(default_factory=dict)
    data: tuple[str, frozenset[str]] | None = None

    @property
    def notes(self) -> list[str]:
        """What a reader should know before trusting the numbers."""
        given = self.settings.get("notes") or []
        return [str(note) for note in given] if isinstance(given, list) else [str(given)]


@dataclass(frozen=True)
class Prediction:
    """One row of ``predictions.jsonl``.

    ``image_shown`` differs from ``image`` in blind runs; ``parsed`` is the answer that the suite read out of the text where
    it reads one; ``type`` is the answer's type or category.
    """

    task: str
    id: str
    image: str
    image_shown: str
    prompt: str
    text: str
    references: list[str]
    question: str | None
    score: dict[str, float]
    type: str = ""
    parsed: str | None = None


@dataclass(frozen=True)
class Run:
    """One run directory as read from disk; ``parents`` are the run directories its manifest leads to.

    ``imported`` names the program whose result file stands for the run, where it was not mmkit; ``move`` is where it was moved
    from.
    """

    path: Path
    name: str
    kind: str
    stage: str | None
    system: str | None
    manifest: dict[str, Any]
    recipe: str = ""
    metrics: list[dict[str, Any]] = field(default_factory=list)
    skipped: list[dict[str, Any]] = field(default_factory=list)
    scores: dict[str, Score] = field(default_factory=dict)
    predictions: list[Prediction] = field(default_factory=list)
    parents: list[Path] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    imported: str = ""
    move: Move | None = None
