"""MMMU (Yue et al. 2023): college questions of 30 subjects, multiple choice and open, with up to seven pictures.

Where the official parser finds no letter it draws one. Here such an answer is wrong (``accuracy``), and the official figure with
its seed 42 stands beside it (``accuracy_official_seed42``).
"""

from __future__ import annotations

import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mmkit.config import TaskConfig
from mmkit.errors import InputError
from mmkit.eval.examples import Example, Picture, fill_prompt, required
from mmkit.eval.result import Score, Settings, coverage, make_score, refuse_questions
from mmkit.eval.scorers.answer_files import Found, match_answers
from mmkit.eval.scorers.json_files import Source, listed
from mmkit.eval.scorers.mmmu import open_correct, parse_choice, parse_open
from mmkit.eval.scorers.mmmu_files import CHOICE, Truth, read_responses, read_truth, split_id
from mmkit.eval.suites.parsed import breakdown, count_answers, part_means, sample_rows
from mmkit.eval.suites.suite import Predictions, Suite
from mmkit.files import write_json

SEED = 42
SPLITS = ("validation", "dev", "test")
DISCIPLINES = {
    "Art and Design": ("Art", "Art_Theory", "Design", "Music"),
    "Business": ("Accounting", "Economics", "Finance", "Manage", "Marketing"),
    "Science": ("Biology", "Chemistry", "Geography", "Math", "Physics"),
    "Health and Medicine": (
        "Basic_Medical_Science",
        "Clinical_Medicine",
        "Diagnostics_and_Laboratory_Medicine",
        "Pharmacy",
        "Public_Health",
    ),
    "Humanities and Social Science": ("History", "Literature", "Sociology", "Psychology"),
    "Tech and Engineering": (
        "Agriculture",
        "Architecture_and_Engineering",
        "Computer_Science",
        "Electronics",
        "Energy_and_Power",
        "Materials",
        "Mechanical_Engineering",
    ),
}
_DISCIPLINE_OF = {subject: name for name, subjects in DISCIPLINES.items() for subject in subjects}
# How LLaVA's prompts of the two kinds of questions end.
ENDINGS = {
    True: "Answer with the option's letter from the given choices directly.",
    False: "Answer the question using a single word or phrase.",
}
_MARKER = re.compile(r"<image (\d)>")


@dataclass(frozen=True)
class MmmuExample(Example):
    """An example with what the official output file repeats of its question."""

    kind: str = CHOICE
    options: tuple[str, ...] = ()


def question_text(truth: Truth) -> str:
    """The question; of multiple choice, with the options on lines of their own and a blank one after them."""
    options = [f"({letter}) {option}" for letter, option in truth.options.items()]
    return "\n".join([truth.question, *options, *([""] if options else [])])


def place_pictures(prompt: str, images: Mapping[int, Picture]) -> tuple[str, tuple[Picture, ...]]:
    """Put a ``<image>`` where ``<image 1>`` stands in the prompt.

    Args:
        prompt: The prompt; a marker without a picture of its number stays as it is.
        images: Number -> picture.

    Returns:
        The prompt and its pictures in the order of their places. A picture named twice is shown twice; pictures that no marker
        names go to the front.
    """
    # Of the finished prompt: options name pictures, too.
    order = [int(number) for number in _MARKER.findall(prompt) if int(number) in images]
    unnamed = [number for number in images if number not in order]
    text = _MARKER.sub(lambda found: "<image>" if int(found[1]) in images else found[0], prompt)
    return "<image>\n" * len(unnamed) + text, tuple(images[number] for number in [*unnamed, *order])


