"""Conversations in the rows of Hugging Face data sets and Parquet files, read by number; pictures as bytes, or as files."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from mmkit.data.bounds import MAX_BYTES
from mmkit.data.images import ImageRef
from mmkit.data.items import Conversation, ConversationSet, OddItem, arrange, check_pictures
from mmkit.data.llava_json import check_name, missing_pictures, present, read_items
from mmkit.data.messages import PICTURE_KEYS, Spelling, parse_item
from mmkit.data.packed import VERSION, Item, Omission, PackedConversations, write_packed
from mmkit.data.pairs import Picture
from mmkit.data.remote import is_remote
from mmkit.data.skipped import LeftOut, SampleError
from mmkit.data.sources.columns import data_roots, follow_picture, load_rows
from mmkit.data.sources.locate import HUB, expand
from mmkit.errors import InputError
from mmkit.files import hash_file, hash_text, new_file

logger = logging.getLogger(__name__)
# In the order in which `parse_item` looks.
_TEXTS = {"auto": ("messages", "conversations"), "messages": ("messages",), "llava": ("conversations",)}


@dataclasses.dataclass(frozen=True)
class RowPicture:
    """A picture in a row of a data set; equal by place."""

    path: str
    row: int
    number: int
    rows: Any = dataclasses.field(compare=False, repr=False)
    roots: tuple[Path, ...] = dataclasses.field(compare=False, default=())

    def read(self, max_bytes: int = MAX_BYTES) -> bytes:
        """The bytes. Raises SampleError when there are none, or more than ``max_bytes``."""
        found = _cell(self.rows, self.row).as_py()
        value = found[self.number] if isinstance(found, list) else found
        return follow_picture(value, self.roots, max_bytes)


def _cell(rows: Any, row: int) -> Any:
    """The only column of a row as an Arrow scalar, which a picture in it can be counted in without being copied."""
    return rows[row].column(0)[0]


class RowConversations:
    """Conversations of a data set that is memory-mapped by Hugging Face's library."""

    def __init__(self, location: str, rows: Any, spelling: Spelling, root: Path | None, roots: tuple[Path, ...]) -> None:
        """Take the rows of a split.

        Args:
            location: For messages.
            rows: A ``datasets.Dataset``.
            spelling: Of the messages.
            root: Folder that names of pictures are relative to; None: they have to be bytes.
            roots: Folders below which a picture that is no bytes may lie.

        Raises:
            InputError: No column of messages.
        """
        self.location, self.rows, self.spelling, self.root, self.roots = location, rows, spelling, root, roots
        self._first = 0
        names = rows.column_names
        text = next((name for name in _TEXTS[spelling] if name in names), None)
        if text is None:
            what = f"no column {' or '.join(map(repr, _TEXTS[spelling]))} of messages"
            raise InputError(what, where=location, mend=f"there are {', '.join(names)}")
        self._picture = next((name for name in PICTURE_KEYS if name in names), None)
        # As Arrow, so that nothing is decoded; and apart, so that asking for a text does not read pictures.
        self._texts = rows.select_columns([text, *(["id"] if "id" in names else [])]).with_format("arrow")
        self._pictures = None if self._picture is None else rows.select_columns([self._picture]).with_format("arrow")

    def __len__(self) -> int:
        return len(self._texts)

    def piece(self, first: int, last: int) -> RowConversations:
        """Some of them; they keep the numbers of their rows."""
        if (first, last) == (0, len(self)):
            return self
        some = self.rows.select(range(first, min(last, len(self))))
        found = RowConversations(self.location, some, self.spelling, self.root, self.roots)
        found._first = self._first + first
        return found

    def name(self, index: int) -> str:
        """Number of the row."""
        return f"row {self._first + index}"

    def __getitem__(self, index: int) -> Conversation:
        index = range(len(self))[index]
        row = {name: column[0] for name, column in self._texts[index].to_pydict().items()}
        try:
            pictures = [] if self._pictures is None else self._listed(index)
            # Under the key that `pictures_of` looks at first, whatever the column is called.
            messages, named = parse_item({**row, **({"images": pictures} if pictures else {})}, self.spelling)
            turns, system = arrange(messages)
            check_pictures(turns, len(named))
            # Named files are looked for when their row is read: at the start that would mean to read every row.
            images = tuple(found if isinstance(found, RowPicture) else self._file(found) for found in named)
        except OddItem as error:
            raise SampleError(str(error)) from None
        key = row.get("id")
        return Conversation(self.name(index) if key in (None, "") else str(key), images, turns, system)

    def images(self, index: int) -> tuple[Picture, ...]:
        """Pictures of a row; where they belong is in its text, which is read too. Raises SampleError."""
        return self[index].images

    def _listed(self, index: int) -> list[Any]:
        """Pictures of a row: files by name, others by their place."""
        cell = _cell(self._pictures, index)
        if not cell.is_valid:
            return []
        # A list scalar knows its length; taking the values out would copy the bytes of every picture.
        values = cell.values if hasattr(cell, "values") and not hasattr(cell, "items") else None
        kind = cell.type if values is None else values.type
        # Names are short, so they are taken out; of bytes no more than their number is wanted now.
        if str(kind) in ("string", "large_string"):
            return [cell.as_py()] if values is None else values.to_pylist()
        count = 1 if values is None else len(values)
        return [RowPicture(self.location, index, number, self._pictures, self.roots) for number in range(count)]

    def _file(self, name: Any) -> Picture:
        if self.root is None:
            raise OddItem(f"names the picture {name!r}: set image_root to the folder it lies in")
        return ImageRef(str(self.root / check_name(name, self.root)))


