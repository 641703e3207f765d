"""Parquet files and Hugging Face data sets with the pictures' bytes in a column."""

from __future__ import annotations

import collections
import dataclasses
import os
from pathlib import Path
from typing import Any

from mmkit.data.bounds import MAX_BYTES, refuse_long
from mmkit.data.images import ImageRef
from mmkit.data.pairs import Pair, clean_caption
from mmkit.data.remote import ShardCache, is_remote
from mmkit.data.skipped import SampleError
from mmkit.errors import InputError

# Bytes of row groups that a process keeps: reading one row means to read its whole group.
_HELD_BYTES = 512 << 20


class _Groups:
    """Row groups of Parquet files that were read last."""

    def __init__(self) -> None:
        self._held: collections.OrderedDict[tuple[Any, ...], tuple[Any, int]] = collections.OrderedDict()
        self._bytes = 0

    def get(self, path: str, group: int, columns: tuple[str, str]) -> Any:
        """A row group as an Arrow table. Raises OSError, pyarrow.ArrowInvalid."""
        import pyarrow.parquet

        stat = os.stat(path)  # noqa: PTH116  at every row; Path.stat costs twice as much
        # What tells the file from another of its name, and the columns: two sources may read different ones of one file.
        key = (path, stat.st_ino, stat.st_size, stat.st_mtime_ns, group, columns)
        if (found := self._held.get(key)) is not None:
            self._held.move_to_end(key)
            return found[0]
        with pyarrow.parquet.ParquetFile(path, memory_map=True) as file:
            # One thread: each loader worker would start one for every core.
            table = file.read_row_group(group, columns=list(columns), use_threads=False)
        self._held[key] = (table, table.nbytes)
        self._bytes += table.nbytes
        # The newest stays, however large: its row is about to be read.
        while self._bytes > _HELD_BYTES and len(self._held) > 1:
            self._bytes -= self._held.popitem(last=False)[1][1]
        return table


_groups = _Groups()


@dataclasses.dataclass(frozen=True)
class GroupRef:
    """A picture in a row of a Parquet row group."""

    path: str
    group: int
    row: int
    columns: tuple[str, str]
    cache: ShardCache

    def table(self) -> Any:
        """The row group. Raises SampleError."""
        return self.cache.reading(self.path, self._table) if is_remote(self.path) else self._table(self.path)

    def _table(self, path: str) -> Any:
        import pyarrow

        try:
            return _groups.get(path, self.group, self.columns)
        except (OSError, pyarrow.ArrowException) as error:
            raise SampleError(f"row group {self.group} cannot be read ({' '.join(str(error).split())})") from None

    def read(self, max_bytes: int = MAX_BYTES) -> bytes:
        """The bytes. Raises SampleError when there are none, or more than ``max_bytes``."""
        return picture_bytes(self.table().column(self.columns[0])[self.row].as_py(), max_bytes)


class GroupShard:
    """The pairs of one row group."""

    def __init__(self, path: str, group: int, rows: int, columns: tuple[str, str], cache: ShardCache) -> None:
        self.path, self.group, self.rows, self.columns, self.cache = path, group, rows, columns, cache

    def __len__(self) -> int:
        return self.rows

    def read(self, row: int) -> Pair:
        """Pair ``row``. Raises SampleError: the group cannot be read, or the row has no caption."""
        image = GroupRef(self.path, self.group, row, self.columns, self.cache)
        try:
            caption = clean_caption(image.table().column(self.columns[1])[row].as_py())
        except ValueError as error:
            raise SampleError(str(error)) from None
        return Pair(self.path, self.describe(row)[1], image, caption)

    def describe(self, row: int) -> tuple[str, str]:
        """File, and number of group and row."""
        return self.path, f"group {self.group} row {row}"

    def files(self) -> list[str]:
        """The Parquet file, where it is on this disk."""
        return [] if is_remote(self.path) else [self.path]


