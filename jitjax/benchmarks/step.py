"""The train step alone, on random data that is already on the device: the `jitjax.step` that training runs.

    jitjax bench step --config configs/h200.py --config.optim.accumulation_steps=1 \\
        --config.model.class_conditional=True --kernels plain,fused --batch_sizes 64,256
    jitjax bench step --config configs/h200.py:finetune --devices 1,2,4,8 --forms zero,fsdp --accumulation_steps 1,2
    jitjax bench step --config configs/h200.py --xla_options "" --xla_options xla_gpu_enable_pdl=false

One JSON line a variant, all measured in one process, so that ratios between them come from one card in one state. On several
devices `share_of_one` is the rate over that of as many times one device, the first, where that was measured, too. `cards` has
clock, power and temperature of each: together they keep the pace of the slowest, and cards of one machine differ by percents.

`ms` is the time of one optimizer step: the median over `repeats` of (time of `steps` steps back to back) / steps. A card
that reaches its power limit lowers its clock within a second or two, so fewer than 60 steps flatter. Operations are the
model's own (`jitjax.flops.train_flops`); `mfu` is their rate over that of a large matmul measured here
(`matmul_tflops`, a burst; `mfu_sustained`: seconds of them, when the card is warm) and `mfu_datasheet` over the
datasheet's. Memory: `temporary_gib` is what XLA lays out for activations, `program_gib` adds state and batch;
`process_peak_gib` is the allocator's peak of the process so far, not of the variant.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import itertools
import math
import re
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from jitjax import cards, flops, from_settings, settings, sharding, step
from jitjax.benchmarks import card, common, profile
from jitjax.errors import UserError
from jitjax.from_settings import Setup
from jitjax.settings import Settings

Options = Mapping[str, bool | int | float | str]  # of XLA, by name


def run(args: argparse.Namespace) -> None:
    """Measure every variant, with the flags of `jitjax.bench`.

    Raises:
      UserError: a mistake in the configuration, or a variant that does not fit the card (after all were tried).
    """
    options = [_xla_options(text) for text in args.xla_options or [""]]  # mistakes first
    setups = [common.prepare(*variant) for variant in _list_variants(args)]
    peak = card.matmul_peak()
    common.say(f"matmul {peak['matmul_tflops']:,} TFLOP/s, sustained {peak['matmul_tflops_sustained']:,}")
    alone: dict[Any, float] = {}  # tokens/s of one device

    def measure_one(setup: Setup, given: Options) -> dict[str, Any]:
        config, mesh = setup.settings, setup.mesh
        folder = Path(args.profile) if args.profile else None
        if folder and len(setups) > 1:
            names = [config.kernels, config.batch_size]
            if args.devices or args.forms or args.accumulation_steps:
                form = "".join(f"{axis}{size}" for axis, size in mesh.shape.items() if size > 1)
                names += [config.optim.accumulation_steps, form or "one"]
            folder = folder / "_".join(map(str, names))
        if folder and len(options) > 1:
            folder = folder / (re.sub(r"[^\w.=]+", "_", ",".join(f"{name}={value}" for name, value in given.items())) or "none")
        how = dict(steps=args.steps, warmup=args.warmup, repeats=args.repeats)
        record = measure(setup, peak, folder=folder, xla_options=given, **how)
        what = config.kernels, config.batch_size, config.optim.accumulation_steps, *given.items()
        rate = record["tokens_per_second"]
        if mesh.size == 1:
            alone[what] = rate
        record["share_of_one"] = round(rate / mesh.size / alone[what], 4) if what in alone else None
        if mesh.size > 1 and what in alone:
            common.say(f"{sharding.describe(mesh)}: {record['share_of_one']:.1%} of {mesh.size} times one")
        return record

    records = measure_all(list(itertools.product(setups, options)), measure_one)
    shares = [record["profile_other"] for record in records if record.get("profile_other") is not None]
    if shares and max(shares) > args.max_other:
        raise UserError(
            f"{max(shares):.1%} of the profiled time belongs to no part of the program, --max_other={args.max_other:g}: "
            "put the operations that the table lists under a jax.named_scope of benchmarks/profile.py"
        )


def measure_all(
    variants: Sequence[tuple[Setup, Options]], measure_one: Callable[[Setup, Options], dict[str, Any]]
) -> list[dict[str, Any]]:
    """Measure and print each, and return the records; one that does not fit does not stop the others.

    Raises:
      UserError: at the end, if any was out of memory.
    """
    too_large, records = [], []
    for setup, options in variants:
        try:
            records.append(measure_one(setup, options))
            common.emit(records[-1])
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error) and "out of memory" not in str(error).lower():
                raise
            too_large.append(f"--config.batch_size={setup.settings.batch_size} (kernels {setup.kernels})")
            common.say(f"{too_large[-1]}: out of memory")
    if too_large:
        raise UserError(f"out of memory: {', '.join(too_large)}; use a smaller batch or --config.remat=dots or full")
    return records


def _list_variants(args: argparse.Namespace) -> list[tuple[Settings, int]]:
    """The settings, and the number of devices, of each variant that the flags of `jitjax.bench` name.

    Raises:
      UserError: a value that is not one, or devices that are not there.
    """
    config = common.load(args)
    kernels = args.kernels.split(",") if args.kernels else [config.kernels]
    sizes = _numbers("batch_sizes", args.batch_sizes, "64,256") or [config.batch_size]
    accumulation = _numbers("accumulation_steps", args.accumulation_steps, "1,2") or [config.optim.accumulation_steps]
    devices = _numbers("devices", args.devices, "1,2") or [jax.device_count()]
    forms = args.forms.split(",") if args.forms else [""]
    if wrong := [form for form in forms if form and form not in sharding.AXES]:
        raise UserError(f"--forms={args.forms}: {wrong[0]} is not one of {', '.join(sharding.AXES)}")
    if args.devices and jax.process_count() > 1:
        raise UserError(f"--devices={args.devices}: works in one process only, and this is one of {jax.process_count()}")
    if wrong := [count for count in devices if not 1 <= count <= jax.device_count()]:
        raise UserError(f"--devices={args.devices}: {wrong[0]} devices of the {jax.device_count()} that there are")

    def checked(field: str, value: Any) -> Any:
        return settings.fields()[field].check(value)

    variants = []
    for count, steps, size, kind in itertools.product(sorted(devices), accumulation, sizes, kernels):
        for form in forms if count > 1 else [forms[0]]:
            mesh = dict.fromkeys(sharding.AXES, 1) | {form: count} if form else {}
            changed = dataclasses.replace(
                config,
                batch_size=checked("batch_size", size),
                kernels=checked("kernels", kind),
                optim=dataclasses.replace(config.optim, accumulation_steps=checked("optim.accumulation_steps", steps)),
                mesh=dataclasses.replace(config.mesh, **mesh),
            )
            variants.append((changed, count))
    return variants


def _xla_options(text: str) -> dict[str, bool | int | float | str]:
    """The options in one `--xla_options`, "NAME=VALUE,...".

    Raises:
      UserError: an option without a value, or an option or value that this XLA does not know.
    """
    options = {}
    for part in filter(None, text.split(",")):
        name, equals, value = part.strip().removeprefix("--").partition("=")
        if not equals:
            raise UserError(f"--xla_options={text}: {part} has no value; give e.g. xla_gpu_enable_pdl=false")
        options[name] = _value(value)
    try:
        jax.jit(lambda: 0).lower().compile(options)
    except jax.errors.JaxRuntimeError as error:
        raise UserError(f"--xla_options={text}: {error}") from error
    return options


def _value(text: str) -> bool | int | float | str:
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    for kind in (int, float):
        with contextlib.suppress(ValueError):
            return kind(text)
    return text


def _numbers(flag: str, text: str, example: str) -> list[int]:
    try:
        return [int(number) for number in text.split(",")] if text else []
    except ValueError as error:
        raise UserError(f"--{flag}={text}: give whole numbers, e.g. {example}") from error


def measure(
    setup: Setup,
    peak: dict[str, float],
    *,
    steps: int,
    warmup: int,
    repeats: int,
    folder: Path | None = None,
    xla_options: Options | None = None,
) -> dict[str, Any]:
    """Compile the step and time it.

    Args:
      peak: of `card.matmul_peak`.
      steps, warmup, repeats: as the flags.
      folder: where a profile goes, or None.
      xla_options: to compile with; they replace the step's own of the same names (`jitjax.exchange.compiler_options`).

    Returns:
      The record to print. Times in ms and s, rates a second, memory in GiB (2^30 bytes).
    """
    config, geometry, mesh = setup.settings, setup.geometry, setup.mesh
    state, init_seconds = common.timed(lambda: common.random_state(setup))
    batch = common.random_batch(setup)
    train_step = from_settings.make_step(setup)
    begun = time.perf_counter()
    lowered = train_step.lower(state, batch)
    lower_seconds = time.perf_counter() - begun
    with CacheHits() as hits:
        begun = time.perf_counter()
        compiled = lowered.compile(dict(xla_options) if xla_options else None)
        compile_seconds = time.perf_counter() - begun
    (state, metrics), first_seconds = common.timed(lambda: compiled(state, batch))
    state, metrics, _ = run_steps(compiled, state, batch, warmup)
    times = []
    with card.CardMonitor(setup.mesh) as monitor:
        for _ in range(repeats):
            state, metrics, seconds = run_steps(compiled, state, batch, steps)
            times.append(seconds / steps)
    loss = float(metrics["train/loss"])
    if not math.isfinite(loss):
        common.say(f"warning: the loss is {loss}")
    summary = profile_steps(compiled, state, batch, folder) if folder else None

    samples = setup.plan.global_batch / statistics.median(times)
    tflops = samples * flops.train_flops(geometry) / mesh.size / 1e12
    sheet = cards.datasheet_flops(mesh.devices.flat[0].device_kind)
    record = {
        "benchmark": "step",
        **common.summary([seconds * 1e3 for seconds in times], "ms"),
        "steps": steps,
        "warmup": warmup,
        "repeats": repeats,
        "tokens_per_second": round(samples * geometry.tokens, 1),
        "samples_per_second": round(samples, 2),
        "tokens_per_second_per_device": round(samples * geometry.tokens / mesh.size, 1),
        "tflops_per_device": round(tflops, 4),
        **peak,
        "mfu": round(tflops / peak["matmul_tflops"], 4),
        "mfu_sustained": round(tflops / peak["matmul_tflops_sustained"], 4),
        "mfu_datasheet": round(tflops * 1e12 / sheet, 4) if sheet else None,
        **memory(compiled, mesh),
        "init_seconds": round(init_seconds, 2),
        "lower_seconds": round(lower_seconds, 2),
        "compile_seconds": round(compile_seconds, 2),
        "compiled_from_cache": hits.count > 0,
        "first_step_seconds": round(first_seconds, 3),
        "profile_other": summary and round(summary.other, 4),
        "loss": round(loss, 5) if math.isfinite(loss) else None,
        "cards": monitor.report(),
        **common.describe(setup),
    }
    record["compiler_options"] |= xla_options or {}
    common.say(
        f"{config.model.name} {setup.kernels}, batch {config.batch_size}: {record['ms']} ms a step, "
        f"{record['tokens_per_second']:,.0f} tokens/s, {record['tflops_per_device']} TFLOP/s a device, "
        f"mfu {record['mfu']:.1%}; compiled in {lower_seconds + compile_seconds:.1f} s; "
        f"{record['temporary_gib']} GiB of temporaries"
    )
    clocks = [one["sm_clock_mhz"] for one in record["cards"] or ()]
    if len(clocks) > 1:
        common.say(f"clocks of the cards: {', '.join(f'{mhz:,.0f}' for mhz in clocks)} MHz; all keep the pace of the slowest")
    return record


def run_steps(compiled: Any, state: step.TrainState, batch: step.Batch, steps: int) -> tuple[step.TrainState, dict, float]:
    """Steps back to back: (state, metrics of the last, seconds until everything is ready)."""
    metrics = {}
    begun = time.perf_counter()
    for _ in range(steps):
        state, metrics = compiled(state, batch)
        if not common.dispatch_ahead():
            jax.block_until_ready(metrics)
    jax.block_until_ready((state, metrics))
    return state, metrics, time.perf_counter() - begun


def profile_steps(compiled: Any, state: step.TrainState, batch: step.Batch, folder: Path) -> profile.Summary | None:
    """Trace a few steps into `folder`, beside the program (hlo.txt) and the table of kernels (table.txt). Donates the state."""
    folder.mkdir(parents=True, exist_ok=True)
    with jax.profiler.trace(str(folder)):
        run_steps(compiled, state, batch, profile.STEPS)
    text = compiled.as_text()
    (folder / "hlo.txt").write_text(text)
    summary = profile.summarise(profile.read_trace(folder), text)
    table = profile.table(summary, profile.STEPS)
    (folder / "table.txt").write_text(table)
    common.say(table)
    return summary


def memory(compiled: Any, mesh: jax.sharding.Mesh) -> dict[str, float | None]:
    """GiB of one device: what the compiled program asks for and what the allocator has seen."""
    gib = 2**30
    plan = compiled.memory_analysis()
    arguments = plan.argument_size_in_bytes + plan.output_size_in_bytes - plan.alias_size_in_bytes
    seen = next(iter(mesh.local_mesh.devices.flat)).memory_stats() or {}
    peak = seen.get("peak_bytes_in_use")
    return {
        "temporary_gib": round(plan.temp_size_in_bytes / gib, 3),
        "program_gib": round((arguments + plan.temp_size_in_bytes) / gib, 3),
        "process_peak_gib": peak and round(peak / gib, 3),
    }


class CacheHits:
    """Counts programs that JAX's compilation cache served while a `with` block runs."""

    count = 0

    def __enter__(self) -> CacheHits:
        jax.monitoring.register_event_listener(self._event)
        return self

    def __exit__(self, *_: Any) -> None:
        jax.monitoring.unregister_event_listener(self._event)

    def _event(self, name: str, **_: Any) -> None:
        self.count += name == "/jax/compilation_cache/cache_hits"
