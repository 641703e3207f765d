"""GQA: accuracy and its parts, distribution, consistency, validity and plausibility by hand, and every fault of its files."""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmkit.config import TaskConfig
from mmkit.errors import InputError
from mmkit.eval.score import score
from mmkit.eval.scorers.gqa import Distribution, read_gqa
from mmkit.eval.suites import find_suite
from mmkit.eval.tasks import load_task


def question(answer: str, structural: str = "query", group: str | None = "color", **more: Any) -> dict[str, Any]:
    return {
        "question": "What color is it?",
        "imageId": "n1",
        "isBalanced": True,
        "answer": answer,
        "types": {"structural": structural, "semantic": "attr", "detailed": "categoryAttr"},
        "groups": {"global": group, "local": None},
        "entailed": [],
        **more,
    }


def truth() -> dict[str, Any]:
    return {
        "q1": question("red", entailed=["q1", "q4", "q5"]),
        "q2": question("yes", "verify", None),
        "q3": question("blue", imageId="n2", types={"structural": "query", "semantic": "rel", "detailed": "twoCommon"}),
        # Not balanced: they serve consistency alone.
        "q4": question("yes", "verify", isBalanced=False),
        "q5": question("no", "verify", isBalanced=False),
    }


def rows(**answers: str) -> list[dict[str, Any]]:
    return [{"questionId": key, "prediction": text} for key, text in answers.items()]


def test_only_balanced_questions_are_scored() -> None:
    found = score("gqa", rows(q1="Red.", q2="no", q3="blue"), truth(), bootstrap=10)
    assert found["n"] == 3
    assert found["metrics"]["accuracy"] == pytest.approx(2 / 3)
    assert (found["metrics"]["accuracy_open"], found["metrics"]["accuracy_binary"]) == (1.0, 0.0)
    assert found["breakdown"]["structural"] == {"query": {"accuracy": 1.0, "n": 2}, "verify": {"accuracy": 0.0, "n": 1}}
    assert found["breakdown"]["semantic"] == {"attr": {"accuracy": 0.5, "n": 2}, "rel": {"accuracy": 1.0, "n": 1}}
    assert set(found["breakdown"]["detailed"]) == {"categoryAttr", "twoCommon"}
    assert found["settings"]["images"] == 2
    assert set(found["ci95"]) == {"accuracy", "accuracy_binary", "accuracy_open", "distribution"}
    assert found["settings"]["consistency"] == "not scored: 2 entailed questions are not in the file or have no answer"
    assert found["settings"]["validity"].startswith("not scored: no choices file")
    assert "consistency" not in found["metrics"] and "validity" not in found["metrics"]


@pytest.mark.parametrize(
    ("rule", "prediction", "right"),
    [
        ("llava", "Red..", True),
        ("llava", "r-ed", False),
        ("llava", "red. ", False),
        ("lmms", "R-e!d.", True),
        ("lmms", "red ", False),
        ("official", "red", True),
        ("official", "Red", False),
        ("official", "red.", False),
    ],
)
def test_rules(rule: str, prediction: str, right: bool) -> None:
    found = score("gqa", rows(q=prediction), {"q": question("red")}, rule=rule, bootstrap=0)
    assert found["metrics"]["accuracy"] == right
    assert found["settings"]["rule"] == rule


def test_a_true_answer_is_processed_by_lmms_alone() -> None:
    data = {"q": question("T-shirt")}
    assert score("gqa", rows(q="tshirt"), data, rule="lmms", bootstrap=0)["metrics"]["accuracy"] == 1
    assert score("gqa", rows(q="T-shirt"), data, rule="llava", bootstrap=0)["metrics"]["accuracy"] == 0


def test_consistency_by_hand() -> None:
    # q1 is right and entails q4 (right) and q5 (wrong); the others entail nothing.
    answers = {"q1": "red", "q2": "yes", "q3": "green", "q4": "yes", "q5": "yes"}
    found = score("gqa", rows(**answers), truth(), bootstrap=0)
    assert found["metrics"]["consistency"] == 0.5
    assert found["n"] == 3
    # A wrong answer is not asked for its consequences.
    found = score("gqa", rows(**{**answers, "q1": "green"}), truth(), bootstrap=0)
    assert "consistency" not in found["metrics"] and found["settings"]["consistency"] == "nothing is entailed"


