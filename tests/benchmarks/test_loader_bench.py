"""The loader benchmark reads the same pictures on every side and says how close the views are; how fast, is no test."""

from __future__ import annotations

import io
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from mmkit.bench import run_bench
from mmkit.bench.photographs import encode_photographs, make_photographs, write_shards
from mmkit.data.sources import open_pairs
from mmkit.errors import InputError

SMALL = {"images": "6", "batch": "4", "repeats": "1", "sizes": "200x150", "size": "48"}


def sound(found: dict[str, object], size: str = "200x150") -> None:
    assert found[f"{size}: evaluation view equals Pillow's"] is True
    mean, least = map(float, re.findall(r"[\d.]+", str(found[f"{size}: training crop, PSNR to Pillow's bicubic in dB"])))
    assert mean > 30 and least > 20
    for side in ("mmkit", "mmkit, normalised on the host", "mmkit, decoder=exact", "open_clip", "datasets"):
        assert found[f"{size}: {side}, images/s"] > 0
    for peer in ("open_clip", "datasets"):
        assert found[f"{size}: speed, mmkit / {peer}"] > 0


def test_every_side_reads_the_same_shards() -> None:
    pytest.importorskip("webdataset")
    threads = torch.get_num_threads()
    found = run_bench("loader", SMALL)
    assert torch.get_num_threads() == threads
    sound(found)
    # Whole batches only: six pictures are one batch of four.
    assert "4 pictures (synthetic)" in found["conditions"] and "one thread" in found["conditions"]
    assert "uint8" in found["output"] and "float32" in found["output"]


def test_pictures_of_a_folder(tmp_path: Path) -> None:
    pytest.importorskip("webdataset")
    for number, data in enumerate(encode_photographs(make_photographs(3, size=(256, 192)), (256, 192))):
        (tmp_path / f"{number}.jpg").write_bytes(data)
    found = run_bench("loader", {**SMALL, "sizes": "64x48,128x96", "pictures": str(tmp_path)})
    sound(found, "64x48")
    sound(found, "128x96")
    assert "4 pictures (of the folder)" in found["conditions"]  # three, and the first again


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sizes": "512"}, "'512' is no size.*512x384"),
        ({"sizes": "512x0"}, "'512x0' is no size"),
        ({"pictures": "nowhere"}, "no JPEG here"),
    ],
)
def test_wrong_settings_are_refused(options: dict[str, str], message: str) -> None:
    with pytest.raises(InputError, match=message):
        run_bench("loader", {"images": "1", **options})


def test_photographs_are_repeatable_and_like_photographs() -> None:
    a, b = make_photographs(2, size=(320, 240))
    again = make_photographs(1, size=(320, 240))[0]
    assert a.tobytes() == again.tobytes() != b.tobytes() != make_photographs(1, 1, size=(320, 240))[0].tobytes()
    # Power falls about with the square of the frequency, as in natural pictures.
    grey = np.asarray(a.convert("L"), dtype=float)
    power = np.abs(np.fft.fft2(grey - grey.mean())) ** 2
    frequency = np.hypot(np.fft.fftfreq(240)[:, None], np.fft.fftfreq(320)[None])
    bands = [power[(frequency > low) & (frequency <= 2 * low)].mean() for low in (0.02, 0.04, 0.08, 0.16)]
    slope = np.polyfit(np.log([1, 2, 4, 8]), np.log(bands), 1)[0]
    assert -3.2 < slope < -1.5


def test_shards_are_what_the_reader_takes(tmp_path: Path) -> None:
    encoded = encode_photographs(make_photographs(3, size=(64, 64)), (40, 30))
    assert Image.open(io.BytesIO(encoded[0])).size == (40, 30)
    assert len(write_shards(encoded, tmp_path / "shards")) == 2
    pairs = open_pairs(str(tmp_path / "shards")).pairs
    assert sorted(pair.image.read() for pair in pairs) == sorted(encoded)
