"""What a run will be, in words, without running it: `jitjax train --print_config`."""

from __future__ import annotations

import json

import jax

from jitjax import data, flops, model, sharding
from jitjax import settings as settings_lib
from jitjax.data.shapes import CLASSES, PER_CLASS
from jitjax.plan import make_plan, resolve_num_classes
from jitjax.settings import Settings


def describe(settings: Settings) -> str:
    """The resolved settings and every number that follows from them, the data set and the devices that are there.

    Raises:
      UserError: a mistake in the settings or the data.
    """
    mesh = sharding.make_mesh(settings.mesh.data, settings.mesh.zero, settings.mesh.fsdp)
    if settings.data.synthetic:
        images, classes = PER_CLASS * len(CLASSES), len(CLASSES)
    else:
        dataset = data.open_dataset(settings.data.path, settings.data.image_size, **settings.data.reading())
        images, classes = len(dataset), dataset.num_classes
    num_classes = resolve_num_classes(settings.model.class_conditional, settings.model.num_classes, classes)
    geometry = model.geometry_of(settings.model, settings.data.image_size, num_classes)
    plan = make_plan(settings, images=images, tokens_per_image=geometry.tokens, devices=mesh.size)
    shapes = jax.eval_shape(model.init_fn(geometry), jax.random.key(0))
    parameters = sum(leaf.size for leaf in shapes.values())
    rows = {
        "devices": f"{sharding.describe(mesh)}, {jax.devices()[0].device_kind}",
        "data": f"{images:,} images of {classes or 'no'} classes",
        "parameters": f"{parameters:,}",
        "effective batch": f"{plan.global_batch:,} images = {settings.batch_size} x {mesh.size} devices x "
        f"{settings.optim.accumulation_steps} micro-batches",
        "steps per epoch": f"{plan.steps_per_epoch:,}",
        "total steps": f"{plan.total_steps:,} = {plan.total_steps / plan.steps_per_epoch:.1f} epochs, "
        f"{plan.total_steps * plan.global_batch:,} images, {plan.total_steps * plan.global_batch * geometry.tokens:.3g} tokens",
        "learning rate": f"{plan.peak_lr:.3g} after {plan.warmup_steps:,.0f} steps of warm-up, then {settings.optim.schedule}",
        "checkpoints": _every(plan.checkpoint_steps, settings.checkpoint.every_minutes),
        "previews": _every(plan.preview_steps, None),
        "tokens per image": f"{geometry.tokens} (and {geometry.context_length} context tokens)",
        "operations": f"{flops.train_flops(geometry) * plan.global_batch:.3g} per optimizer step",
        "state": f"{4 * parameters * (3 + len(settings.optim.ema_decays)) / 2**30:.2f} GiB (parameters, moments, EMAs)",
    }
    width = max(map(len, rows))
    return "\n".join(
        [json.dumps(settings_lib.to_dict(settings), indent=1), ""] + [f"{name:{width}}  {text}" for name, text in rows.items()]
    )


def _every(steps: int | None, minutes: float | None) -> str:
    parts = ([f"every {steps:,} steps"] if steps else []) + ([f"every {minutes:g} minutes"] if minutes else [])
    return ", ".join(parts) or "none"
