"""PyTorch's .pth files (the zip layout of torch >= 1.6) without PyTorch, read without executing anything from them.

A .pth is a zip archive with one pickle, `data.pkl`, and the bytes of every tensor beside it. `jitjax.interop.pickles`
reads the pickle; this module checks the archive, gives tensors their bytes, and writes such files.
"""

from __future__ import annotations

import io
import math
import pickle
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import ml_dtypes
import numpy as np

from jitjax import atomic
from jitjax.errors import UserError
from jitjax.interop import pickles
from jitjax.interop.pickles import BadFile

DTYPES = {
    "FloatStorage": np.dtype(np.float32),
    "HalfStorage": np.dtype(np.float16),
    "BFloat16Storage": np.dtype(ml_dtypes.bfloat16),
    "DoubleStorage": np.dtype(np.float64),
    "LongStorage": np.dtype(np.int64),
    "IntStorage": np.dtype(np.int32),
    "ShortStorage": np.dtype(np.int16),
    "CharStorage": np.dtype(np.int8),
    "ByteStorage": np.dtype(np.uint8),
    "BoolStorage": np.dtype(np.bool_),
}
MAX_PICKLE_BYTES = 16 * 2**20  # JiT-H with optimizer state takes half a megabyte
LEGACY_MAGIC = b"\x80\x02\x8a\x0a\x6c\xfc\x9c\x46\xf9\x20\x6a\xa8\x50\x19"  # how files of torch < 1.6 begin
ALIGNMENT = 64  # bytes, of each tensor in the file, as torch aligns them


class LazyTensor:
    """A tensor in an open .pth file: shape and dtype are known, the bytes are read by `numpy()`."""

    def __init__(self, read: Callable[[], np.ndarray], dtype: np.dtype, offset: int, shape: tuple, strides: tuple):
        self._read, self.dtype, self._offset, self.shape, self._strides = read, dtype, offset, shape, strides

    def numpy(self) -> np.ndarray:
        """The values, C-contiguous, shape `self.shape`.

        Raises:
          BadFile: the bytes are damaged (checksum) or cut off.
        """
        strides = [stride * self.dtype.itemsize for stride in self._strides]
        view = np.lib.stride_tricks.as_strided(self._read()[self._offset :], self.shape, strides, writeable=False)
        return np.ascontiguousarray(view).reshape(self.shape)  # ascontiguousarray turns 0-d into 1-d


