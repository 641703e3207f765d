"""Image-text pairs behind one small interface: a list of shards, each of which gives any of its pairs by number.

Nothing of a pair is read before it is asked for, so the order of a run is a pure function of (seed, epoch, position) whatever the
size of the data set, and memory does not grow with it. Readers of the formats are in ``mmkit/data/sources``.
"""

from __future__ import annotations

import bisect
import contextlib
import dataclasses
import itertools
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from mmkit.data.bounds import MAX_BYTES
from mmkit.data.layout import Layout, Part
from mmkit.data.skipped import LeftOut, SampleError
from mmkit.files import hash_text

# A caption is one line of text: line ends would shift line-based tools (evaluation.md section 2), and control characters, which
# are left over from broken conversions, mean nothing to a reader. Tab is one of them.
_CONTROLS = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]+")


class Picture(Protocol):
    """An encoded picture that is read when it is asked for. Hashable: equal ones are the same bytes."""

    @property
    def path(self) -> str:
        """The file that holds it; another time of writing may mean other pixels."""
        ...

    def read(self, max_bytes: int = MAX_BYTES) -> bytes:
        """The bytes. Raises SampleError when they cannot be had, or are more than ``max_bytes``."""
        ...


@dataclasses.dataclass(frozen=True)
class Pair:
    """One sample: a picture and its caption."""

    source: str
    key: str
    image: Picture
    caption: str

    @property
    def name(self) -> str:
        """The key with its file's name, which many shards need to tell their samples apart; not its folder, which may move."""
        file = self.source.rpartition("/")[2]
        return self.key if self.key.startswith(file) else f"{file}:{self.key}"


class PairShard(Protocol):
    """A piece of a data set that is opened as a whole: a tar, a row group, a file of rows."""

    def __len__(self) -> int:
        """Pairs in it."""
        ...

    def read(self, row: int) -> Pair:
        """Pair ``row``. Raises SampleError when it cannot be used."""
        ...

    def describe(self, row: int) -> tuple[str, str]:
        """Source and key of pair ``row``, for the list of left-out samples."""
        ...

    def files(self) -> Iterable[str]:
        """The files on this disk that its pictures lie in."""
        ...


class ListShard:
    """Pairs that are in memory: what a reader makes that must see the whole file anyway."""

    def __init__(self, pairs: list[Pair]) -> None:
        self.pairs = pairs

    def __len__(self) -> int:
        return len(self.pairs)

    def read(self, row: int) -> Pair:
        """Pair ``row``."""
        return self.pairs[row]

    def describe(self, row: int) -> tuple[str, str]:
        """Source and key of pair ``row``."""
        return self.pairs[row].source, self.pairs[row].key

    def files(self) -> Iterable[str]:
        """The pictures' files."""
        return (pair.image.path for pair in self.pairs)