def examples(config: TaskConfig) -> list[Example]:
    """An example for each question of the split.

    Args:
        config: ``annotations`` is the data set's folder, pictures inside; for the test split it is ``questions`` and
            ``annotations`` is null. ``settings: {split: dev}`` takes another split. In the prompt, ``{question}`` is question
            and options, ``{ending}`` LLaVA's ending for its kind.

    Raises:
        InputError: Broken tables, annotations without answers, or an answer file, which has no questions.
    """
    s = Settings({key: str(value) for key, value in config.settings.items()})
    hidden = config.annotations is None and config.questions is not None
    source = str(config.questions) if hidden else required(config, "annotations")
    if not Path(source).is_dir():
        raise InputError("questions and pictures are in the data set's folder", where=source, mend="give the folder of MMMU/MMMU")
    found: list[Example] = []
    known = read_truth(source, s.choice("split", SPLITS, "validation"), pictures=True)
    if not hidden:
        _refuse_hidden(known, source)
    for key, truth in known.items():
        # The answer file calls open questions short-answer, the tables open; only the other kind has one name.
        is_choice = truth.kind == CHOICE
        prompt, images = place_pictures(
            fill_prompt(config, question=question_text(truth), ending=ENDINGS[is_choice]), truth.images
        )
        gold = [truth.gold] if isinstance(truth.gold, str) else list(truth.gold)
        shown = [f"({letter}) {truth.options[letter]}" if is_choice else letter for letter in gold if letter]
        subject, _ = split_id(key)
        found.append(MmmuExample(key, images, prompt, truth.question, shown, subject, truth.kind, tuple(truth.options.values())))
    return found


def rows(asked: Sequence[Example], predictions: Predictions) -> list[dict[str, Any]]:
    """Rows of the official output.json, which can be scored against the answer file alone."""
    found = []
    for e in asked:
        row: dict[str, Any] = {"id": e.id, "response": predictions[e.id]}
        if isinstance(e, MmmuExample):
            options = _lettered(e.options)
            more = {"all_choices": list(options), "index2ans": options} if options else {}
            row = {"id": e.id, "question_type": e.kind, **more, "response": predictions[e.id]}
        found.append(row)
    return found


def _lettered(options: Sequence[str]) -> dict[str, str]:
    """Letter -> option."""
    return {chr(ord("A") + n): option for n, option in enumerate(options)}


def submit(folder: Path, asked: Sequence[Example], predictions: Predictions) -> Path:
    """Write ``mmmu.json``, what the EvalAI server takes: id -> letter, or text of an open question.

    An answer without a letter is written as it is, which the server counts as wrong; the official script draws a letter.

    Args:
        folder: Where to write.
        asked: Examples of this suite.
        predictions: Answer of each example, by id.
    """
    # Letters where one is found, since the server compares them and parses nothing.
    letters = {
        str(e.id): parse_choice(predictions[e.id], _lettered(e.options))
        for e in asked
        if isinstance(e, MmmuExample) and e.kind == CHOICE
    }
    path = folder / "mmmu.json"
    write_json(path, {str(e.id): letters.get(str(e.id)) or predictions[e.id] for e in asked})
    return path


def score_mmmu(task: str, predictions: Source, annotations: Source, questions: Source | None, s: Settings) -> Score:
    """Score MMMU, overall and by discipline, subject and kind of question.

    Args:
        task: Name for messages and for the result.
        predictions: See `mmkit.eval.scorers.mmmu_files.read_responses`.
        annotations: See `mmkit.eval.scorers.mmmu_files.read_truth`.
        questions: Must be None.
        s: Settings; ``split`` (validation, dev) of a data set's folder.

    Returns:
        The design's score object. Answers that a program has parsed already have no official seed's figure of their own.

    Raises:
        InputError: See the readers; a question without an answer or options; or answers and questions that do not match.
    """
    refuse_questions(questions, task)
    split = s.choice("split", SPLITS, "validation")
    known = read_truth(annotations, split)
    # Refused before the predictions are read: no file of answers can mend it.
    _refuse_hidden(known, annotations)
    found, parsed = read_responses(predictions, known)
    matched, texts = match_answers(found, known, predictions, allow_missing=s.allow_missing)
    # Subjects by name and questions by number: the order in which the official program draws.
    ids = sorted(matched, key=split_id)
    # Judged once; the official figure below only redraws what found no letter.
    results = [_judge(key, known[key], found[key], parsed) for key in ids]
    right = np.array([float(correct) for _, correct in results])
    parts = {"accuracy": right}
    lost = [letter is None for letter, _ in results]
    if not parsed:
        parts["accuracy_official_seed42"] = _official(ids, known, found, results)
    # Questions have their pictures to themselves.
    metrics, intervals = part_means(parts, ids, s)
    means = "are counted as wrong, where the official program draws a letter"
    counts, notes = count_answers([texts[key] for key in ids], unparsed=sum(lost), means=means)
    settings = {
        "rule": "official",
        "evaluator": f"MMMU eval_utils.py, bb0b95a{', answers parsed before' if parsed else ''}",
        **({"split": split} if isinstance(annotations, (str, Path)) and Path(annotations).is_dir() else {}),
        "bootstrap": s.bootstrap,
        "seed": s.seed,
        **coverage(len(ids), len(known), s),
    }
    return make_score(
        task,
        metrics,
        intervals,
        settings=settings,
        per_sample=sample_rows(ids, [letter or "" for letter, _ in results], parts),
        notes=notes,
        answers=counts,
        breakdown=_breakdown(ids, known, right.tolist()),
    )


