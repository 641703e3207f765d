"""The text tower that meets a vision tower in one space: open_clip's transformer with a projection for pictures beside it."""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from mmkit.encoders.labels import CaptionLabels
from mmkit.errors import InputError
from mmkit.files import read_json

WEIGHTS, CONFIG = "text.safetensors", "text_config.json"
# Vision width -> text width (= size of the shared space) and layers, heads being 64 wide: open_clip's model_configs
# ViT-S-16, ViT-M-16, ViT-B-16, ViT-L-16, ViT-H-14, ViT-g-14, ViT-bigG-14, ViT-e-14.
_PAIRINGS = {
    384: (384, 12),
    512: (512, 12),
    768: (512, 12),
    1024: (768, 12),
    1280: (1024, 24),
    1408: (1024, 24),
    1664: (1280, 32),
    1792: (1280, 36),
}
# Logit scale (as its logarithm) and bias at the start: CLIP, arXiv 2103.00020 section 2.5; SigLIP, arXiv 2303.15343 section 3.
_STARTS: dict[str, tuple[float, float | None]] = {"infonce": (math.log(1 / 0.07), None), "sigmoid": (math.log(10), -10.0)}
# 49,408 ids of which the last two are CLIP's marks of start and end (open_clip tokenizer.py).
VOCAB_SIZE = 49_408
START, END = VOCAB_SIZE - 2, VOCAB_SIZE - 1


