"""SuperClass's rivals on the same samples: CLIP and SigLIP (``clip``), and locked-image tuning (``lit``)."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mmkit.config import ClipRecipe, LitRecipe
from mmkit.distributed.engine import Engine
from mmkit.encoders.contrastive import infonce_rows, sigmoid_rows
from mmkit.encoders.save import save_encoder
from mmkit.encoders.text import CaptionTokens, Embeddings, TextTower, save_text, text_settings
from mmkit.encoders.vit import VisionEncoder
from mmkit.training.objective import Batch, Objective, Stage
from mmkit.training.stages.monitors import make_monitors
from mmkit.training.stages.pairs import PairSample, collate_pictures, open_samples
from mmkit.training.stages.towers import make_encoder

logger = logging.getLogger(__name__)

# Pictures that compete with each other in validation: the same number for every world size and micro-batch.
VALIDATION_GROUP = 256

# Features f[B, E] of this process to those of all f[G, E], with gradient, and the row at which its own begin.
Gather = Callable[[Tensor], tuple[Tensor, int]]


class CaptionedBatch:
    """Collates pictures and the tokens of their captions. A class and no closure: it must pickle for loader processes."""

    def __init__(self, tokens: CaptionTokens) -> None:
        self.tokens = tokens

    def __call__(self, samples: list[PairSample]) -> Batch:
        """What `collate_pictures` gives, and ``text`` i64 ``[B, C]``."""
        rows = [self.tokens(s.caption) for s in samples]
        return {**collate_pictures(samples), "text": torch.tensor(rows, dtype=torch.int64)}


class _Planned(NamedTuple):
    """What `prepare` found for one micro-batch.

    Attributes:
        keys: Of its samples, to see that the forward passes come in the same order.
        random: Random state before its towers ran.
        features: Of a frozen encoder f[B, D], which need not run again; None of one that trains.
        loss: Its share of the loss sum, scalar.
        gradients: Of the whole step's loss with respect to its image and text embeddings f[B, E], and this micro-batch's share
            of those with respect to scale and bias.
    """

    keys: list[str]
    random: list[Tensor]
    features: Tensor | None
    loss: Tensor
    gradients: Embeddings


class ContrastiveObjective(Objective):
    """Two towers and the loss between them, summed over rows.

    With accumulation every sample must be compared with those of the other micro-batches too, or ``micro_batch_size`` would
    change what is learned. So `prepare` embeds all of them without gradient, differentiates the loss with respect to the
    embeddings, and the forward passes only carry that gradient on into the towers (gradient caching, arXiv 2101.06983).
    """

    def __init__(
        self,
        encoder: VisionEncoder,
        tower: TextTower,
        *,
        kind: str,
        gather: Gather,
        frozen_encoder: bool = False,
        chunk_rows: int = 256,
    ) -> None:
        """Join the towers.

        Args:
            encoder: The vision tower.
            tower: The text tower.
            kind: ``infonce`` or ``sigmoid``.
            gather: Brings the embeddings of all processes together in training; never called in eval mode.
            frozen_encoder: LiT: the vision tower stays as it is, in eval mode.
            chunk_rows: Rows of logits that exist at one time.
        """
        super().__init__()
        self.encoder, self.tower = encoder, tower
        self.kind, self.gather, self.chunk_rows = kind, gather, chunk_rows
        self.frozen_encoder = frozen_encoder
        if frozen_encoder:
            # Eval mode as well: drop path would make the features of a locked tower random.
            encoder.requires_grad_(False).eval()
        self._planned: deque[_Planned] = deque()
        self._collected: list[tuple[Tensor, Embeddings]] | None = None
        self._hits: dict[str, Tensor] | None = None

    def train(self, mode: bool = True) -> ContrastiveObjective:
        """Switch modes; a frozen encoder stays in eval mode."""
        super().train(mode)
        if self.frozen_encoder:
            self.encoder.eval()
        return self

    def forward(self, batch: Batch) -> Tensor:
        """Loss sum of ``pixels`` uint8 ``[B, 3, S, S]`` with captions ``text`` i64 ``[B, C]``; fp32 scalar.

        In eval mode the loss is that within the batch.
        """
        planned = self._planned.popleft() if self._planned and self.training and self._collected is None else None
        if planned is not None:
            # By position and not by identity: DDP hands the module a copy of the batch.
            assert planned.keys == list(batch["keys"]), "micro-batches come in the order in which `prepare` saw them"
            _set_random_state(planned.random, batch["text"].device)
        features = planned.features if planned is not None and planned.features is not None else self._features(batch)
        found: Embeddings = self.tower(features, batch["text"])
        if self._collected is not None:
            self._collected.append((features, found))
            # The pass of `prepare` wants the embeddings and no loss.
            return found.image.new_zeros(())
        if planned is not None:
            return _carry(planned, found)
        # Here and not in `evaluate`: the towers run once, and ZeRO-3 holds their weights whole only inside this call.
        self._hits = None if self.training else _retrieval(found)
        return self._losses(found).sum()

    def _features(self, batch: Batch) -> Tensor:
        """Pooled features f[B, D]."""
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.frozen_encoder):
            features: Tensor = self.encoder(batch["pixels"], keep=batch.get("keep"))
        return features

    def _losses(self, found: Embeddings) -> Tensor:
        """Loss of each local row f[B], among the rows of all processes in training."""
        image, text, scale, bias = found
        # Side by side, so that both travel in one collective.
        joined = torch.cat([image, text], dim=1)  # f[B, 2E]
        # In eval mode no gather: a validation group is on one process as a whole, whatever their number.
        everyone, offset = self.gather(joined) if self.training else (joined, 0)
        all_image, all_text = everyone.split(image.shape[1], dim=1)
        if self.kind == "infonce":
            return infonce_rows(image, text, all_image, all_text, scale, offset, chunk_rows=self.chunk_rows)
        assert bias is not None, "the sigmoid loss needs a tower of kind sigmoid"
        return sigmoid_rows(image, all_text, scale, bias, offset, chunk_rows=self.chunk_rows)

    def prepare(self, batches: list[Batch]) -> None:
        """Loss and gradients of a step's embeddings across its micro-batches; a single one needs no preparation."""
        # A step that was broken off must not leave its plan to the next one.
        self._planned.clear()
        if len(batches) < 2:
            return
        random, found = self._collect(batches)
        sizes = [len(b["text"]) for b in batches]
        # f[B, E] of all micro-batches of this process, one after the other.
        image, text = (torch.cat([getattr(e, side) for _, e in found]) for side in ("image", "text"))
        # Scale and bias are the same in every micro-batch, so the first one's stand for all.
        leaves = Embeddings(image, text, *found[0][1][2:])
        with torch.enable_grad():
            # Leaves of a graph of their own: it ends at the embeddings, and no tower is held by it.
            wanted = [leaf.requires_grad_() for leaf in leaves if leaf is not None]
            losses = self._losses(leaves)
            # Across processes too: the gather's backward adds what the others' losses say about these embeddings.
            image, text, *scalars = torch.autograd.grad(losses.sum(), wanted)
        # Every forward pass gives its part, so that each parameter has a gradient whenever DDP exchanges them.
        scale, bias = scalars[0] / len(batches), scalars[1] / len(batches) if len(scalars) > 1 else None
        rows = zip(image.split(sizes), text.split(sizes), losses.detach().split(sizes), strict=True)
        for batch, state, (features, _), (to_image, to_text, loss) in zip(batches, random, found, rows, strict=True):
            gradients = Embeddings(to_image, to_text, scale, bias)
            kept = features if self.frozen_encoder else None
            self._planned.append(_Planned(list(batch["keys"]), state, kept, loss.sum(), gradients))

    def _collect(self, batches: list[Batch]) -> tuple[list[list[Tensor]], list[tuple[Tensor, Embeddings]]]:
        """For each batch the random state before it, and its features and embeddings without gradient."""
        random = []
        self._collected = []
        try:
            with torch.no_grad():
                for batch in batches:
                    # The second pass must drop what this one drops, or the planned gradient would belong to other embeddings.
                    random.append(_random_state(batch["text"].device))
                    # Through the module's own call: that is where ZeRO-3 notices that a pass begins.
                    self(batch)
            return random, self._collected
        finally:
            self._collected = None

    def count(self, batch: Batch) -> int:
        """Rows."""
        return len(batch["text"])

    def compile_parts(self) -> None:
        """Compile the two towers; the loss between them talks to other processes."""
        self.encoder.compile_backbone()
        self.tower.text.compile()

    def evaluate(self, batch: Batch) -> dict[str, float]:
        """Recall@1 within the batch, picture to caption and caption to picture, as sums over rows."""
        assert self._hits is not None, "evaluate comes after a forward pass in eval mode"
        return {name: float(hits) for name, hits in self._hits.items()}


