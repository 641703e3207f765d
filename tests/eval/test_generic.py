"""Users' own questions: files, metrics, scorers of other packages, and every fault with file, row and id."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmkit.config import TaskConfig
from mmkit.errors import InputError
from mmkit.eval.score import parse_settings, score
from mmkit.eval.scorers import own
from mmkit.eval.suites import find_suite
from mmkit.eval.suites.generic import read_predictions, read_questions
from mmkit.eval.tasks import load_task

QUESTIONS = [
    {"id": 1, "image": "a.jpg", "question": "How many?", "answers": ["2", "two"], "type": "count"},
    {"id": "b", "images": ["a.jpg", "b.jpg"], "question": "What differs?", "answers": ["the hat"]},
    {"id": 3, "image": None, "question": "And 2 + 2?", "answers": ["4"], "type": "count"},
]
ANSWERS = [{"id": 1, "prediction": "2."}, {"id": "b", "prediction": "A hat"}, {"id": 3, "prediction": "5"}]


def lines(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_json_and_json_lines_are_the_same(tmp_path: Path) -> None:
    expected = score("generic", ANSWERS, QUESTIONS)
    (tmp_path / "q.json").write_text(json.dumps(QUESTIONS, indent=1))
    for questions in (tmp_path / "q.json", lines(tmp_path / "q.jsonl", QUESTIONS), lines(tmp_path / "odd.json", QUESTIONS)):
        assert score("generic", lines(tmp_path / "p.jsonl", ANSWERS), questions) == expected
    assert expected["metrics"] == {"accuracy": pytest.approx(1 / 3)}
    assert expected["breakdown"] == {"type": {"count": {"accuracy": 0.5, "n": 2}}}
    assert [row["id"] for row in expected["per_sample"]] == [1, "b", 3]
    assert (expected["settings"]["metric"], expected["settings"]["images"]) == ("exact", 3)
    # One question in a file of JSON lines is an object, and a file of one row all the same.
    assert score("generic", ANSWERS[:1], lines(tmp_path / "one.jsonl", QUESTIONS[:1]), bootstrap=0)["n"] == 1
    # The separator of lines in JavaScript may stand inside a JSON text.
    (tmp_path / "sep.jsonl").write_text('{"id": 1, "question": "a\u2028b", "answers": ["x"]}\n\n', encoding="utf-8")
    assert read_questions(tmp_path / "sep.jsonl")[1].question == "a\u2028b"


def test_examples(tmp_path: Path) -> None:
    file = lines(tmp_path / "q.jsonl", QUESTIONS)
    one, two, three = load_task(TaskConfig(task="generic", annotations=str(file), prompt="{question} Short."))
    assert (one.id, one.prompt, one.question, one.references, one.type) == (
        1,
        "How many? Short.",
        "How many?",
        ["2", "two"],
        "count",
    )
    # Beside the file, unless a root is given.
    assert [picture.name for picture in two.images] == [str(tmp_path / "a.jpg"), str(tmp_path / "b.jpg")]
    assert three.images == ()
    (rooted, *_) = load_task(TaskConfig(task="generic", annotations=str(file), image_root="elsewhere"))
    assert rooted.images[0].name == "elsewhere/a.jpg"
    # Without answers: nothing to score, but to be asked.
    bare = lines(tmp_path / "bare.jsonl", [{"id": 1, "question": "?"}])
    (asked,) = find_suite("generic").examples(TaskConfig(task="generic", questions=str(bare)))
    assert (asked.references, asked.images) == ([], ())
    assert find_suite("generic").rows([one], {1: "2"}) == [{"id": 1, "prediction": "2"}]
    assert find_suite("generic").write_submission(tmp_path, [one], {1: "2"}) is None
    with pytest.raises(InputError, match="no file name for image 1"):
        load_task(
            TaskConfig(task="generic", annotations=str(lines(tmp_path / "out.jsonl", [{**QUESTIONS[0], "image": "../x.jpg"}])))
        )


@pytest.mark.parametrize(
    ("metric", "prediction", "answers", "value"),
    [
        ("exact", " The  Hat. ", ["the hat"], 1),
        ("exact", "hat", ["the hat"], 0),
        ("exact", "hat!", ["hat"], 0),
        ("normalised", "A hat!", ["the hat"], 1),
        ("normalised", "two", ["2"], 1),
        ("contains", "It is a red hat, I think.", ["the red hat"], 1),
        ("contains", "a party", ["art"], 0),
        ("contains", "anything", ["the"], 0),
        ("numeric", "There are 3 of 12.", ["12"], 1),
        ("numeric", "1,200.50 dollars", ["1200.5"], 1),
        ("numeric", "none", ["0"], 1),
        ("numeric", "about 101", ["100"], 0),
        ("numeric", "no idea", ["5"], 0),
        ("numeric", "0.30000000001", ["0.3"], 1),
        ("anls", "hallo", ["hello"], 0.8),
        ("vqa", "2", ["two"] * 3 + ["x"] * 7, 0.9),
        ("m4c", "red,white", ["redwhite"] * 10, 1),
    ],
)
def test_metrics(metric: str, prediction: str, answers: list[str], value: float) -> None:
    found = score(
        "generic", [{"id": 1, "prediction": prediction}], [{"id": 1, "question": "?", "answers": answers}], metric=metric
    )
    assert found["metrics"]["accuracy"] == pytest.approx(value)
    assert found["settings"]["evaluator"] == f"mmkit {metric}"


def test_tolerance_of_numbers() -> None:
    questions = [{"id": n, "question": "?", "answers": ["100"]} for n in range(3)]
    said = [{"id": 0, "prediction": "95"}, {"id": 1, "prediction": "94.9"}, {"id": 2, "prediction": "many"}]
    found = score(
        "generic", said, questions, **parse_settings("generic", {"metric": "numeric", "tolerance": "0.05"}), bootstrap=0
    )
    assert [row["accuracy"] for row in found["per_sample"]] == [1, 0, 0]
    assert found["settings"]["tolerance"] == 0.05
    assert found["answers"]["unparsed"] == 1
    assert found["settings"]["notes"] == ["1 of 3 answers could not be parsed and count as wrong"]
    for value in ("x", "-1", "nan", "1"):
        with pytest.raises(InputError, match="tolerance is a share from 0 to 1"):
            score("generic", said, questions, metric="numeric", tolerance=value)
    with pytest.raises(InputError, match="tolerance does not apply to metric=exact"):
        score("generic", said, questions, tolerance="0.05")


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("-1,250.5", -1250.5),
        ("3e2", 300),
        ("x=5", 5),
        ("10-20", 20),
        ("1,2", 2),
        (".5", 0.5),
        ("7.", 7),
        ("50%", 50),
        ("a2b", None),
        ("v1.2.3", None),
        ("1e999", None),
        ("", None),
        ("Ten or none", 0),
    ],
)
def test_last_number(text: str, value: float | None) -> None:
    assert own.last_number(text) == value


@settings(max_examples=200, deadline=None)
@given(st.text(max_size=30), st.lists(st.text(max_size=10), min_size=10, max_size=10))
def test_any_text_has_a_score(prediction: str, answers: list[str]) -> None:
    for metric in own.METRICS.values():
        assert 0 <= metric(prediction, answers) <= 1
        assert metric(prediction, answers) == metric(prediction, list(answers))
    assert own.exact(prediction, [*answers, prediction]) == own.normalised(prediction, [*answers, prediction]) == 1


@settings(max_examples=200, deadline=None)
@given(st.floats(-1e12, 1e12).map(lambda x: round(x, 4)), st.booleans())
def test_written_numbers_are_read_back(value: float, commas: bool) -> None:
    written = f"{value:,.4f}" if commas else f"{value:.4f}"
    assert own.last_number(f"I say {written} of them") == pytest.approx(value)
    assert own.numeric(f"= {written}", [written]) == 1


def test_sentences_are_noted_for_short_metrics_alone() -> None:
    said = [{"id": 1, "prediction": "It is a red hat, I think."}]
    questions = [{"id": 1, "question": "?", "answers": ["red hat"]}]
    assert score("generic", said, questions, bootstrap=0)["settings"]["notes"][0].startswith("WARNING")
    assert "notes" not in score("generic", said, questions, metric="contains", bootstrap=0)["settings"]


PLUGIN = """
def first_letter(prediction, answers):
    assert isinstance(prediction, str) and all(isinstance(a, str) for a in answers)
    return 0.5 * any(prediction[:1] == a[:1] for a in answers)