def text_settings(
    encoder_width: int,
    *,
    embed_dim: int | None = None,
    width: int | None = None,
    heads: int | None = None,
    layers: int | None = None,
    context_length: int = 77,
) -> dict[str, int]:
    """Sizes of the text tower; what is None is open_clip's pairing with a vision tower of that width.

    Widths that open_clip does not pair: below 384 the text tower is as wide as the vision tower and has one layer for each 32
    of it (at least 2, at most 12); above, the pairing of the next smaller width, up to 1408.

    Args:
        encoder_width: Width D of the vision tower.
        embed_dim: Size E of the shared space.
        width: Of the text tower.
        heads: Of attention; None makes them 64 wide, or wider where 64 does not divide.
        layers: Transformer blocks.
        context_length: Token ids C of a caption, start and end among them.

    Returns:
        Keyword arguments of `TextTower`.

    Raises:
        InputError: The heads do not divide the width.
    """
    if encoder_width < min(_PAIRINGS):
        paired = (encoder_width, min(12, max(2, encoder_width // 32)))
    else:
        known = encoder_width if encoder_width in _PAIRINGS else max(w for w in _PAIRINGS if w <= min(encoder_width, 1408))
        paired = _PAIRINGS[known]
    width = width or paired[0]
    heads = heads or next(h for h in range(max(1, width // 64), 0, -1) if width % h == 0)
    if width % heads:
        raise InputError(f"{heads} heads do not divide a width of {width}", where="text.heads", mend="change text.heads")
    sizes = {"embed_dim": embed_dim or paired[0], "width": width, "heads": heads, "layers": layers or paired[1]}
    return {**sizes, "context_length": context_length}


class CaptionTokens:
    """A caption to its row of ids: start, the caption's tokens as far as they fit, end, zeros.

    Equal to open_clip's ``SimpleTokenizer``, except that its marks of start and end, written out in a caption, are left out.
    """

    def __init__(self, context_length: int = 77) -> None:
        """Choose the number of ids C of a row."""
        assert context_length >= 3, f"context_length {context_length} has no place for a token"
        self.context_length = context_length

    def __call__(self, caption: str) -> list[int]:
        """The C ids of a caption."""
        ids = [START, *_clip_labels().tokens(caption)[: self.context_length - 2], END]
        # The tower pools at the largest id, which is END's, and looks only backwards: what stands behind it changes nothing.
        return ids + [0] * (self.context_length - len(ids))


@functools.cache
def _clip_labels() -> CaptionLabels:
    """The vocabulary, once a process and not in the samples: those are pickled for the loader's workers."""
    return CaptionLabels("clip")


class Embeddings(NamedTuple):
    """What a contrastive loss compares: normalised f[B, E] of both towers, the factor on their cosines, and the bias or None."""

    image: Tensor
    text: Tensor
    logit_scale: Tensor
    logit_bias: Tensor | None


class TextTower(nn.Module):
    """A text transformer, the projection of pictures into its space, and the scale of their cosines.

    Attributes:
        text: open_clip's ``TextTransformer``, so that its weights are those of an open_clip model's ``text``.
        image_projection: Linear D to E without bias, open_clip's ``visual.head.proj``.
        logit_scale: Logarithm of the factor on the cosines, float[1].
        logit_bias: Added to the logits of the sigmoid loss, float[1]; None for InfoNCE.
        context_length: Token ids C of a caption.
        settings: Arguments that build the same tower again.
    """

    def __init__(
        self,
        encoder_width: int,
        *,
        embed_dim: int,
        width: int,
        heads: int,
        layers: int,
        context_length: int = 77,
        kind: str = "infonce",
    ) -> None:
        """Build a tower with new weights.

        Args:
            encoder_width: Width D of the vision tower.
            embed_dim: Size E of the shared space.
            width: Of the text transformer.
            heads: Of its attention.
            layers: Its blocks.
            context_length: Token ids C of a caption.
            kind: The loss, ``infonce`` or ``sigmoid``: it decides where scale and bias start.
        """
        super().__init__()
        # Imported here: open_clip brings torchvision, which those who only tokenize (loader workers) do not need.
        from open_clip.transformer import TextTransformer

        sizes = {"context_length": context_length, "width": width, "heads": heads, "layers": layers}
        self.settings: dict[str, Any] = {"encoder_width": encoder_width, "embed_dim": embed_dim, **sizes, "kind": kind}
        self.context_length = context_length
        self.text = TextTransformer(vocab_size=VOCAB_SIZE, output_dim=embed_dim, **sizes)
        self.image_projection = nn.Linear(encoder_width, embed_dim, bias=False)
        # As open_clip's projection of pictures (transformer.py:706).
        nn.init.normal_(self.image_projection.weight, std=encoder_width**-0.5)
        scale, bias = _STARTS[kind]
        # One element and not a scalar, which DeepSpeed cannot send; torch loads the one into the other (open_clip has scalars).
        self.logit_scale = nn.Parameter(torch.tensor([scale]))
        self.logit_bias = nn.Parameter(torch.tensor([bias])) if bias is not None else None

    def forward(self, features: Tensor, tokens: Tensor) -> Embeddings:
        """Both sides of a batch, with scale and bias.

        One call for all, and copies of the scalars: ZeRO-3 holds parameters whole only while their module runs.

        Args:
            features: float[B, D], pooled features of the vision tower.
            tokens: int64[B, C].

        Returns:
            The embeddings; `logit_scale` is already the factor itself.
        """
        self.clamp_scale()
        # In fp32: at 100 bf16 has steps of 0.5.
        scale = self.logit_scale.to(torch.promote_types(self.logit_scale.dtype, torch.float32)).exp()
        # A copy, since the loss uses it after this call, when ZeRO-3 has taken the parameter away.
        bias = self.logit_bias.clone().squeeze() if self.logit_bias is not None else None
        return Embeddings(self.encode_image(features), self.encode_text(tokens), scale.squeeze(), bias)

    @torch.no_grad()
    def clamp_scale(self) -> None:
        """Keep the factor on the cosines within 1 and 100.

        On the weights themselves, as open_clip does after each step: a clamp with a gradient of zero would never come back. Under
        DeepSpeed with bf16 the optimiser's own fp32 copy is out of reach, there as here: only what is used is clamped.
        """
        self.logit_scale.clamp_(0, math.log(100))

    def tokenize(self, texts: Sequence[str]) -> Tensor:
        """Ids of B texts, int64[B, C]."""
        row = CaptionTokens(self.context_length)
        return torch.tensor([row(text) for text in texts], dtype=torch.int64).reshape(-1, self.context_length)

    def encode_text(self, tokens: Tensor) -> Tensor:
        """Captions int64[B, C] as normalised float[B, E]."""
        return _unit(self.text(tokens))

    def encode_image(self, features: Tensor) -> Tensor:
        """Pooled features float[B, D] of the vision tower as normalised float[B, E]."""
        return _unit(self.image_projection(features.to(self.image_projection.weight.dtype)))


def _unit(rows: Tensor) -> Tensor:
    """Rows of length 1, in fp32 at least: a length measured in bf16 is off by up to 0.4 %."""
    return F.normalize(rows.to(torch.promote_types(rows.dtype, torch.float32)), dim=-1)


def save_text(tower: TextTower, folder: Path) -> None:
    """Write ``text.safetensors`` and ``text_config.json`` into a folder that exists."""
    tower.clamp_scale()
    state = {name: value.detach().cpu().contiguous() for name, value in tower.state_dict().items()}
    save_file(state, folder / WEIGHTS, metadata={"format": "pt"})
    (folder / CONFIG).write_text(json.dumps(tower.settings, indent=2) + "\n", encoding="utf-8")


def load_text(folder: str | Path) -> TextTower:
    """Open a text tower for inference.

    Args:
        folder: The ``model`` folder of a clip or lit run.

    Returns:
        The tower on the CPU, in eval mode, in the dtype it was saved in.

    Raises:
        InputError: There is none, or it is damaged.
    """
    folder = Path(folder)
    if not (folder / CONFIG).is_file() or not (folder / WEIGHTS).is_file():
        raise InputError(f"no text tower here ({CONFIG}, {WEIGHTS})", where=folder, mend="give the model of a clip or lit run")
    settings = read_json(folder / CONFIG)
    try:
        # The weights made here are thrown away; they must not move the caller's generator.
        with torch.random.fork_rng(devices=[]):
            tower = TextTower(**settings)
        state = load_file(folder / WEIGHTS)
        tower.to(next((value.dtype for value in state.values()), torch.float32)).load_state_dict(state)
    except (SafetensorError, RuntimeError, TypeError, KeyError, OSError) as error:
        first = str(error).splitlines()[0]
        raise InputError(f"the text tower cannot be read: {first}", where=folder, mend="write the folder again") from error
    return tower.eval()
