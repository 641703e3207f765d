"""Bytes from disk: ranges of files that stay open, and another try where a network disk hiccups."""

from __future__ import annotations

import collections
import errno
import os
import time
from collections.abc import Callable, Iterator
from stat import S_ISREG
from typing import IO, NamedTuple, TypeVar

from mmkit.data.bounds import MAX_BYTES, MAX_LINE, refuse_long
from mmkit.data.skipped import SampleError

T = TypeVar("T")
# Network file systems answer with these when a server restarts; a missing file or a lack of rights is there to stay.
PASSING = frozenset({errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.EAGAIN, errno.ECONNRESET, errno.EINTR})
# Seconds before each further try: long enough for a restarted server, short beside the hours that a run takes.
BACK_OFF = (0.5, 2.0, 8.0)
# A window of shards and some more; the usual limit of a process is 1,024.
_OPEN_FILES = 128
# How long a file is taken to be the one that it was.
_LOOK_SECONDS = 2.0


class _Open(NamedTuple):
    """An open file: descriptor, what told it from others of its name, and when that was looked at last."""

    descriptor: int
    stamp: tuple[int, int, int]
    seen: float


class _OpenFiles:
    """Descriptors of files that are read again and again, the least used one closed first."""

    def __init__(self) -> None:
        self._open: collections.OrderedDict[str, _Open] = collections.OrderedDict()

    def get(self, path: str) -> int:
        """A descriptor for reading. Raises OSError."""
        found = self._open.get(path)
        now = time.monotonic()
        # Not at every read: on a network disk each look is a message to a server.
        if found is not None and now - found.seen < _LOOK_SECONDS:
            self._open.move_to_end(path)
            return found.descriptor
        stat = os.stat(path)  # noqa: PTH116  Path.stat costs twice as much
        stamp = (stat.st_ino, stat.st_size, stat.st_mtime_ns)
        if found is not None and found.stamp != stamp:
            # Another file under the old name: the old descriptor would go on giving the old bytes.
            os.close(self._open.pop(path).descriptor)
            found = None
        self._open[path] = _Open(os.open(path, os.O_RDONLY) if found is None else found.descriptor, stamp, now)
        self._open.move_to_end(path)
        if len(self._open) > _OPEN_FILES:
            os.close(self._open.popitem(last=False)[1].descriptor)
        return self._open[path].descriptor

    def look_again(self) -> None:
        """Look at every file anew before its next read."""
        for path, found in self._open.items():
            self._open[path] = found._replace(seen=float("-inf"))


_files = _OpenFiles()


class GivenUp:
    """Files and shards that failed at the last try too; for a while nobody waits for them again, sample after sample."""

    SECONDS = 600.0

    def __init__(self) -> None:
        self._until: dict[str, tuple[float, str]] = {}

    def check(self, name: str) -> None:
        """Raises SampleError with the reason of then."""
        until, reason = self._until.get(name, (0.0, ""))
        if time.monotonic() < until:
            raise SampleError(reason)

    def note(self, name: str, reason: str) -> None:
        """It failed now."""
        self._until[name] = (time.monotonic() + self.SECONDS, reason)


_given_up = GivenUp()


def look_again() -> None:
    """Forget that files were looked at a moment ago: called when a data set is opened, whose shards may have been rewritten."""
    _files.look_again()


def read_range(path: str, offset: int, size: int) -> bytes:
    """``size`` bytes from ``offset`` of a file that is likely to be read again; fewer where the file ends before.

    Safe in forked processes: pread has no position that they could share.

    Raises:
        SampleError: The file cannot be read, also not after some more tries.
    """
    return with_retries(lambda: os.pread(_files.get(path), size, offset), path)


def read_file(path: str, offset: int = 0, max_bytes: int = MAX_BYTES) -> bytes:
    """A file from ``offset`` to its end.

    Raises:
        SampleError: It cannot be read, also not after some more tries, or is longer than ``max_bytes``.
    """

    def work() -> bytes:
        # Not blocking: to open a pipe would wait for a writer for ever.
        with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK), "rb") as file:  # noqa: PTH123  as above
            stat = os.fstat(file.fileno())
            # A device has no size, and no end.
            if not S_ISREG(stat.st_mode):
                raise SampleError("is no file, but a pipe or a device")
            refuse_long(stat.st_size - offset, max_bytes)
            file.seek(offset)
            return file.read()

    return with_retries(work, path)


def read_lines(file: IO[bytes], *, longest: int = MAX_LINE) -> Iterator[tuple[int, int, bytes | None]]:
    """Lines of a file: where each begins, its length with the line end, and its bytes; None for one that is too long to be held.

    Lines end at newlines only: str.splitlines would also split inside JSON strings (U+2028 is legal there).

    Args:
        file: Open for reading.
        longest: Bytes of a line without its end.
    """
    at = 0
    while line := file.readline(longest + 1):
        start, size = at, len(line)
        if size > longest and not line.endswith(b"\n"):
            # Read on to where it ends, in pieces that are thrown away.
            while more := file.readline(1 << 20):
                size += len(more)
                if more.endswith(b"\n"):
                    break
            yield start, size, None
        else:
            yield start, size, line
        at = start + size


def with_retries(work: Callable[[], T], path: str) -> T:
    """Call a function that reads a file; when the disk fails in a way that passes, wait and call it again.

    A file that has failed for good is not waited for again for a while.

    Raises:
        SampleError: It failed for good; the message says why.
    """
    _given_up.check(path)
    for seconds in (*BACK_OFF, None):
        try:
            return work()
        except OSError as error:
            reason = error.strerror or type(error).__name__
            if error.errno not in PASSING:
                raise SampleError(f"cannot be read ({reason})") from None
            if seconds is None:
                what = f"cannot be read, also at try {len(BACK_OFF) + 1} ({reason})"
                # Only what was waited for: a file that is missing costs no wait, and may be there the next time.
                _given_up.note(path, what)
                raise SampleError(what) from None
            time.sleep(seconds)
        except SampleError:  # is a ValueError too
            raise
        except ValueError as error:  # a name with a NUL or a lone surrogate
            raise SampleError(f"cannot be read ({error})") from None
    raise AssertionError("the last try returns or raises")
