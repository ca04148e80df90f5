"""One HTML file about one or several runs, from the files in their workdirs: `jitjax report`. Imports no JAX.

The page is `report.html` beside this file with plotly.js, the runs' numbers and their grids put in. It opens from a disk and
fetches nothing; its content security policy would not let it.
"""

from __future__ import annotations

import array
import base64
import collections
import contextlib
import dataclasses
import datetime
import html
import io
import json
import math
import os
import string
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from scipy.ndimage import uniform_filter1d

from jitjax import atomic, settings, timing
from jitjax.errors import UserError
from jitjax.monitor.metrics import read_records
from jitjax.monitor.view import duration
from jitjax.workdir import BEST_FILE

MOST_POINTS = 1000  # of a curve on the page
SMOOTHED = 50  # the mean drawn over a noisy curve is over this part of the run's steps
MOST_GRIDS = 40  # of one run
LARGEST_PNG = 100_000  # bytes; larger grids become WebP
LARGEST_SIDE = 1280  # pixels; larger grids are scaled down
LOG_LINES = 40
LOSS_AT = "eval/loss_t"  # held-out loss at one time t, e.g. eval/loss_t0.11
SPREAD = "_std"  # a score's standard deviation has its name and this
HIGHER_IS_BETTER = ("inception_score", "is_", "precision", "recall")
LOWER_IS_BETTER = ("fid", "sfid", "fd_", "kid", "mind")
# Metric: title, and how it is drawn: "log"arithmic, as a "share" in percent, from "zero", "noisy" with a mean over it.
PANELS = {
    "train/loss": ("Loss", "log noisy"),
    "train/epoch_loss": ("Loss, mean of each epoch", "log"),
    "eval/loss": ("Held-out loss", "log"),
    "train/learning_rate": ("Learning rate", "zero"),
    "train/grad_norm": ("Gradient norm", "log noisy"),
    "train/samples_per_second": ("Images per second", ""),
    "perf/mfu": ("Model FLOPs utilisation (MFU)", "share"),
    "perf/data_wait": ("Time waiting for input", "share"),
    "perf/peak_memory_gib": ("Peak device memory, GiB", ""),
}
# What time.json counts.
SPENT = {
    "step": "training steps",
    "input_wait": "waiting for input",
    "compile": "compiling",
    "startup": "starting",
    "save": "saving checkpoints",
    "preview": "previews",
    "evaluation": "scores",
    "lost": "steps repeated after a crash",
}
# What config.json records beside the settings.
FACTS = {
    "device_kind": "device",
    "devices": "devices",
    "parameters": "parameters",
    "effective_batch": "effective batch, images",
    "images_per_epoch": "images per epoch",
    "steps_per_epoch": "steps per epoch",
    "planned_steps": "planned steps",
}


@dataclasses.dataclass(frozen=True)
class Run:
    """What the files of a workdir say.

    Attributes:
      settings: as they were resolved, by dotted name. facts: what `FACTS` names.
      curves: (steps, values) of each metric and score, finite values only.
      step: the last one written. not_finite: optimizer steps without a finite loss.
      grids: (step, file) of the previews.
      seconds: by kind, see `timing.KINDS`. starts: how often the run was started.
      log: the end of log.txt.
    """

    name: str
    settings: dict[str, Any]
    facts: dict[str, Any]
    versions: dict[str, str]
    curves: dict[str, tuple[np.ndarray, np.ndarray]]
    step: int
    not_finite: int
    best: dict[str, Any]
    grids: list[tuple[int, Path]]
    seconds: dict[str, float]
    starts: int
    log: list[str]


def write_report(workdirs: Sequence[str | os.PathLike], out: str | os.PathLike | None = None) -> Path:
    """Writes the report of these runs and returns its path.

    Args:
      workdirs: of the runs, finished or not.
      out: the file; default `report.html` in the first workdir. A file of that name is replaced.

    Raises:
      UserError: plotly is not installed, a folder is not a run's, or the file cannot be written.
    """
    try:
        from plotly.offline import get_plotlyjs
    except ImportError:
        raise UserError("a report needs the plotly package: pip install -e '.[report]' in jitjax's folder") from None
    paths = [Path(workdir).expanduser() for workdir in workdirs]
    out = paths[0] / "report.html" if out is None else Path(out).expanduser()
    if out.suffix.lower() not in (".html", ".htm"):
        raise UserError(f"--out={out}: use FILE.html")
    runs = [read_run(path, name) for path, name in zip(paths, _names(paths), strict=True)]
    template = string.Template((Path(__file__).parent / "report.html").read_text(encoding="utf-8"))
    page = template.substitute(
        title=_text(", ".join(run.name for run in runs)),
        made=_text(datetime.datetime.now().astimezone().isoformat(sep=" ", timespec="minutes")),
        overview=_table(runs, {run.name: _overview(run) for run in runs}),
        spent=_spent(runs),
        settings=_settings(runs),
        environment=_table(runs, {run.name: _environment(run) for run in runs}, mark=True),
        logs="".join(
            f"<details><summary>{_text(run.name)}</summary><pre>{_text(''.join(run.log))}</pre></details>" for run in runs
        ),
        data=json.dumps(_data(runs), allow_nan=False).replace("</", "<\\/"),
        plotly=get_plotlyjs(),
    )
    try:
        atomic.write_text(out, page)
    except OSError as error:
        raise UserError(f"--out={out} cannot be written ({error.strerror}): choose another") from None
    return out


