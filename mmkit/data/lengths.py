"""The encoded length of every conversation in advance, for batches by length; counted in parallel, kept on disk."""

from __future__ import annotations

import json
import logging
import zipfile
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple, Protocol, overload

import numpy as np

from mmkit.data.batching import Lengths
from mmkit.data.conversations import EncodedConversation
from mmkit.data.items import Conversation
from mmkit.data.scan.crew import map_in_order
from mmkit.data.skipped import SampleError
from mmkit.files import hash_text, new_file

logger = logging.getLogger(__name__)
# Conversations of one piece of work: half a second each, so that the last process is not long behind the others.
_PIECE = 1000
# A process takes two seconds to start; up to here one is as fast.
_FEW = 4 * _PIECE


class Cuttable(Protocol):
    """What can be cut into pieces for other processes: a `ConversationSet`, or several joined."""

    def __len__(self) -> int:
        """How many conversations."""
        ...

    def piece(self, first: int, last: int, /) -> Readable:
        """Those from ``first`` to ``last - 1``."""
        ...


class Readable(Protocol):
    """Conversations by number."""

    def __len__(self) -> int:
        """How many."""
        ...

    def __getitem__(self, index: int, /) -> Conversation:
        """One of them. Raises SampleError: it cannot be used."""
        ...


class _Pieces(Sequence[Readable]):
    """The conversations in pieces of work, each cut when its turn comes: all of them may be half a gigabyte."""

    def __init__(self, items: Cuttable) -> None:
        self._items = items

    def __len__(self) -> int:
        return -(-len(self._items) // _PIECE)

    @overload
    def __getitem__(self, number: int) -> Readable: ...
    @overload
    def __getitem__(self, number: slice) -> Sequence[Readable]: ...
    def __getitem__(self, number: int | slice) -> Readable | Sequence[Readable]:
        if isinstance(number, slice):
            return [self[i] for i in range(*number.indices(len(self)))]
        # What ends a plain loop over a sequence.
        if not 0 <= number < len(self):
            raise IndexError(number)
        return self._items.piece(number * _PIECE, min((number + 1) * _PIECE, len(self._items)))


Encode = Callable[[Conversation], EncodedConversation]


class Measured(NamedTuple):
    """Lengths of conversations.

    Attributes:
        lengths: Tokens of each, image tokens included, and whether it has no picture (once it is cut to fit); 0 tokens for one
            that cannot be used.
        supervised: i32[N], supervised tokens of each.
        cut: How many are cut to fit.
        unusable: (number, reason) of those that cannot be used.
    """

    lengths: Lengths
    supervised: np.ndarray[tuple[int], np.dtype[np.int32]]
    cut: int
    unusable: list[tuple[int, str]]


def conversation_lengths(
    items: Cuttable,
    encode: Encode,
    *,
    workers: int | None = None,
    cache: Path | None = None,
    fingerprint: tuple[str, ...] = (),
) -> Measured:
    """Encode every conversation once to learn its length.

    Args:
        items: Conversations; reading one may raise SampleError.
        encode: Of the training samples, such as a `ConversationEncoder`; it goes to other processes, as pieces of ``items`` do.
        workers: Processes; None: one for each core. The result does not depend on it.
        cache: Folder in which the result is kept; None: it is not.
        fingerprint: Hashes of all that the result depends on: data files, and the encoder's own.

    Returns:
        The lengths, in the order of the conversations.

    Raises:
        ValueError: A cache without a fingerprint.
        InputError: A process was killed, or the template does not fit the tokenizer.
    """
    if cache is not None and not fingerprint:
        raise ValueError("lengths can be kept only under a fingerprint of what they depend on")
    path = None if cache is None else cache / "lengths" / f"{hash_text(*fingerprint, str(len(items)))}.npz"
    if path is not None and (found := _read(path, len(items))) is not None:
        return found
    # Few: starting processes would take longer than the work.
    measured = _join(list(map_in_order(_measure, encode, _Pieces(items), 1 if len(items) <= _FEW else workers)))
    if path is not None:
        _write(path, measured)
    return measured


class _Row(NamedTuple):
    """Tokens, pictures kept, supervised tokens, whether cut; and why it cannot be used."""

    tokens: int
    images: int
    supervised: int
    cut: bool
    reason: str | None = None


def _measure(encode: Encode, items: Readable) -> list[_Row]:
    return [_measure_one(items, encode, number) for number in range(len(items))]


def _measure_one(items: Readable, encode: Encode, number: int) -> _Row:
    try:
        found = encode(items[number])
    # Of the text and of the row that it comes from; whether the pictures can be read is not looked at here.
    except SampleError as error:
        return _Row(0, 0, 0, False, str(error))
    return _Row(len(found.input_ids), found.num_images, found.num_supervised, found.cut)


def _join(pieces: list[list[_Row]]) -> Measured:
    rows = [row for piece in pieces for row in piece]
    tokens = np.asarray([row.tokens for row in rows], dtype=np.int32)
    text_only = np.asarray([row.images == 0 for row in rows], dtype=bool)
    supervised = np.asarray([row.supervised for row in rows], dtype=np.int32)
    unusable = [(number, row.reason) for number, row in enumerate(rows) if row.reason is not None]
    return Measured(Lengths(tokens, text_only), supervised, sum(row.cut for row in rows), unusable)


def _write(path: Path, measured: Measured) -> None:
    """Keep lengths where that can be done; otherwise the next start counts again."""
    # As bytes of an array: an array of Python objects would need pickle to read.
    rest = json.dumps({"cut": measured.cut, "unusable": measured.unusable}).encode()
    lengths = measured.lengths
    try:
        with new_file(path) as file:
            np.savez(
                file,
                tokens=lengths.tokens,
                text_only=lengths.text_only,
                supervised=measured.supervised,
                rest=np.frombuffer(rest, dtype=np.uint8),
            )
    except OSError as error:
        logger.warning("the lengths of the conversations cannot be kept at %s (%s); each start counts them again", path, error)


def _read(path: Path, count: int) -> Measured | None:
    """What an earlier start counted; None where there is nothing, or it is damaged."""
    try:
        # Nothing is unpickled: a cache may be a folder that others write to.
        with np.load(path, allow_pickle=False) as found:
            rest = json.loads(found["rest"].tobytes())
            lengths = Lengths(found["tokens"], found["text_only"])
            unusable = [(int(number), str(reason)) for number, reason in rest["unusable"]]
            measured = Measured(lengths, found["supervised"], int(rest["cut"]), unusable)
    # A file that was cut off or written by something else; it is made anew.
    except (OSError, ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile, zlib.error):
        return None
    sizes = {len(lengths.tokens), len(lengths.text_only), len(measured.supervised)}
    return measured if sizes == {count} else None
