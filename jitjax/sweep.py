"""The best guidance scale, guidance interval and EMA of a model, found by a search rather than a grid.

For each EMA the score is assumed to have one valley over the guidance scale, which golden-section search finds with a few
evaluations (6 to 10 of 31 values); the intervals are compared at the best scale, and the scale is searched again around the
winner. All evaluations share noise, labels and the reference; each is written to a file, so that an interrupted sweep goes on.
"""

from __future__ import annotations

import dataclasses
import json
import math
import shlex
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from jitjax import atomic
from jitjax.errors import UserError, writing
from jitjax.evaluation import higher_is_better


@dataclasses.dataclass(frozen=True, order=True)
class Point:
    """One setting of the sampler."""

    which: str
    cfg_scale: float
    interval: tuple[float, float]


Score = Callable[[Point], float]  # lower is better


def scales(text: str) -> list[float]:
    """ "1.0:4.0" or "1.0:4.0:0.1" (the step, default 0.1), or values "1,1.5,2", as increasing guidance scales.

    Raises:
      UserError: none of the three.
    """
    try:
        if ":" in text:
            low, high, step = map(float, text.split(":") if text.count(":") > 1 else [*text.split(":"), 0.1])
            if not (0 < step and low < high and (high - low) / step < 10_000):
                raise ValueError
            count = math.floor((high - low) / step + 1e-6)
            return [round(low + i * step, 6) for i in range(count + 1)]
        values = sorted({float(value) for value in text.split(",")})
        if not all(-1e3 < value < 1e3 for value in values):
            raise ValueError
        return values
    except ValueError:
        raise UserError(f"--cfg_scale={text}: give LOW:HIGH, LOW:HIGH:STEP or values, e.g. 1.0:4.0") from None


