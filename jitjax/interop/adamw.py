"""The state of the official AdamW: moments and step count of every parameter, in the order of its two groups."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from jitjax.geometry import Geometry
from jitjax.interop import official

MOMENTS = (("mu", "exp_avg"), ("nu", "exp_avg_sq"))  # Optax's name, PyTorch's


def read(saved: Any, geometry: Geometry) -> tuple[dict[str, dict[str, np.ndarray]], int]:
    """({"mu": ..., "nu": ...} by our names, float32; the step count).

    Raises:
      KeyError, TypeError, ValueError, AttributeError: the state is not that of the official optimizer for `geometry`.
    """
    order = [name for group in official.optimizer_order(geometry) for name in group]
    shapes, ours = official.official_shapes(geometry), official.official_names(geometry)
    states = [saved["state"][i] for i in range(len(order))]
    steps = {float(s["step"].numpy() if hasattr(s["step"], "numpy") else s["step"]) for s in states}
    if len(steps) != 1 or len(saved["state"]) != len(order):
        raise ValueError(f"{len(saved['state'])} entries, {len(steps)} different step counts")
    moments: dict[str, dict[str, np.ndarray]] = {"mu": {}, "nu": {}}
    for name, state in zip(order, states, strict=True):
        for moment, key in MOMENTS:
            value = state[key].numpy().astype(np.float32, copy=False)
            if value.shape != shapes[name]:
                raise ValueError(f"{key} of {name} has shape {value.shape}")
            moments[moment][ours[name]] = np.ascontiguousarray(official.to_ours(name, value, geometry.patch_size))
    return moments, int(steps.pop())


def write(
    moments: Mapping[str, Mapping[str, np.ndarray]],
    step: int,
    geometry: Geometry,
    *,
    lr: float,
    b1: float,
    b2: float,
    eps: float,
    weight_decay: float,
) -> dict[str, Any]:
    """The state dict of the official AdamW. Inverse of `read`, bit for bit."""
    groups, names, states = official.optimizer_order(geometry), official.official_names(geometry), {}
    for index, name in enumerate(name for group in groups for name in group):
        values = {
            key: np.ascontiguousarray(official.to_official(name, moments[moment][names[name]], geometry.patch_size))
            for moment, key in MOMENTS
        }
        states[index] = {"step": np.array(step, np.float32), **values}
    common = dict(
        lr=float(lr), betas=(float(b1), float(b2)), eps=float(eps), amsgrad=False, maximize=False, foreach=None,
        capturable=False, differentiable=False, fused=None, decoupled_weight_decay=True,
    )  # fmt: skip
    first = len(groups[0])
    return {
        "state": states,
        "param_groups": [
            {"weight_decay": 0.0, **common, "params": list(range(first))},
            {"weight_decay": float(weight_decay), **common, "params": list(range(first, len(states)))},
        ],
    }
