"""Scores during training, from the live EMAs on the training devices. Nothing of the run is touched: losses are the same with
and without it."""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from jax.sharding import Mesh

from jitjax import kernels, settings
from jitjax import model as jit_model
from jitjax.data import DataSet, open_dataset
from jitjax.data.rules import HERE, split_of
from jitjax.diffusion import Diffusion, Objective
from jitjax.errors import UserError
from jitjax.evaluation import higher_is_better
from jitjax.evaluation.extractor import Extractor, open_extractor
from jitjax.evaluation.held_out import HeldOutLoss
from jitjax.evaluation.models import evaluate_batches
from jitjax.evaluation.score import computed, open_reference, slug
from jitjax.evaluation.statistics import Statistics
from jitjax.geometry import Geometry
from jitjax.sampler import Sampler
from jitjax.settings import Eval


class LiveEvaluation:
    """evaluation(params) -> ({"eval/fid": ..., "eval/mind": ..., "eval/loss": ...}, notes that no call before had)."""

    def __init__(
        self,
        sampler: Sampler,
        extractor: Extractor,
        reference: Statistics,
        *,
        labels: np.ndarray,
        patch: int,
        batch_size: int,
        held_out: HeldOutLoss | None,
        how: str,
        metric: str = "",
    ):
        """Args:
        labels: (N,) class of each image.
        patch: the model's, for the seam index.
        batch_size: images drawn at once over all devices.
        how: what the scores depend on; only scores with the same text are compared.
        metric: score by which checkpoints are compared; "": the Fréchet distance.

        Raises:
          UserError: the metric is not computed of these images with this reference.
        """
        self._sampler, self._extractor, self._reference = sampler, extractor, reference
        self._labels, self._patch, self._batch = labels, patch, batch_size
        self._held_out, self._known, self.how = held_out, set(), how
        self.metric = f"eval/{metric or slug(extractor.distance)}"
        there, _ = computed(len(labels), reference, extractor)
        there += [name.removeprefix("eval/") for name in held_out.names] if held_out else []
        if metric and metric not in there:
            raise UserError(f"--config.eval.metric={metric} is not computed here: use one of {', '.join(there)}")

    def __call__(
        self, params: jit_model.Params, go_on: Callable[[], None] = lambda: None
    ) -> tuple[dict[str, float], list[str]]:
        """All processes must call it. `go_on` is called before each batch, equally often in all of them; what it raises ends
        the evaluation."""

        def batches() -> Iterator[np.ndarray]:
            for start in range(0, len(self._labels), self._batch):
                go_on()
                labels = self._labels[start : start + self._batch]
                indices = range(start, start + len(labels))
                yield self._sampler(params, 0, indices, labels, size=self._batch)

        result = evaluate_batches(batches(), self._reference, self._extractor, patch=self._patch)
        values = {f"eval/{name}": value for name, value in result.values.items()}
        notes = list(result.scores.notes)
        if self._held_out:
            values |= self._held_out(params, go_on)
            notes += self._held_out.notes
        new = [note for note in notes if note not in self._known]
        self._known.update(new)
        return values, new

    def best(self, scores: dict[str, float], before: dict[str, Any] | None) -> dict[str, Any] | None:
        """{"metric", "value", "how"} if these scores beat the best `before` them (None: there was none), else None."""
        value = float(scores[self.metric])
        if not math.isfinite(value):
            return None
        if before is not None and self.compares_with(before):
            sign = -1 if higher_is_better(self.metric) else 1
            if sign * value >= sign * before["value"]:
                return None
        return {"metric": self.metric, "value": value, "how": self.how}

    def compares_with(self, before: dict[str, Any]) -> bool:
        """Whether the best score so far was made as these are. (Where it does not say how, it counts as made alike.)"""
        return before["metric"] == self.metric and before.get("how", self.how) == self.how


