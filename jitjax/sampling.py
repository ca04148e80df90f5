"""Sampling: Euler and Heun along dz/dt = v from noise (t = 0) to images (t = 1), with classifier-free guidance.

The time grid is known before anything runs, so where guidance acts is too: a step costs the unconditional half of the
batch only inside the guidance interval, and the conditional and unconditional images go through the network as one batch.
The state z is float32 throughout; rounding it between steps shows as salt-and-pepper noise.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jitjax import diffusion, kernels
from jitjax import model as jit_model

METHODS = ("heun", "euler")


def time_grid(steps: int) -> np.ndarray:
    """steps + 1 evenly spaced times from 0 to 1, float32, rounded as the published sampler's are: the step is float32,
    each half is counted from its own end, and multiplying and adding round once (float64 holds the product exactly)."""
    step = np.float64(np.float32(1.0) / np.float32(steps))
    index = np.arange(steps + 1)
    return np.where(index < (steps + 1) // 2, index * step, 1.0 - (steps - index) * step).astype(np.float32)


def guided(t: np.ndarray, interval: tuple[float, float]) -> np.ndarray:
    """Whether guidance acts at time t: strictly inside the interval, in float32; a lower end of 0 includes t = 0."""
    low, high = np.float32(interval[0]), np.float32(interval[1])
    return (t < high) & ((low == 0) | (t > low))


def integrate(
    velocity: Callable[[jax.Array, jax.Array, bool], jax.Array],
    noise: jax.Array,
    *,
    steps: int,
    method: str,
    interval: tuple[float, float],
) -> jax.Array:
    """Integrate dz/dt = velocity(z, t, guided) over [0, 1]. `guided` is a Python bool: two programs, no wasted half.

    The last step is Euler's also under Heun, so Heun makes 2 * steps - 1 network evaluations.

    Runs of consecutive steps of the same kind become one `lax.scan` each: at most a handful of compiled bodies.
    """
    times = time_grid(steps)
    on = guided(times, interval)

    def step(z, t_and_next, kind):
        t, t_next = t_and_next
        first, second, heun = kind
        v = velocity(z, t, first)
        if heun:
            v = (v + velocity(z + (t_next - t) * v, t_next, second)) / 2
        return z + (t_next - t) * v, None

    kinds = [(bool(on[i]), bool(on[i + 1]), method == "heun" and i < steps - 1) for i in range(steps)]
    z, start = noise.astype(jnp.float32), 0
    for end in range(1, steps + 1):
        if end == steps or kinds[end] != kinds[start]:
            pairs = (jnp.asarray(times[start:end]), jnp.asarray(times[start + 1 : end + 1]))
            z, _ = jax.lax.scan(functools.partial(step, kind=kinds[start]), z, pairs)
            start = end
    return z


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
) -> jax.Array:
    """Sample with any network `apply(z, t, y)`. Traceable: use it inside jit. Arguments as for `sample`."""
    if method not in METHODS:
        raise ValueError(f"method={method!r}: use one of {METHODS}")

    def velocity(z, t, guide):
        guide = guide and cfg_scale != 1.0
        y = jnp.concatenate([labels, jnp.full_like(labels, null_label)]) if guide else labels
        zz = jnp.concatenate([z, z]) if guide else z
        tt = jnp.full((zz.shape[0],), t, jnp.float32)
        v = diffusion.convert(apply(zz, tt, y).astype(jnp.float32), prediction, "v", zz, tt, t_eps)
        if guide:
            v, v_null = jnp.split(v, 2)
            v = v_null + cfg_scale * (v - v_null)
        return v

    return integrate(velocity, noise, steps=steps, method=method, interval=interval if cfg_scale != 1.0 else (2.0, 2.0))


@functools.partial(
    jax.jit,
    static_argnames=("graphdef", "steps", "method", "cfg_scale", "interval", "t_eps", "dtype", "prediction", "ops"),
)
def _sample(graphdef, params, noise, labels, *, dtype, ops, **settings):
    model = jit_model.merge(graphdef, params)
    return sample_fn(
        functools.partial(model, dtype=dtype, ops=ops),
        noise,
        labels,
        null_label=model.geometry.num_classes,
        **settings,
    )


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
) -> jax.Array:
    """Images from noise.

    Args:
      model: a JiT.
      noise: initial state, (B, S, S, 3) float: standard normal *times the noise scale* the model was trained with.
      labels: (B,) int; `model.geometry.num_classes` is the null label.
      steps: steps of the time grid on [0, 1].
      method: "heun" (last step Euler) or "euler".
      cfg_scale: guidance scale s; v = v_null + s (v_label - v_null). 1 switches guidance off.
      interval: (low, high), the open interval of times in which guidance acts; low = 0 includes t = 0.
      t_eps: lower clip of 1 - t where the prediction becomes a velocity (published: 0.05; separate from training's).
      dtype: compute type of the network; the state is float32 always.
      prediction: what the model was trained to predict: "x", "epsilon" or "v".

    Returns:
      (B, S, S, 3) float32, nominally in [-1, 1] (not clipped; see `to_uint8`).
    """
    graphdef, params = jit_model.split(model)
    dtype = jnp.dtype(dtype)
    ops = kernels.get_ops("plain")
    return _sample(
        graphdef,
        params,
        jnp.asarray(noise),
        jnp.asarray(labels, jnp.int32),
        steps=steps,
        method=method,
        cfg_scale=float(cfg_scale),
        interval=tuple(map(float, interval)),
        t_eps=float(t_eps),
        dtype=dtype,
        prediction=prediction,
        ops=ops,
    )
