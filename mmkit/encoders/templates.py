"""Prompts and class names for zero-shot classification."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from mmkit.data.labelled import is_number
from mmkit.errors import InputError
from mmkit.files import read_json

PLAIN = ("a photo of a {}.",)


def open_templates(name: str) -> tuple[str, ...]:
    """Prompt templates, each with ``{}`` for the class.

    Args:
        name: ``openai`` (the 80 for ImageNet, arXiv 2103.00020 section 3.1.4, as open_clip has them), ``plain``, or a file
            with a template a line.

    Raises:
        InputError: No such file, or a line without ``{}``.
    """
    if name == "openai":
        from open_clip.zero_shot_metadata import OPENAI_IMAGENET_TEMPLATES

        # Functions of the class name there; given "{}", each returns its template.
        return tuple(template("{}") for template in OPENAI_IMAGENET_TEMPLATES)
    if name == "plain":
        return PLAIN
    lines = _lines(name, "use openai, plain, or a file with a template a line")
    for number, line in lines:
        if "{}" not in line:
            raise InputError("no {} for the class", where=f"{name}:{number}", mend="write templates like 'a photo of a {}.'")
    return tuple(line for _, line in lines)


def fill(templates: Sequence[str], name: str) -> list[str]:
    """The prompts of a class."""
    # Not str.format: other braces in a template or a name are text.
    return [template.replace("{}", name) for template in templates]


def class_names(classes: Sequence[str], names: str | None) -> list[str]:
    """What each class is called in a prompt.

    Args:
        classes: Classes as the data have them: folder names, numbers, or names.
        names: ``imagenet`` (the 1,000 names of open_clip, in the order of the sorted WordNet ids); a JSON object from class to
            name; a JSON list or a file with a name a line, by the number of the class where classes are numbers, else one for
            each of the sorted classes; None: the classes themselves, with spaces for underscores.

    Returns:
        As many names.

    Raises:
        InputError: The file does not fit the classes.
    """
    if names is None:
        # Folder names often have underscores where a prompt has spaces.
        return [name.replace("_", " ") for name in classes]
    if names == "imagenet":
        from open_clip.zero_shot_metadata import IMAGENET_CLASSNAMES

        return _by_place(classes, list(IMAGENET_CLASSNAMES), names)
    content = read_json(Path(names)) if names.endswith(".json") else [line for _, line in _lines(names, _MEND)]
    values = list(content.values()) if isinstance(content, dict) else content
    if not isinstance(values, list) or not values or not all(isinstance(value, str) and value.strip() for value in values):
        raise InputError("no class names", where=names, mend=_MEND)
    if not isinstance(content, dict):
        return _by_place(classes, content, names)
    if missing := [name for name in classes if name not in content]:
        raise InputError(f"no name for class {', '.join(missing[:5])}", where=names, mend=_MEND)
    return [content[name] for name in classes]


_MEND = "give data.classes a JSON list, a JSON object from class to name, or a file with a name a line"


def _by_place(classes: Sequence[str], content: list[str], file: str) -> list[str]:
    """Names by number, by being the classes themselves, or one for each class in order."""
    # By number, so a subset of ImageNet's classes still finds its names; the file may hold more than the data use.
    if all(map(is_number, classes)):
        if beyond := [name for name in classes if int(name) >= len(content)]:
            what = f"{len(content)} names (numbers 0 to {len(content) - 1}), but there is a class {beyond[0]}"
            raise InputError(what, where=file, mend=_MEND)
        return [content[int(name)] for name in classes]
    # The classes are among the names: pairing by order would call some of them by another's name.
    if set(classes) <= set(content):
        return list(classes)
    if len(content) != len(classes):
        raise InputError(f"{len(content)} names for {len(classes)} classes", where=file, mend=_MEND)
    # Sorted, whatever order the data have: ImageNet's names come by sorted WordNet id.
    place = {name: i for i, name in enumerate(sorted(classes))}
    return [content[place[name]] for name in classes]


def _lines(file: str, mend: str) -> list[tuple[int, str]]:
    """Lines of a text file with something on them, and their numbers."""
    if not Path(file).is_file():
        raise InputError("no such file", where=file, mend=mend)
    try:
        # Editors on Windows put a byte order mark in front, which would become part of the first name.
        text = Path(file).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"not UTF-8 at byte {error.start}", where=file, mend=mend) from None
    # Not splitlines: it takes a form feed or U+2028 for a line end, and numbers would not be those of an editor.
    found = [(number, line.strip()) for number, line in enumerate(text.split("\n"), start=1) if line.strip()]
    if not found:
        raise InputError("the file is empty", where=file, mend=mend)
    return found
