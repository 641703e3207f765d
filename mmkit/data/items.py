"""One conversation as the readers give it, what is wrong with one, and several data sets as one."""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Sequence
from typing import NamedTuple, Protocol

from mmkit.data.pairs import Picture
from mmkit.data.pieces import IMAGE_MARKER

Turns = list[tuple[str, str]]
_ROLES = ("user", "assistant")


class Conversation(NamedTuple):
    """One conversation.

    Attributes:
        id: Its name in messages; as the file gives it, as text.
        images: Its pictures, in the order of their ``<image>`` markers; empty for text only.
        turns: (question, answer) pairs, answers not blank; as many markers in the questions as pictures.
        system: Its own system text; None: it has none.
    """

    id: str
    images: tuple[Picture, ...]
    turns: Turns
    system: str | None = None


class OddItem(ValueError):
    """Why a conversation is left out."""


class Message(NamedTuple):
    """A message with its role as mmkit calls it, and as the file does."""

    role: str  # "system", "user" or "assistant"
    text: str
    said: str


def clean_text(text: str) -> str:
    """A text that every tokenizer takes: JSON may spell lone surrogates, which become question marks."""
    return text.encode("utf-8", "replace").decode("utf-8")


def arrange(messages: Sequence[Message]) -> tuple[Turns, str | None]:
    """Turns and system text of messages that alternate strictly, after at most one system message.

    Raises:
        OddItem: With the number of the message that breaks the rule. Nothing is repaired by dropping or joining messages: an
            answer could end up under another question.
    """
    if not messages:
        raise OddItem("the conversation has no turns")
    first = 1 if messages[0].role == "system" else 0
    # In the file's own words: whoever has LLaVA's looks for human and gpt in it.
    names = [next((m.said for m in messages if m.role == role), role) for role in _ROLES]
    for number, message in enumerate(messages[first:], start=first + 1):
        if message.role == "system":
            raise OddItem(f"message {number} is by {message.said}: only the first may be")
        if message.role != _ROLES[(number - first - 1) % 2]:
            raise OddItem(f"message {number} is by {message.said}: {names[0]} and {names[1]} must alternate, {names[0]} first")
        # An empty answer would train the model to stop at once.
        if message.role == "assistant" and not message.text.strip():
            raise OddItem(f"message {number}: the answer is empty")
        # It would be learnt as text, and the picture's features have no place there.
        if message.role == "assistant" and IMAGE_MARKER in message.text:
            raise OddItem(f"message {number}: {IMAGE_MARKER} in an answer")
    talk = messages[first:]
    if not talk:
        raise OddItem("the conversation has no turns")
    # The question alone holds nothing that is supervised.
    if len(talk) % 2:
        raise OddItem(f"the last message is by {talk[-1].said}: no answer to learn")
    system = messages[0].text.strip() if first else ""
    # Markers are counted in questions only, so this one would stand for no picture.
    if IMAGE_MARKER in system:
        raise OddItem(f"message 1: {IMAGE_MARKER} in a system text")
    return [(talk[i].text, talk[i + 1].text) for i in range(0, len(talk), 2)], system or None


def check_pictures(turns: Turns, pictures: int) -> None:
    """Raises OddItem when there is not one marker for each picture."""
    markers = sum(question.count(IMAGE_MARKER) for question, _ in turns)
    if markers == pictures:
        return
    if not pictures:
        raise OddItem(f"{IMAGE_MARKER} in the text but no `image`")
    one = "one image needs one" if pictures == 1 else f"{pictures} images need as many"
    raise OddItem(f"{one} {IMAGE_MARKER} in the questions, found {markers}")


class ConversationSet(Protocol):
    """Conversations by number; each is read when it is asked for."""

    def __len__(self) -> int:
        """How many."""
        ...

    def __getitem__(self, index: int) -> Conversation:
        """One of them. Raises SampleError: it cannot be used."""
        ...

    def images(self, index: int) -> tuple[Picture, ...]:
        """Pictures of one of them. Raises SampleError: it cannot be used."""
        ...

    def piece(self, first: int, last: int) -> ConversationSet:
        """Those from ``first`` to ``last - 1``, as far as there are any; it pickles without the rest."""
        ...

    def name(self, index: int) -> str:
        """What to call one of them in messages, also one that cannot be used."""
        ...


class JoinedConversations:
    """Several data sets, one after the other."""

    def __init__(self, parts: Sequence[tuple[ConversationSet, str]]) -> None:
        """Take data sets, each with the name of its source."""
        self.parts = list(parts)
        self._ends = list(itertools.accumulate(len(part) for part, _ in parts))

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def _locate(self, index: int) -> tuple[ConversationSet, str, int]:
        # range checks the number, which bisect would take for one of the last part. Right: of equal ends the last, so
        # that a part without conversations is stepped over.
        number = bisect.bisect_right(self._ends, range(len(self))[index])
        part, source = self.parts[number]
        return part, source, index - (self._ends[number] - len(part))

    def __getitem__(self, index: int) -> Conversation:
        part, _, row = self._locate(index)
        return part[row]

    def images(self, index: int) -> tuple[Picture, ...]:
        """Pictures of a conversation, without its texts where they are had so."""
        part, _, row = self._locate(index)
        return part.images(row)

    def piece(self, first: int, last: int) -> JoinedConversations:
        """Those from ``first`` to ``last - 1``."""
        starts = [0, *self._ends[:-1]]
        parts = []
        for (part, source), start in zip(self.parts, starts, strict=True):
            # In the numbers of this part; a part outside has an empty range.
            begin, end = max(0, first - start), min(len(part), last - start)
            parts += [(part.piece(begin, end), source)] if begin < end else []
        return JoinedConversations(parts)

    def describe(self, index: int) -> tuple[str, str]:
        """Source and name of a conversation."""
        part, source, row = self._locate(index)
        return source, part.name(row)
