"""The loss on images that the run does not train on, at fixed times and noise, so that its changes are the model's alone."""

from __future__ import annotations

from collections.abc import Callable
from statistics import NormalDist
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jitjax import diffusion, kernels, sharding
from jitjax import model as jit_model
from jitjax.data import DataSet
from jitjax.geometry import Geometry
from jitjax.settings import Diffusion

BUCKETS = 5  # times per image: the middles of equally likely fifths of the training distribution
LARGEST = 2000  # images of the set that are used, evenly spread over it


class HeldOutLoss:
    """loss(params) -> {"eval/loss": mean, "eval/loss_t0.11": ..., ...}; compiled at the first call."""

    def __init__(
        self,
        dataset: DataSet,
        geometry: Geometry,
        noise: Diffusion,
        mesh: Mesh,
        *,
        objective: diffusion.Objective,
        class_conditional: bool,
        dtype: str,
        ops: kernels.Ops,
        comm_dtype: str,
        batch_size: int,
    ):
        """Args:
        dataset: the held-out images, with the training set's classes if the model is class-conditional.
        noise: noise scale and distribution of times of the training.
        objective: of the training.
        batch_size: images per device.
        """
        self._dataset, self._mesh, self._conditional = dataset, mesh, class_conditional
        self._null = geometry.num_classes
        self._batch = batch_size * mesh.size
        self._numbers = np.unique(np.linspace(0, len(dataset) - 1, min(len(dataset), LARGEST)).round().astype(np.int64))
        normal = NormalDist(noise.p_mean, noise.p_std)
        self.times = [float(1 / (1 + np.exp(-normal.inv_cdf((i + 0.5) / BUCKETS)))) for i in range(BUCKETS)]
        self.names = ["eval/loss", *(f"eval/loss_t{t:.2f}" for t in self.times)]
        self._skipped: dict[int, str] = {}  # images that could not be decoded so far: why
        graphdef = jit_model.graphdef_of(geometry)
        specs = sharding.specs(jax.eval_shape(jit_model.init_fn(geometry), jax.random.key(0)), mesh)
        times = jnp.asarray(self.times, jnp.float32)

        def losses(params, images, labels, indices, used):
            params = sharding.gather(params, specs, jnp.dtype(comm_dtype))
            network = jit_model.merge(graphdef, params)
            x = diffusion.to_float(images)

            def at_time(number, t):
                def draw(index):
                    key = jax.random.fold_in(jax.random.fold_in(jax.random.key(0), index), number)
                    return noise.noise_scale * jax.random.normal(key, x.shape[1:])

                e, t_B = jax.vmap(draw)(indices), jnp.full((x.shape[0],), t)
                each = diffusion.loss_of(objective, network, x, e, t_B, labels, dtype=jnp.dtype(dtype), ops=ops)
                return jnp.sum(jnp.where(used, each, 0))

            sums = jax.lax.map(lambda pair: at_time(*pair), (jnp.arange(BUCKETS), times))
            # With their number, since a file that this process cannot read may be another one's to count.
            return sharding.total(jnp.append(sums, jnp.sum(used)), mesh)

        batch = sharding.BATCH
        sharded = jax.shard_map(losses, mesh=mesh, in_specs=(specs, batch, batch, batch, batch), out_specs=P(), check_vma=False)
        self._losses: Callable[..., Any] = jax.jit(sharded)

    @property
    def notes(self) -> list[str]:
        """What was left out so far."""
        if not self._skipped:
            return []
        first = min(self._skipped)
        example = f"{self._dataset.source.name(first)}: {self._skipped[first]}"
        return [f"eval/loss: {len(self._skipped)} held-out images could not be decoded, the first: {example}"]

    def __call__(self, params: jit_model.Params, go_on: Callable[[], None] = lambda: None) -> dict[str, float]:
        """All processes must call it. `go_on` is called before each batch. An image that cannot be decoded is left out
        (`notes`); NaN if none can."""
        sums = np.zeros(BUCKETS + 1)
        place = NamedSharding(self._mesh, sharding.BATCH)
        size = self._dataset.image_size
        for start in range(0, len(self._numbers), self._batch):
            go_on()
            numbers = self._numbers[start : start + self._batch]
            images = np.zeros((self._batch, size, size, 3), np.uint8)
            labels = np.full(self._batch, self._null, np.int32)
            rows, read = images[: len(numbers)], np.zeros(len(numbers), np.int32)
            used = np.arange(self._batch) < len(numbers)
            for k, why in self._dataset.source.read(numbers, rows, read):
                used[k] = False
                self._skipped[int(numbers[k])] = why
            if self._conditional:
                labels[: len(numbers)] = read
            indices = np.resize(numbers, self._batch).astype(np.int32)
            arrays = [
                jax.make_array_from_callback(a.shape, place, lambda part, a=a: a[part]) for a in (images, labels, indices, used)
            ]
            sums += np.asarray(self._losses(params, *arrays), np.float64)
        *sums, count = sums
        means = np.array(sums) / count if count else np.full(BUCKETS, np.nan)
        return dict(zip(self.names, [float(means.mean()), *map(float, means)], strict=True))
