"""MMBench (Liu et al. 2023): multiple choice, each question asked once for every rotation of its options.

Scored without a language model: an answer that names no option by its letter or text is wrong, and is counted. A question is
right when it is right in all its rotations (circular evaluation); beside it stands the accuracy of the unrotated rows alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from openpyxl import Workbook
from openpyxl.cell import WriteOnlyCell
from openpyxl.cell.cell import ILLEGAL_CHARACTERS_RE

from mmkit.config import TaskConfig
from mmkit.eval.examples import Example, Picture, fill_prompt, required
from mmkit.eval.result import Score, Settings, coverage, make_score, refuse_questions
from mmkit.eval.scorers.answer_files import match_answers
from mmkit.eval.scorers.choice import infer_option
from mmkit.eval.scorers.json_files import Source
from mmkit.eval.scorers.mmbench_table import TableRow, answer_of, pictures, read_mmbench_answers, read_table, shared_pictures
from mmkit.eval.statistics import Floats
from mmkit.eval.suites.parsed import breakdown, count_answers, part_means, sample_rows
from mmkit.eval.suites.suite import Predictions, Suite, question_rows
from mmkit.files import Writing, new_file

# LLaVA's convert_mmbench_for_submission.py: what is left out, and where the answers go.
_DROPPED = {"hint", "category", "source", "image", "comment", "l2-category"}
_PREDICTION_AT = 6
# A cell of a spreadsheet holds no more.
_LONGEST_CELL = 32767


@dataclass(frozen=True)
class TableExample(Example):
    """An example with its row of the table, which the submission file repeats."""

    cells: Mapping[str, str] = field(default_factory=dict, repr=False, compare=False)


def question_text(row: TableRow) -> str:
    """Hint, question and options on lines of their own, as LLaVA asks them."""
    hint = [row.cell("hint")] if row.cell("hint") else []
    return "\n".join([*hint, row.cell("question"), *map("{}. {}".format, row.options, row.options.values())])


def examples(config: TaskConfig) -> list[Example]:
    """An example for each row of the table, rotations included.

    Args:
        config: ``annotations`` is the TSV, pictures inside; for a test set it is ``questions`` and ``annotations`` is null.
            ``{question}`` in the prompt is hint, question and options.

    Raises:
        InputError: A broken table or picture.
    """
    rows = read_table(config.questions if config.annotations is None and config.questions else required(config, "annotations"))
    images = pictures(rows)
    return [
        TableExample(
            row.index,
            # Rotations share name and bytes, so that they are one picture.
            (Picture(f"mmbench {row.base}", images[row.index]),),
            fill_prompt(config, question=question_text(row)),
            row.cell("question"),
            [f"{answer_of(row)}. {row.options[answer_of(row)]}"] if config.annotations is not None else [],
            row.cell("category"),
            row.cells,
        )
        for row in rows
    ]


def submit(folder: Path, asked: Sequence[Example], predictions: Predictions) -> Path:
    """Write ``mmbench.xlsx``, which the server of opencompass takes: the table without some columns, answers at column 6.

    Args:
        folder: Where to write.
        asked: Examples of this suite.
        predictions: Answer of each example, by id.
    """
    tables = [e for e in asked if isinstance(e, TableExample)]
    # In the table's own order, as LLaVA's converter leaves them.
    columns = [name for name in tables[0].cells if name not in _DROPPED]
    columns.insert(_PREDICTION_AT, "prediction")
    # Rows are written as they come; cells of a whole table would take far more memory than its text.
    book = Workbook(write_only=True)
    sheet = book.create_sheet()
    sheet.append(columns)
    for e in tables:
        cells: list[Any] = []
        for name in columns:
            if name == "index":
                cells.append(e.id)
                continue
            text = predictions[e.id] if name == "prediction" else e.cells[name]
            # Control characters are no XML; nothing an answer says needs them.
            cell = WriteOnlyCell(sheet, ILLEGAL_CHARACTERS_RE.sub("", text)[:_LONGEST_CELL])
            # An answer that begins with "=" is no formula.
            cell.data_type = "s"
            cells.append(cell)
        sheet.append(cells)
    path = folder / "mmbench.xlsx"
    with Writing(path), new_file(path) as file:
        book.save(file)
    return path


def score_mmbench(task: str, predictions: Source, annotations: Source, questions: Source | None, s: Settings) -> Score:
    """Score MMBench, circular and vanilla.

    Args:
        task: Name for messages and for the result.
        predictions: See `mmkit.eval.scorers.mmbench_table.read_mmbench_answers`.
        annotations: See `mmkit.eval.scorers.mmbench_table.read_table`.
        questions: Must be None.
        s: Settings.

    Returns:
        The design's score object: ``accuracy`` is circular, ``accuracy_vanilla`` that of the unrotated rows. The bootstrap draws
        pictures with all their questions and rotations.

    Raises:
        InputError: See the readers; a row without an answer; or answers and rows that do not match.
    """
    refuse_questions(questions, task)
    table = read_table(annotations, images=False)
    # All answers are looked at before any file of predictions, so that a test table is told at once.
    truths = {row.index: answer_of(row) for row in table}
    found = read_mmbench_answers(predictions, table)
    ids, texts = match_answers(found, truths, predictions, allow_missing=s.allow_missing, kind="row")
    rows = [row for row in table if row.index in texts]
    letters = [infer_option(texts[row.index], row.options) for row in rows]
    right = [float(truths[row.index] == letter) for row, letter in zip(rows, letters, strict=True)]
    # A question, not a row, is what circular accuracy counts.
    hits = _circular(rows, right)
    bases = {row.index: row for row in table if row.index == row.base}
    vanilla = {row.index: value for row, value in zip(rows, right, strict=True) if row.index == row.base}
    # One value a question in either metric: a question whose unrotated row is unanswered has no vanilla one.
    parts = {
        "accuracy": np.array(list(hits.values())),
        "accuracy_vanilla": np.array([vanilla.get(base, np.nan) for base in hits]),
    }
    # Questions about one picture are answered well or badly together.
    shown = shared_pictures(table)
    clusters = [shown[base] for base in hits]
    metrics, intervals = part_means(parts, clusters, s)
    counts, notes = count_answers(
        [texts[i] for i in ids], unparsed=letters.count(None), means="count as wrong (the server would ask a language model)"
    )
    if all(row.index == row.base for row in table):
        notes.append(
            "the table has no rotations: its accuracy is vanilla, which is higher than the circular one that papers report"
        )
    short = _incomplete(table, rows)
    if short:
        notes.append(f"{short} of {len(hits)} questions lack an answer to some rotations, which makes circular accuracy too high")
    settings = {
        "rule": "static",
        "evaluator": "VLMEvalKit can_infer without a language model, circular",
        "questions": len(hits),
        "rotations": len(rows) - len(vanilla),
        "images": len(set(clusters)),
        "bootstrap": s.bootstrap,
        "seed": s.seed,
        **coverage(len(ids), len(table), s),
    }
    return make_score(
        task,
        metrics,
        intervals,
        settings=settings,
        per_sample=sample_rows(
            [row.index for row in rows], [letter or "" for letter in letters], _sample_scores(rows, right, hits)
        ),
        notes=notes,
        answers=counts,
        breakdown={
            "category": breakdown(list(hits.values()), [bases[base].cell("category") for base in hits]),
            "l2-category": breakdown(list(hits.values()), [bases[base].l2_category for base in hits]),
        },
    )


def _circular(rows: Sequence[TableRow], right: Sequence[float]) -> dict[int, float]:
    """Question -> 1 where all its rotations are right, in order of first appearance."""
    hits: dict[int, float] = {}
    for row, value in zip(rows, right, strict=True):
        hits[row.base] = min(value, hits.get(row.base, 1.0))
    return hits


def _sample_scores(rows: Sequence[TableRow], right: Sequence[float], hits: Mapping[int, float]) -> dict[str, Floats]:
    """``correct`` of every row; the two accuracies on one row a question, so that their means are the metrics."""
    seen: set[int] = set()
    out = np.full((len(rows), 3), np.nan)
    for line, row, value in zip(out, rows, right, strict=True):
        line[0] = value
        if row.base not in seen:
            line[1] = hits[row.base]
            seen.add(row.base)
        if row.index == row.base:
            line[2] = value
    return dict(zip(("correct", "accuracy", "accuracy_vanilla"), out.T, strict=True))


def _incomplete(table: Sequence[TableRow], rows: Sequence[TableRow]) -> int:
    """How many scored questions have fewer answered rotations than the table has."""
    scored = {row.index for row in rows}
    return len({row.base for row in table if row.index not in scored} & {row.base for row in rows})


SUITE = Suite("mmbench", examples, score_mmbench, question_rows, submit=submit)
