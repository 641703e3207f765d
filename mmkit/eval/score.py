"""Official scoring of a result file: ``mmkit score``, ``mmkit.score`` and the scoring half of ``mmkit eval``.

One JSON object comes out whatever the task: metrics as fractions, 95 % intervals, the settings that the numbers depend
on, and the score of every sample.
"""

from __future__ import annotations

import difflib
import logging
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from mmkit.errors import InputError
from mmkit.eval.scorers import bleu, formats, ptb
from mmkit.eval.scorers.cider import cider_d
from mmkit.eval.scorers.formats import Source, VqaQuestion
from mmkit.eval.scorers.rouge import rouge_l
from mmkit.eval.scorers.textvqa import textvqa_accuracy
from mmkit.eval.scorers.vqa import RULE_SOURCES, RULES, vqa_accuracy
from mmkit.eval.statistics import Floats, bootstrap_ci, ratio_of_sums

logger = logging.getLogger(__name__)

Score = dict[str, Any]
BLEU_NAMES = tuple(f"Bleu_{n}" for n in range(1, bleu.MAX_N + 1))
CAPTION_METRICS = (*BLEU_NAMES, "ROUGE_L", "CIDEr")
SETTINGS = ("tokenizer", "rule", "allow_missing", "bootstrap", "seed")
# Official answers are one to three words; a model that answers in sentences scores near zero, and should hear why.
_LONG_ANSWER_WORDS = 5


@dataclass(frozen=True)
class Settings:
    """What the caller asked for; None where a setting was not given and the task's default holds."""

    tokenizer: str | None = None
    rule: str | None = None
    allow_missing: bool = False
    bootstrap: int = 1000
    seed: int = 0


def _nearest(value: str, known: Iterable[str]) -> str:
    """List the known names, the nearest one first."""
    names = list(known)
    near = difflib.get_close_matches(value, names, n=1)
    hint = f"did you mean {near[0]}? " if near else ""
    return f"{hint}known: {', '.join(names)}"


def _choice(value: str | None, known: Iterable[str], default: str, setting: str) -> str:
    """Take a setting's value or its default; refuse what is not known."""
    names = list(known)
    chosen = default if value is None else str(value)
    if chosen not in names:
        raise InputError(f"unknown {setting} {chosen!r}", where=setting, mend=_nearest(chosen, names))
    return chosen


def _refuse(value: object, setting: str, task: str) -> None:
    """Refuse a setting that would have no effect: whoever gave it believes that it has one."""
    if value is not None:
        raise InputError(f"{setting} does not apply to {task}", where=setting, mend=f"leave {setting} out")


def _coverage(scored: int, known: int, allow_missing: bool) -> dict[str, Any]:
    """Say how much of the set was scored, where less than all was allowed."""
    return {"allow_missing": True, "missing": known - scored, "scored": f"{scored} of {known}"} if allow_missing else {}


def _result(
    task: str,
    metrics: Mapping[str, float],
    intervals: Floats | None,
    *,
    settings: Mapping[str, Any],
    per_sample: Sequence[Mapping[str, Any]],
    notes: Sequence[str],
) -> Score:
    """Lay the score out as the design's JSON object."""
    for note in notes:
        # In the log for whoever runs it, and in the settings below: a number that travels takes its caveat along.
        logger.warning("%s: %s", task, note)
    # Without a bootstrap there are no rows at all, hence strict=False below.
    rows = [] if intervals is None else intervals.tolist()
    # NaN is no JSON: a metric that no resample could give has no interval.
    ci95 = {name: row for name, row in zip(metrics, rows, strict=False) if not np.isnan(row).any()}
    return {
        "task": task,
        "metrics": dict(metrics),
        "ci95": ci95,
        "n": len(per_sample),
        "settings": {**settings, **({"notes": list(notes)} if notes else {})},
        "per_sample": list(per_sample),
    }


