"""Images that readers trip over: decoded as the official loader does, or replaced, counted and reported; never a
crash.
"""

from __future__ import annotations

import io
import logging
import os
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from conftest import shared
from data_files import caltech_folder, official_pixels
from PIL import Image

from jitjax.data import make_iterator, open_dataset
from jitjax.data.image import BadImage, decode, open_picture, preprocess
from jitjax.errors import UserError

SIZE = 64


@pytest.fixture(scope="module")
def photographs(tmp_path_factory):
    return sorted(caltech_folder(tmp_path_factory.mktemp("caltech"), every=250).glob("*/*.jpg"))


def official(data: bytes) -> np.ndarray | None:
    """The picture that `Image.open(...).convert("RGB")` gives, or None where it fails."""
    try:
        return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
    except Exception:
        return None


def encoded(picture: Image.Image, kind: str, **options) -> bytes:
    file = io.BytesIO()
    picture.save(file, kind, **options)
    return file.getvalue()


@pytest.mark.parametrize("size", [32, 64, 256])
def test_the_crop_is_the_published_one_bit_for_bit(size):
    reference = np.load(shared("parity/preprocess.npz"))
    files = sorted(shared("parity/preprocess").glob("*.jpg"))
    assert len(files) == 24
    for file in files:
        assert np.array_equal(decode(file.read_bytes(), size), reference[f"{file.name}/{size}"]), file.name


def test_every_mode_becomes_the_rgb_of_the_official_loader(photographs):
    photo = Image.open(photographs[0]).convert("RGB")
    red = np.asarray(photo)[..., 0]
    alpha = photo.copy()
    alpha.putalpha(Image.fromarray(red))
    files = {
        "grey jpeg": encoded(photo.convert("L"), "JPEG"),
        "cmyk jpeg": encoded(photo.convert("CMYK"), "JPEG"),
        "progressive jpeg": encoded(photo, "JPEG", progressive=True),
        "4:4:4 jpeg": encoded(photo, "JPEG", subsampling=0),
        "jpeg with comment and restarts": encoded(photo, "JPEG", comment=b"\xff\xc0" * 40, restart_marker_rows=1),
        "grey png": encoded(photo.convert("L"), "PNG"),
        "16-bit png": encoded(Image.fromarray(red.astype(np.uint16) * 257), "PNG"),
        "1-bit png": encoded(photo.convert("1"), "PNG"),
        "palette png": encoded(photo.convert("P"), "PNG"),
        "transparent palette png": encoded(photo.convert("P"), "PNG", transparency=3),
        "alpha png": encoded(alpha, "PNG"),
        "grey alpha png": encoded(alpha.convert("LA"), "PNG"),
        "alpha webp": encoded(alpha, "WEBP"),
        "palette gif": encoded(photo.convert("P"), "GIF"),
        "animated gif": encoded(photo.convert("P"), "GIF", save_all=True, append_images=[photo.convert("P").rotate(90)]),
        "bmp": encoded(photo, "BMP"),
    }
    for name, data in files.items():
        assert np.array_equal(np.asarray(open_picture(data)), official(data)), name
        assert np.array_equal(decode(data, SIZE), preprocess(Image.fromarray(official(data)), SIZE)), name
        assert decode(data, 48).shape == (48, 48, 3), name


# Of the collection of awkward files these cannot be decoded, by us or by the official loader; the others are CMYK,
# grey, palette, alpha, 16-bit, animated, EXIF-rotated, oblong or large, and give the official loader's pixels.
UNDECODABLE = {
    "pillow__broken.png",
    "pillow__broken_data_stream.png",
    "pillow__la.tga",
    "pillow__truncated_jpeg.jpg",
    "pillow__zero_width.gif",
}


def png16(values: np.ndarray) -> bytes:
    """A PNG of 16 bits from (H, W, 3) uint16, which Pillow does not write."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", values.shape[1], values.shape[0], 16, 2, 0, 0, 0)
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def test_high_depth_scales_what_pillow_gives_and_refuses_the_rest():
    """Of colour of 16 bits Pillow gives the upper 8: the range of the type within 1, but no picture's own."""
    values = np.linspace(0, 65535, 8 * 8 * 3).astype(np.uint16).reshape(8, 8, 3)
    for how in ("clip", "range"):
        assert np.abs(decode(png16(values), 8, high_depth=how) - values / 257).max() < 1
    with pytest.raises(BadImage, match="16 bits with colour or alpha.*high_depth=range or scale"):
        decode(png16(values >> 4), 8, high_depth="picture")


def test_range_is_one_scale_for_all_pictures_of_a_type():
    grey = {top: encoded(Image.fromarray(np.full((8, 8), top, np.int32)), "TIFF") for top in (30_000, 60_000, 65_535, 70_000)}
    assert [int(decode(grey[top], 8, high_depth="range")[0, 0, 0]) for top in (30_000, 60_000, 65_535)] == [117, 233, 255]
    with pytest.raises(BadImage, match="values from 70000 to 70000 are outside 0..65535; use high_depth=picture or scale"):
        decode(grey[70_000], 8, high_depth="range")


