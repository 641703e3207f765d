"""Remote shards: fetched once, whole, into a bounded folder; given up after some tries, and listed."""

from __future__ import annotations

import functools
import http.server
import multiprocessing
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import fsspec
import pyarrow
import pyarrow.parquet
import pytest
import shards

from mmkit.data import reading, remote
from mmkit.data.images import ImageRef
from mmkit.data.loader import ReplacingSet, make_loader
from mmkit.data.order import Position, make_order
from mmkit.data.pairs import PairSource
from mmkit.data.reading import look_again
from mmkit.data.remote import ShardCache, is_remote
from mmkit.data.sidecar import SUFFIX
from mmkit.data.skipped import SampleError
from mmkit.data.sources import SourceOptions, open_pairs
from mmkit.errors import InputError


class Recording(http.server.SimpleHTTPRequestHandler):
    """A file server that remembers what was asked of it; the first ``fails`` GETs of a file are refused."""

    asked: list[tuple[str, str]]
    fails: dict[str, int]

    def log_message(self, *_: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self.asked.append(("HEAD", self.path))
        super().do_HEAD()

    def do_GET(self) -> None:
        self.asked.append(("GET", self.path))
        if self.fails.get(self.path, 0) > 0:
            self.fails[self.path] -= 1
            self.send_error(503)
            return
        super().do_GET()


@pytest.fixture
def served(tmp_path: Path) -> Iterator[tuple[Path, str, type[Recording]]]:
    """A folder, its address on this machine, and what is asked of it."""
    folder = tmp_path / "served"
    folder.mkdir()
    handler = type("Handler", (Recording,), {"asked": [], "fails": {}})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(handler, directory=str(folder)))
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield folder, f"http://127.0.0.1:{server.server_address[1]}", handler
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "BACK_OFF", (0.0, 0.0, 0.0))
    monkeypatch.setattr(remote, "_given_up", reading.GivenUp())


def options(tmp_path: Path, limit: int = 1 << 30) -> SourceOptions:
    return SourceOptions(cache=ShardCache(tmp_path / "cache", limit))


def content(source: PairSource) -> list[tuple[str, bytes]]:
    return [(pair.caption, pair.image.read()) for pair in source]


EXPECTED = [(f"caption {i}", shards.jpeg(i)) for i in range(6)]


def test_shards_come_over_http_once(tmp_path: Path, served: tuple[Path, str, type[Recording]]) -> None:
    folder, address, handler = served
    for n in range(3):
        shards.write_shard(folder / f"{n}.tar", 2 * n, 2)
    source = open_pairs(f"{address}/{{0..2}}.tar", options(tmp_path))
    assert content(source) == EXPECTED == content(source)
    assert [path for verb, path in handler.asked if verb == "GET" and path.endswith(".tar")] == ["/0.tar", "/1.tar", "/2.tar"]
    # Again: whether they are the same is asked for, but neither shards nor indexes.
    handler.asked.clear()
    again = open_pairs(f"{address}/{{0..2}}.tar", options(tmp_path))
    assert content(again) == EXPECTED and again.fingerprint == source.fingerprint
    assert handler.asked and {verb for verb, _ in handler.asked} == {"HEAD"}
    assert source.read(0).source == f"{address}/0.tar"


@pytest.mark.parametrize("same_size", [False, True])
def test_a_remote_shard_that_changed_is_fetched_and_indexed_anew(
    same_size: bool, tmp_path: Path, served: tuple[Path, str, type[Recording]]
) -> None:
    folder, address, _ = served
    shards.write_shard(folder / "0.tar", 0, 5)
    before = open_pairs(f"{address}/0.tar", options(tmp_path))
    assert content(before)[0] == ("caption 0", shards.jpeg(0))
    shards.write_shard(folder / "0.tar", 10, 5 if same_size else 30)
    os.utime(folder / "0.tar", (2_000_000_000, 2_000_000_000))
    after = open_pairs(f"{address}/0.tar", options(tmp_path))
    assert [p.key for p in after.pairs] == [f"{i:06d}" for i in range(10, 15 if same_size else 40)]
    assert content(after)[0] == ("caption 10", shards.jpeg(10))
    # A run that began before goes on with its copy; without one it says so, rather than reading other bytes at old places.
    assert content(before)[0] == ("caption 0", shards.jpeg(0))
    for path in (tmp_path / "cache" / "shards").iterdir():
        path.unlink()
    with pytest.raises(SampleError, match="the shard has changed since this run looked at it"):
        before.read(0)


def test_an_index_beside_a_remote_shard_spares_fetching_it(tmp_path: Path, served: tuple[Path, str, type[Recording]]) -> None:
    folder, address, handler = served
    shards.write_shard(folder / "0.tar", 0, 4, pad=2_200_000)
    open_pairs(str(folder / "0.tar"))
    assert (folder / f"0.tar{SUFFIX}").is_file()
    source = open_pairs(f"{address}/0.tar", options(tmp_path))
    assert len(source) == 4
    assert ("GET", "/0.tar") not in handler.asked
    assert source.read(3).image.read() == shards.jpeg(3)
    assert handler.asked.count(("GET", "/0.tar")) == 1


