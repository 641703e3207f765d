"""In which row of a file of features a picture lies: hashes in order, in a file that all processes of a machine map.

A dictionary of LLaVA's 620,000 pictures takes 200 MB in each rank, and loader workers copy it page by page.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from mmkit.data.pairs import Picture
from mmkit.files import disk_trouble, new_file

_WORD = np.dtype("<u8")


def _hashes(picture: Picture) -> tuple[int, int]:
    """Two words of 64 bits: together they tell any two pictures apart."""
    # By its words, which say where it lies: Python's own hash differs between processes.
    digest = hashlib.blake2b(repr(picture).encode("utf-8", "surrogatepass"), digest_size=16).digest()
    return int.from_bytes(digest[:8], "little"), int.from_bytes(digest[8:], "little")


class PictureRows:
    """Rows by picture."""

    def __init__(self, path: Path, count: int) -> None:
        """Map a file of `write_rows` for so many pictures."""
        self.path, self.count = path, count
        # An empty file cannot be mapped.
        words: NDArray[np.uint64] = np.memmap(path, _WORD, "r", shape=(3, count)) if count else np.empty((3, 0), _WORD)
        self._first, self._second, self._rows = words[0], words[1], words[2]

    def __reduce__(self) -> tuple[type[PictureRows], tuple[Path, int]]:
        # A map does not pickle as one, and another process makes its own.
        return PictureRows, (self.path, self.count)

    def __getitem__(self, picture: Picture) -> int:
        """Its row. Raises KeyError: it is none of them."""
        first, second = _hashes(picture)
        # np.uint64: a Python int becomes int64, which NumPy compares with uint64 as float64, and finds other rows above 2^53.
        at = int(np.searchsorted(self._first, np.uint64(first)))
        # Equal first words lie side by side; the second tells such pictures apart.
        while at < self.count and int(self._first[at]) == first:
            if int(self._second[at]) == second:
                return int(self._rows[at])
            at += 1
        raise KeyError(picture)


def picture_rows(path: Path, pictures: Sequence[Picture]) -> PictureRows:
    """The rows of pictures, written now or by an earlier start.

    Args:
        path: Named after all that the order of the pictures depends on.
        pictures: Different ones, in the order of the rows; looked at only where the file is missing.

    Raises:
        InputError: The disk is full or read-only.
    """
    count = len(pictures)
    # The length is enough: `new_file` gives the name to whole files only, and the name stands for the order.
    if not (path.is_file() and path.stat().st_size == 3 * count * _WORD.itemsize):
        try:
            with new_file(path) as file:
                file.write(_table(pictures).tobytes())
        except OSError as error:
            raise disk_trouble(error, where=path) or error from None
    return PictureRows(path, count)


def _table(pictures: Sequence[Picture]) -> NDArray[np.uint64]:
    """First words in order, second words, rows: u64[3, pictures]."""
    words = np.empty((3, len(pictures)), _WORD)
    for row, picture in enumerate(pictures):
        words[:2, row] = _hashes(picture)
    words[2] = np.arange(len(pictures))
    return words[:, np.argsort(words[0], kind="stable")]