# ---------------------------------------------------------------- reading a run


def read_run(workdir: Path, name: str) -> Run:
    """A run from its workdir, also while it is written.

    Raises:
      UserError: a file is missing or not readable.
    """
    try:
        config, versions, spent, best = (
            _json(workdir / file) for file in ("config.json", "versions.json", timing.FILE, BEST_FILE)
        )
        if "model" not in config:
            raise ValueError("there is no config.json of a run")
        records = _Curves(workdir / "metrics.jsonl")  # without a file: not at its first step yet
        curves = records.arrays() | _Curves(workdir / "scores.jsonl", upto=records.step).arrays()
        log = workdir / "log.txt"
        lines = log.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True) if log.exists() else []
    except (OSError, ValueError) as error:
        raise UserError(f"{workdir}: {error}: give the workdir of a run") from None
    previews = (workdir / "samples").glob("step_*.png")
    steps = ((path.stem.removeprefix("step_"), path) for path in previews)
    return Run(
        name=name,
        settings={key: value for key, value in settings.flatten(config) if key in settings.fields()},
        facts={key: config[key] for key in FACTS if config.get(key) is not None},
        versions=versions,
        curves=curves,
        step=records.step,
        not_finite=records.not_finite,
        best=best,
        grids=sorted((int(step), path) for step, path in steps if step.isdigit() and int(step) <= records.step),
        seconds=spent.get("seconds", {}),
        starts=spent.get("starts", 0),
        log=lines[-LOG_LINES:],
    )


class _Curves:
    """The numbers of a file with one JSON object a line, by name. A run that went back to a checkpoint scores its steps
    again: later lines replace earlier ones of the same step or a later one."""

    def __init__(self, path: Path, upto: float = math.inf):
        self.step, self.not_finite = 0, 0
        self._columns: dict[str, tuple[array.array, array.array]] = collections.defaultdict(
            lambda: (array.array("q"), array.array("d"))
        )
        for record in read_records(path) if path.exists() else ():
            step = record.pop("step")
            if step > upto:
                continue
            self.step = step
            self.not_finite += "train/loss" in record and record["train/loss"] is None
            for name, value in record.items():
                if isinstance(value, int | float) and math.isfinite(value):
                    steps, values = self._columns[name]
                    while steps and steps[-1] >= step:
                        steps.pop(), values.pop()
                    steps.append(step), values.append(value)

    def arrays(self) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        return {name: (np.array(steps), np.array(values)) for name, (steps, values) in self._columns.items()}


def _json(path: Path) -> dict[str, Any]:
    """A file's object, {} without a file.

    Raises:
      ValueError: it holds something else; names the file.
    """
    if not path.exists():
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path.name} cannot be read ({error})") from None
    if not isinstance(found, dict):
        raise ValueError(f"{path.name} cannot be read (it holds no object)")
    return found


def _names(paths: Sequence[Path]) -> list[str]:
    """The folders' own names, or their paths where two are called the same."""
    short = [path.resolve().name for path in paths]
    return short if len(set(short)) == len(short) else [str(path) for path in paths]


# ---------------------------------------------------------------- curves and grids


def _data(runs: Sequence[Run]) -> dict[str, Any]:
    """What the page's script draws."""
    names = dict.fromkeys(name for run in runs for name in run.curves)
    scores = [
        name
        for name in names
        if name.startswith("eval/") and name not in PANELS and not name.startswith(LOSS_AT) and not name.endswith(SPREAD)
    ]
    panels = []
    for name in [*PANELS, *scores]:
        title, kind = PANELS.get(name, (_score_title(name), "points"))
        traces = [trace for number, run in enumerate(runs) for trace in _traces(run, number, name, kind)]
        if traces:
            panels.append({"title": title, "name": name, "kind": kind, "traces": traces})
    if len(runs) == 1 and (times := [name for name in names if name.startswith(LOSS_AT)]):
        traces = [{**_traces(runs[0], 0, name, "")[0], "name": f"t = {name.removeprefix(LOSS_AT)}"} for name in times]
        title = "Held-out loss by time (t = 1: no noise)"
        panels.append({"title": title, "name": f"{LOSS_AT}*", "kind": "log legend", "traces": traces})
    units = [
        {
            "images": run.facts.get("effective_batch"),
            "epochs": 1 / run.facts["steps_per_epoch"] if run.facts.get("steps_per_epoch") else None,
        }
        for run in runs
    ]
    return {"runs": [run.name for run in runs], "units": units, "panels": panels, "grids": [_pictures(run) for run in runs]}


