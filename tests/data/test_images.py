"""Pictures: every oddity of the broken set, limits from the header, and the shapes and values of both views."""

from __future__ import annotations

import io
import random
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torchvision import transforms

from mmkit.data.bounds import MAX_BYTES
from mmkit.data.images import ImageRef, Pixels, decode_image, draw_box, fit_square, random_resized_crop, to_chw
from mmkit.data.skipped import SampleError


def pixels(image: Image.Image) -> np.ndarray:
    return np.asarray(image).astype(int)


def encode(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def decode(shared: Path, name: str) -> Image.Image:
    image = decode_image((shared / "broken" / name).read_bytes())
    assert image.mode == "RGB"
    return image


def test_sound_pictures(shared: Path) -> None:
    assert decode(shared, "good.jpg").size == (96, 72)
    one = decode(shared, "one_pixel.png")
    assert (one.size, one.getpixel((0, 0))) == ((1, 1), (10, 120, 200))


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("truncated.jpg", "cannot be decoded.*truncated"),
        ("zero_bytes.jpg", "the file is empty"),
        ("text_named.jpg", r"is no picture \(starts with '<"),
        ("bomb_900_megapixels.png", "claims more pixels than the limit of 100000000"),
        ("header_only_4_gigapixels.png", "claims more pixels than the limit of 100000000"),
        ("large_108_megapixels.png", "^12000 x 9000 pixels are over the limit of 100000000$"),
    ],
)
def test_refused_with_the_reason_and_flat_memory(shared: Path, name: str, reason: str) -> None:
    data = (shared / "broken" / name).read_bytes()
    tracemalloc.start()
    try:
        for _ in range(2):  # Pillow's own warning comes once a process; the answer must not
            with pytest.raises(SampleError, match=reason) as caught:
                decode_image(data)
            assert "\n" not in str(caught.value)
        assert tracemalloc.get_traced_memory()[1] < 5e6
    finally:
        tracemalloc.stop()


