"""ScienceQA (Lu et al. 2022): multiple-choice questions of school science, half of them with a picture.

Files: ``problems.json`` and ``pid_splits.json`` of the data set. Answers: LLaVA's JSON lines (``question_id``, ``text``), mmkit's
rows (``question_id``, ``answer``), or a result file with ``outputs``, the texts by id.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mmkit.config import TaskConfig
from mmkit.errors import InputError
from mmkit.eval.examples import Example, fill_prompt, picture_file, required
from mmkit.eval.result import Score, Settings, coverage, make_score, nearest, refuse_questions
from mmkit.eval.scorers.answer_files import Found, match_answers, read_answers, read_rows, refuse_unknown
from mmkit.eval.scorers.choice import LETTERS, SCIENCEQA_RULES
from mmkit.eval.scorers.json_files import Source, listed, load_json
from mmkit.eval.suites.parsed import breakdown, count_answers, part_means, sample_rows
from mmkit.eval.suites.suite import Suite, question_rows

EVALUATORS = {"llava": "LLaVA eval_science_qa.py, c121f04", "lmms": "lmms-eval scienceqa, 0.7"}
SUBSETS = ("all", "img")
_IDS = ("question_id", "id")
SUBJECTS = {"natural science": "natural", "social science": "social", "language science": "language"}


@dataclass(frozen=True)
class Problem:
    """One question; ``image`` is the file's name within the question's folder, or None."""

    question: str
    choices: tuple[str, ...]
    answer: int
    hint: str
    image: str | None
    subject: str
    grade: str

    @property
    def text(self) -> str:
        """Context, question and options on lines of their own, as LLaVA's llava_test_CQM-A.json has them."""
        context = [f"Context: {self.hint}"] if self.hint else []
        return "\n".join([*context, self.question, *map("{}. {}".format, LETTERS, self.choices)])

    @property
    def contexts(self) -> list[str]:
        """The official context classes of the question; text and image may both hold."""
        found = [name for name, held in (("text", self.hint), ("image", self.image)) if held]
        return found or ["no context"]

    @property
    def grades(self) -> str:
        """The official class of grades; empty for a grade outside 1 to 12."""
        digits = self.grade.removeprefix("grade")
        number = int(digits) if digits.isascii() and digits.isdigit() else 0
        return "G1-6" if 1 <= number <= 6 else "G7-12" if 7 <= number <= 12 else ""


def read_problems(source: Source, split: str) -> dict[str, Problem]:
    """Read the questions of a split.

    Args:
        source: The folder of ``problems.json`` and ``pid_splits.json``; or ``problems.json`` beside the other; or the loaded
            problems, whose ``split`` fields then stand for the second file.
        split: A split of ``pid_splits.json``.

    Returns:
        Id -> question, in the order of the split.

    Raises:
        InputError: A file or the split is missing, a question of the split is, or a field is missing or wrong.
    """
    # A folder and its main file mean the same: both files lie side by side.
    path = Path(source) if isinstance(source, (str, Path)) else None
    if path is not None and path.is_dir():
        path = path / "problems.json"
    problems, name = load_json(path if path is not None else source, "annotations", unique=True)
    if not isinstance(problems, dict) or not problems:
        raise InputError("no ScienceQA problems in it", where=name, mend="give problems.json, or its folder")
    ids = _split_ids(path.parent / "pid_splits.json", split) if path is not None else _own_split(problems, split, name)
    missing = [i for i in ids if i not in problems]
    if missing:
        raise InputError(f"no problem {listed(missing)} of split {split}", where=name, mend="give the two files of one release")
    # Of the split alone: a fault in a problem that nobody scores here is no reason to stop.
    faults = [f"problem {i} {fault}" for i in ids if (fault := _fault(problems[i]))]
    if faults:
        raise InputError(listed(faults), where=name, mend="fetch problems.json again")
    return {i: _problem(problems[i]) for i in ids}