def percent(prediction, answers):
    return 100.0
def nothing(prediction, answers):
    return float("nan")
NUMBER = 3
"""


@pytest.fixture
def plugin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A distribution as pip would install it: a module, and metadata with entry points."""
    site = tmp_path / "site"
    info = site / "letters-1.2.dist-info"
    info.mkdir(parents=True)
    (site / "letters_plugin.py").write_text(PLUGIN)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: letters\nVersion: 1.2\n")
    names = {"first-letter": "first_letter", "percent": "percent", "nothing": "nothing", "number": "NUMBER", "gone": "gone"}
    points = "".join(f"{name} = letters_plugin:{value}\n" for name, value in names.items())
    (info / "entry_points.txt").write_text(f"[mmkit.scorers]\n{points}lost = no_such_module:f\n")
    monkeypatch.syspath_prepend(str(site))
    monkeypatch.delitem(sys.modules, "letters_plugin", raising=False)


@pytest.mark.usefixtures("plugin")
def test_a_scorer_of_another_package() -> None:
    found = score("generic", ANSWERS, QUESTIONS, metric="first-letter", bootstrap=10)
    assert [row["accuracy"] for row in found["per_sample"]] == [0.5, 0, 0]
    assert found["settings"]["evaluator"] == "letters_plugin:first_letter (letters 1.2)"
    assert "first-letter" in own.metric_names()


