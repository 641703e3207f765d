"""LLaVA: align a projector, then tune it with the language model (or its LoRA) on conversations (llava.md 1)."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mmkit.config import DataConfig, LlavaRecipe, SourceConfig
from mmkit.data.batching import Lengths
from mmkit.data.conversations import ConversationEncoder
from mmkit.data.images import mean_colour
from mmkit.data.layout import Layout, join
from mmkit.data.lengths import Measured, conversation_lengths
from mmkit.data.message_rows import Opened, look_at_conversations, open_conversations
from mmkit.data.remote import default_cache
from mmkit.data.skipped import LeftOut
from mmkit.distributed.engine import Engine
from mmkit.encoders.vit import normalise
from mmkit.errors import InputError
from mmkit.files import hash_text, new_folder
from mmkit.models.adapters import freeze_for, merge_lora, set_train_mode
from mmkit.models.llava import llava_loss_sum, save_mllm
from mmkit.models.llm import max_positions
from mmkit.models.lm_loss import apply_liger, use_loss_head
from mmkit.models.packed import allow_packing
from mmkit.models.projectors import VisionLanguageModel
from mmkit.models.reuse import tuned_parts
from mmkit.training.objective import Batch, Objective, Sizes, Stage
from mmkit.training.stages.assemble import open_model
from mmkit.training.stages.kept import keep_features
from mmkit.training.stages.turned import ConversationSamples, collate_conversations
from mmkit.training.step_log import check_skipped


class _Read(NamedTuple):
    """Samples, what is left out, how they are cut, how many there are without the recipe's limit, and a hash of the data."""

    samples: ConversationSamples
    left_out: list[LeftOut]
    layout: Layout
    available: int
    fingerprint: str


