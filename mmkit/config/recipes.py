"""One recipe class for each stage, and the union of them all."""

from __future__ import annotations

from typing import Literal, Union

from pydantic import Field, model_validator

from mmkit.config.decoding import DecodingConfig
from mmkit.config.looks import CaptionMonitorConfig
from mmkit.config.section import Section
from mmkit.config.sections import (
    CONTRASTIVE_LOSSES,
    LABEL_LOSSES,
    BatchingConfig,
    DataConfig,
    EncoderConfig,
    LabelledDataConfig,
    LlmConfig,
    LoraSettings,
    LossConfig,
    MapperConfig,
    MonitorConfig,
    PairDataConfig,
    TaskConfig,
    TextConfig,
    TrackConfig,
    TrainConfig,
)
from mmkit.data.bounds import MAX_BYTES

# What a captioner's monitor writes into metrics.jsonl.
CAPTION_NUMBERS = ("val_CIDEr", "val_Bleu_4", "val_ROUGE_L")


class RunRecipe(Section):
    """Keys that every recipe has."""

    run: str = Field(description="run directory")
    system: str | None = Field(None, description="row label in the report; null: that of the encoder or model that is built on")
    seed: int = Field(0, ge=0)


class PretrainRecipe(RunRecipe):
    """What the three ways to pretrain share, so that ``stage=clip`` turns a SuperClass recipe into its baseline."""

    encoder: EncoderConfig
    data: PairDataConfig
    # Sections are frozen, so one default object can serve every recipe.
    loss: LossConfig = LossConfig()
    text: TextConfig = TextConfig()
    monitor: MonitorConfig = MonitorConfig()
    track: TrackConfig = TrackConfig()
    train: TrainConfig

    @model_validator(mode="after")
    def _validates(self) -> PretrainRecipe:
        # Either alone has no effect.
        if (self.data.val is None) != (self.train.val_every is None):
            raise ValueError("data.val (what to validate on) and train.val_every (how often) go together")
        return self


class SuperclassRecipe(PretrainRecipe):
    """SuperClass pretraining: caption tokens are the labels of the picture."""

    stage: Literal["superclass"]

    @model_validator(mode="after")
    def _loss_fits(self) -> SuperclassRecipe:
        # One loss key serves both families, so that stage=clip turns one recipe into the other; null takes the stage's own.
        if self.loss.kind in CONTRASTIVE_LOSSES:
            raise ValueError(f"loss.kind {self.loss.kind} needs a text tower: use stage=clip, or {', '.join(LABEL_LOSSES)}")
        return self


class ContrastiveRecipe(PretrainRecipe):
    """What clip and lit share."""

    @model_validator(mode="after")
    def _loss_fits(self) -> ContrastiveRecipe:
        if self.loss.kind in LABEL_LOSSES:
            raise ValueError(f"loss.kind {self.loss.kind} needs labels: use stage=superclass, or {', '.join(CONTRASTIVE_LOSSES)}")
        # Refused, not ignored: whoever lists pictures expects to see something.
        if self.monitor.images:
            raise ValueError("monitor.images shows tags of a label head, which this stage has not")
        if self.encoder.init_head:
            raise ValueError("encoder.init_head: this stage has no label head")
        return self


class ClipRecipe(ContrastiveRecipe):
    """CLIP or SigLIP pretraining: picture and caption meet in one space; SuperClass's rival."""

    stage: Literal["clip"]


class LitRecipe(ContrastiveRecipe):
    """Locked-image tuning (arXiv 2111.07991): the tower of ``encoder.init`` stays frozen, a text tower learns to meet it."""

    stage: Literal["lit"]

    @model_validator(mode="after")
    def _has_tower(self) -> LitRecipe:
        # A frozen tower of random weights would train without complaint, and score at chance.
        if self.encoder.init is None and not self.encoder.pretrained:
            raise ValueError("lit trains a text tower for a finished encoder: give encoder.init")
        return self


