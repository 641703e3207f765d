"""SuperClass: the caption's tokens are the labels of the picture (arXiv 2411.03313)."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from mmkit.config import SuperclassRecipe
from mmkit.data.images import Pixels, decode_image, fit_square, random_resized_crop
from mmkit.data.pairs import Pair, open_pairs
from mmkit.distributed.engine import Engine
from mmkit.encoders.head import SuperClassHead
from mmkit.encoders.idf import OnlineIDF, row_normalised
from mmkit.encoders.labels import CaptionLabels
from mmkit.encoders.loss import soft_label_loss_sum
from mmkit.encoders.ragged import pack_labels, row_of_label
from mmkit.encoders.save import load_encoder, save_encoder
from mmkit.encoders.vit import VisionEncoder, build_encoder
from mmkit.errors import InputError
from mmkit.run import Parent, resolve_parent
from mmkit.training.objective import Batch, Objective, Stage


class LabelledImage(NamedTuple):
    """A picture (uint8 ``[3, S, S]``), its label ids, and its key."""

    pixels: Pixels
    ids: list[int]
    key: str


class PairSamples:
    """Pairs as labelled pictures; random crops for training, the whole picture for validation."""

    def __init__(
        self, pairs: list[Pair], labels: CaptionLabels, *, size: int, crop_scale: tuple[float, float] | None, max_pixels: int
    ) -> None:
        self.pairs, self.labels, self.size = pairs, labels, size
        self.crop_scale, self.max_pixels = crop_scale, max_pixels

    def __len__(self) -> int:
        return len(self.pairs)

    def describe(self, index: int) -> tuple[str, str]:
        """Source and key of a pair."""
        return self.pairs[index].source, self.pairs[index].key

    def load(self, index: int, rng: np.random.Generator) -> LabelledImage:
        """Decode, crop and label one pair."""
        pair = self.pairs[index]
        image = decode_image(pair.image.read(), max_pixels=self.max_pixels)
        if self.crop_scale is None:
            pixels = fit_square(image, self.size, fit="squash")
        else:
            pixels = random_resized_crop(image, self.size, rng, scale=self.crop_scale)
        return LabelledImage(pixels, self.labels.encode([pair.caption])[0], pair.key)


def collate_labelled(samples: list[LabelledImage]) -> Batch:
    """``pixels`` uint8 ``[B, 3, S, S]``, ragged labels ``ids`` i64 ``[L]`` and ``offsets`` i64 ``[B + 1]``, ``keys``."""
    ids, offsets = pack_labels([s.ids for s in samples])
    pixels = torch.from_numpy(np.stack([s.pixels for s in samples]))
    return {"pixels": pixels, "ids": ids, "offsets": offsets, "keys": [s.key for s in samples]}


class SuperclassObjective(Objective):
    """Encoder, head and IDF; the loss sum over the rows that have labels."""

    def __init__(
        self, encoder: VisionEncoder, head: SuperClassHead, idf: OnlineIDF | None, *, kind: str, chunk_rows: int
    ) -> None:
        super().__init__()
        self.encoder, self.head, self.idf = encoder, head, idf
        self.kind, self.chunk_rows = kind, chunk_rows
        self._hits: Tensor | None = None

    def forward(self, batch: Batch) -> Tensor:
        """Loss sum of ``pixels`` uint8 ``[B, 3, S, S]`` with labels ``ids`` ``[L]``, ``offsets`` ``[B + 1]``; fp32 scalar."""
        features = self.head(self.encoder(batch["pixels"]))
        weights = self._label_weights(batch)
        # Here and not in `evaluate`: ZeRO-3 holds the head's weights whole only inside this call, and the encoder runs once.
        self._hits = None if self.training else self._recall_sum(features, batch)
        return soft_label_loss_sum(
            features,
            self.head.weight,
            self.head.bias,
            batch["ids"],
            batch["offsets"],
            weights,
            kind=self.kind,
            chunk_rows=self.chunk_rows,
        )

    def _label_weights(self, batch: Batch) -> Tensor:
        """Weights of the labels, rows summing to 1: IDF, or equal without it."""
        weights = (
            self.idf.weights() if self.idf is not None else torch.ones(self.head.weight.shape[0], device=batch["ids"].device)
        )
        return row_normalised(weights, batch["ids"], batch["offsets"])

    def count(self, batch: Batch) -> int:
        """Rows with labels."""
        return int((batch["offsets"].diff() > 0).sum())

    def statistics(self, batches: list[Batch]) -> Tensor | None:
        """Document counts of these batches, int64 ``[V + 1]``."""
        if self.idf is None:
            return None
        return torch.stack([self.idf.counts(b["ids"], b["offsets"]) for b in batches]).sum(0)

    def absorb(self, statistics: Tensor) -> None:
        """Add the global document counts; the current batch is part of its own IDF, as in the reference."""
        assert self.idf is not None
        self.idf.absorb(statistics)

    def evaluate(self, batch: Batch) -> dict[str, float]:
        """Token recall@10: the mean share of a row's labels among its ten highest logits, summed over rows."""
        assert self._hits is not None, "evaluate comes after a forward pass in eval mode"
        return {"recall@10": float(self._hits)}

    def _recall_sum(self, features: Tensor, batch: Batch) -> Tensor:
        """Recall@10 summed over rows, scalar, from the head's features ``[B, D]``."""
        top = F.linear(features, self.head.weight, self.head.bias).topk(10, dim=1).indices
        rows = row_of_label(batch["offsets"], batch["ids"].numel())
        hit = (top[rows] == batch["ids"][:, None]).any(1).float()
        per_row = torch.zeros(top.shape[0], device=top.device).index_add_(0, rows, hit)
        return (per_row / batch["offsets"].diff().clamp(min=1)).sum()


