"""The launch file on a real Slurm: controller, two nodes and munge on this host, started here and stopped afterwards.

apt-get install slurm-wlm munge        # Debian's 22.05.8 and later were tried
python -m pytest -m slow tests/faults/test_slurm.py
"""

import ast
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
from conftest import ROOT

from jitjax import checkpoint

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scancel", "scontrol", "sinfo", "squeue")
MISSING = [name for name in PROGRAMS if not shutil.which(name)]
pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(1200),
    pytest.mark.skipif(bool(MISSING), reason=f"needs Slurm and munge (slurm-wlm, munge): no {', '.join(MISSING)}"),
]
NODE = socket.gethostname().partition(".")[0]
# No accounting, no cgroups; two devices that nobody opens stand for a node's GPUs; a requeued job starts after 5 s, not 120.
# Jobs of the partition "urgent" preempt those of "all" as on many clusters: TERM, GraceTime, requeue.
CONF = """
ClusterName=jitjax
SlurmctldHost={node}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SchedulerParameters=sched_interval=2
MpiDefault=none
SlurmdParameters=config_overrides
ReturnToService=2
GresTypes=gpu
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
NodeName={node} NodeHostname={node} NodeAddr=127.0.0.1 Port={ports[1]} CPUs=8 Gres=gpu:2 RealMemory=1000
NodeName={node}-second NodeHostname={node} NodeAddr=127.0.0.1 Port={ports[2]} CPUs=8 Gres=gpu:2 RealMemory=1000
PartitionName=all Nodes=ALL Default=YES State=UP PriorityTier=1 GraceTime=90
PartitionName=urgent Nodes=ALL State=UP PriorityTier=2 PreemptMode=OFF
"""


class Slurm:
    """Commands to the cluster. Jobs run two CPU processes with one device each on a tiny model."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.environ = {**os.environ, "SLURM_CONF": str(folder / "slurm.conf"), "PYTHONPATH": str(ROOT)}
        self.environ |= {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "JAX_NUM_CPU_DEVICES": "1"}

    def __call__(self, *command: str, **environ: str) -> str:
        environ = {**self.environ, **environ}
        return subprocess.run(command, cwd=ROOT, env=environ, check=True, stdout=subprocess.PIPE, text=True).stdout

    def submit(self, workdir: Path, config: Path, *options: str, **environ: str) -> str:
        """Job number of docs/launch/slurm.sbatch on this cluster; its output is in <workdir>.log."""
        options = ["--parsable", "--ntasks-per-node=1", "--gpus-per-node=1", "--cpus-per-task=2", *options]
        options += [f"--output={workdir}.log", "docs/launch/slurm.sbatch"]
        return self("sbatch", *options, WORKDIR=str(workdir), CONFIG=str(config), **environ).strip()

    def field(self, job: str, name: str) -> str:
        return self("scontrol", "show", "job", job).split(f" {name}=")[1].split()[0]

    def task(self, job: str, rank: int) -> psutil.Process:
        """The training process of rank `rank`."""

        def is_task(process: psutil.Process) -> bool:
            try:
                environ = process.environ()
            except psutil.Error:
                return False
            mine = environ.get("SLURM_CONF") == self.environ["SLURM_CONF"] and environ.get("SLURM_JOB_ID") == job
            return mine and environ.get("SLURM_PROCID") == str(rank) and "python" in process.name()

        (found,) = [process for process in psutil.process_iter() if is_task(process)]
        return found


def wait_until(condition, seconds: float = 300.0):
    """The first true value of `condition()`."""
    deadline = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < deadline, f"not within {seconds:.0f} s"
        time.sleep(0.2)
    return value


@pytest.fixture(scope="module")
def slurm():
    folder = Path(tempfile.mkdtemp(prefix="slurm-"))  # a short name: a socket's has at most 107 characters
    probes = [socket.create_server(("127.0.0.1", 0)) for _ in range(3)]
    ports = [probe.getsockname()[1] for probe in probes]
    for probe in probes:
        probe.close()
    (folder / "state").mkdir()
    (folder / "key").touch(0o600)
    (folder / "key").write_bytes(os.urandom(128))
    user = psutil.Process().username()
    (folder / "slurm.conf").write_text(CONF.format(node=NODE, user=user, folder=folder, ports=ports))
    (folder / "gres.conf").write_text("Name=gpu File=/dev/zero,/dev/full\n")
    names = {name: f"{folder}/munge.{name}" for name in ("socket", "pid", "seed", "log")}
    munge = [f"--key-file={folder}/key", f"--socket={names['socket']}", f"--pid-file={names['pid']}"]
    munge += [f"--seed-file={names['seed']}", f"--log-file={names['log']}"]
    conf = str(folder / "slurm.conf")
    commands = [
        ["munged", "--foreground", "--force", *munge],
        ["slurmctld", "-D", "-f", conf],
        ["slurmd", "-D", "-f", conf, "-N", NODE],
        ["slurmd", "-D", "-f", conf, "-N", f"{NODE}-second"],
    ]
    cluster, daemons = Slurm(folder), []
    try:
        for command in commands:
            with open(folder / f"{command[0]}.out", "a") as out:
                daemons.append(subprocess.Popen(command, env=cluster.environ, stdout=out, stderr=out))
            wait_until(lambda: Path(names["socket"]).exists(), 30)
        wait_until(lambda: subprocess.run(["sinfo"], env=cluster.environ, capture_output=True).returncode == 0, 60)
        wait_until(lambda: cluster("sinfo", "-h", "-p", "all", "-o", "%D %T").strip() == "2 idle", 60)
        yield cluster
        cluster("scancel", "--user", user)
        wait_until(lambda: not cluster("squeue", "-h").strip(), 60)
    finally:
        for daemon in reversed(daemons):
            daemon.terminate()
        for daemon in reversed(daemons):
            try:
                daemon.wait(20)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()
        shutil.rmtree(folder, ignore_errors=True)


CONFIG = """
import os, sys
sys.path.insert(0, {tests!r})
from conftest import small_config
def get_config():
    config = small_config(**{overrides!r})
    if os.environ.get("SLURM_PROCID") == os.environ.get("MISTAKEN", "nobody"):
        config.mesh.data = 3  # found out after the processes have met
    return config
