"""The device mesh and the one rule from a parameter's name and shape to its sharding.

The mesh has three axes, and the batch is split over all of them. They differ in what becomes of parameters, optimizer state
and EMAs (the "state"):

    data    every device has its own copy of the state
    zero    the state is split, and every device gathers whole weights, in the compute type, once per optimizer step (the
            sharded optimizer of ZeRO-2, arXiv 1910.02054)
    fsdp    the state is split, and weights are gathered block by block ahead of use and freed behind it (ZeRO-3)

Programs run manually sharded (`jax.shard_map`), so every transfer between devices is one of the collectives written here and
in `jitjax.exchange`.
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

AXES = ("data", "zero", "fsdp")
BATCH = P(AXES)
# Matrices whose columns are split instead of their rows, so that a step can do without whole ones (`exchange.by_columns`).
COLUMNS = ".adaln.kernel"
# Matrices below this many elements stay whole, as do biases and norm weights: splitting them saves nothing and costs latency.
SMALLEST_SPLIT = 2**14


def make_mesh(data: int | None, zero: int | None, fsdp: int, devices: list[jax.Device] | None = None) -> Mesh:
    """A (data, zero, fsdp) mesh over all devices. None stands for what the others leave: for `zero` first, unless there is
    `fsdp`, so that by default the optimizer is sharded over all devices.

    Raises:
      UserError: data x zero x fsdp is not the number of devices, or both zero and fsdp split the state.
    """
    devices = jax.devices() if devices is None else devices
    n = len(devices)
    flags = " ".join(f"--config.mesh.{k}={v}" for k, v in (("data", data), ("zero", zero), ("fsdp", fsdp)) if v is not None)
    if fsdp > 1 and (zero or 1) > 1:
        raise UserError(f"{flags}: use one of zero and fsdp; fsdp splits all that zero splits")
    if zero is None:
        zero = 1 if fsdp > 1 else max(1, n // (data or 1))
    if data is None:
        data = max(1, n // (zero * fsdp))
    if data * zero * fsdp != n:
        divisors = [f for f in range(1, n + 1) if n % f == 0]
        raise UserError(
            f"{flags} needs {data * zero * fsdp} devices, there are {n}: data x zero x fsdp must be {n}, each one of "
            f"{', '.join(map(str, divisors))}"
        )
    return Mesh(np.asarray(devices).reshape(data, zero, fsdp), AXES)


def mesh_of(settings: Any, devices: list[jax.Device] | None = None) -> Mesh:
    """The mesh of a run: `make_mesh` of its `jitjax.settings.Mesh`."""
    return make_mesh(settings.data, settings.zero, settings.fsdp, devices)


def describe(mesh: Mesh) -> str:
    """What each device holds, in words: "8 devices, sharded optimizer (zero=8)"."""
    data, zero, fsdp = (mesh.shape[axis] for axis in AXES)
    if mesh.size == 1:
        return "1 device"
    form = f"sharded optimizer (zero={zero})" if zero > 1 else f"FSDP (fsdp={fsdp})" if fsdp > 1 else ""
    copies = f"{data} copies of the state" if data > 1 else ""
    return f"{mesh.size} devices, " + ", ".join(filter(None, (form, copies)))


def split_over(mesh: Mesh) -> str:
    """The mesh axis over which the state is split (of size 1 where it is not)."""
    return "zero" if mesh.shape["zero"] > 1 else "fsdp"


def is_small(shape: tuple[int, ...]) -> bool:
    """Whether an array stays whole whatever the mesh."""
    return len(shape) < 2 or math.prod(shape) < SMALLEST_SPLIT


def split_axis(name: str, shape: tuple[int, ...], parts: int) -> int | None:
    """The axis of a parameter that is split: the first that divides evenly, for adaLN the last; None for small or odd ones."""
    if parts == 1 or is_small(shape):
        return None
    divisible = [axis for axis, size in enumerate(shape) if size % parts == 0]
    if not divisible:
        return None
    return divisible[-1] if name.endswith(COLUMNS) else divisible[0]


def spec_of(name: str, shape: tuple[int, ...], mesh: Mesh) -> P:
    """The partition spec of one parameter, by `split_axis`."""
    axis = split_axis(name, shape, mesh.shape[split_over(mesh)])
    return P() if axis is None else P(*(None,) * axis, split_over(mesh))


def specs(tree: Any, mesh: Mesh) -> Any:
    """The partition spec of every array (or shape struct) in a tree, by its global shape and the key of the dictionary that it
    is in, a parameter's name."""
    return jax.tree_util.tree_map_with_path(lambda path, leaf: spec_of(_last_key(path), leaf.shape, mesh), tree)


def _last_key(path: tuple[Any, ...]) -> str:
    return str(getattr(path[-1], "key", "")) if path else ""


def shardings(tree: Any, mesh: Mesh) -> Any:
    """As `specs`, as shardings on the mesh."""
    return jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs(tree, mesh), is_leaf=lambda leaf: isinstance(leaf, P))


def abstract(tree: Any, mesh: Mesh) -> Any:
    """Shape structs with shardings, to restore a checkpoint into."""
    return jax.tree.map(
        lambda leaf, placed: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=placed), tree, shardings(tree, mesh)
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
    index = jnp.int32(0)
    for axis in AXES:
        index = index * mesh.shape[axis] + jax.lax.axis_index(axis)
    return index


def total(tree: Any, mesh: Mesh, axes: tuple[str, ...] = AXES) -> Any:
    """Sum over devices along `axes`; nothing at all on a mesh of size 1 there."""
    axes = tuple(axis for axis in axes if mesh.shape[axis] > 1)
    return jax.lax.psum(tree, axes) if axes else tree


def gather(params: dict, param_specs: dict, dtype: Any) -> dict:
    """Whole parameters from their shards, float32. What is split crosses devices in `dtype`."""

    def whole(shard, spec):
        axis = next((i for i, name in enumerate(spec) if name), None)
        if axis is None:
            return shard
        return jax.lax.all_gather(shard.astype(dtype), spec[axis], axis=axis, tiled=True).astype(shard.dtype)

    return {name: whole(shard, param_specs[name]) for name, shard in params.items()}


def global_norm(grads: dict, param_specs: dict, mesh: Mesh) -> jax.Array:
    """Euclidean norm of gradients of which each device holds its shards."""
    split = _sum_of_squares([grad for name, grad in grads.items() if any(param_specs[name])])
    whole = _sum_of_squares([grad for name, grad in grads.items() if not any(param_specs[name])])
    return jnp.sqrt(total(split, mesh, (split_over(mesh),)) + whole)


def _sum_of_squares(arrays: list[jax.Array]) -> jax.Array:
    """Over all elements of all arrays. Arrays of one shape are squared and added up first, then reduced: a few kernels for
    the repeated blocks of a model instead of two for each parameter."""
    by_shape: dict[tuple[int, ...], list[jax.Array]] = {}
    for array in arrays:
        by_shape.setdefault(array.shape, []).append(jnp.square(array))
    return sum((jnp.sum(functools.reduce(jnp.add, squares)) for squares in by_shape.values()), jnp.float32(0))
