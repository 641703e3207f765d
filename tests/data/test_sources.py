"""Every kind of source gives the same pairs; indexes beside shards are made, trusted, and made anew when they must be."""

from __future__ import annotations

import json
import os
import pickle
import re
import shutil
from pathlib import Path

import datasets
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import shards
from hypothesis import given, settings
from hypothesis import strategies as st

from mmkit.config import DataConfig
from mmkit.data import reading
from mmkit.data.images import ImageRef
from mmkit.data.inspect import inspect_pairs
from mmkit.data.pairs import PairSource
from mmkit.data.remote import ShardCache
from mmkit.data.sidecar import SMALLEST, SUFFIX, Omitted, Origin, make_index, read_sidecar, write_sidecar
from mmkit.data.skipped import LeftOut, SampleError
from mmkit.data.sources import SourceOptions, indexed, join_sources, open_pairs, open_training_pairs
from mmkit.data.sources.columns import follow_picture
from mmkit.data.sources.locate import expand, guess_kind
from mmkit.data.sources.tars import index_tar
from mmkit.errors import InputError

COUNT = 12


def content(source: PairSource) -> list[tuple[str, bytes]]:
    return [(pair.caption, pair.image.read()) for pair in source]


EXPECTED = [(f"caption {i}", shards.jpeg(i)) for i in range(COUNT)]


def make_parquet(path: Path, *, struct: bool, rows: int = COUNT, first: int = 0, group: int = 5) -> Path:
    pictures = [shards.jpeg(i) for i in range(first, first + rows)]
    column = [{"bytes": p, "path": None} for p in pictures] if struct else pictures
    table = pyarrow.table({"image": column, "caption": [f"caption {i}" for i in range(first, first + rows)]})
    pyarrow.parquet.write_table(table, path, row_group_size=group)
    return path


