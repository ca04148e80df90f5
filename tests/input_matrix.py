"""The exact place, in full: `python tests/input_matrix.py` draws batches of real photographs with every combination of
workers, processes, devices, resume points and kinds of data set, and prints whether each is the one of its place.

What belongs there is written out below with plain integers and Pillow, one example at a time. A resume is a new pipeline
that starts at that step, so each has its own, workers and all; so has each process, told its index and count. Devices are
those of one process: they only split its batches, so one pipeline feeds 1 and 8. At the end four real processes, joined as
a cluster, draw their shares onto 4 and 8 devices in all. test_data_pipeline.py holds a sample of the same rows. Exit code 1
if anything differs. Under twenty minutes on two cores; with `--workers 0`, half a minute.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from conftest import ROOT  # before JAX is imported: it sets up the emulated devices

# isort: split
import jax
import numpy as np
from data_files import caltech_folder, official_pixels
from jax.sharding import Mesh, NamedSharding

from jitjax.data import DataSet, make_iterator, open_dataset, to_device
from jitjax.data.dataset import Source
from jitjax.sharding import BATCH as BATCH_SPEC
from jitjax.sharding import make_mesh

SIZE, BATCH, SEED = 64, 32, 7
BATCHES = 12  # more than workers, so each is asked again, and from every start at least one whole epoch
EVERY = 36  # of the Caltech set: 208 photographs, six batches and 16 left over an epoch
WORKERS, PROCESSES, DEVICES = (0, 2, 8), (1, 4), (1, 8)
STEPS = {"beginning": 0, "mid-epoch": 2, "epoch boundary": 6, "second epoch": 8, "millionth step": 1_000_003}
STARTS = {name: step * BATCH for name, step in STEPS.items()}


def make_datasets(target: Path) -> dict[str, DataSet]:
    """The same photographs as a folder and, by the command that users run, prepared."""
    caltech_folder(target / "folder" / "train", EVERY)
    options = [f"--data_path={target / 'folder'}", f"--output={target / 'prepared'}", f"--image_size={SIZE}", "--shards=3"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, "-m", "jitjax.prepare", *options], env=environment, check=True, capture_output=True)
    return {kind: open_dataset(target / kind, SIZE) for kind in ("folder", "prepared")}


# ---------------------------------------------------------------- the definition, one example at a time

_MASK = 2**64 - 1


def _mix(x: int) -> int:
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 & _MASK
    x = (x ^ x >> 27) * 0x94D049BB133111EB & _MASK
    return x ^ x >> 31


def _key(stream: int) -> int:
    return _mix(_mix((SEED * 0x9E3779B97F4A7C15 + stream) & _MASK) + stream & _MASK)


def place_of(example: int, count: int) -> tuple[int, bool]:
    """(image, mirrored) of one example of a run over `count` images."""
    epoch, x = divmod(example, count // BATCH * BATCH)
    key = _mix((epoch + _key(1)) & _MASK)
    bits = max(4, (count - 1).bit_length())
    low_bits, high_bits = bits // 2, bits - bits // 2
    while True:
        high, low = x >> low_bits, x % 2**low_bits
        for r in range(8):
            round_key = key + (r + 1) * 0xD1342543DE82EF95
            if r % 2 == 0:
                high ^= _mix((low + round_key) & _MASK) % 2**high_bits
            else:
                low ^= _mix((high + round_key) & _MASK) % 2**low_bits
        x = high << low_bits | low
        if x < count:
            return x, _mix((example + _key(2)) & _MASK) >> 63 == 1


class Reference:
    """What every example of the run is, from the files themselves and the published preprocessing."""

    def __init__(self, folder: Path):
        files = sorted(folder.glob("*/*.jpg"), key=lambda file: (file.parent.name, file.name))
        classes = sorted({file.parent.name for file in files})
        self.count = len(files)
        self.labels = [classes.index(file.parent.name) for file in files]
        self._pixels = [official_pixels(file, SIZE) for file in files]
        self._known = {p.tobytes(): k for k, pixels in enumerate(self._pixels) for p in (pixels, pixels[:, ::-1])}
        assert len(set(self._known.values())) == self.count, "two photographs are the same"

    def rows(self, first: int, last: int) -> tuple[np.ndarray, np.ndarray]:
        """(images, labels) of the run's examples [first, last)."""
        places = [place_of(example, self.count) for example in range(first, last)]
        pixels = [self._pixels[image][:, ::-1] if mirrored else self._pixels[image] for image, mirrored in places]
        return np.stack(pixels), np.array([self.labels[image] for image, _ in places])

    def batches(self, start: int, processes: int) -> tuple[np.ndarray, np.ndarray]:
        """(images, labels) of the batches from example `start` on: (batches, processes, rows of a process, ...)."""
        images, labels = self.rows(start, start + BATCHES * BATCH)
        return images.reshape(BATCHES, processes, -1, *images.shape[1:]), labels.reshape(BATCHES, processes, -1)

    def identify(self, image: np.ndarray) -> int:
        """Which photograph these pixels show, -1 for none."""
        return self._known.get(image.tobytes(), -1)


