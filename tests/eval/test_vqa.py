"""VQAv2 and TextVQA rules against the official evaluators' figures, question by question."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmkit.eval.score import score
from mmkit.eval.scorers.normalise import (
    ARTICLES,
    CONTRACTIONS,
    NUMBERS,
    clean,
    normalise_lmms,
    normalise_m4c,
    normalise_vqa,
    process_digits_and_articles,
    process_punctuation,
)
from mmkit.eval.scorers.textvqa import textvqa_accuracy
from mmkit.eval.scorers.vizwiz import normalise_vizwiz
from mmkit.eval.scorers.vqa import RULES, leave_one_out, rule_2021, vqa_accuracy


def load(path: Path) -> Any:
    return json.loads(path.read_text())


def entries(answers: list[str]) -> list[dict[str, Any]]:
    return [{"answer": a, "answer_confidence": "yes", "answer_id": n} for n, a in enumerate(answers, start=1)]


@pytest.mark.parametrize(
    ("rule", "key"), [("official", "official_2021"), ("2017", "official_2017"), ("always", "lmms_vqav2_0_7_2")]
)
def test_recorded_cases(shared: Path, rule: str, key: str) -> None:
    stem = str(shared / "scoring/vqa_cases_a_")
    files = [f"{stem}{part}.json" for part in ("results", "annotations", "questions")]
    result = score("vqav2", *files, rule=rule, bootstrap=20)
    expected = load(Path(f"{stem}expected.json"))
    assert result["n"] == 30
    assert round(100 * result["metrics"]["accuracy"], 2) == expected["overall"][key]
    for kind, value in expected["per_answer_type"].get(key, {}).items():
        assert round(100 * result["metrics"][f"accuracy_{kind}"], 2) == value
    types = result["breakdown"]["question_type"]
    for kind, value in expected["per_question_type"].get(key, {}).items():
        assert round(100 * types[kind]["accuracy"], 2) == value
    assert sum(row["n"] for row in types.values()) == 30
    got = {row["id"]: round(100 * row["accuracy"], 2) for row in result["per_sample"]}
    assert got == {row["question_id"]: row[key] for row in expected["per_question"]}
    assert result["settings"]["rule"] == rule
    assert set(result["ci95"]) == set(result["metrics"])


def test_recorded_m4c_cases(shared: Path) -> None:
    expected = load(shared / "scoring/vqa_cases_a_expected.json")
    total = 0.0
    for row in expected["per_question"]:
        assert normalise_m4c(row["prediction"]) == row["m4c_normalised_prediction"]
        accuracy = textvqa_accuracy(row["prediction"], row["answers"])
        assert round(100 * accuracy, 2) == row["m4c_textvqa"], row["question_id"]
        total += accuracy
    assert round(100 * total / expected["n"], 2) == expected["overall"]["m4c_textvqa"]


def test_textvqa_from_files(shared: Path, tmp_path: Path) -> None:
    expected = load(shared / "scoring/vqa_cases_a_expected.json")["per_question"]
    data = [
        {"question_id": r["question_id"], "image_id": f"i{n // 3}", "question": "?", "answers": r["answers"]}
        for n, r in enumerate(expected)
    ]
    rows = [{"question_id": r["question_id"], "answer": r["prediction"]} for r in expected]
    (tmp_path / "val.json").write_text(json.dumps({"data": data}))
    (tmp_path / "out.json").write_text(json.dumps(rows))
    result = score("textvqa", tmp_path / "out.json", tmp_path / "val.json")
    assert round(100 * result["metrics"]["accuracy"], 2) == 95.0
    assert list(result["metrics"]) == ["accuracy"]
    assert (result["settings"]["rule"], result["settings"]["images"]) == ("m4c", 10)
    low, high = result["ci95"]["accuracy"]
    assert low < 0.95 < high


def test_contraction_table() -> None:
    assert len(CONTRACTIONS) == 120
    for key, value in {
        "dont": "don't",
        "couldnt've": "couldn't've",
        "couldn'tve": "couldn't've",
        "Ive": "I've",
        "hed've": "he'd've",
        "he'dve": "he'd've",
        "whos": "who's",
        "theyre": "they're",
        "somebody'd": "somebodyd",
        "Im": "I'm",
        "twas": "'twas",
        "'ow'sat": "'ow's'at",
    }.items():
        assert CONTRACTIONS[key] == value
    assert "cant" in CONTRACTIONS
    assert "its" not in CONTRACTIONS
    assert NUMBERS["none"] == "0"
    assert NUMBERS["ten"] == "10"


@pytest.mark.parametrize(
    ("raw", "clean"),
    [
        ("two", "2"),
        ("a building", "building"),
        ("snow, mountain", "snow mountain"),
        ("isnt", "isn't"),
        ("the two mountain's \t \n   ", "2 mountain 's"),
        ("red,white", "redwhite"),
        ("1,000 m/s", "1000 m s"),
        ("Im here", "im here"),
    ],
)
def test_m4c_processor_cases_of_mmf(raw: str, clean: str) -> None:
    assert normalise_m4c(raw) == clean


@pytest.mark.parametrize(
    ("raw", "clean"),
    [
        ("red,white", "red white"),
        ("1,000 m/s", "1000 ms"),
        ("t- shirt", "t shirt"),
        ("3.5", "3.5"),
        ("U.S.A.", "usa"),
        ("$5 & 50%", "$5 & 50%"),
        ("the None of it", "0 of it"),
    ],
)
def test_vqa_processing(raw: str, clean: str) -> None:
    assert normalise_vqa(raw) == clean


@pytest.mark.parametrize(
    ("raw", "vqa", "lmms", "m4c", "vizwiz"),
    [
        # Recorded from lmms-eval 0.7.3 (columns lmms and m4c); the VQA code is Python 2, VizWiz's Python 3.
        (".\u0663", "\u0663", ".\u0663", ".\u0663", ".\u0663"),
        ("\u0663,\u0663 m/s", "\u0663 \u0663 m s", "\u0663\u0663 ms", "\u0663\u0663 m s", "\u0663\u0663 ms"),
        ("1,,000 m/s", "1  000 m s", "1000 ms", "1000 m s", "1  000 m s"),
        ("5.", "5", "5", "5", "5"),
        (".5.", ".5", ".5", ".5", ".5"),
    ],
)
def test_digits_as_each_evaluator_sees_them(raw: str, vqa: str, lmms: str, m4c: str, vizwiz: str) -> None:
    got = (normalise_vqa(raw), normalise_lmms(raw), normalise_m4c(raw), normalise_vizwiz(raw))
    assert got == tuple(" ".join(text.split()) for text in (vqa, lmms, m4c, vizwiz))


def test_at_most_32_periods_go() -> None:
    assert process_punctuation("a." * 40).count(".") == 8


@pytest.mark.parametrize(("matches", "value"), [(0, 0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1), (10, 1)])
def test_leave_one_out(matches: int, value: float) -> None:
    assert leave_one_out("x", ["x"] * matches + ["y"] * (10 - matches)) == pytest.approx(value)


def test_unanimous_answers_are_compared_raw_since_2021() -> None:
    assert vqa_accuracy("Yes", entries(["yes"] * 10), RULES["official"]) == 0
    assert vqa_accuracy("Yes", entries(["yes"] * 10), RULES["2017"]) == 1
    assert vqa_accuracy("Yes", entries(["yes"] * 9 + ["no"]), RULES["official"]) == 1


def test_rules_differ_on_number_words_in_the_answers() -> None:
    truth = entries(["none"] * 9 + ["0"])
    assert vqa_accuracy("0", truth, RULES["official"]) == 1
    assert vqa_accuracy("0", truth, RULES["2017"]) == pytest.approx(0.3)


def test_equal_entries_without_ids_lose_their_votes_as_upstream() -> None:
    bare = [{"answer": "x"}] * 10
    assert vqa_accuracy("x", bare, RULES["official"]) == 0
    assert vqa_accuracy("x", entries(["x"] * 10), RULES["official"]) == 1


def literal_accuracy(prediction: str, answers: list[str]) -> float:
    """The official loop, written out."""
    values = []
    for index in range(len(answers)):
        others = answers[:index] + answers[index + 1 :]
        values.append(min(1.0, sum(other == prediction for other in others) / 3))
    return sum(values) / len(values)


@settings(max_examples=200, deadline=None)
@given(st.sampled_from("abc"), st.lists(st.sampled_from("abc"), min_size=10, max_size=10))
def test_closed_form_equals_the_loop(prediction: str, answers: list[str]) -> None:
    assert leave_one_out(prediction, answers) == pytest.approx(literal_accuracy(prediction, answers), abs=1e-12)


def literal_punctuation(text: str, comma: str = "[0-9],[0-9]", period: str = r"\.(?![0-9])") -> str:
    """The official loop over all marks, written out without the short cut."""
    out = text
    for mark in ';/[]"{}()=+\\_-><@`,?!':
        if mark + " " in text or " " + mark in text or re.search(comma, text):
            out = out.replace(mark, "")
        else:
            out = out.replace(mark, " ")
    return re.sub(period, "", out, count=32)


def literal_words(text: str) -> str:
    """The official loops over words, one after another: number words and articles, then contractions."""
    words = []
    for word in text.lower().split():
        number = NUMBERS.get(word, word)
        if number not in ARTICLES:
            words.append(number)
    return " ".join(CONTRACTIONS.get(word, word) for word in words)


def literal_rule_2021(prediction: str, answers: list[str]) -> tuple[str, list[str]]:
    """The rule since 2021 in upstream's order: everything stripped, then everything processed unless all agree."""
    prediction, answers = clean(prediction), [clean(answer) for answer in answers]
    if len(set(answers)) > 1:
        answers = [literal_words(literal_punctuation(answer)) for answer in answers]
        prediction = literal_words(literal_punctuation(prediction))
    return prediction, answers


