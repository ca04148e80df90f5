"""Checkpoints by Orbax: asynchronous, complete or absent, readable on any mesh.

    <workdir>/checkpoints/<step>/params     {name: array}
                                 ema        {decay: {name: array}}
                                 optimizer  AdamW's moments and counters, the loss scale
                                 meta       JSON: resolved config, geometry, place in the data, versions

The place in the data is a number, the examples seen: the order of data is a function of (seed, example index) alone, so
nothing of the input pipeline needs saving, and a run may resume on another machine shape.
"""

from __future__ import annotations

import dataclasses
import errno
import logging
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from jitjax import model as jit_model
from jitjax import sharding
from jitjax.errors import UserError
from jitjax.step import TrainState

DIRECTORY = "checkpoints"


class Checkpoints:
    """The checkpoints of one workdir."""

    def __init__(self, workdir: Path, *, keep_last: int = 1, keep_every: int | None = None):
        """`keep_last` newest are kept, and for good those whose step is a multiple of `keep_every`."""
        options = ocp.CheckpointManagerOptions(
            max_to_keep=keep_last,
            keep_period=keep_every,
            cleanup_tmp_directories=True,  # what a killed run left half written
            enable_async_checkpointing=True,
        )
        self._workdir = workdir
        self._manager = ocp.CheckpointManager((workdir / DIRECTORY).absolute(), options=options)

    def latest(self) -> int | None:
        """Step of the newest complete checkpoint."""
        return self._manager.latest_step()

    def require_space(self, state: TrainState) -> None:
        """Raises:
        UserError: the disk has not room for one more checkpoint. Orbax would find out half-way, and at length.
        """
        needed = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
        free = shutil.disk_usage(self._workdir).free
        if free < needed:
            raise UserError(
                f"--workdir={self._workdir}: no space for a checkpoint, which takes {needed / 2**20:,.0f} MiB where "
                f"{free / 2**20:,.0f} MiB are free; free some and run the same command again (earlier checkpoints are intact)"
            )

    def save(self, state: TrainState, step: int, meta: Mapping[str, Any]) -> None:
        """Copy the state to the host, return, and write behind the caller's back. The state may be donated at once.

        Raises:
          UserError: no space or no permission (also of the write before, which ended in the background).
        """
        self.require_space(state)
        args = dict(
            params=ocp.args.StandardSave(state.params),
            ema=ocp.args.StandardSave(state.ema),
            optimizer=ocp.args.StandardSave({"opt_state": state.opt_state, "loss_scale": state.loss_scale}),
            meta=ocp.args.JsonSave(dict(meta)),
        )
        with _disk_errors(self._workdir):
            self._manager.save(step, args=ocp.args.Composite(**args), force=True)

    def meta(self, step: int) -> dict[str, Any]:
        return self._manager.restore(step, args=ocp.args.Composite(meta=ocp.args.JsonRestore()))["meta"]

    def restore(self, step: int, like: TrainState) -> TrainState:
        """The state at `step`, laid out like `like` (a tree of shape structs with shardings)."""
        optimizer = {"opt_state": like.opt_state, "loss_scale": like.loss_scale}
        restored = self._manager.restore(
            step,
            args=ocp.args.Composite(
                params=ocp.args.StandardRestore(like.params),
                ema=ocp.args.StandardRestore(like.ema),
                optimizer=ocp.args.StandardRestore(optimizer),
            ),
        )
        # Onto the mesh also what is a scalar: Orbax may return those on one device only.
        place = jax.tree.map(lambda leaf: leaf.sharding, like.step)
        return TrainState(
            step=jax.device_put(np.int32(step), place),
            params=restored["params"],
            opt_state=restored["optimizer"]["opt_state"],
            ema=restored["ema"],
            loss_scale=restored["optimizer"]["loss_scale"],
        )

    def wait(self) -> None:
        """Until everything is on disk."""
        with _disk_errors(self._workdir):
            self._manager.wait_until_finished()

    def close(self) -> None:
        self.wait()
        self._manager.close()


class _disk_errors:
    """Turns "no space" and "no permission" into one line that names the workdir."""

    def __init__(self, workdir: Path):
        self._workdir = workdir

    def __enter__(self):
        return self

    def __exit__(self, kind, error, trace):
        text = str(error)
        full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
        if full or "No space left" in text or "RESOURCE_EXHAUSTED" in text:
            raise UserError(
                f"--workdir={self._workdir}: no space left for a checkpoint; free some and run the same command again "
                "(earlier checkpoints are intact)"
            ) from error
        if isinstance(error, PermissionError) or "Permission denied" in text:
            raise UserError(f"--workdir={self._workdir}: no permission to write checkpoints there") from error


