"""Attention forward on Hopper, from the qkv projection on, in one kernel: bias, qk-norm, RoPE and softmax attention.

Each multiprocessor has one persistent block of four warpgroups, which loops over its share of the (image, head) pairs. Shared
memory has two slots, each with the queries, keys and values of a pair (2 x 3 x 288 x 64 values, 216 KiB): bulk copies load the
next pair while the present one is computed, so no load is waited for. A tile is 64 queries.

1. The rows are normalised and rotated in place. Each thread has eight features of a row and the eight they are rotated
   with, and does the query and the key of a token together, for they have the same angles.
2. Each warpgroup takes a tile and loops over all keys in steps with the usual online softmax, in units of
   log2. The finished tile goes out through the rows of its queries, which are no longer needed.
3. Where half a tile is left over (288 tokens) the last warpgroup does it while the others already prepare the next pair. It
   extends into the first keys, which follow the queries in memory; the results of those rows are dropped.

One barrier per pair signals that the next one is prepared and that the slot of the last one is free. The bias of the values is
added to the output: softmax rows sum to one.

Measured on an H200 at 256 images of 12 heads: 270 us at 288 tokens (226 at 256) for the outputs alone, 320 (266) in
an earlier version with the queries and keys that the backward pass needs, where the two Triton kernels take 410 (329).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from jitjax.kernels import mosaic
from jitjax.kernels.constants import ATTENTION, EPS, LOG2E
from jitjax.kernels.lowered import lowered_once
from jitjax.kernels.mosaic import ROWS, TILE, broadcast, plgpu

HEAD_DIM = 64
MOST_TOKENS = 288  # two pairs fill the shared memory
WARPGROUPS = 4
SLOTS = 2  # pairs in shared memory
f32 = jnp.float32


def online_softmax(
    scores: Callable[[Any], jax.Array],
    values: Callable[[Any], Any],
    matmul: Callable[..., jax.Array],
    *,
    steps: int,
    scale: float,
    dtype: jax.typing.DTypeLike,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Inside a kernel: a warpgroup's tile of queries over all keys, in steps.

    Args:
      scores: q k^T with the keys of step j, (rows, keys) float32. values: reference to those of step j.
      matmul: of (accumulator or None, left operand, reference to the right one).
      scale: of the scores, in units of log2.

    Returns:
      sum of the weights times values; row maxima of the scaled scores; sum of the weights.
    """

    def weights(s, top):
        p = jnp.exp2(s * scale - broadcast(top, s.shape, 0))
        return p.astype(dtype), sum(p[:, c : c + 8] for c in range(0, s.shape[1], 8))  # lanes are summed at the end

    def step(j, carry):
        o, top, total = carry
        s = scores(j)
        new_top = jnp.maximum(top, jnp.max(s, axis=1) * scale)
        p, sums = weights(s, new_top)
        shrink = jnp.exp2(top - new_top)
        o = matmul(o * broadcast(shrink, o.shape, 0), p, values(j))
        return o, new_top, total * broadcast(shrink, sums.shape, 0) + sums

    s = scores(0)
    top = jnp.max(s, axis=1) * scale
    p, total = weights(s, top)
    o, top, total = lax.fori_loop(1, steps, step, (matmul(None, p, values(0)), top, total))
    return o, top, jnp.sum(total, axis=1)


def unsupported(tokens: int, drop: int) -> str:
    """Why the Hopper kernels cannot take so many tokens, or an empty string."""
    if tokens % ROWS or drop % ROWS or tokens > MOST_TOKENS or tokens - drop < TILE:
        return f"{tokens} tokens ({drop} of them only keys), not multiples of {ROWS} up to {MOST_TOKENS}"
    return ""


