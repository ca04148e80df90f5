"""How long a run takes: tables of tokens, epochs, days and GPU-hours from measured utilisations. Needs no GPU."""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jitjax import cli
from jitjax import settings as settings_lib
from jitjax.cli import arguments
from jitjax.errors import UserError
from jitjax.flops import CARDS, IMAGENET_IMAGES, card_of, forward_macs, train_flops
from jitjax.model import Geometry, geometry_of, make_geometry
from jitjax.settings import Settings

GUIDE_TOKENS_PER_SECOND = {"conservative": 240e3, "middle": 400e3, "optimistic": 640e3}
GUIDE_DEVICES = 8


@dataclasses.dataclass(frozen=True)
class Speed:
    """A measurement of this program's train step: `jitjax bench step`, one card, bfloat16, fused kernels, 32 context tokens."""

    model: str
    image_size: int
    card: str  # key of `CARDS`
    batch_size: int
    tokens_per_second: float


# docs/speed-notebook.md, "The train step": medians over the cards measured there.
MEASURED = (
    Speed("JiT-B/4", 64, "h200", 64, 720e3),
    Speed("JiT-B/4", 64, "h200", 256, 810e3),
    Speed("JiT-L/16", 256, "h200", 432, 242e3),
    Speed("JiT-H/16", 256, "h200", 208, 116e3),
    Speed("JiT-B/4", 64, "h100", 64, 675e3),
)


@dataclasses.dataclass(frozen=True)
class Row:
    """One line of the table."""

    tokens: float
    images: float
    epochs: float
    name: str
    utilisation: float  # of the datasheet's dense bf16 operations
    tokens_per_second: float  # of all devices together
    seconds: float
    gpu_hours: float


@dataclasses.dataclass(frozen=True)
class Run:
    """Speed of a run, read from its workdir."""

    config: Mapping[str, Any]
    tokens_per_second: float | None
    samples_per_second: float | None
    devices: int | None
    device_kind: str | None
    images_per_epoch: int | None


def guide_utilisations(geometry: Geometry) -> dict[str, float]:
    """The utilisations behind the guide's tokens/s: about 1.8, 3.0 and 4.8% with context tokens.

    The guide states one speed for its run without and its run with labels, so its model is taken with context tokens
    if, and only if, `geometry` has them.
    """
    context = None if geometry.context_length else 0
    guide = make_geometry("JiT-B/4", image_size=64, num_classes=1000, context_length=context)
    flops_per_token = train_flops(guide) / guide.tokens
    peak = GUIDE_DEVICES * CARDS["h200"]
    return {name: rate * flops_per_token / peak for name, rate in GUIDE_TOKENS_PER_SECOND.items()}


def measured_utilisations(config: Settings, geometry: Geometry, card: str) -> tuple[dict[str, float], str]:
    """The utilisation of each entry of `MEASURED` that says something about this model on this card, by the name of its row; if
    there is none, an empty table and the reason in words.

    The same kernels must run on the same shapes, which width, heads, depth and number of tokens decide; the patch hardly
    matters.
    """
    if config.dtype != "bfloat16" or config.kernels == "plain" or config.remat != "none":
        return {}, f"dtype={config.dtype}, kernels={config.kernels}, remat={config.remat} was not measured"
    found = {}
    for speed in MEASURED:
        theirs = make_geometry(speed.model, image_size=speed.image_size, num_classes=1000)
        shape, other = ((g.width, g.heads, g.depth, g.mlp_hidden, g.tokens) for g in (geometry, theirs))
        if speed.card == card and shape == other:
            used = speed.tokens_per_second * train_flops(theirs) / theirs.tokens / CARDS[card]
            found[f"{speed.model}, batch {speed.batch_size}"] = used
    return found, "" if found else f"{config.model.name} with {geometry.tokens} tokens was not measured on an {card.upper()}"


