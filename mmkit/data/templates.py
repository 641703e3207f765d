"""mmkit's own conversation templates: how questions and answers become one text, and the same as a Hugging Face chat template."""

from __future__ import annotations

import re
from dataclasses import dataclass

from mmkit.data.pieces import EOS, IMAGE_MARKER, Rendered, RenderedTurn, Segment, content_segments, joined
from mmkit.errors import InputError

# The name of the template that a tokenizer brings with it; see `mmkit.data.chat`.
OWN = "chat"


@dataclass(frozen=True)
class Template:
    """How turns become one text.

    A sequence is ``system_before`` system ``system_after``, then per turn ``user`` question ``assistant`` ``lead`` answer
    ``end``, with ``between`` in front of every turn but the first. Supervised are ``lead``, answer and ``end``.

    Attributes:
        name: Its key in TEMPLATES.
        system: System text of conversations that have none of their own; empty: those have no system part at all.
        system_before: In front of the system text.
        system_after: After it.
        user: In front of a question.
        assistant: After a question; a prompt for generation ends here.
        lead: What the model writes before its answer (a space); kept out of the prompt so that the space can merge
            with the first word, as it does in running text.
        end: After an answer: control token, text, or EOS.
        between: After ``end``, where another turn follows.
        controls: The control tokens inside the texts above; the tokenizer must have each as one token.
        image_only: Question and system text are thrown away, only pictures kept (LLaVA's "plain").
    """

    name: str
    system: str = ""
    system_before: str = ""
    system_after: str = ""
    user: str = ""
    assistant: str = ""
    lead: str = ""
    end: str = EOS
    between: str = ""
    controls: tuple[str, ...] = ()
    image_only: bool = False

    def system_segments(self, system: str | None) -> list[Segment]:
        """The system part; a conversation's own text takes the place of the template's."""
        text = system or self.system
        if not text or self.image_only:
            return []
        return [*self.split(self.system_before), Segment("text", text), *self.split(self.system_after)]

    def prompt_segments(self, question: str, *, images: bool, system: str | None = None, first: bool = True) -> list[Segment]:
        """Everything of a turn up to where the model begins to write.

        Args:
            question: As `place_pictures` gives it.
            images: Whether ``<image>`` in it stands for a picture.
            system: The conversation's own system text.
            first: Whether this is the first turn.
        """
        content = content_segments(question, images=images)
        if self.image_only:
            content = [segment for segment in content if segment.kind == "image"]
        before = self.system_segments(system) if first else self.split(self.between)
        return joined([*before, *self.split(self.user), *content, *self.split(self.assistant)])

    def render(self, turns: list[tuple[str, str]], *, images: bool, system: str | None) -> Rendered:
        """The segments of a conversation; texts as `place_pictures` and ``strip`` leave them."""
        out = []
        for index, (question, answer) in enumerate(turns):
            prompt = self.prompt_segments(question, images=images, system=system, first=index == 0)
            # The end goes with the answer: it is supervised, and without it the model would not learn to stop.
            reply = joined([Segment("text", self.lead + answer), *self.split(self.end)])
            out.append(RenderedTurn(prompt, reply))
        return Rendered(out, [], starts=True)

    def split(self, text: str) -> list[Segment]:
        """Segments of one of the template's own texts, its control tokens cut out."""
        if text == EOS:
            return [Segment("control", EOS)]
        # Only the template's own text is searched; questions and answers never pass through here.
        pattern = "|".join(re.escape(token) for token in self.controls)
        parts = re.split(f"({pattern})", text) if pattern else [text]
        return [Segment("control" if part in self.controls else "text", part) for part in parts if part]


# Word for word: the published weights were tuned under this sentence (facts/llava.md 1.4).
VICUNA_SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)

TEMPLATES: dict[str, Template] = {
    # A newline in place of an end token, as in the published alignment stage (facts/llava.md 1.4).
    "plain": Template("plain", end="\n", image_only=True),
    # The colon ends the prompt: the space after it belongs to the answer's first token ("▁two"), and is supervised with it.
    "vicuna_v1": Template("vicuna_v1", system=VICUNA_SYSTEM, system_after=" ", user="USER: ", assistant=" ASSISTANT:", lead=" "),
    # No system sentence: the demo's model was never tuned under one, and its turns are a few tokens long.
    "demo": Template("demo", system_after=" ", user="USER: ", assistant=" ASSISTANT:", lead=" "),
    "chatml": Template(
        "chatml",
        system="You are a helpful assistant.",
        system_before="<|im_start|>system\n",
        system_after="<|im_end|>\n",
        user="<|im_start|>user\n",
        assistant="<|im_end|>\n<|im_start|>assistant\n",
        end="<|im_end|>",
        # Behind the token at which generation stops, so it is read with the next question and never learnt.
        between="\n",
        controls=("<|im_start|>", "<|im_end|>"),
    ),
}


