"""LLaVA: align a projector, then tune it with the language model (or its LoRA) on conversations (llava.md 1)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from mmkit.config import DataConfig, LlavaRecipe, SourceConfig
from mmkit.data.conversations import ConversationError, EncodedConversation, encode_conversation
from mmkit.data.images import Fit, ImageRef, Pixels, decode_image, fit_square
from mmkit.data.layout import Layout, join
from mmkit.data.llava_json import LlavaItem, read_llava
from mmkit.data.packing import pack_sequences
from mmkit.data.skipped import LeftOut, SampleError
from mmkit.distributed.engine import Engine
from mmkit.errors import InputError
from mmkit.files import hash_file, hash_text, new_folder
from mmkit.models.adapters import freeze_for, merge_lora, set_train_mode
from mmkit.models.llava import llava_loss_sum, save_mllm
from mmkit.models.lm_loss import apply_liger, use_loss_head
from mmkit.models.packed import allow_packing
from mmkit.models.projectors import VisionLanguageModel
from mmkit.models.reuse import tuned_parts
from mmkit.training.objective import Batch, Objective, Sizes, Stage
from mmkit.training.stages.assemble import open_model
from mmkit.training.step_log import check_skipped


class Turned(NamedTuple):
    """A picture (uint8 ``[3, S, S]`` or None) and its encoded conversation."""

    pixels: Pixels | None
    encoded: EncodedConversation
    key: str


class ConversationSamples:
    """Conversations with their picture; text is encoded when it is asked for, by the loader's workers."""

    def __init__(
        self, items: list[tuple[LlavaItem, str]], *, encode: Any, size: int, fit: Fit, max_pixels: int, max_bytes: int
    ) -> None:
        self.items, self.encode = items, encode
        self.size, self.fit, self.max_pixels, self.max_bytes = size, fit, max_pixels, max_bytes

    def __len__(self) -> int:
        return len(self.items)

    def describe(self, index: int) -> tuple[str, str]:
        """Source file and id of a conversation."""
        item, source = self.items[index]
        return source, item.id

    def load(self, index: int, rng: np.random.Generator) -> Turned:
        """Picture and token ids of one conversation."""
        item, _ = self.items[index]
        try:
            # Text first: a conversation that does not fit costs no decoding.
            encoded = self.encode(item)
        except ConversationError as error:
            # What the loader replaces; the reason without the exception's chain, since it goes into a list.
            raise SampleError(error.reason) from None
        if item.image is None:
            return Turned(None, encoded, item.id)
        image = decode_image(ImageRef(str(item.image)).read(self.max_bytes), max_pixels=self.max_pixels)
        return Turned(fit_square(image, self.size, fit=self.fit), encoded, item.id)


# Samples, what is left out, how they are cut, and how many there are without the recipe's limit.
_Opened = tuple[ConversationSamples, list[LeftOut], Layout, int]


def collate_conversations(samples: list[Turned], *, pad: int, packed: bool) -> Batch:
    """Token sequences and their pictures as one batch.

    Args:
        samples: Conversations.
        pad: Id that fills up short rows.
        packed: All in one row, instead of a row each.

    Returns:
        ``pixels`` uint8[P, 3, S, S] of the samples that have some, in order, or None; ``cut``, how many samples were cut to
        fit; and the sequences: packed as of `pack_sequences`, else right-padded ``input_ids``, ``labels`` and ``attention_mask``
        i64[B, T]. The mask comes from lengths: a pad or unk id inside a text is a token like any other.
    """
    # No black pictures for text-only rows, as LLaVA adds them: the tower would compute them for nothing.
    pictures = [torch.from_numpy(s.pixels) for s in samples if s.pixels is not None]
    common = {
        "pixels": torch.stack(pictures) if pictures else None,
        "keys": [s.key for s in samples],
        "cut": sum(s.encoded.cut for s in samples),
    }
    if packed:
        return {**pack_sequences([s.encoded.input_ids for s in samples], [s.encoded.labels for s in samples]), **common}
    return {**_padded(samples, pad), **common}


def _padded(samples: list[Turned], pad: int) -> Batch:
    """A row for each sample, to the length of the longest."""
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
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


