"""The Grain pipeline: an endless stream of host batches whose content depends on (seed, example index, data set) alone.

Grain's element is a *chunk*: a run of consecutive examples of one batch, small enough that a worker's memory stays
bounded and large enough that per-element Python costs vanish. A chunk is computed from its number, so workers, threads
and processes change who computes it, never what it holds; resuming means starting at another number. Grain's own
iterator state is not used: it goes silently wrong when the number of workers changes.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import logging
import os
import signal
import threading
from collections.abc import Collection, Iterator, Mapping
from typing import Any

import numpy as np

from jitjax.data import readers
from jitjax.data.dataset import DataSet
from jitjax.data.files import CANNOT_READ
from jitjax.data.image import is_constant
from jitjax.data.order import ExampleOrder
from jitjax.data.pool import available_cpus, obey_parent
from jitjax.data.readers import Readers
from jitjax.errors import UserError

_log = logging.getLogger("jitjax.data")

CHUNK_BYTES = 2 * 2**20
_ENDLESS = 2**48  # chunks; no run is longer
_MIN_SHARED_BYTES = 16384  # smaller arrays (labels) travel through the queue, larger ones through shared memory


@dataclasses.dataclass(frozen=True)
class BadFile:
    """An image that a worker could not use and replaced by the next one."""

    index: int
    name: str
    reason: str


@dataclasses.dataclass
class ChunkSource:
    """Chunk number -> {"image", "label", "bad", "constant"}; what Grain's workers hold.

    `bad` is a tuple of `BadFile`, `constant` of the indices of images of one colour.
    """

    dataset: DataSet
    order: ExampleOrder
    start_example: int
    offset: int  # of this process in a global batch
    local_batch: int
    chunks_per_batch: int
    flip: bool
    max_bad: int
    readers: Readers

    def __post_init__(self) -> None:
        self._bad: dict[int, BadFile] = {}
        self._lock = threading.Lock()

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key not in ("_lock", "_bad")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.__post_init__()

    def __len__(self) -> int:
        return _ENDLESS

    def __getitem__(self, number: int) -> dict[str, Any]:
        batch, part = divmod(int(number), self.chunks_per_batch)
        first = part * self.local_batch // self.chunks_per_batch
        last = (part + 1) * self.local_batch // self.chunks_per_batch
        examples = self.start_example + batch * self.order.global_batch + self.offset + np.arange(first, last)
        size = self.dataset.image_size
        images = np.empty((last - first, size, size, 3), np.uint8)
        labels = np.empty(last - first, np.int32)
        indices = self.order.images(examples)
        with self.readers.reading(int(indices[0])):
            bad = self._read(indices, images, labels)
        constant = tuple(int(index) for index, image in zip(indices, images, strict=True) if is_constant(image))
        if self.flip:
            flips = self.order.flips(examples)
            _mirror(images, flips)
        return {"image": images, "label": labels, "bad": bad, "constant": constant}

    def _read(self, indices: np.ndarray, images: np.ndarray, labels: np.ndarray) -> tuple[BadFile, ...]:
        """Reads the images; one that cannot be decoded is replaced by the next in the data set's order that can."""
        rows, found = np.arange(len(indices)), []
        failures = self.dataset.source.read(indices, images, labels)
        while failures:
            for k, reason in failures:
                found.append(self._remember(int(indices[k]), reason))
            rows = rows[[k for k, _ in failures]]
            indices = (indices[[k for k, _ in failures]] + 1) % len(self.dataset)
            retry_images, retry_labels = images[rows], labels[rows]
            failures = self.dataset.source.read(indices, retry_images, retry_labels)
            images[rows], labels[rows] = retry_images, retry_labels
        return tuple({bad.index: bad for bad in found}.values())

    def _remember(self, index: int, reason: str) -> BadFile:
        with self._lock:
            bad = self._bad.setdefault(index, BadFile(index, self.dataset.source.name(index), reason))
            # do not search the whole of a disk that has gone away for a good image
            if len(self._bad) > self.max_bad:
                raise too_many_bad(self._bad.values(), len(self.dataset), self.max_bad)
            return bad


def names(dataset: DataSet, indices: np.ndarray, bad: Mapping[int, BadFile]) -> list[dict[str, Any]]:
    """For each of `indices` {"index", "file"}, and "replaced", the reason, where it is one of the `bad` ones: then the next
    image of the data set was used."""
    return [
        {"index": index, "file": dataset.source.name(index), **({"replaced": bad[index].reason} if index in bad else {})}
        for index in indices.tolist()
    ]


