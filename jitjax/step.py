"""One optimizer step: loss -> gradient -> accumulation -> mean over devices -> AdamW or Muon -> EMA, jitted as a whole.

The step runs inside `jax.shard_map`: each device works on its own images; what crosses devices, and when, is in
`jitjax.gradients`.

Everything random is a function of (seed, optimizer step, index of the image in the global batch): the same on any mesh and for
any way to cut the batch into micro-batches.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import chex
import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jitjax import diffusion, exchange, gradients, kernels, sharding
from jitjax import model as jit_model
from jitjax.geometry import Geometry
from jitjax.kernels import pack
from jitjax.optimizer import make_optimizer, update_ema
from jitjax.settings import Diffusion, Optimizer

Params = dict[str, jax.Array]
Batch = dict[str, jax.Array]  # {"image": uint8 (B, S, S, 3), "label": int32 (B,)}
FIRST_LOSS_SCALE = 2.0**15  # float16 only
LOSS_SCALE_PATIENCE = 2000  # finite steps after which the loss scale doubles


@chex.dataclass(frozen=True, mappable_dataclass=False)
class TrainState:
    """All that a run carries from step to step. Float32 throughout; nothing random is stored."""

    step: jax.Array  # optimizer steps done, int32
    params: Params
    opt_state: Any
    ema: dict[str, Params]  # by name, e.g. "0.9999" or "power:0.05"
    loss_scale: dict[str, jax.Array]  # float16: "scale" and "finite_steps" since it last changed


def init_state(geometry: Geometry, optim: Optimizer, dtype: str, key: jax.Array) -> TrainState:
    """A fresh state; pure, so that it can be jitted with sharded outputs or `jax.eval_shape`d.

    Args:
      dtype: compute type; float16 starts with a loss scale.
    """
    params = jit_model.init_fn(geometry)(key)
    return fresh_state(params, {name: jax.tree.map(jnp.copy, params) for name in optim.emas}, optim, dtype)


def fresh_state(params: Params, ema: dict[str, Params], optim: Optimizer, dtype: str) -> TrainState:
    """Step 0 with given weights: optimizer and schedule start afresh."""
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        opt_state=make_optimizer(optim).init(params),
        ema=ema,
        loss_scale={
            "scale": jnp.float32(first_loss_scale(dtype)),
            "finite_steps": jnp.zeros((), jnp.int32),
        },
    )


def randomness(key: jax.Array, shape: tuple[int, ...], d: Diffusion) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """What is drawn for one image of `shape` (S, S, 3): time, noise, whether its label is dropped, a key for dropout."""
    key_t, key_noise, key_label, key_dropout = jax.random.split(key, 4)
    return (
        diffusion.sample_times(key_t, d.p_mean, d.p_std),
        d.noise_scale * jax.random.normal(key_noise, shape),
        jax.random.bernoulli(key_label, d.label_drop_prob),
        key_dropout,
    )


def image_keys(seed: int, number: jax.Array, mesh: Mesh, local: int) -> jax.Array:
    """Keys of this device's `local` images when `number` optimizer steps are done, (local,). Inside `shard_map`."""
    step_key = jax.random.fold_in(jax.random.key(seed), number)
    indices = sharding.device_index(mesh) * local + jnp.arange(local)
    return jax.vmap(lambda i: jax.random.fold_in(step_key, i))(indices)


def make_loss(
    geometry: Geometry,
    diffusion_settings: Diffusion,
    *,
    objective: diffusion.Objective,
    class_conditional: bool,
    dtype: str,
    remat: str,
    ops: kernels.Ops,
) -> Callable[..., jax.Array]:
    """loss(params, images uint8 (B, S, S, 3), labels (B,), keys (B,)) -> loss of each image, (B,) float32.

    Each key draws an image's time, noise, dropped label and dropout; `objective` compares what the network makes of them with
    the image.
    Further arguments, `run_blocks`, `condition` and `observe`, are the network's, see `model.JiT`.
    """
    graphdef, d = jit_model.graphdef_of(geometry), diffusion_settings

    def loss_of_images(params, images, labels, keys, **options) -> jax.Array:
        with jax.named_scope("loss"):
            t, e, dropped, dropout_keys = jax.vmap(lambda key: randomness(key, images.shape[1:], d))(keys)
            if class_conditional:
                y = jnp.where(dropped, geometry.num_classes, labels)
            else:
                y = jnp.full_like(labels, geometry.num_classes)
            x = diffusion.to_float(images)
        network = jit_model.merge(graphdef, params)
        how = dict(dtype=jnp.dtype(dtype), ops=ops, remat=remat, dropout_keys=dropout_keys) | options
        return diffusion.loss_of(objective, network, x, e, t, y, labels=labels, **how)

    return loss_of_images


