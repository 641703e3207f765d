"""POPE (Li et al. 2023): is this object in the picture? Three splits, random, popular and adversarial.

Label files: the official JSON lines (``question_id``, ``image``, ``text``, ``label``), ``coco_pope_SPLIT.json`` for each.
Question ids start anew in each split, so mmkit's own are ``SPLIT/ID``.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from mmkit.config import TaskConfig
from mmkit.eval.examples import Example, fill_prompt, picture_file, required
from mmkit.eval.result import Score, Settings, coverage, make_score
from mmkit.eval.scorers.answer_files import match_answers
from mmkit.eval.scorers.json_files import Source
from mmkit.eval.scorers.pope_files import SPLITS, Label, read_labels, read_pope_answers
from mmkit.eval.scorers.yesno import COUNTERS, FIGURES, POPE_RULES, pope_defaulted, pope_figures
from mmkit.eval.statistics import Floats, bootstrap_ci
from mmkit.eval.suites.parsed import count_answers, sample_rows
from mmkit.eval.suites.suite import Predictions, Suite

EVALUATORS = {"official": "AoiDragon/POPE evaluate.py, 08d957b", "lmms": "lmms-eval pope, 0.7 (for each split)"}
# Questions of the random split, by which its two versions are told apart.
RANDOM_VERSIONS = {3000: "HEAD", 2910: "LLaVA's (e3e3926)"}


def examples(config: TaskConfig) -> list[Example]:
    """An example for each question of each split.

    Args:
        config: ``annotations`` is the folder of the label files, or one of them; ``image_root`` is COCO's val2014.

    Raises:
        InputError: Broken files, or a picture's name that cannot be made.
    """
    return [
        Example(
            key,
            (picture_file(config, _coco_id(row.image), row.image, "{}"),),
            fill_prompt(config, question=row.text),
            row.text,
            [row.label],
            row.split,
        )
        for key, row in read_labels(required(config, "annotations")).items()
    ]


def _coco_id(name: str) -> int | str:
    """The image id in a COCO file name, for ``image_name`` patterns; the name itself where there is none."""
    found = re.search(r"(\d+)\.\w+$", name)
    return int(found[1]) if found else name


def rows(asked: Sequence[Example], predictions: Predictions) -> list[dict[str, Any]]:
    """Result rows: the official ``question`` and ``answer``, with the id and the split that pair them with their label."""
    return [
        {
            "question_id": int(str(e.id).partition("/")[2]),
            "category": e.type,
            "question": e.question,
            "answer": predictions[e.id],
        }
        for e in asked
    ]


def score_pope(task: str, predictions: Source, annotations: Source, questions: Source | None, s: Settings) -> Score:
    """Score POPE: F1, accuracy, precision, recall and yes ratio of each split, and the means over the splits.

    Args:
        task: Name for messages and for the result.
        predictions: See `mmkit.eval.scorers.pope_files.read_pope_answers`.
        annotations: See `mmkit.eval.scorers.pope_files.read_labels`.
        questions: LLaVA's question file (llava_pope_test.jsonl), where the answers have its ids.
        s: Settings; ``rule`` (official, lmms).

    Returns:
        The design's score object; ``f1`` is the mean that papers report. Pictures are the clusters of the bootstrap: the splits
        ask about the same ones.

    Raises:
        InputError: See the readers; or answers and labels are about different questions.
    """
    rule = s.choice("rule", POPE_RULES, "official")
    known = read_labels(annotations)
    found = read_pope_answers(predictions, known, questions)
    ids, texts = match_answers(found, known, predictions, allow_missing=s.allow_missing)
    # In the order of the label files, whatever the order of the answers.
    labels = [known[key] for key in ids]
    parsed = [POPE_RULES[rule](texts[key]) for key in ids]
    splits = [split for split in SPLITS if any(row.split == split for row in labels)]
    counters = _counters(labels, parsed, splits)
    figures = _figures(counters.sum(axis=0, keepdims=True))[0]
    metrics = dict(zip(_names(splits), figures.tolist(), strict=True))
    # All splits ask about the same 500 pictures, so a picture brings its questions of every split along.
    clusters = [row.image for row in labels]
    intervals = bootstrap_ci(counters, _figures, clusters=clusters, resamples=s.bootstrap, seed=s.seed) if s.bootstrap else None
    counts, notes = _notes([texts[key] for key in ids], parsed, rule, splits, counters.sum(axis=0))
    asked = {split: sum(row.split == split for row in known.values()) for split in splits}
    version = {"random_version": RANDOM_VERSIONS.get(asked["random"], "neither official one")} if "random" in asked else {}
    settings = {
        "rule": rule,
        "evaluator": EVALUATORS[rule],
        "questions": asked,
        **version,
        "images": len(set(clusters)),
        "bootstrap": s.bootstrap,
        "seed": s.seed,
        **coverage(len(ids), len(known), s),
    }
    right = [float(row.label == answer) for row, answer in zip(labels, parsed, strict=True)]
    return make_score(
        task,
        metrics,
        intervals,
        settings=settings,
        per_sample=sample_rows(ids, [answer or "" for answer in parsed], {"accuracy": np.array(right)}),
        notes=notes,
        answers=counts,
        breakdown={"split": _breakdown(splits, counters.sum(axis=0))},
    )


def _counters(labels: Sequence[Label], parsed: Sequence[str | None], splits: Sequence[str]) -> Floats:
    """f64[N, 5 S]: a one in the counters of each answer's split, in the order of `COUNTERS`."""
    out = np.zeros((len(labels), len(COUNTERS) * len(splits)))
    cells = {("yes", "yes"): 0, ("no", "yes"): 1, ("no", "no"): 2, ("yes", "no"): 3}
    for row, (label, answer) in enumerate(zip(labels, parsed, strict=True)):
        start = len(COUNTERS) * splits.index(label.split)
        out[row, start + COUNTERS.index("n")] = 1
        # An unparsed answer is in n alone: wrong, and neither a yes nor a no.
        if answer is not None:
            out[row, start + cells[label.label, answer]] = 1
    return out


