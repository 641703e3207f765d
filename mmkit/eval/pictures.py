"""Pictures of an evaluation: read and decoded ahead in threads, encoded once, the features kept as long as there is room."""

from __future__ import annotations

import hashlib
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

from torch import Tensor

from mmkit.data.images import Pixels, decode_image
from mmkit.data.scan.crew import cores
from mmkit.eval.examples import Picture

# Of features on the device: 200 pictures of LLaVA-1.5 in half precision, 65,000 of the demo's.
FEATURE_BYTES = 1 << 30


@dataclass(frozen=True)
class Square:
    """A decoded picture.

    Attributes:
        pixels: uint8[3, S, S], fitted as the model wants it.
        content: Hash of the encoded bytes.
    """

    pixels: Pixels
    content: str


def content_hash(data: bytes) -> str:
    """Hash of a picture's encoded bytes, 32 hex digits."""
    return hashlib.blake2b(data, digest_size=16).hexdigest()


def picture_key(picture: Picture) -> str:
    """Names a picture: its path, or its name in the table with the hash of its bytes (two tables may have an ``image_1``)."""
    return picture.name if picture.data is None else f"{picture.name}\0{content_hash(picture.data)}"


class Reader:
    """Decodes pictures in threads, a few ahead of whoever takes them; Pillow lets other threads run meanwhile."""

    def __init__(
        self,
        order: Iterable[tuple[str, Picture]],
        fit: Callable[..., Pixels],
        *,
        max_bytes: int,
        max_pixels: int,
        ahead: int = 32,
    ) -> None:
        """Begin to read.

        Args:
            order: Pictures with their keys, in the order in which they will be taken, each once.
            fit: Makes a square of a decoded picture.
            max_bytes: A longer picture is refused.
            max_pixels: Likewise.
            ahead: How many decoded pictures may wait.
        """
        self._order = deque(order)
        self._fit, self._max_bytes, self._max_pixels, self._ahead = fit, max_bytes, max_pixels, ahead
        # One core is the model's. More than a few would only fight over the disk.
        self._pool = ThreadPoolExecutor(max(1, min(4, cores() - 1)), thread_name_prefix="mmkit-pictures")
        self._waiting: dict[str, Future[Square]] = {}
        self._fill()

    def _load(self, picture: Picture) -> Square:
        """Read, decode, fit. Raises SampleError: it cannot be used."""
        data = picture.read(self._max_bytes)
        return Square(self._fit(decode_image(data, max_pixels=self._max_pixels)), content_hash(data))

    def _fill(self) -> None:
        while self._order and len(self._waiting) < self._ahead:
            key, picture = self._order.popleft()
            self._waiting[key] = self._pool.submit(self._load, picture)

    def take(self, key: str, picture: Picture) -> Square:
        """A picture, which is then forgotten; out of order it is read while the caller waits.

        Raises:
            SampleError: It cannot be used.
        """
        found = self._waiting.pop(key, None)
        self._fill()
        return self._load(picture) if found is None else found.result()

    def close(self) -> None:
        """Stop reading."""
        self._pool.shutdown(wait=True, cancel_futures=True)


class FeatureStore:
    """Features by picture, those used last; bounded in bytes.

    Attributes:
        encoded: How many pictures were put in.
    """

    def __init__(self, limit: int = FEATURE_BYTES) -> None:
        self.encoded = 0
        self._limit, self._bytes = limit, 0
        self._kept: OrderedDict[str, tuple[Tensor, Square]] = OrderedDict()

    def get(self, key: str) -> tuple[Tensor, Square] | None:
        """Features and square of a picture, if they are still here."""
        if key in self._kept:
            self._kept.move_to_end(key)
        return self._kept.get(key)

    def put(self, keys: Sequence[str], squares: Sequence[Square], features: Sequence[Tensor]) -> None:
        """Keep what was just encoded; what was not used for longest goes."""
        self.encoded += len(keys)
        for key, square, found in zip(keys, squares, features, strict=True):
            self._kept[key] = found, square
            self._bytes += _size(found, square)
        while self._bytes > self._limit and self._kept:
            self._bytes -= _size(*self._kept.popitem(last=False)[1])

    def clear(self) -> None:
        """Give all memory back."""
        self._kept.clear()
        self._bytes = 0


def _size(features: Tensor, square: Square) -> int:
    return features.numel() * features.element_size() + square.pixels.nbytes