def _caption_statistics(sums: Floats) -> Floats:
    """Metrics of resampled sums: [B, 10 BLEU counters + ROUGE_L + CIDEr + 1] -> [B, 6]."""
    # ROUGE-L and CIDEr are means over images, and the last column counts those; BLEU is a ratio of its counters.
    means = sums[:, bleu.COLUMNS : -1] / sums[:, -1:]
    return np.concatenate([bleu.bleu_from_statistics(sums[:, : bleu.COLUMNS]), means], axis=1)


def score_captions(task: str, predictions: Source, annotations: Source, questions: Source | None, s: Settings) -> Score:
    """Score COCO captions: BLEU-1..4, ROUGE-L and CIDEr-D.

    Args:
        task: Name for messages and for the result.
        predictions: COCO caption results.
        annotations: COCO caption annotations.
        questions: Must be None.
        s: Settings.

    Returns:
        The design's score object. CIDEr's document frequencies stay those of the scored set in the bootstrap.

    Raises:
        InputError: See `mmkit.eval.scorers.formats`.
    """
    _refuse(questions, "questions", task)
    _refuse(s.rule, "rule", task)
    tokenizer = _choice(s.tokenizer, ptb.TOKENIZERS, "python", "tokenizer")
    references = formats.read_captions(annotations)
    results, name = formats.read_results(predictions, key="image_id", text="caption")
    ids = formats.match_results(results, references, kind="image", name=name, allow_missing=s.allow_missing)
    tokenise = ptb.TOKENIZERS[tokenizer]
    hypotheses = tokenise([results[key] for key in ids])
    # All references in one call: the Java tokenizer starts a virtual machine each time.
    flat = iter(tokenise([caption for key in ids for caption in references[key]]))
    grouped = [[next(flat) for _ in references[key]] for key in ids]

    # A row of additive numbers for each image: corpus score, single images and resamples then share one formula.
    counters = np.stack([bleu.bleu_statistics(h, r) for h, r in zip(hypotheses, grouped, strict=True)])
    rouge = [rouge_l(h, r) for h, r in zip(hypotheses, grouped, strict=True)]
    # CIDEr enters as each image's finished score: new document frequencies for every resample would be a whole
    # evaluation each.
    columns = np.column_stack([counters, rouge, cider_d(hypotheses, grouped), np.ones(len(ids))])
    metrics = dict(zip(CAPTION_METRICS, _caption_statistics(columns.sum(axis=0, keepdims=True))[0].tolist(), strict=True))
    # An image's BLEU is the corpus formula on one image, so the same function serves.
    rows = _caption_statistics(columns).tolist()
    per_sample = [{"id": key, **dict(zip(CAPTION_METRICS, row, strict=True))} for key, row in zip(ids, rows, strict=True)]
    # No clusters: each image has one caption, so images are what is drawn.
    intervals = bootstrap_ci(columns, _caption_statistics, resamples=s.bootstrap, seed=s.seed) if s.bootstrap else None
    settings = {
        "tokenizer": tokenizer,
        # Frequencies counted on all of val2014, as some captioning code has them, give other numbers.
        "cider": "CIDEr-D, document frequencies of this set",
        "references": sum(len(group) for group in grouped),
        # What the official notebook prints: whole numbers show where a difference in the last digits begins.
        "bleu_counters": bleu.bleu_counters(counters.sum(axis=0)),
        "bootstrap": s.bootstrap,
        "seed": s.seed,
        **_coverage(len(ids), len(references), s.allow_missing),
    }
    notes = _caption_notes(hypotheses)
    return _result(task, metrics, intervals, settings=settings, per_sample=per_sample, notes=notes)


def _caption_notes(hypotheses: Sequence[str]) -> list[str]:
    """What a reader should know before trusting the numbers."""
    notes = []
    if len(hypotheses) == 1:
        notes.append("CIDEr of a single image is always 0: no n-gram is rarer than another")
    empty = sum(not hypothesis for hypothesis in hypotheses)
    if empty:
        notes.append(f"{empty} of {len(hypotheses)} captions are empty after tokenising")
    return notes


