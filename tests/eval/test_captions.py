"""BLEU, ROUGE-L and CIDEr-D against the official scorers' figures, corpus and every image."""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from needs_java import needs_java
from plain_captions import plain_cider_d, plain_lcs, plain_rouge_l

from mmkit.errors import InputError
from mmkit.eval.score import score
from mmkit.eval.scorers.bleu import bleu_counters, bleu_from_statistics, bleu_statistics, bleu_table, ngram_counts
from mmkit.eval.scorers.cider import cider_d
from mmkit.eval.scorers.families import chosen_families
from mmkit.eval.scorers.meteor import meteor_from_statistics, meteor_statistics
from mmkit.eval.scorers.ngrams import ngram_table
from mmkit.eval.scorers.rouge import lcs_length, rouge_l
from mmkit.eval.suites.captions import METRICS

EXACT = 1e-9
WORDS = st.lists(st.sampled_from(list("abcdef")), max_size=12).map(" ".join)


def load(path: Path) -> Any:
    return json.loads(path.read_text())


def coco(references: dict[str, list[str]], hypotheses: dict[str, str]) -> tuple[list[Any], dict[str, Any]]:
    """Put tokenised captions into COCO's two file formats."""
    rows = [(int(key), caption) for key, captions in references.items() for caption in captions]
    annotations = {
        "images": [{"id": int(key)} for key in references],
        "annotations": [{"image_id": key, "id": n, "caption": caption} for n, (key, caption) in enumerate(rows)],
    }
    return [{"image_id": int(key), "caption": text} for key, text in hypotheses.items()], annotations


def check(result: dict[str, Any], expected: dict[str, Any], metrics: Sequence[str] = METRICS) -> None:
    """Corpus values, BLEU counters and every image's values, to 1e-9."""
    assert list(result["metrics"]) == list(metrics)
    for name in metrics:
        assert result["metrics"][name] == pytest.approx(expected["corpus"][name], abs=EXACT), name
    counters = result["settings"]["bleu_counters"]
    for name in ("test_length", "reference_length", "guess", "correct"):
        assert counters[name] == expected["bleu_counts"][name], name
    assert counters["ratio"] == pytest.approx(expected["bleu_counts"]["ratio"], abs=1e-12)
    assert {str(row["id"]) for row in result["per_sample"]} == set(expected["per_image"])
    for row in result["per_sample"]:
        for name in metrics:
            assert row[name] == pytest.approx(expected["per_image"][str(row["id"])][name], abs=EXACT), (row["id"], name)


@pytest.mark.parametrize(("tokenizer", "part"), [("none", "as_is"), ("python", "ptb")])
def test_fakecap(shared: Path, tokenizer: str, part: str) -> None:
    folder = shared / "scoring"
    result = score(
        "coco-caption",
        folder / "coco_fakecap_a.json",
        folder / "coco_fakecap_a_annotations.json",
        tokenizer=tokenizer,
        bootstrap=0,
    )
    assert (result["n"], result["settings"]["references"]) == (500, 2501)
    check(result, load(folder / "coco_fakecap_a_expected.json")[part])


def test_human_from_raw_captions(shared: Path) -> None:
    folder = shared / "scoring"
    result = score("coco-caption", folder / "coco_human_results.json", folder / "coco_human_annotations.json", bootstrap=50)
    check(result, load(folder / "coco_human_expected.json")["ptb"])
    assert result["settings"]["tokenizer"] == "python"
    for name, (low, high) in result["ci95"].items():
        assert low < result["metrics"][name] < high


def test_human_from_tokenised_captions(shared: Path) -> None:
    folder = shared / "scoring"
    rows = sorted(load(folder / "coco_human_ptb.json")["captions"], key=lambda row: row["id"])
    captions: dict[str, list[str]] = {}
    for row in rows:
        captions.setdefault(str(row["image_id"]), []).append(row["tokenised"])
    hypotheses = {key: group.pop(0) for key, group in captions.items()}
    result = score("coco-caption", *coco(captions, hypotheses), tokenizer="none", bootstrap=0)
    check(result, load(folder / "coco_human_expected.json")["ptb"])


def test_toy_cases(shared: Path) -> None:
    cases = load(shared / "scoring/caption_toy_cases.json")["cases"]
    assert len(cases) == 10
    for case in cases:
        data = coco(case["references"], case["hypotheses"])
        check(score("coco-caption", *data, tokenizer="none", bootstrap=0), case["expected"])


