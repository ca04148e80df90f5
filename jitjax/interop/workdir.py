"""Weights between a workdir and the forms of `jitjax.interop.weights`, with settings, optimizer state and position of the run.

The settings of a run and the official arguments have different names for the same things. A setting that the other side does
not have is left at its default.
"""

from __future__ import annotations

import base64
import dataclasses
import functools
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp

from jitjax import checkpoint, saving, settings, step
from jitjax.config import default_config
from jitjax.errors import UserError, naming
from jitjax.geometry import SIZES, Geometry
from jitjax.interop import adamw, official
from jitjax.interop.pth import write_pth
from jitjax.interop.sets import DEFAULT_DECAYS, select
from jitjax.interop.weights import Weights, published_noise_scale
from jitjax.optimizer import make_optimizer

# Ours (left) and the official arguments.
ARGUMENTS = {
    "batch_size": "batch_size", "seed": "seed", "epochs": "epochs", "diffusion.p_mean": "P_mean",
    "diffusion.p_std": "P_std", "diffusion.noise_scale": "noise_scale", "diffusion.t_eps": "t_eps",
    "diffusion.label_drop_prob": "label_drop_prob", "optim.lr": "lr", "optim.blr": "blr", "optim.min_lr": "min_lr",
    "optim.warmup_epochs": "warmup_epochs", "optim.schedule": "lr_schedule", "optim.weight_decay": "weight_decay",
    "preview.cfg_scale": "cfg", "preview.steps": "num_sampling_steps", "preview.method": "sampling_method",
}  # fmt: skip


# ---------------------------------------------------------------- reading a workdir


def read_run(path: Path, *, which: str | None = None, moments: bool = False) -> Weights:
    """A workdir's newest checkpoint, or one checkpoint, as `read_weights` gives it.

    Raises:
      UserError: nothing complete there, or no such set in it.
    """
    saved = checkpoint.load_weights(path)
    config = settings.from_mapping(saved.meta.get("config", {}), ignore_unknown=True)
    decays = [d for d in map(str, config.optim.ema_decays) if d in saved.ema]  # the configured order is ema1, ema2
    power = [name for name in saved.ema if name.startswith(settings.POWER)]
    decays += [*(d for d in sorted(saved.ema) if d not in decays and d not in power), *power]
    trees = {"model": saved.params, **{f"model_ema{i}": saved.ema[d] for i, d in enumerate(decays, 1)}}
    imported = saved.meta.get("official") or {}
    weights = Weights(
        geometry=saved.geometry,
        sets={},
        decays=tuple(d if d in power else float(d) for d in decays),
        prediction=config.prediction,
        noise_scale=config.diffusion.noise_scale,
        t_eps=config.diffusion.t_eps,
        sample_t_eps=config.preview.t_eps,
        class_names=tuple(saved.meta["class_names"]) if saved.meta.get("class_names") else None,
        step=saved.step,
        args=imported.get("args"),
        origins={name: "" for name in trees},
        config=saved.meta.get("config", {}),
        class_conditional=False if saved.geometry.num_classes and not config.model.class_conditional else None,
    )
    if which is not None:
        name = select(weights.origins, weights.decays, which, path, weights.notes)
        weights.decays = tuple(d for i, d in enumerate(weights.decays, 1) if name == f"model_ema{i}")
        trees, weights.origins = {name: trees[name]}, {name: ""}
    weights.sets = {name: {k: np.asarray(v) for k, v in params.items()} for name, params in trees.items()}
    if saved.step == imported.get("step"):  # as imported, not trained further
        weights.epoch = imported.get("epoch")
        packed = imported.get("pos_embed") or {}
        weights.positions = {k: _unpack(v, weights.geometry) for k, v in packed.items() if k in trees}
    else:
        weights.epoch = _finished_epochs(saved.meta, saved.step, weights.notes) - 1
    if moments and config.optim.name != "adamw":
        weights.notes.append(f"the state of {config.optim.name} has no place in other formats and is left out")
    elif moments and not weights.geometry.class_start:  # such a model has no place in the files that hold moments
        # Of the same step, whatever the run has saved since.
        folder = checkpoint.workdir_of(path) / checkpoint.DIRECTORY / str(saved.step)
        try:
            weights.moments = _saved_moments(folder, weights.geometry, config)
        except Exception:
            if folder.is_dir():
                raise
            return read_run(path, which=which, moments=moments)  # a live run has deleted it meanwhile: there is a newer one
    return weights


