"""A model that knows how it is used: geometry, diffusion settings, class names, weights and EMAs, as one object.

    pipe = jitjax.load("runs/a")
    images = pipe.sample(["cat", "dog"], seed=0, cfg_scale=2.9, interval=(0.1, 1.0))   # (2, S, S, 3) uint8
    pipe.save("exported")                                                              # weights, config.json, model card
    pipe.push("hf://me/shapes")                                                        # the same, on the Hugging Face Hub

Images are drawn by `jitjax.sampler`.
"""

from __future__ import annotations

import copy
import dataclasses
import logging
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jitjax import diffusion, ema, hub, model_card, settings, sharding
from jitjax import model as jit_model
from jitjax.diffusion import Diffusion
from jitjax.errors import UserError
from jitjax.geometry import Geometry
from jitjax.sampler import Sampler, cached_sampler

_log = logging.getLogger(__name__)

RAW = "model"  # the weights that the optimizer moves; the other sets are EMAs, named by their decay
PER_DEVICE = {"gpu": 64, "cpu": 8}  # images that a device draws at once, unless batch_size says otherwise


@dataclasses.dataclass(frozen=True)
class Pipeline:
    """A model with all that is needed to use it.

    geometry, diffusion: what the network is and how its output is to be read.
    class_names: one name per class, or empty.
    weights: "model" and EMAs by their decay, e.g. "0.9999"; each {parameter name: array}.
    which: the set of weights in use.
    """

    geometry: Geometry
    diffusion: Diffusion
    weights: dict[str, jit_model.Params]
    which: str
    class_names: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()  # what was guessed or left out while loading
    step: int | None = None  # optimizer steps behind the weights, where known
    workdir: Path | None = None  # of the run that it was loaded from
    run: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # what its checkpoint records: config, scores, ...
    class_conditional: bool = True  # False: trained without labels, so that of a class embedding only the null class is trained

    def __post_init__(self):
        if self.class_names and len(self.class_names) != self.geometry.num_classes:
            raise UserError(f"{len(self.class_names)} class names for a model of {self.geometry.num_classes} classes")
        if self.which not in self.weights:
            raise UserError(f"there are no weights {self.which!r}: {', '.join(self.weights)} are there")
        weights = {name: jit_model.without_class_head(params) for name, params in self.weights.items()}
        object.__setattr__(self, "weights", weights)
        object.__setattr__(self, "geometry", dataclasses.replace(self.geometry, class_head=False))

    @property
    def params(self) -> jit_model.Params:
        """The weights in use."""
        return self.weights[self.which]

    @property
    def classes(self) -> int:
        """Classes that it can draw; 0 for a model that was trained without labels, whatever its class embedding holds."""
        return self.geometry.num_classes if self.class_conditional else 0

    @property
    def emas(self) -> tuple[str, ...]:
        return tuple(name for name in self.weights if name != RAW)

    @property
    def snapshots(self) -> Path | None:
        """Folder of the run's EMA snapshots, where there is one."""
        folder = self.workdir and self.workdir / ema.FOLDER
        return folder if folder and folder.is_dir() else None

    def using(self, which: str | None) -> Pipeline:
        """The same pipeline with another set of weights in use: "model" (or "params"), an EMA's decay, "model_ema1" or
        "model_ema2" (first and second of fixed decay); None: the EMA that is first. "power:0.07" is rebuilt from the run's
        snapshots.

        Raises:
          UserError: there is no such set; the line names those that are there.
        """
        if str(which).startswith(settings.POWER) and which not in self.weights and self.snapshots:
            return self._rebuilt(str(which))
        return dataclasses.replace(self, which=choose(self.weights, which))

    def _rebuilt(self, which: str) -> Pipeline:
        try:
            target = ema.Target(self.step, sigma_rel=float(which.removeprefix(settings.POWER)))
        except ValueError:
            raise UserError(f"EMA {which!r}: give a number after {settings.POWER}, e.g. {settings.POWER}0.07") from None
        params, found = ema.reconstruct(ema.find_snapshots(self.snapshots), target)
        note = f"EMA {which} rebuilt from snapshots in {self.snapshots}: its profile is {found.residual:.1%} off"
        return dataclasses.replace(self, weights=self.weights | {which: params}, which=which, notes=(*self.notes, note))

    def model(self) -> jit_model.JiT:
        """The network as an `nnx` module: `model(z, t, y)` with NHWC floats, t in [0, 1], y up to num_classes (= null)."""
        params = {name: jnp.asarray(value) for name, value in self.params.items()}
        return jit_model.merge(jit_model.graphdef_of(self.geometry), params)

    # ------------------------------------------------------------ labels

    def label_of(self, label: int | str | None) -> int:
        """The class number of a number or name; None is the null class. Text is a name first, and a number where no class has
        a number for a name.

        Raises:
          UserError: out of range, a fraction, or an unknown name.
        """
        n = self.classes
        if label is None:
            return self.geometry.num_classes
        if isinstance(label, str):
            if label in self.class_names:
                return self.class_names.index(label)
            if not re.fullmatch(r"-?[0-9]+", label.strip()):
                import difflib

                if not self.class_names:
                    raise UserError(f"label {label!r}: this model has no class names, only numbers in [0, {n})")
                near = difflib.get_close_matches(label, self.class_names, 3, 0.5) or list(self.class_names[:5])
                raise UserError(f"label {label!r} is none of the {n} classes of this model; near: {', '.join(near)}")
            if numbers := [name for name in self.class_names if name.isdigit()]:  # one of them could be meant
                raise UserError(
                    f"label {label!r}: the classes of this model have numbers for names ({', '.join(numbers[:3])}, ...) and "
                    "none is called so: use their names"
                )
            label = int(label)
        try:
            number = int(label)
        except (TypeError, ValueError, OverflowError):
            number = None
        if isinstance(label, bool | np.bool_) or number is None or number != label:
            raise UserError(f"label {label!r}: must be a whole number or a class name")
        if not 0 <= number < n:
            allowed = f"[0, {n})" if n else "none: it was trained without classes (leave labels out)"
            raise UserError(f"label {number} is out of range: this model has classes {allowed}")
        return number

    @property
    def decoding(self) -> dict[str, Any]:
        """How files became the pixels that it was trained on, as far as its checkpoint says: for `jitjax.data.open_dataset`."""
        data = (self.run.get("config") or {}).get("data") or {}
        return {name: data[name] for name in settings.DECODING if name in data}

    # ------------------------------------------------------------ sampling

    def sampler_options(self, **options: Any) -> settings.Sampler:
        """All options of a sampler, the unnamed ones as this model is sampled by default. Raises as `sampler_options`."""
        return sampler_options(**{"t_eps": self.diffusion.sample_t_eps} | options)

    def sample(
        self,
        labels: Sequence[int | str | None] | np.ndarray | int | None = None,
        *,
        num: int | None = None,
        seed: int = 0,
        steps: int = 50,
        method: str = "heun",
        cfg_scale: float = 1.0,
        interval: tuple[float, float] = (0.0, 1.0),
        batch_size: int | None = None,
        dtype: str | None = None,
        **more: Any,
    ) -> np.ndarray:
        """Draw one image per label.

        Args:
          labels: class numbers or names; None in it is the null class. Left out: `num` unconditional images.
          seed: image i depends on (seed, i, its label) alone, not on batch size or devices.
          steps, method, cfg_scale, interval: of `jitjax.sampling.sample_fn`; `more` takes its other options.
          batch_size: images drawn at once, over all devices; rounded up to their number.
          dtype: type of matmuls and attention; default bfloat16 on a GPU, float32 elsewhere.

        Returns:
          (N, S, S, 3) uint8.

        Raises:
          UserError: a label or an option that does not fit.
        """
        options = dict(steps=steps, method=method, cfg_scale=cfg_scale, interval=interval, **more)
        batches = self.sample_batches(labels, num=num, seed=seed, batch_size=batch_size, dtype=dtype, **options)
        size = self.geometry.image_size
        return np.concatenate([np.empty((0, size, size, 3), np.uint8), *(images for _, images in batches)])

    def sample_batches(
        self,
        labels: Any = None,
        *,
        num: int | None = None,
        seed: int = 0,
        indices: Sequence[int] | None = None,
        batch_size: int | None = None,
        dtype: str | None = None,
        moments: int = 0,
        **options: Any,
    ) -> Iterator[tuple[list[int], Any]]:
        """As `sample`, a batch at a time: (indices of its images, (B, S, S, 3) uint8). Arguments are checked before this
        returns.

        Args:
          indices: the image index of each label; default 0, 1, 2, ...
          moments: k > 0 gives (images, states, predicted images) instead of images, the last two (k, B, S, S, 3) uint8 at k
            moments of the way from noise to image.
        """
        if labels is None:
            numbers = [self.geometry.num_classes] * (1 if num is None else _whole("num", num, 0))
        else:
            listed = [labels] if isinstance(labels, int | str) else list(labels)
            if num is not None and num != len(listed):
                raise UserError(f"num={num} with {len(listed)} labels: give one of the two")
            numbers = [self.label_of(label) for label in listed]
        seed = _whole("seed", seed, 0)
        chosen = self.sampler_options(**options)
        if chosen.cfg_scale != 1 and not self.classes:
            raise UserError(f"cfg_scale={chosen.cfg_scale}: guidance needs a model with classes, this one has none")
        mesh = sharding.make_mesh(None, 1, 1)
        platform = jax.default_backend()
        per_device = PER_DEVICE.get(platform, 64)
        batch = _whole("batch_size", batch_size, 1) if batch_size is not None else per_device * mesh.size
        batch = min(batch, max(1, len(numbers)))
        batch = -(-batch // mesh.size) * mesh.size
        dtype = compute_dtype(dtype)
        # One program for all guidance scales other than 1.
        generic = chosen if chosen.cfg_scale == 1 else dataclasses.replace(chosen, cfg_scale=2.0)
        sampler = copy.copy(cached_sampler(self.geometry, self.diffusion, generic, mesh, dtype, moments))
        sampler.cfg_scale = np.float32(chosen.cfg_scale)
        indices = list(range(len(numbers))) if indices is None else list(indices)
        chex.assert_equal(len(indices), len(numbers))
        return self._batches(sampler, numbers, seed, indices, batch)

    def _batches(self, sampler: Sampler, numbers: list[int], seed: int, indices: list[int], batch: int):
        if not numbers:
            return
        params = jax.device_put(self.params, NamedSharding(sampler.mesh, P()))
        for start in range(0, len(numbers), batch):
            part = slice(start, start + batch)
            # The last batch is padded, so that it reuses the compiled program.
            yield indices[part], sampler(params, seed, indices[part], numbers[part], size=batch)

    # ------------------------------------------------------------ storage

    def save(self, folder: str | Path, *, samples: int | None = None) -> Path:
        """Write `model.safetensors` (all sets of weights) and `config.json`, and for people a model card, `README.md`, with a
        grid, `samples.png`. A `README.md` that is there already stays, with its grid; the log says so. `jitjax.load` of the
        folder uses the EMA that is in use here; the first one where the raw weights are.

        Args:
          samples: images to draw for the grid; default: the run's last preview up to this step, if it has one; 0: no grid.

        Raises:
          UserError: the folder cannot be written.
        """
        return self._save(Path(folder).expanduser(), samples)

    def push(self, name: str, *, private: bool | None = None, samples: int | None = None, message: str = "") -> str:
        """Save and upload to the Hugging Face Hub, and return the address; `jitjax.load(name)` gets it back. A model card
        that is there already stays, with its grid; the log says so.

        Args:
          name: hf://OWNER/NAME, or hf://OWNER/NAME@BRANCH. The repository is made if there is none.
          private: whether a new repository is private; default the owner's own default.
          samples: as for `save`.
          message: of the commit; default names the step.

        Raises:
          UserError: huggingface_hub is not installed or has no token that may write there, or no network.
        """
        with tempfile.TemporaryDirectory() as folder:
            self._save(Path(folder), samples, name)
            message = message or "Weights" + (f" of step {self.step:,}" if self.step is not None else "")
            address, notes = hub.push(Path(folder), name, private=private, message=message)
        for note in notes:
            _log.warning("%s", note)
        return address

    def _save(self, folder: Path, samples: int | None, name: str = "hf://OWNER/NAME") -> Path:
        from jitjax.interop.weights import write_folder

        facts = dataclasses.asdict(self.diffusion) | {"class_names": list(self.class_names)}
        if self.classes != self.geometry.num_classes:
            facts["class_conditional"] = False
        # A set at a time, as JAX sorts the names of a dictionary. The one in use goes first: `load` takes the first EMA.
        order = dict.fromkeys((self.which, *self.weights))
        write_folder(folder, {name: jax.device_get(self.weights[name]) for name in order}, self.geometry, facts)
        if (folder / hub.CARD).exists():
            _log.warning("%s stays as it is; delete it to have it written again", folder / hub.CARD)
            return folder
        try:
            picture = self._preview(folder / hub.PICTURE) if samples is None else self._draw(folder / hub.PICTURE, samples)
            (folder / hub.CARD).write_text(model_card.model_card(self, name=name, picture=picture), encoding="utf-8")
        except OSError as error:
            raise UserError(f"{folder}: cannot be written ({error.strerror or error}): free space or name another") from None
        return folder

    def _preview(self, picture: Path) -> str:
        """The run's last preview up to this step, and what it shows; "" where there is none."""
        if self.workdir is None or self.step is None:
            return ""
        found = ((path.stem.removeprefix("step_"), path) for path in (self.workdir / "samples").glob("step_*.png"))
        step, path = max(((int(n), path) for n, path in found if n.isdigit() and int(n) <= self.step), default=(0, None))
        if path is None:
            return ""
        shutil.copyfile(path, picture)
        return f"The run's preview at step {step:,}"

    def _draw(self, picture: Path, count: int) -> str:
        """Draws images, class-balanced, as the run drew its previews; "" for none."""
        if not count:
            return ""
        from jitjax.monitor import save_grid

        options, classes = model_card.sampling(self), self.classes
        labels = [i % classes for i in range(count)] if classes else None
        images = self.sample(labels, num=None if classes else count, **dataclasses.asdict(options))
        captions = labels and [self.class_names[i] if self.class_names else str(i) for i in labels]
        save_grid(picture, images, captions=captions, labels=labels)
        guidance = f", guidance {options.cfg_scale:g}" if options.cfg_scale != 1 else ""
        used = "the raw weights" if self.which == RAW else f"EMA {self.which}"
        return f"Drawn from {used}: {options.method}, {options.steps} steps{guidance}"


def choose(sets: Mapping[str, Any], which: str | None) -> str:
    """The name of a set of weights in `sets`, see `Pipeline.using`."""
    emas = [name for name in sets if name != RAW]
    if which is None:
        return emas[0] if emas else RAW
    fixed = [name for name in emas if not name.startswith(settings.POWER)]
    aliases = {"params": RAW, "raw": RAW, **{f"model_ema{i + 1}": name for i, name in enumerate(fixed)}}
    name = aliases.get(str(which), str(which))
    if name not in sets:
        raise UserError(f"there are no weights {which!r}: use one of {', '.join(sets)}")
    return name


def sampler_options(**options: Any) -> settings.Sampler:
    """Checked options of a sampler.

    Raises:
      UserError: an unknown option, a wrong type, steps < 1, a reversed interval, ...
    """
    hints = {name.removeprefix("sampler."): field for name, field in settings.fields_of(settings.Sampler, "sampler.").items()}
    for name in options:
        if name not in hints:
            raise UserError(f"{name} is no option of the sampler: use {', '.join(hints)}")
    values = {name: hints[name].check(value, flag=name) for name, value in options.items()}
    chosen = settings.Sampler(**values)
    settings.check_interval(chosen.interval, "interval")
    return chosen


def compute_dtype(dtype: str | None) -> str:
    """The default is bfloat16 on a GPU and float32 elsewhere."""
    if dtype is None:
        return "bfloat16" if jax.default_backend() == "gpu" else "float32"
    name = jnp.dtype(dtype).name if not isinstance(dtype, str) else dtype
    if name not in ("bfloat16", "float32", "float16"):
        raise UserError(f"dtype={name}: must be one of bfloat16, float32, float16")
    return name


def _whole(name: str, value: Any, low: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or not low <= value < 2**32:
        raise UserError(f"{name}={value!r}: must be a whole number in [{low}, {2**32})")
    return int(value)


# ---------------------------------------------------------------- loading


def load(path: str | Path, which: str | None = None) -> Pipeline:
    """A pipeline from a workdir (its newest checkpoint), one checkpoint or `runs/a/checkpoints/best`, an exported folder, an
    official .pth, a .safetensors file, or the Hugging Face Hub (hf://OWNER/NAME, see `jitjax.hub`).

    Args:
      which: the set of weights to use; default the first EMA, see `Pipeline.using`.

    Raises:
      UserError: nothing readable there, or no such set of weights in it.
    """
    from jitjax import checkpoint
    from jitjax.interop import sources
    from jitjax.interop import weights as weight_files

    path = hub.download(str(path)) if hub.is_name(path) else Path(path).expanduser()
    best = checkpoint.means_best(path)
    if not os.path.exists(path) and not best:  # also where a name is too long to look for
        raise UserError(f"{path}: no such file or folder; give a workdir, a checkpoint, an exported folder or a weights file")
    if best or (path.is_dir() and sources.is_workdir(path)):
        pipe = from_checkpoint(checkpoint.load_weights(path), checkpoint.workdir_of(path))
    else:
        pipe = from_weights(weight_files.read_weights(path))
    return pipe.using(which)


def from_weights(found: Any) -> Pipeline:
    """A pipeline from `interop.weights.read_weights`; what the file does not say is assumed as published, and noted."""
    size, notes = found.geometry.image_size, list(found.notes)
    published = dict(prediction="x", noise_scale=max(1.0, size / 256), t_eps=0.05, sample_t_eps=0.05)
    facts = {name: found.facts[name] for name in published if found.facts.get(name) is not None}
    assumed = [f"{name}={published[name]}" for name in ("prediction", "noise_scale") if name not in facts]
    if assumed:
        notes.append(f"the file does not say {' and '.join(assumed)}: assumed, as published")
    decays = [str(decay) for decay in found.decays]
    emas = [name for name in found.sets if name != RAW]
    names = {RAW: RAW, **dict(zip(emas, decays, strict=False))}
    weights = {names.get(name, name): params for name, params in found.sets.items()}
    return Pipeline(
        geometry=found.geometry,
        diffusion=Diffusion(**published | facts),
        weights=weights,
        which=choose(weights, None),
        class_names=_names(found.class_names, found.geometry.num_classes),
        notes=tuple(notes),
        step=found.step,
        class_conditional=found.class_conditional is not False,
    )


def from_checkpoint(saved: Any, workdir: Path | None = None) -> Pipeline:
    """A pipeline from `checkpoint.load_weights`. EMAs come in the order of the run's configuration."""
    meta, config = saved.meta, saved.meta.get("config") or {}
    optim = config.get("optim") or {}
    order = settings.Optimizer(**{name: tuple(optim.get(name) or ()) for name in ("power_emas", "ema_decays")}).emas
    emas = sorted(saved.ema, key=lambda name: (order.index(name) if name in order else len(order), name))
    weights = {RAW: saved.params, **{name: saved.ema[name] for name in emas}}
    return Pipeline(
        geometry=saved.geometry,
        diffusion=Diffusion(**meta["diffusion"]) if "diffusion" in meta else diffusion.from_config(config),
        weights=weights,
        which=choose(weights, None),
        class_names=_names(meta.get("class_names"), saved.geometry.num_classes),
        step=saved.step,
        workdir=workdir,
        run=meta,
        class_conditional=(config.get("model") or {}).get("class_conditional") is not False,
    )


def _names(names: Sequence[str] | None, classes: int) -> tuple[str, ...]:
    """Names are those of the data set: a model without labels has seen them and does not know them."""
    return tuple(names) if names and len(names) == classes else ()
