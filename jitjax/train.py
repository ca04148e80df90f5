"""One training run, top to bottom.

Order of operations in the loop, for optimizer step s: batch, step, remember metrics; then, if due, EMA snapshot, save, preview,
scores, and the mark of the best checkpoint. A save comes first, since a stop may not leave time for the rest; it writes the
metrics before, so a checkpoint never knows more than metrics.jsonl. The host waits for the device only where it
logs, and there for an interval that is long done (on a CPU for each step).
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
from jax.sharding import NamedSharding

from jitjax import (
    cards,
    checkpoint,
    data,
    describe,
    diffusion,
    ema,
    flops,
    from_settings,
    memory,
    processes,
    run_record,
    runtime,
    saving,
    sharding,
    step,
    tables,
)
from jitjax import settings as settings_lib
from jitjax.anomalies import Anomalies
from jitjax.data.order import ExampleOrder
from jitjax.data.shapes import draw_dataset
from jitjax.distributed import Peers
from jitjax.errors import UserError, closing
from jitjax.evaluation import live
from jitjax.geometry import Geometry
from jitjax.inspection import due, inspect, mark_again, missed
from jitjax.monitor import LateLog, Monitor, Throughput
from jitjax.plan import Plan, after_another_batch, resolve_num_classes
from jitjax.preview import Preview, build_preview
from jitjax.settings import Settings
from jitjax.signals import NOT_SAVED, StopAfter, Stopped, StopRequest, leave
from jitjax.snapshots import Snapshots
from jitjax.timing import TimeAccount
from jitjax.watchdog import Watchdog
from jitjax.workdir import Workdir, check_apart, check_idle, fitted, parameter_table

# A step that takes longer is a hang, unless steps usually take long. Several processes wait for the one that hangs.
HANG_SECONDS, HANG_SECONDS_OF_SEVERAL = 300.0, 100.0


@dataclasses.dataclass
class Run:
    """What the loop works with."""

    settings: Settings
    geometry: Geometry
    folder: Workdir
    plan: Plan
    order: ExampleOrder
    state: step.TrainState
    train_step: Any
    host_batches: data.HostIterator
    batches: Any  # the same on the devices
    preview: Preview | None
    preview_ema: str
    evaluation: live.LiveEvaluation | None
    eval_ema: str
    monitor: Monitor
    log: LateLog
    checkpoints: saving.Checkpoints
    snapshots: Snapshots
    meta: dict[str, Any]  # of every checkpoint
    start: int  # optimizer steps done before this start
    begun: float  # this start, by time.perf_counter()
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
    dataset: data.DataSet | None = None,
    objective: diffusion.Objective | None = None,
) -> int:
    """Train until the configured length, or continue this workdir's run.

    Args:
      notes: lines to print at the start.
      dataset: images to train on instead of those that `settings.data` names; see `jitjax.data.of_source`.
      objective: loss of each image instead of the one that `settings.loss` names; see `jitjax.diffusion.Objective`. What the
        network predicts is `settings.prediction` all the same, as samplers need it.

    Returns:
      0, or 128 + signal number if the run was asked to stop (it has saved and can be resumed).

    Raises:
      UserError: a mistake in the settings, the data or the workdir; nothing in the workdir is lost.
    """
    with contextlib.ExitStack() as stack:
        # First, so that a signal is answered from the start; the grace period ends with everything closed.
        grace = settings.checkpoint.grace_seconds
        peers = peers or Peers(0, 1)
        stop = StopRequest(grace_seconds=grace, last_good=lambda: run.checkpoints.last_good(), tell=peers.ask_to_stop)
        stack.enter_context(stop)
        peers.on_stop = stop.request_from_thread
        run = None
        try:
            run = build(
                settings,
                workdir,
                stack,
                accept_config_changes=accept_config_changes,
                notes=notes,
                peers=peers,
                own_dataset=dataset,
                own_objective=objective,
            )

            def give_up(code: int, line: str) -> None:
                run.host_batches.wake()
                run.peers.failed(line, code)
                leave(code, line)

            with Watchdog(
                factor=settings.hang_factor,
                least_seconds=HANG_SECONDS if peers.count == 1 else HANG_SECONDS_OF_SEVERAL,
                describe=run.host_batches.describe,
                failed=run.log.failure if peers.count > 1 else str,  # one process meets it itself, and says more
                leave=give_up,
            ) as dog:
                run.exit_code = loop(run, stop, dog)
            return run.exit_code
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            if run is None:
                raise memory.out_of_memory(error, settings, None, say=say_on_stderr) from error
            say = run.monitor.note if peers.rank == 0 else say_on_stderr  # the monitor of another process prints nothing
            failure = memory.out_of_memory(error, run.settings, run.geometry.num_classes, say=say)
            if (run.checkpoints.newest() or 0) > run.start:  # it fitted until now, and the next start gets further
                failure.exit_code = NOT_SAVED
            raise failure from error


def say_on_stderr(line: str) -> None:
    tables.say(line, sys.stderr)


def build(
    settings: Settings,
    workdir: str | Path,
    stack: contextlib.ExitStack,
    *,
    accept_config_changes: bool,
    notes: Sequence[str],
    peers: Peers,
    own_dataset: data.DataSet | None,
    own_objective: diffusion.Objective | None,
) -> Run:
    """Open and check everything; what has to be closed again is on `stack`."""
    # ---------------------------------------------------------------- check everything before touching anything
    begun = time.perf_counter()
    settings_lib.check(settings)
    if own_dataset is None:
        settings_lib.check_data(settings.data)
    checkpoint.quiet()
    runtime.use_compilation_cache(settings.compilation_cache)
    if is_main := jax.process_index() == 0:
        check_idle(workdir)  # listing the images can take minutes
    given, notes = settings, list(notes)
    if (settings := fitted(given, workdir, jax.device_count())) != given:
        notes.append(
            f"{jax.device_count()} devices make the same steps with batch_size={settings.batch_size}, "
            f"accumulation_steps={settings.optim.accumulation_steps}"
            + ("" if settings.mesh == given.mesh else f", mesh.zero={settings.mesh.zero}, mesh.fsdp={settings.mesh.fsdp}")
        )
    mesh = sharding.mesh_of(settings.mesh)
    path, image_size, dataset = settings.data.path, settings.data.image_size, own_dataset
    if dataset is None and path:
        dataset = data.open_dataset(path, image_size, **settings.data.reading())
        check_apart(workdir, dataset)
    folder = Workdir(workdir, is_main=is_main)
    stack.callback(folder.close)
    if dataset is None:  # shapes
        if not is_main:
            peers.agree(0)  # until process 0 has drawn them
        path = str(draw_dataset(folder.path / "shapes", image_size=image_size))
        if is_main:
            peers.agree(0)
        dataset = data.open_dataset(path, image_size, **settings.data.reading())
    if dataset.image_size != image_size:
        raise UserError(f"--config.data.image_size={image_size}, but the data set's images have {dataset.image_size} pixels")
    objective = own_objective or from_settings.published_objective(settings)
    conditional = settings.model.class_conditional
    num_classes = resolve_num_classes(conditional, settings.model.num_classes, dataset.num_classes)
    setup = from_settings.setup(settings, images=len(dataset), num_classes=num_classes, mesh=mesh)
    geometry, plan = setup.geometry, setup.plan
    process = diffusion.from_config(settings_lib.to_dict(settings))
    own_name = getattr(own_objective, "__qualname__", type(own_objective).__name__) if own_objective else ""
    images_of = {f"images ({name})": value for name, value in dataset.fingerprint.items()}
    processes.require_same(settings_lib.of_all_processes(settings) | images_of | {"objective": own_name or "published"})
    accepted = folder.check_config(settings, plan.global_batch, accept_changes=accept_config_changes, objective=own_name)
    notes += accepted

    # ---------------------------------------------------------------- state: fresh, from other weights, or resumed
    keep = settings.checkpoint
    snapshots = stack.enter_context(closing(Snapshots(folder.path / ema.FOLDER)))
    saved = saving.Checkpoints(
        folder.path,
        keep_last=keep.keep_last,
        keep_every=keep.keep_every,
        before_commit=snapshots.settle,
        committed=lambda number: monitor.checkpoint(number, folder.path / checkpoint.DIRECTORY / str(number)),
    )
    stack.enter_context(closing(saved))
    like = from_settings.abstract_state(settings, geometry, mesh)
    changes: list[str] = []  # of the data, accepted

    def check_saved(meta: dict[str, Any]) -> None:
        if meta.get("data"):  # a checkpoint imported from elsewhere has seen none of ours
            changes[:] = data.check_fingerprint(
                meta["data"],
                dataset,
                allow_changed=settings.data.allow_changed,
                class_names=meta.get("class_names") or () if conditional else (),
            )
        checkpoint.check_fits(meta, geometry, settings.optim.emas, settings.optim, folder.path)

    start, order = 0, ExampleOrder(settings.seed, len(dataset), plan.global_batch)
    if (resumed := saved.resume(like, check_saved)) is not None:
        state, start, before = resumed
        notes += changes
        if shift := before.get("examples", order.seen(start)) - order.seen(start):
            order = dataclasses.replace(order, shift=shift)
            plan = after_another_batch(plan, settings, shift)
            setup = dataclasses.replace(setup, plan=plan)
            if any("effective batch" in line for line in accepted):
                notes.append(f"the data go on after the {order.seen(start):,} images of the steps so far")
        notes.append(f"resumed from step {start:,}" + ("; the run is complete" if start >= plan.total_steps else ""))
    else:
        state, report = from_settings.first_state(setup, process, tuple(dataset.class_names))
        notes.extend([*report, *(f"warning: {line}" for line in describe.of_schedule(settings, plan))])
    if is_main:
        run_record.forget_after(folder.path, start)
        saved.require_space(state)  # now rather than after the first hour
    saved.reserve(like)
    card, parameters = jax.devices()[0].device_kind, sum(p.size for p in state.params.values())
    facts = {
        "devices": mesh.size,
        "device_kind": card,
        "effective_batch": plan.global_batch,
        "images_per_epoch": len(dataset),
        "parameters": parameters,
        "planned_steps": plan.total_steps,
        "steps_per_epoch": plan.steps_per_epoch,
    } | ({"objective": own_name} if own_name else {})
    folder.describe_run(given, facts)
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
    train_step = from_settings.make_step(setup, objective)
    preview = build_preview(setup, process, dataset.class_names) if plan.preview_steps else None
    evaluation = None
    if plan.eval_steps:
        held_out_path = "" if own_dataset else path
        held_out, unused = live.find_held_out(settings.eval.held_out, held_out_path, settings.data, dataset, conditional)
        notes += unused
        # Each process reads its part of them: where one has others, eval/loss is wrong, or the rest waits for it.
        of_held_out = held_out.fingerprint if held_out else {"count": 0}
        processes.require_same({f"held-out images ({name})": value for name, value in of_held_out.items()})
        evaluation = live.build(
            settings.eval,
            dataset,
            held_out,
            settings.eval.which or settings.optim.emas[0],
            geometry,
            process,
            mesh,
            reading=settings.data,
            noise=settings.diffusion,
            objective=objective,
            class_conditional=conditional,
            dtype=settings.dtype,
            ops=setup.ops,
            comm_dtype=settings.mesh.comm_dtype,
            say=notes.append,
        )
    host_batches = data.make_iterator(
        dataset,
        seed=settings.seed,
        global_batch=plan.global_batch,
        start_example=order.seen(start),
        process_index=jax.process_index(),
        process_count=jax.process_count(),
        num_workers=settings.data.num_workers,
        flip=settings.data.flip,
        max_bad_fraction=settings.data.max_bad_fraction,
    )
    batches = data.to_device(host_batches, NamedSharding(mesh, sharding.BATCH))
    stack.callback(batches.close)
    account = TimeAccount(folder.path, resumed_from=start, begun=begun, is_main=is_main)
    guided = f" --cfg_scale {settings.preview.cfg_scale:g}" if conditional and settings.preview.cfg_scale != 1 else ""
    monitor = Monitor(
        folder.path,
        total_steps=plan.total_steps,
        steps_per_epoch=plan.steps_per_epoch,
        resume_step=start,
        is_main=is_main,
        title=settings.model.name,
        begun=begun,
        activity=lambda: account.now,
        next_commands=(f"jitjax sample {workdir}{guided} --out {workdir}/samples/drawn.png",),
        run_config=settings_lib.to_dict(settings) | facts,
        wandb=settings.wandb,
        tensorboard=settings.log.tensorboard,
    )
    peak = cards.datasheet_flops(card)
    meter = Throughput(
        geometry.tokens,
        now=begun,
        flops_per_sample=flops.train_flops(geometry),
        peak_flops=peak and peak * mesh.size,
    )

    def last_good() -> str:
        saved.settle()
        return saved.last_good()

    anomalies = Anomalies(
        folder.path,
        policy=settings.nan_policy,
        limit=settings.nan_limit,
        dynamic_loss_scale=settings.dtype == "float16",
        is_main=is_main,
        last_good=last_good,
        batch=lambda number: data.names(dataset, order.batch(number), host_batches.bad_files),
    )

    def observe(number: int, metrics: Any) -> None:
        for line in anomalies.add(number, metrics):
            monitor.note(line)

    log = LateLog(
        monitor,
        meter,
        samples_per_step=plan.global_batch,
        steps_per_epoch=plan.steps_per_epoch,
        memory=lambda: (jax.local_devices()[0].memory_stats() or {}).get("peak_bytes_in_use"),
        observers=(observe,),
        facts=lambda: account.metrics() | anomalies.metrics(),
    )
    run = Run(
        settings=settings,
        geometry=geometry,
        folder=folder,
        plan=plan,
        order=order,
        state=state,
        train_step=train_step,
        host_batches=host_batches,
        batches=batches,
        preview=preview,
        preview_ema=settings.preview.which or settings.optim.emas[0],
        evaluation=evaluation,
        eval_ema=settings.eval.which or settings.optim.emas[0],
        monitor=monitor,
        log=log,
        checkpoints=saved,
        snapshots=snapshots,
        meta=meta,
        start=start,
        begun=begun,
        anomalies=anomalies,
        account=account,
        peers=peers,
    )
    stack.callback(account.persist)
    stack.callback(lambda: monitor.close(run.exit_code))
    stack.callback(lambda: monitor.summary(account.metrics()))
    stack.callback(log.close)
    stack.callback(saved.settle)  # before the last line says what there is to continue from
    monitor.note(
        f"{settings.model.name}, {parameters:,} parameters, {sharding.describe(mesh)}, {card}, {settings.dtype}, "
        f"kernels {setup.kernels}" + (f" ({setup.kernels_reason})" if setup.kernels_reason else "")
    )
    monitor.note(dataset.summary + (f"; own objective {own_name}" if own_name else ""))
    monitor.note(
        f"effective batch {plan.global_batch:,}; {plan.steps_per_epoch:,} steps per epoch; {plan.total_steps:,} steps in all"
    )
    for note in notes:
        monitor.note(note)
    return run


def loop(run: Run, stop: StopRequest, dog: Watchdog) -> int:
    """Train to the end or to a stop, save, and return the exit code."""
    settings, plan, state, log, monitor = run.settings, run.plan, run.state, run.log, run.monitor
    run.state = None  # the step donates it
    # Emulated devices share one pool of threads: a second step in flight can take those that the first one's all-reduce
    # is waiting for, and both wait for ever. On GPUs the host runs ahead.
    one_step_in_flight = jax.default_backend() == "cpu"
    begun = last_save = time.monotonic()
    done = run.start
    stop_after = StopAfter.parse(settings.stop_after)
    alone = run.peers.count == 1
    compiling = contextlib.ExitStack()  # until the first step is done
    scores = best = None  # of the step that was scored last
    scored, complete = done, True
    compiling.enter_context(dog.untimed("compiling, and the first batch"))
    account = run.account
    grace, every_minutes = settings.checkpoint.grace_seconds, settings.checkpoint.every_minutes

    def save(scores: dict[str, float] | None = None, best: dict[str, Any] | None = None, final: bool = False) -> None:
        meta = run.meta | {"examples": run.order.seen(done)} | ({"scores": scores} if scores else {})
        with account.measure("save"):
            run.checkpoints.save(state, done, meta, best=best, final=final)
        account.saved(done)

    mark_again(run, done, save)
    show, score = missed(run, done)
    if show or score:
        _, _, complete = inspect(run, stop, state, done, save, show=show, score=score)
    if done < plan.total_steps:
        monitor.note("compiling, and reading the first batch ...")
        account.switch("compile")
    while done < plan.total_steps:
        waited = run.batches.wait_seconds
        run.peers.doing(f"step {done + 1}, waiting for input")
        try:
            with account.measure("input_wait"), dog.phase("input"), stop.interruptible():
                batch = next(run.batches)
        except Stopped:
            pass
        except Exception:
            if not stop.wait(2.0):  # Ctrl-C and a scheduler's SIGTERM reach the workers too
                raise
        # Of several processes none begins a step before all have their batch: one that waits for ever for its own could not be
        # stopped, nor could the others, whose step never ends.
        # What the clock says is agreed on with the same message. A preview or an evaluation is not waited for when the grace
        # period ends: no more than such a period of training shall be at stake.
        show, score = due(plan.preview_steps, done + 1, plan.total_steps), due(plan.eval_steps, done + 1, plan.total_steps)
        limit = min(60 * every_minutes, grace if show or score else math.inf) if every_minutes else math.inf
        late = time.monotonic() - last_save >= limit or run.checkpoints.retry_due()
        with account.measure("input_wait"), dog.phase("the other processes"):
            agreed, timely = divmod(run.peers.agree(2 * stop.signal + late), 2)
        if agreed:  # not `stop.requested`: a signal that has come since is known to this process alone
            stop.request(agreed)
            break
        run.peers.doing(f"step {done + 1}")
        state, metrics = run.train_step(state, batch)
        done += 1
        log.add(done, metrics, run.batches.wait_seconds - waited)
        if one_step_in_flight:
            jax.block_until_ready(metrics)
        if done == run.start + 1:
            log.first_step_done()
            compiling.close()
            account.switch("step")
            monitor.note(f"first step after {time.monotonic() - begun:.1f} s")
        dog.step(done)
        at_log = done % settings.log.every_steps == 0
        if at_log:
            # Where the host waits for each step, as above, metrics are there and need not come late.
            (log.flush if one_step_in_flight else log.interval)()
            account.reached(done)
            run.snapshots.check()
            run.folder.require_lock()
        regular = bool(plan.checkpoint_steps) and done % plan.checkpoint_steps == 0
        snapshot = due(plan.snapshot_steps, done, plan.total_steps)
        if show or timely or regular or score or snapshot:
            quiet = contextlib.ExitStack()
            quiet.enter_context(dog.untimed("saving, previewing or evaluating"))
            log.flush()
            account.reached(done)
            pause = time.perf_counter()
            scores, best, scored = None, None, done
            if snapshot:
                with account.measure("save"):
                    run.snapshots.save(state.ema, done)
            if timely or regular or ((show or score) and done == plan.total_steps):
                save()
                last_save = time.monotonic()
            if show or score:
                scores, best, complete = inspect(run, stop, state, done, save, show=show, score=score)
                last_save = time.monotonic() if best else last_save
            log.paused(time.perf_counter() - pause)
            quiet.close()
        if (at_log or alone) and run.peers.agree(stop_after.reached(done - run.start, time.perf_counter() - run.begun)):
            break
    dog.__exit__()  # the grace period takes over
    log.flush()
    if not run.checkpoints.has(done):  # nothing was due, or that save failed
        save(*((scores, best) if scored == done else ()), final=True)
    with account.measure("save"):
        run.snapshots.close()
        run.checkpoints.wait()
    stop.saved()
    account.reached(done)
    memory = jax.local_devices()[0].memory_stats() or {}
    if "peak_bytes_in_use" in memory:
        monitor.note(f"peak device memory {memory['peak_bytes_in_use'] / 2**30:.1f} GiB")
    monitor.note(str(account))
    if done < plan.total_steps or not complete:
        reason = f"by {stop.name}" if stop.requested else f"after {settings.stop_after} (--config.stop_after)"
        monitor.note(f"stopped {reason} at step {done:,}; the same command continues from there")
        return stop.exit_code
    return 0
