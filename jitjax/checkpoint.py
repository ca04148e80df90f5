"""Checkpoints by Orbax: where they lie, whether they are whole, and reading them on any mesh. Writing: `jitjax.saving`.

    <workdir>/checkpoints/<step>/params          {name: array}
                                 ema             {decay: {name: array}}
                                 optimizer       moments and counters, the loss scale
                                 meta            JSON: resolved config, geometry, position in the data, versions
                                 checksums.json  size and digest of every file, the step, the run (`jitjax.manifest`)
    <workdir>/run.json                           the run's identity, and the last step that was saved
    <workdir>/best.json                          which checkpoint has the best score; <workdir>/checkpoints/best means it
    <workdir>/scores.jsonl                       all scores: a checkpoint is saved before its step is scored

The position in the data is a number, the examples seen: the order of data is a function of (seed, example index) alone, so
nothing of the input pipeline needs saving, and a run may resume on another machine shape.

Every read verifies the checksums first. Where the newest checkpoint is damaged, incomplete or of another run, one line names
it and the reason, and the one before is taken; where none is whole, the run stops.
"""

from __future__ import annotations

import dataclasses
import errno
import json
import logging
import math
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from jitjax import finite, manifest, sharding
from jitjax import model as jit_model
from jitjax.errors import UserError
from jitjax.geometry import Geometry
from jitjax.monitor.metrics import read_records
from jitjax.settings import Optimizer
from jitjax.step import TrainState
from jitjax.workdir import BEST_FILE

DIRECTORY = "checkpoints"
RUN_FILE = "run.json"
BEST = "best"
SCORES_FILE = "scores.jsonl"  # of a run: one line an evaluation
_ATTEMPTS = 10  # to read the newest checkpoint of a run that goes on and deletes it meanwhile
ITEMS = ("params", "ema", "optimizer", "meta")
_log = logging.getLogger(__name__)


def steps_in(folder: Path) -> list[int]:
    """Steps that have a folder in `folder`, whole or not, ascending."""
    try:
        return sorted(int(path.name) for path in folder.iterdir() if path.name.isdecimal() and path.is_dir())
    except FileNotFoundError:
        return []


def defect(folder: Path, run: str | None) -> str | None:
    """Why the checkpoint in `folder` cannot be used, in a few words; None if it is whole. Reads every byte.

    Args:
      folder: <workdir>/checkpoints/<step>.
      run: identifier of the run that must have written it; None: any.
    """
    if missing := [item for item in ITEMS if not (folder / item).is_dir()]:
        return f"incomplete: no {', '.join(missing)}"
    try:
        known = manifest.read(folder)
        if known is None:
            meta = read_meta(folder)
            if "checksums" in meta:
                return f"{manifest.FILE} is missing"
            if meta.get("examples") and int(folder.name) and meta["examples"] % int(folder.name):
                return "it is a copy of another step's"
            _log.warning("checkpoint %s has no checksums (written by jitjax 0.1.0): its bytes cannot be verified", folder.name)
            return None
    except ValueError as error:
        return reason_of(error)
    except Exception as error:
        return f"its meta cannot be read ({reason_of(error)})"
    if known["step"] != int(folder.name):
        return f"it is a copy of step {known['step']:,}"
    if run is not None and known["run"] != run:
        return "it was written by another run"
    return manifest.defect(folder, known)


def report_skipped(folder: Path, reason: str) -> None:
    """Warn that the checkpoint in `folder` is not used."""
    _log.warning("checkpoint %s is not used: %s", folder, reason)


def read_items(folder: Path, **items: Any) -> Any:
    """Items of the checkpoint in `folder`, by Orbax."""
    with ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as reader:
        return reader.restore(folder, args=ocp.args.Composite(**items))


def restore(folder: Path, like: TrainState) -> TrainState:
    """The state in <workdir>/checkpoints/<step>, laid out like `like` (a tree of shape structs with shardings). Its checksums
    are not looked at, see `defect`."""
    optimizer = {"opt_state": like.opt_state, "loss_scale": like.loss_scale}
    restored = read_items(
        folder,
        params=ocp.args.StandardRestore(like.params),
        ema=ocp.args.StandardRestore(like.ema),
        optimizer=ocp.args.StandardRestore(optimizer),
    )
    # Onto the mesh also what is a scalar: Orbax may return those on one device only.
    place = jax.tree.map(lambda leaf: leaf.sharding, like.step)
    return TrainState(
        step=jax.device_put(np.int32(folder.name), place),
        params=restored["params"],
        opt_state=restored["optimizer"]["opt_state"],
        ema=restored["ema"],
        loss_scale=restored["optimizer"]["loss_scale"],
    )


def read_meta(folder: Path) -> dict[str, Any]:
    """What the checkpoint in <workdir>/checkpoints/<step> records, with the scores of its step, which may have come later."""
    meta = read_items(folder, meta=ocp.args.JsonRestore())["meta"]
    scores = None if "scores" in meta else scores_of(folder.parent.parent, int(folder.name))
    return meta | {"scores": scores} if scores else meta


