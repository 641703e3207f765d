"""What each stage command does, from a checked recipe to a finished run. The command line is a thin shell around this."""

from __future__ import annotations

import logging
import os
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmkit.config import EvalRecipe, FinetuneRecipe, ProbeRecipe, Recipe, TrainConfig
from mmkit.errors import InputError, StoppedError
from mmkit.files import read_json
from mmkit.recipes import find_deepspeed
from mmkit.run import Parent, Run, one_process, resolve_parent

if TYPE_CHECKING:
    from mmkit.distributed.engine import Engine
    from mmkit.training.objective import Stage
    from mmkit.training.step_log import LoopSettings
    from mmkit.training.track import Tracker

logger = logging.getLogger(__name__)


def run_train(recipe: Recipe, *, restart: bool = False) -> Run:
    """Train one stage; returns at once when the run is done.

    Raises:
        InputError: The recipe is no training recipe, or its parts do not fit.
        StoppedError: A signal came; a checkpoint is written.
    """
    if isinstance(recipe, ProbeRecipe | EvalRecipe):
        raise InputError(f"stage {recipe.stage} is no training stage", mend=f"use `mmkit {recipe.stage}`")
    # From the environment: no process group exists yet, and asking it would import torch.
    run = Run(Path(recipe.run), write=int(os.environ.get("RANK", "0")) == 0)
    config = recipe.train
    # Answered before anything heavy is imported: a finished stage of a pipeline returns in a blink.
    state = run.state(recipe, parents_of(recipe), restart=restart)
    if state == "done":
        return run
    return _train(recipe, run, config, restart=restart)


def run_finetune(recipe: FinetuneRecipe, *, restart: bool = False) -> Run:
    """Fine-tune an encoder and score it on the test set; returns at once when both are done.

    Raises:
        InputError: As training and the data raise it.
        StoppedError: A signal came; a checkpoint is written.
    """
    # Before hours of training: the score is the work of one process. On many, `mmkit train` trains and this command scores.
    one_process("probe", mend="train with `mmkit train` on many processes, then score with `mmkit probe` in one")
    run = run_train(recipe, restart=restart)
    if not (run.path / "scores.json").is_file():
        from mmkit.training.stages.finetune import score_finetuned

        score_finetuned(run, recipe)
    return run


def parents_of(recipe: Recipe) -> list[Parent]:
    """What a recipe is made from, in the order that the manifest lists it."""
    # In this order for good: a run that goes on compares its parents with the manifest's place by place.
    found = []
    encoder = getattr(recipe, "encoder", None)
    if isinstance(encoder, str):
        found.append(resolve_parent("encoder", encoder))
    elif getattr(encoder, "init", None):
        found.append(resolve_parent("encoder", encoder.init))  # type: ignore[union-attr]
    model = getattr(recipe, "model", None)
    if model:
        found.append(resolve_parent("model", model))
    llm = getattr(recipe, "llm", None)
    if llm is not None and llm.name:
        found.append(resolve_parent("llm", llm.name))
    projector = getattr(recipe, "projector_from", None)
    if projector:
        found.append(resolve_parent("projector", projector))
    return found


def _train(recipe: Any, run: Run, config: TrainConfig, *, restart: bool) -> Run:
    """The part of :func:`run_train` that needs torch."""
    from mmkit.data.loader import explain_worker
    from mmkit.distributed.engine import Engine
    from mmkit.training.track import check_tracker

    # Before data and weights are read: a missing package should show at once.
    check_tracker(recipe.track)
    engine = Engine(
        precision=config.precision,
        deepspeed=find_deepspeed(config.deepspeed) if config.deepspeed else None,
        batch_size=config.batch_size,
        micro_batch_size=config.micro_batch_size,
        clip=config.clip_grad_norm,
        max_tokens=recipe.batching.max_tokens if hasattr(recipe, "batching") else None,
    )
    try:
        # Before anything is read or written: of two starts of one run the second must not disturb the first.
        engine.on_main(run.lock)
        _train_on(engine, recipe, run, config, restart=restart)
    # A RuntimeError too, but what the user asked for, and no lost process.
    except StoppedError:
        raise
    except RuntimeError as error:
        # Each library reports a lost process in its own words, from wherever it was.
        explained = explain_worker(error) or engine.explain(error)
        if explained is error:
            raise
        raise explained from None
    finally:
        run.unlock()
    return run


