"""Training as functions on arrays, for scripts and notebooks: no flags, no folder, no data set of files.

    trainer = jitjax.Trainer({"model.name": "JiT-nano/4", "data.image_size": 16, "batch_size": 8}, images=64, num_classes=2)
    state = trainer.init()
    state, metrics = trainer.step(state, images, labels)   # uint8 (8, 16, 16, 3) and (8,), one effective batch
    drawn = trainer.pipeline(state).sample([0, 1])         # uint8 (2, 16, 16, 3)

`jitjax.train.train` is the whole program instead: folder, checkpoints, previews, resuming.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding

from jitjax import diffusion, from_settings, model, pipeline, sharding, step
from jitjax import settings as settings_lib
from jitjax.errors import UserError
from jitjax.settings import INT32, RUN_LENGTHS, Settings


class Trainer:
    """The published training step with its parts, on all devices that are there.

    Attributes:
      settings, geometry, plan, mesh: what follows from the arguments; `plan.global_batch` is the effective batch.
    """

    def __init__(
        self,
        settings: Settings | Mapping[str, Any],
        *,
        images: int,
        num_classes: int = 0,
        class_names: Sequence[str] = (),
        objective: diffusion.Objective | None = None,
    ):
        """Args:
          settings: fields by name, e.g. {"model.name": "JiT-B/4", "optim.lr": 1e-4}; others have their defaults. A run length
            is needed only where the learning rate depends on it (`optim.schedule` "cosine").
          images: size of the training set, for epochs.
          num_classes: 0 trains without labels.
          class_names: for sampling by name; sets num_classes.
          objective: own loss of each image, see `jitjax.diffusion.Objective`.

        Raises:
          UserError: a mistake in the settings.
        """
        found = settings if isinstance(settings, Settings) else settings_lib.from_mapping(settings)
        if found.optim.schedule == "constant" and all(getattr(found, name) is None for name in RUN_LENGTHS):
            found = dataclasses.replace(found, total_steps=INT32)
        settings_lib.check(found)
        self.class_names, classes = tuple(class_names), len(class_names) or num_classes
        conditional = dataclasses.replace(found.model, class_conditional=classes > 0)
        self.settings = found = dataclasses.replace(found, model=conditional)
        self._setup = from_settings.setup(found, images=images, num_classes=classes, mesh=sharding.mesh_of(found.mesh))
        self.geometry, self.mesh, self.plan = self._setup.geometry, self._setup.mesh, self._setup.plan
        self._loss = jax.jit(from_settings.make_loss(found, self.geometry, self._setup.ops, objective))
        self._step = from_settings.make_step(self._setup, objective)

    def init(self, seed: int | None = None) -> step.TrainState:
        """A fresh state: weights, EMAs, optimizer. `seed`: default the settings' own."""
        return from_settings.fresh_state(self._setup, self.settings.seed if seed is None else seed)

    def loss(self, params: model.Params, images: Any, labels: Any | None, key: jax.Array) -> jax.Array:
        """Loss of each image, (B,) float32, at times and noise drawn from `key`. Differentiable in `params`, for steps of
        one's own.

        Args:
          images: (B, S, S, 3) uint8.
          labels: (B,) whole numbers; None where the model has no classes.
        """
        labels = np.zeros(len(images), np.int32) if labels is None else labels
        return self._loss(params, images, labels, jax.random.split(key, len(images)))

    def step(self, state: step.TrainState, images: Any, labels: Any = None) -> tuple[step.TrainState, dict[str, jax.Array]]:
        """One optimizer step on one effective batch.

        Args:
          state: is used up; go on with the one that is returned.
          images: (plan.global_batch, S, S, 3) uint8.
          labels: (plan.global_batch,) in [0, num_classes); left out where the model has no classes.

        Returns:
          (state, metrics on the device: train/loss, train/grad_norm, train/learning_rate, train/skipped_micro_batches).

        Raises:
          UserError: arrays of another shape or type, or labels that do not exist.
        """
        count, size, classes = self.plan.global_batch, self.geometry.image_size, self.geometry.num_classes
        images, labels = np.asarray(images), np.asarray(labels if classes else np.zeros(count, np.int32))
        if images.shape != (count, size, size, 3) or images.dtype != np.uint8:
            wanted = f"({count}, {size}, {size}, 3) uint8"
            raise UserError(f"images: one effective batch is {wanted}, these are {images.shape} {images.dtype}")
        if labels.shape != (count,) or (classes and not np.isin(labels, np.arange(classes)).all()):
            raise UserError(f"labels: {count} whole numbers in [0, {classes}) are needed")
        placed = NamedSharding(self.mesh, sharding.BATCH)
        return self._step(state, jax.device_put({"image": images, "label": labels.astype(np.int32)}, placed))

    def pipeline(self, state: step.TrainState) -> pipeline.Pipeline:
        """A copy of the weights and EMAs with all that is needed to draw from them and to save them; the first EMA is used."""
        weights = sharding.replicated({pipeline.RAW: state.params, **state.ema})
        weights = {name: weights[name] for name in (pipeline.RAW, *self.settings.optim.emas)}
        process = diffusion.from_config(settings_lib.to_dict(self.settings))
        which = pipeline.choose(weights, None)
        return pipeline.Pipeline(self.geometry, process, weights, which, self.class_names, step=int(state.step))
