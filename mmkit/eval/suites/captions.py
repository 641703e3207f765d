"""COCO captions (tylin/coco-caption): BLEU, ROUGE-L, CIDEr-D, METEOR and SPICE against several references a picture."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mmkit.config import TaskConfig
from mmkit.eval.examples import Example, picture_file, required
from mmkit.eval.result import Score, Settings, coverage, make_score, refuse_questions
from mmkit.eval.scorers import bleu, formats, ptb
from mmkit.eval.scorers.families import BLEU_NAMES, DEFAULT, Family, check_java, chosen_families, combined, compute_families
from mmkit.eval.scorers.java import check_tokeniser
from mmkit.eval.scorers.json_files import Source
from mmkit.eval.statistics import bootstrap_ci
from mmkit.eval.suites.suite import Predictions, Suite
from mmkit.files import read_json

# Metrics of a score without settings.
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
        InputError: Broken files, a name that cannot be made, or a metric or tokenizer whose Java program is not here.
    """
    # Scoring would find out after hours of captions.
    s = Settings({key: str(value) for key, value in config.settings.items() if value is not None})
    check_java(chosen_families(s.options.get("metrics", DEFAULT)))
    if s.choice("tokenizer", ptb.TOKENIZERS, "python") == "java":
        check_tokeniser()
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


def score_captions(task: str, predictions: Source, annotations: Source, questions: Source | None, s: Settings) -> Score:
    """Score COCO captions: BLEU-1..4, ROUGE-L and CIDEr-D, and METEOR and SPICE where ``metrics`` names them.

    Args:
        task: Name for messages and for the result.
        predictions: COCO caption results.
        annotations: COCO caption annotations.
        questions: Must be None.
        s: Settings.

    Returns:
        The design's score object. CIDEr's document frequencies stay those of the scored set in the bootstrap.

    Raises:
        InputError: See `mmkit.eval.scorers.formats`; a metric is unknown; Java or a part of it is missing or fails.
    """
    refuse_questions(questions, task)
    tokenizer = s.choice("tokenizer", ptb.TOKENIZERS, "python")
    names = chosen_families(s.options.get("metrics", DEFAULT))
    references = formats.read_captions(annotations)
    results, name = formats.read_results(predictions, key="image_id", text="caption")
    ids = formats.match_results(results, references, kind="image", name=name, allow_missing=s.allow_missing)
    tokenise = ptb.TOKENIZERS[tokenizer]
    hypotheses = tokenise([results[key] for key in ids])
    # All references in one call: the Java tokenizer starts a virtual machine each time.
    flat = iter(tokenise([caption for key in ids for caption in references[key]]))
    grouped = [[next(flat) for _ in references[key]] for key in ids]

    families = compute_families(names, ids, hypotheses, grouped)
    columns, formula = combined(list(families.values()))
    metric_names = [metric for family in families.values() for metric in family.names]
    metrics = dict(zip(metric_names, formula(columns.sum(axis=0, keepdims=True))[0].tolist(), strict=True))
    # An image's BLEU is the corpus formula on one image, so the same function serves.
    rows = [dict(zip(metric_names, row, strict=True)) for row in formula(columns).tolist()]
    # An image that SPICE has no number for has no such entry: NaN is no JSON.
    per_sample = [
        {"id": key, **{name: value for name, value in row.items() if not math.isnan(value)}}
        for key, row in zip(ids, rows, strict=True)
    ]
    # No clusters: each image has one caption, so images are what is drawn.
    intervals = bootstrap_ci(columns, formula, resamples=s.bootstrap, seed=s.seed) if s.bootstrap else None
    settings = {
        "tokenizer": tokenizer,
        "metrics": ",".join(names),
        "references": sum(len(group) for group in grouped),
        **_family_settings(families),
        "bootstrap": s.bootstrap,
        "seed": s.seed,
        **coverage(len(ids), len(references), s),
    }
    notes = _caption_notes(hypotheses, families)
    return make_score(task, metrics, intervals, settings=settings, per_sample=per_sample, notes=notes)


def _family_settings(families: Mapping[str, Family]) -> dict[str, Any]:
    """The conditions that belong to single metrics."""
    settings: dict[str, Any] = {}
    if "cider" in families:
        # Frequencies counted on all of val2014, as some captioning code has them, give other numbers.
        settings["cider"] = "CIDEr-D, document frequencies of this set"
    if "bleu" in families:
        # What the official notebook prints: whole numbers show where a difference in the last digits begins.
        settings["bleu_counters"] = bleu.bleu_counters(families["bleu"].columns.sum(axis=0).astype(np.int64))
    if "meteor" in families:
        settings["meteor"] = "METEOR 1.5 jar of pycocoevalcap, formula on summed statistics"
    if "spice" in families:
        settings["spice"] = "SPICE 1.0 jar of pycocoevalcap, mean over the images that have a value"
    return settings


def _caption_notes(hypotheses: Sequence[str], families: Mapping[str, Family]) -> list[str]:
    """What a reader should know before trusting the numbers."""
    notes = []
    if len(hypotheses) == 1 and "cider" in families:
        notes.append("CIDEr of a single image is always 0: no n-gram is rarer than another")
    empty = sum(not hypothesis for hypothesis in hypotheses)
    if empty:
        notes.append(f"{empty} of {len(hypotheses)} captions are empty after tokenising")
    if "spice" in families:
        missing = len(hypotheses) - int(families["spice"].columns[:, 1].sum())
        if missing:
            notes.append(f"SPICE has no value for {missing} of {len(hypotheses)} images; its mean is over the others")
    return notes


SUITE = Suite("coco-caption", examples, score_captions, rows, options=("tokenizer", "metrics"))
