"""``mmkit data inspect``: what a pair data set holds, its captions and its pictures; writes IDF tables and word vocabularies."""

from __future__ import annotations

import dataclasses
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

import mmkit
from mmkit.data.scan.duplicates import Groups
from mmkit.data.scan.survey import PictureFacts, Survey, picture_facts, repeated_captions, survey
from mmkit.data.scan.tally import Tally
from mmkit.data.skipped import SkippedRows, skipped_file
from mmkit.data.sources import SourceOptions, open_named
from mmkit.errors import InputError

if TYPE_CHECKING:
    from mmkit.encoders.labels import CaptionLabels

# Captions at a time: enough for the batch encoder to pay, small beside the list of pairs.
_BLOCK = 8192
_TOP = 20
_QUANTILES = (0.0, 0.05, 0.25, 0.5, 0.75, 0.95, 1.0)


@dataclasses.dataclass(frozen=True)
class Inspection:
    """What was found.

    Attributes:
        location: The data set.
        fingerprint: Of the data set, as manifests of runs have it.
        limit: The first pairs that were looked at; None: all.
        vocabulary: Name of the labels.
        vocab_size: V.
        pairs: Pairs that can be used.
        skipped: What cannot be used.
        unlabelled: Captions without a label.
        labels: Labels of a caption, over all pairs.
        distinct: Labels that occur.
        top: The most frequent labels with the number of captions they are in.
        survey: What was seen of each pair.
        pictures: What the pictures are; None when they were not looked at.
        repeated: Pairs with equal captions.
        written: What was written where, in words.
    """

    location: str
    fingerprint: str
    limit: int | None
    vocabulary: str
    vocab_size: int
    pairs: int
    skipped: SkippedRows
    unlabelled: int
    labels: Tally
    distinct: int
    top: list[tuple[str, int]]
    survey: Survey
    pictures: PictureFacts | None
    repeated: Groups
    written: list[str]

    @property
    def left_out(self) -> dict[str, int]:
        """Reasons for which rows cannot be used, particulars replaced by ``...``, with their numbers."""
        # Millions of rows may share one fault; the list is for people.
        return dict(self.skipped.reasons.most_common())

    @property
    def lengths(self) -> dict[float, int]:
        """Quantile to labels of a caption."""
        return {q: self.labels.quantile(q) for q in _QUANTILES}

    def lines(self) -> list[str]:
        """The findings for people, a line each."""
        lengths = ", ".join(f"{_quantile_name(q)} {length}" for q, length in self.lengths.items())
        top = ", ".join(f"{tag} {count / self.pairs:.1%}" for tag, count in self.top)
        return [
            f"data: {self.location}",
            f"pairs: {self.pairs}",
            f"left out: {self.skipped.total}",
            *(f"  {count} x {reason}" for reason, count in self.left_out.items()),
            f"labels: {self.vocabulary}, {self.distinct} of {self.vocab_size} occur",
            f"labels of a caption: {lengths}",
            f"captions without a label: {self.unlabelled}",
            f"most frequent, share of captions: {top or 'none'}",
            f"captions that another pair has too: {self.repeated.surplus}",
            *_picture_lines(self.pictures),
            *self.written,
        ]

    def to_json(self) -> dict[str, Any]:
        """The findings for programs, as ``inspect.json`` has them."""
        found = self.survey
        return {
            "mmkit": mmkit.__version__,
            "data": self.location,
            "fingerprint": self.fingerprint,
            "limit": self.limit,
            "pairs": self.pairs,
            "left_out": {"total": self.skipped.total, "reasons": self.left_out},
            "captions": {
                "characters": found.characters.summary(),
                "words": found.words.summary(),
                "labels": self.labels.summary(),
                "repeated": {"groups": len(self.repeated), "surplus": self.repeated.surplus},
            },
            "vocabulary": {
                "name": self.vocabulary,
                "size": self.vocab_size,
                "occur": self.distinct,
                "unlabelled": self.unlabelled,
                "top": dict(self.top),
            },
            "pictures": None if self.pictures is None else self.pictures.to_json(),
        }


