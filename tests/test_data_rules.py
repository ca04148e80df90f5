"""What is a class, a split and a picture: right, or refused with the way to choose; folder, archive and prepared alike."""

from __future__ import annotations

import collections
import contextlib
import errno
import io
import os
import random
import re
import resource
import tempfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from wild_inputs import (
    CASES,
    PNG,
    Case,
    deep,
    npz,
    parquet,
    picture,
    pixels,
    random_files,
    random_tree,
    stack,
    table,
    tar,
    write,
    zipped,
)

from jitjax.data import open_dataset
from jitjax.data.inputs import open_input
from jitjax.data.rules import split_of
from jitjax.data.shards import Settings, write_shard
from jitjax.errors import UserError
from jitjax.prepare import prepare

# Random trees drawn by each of the two tests of them.
TREES = int(os.environ.get("JITJAX_TEST_TREES", "150"))


def opened(path: Path, **options):
    return open_input(str(path), str(path) + ".scratch", **options)


def reading(path: Path, **options) -> tuple[list[str], list[int], tuple[str, ...]]:
    """(names, labels, classes) as `prepare` reads it."""
    found = opened(path, **options)
    return [found.name(k) for k in range(len(found))], found.labels.tolist(), found.classes


def agreed(root: Path, **options) -> tuple[list[str], list[int], tuple[str, ...]]:
    """The one reading of training, of `prepare`, and of the zip of the same tree."""
    want = reading(root, **options)
    assert reading(zipped(root), **options) == want
    dataset = open_dataset(root, 8, **options)
    names = [dataset.source.names[k] for k in range(len(dataset))]
    assert (names, dataset.source.labels.tolist(), dataset.class_names) == want
    return want


def one_line(error: UserError, path: Path) -> str:
    """A refusal without what differs by design: the path, and the names of the options of the two programs."""
    text = str(error)
    assert "\n" not in text
    for name in (str(path), "--config.data.path=", "--data_path="):
        text = text.replace(name, "")
    return text.replace("--config.data.", "--")


# --- every input ------------------------------------------------------------------------------------------------------


def test_there_are_three_inputs_of_each_kind():
    counts = collections.Counter(case.kind for case in CASES)
    assert min(counts.values()) >= 3, [kind for kind, count in counts.items() if count < 3]


def is_read_by_training(case: Case) -> bool:
    """Whether training takes the input as it is: folders of images, and not what `prepare` alone can be told."""
    containers = (".parquet", ".arrow", ".tar", ".tar.gz", ".tgz")
    return not case.one_file and not case.prepare and not any(name.endswith(containers) for name in case.files())


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_every_input_is_read_right_or_refused(tmp_path, caplog, case):
    """`prepare`'s reading, that of training, and that of the zip of a folder."""
    pytest.importorskip("pyarrow")
    path = case.build(tmp_path / "set")
    direct = is_read_by_training(case)
    options = {name: value for name, value in case.options.items() if name != "high_depth"}
    if case.refused:
        with pytest.raises(UserError, match=case.refused) as caught:
            opened(path, **options, **case.prepare)
        line = one_line(caught.value, path)
        assert "--" in str(caught.value)
        for other, function in ((path, open_dataset), (zipped(path), opened)) if direct else ():
            with pytest.raises(UserError) as caught:
                function(other, **{"image_size": 8} if function is open_dataset else {}, **options)
            assert one_line(caught.value, other).replace("'", "") == line.replace("'", "")
        return
    found = opened(path, **options, **case.prepare)
    assert (found.labels.tolist(), found.classes) == (list(case.labels), case.classes)
    said = " ".join((found.summary, *found.notes))
    if case.seeds is not None:
        assert [np.asarray(Image.open(io.BytesIO(data))).tobytes() for data in found.read(range(len(found)))] == [
            pixels(seed).tobytes() for seed in case.seeds
        ]
    if direct:
        assert agreed(path, **options) == reading(path, **options)
        said += caplog.text
    else:
        with pytest.raises(UserError, match="jitjax prepare|neither"):
            open_dataset(path, 8)
    assert case.says in said or re.search(case.says, said), said


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_prepare_and_training_agree_on_every_input(tmp_path, case):
    """The prepared set, opened as training does, holds the images, labels and names that training reads directly, and is
    refused where training refuses.
    """
    pytest.importorskip("pyarrow")
    path, output = case.build(tmp_path / "set"), tmp_path / "out"
    prepared_with = {name: value for name, value in case.options.items() if name in ("high_depth", "all_formats")}
    if case.refused:
        with pytest.raises(UserError) as caught:
            prepare(str(path), str(output), 8, workers=0, **case.options, **case.prepare)
        line = one_line(caught.value, path)
        assert not output.exists() and re.search(case.refused, str(caught.value))
        if is_read_by_training(case):
            with pytest.raises(UserError) as caught:
                open_dataset(path, 8, **case.options)
            assert one_line(caught.value, path) == line
        return
    prepare(str(path), str(output), 8, workers=0, **case.options, **case.prepare)
    stored = open_dataset(output, 8, **prepared_with)
    assert stored.kind == "prepared" and stored.class_names == case.classes
    assert [int(stored[k]["label"]) for k in range(len(stored))] == list(case.labels)
    if case.seeds is not None:
        assert [stored[k]["image"].tobytes() for k in range(len(stored))] == [pixels(seed).tobytes() for seed in case.seeds]
    if is_read_by_training(case):
        direct = open_dataset(path, 8, **case.options)
        assert direct.kind == "folder" and (len(direct), direct.class_names) == (len(stored), stored.class_names)
        for k in range(len(direct)):
            assert np.array_equal(stored[k]["image"], direct[k]["image"]) and stored[k]["label"] == direct[k]["label"]


