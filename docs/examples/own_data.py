"""Train on data of one's own: whatever can give image number i.

    python docs/examples/own_data.py runs/stripes

Here each image is drawn when it is asked for. A source may as well read a database, a memory-mapped array or a video. It is
pickled for the worker processes (`data.num_workers`) and used from many threads. Images that are in memory already need no
source: `jitjax.data.of_arrays(images, labels, class_names)`.
"""

import sys

import numpy as np

import jitjax
from jitjax import runtime

SIZE, COUNT, NAMES = 16, 4096, ("horizontal", "vertical")


class Stripes:
    """A `jitjax.data.Source`: stripes of random colour, width and phase."""

    def read(self, indices, images, labels):
        """Fill images[k] (S, S, 3) uint8 and labels[k] with image indices[k]; return (k, reason) of those that failed."""
        for k, index in enumerate(indices):
            rng = np.random.default_rng(index)
            wave = np.sin(np.arange(SIZE) * rng.uniform(0.6, 1.4) + rng.uniform(0, 6))
            rows = np.tile(wave[:, None], (1, SIZE))
            labels[k] = index % len(NAMES)
            picture = rows if labels[k] == 0 else rows.T
            images[k] = 128 + 100 * picture[..., None] * rng.uniform(-1, 1, 3)
        return []

    def name(self, index):
        """How messages call image `index`."""
        return f"stripes {index}"


def main(workdir, **overrides):
    settings = jitjax.settings.from_mapping(
        {
            "model.name": "JiT-nano/4",
            "model.class_conditional": True,
            "data.image_size": SIZE,
            "data.num_workers": 0,
            "batch_size": 32,
            "total_steps": 600,
            "dtype": "float32",
            "optim.lr": 1e-3,
            "optim.warmup_steps": 20,
            "optim.ema_decays": (0.99,),
            "preview.every_steps": 200,
            "preview.num_images": 16,
            "preview.steps": 20,
            "log.every_steps": 50,
            **overrides,
        }
    )
    # The checksum stands for the data: another one, and a run does not continue on it by mistake.
    dataset = jitjax.data.of_source(Stripes(), COUNT, image_size=SIZE, checksum="stripes 1", class_names=NAMES, name="stripes")
    return jitjax.train.train(settings, workdir, dataset=dataset)


if __name__ == "__main__":  # worker processes import this file
    runtime.set_environment()  # XLA flags and memory, as the `jitjax` command sets them
    sys.exit(main(sys.argv[1]))