def estimate(
    geometry: Geometry,
    utilisations: Mapping[str, float],
    tokens: Sequence[float],
    *,
    devices: int,
    card: str = "h200",
    images_per_epoch: int = IMAGENET_IMAGES,
) -> list[Row]:
    """The rows of the table, by token count and then utilisation.

    Args:
      geometry: of the model to train.
      utilisations: share of the datasheet's operations by name of the row.
      tokens: image tokens to train on.
      devices: number of cards; speed is taken to grow in proportion.
      card: a key of `jitjax.flops.CARDS`.
      images_per_epoch: size of the data set.
    """
    flops_per_token = train_flops(geometry) / geometry.tokens
    rows = []
    for count in tokens:
        images = count / geometry.tokens
        for name, utilisation in utilisations.items():
            speed = utilisation * devices * CARDS[card] / flops_per_token
            seconds = count / speed
            rows.append(
                Row(
                    tokens=count,
                    images=images,
                    epochs=images / images_per_epoch,
                    name=name,
                    utilisation=utilisation,
                    tokens_per_second=speed,
                    seconds=seconds,
                    gpu_hours=seconds * devices / 3600,
                )
            )
    return rows


def read_run(workdir: str) -> Run:
    """The config of a run and the medians of the speeds in its `metrics.jsonl`.

    Raises:
      UserError: not a workdir, or no speed was logged yet.
    """
    try:
        saved = json.loads((Path(workdir) / "config.json").read_text())
        medians = _medians(Path(workdir) / "metrics.jsonl", ("train/tokens_per_second", "train/samples_per_second"))
    except OSError as error:
        raise UserError(f"--from={workdir}: {error.filename}: {error.strerror}; give the workdir of a run") from error
    except ValueError as error:
        raise UserError(f"--from={workdir}: config.json is not JSON ({error})") from error
    if not any(medians):
        raise UserError(f"--from={workdir}: no train/tokens_per_second in metrics.jsonl yet; let the run go on")
    mesh = saved.get("mesh") or {}
    devices = saved.get("devices") or (mesh.get("data") or 0) * (mesh.get("zero") or 1) * (mesh.get("fsdp") or 1) or None
    facts = {name: saved.get(name) for name in ("device_kind", "images_per_epoch")}
    return Run(saved, *medians, devices=devices, **facts)


def _medians(path: Path, names: Sequence[str]) -> list[float | None]:
    values: dict[str, list[float]] = {name: [] for name in names}
    with open(path, "rb") as lines:
        for line in lines:
            if b"s_per_second" not in line:
                continue  # most lines of a long run; parsing them all would take minutes
            try:
                record = json.loads(line)
            except ValueError:
                continue  # the last line of a run that is being written
            for name in names:
                if record.get(name):
                    values[name].append(record[name])
    return [statistics.median(found) if found else None for found in values.values()]


def format_table(rows: Sequence[Row]) -> str:
    """Text columns, right-aligned; token count, images and epochs stand once per block."""
    cells = [("tokens", "images", "epochs", "estimate", "utilisation", "tokens/s", "time", "GPU-hours")]
    for i, row in enumerate(rows):
        first = i == 0 or rows[i - 1].tokens != row.tokens
        cells.append(
            (
                _power(row.tokens) if first else "",
                f"{row.images:,.0f}" if first else "",
                _digits(row.epochs) if first else "",
                row.name,
                f"{row.utilisation:.2%}",
                f"{row.tokens_per_second:,.0f}",
                _duration(row.seconds),
                _digits(row.gpu_hours),
            )
        )
    widths = [max(len(line[column]) for line in cells) for column in range(len(cells[0]))]
    lines = ["  ".join(f"{cell:>{width}}" for cell, width in zip(line, widths, strict=True)) for line in cells]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


def _power(number: float) -> str:
    """1e10, 2.5e9, 500."""
    mantissa, _, exponent = f"{number:g}".partition("e")
    if not exponent and number >= 1e4:
        mantissa, _, exponent = f"{number:.6e}".partition("e")
        mantissa = mantissa.rstrip("0").rstrip(".")
    return f"{mantissa}e{int(exponent)}" if exponent else mantissa


def _digits(number: float) -> str:
    """Three digits or more: 30.5, 3,049, 0.152."""
    return f"{number:,.0f}" if number >= 999.5 else f"{number:.3g}"


def _duration(seconds: float) -> str:
    for unit, size in (("days", 86400), ("hours", 3600), ("minutes", 60)):
        if seconds >= size * (1 if unit != "days" else 1.5):
            return f"{seconds / size:,.1f} {unit}"
    return f"{seconds:.1f} seconds"


