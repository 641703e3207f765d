"""``mmkit data pack``: any pairs as webdataset shards with our index beside, and the index of shards that exist."""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import io
import json
import logging
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from PIL import Image

from mmkit.data.images import decode_image
from mmkit.data.pairs import Pair, PairSource
from mmkit.data.remote import ShardCache
from mmkit.data.scan.crew import map_in_order
from mmkit.data.scan.look import format_of
from mmkit.data.shards import write_shard
from mmkit.data.sidecar import SMALLEST
from mmkit.data.skipped import LeftOut, SampleError, SkippedRows, skipped_file
from mmkit.data.sources import SourceOptions, open_named
from mmkit.data.sources.indexed import Indexed, keep_index
from mmkit.data.sources.locate import expand, guess_kind
from mmkit.data.sources.tars import index_tar
from mmkit.errors import InputError
from mmkit.files import read_json, write_json

logger = logging.getLogger(__name__)

# Part of the settings: a folder that was packed in an older way is refused like one packed with other options.
_VERSION = 1
_RECORD = "pack.json"
_SKIPPED = "skipped.jsonl"
_WORK = ".pack"
_QUALITY = 90
_KEYS = (SourceOptions.image, SourceOptions.caption)
_SAY_EVERY_SECONDS = 20.0
# By what the bytes are and not by what their file was called. MPO: a JPEG with a second picture behind it, as phones write.
_SUFFIX_OF = {"JPEG": "jpg", "MPO": "jpg", "PNG": "png", "WEBP": "webp", "GIF": "gif", "BMP": "bmp"}


@dataclasses.dataclass(frozen=True)
class PackOptions:
    """What shards are like.

    Attributes:
        shard_size: Samples of a shard, those that turn out unusable included.
        max_side: Pictures whose longer side has more pixels are made smaller; None: none is.
        quality: JPEG quality of those, 1 to 100.
    """

    # Ten of these are one shuffle window (`mmkit.data.sources.WINDOW`).
    shard_size: int = 10_000
    max_side: int | None = None
    quality: int = _QUALITY


@dataclasses.dataclass(frozen=True)
class Packed:
    """What was packed, or indexed.

    Attributes:
        samples: In all shards.
        shards: Number of shards.
        skipped: What was left out.
        where: The folder, or the location.
    """

    samples: int
    shards: int
    skipped: SkippedRows
    where: str

    def lines(self) -> list[str]:
        """For people, a line each."""
        return [
            f"samples: {self.samples}",
            f"shards: {self.shards}",
            f"left out: {self.skipped.total}",
            *(f"  {count} x {reason}" for reason, count in self.skipped.reasons.most_common()),
            f"done: {self.where}",
        ]


