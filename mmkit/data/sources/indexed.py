"""Sets of shards with an index each: made on first use with all cores, kept in sidecars, opened when a sample is asked for.

A catalogue in the cache remembers how many samples each shard of a set has, so that a set of 100,000 shards starts without
opening one of them. Both are only ever a memory: whatever is missing, out of date or damaged is made anew.
"""

from __future__ import annotations

import collections
import json
import logging
import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from mmkit.data.reading import look_again
from mmkit.data.remote import ShardCache, is_remote, remote_bytes, remote_stamp
from mmkit.data.scan.crew import map_in_order
from mmkit.data.sidecar import SMALLEST, SUFFIX, Index, Omitted, Origin, read_sidecar, sidecar_path, write_sidecar
from mmkit.data.skipped import LeftOut, SampleError
from mmkit.errors import InputError
from mmkit.files import hash_text, new_file

logger = logging.getLogger(__name__)

_VERSION = 2
# Key of a shard that cannot be read at all.
_WHOLE = "(shard)"
# Bytes of indexes that stay open; a shard of 10,000 samples has half a megabyte.
_OPEN_BYTES = 128 << 20
# What a mapped index counts for: it costs a descriptor, not memory.
_MAPPED_BYTES = 2 << 20
# Shards below which starting processes takes longer than the work.
_POOL_BYTES = 256 << 20
# Addresses asked at one time: a server's answer takes a tenth of a second, whatever its size.
_REQUESTS = 32


# A tuple: a set may have a hundred thousand of them, and a frozen dataclass takes four times as long to make.
class ShardFile(NamedTuple):
    """A shard as it was found.

    Attributes:
        name: Path or address.
        size: Bytes.
        version: Time of writing in nanoseconds, or a hash of what a server says of a remote file.
        samples: How many of them can be used.
    """

    name: str
    size: int
    version: int
    samples: int


class Indexed:
    """Indexes of the shards of one kind."""

    def __init__(self, build: Callable[[Path], Index], cache: ShardCache) -> None:
        """Take ``build``, which walks through a shard's file; a function of a module, so that other processes can have it."""
        self.build, self.cache = build, cache
        self._open: collections.OrderedDict[str, tuple[Index, int]] = collections.OrderedDict()
        self._bytes = 0

    def __getstate__(self) -> dict[str, object]:
        # Mapped arrays do not pickle, and another process opens its own.
        return {"build": self.build, "cache": self.cache}

    def __setstate__(self, state: dict[str, object]) -> None:
        self.__init__(**state)  # type: ignore[misc]

    def scan(self, names: Sequence[str]) -> tuple[list[ShardFile], list[LeftOut]]:
        """Size and samples of each shard, and what cannot be used in them.

        Raises:
            InputError: A remote shard is not there.
        """
        look_again()
        stamps = _stamps(names)
        path = self.cache.folder / "catalogues" / f"{hash_text(_name_of(self.build), *map(_absolute, names))}.json"
        known = _read_catalogue(path, names, stamps)
        if known is not None:
            return known
        found = self._indexes([_Job(self.build, self.cache, *job) for job in zip(names, *stamps, strict=True)])
        columns = {"sizes": stamps[0], "versions": stamps[1], "samples": [count for count, _ in found]}
        left_out = _estimated(names, found)
        # A shard that could not be read today may be there tomorrow.
        if len(names) > 1 and all(row.key != _WHOLE for row in left_out):
            _write_catalogue(path, names, columns, left_out)
        return _files(names, columns), left_out

    def index(self, file: ShardFile) -> Index:
        """The index of a shard.

        Raises:
            SampleError: The shard cannot be read, or is another one than was scanned.
        """
        held = self._open.get(file.name)
        if held is not None:
            self._open.move_to_end(file.name)
            return held[0]
        found = _load(_Job(self.build, self.cache, file.name, file.size, file.version))
        # The order counts on so many: with another number all later positions would be other samples.
        if len(found) != file.samples:
            raise SampleError("the shard has changed since it was indexed")
        large = sum(array.nbytes for array in found.arrays.values()) > _MAPPED_BYTES
        cost = _MAPPED_BYTES if large else sum(array.nbytes for array in found.arrays.values())
        if not large:
            # Out of the map, which would keep a descriptor for each of thousands of small shards.
            found = Index({name: array.copy() for name, array in found.arrays.items()}, [])
        self._open[file.name] = (found, cost)
        self._bytes += cost
        # The newest stays, however large: it is what was asked for.
        while self._bytes > _OPEN_BYTES and len(self._open) > 1:
            self._bytes -= self._open.popitem(last=False)[1][1]
        return found

    def _indexes(self, jobs: Sequence[_Job]) -> list[_Counted]:
        """Samples and left-out rows of each shard; with all cores where there is much to walk through."""
        began = time.monotonic()
        found = [_known(job) for job in jobs]
        missing = [job for job, counted in zip(jobs, found, strict=True) if counted is None]
        if len(missing) > 1 and sum(job.size for job in missing) > _POOL_BYTES:
            logger.info("indexing %d shards, once: each gets a small %s file beside it", len(missing), SUFFIX)
            # All at once, or the second line of the log would come before the work.
            made = iter(list(map_in_order(_count_one, None, missing)))
            logger.info("indexed in %.0f s", time.monotonic() - began)
        else:
            made = iter([_count(job) for job in missing])
        return [counted if counted is not None else next(made) for counted in found]


