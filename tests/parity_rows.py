"""What the parity checks share: rows of their table, and the reference data with weights drawn from their names."""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import zlib

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
from parity_files import Sample  # noqa: E402

from jitjax import model as jit_model  # noqa: E402
from jitjax.geometry import Geometry
from jitjax.interop import official  # noqa: E402


@dataclasses.dataclass(frozen=True)
class Row:
    """One comparison. `excess` is the largest error over what is allowed there: up to 1 passes."""

    fixture: str
    quantity: str
    absolute: float  # largest absolute error
    relative: float  # that over the largest magnitude of the reference; NaN where the reference is 0
    tolerance: str
    excess: float

    @property
    def ok(self) -> bool:
        return self.excess <= 1  # False for NaN


def compare(fixture: str, quantity: str, got, want, *, atol: float = 0.0, rtol: float = 0.0, of_max: float = 0.0) -> Row:
    """Allowed for each element: atol + rtol * |want| + of_max * max|want|; nothing given means equality. Of a `Sample` the
    elements that it has are compared."""
    got = np.asarray(got)
    want, sample = (want.values, want) if isinstance(want, Sample) else (np.asarray(want), None)
    shape = sample.shape if sample else want.shape
    if got.shape != shape:
        return Row(fixture, f"{quantity}: shape {got.shape}", np.inf, np.inf, f"shape {shape}", np.inf)
    got, want = (sample.of(got) if sample else got).astype(np.float64), want.astype(np.float64)
    error, largest = np.abs(got - want), sample.largest if sample else np.abs(want).max()
    allowed = atol + rtol * np.abs(want) + of_max * largest
    excess = float(np.where(error == 0, 0.0, error / np.maximum(allowed, 1e-300)).max())
    given = {"abs": atol, "rel": rtol, "of max": of_max}
    text = " + ".join(f"{value:.0e} {name}" for name, value in given.items() if value) or "equal"
    relative = float(error.max() / largest) if largest else float("nan")
    return Row(fixture, quantity, float(error.max()), relative, text, excess)


def worst(rows: list[Row], quantity: str) -> Row:
    """Many rows of one kind as the one that is nearest to (or furthest beyond) its tolerance."""
    row = max(rows, key=lambda row: row.excess if row.excess == row.excess else np.inf)
    return dataclasses.replace(
        row,
        quantity=f"{quantity} ({len(rows)})",
        absolute=max(r.absolute for r in rows),
        relative=float(np.nanmax([r.relative for r in rows])),
    )


# ---------------------------------------------------------------- fixtures


def nhwc(images: np.ndarray) -> np.ndarray:
    """Images (..., 3, S, S) -> (..., S, S, 3); half precision values become float32."""
    images = np.moveaxis(images, -3, -1)
    return images.astype(np.float32) if images.dtype == np.float16 else images


def nchw(images) -> np.ndarray:
    """Images (..., S, S, 3) -> (..., 3, S, S)."""
    return np.moveaxis(np.asarray(images), -1, -3)


def geometry_of(config: np.ndarray) -> Geometry:
    c = json.loads(str(config))
    return Geometry(
        image_size=c["input_size"], patch_size=c["patch_size"], depth=c["depth"], width=c["hidden_size"],
        heads=c["num_heads"], bottleneck=c["bottleneck_dim"], context_length=c["in_context_len"],
        context_start=c["in_context_start"], num_classes=c["num_classes"], mlp_ratio=c["mlp_ratio"],
    )  # fmt: skip


def drawn(name: str, shape: tuple[int, ...], seed: int) -> np.ndarray:
    """The recipe of the reference files (tests/parity/README.md): a tensor drawn from its own official name."""
    rng = np.random.Generator(np.random.PCG64(zlib.crc32(name.encode()) + seed))
    fan_in = np.prod(shape[1:], dtype=np.int64)
    if len(shape) == 1:
        qk = name.endswith(("q_norm.weight", "k_norm.weight"))
        offset, scale = (1.5 if qk else 1.0 if "norm" in name else 0.0), 0.1
    else:
        offset, scale = 0.0, 1.0 / np.sqrt(fan_in)
        if name == "y_embedder.embedding_table.weight":
            scale = 0.5
        elif name == "in_context_posemb":
            scale = 0.3
        elif "adaLN" in name:
            scale = 0.5 / np.sqrt(fan_in)
        elif name.startswith("t_embedder.mlp.0"):
            scale = 2.0 / np.sqrt(fan_in)
    return np.float32(offset) + np.float32(scale) * rng.standard_normal(shape, dtype=np.float32)


class SeededStateDict(dict):
    """An official state dict whose tensors are drawn when asked for, so that a large model is never held twice."""

    def __init__(self, geometry: Geometry, seed: int):
        class Tensor:
            def __init__(self, name, shape):
                self.name, self.shape = name, shape

            def numpy(self):
                if self.name == official.POSITIONS:
                    return jit_model.position_table(geometry.width, geometry.grid)[None]
                return drawn(self.name, self.shape, seed)

        super().__init__({name: Tensor(name, shape) for name, shape in official.official_shapes(geometry).items()})


@functools.lru_cache(maxsize=4)
def small_params(config: str, seed: int) -> dict[str, jax.Array]:
    geometry = geometry_of(np.asarray(config))
    return {k: jnp.asarray(v) for k, v in official.to_params(SeededStateDict(geometry, seed), geometry).items()}


def small_model(fixture: dict[str, np.ndarray], seed: int | None = None, config: str = "config") -> jit_model.JiT:
    seed = int(fixture["weight_seed"]) if seed is None else seed
    params = small_params(str(fixture[config]), seed)
    return jit_model.merge(jit_model.graphdef_of(geometry_of(fixture[config])), params)
