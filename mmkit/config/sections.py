"""The sections of a recipe: groups of keys with their types, defaults and the rules between them."""

from __future__ import annotations

import difflib
from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag, field_validator, model_validator

from mmkit.config.decoding import GenerationConfig
from mmkit.config.looks import StoppingConfig
from mmkit.config.section import Section
from mmkit.data.bounds import MAX_BYTES

# OpenAI CLIP's constants (open_clip constants.py), the default of every SuperClass recipe.
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


class EncoderConfig(Section):
    """A ViT built from scratch (or from timm's weights) for pretraining."""

    architecture: str
    image_size: int = Field(224, ge=8)
    patch_size: int | None = None
    # superclass is SigLIP's layout, which LLaVA in transformers and vLLM open without a plug-in.
    layout: Literal["superclass", "native"] = "superclass"
    pretrained: bool = False
    init: str | None = Field(
        None, description="weights to start from: run, folder, timm:NAME, hf-hub:OWNER/NAME, hf:FOLDER, open_clip:MODEL:TAG"
    )
    init_head: bool = Field(False, description="take the label head and document counts of `init` too (same vocabulary)")
    patch_drop: float = Field(0.0, ge=0, lt=1, description="share of patches left out in training (FLIP, arXiv 2212.00794)")
    model_args: dict[str, Any] = Field(default_factory=dict)
    mean: tuple[float, float, float] | None = Field(None, description="of the pixels; null: those of `init`, or OpenAI CLIP's")
    std: tuple[float, float, float] | None = None
    grad_checkpointing: bool = False

    @model_validator(mode="after")
    def _head_has_origin(self) -> EncoderConfig:
        if self.init_head and self.init is None:
            raise ValueError("init_head takes the head of `init`: give encoder.init too")
        if self.pretrained and self.init is not None:
            raise ValueError("both pretrained and init give weights: choose one (init=timm:NAME is the same as pretrained)")
        return self


DataKind = Literal["auto", "webdataset", "parquet", "coco", "pairs", "llava", "messages", "folder", "hf"]


class SourceConfig(Section):
    """One data set of several in ``data.train``; a text alone is its path."""

    path: str
    weight: float | None = Field(None, gt=0, description="share of the draws, relative; null: all samples once an epoch")
    type: DataKind = "auto"
    image_root: str | None = None

    @model_validator(mode="before")
    @classmethod
    def _text_is_path(cls, value: Any) -> Any:
        return {"path": value} if isinstance(value, str) else value


