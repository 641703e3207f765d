"""Feature extraction and its cache; the package's lazy names."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import mmkit.encoders
from mmkit.config import LabelledDataConfig
from mmkit.data.images import decode_image, fit_square
from mmkit.data.labelled import LabelledSource, open_labelled
from mmkit.encoders import FeatureCache, extract_features, features
from mmkit.encoders.features import pixel_batches
from mmkit.errors import InputError

from .helpers import pictures, tiny_encoder

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA"))]


@pytest.mark.parametrize("device", DEVICES)
def test_pooled_and_tokens_equal_the_encoder(device: str) -> None:
    encoder, x = tiny_encoder(), pictures(5)
    with torch.inference_mode():
        expected, tokens, layer = encoder(x), encoder.tokens(x), encoder.tokens(x, -2)
    got = extract_features(encoder, x.split(2), device=device)
    assert got.device.type == "cpu" and got.dtype == torch.float32
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
    got = extract_features(encoder, x.split(2), device=device, kind="tokens")
    torch.testing.assert_close(got, tokens, rtol=1e-4, atol=1e-5)
    got = extract_features(encoder, x.split(2), device=device, kind="tokens", layer=-2)
    torch.testing.assert_close(got, layer, rtol=1e-4, atol=1e-5)


def test_bfloat16_is_close_and_training_mode_comes_back() -> None:
    encoder, x = tiny_encoder().train(), pictures(3)
    got = extract_features(encoder, [x], dtype=torch.bfloat16)
    assert got.dtype == torch.bfloat16 and encoder.training
    assert torch.nn.functional.cosine_similarity(got.float(), encoder.eval()(x)).min() > 0.999


def test_features_may_enter_autograd() -> None:
    features = extract_features(tiny_encoder(), [pictures(2)])
    assert not features.is_inference()
    layer = torch.nn.Linear(48, 2)
    layer(features).sum().backward()
    assert layer.weight.grad is not None


def test_no_pictures_give_an_empty_tensor_of_the_right_shape() -> None:
    assert extract_features(tiny_encoder(), []).shape == (0, 48)
    assert extract_features(tiny_encoder(), [], kind="tokens").shape == (0, 16, 48)


def test_cache_keeps_by_key_and_makes_once(tmp_path: Path) -> None:
    cache, made = FeatureCache(tmp_path / "cache"), []

    def make() -> torch.Tensor:
        made.append(1)
        return torch.arange(6.0).view(2, 3)

    key = "encoder=abc/data=def layer=-2"
    assert cache.load(key) is None
    for _ in range(3):
        assert torch.equal(cache.get(key, make), torch.arange(6.0).view(2, 3))
    assert len(made) == 1
    assert cache.load(key + "!") is None
    assert [file.name for file in (tmp_path / "cache").iterdir()] == [cache.path(key).name]


def test_a_damaged_or_foreign_file_is_made_again(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    cache = FeatureCache(tmp_path)
    cache.save("a", torch.ones(2))
    cache.path("b").write_bytes(cache.path("a").read_bytes())  # right place, other key
    assert cache.load("b") is None
    cache.path("a").write_bytes(b"cut")
    assert cache.load("a") is None and "damaged" in caplog.text
    assert cache.get("a", lambda: torch.zeros(3)).tolist() == [0, 0, 0]


def test_public_names_resolve_and_importing_the_package_is_light() -> None:
    for name in mmkit.encoders.__all__:
        assert callable(getattr(mmkit.encoders, name)), name
    assert sorted(mmkit.encoders.__all__) == sorted(mmkit.encoders._MODULE_OF)
    with pytest.raises(AttributeError, match="nothing_here"):
        mmkit.encoders.nothing_here  # noqa: B018
    code = "import sys, mmkit.encoders; sys.exit('torch' in sys.modules or 'timm' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0


def colours(folder: Path, count: int = 7) -> LabelledSource:
    """Pictures that differ by their number, of different sizes."""
    (folder / "a").mkdir(parents=True)
    for i in range(count):
        Image.new("RGB", (40 + i, 50), (i * 20, 255 - i * 20, 0)).save(folder / "a" / f"{i}.png")
    return open_labelled(str(folder), LabelledDataConfig(test=str(folder)))


@pytest.mark.parametrize("workers", [0, 2])
def test_pictures_come_in_order_whatever_loads_them(tmp_path: Path, workers: int) -> None:
    source = colours(tmp_path)
    batches = list(pixel_batches(source, size=16, workers=workers, batch_size=3))
    assert [len(b) for b in batches] == [3, 3, 1] and batches[0].dtype == torch.uint8
    expected = [fit_square(decode_image(source.pictures.read(i)), 16, fit="crop") for i in range(7)]
    assert torch.equal(torch.cat(batches), torch.from_numpy(np.stack(expected)))
    chosen = torch.cat(list(pixel_batches(source, [6, 6, 1], size=16, workers=workers, batch_size=2)))
    assert torch.equal(chosen, torch.cat(batches)[[6, 6, 1]])


def test_loader_processes_do_the_decoding(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = colours(tmp_path)
    seen = []

    def watched(data: bytes, **more: int) -> Image.Image:
        seen.append(1)
        return decode_image(data, **more)

    monkeypatch.setattr(features, "decode_image", watched)
    for workers in (2, 0):
        list(pixel_batches(source, size=16, workers=workers))
        assert len(seen) == (0 if workers else 7)  # a child's list is its own


@pytest.mark.parametrize("workers", [0, 2])
def test_an_unusable_picture_is_named_without_a_traceback(tmp_path: Path, workers: int) -> None:
    source = colours(tmp_path)
    Path(source.keys[4]).write_bytes(b"no picture")
    with pytest.raises(InputError, match=r"a/4\.png: is no picture .*; repair the picture or remove it") as caught:
        list(pixel_batches(source, [0, 1, 4, 5], size=16, workers=workers, batch_size=2))
    assert "\n" not in str(caught.value)
    with pytest.raises(InputError, match=r"a/0\.png: 40 x 50 pixels are over the limit of 1999"):
        list(pixel_batches(source, size=16, max_pixels=1999, workers=workers))


def test_autocast_computes_in_bfloat16_and_keeps_float32() -> None:
    encoder, x = tiny_encoder(), pictures(3)
    exact, got = extract_features(encoder, [x]), extract_features(encoder, [x], autocast=torch.bfloat16)
    assert got.dtype == torch.float32 and not torch.equal(got, exact)
    with torch.inference_mode(), torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(got, encoder(x).float())
    assert torch.nn.functional.cosine_similarity(got, exact).min() > 0.999