def test_bombs_are_refused_before_any_pixel_is_decoded(shared: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def load(self: Image.Image) -> None:
        raise AssertionError("decoded")

    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", load)
    for name in ("bomb_900_megapixels.png", "large_108_megapixels.png", "header_only_4_gigapixels.png"):
        with pytest.raises(SampleError, match=r"over the limit|more pixels"):
            decode(shared, name)


def test_limit_is_the_callers() -> None:
    data = encode(Image.new("RGB", (40, 30)))
    assert decode_image(data, max_pixels=1200).size == (40, 30)
    with pytest.raises(SampleError, match=r"^40 x 30 pixels are over the limit of 1199$"):
        decode_image(data, max_pixels=1199)


def test_cmyk(shared: Path) -> None:
    values = pixels(decode(shared, "cmyk.jpg"))
    width = values.shape[1]
    assert np.abs(values[:, : width // 2 - 4] - (0, 255, 255)).max() < 40
    assert np.abs(values[:, width // 2 + 4 :] - (255, 255, 0)).max() < 40


def test_sixteen_bit_grey_is_a_smooth_ramp(shared: Path) -> None:
    row = pixels(decode(shared, "gray16.png"))[10, :, 0]
    assert (row[0], row[-1], len(row)) == (0, 255, 64)
    steps = np.diff(row)
    assert steps.min() >= 3
    assert steps.max() <= 5


def test_float_and_int32_pictures() -> None:
    ramp = np.linspace(0, 1, 8, dtype=np.float32)[None].repeat(2, 0)
    found = pixels(decode_image(encode(Image.fromarray(ramp), "TIFF")))
    assert found[0, :, 1].tolist() == [0, 36, 73, 109, 146, 182, 219, 255]
    assert pixels(decode_image(encode(Image.fromarray(np.full((2, 2), 32768, np.int32)), "TIFF"))).tolist()[0][0] == [128] * 3


def test_animation_gives_its_first_frame(shared: Path) -> None:
    assert (pixels(decode(shared, "animated.gif")) == (220, 30, 30)).all()


def test_transparency_is_shown_on_white(shared: Path) -> None:
    values = pixels(decode(shared, "palette_transparent.png"))
    assert values[0, 0].tolist() == [255, 255, 255]
    height, width = values.shape[:2]
    assert values[height // 2, width // 2].argmax() == 1, "the square in the middle is green"
    magenta = (values[..., 0] > 200) & (values[..., 1] < 100) & (values[..., 2] > 200)
    assert not magenta.any()
    half = decode_image(encode(Image.new("RGBA", (2, 2), (255, 0, 0, 128))))
    assert half.getpixel((0, 0)) == (255, 127, 127)
    assert decode_image(encode(Image.new("LA", (2, 2), (0, 0)))).getpixel((1, 1)) == (255, 255, 255)


def test_exif_orientation_is_applied(shared: Path) -> None:
    image = decode(shared, "exif_rotated.jpg")
    assert image.size == (60, 80)
    values = pixels(image)
    assert values[3, 30].argmax() == 0
    assert values[-4, 30].argmax() == 2


def test_missing_file_and_odd_names(tmp_path: Path) -> None:
    for name in ("none.jpg", "a\0b.jpg", "\ud83d.jpg"):
        with pytest.raises(SampleError, match="cannot be read"):
            ImageRef(str(tmp_path / name)).read()
    with pytest.raises(SampleError, match="cannot be read"):
        ImageRef(str(tmp_path)).read()


def test_long_files_are_refused_unread(tmp_path: Path) -> None:
    path = tmp_path / "f"
    path.write_bytes(bytes(100))
    assert ImageRef(str(path)).read(100) == bytes(100)
    assert ImageRef(str(path), 90, 10).read(10) == bytes(10)
    for ref, size in ((ImageRef(str(path)), 100), (ImageRef(str(path), 20), 80), (ImageRef(str(path), 20, 70), 70)):
        with pytest.raises(SampleError, match=rf"^{size} bytes are over the limit of 60$"):
            ref.read(60)
    # The default too: the file has a hole, so that it takes no space.
    with path.open("r+b") as file:
        file.truncate(MAX_BYTES + 1)
    with pytest.raises(SampleError, match="over the limit of 67108864"):
        ImageRef(str(path)).read()


def test_programs_are_not_started() -> None:
    # Pillow hands EPS to Ghostscript.
    with pytest.raises(SampleError, match=r"is no picture \(starts with '%!PS"):
        decode_image(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n%%EOF\n")


def test_slices_of_a_file(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(b"0123456789")
    assert ImageRef(str(tmp_path / "f"), 3, 4).read() == b"3456"
    assert ImageRef(str(tmp_path / "f"), 3, 0).read() == b""
    assert ImageRef(str(tmp_path / "f")).read() == b"0123456789"


@pytest.mark.filterwarnings("ignore")  # Pillow warns of odd TIFF tags
def test_damaged_bytes_are_decoded_or_refused_never_a_crash(shared: Path) -> None:
    rng = random.Random(0)
    exif = Image.Exif()
    exif[274], exif[315] = 6, "somebody"
    picture = decode(shared, "good.jpg")
    kinds = [encode(picture, k, exif=exif) for k in ("PNG", "JPEG", "WEBP")] + [encode(picture, "TIFF"), encode(picture, "GIF")]
    refused = 0
    for _ in range(600):
        data = bytearray(rng.choice(kinds))
        for _ in range(rng.choice([1, 3, 12])):
            data[rng.randrange(min(len(data), rng.choice([64, 300, 10**6])))] = rng.choice([0, 255, rng.randrange(256)])
        try:
            assert decode_image(bytes(data), max_pixels=1_000_000).mode == "RGB"
        except SampleError as error:
            refused += 1
            assert "\n" not in str(error)
    assert 100 < refused < 600


def stripes() -> Image.Image:
    """40 x 20: red left quarter, green middle, blue right quarter."""
    image = Image.new("RGB", (40, 20), (0, 255, 0))
    image.paste((255, 0, 0), (0, 0, 10, 20))
    image.paste((0, 0, 255), (30, 0, 40, 20))
    return image


def test_squash_keeps_all_and_ignores_the_aspect() -> None:
    view = fit_square(stripes(), 16, fit="squash")
    assert (view.shape, view.dtype, view.flags["C_CONTIGUOUS"]) == ((3, 16, 16), np.uint8, True)
    assert view[:, 8, 0].tolist() == [255, 0, 0]
    assert view[:, 8, 8].tolist() == [0, 255, 0]
    assert view[:, 8, 15].tolist() == [0, 0, 255]


def test_crop_takes_the_centre() -> None:
    view = fit_square(stripes(), 16, fit="crop")
    # The bicubic kernel of the outermost columns reaches a little beyond the cut.
    assert (view[1, :, 1:-1] == 255).all()
    assert view[1].min() > 240
    assert max(view[0].max(), view[2].max()) < 15


def test_pad_keeps_the_aspect_on_the_fill_colour() -> None:
    view = fit_square(stripes(), 40, fit="pad")
    assert view[:, 0, 0].tolist() == view[:, -1, -1].tolist() == [122, 116, 104]
    assert view[:, 20, 2].tolist() == [255, 0, 0]
    assert view[:, 12, 20].tolist() == [0, 255, 0]
    assert fit_square(stripes(), 40, fit="pad", fill=(1, 2, 3))[:, 0, 0].tolist() == [1, 2, 3]


def test_padding_a_very_long_picture_stays_small() -> None:
    line = Image.new("RGB", (60_000, 3), (200, 10, 10))  # its full square would take 10.8 GB
    view = fit_square(line, 32, fit="pad")
    assert view.shape == (3, 32, 32)
    assert view[:, 0, 0].tolist() == [122, 116, 104]


@settings(max_examples=60, deadline=None)
@given(
    width=st.integers(1, 90),
    height=st.integers(1, 90),
    size=st.integers(1, 40),
    seed=st.integers(0, 2**32),
    low=st.floats(1e-4, 1),
)
def test_every_size_survives_every_view(width: int, height: int, size: int, seed: int, low: float) -> None:
    image = Image.new("RGB", (width, height), (10, 120, 200))
    views: list[Pixels] = [fit_square(image, size, fit=fit) for fit in ("squash", "crop")]  # type: ignore[arg-type]
    views.append(random_resized_crop(image, size, np.random.default_rng(seed), scale=(low, 1.0)))
    for view in views:
        assert (view.shape, view.dtype) == ((3, size, size), np.uint8)
        assert (view == np.array([10, 120, 200], np.uint8)[:, None, None]).all()
    padded = fit_square(image, size, fit="pad")
    assert padded.shape == (3, size, size)


def noise(width: int = 50, height: int = 40) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))


def test_random_crop_depends_on_its_numbers_alone() -> None:
    def crop(seed: int) -> Pixels:
        return random_resized_crop(noise(), 16, np.random.default_rng(seed), scale=(0.3, 0.9))

    assert np.array_equal(crop(1), crop(1))
    assert len({crop(seed).tobytes() for seed in range(20)}) == 20


def test_random_crop_covers_the_asked_area() -> None:
    # A horizontal ramp: the range of values in a crop tells its width, a vertical one its height.
    x = np.linspace(0, 255, 256)[None].repeat(256, 0)
    image = Image.fromarray(np.stack([x, x.T, x * 0], -1).astype(np.uint8))
    shares = []
    for seed in range(60):
        view = random_resized_crop(image, 64, np.random.default_rng(seed), scale=(0.25, 0.5)).astype(int)
        shares.append(np.ptp(view[0]) * np.ptp(view[1]) / 255**2)
    assert 0.22 < min(shares) < 0.3
    assert 0.43 < max(shares) < 0.53


@pytest.mark.parametrize(("width", "height"), [(200, 10), (10, 200), (640, 480), (500, 400), (7, 7)])
def test_a_picture_without_such_a_crop_is_seen_from_its_centre_as_torchvision_does(width: int, height: int) -> None:
    # An area beyond the picture never fits, so both always fall back.
    box = draw_box(width, height, np.random.default_rng(0), scale=(2.0, 3.0))
    i, j, h, w = transforms.RandomResizedCrop.get_params(torch.zeros(3, height, width), scale=[2.0, 3.0], ratio=[3 / 4, 4 / 3])
    # torchvision rounds to whole pixels.
    assert np.abs(np.asarray(box) - [j, i, j + w, i + h]).max() < 1


def test_chw() -> None:
    assert to_chw(Image.new("RGB", (3, 2), (1, 2, 3)))[:, 1, 2].tolist() == [1, 2, 3]
    assert to_chw(Image.new("RGB", (3, 2))).shape == (3, 2, 3)


def test_a_colour_that_stands_for_transparency_is_white() -> None:
    image = Image.new("RGB", (2, 1), (255, 0, 0))
    image.putpixel((1, 0), (0, 0, 255))
    data = encode(image, "PNG", transparency=(255, 0, 0))
    assert pixels(decode_image(data)).tolist() == [[[255, 255, 255], [0, 0, 255]]]


def test_pixels_that_are_no_numbers() -> None:
    values = np.asarray([[0.5, np.nan]], dtype=np.float32)
    with pytest.raises(SampleError, match="pixels that are no numbers"):
        decode_image(encode(Image.fromarray(values), "TIFF"))
