"""Attention backward on Hopper: one kernel for the gradients of queries, keys and values, without atomics.

A block has one head of one image, with its queries, keys, values and output gradients in shared memory (4 x 288 x 64 values,
144 KiB). With P the softmax weights (recomputed from the logarithms of their sums), V = v + bias and S = q k^T / sqrt(N):

    dV = P^T do        dP = do V^T        dS = P * (dP - delta)        delta = rowsum(P * dP) = rowsum(do * o)
    dq = dS k / sqrt(N)                   dk = dS^T q / sqrt(N)

The bias drops out of dS, being the same for every key: dP - delta is unchanged if both use v for V, and o - bias for o.
Its own gradient is the sum of do over the queries.

A tile is 64 keys, a chunk 64 queries, a slot one chunk of dS in shared memory.

1. The first two warpgroups take alternate tiles. For each they loop over the chunks, in transposed form (scores are keys x
   queries), so that P and dS are left-hand operands in registers of the matmuls for dv and dk.
2. The third warpgroup has the gradients of all queries in registers (4.5 x 64 x 64 floats). It adds dS k for each chunk of
   dS, which it receives through a ring buffer of slots. So no matmul is done twice, nothing is accumulated in memory,
   and the order of all sums is fixed: gradients are the same bit for bit from run to run.
3. Before that, the third warpgroup starts all copies in the order in which they are needed and computes delta from o and do,
   chunk by chunk, while the other two already work on the first ones. The outputs o use the memory of the ring buffer.

Where the number of keys is no multiple of 64 the last tile extends into rows with undefined contents. They do not mix with
others (they are rows of dk and dv that are never stored) and are left out of dS k.

Measured on an H200 at 256 images of 12 heads: 574 us at 288 tokens (360 at 256), where two Triton kernels take 766 (594).
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from jitjax.kernels import mosaic
from jitjax.kernels.constants import ATTENTION, LOG2E
from jitjax.kernels.lowered import lowered_once
from jitjax.kernels.mosaic import COLUMNS, ROWS, TILE, broadcast, plgpu

SLOTS = 2  # of the ring buffer of each warpgroup with keys
FEW_QUERIES = 256  # up to here all warpgroups have enough registers
# Otherwise, of a thread that works on keys and of one that has the queries' gradients (144 of them for 288 queries).
REGISTERS = 160, 184
f32 = jnp.float32


def unsupported(tokens: int) -> str:
    """Why the kernel cannot take so many keys of those that `hopper_forward` takes, or an empty string."""
    if not mosaic.TRANSPOSED_STORES:
        return f"jax {jax.__version__}, which cannot store a transposed tile"
    return f"{tokens} tokens, fewer than {2 * TILE}" if tokens < 2 * TILE else ""


class _Sum:
    """An accumulator in the interpreter."""

    def __init__(self, value):
        self.value = value


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
    """Gradients of `hopper_forward.forward` up to the normalised, rotated queries and keys.

    Args:
      q_BTHN, k_BTHN, o_BQHN, lse_BHQ: as the forward pass returns them. Q = T - drop queries.
      qkv_BTGN, bias_GN: its input, of which the values are used.

    Returns:
      dq_BTHN (zero for dropped tokens), dk_BTHN; dqkv_BTGN with the third of the values written and the rest
      undefined; dbias_HN of the values, float32.
    """
    b, tq, h, n = o_BQHN.shape
    tk = k_BTHN.shape[1]
    drop, dtype, scale = tk - tq, q_BTHN.dtype, 1 / math.sqrt(n)
    chunks = [(first, min(TILE, tq - first)) for first in range(0, tq, TILE)]
    tiles = [(first, min(TILE, tk - first)) for first in range(0, tk, TILE)]
    rounds = tk // TILE // 2  # in which both warpgroups have a full tile
    # Rows of the one big array in shared memory. Keys and values are followed by rows for the rest of their last tile.
    q_at, do_at, k_at, v_at = 0, tq, 2 * tq, 2 * tq + tk + ROWS
    ring_at = v_at + tk + ROWS
    stage_at = ring_at + 2 * SLOTS * TILE

    def cast(x, layout):
        return mosaic.cast(x, layout, interpret)

    def load(ref, layout, optimized=True):
        return mosaic.load(ref, layout, interpret, optimized)

    def with_sums(shapes, fn):
        """fn(sums) with accumulators that start as zeros; their values at the end."""
        zeros = [cast(jnp.zeros(shape, f32), mosaic.WGMMA) for shape in shapes]
        if interpret:
            sums = [_Sum(x) for x in zeros]
            fn(sums)
            return [x.value for x in sums]
        return pl.run_state(fn)([plgpu.ACC.init(x) for x in zeros])

    def with_scores(shape, fn):
        """fn(s, dp) with two accumulators of zeros, inside `with_sums`."""
        if interpret:
            fn(_Sum(0.0), _Sum(0.0))
        else:
            pl.run_scoped(fn, plgpu.ACC(shape, f32), plgpu.ACC(shape, f32))

    def add_matmul(acc, a, b, which=""):
        """Starts acc += a @ b, those of a and b transposed that `which` names."""
        if interpret:
            a, b = ((x if isinstance(x, jax.Array) else x[...]).astype(f32) for x in (a, b))
            acc.value += jnp.dot(a.T if "a" in which else a, b.T if "b" in which else b, precision="highest")
        else:
            plgpu.wgmma(acc, a.transpose((1, 0)) if "a" in which else a, b.transpose((1, 0)) if "b" in which else b)

    def value_of(acc, in_flight):
        """The accumulator when all but the last `in_flight` matmuls are done."""
        return acc.value if interpret else plgpu.wgmma_accumulator_load(acc, wait_n=in_flight)

    def wait_for_matmuls(in_flight):
        if not interpret:
            plgpu.wgmma_wait(in_flight)

    def loop(count, body):
        """The interpreter's sums are values, which have to be carried from one iteration to the next."""
        if interpret:
            for i in range(count):
                body(i)
        else:
            lax.fori_loop(0, count, lambda i, _: body(i), None)

    def kernel(q_ref, k_ref, qkv_ref, bias_ref, o_ref, lse_ref, do_ref, dq_ref, dk_ref, dqkv_ref, dbias_ref, *scratch):
        smem, lse_smem, delta_smem, dbias_smem, ones_smem, *barriers = scratch
        queries_ready, keys_ready, lse_ready, delta_ready, full, empty = barriers
        image, head, wg = (lax.axis_index(name) for name in ("image", "head", "wg"))

        def rows(at, first, size):
            return smem.at[pl.ds(at + first, size)]

        def slot(w, c):  # the slots of both warpgroups alternate, in the order in which they are first written
            return rows(ring_at, ((c % SLOTS) * 2 + w) * TILE, TILE)

        # ------------------------------------------------------------ the two warpgroups with keys

        def tile_of_keys(i):
            tile = 2 * i + wg
            first = tile * TILE
            k, v = rows(k_at, first, TILE), rows(v_at, first, TILE)
            plgpu.barrier_wait(keys_ready.at[tile])

            def one_chunk(sums, c, size):
                dv, dk = sums
                q, do = rows(q_at, c * TILE, size), rows(do_at, c * TILE, size)

                def scores(s, dp):
                    wait_for_matmuls(0)
                    pl.when(i == 0)(lambda: plgpu.barrier_wait(queries_ready.at[c]))
                    add_matmul(s, k, q, "b")
                    add_matmul(dp, v, do, "b")
                    pl.when(i == 0)(lambda: plgpu.barrier_wait(delta_ready.at[c]))

                    def columns(ref):
                        x = load(ref.at[pl.ds(c * TILE, size)], mosaic.OF_COLUMNS, optimized=False)
                        return broadcast(x, (TILE, size), 1)

                    p = jnp.exp2(value_of(s, 1) * (scale * LOG2E) - columns(lse_smem))
                    weights = p.astype(dtype)
                    ds = (p * (value_of(dp, 0) - columns(delta_smem))).astype(dtype)
                    add_matmul(dv, weights, do)
                    add_matmul(dk, ds, q)
                    plgpu.barrier_wait(empty.at[wg * SLOTS + c % SLOTS])
                    slot(wg, c).at[:, pl.ds(0, size)][...] = ds
                    plgpu.commit_smem()
                    plgpu.barrier_arrive(full.at[wg * SLOTS + c % SLOTS])

                with_scores((TILE, size), scores)

            def all_chunks(sums):
                loop(tq // TILE, lambda c: one_chunk(sums, c, TILE))
                if tq % TILE:
                    one_chunk(sums, tq // TILE, tq % TILE)

            pl.when(i == 0)(lambda: plgpu.barrier_wait(lse_ready))
            dv, dk = with_sums([(TILE, n)] * 2, all_chunks)
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            stage = rows(stage_at, wg * TILE, TILE)
            v[...] = dv.astype(dtype)  # no one else reads this tile of the values
            stage[...] = (dk * scale).astype(dtype)
            plgpu.commit_smem()

            def copy(size):
                out = pl.ds(first, size)
                plgpu.copy_smem_to_gmem(v.at[pl.ds(0, size)], dqkv_ref.at[image, out, 2 * h + head])
                plgpu.copy_smem_to_gmem(stage.at[pl.ds(0, size)], dk_ref.at[image, out, head])

            mosaic.with_rows_of_tile(first, tk, copy)

        def keys():
            if interpret:  # where the count has to be known
                for w in range(2):
                    pl.when(wg == w)(lambda w=w: loop((len(tiles) + 1 - w) // 2, tile_of_keys))
            else:
                loop((len(tiles) + 1 - wg) // 2, tile_of_keys)
            pl.when(wg == 1)(sum_of_do)  # it has one tile less, or as many
            for i in range(SLOTS):
                plgpu.barrier_wait(empty.at[wg * SLOTS + i])
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)

        def sum_of_do():
            """As a matmul with ones, whose eight columns are all the same."""
            ones_smem[...] = cast(jnp.ones((ROWS, COLUMNS), dtype), mosaic.ROW_LAYOUT)
            plgpu.commit_smem()

            def add(sums):
                for at in range(0, tq, COLUMNS):
                    add_matmul(sums[0], rows(do_at, at, COLUMNS), ones_smem.at[pl.ds(0, 8)], "ab")

            (total,) = with_sums([(n, 8)], add)
            dbias_smem[...] = jnp.max(total, axis=1)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(dbias_smem, dbias_ref.at[image, head])

        # ------------------------------------------------------------ the one with queries

        def copy_queries(c):
            at, size = chunks[c]
            source, own, ready = pl.ds(drop + at, size), pl.ds(at, size), queries_ready.at[c]
            plgpu.copy_gmem_to_smem(do_ref.at[image, own, head], rows(do_at, at, size), ready)
            plgpu.copy_gmem_to_smem(o_ref.at[image, own, head], rows(ring_at, at, size), ready)
            plgpu.copy_gmem_to_smem(q_ref.at[image, source, head], rows(q_at, at, size), ready)

        def copy_keys(tile):
            at, size = tiles[tile]
            own, ready = pl.ds(at, size), keys_ready.at[tile]
            plgpu.copy_gmem_to_smem(k_ref.at[image, own, head], rows(k_at, at, size), ready)
            plgpu.copy_gmem_to_smem(qkv_ref.at[image, own, 2 * h + head], rows(v_at, at, size), ready)

        def copies():
            copy_queries(0)
            copy_keys(0)
            mosaic.copy_vector(lse_ref.at[image, head], lse_smem, lse_ready)
            copy_keys(1)
            for c in range(1, len(chunks)):
                copy_queries(c)
            for tile in range(2, len(tiles)):
                copy_keys(tile)

        def deltas(bias):
            bias = bias.astype(f32)  # not earlier, since that would wait for the load before the copies
            slots = [w * SLOTS + s for s in range(SLOTS) for w in range(2)]  # in the order of their memory
            for c, (first, size) in enumerate(chunks):
                plgpu.barrier_wait(queries_ready.at[c])
                for at in range(first, first + size, ROWS):
                    o, do = (load(rows(part, at, ROWS), mosaic.ROW_LAYOUT).astype(f32) for part in (ring_at, do_at))
                    delta_smem[pl.ds(at, ROWS)] = jnp.sum(do * (o - broadcast(bias, o.shape, 1)), axis=1)
                plgpu.commit_smem()
                plgpu.barrier_arrive(delta_ready.at[c])
                if c < len(slots):
                    plgpu.barrier_arrive(empty.at[slots[c]])
            for unused in slots[len(chunks) :]:
                plgpu.barrier_arrive(empty.at[unused])

        def add_all(dq):
            def release(w, c, in_flight):
                wait_for_matmuls(in_flight)
                plgpu.barrier_arrive(empty.at[w * SLOTS + c % SLOTS])

            def go_over(pairs, size):
                """All chunks of dS of one tile each of one or both warpgroups: pairs of tile and warpgroup."""
                before = None  # whose slot the last but one matmul reads
                for tile, _ in pairs:
                    plgpu.barrier_wait(keys_ready.at[tile])
                for c, (_, width) in enumerate(chunks):
                    for tile, w in pairs:
                        plgpu.barrier_wait(full.at[w * SLOTS + c % SLOTS])
                        ds = slot(w, c).at[pl.ds(0, size), pl.ds(0, width)]
                        add_matmul(dq[c], rows(k_at, tile * TILE, size), ds, "a")
                        if before:
                            release(*before, 1)
                        before = w, c
                release(*before, 0)

            loop(rounds, lambda i: go_over([(2 * i, 0), (2 * i + 1, 1)], TILE))
            for tile in range(2 * rounds, len(tiles)):
                go_over([(tile, tile % 2)], tiles[tile][1])

        def queries():
            bias = load(bias_ref.at[2 * h + head], mosaic.ROW_LAYOUT.reduce(0), optimized=False)
            copies()
            deltas(bias)
            dq = with_sums([(n, size) for _, size in chunks], add_all)
            # No one reads the keys any more: the scores of a tile come before its dS, and all four warps get here.
            plgpu.commit_smem()
            for (at, size), x in zip(chunks, dq, strict=True):
                x = (x * scale).astype(dtype)
                if interpret:
                    rows(k_at, at, size)[...] = x.T
                else:
                    rows(k_at, at, size).transpose((1, 0))[...] = x
            zeros = rows(k_at, tk, ROWS)
            if drop:
                zeros[...] = cast(jnp.zeros((ROWS, n), dtype), mosaic.ROW_LAYOUT)
            plgpu.commit_smem()
            for at, size in chunks:
                plgpu.copy_smem_to_gmem(rows(k_at, at, size), dq_ref.at[image, pl.ds(drop + at, size), head])
            for at in range(0, drop, ROWS):
                plgpu.copy_smem_to_gmem(zeros, dq_ref.at[image, pl.ds(at, ROWS), head])
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)

        def with_registers(count, action, body):
            if tq > FEW_QUERIES and not interpret:
                plgpu.set_max_registers(count, action=action)
            body()

        pl.when(wg < 2)(lambda: with_registers(REGISTERS[0], "decrease", keys))
        pl.when(wg == 2)(lambda: with_registers(REGISTERS[1], "increase", queries))

    keys_like = jax.ShapeDtypeStruct((b, tk, h, n), dtype)
    dq, dk, dqkv, dbias = mosaic.call(
        kernel,
        *(q_BTHN, k_BTHN, qkv_BTGN, bias_GN, o_BQHN, lse_BHQ, do_BQHN),
        scope=ATTENTION,
        name="hopper_backward",
        grid=(h, b),
        grid_names=("head", "image"),
        warpgroups=3,
        out=[keys_like, keys_like, jax.ShapeDtypeStruct(qkv_BTGN.shape, dtype), jax.ShapeDtypeStruct((b, h, n), f32)],
        scratch=[
            mosaic.rows_of(max(stage_at + 2 * TILE, ring_at + tq), n, dtype=dtype, interpret=interpret),
            *(plgpu.SMEM((size,), f32) for size in (tq, tq, n)),
            mosaic.rows_of(ROWS, COLUMNS, dtype=dtype, interpret=interpret),
            plgpu.Barrier(num_arrivals=3, num_barriers=len(chunks)),
            plgpu.Barrier(num_arrivals=2, num_barriers=len(tiles)),
            plgpu.Barrier(num_arrivals=2),
            plgpu.Barrier(num_barriers=len(chunks)),
            plgpu.Barrier(num_barriers=2 * SLOTS),
            plgpu.Barrier(num_barriers=2 * SLOTS),
        ],
        interpret=interpret,
    )
    return dq, dk, dqkv, dbias.sum(0)
