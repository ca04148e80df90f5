"""`--config=file.py[:argument]` and `--config.field=value`: from the command line to checked settings.

The file is loaded by ml_collections; values are read by the type that `jitjax.settings` gives the field. Of several values
for one field the last counts, `=None` (unset) included.
"""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path
from typing import Any

from jitjax import hub, settings
from jitjax.errors import UserError

# Flags of the PyTorch guide for JiT and of the official code, and ours for the same thing.
GUIDE = {
    "data_path": "--config.data.path", "img_size": "--config.data.image_size", "model": "--config.model.name",
    "batch_size": "--config.batch_size (per device)", "epochs": "--config.epochs",
    "enable_condition": "--config.model.class_conditional=True", "use_amp": "--config.dtype=bfloat16 (the default)",
    "gradient_accumulation_steps": "--config.optim.accumulation_steps", "use_wandb": "--config.wandb.enabled=True",
    "wandb_project": "--config.wandb.project", "wandb_name": "--config.wandb.name", "output_dir": "--workdir",
    "class_num": "--config.model.num_classes (unset: counted)", "lr": "--config.optim.lr", "blr": "--config.optim.blr",
    "warmup_epochs": "--config.optim.warmup_epochs", "weight_decay": "--config.optim.weight_decay",
    "seed": "--config.seed", "num_workers": "--config.data.num_workers", "resume": "--workdir (the same command resumes)",
    "P_mean": "--config.diffusion.p_mean", "P_std": "--config.diffusion.p_std", "cfg": "--config.preview.cfg_scale",
    "noise_scale": "--config.diffusion.noise_scale", "proj_dropout": "--config.model.proj_dropout",
    "attn_dropout": "--config.model.attn_dropout", "label_drop_prob": "--config.diffusion.label_drop_prob",
    "learning_rate": "--config.optim.lr", "lr_schedule": "--config.optim.schedule", "min_lr": "--config.optim.min_lr",
}  # fmt: skip


# Two fields for one thing: where both are set, the second counts.
SIBLINGS = {
    "optim.blr": "optim.lr",
    "optim.warmup_epochs": "optim.warmup_steps",
    **{f"{group}.every_epochs": f"{group}.every_steps" for group in ("checkpoint", "preview", "eval")},
}


def add(parser: argparse.ArgumentParser) -> None:
    """Announce the configuration in `--help`; the arguments themselves are split off before argparse sees them."""
    group = parser.add_argument_group("configuration")
    group.add_argument("--config", metavar="FILE[:ARGUMENT]", help="config file, e.g. configs/h200.py:finetune")
    group.add_argument("--config.FIELD", metavar="VALUE", help="override a field (=None unsets it); the fields are below")
    parser.set_defaults(takes_config=True)
    parser.epilog = "fields (--config.FIELD=default):\n" + "\n".join(settings.reference())


def split(argv: list[str]) -> tuple[list[str], list[str]]:
    """The arguments that belong to the configuration, each as one --name=value, and all others."""
    config, rest, waiting = [], [], list(argv)
    while waiting:
        argument = waiting.pop(0)
        name, equals, _ = argument.partition("=")
        if name.startswith("--noconfig."):
            config.append(f"--{name[len('--no') :]}=False")
        elif name != "--config" and not name.startswith("--config."):
            guide = GUIDE.get(name.removeprefix("--")) if name.startswith("--") else None
            if guide and argv and argv[0] == "train":
                raise UserError(f"{name} is the flag of the PyTorch code: here it is {guide}")
            rest.append(argument)
        elif equals:
            config.append(argument)
        elif (field := settings.fields().get(name.removeprefix("--config."))) and field.type is bool:
            config.append(f"{name}=True")
        elif not waiting:
            raise UserError(f"{name} needs a value, e.g. {name}={'configs/quickstart.py' if name == '--config' else '1'}")
        else:
            config.append(f"{name}={waiting.pop(0)}")
    return config, rest


def boolean(text: str) -> bool:
    """For `--flag`, `--flag=true` and `--flag=false`."""
    if text.lower() not in ("true", "false", "1", "0"):
        raise argparse.ArgumentTypeError(f"must be true or false, not {text!r}")
    return text.lower() in ("true", "1")


@dataclasses.dataclass(frozen=True)
class Loaded:
    settings: settings.Settings
    notes: tuple[str, ...]  # what was decided between two contradicting sources