# Conversations, what is left out of them, and a hash of their content.
Opened = tuple[ConversationSet, list[LeftOut], str]


class Told(NamedTuple):
    """What one process finds out about a JSON file for all of them.

    Attributes:
        fingerprint: Hash of its content.
        missing: Number of a picture that is not there, with the reason.
    """

    fingerprint: str
    missing: dict[int, str]


def open_conversations(
    location: str, kind: str = "auto", *, image_root: str | None = None, cache: Path | None = None, told: Told | None = None
) -> Opened:
    """Conversations of a data set, by what it is.

    Args:
        location: LLaVA's ``.json`` or ``.jsonl``, or the same with ``messages``; Parquet files (one, a glob, a folder); or
            ``hf:NAME_OR_FOLDER[@SPLIT]``.
        kind: ``auto``: each row says by its keys which spelling it has; ``llava``, ``messages``: only that one; ``parquet``,
            ``hf``: as auto, for places that do not show what they are.
        image_root: Folder that names of pictures are relative to; None: that of the file.
        cache: Folder in which a JSON file is kept as one that is mapped; None: it is read into the memory of this process.
        told: Of `look_at_conversations`, by another process; None: looked at here.

    Raises:
        InputError: Nothing there, broken JSON, another kind of data, or no column of messages.
    """
    spelling, root = _spelling(location, kind), None if image_root is None else Path(image_root)
    if location.startswith(HUB):
        return _open_hub(location, spelling, root)
    if not _is_json(location, kind):
        return _open_parquet(location, spelling, root)
    path = Path(location)
    items, fingerprint = _json_items(path, spelling, root or path.parent, cache, told)
    # Where this machine has another file, its own pictures count, and the difference is told before training.
    same = told is not None and told.fingerprint == fingerprint
    missing = told.missing if told is not None and same else missing_pictures(items, root or path.parent)
    kept, left_out = present(items, path, missing)
    # A file of nothing but bad items is the caller's to refuse: it knows how many may be bad.
    if not len(kept) and not left_out:
        raise InputError("holds no conversations", where=location, mend="check the file")
    return kept, left_out, fingerprint


def look_at_conversations(location: str, kind: str, *, image_root: str | None, cache: Path) -> Told | None:
    """Read a JSON file, keep it and look for its pictures, so that other processes need not; None: it is none.

    Raises:
        InputError: As `open_conversations`.
    """
    spelling = _spelling(location, kind)
    if not _is_json(location, kind):
        return None
    root = Path(image_root) if image_root is not None else Path(location).parent
    items, fingerprint = _json_items(Path(location), spelling, root, cache, None)
    return Told(fingerprint, missing_pictures(items, root))


