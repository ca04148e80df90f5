"""Muon: momentum with all its singular values brought near 1, for the matrices of the blocks; AdamW moves the rest.

Source: Jordan et al., "Muon: an optimizer for hidden layers in neural networks" (kellerjordan.github.io/posts/muon, 2024); the
scale that lets AdamW's learning rate serve: Liu et al., "Muon is scalable for LLM training" (arXiv 2502.16982).

A matrix that stands for several linear maps side by side (`PARTS`) is cut into them first. Matrices of one shape are
orthogonalised as one batch, and the batch is shared out: each device has whole matrices to do, which cross once there and once
back, in bfloat16. `optax.contrib.muon` does the same to each matrix by itself, on every device again and only to whole ones;
from Optax is the momentum.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from jitjax import sharding
from jitjax.gradients import BLOCKS
from jitjax.settings import Optimizer

Params = dict[str, jax.Array]
KERNEL, ADALN = ".kernel", ".adaln.kernel"
# Columns of one kernel that are maps of their own: q, k, v; gate and value; shift, scale and gate of attention and of the MLP.
PARTS = {".attn.qkv.kernel": 3, ".mlp.w12.kernel": 2, ADALN: 6}
COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # Jordan's: steepest at 0, singular values end between 0.68 and 1.21
RMS = 0.2  # of an update: about AdamW's (arXiv 2502.16982, section 2.2)
SMALLEST_NORM = 1e-12  # a matrix of zeros has no direction and stays 0
WIDE = 1.5  # columns / rows from which several steps on the Gram matrix cost less than on the matrix
GRAM_STEPS = 3  # on one Gram matrix; five in a row diverge in bfloat16 (tests/test_muon.py)
f32, bf16 = jnp.float32, jnp.bfloat16


class State(NamedTuple):
    """Muon's matrices have a momentum and no second moment."""

    adamw: Any  # of all other parameters
    momentum: optax.TraceState  # float32


def is_matrix(name: str, optim: Optimizer) -> bool:
    """Whether Muon moves the parameter of this name."""
    return name.startswith(BLOCKS) and name.endswith(KERNEL) and (optim.muon_adaln or not name.endswith(ADALN))


def parts_of(name: str) -> int:
    """Into how many equal parts the columns of a matrix are cut."""
    return next((count for ending, count in PARTS.items() if name.endswith(ending)), 1)


def make(
    adamw: optax.GradientTransformation, optim: Optimizer, specs: Mapping[str, Any] | None = None, mesh: Mesh | None = None
) -> optax.GradientTransformation:
    """Muon for the matrices and `adamw` for the rest, with learning rate 1 as there.

    Args:
      specs, mesh: partition specs of the parameters and the mesh of the `jax.shard_map` inside which the update runs on each
        device's shards. Left out, `init` can be used alone.
    """
    momentum = optax.trace(optim.muon_momentum, nesterov=True)

    def divided(tree: Params) -> tuple[Params, Params]:
        matrices = {name: value for name, value in tree.items() if is_matrix(name, optim)}
        return matrices, {name: value for name, value in tree.items() if name not in matrices}

    def init(params: Params) -> State:
        matrices, rest = divided(params)
        return State(adamw.init(rest), momentum.init(matrices))

    def update(grads: Params, state: State, params: Params) -> tuple[Params, State]:
        (matrix_grads, rest_grads), (matrices, rest) = divided(grads), divided(params)
        moved, adamw_state = adamw.update(rest_grads, state.adamw, rest)
        directions, trace = momentum.update(matrix_grads, state.momentum)
        with jax.named_scope("muon"):
            directions = orthogonalised(directions, specs, mesh, optim.muon_steps)
        decayed = {name: -(value + optim.weight_decay * matrices[name]) for name, value in directions.items()}
        return moved | decayed, State(adamw_state, trace)

    return optax.GradientTransformation(init, update)


