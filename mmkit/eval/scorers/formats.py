"""Strict readers of the official file formats; every fault is one `InputError` that names file, row, field and cure.

Each reader takes a path or the data already loaded (a notebook's lists and dictionaries), and touches no other file.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from mmkit.errors import InputError
from mmkit.eval.scorers.json_files import Source, collector_paused, listed, load_json, refuse_repeated

# People asked about every question of VQA v2 and TextVQA; the M4C evaluator asserts it, and the scores rest on it.
ANSWERS = 10


class VqaQuestion(NamedTuple):
    """One question: its ids, its ten answer entries (none in a test set), what the files call its kind, and its text."""

    question_id: int | str
    image_id: int | str
    answers: list[dict[str, Any]]
    answer_type: str = ""
    question_type: str = ""
    question: str = ""


def _is_id(value: object) -> bool:
    """Whole numbers only: True is an int to Python, and would count as image 1."""
    return isinstance(value, int) and not isinstance(value, bool)


def _field_fault(row: Mapping[str, Any], field: str, kind: type) -> str | None:
    """Say what is wrong with a field that should be an id (int) or a text (str)."""
    if field not in row:
        return f'has no "{field}"'
    value = row[field]
    if kind is int:
        return None if _is_id(value) else f'has "{field}" {value!r:.40}, not a whole number'
    return None if isinstance(value, kind) else f'has "{field}" {value!r:.40}, not a text'


def check_rows(rows: Sequence[Any], fields: Mapping[str, type], *, kind: str, key: str, name: str) -> None:
    """Refuse rows that lack a field or hold the wrong type, naming each by its id, where it has one, and its number.

    Args:
        rows: The rows.
        fields: Field -> ``int`` (an id) or ``str``.
        kind: What a row is called in messages.
        key: The field that holds its id.
        name: The file, for messages.

    Raises:
        InputError: Some are wrong; the first five are named.
    """
    checks = list(fields.items())
    faults = []
    for index, row in enumerate(rows):
        # Exact types first: of 200,000 rows nearly all are right, and JSON has no subclasses.
        if type(row) is dict and all(type(row.get(field)) is of for field, of in checks):
            continue
        if not isinstance(row, dict):
            faults.append(f"{kind} number {index + 1} is {type(row).__name__}, not an object")
            continue
        # Cut at 40 characters, because a value of the wrong type can be of any size.
        who = f"{kind} {row[key]!r:.40}" if key in row else f"{kind} number {index + 1}"
        place = f" (row {index + 1})" if key in row else ""
        faults += [f"{who} {fault}{place}" for field, of in checks if (fault := _field_fault(row, field, of))]
    if faults:
        needs = ", ".join(f'"{field}" ({"whole number" if of is int else "text"})' for field, of in checks)
        raise InputError(listed(faults), where=name, mend=f"every {kind} needs {needs}")


def section(data: object, field: str, name: str, what: str) -> list[Any]:
    """Take a non-empty list out of an annotation file."""
    section = data.get(field) if isinstance(data, dict) else None
    if not isinstance(section, list):
        raise InputError(f'no list "{field}"; this is no {what} file', where=name, mend=f"give a {what} file")
    if not section:
        raise InputError(f'"{field}" is empty', where=name, mend=f"give a {what} file with at least one entry")
    return section


def read_captions(source: Source) -> dict[int, list[str]]:
    """Read COCO caption annotations.

    Args:
        source: ``{"images": [{"id"}], "annotations": [{"image_id", "id", "caption"}]}`` or a path to it.

    Returns:
        Image id -> reference captions, ascending by image id; captions in file order.

    Raises:
        InputError: Fields are missing or of the wrong type, an annotation's image is not listed, or an image has no
            caption.
    """
    data, name = load_json(source, "annotations")
    # All fields are checked before any is used, so that one message names every fault.
    images = section(data, "images", name, "COCO caption annotation")
    annotations = section(data, "annotations", name, "COCO caption annotation")
    check_rows(images, {"id": int}, kind="image", key="id", name=name)
    check_rows(annotations, {"image_id": int, "caption": str}, kind="annotation", key="id", name=name)
    refuse_repeated([image["id"] for image in images], kind="image", name=name)
    # Ascending, so that per-sample rows and bootstrap draws do not depend on the order of the file.
    references: dict[int, list[str]] = {image: [] for image in sorted(image["id"] for image in images)}
    # dict.fromkeys keeps the file's order, in which a reader will look for them; a set has none.
    unknown = dict.fromkeys(row["image_id"] for row in annotations if row["image_id"] not in references)
    if unknown:
        what = f'annotations refer to images that "images" does not list: {listed(unknown)}'
        raise InputError(what, where=name, mend="list those images or drop their annotations")
    for row in annotations:
        references[row["image_id"]].append(row["caption"])
    # No metric is defined without a reference.
    bare = [image for image, captions in references.items() if not captions]
    if bare:
        what = f"images without a caption: {listed(bare)}"
        raise InputError(what, where=name, mend="drop them from the images or add captions")
    return references


def read_results(
    source: Source, *, key: str, text: str, of: type = int, llava: tuple[str, str] | None = None
) -> tuple[dict[Any, str], str]:
    """Read an official result file.

    Args:
        source: ``[{key: id, text: str}]`` or a path to it; or such rows one a line.
        key: ``image_id`` or ``question_id``.
        text: ``caption`` or ``answer``.
        of: Type of the ids, ``int`` or ``str``.
        llava: Names of the two fields in LLaVA's answer files, where those have the official ids.

    Returns:
        Id -> text, and the name of the file for messages.

    Raises:
        InputError: Not a list, an empty one, fields missing or of the wrong type, or an id that comes twice.
    """
    data, name = load_rows(source)
    first = data[0] if isinstance(data, list) and data else None
    # By the first row: files are of one program, and a stray row is told with the names of the others.
    if llava is not None and isinstance(first, dict) and text not in first and llava[1] in first:
        key, text = llava
    return check_results(data, name, key=key, text=text, of=of), name


def load_rows(source: Source) -> tuple[Any, str]:
    """Load result rows, a list or one a line, to be checked by `check_results`.

    Returns:
        The data, and the name of the file for messages.

    Raises:
        InputError: See `mmkit.eval.scorers.json_files.load_json`.
    """
    data, name = load_json(source, "predictions", lines=True)
    # JSON lines of a single row are an object, in which no annotation file has an answer.
    one = isinstance(data, dict) and any(key in data for key in ("answer", "caption", "prediction", "text"))
    return [data] if one else data, name


def check_results(data: Any, name: str, *, key: str, text: str, of: type = int) -> dict[Any, str]:
    """As `read_results`, of data that is loaded already.

    Raises:
        InputError: See `read_results`.
    """
    shape = f'[{{"{key}": {"1" if of is int else chr(34) + "..." + chr(34)}, "{text}": "..."}}]'
    # Annotation files are objects: the message asks whether the two were swapped.
    if not isinstance(data, list):
        what = f"results are a JSON list, this is {type(data).__name__}"
        raise InputError(what, where=name, mend=f"write {shape}; are predictions and annotations the wrong way round?")
    if not data:
        raise InputError("no results in the file", where=name, mend=f"write {shape}")
    # The commonest slip of all has its own message: matched as they are, no id would be found.
    other = str if of is int else int
    odd = [row[key] for row in data if type(row) is dict and type(row.get(key)) is other]
    if odd:
        what = f'"{key}" is a {"string" if of is int else "number"} in {len(odd)} of {len(data)} rows: {listed(map(repr, odd))}'
        mend = "write ids as whole numbers, without quotes" if of is int else "write ids as texts"
        raise InputError(what, where=name, mend=mend)
    check_rows(data, {key: of, text: str}, kind="row", key=key, name=name)
    # Programs that write a prediction beside it mean the true one by "answer", and it would score 1.
    both = [row[key] for row in data if "prediction" in row or "response" in row] if text == "answer" else []
    if both:
        what = f'an "answer" and a "prediction" or "response" in the rows of {listed(both)}'
        raise InputError(what, where=name, mend='leave one text in each row, the model\'s, as "answer"')
    refuse_repeated([row[key] for row in data], kind=key.removesuffix("_id"), name=name)
    return {row[key]: row[text] for row in data}


def match_results(results: Mapping[Any, str], known: Collection[Any], *, kind: str, name: str, allow_missing: bool) -> list[Any]:
    """Check that results and annotations are about the same ids.

    Args:
        results: Id -> text.
        known: The annotated ids, in the order of scoring.
        kind: ``image`` or ``question``.
        name: The result file, for messages.
        allow_missing: Score what is there when some ids have no result.

    Returns:
        The ids to score, in the order of ``known``.

    Raises:
        InputError: A result for an unknown id; or an id without a result, unless allowed. Both are named at once.
    """
    unknown = [key for key in results if key not in known]
    # In the annotations' order: the same results in another order give the same rows and draws.
    scored = [key for key in known if key in results]
    missing = [key for key in known if key not in results]
    # Both faults together: who mends one and runs again should not meet the next.
    faults, cures = [], []
    if unknown:
        faults.append(f"results for {len(unknown)} unknown {kind}s: {listed(unknown)}")
        cures.append("drop them or give the annotations they belong to")
    # Not one known id: that file belongs to other data, whatever is allowed.
    if missing and not (allow_missing and scored):
        faults.append(f"{len(missing)} of {len(known)} {kind}s have no result: {listed(missing)}")
        cures.append("add them, or set allow_missing=true to score the rest")
    if faults:
        raise InputError("; ".join(faults), where=name, mend=", ".join(cures))
    return scored


@collector_paused()
def read_vqa(annotations: Source, questions: Source | None = None) -> dict[int, VqaQuestion]:
    """Read VQAv2 annotations and, where given, check them against their questions.

    Args:
        annotations: ``{"annotations": [{"question_id", "image_id", "answer_type", "question_type"?, "answers": [{"answer"}]}]}``.
        questions: ``{"questions": [{"question_id", "image_id", "question"}]}``.

    Returns:
        Question id -> question, in file order; its text where the questions are given.

    Raises:
        InputError: Fields missing or of the wrong type, other than ten answers, repeated ids, or questions and
            annotations about different ids.
    """
    data, name = load_json(annotations, "annotations")
    rows = section(data, "annotations", name, "VQA annotation")
    # multiple_choice_answer is not asked for: no rule uses it. The question type gives a breakdown, where there is one.
    fields = {"question_id": int, "image_id": int, "answer_type": str}
    typed = [row for row in rows if type(row) is dict and "question_type" in row]
    check_rows(rows, fields, kind="annotation", key="question_id", name=name)
    check_rows(typed, {"question_type": str}, kind="annotation", key="question_id", name=name)
    refuse_repeated([row["question_id"] for row in rows], kind="question", name=name)
    check_answers(rows, name, dict)
    asked = read_vqa_questions(questions) if questions is not None else {}
    # One comparison finds questions that either file lacks and those about another image.
    images = {row["question_id"]: row["image_id"] for row in rows} if asked else {}
    odd = [key for key in {**asked, **images} if key not in asked or asked[key].image_id != images.get(key)]
    if odd:
        what = f"questions and annotations ({name}) differ on question {listed(odd)}"
        where = str(questions) if isinstance(questions, (str, Path)) else "questions"
        raise InputError(what, where=where, mend="give the two files of the same split")
    # A dictionary keeps file order, and so does the result.
    return {
        (key := row["question_id"]): VqaQuestion(
            key,
            row["image_id"],
            row["answers"],
            row["answer_type"],
            row.get("question_type", ""),
            asked[key].question if asked else "",
        )
        for row in rows
    }


def read_vqa_questions(source: Source) -> dict[int, VqaQuestion]:
    """Read a VQAv2 question file, which is all there is of a test set.

    Args:
        source: ``{"questions": [{"question_id", "image_id", "question"}]}``.

    Returns:
        Question id -> question without answers, in file order.

    Raises:
        InputError: Fields missing or of the wrong type, or repeated ids.
    """
    data, name = load_json(source, "questions")
    rows = section(data, "questions", name, "VQA question")
    fields = {"question_id": int, "image_id": int, "question": str}
    check_rows(rows, fields, kind="question", key="question_id", name=name)
    refuse_repeated([row["question_id"] for row in rows], kind="question", name=name)
    return {row["question_id"]: VqaQuestion(row["question_id"], row["image_id"], [], question=row["question"]) for row in rows}


def check_answers(rows: Sequence[Mapping[str, Any]], name: str, kind: type, key: str = "question_id") -> None:
    """Refuse questions without exactly ten answers; with fewer, leave-one-out gives scores no paper means.

    Args:
        rows: Annotated questions.
        name: The file, for messages.
        kind: ``dict`` where an answer is ``{"answer": text}``, ``str`` where it is a text.
        key: The field that holds a question's id.

    Raises:
        InputError: Some have other than ten, or one that is no answer; the first five are named.
    """
    fits = _is_entry if kind is dict else _is_text
    if not any("answers" in row for row in rows):
        mend = "give an annotated split; a test set's answers are with its server"
        raise InputError('no question has "answers", as in the file of a test set', where=name, mend=mend)
    faults = []
    for index, row in enumerate(rows):
        answers = row.get("answers")
        # Only the shape: what an answer says, even nothing, is the rules' business.
        if isinstance(answers, list) and len(answers) == ANSWERS and all(map(fits, answers)):
            continue
        what = "no list of answers"
        if isinstance(answers, list):
            shape = '{"answer": text, "answer_id": number}' if kind is dict else "a text"
            what = f"{len(answers)} answers" if len(answers) != ANSWERS else f"an answer that is not {shape}"
        faults.append(f"question {row[key]} has {what} (row {index + 1})")
    if faults:
        raise InputError(listed(faults), where=name, mend=f"the rule needs exactly {ANSWERS} human answers a question")


def _is_text(answer: object) -> bool:
    """An answer of TextVQA."""
    return isinstance(answer, str)


def _is_entry(answer: object) -> bool:
    """An answer of VQAv2; an id that is a list could not be told apart from others."""
    return (
        isinstance(answer, dict)
        and isinstance(answer.get("answer"), str)
        and not isinstance(answer.get("answer_id"), (list, dict))
    )


def read_textvqa(source: Source, *, answers: bool = True) -> dict[int, VqaQuestion]:
    """Read TextVQA annotations (0.5.1 layout).

    Args:
        source: ``{"data": [{"question_id", "image_id", "question", "answers": [str] * 10}]}`` or a path to it.
        answers: Whether there are any; the file of the test set has none.

    Returns:
        Question id -> question, in file order.

    Raises:
        InputError: Fields missing or of the wrong type, other than ten answers, or repeated ids.
    """
    data, name = load_json(source, "annotations" if answers else "questions")
    rows = section(data, "data", name, "TextVQA")
    check_rows(rows, {"question_id": int, "question": str}, kind="entry", key="question_id", name=name)
    refuse_repeated([row["question_id"] for row in rows], kind="question", name=name)
    if answers:
        check_answers(rows, name, str)
    # Image ids are Open Images names here; without one, a question stands alone in the bootstrap.
    return {
        row["question_id"]: VqaQuestion(
            row["question_id"],
            str(row.get("image_id", f"question {row['question_id']}")),
            [{"answer": answer, "answer_id": n} for n, answer in enumerate(row["answers"], start=1)] if answers else [],
            question=row["question"],
        )
        for row in rows
    }
