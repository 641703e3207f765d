"""MMBench: circular and vanilla accuracy, pictures by reference, the submission file, and one clear line for every bad file."""

from __future__ import annotations

import base64
import csv
import io
import json
from pathlib import Path
from typing import Any

import pytest
from openpyxl import Workbook, load_workbook
from PIL import Image

from mmkit.config import TaskConfig
from mmkit.errors import InputError
from mmkit.eval.score import score
from mmkit.eval.suites import find_suite
from mmkit.eval.tasks import load_task

COLUMNS = [
    "index",
    "question",
    "hint",
    "A",
    "B",
    "C",
    "D",
    "answer",
    "category",
    "image",
    "source",
    "l2-category",
    "comment",
    "split",
]


def picture(colour: str) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (8, 8), colour).save(file, "PNG")
    return file.getvalue()


def row(index: int, options: str, answer: str, image: str, **more: Any) -> dict[str, Any]:
    letters = dict(zip("ABCD", options.split(), strict=False))
    base = index % 1_000_000
    return {
        "index": index,
        "question": f"Which, {base}?",
        "hint": "",
        **{letter: letters.get(letter, "") for letter in "ABCD"},
        "answer": answer,
        "category": "colour" if base == 1 else "place",
        "image": image,
        "source": "made",
        "l2-category": "perception",
        "comment": "",
        "split": "dev",
        **more,
    }


def rows() -> list[dict[str, Any]]:
    """Question 1 has two options, question 2 three; rotations take their picture from the first row."""
    one, two = (base64.b64encode(picture(colour)).decode() for colour in ("red", "blue"))
    return [
        row(1, "red green", "A", one, hint='A "quoted"\thint'),
        row(2, "left right middle", "C", two),
        row(1_000_001, "green red", "B", "1"),
        row(1_000_002, "middle left right", "A", "2"),
        row(2_000_002, "right middle left", "B", "2"),
    ]


def write(path: Path, table: list[dict[str, Any]]) -> Path:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(table[0]), delimiter="\t")
        writer.writeheader()
        writer.writerows(table)
    return path


def answers(**said: str) -> list[dict[str, Any]]:
    right = {1: "A", 2: "C", 1_000_001: "B", 1_000_002: "A", 2_000_002: "B"}
    return [{"question_id": key, "answer": said.get(f"_{key}", letter)} for key, letter in right.items()]


def refusal(*args: Any, **settings: Any) -> str:
    with pytest.raises(InputError) as caught:
        score("mmbench", *args, **settings)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_circular_needs_every_rotation(tmp_path: Path) -> None:
    table = write(tmp_path / "t.tsv", rows())
    assert score("mmbench", answers(), table)["metrics"] == {"accuracy": 1, "accuracy_vanilla": 1}
    found = score("mmbench", answers(_2000002="A"), table)
    assert found["metrics"] == {"accuracy": 0.5, "accuracy_vanilla": 1}
    assert found["breakdown"] == {
        "category": {"colour": {"accuracy": 1, "n": 1}, "place": {"accuracy": 0, "n": 1}},
        "l2-category": {"perception": {"accuracy": 0.5, "n": 2}},
    }
    assert found["n"] == 5 and found["settings"]["questions"] == 2 and found["settings"]["rotations"] == 3
    # One row a question carries the headline figure: rows that compare systems mean the same as the metric.
    assert [r.get("accuracy") for r in found["per_sample"]] == [1, 0, None, None, None]
    assert [r.get("accuracy_vanilla") for r in found["per_sample"]] == [1, 1, None, None, None]
    assert [r["correct"] for r in found["per_sample"]] == [1, 1, 1, 1, 0]
    # Of the two questions either may be drawn twice, always with all its rotations.
    assert found["ci95"] == {"accuracy": [0, 1], "accuracy_vanilla": [1, 1]}
    found = score("mmbench", answers(_1="B"), table)
    assert found["metrics"] == {"accuracy": 0.5, "accuracy_vanilla": 0.5}


def test_undecided_answers_are_wrong_and_counted(tmp_path: Path) -> None:
    table = write(tmp_path / "t.tsv", rows())
    found = score("mmbench", answers(_1="it is red", _2="I do not know", _1000002=""), table)
    assert [r["parsed"] for r in found["per_sample"]] == ["A", "", "B", "", "B"]
    assert found["metrics"] == {"accuracy": 0.5, "accuracy_vanilla": 0.5}
    assert found["answers"] == {"total": 5, "empty": 1, "long": 0, "unparsed": 2, "defaulted": 0}
    assert any("2 of 5 answers could not be parsed" in note for note in found["settings"]["notes"])


def test_a_table_without_rotations(tmp_path: Path) -> None:
    table = write(tmp_path / "t.tsv", rows()[:2])
    found = score("mmbench", answers(_2="A")[:2], table)
    assert found["metrics"] == {"accuracy": 0.5, "accuracy_vanilla": 0.5} and found["settings"]["rotations"] == 0
    assert any(note.startswith("the table has no rotations: its accuracy is vanilla") for note in found["settings"]["notes"])


