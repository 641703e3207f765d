"""ClipCap: features of a frozen encoder, a mapper, a language model that writes the caption (clipcap.md)."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedModel

from mmkit.config import ClipcapRecipe
from mmkit.data.batching import Lengths
from mmkit.data.images import decode_image
from mmkit.data.layout import Layout
from mmkit.data.packing import pad_sequences
from mmkit.data.pairs import Pair, PairSource
from mmkit.data.skipped import LeftOut, SampleError
from mmkit.data.sources import open_pairs, open_training_pairs, options_of
from mmkit.distributed.engine import Engine
from mmkit.encoders.mapped import mapped_features
from mmkit.encoders.save import load_encoder, save_encoder
from mmkit.encoders.vit import VisionEncoder
from mmkit.errors import InputError
from mmkit.files import hash_text, new_folder
from mmkit.models.captioning import caption_ids, end_token, stop_tokens
from mmkit.models.clipcap import ClipCap, check_fit, save_captioner
from mmkit.models.clipcap import build_clipcap as build_captioner
from mmkit.models.llm import build_llm, load_tokenizer
from mmkit.run import resolve_parent
from mmkit.training.objective import Batch, Monitor, Objective, Sizes, Stage
from mmkit.training.stages.caption_monitor import CaptionMonitor

logger = logging.getLogger(__name__)
# Pictures whose features are looked at together; the result does not depend on it.
_LOOK = 64


class CaptionedFeatures(NamedTuple):
    """Features ``[D]`` or ``[N, D]`` of a picture and the token ids of one caption, end token included."""

    features: Tensor
    ids: list[int]
    key: str


class FeatureSamples:
    """Captions with the features of their picture, extracted once a picture."""

    def __init__(self, pairs: list[Pair], ids: list[list[int]], features: Tensor, rows: NDArray[np.int64]) -> None:
        """Take pairs, their captions' ids, the features of all pictures, and the row of each pair's picture in them."""
        self.pairs, self.ids, self.features, self.rows = pairs, ids, features, rows

    def __len__(self) -> int:
        return len(self.pairs)

    def describe(self, index: int) -> tuple[str, str]:
        """Source and key of a pair."""
        return self.pairs[index].source, self.pairs[index].key

    def load(self, index: int, rng: np.random.Generator) -> CaptionedFeatures:
        """Features and ids of one pair."""
        return CaptionedFeatures(self.features_of(index), self.ids[index], self.pairs[index].name)

    def features_of(self, index: int) -> Tensor:
        """Features ``[D]`` or ``[N, D]`` of the picture of one pair."""
        return self.features[int(self.rows[index])]


def collate_captions(samples: list[CaptionedFeatures]) -> Batch:
    """``features`` ``[B, ...]`` and the captions as of `pad_sequences`; all of a caption is learnt."""
    ids = [s.ids for s in samples]
    features = torch.stack([s.features for s in samples])
    # 0 fills up and is an id like any other: masks come from lengths. The reference ignores id 0, which is GPT-2's "!".
    return {"features": features, **pad_sequences(ids, ids, 0), "keys": [s.key for s in samples]}


class ClipcapObjective(Objective):
    """Cross-entropy of the caption given the prefix."""

    def __init__(self, model: ClipCap) -> None:
        super().__init__()
        self.model = model

    def forward(self, batch: Batch) -> Tensor:
        """Loss sum over caption tokens, fp32 scalar."""
        output = self.model(
            features=batch["features"],
            input_ids=batch["input_ids"],
            attention_mask=batch["attention_mask"],
            labels=batch["labels"],
        )
        # Not the mean: the engine divides by the tokens of the whole step, over all ranks and micro-batches.
        loss_sum: Tensor = output.loss_sum
        return loss_sum

    def count(self, batch: Batch) -> int:
        """Supervised tokens."""
        # Position P - 1 + t predicts token t, so the first token counts too.
        return int((batch["labels"] != -100).sum())

    def sizes(self, batch: Batch) -> Sizes:
        """Caption tokens and positions; the prefix, the same for every caption, is not counted."""
        return Sizes(int(batch["attention_mask"].sum()), batch["input_ids"].numel())


def build_clipcap(recipe: ClipcapRecipe, engine: Engine) -> Stage:
    """Encoder features, mapper and language model.

    Raises:
        InputError: As the parts raise it.
    """
    encoder_parent = resolve_parent("encoder", recipe.encoder)
    encoder = load_encoder(encoder_parent.folder or recipe.encoder)
    tokenizer = load_tokenizer(recipe.llm.tokenizer or recipe.llm.name or "")
    llm = build_llm(
        recipe.llm.name, config=recipe.llm.config, pretrained=recipe.llm.name is not None, seed=recipe.seed, tokenizer=tokenizer
    )
    parents = [encoder_parent] + ([resolve_parent("llm", recipe.llm.name)] if recipe.llm.name else [])
    # Beside the runs: those that differ in mapper or learning rate share their features, and a restart keeps them.
    cache = Path(recipe.run).parent / ".features"

    # No augmentation, hence one feature a picture: the encoder runs once a picture, not once a caption and epoch.
    def samples_of(source: PairSource, limit: int | None) -> tuple[FeatureSamples, list[LeftOut], Layout]:
        pairs, readable, unreadable = source.usable()
        data, kind = recipe.data, recipe.mapper.feature_kind
        key = f"{encoder_parent.fingerprint} {source.fingerprint} {limit} {kind} {data.max_pixels} {data.max_bytes}"
        files = sorted({Path(p.image.path) for p in pairs})
        # The same index over other pictures, or over repaired ones, must not find the old features.
        key += "".join(f"\n{file} {file.stat().st_mtime_ns if file.exists() else 0}" for file in files)
        work = FeatureWork(encoder, pairs, kind=kind, max_pixels=data.max_pixels, max_bytes=data.max_bytes)
        features = work.extract(cache, hash_text(key), engine, data.workers)
        good, left_out = work.usable(features)
        if not good.any():
            first = (unreadable + left_out)[0]
            what = f"none of {len(source)} pictures can be used; the first, {first.key}: {first.reason}"
            raise InputError(what, where=first.source, mend="check data.image_root, data.max_bytes and data.max_pixels")
        kept = [pair for pair, sound in zip(pairs, good, strict=True) if sound]
        # All captions are kept as ids, which are few beside the features.
        ids = caption_ids(tokenizer, [p.caption for p in kept], end=recipe.caption_end, max_length=recipe.max_length)
        # bool[source], over the rows that could not be read too, as the layout counts them.
        readable[readable] = good
        return FeatureSamples(kept, ids, features, work.rows[good]), unreadable + left_out, source.layout.keep(readable)

    # The main process first: on first use it writes the indexes that the others then find.
    source = engine.main_first(lambda: open_training_pairs(recipe.data))
    samples, left_out, layout = samples_of(source, recipe.data.limit)
    validation = None
    # Validation has its own features and its own key; the limit is for training.
    if recipe.data.val is not None:
        held = open_pairs(recipe.data.val, options_of(recipe.data, recipe.data.val_type, recipe.data.val_image_root))
        validation, *_ = samples_of(held, None)
    # After the features: standardising needs their statistics.
    model = make_model(recipe, encoder, llm)
    if recipe.mapper.feature_norm == "standardize":
        # Training features only; the rows of unreadable pictures, which are NaN, do not count.
        model.norm.fit(samples.features)
    check_fit(model, tokenizer, recipe.max_length)
    # The end that it learns, and not what the language model's own settings say: a chat model's may be another.
    model.lm.generation_config.eos_token_id = end_token(tokenizer, recipe.caption_end)
    # The captioner is saved with these settings: what they lack must not be found at the first look, or by who opens it.
    model.check_room(recipe.generation)
    stop_tokens(model, tokenizer, recipe.generation)
    monitors: list[Monitor] = []
    if recipe.monitor.every is not None:
        assert validation is not None, "the recipe's check holds data.val and monitor.every together"
        monitors.append(CaptionMonitor(model, tokenizer, validation, recipe.monitor, recipe.generation))

    def save_product(folder: Path) -> None:
        # A mapper fits the one encoder it was trained on; equal shapes do not prove it.
        meta = {
            "encoder": {"path": recipe.encoder, "fingerprint": encoder_parent.fingerprint},
            "llm": _llm_origin(recipe, llm),
            "max_length": recipe.max_length,
            "caption_end": recipe.caption_end,
        }
        with new_folder(folder) as new:
            save_captioner(model, tokenizer, new, meta=meta, decoding=recipe.generation)
            # The encoder goes along: a captioner without its eyes cannot be handed on.
            save_encoder(encoder, new / "encoder")

    return Stage(
        objective=ClipcapObjective(model),
        samples=samples,
        collate=collate_captions,
        save_product=save_product,
        parents=parents,
        data_fingerprint=source.fingerprint,
        left_out=source.left_out + left_out,
        # Those that turned out unusable are in left_out by now.
        available=source.unlimited - len(left_out),
        layout=layout,
        batching=recipe.batching,
        # Of captions alone: the prefix adds the same to each, so it changes no grouping.
        lengths=Lengths.of([len(each) for each in samples.ids]),
        # The monitor alone may have asked for the set.
        validation=validation if recipe.train.val_every is not None else None,
        monitors=monitors,
    )


def _llm_origin(recipe: ClipcapRecipe, llm: PreTrainedModel) -> dict[str, Any]:
    """What the language model was before training: its name with a fingerprint, or the configuration of its random weights."""
    name = recipe.llm.name
    if name is None:
        return {"config": recipe.llm.config, "seed": recipe.seed}
    # A hub name alone does not say which version; transformers notes the commit that it opened.
    commit = getattr(llm.config, "_commit_hash", None)
    return {"path": name, "fingerprint": resolve_parent("llm", name).fingerprint, **({"commit": commit} if commit else {})}


def make_model(recipe: ClipcapRecipe, encoder: VisionEncoder, llm: PreTrainedModel) -> ClipCap:
    """Mapper and language model from the recipe; statistics of features that it asks for are still to be filled in."""
    mapper = recipe.mapper
    return build_captioner(
        llm,
        feature_dim=encoder.width,
        mapper=mapper.kind,
        prefix_length=mapper.prefix_length,
        clip_length=mapper.clip_length,
        feature_kind=mapper.feature_kind,
        feature_norm=mapper.feature_norm,
        mapper_layers=mapper.num_layers,
        mapper_heads=mapper.num_heads,
        only_mapper=not recipe.tune_llm,
        # Another draw than the language model's random weights, which take the seed itself.
        seed=recipe.seed + 1,
    )


class FeatureWork:
    """Extracts the features of each different picture once; an unreadable picture gets NaN, and its pairs are left out."""

    def __init__(self, encoder: VisionEncoder, pairs: list[Pair], *, kind: str, max_pixels: int, max_bytes: int) -> None:
        self.encoder, self.pairs, self.kind = encoder, pairs, kind
        self.max_pixels, self.max_bytes = max_pixels, max_bytes
        # A row a picture, though COCO has five captions for each; dict.fromkeys keeps the order of the file.
        row = {ref: i for i, ref in enumerate(dict.fromkeys(p.image for p in pairs))}
        # Numbers are kept, the dictionary is not: loader workers would copy it page by page.
        self.pictures = list(row)
        self.rows = np.fromiter((row[p.image] for p in pairs), np.int64, len(pairs))

    def extract(self, folder: Path, key: str, engine: Engine, workers: int) -> Tensor:
        """Features ``[pictures, D]`` or ``[pictures, N, D]``, a view of a file; NaN where the picture cannot be read."""
        encoder, device = self.encoder.eval(), engine.device
        shape = (encoder.num_tokens, encoder.width) if self.kind == "tokens" else (encoder.width,)

        @torch.inference_mode()
        def compute(pixels: Tensor) -> Tensor:
            pixels = pixels.to(device, non_blocking=True)
            # Moved on first use: a run that finds its features kept does not need the encoder there.
            return encoder.to(device).tokens(pixels) if self.kind == "tokens" else encoder.to(device)(pixels)

        # The other ranks wait, then read the file, instead of each running the encoder over everything.
        found: Tensor = engine.main_first(
            lambda: mapped_features(
                folder,
                key,
                self.pictures,
                compute,
                shape=shape,
                dtype=torch.float32,
                size=encoder.image_size,
                # The view that prediction uses too.
                fit="squash",
                # Of no effect: what is squashed has no border.
                fill=(0, 0, 0),
                max_pixels=self.max_pixels,
                max_bytes=self.max_bytes,
                workers=workers,
            )
        )
        return found

    def usable(self, features: Tensor) -> tuple[NDArray[np.bool_], list[LeftOut]]:
        """Of which pairs the picture could be read, bool[pairs], and the others with their reason (found by reading again)."""
        # Part by part: the patch tokens of a whole set are no tensor to compute on at once.
        good = torch.cat([~part.flatten(1).isnan().any(1) for part in features.split(_LOOK)])
        left_out = []
        sound = good.numpy()[self.rows]
        for pair, usable in zip(self.pairs, sound.tolist(), strict=True):
            if not usable:
                try:
                    decode_image(pair.image.read(self.max_bytes), max_pixels=self.max_pixels)
                    reason = "the picture could not be read when its features were extracted"
                except SampleError as error:
                    reason = str(error)
                left_out.append(LeftOut(pair.source, pair.key, reason))
        return sound, left_out
