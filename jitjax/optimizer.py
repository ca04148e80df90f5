"""AdamW with parameter groups, Muon beside it, the learning-rate schedule and exponential moving averages of the weights."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from jitjax import muon
from jitjax.ema import power_ema_rate, warmup_ema_rate
from jitjax.plan import Plan
from jitjax.settings import POWER, Optimizer

Params = dict[str, jax.Array]


def learning_rate(step: Any, *, peak: float, min_lr: float, warmup: float, total: float, schedule: str) -> jax.Array:
    """Linear warm-up from exactly 0, then `peak` ("constant") or half a cosine down to `min_lr` ("cosine").

    `step`, `warmup` and `total` share one unit (optimizer steps here; the published code counts fractional epochs, which
    gives the same numbers). The first step of a warmed-up run has learning rate 0, as published.
    """
    step = jnp.asarray(step, jnp.float32)
    after = peak
    if schedule == "cosine":
        # (1 + cos(pi p)) / 2 = sin((1 - p) pi / 2)^2, which keeps its digits in float32 to the very end.
        remaining = jnp.clip((total - step) / max(total - warmup, 1e-9), 0, 1)
        after = min_lr + (peak - min_lr) * jnp.square(jnp.sin(remaining * (jnp.pi / 2)))
    return jnp.where(step < warmup, peak * step / max(warmup, 1e-9), after)


def make_schedule(optim: Optimizer, plan: Plan):
    """The run's learning rate as a function of the optimizer step."""
    return lambda step: learning_rate(
        step,
        peak=plan.peak_lr,
        min_lr=optim.min_lr,
        warmup=plan.warmup_steps,
        total=plan.total_steps,
        schedule=optim.schedule,
    )


def decay_mask(params: Params) -> dict[str, bool]:
    """Weight decay acts on matrices, the class embedding and the context positions, not on biases and norm weights."""
    return {name: value.ndim > 1 for name, value in params.items()}


def make_optimizer(
    optim: Optimizer, specs: Mapping[str, Any] | None = None, mesh: Mesh | None = None
) -> optax.GradientTransformation:
    """AdamW, or Muon beside it, with learning rate 1: the step multiplies its update by the learning rate of the optimizer
    step.

    So the rate follows the step counter, also after steps that were skipped because of a non-finite gradient; inside
    AdamW decay and update share the one factor, as they must for decoupled decay.

    Args:
      specs, mesh: how the parameters are sharded, for Muon's update; see `muon.make`.
    """
    if optim.name == "muon":
        return muon.make(make_optimizer(dataclasses.replace(optim, name="adamw")), optim, specs, mesh)
    o = optim
    return optax.adamw(1.0, b1=o.b1, b2=o.b2, eps=o.eps, weight_decay=o.weight_decay, mask=decay_mask)


def update_ema(ema: dict[str, Params], params: Params, step: jax.Array, *, warmup: bool = False) -> dict[str, Params]:
    """ema + rate * (params - ema) for every EMA, by its name: rate 1 - decay, without bias correction, as published, or that
    of a power function (`jitjax.ema`).

    Args:
      step: the optimizer step that made `params`, from 1.
      warmup: fixed decays begin with a shorter memory, see `ema.warmup_ema_rate`.
    """

    def rate(name):
        if warmup and not name.startswith(POWER):
            return warmup_ema_rate(step, float(name))
        return power_ema_rate(step, float(name.removeprefix(POWER))) if name.startswith(POWER) else 1 - float(name)

    def moved(ema, value, rate):
        return ema + rate * (value - ema)

    return {name: {key: moved(tree[key], params[key], rate(name)) for key in tree} for name, tree in ema.items()}
