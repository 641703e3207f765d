"""Label sets of many captions at once, by array operations: several times as fast as a Python loop over captions.

Chunks (what is between two spaces) are looked up in a hash table by their bytes. What the table does not hold goes through
Python once and is put in. Rows become sorted sets by one sort of (row, id) keys.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from itertools import chain
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from mmkit.encoders.vocab import clean_lower, is_plain

Ints = NDArray[np.int32]
Longs = NDArray[np.int64]
Words = NDArray[np.uint64]

# A chunk of up to 15 bytes is two words: its bytes, zeros behind, and its length in the last byte. So equal words mean equal
# chunks, without a comparison of strings. Length 16 stands for every longer chunk, and its words are never in the table.
_LENGTH = np.arange(17, dtype=np.uint64)
_LOW = np.array([(1 << 8 * min(n, 8)) - 1 for n in range(16)] + [0], dtype=np.uint64)
_HIGH = np.array([(1 << 8 * max(n - 8, 0)) - 1 for n in range(16)] + [0], dtype=np.uint64)
_LENGTH_BYTE = _LENGTH << np.uint64(56)
# Odd numbers without a pattern (the golden ratio, and one of xxHash's primes).
_MIX, _MIX_HIGH = np.uint64(0x9E3779B97F4A7C15), np.uint64(0xC2B2AE3D27D4EB4F)


class _Chunks(NamedTuple):
    """Chunks of a text of lines: bytes with a line end behind the last line, start and end of each chunk, chunks of each line."""

    data: bytes
    starts: Longs
    ends: Longs
    per_line: Longs


class ChunkTable:
    """Codes of chunks: an id, or a negative number for a chunk of several ids. Not for several threads at one time.

    Attributes:
        max_rows: Lines that `encode` takes at one time.
    """

    def __init__(
        self,
        chunk_ids: Callable[[str], tuple[int, ...]],
        size: int,
        *,
        keep: int | None = None,
        dropped: Iterable[int] = (),
        bits: int = 18,
        limit: int = 1 << 18,
    ) -> None:
        """Start empty.

        Args:
            chunk_ids: Ids of a chunk.
            size: V; every id is below.
            keep: Tokens that count of a line, from its start; None: all.
            dropped: Ids that are no labels.
            bits: The table has ``2 ** bits`` places.
            limit: Chunks remembered; then the memory starts again.
        """
        self._chunk_ids, self._keep, self._limit = chunk_ids, keep, limit
        # The id V stands for a chunk without ids, and is left out at the end.
        # Row and id share a positive int32, so that one sort of plain numbers orders both.
        self._none, self._shift = size, size.bit_length()
        self.max_rows = min(1024, 1 << (31 - self._shift))
        self._dropped = np.zeros(size + 1, dtype=bool)
        self._dropped[[*dropped, size]] = True
        # Filtering is a pass over all keys, and the first chunk without ids is yet to come.
        self._drops = int(self._dropped.sum()) > 1
        self._bits = bits
        self._start_again()

    def _start_again(self) -> None:
        """Forget all chunks."""
        # 20 bytes a place: 5 MB at 18 bits.
        places = 1 << self._bits
        self._low, self._high = np.zeros(places, dtype=np.uint64), np.zeros(places, dtype=np.uint64)
        self._code = np.zeros(places, dtype=np.int32)
        self._codes: dict[bytes, int] = {}
        # Chunks of several ids: code -1 - i means ids flat[start[i] : start[i] + length[i]].
        self._flat = self._start = self._length = np.zeros(0, dtype=np.int32)

    def encode(self, text: bytes, rows: int) -> tuple[Ints, Longs]:
        """Label sets of lines of clean lower-case text.

        Args:
            text: B lines, joined by line ends, see `clean_lines`.
            rows: B, at most `max_rows`.

        Returns:
            ids i32[L], sorted and without repeats in each row, and offsets i64[B + 1].
        """
        assert rows <= self.max_rows, f"{rows} rows, but keys have room for {self.max_rows}"
        # Between batches only: the codes of a batch point into what would be forgotten.
        if len(self._codes) >= self._limit:
            self._start_again()
        chunks = _find_chunks(text)
        assert len(chunks.per_line) == rows, f"{rows} rows, but {len(chunks.per_line)} lines"
        codes = self._look_up(chunks)
        base = np.repeat(np.arange(rows, dtype=np.int32) << self._shift, chunks.per_line)
        single = codes >= 0
        several = np.flatnonzero(~single)
        index = -1 - codes[several]
        keys = np.concatenate(((base + codes)[single], self._keys_of_several(index, base[several])))
        if self._keep is not None:
            # A chunk without ids counts as one here: too much is harmless, since long rows are cut anew from their text.
            counts = chunks.per_line + np.bincount(base[several] >> self._shift, self._length[index] - 1, rows).astype(np.int64)
            keys = self._cut(keys, text, np.flatnonzero(counts > self._keep))
        if self._drops:
            keys = keys[~self._dropped[keys & ((1 << self._shift) - 1)]]
        return _rows_of_keys(keys, rows, self._shift)

    def _look_up(self, chunks: _Chunks) -> Ints:
        """The code of every chunk."""
        low, high = _words(chunks)
        # The top bits of a product depend on every byte of the chunk, the bottom ones on few.
        place = (((low ^ (high * _MIX_HIGH)) * _MIX) >> np.uint64(64 - self._bits)).view(np.int64)
        codes = self._code.take(place)
        missing = np.flatnonzero((self._high.take(place) != high) | (self._low.take(place) != low))
        if len(missing):
            self._learn(chunks, missing, low, high, place, codes)
        return codes

    def _learn(self, chunks: _Chunks, missing: Longs, low: Words, high: Words, place: Longs, codes: Ints) -> None:
        """Fill in the codes of chunks that the table does not hold, and put them in where their place is free.

        Who comes first has the place. Frequent chunks come early, so those that always take this way are rare.
        """
        # Collected, and appended once at the end: each append copies the whole array.
        several: list[tuple[int, ...]] = []
        data, known = chunks.data, self._codes
        where = zip(missing.tolist(), chunks.starts[missing].tolist(), chunks.ends[missing].tolist(), strict=True)
        try:
            for i, start, end in where:
                chunk = data[start:end]
                code = known.get(chunk)
                if code is None:
                    code = known[chunk] = self._new_code(chunk, several)
                    # A chunk in the table has its length in the last byte, so 0 there means free.
                    if end - start < 16 and not self._high[place[i]]:
                        self._low[place[i]], self._high[place[i]], self._code[place[i]] = low[i], high[i], code
                codes[i] = code
        finally:
            # Also after an interruption: codes that were given away must mean something.
            self._append(several)

    def _append(self, several: list[tuple[int, ...]]) -> None:
        """Store the ids behind new negative codes."""
        if several:
            lengths = np.fromiter(map(len, several), dtype=np.int32, count=len(several))
            first = len(self._flat) + np.cumsum(lengths, dtype=np.int32) - lengths
            self._start, self._length = np.append(self._start, first), np.append(self._length, lengths)
            self._flat = np.append(self._flat, np.fromiter(chain.from_iterable(several), dtype=np.int32))

    def _new_code(self, chunk: bytes, several: list[tuple[int, ...]]) -> int:
        """The code of a chunk; several ids are added to the list."""
        ids = self._chunk_ids(chunk.decode("utf-8"))
        if len(ids) > 1:
            several.append(ids)
            # -1 - i for entry i, which is where `_append` will put it.
            return -len(self._length) - len(several)
        # From now on the stand-in for chunks without ids has to be filtered out.
        self._drops |= not ids
        return ids[0] if ids else self._none

    def _keys_of_several(self, index: Ints, base: Ints) -> Ints:
        """Keys of all ids of chunks that have several: index i32[M] into `_start`, base key of the row i32[M]."""
        lengths = self._length[index]
        ends = np.cumsum(lengths, dtype=np.int32)
        where = np.repeat(self._start[index] - ends + lengths, lengths)
        where += np.arange(len(where), dtype=np.int32)
        keys: Ints = self._flat[where] + np.repeat(base, lengths)
        return keys

    def _cut(self, keys: Ints, text: bytes, long: Longs) -> Ints:
        """Replace the keys of rows with too many tokens by those of their first ones."""
        if not len(long):
            return keys
        # Keys have lost the order of the text, so these few rows are tokenised again.
        lines = text.split(b"\n")
        keys = keys[~np.isin(keys >> self._shift, long)]
        cut = [
            (row << self._shift) + label
            for row in long.tolist()
            for label in [i for chunk in lines[row].decode().split() for i in self._chunk_ids(chunk)][: self._keep]
        ]
        return np.append(keys, np.array(cut, dtype=np.int32))


def clean_lines(captions: Sequence[str]) -> bytes:
    """Many captions made clean and lower-case, a line each; a line may hold spaces in a row, and no other white space."""
    text = "\n".join(captions)
    if text.isascii() and "&" not in text:
        data = text.encode().lower()
        content = np.frombuffer(data, dtype=np.uint8)
        # No control characters but the line ends between captions: `is_plain` of each, at a fifth of the time.
        if np.count_nonzero(content < ord(" ")) == len(captions) - 1 and not np.count_nonzero(content == 0x7F):
            return data
    return "\n".join([caption.lower() if is_plain(caption) else clean_lower(caption) for caption in captions]).encode()


def _find_chunks(text: bytes) -> _Chunks:
    """Split lines at spaces."""
    data = text + b"\n"
    content = np.frombuffer(data, dtype=np.uint8)
    line_end = content == ord("\n")
    white = line_end | (content == ord(" "))
    edge = np.empty(len(white), dtype=bool)
    edge[0] = not white[0]
    np.not_equal(white[1:], white[:-1], out=edge[1:])
    # The text ends with white space, so starts and ends alternate and are equal in number.
    edges = np.flatnonzero(edge)
    starts, ends = edges[0::2], edges[1::2]
    # Chunks before each line's end; an empty line repeats the number before it, so its difference is 0.
    before = np.searchsorted(starts, np.flatnonzero(line_end))
    return _Chunks(data, starts, ends, np.diff(before, prepend=0))


def _words(chunks: _Chunks) -> tuple[Words, Words]:
    """The two words of every chunk, see `_LENGTH`."""
    size = len(chunks.data)
    # The words of the last chunk may reach beyond the text.
    padded = chunks.data + bytes(16)
    # A view of eight bytes at every byte, so that a word is one look-up.
    first: NDArray[Any] = np.ndarray((size,), "<u8", padded, strides=(1,))
    second: NDArray[Any] = np.ndarray((size,), "<u8", padded, offset=8, strides=(1,))
    length = np.minimum(chunks.ends - chunks.starts, 16)
    # `take` is faster than an index in brackets here.
    low = first.take(chunks.starts) & _LOW.take(length)
    high = (second.take(chunks.starts) & _HIGH.take(length)) | _LENGTH_BYTE.take(length)
    return low, high


def _rows_of_keys(keys: Ints, rows: int, shift: int) -> tuple[Ints, Longs]:
    """Sort keys ``row << shift | id``, leave out repeats, and take them apart: ids i32[L], offsets i64[B + 1]."""
    # Most keys come row by row, and this kind makes use of order that is there: a third of the time of the default.
    keys.sort(kind="stable")
    first = np.ones(len(keys), dtype=bool)
    np.not_equal(keys[1:], keys[:-1], out=first[1:])
    keys = keys[first]
    # int64: the end of the last row, ``rows << shift``, may be 2^31. A row without keys begins where the next does.
    offsets = np.searchsorted(keys, np.arange(rows + 1, dtype=np.int64) << shift)
    return keys & ((1 << shift) - 1), offsets
