"""The flow-matching objective: noising, what a network may predict, and in which space its error is measured.

Direction of time: t = 0 is pure noise, t = 1 is data; z_t = t * x + (1 - t) * e. Velocity v = dz/dt = x - e.
Source: arXiv 2511.13720, section 3 and Table 1 (the nine combinations of prediction and loss space).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jitjax.errors import UserError

# objective(output, x, e, t) -> loss of each image, (B,) float32. `output` is the network's, x the clean images in [-1, 1], e
# the noise, all (B, H, W, 3); e and the times t (B,) made the network's input z_t. B is one device's part of a micro-batch.
# With an attribute `activations`, names as `jitjax.model.JiT` observes them, it gets them as a fifth argument, by name;
# "labels" among them are the images' labels, (B,), before some are dropped.
Objective = Callable[..., jax.Array]
LABELS = "labels"


def loss_of(objective: Objective, network: Callable[..., jax.Array], x: jax.Array, e: jax.Array, t: jax.Array, y: jax.Array,
            *, labels: jax.Array | None = None, **options: Any) -> jax.Array:  # fmt: skip
    """The loss of each image, (B,) float32: noises the images, applies `network`, and applies `objective` to its output.

    Args:
      network: a `jitjax.model.JiT`; `options` are further arguments of its call.
      x, e: clean images and noise, (B, H, W, 3). t: times, (B,). y: labels for the network, (B,).
      labels: those for an objective that asks for them, (B,); default y.

    Raises:
      UserError: the objective asks for what the network does not compute, or does not return one number per image.
    """
    with jax.named_scope("loss"):
        z = noised(x, e, t)
    wanted, also = getattr(objective, "activations", ()), options.pop("observe", None)
    seen = {LABELS: y if labels is None else labels} if LABELS in wanted else {}

    def observe(name: str, value: jax.Array) -> None:
        if name in wanted:
            seen[name] = value
        if also:
            also(name, value)

    output = network(z, t, y, **options, observe=observe if wanted or also else None, wanted=wanted)
    if missing := [name for name in wanted if name not in seen]:
        raise UserError(f"the objective asks for {missing[0]}, which a model of depth {network.geometry.depth} does not have")
    with jax.named_scope("loss"):
        return _of_each_image(objective(output, x, e, t, seen) if wanted else objective(output, x, e, t), t)


def _of_each_image(loss: Any, t: jax.Array) -> jax.Array:
    """What an objective returned, if it is one number per image. Sums and means over images would take anything.

    Raises:
      UserError: it is not.
    """
    shape = getattr(loss, "shape", None)
    if shape != t.shape or not jnp.issubdtype(loss.dtype, jnp.floating):
        what = f"a {type(loss).__name__}" if shape is None else f"an array of shape {shape} and type {loss.dtype}"
        raise UserError(
            f"the objective returns {what} for {len(t)} images: it must be one floating-point number per image, "
            f"({len(t)},), e.g. jnp.mean(..., axis=(1, 2, 3))"
        )
    return loss


@dataclasses.dataclass(frozen=True)
class Diffusion:
    """How a network's output is to be read, and the noise that it was trained with."""

    prediction: str = "x"  # what the network outputs: x, epsilon or v
    noise_scale: float = 1.0  # standard deviation of the noise
    t_eps: float = 0.05  # training's lower clip of 1 - t
    sample_t_eps: float = 0.05  # sampling's


def from_config(config: Mapping[str, Any]) -> Diffusion:
    """From a run's saved configuration; fields that it lacks have the published values."""
    noise, preview = config.get("diffusion") or {}, config.get("preview") or {}
    found = dict(
        prediction=config.get("prediction"),
        noise_scale=noise.get("noise_scale"),
        t_eps=noise.get("t_eps"),
        sample_t_eps=preview.get("t_eps"),
    )
    return Diffusion(**{name: value for name, value in found.items() if value is not None})


def expand(t_B: jax.Array, like: jax.Array) -> jax.Array:
    """(B,) -> (B, 1, 1, 1), ready to broadcast against images."""
    return t_B.reshape(t_B.shape + (1,) * (like.ndim - t_B.ndim))


