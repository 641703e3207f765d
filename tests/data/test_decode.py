"""The fast way to a training crop: the same crops, refusals and numbers as the exact way, and pixels close to it."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageFilter

from mmkit.data import decode
from mmkit.data.decode import Decoder, shrink_factor, training_crop
from mmkit.data.images import Box, Pixels, decode_image, draw_box, fit_square, random_resized_crop
from mmkit.data.loader import ReplacingSet
from mmkit.data.order import Position
from mmkit.data.skipped import SampleError

SCALE = (0.9, 1.0)


def smooth(width: int, height: int, seed: int = 0) -> Image.Image:
    """Blurred noise: enough detail to tell crops apart, little enough for a shrunk decode to keep it."""
    noise = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(noise).filter(ImageFilter.GaussianBlur(4))


def encode(image: Image.Image, kind: str = "JPEG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def crop(data: bytes, decoder: Decoder, size: int = 32, *, seed: int = 0, scale: tuple[float, float] = SCALE) -> Pixels:
    return training_crop(data, size, np.random.default_rng(seed), scale=scale, decoder=decoder)


def psnr(a: Pixels, b: Pixels) -> float:
    return float(10 * np.log10(255**2 / max(1e-9, np.mean((a.astype(float) - b) ** 2))))


def verdict(data: bytes, decoder: Decoder) -> tuple[str | None, int]:
    """The reason of a refusal, or None, and the next number that the sample would draw."""
    rng = np.random.default_rng(7)
    reason = None
    try:
        training_crop(data, 16, rng, scale=(0.5, 1.0), decoder=decoder, max_pixels=1_000_000)
    except SampleError as error:
        reason = str(error)
    return reason, int(rng.integers(1 << 60))


@pytest.fixture
def shrunk(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """Shapes of what simplejpeg decoded."""
    shapes: list[tuple[int, ...]] = []
    real = decode.simplejpeg.decode_jpeg

    def spy(*args: object, **options: object) -> Pixels:
        pixels: Pixels = real(*args, **options)
        shapes.append(pixels.shape)
        return pixels

    monkeypatch.setattr(decode.simplejpeg, "decode_jpeg", spy)
    return shapes


def test_exact_is_pillow() -> None:
    data = encode(smooth(90, 70))
    wanted = random_resized_crop(decode_image(data), 32, np.random.default_rng(0), scale=SCALE)
    assert np.array_equal(crop(data, "exact"), wanted)


@pytest.mark.parametrize("subsampling", [0, 1, 2, "4:1:1"])
@pytest.mark.parametrize(
    "options", [{}, {"quality": 30}, {"quality": 100}, {"progressive": True}, {"restart_marker_blocks": 2}, {"optimize": True}]
)
def test_every_kind_of_jpeg(subsampling: object, options: dict[str, object], shrunk: list[tuple[int, ...]]) -> None:
    for width, height in ((64, 48), (131, 97), (33, 150)):
        data = encode(smooth(width, height), subsampling=subsampling, **options)
        for seed in range(3):
            found = crop(data, "fast", seed=seed, scale=(0.6, 1.0))
            assert (found.shape, found.dtype, found.flags["C_CONTIGUOUS"]) == ((3, 32, 32), np.uint8, True)
            assert psnr(found, crop(data, "exact", seed=seed, scale=(0.6, 1.0))) > 30
    assert len(shrunk) == 9


def test_grey_has_three_equal_channels(shrunk: list[tuple[int, ...]]) -> None:
    data = encode(smooth(80, 80).convert("L"))
    found = crop(data, "fast")
    assert (found[0] == found[1]).all() and (found[1] == found[2]).all() and len(shrunk) == 1
    assert psnr(found, crop(data, "exact")) > 35


def test_whole_boxes_differ_by_the_filter_alone() -> None:
    data = encode(smooth(60, 60))
    a, b = (crop(data, way, scale=(1.0, 1.0)).astype(int) for way in ("fast", "exact"))  # type: ignore[arg-type]
    assert np.abs(a - b).max() <= 2


@pytest.mark.parametrize(
    ("side", "size", "factor"),
    [(223, 224, 1), (447, 224, 1), (448, 224, 2), (895, 224, 2), (896, 224, 4), (4000, 224, 8), (9, 1, 8)],
)
def test_shrinking_never_makes_the_box_smaller_than_the_square(side: int, size: int, factor: int) -> None:
    assert shrink_factor(Box(5.5, 0, 5.5 + side, 2000), size) == shrink_factor(Box(0, 1.5, 4000, 1.5 + side), size) == factor


def test_large_pictures_are_decoded_shrunk(shrunk: list[tuple[int, ...]]) -> None:
    for width, height, seen in ((120, 90, (45, 60, 3)), (65, 61, (61, 65, 3)), (261, 301, (38, 33, 3)), (800, 601, (76, 100, 3))):
        data = encode(smooth(width, height))
        assert psnr(crop(data, "fast"), crop(data, "exact")) > 28
        assert shrunk.pop() == seen


def test_the_crop_is_where_the_box_is() -> None:
    # A horizontal ramp in red and a vertical one in green: mean values tell the centre of the crop.
    x = np.linspace(0, 255, 512).round()[None].repeat(512, 0)
    data = encode(Image.fromarray(np.stack([x, x.T, x * 0], -1).astype(np.uint8)), quality=95)
    errors = []
    for seed in range(60):
        box = draw_box(512, 512, np.random.default_rng(seed), scale=(0.2, 0.9))
        found = crop(data, "fast", seed=seed, scale=(0.2, 0.9)).mean((1, 2))[:2]
        errors.append(found - np.array([box.left + box.right, box.top + box.bottom]) / 1024 * 255)
    # Half a decoded pixel, of which there are at least as many as in the square; and to no side in the mean.
    assert np.abs(errors).max() < 255 / 32 / 2
    assert np.abs(np.mean(errors, 0)).max() < 0.3


def test_other_pictures_are_the_exact_ways(shared: Path, shrunk: list[tuple[int, ...]]) -> None:
    exif = Image.Exif()
    exif[274] = 6
    odd = [encode(smooth(50, 40), kind) for kind in ("PNG", "WEBP", "GIF", "BMP", "TIFF")]
    odd += [encode(smooth(50, 40).convert("CMYK")), encode(smooth(50, 40), exif=exif)]
    odd += [encode(smooth(50, 40), "MPO", save_all=True, append_images=[smooth(50, 40, 1)])]
    odd += [(shared / "broken" / name).read_bytes() for name in ("cmyk.jpg", "gray16.png", "exif_rotated.jpg", "animated.gif")]
    for data in odd:
        assert np.array_equal(crop(data, "fast"), crop(data, "exact"))
    assert not shrunk


def test_upright_photographs_with_exif_are_fast(shrunk: list[tuple[int, ...]]) -> None:
    exif = Image.Exif()
    exif[315] = "somebody"
    for orientation in (None, 1, 9):
        if orientation:
            exif[274] = orientation
        crop(encode(smooth(50, 40), exif=exif), "fast")
    assert len(shrunk) == 3
    # The orientation may stand in XMP alone.
    xmp = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:Description tiff:Orientation="6"/></x:xmpmeta>'
    data = encode(smooth(50, 40), xmp=xmp)
    assert np.array_equal(crop(data, "fast"), crop(data, "exact")) and len(shrunk) == 3


def test_adobes_rgb_without_ycc(shrunk: list[tuple[int, ...]]) -> None:
    data = encode(smooth(60, 60), keep_rgb=True, quality=95)
    assert psnr(crop(data, "fast"), crop(data, "exact")) > 35 and len(shrunk) == 1


def test_broken_pictures_are_refused_alike(shared: Path) -> None:
    files = sorted(p for p in (shared / "broken").iterdir() if p.suffix in (".jpg", ".png", ".gif"))
    assert len(files) > 10
    refused = 0
    for path in files:
        data = path.read_bytes()
        found = verdict(data, "fast")
        assert found == verdict(data, "exact"), path.name
        refused += found[0] is not None
    assert refused >= 5


damage = st.lists(
    st.tuples(st.sampled_from(["set", "cut", "drop", "add"]), st.floats(0, 1), st.binary(min_size=1, max_size=9)), max_size=4
)


EXIF = Image.Exif()
EXIF[274], EXIF[315] = 1, "somebody"
XMP = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:Description tiff:Orientation="1"/></x:xmpmeta>'
OPTIONS = [
    {},
    {"progressive": True},
    {"restart_marker_blocks": 2},
    {"subsampling": 0, "optimize": True},
    {"exif": EXIF},
    {"xmp": XMP},
]


@pytest.mark.filterwarnings("ignore")  # Pillow warns of odd tags
@settings(max_examples=300, deadline=None)
@given(
    options=st.sampled_from(OPTIONS),
    size=st.tuples(st.integers(1, 70), st.integers(1, 70)),
    grey=st.booleans(),
    faults=damage,
)
def test_damaged_jpegs_are_refused_alike(
    options: dict[str, object], size: tuple[int, int], grey: bool, faults: list[tuple[str, float, bytes]]
) -> None:
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))
    data = bytearray(encode(image.convert("L") if grey else image, **options))
    for kind, where, payload in faults:
        place = int(where * len(data))
        if kind == "cut":
            del data[place:]
        elif kind == "drop":
            del data[place : place + len(payload)]
        else:
            data[place : place + (len(payload) if kind == "set" else 0)] = payload
    # The same reason, and the same numbers left: the replacement of a refused sample is drawn from them.
    assert verdict(bytes(data), "fast") == verdict(bytes(data), "exact")


def test_every_cut_of_a_jpeg_is_judged_alike() -> None:
    for options in ({}, {"progressive": True}):
        data = encode(smooth(40, 24), quality=60, **options)
        for end in range(len(data)):
            assert verdict(data[:end], "fast") == verdict(data[:end], "exact"), end


def test_the_replacement_of_a_damaged_picture_is_the_same() -> None:
    class Pictures:
        def __init__(self, decoder: Decoder) -> None:
            self.decoder: Decoder = decoder
            self.taken: list[int] = []

        def __len__(self) -> int:
            return 50

        def describe(self, index: int) -> tuple[str, str]:
            return "here", str(index)

        def load(self, index: int, rng: np.random.Generator) -> int:
            data = encode(smooth(40, 40))
            self.taken.append(index)
            training_crop(data if index > 40 else data[: len(data) // 2], 16, rng, scale=SCALE, decoder=self.decoder)
            return index

    fast, exact = (Pictures(way) for way in ("fast", "exact"))  # type: ignore[arg-type]
    for pictures in (fast, exact):
        for index in range(10):
            ReplacingSet(pictures, seed=1)[Position(0, index)]
    assert fast.taken == exact.taken and len(fast.taken) > 20


@pytest.mark.parametrize("decoder", ["fast", "exact"])
def test_limit_on_pixels(decoder: Decoder) -> None:
    data = encode(smooth(40, 30))
    with pytest.raises(SampleError, match=r"^40 x 30 pixels are over the limit of 1199$"):
        training_crop(data, 8, np.random.default_rng(0), scale=SCALE, decoder=decoder, max_pixels=1199)


@settings(max_examples=80, deadline=None)
@given(
    size=st.tuples(st.integers(1, 120), st.integers(1, 120)),
    out=st.integers(1, 40),
    seed=st.integers(0, 2**32),
    low=st.floats(1e-4, 1),
)
def test_every_size_survives(size: tuple[int, int], out: int, seed: int, low: float) -> None:
    data = encode(Image.new("RGB", size, (10, 120, 200)), quality=100, subsampling=0)
    view = crop(data, "fast", out, seed=seed, scale=(low, 1.0))
    assert view.shape == (3, out, out)
    assert np.abs(view.astype(int) - np.array([10, 120, 200])[:, None, None]).max() <= 2


def photographs(shared: Path) -> list[bytes]:
    folder = shared / "coco-mini" / "images"
    found = [path.read_bytes() for path in sorted(folder.rglob("*.jpg"))]
    assert len(found) > 100
    return found


def test_photographs_look_the_same(shared: Path) -> None:
    values = {scale: [] for scale in ((0.9, 1.0), (0.08, 1.0))}  # type: ignore[var-annotated]
    for number, data in enumerate(photographs(shared)):
        for scale, found in values.items():
            fast, exact = (crop(data, way, 224, seed=number, scale=scale) for way in ("fast", "exact"))  # type: ignore[arg-type]
            found.append(psnr(fast, exact))
    assert min(np.mean(found) for found in values.values()) > 33
    assert min(min(found) for found in values.values()) > 20


def test_evaluation_sees_pillows_pixels(shared: Path) -> None:
    for data in photographs(shared):
        plain = Image.open(io.BytesIO(data)).convert("RGB")
        assert decode_image(data).tobytes() == plain.tobytes()
        view = np.asarray(plain.resize((64, 64), Image.Resampling.BICUBIC)).transpose(2, 0, 1)
        assert np.array_equal(fit_square(decode_image(data), 64, fit="squash"), view)
