"""Shards on s3://, gs://, hf://, http://: fetched whole through fsspec into a bounded folder, and read from there.

Whole files, because every sample of a shuffle window is read soon after the first: one request a shard instead of one a sample.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import itertools
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from mmkit.data.bounds import MAX_BYTES
from mmkit.data.images import ImageRef
from mmkit.data.reading import BACK_OFF, GivenUp
from mmkit.data.skipped import SampleError
from mmkit.errors import InputError
from mmkit.files import hash_text

_BLOCK = 1 << 22
# How often a fetched shard may be gone again before its bytes were read.
_EVICTED = 5
T = TypeVar("T")
# What the servers that fsspec knows call a file's version.
_TELLING = frozenset(
    ["size", "ETag", "etag", "Last-Modified", "LastModified", "Content-MD5", "mtime", "updated", "created", "md5Hash", "oid"]
)
_MEND = "check the address, the network and your credentials"
_given_up = GivenUp()


def is_remote(location: str) -> bool:
    """Whether a location is an address and not a path (``hf:NAME`` is a data set's name, ``hf://`` an address)."""
    return "://" in location


def default_cache() -> Path:
    """Where fetched shards and their indexes lie: ``$MMKIT_CACHE``, or ``mmkit`` in the user's cache folder."""
    home = os.environ.get("XDG_CACHE_HOME") or Path("~/.cache").expanduser()
    return Path(os.environ.get("MMKIT_CACHE") or Path(home) / "mmkit")


@dataclasses.dataclass(frozen=True)
class ShardCache:
    """A folder of fetched shards, bounded; shared by processes of one machine.

    Attributes:
        folder: Where they lie.
        limit: Bytes that may lie there; the shards that were not used for longest go first.
    """

    folder: Path
    limit: int

    def local(self, url: str, version: int | None = None) -> Path:
        """The fetched copy of a version of a shard (`remote_stamp`), fetched now if it is not there.

        Raises:
            SampleError: It cannot be fetched, also not after some more tries.
        """
        # The version in the name: a copy of what lay there before is never taken for what lies there now.
        path = self.folder / "shards" / f"{hash_text(url, str(version))}{Path(url).suffix}"
        if not path.exists():
            self._fetch_once(url, path, version)
        # Its time of use, which says what goes first. It may go between the two lines: then it is fetched again.
        with contextlib.suppress(FileNotFoundError):
            os.utime(path)
            return path
        self._fetch_once(url, path, version)
        return path

    def reading(self, url: str, work: Callable[[str], T], version: int | None = None) -> T:
        """Call ``work`` with the path of the fetched copy; again, should another process have made room meanwhile.

        Raises:
            SampleError: It cannot be fetched, or ``work`` raises it.
        """
        for attempt in itertools.count(1):
            path = self.local(url, version)
            try:
                return work(str(path))
            except SampleError:
                # A cache that is far too small for its readers: then the shard comes and goes.
                if path.exists() or attempt == _EVICTED:
                    raise
        raise AssertionError("the last attempt returns or raises")

    def _fetch_once(self, url: str, path: Path, version: int | None) -> None:
        """Fetch under a lock, so that workers who want the same shard fetch it once."""
        _given_up.check(url)
        path.parent.mkdir(parents=True, exist_ok=True)
        # Hidden, so that `make_room` does not take it for a shard.
        with _locked(path.with_name(f".{path.name}.lock")):
            if path.exists():
                return
            try:
                _with_back_off(lambda: self._fetch(url, path, version))
            except SampleError as error:
                _given_up.note(url, str(error))
                raise

    def _fetch(self, url: str, path: Path, version: int | None) -> None:
        # Asked before it is fetched: positions and index are those of the version that the run began with.
        if version is not None and remote_stamp(url)[1] != version:
            raise SampleError("the shard has changed since this run looked at it")
        with _open(url) as remote:
            size = getattr(remote, "size", None) or 0
            self.make_room(size, keep=path)
            # Beside its place, then renamed: `local` looks without the lock, and must see all of it or nothing.
            descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
            try:
                with os.fdopen(descriptor, "wb") as file:
                    shutil.copyfileobj(remote, file, _BLOCK)
                # A connection that breaks may look like the end of the file.
                if size and Path(name).stat().st_size != size:
                    raise OSError(f"{Path(name).stat().st_size} of {size} bytes came")
                Path(name).replace(path)
            finally:
                Path(name).unlink(missing_ok=True)
        # Again: a server need not say beforehand how long a file is.
        self.make_room(0, keep=path)

    def make_room(self, size: int, *, keep: Path) -> None:
        """Remove what was not used for longest until ``size`` more bytes fit; ``keep`` stays whatever its size."""
        # A removed file that another process has open can be read on: on Unix its bytes go when the last one closes it.
        found = []
        for path in (self.folder / "shards").iterdir():
            # Another process may make room at the same time.
            with contextlib.suppress(FileNotFoundError):
                if not path.name.startswith("."):
                    found.append((path.stat().st_mtime_ns, path.stat().st_size, path))
        total = sum(bytes_ for _, bytes_, _ in found) + size
        for _, bytes_, path in sorted(found):
            if total <= self.limit:
                return
            if path != keep:
                path.unlink(missing_ok=True)
                total -= bytes_


@dataclasses.dataclass(frozen=True)
class RemoteRef:
    """A picture in a remote shard: a range of its fetched copy."""

    cache: ShardCache
    path: str
    offset: int
    size: int
    version: int | None = None

    def read(self, max_bytes: int = MAX_BYTES) -> bytes:
        """The bytes. Raises SampleError when the shard cannot be fetched, or they are more than ``max_bytes``."""
        return self.cache.reading(self.path, lambda path: ImageRef(path, self.offset, self.size).read(max_bytes), self.version)


def remote_glob(pattern: str) -> list[str]:
    """Addresses that match a pattern, in name order.

    Raises:
        InputError: The place cannot be listed.
    """
    fs, path = _filesystem(pattern)
    protocol = pattern.partition("://")[0]
    try:
        # fsspec lists some kinds of addresses with their protocol and some without.
        return [f"{protocol}://{str(name).removeprefix(f'{protocol}://')}" for name in sorted(fs.glob(path))]
    except (OSError, NotImplementedError, ValueError) as error:
        raise InputError(f"cannot be listed ({_one_line(error)})", where=pattern, mend="write the shards as {000..123}") from None


def remote_stamp(url: str) -> tuple[int, int]:
    """Bytes of a file, and a hash of what its server says of this version of it (time, tag, checksum).

    Raises:
        InputError: There is no such file, or it cannot be reached.
    """
    fs, path = _filesystem(url)
    try:
        # Not from fsspec's own memory of listings, which a run of days would believe to the end.
        fs.invalidate_cache()
        info = _with_back_off(lambda: fs.info(path))
        if info.get("type") == "directory":
            raise SampleError("is a folder")
        said = [f"{key}={info[key]}" for key in sorted(_TELLING & info.keys())]
        # 60 bits: it stands where a file on a disk has its time of writing, a number of 64 bits with a sign.
        return int(info.get("size") or 0), int(hash_text(*said)[:15], 16)
    except SampleError as error:
        mend = "name the shards in it: {000..123} or *.tar" if str(error) == "is a folder" else _MEND
        raise InputError(str(error), where=url, mend=mend) from None


def remote_bytes(url: str) -> bytes | None:
    """The content of a small file; None when it is not there."""
    try:
        # Without another try: most shards have no index beside them, and one that has none is walked through.
        with _open(url) as file:
            data: bytes = file.read()
            return data
    except (OSError, SampleError):
        return None


def _filesystem(url: str) -> tuple[Any, str]:
    """Fsspec's file system of an address, and the path in it."""
    import fsspec

    try:
        return fsspec.core.url_to_fs(url)
    except (ImportError, ValueError) as error:
        # fsspec's own message names the package to install (s3fs, gcsfs).
        raise InputError(_one_line(error), where=url, mend="install what it names, or fetch the shards to a disk") from None


def _open(url: str) -> Any:
    fs, path = _filesystem(url)
    # A stream: nothing is read twice, so fsspec's block cache would only hold memory.
    return fs.open(path, "rb", cache_type="none") if url.startswith(("s3:", "gs:", "hf:")) else fs.open(path, "rb")


def _with_back_off(work: Any) -> Any:
    """Call a function until it does not fail, four times at most; remote failures are mostly such as pass."""
    for seconds in (*BACK_OFF, None):
        try:
            return work()
        except SampleError:  # is a ValueError too
            raise
        except FileNotFoundError:
            raise SampleError("there is no such file") from None
        except PermissionError as error:
            raise SampleError(f"may not be read ({_one_line(error)})") from None
        # aiohttp's and botocore's errors are no OSError; what a network can raise has no common class.
        except (OSError, EOFError, ValueError, RuntimeError, _client_error()) as error:
            if seconds is None:
                raise SampleError(f"cannot be fetched, also at try {len(BACK_OFF) + 1} ({_one_line(error)})") from None
            time.sleep(seconds)
    raise AssertionError("the last try returns or raises")


def _client_error() -> type[Exception]:
    """What fsspec's http client raises where it is installed."""
    try:
        from aiohttp import ClientError
    except ImportError:
        # Caught by its caller anyway: without aiohttp there are no such errors.
        return OSError
    return ClientError


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold a lock file; the system lets go of it when a process dies."""
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
