"""ScienceQA: LLaVA's and lmms-eval's rules on both subsets, the official classes, and one clear line for every bad file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from mmkit.config import TaskConfig
from mmkit.errors import InputError
from mmkit.eval.score import score
from mmkit.eval.suites import find_suite
from mmkit.eval.tasks import load_task

PROBLEMS: dict[str, dict[str, Any]] = {
    "4": {
        "question": "Which one?",
        "choices": ["Maine", "Ohio"],
        "answer": 0,
        "hint": "",
        "image": "image.png",
        "subject": "social science",
        "grade": "grade2",
        "split": "test",
    },
    "5": {
        "question": "What is it?",
        "choices": ["solid", "liquid", "gas"],
        "answer": 2,
        "hint": "Look closely.",
        "image": "choices.jpg",
        "subject": "natural science",
        "grade": "grade6",
        "split": "test",
    },
    "7": {
        "question": "Which word?",
        "choices": ["a", "b"],
        "answer": 1,
        "hint": "",
        "image": None,
        "subject": "language science",
        "grade": "grade7",
        "split": "test",
    },
    "9": {
        "question": "How?",
        "choices": ["so", "thus"],
        "answer": 1,
        "hint": "Read.",
        "image": None,
        "subject": "natural science",
        "grade": "grade12",
        "split": "test",
    },
    "1": {"question": "?", "choices": ["x"], "answer": 0, "hint": "", "image": None, "subject": "", "grade": "", "split": "val"},
}
SAID = {"4": "A", "5": "C. gas", "7": "The answer is A.", "9": "It is B"}


def world(folder: Path, problems: Any = None, splits: Any = None) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "problems.json").write_text(json.dumps(PROBLEMS if problems is None else problems))
    splits = {"test": ["4", "5", "7", "9"], "val": ["1"]} if splits is None else splits
    (folder / "pid_splits.json").write_text(json.dumps(splits))
    return folder


def llava(path: Path, said: dict[str, str]) -> Path:
    rows = [{"question_id": key, "prompt": "?", "text": text, "metadata": {}} for key, text in said.items()]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def refusal(*args: Any, **settings: Any) -> str:
    with pytest.raises(InputError) as caught:
        score("scienceqa", *args, **settings)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_all_questions_and_those_with_a_picture(tmp_path: Path) -> None:
    root = world(tmp_path)
    path = llava(tmp_path / "answers.jsonl", dict(reversed(SAID.items())))
    found = score("scienceqa", path, root)
    assert found["metrics"] == {"accuracy": 0.5, "accuracy_img": 1}
    assert found["answers"] == {"total": 4, "empty": 0, "long": 0, "unparsed": 1, "defaulted": 0}
    assert [(row["id"], row["parsed"], row["accuracy"]) for row in found["per_sample"]] == [
        ("4", "A", 1),
        ("5", "C", 1),
        ("7", "A", 0),
        ("9", "", 0),
    ]
    assert [row.get("accuracy_img") for row in found["per_sample"]] == [1, 1, None, None]
    assert found["breakdown"] == {
        "subject": {
            "natural": {"accuracy": 0.5, "n": 2},
            "social": {"accuracy": 1, "n": 1},
            "language": {"accuracy": 0, "n": 1},
        },
        # A question with hint and picture counts under both.
        "context": {
            "text": {"accuracy": 0.5, "n": 2},
            "image": {"accuracy": 1, "n": 2},
            "no context": {"accuracy": 0, "n": 1},
        },
        "grade": {"G1-6": {"accuracy": 1, "n": 2}, "G7-12": {"accuracy": 0, "n": 2}},
    }
    settings = found["settings"]
    assert (settings["rule"], settings["split"], settings["subset"]) == ("llava", "test", "all")
    assert settings["notes"] == ["1 of 4 answers could not be parsed and are counted as wrong"]
    # The same file of answers serves the image split.
    images = score("scienceqa", path, root / "problems.json", subset="img")
    assert images["metrics"] == {"accuracy": 1} and images["n"] == 2 and images["settings"]["subset"] == "img"
    low, high = found["ci95"]["accuracy"]
    assert low < 0.5 < high


def test_lmms_rule() -> None:
    rows = [{"question_id": key, "answer": text} for key, text in {**SAID, "4": "a", "9": "B.so"}.items()]
    assert score("scienceqa", rows, PROBLEMS, rule="lmms")["metrics"]["accuracy"] == 0.75
    assert score("scienceqa", rows, PROBLEMS, rule="llava")["metrics"]["accuracy"] == 0.25
    assert "known: llava, lmms" in refusal(rows, PROBLEMS, rule="official")


def test_a_letter_beyond_the_choices_is_wrong_and_not_unparsed() -> None:
    rows = [{"question_id": key, "answer": "E"} for key in SAID]
    found = score("scienceqa", rows, PROBLEMS)
    assert found["metrics"]["accuracy"] == 0 and found["answers"]["unparsed"] == 0


def test_forms_of_answers_agree(tmp_path: Path) -> None:
    root = world(tmp_path)
    by_rows = score("scienceqa", llava(tmp_path / "a.jsonl", SAID), root)
    # Whatever the file is called.
    assert score("scienceqa", llava(tmp_path / "a.json", SAID), root) == by_rows
    result = {"acc": 50.0, "correct": 2, "count": 4, "results": {"4": 0, "5": 2, "7": 0, "9": -1}, "outputs": SAID}
    (tmp_path / "result.json").write_text(json.dumps(result))
    assert score("scienceqa", tmp_path / "result.json", root) == by_rows
    assert score("scienceqa", [{"question_id": int(key), "answer": text} for key, text in SAID.items()], root) == by_rows
    assert score("scienceqa", result, PROBLEMS)["metrics"] == by_rows["metrics"]
    del result["outputs"]
    assert 'without "outputs"' in refusal(result, root)
    assert "outputs of 4 are no texts" in refusal({"outputs": {"4": 1}}, root)


def test_one_row_alone_is_a_file(tmp_path: Path) -> None:
    root = world(tmp_path)
    for name in ("one.json", "one.jsonl"):
        assert score("scienceqa", llava(tmp_path / name, {"1": "A"}), root, split="val")["metrics"]["accuracy"] == 1


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ([("4", "A")], "3 of 4 questions have no result: 5, 7, 9"),
        ([*SAID.items(), ("4", "B")], "a.jsonl:5: a second answer to question 4 (the first: "),
        ([*SAID.items(), ("1", "A")], "a.jsonl:5: answers to 1 unknown questions: 1"),
        ([("4", None), *list(SAID.items())[1:]], 'a.jsonl:1: question 4 has "text" None, not a text'),
        ([(4.5, "A"), *list(SAID.items())[1:]], 'a.jsonl:1: has "question_id" 4.5, not a text'),
        ([(True, "A"), *list(SAID.items())[1:]], 'a.jsonl:1: has "question_id" True, not a text'),
    ],
)
def test_faults_of_the_answers(tmp_path: Path, rows: Any, said: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"question_id": key, "text": text}) + "\n" for key, text in rows))
    assert said in refusal(path, world(tmp_path))


def test_broken_files(tmp_path: Path) -> None:
    root = world(tmp_path)
    path = llava(tmp_path / "a.jsonl", SAID)
    path.write_text(path.read_text().replace('"text"', "text", 2))
    assert "a.jsonl:1:" in refusal(path, root)
    llava(path, SAID)
    path.write_text(path.read_text()[:-9])
    assert "a.jsonl:4: not JSON" in refusal(path, root) and "cut off" in refusal(path, root)
    path.write_text("[1]")
    assert "row 1: a row is int" in refusal(path, root)
    path.write_text("")
    assert "the file is empty" in refusal(path, root)
    assert "this is a folder" in refusal(root, root)
    llava(path, SAID)
    whole = (root / "problems.json").read_text()
    (root / "problems.json").write_text(whole[:300])
    assert "problems.json:1:" in refusal(path, root) and "cut off" in refusal(path, root)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"answer": 2}, 'problem 4 has "answer" 2, not the index of a choice'),
        ({"answer": "A"}, "problem 4 has \"answer\" 'A'"),
        ({"choices": []}, 'problem 4 has no list of "choices"'),
        ({"choices": list("abcdef")}, "problem 4 has 6 choices, more than ABCDE"),
        ({"question": None}, 'problem 4 has no "question"'),
        ({"hint": 3}, 'problem 4 has "hint" 3, not a text'),
    ],
)
def test_faults_of_a_problem(tmp_path: Path, change: dict[str, Any], said: str) -> None:
    problems = {**PROBLEMS, "4": {**PROBLEMS["4"], **change}}
    path = llava(tmp_path / "a.jsonl", SAID)
    assert f"problems.json: {said}" in refusal(path, world(tmp_path, problems))


def test_faults_of_the_splits(tmp_path: Path) -> None:
    path = llava(tmp_path / "a.jsonl", SAID)
    assert "no split 'tests'; did you mean test?" in refusal(path, world(tmp_path), split="tests")
    assert "no problem 99 of split test" in refusal(path, world(tmp_path, splits={"test": ["99"]}))
    assert "split test names a problem twice" in refusal(path, world(tmp_path, splits={"test": ["4", "4"]}))
    assert "split test is empty" in refusal(path, world(tmp_path, splits={"test": []}))
    assert "this is no pid_splits.json" in refusal(path, world(tmp_path, splits=["4"]))
    assert "no ScienceQA problems" in refusal(path, world(tmp_path, problems=[1]))
    (world(tmp_path) / "pid_splits.json").unlink()
    assert "cannot read the splits file" in refusal(path, tmp_path)
    assert "no problem has \"split\" 'train'" in refusal(path, PROBLEMS, split="train")
    assert "no question of split val has a picture" in refusal(
        [{"question_id": "1", "answer": "A"}], PROBLEMS, split="val", subset="img"
    )
    assert "questions does not apply" in refusal(path, PROBLEMS, "q.json")


def test_examples_ask_as_llava_does(tmp_path: Path) -> None:
    config = TaskConfig(
        task="scienceqa", annotations=str(world(tmp_path)), image_root="/pictures", prompt="{question}\nLetter only."
    )
    asked = load_task(config)
    assert [e.id for e in asked] == ["4", "5", "7", "9"]
    assert asked[1].prompt == "Context: Look closely.\nWhat is it?\nA. solid\nB. liquid\nC. gas\nLetter only."
    assert asked[0].prompt == "Which one?\nA. Maine\nB. Ohio\nLetter only."
    assert [picture.name for picture in asked[1].images] == ["/pictures/5/choices.jpg"] and asked[2].images == ()
    assert (asked[1].references, asked[1].type, asked[1].question) == (["C. gas"], "natural", "What is it?")
    images = load_task(config.model_copy(update={"settings": {"subset": "img"}}))
    assert [e.id for e in images] == ["4", "5"]
    assert [e.id for e in load_task(config.model_copy(update={"settings": {"split": "val"}}))] == ["1"]
    find_suite("scienceqa").write_results(tmp_path / "r.json", asked, {e.id: e.references[0][0] for e in asked})
    assert score("scienceqa", tmp_path / "r.json", tmp_path)["metrics"]["accuracy"] == 1
    with pytest.raises(InputError, match="unknown subset 'image'"):
        load_task(config.model_copy(update={"settings": {"subset": "image"}}))
