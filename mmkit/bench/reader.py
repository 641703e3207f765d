"""``mmkit bench reader``: samples a second without decoding against webdataset and datasets; what starting and going on cost."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from mmkit.bench.measure import interleaved
from mmkit.bench.photographs import write_samples
from mmkit.data.order import make_order
from mmkit.data.remote import ShardCache
from mmkit.data.sources import SourceOptions, open_pairs
from mmkit.errors import InputError

# In a fresh process, since it is memory that is measured; what it prints is read back.
_START = """
import sys, time
from pathlib import Path
from mmkit.data.order import make_order
from mmkit.data.remote import ShardCache
from mmkit.data.sources import SourceOptions, open_pairs
location, cache, step, batch = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
def peak():
    # Not getrusage, whose peak is inherited from the process that started this one.
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM"))
before = peak()
began = time.perf_counter()
source = open_pairs(location, SourceOptions(cache=ShardCache(cache, 1 << 30)))
pairs = [source.read(p.index) for p in make_order(source.layout, 0).positions(step * batch, batch)]
data = [pair.image.read() for pair in pairs]
seconds = time.perf_counter() - began
assert all(data) and all(pair.caption for pair in pairs)
print(seconds, peak() / 1024, before / 1024, len(source))
"""


def run(
    *,
    repeats: int = 5,
    samples: int = 4000,
    picture_kb: int = 66,
    per_shard: int = 1000,
    shards: int = 1000,
    billion_shards: int = 100_000,
    billion_per_shard: int = 10_000,
    step: int = 1_000_000,
    batch: int = 64,
) -> dict[str, Any]:
    """Compare readers on the same shards in one process; then start on many shards, and go on in a billion samples.

    The peers stream the members of the tars in order, webdataset also through its shuffle buffer; mmkit reads the samples in the
    shuffled order of a training run. All have the files in the page cache. The billion samples are one real shard under 100,000
    names (hard links), so that what is read is real.

    Args:
        repeats: Timed rounds, interleaved.
        samples: Samples of the comparison.
        picture_kb: Bytes of a picture, in thousands (random ones: nothing is decoded).
        per_shard: Samples of a shard in the comparison.
        shards: Shards of the start.
        billion_shards: Names of the large set.
        billion_per_shard: Samples of its shard.
        step: Where the large set is gone on with.
        batch: Samples of a batch there.

    Raises:
        InputError: webdataset is not installed.
    """
    try:
        import webdataset
    except ImportError:
        raise InputError("webdataset is not installed", where="bench reader", mend="pip install 'mmkit[bench]'") from None
    with tempfile.TemporaryDirectory(prefix="mmkit-bench-") as name:
        folder = Path(name)
        found = _compare(folder / "compare", webdataset, samples, per_shard, picture_kb * 1000, repeats)
        found |= _start(folder / "start", shards)
        found |= _go_on(folder / "large", billion_shards, billion_per_shard, step, batch)
    return {
        "conditions": f"{samples} samples of {picture_kb} kB + caption, {per_shard} a shard, page cache, one process, "
        f"median of {repeats}",
        **found,
    }


def _compare(folder: Path, webdataset: Any, samples: int, per_shard: int, size: int, repeats: int) -> dict[str, Any]:
    """Samples a second of each reader."""
    import datasets

    rng = np.random.default_rng(0)
    for number in range(-(-samples // per_shard)):
        rows = range(number * per_shard, min(samples, (number + 1) * per_shard))
        write_samples(folder / f"{number:05d}.tar", [(f"{i:09d}", rng.bytes(size), f"caption of {i}") for i in rows])
    names = sorted(map(str, folder.glob("*.tar")))
    source = open_pairs(str(folder), SourceOptions(cache=ShardCache(folder / "cache", 1 << 30)))
    datasets.disable_progress_bars()

    def ours(indices: Any) -> None:
        total = sum(len(pair.image.read()) for pair in map(source.read, indices) if pair.caption)
        # Everything was read, or the rates would be of different work.
        assert total == samples * size

    def theirs(shuffle: int) -> None:
        # In order, which is quicker for it: its shuffling is a contender of its own.
        stream = webdataset.WebDataset(names, shardshuffle=False, empty_check=False)
        stream = stream.shuffle(shuffle) if shuffle else stream
        assert sum(len(sample["jpg"]) for sample in stream if sample["txt"]) == samples * size

    def hub() -> None:
        stream = datasets.load_dataset("webdataset", data_files={"train": names}, split="train", streaming=True)
        # Its default decodes every picture by Pillow (performance.md 5.3).
        stream = stream.cast_column("jpg", datasets.Image(decode=False))
        assert sum(len(row["jpg"]["bytes"]) for row in stream) == samples * size

    shuffled = [p.index for p in make_order(source.layout, 0).positions(0, samples)]
    contenders: dict[str, Callable[[], object]] = {
        "mmkit, shuffled": lambda: ours(shuffled),
        "webdataset, in order": lambda: theirs(0),
        "webdataset, shuffle(500)": lambda: theirs(500),
        "datasets, streaming": hub,
    }
    seconds = interleaved(contenders, repeats=repeats)
    mine = seconds["mmkit, shuffled"]
    return {
        **{f"{name}, samples/s": round(samples / took) for name, took in seconds.items()},
        **{f"speed, mmkit / {name}": round(took / mine, 2) for name, took in seconds.items() if took != mine},
    }


def _start(folder: Path, shards: int) -> dict[str, Any]:
    """First batch of a set of many shards: when nothing is known of it, and later."""
    for number in range(shards):
        write_samples(folder / f"{number:05d}.tar", [(f"{number:05d}{i:03d}", bytes(20_000), f"caption {i}") for i in range(60)])
    found = {}
    for when in ("first time", "later"):
        seconds, peak, _, count = _measure(str(folder), folder.parent / "cache", 0, 64)
        found[f"first batch of {shards} shards ({count:.0f} samples), {when}, s"] = round(seconds, 2)
        found[f"memory then, {when}, MiB"] = round(peak)
    return found


def _go_on(folder: Path, names: int, per_shard: int, step: int, batch: int) -> dict[str, Any]:
    """Going on at a step far into a very large set."""
    write_samples(folder / "000000.tar", [(f"{i:06d}", bytes(1000), f"caption {i}") for i in range(per_shard)])
    # Writes the index beside it, which is then linked as often as the shard.
    open_pairs(str(folder / "000000.tar"))
    for path in list(folder.iterdir()):
        linked = path
        for number in range(1, names):
            target = folder / path.name.replace("000000", f"{number:06d}")
            # ext4 allows 65,000 names of a file.
            if number % 60_000 == 0:
                linked = Path(shutil.copy2(path, target))
            else:
                os.link(linked, target)
    cache = folder.parent / "cache"
    # Once from the beginning: it leaves the catalogue in the cache, which a run that goes on finds there.
    first, *_ = _measure(str(folder), cache, 0, batch)
    seconds, peak, before, count = _measure(str(folder), cache, step, batch)
    shutil.rmtree(folder)
    return {
        f"index of {count:.0f} samples in {names} shards, made from sidecars, s": round(first, 2),
        f"going on there at step {step} of batch {batch}, s": round(seconds, 2),
        "memory then, MiB": round(peak),
        "of that before (Python and imports), MiB": round(before),
    }


def _measure(location: str, cache: Path, step: int, batch: int) -> tuple[float, float, float, float]:
    """Seconds to a batch, peak MiB, MiB before, and samples, in a process of its own."""
    command = [sys.executable, "-c", _START, location, str(cache), str(step), str(batch)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    seconds, peak, before, count = map(float, done.stdout.split())
    return seconds, peak, before, count