# --- names -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["training", "Train", "trainval", "dev", "val_blurred", "eval", "test_set", "unlabeled", "extra", "tests"]
)
def test_usual_names_are_splits(name):
    assert split_of(name).sure


@pytest.mark.parametrize(
    "name", ["cat", "strain", "terrain", "n01440764", "contest", "devon_rex", "value", "trainer", "latest"]
)
def test_other_names_are_not(name):
    assert split_of(name) is None


def test_a_class_folder_that_is_a_dangling_link_is_refused(tmp_path):
    """As an empty one: without it the classes after it would be renumbered."""
    root = write(tmp_path / "set", ["ant/1.png", "cow/2.png"])
    gone = write(tmp_path / "disk", ["1.png"])
    (root / "bee").symlink_to(gone)
    assert open_dataset(root, 8).class_names == reading(root)[2] == ("ant", "bee", "cow")
    gone.rename(tmp_path / "elsewhere")
    for folder in (root, write(tmp_path / "one", ["cow/x/1.png", "cow/y/1.png"])):  # which is no wrapper either
        if folder != root:
            (folder / "bee").symlink_to(gone)
        for function in (reading, lambda path: open_dataset(path, 8)):
            with pytest.raises(UserError, match="'bee' beside the class folders of .* is a link to what is not there; mend"):
                function(folder)


# --- pixels and failures ----------------------------------------------------------------------------------------------


def test_every_ending_is_decoded_to_the_pixels_of_the_official_loader(tmp_path):
    kinds = {"jfif": "JPEG", "TIF": "TIFF", "pgm": "PPM", "DIB": "BMP", "apng": "PNG", "AVIF": "AVIF", "webp": "WEBP"}
    more = {"jp2": "JPEG2000", "tga": "TGA", "pcx": "PCX", "sgi": "SGI", "ico": "ICO"}
    files = {f"{k:02d}.{ending}": picture(k, kind) for k, (ending, kind) in enumerate((kinds | more).items())}
    root = write(tmp_path / "set", files)
    for dataset, count in ((open_dataset(root, 8), len(kinds)), (open_dataset(root, 8, all_formats=True), len(kinds | more))):
        assert len(dataset) == count
        for k, name in enumerate(list(files)[:count]):
            assert np.array_equal(dataset[k]["image"], np.asarray(Image.open(root / name).convert("RGB"))), name


@pytest.mark.parametrize(("kind", "ending"), [("png16", "png"), ("tiff16", "tif"), ("float", "tif"), ("pgm16", "pgm")])
def test_pictures_that_come_out_constant_are_counted_or_scaled(tmp_path, caplog, kind, ending):
    from jitjax.data import make_iterator

    root = write(tmp_path / "set", {f"a/{k}.{ending}": deep(kind) for k in range(3)} | {"a/z.png": PNG})
    dataset = open_dataset(root, 8)
    assert "3 of the 4 pictures looked at come out constant" in caplog.text
    official = np.asarray(Image.open(root / f"a/0.{ending}").convert("RGB"))
    assert np.array_equal(dataset[0]["image"], official)  # the pixels stay those of the official loader
    iterator = make_iterator(dataset, seed=0, global_batch=4)
    next(iterator)
    assert len(iterator.constant_images) == 3
    iterator.close()
    for how in ("range", "picture"):
        scaled = open_dataset(root, 8, high_depth=how)[0]["image"]
        assert len(np.unique(scaled)) > 50 and scaled.max() == 255
        assert np.array_equal(open_dataset(root, 8, high_depth=how)[3]["image"], dataset[3]["image"])


