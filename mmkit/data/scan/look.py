"""One piece of a data set looked through: every picture decoded as training decodes it, every caption measured."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import warnings
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from mmkit.data.images import decode_image
from mmkit.data.pairs import PairSource, Picture
from mmkit.data.skipped import LeftOut, SampleError

# What is kept of each pair: 40 bytes, whatever its size. Hashes, so that equal things are found without holding them.
RECORD = np.dtype(
    [
        ("picture", "<u8"),  # where the bytes lie: captions of one picture share it
        ("content", "<u8"),
        ("alike", "<u8"),
        ("caption", "<u8"),
        ("width", "<u2"),
        ("height", "<u2"),
        ("kib", "<u2"),
        ("format", "u1"),
        ("usable", "?"),
    ]
)
_U2 = (1 << 16) - 1
# Pictures remembered while they are looked through: five captions of one need one decoding. 100 bytes each.
_HELD = 1 << 16


@dataclasses.dataclass(frozen=True)
class Look:
    """What a picture is.

    Attributes:
        content: Hash of its bytes.
        alike: Its `dhash`.
        width: Pixels, upright.
        height: Pixels.
        size: Bytes.
        format: Format and mode, such as ``JPEG RGB``.
    """

    content: int
    alike: int
    width: int
    height: int
    size: int
    format: str


@dataclasses.dataclass(frozen=True)
class Block:
    """What a piece of a data set holds.

    Attributes:
        records: RECORD[n], one for each pair; ``format`` numbers `formats`.
        formats: Formats that occur.
        captions: Of the usable pairs, in order.
        left_out: What is not usable.
    """

    records: NDArray[np.void]
    formats: list[str]
    captions: list[str]
    left_out: list[LeftOut]


class Scanner:
    """Looks at ranges of a source; goes to other processes."""

    def __init__(self, source: PairSource, *, pictures: bool) -> None:
        self.source, self.pictures = source, pictures
        self._seen: dict[Picture, Look | str] = {}

    def scan(self, begin: int, end: int) -> Block:
        """Look at pairs ``begin`` to ``end - 1``."""
        records = np.zeros(end - begin, dtype=RECORD)
        formats: dict[str, int] = {}
        captions: list[str] = []
        left_out: list[LeftOut] = []
        for record, index in zip(records, range(begin, end), strict=True):
            try:
                pair = self.source.read(index)
                look = self.look(pair.image) if self.pictures else None
            except SampleError as error:
                left_out.append(LeftOut(*self.source.describe(index), str(error)))
                continue
            captions.append(pair.caption)
            record["usable"], record["caption"] = True, hash64(pair.caption.encode())
            # By its words: Python's own hash of text differs between processes.
            record["picture"] = hash64(repr(pair.image).encode("utf-8", "surrogateescape"))
            if look is not None:
                record["content"], record["alike"] = look.content, look.alike
                # Clipped: what does not fit into two bytes would wrap around and look small.
                record["width"], record["height"] = min(look.width, _U2), min(look.height, _U2)
                record["kib"] = min(-(-look.size // 1024), _U2)
                record["format"] = formats.setdefault(look.format, len(formats))
        return Block(records, list(formats), captions, left_out)

    def look(self, picture: Picture) -> Look:
        """What a picture is.

        Raises:
            SampleError: It cannot be used.
        """
        if picture not in self._seen:
            if len(self._seen) >= _HELD:
                self._seen.clear()
            try:
                self._seen[picture] = look_at(picture.read())
            except SampleError as error:
                # A refusal too: a bad picture with five captions is decoded once, and all five pairs are left out.
                self._seen[picture] = str(error)
        found = self._seen[picture]
        if isinstance(found, str):
            raise SampleError(found)
        return found


def scan_range(scanner: Scanner, job: tuple[int, int]) -> Block:
    """`Scanner.scan` as a function, for other processes."""
    return scanner.scan(*job)


def look_at(data: bytes) -> Look:
    """What an encoded picture is.

    Raises:
        SampleError: It cannot be decoded as a whole: a header alone tells nothing of the rest.
    """
    image = decode_image(data)
    return Look(hash64(data), dhash(image), image.width, image.height, len(data), " ".join(format_of(data)))


def format_of(data: bytes) -> tuple[str, str]:
    """Format and mode of a picture that can be decoded, such as ``("JPEG", "RGB")``, from its header."""
    with warnings.catch_warnings():
        # Whether it is too large was decided where it was decoded.
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        # From the header again: what was decoded is plain RGB, and has forgotten what it came from.
        with Image.open(io.BytesIO(data)) as header:
            return header.format or "unknown", header.mode


def hash64(data: bytes) -> int:
    """64 bits of BLAKE2: among a hundred million things two that differ share one with a chance of 1 in 3,700."""
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little")


def dhash(image: Image.Image) -> int:
    """Difference hash of an RGB picture: for each of 8 x 8 places, whether its right neighbour is brighter.

    It stays nearly the same when a picture is scaled, compressed again, or made lighter.
    """
    # Nine columns give eight differences a row: 64 bits.
    small = np.asarray(image.convert("L").resize((9, 8), Image.Resampling.BOX), dtype=np.int16)
    return int.from_bytes(np.packbits(small[:, 1:] > small[:, :-1]).tobytes(), "big")


def blocks(ends: Sequence[int], size: int, workers: int) -> list[tuple[int, int]]:
    """Ranges to scan: none crosses the end of a shard, so that a shard is opened by few processes.

    Args:
        ends: First index after each shard.
        size: Pairs, fewer than the last end where a limit is set.
        workers: Processes, each of which should get several ranges.
    """
    # Large enough for the message to cost nothing, small enough for all to end together. Row groups often have 1,000 rows.
    most = max(16, min(1024, -(-size // (8 * workers))))
    found, begin = [], 0
    for end in ends:
        end = min(int(end), size)
        found += [(b, min(b + most, end)) for b in range(begin, end, most)]
        begin = end
    return found
