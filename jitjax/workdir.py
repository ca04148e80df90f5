"""The folder of one run: its lock, its configuration, what it says about itself. Nothing of a run is deleted here."""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import importlib.metadata
import json
import os
import platform
import socket
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from jitjax import atomic, leftovers, paths
from jitjax.errors import UserError
from jitjax.monitor.metrics import line_of
from jitjax.plan import fit_devices
from jitjax.settings import Settings, differing_fields, flatten, to_dict

if TYPE_CHECKING:
    from jitjax.data import DataSet

BEST_FILE = "best.json"  # which checkpoint has the best score, and by which
PACKAGES = ("jitjax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy", "pillow", "wandb")


def check_apart(workdir: str | Path, dataset: DataSet) -> None:
    """Raises:
    UserError: the run's folders would be among the data set's, as classes without images.
    """
    root, run = os.path.realpath(dataset.path), os.path.realpath(paths.workdir(workdir))
    if dataset.kind == "folder" and os.path.commonpath([root, run]) == root:
        raise UserError(f"--workdir={workdir} lies among the images of {dataset.path}: name a folder elsewhere")


def check_idle(workdir: str | Path) -> None:
    """Before what takes long. Writes nothing, and leaves the lock to who comes next: `Workdir` takes it.

    Raises:
      UserError: the workdir is in use by a live run.
    """
    path = paths.workdir(workdir)
    with contextlib.suppress(OSError), open(path / ".lock", "r+") as lock:
        _flock(lock, path, fcntl.LOCK_SH)  # of which several starts at one instant may have one


def _flock(lock: IO[str], workdir: Path, kind: int = fcntl.LOCK_EX) -> None:
    try:
        fcntl.flock(lock, kind | fcntl.LOCK_NB)
    except BlockingIOError as error:
        lock.seek(0)
        raise UserError(
            f"--workdir={workdir} is in use by a live run ({lock.read().strip()}): stop that one or choose another"
        ) from error


class Workdir:
    """An open workdir: locked against a second live run, and known to hold this configuration or none yet."""

    def __init__(self, path: str | Path, *, is_main: bool = True):
        """Creates the folder, takes its lock (which the system releases when the process ends, however it ends) and removes
        what a killed run left half written.

        Raises:
          UserError: no permission, no space, not a local folder, inside a checkpoint, or in use by a live run.
        """
        self.path, self.is_main = paths.workdir(path), is_main
        self._lock = None
        if not is_main:
            return
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            (self.path / "samples").mkdir(exist_ok=True)
            self._take_lock()
            leftovers.remove_partial(self.path)
            leftovers.remove_segments()
        except OSError as error:
            raise UserError(f"--workdir={path} cannot be written ({error.strerror}): choose another") from error

    def require_lock(self) -> None:
        """For every now and then: somebody may delete .lock, after which nothing would keep a second run out.

        Raises:
          UserError: one has come already.
        """
        if self._lock is None:
            return
        with contextlib.suppress(OSError):  # a disk that is full or gone is the next save's to report
            try:
                if os.path.samestat(os.stat(self.path / ".lock"), os.fstat(self._lock.fileno())):
                    return
            except FileNotFoundError:
                pass
            self._take_lock()

    def _take_lock(self) -> None:
        lock = open(self.path / ".lock", "a+")
        _flock(lock, self.path)
        try:
            lock.truncate(0)
            lock.write(f"process {os.getpid()} on {socket.gethostname()}")
            lock.flush()
        except OSError:  # a full disk: without closing, the lock would be held as long as the error is
            with contextlib.suppress(OSError):
                lock.close()
            raise
        self._lock = lock

    def check_config(self, settings: Settings, effective_batch: int, *, accept_changes: bool, objective: str = "") -> list[str]:
        """The same effective batch, however it is cut over devices and micro-batches, is the same run.

        Args:
          objective: name of the run's own loss, "" for the published one.

        Returns:
          One line for each difference that `accept_changes` lets pass.

        Raises:
          UserError: this workdir's run began with another configuration; the line names the differing fields.
        """
        saved = saved_config(self.path)
        if saved is None:
            return []
        differing = differing_fields(saved, settings)
        before = saved.get("effective_batch", effective_batch)
        if before != effective_batch:
            differing.append(f"effective batch (batch_size x devices x accumulation_steps): {before} -> {effective_batch}")
        if saved.get("objective", "") != objective:
            differing.append(f"objective: {saved.get('objective') or 'published'} -> {objective or 'published'}")
        if differing and not accept_changes:
            optimizer = dict(flatten(saved)).get("optim.name", settings.optim.name)
            cannot = "" if optimizer == settings.optim.name else f"--config.optim.name={optimizer}, which a run keeps, or "
            raise UserError(
                f"--workdir={self.path} holds a run with another configuration ({'; '.join(differing)}): use {cannot}"
                f"another workdir{'' if cannot else ', or --accept_config_changes to continue with the new one'}"
            )
        return [f"accepted: {difference}" for difference in differing]

    def describe_run(self, settings: Settings, facts: Mapping[str, Any]) -> None:
        """Write config.json (the configuration as it was given and `facts`, e.g. devices) and versions.json."""
        if not self.is_main:
            return
        self.write("config.json", json.dumps({**to_dict(settings), **facts}, indent=1))
        self.write("versions.json", json.dumps(versions(), indent=1))

    def write(self, name: str, text: str) -> None:
        """Write a file whole or not at all.

        Raises:
          UserError: no space or no permission.
        """
        if not self.is_main:
            return
        try:
            atomic.write_text(self.path / name, text + "\n")
        except OSError as error:
            raise UserError(
                f"--workdir={self.path} cannot be written ({error.strerror}): free space or choose another"
            ) from error

    def append(self, name: str, record: Mapping[str, Any]) -> None:
        """Add one JSON line to a file (process 0 only), as in `metrics.jsonl`.

        Raises:
          UserError: no space or no permission.
        """
        if not self.is_main:
            return
        try:
            with (self.path / name).open("ab+") as file:
                if size := file.seek(0, os.SEEK_END):
                    file.seek(size - 1)
                    torn = file.read(1) != b"\n"  # by a kill or a full disk: a line of its own, which readers leave out
                    file.write(b"\n" * torn)
                file.write(line_of(record).encode())
        except OSError as error:
            raise UserError(
                f"--workdir={self.path} cannot be written ({error.strerror}): free space or choose another"
            ) from error

    def close(self) -> None:
        if self._lock is not None:
            self._lock.close()