def make(kind: str, folder: Path) -> str:
    """The twelve pairs in some form; the location."""
    if kind == "tar":
        for n in range(3):
            shards.write_shard(folder / f"s-{n:03d}.tar", 4 * n, 4)
        return str(folder / "s-{000..002}.tar")
    if kind in ("parquet", "parquet-bytes"):
        make_parquet(folder / "a.parquet", struct=kind == "parquet", rows=7)
        make_parquet(folder / "b.parquet", struct=kind == "parquet", rows=5, first=7)
        return str(folder)
    for i in range(COUNT):
        (folder / f"{i:03d}.jpg").write_bytes(shards.jpeg(i))
    names = [f"{i:03d}.jpg" for i in range(COUNT)]
    if kind == "jsonl":
        for n in range(2):
            rows = [{"image": names[i], "caption": f"caption {i}"} for i in range(6 * n, 6 * n + 6)]
            (folder / f"rows-{n}.jsonl").write_text("\n".join(map(json.dumps, rows)))
        return str(folder / "rows-{0,1}.jsonl")
    if kind == "coco":
        rows = [{"image_id": i, "id": i, "caption": f"caption {i}"} for i in range(COUNT)]
        images = [{"id": i, "file_name": name} for i, name in enumerate(names)]
        (folder / "c.json").write_text(json.dumps({"images": images, "annotations": rows}))
        return str(folder / "c.json")
    if kind == "llava":
        turns = [[{"from": "human", "value": "<image>"}, {"from": "gpt", "value": f"caption {i}"}] for i in range(COUNT)]
        items = [{"id": "same", "image": names[i], "conversations": turns[i]} for i in range(COUNT)]
        (folder / "l.json").write_text(
            json.dumps([*items, {"id": "t", "conversations": [dict(turns[0][0], value="hi"), turns[0][1]]}])
        )
        return str(folder / "l.json")
    if kind == "folder":
        for i in range(COUNT):
            (folder / f"{i:03d}.txt").write_text(f"caption {i}\n")
        return str(folder)
    if kind == "metadata":
        rows = [{"file_name": names[i], "text": f"caption {i}"} for i in range(COUNT)]
        (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
        return str(folder)
    rows = {"image": [str(folder / name) for name in names], "caption": [f"caption {i}" for i in range(COUNT)]}
    made = datasets.Dataset.from_dict(rows).cast_column("image", datasets.Image())
    made.save_to_disk(folder / "saved")
    return f"hf:{folder / 'saved'}"


KINDS = ["tar", "parquet", "parquet-bytes", "jsonl", "coco", "llava", "folder", "metadata", "hf"]


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_gives_the_same_pairs(kind: str, tmp_path: Path) -> None:
    location = make(kind, tmp_path)
    source = open_pairs(location)
    assert content(source) == EXPECTED
    assert len(source) == source.layout.size == COUNT
    # Any one of them by itself, from a copy that another process would get.
    other = pickle.loads(pickle.dumps(source))
    assert [other.read(i).caption for i in (7, 0, 11)] == ["caption 7", "caption 0", "caption 11"]
    assert source.describe(7) == (source.read(7).source, source.read(7).key)
    assert len({source.describe(i) for i in range(COUNT)}) == (1 if kind == "llava-same" else COUNT)
    assert open_pairs(location).fingerprint == source.fingerprint
    # The picture's identity is its place: five captions of one picture have their features extracted once.
    assert source.read(3).image == source.read(3).image != source.read(4).image
    assert hash(source.read(3).image) == hash(other.read(3).image)
    assert content(source.take(5)) == EXPECTED[:5]


def test_a_stream_reads_the_files_behind_a_data_set(tmp_path: Path) -> None:
    make("parquet", tmp_path)
    source = open_pairs(f"hf:{tmp_path}@train", SourceOptions(streaming=True))
    assert sorted(content(source)) == sorted(EXPECTED)
    assert type(source.shards[0]).__name__ == "GroupShard"
    with pytest.raises(InputError, match=r"no split 'test'; write hf:.*@SPLIT with one of train"):
        open_pairs(f"hf:{tmp_path}@test", SourceOptions(streaming=True))
    (tmp_path / "rows").mkdir()
    (tmp_path / "rows" / "a.csv").write_text("a,b\n1,2\n")
    with pytest.raises(InputError, match=r"stored as csv, whose stream has no exact order; set data.streaming=false"):
        open_pairs(f"hf:{tmp_path / 'rows'}", SourceOptions(streaming=True))


def test_columns_have_names(tmp_path: Path) -> None:
    table = pyarrow.table({"pic": [shards.jpeg(1)], "text": ["one"]})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    source = open_pairs(str(tmp_path / "a.parquet"), SourceOptions(image="pic", caption="text"))
    assert content(source) == [("one", shards.jpeg(1))]
    with pytest.raises(InputError, match=r"no column 'image'; set data.image; there are pic, text"):
        open_pairs(str(tmp_path / "a.parquet"))
    (tmp_path / "r.jsonl").write_text('{"file": "a.jpg", "alt": "two"}\n')
    rows = open_pairs(str(tmp_path / "r.jsonl"), SourceOptions(image="file", caption="alt"))
    assert rows.read(0).caption == "two"


def test_bad_rows_of_a_table_show_when_they_are_read(tmp_path: Path) -> None:
    column = [{"bytes": shards.jpeg(0), "path": None}, {"bytes": None, "path": "/etc/hostname"}, None]
    table = pyarrow.table({"image": column, "caption": ["good", "elsewhere", None]})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    source = open_pairs(str(tmp_path / "a.parquet"))
    with pytest.raises(SampleError, match="the row has no picture"):
        source.read(1).image.read()
    with pytest.raises(SampleError, match="caption is NoneType"):
        source.read(2)
    pairs, kept, left_out = source.usable()
    assert [p.caption for p in pairs] == ["good", "elsewhere"] and kept.tolist() == [True, True, False]
    assert left_out == [LeftOut(str(tmp_path / "a.parquet"), "group 0 row 2", "caption is NoneType, not a string")]


def test_a_data_set_opens_no_file_outside_its_folder(tmp_path: Path) -> None:
    secret = tmp_path / "secret.jpg"
    secret.write_bytes(shards.jpeg(3))
    rows = {"image": [{"bytes": None, "path": str(secret)}], "caption": ["stolen"]}
    features = datasets.Features(
        {"image": {"bytes": datasets.Value("binary"), "path": datasets.Value("string")}, "caption": datasets.Value("string")}
    )
    datasets.Dataset.from_dict(rows, features=features).save_to_disk(tmp_path / "saved")
    with pytest.raises(SampleError, match=r"secret\.jpg' points outside the data folder"):
        open_pairs(f"hf:{tmp_path / 'saved'}").read(0).image.read()


def test_a_parquet_file_cut_off_is_refused(tmp_path: Path) -> None:
    path = make_parquet(tmp_path / "a.parquet", struct=True)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(InputError, match=r"a\.parquet: is no Parquet file that can be read"):
        open_pairs(str(path))


def test_row_groups_are_the_shards_of_a_parquet_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = open_pairs(str(make_parquet(tmp_path / "a.parquet", struct=False)))
    assert source.layout.parts[0].chunks.tolist() == [5, 5, 2]
    from mmkit.data.sources import columns

    monkeypatch.setattr(columns, "_HELD_BYTES", 1)
    # Not more than fits into memory is shuffled at one time; reading works whatever is held.
    small = open_pairs(str(tmp_path / "a.parquet"))
    assert small.layout.parts[0].window == 4
    assert content(small) == EXPECTED


def large_shard(folder: Path, name: str = "a.tar", first: int = 0) -> Path:
    """A shard that is worth a sidecar."""
    return shards.write_shard(folder / name, first, 4, pad=2_200_000)


def captions(source: PairSource) -> list[str]:
    return [pair.caption.split(" x")[0] for pair in source]


def test_a_sidecar_is_made_once_and_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    large_shard(tmp_path)
    assert captions(open_pairs(str(tmp_path))) == [f"caption {i}" for i in range(4)]
    assert (tmp_path / f"a.tar{SUFFIX}").is_file()
    # A scan that cannot be done shows that none is done.
    monkeypatch.setattr("mmkit.data.sources.tars.FileBytes", None)
    assert captions(open_pairs(str(tmp_path))) == [f"caption {i}" for i in range(4)]


@pytest.mark.parametrize("damage", ["cut", "empty", "other", "flipped head", "flipped body"])
def test_a_damaged_sidecar_is_made_anew(damage: str, tmp_path: Path) -> None:
    large_shard(tmp_path)
    before = captions(open_pairs(str(tmp_path)))
    path = tmp_path / f"a.tar{SUFFIX}"
    data = path.read_bytes()
    flipped = data.replace(b'"version"', b'"vErsion"')
    body = data[:-20] + bytes([data[-20] ^ 1]) + data[-19:]
    path.write_bytes({"cut": data[:-40], "empty": b"", "other": b"else\n", "flipped head": flipped, "flipped body": body}[damage])
    assert captions(open_pairs(str(tmp_path))) == before
    assert path.read_bytes() == data


def test_a_rewritten_shard_is_indexed_anew(tmp_path: Path) -> None:
    large_shard(tmp_path)
    open_pairs(str(tmp_path))
    # As many bytes as before, other content.
    large_shard(tmp_path, first=5)
    later = (tmp_path / f"a.tar{SUFFIX}").stat().st_mtime_ns + 10**9
    os.utime(tmp_path / "a.tar", ns=(later, later))
    assert captions(open_pairs(str(tmp_path)))[0] == "caption 5"


def test_a_shard_replaced_by_an_older_one_of_equal_size_is_indexed_anew(tmp_path: Path) -> None:
    large_shard(tmp_path)
    open_pairs(str(tmp_path))
    large_shard(tmp_path, first=5)
    # As mv, rsync -t and unpacking leave it.
    os.utime(tmp_path / "a.tar", ns=(10**18, 10**18))
    source = open_pairs(str(tmp_path))
    assert captions(source)[0] == "caption 5" and source.read(0).key == "000005"


def test_a_copied_set_keeps_its_indexes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "one").mkdir()
    large_shard(tmp_path / "one")
    before = captions(open_pairs(str(tmp_path / "one")))
    shutil.copytree(tmp_path / "one", tmp_path / "two", copy_function=shutil.copyfile)
    monkeypatch.setattr("mmkit.data.sources.tars.FileBytes", None)
    assert captions(open_pairs(str(tmp_path / "two"))) == before


