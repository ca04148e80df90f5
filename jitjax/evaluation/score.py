"""The protocol: which labels, against which reference, which scores, and what has to be said beside each number."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

import jitjax
from jitjax import metrics
from jitjax.data.dataset import DataSet, open_dataset
from jitjax.errors import UserError, naming
from jitjax.evaluation.extractor import Extractor, cache_folder
from jitjax.evaluation.images import DataImages
from jitjax.evaluation.statistics import (
    FeatureStatistics,
    Statistics,
    is_npz,
    npz_images,
    npz_names,
    read_statistics,
    write_statistics,
)
from jitjax.settings import DECODING

PAPER_IMAGES = 50_000
CACHE_VERSION = 2  # of cached statistics: those of version 1 can lack 64 images
REFERENCE_FEATURES = 10_000  # ADM's number of reference images for precision and recall
KID_SUBSETS, KID_SUBSET_SIZE, IS_SPLITS, NEIGHBOURS = 100, 1000, 10, 3
_UPDATE = 2048  # images whose covariance is added at once: adding D x D matrices costs as much as multiplying 256 rows


def class_balanced_labels(count: int, num_classes: int) -> np.ndarray:
    """(count,) int32: the labels of the published evaluation, each class count / num_classes times, in order of classes.

    Raises:
      UserError: `count` is not a positive multiple of `num_classes`.
    """
    if num_classes < 1 or count < 1 or count % num_classes:
        lower = count // num_classes * num_classes if num_classes > 0 else 0
        nearest = f"{lower} or {lower + num_classes}" if lower else f"{num_classes}"
        raise UserError(f"num={count} images cannot be balanced over {num_classes} classes; use a multiple, e.g. {nearest}")
    return np.repeat(np.arange(num_classes, dtype=np.int32), count // num_classes)


# ---------------------------------------------------------------- the reference


def open_reference(
    reference: str | os.PathLike | DataSet | Statistics,
    extractor: Extractor,
    image_size: int,
    *,
    reading: Mapping[str, Any] | None = None,
    flag: str = "--reference",
    cache: bool = True,
    progress: Callable[[int], None] | None = None,
) -> tuple[Statistics, list[str]]:
    """What to score against, and notes about it.

    Args:
      reference: a file of statistics (.npz of jitjax, torch-fidelity's fork, edm, ADM; edm2's pickle), an .npz of images
        (`arr_0`), a folder of images or prepared directory, an open data set, or statistics.
      image_size: of the scored images, in pixels; folders are read at this size, as training reads them.
      reading: how the files of a folder are read, where that is not the default (`jitjax.data.open_dataset`). flag: what
        messages call the reference.
      cache: save statistics of data sets in the cache folder and use them again; the key holds the data set's fingerprint.
      progress: called with the number of reference images done, where features must be extracted.

    Raises:
      UserError: nothing usable, damaged, or of another extractor, resize rule or size.
    """
    notes: list[str] = []
    with naming(flag, reference) if isinstance(reference, str | os.PathLike) else contextlib.nullcontext():
        if isinstance(reference, str | os.PathLike):
            path = Path(reference).expanduser()
            if path.is_dir():
                reference = open_dataset(path, image_size, flag=flag, **(reading or {}))
                notes.append(f"reference: {reference.summary}")
            elif split := (reading or {}).get("split"):
                raise UserError(f"--split={split} is for a folder of images, and {flag}={path} is none: leave it out")
            elif is_npz(path) and path.is_file() and "mu" not in (names := npz_names(path)) and "arr_0" in names:
                images = npz_images(path)
                _check_size(str(path), images.image_size, image_size)
                made = make_statistics(images, extractor, source=str(path), image_size=image_size, progress=progress)
                return made, notes
            else:
                reference = read_statistics(path)
                notes += reference.check(
                    extractor=extractor.name, dim=extractor.dim, image_size=image_size, resize=extractor.resize
                )
                if reference.features is None and is_npz(path) and "arr_0" in npz_names(path):
                    images = npz_images(path)
                    _check_size(str(path), images.image_size, image_size)
                    sample = make_statistics(images, extractor, source=str(path), image_size=image_size, progress=progress)
                    notes.append(f"{path}: KID, precision, recall and MIND use its {len(images)} images (arr_0)")
                    reference = dataclasses.replace(reference, features=sample.features, image_size=image_size)
        if isinstance(reference, DataSet):
            _check_size(reference.path, reference.image_size, image_size)
            reference, cached = dataset_statistics(reference, extractor, cache=cache, progress=progress)
            notes += cached
        else:
            reference.check(extractor=extractor.name, dim=extractor.dim, image_size=image_size, resize=extractor.resize)
    return reference, notes


def _check_size(source: str, found: int, wanted: int) -> None:
    if found != wanted:
        raise UserError(f"{source}: its images have {found} px, the scored ones {wanted} px; a score needs equal sizes")


def dataset_statistics(
    dataset: DataSet, extractor: Extractor, *, cache: bool = True, progress: Callable[[int], None] | None = None
) -> tuple[Statistics, list[str]]:
    """Statistics of a data set, from the cache where it has them, and notes about skipped images and the cache."""
    made_of = [dataset.fingerprint, _content(dataset), dataset.image_size, extractor.name, extractor.resize]
    key = json.dumps([*made_of, REFERENCE_FEATURES, CACHE_VERSION], sort_keys=True)
    file = cache_folder() / "statistics" / f"{hashlib.sha256(key.encode()).hexdigest()[:24]}.npz"
    if cache and file.is_file():
        try:
            found = dataclasses.replace(read_statistics(file), source=dataset.path)
            found.check(extractor=extractor.name, dim=extractor.dim, image_size=dataset.image_size, resize=extractor.resize)
            skipped = len(dataset) - (found.count or len(dataset))
            left_out = [f"{dataset.path}: {skipped} images could not be decoded"] if skipped else []
            return found, [f"{dataset.path}: statistics of an earlier run, from {file}", *left_out]
        except UserError as error:
            unusable = [f"cached statistics were made anew: {error}"]
    else:
        unusable = []
    images = DataImages(dataset)
    made = make_statistics(images, extractor, source=dataset.path, image_size=dataset.image_size, progress=progress)
    notes = unusable
    if images.skipped:
        notes.append(f"{dataset.path}: {len(images.skipped)} images could not be decoded, the first: {images.skipped[0]}")
    if cache and jax.process_index() == 0:
        try:
            write_statistics(file, made)
        except UserError as error:
            notes.append(f"statistics were not cached: {error}")
    return made, notes


def _content(dataset: DataSet) -> str:
    """When each file of a folder was last written and how it is decoded, as one checksum: a fingerprint has names and sizes
    only."""
    if dataset.kind != "folder":
        return ""
    digest = hashlib.sha256(json.dumps({name: getattr(dataset.source, name) for name in DECODING}).encode())
    for index in range(len(dataset)):
        found = os.stat(dataset.source.name(index))
        digest.update(b"%d %d " % (found.st_mtime_ns, found.st_ctime_ns))
    return digest.hexdigest()


def make_statistics(
    images: Iterable[np.ndarray],
    extractor: Extractor,
    *,
    source: str,
    image_size: int,
    progress: Callable[[int], None] | None = None,
) -> Statistics:
    """Statistics of all `images` (uint8 batches, with a length), and features of at most 10,000 evenly spaced ones.

    Args:
      source: what the images are, for messages. progress: called with the number of images done.

    Raises:
      UserError: fewer than two images, or batches that are no images.
    """
    kept = np.unique(np.linspace(0, len(images) - 1, min(len(images), REFERENCE_FEATURES)).round().astype(np.int64))
    moments = _Moments(extractor, "features", "spatial")
    features, done = [], 0
    for outputs in extractor.stream(images):
        count = len(outputs["features"])
        moments.add(outputs)
        first, last = np.searchsorted(kept, [done, done + count])
        features.append(outputs["features"][kept[first:last] - done])
        done += count
        if progress:
            progress(done)
    if done + len(getattr(images, "skipped", ())) != len(images):
        raise RuntimeError(f"{source}: {done} of {len(images)} images were read and no reason was given for the rest")
    found = moments.finish()
    pooled, spatial = found["features"], found.get("spatial")
    if pooled.count < 2:
        raise UserError(f"{source}: holds {pooled.count} readable images; statistics need at least 2")
    return Statistics(
        mu=pooled.mu,
        sigma=pooled.sigma,
        source=source,
        mu_s=spatial.mu if spatial else None,
        sigma_s=spatial.sigma if spatial else None,
        features=np.concatenate(features),
        extractor=extractor.name,
        resize=extractor.resize,
        image_size=image_size,
        count=pooled.count,
    )


class _Moments:
    """Statistics of the extractor's outputs `names`, as far as it has them, added a few thousand images at a time."""

    def __init__(self, extractor: Extractor, *names: str):
        dims = {"features": extractor.dim, "spatial": extractor.spatial_dim}
        self._all = {name: FeatureStatistics(dims[name]) for name in names if name in extractor.outputs}
        self._waiting: dict[str, list[np.ndarray]] = {name: [] for name in self._all}

    def add(self, outputs: Mapping[str, np.ndarray]) -> None:
        for name, rows in self._waiting.items():
            rows.append(outputs[name])
            if sum(map(len, rows)) >= _UPDATE:
                self._flush(name)

    def _flush(self, name: str) -> None:
        if self._waiting[name]:
            self._all[name].update(np.concatenate(self._waiting[name]))
            self._waiting[name].clear()

    def finish(self) -> dict[str, FeatureStatistics]:
        for name in self._all:
            self._flush(name)
        return self._all