def search(
    emas: Sequence[str], guidance: Sequence[float], intervals: Sequence[tuple[float, float]], score: Score
) -> tuple[Point, float]:
    """The best setting and its score. `score` is called once for each setting that the search visits."""
    known: dict[Point, float] = {}

    def evaluate(point: Point) -> float:
        if point not in known:
            known[point] = score(point)
        return known[point]

    def best_scale(which: str, interval: tuple[float, float], values: Sequence[float]) -> Point:
        points = [Point(which, value, interval) for value in values]
        return points[golden_section(len(points), lambda i: evaluate(points[i]))]

    for which in emas:
        best_scale(which, intervals[0], guidance)
    best = min(known, key=known.get)
    for interval in intervals[1:]:
        if best.cfg_scale != 1.0:
            evaluate(dataclasses.replace(best, interval=interval))
    best = min(known, key=known.get)
    if best.interval != intervals[0]:
        nearest = guidance.index(best.cfg_scale)
        spread = max(1, len(guidance) // 4)
        best_scale(best.which, best.interval, guidance[max(0, nearest - spread) : nearest + spread + 1])
        best = min(known, key=known.get)
    return best, known[best]


def golden_section(count: int, value: Callable[[int], float]) -> int:
    """The index in [0, count) with the least value, for values with one valley; about 1.44 log2(count) evaluations."""
    low, high = 0, count - 1
    ratio = (5**0.5 - 1) / 2
    while high - low > 2:
        left = high - round(ratio * (high - low))
        right = low + round(ratio * (high - low))
        if left >= right:
            left, right = right - 1, right
            if left <= low:
                left, right = low + 1, low + 2
        if value(left) <= value(right):
            high = right
        else:
            low = left
    return min(range(low, high + 1), key=value)


# ---------------------------------------------------------------- results on disk


class Results:
    """One JSON line per evaluation, after a first line that says what was evaluated."""

    def __init__(self, path: Path, setup: dict[str, Any], *, write: bool = True):
        """Nothing is written before the file is known to be of this sweep; one of several processes does so.

        Raises:
          UserError: the file or the plot's place holds something else, e.g. another sweep; names what differs. Or the file
            cannot be written.
        """

        self.path, self.picture, self._known, self._write = path, path.with_suffix(".png"), {}, write
        if path.suffix != ".jsonl":
            raise UserError(f"--out={path}: use FILE.jsonl; the plot is written beside it, as FILE.png")
        if not path.exists():
            if self.picture.exists():
                raise UserError(f"--out={path}: the plot would replace {self.picture}: name another file")
            if write:
                with writing(f"--out={path}"):
                    atomic.write_text(path, json.dumps({"setup": setup}) + "\n")
            return
        try:
            *whole, rest = path.read_text().split("\n")  # a kill or a full disk may have cut the last line anywhere
            lines = [json.loads(text) for text in whole]
            before = lines[0]["setup"]
            known = {Point(x["which"], x["cfg_scale"], tuple(x["interval"])): dict(x["scores"]) for x in lines[1:]}
        except (OSError, ValueError, LookupError, TypeError) as error:
            raise UserError(f"--out={path} is no file of a sweep ({type(error).__name__}: {error}): name another") from None
        differing = [f"{k}: {before.get(k)} -> {setup.get(k)}" for k in {**before, **setup} if before.get(k) != setup.get(k)]
        if differing:
            raise UserError(f"--out={path} holds another sweep ({'; '.join(differing)}): name another file")
        if rest and write:
            with writing(f"--out={path}"):
                atomic.write_text(path, "".join(f"{text}\n" for text in whole))
        self._known = known

    def get(self, point: Point) -> dict[str, float] | None:
        return self._known.get(point)

    def add(self, point: Point, scores: dict[str, float]) -> None:
        """Raises:
        UserError: the file cannot be written.
        """
        self._known[point] = scores
        if self._write:
            with writing(f"--out={self.path}"), self.path.open("a") as file:
                file.write(json.dumps({**dataclasses.asdict(point), "scores": scores}) + "\n")

    def table(self, metric: str) -> list[str]:
        rows = sorted(self._known.items(), key=lambda item: (item[0].which, item[0].interval, item[0].cfg_scale))
        names = list(dict.fromkeys(name for _, scores in rows for name in scores if not name.endswith("_std")))
        names.sort(key=lambda name: name != metric)
        head = f"{'EMA':>8}  {'guidance':>8}  {'interval':>12}  " + "  ".join(f"{name:>12}" for name in names)
        lines = [head, "-" * len(head)]
        for point, scores in rows:
            interval = f"({point.interval[0]:g}, {point.interval[1]:g})"
            cells = "  ".join(f"{scores.get(name, float('nan')):>12.5g}" for name in names)
            lines.append(f"{point.which:>8}  {point.cfg_scale:>8g}  {interval:>12}  {cells}")
        return lines

    def plot(self, path: Path, metric: str) -> None:
        """Score against guidance, one curve per EMA and interval.

        Raises:
          UserError: matplotlib is not installed, or the file cannot be written.
        """
        try:
            from matplotlib.figure import Figure
        except ImportError as error:
            raise UserError("the plot needs matplotlib: pip install -e '.[evaluation]' in jitjax's folder") from error
        curves: dict[str, list[tuple[float, float]]] = {}
        for point, scores in sorted(self._known.items()):
            name = f"{point.which}, ({point.interval[0]:g}, {point.interval[1]:g})"
            curves.setdefault(name, []).append((point.cfg_scale, scores[metric]))
        figure = Figure(figsize=(7, 4.5), layout="constrained")
        axes = figure.add_subplot()
        for name, points in curves.items():
            axes.plot(*zip(*points, strict=True), marker="o", label=name)
        axes.set_xlabel("guidance scale")
        axes.set_ylabel(metric)
        axes.legend(title="EMA, interval")
        axes.grid(alpha=0.3)
        with writing(f"--out={self.path}: {path}"):
            figure.savefig(path, dpi=150)


# ---------------------------------------------------------------- the command


def sweep(
    model: str,
    reference: str,
    out: str,
    *,
    cfg_scale: str,
    intervals: Sequence[tuple[float, float]],
    which: str,
    num: int,
    labels: str,
    metric: str | None,
    seed: int,
    batch_size: int | None,
    dtype: str | None,
    extractor: dict[str, Any],
    split: str,
    options: dict[str, Any],
) -> int:
    """Search, print a table, plot it, and print the command that evaluates the winner again.

    Raises:
      UserError: a mistake in the arguments, or a file that holds another sweep.
    """
    import jax

    from jitjax import draw, pipeline
    from jitjax.evaluation.extractor import open_extractor
    from jitjax.evaluation.models import evaluate_pipeline
    from jitjax.evaluation.score import computed, open_reference, slug

    main = jax.process_index() == 0
    say = print if main else lambda *_: None
    guidance = scales(cfg_scale)
    pipe = pipeline.load(model)
    emas = list(pipe.weights) if which == "all" else [pipe.using(name.strip()).which for name in which.split(",")]
    chosen = open_extractor(**extractor)
    found, notes = open_reference(reference, chosen, pipe.geometry.image_size, reading=pipe.decoding | {"split": split})
    numbers = draw.label_numbers(pipe, labels, num)
    null = pipe.geometry.num_classes
    there, _ = computed(num, found, chosen)
    if metric and metric not in there:
        raise UserError(f"--metric={metric} is not computed here: use one of {', '.join(there)}")
    metric = metric or slug(chosen.distance)
    shown = [None if n == null else n for n in numbers]
    for interval in intervals:  # refuses settings that no sampler can run with before anything is written
        how = options | {"cfg_scale": guidance[-1], "interval": interval}
        pipe.sample_batches(shown, seed=seed, batch_size=batch_size, dtype=dtype, **how)
    setup = draw.describe(pipe, model, seed, numbers, dtype, options) | {
        "reference": reference,
        "split": split or None,
        "reference_images": found.count,
        "reference_mean": f"{abs(found.mu).mean():.3g}",  # coarse: features made again differ in their last bits
        "extractor": chosen.name,
        "weights": {name: draw.weights_digest(pipe.using(name).params) for name in emas},
    }
    del setup["which"]
    path = Path(out).expanduser()
    draw.writable_folder(path.absolute().parent)
    results = Results(path, setup, write=main)
    for note in dict.fromkeys([*pipe.notes, *notes, *chosen.notices]):
        say(f"note: {note}")

    def score(point: Point) -> float:
        scores = results.get(point)
        fresh = scores is None
        if fresh:
            result = evaluate_pipeline(
                pipe.using(point.which),
                shown,
                found,
                chosen,
                seed=seed,
                batch_size=batch_size,
                dtype=dtype,
                options=options | {"cfg_scale": point.cfg_scale, "interval": point.interval},
            )
            scores = result.values
            results.add(point, scores)
        if fresh:
            say(f"{point.which}  guidance {point.cfg_scale:g}  interval {point.interval}: {metric} {scores[metric]:.5g}")
        return -scores[metric] if higher_is_better(metric) else scores[metric]

    best, _ = search(emas, guidance, [tuple(interval) for interval in intervals], score)
    say("")
    for line in results.table(metric):
        say(line)
    if main:
        try:
            results.plot(results.picture, metric)
            say(f"\n{path}, {results.picture}")
        except UserError as error:
            say(f"\nnote: {error}")
    say(f"best: {metric} {results.get(best)[metric]:.5g} with EMA {best.which}, guidance {best.cfg_scale:g}, {best.interval}")
    ends = {guidance[0], guidance[-1]} - {1.0}  # below 1 there is nothing to look for
    if len(guidance) > 1 and best.cfg_scale in ends:
        say(f"note: that is an end of --cfg_scale={cfg_scale}; a better one may lie beyond")
    flags = {
        "reference": reference,
        "split": split or None,
        "num": len(numbers),
        "labels": labels,
        "which": best.which,
        "cfg_scale": f"{best.cfg_scale:g}",
        "interval": "{:g},{:g}".format(*best.interval),
        "seed": seed,
        **options,
        "batch_size": batch_size,
        "dtype": dtype,
        "extractor": extractor["which"],
        "inception": extractor["weights"],
    }
    words = [word for name, value in flags.items() if value is not None for word in (f"--{name}", str(value))]
    say("again: " + shlex.join(["jitjax", "evaluate", model, *words]))
    return 0
