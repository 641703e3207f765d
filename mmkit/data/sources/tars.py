"""Webdataset shards: members of a tar that share a key are one sample; any of them is read in place, by its byte range."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple, Protocol

from mmkit.data.images import ImageRef
from mmkit.data.pairs import Pair, Picture, decode_caption
from mmkit.data.reading import read_range
from mmkit.data.remote import RemoteRef, ShardCache, is_remote
from mmkit.data.sidecar import Index, Omitted, make_index
from mmkit.data.skipped import SampleError
from mmkit.data.sources.indexed import Indexed, ShardFile

EMPTY = "the shard is empty"
# A caption has a few hundred bytes; a book under a caption's name would be read into memory as a whole. Names likewise.
LONGEST_TEXT = 1 << 20
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp")
_BLOCK = 512


class Bytes(Protocol):
    """What can be cut like bytes."""

    def __len__(self) -> int:
        """Number of bytes."""
        ...

    def __getitem__(self, place: slice, /) -> bytes:
        """A range of them; shorter where they end."""
        ...


class Member(NamedTuple):
    """A file in a tar: its name, and where its bytes lie."""

    name: str
    offset: int
    size: int


@dataclasses.dataclass(frozen=True)
class TarFault:
    """Where a tar cannot be read on, and why; ``key`` is the member before it."""

    key: str
    reason: str


class TarShard:
    """The pairs of one tar."""

    def __init__(self, file: ShardFile, indexed: Indexed, cache: ShardCache) -> None:
        self.file, self.indexed, self.cache = file, indexed, cache

    def __len__(self) -> int:
        return self.file.samples

    def read(self, row: int) -> Pair:
        """Pair ``row``: its caption is read now, its picture when it is asked for."""
        index = self.indexed.index(self.file)
        arrays = index.arrays
        text = self._bytes(int(arrays["text_offset"][row]), int(arrays["text_size"][row]))
        try:
            caption = decode_caption(text)
        except ValueError as error:
            # The index had read it well: these are other bytes.
            raise SampleError(f"{error} (the shard has changed since it was indexed)") from None
        return Pair(self.file.name, index.key(row), self._picture(int(arrays["offset"][row]), int(arrays["size"][row])), caption)

    def describe(self, row: int) -> tuple[str, str]:
        """Shard and key; the row's number where the index cannot be had, as of a shard that has gone."""
        try:
            return self.file.name, self.indexed.index(self.file).key(row)
        except SampleError:
            return self.file.name, f"sample {row}"

    def files(self) -> list[str]:
        """The shard; none where it is remote, whose version is part of its index."""
        return [] if is_remote(self.file.name) else [self.file.name]

    def _picture(self, offset: int, size: int) -> Picture:
        name = self.file.name
        return RemoteRef(self.cache, name, offset, size, self.file.version) if is_remote(name) else ImageRef(name, offset, size)

    def _bytes(self, offset: int, size: int) -> bytes:
        name = self.file.name
        if is_remote(name):
            return self.cache.reading(name, lambda path: read_range(path, offset, size), self.file.version)
        return read_range(name, offset, size)


def index_tar(path: Path) -> Index:
    """Walk through a tar once: which keys have a picture and a usable caption, and where.

    A sample that cannot be used is left out with a reason, and so is what follows a fault in the file.
    """
    keys: list[str] = []
    left_out: list[Omitted] = []
    columns: dict[str, list[int]] = {"offset": [], "size": [], "text_offset": [], "text_size": []}
    data = FileBytes(path)
    for key, members in group_members(data, left_out):
        image = next((members[s] for s in IMAGE_SUFFIXES if s in members), None)
        # By key and never by neighbourhood: with one member missing, every later caption would slip to the next picture.
        text = members.get(".txt")
        if image is None or text is None:
            left_out.append(Omitted(key, f"no {'picture' if image is None else '.txt caption'}"))
            continue
        try:
            if text.size > LONGEST_TEXT:
                raise ValueError(f"caption: {text.size} bytes are over the limit of {LONGEST_TEXT}")
            # Decoded now although it is read again: what cannot be used must not have a position.
            decode_caption(data[text.offset : text.offset + text.size])
        except ValueError as error:
            left_out.append(Omitted(key, str(error)))
            continue
        keys.append(key)
        for name, value in zip(columns, (image.offset, image.size, text.offset, text.size), strict=True):
            columns[name].append(value)
    return make_index(keys, left_out, **columns)


