"""Pictures during training: a grid of samples from an average of the weights, always with the same noise and labels."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jitjax import diffusion, kernels, sampling, sharding
from jitjax import model as jit_model
from jitjax.monitor import save_grid

LARGEST_ROW = 16  # classes shown at most, one a column


class Preview:
    """Samples `preview.num_images` images; compiled once, at the first call."""

    def __init__(
        self,
        geometry: jit_model.Geometry,
        config: Any,
        mesh: Mesh,
        ops: kernels.Ops,
        class_names: tuple[str, ...],
    ):
        p, devices = config.preview, mesh.size
        self._decay = str(p.ema_decay if p.ema_decay is not None else config.optim.ema_decays[0])
        conditional = config.model.class_conditional
        self._count = p.num_images
        padded = -(-p.num_images // devices) * devices
        if conditional:
            shown = min(geometry.num_classes, LARGEST_ROW)
            classes = np.linspace(0, geometry.num_classes - 1, shown).round().astype(np.int32)
            labels = np.resize(classes, padded)
            self._columns = shown
            readable = class_names and geometry.image_size >= 64  # a name does not fit over a smaller picture
            self._names = [class_names[i] for i in labels[: self._count]] if readable else None
        else:
            labels = np.full(padded, geometry.num_classes, np.int32)
            self._columns, self._names = None, None

        graphdef = jit_model.graphdef_of(geometry)
        abstract = jax.eval_shape(jit_model.init_fn(geometry), jax.random.key(0))
        specs = sharding.specs(abstract, mesh)
        noise_key = jax.random.fold_in(jax.random.key(config.seed), 2**31 - 1)  # no optimizer step has this number

        def sample(params, labels):
            params = sharding.gather(params, specs, mesh, jnp.dtype(config.mesh.comm_dtype))
            local = labels.shape[0]
            indices = sharding.device_index(mesh) * local + jnp.arange(local)
            shape = (geometry.image_size, geometry.image_size, jit_model.CHANNELS)
            noise = jax.vmap(lambda i: jax.random.normal(jax.random.fold_in(noise_key, i), shape))(indices)
            images = sampling.sample_fn(
                functools.partial(jit_model.merge(graphdef, params), dtype=jnp.dtype(config.dtype), ops=ops),
                config.diffusion.noise_scale * noise,
                labels,
                null_label=geometry.num_classes,
                steps=p.steps,
                method=p.method,
                cfg_scale=p.cfg_scale if conditional else 1.0,
                interval=tuple(p.interval),
                t_eps=p.t_eps,
                prediction=config.prediction,
            )
            return diffusion.to_uint8(images)

        sharded = jax.shard_map(sample, mesh=mesh, in_specs=(specs, sharding.BATCH), out_specs=sharding.BATCH, check_vma=False)
        self._sample = jax.jit(sharded, out_shardings=NamedSharding(mesh, P()))
        self._labels = jax.make_array_from_callback(
            labels.shape, NamedSharding(mesh, sharding.BATCH), lambda index: labels[index]
        )

    def __call__(self, ema: dict[str, jit_model.Params], path: Path) -> Path:
        """Sample from the chosen average and write the grid as PNG (process 0 only). All processes must call it."""
        images = self._sample(ema[self._decay], self._labels)
        images = np.asarray(images.addressable_data(0))[: self._count]
        if jax.process_index() == 0:
            save_grid(path, images, columns=self._columns, labels=self._names)
        return path
