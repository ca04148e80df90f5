"""Weights and gradients between devices, under the computation; for use inside `jax.shard_map`.

What a training step sends, of parameters that are split, crosses as an all-to-all of packed groups of arrays: of weights each
device sends its part to all others, of gradients each device sends every other the part that the other one owns, to be added
up in float32, in the same order on every run. Instead of adaLN's weights its inputs and products cross (`by_columns`). Inside
one process the copy engines do all that, which leave the multiprocessors to the computation (`jitjax.runtime`). Between
processes weights cross by NCCL's all-gather, which brings a part to a node once.

Gradients are on their way as soon as the backward pass has them: `leave` and `block_by_block` put the transfers into the
backward pass itself, a few blocks at a time, and nothing waits for them before the optimizer. When exactly a transfer starts is
up to XLA's scheduler, which left to itself puts gradients at the end and weights at the start. So they go in turn: each takes
along a few numbers that the one before it has brought (`turn`), and has to wait for them.
"""

from __future__ import annotations

import functools
import itertools
import os
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.xla_metadata import set_xla_metadata
from jax.extend.core import ClosedJaxpr, Literal, jaxpr_as_fun
from jax.flatten_util import ravel_pytree
from jax.sharding import Mesh

from jitjax import sharding
from jitjax.kernels import pack

f32 = jnp.float32
TURN = 64  # numbers: 128 bytes of bfloat16
SCHEDULE = {
    # XLA's scheduler leaves a transfer the time of a few matmuls, and more with a stream of its own. (By the model of these
    # links that it would take otherwise, it leaves the time of one: docs/speed-notebook.md.)
    "xla_gpu_enable_latency_hiding_scheduler": True,
    "xla_gpu_enable_analytical_sol_latency_estimator": False,
    # One matmul for the modulations of all blocks would want a third of all weights before the first block, where they cross.
    "xla_gpu_dot_merger_threshold_mb": 0,
}
# In one process. Between several, NCCL's kernels of two streams could keep each other from running.
OWN_STREAM = {"_xla_gpu_collective_stream": "p2p"}
Arrays = Mapping[str, jax.Array]
Stage = Callable[[Any, Any, Any], Any]  # (block's parameters, carry, shared) -> carry
Send = Callable[[Arrays, jax.Array], tuple[Arrays, jax.Array]]  # (gradients, turn) -> (sums, next turn)
Run = Callable[[Sequence[Stage], Sequence[Any], Any, Any], Any]  # (stages, blocks, carry, shared) -> carry


def compiler_options(mesh: Mesh) -> dict[str, Any] | None:
    """For `jax.jit` of a training step with transfers that go in turn between GPUs, but for what the user's XLA_FLAGS name."""
    if mesh.shape[sharding.split_over(mesh)] == 1 or mesh.devices.flat[0].platform != "gpu":
        return None
    return {name: value for name, value in SCHEDULE.items() if name not in os.environ.get("XLA_FLAGS", "")}


def first_turn(mesh: Mesh) -> jax.Array:
    """The turn of the first transfer, which waits for none: (devices over which the state is split, 64), float32."""
    return jnp.zeros((mesh.shape[sharding.split_over(mesh)], TURN), f32)


def turn_behind(anchor: Any, mesh: Mesh) -> jax.Array:
    """The turn of a transfer that waits for every floating-point array of a tree."""
    leaves = [leaf for leaf in jax.tree.leaves(anchor) if jnp.issubdtype(leaf.dtype, jnp.inexact)]
    return jnp.broadcast_to(sum(leaf.ravel()[:1].astype(f32) for leaf in leaves), first_turn(mesh).shape)


def gather(
    shards: Arrays,
    axes: Mapping[str, int | None],
    types: Mapping[str, Any],
    mesh: Mesh,
    packing: pack.Packing = pack.PLAIN,
    turn: jax.Array | None = None,
) -> tuple[dict[str, jax.Array], jax.Array]:
    """Whole arrays from the parts that devices own, in `types`, in which they also cross.

    All that are split cross together, one transfer for each type: a transfer costs the host 65 us, the copy into one buffer
    less (measured on two H200).

    Args:
      axes: along which each array is split; None where every device has it whole.
      turn: of the transfer before; default that of the first.

    Returns:
      (the arrays, the turn of the next transfer).
    """
    turn = first_turn(mesh) if turn is None else turn
    whole, packs = {}, {}
    for name, shard in shards.items():
        if axes[name] is None:
            whole[name] = shard.astype(types[name])
        else:
            packs.setdefault(jnp.dtype(types[name]), {})[name] = shard
    for kind, members in packs.items():
        parts = [shard[None] for shard in members.values()]
        if jax.process_count() == 1:
            received = _all_to_all(packing.pack([*parts, turn], kind), mesh)
        else:
            received = jax.lax.all_gather(packing.pack([*parts, turn[:1]], kind), sharding.split_over(mesh), tiled=True)
        turn = received[:, :TURN].astype(f32)
        rows = packing.unpack(received, [shard.size for shard in members.values()])
        for (name, shard), parts in zip(members.items(), rows, strict=True):
            whole[name] = _from_owners(parts.reshape(len(parts), *shard.shape), axes[name])
    return whole, turn


