"""The figures of the documentation (but the photographs of fast.md), from a run of the quick start that kept checkpoints:

    jitjax train --config configs/quickstart.py --config.checkpoint.keep_every=250 --config.preview.every_steps=50 \
        --config.preview.num_images=16 --workdir runs/figures
    python docs/make_figures.py runs/figures
"""

import math
import sys
from pathlib import Path

import matplotlib
import numpy as np
from PIL import Image

matplotlib.use("Agg")
from matplotlib import pyplot as plt  # noqa: E402

import jitjax  # noqa: E402

IMAGES = Path(__file__).parent / "images"
PREVIEWS = (50, 100, 150, 250, 500, 1000, 1500)  # optimizer steps
SCALE = 2  # screen pixels per image pixel


def save(name: str, grid: np.ndarray) -> None:
    """(rows, columns, H, W, 3) uint8 -> one PNG with a white gap between the images."""
    rows, columns, h, w, _ = grid.shape
    sheet = np.full((rows * (h + 2) - 2, columns * (w + 2) - 2, 3), 255, np.uint8)
    for i in range(rows):
        for j in range(columns):
            sheet[i * (h + 2) : i * (h + 2) + h, j * (w + 2) : j * (w + 2) + w] = grid[i, j]
    picture = Image.fromarray(sheet)
    picture.resize((SCALE * picture.width, SCALE * picture.height), Image.NEAREST).save(IMAGES / name, optimize=True)


def path(run: str) -> None:
    """States above, predictions below, at moments from noise to image."""
    pipe = jitjax.load(run)
    _, (_, states, predictions) = next(pipe.sample_batches([2], seed=1, steps=32, cfg_scale=2.0, moments=8))
    save("path.png", np.stack([states[:, 0], predictions[:, 0]]))


def guidance(run: str) -> None:
    pipe = jitjax.load(f"{run}/checkpoints/250")
    rows = [np.asarray(pipe.sample(list(range(8)), seed=0, steps=32, cfg_scale=scale)) for scale in (1.0, 2.0, 4.0)]
    save("guidance.png", np.stack(rows))


def times() -> None:
    t = np.linspace(0.002, 0.998, 500)
    density = np.exp(-((np.log(t / (1 - t)) + 0.8) ** 2) / (2 * 0.8**2)) / (0.8 * math.sqrt(2 * math.pi) * t * (1 - t))
    figure, (left, right) = plt.subplots(1, 2, figsize=(7.2, 2.4), layout="constrained")
    left.fill_between(t, density, color="#009688", alpha=0.4)
    left.set(title="how often a time is drawn", xlabel="t (0: noise, 1: image)", ylim=0, xlim=(0, 1))
    right.semilogy(t, 1 / np.maximum(1 - t, 0.05) ** 2, color="#009688")
    right.set(title="weight of the image's error", xlabel="t", xlim=(0, 1))
    figure.savefig(IMAGES / "times.png", dpi=110)


def fast() -> None:
    """The table of fast.md: minutes of training steps on one H200, FD-EfficientNet-Lite0 with EMA power:0.1."""
    runs = {
        "AdamW, published times, guidance 1": ("#9e9e9e", "--", (1, 2, 5, 10), (163.8, 127.8, 99.3, 83.6)),
        "AdamW, published times, guidance 4": ("#9e9e9e", "-", (1, 2, 5, 10), (133.6, 106.0, 76.9, 65.2)),
        "AdamW, p_mean 0.6, guidance 1": ("#ff9800", "--", (2, 5, 7), (102.7, 76.6, 67.8)),
        "AdamW, p_mean 0.6, guidance 4": ("#ff9800", "-", (2, 5, 7), (92.7, 61.9, 54.7)),
        "h200_fast, guidance 1": ("#009688", "--", (2.05, 5.12, 7.16, 10.24), (86.1, 64.8, 60.2, 56.2)),
        "h200_fast, guidance 4": ("#009688", "-", (2.05, 5.12, 7.16, 10.24), (74.7, 52.2, 47.7, 45.7)),
    }
    figure, axes = plt.subplots(figsize=(7.2, 4.2), layout="constrained")
    for name, (color, line, minutes, scores) in runs.items():
        axes.plot(minutes, scores, line, color=color, marker="o", label=name)
    swept = "AdamW, published times, best of a sweep at 10 minutes"
    axes.axhline(62.3, color="#9e9e9e", linewidth=0.8, linestyle=":", label=swept)
    axes.set(xlabel="minutes of training steps, one H200", ylabel="FD-EfficientNet-Lite0", xlim=(0, 10.8), ylim=(0, 210))
    axes.legend(frameon=False, loc="upper right", fontsize="small")
    figure.savefig(IMAGES / "fast.png", dpi=110)


def previews(run: str) -> None:
    """The first row of the run's own grids: eight classes."""
    for step in PREVIEWS:
        row = Image.open(f"{run}/samples/step_{step:08d}.png").convert("RGB").crop((0, 16, 270, 48))
        row.resize((SCALE * row.width, SCALE * row.height), Image.NEAREST).save(IMAGES / f"young-{step:04d}.png", optimize=True)


if __name__ == "__main__":
    IMAGES.mkdir(exist_ok=True)
    path(sys.argv[1])
    guidance(sys.argv[1])
    times()
    fast()
    previews(sys.argv[1])
