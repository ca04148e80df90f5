"""The protocol: labels, references from every kind of source, scores with all that must stand beside them."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image

from jitjax import metrics
from jitjax.data.dataset import open_dataset
from jitjax.errors import UserError
from jitjax.evaluation import extractor as extractors
from jitjax.evaluation import images as image_sets
from jitjax.evaluation.images import open_images
from jitjax.evaluation.score import class_balanced_labels, computed, make_statistics, open_reference, score
from jitjax.evaluation.seams import seam_index
from jitjax.evaluation.statistics import FID_EXTRACTOR, read_statistics, write_statistics

SIZE, DIM, SPATIAL = 8, 6, 4


def made(name: str = "toy", distance: str = "FD-Toy", resize: str = "none") -> extractors.Extractor:
    """A network of three matrices with every kind of output."""
    rng = np.random.default_rng(0)
    params = {n: rng.standard_normal((SIZE * SIZE * 3, d)).astype(np.float32) / 10 for n, d in OUTPUTS.items()}

    def forward(params, images):
        flat = images.reshape(len(images), -1) / np.float32(255)
        return {name: flat @ matrix for name, matrix in params.items()}

    run, batch_size = extractors._on_devices(forward, params, 32, jax.devices()[:2])
    return extractors.Extractor(name, distance, resize, DIM, tuple(OUTPUTS), batch_size, run, spatial_dim=SPATIAL)


OUTPUTS = {"features": DIM, "logits": 10, "spatial": SPATIAL}


@pytest.fixture(autouse=True)
def own_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def pictures(count: int, seed: int, size: int = SIZE, brighter: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 200, (count, size, size, 3)).astype(np.uint8) + np.uint8(brighter)


def write_folder(folder: Path, images: np.ndarray, classes: int = 0) -> Path:
    for i, image in enumerate(images):
        inside = folder / f"class{i % classes}" if classes else folder
        inside.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(inside / f"{i:05d}.png")
    return folder


def test_labels_are_balanced_in_the_official_order():
    labels = class_balanced_labels(12, 4)
    assert labels.dtype == np.int32 and labels.tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3]
    for count, classes in ((10, 4), (0, 4), (3, 4)):
        with pytest.raises(UserError, match=f"num={count} .* multiple"):
            class_balanced_labels(count, classes)


def test_scores_are_those_of_the_features_and_say_what_they_are():
    toy, generated, real = made(), pictures(130, 0, brighter=9), pictures(120, 1)
    reference, _ = open_reference(_npz(real), toy, SIZE)
    result = score(np.split(generated, [7, 100]), reference, toy, seed=3, about={"cfg_scale": 2.5})
    x, y = toy(generated), toy(real)
    assert result.values["fd_toy"] == pytest.approx(metrics.frechet_distance(x["features"], y["features"]), rel=1e-9)
    assert result.values["sfid"] == pytest.approx(metrics.frechet_distance(x["spatial"], y["spatial"]), rel=1e-9)
    assert result.values["kid"] == metrics.kid(x["features"], y["features"], 100, 120, 3)[0]
    assert "kid_std" not in result.values and any("subsets of 120 images, without a spread" in note for note in result.notes)
    assert (result.values["precision"], result.values["recall"]) == metrics.precision_recall(x["features"], y["features"])
    assert result.values["mind"] == metrics.mind(x["features"], y["features"], 3)
    assert result.values["is_toy"] == metrics.inception_score(x["logits"], seed=3)[0]
    assert "fid" not in result.values and not any(line.startswith("FID") for line in result.lines)
    assert len(result.lines) == 7  # one a score; standard deviations stand beside their means
    for line in result.lines:
        for said in ("evaluator jitjax", "extractor toy", "resize none", "real.npz", "N 130", "seed 3", "cfg_scale 2.5"):
            assert said in line, (said, line)
    assert result.notes[0].startswith("N is 130, not 50000") and "MIND" in result.notes[0]
    assert any("subsets of 120" in note for note in result.notes)


def _npz(images: np.ndarray, name: str = "real.npz") -> Path:
    import os

    path = Path(os.environ["XDG_CACHE_HOME"]).parent / name
    np.savez(path, arr_0=images)
    return path


def test_only_the_fid_inception_gives_a_score_called_fid():
    real = pictures(40, 0)
    for toy, name in ((made(FID_EXTRACTOR, "FID"), "fid"), (made(), "fd_toy")):
        reference, _ = open_reference(_npz(real), toy, SIZE)
        result = score([pictures(40, 1)], reference, toy)
        assert ("fid" in result.values) == (name == "fid") and name in result.values
        assert ("inception_score" in result.values) == (name == "fid")


def test_a_set_against_itself_scores_perfectly_from_every_source(tmp_path):
    toy, images = made(), pictures(60, 0)
    folder = write_folder(tmp_path / "set", images, classes=3)
    order = [i for c in range(3) for i in range(c, 60, 3)]
    statistics, _ = open_reference(_npz(images), toy, SIZE)
    write_statistics(tmp_path / "saved.npz", statistics)
    sources = [folder, _npz(images), tmp_path / "saved.npz", statistics, open_dataset(folder, SIZE)]
    for source in sources:
        reference, _ = open_reference(source, toy, SIZE)
        np.testing.assert_allclose(reference.mu, statistics.mu, rtol=1e-6)
        assert reference.count == 60 and reference.image_size == SIZE
        result = score([images[order]], reference, toy)
        assert abs(result.values["fd_toy"]) < 1e-6 and (result.values["precision"], result.values["recall"]) == (1, 1)
        assert result.values["mind"] < 1e-9
    opened = open_images(folder)
    assert (len(opened), opened.image_size) == (60, SIZE)
    np.testing.assert_array_equal(np.concatenate(list(opened)), images[order])
    write_folder(folder, images[:2])  # beside the folders
    write_folder(folder / "test", images[:3])
    (folder / "empty").mkdir()
    assert len(open_images(folder)) == 65
    with pytest.raises(UserError, match="--split=val is for a folder of images, and --reference=.*saved.npz is none"):
        open_reference(tmp_path / "saved.npz", toy, SIZE, reading={"split": "val"})


def test_statistics_of_a_data_set_are_cached_under_its_fingerprint(tmp_path):
    toy, folder = made(), write_folder(tmp_path / "set", pictures(30, 0))
    first, notes = open_reference(folder, toy, SIZE)
    again, notes_again = open_reference(folder, toy, SIZE)
    read = f"reference: 30 images without labels from {folder}"
    assert notes == [read] and notes_again[0] == read and "earlier run" in notes_again[1]
    np.testing.assert_array_equal(first.sigma, again.sigma)
    assert again.source == str(folder)
    other, notes_other = open_reference(folder, made(name="toy2"), SIZE)
    assert notes_other == [read] and other.extractor == "toy2"
    write_folder(tmp_path / "set", pictures(31, 1))
    changed, notes_changed = open_reference(folder, toy, SIZE)
    assert len(notes_changed) == 1 and changed.count == 31


def test_statistics_of_rewritten_files_are_made_anew(tmp_path):
    """The same names and file sizes with other contents."""
    toy, folder = made(), tmp_path / "set"
    folder.mkdir()
    for i, image in enumerate(pictures(30, 0)):
        Image.fromarray(image).save(folder / f"{i}.bmp")
    before, _ = open_reference(folder, toy, SIZE)
    for i, image in enumerate(pictures(30, 0)):
        Image.fromarray(255 - image).save(folder / f"{i}.bmp")
    after, notes = open_reference(folder, toy, SIZE)
    assert len(notes) == 1 and not np.allclose(before.mu, after.mu)


def test_statistics_of_files_read_otherwise_are_made_anew(tmp_path):
    """The same files with 16 bits, scaled and clipped."""
    toy, folder = made(), tmp_path / "deep"
    folder.mkdir()
    for i, image in enumerate(np.random.default_rng(0).integers(0, 2**16, (20, SIZE, SIZE)).astype(np.uint16)):
        Image.fromarray(image).save(folder / f"{i}.png")
    scaled, _ = open_reference(folder, toy, SIZE, reading={"high_depth": "range"})
    clipped, notes = open_reference(folder, toy, SIZE, reading={"high_depth": "clip"})
    assert len(notes) == 1 and not np.allclose(scaled.mu, clipped.mu)
    again, notes = open_reference(folder, toy, SIZE, reading={"high_depth": "range"})
    assert "earlier run" in notes[1] and np.array_equal(scaled.mu, again.mu)


@pytest.mark.parametrize("threads", [1, 2, 4])
@pytest.mark.parametrize("count", [0, 1, 64, 65, 256, 257, 320, 576, 1000])
def test_every_image_is_read_in_order(threads, count, monkeypatch):
    """However many images are read ahead."""
    monkeypatch.setattr(image_sets, "_THREADS", threads)
    read = list(image_sets._read_in_threads(lambda i: None if i == 3 else np.full((1, 1, 3), i, np.int32), count))
    assert [int(image.flat[0]) for batch in read for image in batch] == [i for i in range(count) if i != 3]


def test_images_that_vanish_without_a_reason_are_no_statistics(tmp_path):
    class Short(list):
        def __len__(self):
            return 40

    with pytest.raises(RuntimeError, match="30 of 40 images were read"):
        make_statistics(Short([pictures(30, 0)]), made(), source="x", image_size=SIZE)


def test_a_folder_is_read_at_the_size_of_the_samples_and_skipped_images_are_reported(tmp_path):
    folder = write_folder(tmp_path / "large", pictures(20, 0, size=24))
    (folder / "00003.png").write_bytes((folder / "00003.png").read_bytes()[:60])
    reference, notes = open_reference(folder, made(), SIZE)
    assert (reference.count, reference.image_size) == (19, SIZE)
    assert "1 images could not be decoded" in notes[1] and "00003.png" in notes[1]
    _, notes = open_reference(folder, made(), SIZE)
    assert "earlier run" in notes[1] and "1 images could not be decoded" in notes[2]


def test_moments_alone_leave_out_what_needs_features(tmp_path):
    toy = made()
    full, _ = open_reference(_npz(pictures(50, 0)), toy, SIZE)
    np.savez(tmp_path / "foreign.npz", mu=full.mu, sigma=full.sigma)
    reference, notes = open_reference(tmp_path / "foreign.npz", toy, SIZE)
    assert len(notes) == 3
    result = score([pictures(50, 1)], reference, toy)
    assert set(result.values) == {"fd_toy", "is_toy", "is_toy_std"}
    assert any("sFID left out" in note for note in result.notes)
    assert any("MIND left out" in note for note in result.notes)


def test_adms_reference_batch_gives_fid_from_moments_and_the_rest_from_its_images(tmp_path):
    toy, sample = made(), pictures(40, 0)
    full, _ = open_reference(_npz(pictures(90, 5)), toy, SIZE)
    moments = {"mu": full.mu, "sigma": full.sigma, "mu_s": full.mu_s, "sigma_s": full.sigma_s}
    np.savez(tmp_path / "VIRTUAL_labeled.npz", arr_0=sample, **moments)
    reference, notes = open_reference(tmp_path / "VIRTUAL_labeled.npz", toy, SIZE)
    np.testing.assert_array_equal(reference.sigma_s, full.sigma_s)
    np.testing.assert_allclose(reference.features, toy(sample)["features"])
    assert any("40 images (arr_0)" in note for note in notes)
    with pytest.raises(UserError, match="8 px, the scored ones 16 px"):
        open_reference(tmp_path / "VIRTUAL_labeled.npz", toy, 16)


def test_what_is_undefined_for_few_images_is_left_out_and_said():
    toy = made()
    reference, _ = open_reference(_npz(pictures(50, 0)), toy, SIZE)
    few = score([pictures(5, 1)], reference, toy)
    assert any("5 images with 6 features" in note and "singular" in note for note in few.notes)
    assert any("IS left out" in note for note in few.notes) and "fd_toy" in few.values
    one = score([pictures(1, 1)], reference, toy)
    assert set(one.values) == {"mind"} and any("FD-Toy left out" in note for note in one.notes)
    with pytest.raises(UserError, match="no images"):
        score([], reference, toy)


@pytest.mark.parametrize("count", [1, 2, 3, 4, 12])
@pytest.mark.parametrize("reference_images", [0, 1, 3, 50], ids=lambda n: f"of{n}")
def test_what_will_be_computed_is_known_before_any_image(count, reference_images):
    toy = made()
    reference, _ = open_reference(_npz(pictures(50, 0)), toy, SIZE)
    features = reference.features[:reference_images] if reference_images else None
    reference = dataclasses.replace(reference, features=features, mu_s=reference.mu_s if reference_images else None)
    names, notes = computed(count, reference, toy)
    result = score([pictures(count, 1)], reference, toy)
    assert names == [name for name in result.values if not name.endswith("_std")]
    assert set(notes) <= set(result.notes)


def test_what_does_not_fit_is_refused_before_it_is_scored(tmp_path):
    toy = made()
    reference, _ = open_reference(_npz(pictures(50, 0)), toy, SIZE)
    with pytest.raises(UserError, match="8 px, the scored ones 16 px"):
        score([pictures(5, 1, size=16)], reference, toy)
    with pytest.raises(UserError, match="8 px, the scored ones 16 px"):
        open_reference(_npz(pictures(5, 0)), toy, 16)
    write_statistics(tmp_path / "toy.npz", reference)
    for other, size, message in (
        (made(name="toy2"), SIZE, "of extractor toy, not of toy2"),
        (made(resize="other"), SIZE, "resize rule"),
        (toy, 16, "8 px images"),
    ):
        with pytest.raises(UserError, match=message):
            open_reference(tmp_path / "toy.npz", other, size)
    (tmp_path / "cut.npz").write_bytes((tmp_path / "toy.npz").read_bytes()[:200])
    flag = "--config.eval.reference"
    for name, size, message in (
        ("nowhere.npz", SIZE, "No such file"),
        ("cut.npz", SIZE, "damaged"),
        ("toy.npz", 16, "the scored ones have 16 px; make statistics with this extractor and size"),
    ):
        with pytest.raises(UserError, match=f"^{flag}={tmp_path / name}: .*{message}") as refused:
            open_reference(tmp_path / name, toy, size, flag=flag)
        assert str(refused.value).count(name) == 1


@pytest.mark.parametrize("what", ["sizes", "text", "rectangle", "nothing"])
def test_images_that_cannot_be_scored_as_they_are_are_refused(tmp_path, what):
    folder = write_folder(tmp_path / "set", pictures(5, 0))
    if what == "sizes":
        Image.fromarray(pictures(1, 1, size=9)[0]).save(folder / "00009.png")
    elif what == "text":
        (folder / "00009.png").write_text("no image")
    elif what == "rectangle":
        Image.fromarray(pictures(1, 1)[0][:5]).save(folder / "00000.png")
    else:
        folder = tmp_path / "nowhere"
    with pytest.raises(UserError, match="nowhere" if what == "nothing" else r"0000\d.png"):
        list(open_images(folder))


def test_read_statistics_gives_back_what_the_reference_was(tmp_path):
    reference, _ = open_reference(_npz(pictures(30, 0)), made(), SIZE)
    write_statistics(tmp_path / "a.npz", reference)
    np.testing.assert_array_equal(read_statistics(tmp_path / "a.npz").features, reference.features)


# ---------------------------------------------------------------- seams


def test_seam_index_is_one_without_a_mesh_and_grows_with_it():
    noise = np.random.default_rng(0).integers(0, 200, (20, 32, 32, 3)).astype(np.uint8)
    assert seam_index(noise, 4) == pytest.approx(1, abs=0.02)
    tiles = np.indices((32, 32)) // 4
    mesh = ((tiles.sum(0) % 2) * 40).astype(np.uint8)[None, :, :, None]
    assert seam_index(noise + mesh, 4) > 1.05
    ramp = np.broadcast_to(np.arange(32, dtype=np.uint8)[None, :, None, None] * 4, (1, 32, 32, 1)).copy()
    assert seam_index(ramp, 8) == pytest.approx(1)  # a gradient of 4 everywhere along one axis, none along the other
    jumps = ramp.copy()
    jumps[:, 8:] += 8  # of three borders along one axis one is 12, of six in all the mean is 20 / 6
    assert seam_index(jumps, 8) == pytest.approx((4 * 3 + 8) / 6 / 2)


@pytest.mark.parametrize(
    ("images", "patch", "message"),
    [
        (np.zeros((2, 8, 8, 3), np.uint8), 4, "flat"),
        (np.zeros((2, 8, 8, 3), np.uint8), 3, "patch=3"),
        (np.zeros((2, 8, 8, 3), np.uint8), 8, "patch=8"),
        (np.zeros((2, 8, 8, 3), np.uint8), 1, "patch=1"),
        (np.zeros((2, 8, 8, 3), np.float32), 4, "float32"),
    ],
)
def test_seam_index_refuses_what_has_none(images, patch, message):
    with pytest.raises(UserError, match=message):
        seam_index(images, patch)


# ---------------------------------------------------------------- ONNX


def test_any_onnx_file_is_an_extractor():
    """tests/mean_colour.onnx: global average pooling of an N x 3 x 8 x 8 input, and global max pooling."""
    pytest.importorskip("onnxruntime", reason="needs the optional package onnxruntime")
    from jitjax.evaluation.onnx import onnx_extractor

    path, images = Path(__file__).parent / "mean_colour.onnx", pictures(5, 0)
    plain = onnx_extractor(path, mean=(0, 0, 0), std=(1, 1, 1), batch_size=2)
    np.testing.assert_allclose(plain(images)["features"], images.mean((1, 2)) / 255, rtol=1e-5)
    assert plain.dim == 3 and plain.distance == "FD-mean_colour" and "bicubic to 8" in plain.resize
    peaks = extractors.open_extractor(str(path), onnx={"output": "peaks", "mean": (0, 0, 0), "std": (1, 1, 1)})
    np.testing.assert_allclose(peaks(images)["features"], images.max((1, 2)) / 255, rtol=1e-5)
    assert peaks.name != plain.name
    for options, message in (({"output": "none"}, "its outputs are features, peaks"), ({"size": 9}, "that fits it")):
        with pytest.raises(UserError, match=message):
            onnx_extractor(path, **options)


def test_a_damaged_onnx_file_is_refused(tmp_path):
    pytest.importorskip("onnxruntime", reason="needs the optional package onnxruntime")
    (tmp_path / "a.onnx").write_bytes(b"no network")
    with pytest.raises(UserError, match="cannot load it"):
        extractors.open_extractor(str(tmp_path / "a.onnx"))
    with pytest.raises(UserError, match="No such file"):
        extractors.open_extractor(str(tmp_path / "b.onnx"))
