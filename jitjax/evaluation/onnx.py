"""Any network in an ONNX file as an extractor, run by ONNX Runtime (optional extra `onnxruntime`)."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from jitjax.errors import UserError
from jitjax.evaluation.extractor import CPU_BATCH, Extractor

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def onnx_extractor(
    path: str | os.PathLike,
    *,
    size: int | None = None,
    mean: Sequence[float] = IMAGENET_MEAN,
    std: Sequence[float] = IMAGENET_STD,
    output: str | None = None,
    batch_size: int | None = None,
) -> Extractor:
    """An extractor from an ONNX file with one image input, NCHW or NHWC.

    Images are resized by Pillow's bicubic to the input's size. A float input gets (v / 255 - mean) / std per channel, a uint8
    input the pixels. Runs on CUDA where onnxruntime-gpu is installed, else on CPU.

    Args:
      size: edge of the input in pixels, where the file leaves it open.
      output: name of the feature output, (N, D) or (N, D, 1, 1); default: the first.

    Raises:
      UserError: no onnxruntime, not an ONNX file, more than one input, an input or output of another kind.
    """
    try:
        import onnxruntime
    except ImportError:
        raise UserError(
            f"the extractor {path} needs ONNX Runtime: pip install -e '.[evaluation]' in jitjax's folder, or onnxruntime-gpu"
        ) from None
    path = Path(path).expanduser()
    try:
        checksum = hashlib.sha256(path.read_bytes()).hexdigest()[:12]
        preferred = ("CUDAExecutionProvider", "CPUExecutionProvider")
        providers = [name for name in preferred if name in onnxruntime.get_available_providers()]
        session = onnxruntime.InferenceSession(str(path), providers=providers)
    except OSError as error:
        raise UserError(f"{path}: {error.strerror or error}; expected an ONNX file") from None
    except Exception as error:  # ONNX Runtime has no common base class for what it raises
        raise UserError(f"{path}: ONNX Runtime cannot load it: {str(error)[:200]}") from None
    channels_first, size, fixed_batch, dtype = _input(session, path, size)
    names = [found.name for found in session.get_outputs()]
    output = names[0] if output is None else output
    if output not in names:
        raise UserError(f"{path}: has no output {output}; its outputs are {', '.join(names)}")
    batch_size = fixed_batch or batch_size or CPU_BATCH
    offset, scale = np.asarray(mean, np.float32), np.asarray(std, np.float32)
    feed = session.get_inputs()[0].name

    def run(images: np.ndarray) -> dict[str, Any]:
        x = np.stack([np.asarray(Image.fromarray(image).resize((size, size), Image.Resampling.BICUBIC)) for image in images])
        if dtype != np.uint8:
            x = ((x.astype(np.float32) / 255 - offset) / scale).astype(dtype)
        x = np.ascontiguousarray(x.transpose(0, 3, 1, 2)) if channels_first else x
        (features,) = session.run([output], {feed: x})
        features = np.asarray(features)
        if features.ndim == 4 and features.shape[2:] == (1, 1):
            features = features[:, :, 0, 0]
        if features.ndim != 2 or len(features) != len(images) or features.dtype.kind != "f":
            raise UserError(
                f"{path}: output {output} is {features.dtype} {features.shape}; features are floats of shape (N, D): choose "
                f"another of {', '.join(names)}"
            )
        return {"features": features}

    try:
        dim = run(np.zeros((batch_size, size, size, 3), np.uint8))["features"].shape[1]
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"{path}: does not run on {size} px images: {str(error)[:200]}") from None
    rule = "v" if dtype == np.uint8 else f"(v / 255 - {tuple(map(float, mean))}) / {tuple(map(float, std))}"
    return Extractor(
        name=f"onnx:{path.name}:{checksum}" + ("" if output == names[0] else f":{output}"),
        distance=f"FD-{path.stem}",
        resize=f"Pillow bicubic to {size}, uint8, {rule}",
        dim=dim,
        outputs=("features",),
        batch_size=batch_size,
        run=run,
    )


def _input(session: Any, path: Path, size: int | None) -> tuple[bool, int, int | None, np.dtype]:
    """(channels first, edge in pixels, fixed batch size or None, dtype) of the file's image input."""
    inputs = session.get_inputs()
    dtypes = {"tensor(float)": np.float32, "tensor(float16)": np.float16, "tensor(uint8)": np.uint8}
    if len(inputs) != 1 or len(inputs[0].shape) != 4 or inputs[0].type not in dtypes:
        found = ", ".join(f"{one.name} {one.type} {one.shape}" for one in inputs)
        raise UserError(f"{path}: expected one image input of 4 axes, float or uint8; found {found}")
    batch, *rest = inputs[0].shape
    if rest[0] == 3:
        channels_first, edges = True, rest[1:]
    elif rest[2] == 3:
        channels_first, edges = False, rest[:2]
    else:
        raise UserError(f"{path}: expected an input with 3 channels, N x 3 x H x W or N x H x W x 3; found {inputs[0].shape}")
    fixed = {edge for edge in edges if isinstance(edge, int)}
    if len(fixed | ({size} if size else set())) > 1 or not (fixed or size):
        raise UserError(f"{path}: its input is {inputs[0].shape}; give the edge in pixels (size={size}) that fits it")
    return channels_first, size or fixed.pop(), batch if isinstance(batch, int) else None, np.dtype(dtypes[inputs[0].type])
