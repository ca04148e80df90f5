"""Several processes as one run: who they are, that all are there at the start, and that none is left waiting for a dead one.

The launcher says who a process is (`detect`): nothing is guessed. Before JAX starts, every process connects to process 0, which
waits until all have come or names those that have not. The connections stay open for the whole run: a process that dies, fails
or falls silent is noticed by process 0, which tells the others, so all end with the same line; in JAX alone they would wait for
minutes and abort with a native stack dump. Imports JAX only to start it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import re
import socket
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

from jitjax import signals
from jitjax.errors import UserError

START_SECONDS = 45.0  # to find each other
SILENCE_SECONDS = 30.0  # without a word from a process after which it is given up
_BEAT_SECONDS = 2.0
_JAX_START_SECONDS = 60
_REASON_SECONDS = 3.0
_LAST_WORD_SECONDS = 0.2  # so that the others read it before this process's end tells them something else


@dataclasses.dataclass(frozen=True)
class Cluster:
    """This process among those of the run."""

    source: str  # who said so
    address: str  # host:port of process 0
    count: int
    rank: int
    devices: tuple[int, ...] | None = None  # local devices of this process; None: all it can see


def detect(environ: Mapping[str, str]) -> Cluster | None:
    """What the launcher says; None for a single process.

    JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID name everything; what they leave open is taken from Slurm's
    step, from Open MPI, or, for the rank, from a Kubernetes indexed job.

    Raises:
      UserError: the environment says some of it and not the rest, or says it in numbers that cannot be.
    """
    named = {name: environ.get(name, "") for name in ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")}
    source, address, count, rank, local = _launcher(environ)
    if not any(named.values()) and not source:
        return None
    address = named["JAX_COORDINATOR_ADDRESS"] or address
    count = named["JAX_NUM_PROCESSES"] or count
    rank = named["JAX_PROCESS_ID"] or rank or environ.get("JOB_COMPLETION_INDEX", "")
    source = source or "JAX_* variables"
    for value, name in ((address, "JAX_COORDINATOR_ADDRESS"), (count, "JAX_NUM_PROCESSES"), (rank, "JAX_PROCESS_ID")):
        if not value:
            given = ", ".join(f"{k}={v}" for k, v in named.items() if v)
            raise UserError(
                f"several processes ({source}{': ' + given if given else ''}) but {name} is not set: set it in each"
            )
    if not re.fullmatch(r".+:\d{1,5}", address) or not 0 < int(address.rsplit(":", 1)[1]) < 2**16:
        raise UserError(f"JAX_COORDINATOR_ADDRESS={address}: give process 0's host and a free port of it, e.g. node1:12345")
    if not count.isdecimal() or not rank.isdecimal() or not int(rank) < int(count):
        raise UserError(f"JAX_NUM_PROCESSES={count}, JAX_PROCESS_ID={rank} ({source}): ranks are 0 to the number less 1")
    if int(count) == 1:
        return None
    devices = None
    visible = [name for name in environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
    if local and len(visible) != 1 and not environ.get("JAX_LOCAL_DEVICE_IDS"):
        devices = (int(local),)  # several processes a host, all of which see all cards: one card each
    return Cluster(source, address, int(count), int(rank), devices)


def _launcher(environ: Mapping[str, str]) -> tuple[str, str, str, str, str]:
    """(name, address, number of processes, rank, local rank where a host has several); "" for what it does not say."""
    # The step's tasks, not the job's: a plain `python` inside an allocation is one process.
    if environ.get("SLURM_STEP_NUM_TASKS", "1") != "1":
        host = _first_host(environ.get("SLURM_STEP_NODELIST", ""))
        if host and environ.get("SLURM_STEP_NUM_NODES") == "1":
            host = "127.0.0.1"  # Slurm's name of a node need not resolve
        job = environ.get("SLURM_JOB_ID", "0"), environ.get("SLURM_STEP_ID", "0")
        port = 61440 + sum(int(number) for number in job if number.isdecimal()) % 4096
        several = re.split(r"[(,]", environ.get("SLURM_STEP_TASKS_PER_NODE", "1"))[0] != "1"
        local = environ.get("SLURM_LOCALID", "") if several else ""
        address = f"{host}:{port}" if host else ""
        return "Slurm", address, environ["SLURM_STEP_NUM_TASKS"], environ.get("SLURM_PROCID", ""), local
    if environ.get("OMPI_COMM_WORLD_SIZE", "1") != "1":
        several = environ.get("OMPI_COMM_WORLD_LOCAL_SIZE", "1") != "1"
        local = environ.get("OMPI_COMM_WORLD_LOCAL_RANK", "") if several else ""
        # Where process 0 runs is known only if all run on one host.
        alone = environ.get("OMPI_COMM_WORLD_LOCAL_SIZE") == environ["OMPI_COMM_WORLD_SIZE"]
        job = re.sub(r"\D", "", environ.get("PMIX_NAMESPACE", environ.get("OMPI_MCA_ess_base_jobid", "0"))) or "0"
        address = f"127.0.0.1:{61440 + int(job) % 4096}" if alone else ""
        return "Open MPI", address, environ["OMPI_COMM_WORLD_SIZE"], environ.get("OMPI_COMM_WORLD_RANK", ""), local
    return "", "", "", "", ""


def _first_host(nodes: str) -> str:
    """The first of Slurm's "node001", "a,b", "node[001-015],b", "node[3,7-9]"."""
    match = re.match(r"([^,\[]+)(?:\[([^\],-]+))?", nodes)
    return f"{match[1]}{match[2] or ''}" if match else ""