class PthFile:
    """An open .pth file: `content` is what `torch.save` was given, with `LazyTensor` for every tensor.

    `strays` names the classes (module.name) of values that are neither tensors nor plain; an inert `pickles.Stray` stands
    for each of them in `content`.

    Example:
      >>> with PthFile("checkpoint-last.pth") as file:
      ...     weight = file.content["model"]["net.final_layer.linear.weight"].numpy()
    """

    def __init__(self, path: str | Path):
        """
        Raises:
          BadFile: missing, truncated, damaged, of an older format, or naming a function (see `pickles`).
        """
        self.path = Path(path).expanduser()
        self._zip = _open_zip(self.path)
        try:
            self._root = _check_archive(self.path, self._zip)
            unpickler = pickles.InertUnpickler(
                self._bytes("data.pkl"),
                names={
                    ("torch._utils", "_rebuild_tensor_v2"): self._tensor,
                    ("torch._utils", "_rebuild_tensor"): self._tensor,
                    ("torch._utils", "_rebuild_parameter"): lambda tensor, *_: tensor,
                    ("torch._utils", "_rebuild_parameter_with_state"): lambda tensor, *_: tensor,
                    ("torch._tensor", "_rebuild_from_type_v2"): lambda rebuild, _, args, *__: pickles.call(rebuild, args),
                },
                values={("torch", name): dtype for name, dtype in DTYPES.items()},
                persistent=self._storage,
                where=str(self.path),
            )
            self.content = unpickler.load()
            self.strays = unpickler.strays
        except BaseException:
            self._zip.close()
            raise

    def __enter__(self) -> PthFile:
        return self

    def __exit__(self, *_: Any) -> None:
        self._zip.close()

    def _bytes(self, name: str) -> bytes:
        try:
            return self._zip.read(f"{self._root}/{name}")
        except (zipfile.BadZipFile, EOFError, OSError, struct.error, NotImplementedError) as error:
            raise BadFile(f"{self.path}: damaged or cut off at {name}: {error}") from None

    def _storage(self, persistent_id: Any) -> tuple[str, Any, int]:
        """("data/<key>", dtype, number of elements) of a checked reference to tensor bytes."""
        try:
            kind, dtype, key, _device, numel = persistent_id
            size = self._zip.getinfo(f"{self._root}/data/{key}").file_size
        except (TypeError, ValueError, KeyError):
            raise BadFile(f"{self.path}: a tensor has no bytes in the archive: expected data/<number>") from None
        if kind == "storage" and pickles.is_stray(dtype):  # complex, float8, ...: the tensor becomes a stray value
            return f"data/{key}", dtype, 0
        if kind != "storage" or not isinstance(dtype, np.dtype) or not _is_count(numel):
            raise BadFile(f"{self.path}: expected a reference to tensor bytes, found {str(kind)[:40]!r}")
        if size != numel * dtype.itemsize:
            raise BadFile(f"{self.path}: data/{key} has {size} bytes, expected {numel} x {dtype.itemsize} ({dtype})")
        return f"data/{key}", dtype, numel

    def _tensor(self, storage: Any, offset: Any, shape: Any, strides: Any, *_: Any) -> LazyTensor | pickles.Stray:
        if isinstance(storage, tuple) and len(storage) == 3 and pickles.is_stray(storage[1]):
            return storage[1]()
        try:
            name, dtype, numel = storage
            counts = [offset, *shape, *strides]
            usable = isinstance(dtype, np.dtype) and len(shape) == len(strides) and all(map(_is_count, counts))
            size = math.prod(shape)
            last = offset + sum((n - 1) * stride for n, stride in zip(shape, strides, strict=True)) if size else offset
        except (TypeError, ValueError):
            usable = False
        # The second condition refuses views that repeat a few bytes into an array of any size.
        if not usable or last >= numel + (size == 0) or size > numel:
            raise BadFile(f"{self.path}: a tensor reaches outside its bytes: the file is damaged or was tampered with")
        return LazyTensor(lambda: np.frombuffer(self._bytes(name), dtype), dtype, offset, tuple(shape), tuple(strides))


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**62


def _open_zip(path: Path) -> zipfile.ZipFile:
    try:
        with open(path, "rb") as file:
            head = file.read(len(LEGACY_MAGIC))
        return zipfile.ZipFile(path)
    except OSError as error:
        raise BadFile(f"{path}: {error.strerror or error}; expected a .pth file") from None
    except (zipfile.BadZipFile, struct.error, ValueError, NotImplementedError) as error:
        if head == LEGACY_MAGIC:
            found = "the format of torch < 1.6; load and save it once with a current torch"
        elif head.startswith(b"PK"):
            found = f"a truncated or damaged zip archive ({error})"
        else:
            found = f"a file that begins with {head[:8]!r}"
        raise BadFile(f"{path}: expected a zip archive as torch.save writes it, found {found}") from None


def _check_archive(path: Path, archive: zipfile.ZipFile) -> str:
    """The folder inside the archive that everything lies in."""
    entries = archive.infolist()
    roots = [info.filename[: -len("/data.pkl")] for info in entries if info.filename.endswith("/data.pkl")]
    if len(roots) != 1 or "/" in roots[0]:
        raise BadFile(f"{path}: expected one <name>/data.pkl in the archive, found {len(roots)} (is it a .pth at all?)")
    root, names = roots[0], {info.filename for info in entries}
    if f"{root}/constants.pkl" in names:
        raise BadFile(f"{path}: expected a checkpoint, found a TorchScript program")
    # torch stores without compression. With that demanded, nothing unpacks to more than the file's own size.
    if any(info.compress_type != zipfile.ZIP_STORED or info.flag_bits & 1 for info in entries):
        raise BadFile(f"{path}: expected uncompressed entries as torch writes them, found compressed or encrypted ones")
    if len(names) != len(entries) or sum(info.file_size for info in entries) > path.stat().st_size:
        raise BadFile(f"{path}: entries of the archive overlap or repeat: the file is damaged or was tampered with")
    if archive.getinfo(f"{root}/data.pkl").file_size > MAX_PICKLE_BYTES:
        raise BadFile(f"{path}: data.pkl is larger than {MAX_PICKLE_BYTES} bytes: not a checkpoint of JiT")
    if f"{root}/byteorder" in names and archive.read(f"{root}/byteorder").strip() != b"little":
        raise BadFile(f"{path}: expected little-endian numbers, found a big-endian file")
    return root


