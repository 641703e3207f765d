"""Models ready for inference: a tagger, a captioner, an MLLM, each with ``predict(images, ...)``.

Pictures go through the same decoding and fitting as in training, so a score does not depend on which resize an image processor
of another library happens to use.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol, Union

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from mmkit.config import DecodingConfig
from mmkit.data.conversations import ConversationError, encode_prompt, stop_tokens
from mmkit.data.images import Fit, fit_square, mean_colour
from mmkit.encoders.save import load_encoder, load_tagger
from mmkit.encoders.vit import normalise
from mmkit.errors import InputError
from mmkit.files import read_json
from mmkit.models.captioning import write_captions
from mmkit.models.clipcap import load_captioner
from mmkit.models.decoding import bare_settings, choose_decoding, draw_seed, search_arguments
from mmkit.models.generation import add_stop_tokens, settle_generation, stop_ids
from mmkit.models.published import CLASSES, open_mllm
from mmkit.run import resolve_parent

# What a row of a question shows: a picture, several, or none.
Shown = Union[Image.Image, Sequence[Image.Image], None]


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
        self.model, self.processor, self.meta = open_mllm(folder)
        self.model.to(device).eval()
        # What a language model brings along (sampling, a repetition penalty) is no part of the request.
        self.model.generation_config = bare_settings(self.model.generation_config)
        self.tokenizer = self.processor.tokenizer
        self.device = device
        self._mean = torch.tensor(self.meta["mean"], device=device).view(1, 3, 1, 1)
        self._std = torch.tensor(self.meta["std"], device=device).view(1, 3, 1, 1)
        # The tokenizer's and the template's beside the model's own list: folders of older versions know only the first.
        add_stop_tokens(self.model, stop_tokens(self.meta["template"], self.tokenizer))
        settle_generation(self.model, self.tokenizer)
        self._stop = stop_ids(self.model)

    @torch.inference_mode()
    def predict(self, images: Sequence[Shown], prompts: Sequence[str] | None = None, **decoding: Any) -> list[str]:
        """An answer for each row, greedy unless asked otherwise; a row's answer does not depend on the others.

        Args:
            images: What each row shows: an RGB picture, a list of pictures, or None for a question without one.
            prompts: One question a row; None asks for a description.
            **decoding: Keys of `DecodingConfig`. With sampling an answer depends on seed, pictures and prompt alone.

        Raises:
            InputError: Not as many prompts as rows, ``<image>`` in a prompt but not once a picture, settings that do not go
                together, or the paper's decoding, a captioner's.
        """
        # A request that the demo's conversations contain.
        prompts = list(prompts) if prompts is not None else ["Describe the picture."] * len(images)
        out = self.answer_ids(images, prompts, **decoding)
        return [text.strip() for text in self.tokenizer.batch_decode(out, skip_special_tokens=True)]

    @torch.inference_mode()
    def answer_ids(self, images: Sequence[Shown], prompts: Sequence[str], **decoding: Any) -> Tensor:
        """Token ids i64[B, T] of the answers of `predict`, end token included; padding after it in the shorter ones."""
        how = choose_decoding(DecodingConfig(), decoding)
        if how.decoding == "paper":
            raise InputError("decoding=paper is ClipCap's, for captioners", where="decoding", mend="use search or sample")
        if len(prompts) != len(images):
            raise InputError(f"{len(prompts)} prompts for {len(images)} rows", mend="give one prompt a row")
        shown = [_pictures(row) for row in images]
        ids, mask = self._left_padded([self._encode(q, len(row)) for q, row in zip(prompts, shown, strict=True)])
        squares = [self._squares(row) if row else None for row in shown]
        # Of all that an answer depends on, so that its neighbours in the batch are no part of it.
        draws = [
            draw_seed(how.seed or 0, (b"" if pixels is None else pixels.numpy().tobytes()) + prompt.encode())
            for pixels, prompt in zip(squares, prompts, strict=True)
        ]
        pixels = [made for made in squares if made is not None]
        # Left out where there are none: transformers' generate runs the tower for whatever it is given, None too.
        seen = {"pixel_values": self._values(torch.cat(pixels))} if pixels else {}
        out: Tensor = self.model.generate(
            input_ids=ids,
            attention_mask=mask,
            **seen,
            **search_arguments(how, stop=self._stop, fill=int(self.tokenizer.pad_token_id), draws=draws),
        )
        # The prompt comes back with the answer and is cut off by position, which left padding makes the same in all rows.
        return out[:, ids.shape[1] :]

    def _encode(self, question: str, pictures: int) -> list[int]:
        """Ids of a question that comes with this many pictures."""
        try:
            # Not the processor's chat template: this path keeps control tokens that are spelt out in a question plain text.
            return encode_prompt(
                question,
                self.tokenizer,
                self.meta["template"],
                num_images=pictures,
                tokens_per_image=self.meta["num_image_tokens"],
                image_token_id=self.model.config.image_token_id,
            )
        except ConversationError as error:
            # In training such a sample is left out and listed; here somebody waits for its answer.
            what = f"a prompt that cannot be encoded ({error.reason})"
            raise InputError(what, where=repr(question[:60]), mend="write <image> once a picture, or leave it out") from error

    def _left_padded(self, rows: list[list[int]]) -> tuple[Tensor, Tensor]:
        """Ids and mask i64[B, T] of rows of any length.

        Left padding: the last prompt token of every row is the last position, where generation starts. The mask comes from
        lengths, and transformers counts positions from the mask, so padding moves nothing.
        """
        width = max(map(len, rows))
        ids = torch.full((len(rows), width), int(self.tokenizer.pad_token_id), dtype=torch.int64)
        mask = torch.zeros_like(ids)
        for i, row in enumerate(rows):
            ids[i, width - len(row) :] = torch.tensor(row)
            mask[i, width - len(row) :] = 1
        return ids.to(self.device), mask.to(self.device)

    def _squares(self, pictures: Sequence[Image.Image]) -> Tensor:
        """uint8[P, 3, S, S], fitted as in training."""
        return _pixels(pictures, self.meta["image_size"], self.meta["image_fit"], mean_colour(self.meta["mean"]))

    def _values(self, pixels: Tensor) -> Tensor:
        """uint8[P, 3, S, S] normalised, f[P, 3, S, S] in the model's dtype."""
        # Normalised in float32 and rounded once, as in training.
        return normalise(pixels.to(self.device), self._mean, self._std).to(self.model.dtype)


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
    """The kind of a folder that mmkit did not write: timm encoders and LLaVA's class can be opened."""
    if "architecture" in config:
        return "encoder"
    name = str((config.get("architectures") or ["unknown"])[0])
    return "mllm" if name in CLASSES else name


def _pictures(row: Shown) -> list[Image.Image]:
    """The pictures of a row."""
    return [] if row is None else [row] if isinstance(row, Image.Image) else list(row)


def _pixels(images: Sequence[Image.Image], size: int, fit: Fit, fill: tuple[int, int, int] = (0, 0, 0)) -> Tensor:
    """uint8 ``[B, 3, size, size]``; ``fill`` is the colour that ``fit="pad"`` pads with."""
    # convert: callers of the Python API pass pictures of any mode.
    return torch.from_numpy(np.stack([fit_square(image.convert("RGB"), size, fit=fit, fill=fill) for image in images]))