PIECES = [
    *(
        "a",
        "the",
        "An",
        "none",
        "ten",
        "Two",
        "dont",
        "couldnt've",
        "y'alldve",
        "somebody'd",
        "Im",
        "1,000",
        "3.5",
        "U.S.A.",
        "red",
    ),
    *(" ", "  ", "\n", "\t", ".", "..", ",", ", ", " -", "- ", "/", "?", "!", '"', "'s", "`", "@", "_", "\\", "[", "(", "\u2019"),
    *("\u00a0", "\u3000", "\u0660,\u0661", "\u00b2", "\u0130", "\U0001f600", "\r", "\x1c", "." * 40, "1.", ".5"),
]
NASTY = st.lists(st.sampled_from(PIECES) | st.text(max_size=3), max_size=12).map("".join)


@settings(max_examples=500, deadline=None)
@given(NASTY)
def test_fast_processing_equals_the_plain_one(text: str) -> None:
    assert process_punctuation(text) == literal_punctuation(text)
    assert process_digits_and_articles(text) == literal_words(text)
    assert normalise_vqa(text) == literal_words(literal_punctuation(clean(text)))
    # From the cache the second time.
    assert normalise_vqa(text) == literal_words(literal_punctuation(clean(text)))
    lowered = text.lower().replace(",", "").replace("?", "").replace("'s", " 's").strip()
    # Programs for Python 3 know the digits of all scripts.
    assert normalise_m4c(text) == literal_words(literal_punctuation(clean(lowered), r"\d,+\d", r"\.(?!\d)"))
    assert normalise_lmms(text) == literal_words(literal_punctuation(clean(text), r"\d,+\d", r"\.(?!\d)"))


@settings(max_examples=300, deadline=None)
@given(NASTY, st.lists(NASTY, min_size=1, max_size=3), st.lists(st.integers(0, 2), min_size=10, max_size=10))
def test_fast_rule_equals_the_plain_one(prediction: str, texts: list[str], picks: list[int]) -> None:
    answers = [texts[pick % len(texts)] + " " * (pick % 2) for pick in picks]
    assert rule_2021(prediction, answers) == literal_rule_2021(prediction, answers)


@settings(max_examples=300, deadline=None)
@given(st.text(alphabet="ab1 ,.?!-/'\"\t", max_size=20))
def test_punctuation_equals_the_loop(text: str) -> None:
    assert process_punctuation(text) == literal_punctuation(text)


@settings(max_examples=200, deadline=None)
@given(st.text(max_size=60))
def test_any_answer(text: str) -> None:
    for normalise in (normalise_vqa, normalise_m4c):
        clean = normalise(text)
        assert clean == clean.strip()
        assert "\n" not in clean
    assert "  " not in process_digits_and_articles(text)
    for rule in RULES.values():
        assert 0 <= vqa_accuracy(text, entries([text] * 5 + ["x"] * 5), rule) <= 1
    assert textvqa_accuracy(text, [text] * 10) == 1
