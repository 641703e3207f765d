"""Scenes of the demo world: what is in a picture, and which combinations are held out."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterator

import numpy as np

# Six colours far apart in hue: each keeps its name under the jitter and noise that drawing adds.
COLORS = ("red", "green", "blue", "yellow", "purple", "orange")
SHAPES = ("circle", "square", "triangle", "cross", "ring")
# Rows from above, which is also the order in which captions name the groups.
PLACES = ("top", "middle", "bottom")
# Short ones only: the strip at the top is one line, and five letters must still be legible at 64 pixels.
WORDS = ("stop", "open", "sale", "taxi", "bank", "exit", "cafe", "zoo", "park", "hotel", "pizza", "bus")
# Cells are a quarter of the side, so a row has room for three shapes at more than one place.
MAX_COUNT = 3
HELD_OUT_SHARE = 0.1


@dataclasses.dataclass(frozen=True)
class Group:
    """Equal shapes side by side: ``count`` of one colour and shape at one place."""

    count: int
    color: str
    shape: str
    place: str


@dataclasses.dataclass(frozen=True)
class Scene:
    """One or two groups in reading order, and a word or None."""

    groups: tuple[Group, ...]
    word: str | None

    def combination(self) -> str:
        """Shapes, colours, places and word as a canonical text: what train and held-out pictures never share."""
        # Counts are left out, and the pairing of the attributes too: a held-out picture is new by more than a number.
        parts = [sorted(getattr(g, field) for g in self.groups) for field in ("shape", "color", "place")]
        return "|".join([*(",".join(p) for p in parts), self.word or ""])

    def held_out(self, seed: int) -> bool:
        """Whether this combination is kept for the held-out pictures: a hash decides, so the split needs no list."""
        # Not Python's hash(), which is salted anew in every process.
        digest = hashlib.blake2b(f"{seed}:{self.combination()}".encode(), digest_size=8).digest()
        return int.from_bytes(digest, "big") / 2**64 < HELD_OUT_SHARE


def sample_scene(rng: np.random.Generator) -> Scene:
    """A random scene: every attribute uniform; two groups differ in colour, shape and place."""
    n = int(rng.integers(1, 3))
    colors = rng.permutation(len(COLORS))[:n]
    shapes = rng.permutation(len(SHAPES))[:n]
    # Reading order, top first: there is one canonical caption for a picture.
    places = sorted(rng.permutation(len(PLACES))[:n])
    groups = tuple(
        Group(int(rng.integers(1, MAX_COUNT + 1)), COLORS[c], SHAPES[s], PLACES[p])
        for c, s, p in zip(colors, shapes, places, strict=True)
    )
    word = WORDS[int(rng.integers(len(WORDS)))] if rng.random() < 0.5 else None
    return Scene(groups, word)


# Ids of held-out pictures start behind those of the largest world, so that those of a larger one are still others.
HELDOUT_FIRST = 900_001


def sample_split(seed: int, *, train: int, heldout: int) -> Iterator[tuple[str, int, Scene]]:
    """Scenes of both splits: ``(split, image id, scene)``; ids of held-out pictures start at `HELDOUT_FIRST`."""
    # Scenes come in one fixed sequence, so a larger world begins with the smaller one.
    rng = np.random.default_rng([seed, 7])
    wanted = {"train": train, "heldout": heldout}
    made = {"train": 0, "heldout": 0}
    first = {"train": 1, "heldout": HELDOUT_FIRST}
    while any(made[s] < wanted[s] for s in wanted):
        scene = sample_scene(rng)
        split = "heldout" if scene.held_out(seed) else "train"
        # What a full split draws is dropped, not moved over: that would mix the splits' combinations.
        if made[split] < wanted[split]:
            yield split, first[split] + made[split], scene
            made[split] += 1