def _spelling(location: str, kind: str) -> Spelling:
    """How messages are spelt. Raises InputError: no conversations, or on no disk."""
    if kind not in ("auto", "llava", "messages", "parquet", "hf"):
        raise InputError(f"data type {kind!r} holds no conversations", where=location, mend="use llava or messages")
    if is_remote(location):
        raise InputError("conversations are read from a disk", where=location, mend="fetch the file, or give hf:NAME")
    return "llava" if kind == "llava" else "messages" if kind == "messages" else "auto"


def _is_json(location: str, kind: str) -> bool:
    path = Path(location)
    return not (location.startswith(HUB) or kind == "parquet" or path.is_dir() or path.suffix == ".parquet")


def _json_items(
    path: Path, spelling: Spelling, root: Path, cache: Path | None, told: Told | None
) -> tuple[PackedConversations, str]:
    """Items of a file, whether their pictures are there or not, and a hash of its content."""

    # The published files name items after their pictures, so their ids repeat by design (facts/llava.md 1.3).
    def items() -> Iterator[Item | Omission]:
        return read_items(path, unique_ids=False, spelling=spelling)

    if cache is None:
        return PackedConversations.of(items(), root), hash_file(path)
    # Of what another process has kept: the file itself need not be read for its hash.
    if told is not None and (found := PackedConversations.open(kept_path(cache, told.fingerprint, spelling), root)) is not None:
        return found, told.fingerprint
    if not path.is_file():
        # The reader's own words for it.
        return PackedConversations.of(items(), root), ""
    fingerprint = hash_file(path)
    kept = kept_path(cache, fingerprint, spelling)
    if (found := PackedConversations.open(kept, root)) is not None:
        return found, fingerprint
    try:
        with new_file(kept) as file:
            write_packed(file, items())
    except OSError as error:
        logger.warning("conversations cannot be kept at %s (%s); each process reads them into its memory", kept, error)
        return PackedConversations.of(items(), root), fingerprint
    found = PackedConversations.open(kept, root)
    assert found is not None, f"{kept} was just written"
    return found, fingerprint


def kept_path(cache: Path, fingerprint: str, spelling: Spelling) -> Path:
    """Where a JSON file of this content lies as one that is mapped."""
    return cache / "conversations" / f"{hash_text(fingerprint, spelling, VERSION)}.bin"


def _open_hub(location: str, spelling: Spelling, root: Path | None) -> Opened:
    name, _, split = location.removeprefix(HUB).partition("@")
    if not name:
        raise InputError("no name after hf:", where=location, mend="write hf:OWNER/NAME@SPLIT or hf:FOLDER")
    rows = load_rows(name, split, location)
    # A data folder that is moved as a whole stays usable; a name on the hub is no folder.
    root = root or (Path(name) if Path(name).is_dir() else None)
    # Resolved, as `follow_picture` resolves what it compares with them.
    return _of_rows(location, rows, spelling, root, (*data_roots(name), *([root.resolve()] if root else [])))


def _open_parquet(location: str, spelling: Spelling, root: Path | None) -> Opened:
    import datasets

    files = expand(location, ".parquet")
    try:
        # Into Arrow files in its cache: any row of those can be had without reading its neighbours' pictures.
        rows = datasets.load_dataset("parquet", data_files=files, split="train")
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        what = f"cannot be read as Parquet ({' '.join(str(error).split())})"
        raise InputError(what, where=location, mend="fetch or write it again") from None
    root = root or Path(files[0]).parent
    return _of_rows(location, rows, spelling, root, (root.resolve(),))


def _of_rows(location: str, rows: Any, spelling: Spelling, root: Path | None, roots: Sequence[Path]) -> Opened:
    found = RowConversations(location, rows, spelling, root, tuple(roots))
    # It changes with every transformation of the set, so no row has to be read to notice other content.
    return found, [], hash_text(str(rows._fingerprint), spelling)
