"""A tokenizer's own chat template, its label spans known by construction.

The Jinja text is rendered with one opaque character in place of each content. What lies between these characters is the
template's own text, in which control tokens count; the contents are put in afterwards and are plain text, whatever they spell. A
second rendering with the contents themselves shows whether the template looks at them or rewrites them; such a conversation is
left out by name.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import jinja2
from tokenizers import AddedToken
from transformers.tokenization_utils_base import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template

from mmkit.data.pieces import ConversationError, Rendered, RenderedTurn, Segment, content_segments, joined, place_pictures
from mmkit.data.templates import flatten_messages
from mmkit.errors import InputError

_MEND = "choose another conversation template (vicuna_v1, chatml), or set a chat template for the tokenizer"
# Plane 16 is for private use: no font, no writing system and so no template has its characters.
_FIRST_MARK = 0x100000
_MARKS = re.compile("[\U00100000-\U0010fffd]")
_BEGIN, _END = "{#- mmkit -#}", "{#- mmkit: the template as it was -#}"
# Templates that write today's date would make another sequence of the same conversation tomorrow, and resume would not be exact.
_DATE = "{%- macro strftime_now(format) -%}26 Jul 2024{%- endmacro -%}"
# Answers hold no reasoning, so templates that can leave it out (Qwen3, SmolLM3) are told to, in training and in generation.
_NO_THINKING = "{%- set enable_thinking = enable_thinking is defined and enable_thinking -%}"
# What is wrong with a template shows as any of these, from inside Jinja.
_FAULTS = (jinja2.TemplateError, TypeError, AttributeError, KeyError, IndexError)


class _Unfit(ValueError):
    """Why a template cannot be followed in the form that was tried."""


class _Message(NamedTuple):
    role: str
    text: str


def _roles(turns: int, *, system: bool, last: bool = True) -> list[str]:
    """Roles of a conversation; without its last answer where a prompt is wanted."""
    roles = ["system"] * system + ["user", "assistant"] * turns
    return roles if last else roles[:-1]


@dataclass(frozen=True)
class OwnTemplate:
    """A chat template that was looked at and can be followed.

    Attributes:
        source: For a processor: it takes pictures and system texts too, where the original does not.
        added: The control tokens that it writes.
        end: The control token after an answer.
        folds: Whether it has no place for a system text, which then goes in front of the first question.
    """

    source: str
    added: frozenset[str]
    end: str
    folds: bool
    _jinja: str = field(repr=False)
    _special: dict[str, Any] = field(repr=False)
    _tokens: dict[str, AddedToken] = field(repr=False)
    _as_parts: bool = False
    # A handful of texts for each number of turns, worked out once.
    _pieces: dict[str, tuple[Segment, ...]] = field(default_factory=dict, repr=False)
    _known: dict[tuple[int, bool, bool], list[str]] = field(default_factory=dict, repr=False)

    def render(self, turns: list[tuple[str, str]], *, images: bool, system: str | None) -> Rendered:
        """The segments of a conversation; texts as `place_pictures` and ``strip`` leave them.

        What opens an answer in generation stands before every answer, also where the template writes less before earlier ones.

        Raises:
            ConversationError: The template rewrites one of its texts.
        """
        turns, system = self._fold(turns, system, images=images)
        # How an answer opens does not depend on the number of turns: one question is enough to know.
        opening = self._fitting(1, system=system is not None, last=False)[-1]
        literals = self._fitting(len(turns), system=system is not None)
        texts = ([] if system is None else [system]) + [text for turn in turns for text in turn]
        self._check(literals, texts, _roles(len(turns), system=system is not None))
        at = 0 if system is None else 1
        waiting = [*self._split(literals[0]), *([] if system is None else [Segment("text", system), *self._split(literals[1])])]
        out: list[RenderedTurn] = []
        for question, answer in turns:
            between, after = literals[at + 1], self._split(literals[at + 2])
            at += 2
            # Qwen3's writes the empty thought before the last answer only. Every answer is learnt behind what opens one in
            # generation; the others would be learnt behind a prompt that nobody asks with.
            between = opening if opening.startswith(between) else between
            # What a finished chat has beyond the opening, the model itself has to write in generation: it is learnt
            # with the answer.
            border = len(opening) if between.startswith(opening) else len(between)
            prompt = [*waiting, *content_segments(question, images=images), *self._split(between[:border])]
            # Up to the first control token: that is where generation stops.
            stop = 1 + next((i for i, segment in enumerate(after) if segment.kind == "control"), len(after))
            # The template was seen to end answers; one that does not with so many turns would teach not to stop.
            if stop > len(after):
                raise ConversationError(f"the chat template does not end answer {len(out) + 1} with a control token")
            reply = [*self._split(between[border:]), Segment("text", answer), *after[:stop]]
            out.append(RenderedTurn(joined(prompt), joined(reply)))
            # What stands behind the stop is never generated: it is read in front of the next question.
            waiting = [*after[stop:]]
        return Rendered(out, joined(waiting), starts=False)

    def prompt(self, question: str, *, images: bool, system: str | None) -> list[Segment]:
        """The segments to generate from. Raises ConversationError: the template rewrites the text."""
        turns, system = self._fold([(question, "")], system, images=images)
        literals = self._fitting(1, system=system is not None, last=False)
        texts = ([] if system is None else [system]) + [turns[0][0]]
        self._check(literals, texts, _roles(1, system=system is not None, last=False), last=False)
        contents = [[Segment("text", text)] for text in texts[:-1]] + [content_segments(turns[0][0], images=images)]
        segments = [*self._split(literals[0])]
        for content, literal in zip(contents, literals[1:], strict=True):
            segments += [*content, *self._split(literal)]
        return joined(segments)

    def _fold(
        self, turns: list[tuple[str, str]], system: str | None, *, images: bool
    ) -> tuple[list[tuple[str, str]], str | None]:
        if system is None or not self.folds:
            return turns, system
        # Placed a second time: a single picture stays in front of the system text too.
        question = place_pictures(turns[0][0], images=images, system=system)
        return [(question, turns[0][1]), *turns[1:]], None

    def _text(self, messages: Sequence[_Message], *, last: bool) -> str:
        """The rendered chat. Raises one of `_FAULTS`."""
        rows = [{"role": m.role, "content": [{"type": "text", "text": m.text}] if self._as_parts else m.text} for m in messages]
        found, _ = render_jinja_template([rows], chat_template=self._jinja, add_generation_prompt=not last, **self._special)
        return str(found[0])

    def _literals(self, turns: int, *, system: bool, last: bool = True) -> list[str]:
        """The template's own text in front of, between and after the contents.

        Raises:
            _Unfit: Contents do not come once each and in order, or the template raises.
        """
        key = (turns, system, last)
        if key not in self._known:
            roles = _roles(turns, system=system, last=last)
            marks = [chr(_FIRST_MARK + i) for i in range(len(roles))]
            try:
                text = self._text([_Message(*pair) for pair in zip(roles, marks, strict=True)], last=last)
            except _FAULTS as error:
                raise _Unfit(" ".join(str(error).split()) or type(error).__name__) from None
            if _MARKS.findall(text) != marks:
                raise _Unfit("does not write every message once, in order")
            self._known[key] = _MARKS.split(text)
        return self._known[key]

    def _fitting(self, turns: int, *, system: bool, last: bool = True) -> list[str]:
        """`_literals` for a conversation. Raises ConversationError: the template cannot take one of this form."""
        try:
            return self._literals(turns, system=system, last=last)
        except _Unfit as error:
            raise ConversationError(f"the chat template cannot take {turns} turns: it {error}") from None

    def _check(self, literals: list[str], texts: list[str], roles: list[str], *, last: bool = True) -> None:
        """Raises ConversationError unless the template, given the texts themselves, writes just them between its own."""
        try:
            text = self._text([_Message(*pair) for pair in zip(roles, texts, strict=True)], last=last)
        except _FAULTS as error:
            raise ConversationError(f"the chat template refuses it ({' '.join(str(error).split())})") from None
        at = 0
        for number, literal in enumerate(literals):
            # Place by place: a search could find the template's words inside a text that spells them.
            content = texts[number] if number < len(texts) else ""
            if not text.startswith(literal + content, at):
                role = roles[min(number, len(roles) - 1)]
                raise ConversationError(f"the chat template rewrites the {role} text, or looks at what it holds")
            at += len(literal) + len(content)
        if at != len(text):
            raise ConversationError("the chat template writes more than the messages, by what they hold")

    def _split(self, literal: str) -> tuple[Segment, ...]:
        """Segments of the template's own text, its control tokens cut out as the tokenizer would."""
        if literal not in self._pieces:
            self._pieces[literal] = self._cut(literal)
        return self._pieces[literal]

    def _cut(self, literal: str) -> tuple[Segment, ...]:
        if not self._tokens:
            return (Segment("text", literal),)
        # Longest first: of two tokens that begin alike the tokenizer takes the longer one.
        names = sorted(self._tokens, key=len, reverse=True)
        parts = re.split(f"({'|'.join(map(re.escape, names))})", literal)
        # Texts and tokens alternate. Phi-3's tokens swallow the white space after them.
        for i in range(1, len(parts), 2):
            token = self._tokens[parts[i]]
            parts[i - 1] = parts[i - 1].rstrip() if token.lstrip else parts[i - 1]
            parts[i + 1] = parts[i + 1].lstrip() if token.rstrip else parts[i + 1]
        return tuple(Segment("control" if i % 2 else "text", part) for i, part in enumerate(parts) if part)


