"""Reader of LLaVA conversation files (facts/llava.md 1.3), strict: every odd item is left out by name and reason.

A file is a JSON list or JSON lines of ``{"id", "image"?, "conversations": [{"from": "human"|"gpt", "value"}, ...]}``; ``image``
is a name or a list of names, one for each ``<image>`` in the questions; a first message may be ``"from": "system"``. The reader
checks form and that the pictures' files exist; pictures are decoded later, by the loader.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from mmkit.data.bounds import MAX_LINE
from mmkit.data.items import OddItem, Turns, arrange, check_pictures, clean_text
from mmkit.data.messages import Spelling, parse_item
from mmkit.data.packed import Item, Omission, PackedConversations
from mmkit.data.reading import read_lines
from mmkit.data.skipped import LeftOut
from mmkit.errors import InputError

_BOM = b"\xef\xbb\xbf"


def _decode(path: Path, data: bytes, start: int = 0) -> str:
    """Text of a part of the file, without a byte order mark at its beginning."""
    try:
        return (data.removeprefix(_BOM) if start == 0 else data).decode("utf-8")
    except UnicodeDecodeError as error:
        # Counted in the file, with the mark that was taken off: there the user has to look.
        at = start + error.start + (len(_BOM) if start == 0 and data.startswith(_BOM) else 0)
        raise InputError(f"invalid UTF-8 at byte {at}", where=path, mend="save it as UTF-8") from error


def _first_byte(path: Path) -> bytes:
    """The first byte that is no white space; empty: there is none."""
    try:
        with path.open("rb") as file:
            # A few bytes at first, and no more than it takes: the file may have hundreds of megabytes.
            found = file.read(len(_BOM)).removeprefix(_BOM).lstrip()
            while not found and (more := file.read(1 << 16)):
                found = more.lstrip()
            return found[:1]
    except FileNotFoundError as error:
        raise InputError("no such file", where=path, mend="check the path") from error
    except IsADirectoryError as error:
        raise InputError("is a folder, not a file", where=path, mend="give the JSON file in it") from error


def _broken_json(path: Path, text: str, error: json.JSONDecodeError, *, line: int = 0) -> InputError:
    """The error for JSON that does not parse; says "looks cut off" when the fault is where the text ends."""
    # A string that is cut off is reported where it starts, not where the text ends.
    at_end = error.pos >= len(text.rstrip()) or error.msg.startswith("Unterminated string")
    what = "the file looks cut off" if at_end else f"not valid JSON ({error.msg})"
    mend = "fetch or write the file again" if at_end else "mend this place"
    return InputError(what, where=f"{path}:{line or error.lineno}:{error.colno}", mend=mend)


def _read_lines(path: Path) -> Iterator[tuple[str, Any]]:
    """(place, item) of each JSON line; a bad one becomes an `OddItem`. The file is never whole in memory."""
    end = path.stat().st_size
    with path.open("rb") as file:
        for number, (start, size, line) in enumerate(read_lines(file), start=1):
            place = f"line {number}"
            if line is None:
                yield place, OddItem(f"{path.name}:{number}: a line of more than {MAX_LINE >> 20} MiB")
                continue
            text = _decode(path, line, start)
            # Blank lines are no items.
            if not text.strip():
                continue
            try:
                yield place, json.loads(text)
            except json.JSONDecodeError as error:
                # Only the last line can be cut off; earlier ones are single faults.
                if start + size == end and not line.endswith(b"\n"):
                    raise _broken_json(path, text, error, line=number) from error
                # Handed on as an exception that is raised later, so that the list of what was left out stays in file order.
                yield place, OddItem(f"{path.name}:{number}: not valid JSON ({error.msg})")
            # Deeply nested brackets, of which a damaged line can consist.
            except RecursionError as error:
                yield place, OddItem(f"{path.name}:{number}: {error}")


# raw_decode skips no white space. These four are JSON's; \s takes others too.
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
        # An empty list has no item. Later, behind a comma, a bracket is a fault, as it is for json.loads.
        while text[at : at + 1] != "]" or number:
            item, at = decode(text, at)
            yield f"item {number}", item
            at, number = skip(at), number + 1
            if text[at : at + 1] == "]":
                break
            if text[at : at + 1] != ",":
                raise json.JSONDecodeError("Expecting ',' delimiter", text, at)
            at = skip(at + 1)
        # In json's own words, so that `_broken_json` tells of these faults as of those that it raises.
        if skip(at + 1) != len(text):
            raise json.JSONDecodeError("Extra data", text, skip(at + 1))
    except json.JSONDecodeError as error:
        raise _broken_json(path, text, error) from error


def _read_rows(path: Path) -> Iterator[tuple[str, Any]]:
    """(place, item) of each item of the file, JSON list or JSON lines."""
    first = _first_byte(path)
    if not first:
        raise InputError("the file is empty", where=path, mend="expected a JSON list of conversations")
    # A list begins with a bracket, a line with a brace; so the published .json files and lines under any name are both read.
    if path.suffix == ".jsonl" or first != b"[":
        return _read_lines(path)
    return _read_list(path, _decode(path, path.read_bytes()))


def check_name(name: Any, image_root: Path) -> str:
    """The name of a picture's file; nothing outside ``image_root`` is ever named.

    Raises:
        OddItem: It is no name of a file below the root, or there is no such file.
    """
    # Looked for now and decoded later: a wrong image root shows before any training, at the cost of one stat an item.
    if reason := _lacks(_safe_name(name), image_root):
        raise OddItem(reason)
    return str(name)


def _safe_name(name: Any) -> str:
    """A name that stays below its root. Raises OddItem."""
    if not isinstance(name, str) or not name.strip():
        raise OddItem("`image` is no file name")
    # Both kinds on every system: a file made on one is read on the other.
    if PurePosixPath(name).is_absolute() or PureWindowsPath(name).is_absolute():
        raise OddItem(f"image path {name!r} is absolute; paths are relative to the image root")
    if ".." in PurePosixPath(name.replace("\\", "/")).parts:
        raise OddItem(f"image path {name!r} climbs out of the image root")
    return name


def _lacks(name: str, image_root: Path) -> str | None:
    """Why there is no such picture; None: there is."""
    try:
        found = (image_root / name).is_file()
    # A name too long for the file system, for one.
    except (OSError, ValueError):
        return f"image path {name!r} cannot be looked up"
    return None if found else f"no such picture: {name}"


def _item(item: Any, spelling: Spelling) -> tuple[list[str], Turns, str | None]:
    """Names of pictures, turns and system text of one checked item.

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
    return [_safe_name(name) for name in pictures], turns, system


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
    items = PackedConversations.of(read_items(path, unique_ids=unique_ids, spelling=spelling), root)
    return present(items, path, missing_pictures(items, root))