def _mirror(images: np.ndarray, which: np.ndarray) -> None:
    """images[which] = images[which, :, ::-1] in place, at 2.5 times the speed of that expression."""
    rows = images.reshape(*images.shape[:2], -1)
    width = images.shape[2]
    mirrored = (np.arange(width - 1, -1, -1)[:, None] * 3 + np.arange(3)).ravel()
    rows[which] = np.take(rows[which], mirrored, axis=2)


def too_many_bad(found: Collection[BadFile], count: int, allowed: int) -> UserError:
    """The error for more bad images than allowed; the last of `found` is named."""
    *_, last = found
    unread = sum(bad.reason.startswith(CANNOT_READ) for bad in found)
    kinds = {"read": unread, "decoded": len(found) - unread}
    what = " and ".join(f"{n} of {count} images cannot be {kind}" for kind, n in kinds.items() if n)
    remedy = "check the disk and its permissions" if unread == len(found) else "repair the data set"
    return UserError(
        f"{what}, more than the {allowed} that --config.data.max_bad_fraction allows (last: {last.name}: {last.reason}); "
        f"{remedy} or raise it"
    )


class HostIterator(Iterator[dict[str, np.ndarray]]):
    """Endless host batches {"image": (local_batch, H, W, 3) uint8, "label": (local_batch,) int32}.

    bad_files: the images replaced so far, by index in the data set. Each is logged once. constant_images: those that came
    out as one colour, by index; their number is logged when it reaches 1, 10, 100, ...
    """

    def __init__(self, chunks: Iterator[dict[str, Any]], source: ChunkSource, num_workers: int):
        self._chunks = chunks
        self._source = source
        self._workers, self._taken = num_workers, 0  # chunks
        self.bad_files: dict[int, BadFile] = {}
        self.constant_images: set[int] = set()

    def __next__(self) -> dict[str, np.ndarray]:
        source = self._source
        size = source.dataset.image_size
        images = np.empty((source.local_batch, size, size, 3), np.uint8)
        labels = np.empty(source.local_batch, np.int32)
        filled = 0
        for _ in range(source.chunks_per_batch):
            chunk = self._next_chunk()
            after = filled + len(chunk["label"])
            images[filled:after], labels[filled:after] = chunk["image"], chunk["label"]
            filled = after
            for bad in chunk["bad"]:
                self._count(bad)
            for index in chunk["constant"]:
                self._count_constant(index)
        return {"image": images, "label": labels}

    def _next_chunk(self) -> dict[str, Any]:
        try:
            chunk = next(self._chunks)
            self._taken += 1
            return chunk
        except RuntimeError as error:
            if "Worker process was terminated" in str(error):
                raise UserError(
                    "a data worker was killed, mostly because memory ran out (/dev/shm included): lower "
                    f"--config.data.num_workers or give the machine more; {error}"
                ) from error
            raise
        except (MemoryError, OSError) as error:  # of a worker, in which Grain raised it
            if isinstance(error, OSError) and error.errno != errno.ENOMEM:
                raise
            raise UserError(
                "memory ran out while images were read (/dev/shm included): lower --config.data.num_workers or give the "
                f"machine more; {type(error).__name__}: {error}"
            ) from error

    def _count(self, bad: BadFile) -> None:
        if bad.index in self.bad_files:
            return
        self.bad_files[bad.index] = bad
        _log.warning("%s cannot be used, using the next image instead: %s", bad.name, bad.reason)
        if len(self.bad_files) > self._source.max_bad:
            raise too_many_bad(self.bad_files.values(), len(self._source.dataset), self._source.max_bad)

    def _count_constant(self, index: int) -> None:
        if index in self.constant_images:
            return
        self.constant_images.add(index)
        count = len(self.constant_images)
        if count == 10 ** (len(str(count)) - 1):
            _log.warning(
                "%d image%s so far came out constant, all of one colour (last: %s); 16-bit and float pictures are clipped "
                "as the official loader does, see --config.data.high_depth",
                count,
                "" if count == 1 else "s",
                self._source.dataset.source.name(index),
            )

    def describe(self) -> str:
        """Whom the next batch waits for and what that one is reading; for messages. From any thread."""
        # Grain's workers take turns: chunk n is worker n mod W's.
        worker = self._taken % self._workers if self._workers else 0
        return self._source.readers.describe(worker, self._source.dataset.source.name)

    def close(self) -> None:
        """Stops the workers. Safe to call twice."""
        self.wake()
        self._chunks.close()
        self._source.readers.close()

    def wake(self) -> None:
        """Let workers that were stopped go on, from any thread: they would outlive this process."""
        for process in self._source.readers.processes():
            with contextlib.suppress(OSError):  # it is gone
                os.kill(process, signal.SIGCONT)


