"""How long, how many epochs, how many GPU-hours: a table from a config and token counts. Needs no GPU.

    python -m jitjax.estimate --config configs/h200.py --tokens 10e9,1e12 --devices 8
    python -m jitjax.estimate --from runs/a --tokens 1e12 --devices 8

Three rows per token count come from the card's datasheet and a stated utilisation, i.e. the share of the datasheet's
dense bf16 operations that training uses (`jitjax.flops` has the formula of the operations). The utilisations are those
at which JiT-B/4 at 64 px on eight H200 makes 240, 400 and 640 thousand tokens a second, the figures that the guide
plans with; a larger model gets the tokens/s that the same utilisation yields. They are a plan, not a measurement:
`--from` adds a row with the utilisation of a run of your own, which is the one to believe. A token is an image patch;
in-context class tokens do not count.
"""

from __future__ import annotations

import dataclasses
import json
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from absl import flags
from ml_collections import config_flags

from jitjax import config as config_lib
from jitjax.errors import UserError, cli
from jitjax.flops import CARDS, forward_macs, train_flops
from jitjax.model import Geometry, geometry_from_config, make_geometry

IMAGENET_IMAGES = 1_281_167
GUIDE_TOKENS_PER_SECOND = {"conservative": 240e3, "middle": 400e3, "optimistic": 640e3}
GUIDE_DEVICES = 8


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
class Measured:
    """Speed of a run, read from its workdir."""

    config: Mapping[str, Any]
    tokens_per_second: float | None
    samples_per_second: float | None
    devices: int | None
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


def read_run(workdir: str) -> Measured:
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
    devices = saved.get("devices") or (mesh.get("data") or 0) * (mesh.get("fsdp") or 1) or None
    return Measured(saved, *medians, devices=devices, images_per_epoch=saved.get("images_per_epoch"))


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


def _parse_tokens(text: Sequence[str]) -> list[float]:
    try:
        tokens = [float(part) for part in text]
        if tokens and all(0 < count < float("inf") for count in tokens):
            return tokens
    except ValueError:
        pass
    raise UserError(f"--tokens={','.join(text)}: give positive numbers, e.g. 10e9,1e12")


def main(argv: Sequence[str] | None = None) -> None:
    """The command line; prints the table.

    Raises:
      UserError: flags that cannot be used.
    """
    argv = list(sys.argv if argv is None else argv)
    # Flags of its own, so that several of the package's commands can be imported into one process.
    values = flags.FlagValues()
    config_flag = config_flags.DEFINE_config_file(
        "config", None, "Config file; --config.model.name=... overrides a field.", flag_values=values, sys_argv=argv
    )
    tokens_flag = flags.DEFINE_list("tokens", "10e9,1e12", "Image tokens to train on.", flag_values=values)
    devices_flag = flags.DEFINE_integer("devices", 8, "Number of cards.", lower_bound=1, flag_values=values)
    card_flag = flags.DEFINE_enum("card", "h200", list(CARDS), "Whose datasheet.", flag_values=values)
    from_flag = flags.DEFINE_string("from", None, "Workdir of a run: adds its measured speed.", flag_values=values)
    run_devices_flag = flags.DEFINE_integer(
        "run_devices", None, "Cards of that run, if its config.json has no number.", lower_bound=1, flag_values=values
    )
    images_flag = flags.DEFINE_integer(
        "images_per_epoch", None, "Images in the data set; default ImageNet's.", lower_bound=1, flag_values=values
    )
    flags.DEFINE_bool("help", False, "Show this.", short_name="h", flag_values=values)
    try:
        rest = values(argv)[1:]
    except (flags.Error, AttributeError, KeyError, OSError, TypeError, ValueError) as error:
        text = str(error.args[0] if isinstance(error, KeyError) else error)
        # An error inside a config file comes with its whole traceback; its last line says what is wrong.
        raise UserError(f"--config: {text.splitlines()[-1]}" if "Traceback" in text else text) from error
    if values["help"].value:
        print(__doc__ + values.get_help())
        return
    if rest:
        raise UserError(f"unknown argument {rest[0]!r}: all arguments are flags, see --help")
    if config_flag.value is None and not from_flag.value:
        raise UserError("--config is missing: give a config file (--config configs/h200.py) or a run (--from runs/a)")
    if config_flag.value is not None:  # a file that cannot be read would only fail where it is used
        config_path = config_flags.get_config_filename(values["config"])
        if not Path(config_path.split(":")[0]).is_file():
            raise UserError(f"--config={config_path}: no such file")
    tokens, devices, card = _parse_tokens(tokens_flag.value), devices_flag.value, card_flag.value
    run = read_run(from_flag.value) if from_flag.value else None

    config = config_lib.from_dict(run.config) if config_flag.value is None else config_flag.value
    geometry = geometry_from_config(config, config.model.num_classes or 1000)
    utilisations = guide_utilisations(geometry)
    images_per_epoch = images_flag.value or (run and run.images_per_epoch) or IMAGENET_IMAGES

    print(
        f"{config.model.name} at {geometry.image_size} px: {geometry.tokens} tokens an image, "
        f"{forward_macs(geometry) / 1e9:.2f} G multiply-adds forward, {train_flops(geometry) / 1e9:.0f} GFLOP to train "
        f"on an image, {train_flops(geometry) / geometry.tokens / 1e9:.3f} GFLOP a token"
    )
    print(f"{devices} x {card.upper()}: {CARDS[card] / 1e12:.0f} TFLOP/s dense bf16 each (datasheet)")
    if run is not None:
        run_config = config_lib.from_dict(run.config)
        run_geometry = geometry_from_config(run_config, run_config.model.num_classes or 1000)
        run_devices = run_devices_flag.value or run.devices
        if not run_devices:
            raise UserError(f"--from={from_flag.value}: config.json does not say how many devices: add --run_devices=N")
        speed = run.tokens_per_second or run.samples_per_second * run_geometry.tokens
        used = speed * train_flops(run_geometry) / run_geometry.tokens / (run_devices * CARDS[card])
        utilisations["measured"] = used
        print(f"measured: {from_flag.value}, median {speed:,.0f} tokens/s on {run_devices} card(s), scaled in proportion")
    print(f"an epoch is {images_per_epoch:,} images; the guide's utilisations are explained in --help\n")
    rows = estimate(geometry, utilisations, tokens, devices=devices, card=card, images_per_epoch=images_per_epoch)
    print(format_table(rows))


if __name__ == "__main__":
    raise SystemExit(cli(main))