def score_vqav2(task: str, predictions: Source, annotations: Source, questions: Source | None, s: Settings) -> Score:
    """Score VQAv2 answers, overall and by answer type.

    Args:
        task: Name for messages and for the result.
        predictions: VQA results.
        annotations: VQA annotations.
        questions: VQA questions, checked against the annotations where given.
        s: Settings.

    Returns:
        The design's score object.

    Raises:
        InputError: See `mmkit.eval.scorers.formats`.
    """
    _refuse(s.tokenizer, "tokenizer", task)
    # The official repository's HEAD is the default; which version the evaluation server runs is not public.
    name = _choice(s.rule, RULES, "official", "rule")
    known = formats.read_vqa(annotations, questions)
    rule = RULES[name]
    return _score_answers(task, predictions, known, s, name, lambda text, q: vqa_accuracy(text, q.answers, rule))


def score_textvqa(task: str, predictions: Source, annotations: Source, questions: Source | None, s: Settings) -> Score:
    """Score TextVQA answers by the M4C rule.

    Args:
        task: Name for messages and for the result.
        predictions: ``[{"question_id", "answer"}]``.
        annotations: TextVQA annotations; they hold the questions.
        questions: Must be None.
        s: Settings.

    Returns:
        The design's score object.

    Raises:
        InputError: See `mmkit.eval.scorers.formats`.
    """
    _refuse(s.tokenizer, "tokenizer", task)
    # mmf, LLaVA and lmms-eval share one TextVQA evaluator, so there is no rule to choose.
    _refuse(s.rule, "rule", task)
    _refuse(questions, "questions", task)
    # Ids and answers are checked by the readers; from here on nothing can be malformed.
    known = formats.read_textvqa(annotations)
    return _score_answers(
        task, predictions, known, s, "m4c", lambda text, q: textvqa_accuracy(text, [a["answer"] for a in q.answers])
    )


def _score_answers(
    task: str,
    predictions: Source,
    known: Mapping[int, VqaQuestion],
    s: Settings,
    rule: str,
    accuracy: Callable[[str, VqaQuestion], float],
) -> Score:
    """Score every answer, then the means over all and over each answer type, with images as bootstrap clusters."""
    results, name = formats.read_results(predictions, key="question_id", text="answer")
    ids = formats.match_results(results, known.keys(), kind="question", name=name, allow_missing=s.allow_missing)
    values = np.array([accuracy(results[key], known[key]) for key in ids])
    types = np.array([known[key].answer_type for key in ids])
    # One mask a metric: all questions, then those of each type that occurs.
    masks = {"accuracy": np.ones(len(ids), dtype=bool)}
    # TextVQA has no answer types; its empty one gives no metric of its own.
    masks.update({f"accuracy_{kind}": types == kind for kind in sorted(set(types.tolist()) - {""})})
    counts = np.stack(list(masks.values()), axis=1).astype(np.float64)
    # Totals and counts are both summed, since a resample changes how many answers of a type there are.
    columns = np.concatenate([values[:, None] * counts, counts], axis=1)
    metrics = dict(zip(masks, ratio_of_sums(columns.sum(axis=0, keepdims=True))[0].tolist(), strict=True))
    # Questions on one picture are answered well or badly together, so pictures are what is drawn.
    clusters: list[Hashable] = [known[key].image_id for key in ids]
    intervals = bootstrap_ci(columns, clusters=clusters, resamples=s.bootstrap, seed=s.seed) if s.bootstrap else None
    settings = {
        "rule": rule,
        "evaluator": RULE_SOURCES[rule],
        # The size that the interval depends on: questions of one picture count as one draw.
        "images": len(set(clusters)),
        "bootstrap": s.bootstrap,
        "seed": s.seed,
        **_coverage(len(ids), len(known), s.allow_missing),
    }
    per_sample = [{"id": key, "accuracy": value} for key, value in zip(ids, values.tolist(), strict=True)]
    notes = _answer_notes([results[key] for key in ids])
    return _result(task, metrics, intervals, settings=settings, per_sample=per_sample, notes=notes)


