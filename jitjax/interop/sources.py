"""Opening a file or folder of weights: what lies in it, with the tensors not yet read, and what stands beside it."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import safetensors

from jitjax.errors import UserError
from jitjax.interop import names
from jitjax.interop.pickles import BadFile
from jitjax.interop.pth import PthFile

WEIGHT_FILES = (  # in a folder, in this order
    *("model.safetensors", "diffusion_pytorch_model.safetensors", "model.safetensors.index.json"),
    *("diffusion_pytorch_model.safetensors.index.json", "pytorch_model.bin", "diffusion_pytorch_model.bin"),
)
CHECKPOINTS = "checkpoints"  # jitjax.checkpoint.DIRECTORY, which is not imported here: it brings Orbax
WEIGHT_ENDINGS = (".safetensors", ".pth", ".pt", ".pth.tar", ".ckpt", ".bin")


@dataclasses.dataclass
class Source:
    """An open file: its content with unread tensors, and what stands beside it."""

    path: Path
    content: Any
    metadata: dict[str, Any] = dataclasses.field(default_factory=dict)  # "geometry", "facts", "sets" of our own files
    config: dict[str, Any] = dataclasses.field(default_factory=dict)  # of config.json
    labels: Any = None
    notes: list[str] = dataclasses.field(default_factory=list)
    unread: list[str] = dataclasses.field(default_factory=list)  # other files and folders of weights in the folder


def is_workdir(path: Path) -> bool:
    """Whether a folder is a run of ours, its folder of checkpoints, or one checkpoint."""
    if path.parent.name == CHECKPOINTS and path.name.isdigit():
        return True
    folder = path if path.name == CHECKPOINTS else path / CHECKPOINTS
    return folder.is_dir() and any(f.name.isdigit() and f.is_dir() for f in folder.iterdir())


@contextlib.contextmanager
def open_source(path: Path) -> Iterator[Source]:
    """The content of a file, or of the file of weights in a folder; what kind it is, its first bytes tell.

    Raises:
      UserError: nothing there, or not a file of weights; says what was found.
    """
    folder, notes, unread = None, [], []
    if path.is_dir():
        folder, path = path, weights_file(path, notes)
        unread = _beside(folder, path)
        if unread:
            notes.append(f"not read: {', '.join(unread)}, which may be other weights; give it by itself to read it")
    elif path.name.endswith(".safetensors"):
        folder = path.parent  # a config.json beside the file belongs to it
    try:
        with open(path, "rb") as file:
            head = file.read(9)  # a .safetensors: 8 bytes of length, then JSON
    except OSError as error:
        raise BadFile(f"{path}: {error.strerror or error}; expected a file or folder with the weights of a JiT") from None
    if head.startswith(b"version h"):
        raise BadFile(f"{path}: expected weights, found a Git LFS pointer; run git lfs pull in its folder")
    with contextlib.ExitStack() as stack:
        if path.name.endswith(".index.json"):
            parts = [path.parent / name for name in _shards(path)]
            source = Source(path, {})
            for part in parts:
                content = _open_safetensors(part, stack) if _is_safetensors(part) else _open_pth(part, stack, notes)
                if not isinstance(content, Mapping):
                    raise BadFile(f"{part}: expected a part of a state dict, found a {type(content).__name__}")
                source.content.update(content)
        elif not head.startswith(b"PK") and (head[8:9] == b"{" or path.name.endswith(".safetensors")):
            source = Source(path, _open_safetensors(path, stack))
            source.metadata = _metadata(path)
        else:
            source = Source(path, _open_pth(path, stack, notes))
        source.notes, source.unread = notes, unread
        if folder is not None:
            source.config = _json(path.parent / "config.json")
            index = _json(path.parent / "model_index.json") or _json(path.parent.parent / "model_index.json")
            source.labels = index.get("id2label") or source.config.get("id2label")
        yield source


def weights_file(folder: Path, notes: list[str]) -> Path:
    """The weights in a folder. Raises: UserError: none, or more than one and none with a known name."""
    for parent in (folder, folder / "transformer"):
        for name in WEIGHT_FILES:
            if (parent / name).is_file():
                return parent / name
    found = [f for f in sorted(folder.iterdir()) if f.is_file() and f.name.lower().endswith(WEIGHT_ENDINGS)]
    if len(found) == 1:
        notes.append(f"{found[0].name} is the only file of weights in the folder")
        return found[0]
    below = [f.name for f in sorted(folder.iterdir()) if f.is_dir() and ((f / "transformer").is_dir() or _named_in(f))]
    hint = f"{len(found)} files of weights ({', '.join(f.name for f in found[:4])})" if found else "no file of weights"
    hint += f"; give one of its folders {', '.join(below[:6])}" if below else "; give one file, or a folder with one"
    raise UserError(f"{folder}: expected {WEIGHT_FILES[0]}, {WEIGHT_FILES[1]} or a jitjax workdir, found {hint}")


def _beside(folder: Path, chosen: Path) -> list[str]:
    """Other files of weights and folders with such, in a folder whose weights are `chosen`."""
    if chosen.name.endswith(".index.json"):
        parts = set(_shards(chosen))
    else:
        parts = {chosen.name, *(f"{chosen.stem}{ending}" for ending in (".safetensors", ".bin"))}  # the same weights twice
    parts |= {"pytorch_model.bin", "diffusion_pytorch_model.bin"} if chosen.suffix == ".safetensors" else set()
    is_weights = lambda f: f.is_file() and f.name.lower().endswith(WEIGHT_ENDINGS)  # noqa: E731
    files = [f.name for f in sorted(chosen.parent.iterdir()) if is_weights(f) and f.name not in parts]
    files = [
        name for name in files if not re.match(r"(optimizer|scheduler|scaler|training_args|rng_state|random_states)", name)
    ]
    folders = [f for f in sorted(folder.iterdir()) if f.name.startswith("transformer") or names.is_ema(f.name)]
    return files + [f.name for f in folders if f.is_dir() and f != chosen.parent and _named_in(f)]


def _named_in(folder: Path) -> bool:
    return any((folder / name).is_file() for name in WEIGHT_FILES)


def _shards(index: Path) -> list[str]:
    table = _json(index).get("weight_map")
    files = sorted({str(name) for name in table.values()}) if isinstance(table, Mapping) else []
    if not files or any(Path(name).name != name for name in files):
        raise BadFile(f"{index}: expected weight_map with the names of files in the same folder")
    missing = [name for name in files if not (index.parent / name).is_file()]
    if missing:
        raise BadFile(f"{index}: {names.some(missing)} of {len(files)} files are missing beside it")
    return files


def _is_safetensors(path: Path) -> bool:
    return path.name.endswith(".safetensors")


def _open_pth(path: Path, stack: contextlib.ExitStack, notes: list[str]) -> Any:
    file = stack.enter_context(PthFile(path))
    if file.strays:
        kinds = ", ".join(file.strays[:6]) + (f" and {len(file.strays) - 6} more" if len(file.strays) > 6 else "")
        notes.append(f"left out: values of {kinds}, which are not weights (nothing was executed)")
    return file.content


class _Slice:
    """A tensor of an open .safetensors file."""

    def __init__(self, file: Any, name: str):
        self._file, self._name = file, name
        view = file.get_slice(name)
        self.shape = tuple(view.get_shape())
        self.dtype = _SAFETENSORS_TYPES.get(view.get_dtype(), np.dtype(np.void))

    def numpy(self) -> np.ndarray:
        return self._file.get_tensor(self._name)


_SAFETENSORS_TYPES = {
    "F64": np.dtype(np.float64), "F32": np.dtype(np.float32), "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16), "I64": np.dtype(np.int64), "I32": np.dtype(np.int32), "U8": np.dtype(np.uint8),
    "I8": np.dtype(np.int8), "I16": np.dtype(np.int16), "BOOL": np.dtype(np.bool_),
}  # fmt: skip


def _open_safetensors(path: Path, stack: contextlib.ExitStack) -> dict[str, _Slice]:
    try:
        file = stack.enter_context(safetensors.safe_open(path, "numpy"))
        return {name: _Slice(file, name) for name in file.keys()}  # noqa: SIM118
    except (OSError, ValueError, TypeError, safetensors.SafetensorError) as error:
        raise BadFile(f"{path}: expected a .safetensors file, found: {error}") from None


def _metadata(path: Path) -> dict[str, Any]:
    """What a file says of its weights as ours do. Others may use these words for something else, which is left out.

    Raises:
      BadFile: one of ours, which have both geometry and facts, is damaged, and would be taken for another model.
    """
    with safetensors.safe_open(path, "numpy") as file:
        saved = file.metadata() or {}
    result = {}
    for key, kind, expected in (("geometry", dict, "an object"), ("facts", dict, "an object"), ("sets", list, "a list")):
        if key in saved:
            problem = f"is not {expected}"
            try:
                value = json.loads(saved[key])
            except (ValueError, RecursionError) as error:
                value, problem = None, f"is no JSON ({error})"
            if isinstance(value, kind):
                result[key] = value
            elif {"geometry", "facts"} <= saved.keys():
                raise BadFile(f"{path}: its metadata is damaged: {key} {problem}; write the file again")
    return result


def _json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read as JSON: {error}") from None
    return value if isinstance(value, dict) else {}
