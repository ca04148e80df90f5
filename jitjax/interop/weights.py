"""One reader for every kind of file that holds the weights of a JiT, and the writer of our own .safetensors.

    read_weights("checkpoint-last.pth")            official, forks of it, bf16, wrapped by DDP or torch.compile, ...
    read_weights("model.safetensors")              ours, or a state dict under official or Diffusers names
    read_weights("folder")                         an exported folder, a hub or Diffusers folder, or a workdir of ours

What a file holds is found by looking into it, not by its ending. Nothing in a file is executed; PyTorch is not needed.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import safetensors
import safetensors.numpy

from jitjax import atomic, hub
from jitjax.errors import UserError
from jitjax.geometry import SIZES, Geometry
from jitjax.interop import adamw, diffusers, names, official
from jitjax.interop.sets import DECAY, name_sets, select
from jitjax.interop.sources import Source, is_workdir, open_source
from jitjax.model import JiT, graphdef_of, merge, position_table
from jitjax.settings import POWER

_log = logging.getLogger(__name__)

NO_POWER_FUNCTIONS = "power-function EMAs have no place in other formats: {} left out"
Params = dict[str, np.ndarray]
FACTS = ("prediction", "noise_scale", "t_eps", "sample_t_eps", "class_names", "class_conditional")
FLOATS = tuple(map(np.dtype, (np.float32, np.float16, ml_dtypes.bfloat16, np.float64)))
PREDICTIONS = {"x": "x", "x0": "x", "epsilon": "epsilon", "eps": "epsilon", "noise": "epsilon", "v": "v", "velocity": "v"}


@dataclasses.dataclass
class Weights:
    """The weights that a file holds and what it says about them; None where it does not say.

    Attributes:
      geometry: the model's shapes.
      sets: "model" and the EMAs "model_ema1", "model_ema2", ...: our flat parameters, float32.
      decays: of the EMAs, in that order; "power:0.1" is one of a power function.
      prediction: what the network outputs: "x", "epsilon" or "v".
      noise_scale, t_eps, sample_t_eps: standard deviation of the noise; lower clip of 1 - t in training and in sampling.
      class_names: by label.
      step, epoch: optimizer steps made; last finished epoch, counted as the official code does.
      args: the plain ones of the official arguments.
      notes: one line for each thing that was assumed, left out, renamed or replaced.
      origins: what the file calls each set.
      positions: the file's table of positions by set, where it is float32 and not bit for bit ours.
      moments: AdamW's "mu" and "nu" by our names, where asked for.
      config: a workdir's saved configuration, a plain dictionary.
      class_conditional: False where it was trained without labels although it has a class embedding.
    """

    geometry: Geometry
    sets: dict[str, Params]
    decays: tuple[float | str, ...] = ()
    prediction: str | None = None
    noise_scale: float | None = None
    t_eps: float | None = None
    sample_t_eps: float | None = None
    class_names: tuple[str, ...] | None = None
    step: int | None = None
    epoch: int | None = None
    args: dict[str, Any] | None = None
    notes: list[str] = dataclasses.field(default_factory=list)
    origins: dict[str, str] = dataclasses.field(default_factory=dict)
    positions: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)
    moments: dict[str, Params] | None = None
    config: dict[str, Any] | None = None
    class_conditional: bool | None = None

    def leave_out_power_functions(self) -> None:
        """For formats that know fixed decays alone: without the EMAs of power functions, which `notes` names."""
        emas = [name for name in self.sets if name != "model"]
        fixed = [name for name, decay in zip(emas, self.decays, strict=True) if not isinstance(decay, str)]
        if left := [decay for decay in self.decays if isinstance(decay, str)]:
            self.notes.append(NO_POWER_FUNCTIONS.format(", ".join(left)))
            names = {"model": "model", **{name: f"model_ema{i}" for i, name in enumerate(fixed, 1)}}
            self.decays = tuple(decay for decay in self.decays if not isinstance(decay, str))
            for kept in ("sets", "origins", "positions"):
                setattr(self, kept, {names[name]: value for name, value in getattr(self, kept).items() if name in names})

    @property
    def facts(self) -> dict[str, Any]:
        """What is known about how to use the weights, by the names of `FACTS`."""
        return {name: getattr(self, name) for name in FACTS if getattr(self, name) is not None}


def read_weights(
    path: str | Path, *, which: str | None = None, context_start: int | None = None, moments: bool = False
) -> Weights:
    """The weights in a file or folder.

    Args:
      path: .pth, .pt, .pth.tar, .ckpt, .bin or .safetensors; a folder with model.safetensors or
        diffusion_pytorch_model.safetensors (or a sharded index), alone or below transformer/; a workdir of ours; or
        hf://OWNER/NAME on the Hugging Face Hub, see `jitjax.hub`.
      which: read this set alone: "model", "model_ema1", "model_ema2", the file's own name for it, or a decay. A file
        with one set has no choice, and `notes` says so.
      context_start: first block that sees the context tokens; default as in the published sizes. Not of a workdir, which
        records it.
      moments: read the state of AdamW too.

    Raises:
      UserError: missing, damaged, hostile, not a JiT's, not finite, or without `which`; a workdir with `context_start`.
    """
    path = hub.download(str(path)) if hub.is_name(path) else Path(path).expanduser()
    if path.is_dir() and is_workdir(path):
        from jitjax.interop import workdir  # orbax, and most of jitjax

        if context_start is not None:
            raise UserError(
                f"--context_start={context_start}: {path} is a workdir, which records where its context tokens start; leave "
                "--context_start out"
            )
        found = workdir.read_run(path, which=which, moments=moments)
        _check_values(found, path)
        return found
    with open_source(path) as source:
        try:
            return _read(source, which, context_start, moments)
        except UserError as error:
            text = str(error)
            raise UserError(text if str(source.path) in text else f"{source.path}: {text}") from None


def load_official(path: Any, which: str = "model_ema1", *, context_start: int | None = None) -> JiT:
    """A model with the weights of an official checkpoint, or of anything else that `read_weights` reads.

    Args:
      path: see `read_weights`. Nothing in the file is executed; PyTorch is not needed.
      which: "model", "model_ema1" (what the paper samples from), "model_ema2", or the file's own name for a set. A file
        with one set has no choice; the log says so.
      context_start: first block that sees the context tokens; default as in the published sizes.

    Returns:
      an `nnx` module; `model(z, t, y)` on NHWC float images.

    Raises:
      UserError: the file is not there, damaged, hostile, or not a JiT's; or it lacks `which`.
    """
    weights = read_weights(path, which=which, context_start=context_start)
    for note in weights.notes:
        _log.warning("%s: %s", path, note)
    (params,) = weights.sets.values()
    return merge(graphdef_of(weights.geometry), {name: jnp.asarray(value) for name, value in params.items()})


def published_noise_scale(image_size: int) -> float:
    """The published recipes' noise scale: 1 at 256 pixels, 2 at 512; 1 below (arXiv 2511.13720, Table 9)."""
    return max(1.0, image_size / 256)


