"""One optimizer step of a run, made again and looked at by layer and by image. What `jitjax replay` does.

A run's data order and randomness are functions of (seed, step, index of the image), so the step is the run's own: the state is
restored from the nearest whole checkpoint before it and brought there by the run's own training step. On as many devices of the
same kind the numbers are equal bit for bit, on others within rounding. Nothing is written to the workdir.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding

from jitjax import checkpoint, data, diffusion, exchange, from_settings, sharding, step
from jitjax import settings as settings_lib
from jitjax.anomalies import what_is_not_finite
from jitjax.data.order import ExampleOrder
from jitjax.errors import UserError
from jitjax.plan import after_another_batch, fit_devices, resolve_num_classes
from jitjax.settings import Settings

LOGGED = ("train/loss", "train/grad_norm", "train/learning_rate")


def replay(
    workdir: str | Path,
    number: int,
    *,
    data_path: str = "",
    dtype: str = "",
    kernel: str = "",
    say: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Make optimizer step `number` (from 1) of the run in `workdir` again.

    Args:
      data_path: where the run's data set lies now; default where it lay.
      dtype, kernel: compute in another type, or with another implementation, than the run did (`dtype`, `kernels`).
      say: takes lines about what is being done.

    Returns:
      Plain values: "step"; "from", the checkpoint's step (0: the run's beginning); "metrics" of the step; "logged", what
      metrics.jsonl has for it, or None; "activations", "layers" and "images", a list of dictionaries each: see `report`.
      Gradients are the mean over all images, also of those whose gradient is not finite, before clipping.

    Raises:
      UserError: no run there, one with a loss of its own, no such step, or data or devices that are not those of the run.
    """
    workdir = checkpoint.workdir_of(workdir)
    settings, facts = configuration(workdir)
    if facts.get("objective"):
        raise UserError(f"{workdir} was trained with a loss of its own ({facts['objective']}), which replay does not have")
    configured = settings
    settings = dataclasses.replace(settings, dtype=dtype or settings.dtype, kernels=kernel or settings.kernels)
    available, batch = jax.local_devices(), facts["effective_batch"]
    devices = available[: max(n for n in range(1, len(available) + 1) if batch % n == 0)]
    settings = fit_devices(settings, batch, len(devices))
    mesh = sharding.mesh_of(settings.mesh, devices)
    path = data_path or (str(workdir / "shapes") if settings.data.synthetic else settings.data.path)
    if not path:
        raise UserError(f"{workdir} was trained on images that a script gave it, which replay does not have: see --data_path")
    dataset = data.open_dataset(path, settings.data.image_size, **settings.data.reading())
    conditional = settings.model.class_conditional
    num_classes = resolve_num_classes(conditional, settings.model.num_classes, dataset.num_classes)
    setup = from_settings.setup(settings, images=len(dataset), num_classes=num_classes, mesh=mesh)
    plan = setup.plan
    process = diffusion.from_config(settings_lib.to_dict(settings))
    last = facts.get("planned_steps", plan.total_steps)
    if not 1 <= number <= last:
        raise UserError(f"--step {number}: the run has steps 1 to {last}")

    # ---------------------------------------------------------------- the state before the step
    like = from_settings.abstract_state(settings, setup.geometry, mesh)
    start, order = whole_before(workdir, number), ExampleOrder(settings.seed, len(dataset), plan.global_batch)
    if known := start or whole_after(workdir, number):  # without either there is nothing to compare with
        meta = checkpoint.read_meta(workdir / checkpoint.DIRECTORY / str(known))
        if meta.get("data") and meta["data"] != dataset.fingerprint:
            later = whole_after(workdir, number) if start else 0  # a start may have gone on with other images
            made = checkpoint.read_meta(workdir / checkpoint.DIRECTORY / str(later)) if later else {}
            if made.get("data") != dataset.fingerprint:
                raise UserError(f"{path} does not hold the images that the run was trained on: name them with --data_path")
            say(f"the images changed between the checkpoints {start:,} and {later:,} and are taken as they were at the latter")
        changes = settings_lib.differing_fields(meta.get("config", {}), configured)
        shift = meta.get("examples", order.seen(known)) - order.seen(known)
        if shift and start:
            order = dataclasses.replace(order, shift=shift)
            setup = dataclasses.replace(setup, plan=after_another_batch(plan, settings, shift))
        elif shift:
            changes.append(f"effective batch: {meta['examples'] / known:g} -> {plan.global_batch}")
        if changes:
            say(f"the configuration changed after checkpoint {known:,} and is taken as it is now: {'; '.join(changes)}")
    elif facts.get("images_per_epoch", len(dataset)) != len(dataset):
        raise UserError(f"{path} does not hold the images that the run was trained on: name them with --data_path")
    if start:
        state = checkpoint.restore(workdir / checkpoint.DIRECTORY / str(start), like)
    else:
        state, _ = from_settings.first_state(setup, process, tuple(dataset.class_names))
    whence = f"checkpoint {start:,}" if start else "the run's beginning"
    say(f"from {whence}, {number - start:,} step{'s' if number - start > 1 else ''} to step {number:,}; {dataset.summary}")
    host = data.make_iterator(
        dataset,
        seed=settings.seed,
        global_batch=plan.global_batch,
        start_example=order.seen(start),
        flip=settings.data.flip,
        max_bad_fraction=settings.data.max_bad_fraction,
    )
    batches = data.to_device(host, NamedSharding(mesh, sharding.BATCH))
    train_step = from_settings.make_step(setup)
    try:
        for batch in itertools.islice(batches, number - 1 - start):
            state, _ = jax.block_until_ready(train_step(state, batch))
        batch = next(batches)
    finally:
        batches.close()

    # ---------------------------------------------------------------- the step itself
    examine = make_examine(settings, from_settings.make_loss(settings, setup.geometry, setup.ops), like, mesh)
    grads, images, activations = examine(state, batch)
    before = {"param": state.params, "grad": grads}
    layers = {what: _layers(tree) for what, tree in before.items()}
    old = jax.tree.map(jnp.copy, state.params)  # the step donates the state
    state, on_device = train_step(state, batch)
    moved = _layers(jax.tree.map(jnp.subtract, state.params, old))
    metrics = {name: float(value) for name, value in on_device.items()}
    host_images, labels = jax.device_get((images, batch["label"]))
    names = data.names(dataset, order.batch(number), host.bad_files)
    return {
        "step": number,
        "from": start,
        "metrics": metrics,
        "logged": _logged(workdir, number),
        "activations": _activations(activations),
        "layers": [
            {"layer": name, **{f"{what}_{k}": v for what in layers for k, v in layers[what][name].items()}}
            | {"update_ratio": moved[name]["norm"] / norm if (norm := layers["param"][name]["norm"]) else None}
            for name in moved
        ],
        "images": [
            {**name, "label": int(label), **{key: value[i].item() for key, value in host_images.items()}}
            for i, (name, label) in enumerate(zip(names, labels, strict=True))
        ],
    }


