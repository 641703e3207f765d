"""What a recipe trains, as the real objective on tensors without content, and batches of its size.

The builders follow ``mmkit/training/stages``: same modules, same settings, but no data, no weights and no network.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from mmkit.config import (
    ClipcapRecipe,
    ContrastiveRecipe,
    FinetuneRecipe,
    LlavaRecipe,
    PretrainRecipe,
    Recipe,
    SuperclassRecipe,
    load_recipe,
)
from mmkit.encoders.vit import VisionEncoder, at_size, build_encoder, create_backbone
from mmkit.errors import InputError
from mmkit.files import read_json
from mmkit.plan.known import shape_of
from mmkit.plan.trace import Trace, fake, trace
from mmkit.recipes import list_recipes
from mmkit.training.objective import Batch, Objective
from mmkit.training.stages.towers import bare_encoder

# Labels of a caption; DataComp's have about ten. Only index vectors depend on it.
LABELS = 16
# Classes of a fine-tuning whose pictures are not here: ImageNet-1k's. A row of the classifier for each, so little depends on it.
CLASSES = 1000


@dataclasses.dataclass
class Subject:
    """An objective that can be traced.

    Attributes:
        objective: On the meta device until :meth:`place`.
        batch: Inputs of (rows, length); called under the fake mode.
        parts: Name of a submodule -> part, see `trace`.
        longest: Tokens of the longest sequence; 0 where there are no sequences.
        supervised: Tokens of such a sequence that are learnt at most.
        given: Tokens of it that are none of the text: those of a picture.
        quantised: Elements of frozen weights that are 4 bits wide in training.
    """

    objective: Objective
    batch: Callable[[int, int], Batch]
    parts: dict[str, str]
    longest: int = 0
    supervised: int = 0
    given: int = 0
    quantised: int = 0
    # One for each: tensors of two modes cannot meet.
    mode: FakeTensorMode = dataclasses.field(default_factory=FakeTensorMode)

    def place(self, dtype: torch.dtype | None) -> None:
        """Give the objective its tensors, in training mode; ``dtype`` as DeepSpeed casts it."""
        fake(self.objective, self.mode, dtype)
        # transformers checkpoints in this mode alone.
        self.objective.train()

    def trace(self, rows: int, length: int, *, autocast: bool) -> Trace:
        """A micro-batch of ``rows`` sequences of ``length`` tokens."""
        # Positions that predict a supervised token, of all that the loss looks at.
        learnt = min(self.supervised, max(0, length - self.given))
        return trace(
            self.objective,
            lambda: self.objective(self.batch(rows, length)),
            self.mode,
            parts=self.parts,
            autocast=autocast,
            chosen=learnt / length if length else 1.0,
        )


def make_subject(recipe: Recipe, *, encoder: str | None = None) -> Subject:
    """The subject of a training recipe.

    Args:
        recipe: Of a training stage.
        encoder: Stands in for the encoder that a recipe names and that is not on this machine.

    Raises:
        InputError: No training recipe, or a part whose shape is not known here.
    """
    # Nothing is allocated, whatever the size of the model.
    with torch.device("meta"):
        if isinstance(recipe, SuperclassRecipe):
            return _superclass(recipe)
        if isinstance(recipe, ContrastiveRecipe):
            return _contrastive(recipe)
        if isinstance(recipe, FinetuneRecipe):
            return _finetune(recipe, encoder)
        if isinstance(recipe, ClipcapRecipe):
            return _clipcap(recipe, encoder)
        if isinstance(recipe, LlavaRecipe):
            return _llava(recipe, encoder)
    raise InputError(f"stage {recipe.stage} trains nothing", where="stage", mend="plan a training recipe")


def _pixels(rows: int, size: int) -> Tensor:
    """Pictures as the loader gives them."""
    return torch.zeros(rows, 3, size, size, dtype=torch.uint8)


def _kept(encoder: VisionEncoder, rows: int, drop: float) -> dict[str, Tensor]:
    """Patches that are kept, where some are dropped, as `Augmentation.kept_patches` draws them."""
    if not drop:
        return {}
    return {"keep": torch.zeros(rows, max(1, round(encoder.num_tokens * (1 - drop))), dtype=torch.int64)}


def _blocks(module: torch.nn.Module, prefix: str, name: str) -> dict[str, str]:
    """Parts of a transformer below ``prefix``: attention, MLP, and the rest of it under its own name."""
    parts = {prefix: name}
    for inner, _ in module.get_submodule(prefix).named_modules():
        path = f"{prefix}.{inner}"
        leaf = inner.rpartition(".")[2]
        # timm, transformers (Llama, SigLIP, GPT-2) and open_clip, each by its own name.
        if leaf in ("attn", "self_attn", "attention"):
            parts[path] = f"{name}: attention"
        elif leaf == "mlp":
            parts[path] = f"{name}: MLP"
        # A block is what checkpointing computes again: it has to be known even where the whole module is not called.
        elif leaf.isdigit():
            parts[path] = f"{name}: rest of the blocks"
    return parts


def _superclass(recipe: SuperclassRecipe) -> Subject:
    """Tower, label head, chunked loss."""
    from mmkit.encoders.head import SuperClassHead
    from mmkit.encoders.labels import CaptionLabels
    from mmkit.training.stages.superclass import SuperclassObjective, make_loss

    vocabulary = CaptionLabels(recipe.data.labels).vocab_size
    encoder = bare_encoder(recipe.encoder)
    # Without its IDF: two vectors of the vocabulary's size.
    objective = SuperclassObjective(
        encoder, SuperClassHead(encoder.width, vocabulary), None, loss=make_loss(recipe.loss), chunk_rows=recipe.loss.chunk_rows
    )

    def batch(rows: int, length: int) -> Batch:
        ids = torch.zeros(rows * LABELS, dtype=torch.int64)
        offsets = torch.arange(rows + 1) * LABELS
        kept = _kept(encoder, rows, recipe.encoder.patch_drop)
        return {"pixels": _pixels(rows, encoder.image_size), "ids": ids, "offsets": offsets, **kept}

    return Subject(objective, batch, _blocks(objective, "encoder.backbone", "tower"))


def _contrastive(recipe: ContrastiveRecipe) -> Subject:
    """Two towers and the loss over the global batch."""
    from mmkit.encoders.text import TextTower, text_settings
    from mmkit.training.stages.contrastive import ContrastiveObjective

    locked = recipe.stage == "lit"  # type: ignore[attr-defined]
    encoder = bare_encoder(recipe.encoder)
    kind = recipe.loss.kind or "infonce"
    tower = TextTower(encoder.width, **text_settings(encoder.width, **recipe.text.model_dump()), kind=kind)
    tower.text.set_grad_checkpointing(recipe.encoder.grad_checkpointing)

    def gather(features: Tensor) -> tuple[Tensor, int]:
        """The features of the whole step, of which the other processes' and micro-batches' hold nothing but room."""
        # Of all processes and micro-batches: with accumulation the loss compares them too (ContrastiveObjective.prepare).
        others = recipe.train.batch_size - len(features)
        return torch.cat([features, features.new_zeros(max(0, others), features.shape[1])]), 0

    objective = ContrastiveObjective(
        encoder, tower, kind=kind, gather=gather, frozen_encoder=locked, chunk_rows=recipe.loss.chunk_rows
    )

    def batch(rows: int, length: int) -> Batch:
        text = torch.zeros(rows, recipe.text.context_length, dtype=torch.int64)
        # A locked tower sees all patches.
        kept = {} if locked else _kept(encoder, rows, recipe.encoder.patch_drop)
        return {"pixels": _pixels(rows, encoder.image_size), "text": text, **kept}

    parts = {**_blocks(objective, "encoder.backbone", "tower"), **_blocks(objective, "tower.text", "text tower")}
    return Subject(objective, batch, parts)


def _finetune(recipe: FinetuneRecipe, stand_in: str | None) -> Subject:
    """Tower and classifier."""
    from mmkit.training.stages.finetune import FinetuneObjective

    encoder = named_encoder(recipe.encoder, stand_in)
    size = recipe.image_size or encoder.image_size
    encoder = at_size(encoder, size)
    # Without mixing, which draws its numbers on the host; the sharp loss has one term less of [rows, classes].
    objective = FinetuneObjective(encoder, CLASSES, label_smoothing=recipe.label_smoothing)

    def batch(rows: int, length: int) -> Batch:
        return {"pixels": _pixels(rows, size), "targets": torch.zeros(rows, dtype=torch.int64)}

    return Subject(objective, batch, _blocks(objective, "encoder.backbone", "tower"))


def _clipcap(recipe: ClipcapRecipe, stand_in: str | None) -> Subject:
    """Mapper and language model on features that are there already."""
    from transformers import AutoModelForCausalLM

    from mmkit.training.stages.clipcap import ClipcapObjective, make_model

    encoder = named_encoder(recipe.encoder, stand_in)
    model = make_model(recipe, encoder, AutoModelForCausalLM.from_config(shape_of(recipe.llm)))
    objective = ClipcapObjective(model)
    feature = (encoder.num_tokens, encoder.width) if recipe.mapper.feature_kind == "tokens" else (encoder.width,)

    def batch(rows: int, length: int) -> Batch:
        ids = torch.zeros(rows, length, dtype=torch.int64)
        # A padded batch has one, and attention with a mask is another kernel than causal attention.
        mask = torch.ones_like(ids)
        # Which labels are learnt is a matter of content: `supervised` says how many.
        return {"features": torch.zeros(rows, *feature), "input_ids": ids, "attention_mask": mask, "labels": ids}

    parts = {"model.mapper": "mapper", **_blocks(objective, "model.lm", "language model")}
    return Subject(objective, batch, parts, longest=recipe.max_length, supervised=recipe.max_length)


def _llava(recipe: LlavaRecipe, stand_in: str | None) -> Subject:
    """Tower, projector, language model, and what of them trains."""
    from mmkit.models.llava import llava_config
    from mmkit.models.projectors import num_image_tokens
    from mmkit.models.towers import vision_tower
    from mmkit.training.stages.llava import LlavaObjective, set_up

    if recipe.batching.max_tokens is not None:
        raise InputError(
            "packed batches have no fixed number of samples",
            where="batching.kind",
            mend="plan with batching.kind=grouped batching.max_tokens=null and train.micro_batch_size=max_tokens / mean length",
        )
    # What the model is made of is said where it was put together, what of it trains by this recipe.
    made = _assembled(recipe)
    assert made.encoder is not None and made.llm is not None  # the recipe's schema sees to it
    encoder = named_encoder(made.encoder, stand_in)
    encoder = at_size(encoder, made.image_size or encoder.image_size)
    text = shape_of(made.llm)
    # The picture's placeholder is one token more than the language model's own (build_llava).
    text.vocab_size += 1
    kind, config = llava_config(
        vision_tower(encoder).config,
        text,
        feature_layer=made.feature_layer,
        feature_select=None,
        projector=made.projector,
        pixel_shuffle=made.pixel_shuffle or 2,
        image_token_id=text.vocab_size - 1,
        tie_word_embeddings=text.tie_word_embeddings,
    )
    model = kind(config)
    # Its kernels need a GPU, and its weights are made 4 bits wide on one: counted from the plain model.
    plain = recipe.model_copy(update={"liger": False, "lora": recipe.lora.model_copy(update={"quantization": None})})
    set_up(model, plain)
    objective = LlavaObjective(model, mean=encoder.mean, std=encoder.std)

    def batch(rows: int, length: int) -> Batch:
        # With a picture in every row: those of text alone cost less.
        ids = torch.zeros(rows, length, dtype=torch.int64)
        return {
            "input_ids": ids,
            "attention_mask": torch.ones_like(ids),
            "labels": ids,
            "pixels": _pixels(rows, encoder.image_size),
        }

    parts = {
        **_blocks(objective, "model.model.vision_tower", "tower"),
        "model.model.multi_modal_projector": "projector",
        **_blocks(objective, "model.model.language_model", "language model"),
    }
    given = num_image_tokens(config)
    quantised = 0
    if recipe.lora.quantization is not None:
        linear = (p.numel() for name, p in model.model.language_model.named_parameters() if name.endswith("base_layer.weight"))
        # What LoRA wraps is what is quantised, and nothing else (adapters.py).
        quantised = sum(linear)
    return Subject(
        objective,
        batch,
        parts,
        longest=recipe.max_length,
        supervised=max(1, recipe.max_length - given),
        given=given,
        quantised=quantised,
    )


def _assembled(recipe: LlavaRecipe) -> LlavaRecipe:
    """The recipe that put the model together: this one, or that of the model it goes on from.

    Raises:
        InputError: That model is neither here nor what a shipped recipe makes.
    """
    if recipe.model is None:
        return recipe
    made = Path(recipe.model) / "recipe.yaml"
    parent = load_recipe(made) if made.is_file() else maker_of(recipe.model)
    if not isinstance(parent, LlavaRecipe):
        raise InputError(
            "this model is not here, and no shipped recipe makes it",
            where=f"model {recipe.model}",
            mend="plan with model=null encoder=NAME llm.name=NAME, the parts it is made of",
        )
    return _assembled(parent)


def maker_of(run: str) -> Recipe | None:
    """The shipped recipe whose run directory has this name, so that a pipeline can be planned before it has run."""
    for path in list_recipes().values():
        recipe = load_recipe(path)
        if recipe.run == run:
            return recipe
    return None


def named_encoder(name: str, stand_in: str | None = None) -> VisionEncoder:
    """An encoder's shape, without weights: a run or folder, ``timm:NAME``, or what a shipped recipe will make.

    Raises:
        InputError: Its shape is not known here.
    """
    name = stand_in or name
    # A run has its product inside.
    folder = next((p for p in (Path(name) / "model", Path(name)) if (p / "config.json").is_file()), None)
    if folder is not None:
        config = read_json(folder / "config.json")
        cfg = config.get("pretrained_cfg", {})
        # timm's default where the folder does not say.
        size = int(cfg.get("input_size", [3, 224, 224])[-1])
        # Without timm's classifier, which no stage asks.
        args = {"num_classes": 0, **config.get("model_args", {})}
        return VisionEncoder(
            create_backbone(config["architecture"], args), architecture=config["architecture"], model_args=args, image_size=size
        )
    if name.startswith("timm:"):
        return build_encoder(name.removeprefix("timm:"), layout="native")
    shipped = list_recipes()
    maker = load_recipe(shipped[name]) if name in shipped else maker_of(name)
    if isinstance(maker, PretrainRecipe):
        # Its own training's choice; here the tower is a part of another.
        return bare_encoder(maker.encoder.model_copy(update={"grad_checkpointing": False}))
    raise InputError(
        "this encoder is not here, and no shipped recipe makes it",
        where=f"encoder {name}",
        mend="name one of its shape by --encoder: a run, timm:NAME, or a pretraining recipe",
    )
