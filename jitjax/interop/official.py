"""The published checkpoints: their names and layouts against ours.

The official state dict has (out, in) matrices, OIHW kernels and a table of fixed positions `pos_embed`; inside its
Denoiser every name begins with `net.`. Ours has (in, out) kernels and no constants. All conversions are transpositions
and reshapes, so nothing is rounded in either direction.
"""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Mapping
from typing import Any

import ml_dtypes
import numpy as np

from jitjax.errors import UserError
from jitjax.geometry import SIZES, Geometry
from jitjax.interop.names import some
from jitjax.model import CHANNELS, TIME_FEATURES, position_table

_log = logging.getLogger(__name__)

PREFIX = "net."
POSITIONS = "pos_embed"
SETS = ("model", "model_ema1", "model_ema2")
# The official code applies the EMA to this constant too, and it drifts by rounding: by half a unit in the last place over
# (1 - decay), 3e-4 at 0.9999. So the tables in model_ema1 and model_ema2 are not exact.
POSITION_TOLERANCE = 1e-3
Arrays = Mapping[str, Any]  # values have .shape; `.numpy()` or the array protocol gives their values


def official_names(geometry: Geometry) -> dict[str, str]:
    """{official name without prefix: our name} in the order of the official `named_parameters()`.

    `pos_embed`, which is not one of our parameters, comes first and maps to itself.
    """
    names = {POSITIONS: POSITIONS}
    if geometry.context_length:
        names["in_context_posemb"] = "in_context_pos"

    def linear(official: str, ours: str, bias: bool = True) -> None:
        names[f"{official}.weight"] = f"{ours}.kernel"
        if bias:
            names[f"{official}.bias"] = f"{ours}.bias"

    linear("t_embedder.mlp.0", "t_embedder.fc1")
    linear("t_embedder.mlp.2", "t_embedder.fc2")
    names["y_embedder.embedding_table.weight"] = "y_embedder.table"
    linear("x_embedder.proj1", "patch_embed.proj1", bias=False)
    linear("x_embedder.proj2", "patch_embed.proj2")
    for i in range(geometry.depth):
        block = f"blocks.{i}"
        names[f"{block}.norm1.weight"] = f"{block}.norm1.weight"
        for norm in ("q_norm", "k_norm"):
            names[f"{block}.attn.{norm}.weight"] = f"{block}.attn.{norm}.weight"
        linear(f"{block}.attn.qkv", f"{block}.attn.qkv")
        linear(f"{block}.attn.proj", f"{block}.attn.proj")
        names[f"{block}.norm2.weight"] = f"{block}.norm2.weight"
        linear(f"{block}.mlp.w12", f"{block}.mlp.w12")
        linear(f"{block}.mlp.w3", f"{block}.mlp.w3")
        linear(f"{block}.adaLN_modulation.1", f"{block}.adaln")
    names["final_layer.norm_final.weight"] = "final.norm.weight"
    linear("final_layer.linear", "final.linear")
    linear("final_layer.adaLN_modulation.1", "final.adaln")
    return names


def official_shapes(geometry: Geometry) -> dict[str, tuple[int, ...]]:
    """{official name without prefix: shape}."""
    g, w = geometry, geometry.width
    block = {
        "norm1.weight": (w,), "norm2.weight": (w,),
        "attn.q_norm.weight": (g.head_dim,), "attn.k_norm.weight": (g.head_dim,),
        "attn.qkv.weight": (3 * w, w), "attn.qkv.bias": (3 * w,),
        "attn.proj.weight": (w, w), "attn.proj.bias": (w,),
        "mlp.w12.weight": (2 * g.mlp_hidden, w), "mlp.w12.bias": (2 * g.mlp_hidden,),
        "mlp.w3.weight": (w, g.mlp_hidden), "mlp.w3.bias": (w,),
        "adaLN_modulation.1.weight": (6 * w, w), "adaLN_modulation.1.bias": (6 * w,),
    }  # fmt: skip
    shapes = {
        POSITIONS: (1, g.tokens, w),
        "in_context_posemb": (1, g.context_length, w),
        "t_embedder.mlp.0.weight": (w, TIME_FEATURES), "t_embedder.mlp.0.bias": (w,),
        "t_embedder.mlp.2.weight": (w, w), "t_embedder.mlp.2.bias": (w,),
        "y_embedder.embedding_table.weight": (g.num_classes + 1, w),
        "x_embedder.proj1.weight": (g.bottleneck, CHANNELS, g.patch_size, g.patch_size),
        "x_embedder.proj2.weight": (w, g.bottleneck, 1, 1), "x_embedder.proj2.bias": (w,),
        "final_layer.norm_final.weight": (w,),
        "final_layer.linear.weight": (g.patch_values, w), "final_layer.linear.bias": (g.patch_values,),
        "final_layer.adaLN_modulation.1.weight": (2 * w, w), "final_layer.adaLN_modulation.1.bias": (2 * w,),
        **{f"blocks.{i}.{name}": shape for i in range(g.depth) for name, shape in block.items()},
    }  # fmt: skip
    return {name: shapes[name] for name in official_names(g)}


