"""MMMU: the recorded figures of the official code, the data set's tables, pictures in their places, and clear refusals."""

from __future__ import annotations

import json
import random
import re
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mmkit.config import TaskConfig
from mmkit.errors import InputError
from mmkit.eval.examples import Picture
from mmkit.eval.score import score
from mmkit.eval.suites import find_suite
from mmkit.eval.suites.mmmu import DISCIPLINES, place_pictures
from mmkit.eval.tasks import load_task

ART = [
    {
        "id": "validation_Art_1",
        "question": "Who made <image 1>?",
        "options": "['Goya', \"O'Keeffe\", '<image 2>']",
        "answer": "B",
        "question_type": "multiple-choice",
        "image_1": b"one of Art 1",
        "image_2": b"two of Art 1",
    },
    {
        "id": "validation_Art_2",
        "question": "When was it made?",
        "options": "[]",
        "answer": "['1907', 'in 1907']",
        "question_type": "open",
        "image_1": b"one of Art 2",
        "image_2": None,
    },
]
MATH = [
    {
        "id": "validation_Math_1",
        "question": "<image 1> What is x?",
        "options": "['1', '2']",
        "answer": "A",
        "question_type": "multiple-choice",
        "image_1": b"one of Math 1",
        "image_2": None,
    }
]


def write(folder: Path, tables: dict[str, list[dict[str, Any]]], split: str = "validation") -> Path:
    for subject, rows in tables.items():
        images = {name: [r[name] and {"bytes": r[name], "path": "x.png"} for r in rows] for name in ("image_1", "image_2")}
        columns = {name: [r[name] for r in rows] for name in rows[0] if name not in images}
        path = folder / subject / f"{split}-00000-of-00001.parquet"
        path.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.table({**columns, **images}), path)
    return folder


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write(tmp_path / "mmmu", {"Art": ART, "Math": MATH})


def answers(art: str = "B", date: str = "1907", math: str = "A") -> list[dict[str, Any]]:
    said = {"validation_Art_1": art, "validation_Art_2": date, "validation_Math_1": math}
    return [{"question_id": key, "answer": text} for key, text in said.items()]


def refusal(*args: Any, **settings: Any) -> str:
    with pytest.raises(InputError) as caught:
        score("mmmu", *args, **settings)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_recorded_parsed_answers(shared: Path) -> None:
    folder = shared / "scoring/mmmu"
    expected = json.loads((folder / "expected.json").read_text())["eval_only"]["llava1.5_13b_total_val_output"]
    found = score("mmmu", folder / "llava1.5_13b_total_val_output.json", folder / "answer_dict_val.json", bootstrap=50)
    # Parsed before, so there is nothing left to draw.
    assert found["metrics"] == {"accuracy": expected["accuracy"]} and found["n"] == expected["n"]
    assert {name: round(part["accuracy"] * part["n"]) for name, part in found["breakdown"]["subject"].items()} == {
        name: part["correct"] for name, part in expected["per_subject"].items()
    }
    assert "parsed before" in found["settings"]["evaluator"]


def test_recorded_responses(shared: Path, tmp_path: Path) -> None:
    folder = shared / "scoring/mmmu"
    expected = json.loads((folder / "expected.json").read_text())["parse_and_eval"]["llava1.5_13b"]
    rows = json.loads((folder / "llava1.5_13b_responses.json").read_text())
    found = score("mmmu", folder / "llava1.5_13b_responses.json", folder / "answer_dict_val.json", bootstrap=50)
    assert round(found["metrics"]["accuracy"] * 900, 9) == expected["correct_with_fallback_counted_wrong"] == 329
    # One process, seed 42, subjects by name: what the official program prints.
    assert found["metrics"]["accuracy_official_seed42"] == 330 / 900
    assert found["answers"]["unparsed"] == expected["fallbacks"] == 2
    kinds = found["breakdown"]["question_type"]
    assert (round(kinds["open"]["accuracy"] * 53), kinds["open"]["n"]) == (expected["open_correct"], expected["open_n"])
    open_ids = {row["id"] for row in rows if row["question_type"] != "multiple-choice"}
    for row in found["per_sample"]:
        wanted = expected["per_question"][row["id"]]
        assert bool(row["accuracy"]) == wanted["correct"], row["id"]
        if row["id"] not in open_ids:
            assert (row["parsed"] or None) == wanted["parsed"], row["id"]
    assert sum(part["n"] for part in found["breakdown"]["discipline"].values()) == 900
    assert list(found["breakdown"]["discipline"]) == list(DISCIPLINES)
    # As the official folder of outputs, and in any order of rows.
    for row in random.Random(0).sample(rows, len(rows)):
        subject = re.fullmatch(r"validation_(.+)_\d+", row["id"])
        assert subject
        path = tmp_path / subject[1] / "output.json"
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps([*(json.loads(path.read_text()) if path.exists() else []), row]))
    assert score("mmmu", tmp_path, folder / "answer_dict_val.json", bootstrap=50) == found