# ---------------------------------------------------------------- from content to weights


def _read(source: Source, which: str | None, context_start: int | None, moments: bool) -> Weights:
    path, notes = source.path, source.notes
    content = source.content if isinstance(source.content, Mapping) else {}
    args, stray = names.plain(content["args"]) if isinstance(content.get("args"), Mapping) else (None, [])
    if stray:
        notes.append(f"left out of args: {', '.join(stray)}"[:300])
    config = diffusers.describe(source.config, path.parent / "config.json")
    unread: list[str] = []  # EMAs that the file has and that cannot be read
    found = names.find_sets(source.content, path, notes, unread)
    unread += source.unread
    sets, origins, decays = name_sets(found, args or {}, source, which, notes, unread)
    if which is not None:
        chosen = select(origins, decays, which, path, notes, unread)
        for name, other in sets.items():
            lacking = [key for key in other if key not in sets[chosen]]
            if lacking:
                raise UserError(f"{path}: {chosen} is not complete: {name} also has {names.some(lacking)}")
        emas = [name for name in origins if name != "model"]
        decays = tuple(d for name, d in zip(emas, decays, strict=True) if name == chosen)
        sets, origins = {chosen: sets[chosen]}, {chosen: origins[chosen]}
    for name, tensors in sets.items():
        other = [f"{key} {t.dtype}" for key, t in tensors.items() if t.dtype not in FLOATS]
        if other:
            raise UserError(f"{path}: {name} has {names.some(other)}: only {', '.join(map(str, FLOATS))} are read")

    known = _geometry(source.metadata.get("geometry", {}), "its metadata")
    known |= _geometry(config.get("geometry", {}), "config.json")
    if context_start is None:
        context_start = known.get("context_start")
    for name, tensors in sets.items():
        _complete(tensors, known, args or {}, name, notes)
    first = next(iter(sets.values()))
    start = known.get("class_start", 0)  # ours: not among the official arguments
    about = {**(args or {}), **known}
    geometry = official.infer_geometry(first, about, context_start=context_start, class_start=start, notes=notes)
    _compare(geometry, known, args or {}, path, notes)
    if _same_hidden(known.get("mlp_ratio"), geometry):
        geometry = dataclasses.replace(geometry, mlp_ratio=float(known["mlp_ratio"]))

    facts = _facts(source, args, config, geometry, notes)
    weights = Weights(geometry, {}, decays, **facts, args=args, notes=notes, origins=origins)
    if isinstance(content.get("epoch"), int) and not isinstance(content["epoch"], bool):
        weights.epoch = content["epoch"]
    types = set()
    for name, tensors in sets.items():
        types |= {str(t.dtype) for t in tensors.values() if t.dtype != np.float32}
        weights.sets[name] = official.to_params(tensors, geometry)
        positions = official.positions_delta(tensors, geometry)
        if positions is None:
            continue
        coarse = official.rounded_to(tensors[official.POSITIONS])
        if coarse is None:
            weights.positions[name] = positions
            notes.append(f"pos_embed of {name} had drifted by rounding; here it is exact, a .pth gets it back as it was")
        else:
            notes.append(f"pos_embed of {name} is the fixed table rounded to {coarse}; the exact table is used")
    if types:
        notes.append(f"tensors of {', '.join(sorted(types))} became float32 (without loss, except from float64)")
    if moments and "optimizer" in content:
        try:
            weights.moments, weights.step = adamw.read(content["optimizer"], geometry)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            notes.append(f"the optimizer state in {path} does not fit the model and was left out ({error})")
    _check_values(weights, path)
    return weights