def configuration(workdir: Path) -> tuple[Settings, dict[str, Any]]:
    """The settings of the run in `workdir`, and the facts that config.json states beside them.

    Raises:
      UserError: there is no run.
    """
    try:
        saved = json.loads((workdir / "config.json").read_text())
        if not isinstance(saved["effective_batch"], int):
            raise ValueError("effective_batch is no number")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{workdir}: config.json cannot be read ({checkpoint.reason_of(error)}): give a run's workdir"
        ) from None
    return settings_lib.from_mapping(saved, ignore_unknown=True), saved


def whole_before(workdir: Path, number: int) -> int:
    """The newest whole checkpoint that step `number` can be made from; 0 where there is none."""
    folder, run = workdir / checkpoint.DIRECTORY, (checkpoint.read_run(workdir) or {}).get("run")
    for candidate in reversed([known for known in checkpoint.steps_in(folder) if known < number]):
        reason = checkpoint.defect(folder / str(candidate), run)
        if reason is None:
            return candidate
        checkpoint.report_skipped(folder / str(candidate), reason)
    return 0


def whole_after(workdir: Path, number: int) -> int:
    """The first whole checkpoint from step `number` on; 0 where there is none."""
    folder, run = workdir / checkpoint.DIRECTORY, (checkpoint.read_run(workdir) or {}).get("run")
    later = (known for known in checkpoint.steps_in(folder) if known >= number)
    return next((known for known in later if checkpoint.defect(folder / str(known), run) is None), 0)


