"""Means and covariances of features: accumulated batch by batch, saved, and read from the files of other evaluators."""

from __future__ import annotations

import dataclasses
import io
import os
import pickle
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from jitjax import atomic
from jitjax.errors import UserError

FID_EXTRACTOR = "inception-v3-2015-12-05"  # what files of other evaluators hold, which do not name their extractor
FID_DIM, SPATIAL_DIM = 2048, 2023
_MAX_PICKLE_BYTES = 2**30
_FORMAT = 1


class FeatureStatistics:
    """Mean and covariance of features in float64, from batches in any number and size, without holding them.

    Batches are combined by Chan's parallel update, so parts (hosts, files) merge to what one pass over all would give.
    """

    def __init__(self, dim: int):
        self.count = 0
        self._mean = np.zeros(dim)
        self._scatter = np.zeros((dim, dim))  # sum of (x - mean)(x - mean)^T

    def update(self, features: np.ndarray) -> None:
        """Adds a batch, (n, D)."""
        features = np.asarray(features, np.float64)
        if features.ndim != 2 or features.shape[1] != len(self._mean):
            raise UserError(f"features of shape {features.shape} do not fit statistics of {len(self._mean)} dimensions")
        if len(features):
            mean = features.mean(axis=0)
            centred = features - mean
            self._add(len(features), mean, centred.T @ centred)

    def merge(self, other: FeatureStatistics) -> None:
        """Adds the images of `other`, which stays as it is."""
        if other.count:
            self._add(other.count, other._mean, other._scatter)

    def _add(self, count: int, mean: np.ndarray, scatter: np.ndarray) -> None:
        total = self.count + count
        difference = mean - self._mean
        self._scatter += scatter + np.outer(difference, difference) * (self.count * count / total)
        self._mean = self._mean + difference * (count / total)
        self.count = total

    @property
    def mu(self) -> np.ndarray:
        """(D,) mean, float64."""
        return self._mean.copy()

    @property
    def sigma(self) -> np.ndarray:
        """(D, D) covariance, float64, divided by count - 1. Raises UserError for fewer than two images."""
        if self.count < 2:
            raise UserError(f"a covariance needs at least 2 images, there are {self.count}")
        return self._scatter / (self.count - 1)

    def to_array(self) -> np.ndarray:
        """All of it as one float64 vector, to be sent to another host."""
        return np.concatenate([[float(self.count)], self._mean, self._scatter.ravel()])

    @classmethod
    def from_array(cls, array: np.ndarray, dim: int) -> FeatureStatistics:
        made = cls(dim)
        made.count = int(array[0])
        made._mean = array[1 : 1 + dim].copy()
        made._scatter = array[1 + dim :].reshape(dim, dim).copy()
        return made


@dataclasses.dataclass(frozen=True)
class Statistics:
    """What a set of images looks like to an extractor: a reference to score against.

    mu (D,), sigma (D, D): float64. mu_s, sigma_s: the same of the spatial features (for sFID), or None. features: (M, D)
    float32 of at most `count` images, evenly spaced through the set, for scores that need more than moments, or None.
    extractor, resize: names, None in files of other evaluators. image_size: edge in pixels, None if unknown. count: images
    behind mu and sigma, None if unknown. source: file or folder, for messages.
    """

    mu: np.ndarray
    sigma: np.ndarray
    source: str
    mu_s: np.ndarray | None = None
    sigma_s: np.ndarray | None = None
    features: np.ndarray | None = None
    extractor: str | None = None
    resize: str | None = None
    image_size: int | None = None
    count: int | None = None

    def check(self, *, extractor: str, dim: int, image_size: int, resize: str | None = None) -> list[str]:
        """Refuses statistics that cannot be compared with features of `extractor` from images of `image_size` pixels.

        Returns:
          What could not be checked, one sentence each: files of other evaluators name neither extractor nor size.

        Raises:
          UserError: of another extractor, resize rule, image size or number of features.
        """
        remedy = "make statistics with this extractor and size (jitjax evaluate stats), or choose the file's extractor"
        known = self.extractor is not None
        if known and self.extractor != extractor:
            raise UserError(f"{self.source}: statistics of extractor {self.extractor}, not of {extractor}; {remedy}")
        if not known and extractor != FID_EXTRACTOR and len(self.mu) == FID_DIM:
            raise UserError(
                f"{self.source}: names no extractor; files of other evaluators hold FID Inception features, which do not "
                f"compare with {extractor}; {remedy}"
            )
        if len(self.mu) != dim:
            raise UserError(f"{self.source}: statistics of {len(self.mu)} features, but {extractor} has {dim}; {remedy}")
        if self.resize is not None and resize is not None and self.resize != resize:
            raise UserError(f"{self.source}: statistics with resize rule '{self.resize}', not '{resize}'; {remedy}")
        if self.image_size is not None and self.image_size != image_size:
            sizes = f"statistics of {self.image_size} px images, the scored ones have {image_size} px"
            raise UserError(f"{self.source}: {sizes}; {remedy}")
        unknown = [] if known else [f"{self.source} does not name its extractor: assumed to be {extractor}"]
        if self.image_size is None:
            unknown.append(f"{self.source} does not say of what image size it is: assumed to be {image_size} px")
        if self.count is None:
            unknown.append(f"{self.source} does not say of how many images it is")
        return unknown


