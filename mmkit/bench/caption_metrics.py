"""``mmkit bench caption-metrics``: BLEU, ROUGE-L and CIDEr-D from raw captions, against pycocoevalcap with its Java tokenizer."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mmkit.bench.measure import interleaved
from mmkit.errors import InputError
from mmkit.eval.scorers.families import combined, compute_families
from mmkit.eval.scorers.java import INSTALL
from mmkit.eval.scorers.ptb import TOKENIZERS

# METEOR and SPICE are the same Java programs on both sides.
_FAMILIES = ("bleu", "rouge", "cider")
_NAMES = ("Bleu_1", "Bleu_2", "Bleu_3", "Bleu_4", "ROUGE_L", "CIDEr")
# The commonest words of captions; about half of all.
_COMMON = [
    "a",
    "a",
    "a",
    "a",
    "on",
    "of",
    "the",
    "the",
    "in",
    "with",
    "and",
    "is",
    "sitting",
    "standing",
    "to",
    "next",
    "man",
    "at",
    "an",
    "are",
    "it",
    "his",
]

# In a fresh process, since memory is measured: files in, score object out, as `mmkit score` has it.
_WHOLE = """
import sys, time
from mmkit.eval.score import score
began = time.perf_counter()
found = score("coco-caption", sys.argv[1], sys.argv[2])
seconds = time.perf_counter() - began
# Not getrusage, whose peak is inherited from the process that started this one.
peak = next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM"))
print(seconds, peak / 1024, found["n"])
"""


def run(*, repeats: int = 3, images: int = 5000, references: int = 5, large: int = 40_000) -> dict[str, Any]:
    """Score the same captions with both in one process, in turns; then a large set with mmkit alone, from files.

    Both sides start at raw captions in memory and end at corpus and image scores. Made captions are as long as COCO's, with
    its share of capitals, commas and contractions, and as many different words in a set.

    Args:
        repeats: Timed rounds, interleaved.
        images: Images of the comparison.
        references: References of an image.
        large: Images of the run from files, with bootstrap intervals; 0 leaves it out.

    Returns:
        Conditions, seconds of each side, the ratio, and seconds and memory of the large set.

    Raises:
        InputError: Java or pycocoevalcap is missing.
        AssertionError: The two give different scores.
    """
    if importlib.util.find_spec("pycocoevalcap") is None or shutil.which("java") is None:
        raise InputError("the peer is pycocoevalcap with Java", where="bench caption-metrics", mend=INSTALL)
    hypotheses, grouped = make_set(images, references)
    scores: dict[str, list[float]] = {}
    # What is timed keeps its scores, to be compared: speed with other numbers would be worth nothing.
    contenders = {
        "mmkit": lambda: scores.update(mmkit=score_mmkit(hypotheses, grouped, "python")),
        "mmkit, tokenizer=java": lambda: scores.update(java=score_mmkit(hypotheses, grouped, "java")),
        "pycocoevalcap": lambda: scores.update(peer=score_peer(hypotheses, grouped)),
    }
    seconds = interleaved(contenders, repeats=repeats)
    largest = max(abs(a - b) for name in ("mmkit", "java") for a, b in zip(scores[name], scores["peer"], strict=True))
    assert largest < 1e-9, f"scores differ by {largest}"
    found: dict[str, Any] = {
        "conditions": f"{images} images x {references} references, raw captions, BLEU + ROUGE-L + CIDEr-D, median of {repeats}",
        **{f"{name}, s": round(took, 3) for name, took in seconds.items()},
        "speed, mmkit / pycocoevalcap": round(seconds["pycocoevalcap"] / seconds["mmkit"], 1),
        "speed with tokenizer=java, mmkit / pycocoevalcap": round(seconds["pycocoevalcap"] / seconds["mmkit, tokenizer=java"], 1),
        "largest difference of a corpus score": f"{largest:.1g}",
    }
    return {**found, **(_large(large, references) if large else {})}


def score_mmkit(hypotheses: Sequence[str], grouped: Sequence[Sequence[str]], tokenizer: str) -> list[float]:
    """Corpus scores in the order of `_NAMES`; each image's are computed on the way."""
    tokenise = TOKENIZERS[tokenizer]
    # All references in one call: with tokenizer=java each starts a process.
    flat = iter(tokenise([caption for group in grouped for caption in group]))
    references = [[next(flat) for _ in group] for group in grouped]
    families = compute_families(_FAMILIES, range(len(grouped)), tokenise(hypotheses), references)
    columns, formula = combined(list(families.values()))
    formula(columns)
    corpus: list[float] = formula(columns.sum(axis=0, keepdims=True))[0].tolist()
    return corpus


