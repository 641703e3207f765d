"""Check what a recipe names before GPUs are spent: architecture, labels, DeepSpeed settings, generation prompts."""

from __future__ import annotations

from mmkit.config import ContrastiveRecipe, EvalRecipe, PretrainRecipe, Recipe, SuperclassRecipe, TrackConfig, TrainConfig
from mmkit.recipes import find_deepspeed


def check_parts(recipe: Recipe) -> None:
    """Check the parts that need neither data nor weights.

    Raises:
        InputError: An architecture that timm does not know or that refuses its arguments, DeepSpeed settings that are missing
            or clash with the recipe, a tracker that is not installed, an IDF table of another vocabulary, a prompt without its
            question, a scorer's setting that it does not have.
    """
    config = getattr(recipe, "train", None)
    if isinstance(config, TrainConfig) and config.deepspeed:
        # Imported where it is needed, here and below, so that a recipe without such a part is checked in no time.
        from mmkit.distributed.settings import deepspeed_settings

        path = find_deepspeed(config.deepspeed)
        # As for one process: how many there will be is not known here.
        micro = config.micro_batch_size or config.batch_size
        deepspeed_settings(
            path,
            micro_batch_size=micro,
            accumulation=config.batch_size // micro,
            clip=config.clip_grad_norm,
            precision=config.precision,
        )
    track = getattr(recipe, "track", None)
    if isinstance(track, TrackConfig):
        from mmkit.training.track import check_tracker

        check_tracker(track)
    if isinstance(recipe, PretrainRecipe):
        _check_encoder(recipe)
    if isinstance(recipe, SuperclassRecipe):
        _check_labels(recipe)
    if isinstance(recipe, EvalRecipe):
        from mmkit.eval.score import check_task_settings

        for i, task in enumerate(recipe.tasks):
            check_task_settings(task, where=f"tasks.{i}.")


def _check_encoder(recipe: PretrainRecipe) -> None:
    """Build the encoder on the meta device: shapes without memory."""
    import torch

    from mmkit.training.stages.towers import bare_encoder

    with torch.device("meta"):
        built = bare_encoder(recipe.encoder)
    if isinstance(recipe, ContrastiveRecipe):
        from mmkit.encoders.text import text_settings

        text_settings(built.width, **recipe.text.model_dump())


def _check_labels(recipe: SuperclassRecipe) -> None:
    """Open vocabulary and IDF table where they are files that exist by now; a world that is yet to be made has none."""
    from pathlib import Path

    from mmkit.encoders.labels import CaptionLabels

    data = recipe.data
    # A name of the hub is left alone too: a check must work without network.
    if data.labels != "clip" and not Path(data.labels).exists():
        return
    # To open them is the check: both say what is wrong with their files.
    labels = CaptionLabels(data.labels, context_length=data.context_length, stop_words=data.stop_words)
    if data.idf_file is not None and Path(data.idf_file).exists():
        from mmkit.encoders.idf import load_table

        load_table(data.idf_file, **labels.for_table())