def test_published_toy_values() -> None:
    references = {
        "0": ["a man rides a wave", "a surfer on a wave"],
        "1": ["a man rides a horse", "a person on a horse"],
        "2": ["two dogs run in the snow"],
    }
    hypotheses = {"0": "a man on a wave", "1": "a man on a horse", "2": "a dog in the snow"}
    result = score("coco-caption", *coco(references, hypotheses), bootstrap=0)
    assert result["metrics"]["CIDEr"] == pytest.approx(3.6668958853530422, abs=1e-12)
    assert result["metrics"]["ROUGE_L"] == pytest.approx(0.7122189638318671, abs=1e-12)
    assert [row["CIDEr"] for row in result["per_sample"]] == pytest.approx([3.8507971643349954] * 2 + [3.299093327389136])


def test_identical_captions_score_the_maximum() -> None:
    references = {"1": ["a man rides a wave"], "2": ["two dogs run in the snow"]}
    result = score("coco-caption", *coco(references, {key: group[0] for key, group in references.items()}), bootstrap=0)
    assert result["metrics"]["CIDEr"] == pytest.approx(10, abs=1e-9)
    assert result["metrics"]["ROUGE_L"] == 1
    assert result["metrics"]["Bleu_4"] == pytest.approx(1, abs=1e-8)


def test_single_image_has_no_cider_and_says_so(caplog: pytest.LogCaptureFixture) -> None:
    result = score("coco-caption", *coco({"7": ["a cat sits"]}, {"7": "a cat sits"}), bootstrap=0)
    assert result["metrics"]["CIDEr"] == 0
    # guess_4 is 0, and the official smoothing shows.
    assert result["metrics"]["Bleu_4"] == pytest.approx(0.0316, abs=1e-4)
    assert "single image" in result["settings"]["notes"][0]
    assert "single image" in caplog.text


def test_odd_captions_shift_no_image(shared: Path) -> None:
    annotations = load(shared / "broken/odd_captions_annotations.json")
    rows = load(shared / "broken/odd_captions_results.json")
    plain = [{**row, "caption": "".join(" " if c in "\r\n\v\f\x85\u2028\u2029" else c for c in row["caption"])} for row in rows]
    assert plain != rows
    for tokenizer in ("python", "none"):
        odd, even = (score("coco-caption", data, annotations, tokenizer=tokenizer, bootstrap=0) for data in (rows, plain))
        assert odd["per_sample"] == even["per_sample"]
    by_id = {row["id"]: row for row in odd["per_sample"]}
    assert len(by_id) == 20
    # Seven ways to break the line, one caption.
    assert len({by_id[key]["CIDEr"] for key in (1, 3, 4, 5, 7)}) == 1
    assert "empty" in odd["settings"]["notes"][0]


def test_bleu_picks_the_closest_reference_and_the_shorter_on_a_tie() -> None:
    assert bleu_statistics("a b c d e", ["a b c d", "a b c d e f"])[1] == 4
    assert bleu_statistics("a b c d e", ["a b", "a b c d e f"])[1] == 6


def test_bleu_clips_by_the_largest_reference_count() -> None:
    statistics = bleu_statistics("a a a a", ["a b", "a a c"])
    assert statistics.tolist() == [4, 3, 4, 3, 2, 1, 2, 1, 0, 0]
    assert bleu_counters(statistics)["correct"] == [2, 1, 0, 0]


def test_bleu_of_nothing_is_zero_without_a_warning() -> None:
    with np.errstate(all="raise", under="ignore"):
        assert bleu_from_statistics(bleu_statistics("", ["a cat"])).tolist() == [0, 0, 0, 0]
        assert bleu_from_statistics(bleu_statistics("", [""])).tolist() == [0, 0, 0, 0]


def test_no_break_space_splits_for_bleu_but_not_for_rouge() -> None:
    assert bleu_statistics("22\u00a03/4 inches", ["22 3/4 inches"])[6] == 3
    assert rouge_l("22\u00a03/4 inches", ["22 3/4 inches"]) < 1


def test_ngram_counts() -> None:
    assert ngram_counts(["a", "b", "a"], 2) == {("a",): 2, ("b",): 1, ("a", "b"): 1, ("b", "a"): 1}


