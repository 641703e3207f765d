"""The scan ahead: hashes, groups and tallies against plain Python; processes that die; sources that go to other processes."""

from __future__ import annotations

import io
import itertools
import json
import os
import pickle
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

import mmkit
from mmkit.data.layout import Layout
from mmkit.data.pairs import ListShard, Pair, PairSource
from mmkit.data.scan.crew import map_in_order
from mmkit.data.scan.duplicates import DISTANCE, alike_groups, close_pairs, count_bits, equal_groups, first_of_each, plain
from mmkit.data.scan.look import blocks, dhash, look_at
from mmkit.data.scan.survey import survey
from mmkit.data.scan.tally import LARGEST, Tally
from mmkit.data.skipped import LeftOut, SampleError, SkippedRows, skipped_file
from mmkit.data.sources import open_pairs
from mmkit.errors import InputError

VALUES = st.lists(st.one_of(st.integers(0, 40), st.integers(0, 5000), st.integers(LARGEST - 2, 10**9)), max_size=60)
# Few bits change, so that near ones are common.
FLIPS = st.sets(st.integers(0, 63), max_size=5)
BASES = st.sampled_from([0, 2**64 - 1, 0x0F0F << 24])
HASHES = st.lists(st.builds(lambda base, flips: base ^ sum(1 << f for f in flips), BASES, FLIPS), min_size=1, max_size=40)


def u64(values: list[int]) -> np.ndarray:
    return np.asarray(values, dtype=np.uint64)


@given(VALUES)
def test_a_tally_counts_as_a_list_does(values: list[int]) -> None:
    half = len(values) // 2
    tally = Tally().add(values[:half]).add(values[half:])
    assert (tally.size, tally.total, tally.most) == (len(values), sum(values), max(values, default=0))
    clipped = sorted(min(v, LARGEST) for v in values)
    for q in (0.0, 0.05, 0.5, 0.95, 1.0):
        wanted = clipped[max(1, int(np.ceil(q * len(clipped)))) - 1] if clipped else 0
        assert tally.quantile(q) == wanted
    bars = tally.bars()
    assert sum(count for _, _, count in bars) == len(values) and len(bars) <= 32
    assert all(a[1] + 1 == b[0] for a, b in itertools.pairwise(bars))
    assert all(count == sum(first <= v <= last for v in clipped) for first, last, count in bars)
    json.dumps(tally.summary(), allow_nan=False)


@given(st.lists(st.integers(0, 6), max_size=30))
def test_equal_groups_are_those_of_a_dictionary(keys: list[int]) -> None:
    indices = np.arange(len(keys)) * 3
    wanted = [[3 * i for i, k in enumerate(keys) if k == key] for key in dict.fromkeys(keys) if keys.count(key) > 1]
    groups = equal_groups(u64(keys), indices)
    assert [groups.group(i).tolist() for i in range(len(groups))] == wanted
    assert groups.surplus == sum(len(group) - 1 for group in wanted)
    assert first_of_each(u64(keys), indices).tolist() == [3 * keys.index(key) for key in dict.fromkeys(keys)]


@given(HASHES)
def test_close_pairs_are_all_that_comparing_each_with_each_finds(hashes: list[int]) -> None:
    distinct = sorted(set(hashes))
    pairs, whole = close_pairs(u64(distinct))
    wanted = {(a, b) for a, b in itertools.combinations(range(len(distinct)), 2)
              if (distinct[a] ^ distinct[b]).bit_count() <= DISTANCE}  # fmt: skip
    assert {(min(p), max(p)) for p in pairs.tolist()} == wanted and whole
    assert count_bits(u64(hashes)).tolist() == [h.bit_count() for h in hashes]
    assert plain(u64(hashes)).tolist() == [h.bit_count() < 6 or h.bit_count() > 58 for h in hashes]
    # Two hashes are together just when a chain of close ones joins them.
    groups, _ = alike_groups(u64(hashes), np.arange(len(hashes)))
    label = list(range(len(hashes)))
    for _ in hashes:
        for a, b in itertools.combinations(range(len(hashes)), 2):
            if (hashes[a] ^ hashes[b]).bit_count() <= DISTANCE:
                label[a] = label[b] = min(label[a], label[b])
    found = {tuple(groups.group(i).tolist()) for i in range(len(groups))}
    assert found == {tuple(i for i, x in enumerate(label) if x == y) for y, n in Counter(label).items() if n > 1}


def test_a_uniform_set_is_compared_in_part_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mmkit.data.scan.duplicates._REACH", 2)
    assert not close_pairs(u64([1 << i for i in range(16, 30)]))[1]