def write_statistics(path: str | os.PathLike, statistics: Statistics) -> None:
    """Writes an .npz that torch-fidelity's fork, edm and ADM read (`mu`, `sigma`, `mu_s`, `sigma_s`), with our own entries
    beside theirs. The file appears under its name only when complete.

    Raises:
      UserError: the path does not end in .npz or cannot be written.
    """
    path = Path(path).expanduser()
    if path.suffix != ".npz":
        raise UserError(f"{path}: statistics are written as .npz; choose a name that ends so")
    values = {field.name: getattr(statistics, field.name) for field in dataclasses.fields(statistics)}
    arrays = {name: np.asarray(value) for name, value in values.items() if value is not None}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic.writing(path) as partial, open(partial, "wb") as file:
            np.savez(file, jitjax_format=np.int64(_FORMAT), **arrays)
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror or error}): free space or name another") from None


def read_statistics(path: str | os.PathLike) -> Statistics:
    """Reads statistics: our own .npz, those of torch-fidelity's fork, edm and ADM, or edm2's pickle (its `fid` entry).

    Nothing in a file is executed. An ADM reference batch also holds images (`arr_0`), which `npz_images` reads.

    Raises:
      UserError: missing, damaged, without `mu` and `sigma`, shapes that do not agree, NaN, a covariance that is none.
    """
    path = Path(path).expanduser()
    try:
        with open(path, "rb") as file:
            head = file.read(4)
        if head == b"PK\x03\x04":
            found = _read_npz(path)
        elif head[:1] == b"\x80":
            found = _read_edm2(path)
        else:
            raise UserError(f"{path}: neither an .npz nor a pickle of statistics (begins with {head!r})")
    except OSError as error:
        raise UserError(f"{path}: {error.strerror or error}; expected a file of statistics (.npz, or edm2's .pkl)") from None
    return _checked(found, str(path))


def _read_npz(path: Path) -> dict[str, Any]:
    wanted = [field.name for field in dataclasses.fields(Statistics) if field.name != "source"]
    try:
        with np.load(path, allow_pickle=False) as file:
            found = {name: file[name] for name in wanted if name in file.files}
            names, version = file.files, int(file["jitjax_format"]) if "jitjax_format" in file.files else None
    except (ValueError, zipfile.BadZipFile, EOFError, KeyError, TypeError, MemoryError, NotImplementedError) as error:
        raise UserError(f"{path}: damaged, or no .npz of plain arrays: {error}") from None
    if version is not None and version > _FORMAT:
        raise UserError(f"{path}: written by a newer jitjax (format {version}, this one reads {_FORMAT}); update jitjax")
    if "mu" not in found or "sigma" not in found:
        raise UserError(f"{path}: holds {', '.join(names[:6]) or 'nothing'}; statistics need mu and sigma")
    return {
        name: value.item() if name in ("extractor", "resize", "image_size", "count") and value.ndim == 0 else value
        for name, value in found.items()
    }


