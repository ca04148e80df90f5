"""The data set that the program draws itself."""

import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from jitjax.data import open_dataset
from jitjax.data.shapes import CLASSES, draw_dataset
from jitjax.errors import UserError

ROOT = Path(__file__).parents[1]


def read(root):
    """{class: (n, H, W, 3)}"""
    return {
        folder.name: np.stack([np.asarray(Image.open(path)) for path in sorted(folder.iterdir())])
        for folder in sorted((root / "train").iterdir())
    }


def test_mean_colour_tells_the_class_of_images_drawn_with_another_seed(tmp_path):
    known = read(draw_dataset(tmp_path / "a", image_size=32, per_class=20, seed=0))
    other = read(draw_dataset(tmp_path / "b", image_size=32, per_class=20, seed=1))
    assert tuple(known) == CLASSES and all(images.shape == (20, 32, 32, 3) for images in known.values())
    centres = np.stack([images.mean((0, 1, 2)) for images in known.values()])
    apart = np.linalg.norm(centres[:, None] - centres, axis=-1)[~np.eye(len(CLASSES), dtype=bool)]
    assert apart.min() > 30  # of 255
    for label, images in enumerate(other.values()):
        means = images.mean((1, 2))
        assert (np.linalg.norm(means[:, None] - centres, axis=-1).argmin(1) == label).all()
        # No two alike, and edges have shades between the two colours.
        assert len(np.unique(images.reshape(20, -1), axis=0)) == 20
        assert all(len(np.unique(image.reshape(-1, 3), axis=0)) > 2 for image in images)


def test_the_same_arguments_give_the_same_images(tmp_path):
    settings = dict(image_size=16, per_class=3, seed=7, classes=("red_circle", "yellow_star"))
    first, second = read(draw_dataset(tmp_path / "a", **settings)), read(draw_dataset(tmp_path / "b", **settings))
    other = read(draw_dataset(tmp_path / "c", **settings | {"seed": 8}))
    assert list(first) == ["red_circle", "yellow_star"]
    for name, images in first.items():
        np.testing.assert_array_equal(images, second[name])
        assert (images != other[name]).any()


def test_a_complete_set_is_left_alone(tmp_path):
    root = draw_dataset(tmp_path / "set", per_class=2)
    before = {path: path.stat().st_mtime_ns for path in root.rglob("*")}
    time.sleep(0.02)
    draw_dataset(root, per_class=2)
    assert {path: path.stat().st_mtime_ns for path in root.rglob("*")} == before
    assert list(tmp_path.iterdir()) == [root]


def test_a_killed_call_leaves_no_set_and_the_next_call_draws_it(tmp_path):
    root = tmp_path / "set"
    script = f"from jitjax.data.shapes import draw_dataset; draw_dataset({str(root)!r}, per_class=100_000)"
    process = subprocess.Popen([sys.executable, "-c", script], cwd=ROOT)
    deadline = time.monotonic() + 60
    while not list(tmp_path.rglob("*.png")) and time.monotonic() < deadline:
        time.sleep(0.01)
    process.kill()
    process.wait()
    assert list(tmp_path.rglob("*.png")) and not root.exists()
    assert all(len(images) == 2 for images in read(draw_dataset(root, per_class=2)).values())


def test_what_is_in_the_folder_is_never_overwritten(tmp_path):
    (tmp_path / "mine" / "train").mkdir(parents=True)
    (tmp_path / "mine" / "train" / "cat.png").write_bytes(b"precious")
    with pytest.raises(UserError, match="no set of drawn shapes"):
        draw_dataset(tmp_path / "mine")
    assert [path.name for path in (tmp_path / "mine").rglob("*.*")] == ["cat.png"]

    root = draw_dataset(tmp_path / "set", per_class=2)
    with pytest.raises(UserError, match="other settings"):
        draw_dataset(root, per_class=3)
    (root / "train" / "red_circle" / "0001.png").unlink()
    with pytest.raises(UserError, match="1 of 2"):
        draw_dataset(root, per_class=2)


def test_unknown_class_and_sizes_are_named(tmp_path):
    with pytest.raises(UserError, match="purple_cow.*red_circle"):
        draw_dataset(tmp_path / "set", classes=("purple_cow",))
    with pytest.raises(UserError, match="per_class"):
        draw_dataset(tmp_path / "set", per_class=0)
    assert not any(tmp_path.iterdir())


def test_our_own_records_beside_images_are_known_and_those_of_others_reported(tmp_path):
    """At the start of a run: that something was left alone is news only where it is not ours."""
    root = draw_dataset(tmp_path / "set", per_class=2)
    assert "left alone" not in open_dataset(root, 32).summary
    folder = root / "train"
    (folder / "samples.json").write_text('{"weights": "", "which": "0.9", "labels_by_index": [0]}')
    assert "left alone" not in open_dataset(folder, 32).summary
    (root / "shapes.json").write_text('{"0000.png": "a label, who knows"}')
    assert "left alone: 1 .json beside train/" in open_dataset(root, 32).summary