def get_template(template: str | Template) -> Template:
    """One of mmkit's own templates by name.

    Raises:
        InputError: For an unknown name.
    """
    if isinstance(template, Template):
        return template
    if template not in TEMPLATES:
        known = ", ".join((*TEMPLATES, OWN))
        raise InputError(f"unknown conversation template {template!r}", where="template", mend=f"use one of {known}")
    return TEMPLATES[template]


def quote(text: str) -> str:
    """A text as a Jinja string literal."""
    # Backslashes first, or the ones that escape quotes would be doubled.
    return "'" + text.replace("\\", "\\\\").replace("'", "\\'").replace("\n", "\\n") + "'"


def flatten_messages(*, fold_system: bool = False, as_parts: bool = False) -> str:
    """Jinja that turns the ``messages`` of a chat into ones with plain text contents, pictures as ``<image>``.

    It does to contents what `mmkit.data.pieces.flatten_parts` and `place_pictures` do, so that any template which takes texts can
    follow. Rendered text cannot tell a picture's marker from one spelt out by a user; only `encode_conversation` can.

    Args:
        fold_system: Put the system text in front of the first question, for templates that have no place for it.
        as_parts: Give contents as a list of one text part, for templates that take nothing else.
    """
    marker, line = quote(IMAGE_MARKER), quote(IMAGE_MARKER + "\n")
    content = "[dict(type='text', text=mmkit.text | trim)]" if as_parts else "mmkit.text | trim"
    keep = f"{{%- set mmkit.messages = mmkit.messages + [dict(message, content={content})] -%}}"
    if fold_system:
        keep = (
            "{%- if message['role'] == 'system' -%}{%- set mmkit.system = (mmkit.text | trim) + '\\n\\n' -%}{%- else -%}"
            f"{keep}{{%- endif -%}}"
        )
    return (
        # A namespace: Jinja forgets a plain variable that is set inside a loop.
        "{%- set mmkit = namespace(messages=[], text='', system='') -%}"
        "{%- for message in messages -%}"
        "{%- set mmkit.text = '' -%}"
        "{%- if message['content'] is string -%}{%- set mmkit.text = message['content'] -%}"
        "{%- elif message['content'] -%}"
        "{%- for part in message['content'] -%}"
        f"{{%- if part['type'] == 'image' -%}}{{%- set mmkit.text = mmkit.text + {line} -%}}"
        "{%- else -%}{%- set mmkit.text = mmkit.text + part['text'] -%}{%- endif -%}"
        "{%- endfor -%}{%- endif -%}"
        "{%- if message['role'] == 'user' -%}"
        f"{{%- set front = {line} if mmkit.text.count({marker}) == 1 else '' -%}}"
        f"{{%- set text = mmkit.text.replace({marker}, '') if front else mmkit.text -%}}"
        # Emptied once it is used: a system text stands in front of the first question alone.
        "{%- set mmkit.text = front + mmkit.system + (text | trim) -%}{%- set mmkit.system = '' -%}"
        "{%- endif -%}"
        f"{keep}"
        "{%- endfor -%}"
        # No dash at the end: what follows may begin with white space of its own. The newline goes with the block (trim_blocks).
        "{%- set messages = mmkit.messages %}\n"
    )


def template_jinja(template: Template) -> str:
    """One of mmkit's own templates as a Hugging Face chat template (Jinja).

    Messages have the roles system (first, if at all), user and assistant; contents are texts or lists of ``{"type": "image"}``
    and ``{"type": "text", "text": ...}``. The rendered text tokenises to the ids of `encode_conversation`, except that rendering
    cannot protect special tokens spelt out in a message.
    """
    t = template
    end = "eos_token" if t.end == EOS else quote(t.end)
    question = (
        f"{quote(IMAGE_MARKER)} * message['content'].count({quote(IMAGE_MARKER)})" if t.image_only else "message['content']"
    )
    before, after = quote(t.system_before), quote(t.system_after)
    default = quote(t.system_before + t.system + t.system_after) if t.system else "''"
    system = "''" if t.image_only else f"{before} + messages[0]['content'] + {after}"
    return (
        f"{flatten_messages()}"
        "{%- if messages[0]['role'] == 'system' and messages[0]['content'] -%}"
        f"{{{{- {system} -}}}}{{%- else -%}}{{{{- {default} -}}}}{{%- endif -%}}"
        "{%- set turns = messages[1:] if messages[0]['role'] == 'system' else messages -%}"
        "{%- for message in turns -%}"
        "{%- if message['role'] == 'user' -%}"
        f"{{{{- '' if loop.first else {quote(t.between)} -}}}}{{{{- {quote(t.user)} + {question} -}}}}"
        f"{{%- if not loop.last or add_generation_prompt -%}}{{{{- {quote(t.assistant)} -}}}}{{%- endif -%}}"
        "{%- elif message['role'] == 'assistant' -%}"
        f"{{{{- {quote(t.lead)} + message['content'] + {end} -}}}}"
        # Dropping a message of another role in silence would be worse.
        "{%- else -%}{{- raise_exception('unknown role ' + message['role']) -}}{%- endif -%}"
        "{%- endfor -%}"
    )
