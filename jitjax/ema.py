"""Power-function EMAs of the weights, their snapshot files, and the reconstruction of any EMA length after training.

Source: Karras et al., arXiv 2312.02696, section 3 and appendix C. A power-function EMA weighs the weights of step tau by
tau^gamma: its length grows with training and it forgets the initial weights at the first update. Its length is named by
sigma_rel, the standard deviation of that profile divided by the training time so far. From snapshots of two such EMAs
(sigma_rel 0.05 and 0.10) every other profile is a least-squares combination: of the profiles in float64, then of the
snapshots with the same weights.

Steps count updates: after the first update step = 1.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy

from jitjax import atomic
from jitjax.errors import UserError

Arrays = Mapping[str, Any]
FOLDER = "ema"  # of snapshots in a workdir
SIGMA_REL_MIN, SIGMA_REL_MAX = 1e-6, 12**-0.5  # gamma = 10^6; gamma = 0, the plain mean of all steps


def gamma_of(sigma_rel: float) -> float:
    """The exponent gamma > 0 whose profile tau^gamma has relative standard deviation `sigma_rel`.

    Raises:
      UserError: sigma_rel above 0.2886, where no gamma >= 0 exists, or below 1e-6, an EMA of one step in any run.
    """
    if not SIGMA_REL_MIN <= sigma_rel <= SIGMA_REL_MAX:
        raise UserError(f"sigma_rel={sigma_rel}: use a number in [{SIGMA_REL_MIN:g}, {SIGMA_REL_MAX:.4f}], e.g. 0.05 or 0.10")
    inverse = sigma_rel**-2.0  # (gamma + 2)^2 (gamma + 3) = (gamma + 1) / sigma_rel^2
    return max(0.0, float(np.roots([1.0, 7.0, 16.0 - inverse, 12.0 - inverse]).real.max()))


# ---------------------------------------------------------------- during training


def power_ema_rate(step: Any, sigma_rel: float) -> jax.Array:
    """1 - decay of the update that makes `step` updates in all (>= 1): ema += rate * (params - ema). Traceable in `step`.

    1 - (1 - 1 / step)^(gamma + 1), float32; 1 at the first step. The rate and not the decay, because float32 near 1 would leave
    a rate of 1e-5 with two digits.
    """
    step = jnp.asarray(step, jnp.float32)
    return -jnp.expm1((gamma_of(sigma_rel) + 1) * jnp.log1p(-1 / step))


def warmup_ema_rate(step: Any, decay: float) -> jax.Array:
    """1 - decay of a fixed decay with warm-up, min(decay, (1 + step) / (10 + step)): at first the EMA is of the last tenth of
    the steps or so, and the initial weights are soon forgotten. Traceable in `step`, which counts from 1.

    The warm-up of TensorFlow's `tf.train.ExponentialMovingAverage` (argument `num_updates`). JiT's published update has none.
    """
    step = jnp.asarray(step, jnp.float32)
    return jnp.maximum(1 - decay, 9 / (10 + step))


# ---------------------------------------------------------------- reconstruction


@dataclasses.dataclass(frozen=True)
class Target:
    """The EMA to reconstruct, at `step`: by `sigma_rel` (power function) or by `decay` (classical exponential)."""

    step: int
    sigma_rel: float | None = None
    decay: float | None = None

    def __post_init__(self):
        if (self.sigma_rel is None) == (self.decay is None):
            raise UserError("an EMA to reconstruct is named by sigma_rel or by decay: give one of the two")
        if self.sigma_rel is not None:
            gamma_of(self.sigma_rel)
        elif not 0 < self.decay < 1:
            raise UserError(f"decay={self.decay}: use a number in (0, 1), e.g. 0.9999")
        if self.step < 1:
            raise UserError(f"step={self.step}: an EMA exists from step 1 on")

    @property
    def initial_mass(self) -> float:
        """The weight that an exponential EMA without bias correction still gives to the initial weights."""
        return 0.0 if self.decay is None else float(self.decay**self.step)


@dataclasses.dataclass(frozen=True)
class Weights:
    """How snapshots combine. `residual`: the L2 distance of the profiles as a share of the target's norm; 0 is exact."""

    weights: np.ndarray
    residual: float