def _complete(tensors: names.Tensors, known: Mapping, args: Mapping, name: str, notes: list[str]) -> None:
    """Adds the fixed table of positions where the file has none."""
    if official.POSITIONS in tensors or "x_embedder.proj1.weight" not in tensors:
        return
    bias = tensors.get("x_embedder.proj2.bias")
    patch, width = tensors["x_embedder.proj1.weight"].shape[-1], bias.shape[0] if bias is not None else 0
    size = known.get("image_size") or args.get("img_size")
    if not isinstance(size, int) or size % patch:
        size = 16 * patch
        notes.append(f"the file does not give the image size: {size} is assumed, 16 patches a side as in the published sizes")
    if not width or width % 4 or not 0 < size // patch <= 512:
        raise UserError(f"not the weights of a JiT: pos_embed is missing, and width {width} with patch {patch} has none")
    tensors[official.POSITIONS] = _Constant(position_table(width, size // patch)[None])
    notes.append(f"{name} has no pos_embed: the fixed table for {size} pixels is used")


class _Constant:
    """A tensor that is in memory."""

    def __init__(self, array: np.ndarray):
        self._array, self.shape, self.dtype = array, array.shape, array.dtype

    def numpy(self) -> np.ndarray:
        return self._array


def _same_hidden(ratio: Any, geometry: Geometry) -> bool:
    return isinstance(ratio, int | float) and dataclasses.replace(geometry, mlp_ratio=ratio).mlp_hidden == geometry.mlp_hidden


def _compare(geometry: Geometry, known: Mapping, args: Mapping, path: Path, notes: list[str]) -> None:
    """What the file or its config.json says about the shapes, against the shapes.

    Raises:
      UserError: the two belong to different models.
    """
    actual = dataclasses.asdict(geometry)
    free = ("context_start", "mlp_ratio", "attn_dropout", "proj_dropout")
    checked = {k: v for k, v in actual.items() if k in known and k not in free}
    differing = [f"{k} is {known[k]}, the tensors' {v}" for k, v in checked.items() if known[k] != v]
    if differing:
        raise UserError(f"{path}: its description does not fit its tensors: {'; '.join(differing)}")
    for key, ours in (("img_size", "image_size"), ("class_num", "num_classes")):
        if isinstance(args.get(key), int) and args[key] != actual[ours]:
            notes.append(f"args say {key}={args[key]}, the tensors {actual[ours]}: the tensors' is used")


def _facts(source: Source, args: Any, config: Mapping, geometry: Geometry, notes: list[str]) -> dict[str, Any]:
    """`FACTS` where the file gives them."""
    facts: dict[str, Any] = {name: config[name] for name in FACTS if name in config}
    if args and {"P_mean", "noise_scale"} & set(args):
        facts["prediction"] = "x"  # the official code knows no other
        facts |= {name: float(args[name]) for name in ("noise_scale", "t_eps") if isinstance(args.get(name), int | float)}
    for key in ("prediction", "prediction_type", "pred_type"):
        for origin, described in (("args", args or {}), ("config.json", source.config)):
            if isinstance(text := described.get(key), str):
                facts["prediction"] = PREDICTIONS.get(text.lower())
                if facts["prediction"] is None:
                    notes.append(
                        f"{origin} says {key}={text!r}, which is none of x, epsilon, v: the prediction type is unknown"
                    )
    labels = source.labels
    if isinstance(labels, Mapping) and set(labels) == {str(i) for i in range(geometry.num_classes)}:
        facts["class_names"] = [str(labels[str(i)]) for i in range(geometry.num_classes)]
    facts |= {name: value for name, value in source.metadata.get("facts", {}).items() if name in FACTS and value is not None}
    edited = source.config.get("facts")
    described = {name: value for name, value in edited.items() if name in FACTS} if isinstance(edited, dict) else {}
    for name, value in described.items():
        if name in facts and _as_list(facts[name]) != _as_list(value):
            notes.append(f"config.json gives another {name} than the weights' own metadata: config.json's is used")
        facts[name] = value
    if facts.get("prediction") not in (None, "x", "epsilon", "v"):
        raise UserError(f"{source.path}: prediction={facts['prediction']!r}: expected one of x, epsilon, v")
    for name in ("noise_scale", "t_eps", "sample_t_eps"):
        value = facts.get(name)
        if value is not None and not (isinstance(value, int | float) and 0 < value < math.inf):
            notes.append(f"left out: {name}={value!r}, which is not a number above 0")
            facts[name] = None
    if not isinstance(facts.get("class_conditional"), bool | None):
        notes.append(f"left out: class_conditional={facts.pop('class_conditional')!r}, which is not true or false")
    labels = facts.get("class_names")
    if labels is not None and not (isinstance(labels, list | tuple) and len(labels) == geometry.num_classes):
        count = len(labels) if isinstance(labels, list | tuple) else repr(labels)[:40]
        notes.append(f"left out: {count} class names for {geometry.num_classes} classes")
        facts["class_names"] = labels = None
    if labels is not None:
        facts["class_names"] = tuple(map(str, labels))
    return facts


def _geometry(described: Mapping[str, Any], origin: str) -> dict[str, Any]:
    """The fields of a geometry that a description gives.

    Raises:
      UserError: one of another type; names it and `origin`.
    """
    result = {}
    for field in dataclasses.fields(Geometry):
        if field.name in described and field.type != "bool":  # the one of that type is part of a run alone
            value, is_float = described[field.name], field.type == "float"
            number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
            if not number or (not is_float and value != int(value)):
                raise UserError(f"{origin} gives {field.name}={value!r}: expected a {'' if is_float else 'whole '}number")
            result[field.name] = float(value) if is_float else int(value)
    return result


def _as_list(value: Any) -> Any:
    return list(value) if isinstance(value, tuple | list) else value


# ---------------------------------------------------------------- checks on what was read


def _check_values(weights: Weights, path: Any) -> None:
    """Notes on what looks wrong in the values.

    Raises:
      UserError: values that are not finite.
    """
    notes, g = weights.notes, weights.geometry
    for name, params in weights.sets.items():
        bad = [key for key, value in params.items() if not np.isfinite(value).all()]
        if bad:
            raise UserError(f"{path}: {name} has values that are not finite in {names.some(bad)}: the run had diverged")
        norms = {k: float(np.abs(v).mean()) for k, v in params.items() if k.endswith("norm.weight") or ".norm" in k}
        odd = [f"{key} {value:.3g}" for key, value in norms.items() if not 0.02 <= value <= 50]
        if odd:
            notes.append(f"{name}: norm weights are usually near 1; mean size here of {names.some(odd)}")
        zero = [key for key in ("final.linear.kernel", "blocks.0.adaln.kernel") if not params[key].any()]
        if zero:
            notes.append(f"{name} is untrained or damaged: {', '.join(zero)} is zero, as at the start of training")
    by_value: dict[tuple, str] = {}
    for name, params in weights.sets.items():
        key = tuple(float(params[k].sum(dtype=np.float64)) for k in ("final.linear.kernel", "blocks.0.attn.qkv.kernel"))
        if key in by_value and all(np.array_equal(params[k], v) for k, v in weights.sets[by_value[key]].items()):
            notes.append(f"{name} equals {by_value[key]}: a copy, or an EMA that was never updated")
        by_value.setdefault(key, name)
    published = {n: s for n, s in SIZES.items() if n in "BLHG" and (s["depth"], s["width"]) == (g.depth, g.width)}
    for size, numbers in published.items():
        wanted = {**numbers, "mlp_hidden": int(int(g.width * 4.0) * 2 / 3)}
        other = [f"{key} {getattr(g, key)} (published {value})" for key, value in wanted.items() if getattr(g, key) != value]
        if other:
            notes.append(f"depth and width are JiT-{size}'s, but not {', '.join(other)}")


# ---------------------------------------------------------------- writing


def write_safetensors(path: Any, params: Mapping[str, Any], geometry: Geometry, facts: Mapping[str, Any] | None = None) -> None:
    """One set of weights under its official names (with `net.`).

    The geometry and `facts` (see `Weights.facts`) go into the file's metadata, and `read_weights` gives them back.

    Raises:
      UserError: the path cannot be written.
    """
    _save(path, official.to_state_dict(params, geometry), geometry, facts or {})


def _save(path: Any, tensors: Mapping[str, np.ndarray], geometry: Geometry, facts: Mapping[str, Any], **more: Any) -> None:
    path = Path(path).expanduser()
    described = {"geometry": dataclasses.asdict(geometry), "facts": dict(facts), **more}
    metadata = {"format": "pt", **{key: json.dumps(value) for key, value in described.items()}}
    try:
        with atomic.writing(path, alone=True) as partial:
            safetensors.numpy.save_file(dict(tensors), partial, metadata)
    except (OSError, safetensors.SafetensorError) as error:
        raise UserError(f"{path}: cannot be written ({error}): free space or name another") from None


def write_folder(
    folder: Any, sets: Mapping[str, Mapping[str, Any]], geometry: Geometry, facts: Mapping[str, Any] | None = None
) -> None:
    """An exported folder: model.safetensors with every set, and config.json with geometry and facts for the reader.

    Args:
      folder: made if it does not exist; files of these two names in it are replaced.
      sets: "model" and EMAs by decay, e.g. {"model": params, "0.9999": params, "power:0.1": params}. In the file the names
        begin with `model.net.` and `ema_0.9999.net.`; `read_weights` gives them back as "model", "model_ema1", ... with decays.
      facts: see `Weights.facts`.

    Raises:
      UserError: a set's name is neither "model" nor a decay, or the folder cannot be written.
    """
    folder, tensors, facts = Path(folder).expanduser(), {}, dict(facts or {})
    for name, params in sets.items():
        if name != "model" and not re.fullmatch(rf"({POWER})?({DECAY})", name):
            raise UserError(f"{folder}: a set of weights is called 'model' or by its decay, e.g. '0.9999', not {name!r}")
        prefix = "model.net." if name == "model" else f"ema_{name}.net."
        tensors |= official.to_state_dict(params, geometry, prefix=prefix)
    config = {"format": "jitjax", "geometry": dataclasses.asdict(geometry), "facts": facts, "sets": list(sets)}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        text = json.dumps(config, indent=2, ensure_ascii=False) + "\n"
        (folder / "config.json").write_text(text, encoding="utf-8")
    except OSError as error:
        raise UserError(f"{folder}: cannot be written ({error.strerror or error}): free space or name another") from None
    _save(folder / "model.safetensors", tensors, geometry, facts, sets=list(sets))
