"""Measured speeds, which an estimate rests on: this program's train step by model and card, a run's own, one measured now.

Speeds are held as utilisation, the share of a card's datasheet operations that training uses, so that one measured on one model
says something about another.
"""

from __future__ import annotations

import dataclasses
import json
import re
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jitjax import cards, timing
from jitjax.errors import UserError
from jitjax.flops import train_flops
from jitjax.geometry import Geometry, make_geometry
from jitjax.settings import Settings

NAMES = ("conservative", "middle", "optimistic")
GUIDE_TOKENS_PER_SECOND = dict(zip(NAMES, (240e3, 400e3, 640e3), strict=True))
GUIDE_DEVICES = 8

# What is left of a measurement on fewer cards beside the exchange of gradients: two cards reach 0.96 to 0.98, eight
# are expected to reach 0.92 to 0.97 (docs/speed.md, "Several cards").
SCALING = dict(zip(NAMES, (0.88, 0.93, 0.97), strict=True))
# Share of a run's time in which it trains, where no run says: the loop loses 1 to 2% to saves and logs (docs/speed.md, "How to
# reach it"); the rest is for previews, scores, crashes and waiting for the card.
GOODPUT = dict(zip(NAMES, (0.90, 0.97, 0.99), strict=True))

STRETCH_SECONDS = 3.0  # of one measurement by `measure`; a card at its power limit slows down within a second or two


@dataclasses.dataclass(frozen=True)
class Speed:
    """A measurement of this program's train step: `jitjax bench step`, one card, bfloat16, fused kernels, 32 context tokens."""

    model: str
    image_size: int
    card: str  # key of `cards.CARDS`
    batch_size: int
    tokens_per_second: float
    optimizer: str = "adamw"


# docs/speed-notebook.md, "The train step": medians over the cards measured there. Muon's by the ratio of two steps on one card
# (docs/method.md, "Muon").
MEASURED = (
    Speed("JiT-B/4", 64, "h200", 64, 720e3),
    Speed("JiT-B/4", 64, "h200", 256, 810e3),
    Speed("JiT-B/4", 64, "h200", 64, 667e3, "muon"),
    Speed("JiT-B/4", 64, "h200", 256, 792e3, "muon"),
    Speed("JiT-L/16", 256, "h200", 432, 242e3),
    Speed("JiT-H/16", 256, "h200", 208, 116e3),
    Speed("JiT-B/4", 64, "h100", 64, 675e3),
)


@dataclasses.dataclass(frozen=True)
class Basis:
    """Utilisations that an estimate rests on, for one card; by name of the row."""

    source: str  # in words
    utilisations: dict[str, float]


@dataclasses.dataclass(frozen=True)
class Run:
    """Speed of a run, read from its workdir."""

    config: Mapping[str, Any]
    tokens_per_second: tuple[float, ...]  # logged, ascending
    goodput: float | None  # share of its time in which it trained or waited for input; start and compilation do not count
    devices: int | None
    device_kind: str | None
    images_per_epoch: int | None
    note: str = ""  # what the files do not tell


def guide_utilisations(geometry: Geometry) -> dict[str, float]:
    """The utilisations behind the guide's tokens/s: about 1.8, 3.0 and 4.8% with context tokens.

    The guide states one speed for its run without and its run with labels, so its model is taken with context tokens
    if, and only if, `geometry` has them.
    """
    context = None if geometry.context_length else 0
    guide = make_geometry("JiT-B/4", image_size=64, num_classes=1000, context_length=context)
    flops_per_token = train_flops(guide) / guide.tokens
    peak = GUIDE_DEVICES * cards.CARDS["h200"].flops
    return {name: rate * flops_per_token / peak for name, rate in GUIDE_TOKENS_PER_SECOND.items()}