class ClipcapRecipe(RunRecipe):
    """A mapper turns frozen image features into a prefix for a language model that writes the caption."""

    stage: Literal["clipcap"]
    encoder: str = Field(description="run, encoder directory, or timm:NAME")
    llm: LlmConfig
    mapper: MapperConfig = MapperConfig()
    tune_llm: bool = False
    # ClipCap's longest caption in generation (rmokady/CLIP_prefix_caption, entry_length).
    max_length: int = Field(67, ge=2, description="caption tokens kept")
    # ClipCap learns no end at all, and stops at the first full stop (clipcap.md 2, 5).
    caption_end: Literal["eos", "period", "none"] = Field(
        "eos",
        description="eos: captions end with the end token; period: with a full stop, as Conceptual Captions; none: as they are",
    )
    generation: DecodingConfig = Field(
        DecodingConfig(max_new_tokens=67), description="how `monitor` writes captions; saved with the captioner as its default"
    )
    batching: BatchingConfig = BatchingConfig()
    data: DataConfig
    monitor: CaptionMonitorConfig = CaptionMonitorConfig()
    track: TrackConfig = TrackConfig()
    train: TrainConfig

    @model_validator(mode="after")
    def _batches_fit(self) -> ClipcapRecipe:
        # A caption is a dozen tokens: grouped by length nothing is left that packing could save.
        if self.batching.kind == "packed":
            raise ValueError("batching.kind=packed is for llava; captions are grouped by length: use grouped")
        return self

    @model_validator(mode="after")
    def _looks_fit(self) -> ClipcapRecipe:
        # Number -> how often it is looked at; None: never.
        looks = {"val_loss": self.train.val_every, **dict.fromkeys(CAPTION_NUMBERS, self.monitor.every)}
        if (self.data.val is None) != (self.train.val_every is None and self.monitor.every is None):
            raise ValueError("data.val (what to look at) and train.val_every or monitor.every (how often) go together")
        stopping = self.train.early_stopping
        # Known here, unlike in other stages: a wrong name would show after the first look only.
        if stopping is not None and looks.get(stopping.metric) is None:
            known = ", ".join(name for name, every in looks.items() if every is not None) or "none"
            raise ValueError(f"train.early_stopping.metric {stopping.metric} is not looked at (looked at: {known})")
        return self


# How image-text pairs are read. Conversations fix what their parts are called, are shuffled as a whole, and lie on a disk.
_PAIR_KEYS = ("image", "caption", "streaming", "shuffle_window", "cache_gib")