def test_forms_of_answers_and_tables_agree(tmp_path: Path) -> None:
    table = write(tmp_path / "t.tsv", rows())
    said = answers(_2="A")
    by_rows = score("mmbench", said, table)
    llava = tmp_path / "a.jsonl"
    llava.write_text(
        "".join(json.dumps({"question_id": r["question_id"], "round_id": 0, "text": r["answer"]}) + "\n" for r in said)
    )
    assert score("mmbench", llava, table) == by_rows
    vlmevalkit = [{"index": r["question_id"], "prediction": r["answer"]} for r in said]
    assert score("mmbench", vlmevalkit[::-1], table) == by_rows
    assert score("mmbench", said, rows()) == by_rows
    config = TaskConfig(task="mmbench", annotations=str(table))
    sheet = find_suite("mmbench").submit(tmp_path, load_task(config), {r["question_id"]: r["answer"] for r in said})
    assert score("mmbench", sheet, table) == by_rows


def test_submission_has_the_columns_of_llavas(tmp_path: Path) -> None:
    table = write(tmp_path / "t.tsv", rows())
    asked = load_task(TaskConfig(task="mmbench", annotations=str(table)))
    said = {e.id: text for e, text in zip(asked, ("=A1+1", "C", "B\x07", "x" * 40_000, ""), strict=True)}
    path = find_suite("mmbench").submit(tmp_path, asked, said)
    lines = list(load_workbook(path).active.values)
    assert path.name == "mmbench.xlsx"
    assert lines[0] == ("index", "question", "A", "B", "C", "D", "prediction", "answer", "split")
    assert lines[1] == (1, "Which, 1?", "red", "green", None, None, "=A1+1", "A", "dev")
    assert load_workbook(path).active["G2"].data_type == "s"
    assert lines[3][6] == "B" and len(lines[4][6]) == 32767 and lines[5][6] is None


def test_pictures_and_prompts(tmp_path: Path) -> None:
    table = write(tmp_path / "t.tsv", rows())
    config = TaskConfig(task="mmbench", annotations=str(table), prompt="{question}\n请直接回答选项字母。")
    asked = load_task(config)
    assert [e.id for e in asked] == [1, 2, 1_000_001, 1_000_002, 2_000_002]
    assert asked[0].prompt == 'A "quoted"\thint\nWhich, 1?\nA. red\nB. green\n请直接回答选项字母。'
    assert asked[1].prompt == "Which, 2?\nA. left\nB. right\nC. middle\n请直接回答选项字母。"
    assert (asked[3].references, asked[3].type, asked[3].question) == (["A. middle"], "place", "Which, 2?")
    assert [e.images[0].read() for e in asked] == [picture(c) for c in ("red", "blue", "red", "blue", "blue")]
    # The rotations of a question are one picture to everything that counts or keeps pictures.
    assert len({e.images for e in asked}) == 2
    test = [{key: value for key, value in r.items() if key != "answer"} for r in rows()]
    hidden = load_task(TaskConfig(task="mmbench", questions=str(write(tmp_path / "test.tsv", test))))
    assert len(hidden) == 5 and {tuple(e.references) for e in hidden} == {()}
    submitted = find_suite("mmbench").submit(tmp_path, hidden, {e.id: "A" for e in hidden})
    assert next(iter(load_workbook(submitted).active.values)) == ("index", "question", "A", "B", "C", "D", "prediction", "split")


def test_pandas_nan_is_nothing(tmp_path: Path) -> None:
    table = [{**r, "hint": "nan", "D": "nan"} for r in rows()]
    assert (
        load_task(TaskConfig(task="mmbench", annotations=str(write(tmp_path / "t.tsv", table))))[0].prompt
        == "Which, 1?\nA. red\nB. green"
    )


def test_part_of_the_rotations_is_said_to_be_too_high(tmp_path: Path) -> None:
    table = write(tmp_path / "t.tsv", rows())
    found = score("mmbench", answers()[:3], table, allow_missing=True)
    assert found["metrics"]["accuracy"] == 1 and found["settings"]["scored"] == "3 of 5"
    assert any(note.startswith("1 of 2 questions lack an answer to some rotations") for note in found["settings"]["notes"])
    # Rotations alone give no vanilla accuracy of theirs.
    found = score("mmbench", answers()[2:], table, allow_missing=True)
    assert found["metrics"] == {"accuracy": 1} and list(found["ci95"]) == ["accuracy"]
    assert json.dumps(found, allow_nan=False)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda a: a[1:], "1 of 5 rows have no result: 1"),
        (lambda a: [*a, a[0]], "row 6: a second answer to question 1 (the first: predictions: row 1)"),
        (lambda a: [*a, {"question_id": 7, "answer": "A"}], "row 6: answers to 1 unknown questions: 7"),
        (lambda a: [{"question_id": "1", "answer": "A"}, *a[1:]], "row 1: has \"question_id\" '1', not a whole number"),
        (lambda a: [{"question_id": 1, "answer": None}, *a[1:]], 'row 1: question 1 has "answer" None, not a text'),
        (lambda a: [{"question_id": 1}, *a[1:]], 'row 1: question 1 has no "prediction" or "response" or "answer"'),
        (lambda a: [], "no rows"),
    ],
)
def test_faults_of_the_answers(tmp_path: Path, change: Any, said: str) -> None:
    assert said in refusal(change(answers()), write(tmp_path / "t.tsv", rows()))


