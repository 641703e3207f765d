"""``mmkit bench vqa-metrics``: official scoring of a VQA v2 validation set against the official loop, written out plainly."""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from mmkit.bench.measure import interleaved
from mmkit.errors import InputError
from mmkit.eval.score import score
from mmkit.eval.scorers.formats import read_results, read_vqa
from mmkit.eval.scorers.normalise import ARTICLES, CONTRACTIONS, NUMBERS, PUNCTUATION

# VQA v2 val: 214,354 questions on 40,504 pictures.
QUESTIONS, PER_PICTURE = 214_354, 5.3
_KINDS = ("yes/no", "number", "other")
_STARTS = ("is the", "how many", "what", "what color is the", "are there", "none of the above", "where is the", "why")
# What makes an answer hard for the rules: articles, number words, lost apostrophes, punctuation, capitals.
_ODD = ("the {}", "{}.", "{}, yes", "a {} and 2", "dont {}", "{}'s", "{}/two", "The {}", " {} ", "1,000 {}")


def run(
    *, questions: int = QUESTIONS, answers: int = 10, bootstrap: int = 1000, repeats: int = 1, seed: int = 0
) -> dict[str, Any]:
    """Time `mmkit.score` on files of the official layout, and the plain loop on the same files.

    Both read the JSON files and score every question by the rule of 2021. mmkit also checks the files, and gives intervals and
    breakdowns. Answers are made up: yes/no, numbers, and phrases of a vocabulary with Zipf's frequencies, a tenth of them odd.

    Args:
        questions: Questions; VQA v2 val by default.
        answers: Human answers of each; the official rule needs 10.
        bootstrap: Resamples behind mmkit's intervals.
        repeats: Timed rounds, interleaved, after none to warm up: what is measured is one scoring of fresh files.
        seed: Of the made-up answers.

    Returns:
        Conditions, seconds of both sides with the reading told apart, their ratios, and the largest difference of a score.

    Raises:
        InputError: Other than ten answers.
    """
    if answers != 10:
        raise InputError(f"answers={answers}", where="bench vqa-metrics", mend="the official rule needs answers=10")
    with tempfile.TemporaryDirectory(prefix="mmkit-bench-") as name:
        annotations, results = make_files(Path(name), questions, seed)
        megabytes = (annotations.stat().st_size + results.stat().st_size) / 1e6
        found: dict[str, Any] = {}

        def keep(key: str, value: Any) -> None:
            found[key] = value

        # Reading apart too: it is most of a scoring (LOG.md).
        contenders: dict[str, Callable[[], object]] = {
            "mmkit": lambda: keep("mmkit", score("vqav2", results, annotations, bootstrap=bootstrap, seed=seed)),
            "mmkit, reading alone": lambda: (read_vqa(annotations), read_results(results, key="question_id", text="answer")),
            "plain loop": lambda: keep("peer", plain_evaluation(annotations, results)),
            "plain loop, reading alone": lambda: (_load(annotations), _load(results)),
        }
        seconds = interleaved(contenders, repeats=repeats, warmup=0)
    ours = {row["id"]: row["accuracy"] for row in found["mmkit"]["per_sample"]}
    mine, peer = seconds["mmkit"], seconds["plain loop"]
    scoring = [seconds[name] - seconds[f"{name}, reading alone"] for name in ("mmkit", "plain loop")]
    return {
        "conditions": f"{questions} questions x {answers} answers, {megabytes:.0f} MB of JSON, rule official, {bootstrap} "
        f"resamples, one process, median of {repeats}",
        **{f"{name} s": round(value, 2) for name, value in seconds.items()},
        "questions/s, mmkit": round(questions / mine),
        "speed, mmkit / plain loop": round(peer / mine, 2),
        "speed without reading, mmkit / plain loop": round(scoring[1] / max(scoring[0], 1e-9), 2),
        "accuracy": round(found["mmkit"]["metrics"]["accuracy"], 6),
        "largest difference of a score": max(abs(ours[key] - value) for key, value in found["peer"].items()),
    }


