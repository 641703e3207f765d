"""Strict reading of answer files as the benchmarks' own programs write them: a JSON list, JSON lines, or one JSON object.

Every fault names file and line (JSON lines) or row (JSON list), and the id where the row has one.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Union

from mmkit.errors import InputError
from mmkit.eval.scorers.formats import match_results
from mmkit.eval.scorers.json_files import Source, json_line, json_lines, listed, load_json

# Names that the benchmarks' programs give to an answer: VLMEvalKit, MMMU, mmkit and VQA, LLaVA. In this order, because where
# one file has two, "answer" is the true one beside a prediction, and "text" the question beside an answer.
TEXTS = ("prediction", "response", "answer", "text")


class Row(NamedTuple):
    """One object of a file, and where it stands (``file:line``, or ``file: row 3``)."""

    where: str
    data: dict[str, Any]


class Found(NamedTuple):
    """One answer and where it stands; and the options that its row repeats, where a suite reads them."""

    where: str
    text: str
    options: Mapping[str, str] = {}


def read_rows(source: Source, label: str) -> Union[list[Row], dict[str, Any]]:
    """Read rows, whatever the ending of the file says: POPE's ``.json`` files hold JSON lines.

    Args:
        source: A path, or data already loaded.
        label: What to call it in messages.

    Returns:
        Rows of a list or of JSON lines; a file that is a single object is that object.

    Raises:
        InputError: Missing, empty, not UTF-8, not JSON, cut off, or rows that are no objects.
    """
    # By content: an ending tells nothing, and whole files and lines need different messages.
    lines = _lines(source) if isinstance(source, (str, Path)) else None
    if lines is not None:
        return [_row(where, json_line(text, where, last)) for where, text, last in lines]
    # A key twice in a file of answers by id is an answer twice, of which Python would take the last.
    data, name = load_json(source, label, unique=True)
    if isinstance(data, dict):
        return data
    if not isinstance(data, list) or not data:
        what = f"no rows in the file of {label}" if data == [] else f"{label} are {type(data).__name__}, not a list of rows"
        raise InputError(what, where=name, mend='write [{"question_id": ..., "answer": "..."}], or such rows one a line')
    return [_row(f"{name}: row {index}", row) for index, row in enumerate(data, start=1)]


def _lines(path: Union[str, Path]) -> list[tuple[str, str, bool]] | None:
    """The lines of a file of JSON lines; None where it is something else, or cannot be read (`load_json` says why)."""
    try:
        # Read twice where it is no file of lines, which costs less than one wrong message.
        return json_lines(Path(path).read_bytes().decode("utf-8-sig"), str(path))
    except (OSError, ValueError):
        return None


def _row(where: str, row: Any) -> Row:
    """A row that is an object."""
    if not isinstance(row, dict):
        raise InputError(f"a row is {type(row).__name__}, not an object", where=where, mend="write one object a question")
    return Row(where, row)


def answer_rows(source: Source, ids: Sequence[str], label: str = "predictions") -> list[Row]:
    """`read_rows` for files of one row a question, where a single object is a file of one row.

    Raises:
        InputError: See `read_rows`; or an object that is no row.
    """
    rows = read_rows(source, label)
    if isinstance(rows, list):
        return rows
    name = str(source) if isinstance(source, (str, Path)) else label
    if not any(key in rows for key in ids):
        what = f"one object without {' or '.join(ids)} is no file of {label}"
        raise InputError(what, where=name, mend="are predictions and annotations the wrong way round?")
    return [Row(f"{name}:1", rows)]


def field(row: Row, names: Sequence[str], kind: type, *, who: str = "") -> Any:
    """The first of these fields that a row has.

    Args:
        row: The row.
        names: Names of the field, the preferred one first.
        kind: Its type, ``str`` or ``int``.
        who: The question it belongs to, for the message.

    Raises:
        InputError: None is there, or its type is wrong.
    """
    # The first name that is there, even if its value is wrong: another field must not stand in for it unseen.
    found = [name for name in names if name in row.data]
    about = f"{who} " if who else ""
    if not found:
        needs = " or ".join(f'"{name}"' for name in names)
        raise InputError(f"{about}has no {needs}", where=row.where, mend=f"every row needs {needs}")
    value = row.data[found[0]]
    # True is a whole number to Python, and would be question 1.
    if not isinstance(value, kind) or isinstance(value, bool):
        of = "a text" if kind is str else "a whole number"
        raise InputError(f'{about}has "{found[0]}" {value!r:.40}, not {of}', where=row.where, mend=f"write {of}")
    return value


def text_id(row: Row, names: Sequence[str]) -> str:
    """An id that is a text, or a number where a program wrote it as one.

    Raises:
        InputError: There is none, or it is neither.
    """
    found = [name for name in names if name in row.data]
    # ScienceQA's ids are digits, which some programs write as numbers.
    if found and isinstance(row.data[found[0]], int) and not isinstance(row.data[found[0]], bool):
        return str(row.data[found[0]])
    return str(field(row, names, str))


def read_answers(source: Source, ids: Sequence[str], key: Callable[[Row, Sequence[str]], Any] = text_id) -> dict[Any, Found]:
    """Read a file of answers.

    Args:
        source: Rows with an id and a text under one of `TEXTS`.
        ids: Names of the id's field.
        key: Makes the id of a row.

    Returns:
        Id -> answer, in file order.

    Raises:
        InputError: See `read_rows`; a field is missing or of the wrong type, or an id comes twice.
    """
    found: dict[Any, Found] = {}
    for row in answer_rows(source, ids):
        # The id first, so that whatever else is wrong with the row is said with it.
        name = key(row, ids)
        add_answer(found, name, Found(row.where, field(row, TEXTS, str, who=f"question {name}")))
    return found


def add_answer(found: dict[Any, Found], key: Any, answer: Found) -> None:
    """Put an answer among those found.

    Raises:
        InputError: There is one already; taking the first or the last in silence would change the score.
    """
    if key in found:
        what = f"a second answer to question {key} (the first: {found[key].where})"
        raise InputError(what, where=answer.where, mend="keep one for each question")
    found[key] = answer


def refuse_unknown(found: Mapping[Any, Found], known: Collection[Any], name: str) -> None:
    """Refuse answers to questions that the benchmark does not have.

    Raises:
        InputError: There are some; with the place of the first.
    """
    # Never dropped in silence: unknown ids are the sign of another split or version.
    unknown = [key for key in found if key not in known]
    if unknown:
        what = f"answers to {len(unknown)} unknown questions: {listed(unknown)}"
        where = found[unknown[0]].where
        raise InputError(what, where=where, mend=f"drop them or give the annotations they belong to ({name} has none such)")


def match_answers(
    found: Mapping[Any, Found], known: Collection[Any], source: Source, *, allow_missing: bool, kind: str = "question"
) -> tuple[list[Any], dict[Any, str]]:
    """Check that every question has an answer.

    Args:
        found: Answers by id.
        known: Ids, in the order of scoring.
        source: What the answers were read from, for messages.
        allow_missing: Score what is there when some have none.
        kind: What the ids are of.

    Returns:
        The ids to score, and the text of each answer.

    Raises:
        InputError: See `mmkit.eval.scorers.formats.match_results`.
    """
    # From here on ids and texts alone matter; the places were for the messages above.
    texts = {key: answer.text for key, answer in found.items()}
    name = str(source) if isinstance(source, (str, Path)) else "predictions"
    return match_results(texts, known, kind=kind, name=name, allow_missing=allow_missing), texts
