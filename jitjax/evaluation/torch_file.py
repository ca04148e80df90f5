"""State dicts in .pth files, of torch >= 1.6 (zip) and before (a row of pickles), read without executing anything of them.

The networks that score images were published before 2020, when `torch.save` still wrote: three pickles of header (magic
number, protocol, sizes of types), one of the content with a reference in place of each storage, one with the list of
storages, then each storage as its number of elements (int64) and its bytes.
"""

from __future__ import annotations

import hashlib
import os
import pickle
from collections import OrderedDict
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from jitjax.errors import UserError
from jitjax.interop.pth import DTYPES, LEGACY_MAGIC, PthFile

_LEGACY_PROTOCOL = 1001
_MAX_BYTES = 2**31


def check_sha256(path: str | os.PathLike, expected: str, remedy: str) -> None:
    """Raises UserError where the file is missing or its SHA-256 is not `expected`."""
    try:
        with open(path, "rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise UserError(f"{path}: {error.strerror or error}; {remedy}") from None
    if found != expected:
        raise UserError(
            f"{path}: damaged or another file: SHA-256 is {found[:16]}..., the published one is {expected[:16]}...; {remedy}"
        )


def read_state_dict(path: str | os.PathLike) -> dict[str, np.ndarray]:
    """The tensors of a state dict as NumPy arrays, by name.

    Raises:
      UserError: missing, damaged, naming anything but tensors, or not a flat dictionary of tensors.
    """
    path = Path(path)
    try:
        with open(path, "rb") as file:
            legacy = file.read(len(LEGACY_MAGIC)) == LEGACY_MAGIC
    except OSError as error:
        raise UserError(f"{path}: {error.strerror or error}; expected a .pth file") from None
    if legacy:
        return _read_legacy(path)
    with PthFile(path) as file:
        if not isinstance(file.content, dict) or not all(hasattr(value, "numpy") for value in file.content.values()):
            raise UserError(f"{path}: expected a state dict (names and tensors), found something else")
        return {str(name): tensor.numpy() for name, tensor in file.content.items()}


class _Tensor:
    """A tensor before its storage has been read."""

    def __init__(self, storage: Any, offset: Any, shape: Any, strides: Any, *_: Any):
        self.storage, self.offset, self.shape, self.strides = storage, offset, shape, strides

    def numpy(self, storages: dict[str, np.ndarray]) -> np.ndarray:
        key, dtype = self.storage
        data = storages[key]
        counts = [self.offset, *self.shape, *self.strides]
        if data.dtype != dtype or not all(type(n) is int and n >= 0 for n in counts) or len(self.shape) != len(self.strides):
            raise ValueError("a tensor is not described as torch describes tensors")
        size = int(np.prod(self.shape, dtype=object))
        last = self.offset + sum((n - 1) * stride for n, stride in zip(self.shape, self.strides, strict=True))
        if size > len(data) or (size and last >= len(data)):
            raise ValueError("a tensor reaches outside its bytes")
        strides = [stride * dtype.itemsize for stride in self.strides]
        view = np.lib.stride_tricks.as_strided(data[self.offset :], self.shape, strides, writeable=False)
        return np.array(view, order="C")


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        class Dictionary(OrderedDict):  # made anew: a state dict's pickle sets an attribute on it
            pass

        known = {("collections", "OrderedDict"): Dictionary, ("torch._utils", "_rebuild_tensor_v2"): _Tensor}
        known |= {("torch", storage): dtype for storage, dtype in DTYPES.items()}
        if (module, name) not in known:
            raise pickle.UnpicklingError(f"it names {module}.{name}, which is not read")
        return known[module, name]

    def persistent_load(self, pid: Any) -> tuple[str, np.dtype]:
        kind, dtype, key, _device, _numel, view = pid
        if kind != "storage" or view is not None or not isinstance(dtype, np.dtype):
            raise pickle.UnpicklingError("a storage is not described as torch describes storages")
        return str(key), dtype


def _read_legacy(path: Path) -> dict[str, np.ndarray]:
    try:
        if path.stat().st_size > _MAX_BYTES:
            raise ValueError(f"larger than {_MAX_BYTES >> 30} GiB")
        with open(path, "rb") as file:
            return _read_pickles(file)
    except Exception as error:  # hostile bytes may raise anything while being unpickled; nothing of the file has run
        detail = " ".join(str(error).split())[:100]
        raise UserError(f"{path}: damaged, or not a state dict ({type(error).__name__}: {detail})") from None


def _read_pickles(file: BinaryIO) -> dict[str, np.ndarray]:
    _magic, protocol, system = (_Unpickler(file).load() for _ in range(3))
    if protocol != _LEGACY_PROTOCOL or system.get("little_endian") is not True:
        raise ValueError("neither protocol 1001 nor little-endian")
    unpickler = _Unpickler(file)
    content = unpickler.load()
    if not isinstance(content, dict) or not all(isinstance(value, _Tensor) for value in content.values()):
        raise ValueError("not a flat dictionary of tensors")
    dtypes = {key: dtype for key, dtype in (tensor.storage for tensor in content.values())}
    keys = _Unpickler(file).load()
    storages = {}
    for key in keys:
        dtype = dtypes[key]
        count = int.from_bytes(file.read(8), "little", signed=True)
        data = file.read(count * dtype.itemsize) if 0 <= count < _MAX_BYTES else b""
        if count < 0 or len(data) != count * dtype.itemsize:
            raise ValueError("cut off")
        storages[key] = np.frombuffer(data, dtype)
    return {str(name): tensor.numpy(storages) for name, tensor in content.items()}
