"""Weights between jitjax, the official PyTorch code and safetensors; exact in every direction, PyTorch not needed.

    python -m jitjax.convert --from checkpoint-last.pth --to runs/imported        official .pth -> jitjax
    python -m jitjax.convert --from runs/a --to a.pth                             jitjax -> official .pth
    python -m jitjax.convert --from runs/a --to a.safetensors --which model_ema1  one set of weights

A path that ends in .pth (.pt) or .safetensors is such a file; any other is a jitjax workdir or one of its checkpoints. The
result of the first is a workdir for `--config.init_from`, sampling and evaluation; if the .pth has the state of AdamW, that
comes along, and training the workdir further continues the official run. What a file cannot hold is named, not dropped.

Nothing in a .pth is executed. `model_ema1` and `model_ema2` are the averages with the first and second of ema_decays.
"""

from __future__ import annotations

import argparse
import base64
import dataclasses
import functools
import json
import sys
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp

from jitjax import checkpoint, step
from jitjax.config import default_config, from_dict, to_dict
from jitjax.errors import UserError, cli
from jitjax.interop import official
from jitjax.interop.pth import LazyTensor, PthFile, write_pth
from jitjax.model import SIZES, Geometry
from jitjax.optimizer import make_optimizer

DEFAULT_DECAYS = (0.9999, 0.9996)  # the official defaults


@dataclasses.dataclass
class Content:
    """What every kind of file can be turned into: weights by set, and what stands beside them where there is any."""

    geometry: Geometry
    sets: dict[str, dict[str, np.ndarray]]  # "model" and averages "model_ema1", "model_ema2"
    decays: tuple[float, ...]  # of the averages, in that order
    config: Any
    step: int = 0
    moments: dict[str, dict[str, np.ndarray]] | None = None  # "mu" and "nu" by our names
    args: dict[str, Any] | None = None  # the official arguments
    epoch: int | None = None  # last finished, counted as the official code does
    positions: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)  # pos_embed by set, where not exact
    notes: list[str] = dataclasses.field(default_factory=list)


# ---------------------------------------------------------------- official .pth


def read_pth(path: Path, context_start: int | None) -> Content:
    """Raises UserError: not an official checkpoint, or `context_start` lies beyond its blocks."""
    with PthFile(path) as file:
        found = file.content
        sets = official.sets_of(found, path)
        args = found.get("args")
        args = {k: v for k, v in args.items() if _is_plain(v)} if isinstance(args, Mapping) else None
        geometry = official.infer_geometry(next(iter(sets.values())), args, context_start=context_start)
        given = args or {}
        decays = [float(given.get(f"ema_decay{i}") or DEFAULT_DECAYS[i - 1]) for i in (1, 2) if f"model_ema{i}" in sets]
        content = Content(
            geometry=geometry,
            sets={name: official.to_params(tensors, geometry) for name, tensors in sets.items()},
            decays=tuple(decays),
            config=_config_from_args(given, geometry, tuple(decays)),
            args=args,
            epoch=found["epoch"] if isinstance(found.get("epoch"), int) else None,
        )
        for name, tensors in sets.items():
            positions = official.positions_delta(tensors, geometry)
            if positions is not None:
                content.positions[name] = positions
        if "optimizer" in found:
            _read_moments(content, found["optimizer"], path)
    if context_start is None and geometry.context_length:
        content.notes.append(
            f"context tokens start at block {geometry.context_start}, as in the published sizes; --context_start says otherwise"
        )
    for name in content.positions:
        content.notes.append(f"pos_embed of {name} had drifted by rounding; here it is exact, a .pth gets it back as it was")
    half = sorted({str(t.dtype) for s in sets.values() for t in s.values() if t.dtype != np.float32})
    if half:
        content.notes.append(f"tensors of {', '.join(half)} became float32 (without loss, except from float64)")
    return content


