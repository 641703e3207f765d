"""TextVQA: what a score says about OCR tokens, ANLS, test sets and submissions."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmkit.config import TaskConfig
from mmkit.errors import InputError
from mmkit.eval.score import parse_settings, score
from mmkit.eval.scorers.anls import anls, edit_distance
from mmkit.eval.suites import find_suite
from mmkit.eval.tasks import load_task


def data(count: int = 3, **more: Any) -> dict[str, Any]:
    return {"data": [{"question_id": n, "image_id": f"i{n}", "question": "what word?", **more} for n in range(count)]}


def rows(*answers: str) -> list[dict[str, Any]]:
    return [{"question_id": n, "answer": text} for n, text in enumerate(answers)]


def test_a_score_says_what_is_known_of_the_ocr_tokens() -> None:
    truth = data(1, answers=["stop"] * 10)
    assert score("textvqa", rows("stop"), truth)["settings"]["ocr"] == "unknown"
    for ocr in ("none", "reference"):
        assert score("textvqa", rows("stop"), truth, ocr=ocr)["settings"]["ocr"] == ocr
    with pytest.raises(InputError, match="unknown ocr 'yes'; known: unknown, none, reference"):
        score("textvqa", rows("stop"), truth, ocr="yes")


def test_anls_beside_the_accuracy() -> None:
    truth = data(2, answers=["stop sign"] + ["stop"] * 9)
    found = score("textvqa", rows("stap", "a stop sign here"), truth, **parse_settings("textvqa", {"anls": "true"}))
    assert found["metrics"] == pytest.approx({"accuracy": 0.0, "anls": (0.75 + 9 / 16) / 2})
    assert [row["anls"] for row in found["per_sample"]] == pytest.approx([0.75, 9 / 16])
    assert set(found["ci95"]) == {"accuracy", "anls"}
    assert "anls" not in score("textvqa", rows("stap", "x"), truth, anls=False)["metrics"]


@pytest.mark.parametrize(
    ("prediction", "answers", "value"),
    [
        ("Hello ", ["hello"], 1.0),
        ("hallo", ["hello", "x"], 0.8),
        # Half is enough, less is nothing.
        ("ab", ["ax"], 0.5),
        ("abc", ["axx"], 0.0),
        ("", [""], 1.0),
        ("", ["x"], 0.0),
        ("kitten", ["sitting"], 1 - 3 / 7),
    ],
)
def test_anls(prediction: str, answers: list[str], value: float) -> None:
    assert anls(prediction, answers) == pytest.approx(value)


def recursive_distance(a: str, b: str) -> int:
    """The definition, without a table."""
    if not a or not b:
        return len(a) + len(b)
    if a[0] == b[0]:
        return recursive_distance(a[1:], b[1:])
    return 1 + min(recursive_distance(a[1:], b), recursive_distance(a, b[1:]), recursive_distance(a[1:], b[1:]))


@settings(max_examples=100, deadline=None)
@given(st.text(alphabet="ab", max_size=6), st.text(alphabet="abc", max_size=6))
def test_edit_distance_is_the_definition(a: str, b: str) -> None:
    assert edit_distance(a, b) == edit_distance(b, a) == recursive_distance(a, b)
    similarity = 1 - edit_distance(a, b) / max(len(a), len(b), 1)
    assert anls(a, [b]) == pytest.approx(similarity if similarity >= 0.5 else 0.0)


def test_the_test_set_has_no_answers(tmp_path: Path) -> None:
    (tmp_path / "test.json").write_text(json.dumps(data(2, ocr_tokens=["STOP", "4"])))
    config = TaskConfig(task="textvqa", questions=str(tmp_path / "test.json"), image_root="p", ocr="reference")
    asked = load_task(config)
    assert [(e.id, e.references) for e in asked] == [(0, []), (1, [])]
    assert asked[0].prompt == "what word?\nReference OCR token: STOP, 4"
    suite = find_suite("textvqa")
    path = suite.write_submission(tmp_path, asked, {0: "The Stop", 1: "4"})
    assert path is not None
    assert json.loads(path.read_text()) == [{"question_id": 0, "answer": "The Stop"}, {"question_id": 1, "answer": "4"}]


def test_files_without_answers_are_no_annotations(tmp_path: Path) -> None:
    (tmp_path / "test.json").write_text(json.dumps(data(2)))
    with pytest.raises(InputError, match='no question has "answers", as in the file of a test set'):
        load_task(TaskConfig(task="textvqa", annotations=str(tmp_path / "test.json"), image_root="p"))
    with pytest.raises(InputError, match="questions does not apply to textvqa"):
        load_task(TaskConfig(task="textvqa", annotations="a.json", questions="b.json", image_root="p"))
    (tmp_path / "odd.json").write_text(json.dumps(data(1, ocr_tokens="STOP")))
    with pytest.raises(InputError, match="question 0 has no ocr_tokens"):
        load_task(TaskConfig(task="textvqa", questions=str(tmp_path / "odd.json"), image_root="p", ocr="reference"))


def llava(*found: tuple[str, str, str], line: str = "") -> list[dict[str, Any]]:
    """LLaVA's rows of (picture, question, answer); the prompt ends as LLaVA's does."""
    end = "\nAnswer the question using a single word or phrase."
    return [{"question_id": i, "prompt": f"{q}{line}{end}", "text": a, "answer_id": "x", "metadata": {}} for i, q, a in found]


def test_llavas_answers_are_paired_by_picture_and_question(tmp_path: Path) -> None:
    truth = {
        "data": [
            {"question_id": n, "image_id": image, "question": question, "answers": [f"w{n}"] * 10}
            # One picture is asked the same thing twice; LLaVA's own look-up would score both answers by the last.
            for n, (image, question) in enumerate([("p", "What Word?"), ("p", "who?"), ("q", "what word?"), ("q", "what word?")])
        ]
    }
    said = llava(("q", "what word?", "w2"), ("p", "WHAT word?", "w0"), ("q", "what word?", "w3"), ("p", "who?", "no"))
    found = score("textvqa", said, truth, bootstrap=0)
    assert {row["id"]: row["accuracy"] for row in found["per_sample"]} == {0: 1, 1: 0, 2: 1, 3: 1}
    # The prompts tell whether there were OCR tokens.
    assert found["settings"]["ocr"] == "none"
    line = "\nReference OCR token: a, b"
    with_ocr = llava(*[(row["question_id"], row["prompt"].split("\n")[0], row["text"]) for row in said], line=line)
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, with_ocr)))
    assert score("textvqa", tmp_path / "a.jsonl", truth, bootstrap=0)["settings"]["ocr"] == "reference"
    first = [{**row, "prompt": f"Reference OCR token: a\n{row['prompt']}"} for row in said]
    found = score("textvqa", first, truth, bootstrap=0)
    assert found["settings"]["ocr"] == "reference" and found["metrics"]["accuracy"] == 0.75
    for rows_, settings_, part in (
        (with_ocr, {"ocr": "none"}, "ocr=none, but the prompts in the file of answers show reference"),
        (with_ocr[:1] + said[1:], {}, "some prompts show OCR tokens and some do not"),
        (said[:3], {}, "1 of 4 questions have no result: 1"),
        (said + said[-1:], {}, "predictions: row 5: a second answer to question 1"),
        (llava(("p", "when?", "x")), {}, "predictions: row 1: picture p is not asked 'when?'"),
        ([*said[:3], {**said[3], "text": None}], {}, "row 'p' has \"text\" None, not a text (row 4)"),
    ):
        with pytest.raises(InputError) as caught:
            score("textvqa", rows_, truth, **settings_)  # type: ignore[arg-type]
        assert part in str(caught.value)
