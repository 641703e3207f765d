"""MME's files: the benchmark's folder, the evaluation tool's ``<subtask>.txt``, and the forms in which answers come."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from mmkit.errors import InputError
from mmkit.eval.scorers.answer_files import TEXTS, Found, Row, add_answer, answer_rows, field, refuse_unknown, text_id
from mmkit.eval.scorers.json_files import Source, listed

PERCEPTION = ("existence", "count", "position", "color", "posters", "celebrity", "scene", "landmark", "artwork", "OCR")
COGNITION = ("commonsense_reasoning", "numerical_calculation", "text_translation", "code_reasoning")
SUBTASKS = (*PERCEPTION, *COGNITION)
PICTURES = (".jpg", ".jpeg", ".png")
# What ends a question: the benchmark's own, and what LLaVA writes in its place. Some questions have two spaces before it.
_ENDINGS = re.compile(r"\s*(Please answer yes or no\.|Answer the question using a single word or phrase\.)\s*$")


class Question(NamedTuple):
    """One question: its subtask, the name of its picture, its text with the ending, and yes or no."""

    subtask: str
    image: str
    text: str
    answer: str

    @property
    def pair(self) -> str:
        """The picture, which two questions share."""
        return f"{self.subtask}/{self.image}"


def split_ending(text: str) -> tuple[str, str]:
    """A question, and its ending with the spaces before it; the two joined are the text."""
    question = _ENDINGS.sub("", text)
    return question, text[len(question) :]


def bare_question(text: str) -> str:
    """A question without its ending and with single spaces, by which questions and answers are paired."""
    return " ".join(split_ending(text)[0].split())


def _lines(path: Path) -> list[tuple[str, list[str]]]:
    """``(file:line, columns)`` of a text file with tabs; blank lines are left out.

    Raises:
        InputError: It cannot be read, is not UTF-8, or is empty.
    """
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise InputError(f"cannot be read ({error.strerror})", where=path, mend="check the path") from None
    except UnicodeDecodeError as error:
        raise InputError(f"byte {error.start} is not UTF-8", where=path, mend="save the file as UTF-8") from None
    # Not splitlines, which breaks at characters that a response may hold.
    rows = [(f"{path}:{n}", line.rstrip("\r").split("\t")) for n, line in enumerate(text.split("\n"), start=1) if line.strip()]
    if not rows:
        raise InputError("the file is empty", where=path, mend="write or fetch it again")
    return rows


def _yes_no(text: str, where: str) -> str:
    """A ground truth in lower case."""
    answer = text.strip().lower()
    if answer not in {"yes", "no"}:
        raise InputError(f"ground truth {text!r:.30}, neither yes nor no", where=where, mend="fetch the file again")
    return answer


def read_benchmark(source: Source) -> dict[str, Question]:
    """Read questions and their ground truth.

    Args:
        source: ``MME_Benchmark_release_version`` (a folder for each subtask, its question files beside the pictures, or in
            ``questions_answers_YN`` and ``images``); or a folder of ``<subtask>.txt`` with picture, question and ground truth in
            columns: the evaluation tool's templates, or results.

    Returns:
        ``SUBTASK/PICTURE/1`` and ``/2`` -> question, by subtask in the official order.

    Raises:
        InputError: No subtask, a picture without exactly two questions, or broken lines.
    """
    root = Path(source) if isinstance(source, (str, Path)) else None
    # A single file would be one subtask, and its points no MME score.
    if root is None or not root.is_dir():
        raise InputError(
            "MME's annotations are a folder", where=source if root else "annotations", mend="give MME_Benchmark_release"
        )
    pairs: dict[tuple[str, str], list[tuple[str, Question]]] = {}
    for subtask in SUBTASKS:
        for where, question in _subtask(root, subtask):
            pairs.setdefault((subtask, question.image), []).append((where, question))
    if not pairs:
        raise InputError("no folder and no text file of a subtask", where=root, mend=f"known subtasks: {', '.join(SUBTASKS)}")
    # The official tool pairs lines by order and stops at an odd number; by picture the culprit has a name.
    for (subtask, image), found in pairs.items():
        if len(found) != 2:
            what = f"{len(found)} questions about {subtask}/{image}, not two"
            raise InputError(what, where=found[-1][0], mend="a picture's score needs its pair of questions")
    return {f"{q.pair}/{n}": q for found in pairs.values() for n, (_, q) in enumerate(found, start=1)}


def _subtask(root: Path, subtask: str) -> Iterable[tuple[str, Question]]:
    """``(file:line, question)`` of a subtask, in either layout; nothing where it is in neither."""
    table, folder = root / f"{subtask}.txt", root / subtask
    # A text file wins: in a folder of results there are no pictures to look for.
    if table.is_file():
        for where, columns in _lines(table):
            if len(columns) < 3:
                what = f"{len(columns)} columns, not picture, question and ground truth"
                raise InputError(what, where=where, mend="separate them by tabs; is the file cut off?")
            yield where, Question(subtask, columns[0], columns[1], _yes_no(columns[2], where))
    elif folder.is_dir():
        # Five subtasks keep texts and pictures apart, nine together.
        texts = folder / "questions_answers_YN"
        pictures = picture_names(root, subtask)
        for file in sorted((texts if texts.is_dir() else folder).glob("*.txt")):
            for where, columns in _lines(file):
                if len(columns) != 2:
                    what = f"{len(columns)} columns, not question and answer"
                    raise InputError(what, where=where, mend="separate them by a tab; is the file cut off?")
                # Scoring needs no pictures, so a guess at the name will do; asking refuses it.
                image = pictures.get(file.stem, f"{file.stem}.jpg")
                yield where, Question(subtask, image, columns[0], _yes_no(columns[1], where))


def picture_folder(root: Path, subtask: str) -> Path:
    """Where a subtask's pictures lie: some keep them in ``images``."""
    folder = root / subtask
    return folder / "images" if (folder / "images").is_dir() else folder


