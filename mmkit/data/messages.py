"""The two spellings of a conversation: LLaVA's ``conversations`` (from, value), and ``messages`` (role, content)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from mmkit.data.items import Message, OddItem, clean_text
from mmkit.data.pieces import flatten_parts

# Which spelling rows have; auto: each row says so by its keys.
Spelling = Literal["auto", "llava", "messages"]
_LLAVA_ROLES = {"system": "system", "human": "user", "gpt": "assistant"}
_ROLES = ("system", "user", "assistant")
# Where a row has its pictures; the first that is there counts.
PICTURE_KEYS = ("images", "image")
# Where a part of a message names its own picture, as Qwen's and transformers' chat format do.
_PART_KEYS = ("image", "path")


def parse_item(item: Mapping[str, Any], spelling: Spelling = "auto") -> tuple[list[Message], list[Any]]:
    """Messages and pictures of a row.

    Args:
        item: With ``conversations`` or ``messages``, and pictures under ``images`` or ``image``: one, or a list.
        spelling: Which of the two is expected.

    Returns:
        The messages, with ``<image>`` for each picture; and the pictures as the row names them.

    Raises:
        OddItem: With the message that is wrong.
    """
    listed = pictures_of(item)
    # By value: tables give every row every key, null where it has none.
    if spelling == "llava" or (spelling == "auto" and item.get("messages") is None):
        return parse_llava(item), listed
    messages, own = parse_messages(item)
    # Which of the two the markers mean cannot be known.
    if own and listed:
        raise OddItem("pictures are named both in the messages and beside them")
    return messages, own or listed


def pictures_of(item: Mapping[str, Any]) -> list[Any]:
    """Pictures of a row, none whether the key is missing or null."""
    found = next((item[key] for key in PICTURE_KEYS if item.get(key) is not None), None)
    return [] if found is None else found if isinstance(found, list) else [found]


def _listed(item: Mapping[str, Any], key: str, hint: str = "") -> list[Any]:
    messages = item.get(key)
    if not isinstance(messages, list):
        raise OddItem(f"`{key}` is missing or no list{hint}")
    return messages


def parse_llava(item: Mapping[str, Any]) -> list[Message]:
    """Messages in LLaVA's spelling, types checked. Raises OddItem."""
    hint = "; rows with `messages` are read by type: messages" if "messages" in item else ""
    out = []
    for number, message in enumerate(_listed(item, "conversations", hint), start=1):
        if not isinstance(message, dict) or "from" not in message or "value" not in message:
            # The chat format of other kits: said outright, or its users would look for a typing error.
            hint = " (OpenAI-style role/content?)" if isinstance(message, dict) and "role" in message else ""
            raise OddItem(f"message {number} lacks `from` or `value`{hint}")
        if not isinstance(message["value"], str):
            raise OddItem(f"message {number}: `value` is no text")
        # A list as a role cannot be looked up in a table.
        role = message["from"] if isinstance(message["from"], str) else None
        if role not in _LLAVA_ROLES:
            raise OddItem(f"message {number}: unknown role {message['from']!r}, expected human or gpt")
        out.append(Message(_LLAVA_ROLES[role], clean_text(message["value"]), role))
    return out


def parse_messages(item: Mapping[str, Any]) -> tuple[list[Message], list[Any]]:
    """Messages with roles and contents, types checked, and the pictures that their parts name. Raises OddItem."""
    out: list[Message] = []
    pictures: list[Any] = []
    parts = 0
    for number, message in enumerate(_listed(item, "messages"), start=1):
        if not isinstance(message, dict) or "role" not in message or "content" not in message:
            hint = " (LLaVA's from/value?)" if isinstance(message, dict) and "from" in message else ""
            raise OddItem(f"message {number} lacks `role` or `content`{hint}")
        if message["role"] not in _ROLES:
            raise OddItem(f"message {number}: unknown role {message['role']!r}, expected {', '.join(_ROLES)}")
        # What a call of a tool would teach is not in its text.
        if message.get("tool_calls"):
            raise OddItem(f"message {number}: tool calls cannot be used")
        content = message["content"]
        if isinstance(content, list):
            texts = [_part(part, number) for part in content]
            parts += texts.count(None)
            pictures += [found for part in content if (found := _named(part)) is not None]
            content = flatten_parts(texts)
        if not isinstance(content, str):
            raise OddItem(f"message {number}: `content` is {type(content).__name__}, no text and no list of parts")
        out.append(Message(message["role"], clean_text(content), message["role"]))
    if pictures and len(pictures) != parts:
        raise OddItem(f"{len(pictures)} of {parts} picture parts name their picture: name all, or list them beside the messages")
    return out, pictures


def _part(part: Any, number: int) -> str | None:
    """Text of a part; None for a picture."""
    kind = part.get("type") if isinstance(part, dict) else None
    if kind == "image":
        return None
    if kind != "text":
        raise OddItem(f"message {number}: a part of type {kind!r}, expected text or image")
    if not isinstance(part.get("text"), str):
        raise OddItem(f"message {number}: a text part without `text`")
    return str(part["text"])


def _named(part: Mapping[str, Any]) -> Any:
    # Tables give every part every key, null where it has none.
    return next((part[key] for key in _PART_KEYS if part["type"] == "image" and part.get(key) is not None), None)
