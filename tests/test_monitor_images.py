"""Images side by side: grids with captions in any script, strips of a denoising path, animations."""

import numpy as np
import pytest
from conftest import run_python
from PIL import Image

from jitjax.monitor import images as grids
from jitjax.monitor import save_animation, save_grid, save_strip


def test_grid_places_images_row_by_row_with_two_pixels_between(tmp_path):
    images = np.arange(5 * 6 * 4 * 3, dtype=np.uint8).reshape(5, 6, 4, 3)
    path = save_grid(tmp_path / "samples" / "grid.png", images, columns=3)
    grid = np.asarray(Image.open(path))
    assert grid.shape == (6 * 2 + 2, 4 * 3 + 4, 3)
    for i, image in enumerate(images):
        row, column = divmod(i, 3)
        np.testing.assert_array_equal(grid[row * 8 : row * 8 + 6, column * 6 : column * 6 + 4], image)
    assert (grid[6:8] == 255).all() and (grid[:, 4:6] == 255).all()
    assert [p.name for p in path.parent.iterdir()] == ["grid.png"]


def has_ink(area):
    return bool((np.asarray(area) < 100).any())


def test_captions_that_fit_stand_above_their_images(tmp_path):
    images = np.full((2, 32, 32, 3), 128, np.uint8)
    grid = np.asarray(Image.open(save_grid(tmp_path / "g.png", images, columns=2, captions=["star", ""])))
    assert grid.shape == (grids.LINE + 32, 32 * 2 + 2, 3)
    captions, below = grid[: grids.LINE], grid[grids.LINE :]
    assert has_ink(captions[:, :32]) and (captions[:, 34:] == 255).all()
    assert (below[:, :32] == 128).all()


@pytest.mark.parametrize("size", [8, 16, 32, 64, 256])
@pytest.mark.parametrize("by_column", [True, False])
@pytest.mark.parametrize("names", [["star", "golden retriever"], ["Schäferhund", "Жираф"], ["中国の犬", "狐"]])
def test_every_size_and_script_shows_which_class_is_which(tmp_path, size, names, by_column):
    """Each image has a caption above it, or above its column: the name, or a number that the legend below or the text
    file explains; never the box that stands for a missing glyph."""
    colour = (250, 150, 200)  # unlike any shade of the text
    images = np.broadcast_to(np.array(colour, np.uint8), (4, size, size, 3))
    path = save_grid(tmp_path / "g.png", images, columns=2, captions=names + names[:: 1 if by_column else -1])
    grid = np.asarray(Image.open(path))
    solid = (grid == colour).all(axis=-1)
    rows, columns = np.flatnonzero(solid.sum(1) >= 2 * size), np.flatnonzero(solid.sum(0) >= 2 * size)
    assert len(rows) == len(columns) == 2 * size and solid.sum() == 4 * size * size  # every pixel of all four images
    for top in (rows[0],) if by_column else (rows[0], rows[size]):
        for left in (columns[0], columns[size]):
            assert has_ink(grid[top - grids.LINE : top, left : left + size])
    legend = grid[rows[-1] + 1 :]
    if len(legend):
        assert has_ink(legend)
    drawable = all(grids._font(name) is not None for name in names)
    text = tmp_path / "g.txt"
    if drawable:
        assert not text.exists()
    else:
        assert len(legend)
        assert dict(line.split("\t") for line in text.read_text(encoding="utf-8").splitlines()) == {
            str(i): name for i, name in enumerate(names) if grids._font(name) is None
        }


def test_without_fontconfig_what_pillow_cannot_draw_goes_to_the_text_file(tmp_path):
    """Pillow's own font has ASCII and little else: not even an accent."""
    run_python(
        f"""
        import numpy as np
        from jitjax.monitor import save_grid
        images = np.zeros((3, 64, 64, 3), np.uint8)
        save_grid({str(tmp_path / "g.png")!r}, images, captions=["cat", "épée", "bad\\udcffbytes"])
        """,
        PATH="/nonexistent",
    )
    assert (tmp_path / "g.txt").read_text(encoding="utf-8") == "1\tépée\n"
    assert Image.open(tmp_path / "g.png").height > 2 * (64 + grids.LINE) + 2  # with a legend


def test_a_name_too_long_for_the_picture_is_whole_in_the_text_file(tmp_path):
    name = "a name with synonyms, " * 20
    path = save_grid(tmp_path / "g.png", np.zeros((1, 32, 32, 3), np.uint8), captions=[name])
    assert (tmp_path / "g.txt").read_text() == f"0\t{name.strip()}\n"
    assert Image.open(path).width <= grids.LONGEST_ENTRY


def test_captions_that_do_not_fit_stand_as_the_labels_that_commands_take(monkeypatch):
    """Above the image and in the legend, in the order of the labels; an image without a class has none."""
    entries, images = [], np.zeros((4, 8, 8, 3), np.uint8)
    monkeypatch.setattr(grids, "_font", lambda text: (entries.append(text), grids.ImageFont.load_default(size=12))[1])
    grids.draw_grid(
        images, columns=4, captions=["magenta cross", "black diamond", "", "magenta cross"], labels=[12, 3, 1000, 12]
    )
    assert {"12  magenta cross", "3  black diamond", "12", "3"} <= set(entries) and not {"0", "1", "1000"} & set(entries)


def test_a_strip_has_a_row_for_each_image_and_a_column_for_each_state(tmp_path):
    states = [
        np.full((2, 16, 16, 3), 10 * step, np.uint8) + np.arange(2, dtype=np.uint8)[:, None, None, None] for step in range(4)
    ]
    strip = np.asarray(Image.open(save_strip(tmp_path / "s.png", states)))
    assert strip.shape == (2 * 16 + 2, 4 * 16 + 3 * 2, 3)
    for row in range(2):
        for column in range(4):
            assert (strip[row * 18 : row * 18 + 16, column * 18 : column * 18 + 16] == 10 * column + row).all()


@pytest.mark.parametrize("suffix", [".gif", ".webp", ".png"])
def test_an_animation_shows_the_states_in_order_and_holds_the_last(tmp_path, suffix):
    states = [np.full((2, 16, 16, 3), 40 * step, np.uint8) for step in range(4)]
    path = save_animation(tmp_path / f"path{suffix}", states, milliseconds=50, hold_milliseconds=700)
    with Image.open(path) as film:
        shown = []
        for frame in range(film.n_frames):
            film.seek(frame)
            film.load()
            shown.append((np.asarray(film.convert("RGB"))[0, 0, 0], film.info["duration"]))
    assert shown == [(0, 50), (40, 50), (80, 50), (120, 700)]
    with pytest.raises(ValueError, match="mp4"):
        save_animation(tmp_path / "path.mp4", states)
