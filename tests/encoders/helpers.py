"""Small towers and random ragged labels for the encoder tests."""

from __future__ import annotations

import torch
from torch import Tensor

from mmkit.encoders import VisionEncoder, build_encoder, pack_labels

TINY = {"depth": 3, "embed_dim": 48, "num_heads": 3}


def tiny_encoder(*, seed: int = 0, layout: str = "superclass", **model_args: object) -> VisionEncoder:
    """A three-block ViT for 32-pixel pictures, in eval mode."""
    encoder = build_encoder(
        "vit_tiny_patch16_224",
        image_size=32,
        patch_size=8,
        model_args={**TINY, **model_args},
        layout=layout,  # type: ignore[arg-type]
        seed=seed,
    )
    return encoder.eval()


def pictures(count: int = 2, size: int = 32, seed: int = 0) -> Tensor:
    """uint8[count, 3, size, size] noise."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, 3, size, size), dtype=torch.uint8, generator=generator)


def random_rows(count: int, vocab_size: int, *, longest: int = 6, seed: int = 0) -> list[list[int]]:
    """Ragged rows of unique sorted ids; every third row is empty."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for row in range(count):
        length = 0 if row % 3 == 2 else 1 + int(torch.randint(0, min(longest, vocab_size), (), generator=generator))
        rows.append(sorted(torch.randperm(vocab_size, generator=generator)[:length].tolist()))
    return rows


def packed(count: int, vocab_size: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """`random_rows` in CSR form."""
    return pack_labels(random_rows(count, vocab_size, seed=seed))
