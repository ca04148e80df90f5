"""The exact place: which example stands where depends on the seed and the data alone. On real photographs."""

from __future__ import annotations

import dataclasses
import errno
import logging
import multiprocessing
import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import input_matrix
import numpy as np
import pytest
from conftest import ROOT
from data_files import caltech_folder, official_pixels
from input_matrix import BATCH, BATCHES, EVERY, PROCESSES, SEED, SIZE, STARTS, Reference

from jitjax.data import HostIterator, check_fingerprint, make_iterator, open_dataset, to_device
from jitjax.data.dataset import DataSet
from jitjax.errors import UserError
from jitjax.prepare import prepare

WITHIN_A_BATCH = 77  # where a run whose batch size changed may go on


@pytest.fixture(scope="module")
def photographs(tmp_path_factory):
    return tmp_path_factory.mktemp("caltech")


@pytest.fixture(scope="module")
def datasets(photographs):
    return input_matrix.make_datasets(photographs)


@pytest.fixture(scope="module")
def folder(photographs, datasets):
    return photographs / "folder" / "train"


@pytest.fixture(scope="module")
def reference(folder):
    return Reference(folder)


def take(dataset: DataSet, batches: int, **options) -> tuple[np.ndarray, np.ndarray]:
    """The first batches of an iterator, joined along the rows."""
    iterator = make_iterator(dataset, seed=SEED, global_batch=BATCH, **options)
    try:
        taken = [next(iterator) for _ in range(batches)]
    finally:
        iterator.close()
    return np.concatenate([batch["image"] for batch in taken]), np.concatenate([batch["label"] for batch in taken])


@pytest.mark.parametrize("processes", PROCESSES)
@pytest.mark.parametrize("start", [*STARTS.values(), WITHIN_A_BATCH])
@pytest.mark.parametrize("kind", ["folder", "prepared"])
def test_batches_are_the_examples_of_their_place(datasets, reference, kind, start, processes):
    """On 1 and 8 devices; every image once an epoch; each process reads its share and nothing else. In threads."""
    dataset = datasets[kind]
    assert dataset.kind == kind and len(dataset) == reference.count == 208
    outcome = input_matrix.check(dataset, reference, start, 0, processes)
    assert outcome.ok(), outcome
    assert outcome.compared == {1: BATCHES * BATCH, 8: BATCHES * BATCH} and outcome.shown >= 192


@pytest.mark.parametrize(
    ("kind", "workers", "process", "processes", "start"),
    [
        pytest.param("folder", 2, 0, 1, STARTS["beginning"], marks=pytest.mark.slow),
        ("folder", 2, 3, 4, STARTS["mid-epoch"]),
        pytest.param("prepared", 2, 1, 4, STARTS["epoch boundary"], marks=pytest.mark.slow),
        ("prepared", 3, 0, 1, WITHIN_A_BATCH),
        pytest.param("folder", 5, 2, 4, STARTS["second epoch"], marks=pytest.mark.slow),
    ],
)
def test_worker_processes_change_nothing(datasets, reference, kind, workers, process, processes, start):
    """A sample; `python tests/input_matrix.py` has every combination (under twenty minutes)."""
    outcome = input_matrix.check(datasets[kind], reference, start, workers, processes, only=process)
    assert outcome.ok(), outcome


def test_a_cluster_of_processes_shares_each_batch(photographs, datasets):
    """Four real processes, each with its rows on one and on two devices, from every start."""
    outcomes = input_matrix.run_group(photographs, workers=0)
    assert len(outcomes) == 4 * len(datasets) * len(STARTS)
    assert not {run: outcome for run, outcome in outcomes.items() if not outcome.ok()}
    assert all(outcome.compared.keys() == {4, 8} for outcome in outcomes.values())


def test_large_batches_travel_in_pieces_of_bounded_size(datasets, reference, monkeypatch):
    """A batch larger than a chunk is put together from several, uneven ones included."""
    from jitjax.data import pipeline

    monkeypatch.setattr(pipeline, "CHUNK_BYTES", 7 * SIZE * SIZE * 3)
    images, labels = take(datasets["prepared"], 4)
    assert np.array_equal(images, reference.rows(0, 4 * BATCH)[0])
    assert np.array_equal(labels, reference.rows(0, 4 * BATCH)[1])


