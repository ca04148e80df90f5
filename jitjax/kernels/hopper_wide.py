"""Attention on Hopper for heads of 80 features (JiT-H): softmax attention forward, and one kernel for all gradients.

Two pairs of image and head do not fit into shared memory at this size, which `hopper_forward` wants; what `hopper_backward`
keeps in registers, the gradients of all queries, is too much, and 80 is no multiple of the 64 rows of a wgmma. So
these kernels are simpler. Their queries and keys are already normalised and rotated (by `attention._norm_rope_forward`).

Forward, a block of two warpgroups has one head of one image, and a multiprocessor holds two blocks, of which one computes while
the other loads. Each warpgroup takes a tile of 64 queries and loops over all keys with the usual online softmax.

Backward, scores are computed twice: seven matmuls where five would do. A block of three warpgroups has one head of
one image, with its queries, keys, values and output gradients in shared memory (4 x 288 x 80 values, 180 KiB), where every
matmul finds its operands. The mathematics is that of `hopper_backward`.

1. Bulk copies load everything but the outputs, which the warpgroups load themselves to compute delta.
2. A job is a tile of 64 keys (dk and dv, from transposed scores: four matmuls with every step of queries) or a tile of 64
   queries (dq: three matmuls with every step of keys). No two jobs add to the same output and nothing is exchanged between
   warpgroups, so gradients are the same bit for bit from run to run. Jobs are dealt out so that the warpgroups have about
   equally many matmuls.
3. P and dS are operands in registers. The matmuls with those of one step are started together with the scores of the next,
   so that there is one wait per step.

Measured on an H100 at 208 images of 16 heads: forward 347 us at 288 tokens (284 at 256), where the Triton kernel takes 465
(331); backward 999 (826), where the two Triton kernels take 1 454 (1 229).
"""

from __future__ import annotations

import functools
import itertools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from jitjax.kernels import hopper_forward, mosaic
from jitjax.kernels.constants import ATTENTION, LOG2E
from jitjax.kernels.lowered import lowered_once
from jitjax.kernels.mosaic import ROWS, TILE, broadcast, plgpu

HEAD_DIM = 80
UNIT = 16  # columns of a unit of the layout in shared memory
WARPGROUPS = 3  # of a block backward
KEY_MATMULS, QUERY_MATMULS = 4, 3  # of a job, with one step of the other side
FORWARD_WARPGROUPS = 2  # of a block, of which a multiprocessor holds two
KEY_STEPS = 48, 64, 32  # keys of a step, the first of these that divides their number: what registers allow
QUERIES = 32  # of a step
f32 = jnp.float32

if plgpu:
    # ROWS x 80 values on a warpgroup: a warp has 8 rows, a thread a pair of neighbours of each 8 columns of a row.
    LAYOUT = plgpu.Layout.TILED(
        plgpu.Tiling(((ROWS, HEAD_DIM), (8, HEAD_DIM), (8, 8), (2,))), warp_dims=(-7,), lane_dims=(-3, -2), vector_dim=-1
    )


unsupported = hopper_forward.unsupported  # 288 tokens fill the shared memory here, too


def deal(query_tiles: int, key_tiles: int) -> list[tuple[int, int, int, int]]:
    """Which tiles of keys and of queries each warpgroup takes: first and end of both ranges."""

    def ranges(tiles):
        cuts = itertools.combinations_with_replacement(range(tiles + 1), WARPGROUPS - 1)
        return [list(itertools.pairwise((0, *cut, tiles))) for cut in cuts]

    dealt = (zip(*both, strict=True) for both in itertools.product(ranges(key_tiles), ranges(query_tiles)))
    return min(([(*k, *q) for k, q in pairs] for pairs in dealt), key=lambda jobs: max(map(matmuls_of, jobs)))


def _keys_of_step(tokens: int) -> int:
    return next(size for size in KEY_STEPS if tokens % size == 0)


def matmuls_of(jobs: tuple[int, int, int, int]) -> int:
    """Matmuls of a warpgroup with each step."""
    k_first, k_end, q_first, q_end = jobs
    return KEY_MATMULS * (k_end - k_first) + QUERY_MATMULS * (q_end - q_first)


