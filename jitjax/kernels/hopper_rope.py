"""Backward pass of RoPE, qk-norm and bias on Hopper, with prefetched loads.

The Triton kernel in `attention` waits for its loads, and reloads the angles and the weights for every few tokens. Here a block
of one warpgroup has a few tokens and heads of the queries or the keys, and loops over the images. So everything but the
data stays in registers from the first image to the last: cosines, sines, bias and weight, and the sums for the gradients of the
last two. Bulk copies prefetch tiles into a ring buffer of stages in shared memory; results overwrite their inputs (the same
thread reads and writes an element) and are copied in bulk into the gradient that already has the values' third.

A tile has 8 tokens of 4 heads (contiguous in memory for each token) of one or two images. A thread has features of the
first half of a row and those of the second half that they form pairs with: RoPE needs no exchange, and a row sum is two
shuffles. Both row sums are formed at once, since mean(dxhat * xhat) = r mean(dxhat * x).

Measured on an H200 at 256 images of 12 heads, with the sums over blocks: 198 us at 288 tokens (171 at 256), where the Triton
kernel takes 259 (225) and a plain pass over as many bytes 174 (157). On an H100 at 208 images of 16 heads of 80 features: 695
(616) where the Triton kernel takes 801 (704).
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from jitjax.kernels import mosaic
from jitjax.kernels.constants import EPS, ROPE
from jitjax.kernels.lowered import lowered_once
from jitjax.kernels.mosaic import COLUMNS, plgpu

HEAD_DIMS = 64, 80
HEADS, TOKENS = 4, 8  # of a tile: a warp for each head
BLOCKS = 1600  # about four times as many as the card can have at a time: so that little time is lost at the end
f32 = jnp.float32


def _layout(columns: int) -> Any:
    """(HEADS, TOKENS, columns) values on a warpgroup: a warp for each head, four threads for a row. With 32 columns a thread
    has 8 neighbouring ones, as in `ROW_LAYOUT`; otherwise pairs of neighbours, one of each 8 columns."""
    shape = HEADS, TOKENS, columns
    if columns == COLUMNS:
        return plgpu.Layout.TILED(plgpu.Tiling((shape, (8, 8))), warp_dims=(-5,), lane_dims=(-3, -2), vector_dim=-1)
    return plgpu.Layout.TILED(plgpu.Tiling((shape, (8, 8), (2,))), warp_dims=(-6,), lane_dims=(-3, -2), vector_dim=-1)


def unsupported(tokens: int, head_dim: int, num_heads: int) -> str:
    """Why the kernel cannot take so many heads of so many tokens, or an empty string."""
    if head_dim not in HEAD_DIMS:
        return f"heads of {head_dim} features, not {' or '.join(map(str, HEAD_DIMS))}"
    if num_heads % HEADS:
        return f"{num_heads} heads, not a multiple of {HEADS}"
    return f"{tokens} tokens, not a multiple of {TOKENS}" if tokens % TOKENS else ""


@dataclasses.dataclass(frozen=True)
class Tiles:
    """What the blocks do.

    images: of a tile. stages: tiles in the ring buffer. steps: tiles that a block processes.
    """

    images: int
    stages: int
    steps: int

    @classmethod
    def choose(cls, images: int, tokens: int, num_heads: int) -> Tiles:
        of_tile = math.gcd(images, 2)
        blocks = 2 * num_heads // HEADS * (tokens // TOKENS)  # that share an image
        ranges = min(-(-BLOCKS // blocks), images // of_tile)
        return cls(of_tile, 8 // of_tile, -(-images // of_tile // ranges))


@lowered_once
def backward(
    dqkv_BTGN: jax.Array,
    dq_BTHN: jax.Array,
    dk_BTHN: jax.Array,
    qkv_BTGN: jax.Array,
    bias_GN: jax.Array,
    q_weight_N: jax.Array,
    k_weight_N: jax.Array,
    cos_TM: jax.Array,
    sin_TM: jax.Array,
    *,
    interpret: bool = False,
    tiles: Tiles | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """`attention._norm_rope_backward`, which has the mathematics, with M = N / 2 cosines and sines.

    Returns:
      dqkv_BTGN with the values' third as it was; dbias of queries and keys, (2H, N) float32; dweight of
      each, (N,) float32.
    """
    b, t, h, n = dq_BTHN.shape
    dtype = qkv_BTGN.dtype
    tiles = tiles or Tiles.choose(b, t, h)
    images, stages = tiles.images, tiles.stages
    groups, chunks, ranges = 2 * h // HEADS, t // TOKENS, -(-b // (images * tiles.steps))
    m, wide = n // 2, n == 2 * COLUMNS  # whether rows are laid out for wide accesses without bank conflicts
    shape, layout = (HEADS, TOKENS, m), None if interpret else _layout(m)
    halves = [pl.ds(0, m), pl.ds(m, m)]

    def load_same(ref, axes):
        """ref in global memory, the same along all axes of a tile but `axes`."""
        others = tuple(i for i in range(3) if i not in axes)
        x = mosaic.load(ref, layout and layout.reduce(others), interpret, optimized=False).astype(f32)
        return mosaic.cast(lax.broadcast_in_dim(x, shape, axes), layout, interpret)

    def columns(slot):
        return pl.ds(slot * n, n)

    def across(scalars):
        return mosaic.cast(lax.broadcast_in_dim(scalars, shape, (0, 1)), layout, interpret)

    def kernel(dqkv_ref, dq_ref, dk_ref, qkv_ref, bias_ref, q_weight_ref, k_weight_ref, cos_ref, sin_ref, sums_ref, *scratch):
        x_ring, d_ring, ready = scratch
        r, chunk, group = (lax.axis_index(name) for name in ("range", "chunk", "group"))
        first, span = r * tiles.steps, pl.ds(chunk * TOKENS, TOKENS)
        steps = lax.min(tiles.steps, b // images - first)
        slots = [group * HEADS + i for i in range(HEADS)]  # heads of the fused projection
        is_k = group >= groups // 2

        def fetch(i):
            stage, some = lax.rem(i, stages), pl.ds((first + i) * images, images)

            def copy(ref, ring, slots):
                for k, slot in enumerate(slots):
                    plgpu.copy_gmem_to_smem(ref.at[some, span, columns(slot)], ring.at[stage, k], ready.at[stage])

            copy(qkv_ref, x_ring, slots)
            pl.when(~is_k)(lambda: copy(dq_ref, d_ring, slots))
            pl.when(is_k)(lambda: copy(dk_ref, d_ring, [slot - h for slot in slots]))

        def fetch_first(i, _):
            fetch(i)
            return _

        lax.fori_loop(0, lax.min(stages, steps), fetch_first, None)

        bias = [load_same(bias_ref.at[pl.ds(group * HEADS, HEADS), c], (0, 2)) for c in halves]

        def weight_of(ref):
            return lambda: [load_same(ref.at[c], (2,)) for c in halves]

        weight = lax.cond(is_k, weight_of(k_weight_ref), weight_of(q_weight_ref))
        cos, sin = (load_same(ref.at[span], (1, 2)) for ref in (cos_ref, sin_ref))

        def one_image(x_refs, d_refs, sums):
            x, d = ([mosaic.load(ref, layout, interpret, wide).astype(f32) for ref in refs] for refs in (x_refs, d_refs))
            x = [a + v for a, v in zip(x, bias, strict=True)]
            g = d[0] * cos + d[1] * sin, d[1] * cos - d[0] * sin
            dxhat = [a * w for a, w in zip(g, weight, strict=True)]
            squares = jnp.sum(x[0] * x[0] + x[1] * x[1], axis=2)
            dot = jnp.sum(dxhat[0] * x[0] + dxhat[1] * x[1], axis=2)
            rstd = lax.rsqrt(squares * (1 / n) + EPS)
            along_x = across(rstd * rstd * rstd * dot * (1 / n))
            rstd = across(rstd)
            dx = [a * rstd - e * along_x for a, e in zip(dxhat, x, strict=True)]
            for ref, value in zip(x_refs, dx, strict=True):
                mosaic.store(ref, value.astype(dtype), interpret, wide)
            terms = dx, [a * rstd * e for a, e in zip(g, x, strict=True)]
            return [[s + e for s, e in zip(*pair, strict=True)] for pair in zip(sums, terms, strict=True)]

        def step(i, sums):
            stage = lax.rem(i, stages)
            plgpu.barrier_wait(ready.at[stage])

            def one(k, sums):
                return one_image(*([ring.at[stage, :, k, :, c] for c in halves] for ring in (x_ring, d_ring)), sums)

            # Not unrolled: at 64 features a third block finds registers on a multiprocessor.
            sums = lax.fori_loop(0, images, one, sums)
            plgpu.commit_smem()
            some = pl.ds((first + i) * images, images)
            for k, slot in enumerate(slots):
                target = dqkv_ref.at[some, span, columns(slot)]
                plgpu.copy_smem_to_gmem(x_ring.at[stage, k], target, commit_group=k == HEADS - 1)
            # The tile before this one has most likely been copied out by now; a later one reuses its stage.
            following = i - 1 + stages

            @pl.when((i > 0) & (following < steps))
            def _refill():
                plgpu.wait_smem_to_gmem(1, wait_read_only=True)
                fetch(following)

            return sums

        zeros = mosaic.cast(jnp.zeros(shape, f32), layout, interpret)
        sums = lax.fori_loop(0, steps, step, [[zeros] * 2] * 2)
        for k, total in enumerate(sums[0] + sums[1]):
            mosaic.store(sums_ref.at[r, chunk, group, k], jnp.sum(total, axis=1), interpret, optimized=False)
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)

    ring = (stages, HEADS, images, TOKENS, n)
    ring = mosaic.rows_of(*ring, dtype=dtype, interpret=interpret) if wide else plgpu.SMEM(ring, dtype)
    dqkv, (sums,) = mosaic.call_in_place(
        kernel,
        # Two axes less: a bulk copy knows five, two of which the layout in shared memory splits.
        *(x.reshape(b, t, -1) for x in (dq_BTHN, dk_BTHN, qkv_BTGN)),
        *(bias_GN, *(x.astype(f32) for x in (q_weight_N, k_weight_N, cos_TM, sin_TM))),
        in_place=dqkv_BTGN.reshape(b, t, -1),
        scope=ROPE,
        name="hopper_backward",
        grid=(ranges, chunks, groups),
        grid_names=("range", "chunk", "group"),
        out=[jax.ShapeDtypeStruct((ranges, chunks, groups, 4, HEADS, m), f32)],
        scratch=[ring, ring, plgpu.Barrier(num_arrivals=2 * HEADS, num_barriers=stages)],
        interpret=interpret,
    )
    sums = sums.sum((0, 1)).reshape(groups, 2, 2, HEADS, m).transpose(1, 0, 3, 2, 4).reshape(2, 2 * h, n)
    dweight_q, dweight_k = sums[1].reshape(2, h, n).sum(1)
    return dqkv.reshape(dqkv_BTGN.shape), sums[0], dweight_q, dweight_k
