"""Pictures during training: a grid of samples from an EMA of the weights, always with the same noise and labels."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import jax
import numpy as np

from jitjax import model as jit_model
from jitjax.diffusion import Diffusion
from jitjax.from_settings import Setup
from jitjax.monitor import save_grid
from jitjax.sampler import Sampler

LARGEST_ROW = 16  # classes shown at most, one per column


class Preview:
    """Samples a grid from the live EMAs; the sampler is compiled once, at the first call."""

    def __init__(
        self, sampler: Sampler, *, num_images: int, classes: int, null_label: int, class_names: tuple[str, ...], seed: int
    ):
        """Args:
        num_images: images of the grid.
        classes: of a class-conditional model; 0: every image is unconditional, with `null_label`.
        class_names: captions; empty: the labels.
        """
        self._sampler, self._seed, self._indices = sampler, seed, range(num_images)
        self._columns = self._captions = None
        self._labels = np.full(num_images, null_label, np.int32)
        if classes:
            self._columns = min(classes, LARGEST_ROW)
            shown = np.linspace(0, classes - 1, self._columns).round().astype(np.int32)
            self._labels = np.resize(shown, num_images)
            self._captions = [class_names[i] if class_names else str(i) for i in self._labels]

    def __call__(self, params: jit_model.Params, path: Path) -> Path:
        """Sample and write the grid as PNG (process 0 only). All processes must call it."""
        images = self._sampler(params, self._seed, self._indices, self._labels)
        if jax.process_index() == 0:
            labels = None if self._captions is None else self._labels
            save_grid(path, images, columns=self._columns, captions=self._captions, labels=labels)
        return path


def build_preview(setup: Setup, process: Diffusion, class_names: tuple[str, ...]) -> Preview:
    """The previews of a run; one without labels is drawn without guidance.

    Args:
      class_names: of the data set, or empty.
    """
    settings, geometry, conditional = setup.settings, setup.geometry, setup.settings.model.class_conditional
    options = settings.preview.sampler()
    if not conditional:
        options = dataclasses.replace(options, cfg_scale=1.0)
    how = dict(dtype=settings.dtype, ops=setup.ops, comm_dtype=settings.mesh.comm_dtype)
    return Preview(
        Sampler(geometry, process, options, setup.mesh, **how),
        num_images=settings.preview.num_images,
        classes=geometry.num_classes if conditional else 0,
        null_label=geometry.num_classes,
        class_names=class_names,
        seed=settings.seed,
    )