# ---------------------------------------------------------------- one row of the matrix


@dataclasses.dataclass(frozen=True)
class Recorder:
    """A data set's source that writes down what is read of it, in whichever process that happens."""

    source: Source
    log: str  # a folder

    def read(self, indices, images, labels):
        with open(f"{self.log}/{os.getpid()}", "a") as file:
            file.write(json.dumps(indices.tolist()) + "\n")
        return self.source.read(indices, images, labels)

    def name(self, index):
        return self.source.name(index)


@dataclasses.dataclass
class Outcome:
    """What came of a pipeline, or of all processes' together.

    compared, differing: devices -> examples. shown, repeated: images in complete epochs, and how many of them for the
    second time in theirs. read, foreign: runs of images that were read, and those that are no share of this process or were
    read before.
    """

    compared: dict[int, int]
    differing: dict[int, int]
    shown: int = 0
    repeated: int = 0
    read: int = 0
    foreign: int = 0

    def ok(self) -> bool:
        return not any(self.differing.values()) and not self.repeated and not self.foreign and self.read > 0


def draw(dataset: DataSet, start: int, **options) -> tuple[list[dict[str, np.ndarray]], list[list[int]]]:
    """A pipeline's first host batches, and the runs of images that it read."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as log:  # a thread may still finish its chunk after close
        recorded = dataclasses.replace(dataset, source=Recorder(dataset.source, log))
        iterator = make_iterator(recorded, seed=SEED, global_batch=BATCH, start_example=start, **options)
        try:
            batches = [next(iterator) for _ in range(BATCHES)]
        finally:
            iterator.close()
        return batches, [json.loads(line) for file in Path(log).iterdir() for line in file.read_text().splitlines()]


def count_differing(batches, images: np.ndarray, labels: np.ndarray, mesh: Mesh) -> tuple[int, int]:
    """(compared, differing) examples: what each device of this process holds against its rows of images, labels
    (batches, rows, ...), which are those of the whole mesh.
    """
    iterator = to_device(iter(batches), NamedSharding(mesh, BATCH_SPEC))
    compared = differing = 0
    per_device = images.shape[1] // mesh.size
    place = {device: k for k, device in enumerate(mesh.devices.flat)}
    try:
        for want_images, want_labels in zip(images, labels, strict=True):
            batch = next(iterator)
            assert batch["image"].dtype == np.uint8 and batch["label"].dtype == np.int32
            for image, label in zip(batch["image"].addressable_shards, batch["label"].addressable_shards, strict=True):
                assert image.device == label.device
                rows = slice(place[image.device] * per_device, (place[image.device] + 1) * per_device)
                unequal = (np.asarray(image.data) != want_images[rows]).any((1, 2, 3)) | (label.data != want_labels[rows])
                compared, differing = compared + len(unequal), differing + int(unequal.sum())
    finally:
        iterator.close()
    return compared, differing


def foreign_reads(read: list[list[int]], start: int, process: int, processes: int, count: int) -> int:
    """How many runs of images are not this process's rows of a batch that is due (workers read ahead), each once."""
    share = BATCH // processes
    due = set()
    for batch in range(BATCHES + 100):
        first = start + batch * BATCH + process * share
        due.add(tuple(place_of(example, count)[0] for example in range(first, first + share)))
    return len(read) - len(due & {tuple(images) for images in read})


def check(dataset: DataSet, reference: Reference, start: int, workers: int, processes: int, only: int | None = None) -> Outcome:
    """Runs the pipelines of all processes, or `only` that one, and compares what they deliver to 1 and to 8 devices."""
    images, labels = reference.batches(start, processes)
    outcome = Outcome(dict.fromkeys(DEVICES, 0), dict.fromkeys(DEVICES, 0))
    shares = []
    for process in range(processes) if only is None else [only]:
        options = dict(num_workers=workers, process_index=process, process_count=processes)
        batches, read = draw(dataset, start, **options)
        for devices in DEVICES:
            mesh = make_mesh(None, 1, 1, jax.devices()[:devices])
            compared, differing = count_differing(batches, images[:, process], labels[:, process], mesh)
            assert compared == BATCHES * BATCH // processes
            outcome.compared[devices] += compared
            outcome.differing[devices] += differing
        outcome.read += len(read)
        outcome.foreign += foreign_reads(read, start, process, processes, reference.count)
        shares.append([[reference.identify(image) for image in batch["image"]] for batch in batches])
    if only is None:
        run = np.concatenate(shares, axis=1).ravel()
        epoch = reference.count // BATCH * BATCH
        for first in range(-start % epoch, len(run) - epoch + 1, epoch):
            outcome.shown += epoch
            outcome.repeated += epoch - len(set(run[first : first + epoch].tolist()) - {-1})
    return outcome


# ---------------------------------------------------------------- four real processes