@dataclasses.dataclass(frozen=True)
class Weights:
    """What a checkpoint holds apart from the optimizer."""

    params: jit_model.Params
    ema: dict[str, jit_model.Params]
    meta: dict[str, Any]
    step: int

    @property
    def geometry(self) -> jit_model.Geometry:
        return jit_model.Geometry(**self.meta["geometry"])


def find(path: str | Path) -> tuple[Path, int]:
    """Workdir and step that `path` means: a workdir (its newest checkpoint), its `checkpoints` folder or one checkpoint.

    Raises:
      UserError: there is no complete checkpoint.
    """
    path = Path(path).expanduser().absolute()
    if path.name.isdigit() and path.parent.name == DIRECTORY:
        workdir, step = path.parent.parent, int(path.name)
    else:
        workdir, step = path.parent if path.name == DIRECTORY else path, None
    folder = workdir / DIRECTORY
    steps = ocp.utils.checkpoint_steps(folder) if folder.is_dir() else []
    if not steps or (step is not None and step not in steps):
        have = f"; complete steps there: {', '.join(map(str, sorted(steps)))}" if steps else ""
        raise UserError(f"no complete checkpoint at {path}: give a workdir or <workdir>/{DIRECTORY}/<step>{have}")
    return workdir, max(steps) if step is None else step


def load_weights(path: str | Path, mesh: jax.sharding.Mesh | None = None) -> Weights:
    """Parameters and averages of a workdir's newest checkpoint or of one checkpoint, on `mesh` (default: one device).

    Raises:
      UserError: nothing complete at `path`.
    """
    workdir, step = find(path)
    mesh = mesh or jax.sharding.Mesh(np.asarray(jax.local_devices()[:1]).reshape(1, 1), sharding.AXES)
    options = ocp.CheckpointManagerOptions(read_only=True)
    with ocp.CheckpointManager((workdir / DIRECTORY).absolute(), options=options) as manager:
        meta = manager.restore(step, args=ocp.args.Composite(meta=ocp.args.JsonRestore()))["meta"]
        geometry = jit_model.Geometry(**meta["geometry"])
        like = sharding.abstract(jax.eval_shape(jit_model.init_fn(geometry), jax.random.key(0)), mesh)
        restored = manager.restore(
            step,
            args=ocp.args.Composite(
                params=ocp.args.StandardRestore(like),
                ema=ocp.args.StandardRestore({decay: like for decay in meta["ema_decays"]}),
            ),
        )
    return Weights(restored["params"], restored["ema"], meta, step)


def load_model(path: str | Path, which: str = "") -> jit_model.JiT:
    """A module with the weights of a workdir's newest checkpoint or of one checkpoint, ready for `jitjax.sample`.

    Args:
      path: a workdir or <workdir>/checkpoints/<step>.
      which: a decay, e.g. "0.9999", or "params" for the weights that the optimizer moves; "": the slowest average.

    Raises:
      UserError: nothing complete at `path`, or no such average in it.
    """
    weights = load_weights(path)
    choices = {"params": weights.params, **weights.ema}
    which = which or max(weights.ema, key=float)
    if which not in choices:
        raise UserError(f"{path} has no weights {which!r}: it has {', '.join(choices)}")
    return jit_model.merge(jit_model.graphdef_of(weights.geometry), choices[which])


def check_fits(meta: Mapping[str, Any], geometry: jit_model.Geometry, decays: Iterable[float], workdir: Path) -> None:
    """Raises:
    UserError: the checkpoint's model has other shapes than `geometry`, or other averages; names what differs.
    """
    wanted = dataclasses.asdict(geometry)
    differing = [f"{k}: {v} -> {wanted[k]}" for k, v in meta["geometry"].items() if "dropout" not in k and v != wanted[k]]
    if sorted(meta["ema_decays"]) != sorted(map(str, decays)):
        differing.append(f"optim.ema_decays: ({','.join(meta['ema_decays'])}) -> ({','.join(map(str, decays))})")
    if differing:
        raise UserError(
            f"--workdir={workdir} holds checkpoints of another model ({'; '.join(differing)}): set these fields to the "
            "checkpoint's, or use another workdir and --config.init_from to start from these weights"
        )


def describe(geometry: jit_model.Geometry, state_ema: Mapping[str, Any], **more: Any) -> dict[str, Any]:
    """The part of `meta` that `load_weights` needs, joined with `more` (config, place in the data, ...)."""
    return {
        "geometry": dataclasses.asdict(geometry),
        "ema_decays": sorted(state_ema),
        "versions": {"jax": jax.__version__, "numpy": np.__version__, "orbax-checkpoint": ocp.__version__},
        **more,
    }


def quiet() -> None:
    """Orbax reports every phase of every save and warns of its own defaults; a run's own log says what the user needs."""
    logging.getLogger("absl").setLevel(logging.ERROR)  # absl's own set_verbosity would silence our warnings too
