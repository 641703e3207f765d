"""Files that cost far more time than a picture of their size: refused by a walk over their structure, before they are decoded.

The limit on pixels bounds memory. It does not bound time: a progressive JPEG may go over all its pixels thousands of times, and
a file of empty chunks keeps a reader busy without any. Every bound counts parts of the file. A limit in seconds would make the
order of the data depend on how busy the machine is.

Together with ``max_pixels`` and ``max_bytes`` the time of a picture is at most linear in pixels x `MAX_SCANS` + bytes + parts: a
progressive JPEG with as many scans as are allowed takes about 0.1 s a megapixel, a usual one a tenth of it.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Iterator
from typing import Literal

from mmkit.data.skipped import SampleError

# Encoded pictures are rarely over 20 MB; what is larger is usually no photograph.
MAX_BYTES = 64 << 20
# A row of JSON lines: a book has a megabyte, so what is longer is a file without line ends.
MAX_LINE = 16 << 20
# libjpeg's own progressive files have 10 scans, those of optimisers (mozjpeg, jpegrescan) up to about 25.
MAX_SCANS = 64
# A colour profile takes up to 255 segments, a depth map in XMP some hundred.
MAX_SEGMENTS = 4096
# IDAT chunks of 8 KiB, libpng's default: half a GiB.
MAX_CHUNKS = 65536
# Blocks of 255 bytes before the first frame: 2 MiB of comments and profiles.
MAX_GIF_BLOCKS = 8192
# Tags may share a value (the resolutions of both axes); these are few bytes.
MAX_TAG_COPIES = 16

# Bytes of a value of each TIFF type.
_TAG_BYTES = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 1, 7: 1, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8, 13: 4, 16: 8}
# As Pillow takes them, two of them by the wrong end; those with a plus are BigTIFF.
_TIFF = (b"II*\0", b"MM\0*", b"MM*\0", b"II\0*", b"II+\0", b"MM\0+")
# Tags of the places of strips and tiles.
_OFFSETS = {273, 324}
# A marker of JPEG: neither an escaped 0xFF, nor one of the restart markers within a scan, nor padding.
_MARKER = re.compile(rb"\xff[^\x00\xd0-\xd7\xff]")
# Markers without a length: restarts, start and end of the picture.
_STANDALONE = {bytes([marker]) for marker in (0x01, *range(0xD0, 0xDA))} | {b""}
_SOS, _EOI, _APP1 = 0xDA, 0xD9, 0xE1
# Start of a frame: 0xC4, 0xC8 and 0xCC are something else.
_FRAMES = set(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
_PROGRESSIVE = {0xC2, 0xC6, 0xCA, 0xCE}


def refuse_long(size: int, max_bytes: int) -> None:
    """Refuse a file for its length alone.

    Args:
        size: Bytes.
        max_bytes: Most that are allowed.

    Raises:
        SampleError: There are more.
    """
    if size > max_bytes:
        raise SampleError(f"{size} bytes are over the limit of {max_bytes}")


def refuse_costly(data: bytes) -> None:
    """Refuse a picture whose structure would cost more time than its pixels and bytes warrant.

    JPEG: more than `MAX_SCANS` scans, or more than `MAX_SEGMENTS` segments before the first. PNG: more than `MAX_CHUNKS` chunks.
    GIF: more than `MAX_GIF_BLOCKS` blocks before its first frame. TIFF, and Exif in JPEG: what `refuse_tags` refuses. A damaged
    structure ends the walk; the decoder says what is wrong with it.

    Args:
        data: Encoded bytes.

    Raises:
        SampleError: It is one of these, with the count's limit.
    """
    if data.startswith(b"\xff\xd8\xff"):
        _check_jpeg(data)
    # A chunk is 12 bytes or more, so short files need no walk.
    elif data.startswith(b"\x89PNG\r\n\x1a\n") and len(data) > 12 * MAX_CHUNKS:
        _at_most(MAX_CHUNKS, _png_chunks(data), "chunks")
    elif data.startswith((b"GIF87a", b"GIF89a")) and len(data) > 2 * MAX_GIF_BLOCKS:
        _at_most(MAX_GIF_BLOCKS, _gif_blocks(data), "blocks before its first frame")
    elif data.startswith(_TIFF):
        refuse_tags(data)


def refuse_tags(data: bytes) -> None:
    """Refuse TIFF tags that give the same bytes again and again, each copy of which takes memory, and millions of strips.

    Args:
        data: A TIFF file, or an Exif block, which is one.

    Raises:
        SampleError: They claim more than `MAX_TAG_COPIES` times the bytes there are, or there are more than `MAX_CHUNKS` strips
            or tags.
    """
    data = data.removeprefix(b"Exif\0\0")
    if not data.startswith(_TIFF):
        return
    order: Literal["little", "big"] = "little" if data[:2] == b"II" else "big"
    # BigTIFF counts in 64 bits.
    wide = b"+" in data[2:4]
    head, entry, word = (8, 20, 8) if wide else (2, 12, 4)

    def number(place: int, size: int) -> int:
        return int.from_bytes(data[place : place + size], order)

    start = number(8 if wide else 4, word)
    if number(start, head) > MAX_CHUNKS:
        raise _too_many(MAX_CHUNKS, "tags")
    claimed = 0
    for place in range(start + head, min(start + head + number(start, head) * entry, len(data) - entry + 1), entry):
        count = number(place + 4, word)
        if number(place, 2) in _OFFSETS and count > MAX_CHUNKS:
            raise _too_many(MAX_CHUNKS, "strips or tiles")
        size = count * _TAG_BYTES.get(number(place + 2, 2), 0)
        # Values of one word stand in the entry itself; a reader skips those that are not in the file.
        if size > word and number(place + 4 + word, word) + size <= len(data):
            claimed += size
    if claimed > MAX_TAG_COPIES * len(data):
        raise SampleError(
            f"its tags claim {claimed} bytes of a file of {len(data)}, which would take far more memory than its pixels"
        )


def _at_most(limit: int, parts: Iterable[int], what: str) -> None:
    """Refuse more than ``limit`` parts; counting stops there."""
    if sum(1 for _ in itertools.islice(parts, limit + 1)) > limit:
        raise _too_many(limit, what)


def _too_many(limit: int, what: str) -> SampleError:
    """The reason."""
    return SampleError(f"has more than {limit} {what}, which would take far longer to decode than its pixels warrant")


def _check_jpeg(data: bytes) -> None:
    """The bounds of JPEG."""
    frame, exif = 0, b""
    for marker, place in _header(data):
        if marker in _FRAMES:
            frame = place
        elif marker == _APP1 and data.startswith(b"Exif\0\0", place + 4):
            # Several of them are one block in parts.
            exif += data[place + 10 : _behind(data, place)]
        elif marker == _SOS:
            _check_scans(data, frame, place)
    refuse_tags(exif)


def _header(data: bytes) -> Iterator[tuple[int, int]]:
    """Marker and place of each segment of a JPEG up to the first scan."""
    position = steps = marker = 0
    while marker != _SOS and (found := data.find(b"\xff", position)) >= 0 and found + 1 < len(data):
        # Bytes between segments count too: Pillow steps over each of them in Python.
        steps += 1 + found - position
        if steps > MAX_SEGMENTS:
            raise _too_many(MAX_SEGMENTS, "segments before its first scan")
        marker = data[found + 1]
        yield marker, found
        # 0xFF before a marker is padding, 0xFF00 is no marker.
        position = found + 1 if marker in (0x00, 0xFF) else _behind(data, found)


def _check_scans(data: bytes, frame: int, first: int) -> None:
    """Refuse too many scans, given the places of the frame's header and of the first scan."""
    # A scan of all components ends a picture that is not progressive. Counting in every file would cost 4 % of its time.
    if data[frame + 1] not in _PROGRESSIVE and data[frame + 9 : frame + 10] == data[first + 4 : first + 5]:
        return
    # bytes.count is far faster than the walk, and can only find too many: in thumbnails, or in a film joined on behind.
    if data.count(b"\xff\xda", first) > MAX_SCANS:
        _at_most(MAX_SCANS, _scans(data, first), "scans")