def make_examine(settings: Settings, loss: Callable[..., jax.Array], like: step.TrainState, mesh: Mesh) -> Callable[..., Any]:
    """Jitted (state, batch) -> (gradients, {"loss", "t", "label_dropped"}: (B,), {activation: {"max", "nonfinite"}}).

    The computation of the training step, but nothing that is not finite is left out. Each activation's values are one a
    device and micro-batch.
    """
    specs, comm_dtype = sharding.specs(like, mesh), jnp.dtype(settings.mesh.comm_dtype)
    micro_batches = settings.optim.accumulation_steps

    def examine(state: step.TrainState, batch: step.Batch):
        local = batch["label"].shape[0]
        keys = step.image_keys(settings.seed, state.step, mesh, local)
        scale = state.loss_scale["scale"]

        def objective(params, images, labels, keys):
            seen: dict[str, dict[str, jax.Array]] = {}
            each = loss(params, images, labels, keys, observe=lambda name, x: seen.update({name: _summary(x)}))
            return jnp.mean(each) * scale, (each, seen)

        params = sharding.gather(state.params, specs.params, jnp.float32)

        def micro_step(total, part):
            (_, found), grads = jax.value_and_grad(objective, has_aux=True)(params, *part)
            return jax.tree.map(lambda a, b: a + b.astype(jnp.float32) / scale, total, grads), found

        parts = jax.tree.map(
            lambda a: a.reshape(micro_batches, local // micro_batches, *a.shape[1:]), (batch["image"], batch["label"], keys)
        )
        zeros = jax.tree.map(lambda p: jnp.zeros(p.shape, jnp.float32), params)
        total, (each, seen) = jax.lax.scan(micro_step, zeros, parts)
        over = sharding.split_over(mesh)
        axes = {name: sharding.split_axis(name, grad.shape, mesh.shape[over]) for name, grad in total.items()}
        grads, _ = exchange.reduce(total, axes, mesh, comm_dtype)
        grads = jax.tree.map(lambda grad: grad / (micro_batches * mesh.size), grads)
        t, _, dropped, _ = jax.vmap(lambda key: step.randomness(key, batch["image"].shape[1:], settings.diffusion))(keys)
        return grads, {"loss": each.reshape(local), "t": t, "label_dropped": dropped}, seen

    batch = sharding.BATCH
    sharded = jax.shard_map(
        examine, mesh=mesh, in_specs=(specs, batch), out_specs=(specs.params, batch, batch), check_vma=False
    )
    return jax.jit(sharded)


def _summary(x: jax.Array) -> dict[str, jax.Array]:
    """Largest absolute value of the finite numbers, and the count of the others."""
    x = jax.lax.stop_gradient(x).astype(jnp.float32)
    finite = jnp.isfinite(x)
    return {"max": jnp.max(jnp.where(finite, jnp.abs(x), 0)), "nonfinite": jnp.sum(~finite)}


@jax.jit
def _statistics(x: jax.Array) -> dict[str, jax.Array]:
    return {"square": jnp.sum(jnp.square(jnp.where(jnp.isfinite(x), x, 0))), **_summary(x)}


def _layers(tree: Mapping[str, jax.Array]) -> dict[str, dict[str, Any]]:
    """By layer, e.g. "blocks.0.attn.qkv" for kernel and bias: "norm" and "max" of the finite numbers, "nonfinite"."""
    found: dict[str, list[dict[str, Any]]] = {}
    for name, value in tree.items():
        # One after the other: emulated devices that reduce many arrays at once can wait for each other for ever.
        found.setdefault(name.rpartition(".")[0] or name, []).append(jax.device_get(_statistics(value)))
    return {
        layer: {
            "norm": math.sqrt(sum(float(part["square"]) for part in parts)),
            "max": max(float(part["max"]) for part in parts),
            "nonfinite": sum(int(part["nonfinite"]) for part in parts),
        }
        for layer, parts in found.items()
    }


def _activations(found: Mapping[str, Mapping[str, jax.Array]]) -> list[dict[str, Any]]:
    found = jax.device_get(found)
    depth = [int(name.split(".")[1]) for name in found if name.startswith("blocks.")]
    order = ["embed", *(f"blocks.{i}.{part}" for i in range(max(depth) + 1) for part in ("attn", "mlp")), "final"]
    return [
        {"at": name, "max": float(np.max(found[name]["max"])), "nonfinite": int(np.sum(found[name]["nonfinite"]))}
        for name in order
    ]


def _logged(workdir: Path, number: int) -> dict[str, Any] | None:
    """The line of metrics.jsonl about one step."""
    try:
        with open(workdir / "metrics.jsonl") as file:
            for line in file:
                if line.startswith(f'{{"step": {number},'):
                    return json.loads(line)
    except (OSError, ValueError):
        pass
    return None


# ---------------------------------------------------------------- in words


def report(record: Mapping[str, Any], worst: int = 8) -> list[str]:
    """What `replay` returned as lines: the verdict, the tables of activations and layers, the `worst` images."""
    metrics, logged, images = record["metrics"], record["logged"], record["images"]
    shown = ", ".join(f"{name.removeprefix('train/')} {metrics[name]:.9g}" for name in LOGGED)
    lines = [f"step {record['step']:,}: {shown}"]
    if logged is None:
        lines.append("metrics.jsonl does not have this step")
    elif all(_same(metrics[name], logged.get(name)) for name in LOGGED):
        lines.append("metrics.jsonl has the same numbers")
    else:
        lines.append("metrics.jsonl has " + ", ".join(f"{n.removeprefix('train/')} {logged.get(n)}" for n in LOGGED))
    lines += _verdict(record)

    lines += ["", f"{'activations':28} {'max':>10} {'not finite':>12}"]
    lines += [f"{row['at']:28} {row['max']:10.3g} {_count(row['nonfinite']):>12}" for row in record["activations"]]
    numbers = ("param_norm", "param_max", "grad_norm", "grad_max")
    head = "".join(f"{name.replace('_', ' '):>11}" for name in numbers)
    lines += ["", f"{'layer':28}{head} {'not finite':>12} {'update/param':>13}"]
    for row in record["layers"]:
        ratio = "" if row["update_ratio"] is None else f"{row['update_ratio']:.2e}"
        bad = row["grad_nonfinite"] + row["param_nonfinite"]
        lines.append(f"{row['layer']:28}" + "".join(f"{row[n]:11.3g}" for n in numbers) + f" {_count(bad):>12} {ratio:>13}")

    ranked = sorted(images, key=lambda row: (math.isfinite(row["loss"]), -row["loss"]))
    lines += ["", f"worst {min(worst, len(ranked))} of {len(ranked)} images", f"{'loss':>11} {'t':>7} {'label':>7}  file"]
    for row in ranked[:worst]:
        label = "null" if row["label_dropped"] else str(row["label"])
        replaced = f" (replaced by the next: {row['replaced']})" if "replaced" in row else ""
        lines.append(f"{row['loss']:11.4g} {row['t']:7.4f} {label:>7}  {row['index']} {row['file']}{replaced}")
    return lines


def _verdict(record: Mapping[str, Any]) -> list[str]:
    images, layers = record["images"], record["layers"]
    bad_images = sum(not math.isfinite(row["loss"]) for row in images)
    bad_grads, bad_params = (sum(row[f"{what}_nonfinite"] > 0 for row in layers) for what in ("grad", "param"))
    first = next((row["at"] for row in record["activations"] if row["nonfinite"]), None)
    parts = {
        f"the loss of {bad_images} of {len(images)} images": bad_images,
        f"activations, first at {first}": first,
        f"gradients of {bad_grads} of {len(layers)} layers": bad_grads,
        f"parameters of {bad_params} of {len(layers)} layers": bad_params,
    }
    found = "; ".join(text for text, present in parts.items() if present)
    if not found:
        return ["everything is finite"]
    left_out = what_is_not_finite(record["metrics"])
    if not left_out:  # in activations whose result does not count, say
        return [f"not finite: {found}. The step was made"]
    done = "changed nothing" if left_out in ("loss", "gradient") else f"was made without the {left_out}"
    return [f"not finite: {found}. The step {done}"]


def _same(value: float, logged: float | None) -> bool:
    return value == logged or (logged is None and not math.isfinite(value))


def _count(number: int) -> str:
    return f"{number:,}" if number else "-"
