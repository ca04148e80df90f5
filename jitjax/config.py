"""The configuration: every field with its default, the checks on it, and the numbers that follow from it.

Config files are plain `get_config()` functions that start from `default_config()`. Fields marked "unset" are None until
a config file or the command line sets them; `--config.field=None` unsets one again.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict, config_dict

from jitjax.errors import UserError

RUN_LENGTHS = ("epochs", "total_steps", "total_images", "total_tokens")

# Fields that may differ between the starts of one run: they change where, how fast and how loudly it runs, not what it
# computes. (Devices count into the effective batch, which is compared by itself.)
FREE_FIELDS = (
    *("log", "wandb", "mesh", "kernels", "remat", "checkpoint", "preview", "compilation_cache"),
    *("data.path", "data.num_workers", "data.allow_changed", "data.max_bad_fraction"),  # the data has its own fingerprint
)


def default_config() -> ConfigDict:
    """All fields. Sizes are in pixels or images, `optim.lr` is the peak learning rate, times are in the named unit."""
    unset = config_dict.placeholder
    c = ConfigDict()
    c.seed = 0
    c.batch_size = 64  # images per device and micro-batch
    # Run length: exactly one of the four. (float: 1e12 tokens is a normal value.)
    c.epochs = unset(float)
    c.total_steps = unset(int)
    c.total_images = unset(float)
    c.total_tokens = unset(float)  # image tokens: (image_size / patch)^2 an image
    c.dtype = "bfloat16"  # matrix products and attention: bfloat16 | float32 | float16
    c.kernels = "auto"  # auto | fused | plain
    c.remat = "none"  # none | dots | full: what the backward pass computes again to save memory
    c.init_from = ""  # workdir or checkpoint whose weights to start from (optimizer and schedule start afresh)
    c.prediction = "x"  # what the network outputs: x | epsilon | v
    c.loss = "v"  # the space in which the error is measured: x | epsilon | v
    c.compilation_cache = "auto"  # directory of compiled programs; "auto": the user's cache on GPU; "": none

    c.data = ConfigDict()
    c.data.path = ""
    c.data.synthetic = ""  # "shapes": the program draws its own data set into the workdir
    c.data.image_size = 64
    c.data.num_workers = 8  # decoding processes; 0: threads of the main process
    c.data.flip = True
    c.data.exif_rotate = False  # the published loader does not
    c.data.max_bad_fraction = 0.01
    c.data.allow_changed = False  # go on although the data set differs from the one the run began with

    c.model = ConfigDict()
    c.model.name = "JiT-B/4"
    c.model.class_conditional = False
    c.model.num_classes = unset(int)  # unset: as many as the folder has
    for name in ("depth", "width", "heads", "bottleneck", "context_length", "context_start"):
        c.model[name] = unset(int)  # unset: the named size's own
    c.model.mlp_ratio = 4.0
    c.model.attn_dropout = 0.0
    c.model.proj_dropout = 0.0

    c.diffusion = ConfigDict()
    c.diffusion.p_mean = -0.8  # t = sigmoid(N(p_mean, p_std))
    c.diffusion.p_std = 0.8
    c.diffusion.noise_scale = 1.0  # published: image_size / 256 from 256 px on
    c.diffusion.t_eps = 0.05  # training's lower clip of 1 - t; sampling has its own, preview.t_eps
    c.diffusion.label_drop_prob = 0.1

    c.optim = ConfigDict()
    c.optim.accumulation_steps = 1
    c.optim.lr = unset(float)  # peak; unset: blr x effective batch / 256
    c.optim.blr = 5e-5
    c.optim.min_lr = 0.0  # end of the cosine
    c.optim.warmup_epochs = 5.0
    c.optim.warmup_steps = unset(int)  # set: replaces warmup_epochs
    c.optim.schedule = "constant"  # after the warm-up: constant | cosine
    c.optim.weight_decay = 0.0
    c.optim.b1 = 0.9
    c.optim.b2 = 0.95
    c.optim.eps = 1e-8
    c.optim.clip_norm = 0.0  # 0: no clipping by global norm
    c.optim.ema_decays = (0.9999, 0.9996)

    c.mesh = ConfigDict()
    c.mesh.data = unset(int)  # unset: all devices / fsdp
    c.mesh.fsdp = 1
    c.mesh.comm_dtype = "float32"  # type in which gradients (and gathered weights) cross devices

    c.checkpoint = ConfigDict()
    c.checkpoint.every_steps = unset(int)
    c.checkpoint.every_epochs = unset(float)
    c.checkpoint.every_minutes = 15.0
    c.checkpoint.keep_last = 3
    c.checkpoint.keep_every = unset(int)  # checkpoints whose step is a multiple are kept for good

    c.preview = ConfigDict()
    c.preview.every_steps = unset(int)
    c.preview.every_epochs = unset(float)
    c.preview.num_images = 64
    c.preview.steps = 50
    c.preview.method = "heun"
    c.preview.cfg_scale = 2.9
    c.preview.interval = (0.1, 1.0)
    c.preview.t_eps = 0.05
    c.preview.ema_decay = unset(float)  # unset: the first of optim.ema_decays

    c.log = ConfigDict()
    c.log.every_steps = 100

    c.wandb = ConfigDict()
    c.wandb.enabled = False
    c.wandb.project = "jitjax"
    c.wandb.name = unset(str)
    c.wandb.mode = "online"  # online | offline
    return c


def validate(config: ConfigDict) -> None:
    """Check what can be checked without looking at data or devices.

    Raises:
      UserError: one line that names the flag, its value and what is allowed.
    """

    def one_of(field: str, allowed: tuple[str, ...]) -> None:
        if _get(config, field) not in allowed:
            raise UserError(f"--config.{field}={_get(config, field)!r}: use one of {', '.join(allowed)}")

    def at_least(field: str, low: float, strict: bool = False) -> None:
        value = _get(config, field)
        if value is not None and not (value > low if strict else value >= low):
            raise UserError(f"--config.{field}={value}: must be {'more than' if strict else 'at least'} {low}")

    def fraction(field: str, value: float, below: bool = False) -> None:
        if not isinstance(value, int | float) or not 0 <= value <= 1 or (below and value == 1):
            raise UserError(f"--config.{field}={value}: must be a number in [0, 1{')' if below else ']'}")

    one_of("dtype", ("bfloat16", "float32", "float16"))
    one_of("kernels", ("auto", "fused", "plain"))
    one_of("remat", ("none", "dots", "full"))
    one_of("prediction", ("x", "epsilon", "v"))
    one_of("loss", ("x", "epsilon", "v"))
    one_of("optim.schedule", ("constant", "cosine"))
    one_of("mesh.comm_dtype", ("float32", "bfloat16"))
    one_of("preview.method", ("heun", "euler"))
    one_of("wandb.mode", ("online", "offline"))
    one_of("data.synthetic", ("", "shapes"))
    for field in ("batch_size", "data.image_size", "optim.accumulation_steps", "mesh.fsdp", "mesh.data"):
        at_least(field, 1)
    for field in ("checkpoint.every_steps", "preview.every_steps", "log.every_steps", "checkpoint.keep_every"):
        at_least(field, 1)
    for field in ("checkpoint.keep_last", "preview.num_images", "preview.steps", "model.num_classes"):
        at_least(field, 1)
    for field in (
        "optim.lr",
        "optim.blr",
        "checkpoint.every_epochs",
        "checkpoint.every_minutes",
        "preview.every_epochs",
    ):
        at_least(field, 0, strict=True)
    for field in ("diffusion.p_std", "diffusion.noise_scale", "diffusion.t_eps", "preview.t_eps", "optim.eps"):
        at_least(field, 0, strict=True)
    for field in ("data.num_workers", "optim.warmup_epochs", "optim.warmup_steps", "optim.weight_decay", "seed"):
        at_least(field, 0)
    for field in ("optim.clip_norm", "optim.min_lr", "model.context_length", "model.context_start"):
        at_least(field, 0)
    for field in ("diffusion.label_drop_prob", "data.max_bad_fraction"):
        fraction(field, _get(config, field))
    for field in ("model.attn_dropout", "model.proj_dropout"):
        fraction(field, _get(config, field), below=True)
    interval = config.preview.interval
    if len(interval) != 2 or not all(isinstance(end, int | float) for end in interval):
        raise UserError(f"--config.preview.interval={config.preview.interval}: give two times, e.g. (0.1,1.0)")
    decays = config.optim.ema_decays
    for decay in decays:
        fraction("optim.ema_decays", decay)
    if not decays:
        raise UserError("--config.optim.ema_decays is empty: give at least one decay, e.g. (0.9999,)")
    if config.preview.ema_decay is not None and config.preview.ema_decay not in decays:
        raise UserError(f"--config.preview.ema_decay={config.preview.ema_decay}: not among optim.ema_decays {decays}")
    set_lengths = [name for name in RUN_LENGTHS if config[name]]
    if len(set_lengths) != 1:
        given = ", ".join(f"--config.{name}={config[name]}" for name in set_lengths) or "none is set"
        raise UserError(f"exactly one run length of {', '.join(RUN_LENGTHS)} must be set: {given}; unset others with =None")
    if config[set_lengths[0]] < 0:
        raise UserError(f"--config.{set_lengths[0]}={config[set_lengths[0]]}: must be more than 0")


@dataclasses.dataclass(frozen=True)
class Plan:
    """Numbers that follow from the configuration, the data set and the devices. Steps are optimizer steps."""

    global_batch: int  # images per optimizer step
    steps_per_epoch: int
    total_steps: int
    warmup_steps: float
    peak_lr: float
    checkpoint_steps: int | None
    preview_steps: int | None
    num_classes: int


def make_plan(config: ConfigDict, *, images: int, folder_classes: int, tokens_per_image: int, devices: int) -> Plan:
    """Turn epochs, images and tokens into optimizer steps.

    Args:
      images, folder_classes: size of the data set; classes is 0 for a flat folder.
      tokens_per_image: image tokens, context tokens not counted.
      devices: of all processes together.

    Raises:
      UserError: labels that do not fit, or fewer images than one effective batch.
    """
    num_classes = resolve_num_classes(config, folder_classes)
    global_batch = config.batch_size * devices * config.optim.accumulation_steps
    if images < global_batch:
        fitting = images // (devices * config.optim.accumulation_steps)
        advice = f"use --config.batch_size={fitting} or less" if fitting else "use fewer devices or accumulation steps"
        raise UserError(
            f"--config.data.path holds {images} images, fewer than one effective batch of {global_batch} "
            f"(batch_size {config.batch_size} x {devices} devices x {config.optim.accumulation_steps} accumulation "
            f"steps): {advice}"
        )
    per_epoch = images // global_batch
    total_steps = {
        "total_steps": lambda n: n,
        "epochs": lambda n: n * per_epoch,
        "total_images": lambda n: n / global_batch,
        "total_tokens": lambda n: n / (tokens_per_image * global_batch),
    }[next(name for name in RUN_LENGTHS if config[name])]
    length = next(config[name] for name in RUN_LENGTHS if config[name])
    epochs_to_steps = lambda epochs: max(1, round(epochs * per_epoch)) if epochs else None  # noqa: E731
    lr = config.optim.lr
    warmup = config.optim.warmup_steps
    return Plan(
        global_batch=global_batch,
        steps_per_epoch=per_epoch,
        total_steps=max(1, math.ceil(total_steps(length) - 1e-9)),
        warmup_steps=config.optim.warmup_epochs * per_epoch if warmup is None else warmup,
        peak_lr=lr if lr is not None else config.optim.blr * global_batch / 256,
        checkpoint_steps=config.checkpoint.every_steps or epochs_to_steps(config.checkpoint.every_epochs),
        preview_steps=config.preview.every_steps or epochs_to_steps(config.preview.every_epochs),
        num_classes=num_classes,
    )


def resolve_num_classes(config: ConfigDict, folder_classes: int) -> int:
    """Rows of the label table without the null row: the configured number, else the folder's (0 if unconditional)."""
    wanted = config.model.num_classes
    if not config.model.class_conditional:
        return wanted or 0
    if folder_classes == 0:
        raise UserError(
            "--config.model.class_conditional=True needs one sub-folder a class, but --config.data.path is a flat folder "
            "of images: sort the images into class folders or train with --config.model.class_conditional=False"
        )
    if wanted is not None and wanted != folder_classes:
        raise UserError(
            f"--config.model.num_classes={wanted} but --config.data.path has {folder_classes} class folders: "
            "leave num_classes unset to take the folder's count"
        )
    return folder_classes