@pytest.mark.usefixtures("plugin")
@pytest.mark.parametrize(
    ("metric", "part"),
    [
        ("first-lettr", "unknown metric 'first-lettr'; did you mean first-letter?"),
        ("percent", "metric percent gave 100.0 for '2.', not a number from 0 to 1"),
        ("nothing", "metric nothing gave nan"),
        ("number", "entry point letters_plugin:NUMBER of metric number is int, not a function"),
        ("gone", "entry point letters_plugin:gone of metric gone cannot be loaded"),
        ("lost", "No module named 'no_such_module'"),
    ],
)
def test_a_scorer_that_is_none(metric: str, part: str) -> None:
    with pytest.raises(InputError) as caught:
        score("generic", ANSWERS, QUESTIONS, metric=metric)
    assert part in str(caught.value)


def with_row(**fields: Any) -> list[Any]:
    return [QUESTIONS[0], {"id": 2, "question": "?", "answers": ["x"], **fields}]


@pytest.mark.parametrize(
    ("data", "part"),
    [
        ([], "no rows in the file of questions"),
        ({"questions": []}, "one object without id is no file of questions"),
        ([3], "questions: row 1: a row is int, not an object"),
        ([{"question": "?"}], 'row 1: no "id"; give each'),
        (with_row(id=None), 'row 2: no "id" that is a whole number or a text, but None'),
        (with_row(id=True), 'row 2: no "id" that is a whole number or a text, but True'),
        (with_row(question=None), 'row 2: question 2 has no text "question"'),
        (with_row(type=3), 'row 2: question 2 has a "type" that is no text'),
        (with_row(image="a", images=["b"]), 'has both "image" and "images"'),
        (with_row(image=3), "row 2: question 2 has pictures that are not"),
        (with_row(images="a.jpg"), "row 2: question 2 has pictures that are not"),
        (with_row(answers=[]), 'row 2: question 2 has no list "answers" of one text or more'),
        (with_row(answers="x"), 'has no list "answers"'),
        (with_row(answers=[1]), 'has no list "answers"'),
        (with_row(id=1), "questions: row 2: a second question 1 (the first: questions: row 1)"),
    ],
)
def test_broken_questions(data: Any, part: str) -> None:
    with pytest.raises(InputError) as caught:
        read_questions(data)
    assert part in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("data", "part"),
    [
        ([], "no rows in the file of predictions"),
        ([{"id": 1}], 'predictions: row 1: question 1 has no "prediction" or "response" or "answer"'),
        ([{"id": 1, "prediction": 3}], 'row 1: question 1 has "prediction" 3, not a text'),
        ([{"prediction": "x"}], 'row 1: no "id"'),
        ([ANSWERS[0], ANSWERS[0]], "predictions: row 2: a second answer to question 1 (the first: predictions: row 1)"),
    ],
)
def test_broken_predictions(data: Any, part: str) -> None:
    with pytest.raises(InputError) as caught:
        read_predictions(data)
    assert part in str(caught.value)


