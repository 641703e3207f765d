"""Find the shipped recipes: in a checkout the stage folders themselves, in an installed wheel the package data."""

from __future__ import annotations

import difflib
import re
import shutil
from pathlib import Path

from mmkit.errors import InputError
from mmkit.eval.names import suite_names

_PACKAGE = Path(__file__).parent
# Recipes lie in the stage folders, where a newcomer looks, and not in the package; the wheel gets copies.
_CHECKOUT = {
    "encoders": _PACKAGE.parent / "encoders" / "recipes",
    "training": _PACKAGE.parent / "training" / "recipes",
    "eval": _PACKAGE.parent / "eval" / "recipes",
    "deepspeed": _PACKAGE.parent / "training" / "deepspeed",
}
_WHEEL = {name: _PACKAGE / "_recipes" / name for name in _CHECKOUT}


def recipe_folders() -> dict[str, Path]:
    """The folder of each kind of recipe (``encoders``, ``training``, ``eval``, ``deepspeed``)."""
    # The wheel's copy wins: in site-packages a foreign `encoders/recipes` could lie beside the package.
    return _WHEEL if _WHEEL["encoders"].is_dir() else _CHECKOUT


def list_recipes() -> dict[str, Path]:
    """Shipped recipes by name (``superclass-vit-b16``), in order of stage and name."""
    folders = recipe_folders()
    # One name space for all stages: a recipe is asked for by name alone.
    return {p.stem: p for kind in ("encoders", "training", "eval") for p in sorted(folders[kind].glob("*.yaml"))}


def list_tasks() -> dict[str, Path]:
    """Shipped tasks of evaluations by name (``vqav2-val``): one YAML each, for ``tasks:`` of a recipe or alone."""
    return {p.stem: p for p in sorted((recipe_folders()["eval"] / "tasks").glob("*.yaml"))}


def suites_of_tasks() -> dict[str, str]:
    """Shipped tasks by name, each with the suite that scores it: ``vqav2-val`` -> ``vqav2``."""
    # By its line: a task may be built on another one and have none of its own.
    found = {name: re.search(r"^task: *(\S+)", path.read_text(encoding="utf-8"), re.M) for name, path in list_tasks().items()}
    return {name: line[1] for name, line in found.items() if line}


def find_task(name: str, near: Path | None = None) -> Path:
    """A task by path or by shipped name.

    Args:
        name: As a recipe's ``tasks`` have it.
        near: Folder of that recipe: a path may be relative to it, or to where one is.

    Raises:
        InputError: No such file and no such name; names the nearest.
    """
    for path in (Path(name), *([near / name] if near else [])):
        if path.is_file():
            return path
    shipped = list_tasks()
    if name not in shipped:
        _refuse_suite(name)
        close = difflib.get_close_matches(Path(name).stem, shipped, 1)
        hint = f"did you mean {close[0]!r}? " if close else ""
        raise InputError(f"no task {name!r}", where="tasks", mend=f"{hint}known: {', '.join(shipped)}; or a path to a YAML file")
    return shipped[name]


def find_recipe(name: str) -> Path:
    """A recipe or a task by path or by shipped name.

    Raises:
        InputError: No such file and no such name; names the nearest.
    """
    path = Path(name)
    # A file first: the user's edited copy of a recipe must win over the shipped one of that name.
    if path.is_file():
        return path
    shipped = list_recipes() | list_tasks()
    if name in shipped:
        return shipped[name]
    _refuse_suite(name)
    # The stem, so that `name.yaml` without such a file also finds its neighbour.
    near = difflib.get_close_matches(path.stem, shipped, 1)
    hint = f"did you mean {near[0]!r}? " if near else ""
    raise InputError(f"no recipe {name!r}", mend=f"{hint}`mmkit ls` lists the shipped ones; a path to a YAML file works too")


def _refuse_suite(name: str) -> None:
    """Say what a suite's name is where a task's is wanted.

    Raises:
        InputError: It is one.
    """
    if name in suite_names():
        tasks = [task for task, suite in suites_of_tasks().items() if suite == name]
        what = f"{name!r} is a suite (rules, for `mmkit score`), not a task (data and a prompt)"
        mend = f"tasks of it: {', '.join(tasks)}" if tasks else "write a task of your own: docs/evaluation.md"
        raise InputError(what, mend=mend)


def find_deepspeed(name: str) -> Path:
    """A DeepSpeed JSON by path or by shipped name (``zero2``).

    Raises:
        InputError: Neither exists.
    """
    path = Path(name)
    shipped = recipe_folders()["deepspeed"] / f"{name}.json"
    for candidate in (path, shipped):
        if candidate.is_file():
            return candidate
    known = ", ".join(sorted(p.stem for p in shipped.parent.glob("*.json")))
    raise InputError(f"no DeepSpeed settings {name!r}", where="train.deepspeed", mend=f"use a JSON file or one of: {known}")


def describe(path: Path) -> str:
    """The first comment line of a recipe: what it is."""
    for line in path.read_text(encoding="utf-8").splitlines():
        if line.startswith("#") and line.strip("# "):
            return line.strip("# ")
    return ""


def copy_recipe(name: str, destination: Path) -> Path:
    """Copy a shipped recipe to a file or into a folder, to be edited.

    Raises:
        InputError: Unknown recipe, or the target exists.
    """
    source = find_recipe(name)
    target = destination / source.name if destination.is_dir() else destination
    # Never overwritten: it is most likely an edited copy.
    if target.exists():
        raise InputError("file exists", where=target, mend="choose another name or remove it")
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source, target)
    return target
