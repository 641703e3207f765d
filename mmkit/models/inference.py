"""Models ready for inference: a tagger, a captioner, an MLLM, each with ``predict(images, ...)``.

Pictures go through the same decoding and fitting as in training, so a score does not depend on which resize an image processor
of another library happens to use.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from mmkit.config import DecodingConfig
from mmkit.data.images import Pixels, fit_square
from mmkit.encoders.save import load_encoder, load_tagger
from mmkit.errors import InputError
from mmkit.files import read_json
from mmkit.models.captioning import write_captions
from mmkit.models.clipcap import load_captioner
from mmkit.models.decoding import choose_decoding, draw_seed
from mmkit.models.mllm import Mllm
from mmkit.models.published import CLASSES
from mmkit.run import Parent, resolve_parent

__all__ = ["Captioner", "Mllm", "Predictor", "Tagger", "default_device", "kind_of", "load_model"]


class Predictor(Protocol):
    """What evaluation needs of a model."""

    kind: str

    def predict(self, images: Sequence[Image.Image], prompts: Sequence[str] | None = None, **decoding: Any) -> list[str]:
        """One text a picture; ``decoding`` takes the keys of `DecodingConfig`, and what is not given is the model's own."""
        ...


def default_device() -> torch.device:
    """The GPU where there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


class Tagger:
    """An encoder with its label head: the most likely caption tokens of a picture."""

    kind = "encoder"

    def __init__(self, folder: str, device: torch.device) -> None:
        # An encoder without its head (a foreign one, or one exported alone) still gives features.
        if (Path(folder) / "head.safetensors").is_file():
            self.encoder, self.head, self.labels = load_tagger(folder)
            self.head.to(device)
        else:
            self.encoder = load_encoder(folder)
            self.head = None  # type: ignore[assignment]
        self.encoder.to(device)
        self.device, self.folder = device, folder

    @torch.inference_mode()
    def features(self, images: Sequence[Image.Image]) -> Tensor:
        """Pooled features float ``[B, D]``."""
        # uint8: the encoder normalises with its own mean and standard deviation.
        pixels: Tensor = _pixels(images, self.encoder.image_size).to(self.device)
        found: Tensor = self.encoder(pixels)
        return found

    def predict(
        self,
        images: Sequence[Image.Image],
        prompts: Sequence[str] | None = None,
        *,
        max_new_tokens: int | None = None,
        **decoding: Any,
    ) -> list[str]:
        """The ``max_new_tokens`` most likely tags of each picture (ten if not given), best first, with their probability.

        Raises:
            InputError: The encoder has no label head, or something was given that has no effect on tags.
        """
        # Refused here and not on opening: features of such an encoder are still of use.
        if self.head is None:
            raise InputError("this encoder has no label head, so it gives no tags", where=self.folder, mend="use mmkit.load")
        asked = sorted(key for key, value in {**decoding, "prompt": prompts}.items() if value is not None)
        if asked:
            what = f"an encoder takes neither prompt nor decoding settings ({', '.join(asked)})"
            raise InputError(what, where=self.folder, mend="leave them out, or use an MLLM")
        count = 10 if max_new_tokens is None else max_new_tokens
        with torch.inference_mode():
            found = self.head.top_tags(self.features(images), self.labels, count)
        return [", ".join(f"{tag} {p:.3f}" for tag, p in row) for row in found]


class Captioner:
    """A ClipCap model with its encoder."""

    kind = "captioner"

    def __init__(self, folder: str, device: torch.device) -> None:
        self.model, self.tokenizer, self.meta = load_captioner(folder)
        # The copy inside the folder: the run that it came from may have moved or changed.
        self.encoder = load_encoder(Path(folder) / "encoder").to(device)
        self.model.to(device).eval()
        self.device = device
        # Captioners of mmkit 0.1 have no settings of their own; these were the defaults then.
        self.decoding = DecodingConfig(**self.meta.get("decoding", {"max_new_tokens": 67}))

    def predict(self, images: Sequence[Image.Image], prompts: Sequence[str] | None = None, **decoding: Any) -> list[str]:
        """A caption for each picture; prompts have no effect and are refused.

        Args:
            images: RGB pictures.
            prompts: None, or empty ones.
            **decoding: Keys of `DecodingConfig`; what is not given is as the captioner was saved. With sampling a caption depends
                on seed and picture alone.

        Raises:
            InputError: A prompt was given, or settings that do not go together.
        """
        # Empty ones pass: they ask for nothing.
        if prompts is not None and any(prompts):
            raise InputError("a captioner takes no prompt", mend="leave it out, or use an MLLM")
        how = self.choose(decoding)
        squares = [self.square(image) for image in images]
        return self.write(self.features(squares), how, [self.draw(how, square) for square in squares])

    def choose(self, decoding: dict[str, Any]) -> DecodingConfig:
        """Decoding settings on top of the captioner's own. Raises InputError: they do not go together."""
        return choose_decoding(self.decoding, decoding)

    def square(self, picture: Image.Image) -> Pixels:
        """uint8[3, S, S] of a picture of any mode."""
        return fit_square(picture.convert("RGB"), self.encoder.image_size, fit="squash")

    def draw(self, how: DecodingConfig, square: Pixels) -> int:
        """Seed of a caption's draws: of the picture alone, not of its batch."""
        return draw_seed(how.seed or 0, square.tobytes()) if how.decoding == "sample" else 0

    @torch.inference_mode()
    def features(self, squares: Sequence[Pixels]) -> Tensor:
        """What the mapper is given: f[B, D] or f[B, N, D]."""
        # Extracted as in training; the scaling of features is part of the captioner.
        pixels = torch.from_numpy(np.stack(squares)).to(self.device)
        found: Tensor = self.encoder.tokens(pixels) if self.model.config.feature_kind == "tokens" else self.encoder(pixels)
        return found

    @torch.inference_mode()
    def write(self, features: Tensor, how: DecodingConfig, draws: Sequence[int]) -> list[str]:
        """A caption for each row of `features`."""
        return write_captions(self.model, self.tokenizer, features, how, draws=draws)