# ---------------------------------------------------------------- scoring


@dataclasses.dataclass(frozen=True)
class Scores:
    """values: name -> number, e.g. {"fid": 12.3, "kid": 0.004, "kid_std": ...}; a Fréchet distance of another extractor than
    FID's is never called "fid". lines: one printable line per score, complete by itself. notes: what was left out, assumed,
    or must be known to read the numbers. about: everything that the lines name, JSON-able.
    """

    values: dict[str, float]
    lines: tuple[str, ...]
    notes: tuple[str, ...]
    about: dict[str, Any]


def score(
    images: Iterable[np.ndarray],
    reference: Statistics,
    extractor: Extractor,
    *,
    seed: int = 2020,
    about: Mapping[str, Any] | None = None,
    progress: Callable[[int], None] | None = None,
) -> Scores:
    """Scores generated images against a reference: Fréchet distance, sFID, IS, KID, precision, recall, MIND.

    What cannot be computed is left out and a note says why. Images are dropped once their features are computed; pooled
    features and logits of all are held, (N, D) float32. With several processes each brings its own part of the images.

    Args:
      images: uint8 batches (n, S, S, 3). reference: from `open_reference`, which has checked that it fits.
      seed: of random subsets, orders and directions in KID, IS and MIND. about: more to print in each line, e.g. checkpoint,
        EMA, guidance, the sampler's seed. progress: called with the number of images done.

    Raises:
      UserError: no images, not images, of unequal sizes, or of another size than the reference's.
    """
    moments, features, logits, done = _Moments(extractor, "spatial"), [], [], 0
    for outputs in extractor.stream(_of_size(images, reference)):
        moments.add(outputs)
        features.append(outputs["features"])
        logits.append(outputs.get("logits"))
        done += len(outputs["features"])
        if progress:
            progress(done)
    spatial = moments.finish().get("spatial")
    if jax.process_count() == 1 and not done:
        raise UserError("there are no images to score")
    x = _gather_rows(np.concatenate(features) if features else np.zeros((0, extractor.dim), np.float32))
    p = None
    if "logits" in extractor.outputs:
        p = _gather_rows(np.concatenate(logits))
    if spatial is not None:
        spatial = _gather_statistics(spatial, extractor.spatial_dim)
    notes = list(extractor.notices)
    if len(x) != PAPER_IMAGES:
        notes.append(
            f"N is {len(x)}, not {PAPER_IMAGES}: a Fréchet distance depends on N and compares only with values of the same N; "
            "to rank models with few images use MIND, which claims the ranking of FID-50K from 5,000 (arXiv 2605.06797)"
        )
    values = _scores(x, p, spatial, reference, extractor, seed, notes)
    described = {
        "evaluator": f"jitjax {jitjax.__version__}",
        "extractor": extractor.name,
        "resize": extractor.resize,
        "reference": reference.source,
        "reference_images": reference.count if reference.count is not None else "unknown",
        "N": len(x),
        "seed": seed,
        **(about or {}),
    }
    suffix = "; ".join(f"{name} {value}" for name, value in described.items())
    lines = tuple(
        f"{_title(name, extractor)} {_number(name, values)}  ({suffix})" for name in values if not name.endswith("_std")
    )
    return Scores(values, lines, tuple(notes), described)