def _problem(row: Mapping[str, Any]) -> Problem:
    """A problem whose fields have been checked."""
    subject, grade = (str(row.get(key) or "") for key in ("subject", "grade"))
    hint, image = row.get("hint") or "", row.get("image") or None
    return Problem(row["question"], tuple(row["choices"]), row["answer"], hint, image, subject, grade)


def _split_ids(path: Path, split: str) -> list[str]:
    """Ids of a split, in its order."""
    splits, name = load_json(path, "splits")
    if not isinstance(splits, dict) or not all(isinstance(ids, list) for ids in splits.values()):
        raise InputError("this is no pid_splits.json", where=name, mend="fetch it again")
    if split not in splits:
        raise InputError(f"no split {split!r}", where=name, mend=nearest(split, splits))
    # Texts, as the keys of problems.json: JSON has no other keys.
    ids = [str(i) for i in splits[split]]
    if not ids or len(set(ids)) < len(ids):
        what = f"split {split} names a problem twice" if ids else f"split {split} is empty"
        raise InputError(what, where=name, mend="fetch it again")
    return ids


def _own_split(problems: Mapping[str, Any], split: str, name: str) -> list[str]:
    """Ids of the problems that say they are of this split."""
    ids = [i for i, row in problems.items() if isinstance(row, dict) and row.get("split") == split]
    if not ids:
        raise InputError(f'no problem has "split" {split!r}', where=name, mend="give split=NAME, or the folder of the files")
    return ids


def _fault(row: Any) -> str:
    """What is wrong with a problem; empty if nothing."""
    if not isinstance(row, dict) or not isinstance(row.get("question"), str):
        return 'has no "question"'
    choices, answer = row.get("choices"), row.get("answer")
    if not isinstance(choices, list) or not choices or not all(isinstance(choice, str) for choice in choices):
        return 'has no list of "choices"'
    if len(choices) > len(LETTERS):
        return f"has {len(choices)} choices, more than {LETTERS}"
    if not isinstance(answer, int) or isinstance(answer, bool) or not 0 <= answer < len(choices):
        return f'has "answer" {answer!r:.20}, not the index of a choice'
    odd = [key for key in ("hint", "image") if not isinstance(row.get(key, ""), (str, type(None)))]
    return f'has "{odd[0]}" {row[odd[0]]!r:.20}, not a text' if odd else ""


def _chosen(problems: Mapping[str, Problem], subset: str) -> dict[str, Problem]:
    """The problems of a subset."""
    return {i: p for i, p in problems.items() if subset == "all" or p.image}


def examples(config: TaskConfig) -> list[Example]:
    """An example for each question of the split; ``settings: {subset: img}`` leaves out those without a picture.

    Args:
        config: ``annotations`` is the folder of the two files; ``image_root`` holds a folder for each question, as
            ``images/test`` of the data set. ``{question}`` in the prompt is context, question and options.

    Raises:
        InputError: Broken files, an unknown split or subset, or a picture's name that cannot be made.
    """
    # Asked about what is scored: split and subset are read from one place.
    s = Settings({key: str(value) for key, value in config.settings.items()})
    problems = read_problems(required(config, "annotations"), s.options.get("split", "test"))
    return [
        Example(
            i,
            (picture_file(config, i, f"{i}/{p.image}", "{}"),) if p.image else (),
            fill_prompt(config, question=p.text),
            p.question,
            [f"{LETTERS[p.answer]}. {p.choices[p.answer]}"],
            SUBJECTS.get(p.subject, p.subject),
        )
        for i, p in _chosen(problems, s.choice("subset", SUBSETS, "all")).items()
    ]


def _read_predictions(source: Source) -> dict[Any, Found]:
    """Answers by id: rows, or a result file's ``outputs``."""
    # Result files are one object, answer files are rows, of which a single one is an object as well.
    whole = read_rows(source, "predictions")
    if isinstance(whole, list) or any(key in whole for key in _IDS):
        return read_answers(source, _IDS)
    name = str(source) if isinstance(source, (str, Path)) else "predictions"
    outputs = whole.get("outputs")
    if not isinstance(outputs, dict) or not outputs:
        raise InputError('an object without "outputs" holds no answers', where=name, mend='give rows, or {"outputs": {id: text}}')
    odd = [i for i, text in outputs.items() if not isinstance(text, str)]
    if odd:
        raise InputError(f"outputs of {listed(odd)} are no texts", where=name, mend="write the model's answers")
    return {i: Found(name, text) for i, text in outputs.items()}


