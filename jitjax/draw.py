"""Images from a model into files: a grid, numbered PNGs, or one .npz. What `jitjax sample` does."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from PIL import Image

from jitjax import atomic, pipeline, processes, tables
from jitjax.errors import UserError, writing
from jitjax.monitor import drawn_here, save_animation, save_grid, save_strip
from jitjax.monitor.images import legend_of, written_here

RECORD = "samples.json"  # in a folder of PNGs: what they were drawn with
LARGEST_GRID = 1024  # images
PATH_IMAGES = 8  # whose way from noise is shown


def draw(
    model: str,
    out: str,
    *,
    num: int | None = None,
    labels: str = "all",
    which: str | None = None,
    seed: int = 0,
    batch_size: int | None = None,
    dtype: str | None = None,
    options: dict[str, Any] | None = None,
    path: str | None = None,
) -> int:
    """Draw images and write them; continues what an interrupted call with the same arguments left.

    Args:
      model: whatever `jitjax.load` takes.
      out: FILE.png for one grid, FILE.npz for arr_0 (images, uint8 NHWC) and arr_1 (labels), else a folder of PNGs.
      labels: "all" (class-balanced), "none", or numbers and names separated by commas.
      options: of the sampler.
      path: also write the way from noise to image of the first few: FILE.png (a strip per image) or FILE.gif.

    Raises:
      UserError: a mistake in the arguments, or a target that cannot be written or holds something else.
    """
    target = Path(out).expanduser()
    ending = "" if target.is_dir() else target.suffix.lower()
    if ending not in ("", ".png", ".npz"):
        raise UserError(f"--out={out}: use FILE.png, FILE.npz, or a folder (a name without an ending)")
    if path is not None:
        film = Path(path).expanduser()
        if film.suffix.lower() not in (".png", ".gif") or film.is_dir():
            raise UserError(f"--path={path}: use FILE.png for strips or FILE.gif for a film")
        if film.absolute() == target.absolute():
            raise UserError(f"--path={path} is --out too: name another file")
        if ending == "" and film.resolve().parent == target.resolve():
            raise UserError(f"--path={path} lies among the images of --out={out}: name a file elsewhere")
        writable_folder(film.absolute().parent, "--path")
        _check_is_picture(film, "--path")
    if ending == ".png":
        _check_is_picture(target, "--out")
        if (legend := legend_of(target)).exists() and not written_here(legend):
            raise UserError(f"--out={out}: names that do not fit go into {legend}, which is no such list: name another file")
    pipe = pipeline.load(model, which)
    if jax.process_index() == 0:
        for note in pipe.notes:
            tables.say(f"note: {note}")
    numbers = label_numbers(pipe, labels, num)
    if ending == ".png" and len(numbers) > LARGEST_GRID:
        raise UserError(f"--num={len(numbers)} images do not fit into one grid: at most {LARGEST_GRID}, or --out=FOLDER")
    shown = [None if n == pipe.geometry.num_classes else n for n in numbers]
    how = dict(seed=seed, batch_size=batch_size, dtype=dtype, **(options or {}))
    pipe.sample_batches(shown, **how)  # refuses what cannot be drawn before anything is written
    record = describe(pipe, model, seed, numbers, dtype, options or {})
    with writing(f"--out={out}"):
        sink = {".png": Grid, ".npz": Npz, "": Folder}[ending](target, pipe, numbers, record)
    missing = processes.numbers_of_process_0(sink.missing())  # only process 0 looks at files
    batches = pipe.sample_batches([shown[i] for i in missing], indices=missing, **how)
    begun, first = time.perf_counter(), None
    with writing(f"--out={out}"), progress(len(missing), f"sampling {pipe.which}") as advance:
        for indices, images in batches:
            sink.write(indices, images)
            advance(len(indices))
            first = first or (len(indices), time.perf_counter() - begun)
        sink.finish()
    if jax.process_index() == 0:
        skipped = len(numbers) - len(missing)
        resumed = f" ({skipped} were there)" if skipped else ""
        tables.say(f"{len(missing)} images{resumed} in {speed(len(missing), time.perf_counter() - begun, first)} -> {target}")
    if path is not None:
        with writing(f"--path={path}"):
            write_path(pipe, shown[:PATH_IMAGES], Path(path).expanduser(), seed=seed, dtype=dtype, options=options or {})
    return 0


def _check_is_picture(file: Path, flag: str) -> None:
    """Raises:
    UserError: the file is there and is no picture that this program wrote.
    """
    if file.exists() and not drawn_here(file):
        raise UserError(f"{flag}={file} exists and is no picture of jitjax's: name another file")


def write_path(
    pipe: pipeline.Pipeline, labels: Sequence[int | None], file: Path, *, seed: int, dtype: str | None, options: dict[str, Any]
) -> None:
    """The first images on their way from noise, as strips (.png) or a film (.gif): first the
    states, below them what the network predicts there."""
    moments = min(options.get("steps", 50), 10 if file.suffix.lower() == ".png" else 40)
    batches = pipe.sample_batches(labels, seed=seed, dtype=dtype, batch_size=len(labels), moments=moments, **options)
    (_, (images, states, predictions)), *_ = batches
    if jax.process_index():
        return
    frames = [np.concatenate([states[k], predictions[k]]) for k in range(moments)] + [np.concatenate([images, images])]
    if file.suffix.lower() == ".png":
        save_strip(file, frames)
    else:
        save_animation(file, frames, columns=len(images))
    print(f"the way from noise to image -> {file}")


# ---------------------------------------------------------------- labels


def label_numbers(pipe: pipeline.Pipeline, labels: str, num: int | None) -> list[int]:
    """The class of each image. Classes come in order, as in the official evaluation: all images of the first class, then of
    the second, ...; where `num` is no multiple of the classes their counts differ by at most one.

    Raises:
      UserError: unknown or out-of-range labels, or num < 1.
    """
    if num is not None and num < 1:
        raise UserError(f"--num={num}: must be at least 1")
    classes = pipe.classes
    words = [word.strip() for word in labels.split(",") if word.strip()]
    if not words:
        raise UserError("--labels is empty: use all, none, or numbers and names separated by commas")
    if words == ["none"] or (words == ["all"] and not classes):
        return [pipe.geometry.num_classes] * (num or 16)
    chosen = list(range(classes)) if words == ["all"] else [pipe.label_of(word) for word in words]
    count = num or (min(16, classes) if words == ["all"] else len(chosen))
    return [chosen[i * len(chosen) // count] for i in range(count)]


def describe(
    pipe: pipeline.Pipeline, model: str, seed: int, numbers: Sequence[int], dtype: str | None, options: dict[str, Any]
) -> dict[str, Any]:
    """What decides the images: two calls with the same record draw the same."""
    return {
        "model": str(model),
        "weights": weights_digest(pipe.params),
        "which": pipe.which,
        "step": pipe.step,
        "seed": seed,
        "num": len(numbers),
        "labels": hashlib.sha256(np.asarray(numbers, np.int32).tobytes()).hexdigest()[:16],
        "dtype": pipeline.compute_dtype(dtype),
        **{name: list(value) if isinstance(value, tuple) else value for name, value in options.items()},
    }


def weights_digest(params: dict[str, jax.Array]) -> str:
    """A checksum of evenly spaced numbers of every parameter, up to 4,096 of each."""
    digest = hashlib.sha256()
    for name in sorted(params):
        flat = np.asarray(jax.device_get(params[name])).reshape(-1)
        digest.update(np.ascontiguousarray(flat[:: max(1, flat.size // 4096)]).tobytes())
    return digest.hexdigest()[:16]


# ---------------------------------------------------------------- files


class Grid:
    """One captioned PNG."""

    def __init__(self, path: Path, pipe: pipeline.Pipeline, numbers: Sequence[int], record: dict[str, Any]):
        writable_folder(path.parent)
        self._path, self._numbers, self._pipe = path, numbers, pipe
        size = pipe.geometry.image_size
        self._images = np.zeros((len(numbers), size, size, 3), np.uint8)

    def missing(self) -> list[int]:
        return list(range(len(self._numbers)))

    def write(self, indices: Sequence[int], images: np.ndarray) -> None:
        self._images[list(indices)] = images

    def finish(self) -> None:
        if jax.process_index():
            return
        null, names = self._pipe.geometry.num_classes, self._pipe.class_names
        captions = [names[n] if names and n < null else "" if n == null else str(n) for n in self._numbers]
        named = any(captions)
        save_grid(self._path, self._images, captions=captions if named else None, labels=self._numbers if named else None)


class Folder:
    """PNGs named by their index, 00000.png on, and a record of what they were drawn with."""

    def __init__(self, path: Path, pipe: pipeline.Pipeline, numbers: Sequence[int], record: dict[str, Any]):
        writable_folder(path)
        self._path, self._numbers = path, numbers
        self._digits = max(5, len(str(len(numbers) - 1)))
        if jax.process_index():
            return
        file = path / RECORD
        if file.exists():
            same_record(read_record(file), record, path)
        elif any(other != atomic.partial_of(file) for other in path.iterdir()):
            raise UserError(f"--out={path} holds other files: name a new folder")
        else:
            names = pipe.class_names
            rows = {"labels_by_index": [int(n) for n in numbers], "class_names": list(names)}
            atomic.write_text(file, json.dumps(record | rows), alone=True)

    def _file(self, index: int) -> Path:
        return self._path / f"{index:0{self._digits}d}.png"

    def missing(self) -> list[int]:
        return [i for i in range(len(self._numbers)) if not _is_whole_png(self._file(i))]

    def write(self, indices: Sequence[int], images: np.ndarray) -> None:
        if jax.process_index():
            return
        for index, image in zip(indices, images, strict=True):
            with atomic.writing(self._file(index), alone=True) as partial:
                Image.fromarray(image).save(partial, format="PNG")

    def finish(self) -> None:
        for partial in self._path.glob(atomic.partial_of(Path("[0-9]" * self._digits + ".png")).name):
            partial.unlink()


def _is_whole_png(file: Path) -> bool:
    """Whether the file is there and its checksums are right."""
    try:
        with Image.open(file) as image:
            image.verify()
        return True
    except (OSError, SyntaxError, ValueError):  # Pillow calls a damaged PNG a SyntaxError
        return False


class Npz:
    """One .npz as the ADM evaluator reads it: arr_0 images (N, S, S, 3) uint8, arr_1 labels (N,). Images are collected in a
    file beside it, so that memory stays small and an interrupted call can continue."""

    def __init__(self, path: Path, pipe: pipeline.Pipeline, numbers: Sequence[int], record: dict[str, Any]):
        writable_folder(path.parent)
        self._path, self._numbers, self._main = path, numbers, jax.process_index() == 0
        self._partial, self._log = path.with_name(f".{path.name}.partial.npy"), path.with_name(f".{path.name}.partial.json")
        self._record, self._done = record, np.zeros(len(numbers), bool)
        self._images: np.ndarray | None = None
        if not self._main:
            return
        if path.exists():
            saved = read_record(self._log) if self._log.exists() else {}
            if len(saved.pop("done", [])) < len(numbers):
                raise UserError(f"--out={path} exists already: name another file")
            same_record(saved, record, path)  # written whole, then killed before the rest of `finish`
            self._done[:] = True
            return
        size = pipe.geometry.image_size
        shape = (len(numbers), size, size, 3)
        if self._log.exists() and self._partial.exists():
            saved = read_record(self._log)
            try:
                done = saved.pop("done")
                same_record(saved, record, path)
                self._done[done] = True
                there = np.lib.format.open_memmap(self._partial, mode="r")  # "r+" would fill up what is cut off with zeros
                if (there.shape, there.dtype) != (shape, np.uint8):
                    raise ValueError(f"its shape is {there.shape}")
                self._images = np.lib.format.open_memmap(self._partial, mode="r+")
            except (OSError, ValueError, LookupError, TypeError) as error:
                raise UserError(
                    f"--out={path}: what an interrupted call left in {self._partial} and {self._log} is damaged "
                    f"({type(error).__name__}: {error}): delete both, or name another file"
                ) from None
            _reserve(self._partial)
        else:
            if self._log.exists():  # of images that are gone
                self._log.unlink()
            self._images = np.lib.format.open_memmap(self._partial, mode="w+", dtype=np.uint8, shape=shape)
            try:
                _reserve(self._partial)
            except OSError:
                self._partial.unlink()
                raise

    def missing(self) -> list[int]:
        return np.flatnonzero(~self._done).tolist()

    def write(self, indices: Sequence[int], images: np.ndarray) -> None:
        if not self._main:
            return
        self._images[list(indices)] = images
        self._images.flush()
        self._done[list(indices)] = True
        atomic.write_text(self._log, json.dumps(self._record | {"done": np.flatnonzero(self._done).tolist()}), alone=True)

    def finish(self) -> None:
        if not self._main:
            return
        if self._images is not None:
            with atomic.writing(self._path, alone=True) as partial, open(partial, "wb") as file:
                np.savez(file, arr_0=self._images, arr_1=np.asarray(self._numbers, np.int64))
            self._images = None
        self._partial.unlink(missing_ok=True)
        self._log.unlink(missing_ok=True)


def _reserve(path: Path) -> None:
    """Let a file have its space on the disk now. Where a mapped file has none to be written to, the system ends the process
    without a word (SIGBUS).

    Raises:
      OSError: the disk has no space for it.
    """
    if not hasattr(os, "posix_fallocate"):  # macOS
        return
    with open(path, "r+b") as file:
        try:
            os.posix_fallocate(file.fileno(), 0, os.path.getsize(path))
        except OSError as error:
            if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP):  # a file system that cannot
                raise


def writable_folder(path: Path, flag: str = "--out") -> None:
    """Raises:
    UserError: the folder cannot be made or written; names the flag that asked for it.
    """
    if jax.process_index():
        return
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{flag}: the folder {path} cannot be made ({error.strerror}): name another") from error
    if not os.access(path, os.W_OK | os.X_OK):
        raise UserError(f"{flag}: the folder {path} cannot be written (Permission denied): name another")


def read_record(path: Path) -> dict[str, Any]:
    """What a file says about the images beside it, as `describe` made it.

    Raises:
      UserError: it cannot be read or is no record.
    """
    try:
        record = json.loads(path.read_text())
        if not isinstance(record, dict):
            raise ValueError("not a record")
        return record
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is unreadable ({error}): delete it, or name another --out") from None


def same_record(saved: dict[str, Any], record: dict[str, Any], path: Path) -> None:
    """Raises:
    UserError: the images that are there were drawn in another way; names what differs.
    """
    fields = [name for name in {**record, **saved} if name not in ("labels_by_index", "class_names", "model")]
    differing = [f"{name}: {saved.get(name)} -> {record.get(name)}" for name in fields if saved.get(name) != record.get(name)]
    if differing:
        raise UserError(f"--out={path} holds images drawn in another way ({'; '.join(differing)}): name another")


# ---------------------------------------------------------------- progress


def speed(count: int, seconds: float, first: tuple[int, float] | None) -> str:
    """How long `count` images took, and how fast they came behind the `first` batch (images, seconds), which compiles."""
    if first is None:
        return f"{seconds:.1f} s"
    if first[0] == count:
        return f"{seconds:.1f} s with compilation"
    rate = (count - first[0]) / max(seconds - first[1], 1e-9)
    return f"{seconds:.1f} s: {first[1]:.1f} s for the first {first[0]} with compilation, then {rate:.1f} images/s"


@contextlib.contextmanager
def progress(total: int, title: str) -> Iterator[Callable[[int], None]]:
    """A progress bar on stderr with rate and time left, by process 0 and on a terminal only; gives `advance(count)`."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    rate = TextColumn("{task.fields[rate]}")
    columns = ("[progress.description]{task.description}", BarColumn(), MofNCompleteColumn(), rate, TimeRemainingColumn())
    console = Console(stderr=True)
    with Progress(*columns, console=console, disable=jax.process_index() > 0 or not console.is_terminal) as bar:
        task = bar.add_task(title, total=total, rate="")
        begun, done = None, 0  # from the end of the first batch, which waits for the compiler

        def advance(count: int) -> None:
            nonlocal begun, done
            if begun is None:
                begun, rate = time.perf_counter(), ""
            else:
                done += count
                rate = f"{done / (time.perf_counter() - begun):.1f} images/s"
            bar.update(task, advance=count, rate=rate)

        yield advance