def measured_utilisations(config: Settings, geometry: Geometry, card: str) -> tuple[dict[int, float], str]:
    """Utilisations of the entries of `MEASURED` that say something about this model and optimizer on this card, by their batch
    size; if there is none, an empty table and the reason in words.

    The same kernels must run on the same shapes, which width, heads, depth and number of tokens decide; the patch hardly
    matters.
    """
    if config.dtype != "bfloat16" or config.kernels == "plain" or config.remat != "none":
        return {}, f"dtype={config.dtype}, kernels={config.kernels}, remat={config.remat} was not measured"
    found = {}
    for speed in MEASURED:
        theirs = make_geometry(speed.model, image_size=speed.image_size, num_classes=1000)
        shape, other = ((g.width, g.heads, g.depth, g.mlp_hidden, g.tokens) for g in (geometry, theirs))
        if speed.card == card and shape == other and speed.optimizer == config.optim.name:
            used = speed.tokens_per_second * train_flops(theirs) / theirs.tokens / cards.CARDS[card].flops
            found[speed.batch_size] = used
    what = f"{config.model.name} with {geometry.tokens} tokens" + (" and Muon" if config.optim.name == "muon" else "")
    return found, "" if found else f"{what} was not measured on an {card.upper()}"


def nearest(measured: Mapping[int, float], batch_size: int) -> int:
    """The measured batch size that stands for `batch_size`: the largest up to it, or the smallest there is."""
    return max((size for size in measured if size <= batch_size), default=min(measured))


def basis_of_table(measured: Mapping[int, float], config: Settings, card: str, devices: int) -> Basis:
    """From the bare step of one card (`MEASURED`)."""
    batch = nearest(measured, config.batch_size)
    scaling = SCALING if devices > 1 else dict.fromkeys(NAMES, 1.0)
    step = f"this program's train step on one {card.upper()}, batch {batch}" + (", Muon" if config.optim.name == "muon" else "")
    used = {name: measured[batch] * scaling[name] * GOODPUT[name] for name in NAMES}
    return Basis(f"{step} (docs/speed.md){_assumed(devices > 1, True)}", used)


def basis_of_speeds(
    source: str,
    tokens_per_second: Sequence[float],
    geometry: Geometry,
    *,
    ran_on: int,
    devices: int,
    peak: float,
    goodput: float | None = None,
) -> Basis:
    """From speeds of a run: their lower decile, median and upper decile.

    Args:
      geometry, ran_on: model and number of devices of the run.
      devices: of the estimate. More than the run's scale as `SCALING` says.
      peak: operations per second of one card.
      goodput: of the run; None takes `GOODPUT`.
    """
    speeds = sorted(tokens_per_second)
    low, high = (speeds[round(share * (len(speeds) - 1))] for share in (0.1, 0.9))
    per_token = train_flops(geometry) / geometry.tokens
    scaling = SCALING if devices > ran_on else dict.fromkeys(NAMES, 1.0)
    kept = (
        GOODPUT if goodput is None else {"conservative": min(goodput, 0.9), "middle": goodput, "optimistic": max(goodput, 0.99)}
    )
    values = dict(zip(NAMES, (low, statistics.median(speeds), high), strict=True))
    used = {name: values[name] * per_token / (ran_on * peak) * scaling[name] * kept[name] for name in NAMES}
    return Basis(source + _assumed(devices > ran_on, goodput is None), used)


def _assumed(scaled: bool, unknown_goodput: bool) -> str:
    """What was not measured, in words."""
    lines = []
    if scaled:
        lines.append(f"assumed: {_shares(SCALING)} of it is left beside the exchange of gradients between cards")
    if unknown_goodput:
        lines.append(f"assumed: {_shares(GOODPUT)} of the time goes into training, the rest into saves, previews and restarts")
    return "".join(f"\n{line}" for line in lines)


def _shares(table: Mapping[str, float]) -> str:
    return ", ".join(f"{table[name]:.0%}" for name in NAMES)


def read_run(workdir: str) -> Run:
    """The config of a run, the speeds in its `metrics.jsonl` and where its time went. Of a run that was started on several
    numbers or kinds of devices (`log.txt`) the speeds are those of the last start, whose devices `config.json` has.

    Raises:
      UserError: not a workdir, or no speed was logged yet.
    """
    try:
        saved = json.loads((Path(workdir) / "config.json").read_text())
        by_start = _speeds(Path(workdir) / "metrics.jsonl")
    except OSError as error:
        raise UserError(f"--from={workdir}: {error.filename}: {error.strerror}; give the workdir of a run") from error
    except ValueError as error:
        raise UserError(f"--from={workdir}: config.json is not JSON ({error})") from error
    if not by_start:
        raise UserError(f"--from={workdir}: no train/tokens_per_second in metrics.jsonl yet; let the run go on")
    setups, note = _setups(Path(workdir) / "log.txt"), ""
    speeds = [speed for _, speed in by_start]
    if len(set(setups)) > 1:
        last, starts = by_start[-1][0], _starts(Path(workdir) / timing.FILE)
        speeds = [speed for start, speed in by_start if start == last]
        if last is None or last != starts:
            numbers = ", ".join(dict.fromkeys(setup.partition(",")[0] for setup in setups))
            note = f"log.txt has starts on {numbers}; the files do not tell which of the speeds is of the last one"
    mesh = saved.get("mesh") or {}
    devices = saved.get("devices") or (mesh.get("data") or 0) * (mesh.get("zero") or 1) * (mesh.get("fsdp") or 1) or None
    facts = {name: saved.get(name) for name in ("device_kind", "images_per_epoch")}
    return Run(saved, tuple(sorted(speeds)), _goodput(Path(workdir) / timing.FILE), devices=devices, note=note, **facts)


