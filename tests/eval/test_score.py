"""`score`: its layout, its settings, and one clear line for every bad file."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmkit.errors import InputError
from mmkit.eval.score import parse_settings, score
from mmkit.eval.scorers import formats
from mmkit.eval.suites import suite_names


def annotations(images: int = 3) -> dict[str, Any]:
    return {
        "images": [{"id": n} for n in range(images)],
        "annotations": [{"image_id": n, "id": 10 + n, "caption": f"a red bus number {n}"} for n in range(images)],
    }


def results(images: int = 3) -> list[dict[str, Any]]:
    return [{"image_id": n, "caption": f"a bus number {n}"} for n in range(images)]


def vqa(count: int = 3) -> dict[str, Any]:
    answers = [{"answer": "yes", "answer_id": n} for n in range(1, 11)]
    rows = [{"question_id": n, "image_id": n // 2, "answer_type": "yes/no", "answers": answers} for n in range(count)]
    return {"annotations": rows}


def refusal(*args: Any, **settings: Any) -> str:
    with pytest.raises(InputError) as caught:
        score(*args, **settings)
    text = str(caught.value)
    assert "\n" not in text
    return text


def test_layout() -> None:
    result = score("coco-caption", results(), annotations())
    assert list(result) == ["task", "metrics", "ci95", "n", "settings", "per_sample"]
    assert set(result["ci95"]) == set(result["metrics"])
    assert all(low <= result["metrics"][name] + 1e-9 for name, (low, _) in result["ci95"].items())
    assert [row["id"] for row in result["per_sample"]] == [0, 1, 2]
    assert result["settings"]["tokenizer"] == "python"
    assert json.loads(json.dumps(result)) == result


def test_inputs_are_not_changed_and_repeats_are_equal() -> None:
    data = (results(), annotations())
    before = copy.deepcopy(data)
    assert score("coco-caption", *data) == score("coco-caption", *data)
    assert data == before


def test_seed_changes_the_interval_only() -> None:
    rows = [{**row, "caption": "a red bus" * (n % 3) + "x"} for n, row in enumerate(results(9))]
    one, two = (score("coco-caption", rows, annotations(9), seed=seed) for seed in (0, 1))
    assert one["metrics"] == two["metrics"]
    assert one["ci95"] != two["ci95"]


def test_no_bootstrap_no_interval() -> None:
    assert score("coco-caption", results(), annotations(), bootstrap=0)["ci95"] == {}


def test_order_of_the_results_does_not_matter() -> None:
    assert score("coco-caption", results()[::-1], annotations()) == score("coco-caption", results(), annotations())


def test_good_files(shared: Path) -> None:
    folder = shared / "broken"
    result = score("coco-caption", str(folder / "results_good.json"), folder / "captions_good.json")
    assert result["n"] == 6
    assert result["metrics"]["CIDEr"] > 1


def test_coco_mini_questions_score_one_when_copied(shared: Path) -> None:
    folder = shared / "coco-mini"
    truth = json.loads((folder / "vqa_val_annotations.json").read_text())["annotations"]
    rows = [{"question_id": row["question_id"], "answer": row["multiple_choice_answer"]} for row in truth]
    result = score("vqav2", rows, folder / "vqa_val_annotations.json", folder / "vqa_val_questions.json", bootstrap=10)
    assert result["metrics"] == dict.fromkeys(["accuracy", "accuracy_number", "accuracy_other", "accuracy_yes/no"], 1.0)
    assert (result["n"], result["settings"]["images"]) == (797, 79)


@pytest.mark.parametrize(
    ("predictions", "truth", "parts"),
    [
        ("results_good.json", "captions_cut.json", ["captions_cut.json:", "line", "column", "looks cut off"]),
        ("results_good.json", "captions_unknown_image_ids.json", ["captions_unknown_image_ids.json", "999, 1000"]),
        (
            "results_good.json",
            "captions_wrong_fields.json",
            ['annotation 107 has no "caption"', "annotation 108 has \"image_id\" '4'", 'annotation 109 has "caption" None'],
        ),
        ("results_unknown_image_ids.json", "captions_good.json", ["results_unknown_image_ids.json", "unknown", "999"]),
        ("results_duplicate.json", "captions_good.json", ["results_duplicate.json", "more than one row for image 3"]),
        ("results_missing.json", "captions_good.json", ["2 of 6 images", "5, 6", "allow_missing=true"]),
        ("results_string_ids.json", "captions_good.json", ["'1'", "string in 6 of 6 rows", "without quotes"]),
        ("captions_good.json", "results_good.json", ["results_good.json", 'no list "images"']),
        ("absent.json", "captions_good.json", ["absent.json", "cannot read", "check the path"]),
        ("good.jpg", "captions_good.json", ["good.jpg", "not UTF-8"]),
        ("pairs_empty.jsonl", "captions_good.json", ["pairs_empty.jsonl", "empty"]),
    ],
)
def test_broken_caption_files(shared: Path, predictions: str, truth: str, parts: list[str]) -> None:
    folder = shared / "broken"
    text = refusal("coco-caption", folder / predictions, folder / truth)
    assert [part for part in parts if part not in text] == []


def test_broken_vqa_results_name_both_faults(shared: Path) -> None:
    folder = shared / "broken"
    files = ("vqa_results_missing_and_extra.json", "vqa_annotations.json", "vqa_questions.json")
    text = refusal("vqav2", *(folder / name for name in files))
    assert "vqa_results_missing_and_extra.json" in text
    assert "99999" in text
    assert "1002" in text


def test_missing_results_are_scored_when_asked(shared: Path) -> None:
    folder = shared / "broken"
    result = score(
        "coco-caption", folder / "results_missing.json", folder / "captions_good.json", allow_missing=True, bootstrap=10
    )
    assert result["n"] == 4
    assert result["settings"]["scored"] == "4 of 6"
    assert result["settings"]["missing"] == 2
    # Document frequencies are those of the four.
    truth = json.loads((folder / "captions_good.json").read_text())
    truth["images"] = truth["images"][:4]
    truth["annotations"] = [row for row in truth["annotations"] if row["image_id"] <= 4]
    alone = score("coco-caption", folder / "results_missing.json", truth, bootstrap=10)
    assert alone["metrics"] == result["metrics"]
    assert "scored" not in alone["settings"]


def test_allow_missing_is_no_licence_for_unknown_ids_or_nothing() -> None:
    assert "99" in refusal("coco-caption", [{"image_id": 99, "caption": "x"}], annotations(), allow_missing=True)
    rows = [*results(2), {"image_id": 99, "caption": "x"}]
    assert "99" in refusal("coco-caption", rows, annotations(), allow_missing=True)


def test_at_most_five_ids_are_named() -> None:
    text = refusal("coco-caption", results(1), annotations(12))
    assert "1, 2, 3, 4, 5 and 6 more" in text


@pytest.mark.parametrize(
    ("rows", "part"),
    [
        ({"a": 1}, "results are a JSON list"),
        ([], "no results"),
        ([1], "row number 1 is int"),
        ([{"caption": "x"}], 'row number 1 has no "image_id"'),
        ([{"image_id": True, "caption": "x"}], "not a whole number"),
        ([{"image_id": 0.0, "caption": "x"}], "not a whole number"),
        ([{"image_id": 0}], 'row 0 has no "caption"'),
        ([{"image_id": 0, "caption": ["x"]}], "not a text"),
    ],
)
def test_wrong_result_rows(rows: Any, part: str) -> None:
    text = refusal("coco-caption", rows, annotations())
    assert part in text
    assert text.startswith("predictions")


@pytest.mark.parametrize(
    ("change", "part"),
    [
        ({"images": []}, '"images" is empty'),
        ({"annotations": None}, 'no list "annotations"'),
        ({"images": [{"id": n} for n in (0, 1, 2, 2)]}, "more than one row for image 2"),
        ({"images": [{"id": n} for n in range(4)]}, "images without a caption: 3"),
    ],
)
def test_wrong_annotations(change: dict[str, Any], part: str) -> None:
    assert part in refusal("coco-caption", results(), {**annotations(), **change})


def answers_of(count: int) -> list[dict[str, Any]]:
    return [{"answer": "x", "answer_id": n} for n in range(count)]


@pytest.mark.parametrize(
    ("change", "part"),
    [
        ({"answers": answers_of(9)}, "question 0 has 9 answers"),
        ({"answers": "yes"}, "no list of answers"),
        ({"answers": ["yes"] * 10}, 'an answer that is not {"answer"'),
        ({"answers": [{"answer": "x", "answer_id": []}] * 10}, 'an answer that is not {"answer"'),
        ({"answer_type": None}, '"answer_type" None'),
        ({"question_id": 1}, "more than one row for question 1"),
    ],
)
def test_wrong_vqa_annotations(change: dict[str, Any], part: str) -> None:
    data = vqa()
    data["annotations"][0] = {**data["annotations"][0], **change}
    assert part in refusal("vqav2", [{"question_id": n, "answer": "yes"} for n in range(3)], data)


def test_questions_of_another_split() -> None:
    rows = [{"question_id": n, "answer": "yes"} for n in range(3)]
    questions = {"questions": [{"question_id": n, "image_id": 7, "question": "?"} for n in range(3)]}
    assert "differ on question 0, 1, 2" in refusal("vqav2", rows, vqa(), questions)


@pytest.mark.parametrize(
    ("data", "part"),
    [
        ({"annotations": []}, 'no list "data"'),
        ({"data": [{"question_id": 1, "question": "?", "answers": ["x"] * 9}]}, "question 1 has 9 answers"),
        ({"data": [{"question_id": 1, "question": "?", "answers": [1] * 10}]}, "not a text"),
        ({"data": [{"question_id": "1", "question": "?", "answers": ["x"] * 10}]}, "not a whole number"),
    ],
)
def test_wrong_textvqa_annotations(data: Any, part: str) -> None:
    assert part in refusal("textvqa", [{"question_id": 1, "answer": "x"}], data)


@pytest.mark.parametrize(
    ("task", "given_", "parts"),
    [
        ("coco-captions", {}, ["'coco-captions'", "did you mean coco-caption?", *suite_names()]),
        ("coco-caption", {"tokenizer": "pyton"}, ["'pyton'", "did you mean python?", "java", "none"]),
        ("coco-caption", {"rule": "official"}, ["rule does not apply to coco-caption"]),
        ("coco-caption", {"bootstrap": -1}, ["bootstrap", "-1"]),
        ("vqav2", {"rule": "2018"}, ["'2018'", "did you mean 2017?", "official", "always"]),
        ("vqav2", {"tokenizer": "python"}, ["tokenizer does not apply to vqav2"]),
        ("textvqa", {"rule": "official"}, ["rule does not apply to textvqa"]),
        ("textvqa", {"questions": {}}, ["questions does not apply to textvqa"]),
        ("textvqa", {"tokenizer": "none"}, ["tokenizer does not apply"]),
        ("vqav2", {"allow_missing": "false"}, ["allow_missing is true or false, not 'false'"]),
        ("vqav2", {"seed": "x"}, ["seed", "'x'"]),
    ],
)
def test_unknown_settings(task: str, given_: dict[str, Any], parts: list[str]) -> None:
    text = refusal(task, [], {}, **given_)
    assert [part for part in parts if part not in text] == []


def test_settings_of_a_command_line() -> None:
    words = {"tokenizer": "none", "metrics": "bleu,cider", "bootstrap": "20", "seed": "3", "allow_missing": "True"}
    known = {"tokenizer": "none", "metrics": "bleu,cider", "bootstrap": 20, "seed": 3, "allow_missing": True}
    assert parse_settings("coco-caption", words) == known
    for word, part in (
        ({"tokeniser": "none"}, "did you mean tokenizer?"),
        ({"rule": "2017"}, "rule does not apply to coco-caption"),
        ({"bootstrap": "1e3"}, "whole number"),
        ({"bootstrap": "²"}, "whole number"),
        ({"allow_missing": "1"}, "true or false"),
    ):
        with pytest.raises(InputError) as caught:
            parse_settings("coco-caption", word)
        assert part in str(caught.value)


def test_long_and_empty_answers_are_noted() -> None:
    rows = [{"question_id": n, "answer": text} for n, text in enumerate(["yes", "", "it is one of the many things"])]
    notes = score("vqav2", rows, vqa(), bootstrap=0)["settings"]["notes"]
    assert "1 of 3 answers have more than 5 words" in notes[0]
    assert "1 of 3 answers are empty" in notes[1]


def test_byte_order_mark_is_read(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    path.write_bytes(b"\xef\xbb\xbf" + json.dumps(results()).encode())
    assert score("coco-caption", path, annotations(), bootstrap=0)["n"] == 3


@pytest.mark.parametrize("cut", [1, 12, 30, 60])
def test_a_cut_file_is_named_so(tmp_path: Path, cut: int) -> None:
    path = tmp_path / "results.json"
    path.write_text(json.dumps(results(), indent=1)[:-cut])
    assert "looks cut off" in refusal("coco-caption", path, annotations())


def test_a_fault_in_the_middle_is_not_called_a_cut(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    path.write_text('[\n{"image_id": 1 "caption": "x"}]')
    text = refusal("coco-caption", path, annotations())
    assert "results.json:2:16" in text
    assert "cut off" not in text


def test_deep_nesting_and_folders_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "deep.json"
    path.write_text("[" * 200_000)
    assert "deep.json" in refusal("coco-caption", path, annotations())
    assert "cannot read" in refusal("coco-caption", tmp_path, annotations())


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-2, 3) | st.text(max_size=3),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["images", "annotations", "data", "id", "image_id", "caption", "answers"]), inner)
    ),
    max_leaves=12,
)


@settings(max_examples=150, deadline=None)
@given(JSON.filter(lambda value: not isinstance(value, str)))
def test_any_json_is_scored_or_refused(data: Any) -> None:
    for read in (
        formats.read_captions,
        formats.read_vqa,
        formats.read_textvqa,
        lambda value: formats.read_results(value, key="image_id", text="caption"),
    ):
        try:
            read(data)
        except InputError as error:
            assert "\n" not in str(error)
