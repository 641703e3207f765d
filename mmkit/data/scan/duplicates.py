"""What comes twice: pictures equal in their bytes, pictures that look alike, captions; found by sorting hashes."""

from __future__ import annotations

import dataclasses

import numpy as np
from numpy.typing import NDArray

# Bits of 64 by which pictures that look alike may differ: scaling and compression change one or two.
DISTANCE = 3
# By the pigeonhole principle two hashes that differ in 3 bits agree in one of 4 bands.
_BANDS = 4
# Neighbours in a band that a hash is compared with. Bands of random hashes are far shorter up to ten million pictures.
_REACH = 1024
# Bits set, or not set, below which a picture is nearly one colour: its hash says nothing of what it shows.
_PLAIN = 6
_BITS = np.asarray([bin(i).count("1") for i in range(1 << 16)], dtype=np.uint8)


@dataclasses.dataclass(frozen=True)
class Groups:
    """Sets of indices that belong together, in order of their first index.

    Attributes:
        members: Indices i64[M], ascending within a group.
        offsets: Where each group begins, i64[G + 1].
    """

    members: NDArray[np.int64]
    offsets: NDArray[np.int64]

    def __len__(self) -> int:
        """Groups."""
        return len(self.offsets) - 1

    @property
    def surplus(self) -> int:
        """Members but one of each group: what could go."""
        return len(self.members) - len(self)

    def group(self, number: int) -> NDArray[np.int64]:
        """Members of a group, i64[m]."""
        return self.members[self.offsets[number] : self.offsets[number + 1]]


def first_of_each(keys: NDArray[np.uint64], indices: NDArray[np.int64]) -> NDArray[np.int64]:
    """The first index of each different key, ascending.

    Args:
        keys: u64[N].
        indices: Ascending, i64[N].
    """
    return np.sort(indices[np.unique(keys, return_index=True)[1]])


def equal_groups(keys: NDArray[np.uint64], indices: NDArray[np.int64]) -> Groups:
    """Indices with equal keys, where there are at least two.

    Args:
        keys: u64[N].
        indices: Ascending, i64[N].
    """
    # Stable: within a group the order of the data set stays.
    order = np.argsort(keys, kind="stable")
    ordered = keys[order]
    starts = np.flatnonzero(np.append(True, ordered[1:] != ordered[:-1])) if len(keys) else np.zeros(0, dtype=np.int64)
    lengths = np.diff(np.append(starts, len(keys)))
    # By their first member, and not by a hash, which is in no order that a reader knows.
    kept = np.flatnonzero(lengths > 1)
    kept = kept[np.argsort(order[starts[kept]])]
    members = [indices[order[starts[i] : starts[i] + lengths[i]]] for i in kept]
    offsets = np.concatenate([[0], np.cumsum(lengths[kept])]).astype(np.int64)
    return Groups(np.concatenate([np.zeros(0, dtype=np.int64), *members]), offsets)


def plain(hashes: NDArray[np.uint64]) -> NDArray[np.bool_]:
    """Pictures of nearly one colour, bool[N]: they all look alike to `mmkit.data.scan.look.dhash`."""
    bits = count_bits(hashes)
    return (bits < _PLAIN) | (bits > 64 - _PLAIN)


def alike_groups(hashes: NDArray[np.uint64], indices: NDArray[np.int64]) -> tuple[Groups, bool]:
    """Pictures whose hashes differ in `DISTANCE` bits at most, joined through third ones.

    Args:
        hashes: Of different pictures, u64[N].
        indices: Ascending, i64[N].

    Returns:
        The groups, and whether all pairs were compared; in a very large or uniform set some are not.
    """
    # Equal hashes once: a thousand equal ones would be half a million pairs.
    distinct, inverse = np.unique(hashes, return_inverse=True)
    pairs, whole = close_pairs(distinct)
    root = _join(len(distinct), pairs)
    return equal_groups(root[inverse.ravel()].astype(np.uint64), indices), whole


def close_pairs(hashes: NDArray[np.uint64]) -> tuple[NDArray[np.int64], bool]:
    """Pairs of hashes that differ in `DISTANCE` bits at most.

    Args:
        hashes: Ascending and different, u64[N].

    Returns:
        Places i64[P, 2], some pairs more than once; and whether all were compared.
    """
    found, whole = [np.zeros((0, 2), dtype=np.int64)], True
    for band in range(_BANDS):
        key = (hashes >> np.uint64(16 * band)) & np.uint64(0xFFFF)
        order = np.argsort(key, kind="stable")
        key, ordered = key[order], hashes[order]
        left = np.arange(len(hashes))
        # All hashes with their next neighbour, then with the one after that, for as long as any band goes on.
        for shift in range(1, _REACH + 1):
            left = left[left + shift < len(hashes)]
            left = left[key[left] == key[left + shift]]
            if not len(left):
                break
            hit = left[count_bits(ordered[left] ^ ordered[left + shift]) <= DISTANCE]
            found.append(np.stack([order[hit], order[hit + shift]], axis=1))
        else:
            # Not left by break: some band goes on beyond what was compared.
            whole = False
    return np.concatenate(found), whole


def count_bits(values: NDArray[np.uint64]) -> NDArray[np.int64]:
    """Bits set in each value, i64[N]."""
    # numpy.bitwise_count came with numpy 2 only.
    return _BITS[np.ascontiguousarray(values).view(np.uint16).reshape(-1, 4)].sum(axis=1, dtype=np.int64)


def _join(size: int, pairs: NDArray[np.int64]) -> NDArray[np.int64]:
    """The smallest place that each place is joined with, directly or through others, i64[size]."""
    root = list(range(size))

    def find(place: int) -> int:
        while root[place] != place:
            # Halving the path keeps later searches short.
            root[place] = root[root[place]]
            place = root[place]
        return place

    for a, b in pairs.tolist():
        x, y = find(a), find(b)
        root[max(x, y)] = min(x, y)
    return np.asarray([find(place) for place in range(size)], dtype=np.int64)
