"""The device mesh and the one rule from an array's shape to its sharding.

The mesh has two axes. The batch is split over both; parameters, optimizer state and EMAs are split over `fsdp` and
repeated along `data`. The training step runs manually sharded (`jax.shard_map`), so every transfer between devices is one
of the few collectives written here.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jitjax.errors import UserError

AXES = ("data", "fsdp")
BATCH = P(AXES)
# Arrays below this many elements stay whole: splitting biases and norm weights saves nothing and costs latency.
SMALLEST_SPLIT = 2**14


def make_mesh(data: int | None, fsdp: int, devices: list[jax.Device] | None = None) -> Mesh:
    """A (data, fsdp) mesh over all devices.

    Raises:
      UserError: data x fsdp is not the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    n = len(devices)
    wanted = (data if data is not None else max(1, n // fsdp)) * fsdp
    if wanted != n:
        fitting = ", ".join(f"{n // f}x{f}" for f in range(1, n + 1) if n % f == 0)
        flag = f"--config.mesh.data={data} " if data is not None else ""
        raise UserError(
            f"{flag}--config.mesh.fsdp={fsdp} needs {wanted} devices, there are {n}: data x fsdp must be one of {fitting}"
        )
    return Mesh(np.asarray(devices).reshape(n // fsdp, fsdp), AXES)


def split_axis(shape: tuple[int, ...], fsdp: int) -> int | None:
    """The axis of an array that `fsdp` splits: the largest that divides evenly, or None for small or odd arrays."""
    if fsdp == 1 or math.prod(shape) < SMALLEST_SPLIT:
        return None
    fitting = [axis for axis, size in enumerate(shape) if size % fsdp == 0]
    return max(fitting, key=lambda axis: shape[axis], default=None)


def spec_of(shape: tuple[int, ...], fsdp: int) -> P:
    axis = split_axis(shape, fsdp)
    return P() if axis is None else P(*(None,) * axis, "fsdp")


def specs(tree: Any, mesh: Mesh) -> Any:
    """The partition spec of every array (or shape struct) in a tree, by its global shape."""
    return jax.tree.map(lambda leaf: spec_of(leaf.shape, mesh.shape["fsdp"]), tree)


def shardings(tree: Any, mesh: Mesh) -> Any:
    return jax.tree.map(lambda leaf: NamedSharding(mesh, spec_of(leaf.shape, mesh.shape["fsdp"])), tree)


def abstract(tree: Any, mesh: Mesh) -> Any:
    """Shape structs with shardings, to restore a checkpoint into."""
    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(
            leaf.shape, leaf.dtype, sharding=NamedSharding(mesh, spec_of(leaf.shape, mesh.shape["fsdp"]))
        ),
        tree,
    )


def replicated(tree: Any) -> Any:
    """Whole arrays on the host of every process. All processes must call it."""
    if jax.process_count() == 1:
        return jax.device_get(tree)
    from jax.experimental import multihost_utils

    return multihost_utils.process_allgather(tree, tiled=True)


# ---------------------------------------------------------------- collectives, for use inside shard_map


def device_index(mesh: Mesh) -> jax.Array:
    """Position of this device in the order in which the batch is split."""
    return jax.lax.axis_index("data") * mesh.shape["fsdp"] + jax.lax.axis_index("fsdp")


def _present(mesh: Mesh, axes: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(axis for axis in axes if mesh.shape[axis] > 1)


def total(tree: Any, mesh: Mesh, axes: tuple[str, ...] = AXES) -> Any:
    """Sum over devices along `axes`; nothing at all on a mesh of size 1 there."""
    axes = _present(mesh, axes)
    return jax.lax.psum(tree, axes) if axes else tree


def gather(params: dict, param_specs: dict, mesh: Mesh, dtype: Any) -> dict:
    """Whole parameters from their `fsdp` shards, float32. Crosses devices in `dtype`."""

    def whole(value, spec):
        if "fsdp" not in spec:
            return value
        axis = spec.index("fsdp")
        return jax.lax.all_gather(value.astype(dtype), "fsdp", axis=axis, tiled=True).astype(value.dtype)

    return {name: whole(params[name], param_specs[name]) for name in params}


def sum_gradients(grads: dict, param_specs: dict, mesh: Mesh, dtype: Any) -> dict:
    """Sum over all devices, each keeping the shard it owns: reduce-scatter over `fsdp`, all-reduce over `data`."""

    def reduced(grad, spec):
        grad = grad.astype(dtype)
        if "fsdp" in spec:
            grad = jax.lax.psum_scatter(grad, "fsdp", scatter_dimension=spec.index("fsdp"), tiled=True)
            return total(grad, mesh, ("data",))
        return total(grad, mesh)

    return {name: reduced(grads[name], param_specs[name]).astype(jnp.float32) for name in grads}


def global_norm(grads: dict, param_specs: dict, mesh: Mesh) -> jax.Array:
    """Euclidean norm of gradients of which each device holds its shards."""
    split = _sum_of_squares([grad for name, grad in grads.items() if "fsdp" in param_specs[name]])
    whole = _sum_of_squares([grad for name, grad in grads.items() if "fsdp" not in param_specs[name]])
    return jnp.sqrt(total(split, mesh, ("fsdp",)) + whole)


def _sum_of_squares(arrays: list[jax.Array]) -> jax.Array:
    """Over all elements of all arrays. Arrays of one shape are squared and added up first, then reduced: a few kernels for
    the repeated blocks of a model instead of two for each parameter."""
    by_shape: dict[tuple[int, ...], list[jax.Array]] = {}
    for array in arrays:
        by_shape.setdefault(array.shape, []).append(jnp.square(array))
    return sum((jnp.sum(functools.reduce(jnp.add, squares)) for squares in by_shape.values()), jnp.float32(0))
