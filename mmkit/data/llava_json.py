"""Reader of LLaVA conversation files (facts/llava.md 1.3), strict: every odd item is left out by name and reason.

A file is a JSON list or JSON lines of ``{"id", "image"?, "conversations": [{"from": "human"|"gpt", "value"}, ...]}``.
The reader checks form and that the picture's file exists; pictures are decoded later, by the loader.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from mmkit.data.conversations import IMAGE_MARKER
from mmkit.data.skipped import LeftOut
from mmkit.errors import InputError


@dataclass(frozen=True)
class LlavaItem:
    """One conversation.

    Attributes:
        id: As the file gives it, as text.
        image: The picture's file under the image root; None for text only.
        turns: (question, answer) pairs; the question with the picture begins with ``<image>`` and a newline.
    """

    id: str
    image: Path | None
    turns: list[tuple[str, str]]


# Private: one item's fault never leaves this module as an exception.
class _OddItem(ValueError):
    """Why an item is left out."""


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


def _read_lines(path: Path, text: str) -> list[tuple[str, Any]]:
    """(place, item) of each JSON line; lines end at newlines only, and a bad one becomes an `_OddItem`."""
    rows: list[tuple[str, Any]] = []
    lines = text.split("\n")
    for number, line in enumerate(lines, start=1):
        # Blank lines, the one after the last newline among them, are no items.
        if not line.strip():
            continue
        try:
            rows.append((f"line {number}", json.loads(line)))
        except json.JSONDecodeError as error:
            # Only the last line can be cut off; earlier ones are single faults.
            if number == len(lines):
                raise _broken_json(path, line, error, line=number) from error
            # Kept in its place as an exception that is raised later, so that the list of what was left out stays in file order.
            rows.append((f"line {number}", _OddItem(f"{path.name}:{number}: not valid JSON ({error.msg})")))
    return rows


def _read_rows(path: Path) -> list[tuple[str, Any]]:
    """(place, item) of each item of the file, JSON list or JSON lines."""
    text = _read_text(path)
    if not text.strip():
        raise InputError("the file is empty", where=path, mend="expected a JSON list of conversations")
    # A list begins with a bracket, a line with a brace; so the published .json files and lines under any name are both read.
    if path.suffix == ".jsonl" or not text.lstrip().startswith("["):
        return _read_lines(path, text)
    try:
        items = json.loads(text)
    except json.JSONDecodeError as error:
        raise _broken_json(path, text, error) from error
    return [(f"item {index}", item) for index, item in enumerate(items)]


def _messages(item: dict[str, Any]) -> list[tuple[str, str]]:
    """(from, value) of each message, types checked."""
    messages = item.get("conversations")
    if not isinstance(messages, list):
        raise _OddItem("`conversations` is missing or no list")
    if not messages:
        raise _OddItem("the conversation has no turns")
    out = []
    for number, message in enumerate(messages, start=1):
        if not isinstance(message, dict) or "from" not in message or "value" not in message:
            # The chat format of other kits: said outright, or its users would look for a typing error.
            hint = " (OpenAI-style role/content?)" if isinstance(message, dict) and "role" in message else ""
            raise _OddItem(f"message {number} lacks `from` or `value`{hint}")
        if not isinstance(message["value"], str):
            raise _OddItem(f"message {number}: `value` is no text")
        if message["from"] not in ("human", "gpt"):
            raise _OddItem(f"message {number}: unknown role {message['from']!r}, expected human or gpt")
        out.append((message["from"], message["value"]))
    return out


def _turns(messages: list[tuple[str, str]]) -> list[tuple[str, str]]:
    """(question, answer) pairs of strictly alternating messages."""
    for number, (role, value) in enumerate(messages, start=1):
        # No repair by dropping or joining messages: an answer could end up under another question.
        if role != ("human" if number % 2 else "gpt"):
            raise _OddItem(f"message {number} is by {role}: human and gpt must alternate, human first")
        # An empty answer would train the model to stop at once.
        if role == "gpt" and not value.strip():
            raise _OddItem(f"message {number}: the answer is empty")
        # It would be learnt as text, and the picture's features have no place there.
        if role == "gpt" and IMAGE_MARKER in value:
            raise _OddItem(f"message {number}: {IMAGE_MARKER} in an answer")
    # The question alone holds nothing that is supervised.
    if len(messages) % 2:
        raise _OddItem("the last message is by human: no answer to learn")
    return [(messages[index][1], messages[index + 1][1]) for index in range(0, len(messages), 2)]


def _marker_first(question: str) -> str:
    """The question with its image marker moved to the front, followed by a newline."""
    # Files have it at either end of the question; the model is to see one form only.
    return f"{IMAGE_MARKER}\n{question.replace(IMAGE_MARKER, '', 1).strip()}"


def _image_path(name: Any, image_root: Path) -> Path:
    """The picture's file; nothing outside ``image_root`` is ever named."""
    if not isinstance(name, str) or not name.strip():
        raise _OddItem("`image` is no file name")
    # Both kinds on every system: a file made on one is read on the other.
    if PurePosixPath(name).is_absolute() or PureWindowsPath(name).is_absolute():
        raise _OddItem(f"image path {name!r} is absolute; paths are relative to the image root")
    if ".." in PurePosixPath(name.replace("\\", "/")).parts:
        raise _OddItem(f"image path {name!r} climbs out of the image root")
    path = image_root / name
    try:
        found = path.is_file()
    # A name too long for the file system, for one.
    except (OSError, ValueError) as error:
        raise _OddItem(f"image path {name!r} cannot be looked up") from error
    # Looked for now and decoded later: a wrong image root shows before any training, at the cost of one stat an item.
    if not found:
        raise _OddItem(f"no such picture: {name}")
    return path