def orthogonalised(matrices: Params, specs: Mapping[str, Any], mesh: Mesh, steps: int) -> Params:
    """The direction of every matrix with singular values near 1, times 0.2 sqrt(max(rows, columns)), so that its root mean
    square is about 0.2. Inside `jax.shard_map`; shards in, shards of the same out, float32.

    Args:
      matrices: this device's shards, (rows, columns).
      specs: partition specs by name.
      steps: of `newton_schulz`.
    """
    over = sharding.split_over(mesh)
    axes = {name: next((axis for axis, used in enumerate(specs[name]) if used), None) for name in matrices}
    stacks: dict[tuple[int, int, bool], dict[tuple[str, int], jax.Array]] = {}  # by shape and whether rows are split
    sizes: dict[str, tuple[int, int]] = {}  # of a whole piece
    for name, value in matrices.items():
        value = value.astype(bf16)
        if axes[name] == 1:  # rare, of rows that do not divide: the parts would not end where the shards do
            value = jax.lax.all_gather(value, over, axis=1, tiled=True)
        for part, piece in enumerate(jnp.split(value, parts_of(name), axis=1)):
            stacks.setdefault((*piece.shape, axes[name] == 0), {})[name, part] = piece
            sizes[name] = len(piece) * (mesh.shape[over] if axes[name] == 0 else 1), piece.shape[1]

    shares = {key: _spread(jnp.stack(list(pieces.values())), key[-1], mesh) for key, pieces in stacks.items()}
    batches: dict[tuple[int, int], list[Any]] = {}
    for key, share in shares.items():
        batches.setdefault(tuple(sorted(share.shape[1:])), []).append(key)
    done = {}
    for shape, keys in batches.items():
        batch = jnp.concatenate([_lying(shares[key], shape) for key in keys])
        batch, start = newton_schulz(batch, steps), 0
        for key in keys:
            count = len(shares[key])
            share = _lying(batch[start : start + count], shares[key].shape[1:])
            done |= zip(stacks[key], _collect(share, len(stacks[key]), key[-1], mesh), strict=False)
            start += count

    def whole(name: str) -> jax.Array:
        pieces = [done[name, part] for part in range(parts_of(name))]
        value = jnp.concatenate(pieces, axis=1).astype(f32) * (RMS * max(sizes[name]) ** 0.5)
        if axes[name] == 1:
            width = matrices[name].shape[1]
            return jax.lax.dynamic_slice_in_dim(value, jax.lax.axis_index(over) * width, width, axis=1)
        return value

    return {name: whole(name) for name in matrices}


def _lying(stack: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """(L, rows, columns) as it is or transposed, whichever has `shape`."""
    return stack if stack.shape[1:] == tuple(shape) else jnp.swapaxes(stack, 1, 2)


def _sharing(split: bool, mesh: Mesh) -> tuple[str | None, tuple[str, ...]]:
    """(the mesh axis over which rows are split, the mesh axes along which devices hold the same)."""
    over = sharding.split_over(mesh) if split else None
    return over, tuple(axis for axis in sharding.AXES if axis != over and mesh.shape[axis] > 1)


def _spread(stack: jax.Array, split: bool, mesh: Mesh) -> jax.Array:
    """This device's share of the matrices of a stack, whole: (L, rows of a shard, columns) -> (L / devices rounded up, rows,
    columns); what is lacking is zeros."""
    over, copies = _sharing(split, mesh)
    stack = jnp.pad(stack, ((0, -len(stack) % mesh.size), (0, 0), (0, 0)))
    if over:
        stack = jax.lax.all_to_all(stack, over, split_axis=0, concat_axis=1, tiled=True)
    if copies:
        count = len(stack) * (mesh.shape[over] if over else 1) // mesh.size
        stack = jax.lax.dynamic_slice_in_dim(stack, jax.lax.axis_index(copies) * count, count)
    return stack


def _collect(stack: jax.Array, count: int, split: bool, mesh: Mesh) -> jax.Array:
    """Inverse of `_spread`: the device's shards of all `count` matrices."""
    over, copies = _sharing(split, mesh)
    if copies:
        stack = jax.lax.all_gather(stack, copies, tiled=True)
    if over:
        stack = jax.lax.all_to_all(stack, over, split_axis=1, concat_axis=0, tiled=True)
    return stack[:count]


def newton_schulz(stack: jax.Array, steps: int) -> jax.Array:
    """x <- (a + b x x' + c (x x')^2) x, `steps` times, of x / |x|: the singular vectors stay, the singular values come near 1.

    Those above a hundredth of the norm reach 0.68 to 1.21 in 5 steps; smaller ones grow by 3.44 a step. Of wide matrices up to
    `GRAM_STEPS` steps are made on the Gram matrix x x' and applied as one product. Matmuls take and give bfloat16 and add up in
    float32.

    Args:
      stack: (L, rows, columns), rows <= columns.

    Returns:
      bfloat16, same shape.
    """
    a, b, c = COEFFICIENTS
    rows, columns = stack.shape[1:]
    most = GRAM_STEPS if columns > WIDE * rows else 1
    x = stack.astype(f32)
    norm = jnp.sqrt(jnp.sum(jnp.square(x), axis=(1, 2), keepdims=True))
    x = (x / jnp.maximum(norm, SMALLEST_NORM)).astype(bf16)
    for start in range(0, steps, most):
        gram, product = x @ jnp.swapaxes(x, 1, 2), None
        last = min(most, steps - start) - 1
        for step in range(last + 1):
            square = gram @ gram
            factor = (a * jnp.eye(rows) + b * gram.astype(f32) + c * square.astype(f32)).astype(bf16)
            product = factor if product is None else factor @ product
            if step < last:
                gram = factor @ (factor @ gram)
        x = product @ x
    return x
