"""MME (Fu et al. 2023): two yes/no questions about each picture, 14 subtasks, scored in points.

A subtask gives 100 x accuracy + 100 x accuracy+ (both questions of a picture right), perception up to 2000 points from ten
subtasks, cognition up to 800 from four.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from mmkit.config import TaskConfig
from mmkit.errors import InputError
from mmkit.eval.examples import Example, Picture, fill_prompt, required
from mmkit.eval.result import Score, Settings, coverage, make_score, refuse_questions
from mmkit.eval.scorers.answer_files import match_answers
from mmkit.eval.scorers.json_files import Source
from mmkit.eval.scorers.mme_files import (
    COGNITION,
    PERCEPTION,
    SUBTASKS,
    Question,
    picture_folder,
    picture_names,
    read_benchmark,
    read_mme_answers,
    split_ending,
)
from mmkit.eval.scorers.yesno import MME_RULES
from mmkit.eval.statistics import Floats, bootstrap_ci
from mmkit.eval.suites.parsed import count_answers, sample_rows
from mmkit.eval.suites.suite import Predictions, Suite, question_rows
from mmkit.files import new_folder

EVALUATORS = {"official": "MME eval_tool calculation.py", "lmms": "lmms-eval mme, 0.7"}
_COCO_DIGITS = 12
GROUPS = {"perception": PERCEPTION, "cognition": COGNITION}


def examples(config: TaskConfig) -> list[Example]:
    """An example for each question.

    Args:
        config: ``annotations`` is the benchmark's folder; the pictures lie there too, or below ``image_root`` in the same layout.
            In the prompt, ``{question}`` is the question without "Please answer yes or no.", which LLaVA replaces by its own
            ending; ``{ending}`` is that sentence with the spaces before it.

    Raises:
        InputError: Broken files, or a question without its picture.
    """
    annotations = required(config, "annotations")
    root = Path(config.image_root or annotations)
    # Folders are listed once a subtask, not once a question.
    known = read_benchmark(annotations)
    names = {subtask: picture_names(root, subtask) for subtask in {question.subtask for question in known.values()}}
    found = []
    for key, question in known.items():
        folder = picture_folder(root, question.subtask)
        # By stem, as results are paired: the text files of the evaluation tool may name another ending.
        name = names[question.subtask].get(Path(question.image).stem)
        if name is None:
            raise InputError(f"no picture of question {key}", where=folder, mend="give image_root=FOLDER of the benchmark")
        text, ending = split_ending(question.text)
        prompt = fill_prompt(config, question=text, ending=ending)
        found.append(Example(key, (Picture(str(folder / name)),), prompt, question.text, [question.answer], question.subtask))
    return found


def submit(folder: Path, asked: Sequence[Example], predictions: Predictions) -> Path:
    """Write ``mme/<subtask>.txt``, which the official evaluation tool takes.

    Args:
        folder: Where the folder ``mme`` is made.
        asked: What was asked.
        predictions: Answer of each example, by id.
    """
    # Complete or absent: half of the subtasks would give a sum that looks like a score.
    with new_folder(folder / "mme") as temporary:
        for subtask in dict.fromkeys(e.type for e in asked):
            lines = [
                "\t".join(
                    [
                        Path(e.images[0].name).name,
                        # Kept to the letter, double spaces too.
                        str(e.question),
                        e.references[0].capitalize(),
                        # The tool splits at tabs and line breaks, so an answer must hold none.
                        " ".join(predictions[e.id].split()),
                    ]
                )
                for e in asked
                if e.type == subtask
            ]
            (temporary / f"{subtask}.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder / "mme"


def score_mme(task: str, predictions: Source, annotations: Source, questions: Source | None, s: Settings) -> Score:
    """Score MME in points.

    Args:
        task: Name for messages and for the result.
        predictions: See `mmkit.eval.scorers.mme_files.read_mme_answers`.
        annotations: See `mmkit.eval.scorers.mme_files.read_benchmark`; for a folder of results, that folder itself will do.
        questions: Must be None.
        s: Settings; ``rule`` (official, lmms).

    Returns:
        The design's score object; metrics are points. Pictures are what the bootstrap draws, with all their questions.

    Raises:
        InputError: See the readers; or answers and questions that do not match.
    """
    refuse_questions(questions, task)
    rule = s.choice("rule", MME_RULES, "official")
    known = read_benchmark(annotations)
    found = read_mme_answers(predictions, known)
    ids, texts = match_answers(found, known, predictions, allow_missing=s.allow_missing)
    parsed = [MME_RULES[rule](texts[key]) for key in ids]
    right = [float(known[key].answer == answer) for key, answer in zip(ids, parsed, strict=True)]
    # Points need whole pairs; the rows of single answers are still shown.
    pairs = _whole_pairs(ids, known, right)
    if not pairs:
        raise InputError("no picture has answers to both its questions", where=task, mend="add the missing answers")
    subtasks = [subtask for subtask in SUBTASKS if any(pair.startswith(f"{subtask}/") for pair in pairs)]
    counters = _counters(pairs, subtasks)
    groups = [group for group, names in GROUPS.items() if set(names) & set(subtasks)]

    def statistic(sums: Floats) -> Floats:
        points = _points(sums)
        # cumsum adds one after the other, as the official program does: the same to the last digit.
        parts = [points[:, [name in GROUPS[group] for name in subtasks]].cumsum(axis=1) for group in groups]
        return np.stack([part[:, -1] for part in parts], axis=1)

    metrics = dict(zip(groups, statistic(counters.sum(axis=0, keepdims=True))[0].tolist(), strict=True))
    clusters = [_picture(pair) for pair in pairs]
    intervals = bootstrap_ci(counters, statistic, clusters=clusters, resamples=s.bootstrap, seed=s.seed) if s.bootstrap else None
    counts, notes = count_answers([texts[key] for key in ids], unparsed=parsed.count(None))
    return make_score(
        task,
        metrics,
        intervals,
        settings={
            "rule": rule,
            "evaluator": EVALUATORS[rule],
            "unit": "points",
            "images": len(set(clusters)),
            "bootstrap": s.bootstrap,
            "seed": s.seed,
            **coverage(len(ids), len(known), s),
        },
        per_sample=sample_rows(ids, [answer or "other" for answer in parsed], {"accuracy": np.array(right)}),
        notes=[*notes, *_notes(subtasks, len(ids) - 2 * len(pairs))],
        answers=counts,
        breakdown={"subtask": _breakdown(subtasks, counters.sum(axis=0))},
    )


def _whole_pairs(ids: Sequence[str], known: Mapping[str, Question], right: Sequence[float]) -> dict[str, list[float]]:
    """Picture -> what its two questions score; without pictures of a single answer, for which accuracy+ is not defined."""
    pairs: dict[str, list[float]] = {}
    for key, value in zip(ids, right, strict=True):
        pairs.setdefault(known[key].pair, []).append(value)
    return {pair: values for pair, values in pairs.items() if len(values) == 2}


def _picture(pair: str) -> str:
    """What the bootstrap draws: a picture with the questions of every subtask that shows it.

    Existence, count, position and color take theirs from COCO under COCO's own names; other subtasks number theirs from 1, and
    equal names mean nothing there.
    """
    stem = Path(pair.partition("/")[2]).stem
    return stem if len(stem) == _COCO_DIGITS and stem.isdigit() else pair


def _counters(pairs: Mapping[str, Sequence[float]], subtasks: Sequence[str]) -> Floats:
    """f64[P, 3 S]: right answers, pairs wholly right, and pictures (always one) of each picture, in its subtask's columns."""
    out = np.zeros((len(pairs), 3 * len(subtasks)))
    for row, (pair, values) in enumerate(pairs.items()):
        start = 3 * subtasks.index(pair.partition("/")[0])
        out[row, start : start + 3] = sum(values), sum(values) == 2, 1
    return out


