"""What a run will be, in words, without running it: `jitjax train --print_config`, and `--dry_run` with `jitjax.dry_run`."""

from __future__ import annotations

import dataclasses
import json
import math

import jax
import numpy as np
from jax.sharding import Mesh

from jitjax import data, flops, sampling, sharding, tables
from jitjax import settings as settings_lib
from jitjax.data.shapes import CLASSES, PER_CLASS
from jitjax.geometry import Geometry, geometry_of
from jitjax.plan import Plan, make_plan, resolve_num_classes
from jitjax.settings import Settings

RECIPE_BATCH, RECIPE_RATE = 1024, 2e-4  # images per optimizer step and learning rate of the published runs
RECIPE_NOISE = 256  # image size up to which the published noise scale is 1
MOST_SHOWN = 0.05  # share of a run's time for previews or scores above which they are worth a word


@dataclasses.dataclass(frozen=True)
class Outlook:
    """A run's settings with what follows from them, the data set and the devices."""

    settings: Settings
    images: int
    classes: int
    data: str  # in words
    geometry: Geometry
    plan: Plan
    mesh: Mesh


def look(settings: Settings, *, devices: list[jax.Device] | None = None, may_lack_data: bool = False) -> Outlook:
    """Open the data set and work out the plan.

    Args:
      devices: default all.
      may_lack_data: whether ImageNet's size stands in where no data set is named.

    Raises:
      UserError: a mistake in the settings or the data.
    """
    mesh = sharding.mesh_of(settings.mesh, devices)
    if settings.data.synthetic:
        images, classes, note = PER_CLASS * len(CLASSES), len(CLASSES), ""
    elif may_lack_data and not settings.data.path:
        images, classes = flops.IMAGENET_IMAGES, settings.model.num_classes or 1000
        note = " (ImageNet's, as --config.data.path is not set)"
    else:
        dataset = data.open_dataset(settings.data.path, settings.data.image_size, **settings.data.reading())
        images, classes, note = len(dataset), dataset.num_classes, ""
    num_classes = resolve_num_classes(settings.model.class_conditional, settings.model.num_classes, classes)
    geometry = geometry_of(settings.model, settings.data.image_size, num_classes)
    plan = make_plan(settings, images=images, tokens_per_image=geometry.tokens, devices=mesh.size)
    labels = f" of {classes:,} class{'' if classes == 1 else 'es'}" if settings.model.class_conditional else ""
    unused = ", whose labels an unconditional model does not use" if classes and not labels and not note else ""
    return Outlook(settings, images, classes, f"{images:,} images{labels}{unused}{note}", geometry, plan, mesh)


def describe(settings: Settings) -> str:
    """The resolved settings and every number that follows from them, the data set and the devices that are there.

    Raises:
      UserError: a mistake in the settings or the data.
    """
    outlook = look(settings)
    return f"{settings_text(settings)}\n\n{rows(outlook, jax.devices()[0].device_kind)}"


def settings_text(settings: Settings) -> str:
    """The settings as indented JSON."""
    return json.dumps(settings_lib.to_dict(settings), indent=1)


def rows(outlook: Outlook, device_kind: str) -> str:
    """The numbers, one a line."""
    settings, plan, geometry, mesh = outlook.settings, outlook.plan, outlook.geometry, outlook.mesh
    parameters, state = flops.parameters(geometry), flops.state_bytes(geometry, settings.optim)
    found = {
        "devices": f"{sharding.describe(mesh)}, {device_kind}",
        "data": outlook.data,
        "parameters": f"{parameters:,}",
        "effective batch": f"{plan.global_batch:,} images = {settings.batch_size} x {mesh.size} devices x "
        f"{settings.optim.accumulation_steps} micro-batches",
        "steps per epoch": f"{plan.steps_per_epoch:,}",
        "total steps": f"{plan.total_steps:,} = {plan.total_steps / plan.steps_per_epoch:.1f} epochs, "
        f"{plan.total_steps * plan.global_batch:,} images, {plan.total_steps * plan.global_batch * geometry.tokens:.3g} tokens",
        "optimizer": _optimizer(settings.optim),
        "learning rate": f"{plan.peak_lr:.3g} after {plan.warmup_steps:,.0f} steps of warm-up, then {settings.optim.schedule}",
        "checkpoints": _every(plan.checkpoint_steps, settings.checkpoint.every_minutes),
        "previews": _every(plan.preview_steps, None),
        "scores": _every(plan.eval_steps, None),
        "tokens per image": f"{geometry.tokens} (and {geometry.context_length} context tokens)",
        "operations": f"{flops.train_flops(geometry) * plan.global_batch:.3g} per optimizer step, "
        f"{flops.train_flops(geometry) * plan.global_batch * plan.total_steps:.3g} in all",
        "state": f"{tables.format_bytes(state)} over all devices (parameters, moments, EMAs)",
    }
    width = max(map(len, found))
    return "\n".join(f"{name:{width}}  {text}" for name, text in found.items())