class LlavaObjective(Objective):
    """Cross-entropy of the assistant's tokens."""

    def __init__(self, model: VisionLanguageModel, *, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
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
        rows = {name: batch.get(name) for name in ("attention_mask", "cu_seqlens", "max_seqlen")}
        loss_sum, _ = llava_loss_sum(self.model, batch["input_ids"], labels=batch["labels"], pixel_values=pixels, **rows)
        return loss_sum

    def count(self, batch: Batch) -> int:
        """Supervised tokens; the first position predicts nothing."""
        # Must count exactly what llava_loss_sum sums over.
        return int((batch["labels"][:, 1:] != -100).sum())

    def sizes(self, batch: Batch) -> Sizes:
        """True tokens, positions computed, conversations cut to fit."""
        positions = batch["input_ids"].numel()
        mask = batch.get("attention_mask")
        return Sizes(positions if mask is None else int(mask.sum()), positions, batch["cut"])


def build_llava_stage(recipe: LlavaRecipe, engine: Engine) -> Stage:
    """Model (assembled, or gone on from), conversations, and what of it is trained.

    Raises:
        InputError: As the parts raise it, or too many conversations are unusable.
    """
    model, processor, meta, parents = open_model(recipe)
    _set_up(model, recipe)
    tokenizer = processor.tokenizer
    meta = {**meta, "tuned": tuned_parts(model, meta)}

    def encode(item: LlavaItem) -> EncodedConversation:
        return encode_conversation(
            item.turns,
            tokenizer,
            recipe.template,
            # Image tokens are part of the length: LLaVA cuts after expansion and so loses answers (facts/llava.md 1.5).
            num_image_tokens=meta["num_image_tokens"] if item.image else 0,
            image_token_id=model.config.image_token_id,
            max_length=recipe.max_length,
        )

    def samples_of(sources: Sequence[SourceConfig], limit: int | None) -> _Opened:
        read = [_read_items(source, recipe.data) for source in sources]
        available = sum(len(found) for found, _ in read)
        read = [(found[:limit], left_out) for found, left_out in read]
        items = [(item, source.path) for source, (found, _) in zip(sources, read, strict=True) for item in found]
        fit, size = meta["image_fit"], meta["image_size"]
        bounds = {"max_pixels": recipe.data.max_pixels, "max_bytes": recipe.data.max_bytes}
        samples = ConversationSamples(items, encode=encode, size=size, fit=fit, **bounds)
        layout = join([Layout.flat(len(found)) for found, _ in read], [source.weight for source in sources])
        return samples, [row for _, left_out in read for row in left_out], layout, available

    samples, left_out, layout, available = samples_of(recipe.data.sources, recipe.data.limit)
    validation = None
    data = recipe.data
    if data.val:
        validation, *_ = samples_of([SourceConfig(path=data.val, type=data.val_type, image_root=data.val_image_root)], None)

    def save_product(folder: Path) -> None:
        with new_folder(folder) as new:
            # Merged: the product is a plain LLaVA folder, with no adapter that could part from its base.
            save_mllm(merge_lora(_unquantized(model, recipe)), processor, new, meta=meta)

    # LLaVA's LoRA recipe: 2e-4 for the adapters, 2e-5 for the projector (facts/llava.md 1.2).
    rates = {"model.model.multi_modal_projector": recipe.projector_lr, "model.model.vision_tower": recipe.encoder_lr}
    return Stage(
        objective=LlavaObjective(model, mean=meta["mean"], std=meta["std"]),
        samples=samples,
        collate=lambda batch: collate_conversations(batch, pad=tokenizer.pad_token_id, packed=recipe.batching.kind == "packed"),
        save_product=save_product,
        parents=parents,
        data_fingerprint=_fingerprint(recipe.data.sources),
        left_out=left_out,
        available=available,
        layout=layout,
        validation=validation,
        lr_of={part: rate for part, rate in rates.items() if rate is not None},
    )


def _set_up(model: Any, recipe: LlavaRecipe) -> None:
    """What of a model trains, and how it computes, in place."""
    lora = recipe.lora.model_dump() if recipe.tune == "lora" else None
    freeze_for(model, recipe.tune, lora=lora, train_encoder=recipe.train_encoder, seed=recipe.seed)
    if recipe.grad_checkpointing:
        # The reentrant kind computes no gradients where a block's inputs have none, as above frozen embeddings.
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.enable_input_require_grads()
    use_loss_head(model, "liger" if recipe.liger else "chunked")
    if recipe.liger:
        apply_liger(model.model.language_model)
    if recipe.batching.kind == "packed":
        allow_packing(model.model.language_model)


def _unquantized(model: Any, recipe: LlavaRecipe) -> Any:
    """The model with the weights that were quantised for training as they were before; itself where none were.

    Adapters are merged into the original weights, not into ones that went to 4 bits and back.
    """
    if recipe.tune != "lora" or recipe.lora.quantization is None:
        return model
    whole, *_ = open_model(recipe)
    lora = recipe.lora.model_dump() | {"quantization": None}
    freeze_for(whole, "lora", lora=lora, train_encoder=recipe.train_encoder, seed=recipe.seed)
    trained = {name: p.detach().to("cpu") for name, p in model.named_parameters() if p.requires_grad}
    missing = {name for name, p in whole.named_parameters() if p.requires_grad} ^ trained.keys()
    assert not missing, f"the quantised model trained other parameters: {sorted(missing)[:3]}"
    whole.load_state_dict(trained, strict=False)
    return whole


def _read_items(source: SourceConfig, data: DataConfig) -> tuple[list[LlavaItem], list[LeftOut]]:
    """Usable conversations of a file, and what is left out of it.

    Raises:
        InputError: Another kind of data, no usable conversation, or too few.
    """
    if source.type not in ("auto", "llava"):
        raise InputError(f"data type {source.type!r} holds no conversations", where=source.path, mend="use llava")
    path = Path(source.path)
    # Without a root, paths are relative to the file: a data folder that is moved as a whole stays usable.
    items, left_out = read_llava(path, image_root=Path(source.image_root) if source.image_root else path.parent)
    # Before the model trains a step: a wrong image root leaves everything out.
    check_skipped(len(left_out), len(items) + len(left_out), data.max_skipped, where=_reasons(source.path, left_out))
    return items, left_out


def _fingerprint(sources: Sequence[SourceConfig]) -> str:
    """Hash of the files' content."""
    hashes = [hash_file(Path(source.path)) for source in sources]
    return hashes[0] if len(hashes) == 1 else hash_text(*hashes)


def _reasons(path: str, left_out: list[LeftOut]) -> str:
    """The file, and the first reasons in it: the run directory does not exist yet."""
    shown = "; ".join(f"{s.key}: {s.reason}" for s in left_out[:3])
    return f"{path} ({shown})" if shown else path
