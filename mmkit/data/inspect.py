"""``mmkit data inspect``: what a pair data set holds, seen through its labels; writes IDF tables and word vocabularies."""

from __future__ import annotations

import dataclasses
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from mmkit.data.pairs import Pair
from mmkit.data.sources import open_pairs
from mmkit.errors import InputError

if TYPE_CHECKING:
    from mmkit.encoders.labels import CaptionLabels

# Captions at a time: enough for the batch encoder to pay, small beside the list of pairs.
_BLOCK = 8192
_TOP = 20
_QUANTILES = (0.0, 0.05, 0.25, 0.5, 0.75, 0.95, 1.0)
# Reasons name lines, bytes and files; without them equal faults are counted together.
_PARTICULARS = re.compile(r"'[^']*'|\"[^\"]*\"|\d+")


@dataclasses.dataclass(frozen=True)
class Inspection:
    """What was found.

    Attributes:
        location: The data set.
        vocabulary: Name of the labels.
        vocab_size: V.
        pairs: Pairs that were read.
        left_out: Reasons for which rows cannot be used, particulars replaced by ``...``, with their numbers.
        unlabelled: Captions without a label.
        lengths: Quantile to labels of a caption, over all pairs.
        distinct: Labels that occur.
        top: The most frequent labels with the number of captions they are in.
        written: What was written where, in words.
    """

    location: str
    vocabulary: str
    vocab_size: int
    pairs: int
    left_out: dict[str, int]
    unlabelled: int
    lengths: dict[float, int]
    distinct: int
    top: list[tuple[str, int]]
    written: list[str]

    def lines(self) -> list[str]:
        """The findings for people, a line each."""
        lengths = ", ".join(f"{_quantile_name(q)} {length}" for q, length in self.lengths.items())
        top = ", ".join(f"{tag} {count / self.pairs:.1%}" for tag, count in self.top)
        return [
            f"data: {self.location}",
            f"pairs: {self.pairs}",
            f"left out: {sum(self.left_out.values())}",
            *(f"  {count} x {reason}" for reason, count in self.left_out.items()),
            f"labels: {self.vocabulary}, {self.distinct} of {self.vocab_size} occur",
            f"labels of a caption: {lengths}",
            f"captions without a label: {self.unlabelled}",
            f"most frequent, share of captions: {top or 'none'}",
            *self.written,
        ]


@dataclasses.dataclass
class _Counts:
    """Running counts over blocks of captions.

    Attributes:
        df: Captions that contain each label i64[V], stop words included.
        n: Captions with at least one of those.
        kept: Captions by their number of labels, stop words left out.
    """

    df: NDArray[np.int64]
    # Only captions with a label count: the online IDF does the same, and a table must equal an epoch of it (test_inspect).
    n: int = 0
    kept: NDArray[np.int64] = dataclasses.field(default_factory=lambda: np.zeros(1, dtype=np.int64))

    def add(self, ids: NDArray[np.int64], offsets: NDArray[np.int64], dropped: NDArray[np.bool_]) -> None:
        """Count a block: ids i64[L], each once in a row; offsets i64[B + 1]; dropped bool[V]."""
        # Rows are sets, so occurrences are documents.
        self.df += np.bincount(ids, minlength=len(self.df))
        self.n += int(np.count_nonzero(np.diff(offsets)))
        # Kept labels before each place in ids; differences at the row borders are the lengths, without a loop over rows.
        kept_before = np.concatenate([[0], np.cumsum(~dropped[ids])])
        lengths = np.bincount(np.diff(kept_before[offsets]))
        # The longest caption is not known in advance, so the histogram grows with the blocks.
        size = max(len(self.kept), len(lengths))
        self.kept = np.pad(self.kept, (0, size - len(self.kept))) + np.pad(lengths, (0, size - len(lengths)))


