"""Images per second of the extractors, with random weights: `python -m jitjax.evaluation.bench --extractor inception`."""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

from jitjax.evaluation import efficientnet, extractor, inception


def bench(
    which: str = "inception", *, image_size: int = 64, images: int = 8192, batch_size: int | None = None, seed: int = 0
) -> dict[str, Any]:
    """Measures extraction from uint8 images in host memory to float32 features in host memory, compilation excluded.

    Weights are random: speed does not depend on them, so no file is needed.

    Args:
      which: "inception" or "efficientnet-lite0". image_size: edge in pixels. images: how many.

    Returns:
      {"extractor", "image_size", "batch_size", "devices", "images_per_second", "precision"}.
    """
    rng = np.random.default_rng(seed)
    network = {"inception": inception, "efficientnet-lite0": efficientnet}[which]
    params = network.params_from_state(_random_state(network.state_shapes(), rng), "random weights")
    build = {"inception": extractor.inception_from_params, "efficientnet-lite0": extractor.efficientnet_from_params}[which]
    made = build(params, name=f"{which} with random weights", batch_size=batch_size)
    batch = rng.integers(0, 256, (made.batch_size, image_size, image_size, 3), np.uint8)

    def batches() -> Iterator[np.ndarray]:
        for _ in range(max(1, images // made.batch_size)):
            yield batch

    made(batch)  # compiles
    start = time.perf_counter()
    count = sum(len(outputs["features"]) for outputs in made.stream(batches()))
    return {
        "extractor": which,
        "image_size": image_size,
        "batch_size": made.batch_size,
        "devices": f"{jax.local_device_count()} x {jax.local_devices()[0].device_kind}",
        "precision": extractor.PRECISION.name.lower(),
        "images_per_second": round(count / (time.perf_counter() - start), 1),
    }


def _random_state(shapes: dict[str, tuple[int, ...]], rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Weights that keep activations near 1."""
    state = {}
    for name, shape in shapes.items():
        noise = rng.standard_normal(shape, np.float32)
        fan_in = max(1, int(np.prod(shape[1:])))
        if name.endswith("running_var") or (len(shape) == 1 and name.endswith("weight")):
            state[name] = np.ones(shape, np.float32)
        else:
            state[name] = noise * np.float32((2 / fan_in) ** 0.5 if len(shape) > 1 else 0.1)
    return state


def main() -> None:
    """The command line: prints what `bench` returned as one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--extractor", choices=("inception", "efficientnet-lite0"), default="inception")
    parser.add_argument("--image_size", type=int, default=64, help="edge in pixels")
    parser.add_argument("--images", type=int, default=8192)
    parser.add_argument("--batch_size", type=int, default=None, help="images per run over all devices")
    args = parser.parse_args()
    result = bench(args.extractor, image_size=args.image_size, images=args.images, batch_size=args.batch_size)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