class DataConfig(Section):
    """Where the samples come from and how a picture becomes a square of pixels."""

    # By what it is, so that a fault in a list is told as one of the list, and not also as one of a text that it never was.
    train: Annotated[
        Annotated[str, Tag("place")] | Annotated[tuple[SourceConfig, ...], Tag("list")],
        Discriminator(lambda value: "place" if isinstance(value, str) else "list"),
    ] = Field(description="file, folder, shards (a-{000..123}.tar, glob, s3:// hf:// http://), hf:NAME[@SPLIT], or a list")
    val: str | None = None
    type: DataKind = "auto"
    val_type: DataKind = "auto"
    image_root: str | None = None
    val_image_root: str | None = None
    image: str = Field("image", description="key or column of the picture, in rows and tables")
    caption: str = Field("caption", description="key or column of the caption, in rows and tables")
    streaming: bool = Field(False, description="read the files behind hf:NAME as they are needed, instead of loading all of it")
    # In samples and not in shards: ten shards of 10,000 mix as well as a thousand of 100 (LOG.md).
    shuffle_window: int = Field(100_000, ge=1, description="samples within which shards are shuffled, rounded up to whole shards")
    cache: str | None = Field(None, description="folder for fetched shards and indexes; null: $MMKIT_CACHE or ~/.cache/mmkit")
    cache_gib: float = Field(50.0, gt=0, description="fetched shards kept at one time; hold at least a window of them")
    workers: int = Field(4, ge=0)
    # torch's own default.
    prefetch: int = Field(2, ge=1, description="batches that each worker makes ahead")
    # For a batch and not for a picture: what is left out must not depend on how busy the machine is (LOG.md).
    timeout: float = Field(1800, ge=0, description="seconds to wait for a batch of the workers before the run ends; 0: for ever")
    limit: int | None = Field(None, ge=1, description="use the first N samples only (of each source)")
    max_skipped: float = Field(0.01, ge=0, le=1, description="share of samples that may be unreadable before the run stops")
    # From the header: by the time the pixels are there, the memory is spent.
    max_pixels: int = Field(100_000_000, ge=1, description="a picture with more is left out from its header alone")
    max_bytes: int = Field(MAX_BYTES, ge=1, description="a picture whose file is longer is left out unread")

    @model_validator(mode="after")
    def _sources_agree(self) -> DataConfig:
        if not self.sources:
            raise ValueError("train is an empty list: give at least one data set")
        weighted = [source.weight is not None for source in self.sources]
        # A missing weight could mean 1, or the data set's size: both are likely to be wrong.
        if any(weighted) != all(weighted):
            raise ValueError("give each of the data sets in train a weight, or none of them")
        if weighted == [True]:
            raise ValueError("a weight is a share among several data sets: leave it out")
        weights = [source.weight or 0.0 for source in self.sources]
        # Shares are kept in every 10,000 draws; a smaller one would never be drawn, without a word.
        if all(weighted) and min(weights) < sum(weights) / 10_000:
            raise ValueError(
                f"weight {min(weights):g} is less than a ten-thousandth of all: raise it, or leave that data set out"
            )
        return self

    @property
    def sources(self) -> tuple[SourceConfig, ...]:
        """The data sets in ``train``, each with its kind and folder."""
        plain = (SourceConfig(path=self.train),) if isinstance(self.train, str) else self.train
        # Those of the section hold where a source has none of its own.
        return tuple(
            SourceConfig(
                path=s.path,
                weight=s.weight,
                type=self.type if s.type == "auto" else s.type,
                image_root=s.image_root or self.image_root,
            )
            for s in plain
        )


class PairDataConfig(DataConfig):
    """Image-text pairs for pretraining. ``clip`` and ``lit`` read the same samples and need no labels, so no IDF either."""

    labels: str = Field("clip", description="clip, a tokenizer folder, file or hub name, a SentencePiece .model, a words file")
    # The loss needs no fixed context, and cutting throws labels away; the reference cuts at 77.
    context_length: int | None = Field(None, ge=3, description="cut captions like CLIP's 77-token context; null: no limit")
    stop_words: str | None = Field(None, description="labels that are none: english, or a file with a word a line")
    idf: Literal["online", "file", "none"] = "online"
    idf_file: str | None = Field(None, description="table that `mmkit data inspect --idf` wrote, for idf=file")
    # The reference's, but for its 12.8 B recipe: 0.4 to 1, with jitter at 0.8.
    crop_scale: tuple[float, float] = Field((0.9, 1.0), description="area range of RandomResizedCrop")
    decoder: Literal["fast", "exact"] = Field(
        "fast", description="of training crops; exact: Pillow's pixels, as validation always has them"
    )
    color_jitter: tuple[float, float, float, float] | None = Field(
        None, description="largest change of brightness, contrast, saturation, hue; null: none"
    )
    color_jitter_prob: float = Field(0.8, ge=0, le=1)
    gray_scale_prob: float = Field(0.0, ge=0, le=1)

    @model_validator(mode="after")
    def _fits(self) -> PairDataConfig:
        low, high = self.crop_scale
        if not 0 < low <= high <= 1:
            raise ValueError(f"crop_scale {list(self.crop_scale)} is no range of area shares: give 0 < low <= high <= 1")
        if (self.idf == "file") != (self.idf_file is not None):
            raise ValueError("idf=file and idf_file=PATH go together")
        # More than half the colour circle is less of it the other way round.
        if self.color_jitter is not None and not (min(self.color_jitter) >= 0 and self.color_jitter[3] <= 0.5):
            raise ValueError(f"color_jitter {list(self.color_jitter)}: none may be negative, and hue is at most 0.5")
        return self


