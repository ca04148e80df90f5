"""Streaming moments, and the statistics files of this and other evaluators."""

from __future__ import annotations

import os
import pickle

import numpy as np
import pytest

from jitjax.errors import UserError
from jitjax.evaluation.statistics import (
    FID_EXTRACTOR,
    FeatureStatistics,
    Statistics,
    npz_images,
    read_statistics,
    write_statistics,
)


def normal(count: int, dim: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((count, dim))


def made(dim: int = 6, **other) -> Statistics:
    x = normal(50, dim)
    return Statistics(x.mean(0), np.cov(x, rowvar=False), "here", **other)


@pytest.mark.parametrize("offset", [0.0, 1e6])
def test_batches_of_any_size_give_the_moments_of_the_whole(offset):
    x = (normal(1000, 12) @ normal(12, 12, 1) + offset).astype(np.float64)
    whole, parts = FeatureStatistics(12), [FeatureStatistics(12), FeatureStatistics(12), FeatureStatistics(12)]
    for start, part in ((0, 0), (1, 0), (400, 1)):
        parts[part].update(x[start : {0: 1, 1: 400, 400: 1000}[start]])
    for part in parts:  # the third is empty
        whole.merge(FeatureStatistics.from_array(part.to_array(), 12))
    assert whole.count == 1000
    np.testing.assert_allclose(whole.mu, x.mean(0), rtol=1e-12)
    np.testing.assert_allclose(whole.sigma, np.cov(x, rowvar=False), rtol=1e-9, atol=1e-9)


def test_own_file_carries_everything_and_others_find_their_names(tmp_path):
    x = normal(50, 4)
    saved = made(
        mu_s=x.mean(0),
        sigma_s=np.cov(x, rowvar=False),
        features=normal(7, 6).astype(np.float32),
        extractor="efficientnet-lite0",
        resize="some rule",
        image_size=64,
        count=50,
    )
    write_statistics(tmp_path / "a.npz", saved)
    back = read_statistics(tmp_path / "a.npz")
    for name in ("mu", "sigma", "mu_s", "sigma_s", "features"):
        np.testing.assert_array_equal(getattr(back, name), getattr(saved, name))
    assert (back.extractor, back.resize, back.image_size, back.count) == ("efficientnet-lite0", "some rule", 64, 50)
    with np.load(tmp_path / "a.npz", allow_pickle=False) as file:  # as torch-fidelity's fork and ADM read it
        assert file["mu"].dtype == np.float64 and file["sigma"].shape == (6, 6) and file["mu_s"].shape == (4,)
    assert os.listdir(tmp_path) == ["a.npz"]


def test_adm_reference_batch_has_statistics_and_images(tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (11, 8, 8, 3), np.uint8)
    moments = made(5)
    np.savez_compressed(tmp_path / "ref.npz", arr_0=images, mu=moments.mu, sigma=moments.sigma)
    found = read_statistics(tmp_path / "ref.npz")
    np.testing.assert_array_equal(found.sigma, moments.sigma)
    assert found.extractor is None and found.mu_s is None
    opened = npz_images(tmp_path / "ref.npz", batch_size=4)
    batches = list(opened)
    assert (len(opened), opened.image_size, [len(b) for b in batches]) == (11, 8, [4, 4, 3])
    np.testing.assert_array_equal(np.concatenate(batches), images)


@pytest.mark.parametrize("protocol", range(2, pickle.HIGHEST_PROTOCOL + 1))
def test_edm2_pickle_is_read_without_executing_it(tmp_path, protocol):
    moments = made(5)
    content = {"num_images": 50, "fid": {"mu": moments.mu, "sigma": np.asfortranarray(moments.sigma)}}
    (tmp_path / "a.pkl").write_bytes(pickle.dumps(content, protocol))
    found = read_statistics(tmp_path / "a.pkl")
    np.testing.assert_array_equal(found.mu, moments.mu)
    np.testing.assert_array_equal(found.sigma, moments.sigma)
    assert found.count == 50


class Hostile:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


def test_hostile_pickle_is_refused_before_it_runs(tmp_path):
    content = {"num_images": 3, "fid": {"mu": Hostile(str(tmp_path / "made")), "sigma": 1}}
    (tmp_path / "a.pkl").write_bytes(pickle.dumps(content))
    with pytest.raises(UserError, match="mkdir"):
        read_statistics(tmp_path / "a.pkl")
    assert not (tmp_path / "made").exists()


def npz(path, **arrays):
    np.savez(path, **arrays)


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (lambda p, s: None, "No such file"),
        (lambda p, s: p.write_bytes(b"text"), "neither an .npz nor a pickle"),
        (lambda p, s: p.write_bytes(b"PK\x03\x04 and no more"), "damaged"),
        (lambda p, s: p.write_bytes(b"\x80\x04 and no more"), "no pickle of statistics"),
        (lambda p, s: p.write_bytes(pickle.dumps({"num_images": 3})), "expected edm2's"),
        (lambda p, s: p.write_bytes(pickle.dumps({"fid": {"mu": [1.0], "sigma": [[1.0]]}})), "must be floats"),
        (lambda p, s: npz(p, arr_0=np.zeros((2, 4, 4, 3), np.uint8)), "statistics need mu and sigma"),
        (lambda p, s: npz(p, mu=s.mu, sigma=s.sigma[:3]), r"shapes \(D,\) and \(D, D\)"),
        (lambda p, s: npz(p, mu=s.mu, sigma=s.sigma * np.nan), "NaN"),
        (lambda p, s: npz(p, mu=s.mu, sigma=-s.sigma), "no covariance"),
        (lambda p, s: npz(p, mu=s.mu, sigma=s.sigma, mu_s=s.mu), "only one of mu_s and sigma_s"),
        (lambda p, s: npz(p, mu=s.mu, sigma=s.sigma, count=np.array(["many", "more"])), "count"),
        (lambda p, s: npz(p, mu=np.array([s], object), sigma=s.sigma), "damaged, or no .npz of plain arrays"),
        (lambda p, s: npz(p, mu=s.mu, sigma=s.sigma, features=np.zeros((0, 6))), "features holds no rows"),
        (lambda p, s: npz(p, mu=s.mu, sigma=s.sigma, features=np.full((5, 6), np.nan)), "features holds .* NaN"),
        (lambda p, s: npz(p, mu=s.mu, sigma=s.sigma, jitjax_format=9), "newer jitjax"),
    ],
)
def test_what_is_no_file_of_statistics_is_refused_in_one_line(tmp_path, write, message):
    path = tmp_path / "a.npz"
    write(path, made())
    with pytest.raises(UserError, match=message) as error:
        read_statistics(path)
    assert str(path) in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (np.zeros((2, 4, 4, 3), np.float32), "float32"),
        (np.zeros((2, 4, 5, 3), np.uint8), r"\(2, 4, 5, 3\)"),
        (np.zeros((2, 3, 4, 4), np.uint8), "uint8 of shape"),
    ],
)
def test_arrays_that_are_no_images_are_refused(tmp_path, images, message):
    np.savez(tmp_path / "a.npz", arr_0=images)
    with pytest.raises(UserError, match=message):
        npz_images(tmp_path / "a.npz")