def _checked(found: dict[str, Any], source: str) -> Statistics:
    for mean_name, covariance_name in (("mu", "sigma"), ("mu_s", "sigma_s")):
        if (mean_name in found) != (covariance_name in found):
            raise UserError(f"{source}: holds only one of {mean_name} and {covariance_name}")
        if mean_name not in found:
            continue
        mean, covariance = found[mean_name], found[covariance_name]
        numeric = all(isinstance(array, np.ndarray) and array.dtype.kind == "f" for array in (mean, covariance))
        if not numeric or mean.ndim != 1 or covariance.shape != (len(mean), len(mean)):
            raise UserError(f"{source}: {mean_name} and {covariance_name} must be floats of shapes (D,) and (D, D)")
        mean, covariance = mean.astype(np.float64), covariance.astype(np.float64)
        if not (np.isfinite(mean).all() and np.isfinite(covariance).all()):
            raise UserError(f"{source}: {mean_name} or {covariance_name} holds NaN or infinity: the file is damaged")
        size = np.abs(covariance).max(initial=0)
        if np.diagonal(covariance).min(initial=0) < 0 or np.abs(covariance - covariance.T).max(initial=0) > 1e-4 * size:
            raise UserError(f"{source}: {covariance_name} is no covariance (not symmetric, or a negative variance)")
        found[mean_name], found[covariance_name] = mean, covariance
    features = found.get("features")
    if features is not None and (features.ndim != 2 or features.shape[1] != len(found["mu"]) or features.dtype.kind != "f"):
        raise UserError(f"{source}: features must be floats of shape (M, {len(found['mu'])}), got {features.shape}")
    if features is not None and not (len(features) and np.isfinite(features).all()):
        raise UserError(f"{source}: features holds no rows, NaN or infinity: the file is damaged")
    for name, kind in (("extractor", str), ("resize", str), ("image_size", int), ("count", int)):
        if name in found and not isinstance(found[name], kind):
            raise UserError(f"{source}: {name} must be one {kind.__name__}: the file is damaged")
    return Statistics(source=source, **found)


# ---------------------------------------------------------------- edm2's pickle


class _Array:
    """Stands in for numpy.ndarray while unpickling: collects what describes an array, checks it, and builds the array."""

    def __setstate__(self, state: Any) -> None:
        _version, shape, dtype, fortran, data = state
        self.value = _array(data, dtype, shape, "F" if fortran else "C")


class _Dtype:
    """Stands in for numpy.dtype: only floats and integers of 2 to 8 bytes."""

    def __init__(self, code: str, *_: Any):
        if code not in ("f2", "f4", "f8", "i4", "i8", "u4", "u8"):
            raise pickle.UnpicklingError(f"arrays of dtype {code!r} are not read")
        self.value = np.dtype(code)

    def __setstate__(self, state: Any) -> None:
        if state[1] not in ("<", "=", "|", ">"):
            raise pickle.UnpicklingError(f"unknown byte order {state[1]!r}")
        self.value = self.value.newbyteorder(state[1])


def _array(data: Any, dtype: Any, shape: Any, order: str) -> np.ndarray:
    if not isinstance(dtype, _Dtype) or not isinstance(data, bytes | bytearray) or order not in ("C", "F"):
        raise pickle.UnpicklingError("an array is not described as NumPy describes arrays")
    return np.frombuffer(data, dtype.value).reshape(shape, order=order).astype(dtype.value.newbyteorder("="))


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        known = {
            "ndarray": _Array,
            "dtype": _Dtype,
            "_reconstruct": lambda *_: _Array(),
            "_frombuffer": lambda data, dtype, shape, order: _array(data, dtype, shape, order),
            "scalar": lambda dtype, data: _array(data, dtype, (), "C").item(),
        }
        if (module == "numpy" or module.startswith("numpy.")) and name in known:
            return known[name]
        if (module, name) == ("_codecs", "encode"):  # how protocol 2 writes bytes
            return lambda text, encoding: text.encode("latin1")
        raise pickle.UnpicklingError(f"it names {module}.{name}, which is not read")


