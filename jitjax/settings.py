"""The settings of a run: every field once, with type, default, range, unit and one line of what it does.

A config file builds an `ml_collections.ConfigDict` (`jitjax.config.default_config`); here it becomes frozen dataclasses, one
a subject, and each module receives only its own. What a field may hold is in `jitjax.fields`. Imports
no jax, so a mistake on the command line is answered before JAX starts.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Collection, Iterator, Mapping
from typing import Any

from jitjax import hub, paths
from jitjax.errors import UserError
from jitjax.fields import Field, fields_of, free, get, group, setting
from jitjax.signals import StopAfter

SPACES = ("x", "epsilon", "v")
HIGH_DEPTH = ("clip", "range", "picture")
METHODS = ("heun", "euler", "abm2", "abm3", "dpmpp_2m")
POWER = "power:"  # name of a power-function EMA: "power:0.05"
FIRST_EMA = "e.g. 0.9999 or power:0.1; '': the first of optim.power_emas, else of optim.ema_decays."
GRID = dict(pattern=r"uniform|power:(?=.*[1-9])\d+(\.\d+)?", form="uniform or power:RHO with RHO > 0, e.g. power:1.6")
INT32 = 2**31 - 1  # the largest optimizer step that a device counts
POSITIVE = dict(low=0, open_low=True)
STEPS = dict(low=1, high=INT32, unit="optimizer steps")
SIGMA_REL = dict(low=1e-6, high=0.288)
DECAY = dict(low=0, high=0.999999)  # AdamW divides by 1 - decay^step, in float32: of 0.99999999 that is 0 for ever
EPOCHS = dict(POSITIVE, high=1e9, unit="epochs")
DECODING = ("exif_rotate", "all_formats", "high_depth")  # of `Data`: how a file becomes pixels


@dataclasses.dataclass(frozen=True)
class Data:
    path: str = free("", "Image folder, or a directory made by `jitjax prepare`, which also reads archives and Parquet files.")
    synthetic: str = setting("", "'shapes' draws a small data set into the workdir; '' uses data.path.", choices=("", "shapes"))
    image_size: int = setting(64, "Side of the square images.", low=1, high=8192, unit="pixels")
    num_workers: int = free(8, "Decoding processes; 0 decodes in threads of the main process.", low=0, high=1024)
    flip: bool = setting(True, "Mirror each example with probability 1/2.")
    split: str = setting("", "Split to read, by name or role; '.': all of it; '': the training split.")
    labels: str = setting("", "folders, none, cls, json, a label file or FILE:COLUMN; '': found, and printed.")
    exif_rotate: bool = setting(False, "Turn pictures upright by their EXIF tag; the published loader does not.")
    all_formats: bool = setting(False, "Also read JPEG 2000 and other formats that the published loader passes over.")
    high_depth: str = setting("clip", "16-bit and float pictures: clip as published, or scale.", choices=HIGH_DEPTH)
    max_bad_fraction: float = free(0.01, "Share of undecodable images at which a run stops.", low=0, high=1)
    allow_changed: bool = free(False, "Continue although the data set differs from the one the run began with.")

    def reading(self) -> dict[str, Any]:
        """How the files are read: keyword arguments of `jitjax.data.open_dataset`."""
        return {"split": self.split, "labels": self.labels, **self.decoding()}

    def decoding(self) -> dict[str, Any]:
        """How a file becomes pixels, of whichever images: keyword arguments of `jitjax.data.open_dataset`, too."""
        return {name: getattr(self, name) for name in DECODING}


@dataclasses.dataclass(frozen=True)
class Model:
    name: str = setting("JiT-B/4", "JiT-<size>/<patch>, sizes nano Ti S B L H G, e.g. JiT-B/4.")
    class_conditional: bool = setting(False, "Train with labels.")
    num_classes: int | None = setting(None, "Classes; unset: as many as the data set has.", low=1, high=10**7)
    depth: int | None = setting(None, "Blocks; unset: the named size's own.", low=1, high=512)
    width: int | None = setting(None, "Features of a token; unset: the named size's own.", low=4, high=2**15)
    heads: int | None = setting(None, "Attention heads; unset: the named size's own.", low=1, high=2**10)
    bottleneck: int | None = setting(None, "Features between the two patch projections; unset: own.", low=1, high=2**15)
    context_length: int | None = setting(None, "In-context class tokens; unset: own.", low=0, high=2**12)
    context_start: int | None = setting(None, "First block that sees the context tokens; unset: own.", low=0, high=511)
    class_loss: float = setting(
        0.0, "Auxiliary class loss, beside the summed squared error; published: 100. Block context_start is then the first "
        "that is conditioned on the class. 0: none.", low=0, high=1e6,
    )  # fmt: skip
    mlp_ratio: float = setting(4.0, "SwiGLU: hidden width is 2/3 of this times the width.", high=64, **POSITIVE)
    attn_dropout: float = setting(0.0, "Dropout of attention weights, middle blocks.", low=0, high=1, open_high=True)
    proj_dropout: float = setting(0.0, "Dropout of projections, middle blocks.", low=0, high=1, open_high=True)


@dataclasses.dataclass(frozen=True)
class Diffusion:
    p_mean: float = setting(-0.8, "Training time t = sigmoid(N(p_mean, p_std)).", low=-20, high=20)
    p_std: float = setting(0.8, "Training time t = sigmoid(N(p_mean, p_std)).", high=20, **POSITIVE)
    noise_scale: float = setting(1.0, "Standard deviation of the noise; published: image_size / 256.", high=1e3, **POSITIVE)
    t_eps: float = setting(0.05, "Training's lower clip of 1 - t; sampling has preview.t_eps.", high=1, **POSITIVE)
    label_drop_prob: float = setting(0.1, "Probability that a label becomes the null class.", low=0, high=1)


@dataclasses.dataclass(frozen=True)
class Optimizer:
    name: str = setting("adamw", "muon: Muon for the matrices of the blocks, AdamW for the rest.", choices=("adamw", "muon"))
    accumulation_steps: int = free(1, "Micro-batches per optimizer step (the effective batch is compared).", low=1, high=65536)
    lr: float | None = setting(None, "Peak learning rate; unset: blr x effective batch / 256.", high=100, **POSITIVE)
    blr: float = setting(5e-5, "Peak learning rate for 256 images a step.", high=100, **POSITIVE)
    min_lr: float = setting(0.0, "Learning rate at the end of the cosine.", low=0, high=100)
    warmup_epochs: float = setting(5.0, "Linear warm-up.", low=0, high=1e9, unit="epochs")
    warmup_steps: int | None = setting(None, "Linear warm-up; set: replaces warmup_epochs.", low=0, high=INT32, unit="steps")
    schedule: str = setting("constant", "Learning rate after the warm-up.", choices=("constant", "cosine"))
    weight_decay: float = setting(0.0, "Decoupled weight decay of matrices.", low=0, high=1e3)
    b1: float = setting(0.9, "AdamW's decay of the first moment; Muon has muon_momentum.", **DECAY)
    b2: float = setting(0.95, "AdamW's decay of the second moment; Muon has none.", **DECAY)
    # Gradients below 1e-19 have squares that float32 lacks: with a smaller epsilon their updates would be huge, or 0 / 0.
    eps: float = setting(1e-8, "AdamW's epsilon; Muon has none.", low=1e-16, high=1)
    muon_momentum: float = setting(0.95, "Muon's decay of its Nesterov momentum.", low=0, high=1, open_high=True)
    muon_steps: int = setting(
        3, "Newton-Schulz steps of Muon: more cost more and bring smaller singular values to 1.", low=1, high=10
    )
    muon_adaln: bool = setting(False, "Muon for the blocks' adaLN matrices too, not AdamW.")
    clip_norm: float = setting(0.0, "Clip the gradient's global norm; 0: no clipping.", low=0, high=1e9)
    ema_decays: tuple[float, ...] = setting((0.9999, 0.9996), "Decays of the EMAs of the weights.", low=0, high=1)
    ema_warmup: bool = setting(False, "Fixed decays begin shorter: min(decay, (1 + step) / (10 + step)).")
    power_emas: tuple[float, ...] = setting((), "sigma_rel of power-function EMAs, e.g. (0.05,0.1).", **SIGMA_REL)

    @property
    def emas(self) -> tuple[str, ...]:
        """Names of a run's EMAs, "power:0.05" and "0.9999"; previews and scores are of the first. Power functions come first:
        their length grows with the run, where a fixed decay is too long for its beginning."""
        return (*(f"{POWER}{sigma_rel:g}" for sigma_rel in self.power_emas), *map(str, self.ema_decays))


@dataclasses.dataclass(frozen=True)
class Mesh:
    data: int | None = free(None, "Copies of the state; unset: what zero and fsdp leave.", low=1, high=2**20)
    zero: int | None = free(None, "Sharded optimizer (ZeRO-2) over so many devices; unset: all.", low=1, high=2**20)
    fsdp: int = free(1, "FSDP (ZeRO-3) over so many devices: weights split too.", low=1, high=2**20)
    comm_dtype: str = free("float32", "Type of gradients between devices.", choices=("float32", "bfloat16"))


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    every_steps: int | None = free(None, "Save at multiples of this step.", **STEPS)
    every_epochs: float | None = free(None, "Save every so many epochs.", **EPOCHS)
    every_minutes: float | None = free(
        15.0,
        "Save after so much time, and before a preview or evaluation after grace_seconds; unset: never by time.",
        high=1e7,
        **POSITIVE,
    )
    keep_last: int = free(3, "Newest checkpoints that are retained.", low=1, high=10**6)
    keep_every: int | None = free(None, "Checkpoints at multiples of this step are retained for good.", **STEPS)
    ema_every_steps: int | None = free(None, "Snapshots of optim.power_emas; unset: 32 over the run.", **STEPS)
    grace_seconds: float = free(60.0, "From a signal to the end; saving must fit in.", high=1e5, unit="s", **POSITIVE)


@dataclasses.dataclass(frozen=True)
class Sampler:
    """How images are drawn from a model: what `jitjax.sampling` needs to know."""

    steps: int = setting(50, "Steps of the time grid on [0, 1].", low=1, high=10**5)
    method: str = setting("heun", "Solver; docs/sampling.md compares them.", choices=METHODS)
    grid: str = setting("uniform", "Time grid; docs/sampling.md compares them.", **GRID)
    cfg_scale: float = setting(1.0, "Guidance scale; 1 switches guidance off.", low=-1e3, high=1e3)
    interval: tuple[float, ...] = setting((0.0, 1.0), "Times between which guidance acts.", low=-1, high=2, length=2)
    t_eps: float = setting(0.05, "Lower clip of 1 - t when sampling.", high=1, **POSITIVE)


class _Drawn:
    """What the settings of previews and of scores share."""

    def sampler(self) -> Sampler:
        """The part that says how images are drawn."""
        return Sampler(**{field.name: getattr(self, field.name) for field in dataclasses.fields(Sampler)})


@dataclasses.dataclass(frozen=True)
class Preview(_Drawn):
    every_steps: int | None = free(None, "A grid of samples at multiples of this step.", **STEPS)
    every_epochs: float | None = free(None, "A grid of samples every so many epochs.", **EPOCHS)
    num_images: int = free(64, "Images of a grid.", low=1, high=10**6)
    steps: int = free(50, "Steps of the time grid.", low=1, high=10**5)
    method: str = free("heun", "Solver; docs/sampling.md compares them.", choices=METHODS)
    grid: str = free("uniform", "Time grid; docs/sampling.md compares them.", **GRID)
    cfg_scale: float = free(2.9, "Guidance scale; 1 switches guidance off.", low=-1e3, high=1e3)
    interval: tuple[float, ...] = free((0.1, 1.0), "Times between which guidance acts.", low=-1, high=2, length=2)
    t_eps: float = free(0.05, "Lower clip of 1 - t when sampling.", high=1, **POSITIVE)
    which: str = free("", f"EMA to sample from, {FIRST_EMA}")


@dataclasses.dataclass(frozen=True)
class Eval(_Drawn):
    every_steps: int | None = free(None, "Score the live EMA at multiples of this step.", **STEPS)
    every_epochs: float | None = free(None, "Score the live EMA every so many epochs.", **EPOCHS)
    num_images: int = free(5000, "Images that are drawn and scored.", low=2, high=10**6)
    reference: str = free("", "Folder, prepared set, or statistics to score against; '': the held-out, else the training set.")
    held_out: str = free("", "Images for eval/loss; '': the validation split beside the training images, where there is one.")
    extractor: str = free("auto", "inception, efficientnet-lite0 or FILE.onnx; auto: inception where its weights are.")
    inception: str = free("", "The FID Inception's weights; '': $JITJAX_INCEPTION or the cache.")
    metric: str = free("", "Score that decides which checkpoint is the best, e.g. mind or loss; '': the Fréchet distance.")
    steps: int = free(20, "Steps of the time grid.", low=1, high=10**5)
    method: str = free("abm2", "Solver.", choices=METHODS)
    grid: str = free("power:1.6", "Time grid; docs/sampling.md compares them.", **GRID)
    cfg_scale: float = free(1.0, "Guidance scale; 1 switches guidance off.", low=-1e3, high=1e3)
    interval: tuple[float, ...] = free((0.1, 1.0), "Times between which guidance acts.", low=-1, high=2, length=2)
    t_eps: float = free(0.05, "Lower clip of 1 - t when sampling.", high=1, **POSITIVE)
    batch_size: int = free(64, "Images drawn at once per device.", low=1, high=2**16)
    which: str = free("", f"EMA to score, {FIRST_EMA}")


@dataclasses.dataclass(frozen=True)
class Log:
    every_steps: int = free(100, "Print and write speed at multiples of this step.", **STEPS)
    tensorboard: bool = free(False, "Also write TensorBoard event files (install .[tensorboard]).")


@dataclasses.dataclass(frozen=True)
class Wandb:
    enabled: bool = free(False, "Log to Weights & Biases.")
    project: str | None = free(None, "W&B project; unset: $WANDB_PROJECT, else jitjax.")
    entity: str | None = free(None, "W&B user or team; unset: $WANDB_ENTITY, else your default.")
    name: str | None = free(None, "Name of the W&B run; unset: $WANDB_NAME, else the workdir's.")
    group: str | None = free(None, "Group of the W&B run; unset: $WANDB_RUN_GROUP.")
    tags: str = free("", "Tags of the W&B run, separated by commas; '': $WANDB_TAGS.")
    mode: str = free("online", "offline: write files that `wandb sync` uploads later.", choices=("online", "offline"))


@dataclasses.dataclass(frozen=True)
class Settings:
    """All settings of a run. Exactly one of the four run lengths is set."""

    seed: int = setting(0, "Seed of weights, data order, noise and times.", low=0, high=2**32 - 1)
    batch_size: int = free(64, "Images per device and micro-batch (the effective batch is compared).", low=1, high=2**20)
    epochs: float | None = setting(None, "Run length.", **EPOCHS)
    total_steps: int | None = setting(None, "Run length.", **STEPS)
    total_images: float | None = setting(None, "Run length.", high=1e18, unit="images", **POSITIVE)
    total_tokens: float | None = setting(
        None, "Run length; (image_size / patch)^2 per image.", high=1e21, unit="tokens", **POSITIVE
    )
    dtype: str = setting("bfloat16", "Type of matmuls and attention.", choices=("bfloat16", "float32", "float16"))
    kernels: str = free("auto", "Implementation of the model's operations.", choices=("auto", "fused", "plain"))
    remat: str = free("none", "What the backward pass computes again to save memory.", choices=("none", "dots", "full"))
    init_from: str = setting(
        "", "Weights to start from: a workdir, a checkpoint, any file or folder of docs/weights.md, hf://OWNER/NAME."
    )
    prediction: str = setting("x", "What the network outputs.", choices=SPACES)
    loss: str = setting("v", "Space in which the error is measured.", choices=SPACES)
    nan_policy: str = free("skip", "A step whose loss or gradient is not finite changes nothing.", choices=("skip", "stop"))
    nan_limit: int = free(20, "Such steps in a row that end the run.", low=1, high=10**6)
    stop_after: str = free("", "End this invocation after a time or steps, saved: 2h, 90min, 500steps; '': never.")
    hang_factor: float = free(
        30.0, "A step this many times the usual, and 300 s (several processes: 100 s), hangs.", low=2, high=1e6
    )
    compilation_cache: str = free("auto", "Directory of compiled programs; auto: the user's cache, on GPU; '': none.")
    data: Data = group(Data)
    model: Model = group(Model)
    diffusion: Diffusion = group(Diffusion)
    optim: Optimizer = group(Optimizer)
    mesh: Mesh = group(Mesh)
    checkpoint: Checkpoint = group(Checkpoint)
    preview: Preview = group(Preview)
    eval: Eval = group(Eval)
    log: Log = group(Log)
    wandb: Wandb = group(Wandb)


RUN_LENGTHS = ("epochs", "total_steps", "total_images", "total_tokens")


# ---------------------------------------------------------------- fields by dotted name


@functools.cache
def fields() -> dict[str, Field]:
    """Every field of `Settings` by its dotted name, in the order of the classes."""
    return fields_of(Settings)


# ---------------------------------------------------------------- from and to plain dictionaries


def from_mapping(values: Mapping[str, Any], *, ignore_unknown: bool = False) -> Settings:
    """Settings from a nested mapping (a ConfigDict, or what `to_dict` gave). Every value is checked.

    Args:
      ignore_unknown: leave out fields that are not known (of a run saved by another version) instead of refusing.

    Raises:
      UserError: one line that names the field, its value and what is allowed.
    """
    known, flat = fields(), dict(flatten(values))
    unknown = [name for name in flat if name not in known]
    if unknown and not ignore_unknown:
        raise UserError(f"--config has no field {unknown[0]}{did_you_mean(unknown[0])}")
    checked = {name: known[name].check(value) for name, value in flat.items() if name in known}
    return _build(Settings, "", checked)


def flatten(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted name, value) of everything in a nested mapping."""
    for key, value in values.items():
        if hasattr(value, "items"):
            yield from flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _build(kind: type, prefix: str, values: Mapping[str, Any]) -> Any:
    arguments = {}
    for field in dataclasses.fields(kind):
        name = prefix + field.name
        if "group" in field.metadata:
            arguments[field.name] = _build(field.metadata["group"], f"{name}.", values)
        elif name in values:
            arguments[field.name] = values[name]
    return kind(**arguments)


