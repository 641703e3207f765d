"""Files that would cost far more time or memory than their pixels warrant are refused before they are decoded."""

from __future__ import annotations

import contextlib
import io
import struct
import zlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from mmkit.data import bounds
from mmkit.data.bounds import refuse_costly, refuse_long
from mmkit.data.images import decode_image
from mmkit.data.skipped import SampleError


def picture(width: int = 48, height: int = 32) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))


def encode(kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    picture().save(buffer, kind, **options)
    return buffer.getvalue()


def segment(marker: int, payload: bytes) -> bytes:
    return bytes([0xFF, marker]) + struct.pack(">H", len(payload) + 2) + payload


def many_scans(count: int) -> bytes:
    """A progressive JPEG with its last scan, which refines a few bits, again and again."""
    data = encode("JPEG", progressive=True)
    last = data.rindex(b"\xff\xda")
    before = data.count(b"\xff\xda")
    return data[:last] + data[last:-2] * (count - before + 1) + b"\xff\xd9"


def chunk(name: bytes, payload: bytes = b"") -> bytes:
    return struct.pack(">I", len(payload)) + name + payload + struct.pack(">I", zlib.crc32(name + payload))


def refusal(data: bytes, monkeypatch: pytest.MonkeyPatch) -> str:
    """The reason, which must come before anything is opened."""

    def opened(*_: object, **__: object) -> None:
        raise AssertionError("opened")

    with monkeypatch.context() as patch:
        patch.setattr(Image, "open", opened)
        with pytest.raises(SampleError) as caught:
            decode_image(data)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_scans_of_a_jpeg(monkeypatch: pytest.MonkeyPatch) -> None:
    for count in (10, bounds.MAX_SCANS):
        assert decode_image(many_scans(count)).size == (48, 32)
    for data in (many_scans(bounds.MAX_SCANS + 1), many_scans(1000)):
        assert "more than 64 scans, which would take far longer" in refusal(data, monkeypatch)
    # Hidden behind what looks like the end within a comment between scans.
    data = many_scans(1000)
    second = data.index(b"\xff\xda", data.index(b"\xff\xda") + 2)
    assert "scans" in refusal(data[:second] + segment(0xFE, b"\xff\xd9") + data[second:], monkeypatch)


def test_scans_of_a_jpeg_that_is_not_progressive(monkeypatch: pytest.MonkeyPatch) -> None:
    data = bytearray(encode("JPEG"))
    scan = data.index(b"\xff\xda")
    # A scan of one component, as many times: libjpeg reads them all before it shows the picture.
    one = segment(0xDA, b"\x01\x01\x00\x00\x3f\x00") + b"\x12\x34"
    assert "scans" in refusal(bytes(data[:scan]) + one * 100 + b"\xff\xd9", monkeypatch)


def test_what_only_looks_like_scans_is_decoded() -> None:
    tail = b"\xff\xda\x00\x08" * 500  # a film joined on behind the picture, as phones do
    for data in (encode("JPEG"), encode("JPEG", progressive=True)):
        assert decode_image(data + tail).tobytes() == decode_image(data).tobytes()
    thumbnail = segment(0xE1, b"other\0" + b"\xff\xda" * 500)
    data = encode("JPEG", progressive=True)
    assert decode_image(data[:2] + thumbnail + data[2:]).tobytes() == decode_image(data).tobytes()


@pytest.mark.parametrize("filler", [segment(0xFE, b""), b"\xff", b"\x00", b"\xff\x00", b"\xff\xd0"])
def test_segments_before_the_first_scan(filler: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    data = encode("JPEG")
    assert "more than 4096 segments before its first scan" in refusal(data[:20] + filler * 5000 + data[20:], monkeypatch)


def test_profiles_of_many_segments_are_decoded() -> None:
    data = encode("JPEG", icc_profile=bytes(60_000) * 200)
    assert decode_image(data).size == (48, 32)


def test_chunks_of_a_png(monkeypatch: pytest.MonkeyPatch) -> None:
    data = encode("PNG")
    for filler in (chunk(b"IDAT"), chunk(b"teSt")):
        assert decode_image(data[:33] + filler * 100 + data[33:]).size == (48, 32)
        padded = data[:33] + filler * (bounds.MAX_CHUNKS + 1) + data[33:]
        assert "more than 65536 chunks" in refusal(padded, monkeypatch)
    # Long, but of few parts: no reason to refuse it.
    assert decode_image(data[:33] + chunk(b"teSt", bytes(1 << 20)) + data[33:]).size == (48, 32)


def test_blocks_of_a_gif(monkeypatch: pytest.MonkeyPatch) -> None:
    data = encode("GIF")
    start = data.index(b",", 13 + 3 * 256 - 1)
    for block in (b"\x01a", b"\xff" + b"a" * 255):
        few, many = (data[:start] + b"!\xfe" + block * count + b"\0" + data[start:] for count in (8000, 9000))
        assert decode_image(few).size == (48, 32)
        assert "more than 8192 blocks before its first frame" in refusal(many, monkeypatch)
    assert "blocks" in refusal(data[:start] + b"!\xfe\0" * 20_000 + data[start:], monkeypatch)
    assert "blocks" in refusal(data[:start] + b"\0" * 20_000 + data[start:], monkeypatch)


def tags(count: int, size: int, order: str = "<") -> bytes:
    """A TIFF whose tags all name the same bytes."""
    entries = b"".join(struct.pack(order + "HHII", 40_000 + i, 7, size, 8) for i in range(count))
    where = 8 + size
    head = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(order + "I", where)
    return head + bytes(size) + struct.pack(order + "H", count) + entries


@pytest.mark.parametrize("order", ["<", ">"])
def test_tags_that_name_the_same_bytes(order: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "its tags claim 500000000 bytes of a file of" in refusal(tags(1000, 500_000, order), monkeypatch)
    data = encode("JPEG")
    exif = segment(0xE1, b"Exif\0\0" + tags(100, 60_000, order))
    assert "its tags claim 6000000 bytes" in refusal(data[:2] + exif + data[2:], monkeypatch)
    # In two parts, which Pillow joins.
    whole = tags(3000, 60_000, order)
    parts = b"".join(segment(0xE1, b"Exif\0\0" + whole[i : i + 65_000]) for i in range(0, len(whole), 65_000))
    assert "its tags claim" in refusal(data[:2] + parts + data[2:], monkeypatch)


def test_tags_of_an_exif_block_elsewhere() -> None:
    for kind in ("PNG", "WEBP"):
        with pytest.raises(SampleError, match="its tags claim 6000000 bytes"):
            decode_image(encode(kind, exif=b"Exif\0\0" + tags(100, 60_000)))


@pytest.mark.parametrize(("tag", "wide"), [(273, False), (324, False), (273, True)])
def test_strips_of_a_tiff(tag: int, wide: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if wide:
        data = b"II+\0" + struct.pack("<HHQQ", 8, 0, 16, 1) + struct.pack("<HHQQ", tag, 4, 10**6, 50) + bytes(5_000_000)
    else:
        data = b"MM\0*" + struct.pack(">IH", 8, 1) + struct.pack(">HHII", tag, 4, 10**6, 50) + bytes(5_000_000)
    assert "more than 65536 strips or tiles" in refusal(data, monkeypatch)
    if wide:  # the only kind that can count as many
        assert "more than 65536 tags" in refusal(b"II+\0" + struct.pack("<HHQQ", 8, 0, 16, 10**6) + bytes(10**7), monkeypatch)


def test_sound_tags_are_read() -> None:
    exif = Image.Exif()
    exif[274], exif[315], exif[37510] = 6, "somebody", bytes(30_000)
    for kind in ("JPEG", "TIFF", "PNG", "WEBP"):
        assert decode_image(encode(kind, exif=exif)).size == (32, 48)
    assert decode_image(encode("TIFF", big_tiff=True)).size == (48, 32)


def test_length() -> None:
    refuse_long(10, 10)
    with pytest.raises(SampleError, match=r"^11 bytes are over the limit of 10$"):
        refuse_long(11, 10)


@given(st.sampled_from([b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"GIF89a", b"II*\0", b"MM\0+", b""]), st.binary(max_size=400))
def test_any_bytes_end_the_walk(start: bytes, rest: bytes) -> None:
    # Random tags may well claim too much; nothing else comes out of it.
    with contextlib.suppress(SampleError):
        refuse_costly(start + rest)
