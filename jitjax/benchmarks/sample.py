"""The sampler: images/s with the preview's settings, as one JSON line for each way to sample.

    jitjax bench sample --config configs/imagenet.py:b16 --num_images 64 --baseline

With labels: "guided" (`preview.cfg_scale` inside `preview.interval`) and "unguided". `--baseline` adds "published", what the
published sampler computes with the same network code: at every step the conditional and the unconditional images as two
passes, also where guidance is off. Both give the same images, of random weights.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import statistics
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jitjax import diffusion, flops, sampling, settings, sharding
from jitjax.benchmarks import card, common
from jitjax.errors import UserError
from jitjax.from_settings import Setup
from jitjax.sampler import Sampler
from jitjax.settings import Settings


def run(args: argparse.Namespace) -> None:
    """Measure with the flags of `jitjax.bench`.

    Raises:
      UserError: a mistake in the configuration.
    """
    config = common.load(args)
    if args.num_images:
        config = dataclasses.replace(config, preview=dataclasses.replace(config.preview, num_images=args.num_images))
    ways = ["unguided"]
    if config.model.class_conditional:
        ways = ["guided", "unguided"] + ["published"] * args.baseline
    elif args.baseline:
        raise UserError("--baseline compares guidance, which needs labels: add --config.model.class_conditional=True")
    for record in measure(common.prepare(config), ways, args.repeats):
        common.emit(record)


def measure(setup: Setup, ways: Sequence[str], repeats: int) -> list[dict[str, Any]]:
    """A record for each way, all sampled from one set of weights. Rounds go over all ways, so that a card that warms up
    slows all of them."""
    draw = functools.partial(common.random_params, setup.geometry)
    abstract = jax.eval_shape(draw, jax.random.key(0))
    params = jax.jit(draw, out_shardings=sharding.shardings(abstract, setup.mesh))(jax.random.key(0))
    count = setup.settings.preview.num_images
    programs, compile_seconds = {}, {}
    for way in ways:
        sampler = make_sampler(setup, way)
        inputs = (params, *sampler.arguments(1, range(count), labels_of(setup, count)))
        count = inputs[-1].size  # rounded up to the devices
        programs[way], compile_seconds[way] = common.timed(sampler.program.lower(*inputs).compile)
        jax.block_until_ready(programs[way](*inputs))
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    with card.CardMonitor(setup.mesh) as monitor:
        for _ in range(repeats):
            for way in ways:
                seconds[way].append(common.timed(lambda way=way: programs[way](*inputs))[1])

    p = setup.settings.preview
    records = []
    for way in ways:
        median, passes = statistics.median(seconds[way]), network_passes(setup.settings, way)
        compared = way == "guided" and "published" in ways
        work = 2 * flops.forward_macs(setup.geometry) * passes * count / median / setup.mesh.size
        records.append(
            {
                "benchmark": "sample",
                "way": way,
                **common.summary(seconds[way], "seconds", digits=6),
                "repeats": repeats,
                "num_images": count,
                "images_per_second": round(count / median, 3),
                "network_passes_per_image": passes,
                "tflops_per_device": round(work / 1e12, 4),
                "speedup_over_published": round(statistics.median(seconds["published"]) / median, 3) if compared else None,
                "compile_seconds": round(compile_seconds[way], 2),
                "method": p.method,
                "sampling_steps": p.steps,
                "cfg_scale": scale_of(setup.settings, way),
                "interval": list(p.interval),
                "cards": monitor.report(),
                **common.describe(setup),
            }
        )
        common.say(
            f"{setup.settings.model.name} {way}: {records[-1]['images_per_second']} images/s, {count} in {median:.3f} s, "
            f"{passes} network passes an image"
        )
    return records


def labels_of(setup: Setup, count: int) -> Sequence[int]:
    """A label for each image; the null label where the model is unconditional."""
    classes = setup.geometry.num_classes
    return [i % classes if setup.settings.model.class_conditional else classes for i in range(count)]


def make_sampler(setup: Setup, way: str) -> Sampler:
    """The sampler that previews and `Pipeline.sample` use, with float32 images as its result."""
    options = dataclasses.replace(setup.settings.preview.sampler(), cfg_scale=scale_of(setup.settings, way))
    return Sampler(
        setup.geometry,
        diffusion.from_config(settings.to_dict(setup.settings)),
        options,
        setup.mesh,
        dtype=setup.settings.dtype,
        ops=setup.ops,
        comm_dtype=setup.settings.mesh.comm_dtype,
        integrate=published if way == "published" else sampling.sample_fn,
        finish=lambda images: images,
    )


def published(network, noise, labels, *, null_label, steps, method, cfg_scale, interval, t_eps, prediction, grid) -> jax.Array:
    """`sampling.sample_fn` as the published sampler computes it: two passes always, and outside the interval the scale is 1."""

    def velocity(z, t, _):
        tt = jnp.full((z.shape[0],), t, jnp.float32)

        def forward(y):
            return diffusion.convert(network(z, tt, y).astype(jnp.float32), prediction, "v", z, tt, t_eps)

        v, v_null = forward(labels), forward(jnp.full_like(labels, null_label))
        return v_null + jnp.where(sampling.guided(t, interval), cfg_scale, 1.0) * (v - v_null)

    return sampling.integrate(velocity, noise, steps=steps, method=method, interval=interval, grid=grid, t_eps=t_eps)


def scale_of(config: Settings, way: str) -> float:
    """The guidance scale of a way to sample; 1 is off."""
    return 1.0 if way == "unguided" else float(config.preview.cfg_scale)


def network_passes(config: Settings, way: str) -> int:
    """Forward passes of the network for one image."""
    p = config.preview
    on = sampling.guided(sampling.time_grid(p.steps, p.grid), tuple(p.interval)) & (scale_of(config, way) != 1.0)
    each = 1 + (on | (way == "published")).astype(int)
    second = each[1:-1].sum() if p.method == "heun" else 0  # Heun's second evaluation; its last step is Euler's
    return int(each[:-1].sum() + second)