def load_model(name: str, device: torch.device | None = None) -> Any:
    """Open a run or model folder as a :class:`Tagger`, :class:`Captioner` or :class:`Mllm`.

    Raises:
        InputError: Nothing there, an unfinished run, or a folder of another kind.
    """
    parent = resolve_parent("model", name)
    device = device or default_device()
    # A hub name such as timm:NAME: only encoders can be opened by one.
    openers = {"encoder": Tagger, "captioner": Captioner, "mllm": Mllm}
    return openers[kind_of(parent)](name if parent.folder is None else str(parent.folder), device)


def kind_of(parent: Parent) -> str:
    """What a model is, without opening it: ``encoder``, ``captioner`` or ``mllm``.

    Raises:
        InputError: A folder of another kind.
    """
    if parent.folder is None:
        return "encoder"
    note = parent.folder / "mmkit.json"
    kind = read_json(note).get("kind") if note.is_file() else _foreign_kind(read_json(parent.folder / "config.json"))
    known = ("encoder", "captioner", "mllm")
    if kind not in known:
        raise InputError(f"a model of kind {kind!r} cannot be opened", where=parent.folder, mend=f"known: {', '.join(known)}")
    return str(kind)


def _foreign_kind(config: dict[str, Any]) -> str:
    """The kind of a folder that mmkit did not write: timm encoders and LLaVA's class can be opened."""
    if "architecture" in config:
        return "encoder"
    name = str((config.get("architectures") or ["unknown"])[0])
    return "mllm" if name in CLASSES else name


def _pixels(images: Sequence[Image.Image], size: int) -> Tensor:
    """uint8 ``[B, 3, size, size]``, squashed."""
    # convert: callers of the Python API pass pictures of any mode.
    return torch.from_numpy(np.stack([fit_square(image.convert("RGB"), size, fit="squash") for image in images]))
