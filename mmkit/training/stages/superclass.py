"""SuperClass: the caption's tokens are the labels of the picture (arXiv 2411.03313)."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mmkit.config import LossConfig, SuperclassRecipe
from mmkit.distributed.engine import Engine
from mmkit.encoders.head import SuperClassHead
from mmkit.encoders.idf import OnlineIDF, load_table, row_normalised, save_table
from mmkit.encoders.labels import CaptionLabels
from mmkit.encoders.loss import autocast_device, soft_label_loss_sum
from mmkit.encoders.loss_kinds import LabelLoss, make_kind
from mmkit.encoders.ragged import row_of_label
from mmkit.encoders.save import save_encoder
from mmkit.encoders.vit import VisionEncoder
from mmkit.files import hash_file, hash_text
from mmkit.training.objective import Batch, Objective, Stage
from mmkit.training.stages.monitors import make_monitors
from mmkit.training.stages.pairs import PairSample, collate_pictures, open_samples
from mmkit.training.stages.towers import make_encoder

logger = logging.getLogger(__name__)

# A caption has some ten labels: at 1 few can be hit, at 10 all could.
RECALL_AT = (1, 5, 10)


class LabelledBatch:
    """Collates pictures and the labels of their captions. A class and no closure: it must pickle for loader processes."""

    def __init__(self, labels: CaptionLabels) -> None:
        self.labels = labels

    def __call__(self, samples: list[PairSample]) -> Batch:
        """Pictures and their labels.

        Returns:
            `pixels` uint8 ``[B, 3, S, S]``, ragged labels `ids` i64 ``[L]`` and `offsets` i64 ``[B + 1]``, `keys`, and `keep` i64
            ``[B, K]`` where patches are dropped.
        """
        ids, offsets = self.labels.encode_packed([s.caption for s in samples])
        return {**collate_pictures(samples), "ids": torch.from_numpy(ids), "offsets": torch.from_numpy(offsets)}


class SuperclassObjective(Objective):
    """Encoder, head and IDF; the loss sum over the rows that have labels."""

    def __init__(
        self, encoder: VisionEncoder, head: SuperClassHead, idf: OnlineIDF | None, *, loss: LabelLoss, chunk_rows: int
    ) -> None:
        super().__init__()
        self.encoder, self.head, self.idf = encoder, head, idf
        self.loss, self.chunk_rows = loss, chunk_rows
        self._hits: Tensor | None = None
        self._arriving: Callable[[], Tensor] | None = None

    def forward(self, batch: Batch) -> Tensor:
        """Loss sum of ``pixels`` uint8 ``[B, 3, S, S]`` with labels ``ids`` ``[L]``, ``offsets`` ``[B + 1]``; fp32 scalar."""
        # keep is in training batches of recipes with patch_drop; validation sees all patches.
        # f[B, D], normed by the head but without its product: logits of the whole batch never exist.
        features = self.head(self.encoder(batch["pixels"], keep=batch.get("keep")))
        weights = self._label_weights(batch)
        # Here and not in `evaluate`: ZeRO-3 holds the head's weights whole only inside this call, and the encoder runs once.
        self._hits = None if self.training else self._recall_sums(features, batch)
        return soft_label_loss_sum(
            features,
            self.head.weight,
            self.head.bias,
            batch["ids"],
            batch["offsets"],
            weights,
            kind=self.loss,
            chunk_rows=self.chunk_rows,
        )

    def _label_weights(self, batch: Batch) -> Tensor:
        """Weights of the labels, rows summing to 1: IDF, or equal without it."""
        if self.idf is None:
            # Equal weights go through the same normalisation, so that a row without IDF sums to 1 as well.
            weights = torch.ones(self.head.vocab_size, device=batch["ids"].device)
        else:
            if self._arriving is not None:
                # Only now: the sum over the processes has run beside the encoder's forward pass.
                self.idf.absorb(self._arriving())
                self._arriving = None
            weights = self.idf.weights()
        return row_normalised(weights, batch["ids"], batch["offsets"])

    def count(self, batch: Batch) -> int:
        """Rows with labels."""
        # A caption without a label (empty, or stop words alone) leaves the mean; the reference counts it.
        return int((batch["offsets"].diff() > 0).sum())

    def statistics(self, batches: list[Batch]) -> Tensor | None:
        """Document counts of these batches, int64 ``[V + 1]``; none without an IDF that learns."""
        # None tells the loop that there is nothing to sum, which saves a collective a step.
        if self.idf is None or self.idf.frozen:
            return None
        return torch.stack([self.idf.counts(b["ids"], b["offsets"]) for b in batches]).sum(0)

    def absorb(self, total: Callable[[], Tensor]) -> None:
        """Add the global document counts before the loss; the current batch is part of its own IDF, as in the reference."""
        self._arriving = total

    def compile_parts(self) -> None:
        """Compile the tower; the loss is one autograd function with its own order of work."""
        self.encoder.compile_backbone()

    def evaluate(self, batch: Batch) -> dict[str, float]:
        """Token recall@k: the mean share of a row's labels among its k highest logits, summed over rows."""
        assert self._hits is not None, "evaluate comes after a forward pass in eval mode"
        return {f"recall@{k}": value for k, value in zip(RECALL_AT, self._hits.tolist(), strict=True)}

    def _recall_sums(self, features: Tensor, batch: Batch) -> Tensor:
        """Recall at each of `RECALL_AT` summed over rows, from the head's features ``[B, D]``: float[3]."""
        # A vocabulary may have fewer labels than ten.
        k = min(max(RECALL_AT), self.head.vocab_size)
        # As in the loss never all logits at once; and in fp32, for a quarter of the rows have ties at place 10 in bf16.
        with torch.autocast(autocast_device(features), enabled=False):
            head = (self.head.weight.float(), self.head.bias.float())
            parts = [F.linear(part.float(), *head).topk(k, dim=1).indices for part in features.split(self.chunk_rows)]
        top = torch.cat(parts)  # i64[B, k], likeliest first
        rows = row_of_label(batch["offsets"], batch["ids"].numel())
        hit = top[rows] == batch["ids"][:, None]  # bool[L, k]: label l is its row's j-th guess
        # Whether a label is among the first 1, 5, 10 guesses of its row, f[L, 3].
        within = torch.stack([hit[:, :k].any(1).float() for k in RECALL_AT], dim=1)
        per_row = torch.zeros(len(top), len(RECALL_AT), device=top.device).index_add_(0, rows, within)
        return (per_row / batch["offsets"].diff().clamp(min=1)[:, None]).sum(0)


