"""One training run, top to bottom.

Order of operations in the loop, for optimizer step s: batch, step, remember metrics; then, if due, preview and save. A save
writes the metrics first, so a checkpoint never knows more than metrics.jsonl. The host waits for the device only where it
logs, and there for an interval that is long done.
"""

from __future__ import annotations

import functools
import signal
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding
from ml_collections import ConfigDict

from jitjax import checkpoint, data, flops, kernels, model, runtime, sharding, step, transfer
from jitjax import config as config_lib
from jitjax.data.shapes import draw_dataset
from jitjax.monitor import LateLog, Monitor, Throughput
from jitjax.preview import Preview
from jitjax.workdir import Workdir, parameter_table


def train(config: ConfigDict, workdir: str | Path, *, accept_config_changes: bool = False) -> int:
    """Train until the configured length, or go on where this workdir's run was.

    Returns:
      0, or 128 + signal number if the run was asked to stop (it has saved and can be resumed).

    Raises:
      UserError: a mistake in the configuration, the data or the workdir; nothing in the workdir is lost.
    """
    # ---------------------------------------------------------------- check everything before touching anything
    config_lib.validate(config)
    checkpoint.quiet()
    runtime.use_compilation_cache(config.compilation_cache)
    is_main = jax.process_index() == 0
    mesh = sharding.make_mesh(config.mesh.data, config.mesh.fsdp)
    folder = Workdir(workdir, is_main=is_main)
    if config.data.synthetic == "shapes":
        config.data.path = str(draw_dataset(folder.path / "shapes", image_size=config.data.image_size))
    dataset = data.open_dataset(config.data.path, config.data.image_size, exif_rotate=config.data.exif_rotate)
    num_classes = config_lib.resolve_num_classes(config, dataset.num_classes)
    geometry = model.geometry_from_config(config, num_classes)
    plan = config_lib.make_plan(
        config,
        images=len(dataset),
        folder_classes=dataset.num_classes,
        tokens_per_image=geometry.tokens,
        devices=mesh.size,
    )
    folder.check_config(config, plan.global_batch, accept_changes=accept_config_changes)
    kind, reason = kernels.resolve(config.kernels, dtype=config.dtype, geometry=geometry)
    ops = kernels.get_ops(kind)

    # ---------------------------------------------------------------- state: fresh, from another run, or resumed
    saved = checkpoint.Checkpoints(folder.path, keep_last=config.checkpoint.keep_last, keep_every=config.checkpoint.keep_every)
    init = functools.partial(step.init_state, geometry, config)
    like = sharding.abstract(jax.eval_shape(init, jax.random.key(config.seed)), mesh)
    last, notes = saved.latest(), []
    start = last or 0
    if last is not None:
        meta = saved.meta(last)
        if meta.get("data"):  # a checkpoint imported from elsewhere has seen none of ours
            data.check_fingerprint(meta["data"], dataset, allow_changed=config.data.allow_changed)
        checkpoint.check_fits(meta, geometry, config.optim.ema_decays, folder.path)
        state = saved.restore(last, like)
        notes.append(f"resumed from step {start:,}" + ("; the run is complete" if start >= plan.total_steps else ""))
    else:
        state = jax.jit(init, out_shardings=jax.tree.map(lambda leaf: leaf.sharding, like))(jax.random.key(config.seed))
        if config.init_from:
            state, report = initialise_from(config.init_from, state, config, mesh)
            notes.append(f"from {config.init_from}: {report}")
    if is_main:
        saved.require_space(state)  # now rather than after the first hour
    facts = {"devices": mesh.size, "effective_batch": plan.global_batch, "images_per_epoch": len(dataset)}
    folder.describe_run(config, facts)
    folder.write("parameters.txt", parameter_table(state.params))

    # ---------------------------------------------------------------- step, input, monitor
    train_step = step.make_train_step(geometry, config, plan, mesh, ops)
    preview = Preview(geometry, config, mesh, ops, dataset.class_names) if plan.preview_steps else None
    host_batches = data.make_iterator(
        dataset,
        seed=config.seed,
        global_batch=plan.global_batch,
        start_example=start * plan.global_batch,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
        num_workers=config.data.num_workers,
        flip=config.data.flip,
        max_bad_fraction=config.data.max_bad_fraction,
    )
    batches = data.to_device(host_batches, NamedSharding(mesh, sharding.BATCH))
    monitor = Monitor(folder.path, config_lib.to_dict(config), total_steps=plan.total_steps, resume_step=start, is_main=is_main)
    card = jax.devices()[0].device_kind
    peak = flops.datasheet_flops(card)
    begun = time.perf_counter()
    meter = Throughput(
        geometry.tokens,
        now=begun,
        flops_per_sample=flops.train_flops(geometry),
        peak_flops=peak and peak * mesh.size,
    )
    log = LateLog(monitor, meter, samples_per_step=plan.global_batch, steps_per_epoch=plan.steps_per_epoch)
    monitor.note(
        f"{config.model.name}, {sum(p.size for p in state.params.values()):,} parameters, {mesh.shape['data']} x "
        f"{mesh.shape['fsdp']} (data x fsdp) {card}, {config.dtype}, kernels {kind}" + (f" ({reason})" if reason else "")
    )
    monitor.note(
        f"{len(dataset):,} images{f' of {dataset.num_classes} classes' if dataset.labelled else ''}; effective batch "
        f"{plan.global_batch:,}; {plan.steps_per_epoch:,} steps an epoch; {plan.total_steps:,} steps in all"
    )
    for note in notes:
        monitor.note(note)

    def save(at: int) -> None:
        meta = checkpoint.describe(
            geometry,
            state.ema,
            config=config_lib.to_dict(config),
            data=dataset.fingerprint,
            examples=at * plan.global_batch,
            class_names=list(dataset.class_names),
        )
        saved.save(state, at, meta)

    # ---------------------------------------------------------------- loop
    # Emulated devices share one pool of threads: a second step in flight can take those that the first one's all-reduce
    # is waiting for, and both wait for ever. On GPUs the host runs ahead.
    emulated = jax.default_backend() == "cpu"
    stop = StopRequest()
    last_save = time.monotonic()
    done, exit_code = start, 1
    try:
        while done < plan.total_steps:
            waited = batches.wait_seconds
            try:
                batch = next(batches)
            except Exception:
                if stop.requested:  # Ctrl-C and a scheduler's SIGTERM reach the worker processes too
                    break
                raise
            state, metrics = train_step(state, batch)
            done += 1
            log.add(done, metrics, batches.wait_seconds - waited)
            if emulated:
                jax.block_until_ready(metrics)
            if done == start + 1:
                log.first_step_done()
                monitor.note(f"first step after {time.perf_counter() - begun:.1f} s (compilation, first batch)")
            at_log = done % config.log.every_steps == 0
            if at_log:
                log.interval()
            show = preview is not None and (done == plan.total_steps or done % plan.preview_steps == 0)
            minutes = (time.monotonic() - last_save) / 60
            timely = bool(config.checkpoint.every_minutes) and at_log and agree(minutes >= config.checkpoint.every_minutes)
            regular = bool(plan.checkpoint_steps) and done % plan.checkpoint_steps == 0
            if show or timely or regular:
                log.flush()
                pause = time.perf_counter()
                if show:
                    path = preview(state.ema, folder.path / "samples" / f"step_{done:08d}.png")
                    monitor.image(done, "samples", path)
                if timely or regular:
                    save(done)
                    last_save = time.monotonic()
                log.paused(time.perf_counter() - pause)
            if agree(stop.requested) if at_log or jax.process_count() == 1 else False:
                break
        log.flush()
        if saved.latest() != done:
            save(done)
        saved.wait()
        memory = jax.local_devices()[0].memory_stats() or {}
        if "peak_bytes_in_use" in memory:
            monitor.note(f"peak device memory {memory['peak_bytes_in_use'] / 2**30:.1f} GiB")
        exit_code = 128 + stop.signal if done < plan.total_steps else 0
        if exit_code:
            monitor.note(f"stopped by {signal.Signals(stop.signal).name} at step {done:,}; the same command goes on from there")
        return exit_code
    finally:
        stop.restore()
        batches.close()
        log.close()
        monitor.close(exit_code)
        saved.close()
        folder.close()


