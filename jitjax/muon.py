"""Muon: momentum with its larger singular values brought near 1, for the matrices of the blocks; AdamW moves the rest.

Source: Jordan et al., "Muon: an optimizer for hidden layers in neural networks" (kellerjordan.github.io/posts/muon, 2024); the
scale that lets AdamW's learning rate serve: Liu et al., "Muon is scalable for LLM training" (arXiv 2502.16982).

A matrix that stands for several linear maps side by side (`PARTS`) is cut into them first. Matrices of one shape are
orthogonalised as one batch, and the batch is shared out: each device has whole matrices to do, which cross once there and once
back, in bfloat16 (adaLN's, which are split by columns, twice). `optax.contrib.muon` does the same to each matrix by itself, on
every device again and only to whole ones; from Optax is the momentum.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from jitjax import sharding
from jitjax.gradients import BLOCKS
from jitjax.kernels import planned
from jitjax.settings import Optimizer

Params = dict[str, jax.Array]
KERNEL, ADALN = ".kernel", ".adaln.kernel"
# Columns of one kernel that are maps of their own: gate and value; shift, scale and gate of attention and of the MLP. Of qkv
# each head's q, k and v are maps of their own (GLM-5, arXiv 2602.15763; Kimi K3, arXiv 2607.24653).
PARTS = {".mlp.w12.kernel": 2, ADALN: 6}
QKV, HEAD = ".attn.qkv.kernel", ".attn.q_norm.weight"  # the latter is as long as a head is wide
COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # Jordan's: steepest at 0, singular values end between 0.68 and 1.21
RMS = 0.2  # of an update whose singular values are all 1: about AdamW's (arXiv 2502.16982, section 2.2)
SMALLEST_NORM = 1e-9  # shorter directions count as this long: a matrix of zeros stays 0
GRAM_STEPS = 3  # on one Gram matrix, which loses the small singular values (tests/test_muon.py)
f32, bf16 = jnp.float32, jnp.bfloat16


class State(NamedTuple):
    """Muon's matrices have a momentum and no second moment."""

    adamw: Any  # of all other parameters
    momentum: optax.TraceState  # float32


def is_matrix(name: str, optim: Optimizer) -> bool:
    """Whether Muon moves the parameter of this name."""
    return name.startswith(BLOCKS) and name.endswith(KERNEL) and (optim.muon_adaln or not name.endswith(ADALN))


def parts_of(name: str, columns: int, params: Params) -> int:
    """Into how many equal parts the columns of a matrix are cut. `params` have the width of a head."""
    if name.endswith(QKV):
        return columns // len(params[name.removesuffix(QKV) + HEAD])
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
            directions = orthogonalised(directions, params, specs, mesh, optim.muon_steps)
        decayed = {name: -(value + optim.weight_decay * matrices[name]) for name, value in directions.items()}
        return moved | decayed, State(adamw_state, trace)

    return optax.GradientTransformation(init, update)


def orthogonalised(matrices: Params, params: Params, specs: Mapping[str, Any], mesh: Mesh, steps: int) -> Params:
    """`newton_schulz` of every matrix times 0.2 sqrt(max(rows, columns)): where all singular values have come near 1, the root
    mean square is about 0.2. Inside `jax.shard_map`; shards in, shards of the same out, float32.

    Args:
      matrices: this device's shards, (rows, columns).
      params: of `parts_of`.
      specs: partition specs by name.
      steps: of `newton_schulz`.
    """
    over = sharding.split_over(mesh)
    axes = {name: next((axis for axis, used in enumerate(specs[name]) if used), None) for name in matrices}
    by_columns = [name for name, axis in axes.items() if axis == 1 and len(matrices[name]) % mesh.shape[over] == 0]
    matrices = matrices | _split_by({name: matrices[name].astype(_half()) for name in by_columns}, over, 0)
    axes |= dict.fromkeys(by_columns, 0)
    stacks: dict[tuple[int, int, bool], dict[str, jax.Array]] = {}  # by shape of a piece and whether rows are split
    for name, value in matrices.items():
        value = value.astype(_half())
        if axes[name] == 1:  # rare, of rows that do not divide: the parts would not end where the shards do
            value = jax.lax.all_gather(value, over, axis=1, tiled=True)
        pieces = jnp.swapaxes(value.reshape(len(value), parts_of(name, value.shape[1], params), -1), 0, 1)
        stacks.setdefault((*pieces.shape[1:], axes[name] == 0), {})[name] = pieces

    shares = {key: _spread(jnp.concatenate(list(pieces.values())), key[-1], mesh) for key, pieces in stacks.items()}
    by_side: dict[int, list[Any]] = {}
    for key, share in shares.items():
        by_side.setdefault(min(share.shape[1:]), []).append(key)
    done, scales = {}, {}
    for keys in by_side.values():
        for key, share in zip(keys, newton_schulz([shares[key] for key in keys], steps), strict=True):
            share = _collect(share, sum(map(len, stacks[key].values())), key[-1], mesh)
            scale, start = RMS * max(shares[key].shape[1:]) ** 0.5, 0
            for name, pieces in stacks[key].items():
                done[name] = jnp.swapaxes(share[start : start + len(pieces)], 0, 1).reshape(pieces.shape[1], -1)
                scales[name], start = scale, start + len(pieces)
    done |= _split_by({name: done[name] for name in by_columns}, over, 1)

    def shard(name):
        width = matrices[name].shape[1]
        if axes[name] == 1:
            return jax.lax.dynamic_slice_in_dim(done[name], jax.lax.axis_index(over) * width, width, axis=1)
        return done[name]

    return {name: shard(name).astype(f32) * scales[name] for name in matrices}


