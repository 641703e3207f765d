"""VizWiz: the official rule case by case, how well unanswerable is told, and one line for every fault of its files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmkit.config import TaskConfig
from mmkit.errors import InputError
from mmkit.eval.score import score
from mmkit.eval.scorers.vizwiz import TYPOGRAPHIC, average_precision, f1_score, normalise_vizwiz, read_vizwiz
from mmkit.eval.suites import find_suite
from mmkit.eval.tasks import load_task


def truth(count: int = 4, **more: Any) -> list[dict[str, Any]]:
    answers = [{"answer": "coke", "answer_confidence": "yes"}] * 10
    return [
        {
            "image": f"v{n}.jpg",
            "question": "what is this",
            "answers": answers,
            "answer_type": "other",
            "answerable": n % 2,
            **more,
        }
        for n in range(count)
    ]


def rows(count: int = 4, answer: str = "coke") -> list[dict[str, Any]]:
    return [{"image": f"v{n}.jpg", "answer": answer} for n in range(count)]


def test_recorded_cases(shared: Path) -> None:
    expected = json.loads((shared / "scoring/vqa_cases_a_expected.json").read_text())
    cases = expected["per_question"]
    data = [
        {"image": f"{row['question_id']}.jpg", "question": "?", "answers": [{"answer": text} for text in row["answers"]]}
        for row in cases
    ]
    results = [{"image": f"{row['question_id']}.jpg", "answer": row["prediction"]} for row in cases]
    found = score("vizwiz", results, data, bootstrap=20)
    got = {row["id"]: round(100 * row["accuracy"], 2) for row in found["per_sample"]}
    assert got == {f"{row['question_id']}.jpg": row["vizwiz_tri_ml_port"] for row in cases}
    assert round(100 * found["metrics"]["accuracy"], 2) == expected["overall"]["vizwiz_tri_ml_port"]
    assert found["settings"]["rule"] == "official" and "vqaEval" in found["settings"]["evaluator"]
    # lmms-eval's rule is TextVQA's, figure for figure.
    other = score("vizwiz", results, data, bootstrap=0, rule="m4c")
    assert [round(100 * row["accuracy"], 2) for row in other["per_sample"]] == [row["m4c_textvqa"] for row in cases]
    assert other["settings"]["rule"] == "m4c"


def test_contractions_get_typographic_apostrophes() -> None:
    assert len(TYPOGRAPHIC) == 120
    # Eight values and two keys were left plain by whoever edited the table.
    assert sum("'" in value for value in TYPOGRAPHIC.values()) == 8
    assert sum("'" in key for key in TYPOGRAPHIC) == 2
    assert normalise_vizwiz("I dont know, the") == "i don\u2019t know"
    assert normalise_vizwiz("cant") == "can't"
    assert normalise_vizwiz("let's go") == "let's go"
    assert normalise_vizwiz("couldn'tve") == "couldn\u2019t\u2019ve"


def test_human_answers_are_not_processed() -> None:
    data = truth(1, answers=[{"answer": "Unanswerable"}] * 10)
    assert score("vizwiz", rows(1, "Unanswerable"), data, bootstrap=0)["metrics"]["accuracy"] == 0
    assert score("vizwiz", rows(1, "Unanswerable"), data, bootstrap=0, rule="m4c")["metrics"]["accuracy"] == 1


def test_confidences_are_scored_where_there_are_some() -> None:
    # Questions 0 and 2 cannot be answered. In order of 1 - answerable: 2 (hit), 3 (miss), 0 (hit), 1.
    results = [{**row, "answerable": sure} for row, sure in zip(rows(), (0.4, 1, 0.1, 0.3), strict=True)]
    found = score("vizwiz", results, truth(), bootstrap=10)
    assert found["metrics"]["unanswerable_average_precision"] == pytest.approx(0.5 * 1 + 0.5 * 2 / 3)
    # Below one half: 0, 2 and 3, of which two are right.
    assert found["metrics"]["unanswerable_f1"] == pytest.approx(2 * 2 / (3 + 2))
    assert set(found["ci95"]) == set(found["metrics"]) and len(found["ci95"]) == 4
    for name in ("unanswerable_average_precision", "unanswerable_f1"):
        low, high = found["ci95"][name]
        assert low < found["metrics"][name] < high
    without = score("vizwiz", rows(), truth(), bootstrap=0)
    assert set(without["metrics"]) == {"accuracy", "accuracy_other"}
    assert without["settings"]["unanswerability"].startswith("not scored: no row has")


@pytest.mark.parametrize(
    ("labels", "scores", "value"),
    [
        # By hand: steps of recall times the precision there; what is tied is one step.
        ([1, 0, 1, 0], [0.9, 0.8, 0.7, 0.1], 0.5 + 0.5 * 2 / 3),
        ([0, 0, 1, 1], [0.1, 0.4, 0.35, 0.8], 0.5 + 0.5 * 2 / 3),
        ([1, 0], [0.5, 0.5], 0.5),
        ([0, 0], [0.5, 0.1], 0.0),
        ([1, 1], [0.2, 0.1], 1.0),
    ],
)
def test_average_precision(labels: list[int], scores: list[float], value: float) -> None:
    assert average_precision(labels, scores) == pytest.approx(value)


@settings(max_examples=150, deadline=None)
@given(st.lists(st.tuples(st.booleans(), st.sampled_from([0.0, 0.25, 0.5, 0.75, 1.0])), min_size=1, max_size=12))
def test_figures_equal_their_definitions(pairs: list[tuple[bool, float]]) -> None:
    labels, scores = [label for label, _ in pairs], [value for _, value in pairs]
    total, before, area = sum(labels), 0.0, 0.0
    for threshold in sorted(set(scores), reverse=True):
        said = [label for label, value in pairs if value >= threshold]
        recall = sum(said) / total if total else 0.0
        area += (recall - before) * sum(said) / len(said)
        before = recall
    assert average_precision(labels, scores) == pytest.approx(area)
    guesses = np.array(scores) > 0.5
    hits = sum(label and guess for label, guess in zip(labels, guesses, strict=True))
    precision, recall = (hits / max(n, 1) for n in (int(guesses.sum()), total))
    expected = 2 * precision * recall / (precision + recall) if hits else 0.0
    assert f1_score(labels, guesses) == pytest.approx(expected)


@settings(max_examples=150, deadline=None)
@given(st.lists(st.tuples(st.booleans(), st.sampled_from([0.0, 0.25, 0.5, 0.75]), st.integers(0, 3)), min_size=1, max_size=12))
def test_weights_are_repeats(rows_: list[tuple[bool, float, int]]) -> None:
    labels, scores, times = (np.array(column) for column in zip(*rows_, strict=True))
    if times.any():
        again = labels.repeat(times), scores.repeat(times)
        assert average_precision(labels, scores, times) == pytest.approx(average_precision(*again))
        assert f1_score(labels, scores > 0.5, times) == pytest.approx(f1_score(again[0], again[1] > 0.5))
    else:
        assert average_precision(labels, scores, times) == f1_score(labels, scores > 0.5, times) == 0


def test_tasks_and_submission(tmp_path: Path) -> None:
    (tmp_path / "val.json").write_text(json.dumps(truth(2)))
    config = TaskConfig(task="vizwiz", annotations=str(tmp_path / "val.json"), image_root="val", prompt="{question} Short.")
    asked = load_task(config)
    assert [(e.id, e.images[0].name, e.prompt) for e in asked] == [
        (f"v{n}.jpg", f"val/v{n}.jpg", "what is this Short.") for n in (0, 1)
    ]
    assert asked[0].references == ["coke"] * 10 and asked[0].type == "other"
    suite = find_suite("vizwiz")
    said = {"v0.jpg": "A red, can.", "v1.jpg": "coke"}
    assert suite.rows(asked, said) == [{"image": "v0.jpg", "answer": "A red, can."}, {"image": "v1.jpg", "answer": "coke"}]
    path = suite.write_submission(tmp_path, asked, said)
    assert path is not None
    assert json.loads(path.read_text()) == [{"image": "v0.jpg", "answer": "red can"}, {"image": "v1.jpg", "answer": "coke"}]
    # The test set: pictures and questions alone.
    (tmp_path / "test.json").write_text(json.dumps([{"image": "t.jpg", "question": "?"}]))
    (one,) = load_task(TaskConfig(task="vizwiz", questions=str(tmp_path / "test.json"), image_root="test"))
    assert (one.id, one.references) == ("t.jpg", [])


def change(data: list[dict[str, Any]], index: int, **fields: Any) -> list[dict[str, Any]]:
    return [{**row, **fields} if n == index else row for n, row in enumerate(data)]


@pytest.mark.parametrize(
    ("results", "annotations", "part"),
    [
        ([], truth(), "predictions: no results in the file"),
        (rows(3), truth(), "1 of 4 questions have no result: v3.jpg"),
        (rows(5), truth(), "results for 1 unknown questions: v4.jpg"),
        (rows() + rows(1), truth(), "more than one row for image v0.jpg (rows 1, 5)"),
        (change(rows(), 1, answer=3), truth(), "row 'v1.jpg' has \"answer\" 3, not a text (row 2)"),
        (change(rows(), 1, image=3), truth(), '"image" is a number in 1 of 4 rows: 3'),
        (change(rows(), 1, answerable=0.5), truth(), '3 of 4 rows have no "answerable": v0.jpg, v2.jpg, v3.jpg'),
        ([{**row, "answerable": 2} for row in rows()], truth(), '"answerable" is no number from 0 to 1 for v0.jpg'),
        ([{**row, "answerable": True} for row in rows()], truth(), '"answerable" is no number'),
        (
            [{**row, "answerable": 1} for row in rows()],
            change(truth(), 2, answerable=None),
            'no "answerable" of 0 or 1 for v2.jpg',
        ),
        (rows(), {}, "a VizWiz file is a list, this is dict"),
        (rows(), [], "no rows in the file"),
        (rows(), change(truth(), 1, answers=[{"answer": "x"}] * 9), "question v1.jpg has 9 answers (row 2)"),
        (rows(), change(truth(), 1, answers=["x"] * 10), "question v1.jpg has an answer that is not"),
        (rows(), change(truth(), 1, answer_type=1), "question 'v1.jpg' has \"answer_type\" 1, not a text"),
        (rows(), truth() + truth(1), "more than one row for image v0.jpg (rows 1, 5)"),
    ],
)
def test_faults_are_named(results: Any, annotations: Any, part: str) -> None:
    with pytest.raises(InputError) as caught:
        score("vizwiz", results, annotations)
    assert part in str(caught.value) and "\n" not in str(caught.value)


def test_a_cut_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "val.json").write_text(json.dumps(truth())[:-30])
    with pytest.raises(InputError, match=r"val\.json:1:\d+: .*looks cut off"):
        read_vizwiz(tmp_path / "val.json")
