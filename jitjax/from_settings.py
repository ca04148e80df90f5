"""The parts of a training run that its settings name: state, loss, training step."""

from __future__ import annotations

import functools
from typing import Any

import jax

from jitjax import diffusion, kernels, model, sharding, step, transfer
from jitjax.errors import UserError
from jitjax.optimizer import make_schedule
from jitjax.plan import Plan
from jitjax.settings import Settings


def abstract_state(settings: Settings, geometry: model.Geometry, mesh: jax.sharding.Mesh) -> step.TrainState:
    """Shapes and shardings of a run's state."""
    init = functools.partial(step.init_state, geometry, settings.optim, settings.dtype)
    return sharding.abstract(jax.eval_shape(init, jax.random.key(settings.seed)), mesh)


def fresh_state(settings: Settings, geometry: model.Geometry, like: step.TrainState, seed: int) -> step.TrainState:
    """The state at step 0 with weights drawn from `seed`, laid out like `like` (`abstract_state`)."""
    init = functools.partial(step.init_state, geometry, settings.optim, settings.dtype)
    placed = jax.tree.map(lambda leaf: leaf.sharding, like)
    return jax.jit(init, out_shardings=placed)(jax.random.key(seed))


def first_state(
    settings: Settings,
    geometry: model.Geometry,
    process: diffusion.Diffusion,
    class_names: tuple[str, ...],
    like: step.TrainState,
) -> tuple[step.TrainState, list[str]]:
    """The state at step 0, fresh or from the weights of `init_from`, laid out like `like`; lines about it.

    Raises:
      UserError: the weights of `init_from` cannot be used.
    """
    state = fresh_state(settings, geometry, like, settings.seed)
    if not settings.init_from:
        return state, []
    names = class_names if settings.model.class_conditional else ()
    state, report = transfer.initialise_from(settings.init_from, state, process, names, settings.optim, settings.dtype)
    return state, [f"from {settings.init_from}: {report}"]


def published_objective(settings: Settings) -> diffusion.Objective:
    """The loss of JiT's paper in the form that the settings name."""
    return diffusion.published_objective(settings.prediction, settings.loss, settings.diffusion.t_eps)


def make_loss(
    settings: Settings, geometry: model.Geometry, ops: kernels.Ops, objective: diffusion.Objective | None = None
) -> Any:
    """The loss of a run; see `step.make_loss`. `objective`: default the published one, by the settings."""
    return step.make_loss(
        geometry,
        settings.diffusion,
        objective=objective or published_objective(settings),
        class_conditional=settings.model.class_conditional,
        dtype=settings.dtype,
        remat=settings.remat,
        ops=ops,
    )


def make_step(
    settings: Settings,
    geometry: model.Geometry,
    plan: Plan,
    mesh: jax.sharding.Mesh,
    ops: kernels.Ops,
    objective: diffusion.Objective | None = None,
) -> Any:
    """The jitted training step of a run, (state, batch) -> (state, metrics); see `step.make_train_step`.

    Raises:
      UserError: an objective on activations with FSDP, whose blocks keep theirs to themselves.
    """
    if getattr(objective, "activations", ()) and mesh.shape["fsdp"] > 1:
        raise UserError("an objective on activations needs --config.mesh.fsdp=1; --config.mesh.zero shards the optimizer")
    return step.make_train_step(
        make_loss(settings, geometry, ops, objective),
        abstract_state(settings, geometry, mesh),
        mesh,
        optim=settings.optim,
        schedule=make_schedule(settings.optim, plan),
        seed=settings.seed,
        dtype=settings.dtype,
        comm_dtype=settings.mesh.comm_dtype,
        dynamic_loss_scale=settings.dtype == "float16",
    )