def test_faults_of_the_system_are_not_called_bad_images(tmp_path, monkeypatch):

    from jitjax.data import files

    root = write(tmp_path / "set", ["a/1.png"])
    monkeypatch.setattr(files.time, "sleep", lambda seconds: None)
    for number, match in {
        errno.EMFILE: "Too many open files; raise the limit",
        errno.ESTALE: "the disk or share does not answer",
        errno.ENOTCONN: "the disk or share does not answer",
        errno.EHOSTDOWN: "the disk or share does not answer",
    }.items():

        def fail(*_, number=number):
            raise OSError(number, os.strerror(number))

        monkeypatch.setattr(files.os, "open", fail)
        with pytest.raises(UserError, match=match):
            open_dataset(root, 8)[0]
        monkeypatch.undo()
        monkeypatch.setattr(files.time, "sleep", lambda seconds: None)


@contextlib.contextmanager
def no_files_left():
    """The process cannot open another file."""
    limits, taken = resource.getrlimit(resource.RLIMIT_NOFILE), []
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (64, limits[1]))
        with contextlib.suppress(OSError):
            while True:
                taken.append(os.open(os.devnull, os.O_RDONLY))
        yield
    finally:
        for descriptor in taken:
            os.close(descriptor)
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)


def test_too_many_open_files_for_real(tmp_path):
    dataset = open_dataset(write(tmp_path / "set", ["a/1.png"]), 8)
    with no_files_left(), pytest.raises(UserError, match="Too many open files"):
        dataset[0]


@pytest.fixture
def any_users_folder():
    """A folder that every user may enter; those in which pytest makes its own are for one user."""
    with tempfile.TemporaryDirectory() as name:
        Path(name).chmod(0o755)
        yield Path(name)


@pytest.mark.parametrize("kind", ["folder", "zip", "tar", "parquet"])
def test_what_the_system_refuses_is_said_with_its_reason(any_users_folder, kind):
    """No permission, and too many open files, while the input is listed."""
    pytest.importorskip("pyarrow")
    root = write(any_users_folder / "set", ["a/1.png", "b/2.png"])
    path = root if kind == "folder" else zipped(root) if kind == "zip" else any_users_folder / f"x.{kind}"
    if kind in ("tar", "parquet"):
        path.write_bytes(tar({"a/1.png": PNG}) if kind == "tar" else parquet(table(label=[0, 1, 0, 1])))
    functions = [opened, lambda path: open_dataset(path, 8)] if kind == "folder" else [opened]
    user = os.geteuid()
    for forbidden in (path / "b" if kind == "folder" else path, any_users_folder):  # a part of it; the folder above it
        forbidden.chmod(0)
        if user == 0:
            os.seteuid(65534)  # root may read everything
        try:
            for function in functions:
                with pytest.raises(UserError, match="cannot be read: Permission denied"):
                    function(path)
        finally:
            os.seteuid(user)
            forbidden.chmod(0o755)
    with no_files_left():
        for function in functions:
            with pytest.raises(UserError, match="Too many open files; raise the limit"):
                function(path)


def test_a_prepared_set_is_not_read_with_other_pixels_than_asked_for(tmp_path):
    root = write(tmp_path / "deep", {f"a/{k}.png": deep("png16") for k in range(2)})
    prepare(str(root), str(tmp_path / "out"), 8, workers=0, high_depth="range")
    with pytest.raises(UserError, match="--high_depth=range, not clip"):
        open_dataset(tmp_path / "out", 8)


def test_an_input_that_goes_away_while_it_is_prepared_is_called_so(tmp_path):
    """And not a disk that cannot be written, or a damaged file."""
    pytest.importorskip("pyarrow")
    files = {
        "x.parquet": parquet(table(label=[0, 1, 0, 1])),
        "x.tar": tar({"a/1.png": PNG, "a/2.png": PNG}),
        "x.npz": npz(arr_0=stack(0, 2)),
    }
    for name in write(tmp_path, files) and files:
        found, settings = opened(tmp_path / name), Settings(8, "raw", 0, False, None, 1)
        (tmp_path / name).unlink()
        with pytest.raises(UserError, match=f"{name} cannot be read: No such file"):
            write_shard(found, np.arange(len(found)), str(tmp_path / "shard"), settings, False, lambda: None)