def _picture_lines(facts: PictureFacts | None) -> list[str]:
    if facts is None:
        return []
    width, height, kib = (facts.tallies[name].summary() for name in ("width", "height", "kib"))
    dull = f"; {facts.plain} of nearly one colour were not compared" if facts.plain else ""
    return [
        f"pictures: {facts.distinct}",
        f"sizes: width {_span(width)}, height {_span(height)} pixels, {_span(kib)} KiB",
        f"formats: {', '.join(f'{name} {count}' for name, count in facts.formats.items()) or 'none'}",
        f"equal pictures: {facts.equal.surplus} could go, in {len(facts.equal)} groups",
        f"pictures that look alike: {facts.alike.surplus} could go, in {len(facts.alike)} groups{dull}",
    ]


def _span(summary: dict[str, Any]) -> str:
    return f"{summary['least']} to {summary['most']} (median {summary['median']})"


@dataclasses.dataclass
class _Counts:
    """Running counts over blocks of captions.

    Attributes:
        df: Captions that contain each label i64[V], stop words included.
        n: Captions with at least one of those.
        kept: Labels of a caption, stop words left out.
    """

    df: NDArray[np.int64]
    # Only captions with a label count: the online IDF does the same, and a table must equal an epoch of it (test_inspect).
    n: int = 0
    kept: Tally = dataclasses.field(default_factory=Tally)

    def add(self, ids: NDArray[np.int64], offsets: NDArray[np.int64], dropped: NDArray[np.bool_]) -> None:
        """Count a block: ids i64[L], each once in a row; offsets i64[B + 1]; dropped bool[V]."""
        # Rows are sets, so occurrences are documents.
        self.df += np.bincount(ids, minlength=len(self.df))
        self.n += int(np.count_nonzero(np.diff(offsets)))
        # Kept labels before each place in ids; differences at the row borders are the lengths, without a loop over rows.
        kept_before = np.concatenate([[0], np.cumsum(~dropped[ids])])
        self.kept.add(np.diff(kept_before[offsets]))


def inspect_pairs(
    location: str,
    *,
    options: SourceOptions | None = None,
    labels: str = "clip",
    context_length: int | None = None,
    stop_words: str | None = None,
    idf: str | Path | None = None,
    words: str | Path | None = None,
    words_size: int = 40_000,
    min_count: int = 5,
    limit: int | None = None,
    pictures: bool = True,
    workers: int | None = None,
    out: Path | None = None,
    sample: int = 24,
) -> Inspection:
    """Read a data set once: count the labels of its captions, decode its pictures, find what is bad and what comes twice.

    The IDF table counts every label, stop words too: so one table serves runs with and without stop words. Whatever the number
    of processes, the findings are the same.

    Args:
        location: As in ``data.train``.
        options: How it is read; None: by its name.
        labels: As in ``data.labels``.
        context_length: As in ``data.context_length``.
        stop_words: As in ``data.stop_words``; the words file leaves them out too.
        idf: Where to write document counts for ``data.idf_file``.
        words: Where to write a word vocabulary for ``data.labels``.
        words_size: Words in it at most.
        min_count: Captions a word of it must be in.
        limit: The first pairs only.
        pictures: Decode every picture; else captions only, which is a hundred times faster.
        workers: Processes; None: one for each core.
        out: Folder for ``inspect.html``, ``inspect.md``, ``inspect.json``, ``skipped.jsonl`` and ``duplicates.jsonl``.
        sample: Pictures shown on the page, drawn at random with a fixed seed.

    Raises:
        InputError: As the readers and the vocabulary raise it; `out` cannot be written; a worker process was killed.
    """
    # Imported here: the encoders import torch, and mmkit.data is also used without it.
    from mmkit.encoders.labels import CaptionLabels

    if limit is not None and limit < 1:
        raise InputError(f"limit {limit} leaves no pair", mend="use at least 1, or leave it out")
    # Before the scan rather than at its end, when all that it found would be lost.
    if out is not None and out.exists() and not out.is_dir():
        raise InputError("is a file, not a folder", where=out, mend="name a folder for the pages")
    vocabulary = CaptionLabels(labels, context_length=context_length, stop_words=stop_words)
    # The fingerprint is that of the whole set, as manifests of runs have it; a limit is told beside it.
    whole = open_named(location, options)
    source = whole.take(limit)
    # One pass for everything: reading and encoding are what costs.
    counter = _Counter(vocabulary, count_words=words is not None)
    with skipped_file(None if out is None else out / "skipped.jsonl") as skipped:
        skipped.add(source.left_out)
        seen = survey(source, skipped, counter.take, pictures=pictures, workers=workers)
        counter.finish()
    found = _conclude(location, whole.fingerprint, limit, vocabulary, counter, skipped, seen, pictures=pictures)
    if idf is not None:
        # A limit is part of the table's source: document counts of some captions must not pass for those of all.
        name = whole.fingerprint if limit is None else f"{whole.fingerprint}[:{limit}]"
        found.written.append(_write_idf(idf, counter.counts, vocabulary, name))
    if words is not None:
        found.written.append(_write_words(words, counter.frequencies, vocabulary, words_size, min_count, found.pairs))
    if out is not None:
        # jinja2 and Pillow's encoders only where there is a page to make.
        from mmkit.data.scan.page import write_pages

        found.written.append(f"wrote {write_pages(out, found, source, sample=sample)}")
    return found


