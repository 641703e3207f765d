"""What a suite is made of."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from mmkit.config import TaskConfig
from mmkit.eval.examples import Example, Id
from mmkit.eval.result import Score, Settings
from mmkit.eval.scorers.json_files import Source
from mmkit.files import write_json

Predictions = Mapping[Id, str]


class Scorer(Protocol):
    """Scores an official result file."""

    def __call__(self, task: str, predictions: Source, annotations: Source, questions: Source | None, s: Settings) -> Score:
        """The score object.

        Args:
            task: Name for messages and for the result.
            predictions: Official result file, or its loaded data.
            annotations: Official annotation file, or its loaded data.
            questions: Official question file, where the suite has one apart.
            s: Settings.

        Raises:
            InputError: A file is wrong, or a setting does not apply.
        """


@dataclass(frozen=True)
class Suite:
    """One benchmark.

    Attributes:
        name: As in ``mmkit score NAME`` and ``task:`` of a recipe.
        examples: A task's questions, in the order of its files. Without annotations (a test set whose answers the server
            keeps) they come from the question file and have no references.
        score: The official rule.
        rows: Content of the official result file, from predictions in the order of the examples.
        options: Names of the scorer settings that it takes, beside those of all suites (`mmkit.eval.result.Settings`).
        submit: Writes what the evaluation server takes into a folder and returns the file; None where no server exists.
        submit_options: Names of the settings that ``submit`` takes as keywords.
    """

    name: str
    examples: Callable[[TaskConfig], list[Example]]
    score: Scorer
    rows: Callable[[Sequence[Example], Predictions], Any]
    options: tuple[str, ...] = ()
    submit: Callable[..., Path] | None = None
    submit_options: tuple[str, ...] = ()

    def write_results(self, path: Path, examples: Sequence[Example], predictions: Predictions) -> None:
        """Write the official result file, which `score` reads.

        Args:
            path: The file; JSON.
            examples: What was asked.
            predictions: Answer of each example, by id.
        """
        write_json(path, self.rows(examples, predictions))

    def write_submission(
        self, folder: Path, examples: Sequence[Example], predictions: Predictions, settings: Mapping[str, Any] | None = None
    ) -> Path | None:
        """Write what the evaluation server takes.

        Args:
            folder: An existing folder.
            examples: What was asked.
            predictions: Answer of each example, by id.
            settings: The task's settings; those of scoring are passed over.

        Returns:
            The file; None for a suite without a server.
        """
        if self.submit is None:
            return None
        given = {key: value for key, value in (settings or {}).items() if key in self.submit_options and value is not None}
        return self.submit(folder, examples, predictions, **given)


def question_rows(examples: Sequence[Example], predictions: Predictions) -> list[dict[str, Any]]:
    """VQA's result rows, which most suites share: ``[{"question_id", "answer"}]``."""
    return [{"question_id": e.id, "answer": predictions[e.id]} for e in examples]