def start(environ: Mapping[str, str] = os.environ) -> Peers:
    """Find the other processes of the run, if there are any, and start JAX's distributed runtime. Before any use of JAX.

    Raises:
      UserError: one is missing after 45 seconds (named), the address is wrong, or the environment is half set.
    """
    cluster = detect(environ)
    if cluster is None:
        return Peers(0, 1)
    peers = Peers.meet(cluster)
    import jax

    try:
        jax.distributed.initialize(
            cluster.address,
            cluster.count,
            cluster.rank,
            local_device_ids=cluster.devices,
            cluster_detection_method="deactivate",
            initialization_timeout=_JAX_START_SECONDS,
        )
    except Exception as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        peers.failed(f"JAX could not start at {cluster.address} ({reason})", 2)
    return peers


class Peers:
    """The other processes of the run. A single process has none, and every method returns at once.

    Args:
      rank, count: of this process, of all.
      leave: called with exit code and line when another process is gone; the default ends this process.
    """

    def __init__(
        self,
        rank: int,
        count: int,
        links: Mapping[int, socket.socket] | None = None,
        *,
        silence: float = SILENCE_SECONDS,
        leave: Callable[[int, str], None] = signals.leave,
    ):
        self.rank, self.count = rank, count
        self._links = dict(links or {})  # of process 0: to all others by rank; of the others: to process 0
        self._silence, self._leave = silence, leave
        self._lock, self._closed = threading.Lock(), threading.Event()
        self._doing = "starting"  # sent with every beat
        self._known = {other: "starting" for other in self._links}
        self._heard = {other: time.monotonic() for other in self._links}
        self._done: set[int] = set()
        self._votes: dict[int, dict[int, int]] = {}  # by round and rank
        self._results: dict[int, int] = {}
        self._round = 0
        self._stop_sent = False
        self.on_stop: Callable[[int], None] = lambda number: None  # called in a thread when another process got a signal
        self._changed = threading.Condition()
        for other, link in self._links.items():
            link.settimeout(None)
            link.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # every step waits for a message of a few bytes
            threading.Thread(target=self._listen, args=(other, link), name=f"peer_{other}", daemon=True).start()
        if self._links:
            threading.Thread(target=self._beat, name="peers", daemon=True).start()

    # ---------------------------------------------------------------- start

    @classmethod
    def meet(cls, cluster: Cluster, *, seconds: float = START_SECONDS, **options: Any) -> Peers:
        """Connect all processes of the run.

        Raises:
          UserError: not all came within `seconds`.
        """
        links = _gather(cluster, seconds) if cluster.rank == 0 else {0: _join(cluster, seconds)}
        return cls(cluster.rank, cluster.count, links, **options)

    # ---------------------------------------------------------------- run

    def doing(self, text: str) -> None:
        """What this process is at, e.g. "step 120, waiting for input": named if it falls silent. Cheap."""
        self._doing = text

    def agree(self, value: int, seconds: float = 600.0) -> int:
        """The greatest `value` of all processes. Every process must call it, equally often; the devices are not waited for."""
        if self.count == 1:
            return value
        self._round += 1
        number = self._round
        if self.rank == 0:
            self._vote(number, 0, value)
        else:
            self._send(0, {"vote": value, "round": number})
        with self._changed:
            if not self._changed.wait_for(lambda: number in self._results, seconds):
                waiting = sorted(set(range(self.count)) - set(self._votes.get(number, {})) - {self.rank})
                at = "; ".join(f"process {r}: {self._known.get(r, 'unknown')}" for r in waiting if r in self._known)
                self._gone(f"the processes have not agreed for {seconds:.0f} s ({at or 'process 0 did not answer'})")
            return self._results.pop(number, value)

    def ask_to_stop(self, number: int) -> None:
        """Tell the others that this process has received signal `number`. They may be waiting for input that never comes."""
        if not self._stop_sent:
            self._stop_sent = True
            for other in self._links:
                self._send(other, {"stop": number})

    def failed(self, message: str, code: int = signals.NOT_SAVED) -> None:
        """End this process with exit code `code` and the line `message`, and the others with the same code: one process's
        mistake is no reason to start all of them again. Returns only where there are no others.

        A collective also fails because another process died. So this one first waits a moment for that process's message, and
        ends with it if it comes.
        """
        if self.count == 1:
            return
        if self._closed.wait(_REASON_SECONDS):
            time.sleep(_REASON_SECONDS)  # the message has come, and ends this process
        self._closed.set()
        line = f"process {self.rank} stopped: {' '.join(message.split())[:300]}"
        for other in self._links:
            self._send(other, {"gone": line, "code": code})
        time.sleep(_LAST_WORD_SECONDS)
        self._leave(code, message)  # at once: JAX's exit handlers would wait for the others, and abort with a native stack dump

    def close(self, seconds: float = 60.0) -> None:
        """This process has done its work; waits until all have, at most `seconds`."""
        if self.count == 1 or self._closed.is_set():
            return
        for other in self._links:
            self._send(other, {"done": True})
        with self._changed:
            self._changed.wait_for(lambda: set(self._links) <= self._done, seconds)
        if self.rank == 0:
            for other in self._links:
                self._send(other, {"done": True})
        self._closed.set()

    # ---------------------------------------------------------------- threads

    def _beat(self) -> None:
        before = time.monotonic()
        while not self._closed.wait(_BEAT_SECONDS):
            now = time.monotonic()
            if now - before > 5 * _BEAT_SECONDS:  # this process was stopped itself: hear the others first
                self._heard = {other: now for other in self._heard}
            before = now
            for other in self._links:
                self._send(other, {"doing": self._doing})
            for other, heard in list(self._heard.items()):
                if other not in self._done and now - heard > self._silence and not self._closed.is_set():
                    self._gone(f"process {other} has not answered for {now - heard:.0f} s (last: {self._known[other]})")

    def _listen(self, other: int, link: socket.socket) -> None:
        reason = "its connection closed"
        try:
            with link.makefile("r", encoding="utf-8") as lines:
                for line in lines:
                    self._heard[other] = time.monotonic()
                    self._receive(other, json.loads(line))
        except (OSError, ValueError) as error:
            reason = str(error) or reason
        if other not in self._done and not self._closed.is_set():
            if self.rank == 0:
                time.sleep(_LAST_WORD_SECONDS)  # another may have died first
            # Without process 0 JAX aborts this process in a moment, with a native stack dump: be faster.
            if not self._closed.is_set():
                self._gone(f"process {other} died ({reason}; last: {self._known[other]})")

    def _receive(self, other: int, message: dict[str, Any]) -> None:
        if "doing" in message:
            self._known[other] = message["doing"]
        elif "vote" in message:
            self._vote(message["round"], other, message["vote"])
        elif "result" in message:
            with self._changed:
                self._results[message["round"]] = message["result"]
                self._changed.notify_all()
        elif "done" in message:
            with self._changed:
                self._done.add(other)
                self._changed.notify_all()
        elif "stop" in message:
            self.on_stop(message["stop"])
        elif "gone" in message and not self._closed.is_set():
            self._gone(message["gone"], message["code"])

    def _vote(self, number: int, rank: int, value: int) -> None:
        """In process 0."""
        with self._changed:
            votes = self._votes.setdefault(number, {})
            votes[rank] = value
            if len(votes) < self.count:
                return
            result = self._results[number] = max(self._votes.pop(number).values())
            self._changed.notify_all()
        for other in self._links:
            self._send(other, {"result": result, "round": number})

    def _send(self, other: int, message: dict[str, Any]) -> None:
        with self._lock, contextlib.suppress(OSError):  # a dead one is noticed by its listener
            self._links[other].sendall((json.dumps(message) + "\n").encode())

    def _gone(self, line: str, code: int = signals.NOT_SAVED) -> None:
        self._closed.set()
        if self.rank == 0:
            for other in self._links:
                self._send(other, {"gone": line, "code": code})
            time.sleep(_LAST_WORD_SECONDS)
        again = ", the same command continues it from the last checkpoint" if code == signals.NOT_SAVED else ""
        self._leave(code, f"{line}; the run stops{again}")