@settings(max_examples=200, deadline=None)
@given(WORDS, WORDS)
def test_lcs_equals_the_table(left: str, right: str) -> None:
    assert lcs_length(left.split(" "), right.split(" ")) == plain_lcs(left.split(" "), right.split(" "))


def test_long_caption_is_quick() -> None:
    words = " ".join(str(n % 50) for n in range(4000))
    assert rouge_l(words, [words, "1 2 3"]) == 1


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(WORDS, st.lists(WORDS, min_size=1, max_size=3)), min_size=1, max_size=5))
def test_scores_stay_in_range(images: list[tuple[str, list[str]]]) -> None:
    hypotheses, references = [h for h, _ in images], [r for _, r in images]
    for value in cider_d(hypotheses, references):
        assert -EXACT <= value <= 10 + EXACT
    for hypothesis, group in images:
        assert 0 <= rouge_l(hypothesis, group) <= 1 + EXACT
        bleu = bleu_from_statistics(bleu_statistics(hypothesis, group))
        assert ((bleu >= 0) & (bleu <= 1 + EXACT)).all()
        assert not math.isnan(bleu.sum())


@settings(max_examples=50, deadline=None)
@given(st.lists(st.lists(st.sampled_from("abcdefgh"), min_size=4, max_size=9, unique=True), min_size=2, max_size=4))
def test_copying_a_reference_is_never_beaten(images: list[list[str]]) -> None:
    references = [[" ".join(words)] for words in images]
    copied = cider_d([group[0] for group in references], references)
    reversed_ = cider_d([" ".join(words[::-1]) for words in images], references)
    assert all(best >= other - EXACT for best, other in zip(copied, reversed_, strict=True))


SETS = st.lists(st.tuples(WORDS, st.lists(WORDS, min_size=1, max_size=3)), min_size=1, max_size=6)


@settings(max_examples=200, deadline=None)
@given(SETS)
def test_fast_scorers_equal_their_definitions(images: list[tuple[str, list[str]]]) -> None:
    hypotheses, references = [h for h, _ in images], [r for _, r in images]
    table = ngram_table(hypotheses, references)
    plain = np.stack([bleu_statistics(h, r) for h, r in images])
    assert (bleu_table(table) == plain).all()
    assert cider_d(hypotheses, references) == pytest.approx(plain_cider_d(hypotheses, references), abs=1e-12)
    assert [rouge_l(h, r) for h, r in images] == pytest.approx([plain_rouge_l(h, r) for h, r in images], abs=1e-12)


def test_fast_scorers_equal_their_definitions_on_real_captions(shared: Path) -> None:
    folder = shared / "scoring"
    hypotheses = {row["image_id"]: row["caption"] for row in load(folder / "coco_fakecap_a.json")}
    references: dict[int, list[str]] = {}
    for row in load(folder / "coco_fakecap_a_annotations.json")["annotations"]:
        references.setdefault(row["image_id"], []).append(row["caption"])
    sides = [hypotheses[key] for key in references], list(references.values())
    pairs = list(zip(*sides, strict=True))
    assert (bleu_table(ngram_table(*sides)) == np.stack([bleu_statistics(h, r) for h, r in pairs])).all()
    assert cider_d(*sides) == pytest.approx(plain_cider_d(*sides), abs=1e-12)
    assert [rouge_l(h, r) for h, r in pairs] == pytest.approx([plain_rouge_l(h, r) for h, r in pairs], abs=1e-12)


def test_nothing_scores_nothing() -> None:
    assert cider_d([], []) == []
    assert bleu_table(ngram_table([], [])).shape == (0, 10)
    assert cider_d(["", ""], [[""], ["", ""]]) == [0, 0]


def test_metrics_names_families() -> None:
    data = coco({"1": ["a cat"], "2": ["a dog"]}, {"1": "a cat", "2": "a cow"})
    for given_, names in [("cider", ["CIDEr"]), (" Rouge, cider,rouge", ["ROUGE_L", "CIDEr"]), ("bleu", list(METRICS[:4]))]:
        result = score("coco-caption", *data, metrics=given_, bootstrap=20)
        assert list(result["metrics"]) == names == list(result["ci95"])
        assert all(set(row) == {"id", *names} for row in result["per_sample"])
        assert result["settings"]["metrics"] == ",".join(chosen_families(given_))
        assert ("bleu_counters" in result["settings"]) == (given_ == "bleu")
    full = score("coco-caption", *data, bootstrap=20)
    assert full["settings"]["metrics"] == "bleu,rouge,cider"
    part = score("coco-caption", *data, metrics="rouge", bootstrap=20)
    assert part["ci95"]["ROUGE_L"] == full["ci95"]["ROUGE_L"]


