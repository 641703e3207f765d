"""Reader of LLaVA conversation files (facts/llava.md 1.3), strict: every odd item is left out by name and reason.

A file is a JSON list or JSON lines of ``{"id", "image"?, "conversations": [{"from": "human"|"gpt", "value"}, ...]}``; ``image``
is a name or a list of names, one for each ``<image>`` in the questions; a first message may be ``"from": "system"``. The reader
checks form and that the pictures' files exist; pictures are decoded later, by the loader.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from mmkit.data.items import OddItem, PackedConversations, Turns, arrange, check_pictures, clean_text
from mmkit.data.messages import Spelling, parse_item
from mmkit.data.skipped import LeftOut
from mmkit.errors import InputError


def _read_text(path: Path) -> str:
    """The file's text without a byte order mark."""
    try:
        return path.read_bytes().decode("utf-8-sig")
    except FileNotFoundError as error:
        raise InputError("no such file", where=path, mend="check the path") from error
    except IsADirectoryError as error:
        raise InputError("is a folder, not a file", where=path, mend="give the JSON file in it") from error
    except UnicodeDecodeError as error:
        raise InputError(f"invalid UTF-8 at byte {error.start}", where=path, mend="save it as UTF-8") from error


def _broken_json(path: Path, text: str, error: json.JSONDecodeError, *, line: int = 0) -> InputError:
    """The error for JSON that does not parse; says "looks cut off" when the fault is where the text ends."""
    # A string that is cut off is reported where it starts, not where the text ends.
    at_end = error.pos >= len(text.rstrip()) or error.msg.startswith("Unterminated string")
    what = "the file looks cut off" if at_end else f"not valid JSON ({error.msg})"
    mend = "fetch or write the file again" if at_end else "mend this place"
    return InputError(what, where=f"{path}:{line or error.lineno}:{error.colno}", mend=mend)


def _read_lines(path: Path, text: str) -> Iterator[tuple[str, Any]]:
    """(place, item) of each JSON line; lines end at newlines only, and a bad one becomes an `OddItem`."""
    # In place and one at a time: a list of all lines would be the file in memory once more.
    start, number = 0, 0
    while start <= len(text):
        end = text.find("\n", start)
        last = end < 0
        line, number, start = text[start : None if last else end], number + 1, len(text) + 1 if last else end + 1
        # Blank lines, the one after the last newline among them, are no items.
        if not line.strip():
            continue
        try:
            yield f"line {number}", json.loads(line)
        except json.JSONDecodeError as error:
            # Only the last line can be cut off; earlier ones are single faults.
            if last:
                raise _broken_json(path, line, error, line=number) from error
            # Handed on as an exception that is raised later, so that the list of what was left out stays in file order.
            yield f"line {number}", OddItem(f"{path.name}:{number}: not valid JSON ({error.msg})")


_SPACE = re.compile(r"[ \t\n\r]*")


def _read_list(path: Path, text: str) -> Iterator[tuple[str, Any]]:
    """(place, item) of each item of a JSON list, parsed one by one: the parsed whole would be several times the file."""
    decode = json.JSONDecoder().raw_decode

    def skip(at: int) -> int:
        found = _SPACE.match(text, at)
        assert found is not None
        return found.end()

    try:
        at, number = skip(skip(0) + 1), 0
        while text[at : at + 1] != "]" or number:
            item, at = decode(text, at)
            yield f"item {number}", item
            at, number = skip(at), number + 1
            if text[at : at + 1] == "]":
                break
            if text[at : at + 1] != ",":
                raise json.JSONDecodeError("Expecting ',' delimiter", text, at)
            at = skip(at + 1)
        if skip(at + 1) != len(text):
            raise json.JSONDecodeError("Extra data", text, skip(at + 1))
    except json.JSONDecodeError as error:
        raise _broken_json(path, text, error) from error