def picture_bytes(value: Any, max_bytes: int = MAX_BYTES) -> bytes:
    """Bytes of a picture as Hugging Face and others store it: bytes, or ``{"bytes", "path"}``.

    Raises:
        SampleError: There are none, or more than ``max_bytes``. A path alone is not followed: data must not name files elsewhere.
    """
    data = value.get("bytes") if isinstance(value, dict) else value
    if not isinstance(data, bytes):
        raise SampleError("the row has no picture" if data is None else f"the picture is {type(data).__name__}, not bytes")
    refuse_long(len(data), max_bytes)
    return data


def follow_picture(value: Any, roots: tuple[Path, ...], max_bytes: int = MAX_BYTES) -> bytes:
    """As `picture_bytes`, but a row may name a file below one of some folders.

    Args:
        value: Bytes, or ``{"bytes", "path"}``.
        roots: From `data_roots`.
        max_bytes: A longer picture is refused.

    Raises:
        SampleError: There is no picture, or its file lies elsewhere: data must not name files outside their set.
    """
    if not isinstance(value, dict) or value.get("bytes") is not None or not value.get("path"):
        return picture_bytes(value, max_bytes)
    if not isinstance(value["path"], str) or "\0" in value["path"]:
        raise SampleError(f"image {value['path']!r} is no file name")
    # Resolved, unlike the names in an index file: these are whole paths, in which `..` or a link may hide.
    path = Path(value["path"]).resolve()
    if not any(path.is_relative_to(root) for root in roots):
        raise SampleError(f"image {value['path']!r} points outside the data folder")
    return ImageRef(str(path)).read(max_bytes)


def data_roots(name: str) -> tuple[Path, ...]:
    """Folders below which a Hugging Face data set may name files: its own, and where its library keeps what it fetches."""
    import datasets
    from huggingface_hub.constants import HF_HUB_CACHE

    own = (Path(name).resolve(),) if Path(name).is_dir() else ()
    return (*own, Path(datasets.config.HF_DATASETS_CACHE).resolve(), Path(HF_HUB_CACHE).resolve())


def open_groups(path: str, columns: tuple[str, str], cache: ShardCache) -> tuple[list[GroupShard], int]:
    """The row groups of a Parquet file from its footer, and the bytes of the largest.

    Raises:
        InputError: It is none, or lacks a column; a remote one cannot be fetched.
    """
    import pyarrow
    import pyarrow.parquet

    try:
        local = str(cache.local(path)) if is_remote(path) else path
        # The footer alone: no picture is read to know how many there are.
        with pyarrow.parquet.ParquetFile(local) as file:
            meta, names = file.metadata, file.schema_arrow.names
    except (OSError, pyarrow.ArrowException, SampleError) as error:
        what = f"is no Parquet file that can be read ({' '.join(str(error).split())})"
        raise InputError(what, where=path, mend="fetch or write it again") from None
    check_columns(names, columns, path)
    # Not compressed: what a group takes in memory and not on the disk; of all its columns, so rather too much.
    sizes = [meta.row_group(i).total_byte_size for i in range(meta.num_row_groups)]
    shards = [GroupShard(path, i, meta.row_group(i).num_rows, columns, cache) for i in range(meta.num_row_groups)]
    return [shard for shard in shards if len(shard)], max(sizes, default=0)


def check_columns(names: list[str], columns: tuple[str, str], where: str) -> None:
    """Raises InputError when a column is not there."""
    for name, key in zip(columns, ("data.image", "data.caption"), strict=True):
        if name not in names:
            raise InputError(f"no column {name!r}", where=where, mend=f"set {key}; there are {', '.join(names)}")


