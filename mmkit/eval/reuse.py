"""Answers of earlier runs: the same model asked the same about the same pictures need not be asked again.

A file for each model (with the versions of what computes) in ``$MMKIT_CACHE/answers``, appended to by all processes. An answer
is kept under a hash of prompt, contents of the pictures and decoding: no path, no order and no batch size is part of it.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
from collections.abc import Mapping
from pathlib import Path

from mmkit.config import DecodingConfig
from mmkit.data.remote import default_cache
from mmkit.files import Writing, hash_text
from mmkit.run import package_versions

logger = logging.getLogger(__name__)
# Of all files together; those that were not used for longest go first. 128 bits and a few words: about 80 bytes an answer.
LIMIT = 1 << 30
# What can change an answer besides the model itself.
_COMPUTES = ("torch", "transformers", "timm")


class AnswerCache:
    """Kept answers of one model."""

    def __init__(self, fingerprint: str, computer: str, *, folder: Path | None = None, limit: int = LIMIT) -> None:
        """Open the answers of a model.

        Args:
            fingerprint: Of the model.
            computer: What the model runs on.
            folder: Where the files lie; None: ``answers`` in the cache folder.
            limit: Bytes of all files together.
        """
        # Here, since the version is the package's own.
        import mmkit

        versions = package_versions()
        name = hash_text(fingerprint, computer, mmkit.__version__, *(f"{n} {versions[n]}" for n in _COMPUTES))
        self._folder, self._limit = folder or default_cache() / "answers", limit
        self._path = self._folder / f"{name}.jsonl"
        self._known: dict[str, str] = {}
        if self._path.exists():
            self._known = dict(_read(self._path))
            # Its time of use.
            with contextlib.suppress(FileNotFoundError):
                os.utime(self._path)

    def __len__(self) -> int:
        return len(self._known)

    @staticmethod
    def key(how: DecodingConfig, prompt: str, contents: list[str]) -> str:
        """Names an answer.

        Args:
            how: Decoding.
            prompt: As it was asked.
            contents: Hash of each picture's bytes, in order.
        """
        return hash_text(json.dumps(how.model_dump(), sort_keys=True), prompt, *contents)

    def get(self, key: str) -> str | None:
        """The answer, if there is one."""
        return self._known.get(key)

    def add(self, answers: Mapping[str, str]) -> None:
        """Keep answers by key. Raises InputError: the disk is full, read-only or broken."""
        new = {key: text for key, text in answers.items() if key not in self._known}
        if not new:
            return
        self._known.update(new)
        self._folder.mkdir(parents=True, exist_ok=True)
        text = "".join(json.dumps([key, value]) + "\n" for key, value in new.items())
        with Writing(self._path), self._path.open("ab", buffering=0) as file:
            # One write at the end of the file: lines of several processes do not mix.
            file.write(text.encode())

    def make_room(self) -> None:
        """Remove the files of other models that were not used for longest, until all fit the limit."""
        files = {path: path.stat() for path in self._folder.glob("*.jsonl")} if self._folder.is_dir() else {}
        total = sum(found.st_size for found in files.values())
        for path, found in sorted(files.items(), key=lambda item: item[1].st_mtime):
            if total <= self._limit:
                return
            if path != self._path:
                # Another run may have been faster.
                path.unlink(missing_ok=True)
                total -= found.st_size
                logger.info("answer cache: %s removed (%d MiB)", path.name, found.st_size >> 20)


def _read(path: Path) -> list[tuple[str, str]]:
    """Lines of a file; one that a kill cut off (and whatever was appended to it) is left out."""
    found = []
    for line in path.read_bytes().splitlines():
        with contextlib.suppress(ValueError):
            row = json.loads(line)
            if isinstance(row, list) and len(row) == 2 and all(isinstance(part, str) for part in row):
                found.append((row[0], row[1]))
    return found
