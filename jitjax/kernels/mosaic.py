"""The thin layer between our Hopper kernels and Pallas' Mosaic GPU backend; nothing else in the package touches that backend.

Kernels on Hopper need the tensor cores' asynchronous matmuls with operands in shared memory (wgmma) and bulk copies (TMA),
which the Triton backend hardly uses. Mosaic GPU gives both to Python code. A kernel is written for a block of
warpgroups (128 threads each); it says how an array is spread over their threads (a layout), moves data by
asynchronous copies that complete on barriers, and multiplies.

Everything here has a second meaning in interpret mode, where layouts do not exist: that is how the kernels are tested on a CPU.
It is Pallas' simulation of barriers and copies, in jax 0.10 to 0.12 with somewhat different names (hence the shims).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from jitjax.kernels import planned

try:
    from jax.experimental.pallas import mosaic_gpu as plgpu

    UNAVAILABLE = ""
except ImportError:
    plgpu = None
    UNAVAILABLE = f"jax {jax.__version__} has no Mosaic GPU backend for Pallas"

f32 = jnp.float32
TILE = 64  # rows of one matmul (wgmma) of a warpgroup
ROWS = 32  # rows of one tile in `ROW_LAYOUT`
COLUMNS = 32  # of a half type in one unit of the shared-memory layout

if plgpu:
    TRANSPOSED_STORES = jax.__version_info__ >= (0, 11)  # whether `ref.transpose((1, 0))[...] = x` can be lowered
    # jax before 0.11 requires an index for loads, later versions warn about it.
    _INDEX = inspect.signature(plgpu.load).parameters.get("idx")
    _LOAD_ALL = (None,) if _INDEX is not None and _INDEX.default is inspect.Parameter.empty else ()
    # Results of matmuls: a thread has pairs of neighbouring columns of two rows. Its reductions over columns and rows.
    WGMMA, OF_ROWS, OF_COLUMNS = plgpu.Layout.WGMMA, plgpu.Layout.WGMMA.reduce(1), plgpu.Layout.WGMMA.reduce(0)
    # 32 x 32 values on a warpgroup: each warp has 8 rows, each thread 8 neighbouring columns of one row (16 bytes of a half
    # type, read without bank conflicts since 8 consecutive lanes have the same columns of 8 rows).
    ROW_LAYOUT = plgpu.Layout.TILED(
        plgpu.Tiling(((ROWS, 32), (8, 32), (8, 8))), warp_dims=(-6,), lane_dims=(-3, -2), vector_dim=-1
    )


def hopper() -> bool:
    """Whether the program is traced for a card of compute capability 9.0 and this jax has the backend."""
    if UNAVAILABLE:
        return False
    if card := planned.card():
        return card.compute_capability == "9.0"
    abstract, device = getattr(jax.sharding.get_abstract_mesh(), "abstract_device", None), jax.local_devices()[0]
    if abstract is not None and abstract.device_kind != device.device_kind:  # for a card that this machine does not have
        return abstract.platform == "gpu" and any(kind in abstract.device_kind for kind in ("H100", "H200"))
    return device.platform == "gpu" and str(getattr(device, "compute_capability", "")) == "9.0"


def multiprocessors() -> int:
    """Of the card that the program is traced for; those of an H100 or H200 where that is not known."""
    if card := planned.card():
        return card.core_count
    device = getattr(jax.sharding.get_abstract_mesh(), "abstract_device", None)
    if device is not None:
        return device.num_cores or 132
    return getattr(jax.local_devices()[0], "core_count", None) or 132


def cast(x: jax.Array, layout: Any, interpret: bool) -> jax.Array:
    """x spread over the threads as `layout` says."""
    return x if interpret else plgpu.layout_cast(x, layout)


def load(ref: Any, layout: Any, interpret: bool, optimized: bool = True) -> jax.Array:
    """ref[...] in `layout`; `optimized=False` for what has no fast way, such as vectors in global memory."""
    return ref[...] if interpret else plgpu.load(ref, *_LOAD_ALL, layout=layout, optimized=optimized)


def store(ref: Any, value: jax.Array, interpret: bool, optimized: bool = True) -> None:
    """ref[...] = value; `optimized=False` for what has no fast way, which from jax 0.12 on has to be asked for."""
    if interpret or optimized or not hasattr(plgpu, "store"):
        ref[...] = value
    else:
        plgpu.store(ref, value, optimized=False)


def matmuls(*jobs: tuple[jax.Array | None, Any, Any, str], interpret: bool) -> list[jax.Array]:
    """[acc + a @ b, ...] in float32, started one after the other and waited for together.

    Args:
      jobs: (acc or None for zeros, a in registers or shared memory, b in shared memory, which of "a" and "b" to transpose).
    """
    if interpret:

        def value(x, name, which):
            x = (x if isinstance(x, jax.Array) else x[...]).astype(f32)
            return x.T if name in which else x

        new = [jnp.dot(value(a, "a", which), value(b, "b", which), precision="highest") for _, a, b, which in jobs]
        return [y if acc is None else acc + y for (acc, *_), y in zip(jobs, new, strict=True)]

    jobs = [
        (acc, a.transpose((1, 0)) if "a" in which else a, b.transpose((1, 0)) if "b" in which else b)
        for acc, a, b, which in jobs
    ]
    if len(jobs) == 1 and jobs[0][0] is None:  # spares writing the zeros
        (_, a, b) = jobs[0]

        def fresh(ref):
            plgpu.wgmma(ref, a, b)
            return ref[...]

        return [pl.run_scoped(fresh, plgpu.ACC((a.shape[0], b.shape[1]), f32))]

    def start(acc, a, b):
        return plgpu.ACC.init(cast(jnp.zeros((a.shape[0], b.shape[1]), f32), WGMMA, interpret) if acc is None else acc)

    def run(refs):
        for ref, (_, a, b) in zip(refs, jobs, strict=True):
            plgpu.wgmma(ref, a, b)

    return pl.run_state(run)([start(*job) for job in jobs])


def rows_of(*shape: int, dtype: Any, interpret: bool, columns: int = COLUMNS) -> Any:
    """Rows (the last axis but one) of a half type in shared memory, laid out for copies and matmuls without bank conflicts, in
    units of 8 rows and 16, 32 or 64 columns."""
    transforms = () if interpret else (plgpu.TilingTransform((8, columns)), plgpu.SwizzleTransform(2 * columns))
    return plgpu.SMEM(shape, dtype, transforms=transforms)


def copy_vector(source: Any, target: Any, ready: Any) -> None:
    """Starts the copies of up to 512 float32 values to shared memory, which make two arrivals at `ready`.

    A bulk copy has at most 256 elements a dimension and begins at a multiple of 128 bytes in shared memory.
    """
    (size,) = target.shape
    cut = size // 2 // 32 * 32
    for first, length in ((0, cut), (cut, size - cut)):
        span = pl.ds(first, length)
        plgpu.copy_gmem_to_smem(source.at[span], target.at[span], ready)


def with_rows_of_tile(first: Any, total: int, fn: Callable[[int], None]) -> None:
    """fn(size) for the tile that begins at row `first` of `total`; the size, TILE or what is left, is known at compile time."""
    if total % TILE == 0:
        fn(TILE)
    else:
        pl.when(first + TILE <= total)(lambda: fn(TILE))
        pl.when(first + TILE > total)(lambda: fn(total % TILE))


def broadcast(vector: jax.Array, shape: tuple[int, ...], axis: int) -> jax.Array:
    """`vector` along `axis` of `shape`, the same for every index of the other one."""
    return lax.broadcast_in_dim(vector, shape, [axis])


def call(
    kernel: Callable[..., None],
    *args: jax.Array,
    scope: str,
    name: str,
    grid: tuple[int, ...],
    grid_names: tuple[str, ...],
    warpgroups: int,
    out: Sequence[jax.ShapeDtypeStruct],
    scratch: Sequence[Any],
    reduction_bytes: int = 0,
    interpret: bool,
) -> list[jax.Array]:
    """Runs `kernel(*input_refs, *output_refs, *scratch_refs)` on `grid` blocks of warpgroups (axis "wg", if there are several).

    The kernel synchronises by itself: no barriers are put in between its statements. `reduction_bytes` of shared memory
    serve sums over axes that several warps share.
    """
    if planned.card():
        return planned.opaque(out, *args)
    kernel.__name__ = f"{scope}_{name}"  # as it appears in a profile
    run = plgpu.kernel(
        kernel,
        out_type=list(out),
        scratch_types=list(scratch),
        grid=grid,
        grid_names=grid_names,
        **(dict(num_threads=warpgroups, thread_name="wg") if warpgroups > 1 else {}),
        interpret=_interpret_params() if interpret else None,
        compiler_params=_compiler_params(reduction_bytes),
    )
    with jax.named_scope(scope):
        return run(*args)


def call_in_place(
    kernel: Callable[..., None],
    *args: jax.Array,
    in_place: jax.Array,
    scope: str,
    name: str,
    grid: tuple[int, ...],
    grid_names: tuple[str, ...],
    out: Sequence[jax.ShapeDtypeStruct],
    scratch: Sequence[Any],
    interpret: bool,
) -> tuple[jax.Array, list[jax.Array]]:
    """`call` of kernel(in_place_ref, *input_refs, *output_refs, *scratch_refs) that may write to the array `in_place`,
    which is returned before the outputs. Nothing is copied unless the caller uses the old contents as well.

    `plgpu.kernel` would do from jax 0.11 on. It is a wrapper around `pl.kernel` for vmap, which takes no references in 0.10.
    """
    if planned.card():
        return planned.opaque_in_place(in_place, out, *args)

    def body(*refs):
        pl.run_scoped(lambda *scratch_refs: kernel(*refs, *scratch_refs), *scratch)

    run = pl.kernel(
        body,
        out_type=list(out),
        mesh=plgpu.Mesh(grid=grid, grid_names=grid_names),
        name=f"{scope}_{name}",
        interpret=_interpret_params() if interpret else False,
        compiler_params=_compiler_params(),
    )
    with jax.named_scope(scope):
        ref = jax.new_ref(in_place, memory_space=plgpu.GMEM)
        outputs = run(ref, *args)
        return jax.freeze(ref), outputs


def _compiler_params(reduction_bytes: int = 0) -> Any:
    return plgpu.CompilerParams(
        approx_math=True,
        unsafe_no_auto_barriers=True,
        reduction_scratch_bytes=reduction_bytes,
        lowering_semantics=plgpu.LoweringSemantics.Warpgroup,
    )


def _interpret_params() -> Any:
    from jax._src.pallas.mosaic_gpu.interpret.params import InterpretGPUParams  # not exported by jax 0.10

    return InterpretGPUParams()