def _score_title(name: str) -> str:
    score = name.removeprefix("eval/")
    direction = (
        "higher is better"
        if score.startswith(HIGHER_IS_BETTER)
        else "lower is better"
        if score.startswith(LOWER_IS_BETTER)
        else ""
    )
    return score.replace("_", " ") + (f" ({direction})" if direction else "")


def _traces(run: Run, number: int, name: str, kind: str) -> list[dict[str, Any]]:
    """The curve of one metric; of a noisy one the values, faint, and a centred mean over them."""
    steps, values = run.curves.get(name, ((), ()))
    if not len(steps):
        return []
    window = len(steps) // SMOOTHED if "noisy" in kind else 1
    every = _extremes(values)
    curves = [(run.name, every, values)]
    if window > 1:
        at = np.unique(np.linspace(0, len(steps) - 1, MOST_POINTS).round().astype(int))
        curves.append((f"{run.name}, mean of {window} steps", at, uniform_filter1d(values, window, mode="nearest")))
    traces = [
        {"run": number, "name": text, "x": steps[at].tolist(), "y": [float(f"{value:.6g}") for value in drawn[at]]}
        for text, at, drawn in curves
    ]
    if window > 1:
        traces[0]["faint"] = True
    if name + SPREAD in run.curves:
        traces[0]["error"] = run.curves[name + SPREAD][1][every].tolist()
    return traces


