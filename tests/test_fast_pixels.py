"""The fast ways to a pixel give Pillow's pixels, and step aside where they would not."""

from __future__ import annotations

import io

import numpy as np
import pytest
from data_files import official_pixels
from PIL import Image

from jitjax.data import image, jpeg, resample

MAX_PIXELS = 10**7


@pytest.fixture
def fresh():
    """Forgets what was found out about the installed libraries, before and after."""
    found = (resample._works, resample._window, resample._steps, jpeg._simplejpeg_is_pillow)
    for function in found:
        function.cache_clear()
    yield
    for function in found:
        function.cache_clear()


def noise(width: int, height: int, seed: int) -> Image.Image:
    """Half noise, half smooth: steep edges that overshoot, and flat parts."""
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    pixels[: height // 2] = np.linspace(0, 255, width, dtype=np.uint8)[:, None]
    return Image.fromarray(pixels)


def encoded(picture: Image.Image, **options) -> bytes:
    file = io.BytesIO()
    picture.save(file, "JPEG", **options)
    return file.getvalue()


def pillows(data: bytes) -> np.ndarray | None:
    try:
        return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
    except Exception:
        return None


def test_the_square_is_pillows_for_every_shape():
    """Also proves that it is the fast way that is tested: Pillow is left only pictures that are oblong."""
    rng = np.random.default_rng(1)
    assert resample._works(), "Numba is a dependency"
    fast = 0
    for seed in range(300):
        width = int(rng.integers(2, 600))
        height = max(2, round(width * np.exp(rng.uniform(-0.8, 0.8))))
        size = int(rng.choice([8, 16, 31, 64, 100, 256]))
        picture = noise(width, height, seed)
        file = io.BytesIO()
        picture.save(file, "BMP")
        got = resample.centre_square(np.asarray(picture), image._sizes(picture.size, size), size)
        if got is None:
            ratio = max(width, height) / min(width, height)
            assert ratio > 1.5 or min(width, height) < 4 * size, (width, height, size)
        else:
            fast += 1
            assert np.array_equal(got, official_pixels(file, size)), (width, height, size)
        assert np.array_equal(image.preprocess(picture, size), official_pixels(file, size)), (width, height, size)
    assert fast > 200


@pytest.mark.parametrize("subsampling", ["4:4:4", "4:2:2", "4:2:0"])
def test_the_fast_decoder_gives_pillows_pixels(subsampling):
    assert jpeg._simplejpeg_is_pillow(), "simplejpeg is a dependency"
    rng = np.random.default_rng(2)
    for seed in range(120):
        width, height = (int(edge) for edge in rng.integers(1, 120, 2))
        options = dict(quality=int(rng.integers(5, 101)), subsampling=subsampling, progressive=seed % 3 == 0)
        data = encoded(noise(width, height, seed), **options, restart_marker_rows=int(seed % 5 == 0), optimize=seed % 2 == 0)
        got = jpeg.decode_plain_jpeg(data, MAX_PIXELS)
        assert got is not None and np.array_equal(got, pillows(data)), (width, height, options)


@pytest.mark.parametrize("subsampling", ["440", "411"])
def test_samplings_that_pillow_does_not_write(subsampling):
    rng = np.random.default_rng(3)
    for seed in range(120):
        width, height = (int(edge) for edge in rng.integers(1, 120, 2))
        pixels = np.asarray(noise(width, height, seed))
        data = jpeg.simplejpeg.encode_jpeg(pixels, int(rng.integers(5, 101)), colorsubsampling=subsampling)
        frame = data.index(b"\xff\xc0")
        assert data[frame + 11] == {"440": 0x12, "411": 0x41}[subsampling]
        got = jpeg.decode_plain_jpeg(data, MAX_PIXELS)
        assert got is not None and np.array_equal(got, pillows(data)), (width, height)


def test_what_is_no_ordinary_jpeg_is_left_to_pillow():
    photo = noise(60, 50, 0)
    png = io.BytesIO()
    photo.save(png, "PNG")
    for data in (
        encoded(photo.convert("L")),
        encoded(photo.convert("CMYK")),
        png.getvalue(),
        b"",
        b"\xff\xd8",
        b"\xff\xd8\xff",
    ):
        assert jpeg.decode_plain_jpeg(data, MAX_PIXELS) is None
    assert jpeg.decode_plain_jpeg(encoded(photo), 60 * 50 - 1) is None


def test_a_damaged_jpeg_is_never_decoded_to_what_pillow_does_not_give():
    rng = np.random.default_rng(3)
    files = [
        encoded(noise(90, 70, seed), quality=90, subsampling=seed % 3, progressive=seed % 2 == 1, restart_marker_rows=seed % 4)
        for seed in range(12)
    ]
    survived = refused = 0
    for number in range(6000):
        whole = files[number % len(files)]
        data = bytearray(whole)
        if number % 5 == 0:
            del data[int(rng.integers(1, len(data))) :]
        reach = min(len(data), 700) if number % 2 else len(data)  # in the headers, or anywhere
        for place in rng.integers(0, reach, rng.integers(1, 3)):
            data[place] = rng.integers(0, 256)
        got = jpeg.decode_plain_jpeg(bytes(data), MAX_PIXELS)
        if got is None:
            refused += 1
        else:
            survived += data != whole
            want = pillows(bytes(data))
            assert want is not None and np.array_equal(got, want), number
    assert survived > 300 and refused > 300


@pytest.mark.parametrize("missing", ["numba", "simplejpeg", "both"])
def test_without_the_optional_libraries_the_pixels_are_the_same(fresh, monkeypatch, missing):
    if missing != "simplejpeg":
        monkeypatch.setattr(resample, "numba", None)
    if missing != "numba":
        monkeypatch.setattr(jpeg, "simplejpeg", None)
    for seed, (width, height) in enumerate([(250, 187), (133, 200), (64, 64), (40, 300)]):
        data = encoded(noise(width, height, seed), quality=92)
        assert np.array_equal(image.decode(data, 64), official_pixels(io.BytesIO(data), 64))
    assert resample._works() == (missing == "simplejpeg")
    assert jpeg._simplejpeg_is_pillow() == (missing == "numba")


def test_libraries_with_other_pixels_are_noticed_and_not_used(fresh, monkeypatch):
    resize, decode = resample._resize, jpeg._decode

    def other_resize(*arguments):
        resize(*arguments)
        arguments[-1][0, 0, 0] ^= 1

    monkeypatch.setattr(resample, "_resize", other_resize)
    monkeypatch.setattr(jpeg, "_decode", lambda data: decode(data) ^ 1)
    data = encoded(noise(250, 187, 0), quality=92)
    assert np.array_equal(image.decode(data, 64), official_pixels(io.BytesIO(data), 64))
    assert not resample._works() and not jpeg._simplejpeg_is_pillow()
