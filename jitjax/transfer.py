"""Starting a run from another run's weights: unconditional pretraining into a class-conditional fine-tuning, say."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from jitjax import diffusion, pipeline, step
from jitjax.errors import UserError
from jitjax.geometry import Geometry
from jitjax.model import Params
from jitjax.settings import Optimizer

LABELS = "y_embedder.table"
# Fields of the geometry that no parameter's shape shows, and what they are. Dropout is a setting of the new run.
UNSHOWN = {
    "image_size": "trained at {} pixels, now at {}",
    "context_start": "context tokens began at block {}, now at block {}",
    "class_start": "conditioned on the class from block {} on, now from block {}",
}


@dataclasses.dataclass
class Report:
    """Names of parameters by what became of them."""

    loaded: list[str] = dataclasses.field(default_factory=list)
    grown: list[str] = dataclasses.field(default_factory=list)
    left_out: list[str] = dataclasses.field(default_factory=list)  # in the source only, or of another shape
    fresh: list[str] = dataclasses.field(default_factory=list)  # in the new model only, or of another shape
    notes: list[str] = dataclasses.field(default_factory=list)

    def __str__(self) -> str:
        def names(kind: str, items: list[str]) -> str:
            shown = ", ".join(items[:6]) + (f", ... ({len(items)} in all)" if len(items) > 6 else "")
            return f"; {kind}: {shown}" if items else ""

        text = f"{len(self.loaded)} parameters loaded" + names("grown", self.grown) + names("left out", self.left_out)
        return text + names("initialised anew", self.fresh) + "".join(f"; {note}" for note in self.notes)


def grow_labels(source: jax.Array, fresh: jax.Array) -> jax.Array:
    """The class embedding for new classes: fresh rows for them, and the source's null class (its last row).

    Where the number of classes is the same the whole embedding is taken, so this is called for differing numbers only.
    """
    return jnp.concatenate([fresh[:-1], source[-1:]])


def transfer(source: Params, fresh: Params) -> tuple[Params, Report]:
    """`fresh` parameters with all that fits from `source`.

    The class embedding is grown (`grow_labels`) when the number of classes differs. Anything else of another shape stays
    fresh and is reported.
    """
    report, result = Report(), dict(fresh)
    for name, value in fresh.items():
        old = source.get(name)
        if old is not None and old.shape == value.shape:
            result[name] = old
            report.loaded.append(name)
        elif name == LABELS and old is not None and old.shape[1:] == value.shape[1:]:
            result[name] = grow_labels(old, value)
            report.grown.append(f"{name} {old.shape[0] - 1} -> {value.shape[0] - 1} classes")
        else:
            report.fresh.append(name)
    for name, old in source.items():
        if name not in fresh or (name in report.fresh):
            wanted = f", here {tuple(fresh[name].shape)}" if name in fresh else ""
            report.left_out.append(f"{name} {tuple(old.shape)}{wanted}")
    return result, report


def initialise_from(
    path: str,
    state: step.TrainState,
    geometry: Geometry,
    process: diffusion.Diffusion,
    class_names: tuple[str, ...],
    optim: Optimizer,
    dtype: str,
) -> tuple[step.TrainState, Report]:
    """A step-0 state with another model's weights and EMAs (its weights for a decay it lacks).

    Args:
      path: what `jitjax.load` takes. state, geometry: of the new run, the state at step 0.

    Raises:
      UserError: the other model predicts something else, is of another width, or has no weights.
    """
    pipe = pipeline.load(path)
    if pipe.diffusion.prediction != process.prediction:
        raise UserError(
            f"--config.init_from={path} predicts {pipe.diffusion.prediction}, this run predicts {process.prediction}: set "
            f"--config.prediction={pipe.diffusion.prediction}, or start from other weights"
        )
    if pipe.geometry.width != geometry.width:  # no matrix would fit: the run would begin anew
        raise UserError(
            f"--config.init_from={path} is a model of width {pipe.geometry.width}, this run's is {geometry.width}: set "
            "--config.model.name or --config.model.width to that of these weights, or start from other weights"
        )
    weights = jax.device_get(pipe.weights)
    raw = weights.get(pipeline.RAW, weights[pipe.which])
    params, report = transfer(raw, state.params)
    ema = {decay: transfer(weights.get(decay, raw), state.params)[0] for decay in state.ema}
    for decay in sorted(set(state.ema) - set(weights)):
        report.fresh.append(f"EMA {decay} (from the weights)")
    for field, text in UNSHOWN.items():
        before, now = getattr(pipe.geometry, field), getattr(geometry, field)
        if before != now and (field != "context_start" or (pipe.geometry.context_length and geometry.context_length)):
            report.notes.append(text.format(before, now))
    if pipe.diffusion.noise_scale != process.noise_scale:
        report.notes.append(f"trained with noise_scale {pipe.diffusion.noise_scale}, now {process.noise_scale}")
    if len(pipe.class_names) == len(class_names) and pipe.class_names != class_names:
        a, b = next((a, b) for a, b in zip(pipe.class_names, class_names, strict=True) if a != b)
        report.notes.append(f"the class embedding is loaded although class names differ (first: {a} -> {b})")
    report.notes.extend(pipe.notes)
    place = jax.tree.map(lambda leaf: leaf.sharding, state)
    fresh = jax.jit(lambda p, e: step.fresh_state(p, e, optim, dtype), out_shardings=place)
    return fresh(params, ema), report
