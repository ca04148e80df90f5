"""Copies of arrays on devices in the host's page-locked memory, made while training goes on."""

from __future__ import annotations

import functools
from typing import Any

import jax

_HOST_MEMORY = "pinned_host"


def to_host(tree: Any) -> Any:
    """A copy of `tree` in the host's page-locked memory, one replica of each array. Only dispatched: the devices copy it
    between the steps that are under way and the next one. One process only."""
    leaves, structure = jax.tree.flatten(tree)
    placed = [one_replica(leaf.sharding) for leaf in leaves]
    if all(p.device_set == leaf.sharding.device_set for leaf, p in zip(leaves, placed, strict=True)):
        return jax.tree.unflatten(structure, jax.device_put(leaves, placed))  # nothing is replicated: half the time
    shards = [
        [s.data for s in leaf.addressable_shards if s.device in p.device_set] for leaf, p in zip(leaves, placed, strict=True)
    ]
    kinds = [[shard.sharding.with_memory_kind(_HOST_MEMORY) for shard in own] for own in shards]
    copies = jax.device_put(shards, kinds)
    return jax.tree.unflatten(
        structure,
        [
            jax.make_array_from_single_device_arrays(leaf.shape, place, own)
            for leaf, place, own in zip(leaves, placed, copies, strict=True)
        ],
    )


@functools.lru_cache(maxsize=64)
def one_replica(of: jax.sharding.Sharding) -> jax.sharding.Sharding:
    """`of` in host memory, on the part of its mesh that holds every number once."""
    if not isinstance(of, jax.sharding.NamedSharding):
        return of.with_memory_kind(_HOST_MEMORY)
    used = {name for entry in of.spec if entry is not None for name in (entry if isinstance(entry, tuple) else (entry,))}
    devices = of.mesh.devices[tuple(slice(None) if name in used else slice(1) for name in of.mesh.axis_names)]
    mesh = jax.sharding.Mesh(devices, of.mesh.axis_names, axis_types=of.mesh.axis_types)
    return jax.sharding.NamedSharding(mesh, of.spec, memory_kind=_HOST_MEMORY)