def _gather(cluster: Cluster, seconds: float) -> dict[int, socket.socket]:
    """Process 0: wait for the others on the port that JAX will use afterwards."""
    port, deadline = int(cluster.address.rsplit(":", 1)[1]), time.monotonic() + seconds
    links: dict[int, socket.socket] = {}
    problem = ""
    try:
        server = _listener(port)
    except OSError as error:
        raise UserError(
            f"process 0: port {port} of {cluster.address} cannot be used ({error.strerror}): name another"
        ) from None
    with server:
        while len(links) < cluster.count - 1 and not problem:
            server.settimeout(max(0.01, deadline - time.monotonic()))
            try:
                link, _ = server.accept()
                link.settimeout(5)
                hello = json.loads(_line(link))
                rank, count = int(hello["rank"]), int(hello["count"])
            except TimeoutError:
                if time.monotonic() >= deadline:
                    missing = ", ".join(str(rank) for rank in range(1, cluster.count) if rank not in links)
                    problem = f"process {missing} of {cluster.count} did not come to {cluster.address} within {seconds:.0f} s"
                continue
            except (OSError, ValueError, KeyError, TypeError):  # something else that knocks at ports
                continue
            if count != cluster.count:
                problem = f"process {rank} was started as one of {count} processes, process 0 as one of {cluster.count}"
            elif rank in links or not 0 < rank < cluster.count:
                problem = f"two processes were started as process {rank}"
            links[rank] = link
    for link in links.values():
        with contextlib.suppress(OSError):
            link.sendall((json.dumps({"problem": problem}) + "\n").encode())
            if problem:
                link.close()
    if problem:
        raise UserError(f"{problem} ({cluster.source}): start all {cluster.count} with the same JAX_COORDINATOR_ADDRESS")
    return links