"""
RUN = dict(total_steps=600, checkpoint__every_steps=50, log__every_steps=10)


def write_config(file: Path, **overrides) -> Path:
    file.write_text(CONFIG.format(tests=str(ROOT / "tests"), overrides={**RUN, **overrides}))
    return file


def history(workdir: Path) -> list[tuple[int, float]]:
    return [(m["step"], m["train/loss"]) for m in map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())]


def steps_done(workdir: Path) -> int:
    try:
        return history(workdir)[-1][0]
    except (OSError, IndexError, ValueError):  # not yet, or a line that is being written
        return 0


def test_every_process_of_a_step_learns_who_it_is(slurm):
    """Two nodes with two processes each; one node; one process."""
    script = (
        "import os; from jitjax.distributed import detect; c = detect(os.environ);"
        "print(c and (c.address, c.count, c.rank, c.devices))"
    )

    def said(*options: str) -> list:
        return sorted(map(ast.literal_eval, slurm("srun", *options, sys.executable, "-c", script).splitlines()))

    four = said("--nodes=2", "--ntasks-per-node=2", "--gpus-per-node=2")
    assert [(count, rank, devices) for _, count, rank, devices in four] == [
        (4, 0, (0,)),
        (4, 1, (1,)),
        (4, 2, (0,)),
        (4, 3, (1,)),
    ]
    assert len({address for address, *_ in four}) == 1 and four[0][0].startswith(f"{NODE}:")
    two = said("--nodes=1", "--ntasks=2", "--nodelist", f"{NODE}-second")  # a name that nobody resolves
    assert [address.partition(":")[0] for address, *_ in two] == ["127.0.0.1"] * 2
    assert said("--nodes=1", "--ntasks=1", "--gpus-per-node=2") == [None]


def test_preempted_requeued_and_finished(slurm, tmp_path):
    """Submitted; USR1 as before the time limit; preempted by a job of a higher partition; each time saved, requeued and gone on
    with, the last time on one node instead of two; complete, with the losses of a run that nobody disturbed."""
    config, workdir = write_config(tmp_path / "config.py"), tmp_path / "run"
    job = slurm.submit(workdir, config, "--nodes=2")
    wait_until(lambda: steps_done(workdir) >= 60)
    slurm("scancel", "--signal=USR1", job)
    wait_until(lambda: slurm.field(job, "Restarts") == "1", 90)
    at = steps_done(workdir)
    wait_until(lambda: steps_done(workdir) >= at + 60)
    slurm("sbatch", "--partition=urgent", "--nodes=2", "--exclusive", "--output=/dev/null", "--wrap=sleep 5")
    wait_until(lambda: slurm.field(job, "Restarts") == "2", 90)
    slurm("scontrol", "update", f"JobId={job}", "NumNodes=1", "NumTasks=2", "TasksPerNode=2")
    wait_until(lambda: slurm.field(job, "JobState") == "COMPLETED")
    log = Path(f"{workdir}.log").read_text()
    assert "exit code 138: saved, requeued" in log and "exit code 143: saved, requeued" in log and log.endswith("complete\n")
    assert log.count("resumed from step") == 2 and checkpoint.find(workdir)[1] == RUN["total_steps"]
    alone = [sys.executable, "-m", "jitjax.main", f"--config={config}", f"--workdir={tmp_path / 'alone'}"]
    subprocess.run(alone, cwd=ROOT, env={**slurm.environ, "JAX_NUM_CPU_DEVICES": "2"}, check=True, capture_output=True)
    steps, losses = zip(*history(workdir), strict=True)
    assert steps == tuple(range(1, RUN["total_steps"] + 1))
    np.testing.assert_allclose(losses, [loss for _, loss in history(tmp_path / "alone")], rtol=1e-3)


def test_a_killed_or_hung_process_is_replaced(slurm, tmp_path):
    """One process is killed, in the next start one is stopped: the other names it and ends, Slurm kills what hangs, and the job
    is requeued and goes on from the last checkpoint. Killed again before it could save, it is not requeued for ever."""
    config, workdir = write_config(tmp_path / "config.py", total_steps=10**6, checkpoint__every_steps=20), tmp_path / "run"
    job = slurm.submit(workdir, config, "--nodes=2")
    for restarts, (number, reason) in enumerate([(signal.SIGKILL, "died"), (signal.SIGSTOP, "has not answered for")]):
        at = steps_done(workdir)
        wait_until(lambda at=at: steps_done(workdir) >= at + 60)
        slurm.task(job, 1).send_signal(number)
        wait_until(lambda n=restarts: slurm.field(job, "Restarts") == str(n + 1), 240)
        assert f"error: process 1 {reason}" in Path(f"{workdir}.log").read_text()
    wait_until(lambda: slurm.field(job, "JobState") == "RUNNING")
    wait_until(lambda: Path(f"{workdir}.log").read_text().count("resumed from step") == 2)
    slurm.task(job, 0).kill()
    wait_until(lambda: slurm.field(job, "JobState") == "FAILED", 90)
    assert "nothing saved since the start: not requeued" in Path(f"{workdir}.log").read_text()


def test_mistakes_and_cancelled_jobs_are_not_requeued(slurm, tmp_path):
    """A mistake that only one process meets ends both with 2; a job that its user cancels saves and stays cancelled."""
    config, workdir = write_config(tmp_path / "config.py", total_steps=10**6), tmp_path / "run"
    job = slurm.submit(workdir, config, "--nodes=2")
    wait_until(lambda: steps_done(workdir) >= 20)
    slurm("scancel", job)
    wait_until(lambda: slurm.field(job, "JobState") == "CANCELLED" and not slurm("squeue", "-h").strip(), 90)
    assert "stopped by SIGTERM at step" in Path(f"{workdir}.log").read_text()
    assert checkpoint.find(workdir)[1] == steps_done(workdir)
    job = slurm.submit(tmp_path / "other", config, "--nodes=2", MISTAKEN="1")
    wait_until(lambda: slurm.field(job, "JobState") == "FAILED")
    log = Path(f"{tmp_path / 'other'}.log").read_text()
    assert "error: process 1 stopped: --config.mesh.data=3" in log and "exit code 2: not requeued" in log
