"""Features of many pictures in one file that is read through a memory map: more of them than memory holds.

The patch tokens of COCO's 118,000 pictures take 45 GB in bfloat16 at 196 x 1024, those of LLaVA's first stage ten times that
(performance.md 6). The file is written batch by batch and never whole in memory; the system keeps what is read often.
"""

from __future__ import annotations

import functools
import hashlib
import logging
import math
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from mmkit.data.images import Fit, Pixels
from mmkit.data.loader import one_thread
from mmkit.data.pairs import Picture
from mmkit.encoders.features import Squares
from mmkit.errors import InputError
from mmkit.files import disk_trouble, read_json, sync, write_json

logger = logging.getLogger(__name__)
# Pictures at a time; the result does not depend on it.
_BATCH = 64


def _read(pictures: Sequence[Picture], max_bytes: int, index: int) -> bytes:
    """The bytes of a picture by number."""
    return pictures[index].read(max_bytes)


def _stack(squares: list[Pixels | str]) -> tuple[Tensor, list[int]]:
    """uint8[B, 3, S, S], black where there is no picture, and the places of those."""
    shape = next((square.shape for square in squares if not isinstance(square, str)), None)
    bad = [place for place, square in enumerate(squares) if isinstance(square, str)]
    # Of a batch without any picture nothing will be kept, so its size does not matter.
    blank = torch.zeros(shape or (3, 1, 1), dtype=torch.uint8)
    return torch.stack([blank if isinstance(square, str) else torch.from_numpy(square) for square in squares]), bad


def mapped_features(
    folder: Path,
    key: str,
    pictures: Sequence[Picture],
    extract: Callable[[Tensor], Tensor],
    *,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    size: int,
    fit: Fit,
    fill: tuple[int, int, int],
    max_pixels: int,
    max_bytes: int,
    workers: int = 0,
) -> Tensor:
    """The features of pictures, extracted now or by an earlier run.

    Args:
        folder: Where the files lie; made if missing.
        key: Names all that the features depend on: encoder, layer, data, how pictures are fitted.
        pictures: Different pictures, in the order of the rows; only their number is looked at where the file is there.
        extract: uint8[B, 3, S, S] to float[B, ...] of ``shape``, on any device.
        shape: Of one picture's features.
        dtype: Of the file.
        size: Side S in pixels.
        fit: How a picture becomes a square.
        fill: Colour beside a padded picture.
        max_pixels: A picture with more is not used.
        max_bytes: A picture whose file is longer is not used.
        workers: Processes that decode.

    Returns:
        [pictures, *shape], a view of the file; NaN where a picture cannot be used. Writing to it changes nothing on the disk.

    Raises:
        InputError: The disk is too small, full or read-only.
    """
    path = feature_file(folder, key)
    whole = (len(pictures), *shape)
    # The whole key: the file is named by a shortened hash of it.
    facts = {"key": key, "shape": list(whole), "dtype": str(dtype)}
    size_bytes = math.prod(whole) * torch.empty(0, dtype=dtype).element_size()
    note = path.with_suffix(".json")
    # The note is written last: with it and the right length the file is whole.
    if not (note.is_file() and path.is_file() and path.stat().st_size == size_bytes and read_json(note) == facts):
        logger.info("extracting features of %d pictures (%.1f GiB)", len(pictures), size_bytes / 2**30)
        # A function of the module: where processes are not forked, it must pickle.
        read = functools.partial(_read, pictures, max_bytes)
        squares = Squares(read, len(pictures), size=size, fit=fit, max_pixels=max_pixels, fill=fill)
        loader: DataLoader[Any] = DataLoader(
            squares,
            batch_size=_BATCH,
            num_workers=workers,
            collate_fn=_stack,
            pin_memory=torch.cuda.is_available(),
            # Workers only: in the main process it would slow the encoder down and deafen it to Ctrl-C.
            worker_init_fn=one_thread if workers else None,
        )
        try:
            folder.mkdir(parents=True, exist_ok=True)
            # The folder is there by now: a disk's free space can be asked of existing paths only.
            _check_room(folder, size_bytes, len(pictures))
            # The old note goes first: killed from here on, nothing speaks for a file that is not whole.
            note.unlink(missing_ok=True)
            _write(path, _features(loader, extract, shape, dtype))
            write_json(note, facts)
        except OSError as error:
            raise disk_trouble(error, where=folder) or error from None
    # Private: what a caller writes by mistake stays in this process.
    # An empty file cannot be mapped.
    flat = (
        torch.from_file(str(path), shared=False, size=math.prod(whole), dtype=dtype)
        if size_bytes
        else torch.empty(0, dtype=dtype)
    )
    return flat.view(whole)


def feature_file(folder: Path, key: str) -> Path:
    """Where the features of a key lie."""
    return folder / f"{hashlib.sha256(key.encode()).hexdigest()[:32]}.bin"


def picture_state(picture: Picture) -> str:
    """A picture, its file's size and when it was written: repaired or exchanged ones must not find old features."""
    file = Path(picture.path)
    if not file.exists():
        return f"{picture} missing"
    found = file.stat()
    return f"{picture} {found.st_size} {found.st_mtime_ns}"


def _features(
    loader: DataLoader[Any], extract: Callable[[Tensor], Tensor], shape: tuple[int, ...], dtype: torch.dtype
) -> Iterator[Tensor]:
    """Features of each batch, on the host; NaN for pictures that cannot be used."""
    for pixels, bad in loader:
        found = torch.full((len(pixels), *shape), float("nan"), dtype=dtype)
        # A batch without a single picture is 1 x 1 pixel (see `_stack`), which no tower takes.
        if len(bad) < len(pixels):
            found.copy_(extract(pixels))
            # NaN travels with the file, so that every process and later run leaves out the same pictures.
            found[bad] = float("nan")
        yield found


def _write(path: Path, batches: Iterator[Tensor]) -> None:
    """One after the other into a file beside, which then takes the name."""
    # The pid keeps two processes apart that extract the same features; the last rename wins, both are right.
    temporary = path.with_suffix(f".{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            for batch in batches:
                # Bytes, because numpy has no bfloat16.
                file.write(batch.contiguous().flatten().view(torch.uint8).numpy().data)
        # On the disk before it gets its name, or a crash of the machine could leave a note beside missing bytes.
        sync(temporary)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _check_room(folder: Path, size: int, count: int) -> None:
    """Refuse what will not fit, before hours of work.

    Raises:
        InputError: With the sizes.
    """
    free = shutil.disk_usage(folder).free
    if size > free:
        raise InputError(
            f"the features of {count} pictures take {size / 2**30:.1f} GiB, {free / 2**30:.1f} GiB are free",
            where=folder,
            mend="free space, run below another disk, or do without: cache_features=false, or pooled features",
        )
