"""What is said about a scene: captions, questions with balanced answers, conversations."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from mmkit.data.world.scene import COLORS, SHAPES, Group, Scene

# Words in captions, digits in answers, as people write both; VQA's normalisation makes digits of number words.
NUMBERS = {1: "one", 2: "two", 3: "three"}
# LLaVA-1.5's own response-format sentence, newline included.
SHORT_ANSWER = "\nAnswer the question using a single word or phrase."
# The first one is also what the alignment stage and prediction without a prompt ask.
CAPTION_REQUESTS = ("Describe the picture.", "Write a short caption.", "What does it show?")
WORD_QUESTIONS = ("What word is written?", "What does the sign say?", "Which word can be read?")
# Conversations without a picture keep the text-only path in use.
TEXT_ONLY = (
    ("Which number comes after one?", "two"),
    ("Which number comes before three?", "two"),
    ("Is red a color?", "yes"),
    ("Is a circle a color?", "no"),
    ("Name a shape.", "circle"),
    ("Name a color.", "blue"),
)


@dataclasses.dataclass(frozen=True)
class Question:
    """A question with its answer; ``kind`` is VQA v2's answer type, or ``text`` for the rendered word."""

    text: str
    answer: str
    kind: str
    type: str


def noun(group: Group) -> str:
    """``red circle`` or ``red circles``."""
    return f"{group.color} {plural(group.shape, group.count)}"


def plural(shape: str, count: int) -> str:
    """The shape's name for a count."""
    if count == 1:
        return shape
    return f"{shape}es" if shape.endswith("s") else f"{shape}s"


def phrase(group: Group) -> str:
    """``a red circle``, ``an orange ring``, ``two red circles``."""
    if group.count > 1:
        return f"{NUMBERS[group.count]} {noun(group)}"
    return f"{'an' if group.color[0] in 'aeiou' else 'a'} {noun(group)}"


def at(place: str) -> str:
    """``at the top``, ``in the middle``."""
    return f"{'in' if place == 'middle' else 'at'} the {place}"


def captions(scene: Scene) -> list[str]:
    """Five captions: the plain one, and four other ways to say the same."""
    placed = [f"{phrase(g)} {at(g.place)}" for g in scene.groups]
    # The one that conversations end with; with the other four the scorers have five references, as on COCO.
    plain = " and ".join(placed) + (f" with the word {scene.word}" if scene.word else "")
    verb = "is" if scene.groups[0].count == 1 else "are"
    tail = f" and the word {scene.word}" if scene.word else ""
    reverse = " and ".join(f"the {g.place} shows {phrase(g)}" for g in scene.groups)
    return [
        plain,
        f"a picture of {plain}",
        f"there {verb} {plain}",
        f"{', '.join(placed)}{tail}",
        f"{reverse}{tail}",
    ]


def questions(scene: Scene, rng: np.random.Generator) -> list[Question]:
    """Five questions about the shapes: two yes/no, one number, two other.

    Answers are balanced: presence is a coin for each question by itself (a yes and a no in every picture would let the second
    answer be told from the first), half of the pictures have a word and half have two colours, each colour and shape is asked for
    as often with either answer, and counts, colours, shapes and places are uniform.
    """
    pick = [scene.groups[int(rng.integers(len(scene.groups)))] for _ in range(3)]
    # The coin comes first and the question is made to fit it, so that yes and no are even whatever the picture holds.
    yes_no = [_presence(scene, pick[0], "yes" if rng.random() < 0.5 else "no", rng), *_structure(scene)]
    # By shape and always plural: the wording must not give the number away, and the two groups differ in shape.
    count = Question(f"How many {plural(pick[1].shape, 2)} are there?", str(pick[1].count), "number", "how many")
    asked = [*(yes_no[i] for i in rng.permutation(3)[:2]), count, *_other_questions(pick[2], rng)]
    # Shuffled, or the position in a conversation would tell the kind of answer.
    return [asked[i] for i in rng.permutation(len(asked))]