def first_loss_scale(dtype: str) -> float:
    return FIRST_LOSS_SCALE if dtype == "float16" else 1.0


def next_loss_scale(loss_scale: dict[str, jax.Array], finite: jax.Array) -> dict[str, jax.Array]:
    """Halve after a step with anything non-finite, double after `LOSS_SCALE_PATIENCE` finite ones."""
    count = jnp.where(finite, loss_scale["finite_steps"] + 1, 0)
    grow = count >= LOSS_SCALE_PATIENCE
    scale = jnp.where(finite, jnp.where(grow, 2.0, 1.0), 0.5) * loss_scale["scale"]
    return {"scale": jnp.clip(scale, 1.0, 2.0**24), "finite_steps": jnp.where(grow, 0, count)}


def make_train_step(
    loss: Callable[..., jax.Array],
    abstract_state: TrainState,
    mesh: Mesh,
    *,
    optim: Optimizer,
    schedule: Callable[[jax.Array], jax.Array],
    seed: int,
    dtype: str,
    comm_dtype: str = "float32",
    packing: pack.Packing = pack.PLAIN,
    dynamic_loss_scale: bool = False,
) -> Callable[[TrainState, Batch], tuple[TrainState, dict[str, jax.Array]]]:
    """The jitted step: (state, batch) -> (new state, metrics of this optimizer step as scalars on the device).

    Args:
      loss: from `make_loss`.
      abstract_state: shapes of the state, `jax.eval_shape` of `init_state`.
      schedule: the learning rate as a function of the optimizer step.
      dtype: compute type, in which weights cross devices.
      comm_dtype: type in which gradients cross devices; they are added up in float32.
      packing: from `jitjax.kernels.Ops`.
      dynamic_loss_scale: for float16.

    The state is donated. `batch` holds the images of one optimizer step, split over all mesh axes; each device cuts
    its part into `optim.accumulation_steps` micro-batches. A step whose loss or gradient is not finite changes only the step
    counter.
    """
    micro_batches = optim.accumulation_steps
    state_specs = sharding.specs(abstract_state, mesh)
    param_specs = state_specs.params
    optimizer = make_optimizer(optim, param_specs, mesh)
    summed_gradients = gradients.make(
        loss, abstract_state.params, mesh, micro_batches=micro_batches, dtype=dtype, comm_dtype=comm_dtype, packing=packing
    )

    def step(state: TrainState, batch: Batch) -> tuple[TrainState, dict[str, jax.Array]]:
        local = batch["label"].shape[0]
        keys = image_keys(seed, state.step, mesh, local)
        scale = state.loss_scale["scale"]
        grads, loss_sum, count = summed_gradients(state.params, batch, keys, scale)
        with jax.named_scope("optimizer"):
            grads = jax.tree.map(lambda grad: grad / jnp.maximum(count, 1), grads)
            norm = sharding.global_norm(grads, param_specs, mesh)
            usable = jnp.isfinite(norm) & jnp.isfinite(loss_sum) & (count > 0)
            if optim.clip_norm:
                shrink = jnp.minimum(1.0, optim.clip_norm / jnp.maximum(norm, 1e-12))
                grads = jax.tree.map(lambda grad: grad * shrink, grads)

            rate = schedule(state.step)
            updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
            new_params = jax.tree.map(lambda value, update: value + rate * update, state.params, updates)
            ema = update_ema(state.ema, new_params, state.step + 1, warmup=optim.ema_warmup)
            new_params, opt_state, ema = jax.tree.map(
                lambda new, old: jnp.where(usable, new, old),
                (new_params, opt_state, ema),
                (state.params, state.opt_state, state.ema),
            )
        skipped = mesh.size * micro_batches - jnp.where(usable, count, 0)
        loss_scale = state.loss_scale
        if dynamic_loss_scale:
            loss_scale = next_loss_scale(loss_scale, skipped == 0)
        metrics = {
            "train/loss": loss_sum / count,
            "train/learning_rate": rate,
            "train/grad_norm": norm,
            "train/skipped_micro_batches": skipped,
        }
        return TrainState(state.step + 1, new_params, opt_state, ema, loss_scale), metrics

    sharded = jax.shard_map(
        step, mesh=mesh, in_specs=(state_specs, sharding.BATCH), out_specs=(state_specs, P()), check_vma=False
    )
    state_shardings = sharding.shardings(abstract_state, mesh)
    return jax.jit(
        sharded,
        in_shardings=(state_shardings, NamedSharding(mesh, sharding.BATCH)),
        out_shardings=(state_shardings, NamedSharding(mesh, P())),
        donate_argnums=0,
        compiler_options=exchange.compiler_options(mesh),
    )