def test_cut_off_images_are_refused(tmp_path):
    np.savez(tmp_path / "a.npz", arr_0=np.zeros((200, 8, 8, 3), np.uint8))
    whole = (tmp_path / "a.npz").read_bytes()
    (tmp_path / "a.npz").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match="damaged"):
        npz_images(tmp_path / "a.npz")


def test_statistics_of_another_kind_are_refused():
    ours = made(extractor="efficientnet-lite0", resize="r", image_size=64, count=9)
    assert ours.check(extractor="efficientnet-lite0", dim=6, image_size=64, resize="r") == []
    for wrong, message in (
        ({"extractor": FID_EXTRACTOR}, "of extractor efficientnet-lite0, not of inception"),
        ({"dim": 7}, "statistics of 6 features"),
        ({"image_size": 32}, "64 px"),
        ({"resize": "s"}, "resize rule 'r'"),
    ):
        with pytest.raises(UserError, match=message):
            ours.check(**{"extractor": "efficientnet-lite0", "dim": 6, "image_size": 64, "resize": "r", **wrong})
    foreign = Statistics(np.zeros(2048), np.eye(2048), "adm.npz")
    unknown = foreign.check(extractor=FID_EXTRACTOR, dim=2048, image_size=64)
    assert len(unknown) == 3 and all("adm.npz" in line for line in unknown)
    with pytest.raises(UserError, match="names no extractor"):
        foreign.check(extractor="onnx:dino", dim=2048, image_size=64)
