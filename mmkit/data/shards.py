"""Writes webdataset shards: the one place that says what ours look like."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Iterable
from pathlib import Path
from typing import IO


def write_shard(target: Path | IO[bytes], members: Iterable[tuple[str, bytes]]) -> None:
    """Write a tar; equal members are equal bytes, whoever writes them and when.

    Args:
        target: A path, whose folder is made, or a file opened for writing.
        members: Name and content of each, those of a sample one after the other.

    Raises:
        OSError: It cannot be written.
    """
    if isinstance(target, Path):
        target.parent.mkdir(parents=True, exist_ok=True)
        with target.open("wb") as file:
            write_shard(file, members)
        return
    # USTAR rather than Python's default pax: no extra headers, and every tar reader knows it.
    with tarfile.open(fileobj=target, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for name, content in members:
            member = tarfile.TarInfo(name)
            member.size = len(content)  # time, owner and mode keep their fixed defaults
            tar.addfile(member, io.BytesIO(content))