_OWN: WeakKeyDictionary[PreTrainedTokenizerBase, tuple[str, int, OwnTemplate]] = WeakKeyDictionary()


def own_template(tokenizer: PreTrainedTokenizerBase) -> OwnTemplate:
    """A tokenizer's own chat template, ready to be followed; looked at once.

    Raises:
        InputError: There is none, or it cannot be followed; with the reason.
    """
    where = tokenizer.name_or_path or "the tokenizer"
    if not tokenizer.chat_template:
        raise InputError("has no chat template", where=where, mend=_MEND)
    try:
        jinja = original_template(tokenizer.get_chat_template())
    except ValueError:
        raise InputError("has several chat templates, none of them called default", where=where, mend=_MEND) from None
    known = _OWN.get(tokenizer)
    # Tokens added later (the image token) may be ones that the template writes.
    if known is None or known[:2] != (jinja, len(tokenizer)):
        try:
            known = (jinja, len(tokenizer), _look(jinja, tokenizer))
        except _Unfit as error:
            raise InputError(f"its chat template cannot be followed: it {error}", where=where, mend=_MEND) from None
        _OWN[tokenizer] = known
    return known[2]


def leave_start_to_template(tokenizer: PreTrainedTokenizerBase) -> None:
    """Switch off the start token that a tokenizer puts in front of any text, for one whose chat template is followed.

    The template writes the token where it wants one. A program that renders and then tokenises would else have two, or one that
    training never saw (Zephyr's template has none).
    """
    start = tokenizer.bos_token_id
    # Not the setting's own value: transformers has it false for tokenizers that add the token by their file.
    if start is not None and tokenizer("a").input_ids[:1] == [start] != tokenizer("a", add_special_tokens=False).input_ids[:1]:
        tokenizer.add_bos_token = False


