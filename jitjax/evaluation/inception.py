"""The FID Inception-v3: TensorFlow's network of 2015-12-05, as its PyTorch conversions name its weights.

Differs from torchvision's Inception-v3: average pools that do not count padding, a max pool in the last block, 1008
classes, inputs (v - 128) / 128, and TensorFlow 1's bilinear resize to 299 px.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jitjax.errors import UserError
from jitjax.evaluation import layers, torch_file
from jitjax.evaluation.statistics import FID_DIM

SIZE = 299
RESIZE = "TF1 bilinear to 299, float32, (v - 128) / 128"
SPATIAL_CHANNELS = 7  # ADM's sFID: the first 7 channels of mixed_6/conv, 17 x 17 positions
SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"
NAMES = ("pt_inception-2015-12-05-6726825d.pth", "weights-inception-2015-12-05-6726825d.pth")
VARIABLE = "JITJAX_INCEPTION"
URL = "https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/" + NAMES[0]


def _shapes() -> dict[str, tuple[int, ...]]:
    """Every convolution of the network by name, with its kernel's shape (OIHW)."""
    shapes = {
        "Conv2d_1a_3x3": (32, 3, 3, 3),
        "Conv2d_2a_3x3": (32, 32, 3, 3),
        "Conv2d_2b_3x3": (64, 32, 3, 3),
        "Conv2d_3b_1x1": (80, 64, 1, 1),
        "Conv2d_4a_3x3": (192, 80, 3, 3),
    }

    def block(name: str, **branches: tuple[int, ...]) -> None:
        shapes.update({f"{name}.{branch}": shape for branch, shape in branches.items()})

    for name, n, pool in (("Mixed_5b", 192, 32), ("Mixed_5c", 256, 64), ("Mixed_5d", 288, 64)):
        block(
            name,
            branch1x1=(64, n, 1, 1),
            branch5x5_1=(48, n, 1, 1),
            branch5x5_2=(64, 48, 5, 5),
            branch3x3dbl_1=(64, n, 1, 1),
            branch3x3dbl_2=(96, 64, 3, 3),
            branch3x3dbl_3=(96, 96, 3, 3),
            branch_pool=(pool, n, 1, 1),
        )
    block(
        "Mixed_6a",
        branch3x3=(384, 288, 3, 3),
        branch3x3dbl_1=(64, 288, 1, 1),
        branch3x3dbl_2=(96, 64, 3, 3),
        branch3x3dbl_3=(96, 96, 3, 3),
    )
    for name, c in (("Mixed_6b", 128), ("Mixed_6c", 160), ("Mixed_6d", 160), ("Mixed_6e", 192)):
        block(
            name,
            branch1x1=(192, 768, 1, 1),
            branch7x7_1=(c, 768, 1, 1),
            branch7x7_2=(c, c, 1, 7),
            branch7x7_3=(192, c, 7, 1),
            branch7x7dbl_1=(c, 768, 1, 1),
            branch7x7dbl_2=(c, c, 7, 1),
            branch7x7dbl_3=(c, c, 1, 7),
            branch7x7dbl_4=(c, c, 7, 1),
            branch7x7dbl_5=(192, c, 1, 7),
            branch_pool=(192, 768, 1, 1),
        )
    block(
        "Mixed_7a",
        branch3x3_1=(192, 768, 1, 1),
        branch3x3_2=(320, 192, 3, 3),
        branch7x7x3_1=(192, 768, 1, 1),
        branch7x7x3_2=(192, 192, 1, 7),
        branch7x7x3_3=(192, 192, 7, 1),
        branch7x7x3_4=(192, 192, 3, 3),
    )
    for name, n in (("Mixed_7b", 1280), ("Mixed_7c", 2048)):
        block(
            name,
            branch1x1=(320, n, 1, 1),
            branch3x3_1=(384, n, 1, 1),
            branch3x3_2a=(384, 384, 1, 3),
            branch3x3_2b=(384, 384, 3, 1),
            branch3x3dbl_1=(448, n, 1, 1),
            branch3x3dbl_2=(384, 448, 3, 3),
            branch3x3dbl_3a=(384, 384, 1, 3),
            branch3x3dbl_3b=(384, 384, 3, 1),
            branch_pool=(192, n, 1, 1),
        )
    return shapes


