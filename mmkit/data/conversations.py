"""Conversations as token sequences with labels, the label spans known by construction.

LLaVA renders a chat as text, tokenises it, and finds the answers again by tokenising the pieces a second time; where
the sums differ, the sample is masked in silence (facts/llava.md 1.4, 1.11). Here a conversation is a list of segments,
each tokenised once, and a token's label follows from the segment it came from.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from mmkit.data.chat import OwnTemplate, own_template
from mmkit.data.items import Conversation
from mmkit.data.pieces import (
    IMAGE_MARKER,
    ConversationError,
    PieceEncoder,
    Rendered,
    kind_after,
    piece_encoder,
    place_pictures,
)
from mmkit.data.templates import OWN, Template, get_template, template_jinja
from mmkit.errors import InputError
from mmkit.files import hash_text

# What torch's cross_entropy ignores by default, and LLaVA's value.
IGNORE_INDEX = -100
# Of what this module makes of a text: another number where it makes something else of it, so that kept lengths are not used.
_VERSION = "2"


@dataclass(frozen=True)
class EncodedConversation:
    """One training sequence.

    Attributes:
        input_ids: Token ids, image tokens expanded; no padding.
        labels: Same length: the id where supervised, else -100. Not shifted (the model's side shifts).
        num_supervised: How many labels are not -100; at least 1.
        cut: Whether turns or the end of an answer were dropped to fit the maximum length.
        num_images: Pictures that are kept: the first so many of the conversation.
    """

    input_ids: list[int]
    labels: list[int]
    # Known here, so that a sample without labels never reaches a batch: its mean loss would be NaN (facts/llava.md 1.11).
    num_supervised: int
    cut: bool = False
    num_images: int = 0


def find_template(template: str | Template, tokenizer: PreTrainedTokenizerBase) -> Template | OwnTemplate:
    """A template by name; ``chat`` is the tokenizer's own.

    Raises:
        InputError: An unknown name, or the tokenizer has no chat template that can be followed.
    """
    return own_template(tokenizer) if template == OWN else get_template(template)


def encode_conversation(
    turns: Sequence[tuple[str, str]],
    tokenizer: PreTrainedTokenizerBase,
    template: str | Template,
    *,
    num_images: int,
    tokens_per_image: int,
    image_token_id: int,
    max_length: int,
    system: str | None = None,
) -> EncodedConversation:
    """A conversation as ids and labels.

    What does not fit ``max_length`` (image tokens counted) goes from the end: whole turns, and the last turn that is
    kept may lose the end of its answer (with its end token). A picture is never cut: it goes with its turn.

    Args:
        turns: (question, answer) pairs; the questions hold as many ``<image>`` as there are pictures.
        tokenizer: A fast tokenizer.
        template: Name or template; ``chat`` is the tokenizer's own.
        num_images: Pictures; 0 for text only, where ``<image>`` is text like any other.
        tokens_per_image: Tokens each picture takes.
        image_token_id: The placeholder id they all get.
        max_length: Upper bound of the sequence's length.
        system: The conversation's own system text, in place of the template's.

    Returns:
        Ids, labels, number of supervised tokens, whether something was cut, and how many pictures are kept.

    Raises:
        ConversationError: No turns, an empty answer, the wrong number of markers, a text that the template rewrites, or nothing
            left to learn from.
        InputError: The template does not fit the tokenizer.
    """
    if not turns:
        raise ConversationError("no turns")
    # Only the end token would be learnt: to say nothing.
    if any(not answer.strip() for _, answer in turns):
        raise ConversationError("an answer is empty")
    chosen = find_template(template, tokenizer)
    _check_markers(turns, num_images)
    # Its questions are thrown away: without a picture, or for a second answer, nothing would lead to the text.
    if isinstance(chosen, Template) and chosen.image_only and (num_images == 0 or len(turns) != 1):
        raise ConversationError(f"the {chosen.name} template takes one turn with a picture")
    # Answers are stripped: the space in front of one is the template's (`Template.lead`), and must not come twice.
    placed = [(place_pictures(question, images=num_images > 0), answer.strip()) for question, answer in turns]
    # A blank system text is none: templates differ in what they would make of it.
    rendered = chosen.render(placed, images=num_images > 0, system=(system or "").strip() or None)
    encoder = piece_encoder(tokenizer, chosen.added if isinstance(chosen, OwnTemplate) else frozenset())
    encoded = _fill(rendered, encoder, [image_token_id] * tokens_per_image, max_length)
    if encoded.num_supervised == 0:
        raise ConversationError(f"no answer token fits {max_length} tokens")
    return encoded


def _check_markers(turns: Sequence[tuple[str, str]], num_images: int) -> None:
    """Raises ConversationError unless there is one marker for each picture."""
    found = sum(question.count(IMAGE_MARKER) for question, _ in turns)
    if num_images and found != num_images:
        need = "one picture needs one" if num_images == 1 else f"{num_images} pictures need as many"
        raise ConversationError(f"{need} {IMAGE_MARKER} in the questions, found {found}")


def _fill(rendered: Rendered, encoder: PieceEncoder, image: list[int], max_length: int) -> EncodedConversation:
    """The turns that fit, one after the other."""
    ids = list(encoder.bos) if rendered.starts else []
    # "start" also behind the start token: a tokenizer puts that on last, after the space in front of the text.
    labels, cut, before, pictures, supervised = [IGNORE_INDEX] * len(ids), False, "start", 0, 0
    for turn in rendered.turns:
        # Prompt and reply are tokenised apart: a token over the border would be half supervised, and no prompt could end there.
        prompt = encoder.segments(turn.prompt, before=before, image=image)
        before = kind_after(turn.prompt[-1]) if turn.prompt else before
        reply = encoder.segments(turn.reply, before=before, image=[])
        before = kind_after(turn.reply[-1])
        room = max_length - len(ids) - len(prompt)
        # A prompt without at least one answer token teaches nothing, so the whole turn goes, its pictures with it.
        if room <= 0:
            cut = True
            break
        cut = len(reply) > room
        kept = reply[:room]
        ids += prompt + kept
        labels += [IGNORE_INDEX] * len(prompt) + kept
        supervised += len(kept)
        # Of kept turns only: a picture without tokens in the sequence has no place for its features.
        pictures += sum(segment.kind == "image" for segment in turn.prompt)
        if cut:
            break
    tail = encoder.segments(rendered.tail, before=before, image=[])
    # Nobody learns from it, so it counts as no cut where it does not fit.
    if not cut and len(ids) + len(tail) <= max_length:
        ids, labels = ids + tail, labels + [IGNORE_INDEX] * len(tail)
    return EncodedConversation(ids, labels, supervised, cut, pictures)


def encode_prompt(
    question: str,
    tokenizer: PreTrainedTokenizerBase,
    template: str | Template,
    *,
    num_images: int,
    tokens_per_image: int,
    image_token_id: int,
    system: str | None = None,
) -> list[int]:
    """Ids to generate from: exactly how the training sequence of the same first question begins.

    Args:
        question: The question; its ``<image>`` may be left out, pictures then go to the front.
        tokenizer: A fast tokenizer.
        template: Name or template; ``chat`` is the tokenizer's own.
        num_images: Pictures that come with it; with none ``<image>`` in the question is plain text.
        tokens_per_image: Tokens each picture takes.
        image_token_id: The placeholder id they all get.
        system: System text in place of the template's.

    Returns:
        The ids, unpadded.

    Raises:
        InputError: Some markers, but not one for each picture; a text that the template rewrites; or a template that does not fit
            the tokenizer.
    """
    if num_images and IMAGE_MARKER not in question:
        question = f"{IMAGE_MARKER}\n" * num_images + question
    chosen = find_template(template, tokenizer)
    try:
        _check_markers([(question, "")], num_images)
        return _encode_prompt(chosen, question, tokenizer, num_images > 0, [image_token_id] * tokens_per_image, system)
    # Here it is no sample of many that could be replaced, but what somebody asked.
    except ConversationError as error:
        what = f"cannot be asked: {error.reason}"
        raise InputError(what, where=repr(question[:80]), mend="write the question otherwise") from None


def _encode_prompt(
    chosen: Template | OwnTemplate,
    question: str,
    tokenizer: PreTrainedTokenizerBase,
    images: bool,
    image: list[int],
    system: str | None,
) -> list[int]:
    question, system = place_pictures(question, images=images), (system or "").strip() or None
    if isinstance(chosen, OwnTemplate):
        encoder = piece_encoder(tokenizer, chosen.added)
        # Without the tokenizer's start token: a chat template writes its own where it wants one.
        return encoder.segments(chosen.prompt(question, images=images, system=system), before="start", image=image)
    encoder = piece_encoder(tokenizer)
    segments = chosen.prompt_segments(question, images=images, system=system)
    # The same calls as in training, so that the prompt is a prefix of the training sequence by construction.
    return encoder.bos + encoder.segments(segments, before="start", image=image)


def chat_template(template: str | Template, tokenizer: PreTrainedTokenizerBase) -> str:
    """The template as the Hugging Face chat template (Jinja) of a processor.

    Contents are texts or lists of ``{"type": "image"}`` and ``{"type": "text", "text": ...}``. What it renders tokenises to the
    ids of `encode_conversation`, except that rendering cannot protect special tokens spelt out in a message.
    """
    chosen = find_template(template, tokenizer)
    return chosen.source if isinstance(chosen, OwnTemplate) else template_jinja(chosen)


def stop_tokens(template: str | Template, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Ids at which generation ends: what the template writes after an answer, and the tokenizer's own end token."""
    chosen = find_template(template, tokenizer)
    if isinstance(chosen, OwnTemplate):
        ends = [piece_encoder(tokenizer).control(chosen.end)]
    else:
        # A text such as plain's newline is no token to stop at.
        ends = [piece_encoder(tokenizer).control(part.text) for part in chosen.split(chosen.end) if part.kind == "control"]
    own = tokenizer.eos_token_id
    return list(dict.fromkeys([*ends, *([] if own is None else [own])]))


@dataclass(frozen=True)
class ConversationEncoder:
    """`encode_conversation` with everything but the conversation fixed. A class and no closure: it goes to other processes.

    Attributes:
        tokenizer: With the image token.
        template: Name.
        tokens_per_image: Tokens each picture takes.
        image_token_id: Their id.
        max_length: Upper bound of a sequence's length.
    """

    tokenizer: PreTrainedTokenizerBase
    template: str
    tokens_per_image: int
    image_token_id: int
    max_length: int

    def __call__(self, item: Conversation) -> EncodedConversation:
        """One conversation. Raises ConversationError, as `encode_conversation`."""
        return encode_conversation(
            item.turns,
            self.tokenizer,
            self.template,
            num_images=len(item.images),
            # Image tokens are part of the length: LLaVA cuts after expansion and so loses answers (facts/llava.md 1.5).
            tokens_per_image=self.tokens_per_image,
            image_token_id=self.image_token_id,
            max_length=self.max_length,
            system=item.system,
        )

    def fingerprint(self) -> str:
        """Hash of all that decides what a conversation becomes."""
        if not self.tokenizer.is_fast:
            raise InputError("conversations need a fast tokenizer", mend="use one with a tokenizer.json")
        # The text of the template, not its name alone: "chat" is another one with every tokenizer.
        rest = (self.template, chat_template(self.template, self.tokenizer), _VERSION)
        numbers = (self.tokens_per_image, self.image_token_id, self.max_length)
        # Which tokens these are is a setting of transformers', which the tokenizer's own JSON does not hold.
        special = (self.tokenizer.bos_token, self.tokenizer.eos_token)
        return hash_text(self.tokenizer.backend_tokenizer.to_str(), *rest, *map(str, (*numbers, *special)))