class TrainConfig(Section):
    """Optimisation. ``batch_size`` is global: micro-batch x accumulation x world size."""

    batch_size: int = Field(ge=1)
    micro_batch_size: int | None = Field(None, ge=1, description="per process and forward pass; null: batch_size / world size")
    # 0 gives the initial weights as a product: the demo's random encoder.
    steps: int | None = Field(None, ge=0)
    epochs: float | None = Field(None, gt=0)
    samples: int | None = Field(None, ge=1)
    lr: float = Field(gt=0)
    # torch's defaults; recipes state the published ones (SuperClass: 0.98 or 0.95, eps 1e-6).
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    # Neither LLaVA nor ClipCap decays (llava.md 1.2, clipcap.md 4); SuperClass's recipes state 0.2.
    weight_decay: float = Field(0.0, ge=0)
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    warmup: float = Field(0.0, ge=0, description="steps when >= 1, a share of all steps when < 1")
    min_lr_ratio: float = Field(0.0, ge=0, le=1)
    # Off, as in the published runs of all references (superclass.md 2, llava.md 1.2, clipcap.md 4).
    clip_grad_norm: float | None = Field(None, gt=0)
    # No fp16: it needs loss scaling, which the loop does not have.
    precision: Literal["fp32", "bf16"] = "bf16"
    compile: bool = False
    deepspeed: str | None = Field(None, description="zero0 ... zero3, or a DeepSpeed JSON file")
    log_every: int = Field(10, ge=1)
    val_every: int | None = Field(None, ge=1)
    val_batches: int = Field(20, ge=1)
    checkpoint_every: int | None = Field(None, ge=1)
    # Two: where the newest turns out damaged, a run goes on from the one before.
    keep_checkpoints: int = Field(2, ge=1)

    early_stopping: StoppingConfig | None = Field(None, description="the product is that of the best step, not of the last")

    @model_validator(mode="after")
    def _one_length(self) -> TrainConfig:
        given = [k for k in ("steps", "epochs", "samples") if getattr(self, k) is not None]
        # Two lengths that disagree would need a rule of precedence.
        if len(given) != 1:
            raise ValueError(f"give exactly one of steps, epochs, samples (given: {', '.join(given) or 'none'})")
        # Accumulation has to come out even: global batch = micro-batch x accumulation x world size.
        if self.micro_batch_size and self.batch_size % self.micro_batch_size:
            raise ValueError(f"batch_size {self.batch_size} is no multiple of micro_batch_size {self.micro_batch_size}")
        return self


class BatchingConfig(Section):
    """How the samples of a step are put together for the model; the update is the same but for the order of ``grouped``."""

    kind: Literal["plain", "grouped", "packed"] = Field(
        "plain", description="grouped: batches of about equal length and one modality; packed: no padding at all"
    )
    # None instead of 64, so that a window given for another kind can be told and refused.
    window: int | None = Field(None, ge=1, description="grouped: global batches within which samples are regrouped; null: 64")
    max_tokens: int | None = Field(
        None, ge=1, description="packed: tokens of a forward pass on each process, in place of train.micro_batch_size"
    )

    @model_validator(mode="after")
    def _fits(self) -> BatchingConfig:
        if (self.kind == "packed") != (self.max_tokens is not None):
            raise ValueError("kind=packed and max_tokens=N go together")
        if self.kind != "grouped" and self.window is not None:
            raise ValueError(f"window belongs to kind grouped, not to {self.kind}")
        return self


class LlmConfig(Section):
    """A causal language model: by name, or random weights from a transformers config."""

    name: str | None = Field(None, description="hub name or local folder")
    config: dict[str, Any] | None = Field(
        None, description="transformers config (model_type, hidden_size, ...) for random weights"
    )
    tokenizer: str | None = Field(None, description="hub name or folder; null: the LLM's own")

    @model_validator(mode="after")
    def _one_origin(self) -> LlmConfig:
        if (self.name is None) == (self.config is None):
            raise ValueError("give exactly one of name (pretrained) and config (random weights)")
        if self.name is None and self.tokenizer is None:
            raise ValueError("random weights have no tokenizer of their own: give tokenizer")
        return self


