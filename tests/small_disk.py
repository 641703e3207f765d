"""A real file system of a few MiB that can be filled up and made read-only, where mounting is allowed."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """An empty file system of 4 MiB; the test is skipped where this user may not mount one."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(folder)], capture_output=True, check=False)
    if mounted.returncode:
        pytest.skip(f"cannot mount a small file system: {mounted.stderr.decode().strip()}")
    try:
        yield folder
    finally:
        # Lazily: a file that a failed test left open must not leave the mount behind.
        subprocess.run(["umount", "-l", str(folder)], check=True)


def fill(disk: Path, *, leave: int = 0) -> None:
    """Take all space of a file system but ``leave`` bytes."""
    with (disk / "filler").open("wb") as file:
        space = os.statvfs(disk)
        file.write(bytes(max(0, space.f_bavail * space.f_frsize - leave)))