def to_ours(official: str, array: np.ndarray, patch_size: int) -> np.ndarray:
    """One tensor from its official layout to ours (a view where possible)."""
    if official == "in_context_posemb":
        return array[0]
    if official == "x_embedder.proj1.weight":  # (K, 3, p, p) -> (p*p*3, K), rows ordered (row, column, channel)
        return array.transpose(2, 3, 1, 0).reshape(-1, array.shape[0])
    if official == "x_embedder.proj2.weight":
        return array[:, :, 0, 0].T
    if array.ndim == 2 and official != "y_embedder.embedding_table.weight":
        return array.T
    return array


def to_official(official: str, array: np.ndarray, patch_size: int) -> np.ndarray:
    """Inverse of `to_ours`."""
    if official == "in_context_posemb":
        return array[None]
    if official == "x_embedder.proj1.weight":
        return array.reshape(patch_size, patch_size, CHANNELS, -1).transpose(3, 2, 0, 1)
    if official == "x_embedder.proj2.weight":
        return array.T[:, :, None, None]
    if array.ndim == 2 and official != "y_embedder.embedding_table.weight":
        return array.T
    return array


def strip_prefix(state_dict: Arrays) -> dict[str, Any]:
    """The state dict without `net.`, whether or not it had it."""
    return {name.removeprefix(PREFIX): value for name, value in state_dict.items() if isinstance(name, str)}


