"""Scores of generated images, as functions of feature arrays: (N, D) NumPy arrays in, floats or pairs of floats out.

Everything is computed in float64 with memory that does not grow with N squared. Values equal torch-fidelity's on the same
features (docs/evaluation.md has the differences); MIND is not in a release of torch-fidelity yet and follows its paper.
A score describes features, so it means nothing without the extractor's name, N and the seed beside it.
"""

from __future__ import annotations

import warnings

import numpy as np
import scipy  # which imports its modules when they are used

from jitjax.errors import UserError

_BLOCK = 1024  # rows of a distance matrix held at once: 1024 x 50,000 float64 are 400 MB
_MIND_PROJECTIONS = 1000  # the paper's number
_MIND_BLOCK = 64  # directions projected and sorted at once


def frechet_distance(a: np.ndarray, b: np.ndarray) -> float:
    """Fréchet distance between Gaussians fitted to two feature sets: FID if the features are the FID Inception's.

    |mu_a - mu_b|^2 + tr(S_a + S_b - 2 (S_a S_b)^(1/2)), with the unbiased covariance (Heusel et al., arXiv 1706.08500,
    eq. 6). Symmetric. It depends on N: compare only values of equal N.

    Args:
      a, b: (N, D) and (M, D) features.

    Raises:
      UserError: not two matrices of equal D, fewer than two rows (no covariance), NaN or infinity.

    Warns:
      Where a set has no more rows than features: its covariance is singular, so the Gaussian fit has no density and the
      distance says more about N than about the images.
    """
    a, b = _pair(a, b)
    for name, features in (("the first set", a), ("the second set", b)):
        if len(features) < 2:
            raise UserError(f"frechet_distance: {name} has {len(features)} image(s); a covariance needs at least 2")
    note = singular_covariance(min(len(a), len(b)), a.shape[1])
    if note:
        warnings.warn(note, stacklevel=2)
    return frechet_of_moments(*_moments(a), *_moments(b))


def singular_covariance(count: int, dim: int) -> str | None:
    """What is undefined about the Fréchet distance of `count` images with `dim` features, or None if nothing is."""
    if count > dim:
        return None
    return (
        f"Fréchet distance of {count} images with {dim} features: a covariance of so few is singular (rank at most "
        f"{count - 1}), so the Gaussian fit is undefined in the other directions and the value is biased upwards; use more "
        f"than {dim} images, or MIND or KID, which are defined for few"
    )


def frechet_of_moments(mu_a: np.ndarray, sigma_a: np.ndarray, mu_b: np.ndarray, sigma_b: np.ndarray) -> float:
    """Fréchet distance from means (D,) and covariances (D, D), float64.

    The trace of (S_a S_b)^(1/2) is the sum of the square roots of the eigenvalues of R S_b R^T with R^T R = S_a: all
    symmetric, so neither complex numbers nor a matrix square root are needed and singular covariances do no harm.

    Raises:
      UserError: shapes that do not agree, NaN or infinity.
    """
    arrays = [np.asarray(array, np.float64) for array in (mu_a, sigma_a, mu_b, sigma_b)]
    dim = arrays[0].size
    if [array.shape for array in arrays] != [(dim,), (dim, dim)] * 2:
        shapes = ", ".join(str(array.shape) for array in arrays)
        raise UserError(f"Fréchet distance: mean, covariance, mean, covariance must be (D,), (D, D) twice, got {shapes}")
    if not all(np.isfinite(array).all() for array in arrays):
        raise UserError("Fréchet distance: a mean or covariance holds NaN or infinity; the statistics are damaged")
    mu_a, sigma_a, mu_b, sigma_b = arrays
    values, vectors = scipy.linalg.eigh(sigma_a)
    root = np.sqrt(np.maximum(values, 0))[:, None] * vectors.T
    cross = scipy.linalg.eigvalsh(root @ sigma_b @ root.T)
    difference = mu_a - mu_b
    covariances = np.trace(sigma_a) + np.trace(sigma_b) - 2 * np.sqrt(np.maximum(cross, 0)).sum()
    return float(difference @ difference + covariances)


