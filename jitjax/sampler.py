"""The compiled program that draws images on a mesh: for `Pipeline.sample`, previews and scores of a run, and the benchmark."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jitjax import diffusion, kernels, sampling, settings, sharding
from jitjax import model as jit_model
from jitjax.diffusion import Diffusion
from jitjax.geometry import Geometry


class Sampler:
    """A compiled sampler on a mesh: (params, seed, indices, labels) -> images.

    The noise of image i is a function of (seed, i) alone, so an image depends neither on the batch that it is drawn in nor
    on the devices (apart from rounding, which differs between batch sizes).
    """

    def __init__(
        self,
        geometry: Geometry,
        process: Diffusion,
        options: settings.Sampler,
        mesh: Mesh,
        *,
        dtype: str,
        ops: kernels.Ops,
        comm_dtype: str = "float32",
        integrate: Callable[..., jax.Array] = sampling.sample_fn,
        finish: Callable[[jax.Array], jax.Array] = diffusion.to_uint8,
        moments: int = 0,
    ):
        """Args:
        mesh: the parameters are sharded over it as `sharding.specs` says; they are gathered once per call, in `comm_dtype`.
        integrate: what turns noise into images, with the signature of `sampling.sample_fn`.
        finish: applied to the float32 images on the devices.
        moments: k > 0 also gives k moments of the way from noise to image.
        """
        self.mesh, self.cfg_scale = mesh, np.float32(options.cfg_scale)
        graphdef = jit_model.graphdef_of(geometry)
        specs = sharding.specs(jax.eval_shape(jit_model.init_fn(geometry), jax.random.key(0)), mesh)
        shape = (geometry.image_size, geometry.image_size, jit_model.CHANNELS)
        static = {name: value for name, value in dataclasses.asdict(options).items() if name != "cfg_scale"}
        if moments:
            static["return_path"] = moments

        def draw(params, seed, cfg_scale, indices, labels):
            params = sharding.gather(params, specs, jnp.dtype(comm_dtype))
            key = jax.random.fold_in(jax.random.key(seed), 2**31 - 1)  # no optimizer step has this number
            noise = jax.vmap(lambda i: jax.random.normal(jax.random.fold_in(key, i), shape))(indices)
            drawn = integrate(
                functools.partial(jit_model.merge(graphdef, params), dtype=jnp.dtype(dtype), ops=ops),
                process.noise_scale * noise,
                labels,
                null_label=geometry.num_classes,
                prediction=process.prediction,
                cfg_scale=1.0 if options.cfg_scale == 1 else cfg_scale,
                **static,
            )
            if not moments:
                return finish(drawn)
            images, path = drawn
            return finish(images), finish(path.states), finish(path.predictions)

        self._batch = NamedSharding(mesh, sharding.BATCH)
        along_path = P(None, sharding.AXES)
        sharded = jax.shard_map(
            draw,
            mesh=mesh,
            in_specs=(specs, P(), P(), sharding.BATCH, sharding.BATCH),
            out_specs=(sharding.BATCH, along_path, along_path) if moments else sharding.BATCH,
            check_vma=False,
        )
        self.program = jax.jit(sharded, out_shardings=NamedSharding(mesh, P()))

    def arguments(self, seed: int, indices: Sequence[int], labels: Sequence[int], size: int = 0) -> tuple[Any, ...]:
        """The program's arguments after the parameters, on the devices; padded to `size` and to a multiple of the devices."""
        chex.assert_equal(len(indices), len(labels))
        padded = -(-max(size, len(indices)) // self.mesh.size) * self.mesh.size

        def place(values):
            values = np.resize(np.asarray(values, np.int32), padded)
            return jax.make_array_from_callback((padded,), self._batch, lambda part: values[part])

        return np.uint32(seed), self.cfg_scale, place(indices), place(labels)

    def __call__(
        self, params: jit_model.Params, seed: int, indices: Sequence[int], labels: Sequence[int], *, size: int = 0
    ) -> Any:
        """Images with these indices and labels, on the host of every process: (N, S, S, 3). With `moments`: images, and
        states and predicted images along the way, (moments, N, S, S, 3)."""
        drawn = self.program(params, *self.arguments(seed, indices, labels, size))
        on_host = jax.tree.map(lambda a: np.asarray(a.addressable_data(0)), drawn)
        return jax.tree.map(lambda a: a[..., : len(indices), :, :, :], on_host)


@functools.lru_cache(maxsize=16)
def cached_sampler(geometry, process, options, mesh, dtype, moments) -> Sampler:
    """Compiled once for all calls that differ in weights, seed, labels or guidance scale alone."""
    ops = kernels.get_ops(kernels.resolve("auto", dtype=dtype, geometry=geometry)[0])
    return Sampler(geometry, process, options, mesh, dtype=dtype, ops=ops, moments=moments)