def _extremes(values: np.ndarray) -> np.ndarray:
    """Indices of the least and greatest of each of `MOST_POINTS` / 2 stretches, so that thinning hides no spike."""
    if len(values) <= MOST_POINTS:
        return np.arange(len(values))
    stretches = np.array_split(np.arange(len(values)), MOST_POINTS // 2)
    return np.unique([at[pick(values[at])] for at in stretches for pick in (np.argmin, np.argmax)] + [0, len(values) - 1])


def _pictures(run: Run) -> list[dict[str, Any]]:
    """At most `MOST_GRIDS` previews, evenly through the run and the last one among them, as data URIs. One that cannot be read,
    as a crash of the machine may leave it, is left out."""
    chosen = np.unique(np.linspace(0, len(run.grids) - 1, min(MOST_GRIDS, len(run.grids))).round().astype(int))
    found = []
    for i in chosen:
        with contextlib.suppress(OSError, SyntaxError, ValueError):  # as Pillow raises for damaged ones
            found.append({"step": run.grids[i][0], **_picture(run.grids[i][1])})
    return found


def _picture(path: Path) -> dict[str, Any]:
    content, kind = path.read_bytes(), "png"
    with Image.open(io.BytesIO(content)) as image:
        width = image.width
        if len(content) > LARGEST_PNG:
            image = image.convert("RGB")
            image.thumbnail((LARGEST_SIDE, LARGEST_SIDE))
            buffer = io.BytesIO()
            image.save(buffer, "WEBP", quality=90, method=4)
            content, kind = buffer.getvalue(), "webp"
            width = image.width
    return {"width": width, "src": f"data:image/{kind};base64,{base64.b64encode(content).decode()}"}


# ---------------------------------------------------------------- tables


def _text(value: Any) -> str:
    return html.escape(str(value))


def _shown(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:,.6g}" if abs(value) < 1e6 else f"{value:.4g}"
    if isinstance(value, list):
        return ", ".join(map(_shown, value)) or "none"
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    return {None: "unset", "": "''"}.get(value, str(value))


def _table(runs: Sequence[Run], columns: Mapping[str, Mapping[str, Any]], *, mark: bool = False, titles: Any = None) -> str:
    """Rows of labels and one value a run. `columns`: {run: {label: value}}; `mark` the rows in which runs differ."""
    labels = dict.fromkeys(label for column in columns.values() for label in column)
    head = "".join(f"<th>{_text(name)}</th>" for name in columns) if len(runs) > 1 else ""
    rows = []
    for label in labels:
        cells = [_shown(column[label]) if label in column else "" for column in columns.values()]
        differs = ' class="differs"' if mark and len(set(cells)) > 1 else ""
        title = f' title="{_text(titles[label])}"' if titles and label in titles else ""
        rows.append(f"<tr{differs}><th{title}>{_text(label)}</th>{''.join(f'<td>{_text(cell)}</td>' for cell in cells)}</tr>")
    head = f"<thead><tr><th></th>{head}</tr></thead>" if head else ""
    return f'<div class="wide"><table>{head}<tbody>{"".join(rows)}</tbody></table></div>'


def _overview(run: Run) -> dict[str, str]:
    total, batch, epoch = (run.facts.get(key) for key in ("planned_steps", "effective_batch", "steps_per_epoch"))
    last = {name: float(values[-1]) for name, (_, values) in run.curves.items()}
    seconds = sum(run.seconds.values())
    size = f"{run.settings.get('data.image_size')} px"
    rows: dict[str, str | None] = {
        "model": f"{run.settings.get('model.name')}, {size}",
        "progress": f"step {run.step:,}" + (f" of {total:,} ({100 * run.step // total}%)" if total else ""),
        "epochs": f"{run.step / epoch:,.2f}" if epoch else None,
        "images seen": f"{run.step * batch:,}" if batch else None,
        "loss": _loss(run),
        "steps without a finite loss": f"{run.not_finite:,}" if run.not_finite else None,
        "held-out loss": f"{last['eval/loss']:.4f}" if "eval/loss" in last else None,
        "best score": f"{run.best['metric'].removeprefix('eval/')} {run.best['value']:.4g} at step {run.best['step']:,}"
        if run.best
        else None,
        "images per second": f"{last['train/samples_per_second']:,.1f}" if "train/samples_per_second" in last else None,
        "MFU": f"{last['perf/mfu']:.1%}" if "perf/mfu" in last else None,
        "time": f"{duration(seconds)}" + (f" in {run.starts} starts" if run.starts > 1 else "") if seconds else None,
    }
    return {label: text for label, text in rows.items() if text is not None}


def _loss(run: Run) -> str | None:
    steps, values = run.curves.get("train/loss", ((), ()))
    if not len(steps):
        return None
    last = min(len(values), max(1, len(values) // SMOOTHED))
    return f"{values[-last:].mean():.4f}" + (f" (mean of the last {last} steps)" if last > 1 else "")


def _spent(runs: Sequence[Run]) -> str:
    """Seconds and shares by kind, each with a bar, and the goodput."""
    rows = []
    for kind, text in SPENT.items():
        cells = ""
        for run in runs:
            seconds, total = run.seconds.get(kind, 0.0), sum(run.seconds.values())
            share = 100 * seconds / total if total else 0.0
            cells += f'<td class="bar" style="--share:{share:.2f}%">{share:.1f}% <span>{_text(duration(seconds))}</span></td>'
        rows.append(f"<tr><th>{_text(text)}</th>{cells}</tr>")
    rows.append(
        "<tr><th>in all</th>" + "".join(f"<td>{_text(duration(sum(run.seconds.values())))}</td>" for run in runs) + "</tr>"
    )
    head = "".join(f"<th>{_text(run.name)}</th>" for run in runs) if len(runs) > 1 else ""
    head = f"<thead><tr><th></th>{head}</tr></thead>" if head else ""
    return f'<div class="wide"><table>{head}<tbody>{"".join(rows)}</tbody></table></div>'


def _settings(runs: Sequence[Run]) -> str:
    """What differs: between the runs, or of a single one from the defaults. Then everything."""
    fields = settings.fields()
    helps = {name: field.rule.help for name, field in fields.items()}

    def shown(names: Iterable[str]) -> str:
        return _table(
            runs, {run.name: {name: run.settings[name] for name in names if name in run.settings} for run in runs}, titles=helps
        )

    names = [name for name in fields if any(name in run.settings for run in runs)]
    if len(runs) > 1:
        differing = [name for name in names if len({_shown(run.settings.get(name)) for run in runs}) > 1]
        text = "What differs between the runs:" if differing else "The runs have the same settings."
    else:
        (run,) = runs
        defaults = {
            name: list(field.default) if isinstance(field.default, tuple) else field.default for name, field in fields.items()
        }
        differing = [name for name in names if name in run.settings and run.settings[name] != defaults[name]]
        text = "What differs from the defaults:"
    return (
        f"<p>{text}</p>{shown(differing) if differing else ''}"
        f"<details><summary>All {len(names)} settings</summary>{shown(names)}</details>"
    )


def _environment(run: Run) -> dict[str, Any]:
    return {text: run.facts[key] for key, text in FACTS.items() if key in run.facts} | run.versions