def _read_moments(content: Content, saved: Any, path: Path) -> None:
    """AdamW's moments and step count into `content`; a state that does not fit is left out with a note."""
    g = content.geometry
    order, shapes = [name for group in official.optimizer_order(g) for name in group], official.official_shapes(g)
    try:
        states = [saved["state"][i] for i in range(len(order))]
        steps = {float(s["step"].numpy() if isinstance(s["step"], LazyTensor) else s["step"]) for s in states}
        if len(steps) != 1 or len(saved["state"]) != len(order):
            raise ValueError(f"{len(saved['state'])} entries, {len(steps)} different step counts")
        moments: dict[str, dict[str, np.ndarray]] = {"mu": {}, "nu": {}}
        ours = official.official_names(g)
        for name, state in zip(order, states, strict=True):
            for moment, key in (("mu", "exp_avg"), ("nu", "exp_avg_sq")):
                value = state[key].numpy().astype(np.float32, copy=False)
                if value.shape != shapes[name]:
                    raise ValueError(f"{key} of {name} has shape {value.shape}")
                moments[moment][ours[name]] = np.ascontiguousarray(official.to_ours(name, value, g.patch_size))
        content.moments, content.step = moments, int(steps.pop())
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        content.notes.append(f"the optimizer state in {path} does not fit the model and was left out ({error})")


def write_official(path: Path, content: Content) -> None:
    """An official checkpoint: model, model_ema1, model_ema2, and optimizer, epoch and args where there are any.

    `args` is a plain dictionary here, not an argparse.Namespace, so that `torch.load(weights_only=True)` reads the file;
    the official code does not look at it.
    """
    g = content.geometry
    result: dict[str, Any] = {}
    for name in official.SETS:
        source = name if name in content.sets else ("model_ema1" if "model_ema1" in content.sets else "model")
        if source != name:
            content.notes.append(f"there is no {name}: it became a copy of {source}, since the official code wants all three")
        positions = content.positions.get(source)
        result[name] = official.to_state_dict(content.sets[source], g, positions=positions)
    if content.moments:
        result["optimizer"] = _official_optimizer(content)
    else:
        content.notes.append("no optimizer state: the official code can sample from the file, not resume from it")
    if content.epoch is not None:
        result["epoch"] = content.epoch
    result["args"] = content.args if content.args is not None else _args_from_config(content)
    write_pth(path, result)


def _official_optimizer(content: Content) -> dict[str, Any]:
    g, o = content.geometry, content.config.optim
    groups, names, states = official.optimizer_order(g), official.official_names(g), {}
    for index, name in enumerate(name for group in groups for name in group):
        moments = {
            key: np.ascontiguousarray(official.to_official(name, content.moments[moment][names[name]], g.patch_size))
            for moment, key in (("mu", "exp_avg"), ("nu", "exp_avg_sq"))
        }
        states[index] = {"step": np.array(content.step, np.float32), **moments}
    lr = (content.args or {}).get("lr")
    common = dict(
        lr=float(lr if lr is not None else o.lr if o.lr is not None else o.blr), betas=(float(o.b1), float(o.b2)),
        eps=float(o.eps), amsgrad=False, maximize=False, foreach=None, capturable=False, differentiable=False, fused=None,
        decoupled_weight_decay=True,
    )  # fmt: skip
    first = len(groups[0])
    return {
        "state": states,
        "param_groups": [
            {"weight_decay": 0.0, **common, "params": list(range(first))},
            {"weight_decay": float(o.weight_decay), **common, "params": list(range(first, len(states)))},
        ],
    }


# ---------------------------------------------------------------- safetensors


def read_safetensors(path: Path, context_start: int | None) -> Content:
    geometry, params = official.read_safetensors(path, context_start=context_start)
    notes = ["the file has one set of weights: it serves as parameters and as average"]
    sets = {"model": params, "model_ema1": params}
    decays = DEFAULT_DECAYS[:1]
    return Content(geometry, sets, decays, _config_from_args({}, geometry, decays), notes=notes)


def write_safetensors(path: Path, content: Content, which: str) -> None:
    if which not in content.sets:
        raise UserError(f"--which={which} is not in the source: use one of {', '.join(content.sets)}")
    official.write_safetensors(path, content.sets[which], content.geometry)
    rest = [name for name in content.sets if name != which]
    content.notes.append(f"the file holds {which}; not in it: {', '.join([*rest, 'optimizer state'])}")


# ---------------------------------------------------------------- jitjax