# ---------------------------------------------------------------- writing


class _Name:
    """A global in the pickle, by name, whether or not it can be imported here."""

    def __init__(self, module: str, name: str):
        self.module, self.name = module, name


class _Storage:
    def __init__(self, array: np.ndarray, key: int):
        self.array, self.key = array, key


STORAGE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


class _Pickler(pickle._Pickler):
    """The pure-Python pickler, which alone can write a name without importing it: torch need not be installed."""

    dispatch = dict(pickle._Pickler.dispatch)

    def __init__(self, file: BinaryIO, arrays: list[np.ndarray]):
        super().__init__(file, protocol=2)  # torch's own, and the only one that weights_only=True reads
        self._arrays = arrays

    def persistent_id(self, obj: Any) -> Any:
        if not isinstance(obj, _Storage):
            return None
        kind = _Name("torch", STORAGE_NAMES[obj.array.dtype])
        return ("storage", kind, str(obj.key), "cpu", obj.array.size)

    def save_name(self, obj: _Name) -> None:
        self.write(pickle.GLOBAL + f"{obj.module}\n{obj.name}\n".encode())
        self.memoize(obj)

    def save_array(self, array: np.ndarray) -> None:
        key = len(self._arrays)
        self._arrays.append(array)
        strides = tuple(math.prod(array.shape[i + 1 :]) for i in range(array.ndim))
        self.save(_Name("torch._utils", "_rebuild_tensor_v2"))
        self.save((_Storage(array, key), 0, array.shape, strides, False, OrderedDict()))
        self.write(pickle.REDUCE)
        self.memoize(array)

    dispatch[_Name] = save_name
    dispatch[np.ndarray] = save_array


def write_pth(path: str | Path, content: Any) -> None:
    """Write `content` as `torch.save` would: NumPy arrays become tensors, everything else must be plain Python values.

    `torch.load(path, weights_only=True)` reads it. The file appears under its name only when it is complete.

    Raises:
      UserError: the path cannot be written.
      KeyError: an array of a dtype that torch does not have (see `DTYPES`).
    """
    path, arrays, pickled = Path(path).expanduser(), [], io.BytesIO()
    _Pickler(pickled, arrays).dump(content)
    entries: Iterator[tuple[str, Any]] = iter(
        [
            ("data.pkl", pickled.getvalue()),
            (".format_version", b"1"),
            (".storage_alignment", str(ALIGNMENT).encode()),
            ("byteorder", b"little"),
            *((f"data/{key}", array) for key, array in enumerate(arrays)),
            ("version", b"3\n"),
        ]
    )
    try:
        with atomic.writing(path, alone=True) as partial, zipfile.ZipFile(partial, "w") as archive:
            for name, value in entries:
                _write_entry(archive, f"archive/{name}", value)
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror or error}): free space or name another") from None


def _write_entry(archive: zipfile.ZipFile, name: str, value: Any) -> None:
    """One entry, stored, its bytes aligned by padding in the local header's extra field (torch does the same)."""
    data = np.ascontiguousarray(value).reshape(-1).view(np.uint8).data if isinstance(value, np.ndarray) else value
    info = zipfile.ZipInfo(name)
    large = len(data) >= 2**31
    header = 30 + len(name.encode()) + (20 if large else 0) + 4  # fixed part, name, zip64 sizes, our field's own header
    padding = -(archive.fp.tell() + header) % ALIGNMENT
    info.extra = b"FB" + struct.pack("<H", padding) + bytes(padding)
    with archive.open(info, "w", force_zip64=large) as file:
        file.write(data)
