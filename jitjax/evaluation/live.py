"""Scores during training, from the live EMAs on the training devices. Nothing of the run is touched: losses are the same with
and without it."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from jax.sharding import Mesh

from jitjax import kernels, settings
from jitjax import model as jit_model
from jitjax.data import DataSet, open_dataset
from jitjax.diffusion import Diffusion, Objective
from jitjax.errors import UserError
from jitjax.evaluation import higher_is_better
from jitjax.evaluation.extractor import Extractor, open_extractor
from jitjax.evaluation.held_out import HeldOutLoss
from jitjax.evaluation.models import evaluate_batches
from jitjax.evaluation.score import open_reference, slug
from jitjax.evaluation.statistics import Statistics
from jitjax.pipeline import Sampler
from jitjax.settings import Eval


class LiveEvaluation:
    """evaluation(params) -> {"eval/fid": ..., "eval/mind": ..., "eval/loss": ...}."""

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
        metric: str = "",
        say: Callable[[str], None] = lambda line: None,
    ):
        """Args:
        labels: (N,) class of each image.
        patch: the model's, for the seam index.
        batch_size: images drawn at once over all devices.
        metric: score by which checkpoints are compared; "": the Fréchet distance.
        say: takes lines for the user.
        """
        self._sampler, self._extractor, self._reference = sampler, extractor, reference
        self._labels, self._patch, self._batch = labels, patch, batch_size
        self._held_out, self._say, self._said = held_out, say, set()
        self.metric = f"eval/{metric or slug(extractor.distance)}"

    def __call__(self, params: jit_model.Params) -> dict[str, float]:
        """All processes must call it."""

        def batches() -> Iterator[np.ndarray]:
            for start in range(0, len(self._labels), self._batch):
                labels = self._labels[start : start + self._batch]
                indices = range(start, start + len(labels))
                yield self._sampler(params, 0, indices, labels, size=self._batch)

        result = evaluate_batches(batches(), self._reference, self._extractor, patch=self._patch)
        for note in result.scores.notes:
            if note not in self._said:
                self._said.add(note)
                self._say(f"evaluation: {note}")
        values = {f"eval/{name}": value for name, value in result.values.items()}
        return values | (self._held_out(params) if self._held_out else {})

    def best(self, scores: dict[str, float], before: dict[str, Any] | None) -> dict[str, Any] | None:
        """{"metric", "value"} if these scores beat the best `before` them (None: there was none), else None.

        Raises:
          UserError: the metric was not computed.
        """
        if self.metric not in scores:
            raise UserError(f"--config.eval.metric={self.metric.removeprefix('eval/')} is not among {', '.join(scores)}")
        value = float(scores[self.metric])
        if not math.isfinite(value):
            return None
        if before is not None and before["metric"] == self.metric:
            sign = -1 if higher_is_better(self.metric) else 1
            if sign * value >= sign * before["value"]:
                return None
        return {"metric": self.metric, "value": value}


def build(
    options: Eval,
    dataset: DataSet,
    held_out: DataSet | None,
    geometry: jit_model.Geometry,
    process: Diffusion,
    mesh: Mesh,
    *,
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
      noise, objective: of the training.

    Raises:
      UserError: extractor or reference cannot be used.
    """
    chosen = open_extractor(options.extractor, weights=options.inception or None)
    reference = options.reference or (held_out if options.held_out else dataset)
    found, notes = open_reference(reference, chosen, geometry.image_size)
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
    evaluation = LiveEvaluation(
        Sampler(geometry, process, sampler, mesh, **common),
        chosen,
        found,
        labels=labels,
        patch=geometry.patch_size,
        batch_size=options.batch_size * mesh.size,
        held_out=held_out_loss,
        metric=options.metric,
        say=say,
    )
    where = f"eval/loss on {held_out.path} ({len(held_out):,} images)" if held_out is not None else "no held-out images"
    say(f"evaluation: {chosen.name} against {found.source}, best by {evaluation.metric}; {where}")
    for note in notes:
        say(f"evaluation: {note}")
    return evaluation


def find_held_out(wanted: str, path: str, reading: settings.Data, dataset: DataSet, class_conditional: bool) -> DataSet | None:
    """The images for eval/loss: those asked for, else the validation split beside the training images, else None.

    Args:
      path: of the training images; "" for a data set that lies in no folder.

    Raises:
      UserError: those asked for cannot be used, or have other classes.
    """
    how, size = reading.reading(), reading.image_size
    if wanted:
        found = open_dataset(wanted, size, **how)
        if class_conditional and found.class_names != dataset.class_names:
            raise UserError(
                f"--config.eval.held_out={wanted} has other classes ({len(found.class_names)}) than the training images "
                f"({len(dataset.class_names)}): name held-out images of the same classes"
            )
        return found
    for folder in (Path(path), Path(path).parent) if path else ():
        try:
            found = open_dataset(folder, size, **how | {"split": "val"})
        except UserError:
            continue
        if not class_conditional or found.class_names == dataset.class_names:
            return found
    return None