def original_template(jinja: str) -> str:
    """A chat template as it was before mmkit extended it for a processor."""
    return jinja.partition(_END + "\n")[2] if jinja.startswith(_BEGIN) else jinja


def _look(jinja: str, tokenizer: PreTrainedTokenizerBase) -> OwnTemplate:
    """Find out how a template wants its messages. Raises _Unfit."""
    steady = (_DATE if "strftime_now" in jinja else "") + (_NO_THINKING if "enable_thinking" in jinja else "")
    tokens = {token.content: token for token in tokenizer.added_tokens_decoder.values()}
    special = tokenizer.special_tokens_map

    def made(*, as_parts: bool, folds: bool = False, added: frozenset[str] = frozenset(), end: str = "") -> OwnTemplate:
        flatten = flatten_messages(fold_system=folds, as_parts=as_parts).removesuffix("\n")
        # `original_template` finds the maker's template behind this head again, so that an extended one is never
        # extended twice.
        source = f"{_BEGIN}{steady}{flatten}{_END}\n{jinja}"
        return OwnTemplate(source, added, end, folds, f"{steady}{_END}\n{jinja}", special, tokens, as_parts)

    as_parts = False
    try:
        made(as_parts=False)._literals(1, system=False)
    except _Unfit as error:
        # Templates of models that have always had pictures may take lists only.
        as_parts = True
        try:
            made(as_parts=True)._literals(1, system=False)
        except _Unfit:
            raise error from None
    found = made(as_parts=as_parts)
    try:
        system = found._literals(2, system=True)
        folds = False
    except _Unfit:
        system, folds = [], True
    # Two turns: some templates write another text after an earlier answer than after the last one.
    opening, literals = found._literals(1, system=False, last=False)[-1], found._literals(2, system=False)
    single = found._literals(1, system=False)
    if not single[1].startswith(opening):
        raise _Unfit(f"opens an answer with {opening!r} to generate one, but with {single[1]!r} in a finished chat")
    ends = [next((s.text for s in found._split(text) if s.kind == "control"), None) for text in (single[2], *literals[2::2])]
    if None in ends:
        raise _Unfit("writes no control token after an answer, so a model would not learn to stop")
    written = [*literals, *system, opening]
    added = frozenset(s.text for text in written for s in found._split(text) if s.kind == "control")
    own = made(as_parts=as_parts, folds=folds, added=added, end=str(ends[0]))
    # What fails on these would leave out nearly every conversation, one by one.
    for texts in ([("How many dogs?", "Two, near the red bus.")], [("What is this?", "a dog")] * 2):
        try:
            own.render(texts, images=False, system=None)
        except ConversationError as error:
            raise _Unfit(f"cannot write plain texts ({error.reason})") from None
    return own