def _points(sums: Floats) -> Floats:
    """f64[B, 3 S] counters -> f64[B, S] points of each subtask; NaN where a draw holds none of its pictures."""
    # Columns of one subtask stand together, so every third is of one kind.
    right, both, pictures = sums[:, 0::3], sums[:, 1::3], sums[:, 2::3]
    with np.errstate(invalid="ignore"):
        return right / (2 * pictures) * 100 + both / pictures * 100


def _breakdown(subtasks: Sequence[str], sums: Floats) -> dict[str, dict[str, float]]:
    """Points, accuracy, accuracy+ and number of questions of each subtask."""
    points = _points(sums[None])[0]
    return {
        name: {
            "points": float(value),
            "accuracy": float(right / (2 * pictures)),
            "accuracy_plus": float(both / pictures),
            "n": int(2 * pictures),
        }
        for name, value, (right, both, pictures) in zip(subtasks, points, sums.reshape(-1, 3), strict=True)
    }


def _notes(subtasks: Sequence[str], halves: int) -> list[str]:
    """What a reader should know before trusting the points."""
    notes = [
        f"{group} is the sum of {len(names) - len(lacking)} of {len(names)} subtasks: no {', '.join(lacking)}"
        for group, names in GROUPS.items()
        # A group of which there is nothing has no figure to warn of.
        if (lacking := [name for name in names if name not in subtasks]) and len(lacking) < len(names)
    ]
    if halves:
        notes.append(f"{halves} answers give no points: their pictures' other question has none")
    return notes


SUITE = Suite("mme", examples, score_mme, question_rows, options=("rule",), submit=submit)
