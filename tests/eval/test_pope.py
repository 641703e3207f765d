"""POPE: official figures, pairing by id, and one clear line for every bad file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from mmkit.config import TaskConfig
from mmkit.errors import InputError
from mmkit.eval.score import score
from mmkit.eval.suites import find_suite
from mmkit.eval.tasks import load_task

# TP, FP, TN, FN of LLaVA-1.5 7B; those of popular and adversarial follow from the F1 that was published.
LLAVA = {"random": (1183, 31, 1379, 317), "popular": (1183, 59, 1441, 317), "adversarial": (1183, 117, 1383, 317)}


def lines(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def labels_of(split: str, count: int = 4, **more: Any) -> list[dict[str, Any]]:
    return [
        {
            "question_id": n,
            "image": f"COCO_val2014_{n // 2:012d}.jpg",
            "text": f"Is there a {split} thing {n} in the image?",
            "label": "yes" if n % 2 else "no",
            **more,
        }
        for n in range(1, count + 1)
    ]


def world(folder: Path, count: int = 4) -> Path:
    labels = folder / "labels"
    labels.mkdir()
    for split in LLAVA:
        lines(labels / f"coco_pope_{split}.json", labels_of(split, count))
    return labels


def answers(count: int = 4, text: str = "Yes") -> list[dict[str, Any]]:
    return [{"question_id": n, "category": split, "answer": text} for split in LLAVA for n in range(1, count + 1)]


def refusal(*args: Any, **settings: Any) -> str:
    with pytest.raises(InputError) as caught:
        score("pope", *args, **settings)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_recorded_answers(shared: Path) -> None:
    folder = shared / "scoring/pope"
    found = score("pope", folder / "answers_random.jsonl", folder / "coco_pope_random.json", bootstrap=50)
    expected = json.loads((folder / "expected.json").read_text())["splits"]["random"]
    for name in ("accuracy", "precision", "recall", "f1", "yes_ratio"):
        assert found["metrics"][name] == found["metrics"][f"{name}_random"] == expected[name]
        low, high = found["ci95"][name]
        assert low < expected[name] < high
    parts = found["breakdown"]["split"]
    assert {key: parts["random"][key] for key in ("TP", "FP", "TN", "FN", "n")} == {
        key: expected[key] for key in ("TP", "FP", "TN", "FN", "n")
    }
    assert parts["pooled"] == parts["random"]
    assert found["settings"]["random_version"] == "HEAD" and found["settings"]["images"] == 500
    # Of the generated answers many say neither word; all of them count as yes, and the score says how many.
    assert found["answers"] == {"total": 3000, "empty": 152, "long": 811, "unparsed": 0, "defaulted": 1002}
    assert any("1002 of 3000 answers say neither" in note for note in found["settings"]["notes"])
    assert any("only random" in note for note in found["settings"]["notes"])


def test_order_of_the_recorded_answers_has_no_effect(shared: Path, tmp_path: Path) -> None:
    folder = shared / "scoring/pope"
    rows = [json.loads(line) for line in (folder / "answers_random.jsonl").read_text().splitlines()]
    turned = score("pope", lines(tmp_path / "a.jsonl", rows[::-1]), folder / "coco_pope_random.json", bootstrap=5)
    assert (
        turned["metrics"]
        == score("pope", folder / "answers_random.jsonl", folder / "coco_pope_random.json", bootstrap=5)["metrics"]
    )


def test_published_mean_of_llava(tmp_path: Path) -> None:
    labels, said = {}, []
    for split, (tp, fp, tn, fn) in LLAVA.items():
        pairs = [("yes", "Yes")] * tp + [("no", "Yes")] * fp + [("no", "No")] * tn + [("yes", "No")] * fn
        rows = labels_of(split, len(pairs))
        labels[split] = [{**row, "label": label} for row, (label, _) in zip(rows, pairs, strict=True)]
        said += [{"question_id": n, "category": split, "answer": a} for n, (_, a) in enumerate(pairs, start=1)]
    found = score("pope", lines(tmp_path / "a.jsonl", said), labels, bootstrap=0)
    got = found["metrics"]
    assert list(got)[:5] == ["f1", "accuracy", "precision", "recall", "yes_ratio"]
    assert got["f1_random"] == 0.8717759764185703 and got["accuracy_random"] == 0.8804123711340206
    assert got["f1_popular"] == 0.8628738147337709 and got["f1_adversarial"] == 0.8450000000000001
    assert got["f1"] == pytest.approx(0.859883263717447, abs=1e-15)
    assert found["settings"]["questions"] == {"random": 2910, "popular": 3000, "adversarial": 3000}
    assert found["settings"]["random_version"] == "LLaVA's (e3e3926)"
    assert found["breakdown"]["split"]["pooled"]["n"] == 8910


def test_lmms_rule_takes_exact_words_only(tmp_path: Path) -> None:
    labels = {"random": labels_of("random")}
    said = {1: "yes", 2: " No ", 3: "Yes, it is", 4: "no."}
    rows = [{"question_id": n, "answer": text} for n, text in said.items()]
    found = score("pope", rows, labels, rule="lmms", bootstrap=0)
    assert found["answers"]["unparsed"] == 2 and found["answers"]["defaulted"] == 0
    assert found["metrics"]["accuracy"] == 0.5 and found["metrics"]["yes_ratio"] == 0.25
    assert [row["parsed"] for row in found["per_sample"]] == ["yes", "no", "", ""]
    # As in lmms-eval, what is neither word is no miss: F1 is 1 on half the answers, and the score says so.
    assert found["metrics"]["f1"] == 1
    assert any("precision, recall and F1 leave them out" in note for note in found["settings"]["notes"])
    assert score("pope", rows, labels, bootstrap=0)["metrics"]["accuracy"] == 1
    assert "did you mean lmms" in refusal(rows, labels, rule="lmm")


def test_no_yes_at_all_is_said_not_divided_by(tmp_path: Path) -> None:
    found = score("pope", answers(text="No"), world(tmp_path), bootstrap=20)
    assert (found["metrics"]["f1"], found["metrics"]["precision"], found["metrics"]["accuracy"]) == (0, 0, 0.5)
    assert sum("no answer of" in note for note in found["settings"]["notes"]) == 3


def test_pictures_are_drawn_with_their_questions_of_all_splits() -> None:
    # One picture: every draw is the whole set, so no interval has any width.
    labels = {split: [{**row, "image": "a.jpg"} for row in labels_of(split)] for split in LLAVA}
    found = score("pope", answers(), labels)
    assert found["settings"]["images"] == 1
    assert all(low == high for low, high in found["ci95"].values())


def test_one_file_a_split_in_a_folder(tmp_path: Path) -> None:
    labels, folder = world(tmp_path), tmp_path / "answers"
    folder.mkdir()
    for split in LLAVA:
        rows = [{"question_id": n, "answer": "No" if split == "popular" else "Yes"} for n in range(1, 5)]
        lines(folder / f"coco_{split}_answers.jsonl", rows[::-1])
    found = score("pope", folder, labels, bootstrap=0)
    assert found["metrics"]["yes_ratio_popular"] == 0 and found["metrics"]["yes_ratio_random"] == 1
    # Official answers have no ids: order will do while every question is repeated.
    rows = [{"question": row["text"], "answer": "Yes"} for row in labels_of("popular")]
    lines(folder / "coco_popular_answers.jsonl", rows)
    assert score("pope", folder, labels, bootstrap=0)["metrics"]["yes_ratio_popular"] == 1
    lines(folder / "coco_popular_answers.jsonl", [rows[1], rows[0], *rows[2:]])
    assert "coco_popular_answers.jsonl:1: question popular/1 is 'Is there a popular thing 2" in refusal(folder, labels)
    lines(folder / "coco_popular_answers.jsonl", rows[1:])
    assert "3 answers without question_id to 4 questions" in refusal(folder, labels)
    lines(folder / "coco_popular_answers.jsonl", [{"answer": "Yes"}] * 4)
    assert 'jsonl:1: the answer to popular/1 has no "question"' in refusal(folder, labels)


def test_llavas_ids_run_through_all_splits(tmp_path: Path) -> None:
    labels = world(tmp_path)
    asked, said = [], []
    for split in ("adversarial", "popular", "random"):
        for row in labels_of(split):
            text = f"{row['text']}\nAnswer the question using a single word or phrase."
            asked.append({"question_id": len(asked), "image": row["image"], "text": text, "category": split})
            said.append(
                {"question_id": len(said), "prompt": text, "text": "Yes" if row["label"] == "yes" else "No", "metadata": {}}
            )
    questions = lines(tmp_path / "llava_pope_test.jsonl", asked)
    found = score("pope", lines(tmp_path / "llava.jsonl", said[::-1]), labels, questions, bootstrap=0)
    assert found["metrics"]["f1"] == 1 and found["n"] == 12
    assert "question 99 is not in the question file" in refusal([*said, {**said[0], "question_id": 99}], labels, questions)
    assert 'has no "category"' in refusal(said, labels)
    assert "give LLaVA's question file as questions" in refusal(said, labels)
    asked[0]["text"] = "Is there something else?"
    assert "unknown questions: adversarial/LLaVA 0" in refusal(said, labels, lines(tmp_path / "q.jsonl", asked))
    assert "comes twice" in refusal(said, labels, lines(tmp_path / "q.jsonl", [asked[1], asked[1]]))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda rows: rows[1:], "1 of 12 questions have no result: random/1"),
        (lambda rows: [*rows, rows[0]], "a.jsonl:13: a second answer to question random/1 (the first: "),
        (lambda rows: [*rows, {**rows[0], "question_id": 9}], "a.jsonl:13: answers to 1 unknown questions: random/9"),
        (lambda rows: [{**rows[0], "question_id": "1"}, *rows[1:]], "a.jsonl:1: has \"question_id\" '1', not a whole number"),
        (lambda rows: [{**rows[0], "answer": 1}, *rows[1:]], 'a.jsonl:1: question random/1 has "answer" 1, not a text'),
        (lambda rows: [{"question_id": 1, "category": "random"}, *rows[1:]], 'question random/1 has no "prediction" or'),
        (lambda rows: [{**rows[0], "category": "rare"}, *rows[1:]], "question 1 has \"category\" 'rare'"),
        (lambda rows: [{**rows[0], "question": "Is it?"}, *rows[1:]], "question random/1 is 'Is it?' here"),
    ],
)
def test_faults_of_the_answers(tmp_path: Path, change: Any, said: str) -> None:
    assert said in refusal(lines(tmp_path / "a.jsonl", change(answers())), world(tmp_path))


def test_broken_files(tmp_path: Path) -> None:
    labels = world(tmp_path)
    path = lines(tmp_path / "a.jsonl", answers())
    path.write_text(path.read_text()[:-20])
    assert "a.jsonl:12: not JSON" in refusal(path, labels) and "cut off" in refusal(path, labels)
    path.write_text("")
    assert "empty" in refusal(path, labels)
    assert "cannot read the predictions file" in refusal(tmp_path / "none.jsonl", labels)
    lines(path, answers())
    random = labels / "coco_pope_random.json"
    good = labels_of("random")
    for rows, said in (
        ([*good, good[0]], "coco_pope_random.json:5: question 1 comes twice"),
        ([{**good[0], "label": "maybe"}, *good[1:]], "coco_pope_random.json:1: question 1 has label 'maybe'"),
        ([{**good[0], "image": None}, *good[1:]], 'question 1 has "image" None'),
        ([{"text": "?"}, *good[1:]], 'coco_pope_random.json:1: has no "question_id"'),
    ):
        lines(random, rows)
        assert said in refusal(path, labels)
    lines(random, good)
    lines(labels / "gqa_pope_random.json", good)
    assert "two files of split random" in refusal(path, labels)
    (tmp_path / "empty").mkdir()
    assert "no labels file of random, popular, adversarial" in refusal(path, tmp_path / "empty")
    assert "says none of random" in refusal(path, lines(tmp_path / "labels.json", good))
    assert "not rows by split" in refusal(path, good)


def test_allow_missing_says_so(tmp_path: Path) -> None:
    found = score("pope", answers()[1:], world(tmp_path), allow_missing=True, bootstrap=0)
    assert found["n"] == 11 and found["settings"]["scored"] == "11 of 12"


def test_examples_and_their_results_fit(tmp_path: Path) -> None:
    labels = world(tmp_path)
    config = TaskConfig(task="pope", annotations=str(labels), image_root="/pictures", prompt="{question}\nShort.")
    asked = load_task(config)
    assert len(asked) == 12 and len({e.id for e in asked}) == 12
    first = asked[0]
    assert (first.id, first.type, first.references) == ("random/1", "random", ["yes"])
    assert first.images[0].name == "/pictures/COCO_val2014_000000000000.jpg"
    assert first.prompt == f"{first.question}\nShort."
    renamed = load_task(config.model_copy(update={"image_name": "{:06d}.png"}))
    assert renamed[0].images[0].name == "/pictures/000000.png"
    suite = find_suite("pope")
    suite.write_results(tmp_path / "r.json", asked, {e.id: e.references[0] for e in asked})
    found = score("pope", tmp_path / "r.json", labels, bootstrap=0)
    assert found["metrics"]["f1"] == 1 and [row["id"] for row in found["per_sample"]] == [e.id for e in asked]
