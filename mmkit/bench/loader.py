"""``mmkit bench loader``: shards to training batches against open_clip's webdataset pipeline and Hugging Face streaming."""

from __future__ import annotations

import io
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from mmkit.bench.measure import interleaved
from mmkit.bench.photographs import encode_photographs, make_photographs, read_photographs, write_shards
from mmkit.config.sections import CLIP_MEAN, CLIP_STD
from mmkit.data.batching import EvenBatches, Share
from mmkit.data.decode import Decoder, _decode_part, _resize, training_crop
from mmkit.data.images import Pixels, decode_image, draw_box, fit_square, open_picture
from mmkit.data.loader import make_loader
from mmkit.data.order import make_order
from mmkit.data.sources import open_pairs
from mmkit.errors import InputError
from mmkit.training.stages.pairs import Augmentation, PairSamples, collate_pictures

# SuperClass's and open_clip's default.
_SCALE = (0.9, 1.0)
OPEN_CLIP, DATASETS = "open_clip", "datasets"
DECODERS: tuple[Decoder, Decoder] = ("fast", "exact")


def run(
    *, sizes: str = "512x384,640x480", images: int = 96, repeats: int = 7, batch: int = 32, size: int = 224, pictures: str = ""
) -> dict[str, Any]:
    """Compare the loaders on the same tar shards in one process and on one thread, so that rates are those of one core.

    open_clip's side is the pipeline of its ``get_wds_dataset`` (without shuffle buffers and tokenizer, which would slow it down)
    with its ``image_transform``: it ends with normalised floats, ours with uint8 that the device normalises; a second figure of
    ours has that on the host too. ``datasets`` streams the same shards through the same transform.

    Args:
        sizes: Sizes of the JPEGs, as WIDTHxHEIGHT with commas between.
        images: Pictures of each size; a multiple of ``batch`` is taken.
        repeats: Timed rounds, interleaved.
        batch: Pictures of a batch.
        size: Side of the crops in pixels.
        pictures: Folder of JPEGs to take pictures from; empty: photograph-like ones from a seed.

    Returns:
        Conditions; for each size images a second of every side, ratios, how close our crops are to Pillow's, whether the
        evaluation view equals Pillow's, and where our time goes.

    Raises:
        InputError: A size that is none, no JPEG in the folder, or webdataset is not installed.
    """
    # Whole batches only: open_clip's training pipeline drops the rest.
    batch = min(batch, images)
    count = images // batch * batch
    sources, kind = (read_photographs(pictures, count), "of the folder") if pictures else (make_photographs(count), "synthetic")
    found: dict[str, Any] = {
        "conditions": f"{count} pictures ({kind}), JPEG quality 90, 4:2:0, crops of "
        f"{_SCALE[0]} to {_SCALE[1]} of the area to {size} px, batches of {batch}, one thread, median of {repeats}",
        "output": "mmkit uint8, normalised on the device; the peers float32, normalised",
    }
    # Pillow cannot use more than one thread, so torch's resize may not either.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for width, height in _parse(sizes):
            encoded = encode_photographs(sources, (width, height))
            measured = _of_one_size(encoded, repeats=repeats, batch=batch, size=size)
            found |= {f"{width}x{height}: {name}": value for name, value in measured.items()}
    finally:
        torch.set_num_threads(threads)
    return found


def _parse(sizes: str) -> list[tuple[int, int]]:
    """Widths and heights."""
    found = []
    for text in sizes.split(","):
        width, _, height = text.partition("x")
        if not (width.isascii() and width.isdigit() and height.isascii() and height.isdigit() and int(width) and int(height)):
            raise InputError(f"{text!r} is no size", where="sizes", mend="write e.g. sizes=512x384,640x480")
        found.append((int(width), int(height)))
    return found


def _of_one_size(encoded: list[bytes], *, repeats: int, batch: int, size: int) -> dict[str, Any]:
    """All figures of JPEGs of one size."""
    count = len(encoded)
    with tempfile.TemporaryDirectory() as folder:
        shards = write_shards(encoded, Path(folder) / "shards")
        fast, exact = _our_samples(shards, size, "fast"), _our_samples(shards, size, "exact")
        # What opens an index or a data set is made once; the clock runs over one epoch.
        epochs: dict[str, Callable[[], Iterator[Tensor]]] = {
            "mmkit": lambda: _our_batches(fast, batch),
            "mmkit, normalised on the host": lambda: map(_normalise, _our_batches(fast, batch)),
            "mmkit, decoder=exact": lambda: _our_batches(exact, batch),
            OPEN_CLIP: _open_clip_batches(shards, size, batch),
            DATASETS: _datasets_batches(shards, size, batch, folder),
        }
        for name, epoch in epochs.items():
            # Rates of different work could not be compared.
            assert sum(len(pixels) for pixels in epoch()) == count, f"{name} left pictures out"
        # Epochs and not batches in turns: each side pays for its start as often as in training.
        seconds = interleaved({name: partial(_exhaust, epoch) for name, epoch in epochs.items()}, repeats=repeats)
    found: dict[str, Any] = {"kB a picture": round(sum(map(len, encoded)) / count / 1000)}
    found |= {f"{name}, images/s": round(count / took) for name, took in seconds.items()}
    for peer in (OPEN_CLIP, DATASETS):
        for ours in ("mmkit", "mmkit, normalised on the host"):
            found[f"speed, {ours} / {peer}"] = round(seconds[peer] / seconds[ours], 2)
    return found | _closeness(encoded, size) | _milliseconds(encoded, size, repeats)


def _exhaust(epoch: Callable[[], Iterator[Tensor]]) -> None:
    """Take all batches."""
    for _ in epoch():
        pass


