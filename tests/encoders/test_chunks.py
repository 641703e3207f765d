"""The chunk table: the same as a Python loop when places collide, chunks are long, and the memory is full."""

from __future__ import annotations

import itertools

from hypothesis import given, settings
from hypothesis import strategies as st

from mmkit.encoders.chunks import ChunkTable

SIZE = 50
ALPHABET = "ab\u00e9\u65e5\U0001f600\0"
LINES = st.lists(st.lists(st.text(ALPHABET, min_size=1, max_size=18), max_size=6).map(" ".join), max_size=8)


def ids_of(chunk: str) -> tuple[int, ...]:
    """None, one, or several ids, which depend on all of a chunk."""
    seed = sum((i + 1) * ord(c) for i, c in enumerate(chunk))
    return tuple((seed * (i + 7)) % SIZE for i in range(seed % 4))


@given(st.lists(LINES, max_size=4), st.sampled_from([None, 1, 3]), st.sets(st.integers(0, SIZE - 1), max_size=5))
@settings(max_examples=200, deadline=None)
def test_equals_a_loop(blocks: list[list[str]], keep: int | None, dropped: set[int]) -> None:
    # Four places for all chunks, and a memory that is full after a few: both hardly matter in use, and must not matter here.
    table = ChunkTable(ids_of, SIZE, keep=keep, dropped=dropped, bits=2, limit=5)
    for lines in blocks:
        if not lines:
            continue
        ids, offsets = table.encode("\n".join(lines).encode(), len(lines))
        rows = [ids[a:b].tolist() for a, b in itertools.pairwise(offsets)]
        assert rows == [
            sorted(set([i for chunk in line.split(" ") if chunk for i in ids_of(chunk)][:keep]) - dropped) for line in lines
        ]


def test_a_chunk_is_worked_out_once() -> None:
    seen: list[str] = []

    def count(chunk: str) -> tuple[int, ...]:
        seen.append(chunk)
        return (len(chunk),)

    table = ChunkTable(count, SIZE)
    text = b"a bb " + b"c" * 40 + b" a"
    for _ in range(3):
        assert table.encode(text, 1)[0].tolist() == [1, 2, 40]
    assert seen == ["a", "bb", "c" * 40]


def test_rows_fit_their_keys() -> None:
    assert ChunkTable(ids_of, 49408).max_rows == 1024
    wide = ChunkTable(lambda chunk: ((1 << 21) - 1,), 1 << 21)
    assert wide.max_rows == 512
    ids, offsets = wide.encode(b"\n".join([b"x y"] * 512), 512)
    assert set(ids.tolist()) == {(1 << 21) - 1} and offsets.tolist() == list(range(513))
