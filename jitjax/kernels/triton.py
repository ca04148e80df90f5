"""The thin layer between our kernels and Pallas' Triton backend; nothing else in the package touches that backend.

These kernels serve what those for Hopper (`mosaic.py`) do not: other sizes, older cards, matmuls left to XLA. Why Pallas on
Triton, although JAX marks it deprecated (docs/speed-notebook.md): its kernels are Python that jax alone compiles; they
run in interpret mode on a CPU and lower without a GPU, so each is tested where no card is; jax 0.10, 0.11 and 0.12 take them as
written here; and they are fast (elementwise and reduction kernels move 2.9 to 3.8 TB/s on an H200, where a copy moves 4.2).
jax-triton would add two packages whose versions must fit jax's, for the same compiler. When the backend goes, `UNAVAILABLE`
says so, runs fall back to the plain operations, and this file is the one to port.

Arrays inside a kernel must be powers of two. Other sizes are divided into `Span`s: ranges of power-of-two size, the
last one masked where it extends past the end.

Types: biases are rounded to the compute type before they are added to an activation tile, as autocast and the model's other
affine maps do. A float32 vector beside a bfloat16 tile is spread differently over the threads and has to change its layout
through shared memory first. Sums and statistics are float32.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl

from jitjax.kernels import planned

try:
    from jax.experimental.pallas import triton as pltriton

    UNAVAILABLE = ""
except ImportError:  # a later jax
    pltriton = None
    UNAVAILABLE = f"jax {jax.__version__} has no Triton backend for Pallas any more"

f32 = jnp.float32


@dataclasses.dataclass(frozen=True)
class Span:
    """`size` (a power of two) consecutive indices from `start`; those at or past `limit` are masked.

    `start` may be traced. `limit` None means that all of them exist.
    """

    start: Any
    size: int
    limit: int | None = None

    def exists(self) -> jax.Array | None:
        """Which indices exist, (size,) bool, or None for all."""
        return None if self.limit is None else self.start + jnp.arange(self.size) < self.limit


def power_of_two(n: int) -> int:
    """The smallest power of two that is at least n."""
    return 1 << max(0, n - 1).bit_length()


def spans(width: int, *, smallest: int = 1, waste: float = 0.0) -> tuple[Span, ...]:
    """[0, width) as spans: the fewest powers of two whose masked lanes are at most `waste` of the lanes in all.

    No span is smaller than `smallest`. spans(768, waste=0.25) is one masked 1024, spans(768) is 512 + 256,
    spans(104, smallest=16) is 64 + 32 + 16 with 8 of the last.
    """
    found, start = [], 0
    while start < width:
        rest = width - start
        size = max(power_of_two(rest), smallest)
        if (size - rest) > waste * size and size > smallest:
            size //= 2
        found.append(Span(start, size, width if start + size > width else None))
        start += size
    return tuple(found)


def at_run_time(spans: Sequence[Span]) -> list[Span]:
    """The same spans inside a kernel (call it before any loop), masked ones with a start known at run time only.

    jax 0.12 refuses a slice that it can see running past an array, even if what is past the end is masked.
    """
    zero = pl.program_id(0) & 0
    return [span if span.limit is None else dataclasses.replace(span, start=span.start + zero) for span in spans]


def tile(index: Any, size: int, extent: int) -> Span:
    """The `index`-th tile of `size` out of `extent`, masked only where the tiles do not divide the extent."""
    return Span(index * size, size, extent if extent % size else None)


def later(span: Span, offset: int) -> Span:
    """The span's indices in an array that has `offset` more of them in front."""
    return Span(span.start + offset, span.size, None if span.limit is None else span.limit + offset)


def share(index: Any, programs: int, extent: int, size: int) -> list[Span]:
    """Spans of `size` that cover the `index`-th of `programs` equal shares of [0, extent)."""
    spans = -(-extent // (programs * size))
    return [Span((index * spans + i) * size, size, extent) for i in range(spans)]


def chunk(extent: int, target: int, multiple: int) -> int:
    """How many of `extent` rows one program takes: near `target`, a multiple of `multiple`, a divisor if there is one."""
    divisors = [n for n in range(multiple, target + 1, multiple) if extent % n == 0]
    return divisors[-1] if divisors and divisors[-1] * 4 >= target else math.ceil(target / multiple) * multiple


def _mask(index: Sequence[Any]) -> jax.Array | None:
    spans = [i for i in index if isinstance(i, Span)]
    mask, shape = None, tuple(span.size for span in spans)
    for axis, span in enumerate(spans):
        exists = span.exists()
        if exists is not None:
            exists = exists.reshape([-1 if a == axis else 1 for a in range(len(spans))])
            exists = jnp.broadcast_to(exists, shape)
            mask = exists if mask is None else mask & exists
    return mask


def _indexer(index: Sequence[Any]) -> tuple[Any, ...]:
    return tuple(pl.ds(i.start, i.size) if isinstance(i, Span) else np.int32(i) if isinstance(i, int) else i for i in index)


def load(ref: Any, *index: Any, dtype: Any = f32) -> jax.Array:
    """ref[index] in `dtype` (None keeps the stored one); an index is a scalar or a `Span`. Masked elements are 0."""
    mask = _mask(index)
    value = pltriton.load(ref.at[_indexer(index)], mask=mask, other=None if mask is None else 0.0)
    return value if dtype is None else value.astype(dtype)


def store(ref: Any, *index: Any, value: jax.Array) -> None:
    """ref[index] = value in the type of ref; masked elements are left alone."""
    pltriton.store(ref.at[_indexer(index)], value.astype(ref.dtype), mask=_mask(index))


def interpreted() -> bool:
    """Whether kernels run in Pallas' interpreter: wherever the program is not traced for a GPU."""
    if planned.card():
        return False
    device = getattr(jax.sharding.get_abstract_mesh(), "abstract_device", None)
    return (device.platform if device is not None else jax.default_backend()) != "gpu"


def call(
    kernel: Callable[..., None],
    *args: jax.Array,
    scope: str,
    name: str,
    grid: tuple[int, ...],
    out: Sequence[tuple[tuple[int, ...], Any]],
    warps: int,
    stages: int = 1,
    aliases: dict[int, int] | None = None,
) -> list[jax.Array]:
    """Runs `kernel(*input_refs, *output_refs)` over `grid`; every ref is a whole array.

    Args:
      scope, name: of the kernel in a profile, scope_name.
      out: (shape, dtype) of each output.
      warps, stages: warps of a program; depth of software pipelining (matters only in loops that feed matmuls).
      aliases: {index of an input: index of the output that takes over its memory}.
    """
    shapes = [jax.ShapeDtypeStruct(shape, dtype) for shape, dtype in out]
    if planned.card():
        if aliases:
            ((given, taken),) = aliases.items()
            rest = [arg for i, arg in enumerate(args) if i != given]
            array, results = planned.opaque_in_place(args[given], shapes[:taken] + shapes[taken + 1 :], *rest)
            return [*results[:taken], array, *results[taken:]]
        return planned.opaque(shapes, *args)
    interpret = interpreted()
    kernel = functools.partial(kernel)  # a fresh object: pallas names a kernel after its function
    kernel.__name__ = f"{scope}_{name}"
    run = pl.pallas_call(
        kernel,
        grid=grid,
        out_shape=shapes,
        input_output_aliases=aliases or {},
        compiler_params=None if interpret else pltriton.CompilerParams(num_warps=warps, num_stages=stages),
        interpret=interpret,
        name=kernel.__name__,
    )
    with jax.named_scope(scope):
        return run(*args)