@lowered_once
def forward(
    q_BTHN: jax.Array,
    k_BTHN: jax.Array,
    qkv_BTGN: jax.Array,
    bias_GN: jax.Array,
    *,
    drop: int = 0,
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """Softmax attention of the Q = T - drop last queries.

    Args:
      q_BTHN, k_BTHN: normalised and rotated.
      qkv_BTGN: the qkv projection without bias, G = 3 H, of which the values are used. bias_GN: in the compute type.

    Returns:
      o_BQHN = softmax(q k^T / sqrt(N)) (v + bias); lse_BHQ, log2 of the softmax denominators, float32.
    """
    b, t, h, n = q_BTHN.shape
    tq, dtype, scale = t - drop, q_BTHN.dtype, LOG2E / math.sqrt(n)
    step = _keys_of_step(t)
    tiles = -(-tq // TILE)

    def load(ref, layout):
        return mosaic.load(ref, layout, interpret, optimized=False)

    def matmul(acc, a, b_ref, transposed=""):
        return mosaic.matmuls((acc, a, b_ref, transposed), interpret=interpret)[0]

    def kernel(q_ref, k_ref, qkv_ref, bias_ref, o_ref, lse_ref, k_smem, v_smem, stages, lse_smem, k_ready, v_ready, q_ready):
        image, head, wg = (lax.axis_index(name) for name in ("image", "head", "wg"))
        stage = stages.at[wg]

        def fetch(tile):
            def copy(size):
                source = q_ref.at[image, pl.ds(drop + tile * TILE, size), head]
                plgpu.copy_gmem_to_smem(source, stage.at[pl.ds(0, size)], q_ready.at[wg])

            mosaic.with_rows_of_tile(tile * TILE, tq, copy)

        def attend(i, _):
            tile = wg + i * FORWARD_WARPGROUPS

            def scores(j):
                return matmul(None, stage, k_smem.at[pl.ds(j * step, step)], "b")

            def values(j):
                if isinstance(j, int):  # the first ones
                    pl.when(i == 0)(lambda: plgpu.barrier_wait(v_ready))
                return v_smem.at[pl.ds(j * step, step)]

            plgpu.barrier_wait(q_ready.at[wg])
            o, top, total = hopper_forward.online_softmax(scores, values, matmul, steps=t // step, scale=scale, dtype=dtype)
            bias = load(bias_ref.at[2 * h + head], mosaic.OF_COLUMNS).astype(f32)
            stage[...] = (o * broadcast(1 / total, o.shape, 0) + broadcast(bias, o.shape, 1)).astype(dtype)
            lse_smem[wg] = top + jnp.log2(total)
            plgpu.commit_smem()

            def copy(size):
                rows, part = pl.ds(tile * TILE, size), pl.ds(0, size)
                plgpu.copy_smem_to_gmem(stage.at[part], o_ref.at[image, rows, head])
                plgpu.copy_smem_to_gmem(lse_smem.at[wg, part], lse_ref.at[image, head, rows])

            mosaic.with_rows_of_tile(tile * TILE, tq, copy)
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            following = tile + FORWARD_WARPGROUPS
            pl.when(following < tiles)(lambda: fetch(following))

        pl.when(wg < tiles)(lambda: fetch(wg))

        @pl.when(wg == 0)
        def _keys_and_values():
            plgpu.copy_gmem_to_smem(k_ref.at[image, :, head], k_smem, k_ready)
            plgpu.copy_gmem_to_smem(qkv_ref.at[image, :, 2 * h + head], v_smem, v_ready)

        plgpu.barrier_wait(k_ready)
        lax.fori_loop(0, (tiles - wg + FORWARD_WARPGROUPS - 1) // FORWARD_WARPGROUPS, attend, None)

    def rows_of(*shape):
        return mosaic.rows_of(*shape, n, dtype=dtype, interpret=interpret, columns=UNIT)

    o, lse = mosaic.call(
        kernel,
        *(q_BTHN, k_BTHN, qkv_BTGN, bias_GN),
        scope=ATTENTION,
        name="hopper_forward",
        grid=(h, b),
        grid_names=("head", "image"),
        warpgroups=FORWARD_WARPGROUPS,
        out=[jax.ShapeDtypeStruct((b, tq, h, n), dtype), jax.ShapeDtypeStruct((b, h, tq), f32)],
        scratch=[
            *(rows_of(t), rows_of(t), rows_of(FORWARD_WARPGROUPS, TILE)),
            plgpu.SMEM((FORWARD_WARPGROUPS, TILE), f32),
            *(plgpu.Barrier(), plgpu.Barrier()),
            plgpu.Barrier(num_barriers=FORWARD_WARPGROUPS),
        ],
        interpret=interpret,
    )
    return o, lse


@lowered_once
def backward(
    q_BTHN: jax.Array,
    k_BTHN: jax.Array,
    qkv_BTGN: jax.Array,
    bias_GN: jax.Array,
    o_BQHN: jax.Array,
    lse_BHQ: jax.Array,
    do_BQHN: jax.Array,
    *,
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Gradients of `forward`; arguments and results as of `hopper_backward.backward`."""
    b, tq, h, n = o_BQHN.shape
    tk = k_BTHN.shape[1]
    drop, dtype, scale = tk - tq, q_BTHN.dtype, 1 / math.sqrt(n)
    keys = _keys_of_step(tk)
    dealt = deal(-(-tq // TILE), -(-tk // TILE))
    least_busy = min(range(WARPGROUPS), key=lambda i: matmuls_of(dealt[i]))
    # Rows of the one array in shared memory, in this order so that a last tile that extends past its array stays inside.
    at, end = {}, 0
    for name, size in (("q", tq), ("do", tq), ("k", tk), ("v", tk), ("stage", WARPGROUPS * TILE)):
        at[name], end = end, end + size

    def load(ref, layout, optimized=True):
        return mosaic.load(ref, layout, interpret, optimized)

    def zeros_of(*shape):
        return mosaic.cast(jnp.zeros(shape, f32), mosaic.WGMMA, interpret)

    matmuls = functools.partial(mosaic.matmuls, interpret=interpret)

    def kernel(q_ref, k_ref, qkv_ref, bias_ref, o_ref, lse_ref, do_ref, dq_ref, dk_ref, dqkv_ref, dbias_ref, *scratch):
        smem, lse_smem, delta_smem, dbias_smem, do_ready, rest_ready, lse_ready, everyone = scratch
        image, head, wg = (lax.axis_index(name) for name in ("image", "head", "wg"))

        def part(name: str, first: Any, size: int):
            return smem.at[pl.ds(at[name] + first, size)]

        @pl.when(wg == 0)
        def _copies():
            plgpu.copy_gmem_to_smem(do_ref.at[image, :, head], part("do", 0, tq), do_ready)
            plgpu.copy_gmem_to_smem(q_ref.at[image, pl.ds(drop, tq), head], part("q", 0, tq), rest_ready)
            plgpu.copy_gmem_to_smem(k_ref.at[image, :, head], part("k", 0, tk), rest_ready)
            plgpu.copy_gmem_to_smem(qkv_ref.at[image, :, 2 * h + head], part("v", 0, tk), rest_ready)
            mosaic.copy_vector(lse_ref.at[image, head], lse_smem.at[pl.ds(0, tq)], lse_ready)

        bias = load(bias_ref.at[2 * h + head], LAYOUT.reduce(0), optimized=False).astype(f32)

        def delta_of_rows(i, _):
            rows = pl.ds((i * WARPGROUPS + wg) * ROWS, ROWS)
            o = load(o_ref.at[image, rows, head], LAYOUT, optimized=False).astype(f32)
            pl.when(i == 0)(lambda: plgpu.barrier_wait(do_ready))
            do = load(part("do", rows.start, ROWS), LAYOUT, optimized=False).astype(f32)
            delta_smem[rows] = jnp.sum(do * (o - broadcast(bias, o.shape, 1)), axis=1)

        lax.fori_loop(0, (tq // ROWS - wg + WARPGROUPS - 1) // WARPGROUPS, delta_of_rows, None)
        plgpu.commit_smem()
        plgpu.barrier_arrive(everyone)
        plgpu.barrier_wait(everyone)
        plgpu.barrier_wait(rest_ready)
        plgpu.barrier_wait(lse_ready)

        def store(x, out_ref, first, total):
            """x, a tile of rows that begins at `first`, to out_ref by way of shared memory; without the rows past `total`."""
            stage = at["stage"] + wg * TILE
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            smem[pl.ds(stage, TILE)] = x.astype(dtype)
            plgpu.commit_smem()

            def copy(size):
                plgpu.copy_smem_to_gmem(smem.at[pl.ds(stage, size)], out_ref.at[pl.ds(first, size)])

            mosaic.with_rows_of_tile(first, total, copy)

        def gradient_of_keys(tile, _):
            first = tile * TILE
            k, v = part("k", first, TILE), part("v", first, TILE)

            def scores(j):
                q, do = (part(name, j * QUERIES, QUERIES) for name in ("q", "do"))
                return (None, k, q, "b"), (None, v, do, "b")

            def weights(j, s, dp):
                span = pl.ds(j * QUERIES, QUERIES)
                lse, delta = (load(ref.at[span], mosaic.OF_COLUMNS, optimized=False) for ref in (lse_smem, delta_smem))
                p = jnp.exp2(s * (scale * LOG2E) - broadcast(lse, s.shape, 1))
                ds = p * (dp - broadcast(delta, s.shape, 1))
                return p.astype(dtype), ds.astype(dtype)

            def gradients(j, dk, dv, p, ds):
                return (dv, p, part("do", j * QUERIES, QUERIES), ""), (dk, ds, part("q", j * QUERIES, QUERIES), "")

            def step(j, carry):
                s, dp, dv, dk = matmuls(*scores(j + 1), *gradients(j, *carry))
                return dk, dv, *weights(j + 1, s, dp)

            steps = tq // QUERIES
            carry = zeros_of(TILE, n), zeros_of(TILE, n), *weights(0, *matmuls(*scores(0)))
            dv, dk = matmuls(*gradients(steps - 1, *lax.fori_loop(0, steps - 1, step, carry)))
            store(dv, dqkv_ref.at[image, :, 2 * h + head], first, tk)
            store(dk * scale, dk_ref.at[image, :, head], first, tk)

        def gradient_of_queries(tile, _):
            first = tile * TILE
            rows = pl.ds(first, TILE)
            q, do = part("q", first, TILE), part("do", first, TILE)
            lse, delta = (load(ref.at[rows], mosaic.OF_ROWS, optimized=False) for ref in (lse_smem, delta_smem))

            def scores(j):
                return (None, q, part("k", j * keys, keys), "b"), (None, do, part("v", j * keys, keys), "b")

            def weights(s, dp):
                p = jnp.exp2(s * (scale * LOG2E) - broadcast(lse, s.shape, 0))
                return (p * (dp - broadcast(delta, s.shape, 0))).astype(dtype)

            def step(j, carry):
                dq, ds = carry
                s, dp, dq = matmuls(*scores(j + 1), (dq, ds, part("k", j * keys, keys), ""))
                return dq, weights(s, dp)

            steps = tk // keys
            dq, ds = lax.fori_loop(0, steps - 1, step, (zeros_of(TILE, n), weights(*matmuls(*scores(0)))))
            (dq,) = matmuls((dq, ds, part("k", (steps - 1) * keys, keys), ""))
            store(dq * scale, dq_ref.at[image, pl.ds(drop, tq), head], first, tq)

        def mine(values):
            return functools.reduce(lambda x, i: jnp.where(wg == i, values[i], x), range(1, WARPGROUPS), values[0])

        k_first, k_end, q_first, q_end = (mine(values) for values in zip(*dealt, strict=True))
        lax.fori_loop(k_first, k_end, gradient_of_keys, None)
        lax.fori_loop(q_first, q_end, gradient_of_queries, None)
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)

        @pl.when(wg == least_busy)
        def _rest():
            stage = part("stage", wg * TILE, ROWS)
            stage[...] = mosaic.cast(jnp.zeros((ROWS, n), dtype), LAYOUT, interpret)
            plgpu.commit_smem()
            for first in range(0, drop, ROWS):
                plgpu.copy_smem_to_gmem(stage, dq_ref.at[image, pl.ds(first, ROWS), head])
            # The sum of do over queries as a matmul with ones, whose rows are all the same.
            ones = mosaic.cast(jnp.ones((TILE, ROWS), f32), mosaic.WGMMA, interpret).astype(dtype)

            def add(j, total):
                return matmuls((total, ones, part("do", j * ROWS, ROWS), ""))[0]

            total = lax.fori_loop(0, tq // ROWS, add, zeros_of(TILE, n))
            dbias_smem[...] = jnp.max(total, axis=0)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(dbias_smem, dbias_ref.at[image, head])

        plgpu.wait_smem_to_gmem(0, wait_read_only=True)

    keys_like = jax.ShapeDtypeStruct((b, tk, h, n), dtype)
    per_query = -(-tq // TILE) * TILE
    dq, dk, dqkv, dbias = mosaic.call(
        kernel,
        *(q_BTHN, k_BTHN, qkv_BTGN, bias_GN, o_BQHN, lse_BHQ, do_BQHN),
        scope=ATTENTION,
        name="hopper_backward",
        grid=(h, b),
        grid_names=("head", "image"),
        warpgroups=WARPGROUPS,
        out=[keys_like, keys_like, jax.ShapeDtypeStruct(qkv_BTGN.shape, dtype), jax.ShapeDtypeStruct((b, h, n), f32)],
        scratch=[
            mosaic.rows_of(end, n, dtype=dtype, interpret=interpret, columns=UNIT),
            *(plgpu.SMEM((size,), f32) for size in (per_query, per_query, n)),
            plgpu.Barrier(),
            plgpu.Barrier(num_arrivals=3),
            plgpu.Barrier(num_arrivals=2),
            plgpu.Barrier(num_arrivals=WARPGROUPS),
        ],
        reduction_bytes=4 * 4 * n,
        interpret=interpret,
    )
    return dq, dk, dqkv, dbias.sum(0)
