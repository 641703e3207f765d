"""Readers of image-text pairs: every format that a recipe can name, behind `mmkit.data.pairs.PairSource`."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import numpy as np

from mmkit.config import DataConfig
from mmkit.data.layout import Layout, Part, join
from mmkit.data.pairs import ListShard, PairShard, PairSource
from mmkit.data.remote import ShardCache, default_cache, is_remote
from mmkit.data.skipped import LeftOut
from mmkit.data.sources.columns import HubShard, check_columns, data_roots, load_rows, open_groups, stream_files, window_of
from mmkit.data.sources.effect import PAIR_KEYS, check_keys, defaults_of
from mmkit.data.sources.files import Read, read_coco, read_conversation_pairs, read_folder
from mmkit.data.sources.indexed import Indexed
from mmkit.data.sources.locate import HUB, expand, guess_kind
from mmkit.data.sources.rows import RowReader, RowShard
from mmkit.data.sources.tars import TarShard, index_tar
from mmkit.errors import InputError
from mmkit.files import hash_file, hash_text

# Ten shards of the usual 10,000: wide enough to mix them, few enough for a cache of fetched shards.
WINDOW = 100_000


@dataclasses.dataclass(frozen=True)
class SourceOptions:
    """What readers need besides a location; the keys of a recipe's data section.

    Attributes:
        kind: Name of a reader, or ``auto`` by the location.
        image_root: Folder that image names are relative to; None: the index file's own folder.
        image: Key or column of the picture.
        caption: Key or column of the caption.
        streaming: Read the files behind a Hugging Face data set instead of loading it.
        window: Samples to shuffle within, where shards are read in windows.
        cache: Where remote shards are fetched to.
    """

    kind: str = "auto"
    image_root: str | None = None
    image: str = "image"
    caption: str = "caption"
    streaming: bool = False
    window: int = WINDOW
    cache: ShardCache = dataclasses.field(default_factory=lambda: ShardCache(default_cache(), 50 << 30))


def open_pairs(location: str, options: SourceOptions | None = None) -> PairSource:
    """Read the index of a pair data set.

    Args:
        location: ``.jsonl`` rows ``{"image", "caption"}``; COCO caption ``.json``; LLaVA ``.json``; tar shards or Parquet files
            (``shards/train-{00000..00009}.tar``, a glob, a folder, an address); a folder of pictures with a ``.txt`` beside each;
            ``hf:NAME_OR_FOLDER[@SPLIT]``.
        options: Everything else.

    Raises:
        InputError: Nothing there, broken JSON, or no usable sample.
    """
    options = options or SourceOptions()
    kind = _kind(location, options.kind)
    if kind not in _READERS:
        raise InputError(f"data type {kind!r} holds no image-text pairs", where=location, mend=f"use {', '.join(_READERS)}")
    source = _READERS[kind](location, options)
    # With the first reason: a wrong image root or key makes every row bad in the same way, and that one line explains it.
    if not len(source):
        first = source.left_out[0] if source.left_out else None
        why = f" ({len(source.left_out)} left out, the first, {first.key}: {first.reason})" if first else ""
        raise InputError(f"no usable sample{why}", where=location, mend="check the path and the file's content")
    return source


def open_training_pairs(data: DataConfig) -> PairSource:
    """The training pairs of a recipe: one data set, several one after the other, or a mixture with weights.

    Raises:
        InputError: As `open_pairs` raises it, or a key that has no effect on any of the data sets.
    """
    kinds = [_kind(part.path, part.type) for part in data.sources]
    # Of the training data, or of those to validate on: one section says how both are read.
    kinds += [_kind(data.val, data.val_type)] if data.val is not None else []
    check_keys(data, defaults_of(DataConfig), kinds, where="data", readers=PAIR_KEYS)
    # Each is limited by itself: a limit of the joined set could leave out whole sources.
    sources = [open_pairs(part.path, options_of(data, part.type, part.image_root)).take(data.limit) for part in data.sources]
    return join_sources(sources, [part.weight for part in data.sources])


def open_named(location: str, options: SourceOptions | None = None) -> PairSource:
    """`open_pairs` for a data set that stands alone, as on the command line.

    Raises:
        InputError: Also for an option that has no effect on it.
    """
    options = options or SourceOptions()
    check_keys(options, vars(SourceOptions()), [_kind(location, options.kind)], where=location, readers=PAIR_KEYS)
    return open_pairs(location, options)


def _kind(location: str, kind: str) -> str:
    return guess_kind(location) if kind == "auto" else kind


def options_of(data: DataConfig, kind: str, image_root: str | None) -> SourceOptions:
    """Readers' options from a recipe's data section."""
    cache = ShardCache(Path(data.cache) if data.cache else default_cache(), int(data.cache_gib * 2**30))
    return SourceOptions(kind, image_root, data.image, data.caption, data.streaming, data.shuffle_window, cache)


def join_sources(sources: Sequence[PairSource], weights: Sequence[float | None]) -> PairSource:
    """Several data sets as one."""
    if len(sources) == 1:
        return sources[0]
    # A limit has shortened the layout, not the shards.
    shards = [_shortened(shard, int(n)) for s in sources for shard, n in zip(s.shards, s.layout.parts[0].chunks, strict=True)]
    left_out = [row for source in sources for row in source.left_out]
    # Without the weights: they are the recipe's, which is compared by itself.
    fingerprint = hash_text(*(source.fingerprint for source in sources))
    layout = join([source.layout for source in sources], weights)
    return PairSource(shards, left_out, fingerprint, layout, sum(source.unlimited for source in sources))


class _Shortened:
    """The first rows of a shard."""

    def __init__(self, shard: PairShard, rows: int) -> None:
        self.shard, self.rows = shard, rows
        self.read, self.describe, self.files = shard.read, shard.describe, shard.files

    def __len__(self) -> int:
        return self.rows


def _shortened(shard: PairShard, rows: int) -> PairShard:
    return shard if len(shard) == rows else _Shortened(shard, rows)


def _of_shards(shards: Sequence[PairShard], left_out: list[LeftOut], fingerprint: str, window: int | None) -> PairSource:
    """A source of the shards that have something to give."""
    # An order takes no shard without samples (`mmkit.data.order.ShuffledOrder`).
    kept = [shard for shard in shards if len(shard)]
    chunks = np.asarray([len(shard) for shard in kept], dtype=np.int64)
    return PairSource(kept, left_out, fingerprint, Layout((Part(chunks, window),)))


def _root(location: str, options: SourceOptions) -> Path:
    return Path(options.image_root) if options.image_root else Path(location).parent


def _open_rows(location: str, options: SourceOptions) -> PairSource:
    names = expand(location, ".jsonl")
    for name in names:
        _on_disk(name)
    reader = RowReader(options.image, options.caption)
    indexed = Indexed(reader, options.cache)
    files, left_out = indexed.scan(names)
    shards = [RowShard(file, indexed, reader, _root(file.name, options)) for file in files]
    # The index alone stands for the data set: hashing the pictures would read all of them before the first step.
    hashes = [hash_file(Path(name)) for name in names]
    # No window: rows name single files, so nothing is gained by reading them in order.
    return _of_shards(shards, left_out, hashes[0] if len(hashes) == 1 else hash_text(*hashes), None)


def _on_disk(name: str) -> None:
    """Raises InputError: an address, where the index names pictures by their place beside it."""
    if is_remote(name):
        raise InputError("names pictures on a disk", where=name, mend="fetch it with them, or give shards, which hold pictures")


def _open_tars(location: str, options: SourceOptions) -> PairSource:
    return _tars(expand(location, ".tar"), options)


def _tars(names: Sequence[str], options: SourceOptions) -> PairSource:
    indexed = Indexed(index_tar, options.cache)
    files, left_out = indexed.scan(names)
    # Names and sizes, not content: shards can be terabytes.
    # With the samples: a shard that could not be read at one start is another data set, in which all positions are others.
    sizes = "\n".join(f"{file.name.rpartition('/')[2]} {file.size} {file.samples}" for file in files)
    return _of_shards([TarShard(file, indexed, options.cache) for file in files], left_out, hash_text(sizes), options.window)


def _open_parquet(location: str, options: SourceOptions) -> PairSource:
    return _parquet(expand(location, ".parquet"), options)


def _parquet(names: Sequence[str], options: SourceOptions) -> PairSource:
    shards, largest = [], 0
    for name in names:
        found, size = open_groups(name, (options.image, options.caption), options.cache)
        shards += found
        largest = max(largest, size)
    rows = sum(len(shard) for shard in shards)
    # By the largest group: a window must fit into memory wherever it lies.
    window = min(options.window, window_of(largest, max(1, rows // max(1, len(shards)))))
    # Not the content, as of tars. The columns too: other ones are other pairs.
    groups = "\n".join(f"{Path(shard.path).name} {shard.group} {len(shard)}" for shard in shards)
    return _of_shards(shards, [], hash_text(groups, options.image, options.caption), window)


def _open_hub(location: str, options: SourceOptions) -> PairSource:
    name, _, split = location.removeprefix(HUB).partition("@")
    if not name:
        raise InputError("no name after hf:", where=location, mend="write hf:OWNER/NAME@SPLIT or hf:FOLDER")
    if options.streaming:
        kind, files = stream_files(name, split, location)
        return (_parquet if kind == "parquet" else _tars)(files, options)
    import datasets

    rows = load_rows(name, split, location)
    columns = (options.image, options.caption)
    check_columns(rows.column_names, columns, location)
    kind = rows.features[options.caption]
    # Refused now: a column of anything else would leave out every row, one by one.
    if getattr(kind, "dtype", None) not in ("string", "large_string"):
        mend = "set data.caption to a column of texts, one a row"
        raise InputError(f"column {options.caption!r} holds {kind}, no texts", where=location, mend=mend)
    if isinstance(rows.features[options.image], datasets.Image):
        # Without decoding: the bytes go through the same decoder as every other picture.
        rows = rows.cast_column(options.image, datasets.Image(decode=False))
    shard = HubShard(location, rows, columns, data_roots(name))
    # It changes with every transformation of the set, so no row has to be read to notice other content.
    return _of_shards([shard], [], hash_text(str(rows._fingerprint), *columns), None)


def _in_memory(read: Callable[[str, Path], Read], location: str, options: SourceOptions) -> PairSource:
    _on_disk(location)
    pairs, left_out, fingerprint = read(location, _root(location, options))
    return _of_shards([ListShard(pairs)], left_out, fingerprint, None)


def _open_conversations(kind: str, location: str, options: SourceOptions) -> PairSource:
    pairs, left_out, fingerprint = read_conversation_pairs(location, kind, options.image_root)
    return _of_shards([ListShard(pairs)], left_out, fingerprint, None)


_READERS: dict[str, Callable[[str, SourceOptions], PairSource]] = {
    "webdataset": _open_tars,
    "parquet": _open_parquet,
    "pairs": _open_rows,
    "coco": partial(_in_memory, read_coco),
    "llava": partial(_open_conversations, "llava"),
    "messages": partial(_open_conversations, "messages"),
    "folder": partial(_in_memory, read_folder),
    "hf": _open_hub,
}
