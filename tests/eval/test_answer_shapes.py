"""Answers of the wrong shape are counted, and shouted about where they are the rule."""

from __future__ import annotations

import logging
from typing import Any

import pytest

from mmkit.eval.result import answer_shapes
from mmkit.eval.score import score

SENTENCE = "The word on the sign is clearly stop."


def test_sentences_against_textvqa_are_shouted_about(caplog: pytest.LogCaptureFixture) -> None:
    truth = {"data": [{"question_id": n, "image_id": str(n), "question": "?", "answers": ["stop"] * 10} for n in range(10)]}
    rows: list[dict[str, Any]] = [{"question_id": n, "answer": SENTENCE} for n in range(9)] + [{"question_id": 9, "answer": ""}]
    with caplog.at_level(logging.WARNING):
        found = score("textvqa", rows, truth, bootstrap=0)
    assert found["metrics"]["accuracy"] == 0
    assert found["answers"] == {"total": 10, "empty": 1, "long": 9, "unparsed": 0, "defaulted": 0}
    loud, empty = found["settings"]["notes"]
    assert loud.startswith("WARNING: 9 of 10 answers have more than 5 words (90%)") and "single word or phrase" in loud
    assert empty == "1 of 10 answers are empty"
    assert any("WARNING: 9 of 10" in record.message for record in caplog.records)


def test_a_few_long_answers_are_mentioned_quietly() -> None:
    counts, notes = answer_shapes(["stop"] * 19 + [SENTENCE])
    assert counts["long"] == 1
    assert notes == ["1 of 20 answers have more than 5 words and can hardly match"]
    # From a tenth on it is a habit.
    assert answer_shapes(["stop"] * 18 + [SENTENCE] * 2)[1][0].startswith("WARNING")


def test_an_answer_as_long_as_a_true_one_is_not_long() -> None:
    sign = "no parking at any time here"
    assert answer_shapes([sign], references=[["stop", sign]])[0]["long"] == 0
    assert answer_shapes([f"{sign} ever"], references=[["stop", sign]])[0]["long"] == 1
    assert answer_shapes([sign], references=[[]])[0]["long"] == 1


def test_short_answers_need_no_word() -> None:
    assert answer_shapes(["stop", "two dogs"]) == ({"total": 2, "empty": 0, "long": 0, "unparsed": 0, "defaulted": 0}, [])
    assert answer_shapes([SENTENCE], long_words=None)[0]["long"] == 0
    counts, notes = answer_shapes(["x"], unparsed=1)
    assert counts["unparsed"] == 1 and notes == ["1 of 1 answers could not be parsed and count as wrong"]