def _finished_epochs(meta: Mapping[str, Any], step_number: int, notes: list[str]) -> int:
    count, examples = (meta.get("data") or {}).get("count"), meta.get("examples")
    if not count or not examples or not step_number:
        return 0
    per_epoch = max(1, count // (examples // step_number))
    if step_number % per_epoch:
        notes.append(
            f"step {step_number} lies within an epoch of {per_epoch}; the official code resumes at the start of an epoch"
        )
    return step_number // per_epoch


def _saved_moments(path: Path, geometry: Geometry, config: Any) -> dict[str, dict[str, np.ndarray]] | None:
    """AdamW's moments in the checkpoint `path`; None where no step was made. Reads only, so the run may be alive."""
    workdir, number = checkpoint.find(path)
    init = functools.partial(step.init_state, geometry, config.optim, config.dtype)
    state = jax.eval_shape(init, jax.random.key(0))
    sharding = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    like = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        {"opt_state": state.opt_state, "loss_scale": state.loss_scale},
    )
    options = ocp.CheckpointManagerOptions(read_only=True)
    with ocp.CheckpointManager((workdir / checkpoint.DIRECTORY).absolute(), options=options) as manager:
        restored = manager.restore(number, args=ocp.args.Composite(optimizer=ocp.args.StandardRestore(like)))
    opt_state = restored["optimizer"]["opt_state"]
    if int(optax.tree_utils.tree_get(opt_state, "count")) == 0:
        return None
    moments = {name: optax.tree_utils.tree_get(opt_state, name) for name in ("mu", "nu")}
    return {name: {k: np.asarray(v) for k, v in tree.items()} for name, tree in moments.items()}


# ---------------------------------------------------------------- writing a workdir


def write_run(workdir: Path, weights: Weights) -> None:
    """A workdir with one checkpoint, at the optimizer step that the weights have come to.

    Raises:
      UserError: the workdir has checkpoints already, or cannot be written.
    """
    if (workdir / checkpoint.DIRECTORY).exists():
        raise UserError(f"--to={workdir} has checkpoints already: name a new folder")
    config = config_of(weights)
    device = {name: {k: jnp.asarray(v) for k, v in params.items()} for name, params in weights.sets.items()}
    emas = [name for name in device if name != "model"]
    if "model" not in device:
        weights.notes.append(f"the file has an EMA alone: {emas[0]} serves as parameters too")
    params = device.get("model") or device[emas[0]]
    ema = {str(decay): device[name] for decay, name in zip(weights.decays, emas, strict=True)}
    if not ema:
        ema = {str(config.optim.ema_decays[0]): params}
        weights.notes.append("the file has one set of weights: its EMA starts as a copy of it")
    state = step.fresh_state(params, ema, config.optim, config.dtype)
    if weights.moments:
        count = jnp.int32(weights.step)
        trees = {name: {k: jnp.asarray(v) for k, v in tree.items()} for name, tree in weights.moments.items()}
        opt_state = optax.tree_utils.tree_set(make_optimizer(config.optim).init(params), count=count, **trees)
        state = dataclasses.replace(state, step=count, opt_state=opt_state)
    else:
        weights.notes.append(f"no optimizer state: start from it with --config.init_from={workdir}")
    number = weights.step if weights.moments else 0
    imported = {
        "step": number,
        "epoch": weights.epoch,
        "args": weights.args,
        "pos_embed": {name: _pack(positions) for name, positions in weights.positions.items()},
    }
    more = {"class_names": list(weights.class_names)} if weights.class_names else {}
    meta = checkpoint.describe(weights.geometry, ema, config=settings.to_dict(config), official=imported, **more)
    try:
        workdir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--to={workdir}: cannot be written ({error.strerror}): name another") from None
    with naming("--to", workdir):
        saved = saving.Checkpoints(workdir)
        saved.save(state, number, meta)
        saved.close()


