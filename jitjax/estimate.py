"""How long a run takes and what it costs: tables from measured speeds. Needs no GPU, unless it is to measure.

The speeds are those of `jitjax.speeds`.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from jitjax import cards, cli, speeds, tables
from jitjax import settings as settings_lib
from jitjax.cli import arguments
from jitjax.errors import UserError
from jitjax.flops import CHANNELS, IMAGENET_IMAGES, forward_macs, parameters, state_bytes, train_flops
from jitjax.geometry import SIZES, Geometry, geometry_of
from jitjax.plan import Plan, make_plan
from jitjax.settings import Settings

METRICS_BYTES = 160  # of metrics.jsonl per optimizer step


@dataclasses.dataclass(frozen=True)
class Row:
    """One line of the table."""

    tokens: float
    images: float
    epochs: float
    name: str
    utilisation: float  # of the card's datasheet operations
    tokens_per_second: float  # of all devices together
    seconds: float
    gpu_hours: float


def estimate(
    geometry: Geometry,
    utilisations: Mapping[str, float],
    tokens: Sequence[float],
    *,
    devices: int,
    peak: float = cards.CARDS["h200"].flops,
    images_per_epoch: int = IMAGENET_IMAGES,
) -> list[Row]:
    """The rows of the table, by token count and then utilisation.

    Args:
      geometry: of the model to train.
      utilisations: share of a card's operations by name of the row.
      tokens: image tokens to train on.
      devices: number of cards.
      peak: operations per second of one card.
      images_per_epoch: size of the data set.
    """
    flops_per_token = train_flops(geometry) / geometry.tokens
    rows = []
    for count in tokens:
        images = count / geometry.tokens
        for name, utilisation in utilisations.items():
            speed = utilisation * devices * peak / flops_per_token
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


def storage(config: Settings, geometry: Geometry, plan: Plan) -> float:
    """Bytes of a run's workdir at its end, with one more checkpoint while it is written: checkpoints, EMA snapshots (float16),
    previews (as if PNG saved nothing) and metrics."""
    keep, count, steps = config.checkpoint, parameters(geometry), plan.total_steps
    checkpoints = keep.keep_last + 1 + (steps // keep.keep_every if keep.keep_every else 0)
    snapshots = len(config.optim.power_emas) * (steps // plan.snapshot_steps) if plan.snapshot_steps else 0
    grids = steps // plan.preview_steps if plan.preview_steps else 0
    pixels = config.preview.num_images * geometry.image_size**2 * CHANNELS
    return state_bytes(geometry, config.optim) * checkpoints + 2 * count * snapshots + grids * pixels + METRICS_BYTES * steps


def format_table(rows: Sequence[Row], *, known_peak: bool = True, price: float = 0.0, bytes_of: Any = None) -> str:
    """Text columns, right-aligned; token count, images, epochs and storage stand once per block.

    Args:
      known_peak: whether utilisation means anything.
      price: of an hour of one card; 0 leaves the column out.
      bytes_of: from a token count to the bytes of the workdir; None leaves the column out.
    """
    header = ["tokens", "images", "epochs", "estimate", "utilisation", "tokens/s", "time", "GPU-hours"]
    cells = [header + (["cost"] if price else []) + (["storage"] if bytes_of else [])]
    for i, row in enumerate(rows):
        first = i == 0 or rows[i - 1].tokens != row.tokens
        line = [
            _power(row.tokens) if first else "",
            f"{row.images:,.0f}" if first else "",
            _digits(row.epochs) if first else "",
            row.name,
            f"{row.utilisation:.2%}" if known_peak else "-",
            f"{row.tokens_per_second:,.0f}",
            tables.format_duration(row.seconds),
            _digits(row.gpu_hours),
        ]
        line += [_digits(row.gpu_hours * price)] if price else []
        line += [tables.format_bytes(bytes_of(row.tokens)) if first else ""] if bytes_of else []
        cells.append(line)
    return tables.columns(cells)


@dataclasses.dataclass(frozen=True)
class Change:
    """One line of the table of changes."""

    name: str
    config: Settings
    geometry: Geometry
    utilisation: float


def changes(config: Settings, utilisation: float, measured: Mapping[int, float]) -> list[Change]:
    """The run, and what differs from it in batch, image size, patch or model alone.

    Args:
      utilisation: of the run; changes have the same, but for a batch size that was measured too.
      measured: utilisations by batch size.
    """
    here = speeds.nearest(measured, config.batch_size) if measured else None

    def change(name: str, **fields: Any) -> Change | None:
        model = dataclasses.replace(config.model, name=fields.pop("model", config.model.name))
        data = dataclasses.replace(config.data, image_size=fields.pop("image_size", config.data.image_size))
        other = dataclasses.replace(config, model=model, data=data, **fields)
        try:
            geometry = geometry_of_settings(other)
        except UserError:  # a patch that does not divide the image
            return None
        factor = measured[speeds.nearest(measured, other.batch_size)] / measured[here] if measured and fields else 1.0
        return Change(name, other, geometry, utilisation * factor)

    size, patch = config.model.name.removeprefix("JiT-").split("/")
    own = any(getattr(config.model, name) is not None for name in ("depth", "width", "heads", "bottleneck"))
    pixels = config.data.image_size
    found = [
        change("this run"),
        *(change(f"batch_size {n}", batch_size=n) for n in (config.batch_size // 4, config.batch_size * 4) if n),
        *(change(f"image_size {n}", image_size=n) for n in (pixels // 2, pixels * 2)),
        *(change(f"patch {n}", model=f"JiT-{size}/{n}") for n in (int(patch) // 2, int(patch) * 2) if n),
        *(change(f"JiT-{name}", model=f"JiT-{name}/{patch}") for name in SIZES if name in "SBLHG" and name != size and not own),
    ]
    return [line for line in found if line]


def format_changes(lines: Sequence[Change], *, devices: int, peak: float, images_per_epoch: int) -> str:
    """The table of `changes`: what one epoch takes, and the plan and state that follow."""
    cells = [["change", "parameters", "tokens/image", "GFLOP/image", "images/s", "epoch", "steps", "learning rate", "state"]]
    for line in lines:
        config, g = line.config, line.geometry
        rate = line.utilisation * devices * peak / train_flops(g)
        plan = plan_of(config, g, devices, images_per_epoch, tokens=1e9)
        state = state_bytes(g, config.optim)
        cells.append(
            [
                line.name,
                f"{parameters(g) / 1e6:,.0f} M",
                f"{g.tokens:,}",
                f"{train_flops(g) / 1e9:,.0f}",
                _digits(rate),
                tables.format_duration(images_per_epoch / rate),
                f"{plan.steps_per_epoch:,}",
                f"{plan.peak_lr:.3g}",
                tables.format_bytes(state),
            ]
        )
    return tables.columns(cells)


def plan_of(config: Settings, geometry: Geometry, devices: int, images_per_epoch: int, tokens: float) -> Plan:
    """The plan of a run over `tokens`. A data set smaller than the batch counts as one batch."""
    batch = config.batch_size * devices * config.optim.accumulation_steps
    run = dataclasses.replace(config, epochs=None, total_images=None, total_steps=None, total_tokens=tokens)
    try:
        return make_plan(run, images=max(images_per_epoch, batch), tokens_per_image=geometry.tokens, devices=devices)
    except UserError as error:  # too long
        raise UserError(str(error).replace("--config.total_tokens", "--tokens")) from None


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


# ---------------------------------------------------------------- the command


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


def guide_text(guide: Mapping[str, float], ours: Mapping[str, float] | None) -> str:
    """What the guide's rows are, and why they are slower than those of this program, by utilisation of the cards.

    Args:
      guide, ours: utilisations by name of the row; ours None where no speed is known.
    """
    rates = ", ".join(f"{rate / 1e3:.0f}" for rate in speeds.GUIDE_TOKENS_PER_SECOND.values())
    text = (
        "the PyTorch guide's plan: the guide to training JiT in PyTorch, whose flags `jitjax train` explains, reckons with "
        f"{rates} thousand tokens/s on {speeds.GUIDE_DEVICES} H200 for JiT-B/4 at 64 px; other models, the same utilisation."
    )
    factors = sorted(ours[name] / guide[name] for name in guide) if ours else [0.0]
    if factors[0] <= 1:
        return text
    low, high, used = min(guide.values()), max(guide.values()), ours["middle"]
    return text + (
        f"\nIt is {factors[0]:.0f} to {factors[-1]:.0f} times slower than the rows above because it assumes that {low:.1%} to "
        f"{high:.1%} of the cards' operations are used, and those have {used:.0%}. It is no measurement of PyTorch: "
        "docs/speed.md has one."
    )


def run(args: argparse.Namespace) -> None:
    """Print the tables.

    Raises:
      UserError: flags that cannot be used.
    """
    config = None
    if args.config_arguments:
        config = arguments.load(args.config_arguments, run_length=False).settings
    elif not args.run_from:
        raise UserError("--config is missing: give a config file (--config configs/h200.py) or a run (--from runs/a)")
    for argument in args.config_arguments:
        if argument.removeprefix("--config.").partition("=")[0] in settings_lib.RUN_LENGTHS:
            raise UserError(f"{argument}: an estimate is for the lengths of --tokens=N,M")
    for name in ("run_devices", "run_card"):
        if getattr(args, name) and not args.run_from:
            raise UserError(f"--{name} is for --from, of a run: for the estimate itself use --{name.removeprefix('run_')}")
    if args.measure and args.run_from:
        raise UserError(f"--measure and --from={args.run_from}: give one of the two")
    tokens, card = _parse_tokens(args.tokens), args.card
    own = speeds.read_run(args.run_from) if args.run_from else None
    if own is not None:
        card = speeds.run_card(own, args.run_from, args.run_card, card)
    config = settings_lib.from_mapping(own.config, ignore_unknown=True) if config is None else config
    geometry = geometry_of_settings(config)
    images_per_epoch = args.images_per_epoch or (own and own.images_per_epoch) or IMAGENET_IMAGES
    if args.measure:
        found, ran_on, kind = speeds.measure(config)
        card, devices = cards.measured_name(kind) or kind, args.devices or ran_on
        if args.card not in (None, card):
            raise UserError(f"--measure runs on {kind}, not on the card of --card={args.card}: leave --card out")
    card, devices = card or "h200", args.devices or (devices if args.measure else 8)
    known = card in cards.WITH_FLOPS
    peak = cards.CARDS[card].flops if known else 1e12

    tables.say(
        f"{config.model.name} at {geometry.image_size} px: {geometry.tokens} tokens per image, "
        f"{forward_macs(geometry) / 1e9:.2f} G multiply-adds forward, {train_flops(geometry) / 1e9:.0f} GFLOP to train "
        f"on an image, {train_flops(geometry) / geometry.tokens / 1e9:.3f} GFLOP per token"
    )
    sheet = f": {peak / 1e12:.0f} TFLOP/s dense bf16 each (datasheet)" if known else ""
    kind = card.upper() if known else card
    tables.say(f"{devices} x {kind}{sheet}; an epoch is {images_per_epoch:,} images; --help explains all")
    if args.price_per_gpu_hour:
        tables.say(f"cost is GPU-hours times {args.price_per_gpu_hour:g}, in the currency of --price_per_gpu_hour")

    measured, reason = speeds.measured_utilisations(config, geometry, card)
    basis = None
    if own is not None:
        run_geometry = geometry_of_settings(settings_lib.from_mapping(own.config, ignore_unknown=True))
        run_devices = args.run_devices or own.devices
        if not run_devices:
            raise UserError(f"--from={args.run_from}: config.json does not say how many devices: add --run_devices=N")
        kept = f", goodput (share of its time in which it trained) {own.goodput:.1%}" if own.goodput else ""
        median = statistics.median(own.tokens_per_second)
        source = f"{args.run_from}, median {median:,.0f} tokens/s on {run_devices} card(s){kept}"
        if (share := median * train_flops(run_geometry) / run_geometry.tokens / (run_devices * peak)) > 1:
            raise UserError(
                f"{source} would be {share:.0%} of the operations in the datasheet: the run had other devices when it was that "
                "fast; give their number with --run_devices"
            )
        if own.note:
            tables.say(f"note: {own.note}")
        where = dict(ran_on=run_devices, devices=devices, peak=peak, goodput=own.goodput)
        basis = speeds.basis_of_speeds(source, own.tokens_per_second, run_geometry, **where)
    elif args.measure:
        source = f"measured here, {statistics.median(found):,.0f} tokens/s on {ran_on} device(s)"
        basis = speeds.basis_of_speeds(source, found, geometry, ran_on=ran_on, devices=devices, peak=peak)
    elif measured:
        basis = speeds.basis_of_table(measured, config, card, devices)
    numbers = dict(devices=devices, peak=peak, images_per_epoch=images_per_epoch)

    def bytes_of(count: float) -> float:
        return storage(config, geometry, plan_of(config, geometry, devices, images_per_epoch, count))

    options = dict(known_peak=known, price=args.price_per_gpu_hour, bytes_of=bytes_of)
    if basis is None:
        tables.say(f"no estimate from this program's own speed: {reason}; --measure takes one here, --from takes a run's")
    else:
        tables.say(f"\nfrom {basis.source}")
        print(format_table(estimate(geometry, basis.utilisations, tokens, **numbers), **options))
    guide = speeds.guide_utilisations(geometry)
    if known:
        tables.say(f"\n{guide_text(guide, basis and basis.utilisations)}")
        print(format_table(estimate(geometry, guide, tokens, **numbers), **options))
    used = (basis.utilisations if basis else guide)["middle"]
    tables.say("\nwhat a change does, at the middle utilisation (small models and batches use less of a card, large ones more)")
    print(format_changes(changes(config, used, measured if own is None else {}), **numbers))


def main(argv: Sequence[str] | None = None) -> None:
    """The command line of `jitjax estimate`, for scripts; prints the tables.

    Raises:
      UserError: flags that cannot be used.
    """
    cli.dispatch(["estimate", *(sys.argv[1:] if argv is None else argv[1:])])


if __name__ == "__main__":
    cli.program(["estimate", *sys.argv[1:]])