def test_rows_under_other_keys_are_another_index(tmp_path: Path) -> None:
    rows = [{"image": "a.jpg", "caption": f"short {i}", "pad": "x" * 2000} for i in range(5000)]
    rows[:10] = [{**row, "long": f"long {i}"} for i, row in enumerate(rows[:10])]
    (tmp_path / "r.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert (tmp_path / "r.jsonl").stat().st_size > SMALLEST
    for _ in range(2):
        assert len(open_pairs(str(tmp_path / "r.jsonl"), SourceOptions(caption="long"))) == 10
        source = open_pairs(str(tmp_path / "r.jsonl"))
        assert len(source) == 5000 and source.read(4999).caption == "short 4999"


def test_where_nothing_can_be_written_the_cache_has_the_index(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    shard = large_shard(tmp_path)
    write = indexed.write_sidecar

    def read_only(path: Path, *more: object) -> None:
        if path.parent == tmp_path:
            raise OSError(30, "Read-only file system")
        write(path, *more)

    monkeypatch.setattr(indexed, "write_sidecar", read_only)
    cache = ShardCache(tmp_path / "cache", 1 << 30)
    options = SourceOptions(cache=cache)
    assert len(open_pairs(str(shard), options)) == 4
    assert not Path(f"{shard}{SUFFIX}").exists()
    assert len(list((tmp_path / "cache" / "index").iterdir())) == 1
    assert not caplog.records
    # Not in silence where the cache cannot be written either.
    monkeypatch.setattr(indexed, "write_sidecar", lambda *_: (_ for _ in ()).throw(OSError(30, "Read-only")))
    shutil.rmtree(tmp_path / "cache")
    assert len(open_pairs(str(shard), options)) == 4
    assert "it is made again at each start" in caplog.text


def test_a_set_of_shards_has_a_catalogue(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for n in range(3):
        shards.write_shard(tmp_path / f"{n}.tar", 4 * n, 4)
    shards.write_tar(tmp_path / "3.tar", [("x.jpg", shards.jpeg(0))])
    options = SourceOptions(cache=ShardCache(tmp_path / "cache", 1 << 30))
    first = open_pairs(str(tmp_path), options)
    assert content(first) == EXPECTED
    assert first.left_out == [LeftOut(str(tmp_path / "3.tar"), "x", "no .txt caption")]
    # With it no shard is opened at the start.
    monkeypatch.setattr(indexed, "_load", lambda *_: pytest.fail("a shard was opened"))
    again = open_pairs(str(tmp_path), options)
    assert (len(again), again.left_out, again.fingerprint) == (COUNT, first.left_out, first.fingerprint)
    monkeypatch.undo()
    assert content(again) == EXPECTED
    # One shard is another now.
    shards.write_shard(tmp_path / "1.tar", 4, 2)
    assert len(open_pairs(str(tmp_path), options)) == COUNT - 2
    catalogue = next((tmp_path / "cache" / "catalogues").iterdir())
    catalogue.write_text(catalogue.read_text()[:30])
    assert len(open_pairs(str(tmp_path), options)) == COUNT - 2


def test_a_catalogue_that_cannot_be_written_stops_nothing(tmp_path: Path) -> None:
    for n in range(2):
        shards.write_shard(tmp_path / f"{n}.tar", 4 * n, 4)
    # A file where its folder should be: no rights are needed to fail here.
    (tmp_path / "cache").write_text("no folder")
    assert len(open_pairs(str(tmp_path / "{0,1}.tar"), SourceOptions(cache=ShardCache(tmp_path / "cache", 1 << 30)))) == 8


def test_many_shards_are_indexed_by_all_cores_with_the_same_result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for n in range(3):
        large_shard(tmp_path, f"{n}.tar", 4 * n)
    alone = captions(open_pairs(str(tmp_path), SourceOptions(cache=ShardCache(tmp_path / "one", 1 << 30))))
    for path in tmp_path.glob(f"*{SUFFIX}"):
        path.unlink()
    monkeypatch.setattr(indexed, "_POOL_BYTES", 0)
    assert captions(open_pairs(str(tmp_path), SourceOptions(cache=ShardCache(tmp_path / "two", 1 << 30)))) == alone
    assert len(list(tmp_path.glob(f"*{SUFFIX}"))) == 3


def test_a_shard_that_breaks_off_stands_for_what_it_hides(tmp_path: Path) -> None:
    for n in range(3):
        shards.write_shard(tmp_path / f"{n}.tar", 10 * n, 10)
    whole = open_pairs(str(tmp_path))
    data = (tmp_path / "1.tar").read_bytes()
    (tmp_path / "1.tar").write_bytes(data[: len(data) // 4])
    (tmp_path / "2.tar").write_bytes(b"\x1f\x8b not a tar" * 100)
    source = open_pairs(str(tmp_path))
    assert [(row.samples, Path(row.source).name) for row in source.left_out] == [(20 - len(source), "1.tar"), (10, "2.tar")]
    # Another data set: positions mean other samples.
    assert source.fingerprint != whole.fingerprint
    (tmp_path / "0.tar").write_bytes(b"neither")
    assert [row.samples for row in open_pairs(str(tmp_path)).left_out] == [1, 1, 1]


def test_a_limit_is_no_reason_to_count_what_lies_beyond_it(tmp_path: Path) -> None:
    rows = [{"image": "a.jpg", "caption": f"c {i}" if i < 95 else ""} for i in range(100)]
    (tmp_path / "r.jsonl").write_text("\n".join(map(json.dumps, rows)))
    source = open_pairs(str(tmp_path / "r.jsonl"))
    assert (len(source.take(10)), source.take(10).unlimited, len(source.take(10).left_out)) == (10, 95, 5)
    assert join_sources([source.take(10), source.take(20)], [None, None]).unlimited == 190


def test_a_shard_changed_while_it_is_used_is_left_out(tmp_path: Path) -> None:
    shard = shards.write_shard(tmp_path / "a.tar", 0, 4)
    source = open_pairs(str(shard))
    shards.write_shard(shard, 0, 2)
    with pytest.raises(SampleError, match="the shard has changed since it was indexed"):
        source.read(0)
    shard.unlink()
    with pytest.raises(SampleError, match=r"cannot be read|has changed"):
        source.read(0)
    assert source.describe(0) == (str(shard), "sample 0")


@given(keys=st.lists(st.text(min_size=1, max_size=8), max_size=6))
@settings(deadline=None)
def test_sidecars_give_back_what_was_written(keys: list[str], tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.mktemp("sidecar") / "a"
    keys = [key.encode("utf-8", "replace").decode() for key in keys]
    size = 2**41
    left_out = [Omitted("k", "why é\n"), Omitted("j", "cut", None)]
    index = make_index(keys, left_out, offset=list(range(len(keys))), size=[2**40 + i for i in range(len(keys))])
    shard = path.with_name("shard")
    shard.write_bytes(b"one")
    origin = Origin(size, 5, "walker")
    write_sidecar(path, index, origin, shard)
    found = read_sidecar(path, origin, shard)
    assert found is not None and len(found) == len(keys)
    assert [found.key(i) for i in range(len(keys))] == keys
    assert found.left_out == left_out
    assert {k: v.tolist() for k, v in found.arrays.items()} == {k: v.tolist() for k, v in index.arrays.items()}
    for other in (origin._replace(size=size + 1), origin._replace(maker="another")):
        assert read_sidecar(path, other, shard) is None
    # Of another time: the shard itself decides, where it is at hand.
    later = origin._replace(version=6)
    assert read_sidecar(path, later, None) is None and read_sidecar(path, origin._replace(version=None), None) is not None
    assert read_sidecar(path, later, shard) is not None
    shard.write_bytes(b"two")
    assert read_sidecar(path, later, shard) is None


@pytest.mark.parametrize(
    "columns",
    [{"offset": [2**63], "size": [1]}, {"offset": [0], "size": [2**40]}, {"offset": [90], "size": [2**64 - 50]}, {"offset": [1]}],
)
def test_an_index_that_leads_out_of_its_shard_is_not_used(columns: dict[str, list[int]], tmp_path: Path) -> None:
    # Those beside remote shards are other people's.
    origin = Origin(100, 1, "walker")
    write_sidecar(tmp_path / "a", make_index(["k"], [], **columns), origin, None)
    assert read_sidecar(tmp_path / "a", origin, None) is None
    (tmp_path / "a").write_bytes(b"mmkit-index\n" + b"[" * 200_000 + b"\n")
    assert read_sidecar(tmp_path / "a", origin, None) is None


def test_compressed_shards_are_refused_with_the_reason(tmp_path: Path) -> None:
    import gzip

    path = shards.write_shard(tmp_path / "a.tar", 0, 1)
    path.write_bytes(gzip.compress(path.read_bytes()))
    with pytest.raises(InputError, match="compressed\\? a shard must not be"):
        open_pairs(str(path))


def test_kinds_by_name(tmp_path: Path) -> None:
    (tmp_path / "l.json").write_text(' [{"id": 1}]')
    (tmp_path / "c.json").write_text('{"images": []}')
    found = {name: guess_kind(str(tmp_path / name)) for name in ("l.json", "c.json", "a.jsonl", "a.parquet", "a-{0..3}.tar")}
    assert found == {
        "l.json": "llava",
        "c.json": "coco",
        "a.jsonl": "pairs",
        "a.parquet": "parquet",
        "a-{0..3}.tar": "webdataset",
    }
    assert guess_kind("hf:a/b@train") == "hf"
    assert guess_kind("hf://datasets/a/b/x.parquet") == "parquet"
    assert guess_kind("https://host/{00..09}.tar") == "webdataset"


def test_braces_as_a_shell_writes_them_out(tmp_path: Path) -> None:
    for name in ("a0/x-08.tar", "a0/x-09.tar", "b/x-08.tar", "b/x-09.tar", "b/x-10.tar"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    found = expand(str(tmp_path / "{a0,b}/x-{08..09}.tar"), ".tar")
    assert [str(Path(f).relative_to(tmp_path)) for f in found] == ["a0/x-08.tar", "a0/x-09.tar", "b/x-08.tar", "b/x-09.tar"]
    assert len(expand(str(tmp_path / "{a0,b}/*.tar"), ".tar")) == 5
    assert len(expand(str(tmp_path / "{a0,b}"), ".tar")) == 5
    assert expand("s3://bucket/{0..1}.tar", ".tar") == ["s3://bucket/0.tar", "s3://bucket/1.tar"]
    odd = tmp_path / "odd{1..2}.tar"
    odd.write_bytes(b"")
    assert expand(str(odd), ".tar") == [str(odd)]


def data(train: object, **more: object) -> DataConfig:
    return DataConfig.model_validate({"train": train, **more})


def test_several_sources_of_a_recipe(tmp_path: Path) -> None:
    for name in ("tars", "rows"):
        (tmp_path / name).mkdir()
    tars, rows = make("tar", tmp_path / "tars"), make("jsonl", tmp_path / "rows")
    both = open_training_pairs(data([tars, rows]))
    assert content(both) == EXPECTED + EXPECTED and len(both.layout.parts) == 1
    weighted = open_training_pairs(data([{"path": tars, "weight": 3}, {"path": rows, "weight": 1}], limit=5))
    assert content(weighted) == EXPECTED[:5] + EXPECTED[:5]
    assert [(p.size, p.weight) for p in weighted.layout.parts] == [(5, 3.0), (5, 1.0)]
    assert weighted.describe(7)[1].startswith("rows-0.jsonl:3")
    assert join_sources([both], [None]) is both
    with pytest.raises(ValueError, match="a weight, or none of them"):
        data([{"path": tars, "weight": 3}, rows])
    with pytest.raises(ValueError, match="empty list"):
        data([])
    with pytest.raises(ValueError, match="weight 1 is less than a ten-thousandth of all"):
        data([{"path": tars, "weight": 20000}, {"path": rows, "weight": 1}])


def test_keys_of_the_section_hold_for_its_sources(tmp_path: Path) -> None:
    config = data([{"path": "a", "type": "coco"}, {"path": "b", "image_root": "r2"}], type="pairs", image_root="r1")
    assert [(s.type, s.image_root) for s in config.sources] == [("coco", "r1"), ("pairs", "r2")]
    window = open_training_pairs(data(make("tar", tmp_path), shuffle_window=3)).layout.parts[0].window
    assert window == 3


def test_disks_that_hiccup_are_asked_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[float] = []
    monkeypatch.setattr(reading, "_given_up", reading.GivenUp())
    monkeypatch.setattr(reading.time, "sleep", waits.append)
    tries: list[int] = []

    def work(fails: int, number: int) -> bytes:
        tries.append(1)
        if len(tries) <= fails:
            raise OSError(number, os.strerror(number))
        return b"read"

    assert reading.with_retries(lambda: work(2, 5), "a") == b"read" and waits == [0.5, 2.0]
    tries.clear()
    with pytest.raises(SampleError, match=r"cannot be read, also at try 4 \(Input/output error\)"):
        reading.with_retries(lambda: work(9, 5), "b")
    tries.clear()
    # Its other samples do not wait again, and other files are read.
    with pytest.raises(SampleError, match="also at try 4"):
        reading.with_retries(lambda: work(0, 5), "b")
    assert tries == [] and reading.with_retries(lambda: work(0, 5), "c") == b"read"
    tries.clear()
    waits.clear()
    # What is there to stay is not waited for.
    with pytest.raises(SampleError, match="No such file"):
        reading.with_retries(lambda: work(9, 2), "d")
    assert waits == []
    with pytest.raises(SampleError, match="cannot be read"):
        ImageRef(str(tmp_path / "none.tar"), 5, 5).read()


def test_more_shards_than_a_process_may_have_open(tmp_path: Path) -> None:
    for n in range(reading._OPEN_FILES + 5):
        shards.write_shard(tmp_path / f"{n:04d}.tar", n, 1)
    source = open_pairs(str(tmp_path))
    for _ in range(2):
        assert [pair.caption for pair in source] == [f"caption {n}" for n in range(len(source))]
    assert len(reading._files._open) <= reading._OPEN_FILES


def test_an_index_is_arrays_not_objects(tmp_path: Path) -> None:
    index = index_tar(shards.write_shard(tmp_path / "a.tar", 0, 50))
    assert {a.dtype for a in index.arrays.values()} == {np.dtype("uint64"), np.dtype("uint8")}
    assert sum(a.nbytes for a in index.arrays.values()) == 50 * (5 * 8 + 6)


def test_what_is_no_file_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.jpg")
    for name, why in (("pipe.jpg", "a pipe or a device"), ("", "Is a directory")):
        with pytest.raises(SampleError, match=why):
            ImageRef(str(tmp_path / name)).read()
    (tmp_path / "zero.jpg").symlink_to("/dev/zero")
    with pytest.raises(SampleError, match="a pipe or a device"):
        ImageRef(str(tmp_path / "zero.jpg")).read()


def test_a_book_is_no_caption(tmp_path: Path) -> None:
    members = [("0.jpg", b"x"), ("0.txt", b"word " * 300_000), ("1.jpg", b"x"), ("1.txt", b"good")]
    source = open_pairs(str(shards.write_tar(tmp_path / "a.tar", members)))
    assert [p.key for p in source] == ["1"]
    assert source.left_out[0].reason == "caption: 1500000 bytes are over the limit of 1048576"


def test_shards_beside_tables_of_their_metadata(tmp_path: Path) -> None:
    # As img2dataset leaves them.
    for n in range(4):
        shards.write_shard(tmp_path / f"{n:05d}.tar", n, 1)
        (tmp_path / f"{n:05d}.parquet").write_bytes(b"PAR1")
    assert guess_kind(str(tmp_path)) == "webdataset" and len(open_pairs(str(tmp_path))) == 4


def test_a_table_written_anew_is_read_anew_and_by_other_columns(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    for text in ("one", "changed"):
        pyarrow.parquet.write_table(pyarrow.table({"image": [b"x"], "caption": [text], "alt": ["other"]}), path)
        assert open_pairs(str(path)).read(0).caption == text
        assert open_pairs(str(path), SourceOptions(caption="alt")).read(0).caption == "other"


def test_samples_are_told_apart_by_their_shards(tmp_path: Path) -> None:
    for n in range(2):
        shards.write_tar(tmp_path / f"{n}.tar", [("0.jpg", b"x"), ("0.txt", b"same key")])
    assert [p.name for p in open_pairs(str(tmp_path))] == ["0.tar:0", "1.tar:0"]
    (tmp_path / "r.jsonl").write_text('{"image": "a.jpg", "caption": "x"}')
    assert open_pairs(str(tmp_path / "r.jsonl")).read(0).name == "r.jsonl:1 a.jpg"


@pytest.mark.parametrize(
    ("location", "message"),
    [
        ("/data/{" + ",".join(map(str, range(10_000, 10_060))) + "}.tar", "60 shards are missing, the first is /data/10000.tar"),
        ("hf:", "no name after hf:"),
        ("http://127.0.0.1:9/captions.json", "names pictures on a disk; fetch it with them"),
        ("http://127.0.0.1:9/rows.jsonl", "names pictures on a disk; fetch it with them"),
    ],
)
def test_odd_locations_are_wrong_input(location: str, message: str) -> None:
    with pytest.raises(InputError, match=re.escape(message)):
        open_pairs(location)


def test_odd_names_in_a_folder(tmp_path: Path) -> None:
    odd = os.fsencode(tmp_path) + b"/caf\xe9"
    Path(os.fsdecode(odd + b".jpg")).write_bytes(shards.jpeg(1))
    Path(os.fsdecode(odd + b".txt")).write_text("latin")
    source = open_pairs(str(tmp_path))
    assert content(source) == [("latin", shards.jpeg(1))] and source.fingerprint
    (tmp_path / "gone.tar").symlink_to(tmp_path / "nowhere.tar")
    with pytest.raises(InputError, match=r"gone\.tar: cannot be looked at \(No such file or directory\); mend the link"):
        open_pairs(str(tmp_path))


def test_a_column_of_lists_is_refused_at_the_start(tmp_path: Path) -> None:
    datasets.Dataset.from_dict({"image": [b"x"], "caption": [["one", "two"]]}).save_to_disk(tmp_path / "saved")
    with pytest.raises(InputError, match=r"column 'caption' holds List.*, no texts; set data.caption"):
        open_pairs(f"hf:{tmp_path / 'saved'}")


def test_files_named_by_a_data_set_are_names(tmp_path: Path) -> None:
    for odd in ("a\0b", 5):
        with pytest.raises(SampleError, match="is no file name"):
            follow_picture({"bytes": None, "path": odd}, (tmp_path,))


def test_faults_in_a_list_of_sources_are_told_as_such() -> None:
    negative = [{"path": "a", "weight": -1}, {"path": "b", "weight": 1}]
    for train, told in (([{"path": "a", "weigth": 1}], "weigth"), (negative, "weight")):
        with pytest.raises(ValueError) as caught:
            data(train)
        assert told in str(caught.value) and "valid string" not in str(caught.value)
    with pytest.raises(ValueError, match="a weight is a share among several data sets: leave it out"):
        data([{"path": "a", "weight": 1}])


def test_messages_are_pairs_by_their_first_answer_about_a_picture(tmp_path: Path) -> None:
    for i in range(3):
        (tmp_path / f"{i}.jpg").write_bytes(shards.jpeg(i))
    picture = {"type": "image"}

    def row(key: str, *talk: object, images: list[str]) -> dict[str, object]:
        roles = ["user", "assistant"] * (len(talk) // 2)
        return {"id": key, "images": images, "messages": [{"role": r, "content": c} for r, c in zip(roles, talk, strict=True)]}

    rows = [
        row("plain", [picture, {"type": "text", "text": "What?"}], "a dog\nin a park", images=["0.jpg"]),
        row("late", "Hi", "Hello", [picture], "a cat", images=["1.jpg"]),
        row("two", [picture, picture], "both", images=["0.jpg", "1.jpg"]),
        row("text", "Hi", "Hello", images=[]),
        row("gone", [picture], "x", images=["9.jpg"]),
    ]
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    source = open_pairs(str(path), SourceOptions(kind="messages"))
    assert [(pair.key, pair.caption) for pair in source] == [("plain", "a dog in a park"), ("late", "a cat")]
    reasons = {row.key: row.reason for row in source.left_out}
    assert reasons == {"two": "2 pictures", "text": "no picture", "gone": "no such picture: 9.jpg"}
    found = inspect_pairs(str(path), options=SourceOptions(kind="messages"), workers=1)
    assert (found.pairs, found.skipped.total) == (2, 3)
    # Rows of tables: pictures are bytes, and what is wrong with one shows when it is read.
    table = pyarrow.table(
        {
            "messages": [row("", "Hi", "Hello", "<image>", "a cat", images=[])["messages"]] * 2,
            "images": [[{"bytes": shards.jpeg(i), "path": None}] * i for i in (1, 2)],
        }
    )
    pyarrow.parquet.write_table(table, tmp_path / "t.parquet")
    source = open_pairs(str(tmp_path / "t.parquet"), SourceOptions(kind="messages"))
    assert [(pair.key, pair.caption, pair.image.read()) for pair in source] == [("row 0", "a cat", shards.jpeg(1))]
    assert [row.key for row in source.left_out] == ["row 1"]
