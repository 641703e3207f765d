"""Readers under generated input: tars against Python's tarfile, cut and flipped ones; rows and captions of arbitrary bytes."""

from __future__ import annotations

import io
import itertools
import json
import tarfile
import unicodedata
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mmkit.data.bounds import MAX_LINE
from mmkit.data.pairs import decode_caption
from mmkit.data.reading import read_lines
from mmkit.data.sources.rows import RowReader
from mmkit.data.sources.tars import Member, TarFault, index_tar, walk_tar

FORMATS = {"ustar": tarfile.USTAR_FORMAT, "gnu": tarfile.GNU_FORMAT, "pax": tarfile.PAX_FORMAT}
KINDS = {
    "file": tarfile.REGTYPE,
    "folder": tarfile.DIRTYPE,
    "link": tarfile.SYMTYPE,
    "hard": tarfile.LNKTYPE,
    "pipe": tarfile.FIFOTYPE,
}
LETTERS = st.sampled_from("ab0._- \u00e9\u4e2d\U0001f415\n=")
SUFFIXES = st.sampled_from(["", ".jpg", ".txt", ".json", ".JPG", ".seg.png"])
PARTS = st.one_of(st.text(LETTERS, min_size=1, max_size=8), st.just("x" * 90), st.just("n" * 130))
NAMES = st.builds(lambda parts, suffix: "/".join(parts) + suffix, st.lists(PARTS, min_size=1, max_size=3), SUFFIXES)
CONTENTS = st.one_of(st.just(b""), st.binary(max_size=60), st.sampled_from([b"x" * 511, b"y" * 512, b"z" * 513, b"\0" * 1500]))
ENTRIES = st.lists(st.tuples(NAMES, st.sampled_from([*KINDS, *["file"] * 6]), CONTENTS), min_size=1, max_size=8)
# Files live for a whole test function here, one for all its examples; each example writes it anew.
SHARED = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)


