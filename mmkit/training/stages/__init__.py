"""The stages: what each one trains, on what, and what it leaves behind."""

from __future__ import annotations

import importlib
from typing import Any

from mmkit.distributed.engine import Engine
from mmkit.training.objective import Stage

# stage -> module and builder; imported when asked for, so that pretraining does not pay for importing language models.
BUILDERS = {
    "superclass": ("mmkit.training.stages.superclass", "build_superclass"),
    "clip": ("mmkit.training.stages.contrastive", "build_clip"),
    "lit": ("mmkit.training.stages.contrastive", "build_lit"),
    "finetune": ("mmkit.training.stages.finetune", "build_finetune"),
    "clipcap": ("mmkit.training.stages.clipcap", "build_clipcap"),
    "llava": ("mmkit.training.stages.llava", "build_llava_stage"),
}


def build_stage(recipe: Any, engine: Engine) -> Stage:
    """The stage that a training recipe describes.

    Raises:
        InputError: Data or parts do not fit the recipe.
    """
    module, name = BUILDERS[recipe.stage]
    stage: Stage = getattr(importlib.import_module(module), name)(recipe, engine)
    return stage