class FileBytes:
    """A file as bytes that are read where they are asked for: of a terabyte of pictures only headers and captions.

    Not mapped: a disk that fails under a map kills the process, where a read raises OSError.
    """

    def __init__(self, path: Path) -> None:
        # pread goes past a buffer anyway.
        self._file = path.open("rb", buffering=0)
        self._size = os.fstat(self._file.fileno()).st_size

    def __len__(self) -> int:
        return self._size

    def __getitem__(self, place: slice) -> bytes:
        start, stop, _ = place.indices(self._size)
        return os.pread(self._file.fileno(), max(0, stop - start), start)


def group_members(data: Bytes, left_out: list[Omitted]) -> Iterator[tuple[str, dict[str, Member]]]:
    """Members of a tar grouped by key (webdataset's rule: the name up to the first dot), each key once.

    Yields:
        Key and its members by suffix, in order of their first member, once the whole tar is read.
    """
    groups: dict[str, dict[str, Member]] = {}
    # Keys that another key has followed: their members must lie together, a later one belongs to another sample.
    closed: set[str] = set()
    current = ""
    hidden: list[str] = []
    for member in walk_tar(data):
        if isinstance(member, TarFault):
            # With its other members too: a caption without its picture is of no use.
            if member.key:
                groups.pop(split_key(member.key)[0], None)
            key = split_key(member.key)[0] or member.key or current or "(start)"
            left_out.append(Omitted(key, member.reason, 1 if member.reason == EMPTY else None))
            continue
        key, suffix = split_key(member.name)
        # Such as the ._NAME that a Mac puts beside every file: of another kind than samples, so they are told of in one row.
        if not key or key.endswith("/"):
            hidden.append(member.name)
            continue
        if key != current:
            closed.add(current)
            current = key
        # The first one stays: which of two pictures a caption belongs to is not known.
        if key in closed or suffix in groups.get(key, {}):
            # A name may hold a line end, a reason is one line.
            left_out.append(Omitted(member.name, f"key {key if key.isprintable() else ascii(key)} comes twice in this shard"))
            continue
        groups.setdefault(key, {})[suffix] = member
    if hidden:
        what = f"{len(hidden)} members whose name begins with a dot, such as {hidden[0]!r}, are no samples"
        left_out.append(Omitted("(hidden)", what, 0))
    yield from groups.items()


def split_key(name: str) -> tuple[str, str]:
    """Key and suffix (lower case, with its dot) of a member: the name ends at its first dot, the folder's do not count."""
    folder, slash, last = name.rpartition("/")
    stem, _, suffix = last.partition(".")
    return f"{folder}{slash}{stem}", f".{suffix.lower()}"