def make_tar(entries: list[tuple[str, str, bytes]], kind: str) -> bytes:
    """An archive; names that the format cannot hold are left away."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=FORMATS[kind], encoding="utf-8") as tar:
        for name, type_, content in entries:
            member = tarfile.TarInfo(name)
            member.type = KINDS[type_]
            member.size = len(content) if type_ == "file" else 0
            member.linkname = name[:50] if type_ in ("link", "hard") else ""
            try:
                tar.addfile(member, io.BytesIO(content))
            except ValueError:
                continue  # ustar: longer than its fields
    return file.getvalue()


def by_tarfile(data: bytes) -> list[tuple[str, int, int]]:
    with tarfile.open(fileobj=io.BytesIO(data), mode="r:", encoding="utf-8") as tar:
        return [(member.name, member.offset_data, member.size) for member in tar if member.isreg()]


def walked(data: bytes) -> tuple[list[tuple[str, int, int]], list[TarFault]]:
    found = list(walk_tar(data))
    members = [(m.name, m.offset, m.size) for m in found if isinstance(m, Member)]
    return members, [fault for fault in found if isinstance(fault, TarFault)]


@pytest.mark.parametrize("kind", FORMATS)
@given(entries=ENTRIES)
def test_a_tar_is_read_as_tarfile_reads_it(kind: str, entries: list[tuple[str, str, bytes]]) -> None:
    data = make_tar(entries, kind)
    members, faults = walked(data)
    assert members == by_tarfile(data)
    # An archive of names that all were too long is an empty one, which is told.
    assert [fault.reason for fault in faults] == ([] if any(data) else ["the shard is empty"])


@pytest.mark.parametrize("kind", FORMATS)
@given(entries=ENTRIES, place=st.floats(0, 1))
def test_a_cut_tar_gives_what_is_whole_and_says_that_more_is_missing(
    kind: str, entries: list[tuple[str, str, bytes]], place: float
) -> None:
    whole = make_tar(entries, kind)
    sound = by_tarfile(whole)
    cut = whole[: int(place * len(whole))]
    members, faults = walked(cut)
    assert members == sound[: len(members)]
    assert all(offset + size <= len(cut) for _, offset, size in members)
    if len(members) < len(sound):
        assert faults


@pytest.mark.parametrize("kind", FORMATS)
@given(entries=ENTRIES, flips=st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(1, 255)), min_size=1, max_size=4))
@settings(max_examples=300)
def test_a_damaged_tar_ends_and_gives_only_what_was_there(
    kind: str, entries: list[tuple[str, str, bytes]], flips: list[tuple[float, int]]
) -> None:
    data = bytearray(make_tar(entries, kind))
    sound = by_tarfile(bytes(data))
    for place, flip in flips:
        data[int(place * len(data))] ^= flip
    members, faults = walked(bytes(data))
    assert all(min(offset, size) >= 0 and offset + size <= len(data) for _, offset, size in members)
    # Names of long ones lie in blocks without a checksum, so a flip may change them; places are told by headers, which have one.
    places = [(offset, size) for _, offset, size in sound]
    found = [(offset, size) for _, offset, size in members]
    # Two flips may undo each other in a header's sum, which is no more than that; one is always found.
    if len(flips) == 1 and kind != "pax":
        assert found == places[: len(found)]
        if len(found) < len(places):
            assert faults


def header(name: bytes, size: bytes, kind: bytes) -> bytes:
    """A header whose sum is right, whatever is in its fields."""
    block = bytearray(512)
    block[: len(name)], block[124 : 124 + len(size)], block[156:157] = name, size, kind
    block[257:265] = b"ustar\x0000"
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


SPOILT = [
    b"00 path=a\n",
    b"13 size=-512\n",
    b"11 size=ab\n",
    b"9" * 5000 + b" path=a\n",
    b"path=a",
    b"99 path=cut",
    b"10 path=xy",
]
RECORD = st.sampled_from([*SPOILT, b"0 ", b"3 =", b"1 1 1 ", b"10 size=1\n", b"10 path=x\n", b"12 mtime=1.5\n"])
RECORDS = st.one_of(st.binary(max_size=40), st.lists(RECORD, max_size=3).map(b"".join))
NUMBERS = [b"00000000005\0", b"-0000000512\0", b"77777777777\0", b"\xff" * 12, b"\x80" + b"\0" * 11]
FIELDS = st.one_of(st.sampled_from(NUMBERS), st.binary(min_size=12, max_size=12))
TYPES = st.sampled_from([bytes([code]) for code in b"\x0001234567xgLKSA"])
GOOD_FILE = header(b"a.jpg", b"00000000003\0", b"0") + b"abc".ljust(512, b"\0")


def extension(kind: bytes, body: bytes) -> bytes:
    return header(b"pax", b"%011o\0" % len(body), kind) + body.ljust(-(-len(body) // 512) * 512, b"\0")


EXTENSIONS = st.builds(extension, st.sampled_from([b"x", b"g", b"L", b"K"]), RECORDS)
HEADERS = st.builds(header, st.binary(max_size=100), FIELDS, TYPES)
BLOCKS = st.lists(st.one_of(EXTENSIONS, HEADERS, st.just(GOOD_FILE)), max_size=6)


@given(BLOCKS)
@settings(max_examples=500)
def test_headers_with_right_sums_and_wrong_fields_end_too(blocks: list[bytes]) -> None:
    data = b"".join(blocks) + bytes(1024)
    members, _ = walked(data)
    assert all(min(offset, size) >= 0 and offset + size <= len(data) for _, offset, size in members)
    assert [offset for _, offset, _ in members] == sorted({offset for _, offset, _ in members})


@pytest.mark.parametrize("record", SPOILT)
def test_a_damaged_pax_record_is_a_fault(record: bytes) -> None:
    members, faults = walked(GOOD_FILE + extension(b"x", record) + GOOD_FILE + bytes(1024))
    assert [name for name, _, _ in members] == ["a.jpg"]
    assert [fault.reason for fault in faults] == ["the shard is damaged after this"]


def test_padding_after_pax_records_is_none() -> None:
    data = extension(b"x", b"10 path=x\n".ljust(40, b"\0")) + GOOD_FILE + bytes(1024)
    assert walked(data) == ([("x", 1536, 3)], [])


def test_links_and_folders_have_no_content_whatever_their_size_says() -> None:
    for kind in (b"1", b"2", b"5"):
        data = header(b"x", b"00000001000\0", kind) + GOOD_FILE + bytes(1024)
        assert walked(data) == (by_tarfile(data), []) == ([("a.jpg", 1024, 3)], [])


@given(entries=ENTRIES, place=st.floats(0, 1), tail=st.binary(max_size=700))
@SHARED
def test_an_index_is_made_of_anything(tmp_path: Path, entries: list[tuple[str, str, bytes]], place: float, tail: bytes) -> None:
    data = make_tar(entries, "pax")
    path = tmp_path / "x.tar"
    path.write_bytes(data[: int(place * len(data))] + tail)
    index = index_tar(path)
    size = path.stat().st_size
    for row in range(len(index)):
        assert index.key(row)
        for column in ("", "text_"):
            begin, length = int(index.arrays[f"{column}offset"][row]), int(index.arrays[f"{column}size"][row])
            assert begin + length <= size
        begin = int(index.arrays["text_offset"][row])
        assert decode_caption(path.read_bytes()[begin : begin + int(index.arrays["text_size"][row])])
    assert all(key and reason and "\n" not in reason for key, reason, _ in index.left_out)


JSON = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=20)),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=5), inner, max_size=3)),
    max_leaves=6,
)
GOOD = st.fixed_dictionaries({"image": st.one_of(st.just("a/b.jpg"), NAMES, JSON), "caption": st.one_of(st.text(), JSON)})
LINES = st.one_of(
    GOOD.map(lambda row: json.dumps(row).encode()),
    GOOD.map(lambda row: json.dumps(row, ensure_ascii=False).encode("utf-8", "surrogatepass")),
    JSON.map(lambda value: json.dumps(value).encode()),
    st.binary(max_size=40),
    st.sampled_from([b"", b"   ", b"\r", b"\xef\xbb\xbf", b"[" * 2000, b'{"image": "x.jpg", "caption": "' + b"a" * 3000 + b'"}']),
)


@given(lines=st.lists(LINES, max_size=8), ending=st.sampled_from([b"\n", b"\r\n"]), bom=st.booleans(), last=st.booleans())
@settings(SHARED, max_examples=200)
def test_rows_of_arbitrary_bytes(tmp_path: Path, lines: list[bytes], ending: bytes, bom: bool, last: bool) -> None:
    path = tmp_path / "rows.jsonl"
    body = ending.join(lines) + (ending if last else b"")
    path.write_bytes((b"\xef\xbb\xbf" if bom else b"") + body)
    reader = RowReader()
    index = reader(path)
    data = path.read_bytes()
    start = 3 if data.startswith(b"\xef\xbb\xbf") else 0
    numbered = {number: line for number, line in enumerate(data[start:].split(b"\n"), start=1) if line.strip()}
    used = {}
    for row in range(len(index)):
        begin, size = int(index.arrays["offset"][row]), int(index.arrays["size"][row])
        number = int(index.key(row).split(" ")[0].rpartition(":")[2])
        # What is read by its place is the line, and gives the same.
        assert data[begin : begin + size] == numbered[number]
        used[number] = reader.parse(data[begin : begin + size])
        assert used[number] == reader.parse(numbered[number])
        image, caption = used[number]
        assert caption.strip() and caption.splitlines() == [caption]
        assert not Path(image).is_absolute() and ".." not in Path(image).parts and "\0" not in image
    left_out = [int(key.rpartition(":")[2]) for key, *_ in index.left_out]
    assert sorted([*used, *left_out]) == sorted(numbered)
    assert all(reason and "\n" not in reason for _, reason, _ in index.left_out)


@given(st.lists(st.binary(max_size=12).map(lambda line: line.replace(b"\n", b"")), max_size=9), st.booleans(), st.integers(1, 9))
@settings(max_examples=200)
def test_lines_have_their_place_and_long_ones_are_not_held(lines: list[bytes], last: bool, longest: int) -> None:
    data = b"\n".join(lines) + b"\n" * last
    found = list(read_lines(io.BytesIO(data), longest=longest))
    # All of the file, in order and without a gap.
    assert b"".join(data[start : start + size] for start, size, _ in found) == data
    assert [start for start, *_ in found] == [0, *itertools.accumulate(size for _, size, _ in found)][: len(found)]
    for start, size, line in found:
        whole = data[start : start + size]
        assert whole.count(b"\n") <= 1 and whole.rstrip(b"\n") == whole[: size - whole.count(b"\n")]
        assert line == (whole if len(whole.rstrip(b"\n")) <= longest else None)


def test_a_row_without_end_is_left_out_by_its_line(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    good = b'{"image": "a.jpg", "caption": "dog"}\n'
    path.write_bytes(good + b'{"image": "' + b"x" * (MAX_LINE + 1) + b'"}\n' + good)
    index = RowReader()(path)
    assert [index.key(row) for row in range(len(index))] == ["rows.jsonl:1 a.jpg", "rows.jsonl:3 a.jpg"]
    assert [(row.key, row.reason) for row in index.left_out] == [("rows.jsonl:2", "a row of more than 16 MiB")]
    begin = int(index.arrays["offset"][1])
    assert path.read_bytes()[begin:] == good


@given(st.one_of(st.binary(max_size=200), st.text(max_size=80).map(lambda text: text.encode("utf-8", "surrogatepass"))))
@settings(max_examples=300)
def test_captions_of_arbitrary_bytes(data: bytes) -> None:
    try:
        caption = decode_caption(data)
    except ValueError as error:
        assert str(error) and "\n" not in str(error)
        return
    assert caption == caption.strip() and caption.splitlines() == [caption]
    assert not any(unicodedata.category(letter) in ("Cc", "Cs", "Zl", "Zp") for letter in caption)
    assert decode_caption(caption.encode()) == caption