def _train_on(engine: Engine, recipe: Any, run: Run, config: TrainConfig, *, restart: bool) -> None:
    """Train a stage on the processes of an engine, and save its product."""
    import torch

    from mmkit.distributed.preemption import Preemption
    from mmkit.training.loop import train
    from mmkit.training.stages import build_stage

    # For the parts that take no seed of their own.
    torch.manual_seed(recipe.seed)
    stage = build_stage(recipe, engine)
    _agree(engine, stage)
    # Every rank asks before any rank writes; the answer is the same for all.
    state = run.state(recipe, stage.parents, restart=restart)
    engine.barrier()
    run.start(
        recipe,
        stage.parents,
        state=state,
        data_fingerprint=stage.data_fingerprint,
        kind="train",
        readings=stage.readings,
    )
    engine.barrier()
    settings = _settings(stage, engine, recipe, run, config)
    # Held to the very end: a signal while the product is being saved must not leave half of it.
    with Preemption() as preemption:
        try:
            train(stage, engine, run, config, settings, _tracker(recipe, run) if engine.is_main else None, preemption)
        except StoppedError:
            run.finish("stopped")
            engine.close()
            raise
        # Every process enters, since gathering is a collective; one writes.
        with engine.whole_on_main():
            engine.on_main(lambda: stage.save_product(run.model))
        # Between two barriers: not before the product is there, and no process goes on before the run counts as done.
        run.finish("done")
        engine.barrier()
        engine.close()


def _agree(engine: Engine, stage: Stage) -> None:
    """Refuse to train where the processes see different data: their positions would mean different samples, without a word.

    Raises:
        InputError: They do, as where one machine cannot read a shard.
    """
    # Lengths decide how many forward passes a step has: where they differ, processes would wait for each other for ever.
    lengths = 0 if stage.lengths is None else zlib.crc32(stage.lengths.tokens.tobytes())
    if len(seen := set(engine.gather([(stage.data_fingerprint, len(stage.samples), lengths)]))) > 1:
        sizes = " and ".join(map(str, sorted(size for _, size, _ in seen)))
        what = f"the processes see different data ({sizes} usable samples)"
        raise InputError(what, where="data.train", mend="look for files that some machine has not, or cannot read")


def _settings(stage: Stage, engine: Engine, recipe: Any, run: Run, config: TrainConfig) -> LoopSettings:
    """What the loop needs besides the train section; the manifest gets its facts about data and model on the way."""
    from mmkit.data.skipped import count_samples
    from mmkit.training.loop import total_steps
    from mmkit.training.step_log import LoopSettings, check_skipped

    run.skip(stage.left_out)
    # Labelled sets have no limit of their own: elsewhere nothing of them may be missing.
    max_skipped = recipe.max_skipped if isinstance(recipe, FinetuneRecipe) else recipe.data.max_skipped
    check_skipped(count_samples(stage.left_out), stage.counted_from, max_skipped, where=run.path / "skipped.jsonl")
    run.note(
        world_size=engine.world_size,
        steps=total_steps(config, len(stage.samples)),
        samples_in_data=len(stage.samples),
        parameters=sum(p.numel() for p in stage.objective.parameters()),
        trainable_parameters=sum(p.numel() for p in stage.objective.parameters() if p.requires_grad),
    )
    return LoopSettings(
        seed=recipe.seed,
        workers=recipe.data.workers,
        max_skipped=max_skipped,
        title="/".join(run.path.parts[-2:]),
        prefetch=recipe.data.prefetch,
        timeout=recipe.data.timeout,
    )


def _tracker(recipe: Any, run: Run) -> Callable[[int], Tracker]:
    """Opens the run's tracker when it is known from which step the run goes on."""
    from mmkit.training.track import make_tracker

    plain = recipe.model_dump(mode="json")
    return lambda start: make_tracker(recipe.track, run.path, start=lambda: start, settings=plain)


def score_lines(path: Path) -> list[str]:
    """The scores of an evaluation, a line for each metric; of a test set without answers the file that its server takes.

    Args:
        path: ``scores.json``; an absent one has no lines.
    """
    if not path.is_file():
        return []
    tasks = read_json(path)["tasks"]
    width = max(16, *map(len, tasks))
    lines = []
    for name, found in tasks.items():
        for metric, value in found["metrics"].items():
            # A metric that no resample could give has no interval.
            low, high = found["ci95"].get(metric, (None, None))
            interval = f"  [{low:.4f}, {high:.4f}]" if low is not None else ""
            lines.append(f"{name:{width}} {metric:16} {value:.4f}{interval}")
        if not found["metrics"]:
            file = found.get("submission")
            lines.append(f"{name:{width}} no score, the answers are the server's{f': {path.parent / file}' if file else ''}")
    return lines


def predict_files(model: str, images: Sequence[Path], prompt: str | None, how: dict[str, Any]) -> list[str]:
    """What a model says of picture files.

    Args:
        model: A run, a model folder, or an encoder's name.
        images: Picture files.
        prompt: Question to an MLLM, the same for all; None: none.
        how: Keys of `DecodingConfig`; None is the model's own.

    Raises:
        InputError: A file is no picture, or the model cannot be opened or asked so.
    """
    from mmkit.data.images import ImageRef, decode_image
    from mmkit.data.skipped import SampleError
    from mmkit.models.inference import load_model

    # All pictures before the model, which can take minutes to load: a wrong path is told at once.
    pictures = []
    for path in images:
        try:
            pictures.append(decode_image(ImageRef(str(path)).read()))
        except SampleError as error:
            raise InputError(str(error), where=path, mend="give a picture file") from None
    prompts = None if prompt is None else [prompt] * len(pictures)
    texts: list[str] = load_model(model).predict(pictures, prompts, **how)
    return texts