def _listener(port: int) -> socket.socket:
    for family, host in ((socket.AF_INET6, "::"), (socket.AF_INET, "0.0.0.0")):
        server = socket.socket(family, socket.SOCK_STREAM)
        try:
            # JAX's service binds the port while these connections are open: both sides must agree to share it.
            server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if family == socket.AF_INET6:
                server.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
            server.bind((host, port))
            server.listen(1024)
            return server
        except OSError:
            server.close()
            if family == socket.AF_INET:
                raise
    raise AssertionError


def _join(cluster: Cluster, seconds: float) -> socket.socket:
    """The other processes: connect to process 0 and wait until all have come."""
    host, port = cluster.address.rsplit(":", 1)
    deadline, reason = time.monotonic() + seconds, ""
    who = f"process {cluster.rank} of {cluster.count}"
    while (left := deadline - time.monotonic()) > 0:
        try:
            link = socket.create_connection((host.strip("[]"), int(port)), timeout=min(left, 5))
            break
        except OSError as error:
            reason = error.strerror or str(error)
            time.sleep(min(0.3, left))
    else:
        raise UserError(
            f"{who}: process 0 does not answer at {cluster.address} after {seconds:.0f} s ({reason}; {cluster.source}): is it "
            "running, and is JAX_COORDINATOR_ADDRESS its address?"
        )
    try:
        link.sendall((json.dumps({"rank": cluster.rank, "count": cluster.count}) + "\n").encode())
        link.settimeout(seconds + 10)
        problem = json.loads(_line(link))["problem"]
    except (OSError, ValueError, KeyError, TypeError):
        problem = f"process 0 at {cluster.address} ended, or something else answers there"
    if problem:
        link.close()
        raise UserError(f"{who}: {problem}")
    return link


def _line(link: socket.socket) -> str:
    """One line, read byte by byte: what follows belongs to someone else."""
    data = b""
    while not data.endswith(b"\n") and len(data) < 1000:
        if not (byte := link.recv(1)):
            raise ValueError("closed")
        data += byte
    return data.decode()