def _optimizer(optim: settings_lib.Optimizer) -> str:
    if optim.name == "adamw":
        return "AdamW"
    others = "" if optim.muon_adaln else " but adaLN's"
    return f"Muon ({optim.muon_steps} Newton-Schulz steps) for the matrices of the blocks{others}, AdamW for the rest"


def _every(steps: int | None, minutes: float | None) -> str:
    parts = ([f"every {steps:,} steps"] if steps else []) + ([f"every {minutes:g} minutes"] if minutes else [])
    return ", ".join(parts) or "none"


# ---------------------------------------------------------------- what looks wrong


def warnings(outlook: Outlook) -> list[str]:
    """What a run may do and probably should not, a line each with the flag that changes it."""
    return [*_of_batch(outlook), *of_schedule(outlook.settings, outlook.plan), *_of_intervals(outlook), *_of_drawing(outlook)]


def _of_batch(outlook: Outlook) -> list[str]:
    settings, plan, devices = outlook.settings, outlook.plan, outlook.mesh.size
    found, size, parts = [], settings.batch_size, settings.optim.accumulation_steps
    if size < 8 and parts > 1:
        found.append(
            f"{parts} micro-batches of {size} images leave a card mostly idle: --config.batch_size={size * parts} "
            "--config.optim.accumulation_steps=1 is the same batch, if it fits"
        )
    for name, count, used in (
        ("preview.num_images", settings.preview.num_images, plan.preview_steps),
        ("eval.num_images", settings.eval.num_images, plan.eval_steps),
    ):
        if used and count < devices:
            found.append(f"--config.{name}={count} is fewer than the {devices} devices, which draw {devices} and drop the rest")
    if plan.steps_per_epoch < 10:
        found.append(
            f"an epoch is {plan.steps_per_epoch} steps: the effective batch of {plan.global_batch:,} is much of the data"
        )
    if outlook.geometry.image_size > RECIPE_NOISE and settings.diffusion.noise_scale == 1:
        size = outlook.geometry.image_size
        published = f"image_size / 256 = {size / RECIPE_NOISE:g}"
        found.append(f"--config.diffusion.noise_scale=1 at {size} px: published is {published}")
    return found


def of_schedule(settings: Settings, plan: Plan) -> list[str]:
    """Of learning rate and EMAs, and of options without an effect; what a run says at its start, too."""
    found = _without_effect(settings, plan)
    if plan.warmup_steps >= plan.total_steps:
        found.append(
            f"the warm-up takes {plan.warmup_steps:,.0f} steps and the run {plan.total_steps:,}: the rate never reaches "
            "its peak; lower --config.optim.warmup_steps or warmup_epochs"
        )
    relations = plan.peak_lr / RECIPE_RATE, plan.global_batch / RECIPE_BATCH
    if settings.optim.lr is None and (max(relations) < 1 / 4 or min(relations) > 4):
        relation = "below" if max(relations) < 1 else "above"
        found.append(
            f"the learning rate {plan.peak_lr:.2g} (blr x effective batch / 256) is far {relation} the recipe's "
            f"{RECIPE_RATE:.2g}, because the effective batch is {plan.global_batch:,} and not "
            f"{RECIPE_BATCH:,}: set --config.optim.lr, or another batch_size or accumulation_steps"
        )
    slow = slow_emas(settings, plan.total_steps)
    # Power functions are sampled where there are some. In a trial of a few steps 0.5, the least that is advised, is too long.
    if slow and not settings.optim.power_emas and plan.total_steps >= 4:
        shown = " and ".join(f"{decay:g}" for decay in slow)
        found.append(
            f"an EMA averages about 1 / (1 - decay) steps: with decay {shown} too many for {plan.total_steps:,}, samples "
            f"from it look untrained; e.g. --config.optim.ema_decays=({max(0.5, 1 - 10 / plan.total_steps):.4g},)"
        )
    return found