def reduce(
    grads: Arrays,
    axes: Mapping[str, int | None],
    mesh: Mesh,
    dtype: Any,
    packing: pack.Packing = pack.PLAIN,
    turn: jax.Array | None = None,
) -> tuple[Arrays, jax.Array]:
    """The sums of gradients over all devices, float32: of an array that is split, the part that this device owns. All that
    are split cross together, one transfer for each type.

    Args:
      grads: this device's gradients of whole arrays.
      axes: along which each array is split; None where every device has it whole.
      dtype: the widest type in which gradients cross devices. Those of a narrower one cross as they are.
      turn: of the transfer before; default that of the first.

    Returns:
      (the sums, the turn of the next transfer).
    """
    over = sharding.split_over(mesh)
    turn = first_turn(mesh) if turn is None else turn
    sums, packs = {}, {}
    for name, grad in grads.items():
        if axes[name] is None:
            sums[name] = sharding.total(grad.astype(dtype), mesh).astype(f32)
            continue
        kind = min(grad.dtype, jnp.dtype(dtype), key=lambda kind: jnp.finfo(kind).bits)
        packs.setdefault(kind, {})[name] = _by_owner(grad, axes[name], mesh.shape[over])
    for kind, members in packs.items():
        packed = packing.pack([*members.values(), turn], kind)
        with set_xla_metadata(**OWN_STREAM if jax.process_count() == 1 else {}):
            received = _all_to_all(packed, mesh)
        rows = pack.plain_unpack(received, [parts[0].size for parts in members.values()])  # XLA reads them in the sums
        for (name, parts), row in zip(members.items(), rows, strict=True):
            mine = jnp.sum(row.astype(f32), axis=0).reshape(parts.shape[1:])
            sums[name] = sharding.total(mine.astype(dtype), mesh, ("data",)).astype(f32) if mesh.shape["data"] > 1 else mine
        turn = received[:, :TURN].astype(f32)
    return sums, turn


def _all_to_all(packed: jax.Array, mesh: Mesh) -> jax.Array:
    """Sends row i to device i of those over which the state is split; row i of the result is from device i."""
    return jax.lax.all_to_all(packed, sharding.split_over(mesh), 0, 0, tiled=True)