class LlavaRecipe(RunRecipe):
    """Align, fine-tune or LoRA-tune a LLaVA-style model."""

    stage: Literal["llava"]
    encoder: str | None = Field(None, description="run, encoder directory or timm:NAME; null with `model`")
    llm: LlmConfig | None = None
    model: str | None = Field(None, description="run or directory of an MLLM to go on from")
    tune: Literal["projector", "full", "lora"]
    lora: LoraSettings = LoraSettings()
    train_encoder: bool = Field(False, description="train the encoder too, with any of the above")
    projector_lr: float | None = Field(None, gt=0, description="of the projector; null: train.lr")
    encoder_lr: float | None = Field(None, gt=0, description="of the encoder; null: train.lr")
    # LLaVA's: the last block but one, before the final norm.
    feature_layer: int = -2
    image_size: int | None = Field(None, ge=8, description="null: the encoder's; another one interpolates its positions")
    projector: Literal["mlp2x_gelu", "linear", "pixel_shuffle"] = "mlp2x_gelu"
    # None instead of 2, so that a number given for another projector can be told and refused.
    pixel_shuffle: int | None = Field(
        None, ge=2, description="projector pixel_shuffle: r x r patches become one image token; null: 2"
    )
    projector_from: str | None = Field(None, description="run whose projector to start from; same encoder and LLM")
    template: Literal["plain", "vicuna_v1", "chatml", "demo", "chat"] = Field(
        description="chat: the language model's own chat template"
    )
    # The encoder was validated on squashed squares; pad is LLaVA-1.5's way in the second stage.
    image_fit: Literal["squash", "crop", "pad"] = "squash"
    # LLaVA's limit; it too counts after expansion.
    max_length: int = Field(2048, ge=8, description="tokens after image expansion")
    grad_checkpointing: bool = False
    cache_features: bool = Field(
        False, description="keep what the frozen encoder gives for each picture on disk, beside the run, instead of running it"
    )
    liger: bool = Field(False, description="liger-kernel's norm, rotary, feed-forward and loss kernels; needs a GPU")
    batching: BatchingConfig = BatchingConfig()
    data: DataConfig
    track: TrackConfig = TrackConfig()
    train: TrainConfig

    @model_validator(mode="after")
    def _trains(self) -> LlavaRecipe:
        # Keys without effect: whoever sets them expects one.
        if self.encoder_lr is not None and not self.train_encoder:
            raise ValueError("encoder_lr belongs to train_encoder=true")
        if (self.data.val is None) != (self.train.val_every is None):
            raise ValueError("data.val (what to validate on) and train.val_every (how often) go together")
        if self.cache_features and self.train_encoder:
            raise ValueError("cache_features keeps the features of a frozen encoder: drop it, or train_encoder")
        if self.tune != "lora" and self.lora != LoraSettings():
            raise ValueError(f"lora settings belong to tune=lora, not to {self.tune}")
        return self

    @model_validator(mode="after")
    def _batches_fit(self) -> LlavaRecipe:
        # Two bounds on one forward pass: one of them would have no effect.
        if self.batching.kind == "packed" and self.train.micro_batch_size is not None:
            raise ValueError("packed batches have batching.max_tokens in place of train.micro_batch_size: drop the latter")
        return self

    @model_validator(mode="after")
    def _data_fits(self) -> LlavaRecipe:
        fields = type(self.data).model_fields
        given = [f"data.{key}" for key in _PAIR_KEYS if getattr(self.data, key) != fields[key].default]
        if given:
            raise ValueError(f"{', '.join(given)} are for image-text pairs and have no effect on conversations: leave them out")
        return self

    @model_validator(mode="after")
    def _one_origin(self) -> LlavaRecipe:
        assembled = self.encoder is not None and self.llm is not None
        # Both together would leave it open which encoder counts.
        if assembled == (self.model is not None) or (self.model is not None and (self.encoder or self.llm)):
            raise ValueError("give either `model` (to go on from) or both `encoder` and `llm` (to assemble)")
        return self

    @model_validator(mode="after")
    def _assembly_fits(self) -> LlavaRecipe:
        if self.pixel_shuffle is not None and self.projector != "pixel_shuffle":
            raise ValueError(f"pixel_shuffle has no effect with projector {self.projector}: use projector=pixel_shuffle")
        # Refused, not ignored: the model to go on from has made these choices already.
        keys = ("feature_layer", "image_size", "projector", "pixel_shuffle", "projector_from")
        changed = [key for key in keys if getattr(self, key) != type(self).model_fields[key].default]
        if self.model is not None and changed:
            raise ValueError(f"{', '.join(changed)} belong to assembling: leave them out with `model`")
        return self


