"""Saving and restoring a whole train state, as one JSON line.

    jitjax bench checkpoint --config configs/imagenet.py:h16 --directory /disk/to/test

`stopped_seconds` is how long a training loop stands still for an asynchronous save: until the state may be overwritten by
the next step; `stopped_seconds_per_gb` divides by the gigabytes of the state. `durable_seconds` counts from the same moment to
the end of the write in the background. The first save of a process is reported separately. `reserve_seconds` is what a run does
in a thread while its first step compiles, so that the first save is as short as the others. What is restored is compared with
what was saved, bit for bit; it may come from the operating system's file cache.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from jitjax import checkpoint, saving, settings, sharding, step
from jitjax.benchmarks import common
from jitjax.errors import UserError
from jitjax.from_settings import Setup


def run(args: argparse.Namespace) -> None:
    """Measure with the flags of `jitjax.bench`.

    Raises:
      UserError: a mistake in the configuration, or a folder that cannot be written.
    """
    config = common.load(args)
    if jax.process_count() > 1:
        raise UserError("bench checkpoint runs in one process only")
    setup = common.prepare(config)
    try:
        folder = tempfile.TemporaryDirectory(prefix="jitjax-bench-", dir=args.directory)
    except OSError as error:
        raise UserError(f"--directory={args.directory}: {error.strerror}; name an existing folder to test") from error
    with folder as path:
        common.emit(measure(setup, Path(path), args.repeats))


def measure(setup: Setup, folder: Path, repeats: int) -> dict[str, Any]:
    """Save 1 + `repeats` times into `folder`, restore the last. Times in seconds, sizes in bytes."""
    state = common.random_state(setup)
    like = sharding.abstract(jax.eval_shape(lambda: state), setup.mesh)
    meta = checkpoint.describe(setup.geometry, state.ema, config=settings.to_dict(setup.settings))
    # As after a train step: new arrays in the memory of the old ones, of which the host has no copy yet.
    advance = jax.jit(_advanced, donate_argnums=0, out_shardings=jax.tree.map(lambda leaf: leaf.sharding, like))
    saved = saving.Checkpoints(folder, keep_last=1)
    begun = time.perf_counter()
    saved.reserve(like).join()
    reserve_seconds = time.perf_counter() - begun
    stopped, durable = [], []
    for number in range(1, repeats + 2):
        state = jax.block_until_ready(advance(state))
        begun = time.perf_counter()
        saved.save(state, number, meta)
        stopped.append(time.perf_counter() - begun)
        saved.wait()
        durable.append(time.perf_counter() - begun)
    size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    restore = []
    for _ in range(repeats):
        restored, seconds = common.timed(functools.partial(saved.restore, repeats + 1, like))
        restore.append(seconds)
    same = bool(jax.jit(_equal)(state, restored))
    saved.close()

    in_memory = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
    common.say(
        f"{setup.settings.model.name}: {size / 1e9:.2f} GB; stopped {stopped[0]:.2f} s the first time, then "
        f"{statistics.median(stopped[1:]):.2f} s ({statistics.median(stopped[1:]) / in_memory * 1e9:.3f} s/GB), durable after "
        f"{statistics.median(durable[1:]):.2f} s, restored in {statistics.median(restore):.2f} s"
    )
    return {
        "benchmark": "checkpoint",
        **common.summary(stopped[1:], "stopped_seconds"),
        **common.summary(durable[1:], "durable_seconds"),
        **common.summary(restore, "restore_seconds"),
        "stopped_seconds_per_gb": round(statistics.median(stopped[1:]) / in_memory * 1e9, 4),
        "first_stopped_seconds": round(stopped[0], 3),
        "first_stopped_seconds_per_gb": round(stopped[0] / in_memory * 1e9, 4),
        "reserve_seconds": round(reserve_seconds, 3),
        "first_durable_seconds": round(durable[0], 3),
        "repeats": repeats,
        "state_bytes": in_memory,
        "disk_bytes": size,
        "write_gb_per_second": round(size / statistics.median(durable[1:]) / 1e9, 3),
        "restored_equals_saved": same,
        **common.describe(setup),
    }


def _advanced(state: step.TrainState) -> step.TrainState:
    """New values everywhere, random in every digit: Orbax compresses, and a fresh optimizer's zeros would vanish."""
    params = {name: value * 1.001 for name, value in state.params.items()}

    def moved(path: tuple[Any, ...], leaf: jax.Array) -> jax.Array:
        name = getattr(path[-1], "key", None)  # a moment has its parameter's, a counter none
        return leaf if name is None else params[name] * 0.01

    ema = {decay: {n: p * float(decay) for n, p in params.items()} for decay in state.ema}
    return dataclasses.replace(state, params=params, ema=ema, opt_state=jax.tree.map_with_path(moved, state.opt_state))


def _equal(a: step.TrainState, b: step.TrainState) -> jax.Array:
    a, b = (step.TrainState(0, s.params, s.opt_state, s.ema, s.loss_scale) for s in (a, b))
    return jnp.all(jnp.stack(jax.tree.leaves(jax.tree.map(lambda x, y: jnp.all(x == y), a, b))))