def to_dict(settings: Any) -> dict[str, Any]:
    """A nested dictionary that JSON takes: tuples become lists."""
    return {
        key: to_dict(value) if dataclasses.is_dataclass(value) else list(value) if isinstance(value, tuple) else value
        for key, value in ((field.name, getattr(settings, field.name)) for field in dataclasses.fields(settings))
    }


def did_you_mean(name: str) -> str:
    """The end of the line about an unknown field: the nearest one, if any is near, and where all are listed."""
    import difflib

    leaf = name.rpartition(".")[2]
    near = difflib.get_close_matches(name, fields(), 1, 0.7) or [n for n in fields() if n.rpartition(".")[2] == leaf]
    return f": did you mean {near[0]}? (`jitjax train --help` lists all)" if near else " (`jitjax train --help` lists all)"


# ---------------------------------------------------------------- checks across fields


def check(settings: Settings) -> None:
    """What can be checked across fields without looking at data or devices.

    Raises:
      UserError: one line that names the flags, their values and what is allowed.
    """
    check_paths(settings)
    StopAfter.parse(settings.stop_after)
    lengths = [name for name in RUN_LENGTHS if getattr(settings, name) is not None]
    if len(lengths) != 1:
        given = ", ".join(f"--config.{name}={getattr(settings, name)}" for name in lengths) or "none is set"
        raise UserError(f"exactly one run length of {', '.join(RUN_LENGTHS)} must be set: {given}; unset others with =None")
    emas = settings.optim.emas
    if twice := next((ema for ema in emas if emas.count(ema) > 1), None):
        field = "power_emas" if twice.startswith(POWER) else "ema_decays"
        raise UserError(f"--config.optim.{field}={getattr(settings.optim, field)}: {twice} stands twice")
    if settings.optim.name == "adamw":
        for name, field in fields_of(Optimizer).items():
            if name.startswith("muon_") and (value := getattr(settings.optim, name)) != field.default:
                raise UserError(f"--config.optim.{name}={value} needs --config.optim.name=muon, which is not set")
    for name, part in (("preview", settings.preview), ("eval", settings.eval)):
        if part.which and part.which not in settings.optim.emas:
            raise UserError(f"--config.{name}.which={part.which}: not among the run's EMAs {', '.join(settings.optim.emas)}")
        check_interval(part.interval, f"--config.{name}.interval")


