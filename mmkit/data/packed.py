"""Conversations with pictures in files, as bytes in one piece: in memory, or in a file that all processes of a machine map.

The published instruction file has 665,000 of them. As Python objects they would take several times the memory, and loader workers
would copy them page by page, since looking at an object writes its reference count. A mapped file is in memory once, whatever the
number of ranks and workers, and the system takes it back when it needs the room.
"""

from __future__ import annotations

import array
import functools
import io
import json
import mmap
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from mmkit.data.images import ImageRef
from mmkit.data.items import Conversation, Turns
from mmkit.errors import InputError

_MAGIC = b"mmkit-conversations\n"
# Another number where a file's content, or what the readers make of one, becomes another; then kept ones are not used.
VERSION = "1"
# Of the number at the very end, which says where the head begins.
_WORD = 8
# What reading the head of a damaged file can raise.
_UNFIT = (ValueError, KeyError, TypeError, RecursionError, OverflowError)


class Item(NamedTuple):
    """A usable item of a file: its number there, its name, names of pictures, turns and system text."""

    number: int
    key: str
    names: Sequence[str]
    turns: Turns
    system: str | None


class Omission(NamedTuple):
    """An item that is left out: its number in the file, its name and the reason."""

    number: int
    key: str
    reason: str


def write_packed(file: IO[bytes], items: Iterable[Item | Omission]) -> None:
    """Write conversations one after the other; none is held.

    Layout: rows ``[id, turns, system]`` in JSON; arrays of eight-byte numbers; a head in JSON that says where they lie; where the
    head begins. The names of pictures stand once each, beside the rows, so that they are had without reading texts.

    Raises:
        OSError: The file cannot be written.
    """
    names: dict[str, int] = {}
    # Eight bytes a number, where a list's integers take forty.
    numbers, ends, pictures, picture_ends = (array.array("q") for _ in range(4))
    left_out: list[Omission] = []
    at = file.write(_MAGIC)
    for item in items:
        if isinstance(item, Omission):
            left_out.append(item)
            continue
        row = json.dumps([item.key, item.turns, item.system], ensure_ascii=False, separators=(",", ":"))
        at += file.write(row.encode())
        pictures.extend(names.setdefault(name, len(names)) for name in item.names)
        numbers.append(item.number)
        ends.append(at)
        picture_ends.append(len(pictures))
    # Names may hold lone surrogates, as file names that are no UTF-8 do; texts and ids were cleaned by the readers.
    encoded = [name.encode("utf-8", "surrogatepass") for name in names]
    columns = {
        "numbers": numbers,
        "begins": [len(_MAGIC), *ends][: len(ends)],
        "ends": ends,
        "pictures": pictures,
        "picture_begins": [0, *picture_ends][: len(ends)],
        "picture_ends": picture_ends,
        "name_ends": np.cumsum([len(name) for name in encoded], dtype=np.int64),
    }
    places: dict[str, tuple[int, int]] = {}
    # To a multiple of eight, or the mapped arrays would not be aligned.
    at += file.write(bytes(-at % _WORD))
    for name, values in columns.items():
        # One byte order by name: machines that share a cache need not have the same.
        column = np.asarray(values, dtype="<i8")
        places[name] = (at, len(column))
        at += file.write(column.tobytes())
    # Behind the numbers: names have any length, and would move these off their alignment.
    places["names"] = (at, sum(map(len, encoded)))
    at += file.write(b"".join(encoded))
    # Head and its place come last: what it says is known only when every row, none of which is held, is written.
    file.write(json.dumps({"version": VERSION, "arrays": places, "left_out": left_out}).encode())
    file.write(at.to_bytes(_WORD, "little"))


class _Body:
    """The bytes that `write_packed` wrote, and its arrays, which are views of them."""

    def __init__(self, data: Any, path: Path | None) -> None:
        """Take bytes, or a map of the file at ``path``. Raises one of `_UNFIT`: it is no such file, or cut off."""
        view = memoryview(data)
        start = int.from_bytes(view[-_WORD:], "little")
        head = json.loads(bytes(view[start:-_WORD]))
        if bytes(view[: len(_MAGIC)]) != _MAGIC or head["version"] != VERSION:
            raise ValueError("another format")
        self.data, self.path = view, path
        self.left_out = [Omission(int(number), str(key), str(reason)) for number, key, reason in head["left_out"]]
        kinds = {name: "u1" if name == "names" else "<i8" for name in head["arrays"]}
        self.arrays: Mapping[str, NDArray[Any]] = {
            name: np.frombuffer(view, kinds[name], count, at) for name, (at, count) in head["arrays"].items()
        }

    def name(self, number: int) -> str:
        """A picture's name."""
        ends = self.arrays["name_ends"]
        found = self.arrays["names"][int(ends[number - 1]) if number else 0 : int(ends[number])]
        return found.tobytes().decode("utf-8", "surrogatepass")


# By the path alone: it is a hash of the content (`mmkit.data.message_rows.kept_path`), so what lies there never
# changes.
@functools.lru_cache(maxsize=16)
def _map(path: str) -> _Body:
    """The file at ``path``, mapped once in a process. Raises OSError or one of `_UNFIT`."""
    with Path(path).open("rb") as file:
        # Not read: pages come in when a conversation is asked for, once for all processes.
        return _Body(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), Path(path))


