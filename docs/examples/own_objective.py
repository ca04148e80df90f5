"""Train with a loss of one's own.

    python docs/examples/own_objective.py pseudo_huber runs/huber
    python docs/examples/own_objective.py dispersive runs/dispersive

A loss is a function on arrays. It gets what the network made of the noised images, the clean images, the noise and the times,
and returns one number for each image; times, noise, dropped labels, gradients and everything else are the trainer's. What the
network predicts stays `settings.prediction` ("x", the clean image), so that samplers can read its output.

With an attribute `activations` it gets what the network computed on the way, too, here for a regulariser. The run saves the
function's name with its configuration and refuses to continue with another one. What the dispersive loss gave is in
docs/fast.md (beside Muon it is worse); the pseudo-Huber loss is not measured.
"""

import sys

import jax
import jax.numpy as jnp

import jitjax
from jitjax import diffusion, runtime

WIDTH = 0.5  # errors of the velocity beyond this count linearly
WEIGHT, TEMPERATURE = 0.5, 0.5  # of the dispersive loss
published = diffusion.published_objective("x", "v", 0.05)


def pseudo_huber(output, x, e, t):
    """The pseudo-Huber loss of the velocity, less impressed by outliers than the published squared error.

    Args:
      output: (B, S, S, 3) the network's prediction of x, in the compute type.
      x, e: (B, S, S, 3) clean images in [-1, 1], and noise.
      t: (B,) times; the network saw z = t x + (1 - t) e.

    Returns:
      (B,) float32.
    """
    z = diffusion.noised(x, e, t)
    error = diffusion.convert(output.astype(jnp.float32), "x", "v", z, t) - diffusion.convert(x, "x", "v", z, t)
    return jnp.mean(WIDTH**2 * (jnp.sqrt(1 + jnp.square(error / WIDTH)) - 1), axis=(1, 2, 3))


def dispersive(output, x, e, t, activations):
    """The published loss plus the dispersive loss (Wang and He, arXiv 2506.09027), which pushes the images of this device apart
    after the attention of the third block, without labels and without another network.

    Args:
      output, x, e, t: as above.
      activations: {"blocks.2.attn": (B, tokens, width)}.

    Returns:
      (B,) float32.
    """
    (tokens,) = activations.values()
    flat = tokens.astype(jnp.float32).reshape(len(tokens), -1)
    flat -= jnp.mean(flat, axis=0)  # moves no image relative to another, and keeps the differences below from cancelling
    products = flat @ flat.T  # a matmul: differences of all pairs would be B times as large as the activations
    squares = jnp.diagonal(products)
    distances = (squares[:, None] + squares[None] - 2 * products) / flat.shape[1]
    each = jax.nn.logsumexp(-distances / TEMPERATURE, axis=1) - jnp.log(len(flat))
    return published(output, x, e, t) + WEIGHT * each


dispersive.activations = ("blocks.2.attn",)


def main(objective, workdir, **overrides):
    settings = jitjax.settings.from_mapping(
        {
            "model.name": "JiT-nano/4",
            "model.class_conditional": True,
            "data.synthetic": "shapes",  # drawn into the workdir; for a folder of images: "data.path"
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
    return jitjax.train.train(settings, workdir, objective=objective)


if __name__ == "__main__":  # worker processes import this file
    runtime.set_environment()  # XLA flags and memory, as the `jitjax` command sets them
    sys.exit(main({f.__name__: f for f in (pseudo_huber, dispersive)}[sys.argv[1]], sys.argv[2]))
