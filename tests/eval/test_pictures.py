from __future__ import annotations

import io
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from mmkit.data.skipped import SampleError
from mmkit.eval.examples import Picture
from mmkit.eval.pictures import FeatureStore, Reader, Square, content_hash, picture_key

LIMITS = {"max_bytes": 1 << 20, "max_pixels": 10_000}


def png(value: int, size: int = 4) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (size, size), (value, 0, 0)).save(file, "PNG")
    return file.getvalue()


def fit(image: Image.Image) -> np.ndarray:
    return np.asarray(image).transpose(2, 0, 1)


def test_pictures_come_in_any_order_with_the_hash_of_their_bytes(tmp_path):
    pictures = {}
    for i in range(40):
        (tmp_path / f"{i}.png").write_bytes(png(i))
        pictures[str(tmp_path / f"{i}.png")] = Picture(str(tmp_path / f"{i}.png"))
    reader = Reader(pictures.items(), fit, **LIMITS, ahead=3)
    # In order, then backwards: what was not read ahead is read now.
    for key in [*list(pictures)[:10], *list(pictures)[:9:-1]]:
        square = reader.take(key, pictures[key])
        value = int(Path(key).stem)
        assert square.pixels[0].min() == square.pixels[0].max() == value and square.content == content_hash(png(value))
    reader.close()


def test_no_more_than_some_are_read_ahead_and_not_by_the_caller(tmp_path):
    read: list[str] = []
    threads: set[str] = set()
    ready = threading.Event()

    class Noting(Picture):
        def read(self, max_bytes: int = 0) -> bytes:
            read.append(self.name)
            threads.add(threading.current_thread().name)
            if len(read) == 5:
                ready.set()
            return png(1)

    pictures = {str(i): Noting(str(i)) for i in range(30)}
    reader = Reader(pictures.items(), fit, **LIMITS, ahead=5)
    assert ready.wait(10)
    reader.take("0", pictures["0"])
    reader.close()
    # One place came free, so one more at most was begun.
    assert 5 <= len(read) <= 6 and all(name.startswith("mmkit-pictures") for name in threads)


def test_a_picture_that_cannot_be_used_says_why(tmp_path):
    bad = {"a": Picture(str(tmp_path / "no.png")), "b": Picture("b", b"text"), "c": Picture("c", png(1, 200))}
    reader = Reader(bad.items(), fit, **LIMITS)
    for key, reason in (("a", "No such file"), ("b", "is no picture"), ("c", "over the limit of 10000")):
        with pytest.raises(SampleError, match=reason):
            reader.take(key, bad[key])
    reader.close()


def test_a_key_is_the_path_or_the_name_with_its_content():
    assert picture_key(Picture("x/1.jpg")) == "x/1.jpg"
    assert picture_key(Picture("1", b"a")) != picture_key(Picture("1", b"b")) != picture_key(Picture("1"))


def test_features_are_kept_up_to_a_bound_the_last_used_longest():
    square = Square(np.zeros((3, 1, 1), dtype=np.uint8), "")
    store = FeatureStore(limit=3 * (40 + 3))
    for key in "abc":
        store.put([key], [square], [torch.zeros(10)])
    assert store.get("a") is not None
    store.put(["d"], [square], [torch.zeros(10)])
    assert store.get("b") is None and all(store.get(key) is not None for key in "acd") and store.encoded == 4
    store.put(["e"], [square], [torch.zeros(100)])
    assert all(store.get(key) is None for key in "abcde"), "one that is over the bound by itself is not kept either"
    store.put(["f"], [square], [torch.zeros(10)])
    store.clear()
    assert store.get("f") is None
    for key in "ghi":
        store.put([key], [square], [torch.zeros(10)])
    assert all(store.get(key) is not None for key in "ghi"), "the room is there again"