def to_dict(config: ConfigDict) -> dict[str, Any]:
    """Plain JSON-able dictionary (tuples become lists)."""

    def plain(value):
        if isinstance(value, ConfigDict | Mapping):
            return {key: plain(item) for key, item in value.items()}
        return [plain(item) for item in value] if isinstance(value, tuple | list) else value

    return plain(config)


def from_dict(saved: Mapping[str, Any]) -> ConfigDict:
    """Inverse of `to_dict` for a config that was saved by this or an earlier version: unknown fields are left out."""
    config = default_config()

    def fill(target: ConfigDict, source: Mapping[str, Any]) -> None:
        for key, value in source.items():
            if key not in target:
                continue
            if isinstance(target[key], ConfigDict):
                fill(target[key], value)
            else:
                with target.ignore_type():
                    target[key] = tuple(value) if isinstance(value, list) else value

    fill(config, saved)
    return config


def differing_fields(old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Dotted names with both values of the fields that change what a run computes and differ, e.g. "seed: 0 -> 1"."""
    found = []
    for key in sorted({*old, *new}):
        name = prefix + key
        if name in FREE_FIELDS:
            continue
        a, b = old.get(key), new.get(key)
        if isinstance(a, Mapping) and isinstance(b, Mapping):
            found += differing_fields(a, b, name + ".")
        elif a != b:
            found.append(f"{name}: {a} -> {b}")
    return found


def _get(config: ConfigDict, dotted: str) -> Any:
    for key in dotted.split("."):
        config = config[key]
    return config
