"""The pieces of a scan put together: numbers of a whole data set, the same whatever the number of processes."""

from __future__ import annotations

import dataclasses
import logging
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mmkit.data.pairs import PairSource
from mmkit.data.scan.crew import cores, map_in_order
from mmkit.data.scan.duplicates import Groups, alike_groups, equal_groups, first_of_each, plain
from mmkit.data.scan.look import RECORD, Scanner, blocks, scan_range
from mmkit.data.scan.tally import Tally
from mmkit.data.skipped import SkippedRows

logger = logging.getLogger(__name__)

_SAY_EVERY_SECONDS = 20.0


@dataclasses.dataclass(frozen=True)
class Survey:
    """What was seen of a source.

    Attributes:
        records: RECORD[N], one for each pair of the source.
        formats: What ``format`` of a record numbers.
        characters: Of the captions.
        words: Of the captions, split at spaces.
    """

    records: NDArray[np.void]
    formats: list[str]
    characters: Tally
    words: Tally

    def usable(self) -> NDArray[np.int64]:
        """Indices of the usable pairs, ascending."""
        return np.flatnonzero(self.records["usable"])


@dataclasses.dataclass(frozen=True)
class PictureFacts:
    """What the pictures of a data set are; each counts once, however many captions it has.

    Attributes:
        distinct: Number of pictures.
        tallies: ``width`` and ``height`` in pixels, ``aspect`` (width / height) in hundredths, ``kib``.
        formats: Format and mode to pictures.
        equal: Pictures with equal bytes.
        alike: Different ones that look alike.
        all_compared: Whether every picture was compared with every other for that.
        plain: Pictures of nearly one colour, which were not.
    """

    distinct: int
    tallies: dict[str, Tally]
    formats: dict[str, int]
    equal: Groups
    alike: Groups
    all_compared: bool
    plain: int

    def to_json(self) -> dict[str, Any]:
        """Numbers for ``inspect.json``."""
        return {
            "distinct": self.distinct,
            **{name: tally.summary() for name, tally in self.tallies.items()},
            "formats": self.formats,
            "equal": {"groups": len(self.equal), "surplus": self.equal.surplus},
            "alike": {
                "groups": len(self.alike),
                "surplus": self.alike.surplus,
                "all_compared": self.all_compared,
                "plain": self.plain,
            },
        }


def survey(
    source: PairSource,
    skipped: SkippedRows,
    take: Callable[[list[str]], None],
    *,
    pictures: bool,
    workers: int | None = None,
) -> Survey:
    """Look at every pair of a source once.

    Args:
        source: The data set.
        skipped: Takes what cannot be used.
        take: Is given the captions of the usable pairs, in order.
        pictures: Decode the pictures too.
        workers: Processes; None: one for each core.

    Raises:
        InputError: A worker process was killed.
    """
    records = np.zeros(len(source), dtype=RECORD)
    formats: dict[str, int] = {}
    characters, words = Tally(), Tally()
    jobs = blocks(source.layout.ends().tolist(), len(source), workers or cores())
    began = said = time.monotonic()
    scanned = map_in_order(scan_range, Scanner(source, pictures=pictures), jobs, workers)
    for (begin, end), block in zip(jobs, scanned, strict=True):
        # Each piece numbers the formats it met; here they get one numbering. 256 are more than Pillow has.
        numbers = np.asarray([formats.setdefault(name, len(formats)) for name in block.formats] or [0], dtype=np.uint8)
        block.records["format"] = numbers[block.records["format"]]
        records[begin:end] = block.records
        characters.add([len(caption) for caption in block.captions])
        words.add([len(caption.split()) for caption in block.captions])
        skipped.add(block.left_out)
        take(block.captions)
        if (now := time.monotonic()) - said > _SAY_EVERY_SECONDS:
            said = now
            logger.info("looked at %d of %d pairs, %.0f a second", end, len(records), end / (now - began))
    return Survey(records, list(formats), characters, words)


def picture_facts(found: Survey) -> PictureFacts:
    """Numbers of the pictures of a survey that decoded them."""
    usable = found.usable()
    # A picture with five captions is one picture, and no duplicate of itself.
    first = first_of_each(found.records["picture"][usable], usable)
    records = found.records[first]
    # Of equal ones the first: their copies would be reported a second time, as looking alike.
    different = first_of_each(records["content"], first)
    hashes = found.records["alike"][different]
    # Their hashes are nearly equal whatever they show: different ones would pass for duplicates.
    dull = plain(hashes)
    alike, whole = alike_groups(hashes[~dull], different[~dull])
    # Wider than two bytes, in which a hundred times the width would overflow.
    width, height = records["width"].astype(np.int64), records["height"].astype(np.int64)
    tallies = {"width": width, "height": height, "aspect": width * 100 // np.maximum(height, 1), "kib": records["kib"]}
    formats = Counter(found.formats[number] for number in records["format"].tolist())
    return PictureFacts(
        distinct=len(first),
        tallies={name: Tally().add(values) for name, values in tallies.items()},
        formats=dict(sorted(formats.items(), key=lambda item: (-item[1], item[0]))),
        equal=equal_groups(records["content"], first),
        alike=alike,
        all_compared=whole,
        plain=int(dull.sum()),
    )


def repeated_captions(found: Survey) -> Groups:
    """Usable pairs whose captions are equal to the letter, by their hashes."""
    usable = found.usable()
    return equal_groups(found.records["caption"][usable], usable)