def noised(x: jax.Array, e: jax.Array, t_B: jax.Array) -> jax.Array:
    """z_t = t x + (1 - t) e."""
    t = expand(t_B, x)
    return t * x + (1 - t) * e


def convert(value: jax.Array, source: str, target: str, z: jax.Array, t_B: jax.Array, t_eps: float = 0.05) -> jax.Array:
    """Re-express `value`, given in space `source` at (z, t), in space `target`. All images (B, H, W, C), t (B,).

    Denominators 1 - t and t are clipped from below at `t_eps`, as published.

    Raises:
      KeyError: a space that is not x, epsilon or v.
    """
    t = expand(t_B, z)
    to_data, to_noise = jnp.maximum(1 - t, t_eps), jnp.maximum(t, t_eps)
    return {
        ("x", "x"): lambda: value,
        ("x", "epsilon"): lambda: (z - t * value) / to_data,
        ("x", "v"): lambda: (value - z) / to_data,
        ("epsilon", "x"): lambda: (z - (1 - t) * value) / to_noise,
        ("epsilon", "epsilon"): lambda: value,
        ("epsilon", "v"): lambda: (z - value) / to_noise,
        ("v", "x"): lambda: z + (1 - t) * value,
        ("v", "epsilon"): lambda: z - t * value,
        ("v", "v"): lambda: value,
    }[source, target]()


def loss_per_image(
    output: jax.Array, x: jax.Array, e: jax.Array, t_B: jax.Array, prediction: str, loss: str, t_eps: float = 0.05
) -> jax.Array:
    """Mean squared error of each image in the loss space, (B,) float32.

    Args:
      output: what the network gave at (z_t, t), in space `prediction`.
      x, e, t_B: clean images, noise (already scaled) and times that made z_t.
      prediction, loss: x, epsilon or v.

    The target goes through the same clipped conversion as the output, so that a perfect output has loss zero at every t.
    For x-prediction with v-loss this is the published target (x - z) / max(1 - t, t_eps).
    """
    x, e, output = x.astype(jnp.float32), e.astype(jnp.float32), output.astype(jnp.float32)
    z = noised(x, e, t_B)
    truth = {"x": x, "epsilon": e, "v": x - e}[prediction]
    error = convert(output, prediction, loss, z, t_B, t_eps) - convert(truth, prediction, loss, z, t_B, t_eps)
    return jnp.mean(jnp.square(error), axis=(1, 2, 3))


def published_objective(prediction: str, loss: str, t_eps: float) -> Objective:
    """`loss_per_image` with everything but the arrays given."""
    return lambda output, x, e, t_B: loss_per_image(output, x, e, t_B, prediction, loss, t_eps)


def with_class_loss(objective: Objective, weight: float) -> Objective:
    """`objective` plus `weight` times the cross-entropy of the class that the model's first blocks see in the noised image. The
    auxiliary loss of arXiv 2511.13720, which counts 100 beside the squared error summed over an image's values."""
    names = getattr(objective, "activations", ())

    def total(output, x, e, t_B, seen):
        own = [{name: seen[name] for name in names}] if names else []  # what it asked for and no more
        loss = _of_each_image(objective(output, x, e, t_B, *own), t_B)
        log_p = jax.nn.log_softmax(seen["class_logits"], axis=-1)
        return loss - weight * jnp.take_along_axis(log_p, seen[LABELS][:, None], axis=-1)[:, 0]

    total.activations = (*names, "class_logits", LABELS)
    return total


def sample_times(key: jax.Array, mean: float, std: float) -> jax.Array:
    """One logit-normal time: sigmoid(N(mean, std)), scalar float32."""
    return jax.nn.sigmoid(mean + std * jax.random.normal(key))


def to_float(images_uint8: jax.Array) -> jax.Array:
    """uint8 in [0, 255] -> float32 in [-1, 1]: v / 255 * 2 - 1."""
    return images_uint8.astype(jnp.float32) / 255 * 2 - 1


def to_uint8(images: jax.Array) -> jax.Array:
    """Float in [-1, 1] -> uint8: (v + 1) / 2 * 255, clipped, rounded half to even."""
    return jnp.round(jnp.clip((images.astype(jnp.float32) + 1) / 2 * 255, 0, 255)).astype(jnp.uint8)
