"""Conversations in pieces: segments of template, text and pictures, and the tokenizer applied to each piece once.

Only the template's own control tokens become control tokens: the same characters inside a question or an answer are plain text.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

from tokenizers import Tokenizer
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from mmkit.data.skipped import SampleError
from mmkit.errors import InputError

# LLaVA's own spelling, in its files and in transformers' processor.
IMAGE_MARKER = "<image>"
# Characters of a piece whose ids are remembered.
_SHORT = 120
EOS = "{eos}"  # as a control segment: the tokenizer's own end token, whatever it is called


class ConversationError(SampleError):
    """This sample cannot be used; `reason` says why, for the list of what was left out."""

    def __init__(self, reason: str) -> None:
        """Keep the reason beside the message."""
        self.reason = reason
        super().__init__(reason)


class Segment(NamedTuple):
    """A stretch of a sequence: running text, one control token, or the place of a picture."""

    kind: str  # "text", "control" or "image"
    text: str = ""


class RenderedTurn(NamedTuple):
    """A turn: what the model reads, and what it learns to write (the answer and its end)."""

    prompt: list[Segment]
    reply: list[Segment]


class Rendered(NamedTuple):
    """A conversation in segments.

    Attributes:
        turns: In order.
        tail: What a template writes after the last answer's end; not supervised.
        starts: Whether the tokenizer's start token goes in front, where it adds one to any text; else the template has written
            it.
    """

    turns: list[RenderedTurn]
    tail: list[Segment]
    starts: bool


def place_pictures(question: str, *, images: bool, system: str = "") -> str:
    """A question as all templates see it: stripped, and a single marker moved to the front, followed by a newline.

    Files have the marker at either end of the question, and the model is to see one form only (LLaVA's preprocess_multimodal).
    Several in one turn stay where they are: the text around them says which is which (so does LLaVA-NeXT).

    Args:
        question: Text with markers.
        images: Whether they stand for pictures. The pictures decide, not the text: a user may write about "<image>".
        system: A text to go in front of the question, after a single picture.
    """
    front = f"{IMAGE_MARKER}\n" if images and question.count(IMAGE_MARKER) == 1 else ""
    # Stripped: a stray space would make another prompt of the same question.
    text = (question.replace(IMAGE_MARKER, "") if front else question).strip()
    return (front + (f"{system}\n\n{text}" if system else text)).strip()


def flatten_parts(parts: Iterable[str | None]) -> str:
    """Text of a message in parts; None stands for a picture, which becomes a marker on a line of its own."""
    return "".join(f"{IMAGE_MARKER}\n" if part is None else part for part in parts)


def content_segments(text: str, *, images: bool) -> list[Segment]:
    """Text and pictures of a question; without pictures the marker is text like any other."""
    if not images:
        return [Segment("text", text)]
    out = []
    for number, part in enumerate(text.split(IMAGE_MARKER)):
        out += [Segment("image")] * (number > 0) + [Segment("text", part)]
    return out


def joined(segments: Iterable[Segment]) -> list[Segment]:
    """Neighbouring texts as one, so that words merge over the joints as they do in running text; empty ones left out."""
    out: list[Segment] = []
    for segment in segments:
        # An empty piece must go: what comes next would count as following text and lose its leading space.
        if segment.kind == "text" and not segment.text:
            continue
        if out and segment.kind == "text" == out[-1].kind:
            out[-1] = Segment("text", out[-1].text + segment.text)
        else:
            out.append(segment)
    return out


@dataclass
class PieceEncoder:
    """Tokenises running text piece by piece, as the tokenizer would the whole text.

    Two things differ from calling the tokenizer on a piece: a leading space that SentencePiece tokenizers add is added
    where the whole text would get it and nowhere else, and special tokens spelt out in the text stay plain text.
    """

    # Not the tokenizer itself: the memory of encoders would keep it alive.
    size: int
    eos: int | None
    full: Tokenizer
    bare: Tokenizer
    prefix_everywhere: bool
    bos: list[int]
    # Special ids that may not come out of running text; the unknown token is not among them, any odd character gives it.
    forbidden: frozenset[int] = field(default_factory=frozenset)

    def __post_init__(self) -> None:
        self._remembered = functools.lru_cache(maxsize=256)(self._encode)

    def text(self, text: str, before: str) -> Sequence[int]:
        """Ids of running text that follows ``before``: "start", "control" (image included) or "text"."""
        # After other text never: the whole text, of which both are parts, has no added space there.
        prefixed = before == "start" or (before == "control" and self.prefix_everywhere)
        # Half of the pieces are the template's own words, the same in every conversation.
        return self._remembered(text, prefixed) if len(text) <= _SHORT else self._encode(text, prefixed)

    def _encode(self, text: str, prefixed: bool) -> Sequence[int]:
        ids = (self.full if prefixed else self.bare).encode(text, add_special_tokens=False).ids
        # A tokenizer whose vocabulary spells a control token as an ordinary piece; such a text could end a turn early.
        if not self.forbidden.isdisjoint(ids):
            raise ConversationError("the text spells a control token that this tokenizer cannot keep as text")
        return tuple(ids)

    def control(self, text: str) -> int:
        """Id of a control token of the template.

        Raises:
            InputError: When the tokenizer lacks it.
        """
        if text == EOS:
            if self.eos is None:
                raise InputError("the tokenizer has no end token", mend="set its eos_token")
            return self.eos
        found = self.full.token_to_id(text)
        if found is None:
            raise InputError(f"the tokenizer has no token {text!r}", mend="choose another conversation template")
        return found

    def segments(self, segments: list[Segment], *, before: str, image: list[int]) -> list[int]:
        """Ids of consecutive segments; ``before`` says what they follow, ``image`` stands for each picture."""
        ids: list[int] = []
        for segment in segments:
            if segment.kind == "image":
                ids += image
            elif segment.kind == "control":
                ids.append(self.control(segment.text))
            else:
                ids += self.text(segment.text, before)
            before = kind_after(segment)
        return ids


def kind_after(segment: Segment) -> str:
    """What a piece of text that follows a segment follows."""
    # A picture counts as a control token: its placeholder is one for the tokenizer.
    return "text" if segment.kind == "text" else "control"


def _without_prefix(state: dict[str, Any]) -> tuple[dict[str, Any], bool]:
    """A tokenizer's JSON without the space it adds in front, and whether it adds one after every special token too."""
    # The setting sits in the pre-tokenizer or the normalizer, by tokenizer family and version of the file.
    everywhere = False
    # One level of nesting: a Sequence of steps, or a step by itself.
    steps = [state["pre_tokenizer"] or {}, *((state["pre_tokenizer"] or {}).get("pretokenizers") or [])]
    for step in steps:
        if step.get("type") == "Metaspace":
            # The other value with a space, "first", puts one at the start of the whole text only.
            everywhere |= step.get("prepend_scheme", "always") == "always"
            step["prepend_scheme"] = "never"
        elif step.get("type") == "ByteLevel":
            everywhere |= bool(step.get("add_prefix_space"))
            step["add_prefix_space"] = False
    normalizer = state["normalizer"] or {}
    if normalizer.get("type") == "Prepend":
        everywhere, state["normalizer"] = True, None
    elif normalizer.get("type") == "Sequence":
        kept = [step for step in normalizer["normalizers"] if step.get("type") != "Prepend"]
        everywhere |= len(kept) < len(normalizer["normalizers"])
        normalizer["normalizers"] = kept
    return state, everywhere


# Weak keys: a tokenizer that nobody uses any more must not be kept alive with two copies of its vocabulary.
_ENCODERS: WeakKeyDictionary[PreTrainedTokenizerBase, dict[frozenset[str], PieceEncoder]] = WeakKeyDictionary()


def piece_encoder(tokenizer: PreTrainedTokenizerBase, controls: frozenset[str] = frozenset()) -> PieceEncoder:
    """The piecewise encoder of a tokenizer, made once and again after tokens were added.

    Args:
        tokenizer: A fast one.
        controls: Added tokens that must not come out of running text either, though the tokenizer does not call them special.

    Raises:
        InputError: A slow tokenizer.
    """
    made = _ENCODERS.setdefault(tokenizer, {})
    # Adding the image token changes the size; an encoder from before would split it into pieces.
    if controls not in made or made[controls].size != len(tokenizer):
        made[controls] = _make_encoder(tokenizer, controls)
    return made[controls]


def _make_encoder(tokenizer: PreTrainedTokenizerBase, controls: frozenset[str]) -> PieceEncoder:
    if not tokenizer.is_fast:
        raise InputError("conversations need a fast tokenizer", mend="use one with a tokenizer.json")
    # Copies: the switches below must not change how the caller's own tokenizer behaves.
    source = json.loads(tokenizer.backend_tokenizer.to_str())
    for token in source["added_tokens"]:
        token["special"] = token["special"] or token["content"] in controls
    full = Tokenizer.from_str(json.dumps(source))
    state, everywhere = _without_prefix(source)
    bare = Tokenizer.from_str(json.dumps(state))
    for backend in (full, bare):
        backend.no_truncation()
        backend.no_padding()
        # The setting that turns special tokens inside a text into plain text.
        backend.encode_special_tokens = True
    bos = tokenizer.bos_token_id
    # Asked of the tokenizer, not guessed from its class: whether it puts the start token in front of a text.
    starts = tokenizer("a").input_ids[:1] == [bos] and tokenizer("a", add_special_tokens=False).input_ids[:1] != [bos]
    # Not all_special_ids alone: Llama 3 has its headers and end of turn as added tokens without a name.
    special = {*tokenizer.all_special_ids, *(token["id"] for token in source["added_tokens"] if token["special"])}
    # A genuine unk inside a text is an ordinary token; LLaVA drops it with the padding (facts/llava.md 1.4).
    forbidden = frozenset(special - {tokenizer.unk_token_id})
    return PieceEncoder(len(tokenizer), tokenizer.eos_token_id, full, bare, everywhere, [bos] if starts else [], forbidden)
