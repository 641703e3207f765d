"""``mmkit bench labels``: captions to labels against open_clip's tokenizer, and what IDF and collation cost beside that."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch

from mmkit.bench.measure import interleaved
from mmkit.data.world.language import captions as world_captions
from mmkit.data.world.scene import sample_scene
from mmkit.encoders.idf import OnlineIDF, row_normalised
from mmkit.encoders.labels import CaptionLabels
from mmkit.encoders.ragged import pack_labels

_VOCAB_SIZE = 49408


def run(*, repeats: int = 5, captions: int = 20_000, batch: int = 1024, labels: int = 30) -> dict[str, Any]:
    """Compare mmkit with open_clip's ``SimpleTokenizer`` on the same captions in one process and on one thread.

    Both have seen the captions before the clock starts, so both have their words in memory, and both take them batch by batch.
    "to sets" is captions to sorted label sets (``CaptionLabels.encode`` against ``SimpleTokenizer.encode``), "to tensors" is
    captions to what a training step takes (``encode_packed`` to ragged tensors, against the call that gives i64[B, 77]).

    Args:
        repeats: Timed rounds, interleaved.
        captions: Captions, three quarters of them of words by frequency, the rest of the demo world.
        batch: Captions B that are taken at one time, and rows of the IDF figures.
        labels: Labels of a row there.

    Returns:
        Conditions, captions a second, ratios, and milliseconds of a batch for the IDF and collation.

    Raises:
        AssertionError: If a single caption gives other ids than open_clip's.
    """
    from open_clip.tokenizer import SimpleTokenizer

    # The peer is Python and cannot use more than one thread, so neither side may.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        peer, ours = SimpleTokenizer(), CaptionLabels()
        texts = make_captions(captions, ours)
        # Also fills the peer's cache of words, which would otherwise be filled on the clock.
        tokens = [len(peer.encode(text)) for text in texts]
        # Speed with other ids would be worth nothing.
        assert ours.encode(texts) == [sorted(set(peer.encode(text))) for text in texts], "labels differ from open_clip's"
        contenders: dict[str, Callable[[list[str]], object]] = {
            "mmkit to sets": ours.encode,
            "mmkit to sets, one by one": lambda block: [ours.encode_one(text) for text in block],
            "open_clip to sets": lambda block: [sorted(set(peer.encode(text))) for text in block],
            "mmkit to tensors": lambda block: [torch.from_numpy(part) for part in ours.encode_packed(block)],
            "open_clip to tensors": peer,
        }
        # In batches, as a loader collates them; the last one may be shorter.
        blocks = [texts[begin : begin + batch] for begin in range(0, captions, batch)]
        seconds = interleaved({name: partial(_each, work, blocks) for name, work in contenders.items()}, repeats=repeats)
        idf = _idf_milliseconds(batch, labels, repeats)
    finally:
        torch.set_num_threads(threads)
    low, middle, high = np.quantile(tokens, [0.05, 0.5, 0.95]).astype(int)
    found: dict[str, Any] = {
        "conditions": f"{captions} captions of {low}-{middle}-{high} tokens (5 %, median, 95 %), "
        f"{batch} at a time, one thread, median of {repeats}",
        **{f"{name}, captions/s": round(captions / took) for name, took in seconds.items()},
        "speed to sets, mmkit / open_clip": round(seconds["open_clip to sets"] / seconds["mmkit to sets"], 1),
        "speed one by one, mmkit / open_clip": round(seconds["open_clip to sets"] / seconds["mmkit to sets, one by one"], 1),
        "speed to tensors, mmkit / open_clip": round(seconds["open_clip to tensors"] / seconds["mmkit to tensors"], 1),
        "batch of the IDF": f"B={batch} labels={labels} V={_VOCAB_SIZE} cpu",
        **idf,
    }
    return found


def make_captions(count: int, labels: CaptionLabels, seed: int = 0) -> list[str]:
    """Captions of real words as people use them: Zipf's law, commas, full stops, capitals, numbers, compounds.

    Args:
        count: Captions.
        labels: CLIP's vocabulary, from which the words come; its order is about that of frequency.
        seed: Of the draws.

    Returns:
        Captions of about 11 to 31 tokens; every fourth is one of the demo world.
    """
    rng = np.random.default_rng(seed)
    # The first 512 ids of CLIP's BPE are bytes, not words.
    spelled = [labels.token(label) for label in range(512, labels.vocab_size)]
    words = [word for token in spelled if (word := token.removesuffix("</w>")) != token and word.isascii() and word.isalpha()]
    # Zipf-Mandelbrot: about one word in a hundred is the first.
    share = 1 / np.arange(10, len(words) + 10)
    share /= share.sum()
    lengths = rng.integers(9, 28, size=count)
    # All words in one draw: choice with probabilities adds them up anew at every call.
    drawn = iter(rng.choice(len(words), int(lengths.sum()), p=share).tolist())
    texts = []
    for index, length in enumerate(lengths.tolist()):
        if index % 4 == 3:
            texts.append(max(world_captions(sample_scene(rng)), key=len))
        else:
            texts.append(_sentence([words[i] for i in itertools.islice(drawn, length)], rng, words))
    return texts


def _sentence(chosen: list[str], rng: np.random.Generator, words: list[str]) -> str:
    """Words with commas, capitals, numbers and compounds here and there, and mostly a full stop."""
    for place, chance in enumerate(rng.random(len(chosen))):
        if chance < 0.04:
            chosen[place] += ","
        elif chance < 0.06:
            chosen[place] = chosen[place].capitalize()
        elif chance < 0.07:
            chosen[place] = str(int(rng.integers(2030)))
        elif chance < 0.08:
            chosen[place] += words[int(rng.integers(5000))]
    return " ".join(chosen).capitalize() + ("." if rng.random() < 0.6 else "")


def _idf_milliseconds(batch: int, labels: int, repeats: int) -> dict[str, float]:
    """Milliseconds for collating labels, counting documents, and weights of a batch, on the CPU."""
    rng = np.random.default_rng(1)
    # Sorted and without repeats, as `CaptionLabels` gives them.
    rows = [np.unique(rng.integers(0, _VOCAB_SIZE, labels)).tolist() for _ in range(batch)]
    ids, offsets = pack_labels(rows)
    idf = OnlineIDF(_VOCAB_SIZE)
    # Counts of one batch, so that the weights are not all zero.
    idf.update(ids, offsets)
    parts: dict[str, Callable[[], object]] = {
        "collate": lambda: pack_labels(rows),
        "count": lambda: idf.counts(ids, offsets),
        "weights": lambda: row_normalised(idf.weights(), ids, offsets),
    }
    # A single call is too short for the clock of a busy machine.
    calls = 10
    seconds = interleaved({name: partial(_repeat, part, calls) for name, part in parts.items()}, repeats=repeats)
    found = {f"{name} ms": round(took / calls * 1000, 3) for name, took in seconds.items()}
    return {**found, "IDF and collation ms": round(sum(seconds.values()) / calls * 1000, 3)}


def _each(work: Callable[[list[str]], object], blocks: list[list[str]]) -> None:
    """Call a function on every block; what it gives is not kept, as in training."""
    for block in blocks:
        work(block)


def _repeat(work: Callable[[], object], times: int) -> None:
    """Call a function some times."""
    for _ in range(times):
        work()