class LossConfig(Section):
    """What pretraining minimises. Keys of one kind are refused with another: they would have no effect."""

    kind: Literal["softmax", "bce", "soft_margin", "asl", "two_way", "infonce", "sigmoid"] | None = Field(
        None, description="null: softmax for superclass, infonce for clip and lit"
    )
    # 256 rows of 49,408 logits are 25 MB in bf16; far smaller chunks read the head's weight again and again.
    chunk_rows: int = Field(256, ge=1, description="rows of logits that exist at one time")
    # None instead of the default's number, so that a key given for another kind can be told and refused.
    gamma_positive: float | None = Field(None, ge=0, description="asl: focusing of positives; null: 1")
    gamma_negative: float | None = Field(None, ge=0, description="asl: focusing of negatives; null: 4")
    clip: float | None = Field(None, ge=0, lt=1, description="asl: probability margin of negatives; null: 0.05")
    temperature_positive: float | None = Field(None, gt=0, description="two_way; null: 4")
    temperature_negative: float | None = Field(None, gt=0, description="two_way; null: 1")

    @model_validator(mode="after")
    def _keys_of_the_kind(self) -> LossConfig:
        for kind, keys in LOSS_KEYS.items():
            given = [key for key in keys if getattr(self, key) is not None]
            if given and self.kind != kind:
                raise ValueError(f"{', '.join(given)} belong to kind {kind}, not to {self.kind or 'the default'}")
        return self


LOSS_KEYS = {"asl": ("gamma_positive", "gamma_negative", "clip"), "two_way": ("temperature_positive", "temperature_negative")}
LABEL_LOSSES = ("softmax", "bce", "soft_margin", "asl", "two_way")
CONTRASTIVE_LOSSES = ("infonce", "sigmoid")


class TextConfig(Section):
    """The text tower of clip and lit (open_clip's); null takes what open_clip pairs with a vision tower of that width."""

    embed_dim: int | None = Field(None, ge=1, description="size of the shared space")
    width: int | None = Field(None, ge=1)
    heads: int | None = Field(None, ge=1)
    layers: int | None = Field(None, ge=1)
    # CLIP's. What does not fit is cut, where SuperClass has no limit.
    context_length: int = Field(77, ge=3)


class MonitorConfig(Section):
    """What is looked at while pretraining runs, besides the losses."""

    every: int | None = Field(None, ge=1, description="steps; null: never")
    knn_train: str | None = Field(None, description="labelled pictures that vote: image folder or JSONL")
    knn_test: str | None = None
    label: str = "label"
    image_root: str | None = None
    limit: int | None = Field(5000, ge=1, description="labelled pictures of each set, drawn once; null: all")
    # DINO's, as in a probe.
    k: int = Field(20, ge=1)
    images: tuple[str, ...] = Field((), description="pictures whose top tags are drawn in the tracker")
    tags: int = Field(5, ge=1)

    @model_validator(mode="after")
    def _fits(self) -> MonitorConfig:
        # Half a monitor looks at nothing, and this would be noticed only when the curve is missing.
        if (self.knn_train is None) != (self.knn_test is None):
            raise ValueError("knn_train and knn_test go together")
        if self.every is not None and self.knn_train is None and not self.images:
            raise ValueError("every is given, but nothing to look at: give knn_train and knn_test, or images")
        if self.every is None and (self.knn_train is not None or self.images):
            raise ValueError("give every=STEPS too: without it nothing is looked at")
        return self


class TrackConfig(Section):
    """Where curves and pictures go besides metrics.jsonl."""

    # The one that is always installed; the others are an extra.
    kind: Literal["tensorboard", "wandb", "trackio", "none"] = "tensorboard"
    project: str = "mmkit"
    name: str | None = Field(None, description="of the run in the tracker; null: the last two parts of the run directory")


class MapperConfig(Section):
    """ClipCap's mapper from image features to a prefix of LLM embeddings."""

    # ClipCap's: the mlp mapper, a prefix of 10, 8 layers of 8 heads, features as they are (clipcap.md 1, 4).
    kind: Literal["mlp", "transformer"] = "mlp"
    prefix_length: int = Field(10, ge=1)
    clip_length: int = Field(10, ge=1)
    num_layers: int = Field(8, ge=1)
    num_heads: int = Field(8, ge=1)
    feature_kind: Literal["pooled", "tokens"] = "pooled"
    feature_norm: Literal["none", "l2", "standardize"] = "none"

    @model_validator(mode="after")
    def _fits(self) -> MapperConfig:
        if self.kind == "mlp" and self.feature_kind == "tokens":
            raise ValueError(
                "the mlp mapper takes one pooled feature, not patch tokens: kind=transformer, or feature_kind=pooled"
            )
        # By value: a resolved recipe names all keys.
        plain = type(self).model_fields
        given = [key for key in ("clip_length", "num_layers", "num_heads") if getattr(self, key) != plain[key].default]
        if self.kind == "mlp" and given:
            raise ValueError(f"{', '.join(given)} belong to kind=transformer")
        return self