def check_paths(settings: Settings) -> None:
    """Raises:
    UserError: an address such as gs:// where a local path is needed.
    """
    for name in ("data.path", "init_from", "eval.reference", "eval.held_out", "eval.inception", "compilation_cache"):
        value = get(settings, name)
        if value and not (name == "init_from" and hub.is_name(value)):
            paths.local(value, f"--config.{name}")


def check_data(data: Data) -> None:
    """Raises:
    UserError: no data set is named, or two are.
    """
    if data.path and data.synthetic:
        raise UserError(
            f"--config.data.path={data.path} and --config.data.synthetic={data.synthetic} are both set: "
            "unset one, e.g. with --config.data.synthetic="
        )
    if not data.path and not data.synthetic:
        raise UserError("--config.data.path is missing: name a folder of images, e.g. --config.data.path=./data/train")


def check_interval(interval: tuple[float, ...], flag: str) -> None:
    """Raises:
    UserError: the two times of a guidance interval are not in increasing order; names `flag`.
    """
    low, high = interval
    if not low < high:
        raise UserError(f"{flag}=({low:g},{high:g}): the first time must be smaller than the second, e.g. (0.1,1.0)")


def differing_fields(old: Mapping[str, Any], new: Settings, also: Collection[str] = ()) -> list[str]:
    """Fields that change what a run computes and differ from a saved run's, e.g. "seed: 0 -> 1".

    Fields that only change where, how fast and how loudly a run computes are free to differ. So is the run length while the
    learning rate is constant: a longer run then begins as the shorter one did. A field that the version which saved did not
    have yet counts as its default, which does what that version did. What only Muon reads is free where it is not used.

    Args:
      also: fields that are compared although they are free.
    """
    before, found = dict(flatten(old)), []
    if not before:
        return []
    constant = new.optim.schedule == "constant" and before.get("optim.schedule", "constant") == "constant"
    adamw = new.optim.name == before.get("optim.name", "adamw") == "adamw"
    for name, field in fields().items():
        unused = (constant and name in RUN_LENGTHS) or (adamw and name.startswith("optim.muon_"))
        if (field.rule.free or unused) and name not in also:
            continue
        a, b = before.get(name, field.default), get(new, name)
        a = tuple(a) if isinstance(a, list) else a
        if a != b:
            found.append(f"{name}: {a} -> {b}")
    return found


