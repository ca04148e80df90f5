"""Several processes: found or named at the start; none left waiting for one that died, hangs or failed. Real processes."""

import signal
import socket
import subprocess
import sys
import threading
import time

import pytest
from conftest import ROOT

from jitjax import cli, distributed, runtime
from jitjax.distributed import Cluster, Peers, detect
from jitjax.errors import UserError

# ---------------------------------------------------------------- who am I

NAMED = {"JAX_COORDINATOR_ADDRESS": "node1:1234", "JAX_NUM_PROCESSES": "4", "JAX_PROCESS_ID": "2"}
SLURM = {
    "SLURM_JOB_ID": "5000",
    "SLURM_STEP_ID": "0",
    "SLURM_STEP_NUM_TASKS": "16",
    "SLURM_STEP_NUM_NODES": "2",
    "SLURM_STEP_NODELIST": "gpu[07,09-10]",
    "SLURM_STEP_TASKS_PER_NODE": "8(x2)",
    "SLURM_PROCID": "9",
    "SLURM_LOCALID": "1",
}
OMPI = {
    "OMPI_COMM_WORLD_SIZE": "2",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
    "OMPI_COMM_WORLD_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
}


def test_what_launchers_say():
    assert detect({}) is None
    assert detect({"SLURM_JOB_ID": "5000", "SLURM_NTASKS": "8", "SLURM_STEP_NUM_TASKS": "1"}) is None  # plain python in a job
    assert detect(NAMED) == Cluster("JAX_* variables", "node1:1234", 4, 2)
    assert detect(SLURM) == Cluster("Slurm", f"gpu07:{61440 + 5000 % 4096}", 16, 9, (1,))
    assert detect(SLURM | {"CUDA_VISIBLE_DEVICES": "3"}).devices is None  # bound to one card already
    assert detect(SLURM | {"SLURM_STEP_TASKS_PER_NODE": "1(x16)"}).devices is None  # one process a host drives all its cards
    assert detect(SLURM | {"SLURM_STEP_NUM_NODES": "1"}).address.startswith("127.0.0.1:")  # its name need not resolve
    assert detect(OMPI).rank == 1 and detect(OMPI).devices == (1,)
    jobset = {"JAX_COORDINATOR_ADDRESS": "run-workers-0-0.run:1234", "JAX_NUM_PROCESSES": "4", "JOB_COMPLETION_INDEX": "3"}
    assert detect(jobset).rank == 3
    assert detect({"JOB_COMPLETION_INDEX": "3"}) is None  # an indexed job of independent runs
    assert detect({**NAMED, "JAX_NUM_PROCESSES": "1", "JAX_PROCESS_ID": "0"}) is None


@pytest.mark.parametrize("missing", NAMED)
def test_half_set_is_refused_by_name(missing):
    with pytest.raises(UserError, match=f"{missing} is not set"):
        detect({k: v for k, v in NAMED.items() if k != missing})


@pytest.mark.parametrize(
    "environ, line",
    [
        (NAMED | {"JAX_COORDINATOR_ADDRESS": "node1:99999"}, "JAX_COORDINATOR_ADDRESS=node1:99999: give"),
        (NAMED | {"JAX_COORDINATOR_ADDRESS": "node1"}, "JAX_COORDINATOR_ADDRESS=node1: give"),
        (NAMED | {"JAX_PROCESS_ID": "4"}, "ranks are 0 to the number less 1"),
        (NAMED | {"JAX_NUM_PROCESSES": "two"}, "ranks are 0 to the number less 1"),
        ({k: v for k, v in SLURM.items() if k != "SLURM_PROCID"}, "JAX_PROCESS_ID is not set"),
        ({k: v for k, v in SLURM.items() if k != "SLURM_STEP_NODELIST"}, "JAX_COORDINATOR_ADDRESS is not set"),
        (OMPI | {"OMPI_COMM_WORLD_SIZE": "4"}, "Open MPI.* JAX_COORDINATOR_ADDRESS is not set"),
    ],
)
def test_impossible_environments_are_refused(environ, line):
    with pytest.raises(UserError, match=line):
        detect(environ)


# ---------------------------------------------------------------- are all there


def free_address() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{probe.getsockname()[1]}"