def _of_size(images: Iterable[np.ndarray], reference: Statistics) -> Iterable[np.ndarray]:
    for batch in images:
        if reference.image_size is not None and np.ndim(batch) == 4:
            _check_size(reference.source, reference.image_size, np.shape(batch)[1])
        yield batch


def _scores(
    x: np.ndarray,
    logits: np.ndarray | None,
    spatial: FeatureStatistics | None,
    reference: Statistics,
    extractor: Extractor,
    seed: int,
    notes: list[str],
) -> dict[str, float]:
    values: dict[str, float] = {}
    count, y = len(x), reference.features
    names, left_out = computed(count, reference, extractor)
    notes += left_out
    if slug(extractor.distance) in names:
        own = FeatureStatistics(extractor.dim)
        own.update(x)
        fewest = min(count, reference.count or count)
        notes += [note for note in [metrics.singular_covariance(fewest, extractor.dim)] if note]
        values[slug(extractor.distance)] = metrics.frechet_of_moments(own.mu, own.sigma, reference.mu, reference.sigma)
    if "sfid" in names:
        values["sfid"] = metrics.frechet_of_moments(spatial.mu, spatial.sigma, reference.mu_s, reference.sigma_s)
    if (name := _inception_score(extractor)) in names:
        values[name], values[f"{name}_std"] = metrics.inception_score(logits, IS_SPLITS, True, seed)
    if y is not None and len(y) != reference.count:
        notes.append(f"KID, precision, recall and MIND use {len(y)} images of the reference")
    if "kid" in names:
        fewest = min(count, len(y))
        size = min(KID_SUBSET_SIZE, fewest)
        values["kid"], spread = metrics.kid(x, y, KID_SUBSETS, size, seed)
        if size < fewest:
            values["kid_std"] = spread
        else:
            notes.append(f"KID from subsets of {size} images, without a spread: there are no more, so they are all alike")
    if "precision" in names:
        values["precision"], values["recall"] = metrics.precision_recall(x, y, NEIGHBOURS)
    if "mind" in names:
        values["mind"] = metrics.mind(x, y, seed)
    return values