def infer_geometry(
    state_dict: Arrays,
    args: Mapping[str, Any] | None = None,
    *,
    context_start: int | None = None,
    class_start: int = 0,
    notes: list[str] | None = None,
) -> Geometry:
    """The geometry that the tensors' shapes imply.

    The tensors do not say where context tokens start. That is `context_start` if given, else the start of the published
    size with the same depth and width, else depth // 3 as in the published B, L and H; what was assumed is added to
    `notes`, or logged without one. Nor do they say which blocks know the class: `class_start`. The dropout rates are those of
    `args`, the official arguments.

    Raises:
      UserError: tensors are missing, or their shapes do not describe a JiT, `context_start` or `class_start` is beyond the
        blocks, or a dropout rate is none.
    """
    tensors = strip_prefix(state_dict)

    def shape(name: str, ndim: int) -> tuple[int, ...]:
        if name not in tensors:
            raise UserError(f"not the weights of a JiT: expected a tensor {name}, found {some(tensors)}")
        found = tuple(getattr(tensors[name], "shape", ()))
        if len(found) != ndim or not all(found):
            raise UserError(f"{name} has shape {found}: expected {ndim} dimensions")
        return found

    _, tokens, width = shape(POSITIONS, 3)
    bottleneck, _, patch, _ = shape("x_embedder.proj1.weight", 4)
    (head_dim,) = shape("blocks.0.attn.q_norm.weight", 1)
    _, hidden = shape("blocks.0.mlp.w3.weight", 2)
    blocks = {int(m[1]) for name in tensors if (m := re.match(r"blocks\.(\d{1,4})\.", name))}
    depth, grid = len(blocks), math.isqrt(tokens)
    if blocks != set(range(depth)) or grid * grid != tokens or width % head_dim:
        raise UserError(
            f"not the weights of a JiT: {depth} blocks up to number {max(blocks)}, {tokens} tokens (expected a "
            f"square), width {width} (expected a multiple of the head dimension {head_dim})"
        )
    context = tensors.get("in_context_posemb")
    context_length = shape("in_context_posemb", 3)[1] if context is not None else 0
    if context_start is None:
        known = {(s["depth"], s["width"]): s["context_start"] for s in SIZES.values()}
        context_start = known.get((depth, width), depth // 3 if context_length else 0)
        if context_length:
            why = "as in the published size" if (depth, width) in known else "depth // 3, as in the published B, L and H"
            text = (
                f"the tensors do not say where the {context_length} context tokens start: block {context_start} is assumed "
                f"({why}); if that is wrong, give context_start"
            )
            if notes is not None:
                notes.append(text)
            elif (depth, width) not in known:
                _log.warning("%s", text)
    if context_length and not 0 <= context_start < depth:
        raise UserError(f"--context_start={context_start}: must lie in [0, {depth}), the file has {depth} blocks")
    if not 0 <= class_start < depth:
        raise UserError(f"class_start={class_start}: must lie in [0, {depth}), the file has {depth} blocks")
    geometry = Geometry(
        image_size=grid * patch,
        patch_size=patch,
        depth=depth,
        width=width,
        heads=width // head_dim,
        bottleneck=bottleneck,
        context_length=context_length,
        context_start=context_start,
        num_classes=shape("y_embedder.embedding_table.weight", 2)[0] - 1,
        mlp_ratio=_mlp_ratio(width, hidden),
        attn_dropout=_dropout(args or {}, "attn_dropout"),
        proj_dropout=_dropout(args or {}, "proj_dropout"),
        class_start=class_start,
    )
    _check_shapes(tensors, geometry)
    return geometry


def to_params(state_dict: Arrays, geometry: Geometry) -> dict[str, np.ndarray]:
    """An official state dict, with or without `net.`, as our flat parameters, float32.

    Raises:
      UserError: names or shapes that do not fit `geometry`, or positions that are not the fixed table.
    """
    tensors = strip_prefix(state_dict)
    _check_shapes(tensors, geometry)
    positions_delta(state_dict, geometry)
    return {
        ours: np.ascontiguousarray(to_ours(name, _float32(tensors[name]), geometry.patch_size))
        for name, ours in official_names(geometry).items()
        if name != POSITIONS
    }


def to_state_dict(
    params: Arrays, geometry: Geometry, *, prefix: str = PREFIX, positions: np.ndarray | None = None
) -> dict[str, np.ndarray]:
    """Our flat parameters as an official state dict in the official order. Inverse of `to_params`, bit for bit.

    `positions` (1, tokens, width) replaces the table made here, to hand back the last bits of another machine's.
    """
    result = {}
    for name, ours in official_names(geometry).items():
        if name == POSITIONS:
            value = position_table(geometry.width, geometry.grid)[None] if positions is None else positions
        else:
            value = to_official(name, np.asarray(params[ours]), geometry.patch_size)
        result[prefix + name] = np.ascontiguousarray(value)
    return result


def positions_delta(state_dict: Arrays, geometry: Geometry) -> np.ndarray | None:
    """None if the file's position table equals ours bit for bit, else the file's table, (1, tokens, width) float32.

    Raises:
      UserError: the table differs by more than rounding, so the weights belong to another position encoding.
    """
    tensor = strip_prefix(state_dict)[POSITIONS]
    theirs = _float32(tensor)
    ours = position_table(geometry.width, geometry.grid)[None]
    if np.array_equal(theirs.view(np.uint32), ours.view(np.uint32)):
        return None
    if not np.isfinite(theirs).all():
        raise UserError("pos_embed has values that are not finite: the run had diverged, or the file is damaged")
    error = np.abs(theirs - ours).max()
    coarse = rounded_to(tensor)
    # Values lie in [-1, 1], where rounding moves them by at most a quarter of the type's epsilon.
    tolerance = POSITION_TOLERANCE + (float(ml_dtypes.finfo(coarse).eps) / 4 if coarse else 0)
    if not error <= tolerance:
        raise UserError(f"pos_embed differs from the fixed sin-cos table by {error:.3g}: not the positions of a JiT")
    return theirs


def rounded_to(tensor: Any) -> np.dtype | None:
    """bfloat16 or float16 if the tensor has that type, or is float32 with values of that type; else None."""
    values = _float32(tensor)
    for dtype in (np.dtype(ml_dtypes.bfloat16), np.dtype(np.float16)):
        if np.array_equal(values, values.astype(dtype).astype(np.float32)):
            return dtype
    return None


def optimizer_order(geometry: Geometry) -> tuple[list[str], list[str]]:
    """Official names in the order of the official AdamW's two groups: without and with weight decay."""
    shapes = official_shapes(geometry)
    trained = [name for name in shapes if name != POSITIONS]
    plain = [name for name in trained if len(shapes[name]) == 1 or name.endswith(".bias")]
    return plain, [name for name in trained if name not in set(plain)]


# ---------------------------------------------------------------- helpers


def _float32(value: Any) -> np.ndarray:
    array = value.numpy() if hasattr(value, "numpy") else np.asarray(value)
    return array.astype(np.float32, copy=False)


def _dropout(args: Mapping[str, Any], name: str) -> float:
    rate = args.get(name)
    if rate is None:
        return 0.0
    if isinstance(rate, bool) or not isinstance(rate, int | float) or not 0 <= rate < 1:
        raise UserError(f"{name}={rate!r} in the arguments of the file: must be a number in [0, 1)")
    return float(rate)


def _mlp_ratio(width: int, hidden: int) -> float:
    """A ratio whose truncated hidden width is `hidden`; the published 4 wherever it fits."""
    wide = math.ceil(hidden * 1.5)
    for ratio in (4.0, *((wide + extra) / width for extra in (0, 0.5, 1))):
        if int(int(width * ratio) * 2 / 3) == hidden:
            return ratio
    raise UserError(f"blocks.0.mlp.w3.weight has a hidden width of {hidden} for width {width}: no SwiGLU of a JiT")


def _check_shapes(tensors: Mapping[str, Any], geometry: Geometry) -> None:
    shapes = official_shapes(geometry)
    missing, unknown = [n for n in shapes if n not in tensors], [n for n in tensors if n not in shapes]
    if missing or unknown:
        kinds = {"missing": missing, "unknown": unknown}
        parts = "; ".join(f"{kind} {some(names)}" for kind, names in kinds.items() if names)
        raise UserError(f"not the weights of a JiT with {len(shapes)} tensors: {parts}")
    for name, expected in shapes.items():
        found = tuple(getattr(tensors[name], "shape", ()))
        if found != expected:
            raise UserError(f"{name} has shape {found}, expected {expected}")