def make_files(folder: Path, questions: int, seed: int) -> tuple[Path, Path]:
    """Write made-up VQA v2 annotations and results.

    Args:
        folder: An existing folder.
        questions: Number of questions.
        seed: Equal arguments give equal files.

    Returns:
        Paths of the annotations and of the results.
    """
    rng = np.random.default_rng(seed)
    # Letters at random: real answers belong to their data set, and the rules look at words, not at meaning.
    words = ["".join(rng.choice(list("abcdefghijklmnoprstuwy"), n)) for n in rng.integers(3, 9, 20_000)]
    rows, results = [], []
    for n in range(questions):
        # VQA v2 val: 37.6 % yes/no, 13.0 % number, 49.4 % other.
        kind = _KINDS[int(rng.choice(3, p=(0.376, 0.130, 0.494)))]
        common = _answer(rng, kind, words)
        # In three of ten questions all people agree; elsewhere each has an answer of his own now and then.
        # Both branches of the rule have work by that.
        doubt = 0.0 if rng.random() < 0.3 else rng.uniform(0, 0.7)
        said = [_answer(rng, kind, words) if rng.random() < doubt else common for _ in range(10)]
        # With a number for each: to the official code two people of equal answer, confidence and number are one.
        entries = [{"answer": text, "answer_confidence": "yes", "answer_id": i} for i, text in enumerate(said, start=1)]
        start = _STARTS[int(rng.integers(len(_STARTS)))]
        row = {"question_type": start, "multiple_choice_answer": common, "answers": entries, "image_id": int(n / PER_PICTURE)}
        rows.append({**row, "answer_type": kind, "question_id": n})
        # About what a good model gets right.
        guess = common if rng.random() < 0.7 else _answer(rng, kind, words)
        results.append({"question_id": n, "answer": guess})
    annotations = {"info": {}, "license": {}, "data_type": "mscoco", "data_subtype": "val2014", "annotations": rows}
    paths = folder / "annotations.json", folder / "results.json"
    for path, data in zip(paths, (annotations, results), strict=True):
        path.write_text(json.dumps(data), encoding="utf-8")
    return paths


def _answer(rng: np.random.Generator, kind: str, words: list[str]) -> str:
    """One made-up answer."""
    if kind == "yes/no":
        return ("yes", "no")[int(rng.integers(2))]
    if kind == "number":
        # Zipf's tail has no end, numbers in answers do.
        return str(min(int(rng.zipf(1.6)), 10_000))
    picked = [words[min(int(rng.zipf(1.3)), len(words)) - 1] for _ in range(1 + int(rng.integers(3)) // 2)]
    text = " ".join(picked)
    return _ODD[int(rng.integers(len(_ODD)))].format(text) if rng.random() < 0.1 else text


def _load(path: Path) -> Any:
    """A JSON file as the peer reads it."""
    with path.open(encoding="utf-8") as file:
        return json.load(file)


def plain_evaluation(annotations: Path, results: Path) -> dict[int, float]:
    """The official evaluation (GT-Vision-Lab/VQA a013f00) as its description has it, step by step and without short cuts.

    Args:
        annotations: VQA v2 annotations.
        results: VQA results.

    Returns:
        Question id -> accuracy.
    """
    given = {row["question_id"]: row["answer"] for row in _load(results)}
    accuracies = {}
    for row in _load(annotations)["annotations"]:
        prediction = _plain_clean(given[row["question_id"]])
        entries = row["answers"]
        for entry in entries:
            entry["answer"] = _plain_clean(entry["answer"])
        # Where all people agree the official code compares the texts as they are.
        if len({entry["answer"] for entry in entries}) > 1:
            for entry in entries:
                entry["answer"] = _plain_words(_plain_marks(entry["answer"]))
            prediction = _plain_words(_plain_marks(prediction))
        each = []
        for entry in entries:
            # As dictionaries, which is what makes the official loop slow.
            others = [other for other in entries if other != entry]
            matches = [other for other in others if other["answer"] == prediction]
            each.append(min(1.0, len(matches) / 3))
        accuracies[row["question_id"]] = sum(each) / len(each)
    return accuracies


def _plain_clean(text: str) -> str:
    """Step 1: line feeds and tabs become spaces, ends are stripped."""
    return text.replace("\n", " ").replace("\t", " ").strip()


def _plain_marks(text: str) -> str:
    """Step 2: punctuation, mark by mark."""
    result = text
    for mark in PUNCTUATION:
        # Asked of the text as it came, and not of what the marks before have made of it.
        if mark + " " in text or " " + mark in text or re.search("[0-9],[0-9]", text):
            result = result.replace(mark, "")
        else:
            result = result.replace(mark, " ")
    # 32 at most: the official code gives re.UNICODE (32) in the place of the count.
    return re.sub(r"\.(?![0-9])", "", result, count=32)


def _plain_words(text: str) -> str:
    """Step 3: number words, articles, contractions."""
    words = []
    for word in text.lower().split():
        number = NUMBERS.get(word, word)
        if number not in ARTICLES:
            words.append(number)
    for place, word in enumerate(words):
        if word in CONTRACTIONS:
            words[place] = CONTRACTIONS[word]
    return " ".join(words)