def word_question(scene: Scene, rng: np.random.Generator) -> Question | None:
    """A question about the rendered word, where there is one."""
    if scene.word is None:
        return None
    return Question(WORD_QUESTIONS[int(rng.integers(len(WORD_QUESTIONS)))], scene.word, "text", "what word")


def _presence(scene: Scene, group: Group, answer: str, rng: np.random.Generator) -> Question:
    """``Is there a circle?`` or ``Is there something red?``: about this group for yes, about what no group has for no."""
    # One attribute at a time: questions that join colour and shape stayed at chance in a model of this size (LOG.md).
    if rng.random() < 0.5:
        shape = group.shape if answer == "yes" else _other(SHAPES, {g.shape for g in scene.groups}, rng)
        return Question(f"Is there a {shape}?", answer, "yes/no", "is there a")
    color = group.color if answer == "yes" else _other(COLORS, {g.color for g in scene.groups}, rng)
    return Question(f"Is there something {color}?", answer, "yes/no", "is there")


def _structure(scene: Scene) -> list[Question]:
    """Whether there is a word, and whether there is more than one colour."""
    word = "yes" if scene.word else "no"
    colors = "yes" if len(scene.groups) > 1 else "no"
    return [
        # The first words of the question, as VQA v2 names its question types.
        Question("Is there a word?", word, "yes/no", "is there a"),
        Question("Is there more than one color?", colors, "yes/no", "is there"),
    ]


def _other_questions(group: Group, rng: np.random.Generator) -> list[Question]:
    """Two of: colour of a shape, shape at a place, place of a shape."""
    be = "is" if group.count == 1 else "are"
    found = [
        Question(f"What color {be} the {plural(group.shape, group.count)}?", group.color, "other", f"what color {be} the"),
        Question(f"What shape is {at(group.place)}?", group.shape, "other", "what"),
        # By shape or place alone: the two groups of a picture differ in both, so each question has one answer.
        Question(f"Where {be} the {plural(group.shape, group.count)}?", group.place, "other", f"where {be} the"),
    ]
    return [found[i] for i in rng.permutation(3)[:2]]


def _other(values: tuple[str, ...], present: set[str], rng: np.random.Generator) -> str:
    """A value that is not present, uniform."""
    rest = [v for v in values if v not in present]
    return rest[int(rng.integers(len(rest)))]


def ten_answers(question: Question, rng: np.random.Generator) -> list[dict[str, Any]]:
    """Ten human answers: unanimous in nine of ten questions, eight against two otherwise."""
    answers = [question.answer] * 10
    # A tenth in doubt, so that the official accuracy with its agreement among ten has something to average over.
    if rng.random() < 0.1:
        doubt = {"yes": "no", "no": "yes", "1": "2", "2": "3", "3": "2"}.get(question.answer, "unknown")
        for i in rng.permutation(10)[:2]:
            answers[i] = doubt
    return [{"answer": a, "answer_confidence": "yes", "answer_id": i} for i, a in enumerate(answers, start=1)]


def conversation(scene: Scene, asked: list[Question], rng: np.random.Generator) -> list[tuple[str, str]]:
    """Turns of a conversation: short questions in random order, the caption request last.

    A caption before the questions would answer them all from the text, and the model would not learn to look. The
    first short question carries the short-answer sentence, as in LLaVA's mix (llava.md 1.3).
    """
    turns = [(q.text, q.answer) for q in asked]
    # The word's question was appended last; it must not always be asked last.
    turns = [turns[i] for i in rng.permutation(len(turns))]
    turns[0] = (turns[0][0] + SHORT_ANSWER, turns[0][1])
    request = CAPTION_REQUESTS[int(rng.integers(len(CAPTION_REQUESTS)))]
    return [*turns, (request, captions(scene)[0])]
