"""What `jitjax evaluate` does: open what the flags name, score it, print every number with what it depends on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax

from jitjax import atomic, draw, pipeline, tables
from jitjax.data import open_dataset
from jitjax.errors import UserError, naming
from jitjax.evaluation.extractor import open_extractor
from jitjax.evaluation.images import DataImages, open_images
from jitjax.evaluation.models import Evaluation, evaluate_batches, evaluate_pipeline
from jitjax.evaluation.score import make_statistics, open_reference
from jitjax.evaluation.statistics import is_npz, npz_images, write_statistics
from jitjax.settings import to_dict


def evaluate(
    target: str,
    reference: str,
    *,
    num: int,
    labels: str,
    which: str | None,
    seed: int,
    batch_size: int | None,
    dtype: str | None,
    extractor: dict[str, Any],
    split: str,
    options: dict[str, Any],
    json_file: str | None,
) -> int:
    """Score a model or a set of images and print the scores.

    Raises:
      UserError: a target or a reference that cannot be used, or options that do not fit.
    """
    say = print if jax.process_index() == 0 else lambda *_: None
    path = Path(target).expanduser()
    if json_file:
        draw.writable_folder(Path(json_file).expanduser().absolute().parent, "--json")
        _check_holds_scores(Path(json_file).expanduser())
    chosen = open_extractor(**extractor)
    if is_images(path):
        images = open_images(path)
        found, notes = open_reference(reference, chosen, images.image_size, reading={"split": split})
        with draw.progress(len(images), "extracting") as advance:
            result = evaluate_batches(
                iter(images),
                found,
                chosen,
                patch=_patch_of(images.image_size),
                seed=None,
                about={"images": target},
                progress=_steps(advance),
            )
    else:
        pipe = pipeline.load(target, which)
        notes = list(pipe.notes)
        found, more = open_reference(reference, chosen, pipe.geometry.image_size, reading=pipe.decoding | {"split": split})
        notes += more
        numbers = draw.label_numbers(pipe, labels, num)
        null = pipe.geometry.num_classes
        about = {"model": target, "weights": pipe.which, "step": pipe.step, "labels": labels}
        about |= to_dict(pipe.sampler_options(**options)) | {"dtype": pipeline.compute_dtype(dtype)}
        with draw.progress(len(numbers), f"sampling {pipe.which}") as advance:
            result = evaluate_pipeline(
                pipe,
                [None if n == null else n for n in numbers],
                found,
                chosen,
                seed=seed,
                batch_size=batch_size,
                dtype=dtype,
                options=options,
                about=about,
                progress=_steps(advance),
            )
    for note in dict.fromkeys([*notes, *result.scores.notes]):
        say(f"note: {note}")
    for line in report_lines(result):
        say(line)
    if json_file and jax.process_index() == 0:
        content = json.dumps({"scores": result.values, **result.scores.about}, indent=1)
        try:
            atomic.write_text(Path(json_file).expanduser(), content)
        except OSError as error:
            problem = f"cannot be written ({error.strerror or error}); the scores are those above"
            raise UserError(f"--json={json_file} {problem}: free space or name another") from None
    return 0


def report_lines(result: Evaluation) -> list[str]:
    """The scores, the seam index where there is one, and where the time went."""
    seconds = result.seconds
    total = sum(seconds.values()) or 1.0
    share = "; ".join(
        f"{stage} {took:.1f} s ({took / total:.0%}, {result.count / max(took, 1e-9):,.0f} images/s)"
        for stage, took in seconds.items()
    )
    borders = f"(between patches of {result.patch} px; 1 where their borders do not show)"
    seams = [] if result.seam_index is None else [f"seam index {result.seam_index:.3f}  {borders}"]
    return [*result.scores.lines, *seams, share]


def make(data: str, out: str, *, image_size: int | None, extractor: dict[str, Any], split: str) -> int:
    """Statistics of a folder, a prepared set or an .npz of images, into a file.

    Raises:
      UserError: nothing usable at `data`, or `out` cannot be written.
    """
    draw.writable_folder(Path(out).expanduser().absolute().parent)
    chosen = open_extractor(**extractor)
    path = Path(data).expanduser()
    if is_npz(path):
        if split:
            raise UserError(f"--split={split} is for a folder of images, and DATA={data} is none: leave it out")
        images = npz_images(path)
        if image_size not in (None, images.image_size):
            raise UserError(f"--image_size={image_size}: the images of {data} have {images.image_size} px")
    else:
        dataset = open_dataset(path, image_size, split=split, flag="DATA")
        tables.say(dataset.summary)
        images = DataImages(dataset)
    with draw.progress(len(images), "extracting") as advance:
        made = make_statistics(images, chosen, source=data, image_size=images.image_size, progress=_steps(advance))
    if jax.process_index() == 0:
        with naming("--out", out):
            write_statistics(Path(out).expanduser(), made)
        print(f"{out}: {chosen.name}, {made.count} images of {made.image_size} px, {chosen.dim} features")
        skipped = getattr(images, "skipped", ())
        left_out = [f"{len(skipped)} images could not be decoded, the first: {skipped[0]}"] if skipped else []
        for notice in [*chosen.notices, *left_out]:
            tables.say(f"note: {notice}")
    return 0


def is_images(path: Path) -> bool:
    """Whether a target is a set of images rather than a model."""
    if is_npz(path):
        return True
    if not path.is_dir():
        return False
    from jitjax.interop.sources import is_workdir

    return not is_workdir(path) and not any(path.glob("*.safetensors")) and not any(path.glob("*/*.safetensors"))


def _check_holds_scores(file: Path) -> None:
    """Raises:
    UserError: the file is there and holds something else than scores.
    """
    if not file.exists():
        return
    try:
        before = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        before = None
    if not isinstance(before, dict) or not {"scores", "evaluator"} <= before.keys():
        raise UserError(f"--json={file} exists and holds no scores of jitjax: name another file")


def _patch_of(image_size: int) -> int:
    """Images alone do not say the patch: 16 patches along a side, as in all published models."""
    return max(2, image_size // 16)


def _steps(advance: Any) -> Any:
    """A callback that is given totals, from one that is given increments."""
    done = 0

    def progress(total: int) -> None:
        nonlocal done
        advance(total - done)
        done = total

    return progress
