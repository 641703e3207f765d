"""LLaVA: align a projector, then tune it with the language model (or its LoRA) on conversations (llava.md 1)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from transformers import LlavaForConditionalGeneration

from mmkit.config import DataConfig, LlavaRecipe, SourceConfig
from mmkit.data.conversations import ConversationEncoder, EncodedConversation, stop_tokens
from mmkit.data.images import Fit, Pixels, decode_image, fit_square
from mmkit.data.items import Conversation, ConversationSet, JoinedConversations
from mmkit.data.layout import Layout, join
from mmkit.data.message_rows import Opened, open_conversations
from mmkit.data.skipped import LeftOut
from mmkit.distributed.engine import Engine
from mmkit.encoders.save import load_encoder
from mmkit.encoders.siglip import to_siglip
from mmkit.files import hash_text, new_folder
from mmkit.models.adapters import freeze_for, merge_lora, set_train_mode
from mmkit.models.llava import build_llava, build_processor, llava_loss_sum, load_mllm, save_mllm
from mmkit.models.llm import build_llm, load_tokenizer
from mmkit.run import Parent, resolve_parent
from mmkit.training.objective import Batch, Objective, Stage
from mmkit.training.step_log import check_skipped


class Turned(NamedTuple):
    """The pictures of a conversation (uint8 ``[3, S, S]`` each, those that fit) and its encoding."""

    pixels: list[Pixels]
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
        max_pixels: int,
        max_bytes: int,
    ) -> None:
        """Take data sets with their names, and how text and pictures are prepared."""
        self.encode = encode
        self.items = JoinedConversations(parts)
        self.size, self.fit, self.max_pixels, self.max_bytes = size, fit, max_pixels, max_bytes

    def __len__(self) -> int:
        return len(self.items)

    def describe(self, index: int) -> tuple[str, str]:
        """Source file and id of a conversation."""
        return self.items.describe(index)

    def load(self, index: int, rng: np.random.Generator) -> Turned:
        """Pictures and token ids of one conversation. Raises SampleError: the text does not fit, or a picture cannot be read."""
        item = self.items[index]
        # Text first: a conversation that does not fit costs no decoding, and no more does a picture that is cut off with its
        # turn.
        encoded = self.encode(item)
        pixels = []
        for picture in item.images[: encoded.num_images]:
            image = decode_image(picture.read(self.max_bytes), max_pixels=self.max_pixels)
            pixels.append(fit_square(image, self.size, fit=self.fit))
        return Turned(pixels, encoded, item.id)


class _Read(NamedTuple):
    """Samples, what is left out, how they are cut, how many there are without the recipe's limit, and a hash of the data."""

    samples: ConversationSamples
    left_out: list[LeftOut]
    layout: Layout
    available: int
    fingerprint: str


def collate_conversations(samples: list[Turned], *, pad: int) -> Batch:
    """Right-padded ``input_ids``, ``attention_mask``, ``labels`` i64 ``[B, T]``, and ``pixels`` uint8 ``[P, 3, S, S]``.

    The P pictures are those of the rows, in order, however many each has; None when no row has any. The mask comes from lengths:
    a pad or unk id inside a text is a token like any other. Beside them ``supervised``, the tokens that are learnt from, and
    ``cut``, how many conversations were cut to fit.
    """
    longest = max(len(s.encoded.input_ids) for s in samples)
    ids = torch.full((len(samples), longest), pad, dtype=torch.int64)
    # Padding is never learnt, whichever id it has: with unk or the end token as padding the id cannot tell.
    labels = torch.full_like(ids, -100)
    mask = torch.zeros_like(ids)
    for i, sample in enumerate(samples):
        length = len(sample.encoded.input_ids)
        ids[i, :length] = torch.tensor(sample.encoded.input_ids)
        labels[i, :length] = torch.tensor(sample.encoded.labels)
        mask[i, :length] = 1
    # No black pictures for text-only rows, as LLaVA adds them: the tower would compute them for nothing.
    pictures = [torch.from_numpy(pixels) for s in samples for pixels in s.pixels]
    return {
        "input_ids": ids,
        "attention_mask": mask,
        "labels": labels,
        "pixels": torch.stack(pictures) if pictures else None,
        "keys": [s.key for s in samples],
        "supervised": sum(s.encoded.num_supervised for s in samples),
        "cut": sum(s.encoded.cut for s in samples),
    }


