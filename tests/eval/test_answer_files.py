"""Files of answers: every form is read alike, and nothing that a file holds gives anything but a score or one clear line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mmkit.errors import InputError
from mmkit.eval.score import score
from mmkit.eval.scorers.answer_files import answer_rows, read_answers, read_rows

ROWS = [{"question_id": "a", "answer": "x"}, {"question_id": "b", "answer": "y\u2028z"}]
PROBLEM = {"question": "?", "choices": ["x", "y"], "answer": 0, "split": "test"}
LABEL = {"question_id": 1, "image": "a_000000000001.jpg", "text": "?", "label": "yes"}
TABLE = {"index": 1, "question": "?", "A": "x", "B": "y", "answer": "A"}
# Annotations of one question each.
SETS: dict[str, Any] = {
    "scienceqa": {"1": PROBLEM},
    "pope": {"random": [LABEL]},
    "mmbench": [TABLE],
    "mmmu": {"validation_Art_1": {"question_type": "multiple-choice", "ground_truth": "A"}},
}
ids = st.sampled_from([1, "1", "random/1", "validation_Art_1", True, 1.0, None, [1]])
values = st.sampled_from(["A", "yes", "", 1, None, ["A"], {"A": "x"}]) | st.text(max_size=5)
names = st.sampled_from(
    ["question_id", "index", "id", "answer", "text", "response", "category", "question", "index2ans", "outputs"]
)
rows = st.dictionaries(names, ids | values, max_size=5)


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


@pytest.mark.parametrize(
    "text",
    [
        json.dumps(ROWS),
        json.dumps(ROWS, indent=1),
        "\n".join(json.dumps(row) for row in ROWS),
        # A line break of Unicode inside a text ends no line.
        "\n\n".join(json.dumps(row, ensure_ascii=False) for row in ROWS) + "\n\n",
        "\ufeff" + "\r\n".join(json.dumps(row) for row in ROWS),
    ],
)
@pytest.mark.parametrize("name", ["a.json", "a.jsonl"])
def test_forms_agree_whatever_the_name_says(tmp_path: Path, text: str, name: str) -> None:
    found = read_answers(write(tmp_path / name, text), ("question_id",))
    assert {key: answer.text for key, answer in found.items()} == {"a": "x", "b": "y\u2028z"}


def test_a_place_for_every_row(tmp_path: Path) -> None:
    lines = write(tmp_path / "a.jsonl", "\n" + "\n\n".join(json.dumps(row) for row in ROWS))
    assert [Path(row.where).name for row in answer_rows(lines, ("question_id",))] == ["a.jsonl:2", "a.jsonl:4"]
    whole = write(tmp_path / "a.json", json.dumps(ROWS))
    assert [Path(row.where).name for row in answer_rows(whole, ("question_id",))] == ["a.json: row 1", "a.json: row 2"]
    assert [row.where for row in answer_rows(ROWS, ("question_id",))] == ["predictions: row 1", "predictions: row 2"]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "a.json: the file is empty"),
        ('[{"question_id": "a"', "a.json:1:"),
        ('{"question_id": "a"}\n{"question_id":', "a.json:2: not JSON"),
        ('{"question_id": "a"}\n[1]', "a.json:2: a row is list, not an object"),
        ("[]", "no rows in the file of predictions"),
        ("3", "predictions are int, not a list of rows"),
        ('{"answers": {}}', "one object without question_id"),
        ('{"question_id": "a"}\n' + "[" * 100_000, "a.json:2: not JSON"),
    ],
)
def test_broken_files(tmp_path: Path, text: str, said: str) -> None:
    with pytest.raises(InputError) as caught:
        read_answers(write(tmp_path / "a.json", text), ("question_id",))
    assert said in str(caught.value) and "\n" not in str(caught.value)


def test_the_true_answer_of_a_row_is_never_taken_for_the_models() -> None:
    # lmms-eval's and VLMEvalKit's rows repeat the table, whose "answer" is the true one.
    rows = [{"index": 1, "question": "?", "answer": "A", "prediction": "B", "category": "x"}]
    assert score("mmbench", rows, SETS["mmbench"], bootstrap=0)["metrics"]["accuracy"] == 0
    own = [{"id": 1, "question": "?", "answer": "red", "prediction": "blue"}]
    assert score("generic", own, [{"id": 1, "question": "?", "answers": ["red"]}], bootstrap=0)["metrics"]["accuracy"] == 0
    output = [{"id": "validation_Art_1", "answer": "A", "response": "B", "index2ans": {"A": "x", "B": "y"}}]
    assert score("mmmu", output, SETS["mmmu"], bootstrap=0)["metrics"]["accuracy"] == 0
    # A label of POPE with an answer added: its "text" is the question.
    labels = {"random": [{**LABEL, "text": "Is there no dog?"}]}
    assert score("pope", {"random": [{**labels["random"][0], "answer": "yes"}]}, labels, bootstrap=0)["metrics"]["accuracy"] == 1


@pytest.mark.parametrize(
    ("suite", "results", "annotations"),
    [
        ("mmmu", '{"validation_Art_1": "A", "validation_Art_1": "B"}', None),
        ("scienceqa", '{"outputs": {"1": "A", "1": "B"}}', None),
        ("mmmu", '[{"id": "validation_Art_1", "response": "A", "response": "B"}]', None),
        ("mmmu", None, '{"a": {"question_type": "open", "ground_truth": "x"}, "a": 1}'),
        ("scienceqa", None, '{"1": {"question": "?"}, "1": {}}'),
    ],
)
def test_keys_that_come_twice_in_an_object_are_refused(
    tmp_path: Path, suite: str, results: str | None, annotations: str | None
) -> None:
    found: Any = write(tmp_path / "problems.json", results or annotations or "")
    with pytest.raises(InputError, match="more than one row for key"):
        score(suite, found if results else [], found if annotations else SETS[suite])


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "latin.json").write_bytes(b'[{"a": "\xe9"}]')
    for path, said in (
        (tmp_path, "this is a folder"),
        (tmp_path / "none", "cannot read"),
        ("a\0b", "cannot read the predictions file: embedded null byte"),
        (tmp_path / "latin.json", "not UTF-8"),
    ):
        with pytest.raises(InputError, match=said):
            read_rows(path, "predictions")


# Drawing is slow on a busy machine, which says nothing about the code.
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.sampled_from(sorted(SETS)), st.lists(rows, max_size=3) | rows)
def test_any_rows_give_a_score_or_an_input_error(suite: str, found: Any) -> None:
    try:
        result = score(suite, found, SETS[suite], bootstrap=2)
    except InputError as error:
        assert "\n" not in str(error)
    else:
        assert result["n"] == 1 and 0 <= result["metrics"]["accuracy"] <= 1
        assert json.dumps(result, allow_nan=False)


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.sampled_from(sorted(SETS)), st.data())
def test_any_annotations_give_a_score_or_an_input_error(suite: str, data: st.DataObject) -> None:
    good = {
        "scienceqa": [{"question_id": "1", "answer": "A"}],
        "pope": [{"question_id": 1, "answer": "yes"}],
        "mmbench": [{"question_id": 1, "answer": "A"}],
        "mmmu": [{"id": "validation_Art_1", "response": "A", "index2ans": {"A": "x"}}],
    }[suite]
    row = {"scienceqa": PROBLEM, "pope": LABEL, "mmbench": TABLE, "mmmu": SETS["mmmu"]["validation_Art_1"]}[suite]
    changed = {**row, data.draw(st.sampled_from(sorted(row))): data.draw(ids | values)}
    dropped = {
        key: value for key, value in changed.items() if key not in data.draw(st.sets(st.sampled_from(sorted(row)), max_size=1))
    }
    annotations = {
        "scienceqa": {"1": dropped},
        "pope": {"random": [dropped]},
        "mmbench": [dropped],
        "mmmu": {"validation_Art_1": dropped},
    }[suite]
    try:
        assert score(suite, good, annotations, bootstrap=2)["n"] == 1
    except InputError as error:
        assert "\n" not in str(error)


VQA = {
    "annotations": [
        {
            "question_id": n,
            "image_id": 7,
            "answer_type": "other",
            "answers": [{"answer": "red", "answer_id": k} for k in range(10)],
        }
        for n in (1, 2)
    ]
}


def written(path: Path, rows: list[Any]) -> Path:
    """A file of JSON lines, with a blank one at the end."""
    return write(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows) + "\n")


def test_json_lines_and_llavas_answers_give_the_score_of_the_official_list(tmp_path: Path) -> None:
    official = [{"question_id": 1, "answer": "red"}, {"question_id": 2, "answer": "blue\u2028"}]
    whole = score("vqav2", official, VQA, bootstrap=20)
    assert whole["metrics"]["accuracy"] == 0.5
    lines = written(tmp_path / "a.jsonl", official)
    llava = [{"question_id": row["question_id"], "prompt": "?", "text": row["answer"], "answer_id": "x"} for row in official]
    for given_ in (lines, llava, written(tmp_path / "l.jsonl", llava)):
        assert score("vqav2", given_, VQA, bootstrap=20) == whole
    # One row is one object.
    one = {"annotations": VQA["annotations"][:1]}
    assert score("vqav2", written(tmp_path / "one.jsonl", official[:1]), one, bootstrap=0)["n"] == 1
    gqa = {"1": {"question": "?", "imageId": "a", "isBalanced": True, "answer": "red", "groups": {}, "entailed": []}}
    gqa["1"]["types"] = dict.fromkeys(("structural", "semantic", "detailed"), "query")
    said = written(tmp_path / "g.jsonl", [{"question_id": "1", "prompt": "?", "text": "Red."}])
    assert score("gqa", said, gqa, bootstrap=0)["metrics"]["accuracy"] == 1
    vizwiz = [{"image": "a.jpg", "question": "?", "answers": [{"answer": "red"}] * 10}]
    assert score("vizwiz", written(tmp_path / "v.jsonl", [{"image": "a.jpg", "answer": "red"}]), vizwiz, bootstrap=0)["n"] == 1


@pytest.mark.parametrize(
    ("results", "annotations", "said"),
    [
        ('{"question_id": 1, "answer": "x"}\n{"question_id": 2, "ans', None, "a.json:2: not JSON"),
        ('{"question_id": 1, "answer": "x"}\n{"question_id": 2, "ans', None, "the file looks cut off"),
        ('{"question_id": 1, "text": "x"}\n{"question_id": 2, "answer": "x"}', None, 'row 2 has no "text" (row 2)'),
        (
            '{"question_id": 1, "text": "x"}\n{"question_id": 1, "text": "x"}',
            None,
            "more than one row for question 1 (rows 1",
        ),
        (None, '{"question_id": 1}\n{"question_id": 2}', "a.json: this is JSON lines, 2 of them; the annotations are one JSON"),
        (None, '{"annotations": [{"question_id": 1, "image_id": 1, "answer_type": "x"}]}', "as in the file of a test set"),
        (
            '[{"question_id": 1, "answer": "red", "prediction": "blue"}, {"question_id": 2, "answer": "red"}]',
            None,
            'an "answer" and a "prediction" or "response" in the rows of 1',
        ),
    ],
)
def test_faults_of_official_files(tmp_path: Path, results: str | None, annotations: str | None, said: str) -> None:
    found: Any = write(tmp_path / "a.json", results or annotations or "")
    with pytest.raises(InputError) as caught:
        score("vqav2", found if results else [], found if annotations else VQA)
    assert said in str(caught.value) and "\n" not in str(caught.value)