def test_tables_are_read_with_their_options(data: Path) -> None:
    found = score("mmmu", answers(date="I think around 1907"), data)
    assert found["metrics"] == {"accuracy": 1, "accuracy_official_seed42": 1}
    assert found["settings"]["split"] == "validation"
    assert [row["parsed"] for row in found["per_sample"]] == ["B", "i think around 1907 | 1907.0", "A"]
    assert set(found["breakdown"]["subject"]) == {"Art", "Math"}
    wrong = score("mmmu", answers("No idea", "1908", "Perhaps"), data)
    drawn = random.Random(42)
    luck = (drawn.choice(["A", "B", "C"]) == "B") + (drawn.choice(["A", "B"]) == "A")
    assert wrong["metrics"] == {"accuracy": 0, "accuracy_official_seed42": luck / 3} and wrong["answers"]["unparsed"] == 2


def test_answers_carry_their_options_to_the_answer_file(data: Path, tmp_path: Path) -> None:
    asked = load_task(TaskConfig(task="mmmu", annotations=str(data)))
    suite = find_suite("mmmu")
    suite.write_results(tmp_path / "r.json", asked, {e.id: "B" for e in asked})
    truth = {
        r["id"]: {"question_type": r["question_type"], "ground_truth": ["1907"] if r["question_type"] == "open" else r["answer"]}
        for r in [*ART, *MATH]
    }
    assert score("mmmu", tmp_path / "r.json", truth)["metrics"] == score("mmmu", tmp_path / "r.json", data)["metrics"]
    assert "question validation_Art_1 is multiple choice, and neither file has its options" in refusal(answers(), truth)


def test_submission(data: Path, tmp_path: Path) -> None:
    asked = load_task(TaskConfig(task="mmmu", annotations=str(data)))
    said = dict(zip([e.id for e in asked], ["The answer is (C)", "in 1907", "no idea"], strict=True))
    path = find_suite("mmmu").submit(tmp_path, asked, said)
    # No letter is drawn: what has none stays as it is, which is wrong on the server, too.
    assert json.loads(path.read_text()) == {
        "validation_Art_1": "C",
        "validation_Art_2": "in 1907",
        "validation_Math_1": "no idea",
    }
    found = score("mmmu", path, data)
    assert found["answers"]["unparsed"] == 1 and found["metrics"] == {"accuracy": pytest.approx(1 / 3)}


def test_pictures_stand_where_the_texts_name_them(data: Path) -> None:
    asked = load_task(TaskConfig(task="mmmu", annotations=str(data), prompt="{question}\n{ending}"))
    letter = "Answer with the option's letter from the given choices directly."
    assert asked[0].prompt == f"Who made <image>?\n(A) Goya\n(B) O'Keeffe\n(C) <image>\n\n{letter}"
    assert [picture.read() for picture in asked[0].images] == [b"one of Art 1", b"two of Art 1"]
    # Nothing names it, so it goes to the front.
    assert asked[1].prompt == "<image>\nWhen was it made?\nAnswer the question using a single word or phrase."
    assert [e.references for e in asked] == [["(B) O'Keeffe"], ["1907", "in 1907"], ["(A) 1"]]
    assert [e.type for e in asked] == ["Art", "Art", "Math"] and asked[0].question == ART[0]["question"]


@given(st.lists(st.integers(1, 9), max_size=6), st.sets(st.integers(1, 7)))
def test_as_many_markers_as_pictures(named: list[int], there: set[int]) -> None:
    images = {n: Picture(str(n), b"") for n in there}
    prompt, shown = place_pictures(" and ".join(f"<image {n}>" for n in named), images)
    assert prompt.count("<image>") == len(shown)
    assert {picture.name for picture in shown} == {str(n) for n in there}
    assert [picture.name for picture in shown][len(there - set(named)) :] == [str(n) for n in named if n in there]
    assert re.findall(r"<image (\d)>", prompt) == [str(n) for n in named if n not in there]