def build_superclass(recipe: SuperclassRecipe, engine: Engine) -> Stage:
    """Encoder from the recipe or from other weights, head, labels, IDF and data.

    Raises:
        InputError: As the parts raise it.
    """
    data = recipe.data
    labels = CaptionLabels(data.labels, context_length=data.context_length, stop_words=data.stop_words)
    encoder, parents = make_encoder(recipe.encoder, seed=recipe.seed)
    head, idf = _make_head(recipe, encoder, labels)
    if recipe.loss.kind == "two_way" and engine.accumulation * engine.world_size > 1:
        # The paper's figure is for the whole batch in one piece as far as can be told; here the pieces are smaller.
        logger.warning("two_way compares the %d pictures of a micro-batch, not the whole batch", engine.micro_batch_size)
    objective = SuperclassObjective(encoder, head, idf, loss=make_loss(recipe.loss), chunk_rows=recipe.loss.chunk_rows)
    # The main process first: on first use it writes the indexes that the others then find.
    samples, validation, source = engine.main_first(lambda: open_samples(data, encoder, patch_drop=recipe.encoder.patch_drop))

    # The same captions under other labels, or a table counted anew under the same name: a head's rows would come to mean others.
    readings = {"labels": hash_text(labels.sha256(), *labels.stop_word_list)}
    if data.idf_file is not None:
        readings["idf_table"] = hash_file(Path(data.idf_file))

    def save_product(folder: Path) -> None:
        extra: dict[str, Any] = {"idf": data.idf, "seed": recipe.seed}

        def write_table(inside: Path) -> None:
            """The counts go with the model: a later run may weigh its labels by them."""
            if idf is not None:
                counted = labels.for_table()
                # The table's own length says it.
                del counted["vocab_size"]
                save_table(inside / "idf.safetensors", idf.df, int(idf.n), name=labels.name, **counted)

        save_encoder(encoder, folder, head=head, labels=labels, extra=extra, write_more=write_table)

    return Stage(
        objective=objective,
        samples=samples,
        collate=LabelledBatch(labels),
        save_product=save_product,
        parents=parents,
        data_fingerprint=source.fingerprint,
        readings=readings,
        left_out=source.left_out,
        available=source.unlimited,
        layout=source.layout,
        validation=validation,
        monitors=make_monitors(recipe.monitor, encoder, head=head, labels=labels, workers=data.workers),
    )


def make_loss(config: LossConfig) -> LabelLoss:
    """The loss that a recipe names, with its numbers."""
    keys = ("gamma_positive", "gamma_negative", "clip", "temperature_positive", "temperature_negative")
    given = {key: getattr(config, key) for key in keys if getattr(config, key) is not None}
    return make_kind(config.kind or "softmax", **given)


def _make_head(
    recipe: SuperclassRecipe, encoder: VisionEncoder, labels: CaptionLabels
) -> tuple[SuperClassHead, OnlineIDF | None]:
    """Head and IDF: new ones, those of `encoder.init`, or a table from a file."""
    counts = None
    if recipe.encoder.init_head:
        from mmkit.encoders.init import load_head

        assert recipe.encoder.init is not None  # the recipe's schema sees to it
        head, counts = load_head(recipe.encoder.init, labels)
        logger.info("label head of %s%s", recipe.encoder.init, "" if counts is None else ", with its document counts")
    else:
        with torch.random.fork_rng(devices=[]):
            # A seed of its own: the head starts the same whatever the tower drew before it.
            torch.manual_seed(recipe.seed + 1)
            head = SuperClassHead(encoder.width, labels.vocab_size)
    if recipe.data.idf == "none":
        return head, None
    # The table wins over counts that came with a head: the recipe names it.
    if recipe.data.idf == "file":
        assert recipe.data.idf_file is not None  # the recipe's schema sees to it
        df, n = load_table(recipe.data.idf_file, **labels.for_table())
        return head, OnlineIDF(labels.vocab_size, df=df, n=n, frozen=True)
    if counts is None:
        return head, OnlineIDF(labels.vocab_size)
    return head, OnlineIDF(labels.vocab_size, df=counts[0], n=counts[1])
