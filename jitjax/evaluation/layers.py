"""What the two extractor networks share: convolutions with folded BatchNorm, and resizing. Images are NHWC."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jitjax.errors import UserError

BATCHNORM_EPS = 1e-3  # both networks keep TensorFlow's
Params = dict[str, Any]  # name of a convolution -> (kernel HWIO, bias); "fc" -> (matrix, bias)


def folded(state: Mapping[str, np.ndarray], conv: str, batchnorm: str) -> tuple[np.ndarray, np.ndarray]:
    """Kernel (HWIO) and bias, float32, of a torch convolution without bias followed by BatchNorm in inference."""
    kernel = state[f"{conv}.weight"].astype(np.float64)
    gamma, beta, mean, variance = (
        state[f"{batchnorm}.{name}"].astype(np.float64) for name in ("weight", "bias", "running_mean", "running_var")
    )
    scale = gamma / np.sqrt(variance + BATCHNORM_EPS)
    kernel = np.moveaxis(kernel * scale[:, None, None, None], (2, 3, 1, 0), (0, 1, 2, 3))
    return np.ascontiguousarray(kernel, np.float32), (beta - mean * scale).astype(np.float32)


def check_state(state: Mapping[str, np.ndarray], shapes: Mapping[str, tuple[int, ...]], what: str, source: str) -> None:
    """Raises UserError where a tensor is missing, has another shape, or holds NaN."""
    for name, shape in shapes.items():
        if name not in state:
            raise UserError(f"{source}: not the weights of {what}: {name} is missing")
        if state[name].shape != shape:
            raise UserError(f"{source}: not the weights of {what}: {name} is {state[name].shape}, expected {shape}")
        if not np.isfinite(state[name]).all():
            raise UserError(f"{source}: damaged: {name} holds NaN or infinity")


def convolve(x: jax.Array, params: tuple[jax.Array, jax.Array], stride: int, padding: str, precision: Any) -> jax.Array:
    """Convolution of x (B, H, W, C) with (kernel HWIO, bias) as `folded` gives them; padding and precision as for `jax.lax`."""
    kernel, bias = params
    dimensions = ("NHWC", "HWIO", "NHWC")
    return bias + jax.lax.conv_general_dilated(
        x, kernel, (stride, stride), padding, dimension_numbers=dimensions, precision=precision
    )


def convolve_depthwise(x: jax.Array, params: tuple[jax.Array, jax.Array], stride: int) -> jax.Array:
    """One k x k kernel (k, k, 1, C) per channel, SAME padding, as a sum of k^2 shifted products: XLA makes one loop of
    them. A grouped convolution is 1.5 times slower on an H200 and many times slower on CPU."""
    kernel, bias = params
    size = kernel.shape[0]
    out = [-(-edge // stride) for edge in x.shape[1:3]]
    pads = [max((n - 1) * stride + size - edge, 0) for n, edge in zip(out, x.shape[1:3], strict=True)]
    x = jnp.pad(x, ((0, 0), *((pad // 2, pad - pad // 2) for pad in pads), (0, 0)))
    rows, columns = ((n - 1) * stride + 1 for n in out)
    y = bias
    for i in range(size):
        for j in range(size):
            y = y + x[:, i : i + rows : stride, j : j + columns : stride] * kernel[i, j, 0]
    return y


@functools.cache
def _tf1_bilinear_matrix(source: int, target: int) -> np.ndarray:
    """(target, source): row i mixes the two source pixels around i * source / target, without half-pixel shift."""
    position = np.arange(target, dtype=np.float32) * np.float32(source / target)
    lower = np.floor(position).astype(np.int64)
    upper = np.minimum(lower + 1, source - 1)
    weight = position - lower.astype(np.float32)
    matrix = np.zeros((target, source), np.float32)
    rows = np.arange(target)
    np.add.at(matrix, (rows, lower), 1 - weight)
    np.add.at(matrix, (rows, upper), weight)
    return matrix


def resize_tf1_bilinear(images: jax.Array, size: int) -> jax.Array:
    """(B, H, W, C) float32 to (B, size, size, C) as TensorFlow 1's ResizeBilinear(align_corners=False) does."""
    rows, columns = (_tf1_bilinear_matrix(edge, size) for edge in images.shape[1:3])
    full = jax.lax.Precision.HIGHEST  # pixels up to 255 do not survive TF32
    return jnp.einsum("jw,bhwc,ih->bijc", columns, images, rows, precision=full)


def resize_bicubic(images: jax.Array, size: int) -> jax.Array:
    """(B, H, W, C) float32 to (B, size, size, C): Keys' cubic with a = -0.5, antialiased downwards, half-pixel centres (as
    Pillow's BICUBIC, without its rounding to whole grey levels)."""
    return jax.image.resize(images, (images.shape[0], size, size, images.shape[3]), "cubic", antialias=True)