def _split_by(matrices: Params, over: str, axis: int) -> Params:
    """Shards of rows (axis 0) of matrices of which each device has columns, or the other way round (axis 1)."""
    shapes: dict[tuple[int, ...], list[str]] = {}
    for name, value in matrices.items():
        shapes.setdefault(value.shape, []).append(name)
    result = {}
    for names in shapes.values():
        stack = jnp.stack([matrices[name] for name in names])
        stack = jax.lax.all_to_all(stack, over, split_axis=1 + axis, concat_axis=2 - axis, tiled=True)
        result |= zip(names, stack, strict=True)
    return result


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
        stack = jax.lax.optimization_barrier(stack)  # XLA for CPUs refuses parts of which one is transposed and one is padding
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


def newton_schulz(stacks: Sequence[jax.Array], steps: int) -> list[jax.Array]:
    """x <- (a + b x x' + c (x x')^2) x, `steps` times, of every matrix: the singular vectors stay, the singular values come
    near 1.

    The first step divides x by its Schatten 4-norm, the fourth root of the sum of the fourth powers of its singular values:
    at least the largest of them, at most the Frobenius norm, which others divide by. Singular values above a hundredth of it
    reach 0.68 to 1.21 in 5 steps; smaller ones grow by 3.44 a step.

    Up to `GRAM_STEPS` steps are made on the Gram matrix g = x x' (x' x of a tall matrix), and then applied as one product.
    Matmuls take and give bfloat16 and add up in float32. g is raised by what rounding can take from its eigenvalues: one that
    became negative would grow 12 times a step, and its singular value past 1; raised ones stay short of it.

    Args:
      stacks: (L, rows, columns) each, with equal shorter sides.

    Returns:
      bfloat16, same shapes.
    """
    a, b, c = COEFFICIENTS
    short = min(stacks[0].shape[1:])
    half = _half()
    one, rounding = jnp.eye(short), jnp.finfo(half).eps / 2 / short**0.5  # of eigenvalues, for a Frobenius norm of 1
    for first in range(0, steps, GRAM_STEPS):
        g = jnp.concatenate([x @ _turned(x) if _wide(x) else _turned(x) @ x for x in stacks])
        # The trace is 1 to sqrt(short) times the norm. Without it the squares, fourth powers of x, would leave float32's range.
        size = jnp.maximum(jnp.trace(g.astype(f32), axis1=1, axis2=2), SMALLEST_NORM**2)[:, None, None]
        norm = size * jnp.sqrt(jnp.sum(jnp.square(g.astype(f32) / size), axis=(1, 2), keepdims=True))
        product, scale = None, 1.0
        if first == 0:  # g and the product with x are divided instead of x itself, which is longer
            norm = jnp.maximum(norm, SMALLEST_NORM**2)
            g, scale, norm = g / norm, 1 / jnp.sqrt(norm), 1.0
        g = (g + rounding * norm * one).astype(half)
        last = min(first + GRAM_STEPS, steps) - 1
        for step in range(first, last + 1):
            value = a * one + b * g.astype(f32) + c * (g @ g).astype(f32)
            factor = value.astype(half)
            product = (scale * value).astype(half) if product is None else factor @ product
            if step < last:
                g = factor @ (factor @ g)
        ends = itertools.accumulate(map(len, stacks), initial=0)
        parts = [product[start:end] for start, end in itertools.pairwise(ends)]
        stacks = [part @ x if _wide(x) else x @ part for part, x in zip(parts, stacks, strict=True)]
    return list(stacks)


def _half() -> Any:
    """bfloat16, or float16 in a program that is planned on a CPU, which would widen bfloat16."""
    return jnp.float16 if planned.card() else bf16


def _wide(stack: jax.Array) -> bool:
    return stack.shape[1] <= stack.shape[2]


def _turned(stack: jax.Array) -> jax.Array:
    return jnp.swapaxes(stack, 1, 2)