def window_of(largest: int, rows: int) -> int:
    """Samples to shuffle within, so that the row groups of a window stay in memory.

    Args:
        largest: Bytes of the largest row group.
        rows: Mean rows of a group.
    """
    # Half, for the next window begins while the last one is still asked for.
    return max(1, _HELD_BYTES // 2 // max(1, largest)) * rows


@dataclasses.dataclass(frozen=True)
class HubRef:
    """A picture in a row of a Hugging Face data set; equal by place."""

    path: str
    row: int
    rows: Any = dataclasses.field(compare=False, repr=False)
    column: str = dataclasses.field(compare=False, default="image")
    roots: tuple[Path, ...] = dataclasses.field(compare=False, default=())

    def read(self, max_bytes: int = MAX_BYTES) -> bytes:
        """The bytes. Raises SampleError when there are none, or more than ``max_bytes``."""
        return follow_picture(self.rows[self.row][self.column], self.roots, max_bytes)


class HubShard:
    """The pairs of a Hugging Face data set, memory-mapped by its library."""

    def __init__(self, location: str, rows: Any, columns: tuple[str, str], roots: tuple[Path, ...]) -> None:
        self.location, self.columns, self.roots = location, columns, roots
        # Apart, so that asking for a caption does not read the picture.
        self.captions, self.pictures = rows.select_columns([columns[1]]), rows.select_columns([columns[0]])

    def __len__(self) -> int:
        return len(self.captions)

    def read(self, row: int) -> Pair:
        """Pair ``row``. Raises SampleError: the row has no caption."""
        try:
            caption = clean_caption(self.captions[row][self.columns[1]])
        except ValueError as error:
            raise SampleError(str(error)) from None
        return Pair(self.location, f"row {row}", HubRef(self.location, row, self.pictures, self.columns[0], self.roots), caption)

    def describe(self, row: int) -> tuple[str, str]:
        """Location and row."""
        return self.location, f"row {row}"

    def files(self) -> list[str]:
        """None: the data set's own fingerprint stands for its content."""
        return []


def load_rows(name: str, split: str, location: str) -> Any:
    """One split of a Hugging Face data set, on disk or on the hub.

    Raises:
        InputError: It cannot be loaded, or which split is not said.
    """
    import datasets

    folder = Path(name)
    # What save_to_disk writes for several splits and for one; load_dataset does not read that layout as a data set.
    saved = (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file()
    try:
        found = datasets.load_from_disk(name) if saved else datasets.load_dataset(name, split=split or None)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        what = f"cannot be loaded ({' '.join(str(error).split())})"
        # On one line: these messages run over several, and an input error is one.
        raise InputError(what, where=location, mend="check the name, the split after @, and the network") from None
    if isinstance(found, datasets.DatasetDict):
        if not split and len(found) == 1:
            split = next(iter(found))
        if split not in found:
            what = f"no split {split!r}" if split else "which split is not said"
            raise InputError(what, where=location, mend=f"write hf:{name}@SPLIT with one of {', '.join(found)}")
        return found[split]
    # A single saved split ignores the wish; scoring another split than the one named must not pass in silence.
    if saved and split and str(found.split) != split:
        raise InputError(f"this is no split {split!r}", where=location, mend=f"leave @{split} away")
    return found


def stream_files(name: str, split: str, location: str) -> tuple[str, list[str]]:
    """Kind (``parquet`` or ``webdataset``) and files of a Hugging Face data set, without loading it.

    Its own stream shuffles through a buffer that is lost when a run stops; the files behind it can be read in an exact order.

    Raises:
        InputError: It cannot be found, or is stored in another way.
    """
    import datasets

    try:
        builder = datasets.load_dataset_builder(name)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        what = f"cannot be found ({' '.join(str(error).split())})"
        raise InputError(what, where=location, mend="check the name and the network") from None
    files: dict[str, Any] = {str(key): found for key, found in (builder.config.data_files or {}).items()}
    # datasets' packaged readers are named after what they read.
    kind = type(builder).__module__.rsplit(".", 1)[-1]
    if kind not in ("parquet", "webdataset"):
        what = f"is stored as {kind}, whose stream has no exact order"
        raise InputError(what, where=location, mend="set data.streaming=false, or write shards with `mmkit data pack`")
    if not split and len(files) == 1:
        split = next(iter(files))
    if split not in files:
        what = f"no split {split!r}" if split else "which split is not said"
        raise InputError(what, where=location, mend=f"write hf:{name}@SPLIT with one of {', '.join(files)}")
    return kind, [str(file) for file in files[split]]