def picture_names(root: Path, subtask: str) -> dict[str, str]:
    """Stem -> file name of a subtask's pictures; some are JPEG, some PNG."""
    folder = picture_folder(root, subtask)
    if not folder.is_dir():
        return {}
    return {path.stem: path.name for path in sorted(folder.iterdir()) if path.suffix.lower() in PICTURES}


def read_mme_answers(source: Source, known: Mapping[str, Question]) -> dict[Any, Found]:
    """Read answers and pair them with the questions.

    Args:
        source: A folder of ``<subtask>.txt`` (picture, question, ground truth, response), mmkit's rows (``question_id`` as in
            ``known``), or LLaVA's (``question_id`` is subtask and picture; the question is in ``prompt``).
        known: The questions.

    Returns:
        Id -> answer.

    Raises:
        InputError: Lines that cannot be paired, repeated or unknown questions, missing or wrong fields, or a result file whose
            ground truth is another one.
    """
    by_text: dict[tuple[str, str, str], list[str]] = {}
    for key, question in known.items():
        # By stem: LLaVA's converter writes the name of the question file in place of the picture's.
        by_text.setdefault((question.subtask, Path(question.image).stem, bare_question(question.text)), []).append(key)
    if isinstance(source, (str, Path)) and Path(source).is_dir():
        return _tables(Path(source), known, by_text)
    found: dict[Any, Found] = {}
    for row in answer_rows(source, ("question_id",)):
        # mmkit's own ids first; only what is none of them may be LLaVA's.
        key = text_id(row, ("question_id",))
        if key not in known and "prompt" in row.data:
            key = _llava_id(row, key, by_text, found)
        add_answer(found, key, Found(row.where, field(row, TEXTS, str, who=f"question {key}")))
    refuse_unknown(found, known, "the benchmark")
    return found


def _llava_id(row: Row, name: str, by_text: Mapping[tuple[str, str, str], list[str]], found: Mapping[Any, Found]) -> str:
    """Our id of a row of LLaVA's, whose own is the same for both questions of a picture."""
    subtask, _, image = name.partition("/")
    text = bare_question(field(row, ("prompt",), str, who=f"question {name}"))
    return _next(by_text.get((subtask, Path(image).stem, text), []), found, f"{name} {text!r}")


def _next(keys: list[str], found: Mapping[Any, Found], unknown: str) -> str:
    """The first of these ids that has no answer yet: a picture may be asked the same thing twice."""
    return next((key for key in keys if key not in found), keys[-1] if keys else unknown)


def _tables(root: Path, known: Mapping[str, Question], by_text: Mapping[tuple[str, str, str], list[str]]) -> dict[Any, Found]:
    """Answers of the evaluation tool's text files."""
    found: dict[Any, Found] = {}
    # Only subtasks that the annotations have: a result folder may hold more.
    subtasks = list(dict.fromkeys(question.subtask for question in known.values()))
    absent = [subtask for subtask in subtasks if not (root / f"{subtask}.txt").is_file()]
    if len(absent) == len(subtasks):
        raise InputError(f"no {listed(f'{name}.txt' for name in absent)}", where=root, mend="give the folder of the results")
    for subtask in subtasks:
        # One that is absent is met later, as questions without an answer.
        for where, columns in _lines(root / f"{subtask}.txt") if subtask not in absent else []:
            if len(columns) != 4:
                what = f"{len(columns)} columns, not picture, question, ground truth and response"
                raise InputError(what, where=where, mend="separate them by tabs, and leave none inside a response")
            image, text, truth, response = columns
            place = (subtask, Path(image).stem, bare_question(text))
            key = _next(by_text.get(place, []), found, f"{subtask}/{image} {text!r}")
            add_answer(found, key, Found(where, response))
            if key in known and _yes_no(truth, where) != known[key].answer:
                what = f"ground truth {truth} of question {key} is {known[key].answer} in the annotations"
                raise InputError(what, where=where, mend="give the two of one version")
    refuse_unknown(found, known, "the benchmark")
    return found