def test_validity_and_plausibility_by_hand(tmp_path: Path) -> None:
    choices = {key: {"valid": ["red", "green", "no"], "plausible": ["red"]} for key in truth()}
    (tmp_path / "choices.json").write_text(json.dumps(choices))
    # q3 compares two things: what is valid and plausible there are the words color, material and shape.
    given_ = rows(q1="green", q2="perhaps", q3="shape")
    found = score("gqa", given_, truth(), bootstrap=0, choices=str(tmp_path / "choices.json"))
    assert found["metrics"]["validity"] == pytest.approx(2 / 3)
    assert found["metrics"]["plausibility"] == pytest.approx(1 / 3)
    del choices["q2"]
    (tmp_path / "choices.json").write_text(json.dumps(choices))
    with pytest.raises(InputError, match=r'choices\.json: no lists "valid" and "plausible" for q2'):
        score("gqa", given_, truth(), bootstrap=0, choices=str(tmp_path / "choices.json"))


def distribution(scored: list[tuple[str | None, str, str]]) -> float:
    """The figure with every question counted once."""
    return Distribution(scored).of(np.ones(len(scored)))


def test_distribution_by_hand() -> None:
    # Group a: red 3 times, said once: (1-3)^2/3; blue once, said 3 times: (3-1)^2/1. Group b: right, chi-square 0.
    scored = [("a", "red", "red"), ("a", "red", "blue"), ("a", "red", "blue"), ("a", "blue", "blue")]
    scored += [("b", "x", "x")] * 4 + [(None, "y", "z")]
    assert distribution(scored) == pytest.approx((4 / 3 + 4) * 4 / 8 / 100)
    assert np.isnan(distribution([(None, "y", "y")])) and not Distribution([(None, "y", "y")]).known
    assert distribution([("a", "x", "never")]) == pytest.approx(1 / 100)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.sampled_from("ab"), st.sampled_from("xyz"), st.sampled_from("xyzw")), min_size=1, max_size=30))
def test_distribution_equals_the_loop(scored: list[tuple[str, str, str]]) -> None:
    gold: Any = defaultdict(lambda: defaultdict(int))
    said: Any = defaultdict(lambda: defaultdict(int))
    for group, answer, prediction in scored:
        gold[group][answer] += 1
        said[group][prediction] += 1
    total, weight = 0.0, 0
    for group, counts in gold.items():
        chi, size = 0.0, 0
        for answer, expected in counts.items():
            chi += (said[group].get(answer, 0) - expected) ** 2 / expected
            size += expected
        total += chi * size
        weight += size
    assert distribution(scored) == pytest.approx(total / weight / 100)


@settings(max_examples=100, deadline=None)
@given(
    st.lists(
        st.tuples(st.sampled_from(["a", "b", None]), st.sampled_from("xyz"), st.sampled_from("xyzw"), st.integers(0, 3)),
        min_size=1,
        max_size=20,
    )
)
def test_weights_are_repeats(rows_: list[tuple[str | None, str, str, int]]) -> None:
    scored = [(group, answer, said) for group, answer, said, _ in rows_]
    repeated = [row for row, (*_, times) in zip(scored, rows_, strict=True) for _ in range(times)]
    value = Distribution(scored).of(np.array([times for *_, times in rows_], dtype=float))
    assert value == pytest.approx(distribution(repeated), nan_ok=True)


def test_every_figure_has_an_interval_around_it(tmp_path: Path) -> None:
    colours = ["red", "green", "blue", "grey"]
    data = {
        f"q{n}": question(colours[n % 3], imageId=f"n{n // 3}", group=f"g{n % 2}", entailed=[f"q{(n + 1) % 60}"])
        for n in range(60)
    }
    said = rows(**{f"q{n}": colours[n % 3 if n % 5 else 3 - n % 4] for n in range(60)})
    (tmp_path / "c.json").write_text(json.dumps({key: {"valid": ["red", "blue"], "plausible": ["red"]} for key in data}))
    found = score("gqa", said, data, bootstrap=300, choices=str(tmp_path / "c.json"))
    assert set(found["ci95"]) == set(found["metrics"]) >= {"distribution", "consistency", "validity", "plausibility"}
    for name, (low, high) in found["ci95"].items():
        assert low <= found["metrics"][name] <= high, name
        # Pictures are drawn, and answers of some are worse.
        assert low < high, name
    assert score("gqa", said, data, bootstrap=300, choices=str(tmp_path / "c.json")) == found