def scores_of(workdir: Path, step: int) -> dict[str, float] | None:
    """The newest scores during training of that step, by name ("eval/..."); None where there are none."""
    line = score_line(workdir, step)
    return line and {k: math.nan if x is None else x for k, x in line.items() if k.startswith("eval/")}


def score_line(workdir: Path, step: int) -> dict[str, Any] | None:
    """The newest line of scores.jsonl for that step."""
    try:
        return ([line for line in read_records(workdir / SCORES_FILE) if line["step"] == step] or [None])[-1]
    except OSError:
        return None


def read_run(workdir: Path) -> dict[str, Any] | None:
    """What run.json of a workdir says: {"run": identifier, "saved": last step saved or None}; None where there is no file.

    Raises:
      UserError: the file is damaged.
    """
    file = workdir / RUN_FILE
    try:
        run = json.loads(file.read_text())
        return {"run": str(run["run"]), "saved": run["saved"]}
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{file} is damaged ({reason_of(error)}): delete it, it is made again from the checkpoints") from None


def reason_of(error: BaseException | None) -> str:
    """One line about an exception of Orbax, TensorStore or the system, whose own texts have up to 314 lines."""
    text = str(error)
    full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
    full = full or ("RESOURCE_EXHAUSTED" in text and not isinstance(error, jax.errors.JaxRuntimeError))  # XLA's is of memory
    if full or "No space left" in text:
        return "no space left for a checkpoint"
    if isinstance(error, PermissionError) or "Permission denied" in text or "PERMISSION_DENIED" in text:
        return "no permission to write checkpoints there"
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror}: {error.filename}" if error.filename else error.strerror
    if isinstance(error, UserError):
        return text
    first = text.strip().splitlines()[0].strip() if text.strip() else ""
    first = first if len(first) <= 160 else first[:157] + "..."
    return first if isinstance(error, ValueError) else f"{type(error).__name__}: {first}".rstrip(": ")


@dataclasses.dataclass(frozen=True)
class Weights:
    """What a checkpoint holds apart from the optimizer."""

    params: jit_model.Params
    ema: dict[str, jit_model.Params]
    meta: dict[str, Any]
    step: int

    @property
    def geometry(self) -> Geometry:
        return Geometry(**self.meta["geometry"])


def find(path: str | Path) -> tuple[Path, int]:
    """Workdir and step that `path` means: a workdir (its newest whole checkpoint), its `checkpoints` folder, one checkpoint,
    or `best`.

    Every byte of the checkpoint is read and verified; newer ones that are not whole are named in a warning.

    Raises:
      UserError: there is no whole checkpoint, or the one that `path` names is not.
    """
    asked, path, workdir = path, Path(path).expanduser().absolute(), workdir_of(path)
    if means_best(path):
        best = read_best(workdir)
        if best is None:
            raise UserError(f"{path}: no checkpoint of this run was scored, so none is the best (--config.eval.every_epochs)")
        path = workdir / DIRECTORY / str(best["step"])
    step = int(path.name) if path.name.isdecimal() and path.parent.name == DIRECTORY else None
    folder = workdir / DIRECTORY
    steps = steps_in(folder)
    if not steps or (step is not None and step not in steps):
        have = f"; steps there: {', '.join(map(str, steps))}" if steps else ""
        raise UserError(f"no complete checkpoint at {path}: give a workdir or <workdir>/{DIRECTORY}/<step>{have}")
    run = (read_run(workdir) or {}).get("run")
    for candidate in reversed(steps) if step is None else [step]:
        reason = defect(folder / str(candidate), run)
        if reason is not None and candidate not in steps_in(folder):  # a live run has deleted it meanwhile
            return find(asked)
        if reason is None:
            if step is None and candidate != steps[-1]:
                _log.warning("step %d is used instead", candidate)
            return workdir, candidate
        if step is not None:
            others = [str(other) for other in steps if other != step]
            raise UserError(
                f"the checkpoint {path} cannot be used: {reason}" + (f"; other steps: {', '.join(others)}" if others else "")
            )
        report_skipped(folder / str(candidate), reason)
    raise UserError(f"none of the checkpoints in {folder} ({', '.join(map(str, steps))}) is whole: restore one from a copy")


def workdir_of(path: str | Path) -> Path:
    """The workdir that a path to it, to its folder of checkpoints, to one of them or to `best` lies in."""
    path = Path(path).expanduser().absolute()
    best = means_best(path)
    if path.parent.name == DIRECTORY and (path.name.isdecimal() or best):
        return path.parent.parent
    return path.parent if path.name == DIRECTORY or best else path


def means_best(path: Path) -> bool:
    """Whether a path means the best checkpoint: the name `best` where nothing is called so (a workdir may be)."""
    return path.name == BEST and not os.path.exists(path)


