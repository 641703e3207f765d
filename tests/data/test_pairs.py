"""Pair sources: JSON lines, COCO captions and tar shards, each with its broken kin."""

from __future__ import annotations

import json
import tarfile
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from shards import write_tar

from mmkit.data.images import decode_image
from mmkit.data.pairs import PairSource, clean_caption, safe_image_path
from mmkit.data.skipped import LeftOut, SampleError
from mmkit.data.sources import SourceOptions, open_pairs
from mmkit.data.sources.locate import expand
from mmkit.errors import InputError

ODD_ON_ONE_LINE = ["carriage_return", "crlf", "newline", "line_separator", "paragraph_separator", "next_line", "nul"]


def opened(shared: Path, name: str, **more: str) -> PairSource:
    return open_pairs(str(shared / "broken" / name), SourceOptions(**more))


def refused(shared: Path, name: str) -> str:
    with pytest.raises(InputError) as caught:
        opened(shared, name)
    message = str(caught.value)
    assert name in message
    assert "\n" not in message
    return message


def reasons(source: PairSource) -> dict[str, str]:
    assert len({(o.source, o.key) for o in source.left_out}) == len(source.left_out)
    return {o.key: o.reason for o in source.left_out}


def pair(key: str, caption: str = "a dog") -> list[tuple[str, bytes]]:
    return [(f"{key}.jpg", b"jpeg " + key.encode()), (f"{key}.txt", caption.encode())]


def test_coco_mini_in_both_formats(shared: Path) -> None:
    rows = open_pairs(str(shared / "coco-mini" / "pairs_train.jsonl"))
    images = SourceOptions(image_root=str(shared / "coco-mini" / "images" / "train"))
    coco = open_pairs(str(shared / "coco-mini" / "captions_train.json"), images)
    assert (len(rows.pairs), len(rows.left_out), len(coco.pairs), len(coco.left_out)) == (400, 0, 400, 0)
    assert {(p.image.path, p.caption) for p in rows.pairs} == {(p.image.path, p.caption) for p in coco.pairs}
    assert decode_image(coco.pairs[0].image.read()).width <= 640
    assert len({p.key for p in rows.pairs}) == len({p.key for p in coco.pairs}) == 400


def test_bad_line_is_left_out_by_number(shared: Path) -> None:
    source = opened(shared, "pairs_bad_line.jsonl")
    assert [p.caption for p in source.pairs] == [f"line {n}" for n in (1, 2, 3, 5, 6, 7)]
    assert list(reasons(source)) == ["pairs_bad_line.jsonl:4"]


def test_bad_rows_each_with_its_reason(shared: Path) -> None:
    source = opened(shared, "pairs_bad_rows.jsonl")
    expected = {
        6: "outside",
        7: "outside",
        8: "image is missing",
        9: "caption is NoneType",
        10: "caption is int",
        11: "is a list",
    }
    found = reasons(source)
    assert list(found) == [f"pairs_bad_rows.jsonl:{n}" for n in expected]
    assert all(part in reason for part, reason in zip(expected.values(), found.values(), strict=True))
    usable = []
    for one in source.pairs:  # missing, cut, empty and non-picture files show when they are read
        try:
            decode_image(one.image.read())
            usable.append(one.caption)
        except SampleError:
            pass
    assert len(source.pairs) == 5
    assert usable == ["fine"]


def test_line_ends_and_byte_order_mark(shared: Path) -> None:
    assert [p.caption for p in opened(shared, "pairs_no_final_newline.jsonl").pairs] == ["first", "last, with no line end"]
    assert [p.caption for p in opened(shared, "pairs_with_bom.jsonl").pairs] == ["after a byte order mark", "second"]


def test_empty_and_missing_are_refused(shared: Path) -> None:
    assert "no usable sample" in refused(shared, "pairs_empty.jsonl")
    assert "no such file" in refused(shared, "pairs_none.jsonl")
    assert "the shard is empty" in refused(shared, "shard_empty.tar")
    assert "no such file" in refused(shared, "shard_none.tar")
    with pytest.raises(InputError, match="holds no image-text pairs; use webdataset, parquet, pairs"):
        opened(shared, "pairs_with_bom.jsonl", kind="scrolls")


