"""The MLP's two large matmuls on Hopper, with SwiGLU computed inside the same kernels.

    forward     x12 = x @ w12         u = silu(a) * b     with [a | b] = x12 + bias
    backward    du = dy @ w3^T        dx12 = du * [b silu'(a) | silu(a)]     and its sum over all rows, the bias' gradient

A separate elementwise kernel after the matmul would read x12 again forward, and write and read du as well as read x12 backward.
Here a tile of the matmul's result is passed to SwiGLU through shared memory, and both run at the same time:

1. Two warpgroups multiply: a tile is 128 rows by 256 columns, 64 rows each. They also start the copies of their operands, one
   of rows, the other of weights, into a ring buffer of stages; a stage is refilled once both warpgroups have consumed it.
2. A finished tile is rounded and written to shared memory, and they continue with the next one.
3. The third warpgroup reads it from there in subtiles of 32 rows and 64 columns. Backward, it receives the subtiles of x12
   through a ring buffer of slots of its own, and dx12 is copied out from the same slots. A group is the subtiles of 64 columns.

Blocks are persistent and take tile after tile, columns first, so that rows and weights are read from the L2 cache. The third
warpgroup's code has to fit into the instruction cache: unrolled for a whole tile it took three times as long as in a loop
over groups.

Measured on an H100, 73 728 rows, width 768, F = 2048: forward 752 us where cuBLAS and a separate SwiGLU kernel take 945
to 985 (the matmul alone 650), backward 635 where they take 900 (338).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from jitjax.kernels import mosaic
from jitjax.kernels.constants import MLP
from jitjax.kernels.lowered import lowered_once
from jitjax.kernels.mosaic import TILE, broadcast, plgpu

MULTIPLY = 2  # warpgroups that multiply
ROWS = MULTIPLY * TILE  # of a tile
COLUMNS = 256
GROUP = 64  # columns of a subtile, and of a group
SIZE = 32  # rows of a subtile
UNIT = 128  # F is a multiple of it
FORWARD_SLOTS, BACKWARD_SLOTS = 4, 4  # for subtiles
f32 = jnp.float32

if plgpu:
    # SIZE x GROUP values on a warpgroup: a warp has 16 columns, a thread 8 neighbouring ones of two rows. 8 consecutive lanes
    # read the same columns of 8 rows, without bank conflicts; a sum over rows stays within a warp.
    LAYOUT = plgpu.Layout.TILED(
        plgpu.Tiling(((16, 64), (16, 16), (8, 8))), warp_dims=(-5,), lane_dims=(-4, -3, -2), vector_dim=-1
    )


@dataclasses.dataclass(frozen=True)
class Ring:
    """Ring buffer of operands: how many stages, and how much of the contraction each holds."""

    stages: int
    depth: int


FORWARD, BACKWARD, MASKED_BACKWARD = Ring(3, 64), Ring(5, 32), Ring(4, 32)  # as many as shared memory holds


def unsupported(width: int, hidden: int, dtype: jax.typing.DTypeLike) -> str:
    """Why the kernels cannot take these shapes, or an empty string. Any number of rows is possible."""
    if jnp.dtype(dtype).itemsize != 2:
        return f"matmuls in {jnp.dtype(dtype).name}"
    if width % FORWARD.depth or width < FORWARD.depth * FORWARD.stages:
        return f"a width of {width}, no multiple of {FORWARD.depth} or too small"
    return f"{hidden} hidden units, no multiple of {UNIT}" if hidden % UNIT else ""


def _silu(half: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Sigmoid s and silu of a = 2 `half`: s = (1 + t) / 2 and a s = half + half t with t = tanh(half), one special function.

    The card's tanh is within 2^-11, so s within 2^-12, below what rounding x12 costs.
    """
    t = jnp.tanh(half)
    return 0.5 + 0.5 * t, half + half * t