def read_items(path: Path, *, unique_ids: bool, spelling: Spelling) -> Iterator[Item | Omission]:
    """Items of a file one by one, their form checked and not their pictures; arguments as of `read_llava`.

    Raises:
        InputError: As `read_llava`.
    """
    uses: dict[str, int] = {}
    for number, (place, item) in enumerate(_read_rows(path)):
        key = _key(item, place)
        # Counted before the checks: the second item of an id is a repeat even when the first was left out.
        uses[key] = uses.get(key, 0) + 1
        # The list of what was left out tells items apart by it too.
        name = key if uses[key] == 1 or unique_ids else f"{key}#{uses[key]}"
        try:
            if uses[key] > 1 and unique_ids:
                raise OddItem(f"{place}: the id was used before")
            yield Item(number, name, *_item(item, spelling))
        except OddItem as odd:
            yield Omission(number, name, str(odd))


def missing_pictures(items: PackedConversations, root: Path) -> dict[int, str]:
    """Numbers of pictures that are not there, with the reason; each is looked for once, however many items show it."""
    return {number: reason for number, name in enumerate(items.names()) if (reason := _lacks(name, root)) is not None}


def present(items: PackedConversations, path: Path, missing: Mapping[int, str]) -> tuple[PackedConversations, list[LeftOut]]:
    """Items whose pictures are there, and all that is left out, in file order.

    Args:
        items: All of a file.
        path: The file, for the list.
        missing: Of `missing_pictures`.
    """
    kept, without = items.without(missing)
    # Their first field is the number in the file: what form and pictures left out becomes one list in its order.
    left_out = sorted([*items.left_out, *without])
    return kept, [LeftOut(str(path), row.key, row.reason) for row in left_out]
