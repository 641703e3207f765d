"""The ways in which several processes train, and the settings that choose one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

MODES: list[str | int] = ["ddp", 0, 1, 2, 3]


def deepspeed(mode: str | int, folder: Path, **more: Any) -> list[str]:
    """The override that chooses a mode; buckets of a few hundred numbers, so that there are many of them to lose one of."""
    if mode == "ddp":
        return []
    path = folder / "zero.json"
    zero = {"stage": mode, "overlap_comm": mode != 0, "reduce_bucket_size": 4000, "allgather_bucket_size": 4000, **more}
    if mode == 3:
        zero |= {"stage3_param_persistence_threshold": 100, "stage3_prefetch_bucket_size": 2000, "sub_group_size": 6000}
    path.write_text(json.dumps({"zero_optimization": zero}))
    return [f"train.deepspeed={path}"]