def _answer_notes(answers: Sequence[str]) -> list[str]:
    """Say when answers have the wrong shape for exact matching."""
    notes = []
    long = sum(len(answer.split()) > _LONG_ANSWER_WORDS for answer in answers)
    if long:
        notes.append(f"{long} of {len(answers)} answers have more than {_LONG_ANSWER_WORDS} words and can hardly match")
    empty = sum(not answer.strip() for answer in answers)
    if empty:
        notes.append(f"{empty} of {len(answers)} answers are empty")
    return notes


Scorer = Callable[[str, Source, Source, Source | None, Settings], Score]
TASKS: dict[str, Scorer] = {"coco-caption": score_captions, "vqav2": score_vqav2, "textvqa": score_textvqa}


def parse_settings(pairs: Mapping[str, str]) -> dict[str, Any]:
    """Turn ``key=value`` words of a command line into keyword arguments of `score`.

    Args:
        pairs: Setting -> text.

    Returns:
        Setting -> value of the right type.

    Raises:
        InputError: An unknown setting (with the nearest one), or a value that is no number or no true/false.
    """
    out: dict[str, Any] = {}
    for key, text in pairs.items():
        if key not in SETTINGS:
            raise InputError(f"unknown setting {key!r}", where=key, mend=_nearest(key, SETTINGS))
        if key == "allow_missing":
            if text.lower() not in {"true", "false"}:
                raise InputError(f"allow_missing is true or false, not {text!r}", where=key, mend="allow_missing=true")
            out[key] = text.lower() == "true"
        elif key in {"bootstrap", "seed"}:
            # isdigit alone accepts superscripts, which int refuses.
            if not (text.isascii() and text.isdigit()):
                raise InputError(f"{key} is a whole number from 0, not {text!r}", where=key, mend=f"{key}=1000")
            out[key] = int(text)
        else:
            out[key] = text
    return out


def score(
    task: str,
    predictions: Source,
    annotations: Source,
    questions: Source | None = None,
    *,
    tokenizer: str | None = None,
    rule: str | None = None,
    allow_missing: bool = False,
    bootstrap: int = 1000,
    seed: int = 0,
) -> Score:
    """Score a result file as the official evaluator of a task does.

    Args:
        task: One of `TASKS`.
        predictions: Result file in the official format, or its loaded list.
        annotations: Annotation file in the official format, or its loaded dictionary.
        questions: VQAv2 questions, to be checked against the annotations.
        tokenizer: Captions only: ``python`` (PTB-compatible, the default), ``java`` (CoreNLP's) or ``none``.
        rule: VQAv2 only: ``official`` (2021, the default), ``2017`` or ``always`` (lmms-eval).
        allow_missing: Score the ids that have a result when some have none; the settings then say how many.
        bootstrap: Number of resamples behind the 95 % intervals; 0 leaves them out.
        seed: Seed of the resamples.

    Returns:
        ``{"task", "metrics", "ci95", "n", "settings", "per_sample"}``; metrics are fractions.

    Raises:
        InputError: The task or a setting is unknown, or a file is wrong.
    """
    # Settings are checked before any file is read.
    if task not in TASKS:
        raise InputError(f"unknown task {task!r}", where="task", mend=_nearest(task, TASKS))
    # The text "false" would be true.
    if not isinstance(allow_missing, bool):
        what = f"allow_missing is true or false, not {allow_missing!r}"
        raise InputError(what, where="allow_missing", mend="allow_missing=true")
    for name, value in (("bootstrap", bootstrap), ("seed", seed)):
        # True is an int to Python: bootstrap=True would mean a single resample.
        if isinstance(value, bool) or not isinstance(value, int) or value < 0:
            raise InputError(f"{name} is a whole number from 0, not {value!r}", where=name, mend=f"{name}=1000")
    # A recipe or a shell may well read rule=2017 as a number.
    settings = Settings(tokenizer, None if rule is None else str(rule), allow_missing, bootstrap, seed)
    return TASKS[task](task, predictions, annotations, questions, settings)