def test_test_split_has_no_answers(tmp_path: Path) -> None:
    hidden = [{**r, "id": r["id"].replace("validation", "test"), "answer": "?"} for r in ART]
    folder = write(tmp_path / "mmmu", {"Art": hidden}, "test")
    config = TaskConfig(task="mmmu", questions=str(folder), settings={"split": "test"})
    assert [e.references for e in load_task(config)] == [[], []]
    assert "2 questions have no answer: test_Art_1, test_Art_2" in refusal([], folder, split="test")
    # As annotations, which are for what can be scored, they are refused before anything is asked.
    with pytest.raises(
        InputError, match="2 questions have no answer: test_Art_1, test_Art_2; a test split's are with its server"
    ):
        load_task(TaskConfig(task="mmmu", annotations=str(folder), settings={"split": "test"}))
    assert "no validation-*.parquet below it" in refusal([], folder)
    assert "unknown split 'val'; known: validation, dev, test" in refusal([], folder, split="val")
    with pytest.raises(InputError, match="mmmu needs annotations"):
        load_task(TaskConfig(task="mmmu"))


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        (answers()[1:], "1 of 3 questions have no result: validation_Art_1"),
        ([*answers(), answers()[0]], "row 4: a second answer to question validation_Art_1"),
        ([*answers(), {"id": "validation_Art_9", "response": ""}], "row 4: answers to 1 unknown questions: validation_Art_9"),
        ([{"id": 1, "response": "A"}], 'row 1: has "id" 1, not a text'),
        ([{"id": "validation_Art_1", "response": 1}], 'row 1: question validation_Art_1 has "response" 1, not a text'),
        ([{"id": "validation_Art_1"}], 'row 1: question validation_Art_1 has no "prediction" or "response"'),
        ([{"id": "validation_Art_1", "response": "A", "index2ans": [1]}], '"index2ans" that is no object of texts'),
        ({"validation_Art_1": None}, "the answer to validation_Art_1 is None, not a text"),
        ({"validation_Art_9": "A"}, "answers to 1 unknown questions: validation_Art_9"),
        ([], "no rows"),
        ({}, "no answers in it"),
    ],
)
def test_faults_of_the_answers(data: Path, rows: Any, said: str) -> None:
    assert said in refusal(rows, data)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"answer": "D"}, "row 1: validation_Art_1 has answer 'D', none of A, B, C"),
        ({"options": "Goya, Picasso"}, "row 1: validation_Art_1 has options 'Goya, Picasso', not a list of texts"),
        ({"options": "[]"}, "row 1: validation_Art_1 has options '[]'"),
        ({"options": "__import__('os')"}, "not a list of texts"),
        ({"id": "validation_Art_2"}, "row 2: question validation_Art_2 comes twice"),
        ({"question": None}, "row 1: validation_Art_1 has no text in question"),
    ],
)
def test_faults_of_a_table(tmp_path: Path, change: dict[str, Any], said: str) -> None:
    assert said in refusal(answers(), write(tmp_path, {"Art": [{**ART[0], **change}, ART[1]], "Math": MATH}))


def test_broken_files(data: Path, tmp_path: Path) -> None:
    path = data / "Art/validation-00000-of-00001.parquet"
    whole = path.read_bytes()
    path.write_bytes(whole[:-50])
    assert f"{path}: cannot be read" in refusal(answers(), data)
    path.write_bytes(b"")
    assert f"{path}: cannot be read" in refusal(answers(), data)
    pq.write_table(pa.table({"id": ["validation_Art_1"]}), path)
    assert "no column question, options, answer, question_type" in refusal(answers(), data)
    write(data, {"Art": ART})
    table = pq.read_table(path).to_pylist()
    table[0]["image_1"] = {"bytes": None, "path": "gone.png"}
    pq.write_table(pa.Table.from_pylist(table), path)
    assert score("mmmu", answers(), data, bootstrap=0)["n"] == 3
    with pytest.raises(InputError, match="row 1: image_1 of validation_Art_1 has no bytes"):
        load_task(TaskConfig(task="mmmu", annotations=str(data)))
    cut = tmp_path / "answers.json"
    cut.write_text('{"validation_Art_1": {"question_type"')
    assert "answers.json:1:" in refusal(answers(), cut) and "cut off" in refusal(answers(), cut)
    for truth in ({}, [], {"validation_Art_1": {"ground_truth": "A"}}, {"validation_Art_1": "A"}):
        cut.write_text(json.dumps(truth))
        assert "answers.json: " in refusal(answers(), cut)
    with pytest.raises(InputError, match="questions and pictures are in the data set's folder"):
        load_task(TaskConfig(task="mmmu", annotations=str(cut)))
    (tmp_path / "empty").mkdir()
    assert "no <subject>/output.json in it" in refusal(tmp_path / "empty", write(data, {"Art": ART}))
    assert "questions does not apply" in refusal(answers(), data, "q.json")