def check_in_group(datasets: dict[str, DataSet], reference: Reference, workers: int) -> Iterator[tuple[str, str, Outcome]]:
    """(kind, start, outcome) of this process of a cluster: one device of each process, then all that there are."""
    process, processes = jax.process_index(), jax.process_count()
    meshes = [make_mesh(None, 1, 1, jax.devices()[:: jax.local_device_count()]), make_mesh(None, 1, 1)]
    for (kind, dataset), (name, start) in itertools.product(datasets.items(), STARTS.items()):
        images, labels = reference.batches(start, processes=1)
        batches, read = draw(dataset, start, num_workers=workers, process_index=process, process_count=processes)
        outcome = Outcome({}, {}, read=len(read), foreign=foreign_reads(read, start, process, processes, reference.count))
        for mesh in meshes:
            compared, differing = count_differing(batches, images[:, 0], labels[:, 0], mesh)
            assert compared == BATCHES * BATCH // processes
            outcome.compared[mesh.size], outcome.differing[mesh.size] = compared, differing
        yield kind, name, outcome


def run_group(target: Path, workers: int, processes: int = 4, devices: int = 8) -> dict[tuple[int, str, str], Outcome]:
    """Starts the processes. Returns (process, kind, start) -> what came of it."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "JAX_NUM_CPU_DEVICES": str(devices // processes)}
    environment |= {"JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": str(processes)}
    command = [sys.executable, str(Path(__file__).resolve()), "--member", str(target), "--workers", str(workers)]
    members = [
        subprocess.Popen(command, env={**environment, "JAX_PROCESS_ID": str(i)}, stdout=subprocess.PIPE, text=True)
        for i in range(processes)
    ]
    outcomes = {}
    try:
        for i, process in enumerate(members):
            output = process.communicate(timeout=1200)[0]
            assert process.returncode == 0, f"process {i} failed"
            for kind, start, compared, differing, read, foreign in map(json.loads, output.splitlines()):
                outcomes[i, kind, start] = Outcome(dict(compared), dict(differing), read=read, foreign=foreign)
    finally:
        for process in members:
            process.kill()
    return outcomes


def member(target: Path, workers: int) -> None:
    from jitjax.runtime import start_distributed

    start_distributed()
    datasets = {kind: open_dataset(target / kind, SIZE) for kind in ("folder", "prepared")}
    for kind, start, outcome in check_in_group(datasets, Reference(target / "folder" / "train"), workers):
        compared, differing = (list(counts.items()) for counts in (outcome.compared, outcome.differing))
        print(json.dumps([kind, start, compared, differing, outcome.read, outcome.foreign]), flush=True)


# ---------------------------------------------------------------- the table

COLUMNS = ("data set", "started at", "workers", "processes", "devices", "examples", "differing", "in whole epochs", "repeated")
COLUMNS += ("reads", "foreign", "seconds")


def print_row(*values: object) -> None:
    cells = [f"{value:>{len(title)}}" for title, value in zip(COLUMNS[2:], values[2:], strict=False)]
    print(f"{values[0]:9} {values[1]:15}", *cells, *values[len(COLUMNS) :], flush=True)


def main(target: Path, workers: tuple[int, ...]) -> int:
    begun = time.perf_counter()
    datasets = make_datasets(target)
    reference = Reference(target / "folder" / "train")
    print(f"{reference.count} photographs of {len(set(reference.labels))} classes, batches of {BATCH}, seed {SEED}")
    print_row(*COLUMNS)
    count = wrong = 0
    for kind, start, w, processes in itertools.product(datasets, STARTS, workers, PROCESSES):
        clock = time.perf_counter()
        outcome = check(datasets[kind], reference, STARTS[start], w, processes)
        seconds = f"{time.perf_counter() - clock:.1f}"
        for devices in DEVICES:
            delivered = outcome.compared[devices], outcome.differing[devices], outcome.shown, outcome.repeated
            note = () if outcome.ok() else ("<-- wrong",)
            print_row(kind, start, w, processes, devices, *delivered, outcome.read, outcome.foreign, seconds, *note)
            count, wrong = count + 1, wrong + (not outcome.ok())
    print(f"{count} combinations, {wrong} wrong", flush=True)
    for w in sorted({0, 2} & set(workers)):
        outcomes = run_group(target, w)
        bad = sum(not outcome.ok() for outcome in outcomes.values())
        compared = sum(sum(outcome.compared.values()) for outcome in outcomes.values())
        total = f"{len(outcomes)} runs, {compared} examples, {bad} runs wrong"
        print(f"four real processes, {w} workers each, 4 and 8 devices in all: {total}", flush=True)
        wrong += bad
    print(f"{time.perf_counter() - begun:.0f} s (jax {jax.__version__}, {jax.default_backend()})")
    return int(wrong > 0)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", help="only these numbers of workers, as in 0,2")
    parser.add_argument("--folder", type=Path, help="where to put the photographs (default: a temporary folder)")
    parser.add_argument("--member", type=Path, help=argparse.SUPPRESS)  # one process of the cluster
    options = parser.parse_args()
    chosen = tuple(int(w) for w in options.workers.split(",")) if options.workers else WORKERS
    if options.member:
        raise SystemExit(member(options.member, *chosen))
    with tempfile.TemporaryDirectory() as temporary:
        raise SystemExit(main(options.folder or Path(temporary), chosen))
