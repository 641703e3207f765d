"""Features on disk behind a memory map: what they hold, when they are made again, and what a disk may do."""

from __future__ import annotations

import io
import logging
import shutil
from collections import namedtuple

import pytest
import torch
from PIL import Image

from mmkit.data.images import ImageRef
from mmkit.encoders import mapped
from mmkit.encoders.mapped import mapped_features
from mmkit.errors import InputError

BLACK = {"size": 8, "fit": "squash", "fill": (0, 0, 0), "max_pixels": 10**6, "max_bytes": 10**6}


def pictures(folder, count=5, broken=()):
    made = []
    for i in range(count):
        buffer = io.BytesIO()
        Image.new("RGB", (12, 10), (40 * i, 10, 200)).save(buffer, "PNG")
        file = folder / f"{i}.png"
        file.write_bytes(b"no picture" if i in broken else buffer.getvalue())
        made.append(ImageRef(str(file)))
    return made


class Counting:
    """Mean colour of each picture, counting the calls."""

    def __init__(self):
        self.calls = 0

    def __call__(self, pixels):
        self.calls += 1
        return pixels.float().mean(dim=(2, 3)) / 255


def get(folder, of, extract, key="a", dtype=torch.float32, **more):
    return mapped_features(folder / "kept", key, of, extract, shape=(3,), dtype=dtype, **{**BLACK, **more})


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_are_the_pictures_in_order_and_nan_where_there_is_none(tmp_path, dtype, workers, monkeypatch):
    monkeypatch.setattr(mapped, "_BATCH", 2)
    found = get(tmp_path, pictures(tmp_path, broken={3}), Counting(), dtype=dtype, workers=workers)
    assert found.shape == (5, 3) and found.dtype == dtype
    assert found.isnan().all(dim=1).tolist() == [False, False, False, True, False]
    wanted = torch.tensor([[40 * i / 255, 10 / 255, 200 / 255] for i in (0, 1, 2, 4)], dtype=dtype)
    torch.testing.assert_close(found[[0, 1, 2, 4]], wanted, atol=2e-3, rtol=1e-2)


def test_a_second_time_nothing_is_extracted_and_another_key_is_another_file(tmp_path, caplog):
    of, extract = pictures(tmp_path), Counting()
    with caplog.at_level(logging.INFO):
        first = get(tmp_path, of, extract)
        assert extract.calls == 1 and torch.equal(get(tmp_path, of, extract), first) and extract.calls == 1
        get(tmp_path, of, extract, key="b")
    assert extract.calls == 2
    assert caplog.text.count("extracting features of 5 pictures") == 2


def test_a_file_that_is_cut_off_is_made_again(tmp_path):
    of, extract = pictures(tmp_path), Counting()
    before = get(tmp_path, of, extract).clone()
    (file,) = (tmp_path / "kept").glob("*.bin")
    file.write_bytes(file.read_bytes()[:-4])
    assert torch.equal(get(tmp_path, of, extract), before) and extract.calls == 2


def test_an_interrupted_extraction_leaves_nothing_that_counts(tmp_path):
    class Stopped(Exception):
        pass

    def stop(pixels):
        raise Stopped

    of = pictures(tmp_path)
    with pytest.raises(Stopped):
        get(tmp_path, of, stop)
    assert list((tmp_path / "kept").iterdir()) == []
    extract = Counting()
    get(tmp_path, of, extract)
    assert extract.calls == 1


def test_writing_to_the_view_changes_nothing_on_the_disk(tmp_path):
    of = pictures(tmp_path)
    get(tmp_path, of, Counting())[:] = 7
    assert get(tmp_path, of, Counting()).max() < 1


def test_a_disk_that_is_too_small_is_refused_before_the_work(tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10, 10, 10))
    extract = Counting()
    with pytest.raises(InputError, match=r"the features of 5 pictures take .* GiB, .* GiB are free"):
        get(tmp_path, pictures(tmp_path), extract)
    assert extract.calls == 0


def test_no_pictures_are_no_features(tmp_path):
    assert get(tmp_path, [], Counting()).shape == (0, 3)