def test_faults_of_a_workbook(tmp_path: Path) -> None:
    table = write(tmp_path / "t.tsv", rows())
    path = tmp_path / "a.xlsx"
    assert "cannot be read" in refusal(path, table)
    path.write_bytes(b"PK no")
    assert "is no workbook" in refusal(path, table)
    for lines, said in (
        ([["index", "prediction"]], "the sheet has no rows"),
        ([["index", "answer"], [1, "A"]], "no column prediction"),
        ([["index", "prediction"], ["one", "A"]], "a.xlsx: row 2: has \"index\" 'one', not a whole number"),
        ([["index", "prediction"], [1, "A"], [1, "B"]], "a.xlsx: row 3: a second answer to question 1"),
    ):
        book = Workbook()
        for line in lines:
            book.active.append(line)
        book.save(path)
        assert said in refusal(path, table)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda t: [*t, t[0]], "t.tsv:7: index 1 comes twice (first: "),
        (lambda t: [{**t[0], "index": "one"}, *t[1:]], "t.tsv:2: index 'one' is no whole number"),
        (lambda t: [{**t[0], "answer": "D"}, *t[1:]], "t.tsv:2: question 1 has answer 'D', none of A, B"),
        (lambda t: [{**t[0], "answer": ""}, *t[1:]], "t.tsv:2: question 1 has no answer; a test set's are with its server"),
        (lambda t: [{**t[0], "A": "", "B": ""}, *t[1:]], "t.tsv:2: question 1 has no options"),
        (lambda t: t[1:], "t.tsv:3: row 1000001 is a rotation of question 1, which the table lacks"),
        (lambda t: [{"index": 1, "question": "?"}], "no column A; this is no MMBench table"),
    ],
)
def test_faults_of_the_table(tmp_path: Path, change: Any, said: str) -> None:
    assert said in refusal(answers(), write(tmp_path / "t.tsv", change(rows())))


def test_broken_tables(tmp_path: Path) -> None:
    path = write(tmp_path / "t.tsv", rows())
    whole = path.read_bytes()
    path.write_bytes(whole[:-40])
    assert "t.tsv:6: " in refusal(answers(), path) and "cut off" in refusal(answers(), path)
    path.write_bytes(whole[: whole.index(b"quoted")])
    assert "cut off" in refusal(answers(), path)
    path.write_bytes(b"")
    assert "no rows" in refusal(answers(), path)
    path.write_bytes(b"\xff\xfe")
    assert "a byte that is not UTF-8" in refusal(answers(), path)
    assert "cannot read the table" in refusal(answers(), tmp_path / "none.tsv")
    assert "row 1: a row is no dictionary" in refusal(answers(), [1])
    assert "the table is dict" in refusal(answers(), {})
    assert "questions does not apply" in refusal(answers(), rows(), "q.tsv")
    for image in ("9", "", "x!", "QUJD"):
        table = [{**rows()[0], "image": image}, *rows()[1:]]
        with pytest.raises(InputError, match=r"t\.tsv:2: row 1 has no picture"):
            load_task(TaskConfig(task="mmbench", annotations=str(write(path, table))))


def test_the_csv_limit_of_the_process_stays(tmp_path: Path) -> None:
    before = csv.field_size_limit()
    table = rows()
    # Longer than the csv module takes by default.
    table[0]["comment"] = "x" * (before + 1)
    assert score("mmbench", answers(), write(tmp_path / "t.tsv", table), bootstrap=0)["metrics"]["accuracy"] == 1
    assert csv.field_size_limit() == before


def test_questions_about_one_picture_are_drawn_together() -> None:
    one, two = (base64.b64encode(picture(colour)).decode() for colour in ("red", "blue"))
    # Question 2 shows the picture of question 1 again, question 3 names the row that has it, question 4 has its own.
    table = [row(n, "red green", "A", image) for n, image in enumerate((one, one, "1", two), start=1)]
    said = [{"question_id": n, "answer": "A" if n < 4 else "B"} for n in range(1, 5)]
    found = score("mmbench", said, table, bootstrap=200)
    assert found["settings"]["images"] == 2 and found["settings"]["questions"] == 4
    # Drawn one by one the questions would never give 0 to 1: either picture may fill a draw.
    assert found["ci95"]["accuracy"] == [0, 1]
    bare = [{key: value for key, value in line.items() if key != "image"} for line in table]
    assert score("mmbench", said, bare, bootstrap=200)["settings"]["images"] == 4