@pytest.mark.parametrize(
    ("given_", "part"), [("cidr", "did you mean cider?"), ("bleu,x", "unknown metric 'x'"), (" , ", "no metric named")]
)
def test_unknown_metrics(given_: str, part: str) -> None:
    with pytest.raises(InputError, match="metrics") as caught:
        score("coco-caption", *coco({"1": ["a"]}, {"1": "a"}), metrics=given_)
    assert part in str(caught.value)


@needs_java
@pytest.mark.slow
def test_meteor_is_the_official_one(shared: Path) -> None:
    folder = shared / "scoring"
    files = folder / "coco_human_results.json", folder / "coco_human_annotations.json"
    result = score("coco-caption", *files, metrics="meteor,bleu,rouge,cider", bootstrap=200)
    check(result, load(folder / "coco_human_expected.json")["ptb"], [*METRICS[:4], "METEOR", *METRICS[4:]])
    low, high = result["ci95"]["METEOR"]
    assert low < result["metrics"]["METEOR"] < high < low + 0.06
    assert "summed statistics" in result["settings"]["meteor"]


@needs_java
@pytest.mark.slow
def test_meteor_of_every_fixture(shared: Path) -> None:
    folder = shared / "scoring"
    cases = load(folder / "caption_toy_cases.json")["cases"]
    references: dict[str, list[str]] = {}
    for row in load(folder / "coco_fakecap_a_annotations.json")["annotations"]:
        references.setdefault(str(row["image_id"]), []).append(row["caption"])
    hypotheses = {str(row["image_id"]): row["caption"] for row in load(folder / "coco_fakecap_a.json")}
    expected = load(folder / "coco_fakecap_a_expected.json")["ptb"]
    cases.append({"name": "fakecap", "references": references, "hypotheses": hypotheses, "expected": expected})
    # One start of Java for all: METEOR of an image does not depend on the set.
    named = [(case, key) for case in cases for key in case["references"]]
    rows = meteor_statistics([c["hypotheses"][k] for c, k in named], [c["references"][k] for c, k in named])
    per_image = meteor_from_statistics(rows)
    assert len(rows) > 500
    for case in cases:
        mine = [n for n, (other, _) in enumerate(named) if other is case]
        for n in mine:
            assert per_image[n] == pytest.approx(case["expected"]["per_image"][named[n][1]]["METEOR"], abs=1e-12)
        total = meteor_from_statistics(rows[mine].sum(axis=0))
        assert total == pytest.approx(case["expected"]["corpus"]["METEOR"], abs=1e-12), case["name"]


GOOD = coco({"1": ["a cat"], "2": ["a dog", "two dogs"]}, {"1": "a cat", "2": "a cow"})


@settings(max_examples=300, deadline=None)
@given(st.data(), st.booleans())
def test_a_damaged_file_is_scored_as_it_reads_or_refused_in_one_line(data: st.DataObject, damage_results: bool) -> None:
    files = [json.dumps(part, indent=1).encode() for part in GOOD]
    chosen = 0 if damage_results else 1
    text = bytearray(files[chosen])
    for _ in range(data.draw(st.integers(1, 3))):
        begin = data.draw(st.integers(0, len(text)))
        end = data.draw(st.integers(begin, min(len(text), begin + 12)))
        text[begin:end] = data.draw(
            st.sampled_from([b"", b"1", b'"', b"}", b"]", b",", b"\xff", b"null", b"1e999", b"NaN", b"\n"])
        )
    with tempfile.TemporaryDirectory() as folder:
        paths = [Path(folder) / name for name in ("results.json", "annotations.json")]
        for number, path in enumerate(paths):
            path.write_bytes(text if number == chosen else files[number])
        try:
            result = score("coco-caption", *paths, bootstrap=0)
        except InputError as error:
            assert "\n" not in str(error)
            # By name: the damaged file, or the other one that it no longer fits.
            assert ".json" in str(error)
        else:
            # A digit or a letter was changed: whatever is scored is whole.
            json.dumps(result, allow_nan=False)
            assert result["n"] == len(json.loads(paths[1].read_bytes().decode("utf-8-sig"))["images"])