@lowered_once
def forward(
    qkv_BTGN: jax.Array,
    bias_GN: jax.Array,
    q_weight_N: jax.Array,
    k_weight_N: jax.Array,
    cos_TM: jax.Array,
    sin_TM: jax.Array,
    *,
    drop: int = 0,
    save_qk: bool,
    interpret: bool = False,
) -> list[jax.Array]:
    """Softmax attention of normalised, rotated queries and keys (see `attention.plain_qkv_attention`).

    Args:
      qkv_BTGN: the qkv projection without bias, G = 3 H heads of queries, keys, values; features in half-split order.
      bias_GN: in the compute type. q_weight_N, k_weight_N: float32.
      cos_TM, sin_TM: float32, M = N / 2.
      drop: the first tokens, which are keys and values only; Q = T - drop queries are left.

    Returns:
      o_BQHN; lse_BHQ, log2 of the softmax denominators, float32; with `save_qk` the normalised, rotated q_BTHN and k_BTHN.
    """
    b, t, g, n = qkv_BTGN.shape
    tq, h, dtype, scale = t - drop, g // 3, qkv_BTGN.dtype, LOG2E / math.sqrt(n)
    keys = next(size for size in (96, 64, 32) if t % size == 0)  # of one step
    full, half = divmod(tq, TILE)
    # Warpgroups that normalise rows: the last one does not where it has the half tile to do.
    workers = next(w for w in range(WARPGROUPS - bool(half), 0, -1) if t // ROWS % w == 0)
    share = t // ROWS // workers
    blocks = min(mosaic.multiprocessors(), b * h)
    features = [pl.ds(0, n // 2), pl.ds(n // 2, n // 2)]  # first and second members of the pairs

    def load(ref, layout, optimized=True):
        return mosaic.load(ref, layout, interpret, optimized)

    def matmul(acc, a, b_ref, transposed=""):
        return mosaic.matmuls((acc, a, b_ref, transposed), interpret=interpret)[0]

    def kernel(qkv_ref, bias_ref, weight_ref, cos_ref, sin_ref, o_ref, lse_ref, *rest):
        *qk_refs, qk_smem, v_smem, half_smem, lse_smem, q_ready, k_ready, v_ready, prepared = rest
        wg, block = lax.axis_index("wg"), lax.axis_index("block")
        count = (b * h - block + blocks - 1) // blocks

        def locate(i):
            """Image, head and slot of the i-th pair of this block."""
            pair = block + i * blocks
            return pair // h, pair % h, i % SLOTS

        def fetch(i):
            image, head, slot = locate(i)
            for part, smem, ready in (
                (0, qk_smem.at[slot, pl.ds(0, t)], q_ready),
                (1, qk_smem.at[slot, pl.ds(t, t)], k_ready),
                (2, v_smem.at[slot], v_ready),
            ):
                plgpu.copy_gmem_to_smem(qkv_ref.at[image, :, part * h + head], smem, ready.at[slot])

        def prepare(i):
            """Normalise and rotate the queries and keys of a pair."""
            image, head, slot = locate(i)
            layout = mosaic.ROW_LAYOUT

            def vectors(ref, index):
                return [load(ref.at[index, half], layout.reduce(0), optimized=False).astype(f32) for half in features]

            bias = [vectors(bias_ref, part * h + head) for part in (0, 1)]
            weight = [vectors(weight_ref, part) for part in (0, 1)]

            def tile(j, _):
                first = (wg * share + j) * ROWS
                cos, sin = (load(ref.at[pl.ds(first, ROWS)], layout, optimized=False) for ref in (cos_ref, sin_ref))
                targets = [qk_smem.at[slot, pl.ds(part * t + first, ROWS)] for part in (0, 1)]
                for part, smem in enumerate(targets):
                    x = [load(smem.at[:, half], layout).astype(f32) for half in features]
                    x = [v + broadcast(c, cos.shape, 1) for v, c in zip(x, bias[part], strict=True)]
                    squares = jnp.sum(x[0] * x[0] + x[1] * x[1], axis=1)
                    rstd = broadcast(lax.rsqrt(squares * (1 / n) + EPS), cos.shape, 0)
                    a, c = (v * rstd * broadcast(w, cos.shape, 1) for v, w in zip(x, weight[part], strict=True))
                    smem.at[:, features[0]][...] = (a * cos - c * sin).astype(dtype)
                    smem.at[:, features[1]][...] = (c * cos + a * sin).astype(dtype)
                if save_qk:
                    plgpu.commit_smem()
                    for smem, ref in zip(targets, qk_refs, strict=True):
                        plgpu.copy_smem_to_gmem(smem, ref.at[image, pl.ds(first, ROWS), head])
                return _

            @pl.when(wg < workers)
            def _work():
                plgpu.barrier_wait(q_ready.at[slot])
                plgpu.barrier_wait(k_ready.at[slot])
                lax.fori_loop(0, share, tile, None)
                plgpu.commit_smem()
                # The queries must have been copied out before a tile of output may overwrite them; the last keys need not.
                plgpu.wait_smem_to_gmem(1 if save_qk else 0, wait_read_only=True)

        def attend(i, tile, size, stage, lse_row):
            """One tile of queries, of which the first `size` rows exist; its output is written by way of `stage`."""
            image, head, slot = locate(i)
            q_tile = qk_smem.at[slot, pl.ds(drop + tile * TILE, TILE)]

            def scores(j):
                return matmul(None, q_tile, qk_smem.at[slot, pl.ds(t + j * keys, keys)], "b")

            def values(j):
                return v_smem.at[slot, pl.ds(j * keys, keys)]

            o, top, total = online_softmax(scores, values, matmul, steps=t // keys, scale=scale, dtype=dtype)
            bias = load(bias_ref.at[2 * h + head], mosaic.OF_COLUMNS, optimized=False).astype(f32)
            o = o * broadcast(1 / total, o.shape, 0) + broadcast(bias, o.shape, 1)
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            stage = q_tile if stage is None else stage
            stage[...] = o.astype(dtype)
            lse_smem[lse_row] = top + jnp.log2(total)
            plgpu.commit_smem()
            rows, source = pl.ds(tile * TILE, size), pl.ds(0, size)
            plgpu.copy_smem_to_gmem(stage.at[source], o_ref.at[image, rows, head])
            plgpu.copy_smem_to_gmem(lse_smem.at[lse_row, source], lse_ref.at[image, head, rows])

        pl.when(wg == 0)(lambda: fetch(0))
        prepare(0)
        plgpu.barrier_arrive(prepared)

        def pair(i, _):
            plgpu.barrier_wait(prepared)
            plgpu.barrier_wait(v_ready.at[i % SLOTS])
            more = i + 1 < count
            pl.when((wg == 0) & more)(lambda: fetch(i + 1))

            def tiles(k, _):
                attend(i, wg + k * WARPGROUPS, TILE, None, wg)
                return _

            lax.fori_loop(0, (full - wg + WARPGROUPS - 1) // WARPGROUPS, tiles, None)
            if half:
                pl.when(wg == WARPGROUPS - 1)(lambda: attend(i, full, half, half_smem, WARPGROUPS))

            @pl.when(more)
            def _next():
                prepare(i + 1)
                plgpu.barrier_arrive(prepared)

            return _

        lax.fori_loop(0, count, pair, None)
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)

    def rows_of(*shape):
        return mosaic.rows_of(*shape, n, dtype=dtype, interpret=interpret)

    o, lse = jax.ShapeDtypeStruct((b, tq, h, n), dtype), jax.ShapeDtypeStruct((b, h, tq), f32)
    return mosaic.call(
        kernel,
        *(qkv_BTGN, bias_GN, jnp.stack([q_weight_N, k_weight_N]).astype(f32), cos_TM.astype(f32), sin_TM.astype(f32)),
        scope=ATTENTION,
        name="hopper_forward",
        grid=(blocks,),
        grid_names=("block",),
        warpgroups=WARPGROUPS,
        out=[o, lse] + [jax.ShapeDtypeStruct((b, t, h, n), dtype)] * (2 * save_qk),
        scratch=[
            rows_of(SLOTS, 2 * t),
            rows_of(SLOTS, t),
            rows_of(TILE) if half else None,
            plgpu.SMEM((WARPGROUPS + 1, TILE), f32),
            *(plgpu.Barrier(num_barriers=SLOTS) for _ in range(3)),
            plgpu.Barrier(num_arrivals=WARPGROUPS),
        ],
        interpret=interpret,
    )