def _carry(planned: _Planned, found: Embeddings) -> Tensor:
    """A scalar whose value is the micro-batch's share of the loss and whose gradient is the planned one."""
    pairs = zip(planned.gradients, found, strict=True)
    # Linear in the embeddings with the planned gradient as slope; its own value is of no interest and cancels exactly.
    slope = torch.stack([(g * x).sum() for g, x in pairs if g is not None and x is not None]).sum()
    return planned.loss + (slope - slope.detach())


def _retrieval(found: Embeddings) -> dict[str, Tensor]:
    """Rows whose nearest neighbour on the other side is their own, as scalars."""
    with torch.autocast(found.image.device.type, enabled=False):
        # In bf16 cosines near 1 have steps of 0.004, and neighbours would tie.
        cosines = found.image @ found.text.T  # [B, B]
    own = torch.arange(len(cosines), device=cosines.device)
    to_text, to_image = cosines.argmax(dim=1), cosines.argmax(dim=0)
    return {"image_to_text@1": (to_text == own).sum(), "text_to_image@1": (to_image == own).sum()}


def _random_state(device: torch.device) -> list[Tensor]:
    """State of the generators that layers such as drop path draw from: the CPU's, and the GPU's if it computes."""
    state = [torch.get_rng_state()]
    return [*state, torch.cuda.get_rng_state(device)] if device.type == "cuda" else state


