"""Index files beside shards: arrays that are mapped, not read, so that opening one costs the same for any number of samples.

A sidecar holds, for each sample of a shard, where its parts lie. It is plain data: a JSON line and raw arrays, nothing that could
run. It is valid for a shard of one size that was not written after it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import mmap
import os
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mmkit.files import hash_text, new_file

SUFFIX = ".mmkit"
# Smaller files are walked through in milliseconds, while making a file beside each of a thousand takes a second; and folders of
# examples stay as they are.
SMALLEST = 8 << 20
_VERSION = 1
# Up to here an index carries a checksum that is looked at whenever it is opened; a larger one is flushed to the disk instead, so
# that neither a thousand flushes nor a pass over gigabytes stands before a run.
_CHECKED = 4 << 20
_MAGIC = b"mmkit-index\n"


@dataclasses.dataclass(frozen=True)
class Index:
    """Where the samples of a shard lie.

    Attributes:
        arrays: Name to array; all but ``keys`` and ``key_ends`` are the format's own.
        left_out: Key and reason of what cannot be used.
    """

    arrays: Mapping[str, NDArray[Any]]
    left_out: list[tuple[str, str]]

    def __len__(self) -> int:
        """Samples."""
        return len(self.arrays["key_ends"])

    def key(self, row: int) -> str:
        """Key of a sample."""
        ends = self.arrays["key_ends"]
        return self.arrays["keys"][int(ends[row - 1]) if row else 0 : int(ends[row])].tobytes().decode("utf-8", "surrogateescape")


def make_index(keys: list[str], left_out: list[tuple[str, str]], **columns: list[int]) -> Index:
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


def write_sidecar(path: Path, index: Index, shard_size: int) -> None:
    """Write a sidecar beside, and rename.

    Raises:
        OSError: The folder cannot be written.
    """
    # Only plain numbers in the head, so that whoever finds the file can read it with any language.
    places, offset = {}, 0
    for name, array in index.arrays.items():
        places[name] = [array.dtype.str, offset, len(array)]
        offset += -(-array.nbytes // 8) * 8  # eight bytes each, or the mapped arrays would not be aligned
    body = b"".join(array.tobytes().ljust(-(-array.nbytes // 8) * 8, b"\0") for array in index.arrays.values())
    head = {
        "version": _VERSION,
        "shard_size": shard_size,
        "left_out": index.left_out,
        "arrays": places,
        "crc32": zlib.crc32(body),
    }
    line = json.dumps(head, ensure_ascii=True).encode() + b"\n"
    start = -(-(len(_MAGIC) + len(line)) // 8) * 8
    with new_file(path, flush=len(body) > _CHECKED) as file:
        file.write(_MAGIC + line.rjust(start - len(_MAGIC)))
        file.write(body)


def read_sidecar(path: Path, shard_size: int, written_ns: int | None, *, check: bool = True) -> Index | None:
    """The index in a sidecar; None when there is none that fits the shard.

    Args:
        path: Of the sidecar.
        shard_size: Bytes of the shard now.
        written_ns: When the shard was last written; None where that is not known (remote).
        check: Look at the checksum of the arrays; not needed for their number.
    """
    try:
        with path.open("rb") as file:
            # Rewritten in place by other software, with as many bytes: only the time tells.
            if written_ns is not None and os.fstat(file.fileno()).st_mtime_ns < written_ns:
                return None
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except (OSError, ValueError):  # ValueError: an empty file cannot be mapped
        return None
    end = mapped.find(b"\n", len(_MAGIC)) + 1
    if mapped[: len(_MAGIC)] != _MAGIC or not end:
        return None
    with contextlib.suppress(ValueError, KeyError, TypeError):
        head = json.loads(mapped[len(_MAGIC) : end])
        # After a crash of the machine a file may be there whose blocks are not.
        sound = not check or len(mapped) - end > _CHECKED or zlib.crc32(memoryview(mapped)[end:]) == head["crc32"]
        if sound and (head["version"], head["shard_size"]) == (_VERSION, shard_size):
            arrays = {
                name: np.frombuffer(mapped, dtype, count, end + offset) if count else np.zeros(0, dtype)
                for name, (dtype, offset, count) in head["arrays"].items()
            }
            return Index(arrays, [(key, reason) for key, reason in head["left_out"]])
    # Of another version, or damaged: it is made anew.
    return None
