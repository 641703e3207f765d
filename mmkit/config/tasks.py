"""Tasks by name: an evaluation's ``tasks`` may name YAML files instead of spelling them out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from mmkit.errors import InputError
from mmkit.recipes import find_task

# What an evaluation needs beside its task and its model, where a task is run alone.
_ALONE = {"stage": "eval", "run": "${oc.env:RUNS,runs}/eval-"}


def expand_tasks(tree: Any, path: Path) -> Any:
    """Put in the tasks that a recipe names, and make a recipe of a task alone.

    An entry of ``tasks`` is a task's name or file, a mapping with ``from: NAME`` whose other keys win over that task's, or a
    whole task. A file with ``task`` and no ``stage`` is a task, and becomes an evaluation of it alone.

    Args:
        tree: OmegaConf tree of a recipe; interpolations stay as they are.
        path: Its file: paths to tasks may be relative to its folder.

    Returns:
        The tree without names.

    Raises:
        InputError: No such task (with the nearest one), a file that is none, or tasks that name each other.
    """
    from omegaconf import DictConfig, ListConfig, OmegaConf

    if not isinstance(tree, DictConfig):
        return tree
    if "stage" not in tree and ("task" in tree or "from" in tree):
        task = _whole(tree, path, [])
        name = task.get("name") or task.get("task")
        return OmegaConf.create({**_ALONE, "run": f"{_ALONE['run']}{name}", "tasks": [task]})
    if isinstance(tree.get("tasks"), ListConfig):
        # By its items' nodes, not by values: those would resolve ${oc.env:DATA} before the overrides are in.
        entries = [tree.tasks._get_node(i) for i in range(len(tree.tasks))]
        tree.tasks = OmegaConf.create([_whole(_entry(entry), path, []) for entry in entries])
    return tree


def _entry(node: Any) -> Any:
    """An entry of ``tasks`` as a mapping, or as it is where the schema will refuse it."""
    from omegaconf import DictConfig, OmegaConf

    if isinstance(node, DictConfig):
        return node
    value = OmegaConf.to_container(OmegaConf.create([node]))[0]  # type: ignore[index]
    return OmegaConf.create({"from": value}) if isinstance(value, str) else value


def _whole(entry: Any, path: Path, seen: list[Path]) -> Any:
    """An entry with the task below it put in."""
    from omegaconf import DictConfig, OmegaConf

    if not isinstance(entry, DictConfig) or "from" not in entry:
        return entry
    named = str(entry["from"])
    file = find_task(named, path.parent)
    if file.resolve() in seen:
        raise InputError(f"task {named!r} leads back to itself", where=path, mend="let `from` name another task")
    try:
        below = OmegaConf.load(file)
    except (yaml.YAMLError, OSError, UnicodeDecodeError) as error:
        what = f"cannot read the task ({' '.join(str(error).split())})"
        raise InputError(what, where=file, mend="fix the YAML") from None
    if not isinstance(below, DictConfig) or "stage" in below:
        raise InputError("not a task: a task is a mapping with `task` and without `stage`", where=file, mend="name a task")
    base = _whole(below, file, [*seen, file.resolve()])
    # By nodes here too.
    own = OmegaConf.create({key: entry._get_node(key) for key in entry if key != "from"})
    # Sections are merged key by key; a list replaces the one below it.
    return OmegaConf.merge(base, own)