def _scans(data: bytes, start: int) -> Iterator[int]:
    """Where the scans of a JPEG are, from the first one to the end of the picture."""
    position = start
    while (match := _MARKER.search(data, position)) and data[match.start() + 1] != _EOI:
        if data[match.start() + 1] == _SOS:
            yield match.start()
        position = _behind(data, match.start())


def _behind(data: bytes, marker: int) -> int:
    """Where the segment of the marker at a position ends."""
    if data[marker + 1 : marker + 2] in _STANDALONE:
        return marker + 2
    # The length counts its own two bytes; less than these would stand still.
    return marker + 2 + max(2, int.from_bytes(data[marker + 2 : marker + 4], "big"))


def _png_chunks(data: bytes) -> Iterator[int]:
    """Where the chunks of a PNG are."""
    position = 8
    while position + 12 <= len(data):
        yield position
        # Length, name, data, checksum.
        position += 12 + int.from_bytes(data[position : position + 4], "big")


def _gif_blocks(data: bytes) -> Iterator[int]:
    """Where the blocks of a GIF are that come before its first frame."""
    # The colour table follows the 13 bytes of the header.
    position = 13 + (3 << (data[10] & 7) + 1 if data[10] & 0x80 else 0)
    while position < len(data) and data[position] not in b",;":
        yield position
        # "!" and a label begin an extension; Pillow steps over any other byte.
        if data[position] != 0x21:
            position += 1
            continue
        position += 2
        while position < len(data) and data[position]:
            yield position
            position += 1 + data[position]
        position += 1