class ProbeRecipe(RunRecipe):
    """Linear probe, k-shot, k-NN and zero-shot on a frozen encoder."""

    stage: Literal["probe"]
    encoder: str
    data: LabelledDataConfig
    probes: tuple[Literal["linear", "kshot", "knn", "zeroshot", "tags"], ...] = Field(("linear", "knn"), min_length=1)
    # MAE's linear probe takes 90 epochs; k and temperature below are DINO's, ten shots in three draws the paper's.
    epochs: int = Field(90, ge=1)
    # Two at least: the linear probe normalises by the statistics of a batch.
    batch_size: int = Field(256, ge=2)
    # Side by side in one pass; a held-out tenth of the training pictures chooses.
    lrs: tuple[float, ...] = Field((0.01, 0.03, 0.1, 0.3, 1.0), min_length=1)
    shots: int = Field(10, ge=1, description="kshot: training pictures of each class")
    draws: int = Field(3, ge=1, description="kshot: independent draws of them")
    k: int = Field(20, ge=1)
    temperature: float = Field(0.07, gt=0)
    # The reference's zero-shot evaluation has the 80 of OpenAI as well (superclass.md 3).
    templates: str = Field("openai", description="zero-shot prompts: openai (80), plain, or a file with one {} template a line")
    precision: Literal["fp32", "bf16"] = Field("fp32", description="of feature extraction")

    @model_validator(mode="after")
    def _fits(self) -> ProbeRecipe:
        # Zero-shot and tags go by class names, and need no training pictures.
        trained = sorted({"linear", "kshot", "knn"} & set(self.probes))
        if trained and self.data.train is None:
            raise ValueError(f"{', '.join(trained)} learn from labelled pictures: give data.train")
        return self


class FinetuneRecipe(RunRecipe):
    """Full fine-tuning of an encoder with a linear classifier, scored on the test set."""

    stage: Literal["finetune"]
    encoder: str
    image_size: int | None = Field(None, ge=8, description="null: the encoder's; another one interpolates its positions")
    data: LabelledDataConfig
    # Inception's range. Pretraining stays at 0.9 to 1 by default, as the reference does.
    crop_scale: tuple[float, float] = (0.08, 1.0)
    decoder: Literal["fast", "exact"] = Field("fast", description="of training crops; exact: Pillow's pixels")
    flip: bool = True
    # Off unless a recipe says so, as all of these but smoothing, whose 0.1 is MAE's (arXiv 2111.06377, table 9).
    rand_augment: str | None = Field(None, description="timm's name, such as rand-m9-mstd0.5-inc1")
    mixup: float = Field(0.0, ge=0)
    cutmix: float = Field(0.0, ge=0)
    label_smoothing: float = Field(0.1, ge=0, lt=1)
    drop_path: float = Field(0.0, ge=0, lt=1)
    layer_decay: float = Field(1.0, gt=0, le=1, description="factor on the learning rate for each block below the top")
    # Strict, unlike pairs: labelled sets are for comparing systems, which must have seen the same pictures.
    max_skipped: float = Field(0.0, ge=0, le=1)
    track: TrackConfig = TrackConfig()
    train: TrainConfig

    @model_validator(mode="after")
    def _fits(self) -> FinetuneRecipe:
        if self.data.train is None:
            raise ValueError("fine-tuning needs data.train")
        return self


class EvalRecipe(RunRecipe):
    """Generate and score one or more tasks with one model."""

    stage: Literal["eval"]
    model: str
    tasks: tuple[TaskConfig, ...] = Field(min_length=1)
    blind: bool = Field(False, description="show every sample another sample's picture: the blind baseline")
    max_skipped: float = Field(0.01, ge=0, le=1)
    max_pixels: int = Field(100_000_000, ge=1)
    max_bytes: int = Field(MAX_BYTES, ge=1, description="of an encoded picture")


# What the training loop takes; a probe and an evaluation train nothing that is kept.
TrainRecipe = Union[SuperclassRecipe, ClipRecipe, LitRecipe, FinetuneRecipe, ClipcapRecipe, LlavaRecipe]
# `stage` tells them apart, so that a fault is one of one schema and not of all eight (load.py).
Recipe = Union[SuperclassRecipe, ClipRecipe, LitRecipe, FinetuneRecipe, ClipcapRecipe, LlavaRecipe, ProbeRecipe, EvalRecipe]
# By name, for messages and hints that come before pydantic has chosen a class.
STAGES: dict[str, type[RunRecipe]] = {
    "superclass": SuperclassRecipe,
    "clip": ClipRecipe,
    "lit": LitRecipe,
    "finetune": FinetuneRecipe,
    "clipcap": ClipcapRecipe,
    "llava": LlavaRecipe,
    "probe": ProbeRecipe,
    "eval": EvalRecipe,
}
