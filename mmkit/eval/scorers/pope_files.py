"""POPE's label files and the forms in which its answers come, paired by id and never by the order of lines alone."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from mmkit.errors import InputError
from mmkit.eval.scorers.answer_files import TEXTS, Found, Row, add_answer, answer_rows, field, read_rows, refuse_unknown
from mmkit.eval.scorers.json_files import Source

SPLITS = ("random", "popular", "adversarial")


class Label(NamedTuple):
    """One question with its answer."""

    split: str
    image: str
    text: str
    label: str


def _split_in(name: str) -> str | None:
    """The split that a file name or a category names."""
    found = [split for split in SPLITS if split in name.lower()]
    return found[0] if len(found) == 1 else None


def _files(source: Source, label: str) -> dict[str, Source]:
    """Split -> its file: of a folder, of one file, or of loaded data by split (``{"random": rows}``)."""
    if isinstance(source, dict) and source and set(source) <= set(SPLITS):
        return dict(source)
    if not isinstance(source, (str, Path)):
        what = f"loaded {label} are {type(source).__name__}, not rows by split"
        raise InputError(what, where=label, mend=f"give {{split: rows}} with splits of {', '.join(SPLITS)}")
    # From here on it is a path: the split can only be in the names.
    path = Path(source)
    paths = sorted(p for p in path.iterdir() if p.suffix in {".json", ".jsonl"}) if path.is_dir() else [path]
    found: dict[str, Source] = {}
    for file in paths:
        # Official names are coco_pope_SPLIT.json; models' answers are named in all sorts of ways around the split.
        split = _split_in(file.name)
        # Other files of the folder (other data sets' labels name the same splits, and are met below).
        if split is None and path.is_dir():
            continue
        if split is None:
            what = f"the name of the file says none of {', '.join(SPLITS)}"
            raise InputError(what, where=file, mend="name it as the official ones: coco_pope_random.json")
        if split in found:
            raise InputError(f"two files of split {split}: {found[split]} and {file}", where=path, mend="keep one a split")
        found[split] = file
    if not found:
        raise InputError(
            f"no {label} file of {', '.join(SPLITS)}", where=path, mend="put coco_pope_random.json and its like there"
        )
    # In the official order, whatever the names sort to.
    return {split: found[split] for split in SPLITS if split in found}


def read_labels(source: Source) -> dict[str, Label]:
    """Read labels.

    Args:
        source: A folder with a file for each split, one such file, or loaded rows by split.

    Returns:
        ``SPLIT/ID`` -> question, in the order of the files.

    Raises:
        InputError: No file of a split, or rows with missing or wrong fields or a repeated id.
    """
    found: dict[str, Label] = {}
    for split, file in _files(source, "labels").items():
        rows = read_rows(file, f"{split} labels")
        if not isinstance(rows, list):
            raise InputError("labels are rows, this is one object", where=file, mend="give the official JSON lines")
        for row in rows:
            # Ids start at 1 in every split, which is why the split is part of ours.
            number = field(row, ("question_id",), int)
            key, who = f"{split}/{number}", f"question {number}"
            if key in found:
                raise InputError(f"{who} comes twice", where=row.where, mend="keep one label for each question")
            label = field(row, ("label",), str, who=who)
            if label not in {"yes", "no"}:
                raise InputError(
                    f"{who} has label {label!r:.20}, neither yes nor no", where=row.where, mend="fetch the file again"
                )
            found[key] = Label(split, field(row, ("image",), str, who=who), field(row, ("text",), str, who=who), label)
    return found


def read_pope_answers(source: Source, known: Mapping[str, Label], questions: Source | None) -> dict[Any, Found]:
    """Read answers and pair them with the labels.

    Args:
        source: One file of rows that name their split as ``category`` (mmkit's); the official files, one a split, in a folder;
            the answers of a single split; or LLaVA's answers, for which ``questions`` is needed.
        known: The labels.
        questions: LLaVA's question file: its ids run through all splits.

    Returns:
        ``SPLIT/ID`` -> answer.

    Raises:
        InputError: Rows that cannot be paired, repeated or unknown ids, missing or wrong fields.
    """
    if questions is not None:
        return _llava_answers(source, known, questions)
    splits = list(dict.fromkeys(label.split for label in known.values()))
    if _by_split(source):
        parts = _files(source, "answers")
    else:
        # A single split needs no name: there is nothing to confuse it with.
        parts = {splits[0] if len(splits) == 1 else "": source}
    found: dict[Any, Found] = {}
    for split, part in parts.items():
        # Either may be all that a row has to show what it answers.
        rows = answer_rows(part, ("question_id", "question"))
        if all("question_id" not in row.data for row in rows):
            _in_order(rows, split, known, found)
            continue
        for row in rows:
            number = field(row, ("question_id",), int)
            key = f"{_category(row, split, splits)}/{number}"
            _same_question(row, key, known)
            add_answer(found, key, Found(row.where, field(row, TEXTS, str, who=f"question {key}")))
    refuse_unknown(found, known, "the labels")
    return found


def _by_split(source: Source) -> bool:
    """Whether the answers come as one file a split."""
    if isinstance(source, (str, Path)):
        return Path(source).is_dir()
    return isinstance(source, dict) and bool(source) and set(source) <= set(SPLITS)


def _category(row: Row, split: str, splits: list[str]) -> str:
    """The split of a row: its own word, or that of its file."""
    if "category" not in row.data and split:
        return split
    # Guessing a split from the id alone would score a third of the answers against the wrong labels.
    named = row.data.get("category")
    if named not in SPLITS or (split and named != split):
        what = f"question {row.data['question_id']} has " + (f'"category" {named!r:.20}' if named else 'no "category"')
        expected = split or ", ".join(splits)
        # LLaVA's rows have the prompt and ids of their own, which its question file explains.
        mend = (
            "give LLaVA's question file as questions" if "prompt" in row.data else "ids repeat across the splits: name the split"
        )
        raise InputError(f"{what}; the labels are of {expected}", where=row.where, mend=mend)
    return str(named)


def _same_question(row: Row, key: str, known: Mapping[str, Label]) -> None:
    """Refuse an answer that repeats another question than its label's: shifted files would score as chance."""
    asked = row.data.get("question")
    if key in known and isinstance(asked, str) and asked.strip() != known[key].text.strip():
        what = f"question {key} is {asked!r:.60} here and {known[key].text!r:.60} in the labels"
        raise InputError(what, where=row.where, mend="give labels and answers of one version")


def _in_order(rows: list[Row], split: str, known: Mapping[str, Label], found: dict[Any, Found]) -> None:
    """Official answers without ids: by order, but only where each repeats its label's question."""
    keys = [key for key, label in known.items() if not split or label.split == split]
    if not split and len({known[key].split for key in keys}) > 1:
        mend = "give them as one file a split, or with question_id and category"
        raise InputError("answers without question_id, and labels of several splits", where=rows[0].where, mend=mend)
    if len(rows) != len(keys):
        what = f"{len(rows)} answers without question_id to {len(keys)} questions: one missing line shifts all after it"
        raise InputError(what, where=rows[-1].where, mend="write question_id into every row")
    for key, row in zip(keys, rows, strict=True):
        # Without the question nothing would show that a line is missing here and doubled there.
        field(row, ("question",), str, who=f"the answer to {key}")
        _same_question(row, key, known)
        add_answer(found, key, Found(row.where, field(row, TEXTS, str, who=f"question {key}")))


def _llava_answers(source: Source, known: Mapping[str, Label], questions: Source) -> dict[Any, Found]:
    """LLaVA's answers: its question file says split, picture and question of each id."""
    rows = read_rows(questions, "questions")
    if not isinstance(rows, list):
        raise InputError("LLaVA's questions are rows, this is one object", where="questions", mend="give llava_pope_test.jsonl")
    # Picture and question together are unique within a split; LLaVA's ids are its own.
    by_question = {(label.split, label.image, label.text.strip()): key for key, label in known.items()}
    keys: dict[Any, str] = {}
    for row in rows:
        number = field(row, ("question_id",), int)
        who = f"question {number}"
        if number in keys:
            raise InputError(f"{who} comes twice", where=row.where, mend="keep one row for each question")
        # The prompt's ending stands on a line of its own.
        text = field(row, ("text",), str, who=who).split("\n")[0].strip()
        place = (field(row, ("category",), str, who=who), field(row, ("image",), str, who=who), text)
        # A question of a split without labels here keeps a name that is in no label file.
        keys[number] = by_question.get(place, f"{place[0]}/LLaVA {number}")
    found: dict[Any, Found] = {}
    for row in answer_rows(source, ("question_id",)):
        number = field(row, ("question_id",), int)
        if number not in keys:
            raise InputError(
                f"question {number} is not in the question file", where=row.where, mend="give the file it was made from"
            )
        add_answer(found, keys[number], Found(row.where, field(row, TEXTS, str, who=f"question {number}")))
    refuse_unknown(found, known, "the labels")
    return found