def test_the_collection_of_awkward_files():
    files = sorted(shared("data/bad").iterdir())
    assert len(files) == 22
    refused = set()
    for file in files:
        try:
            pixels = decode(file.read_bytes(), SIZE)
        except BadImage as error:
            refused.add(file.name)
            assert str(error) and "\n" not in str(error) and len(str(error)) < 200
        else:
            assert np.array_equal(pixels, official_pixels(file, SIZE)), file.name
    assert refused == UNDECODABLE


def test_exif_rotation_is_an_option(tmp_path):
    source = shared("data/bad/pillow__hopper_orientation_6.jpg")
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "x.jpg").write_bytes(source.read_bytes())
    as_stored = open_dataset(tmp_path, SIZE)[0]["image"]
    turned = open_dataset(tmp_path, SIZE, exif_rotate=True)[0]["image"]
    picture = Image.open(source).convert("RGB")
    assert np.array_equal(as_stored, preprocess(picture, SIZE))
    assert np.array_equal(turned, preprocess(picture.transpose(Image.Transpose.ROTATE_270), SIZE))


def png_of_size(width: int, height: int) -> bytes:
    """A PNG of a few bytes that announces a huge picture."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")


def test_bombs_are_refused_before_they_take_memory(photographs):
    import tracemalloc

    jpeg = bytearray(photographs[0].read_bytes())
    frame = jpeg.index(b"\xff\xc0") + 5
    jpeg[frame : frame + 4] = struct.pack(">HH", 65000, 65000)
    bombs = {
        "png of 4 gigapixels": png_of_size(65000, 65000),
        "jpeg of 4 gigapixels": bytes(jpeg),
        "gif of 4 gigapixels": b"GIF89a" + struct.pack("<HH", 65000, 65000) + bytes(30),
        "bmp of 4 gigapixels": b"BM"
        + struct.pack("<IHHIIiiHHIIIIII", 100, 0, 0, 54, 40, 65000, 65000, 1, 24, 0, 0, 0, 0, 0, 0),
        "one pixel wide": encoded(Image.new("L", (1, 60_000)), "PNG"),
    }
    tracemalloc.start()
    for name, data in bombs.items():
        with pytest.raises(BadImage):
            picture = decode(data, SIZE)
            raise AssertionError(f"{name} was decoded to {picture.shape}")
    assert tracemalloc.get_traced_memory()[1] < 64 * 2**20
    tracemalloc.stop()


def test_other_programs_are_never_started_for_a_file(tmp_path):
    """Pillow would run Ghostscript for an EPS file, whatever its name says."""
    with pytest.raises(BadImage, match="not an image of a known format"):
        decode(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n", SIZE)


def damage(data: bytes, others: list[bytes], rng: np.random.Generator) -> bytes:
    """One of eight kinds of damage at a random place."""
    broken = bytearray(data)
    place, kind = int(rng.integers(0, len(data))), int(rng.integers(0, 8))
    if kind == 0:
        del broken[place:]
    elif kind in (1, 2):  # anywhere, or in the header
        for spot in rng.integers(0, len(data) if kind == 1 else min(len(data), 700), rng.integers(1, 6)):
            broken[spot] = rng.integers(0, 256)
    elif kind == 3:
        del broken[place : place + int(rng.integers(1, 200))]
    elif kind == 4:
        broken[place:place] = rng.bytes(int(rng.integers(1, 50)))
    elif kind == 5:
        zeros = len(broken[place : place + 300])
        broken[place : place + zeros] = bytes(zeros)
    elif kind == 6:
        broken[place:] = others[int(rng.integers(0, len(others)))][place:]
    else:
        broken[:20] = rng.bytes(20)
    return bytes(broken)


@pytest.mark.filterwarnings("ignore")
def test_damaged_files_get_the_verdict_and_the_pixels_of_the_official_loader(photographs):
    rng = np.random.default_rng(20)
    photo = Image.open(photographs[1]).convert("RGB")
    good = [file.read_bytes() for file in photographs[:12]]
    good += [encoded(photo, kind) for kind in ("PNG", "WEBP", "GIF", "BMP")]
    good += [
        encoded(photo, "WEBP", lossless=True),
        encoded(photo, "JPEG", progressive=True),
        encoded(photo.convert("CMYK"), "JPEG"),
    ]
    usable = refused = 0
    for _ in range(6000):
        data = damage(good[int(rng.integers(0, len(good)))], good, rng)
        want = official(data)
        try:
            got = decode(data, 16)
        except BadImage as error:
            refused += 1
            assert str(error) and "\n" not in str(error)
            assert want is None or min(want.shape[:2]) * 200 < max(want.shape[:2]), "the official loader can read it"
        else:
            usable += 1
            assert want is not None, "the official loader cannot read it"
            assert np.array_equal(got, preprocess(Image.fromarray(want), 16))
    assert usable > 1500 and refused > 1500


# --- training on a folder with bad files ------------------------------------------------------------------------------


@pytest.fixture
def partly_bad(photographs, tmp_path):
    """Twenty files in two classes; numbers 4, 9 (end of its class) and 19 (the last) cannot be decoded."""
    for k in range(20):
        file = tmp_path / "ab"[k // 10] / f"{k:02d}.jpg"
        file.parent.mkdir(exist_ok=True)
        file.write_bytes(photographs[k].read_bytes())
    (tmp_path / "a" / "04.jpg").write_bytes(b"")
    (tmp_path / "a" / "09.jpg").write_bytes(photographs[9].read_bytes()[:800])
    (tmp_path / "b" / "19.jpg").unlink()
    (tmp_path / "b" / "19.jpg").symlink_to("nowhere.jpg")
    return tmp_path


@pytest.mark.parametrize("workers", [0, 1])
def test_a_bad_file_is_replaced_by_the_next_one_and_reported_once(partly_bad, caplog, workers):
    dataset = open_dataset(partly_bad, SIZE)
    options = dict(seed=1, global_batch=20, flip=False, max_bad_fraction=0.15, num_workers=workers)
    iterator = make_iterator(dataset, **options)
    stands_for = {4: 5, 9: 10, 19: 0}
    try:
        with caplog.at_level(logging.WARNING, logger="jitjax.data"):
            for batch in (next(iterator) for _ in range(5)):
                want = sorted(dataset[stands_for.get(k, k)]["image"].tobytes() for k in range(20))
                assert sorted(image.tobytes() for image in batch["image"]) == want
                # 9 -> 10 is a 1 for a 0, 19 -> 0 the reverse
                assert sorted(batch["label"].tolist()) == [0] * 10 + [1] * 10
    finally:
        iterator.close()
    assert sorted(iterator.bad_files) == [4, 9, 19]
    lines = [record.getMessage() for record in caplog.records if "using the next image" in record.getMessage()]
    assert sorted(Path(line.split(" cannot")[0]).name for line in lines) == ["04.jpg", "09.jpg", "19.jpg"]
    assert any("No such file" in line for line in lines) and any("the file is empty" in line for line in lines)


@pytest.mark.parametrize("workers", [0, 1])
def test_too_many_bad_files_stop_the_run(partly_bad, workers):
    iterator = make_iterator(open_dataset(partly_bad, SIZE), seed=0, global_batch=4, max_bad_fraction=0.1, num_workers=workers)
    try:
        with pytest.raises(
            UserError,
            match=r"1 of 20 images cannot be read and 2 of 20 images cannot be decoded, more than the 2 .*max_bad_fraction",
        ):
            for _ in range(20):
                next(iterator)
    finally:
        iterator.close()


def test_a_disk_that_goes_away_stops_the_run_instead_of_searching_it(photographs, tmp_path):
    (tmp_path / "a").mkdir()
    for k in range(30):
        (tmp_path / "a" / f"{k}.jpg").write_bytes(photographs[k % 20].read_bytes())
    dataset = open_dataset(tmp_path, SIZE)
    (tmp_path / "a").rename(tmp_path / "gone")
    iterator = make_iterator(dataset, seed=0, global_batch=8, max_bad_fraction=0.1)
    with pytest.raises(UserError, match="No such file"):
        next(iterator)
    iterator.close()


def test_a_forbidden_file_is_a_bad_image(partly_bad):
    dataset, user = open_dataset(partly_bad, SIZE), os.geteuid()
    (partly_bad / "a" / "00.jpg").chmod(0)
    if user == 0:
        os.seteuid(65534)  # root may read everything
    try:
        with pytest.raises(BadImage, match="Permission denied"):
            dataset[0]
    finally:
        os.seteuid(user)


def test_what_is_no_file_is_a_bad_image(partly_bad):
    os.mkfifo(partly_bad / "a" / "pipe.jpg")
    dataset = open_dataset(partly_bad, SIZE)
    (place,) = [k for k in range(len(dataset)) if dataset.source.name(k).endswith("pipe.jpg")]
    with pytest.raises(BadImage, match="not a file"):
        dataset[place]


def test_an_error_reaches_the_consumer_of_device_batches(partly_bad):
    import jax

    from jitjax.data import to_device

    host = make_iterator(open_dataset(partly_bad, SIZE), seed=0, global_batch=8, max_bad_fraction=0.0)
    batches = to_device(host, jax.sharding.SingleDeviceSharding(jax.devices()[0]))
    with pytest.raises(UserError, match="max_bad_fraction"):
        for _ in range(20):
            next(batches)
    with pytest.raises(UserError, match="max_bad_fraction"):  # and stays
        next(batches)
    batches.close()
