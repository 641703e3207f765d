"""Recipe schema: what a YAML recipe may say, and errors that name the nearest known key.

A recipe is YAML plus ``dotted.key=value`` overrides. OmegaConf merges and interpolates (``${oc.env:DATA,./data}``), pydantic
checks. Numbers live in recipes; modules take plain arguments and never see these classes.
"""

from __future__ import annotations

import difflib
import types
import typing
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Union

import yaml
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError, model_validator

from mmkit.errors import InputError

# OpenAI CLIP's constants (open_clip constants.py), the default of every SuperClass recipe.
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


class Section(BaseModel):
    """A group of keys; an unknown key is an error, never ignored."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=(), allow_inf_nan=False)


class EncoderConfig(Section):
    """A ViT built from scratch (or from timm's weights) for pretraining."""

    architecture: str
    image_size: int = Field(224, ge=8)
    patch_size: int | None = None
    layout: Literal["superclass", "native"] = "superclass"
    pretrained: bool = False
    init: str | None = Field(None, description="encoder directory or run whose weights training starts from")
    model_args: dict[str, Any] = Field(default_factory=dict)
    mean: tuple[float, float, float] = CLIP_MEAN
    std: tuple[float, float, float] = CLIP_STD
    grad_checkpointing: bool = False


class DataConfig(Section):
    """Where the samples come from and how a picture becomes a square of pixels."""

    train: str
    val: str | None = None
    type: Literal["auto", "webdataset", "coco", "pairs", "llava"] = "auto"
    image_root: str | None = None
    val_image_root: str | None = None
    workers: int = Field(4, ge=0)
    limit: int | None = Field(None, ge=1, description="use the first N samples only")
    max_skipped: float = Field(0.01, ge=0, le=1, description="share of samples that may be unreadable before the run stops")
    max_pixels: int = Field(100_000_000, ge=1, description="a picture with more is left out from its header alone")


class PairDataConfig(DataConfig):
    """Image-text pairs for SuperClass."""

    labels: str = Field("clip", description="clip, a Hugging Face tokenizer folder, or a SentencePiece .model")
    context_length: int | None = Field(None, ge=3, description="cut captions like CLIP's 77-token context; null: no limit")
    idf: Literal["online", "none"] = "online"
    crop_scale: tuple[float, float] = Field((0.9, 1.0), description="area range of RandomResizedCrop")

    @model_validator(mode="after")
    def _is_range(self) -> PairDataConfig:
        low, high = self.crop_scale
        if not 0 < low <= high <= 1:
            raise ValueError(f"crop_scale {list(self.crop_scale)} is no range of area shares: give 0 < low <= high <= 1")
        return self


class TrainConfig(Section):
    """Optimisation. ``batch_size`` is global: micro-batch x accumulation x world size."""

    batch_size: int = Field(ge=1)
    micro_batch_size: int | None = Field(None, ge=1, description="per process and forward pass; null: batch_size / world size")
    steps: int | None = Field(None, ge=0)
    epochs: float | None = Field(None, gt=0)
    samples: int | None = Field(None, ge=1)
    lr: float = Field(gt=0)
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = Field(0.0, ge=0)
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    warmup: float = Field(0.0, ge=0, description="steps when >= 1, a share of all steps when < 1")
    min_lr_ratio: float = Field(0.0, ge=0, le=1)
    clip_grad_norm: float | None = Field(None, gt=0)
    precision: Literal["fp32", "bf16"] = "bf16"
    compile: bool = False
    deepspeed: str | None = Field(None, description="zero0 ... zero3, or a DeepSpeed JSON file")
    log_every: int = Field(10, ge=1)
    val_every: int | None = Field(None, ge=1)
    val_batches: int = Field(20, ge=1)
    checkpoint_every: int | None = Field(None, ge=1)
    keep_checkpoints: int = Field(2, ge=1)

    @model_validator(mode="after")
    def _one_length(self) -> TrainConfig:
        given = [k for k in ("steps", "epochs", "samples") if getattr(self, k) is not None]
        if len(given) != 1:
            raise ValueError(f"give exactly one of steps, epochs, samples (given: {', '.join(given) or 'none'})")
        if self.micro_batch_size and self.batch_size % self.micro_batch_size:
            raise ValueError(f"batch_size {self.batch_size} is no multiple of micro_batch_size {self.micro_batch_size}")
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
    """Soft-label loss over the vocabulary."""

    kind: Literal["softmax"] = "softmax"
    chunk_rows: int = Field(256, ge=1)


class MapperConfig(Section):
    """ClipCap's mapper from image features to a prefix of LLM embeddings."""

    kind: Literal["mlp", "transformer"] = "mlp"
    prefix_length: int = Field(10, ge=1)
    clip_length: int = Field(10, ge=1)
    num_layers: int = Field(8, ge=1)
    num_heads: int = Field(8, ge=1)
    feature_kind: Literal["pooled", "tokens"] = "pooled"
    feature_norm: Literal["none", "l2", "standardize"] = "none"


class LoraSettings(Section):
    """LoRA on the LLM's linear layers (never the ViT, never lm_head)."""

    r: int = Field(128, ge=1)
    alpha: int = Field(256, ge=1)
    dropout: float = Field(0.05, ge=0, lt=1)
    projector_lr: float | None = Field(None, gt=0)


class RunRecipe(Section):
    """Keys that every recipe has."""

    run: str = Field(description="run directory")
    system: str | None = Field(None, description="row label in the report")
    seed: int = Field(0, ge=0)


class SuperclassRecipe(RunRecipe):
    """SuperClass pretraining: caption tokens are the labels of the picture."""

    stage: Literal["superclass"]
    encoder: EncoderConfig
    data: PairDataConfig
    loss: LossConfig = LossConfig()
    train: TrainConfig


class ClipcapRecipe(RunRecipe):
    """A mapper turns frozen image features into a prefix for a language model that writes the caption."""

    stage: Literal["clipcap"]
    encoder: str = Field(description="run, encoder directory, or timm:NAME")
    llm: LlmConfig
    mapper: MapperConfig = MapperConfig()
    tune_llm: bool = False
    max_length: int = Field(67, ge=2, description="caption tokens kept")
    data: DataConfig
    train: TrainConfig


class LlavaRecipe(RunRecipe):
    """Align, fine-tune or LoRA-tune a LLaVA-style model."""

    stage: Literal["llava"]
    encoder: str | None = Field(None, description="run, encoder directory or timm:NAME; null with `model`")
    llm: LlmConfig | None = None
    model: str | None = Field(None, description="run or directory of an MLLM to go on from")
    tune: Literal["projector", "full", "lora"]
    lora: LoraSettings = LoraSettings()
    feature_layer: int = -2
    projector: Literal["mlp2x_gelu"] = "mlp2x_gelu"
    template: Literal["plain", "vicuna_v1", "chatml", "demo"]
    image_fit: Literal["squash", "crop", "pad"] = "squash"
    max_length: int = Field(2048, ge=8, description="tokens after image expansion")
    grad_checkpointing: bool = False
    data: DataConfig
    train: TrainConfig

    @model_validator(mode="after")
    def _one_origin(self) -> LlavaRecipe:
        assembled = self.encoder is not None and self.llm is not None
        if assembled == (self.model is not None) or (self.model is not None and (self.encoder or self.llm)):
            raise ValueError("give either `model` (to go on from) or both `encoder` and `llm` (to assemble)")
        return self


class ProbeDataConfig(Section):
    """Labelled pictures: JSONL rows with an image and the label key, or an image folder (one sub-folder a class)."""

    train: str
    test: str
    label: str = "label"
    image_root: str | None = None
    workers: int = Field(4, ge=0)
    limit: int | None = Field(None, ge=1)
    max_pixels: int = Field(100_000_000, ge=1)


class ProbeRecipe(RunRecipe):
    """Linear probe and k-NN on a frozen encoder."""

    stage: Literal["probe"]
    encoder: str
    data: ProbeDataConfig
    probes: tuple[Literal["linear", "knn"], ...] = ("linear", "knn")
    epochs: int = Field(90, ge=1)
    batch_size: int = Field(256, ge=2)
    lrs: tuple[float, ...] = (0.01, 0.03, 0.1, 0.3, 1.0)
    k: int = Field(20, ge=1)
    temperature: float = Field(0.07, gt=0)


class GenerationConfig(Section):
    """Decoding settings, printed beside every score."""

    max_new_tokens: int = Field(32, ge=1)
    num_beams: int = Field(1, ge=1)
    batch_size: int = Field(32, ge=1)


class TaskConfig(Section):
    """One task of an evaluation."""

    task: Literal["coco-caption", "vqav2", "textvqa"]
    annotations: str
    questions: str | None = None
    image_root: str
    image_name: str | None = Field(None, description="file name from the image id where the files do not say, e.g. {:012d}.jpg")
    prompt: str = "{question}"
    ocr: Literal["none", "reference"] = "none"
    limit: int | None = Field(None, ge=1)
    generation: GenerationConfig = GenerationConfig()
    settings: dict[str, Any] = Field(default_factory=dict, description="scorer settings, e.g. tokenizer, rule")

    @model_validator(mode="after")
    def _fits(self) -> TaskConfig:
        if self.task == "vqav2" and self.questions is None:
            raise ValueError("vqav2 needs `questions`")
        if self.ocr != "none" and self.task != "textvqa":
            raise ValueError(f"ocr is a setting of textvqa, not of {self.task}")
        return self


class EvalRecipe(RunRecipe):
    """Generate and score one or more tasks with one model."""

    stage: Literal["eval"]
    model: str
    tasks: tuple[TaskConfig, ...] = Field(min_length=1)
    blind: bool = Field(False, description="show every sample another sample's picture: the blind baseline")
    max_skipped: float = Field(0.01, ge=0, le=1)
    max_pixels: int = Field(100_000_000, ge=1)


TrainRecipe = Union[SuperclassRecipe, ClipcapRecipe, LlavaRecipe]
Recipe = Union[SuperclassRecipe, ClipcapRecipe, LlavaRecipe, ProbeRecipe, EvalRecipe]
STAGES: dict[str, type[RunRecipe]] = {
    "superclass": SuperclassRecipe,
    "clipcap": ClipcapRecipe,
    "llava": LlavaRecipe,
    "probe": ProbeRecipe,
    "eval": EvalRecipe,
}
_ADAPTER: TypeAdapter[Recipe] = TypeAdapter(Annotated[Recipe, Field(discriminator="stage")])


def load_recipe(path: Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe, apply ``dotted.key=value`` overrides and check it.

    Args:
        path: YAML file.
        overrides: ``key=value`` strings; values are YAML (``train.betas=[0.9,0.98]``), list items go by number
            (``tasks.0.limit=5``).

    Returns:
        The checked recipe.

    Raises:
        InputError: Unreadable YAML, unknown key (with the nearest known one), or a value that does not fit.
    """
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    try:
        tree = OmegaConf.load(path)
    except (yaml.YAMLError, OSError, UnicodeDecodeError) as error:
        raise InputError(f"cannot read the recipe ({_one_line(error)})", where=path, mend="fix the YAML") from None
    try:
        for item in overrides:
            key, equals, value = item.partition("=")
            if not equals or not key:
                raise InputError(f"override {item!r} is not of the form key=value", mend="write e.g. train.lr=1e-3")
            OmegaConf.update(tree, key, _parse_value(value), force_add=True)
        plain = OmegaConf.to_container(tree, resolve=True)
    # OmegaConf reports a malformed key (`[`, a word as list position) with plain Python errors.
    except (OmegaConfBaseException, yaml.YAMLError, TypeError, IndexError, ValueError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(_one_line(error), where=path, mend="check the override or the interpolation") from None
    if not isinstance(plain, dict):
        raise InputError("a recipe is a mapping of keys", where=path, mend="start from `mmkit copy NAME DEST`")
    return check_recipe(typing.cast(dict[str, Any], plain), where=path)


def check_recipe(plain: dict[str, Any], *, where: object) -> Recipe:
    """Check a plain mapping against the schema of its ``stage``.

    Raises:
        InputError: One line for all faults; unknown keys come with the nearest and all known keys.
    """
    stage = plain.get("stage")
    if not isinstance(stage, str) or stage not in STAGES:
        near = difflib.get_close_matches(str(stage), STAGES, 1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise InputError(f"stage {stage!r} is unknown", where=where, mend=f"{hint}known: {', '.join(STAGES)}")
    try:
        return _ADAPTER.validate_python(plain)
    except ValidationError as error:
        faults = [_describe(dict(e), STAGES[stage]) for e in error.errors()]
        raise InputError("; ".join(faults), where=where, mend="see the recipe's head or `mmkit copy` a shipped one") from None


def dump_recipe(recipe: Recipe) -> str:
    """The resolved recipe as YAML, in schema order; loading it again gives an equal recipe."""
    from omegaconf import OmegaConf

    # OmegaConf's dumper quotes what its reader would take for a number: YAML 1.1 writes the name 1e5 bare.
    return OmegaConf.to_yaml(OmegaConf.create(recipe.model_dump(mode="json")))


def _parse_value(text: str) -> Any:
    """The value of an override, by the same YAML rules as the recipe's own (1e-3 is a number, a date is text)."""
    from omegaconf import OmegaConf

    tree = OmegaConf.to_container(OmegaConf.from_dotlist([f"value={text}"]), resolve=False)
    return typing.cast(dict[str, Any], tree)["value"] if text else None


def _describe(error: dict[str, Any], schema: type[BaseModel]) -> str:
    """One pydantic error in words."""
    location = list(error["loc"][1:])  # the first part is the stage, which chose the schema
    key = ".".join(map(str, location)) or "recipe"
    if error["type"] == "extra_forbidden":
        known = sorted(_keys(schema))
        siblings = [k for k in known if k.rpartition(".")[0] == _plain(location[:-1])]
        name = str(location[-1])
        near = difflib.get_close_matches(name, [k.rpartition(".")[2] for k in siblings], 1, 0.5)
        parent = ".".join(map(str, location[:-1]))
        if near:
            hint = f"did you mean {f'{parent}.' if parent else ''}{near[0]}? "
        else:  # the right name in the wrong section is the other common slip
            elsewhere = [k for k in known if k.rpartition(".")[2] == name] or difflib.get_close_matches(key, known, 1)
            hint = f"did you mean {elsewhere[0]}? " if elsewhere else ""
        return f"unknown key {key!r}; {hint}known keys here: {', '.join(k.rpartition('.')[2] for k in siblings)}"
    if error["type"] == "missing":
        return f"key {key!r} is missing"
    what = error["msg"].removeprefix("Value error, ")
    if isinstance(error.get("input"), dict):  # a rule between keys: the whole section would drown the message
        return f"{key}: {what}" if location else what
    return f"{key}={error.get('input')!r}: {what}"


def _plain(location: Sequence[Any]) -> str:
    """A location without list positions."""
    return ".".join(str(p) for p in location if not isinstance(p, int))


def _keys(schema: type[BaseModel], prefix: str = "") -> Iterator[str]:
    """All dotted keys of a schema, list items without their number."""
    for name, field in schema.model_fields.items():
        yield prefix + name
        for inner in _models_in(field.annotation):
            yield from _keys(inner, f"{prefix}{name}.")


def _models_in(annotation: Any) -> Iterator[type[BaseModel]]:
    """The sections that an annotation may hold (through unions and tuples)."""
    if isinstance(annotation, type) and not isinstance(annotation, types.GenericAlias) and issubclass(annotation, BaseModel):
        yield annotation
    for argument in typing.get_args(annotation):
        yield from _models_in(argument)


def _one_line(error: object) -> str:
    """An error's text on one line."""
    return " ".join(str(error).split())