def score_scienceqa(task: str, predictions: Source, annotations: Source, questions: Source | None, s: Settings) -> Score:
    """Score ScienceQA answers, overall, with a picture, and by the official classes.

    Args:
        task: Name for messages and for the result.
        predictions: See the module. Answers to questions of the split outside the subset have no effect.
        annotations: See `read_problems`.
        questions: Must be None.
        s: Settings; ``rule`` (llava, lmms), ``subset`` (all, img) and ``split`` (test).

    Returns:
        The design's score object. Letters beyond the question's choices are wrong.

    Raises:
        InputError: See `read_problems` and `mmkit.eval.scorers.answer_files`.
    """
    refuse_questions(questions, task)
    rule, subset = s.choice("rule", SCIENCEQA_RULES, "llava"), s.choice("subset", SUBSETS, "all")
    split = s.options.get("split", "test")
    every = read_problems(annotations, split)
    known = _chosen(every, subset)
    if not known:
        raise InputError(f"no question of split {split} has a picture", where="subset", mend="use subset=all")
    found = _read_predictions(predictions)
    # Known is the whole split: LLaVA's one file of answers serves both subsets.
    refuse_unknown(found, every, f"split {split}")
    inside = {i: answer for i, answer in found.items() if i in known}
    ids, texts = match_answers(inside, known, predictions, allow_missing=s.allow_missing)
    more = {"split": split, "subset": subset, **coverage(len(ids), len(known), s)}
    return _score(task, {i: known[i] for i in ids}, texts, rule, s, more)


def _score(
    task: str, known: Mapping[str, Problem], texts: Mapping[str, str], rule: str, s: Settings, more: Mapping[str, Any]
) -> Score:
    """The score object of matched answers."""
    problems = list(known.values())
    letters = [SCIENCEQA_RULES[rule](texts[i]) for i in known]
    # Compared as letters: one beyond the choices equals no answer.
    right = np.array([LETTERS[p.answer] == letter for p, letter in zip(problems, letters, strict=True)], dtype=np.float64)
    pictured = np.array([bool(p.image) for p in problems])
    # The figure that papers call IMG stands beside the one over all questions.
    parts = {"accuracy": right}
    if more["subset"] == "all" and pictured.any():
        parts["accuracy_img"] = np.where(pictured, right, np.nan)
    # Every question has a picture of its own.
    metrics, intervals = part_means(parts, list(known), s)
    counts, notes = count_answers([texts[i] for i in known], unparsed=letters.count(None))
    settings = {"rule": rule, "evaluator": EVALUATORS[rule], **more, "bootstrap": s.bootstrap, "seed": s.seed}
    return make_score(
        task,
        metrics,
        intervals,
        settings=settings,
        per_sample=sample_rows(list(known), [letter or "" for letter in letters], parts),
        notes=notes,
        answers=counts,
        breakdown=_breakdown(problems, right.tolist()),
    )


def _breakdown(problems: Sequence[Problem], right: Sequence[float]) -> dict[str, dict[str, dict[str, float]]]:
    """Accuracy by subject, context and grade, the columns of the paper's tables."""
    # A question with text and picture counts in both columns.
    pairs = list(itertools.chain.from_iterable(((r, c) for c in p.contexts) for p, r in zip(problems, right, strict=True)))
    return {
        "subject": breakdown(right, [SUBJECTS.get(p.subject, p.subject) for p in problems], list(SUBJECTS.values())),
        "context": breakdown([r for r, _ in pairs], [c for _, c in pairs], ("text", "image", "no context")),
        "grade": breakdown(right, [p.grades for p in problems]),
    }


SUITE = Suite("scienceqa", examples, score_scienceqa, question_rows, options=("rule", "subset", "split"))