def test_odd_captions_are_20_rows_on_one_line_each(shared: Path) -> None:
    source = opened(shared, "odd_captions.jsonl")
    assert len(source.pairs) + len(source.left_out) == 20
    assert set(reasons(source).values()) == {"caption is empty"}
    assert list(reasons(source)) == ["odd_captions.jsonl:11", "odd_captions.jsonl:12"]
    rows = [json.loads(line) for line in (shared / "broken/odd_captions.jsonl").read_bytes().split(b"\n") if line]
    keys = [row["key"] for row in rows if row["key"] not in ("empty", "blank")]
    by_key = {key: p.caption for key, p in zip(keys, source.pairs, strict=True)}
    assert {" ".join(by_key[key].split()) for key in ODD_ON_ONE_LINE} == {"a dog on a table"}
    assert all(len(caption.splitlines()) == 1 for caption in by_key.values())
    assert len(by_key["long_20000"]) == 20_000
    assert by_key["special_tokens"] == "<|startoftext|>a dog<|endoftext|> </s> <image> <pad> [INST]"
    assert by_key["lone_surrogate_escape"] == "a dog ? on a table"
    "".join(by_key.values()).encode("utf-8")


def test_invalid_utf8_is_named_by_line_and_byte(shared: Path) -> None:
    source = opened(shared, "odd_captions_invalid_utf8.jsonl")
    assert [p.caption for p in source.pairs] == ["a dog on a table", "two dogs on a table"]
    found = reasons(source)
    assert list(found) == [f"odd_captions_invalid_utf8.jsonl:{n}" for n in (2, 3, 4, 5)]
    lines = (shared / "broken/odd_captions_invalid_utf8.jsonl").read_bytes().split(b"\n")
    assert found["odd_captions_invalid_utf8.jsonl:2"] == f"invalid UTF-8 at byte {lines[1].index(0xE9)}"


def test_odd_rows_that_once_crashed(tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    good = '{"image": "a.jpg", "caption": "x"}'
    path.write_text(
        "\n".join([r'{"image": "a\u0000.jpg", "caption": "x"}', r'{"image": "\ud83d.jpg", "caption": "x"}', "[" * 10**5, good])
    )
    source = open_pairs(str(path))
    assert len(source.pairs) == 1
    assert list(reasons(source)) == ["p.jsonl:1", "p.jsonl:2", "p.jsonl:3"]


def test_sound_coco_file(shared: Path) -> None:
    source = opened(shared, "captions_good.json")
    assert len(source.pairs) == 12
    assert source.pairs[0].key == "captions_good.json#102 000000000001.jpg"
    assert source.pairs[0].image.path == str(shared / "broken" / "000000000001.jpg")


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("captions_cut.json", ["captions_cut.json:", "line ", "column ", "looks cut off"]),
        ("captions_unknown_image_ids.json", ["999, 1000"]),
        ("captions_wrong_fields.json", ["annotation 107", '"caption"', "annotation 108", "'4'", "annotation 109", "None"]),
    ],
)
def test_broken_coco_files_are_refused_by_name(shared: Path, name: str, parts: list[str]) -> None:
    message = refused(shared, name)
    assert message.startswith(str(shared / "broken" / name))
    assert all(part in message for part in parts)


def test_coco_rows_without_id_or_file_name(tmp_path: Path) -> None:
    images = [{"id": 1, "file_name": "a.jpg"}, {"id": 2}, {"id": 3, "file_name": "../c.jpg"}]
    rows = [{"image_id": i, "caption": "x"} for i in (1, 2, 3)] + [{"image_id": 1, "id": 9, "caption": " "}]
    path = tmp_path / "c.json"
    path.write_text(json.dumps({"images": images, "annotations": rows}))
    source = open_pairs(str(path))
    assert [p.key for p in source.pairs] == ["c.json#row 1 a.jpg"]
    assert reasons(source) == {
        "c.json#row 2": "image is missing",
        "c.json#row 3": "image '../c.jpg' points outside the data folder",
        "c.json#9": "caption is empty",
    }


def test_truncated_shard_gives_the_whole_samples(shared: Path) -> None:
    for _ in range(2):
        source = opened(shared, "shard_truncated.tar")
        assert [p.key for p in source.pairs] == ["00000", "00001", "00002", "00003"]
        assert reasons(source) == {"00004": "the shard is cut off here"}
        assert source.left_out[0].source.endswith("shard_truncated.tar")
    assert all(decode_image(p.image.read()) for p in source.pairs)


