"""Conversations as training samples and as batches."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from mmkit.data.conversations import EncodedConversation
from mmkit.data.images import Fit, decode_image, fit_square
from mmkit.data.items import Conversation, ConversationSet, JoinedConversations
from mmkit.data.packing import pack_sequences, pad_sequences
from mmkit.data.pairs import Picture
from mmkit.data.skipped import SampleError
from mmkit.encoders.picture_rows import PictureRows
from mmkit.training.objective import Batch


class Turned(NamedTuple):
    """The pictures of a conversation that fit (uint8 ``[3, S, S]`` each, or kept features ``[N, D]``) and its encoding."""

    pixels: list[Tensor]
    encoded: EncodedConversation
    key: str


class ConversationSamples:
    """Conversations with their pictures; text is encoded when it is asked for, by the loader's workers."""

    def __init__(
        self,
        parts: Sequence[tuple[ConversationSet, str]],
        *,
        encode: Callable[[Conversation], EncodedConversation],
        size: int,
        fit: Fit,
        fill: tuple[int, int, int],
        max_pixels: int,
        max_bytes: int,
    ) -> None:
        """Take data sets with their names, and how text and pictures are prepared."""
        self.encode = encode
        self.items = JoinedConversations(parts)
        self.size, self.fit, self.fill, self.max_pixels, self.max_bytes = size, fit, fill, max_pixels, max_bytes
        # An array: loader processes share its pages, where a list's numbers would be copied as Python counts their uses.
        self._kept = np.arange(len(self.items))
        # Features of each picture and the rows they lie in, where they were extracted beforehand.
        self._features: Tensor | None = None
        self._row: PictureRows | None = None

    def pictures(self) -> list[Picture]:
        """All different pictures, in the order of their first use; what cannot be read has none."""
        found: dict[Picture, None] = {}
        for index in range(len(self)):
            try:
                found.update(dict.fromkeys(self.items.images(int(self._kept[index]))))
            except SampleError:
                # Left out when it is drawn, with its reason.
                continue
        return list(found)

    def use_features(self, rows: PictureRows, features: Tensor) -> None:
        """Give ``features`` [pictures, N, D], NaN for a picture that cannot be used, in place of pixels."""
        self._row, self._features = rows, features

    @property
    def kept_shape(self) -> tuple[int, ...] | None:
        """Of a picture's kept features; None: pixels are used."""
        return None if self._features is None else tuple(self._features.shape[1:])

    def __len__(self) -> int:
        return len(self._kept)

    def leave_out(self, numbers: Sequence[int]) -> None:
        """Leave out conversations by their number in ``items``."""
        self._kept = np.setdiff1d(self._kept, numbers)

    def describe(self, index: int) -> tuple[str, str]:
        """Source file and id of a conversation."""
        return self.items.describe(int(self._kept[index]))

    def load(self, index: int, rng: np.random.Generator) -> Turned:
        """Pictures and token ids of one conversation. Raises SampleError: the text does not fit, or a picture cannot be read."""
        item = self.items[int(self._kept[index])]
        # Text first: a conversation that does not fit costs no decoding, and no more does a picture that is cut off with its
        # turn.
        encoded = self.encode(item)
        pixels = [self._picture(picture) for picture in item.images[: encoded.num_images]]
        return Turned(pixels, encoded, item.id)

    def _picture(self, picture: Picture) -> Tensor:
        """Pixels uint8[3, S, S], or features f[N, D]."""
        if self._features is None or self._row is None:
            image = decode_image(picture.read(self.max_bytes), max_pixels=self.max_pixels)
            return torch.from_numpy(fit_square(image, self.size, fit=self.fit, fill=self.fill))
        # A copy: the view would keep the whole file's pages.
        features = self._features[self._row[picture]].clone()
        if features.isnan().any():
            # Read again for its reason.
            decode_image(picture.read(self.max_bytes), max_pixels=self.max_pixels)
            raise SampleError("the picture could not be read when its features were extracted")
        return features


def collate_conversations(samples: list[Turned], *, pad: int, packed: bool) -> Batch:
    """Token sequences and their pictures as one batch.

    Args:
        samples: Conversations.
        pad: Id that fills up short rows.
        packed: All in one row, instead of a row each.

    Returns:
        ``pixels`` uint8[P, 3, S, S] or kept features f[P, N, D], of the samples' pictures in order, or None; ``cut``, how many
        samples were cut to fit; and the sequences as of `pack_sequences` or `pad_sequences`.
    """
    # No black pictures for text-only rows, as LLaVA adds them: the tower would compute them for nothing.
    pictures = [pixels for s in samples for pixels in s.pixels]
    common = {
        "pixels": torch.stack(pictures) if pictures else None,
        "keys": [s.key for s in samples],
        "cut": sum(s.encoded.cut for s in samples),
    }
    ids, labels = [s.encoded.input_ids for s in samples], [s.encoded.labels for s in samples]
    return {**(pack_sequences(ids, labels) if packed else pad_sequences(ids, labels, pad)), **common}
