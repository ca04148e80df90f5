"""What is a class, a split and a picture: right, or refused with the way to choose; folder, archive and prepared alike."""

from __future__ import annotations

import io
import json
import os
import random
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from jitjax.data import open_dataset
from jitjax.data.inputs import open_input
from jitjax.data.rules import split_of
from jitjax.errors import UserError


def picture(seed: int, kind: str = "PNG") -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, kind)
    return file.getvalue()


PNG = picture(0)


def write(root: Path, files: dict[str, bytes | str] | list[str]) -> Path:
    """Writes files; a list holds pictures; a name that ends in "/" is an empty folder."""
    for name, data in files.items() if isinstance(files, dict) else dict.fromkeys(files, PNG).items():
        path = root / name
        if name.endswith("/"):
            path.mkdir(parents=True, exist_ok=True)
            continue
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data.encode() if isinstance(data, str) else data)
    return root


def zipped(root: Path) -> Path:
    target = root.with_name(root.name + ".zip")
    with zipfile.ZipFile(target, "w") as archive:
        for path in sorted(root.rglob("*")):
            archive.write(path, path.relative_to(root))
    return target


def tarred(target: Path, files: dict[str, bytes | str], mode: str = "w") -> Path:
    target.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(target, mode) as archive:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            data = data.encode() if isinstance(data, str) else data
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return target


def reading(path: Path, **options) -> tuple[list[str], list[int], tuple[str, ...]]:
    """(names, labels, classes) as `prepare` reads it."""
    found = open_input(str(path), str(path) + ".scratch", **options)
    return [found.name(k) for k in range(len(found))], found.labels.tolist(), found.classes


def agreed(root: Path, **options) -> tuple[list[str], list[int], tuple[str, ...]]:
    """The one reading of training, of `prepare`, and of the zip of the same tree."""
    want = reading(root, **options)
    assert reading(zipped(root), **options) == want
    dataset = open_dataset(root, 8, **options)
    names = [dataset.source.names[k] for k in range(len(dataset))]
    assert (names, dataset.source.labels.tolist(), dataset.class_names) == want
    return want


def refused(root: Path, match: str, **options) -> None:
    for path, option in ((root, "--"), (zipped(root), "--")):
        with pytest.raises(UserError, match=match) as caught:
            reading(path, **options)
        assert option in str(caught.value) and "\n" not in str(caught.value)
    with pytest.raises(UserError, match=match) as caught:
        open_dataset(root, 8, **options)
    assert "--config.data." in str(caught.value)


# --- splits -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("train", "other"),
    [
        ("train", "unlabelled"),
        ("seg_train", "seg_pred"),
        ("trainset", "testset"),
        ("TRAIN", "VAL"),
        ("Train_Images", "Validation_Images"),
        ("train2017", "val2017"),
        ("training_set", "test_set"),
        ("train_64x64", "valid_64x64"),
        ("train_blurred", "val_blurred"),
        ("TrainSet", "DevSet"),
        ("cars_train", "cars_test"),
        ("imagenet-train", "imagenet-eval"),
        ("train/train", "test"),
        ("train/images", "holdout"),
    ],
)
def test_a_split_is_chosen_and_never_a_class(tmp_path, train, other):
    root = write(tmp_path / "set", [f"{train}/{c}/{k}.png" for c in "ab" for k in range(3)] + [f"{other}/a/9.png"])
    names, labels, classes = agreed(root)
    assert classes == ("a", "b") and labels == [0] * 3 + [1] * 3
    assert f"{other.partition('/')[0]}/ (1)" in open_dataset(root, 8).summary


@pytest.mark.parametrize(
    "folders",
    [["train", "cat"], ["train_a", "train_b"], ["val", "test"], ["test"], ["my_train", "cat"], ["trainA", "trainB", "testA"]],
)
def test_where_a_split_is_in_doubt_it_is_asked_for(tmp_path, folders):
    root = write(tmp_path / "set", [f"{folder}/{c}/{k}.png" for folder in folders for c in "xyz" for k in range(2)])
    refused(root, "split=")
    assert agreed(root, split=folders[0])[2] == ("x", "y", "z")
    assert agreed(root, split=".")[2] == tuple(sorted(folders))


def test_the_option_takes_a_name_or_a_role(tmp_path):
    root = write(
        tmp_path / "set", ["train/a/1.png", "train/b/1.png", "Validation/a/2.png", "Validation/b/2.png", "Validation/b/3.png"]
    )
    assert agreed(root, split="val")[1] == agreed(root, split="validation")[1] == [0, 1, 1]
    refused(root, "none called test", split="test")
    flat = write(tmp_path / "plain", ["a/1.png", "b/1.png"])
    refused(flat, "no split called val", split="val")


