"""COCO captions (tylin/coco-caption): BLEU, ROUGE-L and CIDEr-D against several references a picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mmkit.config import TaskConfig
from mmkit.eval.examples import Example, picture_file, required
from mmkit.eval.result import Score, Settings, coverage, make_score, refuse_questions
from mmkit.eval.scorers import bleu, formats, ptb
from mmkit.eval.scorers.cider import cider_d
from mmkit.eval.scorers.formats import Source
from mmkit.eval.scorers.rouge import rouge_l
from mmkit.eval.statistics import Floats, bootstrap_ci
from mmkit.eval.suites.suite import Predictions, Suite
from mmkit.files import read_json

BLEU_NAMES = tuple(f"Bleu_{n}" for n in range(1, bleu.MAX_N + 1))
METRICS = (*BLEU_NAMES, "ROUGE_L", "CIDEr")
# What an MLLM that gets no prompt is asked, too (`mmkit.models.inference.Mllm`).
DESCRIBE = "Describe the picture."


def examples(config: TaskConfig) -> list[Example]:
    """An example for each picture.

    Args:
        config: ``annotations`` are COCO's, in which pictures have names; ``image_name`` is for those that have none.

    Returns:
        Examples, ascending by image id.

    Raises:
        InputError: Broken files, or a name that cannot be made.
    """
    references = formats.read_captions(required(config, "annotations"))
    # read_captions checks what scoring needs; file names are needed here alone.
    names = {image["id"]: image.get("file_name") for image in read_json(Path(str(config.annotations)))["images"]}
    # A captioner ignores it; an MLLM is asked this, and the score's conditions say so.
    prompt = DESCRIBE if config.prompt == "{question}" else config.prompt
    return [
        # COCO 2017's file names; others are given by image_name.
        Example(i, (picture_file(config, i, names.get(i), "{:012d}.jpg"),), prompt, None, captions)
        for i, captions in references.items()
    ]


def rows(asked: Sequence[Example], predictions: Predictions) -> list[dict[str, Any]]:
    """COCO's result rows, ``[{"image_id", "caption"}]``."""
    return [{"image_id": e.id, "caption": predictions[e.id]} for e in asked]


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
    refuse_questions(questions, task)
    tokenizer = s.choice("tokenizer", ptb.TOKENIZERS, "python")
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
    metrics = dict(zip(METRICS, _caption_statistics(columns.sum(axis=0, keepdims=True))[0].tolist(), strict=True))
    # An image's BLEU is the corpus formula on one image, so the same function serves.
    rows = _caption_statistics(columns).tolist()
    per_sample = [{"id": key, **dict(zip(METRICS, row, strict=True))} for key, row in zip(ids, rows, strict=True)]
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
        **coverage(len(ids), len(references), s),
    }
    notes = _caption_notes(hypotheses)
    return make_score(task, metrics, intervals, settings=settings, per_sample=per_sample, notes=notes)


def _caption_notes(hypotheses: Sequence[str]) -> list[str]:
    """What a reader should know before trusting the numbers."""
    notes = []
    if len(hypotheses) == 1:
        notes.append("CIDEr of a single image is always 0: no n-gram is rarer than another")
    empty = sum(not hypothesis for hypothesis in hypotheses)
    if empty:
        notes.append(f"{empty} of {len(hypotheses)} captions are empty after tokenising")
    return notes


SUITE = Suite("coco-caption", examples, score_captions, rows, options=("tokenizer",))