def test_pictures_and_texts_are_never_mixed_up(shared: Path) -> None:
    source = opened(shared, "shard_missing_pair.tar")
    assert [p.key for p in source.pairs] == ["00000", "00002", "00004"]
    assert reasons(source) == {"00001": "no .txt caption", "00003": "no picture"}
    with tarfile.open(shared / "broken/shard_missing_pair.tar") as tar:
        for p in source.pairs:
            assert p.image.read() == tar.extractfile(f"{p.key}.jpg").read()  # type: ignore[union-attr]
            assert p.caption == tar.extractfile(f"{p.key}.txt").read().decode()  # type: ignore[union-attr]


def test_unsafe_names_are_read_in_place(shared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    source = opened(shared, "shard_unsafe_names.tar")
    assert [p.key for p in source.pairs] == ["00000", "/abs/00001", "../00002", "nested/../../00003", "00004"]
    assert {p.image.path for p in source.pairs} == {str(shared / "broken/shard_unsafe_names.tar")}
    assert list(tmp_path.iterdir()) == []


def test_duplicate_keys_are_reported_not_merged(shared: Path) -> None:
    source = opened(shared, "shard_duplicate_keys.tar")
    assert [p.key for p in source.pairs] == ["00000", "00001"]
    assert {o.key for o in source.left_out} <= {"00000.jpg", "00000.txt"}
    assert all("key 00000 comes twice" in o.reason for o in source.left_out)
    with tarfile.open(shared / "broken/shard_duplicate_keys.tar") as tar:
        first = tar.next()
        assert first is not None
        assert source.pairs[0].image.size == first.size


def test_bad_pictures_in_a_shard(shared: Path) -> None:
    source = opened(shared, "shard_bad_image.tar")
    bad = {}
    for p in source.pairs:
        try:
            decode_image(p.image.read())
        except SampleError as error:
            bad[p.key] = str(error)
    assert set(bad) == {"00001", "00003"}
    assert bad["00003"] == "the file is empty"


def test_odd_captions_in_a_shard(shared: Path) -> None:
    source = opened(shared, "odd_captions.tar")
    assert len(source.pairs) + len(source.left_out) == 22
    assert source.pairs[-1].caption == "the last caption"
    found = reasons(source)
    assert [key for key, reason in found.items() if reason == "caption is empty"] == ["00010", "00011"]
    assert found["00019"] == "caption: invalid UTF-8 at byte 5"
    assert found["00020"] == "caption: invalid UTF-8 at byte 2"
    texts = {p.key: p.caption for p in source.pairs}
    assert texts["00000"] == texts["00002"] == "a dog on a table"
    assert len({p.image.offset for p in source.pairs}) == len(source.pairs) == 18


def test_faults_at_the_end_of_a_shard_are_not_silent(tmp_path: Path) -> None:
    whole = write_tar(tmp_path / "a.tar", [m for i in range(3) for m in pair(f"{i}")]).read_bytes()
    assert open_pairs(str(tmp_path / "a.tar")).left_out == []
    path = tmp_path / "b.tar"
    path.write_bytes(whole[: 6 * 1024])  # between two members: tarfile takes it for the end
    assert [o.reason for o in open_pairs(str(path)).left_out] == ["the shard is cut off after this"]
    path.write_bytes(whole[: 4 * 1024] + b"x" * 512 + whole[4 * 1024 + 512 :])
    source = open_pairs(str(path))
    assert (len(source.pairs), [(o.key, o.reason) for o in source.left_out]) == (2, [("1", "the shard is damaged after this")])
    path.write_bytes(whole + whole)
    source = open_pairs(str(path))
    assert (len(source.pairs), "joined with cat" in source.left_out[0].reason) == (3, True)
    path.write_bytes(b"not a tar at all")
    with pytest.raises(InputError, match="cannot be read on"):
        open_pairs(str(path))


def test_every_cut_of_a_shard_is_reported(tmp_path: Path) -> None:
    whole = write_tar(tmp_path / "a.tar", [m for i in range(3) for m in pair(f"{i}")]).read_bytes()
    for end in range(256, 6 * 1024 + 1, 256):
        path = tmp_path / "cut.tar"
        path.write_bytes(whole[:end])
        try:
            source = open_pairs(str(path))
        except InputError as error:
            assert " left out, the first, " in str(error)
            continue
        # Two headers and the picture take 1536 of a sample's 2048 bytes, the caption 5.
        assert len(source.pairs) == (end + 2048 - 1541) // 2048
        assert source.left_out, f"a cut at {end} went unnoticed"


def test_shards_by_braces_glob_and_folder(tmp_path: Path) -> None:
    for i in range(3):
        write_tar(tmp_path / f"train-{i:03d}.tar", pair(f"{i}"))
    (tmp_path / "readme.txt").write_text("x")
    names = [str(tmp_path / f"train-{i:03d}.tar") for i in range(3)]
    for location in ("train-{000..002}.tar", "*.tar", "train-00[0-2].tar", ""):
        assert expand(str(tmp_path / location), ".tar") == names
    assert expand(str(tmp_path / "train-{001..002}.tar"), ".tar") == names[1:]
    source = open_pairs(str(tmp_path))
    assert [(p.key, p.image.read()) for p in source.pairs] == [(f"{i}", b"jpeg %d" % i) for i in range(3)]
    with pytest.raises(InputError, match=r"2 shards are missing, the first is .*train-003\.tar"):
        expand(str(tmp_path / "train-{000..004}.tar"), ".tar")
    with pytest.raises(InputError, match=r"no \.tar shard matches"):
        expand(str(tmp_path / "val-*.tar"), ".tar")


def test_relative_glob(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_tar(tmp_path / "a.tar", pair("0"))
    monkeypatch.chdir(tmp_path)
    assert expand("./*.tar", ".tar") == ["a.tar"]


def test_one_empty_shard_among_others_is_named(tmp_path: Path) -> None:
    write_tar(tmp_path / "a.tar", pair("0"))
    write_tar(tmp_path / "b.tar", [])
    source = open_pairs(str(tmp_path))
    assert len(source.pairs) == 1
    assert source.left_out == [LeftOut(str(tmp_path / "b.tar"), "(start)", "the shard is empty")]


def test_keys_end_at_the_first_dot_of_the_name(tmp_path: Path) -> None:
    members = [("a.b/x.jpg", b"1"), ("a.b/x.seg.png", b"2"), ("a.b/x.TXT", b"one"), ("y.JPEG", b"3"), ("y.txt", b"two")]
    source = open_pairs(str(write_tar(tmp_path / "a.tar", members)))
    assert [(p.key, p.image.read(), p.caption) for p in source.pairs] == [("a.b/x", b"1", "one"), ("y", b"3", "two")]


def test_hidden_members_are_told_of_in_one_row(tmp_path: Path) -> None:
    mac = [("._0.jpg", b"fork"), ("._0.txt", b"fork"), ("./._1.jpg", b"fork"), (".DS_Store", b"x")]
    source = open_pairs(str(write_tar(tmp_path / "a.tar", [*mac, *pair("0"), *pair("./1")])))
    assert [p.key for p in source.pairs] == ["0", "./1"]
    assert [(o.key, o.reason) for o in source.left_out] == [
        ("(hidden)", "4 members whose name begins with a dot, such as '._0.jpg', are no samples")
    ]


def test_fingerprint_follows_the_index(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"image": "a.jpg", "caption": "x"}\n')
    before = open_pairs(str(path)).fingerprint
    assert open_pairs(str(path)).fingerprint == before
    path.write_text('{"image": "a.jpg", "caption": "y"}\n')
    assert open_pairs(str(path)).fingerprint != before


@given(st.text())
def test_clean_captions_are_one_line_of_utf8(text: str) -> None:
    try:
        line = clean_caption(text)
    except ValueError as error:
        assert str(error) == "caption is empty"
        return
    assert line == line.strip()
    assert line
    assert not set("\r\n\x0b\x0c\x85\u2028\u2029\x00") & set(line)
    line.encode("utf-8")


@given(st.text(st.sampled_from("a./\\\0"), max_size=8))
def test_no_name_leads_out_of_the_root(name: str) -> None:
    try:
        path = safe_image_path(Path("/root"), name)
    except ValueError:
        return
    assert path.is_relative_to("/root")
    assert ".." not in path.parts