def test_a_class_may_have_a_word_of_a_split_in_its_name(tmp_path, caplog):
    root = write(tmp_path / "set", [f"{c}/{k}.png" for c in ("bullet_train", "test_tube", "cat", "dog") for k in range(2)])
    with pytest.raises(UserError, match="split="):  # one says train, one says test
        open_dataset(root, 8)
    root = write(tmp_path / "other", [f"{c}/{k}.png" for c in ("bullet_train", "cat", "dog") for k in range(2)])
    assert agreed(root)[2] == ("bullet_train", "cat", "dog")
    assert "bullet_train read as a class" in caplog.text


def test_splits_below_classes_are_not_merged(tmp_path):
    root = write(tmp_path / "set", [f"{c}/{s}/{k}.png" for c in ("cat", "dog") for s in ("train", "test") for k in range(2)])
    refused(root, "splits test, train below a class folder")
    assert agreed(root, split=".")[1] == [0] * 4 + [1] * 4


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


# --- wrappers, system files, endings ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "files",
    [
        ["animals-main/cat/1.png", "animals-main/dog/1.png"],
        ["a/b/c/cat/1.png", "a/b/c/dog/1.png"],
        [
            "download/README.md",
            "download/data/train/cat/1.png",
            "download/data/train/dog/1.png",
            "download/data/test/cat/2.png",
        ],
        ["ILSVRC/Data/CLS-LOC/train/cat/1.png", "ILSVRC/Data/CLS-LOC/train/dog/1.png", "ILSVRC/Data/CLS-LOC/val/9.png"],
        ["photos/cat/1.png", "photos/dog/1.png", "annotations/list.xml", "docs/readme.txt"],
    ],
)
def test_wrappers_are_entered(tmp_path, files):
    root = write(tmp_path / "set", dict.fromkeys(files, PNG))
    assert agreed(root)[1:] == ([0, 1], ("cat", "dog"))


def test_a_folder_that_may_be_class_or_wrapper_is_asked_about(tmp_path):
    refused(write(tmp_path / "set", ["animals/1.png", "animals/cat/2.png", "animals/dog/3.png"]), "both images and folders")
    refused(write(tmp_path / "masks", ["images/1.png", "images/2.png", "masks/1.png", "masks/2.png"]), "may be masks")
    refused(write(tmp_path / "lost", ["cat/1.png", "dog/", "emu/2.png"]), "'dog'.*holds no image")


@pytest.mark.parametrize(
    "junk",
    [
        ["@eaDir/x.png", "a/#recycle/1.png", "lost+found/"],
        ["$RECYCLE.BIN/S-1/x.png", "System Volume Information/y.png", "a/Thumbs.db"],
        ["__MACOSX/a/._1.png", "a/._1.png", ".ipynb_checkpoints/1-checkpoint.png", "b/.DS_Store"],
        ["a/.ipynb_checkpoints/1.png", "b/@eaDir/1.png/SYNOPHOTO_THUMB_M.jpg", "desktop.ini"],
    ],
)
def test_what_systems_leave_behind_is_no_part_and_is_reported(tmp_path, junk):
    root = write(tmp_path / "set", ["a/1.png", "b/1.png", *junk])
    assert agreed(root) == (["a/1.png", "b/1.png"], [0, 1], ("a", "b"))
    assert "left alone: 1 " in open_dataset(root, 8).summary


def test_every_ending_that_is_decoded_counts_and_the_rest_is_counted(tmp_path):
    kinds = {
        "jfif": "JPEG",
        "JPE": "JPEG",
        "TIF": "TIFF",
        "tiff": "TIFF",
        "pgm": "PPM",
        "DIB": "BMP",
        "apng": "PNG",
        "AVIF": "AVIF",
    }
    files = {f"{'ab'[k % 2]}/{k}.{ending}": picture(k, kind) for k, (ending, kind) in enumerate(kinds.items())}
    root = write(tmp_path / "set", {**files, "a/x.txt": "", "a/y.txt": "", "b/z.MOV": "", "b/w.jp2": picture(1, "JPEG2000")})
    names, labels, classes = agreed(root)
    assert sorted(names) == sorted(files)
    dataset = open_dataset(root, 8)
    assert dataset.summary == f"8 images of 2 classes from {root}; left alone: 1 .jp2, 1 .mov, 2 .txt"
    for k in range(8):
        assert dataset[k]["image"].shape == (8, 8, 3)
    more = open_dataset(root, 8, all_formats=True)
    assert len(more) == 9 and np.array_equal(more[8]["image"], np.asarray(Image.open(root / "b/w.jp2")))


