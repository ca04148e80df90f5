"""Many arrays packed row by row into one buffer for a transfer between devices, and unpacked again."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from jitjax.kernels import triton
from jitjax.kernels.triton import Span, load, store

BLOCK, WARPS = 4096, 4  # elements that one program copies
MOST = 2**31 - BLOCK  # elements of a buffer: the kernels count with int32, to the end of a last block


def plain_pack(parts: Sequence[jax.Array], dtype: Any) -> jax.Array:
    """Arrays (R, ...) one behind the other, (R, sum of the sizes of their rows), in `dtype`; those of (1, ...) in every row."""
    rows = max(map(len, parts))
    flat = [part.reshape(len(part), -1).astype(dtype) for part in parts]
    return jnp.concatenate([jnp.broadcast_to(part, (rows, part.shape[1])) for part in flat], axis=1)


def plain_unpack(packed: jax.Array, sizes: Sequence[int]) -> list[jax.Array]:
    """Arrays (R, size) of the given sizes, from the start of (R, S)."""
    return jnp.split(packed, list(itertools.accumulate(sizes)), axis=1)[:-1]


def fused_pack(parts: Sequence[jax.Array], dtype: Any) -> jax.Array:
    """`plain_pack` by one kernel, at the speed of a copy; XLA's concatenation of a model's gradients moves a fifth of that."""
    rows, sizes = max(map(len, parts)), [part.size // len(part) for part in parts]
    width = sum(sizes)
    if not 0 < rows * width <= MOST:
        return plain_pack(parts, dtype)
    own = [len(part) > 1 for part in parts]

    def kernel(*refs):
        def copy(i, row, start, inside):
            source = (row if own[i] else 0) * sizes[i]
            value = load(refs[i], _span(source, inside, sizes[i]), dtype=None)
            store(refs[-1], _span(row * width + start, inside, sizes[i]), value=value)

        _each_block(sizes, copy)

    out = [((rows * width,), dtype)]
    flat = [part.ravel() for part in parts]
    (packed,) = triton.call(kernel, *flat, scope="exchange", name="pack", grid=_grid(rows, sizes), out=out, warps=WARPS)
    return packed.reshape(rows, width)


def fused_unpack(packed: jax.Array, sizes: Sequence[int]) -> list[jax.Array]:
    """`plain_unpack` by one kernel."""
    rows, width = packed.shape
    if not (rows * sum(sizes) and packed.size <= MOST):
        return plain_unpack(packed, sizes)

    def kernel(source, *refs):
        def copy(i, row, start, inside):
            value = load(source, _span(row * width + start, inside, sizes[i]), dtype=None)
            store(refs[i], _span(row * sizes[i], inside, sizes[i]), value=value)

        _each_block(sizes, copy)

    out = [((rows * size,), packed.dtype) for size in sizes]
    parts = triton.call(kernel, packed.ravel(), scope="exchange", name="unpack", grid=_grid(rows, sizes), out=out, warps=WARPS)
    return [part.reshape(rows, -1) for part in parts]


def _grid(rows: int, sizes: Sequence[int]) -> tuple[int]:
    return (rows * sum(pl.cdiv(size, BLOCK) for size in sizes),)


def _each_block(sizes: Sequence[int], copy: Callable[[int, Any, int, Any], None]) -> None:
    """Has this program copy(array, row, the array's start in a row, the block's start in the array)."""
    blocks = [pl.cdiv(size, BLOCK) for size in sizes]
    row, block = pl.program_id(0) // sum(blocks), pl.program_id(0) % sum(blocks)
    first = start = 0
    for i, (size, count) in enumerate(zip(sizes, blocks, strict=True)):

        def of_this_array(i=i, first=first, start=start):
            copy(i, row, start, (block - first) * BLOCK)

        pl.when((block >= first) & (block < first + count))(of_this_array)
        first, start = first + count, start + size


def _span(start: Any, inside: Any, size: int) -> Span:
    """The block at `inside` of an array that begins at `start`; masked where it may extend past the array."""
    return Span(start + inside, BLOCK, start + size if size % BLOCK else None)


class Packing(NamedTuple):
    """The two ways, which belong together."""

    pack: Callable[[Sequence[jax.Array], Any], jax.Array]
    unpack: Callable[[jax.Array, Sequence[int]], list[jax.Array]]


PLAIN, FUSED = Packing(plain_pack, plain_unpack), Packing(fused_pack, fused_unpack)
