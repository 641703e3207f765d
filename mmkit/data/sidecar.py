"""Index files beside shards: arrays that are mapped, not read, so that opening one costs the same for any number of samples.

A sidecar holds, for each sample of a shard, where its parts lie. It is plain data: a JSON line and raw arrays, nothing that could
run. It is valid for one version of a shard, and for one way to read it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import mmap
import os
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from mmkit.files import hash_text, new_file

SUFFIX = ".mmkit"
# Smaller files are walked through in milliseconds, while making a file beside each of a thousand takes a second; and folders of
# examples stay as they are.
SMALLEST = 8 << 20
_VERSION = 2
# Up to here an index carries a checksum that is looked at whenever it is opened; a larger one is flushed to the disk instead, so
# that neither a thousand flushes nor a pass over gigabytes stands before a run.
_CHECKED = 4 << 20
_MAGIC = b"mmkit-index\n"
# Bytes at both ends of a shard that are compared where only its time of writing is another, as after copying a set.
_PROBED = 1 << 16
# What reading the head of a damaged index, or of one that other people made, can raise.
_UNFIT = (ValueError, KeyError, TypeError, AttributeError, RecursionError, OverflowError, MemoryError)


class Origin(NamedTuple):
    """What an index is made from.

    Attributes:
        size: Bytes of the shard.
        version: What changes when the shard is written: its time of writing, or a hash of what a server says of it. None, only
            when asking for an index that lies beside a remote shard: its maker knew another one.
        maker: What walked through it, and how: other keys of rows are another index.
    """

    size: int
    version: int | None
    maker: str


class Omitted(NamedTuple):
    """What an index leaves out: key, reason, and how many samples that is; None: the rest of a shard, who knows how many."""

    key: str
    reason: str
    samples: int | None = 1


@dataclasses.dataclass(frozen=True)
class Index:
    """Where the samples of a shard lie.

    Attributes:
        arrays: Name to array; all but ``keys`` and ``key_ends`` are the format's own.
        left_out: What cannot be used.
    """

    arrays: Mapping[str, NDArray[Any]]
    left_out: list[Omitted]

    def __len__(self) -> int:
        """Samples."""
        return len(self.arrays["key_ends"])

    def key(self, row: int) -> str:
        """Key of a sample."""
        ends = self.arrays["key_ends"]
        # As the tar has it: a member's name need not be UTF-8.
        return self.arrays["keys"][int(ends[row - 1]) if row else 0 : int(ends[row])].tobytes().decode("utf-8", "surrogateescape")


def make_index(keys: list[str], left_out: list[Omitted], **columns: list[int]) -> Index:
    """An index from lists; columns become u64 arrays."""
    encoded = [key.encode("utf-8", "surrogateescape") for key in keys]
    arrays = {name: np.asarray(values, dtype=np.uint64) for name, values in columns.items()}
    arrays["key_ends"] = np.cumsum([len(key) for key in encoded], dtype=np.uint64)
    return Index({**arrays, "keys": np.frombuffer(b"".join(encoded), dtype=np.uint8)}, left_out)


def sidecar_path(shard: str, cache: Path) -> tuple[Path, Path]:
    """Where the sidecar of a shard lies: beside it, or in the cache where nothing can be written beside it."""
    # By the whole path: two data sets may have a shard of the same name.
    name = hash_text(shard if "://" in shard else str(Path(shard).absolute()))
    return Path(shard + SUFFIX), cache / "index" / f"{name}{SUFFIX}"


def write_sidecar(path: Path, index: Index, origin: Origin, shard: Path | None) -> None:
    """Write a sidecar beside, and rename.

    Args:
        path: Of the sidecar.
        index: What to write.
        origin: What it was made from.
        shard: The file itself, or its fetched copy; None: not at hand.

    Raises:
        OSError: The folder cannot be written, or the shard not read.
    """
    # Only plain numbers in the head, so that whoever finds the file can read it with any language.
    places, offset = {}, 0
    for name, array in index.arrays.items():
        places[name] = [array.dtype.str, offset, len(array)]
        offset += -(-array.nbytes // 8) * 8  # eight bytes each, or the mapped arrays would not be aligned
    body = b"".join(array.tobytes().ljust(-(-array.nbytes // 8) * 8, b"\0") for array in index.arrays.values())
    head = {
        "format": _VERSION,
        **origin._asdict(),
        "probe": None if shard is None else _probe(shard),
        "left_out": index.left_out,
        "arrays": places,
        "crc32": zlib.crc32(body),
    }
    line = json.dumps(head, ensure_ascii=True).encode() + b"\n"
    start = -(-(len(_MAGIC) + len(line)) // 8) * 8
    with new_file(path, flush=len(body) > _CHECKED) as file:
        # Spaces in front, which JSON allows, bring the arrays to a multiple of eight.
        file.write(_MAGIC + line.rjust(start - len(_MAGIC)))
        file.write(body)


def _probe(shard: Path) -> str:
    """Hash of both ends of a shard. Raises OSError."""
    with shard.open("rb") as file:
        start = file.read(_PROBED)
        file.seek(max(0, os.fstat(file.fileno()).st_size - _PROBED))
        return hashlib.blake2b(start + file.read(_PROBED), digest_size=16).hexdigest()


def read_sidecar(path: Path, origin: Origin, shard: Path | None, *, check: bool = True) -> Index | None:
    """The index in a sidecar; None when there is none that fits the shard.

    Args:
        path: Of the sidecar.
        origin: What the index has to be made from.
        shard: Its file, to be looked into where only the version is another; None where it is not at hand.
        check: Look at the checksum of the arrays; not needed for their number.
    """
    try:
        with path.open("rb") as file:
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except (OSError, ValueError):  # ValueError: an empty file cannot be mapped
        return None
    end = mapped.find(b"\n", len(_MAGIC)) + 1
    if mapped[: len(_MAGIC)] != _MAGIC or not end:
        return None
    with contextlib.suppress(*_UNFIT, OSError):
        head = json.loads(mapped[len(_MAGIC) : end])
        # After a crash of the machine a file may be there whose blocks are not.
        sound = not check or len(mapped) - end > _CHECKED or zlib.crc32(memoryview(mapped)[end:]) == head["crc32"]
        if sound and head["format"] == _VERSION and _fits(head, origin, shard):
            arrays = {
                name: np.frombuffer(mapped, dtype, count, end + offset) if count else np.zeros(0, dtype)
                for name, (dtype, offset, count) in head["arrays"].items()
            }
            if not check or _within(arrays, origin.size):
                return Index(arrays, [Omitted(str(key), str(reason), samples) for key, reason, samples in head["left_out"]])
    # Of another version, or damaged: it is made anew.
    return None


def _fits(head: dict[str, Any], origin: Origin, shard: Path | None) -> bool:
    """Whether an index was made from this shard. Raises OSError: the shard cannot be read."""
    if (head["size"], head["maker"]) != (origin.size, origin.maker):
        return False
    # A copied or fetched set has other times. Equal sizes are no proof: a shard may be replaced by an older one.
    return origin.version in (None, head["version"]) or (shard is not None and head["probe"] == _probe(shard))


def _within(arrays: Mapping[str, NDArray[Any]], size: int) -> bool:
    """Whether all places lie inside the shard and all keys inside their array; no read can then go wrong for the index' sake."""
    ends = arrays["key_ends"]
    if len(ends) and (int(ends[-1]) != len(arrays["keys"]) or bool((np.diff(ends.astype(np.int64)) < 0).any())):
        return False
    for name in [name for name in arrays if name.endswith("offset")]:
        begins, lengths = arrays[name], arrays[name.removesuffix("offset") + "size"]
        # Each below the size first: sums of larger ones would wrap around.
        outside = (begins > size) | (lengths > size - np.minimum(begins, np.uint64(size)))
        if len(begins) != len(ends) or bool(outside.any()):
            return False
    return True