def _read_edm2(path: Path) -> dict[str, Any]:
    if path.stat().st_size > _MAX_PICKLE_BYTES:
        raise UserError(f"{path}: a pickle of more than {_MAX_PICKLE_BYTES >> 20} MiB is no file of statistics")
    try:
        content = _Unpickler(io.BytesIO(path.read_bytes())).load()
    except Exception as error:  # unpickling hostile bytes may raise anything; nothing of the file has run
        detail = " ".join(str(error).split())[:100]
        raise UserError(f"{path}: no pickle of statistics as edm2 writes them ({type(error).__name__}: {detail})") from None
    moments = content.get("fid") if isinstance(content, dict) else None
    if not isinstance(moments, dict) or not {"mu", "sigma"} <= moments.keys():
        raise UserError(f"{path}: expected edm2's {{num_images, fid: {{mu, sigma}}}}, with an entry fid; it has none")
    found = {name: getattr(moments[name], "value", moments[name]) for name in ("mu", "sigma")}
    count = content.get("num_images")
    return found if count is None else {**found, "count": count}


# ---------------------------------------------------------------- images in .npz


def is_npz(path: Path) -> bool:
    """Whether a file of this name is taken for an .npz: by its ending alone, in capitals or not."""
    return path.suffix.lower() == ".npz"


def npz_names(path: str | os.PathLike) -> list[str]:
    """Names of the arrays in an .npz. Raises UserError where it cannot be read."""
    try:
        with zipfile.ZipFile(path) as archive:
            return [name.removesuffix(".npy") for name in archive.namelist()]
    except OSError as error:
        raise UserError(f"{path}: {error.strerror or error}; expected an .npz") from None
    except (zipfile.BadZipFile, ValueError, NotImplementedError) as error:
        raise UserError(f"{path}: damaged, or no .npz: {error}") from None


@dataclasses.dataclass(frozen=True)
class NpzImages:
    """Images in an .npz as ADM writes them: `arr_0` (N, S, S, 3) uint8. Iterates over batches, which alone are in memory."""

    path: str
    count: int
    image_size: int
    batch_size: int

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[np.ndarray]:
        shape = (self.image_size, self.image_size, 3)
        try:
            with zipfile.ZipFile(self.path) as archive, archive.open("arr_0.npy") as file:
                _npy_header(file)
                for start in range(0, self.count, self.batch_size):
                    n = min(self.batch_size, self.count - start)
                    data = file.read(n * int(np.prod(shape)))
                    yield np.frombuffer(data, np.uint8).reshape(n, *shape)
        except (OSError, zipfile.BadZipFile, ValueError, EOFError, zipfile.zlib.error) as error:
            raise UserError(f"{self.path}: arr_0 is damaged or cut off: {error}") from None


def npz_images(path: str | os.PathLike, batch_size: int = 256) -> NpzImages:
    """Opens the images of an .npz (`arr_0`).

    Raises:
      UserError: no such file, damaged, no `arr_0`, or one that is not uint8 (N, S, S, 3).
    """
    path = os.fspath(Path(path).expanduser())
    if "arr_0" not in npz_names(path):
        raise UserError(f"{path}: has no arr_0; images are stored as arr_0, uint8 of shape (N, size, size, 3)")
    try:
        with zipfile.ZipFile(path) as archive, archive.open("arr_0.npy") as file:
            shape, fortran, dtype = _npy_header(file)
    except (OSError, zipfile.BadZipFile, ValueError, EOFError) as error:
        raise UserError(f"{path}: arr_0 is damaged: {error}") from None
    if dtype != np.uint8 or fortran or len(shape) != 4 or shape[1] != shape[2] or shape[3] != 3 or 0 in shape:
        raise UserError(f"{path}: arr_0 is {dtype} of shape {shape}; images are uint8 of shape (N, size, size, 3)")
    return NpzImages(path, shape[0], shape[1], batch_size)


def _npy_header(file: Any) -> tuple[tuple[int, ...], bool, np.dtype]:
    version = np.lib.format.read_magic(file)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    return read(file)