def score_peer(hypotheses: Sequence[str], grouped: Sequence[Sequence[str]]) -> list[float]:
    """The same by pycocoevalcap's own scorers, as its ``COCOEvalCap.evaluate`` calls them, less METEOR and SPICE."""
    from pycocoevalcap.bleu.bleu import Bleu
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.rouge.rouge import Rouge
    from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

    raw_references: Mapping[int, Any] = {n: [{"caption": text} for text in group] for n, group in enumerate(grouped)}
    raw_results: Mapping[int, Any] = {n: [{"caption": text}] for n, text in enumerate(hypotheses)}
    with _quiet():
        references, results = PTBTokenizer().tokenize(raw_references), PTBTokenizer().tokenize(raw_results)
    bleu, _ = Bleu(4).compute_score(references, results, verbose=0)
    rouge, _ = Rouge().compute_score(references, results)
    cider, _ = Cider().compute_score(references, results)
    return [*map(float, bleu), float(rouge), float(cider)]


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep what the Java tokenizer says about itself off the terminal; its file descriptor is inherited."""
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


def _large(images: int, references: int) -> dict[str, Any]:
    """Seconds and peak memory of scoring a large set from its two files, with intervals, in a process of its own."""
    hypotheses, grouped = make_set(images, references, seed=1)
    annotations = [
        {"id": number * references + place, "image_id": number, "caption": text}
        for number, group in enumerate(grouped)
        for place, text in enumerate(group)
    ]
    files = {
        "results.json": [{"image_id": number, "caption": text} for number, text in enumerate(hypotheses)],
        "annotations.json": {"images": [{"id": number} for number in range(images)], "annotations": annotations},
    }
    with tempfile.TemporaryDirectory(prefix="mmkit-bench-") as folder:
        for name, content in files.items():
            (Path(folder) / name).write_text(json.dumps(content))
        command = [sys.executable, "-c", _WHOLE, *(str(Path(folder) / name) for name in files)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    seconds, mib, count = done.stdout.split()
    assert int(count) == images
    return {
        "large set": f"{images} images x {references} references, from files, with 1000 resamples",
        "large set, s": round(float(seconds), 1),
        "large set, peak MiB": round(float(mib)),
    }


def make_set(images: int, references: int, seed: int = 0) -> tuple[list[str], list[list[str]]]:
    """Captions of about COCO's lengths (8 to 15 words) and variety; those of one image share a topic.

    Args:
        images: Images N.
        references: References of each.
        seed: Of the draws.

    Returns:
        N hypotheses, and N lists of references.
    """
    rng = np.random.default_rng(seed)
    # Zipf-Mandelbrot over made words: COCO's captions have some 25,000 different ones, most of them rare.
    share = 1 / np.arange(5, 25_005)
    # Captions of one image draw from the same twelve words, or n-grams would have nothing to match.
    topics = rng.choice(25_000, (images, 12), p=share / share.sum())
    count = images * (references + 1)
    lengths = rng.integers(8, 16, count)
    picks, common = rng.integers(0, 12, (count, 16)), rng.integers(0, len(_COMMON), (count, 16))
    chance, style = rng.random((count, 16)), rng.random(count)
    texts = []
    for row in range(count):
        topic = topics[row // (references + 1)]
        words = [
            _COMMON[common[row, i]] if chance[row, i] < 0.5 else _word(int(topic[picks[row, i]])) for i in range(lengths[row])
        ]
        # There are eight words or more, so these places exist.
        if style[row] < 0.05:
            words[3] += "'s"
        elif style[row] < 0.1:
            words[4] += ","
        text = " ".join(words)
        texts.append(text.capitalize() + "." if style[row] < 0.7 else text)
    groups = [texts[first : first + references + 1] for first in range(0, count, references + 1)]
    return [group[0] for group in groups], [group[1:] for group in groups]


def _word(number: int) -> str:
    """A pronounceable word for each number, the same every time: four letters and more for the rare ones."""
    word = ""
    # No word of one syllable: from 60 on a number has two, from 3,600 on, where the rare words are, three.
    number += 400
    while number:
        number, syllable = divmod(number, 60)
        word += "bdfgklmnprst"[syllable // 5] + "aeiou"[syllable % 5]
    return word