def saved_config(workdir: Path) -> dict[str, Any] | None:
    """What config.json holds, or None in a new workdir."""
    try:
        return json.loads((workdir / "config.json").read_text())
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError) as error:
        raise UserError(f"--workdir={workdir}: config.json is unreadable ({error}); move it away to go on") from error


def fitted(settings: Settings, workdir: str | Path, devices: int) -> Settings:
    """The settings for as many devices as are here. The same command continues a run on another machine, with the effective
    batch that the run began with, unless its batch size or accumulation was changed on purpose. Only reads the workdir.

    Raises:
      UserError: the devices cannot share that batch.
    """
    saved = saved_config(paths.workdir(workdir)) or {}
    asked = settings.batch_size, settings.optim.accumulation_steps
    before = saved.get("batch_size"), saved.get("optim", {}).get("accumulation_steps")
    if asked != before or "effective_batch" not in saved:
        return settings
    try:
        result = fit_devices(settings, saved["effective_batch"], devices)
    except UserError as error:
        raise UserError(f"{error}; or set another --config.batch_size, with --accept_config_changes") from None
    # A mesh that is asked for is not changed, also where it is impossible.
    return result if to_dict(settings.mesh) == saved.get("mesh") else dataclasses.replace(result, mesh=settings.mesh)


def versions() -> dict[str, str]:
    """Versions of what computes, and the git revision of the code where it is a checkout."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    try:
        git = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
        found["git"] = subprocess.run(git, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        pass
    return found


def parameter_table(params: Mapping[str, Any]) -> str:
    """One line per parameter: name, shape, count; the total last."""
    rows = [(name, "x".join(map(str, value.shape)), int(value.size)) for name, value in params.items()]
    width = max(len(name) for name, _, _ in rows)
    lines = [f"{name:{width}}  {shape:>12}  {size:>12,}" for name, shape, size in rows]
    return "\n".join([*lines, f"{'all':{width}}  {'':>12}  {sum(size for *_, size in rows):>12,}"])
