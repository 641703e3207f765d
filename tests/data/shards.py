"""Small shards and pictures for the tests of readers."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

from PIL import Image


def jpeg(value: int, side: int = 16) -> bytes:
    """A plain picture of one grey value."""
    buffer = io.BytesIO()
    Image.new("RGB", (side, side), (value % 256,) * 3).save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


def write_tar(path: Path, members: list[tuple[str, bytes]]) -> Path:
    """A tar of these members."""
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for name, data in members:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return path


def write_shard(path: Path, first: int, count: int, *, pad: int = 0) -> Path:
    """A shard of ``count`` pairs numbered from ``first``; ``pad`` bytes beside each make it as large as is wanted."""
    members = []
    for i in range(first, first + count):
        members += [(f"{i:06d}.jpg", jpeg(i)), (f"{i:06d}.txt", f"caption {i}".encode())]
        if pad:
            members.append((f"{i:06d}.pad", bytes(pad)))
    return write_tar(path, members)