def config_of(weights: Weights) -> settings.Settings:
    """The settings of the run that the file describes, as far as it does."""
    config, g, args = default_config(), weights.geometry, weights.args or {}
    size = next((n for n, s in SIZES.items() if (s["depth"], s["width"]) == (g.depth, g.width)), "B")
    config.model.name = f"JiT-{size}/{g.patch_size}"
    config.model.class_conditional = g.num_classes > 0 and weights.class_conditional is not False
    config.model.num_classes = g.num_classes or None
    for name in ("depth", "width", "heads", "bottleneck", "context_length", "context_start"):
        if getattr(g, name) != SIZES[size][name]:
            config.model[name] = getattr(g, name)
    for name in ("mlp_ratio", "attn_dropout", "proj_dropout"):
        config.model[name] = getattr(g, name)
    config.data.image_size = g.image_size
    config.optim.ema_decays = weights.decays or DEFAULT_DECAYS[:1]
    for ours, theirs in ARGUMENTS.items():
        _set(config, ours, args.get(theirs))
    if {"interval_min", "interval_max"} <= set(args):
        config.preview.interval = (float(args["interval_min"]), float(args["interval_max"]))
    _set(config, "prediction", weights.prediction)
    _set(config, "diffusion.t_eps", weights.t_eps)
    _set(config, "preview.t_eps", weights.sample_t_eps)
    noise_scale = weights.noise_scale
    if noise_scale is None:
        noise_scale = published_noise_scale(g.image_size)
        weights.notes.append(
            f"the file does not give the noise scale: {noise_scale:g} is assumed, as published for {g.image_size} pixels"
        )
    config.diffusion.noise_scale = noise_scale
    if weights.prediction is None:
        weights.notes.append("the file does not say what the network predicts: x is assumed, as in the published models")
    return settings.from_mapping(config)


def _set(config: Any, dotted: str, value: Any) -> None:
    if isinstance(value, int | float | str):
        *parents, leaf = dotted.split(".")
        target = config[parents[0]] if parents else config
        target[leaf] = float(value) if target.get_type(leaf) is float else value


# ---------------------------------------------------------------- writing an official .pth


def write_official(path: Path, weights: Weights, config: Any) -> None:
    """An official checkpoint: model, model_ema1, model_ema2, and optimizer, epoch and args where there are any.

    `args` is a plain dictionary here, not an argparse.Namespace, so that `torch.load(weights_only=True)` reads the file;
    the official code does not look at it. The caller checks that the run predicts x.

    Raises:
      UserError: the path cannot be written.
    """
    g, sets = weights.geometry, weights.sets
    result: dict[str, Any] = {}
    for name in official.SETS:
        source = name if name in sets else ("model_ema1" if "model_ema1" in sets else next(iter(sets)))
        if source != name:
            weights.notes.append(f"there is no {name}: it became a copy of {source}, since the official code wants all three")
        result[name] = official.to_state_dict(sets[source], g, positions=weights.positions.get(source))
    if weights.decays[2:]:
        left = ", ".join(map(str, weights.decays[2:]))
        weights.notes.append(f"an official checkpoint has two EMAs: {left} left out")
    if weights.moments:
        o = config.optim
        lr = (weights.args or {}).get("lr")
        lr = lr if lr is not None else o.lr if o.lr is not None else o.blr
        result["optimizer"] = adamw.write(
            weights.moments, weights.step, g, lr=lr, b1=o.b1, b2=o.b2, eps=o.eps, weight_decay=o.weight_decay
        )
    else:
        weights.notes.append("no optimizer state: the official code can sample from the file, not resume from it")
    if weights.class_names:
        weights.notes.append("the names of the classes cannot be stored in an official .pth and are left out")
    if weights.epoch is not None:
        result["epoch"] = weights.epoch
    result["args"] = weights.args if weights.args is not None else official_args(weights, config)
    write_pth(path, result)


def official_args(weights: Weights, config: Any) -> dict[str, Any]:
    """The official arguments of our run, as far as the two name the same things."""
    c, g = config, weights.geometry
    decays = [*weights.decays, *DEFAULT_DECAYS[len(weights.decays) :]]
    return dict(
        model=c.model.name, img_size=g.image_size, class_num=g.num_classes, attn_dropout=g.attn_dropout,
        proj_dropout=g.proj_dropout, P_mean=c.diffusion.p_mean, P_std=c.diffusion.p_std, t_eps=c.diffusion.t_eps,
        noise_scale=c.diffusion.noise_scale, label_drop_prob=c.diffusion.label_drop_prob, ema_decay1=decays[0],
        ema_decay2=decays[1], batch_size=c.batch_size, lr=c.optim.lr, blr=c.optim.blr, min_lr=c.optim.min_lr,
        lr_schedule=c.optim.schedule, weight_decay=c.optim.weight_decay, seed=c.seed,
    )  # fmt: skip


def _pack(positions: np.ndarray) -> str:
    return base64.b64encode(zlib.compress(positions.astype("<f4").tobytes())).decode()


def _unpack(text: str, geometry: Geometry) -> np.ndarray:
    values = np.frombuffer(zlib.decompress(base64.b64decode(text)), "<f4")
    return values.reshape(1, geometry.tokens, geometry.width)