def _our_samples(shards: list[Path], size: int, decoder: Decoder) -> PairSamples:
    """The training samples of a SuperClass run without colour jitter."""
    # No jitter and no dropped patches: the peers have neither by default.
    how = Augmentation(_SCALE, None, 0.0, num_tokens=1, patch_drop=0.0, decoder=decoder)
    return PairSamples(open_pairs(str(shards[0].parent)), size=size, max_pixels=100_000_000, augmentation=how)


def _our_batches(samples: PairSamples, batch: int) -> Iterator[Tensor]:
    """One epoch as the training loop reads it, uint8 ``[B, 3, S, S]``."""
    # In random order, where the peers read one after the other.
    steps = len(samples) // batch
    order = make_order(samples.pairs.layout, 0)
    plan = EvenBatches(order, batch_size=batch, micro_batch_size=batch, share=Share(0, 1))
    for made, _ in make_loader(samples, collate_pictures, plan.stream(0, steps), seed=0, workers=0, pin_memory=False):
        yield made["pixels"]


def _normalise(pixels: Tensor) -> Tensor:
    """What the encoder does on the device."""
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (CLIP_MEAN, CLIP_STD))
    return pixels.float().div_(255).sub_(mean).div_(std)


def _open_clip_batches(shards: list[Path], size: int, batch: int) -> Callable[[], Iterator[Tensor]]:
    """Epochs of open_clip's training pipeline, float ``[B, 3, S, S]``."""
    try:
        import webdataset as wds
    except ImportError:
        raise InputError("webdataset is not installed", where="bench loader", mend="pip install 'mmkit[bench]'") from None
    from open_clip.transform import image_transform

    # open_clip_train/data.py, get_wds_dataset.
    pipeline = wds.DataPipeline(
        wds.SimpleShardList([str(shard) for shard in shards]),
        wds.tarfile_to_samples(),
        wds.select(lambda sample: "txt" in sample and any(kind in sample for kind in ("png", "jpg", "jpeg", "webp"))),
        wds.decode("pilrgb"),
        wds.rename(image="jpg;png;jpeg;webp", text="txt"),
        # The text as it is, in place of the tokenizer.
        wds.map_dict(image=image_transform(size, is_train=True), text=lambda text: text),
        wds.to_tuple("image", "text"),
        # Whole batches, as open_clip trains.
        wds.batched(batch, partial=False),
    )
    return lambda: (pixels for pixels, _ in pipeline)


def _datasets_batches(shards: list[Path], size: int, batch: int, folder: str) -> Callable[[], Iterator[Tensor]]:
    """Epochs of Hugging Face ``datasets`` streaming the shards, through open_clip's transform, float ``[B, 3, S, S]``."""
    from datasets import load_dataset
    from open_clip.transform import image_transform

    transform = image_transform(size, is_train=True)
    files = [str(shard) for shard in shards]
    # Its cache in our folder: nothing is left behind.
    rows = load_dataset("webdataset", data_files=files, split="train", streaming=True, cache_dir=str(Path(folder) / "cache"))

    def epoch() -> Iterator[Tensor]:
        taken = []
        for row in rows:
            taken.append(transform(row["jpg"]))
            if len(taken) == batch:
                yield torch.stack(taken)
                taken = []

    return epoch


def _closeness(encoded: list[bytes], size: int) -> dict[str, Any]:
    """How far our views are from Pillow's."""
    # Both from the same numbers, hence the same boxes.
    ratios = []
    for number, data in enumerate(encoded):
        fast, exact = (
            training_crop(data, size, np.random.default_rng(number), scale=_SCALE, decoder=decoder) for decoder in DECODERS
        )
        error = float(np.mean((fast.astype(np.float64) - exact) ** 2))
        # Equal pictures have no ratio; 100 dB is far above anything else that rounding allows.
        ratios.append(10 * np.log10(255**2 / error) if error else 100.0)
    same = all(np.array_equal(fit_square(decode_image(data), size, fit="crop"), _pillows_view(data, size)) for data in encoded)
    return {
        "training crop, PSNR to Pillow's bicubic in dB": f"mean {np.mean(ratios):.1f}, least {np.min(ratios):.1f}",
        "evaluation view equals Pillow's": same,
    }


def _pillows_view(data: bytes, size: int) -> Pixels:
    """The centre of a picture by Pillow alone, uint8 ``[3, size, size]``."""
    # Written out and not by our functions: what they do is what is compared.
    image = Image.open(io.BytesIO(data)).convert("RGB")
    side = min(image.size)
    left, top = (image.width - side) / 2, (image.height - side) / 2
    view = image.resize((size, size), Image.Resampling.BICUBIC, box=(left, top, left + side, top + side))
    return np.asarray(view).transpose(2, 0, 1)


def _milliseconds(encoded: list[bytes], size: int, repeats: int) -> dict[str, float]:
    """Where our time goes, milliseconds a picture; what is missing to the rate is reading, collating and the loader."""
    boxes = []
    for number, data in enumerate(encoded):
        boxes.append(draw_box(*open_picture(data).size, np.random.default_rng(number), scale=_SCALE))
    # All pictures have one size.
    whole = open_picture(encoded[0]).size
    decoded = [_decode_part(data, whole, box, size) for data, box in zip(encoded, boxes, strict=True)]

    def headers() -> None:
        for data in encoded:
            open_picture(data)

    def decode() -> None:
        for data, box in zip(encoded, boxes, strict=True):
            _decode_part(data, whole, box, size)

    def resize() -> None:
        for part in decoded:
            assert part is not None
            _resize(*part, size)

    seconds = interleaved({"header": headers, "decode": decode, "resize": resize}, repeats=repeats)
    return {f"mmkit, ms of the {name}": round(1000 * took / len(encoded), 3) for name, took in seconds.items()}
