"""Turns an image folder, archive or Parquet data set into shards that training reads at random, once and for all.

    jitjax prepare --data_path ./data/train --output ./data/train64 --image_size 64
    jitjax prepare --check ./data/train64

Every shard covers a fixed range of the input, whoever writes it, so the bytes do not depend on the number of workers. A
finished shard leaves a note in `partial/`; after an interruption the same command continues with the others.
`index.json` comes last.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import json
import os
import shutil
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from jitjax import cli, tables
from jitjax.data import pool
from jitjax.data.inputs import Input, open_input
from jitjax.data.prepared import FORMAT, VERSION, empty_classes, index_checksum, read_index
from jitjax.data.shards import Settings, check_shard, shard_name, write_json, write_shard
from jitjax.data.tree import INDEX_FILE, LOCK_FILE, PARTIAL_FOLDER, PLAN_FILE
from jitjax.errors import UserError

MAX_RAW_SIZE = 64  # larger images are stored as PNG unless --encoding is given
_JPEG_QUALITY = 95
_IMAGES_PER_SHARD, _MAX_DEFAULT_SHARDS = 1024, 256


def prepare(
    data_path: str,
    output: str,
    image_size: int,
    *,
    encoding: str | None = None,
    quality: int | None = None,
    exif_rotate: bool = False,
    limit: int | None = None,
    shards: int | None = None,
    on_bad: str = "skip",
    workers: int | None = None,
    image_column: str | None = None,
    label_column: str | None = None,
    split: str = "",
    labels: str = "",
    all_formats: bool = False,
    high_depth: str = "clip",
    zip_names: str | None = None,
) -> dict[str, Any]:
    """Prepares a data set; the arguments are those of the command line. Writes nothing where it is done already.

    Returns:
      The content of `index.json`.

    Raises:
      UserError: bad input, bad settings, a full disk, or an output that belongs to something else.
    """
    encoding = encoding or ("raw" if image_size <= MAX_RAW_SIZE else "png")
    if quality and encoding != "jpeg":
        raise UserError(
            f"--quality={quality} is for --encoding jpeg, and this set is stored as {encoding}; leave --quality out"
        )
    if quality and quality > 100:
        raise UserError(f"--quality={quality} must be at most 100")
    output = os.path.expanduser(output)
    partial = os.path.join(output, PARTIAL_FOLDER)
    with _locked(output):
        source = _open_input(
            data_path,
            partial,
            image_column=image_column,
            label_column=label_column,
            split=split,
            labels=labels,
            all_formats=all_formats,
            zip_names=zip_names,
        )
        for line in (source.summary, *(f"note: {note}" for note in source.notes)):
            print(line.encode(errors="backslashreplace").decode())
        total = min(limit or len(source), len(source))
        shards = shards or max(1, min(_MAX_DEFAULT_SHARDS, total // _IMAGES_PER_SHARD))
        if shards > total:
            raise UserError(f"--shards={shards} is more than the {total} images; lower it")
        settings = Settings(
            image_size=image_size,
            encoding=encoding,
            quality=(quality or _JPEG_QUALITY) if encoding == "jpeg" else 0,
            exif_rotate=exif_rotate,
            limit=limit,
            shards=shards,
            all_formats=all_formats,
            high_depth=high_depth,
        )
        plan = {"settings": _recorded(settings), "input": source.fingerprint(), "version": VERSION}
        index = _finished(output, plan)
        if index is not None:
            shutil.rmtree(partial, ignore_errors=True)
            print(f"{output} is complete already")
            _report(output, index)
            if on_bad == "fail" and index["skipped"]:
                first = index["skipped"][0]
                raise UserError(
                    f"--output={output} was prepared with {len(index['skipped'])} skipped, the first {first['name']} "
                    f"({first['reason']}); repair them and give a new folder, or use --on_bad skip"
                )
            return index
        _begin(output, partial, plan)
        _check_space(output, total, settings)
        # --limit takes every n-th: of each class its share, of one with fewer than n images maybe none, which is reported
        chosen = np.arange(total, dtype=np.int64) * len(source) // total
        bounds = [k * total // shards for k in range(shards + 1)]
        done = {k: e for k in range(shards) if (e := _done_shard(output, partial, k, shards))}
        entries: dict[int, dict[str, Any]] = {k: e for k, e in done.items() if on_bad != "fail" or not e["skipped"]}
        jobs = {k: chosen[bounds[k] : bounds[k + 1]] for k in range(shards) if k not in entries}
        if entries:
            print(f"continuing: {len(entries)} of {shards} shards are done")
        with pool.Pool(workers, sum(map(len, jobs.values())), len(jobs), "images", source) as workers_pool:
            calls = [(k, (indices, output, k, settings, on_bad == "fail")) for k, indices in jobs.items()]
            for k, entry in workers_pool.run(_write_job, calls):
                write_json(os.path.join(partial, f"{shard_name(k, shards)}.json"), entry)
                entries[k] = entry
        index = _index(source, plan, [entries[k] for k in range(shards)])
        if index["count"] == 0:
            first = index["skipped"][0]
            raise UserError(
                f"none of the {total} images in --data_path={data_path} can be decoded ({first['name']}: {first['reason']})"
            )
        write_json(os.path.join(output, INDEX_FILE), index)
        shutil.rmtree(partial)
    _report(output, index)
    return index


def check(output: str, workers: int | None = None) -> int:
    """Reads every record of a prepared directory; returns their number. Raises UserError for the first thing wrong."""
    where = f"--check={output}"
    if not os.path.isfile(os.path.join(output, INDEX_FILE)):
        raise UserError(f"{where} is not a finished prepared directory: it has no {INDEX_FILE}")
    index = read_index(output, where)
    with pool.Pool(workers, index["count"], len(index["shards"]), "images checked", index) as workers_pool:
        calls = [(shard["file"], (output, shard)) for shard in index["shards"]]
        for _, problem in workers_pool.run(_check_job, calls):
            if problem:
                raise UserError(f"{where}: {problem}; prepare the data set again")
    if empty := empty_classes(index):
        tables.say(f"warning: {empty}")
    return index["count"]


def _recorded(settings: Settings) -> dict[str, Any]:
    """The settings without those later ones that are unset, so that directories of earlier versions stay as they are."""
    unset = {"all_formats": False, "high_depth": "clip"}
    return {key: value for key, value in dataclasses.asdict(settings).items() if unset.get(key, ...) != value}


def _open_input(data_path: str, partial: str, **options: Any) -> Input:
    try:
        return open_input(data_path, partial, **options)
    except BaseException:
        if not os.path.exists(os.path.join(partial, PLAN_FILE)):  # nothing but a half decompressed archive
            shutil.rmtree(partial, ignore_errors=True)
        raise


def _index(source: Input, plan: dict[str, Any], entries: list[dict[str, Any]]) -> dict[str, Any]:
    settings = plan["settings"]
    class_counts = np.sum([entry["class_counts"] for entry in entries], axis=0).tolist()
    index = {
        "format": FORMAT,
        "version": VERSION,
        "count": sum(entry["count"] for entry in entries),
        "classes": list(source.classes),
        "class_counts": class_counts if source.classes else [],
        "image_size": settings["image_size"],
        "encoding": settings["encoding"],
        "exif_rotate": settings["exif_rotate"],
        "plan": plan,
        "shards": [{key: entry[key] for key in ("file", "count", "bytes", "sha256")} for entry in entries],
        "skipped": [bad for entry in entries for bad in entry["skipped"]],
    }
    if constant := sum(entry.get("constant", 0) for entry in entries):
        index["constant"] = constant
    return {**index, "checksum": index_checksum(index)}


def _finished(output: str, plan: dict[str, Any]) -> dict[str, Any] | None:
    """The index of a preparation that is complete. Raises UserError if it is one of other images or settings."""
    if not os.path.isfile(os.path.join(output, INDEX_FILE)):
        return None
    index = read_index(output, f"--output={output}")
    _require_same(index.get("plan", {}), plan, output, "was prepared")
    return index


def _begin(output: str, partial: str, plan: dict[str, Any]) -> None:
    path = os.path.join(partial, PLAN_FILE)
    if os.path.isfile(path):
        with open(path, encoding="utf-8") as file:
            _require_same(json.load(file), plan, output, "is being prepared")
        return
    foreign = sorted(set(os.listdir(output)) - {PARTIAL_FOLDER, LOCK_FILE})
    if foreign:
        raise UserError(f"--output={output} is not empty (it holds {foreign[0]!r}); give a new folder")
    os.makedirs(partial, exist_ok=True)
    write_json(path, plan)


def _require_same(before: dict[str, Any], now: dict[str, Any], output: str, state: str) -> None:
    then, here = before.get("input", {}), now["input"]
    if "modified" in here and "modified" not in then:  # prepared by an earlier version
        now = {**now, "input": {key: value for key, value in here.items() if key != "modified"}}
    if before == now:
        return
    old, new = before.get("settings", {}), now["settings"]
    differing = [f"{k} {old.get(k)} instead of {new.get(k)}" for k in {**new, **old} if old.get(k) != new.get(k)]
    same_files = {**then, "modified": here.get("modified")} == here
    change = ", ".join(differing) or ("input files that were modified since" if same_files else "other input files")
    raise UserError(f"--output={output} {state} with {change}; give a new folder or delete this one")


def _done_shard(output: str, partial: str, number: int, shards: int) -> dict[str, Any] | None:
    """The entry of a shard that an earlier run completed."""
    try:
        with open(os.path.join(partial, f"{shard_name(number, shards)}.json"), encoding="utf-8") as file:
            entry = json.load(file)
        return entry if os.path.getsize(os.path.join(output, entry["file"])) == entry["bytes"] else None
    except (OSError, ValueError):
        return None


def _check_space(output: str, total: int, settings: Settings) -> None:
    if settings.encoding == "raw":
        written = sum(entry.stat().st_size for entry in os.scandir(output) if entry.is_file())
        needed = total * (settings.image_size**2 * 3 + 80) - written
        free = shutil.disk_usage(output).free
        if needed > free:
            raise UserError(
                f"--output={output} has {free >> 20} MiB free, {needed >> 20} MiB are needed; free some "
                "or choose --encoding png"
            )


def _report(output: str, index: dict[str, Any]) -> None:
    skipped = index["skipped"]
    for bad in skipped[:20]:
        print(f"skipped {bad['name']}: {bad['reason']}".encode(errors="backslashreplace").decode())
    if len(skipped) > 20:
        print(f"... and {len(skipped) - 20} more, all listed in {INDEX_FILE}")
    if empty := empty_classes(index):
        tables.say(f"warning: {empty}")
    if constant := index.get("constant"):
        tables.say(
            f"warning: {constant} images came out constant, all of one colour; 16-bit and float pictures are clipped as the "
            "official loader does: --high_depth range or picture scales them"
        )
    size = sum(shard["bytes"] for shard in index["shards"]) / 2**20
    classes = f"{len(index['classes'])} classes" if index["classes"] else "no labels"
    shards = f"{len(index['shards'])} shard{'s' * (len(index['shards']) != 1)}"
    print(f"{output}: {index['count']} images, {classes}, {shards}, {size:.1f} MiB, {len(skipped)} skipped")


@contextlib.contextmanager
def _locked(output: str) -> Iterator[None]:
    """Creates the output folder and keeps a second preparation out of it."""
    path = os.path.join(output, LOCK_FILE)
    while True:
        try:
            os.makedirs(output, exist_ok=True)
            lock = os.open(path, os.O_CREAT | os.O_RDWR)
        except OSError as error:
            raise UserError(f"--output={output} cannot be written ({error.strerror}): name another") from None
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(lock)
            raise UserError(f"--output={output} is being written by another preparation") from None
        # the one who held it may have removed the file in between: a lock on that keeps nobody out
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(lock), os.stat(path)):
                break
        os.close(lock)
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            os.unlink(os.path.join(output, LOCK_FILE))
            os.rmdir(output)  # only where a mistake was found before anything was written
        os.close(lock)


# --- what the worker processes run ---


def _write_job(indices: np.ndarray, output: str, number: int, settings: Settings, fail_on_bad: bool) -> dict[str, Any]:
    path = os.path.join(output, shard_name(number, settings.shards))
    return write_shard(pool.shared(), indices, path, settings, fail_on_bad, pool.step)


def _check_job(root: str, shard: dict[str, Any]) -> str | None:
    return check_shard(root, shard, pool.shared(), pool.step)


def run(arguments: dict[str, Any]) -> int:
    """Prepare, or check a prepared directory, with the flags of `jitjax prepare` by name; returns the exit code.

    Raises:
      UserError: a flag is missing; see `prepare` and `check`.
    """
    directory = arguments.pop("check")
    if directory:
        count = check(directory, arguments["workers"])
        print(f"{directory}: {count} images, no fault found")
        return 0
    for name in ("data_path", "output", "image_size"):
        if arguments[name] is None:
            raise UserError(f"--{name} is missing; see jitjax prepare --help")
    prepare(arguments.pop("data_path"), arguments.pop("output"), arguments.pop("image_size"), **arguments)
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """`jitjax prepare` with these arguments, for scripts.

    Raises:
      UserError: see `prepare`.
    """
    return cli.dispatch(["prepare", *(sys.argv[1:] if argv is None else argv)])


if __name__ == "__main__":
    cli.program(["prepare", *sys.argv[1:]])