def _conclude(
    location: str,
    fingerprint: str,
    limit: int | None,
    vocabulary: CaptionLabels,
    counter: _Counter,
    skipped: SkippedRows,
    seen: Survey,
    *,
    pictures: bool,
) -> Inspection:
    """The findings from what was counted; nothing is written yet."""
    # Stop words are counted for the IDF table alone; for a run with these labels they do not exist.
    shown = np.where(_mask(vocabulary), 0, counter.counts.df)
    # Stable: among equal counts the lower id comes first, on every machine.
    top = [int(i) for i in np.argsort(-shown, kind="stable")[:_TOP] if shown[i]]
    return Inspection(
        location=location,
        fingerprint=fingerprint,
        limit=limit,
        vocabulary=vocabulary.name,
        vocab_size=vocabulary.vocab_size,
        pairs=len(seen.usable()),
        skipped=skipped,
        # Captions of length 0 after the stop words: they give no gradient in training.
        unlabelled=int(counter.counts.kept.counts[:1].sum()),
        labels=counter.counts.kept,
        distinct=int(np.count_nonzero(shown)),
        top=[(vocabulary.decode_tag(label), int(shown[label])) for label in top],
        survey=seen,
        pictures=picture_facts(seen) if pictures else None,
        repeated=repeated_captions(seen),
        written=[],
    )


class _Counter:
    """Counts labels, and words where asked for, of captions that come in pieces."""

    def __init__(self, labels: CaptionLabels, *, count_words: bool) -> None:
        from mmkit.encoders.labels import CaptionLabels

        # Counted with stop words and dropped afterwards, so that a second pass for the IDF table is not needed.
        self.labels = CaptionLabels(labels.name, context_length=labels.context_length) if labels.dropped else labels
        self.counts = _Counts(np.zeros(labels.vocab_size, dtype=np.int64))
        self.frequencies: Counter[str] = Counter()
        self._dropped, self._count_words = _mask(labels), count_words
        self._waiting: list[str] = []

    def take(self, captions: list[str]) -> None:
        """Count some captions, or keep them until there are enough for a block."""
        self._waiting += captions
        if len(self._waiting) >= _BLOCK:
            self.finish()

    def finish(self) -> None:
        """Count what is kept."""
        from mmkit.encoders import words

        captions, self._waiting = self._waiting, []
        if captions:
            self.counts.add(*self.labels.encode_packed(captions), self._dropped)
        if self._count_words:
            self.frequencies.update(words.count_words(captions))


def _mask(labels: CaptionLabels) -> NDArray[np.bool_]:
    """Stop words among the labels, bool[V]."""
    mask = np.zeros(labels.vocab_size, dtype=bool)
    # As a mask: one indexing for a whole block instead of a lookup for each label.
    mask[list(labels.dropped)] = True
    return mask


def _quantile_name(quantile: float) -> str:
    """``least``, ``median``, ``most``, or the per cent."""
    return {0.0: "least", 0.5: "median", 1.0: "most"}.get(quantile, f"{quantile:.0%}")


def _write_idf(file: str | Path, counts: _Counts, labels: CaptionLabels, source: str) -> str:
    """Write the IDF table; what was written, in words."""
    import torch

    from mmkit.encoders.idf import save_table

    # With the vocabulary's hash: a run with other labels refuses the table.
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