class _Job(NamedTuple):
    """A shard to be indexed."""

    build: Callable[[Path], Index]
    cache: ShardCache
    name: str
    size: int
    version: int

    @property
    def origin(self) -> Origin:
        """What its index is made from."""
        return Origin(self.size, self.version, _name_of(self.build))

    @property
    def local(self) -> Path | None:
        """The shard's file, where it is on a disk."""
        return None if is_remote(self.name) else Path(self.name)

    def places(self) -> tuple[Path, ...]:
        """Where its sidecar may lie; beside a remote one nothing can be written."""
        beside, cached = sidecar_path(self.name, self.cache.folder)
        return (cached,) if is_remote(self.name) else (beside, cached)


# Samples of a shard, and what it leaves out.
_Counted = tuple[int, list[Omitted]]


def _estimated(names: Sequence[str], found: Sequence[_Counted]) -> list[LeftOut]:
    """What all shards leave out. One that breaks off stands for as many samples as it has fewer than a sound one has.

    Counted as a single sample, half of a data set could be lost under a limit of one in a hundred.
    """
    sound = [count for count, rows in found if all(row.samples is not None for row in rows)]
    usual = sum(sound) / len(sound) if sound else 0.0
    return [
        LeftOut(name, row.key, row.reason, row.samples if row.samples is not None else max(1, round(usual - count)))
        for name, (count, rows) in zip(names, found, strict=True)
        for row in rows
    ]


def _known(job: _Job) -> _Counted | None:
    """What a sidecar says; None without one. Its checksum is looked at when a sample is read."""
    # None is written beside so small a shard.
    if job.size < SMALLEST and not is_remote(job.name):
        return None
    for path in job.places():
        if (index := read_sidecar(path, job.origin, job.local, check=False)) is not None:
            return len(index), index.left_out
    return None


def _count_one(_: None, job: _Job) -> _Counted:
    return _count(job)


def _count(job: _Job) -> _Counted:
    """What walking through a shard says; one that cannot be read has no samples."""
    try:
        index = _load(job)
    except SampleError as error:
        # None: `_estimated` says how many samples it hides.
        return 0, [Omitted(_WHOLE, str(error), None)]
    return len(index), index.left_out


def _load(job: _Job) -> Index:
    """The index from a sidecar, or made anew and written there.

    Raises:
        SampleError: The shard cannot be read.
    """
    remote = is_remote(job.name)
    for path in job.places() if job.size >= SMALLEST or remote else ():
        if (index := read_sidecar(path, job.origin, job.local)) is not None:
            return index
    # An index is less than a thousandth of its shard, which then is not fetched before a sample of it is read.
    if remote and (fetched := _fetched_index(job)) is not None:
        return fetched
    try:
        shard = job.cache.local(job.name, job.version) if remote else Path(job.name)
        index = job.build(shard)
    except OSError as error:
        raise SampleError(f"cannot be read ({error.strerror})") from None
    if job.size >= SMALLEST or remote:
        _keep(index, job, shard)
    return index


