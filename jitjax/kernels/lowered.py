"""Caches lowered Mosaic GPU kernels between starts, beside JAX's compiled programs.

Mosaic infers the layouts of a kernel in Python, which takes about a second for each of the 17 kernel shapes of JiT-B: more than
everything else between the start of a run and its first step. JAX's compilation cache cannot help, since its key is the
lowered program. So the lowered kernel itself is cached, by `jax.export`: the next run reads it in milliseconds and compiles,
or finds compiled, the very same program.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import functools
import hashlib
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
from jax.sharding import AbstractMesh, AxisType

from jitjax import atomic
from jitjax.kernels import planned

CUSTOM_CALL = "mosaic_gpu_v2"


def lowered_once(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function(*arrays, *, interpret=False, ...)` jitted, with its keyword arguments static: equal shapes are lowered once in
    a program, and not at all if an earlier run left them in `jax_compilation_cache_dir` (where one is set), from the same
    source for the same card."""
    keywords = [p.name for p in inspect.signature(function).parameters.values() if p.kind is p.KEYWORD_ONLY]
    jitted = jax.jit(function, static_argnames=keywords)

    @functools.wraps(function)
    def call(*arrays, interpret: bool = False, **static):
        folder = jax.config.jax_compilation_cache_dir
        if interpret or planned.card() or not folder or "://" in folder:  # a bucket is JAX's to write
            return jitted(*arrays, interpret=interpret, **static)
        shapes, tree = jax.tree.flatten(jax.tree.map(lambda x: (x.shape, str(x.dtype)), arrays), is_leaf=_is_shape)
        return _exported(function, tuple(shapes), tree, tuple(sorted(static.items())), folder, _card()).call(*arrays)

    return call


def _is_shape(x: Any) -> bool:
    return isinstance(x, tuple) and len(x) == 2 and isinstance(x[1], str)


def _card() -> Any:
    """The card that the program is traced for: an abstract one (which tests use), or None for the one that is there."""
    return getattr(jax.sharding.get_abstract_mesh(), "abstract_device", None)


@functools.lru_cache(maxsize=256)
def _exported(function, shapes, tree, static, folder, card) -> jax.export.Exported:
    arrays = jax.tree.unflatten(tree, [jax.ShapeDtypeStruct(*shape) for shape in shapes])
    device = card or jax.local_devices()[0]
    described = function.__module__, shapes, str(tree), static, device.device_kind, jax.__version__, _source()
    digest = hashlib.sha256(repr(described).encode()).hexdigest()[:32]
    file = Path(folder).expanduser() / "kernels" / f"{function.__module__.split('.')[-1]}_{function.__name__}_{digest}"
    if content := _read(file):
        return jax.export.deserialize(bytearray(content))

    def export():
        # In a thread of its own, where the mesh and the transformations that surround the caller do not reach.
        mesh = card and AbstractMesh((1,), ("kernel",), axis_types=(AxisType.Auto,), abstract_device=card)
        with jax.sharding.use_abstract_mesh(mesh) if card else contextlib.nullcontext():
            allowed = [jax.export.DisabledSafetyCheck.custom_call(CUSTOM_CALL)]
            jitted = jax.jit(functools.partial(function, **dict(static)))
            return jax.export.export(jitted, platforms=["cuda"], disabled_checks=allowed)(*arrays)

    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        exported = pool.submit(export).result()
    _write(file, exported.serialize())
    return exported


@functools.cache
def _source() -> str:
    """A digest of the kernels' source: another version of them is another kernel."""
    files = sorted(Path(__file__).parent.glob("*.py"))
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()


def _read(file: Path) -> bytes | None:
    """What `_write` wrote, or None where it is not there or not whole."""
    try:
        stored = file.read_bytes()
    except OSError:
        return None
    checksum, content = stored[:32], stored[32:]
    return content if hashlib.sha256(content).digest() == checksum else None


def _write(file: Path, content: bytes) -> None:
    """Content behind a checksum. All or nothing, also when several processes write the same; a disk that refuses costs time
    at the next start only."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with atomic.writing(file) as partial:
            partial.write_bytes(hashlib.sha256(content).digest() + content)
    except OSError:
        pass