class PackedConversations:
    """Conversations by number, out of one piece of bytes."""

    def __init__(self, body: _Body, root: Path, rows: NDArray[np.int64] | None = None) -> None:
        """Take bytes, the folder of the pictures, and which rows there are, ascending; None: all."""
        self._body, self._root, self._rows = body, root, rows

    @classmethod
    def pack(cls, items: Iterable[tuple[str, Sequence[str], Turns, str | None]], root: Path) -> PackedConversations:
        """Pack ids, names of pictures below ``root``, turns and system texts, in memory."""
        return cls.of((Item(number, *item) for number, item in enumerate(items)), root)

    @classmethod
    def of(cls, items: Iterable[Item | Omission], root: Path) -> PackedConversations:
        """Pack items, in memory."""
        made = io.BytesIO()
        write_packed(made, items)
        return cls(_Body(made.getbuffer(), None), root)

    @classmethod
    def open(cls, path: Path, root: Path) -> PackedConversations | None:
        """Map a file of `write_packed`; None: there is none, or it is damaged."""
        try:
            return cls(_map(str(path)), root)
        except (OSError, *_UNFIT):
            return None

    @property
    def left_out(self) -> list[Omission]:
        """Items of the file that are not among the rows."""
        return self._body.left_out

    def __len__(self) -> int:
        return len(self._body.arrays["ends"]) if self._rows is None else len(self._rows)

    def piece(self, first: int, last: int) -> PackedConversations:
        """Some of them; the rows stay where they are until the piece is pickled."""
        rows = np.arange(len(self), dtype=np.int64) if self._rows is None else self._rows
        whole = first <= 0 and last >= len(self)
        # The whole as it is: an array of all row numbers would travel with it to every process.
        return self if whole else PackedConversations(self._body, self._root, rows[first:last])

    def without(self, bad: Mapping[int, str]) -> tuple[PackedConversations, list[Omission]]:
        """Leave out the conversations that show certain pictures.

        Args:
            bad: Number of a picture to the reason.

        Returns:
            The others, and the items that are left out.
        """
        if not bad:
            return self, []
        arrays = self._body.arrays
        at = np.flatnonzero(np.isin(arrays["pictures"], np.fromiter(bad, np.int64, len(bad))))
        # The first bad picture of a row is told.
        rows, first = np.unique(np.searchsorted(arrays["picture_ends"], at, side="right"), return_index=True)
        said = [
            Omission(int(arrays["numbers"][row]), self._row(row)[0], bad[int(arrays["pictures"][place])])
            for row, place in zip(rows.tolist(), at[first].tolist(), strict=True)
        ]
        return PackedConversations(self._body, self._root, np.setdiff1d(np.arange(len(arrays["ends"])), rows)), said

    def names(self) -> Iterator[str]:
        """Names of all pictures, by their numbers."""
        return map(self._body.name, range(len(self._body.arrays["name_ends"])))

    # A memoryview does not pickle, and of one in memory the rest is not wanted.
    def __reduce__(self) -> tuple[Any, ...]:
        if self._body.path is not None:
            return _reopen, (str(self._body.path), self._root, self._rows)
        parts = [(item.id, self._names(row), item.turns, item.system) for item, row in zip(self, self._numbers(), strict=True)]
        return PackedConversations.pack, (parts, self._root)

    def name(self, index: int) -> str:
        """Its id."""
        return str(self._row(self._at(index))[0])

    def __getitem__(self, index: int) -> Conversation:
        row = self._at(index)
        key, turns, system = self._row(row)
        return Conversation(key, self._pictures(row), [(question, answer) for question, answer in turns], system)

    def images(self, index: int) -> tuple[ImageRef, ...]:
        """Pictures of one of them, without its texts."""
        return self._pictures(self._at(index))

    def __iter__(self) -> Iterator[Conversation]:
        return (self[index] for index in range(len(self)))

    def _numbers(self) -> Iterator[int]:
        return (self._at(index) for index in range(len(self)))

    def _at(self, index: int) -> int:
        # range has the rules for negative and wrong numbers, which end a plain loop over this.
        index = range(len(self))[index]
        return index if self._rows is None else int(self._rows[index])

    def _row(self, row: int) -> Any:
        begins, ends = self._body.arrays["begins"], self._body.arrays["ends"]
        # A copy of the one row, since json takes no memoryview.
        return json.loads(bytes(self._body.data[int(begins[row]) : int(ends[row])]))

    def _names(self, row: int) -> list[str]:
        begins, ends = self._body.arrays["picture_begins"], self._body.arrays["picture_ends"]
        return [self._body.name(number) for number in self._body.arrays["pictures"][int(begins[row]) : int(ends[row])].tolist()]

    def _pictures(self, row: int) -> tuple[ImageRef, ...]:
        return tuple(ImageRef(str(self._root / name)) for name in self._names(row))


def _reopen(path: str, root: Path, rows: NDArray[np.int64] | None) -> PackedConversations:
    """What was pickled, in another process.

    Raises:
        InputError: The file is gone.
    """
    try:
        return PackedConversations(_map(path), root, rows)
    except (OSError, *_UNFIT) as error:
        raise InputError(
            f"cannot be read again ({error})", where=path, mend="leave the cache alone while a run reads it"
        ) from None