class LoraSettings(Section):
    """LoRA on the LLM's linear layers (never the ViT, never lm_head)."""

    # LLaVA-1.5's finetune_lora.sh; the defaults in its code are 64 and 16.
    r: int = Field(128, ge=1)
    alpha: int = Field(256, ge=1)
    dropout: float = Field(0.05, ge=0, lt=1)
    dora: bool = Field(False, description="learn length and direction of the weights apart (DoRA)")
    quantization: Literal["nf4"] | None = Field(None, description="frozen weights in 4 bits (QLoRA); needs bitsandbytes")


class LabelledDataConfig(Section):
    """Pictures with a class: image folder, JSONL rows, webdataset tars with .cls, or a Hugging Face data set.

    ``hf:NAME_OR_FOLDER`` or ``hf:NAME_OR_FOLDER@SPLIT`` names a Hugging Face data set.
    """

    train: str | None = None
    test: str
    type: Literal["auto", "folder", "jsonl", "webdataset", "hf"] = "auto"
    label: str = Field("label", description="key or column of the class")
    image: str = Field("image", description="key or column of the picture")
    image_root: str | None = None
    classes: str | None = Field(None, description="class names for zero-shot: imagenet, JSON list or object, or a name a line")
    workers: int = Field(4, ge=0)
    prefetch: int = Field(2, ge=1, description="batches that each worker makes ahead")
    timeout: float = Field(1800, ge=0, description="seconds to wait for a batch of the workers before the run ends; 0: for ever")
    # Drawn, unlike the limit on pairs: image folders come sorted by class, so the first N could be one class.
    limit: int | None = Field(None, ge=1, description="pictures of each set, drawn once")
    max_pixels: int = Field(100_000_000, ge=1)
    max_bytes: int = Field(MAX_BYTES, ge=1, description="of an encoded picture")


class PublishedConfig(Section):
    """A published score of a task, printed as a reference beside one's own."""

    system: str
    metrics: dict[str, float] = Field(min_length=1, description="by the names of scores.json, as there (fractions)")
    source: str = Field(description="paper and table, or the like")
    conditions: str = Field("", description="what differs from the task's own: split, prompt, OCR tokens")


class TaskConfig(Section):
    """One task of an evaluation."""

    name: str | None = Field(None, description="in scores.json and the report; null: that of the suite")
    task: str = Field(description="suite, as in `mmkit score`: coco-caption, vqav2, textvqa, ...")
    annotations: str | None = Field(None, description="official file or folder; null: a test set whose answers the server keeps")
    questions: str | None = None
    image_root: str | None = Field(None, description="folder of the pictures, where the data set's table does not carry them")
    image_name: str | None = Field(None, description="file name from the image id where the files do not say, e.g. {:012d}.jpg")
    prompt: str = "{question}"
    # Off, as in lmms-eval. LLaVA's published 58.2 has the data set's OCR tokens in the prompt: another task.
    ocr: Literal["none", "reference"] = "none"
    limit: int | None = Field(None, ge=1)
    generation: GenerationConfig = GenerationConfig()
    settings: dict[str, Any] = Field(default_factory=dict, description="scorer settings, e.g. tokenizer, rule")
    published: tuple[PublishedConfig, ...] = ()

    @field_validator("task")
    @classmethod
    def _known(cls, value: str) -> str:
        # Not at the top: names of suites may come from other packages, and are looked up only for an evaluation.
        from mmkit.eval.names import suite_names

        if value not in suite_names():
            near = difflib.get_close_matches(value, suite_names(), 1)
            hint = f"did you mean {near[0]}? " if near else ""
            raise ValueError(f"no such suite; {hint}known: {', '.join(suite_names())}")
        return value

    @model_validator(mode="after")
    def _fits(self) -> TaskConfig:
        # Beside another score it would claim a condition that never held.
        if self.ocr != "none" and self.task != "textvqa":
            raise ValueError(f"ocr is a setting of textvqa, not of {self.task}")
        return self