def meet(*clusters: Cluster, seconds: float = 3.0):
    """What each process gets from `Peers.meet`: Peers or the text of a UserError."""
    results = [None] * len(clusters)

    def one(index):
        try:
            results[index] = Peers.meet(clusters[index], seconds=seconds, leave=lambda code, line: None)
        except UserError as error:
            results[index] = str(error)

    threads = [threading.Thread(target=one, args=(index,)) for index in range(len(clusters))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


def test_all_agree_on_the_greatest():
    at = free_address()
    peers = meet(*[Cluster("test", at, 4, rank) for rank in range(4)], seconds=20)
    answers = [[None] * 3 for _ in peers]

    def work(rank):
        for number in range(3):
            answers[rank][number] = peers[rank].agree((rank == number) * (10 + number))
        peers[rank].close()

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert answers == [[10, 11, 12]] * 4


def test_missing_processes_are_named():
    at = free_address()
    first, second = meet(Cluster("test", at, 4, 0), Cluster("test", at, 4, 2))
    assert "process 1, 3 of 4 did not come" in first and "process 1, 3 of 4 did not come" in second


def test_a_missing_first_process_or_a_wrong_port_is_named():
    at = free_address()
    (text,) = meet(Cluster("test", at, 2, 1), seconds=1.0)
    assert text.startswith(f"process 1 of 2: process 0 does not answer at {at} after 1 s")
    with socket.create_server(("", int(at.split(":")[1]))):
        (text,) = meet(Cluster("test", at, 2, 0))
        assert "cannot be used (Address already in use)" in text


def test_two_of_one_rank_and_other_counts_are_named():
    at = free_address()
    texts = meet(Cluster("test", at, 3, 0), Cluster("test", at, 3, 1), Cluster("test", at, 3, 1))
    assert "two processes were started as process 1" in texts[0]
    texts = meet(Cluster("test", at, 2, 0), Cluster("test", at, 3, 1))
    assert all("process 1 was started as one of 3 processes, process 0 as one of 2" in text for text in texts)


# ---------------------------------------------------------------- none left waiting

TRAIN = """
import os, sys, time
os.environ.update(JAX_PLATFORMS="cpu", JAX_NUM_CPU_DEVICES="1")
from jitjax import distributed, signals
rank, count, address, fault, at = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4], sys.argv[5]
distributed.SILENCE_SECONDS = 6.0
peers = distributed.Peers.meet(distributed.Cluster("test", address, count, rank), silence=6.0)
import jax
jax.distributed.initialize(address, count, rank, cluster_detection_method="deactivate")
import jax.numpy as jnp, numpy as np
mesh = jax.sharding.Mesh(np.asarray(jax.devices()), ("data",))
x = jax.make_array_from_process_local_data(jax.NamedSharding(mesh, jax.P("data")), np.ones(1, np.float32))
step = jax.jit(jnp.sum, out_shardings=jax.NamedSharding(mesh, jax.P()))
try:
    for number in range(1, 10**9 if fault != "none" else 6):
        total = float(step(x))
        peers.doing(f"step {number}")
        if number == 5:
            print("reached 5", flush=True)
            if fault == "raise" and at == str(rank):
                raise ValueError("no such picture\\nin line two")
    peers.close()
    print("complete", total, flush=True)
except ValueError as error:
    peers.failed(f"ValueError: {error}", 1)
signals.end(0)
"""


def launch(count: int, fault: str, at: int) -> list[subprocess.Popen]:
    address = free_address()
    command = [sys.executable, "-c", TRAIN]
    return [
        subprocess.Popen(
            [*command, str(rank), str(count), address, fault, str(at)],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(count)
    ]


@pytest.mark.parametrize("fault", ["die", "hang", "raise"])
@pytest.mark.parametrize(
    "count, at", [(2, 1), *[pytest.param(*case, marks=pytest.mark.slow) for case in ((2, 0), (4, 0), (4, 2))]]
)
def test_a_faulty_process_stops_all(fault, count, at):
    """Processes in a real collective; one is killed, stopped or fails: the others end within two minutes, with 3 or with what
    the faulty one ended with, and their own last line names the process and its step."""
    processes = launch(count, fault, at)
    try:
        for process in processes:
            assert "reached 5\n" in process.stdout, process.stderr.read()[-2000:]  # Gloo prints a line of its own first
        if fault == "die":
            processes[at].kill()
        elif fault == "hang":
            processes[at].send_signal(signal.SIGSTOP)
        begun = time.monotonic()
        for other in processes[:at] + processes[at + 1 :]:
            _, err = other.communicate(timeout=120)
            assert time.monotonic() - begun < 120
            assert other.returncode == (1 if fault == "raise" else distributed.signals.NOT_SAVED), err[-2000:]
            # Threads of JAX's own may log, between our line and the end, that they lost the others.
            last = [line for line in err.splitlines() if line.startswith("error: ")][-1]
            reason = {
                "die": "died",
                "hang": "has not answered for",
                "raise": "stopped: ValueError: no such picture in line two",
            }
            assert last.startswith(f"error: process {at} {reason[fault]}"), err[-2000:]
    finally:
        for process in processes:
            process.kill()
            process.communicate()


def test_a_sound_run_ends_well():
    processes = launch(2, "none", 0)
    for process in processes:
        out, err = process.communicate(timeout=240)
        assert (process.returncode, out.splitlines()[-1:]) == (0, ["complete 2.0"]), err[-2000:]


def test_the_others_end_with_the_code_of_an_error(tmp_path, monkeypatch):
    """3 for a run that was out of memory after a save: a launcher takes the greatest of all codes, and starts it again."""
    ended, failure = [], UserError("out of memory")
    failure.exit_code = 3

    def out_of_memory(*_, **__):
        raise failure

    monkeypatch.setattr("jitjax.train.train", out_of_memory)
    monkeypatch.setattr(runtime, "set_environment", lambda: None)
    monkeypatch.setattr(runtime, "start_distributed", lambda: Peers(1, 2, leave=lambda code, line: ended.append(code)))
    monkeypatch.chdir(ROOT)
    assert cli.main(["train", "--config=configs/quickstart.py", f"--workdir={tmp_path}"]) == 3 and ended == [3]
