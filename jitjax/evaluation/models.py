"""Scores of a model: draw images, extract features, compare with a reference. For `jitjax evaluate`, sweeps and live runs."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np

from jitjax.errors import UserError
from jitjax.evaluation.extractor import Extractor
from jitjax.evaluation.score import Scores, score
from jitjax.evaluation.seams import seam_index
from jitjax.evaluation.statistics import Statistics
from jitjax.pipeline import Pipeline

SEAM_IMAGES = 2048  # images whose seam index is measured


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """scores: of `evaluation.score`. seam_index: of the samples, None where it is undefined. seconds: by stage, "sampling"
    and "extraction". count: images. patch: side of the patches whose borders the seam index is about, in pixels."""

    scores: Scores
    seam_index: float | None
    seconds: dict[str, float]
    count: int
    patch: int

    @property
    def values(self) -> dict[str, float]:
        return self.scores.values | ({} if self.seam_index is None else {"seam_index": self.seam_index})


def evaluate_pipeline(
    pipe: Pipeline,
    labels: list[int | None],
    reference: Statistics,
    extractor: Extractor,
    *,
    seed: int = 0,
    batch_size: int | None = None,
    dtype: str | None = None,
    options: dict[str, Any] | None = None,
    about: dict[str, Any] | None = None,
    progress: Callable[[int], None] | None = None,
) -> Evaluation:
    """Draw one image per label and score them. All processes must call it; each extracts its own part.

    Args:
      labels: class of each image, None for the null class.
      options: of the sampler.
      about: more to name beside each score, e.g. the checkpoint.

    Raises:
      UserError: see `Pipeline.sample` and `score`.
    """
    batches = pipe.sample_batches(labels, seed=seed, batch_size=batch_size, dtype=dtype, **(options or {}))
    return evaluate_batches(
        (images for _, images in batches),
        reference,
        extractor,
        patch=pipe.geometry.patch_size,
        seed=seed,
        about=about,
        progress=progress,
    )


def evaluate_batches(
    batches: Iterator[np.ndarray],
    reference: Statistics,
    extractor: Extractor,
    *,
    patch: int,
    seed: int | None = 0,
    about: dict[str, Any] | None = None,
    progress: Callable[[int], None] | None = None,
) -> Evaluation:
    """As `evaluate_pipeline`, for batches of uint8 images that every process has whole. seed: with which they were drawn, None
    where that is not known."""
    seconds, kept, count = {"sampling": 0.0}, [], 0

    def own_part() -> Iterator[np.ndarray]:
        nonlocal count
        while True:
            begun = time.perf_counter()
            images = next(batches, None)
            seconds["sampling"] += time.perf_counter() - begun
            if images is None:
                return
            if count < SEAM_IMAGES:
                kept.append(images)
            count += len(images)
            yield images[jax.process_index() :: jax.process_count()]

    begun = time.perf_counter()
    drawn = {} if seed is None else {"sampling seed": seed}
    scores = score(own_part(), reference, extractor, seed=2020, about={**drawn, **(about or {})}, progress=progress)
    seconds["extraction"] = time.perf_counter() - begun - seconds["sampling"]
    if seed is None:  # what went before was reading files
        seconds = {"reading": seconds["sampling"], "extraction": seconds["extraction"]}
    try:
        seams = seam_index(np.concatenate(kept)[:SEAM_IMAGES], patch)
    except UserError as error:  # e.g. flat images of a model that has hardly begun
        seams = None
        scores = dataclasses.replace(scores, notes=(*scores.notes, f"{error} (left out)"))
    return Evaluation(scores, seams, seconds, count, patch)