@lowered_once
def forward(x_MD: jax.Array, w12_ND: jax.Array, bias_N: jax.Array, *, interpret: bool = False) -> tuple[jax.Array, jax.Array]:
    """x12 and u of the module's first line, in the type of x.

    Args:
      x_MD: M rows, a multiple of 128.
      w12_ND: both halves' weights, transposed, N = 2F. bias_N: float32.

    Returns:
      x12_MN without the bias; u_MF.
    """
    (m, _), n, dtype = x_MD.shape, w12_ND.shape[0], x_MD.dtype
    f, slots, wide = n // 2, FORWARD_SLOTS, COLUMNS // 2
    per_group = ROWS // SIZE

    class Refs(NamedTuple):
        bias: Any
        x12: Any
        u: Any
        u_smem: Any
        bias_smem: Any
        bias_ready: Any

    def bring_bias(refs, buffer, column):
        for half in range(2):
            source = refs.bias.at[pl.ds(half * f + column * wide, wide)]
            plgpu.copy_gmem_to_smem(source, refs.bias_smem.at[buffer, half], refs.bias_ready.at[buffer])

    def begin(refs, position):
        bring_bias(Refs(*refs), 0, position[1])

    def rows(refs, tile_smem, tile_ready, i, position, following, more):
        refs = Refs(*refs)
        (row, column), buffer = position, lax.rem(i, 2)
        pl.when(more)(lambda: bring_bias(refs, 1 - buffer, following[1]))
        plgpu.barrier_wait(refs.bias_ready.at[buffer])
        plgpu.barrier_wait(tile_ready)
        for wg in range(MULTIPLY):
            for half in range(2):
                out = refs.x12.at[pl.ds(row + wg * TILE, TILE), pl.ds(half * f + column * wide, wide)]
                plgpu.copy_smem_to_gmem(tile_smem.at[wg, half], out)

        def group(g, _):
            own = pl.ds(pl.multiple_of(g * GROUP, GROUP), GROUP)
            bias_a, bias_b = (_along_rows(refs.bias_smem.at[buffer, half, own], interpret) for half in range(2))
            bias_a = 0.5 * bias_a
            for r in range(per_group):
                wg, at = divmod(r * SIZE, TILE)
                parts = [tile_smem.at[wg, half, pl.ds(at, SIZE), own] for half in range(2)]
                a, b = (mosaic.load(p, LAYOUT, interpret).astype(f32) for p in parts)
                _, silu = _silu(0.5 * a + bias_a)
                slot = refs.u_smem.at[r % slots]
                plgpu.wait_smem_to_gmem(slots - 1, wait_read_only=True)
                slot[...] = (silu * (b + bias_b)).astype(dtype)
                plgpu.commit_smem()
                out = refs.u.at[pl.ds(row + r * SIZE, SIZE), pl.ds(column * wide + g * GROUP, GROUP)]
                plgpu.copy_smem_to_gmem(slot, out)

        lax.fori_loop(0, wide // GROUP, group, None)
        # More copies of u than there are slots were started after those of x12, so x12 has been copied out of the tile.

    x12, u = _matmul(
        x_MD,
        w12_ND,
        bias_N.astype(f32),
        name="hopper_forward",
        ring=FORWARD,
        weights=lambda column: [(half * f + column * wide, wide) for half in range(2)],
        column_tiles=f // wide,
        parts=2,
        begin=begin,
        rows=rows,
        out=[jax.ShapeDtypeStruct((m, n), dtype), jax.ShapeDtypeStruct((m, f), dtype)],
        scratch=[
            _rows_of(slots, SIZE, GROUP, dtype=dtype, interpret=interpret),
            plgpu.SMEM((2, 2, wide), f32),
            plgpu.Barrier(num_arrivals=2, num_barriers=2),
        ],
        interpret=interpret,
    )
    return x12, u


@lowered_once
def backward(
    dy_MD: jax.Array,
    w3_FD: jax.Array,
    x12_MN: jax.Array,
    bias_N: jax.Array,
    keep_MF: jax.Array | None = None,
    *,
    scale: float = 1.0,
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """dx12 and its sum over rows, of the module's second line.

    Args:
      dy_MD: gradient of u @ w3, M rows, a multiple of 128.
      w3_FD: weights. x12_MN: as `forward` returned it. bias_N: float32, N = 2F.
      keep_MF: None, or uint8, 0 where dropout zeroed u; the rest was multiplied by `scale`.

    Returns:
      dx12_MN; dbias_N, float32.
    """
    m, f, dtype = dy_MD.shape[0], w3_FD.shape[0], dy_MD.dtype
    slots, groups, half_tile = BACKWARD_SLOTS, COLUMNS // GROUP, COLUMNS // 2
    per_group = ROWS // SIZE
    subtiles = per_group * groups
    masked = keep_MF is not None
    column_tiles, whole = -(-f // COLUMNS), f % COLUMNS == 0

    def start_of(column, j):
        """First column of the first or second half of a tile; where there is no second half, one that exists."""
        start = column * COLUMNS + j * half_tile
        return start if whole or j == 0 else jnp.minimum(start, f - half_tile)

    def if_there(column, g, fn):
        fn() if whole else pl.when(column * COLUMNS + g * GROUP < f)(fn)

    class Refs(NamedTuple):
        x12: Any
        bias: Any
        keep: Any
        dx12: Any
        sums: Any
        ring: Any
        bias_smem: Any
        keep_ring: Any
        ready: Any
        bias_ready: Any

        @classmethod
        def of(cls, refs):
            return cls(*refs) if masked else cls(*refs[:2], None, *refs[2:6], None, *refs[6:])

    def bring(refs, position, subtile):
        (row, column), slot = position, subtile % slots
        g, r = subtile // per_group, subtile % per_group
        at, start = pl.ds(row + r * SIZE, SIZE), column * COLUMNS + g * GROUP

        def copy():
            for half in range(2):
                source = refs.x12.at[at, pl.ds(half * f + start, GROUP)]
                plgpu.copy_gmem_to_smem(source, refs.ring.at[slot, half], refs.ready.at[slot])
            if masked:
                plgpu.copy_gmem_to_smem(refs.keep.at[at, pl.ds(start, GROUP)], refs.keep_ring.at[slot], refs.ready.at[slot])

        if_there(column, g, copy)

    def bring_bias(refs, buffer, column):
        for half in range(2):
            for j in range(2):
                source = refs.bias.at[pl.ds(half * f + start_of(column, j), half_tile)]
                part = refs.bias_smem.at[buffer, half, pl.ds(j * half_tile, half_tile)]
                plgpu.copy_gmem_to_smem(source, part, refs.bias_ready.at[buffer])

    def begin(refs, position):
        refs = Refs.of(refs)
        bring_bias(refs, 0, position[1])
        for subtile in range(slots - 1):
            bring(refs, position, subtile)

    def rows(refs, tile_smem, tile_ready, i, position, following, more):
        refs = Refs.of(refs)
        (row, column), buffer = position, lax.rem(i, 2)
        pl.when(more)(lambda: bring_bias(refs, 1 - buffer, following[1]))
        plgpu.barrier_wait(refs.bias_ready.at[buffer])
        plgpu.barrier_wait(tile_ready)

        def refill(subtile):
            """In the slot of the subtile before this one, which has most likely been copied out by now."""
            plgpu.wait_smem_to_gmem(2, wait_read_only=True)
            after = subtile - 1 + slots
            over = after >= subtiles
            source = tuple(jnp.where(over, b, a) for a, b in zip(position, following, strict=True))
            pl.when(~over | more)(lambda: bring(refs, source, jnp.where(over, after - subtiles, after)))

        def group(g, _):
            if_there(column, g, lambda: of_group(g))
            if not whole:

                @pl.when(column * COLUMNS + g * GROUP >= f)
                def _absent():
                    for r in range(per_group):
                        refill(g * per_group + r)

        def of_group(g):
            start = pl.multiple_of(g * GROUP, GROUP)
            bias_a, bias_b = (_along_rows(refs.bias_smem.at[buffer, half, pl.ds(start, GROUP)], interpret) for half in range(2))
            bias_a = 0.5 * bias_a
            totals = []
            outs = [pl.ds(half * f + column * COLUMNS + g * GROUP, GROUP) for half in range(2)]

            def halves(r):
                return [refs.ring.at[r % slots, half] for half in range(2)]

            def fetch(r):
                plgpu.barrier_wait(refs.ready.at[r % slots])
                wg, at = divmod(r * SIZE, TILE)
                du = tile_smem.at[wg, 0, pl.ds(at, SIZE), pl.ds(start, GROUP)]
                mask = [refs.keep_ring.at[r % slots]] if masked else []
                return [mosaic.load(ref, LAYOUT, interpret) for ref in (du, *halves(r), *mask)]

            upcoming = fetch(0)
            for r in range(per_group):
                du, a, b, *keep = (x.astype(f32) for x in upcoming)
                if masked:
                    du *= scale * keep[0]
                if r + 1 < per_group:
                    upcoming = fetch(r + 1)
                s, silu = _silu(0.5 * a + bias_a)
                new = du * (b + bias_b) * (s + silu * (1 - s)), du * silu
                for ref, value in zip(halves(r), new, strict=True):
                    ref[...] = value.astype(dtype)
                plgpu.commit_smem()
                for ref, out in zip(halves(r), outs, strict=True):
                    plgpu.copy_smem_to_gmem(ref, refs.dx12.at[pl.ds(row + r * SIZE, SIZE), out])
                refill(g * per_group + r)
                totals = [t + value for t, value in zip(totals, new, strict=True)] if totals else new
            for total, out in zip(totals, outs, strict=True):
                mosaic.store(refs.sums.at[row // ROWS, out], jnp.sum(total, axis=0), interpret, optimized=False)

        lax.fori_loop(0, groups, group, None)

    dx12, sums = _matmul(
        dy_MD,
        w3_FD,
        x12_MN,
        bias_N.astype(f32),
        *([keep_MF] if masked else []),
        name="hopper_backward",
        ring=MASKED_BACKWARD if masked else BACKWARD,
        weights=lambda column: [(column * COLUMNS, COLUMNS)] if whole else [(start_of(column, j), half_tile) for j in (0, 1)],
        column_tiles=column_tiles,
        parts=1,
        begin=begin,
        rows=rows,
        out=[jax.ShapeDtypeStruct((m, 2 * f), dtype), jax.ShapeDtypeStruct((m // ROWS, 2 * f), f32)],
        scratch=[
            _rows_of(slots, 2, SIZE, GROUP, dtype=dtype, interpret=interpret),
            plgpu.SMEM((2, 2, COLUMNS), f32),
            *([plgpu.SMEM((slots, SIZE, GROUP), jnp.uint8)] if masked else []),
            plgpu.Barrier(num_arrivals=2 + masked, num_barriers=slots),
            plgpu.Barrier(num_arrivals=4, num_barriers=2),
        ],
        interpret=interpret,
    )
    return dx12, sums.sum(0)


def _along_rows(ref: Any, interpret: bool) -> jax.Array:
    """GROUP values in shared memory, the same in each row of a subtile."""
    x = mosaic.load(ref, LAYOUT.reduce(0), interpret, optimized=False)
    return mosaic.cast(broadcast(x, (SIZE, GROUP), 1), LAYOUT, interpret)


def _rows_of(*shape: int, dtype: Any, interpret: bool) -> Any:
    """Rows in shared memory for subtiles of GROUP columns."""
    return mosaic.rows_of(*shape, dtype=dtype, interpret=interpret, columns=GROUP)


def _matmul(
    x_MD: jax.Array,
    w_ND: jax.Array,
    *others: jax.Array,
    name: str,
    ring: Ring,
    weights: Callable[[Any], Sequence[tuple[Any, int]]],
    column_tiles: int,
    parts: int,
    begin: Callable[..., None],
    rows: Callable[..., None],
    out: Sequence[jax.ShapeDtypeStruct],
    scratch: Sequence[Any],
    interpret: bool,
) -> list[jax.Array]:
    """Tiles of x @ w^T, each passed to `rows` in the compute type.

    Args:
      weights: (first row, number) of the parts of w_ND that make up a tile's columns, from the number of the column tile.
      parts: that a warpgroup's tile is divided into along its columns, each one bulk copy.
      begin: called once by the third warpgroup, with references to others, out and scratch and the position of the first tile.
      rows: called for every tile by the third warpgroup: (references, tile in shared memory (2, parts, 64, 256 / parts),
        barrier that signals it, number of the tile in this block, its position, the next one's position, whether there is a
        next one). A position is (first row, number of the column tile). When it returns nothing may read the tile any more.
    """
    (m, d), dtype = x_MD.shape, x_MD.dtype
    if m % ROWS:
        raise ValueError(f"{m} rows, no multiple of {ROWS}")
    stages, depth = ring.stages, ring.depth
    steps, tiles, width = d // depth, m // ROWS * column_tiles, COLUMNS // parts
    blocks = min(mosaic.multiprocessors(), tiles)

    def kernel(x_ref, w_ref, *rest):
        *refs, tile_smem, x_smem, w_smem, full, empty, tile_ready, tile_read = rest
        wg, block = lax.axis_index("wg"), lax.axis_index("block")
        count = (tiles - block + blocks - 1) // blocks

        def position(i):
            tile = block + i * blocks
            return tile // column_tiles * ROWS, lax.rem(tile, column_tiles)

        def slot_of(i, step):
            return lax.rem(i * steps + step, stages)

        def load(i, step):
            """Starts the copies for a step: rows by the first warpgroup, weights by the second."""
            (row, column), slot, part = position(i), slot_of(i, step), pl.ds(step * depth, depth)

            @pl.when(wg == 0)
            def _rows():
                plgpu.copy_gmem_to_smem(x_ref.at[pl.ds(row, ROWS), part], x_smem.at[slot], full.at[slot])

            @pl.when(wg == 1)
            def _weights():
                at = 0
                for start, size in weights(column):
                    w = w_ref.at[pl.ds(start, size), part]
                    plgpu.copy_gmem_to_smem(w, w_smem.at[slot, pl.ds(at, size)], full.at[slot])
                    at += size

        def multiply():
            for step in range(stages):
                load(0, step)

            def tile(i, _):
                def operands(step):
                    slot = slot_of(i, step)
                    plgpu.barrier_wait(full.at[slot])
                    return x_smem.at[slot, pl.ds(wg * TILE, TILE)], w_smem.at[slot]

                def replace(step):
                    """When both warpgroups have consumed a step, refill its stage for a later one, of this tile or the next."""
                    slot, after = slot_of(i, step), step + stages
                    plgpu.barrier_arrive(empty.at[slot])
                    plgpu.barrier_wait(empty.at[slot])
                    over = after >= steps
                    i_of, step_of = jnp.where(over, i + 1, i), jnp.where(over, after - steps, after)
                    pl.when(~over | (i + 1 < count))(lambda: load(i_of, step_of))

                def simulated():
                    total = jnp.zeros((TILE, COLUMNS), f32)
                    for step in range(steps):
                        x, w = (ref[...].astype(f32) for ref in operands(step))
                        total += jnp.dot(x, w.T, precision="highest")
                        if step < steps - 1:
                            replace(jnp.int32(step))
                    return total

                def accumulate(acc):
                    def start(step):
                        x, w = operands(step)
                        plgpu.wgmma(acc, x, w.transpose((1, 0)))

                    def one(step, _):
                        start(step)
                        plgpu.wgmma_wait(1)  # the one before is done
                        replace(step - 1)

                    start(0)
                    lax.fori_loop(1, steps, one, None)
                    return acc[...]

                sums = simulated() if interpret else pl.run_scoped(accumulate, plgpu.ACC((TILE, COLUMNS), f32))
                replace(jnp.int32(steps - 1))
                plgpu.barrier_wait(tile_read)
                for part in range(parts):
                    tile_smem[wg, part] = sums[:, part * width : (part + 1) * width].astype(dtype)
                plgpu.commit_smem()
                plgpu.barrier_arrive(tile_ready)

            lax.fori_loop(0, count, tile, None)
            plgpu.barrier_wait(tile_read)

        def side():
            plgpu.barrier_arrive(tile_read)
            begin(refs, position(0))

            def tile(i, _):
                rows(refs, tile_smem, tile_ready, i, position(i), position(i + 1), i + 1 < count)
                plgpu.barrier_arrive(tile_read)

            lax.fori_loop(0, count, tile, None)
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)

        pl.when(wg < MULTIPLY)(multiply)
        pl.when(wg == MULTIPLY)(side)

    def operand(rows):
        return mosaic.rows_of(stages, rows, depth, dtype=dtype, interpret=interpret, columns=depth)

    return mosaic.call(
        kernel,
        *(x_MD, w_ND, *others),
        scope=MLP,
        name=name,
        grid=(blocks,),
        grid_names=("block",),
        warpgroups=MULTIPLY + 1,
        out=out,
        scratch=[
            *scratch,
            _rows_of(MULTIPLY, parts, TILE, width, dtype=dtype, interpret=interpret),
            operand(ROWS),
            operand(COLUMNS),
            plgpu.Barrier(num_arrivals=1 + len(weights(0)), num_barriers=stages),
            plgpu.Barrier(num_arrivals=MULTIPLY, num_barriers=stages),
            plgpu.Barrier(num_arrivals=MULTIPLY),
            plgpu.Barrier(),
        ],
        interpret=interpret,
    )