def _figures(sums: Floats) -> Floats:
    """f64[B, 5 S] counters -> f64[B, 5 + 5 S]: the means over the splits, then the figures of each split."""
    # Papers report the mean of the splits' F1, which is not the F1 of all answers pooled.
    each = [pope_figures(part) for part in np.split(sums, sums.shape[1] // len(COUNTERS), axis=1)]
    return np.concatenate([np.mean(each, axis=0), *each], axis=1)


def _names(splits: Sequence[str]) -> list[str]:
    """Names of the columns of `_figures`."""
    return [*FIGURES, *(f"{figure}_{split}" for split in splits for figure in FIGURES)]


def _breakdown(splits: Sequence[str], sums: Floats) -> dict[str, dict[str, float]]:
    """Counters and figures of each split and of all pooled, as lmms-eval pools them."""
    parts = dict(zip(splits, np.split(sums, len(splits)), strict=True))
    parts["pooled"] = np.sum(list(parts.values()), axis=0)
    return {
        name: {
            **dict(zip(COUNTERS, map(int, part), strict=True)),
            **dict(zip(FIGURES, pope_figures(part[None])[0].tolist(), strict=True)),
        }
        for name, part in parts.items()
    }


def _notes(
    texts: Sequence[str], parsed: Sequence[str | None], rule: str, splits: Sequence[str], sums: Floats
) -> tuple[Mapping[str, int], list[str]]:
    """Counts of odd answers, and what a reader should know."""
    defaulted = sum(map(pope_defaulted, texts)) if rule == "official" else 0
    # lmms-eval counts a miss only where "no" was said, so F1 can be high where hardly anything was answered.
    means = "are counted as wrong in accuracy; precision, recall and F1 leave them out, as in lmms-eval"
    counts, notes = count_answers(texts, unparsed=parsed.count(None), defaulted=defaulted, exact=rule == "lmms", means=means)
    if defaulted:
        notes.append(f"{defaulted} of {len(texts)} answers say neither yes nor no in their first sentence and count as yes")
    if len(splits) < len(SPLITS):
        notes.append(f"only {', '.join(splits)} of {', '.join(SPLITS)}: f1 is not the mean of three that papers report")
    for split, part in zip(splits, np.split(sums, len(splits)), strict=True):
        if part[0] + part[1] == 0:
            notes.append(f"no answer of {split} is yes: its precision and F1 are given as 0, where the official program stops")
    return counts, notes


SUITE = Suite("pope", examples, score_pope, rows, options=("rule",))
