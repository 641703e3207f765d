"""The chat template of a processor that mmkit did not make, for prompts alone.

Trained models are asked as their makers ask them: pictures and text go into the template as parts of one message, in order. The
texts are put in afterwards, as in `mmkit.data.chat`, so that control tokens spelt out in a question stay text.
"""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass, field
from typing import Any, Union

import jinja2
from transformers.tokenization_utils_base import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template

from mmkit.data.pieces import IMAGE_MARKER, ConversationError, Segment, joined, piece_encoder
from mmkit.data.templates import Template

# Plane 16 is for private use: no template has its characters.
_FIRST_MARK = 0x100000
_MARKS = re.compile("[\U00100000-\U0010fffd]")
_FAULTS = (jinja2.TemplateError, TypeError, AttributeError, KeyError, IndexError)
# A newline after a picture that stands in front of all text is mmkit's own (`mmkit.data.pieces.place_pictures`).
_FRONT = re.compile(rf"(?:{re.escape(IMAGE_MARKER)}\n?)*")
_Content = Union[str, list[dict[str, str]]]


@dataclass(frozen=True)
class ProcessorTemplate(Template):
    """A processor's chat template in the place of one of mmkit's own; it cannot be trained with.

    Attributes:
        jinja: The template.
        special: Names of special tokens to their texts, for the template.
        image_token: What the template writes for a picture.
        as_parts: Whether it takes a message as a list of parts; else as one text.
        starts: Whether the tokenizer puts its start token in front.
    """

    jinja: str = ""
    special: dict[str, Any] = field(default_factory=dict)
    image_token: str = IMAGE_MARKER
    as_parts: bool = True
    starts: bool = False

    def prompt_segments(self, question: str, *, images: bool, system: str | None = None, first: bool = True) -> list[Segment]:
        """Everything up to where the model begins to write.

        Args:
            question: As `mmkit.data.pieces.place_pictures` gives it.
            images: Whether ``<image>`` in it stands for a picture.
            system: A system text.
            first: Always true: there is one turn.

        Raises:
            ConversationError: The template raises, writes more pictures or fewer, or rewrites the texts.
        """
        assert first, "a prompt has one turn"
        parts: list[str | None] = _parts(question) if images else [question]
        texts = [] if system is None else [system]
        texts += [part for part in parts if part is not None]
        segments = self._filled(self._literals(texts, parts, system), texts)
        # A template may pass over a picture without a word; then features and places would not match.
        if (written := sum(segment.kind == "image" for segment in segments)) != parts.count(None):
            raise ConversationError(f"the processor's chat template writes {written} pictures in place of {parts.count(None)}")
        return segments

    def _literals(self, texts: list[str], parts: list[str | None], system: str | None) -> list[str]:
        """The template's own text around the texts. Raises ConversationError: it does not write each as it is, in order."""
        marks = [chr(_FIRST_MARK + i) for i in range(len(texts))]
        found = self._render(marks, parts, system)
        if _MARKS.findall(found) != marks:
            raise ConversationError("the processor's chat template does not write every text once, in order")
        literals = _MARKS.split(found)
        # A second time with the texts themselves, which a template may look at.
        whole = "".join(part for pair in zip(literals, [*texts, ""], strict=True) for part in pair)
        if self._render(texts, parts, system) != whole:
            raise ConversationError("the processor's chat template rewrites the text, or looks at what it holds")
        return literals

    def _render(self, texts: list[str], parts: list[str | None], system: str | None) -> str:
        left = iter(texts)
        rows = [] if system is None else [{"role": "system", "content": _content([next(left)], self.as_parts)}]
        filled = [None if part is None else next(left) for part in parts]
        rows.append({"role": "user", "content": _content(filled, self.as_parts)})
        try:
            found, _ = render_jinja_template([rows], chat_template=self.jinja, add_generation_prompt=True, **self.special)
        except _FAULTS as error:
            raise ConversationError(f"the processor's chat template refuses it ({' '.join(str(error).split())})") from None
        return str(found[0])

    def _filled(self, literals: list[str], texts: list[str]) -> list[Segment]:
        """Segments of the template's text, its pictures and control tokens cut out, with the texts between."""
        segments = []
        for literal, text in zip(literals, [*texts, ""], strict=True):
            # In the template's own text only: a question that spells the token stays text.
            pieces = literal.split(self.image_token)
            for number, piece in enumerate(pieces):
                segments += [Segment("image")] * (number > 0) + self.split(piece)
            segments.append(Segment("text", text))
        # Templates that write the start token which the tokenizer puts in front mean the same one.
        twice = self.starts and segments[0] == Segment("control", str(self.special.get("bos_token")))
        return joined(segments[1:] if twice else segments)


def processor_template(jinja: str, tokenizer: PreTrainedTokenizerBase, image_token: str) -> ProcessorTemplate:
    """A processor's chat template, ready to ask with.

    Args:
        jinja: The template.
        tokenizer: The processor's, a fast one.
        image_token: The processor's placeholder of a picture.

    Raises:
        ConversationError: It cannot be followed, whether messages come as parts or as texts.
    """
    # The image token is cut out as the place of a picture, not as a control token.
    controls = {token.content for token in tokenizer.added_tokens_decoder.values()} - {image_token}
    made = ProcessorTemplate(
        "processor",
        # Longest first: of two tokens that begin alike the tokenizer takes the longer one.
        controls=tuple(sorted(controls, key=len, reverse=True)),
        jinja=jinja,
        special=tokenizer.special_tokens_map,
        image_token=image_token,
        starts=bool(piece_encoder(tokenizer).bos),
    )
    # With a picture: one that takes texts may write a list of parts in Python's spelling instead of raising.
    probe = f"{IMAGE_MARKER}\nWhat is this?"
    try:
        made.prompt_segments(probe, images=True)
    except ConversationError as error:
        made = dataclasses.replace(made, as_parts=False)
        try:
            made.prompt_segments(probe, images=True)
        except ConversationError:
            raise error from None
    return made


def _parts(question: str) -> list[str | None]:
    """A question as its texts, and None for each picture."""
    front = _FRONT.match(question)
    assert front is not None
    parts: list[str | None] = [None] * front[0].count(IMAGE_MARKER)
    for number, text in enumerate(question[front.end() :].split(IMAGE_MARKER)):
        parts += [None] * (number > 0) + ([text] if text else [])
    return parts


def _content(parts: list[str | None], as_parts: bool) -> _Content:
    """Parts of a message as transformers takes them, or as one text."""
    if as_parts:
        return [{"type": "image"} if part is None else {"type": "text", "text": part} for part in parts]
    return "".join(f"{IMAGE_MARKER}\n" if part is None else part for part in parts)