def read_jitjax(path: Path) -> Content:
    """A workdir's newest checkpoint, or one checkpoint. Raises UserError: nothing complete there."""
    weights = checkpoint.load_weights(path)
    config = from_dict(weights.meta.get("config", {}))
    decays = [d for d in map(str, config.optim.ema_decays) if d in weights.ema]  # the configured order is ema1, ema2
    decays += [d for d in sorted(weights.ema) if d not in decays]
    sets = {"model": weights.params, **{f"model_ema{i + 1}": weights.ema[d] for i, d in enumerate(decays[:2])}}
    saved = weights.meta.get("official") or {}
    content = Content(
        geometry=weights.geometry,
        sets={name: {k: np.asarray(v) for k, v in params.items()} for name, params in sets.items()},
        decays=tuple(map(float, decays[:2])),
        config=config,
        step=weights.step,
        args=saved.get("args"),
    )
    if weights.step == saved.get("step"):  # as imported, not trained further
        content.epoch = saved.get("epoch")
        content.positions = {k: _unpack(v, content.geometry) for k, v in (saved.get("pos_embed") or {}).items()}
    else:
        content.epoch = _finished_epochs(weights.meta, weights.step, content.notes) - 1
    if decays[2:]:
        content.notes.append(f"an official checkpoint has two averages: {', '.join(decays[2:])} left out")
    content.moments = _saved_moments(path, content)
    return content


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


def _saved_moments(path: Path, content: Content) -> dict[str, dict[str, np.ndarray]] | None:
    """AdamW's moments in a jitjax checkpoint; None where no step was made. Reads only, so the run may be alive."""
    workdir, number = checkpoint.find(path)
    init = functools.partial(step.init_state, content.geometry, content.config)
    state = jax.eval_shape(init, jax.random.key(0))
    place = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    like = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place),
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


def write_jitjax(workdir: Path, content: Content) -> None:
    """A workdir with one checkpoint, at the optimizer step that the weights have come to.

    Raises:
      UserError: the workdir has checkpoints already.
    """
    if (workdir / checkpoint.DIRECTORY).exists():
        raise UserError(f"--to={workdir} has checkpoints already: name a new folder")
    config = content.config
    device = {name: {k: jnp.asarray(v) for k, v in params.items()} for name, params in content.sets.items()}
    averages = [name for name in device if name != "model"]
    params = device.get("model") or device[averages[0]]
    ema = {str(decay): device[name] for decay, name in zip(content.decays, averages, strict=True)}
    if not ema:
        ema = {str(config.optim.ema_decays[0]): params}
        content.notes.append("the file has no averages: they start as a copy of the parameters")
    state = step.fresh_state(params, ema, config)
    if content.moments:
        count = jnp.int32(content.step)
        trees = {name: {k: jnp.asarray(v) for k, v in tree.items()} for name, tree in content.moments.items()}
        opt_state = optax.tree_utils.tree_set(make_optimizer(config).init(params), count=count, **trees)
        state = dataclasses.replace(state, step=count, opt_state=opt_state)
    else:
        content.notes.append(f"no optimizer state: start from it with --config.init_from={workdir}")
    imported = {
        "step": content.step,
        "epoch": content.epoch,
        "args": content.args,
        "pos_embed": {name: _pack(positions) for name, positions in content.positions.items()},
    }
    meta = checkpoint.describe(content.geometry, ema, config=to_dict(config), official=imported)
    try:
        workdir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--to={workdir}: cannot be written: {error.strerror}") from None
    saved = checkpoint.Checkpoints(workdir)
    saved.save(state, content.step, meta)
    saved.close()


# ---------------------------------------------------------------- settings


def _config_from_args(args: Mapping[str, Any], geometry: Geometry, decays: tuple[float, ...]) -> Any:
    """Our configuration of the run that the official arguments describe, as far as the two name the same things."""
    config, g = default_config(), geometry
    size = next((n for n, s in SIZES.items() if (s["depth"], s["width"]) == (g.depth, g.width)), "B")
    config.model.name = f"JiT-{size}/{g.patch_size}"
    config.model.class_conditional, config.model.num_classes = g.num_classes > 0, g.num_classes
    for name in ("depth", "width", "heads", "bottleneck", "context_length", "context_start"):
        if getattr(g, name) != SIZES[size][name]:
            config.model[name] = getattr(g, name)
    for name in ("mlp_ratio", "attn_dropout", "proj_dropout"):
        config.model[name] = getattr(g, name)
    config.data.image_size = g.image_size
    config.optim.ema_decays = decays or DEFAULT_DECAYS[:1]
    for ours, theirs in {
        "batch_size": "batch_size", "seed": "seed", "epochs": "epochs", "diffusion.p_mean": "P_mean",
        "diffusion.p_std": "P_std", "diffusion.noise_scale": "noise_scale", "diffusion.t_eps": "t_eps",
        "diffusion.label_drop_prob": "label_drop_prob", "optim.lr": "lr", "optim.blr": "blr", "optim.min_lr": "min_lr",
        "optim.warmup_epochs": "warmup_epochs", "optim.schedule": "lr_schedule", "optim.weight_decay": "weight_decay",
        "preview.cfg_scale": "cfg", "preview.steps": "num_sampling_steps", "preview.method": "sampling_method",
    }.items():  # fmt: skip
        value = args.get(theirs)
        if isinstance(value, int | float | str):
            *parents, leaf = ours.split(".")
            target = config[parents[0]] if parents else config
            if target.get_type(leaf) is float:
                value = float(value)
            target[leaf] = value
    if {"interval_min", "interval_max"} <= set(args):
        config.preview.interval = (float(args["interval_min"]), float(args["interval_max"]))
    return config


