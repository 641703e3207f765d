"""DeepSpeed settings: the JSON beside the recipe, with the recipe's own numbers filled in."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from mmkit.errors import InputError


def deepspeed_settings(
    path: Path, *, micro_batch_size: int, accumulation: int, clip: float | None, precision: str, adds_up: bool | None = None
) -> dict[str, Any]:
    """A DeepSpeed JSON with batch size, accumulation, clipping and precision filled in from the recipe.

    Args:
        path: The file.
        micro_batch_size: Samples per process and forward pass.
        accumulation: Micro-batches of a step on each process.
        clip: Largest gradient norm.
        precision: ``fp32`` or ``bf16``.
        adds_up: Whether a step can have several micro-batches; None: by ``accumulation``.

    Raises:
        InputError: Not JSON, or the file sets a key that the recipe owns.
    """
    try:
        settings: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"is not JSON ({error})", where=path, mend="fix the DeepSpeed settings") from None
    # One place for each number: LLaVA's zero2.json leaves clipping unset and so switches it off (llava.md 1.2).
    ours = {
        "train_micro_batch_size_per_gpu": micro_batch_size,
        "gradient_accumulation_steps": accumulation,
        # 0 is DeepSpeed's word for none.
        "gradient_clipping": clip or 0.0,
        "bf16": {"enabled": precision == "bf16"},
    }
    # train_batch_size follows from the others, and a recipe has no fp16, whose loss scaling the loop would have to know.
    clash = sorted((ours.keys() | {"train_batch_size", "fp16"}) & settings.keys())
    if clash:
        raise InputError(f"sets {', '.join(clash)}", where=path, mend="remove it: these numbers are the recipe's")
    stage = settings.get("zero_optimization", {}).get("stage", 0)
    adds_up = accumulation > 1 if adds_up is None else adds_up
    if precision == "bf16" and stage > 0 and adds_up:
        # DeepSpeed's own default adds up micro-batches in bf16, where the sum of many loses the small ones. Costs 2 bytes a
        # parameter over the number of processes (stage 1: 4, not shared); the file may set it to bf16. Stage 0 has no choice.
        settings.setdefault("data_types", {"grad_accum_dtype": "fp32"})
    for part in ("offload_optimizer", "offload_param"):
        if settings.get("zero_optimization", {}).get(part, {}).get("device") == "nvme":
            # Swapped out, the fp32 weights are not where a checkpoint could take them from.
            raise InputError(f"{part} to nvme has no checkpoints", where=path, mend="use device cpu")
    return {
        **settings,
        **ours,
        "zero_allow_untested_optimizer": True,
        # With offloading DeepSpeed would insist on its own CPU Adam, which compiles at first use (performance.md 7).
        "zero_force_ds_cpu_optimizer": False,
        # In effect never: the loop has its own progress line and metrics.
        "steps_per_print": 10**9,
    }