def _power_dot(step_a: Any, gamma_a: Any, step_b: Any, gamma_b: Any) -> np.ndarray:
    """Inner products of profiles (gamma + 1) tau^gamma / step^(gamma + 1) on [0, step]."""
    a_is_longer = step_a > step_b
    ratio = np.where(a_is_longer, step_b / step_a, step_a / step_b)
    exponent, longest = np.where(a_is_longer, gamma_a, gamma_b), np.maximum(step_a, step_b)
    return (gamma_a + 1) * (gamma_b + 1) / (gamma_a + gamma_b + 1) * ratio**exponent / longest


def _exponential_dot(step: float, gamma: float, target_step: float, rate: float) -> float:
    """Inner product of a power profile with rate exp(-rate (target_step - tau)) on [0, target_step]; Gauss-Legendre."""
    end = min(step, target_step)
    begin = max(0.0, end - 50 / (rate + gamma / end))
    x, w = np.polynomial.legendre.leggauss(200)
    tau = (end - begin) / 2 * x + (end + begin) / 2
    values = (gamma + 1) / step * (tau / step) ** gamma * rate * np.exp(-rate * (target_step - tau))
    return float((end - begin) / 2 * np.sum(w * values))


def reconstruction_weights(saved_steps: Sequence[int], saved_gammas: Sequence[float], target: Target) -> Weights:
    """Weights of the snapshots whose combined profile is nearest to the target's (least squares, float64).

    Args:
      saved_steps, saved_gammas: (n,) of the snapshots. Those after the target's step are given weight 0.

    The weights add up to the target's mass exactly (a Lagrange multiplier): weights of a network lie far from zero, so
    a missing 0.1% of mass would scale all of them.

    Raises:
      UserError: no snapshot at or before the target's step.
    """
    steps, gammas = np.asarray(saved_steps, np.float64), np.asarray(saved_gammas, np.float64)
    usable = steps <= target.step
    if not usable.any():
        known = f"{int(steps.min())} to {int(steps.max())}" if len(steps) else "none"
        raise UserError(f"no EMA snapshot at or before step {target.step}: snapshots exist for steps {known}")
    t, g = steps[usable], gammas[usable]
    gram = _power_dot(t[:, None], g[:, None], t[None], g[None])
    if target.decay is None:
        gamma = gamma_of(target.sigma_rel)
        wanted = _power_dot(t, g, float(target.step), gamma)
        norm = float(_power_dot(float(target.step), gamma, float(target.step), gamma))
    else:
        rate = -np.log(target.decay)
        wanted = np.array([_exponential_dot(a, b, float(target.step), rate) for a, b in zip(t, g, strict=True)])
        norm = float(rate / 2 * -np.expm1(-2 * rate * target.step))
    scale = 1 / np.sqrt(np.diag(gram))  # equilibrated: the products span the square of the range of steps
    n = len(t)
    system = np.zeros((n + 1, n + 1))
    system[:n, :n], system[:n, n], system[n, :n] = gram * scale[:, None] * scale, scale, scale
    right = np.append(wanted * scale, 1 - target.initial_mass)
    solution = np.linalg.lstsq(system, right, rcond=1e-13)[0][:n] * scale
    square = norm - 2 * wanted @ solution + solution @ gram @ solution
    weights = np.zeros(len(steps))
    weights[usable] = solution
    return Weights(weights, float(np.sqrt(max(square, 0.0) / norm)))


def reconstruct(
    snapshots: Iterable[tuple[int, float, Arrays | Callable[[], Arrays]]], target: Target, *, initial: Arrays | None = None
) -> tuple[dict[str, np.ndarray], Weights]:
    """The target EMA out of snapshots, as float32 arrays, with the weights and their residual (report it).

    Args:
      snapshots: (step, sigma_rel, params); params may be a function that reads them, so that one set is held at a time.
      initial: the run's initial weights, needed for a `decay` whose mass there, decay^step, is not negligible.

    Raises:
      UserError: no usable snapshot, snapshots of different models, or `initial` missing.
    """
    snapshots = list(snapshots)
    found = reconstruction_weights([s for s, _, _ in snapshots], [gamma_of(r) for _, r, _ in snapshots], target)
    parts = [(weight, params) for weight, (_, _, params) in zip(found.weights, snapshots, strict=True) if weight]
    if target.initial_mass > 1e-4:
        if initial is None:
            raise UserError(
                f"decay={target.decay} at step {target.step} still holds {target.initial_mass:.2%} of the initial weights: "
                "give them, choose a smaller decay, or a sigma_rel"
            )
        parts.append((target.initial_mass, initial))
    total: dict[str, np.ndarray] = {}
    for weight, params in parts:
        params = params() if callable(params) else params
        shapes = {name: np.shape(value) for name, value in params.items()}
        if total and shapes != {name: value.shape for name, value in total.items()}:
            raise UserError("the EMA snapshots hold different models: names or shapes of their arrays differ")
        for name, value in params.items():
            total[name] = total.get(name, 0.0) + weight * np.asarray(value, np.float64)
    return {name: value.astype(np.float32) for name, value in total.items()}, found


