"""What was left out, and why: nothing is skipped in silence."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO

from mmkit.files import new_file

# Reasons name lines, bytes and files; without them equal faults are counted together.
_PARTICULARS = re.compile(r"'[^']*'|\"[^\"]*\"|\d+")


@dataclasses.dataclass(frozen=True)
class LeftOut:
    """A sample that is not used.

    Attributes:
        source: File or shard it comes from.
        key: Its key in there (line, member, id).
        reason: Why, in words a user can act on.
        samples: How many samples it stands for: a shard that is cut off hides as many as its size suggests.
    """

    source: str
    key: str
    reason: str
    samples: int = 1

    def row(self) -> dict[str, str | int]:
        """As a row of ``skipped.jsonl``; the number only where it is not one."""
        return {k: v for k, v in dataclasses.asdict(self).items() if (k, v) != ("samples", 1)}


def count_samples(rows: Iterable[LeftOut]) -> int:
    """Samples that rows stand for."""
    return sum(row.samples for row in rows)


# Apart from InputError, which ends the command: one bad picture in a million must not.
class SampleError(ValueError):
    """One sample cannot be used; the loader replaces it and counts it."""


class SkippedRows:
    """Left-out samples counted by reason, the first few kept, all of them written to a file where there is one.

    Attributes:
        reasons: Reason without its particulars to number of samples.
        first: The first of them.
    """

    def __init__(self, file: IO[bytes] | None = None, *, keep: int = 50) -> None:
        self.reasons: Counter[str] = Counter()
        self.first: list[LeftOut] = []
        self._file, self._keep = file, keep

    @property
    def total(self) -> int:
        """Samples left out."""
        return sum(self.reasons.values())

    def add(self, rows: Iterable[LeftOut]) -> None:
        """Take in some samples. Raises OSError: the file cannot be written."""
        for row in rows:
            self.reasons[_PARTICULARS.sub("...", row.reason)] += row.samples
            # Not all of them: of a hundred million pairs a tenth may be bad.
            if len(self.first) < self._keep:
                self.first.append(row)
            if self._file is not None:
                # In ASCII: a key may hold lone surrogates, which have no UTF-8 form.
                self._file.write(json.dumps(row.row()).encode() + b"\n")


@contextlib.contextmanager
def skipped_file(path: Path | None, *, keep: int = 50) -> Iterator[SkippedRows]:
    """Rows as ``skipped.jsonl`` of a run has them; the file appears when the block ends well. Without a path they are counted.

    Raises:
        OSError: It cannot be written.
    """
    if path is None:
        yield SkippedRows(keep=keep)
        return
    with new_file(path) as file:
        yield SkippedRows(file, keep=keep)
