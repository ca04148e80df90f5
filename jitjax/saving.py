"""Writing checkpoints while training goes on: asynchronous, verified, never at the expense of the last good one.

Orbax's `CheckpointManager` is not used: before 0.12.10 it drops earlier steps from `latest_step()` when a background save
fails, and it removes old steps by number, whatever state the newer ones are in. Its `AsyncCheckpointer` writes the same files.

Which old ones are deleted: `jitjax.retention`. The run's identity and the best checkpoint, in files beside them:
`jitjax.run_record`.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

from jitjax import atomic, checkpoint, finite, host_copy, manifest, processes, retention, run_record, settings
from jitjax.errors import UserError
from jitjax.step import TrainState

_MAX_FAILURES = 5  # saves in a row that may fail before the run stops
_RETRY_SECONDS = 60.0
_COMMIT_SECONDS = 1200  # a save that takes longer in the background has failed
_log = logging.getLogger(__name__)


class Checkpoints:
    """The checkpoints of one workdir, for the run that writes them. With several processes every one makes the same calls."""

    def __init__(
        self,
        workdir: Path,
        *,
        keep_last: int = 1,
        keep_every: int | None = None,
        before_commit: Callable[[], None] = lambda: None,
        committed: Callable[[int], None] = lambda step: None,
    ):
        """Removes what a killed run left half written.

        Args:
          keep_last: how many of the newest checkpoints stay. One is deleted only after a newer one is known to be whole.
          keep_every: checkpoints whose step is a multiple stay for good.
          before_commit: called by process 0 in a thread before a checkpoint gets its name; what it raises makes the save fail.
          committed: called in a thread with the step of a checkpoint that is on disk.

        Raises:
          UserError: the folder cannot be written, or is not that of process 0.
        """
        self._workdir, self._folder = Path(workdir).absolute(), (Path(workdir) / checkpoint.DIRECTORY).absolute()
        self._keep_last, self._keep_every = keep_last, keep_every
        self._before_commit, self._committed = before_commit, committed
        self._reserving: threading.Thread | None = None
        self._is_main = jax.process_index() == 0
        self._whole: set[int] = set()  # steps known to be whole: verified, or written by this process
        self._thread: threading.Thread | None = None
        self._pending: int | None = None  # the step that is being written
        self._final = False  # no step comes after it
        self._error: BaseException | None = None  # of the write that ended last
        self._failures, self._failed_at = 0, 0.0  # in a row; `time.monotonic()` of the last one
        self._reported = False  # whether the last one was raised
        self._run: dict[str, Any] = {}
        self._best: dict[str, Any] | None = None  # of the save that is under way
        self._unmarked: dict[str, Any] | None = None  # of a checkpoint that is whole, while best.json cannot be written
        had_folder = self._folder.is_dir()
        if self._is_main:
            with _one_line(self._workdir):
                self._folder.mkdir(parents=True, exist_ok=True)
                self._run = run_record.identity(self._workdir, had_folder=had_folder)
                retention.remove_unfinished(self._folder)
        if jax.process_count() > 1:
            run_record.require_shared(self._workdir, self._run)
        self._writer = ocp.AsyncCheckpointer(
            ocp.CompositeCheckpointHandler(),
            async_options=ocp.options.AsyncOptions(
                timeout_secs=_COMMIT_SECONDS,
                post_finalization_callback=self._seal,
                # Asynchronously, a folder that cannot be made is noticed after 300 seconds.
                create_directories_asynchronously=False,
            ),
            # Processes that are named meet through the coordination service; others in a collective on the devices, which
            # no thread may start beside the training step's.
            multiprocessing_options=ocp.options.MultiprocessingOptions(active_processes=set(range(jax.process_count()))),
        )

    # ---------------------------------------------------------------- read

    def latest(self) -> int | None:
        """Step of the newest whole checkpoint; None in a workdir that has never saved one. Reads every byte of it.

        Raises:
          UserError: there are checkpoints and none is whole, or those that were saved are gone.
        """
        candidates = self._candidates()
        for step in candidates:
            if self._verified(step):
                return step
        if candidates:
            raise self._none_whole()
        return None

    def resume(
        self, like: TrainState, check: Callable[[Mapping[str, Any]], None] = lambda meta: None
    ) -> tuple[TrainState, int, dict[str, Any]] | None:
        """State, step and meta of the newest checkpoint that is whole, can be read and is finite; None in a new workdir.

        Args:
          like: tree of shape structs with shardings; the checkpoint may come from another mesh.
          check: called with the meta before the arrays are read; raises `UserError` where the checkpoint does not fit.

        Raises:
          UserError: there are checkpoints and none is good, or those that were saved are gone.
        """
        candidates = self._candidates()
        for step in candidates:
            if not self._verified(step):
                continue
            meta = self.meta(step)
            check(meta)
            try:
                state, reason = self.restore(step, like), None
                if group := finite.not_finite(state):
                    reason = f"its {group} are not finite"
            except Exception as error:  # Orbax and TensorStore raise many kinds for files that are not what they were
                state, reason = None, f"it cannot be read ({checkpoint.reason_of(error)})"
            if not processes.any_process(reason is not None):
                return state, step, meta
            self._whole.discard(step)
            checkpoint.report_skipped(self._folder / str(step), reason or "another process cannot read it")
        if candidates:
            raise self._none_whole()
        return None

    def steps(self) -> list[int]:
        """Steps that have a folder, whole or not, ascending."""
        return checkpoint.steps_in(self._folder)

    def meta(self, step: int) -> dict[str, Any]:
        return checkpoint.read_meta(self._folder / str(step))

    def restore(self, step: int, like: TrainState) -> TrainState:
        """The state at `step`, laid out like `like` (a tree of shape structs with shardings)."""
        return checkpoint.restore(self._folder / str(step), like)

    def _candidates(self) -> list[int]:
        """Steps to try, newest first; with several processes those that all of them see."""
        steps = self.steps()
        if jax.process_count() > 1:
            padded = np.full(256, -1, np.int64)
            padded[: len(steps[-256:])] = steps[-256:]
            seen = [set(map(int, row)) - {-1} for row in multihost_utils.process_allgather(padded)]
            steps = sorted(set.intersection(*seen))
            if hidden := sorted(set.union(*seen) - set(steps)):
                _log.warning("checkpoints %s are not visible to every process: not considered", ", ".join(map(str, hidden)))
        lost = run_record.lost(self._workdir, self._run) if self._is_main and not steps else None
        if lost := processes.text_of_process_0(lost):
            raise UserError(lost)
        return steps[::-1]

    def _verified(self, step: int) -> bool:
        """Whether the checkpoint is whole; where not, one line says why. Process 0 reads, all get its result."""
        if step in self._whole:
            return True
        reason = checkpoint.defect(self._folder / str(step), self._run.get("run")) if self._is_main else None
        if processes.any_process(reason is not None):
            if self._is_main:
                checkpoint.report_skipped(self._folder / str(step), str(reason))
            return False
        self._whole.add(step)
        return True

    def _none_whole(self) -> UserError:
        return UserError(
            f"--workdir={self._workdir}: none of its checkpoints ({', '.join(map(str, self.steps()))}) is whole; the lines "
            "above give the reasons. Nothing was changed: restore one from a copy, or use another workdir"
        )

    # ---------------------------------------------------------------- write

    def reserve(self, like: TrainState) -> threading.Thread:
        """Prepare the first save, in a thread: page-lock the host memory that saves and EMA snapshots use, which the runtime
        retains, and compile the check of the numbers. Otherwise training stands still for it. Call it before the first step is
        compiled. `like`: as for `resume`.

        Returns:
          The thread; a save waits for it.
        """
        alone = jax.process_count() == 1

        def prepare() -> None:
            with contextlib.suppress(Exception):  # the first save will say it
                finite.compile_all_finite(finite.groups_of(like))
                if alone and jax.default_backend() != "cpu":
                    powers = {name: params for name, params in like.ema.items() if name.startswith(settings.POWER)}
                    leaves = jax.tree.leaves((like, powers))
                    sizes = [(leaf.shape, leaf.dtype, host_copy.one_replica(leaf.sharding)) for leaf in leaves]
                    jax.block_until_ready([jax.device_put(np.zeros(shape, dtype), place) for shape, dtype, place in sizes])

        self._reserving = threading.Thread(target=prepare, name="checkpoint_reserve", daemon=True)
        self._reserving.start()
        if not alone:  # all processes compile the same programs in the same order
            self._reserving.join()
        return self._reserving

    def require_space(self, state: TrainState) -> None:
        """Raises:
        UserError: the disk has no space for one more checkpoint. Orbax would find out half-way.
        """
        if reason := self._lacks_space(state):
            raise UserError(f"--workdir={self._workdir}: {reason}: free some and run the same command again")

    def best(self) -> dict[str, Any] | None:
        """{"step", "metric", "value", "how"} of the checkpoint that is the best, or is being saved as it; None: there is none.
        All processes must ask, and get what process 0 knows.

        Raises:
          UserError: best.json is unreadable.
        """
        mark = problem = None
        try:
            mark = self._best or self._unmarked or checkpoint.read_best(self._workdir)
        except UserError as error:
            problem = str(error)
        if problem := processes.text_of_process_0(problem):
            raise UserError(problem)
        return json.loads(processes.text_of_process_0(json.dumps(mark)))

    def save(
        self,
        state: TrainState,
        step: int,
        meta: Mapping[str, Any],
        *,
        best: Mapping[str, Any] | None = None,
        final: bool = False,
    ) -> None:
        """Begin to copy the state to the host and return; the state may be donated at once. With one process everything else
        happens in a thread, which waits for the copy too.

        A save that fails, here or in the background, is reported in one line and training may go on: `retry_due` says
        when to try again. `wait` raises where the last save failed.

        Args:
          best: {"metric", "value", "how"}: from now on this is the best checkpoint. It stays until there is a better one, and
            <workdir>/checkpoints/best means it. One of this step that is on disk already is marked and not written again.
          final: training ends here: a failure is left to `wait`.

        Raises:
          UserError: the weights, EMAs or moments are not finite (nothing is written), or too many saves failed in a row.
        """
        self.settle()
        self._check_limit()
        if self._reserving is not None:
            self._reserving.join()
        self._best, self._final = None if best is None else {"step": step, **best}, final
        if step in self._whole:
            self._mark_best()
            if self._is_main and best is not None:
                self._rotate()  # the best one before is superseded
            return
        if group := finite.not_finite(state):
            raise UserError(
                f"the {group} are not finite at step {step:,}, so they are not saved; {self.last_good()}. "
                "Lower --config.optim.lr, or set --config.optim.clip_norm=1"
            )
        if self._failures and self._is_main:
            retention.remove_unfinished(self._folder)
        problem = (self._lacks_space(state) or self._lacks_permission()) if self._is_main else None
        if problem := processes.text_of_process_0(problem):
            self._failed(step, UserError(problem))
            return
        copy, alone = state, jax.process_count() == 1
        if alone:
            try:
                copy = host_copy.to_host(state)
            except Exception as error:  # no space for it in page-locked memory: Orbax copies, and training waits
                _log.warning(
                    "no copy of the state fits into page-locked host memory (%s): this save is slower",
                    checkpoint.reason_of(error),
                )
                alone = False
        args = dict(
            params=ocp.args.StandardSave(copy.params),
            ema=ocp.args.StandardSave(copy.ema),
            optimizer=ocp.args.StandardSave({"opt_state": copy.opt_state, "loss_scale": copy.loss_scale}),
            meta=ocp.args.JsonSave({**meta, "checksums": manifest.FORMAT}),
        )
        self._pending = step
        items = ocp.args.Composite(**args)
        if not alone:  # each process writes its slices of what is replicated: Orbax copies no more than those
            try:
                self._start(step, items)
            except Exception as error:
                self._failed(step, error)
                return
            items = None
        self._thread = threading.Thread(target=self._write, args=(step, items), name="checkpoint", daemon=True)
        self._thread.start()

    def has(self, step: int) -> bool:
        """Whether a whole checkpoint of `step` is on disk. Waits for the write in the background."""
        self.settle()
        return step in self._whole

    def newest(self) -> int | None:
        """The step that the run would continue from. Waits for the write in the background."""
        self.settle()
        return max(self._whole, default=None)

    def is_whole(self, step: int) -> bool:
        """As `has`, without waiting. Any thread may ask."""
        return step in self._whole

    def retry_due(self) -> bool:
        """Whether the last save failed and it is time to try again. Cheap: for every turn of a loop.

        Raises:
          UserError: too many saves failed in a row. With several processes one failure is enough, since the others wait.
        """
        if self._thread is not None and not self._thread.is_alive():
            self.settle()
        self._check_limit()
        return self._failures > 0 and time.monotonic() - self._failed_at >= _RETRY_SECONDS

    def _check_limit(self) -> None:
        if self._failures >= _MAX_FAILURES or (self._failures and jax.process_count() > 1):
            raise self._as_user_error()

    def wait(self) -> None:
        """Until everything is on disk.

        Raises:
          UserError: the last save failed.
        """
        self.settle()
        if self._failures:
            raise self._as_user_error()

    def close(self) -> None:
        """Like `wait`, but what was raised before is not raised again; afterwards no thread runs any more."""
        try:
            self.settle()
            self._mark_best()
            if not self._reported:
                self.wait()
        finally:
            if self._reserving is not None:  # a thread that still compiles would break the interpreter's end
                self._reserving.join()
            with _one_line(self._workdir):
                self._writer.close()
            if self._failures and self._is_main:
                retention.remove_unfinished(self._folder)
            self._failures = 0

    def _start(self, step: int, items: ocp.args.Composite) -> None:
        # A damaged checkpoint of the same step, which was not resumed from, gives way (`force`).
        self._writer.save(self._folder / str(step), args=items, force=True)

    def _write(self, step: int, items: ocp.args.Composite | None) -> None:
        """In a thread: write the files, remember the step, and delete what is not to be kept."""
        try:
            if items is not None:
                self._start(step, items)
                items = None  # the copy on the host is free as soon as Orbax has written it
            self._writer.wait_until_finished()
            if self._is_main:
                atomic.sync_folder(self._folder)
                self._run["saved"] = step
                run_record.write(self._workdir, self._run)
            self._whole.add(step)
            self._failures = 0
        except BaseException as error:
            self._failed(step, error)
            return
        self._mark_best()
        if self._is_main:
            self._rotate()
        self._committed(step)

    def _mark_best(self) -> None:
        """Write best.json if the checkpoint that was saved is to be the best. What fails is tried again with the next save and
        at the end."""
        if self._best is not None:
            self._unmarked, self._best = self._best, None
        if self._unmarked is not None and self._is_main:
            try:
                run_record.write_best(self._workdir, self._unmarked)
            except OSError as error:
                step, mark = f"{self._unmarked['step']:,}", json.dumps(self._unmarked)
                problem = f"step {step} is the best, but best.json cannot be written ({error.strerror})"
                _log.warning("%s: tried again with the next save; it should say %s", problem, mark)
                return
        self._unmarked = None

    def settle(self) -> None:
        """Wait for the write in the background. What failed in it is raised by others."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def _failed(self, step: int, error: BaseException) -> None:
        self._error, self._failed_at, self._reported = error, time.monotonic(), False
        self._failures += 1
        self._best = None  # the one before stays the best
        if self._failures < _MAX_FAILURES and jax.process_count() == 1 and not self._final:
            _log.warning(
                "saving step %s failed (%s); training goes on, failure %d of at most %d in a row; %s",
                f"{step:,}",
                checkpoint.reason_of(error),
                self._failures,
                _MAX_FAILURES,
                self.last_good(),
            )
        if self._is_main:
            retention.remove_unfinished(self._folder)  # it may hold the space that is lacking

    def _as_user_error(self) -> UserError:
        self._reported = True
        times = f"{self._failures} saves in a row" if self._failures > 1 else "the last save"
        return UserError(
            f"--workdir={self._workdir}: {times} failed ({checkpoint.reason_of(self._error)}); {self.last_good()}. "
            "Mend that and run the same command again"
        )

    def last_good(self) -> str:
        """For messages: which checkpoint the run would continue from. Looks at nothing on disk."""
        good = max(self._whole, default=None)
        return "no checkpoint was saved before" if good is None else f"the last good checkpoint is step {good:,}"

    def _seal(self) -> None:
        """Called by Orbax in process 0 when all files of the pending step are complete, before the folder gets its name."""
        self._before_commit()
        folder = self._folder / f"{self._pending}{retention.TEMPORARY}"
        if not folder.is_dir():  # file systems without an atomic rename: Orbax writes in place
            folder = self._folder / str(self._pending)
        manifest.write(folder, step=self._pending, run=self._run["run"])

    def _rotate(self) -> None:
        """Delete old checkpoints."""
        retention.remove_unfinished(self._folder)
        try:
            marks = self._unmarked, checkpoint.read_best(self._workdir)
        except UserError as error:
            _log.warning("no old checkpoint is deleted: %s", error)
            return
        superseded = retention.superseded(
            self.steps(),
            self._whole,
            keep_last=self._keep_last,
            keep_every=self._keep_every,
            best=[mark["step"] for mark in marks if mark],
        )
        for step in superseded:
            if retention.delete(self._folder, step):
                self._whole.discard(step)

    def _lacks_space(self, state: TrainState) -> str | None:
        needed = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
        try:
            free = shutil.disk_usage(self._workdir).free
        except OSError as error:
            return f"{self._workdir}: {error.strerror}"
        if free >= needed:
            return None
        return f"no space for a checkpoint, which takes {needed / 2**20:,.0f} MiB where {free / 2**20:,.0f} MiB are free"

    def _lacks_permission(self) -> str | None:
        """Ask before Orbax does: with several processes it would leave the others waiting."""
        try:
            self._folder.mkdir(exist_ok=True)  # somebody may have deleted it
            os.rmdir(tempfile.mkdtemp(prefix=".probe-", dir=self._folder))
        except OSError as error:
            return f"{self._folder} cannot be written ({error.strerror})"
        return None


class _one_line:
    """Turns what the disk refuses into one line that names the workdir."""

    def __init__(self, workdir: Path):
        self._workdir = workdir

    def __enter__(self):
        return self

    def __exit__(self, kind, error, trace):
        if isinstance(error, OSError):
            raise UserError(
                f"--workdir={self._workdir}: {checkpoint.reason_of(error)} (earlier checkpoints are intact)"
            ) from error