def read_best(workdir: Path) -> dict[str, Any] | None:
    """What best.json of a workdir says: {"step", "metric", "value", "how"}; None where there is no file.

    Raises:
      UserError: the file is damaged.
    """
    try:
        return json.loads((workdir / BEST_FILE).read_text())
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise UserError(
            f"{workdir / BEST_FILE} is unreadable ({error}): delete it to go on without a best checkpoint"
        ) from None


def load_weights(path: str | Path, mesh: jax.sharding.Mesh | None = None) -> Weights:
    """Parameters and EMAs of a workdir's newest whole checkpoint or of one checkpoint, on `mesh` (default: one device).

    Raises:
      UserError: nothing whole at `path`, or the numbers in it are not finite.
    """
    for left in reversed(range(_ATTEMPTS)):
        workdir, step = find(path)
        folder = workdir / DIRECTORY / str(step)
        try:
            return _read_weights(folder, step, mesh)
        except UserError:
            if not left or folder.is_dir():  # else a live run has deleted it meanwhile: there is a newer one
                raise
    raise AssertionError


def _read_weights(folder: Path, step: int, mesh: jax.sharding.Mesh | None) -> Weights:
    mesh = mesh or jax.sharding.Mesh(np.asarray(jax.local_devices()[:1]).reshape(1, 1, 1), sharding.AXES)
    try:
        meta = read_meta(folder)
        geometry = Geometry(**meta["geometry"])
        like = sharding.abstract(jax.eval_shape(jit_model.init_fn(geometry), jax.random.key(0)), mesh)
        restored = read_items(
            folder,
            params=ocp.args.StandardRestore(like),
            ema=ocp.args.StandardRestore({decay: like for decay in meta["ema_decays"]}),
        )
    except Exception as error:  # without checksums (jitjax 0.1.0) damage shows only here
        raise UserError(f"the checkpoint {folder} cannot be read ({reason_of(error)}): use another") from error
    if not bool(finite.all_finite({"weights": (restored["params"], restored["ema"])})["weights"]):
        raise UserError(f"the checkpoint {folder} holds weights that are not finite: use an earlier one")
    params, *emas = map(jit_model.without_class_head, (restored["params"], *restored["ema"].values()))
    meta = {**meta, "geometry": {**meta["geometry"], "class_head": False}}
    return Weights(params, dict(zip(restored["ema"], emas, strict=True)), meta, step)


def check_fits(meta: Mapping[str, Any], geometry: Geometry, names: Iterable[str], optim: Optimizer, workdir: Path) -> None:
    """Raises:
    UserError: the checkpoint's model has other shapes than `geometry`, other EMAs than `names`, or the state of another
      optimizer; names what differs.
    """
    wanted = dataclasses.asdict(geometry)
    differing = [f"{k}: {v} -> {wanted[k]}" for k, v in meta["geometry"].items() if "dropout" not in k and v != wanted[k]]
    if meta["geometry"].get("class_head", False) != geometry.class_head:
        differing = ["model.class_loss: " + ("off -> on" if geometry.class_head else "on -> off")]
    names = tuple(names)
    if sorted(meta["ema_decays"]) != sorted(names):
        differing.append(f"optim.ema_decays: ({','.join(meta['ema_decays'])}) -> ({','.join(names)})")
    what = "model" if differing else "optimizer"
    before = {"name": "adamw", "muon_adaln": False} | meta.get("config", {}).get("optim", {})
    if before["name"] != optim.name:
        differing.append(f"optim.name: {before['name']} -> {optim.name}")
    elif optim.name == "muon" and before["muon_adaln"] != optim.muon_adaln:
        differing.append(f"optim.muon_adaln: {before['muon_adaln']} -> {optim.muon_adaln}")
    if differing:
        raise UserError(
            f"--workdir={workdir} holds checkpoints of another {what} ({'; '.join(differing)}): set these fields to the "
            "checkpoint's, or use another workdir and --config.init_from to start from these weights"
        )


def describe(geometry: Geometry, state_ema: Mapping[str, Any], **more: Any) -> dict[str, Any]:
    """The part of `meta` that `load_weights` needs, joined with `more` (config, position in the data, ...)."""
    return {
        "geometry": dataclasses.asdict(geometry),
        "ema_decays": sorted(state_ema),
        "versions": {"jax": jax.__version__, "numpy": np.__version__, "orbax-checkpoint": ocp.__version__},
        **more,
    }


def quiet() -> None:
    """Drop what Orbax logs: every phase of every save, warnings of its own defaults, and up to 314 lines a failure, which
    this module reports in one. Other users of absl's logger are not affected."""
    logger = logging.getLogger("absl")
    if not any(isinstance(known, _NotOrbax) for known in logger.filters):
        logger.addFilter(_NotOrbax())


class _NotOrbax(logging.Filter):
    def filter(self, record: logging.LogRecord) -> bool:
        return f"{os.sep}orbax{os.sep}" not in record.pathname
