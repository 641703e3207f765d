"""Word-level label vocabularies made from a corpus, after CatLIP (arXiv 2404.15653)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any

import regex  # type: ignore[import-untyped]

from mmkit.encoders.vocab import ChunkedVocabulary, clean_lower
from mmkit.errors import InputError
from mmkit.files import write_json

# Marks belong to the letter before them: without them words of Hindi, Thai or Arabic would fall to pieces.
_RUNS = regex.compile(r"[\p{L}\p{M}\p{N}]+")
_KIND = "mmkit-words"


class WordList(ChunkedVocabulary):
    """The words of a file, numbered in its order; other words of a caption give no label.

    Attributes:
        counts: Captions of the corpus that contain each word.
        captions: Captions of the corpus.
    """

    kind = _KIND

    def __init__(self, path: Path, content: dict[str, Any]) -> None:
        """Take the words of a file's content.

        Args:
            path: The file.
            content: ``{"kind": "mmkit-words", "words": [...], "counts": [...], "captions": N}``.

        Raises:
            InputError: If the content is no such list.
        """
        super().__init__()
        self.path = path
        words, counts = content.get("words"), content.get("counts")
        if not isinstance(words, list) or not words or not all(isinstance(word, str) and word for word in words):
            raise InputError("words must be a list of words", where=path, mend=_MEND)
        # type and not isinstance: true is an int to Python and no count.
        if not isinstance(counts, list) or len(counts) != len(words) or not all(type(count) is int for count in counts):
            raise InputError(f"counts must be {len(words)} whole numbers, one a word", where=path, mend=_MEND)
        if type(content.get("captions")) is not int:
            raise InputError("captions must be a whole number", where=path, mend=_MEND)
        self._words: list[str] = words
        self.counts: list[int] = counts
        self.captions: int = content["captions"]
        # A list with repeats would have rows of the head that no caption ever reaches.
        self._index = {word: index for index, word in enumerate(words)}
        if len(self._index) != len(words):
            twice = next(word for word, count in Counter(words).items() if count > 1)
            raise InputError(f"the word {twice!r} comes twice", where=path, mend=_MEND)
        self.size = len(words)

    def chunk_ids(self, chunk: str) -> tuple[int, ...]:
        """Ids of the known words in a chunk."""
        return tuple(self._index[word] for word in _RUNS.findall(chunk) if word in self._index)

    def token(self, label: int) -> str:
        """The word."""
        return self._words[label]

    def word(self, label: int) -> str:
        """The word."""
        return self._words[label]


_MEND = "write the file again with `mmkit data inspect --words`"


def split_words(caption: str) -> list[str]:
    """Runs of letters and numbers of a caption, clean and in lower case, in order."""
    found: list[str] = _RUNS.findall(clean_lower(caption))
    return found


def count_words(captions: Iterable[str]) -> Counter[str]:
    """Document frequencies: in how many captions each word is."""
    counter: Counter[str] = Counter()
    for caption in captions:
        counter.update(set(split_words(caption)))
    return counter


def write_words(
    file: Path,
    counter: Counter[str],
    *,
    size: int = 40_000,
    min_count: int = 5,
    captions: int,
    stop_words: Collection[str] = (),
) -> int:
    """Write the most frequent words as a vocabulary that ``data.labels`` takes.

    Args:
        file: The words file, complete or absent at every time.
        counter: Document frequencies from `count_words`.
        size: Words at most; CatLIP curated about 40,000.
        min_count: Captions a word must be in.
        captions: Captions that were counted.
        stop_words: Words to leave out.

    Returns:
        The number of words written.

    Raises:
        InputError: If no word is frequent enough.
    """
    left_out = set(stop_words)
    enough = [(word, count) for word, count in counter.items() if count >= min_count and word not in left_out]
    # Ties by the alphabet: the same corpus gives the same file in any order of reading.
    chosen = sorted(enough, key=lambda item: (-item[1], item[0]))[:size]
    if not chosen:
        mend = "lower min_count or count more captions"
        raise InputError(f"no word is in {min_count} or more of {captions} captions", where=file, mend=mend)
    words, counts = zip(*chosen, strict=True)
    write_json(file, {"kind": _KIND, "words": words, "counts": counts, "captions": captions})
    return len(chosen)
