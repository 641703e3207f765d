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
from mmkit.data.conversations import encode_prompt
from mmkit.data.images import Fit, fit_square
from mmkit.encoders.save import load_encoder, load_tagger
from mmkit.errors import InputError
from mmkit.files import read_json
from mmkit.models.captioning import write_captions
from mmkit.models.clipcap import load_captioner
from mmkit.models.decoding import bare_settings, choose_decoding, draw_seed, search_arguments
from mmkit.models.llava import load_mllm
from mmkit.run import resolve_parent


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
        pixels: Tensor = _pixels(images, self.encoder.image_size, "squash").to(self.device)
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

    @torch.inference_mode()
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
        how = choose_decoding(self.decoding, decoding)
        pixels = _pixels(images, self.encoder.image_size, "squash")
        draws = [draw_seed(how.seed or 0, square.numpy().tobytes()) for square in pixels]
        kind = self.model.config.feature_kind
        # Extracted as in training; the scaling of features is part of the captioner.
        pixels = pixels.to(self.device)
        features = self.encoder.tokens(pixels) if kind == "tokens" else self.encoder(pixels)
        return write_captions(self.model, self.tokenizer, features, how, draws=draws)


class Mllm:
    """A LLaVA-style model; batched, left-padded generation with a KV cache."""

    kind = "mllm"

    def __init__(self, folder: str, device: torch.device) -> None:
        self.model, self.processor, self.meta = load_mllm(folder)
        self.model.to(device).eval()
        # What a language model brings along (sampling, a repetition penalty) is no part of the request.
        self.model.generation_config = bare_settings(self.model.generation_config)
        self.tokenizer = self.processor.tokenizer
        self.device = device
        self._mean = torch.tensor(self.meta["mean"], device=device).view(1, 3, 1, 1)
        self._std = torch.tensor(self.meta["std"], device=device).view(1, 3, 1, 1)

    @torch.inference_mode()
    def predict(self, images: Sequence[Image.Image], prompts: Sequence[str] | None = None, **decoding: Any) -> list[str]:
        """An answer for each (picture, prompt); greedy unless asked otherwise.

        Args:
            images: RGB pictures.
            prompts: One question a picture; None asks for a description.
            **decoding: Keys of `DecodingConfig`. With sampling an answer depends on seed, picture and prompt alone.

        Raises:
            InputError: Settings that do not go together, or the paper's decoding, which is a captioner's.
        """
        how = choose_decoding(DecodingConfig(), decoding)
        if how.decoding == "paper":
            raise InputError("decoding=paper is ClipCap's, for captioners", where="decoding", mend="use search or sample")
        # A request that the demo's conversations contain.
        prompts = list(prompts) if prompts is not None else ["Describe the picture."] * len(images)
        rows = [
            # Not the processor's chat template: this path keeps control tokens that are spelt out in a question plain text.
            encode_prompt(
                prompt,
                self.tokenizer,
                self.meta["template"],
                with_image=True,
                num_image_tokens=self.meta["num_image_tokens"],
                image_token_id=self.model.config.image_token_id,
            )
            for prompt in prompts
        ]
        # Left padding: the last prompt token of every row is the last position, where generation starts.
        # Rows differ by their questions only: every picture takes the same number of tokens.
        width = max(map(len, rows))
        ids = torch.full((len(rows), width), int(self.tokenizer.pad_token_id), dtype=torch.int64)
        mask = torch.zeros_like(ids)
        for i, row in enumerate(rows):
            ids[i, width - len(row) :] = torch.tensor(row)
            mask[i, width - len(row) :] = 1
        pixels = _pixels(images, self.meta["image_size"], self.meta["image_fit"])
        draws = [
            draw_seed(how.seed or 0, square.numpy().tobytes() + prompt.encode())
            for square, prompt in zip(pixels, prompts, strict=True)
        ]
        pixels = pixels.to(self.device)
        values = (pixels.float() / 255.0 - self._mean) / self._std
        out = self.model.generate(
            input_ids=ids.to(self.device),
            attention_mask=mask.to(self.device),
            # Normalised in float32 and rounded once, as in training.
            pixel_values=values.to(self.model.dtype),
            **search_arguments(
                how,
                stop=[self.tokenizer.eos_token_id],
                fill=self.tokenizer.pad_token_id,
                draws=draws,
            ),
        )
        # The prompt comes back with the answer and is cut off by position, which left padding makes the same in all rows.
        return [t.strip() for t in self.tokenizer.batch_decode(out[:, width:], skip_special_tokens=True)]


def load_model(name: str, device: torch.device | None = None) -> Any:
    """Open a run or model folder as a :class:`Tagger`, :class:`Captioner` or :class:`Mllm`.

    Raises:
        InputError: Nothing there, an unfinished run, or a folder of another kind.
    """
    parent = resolve_parent("model", name)
    device = device or default_device()
    # A hub name such as timm:NAME: only encoders can be opened by one.
    if parent.folder is None:
        return Tagger(name, device)
    note = parent.folder / "mmkit.json"
    kind = read_json(note).get("kind") if note.is_file() else _foreign_kind(read_json(parent.folder / "config.json"))
    openers = {"encoder": Tagger, "captioner": Captioner, "mllm": Mllm}
    if kind not in openers:
        raise InputError(f"a model of kind {kind!r} cannot be opened", where=parent.folder, mend=f"known: {', '.join(openers)}")
    return openers[kind](str(parent.folder), device)


def _foreign_kind(config: dict[str, Any]) -> str:
    """The kind of a folder that mmkit did not write: timm encoders can be opened."""
    return "encoder" if "architecture" in config else str(config.get("architectures", ["unknown"])[0])


def _pixels(images: Sequence[Image.Image], size: int, fit: Fit) -> Tensor:
    """uint8 ``[B, 3, size, size]``."""
    # convert: callers of the Python API pass pictures of any mode.
    return torch.from_numpy(np.stack([fit_square(image.convert("RGB"), size, fit=fit) for image in images]))