# --- labels beside the images -----------------------------------------------------------------------------------------


def flat(count: int = 4) -> dict[str, bytes]:
    return {f"{k}.png": picture(k) for k in range(count)}


@pytest.mark.parametrize(
    ("files", "labels", "classes"),
    [
        ({"metadata.csv": "file_name,label\n0.png,dog\n1.png,cat\n2.png,dog\n3.png,cat\n"}, [1, 0, 1, 0], ("cat", "dog")),
        (
            {"metadata.jsonl": "".join(json.dumps({"file_name": f"{k}.png", "label": k % 2}) + "\n" for k in range(4))},
            [0, 1, 0, 1],
            ("0", "1"),
        ),
        ({"labels.csv": "id;breed\n0;x\n1;y\n2;x\n3;z\n"}, [0, 1, 0, 2], ("x", "y", "z")),
        (
            {"labels.csv": "\ufefffilename,target\r\n./0.png,10\r\n./1.png,20\r\n./2.png,10\r\n./3.png,5\r\n"},
            [1, 2, 1, 0],
            ("5", "10", "20"),
        ),
        ({"dataset.json": json.dumps({"labels": [[f"{k}.png", 3 - k] for k in range(4)]})}, [3, 2, 1, 0], ("0", "1", "2", "3")),
        ({f"{k}.cls": str(k % 3) for k in range(4)}, [0, 1, 2, 0], ("0", "1", "2")),
        ({f"{k}.json": json.dumps({"caption": "x", "label": "ab"[k % 2]}) for k in range(4)}, [0, 1, 0, 1], ("a", "b")),
    ],
)
def test_labels_beside_flat_images(tmp_path, files, labels, classes):
    root = write(tmp_path / "set", {**flat(), **files})
    assert agreed(root)[1:] == (labels, classes)
    assert "labels: " in open_dataset(root, 8).summary
    assert agreed(root, labels="none")[2] == ()
    below = write(tmp_path / "below", {f"train/{name}": data for name, data in (flat() | files).items()} | {"test/9.png": PNG})
    assert agreed(below)[1:] == (labels, classes)


def test_a_table_beside_the_split_is_read(tmp_path):
    rows = "image,category\n" + "".join(f"train/{k}.png,{'ab'[k % 2]}\n" for k in range(4)) + "test/9.png,a\n"
    root = write(tmp_path / "set", {f"train/{k}.png": PNG for k in range(4)} | {"test/9.png": PNG, "annotations.csv": rows})
    assert agreed(root)[1:] == ([0, 1, 0, 1], ("a", "b"))


@pytest.mark.parametrize("buckets", [("00000", "00001"), ("00000",), ("00000", "00001", "00007")])
def test_buckets_of_dataset_tool_are_no_classes(tmp_path, buckets):
    files = [f"{bucket}/img{k}{bucket}.png" for bucket in buckets for k in range(3)]
    root = write(
        tmp_path / "set",
        dict.fromkeys(files, PNG) | {"dataset.json": json.dumps({"labels": [[f, i % 2] for i, f in enumerate(files)]})},
    )
    assert agreed(root)[1] == [i % 2 for i in range(len(files))]
    (root / "dataset.json").write_text('{"labels": null}')
    assert agreed(root)[2] == ()


def test_labels_that_disagree_or_are_incomplete_are_refused(tmp_path):
    folders = {f"{c}/{k}{c}.png": PNG for c in "ab" for k in range(2)}
    other = write(tmp_path / "other", {**folders, "labels.csv": "file,label\n0a.png,x\n1a.png,y\n0b.png,x\n1b.png,y\n"})
    refused(other, "differ from its 2 class folders")
    assert agreed(other, labels="folders")[2] == ("a", "b") and agreed(other, labels="labels.csv")[2] == ("x", "y")
    same = write(tmp_path / "same", {**folders, "labels.csv": "file,label\n0a.png,x\n1a.png,x\n0b.png,y\n1b.png,y\n"})
    assert agreed(same)[2] == ("a", "b")
    refused(write(tmp_path / "part", {**flat(), "labels.csv": "file,label\n0.png,x\n1.png,x\n"}), "no label for 2 of 4")
    refused(write(tmp_path / "part_cls", {**flat(), "0.cls": "1"}), "3 of 4 images have no label")
    refused(write(tmp_path / "two", {**flat(2), "labels.csv": "file,label,class\n0.png,x,u\n1.png,x,v\n"}), "different labels")
    refused(write(tmp_path / "twice", {**flat(2), "labels.csv": "file,label\n0.png,x\n0.png,y\n1.png,x\n"}), "two labels")
    refused(write(tmp_path / "half", {**flat(2), "labels.csv": "file,label\n0.png,0.5\n1.png,1\n"}), "not a class number|two")


