"""How many samples a recipe's training data has, where steps depend on it."""

from __future__ import annotations

from pathlib import Path

from mmkit.config import FinetuneRecipe, LlavaRecipe, TrainRecipe
from mmkit.errors import InputError


def count(recipe: TrainRecipe) -> int:
    """Samples in one epoch, from the data's index.

    Raises:
        InputError: The data are not on this machine.
    """
    if isinstance(recipe, FinetuneRecipe):
        assert recipe.data.train is not None  # the recipe's schema sees to it
        _expect(recipe.data.train)
        from mmkit.data.labelled import open_labelled

        return len(open_labelled(recipe.data.train, recipe.data))
    for source in recipe.data.sources:
        _expect(source.path)
    if isinstance(recipe, LlavaRecipe):
        from mmkit.data.message_rows import open_conversations

        # As the data have them: whether their pictures can be read shows only in training.
        return sum(len(open_conversations(s.path, s.type, image_root=s.image_root)[0]) for s in recipe.data.sources)
    from mmkit.data.sources import open_training_pairs

    return len(open_training_pairs(recipe.data))


def _expect(place: str) -> None:
    """Refuse a plain path that is not there; addresses, globs and lists of shards are the readers' business."""
    if not any(mark in place for mark in ":*{") and not Path(place).exists():
        raise InputError(
            "the number of steps depends on the data, which are not here",
            where=f"data.train {place}",
            mend="give --samples N, or train.steps",
        )
