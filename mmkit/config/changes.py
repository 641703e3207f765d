"""What changed between two recipes of one run directory, and what each change asks for."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import yaml

Kind = Literal["how", "scoring", "experiment"]
# How the work is spread over machines and where its files lie: other machines may want other values, and what comes out is
# the same. Batches, their order and the weights depend on none of them; answers only by the rounding of sums.
_HOW = (
    "run",
    "train.deepspeed",
    "train.micro_batch_size",
    "train.keep_checkpoints",
    "data.workers",
    "data.prefetch",
    "data.timeout",
    "data.cache",
    "data.cache_gib",
    "track.*",
    "tasks.*.generation.batch_size",
    "tasks.*.generation.cache",
    "tasks.*.generation.reuse",
)
# What is made from the answers of a model, which stay as they are: figures, and what stands beside them in a report.
_SCORING = ("system", "max_skipped", "tasks.*.settings*", "tasks.*.published*")


@dataclass(frozen=True)
class Change:
    """One key that two recipes say differently.

    Attributes:
        key: Dotted, list items by number.
        before: Its value; ``absent`` where the recipe does not have it.
        after: The same of the other recipe.
        kind: ``how`` the work is done, ``scoring`` of answers that stay, or the ``experiment`` itself.
    """

    key: str
    before: str
    after: str
    kind: Kind

    def __str__(self) -> str:
        return f"{self.key}: {self.before} -> {self.after}"


def changes(before: str, after: str) -> list[Change]:
    """Keys that two resolved recipes say differently, in the order of the schema.

    Args:
        before: YAML of :func:`mmkit.config.dump_recipe`, every default written out, so that a new default is a change too.
        after: The same.
    """
    old, new = dict(_leaves(yaml.safe_load(before))), dict(_leaves(yaml.safe_load(after)))
    # Where samples of one forward pass are compared or mixed with each other, their number is part of the experiment.
    tied = new.get("loss.kind") == "two_way" or any(new.get(key) for key in ("mixup", "cutmix"))
    how = tuple(key for key in _HOW if key != "train.micro_batch_size") if tied else _HOW
    # An evaluation's label is all that it has of its own; a training run's stands in the manifests of others.
    scoring = _SCORING if new.get("stage") == old.get("stage") == "eval" else ()
    return [
        Change(key, _show(old, key), _show(new, key), _kind(key, how, scoring))
        for key in {**new, **old}
        # Not by ==: 1, 1.0 and true are equal to Python, and none of them to a reader of recipes.
        if _show(old, key) != _show(new, key)
    ]


def _leaves(value: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """All values that are no sections, by dotted key."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    found = False
    for name, inner in items:
        found = True
        yield from _leaves(inner, f"{prefix}.{name}" if prefix else str(name))
    # An empty section is a value as well: one that was filled since is told as a change of it.
    if not found:
        yield prefix, value


def _show(values: dict[str, Any], key: str) -> str:
    """A value as it stands in a message."""
    return repr(values[key]) if key in values else "absent"


def _kind(key: str, how: tuple[str, ...], scoring: tuple[str, ...]) -> Kind:
    """What a change of a key asks for."""
    if any(fnmatch.fnmatchcase(key, pattern) for pattern in how):
        return "how"
    return "scoring" if any(fnmatch.fnmatchcase(key, pattern) for pattern in scoring) else "experiment"
