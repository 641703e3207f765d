"""Conversations as token sequences with labels, the label spans known by construction.

LLaVA renders a chat as text, tokenises it, and finds the answers again by tokenising the pieces a second time; where
the sums differ, the sample is masked in silence (facts/llava.md 1.4, 1.11). Here a conversation is a list of segments,
each tokenised once, and a token's label follows from the segment it came from. Only the template's own control tokens
become control tokens: the same characters inside a question or an answer are plain text.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

from tokenizers import Tokenizer
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from mmkit.data.skipped import SampleError
from mmkit.errors import InputError

# LLaVA's own spelling, in its files and in transformers' processor.
IMAGE_MARKER = "<image>"
# What torch's cross_entropy ignores by default, and LLaVA's value.
IGNORE_INDEX = -100
EOS = "{eos}"  # in a template's `end`: the tokenizer's own end token, whatever it is called


class ConversationError(SampleError):
    """This sample cannot be used; `reason` says why, for the list of what was left out."""

    def __init__(self, reason: str) -> None:
        """Keep the reason beside the message."""
        self.reason = reason
        super().__init__(reason)


@dataclass(frozen=True)
class Template:
    """How turns become one text.

    A sequence is ``system``, then per turn ``user`` [image and newline] question ``assistant`` ``lead`` answer ``end``,
    with ``between`` in front of every turn but the first. Supervised are ``lead``, answer and ``end``.

    Attributes:
        name: Its key in TEMPLATES.
        system: Text in front of the first turn.
        user: In front of a question.
        assistant: After a question; a prompt for generation ends here.
        lead: What the model writes before its answer (a space); kept out of the prompt so that the space can merge
            with the first word, as it does in running text.
        end: After an answer: control token, text, or EOS.
        between: After ``end``, where another turn follows.
        controls: The control tokens inside the texts above; the tokenizer must have each as one token.
        image_only: The question is thrown away and only its picture kept (LLaVA's "plain").
    """

    name: str
    system: str = ""
    user: str = ""
    assistant: str = ""
    lead: str = ""
    end: str = EOS
    between: str = ""
    controls: tuple[str, ...] = ()
    image_only: bool = False


# Word for word: the published weights were tuned under this sentence (facts/llava.md 1.4).
VICUNA_SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions. "
)

TEMPLATES: dict[str, Template] = {
    # A newline in place of an end token, as in the published alignment stage (facts/llava.md 1.4).
    "plain": Template("plain", end="\n", image_only=True),
    # The colon ends the prompt: the space after it belongs to the answer's first token ("▁two"), and is supervised with it.
    "vicuna_v1": Template("vicuna_v1", system=VICUNA_SYSTEM, user="USER: ", assistant=" ASSISTANT:", lead=" "),
    # No system sentence: the demo's model was never tuned under one, and its turns are a few tokens long.
    "demo": Template("demo", user="USER: ", assistant=" ASSISTANT:", lead=" "),
    "chatml": Template(
        "chatml",
        system="<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n",
        user="<|im_start|>user\n",
        assistant="<|im_end|>\n<|im_start|>assistant\n",
        end="<|im_end|>",
        between="\n",
        controls=("<|im_start|>", "<|im_end|>"),
    ),
}


def get_template(template: str | Template) -> Template:
    """A template by name.

    Raises:
        InputError: For an unknown name.
    """
    if isinstance(template, Template):
        return template
    if template not in TEMPLATES:
        raise InputError(f"unknown conversation template {template!r}", mend=f"use one of {', '.join(TEMPLATES)}")
    return TEMPLATES[template]


@dataclass(frozen=True)
class EncodedConversation:
    """One training sequence.

    Attributes:
        input_ids: Token ids, image tokens expanded; no padding.
        labels: Same length: the id where supervised, else -100. Not shifted (the model's side shifts).
        num_supervised: How many labels are not -100; at least 1.
        cut: Whether turns or the end of an answer were dropped to fit the maximum length.
    """

    input_ids: list[int]
    labels: list[int]
    # Known here, so that a sample without labels never reaches a batch: its mean loss would be NaN (facts/llava.md 1.11).
    num_supervised: int
    cut: bool = False


class _Segment(NamedTuple):
    """A stretch of a sequence: running text, one control token, or the place of the picture."""

    kind: str  # "text", "control" or "image"
    text: str = ""


@dataclass
class _Encoder:
    """Tokenises running text piece by piece, as the tokenizer would the whole text.

    Two things differ from calling the tokenizer on a piece: a leading space that SentencePiece tokenizers add is added
    where the whole text would get it and nowhere else, and special tokens spelt out in the text stay plain text.
    """

    tokenizer: PreTrainedTokenizerBase
    size: int
    full: Tokenizer
    bare: Tokenizer
    prefix_everywhere: bool
    bos: list[int]
    # Special ids that may not come out of running text; the unknown token is not among them, any odd character gives it.
    forbidden: frozenset[int] = field(default_factory=frozenset)

    def text(self, text: str, before: str) -> list[int]:
        """Ids of running text that follows ``before``: "start", "control" (image included) or "text"."""
        # After other text never: the whole text, of which both are parts, has no added space there.
        prefixed = before == "start" or (before == "control" and self.prefix_everywhere)
        ids = (self.full if prefixed else self.bare).encode(text, add_special_tokens=False).ids
        # A tokenizer whose vocabulary spells a control token as an ordinary piece; such a text could end a turn early.
        if not self.forbidden.isdisjoint(ids):
            raise ConversationError("the text spells a control token that this tokenizer cannot keep as text")
        return ids

    def control(self, text: str) -> int:
        """Id of a control token of the template.

        Raises:
            InputError: When the tokenizer lacks it.
        """
        if text == EOS:
            found = self.tokenizer.eos_token_id
            if found is None:
                raise InputError("the tokenizer has no end token", mend="set its eos_token")
            return found
        # A missing token comes back as the unknown one and not as an error, hence the check below.
        found = self.tokenizer.convert_tokens_to_ids(text)
        if found is None or (found == self.tokenizer.unk_token_id and text != self.tokenizer.unk_token):
            raise InputError(f"the tokenizer has no token {text!r}", mend="choose another conversation template")
        return found

    def segments(self, segments: list[_Segment], *, before: str, image: list[int]) -> list[int]:
        """Ids of consecutive segments; ``before`` says what they follow, ``image`` stands for the picture."""
        ids: list[int] = []
        for segment in segments:
            if segment.kind == "image":
                ids += image
            elif segment.kind == "control":
                ids.append(self.control(segment.text))
            else:
                ids += self.text(segment.text, before)
            # A picture counts as a control token: its placeholder is one for the tokenizer.
            before = "text" if segment.kind == "text" else "control"
        return ids


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
_ENCODERS: WeakKeyDictionary[PreTrainedTokenizerBase, _Encoder] = WeakKeyDictionary()


def _encoder(tokenizer: PreTrainedTokenizerBase) -> _Encoder:
    """The piecewise encoder of a tokenizer, made once and again after tokens were added."""
    made = _ENCODERS.get(tokenizer)
    # Adding the image token changes the size; an encoder from before would split it into pieces.
    if made is not None and made.size == len(tokenizer):
        return made
    if not tokenizer.is_fast:
        raise InputError("conversations need a fast tokenizer", mend="use one with a tokenizer.json")
    # Copies: the switches below must not change how the caller's own tokenizer behaves.
    source = tokenizer.backend_tokenizer.to_str()
    state, everywhere = _without_prefix(json.loads(source))
    full, bare = Tokenizer.from_str(source), Tokenizer.from_str(json.dumps(state))
    for backend in (full, bare):
        backend.no_truncation()
        backend.no_padding()
        # The setting that turns special tokens inside a text into plain text.
        backend.encode_special_tokens = True
    bos = tokenizer.bos_token_id
    # Asked of the tokenizer, not guessed from its class: whether it puts the start token in front of a text.
    starts = tokenizer("a").input_ids[:1] == [bos] and tokenizer("a", add_special_tokens=False).input_ids[:1] != [bos]
    # A genuine unk inside a text is an ordinary token; LLaVA drops it with the padding (facts/llava.md 1.4).
    special = frozenset(tokenizer.all_special_ids) - {tokenizer.unk_token_id}
    made = _Encoder(tokenizer, len(tokenizer), full, bare, everywhere, [bos] if starts else [], special)
    _ENCODERS[tokenizer] = made
    return made


def _split(template: Template, text: str) -> list[_Segment]:
    """Segments of a template text, its control tokens cut out."""
    if text == EOS:
        return [_Segment("control", EOS)]
    # Only the template's own text is searched; questions and answers never pass through here.
    pattern = "|".join(re.escape(token) for token in template.controls)
    parts = re.split(f"({pattern})", text) if pattern else [text]
    return [_Segment("control" if part in template.controls else "text", part) for part in parts if part]


def _joined(segments: list[_Segment]) -> list[_Segment]:
    """Neighbouring texts as one, so that words merge over the joints as they do in running text."""
    out: list[_Segment] = []
    for segment in segments:
        if out and segment.kind == "text" == out[-1].kind:
            out[-1] = _Segment("text", out[-1].text + segment.text)
        else:
            out.append(segment)
    return out


def _prompt_segments(template: Template, question: str, *, first: bool, image: bool) -> list[_Segment]:
    """Everything of a turn up to where the model begins to write.

    The image marker is moved to the front of its turn, followed by a newline (facts/llava.md 1.3).
    """
    # Once: where the caller allows a single marker, another one is text.
    text = question.replace(IMAGE_MARKER, "", 1) if image else question
    segments = _split(template, template.system if first else template.between) + _split(template, template.user)
    if image:
        segments.append(_Segment("image"))
    if not template.image_only:
        # Stripped: a stray space would make another prompt of the same question.
        segments.append(_Segment("text", ("\n" if image else "") + text.strip()))
    # An empty piece must go: what comes next would count as following text and lose its leading space.
    return _joined([part for part in segments + _split(template, template.assistant) if part.text or part.kind == "image"])


def _image_turn(turns: list[tuple[str, str]], num_image_tokens: int) -> int | None:
    """Index of the turn with the picture; None for a text-only conversation, whose markers are plain text.

    Raises:
        ConversationError: When there is a picture but not exactly one marker.
    """
    # The picture decides, not the text: a user may write about "<image>" without showing one.
    if num_image_tokens == 0:
        return None
    found = [index for index, (question, _) in enumerate(turns) for _ in range(question.count(IMAGE_MARKER))]
    if len(found) != 1:
        raise ConversationError(f"one picture needs one {IMAGE_MARKER} in the questions, found {len(found)}")
    return found[0]


def encode_conversation(
    turns: list[tuple[str, str]],
    tokenizer: PreTrainedTokenizerBase,
    template: str | Template,
    *,
    num_image_tokens: int,
    image_token_id: int,
    max_length: int,
) -> EncodedConversation:
    """A conversation as ids and labels.

    What does not fit ``max_length`` (image tokens counted) goes from the end: whole turns, and the last turn that is
    kept may lose the end of its answer (with its end token). A picture is never cut.

    Args:
        turns: (question, answer) pairs; with a picture, exactly one question holds ``<image>``.
        tokenizer: A fast tokenizer.
        template: Name or template.
        num_image_tokens: Tokens the picture takes; 0 for text only.
        image_token_id: The placeholder id they all get.
        max_length: Upper bound of the sequence's length.

    Returns:
        Ids, labels, number of supervised tokens, and whether something was cut.

    Raises:
        ConversationError: No turns, an empty answer, the wrong number of markers, or nothing left to learn from.
    """
    chosen, encoder = get_template(template), _encoder(tokenizer)
    if not turns:
        raise ConversationError("no turns")
    # Only the end token would be learnt: to say nothing.
    if any(not answer.strip() for _, answer in turns):
        raise ConversationError("an answer is empty")
    picture = _image_turn(turns, num_image_tokens)
    if chosen.image_only and (picture is None or len(turns) != 1):
        raise ConversationError(f"the {chosen.name} template takes one turn with a picture")
    ids, labels, cut = list(encoder.bos), [IGNORE_INDEX] * len(encoder.bos), False
    image = [image_token_id] * num_image_tokens
    for index, (question, answer) in enumerate(turns):
        before = _prompt_segments(chosen, question, first=index == 0, image=index == picture)
        # Prompt and reply are tokenised apart: a token over the border would be half supervised, and no prompt could end there.
        prompt = encoder.segments(before, before="control" if index else "start", image=image)
        # The end goes with the answer: it is supervised, and without it the model would not learn to stop.
        after = _joined([_Segment("text", chosen.lead + answer.strip()), *_split(chosen, chosen.end)])
        # With no prompt text at all the answer opens the sequence.
        kind = ("text" if before[-1].kind == "text" else "control") if before else "start"
        reply = encoder.segments(after, before=kind, image=[])
        room = max_length - len(ids) - len(prompt)
        # A prompt without at least one answer token teaches nothing, so the whole turn goes.
        if room <= 0:
            cut = True
            if picture is not None and picture >= index:
                # Leaving the picture out instead would train answers about something that is not shown.
                raise ConversationError(f"the picture's turn does not fit {max_length} tokens")
            break
        cut = len(reply) > room
        ids += prompt + reply[:room]
        labels += [IGNORE_INDEX] * len(prompt) + reply[:room]
        if cut:
            if picture is not None and picture > index:
                raise ConversationError(f"the picture's turn does not fit {max_length} tokens")
            break
    supervised = sum(label != IGNORE_INDEX for label in labels)
    if supervised == 0:
        raise ConversationError(f"no answer token fits {max_length} tokens")
    return EncodedConversation(ids, labels, supervised, cut)


def encode_prompt(
    question: str,
    tokenizer: PreTrainedTokenizerBase,
    template: str | Template,
    *,
    with_image: bool,
    num_image_tokens: int,
    image_token_id: int,
) -> list[int]:
    """Ids to generate from: exactly how the training sequence of the same first question begins.

    Args:
        question: The question; with a picture its ``<image>`` may be left out (it goes to the front).
        tokenizer: A fast tokenizer.
        template: Name or template.
        with_image: Whether a picture comes with it; if not, ``<image>`` in the question is plain text.
        num_image_tokens: Tokens the picture takes.
        image_token_id: The placeholder id they all get.

    Returns:
        The ids, unpadded.
    """
    chosen, encoder = get_template(template), _encoder(tokenizer)
    segments = _prompt_segments(chosen, question, first=True, image=with_image)
    image = [image_token_id] * num_image_tokens
    # The same calls as in training, so that the prompt is a prefix of the training sequence by construction.
    return encoder.bos + encoder.segments(segments, before="start", image=image)


def _quote(text: str) -> str:
    """A text as a Jinja string literal."""
    # Backslashes first, or the ones that escape quotes would be doubled.
    return "'" + text.replace("\\", "\\\\").replace("'", "\\'").replace("\n", "\\n") + "'"


def chat_template(template: str | Template) -> str:
    """The template as a Hugging Face chat template (Jinja).

    Messages have the roles user and assistant, contents are texts or lists of ``{"type": "image"}`` and
    ``{"type": "text", "text": ...}``; a picture goes to the front of its message. The rendered text tokenises to the ids
    of `encode_conversation`, except that rendering cannot protect special tokens spelt out in a message.
    """
    chosen = get_template(template)
    end = "eos_token" if chosen.end == EOS else _quote(chosen.end)
    picture = _quote(IMAGE_MARKER if chosen.image_only else IMAGE_MARKER + "\n")
    words = "" if chosen.image_only else "{{- ns.text | trim -}}"
    return (
        "{%- for message in messages -%}"
        # A namespace: Jinja forgets a plain variable that is set inside a loop.
        "{%- set ns = namespace(text='') -%}"
        "{%- if message['role'] == 'user' -%}"
        f"{{{{- {_quote(chosen.system)} if loop.first else {_quote(chosen.between)} -}}}}"
        f"{{{{- {_quote(chosen.user)} -}}}}"
        "{%- if message['content'] is string -%}{%- set ns.text = message['content'] -%}{%- else -%}"
        "{%- for part in message['content'] -%}"
        f"{{%- if part['type'] == 'image' -%}}{{{{- {picture} -}}}}"
        "{%- else -%}{%- set ns.text = ns.text + part['text'] -%}{%- endif -%}"
        "{%- endfor -%}{%- endif -%}"
        f"{words}"
        f"{{%- if not loop.last or add_generation_prompt -%}}{{{{- {_quote(chosen.assistant)} -}}}}{{%- endif -%}}"
        "{%- elif message['role'] == 'assistant' -%}"
        "{%- if message['content'] is string -%}{%- set ns.text = message['content'] -%}{%- else -%}"
        "{%- for part in message['content'] -%}{%- set ns.text = ns.text + part['text'] -%}{%- endfor -%}{%- endif -%}"
        f"{{{{- {_quote(chosen.lead)} + (ns.text | trim) + {end} -}}}}"
        # No template has a place for a system role; dropping the message in silence would be worse.
        "{%- else -%}{{- raise_exception('unknown role ' + message['role']) -}}{%- endif -%}"
        "{%- endfor -%}"
    )
