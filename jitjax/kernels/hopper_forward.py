"""Attention forward on Hopper, from the raw qkv product on, in one kernel: bias, qk-norm, RoPE and softmax attention.

A block of two warpgroups has one head of one image, with all of its queries, keys and values in shared memory (3 x 288 x 64
values, 108 KiB), so that two blocks fit on a multiprocessor and one computes while the other loads.

1. Bulk copies bring the rows in pieces. One warpgroup normalises and rotates the queries in place, the other the keys, as
   soon as a piece is there. Each thread has eight features of a row and the eight they are rotated with.
2. The warpgroups take turns at tiles of 64 queries and go over all keys in steps with the usual online softmax, in units of
   log2. Where the queries are no multiple of 64 the last tile runs on into the first keys, which stand behind them; what
   comes of those rows is dropped.
3. A finished tile goes out through the rows of the first tile of its warpgroup, which are no longer needed.

The bias of the values is added to the output: softmax rows sum to one. The normalised queries and keys are written too,
for the backward pass.

Measured on an H200 at 256 images of 12 heads: 343 us at 288 tokens (290 at 256), where the two Triton kernels take 411 (327).
What limits it is the latency of each step (products, maximum, exponentials, products) with four warpgroups on a
multiprocessor; shared memory is at 69% of its rate. Softmax sums by a product with ones, wider rows in shared memory, and a
persistent grid changed nothing.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from jitjax.kernels import mosaic
from jitjax.kernels.mosaic import ROWS, TILE, broadcast, plgpu

EPS = 1e-6
LEAST = -1e30
HEAD_DIM = 64
WARPGROUPS = 2
f32 = jnp.float32


def unsupported(tokens: int, drop: int, head_dim: int) -> str:
    """Why the Hopper kernels cannot take such heads, or an empty string."""
    if head_dim != HEAD_DIM:
        return f"heads of {head_dim} features, not {HEAD_DIM}"
    if tokens % ROWS or drop % ROWS:
        return f"{tokens} tokens ({drop} of them only keys) are not multiples of {ROWS}"
    if tokens > 320 or tokens - drop < WARPGROUPS * TILE:
        return f"{tokens} tokens ({drop} of them only keys), not up to 320 with at least {WARPGROUPS * TILE} queries"
    return ""


def forward(
    qkv_BTGN: jax.Array,
    bias_GN: jax.Array,
    q_weight_N: jax.Array,
    k_weight_N: jax.Array,
    cos_TM: jax.Array,
    sin_TM: jax.Array,
    drop: int = 0,
    *,
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Softmax attention of normalised, rotated queries and keys (see `attention.plain_qkv_attention`).

    Args:
      qkv_BTGN: the qkv product without bias, G = 3 H heads of queries, keys, values; features in half-split order.
      bias_GN: in the compute type. q_weight_N, k_weight_N: float32.
      cos_TM, sin_TM: float32, M = N / 2.
      drop: the first tokens, which are keys and values only; Q = T - drop queries are left.

    Returns:
      o_BQHN; lse_BHQ, log2 of the softmax denominators, float32; the normalised, rotated q_BQHN and k_BTHN.
    """
    b, t, g, n = qkv_BTGN.shape
    kept, h, dtype, scale = t - drop, g // 3, qkv_BTGN.dtype, math.log2(math.e) / math.sqrt(n)
    keys = next(size for size in (96, 64, 32) if t % size == 0)  # of one step
    # For queries and keys: their first row in shared memory and first token, how many, and rows of one copy.
    parts = [
        (first, token, rows, next(size for size in (96, 64, 32) if rows % size == 0))
        for first, token, rows in ((0, drop, kept), (kept, 0, t))
    ]
    half = [pl.ds(0, n // 2), pl.ds(n // 2, n // 2)]

    def load(ref, layout, optimized=True):
        return mosaic.load(ref, layout, interpret, optimized)

    def kernel(qkv_ref, bias_ref, weight_ref, cos_ref, sin_ref, o_ref, lse_ref, q_ref, k_ref, *scratch):
        qk_smem, v_smem, lse_smem, q_ready, k_ready, v_ready, everyone = scratch
        head, image, wg = (lax.axis_index(name) for name in ("head", "image", "wg"))

        def prepare(part, out_ref, ready):
            """Fetch, normalise and rotate the queries (part 0) or keys (part 1)."""
            begin, token, count, piece = parts[part]
            for i in range(count // piece):
                source = qkv_ref.at[image, pl.ds(token + i * piece, piece), part * h + head]
                plgpu.copy_gmem_to_smem(source, qk_smem.at[pl.ds(begin + i * piece, piece)], ready.at[i])
            bias, weight = (
                [load(ref.at[index, columns], mosaic.ROW_LAYOUT.reduce(0), optimized=False).astype(f32) for columns in half]
                for ref, index in ((bias_ref, part * h + head), (weight_ref, part))
            )

            def angles(row):
                rows = pl.ds(token + row, ROWS)
                return [load(ref.at[rows], mosaic.ROW_LAYOUT, optimized=False) for ref in (cos_ref, sin_ref)]

            def rotate(row, cos, sin):
                rows = [qk_smem.at[pl.ds(begin + row, ROWS), columns] for columns in half]
                x = [
                    load(ref, mosaic.ROW_LAYOUT).astype(f32) + broadcast(c, cos.shape, 1)
                    for ref, c in zip(rows, bias, strict=True)
                ]
                squares = jnp.sum(x[0] * x[0] + x[1] * x[1], axis=1)
                rstd = broadcast(lax.rsqrt(squares * (1 / n) + EPS), cos.shape, 0)
                first, second = (v * rstd * broadcast(w, cos.shape, 1) for v, w in zip(x, weight, strict=True))
                rows[0][...] = (first * cos - second * sin).astype(dtype)
                rows[1][...] = (second * cos + first * sin).astype(dtype)

            def one_piece(i, _):
                plgpu.barrier_wait(ready.at[i])
                turn = angles(i * piece)
                for row in range(0, piece, ROWS):  # the next angles are fetched ahead
                    following = angles(i * piece + row + ROWS) if row + ROWS < piece else None
                    rotate(i * piece + row, *turn)
                    turn = following
                plgpu.commit_smem()
                rows = pl.ds(i * piece, piece)
                plgpu.copy_smem_to_gmem(qk_smem.at[pl.ds(begin + i * piece, piece)], out_ref.at[image, rows, head])
                return _

            lax.fori_loop(0, count // piece, one_piece, None)

        @pl.when(wg == 0)
        def _queries():
            prepare(0, q_ref, q_ready)
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # outputs will take the place of queries

        @pl.when(wg == 1)
        def _keys():
            plgpu.copy_gmem_to_smem(qkv_ref.at[image, :, 2 * h + head], v_smem, v_ready)
            prepare(1, k_ref, k_ready)

        plgpu.barrier_arrive(everyone)
        plgpu.barrier_wait(everyone)
        plgpu.barrier_wait(v_ready)

        def tile_of_queries(i, _):
            first = (WARPGROUPS * i + wg) * TILE
            q_tile = qk_smem.at[pl.ds(first, TILE)]

            def step(j, carry):
                o, top, total = carry
                span = pl.ds(j * keys, keys)
                (s,) = mosaic.products((None, q_tile, qk_smem.at[pl.ds(kept + j * keys, keys)], "b"), interpret=interpret)
                new_top = jnp.maximum(top, jnp.max(s, axis=1) * scale)
                p = jnp.exp2(s * scale - broadcast(new_top, s.shape, 0))
                shrink = jnp.exp2(top - new_top)
                total = total * shrink + jnp.sum(p, axis=1)
                o = o * broadcast(shrink, o.shape, 0)
                (o,) = mosaic.products((o, p.astype(dtype), v_smem.at[span], ""), interpret=interpret)
                return o, new_top, total

            start = (
                mosaic.cast(jnp.zeros((TILE, n), f32), mosaic.WGMMA, interpret),
                mosaic.cast(jnp.full((TILE,), LEAST, f32), mosaic.OF_ROWS, interpret),
                mosaic.cast(jnp.zeros((TILE,), f32), mosaic.OF_ROWS, interpret),
            )
            o, top, total = lax.fori_loop(0, t // keys, step, start)
            bias = load(bias_ref.at[2 * h + head], mosaic.OF_COLUMNS, optimized=False).astype(f32)
            o = o * broadcast(1 / total, o.shape, 0) + broadcast(bias, o.shape, 1)
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # of the tile before
            stage = pl.ds(wg * TILE, TILE)
            qk_smem[stage] = o.astype(dtype)
            lse_smem[wg] = top + jnp.log2(total)
            plgpu.commit_smem()

            def copy_out(size):
                rows = pl.ds(first, size)
                plgpu.copy_smem_to_gmem(qk_smem.at[pl.ds(wg * TILE, size)], o_ref.at[image, rows, head])
                plgpu.copy_smem_to_gmem(lse_smem.at[wg, pl.ds(0, size)], lse_ref.at[image, head, rows])

            if kept % TILE == 0:
                copy_out(TILE)
            else:
                pl.when(first + TILE <= kept)(lambda: copy_out(TILE))
                pl.when(first + TILE > kept)(lambda: copy_out(kept % TILE))
            return _

        lax.fori_loop(0, (-(-kept // TILE) + WARPGROUPS - 1 - wg) // WARPGROUPS, tile_of_queries, None)
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)

    queries = jax.ShapeDtypeStruct((b, kept, h, n), dtype)
    return tuple(
        mosaic.call(
            kernel,
            *(qkv_BTGN, bias_GN, jnp.stack([q_weight_N, k_weight_N]).astype(f32), cos_TM.astype(f32), sin_TM.astype(f32)),
            name="hopper_attention_forward",
            grid=(h, b),
            grid_names=("head", "image"),
            warpgroups=WARPGROUPS,
            out=[queries, jax.ShapeDtypeStruct((b, h, kept), f32), queries, jax.ShapeDtypeStruct((b, t, h, n), dtype)],
            scratch=[
                mosaic.rows_of(kept + t, n, dtype, interpret),
                mosaic.rows_of(t, n, dtype, interpret),
                plgpu.SMEM((WARPGROUPS, TILE), f32),
                *(plgpu.Barrier(num_barriers=count // piece) for _, _, count, piece in parts),
                plgpu.Barrier(),
                plgpu.Barrier(num_arrivals=WARPGROUPS),
            ],
            interpret=interpret,
        )
    )