def _args_from_config(content: Content) -> dict[str, Any]:
    """The official arguments of our run, as far as the two name the same things."""
    c, g = content.config, content.geometry
    decays = [*content.decays, *DEFAULT_DECAYS[len(content.decays) :]]
    return dict(
        model=c.model.name, img_size=g.image_size, class_num=g.num_classes, attn_dropout=g.attn_dropout,
        proj_dropout=g.proj_dropout, P_mean=c.diffusion.p_mean, P_std=c.diffusion.p_std, t_eps=c.diffusion.t_eps,
        noise_scale=c.diffusion.noise_scale, label_drop_prob=c.diffusion.label_drop_prob, ema_decay1=decays[0],
        ema_decay2=decays[1], batch_size=c.batch_size, lr=c.optim.lr, blr=c.optim.blr, min_lr=c.optim.min_lr,
        lr_schedule=c.optim.schedule, weight_decay=c.optim.weight_decay, seed=c.seed,
    )  # fmt: skip


def _is_plain(value: Any) -> bool:
    return value is None or isinstance(value, bool | int | float | str)


def _pack(positions: np.ndarray) -> str:
    return base64.b64encode(zlib.compress(positions.astype("<f4").tobytes())).decode()


def _unpack(text: str, geometry: Geometry) -> np.ndarray:
    values = np.frombuffer(zlib.decompress(base64.b64decode(text)), "<f4")
    return values.reshape(1, geometry.tokens, geometry.width)


# ---------------------------------------------------------------- command line


def kind_of(path: str) -> str:
    suffix = Path(path).suffix
    return {".pth": "pth", ".pt": "pth", ".safetensors": "safetensors"}.get(suffix, "jitjax")


def main(argv: Sequence[str] | None = None) -> None:
    """The command line.

    Raises:
      UserError: a source that is not what its name says, or a target that cannot be written.
    """
    parser = argparse.ArgumentParser("jitjax.convert", description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("--from", dest="source", required=True, help=".pth, .safetensors, or a jitjax workdir or checkpoint")
    parser.add_argument("--to", required=True, help=".pth, .safetensors, or a new jitjax workdir")
    parser.add_argument("--which", choices=official.SETS, default="model_ema1", help="the set for a .safetensors file")
    parser.add_argument("--context_start", type=int, help="first block with context tokens, for unpublished sizes")
    args = parser.parse_args(argv)
    checkpoint.quiet()
    source, target = Path(args.source).expanduser(), Path(args.to).expanduser()
    kinds = kind_of(args.source), kind_of(args.to)
    if kinds == ("jitjax", "jitjax"):
        raise UserError("--from and --to are both jitjax workdirs: one of them must end in .pth or .safetensors")
    if kinds[1] != "jitjax" and not target.absolute().parent.is_dir():
        raise UserError(f"--to={target}: the folder {target.absolute().parent} does not exist")
    if kinds[0] == "jitjax":
        content = read_jitjax(source)
    else:
        content = (read_pth if kinds[0] == "pth" else read_safetensors)(source, args.context_start)
    if kinds[1] == "jitjax":
        write_jitjax(target, content)
    elif kinds[1] == "pth":
        write_official(target, content)
    else:
        write_safetensors(target, content, args.which)
    g = content.geometry
    print(f"{source} -> {target}: {', '.join(content.sets)}; {json.dumps(dataclasses.asdict(g))}")
    if content.moments and kinds[1] != "safetensors":
        print(f"with the state of AdamW after {content.step} steps")
    for note in content.notes:
        print(f"note: {note}")


if __name__ == "__main__":
    jax.config.update("jax_platforms", "cpu")  # nothing is computed, only moved
    raise SystemExit(cli(lambda: main(sys.argv[1:])))