def initialise_from(
    path: str, state: step.TrainState, config: ConfigDict, mesh: jax.sharding.Mesh
) -> tuple[step.TrainState, transfer.Report]:
    """A step-0 state with another run's parameters and averages (its parameters for a decay it lacks)."""
    weights = checkpoint.load_weights(path, mesh)
    params, report = transfer.transfer(weights.params, state.params)
    ema = {decay: transfer.transfer(weights.ema.get(decay, weights.params), state.params)[0] for decay in state.ema}
    for decay in sorted(set(state.ema) - set(weights.ema)):
        report.fresh.append(f"average {decay} (from the parameters)")
    place = jax.tree.map(lambda leaf: leaf.sharding, state)
    fresh = jax.jit(lambda p, e: step.fresh_state(p, e, config), out_shardings=place)
    return fresh(params, ema), report


class StopRequest:
    """Remembers SIGTERM and SIGINT, so that the loop can save and leave; a second Ctrl-C stops at once."""

    def __init__(self):
        self.signal: int = 0
        self._before: dict[int, Any] = {}
        for number in (signal.SIGTERM, signal.SIGINT):
            try:
                self._before[number] = signal.signal(number, self._remember)
            except ValueError:  # not in the main thread: whoever called us handles signals
                pass

    @property
    def requested(self) -> bool:
        return bool(self.signal)

    def _remember(self, number: int, frame: Any) -> None:
        if self.signal and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.signal = number

    def restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)


def agree(flag: bool) -> bool:
    """Whether the flag is up in any process, so that all take the same branch. Every process must call it."""
    if jax.process_count() == 1:
        return flag
    from jax.experimental import multihost_utils

    return bool(multihost_utils.process_allgather(np.asarray(flag)).any())