def of_all_processes(settings: Settings) -> dict[str, Any]:
    """The fields, by name, that all processes of a run must have alike. Where files lie on a host, and how a process reads them
    and reports, are its own."""
    own = {"data.path", "data.num_workers", "init_from", "compilation_cache", "log.tensorboard"}
    own |= {f"eval.{what}" for what in ("reference", "held_out", "extractor", "inception")}
    alike = {name: value for name, value in flatten(to_dict(settings)) if name not in own and not name.startswith("wandb.")}
    # With weights to begin from or without is no matter of paths.
    return alike | {"init_from": "given" if settings.init_from else "not given"}


# ---------------------------------------------------------------- text


def reference() -> list[str]:
    """One line a field for `--help`: flag, default, what is allowed, what it does."""
    lines = []
    for name, field in fields().items():
        default = "unset" if field.default is None else repr(field.default) if field.type is str else str(field.default)
        unit = f"; {field.rule.unit}" if field.rule.unit else ""
        lines.append(f"  --config.{name}={default.replace(' ', '')}  ({field.allowed()}{unit})\n      {field.rule.help}")
    return lines


def reference_page() -> str:
    """docs/settings.md: every field in Markdown, one table per group. `python -m jitjax.settings > docs/settings.md`."""
    lines = [
        "# Settings",
        "",
        "Every field of a run, as `--config.<field>=<value>`; `=None` unsets one. Fields marked * may differ between the",
        "starts of one run. Made by `python -m jitjax.settings > docs/settings.md`.",
    ]
    group = None
    for name, field in fields().items():
        if (parent := name.rpartition(".")[0]) != group:
            group = parent
            lines += ["", f"## {group or 'The run'}", "", "| field | default | allowed | what it does |", "|---|---|---|---|"]
        default = "unset" if field.default is None else repr(field.default).replace("'", "") or "''"
        unit = f" {field.rule.unit}" if field.rule.unit else ""
        cells = [f"`{name}`{'*' if field.rule.free else ''}", default, field.allowed() + unit, field.rule.help]
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(reference_page())
