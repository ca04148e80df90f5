"""Whether the numbers of a run's state are finite: asked before each save, and after weights were read."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jitjax.step import TrainState


def not_finite(state: TrainState) -> str:
    """Name of the first part of `state` with a number that is not finite, "" where there is none. Waits for the device."""
    finite = jax.device_get(all_finite(groups_of(state)))
    return next((name for name in groups_of(state) if not finite[name]), "")


def groups_of(state: TrainState) -> dict[str, Any]:
    """The parts of a state whose numbers must be finite, by the name that messages give them."""
    return {
        "weights": state.params,
        **{f"EMA {decay} weights": params for decay, params in state.ema.items()},
        "optimizer moments": state.opt_state,
    }


def all_finite(groups: Mapping[str, Any]) -> dict[str, jax.Array]:
    """Whether every number of every float array in each tree is finite: a bool scalar a group on the devices; does not wait."""
    # One small program a shape instead of one of a thousand reductions, which would take seconds to compile. Each device looks
    # at what it holds; they talk to each other in the last program only. (Emulated devices that reduce many arrays at once can
    # wait for each other for ever.)
    return _all({name: [_flags_of(leaf.sharding)(leaf) for leaf in _floats(tree)] for name, tree in groups.items()})


def compile_all_finite(groups: Mapping[str, Any]) -> None:
    """Compile what `all_finite` needs for such trees (shape structs with shardings), so that it runs at once later."""
    compiled = {}

    def flag_of(leaf):
        kind = leaf.shape, leaf.dtype, leaf.sharding
        if kind not in compiled:
            lowered = _flags_of(leaf.sharding).lower(leaf)
            (placed,) = jax.tree.leaves(lowered.compile().output_shardings)
            compiled[kind] = jax.ShapeDtypeStruct(lowered.out_info.shape, jnp.bool_, sharding=placed)
        return compiled[kind]

    _all.lower({name: [flag_of(leaf) for leaf in _floats(tree)] for name, tree in groups.items()}).compile()


def _floats(tree: Any) -> list[Any]:
    return [leaf for leaf in jax.tree.leaves(tree) if jnp.issubdtype(leaf.dtype, jnp.floating)]


@functools.lru_cache
def _flags_of(placed: jax.sharding.Sharding) -> Callable[[jax.Array], jax.Array]:
    """Jitted: an array that is sharded like this -> a bool for each device, whether all that it holds is finite."""

    def flag(x):
        return jnp.all(jnp.isfinite(x))[None]

    if not isinstance(placed, jax.sharding.NamedSharding):
        return jax.jit(flag)
    mesh, every = placed.mesh, jax.sharding.PartitionSpec(placed.mesh.axis_names)
    return jax.jit(jax.shard_map(flag, mesh=mesh, in_specs=placed.spec, out_specs=every, check_vma=False))


@jax.jit
def _all(flags: dict[str, list[jax.Array]]) -> dict[str, jax.Array]:
    return {name: jnp.all(jnp.concatenate(found)) if found else jnp.bool_(True) for name, found in flags.items()}