def test_the_difference_hash_stays_when_a_picture_is_made_smaller(shared: Path) -> None:
    hashes = []
    for path in sorted((shared / "coco-mini/images/val").iterdir())[:20]:
        image = Image.open(path).convert("RGB")
        small, file = image.resize((image.width // 2, image.height // 2)), io.BytesIO()
        small.save(file, "JPEG", quality=60)
        hashes.append(dhash(image))
        assert (look_at(file.getvalue()).alike ^ hashes[-1]).bit_count() <= DISTANCE
    assert min((a ^ b).bit_count() for a, b in itertools.combinations(hashes, 2)) > 2 * DISTANCE


@given(st.lists(st.integers(1, 90), min_size=1, max_size=6), st.integers(1, 4), st.integers(1, 300))
def test_blocks_cover_every_pair_once_and_cross_no_shard(sizes: list[int], workers: int, limit: int) -> None:
    ends, size = list(itertools.accumulate(sizes)), min(limit, sum(sizes))
    found = blocks(ends, size, workers)
    assert [i for begin, end in found for i in range(begin, end)] == list(range(size))
    assert all(begin < end and not any(begin < e < end for e in ends) for begin, end in found)


class Deadly:
    """A picture that ends the process which reads it."""

    path = "nowhere"

    def read(self) -> bytes:
        os.kill(os.getpid(), signal.SIGKILL)
        return b""


def test_a_killed_worker_ends_the_scan_with_one_line() -> None:
    pairs = [Pair("here", str(i), Deadly(), "a dog") for i in range(200)]
    source = PairSource([ListShard(pairs)], [], "x", Layout.flat(len(pairs)))
    with pytest.raises(InputError, match="a worker process was killed; if it was for its memory, use fewer --workers"):
        survey(source, SkippedRows(), lambda captions: None, pictures=True, workers=2)


def test_workers_that_cannot_start_end_it_too() -> None:
    # A main program from standard input is one that no other process can import; the data are longer than a pipe holds.
    code = "from mmkit.data.scan.crew import map_in_order\nlist(map_in_order(max, 'x' * 10**6, ['a', 'b', 'c'], 2))"
    env = {**os.environ, "PYTHONPATH": str(Path(mmkit.__file__).parent.parent)}
    done = subprocess.run([sys.executable, "-"], input=code, capture_output=True, text=True, check=False, env=env, timeout=60)
    assert "InputError: a worker process was killed" in done.stderr


def fail(shared: int, job: int) -> int:
    if job == 3:
        raise SampleError("three")
    return shared * job


def test_results_come_in_order_and_errors_come_through() -> None:
    for workers in (1, 2):
        assert list(map_in_order(fail, 10, [0, 2, 1, 5], workers)) == [0, 20, 10, 50]
        with pytest.raises(SampleError, match="three"):
            list(map_in_order(fail, 10, [2, 3, 4], workers))
    assert list(map_in_order(fail, 10, [], 2)) == []


def test_what_workers_import_is_light() -> None:
    code = "import sys, mmkit.data.pack, mmkit.data.scan.survey, mmkit.data.scan.page; print('torch' in sys.modules)"
    env = {**os.environ, "PYTHONPATH": str(Path(mmkit.__file__).parent.parent)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=env)
    assert done.stdout.strip() == "False"


def write_parquet(path: Path, rows: list[tuple[bytes | None, str]]) -> Path:
    import pyarrow
    import pyarrow.parquet

    table = pyarrow.table({"image": [{"bytes": data, "path": None} for data, _ in rows], "caption": [c for _, c in rows]})
    path.parent.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(table, path, row_group_size=2)
    return path


@pytest.mark.parametrize("kind", ["pairs", "coco", "llava", "folder", "webdataset", "parquet", "hf"])
def test_every_source_goes_to_another_process(kind: str, shared: Path, tmp_path: Path) -> None:
    picture = (shared / "broken/good.jpg").read_bytes()
    (tmp_path / "folder").mkdir()
    for i in range(3):
        (tmp_path / f"folder/{i}.jpg").write_bytes(picture)
        (tmp_path / f"folder/{i}.txt").write_text(f"caption {i}")
    parquet = write_parquet(tmp_path / "hub/train-0.parquet", [(picture, f"caption {i}") for i in range(3)])
    locations = {
        "pairs": shared / "coco-mini/pairs_train.jsonl", "coco": shared / "coco-mini/captions_train.json",
        "llava": shared / "coco-mini/llava_train.json", "folder": tmp_path / "folder",
        "webdataset": shared / "broken/odd_captions.tar", "parquet": parquet, "hf": f"hf:{tmp_path / 'hub'}@train",
    }  # fmt: skip
    source = open_pairs(str(locations[kind]))
    copy = pickle.loads(pickle.dumps(source))
    assert len(copy) == len(source) > 2
    for index in (0, len(source) - 1):
        a, b = source.read(index), copy.read(index)
        assert (a.source, a.key, a.caption, copy.describe(index)) == (b.source, b.key, b.caption, source.describe(index))
        if kind != "coco":  # whose pictures lie elsewhere
            assert a.image.read() == b.image.read()


def test_skipped_rows_are_counted_kept_and_written(tmp_path: Path) -> None:
    rows = [LeftOut("f", f"row {i}", f"'x{i}' is at byte {i}") for i in range(5)]
    with skipped_file(tmp_path / "new/skipped.jsonl", keep=2) as skipped:
        skipped.add(rows)
    assert (skipped.total, skipped.reasons, skipped.first) == (5, {"... is at byte ...": 5}, rows[:2])
    lines = (tmp_path / "new/skipped.jsonl").read_text().splitlines()
    assert [LeftOut(**json.loads(line)) for line in lines] == rows
    with pytest.raises(RuntimeError), skipped_file(tmp_path / "new/skipped.jsonl"):
        raise RuntimeError
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["skipped.jsonl"]
    assert len((tmp_path / "new/skipped.jsonl").read_text().splitlines()) == 5