def _item(item: Any, key: str, image_root: Path) -> LlavaItem:
    """One checked item.

    Raises:
        _OddItem: With the reason to leave it out.
    """
    if isinstance(item, _OddItem):
        raise item
    if not isinstance(item, dict):
        raise _OddItem("not a JSON object")
    turns = _turns(_messages(item))
    markers = sum(question.count(IMAGE_MARKER) for question, _ in turns)
    # Text only, whether the key is missing or null.
    if item.get("image") is None:
        if markers:
            raise _OddItem(f"{IMAGE_MARKER} in the text but no `image`")
        return LlavaItem(key, None, turns)
    if markers != 1:
        raise _OddItem(f"one image needs one {IMAGE_MARKER} in the questions, found {markers}")
    path = _image_path(item["image"], image_root)
    return LlavaItem(key, path, [(_marker_first(q) if IMAGE_MARKER in q else q, a) for q, a in turns])


def _key(item: Any, place: str) -> str:
    """What to call an item: its id, else its place in the file."""
    found = item.get("id") if isinstance(item, dict) else None
    # Other types (a list, a float) do not make a name that a user could search for in the file.
    return str(found) if isinstance(found, (str, int)) and str(found) else place


def read_llava(path: str | Path, *, image_root: str | Path, unique_ids: bool = True) -> tuple[list[LlavaItem], list[LeftOut]]:
    """Read a LLaVA conversation file.

    Args:
        path: JSON list or JSON lines.
        image_root: Folder the image paths are relative to.
        unique_ids: Leave out the later items of an id used before. False keeps them under ``ID#2``, ``ID#3``: the
            published instruction files name an item after its picture, so their ids repeat by design.

    Returns:
        The sound items in file order, and what was left out with reasons, in file order.

    Raises:
        InputError: The file is missing, empty, not UTF-8, not JSON or cut off (with line and column).
    """
    path, root = Path(path), Path(image_root)
    uses: dict[str, int] = {}
    items: list[LlavaItem] = []
    left_out: list[LeftOut] = []
    for place, item in _read_rows(path):
        key = _key(item, place)
        # Counted before the checks: the second item of an id is a repeat even when the first was left out.
        uses[key] = uses.get(key, 0) + 1
        try:
            if uses[key] > 1 and unique_ids:
                raise _OddItem(f"{place}: the id was used before")
            items.append(_item(item, key if uses[key] == 1 else f"{key}#{uses[key]}", root))
        except _OddItem as odd:
            left_out.append(LeftOut(str(path), key, str(odd)))
    return items, left_out
