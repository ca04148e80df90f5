"""Scores as functions of features, against torch-fidelity's values and against what is known in closed form."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from jitjax import metrics
from jitjax.errors import UserError

FIXTURES = Path(__file__).parents[2] / "shared" / "parity" / "metrics"


@pytest.fixture(scope="module")
def fidelity() -> tuple[dict, dict]:
    """Feature arrays and torch-fidelity 0.4.0's scores of them."""
    if not FIXTURES.is_dir():
        pytest.skip("../shared/parity/metrics is not there")
    with np.load(FIXTURES / "metrics.npz") as arrays:
        return dict(arrays), json.loads((FIXTURES / "metrics.json").read_text())


def normal(count: int, dim: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((count, dim))


def test_frechet_distance_equals_torch_fidelity(fidelity):
    arrays, scores = fidelity
    a, b = arrays["features_1"], arrays["features_2"]
    assert metrics.frechet_distance(a, b) == pytest.approx(scores["fid_all_float64"], rel=1e-10)
    assert metrics.frechet_distance(a, b) == pytest.approx(scores["fid"], rel=1e-6)
    assert metrics.frechet_distance(b, a) == pytest.approx(metrics.frechet_distance(a, b), rel=1e-10)
    assert abs(metrics.frechet_distance(a, a)) < 1e-10
    with pytest.warns(UserWarning, match="32 images with 64 features"):
        singular = metrics.frechet_distance(a[:32], b)
    assert singular == pytest.approx(scores["fid_rank_deficient_first_half_d_rows_of_1_vs_2"], rel=1e-6)


@pytest.mark.parametrize("subsets", [1, 5])  # the pairs of each subset are less work; all pairs at once are
def test_kid_equals_its_definition_however_pairs_are_formed(subsets):
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(1100, 5)), rng.normal(0.3, size=(1300, 5))
    draw, each = np.random.RandomState(7), []
    for _ in range(subsets):
        x, y = a[draw.choice(1100, 700, replace=False)], b[draw.choice(1300, 700, replace=False)]
        xx, yy, xy = ((left @ right.T / 5 + 1) ** 3 for left, right in ((x, x), (y, y), (x, y)))
        each.append((xx.sum() - np.trace(xx) + yy.sum() - np.trace(yy)) / (700 * 699) - 2 * xy.mean())
    assert 1 * 3 * 700**2 < 1100**2 + 1300**2 + 1100 * 1300 < 5 * 3 * 700**2
    np.testing.assert_allclose(metrics.kid(a, b, subsets, 700, 7), (np.mean(each), np.std(each)), rtol=1e-9, atol=1e-15)


def test_kid_equals_torch_fidelity(fidelity):
    arrays, scores = fidelity
    compared = 0
    for case in scores["kid"]:
        if any(name.startswith("kid_kernel") for name in case["args"]):
            continue  # another kernel than the published one
        compared += 1
        subsets, size, seed = (case["args"][name] for name in ("kid_subsets", "kid_subset_size", "rng_seed"))
        mean, std = metrics.kid(arrays["features_1"], arrays["features_2"], subsets, size, seed)
        assert (mean, std) == (pytest.approx(case["mean_float64"], rel=1e-8), pytest.approx(case["std_float64"], rel=1e-8))
    assert compared == 2


def test_inception_score_equals_torch_fidelity(fidelity):
    arrays, scores = fidelity
    for case in scores["isc"]:
        args = case["args"]
        mean, std = metrics.inception_score(arrays["logits"], args["splits"], args["shuffle"], args.get("rng_seed", 2020))
        assert mean == pytest.approx(case["mean"], rel=1e-10)
        assert std == pytest.approx(case["std"], rel=1e-8, abs=1e-10)


def test_precision_and_recall_equal_torch_fidelity(fidelity):
    arrays, scores = fidelity
    for case in scores["prc"]:
        k = case["args"]["prc_neighborhood"]
        precision, recall = metrics.precision_recall(arrays["features_1"], arrays["features_2"], k)
        assert precision == pytest.approx(case["precision"], rel=1e-6)
        assert recall == pytest.approx(case["recall"], rel=1e-6)


def test_precision_and_recall_do_not_depend_on_the_block_size(monkeypatch):
    a, b = normal(150, 8, 0), normal(130, 8, 1) + 0.3
    whole = metrics.precision_recall(a, b)
    monkeypatch.setattr(metrics, "_BLOCK", 37)
    assert metrics.precision_recall(a, b) == whole


def test_precision_and_recall_tell_the_two_failures_apart():
    clusters = np.repeat(100 * np.eye(2, 8), 100, axis=0)
    reference = clusters + normal(200, 8, 0)
    one_cluster, stray = reference[:100], np.concatenate([reference[:100], reference[100:] + 1e4])
    assert metrics.precision_recall(one_cluster, reference) == (1.0, 0.5)
    assert metrics.precision_recall(stray, reference)[0] == 0.5


def test_a_repeated_image_lies_inside_its_own_ball_of_radius_zero():
    reference = np.repeat(normal(3, 2048, 0), 5, axis=0) * 100  # the 3rd neighbour of each is a copy of itself
    assert metrics.precision_recall(reference[:5], reference) == (1.0, 1 / 3)


def test_mind_of_a_shift_is_three_times_its_square():
    features, shift = normal(400, 64, 0), 0.3 * normal(1, 64, 1)
    values = [metrics.mind(features + shift, features, seed) for seed in range(8)]
    assert np.mean(values) == pytest.approx(3 * np.sum(shift**2), rel=0.05)
    assert metrics.mind(features, features) == 0
    assert metrics.mind(features + shift, features, 7) == values[7]  # the seed alone decides


def test_mind_follows_its_definition_on_sets_of_unequal_size():
    dim = 16
    small, large = normal(300, dim, 0), normal(900, dim, 1) * 1.5
    # Two isotropic Gaussians with deviations 1 and 1.5: W2^2 is 0.25 in every direction, plus the bias of 300 samples.
    assert metrics.mind(small, large) == pytest.approx(3 * dim * 0.25, rel=0.15)
    assert metrics.mind(large, small) == pytest.approx(metrics.mind(small, large), rel=0.1)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda a: metrics.frechet_distance(a, a[:, :5]), "8 and 5 dimensions"),
        (lambda a: metrics.frechet_distance(a[:1], a), "has 1 image"),
        (lambda a: metrics.frechet_distance(np.where(a == a[3, 2], np.nan, a), a), "the first is row 3"),
        (lambda a: metrics.frechet_distance(a[0], a), r"shape \(N, D\)"),
        (lambda a: metrics.frechet_distance(a[:0], a), r"shape \(N, D\)"),
        (lambda a: metrics.frechet_distance(a.astype(str), a), "must be numbers"),
        (lambda a: metrics.kid(a, a), "subset_size=1000"),
        (lambda a: metrics.kid(a, a, subset_size=1), "at least 2"),
        (lambda a: metrics.kid(a + np.inf, a), "NaN or infinity"),
        (lambda a: metrics.inception_score(a[:5]), "splits=10"),
        (lambda a: metrics.precision_recall(a[:3], a), "k=3"),
        (lambda a: metrics.mind(a, a[:, :2]), "8 and 2 dimensions"),
    ],
)
def test_what_cannot_be_scored_is_refused_in_one_line(call, message):
    with pytest.raises(UserError, match=message) as error:
        call(normal(20, 8, 0))
    assert "\n" not in str(error.value)