def build_superclass(recipe: SuperclassRecipe, engine: Engine) -> Stage:
    """Encoder from the recipe or from another run, head, labels and data.

    Raises:
        InputError: As the parts raise it.
    """
    labels = CaptionLabels(recipe.data.labels, context_length=recipe.data.context_length)
    encoder, parents = _make_encoder(recipe)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed + 1)
        head = SuperClassHead(encoder.width, labels.vocab_size)
    idf = OnlineIDF(labels.vocab_size) if recipe.data.idf == "online" else None
    objective = SuperclassObjective(encoder, head, idf, kind=recipe.loss.kind, chunk_rows=recipe.loss.chunk_rows)
    source = open_pairs(recipe.data.train, kind=recipe.data.type, image_root=recipe.data.image_root)
    size, max_pixels = encoder.image_size, recipe.data.max_pixels
    pairs = source.pairs[: recipe.data.limit]
    validation = None
    if recipe.data.val:
        held = open_pairs(recipe.data.val, kind="auto", image_root=recipe.data.val_image_root)
        validation = PairSamples(held.pairs, labels, size=size, crop_scale=None, max_pixels=max_pixels)

    def save_product(folder: Path) -> None:
        extra: dict[str, Any] = {"idf": recipe.data.idf, "seed": recipe.seed}
        save_encoder(encoder, folder, head=head, labels=labels, extra=extra)

    return Stage(
        objective=objective,
        samples=PairSamples(pairs, labels, size=size, crop_scale=recipe.data.crop_scale, max_pixels=max_pixels),
        collate=collate_labelled,
        save_product=save_product,
        parents=parents,
        data_fingerprint=source.fingerprint,
        left_out=source.left_out,
        validation=validation,
    )


def _make_encoder(recipe: SuperclassRecipe) -> tuple[VisionEncoder, list[Parent]]:
    """A new encoder, or one to go on from."""
    config = recipe.encoder
    encoder = build_encoder(
        config.architecture,
        image_size=config.image_size,
        patch_size=config.patch_size,
        model_args=config.model_args,
        pretrained=config.pretrained,
        layout=config.layout,
        mean=config.mean,
        std=config.std,
        seed=recipe.seed,
    )
    parents = []
    if config.init:
        parent = resolve_parent("encoder", config.init)
        before = load_encoder(parent.folder or config.init)
        try:
            encoder.backbone.load_state_dict(before.backbone.state_dict())
        except RuntimeError as error:
            raise InputError(str(error).splitlines()[-1].strip(), where=config.init, mend="make encoder.* fit it") from None
        parents.append(parent)
    encoder.set_grad_checkpointing(config.grad_checkpointing)
    return encoder, parents