def test_tasks_rows_and_submission(tmp_path: Path) -> None:
    (tmp_path / "q.json").write_text(json.dumps(truth()))
    asked = load_task(
        TaskConfig(task="gqa", annotations=str(tmp_path / "q.json"), image_root="images", prompt="{question} Short.")
    )
    assert [e.id for e in asked] == ["q1", "q2", "q3", "q4", "q5"]
    assert (asked[0].images[0].name, asked[0].references, asked[0].type) == ("images/n1.jpg", ["red"], "query")
    said = {e.id: "Red." for e in asked}
    suite = find_suite("gqa")
    written = [{"questionId": f"q{n}", "prediction": "red"} for n in range(1, 6)]
    assert suite.rows(asked, said) == written
    path = suite.write_submission(tmp_path, asked, said)
    assert path is not None and json.loads(path.read_text()) == written
    # The result file gives the figures of the raw answers.
    assert score("gqa", written, truth(), bootstrap=0)["metrics"]["accuracy"] == pytest.approx(1 / 3)
    test_set = {"t": {"question": "?", "imageId": "n9", "isBalanced": True}}
    (tmp_path / "t.json").write_text(json.dumps(test_set))
    (one,) = load_task(TaskConfig(task="gqa", questions=str(tmp_path / "t.json"), image_root="images"))
    assert (one.id, one.references, one.images[0].name) == ("t", [], "images/n9.jpg")


GOOD = rows(q1="red", q2="yes", q3="blue")


@pytest.mark.parametrize(
    ("results", "annotations", "part"),
    [
        ([], truth(), "no results in the file"),
        (GOOD[:2], truth(), "1 of 3 questions have no result: q3"),
        (GOOD + rows(q9="x"), truth(), "results for 1 unknown questions: q9"),
        (GOOD + rows(q1="x"), truth(), "more than one row for questionId q1 (rows 1, 4)"),
        (
            [{"questionId": 1, "prediction": "x"}],
            truth(),
            '"questionId" is a number in 1 of 1 rows: 1; write ids as texts',
        ),
        ([{"questionId": "q1"}], truth(), "row 'q1' has no \"prediction\" (row 1)"),
        (GOOD, [], "GQA questions are an object by id, this is list"),
        (GOOD, {}, "no questions in the file"),
        (GOOD, {**truth(), "q2": 3}, "question number 2 is int, not an object"),
        (GOOD, {**truth(), "q2": question(3)}, "question 'q2' has \"answer\" 3, not a text (row 2)"),  # type: ignore[arg-type]
        (GOOD, {**truth(), "q2": question("x", isBalanced=1)}, "types or groups: q2"),
        (GOOD, {**truth(), "q2": question("x", types={})}, "types or groups: q2"),
        (GOOD, {**truth(), "q2": question("x", groups=None)}, "types or groups: q2"),
        (GOOD, {**truth(), "q2": question("x", entailed=[1])}, "types or groups: q2"),
        (GOOD, {"q1": question("x", isBalanced=False)}, "no question is balanced"),
        (
            GOOD,
            {"q1": {"question": "?", "imageId": "1", "isBalanced": True}},
            'no question has an "answer", as in the file',
        ),
    ],
)
def test_faults_are_named(results: Any, annotations: Any, part: str) -> None:
    with pytest.raises(InputError) as caught:
        score("gqa", results, annotations)
    assert part in str(caught.value) and "\n" not in str(caught.value)


def test_an_id_that_comes_twice_is_named(tmp_path: Path) -> None:
    text = json.dumps(truth())
    (tmp_path / "q.json").write_text(text.replace('"q2"', '"q1"'))
    with pytest.raises(InputError, match=r"q\.json: more than one row for key q1 \(rows 1, 2\)"):
        read_gqa(tmp_path / "q.json")


def test_a_cut_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "q.json").write_text(json.dumps(truth())[:-30])
    with pytest.raises(InputError, match=r"q\.json:1:\d+: .*looks cut off"):
        read_gqa(tmp_path / "q.json")
    with pytest.raises(InputError, match="questions does not apply to gqa"):
        score("gqa", GOOD, truth(), {})


def test_missing_answers_are_left_out_when_asked() -> None:
    found = score("gqa", GOOD[:2], truth(), allow_missing=True, bootstrap=0)
    assert found["n"] == 2 and found["settings"]["scored"] == "2 of 3"
