"""`mmkit data pack`: what the shards hold, equal bytes from any number of processes, going on after an interruption."""

from __future__ import annotations

import io
import json
import os
import shutil
import tarfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import mmkit.data.pack
from mmkit.data.images import decode_image
from mmkit.data.pack import PackOptions, index_shards, pack, pack_pairs
from mmkit.data.sidecar import SMALLEST
from mmkit.data.sources import SourceOptions, open_pairs
from mmkit.data.sources.tars import FileBytes
from mmkit.errors import InputError

BAD = ("truncated.jpg", "zero_bytes.jpg", "text_named.jpg")


@pytest.fixture
def folder(shared: Path, tmp_path: Path) -> Path:
    """Ten pairs: three bad ones, which come last and fill a shard of three, and one without a caption."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    for i, path in enumerate(sorted((shared / "coco-mini/images/val").iterdir())[:4]):
        shutil.copy(path, folder / f"{i}.jpg")
    for name in ("gray16.png", "exif_rotated.jpg", *BAD):
        shutil.copy(shared / "broken" / name, folder / name)
    Image.new("RGB", (20, 10), "red").save(folder / "scan.tiff")
    (folder / "scan.tiff").rename(folder / "scan.bmp")  # its name lies
    for path in list(folder.iterdir()):
        path.with_suffix(".txt").write_text(f"a picture\nnamed {path.stem}")
    (folder / "3.txt").unlink()
    return folder


def content(out: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(out.iterdir()) if path.is_file()}


def members(shard: Path) -> dict[str, bytes]:
    with tarfile.open(shard) as tar:
        return {member.name: tar.extractfile(member).read() for member in tar}  # type: ignore[union-attr]


def refused(*arguments: Any, **more: Any) -> str:
    with pytest.raises(InputError) as caught:
        pack(*arguments, **more)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_shards_hold_every_usable_sample(folder: Path, tmp_path: Path) -> None:
    found = pack_pairs(str(folder), tmp_path / "out", PackOptions(shard_size=4), workers=1)
    assert (found.samples, found.shards, found.skipped.total) == (6, 2, 4)
    assert set(content(tmp_path / "out")) == {"00000.tar", "00001.tar", "pack.json", "skipped.jsonl"}
    assert not (tmp_path / "out/.pack").exists()
    before, after = open_pairs(str(folder)), open_pairs(str(tmp_path / "out"))
    sound = {}
    for index, one in enumerate(before):
        if Path(one.key).name not in BAD:
            sound[f"{index:09d}"] = one
    assert [one.key for one in after] == list(sound)
    for one in after:
        original = sound[one.key]
        assert one.caption == original.caption == original.caption.replace("\n", " ")
        about = json.loads(members(Path(one.source))[f"{one.key}.json"])
        size = decode_image(original.image.read()).size
        assert about == {"source": str(folder), "key": original.key, "width": size[0], "height": size[1]}
        if original.key != "scan.bmp":
            assert one.image.read() == original.image.read()
        assert np.array_equal(decode_image(one.image.read()), decode_image(original.image.read()))
    rows = [json.loads(line) for line in (tmp_path / "out/skipped.jsonl").read_text().splitlines()]
    assert {row["key"] for row in rows} == {*BAD, "3.jpg"} and all(row["source"] == str(folder) for row in rows)
    names = [name for shard in sorted((tmp_path / "out").glob("*.tar")) for name in members(shard)]
    assert len(names) == len(set(names)) == 18 and "000000005.png" in names
    # A TIFF goes in as PNG, whatever it was called; shards have no other suffixes than readers know.
    assert {Path(name).suffix for name in names} == {".jpg", ".png", ".txt", ".json"}


def test_equal_bytes_from_any_number_of_processes_and_at_any_time(folder: Path, tmp_path: Path) -> None:
    options = PackOptions(shard_size=3, max_side=100, quality=70)
    pack_pairs(str(folder), tmp_path / "1", options, workers=1)
    os.utime(folder / "0.jpg", (time.time() + 99, time.time() + 99))
    pack_pairs(str(folder), tmp_path / "2", options, workers=2)
    one, two = content(tmp_path / "1"), content(tmp_path / "2")
    # The record tells by times which pictures were packed; nothing else knows of any.
    records = [json.loads(found.pop("pack.json")) for found in (one, two)]
    assert records[0]["settings"].pop("pictures") != records[1]["settings"].pop("pictures")
    assert one == two and records[0] == records[1]
    with tarfile.open(tmp_path / "1/00000.tar") as tar:
        assert {(m.mtime, m.uid, m.gid, m.uname, m.mode) for m in tar} == {(0, 0, 0, "", 0o644)}


def test_max_side_makes_large_pictures_smaller_and_leaves_small_ones(folder: Path, tmp_path: Path) -> None:
    pack(str(folder), tmp_path / "a", max_side=100)
    pack(str(folder), tmp_path / "b", max_side=100, quality=20)
    pack(str(folder), tmp_path / "c", limit=2)
    good, bad = members(tmp_path / "a/00000.tar"), members(tmp_path / "b/00000.tar")
    assert max(Image.open(io.BytesIO(good["000000000.jpg"])).size) == 100
    assert len(bad["000000000.jpg"]) < len(good["000000000.jpg"])
    assert good["000000004.png"] == bad["000000004.png"] == (folder / "gray16.png").read_bytes()
    about = json.loads(good["000000000.json"])
    assert (about["width"], about["height"]) == Image.open(io.BytesIO(good["000000000.jpg"])).size
    assert len(members(tmp_path / "c/00000.tar")) == 6


def test_an_interrupted_pack_goes_on(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, out = tmp_path / "whole", tmp_path / "out"
    pack_pairs(str(folder), whole, PackOptions(shard_size=3), workers=1)
    shrink, calls = mmkit.data.pack.shrink, []

    def interrupted(data: bytes, options: PackOptions) -> Any:
        calls.append(1)
        if len(calls) == 5:
            raise KeyboardInterrupt
        return shrink(data, options)

    monkeypatch.setattr(mmkit.data.pack, "shrink", interrupted)
    with pytest.raises(KeyboardInterrupt):
        pack_pairs(str(folder), out, PackOptions(shard_size=3), workers=1)
    assert set(content(out)) == {"00000.tar", "pack.json"} and not list((out / ".pack").glob("*.part"))
    stamp = (out / "00000.tar").stat().st_mtime_ns
    # Other settings, other data: refused as long as the folder is not whole, and afterwards.
    assert "shard_size 3, now 4" in refused(str(folder), out, shard_size=4)
    found = pack_pairs(str(folder), out, PackOptions(shard_size=3), workers=1)
    assert (found.samples, found.shards, found.skipped.total) == (6, 2, 4)
    assert content(out) == content(whole) and (out / "00000.tar").stat().st_mtime_ns == stamp
    assert len(calls) < 5 + 9


def test_a_finished_pack_returns_at_once_and_mends_a_lost_shard(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    first = pack(str(folder), out, shard_size=3, workers=1)
    before = content(out)
    with monkeypatch.context() as patched:
        patched.setattr(mmkit.data.pack, "map_in_order", None)
        again = pack(str(folder), out, shard_size=3)
    assert again.lines() == first.lines() and content(out) == before
    (out / "00001.tar").write_bytes(b"cut")
    assert pack(str(folder), out, shard_size=3, workers=1).lines() == first.lines()
    assert content(out) == before and not (out / ".pack").exists()


def test_what_is_refused(folder: Path, shared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data, out = str(folder), tmp_path / "out"
    (tmp_path / "file").touch()
    (tmp_path / "full").mkdir()
    (tmp_path / "full/mine.txt").touch()
    assert "is a file, not a folder" in refused(data, tmp_path / "file")
    assert "the folder is not empty" in refused(data, tmp_path / "full")
    assert "--max-side" in refused(data, out, quality=50)
    assert "only tar shards have an index, this is folder; give --out" in refused(data, None)
    shard = str(shared / "broken/odd_captions.tar")
    assert "only tar shards" in refused(shard, None, reading=SourceOptions("parquet"))
    for option in ("shard_size", "max_side", "limit"):
        assert f"--{option.replace('_', '-')} has no effect" in refused(shard, None, **{option: 5})
    assert "leave the keys out" in refused(shard, None, reading=SourceOptions(caption="text"))
    assert not out.exists()


@pytest.mark.parametrize("place", ["write_json", "fsync"])
def test_a_full_disk_is_one_line_and_leaves_nothing_half_written(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    def full(*arguments: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(*((mmkit.data.pack, place) if place == "write_json" else (os, place)), full)
    message = refused(str(folder), tmp_path / "out", workers=1)
    # Named with the file or the folder, whichever was being written.
    assert str(tmp_path / "out") in message and "cannot be written (No space left on device); " in message
    assert "room" in message or "free some space" in message
    assert content(tmp_path / "out") == {} and [path.name for path in (tmp_path / "out/.pack").iterdir()] == ["lock"]
    monkeypatch.undo()
    assert pack(str(folder), tmp_path / "out", workers=1).samples == 6


def test_two_packs_do_not_write_into_one_folder(folder: Path, tmp_path: Path) -> None:
    with mmkit.data.pack._claimed(tmp_path / "out", {}):
        assert "another process packs into this folder" in refused(str(folder), tmp_path / "out")


def test_names_of_the_data_never_become_paths(shared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    work = tmp_path / "a/b"
    work.mkdir(parents=True)
    monkeypatch.chdir(work)
    found = pack(str(shared / "broken/shard_unsafe_names.tar"), Path("out"), workers=1)
    assert found.samples == 5
    assert {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()} == {
        "a/b/out/00000.tar", "a/b/out/pack.json", "a/b/out/skipped.jsonl",
    }  # fmt: skip
    inside = members(work / "out/00000.tar")
    assert all(name.split(".")[0].isdigit() for name in inside)
    keys = [json.loads(data)["key"] for name, data in inside.items() if name.endswith(".json")]
    assert keys == ["00000", "/abs/00001", "../00002", "nested/../../00003", "00004"]


def test_rows_that_climb_out_are_left_out(shared: Path, tmp_path: Path) -> None:
    found = pack(str(shared / "broken/pairs_bad_rows.jsonl"), tmp_path / "out", workers=1)
    assert found.samples == 1 and found.skipped.total == 10
    rows = [json.loads(line) for line in (tmp_path / "out/skipped.jsonl").read_text().splitlines()]
    assert sum("outside the data folder" in row["reason"] for row in rows) == 2


def make_large(path: Path) -> Path:
    """A shard large enough for a sidecar: noise does not compress."""
    rng = np.random.default_rng(0)
    path.mkdir()
    for i in range(6):
        Image.fromarray(rng.integers(0, 256, (800, 800, 3), dtype=np.uint8)).save(path / f"{i}.png")
        (path / f"{i}.txt").write_text(f"noise {i}")
    return path


def test_sidecars_are_written_where_they_are_read(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MMKIT_CACHE", str(tmp_path / "cache"))
    large = make_large(tmp_path / "large")
    pack(str(large), tmp_path / "out", shard_size=5, workers=1)
    sizes = {path.name: path.stat().st_size for path in (tmp_path / "out").glob("*.tar")}
    assert sizes["00000.tar"] >= SMALLEST > sizes["00001.tar"]
    assert [path.name for path in (tmp_path / "out").glob("*.mmkit")] == ["00000.tar.mmkit"]
    walked: list[Path] = []

    def walk(path: Path) -> FileBytes:
        walked.append(path)
        return FileBytes(path)

    monkeypatch.setattr("mmkit.data.sources.tars.FileBytes", walk)
    assert [one.caption for one in open_pairs(str(tmp_path / "out"))] == [f"noise {i}" for i in range(6)]
    assert {path.name for path in walked} == {"00001.tar"}


def test_missing_sidecars_are_made(tmp_path: Path, shared: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MMKIT_CACHE", str(tmp_path / "cache"))
    pack(str(make_large(tmp_path / "large")), tmp_path / "out", shard_size=5, workers=1)
    shutil.copy(shared / "broken/shard_missing_pair.tar", tmp_path / "out/00002.tar")
    sidecar = tmp_path / "out/00000.tar.mmkit"
    before = sidecar.read_bytes()
    for workers in (1, 2):
        sidecar.unlink()
        found = index_shards(str(tmp_path / "out"), workers=workers)
        assert (found.samples, found.shards, found.skipped.total) == (9, 3, 2)
        assert sidecar.read_bytes() == before
    # pack.json is not asked: these are shards like any others.
    assert pack(str(tmp_path / "out"), None, workers=1).lines()[:3] == ["samples: 9", "shards: 3", "left out: 2"]


def test_a_changed_picture_is_packed_again(folder: Path, tmp_path: Path) -> None:
    pack(str(folder), tmp_path / "out", workers=1)
    picture = sorted(folder.glob("*.png"))[0] if list(folder.glob("*.png")) else sorted(folder.rglob("*.jpg"))[0]
    Image.new("RGB", (9, 9), (1, 2, 3)).save(picture)
    message = refused(str(folder), tmp_path / "out")
    assert "pictures" in message
    with pytest.raises(InputError, match="limit 0 leaves no pair"):
        pack(str(folder), tmp_path / "other", limit=0)