def test_ids_that_do_not_match() -> None:
    for said, part in (
        (ANSWERS[:2], "1 of 3 questions have no result: 3"),
        ([*ANSWERS, {"id": 9, "prediction": ""}], "results for 1 unknown questions: 9"),
        ([{**ANSWERS[0], "id": "1"}, *ANSWERS[1:]], "ids are str here and int in the questions: 1"),
    ):
        with pytest.raises(InputError) as caught:
            score("generic", said, QUESTIONS)
        assert part in str(caught.value)
    with pytest.raises(InputError, match="questions does not apply to generic"):
        score("generic", ANSWERS, QUESTIONS, [])


def test_metrics_that_do_not_fit_the_answers() -> None:
    with pytest.raises(InputError, match="metric=vqa needs 10 answers a question: question 1 has 2, question b has 1"):
        score("generic", ANSWERS, QUESTIONS, metric="vqa")
    with pytest.raises(InputError, match="no answer has a number for question b"):
        score("generic", ANSWERS, QUESTIONS, metric="numeric")


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ('{"id": 1, "prediction": "x"}\n{"id": 2, "predic', ["p.jsonl:2", "looks cut off"]),
        (
            '{"id": 1, "prediction": "x"}\n{"id": 2,, "prediction": "y"}\n{"id": 3, "prediction": "z"}\n',
            ["p.jsonl:2", "not JSON"],
        ),
        ('[{"id": 1, "prediction": "x"}, {"id": 2, "pre', ["p.jsonl:1:", "looks cut off"]),
        (" \n", ["p.jsonl", "the file is empty"]),
        ("[]", ["p.jsonl", "no rows"]),
    ],
)
def test_cut_and_broken_lines(tmp_path: Path, text: str, parts: list[str]) -> None:
    (tmp_path / "p.jsonl").write_text(text)
    with pytest.raises(InputError) as caught:
        read_predictions(tmp_path / "p.jsonl")
    assert [part for part in parts if part not in str(caught.value)] == []
    assert ("cut off" in str(caught.value)) == ("looks cut off" in parts)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-2, 3) | st.text(max_size=3),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["id", "image", "images", "question", "answers", "type", "prediction"]), inner)
    ),
    max_leaves=12,
)


@settings(max_examples=150, deadline=None)
@given(JSON.filter(lambda value: not isinstance(value, str)))
def test_any_json_is_read_or_refused(data: Any) -> None:
    for read in (read_questions, read_predictions):
        try:
            read(data)
        except InputError as error:
            assert "\n" not in str(error)


def test_a_misspelt_key_of_a_row_is_refused(tmp_path: Path) -> None:
    row = {"id": 1, "question": "?", "answers": ["a"], "imgae": "a.jpg"}
    with pytest.raises(InputError, match=r'question 1 has a key "imgae"; did you mean "image"\?'):
        read_questions(lines(tmp_path / "slip.jsonl", [row]))
    # Columns of a data set's own are nobody's business, not even one like a key that is there.
    extra = {"id": 1, "question": "?", "answers": ["a"], "answer": "a", "source": "web", "difficulty": 3}
    assert read_questions(lines(tmp_path / "own.jsonl", [extra]))[1].answers == ["a"]