class PairSource:
    """All pairs of a data set, or of a mixture of several.

    Attributes:
        shards: The pieces, in the order of the location.
        left_out: Rows that the index already had to leave out, with reasons.
        fingerprint: Hash of what the data set is: names and sizes of its files, or the content of an index.
        layout: What an order needs to know: shards, shuffle windows, weights.
        unlimited: Pairs before a limit, which `left_out` belongs to.
    """

    def __init__(
        self,
        shards: Sequence[PairShard],
        left_out: list[LeftOut],
        fingerprint: str,
        layout: Layout,
        unlimited: int | None = None,
    ) -> None:
        self.unlimited = layout.size if unlimited is None else unlimited
        self.shards, self.left_out, self.fingerprint, self.layout = shards, left_out, fingerprint, layout
        # Of the shards and not of the layout, whose last shard a limit may have shortened.
        self._ends = list(itertools.accumulate(len(shard) for shard in shards))

    def __len__(self) -> int:
        """Number of pairs."""
        return self.layout.size

    def read(self, index: int) -> Pair:
        """Pair ``index``.

        Raises:
            SampleError: It cannot be used; the loader takes another.
        """
        shard, row = self._locate(index)
        return shard.read(row)

    def describe(self, index: int) -> tuple[str, str]:
        """Source and key of pair ``index``."""
        shard, row = self._locate(index)
        return shard.describe(row)

    def _locate(self, index: int) -> tuple[PairShard, int]:
        # bisect on a list: for single look-ups ten times faster than numpy's searchsorted.
        number = bisect.bisect_right(self._ends, index)
        return self.shards[number], index - (self._ends[number - 1] if number else 0)

    def pictures_stamp(self) -> str:
        """Hash of size and time of writing of all files that pictures lie in: what the fingerprint of an index does not tell.

        It looks at each of them, so it is for work that will read them anyway.
        """
        seen = []
        # Each file once: captions share a picture, and row groups a file.
        for name in dict.fromkeys(name for shard in self.shards for name in shard.files()):
            # A missing one is a state as well: it may be there when the work is repeated.
            with contextlib.suppress(OSError, ValueError):
                stat = os.stat(name)  # noqa: PTH116  millions of them
                seen.append(f"{name} {stat.st_size} {stat.st_mtime_ns}")
        return hash_text(*seen)

    def __iter__(self) -> Iterator[Pair]:
        return (self.read(index) for index in range(len(self)))

    def usable(self) -> tuple[list[Pair], NDArray[np.bool_], list[LeftOut]]:
        """All pairs that can be read, in memory; which of all they are, bool[size]; and what could not be read."""
        pairs, left_out = [], []
        kept = np.ones(len(self), dtype=bool)
        for index in range(len(self)):
            try:
                pairs.append(self.read(index))
            except SampleError as error:
                kept[index] = False
                left_out.append(LeftOut(*self.describe(index), str(error)))
        return pairs, kept, left_out

    @property
    def pairs(self) -> list[Pair]:
        """All pairs read into memory, for small sets."""
        return list(self)

    def take(self, limit: int | None) -> PairSource:
        """The first ``limit`` pairs; None is all of them."""
        if limit is None or limit >= len(self):
            return self
        # Whole shards behind the limit go; the last one that stays is shortened in the layout alone.
        kept = bisect.bisect_left(self._ends, limit) + 1
        chunks = np.asarray([len(shard) for shard in self.shards[:kept]], dtype=np.int64)
        chunks[-1] -= int(chunks.sum()) - limit
        # One part: single sources are limited, before they are joined.
        part = self.layout.parts[0]
        layout = Layout((Part(chunks, part.window),))
        # What the index left out stays that of the whole set, and so does the number that it is held against.
        return PairSource(self.shards[:kept], self.left_out, self.fingerprint, layout, self.unlimited)


def clean_caption(text: object) -> str:
    """One line of text, control characters made spaces.

    Raises:
        ValueError: Not a string, or empty; the message is the reason.
    """
    if not isinstance(text, str):
        raise ValueError(f"caption is {type(text).__name__}, not a string")
    # JSON may spell a lone surrogate, which no tokenizer and no file takes; it becomes a question mark.
    line = _CONTROLS.sub(" ", text).encode("utf-8", "replace").decode("utf-8").strip()
    if not line:
        raise ValueError("caption is empty")
    return line


def decode_caption(data: bytes) -> str:
    """A caption from the bytes of a file, cleaned.

    Raises:
        ValueError: Invalid UTF-8 or empty; the message is the reason.
    """
    try:
        return clean_caption(data.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise ValueError(f"caption: invalid UTF-8 at byte {error.start}") from None


def safe_image_path(root: Path, name: object) -> Path:
    """A picture's path below ``root``.

    Raises:
        ValueError: Missing, absolute, or climbing out of the root: data must not name files outside it.
    """
    if not isinstance(name, str) or not name:
        raise ValueError("image is missing")
    path = Path(name)
    name.encode("utf-8")  # raises a ValueError on a lone surrogate, which no file name holds
    if "\0" in name:
        raise ValueError(f"image {name!r} is no file name")
    # By parts, not by resolving: a data folder may itself be a link, or hold links to where the pictures lie.
    if path.is_absolute() or ".." in path.parts:
        raise ValueError(f"image {name!r} points outside the data folder")
    # No look whether it exists: millions of stats at start; a missing picture is found, replaced and listed when it is read.
    return root / path
