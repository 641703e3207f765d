from __future__ import annotations

import itertools
import random

from hypothesis import given
from hypothesis import strategies as st

from mmkit.eval.examples import Example, Picture
from mmkit.eval.schedule import by_pictures, next_batch, picture_order, plan, share_of
from mmkit.models.answering import Prompt


def example(number: int, *pictures: str) -> Example:
    return Example(number, tuple(Picture(p) for p in pictures), f"question {number}", "?", [])


def planned(examples: list[Example], beginning: int = 3, lengths: dict[int, int] | None = None):
    """Every picture's beginning has ``beginning`` tokens, its own; a question of text alone has none."""
    prompts = []
    for e in examples:
        # The words before it are the same for all pictures.
        front = (7,) * beginning if e.images else ()
        prompts.append(Prompt(front, (100 + e.id,) * (lengths or {}).get(e.id, 2)))
    return plan(examples, prompts, [tuple(p.name for p in e.images) for e in examples])


def test_groups_are_shared_out_whole_and_in_turn():
    examples = [example(i, f"picture-{i % 5}") for i in range(20)] + [example(20 + i) for i in range(3)]
    groups = by_pictures(examples)
    assert [len(g) for g in groups] == [4] * 5 + [1] * 3
    shares = [share_of(groups, rank, 3) for rank in range(3)]
    assert sorted(e.id for share in shares for e in share) == list(range(23))
    homes = [{e.images for e in share if e.images} for share in shares]
    assert not homes[0] & homes[1] and not homes[1] & homes[2] and not homes[0] & homes[2]
    assert share_of(groups, 0, 1) == [e for g in groups for e in g]


def test_pictures_of_one_name_in_two_tables_are_two():
    one, two = Picture("image_1", b"a"), Picture("image_1", b"b")
    groups = by_pictures([Example(i, (p,), "", "", []) for i, p in enumerate([one, two, one])])
    assert [[e.id for e in g] for g in groups] == [[0, 2], [1]]


def test_questions_of_a_picture_are_neighbours_by_length_and_lonely_ones_come_last():
    examples = [example(0, "a"), example(1, "b"), example(2, "c"), example(3, "a"), example(4, "b"), example(5)]
    rows = planned(examples, lengths={0: 9, 1: 1, 2: 1, 3: 2, 4: 3, 5: 30})
    # b's longest question is shorter than a's; c is alone with its picture and text has none, so both are read whole.
    assert [row.example.id for row in rows] == [1, 4, 3, 0, 2, 5]
    assert [row.key is None for row in rows] == [False] * 4 + [True] * 2
    assert [row.own for row in rows] == [1, 3, 2, 9, 4, 30]
    assert rows[0].key == rows[1].key != rows[2].key == rows[3].key
    assert list(picture_order(rows)) == ["b", "a", "c"]


def test_a_batch_never_mixes_shared_and_whole_prompts():
    rows = planned([example(0, "a"), example(1, "a"), example(2, "b"), example(3)])
    assert [row.example.id for row in next_batch(rows, 0, 10)] == [0, 1]
    assert [row.example.id for row in next_batch(rows, 1, 10)] == [1]
    assert [row.example.id for row in next_batch(rows, 2, 10)] == [3, 2]


@given(st.lists(st.integers(0, 4), min_size=1, max_size=40), st.integers(1, 9), st.integers(0, 2**32))
def test_every_question_is_in_one_batch(pictures, size, seed):
    examples = [example(i, *([f"p{p}"] if p else [])) for i, p in enumerate(pictures)]
    random.Random(seed).shuffle(examples)
    rows = planned(examples, lengths={i: 1 + i % 7 for i in range(len(examples))})
    seen, place = [], 0
    while place < len(rows):
        batch = next_batch(rows, place, size)
        assert 1 <= len(batch) <= size and len({row.key is None for row in batch}) == 1
        seen += [row.example.id for row in batch]
        place += len(batch)
    assert sorted(seen) == sorted(e.id for e in examples)
    # One pass: whatever shares a beginning lies together.
    keys = [row.key for row in rows if row.key is not None]
    assert sum(a != b for a, b in itertools.pairwise(keys)) == max(0, len(set(keys)) - 1)