def load(config_arguments: list[str], *, run_length: bool = True) -> Loaded:
    """Checked settings from the arguments that `split` gave.

    A run length on the command line replaces the config file's, and so does a data set, and one of two `SIBLINGS` the other.

    Args:
      run_length: whether exactly one run length must be set; otherwise it is ignored.

    Raises:
      UserError: no config, a mistake in it or in an override, or a contradiction.
    """
    file, given = "", {}
    for argument in config_arguments:
        name, _, value = argument.partition("=")
        if name == "--config":
            file = value
            continue
        name = name.removeprefix("--config.")
        field = settings.fields().get(name)
        if field is None:
            raise UserError(f"--config.{name}: there is no such field{settings.did_you_mean(name)}")
        given[name] = field.parse(value)
    if not file:
        raise UserError("--config is missing: name a config file, e.g. --config=configs/quickstart.py")
    values, notes = _values(file), []
    lengths = [name for name in settings.RUN_LENGTHS if given.get(name) is not None]
    if len(lengths) > 1:
        shown = " and ".join(f"--config.{name}={given[name]}" for name in lengths)
        raise UserError(f"two run lengths are set, {shown}: give exactly one of {', '.join(settings.RUN_LENGTHS)}")
    if lengths or not run_length:
        values |= dict.fromkeys(settings.RUN_LENGTHS)
    if not run_length:
        given = {name: value for name, value in given.items() if name not in settings.RUN_LENGTHS} | {"total_steps": 10**6}
    for name, other in SIBLINGS.items():
        if given.get(name) and given.get(other) is not None:  # 0 epochs of warm-up beside steps of it contradict nothing
            raise UserError(f"--config.{name}={given[name]} and --config.{other}={given[other]}: give one of the two")
        if given.get(name) is not None and given.get(other) is None and values.get(other) is not None:
            notes.append(f"--config.{name}={given[name]} replaces {other}={values[other]} of {file}")
            values[other] = None
    for one, other in (("data.path", "data.synthetic"), ("data.synthetic", "data.path")):
        if given.get(one) and not given.get(other) and values.get(other):
            notes.append(f"--config.{one}={given[one]} replaces {other}={values[other]} of {file}")
            values[other] = ""
    result = settings.from_mapping(_nested(values | given))
    settings.check(result)
    return Loaded(result, tuple(notes))


def _values(file: str) -> dict[str, Any]:
    """What the config file's `get_config` returns, by dotted name."""
    from ml_collections.config_flags.config_flags import ConfigFileFlagParser

    path = Path(file.partition(":")[0])
    if not path.is_file():
        raise UserError(f"--config={path}: there is no such file; the repository's are configs/*.py")
    try:
        config = ConfigFileFlagParser(name="config").parse(file)
        values = dict(settings.flatten(config))
    except UserError:
        raise
    except Exception as error:  # whatever the user's file raises
        raise UserError(f"--config={file}: {_last_words(error)}") from error
    for name in values:
        if name not in settings.fields():
            raise UserError(f"--config={file} sets {name}, which is no field{settings.did_you_mean(name)}")
    return values


def _last_words(error: BaseException) -> str:
    """ml_collections puts a whole traceback into its message: the last line of it, without the exception's name."""
    text = str(error)
    if "Traceback (most recent call last)" in text:
        text = text.strip().splitlines()[-1].partition(": ")[2]
    return text or type(error).__name__


def _nested(flat: dict[str, Any]) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for name, value in flat.items():
        *parents, leaf = name.split(".")
        target = result
        for key in parents:
            target = target.setdefault(key, {})
        target[leaf] = value
    return result


def interval(text: str) -> tuple[float, float]:
    """Two times, "0.1,1.0" or "(0.1,1.0)"."""
    parts = text.strip().strip("()[]").split(",")
    try:
        low, high = map(float, parts)
    except ValueError:
        raise argparse.ArgumentTypeError(f"give two times, e.g. 0.1,1.0, not {text!r}") from None
    return low, high


def at_least(low: float, kind: type = int):
    """An argparse type: a number of `kind` that is `low` or more."""

    def number(text: str):
        value = kind(text)
        if not low <= value < float("inf"):
            raise argparse.ArgumentTypeError(f"{text} must be {low} or more")
        return value

    number.__name__ = "whole number" if kind is int else "number"
    return number


def existing_model(path: str, flag: str) -> None:
    """As `existing`; a model may also be named on the Hugging Face Hub."""
    if not hub.is_name(path):
        existing(path, flag)


def existing(path: str, flag: str) -> None:
    """Raises:
    UserError: there is nothing at `path`.
    """
    where = Path(path).expanduser()
    if not where.exists() and not (where.name == "best" and where.parent.exists()):
        raise UserError(f"{flag} {path}: no such file or folder")