def state_shapes() -> dict[str, tuple[int, ...]]:
    """Names and shapes of the tensors in a weights file that inference uses."""
    expected: dict[str, tuple[int, ...]] = {"fc.weight": (1008, FID_DIM), "fc.bias": (1008,)}
    for name, shape in _shapes().items():
        expected[f"{name}.conv.weight"] = shape
        expected |= {f"{name}.bn.{part}": shape[:1] for part in ("weight", "bias", "running_mean", "running_var")}
    return expected


def params_from_state(state: Mapping[str, np.ndarray], source: str) -> layers.Params:
    """The network's parameters from a state dict of pytorch-fid's or torch-fidelity's names.

    Raises:
      UserError: a tensor is missing, has another shape, or holds NaN.
    """
    layers.check_state(state, state_shapes(), "the FID Inception-v3", source)
    params: layers.Params = {name: layers.folded(state, f"{name}.conv", f"{name}.bn") for name in _shapes()}
    params["fc"] = np.ascontiguousarray(state["fc.weight"].T, np.float32), state["fc.bias"].astype(np.float32)
    return params


def find_weights(path: str | os.PathLike | None = None) -> Path | None:
    """The weights file: `path`, else $JITJAX_INCEPTION, else a known name in the cache folders of jitjax or torch.

    Raises:
      UserError: `path` or the variable names a file that is not there.
    """
    for name, given in (("the given path", path), (f"${VARIABLE}", os.environ.get(VARIABLE))):
        if given:
            if not Path(given).expanduser().is_file():
                raise UserError(f"{given} ({name}): no such file; the FID Inception's weights are at {URL}")
            return Path(given).expanduser()
    found = [folder / name for folder in cache_folders() for name in NAMES if (folder / name).is_file()]
    return found[0] if found else None


def cache_folders() -> list[Path]:
    """Where the weights are looked for; the first is the one to put them in."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    torch_home = Path(os.environ.get("TORCH_HOME") or cache / "torch")
    return [cache / "jitjax", torch_home / "hub" / "checkpoints"]


def load(path: str | os.PathLike) -> layers.Params:
    """Parameters from the published file, checked by its SHA-256.

    Raises:
      UserError: missing, damaged, or another file.
    """
    torch_file.check_sha256(path, SHA256, f"get it from {URL}")
    return params_from_state(torch_file.read_state_dict(path), str(path))


def prepare(images: jax.Array) -> jax.Array:
    """(B, S, S, 3) uint8 to the network's input, (B, 299, 299, 3) float32 in about [-1, 1]."""
    return (layers.resize_tf1_bilinear(images.astype(jnp.float32), SIZE) - 128) / 128


