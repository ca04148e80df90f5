"""Sampling: solvers of dz/dt = v from noise (t = 0) to images (t = 1), with classifier-free guidance, and their inverse.

`sample_fn` is the one place where a sampler is assembled: network, guidance, time grid, solver. The time grid is known
before anything runs, so where guidance acts is too: a step costs the unconditional half of the batch only inside the
guidance interval, and the conditional and unconditional images go through the network as one batch. The state z is float32
throughout; rounding it between steps shows as salt-and-pepper noise.

Solvers: "euler" and "heun" are the published ones. The multistep solvers make one network evaluation per step and reuse the
predicted images x of earlier steps. With s = 1 - t, the equation dz/dt = (x - z) / (1 - t) is linear in z, and a step is exact
for the x that is assumed between its ends:

    z_next = r z + (1 - r) x_mean,   r = s_next / s,   x_mean = mean of x(t(w)) over w from r to 1

"abm2" and "abm3" (exponential Adams-Bashforth-Moulton) take x as the polynomial in t through the last 2 or 3 evaluations, and
correct z with the polynomial through the new evaluation once that is there, as UniPC does (arXiv 2302.04867); that costs no
evaluation. "dpmpp_2m" is DPM-Solver++(2M) (arXiv 2211.01095, algorithm 2), which extrapolates x in the log-SNR log(t / s).
None of these forms is singular at t = 0. docs/sampling.md has the measurements behind this choice.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jitjax import diffusion, kernels
from jitjax import model as jit_model
from jitjax.errors import UserError
from jitjax.settings import METHODS, SPACES

ORDERS = {"dpmpp_2m": 2, "abm2": 2, "abm3": 3}  # multistep solvers: how many evaluations a step uses


class Path(NamedTuple):
    """States along the way, for a strip or a film of the denoising: k moments, first to last."""

    times: np.ndarray  # (k,) float32
    states: jax.Array  # (k, B, S, S, 3) float32: z at these times
    predictions: jax.Array  # (k, B, S, S, 3) float32: the (guided) predicted images there


def network_passes(steps: int, method: str) -> int:
    """Evaluations of the network per image; a guided evaluation, conditional and unconditional, counts once."""
    return 2 * steps - 1 if method == "heun" else steps


def time_grid(steps: int, grid: str = "uniform") -> np.ndarray:
    """steps + 1 increasing times from 0 to 1, float32.

    "uniform": evenly spaced, rounded as the published sampler's are: the step is float32, each half is counted from its own
    end, and multiplying and adding round once (float64 holds the product exactly).
    "power:rho": 1 - t falls as (1 - i / steps)^rho; rho > 1 makes the steps near the image shorter.

    Raises:
      UserError: another grid, steps < 1, or a rho whose last steps are shorter than float32 resolves.
    """
    if steps < 1:
        raise UserError(f"steps={steps}: a sampler needs at least 1 step")
    index = np.arange(steps + 1)
    if grid == "uniform":
        step = np.float64(np.float32(1.0) / np.float32(steps))
        return np.where(index < (steps + 1) // 2, index * step, 1.0 - (steps - index) * step).astype(np.float32)
    name, _, number = grid.partition(":")
    try:
        rho = float(number) if name == "power" else math.nan
    except ValueError:
        rho = math.nan
    if not 0 < rho < math.inf:
        raise UserError(f'grid={grid!r}: use "uniform" or "power:rho" with rho > 0, e.g. "power:1.6"')
    times = (1.0 - (1.0 - index / steps) ** rho).astype(np.float32)
    if np.any(np.diff(times) <= 0):
        raise UserError(
            f"grid={grid!r} with steps={steps}: float32 cannot tell neighbouring times apart; use a rho nearer to 1"
        )
    return times


def guided(t: np.ndarray, interval: tuple[float, float]) -> np.ndarray:
    """Whether guidance acts at time t: strictly inside the interval, in float32; a lower end of 0 includes t = 0."""
    low, high = np.float32(interval[0]), np.float32(interval[1])
    return (t < high) & ((low == 0) | (t > low))


def check(*, steps: int, method: str, grid: str, cfg_scale: float, interval: tuple[float, float], t_eps: float) -> None:
    """Refuse settings that no sampler can run with.

    Raises:
      UserError: one line that names the setting, its value and what is allowed.
    """
    if method not in METHODS:
        raise UserError(f"method={method!r}: use one of {', '.join(METHODS)}")
    time_grid(steps, grid)
    if not isinstance(cfg_scale, jax.Array) and not math.isfinite(cfg_scale):
        raise UserError(f"cfg_scale={cfg_scale}: use a finite number; 1 switches guidance off")
    if len(interval) != 2 or not interval[0] <= interval[1]:
        raise UserError(f"interval={tuple(interval)}: use (low, high) with low <= high, e.g. (0.1, 1.0)")
    if not 0 < t_eps <= 1:
        raise UserError(f"t_eps={t_eps}: use a number in (0, 1], e.g. 0.05; it is the lower clip of 1 - t")


# ---------------------------------------------------------------- multistep coefficients


def _log_time(t: np.ndarray, t_eps: float) -> np.ndarray:
    """tau with d tau = dt / max(1 - t, t_eps): the time in which dz / d tau = x - z also where the clip acts."""
    return -np.log(np.maximum(1 - t, t_eps)) + np.maximum(t - (1 - t_eps), 0) / t_eps


def _mean_weights(start: float, end: float, nodes: np.ndarray, t_eps: float) -> np.ndarray:
    """Weights c with x_mean = sum c_j x(nodes_j) over the step from `start` to `end`, x being the polynomial in t through the
    nodes. Gauss-Legendre in tau, on either side of the kink where the clip begins; float64."""
    first, last, kink = _log_time(np.array(start), t_eps), _log_time(np.array(end), t_eps), -math.log(t_eps)
    ends = [first, kink, last] if min(first, last) < kink < max(first, last) else [first, last]
    x, w = np.polynomial.legendre.leggauss(32)
    tau = np.concatenate([(b - a) / 2 * x + (a + b) / 2 for a, b in zip(ends, ends[1:], strict=False)])
    weight = np.concatenate([(b - a) / 2 * w for a, b in zip(ends, ends[1:], strict=False)]) * np.exp(tau - last)
    t = np.where(tau < kink, -np.expm1(-tau), 1 - t_eps + t_eps * (tau - kink))
    basis = [np.prod([(t - other) / (node - other) for other in np.delete(nodes, j)], axis=0) for j, node in enumerate(nodes)]
    return np.array([np.sum(weight * each) for each in basis]) / weight.sum()


def multistep_coefficients(times: np.ndarray, runs: np.ndarray, method: str, t_eps: float) -> tuple[np.ndarray, ...]:
    """(ratio (N,), predict (N, order), correct (N, order + 1)): step n, at times[n] with x_0 its evaluation and x_1, x_2 ...
    those of the steps before, is

        z <- z + sum correct_j x_j;   z <- ratio z + sum predict_j x_j

    Args:
      times: (N + 1,) increasing or decreasing.
      runs: (N,) whether guidance acts in each step. x jumps where that changes, so no polynomial is laid across a change:
        the first step after it is of first order and corrects nothing.
    """
    order, steps, times = ORDERS[method], len(times) - 1, np.asarray(times, np.float64)
    ratio = np.exp(-np.diff(_log_time(times, t_eps)))
    predict, correct = np.zeros((steps, order)), np.zeros((steps, order + 1))
    with np.errstate(divide="ignore"):
        log_snr = np.log(times) + _log_time(times, t_eps)
    first = 0  # of the present run of steps with the same guidance
    for n in range(steps):
        if runs[n] != runs[first]:
            first = n
        known = min(order, n - first + 1)
        if method == "dpmpp_2m":
            c = 0.0
            if known == 2 and np.isfinite(log_snr[n - 1 : n + 2]).all():
                c = (log_snr[n + 1] - log_snr[n]) / (log_snr[n] - log_snr[n - 1]) / 2
            mean = np.array([1 + c, -c])
        else:
            mean = np.zeros(order)
            mean[:known] = _mean_weights(times[n], times[n + 1], times[n - known + 1 : n + 1][::-1], t_eps)
            if n > first:
                nodes = times[max(first, n - order + 1) : n + 1][::-1]
                correct[n, : len(nodes)] = (1 - ratio[n - 1]) * _mean_weights(times[n - 1], times[n], nodes, t_eps)
                correct[n, 1:] -= predict[n - 1]
        predict[n] = (1 - ratio[n]) * mean
    return ratio.astype(np.float32), predict.astype(np.float32), correct.astype(np.float32)


# ---------------------------------------------------------------- integration


def integrate(
    velocity: Callable[[jax.Array, jax.Array, bool], jax.Array],
    noise: jax.Array,
    *,
    steps: int,
    method: str,
    interval: tuple[float, float],
    grid: str = "uniform",
    t_eps: float = 0.05,
    return_path: int = 0,
    backward: bool = False,
) -> Any:
    """Integrate dz/dt = velocity(z, t, guided) over [0, 1]. `guided` is a Python bool: two programs, no wasted half.

    The last step is Euler's also under Heun, so Heun makes 2 * steps - 1 network evaluations.

    Runs of consecutive steps of the same kind become one `lax.scan` each: at most a handful of compiled bodies.

    Args:
      t_eps: the x behind a velocity is z + max(1 - t, t_eps) velocity: what multistep solvers interpolate and a path shows.
        Any value > 0 integrates the same equation; the clip with which the velocity was made gives the smoothest x.
      return_path: k > 0 returns (z, Path) with k moments spread evenly over the steps, the first at the start.
      backward: from t = 1 to t = 0; `noise` is then the images. A step is guided where the forward step over it is.
    """
    times = time_grid(steps, grid)
    if backward:
        times = times[::-1].copy()
    on = guided(times, interval)
    if backward and method != "heun":  # a step's one evaluation decides: as in the forward step, by its earlier end
        on[:-1] = on[1:]
    z, history = noise.astype(jnp.float32), ()
    inputs: tuple[np.ndarray, ...] = (times[:-1], times[1:])
    if method in ORDERS:
        inputs += multistep_coefficients(times, on[:-1], method, t_eps)
        history = (jnp.zeros_like(z),) * ORDERS[method]
    path = ()
    if return_path:
        shown = np.linspace(0, steps - 1, return_path).round().astype(int)
        slots = np.full(steps, return_path, np.int32)  # past the end: dropped
        slots[shown] = np.arange(return_path)
        inputs += (slots,)
        path = (jnp.zeros((return_path, *z.shape), jnp.float32),) * 2

    def record(path, z, t, v, slot):
        data = z + jnp.maximum(1 - t, t_eps) * v
        return tuple(saved.at[slot].set(new, mode="drop") for saved, new in zip(path, (z, data), strict=True))

    def step(carry, given, kind):
        (z, history, path), (t, t_next, *rest) = carry, given
        first, second, heun = kind
        v = velocity(z, t, first)
        if path:
            path = record(path, z, t, v, rest[-1])
        if history:
            ratio, predict, correct = rest[:3]
            history = (z + jnp.maximum(1 - t, t_eps) * v, *history)
            z = z + sum(correct[j] * x for j, x in enumerate(history))
            history = history[:-1]
            return (ratio * z + sum(predict[j] * x for j, x in enumerate(history)), history, path), None
        if heun:
            v = (v + velocity(z + (t_next - t) * v, t_next, second)) / 2
        return (z + (t_next - t) * v, history, path), None

    kinds = [(bool(on[i]), bool(on[i + 1]), method == "heun" and i < steps - 1) for i in range(steps)]
    if method != "heun":
        kinds = [(first, False, False) for first, _, _ in kinds]
    carry, start = (z, history, path), 0
    for end in range(1, steps + 1):
        if end == steps or kinds[end] != kinds[start]:
            given = tuple(jnp.asarray(each[start:end]) for each in inputs)
            carry, _ = jax.lax.scan(functools.partial(step, kind=kinds[start]), carry, given)
            start = end
    return (carry[0], Path(times[shown], *carry[2])) if return_path else carry[0]


# ---------------------------------------------------------------- samplers


def sample_fn(
    apply: Callable[[jax.Array, jax.Array, jax.Array], jax.Array],
    noise: jax.Array,
    labels: jax.Array,
    *,
    null_label: int,
    steps: int = 50,
    method: str = "heun",
    cfg_scale: float = 1.0,
    interval: tuple[float, float] = (0.0, 1.0),
    t_eps: float = 0.05,
    prediction: str = "x",
    grid: str = "uniform",
    return_path: int = 0,
    backward: bool = False,
) -> Any:
    """Sample with any network `apply(z, t, y)`. Traceable: use it inside jit. Arguments as for `sample`, and:

    Args:
      return_path: k > 0 returns (images, Path): k <= steps moments of the way, the first at the start.
      backward: from images to noise; `noise` is then the images (see `invert`).

    Raises:
      UserError: settings that no sampler can run with.
    """
    check(steps=steps, method=method, grid=grid, cfg_scale=cfg_scale, interval=interval, t_eps=t_eps)
    if not 0 <= return_path <= steps:
        raise UserError(f"return_path={return_path} with steps={steps}: use a number from 0 to steps")
    if prediction not in SPACES:
        raise UserError(f"prediction={prediction!r}: use one of {', '.join(SPACES)}")
    guidance = isinstance(cfg_scale, jax.Array) or cfg_scale != 1.0  # a traced scale: one program for all scales

    def velocity(z, t, guide):
        guide = guide and guidance
        y = jnp.concatenate([labels, jnp.full_like(labels, null_label)]) if guide else labels
        zz = jnp.concatenate([z, z]) if guide else z
        tt = jnp.full((zz.shape[0],), t, jnp.float32)
        v = diffusion.convert(apply(zz, tt, y).astype(jnp.float32), prediction, "v", zz, tt, t_eps)
        if guide:
            v, v_null = jnp.split(v, 2)
            v = v_null + cfg_scale * (v - v_null)
        return v

    return integrate(
        velocity,
        noise,
        steps=steps,
        method=method,
        interval=interval if guidance else (2.0, 2.0),
        grid=grid,
        t_eps=t_eps,
        return_path=return_path,
        backward=backward,
    )


@functools.partial(jax.jit, static_argnames=("graphdef", "dtype", "ops", "settings"))
def _sample(graphdef, params, noise, labels, *, dtype, ops, settings):
    model = jit_model.merge(graphdef, params)
    network = functools.partial(model, dtype=dtype, ops=ops)
    return sample_fn(network, noise, labels, null_label=model.geometry.num_classes, **dict(settings))


def sample(
    model: jit_model.JiT,
    noise: jax.Array,
    labels: jax.Array,
    *,
    steps: int = 50,
    method: str = "heun",
    cfg_scale: float = 1.0,
    interval: tuple[float, float] = (0.0, 1.0),
    t_eps: float = 0.05,
    dtype: Any = jnp.float32,
    prediction: str = "x",
    grid: str = "uniform",
) -> jax.Array:
    """Images from noise.

    Args:
      model: a JiT.
      noise: initial state, (B, S, S, 3) float: standard normal *times the noise scale* the model was trained with.
      labels: (B,) int; `model.geometry.num_classes` is the null label.
      steps: steps of the time grid on [0, 1].
      method: "heun" (last step Euler) or "euler", as published; "abm2", "abm3" or "dpmpp_2m": multistep, one network
        evaluation per step.
      cfg_scale: guidance scale s; v = v_null + s (v_label - v_null). 1 switches guidance off.
      interval: (low, high), the open interval of times in which guidance acts; low = 0 includes t = 0.
      t_eps: lower clip of 1 - t where the prediction becomes a velocity (published: 0.05; separate from training's).
      dtype: compute type of the network; the state is float32 always.
      prediction: what the model was trained to predict: "x", "epsilon" or "v".
      grid: "uniform" or "power:rho" (see `time_grid`).

    Returns:
      (B, S, S, 3) float32, nominally in [-1, 1] (not clipped; see `to_uint8`).

    Raises:
      UserError: settings that no sampler can run with.
    """
    return _run(model, noise, labels, dtype, steps=steps, method=method, cfg_scale=float(cfg_scale), grid=grid,
                interval=tuple(map(float, interval)), t_eps=float(t_eps), prediction=prediction)  # fmt: skip


def invert(
    model: jit_model.JiT,
    images: jax.Array,
    labels: jax.Array,
    *,
    steps: int = 50,
    method: str = "abm2",
    cfg_scale: float = 1.0,
    interval: tuple[float, float] = (0.0, 1.0),
    t_eps: float = 0.05,
    dtype: Any = jnp.float32,
    prediction: str = "x",
    grid: str = "power:1.6",
) -> jax.Array:
    """Noise from images: the equation that `sample` integrates, from t = 1 back to t = 0. Arguments as for `sample`.

    The clip by `t_eps` makes the equation regular at t = 1: the first evaluation is at t = 1 itself, and images are taken as
    what the clipped equation ends at. `sample` with the same settings and enough steps leads back to the images.

    Returns:
      (B, S, S, 3) float32: near noise_scale times standard normal for images like the training data.
    """
    return _run(model, images, labels, dtype, steps=steps, method=method, cfg_scale=float(cfg_scale), grid=grid, backward=True,
                interval=tuple(map(float, interval)), t_eps=float(t_eps), prediction=prediction)  # fmt: skip


def check_labels(labels: Any, count: int, num_classes: int) -> np.ndarray:
    """Labels as (count,) int32.

    Raises:
      UserError: another number of labels than images, fractions, or values outside [0, num_classes] (the last is the null
        class).
    """
    values = np.asarray(labels)
    if values.shape != (count,):
        raise UserError(f"labels of shape {values.shape} for {count} images: give one label per image")
    fits = values.dtype.kind in "iu" or (values.dtype.kind == "f" and np.all(values == np.floor(values)))
    if not fits:
        raise UserError(f"labels {values[:8].tolist()}: must be whole numbers in [0, {num_classes}]")
    outside = values[(values < 0) | (values > num_classes)]
    if outside.size:
        raise UserError(f"label {outside[0]} is out of range: this model has classes [0, {num_classes}), {num_classes} is null")
    return values.astype(np.int32)


def _run(model, start, labels, dtype, **settings):
    start = jnp.asarray(start)
    if not isinstance(labels, jax.core.Tracer):  # inside a jit the caller answers for them
        labels = check_labels(labels, start.shape[0], model.geometry.num_classes)
    graphdef, params = jit_model.split(model)
    return _sample(
        graphdef,
        params,
        start,
        jnp.asarray(labels, jnp.int32),
        dtype=jnp.dtype(dtype),
        ops=kernels.get_ops("plain"),
        settings=tuple(sorted(settings.items())),
    )