def _by_owner(array: jax.Array, axis: int, parts: int) -> jax.Array:
    """(parts, ...): what each device owns of an array that is split along `axis`."""
    cut = array.reshape(*array.shape[:axis], parts, array.shape[axis] // parts, *array.shape[axis + 1 :])
    return jnp.moveaxis(cut, axis, 0)


def _from_owners(parts: jax.Array, axis: int) -> jax.Array:
    """The inverse of `_by_owner`."""
    shape = parts.shape[1:]
    return jnp.moveaxis(parts, 0, axis).reshape(*shape[:axis], len(parts) * shape[axis], *shape[axis + 1 :])


def sum_together(arrays: dict[str, jax.Array], mesh: Mesh) -> dict[str, jax.Array]:
    """The sums over all devices of many small float32 arrays, in one transfer."""
    flat, apart = ravel_pytree(arrays)
    return apart(sharding.total(flat, mesh))


@jax.named_scope("by_columns")
def by_columns(
    kernels: Arrays, inputs: Arrays, split: Collection[str], mesh: Mesh, packing: pack.Packing = pack.PLAIN
) -> dict[str, jax.Array]:
    """input @ kernel of the kernels named in `split`, of which each device has its columns.

    Not weights cross and come back as gradients, but the inputs to all devices, and of the products each device's rows to it:
    fewer numbers where inputs have fewer rows than kernels. Kernels of one shape are multiplied as one batch.

    Args:
      kernels: this device's columns, (D, P / devices).
      inputs: this device's rows, (B, D); one array for several kernels crosses once.

    Returns:
      (B, P) each, in the type of the input.
    """
    count = mesh.shape[sharding.split_over(mesh)]
    batches, whole = {}, {}
    for name in (name for name in kernels if name in split):
        batches.setdefault((id(inputs[name]), kernels[name].shape), []).append(name)
        whole[id(inputs[name])] = inputs[name]
    for key, rows in whole.items():
        everywhere = _all_to_all(jnp.broadcast_to(rows, (count, *rows.shape)), mesh)
        whole[key] = everywhere.reshape(-1, rows.shape[1])

    leaving = []
    for (key, _), names in batches.items():
        product = _products(whole[key], [kernels[name] for name in names], packing)  # (K, devices B, P / devices)
        leaving.append(jnp.swapaxes(product.reshape(len(names), count, -1, product.shape[2]), 0, 1))
    received = _all_to_all(jnp.concatenate([part.reshape(count, -1) for part in leaving], axis=1), mesh)
    ends, products = list(itertools.accumulate(part.size // count for part in leaving)), {}
    for names, part, mine in zip(batches.values(), leaving, jnp.split(received, ends[:-1], axis=1), strict=True):
        rows = jnp.moveaxis(mine.reshape(part.shape), 0, 2)  # (K, B, devices, P / devices)
        products |= zip(names, rows.reshape(*rows.shape[:2], -1), strict=True)
    return products


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _products(rows: jax.Array, kernels: Sequence[jax.Array], packing: pack.Packing) -> jax.Array:
    """rows @ kernel of each, (K, B, P), as one batch in the type of the rows. Gradients are added up in float32."""
    return _products_forward(rows, kernels, packing)[0]


def _products_forward(rows, kernels, packing):
    batch = packing.pack([kernel[None] for kernel in kernels], rows.dtype).reshape(len(kernels), *kernels[0].shape)
    return jnp.broadcast_to(rows, (len(kernels), *rows.shape)) @ batch, (rows, batch)


def _products_backward(packing, saved, grads):
    rows, batch = saved
    # By default a GPU rounds float32 to TF32; the network's own matmuls (`model.JiT`) set the precision for the same reason.
    product = functools.partial(jnp.einsum, preferred_element_type=f32, precision="float32" if rows.dtype == f32 else None)
    of_rows = product("kbp,kdp->kbd", grads, batch)
    of_kernels = product("kbd,kbp->kdp", jnp.broadcast_to(rows, (len(batch), *rows.shape)), grads)
    return jnp.sum(of_rows, axis=0).astype(rows.dtype), list(of_kernels)


_products.defvjp(_products_forward, _products_backward)


def leave(
    slots: Arrays, values: Arrays, turn: jax.Array, sent: Arrays | None, scale: jax.Array, send: Send
) -> tuple[Arrays, jax.Array]:
    """`values`, whose gradients are sent, together, as soon as the backward pass has them all, and the next call's `turn`.

    Args:
      slots: zeros of the shapes of what `send` returns. Differentiate with respect to them: their gradients are
        send(gradients of values), or send(sent + gradients / scale) where there is something to add.
      turn: `first_turn`, or what the call before returned: the values that leave first in the backward pass come last here.
      sent: what earlier micro-batches add to the gradients, float32, or None.
      scale: the loss scale.
    """

    @jax.custom_vjp
    def identity(slots, values, turn, sent, scale):
        return values, turn

    def forward(slots, values, turn, sent, scale):
        return (values, turn), (sent, scale)

    def backward(saved, grads):
        (sent, scale), (grads, turn) = saved, grads
        if sent is not None:
            grads = jax.tree.map(lambda before, grad: before + grad.astype(f32) / scale, sent, grads)
        sums, turn = send(grads, turn)
        return sums, None, turn, None, None

    identity.defvjp(forward, backward)
    return identity(slots, values, turn, sent, scale)


# ---------------------------------------------------------------- block by block (FSDP)


def block_by_block(gather: Callable[[Any, Any], Any], scatter: Callable[[Any, Any], Any]) -> Run:
    """How to run the blocks of a model of which each device holds shards (`jitjax.model.in_sequence` is the plain way).

    In both passes a block's weights are gathered while its predecessor computes, and freed behind it: the backward pass
    gathers them again, and computes again what depends on weights alone (casts, permutations). A block's gradients are sent
    while the next one is differentiated.

    Args:
      gather: (shards of a block's parameters, what it waits for or None) -> whole parameters.
      scatter: (gradients of whole parameters, turn or None) -> (the shards of their sum, the next turn).
    """

    def run(stages, blocks, carry, shared):
        plans: list[_Plan] = []

        @jax.custom_vjp
        def apply(shards, carry, shared):
            return forward(shards, carry, shared)[0]

        def forward(shards, carry, shared):
            plans.clear()
            saved, last = [], len(stages) - 1
            following = gather(shards[0], None)
            for i, stage in enumerate(stages):
                whole, following = following, gather(shards[i + 1], carry) if i < last else None
                own = _after(shared, carry)
                plans.append(_Plan(stage, whole, carry, own))
                carry, rest = plans[-1].forward(whole, carry, own)
                saved.append(rest)
            return carry, (shards, saved, whole)  # the last block's weights are needed again at once

        def backward(residuals, grad):
            shards, saved, following = residuals
            grads, grad_shared, own, turn = [], None, None, None
            for i in reversed(range(len(stages))):
                whole, following = following, gather(shards[i - 1], (grad, own)) if i else None
                grad_whole, grad, own = plans[i].backward(whole, saved[i], grad)
                sums, turn = scatter(grad_whole, turn)
                grads.append(sums)
                grad_shared = own if grad_shared is None else jax.tree.map(_add, grad_shared, own)
            return grads[::-1], grad, grad_shared

        apply.defvjp(forward, backward)
        return apply(list(blocks), carry, shared)

    return run


def _after(values: Any, anchor: Any) -> Any:
    """`values`, not to be read before `anchor` has been computed: otherwise XLA computes a later block's modulation while an
    earlier block runs, and waits for its weights there."""
    leaves, structure = jax.tree.flatten(values)
    held = [i for i, leaf in enumerate(leaves) if jnp.issubdtype(leaf.dtype, jnp.inexact)]  # keys are free to pass
    values, _ = jax.lax.optimization_barrier(([leaves[i] for i in held], anchor))
    for i, value in zip(held, values, strict=True):
        leaves[i] = value
    return jax.tree.unflatten(structure, leaves)


def _add(a: jax.Array, b: jax.Array) -> jax.Array:
    return a if a.dtype == jax.dtypes.float0 else a + b  # keys have no gradient


class _Plan:
    """One stage's forward and backward pass; between them stand its residuals, but for those that follow from weights alone."""

    def __init__(self, stage: Stage, whole: Any, carry: Any, shared: Any):
        def forward(whole, carry, shared):
            return jax.vjp(stage, whole, carry, shared)

        self.program, (carry_out, vjp) = jax.make_jaxpr(forward, return_shape=True)(whole, carry, shared)
        self.carry_tree, self.vjp_tree = jax.tree.structure(carry_out), jax.tree.structure(vjp)
        jaxpr = self.program.jaxpr
        weights = jaxpr.invars[: len(jax.tree.leaves(whole))]
        known, equations = {*weights, *jaxpr.constvars}, []
        for eqn in jaxpr.eqns:
            if not eqn.effects and all(isinstance(v, Literal) or v in known for v in eqn.invars):
                known.update(eqn.outvars)
                equations.append(eqn)
        residuals = jaxpr.outvars[self.carry_tree.num_leaves :]
        self.again = [not isinstance(v, Literal) and v in known for v in residuals]
        wanted = [v for v, again in zip(residuals, self.again, strict=True) if again]
        part = jaxpr.replace(invars=weights, eqns=equations, outvars=wanted, debug_info=None)
        self.from_weights = jaxpr_as_fun(ClosedJaxpr(part, self.program.consts))

    def forward(self, whole: Any, carry: Any, shared: Any) -> tuple[Any, list[jax.Array]]:
        outputs = jaxpr_as_fun(self.program)(*jax.tree.leaves((whole, carry, shared)))
        count = self.carry_tree.num_leaves
        rest = [value for value, again in zip(outputs[count:], self.again, strict=True) if not again]
        return jax.tree.unflatten(self.carry_tree, outputs[:count]), rest

    def backward(self, whole: Any, rest: Sequence[jax.Array], grad: Any) -> Any:
        """Gradients of (whole, carry, shared)."""
        derived, rest = iter(self.from_weights(*jax.tree.leaves(whole))), iter(rest)
        vjp = jax.tree.unflatten(self.vjp_tree, [next(derived if again else rest) for again in self.again])
        return vjp(grad)
