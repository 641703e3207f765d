"""Answers of earlier runs: the same model asked the same about the same pictures need not be asked again.

A file for each model (with the code and the versions of what computes) in ``$MMKIT_CACHE/answers``, appended to by all
processes. An answer is kept under a hash of prompt, contents of the pictures and decoding: no path, no order and no batch size is
part of it.
"""

from __future__ import annotations

import contextlib
import functools
import json
import logging
import os
from collections.abc import Collection, Mapping
from pathlib import Path

from mmkit.config import DecodingConfig
from mmkit.data.remote import default_cache
from mmkit.files import hash_file, hash_text
from mmkit.run import Parent, package_versions

logger = logging.getLogger(__name__)
# Of all files together; those that were not used for longest go first. 128 bits, a check and a few words: 100 bytes an answer.
LIMIT = 1 << 30
# What can change an answer besides the model and mmkit itself; Pillow decodes and resizes.
_COMPUTES = ("torch", "transformers", "tokenizers", "timm", "pillow")
# Stands in the line of an answer that ends by its length.
_CUT = "cut"
# A longer file of a model is told by its size and time: hashing weights would take longer than to open them.
_WEIGHTS = 32 << 20


class AnswerCache:
    """Kept answers of one model."""

    def __init__(self, fingerprint: str, computer: str, *, folder: Path | None = None, limit: int = LIMIT) -> None:
        """Open the answers of a model.

        Args:
            fingerprint: Of `model_fingerprint`.
            computer: What the model runs on.
            folder: Where the files lie; None: ``answers`` in the cache folder.
            limit: Bytes of all files together.
        """
        versions = package_versions()
        name = hash_text(fingerprint, computer, _code(), *(f"{n} {versions[n]}" for n in _COMPUTES))
        self._folder, self._limit = folder or default_cache() / "answers", limit
        self._path = self._folder / f"{name}.jsonl"
        self._known: dict[str, str] = {}
        self._cut: set[str] = set()
        self._usable = True
        try:
            for key, answer, cut in _read(self._path):
                self._known[key] = answer
                (self._cut.add if cut else self._cut.discard)(key)
            # Its time of use.
            os.utime(self._path)
        except FileNotFoundError:
            # Nothing is kept yet.
            pass
        except OSError as error:
            self._give_up(error)

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

    def cut(self, key: str) -> bool:
        """Whether the answer reached the longest length before its end."""
        return key in self._cut

    def add(self, answers: Mapping[str, str], *, cut: Collection[str] = ()) -> None:
        """Keep answers by key; where they cannot be written, the log says so once and the evaluation goes on.

        Args:
            answers: By key.
            cut: Keys of those that reached the longest length before their end.
        """
        new = {key: text for key, text in answers.items() if key not in self._known}
        self._known.update(new)
        self._cut.update(key for key in new if key in cut)
        if not new or not self._usable:
            return
        rows = [[key, value, *([_CUT] if key in cut else [])] for key, value in new.items()]
        text = "".join(json.dumps([*row, _check(*row)]) + "\n" for row in rows)
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            with self._path.open("ab", buffering=0) as file:
                # One write at the end of the file: lines of several processes do not mix.
                file.write(text.encode())
        except OSError as error:
            # A full or read-only home directory is no reason to lose the hours of an evaluation, whose own answers lie elsewhere.
            self._give_up(error)

    def _give_up(self, error: OSError) -> None:
        """Write nothing more."""
        self._usable = False
        mend = "set MMKIT_CACHE to a folder that can be written, or generation.reuse=false"
        logger.warning("answers are not kept for later runs: %s: %s; %s", error.filename or self._path, error.strerror, mend)

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


def _read(path: Path) -> list[tuple[str, str, bool]]:
    """Key, answer and whether it was cut; a line that a kill cut off (and whatever was appended to it) is left out."""
    found = []
    for line in path.read_bytes().splitlines():
        with contextlib.suppress(ValueError):
            row = json.loads(line)
            if isinstance(row, list) and len(row) in (3, 4) and all(isinstance(part, str) for part in row):
                *said, check = row
                # A network disk can mix lines of two machines; half of one answer behind another's key would be believed.
                if check == _check(*said):
                    found.append((said[0], said[1], said[2:] == [_CUT]))
    return found


def _check(*parts: str) -> str:
    """What tells a line as it was written from any other."""
    return hash_text(*parts)[:8]


def model_fingerprint(parent: Parent) -> str:
    """Names a model as it is now: the fingerprint of its run is from when it was written, and its folder may have been edited.

    Of short files (settings, templates, tokenizers) the content counts, of weights size and time of change. A copied run may so
    count as another model, which costs time; the other way round it would cost the truth.
    """
    folder = parent.folder
    if folder is None or not (folder.parent / "manifest.json").is_file():
        # Hashed as it is, whenever it is named.
        return parent.fingerprint
    parts = [parent.fingerprint]
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        found = path.stat()
        state = hash_file(path) if found.st_size <= _WEIGHTS else f"{found.st_size} {found.st_mtime_ns}"
        parts.append(f"{path.relative_to(folder).as_posix()} {state}")
    return hash_text(*parts)


@functools.cache
def _code() -> str:
    """Hash of mmkit's own code: between two releases a checkout changes without its version."""
    root = Path(__file__).resolve().parents[1]
    return hash_text(*(f"{p.relative_to(root).as_posix()} {hash_file(p)}" for p in sorted(root.rglob("*.py"))))
