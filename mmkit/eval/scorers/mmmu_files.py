"""MMMU's files: the data set's parquet tables, ``answer_dict_val.json``, and the forms in which answers come."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Union

import pyarrow as pa
import pyarrow.parquet as pq

from mmkit.errors import InputError
from mmkit.eval.examples import Picture
from mmkit.eval.scorers import answer_files
from mmkit.eval.scorers.answer_files import TEXTS, Found, Row, add_answer, read_rows, refuse_unknown
from mmkit.eval.scorers.json_files import Source, load_json

CHOICE = "multiple-choice"
# A question's pictures at most.
IMAGES = 7
_IDS = ("id", "question_id")
_ID = re.compile(r"(?:dev|validation|test)_(.+)_(\d+)")


def split_id(key: str) -> tuple[str, int]:
    """Subject and number of ``validation_Art_Theory_7``; an empty subject where the id has another shape."""
    found = _ID.fullmatch(key)
    return (found[1], int(found[2])) if found else ("", 0)


@dataclass(frozen=True)
class Truth:
    """One question.

    Attributes:
        kind: ``multiple-choice``, or anything else for an open question.
        gold: The letter, or the accepted answers; empty where the server keeps it.
        options: Letter -> text; empty for open questions, and where the file has none.
        question: Its text; empty where the file has none.
        images: Number -> picture, as ``<image 1>`` in the texts means them.
    """

    kind: str
    gold: Union[str, tuple[str, ...]]
    options: Mapping[str, str] = field(default_factory=dict)
    question: str = ""
    images: Mapping[int, Picture] = field(default_factory=dict)


def read_truth(source: Source, split: str, *, pictures: bool = False) -> dict[str, Truth]:
    """Read questions or their answers.

    Args:
        source: The data set's folder (``<subject>/<split>-*.parquet``), or ``answer_dict_val.json``.
        split: ``dev``, ``validation`` or ``test``; an answer file has one split only.
        pictures: Read them, too.

    Returns:
        Id -> question, by subject.

    Raises:
        InputError: No such split, a broken file, fields missing or of the wrong type, or a repeated id.
    """
    if isinstance(source, (str, Path)) and Path(source).is_dir():
        found: dict[str, Truth] = {}
        for where, row in _table_rows(Path(source), split, pictures):
            key, truth = _truth(where, row)
            if key in found:
                raise InputError(f"question {key} comes twice", where=where, mend="keep one table a subject")
            found[key] = truth
        return found
    # The answer file of the official repository: ids, kinds and answers, nothing to ask with.
    data, name = load_json(source, "annotations", unique=True)
    if not isinstance(data, dict) or not data:
        raise InputError("no answers by id in it", where=name, mend="give answer_dict_val.json, or the data set's folder")
    for key, entry in data.items():
        gold = entry.get("ground_truth") if isinstance(entry, dict) else None
        texts = gold if isinstance(gold, list) else [gold]
        if not texts or not all(isinstance(text, str) for text in texts) or not isinstance(entry.get("question_type"), str):
            what = f"question {key} needs question_type and ground_truth, both texts"
            raise InputError(what, where=name, mend="fetch answer_dict_val.json again")
    return {
        key: Truth(entry["question_type"], gold if isinstance(gold := entry["ground_truth"], str) else tuple(gold))
        for key, entry in data.items()
    }


def _table_rows(folder: Path, split: str, pictures: bool) -> Iterator[tuple[str, dict[str, Any]]]:
    """``(file: row n, row)`` of a split's tables, by path."""
    # At any depth: the hub's layout has a folder a subject, copies often one table.
    paths = sorted(folder.rglob(f"{split}-*.parquet"))
    if not paths:
        what = f"no {split}-*.parquet below it"
        raise InputError(what, where=folder, mend="download MMMU/MMMU there: a folder of tables for each subject")
    columns = ["id", "question", "options", "answer", "question_type"]
    for path in paths:
        try:
            # Pictures are nearly all of a table, and scoring needs none.
            names = set(pq.read_schema(path).names)
            wanted = columns + [f"image_{n}" for n in range(1, IMAGES + 1) if pictures and f"image_{n}" in names]
            lacking = [column for column in columns if column not in names]
            rows = [] if lacking else pq.read_table(path, columns=wanted).to_pylist()
        except (pa.ArrowException, OSError) as error:
            raise InputError(
                f"cannot be read ({str(error).splitlines()[0]})", where=path, mend="download it again, whole"
            ) from None
        if lacking:
            raise InputError(f"no column {', '.join(lacking)}", where=path, mend="give the tables of MMMU/MMMU")
        yield from ((f"{path}: row {n}", row) for n, row in enumerate(rows, start=1))