def network(params: layers.Params, x: jax.Array, precision: Any = None) -> dict[str, jax.Array]:
    """Every output of the network by torch-fidelity's names, and "spatial".

    Args:
      x: (B, 299, 299, 3) float32, as `prepare` makes it. precision: of the convolutions, as jax.lax.conv takes it.

    Returns:
      "64", "192", "768": pooled after early blocks (B, that many). "2048": FID's features. "logits_unbiased": (B, 1008)
      without the last bias. "logits": with it. "spatial": (B, 2023), ADM's features for sFID.
    """

    def conv(x: jax.Array, name: str, stride: int = 1, padding: str = "SAME") -> jax.Array:
        return jax.nn.relu(layers.convolve(x, params[name], stride, padding, precision))

    def chain(x: jax.Array, *names: str) -> jax.Array:
        for name in names:
            x = conv(x, name)
        return x

    def concat(*branches: jax.Array) -> jax.Array:
        return jnp.concatenate(branches, axis=-1)

    def pooled(x: jax.Array) -> jax.Array:
        return x.mean(axis=(1, 2))

    x = conv(x, "Conv2d_1a_3x3", 2, "VALID")
    x = conv(x, "Conv2d_2a_3x3", 1, "VALID")
    x = _max_pool(conv(x, "Conv2d_2b_3x3"))
    outputs = {"64": pooled(x)}
    x = conv(x, "Conv2d_3b_1x1")
    x = _max_pool(conv(x, "Conv2d_4a_3x3", 1, "VALID"))
    outputs["192"] = pooled(x)
    for name in ("Mixed_5b", "Mixed_5c", "Mixed_5d"):
        x = concat(
            conv(x, f"{name}.branch1x1"),
            chain(x, f"{name}.branch5x5_1", f"{name}.branch5x5_2"),
            chain(x, f"{name}.branch3x3dbl_1", f"{name}.branch3x3dbl_2", f"{name}.branch3x3dbl_3"),
            conv(_average_pool(x), f"{name}.branch_pool"),
        )
    double = chain(x, "Mixed_6a.branch3x3dbl_1", "Mixed_6a.branch3x3dbl_2")
    x = concat(conv(x, "Mixed_6a.branch3x3", 2, "VALID"), conv(double, "Mixed_6a.branch3x3dbl_3", 2, "VALID"), _max_pool(x))
    for name in ("Mixed_6b", "Mixed_6c", "Mixed_6d", "Mixed_6e"):
        direct = conv(x, f"{name}.branch1x1")
        if name == "Mixed_6d":  # mixed_6 in TensorFlow's graph
            outputs["spatial"] = direct[..., :SPATIAL_CHANNELS].reshape(len(x), -1)
        x = concat(
            direct,
            chain(x, *(f"{name}.branch7x7_{i}" for i in (1, 2, 3))),
            chain(x, *(f"{name}.branch7x7dbl_{i}" for i in (1, 2, 3, 4, 5))),
            conv(_average_pool(x), f"{name}.branch_pool"),
        )
    outputs["768"] = pooled(x)
    single = conv(x, "Mixed_7a.branch3x3_1")
    seven = chain(x, *(f"Mixed_7a.branch7x7x3_{i}" for i in (1, 2, 3)))
    x = concat(
        conv(single, "Mixed_7a.branch3x3_2", 2, "VALID"), conv(seven, "Mixed_7a.branch7x7x3_4", 2, "VALID"), _max_pool(x)
    )
    for name, pool in (("Mixed_7b", _average_pool), ("Mixed_7c", lambda x: _max_pool(x, 1, "SAME"))):
        single = conv(x, f"{name}.branch3x3_1")
        double = chain(x, f"{name}.branch3x3dbl_1", f"{name}.branch3x3dbl_2")
        x = concat(
            conv(x, f"{name}.branch1x1"),
            conv(single, f"{name}.branch3x3_2a"),
            conv(single, f"{name}.branch3x3_2b"),
            conv(double, f"{name}.branch3x3dbl_3a"),
            conv(double, f"{name}.branch3x3dbl_3b"),
            conv(pool(x), f"{name}.branch_pool"),
        )
    matrix, bias = params["fc"]
    outputs["2048"] = pooled(x)
    outputs["logits_unbiased"] = jnp.matmul(outputs["2048"], matrix, precision=jax.lax.Precision.HIGHEST)
    outputs["logits"] = outputs["logits_unbiased"] + bias
    return outputs


def _max_pool(x: jax.Array, stride: int = 2, padding: str = "VALID") -> jax.Array:
    return jax.lax.reduce_window(x, -jnp.inf, jax.lax.max, (1, 3, 3, 1), (1, stride, stride, 1), padding)


def _average_pool(x: jax.Array) -> jax.Array:
    """3 x 3 with stride 1; at the edges the mean over the pixels that are there."""
    window, strides = (1, 3, 3, 1), (1, 1, 1, 1)
    sums = jax.lax.reduce_window(x, 0.0, jax.lax.add, window, strides, "SAME")
    edge = np.full(x.shape[1], 3, np.float32)
    edge[[0, -1]] = 2
    return sums / (edge[:, None] * edge)[None, :, :, None]