def test_a_table_without_known_labels_is_said(tmp_path, caplog):
    root = write(tmp_path / "set", {**flat(2), "metadata.csv": "file_name,text\n0.png,a red hat\n1.png,a blue hat\n"})
    assert agreed(root)[2] == () and "no column that is known to hold labels (file_name, text)" in caplog.text
    assert agreed(root, labels="metadata.csv:text")[2] == ("a blue hat", "a red hat")
    captions = write(tmp_path / "captions", {**flat(2), "0.txt": "a hat", "1.txt": "a cat"})
    assert "2 .txt" in open_dataset(captions, 8).summary


# --- Parquet, Arrow, NumPy --------------------------------------------------------------------------------------------


def table(count: int = 4, **columns):
    pyarrow = pytest.importorskip("pyarrow")
    return pyarrow.table({"image": [{"bytes": picture(k), "path": f"{k}.png"} for k in range(count)], **columns})


def parquet(path: Path, *tables) -> Path:
    import pyarrow.parquet

    path.mkdir(parents=True, exist_ok=True)
    for k, content in enumerate(tables):
        pyarrow.parquet.write_table(content, path / f"{k:04d}.parquet")
    return path


@pytest.mark.parametrize(
    ("column", "labels", "classes"),
    [
        ({"category": ["b", "a", "b", "a"]}, [1, 0, 1, 0], ("a", "b")),
        ({"class_id": [7, 3, 7, 9]}, [1, 0, 1, 2], ("3", "7", "9")),
        ({"y": [2.0, 1.0, 0.0, 1.0]}, [2, 1, 0, 1], ("0", "1", "2")),
        ({"targets": [True, True, False, True]}, [1, 1, 0, 1], ("0", "1")),
        ({"label": [[1], [0], [1], [0]]}, [1, 0, 1, 0], ("0", "1")),
        ({"fine_label": [0, 1, 2, 3], "coarse_label": [0, 0, 1, 1]}, [0, 1, 2, 3], ("0", "1", "2", "3")),
        ({"label": [1, 0, 1, 0], "label_name": ["x", "y", "x", "y"]}, [1, 0, 1, 0], ("0", "1")),
        ({"label": [-1, -1, -1, -1]}, [0] * 4, ()),
    ],
)
def test_label_columns_of_every_usual_name_and_type(tmp_path, column, labels, classes):
    assert reading(parquet(tmp_path / "set", table(**column)))[1:] == (labels, classes)


def test_columns_that_are_not_read_are_said_and_doubtful_ones_refused(tmp_path):
    pytest.importorskip("pyarrow")
    found = open_input(str(parquet(tmp_path / "a", table(width=[1, 2, 3, 4], text=list("abcd")))), "")
    assert found.classes == () and "(width, text)" in found.notes[0]
    assert reading(tmp_path / "a", labels="text")[2] == tuple("abcd")
    found = open_input(str(parquet(tmp_path / "b", table(label=[1, 2, 3, 1]))), "")
    assert found.classes == ("1", "2", "3") and "1 is class 0, 2 is class 1, 3 is class 2" in found.notes[0]
    for name, columns in {
        "c": {"label": [0, 1, 0, 1], "target": [0, 0, 1, 1]},
        "d": {"label": [0, 1, None, 1]},
        "e": {"label": [0, 0.5, 1, 1]},
    }.items():
        with pytest.raises(UserError, match="different labels|not a class number"):
            reading(parquet(tmp_path / name, table(**columns)))


