"""Add a regulariser on activations to the published loss.

    python docs/examples/own_regulariser.py runs/dispersive

Here the dispersive loss (Wang and He, arXiv 2506.09027): tokens of different images are pushed apart in the middle of the
network, without labels and without another network. Whether it helps JiT is not measured here; read it as an example of the
hook. The attribute `activations` names what the loss gets besides the network's output.
"""

import sys

import jax
import jax.numpy as jnp

import jitjax
from jitjax import diffusion, runtime

WEIGHT, TEMPERATURE = 0.5, 0.5
published = diffusion.published_objective("x", "v", 0.05)


def dispersive(output, x, e, t, activations):
    """The published loss plus how close the images of this device are to each other.

    Args:
      output, x, e, t: as for every objective.
      activations: {"blocks.2.attn": (B, tokens, width)}.

    Returns:
      (B,) float32.
    """
    (tokens,) = activations.values()
    flat = tokens.astype(jnp.float32).reshape(len(tokens), -1)
    distances = jnp.sum(jnp.square(flat[:, None] - flat[None]), axis=-1) / flat.shape[1]
    each = jax.nn.logsumexp(-distances / TEMPERATURE, axis=1) - jnp.log(len(flat))
    return published(output, x, e, t) + WEIGHT * each


dispersive.activations = ("blocks.2.attn",)


def main(workdir, **overrides):
    settings = jitjax.settings.from_mapping(
        {
            "model.name": "JiT-nano/4",
            "model.class_conditional": True,
            "data.synthetic": "shapes",
            "data.image_size": 32,
            "data.num_workers": 0,
            "batch_size": 32,
            "total_steps": 1500,
            "dtype": "float32",
            "optim.lr": 1e-3,
            "optim.warmup_steps": 50,
            "optim.ema_decays": (0.99,),
            "preview.every_steps": 250,
            "preview.steps": 20,
            "log.every_steps": 25,
            **overrides,
        }
    )
    return jitjax.train.train(settings, workdir, objective=dispersive)


if __name__ == "__main__":  # worker processes import this file
    runtime.set_environment()  # XLA flags and memory, as the `jitjax` command sets them
    sys.exit(main(sys.argv[1]))
