"""The parts of a training run that its settings name: geometry, mesh, plan, kernels, state, loss, training step."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import Mesh

from jitjax import diffusion, kernels, model, sharding, step, transfer
from jitjax.geometry import Geometry, geometry_of
from jitjax.optimizer import make_schedule
from jitjax.plan import Plan, make_plan
from jitjax.settings import Settings


@dataclasses.dataclass(frozen=True)
class Setup:
    """What follows from a run's settings, the size of its data set and its devices."""

    settings: Settings
    geometry: Geometry
    mesh: Mesh
    plan: Plan
    kernels: str  # "plain" or "fused"
    kernels_reason: str

    @property
    def ops(self) -> kernels.Ops:
        return kernels.get_ops(self.kernels)


def setup(settings: Settings, *, images: int, num_classes: int, mesh: Mesh) -> Setup:
    """The setup of a run on `images` images of `num_classes` classes.

    Raises:
      UserError: a mistake in the settings, or kernels that cannot be had here.
    """
    geometry = geometry_of(settings.model, settings.data.image_size, num_classes)
    plan = make_plan(settings, images=images, tokens_per_image=geometry.tokens, devices=mesh.size)
    kind, reason = kernels.resolve(settings.kernels, dtype=settings.dtype, geometry=geometry)
    return Setup(settings, geometry, mesh, plan, kind, reason)


def abstract_state(settings: Settings, geometry: Geometry, mesh: Mesh) -> step.TrainState:
    """Shapes and shardings of a run's state."""
    return sharding.abstract(jax.eval_shape(_init(settings, geometry), jax.random.key(0)), mesh)


def fresh_state(setup: Setup, seed: int) -> step.TrainState:
    """The state at step 0 with weights drawn from `seed`, on the mesh."""
    like = abstract_state(setup.settings, setup.geometry, setup.mesh)
    placed = jax.tree.map(lambda leaf: leaf.sharding, like)
    return jax.jit(_init(setup.settings, setup.geometry), out_shardings=placed)(jax.random.key(seed))


def _init(settings: Settings, geometry: Geometry) -> Callable[[jax.Array], step.TrainState]:
    return functools.partial(step.init_state, geometry, settings.optim, settings.dtype)


def first_state(setup: Setup, process: diffusion.Diffusion, class_names: tuple[str, ...]) -> tuple[step.TrainState, list[str]]:
    """The state at step 0, fresh or from the weights of `init_from`, on the mesh; lines about it.

    Raises:
      UserError: the weights of `init_from` cannot be used.
    """
    settings = setup.settings
    state = fresh_state(setup, settings.seed)
    if not settings.init_from:
        return state, []
    names = class_names if settings.model.class_conditional else ()
    state, report = transfer.initialise_from(
        settings.init_from, state, setup.geometry, process, names, settings.optim, settings.dtype
    )
    return state, [f"from {settings.init_from}: {report}"]


def published_objective(settings: Settings) -> diffusion.Objective:
    """The loss of JiT's paper in the form that the settings name."""
    return diffusion.published_objective(settings.prediction, settings.loss, settings.diffusion.t_eps)


def make_loss(settings: Settings, geometry: Geometry, ops: kernels.Ops, objective: diffusion.Objective | None = None) -> Any:
    """The loss of a run; see `step.make_loss`. `objective`: default the published one, by the settings. An auxiliary class loss
    comes on top of either."""
    objective = objective or published_objective(settings)
    if settings.model.class_loss:
        objective = diffusion.with_class_loss(objective, settings.model.class_loss / geometry.image_size**2 / model.CHANNELS)
    return step.make_loss(
        geometry,
        settings.diffusion,
        objective=objective,
        class_conditional=settings.model.class_conditional,
        dtype=settings.dtype,
        remat=settings.remat,
        ops=ops,
    )


def make_step(setup: Setup, objective: diffusion.Objective | None = None) -> Any:
    """The jitted training step of a run, (state, batch) -> (state, metrics); see `step.make_train_step`."""
    settings, mesh = setup.settings, setup.mesh
    return step.make_train_step(
        make_loss(settings, setup.geometry, setup.ops, objective),
        abstract_state(settings, setup.geometry, mesh),
        mesh,
        optim=settings.optim,
        schedule=make_schedule(settings.optim, setup.plan),
        seed=settings.seed,
        dtype=settings.dtype,
        comm_dtype=settings.mesh.comm_dtype,
        packing=setup.ops.packing,
        dynamic_loss_scale=settings.dtype == "float16",
    )