class LlavaObjective(Objective):
    """Cross-entropy of the assistant's tokens."""

    pixel_mean: Tensor
    pixel_std: Tensor

    def __init__(
        self,
        model: VisionLanguageModel,
        *,
        mean: tuple[float, ...],
        std: tuple[float, ...],
        kept: tuple[int, ...] | None = None,
    ) -> None:
        """Set the model, its mean and standard deviation of pixels, and the shape of a picture's kept features, if they are."""
        super().__init__()
        self.model, self.kept = model, kept
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
        if self.kept is not None:
            # Without pictures an empty set of features, so that no process runs the tower where the others do not.
            pixels = self.pixel_mean.new_zeros(0, *self.kept) if pixels is None else pixels
        elif pixels is not None:
            # uint8 travels to the device, normalised there.
            pixels = normalise(pixels, self.pixel_mean, self.pixel_std)
        rows = {name: batch.get(name) for name in ("attention_mask", "document_lengths")}
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
    # Asked before the model is read.
    if engine.cuts_up and recipe.lora.quantization is not None:
        raise InputError(
            "4-bit weights cannot be cut up by ZeRO-3", where="lora.quantization", mend="use train.deepspeed=zero2, or DDP"
        )
    # In what it computes with: DeepSpeed's bf16 would round fp32 weights anyway, at twice the memory of the host. Without
    # DeepSpeed bf16 is autocast over the weights: frozen ones may be as they are stored, and in fp32 nothing is cast.
    dtype = engine.weight_dtype or (None if recipe.train.precision == "bf16" else torch.float32)
    # Under ZeRO-3 only one process reads them.
    model, processor, meta, parents = open_model(recipe, dtype=dtype, empty=engine.skeleton)
    set_up(model, recipe)
    if engine.weight_dtype is None:
        # A product of a bf16 run is bf16; AdamW on such weights would lose most updates at LLaVA's learning rate.
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.float()
    _check_positions(model, recipe)
    tokenizer = processor.tokenizer
    meta = {**meta, "tuned": tuned_parts(model, meta)}

    encode = ConversationEncoder(
        tokenizer,
        recipe.template,
        tokens_per_image=meta["num_image_tokens"],
        image_token_id=model.config.image_token_id,
        max_length=recipe.max_length,
    )

    def samples_of(sources: Sequence[SourceConfig], limit: int | None) -> _Read:
        read = [_read_items(source, recipe.data, engine) for source in sources]
        # Before the limit, to which what is left out belongs too (Stage.available).
        available = sum(len(found) for found, *_ in read)
        parts = [(found.piece(0, limit or len(found)), source.path) for source, (found, *_) in zip(sources, read, strict=True)]
        fit, size = meta["image_fit"], meta["image_size"]
        bounds = {"max_pixels": recipe.data.max_pixels, "max_bytes": recipe.data.max_bytes}
        # Padding in the encoder's mean colour becomes 0, but for rounding, when pixels are normalised.
        samples = ConversationSamples(parts, encode=encode, size=size, fit=fit, fill=mean_colour(meta["mean"]), **bounds)
        layout = join([Layout.flat(len(found)) for found, _ in parts], [source.weight for source in sources])
        hashes = [fingerprint for *_, fingerprint in read]
        # A list of one is the same data as its path alone.
        fingerprint = hashes[0] if len(hashes) == 1 else hash_text(*hashes)
        if recipe.cache_features:
            keep_features(samples, model, meta, recipe, engine, fingerprint)
        return _Read(samples, [row for _, left_out, _ in read for row in left_out], layout, available, fingerprint)

    samples, left_out, layout, available, data_fingerprint = samples_of(recipe.data.sources, recipe.data.limit)
    lengths = None
    if recipe.batching.kind != "plain":
        # The main process first: it counts with all cores, and the others find what it kept.
        measured = engine.main_first(lambda: _measure(samples, encode, recipe.data, data_fingerprint, left_out))
        lengths, layout = _use(measured, samples, layout, left_out)
        available -= len(measured.unusable)
    validation = None
    data = recipe.data
    if data.val:
        source = SourceConfig(path=data.val, type=data.val_type, image_root=data.val_image_root)
        validation = samples_of([source], None).samples

    def save_product(folder: Path) -> None:
        with new_folder(folder) as new:
            # Merged: the product is a plain LLaVA folder, with no adapter that could part from its base.
            save_mllm(merge_lora(_unquantized(model, recipe)), processor, new, meta=meta)

    # LLaVA's LoRA recipe: 2e-4 for the adapters, 2e-5 for the projector (facts/llava.md 1.2).
    rates = {"model.model.multi_modal_projector": recipe.projector_lr, "model.model.vision_tower": recipe.encoder_lr}
    return Stage(
        objective=LlavaObjective(model, mean=meta["mean"], std=meta["std"], kept=samples.kept_shape),
        samples=samples,
        # No lambda: it has to pickle where loader processes are spawned.
        collate=functools.partial(collate_conversations, pad=tokenizer.pad_token_id, packed=recipe.batching.kind == "packed"),
        save_product=save_product,
        parents=parents,
        data_fingerprint=data_fingerprint,
        left_out=left_out,
        available=available,
        layout=layout,
        batching=recipe.batching,
        lengths=lengths,
        validation=validation,
        # As many as are sure to fit: packed batches have a bound on tokens, which validation must keep too.
        validation_group=max(1, recipe.batching.max_tokens // recipe.max_length) if recipe.batching.max_tokens else None,
        lr_of={part: rate for part, rate in rates.items() if rate is not None},
    )


def _measure(
    samples: ConversationSamples, encode: ConversationEncoder, data: DataConfig, fingerprint: str, left_out: list[LeftOut]
) -> Measured:
    """The length of every conversation, counted once and kept."""
    # What was left out is part of the key: the same file is other conversations when other pictures are missing.
    missing = (f"{row.key} {row.reason}" for row in left_out)
    of = hash_text(fingerprint, str(data.limit), str(data.sources), *missing)
    cache = Path(data.cache) if data.cache else default_cache()
    return conversation_lengths(samples.items, encode, cache=cache, fingerprint=(of, encode.fingerprint()))


def _use(measured: Measured, samples: ConversationSamples, layout: Layout, left_out: list[LeftOut]) -> tuple[Lengths, Layout]:
    """Leave out what cannot be encoded, so that every sample of the order has a length; lengths and layout of the others.

    Raises:
        InputError: Nothing is left.
    """
    for number, reason in measured.unusable:
        left_out.append(LeftOut(*samples.items.describe(number), reason))
    # No tokens stand for what cannot be encoded (`Measured`).
    kept = measured.lengths.tokens > 0
    if not kept.any():
        source, key = samples.items.describe(0)
        what = f"none of {len(kept)} conversations can be used; the first, {key}: {measured.unusable[0][1]}"
        raise InputError(what, where=source, mend="check template and max_length")
    samples.leave_out([number for number, _ in measured.unusable])
    return Lengths(measured.lengths.tokens[kept], measured.lengths.text_only[kept]), layout.keep(kept)


def _check_positions(model: Any, recipe: LlavaRecipe) -> None:
    """Refuse sequences longer than the language model has positions for.

    Raises:
        InputError: With both numbers.
    """
    positions = max_positions(model.config.text_config)
    if recipe.max_length > positions:
        raise InputError(
            f"max_length {recipe.max_length} is more than the language model's {positions} positions",
            where="max_length",
            mend=f"use {positions} or less",
        )


def set_up(model: Any, recipe: LlavaRecipe) -> None:
    """What of a model trains, and how it computes, in place."""
    lora = recipe.lora.model_dump() if recipe.tune == "lora" else None
    freeze_for(model, recipe.tune, lora=lora, train_encoder=recipe.train_encoder, seed=recipe.seed)
    if recipe.grad_checkpointing:
        # The reentrant kind computes no gradients where a block's inputs have none, as above frozen embeddings.
        # Newer versions warn of the old name, older ones know no other.
        enable = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)
        enable({"use_reentrant": False})
        # transformers' cure for that: embeddings that ask for a gradient, the frozen tower's too, which then keeps everything.
        model.disable_input_require_grads()
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
    # Read again now and not kept beside: room for whole weights is what 4 bits were to save.
    whole, *_ = open_model(recipe)
    lora = recipe.lora.model_dump() | {"quantization": None}
    freeze_for(whole, "lora", lora=lora, train_encoder=recipe.train_encoder, seed=recipe.seed)
    trained = {name: p.detach().to("cpu") for name, p in model.named_parameters() if p.requires_grad}
    missing = {name for name, p in whole.named_parameters() if p.requires_grad} ^ trained.keys()
    assert not missing, f"the quantised model trained other parameters: {sorted(missing)[:3]}"
    # Not strict: `trained` has what training changed; all else is as it was read.
    whole.load_state_dict(trained, strict=False)
    return whole


def _read_items(source: SourceConfig, data: DataConfig, engine: Engine) -> Opened:
    """Usable conversations of a data set, what is left out of it, and a hash of it.

    The main process reads a JSON file and looks for the pictures; all map what it has kept.

    Raises:
        InputError: Another kind of data, no usable conversation, or too few.
    """
    cache = Path(data.cache) if data.cache else default_cache()
    where: dict[str, Any] = {"image_root": source.image_root, "cache": cache}
    told = [look_at_conversations(source.path, source.type, **where)] if engine.is_main else []
    # First without a timeout: parsing half a million conversations takes a minute.
    engine.barrier()
    told = engine.gather(told)
    items, left_out, fingerprint = engine.main_first(lambda: open_conversations(source.path, source.type, **where, told=told[0]))
    # Before the model trains a step: a wrong image root leaves everything out.
    check_skipped(len(left_out), len(items) + len(left_out), data.max_skipped, where=_reasons(source.path, left_out))
    return items, left_out, fingerprint


def _reasons(path: str, left_out: list[LeftOut]) -> str:
    """The file, and the first reasons in it: the run directory does not exist yet."""
    shown = "; ".join(f"{s.key}: {s.reason}" for s in left_out[:3])
    return f"{path} ({shown})" if shown else path