def _goodput(file: Path) -> float | None:
    """Of a run's `time.json`; None where there is none or next to nothing in it."""
    try:
        seconds = json.loads(file.read_text())["seconds"]
        total = sum(seconds.values()) - seconds["startup"] - seconds["compile"]
        return (seconds["step"] + seconds["input_wait"]) / total if seconds["step"] >= 60 else None
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def _starts(file: Path) -> float | None:
    """How often a run was started, from its `time.json`."""
    try:
        return float(json.loads(file.read_text())["starts"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _setups(log: Path) -> list[str]:
    """Devices, their kind and the compute type of each start, in words; empty where there is no log."""
    try:
        return re.findall(r" parameters, (.*?), kernels ", log.read_text(errors="replace"))
    except OSError:
        return []


def _speeds(path: Path) -> list[tuple[float | None, float]]:
    """(number of the start, tokens/s) of each line with a speed; None in files that do not tell the start."""
    values = []
    with open(path, "rb") as lines:
        for line in lines:
            if b"tokens_per_second" not in line:
                continue  # most lines of a long run; parsing them all would take minutes
            try:
                record = json.loads(line)
            except ValueError:
                continue  # the last line of a run that is being written
            if record.get("train/tokens_per_second"):
                values.append((record.get("time/starts"), record["train/tokens_per_second"]))
    return values


def run_card(run: Run, path: str, given: str | None, wanted: str | None) -> str:
    """The kind of card that a run used.

    Args:
      given: the user's word for it, used where the run has none.
      wanted: the card of the estimate, None for that of the run.

    Raises:
      UserError: it is unknown, none of `cards.WITH_FLOPS`, or another than `wanted`.
    """
    if run.device_kind is None and given is None:
        raise UserError(
            f"--from={path}: the run did not record its kind of card: add --run_card={' or --run_card='.join(cards.WITH_FLOPS)}"
        )
    card = given if run.device_kind is None else cards.measured_name(run.device_kind)
    ran_on = given if run.device_kind is None else run.device_kind
    if card is None:
        kinds = " and ".join(name.upper() for name in cards.WITH_FLOPS)
        raise UserError(f"--from={path}: the run was on {ran_on}, the estimate is for {kinds}: use a run on one of these")
    if wanted not in (None, card):
        raise UserError(f"--from={path}: the run was on {ran_on}, not the card of --card={wanted}: use --card={card}")
    return card


def measure(config: Settings) -> tuple[list[float], int, str]:
    """Train on random data on this machine's devices: (tokens/s of several stretches, devices, kind of device)."""
    from jitjax import from_settings
    from jitjax.benchmarks import common, step

    setup = common.prepare(config)
    common.say(f"measuring {config.model.name} on {setup.mesh.size} x {setup.mesh.devices.flat[0].device_kind} ...")
    state, batch = common.random_state(setup), common.random_batch(setup)
    train_step = from_settings.make_step(setup)
    compiled = train_step.lower(state, batch).compile()
    state, _, seconds = step.run_steps(compiled, state, batch, 2)
    steps = max(2, min(60, round(2 * STRETCH_SECONDS / seconds)))
    state, _, _ = step.run_steps(compiled, state, batch, steps)
    speeds = []
    for _ in range(5):
        state, _, seconds = step.run_steps(compiled, state, batch, steps)
        speeds.append(steps * setup.plan.global_batch * setup.geometry.tokens / seconds)
    return speeds, setup.mesh.size, setup.mesh.devices.flat[0].device_kind