# ---------------------------------------------------------------- snapshot files


def _checksum(arrays: Arrays) -> str:
    digest = hashlib.sha256()
    for name in sorted(arrays):
        value = np.ascontiguousarray(arrays[name])
        digest.update(f"{name} {value.dtype} {value.shape}".encode())
        digest.update(value.tobytes())
    return digest.hexdigest()


def write_snapshot(folder: Path, step: int, sigma_rel: float, params: Arrays, *, dtype: Any = np.float16) -> Path:
    """One power-function EMA as <folder>/<step>-<sigma_rel>.safetensors, written whole or not at all.

    float16 is enough for reconstruction (docs/sampling.md has the measured errors) and half the size.

    Raises:
      UserError: an array that `dtype` cannot hold, or a folder that cannot be written.
    """
    arrays = {name: np.asarray(value) for name, value in params.items()}
    with np.errstate(over="ignore"):
        arrays = {name: np.ascontiguousarray(value, dtype=dtype) for name, value in arrays.items()}
    bad = [name for name, value in arrays.items() if not np.isfinite(value.astype(np.float32)).all()]
    path = Path(folder) / f"{step:08d}-{sigma_rel:g}.safetensors"
    if bad:
        raise UserError(f"{path}: {bad[0]} has values that {np.dtype(dtype).name} cannot hold; nothing was written")
    metadata = {"step": str(step), "sigma_rel": repr(float(sigma_rel)), "sha256": _checksum(arrays)}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic.writing(path) as partial:
            safetensors.numpy.save_file(arrays, partial, metadata)
    except (OSError, safetensors.SafetensorError) as error:
        raise UserError(f"{path}: cannot be written: {error}") from error
    return path


def read_snapshot(path: Path) -> tuple[int, float, dict[str, np.ndarray]]:
    """(step, sigma_rel, params as stored) of a file that `write_snapshot` wrote.

    Raises:
      UserError: no such file, not a snapshot, or contents that do not match the checksum.
    """
    try:
        with safetensors.safe_open(path, "numpy") as file:
            metadata = file.metadata() or {}
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        step, sigma_rel, checksum = int(metadata["step"]), float(metadata["sigma_rel"]), metadata["sha256"]
    except KeyError as error:
        raise UserError(f"{path}: no EMA snapshot: its metadata has no {error}") from None
    except (OSError, ValueError, TypeError, safetensors.SafetensorError) as error:
        raise UserError(f"{path}: cannot be read as an EMA snapshot: {error}") from None
    if _checksum(arrays) != checksum:
        raise UserError(f"{path}: damaged: its contents do not match its checksum; delete it, the other snapshots serve")
    return step, sigma_rel, arrays


def find_snapshots(folder: Path) -> list[tuple[int, float, Callable[[], dict[str, np.ndarray]]]]:
    """The snapshots of a folder by step and sigma_rel, as `reconstruct` takes them: each file is read when it is needed."""
    return [(step, sigma_rel, lambda path=path: read_snapshot(path)[2]) for step, sigma_rel, path in _files(folder)]


def remove_snapshots(folder: Path, *, after: int) -> None:
    """Delete the snapshots of later steps than `after`."""
    for step, _, path in _files(folder):
        if step > after:
            path.unlink(missing_ok=True)


def _files(folder: Path) -> list[tuple[int, float, Path]]:
    """Step, sigma_rel and file of each snapshot, by step and sigma_rel."""
    found = []
    for path in Path(folder).glob("*.safetensors"):
        if match := re.fullmatch(r"(\d+)-([0-9.e-]+)", path.stem):
            with contextlib.suppress(ValueError):  # no number, so not of ours
                found.append((int(match[1]), float(match[2]), path))
    return sorted(found)