class LlavaObjective(Objective):
    """Cross-entropy of the assistant's tokens."""

    def __init__(self, model: LlavaForConditionalGeneration, *, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
        super().__init__()
        self.model = model
        # Not persistent: they are in the product's meta already, and a checkpoint holds what training changes.
        self.register_buffer("pixel_mean", torch.tensor(mean).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("pixel_std", torch.tensor(std).view(1, 3, 1, 1), persistent=False)

    def train(self, mode: bool = True) -> LlavaObjective:
        """Training mode for what is trained only: a frozen tower or language model keeps its dropout off."""
        super().train(mode)
        set_train_mode(self.model, mode)
        return self

    def forward(self, batch: Batch) -> Tensor:
        """Loss sum over supervised tokens, fp32 scalar."""
        pixels = batch["pixels"]
        if pixels is not None:
            # uint8 travels to the device, normalised there.
            pixels = (pixels.float() / 255.0 - self.pixel_mean) / self.pixel_std
        loss_sum, _ = llava_loss_sum(self.model, batch["input_ids"], batch["attention_mask"], batch["labels"], pixels)
        return loss_sum

    def count(self, batch: Batch) -> int:
        """Supervised tokens; the first position predicts nothing."""
        # Must count exactly what llava_loss_sum sums over.
        return int((batch["labels"][:, 1:] != -100).sum())


def build_llava_stage(recipe: LlavaRecipe, engine: Engine) -> Stage:
    """Model (assembled, or gone on from), conversations, and what of it is trained.

    Raises:
        InputError: As the parts raise it, or too many conversations are unusable.
    """
    model, processor, meta, parents = _open_model(recipe)
    # The projector's learning rate is the optimizer's business, not peft's.
    lora = recipe.lora.model_dump(exclude={"projector_lr"}) if recipe.tune == "lora" else None
    model = freeze_for(model, recipe.tune, lora=lora, seed=recipe.seed)
    if recipe.grad_checkpointing:
        # The reentrant kind computes no gradients where a block's inputs have none, as above frozen embeddings.
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.enable_input_require_grads()
    tokenizer = processor.tokenizer
    # Saved with the model, so that other programs stop where this one does; the LLM's own stop tokens stay.
    own = model.generation_config.eos_token_id
    stops = [*stop_tokens(recipe.template, tokenizer), *([] if own is None else [own] if isinstance(own, int) else own)]
    model.generation_config.eos_token_id = list(dict.fromkeys(stops))

    encode = ConversationEncoder(
        tokenizer,
        recipe.template,
        tokens_per_image=meta["num_image_tokens"],
        image_token_id=model.config.image_token_id,
        max_length=recipe.max_length,
    )

    def samples_of(sources: Sequence[SourceConfig], limit: int | None) -> _Read:
        read = [_read_items(source, recipe.data) for source in sources]
        available = sum(len(found) for found, *_ in read)
        parts = [(found.take(limit), source.path) for source, (found, *_) in zip(sources, read, strict=True)]
        fit, size = meta["image_fit"], meta["image_size"]
        bounds = {"max_pixels": recipe.data.max_pixels, "max_bytes": recipe.data.max_bytes}
        samples = ConversationSamples(parts, encode=encode, size=size, fit=fit, **bounds)
        layout = join([Layout.flat(len(found)) for found, _ in parts], [source.weight for source in sources])
        hashes = [fingerprint for *_, fingerprint in read]
        fingerprint = hashes[0] if len(hashes) == 1 else hash_text(*hashes)
        return _Read(samples, [row for _, left_out, _ in read for row in left_out], layout, available, fingerprint)

    read = samples_of(recipe.data.sources, recipe.data.limit)
    validation = None
    data = recipe.data
    if data.val:
        source = SourceConfig(path=data.val, type=data.val_type, image_root=data.val_image_root)
        validation = samples_of([source], None).samples

    def save_product(folder: Path) -> None:
        with new_folder(folder) as new:
            # Merged: the product is a plain LLaVA folder, with no adapter that could part from its base.
            save_mllm(merge_lora(model), processor, new, meta=meta)

    # LLaVA's LoRA recipe: 2e-4 for the adapters, 2e-5 for the projector (facts/llava.md 1.2).
    projector_lr = recipe.lora.projector_lr if recipe.tune == "lora" else None
    return Stage(
        objective=LlavaObjective(model, mean=meta["mean"], std=meta["std"]),
        samples=read.samples,
        collate=lambda batch: collate_conversations(batch, pad=tokenizer.pad_token_id),
        save_product=save_product,
        parents=parents,
        data_fingerprint=read.fingerprint,
        left_out=read.left_out,
        available=read.available,
        layout=read.layout,
        validation=validation,
        lr_of={"model.model.multi_modal_projector": projector_lr} if projector_lr else {},
    )


def _read_items(source: SourceConfig, data: DataConfig) -> Opened:
    """Usable conversations of a data set, what is left out of it, and a hash of it.

    Raises:
        InputError: Another kind of data, no usable conversation, or too few.
    """
    items, left_out, fingerprint = open_conversations(source.path, source.type, image_root=source.image_root)
    # Before the model trains a step: a wrong image root leaves everything out.
    check_skipped(len(left_out), len(items) + len(left_out), data.max_skipped, where=_reasons(source.path, left_out))
    return items, left_out, fingerprint


def _reasons(path: str, left_out: list[LeftOut]) -> str:
    """The file, and the first reasons in it: the run directory does not exist yet."""
    shown = "; ".join(f"{s.key}: {s.reason}" for s in left_out[:3])
    return f"{path} ({shown})" if shown else path


def _open_model(recipe: LlavaRecipe) -> tuple[Any, Any, dict[str, Any], list[Parent]]:
    """Model, processor, meta and parents: loaded from another run, or assembled from an encoder and an LLM."""
    if recipe.model is not None:
        parent = resolve_parent("model", recipe.model)
        model, processor, meta = load_mllm(parent.folder or Path(recipe.model))
        # These two may change between the stages: LLaVA aligns with plain text and crops, and tunes with Vicuna's and padding.
        meta = {**meta, "template": recipe.template, "image_fit": recipe.image_fit}
        # Made anew, since the chat template inside belongs to the conversation template.
        processor = build_processor(
            processor.tokenizer,
            image_size=meta["image_size"],
            patch_size=meta["patch_size"],
            mean=meta["mean"],
            std=meta["std"],
            template=recipe.template,
        )
        return model, processor, meta, [parent]
    assert recipe.encoder is not None and recipe.llm is not None
    parent = resolve_parent("encoder", recipe.encoder)
    encoder = load_encoder(parent.folder or recipe.encoder)
    patch = encoder.backbone.patch_embed.patch_size[0]
    # The recipe's schema sees to it that one of the two is given.
    tokenizer = load_tokenizer(recipe.llm.tokenizer or recipe.llm.name or "")
    llm = build_llm(
        recipe.llm.name, config=recipe.llm.config, pretrained=recipe.llm.name is not None, seed=recipe.seed, tokenizer=tokenizer
    )
    # to_siglip rewrites the encoder in SigLIP's layout, so that transformers opens the product without mmkit.
    model = build_llava(
        to_siglip(encoder), llm, tokenizer, feature_layer=recipe.feature_layer, projector=recipe.projector, seed=recipe.seed
    )
    processor = build_processor(
        tokenizer, image_size=encoder.image_size, patch_size=patch, mean=encoder.mean, std=encoder.std, template=recipe.template
    )
    # What prediction and the next stage need, and no model format has a place for.
    meta = {
        "template": recipe.template,
        "chat_template": tokenizer.get_chat_template() if tokenizer.chat_template else None,
        "image_fit": recipe.image_fit,
        "image_size": encoder.image_size,
        "patch_size": patch,
        "num_image_tokens": encoder.num_tokens,
        "mean": list(encoder.mean),
        "std": list(encoder.std),
        "encoder": {"path": recipe.encoder, "fingerprint": parent.fingerprint},
        "llm": {"name": recipe.llm.name},
    }
    parents = [parent] + ([resolve_parent("llm", recipe.llm.name)] if recipe.llm.name else [])
    return model, processor, meta, parents