@pytest.mark.parametrize("devices", [1, 8])
def test_global_arrays_hold_the_rows_in_device_order(datasets, reference, devices):
    import jax
    from jax.sharding import NamedSharding

    from jitjax.sharding import BATCH as SPEC
    from jitjax.sharding import make_mesh

    sharding = NamedSharding(make_mesh(None, 1, 1, jax.devices()[:devices]), SPEC)
    batches = to_device(make_iterator(datasets["folder"], seed=SEED, global_batch=BATCH), sharding)
    try:
        taken = [next(batches) for _ in range(4)]
        assert batches.wait_seconds > 0
    finally:
        batches.close()
        batches.close()
    want_images, want_labels = reference.rows(0, 4 * BATCH)
    for k, batch in enumerate(taken):
        assert batch["image"].sharding == sharding and len(batch["image"].addressable_shards) == devices
        for number, shard in enumerate(batch["image"].addressable_shards):
            first = k * BATCH + number * BATCH // devices
            assert np.array_equal(np.asarray(shard.data), want_images[first : first + BATCH // devices])
        assert np.array_equal(np.asarray(batch["label"]), want_labels[k * BATCH : (k + 1) * BATCH])
    assert not [thread for thread in threading.enumerate() if thread.name == "to_device"]
    with pytest.raises(ValueError, match="closed"):
        next(batches)


@dataclasses.dataclass(frozen=True)
class Witness:
    """A source whose labels tell what a worker process knows of devices."""

    def read(self, indices, images, labels):
        import os

        from jax._src import xla_bridge

        images[:] = 0
        labels[:] = len(xla_bridge._backends)
        labels[0] = os.getpid() % 2**31
        labels[1] = os.environ["CUDA_VISIBLE_DEVICES"] == "" and os.environ["JAX_PLATFORMS"] == "cpu"
        return []

    def name(self, index):
        return str(index)


def test_workers_live_through_epochs_and_never_start_jax():
    dataset = DataSet("", "folder", 8, ("a",), {"count": 8, "classes": 1, "checksum": ""}, Witness())
    before = set(multiprocessing.active_children())
    iterator = make_iterator(dataset, seed=0, global_batch=8, num_workers=2)
    try:
        labels = np.stack([next(iterator)["label"] for _ in range(40)])  # 40 epochs
        assert len(set(labels[:, 0].tolist())) == 2
        assert labels[:, 1].all()
        assert not labels[:, 2:].any()
    finally:
        iterator.close()
    assert set(multiprocessing.active_children()) <= before


def test_a_killed_worker_is_one_line_and_no_hang(datasets):
    before = set(multiprocessing.active_children())
    iterator = make_iterator(datasets["prepared"], seed=0, global_batch=BATCH, num_workers=1)
    try:
        next(iterator)
        (worker,) = set(multiprocessing.active_children()) - before
        worker.kill()
        with pytest.raises(UserError, match="--config.data.num_workers"):
            for _ in range(50):
                next(iterator)
    finally:
        iterator.close()


def test_workers_end_with_a_parent_that_is_killed(folder, tmp_path):
    script = tmp_path / "run.py"
    script.write_text(
        "import multiprocessing, time\n"
        "from jitjax.data import make_iterator, open_dataset\n"
        "if __name__ == '__main__':\n"
        f"    batches = make_iterator(open_dataset({str(folder)!r}, 32), seed=0, global_batch=8, num_workers=1)\n"
        "    next(batches)\n"
        "    print(multiprocessing.active_children()[0].pid, flush=True)\n"
        "    time.sleep(60)\n"
    )
    command, environment = [sys.executable, str(script)], {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as parent:
        worker = int(parent.stdout.readline())
        parent.kill()
    deadline = time.monotonic() + 20
    while Path(f"/proc/{worker}").exists() and time.monotonic() < deadline:
        state = Path(f"/proc/{worker}/stat").read_text().split()[2]
        if state == "Z":  # ended; nobody collects it in a container without an init process
            break
        time.sleep(0.05)
    else:
        assert not Path(f"/proc/{worker}").exists()


def test_a_batch_that_does_not_fit_is_refused(datasets):
    with pytest.raises(UserError, match=r"fewer than one global batch of 512.*--config.batch_size"):
        make_iterator(datasets["folder"], seed=0, global_batch=512)
    with pytest.raises(UserError, match="3 processes"):
        make_iterator(datasets["folder"], seed=0, global_batch=32, process_count=3)
    with pytest.raises(UserError, match="num_workers=-1"):
        make_iterator(datasets["folder"], seed=0, global_batch=32, num_workers=-1)


def test_a_data_set_that_changed_is_refused_unless_allowed(datasets, folder, tmp_path):
    saved = datasets["folder"].fingerprint
    check_fingerprint(saved, open_dataset(folder, SIZE))
    changed = caltech_folder(tmp_path / "again", every=EVERY)
    check_fingerprint(saved, open_dataset(changed, SIZE))  # elsewhere, but the same
    victim = sorted(changed.glob("*/*.jpg"))[3]
    victim.write_bytes(victim.read_bytes() + b"\0")
    with pytest.raises(UserError, match=r"checksum.*--config.data.allow_changed"):
        check_fingerprint(saved, open_dataset(changed, SIZE))
    assert check_fingerprint(saved, open_dataset(folder, SIZE), allow_changed=True) == []
    (line,) = check_fingerprint(saved, open_dataset(changed, SIZE), allow_changed=True)
    assert line.startswith("accepted: the data set changed since the checkpoint (checksum ")
    victim.unlink()
    with pytest.raises(UserError, match=f"count {len(datasets['folder'])} -> {len(datasets['folder']) - 1}"):
        check_fingerprint(saved, open_dataset(changed, SIZE))


def test_an_allowed_change_that_gives_labels_to_other_classes_is_reported(datasets, tmp_path):
    before = datasets["folder"]
    changed = caltech_folder(tmp_path / "again", every=EVERY)
    first, last = before.class_names[0], before.class_names[-1]
    (changed / first).rename(changed / f"{last}_too")  # now the last class: each label is the next class's
    lines = check_fingerprint(
        before.fingerprint, open_dataset(changed, SIZE), allow_changed=True, class_names=before.class_names
    )
    assert len(lines) == 2 and f"(first: 0 was {first}, is {before.class_names[1]})" in lines[1]


def test_folders_are_read_as_imagefolder_reads_them(folder, tmp_path, caplog):
    source = sorted(folder.glob("*/*.jpg"))
    root = tmp_path / "root"
    for k, place in enumerate(["b/x.JPG", "b/deep/er/y.jpeg", "b/a.jpg", "B/z.jpg", "a b/1.jpg", "b/notes.txt", "b/._x.jpg"]):
        (root / "train" / place).parent.mkdir(parents=True, exist_ok=True)
        (root / "train" / place).write_bytes(source[k].read_bytes())
    (root / "val" / "b").mkdir(parents=True)
    (root / "train" / ".cache").mkdir()
    prepare(str(root), str(root / "train32"), 32, workers=1)  # beside train/, where one would put it
    dataset = open_dataset(root, SIZE)  # the parent of train/
    assert dataset.class_names == ("B", "a b", "b")
    names = [dataset.source.name(k).removeprefix(f"{root}/train/") for k in range(len(dataset))]
    assert names == ["B/z.jpg", "a b/1.jpg", "b/a.jpg", "b/x.JPG", "b/deep/er/y.jpeg"]
    assert [int(dataset[k]["label"]) for k in range(5)] == [0, 1, 2, 2, 2]
    assert np.array_equal(dataset[3]["image"], official_pixels(root / "train/b/x.JPG", SIZE))
    (root / "train" / "stray.jpg").write_bytes(source[0].read_bytes())
    with caplog.at_level(logging.WARNING):
        assert len(open_dataset(root / "train", SIZE)) == 5
    assert "1 images beside" in caplog.text
    (root / "train" / "b" / "loop").symlink_to(root / "train" / "b")
    assert len(open_dataset(root / "train", SIZE)) == 5

    flat = tmp_path / "flat"
    flat.mkdir()
    for k in range(3):
        (flat / f"{k}.jpg").write_bytes(source[k].read_bytes())
    dataset = open_dataset(flat, SIZE)
    assert (len(dataset), dataset.labelled, dataset.num_classes, int(dataset[2]["label"])) == (3, False, 0, 0)


def test_what_is_not_a_data_set_is_refused_by_name(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "hollow" / "class").mkdir(parents=True)
    (tmp_path / "file.zip").write_bytes(b"PK")
    for path, match in {
        "": "is not set",
        str(tmp_path / "missing"): "does not exist",
        str(tmp_path / "empty"): "no image in",
        str(tmp_path / "hollow"): "no image in",
        str(tmp_path / "file.zip"): "jitjax.prepare",
    }.items():
        with pytest.raises(UserError, match=rf"(?s)--config\.data\.path.*{match}|{match}.*--config\.data\.path") as caught:
            open_dataset(path, SIZE)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "error, says",
    [
        (OSError(errno.ENOMEM, "Cannot allocate memory"), r"memory ran out .*num_workers.*Cannot allocate memory"),
        (MemoryError(), r"memory ran out .*MemoryError"),
        (RuntimeError("Worker process was terminated unexpectedly with exit code -9"), "a data worker was killed"),
    ],
)
def test_a_worker_without_memory_is_one_line_however_it_shows(error, says):
    def chunks():
        raise error
        yield

    source = SimpleNamespace(dataset=SimpleNamespace(image_size=8), local_batch=4, chunks_per_batch=1)
    with pytest.raises(UserError, match=says):
        next(HostIterator(chunks(), source, num_workers=1))
