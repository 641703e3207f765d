"""What a frozen vision tower gives for the pictures of a data set, extracted once and kept beside the runs."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, overload

import torch
from torch import Tensor, nn

from mmkit.config import LlavaRecipe
from mmkit.data.images import mean_colour
from mmkit.data.pairs import Picture
from mmkit.distributed.engine import Engine
from mmkit.encoders.mapped import feature_file, mapped_features, picture_state
from mmkit.encoders.picture_rows import picture_rows
from mmkit.encoders.vit import normalise
from mmkit.errors import InputError
from mmkit.files import hash_text
from mmkit.models.llava import tower_features
from mmkit.models.projectors import VisionLanguageModel
from mmkit.training.stages.turned import ConversationSamples


def keep_features(
    samples: ConversationSamples,
    model: VisionLanguageModel,
    meta: dict[str, Any],
    recipe: LlavaRecipe,
    engine: Engine,
    data_fingerprint: str,
) -> None:
    """Give samples the features of their pictures in place of pixels.

    Args:
        samples: Of one data set.
        model: Its tower is frozen; it is moved to the engine's device.
        meta: The model's: picture size, fit, mean, std.
        recipe: Precision, bounds on pictures, and where runs lie.
        engine: The main process extracts, the others then find the file.
        data_fingerprint: Of what the samples are read from.

    Raises:
        InputError: The disk cannot hold them.
    """
    size = meta["image_size"]
    kept = torch.bfloat16 if recipe.train.precision == "bf16" else torch.float32
    # A skeleton's tower has shapes and no weights; it only reads what the main process has kept.
    extract = None if engine.skeleton else _Extract(model, meta, engine)
    told = []
    pictures: Sequence[Picture] = ()
    # The main process alone makes the list of pictures and looks at their files; the others need the number.
    if engine.is_main:
        assert extract is not None, "under ZeRO-3 it is the main process that has the weights"
        pictures = samples.pictures()
        # The tower's own weights and not its name: both stages of LLaVA have the same one, and so share a file.
        facts = [_weights(model.model.vision_tower), meta["image_fit"], size, meta["mean"], meta["std"]]
        # The model's own layer and not the recipe's, which says nothing of a model that is gone on from.
        facts += [model.config.vision_feature_layer, model.config.vision_feature_select_strategy, kept]
        facts += [data_fingerprint, recipe.data.limit, recipe.data.max_pixels, recipe.data.max_bytes]
        # Asked of the model: how many tokens there are, and how wide, depends on the tower's class and on what of it is selected.
        shape = tuple(extract(torch.zeros(1, 3, size, size, dtype=torch.uint8)).shape[1:])
        told = [(hash_text(*map(str, facts), *map(picture_state, pictures)), shape, len(pictures))]
    # First without a timeout: looking at half a million files may take minutes on a network disk.
    engine.barrier()
    key, shape, count = engine.gather(told)[0]
    if not engine.is_main:
        pictures = _Pictures(samples, count)
    # Beside the runs and not inside: the second stage of LLaVA finds there what the first has kept.
    folder = Path(recipe.run).parent / ".features"

    def use() -> None:
        features = mapped_features(
            folder,
            key,
            pictures,
            extract or _missing,
            shape=shape,
            dtype=kept,
            size=size,
            fit=meta["image_fit"],
            fill=mean_colour(meta["mean"]),
            max_pixels=recipe.data.max_pixels,
            max_bytes=recipe.data.max_bytes,
            workers=recipe.data.workers,
        )
        samples.use_features(picture_rows(feature_file(folder, key).with_suffix(".rows"), pictures), features)

    engine.main_first(use)


class _Pictures(Sequence[Picture]):
    """The pictures of samples in a process that may not need them: listed when the first is asked for."""

    def __init__(self, samples: ConversationSamples, count: int) -> None:
        self._samples, self._count = samples, count
        self._listed: list[Picture] = []

    def __len__(self) -> int:
        return self._count

    @overload
    def __getitem__(self, index: int) -> Picture: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Picture]: ...
    def __getitem__(self, index: int | slice) -> Picture | Sequence[Picture]:
        if not self._listed:
            self._listed = self._samples.pictures()
            # The main process sees the same data, which is checked before training; a row more or less would shift all others.
            assert len(self._listed) == self._count, "this process sees other pictures than the main one"
        return self._listed[index]


class _Extract:
    """What the projector is given for pictures uint8[B, 3, S, S]: f[B, N, D]."""

    def __init__(self, model: VisionLanguageModel, meta: dict[str, Any], engine: Engine) -> None:
        self.model, self.engine = model, engine
        self.tower = model.model.vision_tower.to(engine.device)
        self.mean, self.std = (torch.tensor(meta[name], device=engine.device).view(1, 3, 1, 1) for name in ("mean", "std"))

    @torch.no_grad()
    def __call__(self, pixels: Tensor) -> Tensor:
        values = normalise(pixels.to(self.engine.device, non_blocking=True), self.mean, self.std)
        # As in training, so that a kept feature is the one that training would have computed.
        with self.engine.autocast():
            return tower_features(self.model, values.to(self.tower.dtype))


def _missing(pixels: Tensor) -> Tensor:
    """Of a process without weights, which must find the file.

    Raises:
        InputError: Always.
    """
    raise InputError(
        "the features that the main process has kept are not here",
        where="cache_features",
        mend="put the run on a disk that all machines share, or set cache_features=false",
    )


def _weights(module: nn.Module) -> str:
    """Hash of all weights of a module."""
    found = hashlib.sha256()
    for name, tensor in module.state_dict().items():
        found.update(name.encode())
        # Bytes, because numpy has no bfloat16.
        found.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return found.hexdigest()
