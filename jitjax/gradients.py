"""Gradients of one optimizer step: accumulated over micro-batches, and summed over devices under the backward pass.

On one device: `accumulate`, nothing else. On several that hold whole weights (mesh axes `data`, `zero`), gradients cross
devices once per optimizer step, in groups of blocks during the backward pass of the last micro-batch. With `fsdp` no
device holds whole gradients, so they cross in every micro-batch.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from jitjax import exchange, sharding
from jitjax.kernels import pack

Params = dict[str, jax.Array]
Batch = dict[str, jax.Array]
Objective = Callable[[Params, Any, jax.Array], tuple[jax.Array, jax.Array]]
BLOCKS, BEHIND = "blocks.", ("final.", "class_head.")
GROUP_BYTES = 30 * 10**6  # of gradients that cross devices in one transfer (measured on two H200: docs/speed-notebook.md)
f32 = jnp.float32


def make(
    loss: Callable[..., jax.Array],
    shapes: Params,
    mesh: Mesh,
    *,
    micro_batches: int,
    dtype: str,
    comm_dtype: str,
    packing: pack.Packing = pack.PLAIN,
) -> Callable[[Params, Batch, jax.Array, jax.Array], tuple[Params, jax.Array, jax.Array]]:
    """A function for use inside `jax.shard_map`: (parameters, images and labels, keys (B,), loss scale) -> (gradients, losses,
    number), all of this device; the results are sums over the finite micro-batches of all devices, and of a split parameter the
    device has its own part.

    Args:
      loss: from `step.make_loss`.
      shapes: of the whole parameters.
      dtype: compute type, in which matrices of split parameters cross devices.
      comm_dtype: type in which gradients cross devices.
      packing: from `jitjax.kernels.Ops`.
    """
    if mesh.size == 1:
        return functools.partial(accumulate, objective_of(loss), micro_batches=micro_batches)
    fsdp = mesh.shape["fsdp"] > 1

    def by_columns(name):
        # With `zero`, nothing may cross in earlier micro-batches, and the first block would wait for its product.
        return name.endswith(sharding.COLUMNS) and (fsdp or micro_batches == 1 and not name.startswith(f"{BLOCKS}0."))

    transfers = _Transfers(shapes, mesh, jnp.dtype(dtype), jnp.dtype(comm_dtype), packing, by_columns)
    form = _block_by_block if fsdp else _during_the_last
    return form(loss, transfers, micro_batches)


def objective_of(loss: Callable[..., jax.Array], **options: Any) -> Objective:
    """(parameters, (images, labels, keys), loss scale) -> (what is differentiated, the mean loss)."""

    def objective(params, part, scale):
        value = jnp.mean(loss(params, *part, **options))
        return value * scale, value

    return objective


def accumulate(
    objective: Objective, params: Params, batch: Batch, keys: jax.Array, scale: jax.Array, *, micro_batches: int
) -> tuple[Params, jax.Array, jax.Array]:
    """Gradients of one device's images, accumulated over `micro_batches` equal parts.

    Returns:
      (sum of the finite micro-batches' mean gradients, sum of their mean losses, their number as float32).
    """
    part = batch["image"], batch["label"], keys
    if micro_batches > 1:
        return _multi_steps(objective, params, _cut(part, micro_batches), scale)
    (_, value), grads = jax.value_and_grad(objective, has_aux=True)(params, part, scale)
    return _unscaled(grads, scale), value, f32(1)


def _cut(part: Any, pieces: int) -> Any:
    """The same with a leading axis over `pieces` micro-batches."""
    return jax.tree.map(lambda a: a.reshape(pieces, a.shape[0] // pieces, *a.shape[1:]), part)


def _behind(part: Any, count: jax.Array) -> Any:
    """The same, not to be used before `count` is known, which is never negative: otherwise XLA may hold this part's activations
    while the loop over the earlier parts needs as much for theirs."""
    images, labels, keys = part
    data = jax.random.key_data(keys)
    data += (count < 0).astype(data.dtype)
    return images, labels, jax.random.wrap_key_data(data, impl=jax.random.key_impl(keys))


def _unscaled(grads: Params, scale: jax.Array) -> Params:
    return jax.tree.map(lambda grad: grad.astype(f32) / scale, grads)


def _multi_steps(objective, params, parts, scale, skip=optax.skip_not_finite):
    """`accumulate` by `optax.MultiSteps`, over the leading axis of `parts`.

    MultiSteps serves as the accumulator only, set to emit one micro-step later than there are: the sum is taken from its
    state and AdamW runs once, behind it. (Emitting from inside, it would run the optimizer on every micro-step and select,
    and a device could not wait for the others' gradients.) It leaves out a micro-batch whose gradient is not finite, which
    would otherwise stay in the accumulator as 0 * NaN for good.
    """
    gradient = jax.value_and_grad(objective, has_aux=True)
    accumulator = optax.MultiSteps(
        optax.identity(),
        every_k_schedule=len(parts[-1]) + 1,
        use_grad_mean=False,
        should_skip_update_fn=skip,
    )

    def micro_step(carry, part):
        state, loss_sum = carry
        (_, value), grads = gradient(params, part, scale)
        _, new_state = accumulator.update(_unscaled(grads, scale), state, params)
        counted = new_state.mini_step > state.mini_step
        return (new_state, loss_sum + jnp.where(counted, value, 0)), None

    (state, loss_sum), _ = jax.lax.scan(micro_step, (accumulator.init(params), f32(0)), parts)
    return state.acc_grads, loss_sum, state.mini_step.astype(f32)


class _Transfers:
    """What crosses devices, for each parameter on a mesh of several devices."""

    def __init__(
        self,
        shapes: Params,
        mesh: Mesh,
        dtype: Any,
        comm_dtype: Any,
        packing: pack.Packing,
        by_columns: Callable[[str], bool],
    ):
        """by_columns: for the names of parameters that do not cross where they are split by columns
        (`jitjax.exchange.by_columns`)."""
        self.mesh, self.specs = mesh, sharding.specs(shapes, mesh)
        parts = mesh.shape[sharding.split_over(mesh)]
        self._axes = {name: sharding.split_axis(name, shape.shape, parts) for name, shape in shapes.items()}
        # In their order: that of a set would give every process another program.
        self._in_place = [name for name, axis in self._axes.items() if axis == 1 and by_columns(name)]
        self.options = {}  # of the loss
        if self._in_place:
            options = dict(split=self._in_place, mesh=mesh, packing=packing)
            self.options["condition"] = functools.partial(exchange.by_columns, **options)
        # Biases and norm weights cross together at the end: one by one they would cost more in latency than they take.
        self._small = sorted(name for name, shape in shapes.items() if sharding.is_small(shape.shape))
        # The network casts its matrices to the compute type in any case, and adds up class and position embeddings in float32.
        self._types = {name: dtype if name.endswith(".kernel") else f32 for name in shapes}
        self._comm_dtype, self._packing = comm_dtype, packing

    def _stays(self, name: str) -> bool:
        return name in self._small or name in self._in_place

    def gather(self, shards: Params, turn: jax.Array | None = None) -> tuple[Params, jax.Array]:
        """Parameters, as the network takes them, and the next turn."""
        kept = {name: shard for name, shard in shards.items() if self._stays(name)}
        split = {name: shard for name, shard in shards.items() if not self._stays(name)}
        whole, turn = exchange.gather(split, self._axes, self._types, self.mesh, self._packing, turn)
        return kept | whole, turn

    def gather_in_turn(self, shards: Params) -> Params:
        """The same, one block after the other, as the forward pass needs them; with the first what is in front of it."""
        groups = _groups({name: shard.size for name, shard in shards.items()}, 1)[::-1]
        if len(groups) > 1:
            groups[:2] = [groups[1] + groups[0]]
        whole, turn = {}, None
        for group in groups:
            gathered, turn = self.gather({name: shards[name] for name in group}, turn)
            whole |= gathered
        return whole

    def send(
        self, grads: Params, turn: jax.Array | None = None, packing: pack.Packing | None = None
    ) -> tuple[Params, jax.Array]:
        """The sums over devices, float32, and the next turn; small ones stay this device's until `finish`."""
        kept = {name: grad.astype(f32) for name, grad in grads.items() if self._stays(name)}
        leaving = {name: grad for name, grad in grads.items() if not self._stays(name)}
        sums, turn = exchange.reduce(leaving, self._axes, self.mesh, self._comm_dtype, packing or self._packing, turn)
        return kept | sums, turn

    def finish(
        self, grads: Params, loss_sum: jax.Array, count: jax.Array, scale: jax.Array | None = None
    ) -> tuple[Params, jax.Array, jax.Array]:
        """Sums over devices of what has not crossed yet.

        Args:
          scale: the loss scale, where the gradients still carry it. In front of the sum, taking it out would cost every bias a
            kernel of its own.
        """
        rest = {name: grads[name] for name in self._small} | {"loss": loss_sum, "count": count}
        rest = exchange.sum_together(rest, self.mesh)
        loss_sum, count = rest.pop("loss"), rest.pop("count")
        grads |= rest
        if self.mesh.shape["data"] > 1:  # sums over the devices that the state is split over so far
            in_place = {name: grads[name].astype(self._comm_dtype) for name in self._in_place}
            in_place = sharding.total(in_place, self.mesh, ("data",))
            grads |= {name: grad.astype(f32) for name, grad in in_place.items()}
        return grads if scale is None else _unscaled(grads, scale), loss_sum, count

    def slots(self, params: Params) -> Params:
        """What to differentiate `leaving` with respect to: zeros, and the parameters that do not cross."""
        return {name: value if name in self._in_place else jnp.zeros(value.shape, f32) for name, value in params.items()}

    def leaving(self, slots: Params, whole: Params, sent: Params, scale: jax.Array) -> Params:
        """`exchange.leave` for all of `whole` that crosses, group by group."""
        result, turn = {name: slots[name] for name in self._in_place if name in whole}, exchange.first_turn(self.mesh)
        sizes = {name: value.size * value.dtype.itemsize for name, value in whole.items() if name not in result}
        for group in reversed(_groups(sizes, GROUP_BYTES)):
            slot, values, before = ({name: tree[name] for name in group if tree} for tree in (slots, whole, sent))
            values, turn = exchange.leave(slot, values, turn, before or None, scale, self.send)
            result |= values
        return result


def _groups(sizes: dict[str, int], limit: int) -> list[list[str]]:
    """Which parameters cross devices together: successive blocks until their sizes reach `limit`, the last ones first, as the
    backward pass comes to them; with the first group what is behind the blocks, and at the end what is in front of them."""

    def block(name):
        if name.startswith(BLOCKS):
            return int(name.removeprefix(BLOCKS).split(".")[0])
        return len(sizes) if name.startswith(BEHIND) else -1

    groups, size_of_last = [], limit
    for _, names in itertools.groupby(sorted(sizes, key=block, reverse=True), block):
        names = list(names)
        if size_of_last >= limit:
            groups.append([])
            size_of_last = 0
        groups[-1] += names
        size_of_last += sum(sizes[name] for name in names)
    return groups


def _during_the_last(loss, transfers, micro_batches):
    objective = objective_of(loss, **transfers.options)

    def summed(params, batch, keys, scale):
        whole = transfers.gather_in_turn(params)
        last, sent, loss_sum, count = (batch["image"], batch["label"], keys), {}, f32(0), f32(0)
        if micro_batches > 1:
            parts = _cut(last, micro_batches)
            earlier, last = jax.tree.map(lambda a: a[:-1], parts), jax.tree.map(lambda a: a[-1], parts)
            sent, loss_sum, count = _multi_steps(objective, whole, earlier, scale)
            last = _behind(last, count)

        def leaving(slots, part, scale):
            return objective(transfers.leaving(slots, whole, sent, scale), part, scale)

        (_, value), grads = jax.value_and_grad(leaving, has_aux=True)(transfers.slots(params), last, scale)
        if micro_batches == 1:
            return transfers.finish(grads, value, f32(1), scale)
        result = transfers.finish(grads, loss_sum + value, count + 1)

        def without_the_last():
            # Hardly ever run: not worth compiling a kernel for all parameters.
            sums, _ = transfers.send(sent, packing=pack.PLAIN)
            return transfers.finish(sums, loss_sum, count)

        # A last micro-batch that is not finite on one device spoils the sums of all, which are then sent without it.
        finite = jnp.isfinite(sharding.global_norm(result[0], transfers.specs, transfers.mesh))
        return jax.lax.cond(finite, lambda: result, without_the_last)

    return summed


def _block_by_block(loss, transfers, micro_batches):
    def by_name(act, block, turn):
        """`act`, gather or send, on a block's parameters by name; all blocks have the shapes of the first."""
        paths, structure = jax.tree_util.tree_flatten_with_path(block)
        names = [f"{BLOCKS}0." + ".".join(key.name for key in path).removesuffix(".value") for path, _ in paths]
        result, turn = act(dict(zip(names, (leaf for _, leaf in paths), strict=True)), turn)
        return jax.tree.unflatten(structure, [result[name] for name in names]), turn

    def gather(block, anchor):
        return by_name(transfers.gather, block, None if anchor is None else exchange.turn_behind(anchor, transfers.mesh))[0]

    run_blocks = exchange.block_by_block(gather, functools.partial(by_name, transfers.send))
    objective = objective_of(loss, run_blocks=run_blocks, **transfers.options)

    def summed(params, batch, keys, scale):
        outside = {name: value for name, value in params.items() if not name.startswith(BLOCKS)}
        whole, _ = transfers.gather(outside)

        def leaving(slots, part, scale):
            return objective(slots | transfers.leaving(slots, whole, {}, scale), part, scale)

        def skip(updates, *arguments):
            """Of all devices or of none: the gradients that they hold are of all their images."""
            bad, info = optax.skip_not_finite(updates, *arguments)
            return sharding.total(bad.astype(f32), transfers.mesh) > 0, info

        slots = params | transfers.slots(outside)
        part = batch["image"], batch["label"], keys
        if micro_batches == 1:
            (_, value), grads = jax.value_and_grad(leaving, has_aux=True)(slots, part, scale)
            return transfers.finish(grads, value, f32(1), scale)
        return transfers.finish(*_multi_steps(leaving, slots, _cut(part, micro_batches), scale, skip))

    return summed