def _truth(where: str, row: Mapping[str, Any]) -> tuple[str, Truth]:
    """Id and question of a table's row."""
    # Checked before use, since a null in a table gives no error until much later.
    odd = [key for key in ("id", "question", "answer", "question_type") if not isinstance(row[key], str)]
    who = row["id"] if isinstance(row["id"], str) else "a row"
    if odd:
        raise InputError(f"{who} has no text in {', '.join(odd)}", where=where, mend="download the table again")
    options = _texts(row["options"])
    if options is None or (row["question_type"] == CHOICE and not options):
        what = f"{who} has options {row['options']!r:.40}, not a list of texts"
        raise InputError(what, where=where, mend="download the table again")
    # The data set has no letters; A, B, C in order of the options are the official ones.
    letters = {chr(ord("A") + n): option for n, option in enumerate(options)}
    answer = row["answer"]
    # The test split writes "?" for what its server keeps.
    gold: Union[str, tuple[str, ...]] = "" if answer == "?" else answer
    if row["question_type"] != CHOICE and answer.startswith("[") and (several := _texts(answer)):
        gold = tuple(several)
    elif row["question_type"] == CHOICE and gold and gold not in letters:
        what = f"{who} has answer {answer!r:.20}, none of {', '.join(letters)}"
        raise InputError(what, where=where, mend="download the table again")
    images = {n: _picture(where, who, n, value) for n in range(1, IMAGES + 1) if (value := row.get(f"image_{n}")) is not None}
    return row["id"], Truth(row["question_type"], gold, letters, row["question"], images)


def _texts(value: Any) -> list[str] | None:
    """A list of texts, or its Python spelling as MMMU's tables have it; None where it is neither."""
    if isinstance(value, str):
        try:
            # The tables hold Python's spelling of a list; literal_eval runs nothing.
            value = ast.literal_eval(value)
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            return None
    # Numbers among the options are options all the same.
    return [str(item) for item in value] if isinstance(value, (list, tuple)) else None


def _picture(where: str, who: str, number: int, value: Any) -> Picture:
    """A picture of a row, named by question and number."""
    # Tables of the hub's image type hold a struct, older ones the bytes alone.
    data = value.get("bytes") if isinstance(value, dict) else value
    if not isinstance(data, bytes) or not data:
        what = f"image_{number} of {who} has no bytes"
        raise InputError(what, where=where, mend="download the table again: pictures are inside")
    return Picture(f"{who} image {number}", data)


def read_responses(source: Source, known: Mapping[str, Truth]) -> tuple[dict[str, Found], bool]:
    """Read answers.

    Args:
        source: The official forms: ``<subject>/output.json`` in a folder, or one such list; or an object of id -> letter or
            text, already parsed; or mmkit's rows (``question_id``, ``answer``).
        known: The questions.

    Returns:
        Id -> answer, and whether they are parsed already.

    Raises:
        InputError: No file, fields missing or of the wrong type, repeated or unknown ids.
    """
    found: dict[str, Found] = {}
    # Ids are unique across subjects, so files of a folder simply add up.
    for part in _parts(source):
        rows = read_rows(part, "predictions")
        if isinstance(rows, dict) and not any(key in rows for key in _IDS):
            return _parsed(rows, part, known), True
        name = str(part) if isinstance(part, (str, Path)) else "predictions"
        for row in rows if isinstance(rows, list) else [Row(f"{name}:1", rows)]:
            key = answer_files.field(row, _IDS, str)
            text = answer_files.field(row, TEXTS, str, who=f"question {key}")
            add_answer(found, key, Found(row.where, text, _row_options(row, key)))
    refuse_unknown(found, known, "MMMU's answers")
    return found, False


def _parts(source: Source) -> list[Source]:
    """The files of a folder of results, or the source itself."""
    if not (isinstance(source, (str, Path)) and Path(source).is_dir()):
        return [source]
    files: list[Source] = [*sorted(Path(source).glob("*/output.json"))]
    if not files:
        raise InputError("no <subject>/output.json in it", where=source, mend="give the folder of the outputs")
    return files


def _parsed(data: Mapping[str, Any], part: Source, known: Mapping[str, Truth]) -> dict[str, Found]:
    """Answers that a program has parsed: letters, and texts of open questions."""
    name = str(part) if isinstance(part, (str, Path)) else "predictions"
    odd = [key for key, text in data.items() if not isinstance(text, str)]
    if odd or not data:
        what = f"the answer to {odd[0]} is {data[odd[0]]!r:.30}, not a text" if odd else "no answers in it"
        raise InputError(what, where=name, mend='write {"validation_Art_1": "B", ...}')
    found = {key: Found(name, text, {}) for key, text in data.items()}
    refuse_unknown(found, known, "MMMU's answers")
    return found


def _row_options(row: Row, key: str) -> dict[str, str]:
    """The options that a row of an official output repeats; empty if none."""
    options = row.data.get("index2ans") or {}
    if not isinstance(options, dict) or not all(isinstance(text, str) for text in options.values()):
        raise InputError(
            f'question {key} has "index2ans" that is no object of texts', where=row.where, mend="write letter -> text"
        )
    return options
