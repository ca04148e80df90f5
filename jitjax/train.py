"""One training run, top to bottom.

Order of operations in the loop, for optimizer step s: batch, step, remember metrics; then, if due, preview and save. A save
writes the metrics first, so a checkpoint never knows more than metrics.jsonl. The host waits for the device only where it
logs, and there for an interval that is long done.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding

from jitjax import checkpoint, data, diffusion, ema, flops, kernels, model, pipeline, runtime, saving, sharding, step, transfer
from jitjax import settings as settings_lib
from jitjax.anomalies import Anomalies
from jitjax.data.order import ExampleOrder
from jitjax.data.shapes import draw_dataset
from jitjax.distributed import Peers
from jitjax.evaluation import live
from jitjax.monitor import LateLog, Monitor, Throughput
from jitjax.optimizer import ema_names, make_schedule
from jitjax.plan import Plan, make_plan, resolve_num_classes
from jitjax.preview import Preview
from jitjax.settings import Settings
from jitjax.signals import StopAfter, Stopped, StopRequest
from jitjax.timing import TimeAccount
from jitjax.watchdog import Watchdog
from jitjax.workdir import Workdir, parameter_table


@dataclasses.dataclass
class Run:
    """What the loop works with."""

    settings: Settings
    folder: Workdir
    plan: Plan
    state: step.TrainState
    train_step: Any
    batches: Any
    preview: Preview | None
    preview_ema: str
    evaluation: live.LiveEvaluation | None
    eval_ema: str
    monitor: Monitor
    log: LateLog
    checkpoints: saving.Checkpoints
    meta: dict[str, Any]  # of every checkpoint
    start: int  # optimizer steps done before this start
    anomalies: Anomalies
    account: TimeAccount
    peers: Peers
    exit_code: int = 1


def train(
    settings: Settings,
    workdir: str | Path,
    *,
    accept_config_changes: bool = False,
    notes: Sequence[str] = (),
    peers: Peers | None = None,
) -> int:
    """Train until the configured length, or continue this workdir's run.

    Args:
      notes: lines to print at the start.

    Returns:
      0, or 128 + signal number if the run was asked to stop (it has saved and can be resumed).

    Raises:
      UserError: a mistake in the settings, the data or the workdir; nothing in the workdir is lost.
    """
    with contextlib.ExitStack() as stack:
        # First, so that a signal is answered from the start; the grace period ends with everything closed.
        grace = settings.checkpoint.grace_seconds
        stop = stack.enter_context(StopRequest(grace_seconds=grace, last_good=lambda: run.checkpoints.last_good()))
        run = build(
            settings, workdir, stack, accept_config_changes=accept_config_changes, notes=notes, peers=peers or Peers(0, 1)
        )
        dog = stack.enter_context(Watchdog(factor=settings.hang_factor))
        run.exit_code = loop(run, stop, dog)
        return run.exit_code


def build(
    settings: Settings,
    workdir: str | Path,
    stack: contextlib.ExitStack,
    *,
    accept_config_changes: bool,
    notes: Sequence[str],
    peers: Peers,
) -> Run:
    """Open and check everything; what has to be closed again is on `stack`."""
    # ---------------------------------------------------------------- check everything before touching anything
    begun = time.perf_counter()
    settings_lib.check(settings)
    settings_lib.check_data(settings.data)
    checkpoint.quiet()
    runtime.use_compilation_cache(settings.compilation_cache)
    is_main = jax.process_index() == 0
    mesh = sharding.make_mesh(settings.mesh.data, settings.mesh.zero, settings.mesh.fsdp)
    folder = Workdir(workdir, is_main=is_main)
    stack.callback(folder.close)
    path, image_size = settings.data.path, settings.data.image_size
    if settings.data.synthetic == "shapes":
        if not is_main:
            peers.agree(0)  # until process 0 has drawn them
        path = str(draw_dataset(folder.path / "shapes", image_size=image_size))
        if is_main:
            peers.agree(0)
    dataset = data.open_dataset(path, image_size, **settings.data.reading())
    conditional = settings.model.class_conditional
    num_classes = resolve_num_classes(conditional, settings.model.num_classes, dataset.num_classes)
    geometry = model.geometry_of(settings.model, image_size, num_classes)
    process = diffusion.from_config(settings_lib.to_dict(settings))
    plan = make_plan(settings, images=len(dataset), tokens_per_image=geometry.tokens, devices=mesh.size)
    folder.check_config(settings, plan.global_batch, accept_changes=accept_config_changes)
    kind, reason = kernels.resolve(settings.kernels, dtype=settings.dtype, geometry=geometry)
    ops = kernels.get_ops(kind)

    # ---------------------------------------------------------------- state: fresh, from other weights, or resumed
    keep = settings.checkpoint
    saved = saving.Checkpoints(folder.path, keep_last=keep.keep_last, keep_every=keep.keep_every)
    stack.callback(saved.close)
    init = functools.partial(step.init_state, geometry, settings.optim, settings.dtype)
    key = jax.random.key(settings.seed)
    like = sharding.abstract(jax.eval_shape(init, key), mesh)
    notes = list(notes)

    def check_saved(meta: dict[str, Any]) -> None:
        if meta.get("data"):  # a checkpoint imported from elsewhere has seen none of ours
            data.check_fingerprint(meta["data"], dataset, allow_changed=settings.data.allow_changed)
        checkpoint.check_fits(meta, geometry, ema_names(settings.optim), folder.path)

    start = 0
    if (resumed := saved.resume(like, check_saved)) is not None:
        state, start, _ = resumed
        notes.append(f"resumed from step {start:,}" + ("; the run is complete" if start >= plan.total_steps else ""))
    else:
        state = jax.jit(init, out_shardings=jax.tree.map(lambda leaf: leaf.sharding, like))(key)
        if settings.init_from:
            names = tuple(dataset.class_names) if conditional else ()
            state, report = transfer.initialise_from(settings.init_from, state, process, names, settings.optim, settings.dtype)
            notes.append(f"from {settings.init_from}: {report}")
    if is_main:
        saved.require_space(state)  # now rather than after the first hour
    saved.reserve(like)
    card = jax.devices()[0].device_kind
    facts = {
        "devices": mesh.size,
        "device_kind": card,
        "effective_batch": plan.global_batch,
        "images_per_epoch": len(dataset),
        "planned_steps": plan.total_steps,
        "steps_per_epoch": plan.steps_per_epoch,
    }
    folder.describe_run(settings, facts)
    folder.write("parameters.txt", parameter_table(state.params))
    meta = checkpoint.describe(
        geometry,
        state.ema,
        config=settings_lib.to_dict(settings),
        diffusion=dataclasses.asdict(process),
        data=dataset.fingerprint,
        class_names=list(dataset.class_names) if conditional else [],
    )

    # ---------------------------------------------------------------- step, input, monitor
    train_step = make_step(settings, geometry, plan, mesh, ops)
    preview = None
    if plan.preview_steps:
        options = settings.preview.sampler()
        if not conditional:
            options = dataclasses.replace(options, cfg_scale=1.0)
        preview = Preview(
            pipeline.Sampler(
                geometry, process, options, mesh, dtype=settings.dtype, ops=ops, comm_dtype=settings.mesh.comm_dtype
            ),
            num_images=settings.preview.num_images,
            classes=num_classes if conditional else 0,
            null_label=geometry.num_classes,
            class_names=dataset.class_names,
            seed=settings.seed,
        )
    evaluation = None
    if plan.eval_steps:
        evaluation = live.build(
            settings.eval,
            dataset,
            live.find_held_out(settings.eval.held_out, path, settings.data, dataset, conditional),
            geometry,
            process,
            mesh,
            noise=settings.diffusion,
            loss=settings.loss,
            class_conditional=conditional,
            dtype=settings.dtype,
            ops=ops,
            comm_dtype=settings.mesh.comm_dtype,
            say=notes.append,
        )
    host_batches = data.make_iterator(
        dataset,
        seed=settings.seed,
        global_batch=plan.global_batch,
        start_example=start * plan.global_batch,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
        num_workers=settings.data.num_workers,
        flip=settings.data.flip,
        max_bad_fraction=settings.data.max_bad_fraction,
    )
    batches = data.to_device(host_batches, NamedSharding(mesh, sharding.BATCH))
    stack.callback(batches.close)
    monitor = Monitor(
        folder.path,
        total_steps=plan.total_steps,
        steps_per_epoch=plan.steps_per_epoch,
        resume_step=start,
        is_main=is_main,
        title=settings.model.name,
        memory=lambda: (jax.local_devices()[0].memory_stats() or {}).get("peak_bytes_in_use"),
        next_commands=(f"jitjax sample {workdir} --out {workdir}/samples/drawn.png",),
        run_config=settings_lib.to_dict(settings) | facts,
        wandb_enabled=settings.wandb.enabled,
        wandb_project=settings.wandb.project,
        wandb_name=settings.wandb.name,
        wandb_mode=settings.wandb.mode,
        wandb_group=settings.wandb.group,
        wandb_tags=tuple(tag.strip() for tag in settings.wandb.tags.split(",") if tag.strip()),
        tensorboard=settings.log.tensorboard,
    )
    peak = flops.datasheet_flops(card)
    meter = Throughput(
        geometry.tokens,
        now=begun,
        flops_per_sample=flops.train_flops(geometry),
        peak_flops=peak and peak * mesh.size,
    )
    order = ExampleOrder(settings.seed, len(dataset), plan.global_batch)

    def images_of(number: int) -> list[dict[str, Any]]:
        examples = np.arange((number - 1) * plan.global_batch, number * plan.global_batch)
        return [{"index": int(i), "file": dataset.name(int(i))} for i in order.images(examples)]

    anomalies = Anomalies(
        folder.path,
        policy=settings.nan_policy,
        limit=settings.nan_limit,
        dynamic_loss_scale=settings.dtype == "float16",
        is_main=is_main,
        last_good=saved.last_good,
        batch=images_of,
    )

    def observe(number: int, metrics: Any) -> None:
        for line in anomalies.add(number, metrics):
            monitor.note(line)

    log = LateLog(
        monitor, meter, samples_per_step=plan.global_batch, steps_per_epoch=plan.steps_per_epoch, observers=(observe,)
    )
    account = TimeAccount(folder.path, resumed_from=start, is_main=is_main)
    account.add("startup", time.perf_counter() - begun)
    run = Run(
        settings=settings,
        folder=folder,
        plan=plan,
        state=state,
        train_step=train_step,
        batches=batches,
        preview=preview,
        preview_ema=str(settings.preview.ema_decay or settings.optim.ema_decays[0]),
        evaluation=evaluation,
        eval_ema=str(settings.eval.ema_decay or settings.optim.ema_decays[0]),
        monitor=monitor,
        log=log,
        checkpoints=saved,
        meta=meta,
        start=start,
        anomalies=anomalies,
        account=account,
        peers=peers,
    )
    stack.callback(account.persist)
    stack.callback(lambda: monitor.close(run.exit_code))
    stack.callback(log.close)
    monitor.note(
        f"{settings.model.name}, {sum(p.size for p in state.params.values()):,} parameters, "
        f"{sharding.describe(mesh)}, {card}, {settings.dtype}, kernels {kind}" + (f" ({reason})" if reason else "")
    )
    monitor.note(dataset.summary)
    monitor.note(
        f"effective batch {plan.global_batch:,}; {plan.steps_per_epoch:,} steps per epoch; {plan.total_steps:,} steps in all"
    )
    for note in notes:
        monitor.note(note)
    return run


def make_loss(settings: Settings, geometry: model.Geometry, ops: kernels.Ops) -> Any:
    """The loss of a run; see `step.make_loss`."""
    return step.make_loss(
        geometry,
        settings.diffusion,
        prediction=settings.prediction,
        loss=settings.loss,
        class_conditional=settings.model.class_conditional,
        dtype=settings.dtype,
        remat=settings.remat,
        ops=ops,
    )


def make_step(settings: Settings, geometry: model.Geometry, plan: Plan, mesh: jax.sharding.Mesh, ops: kernels.Ops) -> Any:
    """The jitted training step of a run, (state, batch) -> (state, metrics); see `step.make_train_step`."""
    init = functools.partial(step.init_state, geometry, settings.optim, settings.dtype)
    return step.make_train_step(
        make_loss(settings, geometry, ops),
        jax.eval_shape(init, jax.random.key(settings.seed)),
        mesh,
        optim=settings.optim,
        schedule=make_schedule(settings.optim, plan),
        seed=settings.seed,
        dtype=settings.dtype,
        comm_dtype=settings.mesh.comm_dtype,
        dynamic_loss_scale=settings.dtype == "float16",
    )


def loop(run: Run, stop: StopRequest, dog: Watchdog) -> int:
    """Train to the end or to a stop, save, and return the exit code."""
    settings, plan, state, log, monitor = run.settings, run.plan, run.state, run.log, run.monitor
    run.state = None  # the step donates it
    # Emulated devices share one pool of threads: a second step in flight can take those that the first one's all-reduce
    # is waiting for, and both wait for ever. On GPUs the host runs ahead.
    one_step_in_flight = jax.default_backend() == "cpu"
    begun = last_save = time.monotonic()
    done = run.start
    saved_step = run.start if run.start else None
    stop_after = StopAfter.parse(settings.stop_after)
    alone = run.peers.count == 1
    compiling = contextlib.ExitStack()  # until the first step is done
    compiling.enter_context(dog.untimed("compiling, and the first batch"))
    account, mark, other = run.account, begun, 0.0  # `other`: seconds since `mark` that were not spent on steps

    def save(scores: dict[str, float] | None = None, best: dict[str, Any] | None = None) -> None:
        meta = run.meta | {"examples": done * plan.global_batch} | ({"scores": scores} if scores else {})
        nonlocal saved_step
        run.checkpoints.save(state, done, meta, best=best)
        saved_step = done
        monitor.checkpoint(done, run.folder.path / checkpoint.DIRECTORY / str(done))

    if done < plan.total_steps:
        monitor.stage("compiling, and reading the first batch")
    while done < plan.total_steps:
        waited = run.batches.wait_seconds
        run.peers.doing(f"step {done + 1}, waiting for input")
        try:
            # Alone it may stop here; of several, the others are in the same step already.
            with dog.phase("input"), stop.interruptible() if alone else contextlib.nullcontext():
                batch = next(run.batches)
        except Stopped:
            break
        except Exception:
            if alone and stop.wait(2.0):  # Ctrl-C and a scheduler's SIGTERM reach the workers too
                break
            raise
        run.peers.doing(f"step {done + 1}")
        if done > run.start:  # the first wait runs beside the compilation
            account.add("input_wait", run.batches.wait_seconds - waited)
            other += run.batches.wait_seconds - waited
        state, metrics = run.train_step(state, batch)
        done += 1
        log.add(done, metrics, run.batches.wait_seconds - waited)
        if one_step_in_flight:
            jax.block_until_ready(metrics)
        if done == run.start + 1:
            log.first_step_done()
            compiling.close()
            mark = time.monotonic()
            account.add("compile", mark - begun)
            monitor.note(f"first step after {time.monotonic() - begun:.1f} s")
        dog.step(done)
        at_log = done % settings.log.every_steps == 0
        if at_log:
            log.interval()
            account.add("step", max(0.0, time.monotonic() - mark - other))
            mark, other = time.monotonic(), 0.0
            account.reached(done)
        every_minutes = settings.checkpoint.every_minutes
        show = run.preview is not None and (done == plan.total_steps or done % plan.preview_steps == 0)
        timely = bool(every_minutes) and at_log and run.peers.agree(time.monotonic() - last_save >= 60 * every_minutes)
        timely = run.peers.agree(timely or run.checkpoints.retry_due()) if at_log else False
        regular = bool(plan.checkpoint_steps) and done % plan.checkpoint_steps == 0
        snapshot = bool(plan.snapshot_steps) and (done == plan.total_steps or done % plan.snapshot_steps == 0)
        score = run.evaluation is not None and (done == plan.total_steps or done % plan.eval_steps == 0)
        if show or timely or regular or score or snapshot:
            quiet = contextlib.ExitStack()
            quiet.enter_context(dog.untimed("saving, previewing or evaluating"))
            log.flush()
            pause = time.perf_counter()
            if show:
                with account.measure("preview"):
                    path = run.preview(state.ema[run.preview_ema], run.folder.path / "samples" / f"step_{done:08d}.png")
                    monitor.image(done, "samples", path)
            if snapshot:
                with account.measure("save"):
                    save_snapshots(run, state, done)
            with account.measure("evaluation"):
                scores, best = (evaluate(run, state, done) if score else None), None
            if scores:
                best = run.evaluation.best(scores, run.checkpoints.best())
            if timely or regular or best:
                with account.measure("save"):
                    save(scores, best)
                account.saved()
                last_save = time.monotonic()
            log.paused(time.perf_counter() - pause)
            other += time.perf_counter() - pause
            quiet.close()
        if at_log or alone:
            stop.request(run.peers.agree(stop.signal))
            if stop.requested or run.peers.agree(stop_after.reached(done - run.start, time.monotonic() - begun)):
                break
    dog.__exit__()  # the grace period takes over
    log.flush()
    if saved_step != done or run.checkpoints.retry_due():
        save()
    run.checkpoints.wait()
    account.reached(done)
    account.saved()
    memory = jax.local_devices()[0].memory_stats() or {}
    if "peak_bytes_in_use" in memory:
        monitor.note(f"peak device memory {memory['peak_bytes_in_use'] / 2**30:.1f} GiB")
    if done < plan.total_steps:
        reason = f"by {stop.name}" if stop.requested else f"after {settings.stop_after} (--config.stop_after)"
        monitor.note(f"stopped {reason} at step {done:,}; the same command continues from there")
        return stop.exit_code
    return 0


def save_snapshots(run: Run, state: step.TrainState, done: int) -> None:
    """The power-function EMAs as small files, from which `jitjax.ema` rebuilds an EMA of any length."""
    for name in state.ema:
        if name.startswith(ema.POWER):
            whole = sharding.replicated(state.ema[name])
            if jax.process_index() == 0:
                ema.write_snapshot(run.folder.path / ema.FOLDER, done, float(name.removeprefix(ema.POWER)), whole)


def evaluate(run: Run, state: step.TrainState, done: int) -> dict[str, float]:
    """Score the live EMA, and log it."""
    begun = time.perf_counter()
    run.monitor.stage("evaluating")
    scores = run.evaluation(state.ema[run.eval_ema])
    run.monitor.scores(done, scores)
    run.monitor.note(f"evaluation of EMA {run.eval_ema} took {time.perf_counter() - begun:.1f} s")
    run.folder.append("scores.jsonl", {"step": done, "ema": run.eval_ema, **scores})
    return scores