def _parse_tokens(text: str) -> list[float]:
    try:
        tokens = [float(count) for count in text.split(",")]
        if tokens and all(0 < count < float("inf") for count in tokens):
            return tokens
    except ValueError:
        pass
    raise UserError(f"--tokens={text}: give positive numbers, e.g. 10e9,1e12")


def geometry_of_settings(settings: Settings) -> Geometry:
    """The model's shapes; ImageNet's number of classes where the data set decides it."""
    return geometry_of(settings.model, settings.data.image_size, settings.model.num_classes or 1000)


def run_card(run: Run, path: str, given: str | None, wanted: str | None) -> str:
    """The kind of card that a run used.

    Args:
      given: the user's word for it, used where the run has none.
      wanted: the card of the estimate, None for that of the run.

    Raises:
      UserError: it is unknown, none of `CARDS`, or another than `wanted`.
    """
    if run.device_kind is None and given is None:
        raise UserError(
            f"--from={path}: the run did not record its kind of card: add --run_card={' or --run_card='.join(CARDS)}"
        )
    card = given if run.device_kind is None else card_of(run.device_kind)
    ran_on = given if run.device_kind is None else run.device_kind
    if card is None:
        kinds = " and ".join(name.upper() for name in CARDS)
        raise UserError(f"--from={path}: the run was on {ran_on}, the estimate is for {kinds}: use a run on one of these")
    if wanted not in (None, card):
        raise UserError(f"--from={path}: the run was on {ran_on}, not the card of --card={wanted}: use --card={card}")
    return card


def run(args: argparse.Namespace) -> None:
    """Print the table.

    Raises:
      UserError: flags that cannot be used.
    """
    config = None
    if args.config_arguments:
        config = arguments.load(args.config_arguments, run_length=False).settings
    elif not args.run_from:
        raise UserError("--config is missing: give a config file (--config configs/h200.py) or a run (--from runs/a)")
    tokens, devices, card = _parse_tokens(args.tokens), args.devices, args.card
    own = read_run(args.run_from) if args.run_from else None
    if own is not None:
        card = run_card(own, args.run_from, args.run_card, card)
    card = card or "h200"
    config = settings_lib.from_mapping(own.config, ignore_unknown=True) if config is None else config
    geometry = geometry_of_settings(config)
    utilisations, reason = measured_utilisations(config, geometry, card)
    utilisations |= guide_utilisations(geometry)
    images_per_epoch = args.images_per_epoch or (own and own.images_per_epoch) or IMAGENET_IMAGES

    print(
        f"{config.model.name} at {geometry.image_size} px: {geometry.tokens} tokens per image, "
        f"{forward_macs(geometry) / 1e9:.2f} G multiply-adds forward, {train_flops(geometry) / 1e9:.0f} GFLOP to train "
        f"on an image, {train_flops(geometry) / geometry.tokens / 1e9:.3f} GFLOP per token"
    )
    print(f"{devices} x {card.upper()}: {CARDS[card] / 1e12:.0f} TFLOP/s dense bf16 each (datasheet)")
    if reason:
        print(f"no row of this program's own speed: {reason}")
    if own is not None:
        run_geometry = geometry_of_settings(settings_lib.from_mapping(own.config, ignore_unknown=True))
        run_devices = args.run_devices or own.devices
        if not run_devices:
            raise UserError(f"--from={args.run_from}: config.json does not say how many devices: add --run_devices=N")
        speed = own.tokens_per_second or own.samples_per_second * run_geometry.tokens
        used = speed * train_flops(run_geometry) / run_geometry.tokens / (run_devices * CARDS[card])
        utilisations["this run"] = used
        print(f"this run: {args.run_from}, median {speed:,.0f} tokens/s on {run_devices} card(s), scaled in proportion")
    print(f"an epoch is {images_per_epoch:,} images; --help explains the rows\n")
    rows = estimate(geometry, utilisations, tokens, devices=devices, card=card, images_per_epoch=images_per_epoch)
    print(format_table(rows))


def main(argv: Sequence[str] | None = None) -> None:
    """The command line of `jitjax estimate`, for scripts; prints the table.

    Raises:
      UserError: flags that cannot be used.
    """
    cli.dispatch(["estimate", *(sys.argv[1:] if argv is None else argv[1:])])


if __name__ == "__main__":
    cli.program(["estimate", *sys.argv[1:]])