def kid(
    generated: np.ndarray, reference: np.ndarray, subsets: int = 100, subset_size: int = 1000, seed: int = 2020
) -> tuple[float, float]:
    """Kernel Inception distance: the unbiased squared MMD with kernel (x.y / D + 1)^3, over random subsets.

    Binkowski et al., arXiv 1801.01401. Subsets are drawn as torch-fidelity draws them. Does not depend on N in the mean.

    Args:
      generated, reference: (N, D) and (M, D) features.
      subsets: how many pairs of subsets. subset_size: images in each, drawn without replacement.

    Returns:
      (mean, population standard deviation) over the subsets.

    Raises:
      UserError: a set smaller than `subset_size`, `subset_size` below 2, bad features (as in `frechet_distance`).
    """
    generated, reference = _pair(generated, reference, dtype=None)
    if subset_size < 2 or subsets < 1:
        raise UserError(f"kid: subsets={subsets} must be at least 1 and subset_size={subset_size} at least 2")
    smallest = min(len(generated), len(reference))
    if smallest < subset_size:
        raise UserError(
            f"kid: subset_size={subset_size}, but there are {len(generated)} generated and {len(reference)} reference images; "
            f"use more images or subset_size={smallest}"
        )
    draw = np.random.RandomState(seed)
    chosen = [
        [draw.choice(len(features), subset_size, replace=False) for features in (generated, reference)] for _ in range(subsets)
    ]
    all_pairs = len(generated) ** 2 + len(reference) ** 2 + len(generated) * len(reference)
    if all_pairs <= subsets * 3 * subset_size**2:  # the kernel of all pairs, once, is less work than that of every subset
        x, y = _float64(generated), _float64(reference)
        in_x, in_y = np.zeros((subsets, len(x))), np.zeros((subsets, len(y)))
        for subset, (rows_x, rows_y) in enumerate(chosen):
            in_x[subset, rows_x] = in_y[subset, rows_y] = 1
        estimates = _squared_mmd(x, in_x, y, in_y)
    else:
        every = np.ones((1, subset_size))
        estimates = [_squared_mmd(_float64(generated[i]), every, _float64(reference[j]), every) for i, j in chosen]
    return float(np.mean(estimates)), float(np.std(estimates))


def _squared_mmd(x: np.ndarray, in_x: np.ndarray, y: np.ndarray, in_y: np.ndarray) -> np.ndarray:
    """(S,) estimates from subsets of the rows of x (N, D) and y (M, D); in_x (S, N), in_y (S, M): 1 for rows of the subset."""

    def kernel_sums(left: np.ndarray, in_left: np.ndarray, right: np.ndarray, in_right: np.ndarray) -> np.ndarray:
        sums = np.zeros(len(in_left))
        for start in range(0, len(left), _BLOCK):
            base = left[start : start + _BLOCK] @ right.T
            base /= left.shape[1]
            base += 1
            cubes = base * base  # many times faster than base**3
            cubes *= base
            if left is right:  # an image with itself does not count
                rows = np.arange(len(cubes))
                cubes[rows, start + rows] = 0
            sums += np.einsum("sm,sm->s", in_left[:, start : start + _BLOCK] @ cubes, in_right)
        return sums

    n = in_x[0].sum()
    within = kernel_sums(x, in_x, x, in_x) + kernel_sums(y, in_y, y, in_y)
    return within / (n * (n - 1)) - 2 * kernel_sums(x, in_x, y, in_y) / n**2