def test_a_server_that_fails_is_asked_again(tmp_path: Path, served: tuple[Path, str, type[Recording]]) -> None:
    folder, address, handler = served
    shards.write_shard(folder / "0.tar", 0, 2)
    handler.fails["/0.tar"] = 3
    assert content(open_pairs(f"{address}/0.tar", options(tmp_path))) == EXPECTED[:2]


def test_a_shard_that_cannot_be_fetched_is_listed_and_replaced(
    tmp_path: Path, served: tuple[Path, str, type[Recording]], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, address, handler = served
    for n in range(3):
        shards.write_shard(folder / f"{n}.tar", 2 * n, 2)
    source = open_pairs(f"{address}/{{0..2}}.tar", options(tmp_path))
    for path in (tmp_path / "cache" / "shards").iterdir():
        path.unlink()
    handler.fails["/1.tar"] = 99
    handler.asked.clear()

    class Samples:
        def __len__(self) -> int:
            return len(source)

        def load(self, index: int, rng: object) -> str:
            return source.read(index).caption

        describe = staticmethod(source.describe)

    drawn = [ReplacingSet(Samples(), 0, source.layout)[Position(0, i)] for i in range(6)]
    assert [d.sample for d in drawn[:2] + drawn[4:]] == ["caption 0", "caption 1", "caption 4", "caption 5"]
    # The whole shard is bad, so others stand in; the samples are named, though the shard cannot be had.
    assert all(d.sample not in ("caption 2", "caption 3") for d in drawn)
    left = {(row.source, row.key) for d in drawn for row in d.left_out}
    assert left == {(f"{address}/1.tar", "000002"), (f"{address}/1.tar", "000003")}
    assert "cannot be fetched, also at try 4" in drawn[2].left_out[0].reason
    # Given up for a while: its other samples do not wait again.
    assert handler.asked.count(("GET", "/1.tar")) == 4


def test_a_missing_remote_shard_is_an_error_at_the_start(tmp_path: Path, served: tuple[Path, str, type[Recording]]) -> None:
    _, address, _ = served
    with pytest.raises(InputError, match=r"/none\.tar: there is no such file; check the address"):
        open_pairs(f"{address}/none.tar", options(tmp_path))
    with pytest.raises(InputError, match=r"warp://a/b\.tar: Protocol not known: warp"):
        open_pairs("warp://a/b.tar", options(tmp_path))


def test_the_cache_is_bounded_and_the_least_used_goes_first(tmp_path: Path) -> None:
    fs = fsspec.filesystem("memory")
    for n in range(4):
        fs.pipe(f"/bounded/{n}.tar", shards.write_shard(tmp_path / f"{n}.tar", 2 * n, 2).read_bytes())
    size = (tmp_path / "0.tar").stat().st_size
    cache = ShardCache(tmp_path / "cache", 2 * size)
    held = tmp_path / "cache" / "shards"
    for n in (0, 1, 0, 2):
        assert cache.local(f"memory://bounded/{n}.tar").read_bytes() == (tmp_path / f"{n}.tar").read_bytes()
        time.sleep(0.01)  # times of use must differ
    files = [p for p in held.iterdir() if not p.name.startswith(".")]
    assert sorted(p.read_bytes() for p in files) == sorted((tmp_path / f"{n}.tar").read_bytes() for n in (0, 2))
    # A shard larger than the limit is read all the same: it is the one that is needed.
    assert ShardCache(tmp_path / "cache", 1).local("memory://bounded/3.tar").is_file()
    assert len([p for p in held.iterdir() if not p.name.startswith(".")]) == 1
    source = open_pairs("memory://bounded/*.tar", SourceOptions(cache=ShardCache(tmp_path / "tiny", size)))
    assert content(source) == [(f"caption {i}", shards.jpeg(i)) for i in range(8)]


def _fetch(cache: ShardCache, url: str) -> None:
    assert cache.local(url).stat().st_size > 0


def test_processes_that_want_the_same_shard_fetch_it_once(tmp_path: Path, served: tuple[Path, str, type[Recording]]) -> None:
    folder, address, handler = served
    shards.write_shard(folder / "0.tar", 0, 2)
    cache = ShardCache(tmp_path / "cache", 1 << 30)
    processes = [multiprocessing.get_context("spawn").Process(target=_fetch, args=(cache, f"{address}/0.tar")) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [p.exitcode for p in processes] == [0, 0, 0]
    assert handler.asked.count(("GET", "/0.tar")) == 1


def test_a_connection_that_breaks_leaves_nothing_half_fetched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fsspec.filesystem("memory").pipe("/broken/0.tar", b"x" * 5000)
    real = remote._open

    class Short:
        size = 9000

        def __init__(self, url: str) -> None:
            self.file = real(url)

        def __enter__(self) -> Short:
            return self

        def __exit__(self, *_: object) -> None:
            self.file.close()

        def read(self, count: int = -1) -> bytes:
            data: bytes = self.file.read(count)
            return data

    monkeypatch.setattr(remote, "_open", Short)
    with pytest.raises(SampleError, match="5000 of 9000 bytes came"):
        ShardCache(tmp_path, 1 << 30).local("memory://broken/0.tar")
    assert [p.name for p in (tmp_path / "shards").iterdir() if not p.name.endswith(".lock")] == []


def test_where_the_cache_lies(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("MMKIT_CACHE", str(tmp_path))
    assert remote.default_cache() == tmp_path
    monkeypatch.delenv("MMKIT_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "x"))
    assert remote.default_cache() == tmp_path / "x" / "mmkit"
    assert [is_remote(n) for n in ("s3://a/b", "hf:name@split", "/a/b", "a{0..1}.tar")] == [True, False, False, False]
    assert os.environ.get("XDG_CACHE_HOME")


class Captions:
    """The captions of a source, as a loader's samples."""

    def __init__(self, source: PairSource) -> None:
        self.source = source

    def __len__(self) -> int:
        return len(self.source)

    def load(self, index: int, rng: object) -> tuple[str, int]:
        pair = self.source.read(index)
        return pair.caption, len(pair.image.read())

    def describe(self, index: int) -> tuple[str, str]:
        return self.source.describe(index)


def _as_batch(samples: list[tuple[str, int]]) -> dict[str, list[str]]:
    return {"captions": [caption for caption, _ in samples]}


def test_loader_processes_fetch_what_they_need(tmp_path: Path, served: tuple[Path, str, type[Recording]]) -> None:
    folder, address, handler = served
    for n in range(6):
        shards.write_shard(folder / f"{n}.tar", 4 * n, 4)
    source = open_pairs(f"{address}/{{0..5}}.tar", SourceOptions(cache=ShardCache(tmp_path / "cache", 20_000), window=8))
    order = make_order(source.layout, 0)
    found = {}
    for workers in (0, 2):
        handler.asked.clear()
        batches = [order.positions(4 * step, 4) for step in range(12)]
        # Fetched by the workers, who were forked from a process that has spoken to the server: its threads are not theirs.
        loader = make_loader(Captions(source), _as_batch, batches, seed=0, workers=workers, pin_memory=False, timeout=60)
        found[workers] = [(batch["captions"], left) for batch, left in loader]
        # The cache is smaller than the set, so shards have to come again.
        assert sum(path.endswith(".tar") for verb, path in handler.asked if verb == "GET") >= 6
    assert found[0] == found[2]
    assert sorted(c for batch, _ in found[2][:6] for c in batch) == sorted(f"caption {i}" for i in range(24))


@pytest.mark.parametrize("kind", ["parquet", "hub"])
def test_loader_processes_read_tables(kind: str, tmp_path: Path) -> None:
    pictures = [shards.jpeg(i) for i in range(40)]
    table = pyarrow.table({"image": pictures, "caption": [f"caption {i}" for i in range(40)]})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet", row_group_size=7)
    source = open_pairs(str(tmp_path / "a.parquet") if kind == "parquet" else f"hf:{tmp_path}@train")
    batches = [make_order(source.layout, 0).positions(8 * step, 8) for step in range(5)]
    found = [
        [
            batch["captions"]
            for batch, _ in make_loader(Captions(source), _as_batch, batches, seed=0, workers=w, pin_memory=False, timeout=60)
        ]
        for w in (0, 2)
    ]
    assert found[0] == found[1] and len({c for batch in found[0] for c in batch}) == 40


def test_a_shard_that_goes_before_it_is_read_comes_again(tmp_path: Path) -> None:
    fsspec.filesystem("memory").pipe("/gone/0.tar", shards.write_shard(tmp_path / "0.tar", 0, 2).read_bytes())
    cache = ShardCache(tmp_path / "cache", 1 << 30)
    tries = []

    def work(path: str) -> bytes:
        tries.append(path)
        if len(tries) < 3:
            # As another process does that makes room.
            Path(path).unlink()
        return ImageRef(path, 0, 5).read()

    assert cache.reading("memory://gone/0.tar", work) == b"00000" and len(tries) == 3
    with pytest.raises(SampleError, match="No such file"):
        # Looked at anew: an open descriptor would go on giving the bytes of the file that is gone, which are the right ones.
        cache.reading("memory://gone/0.tar", lambda path: (Path(path).unlink(), look_again(), ImageRef(path, 0, 5).read())[2])
    # A fault of the shard itself is not asked for again.
    tries.clear()
    with pytest.raises(SampleError, match="bad"):
        cache.reading("memory://gone/0.tar", lambda path: tries.append(path) or (_ for _ in ()).throw(SampleError("bad")))
    assert len(tries) == 1