@dataclasses.dataclass(frozen=True)
class Packer:
    """Writes single shards; goes to other processes."""

    source: PairSource
    options: PackOptions
    out: Path

    def write(self, number: int) -> dict[str, Any]:
        """Write a shard, its sidecar and its record, the record last: it says that the others are whole.

        Raises:
            OSError: The folder cannot be written.
        """
        # With more digits where there are more shards, so that the order of names stays that of numbers.
        name = str(number).zfill(max(5, len(str(len(self.source) // self.options.shard_size))))
        record = self.out / _WORK / f"{name}.json"
        if (done := read_record(record, self.out)) is not None:
            return done
        # In the work folder, so that whoever reads the shards meanwhile never meets half of one.
        part, path = self.out / _WORK / f"{name}.part", self.out / f"{name}.tar"
        begin = number * self.options.shard_size
        left_out: list[LeftOut] = []
        try:
            with part.open("wb") as file:
                indices = range(begin, min(begin + self.options.shard_size, len(self.source)))
                write_shard(file, self._members(indices, left_out))
                file.flush()
                # Before the rename: a name must not stand for bytes that a power cut can still take.
                os.fsync(file.fileno())
            samples = len(indices) - len(left_out)
            size = part.stat().st_size if samples else 0
            # A tar without members is a fault to whoever reads the folder; there is nothing in it to read.
            if samples:
                part.replace(path)
                # Small shards are walked through faster than a sidecar is opened, so none is read there.
                if size >= SMALLEST:
                    keep_index(index_tar, path)
        finally:
            part.unlink(missing_ok=True)
        found = {"shard": path.name, "samples": samples, "size": size, "left_out": [dataclasses.astuple(row) for row in left_out]}
        write_json(record, found)
        return found

    def _members(self, indices: range, left_out: list[LeftOut]) -> Iterator[tuple[str, bytes]]:
        """The members of those samples that can be used."""
        for index in indices:
            try:
                pair = self.source.read(index)
                suffix, data, size = shrink(pair.image.read(), self.options)
            except SampleError as error:
                left_out.append(LeftOut(*self.source.describe(index), str(error)))
                continue
            # The number in the source: unique, and known before the samples ahead of it are read.
            yield from members(f"{index:09d}", suffix, data, size, pair)


def pack(
    location: str,
    out: Path | None,
    *,
    shard_size: int | None = None,
    max_side: int | None = None,
    quality: int | None = None,
    limit: int | None = None,
    reading: SourceOptions | None = None,
    workers: int | None = None,
) -> Packed:
    """`pack_pairs` into a folder; without one `index_shards`. Options without an effect are refused.

    Args:
        location: As in ``data.train``.
        out: Folder for shards; None: only the index of shards that exist.
        shard_size: As in `PackOptions`; None: its default.
        max_side: As in `PackOptions`.
        quality: As in `PackOptions`.
        limit: The first pairs only.
        reading: How the data set is read.
        workers: Processes; None: one for each core.

    Raises:
        InputError: As those raise it; an option would have no effect.
    """
    if quality is not None and max_side is None:
        mend = "give --max-side too"
        raise InputError("--quality is that of pictures made smaller, without --max-side none is", where=location, mend=mend)
    if out is not None:
        options = PackOptions(shard_size or PackOptions.shard_size, max_side, _QUALITY if quality is None else quality)
        return pack_pairs(location, out, options, reading=reading, limit=limit, workers=workers)
    given = {"--shard-size": shard_size, "--max-side": max_side, "--limit": limit}
    if idle := [name for name, value in given.items() if value is not None]:
        raise InputError(f"{idle[0]} has no effect on shards that exist", where=location, mend="give --out to write new ones")
    # Nor do the keys: members of a tar are found by their suffixes.
    if reading is not None and (reading.image_root, reading.image, reading.caption, reading.streaming) != (None, *_KEYS, False):
        raise InputError("shards that exist are read by their members' suffixes", where=location, mend="leave the keys out")
    return index_shards(location, kind="auto" if reading is None else reading.kind, workers=workers)


def pack_pairs(
    location: str,
    out: Path,
    options: PackOptions | None = None,
    *,
    reading: SourceOptions | None = None,
    limit: int | None = None,
    workers: int | None = None,
) -> Packed:
    """Write a data set as webdataset shards ``00000.tar``, ... of ``KEY.jpg`` (or png, ...), ``KEY.txt``, ``KEY.json``.

    Equal data and options give equal bytes, whatever the number of processes. Every picture is decoded as training decodes it;
    a sample that cannot be used is left out and listed in ``skipped.jsonl``. Interrupted, the same call goes on: it keeps whole
    shards. Done, it returns at once.

    Args:
        location: As in ``data.train``.
        out: Folder to write; missing, empty, or of the same call before.
        options: What the shards are like.
        reading: How the data set is read; None: by its name.
        limit: The first pairs only.
        workers: Processes; None: one for each core.

    Raises:
        InputError: As the readers raise it; the folder holds something else or cannot be written; a worker process was killed.
    """
    options = options or PackOptions()
    if limit is not None and limit < 1:
        raise InputError(f"limit {limit} leaves no pair", where=location, mend="use at least 1, or leave it out")
    reading = reading or SourceOptions()
    source = open_named(location, reading).take(limit)
    # All that the bytes depend on. Keys and columns too: the fingerprint may be that of a file that has several of them.
    settings = {
        "version": _VERSION,
        "data": location,
        "fingerprint": source.fingerprint,
        # The index alone would let an old picture stay under its name.
        "pictures": source.pictures_stamp(),
        "pairs": len(source),
        "image_root": reading.image_root,
        "image": reading.image,
        "caption": reading.caption,
        **dataclasses.asdict(options),
    }
    try:
        with _claimed(out, settings):
            return _pack(source, out, options, settings, workers)
    except OSError as error:
        # A full disk, a lack of rights: the part that was being written is gone, whole shards are kept.
        what = f"cannot be written ({error.strerror or error})"
        raise InputError(what, where=out, mend="make room or mend its rights, and repeat the command: it goes on") from None


def index_shards(location: str, *, kind: str = "auto", cache: ShardCache | None = None, workers: int | None = None) -> Packed:
    """Make the missing sidecars of tar shards.

    Args:
        location: As in ``data.train``: a tar, a folder of them, a brace range, a glob, addresses.
        kind: As in ``data.type``.
        cache: Where sidecars go that cannot be written beside their shard; None: the usual one.
        workers: Processes; None: one for each core.

    Raises:
        InputError: There are no such shards; a worker process was killed.
    """
    if (kind := guess_kind(location) if kind == "auto" else kind) != "webdataset":
        raise InputError(f"only tar shards have an index, this is {kind}", where=location, mend="give --out to write shards")
    names = expand(location, ".tar")
    indexed = Indexed(index_tar, cache or SourceOptions().cache)
    skipped, samples = SkippedRows(), 0
    for found, left_out in _with_progress(map_in_order(_index_one, indexed, names, workers), len(names)):
        samples += found
        skipped.add(left_out)
    return Packed(samples, len(names), skipped, location)


def shrink(data: bytes, options: PackOptions) -> tuple[str, bytes, tuple[int, int]]:
    """Suffix, bytes, and upright width and height of a picture as it goes into a shard.

    Bytes stay as they are where the options do not ask for less, and the format is one that shards have.

    Raises:
        SampleError: It cannot be decoded.
    """
    # Decoded also where the bytes stay: only so is it known that training can use them.
    image = decode_image(data)
    # Comments and colour profiles: no pixel that training sees depends on them.
    image.info = {}
    if options.max_side is not None and max(image.size) > options.max_side:
        image.thumbnail((options.max_side, options.max_side), Image.Resampling.LANCZOS)
        return "jpg", _encode(image, "JPEG", quality=options.quality), image.size
    suffix = _SUFFIX_OF.get(format_of(data)[0])
    # TIFF, AVIF and others: without loss, since nobody asked for one.
    return (suffix, data, image.size) if suffix else ("png", _encode(image, "PNG"), image.size)


def members(key: str, suffix: str, data: bytes, size: tuple[int, int], pair: Pair) -> Iterator[tuple[str, bytes]]:
    """Names and contents of the members of a sample; nothing of the names comes from the data."""
    about = {"source": pair.source, "key": pair.key, "width": size[0], "height": size[1]}
    yield f"{key}.{suffix}", data
    yield f"{key}.txt", pair.caption.encode()
    yield f"{key}.json", json.dumps(about).encode()


def read_record(record: Path, out: Path) -> dict[str, Any] | None:
    """The record of a shard that was written before, if the shard is still there as it was."""
    try:
        found: dict[str, Any] = json.loads(record.read_bytes())
        # A shard of unusable samples alone is no file.
        whole = not found["samples"] or (out / found["shard"]).stat().st_size == found["size"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return found if whole else None


def _pack(source: PairSource, out: Path, options: PackOptions, settings: dict[str, Any], workers: int | None) -> Packed:
    """Write what is missing, then the lists."""
    if (whole := _finished(out)) is not None:
        shutil.rmtree(out / _WORK)
        return whole
    # Before any shard: it marks the folder as ours, or a repeat after a kill would find it not empty and refuse.
    write_json(out / _RECORD, {"settings": settings, "complete": False})
    numbers = range(-(-len(source) // options.shard_size))
    samples, shards = 0, []
    try:
        with skipped_file(out / _SKIPPED) as skipped:
            skipped.add(source.left_out)
            for done in _with_progress(map_in_order(_write_one, Packer(source, options, out), numbers, workers), len(numbers)):
                skipped.add(LeftOut(*row) for row in done["left_out"])
                samples += done["samples"]
                shards += [{key: done[key] for key in ("shard", "samples", "size")}] if done["samples"] else []
    finally:
        # Of processes that were killed or left at Ctrl-C.
        for part in (out / _WORK).glob("*.part"):
            part.unlink(missing_ok=True)
    write_json(out / _RECORD, {"settings": settings, "complete": True, "samples": samples, "shards": shards})
    # The records of single shards are in these two files now.
    shutil.rmtree(out / _WORK)
    return Packed(samples, len(shards), skipped, str(out))


def _finished(out: Path) -> Packed | None:
    """What an earlier call wrote, if it came to its end and all shards are as it left them; else all are written again."""
    try:
        record = json.loads((out / _RECORD).read_bytes())
        if not record["complete"] or any((out / s["shard"]).stat().st_size != s["size"] for s in record["shards"]):
            return None
        skipped = SkippedRows()
        with (out / _SKIPPED).open(encoding="utf-8") as file:
            skipped.add(LeftOut(**json.loads(line)) for line in file)
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return Packed(record["samples"], len(record["shards"]), skipped, str(out))


@contextlib.contextmanager
def _claimed(out: Path, settings: dict[str, Any]) -> Iterator[None]:
    """The folder for this process alone.

    Raises:
        InputError: It holds something else, shards of other settings, or another process writes there.
    """
    if out.exists() and not out.is_dir():
        raise InputError("is a file, not a folder", where=out, mend="choose another --out")
    record = out / _RECORD
    if record.is_file():
        before = read_json(record, mend="choose another --out").get("settings", {})
        if differ := [key for key in settings if before.get(key) != settings[key]]:
            was = ", ".join(f"{key} {before.get(key)!r}, now {settings[key]!r}" for key in differ)
            raise InputError(f"shards were packed here otherwise: {was}", where=out, mend="choose another --out, or remove it")
    elif out.is_dir() and any(path.name != _WORK for path in out.iterdir()):
        raise InputError("the folder is not empty", where=out, mend="choose another --out")
    (out / _WORK).mkdir(parents=True, exist_ok=True)
    with (out / _WORK / "lock").open("w") as lock:
        try:
            # The system lets go of it when the process dies.
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError("another process packs into this folder", where=out, mend="wait for it") from None
        yield


def _write_one(packer: Packer, number: int) -> dict[str, Any]:
    return packer.write(number)


def _index_one(indexed: Indexed, name: str) -> tuple[int, list[LeftOut]]:
    # By itself: a catalogue is of a whole set, and is written when that is opened.
    files, left_out = indexed.scan([name])
    return files[0].samples, left_out


def _with_progress(found: Iterator[Any], size: int) -> Iterator[Any]:
    """The same, with a line now and then."""
    said = time.monotonic()
    for number, item in enumerate(found, start=1):
        if (now := time.monotonic()) - said > _SAY_EVERY_SECONDS:
            said = now
            logger.info("%d of %d shards", number, size)
        yield item


def _encode(image: Image.Image, kind: str, **more: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **more)
    return file.getvalue()
