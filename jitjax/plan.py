"""Numbers that follow from the settings, the data set and the devices: batches, optimizer steps, learning rate."""

from __future__ import annotations

import dataclasses
import math

from jitjax.errors import UserError
from jitjax.settings import INT32, RUN_LENGTHS, Settings


@dataclasses.dataclass(frozen=True)
class Plan:
    """Steps are optimizer steps."""

    global_batch: int  # images per optimizer step
    steps_per_epoch: int
    total_steps: int
    warmup_steps: float
    peak_lr: float
    checkpoint_steps: int | None
    preview_steps: int | None
    eval_steps: int | None
    snapshot_steps: int | None  # of power-function EMAs


def make_plan(settings: Settings, *, images: int, tokens_per_image: int, devices: int) -> Plan:
    """Turn epochs, images and tokens into optimizer steps.

    Args:
      images: size of the data set.
      tokens_per_image: image tokens, context tokens not counted.
      devices: of all processes together.

    Raises:
      UserError: fewer images than one effective batch, or more steps than a run can count.
    """
    accumulation = settings.optim.accumulation_steps
    global_batch = settings.batch_size * devices * accumulation
    if images < global_batch:
        fitting = images // (devices * accumulation)
        advice = f"use --config.batch_size={fitting} or less" if fitting else "use fewer devices or accumulation steps"
        raise UserError(
            f"--config.data.path holds {images} images, fewer than one effective batch of {global_batch} "
            f"(batch_size {settings.batch_size} x {devices} devices x {accumulation} accumulation steps): {advice}"
        )
    per_epoch = images // global_batch
    unit = next(name for name in RUN_LENGTHS if getattr(settings, name) is not None)
    length = getattr(settings, unit)
    total_steps = {
        "total_steps": length,
        "epochs": length * per_epoch,
        "total_images": length / global_batch,
        "total_tokens": length / (tokens_per_image * global_batch),
    }[unit]
    if total_steps > INT32:
        raise UserError(f"--config.{unit}={length:g} is {total_steps:.3g} optimizer steps: a run counts up to {INT32}")

    def steps(every_steps: int | None, every_epochs: float | None) -> int | None:
        return every_steps or (max(1, round(every_epochs * per_epoch)) if every_epochs else None)

    optim = settings.optim
    whole_steps = max(1, math.ceil(total_steps - 1e-9))
    return Plan(
        global_batch=global_batch,
        steps_per_epoch=per_epoch,
        total_steps=whole_steps,
        warmup_steps=optim.warmup_epochs * per_epoch if optim.warmup_steps is None else optim.warmup_steps,
        peak_lr=optim.lr if optim.lr is not None else optim.blr * global_batch / 256,
        checkpoint_steps=steps(settings.checkpoint.every_steps, settings.checkpoint.every_epochs),
        preview_steps=steps(settings.preview.every_steps, settings.preview.every_epochs),
        eval_steps=steps(settings.eval.every_steps, settings.eval.every_epochs),
        snapshot_steps=(settings.checkpoint.ema_every_steps or max(1, whole_steps // 32)) if optim.power_emas else None,
    )


def after_another_batch(plan: Plan, settings: Settings, shift: int) -> Plan:
    """The plan of a run of which `shift` images more than steps x batch were seen, as its batch was another one before: lengths
    that count images, of the run and of the warm-up, count these."""
    steps = shift / plan.global_batch
    total, warmup = plan.total_steps - math.floor(steps), max(0.0, plan.warmup_steps - steps)
    return dataclasses.replace(
        plan,
        total_steps=plan.total_steps if settings.total_steps is not None else total,
        warmup_steps=plan.warmup_steps if settings.optim.warmup_steps is not None else warmup,
    )


def fit_devices(settings: Settings, effective_batch: int, devices: int) -> Settings:
    """The settings with which `devices` make steps of the same `effective_batch`: other micro-batches, none larger than
    `batch_size`, and where the mesh does not fit, another one.

    Raises:
      UserError: the devices cannot share the batch.
    """
    images = effective_batch // devices
    if images * devices != effective_batch:
        fitting = ", ".join(str(n) for n in range(1, devices) if effective_batch % n == 0)
        raise UserError(f"{devices} devices cannot share an effective batch of {effective_batch}: use {fitting}")
    micro = max(n for n in range(1, min(images, settings.batch_size) + 1) if images % n == 0)
    mesh = settings.mesh
    asked = (mesh.data or 1) * (mesh.zero or 1) * mesh.fsdp
    open_axis = mesh.data is None or (mesh.zero is None and mesh.fsdp == 1)
    if devices % asked or (asked < devices and not open_axis):
        zero = mesh.zero and math.gcd(mesh.zero, devices)
        mesh = dataclasses.replace(mesh, data=None, zero=zero, fsdp=math.gcd(mesh.fsdp, devices))
    optim = dataclasses.replace(settings.optim, accumulation_steps=images // micro)
    return dataclasses.replace(settings, batch_size=micro, optim=optim, mesh=mesh)


def resolve_num_classes(class_conditional: bool, configured: int | None, found: int) -> int:
    """Classes of the model: the configured number, else the data set's (0 if unconditional).

    Args:
      found: classes of the data set; 0 for a flat folder.

    Raises:
      UserError: no labels where they are needed, or another number of classes than configured.
    """
    if not class_conditional:
        return configured or 0
    if found == 0:
        raise UserError(
            "--config.model.class_conditional=True needs one sub-folder per class, but the images of --config.data.path are "
            "read without labels: sort them into class folders, unset --config.data.labels if it is none, or train with "
            "--config.model.class_conditional=False"
        )
    if configured is not None and configured != found:
        raise UserError(
            f"--config.model.num_classes={configured} but --config.data.path has {found} class folders: "
            "leave num_classes unset to take the folder's count"
        )
    return found