def computed(count: int, reference: Statistics, extractor: Extractor) -> tuple[list[str], list[str]]:
    """(names of the scores that `score` computes of `count` images, notes: what it leaves out and why)."""
    names, notes = [], []

    def choose(found: list[str], title: str, missing: str | None) -> None:
        if missing is None:
            names.extend(found)
        else:
            notes.append(f"{title} left out: {missing}")

    few = f"a covariance needs at least 2 images, there are {count}" if count < 2 else None
    choose([slug(extractor.distance)], extractor.distance, few)
    if "spatial" in extractor.outputs:
        lacking = f"{reference.source} has no spatial statistics (mu_s, sigma_s)" if reference.mu_s is None else None
        choose(["sfid"], "sFID", few or lacking)
    if "logits" in extractor.outputs:
        few = f"it needs at least {IS_SPLITS} images, there are {count}" if count < IS_SPLITS else None
        choose([_inception_score(extractor)], "IS", few)
    if reference.features is None:
        choose([], "KID, precision, recall and MIND", f"{reference.source} holds means and covariances only")
        return names, notes
    fewest = min(count, len(reference.features))
    choose(["kid"], "KID", f"it needs at least 2 images, there are {fewest}" if fewest < 2 else None)
    few = f"k={NEIGHBOURS} needs more than {NEIGHBOURS} images, there are {fewest}" if fewest <= NEIGHBOURS else None
    choose(["precision", "recall"], "precision and recall", few)
    choose(["mind"], "MIND", None)
    return names, notes


def _inception_score(extractor: Extractor) -> str:
    return "inception_score" if extractor.distance == "FID" else slug(f"is-{extractor.name}")


def slug(name: str) -> str:
    """A score's key in logs: "FD-EfficientNet-Lite0" -> "fd_efficientnet_lite0"."""
    return "".join(c if c.isalnum() else "_" for c in name.lower())


def _title(name: str, extractor: Extractor) -> str:
    other = "" if extractor.distance == "FID" else f"-{extractor.distance.removeprefix('FD-')}"
    titles = {"sfid": "sFID", "kid": "KID", "precision": "precision", "recall": "recall", "mind": "MIND"}
    if name == slug(extractor.distance):
        return extractor.distance
    return (titles[name] if name in titles else "IS") + other


def _number(name: str, values: Mapping[str, float]) -> str:
    spread = f" +- {values[f'{name}_std']:.3g}" if f"{name}_std" in values else ""
    return f"{values[name]:.5g}{spread}"


# ---------------------------------------------------------------- several processes


def _gather_rows(rows: np.ndarray) -> np.ndarray:
    """The rows of all processes, in order of processes."""
    if jax.process_count() == 1:
        return rows
    from jax.experimental.multihost_utils import process_allgather

    counts = process_allgather(np.asarray(len(rows), np.int32))
    padded = np.zeros((int(counts.max()), *rows.shape[1:]), rows.dtype)
    padded[: len(rows)] = rows
    return np.concatenate([part[:count] for part, count in zip(process_allgather(padded), counts, strict=True)])


def _gather_statistics(own: FeatureStatistics, dim: int) -> FeatureStatistics:
    """The statistics of all processes' images together."""
    if jax.process_count() == 1:
        return own
    from jax.experimental.multihost_utils import process_allgather

    together = FeatureStatistics(dim)
    # As integers: JAX would make float32 of float64.
    for part in process_allgather(own.to_array().view(np.uint32)):
        together.merge(FeatureStatistics.from_array(np.asarray(part).view(np.float64), dim))
    return together
