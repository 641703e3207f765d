"""A product from a checkpoint: of a run that is still going or was given up, in any mode, without its processes or a GPU."""

from __future__ import annotations

import logging
from pathlib import Path

from mmkit.config import EvalRecipe, ProbeRecipe, load_recipe
from mmkit.distributed.engine import Engine
from mmkit.distributed.pieces import Saved
from mmkit.errors import InputError
from mmkit.run import Run, one_process
from mmkit.training.checkpoint import faults, list_checkpoints
from mmkit.training.stages import build_stage

logger = logging.getLogger(__name__)


def export_checkpoint(run: str | Path, out: Path, *, checkpoint: str = "newest") -> Path:
    """Write the product that a run would have left behind had it ended at a checkpoint.

    The model is built again as the run's recipe says, so its parents and data must be where they were; what training changed
    comes from the checkpoint, put together from the pieces of as many processes as wrote it. The run itself is not touched.

    Args:
        run: Run directory of a training run.
        out: A folder that does not exist, or is empty.
        checkpoint: ``newest``, or the number of a step.

    Returns:
        The folder, which opens like the run's own ``model``.

    Raises:
        InputError: No such run or checkpoint, a damaged one, changed parents, or a folder in the way.
    """
    one_process("export")
    run, out = Path(run), Path(out)
    if not (run / "recipe.yaml").is_file():
        raise InputError("is no run", where=run, mend="give the directory of a training run")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InputError("is in the way", where=out, mend="name a folder that does not exist")
    found = _find(run, checkpoint)
    # Once more than training does for older ones: this copy may be all that is left of a run.
    if wrong := faults(found):
        raise InputError(f"is damaged ({wrong[0]})", where=found, mend="choose another with --checkpoint STEP")
    recipe = load_recipe(run / "recipe.yaml")
    if isinstance(recipe, ProbeRecipe | EvalRecipe):
        raise InputError(f"a run of stage {recipe.stage} has no checkpoints", where=run, mend="give a training run")
    # The stage builders want one. No step is made with it, so its precision and batch have no effect.
    engine = Engine(precision="fp32", deepspeed=None, batch_size=1, micro_batch_size=None, clip=None)
    try:
        stage = build_stage(recipe, engine)
        # Refuses parents that have changed: weights of training fit the frozen ones that they were trained with, no others.
        Run(run, write=False).state(recipe, stage.parents)
        Saved(found).fill(stage.objective)
        stage.save_product(out)
    finally:
        engine.close()
    logger.info("%s: written from %s", out, found.name)
    return out


def _find(run: Path, checkpoint: str) -> Path:
    """The checkpoint that is meant.

    Raises:
        InputError: It is not there; with those that are.
    """
    there = {int(path.name.removeprefix("step-")): path for path in list_checkpoints(run / "checkpoints")}
    if not there:
        raise InputError("has no checkpoint", where=run, mend="run its command until the first is written")
    if checkpoint == "newest":
        return there[max(there)]
    if not checkpoint.isdecimal() or int(checkpoint) not in there:
        steps = ", ".join(map(str, sorted(there)))
        raise InputError(f"has no checkpoint {checkpoint}", where=run, mend=f"use newest or one of {steps}")
    return there[int(checkpoint)]