def inspect_pairs(
    location: str,
    *,
    kind: str = "auto",
    image_root: str | None = None,
    labels: str = "clip",
    context_length: int | None = None,
    stop_words: str | None = None,
    idf: str | Path | None = None,
    words: str | Path | None = None,
    words_size: int = 40_000,
    min_count: int = 5,
    limit: int | None = None,
) -> Inspection:
    """Read all captions of a data set once and count their labels.

    The IDF table counts every label, stop words too: so one table serves runs with and without stop words.

    Args:
        location: As in ``data.train``.
        kind: As in ``data.type``.
        image_root: As in ``data.image_root``.
        labels: As in ``data.labels``.
        context_length: As in ``data.context_length``.
        stop_words: As in ``data.stop_words``; the words file leaves them out too.
        idf: Where to write document counts for ``data.idf_file``.
        words: Where to write a word vocabulary for ``data.labels``.
        words_size: Words in it at most.
        min_count: Captions a word of it must be in.
        limit: The first pairs only.

    Raises:
        InputError: As the readers and the vocabulary raise it.
    """
    # Imported here: the encoders import torch, and mmkit.data is also used without it.
    from mmkit.encoders.labels import CaptionLabels

    if limit is not None and limit < 1:
        raise InputError(f"limit {limit} leaves no pair", mend="use at least 1, or leave it out")
    vocabulary = CaptionLabels(labels, context_length=context_length, stop_words=stop_words)
    source = open_pairs(location, kind=kind, image_root=image_root)
    pairs = source.pairs[:limit]
    # One pass for everything: encoding is what costs.
    counts, frequencies = _count(pairs, vocabulary, count_words=words is not None)
    written = []
    if idf is not None:
        # A limit is part of the table's source: document counts of some captions must not pass for those of all.
        written.append(
            _write_idf(idf, counts, vocabulary, source.fingerprint if limit is None else f"{source.fingerprint}[:{limit}]")
        )
    if words is not None:
        written.append(_write_words(words, frequencies, vocabulary, words_size, min_count, len(pairs)))
    shown = np.where(_mask(vocabulary), 0, counts.df)
    # Stable: among equal counts the lower id comes first, on every machine.
    top = [int(i) for i in np.argsort(-shown, kind="stable")[:_TOP] if shown[i]]
    return Inspection(
        location=location,
        vocabulary=labels,
        vocab_size=vocabulary.vocab_size,
        pairs=len(pairs),
        # Millions of rows may share one fault; the list is for people.
        left_out=dict(Counter(_PARTICULARS.sub("...", row.reason) for row in source.left_out).most_common()),
        # Captions of length 0 after the stop words: they give no gradient in training.
        unlabelled=int(counts.kept[0]),
        lengths=_quantiles(counts.kept),
        distinct=int(np.count_nonzero(shown)),
        top=[(vocabulary.decode_tag(label), int(shown[label])) for label in top],
        written=written,
    )


def _count(pairs: list[Pair], labels: CaptionLabels, *, count_words: bool) -> tuple[_Counts, Counter[str]]:
    """Labels of all captions, and document frequencies of words where asked for."""
    from mmkit.encoders import words
    from mmkit.encoders.labels import CaptionLabels

    # Counted with stop words and dropped afterwards, so that a second pass for the IDF table is not needed.
    everything = CaptionLabels(labels.name, context_length=labels.context_length) if labels.dropped else labels
    counts = _Counts(np.zeros(labels.vocab_size, dtype=np.int64))
    frequencies: Counter[str] = Counter()
    dropped = _mask(labels)
    for captions in _blocks(pairs):
        counts.add(*everything.encode_packed(captions), dropped)
        if count_words:
            frequencies.update(words.count_words(captions))
    return counts, frequencies


def _blocks(pairs: list[Pair]) -> Iterator[list[str]]:
    """Captions in blocks."""
    for begin in range(0, len(pairs), _BLOCK):
        yield [pair.caption for pair in pairs[begin : begin + _BLOCK]]


def _mask(labels: CaptionLabels) -> NDArray[np.bool_]:
    """Stop words among the labels, bool[V]."""
    mask = np.zeros(labels.vocab_size, dtype=bool)
    # As a mask: one indexing for a whole block instead of a lookup for each label.
    mask[list(labels.dropped)] = True
    return mask


def _quantiles(histogram: NDArray[np.int64]) -> dict[float, int]:
    """Quantiles (nearest rank from below) of lengths, from the number of captions of each length."""
    below = np.cumsum(histogram)
    # At least rank 1: the quantile 0 is the shortest caption that exists, not length 0.
    return {q: int(np.searchsorted(below, max(1, int(np.ceil(q * below[-1]))))) for q in _QUANTILES}


def _quantile_name(quantile: float) -> str:
    """``least``, ``median``, ``most``, or the per cent."""
    return {0.0: "least", 0.5: "median", 1.0: "most"}.get(quantile, f"{quantile:.0%}")


def _write_idf(file: str | Path, counts: _Counts, labels: CaptionLabels, source: str) -> str:
    """Write the IDF table; what was written, in words."""
    import torch

    from mmkit.encoders.idf import save_table

    save_table(file, torch.from_numpy(counts.df), counts.n, sha256=labels.sha256(), name=labels.name, source=source)
    return f"wrote {file}: document counts of {counts.n} captions (data.idf=file data.idf_file={file})"


def _write_words(
    file: str | Path, frequencies: Counter[str], labels: CaptionLabels, size: int, min_count: int, captions: int
) -> str:
    """Write the words file; what was written, in words."""
    from mmkit.encoders.words import write_words

    excluded = labels.stop_word_list
    chosen = write_words(Path(file), frequencies, size=size, min_count=min_count, captions=captions, stop_words=excluded)
    return f"wrote {file}: {chosen} of {len(frequencies)} words (data.labels={file})"