def make_iterator(
    dataset: DataSet,
    *,
    seed: int,
    global_batch: int,
    start_example: int = 0,
    process_index: int = 0,
    process_count: int = 1,
    num_workers: int = 0,
    flip: bool = True,
    max_bad_fraction: float = 0.01,
    read_threads: int | None = None,
    worker_buffer: int = 2,
) -> HostIterator:
    """Starts the input pipeline of one process.

    Example i of the run is a function of (seed, i, dataset, global_batch) alone. Process p of P gets rows [p*n,
    (p+1)*n) of every global batch, n = global_batch / P. To resume after s steps of global batch b, start anew with
    start_example = s * b.

    Args:
      start_example: global index of the first example. num_workers: Grain worker processes, which live as long as the
        iterator; 0 reads in threads of this process. flip: mirror each example with probability 1/2. max_bad_fraction:
        share of the data set that may be undecodable; such an image is replaced by the next good one. read_threads:
        threads that read and decode, per worker. worker_buffer: chunks (at most 2 MiB or one image each) that each
        worker may be ahead.

    Raises:
      UserError: the data set is smaller than a global batch, or the batch cannot be split over the processes; while
        iterating, too many bad images or a worker that was killed.
    """
    if global_batch < 1 or global_batch % process_count:
        raise UserError(
            f"a global batch of {global_batch} cannot be split over {process_count} processes; change --config.batch_size"
        )
    if len(dataset) < global_batch:
        raise UserError(
            f"--config.data.path={dataset.path} holds {len(dataset)} images, fewer than one global batch of "
            f"{global_batch}; lower --config.batch_size or --config.optim.accumulation_steps"
        )
    if num_workers < 0:
        raise UserError(f"--config.data.num_workers={num_workers} must be 0 (threads only) or more")
    if read_threads is None:
        read_threads = 2 if num_workers else min(8, 2 * available_cpus())
    local_batch = global_batch // process_count
    image_bytes = dataset.image_size**2 * 3
    source = ChunkSource(
        dataset=dataset,
        order=ExampleOrder(seed, len(dataset), global_batch),
        start_example=start_example,
        offset=process_index * local_batch,
        local_batch=local_batch,
        chunks_per_batch=-(-local_batch // max(1, CHUNK_BYTES // image_bytes)),
        flip=flip,
        max_bad=int(max_bad_fraction * len(dataset) + 1e-9),
        readers=Readers(num_workers, read_threads),
    )
    return HostIterator(_start_grain(source, num_workers, read_threads, worker_buffer), source, num_workers)


def _start_grain(source: ChunkSource, num_workers: int, read_threads: int, worker_buffer: int) -> Any:
    import grain  # imports jax, two seconds: not for those who only prepare or list

    options = grain.ReadOptions(num_threads=read_threads, prefetch_buffer_size=max(2, read_threads))
    chunks = grain.MapDataset.source(source).to_iter_dataset(options)
    if num_workers:
        _let_grain_read_its_flags()
        shared = grain.experimental.DatasetOptions(min_shm_size=_MIN_SHARED_BYTES)
        chunks = grain.experimental.WithOptionsIterDataset(chunks, shared)
        workers = grain.MultiprocessingOptions(num_workers=num_workers, per_worker_buffer_size=worker_buffer)
        chunks = chunks.mp_prefetch(workers, worker_init_fn=_init_worker)
    return iter(chunks)


def _let_grain_read_its_flags() -> None:
    """Grain reads absl flags of its own when it starts workers. In a notebook or a test nobody has parsed any: they count
    as given with their defaults, and the flags of other programs stay unparsed.
    """
    from absl import flags

    if not flags.FLAGS.is_parsed():
        for name in flags.FLAGS:
            if name.startswith("grain_"):
                flags.FLAGS[name].present = 1


def _init_worker(worker_index: int, worker_count: int) -> None:
    """Runs first in each worker: Grain imports jax, but it must never start a backend there nor see a GPU."""
    del worker_count
    readers.WORKER = worker_index
    obey_parent()
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    os.environ["JAX_PLATFORMS"] = "cpu"
    import jax

    jax.config.update("jax_platforms", "cpu")