def _refuse_hidden(known: Mapping[str, Truth], source: Source) -> None:
    """Refuse questions whose answers the server keeps."""
    hidden = [key for key, truth in known.items() if not truth.gold]
    if hidden:
        what = f"{len(hidden)} questions have no answer: {listed(hidden)}"
        mend = "a test split's are with its server: give the folder as questions, with annotations=null, and send it the file"
        raise InputError(what, where=source if isinstance(source, (str, Path)) else "annotations", mend=mend)


def _judge(key: str, truth: Truth, answer: Found, parsed: bool) -> tuple[str | None, bool]:
    """What was parsed out of an answer (None: no letter) and whether it is right."""
    if truth.kind != CHOICE:
        # Parsed files hold open answers as texts, so these are parsed here either way.
        candidates = parse_open(answer.text)
        gold = truth.gold if isinstance(truth.gold, str) else list(truth.gold)
        return " | ".join(map(str, candidates)), open_correct(gold, candidates)
    letter = answer.text if parsed else parse_choice(answer.text, _options(key, truth, answer))
    # Letters alone are letters: a parsed file may hold whole answers.
    if parsed and not (len(answer.text) == 1 and "A" <= answer.text <= "Z"):
        letter = None
    return letter, letter is not None and letter in ([truth.gold] if isinstance(truth.gold, str) else truth.gold)


def _options(key: str, truth: Truth, answer: Found) -> Mapping[str, str]:
    """The options of a question, from the data set or from the answer's row."""
    options = truth.options or answer.options
    if not options:
        what = f"question {key} is multiple choice, and neither file has its options"
        raise InputError(what, where=answer.where, mend="give the data set's folder, or rows with index2ans")
    return options


def _official(
    ids: Sequence[str], known: Mapping[str, Truth], found: Mapping[str, Found], results: Sequence[tuple[str | None, bool]]
) -> np.ndarray[Any, np.dtype[np.float64]]:
    """f64[N]: right or wrong with the official random letters; one generator for all subjects, as in one process."""
    # A generator of its own: the official module-level one gives the same letters, but could be used up by others.
    rng = random.Random(SEED)
    out = []
    for key, (letter, correct) in zip(ids, results, strict=True):
        if letter is None:
            drawn = rng.choice(list(_options(key, known[key], found[key])))
            correct = drawn in ([known[key].gold] if isinstance(known[key].gold, str) else known[key].gold)
        out.append(float(correct))
    return np.array(out)


def _breakdown(ids: Sequence[str], known: Mapping[str, Truth], right: Sequence[float]) -> dict[str, dict[str, dict[str, float]]]:
    """Accuracy by discipline, subject and kind of question; each mean is over questions, as the official overall one."""
    subjects = [split_id(key)[0] for key in ids]
    return {
        "discipline": breakdown(right, [_DISCIPLINE_OF.get(subject, "") for subject in subjects], list(DISCIPLINES)),
        "subject": breakdown(right, subjects),
        "question_type": breakdown(right, [CHOICE if known[key].kind == CHOICE else "open" for key in ids]),
    }


SUITE = Suite("mmmu", examples, score_mmmu, rows, options=("split",), submit=submit)
