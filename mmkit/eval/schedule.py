"""Which questions are answered together: one pass over the pictures, little padding.

Nothing here has an effect on an answer, only on how long all of them take.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

from mmkit.eval.examples import Example, Picture

Group = list[Example]


@dataclass(frozen=True)
class Planned:
    """A question and its place in the order.

    Attributes:
        example: The question.
        ids: Its prompt's token ids; empty for a captioner.
        pictures: Keys of its pictures.
        key: Names its beginning, which other questions share; None: it shares none.
        rest: Tokens after that beginning, or all.
    """

    example: Example
    ids: tuple[int, ...]
    pictures: tuple[str, ...]
    key: Hashable
    rest: int


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


def plan(
    examples: Sequence[Example],
    ids: Sequence[Sequence[int]],
    pictures: Sequence[tuple[str, ...]],
    shared: Sequence[int],
) -> list[Planned]:
    """The order in which questions are answered.

    First those that share a beginning with others, the groups by length; then the rest by length. Within a group the questions
    are neighbours, so that a beginning and a picture's features are needed for a short while only.

    Args:
        examples: What is to be answered.
        ids: Token ids of their prompts.
        pictures: Keys of their pictures.
        shared: How many of the first ids other questions on the same pictures may share.
    """
    keys = [(p, tuple(i[:n])) for p, i, n in zip(pictures, ids, shared, strict=True)]
    count = Counter(keys)
    planned = []
    for example, row, shown, n, key in zip(examples, ids, pictures, shared, keys, strict=True):
        # Alone with its beginning it is read in one piece.
        together = n > 0 and count[key] > 1
        planned.append(Planned(example, tuple(row), shown, key if together else None, len(row) - n if together else len(row)))
    longest: dict[Hashable, int] = {}
    first: dict[Hashable, int] = {}
    for number, one in enumerate(planned):
        longest[one.key] = max(longest.get(one.key, 0), one.rest)
        first.setdefault(one.key, number)

    def place(row: Planned) -> tuple[int, ...]:
        return (1, row.rest, 0, 0) if row.key is None else (0, longest[row.key], first[row.key], row.rest)

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