def test_types_and_orders_may_differ_between_files(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    first = table(label=pyarrow.array([0, 1, 2, 0], pyarrow.int64()))
    images = [picture(k) for k in range(4)]
    others = [
        pyarrow.table({"label": pyarrow.array([0, 1, 2, 0], pyarrow.int32()), "image": first.column("image")}),
        pyarrow.table(
            {"image": pyarrow.array(images, pyarrow.binary()), "label": pyarrow.array([0, 1, 2, 0], pyarrow.uint8())}
        ),
        pyarrow.table({"image": pyarrow.array(images, pyarrow.large_binary()), "label": pyarrow.array([0.0, 1, 2, 0])}),
        pyarrow.table(
            {"image": pyarrow.array(images, pyarrow.binary_view()), "label": pyarrow.array([0, 1, 2, 0]).dictionary_encode()}
        ),
        pyarrow.table(
            {"image": pyarrow.array(images, pyarrow.binary()).dictionary_encode(), "extra": [1] * 4, "label": [0, 1, 2, 0]}
        ),
    ]
    root = parquet(tmp_path / "set", first, *others)
    assert reading(root)[1] == [0, 1, 2, 0] * 6
    assert list(open_input(str(root), "").read(range(24))) == images * 6
    strings = [pyarrow.array(list("abca"), kind) for kind in (pyarrow.string(), pyarrow.large_string(), pyarrow.string_view())]
    root = parquet(tmp_path / "strings", *(table(label=column) for column in strings))
    assert reading(root)[1:] == ([0, 1, 2, 0] * 3, ("a", "b", "c"))


@pytest.mark.parametrize(
    ("files", "rows"),
    [
        (["default/train/0000.parquet", "default/train/0001.parquet", "default/validation/0000.parquet"], 8),
        (["plain_text/train-00000-of-00001.parquet", "plain_text/test-00000-of-00001.parquet"], 4),
        (
            [
                "data/train-00000-of-00002-ab12.parquet",
                "data/train-00001-of-00002-cd34.parquet",
                "data/test-00000-of-00001-ef56.parquet",
            ],
            8,
        ),
        (["cifar10-train.parquet", "cifar10-test.parquet"], 4),
        (["mnist/Training.parquet", "mnist/Testing.parquet"], 4),
        (["0000.parquet", "0001.parquet"], 8),
    ],
)
def test_layouts_of_parquet_files(tmp_path, files, rows):
    pytest.importorskip("pyarrow")
    import pyarrow.parquet

    for name in files:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        pyarrow.parquet.write_table(table(label=[0, 1, 2, 0]), tmp_path / name)
    assert len(reading(tmp_path)[0]) == rows
    with pytest.raises(UserError, match="jitjax prepare"):
        open_dataset(tmp_path, 8)


@pytest.mark.parametrize(
    "files",
    [
        ["a/train/0.parquet", "b/train/0.parquet"],
        ["test.parquet", "val.parquet"],
        ["train.parquet", "more.parquet"],
        ["a/0.parquet", "b/0.parquet"],
    ],
)
def test_doubtful_layouts_are_refused(tmp_path, files):
    pytest.importorskip("pyarrow")
    import pyarrow.parquet

    for name in files:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        pyarrow.parquet.write_table(table(label=[0, 1, 2, 0]), tmp_path / name)
    with pytest.raises(UserError, match="--split|give one of"):
        reading(tmp_path)
    assert len(reading(tmp_path, split=".")[0]) == 8


def test_datasets_saved_to_disk(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    features = {"image": {"_type": "Image"}, "label": {"_type": "ClassLabel", "names": ["cat", "dog", "emu"]}}
    content = table(label=[2, 0, 1, 2]).replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    for split in ("train", "test"):
        folder = write(tmp_path / split, {"dataset_info.json": "{}", "state.json": "{}"})
        for name in ("data-00000-of-00002.arrow", "data-00001-of-00002.arrow", "cache-1234.arrow"):
            with pyarrow.OSFile(str(folder / name), "wb") as file, pyarrow.ipc.new_stream(file, content.schema) as writer:
                writer.write_table(content, max_chunksize=3)
    (tmp_path / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    assert reading(tmp_path)[1:] == ([2, 0, 1, 2] * 2, ("cat", "dog", "emu"))
    assert list(open_input(str(tmp_path), "").read([1, 3, 6])) == [picture(1), picture(3), picture(2)]
    assert len(reading(tmp_path / "test")[0]) == 8


@pytest.mark.parametrize(
    ("folders", "labels", "want"),
    [
        ([""], ["dog", "cat", "dog", "emu"], ([1, 0, 1, 2], ("cat", "dog", "emu"))),  # Dataset.save_to_disk, text labels
        (["train", "validation"], [3, 1, 3, 7], ([1, 0, 1, 2], ("1", "3", "7"))),  # sparse numbers without names
        (["only"], [True, False, False, True], ([1, 0, 0, 1], ("0", "1"))),  # below another name
    ],
)
def test_other_datasets_saved_to_disk(tmp_path, folders, labels, want):
    pyarrow = pytest.importorskip("pyarrow")
    content = table(label=labels)
    for name in folders:
        folder = write(tmp_path / name, {"dataset_info.json": "{}", "state.json": "{}"})
        file = str(folder / "data-00000-of-00001.arrow")
        with pyarrow.OSFile(file, "wb") as sink, pyarrow.ipc.new_stream(sink, content.schema) as writer:
            writer.write_table(content)
    if folders != [""]:
        (tmp_path / "dataset_dict.json").write_text(json.dumps({"splits": folders}))
    assert reading(tmp_path)[1:] == want


@pytest.mark.parametrize("labels", [["a", "b", "a"], [0, 1, 1]])
def test_tables_that_agree_with_the_class_folders_change_nothing(tmp_path, labels):
    """A table beside class folders that says the same as they do is no second reading."""
    for k, name in enumerate(labels):
        write(tmp_path / f"class_{name}", {f"{k}.png": PNG})
    plain = reading(tmp_path)[1:]
    rows = "".join(f"class_{name}/{k}.png,class_{name}\n" for k, name in enumerate(labels))
    (tmp_path / "labels.csv").write_text("file_name,label\n" + rows)
    assert reading(tmp_path)[1:] == plain


@pytest.mark.parametrize(("labels", "classes"), [([5, 6, 5], ("5", "6")), ([0, 1, 2], ("0", "1", "2")), (None, ())])
def test_npz_of_pixels(tmp_path, labels, classes):
    from jitjax.data.image import decode

    pixels = np.random.default_rng(0).integers(0, 256, (3, 8, 8, 3), dtype=np.uint8)
    for save in (np.savez, np.savez_compressed):
        save(tmp_path / "x.npz", pixels, *([np.array(labels)] if labels else []))
        found = open_input(str(tmp_path / "x.npz"), "")
        assert found.classes == classes and len(found) == 3
        for k, data in zip((0, 2), found.read([0, 2]), strict=True):
            assert np.array_equal(decode(data, 8), pixels[k])
    np.savez(tmp_path / "y.npz", mu=np.zeros(8), sigma=np.zeros((8, 8)))
    with pytest.raises(UserError, match="no single array"):
        open_input(str(tmp_path / "y.npz"), "")


# --- archives ---------------------------------------------------------------------------------------------------------


def samples(first: int, count: int, prefix: str = "s") -> dict[str, bytes | str]:
    files: dict[str, bytes | str] = {}
    for k in range(first, first + count):
        files |= {f"{prefix}{k:06d}.png": picture(k), f"{prefix}{k:06d}.cls": str(k % 3)}
    return files


def test_shards_of_webdataset(tmp_path):
    for k in range(3):
        tarred(tmp_path / "a" / f"train-{k:06d}.tar", samples(4 * k, 4))
    tarred(tmp_path / "a" / "val-000000.tar", samples(50, 4))
    names, labels, classes = reading(tmp_path / "a")
    assert labels == [k % 3 for k in range(12)] and classes == ("0", "1", "2")
    assert list(open_input(str(tmp_path / "a"), "").read([5, 11])) == [picture(5), picture(11)]
    for k in (0, 2):  # the same names in each shard, compressed
        tarred(tmp_path / "b" / f"shard{k}.tar.gz", samples(0, 4), "w:gz")
    assert reading(tmp_path / "b")[1] == [0, 1, 2, 0] * 2
    for k in range(2):  # no labels
        tarred(tmp_path / "c" / f"{k:05d}.tar", {f"{k}{i}.jpg": picture(i, "JPEG") for i in range(3)})
    assert reading(tmp_path / "c")[1:] == ([0] * 6, ())
    for k in (0, 5):  # gaps: shards or classes?
        tarred(tmp_path / "d" / f"part{k:05d}.tar", {f"{k}{i}.png": PNG for i in range(3)})
    with pytest.raises(UserError, match="--labels"):
        reading(tmp_path / "d")
    assert len(reading(tmp_path / "d", labels="folders")[2]) == 2


def test_the_tar_of_tars_and_the_folder_of_tars(tmp_path):
    inner = {}
    for k, wnid in enumerate(("n01440764", "n01443537", "n02085620")):
        path = tarred(tmp_path / "classes" / f"{wnid}.tar", {f"{wnid}_{i}.JPEG": picture(10 * k + i, "JPEG") for i in range(2)})
        inner[f"{wnid}.tar"] = path.read_bytes()
    whole = tarred(tmp_path / "ILSVRC2012_img_train.tar", inner)
    want = ([0, 0, 1, 1, 2, 2], ("n01440764", "n01443537", "n02085620"))
    assert reading(whole)[1:] == reading(tmp_path / "classes")[1:] == want
    assert list(open_input(str(whole), "").read([3, 4])) == [picture(11, "JPEG"), picture(20, "JPEG")]
    bad = tarred(tmp_path / "bad.tar", {"n1.tar": inner["n01440764.tar"][:700]})
    with pytest.raises(UserError, match="truncated|damaged"):
        reading(bad)
    outside = tarred(tmp_path / "inside.tar", {"../x.png": PNG}).read_bytes()
    with pytest.raises(UserError, match="outside"):
        reading(tarred(tmp_path / "outside.tar", {"n1.tar": outside}))


@pytest.mark.parametrize(
    ("encoding", "option"), [("utf-8", None), ("gbk", "gbk"), ("shift_jis", "shift_jis"), ("cp866", "cp866")]
)
def test_zips_in_old_code_pages(tmp_path, encoding, option):
    names = {"utf-8": ("kočka", "пёс"), "gbk": ("猫", "狗"), "shift_jis": ("ねこ", "いぬ"), "cp866": ("кот", "собака")}[
        encoding
    ]
    path = tmp_path / "old.zip"
    raw = {name.encode(encoding): "xy"[k].encode() * len(name.encode(encoding)) for k, name in enumerate(names)}
    with zipfile.ZipFile(path, "w") as archive:
        for stand_in in raw.values():
            archive.writestr(f"{stand_in.decode()}/1.png", PNG)
    data = path.read_bytes()
    for name, stand_in in raw.items():  # as a program writes it that knows no flag for UTF-8
        data = data.replace(stand_in + b"/1.png", name + b"/1.png")
    path.write_bytes(data)
    assert reading(path, zip_names=option)[2] == tuple(sorted(names))
    if option:
        found = open_input(str(path), "")
        assert len(found.classes) == 2 and "--zip_names" in found.notes[0]


# --- pixels and failures ----------------------------------------------------------------------------------------------


def deep(kind: str) -> bytes:
    values = np.linspace(300, 65535, 64).reshape(8, 8)
    file = io.BytesIO()
    if kind == "float":
        Image.fromarray((values / 65535).astype(np.float32)).save(file, "TIFF")
    elif kind == "tiff16":
        Image.fromarray(values.astype(np.uint16)).save(file, "TIFF")
    elif kind == "pgm16":
        file.write(b"P5 8 8 65535\n" + values.astype(">u2").tobytes())
    else:
        Image.fromarray(values.astype(np.uint16)).save(file, "PNG")
    return file.getvalue()


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
    import errno

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


def test_too_many_open_files_for_real(tmp_path):
    import resource

    dataset = open_dataset(write(tmp_path / "set", ["a/1.png"]), 8)
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    opened = []
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (64, limits[1]))
        with pytest.raises(OSError):
            while True:
                opened.append(os.open(os.devnull, os.O_RDONLY))
        with pytest.raises(UserError, match="Too many open files"):
            dataset[0]
    finally:
        for descriptor in opened:
            os.close(descriptor)
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)


# --- prepare and training ---------------------------------------------------------------------------------------------


def test_prepared_sets_are_what_training_reads(tmp_path):
    from jitjax.prepare import prepare

    sets = {
        "split": {f"Training/{c}/{k}.png": picture(k) for c in "ab" for k in range(2)}
        | {"Testing/a/9.png": PNG, "Training/a/Thumbs.db": ""},
        "table": {**flat(), "labels.csv": "file,label\n0.png,5\n1.png,7\n2.png,5\n3.png,9\n"},
        "deep": {f"a/{k}.png": deep("png16") for k in range(2)} | {"b/1.png": PNG},
    }
    for name, files in sets.items():
        root = write(tmp_path / name, files)
        prepare(str(root), str(tmp_path / f"{name}8"), 8, workers=1, high_depth="range" if name == "deep" else "clip")
        options = {"high_depth": "range"} if name == "deep" else {}
        stored, read = open_dataset(tmp_path / f"{name}8", 8, **options), open_dataset(root, 8, **options)
        assert stored.class_names == read.class_names and len(stored) == len(read)
        for k in range(len(read)):
            assert np.array_equal(stored[k]["image"], read[k]["image"]) and stored[k]["label"] == read[k]["label"]
    with pytest.raises(UserError, match="--high_depth=range, not clip"):
        open_dataset(tmp_path / "deep8", 8)


# --- random trees -----------------------------------------------------------------------------------------------------

TRAIN = ["train", "training", "Train", "seg_train", "trainset", "train_images", "TRAIN", "train2017"]
OTHER = ["test", "val", "dev", "eval", "unlabeled", "valid", "Testing", "val_blurred", "extra", "test_set", "seg_pred"]
CLASSES = ["cat", "dog", "n01440764", "red hat", "Ünï", "0", "1", "10", "b.c", "long-name_7", "devon_rex"]
JUNK = [
    "@eaDir/x.png",
    "$RECYCLE.BIN/S/x.png",
    "lost+found/y.jpg",
    "._z.png",
    ".hidden/x.png",
    "__MACOSX/a/._1.png",
    "Thumbs.db",
]
BESIDE = ["README.md", "notes.txt", "LICENSE", "list.xml"]


def random_tree(draw: random.Random) -> tuple[list[str], list[str], list[int]]:
    """(files, class names, images of each) of a tree with one right reading."""
    classes = sorted(draw.sample(CLASSES, draw.randint(2, 5)))
    counts = [draw.randint(1, 4) for _ in classes]
    wrapper = "".join(f"{draw.choice(['data', 'my set', 'download-main', 'x'])}{k}/" for k in range(draw.randint(0, 3)))
    split = draw.choice(TRAIN) + "/" if draw.random() < 0.6 else ""
    inner = split if split and draw.random() < 0.3 else ""
    root = wrapper + split + inner
    ending = lambda: draw.choice([".png", ".PNG", ".jpg", ".jpeg", ".tif", ".webp", ".JFIF"])  # noqa: E731
    files = []
    for name, count in zip(classes, counts, strict=True):
        deeper = draw.choice(["", "", "", "2020/", "a/b/"])
        files += [f"{root}{name}/{deeper if k else ''}{k}{ending()}" for k in range(count)]
    if split:
        for other in draw.sample(OTHER, draw.randint(0, 2)):
            files += [f"{wrapper}{other}/{name}/{k}{ending()}" for name in classes[:2] for k in range(2)]
    for junk in draw.sample(JUNK, draw.randint(0, 3)):
        files.append(draw.choice(["", wrapper, root, f"{root}{classes[0]}/"]) + junk)
    for beside in draw.sample(BESIDE, draw.randint(0, 2)):
        files.append(draw.choice([wrapper, root, f"{root}{classes[-1]}/"]) + beside)
    return sorted(set(files)), classes, counts


def test_random_trees_have_their_classes_in_every_form(tmp_path):
    for seed in range(150):
        files, classes, counts = random_tree(random.Random(seed))
        root = write(tmp_path / str(seed), files)
        names, labels, found = agreed(root)
        assert found == tuple(classes), (seed, files)
        assert np.bincount(labels).tolist() == counts, (seed, files)


def test_any_tree_is_read_alike_or_refused_alike(tmp_path):
    """Trees without a plan: many have no one reading. None may have a split or a system folder for a class."""
    words = [*CLASSES[:4], *TRAIN[:4], *OTHER[:5], "images", "data", "masks", "annotations", "@eaDir", "bullet_train", ".git"]
    outcomes = {"read": 0, "refused": 0}
    for seed in range(250):
        draw = random.Random(1000 + seed)
        files = set()
        for k in range(draw.randint(1, 9)):
            parts = [draw.choice(words) for _ in range(draw.randint(0, 3))]
            files.add("/".join([*parts, f"{k}{draw.choice(['.png', '.png', '.jpg', '.txt', '.CLS'])}"]))
        root = write(tmp_path / str(seed), dict.fromkeys(sorted(files), PNG))
        answers = []
        for path in (root, zipped(root)):
            try:
                answers.append(reading(path))
            except UserError as error:
                answers.append(str(error).replace(str(path), "").replace("'", ""))
        assert answers[0] == answers[1], (seed, files)
        if isinstance(answers[0], str):
            outcomes["refused"] += 1
        else:
            outcomes["read"] += 1
            assert agreed(root) == answers[0]
            assert not [c for c in answers[0][2] if (s := split_of(c)) and s.sure], (seed, files)
            assert not {"@eaDir", ".git"} & set(answers[0][2])
    assert min(outcomes.values()) > 30, outcomes
