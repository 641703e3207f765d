"""JSON lines with an image path and a caption each: the index remembers where the lines lie, a row is parsed when it is read."""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mmkit.data.bounds import MAX_LINE
from mmkit.data.images import ImageRef
from mmkit.data.pairs import Pair, clean_caption, safe_image_path
from mmkit.data.reading import read_lines, read_range
from mmkit.data.sidecar import Index, Omitted, make_index
from mmkit.data.skipped import SampleError
from mmkit.data.sources.indexed import Indexed, ShardFile

_BOM = b"\xef\xbb\xbf"


@dataclasses.dataclass(frozen=True)
class RowReader:
    """Parses rows, and walks through a file of them. A class and no closure: it goes to other processes.

    Attributes:
        image: Key of the picture's path.
        caption: Key of the caption.
    """

    # Both stand in its repr, by which an index is known (`mmkit.data.sources.indexed`): other keys, another index.
    image: str = "image"
    caption: str = "caption"

    def parse(self, line: bytes) -> tuple[str, str]:
        """Image name (not looked up, but sure not to leave its folder) and caption of a row.

        Raises:
            ValueError: The row cannot be used; the message is the reason.
        """
        try:
            row: Any = json.loads(line.decode("utf-8"))
        except UnicodeDecodeError as error:
            raise ValueError(f"invalid UTF-8 at byte {error.start}") from None
        # Deeply nested brackets, of which a damaged line can consist.
        except RecursionError as error:
            raise ValueError(str(error)) from None
        if not isinstance(row, dict):
            raise ValueError(f"row is a {type(row).__name__}, not an object")
        # Below no root: one index is good for any image_root.
        image = safe_image_path(Path(), row.get(self.image))
        return str(image), clean_caption(row.get(self.caption))

    def __call__(self, path: Path) -> Index:
        """Walk through a file once: which rows can be used, and where they lie; bad ones are left out with their line."""
        keys: list[str] = []
        left_out: list[Omitted] = []
        offsets, sizes = [], []
        with path.open("rb") as file:
            for number, (start, _, line) in enumerate(read_lines(file), start=1):
                key = f"{path.name}:{number}"
                if line is None:
                    left_out.append(Omitted(key, f"a row of more than {MAX_LINE >> 20} MiB"))
                    continue
                if number == 1 and line.startswith(_BOM):
                    # Its place moves on with it: the row is later read by its range alone.
                    start, line = len(_BOM), line[len(_BOM) :]
                row = line.rstrip(b"\n")
                if not row.strip():
                    continue
                try:
                    # Parsed to learn whether it can be used, and thrown away: an index has places, however long
                    # captions are.
                    image, _ = self.parse(row)
                except ValueError as error:
                    left_out.append(Omitted(key, " ".join(str(error).split())))
                    continue
                keys.append(f"{key} {image}")
                offsets.append(start)
                sizes.append(len(row))
        return make_index(keys, left_out, offset=offsets, size=sizes)


class RowShard:
    """The pairs of one file of rows."""

    def __init__(self, file: ShardFile, indexed: Indexed, reader: RowReader, root: Path) -> None:
        self.file, self.indexed, self.reader, self.root = file, indexed, reader, root

    def __len__(self) -> int:
        return self.file.samples

    def read(self, row: int) -> Pair:
        """Pair ``row``; the picture's file is opened when it is asked for."""
        index = self.indexed.index(self.file)
        line = read_range(self.file.name, int(index.arrays["offset"][row]), int(index.arrays["size"][row]))
        try:
            image, caption = self.reader.parse(line)
        except ValueError as error:
            # It could be parsed when it was indexed: these are other bytes.
            raise SampleError(f"{error} (the file has changed since it was indexed)") from None
        return Pair(self.file.name, index.key(row), ImageRef(str(self.root / image)), caption)

    def describe(self, row: int) -> tuple[str, str]:
        """File, and line with the image's name; the row's number where the index cannot be had."""
        try:
            return self.file.name, self.indexed.index(self.file).key(row)
        except SampleError:
            return self.file.name, f"row {row}"

    def files(self) -> Iterator[str]:
        """The pictures' files."""
        for row in range(len(self)):
            with contextlib.suppress(SampleError):
                yield self.read(row).image.path
