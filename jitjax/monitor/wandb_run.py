"""Weights & Biases. Whatever happens to it, training goes on and the process ends.

The SDK does the work in a process of its own (`wandb-core`): `log` only hands a row over, and W&B's own time-outs bound
the start and the final upload. What they do not cover is a `wandb-core` that no longer reads (stopped, or stuck on a
dead disk): every call of the SDK would then wait for ever. So each group of calls has a deadline, and past it that
process is killed, which turns the wait into an error.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import string
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import psutil

from jitjax import atomic
from jitjax.settings import Wandb

RUN_ID_FILE = "wandb_run_id"
STEP, SCORE_STEP = "step", "eval/step"  # the x axes; a score arrives later than the step whose weights it judges
# The five panels of the published PyTorch trainer, then everything else that has a curve.
CURVES = (
    "train/loss",
    "train/learning_rate",
    "train/grad_norm",
    "train/epoch_loss",
    "train/samples_per_second",
    "train/*",
    "perf/*",
    "time/*",
)
ANSWER_SECONDS = 30.0  # what W&B's process gets to take over what is logged


class WandbRun:
    """One W&B run, the same one whenever the workdir is the same: its id is stored in `workdir/wandb_run_id`.

    No method raises, and none waits longer than its deadline. A service that cannot be reached turns into offline files;
    where those fail, too, W&B is off for this run. Either is reported in one line.

    Args:
      workdir: holds the run id and W&B's own `wandb/` folder.
      config: stored as the run's configuration; plain values only.
      options: as in W&B. What is unset comes from W&B's environment variables; WANDB_MODE=offline (or disabled) wins over
        the mode "online".
      report: takes one line of text for the user.
      init_timeout: seconds until an online start is given up for an offline one.
      finish_timeout: seconds that uploading the rest may take at the end.
      answer_timeout: seconds that W&B's process may take to accept what is logged.
    """

    def __init__(
        self,
        workdir: str | os.PathLike,
        config: Mapping[str, Any],
        options: Wandb,
        *,
        report: Callable[[str], None] = print,
        init_timeout: float = 30.0,
        finish_timeout: float = 60.0,
        answer_timeout: float = ANSWER_SECONDS,
    ):
        self._workdir, self._report = Path(workdir), report
        self._init_timeout, self._finish_timeout, self._answer_timeout = init_timeout, finish_timeout, answer_timeout
        self._rows: list[tuple[int, dict[str, Any]]] = []
        self._extras: list[tuple[int, dict[str, Any]]] = []
        self._run: Any = None
        mode = options.mode
        if mode == "online" and os.environ.get("WANDB_MODE") in ("offline", "dryrun", "disabled"):
            mode = "disabled" if os.environ["WANDB_MODE"] == "disabled" else "offline"
        if mode == "online":
            report("connecting to W&B ...")
        arguments = dict(
            project=options.project or os.environ.get("WANDB_PROJECT") or "jitjax",
            entity=options.entity,
            name=options.name or os.environ.get("WANDB_NAME") or self._workdir.resolve().name,
            group=options.group,
            tags=[tag.strip() for tag in options.tags.split(",") if tag.strip()] or None,
            job_type="train",
            config=dict(config),
        )
        try:
            self._run_id = _run_id(self._workdir / RUN_ID_FILE)
            self._run, self._mode = self._start(mode, arguments)
            for axis in (STEP, SCORE_STEP):
                self._run.define_metric(axis, hidden=True)  # else it gets a panel of its own
            for curve in CURVES:
                self._run.define_metric(curve, step_metric=STEP)
            self._run.define_metric("eval/*", step_metric=SCORE_STEP)
        except Exception as error:
            self._give_up(f"W&B is off for this run ({_one_line(error)}); metrics.jsonl has every step")
            return
        # W&B ignores a step below its latest: a run that resumes behind the point that W&B has seen does not send those
        # steps (they are there already, and equal) a second time.
        self._first_step = self._latest = self._run.starting_step
        if self._mode == "online":
            report(f"W&B: {self._run.url}")
        elif self._mode == "offline":
            report(f"W&B offline; to upload: {self._sync_command()}")

    def log(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Metrics of one optimizer step; steps ascend. They leave with the next `send`."""
        if self._run is not None and step >= self._first_step:
            self._rows.append((step, {STEP: step, **metrics}))

    def log_extra(self, step: int, values: Mapping[str, Any]) -> None:
        """Numbers or image files (a `Path`) beside the metrics of `step`; may come before these, or after them."""
        if self._run is not None:
            self._extras.append((step, dict(values)))

    def summary(self, values: Mapping[str, Any]) -> None:
        """Sets values of the run as a whole, e.g. its best score or its number of images."""
        self._attempt(lambda: self._run.summary.update(dict(values)))

    def send(self) -> None:
        """Hands what was logged to W&B's process. Once an interval, so that one deadline covers all of its steps."""

        def send_rows() -> None:
            for step, values in self._rows:
                self._run.log(values | self._due_extras(step), step=step)
                self._latest = step
            self._rows = []

        if self._rows:
            self._attempt(send_rows)

    def finish(self, exit_code: int = 0) -> None:
        """Sends the rest, waits for the upload (`finish_timeout` at most) and ends W&B's process."""

        def finish_run() -> None:
            for step in sorted({step for step, _ in self._extras}):
                self._latest = max(step, self._latest)
                self._run.log({STEP: self._latest, **self._due_extras(step)}, step=self._latest)
            self._run.finish(exit_code=exit_code)
            _teardown(exit_code)  # W&B would do it at exit, without a bound
            self._run = None

        self.send()
        self._attempt(finish_run, self._finish_timeout + self._answer_timeout)

    def _due_extras(self, upto: int) -> dict[str, Any]:
        """The extras of steps <= `upto`: W&B wants ascending steps, and metrics arrive an interval late."""
        due = [values for step, values in self._extras if step <= upto]
        if not due:
            return {}
        import wandb

        self._extras = [extra for extra in self._extras if extra[0] > upto]
        merged = {name: value for values in due for name, value in values.items()}
        return {name: wandb.Image(str(value)) if isinstance(value, Path) else value for name, value in merged.items()}

    def _attempt(self, call: Callable[[], Any], seconds: float | None = None) -> None:
        """Calls the SDK with a deadline; whatever fails there switches W&B off."""
        if self._run is None:
            return
        try:
            with _deadline(seconds or self._answer_timeout):
                call()
        except Exception as error:
            self._give_up(
                f"W&B failed and is off from here on ({_one_line(error)}); metrics.jsonl has every step, and "
                f"`wandb sync {self._workdir / 'wandb'}` may upload what W&B has"
            )

    def _give_up(self, text: str) -> None:
        self._run, self._rows, self._extras = None, [], []
        with contextlib.suppress(Exception), _deadline(self._answer_timeout):
            _teardown(1)
        self._report(text)

    def _start(self, mode: str, arguments: dict[str, Any]) -> tuple[Any, str]:
        """A W&B run and its mode: the one asked for, or offline where online fails."""
        if mode == "online":
            try:
                return self._init("online", arguments), "online"
            except Exception as error:
                self._report(f"W&B cannot be used online, going on offline ({_one_line(error)})")
                with _deadline(self._answer_timeout):
                    _teardown(1)  # W&B's process still holds the run id and would refuse it
            mode = "offline"
        return self._init(mode, arguments), mode

    def _init(self, mode: str, arguments: dict[str, Any]) -> Any:
        import wandb

        with _deadline(self._init_timeout + self._answer_timeout):
            wandb.setup(wandb.Settings(silent=True))  # login prints otherwise
            # Never ask for a key: nobody may be sitting there, and the question would tear the live view.
            if mode == "online" and not wandb.login(prompt=False, verify=False):
                raise RuntimeError("no API key: run `wandb login`, or set --config.wandb.mode=offline")
            return wandb.init(
                id=self._run_id,
                resume="allow" if mode == "online" else None,  # offline, the same id is all that `wandb sync` needs
                mode=mode,
                dir=self._workdir,
                settings=wandb.Settings(
                    init_timeout=self._init_timeout,
                    finish_timeout=self._finish_timeout,
                    console="off",  # stdout belongs to the live view
                    silent=True,
                ),
                **arguments,
            )

    def _sync_command(self) -> str:
        """One run may have several offline folders, one a start; with --id `wandb sync` joins them in order."""
        return f"wandb sync --id {self._run_id} {self._workdir / 'wandb'}/offline-run-*-{self._run_id}"


@contextlib.contextmanager
def _deadline(seconds: float) -> Iterator[None]:
    """Kills W&B's process after `seconds`, so that a call that waits for it fails."""
    timer = threading.Timer(seconds, _kill_core)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _kill_core() -> None:
    for child in psutil.Process().children():
        with contextlib.suppress(psutil.Error):
            if child.name() == "wandb-core":
                child.kill()


def _teardown(exit_code: int) -> None:
    import wandb

    wandb.teardown(exit_code)


def _run_id(path: Path) -> str:
    """The id in the file; the first call draws one and writes it."""
    try:
        if run_id := path.read_text().strip():
            return run_id
    except FileNotFoundError:
        pass
    run_id = "".join(secrets.choice(string.ascii_lowercase + string.digits) for _ in range(8))
    atomic.write_text(path, run_id + "\n")
    return run_id


def _one_line(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:200]