def _without_effect(settings: Settings, plan: Plan) -> list[str]:
    """Options that are set and do nothing, because another is not."""
    found, keep, sampler = [], settings.checkpoint, settings_lib.fields_of(settings_lib.Sampler)
    for group, needs, used in (
        ("eval", "eval.every_steps or every_epochs", plan.eval_steps),
        ("wandb", "wandb.enabled=True", settings.wandb.enabled),
    ):
        part = getattr(settings, group)
        # Without how images are drawn, which config files set for previews and scores together.
        own = {name: field for name, field in settings_lib.fields_of(type(part)).items() if name not in sampler}
        idle = [name for name, field in own.items() if getattr(part, name) != field.default]
        if idle and not used:
            shown = " and ".join(f"--config.{group}.{name}" for name in idle)
            found.append(f"{shown} without --config.{needs} has no effect")
    if settings.optim.min_lr and settings.optim.schedule == "constant":
        found.append(f"--config.optim.min_lr={settings.optim.min_lr:g} has no effect: set --config.optim.schedule=cosine")
    if keep.ema_every_steps and not settings.optim.power_emas:
        found.append("--config.checkpoint.ema_every_steps without --config.optim.power_emas has no effect")
    dropout = [name for name in ("attn_dropout", "proj_dropout") if getattr(settings.model, name)]
    if dropout and (depth := settings.model.depth) and depth < 4:
        shown = " and ".join(f"--config.model.{name}" for name in dropout)
        found.append(f"{shown} has no effect at --config.model.depth={depth}: it acts in the middle half of 4 or more")
    if keep.keep_every:
        regular = math.lcm(keep.keep_every, plan.checkpoint_steps or keep.keep_every)
        if plan.total_steps % keep.keep_every and (not plan.checkpoint_steps or regular > plan.total_steps):  # the end is saved
            found.append(
                f"--config.checkpoint.keep_every={keep.keep_every} retains nothing: no checkpoint is saved at a multiple of it "
                f"(every {plan.checkpoint_steps or '-'} steps, {plan.total_steps:,} in all)"
            )
    if settings.model.class_conditional and not settings.diffusion.label_drop_prob:
        for group, used in (("preview", plan.preview_steps), ("eval", plan.eval_steps)):
            if used and (scale := getattr(settings, group).cfg_scale) != 1:
                found.append(
                    f"--config.{group}.cfg_scale={scale:g} guides away from the null class, which is not trained with "
                    f"--config.diffusion.label_drop_prob=0: set --config.{group}.cfg_scale=1, or a probability such as 0.1"
                )
    return found


def slow_emas(settings: Settings, steps: int) -> list[float]:
    """The decays of EMAs that are still much of the first weights after `steps`."""
    optim = settings.optim
    return [] if optim.ema_warmup else [decay for decay in optim.ema_decays if decay < 1 and steps < 2 / (1 - decay)]


def _of_intervals(outlook: Outlook) -> list[str]:
    settings, plan, found = outlook.settings, outlook.plan, []
    for what, group, steps in (
        ("checkpoint", "checkpoint", plan.checkpoint_steps),
        ("preview", "preview", plan.preview_steps),
        ("score", "eval", plan.eval_steps),
    ):
        if steps and steps > plan.total_steps:
            found.append(
                f"a {what} every {steps:,} steps is never reached in {plan.total_steps:,} (the end has one): lower "
                f"--config.{group}.every_steps or every_epochs"
            )
    keep = settings.checkpoint
    if not plan.checkpoint_steps and not keep.every_minutes:
        found.append("nothing is saved before the end: set --config.checkpoint.every_minutes or every_steps")
    return found


def _of_drawing(outlook: Outlook) -> list[str]:
    """Previews and scores by their operations, which the card does about as fast as those of training."""
    settings, plan, geometry, found = outlook.settings, outlook.plan, outlook.geometry, []
    for what, part, steps in (("previews", settings.preview, plan.preview_steps), ("scores", settings.eval, plan.eval_steps)):
        if not steps:
            continue
        guided = settings.model.class_conditional and part.cfg_scale != 1
        drawn = part.num_images * drawing_passes(part.sampler(), guided=guided) * 2 * flops.forward_macs(geometry)
        trained = steps * plan.global_batch * flops.train_flops(geometry)
        if (share := drawn / (drawn + trained)) > MOST_SHOWN:
            name = "preview" if what == "previews" else "eval"
            found.append(
                f"{what} take about {share:.0%} of the time: lower --config.{name}.num_images or steps, or draw less often "
                f"than every {steps:,} steps"
            )
    return found


def drawing_passes(options: settings_lib.Sampler, *, guided: bool) -> float:
    """Forward passes of one image for each image that is drawn; where guidance acts a pass has two."""
    on = sampling.guided(sampling.time_grid(options.steps, options.grid)[:-1], options.interval) if guided else 0.0
    return sampling.network_passes(options.steps, options.method) * (1 + float(np.mean(on)))