def walk_tar(data: Bytes) -> Iterator[Member | TarFault]:
    """Files of an uncompressed tar in order (POSIX ustar and pax, GNU long names), then a fault if it does not end well.

    Python's tarfile takes a missing end mark and a damaged header for the end and says nothing, and is seven times slower.
    """
    at, size = 0, len(data)
    extended: dict[str, str] = {}
    while True:
        header = data[at : at + _BLOCK]
        # By the sum and not by an empty name: ustar puts the whole name of a folder into the prefix where it just fits there.
        if len(header) < _BLOCK or not _sound(header):
            yield from _ending(data, at, header)
            return
        start, name, kind = at + _BLOCK, "", header[156:157]
        try:
            length = _number(header[124:136])
            if kind in b"xgLK" and length > LONGEST_TEXT:
                raise ValueError("no name is that long")
            if kind in b"xgLK" and start + length <= size:
                extended.update(_extension(kind, data[start : start + length]))
                at = start + -(-length // _BLOCK) * _BLOCK
                continue
        except ValueError:
            # Extensions have no sum. To go on would give the next file under a wrong name.
            yield TarFault("", "the shard is damaged after this")
            return
        # A zero byte is how tars before ustar say a plain file; 7, a contiguous one, is read like one.
        if kind in b"\x000" or kind == b"7":
            # A pax size stands for files over 8 GiB, whose ustar field overflows.
            length = int(extended.get("size", length))
            name = extended.get("path") or _name(header)
        elif kind in b"123456":
            # Links, devices and folders have no content, whatever some writers put into the field.
            length = 0
        at = start + -(-length // _BLOCK) * _BLOCK
        extended = {}
        if start + length > size:
            yield TarFault(name, "the shard is cut off here")
            return
        if name:
            yield Member(name, start, length)


def _sound(header: bytes) -> bool:
    """Whether the sum that a header carries is right; signed sums are those of some old writers."""
    try:
        wanted = _number(header[148:156])
    except ValueError:
        return False
    # The sum is taken with its own eight bytes as spaces.
    total = sum(header) - sum(header[148:156]) + 256
    return wanted == total or wanted == total - 256 * sum(byte > 127 for byte in header[:148] + header[156:])


def _number(field: bytes) -> int:
    """Octal digits, or GNU's binary form. Raises ValueError."""
    if field[0] & 0x80:
        return int.from_bytes(field[1:], "big")
    value = int(field.rstrip(b" \0").lstrip(b" ") or b"0", 8)
    if value < 0:
        raise ValueError("a negative size would lead back to the same header for ever")
    return value


def _name(header: bytes) -> str:
    """The name in a ustar header."""
    name = header[:100].split(b"\0", 1)[0]
    # Old GNU headers use these bytes for times, and say so by another magic.
    prefix = header[345:500].split(b"\0", 1)[0] if header[257:263] == b"ustar\0" else b""
    return (prefix + b"/" + name if prefix else name).decode("utf-8", "surrogateescape")


def _extension(kind: bytes, content: bytes) -> dict[str, str]:
    """What an extension header says of the next file: its path and size. Raises ValueError: it is damaged."""
    if kind == b"L":
        return {"path": content.split(b"\0", 1)[0].decode("utf-8", "surrogateescape")}
    found = {}
    # Link names, and global headers, which hold for no single file.
    while content and kind == b"x":
        if not any(content):
            break  # zero padding of some writers
        digits, _, rest = content.partition(b" ")
        # Each record tells its own length. One of 0 would be read for ever; 20 digits are more than any file has bytes.
        length = int(digits) if digits.isdigit() and len(digits) < 20 else 0
        end = content[length - 1 : length] if length else b""
        record, content = rest[: max(0, length - len(digits) - 2)], content[length:]
        key, equals, value = record.partition(b"=")
        if end != b"\n" or not equals or (key == b"size" and not (value.isdigit() and len(value) < 20)):
            raise ValueError("damaged pax record")
        if key in (b"path", b"size"):
            found[key.decode()] = value.decode("utf-8", "surrogateescape")
    return found


def _ending(data: Bytes, at: int, header: bytes) -> Iterator[TarFault]:
    """What is wrong where the headers end; nothing when that is the end of a whole shard."""
    # 1 MiB: tar pads with zeros to a record (10 KiB by default); more than that is another archive joined on.
    rest = data[at + _BLOCK : at + _BLOCK + (1 << 20)]
    if at == 0 and any(header):
        shown = header[:15].decode("latin-1").encode("unicode_escape").decode()
        squeezed = " (compressed? a shard must not be)" if header[:2] == b"\x1f\x8b" or header[:4] == b"\x28\xb5\x2f\xfd" else ""
        yield TarFault("", f"the shard cannot be read on from here: no tar, it starts with '{shown}'{squeezed}")
    elif len(header) < _BLOCK and at:
        yield TarFault("", "the shard is cut off after this")
    elif any(header):
        yield TarFault("", "the shard is damaged after this")
    elif any(rest):
        yield TarFault("", "there is more after the shard's end mark, which is not read (joined with cat?)")
    elif at == 0:
        yield TarFault("", EMPTY)
