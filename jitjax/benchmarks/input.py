"""The input pipeline alone: images/s to host batches and to device batches, as one JSON line.

    jitjax bench input --config configs/h200.py --config.data.path=./data/train64

Nothing consumes the batches but the clock, so this is what the pipeline can supply at most; training takes what it
needs.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import time
from collections.abc import Iterator
from typing import Any

from jitjax.cli import arguments
from jitjax.data import make_iterator, open_dataset, to_device
from jitjax.data.pool import available_cpus
from jitjax.settings import Settings, check_data


def run(args: argparse.Namespace) -> None:
    """Measure the data set and input settings of a config, with the flags of `jitjax.bench`."""
    config = arguments.load(args.config_arguments, run_length=False).settings
    check_data(config.data)
    print(json.dumps(measure(config, args.seconds)), flush=True)


def measure(config: Settings, seconds: float) -> dict[str, Any]:
    """Runs the pipeline twice, to host and to device, after a warm-up that fills its buffers.

    Returns:
      Rates in images/s (per worker: the rate divided by the workers, or by 1 where threads of this process read) and
      the workers' memory in MiB after the warm-up and at the end.
    """
    import jax

    from jitjax.sharding import BATCH, mesh_of

    dataset = open_dataset(config.data.path, config.data.image_size, **config.data.reading())
    mesh = mesh_of(config.mesh)
    global_batch = config.batch_size * mesh.size * config.optim.accumulation_steps
    workers = config.data.num_workers

    def start() -> Any:
        return make_iterator(
            dataset,
            seed=config.seed,
            global_batch=global_batch,
            process_index=jax.process_index(),
            process_count=jax.process_count(),
            num_workers=workers,
            flip=config.data.flip,
            max_bad_fraction=config.data.max_bad_fraction,
        )

    result: dict[str, Any] = {
        "benchmark": "input",
        "kind": dataset.kind,
        "images": len(dataset),
        "image_size": dataset.image_size,
        "global_batch": global_batch,
        "num_workers": workers,
        "cpus": available_cpus(),
        "devices": f"{mesh.size} x {mesh.devices.flat[0].device_kind}",
    }
    per_process = global_batch // jax.process_count()
    for stage in ("host", "device"):
        batches = start()
        if stage == "device":
            batches = to_device(batches, jax.sharding.NamedSharding(mesh, BATCH))
        try:
            begin = time.perf_counter()
            next(batches)
            result[f"{stage}_first_batch_seconds"] = round(time.perf_counter() - begin, 3)
            _take(batches, seconds / 5)
            memory = _worker_mib()
            count, elapsed = _take(batches, seconds)
            rate = count * per_process / elapsed
            result[f"{stage}_images_per_second"] = round(rate, 1)
            result[f"{stage}_images_per_second_per_worker"] = round(rate / max(1, workers), 1)
            result[f"{stage}_worker_mib"] = [memory, _worker_mib()]
        finally:
            batches.close()
    return result


def _take(batches: Iterator[dict[str, Any]], seconds: float) -> tuple[int, float]:
    """Takes batches for a time; waits for each to be on its device. Returns their number and the exact time."""
    begin, count = time.perf_counter(), 0
    while (elapsed := time.perf_counter() - begin) < seconds or count == 0:
        batch = next(batches)
        if hasattr(batch["image"], "block_until_ready"):
            batch["image"].block_until_ready()
        count += 1
    return count, elapsed


def _worker_mib() -> int:
    """Resident memory of all workers together; 0 where the system does not say."""
    total = 0
    for child in multiprocessing.active_children():
        try:
            with open(f"/proc/{child.pid}/statm", encoding="ascii") as file:
                total += int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
        except OSError:
            continue
    return total >> 20