def _fetched_index(job: _Job) -> Index | None:
    """The index that lies beside a remote shard, if there is one that fits; kept in the cache."""
    if (data := remote_bytes(job.name + SUFFIX)) is None:
        return None
    cached = job.places()[0]
    # A file of its own, so that no process has it mapped while another fetches it too.
    fetched = cached.with_suffix(f".{os.getpid()}")
    try:
        with new_file(fetched, flush=False) as file:
            file.write(data)
        # Its maker knew the shard by another version, so the size has to do.
        index = read_sidecar(fetched, job.origin._replace(version=None), None)
        if index is not None:
            # Under the version that the server tells, by which the next start asks.
            write_sidecar(cached, index, job.origin, None)
        return index
    except OSError as error:
        logger.debug("no index at %s: %s", cached, error)
        return None
    finally:
        fetched.unlink(missing_ok=True)


def _keep(index: Index, job: _Job, shard: Path) -> None:
    """Write a sidecar where that can be done; without one the next start walks through the shard again."""
    # Beside the shard first: there it travels with the shard, and serves everyone who reads it.
    for path in job.places():
        try:
            write_sidecar(path, index, job.origin, shard)
        except OSError as error:
            logger.debug("no sidecar at %s: %s", path, error)
            continue
        return
    places = " nor at ".join(map(str, job.places()))
    logger.warning("the index of a shard cannot be kept at %s; it is made again at each start", places)


def keep_index(build: Callable[[Path], Index], shard: Path) -> None:
    """Write the sidecar of a shard that has just been made.

    Raises:
        OSError: Its folder cannot be written.
    """
    stat = shard.stat()
    write_sidecar(Path(f"{shard}{SUFFIX}"), build(shard), Origin(stat.st_size, stat.st_mtime_ns, _name_of(build)), shard)


def _stamps(names: Sequence[str]) -> tuple[list[int], list[int]]:
    """Bytes and version of each shard.

    Raises:
        InputError: One cannot be looked at.
    """
    remote = [name for name in names if is_remote(name)]
    with ThreadPoolExecutor(_REQUESTS) as pool:
        said = dict(zip(remote, pool.map(remote_stamp, remote), strict=True)) if remote else {}
    sizes, versions = [], []
    for name in names:
        if name in said:
            size, version = said[name]
        else:
            try:
                # A hundred thousand of them: Path.stat takes twice as long.
                stat = os.stat(name)  # noqa: PTH116
            except OSError as error:
                what = f"cannot be looked at ({error.strerror})"
                raise InputError(what, where=name, mend="mend the link or the rights") from None
            size, version = stat.st_size, stat.st_mtime_ns
        sizes.append(size)
        versions.append(version)
    return sizes, versions


def _name_of(build: Callable[[Path], Index]) -> str:
    """What kind of index: a catalogue of captions in .txt is none of captions elsewhere."""
    return repr(build) if not hasattr(build, "__qualname__") else f"{build.__module__}.{build.__qualname__}"


def _absolute(name: str) -> str:
    return name if name.startswith("/") or is_remote(name) else os.path.abspath(name)  # noqa: PTH100  as above


def _files(names: Sequence[str], columns: dict[str, Any]) -> list[ShardFile]:
    return list(map(ShardFile, names, columns["sizes"], columns["versions"], columns["samples"]))


def _read_catalogue(
    path: Path, names: Sequence[str], stamps: tuple[list[int], list[int]]
) -> tuple[list[ShardFile], list[LeftOut]] | None:
    """What an earlier start found, if every shard is still the same."""
    try:
        data = json.loads(path.read_bytes())
        columns = data["columns"]
        same = (columns["sizes"], columns["versions"]) == stamps and len(columns["samples"]) == len(names)
        if data["version"] != _VERSION or not same:
            return None
        return _files(names, columns), [LeftOut(names[number], *row) for number, *row in data["left_out"]]
    except (OSError, ValueError, KeyError, TypeError, IndexError):
        return None


def _write_catalogue(path: Path, names: Sequence[str], columns: dict[str, Any], left_out: Sequence[LeftOut]) -> None:
    number = {name: i for i, name in enumerate(names)}
    # By columns: three long lists are read several times faster than a hundred thousand short ones.
    rows = [[number[row.source], row.key, row.reason, row.samples] for row in left_out]
    try:
        with new_file(path) as file:
            file.write(json.dumps({"version": _VERSION, "columns": columns, "left_out": rows}, ensure_ascii=True).encode())
    except OSError as error:
        logger.debug("no catalogue at %s: %s", path, error)
