"""What all tests share: the place of the shared fixtures, and a world without a hub."""

from __future__ import annotations

import atexit
import os
import shutil
import tempfile
from pathlib import Path

import pytest
from small_disk import small_disk

__all__ = ["shared", "small_disk"]
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Indexes and fetched shards of the tests are nobody's to keep.
os.environ["MMKIT_CACHE"] = tempfile.mkdtemp(prefix="mmkit-cache-")
atexit.register(shutil.rmtree, os.environ["MMKIT_CACHE"], ignore_errors=True)


@pytest.fixture(scope="session")
def shared() -> Path:
    """The `data` folder of the shared fixtures; tests that need it are skipped where it is absent."""
    default = Path(__file__).resolve().parents[1].parent / "shared"
    folder = Path(os.environ.get("MMKIT_SHARED", default)) / "data"
    if not folder.is_dir():
        pytest.skip(f"shared fixtures not found at {folder}; set MMKIT_SHARED to the folder that holds data/")
    return folder
