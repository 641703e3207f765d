"""Which questions are answered together: one pass over the pictures, little padding.

Nothing here has an effect on an answer, only on how long all of them take.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

from mmkit.eval.examples import Example, Picture
from mmkit.models.answering import Prompt

Group = list[Example]


@dataclass(frozen=True)
class Planned:
    """A question and its place in the order.

    Attributes:
        example: The question.
        prompt: Its token ids; empty for a captioner.
        pictures: Keys of its pictures.
        key: Names its beginning, which other questions share; None: it shares none.
    """

    example: Example
    prompt: Prompt
    pictures: tuple[str, ...]
    key: Hashable

    @property
    def own(self) -> int:
        """Tokens that are read for this question alone."""
        return len(self.prompt.rest) + (len(self.prompt.beginning) if self.key is None else 0)

    @property
    def length(self) -> int:
        """Tokens of the prompt."""
        return len(self.prompt.rest) + len(self.prompt.beginning)


def by_pictures(examples: Sequence[Example]) -> list[Group]:
    """Questions that show the same pictures, together; groups in the order of the data set. Text alone makes no group."""
    groups: dict[Hashable, Group] = {}
    for place, example in enumerate(examples):
        key: Hashable = tuple((p.name, p.data) for p in example.images) if example.images else place
        groups.setdefault(key, []).append(example)
    return list(groups.values())


def share_of(groups: Sequence[Group], rank: int, world_size: int) -> list[Example]:
    """Every Nth group: the questions of a picture stay on one process, and each process has short and long ones."""
    return list(itertools.chain.from_iterable(groups[rank::world_size]))


def plan(examples: Sequence[Example], prompts: Sequence[Prompt], pictures: Sequence[tuple[str, ...]]) -> list[Planned]:
    """The order in which questions are answered.

    First those that share a beginning with others, the groups by length; then the rest by length. Within a group the questions
    are neighbours, so that a beginning and a picture's features are needed for a short while only.

    Args:
        examples: What is to be answered.
        prompts: Their token ids.
        pictures: Keys of their pictures.
    """
    # Numbers in place of beginnings: hundreds of ids are hashed once a question.
    numbers: dict[tuple[int, ...], int] = {}
    keys = [(p, numbers.setdefault(prompt.beginning, len(numbers))) for p, prompt in zip(pictures, prompts, strict=True)]
    count = Counter(keys)
    planned = []
    for example, prompt, shown, key in zip(examples, prompts, pictures, keys, strict=True):
        # Alone with its beginning it is read in one piece.
        together = bool(prompt.beginning) and count[key] > 1
        planned.append(Planned(example, prompt, shown, key if together else None))
    longest: dict[Hashable, int] = {}
    first: dict[Hashable, int] = {}
    for number, row in enumerate(planned):
        longest[row.key] = max(longest.get(row.key, 0), row.own)
        first.setdefault(row.key, number)

    def place(row: Planned) -> tuple[int, ...]:
        return (1, row.own, 0, 0) if row.key is None else (0, longest[row.key], first[row.key], row.own)

    # Stable: equal ones stay in the order of the data set, in which neighbours often show one picture.
    return sorted(planned, key=place)


def next_batch(rows: Sequence[Planned], start: int, size: int) -> Sequence[Planned]:
    """The next ``size`` rows, fewer where those that share a beginning end: the long rest would pad the short."""
    part = rows[start : start + size]
    return list(itertools.takewhile(lambda row: (row.key is None) == (part[0].key is None), part))


def picture_order(rows: Sequence[Planned]) -> dict[str, Picture]:
    """Pictures by key, in the order in which they are first needed."""
    found: dict[str, Picture] = {}
    for row in rows:
        for key, picture in zip(row.pictures, row.example.images, strict=True):
            found.setdefault(key, picture)
    return found
