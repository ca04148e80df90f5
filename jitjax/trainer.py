"""Training as functions on arrays, for scripts and notebooks: no flags, no folder, no data set of files.

    trainer = jitjax.Trainer({"model.name": "JiT-nano/4", "data.image_size": 16, "batch_size": 8}, images=64, num_classes=2)
    state = trainer.init()
    state, metrics = trainer.step(state, images, labels)   # uint8 (8, 16, 16, 3) and (8,), one effective batch
    drawn = trainer.pipeline(state).sample([0, 1])         # uint8 (2, 16, 16, 3)

`jitjax.train.train` is the whole program instead: folder, checkpoints, previews, resuming.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding

from jitjax import describe, diffusion, from_settings, model, pipeline, sharding, step
from jitjax import settings as settings_lib
from jitjax.errors import UserError
from jitjax.settings import INT32, RUN_LENGTHS, Settings

_log = logging.getLogger(__name__)


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
            is needed only where the learning rate depends on it (`optim.schedule` "cosine"). `data.flip` is not applied, images
            are trained on as they are given: mirror half of them, `images[chosen] = images[chosen, :, ::-1]`.
          images: size of the training set, for epochs.
          num_classes: trains with labels of so many classes, as `model.class_conditional` with `model.num_classes` of the
            settings does. Without either it is training without labels.
          class_names: for sampling by name; sets num_classes.
          objective: own loss of each image, see `jitjax.diffusion.Objective`.

        Raises:
          UserError: a mistake in the settings, or numbers of classes that contradict each other.
        """
        found = settings if isinstance(settings, Settings) else settings_lib.from_mapping(settings)
        if found.optim.schedule == "constant" and all(getattr(found, name) is None for name in RUN_LENGTHS):
            found = dataclasses.replace(found, total_steps=INT32)
        settings_lib.check(found)
        self.class_names, configured = tuple(class_names), found.model.num_classes
        numbers = {"num_classes": num_classes, "class_names": len(self.class_names), "model.num_classes": configured}
        asked = {name: number for name, number in numbers.items() if number}
        if len(set(asked.values())) > 1:
            shown = ", ".join(f"{name}: {number}" for name, number in asked.items())
            raise UserError(f"numbers of classes that contradict each other ({shown}): give one of them")
        classes = next(iter(asked.values()), 0)
        conditional = found.model.class_conditional or bool(num_classes or self.class_names)
        if conditional and not classes:
            raise UserError("model.class_conditional=True needs a number of classes: num_classes=N or class_names")
        self.settings = found = dataclasses.replace(
            found, model=dataclasses.replace(found.model, class_conditional=conditional)
        )
        self._setup = from_settings.setup(found, images=images, num_classes=classes, mesh=sharding.mesh_of(found.mesh))
        self.geometry, self.mesh, self.plan = self._setup.geometry, self._setup.mesh, self._setup.plan
        self._process = diffusion.from_config(settings_lib.to_dict(found))
        self._loss = jax.jit(from_settings.make_loss(found, self.geometry, self._setup.ops, objective))
        self._step = from_settings.make_step(self._setup, objective)

    def init(self, seed: int | None = None) -> step.TrainState:
        """A fresh state: weights, EMAs, optimizer; weights and EMAs from `init_from` where the settings name it, and a warning
        of the log says what was taken. `seed`: default the settings' own.

        Raises:
          UserError: the weights of `init_from` cannot be used.
        """
        setup = self._setup
        if seed is not None:
            setup = dataclasses.replace(setup, settings=dataclasses.replace(self.settings, seed=seed))
        state, report = from_settings.first_state(setup, self._process, self.class_names)
        for line in report:
            _log.warning("%s", line)
        return state

    def loss(self, params: model.Params, images: Any, labels: Any | None, key: jax.Array) -> jax.Array:
        """Loss of each image, (B,) float32, at times and noise drawn from `key`. Differentiable in `params`, for steps of
        one's own.

        Args:
          images: (B, S, S, 3) uint8.
          labels: (B,) in [0, num_classes); None, or zeros, in training without labels.

        Raises:
          UserError: arrays of another shape or type, or labels that do not exist (unless they are traced, whose values are not
            known).
        """
        images, labels = self._checked(images, labels, "a batch is", None)
        return self._loss(params, images, labels, jax.random.split(key, len(images)))

    def step(self, state: step.TrainState, images: Any, labels: Any = None) -> tuple[step.TrainState, dict[str, jax.Array]]:
        """One optimizer step on one effective batch.

        Args:
          state: is used up; go on with the one that is returned.
          images: (plan.global_batch, S, S, 3) uint8.
          labels: (plan.global_batch,) in [0, num_classes); left out, or zeros, in training without labels.

        Returns:
          (state, metrics on the device: train/loss, train/grad_norm, train/learning_rate, train/skipped_micro_batches).

        Raises:
          UserError: arrays of another shape or type, or labels that do not exist.
        """
        images, labels = self._checked(images, labels, "one effective batch is", self.plan.global_batch)
        placed = NamedSharding(self.mesh, sharding.BATCH)
        return self._step(state, jax.device_put({"image": images, "label": labels.astype(np.int32)}, placed))

    def _checked(self, images: Any, labels: Any, what: str, count: int | None) -> tuple[Any, Any]:
        """Images and labels as arrays; `count`: None allows any."""
        images, size = images if isinstance(images, jax.Array) else np.asarray(images), self.geometry.image_size
        found = len(images) if images.ndim else 0
        if images.shape != (count or found, size, size, 3) or images.dtype != np.uint8 or not found:
            wanted = f"({count or 'B'}, {size}, {size}, 3) uint8"
            raise UserError(f"images: {what} {wanted}, these are {images.shape} {images.dtype}")
        with_labels = self.settings.model.class_conditional
        if labels is None and not with_labels:
            labels = np.zeros(found, np.int32)
        if not isinstance(labels, jax.core.Tracer):
            labels = np.asarray(labels)
            classes = self.geometry.num_classes if with_labels else 1
            if labels.shape != (found,) or not np.isin(labels, np.arange(classes)).all():
                wanted = f"{found} whole numbers in [0, {classes}) are needed"
                none = "this is training without labels: leave them out, or set num_classes"
                raise UserError(f"labels: {wanted if with_labels else none}")
        return images, labels

    def pipeline(self, state: step.TrainState) -> pipeline.Pipeline:
        """A copy of the weights and EMAs with all that is needed to draw from them and to save them; the first EMA is used.
        Where that is too long for the steps made, a note and a warning of the log say so."""
        weights = sharding.replicated({pipeline.RAW: state.params, **state.ema})
        weights = {name: weights[name] for name in (pipeline.RAW, *self.settings.optim.emas)}
        which, number, notes = pipeline.choose(weights, None), int(state.step), ()
        slow = map(str, describe.slow_emas(self.settings, number))
        if number and which in slow:
            notes = (
                f"EMA {which} is {float(which) ** number:.0%} first weights after {number:,} steps; samples look untrained: "
                'draw with .using("model"), or set shorter optim.ema_decays',
            )
            _log.warning("%s", *notes)
        return pipeline.Pipeline(
            self.geometry,
            self._process,
            weights,
            which,
            self.class_names,
            notes,
            step=number,
            class_conditional=self.settings.model.class_conditional,
        )