def _set_random_state(state: list[Tensor], device: torch.device) -> None:
    """Put back what `_random_state` found, so that a second pass drops what the first one dropped."""
    torch.set_rng_state(state[0])
    if device.type == "cuda":
        torch.cuda.set_rng_state(state[1], device)


def build_clip(recipe: ClipRecipe, engine: Engine) -> Stage:
    """CLIP or SigLIP: both towers train.

    Raises:
        InputError: As the parts raise it.
    """
    return _build(recipe, engine, frozen_encoder=False)


def build_lit(recipe: LitRecipe, engine: Engine) -> Stage:
    """Locked-image tuning: the text tower and the projection of pictures train (arXiv 2111.07991).

    Raises:
        InputError: As the parts raise it.
    """
    if recipe.encoder.patch_drop:
        logger.info("encoder.patch_drop %g is for towers that train; the locked one sees all patches", recipe.encoder.patch_drop)
    return _build(recipe, engine, frozen_encoder=True)


def _build(recipe: ClipRecipe | LitRecipe, engine: Engine, *, frozen_encoder: bool) -> Stage:
    """Towers from the recipe, data, and the writer of the product."""
    encoder, parents = make_encoder(recipe.encoder, seed=recipe.seed)
    kind = recipe.loss.kind or "infonce"
    # By the width of the vision tower: null keys take what open_clip pairs with it.
    settings = text_settings(encoder.width, **recipe.text.model_dump())
    # A generator of its own: the text tower starts from the same weights whatever the vision tower drew before.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed + 1)
        tower = TextTower(encoder.width, **settings, kind=kind)
    # One key for both towers, as in open_clip: the text tower's activations are of the same order.
    tower.text.set_grad_checkpointing(recipe.encoder.grad_checkpointing)
    objective = ContrastiveObjective(
        encoder,
        tower,
        kind=kind,
        gather=engine.gather_features,
        frozen_encoder=frozen_encoder,
        chunk_rows=recipe.loss.chunk_rows,
    )
    patch_drop = 0.0 if frozen_encoder else recipe.encoder.patch_drop
    # The main process first: on first use it writes the indexes that the others then find.
    samples, validation, source = engine.main_first(lambda: open_samples(recipe.data, encoder, patch_drop=patch_drop))

    def save_product(folder: Path) -> None:
        extra: dict[str, Any] = {"stage": recipe.stage, "loss": kind, "seed": recipe.seed}
        save_encoder(encoder, folder, extra=extra, write_more=lambda temporary: save_text(tower, temporary))

    return Stage(
        objective=objective,
        samples=samples,
        collate=CaptionedBatch(CaptionTokens(recipe.text.context_length)),
        save_product=save_product,
        parents=parents,
        data_fingerprint=source.fingerprint,
        left_out=source.left_out,
        available=source.unlimited,
        layout=source.layout,
        validation=validation,
        validation_group=VALIDATION_GROUP,
        monitors=make_monitors(recipe.monitor, encoder, workers=recipe.data.workers),
    )
