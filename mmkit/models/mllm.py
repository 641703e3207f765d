"""A LLaVA-style model ready for inference: questions and pictures in, answers out."""

from __future__ import annotations

import functools
from collections.abc import Hashable, Sequence
from typing import Any, Union

import torch
from PIL import Image
from torch import Tensor

from mmkit.config import DecodingConfig
from mmkit.data.conversations import ConversationError, encode_prompt, stop_tokens
from mmkit.data.images import Pixels, fit_square, mean_colour
from mmkit.encoders.vit import normalise
from mmkit.errors import InputError
from mmkit.models.answering import AnswerWriter, Asked, Prompt
from mmkit.models.decoding import bare_settings, choose_decoding, draw_seed
from mmkit.models.generation import add_stop_tokens, settle_generation, stop_ids
from mmkit.models.published import open_mllm
from mmkit.models.towers import idle_blocks, passed_through

# What a row of a question shows: a picture, several, or none.
Shown = Union[Image.Image, Sequence[Image.Image], None]


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
        # The same object for equal beginnings.
        self._same = functools.lru_cache(maxsize=256)(_itself)
        self._idle = idle_blocks(self.model.model.vision_tower, self.model.config.vision_feature_layer)
        self._mean = torch.tensor(self.meta["mean"], device=device).view(1, 3, 1, 1)
        self._std = torch.tensor(self.meta["std"], device=device).view(1, 3, 1, 1)
        # The tokenizer's and the template's beside the model's own list: folders of older versions know only the first.
        add_stop_tokens(self.model, stop_tokens(self.meta["template"], self.tokenizer))
        settle_generation(self.model, self.tokenizer)
        self.writer = AnswerWriter(self.model, stop=stop_ids(self.model), fill=int(self.tokenizer.pad_token_id))

    def predict(self, images: Sequence[Shown], prompts: Sequence[str] | None = None, **decoding: Any) -> list[str]:
        """An answer for each row, greedy unless asked otherwise; a row's answer does not depend on the others.

        Args:
            images: What each row shows: an RGB picture, a list of pictures, or None for a question without one. A picture object
                that several rows show is encoded once.
            prompts: One question a row; None asks for a description.
            **decoding: Keys of `DecodingConfig`. With sampling an answer depends on seed, pictures and prompt alone.

        Raises:
            InputError: Not as many prompts as rows, ``<image>`` in a prompt but not once a picture, settings that do not go
                together, or the paper's decoding, a captioner's.
        """
        # A request that the demo's conversations contain.
        prompts = list(prompts) if prompts is not None else ["Describe the picture."] * len(images)
        return self.texts(self._answers(images, prompts, decoding))

    def answer_ids(self, images: Sequence[Shown], prompts: Sequence[str], **decoding: Any) -> Tensor:
        """Token ids i64[B, T] of the answers of `predict`, end token included; padding after it in the shorter ones."""
        rows = [torch.tensor(ids) for ids in self._answers(images, prompts, decoding)]
        return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=int(self.tokenizer.pad_token_id))

    def texts(self, answers: Sequence[Sequence[int]]) -> list[str]:
        """Answers as text."""
        return [text.strip() for text in self.tokenizer.batch_decode(answers, skip_special_tokens=True)]

    def _answers(self, images: Sequence[Shown], prompts: Sequence[str], decoding: dict[str, Any]) -> list[list[int]]:
        how = self.choose(decoding)
        if len(prompts) != len(images):
            raise InputError(f"{len(prompts)} prompts for {len(images)} rows", mend="give one prompt a row")
        shown = [_pictures(row) for row in images]
        # Encoded before anything is computed: a prompt that cannot be asked is told at once.
        read = [self.prompt(prompt, len(row)) for prompt, row in zip(prompts, shown, strict=True)]
        # By identity: two equal objects cost time, a wrong match would cost the answer.
        distinct = {id(picture): picture for row in shown for picture in row}
        squares = {key: self.square(picture) for key, picture in distinct.items()}
        features = dict(zip(squares, self.features(list(squares.values())), strict=True)) if squares else {}
        asked = [
            self.ask(
                ids,
                [features[id(picture)] for picture in row],
                key=(*map(id, row), ids.beginning),
                draw=self.draw(how, prompt, [squares[id(picture)] for picture in row]),
            )
            for ids, prompt, row in zip(read, prompts, shown, strict=True)
        ]
        return self.writer.write(asked, how) if asked else []

    def choose(self, decoding: dict[str, Any]) -> DecodingConfig:
        """Decoding settings, greedy where nothing else is given.

        Raises:
            InputError: Settings that do not go together, or the paper's decoding, a captioner's.
        """
        how = choose_decoding(DecodingConfig(), decoding)
        if how.decoding == "paper":
            raise InputError("decoding=paper is ClipCap's, for captioners", where="decoding", mend="use search or sample")
        return how

    def ask(self, prompt: Prompt, features: Sequence[Tensor], *, key: Hashable, draw: int = 0) -> Asked:
        """A question as the language model reads it.

        Args:
            prompt: Of `prompt`.
            features: Of its pictures, in order.
            key: Names its beginning: questions of one key show the same pictures after the same words. None shares nothing.
            draw: Of `draw`.
        """
        shared = 0 if key is None else len(prompt.beginning)
        return Asked(prompt.beginning + prompt.rest, torch.cat(list(features)) if features else None, shared, key, draw)

    def prompt(self, question: str, pictures: int) -> Prompt:
        """A question that comes with this many pictures, what may be shared apart. Raises InputError, as `encode`."""
        ids = self.encode(question, pictures)
        image = self.model.config.image_token_id
        end = next((len(ids) - i for i, token in enumerate(reversed(ids)) if token == image), 0)
        if end == len(ids):
            # The plain template shows the picture and asks nothing: there has to be a token to go on from.
            return Prompt((), tuple(ids))
        # Hundreds of ids, the same for most questions of a benchmark.
        return Prompt(self._same(tuple(ids[:end])), tuple(ids[end:]))

    def draw(self, how: DecodingConfig, prompt: str, squares: Sequence[Pixels]) -> int:
        """Seed of a row's draws: of all that its answer depends on, so that its neighbours in the batch are no part of it."""
        if how.decoding != "sample":
            return 0
        return draw_seed(how.seed or 0, b"".join(square.tobytes() for square in squares) + prompt.encode())

    def encode(self, question: str, pictures: int) -> list[int]:
        """Ids of a question that comes with this many pictures.

        Raises:
            InputError: It cannot be asked: ``<image>`` not once a picture, or text that the template cannot keep.
        """
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

    def square(self, picture: Image.Image) -> Pixels:
        """uint8[3, S, S] of a picture of any mode, fitted as in training."""
        size, fit = self.meta["image_size"], self.meta["image_fit"]
        return fit_square(picture.convert("RGB"), size, fit=fit, fill=mean_colour(self.meta["mean"]))

    @torch.inference_mode()
    def features(self, squares: Sequence[Pixels]) -> list[Tensor]:
        """Squares through tower and projector: for each picture f[N, H], in the places of its tokens."""
        with passed_through(self._idle):
            found = self.model.get_image_features(self.values(squares), return_dict=True).pooler_output
        # Each on its own: a piece of the batch would keep all of it.
        return [part.clone() for part in found]

    def values(self, squares: Sequence[Pixels]) -> Tensor:
        """Squares normalised, f[P, 3, S, S] in the model's dtype."""
        pixels = torch.stack([torch.from_numpy(square) for square in squares])
        # Normalised in float32 and rounded once, as in training.
        return normalise(pixels.to(self.device), self._mean, self._std).to(self.model.dtype)


def _itself(ids: tuple[int, ...]) -> tuple[int, ...]:
    return ids


def _pictures(row: Shown) -> list[Image.Image]:
    """The pictures of a row."""
    return [] if row is None else [row] if isinstance(row, Image.Image) else list(row)
