"""Reading recipes: YAML plus ``dotted.key=value`` overrides, and errors that name the nearest known key.

OmegaConf merges and interpolates (``${oc.env:DATA,./data}``), pydantic checks.
"""

from __future__ import annotations

import difflib
import types
import typing
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import BaseModel, Field, TypeAdapter, ValidationError

from mmkit.config.recipes import STAGES, Recipe
from mmkit.config.tasks import expand_tasks
from mmkit.errors import InputError

# pydantic's types of fault, in words of the file.
_IN_YAML = {
    "tuple_type": "should be a list",
    "too_short": "should not be empty",
    "model_type": "should be a section with keys",
    "dict_type": "should be a section with keys",
}
# A union told apart by its stage: faults are those of that stage's schema, not of all eight.
_ADAPTER: TypeAdapter[Recipe] = TypeAdapter(Annotated[Recipe, Field(discriminator="stage")])


def load_recipe(path: Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe, apply ``dotted.key=value`` overrides and check it.

    Args:
        path: YAML file.
        overrides: ``key=value`` strings; values are YAML (``train.betas=[0.9,0.98]``), list items go by number
            (``tasks.0.limit=5``).

    Returns:
        The checked recipe.

    Raises:
        InputError: Unreadable YAML, unknown key (with the nearest known one), or a value that does not fit.
    """
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    try:
        tree = OmegaConf.load(path)
    except (yaml.YAMLError, OSError, UnicodeDecodeError) as error:
        raise InputError(f"cannot read the recipe ({_one_line(error)})", where=path, mend="fix the YAML") from None
    try:
        # Before the overrides: `tasks.0.limit=5` reaches into a task that the recipe names alone.
        tree = expand_tasks(tree, path)
        for item in overrides:
            key = _override(tree, item, path)
            # `tasks=[vqav2-val]` brings names in, which the next override may reach into.
            if key.partition(".")[0] == "tasks":
                tree = expand_tasks(tree, path)
        # Resolved after the overrides, so that a reference to an overridden key sees its new value.
        plain = OmegaConf.to_container(tree, resolve=True)
    except OmegaConfBaseException as error:
        what = f"{error.full_key}: {_first_line(error)}" if error.full_key else _one_line(error)
        raise InputError(what, where=path, mend="check the ${...} there, or override the key") from None
    if not isinstance(plain, dict):
        raise InputError("a recipe is a mapping of keys", where=path, mend="start from `mmkit copy NAME DEST`")
    return check_recipe(typing.cast(dict[str, Any], plain), where=path, overrides=overrides)


def _override(tree: Any, item: str, path: Path) -> str:
    """Set one ``dotted.key=value`` in the tree of a file; returns the key.

    Raises:
        InputError: It has no key, or counts past the end of a list.
    """
    from omegaconf import ListConfig, OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    key, equals, value = item.partition("=")
    if not equals or not key:
        raise InputError(f"override {item!r} is not of the form key=value", mend="write e.g. train.lr=1e-3")
    parts = key.split(".")
    for depth, part in enumerate(parts):
        above = ".".join(parts[:depth])
        section = OmegaConf.select(tree, above, throw_on_missing=False) if above else tree
        if isinstance(section, ListConfig) and not (part.isdigit() and int(part) < len(section)):
            what = f"override {item!r}: {above} is a list of {len(section)}, and {part!r} is none of its numbers"
            last = len(section) - 1
            mend = f"count from 0 to {last}" if last > 0 else "its only one is 0" if last == 0 else f"give {above} first"
            raise InputError(what, where=path, mend=mend)
    try:
        # force_add: a key that the file leaves at its default may be given too; unknown ones are refused by pydantic later.
        OmegaConf.update(tree, key, _parse_value(value), force_add=True)
    # OmegaConf reports a malformed key (such as `[`) with plain Python errors.
    except (OmegaConfBaseException, yaml.YAMLError, TypeError, IndexError, ValueError) as error:
        raise InputError(f"override {item!r}: {_first_line(error)}", where=path, mend="write e.g. train.lr=1e-3") from None
    return key


def check_recipe(plain: dict[str, Any], *, where: object, overrides: Sequence[str] = ()) -> Recipe:
    """Check a plain mapping against the schema of its ``stage``.

    Args:
        plain: The recipe.
        where: Its file, for messages.
        overrides: Those in it: a fault of theirs is not one of the file.

    Raises:
        InputError: One line for all faults; unknown keys come with the nearest and all known keys.
    """
    # By hand: pydantic's words for a wrong discriminator do not name the nearest one.
    stage = plain.get("stage")
    if not isinstance(stage, str) or stage not in STAGES:
        near = difflib.get_close_matches(str(stage), STAGES, 1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise InputError(f"stage {stage!r} is unknown", where=where, mend=f"{hint}known: {', '.join(STAGES)}")
    try:
        return _ADAPTER.validate_python(plain)
    except ValidationError as error:
        found = error.errors()
        # A list whose items are faulty counts as empty too: a fault that nobody made, and the list would be printed whole.
        within = {e["loc"][:depth] for e in found for depth in range(1, len(e["loc"]))}
        keys = [item.partition("=")[0] for item in overrides]
        faults = [_describe(dict(e), STAGES[stage], keys) for e in found if e["type"] != "too_short" or e["loc"] not in within]
        # All at once: mending a recipe fault by fault costs a start each.
        raise InputError("; ".join(faults), where=where, mend="see the recipe's head or `mmkit copy` a shipped one") from None


def dump_recipe(recipe: Recipe) -> str:
    """The resolved recipe as YAML, in schema order; loading it again gives an equal recipe."""
    from omegaconf import OmegaConf

    # OmegaConf's dumper quotes what its reader would take for a number: YAML 1.1 writes the name 1e5 bare.
    return OmegaConf.to_yaml(OmegaConf.create(recipe.model_dump(mode="json")))


def _parse_value(text: str) -> Any:
    """The value of an override, by the same YAML rules as the recipe's own (1e-3 is a number, a date is text)."""
    from omegaconf import OmegaConf

    # Not resolved: an override may refer to keys of a recipe that is not at hand here.
    tree = OmegaConf.to_container(OmegaConf.from_dotlist([f"value={text}"]), resolve=False)
    # Nothing behind the sign empties the key: `train.steps=` makes room for train.epochs.
    return typing.cast(dict[str, Any], tree)["value"] if text else None


def _describe(error: dict[str, Any], schema: type[BaseModel], overrides: Sequence[str]) -> str:
    """One pydantic error in words; one of an override says that the file is not at fault."""
    location = list(error["loc"][1:])  # the first part is the stage, which chose the schema
    key = ".".join(map(str, location))
    # The override may name the section of the fault (`data={}`) or lead into it.
    given = key and any(f"{key}.".startswith(f"{item}.") or f"{item}.".startswith(f"{key}.") for item in overrides)
    return ("override: " if given else "") + _fault(error, location, schema)


def _fault(error: dict[str, Any], location: list[Any], schema: type[BaseModel]) -> str:
    """What is wrong at a place of a recipe."""
    key = ".".join(map(str, location)) or "recipe"
    if error["type"] == "extra_forbidden":
        known = sorted(_keys(schema))
        # Keys of the same section, since that is where the slip happened; the whole schema would fill the screen.
        siblings = [k for k in known if k.rpartition(".")[0] == _plain(location[:-1])]
        name = str(location[-1])
        near = difflib.get_close_matches(name, [k.rpartition(".")[2] for k in siblings], 1, 0.5)
        parent = ".".join(map(str, location[:-1]))
        if near:
            hint = f"did you mean {f'{parent}.' if parent else ''}{near[0]}? "
        else:  # the right name in the wrong section is the other common slip
            elsewhere = [k for k in known if k.rpartition(".")[2] == name] or difflib.get_close_matches(key, known, 1)
            # The one list of sections that recipes have.
            hint = f"did you mean {elsewhere[0].replace('tasks.', 'tasks.0.')}? " if elsewhere else ""
        return f"unknown key {key!r}; {hint}known keys here: {', '.join(k.rpartition('.')[2] for k in siblings)}"
    if error["type"] == "missing":
        return f"key {key!r} is missing"
    # pydantic's own words in front of a validator's message; its words for types are Python's, not YAML's.
    what = _IN_YAML.get(error["type"]) or error["msg"].removeprefix("Value error, ")
    if error["type"] == "string_type" and isinstance(error.get("input"), dict | list):
        # `prompt={question}` of a command line, most of the time.
        what = f"should be a text, and YAML reads braces and brackets as sections and lists: quote it, '{key}=\"...\"'"
    if isinstance(error.get("input"), dict):  # a rule between keys: the whole section would drown the message
        return f"{key}: {what}" if location else what
    return f"{key}={error.get('input')!r}: {what}"


def _plain(location: Sequence[Any]) -> str:
    """A location without list positions."""
    return ".".join(str(p) for p in location if not isinstance(p, int))


def _keys(schema: type[BaseModel], prefix: str = "") -> Iterator[str]:
    """All dotted keys of a schema, list items without their number."""
    for name, field in schema.model_fields.items():
        yield prefix + name
        for inner in _models_in(field.annotation):
            yield from _keys(inner, f"{prefix}{name}.")


def _models_in(annotation: Any) -> Iterator[type[BaseModel]]:
    """The sections that an annotation may hold (through unions and tuples)."""
    # On Python 3.10 tuple[float, float] passes for a type, and issubclass stops at it.
    if isinstance(annotation, type) and not isinstance(annotation, types.GenericAlias) and issubclass(annotation, BaseModel):
        yield annotation
    for argument in typing.get_args(annotation):
        yield from _models_in(argument)


def _one_line(error: object) -> str:
    """An error's text on one line."""
    return " ".join(str(error).split())


def _first_line(error: object) -> str:
    """An error's first line: the others of OmegaConf's errors name its own classes."""
    return str(error).partition("\n")[0]
