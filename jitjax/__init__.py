"""JiT image diffusion in JAX: a trainer, and this small surface for scripts and notebooks, kept stable.

    load(path, which=None) -> Pipeline           a workdir, checkpoint, exported folder, official .pth, .safetensors
                                                 or hf://owner/name
    pipe.sample(labels, seed=0, steps=50, method="heun", cfg_scale=1.0, interval=(0, 1)) -> uint8 (N, S, S, 3)
    pipe.save(folder)                            model.safetensors, config.json and a model card
    pipe.push("hf://owner/name")                 the same, to the Hugging Face Hub

    create_model(name, *, image_size, num_classes, seed=0, **geometry) -> JiT     a fresh nnx module
    load_official(path, which="model_ema1") -> JiT                                an official .pth or .safetensors
    model(z, t, y) -> predicted images                                            NHWC floats in and out
    sample(model, noise, labels, *, steps=50, method="heun", cfg_scale=1.0, interval=(0, 1), t_eps=0.05,
           dtype=float32, prediction="x") -> images, float32 in about [-1, 1]     noise: already times the noise scale
    to_uint8(images) -> uint8 pixels
    preprocess(picture, size) -> uint8 (size, size, 3)                            as training sees a picture, not flipped

    Trainer(settings, *, images, num_classes=0, class_names=(), objective=None)   the training step on arrays
    train.train(settings, workdir, dataset=None, objective=None) -> exit code     a whole run; see data.of_arrays, .of_source

Everything is imported when first used, so that `jitjax.data` in a worker process does not import JAX. Modules are reached
the same way: `jitjax.metrics.kid(...)` after `import jitjax`.
"""

from __future__ import annotations

import importlib
from typing import Any

_HOMES = {
    "load": "jitjax.pipeline",
    "Pipeline": "jitjax.pipeline",
    "create_model": "jitjax.model",
    "load_official": "jitjax.interop.weights",
    "sample": "jitjax.sampling",
    "to_uint8": "jitjax.diffusion",
    "preprocess": "jitjax.data.image",
    "Trainer": "jitjax.trainer",
}
_MODULES = (
    *("checkpoint", "data", "diffusion", "evaluation", "interop", "kernels", "metrics", "model", "sampling", "settings"),
    *("sharding", "step", "train"),
)
__all__ = [*_HOMES, "__version__"]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import PackageNotFoundError, version

        try:
            return version("jitjax")
        except PackageNotFoundError:  # run from a source tree that was never installed
            return "unknown"
    if name in _MODULES:
        return importlib.import_module(f"jitjax.{name}")
    if name not in _HOMES:
        raise AttributeError(f"module 'jitjax' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, *_MODULES})