def _read_rows(path: Path) -> Iterator[tuple[str, Any]]:
    """(place, item) of each item of the file, JSON list or JSON lines."""
    text = _read_text(path)
    if not text.strip():
        raise InputError("the file is empty", where=path, mend="expected a JSON list of conversations")
    # A list begins with a bracket, a line with a brace; so the published .json files and lines under any name are both read.
    lines = path.suffix == ".jsonl" or not text.lstrip().startswith("[")
    return (_read_lines if lines else _read_list)(path, text)


def check_name(name: Any, image_root: Path) -> str:
    """The name of a picture's file; nothing outside ``image_root`` is ever named.

    Raises:
        OddItem: It is no name of a file below the root, or there is no such file.
    """
    if not isinstance(name, str) or not name.strip():
        raise OddItem("`image` is no file name")
    # Both kinds on every system: a file made on one is read on the other.
    if PurePosixPath(name).is_absolute() or PureWindowsPath(name).is_absolute():
        raise OddItem(f"image path {name!r} is absolute; paths are relative to the image root")
    if ".." in PurePosixPath(name.replace("\\", "/")).parts:
        raise OddItem(f"image path {name!r} climbs out of the image root")
    try:
        found = (image_root / name).is_file()
    # A name too long for the file system, for one.
    except (OSError, ValueError) as error:
        raise OddItem(f"image path {name!r} cannot be looked up") from error
    # Looked for now and decoded later: a wrong image root shows before any training, at the cost of one stat an item.
    if not found:
        raise OddItem(f"no such picture: {name}")
    return name


def _item(item: Any, image_root: Path, spelling: Spelling) -> tuple[list[str], Turns, str | None]:
    """Pictures, turns and system text of one checked item.

    Raises:
        OddItem: With the reason to leave it out.
    """
    if isinstance(item, OddItem):
        raise item
    if not isinstance(item, dict):
        raise OddItem("not a JSON object")
    messages, pictures = parse_item(item, spelling)
    turns, system = arrange(messages)
    check_pictures(turns, len(pictures))
    return [check_name(name, image_root) for name in pictures], turns, system


def _key(item: Any, place: str) -> str:
    """What to call an item: its id, else its place in the file."""
    found = item.get("id") if isinstance(item, dict) else None
    # Other types (a list, a float) do not make a name that a user could search for in the file.
    return clean_text(str(found)) if isinstance(found, (str, int)) and str(found) else place


def read_llava(
    path: str | Path, *, image_root: str | Path, unique_ids: bool = True, spelling: Spelling = "llava"
) -> tuple[PackedConversations, list[LeftOut]]:
    """Read a LLaVA conversation file, or one of the same form with ``messages``.

    Args:
        path: JSON list or JSON lines.
        image_root: Folder the image paths are relative to.
        unique_ids: Leave out the later items of an id used before. False keeps them under ``ID#2``, ``ID#3``: the
            published instruction files name an item after its picture, so their ids repeat by design.
        spelling: How items write their messages.

    Returns:
        The sound items in file order, and what was left out with reasons, in file order.

    Raises:
        InputError: The file is missing, empty, not UTF-8, not JSON or cut off (with line and column).
    """
    path, root = Path(path), Path(image_root)
    left_out: list[LeftOut] = []

    def sound() -> Iterator[tuple[str, list[str], Turns, str | None]]:
        uses: dict[str, int] = {}
        for place, item in _read_rows(path):
            key = _key(item, place)
            # Counted before the checks: the second item of an id is a repeat even when the first was left out.
            uses[key] = uses.get(key, 0) + 1
            # The list of what was left out tells items apart by it too.
            name = key if uses[key] == 1 or unique_ids else f"{key}#{uses[key]}"
            try:
                if uses[key] > 1 and unique_ids:
                    raise OddItem(f"{place}: the id was used before")
                yield (name, *_item(item, root, spelling))
            except OddItem as odd:
                left_out.append(LeftOut(str(path), name, str(odd)))

    return PackedConversations.pack(sound(), root), left_out
