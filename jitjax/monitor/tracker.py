"""Weights & Biases, kept at arm's length: whatever happens to it, training neither stops nor slows down.

Everything of W&B, its import and log-in included, happens on one daemon thread that a bounded queue feeds. A service
that hangs fills the queue; what no longer fits is dropped and counted (`metrics.jsonl` has it all). A service that
cannot be reached turns into offline files (`wandb sync` uploads them), and where that fails, too, into nothing, with a
warning.
"""

from __future__ import annotations

import os
import queue
import secrets
import string
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

RUN_ID_FILE = "wandb_run_id"


class NullTracker:
    """Takes everything and does nothing: W&B switched off, or a process that is not the first."""

    def log(self, step: int, metrics: Mapping[str, Any]) -> None: ...

    def log_image(self, step: int, name: str, path: str | os.PathLike) -> None: ...

    def finish(self, exit_code: int = 0) -> None: ...


class WandbTracker:
    """One W&B run, the same one whenever the workdir is the same: its id is kept in `workdir/wandb_run_id`.

    No method blocks or raises; `finish` waits a bounded time.

    Args:
      workdir: holds the run id and W&B's own `wandb/` folder.
      config: shown as the run's configuration.
      project, name: as in W&B.
      mode: "online" or "offline".
      warn: takes one line of text for the user; called from the thread.
      init_timeout: seconds until an online start is given up for an offline one.
      finish_timeout: seconds that uploading the rest may take at the end; more than `init_timeout`, so that even the
        shortest run gets its offline files.
      queue_size: steps that may wait for W&B before further ones are dropped.
    """

    def __init__(
        self,
        workdir: str | os.PathLike,
        config: Mapping[str, Any],
        *,
        project: str,
        name: str | None = None,
        mode: str = "online",
        warn: Callable[[str], None] = print,
        init_timeout: float = 30.0,
        finish_timeout: float = 60.0,
        queue_size: int = 20_000,
    ):
        self._workdir, self._config, self._warn = Path(workdir), dict(config), warn
        self._project, self._name, self._mode = project, name, mode
        self._init_timeout, self._finish_timeout = init_timeout, finish_timeout
        self._queue: queue.Queue = queue.Queue(queue_size)
        self._dropped = 0
        self._exit_code: int | None = None
        self._thread = threading.Thread(target=self._work, name="wandb", daemon=True)
        self._thread.start()

    def log(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Metrics of one optimizer step; steps must ascend."""
        self._put(("metrics", step, dict(metrics)))

    def log_image(self, step: int, name: str, path: str | os.PathLike) -> None:
        """An image file, shown beside the metrics of `step`; call it before that step's metrics, or after them."""
        self._put(("image", step, {name: str(path)}))

    def finish(self, exit_code: int = 0) -> None:
        """Hands over what is left and waits for it, `finish_timeout` seconds or a little more at most."""
        if self._exit_code is not None:
            return
        self._exit_code = exit_code
        try:
            self._queue.put(None, timeout=self._finish_timeout / 2)
            self._thread.join(self._finish_timeout + 5)
        except queue.Full:
            pass
        if self._dropped:
            self._warn(f"W&B was too slow: {self._dropped} entries were not sent (metrics.jsonl has every step)")
        if self._thread.is_alive():
            warn, self._warn = self._warn, lambda text: None  # what the thread says from here on helps nobody
            warn("W&B did not answer in time; metrics.jsonl is complete, and `wandb sync` may upload the rest")

    def _put(self, item: tuple[str, int, dict[str, Any]]) -> None:
        try:
            self._queue.put_nowait(item)
        except queue.Full:
            self._dropped += 1

    # ---- on the thread

    def _work(self) -> None:
        run = self._start()
        # W&B ignores a step below its latest. Two things would break that order: a run resumed behind the point that
        # W&B has seen (those steps are there already, and equal), and an image that comes before the metrics of its
        # own step, as these are one interval late (it waits here for them).
        first_step = latest = getattr(run, "starting_step", 0)
        images: list[tuple[int, dict[str, str]]] = []
        while (item := self._queue.get()) is not None:
            if run is None:
                continue  # emptying the queue is all that is left to do
            kind, step, values = item
            try:
                if kind == "image":
                    images.append((step, values))
                elif step >= first_step:
                    ready = [paths for at, paths in images if at <= step]
                    images = [(at, paths) for at, paths in images if at > step]
                    run.log(values | _load_images(ready), step=step)
                    latest = step
            except Exception as error:
                self._warn(f"W&B failed and is off from here on ({_one_line(error)}); metrics.jsonl goes on")
                run = None
        if run is None:
            return
        try:
            for step, paths in images:
                latest = max(step, latest)
                run.log(_load_images([paths]), step=latest)
            run.finish(exit_code=self._exit_code)
        except Exception as error:
            self._warn(f"W&B could not finish ({_one_line(error)}); metrics.jsonl is complete")

    def _start(self) -> Any:
        """A W&B run, online or else offline, or None."""
        try:
            run_id = _run_id(self._workdir / RUN_ID_FILE)
            if self._mode == "online":
                try:
                    return self._init(run_id, "online")
                except Exception as error:
                    self._warn(f"W&B cannot be reached, going on offline ({_one_line(error)}); `wandb sync` uploads it")
                    _forget_failed_start()
            return self._init(run_id, "offline")
        except Exception as error:
            self._warn(f"W&B is off for this run ({_one_line(error)}); metrics.jsonl has every step")
            return None

    def _init(self, run_id: str, mode: str) -> Any:
        import wandb

        # Never ask for a key: nobody may be sitting there, and the question would tear the status line.
        if mode == "online" and not wandb.login(prompt=False, verify=False):
            raise RuntimeError("no API key: run `wandb login`, or set --config.wandb.mode=offline")
        return wandb.init(
            id=run_id,
            resume="allow" if mode == "online" else None,  # offline, the same id is all that `wandb sync` needs
            mode=mode,
            project=self._project,
            name=self._name,
            config=self._config,
            dir=self._workdir,
            settings=wandb.Settings(
                init_timeout=self._init_timeout,
                finish_timeout=self._finish_timeout,
                console="off",  # leave stdout alone: the status line is redrawn in place
                silent=True,
            ),
        )


def _load_images(paths: list[dict[str, str]]) -> dict[str, Any]:
    if not paths:
        return {}
    import wandb

    return {name: wandb.Image(path) for group in paths for name, path in group.items()}


def _forget_failed_start() -> None:
    import wandb

    wandb.teardown()  # W&B's own process still holds the run id and would refuse it


def _run_id(path: Path) -> str:
    """The id in the file; the first call draws one and writes it."""
    try:
        if run_id := path.read_text().strip():
            return run_id
    except FileNotFoundError:
        pass
    run_id = "".join(secrets.choice(string.ascii_lowercase + string.digits) for _ in range(8))
    partial = path.with_name(path.name + ".partial")
    partial.write_text(run_id + "\n")
    os.replace(partial, path)
    return run_id


def _one_line(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:200]
