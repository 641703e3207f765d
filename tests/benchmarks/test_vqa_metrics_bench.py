"""The VQA benchmark gives equal scores on both sides, and every figure; how fast it is, is no test."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mmkit.bench import run_bench
from mmkit.bench.vqa_metrics import make_files, plain_evaluation
from mmkit.errors import InputError
from mmkit.eval.scorers.formats import read_vqa


def test_both_sides_agree() -> None:
    found = run_bench("vqa-metrics", {"questions": "150", "bootstrap": "10"})
    assert found["largest difference of a score"] < 1e-12
    assert 0 < found["accuracy"] < 1
    assert {"mmkit s", "mmkit, reading alone s", "plain loop s", "speed, mmkit / plain loop"} <= set(found)
    assert "150 questions x 10 answers" in found["conditions"] and "10 resamples" in found["conditions"]
    with pytest.raises(InputError, match="answers=10"):
        run_bench("vqa-metrics", {"answers": "5"})


def test_the_peer_is_the_official_rule(shared: Path) -> None:
    stem = str(shared / "scoring/vqa_cases_a_")
    found = plain_evaluation(Path(f"{stem}annotations.json"), Path(f"{stem}results.json"))
    expected = json.loads(Path(f"{stem}expected.json").read_text())["per_question"]
    assert {key: round(100 * value, 2) for key, value in found.items()} == {
        r["question_id"]: r["official_2021"] for r in expected
    }


def test_made_up_answers_are_varied_and_repeatable(tmp_path: Path) -> None:
    annotations, _ = make_files(tmp_path, 300, 0)
    before = annotations.read_text()
    make_files(tmp_path, 300, 0)
    assert annotations.read_text() == before
    make_files(tmp_path, 300, 1)
    assert annotations.read_text() != before
    known = read_vqa(annotations)
    agreed = sum(len({entry["answer"] for entry in q.answers}) == 1 for q in known.values())
    # The two branches of the rule both have work.
    assert 60 < agreed < 240
    assert {q.answer_type for q in known.values()} == {"yes/no", "number", "other"}