def inception_score(logits: np.ndarray, splits: int = 10, shuffle: bool = True, seed: int = 2020) -> tuple[float, float]:
    """Inception score: exp of the mean divergence of each image's class distribution from that of its split.

    Salimans et al., arXiv 1606.03498. FID's Inception enters with `logits_unbiased` (no bias of the last layer).

    Args:
      logits: (N, classes), before the softmax.
      splits: into how many runs of images the set is cut. shuffle: in random order (seed), as torch-fidelity does.

    Returns:
      (mean, population standard deviation) over the splits.

    Raises:
      UserError: fewer images than splits, bad logits (as in `frechet_distance`).
    """
    logits = _features(logits, "logits", dtype=None)
    count = len(logits)
    if not 1 <= splits <= count:
        raise UserError(f"inception_score: splits={splits} must be between 1 and the number of images, {count}")
    order = np.random.RandomState(seed).permutation(count) if shuffle else np.arange(count)
    scores = []
    for split in range(splits):
        rows = order[split * count // splits : (split + 1) * count // splits]
        log_p = scipy.special.log_softmax(_float64(logits[rows]), axis=1)
        log_marginal = scipy.special.logsumexp(log_p, axis=0) - np.log(len(rows))
        scores.append(np.exp((np.exp(log_p) * (log_p - log_marginal)).sum(axis=1).mean()))
    return float(np.mean(scores)), float(np.std(scores))


def precision_recall(generated: np.ndarray, reference: np.ndarray, k: int = 3) -> tuple[float, float]:
    """Improved precision and recall (Kynkäänniemi et al., arXiv 1904.06991).

    Precision is the share of generated images inside at least one ball around a reference image whose radius reaches that
    image's k-th nearest neighbour among the reference; recall is the same with the sets exchanged. Both depend on N and M.

    Args:
      generated, reference: (N, D) and (M, D) features. k: which neighbour, other than the image itself, sets the radius.

    Returns:
      (precision, recall), each in [0, 1].

    Raises:
      UserError: a set with no more than k images, k below 1, bad features (as in `frechet_distance`).
    """
    generated, reference = _pair(generated, reference)
    if not 1 <= k < min(len(generated), len(reference)):
        raise UserError(
            f"precision_recall: k={k} must be at least 1 and below the number of images of either set "
            f"({len(generated)} generated, {len(reference)} reference)"
        )
    # Distances do not change under a common shift, and smaller numbers lose fewer digits in |x|^2 + |y|^2 - 2 x.y.
    centre = reference.mean(axis=0)
    generated, reference = generated - centre, reference - centre
    radius_generated, radius_reference = _squared_radii(generated, k), _squared_radii(reference, k)
    inside_reference = np.zeros(len(generated), bool)
    inside_generated = np.zeros(len(reference), bool)
    for start in range(0, len(generated), _BLOCK):
        rows = slice(start, start + _BLOCK)
        distances = _squared_distances(generated[rows], reference)
        inside_reference[rows] = (distances <= radius_reference).any(axis=1)
        inside_generated |= (distances <= radius_generated[rows, None]).any(axis=0)
    return float(inside_reference.mean()), float(inside_generated.mean())


def _squared_radii(x: np.ndarray, k: int) -> np.ndarray:
    """(N,) squared distance of each row of x to its k-th nearest other row."""
    radii = np.empty(len(x))
    for start in range(0, len(x), _BLOCK):
        distances = _squared_distances(x[start : start + _BLOCK], x)
        rows = np.arange(len(distances))
        distances[rows, start + rows] = 0  # itself: the nearest, whatever rounding says
        radii[start : start + _BLOCK] = np.partition(distances, k, axis=1)[:, k]
    return radii


def _squared_distances(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """(N, M) from (N, D) and (M, D). What rounding alone can make of two equal rows is 0, so that copies are at no distance
    from each other on every machine; the order in which a matmul adds up differs between them."""
    squares_x, squares_y = (np.einsum("nd,nd->n", z, z) for z in (x, y))
    distances = x @ y.T  # in place from here on: at 50,000 rows the array takes 400 MB
    distances *= -2
    distances += squares_x[:, None]
    distances += squares_y
    rounding = np.finfo(np.float64).eps * x.shape[1] * (squares_x + squares_y.max())
    distances[distances <= rounding[:, None]] = 0
    return distances


def mind(generated: np.ndarray, reference: np.ndarray, seed: int = 2020) -> float:
    """Monge Inception distance: 3 D times the sliced squared 2-Wasserstein distance (Berthet et al., arXiv 2605.06797).

    The mean over 1,000 random unit directions of the mean squared difference between sorted projections, times 3 D. A
    shift of all features by m gives 3 |m|^2. The paper reports that 5,000 images rank models as FID does with 50,000. Random
    directions leave about 1 to 4% of spread between seeds: keep the seed when comparing.

    Args:
      generated, reference: (N, D) and (M, D) features. Sorted projections are compared one to one, so the larger set is
        reduced to min(N, M) random rows.

    Raises:
      UserError: bad features (as in `frechet_distance`).
    """
    generated, reference = _pair(generated, reference, dtype=None)
    draw = np.random.default_rng(seed)
    dim, count = generated.shape[1], min(len(generated), len(reference))
    directions = draw.standard_normal((_MIND_PROJECTIONS, dim))
    directions /= np.linalg.norm(directions, axis=1, keepdims=True)
    x, y = (
        _float64(features if len(features) == count else features[draw.choice(len(features), count, replace=False)])
        for features in (generated, reference)
    )
    return 3 * dim * _sliced_wasserstein(x, y, directions)


def _sliced_wasserstein(x: np.ndarray, y: np.ndarray, directions: np.ndarray) -> float:
    """Mean over the unit `directions` (P, D) of the squared 2-Wasserstein distance of the projections of x and y (N, D)."""
    total = 0.0
    for start in range(0, len(directions), _MIND_BLOCK):
        block = directions[start : start + _MIND_BLOCK]
        total += np.square(np.sort(block @ x.T, axis=1) - np.sort(block @ y.T, axis=1)).mean(axis=1).sum()
    return float(total / len(directions))


# ---------------------------------------------------------------- checks


def _moments(features: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return features.mean(axis=0), np.atleast_2d(np.cov(features, rowvar=False))


def _float64(array: np.ndarray) -> np.ndarray:
    return np.asarray(array, np.float64)


def _features(array: np.ndarray, name: str, dtype: type | None = np.float64) -> np.ndarray:
    """`array` as a checked (N, D) array; dtype None leaves it as it is, for functions that use a few rows at a time."""
    array = np.asarray(array)
    if array.ndim != 2 or not array.size or array.dtype.kind not in "fiu":
        raise UserError(f"{name} must be numbers of shape (N, D) with N and D above 0, got {array.dtype} {array.shape}")
    finite = np.isfinite(array).all(axis=1)
    if not finite.all():
        bad = np.flatnonzero(~finite)
        raise UserError(f"{name}: {len(bad)} of {len(array)} rows hold NaN or infinity, the first is row {bad[0]}")
    return array if dtype is None else array.astype(dtype, copy=False)


def _pair(a: np.ndarray, b: np.ndarray, dtype: type | None = np.float64) -> tuple[np.ndarray, np.ndarray]:
    a, b = _features(a, "the first set of features", dtype), _features(b, "the second set of features", dtype)
    if a.shape[1] != b.shape[1]:
        raise UserError(
            f"features of {a.shape[1]} and {b.shape[1]} dimensions cannot be compared: both sets need the same extractor"
        )
    return a, b