def build(
    options: Eval,
    dataset: DataSet,
    held_out: DataSet | None,
    ema: str,
    geometry: Geometry,
    process: Diffusion,
    mesh: Mesh,
    *,
    reading: settings.Data,
    noise: settings.Diffusion,
    objective: Objective,
    class_conditional: bool,
    dtype: str,
    ops: kernels.Ops,
    comm_dtype: str,
    say: Callable[[str], None],
) -> LiveEvaluation:
    """Open extractor and reference; lines about them go to `say`.

    Args:
      dataset, held_out: images of the training, and those for eval/loss (None: no such loss).
      ema: name of the EMA that is scored.
      reading, noise, objective: of the training.

    Raises:
      UserError: extractor or reference cannot be used.
    """
    chosen = open_extractor(options.extractor, weights=options.inception or None)
    reference = options.reference or (held_out if options.held_out else dataset)
    found, notes = open_reference(
        reference, chosen, geometry.image_size, reading=reading.decoding(), flag="--config.eval.reference"
    )
    common = dict(dtype=dtype, ops=ops, comm_dtype=comm_dtype)
    held_out_loss = held_out and HeldOutLoss(
        held_out,
        geometry,
        noise,
        mesh,
        objective=objective,
        class_conditional=class_conditional,
        batch_size=options.batch_size,
        **common,
    )
    classes, count = geometry.num_classes, options.num_images
    labels = np.arange(count) * classes // count if class_conditional else np.full(count, classes)
    sampler = options.sampler() if class_conditional else dataclasses.replace(options.sampler(), cfg_scale=1.0)
    # Coarsely, as the last bits of features differ between machines; of the reference not its path, which may move.
    against = f"{found.count or 'unknown'} images of mean {abs(found.mu).mean():.3g}"
    drawn = ", ".join(f"{name} {value}" for name, value in settings.to_dict(sampler).items())
    evaluation = LiveEvaluation(
        Sampler(geometry, process, sampler, mesh, **common),
        chosen,
        found,
        labels=labels,
        patch=geometry.patch_size,
        batch_size=options.batch_size * mesh.size,
        held_out=held_out_loss,
        how=f"{chosen.name}, {count} images of EMA {ema} against {against}; {drawn}",
        metric=options.metric,
    )
    where = f"eval/loss on {held_out.path} ({len(held_out):,} images)" if held_out is not None else "no held-out images"
    say(f"evaluation: {chosen.name} against {found.source}, best by {evaluation.metric}; {where}")
    for note in notes:
        say(f"evaluation: {note}")
    return evaluation


def find_held_out(
    wanted: str, path: str, reading: settings.Data, dataset: DataSet, class_conditional: bool
) -> tuple[DataSet | None, list[str]]:
    """The images for eval/loss: those asked for, else the validation split beside the training images, else None. And notes:
    why a validation split that is there is not used.

    Args:
      path: of the training images; "" for a data set that lies in no folder.

    Raises:
      UserError: those asked for cannot be used, or have other classes.
    """
    how, size = {"labels": reading.labels, **reading.decoding()}, reading.image_size

    def other_classes(found: DataSet) -> str:
        if not class_conditional or found.class_names == dataset.class_names:
            return ""
        return f"has other classes ({len(found.class_names)}) than the training images ({len(dataset.class_names)})"

    if wanted:
        flag, split = "--config.eval.held_out", "val" if _validation_splits(Path(wanted)) else ""
        if dataset.class_names and set(_folders(Path(wanted))) == set(dataset.class_names):
            split = HERE  # a class may have a split's name
        found = open_dataset(wanted, size, **how, split=split, flag=flag)
        if problem := other_classes(found):
            raise UserError(f"{flag}={wanted} {problem}: name held-out images of the same classes")
        return found, []
    notes, classes = [], {(Path(dataset.path) / name).absolute() for name in dataset.class_names}
    for folder in (Path(path), Path(path).parent) if path else ():
        there = [name for name in _validation_splits(folder) if (folder / name).absolute() not in classes]
        try:
            found = open_dataset(folder, size, **how, split="val")
        except UserError as error:
            notes += [f"{folder / there[0]} is not used for eval/loss: {error}"] if there else []
            continue
        if any(Path(found.path).absolute().is_relative_to(name) for name in classes):
            continue  # of the training images
        if problem := other_classes(found):
            notes.append(f"{found.path} is not used for eval/loss: it {problem}")
            continue
        return found, []
    return None, notes


def _validation_splits(folder: Path) -> list[str]:
    """The folders in it whose names are those of validation splits."""
    return [name for name in _folders(folder) if (split := split_of(name)) and split.sure and split.role == "val"]


def _folders(folder: Path) -> list[str]:
    try:
        return sorted(entry.name for entry in os.scandir(folder.expanduser()) if entry.is_dir())
    except OSError:
        return []
