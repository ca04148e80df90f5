"""What the benchmarks share: a run's parts without a data set, random weights and data, and facts about the machine."""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding

from jitjax import checkpoint, exchange, from_settings, model, runtime, sharding, step, workdir
from jitjax.cli import arguments
from jitjax.flops import IMAGENET_IMAGES
from jitjax.from_settings import Setup
from jitjax.geometry import Geometry
from jitjax.settings import Settings

CLASSES = 1000  # ImageNet's, where the config leaves it to the data set


def load(args: argparse.Namespace) -> Settings:
    """The settings that the command line describes. A run length is not needed and does not matter.

    Raises:
      UserError: no config, or a mistake in it.
    """
    checkpoint.quiet()
    return arguments.load(args.config_arguments, run_length=False).settings


def prepare(settings: Settings, devices: int | None = None) -> Setup:
    """Check the settings and choose mesh and kernels as a run does. ImageNet's size stands in for a data set's.

    Args:
      devices: how many to use, the first ones; default all.

    Raises:
      UserError: a mistake in the config.
    """
    runtime.use_compilation_cache(settings.compilation_cache)
    mesh = sharding.mesh_of(settings.mesh, jax.devices()[:devices])
    classes = settings.model.num_classes or (CLASSES if settings.model.class_conditional else 0)
    images = max(IMAGENET_IMAGES, settings.batch_size * mesh.size * settings.optim.accumulation_steps)
    return from_settings.setup(settings, images=images, num_classes=classes, mesh=mesh)


def random_params(geometry: Geometry, key: jax.Array) -> model.Params:
    """A fresh model's weights, with noise in the matrices that start at zero (adaLN and the last layer).

    With those at zero the whole backward pass would multiply zeros, which a GPU does with less power, so at a higher clock
    than it has for real gradients.
    """

    def drawn(index: int, name: str, value: jax.Array) -> jax.Array:
        if not name.endswith(("adaln.kernel", "final.linear.kernel")):
            return value
        return 0.02 * jax.random.normal(jax.random.fold_in(key, index), value.shape)

    params = model.init_fn(geometry)(key)
    return {name: drawn(index, name, value) for index, (name, value) in enumerate(params.items())}


def random_state(setup: Setup) -> step.TrainState:
    """A train state with `random_params`, on the mesh as in training."""

    def init(key):
        params = random_params(setup.geometry, key)
        optim = setup.settings.optim
        return step.fresh_state(params, dict.fromkeys(optim.emas, params), optim, setup.settings.dtype)

    key = jax.random.key(setup.settings.seed)
    placed = sharding.shardings(jax.eval_shape(init, key), setup.mesh)
    return jax.block_until_ready(jax.jit(init, out_shardings=placed)(key))


def random_batch(setup: Setup) -> step.Batch:
    """Random images and labels of one optimizer step, made on the devices."""
    size, count = setup.geometry.image_size, setup.plan.global_batch

    def draw(key):
        images, labels = jax.random.split(key)
        return {
            "image": jax.random.randint(images, (count, size, size, model.CHANNELS), 0, 256).astype(jnp.uint8),
            "label": jax.random.randint(labels, (count,), 0, max(1, setup.geometry.num_classes)),
        }

    placed = NamedSharding(setup.mesh, sharding.BATCH)
    return jax.block_until_ready(jax.jit(draw, out_shardings=placed)(jax.random.key(setup.settings.seed + 1)))


# ---------------------------------------------------------------- facts for the report


def describe(setup: Setup) -> dict[str, Any]:
    """What was measured: the settings that decide speed, the devices, versions and flags."""
    c, g, device = setup.settings, setup.geometry, setup.mesh.devices.flat[0]
    return {
        "model": c.model.name,
        "parameters": sum(math.prod(p.shape) for p in jax.eval_shape(model.init_fn(g), jax.random.key(0)).values()),
        "image_size": g.image_size,
        "tokens_per_image": g.tokens,
        "context_length": g.context_length,
        "class_conditional": c.model.class_conditional,
        "batch_size": c.batch_size,
        "optimizer": c.optim.name,
        "accumulation_steps": c.optim.accumulation_steps,
        "global_batch": setup.plan.global_batch,
        "dtype": c.dtype,
        "kernels": setup.kernels,
        "kernels_reason": setup.kernels_reason,
        "remat": c.remat,
        "dropout": [c.model.attn_dropout, c.model.proj_dropout],
        "ema_decays": list(c.optim.ema_decays),
        "mesh": dict(setup.mesh.shape),
        "comm_dtype": c.mesh.comm_dtype,
        "device": device.device_kind,
        "devices": setup.mesh.size,
        "versions": workdir.versions(),
        "xla_flags": os.environ.get("XLA_FLAGS", ""),
        "compiler_options": exchange.compiler_options(setup.mesh) or {},
    }


def summary(values: Sequence[float], name: str, digits: int = 3) -> dict[str, float]:
    """Median under `name`, minimum and maximum under `name`_min and `name`_max."""
    found = {name: statistics.median(values), f"{name}_min": min(values), f"{name}_max": max(values)}
    return {key: round(value, digits) for key, value in found.items()}


def emit(record: dict[str, Any]) -> None:
    """One JSON line on stdout, by the first process only."""
    if jax.process_index() == 0:
        print(json.dumps(record), flush=True)


def say(text: str) -> None:
    """A line for the person who waits."""
    if jax.process_index() == 0:
        print(text, file=sys.stderr, flush=True)


def dispatch_ahead() -> bool:
    """Whether a second step may be dispatched before the first one is done. Emulated CPU devices share one pool of threads: a
    second step can take those that the first one's all-reduce waits for, and both wait for ever."""
    return jax.default_backend() != "cpu"


def timed(function: Callable[[], Any]) -> tuple[Any, float]:
    """What the function returned and the seconds until all of its arrays were ready."""
    begun = time.perf_counter()
    result = jax.block_until_ready(function())
    return result, time.perf_counter() - begun