# --- random trees -----------------------------------------------------------------------------------------------------


def test_random_trees_have_their_classes_in_every_form(tmp_path):
    for seed in range(TREES):
        files, classes, counts = random_tree(random.Random(seed))
        root = write(tmp_path / str(seed), files)
        names, labels, found = agreed(root)
        assert found == tuple(classes), (seed, files)
        assert np.bincount(labels).tolist() == counts, (seed, files)
        if seed % 10 == 0:
            index = prepare(str(root), str(root) + ".out", 8, workers=0)
            assert (index["classes"], index["class_counts"]) == (classes, counts), (seed, files)


def test_any_tree_is_read_alike_or_refused_alike(tmp_path):
    """Trees without a plan: many have no one reading. None may have a split or a system folder for a class."""
    outcomes = {"read": 0, "refused": 0}
    for seed in range(TREES):
        files = random_files(random.Random(1000 + seed))
        root = write(tmp_path / str(seed), dict.fromkeys(files, PNG))
        answers = []
        for path in (root, zipped(root)):
            try:
                answers.append(reading(path))
            except UserError as error:
                answers.append(one_line(error, path).replace("'", ""))
        assert answers[0] == answers[1], (seed, files)
        if isinstance(answers[0], str):
            outcomes["refused"] += 1
            with pytest.raises(UserError) as caught:
                open_dataset(root, 8)
            assert one_line(caught.value, root).replace("'", "") == answers[0], (seed, files)
        else:
            outcomes["read"] += 1
            assert agreed(root) == answers[0]
            entered = Path(open_dataset(root, 8).path).relative_to(root).parts
            if not any(map(split_of, entered)):  # in a split all folders are classes
                assert not [c for c in answers[0][2] if (s := split_of(c)) and s.sure], (seed, files)
            assert not {"@eaDir", ".git"} & set(answers[0][2])
    assert min(outcomes.values()) > TREES / 8, outcomes


@pytest.mark.parametrize(
    "header, row",
    [
        ("name,image_code,label", "Bob{k},p{k},{c}"),
        ("id,photo,label", "{k},p{k},{c}"),
        ("id,file_name,label", "p{k},upload_{k}.png,{c}"),
        ("image_id,path,label", "p{k},original/{k}.png,{c}"),
    ],
)
def test_a_usual_column_that_names_no_image_leaves_it_to_the_others(header, row, tmp_path):
    """Which of the columns holds the names that the files have now is found by what it names."""
    write(tmp_path, [f"p{k}.png" for k in range(4)])
    rows = [row.format(k=k, c="ab"[k % 2]) for k in range(4)]
    (tmp_path / "labels.csv").write_text("\n".join([header, *rows]))
    assert reading(tmp_path)[1:] == ([0, 1, 0, 1], ("a", "b"))


def test_a_folder_of_training_and_validation_holds_splits(tmp_path):
    names = [f"{split}/{name}/{k}.png" for split in ("train", "val") for name in ("cat", "dog") for k in range(2)]
    write(tmp_path / "d", [f"trainval/{name}" for name in names])
    for path, options, split in (
        ("d", {}, "train"),
        ("d", {"split": "trainval"}, "train"),
        ("d/trainval", {"split": "val"}, "val"),
    ):
        assert reading(tmp_path / path, **options)[1:] == ([0, 0, 1, 1], ("cat", "dog"))
        assert f"trainval/{split};" in opened(tmp_path / path, **options).summary


@pytest.mark.parametrize("name", [".#notes.txt", "README.md", "LICENSE.txt"])
def test_a_link_to_a_text_that_is_not_there_is_no_class(name, tmp_path):
    """An editor's lock, a file of an annex that is not fetched."""
    write(tmp_path, ["ant/0.png", "bee/0.png"])
    (tmp_path / name).symlink_to("somebody@host.123:456")
    assert reading(tmp_path)[2] == ("ant", "bee")
    (tmp_path / "cow").symlink_to("/mnt/not/mounted")
    with pytest.raises(UserError, match="'cow' beside the class folders"):
        opened(tmp_path)


def test_a_prepared_set_of_no_split_is_found_beside_a_stray_picture(tmp_path):
    write(tmp_path / "raw", ["a/0.png", "b/0.png"])
    prepare(str(tmp_path / "raw"), str(tmp_path / "d" / "flowers8"), 8)
    write(tmp_path / "d", ["preview.png"])
    assert open_dataset(tmp_path / "d", 8).kind == "prepared"
