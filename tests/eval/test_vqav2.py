"""VQAv2: test sets without answers, the submission, and one line for every fault of the question files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from mmkit.config import TaskConfig
from mmkit.errors import InputError
from mmkit.eval.score import score
from mmkit.eval.scorers import formats
from mmkit.eval.suites import find_suite, vqav2
from mmkit.eval.tasks import load_task


def questions(ids: range) -> dict[str, Any]:
    return {"questions": [{"question_id": n, "image_id": n // 2, "question": f"what is {n}?"} for n in ids]}


def write(path: Path, data: Any) -> str:
    path.write_text(json.dumps(data))
    return str(path)


def test_a_test_set_is_its_questions(tmp_path: Path) -> None:
    file = write(tmp_path / "test-dev.json", questions(range(3)))
    found = load_task(TaskConfig(task="vqav2", questions=file, image_root="p", image_name="COCO_test2015_{:012d}.jpg"))
    assert [(e.id, e.question, e.references, e.type) for e in found] == [(n, f"what is {n}?", [], "") for n in range(3)]
    assert found[2].images[0].name == "p/COCO_test2015_000000000001.jpg"


def test_submission_has_the_whole_test_set(tmp_path: Path) -> None:
    asked = load_task(TaskConfig(task="vqav2", questions=write(tmp_path / "dev.json", questions(range(2, 4))), image_root="p"))
    answers = {2: "The two dogs.", 3: "red,white"}
    suite = find_suite("vqav2")
    path = suite.write_submission(tmp_path, asked, answers)
    assert path is not None
    # In the M4C form, where commas vanish: what LLaVA uploads.
    assert json.loads(path.read_text()) == [{"question_id": 2, "answer": "2 dogs"}, {"question_id": 3, "answer": "redwhite"}]
    whole = write(tmp_path / "test2015.json", questions(range(5)))
    path = suite.write_submission(tmp_path, asked, answers, {"all_questions": whole, "rule": "always"})
    assert path is not None
    assert [(row["question_id"], row["answer"]) for row in json.loads(path.read_text())] == [
        (0, ""),
        (1, ""),
        (2, "2 dogs"),
        (3, "redwhite"),
        (4, ""),
    ]


def test_a_submission_of_other_questions_is_refused(tmp_path: Path) -> None:
    asked = load_task(TaskConfig(task="vqav2", questions=write(tmp_path / "dev.json", questions(range(4))), image_root="p"))
    with pytest.raises(InputError, match="1 questions were asked that are not in all_questions: 3"):
        vqav2.submit(tmp_path, asked, dict.fromkeys(range(4), "x"), all_questions=questions(range(3)))


def test_the_text_of_a_question_comes_with_its_annotation(shared: Path) -> None:
    folder = shared / "coco-mini"
    found = formats.read_vqa(folder / "vqa_val_annotations.json", folder / "vqa_val_questions.json")
    texts = {
        row["question_id"]: row["question"] for row in json.loads((folder / "vqa_val_questions.json").read_text())["questions"]
    }
    assert {key: q.question for key, q in found.items()} == texts
    assert {q.question_type for q in found.values()} >= {"how many", "is there a"}


def annotated(count: int) -> list[dict[str, Any]]:
    answers = [{"answer": "yes", "answer_id": n} for n in range(10)]
    kinds = ("is the", "what")
    return [
        {"question_id": n, "image_id": n, "answer_type": "other", "question_type": kinds[n % 2], "answers": answers}
        for n in range(count)
    ]


def test_accuracy_by_question_type() -> None:
    rows = [{"question_id": n, "answer": "yes" if n < 3 else "no"} for n in range(4)]
    found = score("vqav2", rows, {"annotations": annotated(4)}, bootstrap=0)
    assert found["breakdown"] == {"question_type": {"is the": {"accuracy": 1.0, "n": 2}, "what": {"accuracy": 0.5, "n": 2}}}
    bare = [{key: value for key, value in row.items() if key != "question_type"} for row in annotated(4)]
    assert "breakdown" not in score("vqav2", rows, {"annotations": bare}, bootstrap=0)


@pytest.mark.parametrize(
    ("data", "part"),
    [
        ({"questions": []}, '"questions" is empty'),
        ({"annotations": []}, 'no list "questions"'),
        (
            {"questions": [{"question_id": "1", "image_id": 1, "question": "?"}]},
            "question '1' has \"question_id\" '1', not a whole number (row 1)",
        ),
        (
            {"questions": [{"question_id": 1, "image_id": 1, "question": None}]},
            'question 1 has "question" None, not a text (row 1)',
        ),
        (
            {"questions": questions(range(2))["questions"] + questions(range(1))["questions"]},
            "more than one row for question 0 (rows 1, 3)",
        ),
    ],
)
def test_broken_questions(tmp_path: Path, data: Any, part: str) -> None:
    with pytest.raises(InputError) as caught:
        load_task(TaskConfig(task="vqav2", questions=write(tmp_path / "q.json", data), image_root="p"))
    assert part in str(caught.value) and "q.json" in str(caught.value)


def test_a_question_type_that_is_no_text_is_refused() -> None:
    rows = annotated(3)
    rows[1]["question_type"] = 7
    with pytest.raises(InputError, match=r'annotation 1 has "question_type" 7, not a text'):
        formats.read_vqa({"annotations": rows})
