"""The classification head of SuperClass: a LayerNorm and one linear layer to the vocabulary."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F

if TYPE_CHECKING:
    from mmkit.encoders.labels import CaptionLabels


class SuperClassHead(nn.Module):
    """LayerNorm(D), then a linear map to V labels (open_clip/transformer.py:815-861, ``MixClsHead`` without layers).

    In training the map is not applied here: ``soft_label_loss(head(features), head.weight, head.bias, ...)`` does it in
    chunks.
    """

    def __init__(self, width: int, vocab_size: int) -> None:
        """Initialise as the reference does: weight normal with std width^-0.5, bias 0."""
        super().__init__()
        self.width, self.vocab_size = width, vocab_size
        # Beside the tower's own final norm: the reference has LN, mean, LN, Linear, where the paper says mean and linear only.
        self.norm = nn.LayerNorm(width)
        # Bare parameters, not nn.Linear: the loss takes them as tensors and no forward of a Linear ever runs. Under
        # ZeRO-3 they must therefore be gathered by hand (or kept whole by the persistence threshold).
        self.weight = nn.Parameter(torch.randn(vocab_size, width) * width**-0.5)
        self.bias = nn.Parameter(torch.zeros(vocab_size))

    def forward(self, features: Tensor) -> Tensor:
        """Normalise pooled features float[B, D] for the loss: float[B, D]."""
        normed: Tensor = self.norm(features)
        return normed

    def logits(self, features: Tensor) -> Tensor:
        """Scores of all labels, for inference: pooled features float[B, D] to float[B, V]."""
        # Not self(features): under ZeRO-3 the hook after that call would let go of the weights that the next line needs.
        return F.linear(self.norm(features), self.weight, self.bias)

    @torch.no_grad()
    def top_tags(self, features: Tensor, labels: CaptionLabels, k: int = 10) -> list[list[tuple[str, float]]]:
        """The most likely labels of each picture as words.

        Args:
            features: Pooled features, float[B, D].
            labels: The vocabulary the head was trained with.
            k: Tags per picture.

        Returns:
            B lists of (word, softmax probability), most likely first.
        """
        assert labels.vocab_size == self.vocab_size, f"{labels.vocab_size} labels for a head of {self.vocab_size}"
        # In fp32: bf16 keeps two to three digits of the probabilities that people are shown.
        probabilities, ids = self.logits(features).float().softmax(dim=1).topk(min(k, self.vocab_size), dim=1)
        return [
            [(labels.decode_tag(label), value) for label, value in zip(row, values, strict=True)]
            for row, values in zip(ids.tolist(), probabilities.tolist(), strict=True)
        ]
