"""Data sets in the forms that people have them in, each with its right reading: the inputs of tests/test_data_rules.py.

`CASES` lists them by the rule that they are for, at least three for each. `random_tree` draws folders.
"""

from __future__ import annotations

import dataclasses
import io
import json
import random
import tarfile
import unicodedata
import zipfile
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

# --- making files -----------------------------------------------------------------------------------------------------

KINDS = {
    **dict.fromkeys((".jpg", ".jpeg", ".jpe", ".jfif"), "JPEG"),
    **dict.fromkeys((".tif", ".tiff"), "TIFF"),
    **dict.fromkeys((".ppm", ".pgm", ".pnm"), "PPM"),
    **dict.fromkeys((".png", ".apng"), "PNG"),
    **dict.fromkeys((".bmp", ".dib"), "BMP"),
    **{".gif": "GIF", ".webp": "WEBP", ".avif": "AVIF", ".jp2": "JPEG2000", ".tga": "TGA", ".pcx": "PCX", ".sgi": "SGI"},
}


def pixels(seed: int) -> np.ndarray:
    """(8, 8, 3) uint8."""
    return np.random.default_rng(seed).integers(0, 256, (8, 8, 3), dtype=np.uint8)


def picture(seed: int, kind: str = "PNG") -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels(seed)).save(file, kind)
    return file.getvalue()


PNG = picture(0)
Files = dict[str, bytes | str]


def pictures(names: Iterable[str]) -> Files:
    """A picture of its own for each name, in the format of its ending; other names hold text, those that end in "/" nothing."""
    return {n: picture(k, KINDS[e]) if (e := Path(n).suffix.lower()) in KINDS else "text" for k, n in enumerate(names)}


def write(root: Path, files: Files | Iterable[str]) -> Path:
    """Writes files; a list holds `pictures`; a name that ends in "/" is an empty folder."""
    root.mkdir(parents=True, exist_ok=True)
    for name, data in (files if isinstance(files, dict) else pictures(files)).items():
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


def tar(files: Files, mode: str = "w") -> bytes:
    target = io.BytesIO()
    with tarfile.open(fileobj=target, mode=mode) as archive:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            data = data.encode() if isinstance(data, str) else data
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return target.getvalue()


def table(count: int = 4, *, first: int = 0, features: dict[str, Any] | None = None, **columns: Any) -> Any:
    """An Arrow table with `count` pictures and these columns."""
    import pyarrow

    images = [{"bytes": picture(first + k), "path": f"{k}.png"} for k in range(count)]
    found = pyarrow.table({"image": images, **columns})
    return found.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})}) if features else found


def parquet(content: Any) -> bytes:
    import pyarrow.parquet

    file = io.BytesIO()
    pyarrow.parquet.write_table(content, file)
    return file.getvalue()


def arrow(content: Any) -> bytes:
    import pyarrow

    file = io.BytesIO()
    with pyarrow.ipc.new_stream(file, content.schema) as writer:
        writer.write_table(content, max_chunksize=3)
    return file.getvalue()


def npz(**arrays: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.savez_compressed(file, **arrays)
    return file.getvalue()


def stack(first: int, count: int) -> np.ndarray:
    return np.stack([pixels(k) for k in range(first, first + count)])


def flat(count: int = 4, root: str = "", first: int = 0) -> Files:
    return {f"{root}{first + k}.png": picture(first + k) for k in range(count)}


def csv(*rows: str) -> str:
    return "".join(f"{row}\n" for row in rows)


def deep(kind: str) -> bytes:
    """A picture of 16 bits or floats whose values, but for a few, clip to white."""
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


def old_zip(encoding: str, names: Sequence[str]) -> bytes:
    """A zip of one picture in each of these folders, as a program writes it that knows no flag for UTF-8."""
    raw = {name.encode(encoding): "xyz"[k].encode() * len(name.encode(encoding)) for k, name in enumerate(names)}
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for k, stand_in in enumerate(raw.values()):
            archive.writestr(f"{stand_in.decode()}/1.png", picture(k))
    data = file.getvalue()
    for name, stand_in in raw.items():
        data = data.replace(stand_in + b"/1.png", name + b"/1.png")
    return data


# --- the cases --------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Case:
    """One input and its right reading.

    files: what lies in the folder that is given, or the one file that is given. labels, classes: the right ones. refused: a
    part of the line that refuses the input instead. says: a part of what is printed. options: of training and `prepare`;
    prepare: of `prepare` alone. seeds: of the pictures in their right order, where they are lossless.
    """

    kind: str
    files: Callable[[], Files]
    labels: Sequence[int] = ()
    classes: Sequence[str] = ()
    refused: str = ""
    says: str = ""
    options: dict[str, Any] = dataclasses.field(default_factory=dict)
    prepare: dict[str, Any] = dataclasses.field(default_factory=dict)
    seeds: Sequence[int] | None = None
    one_file: bool = False
    number: int = 0

    @property
    def id(self) -> str:
        return f"{self.kind} {self.number}"

    def build(self, folder: Path) -> Path:
        files = self.files()
        write(folder, files)
        return folder / next(iter(files)) if self.one_file else folder


CASES: list[Case] = []


def add(kind: str, files: Any, labels: Sequence[int] = (), classes: Sequence[str] = (), **more: Any) -> None:
    """files: a list of names of pictures, a dictionary, or a function that gives the latter."""
    content = files if callable(files) else lambda: files if isinstance(files, dict) else pictures(files)
    number = sum(case.kind == kind for case in CASES) + 1
    CASES.append(Case(kind, content, list(labels), tuple(classes), number=number, **more))


def classes_of(root: str, classes: Iterable[str], count: int = 2, ending: str = ".png") -> list[str]:
    return [f"{root}{c}/{k}{ending}" for c in classes for k in range(count)]


# --- splits

for _train, _other in (
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
    ("Train", "dev"),
    ("training", "extra"),
    ("训练集", "测试集"),
    ("訓練データ", "検証"),
):
    _top = _other.partition("/")[0]
    add("split", [*classes_of(f"{_train}/", "ab", 3), f"{_other}/a/9.png"], [0] * 3 + [1] * 3, "ab", says=f"{_top}/ (1)")
for _folders in (
    ["train", "cat"],
    ["train_a", "train_b"],
    ["val", "test"],
    ["test"],
    ["my_train", "cat"],
    ["trainA", "trainB", "testA"],
):
    _names = [name for folder in _folders for name in classes_of(f"{folder}/", "xyz")]
    add("split in doubt", _names, refused="split=")
    add("split in doubt", _names, [0, 0, 1, 1, 2, 2], "xyz", options={"split": _folders[0]})
    _labels = [k for k, _ in enumerate(_folders) for _ in range(6)]
    add("split in doubt", _names, _labels, sorted(_folders), options={"split": "."})
_names = ["train/a/1.png", "train/b/1.png", "Validation/a/2.png", "Validation/b/2.png", "Validation/b/3.png"]
add("split by option", _names, [0, 1, 1], "ab", options={"split": "val"}, seeds=[2, 3, 4])
add("split by option", _names, [0, 1, 1], "ab", options={"split": "validation"}, seeds=[2, 3, 4])
add("split by option", _names, refused="none called test", options={"split": "test"})
add("split by option", ["a/1.png", "b/1.png"], refused="no split called val", options={"split": "val"})
add("class like a split", classes_of("", ("bullet_train", "test_tube", "cat", "dog")), refused="split=")
_names = classes_of("", ("bullet_train", "cat", "dog"))
add("class like a split", _names, [0, 0, 1, 1, 2, 2], ("bullet_train", "cat", "dog"), says="bullet_train read as a class")
add("class like a split", classes_of("", ("bus", "car", "train")), refused="split=")
_names = classes_of("", ("bus", "car", "train"))
add("class like a split", _names, [0, 0, 1, 1, 2, 2], ("bus", "car", "train"), options={"split": "."})
_classes = ("bus", "car", "train")  # in a split: classes, whatever their names
_names = [*classes_of("train/", _classes), *classes_of("val/", _classes)]
for _split, _seeds in {"": range(6), "train": range(6), "val": range(6, 12)}.items():
    _says = "train read as a class; if it is a split give that folder itself"
    add("classes in a split", _names, [0, 0, 1, 1, 2, 2], _classes, options={"split": _split}, says=_says, seeds=_seeds)
add("classes in a split", _names, [0] * 6 + [1] * 6, ("train", "val"), options={"split": "."})
_names = [*classes_of("train/", ("bus", "dev_board")), *classes_of("val/", ("bus", "dev_board"))]
add("classes in a split", _names, [0, 0, 1, 1], ("bus", "dev_board"), options={"split": "val"}, seeds=range(4, 8))
_nested = ["train/bus/1.png", "train/val/bus/2.png"]
add("classes in a split", _nested, refused="give the folder to be read itself, or the folder train/ itself with .*split=.")
add("classes in a split", [*classes_of("train/train/", "ab"), "train/val/a/1.png"], refused="a split within a split or a class")
_names = [*classes_of("train/", "ab"), "train/a/train/5.png", "train/a/test/6.png", "val/a/7.png"]
add("classes in a split", _names, refused="or give the folder train/ itself with .*split=. to read all of them")
_names = classes_of("", ("bus", "car", "dev_board"))
add("class like a split", _names, refused="no split called val", options={"split": "val"})
add("class like a split", _names, [0, 0], (), options={"split": "dev_board"}, seeds=[4, 5])
_names = classes_of("", ("bullet_train", "bus", "car", "dev_board"))
add("class like a split", _names, refused="choose with .*split=NAME", options={"split": "val"})
_names = [*classes_of("train_images/", "ab"), *classes_of("val_images/", "ab"), "thumbs/1.png"]
add("split by option", _names, [0, 0, 1, 1], "ab", options={"split": "val"}, seeds=range(4, 8))
for _inner in (("train", "test"), ("Training", "Validation"), ("train", "val", "test")):
    _names = [name for c in ("cat", "dog") for name in classes_of(f"{c}/", _inner)]
    add("split below classes", _names, refused="below a class folder|the same folders")
    _labels = [0] * len(_names[::2]) + [1] * len(_names[::2])
    add("split below classes", _names, _labels, ("cat", "dog"), options={"split": "."})

# folders that are neither classes nor known splits
for _tops in (("fold1", "fold2", "fold3"), ("art", "clipart", "photo"), ("entrenamiento", "prueba"), ("A_part", "B_part")):
    _names = [name for top in _tops for name in classes_of(f"{top}/", ("cat", "dog", "emu"))]
    add("the same folders in each", _names, refused="labels=folders")
    _labels = [k for k, _ in enumerate(_tops) for _ in range(6)]
    add("the same folders in each", _names, _labels, sorted(_tops), options={"labels": "folders"})
_files = {**flat(2, "images/"), **flat(2, "thumbnails/"), "labels.csv": csv("file,label", "0.png,a", "1.png,b")}
add("folder without a class's name", _files, refused="images/ beside thumbnails has no name of a class.*labels=folders")
add("folder without a class's name", _files, [0, 0, 1, 1], ("images", "thumbnails"), options={"labels": "folders"})
add("folder without a class's name", classes_of("", ("data", "old", "x")), refused="data/ beside old, x has no name")
add("folder without a class's name", classes_of("train/", ("img", "imgs_small")), refused="img/ beside imgs_small has no name")
for _tops in (("images_001", "images_002"), ("part1", "part2", "part10"), ("HAM10000_images_part_1", "HAM10000_images_part_2")):
    _names = [f"{top}/{top}{k}.png" for top in _tops for k in range(2)]
    add("numbered parts", _names, refused="numbered parts.*labels=folders")
    add("numbered parts", _names, [0] * len(_names), (), options={"labels": "none"})
_names = {f"images_{k}/{k}{c}.png": picture(k) for k in (1, 2) for c in "ab"}
add("numbered parts", {**_names, "labels.csv": csv("id,label", "1a,x", "1b,y", "2a,x", "2b,y")}, [0, 1, 0, 1], "xy")
_names = classes_of("", ("class_1", "class_2")) + classes_of("", ("s1", "s2"))
add("numbered classes", _names, [0, 0, 1, 1, 2, 2, 3, 3], ("class_1", "class_2", "s1", "s2"))
add("numbered classes", classes_of("", "0123"), [0, 0, 1, 1, 2, 2, 3, 3], "0123")
add("numbered classes", classes_of("", ("00000", "00001")), [0, 0, 1, 1], ("00000", "00001"))

# --- wrappers, system files, endings

for _names in (
    ["animals-main/cat/1.png", "animals-main/dog/1.png"],
    ["a/b/c/cat/1.png", "a/b/c/dog/1.png"],
    ["download/README.md", "download/data/train/cat/1.png", "download/data/train/dog/1.png", "download/data/test/cat/2.png"],
    ["ILSVRC/Data/CLS-LOC/train/cat/1.png", "ILSVRC/Data/CLS-LOC/train/dog/1.png", "ILSVRC/Data/CLS-LOC/val/9.png"],
    ["photos/cat/1.png", "photos/dog/1.png", "annotations/list.xml", "docs/readme.txt"],
):
    add("wrapper", _names, [0, 1], ("cat", "dog"))
_names = classes_of("download/set/", ("cat", "dog", "train"))
add("class or wrapper", _names, refused="split=. if every folder is a class")
add("class or wrapper", _names, [0, 0, 1, 1, 2, 2], ("cat", "dog", "train"), options={"split": "."})
_names = ["animals/1.png", "animals/cat/2.png", "animals/dog/3.png"]
add("class or wrapper", _names, [0, 0, 0], ("animals",), options={"split": "."})
add("class or wrapper", ["animals/1.png", "animals/cat/2.png", "animals/dog/3.png"], refused="both images and folders")
add("class or wrapper", ["images/1.png", "images/2.png", "masks/1.png", "masks/2.png"], refused="may be masks")
add("class or wrapper", ["cats/1.png", "cats/2.png"], [0, 0], ("cats",))
add("class or wrapper", ["images/1.png", "images/2.png"], [0, 0], ())
add("empty class", ["cat/1.png", "dog/", "emu/2.png"], refused="'dog'.*holds no image;")
add("empty class", ["cat/1.png", "dog/1.heic", "dog/2.heic", "emu/2.png"], refused="'dog'.*holds no image but 2 .heic")
add("empty class", ["cat/1.png", "dog/Thumbs.db", "emu/2.png"], refused="'dog'.*holds no image;")
for _junk in (
    ["@eaDir/x.png", "a/#recycle/1.png", "lost+found/"],
    ["$RECYCLE.BIN/S-1/x.png", "System Volume Information/y.png", "a/Thumbs.db"],
    ["__MACOSX/a/._1.png", "a/._1.png", ".ipynb_checkpoints/1-checkpoint.png", "b/.DS_Store"],
    ["a/.ipynb_checkpoints/1.png", "b/@eaDir/1.png/SYNOPHOTO_THUMB_M.jpg", "desktop.ini"],
):
    add("system files", ["a/1.png", "b/1.png", *_junk], [0, 1], "ab", says="left alone: 1 ", seeds=[0, 1])
add("endings", ["a/1.jfif", "b/2.JPE", "a/3.TIF", "b/4.tiff"], [0, 0, 1, 1], "ab")
add("endings", ["a/1.DIB", "b/2.apng", "a/3.AVIF", "b/4.gif"], [0, 0, 1, 1], "ab")
add("endings", ["a/1.ppm", "a/2.WebP", "b/1.JPeG"], [0, 0, 1], "ab")
_names = ["a/1.png", "b/1.png", "a/x.txt", "a/y.txt", "b/z.MOV", "b/w.jp2"]
add("passed over", _names, [0, 1], "ab", says="left alone: 1 .jp2, 1 .mov, 2 .txt")
add("passed over", ["a/1.png", "a/2.heic", "b/1.png", "b/2.HEIC"], [0, 1], "ab", says="left alone: 2 .heic")
add("passed over", ["a/1.png", "b/1.png", "b/raw"], [0, 1], "ab", says="left alone: 1 no ending")
for _ending in (".jp2", ".tga", ".pcx", ".sgi"):
    _names = ["a/1.png", f"a/2{_ending}", "b/1.png"]
    add("all formats", _names, [0, 0, 1], "ab", options={"all_formats": True})
    add("all formats", _names, [0, 1], "ab", says=f"1 {_ending}")

# --- labels beside the images


_rows = ["0.png,dog", "1.png,cat", "2.png,dog", "3.png,cat"]
add("metadata.csv", {**flat(), "metadata.csv": csv("file_name,label", *_rows)}, [1, 0, 1, 0], ("cat", "dog"))
add("metadata.csv", {**flat(4, "train/"), "train/metadata.csv": csv("file_name,label", *_rows)}, [1, 0, 1, 0], ("cat", "dog"))
_rows = ["file_name,x,y,w,h,class", *(f"images/{k}.png,{k},2,3,4,{'uv'[k % 2]}" for k in range(4))]
add("metadata.csv", {**flat(4, "images/"), "metadata.csv": csv(*_rows)}, [0, 1, 0, 1], "uv")
_lines = [json.dumps({"file_name": f"{k}.png", "label": k % 2}) for k in range(4)]
add("metadata.jsonl", {**flat(), "metadata.jsonl": csv(*_lines)}, [0, 1, 0, 1], "01")
_lines = [json.dumps({"text": "a hat", "file_name": f"train/{k}.png", "category": "ab"[k // 2]}) for k in range(4)]
add("metadata.jsonl", {**flat(4, "train/"), "metadata.jsonl": csv(*_lines)}, [0, 0, 1, 1], "ab")
_lines = [json.dumps({"file_name": f"{k}.png", "class": [k]}) for k in range(4)]
add("metadata.jsonl", {**flat(), "metadata.jsonl": csv(*_lines)}, [0, 1, 2, 3], "0123")
add("labels.csv", {**flat(), "labels.csv": csv("id;breed", "0;x", "1;y", "2;x", "3;z")}, [0, 1, 0, 2], "xyz")
_text = "\ufefffilename,target\r\n./0.png,10\r\n./1.png,20\r\n./2.png,10\r\n./3.png,5\r\n"
add("labels.csv", {**flat(), "labels.csv": _text}, [1, 2, 1, 0], ("5", "10", "20"), says="5 is class 0, 10 is class 1")
_text = csv("nr,class,image_file", "1,b,3.png", "2,a,1.png", "3,b,0.png", "0,a,2.png")  # the first column names images too
add("labels.csv", {**flat(), "labels.csv": _text}, [1, 0, 0, 1], "ab")
_text = 'file, label\n0.png, "x"\n1.png, y\n2.png, "y"\n3.png, x\n'
add("labels.csv", {**flat(), "labels.csv": _text}, [0, 1, 1, 0], "xy")
_text = csv('file;"label, of the, image, now"', "0.png;x", "1.png;y", "2.png;y", "3.png;x")
add("labels.csv", {**flat(), "labels.csv": _text}, [0, 1, 1, 0], "xy", options={"labels": "labels.csv"})
_text = csv("file,label", "0.png,x", "1.png,y", "2.png,y", "3.png,x").replace("\n", "\r")
add("labels.csv", {**flat(), "labels.csv": _text}, [0, 1, 1, 0], "xy")
_lines = [json.dumps({"file_name": f"{k}.png", "label": "a\u2028b" if k else "c"}, ensure_ascii=False) for k in range(4)]
add("metadata.jsonl", {**flat(), "metadata.jsonl": csv(*_lines)}, [1, 0, 0, 0], ("a\u2028b", "c"))
_text = '{"0.png": "x", "1.png": "y", "0.png": "y"}'
add(
    "conflicting labels", {**flat(2), "labels.json": _text}, refused="gives 0.png two values", options={"labels": "labels.json"}
)
add(
    "labels.csv",
    {**flat(), "labels.csv": csv("label", "x", "y", "y", "x")},
    [0] * 4,
    says="labels.csv names none of the images",
)
_jpegs = {f"{k}.jpg": picture(k, "JPEG") for k in range(3)}  # converted: the table names what they were
_text = csv("index,file_name,label", "0,2.png,a", "1,1.png,b", "2,0.png,c")
_says = "labels: labels.csv, column label, files by column file_name"
add("labels.csv", {**_jpegs, "labels.csv": _text}, [2, 1, 0], "abc", says=_says)
add("labels.csv", {**_jpegs, "labels.csv": _text.replace("file_name", "photo")}, [2, 1, 0], "abc", says="by column photo")
_text = csv("file,label", "0.png,a", "0.bmp,b", "1.png,a", "2.png,a")
add("labels.csv", {**_jpegs, "labels.csv": _text}, refused="no label for 1 of 3 images .such as 0.jpg")
_text = csv("name,age,label", "x.png,2,a", "y.png,1,b", "z.png,0,c")
add("labels.csv", {**flat(3), "labels.csv": _text}, [0] * 3, says="labels.csv names none of the images")
add("labels.csv", {**flat(2), "labels.csv": csv("id\tpath\tClassName", "1\t0.png\tu", "0\t1.png\tv")}, [0, 1], "uv")
_text = csv("image\tlabel", "0.png\tü", "1.png\tö").encode("utf-16")
add("labels.csv", {**flat(2), "labels.tsv": _text}, [1, 0], "öü")
_apart = {f"{unicodedata.normalize('NFD', 'é')}{k}.png": picture(k) for k in range(2)}  # as macOS stores names
add("labels.csv", {**_apart, "labels.csv": csv("file,label", "é0.png,p", "é1.png,q")}, [0, 1], "pq")
_rows = [f"{k},{'ab'[k % 2]}" for k in range(4)]
add("train.csv", {**flat(4, "train/"), **flat(2, "test/", 7), "train.csv": csv("id,label", *_rows)}, [0, 1, 0, 1], "ab")
add("train.csv", {**flat(4, "train/"), "trainLabels.csv": csv("image,level", *_rows)}, [0, 1, 0, 1], "ab")
add("train.csv", {**flat(), "train_labels.csv": csv("id,label", *_rows), "test_labels.csv": "id,label\n"}, [0, 1, 0, 1], "ab")
_labels = json.dumps({"labels": [[f"{k}.png", 3 - k] for k in range(4)]})
add("dataset.json", {**flat(), "dataset.json": _labels}, [3, 2, 1, 0], "0123")
for _buckets in (("00000", "00001"), ("00000",), ("00000", "00001", "00007")):
    _names = [f"{bucket}/img{k}{bucket}.png" for bucket in _buckets for k in range(3)]
    _labels = json.dumps({"labels": [[f, i % 2] for i, f in enumerate(_names)]})
    add("dataset.json", {**pictures(_names), "dataset.json": _labels}, [i % 2 for i in range(len(_names))], "01")
    add("dataset.json", {**pictures(_names), "dataset.json": '{"labels": null}'}, [0] * len(_names))
_names = [f"{k // 2:05d}/img{k // 2:05d}{k % 2:03d}.png" for k in range(4)]
add("dataset.json", _names, refused="dataset.json is not there.*labels=folders")
_files = {**flat(), "dataset.json": json.dumps({"labels": {f"{k}.png": "ba"[k % 2] for k in range(4)}})}
add("dataset.json", _files, [1, 0, 1, 0], "ab")
add(".cls", {**flat(), **{f"{k}.cls": str(k % 3) for k in range(4)}}, [0, 1, 2, 0], "012")
_files = {**flat(4, "train/"), **{f"train/{k}.cls": f"{'ba'[k % 2]}\n" for k in range(4)}, "val/9.png": PNG, "val/9.cls": "c"}
add(".cls", _files, [1, 0, 1, 0], "ab")
_marked = {f"{k}.cls": f"\ufeff{k}" for k in range(12)}  # with a byte order mark; sorted as numbers
add(".cls", {**flat(12), **_marked}, [0, 1, 10, 11, 2, 3, 4, 5, 6, 7, 8, 9], map(str, range(12)))
_files = {f"x.{k}.png": picture(k) for k in range(3)} | {f"x.{k}.CLS": str(k) for k in range(3)}  # more dots than one
add(".cls", _files, [0, 1, 2], "012", seeds=[0, 1, 2])
add(".cls", {**flat(), "0.cls": "1"}, refused="3 of 4 images have no label")
_json = {f"{k}.json": json.dumps({"caption": "x", "label": "ab"[k % 2]}) for k in range(4)}
add(".json", {**flat(), **_json}, [0, 1, 0, 1], "ab")
add(".json", {**flat(), **{name: f"\ufeff{text}" for name, text in _json.items()}}, [0, 1, 0, 1], "ab")
_json = {f"{k}.json": json.dumps({"y": k, "class_name": f"{9 - k}"}) for k in range(4)}
add(".json", {**flat(), **_json}, [0, 1, 2, 3], "0123")
_json = {f"s/{k}.json": json.dumps({"targets": k * 10}) for k in range(4)}
add(".json", {**flat(4, "s/"), **_json}, [0, 1, 2, 3], ("0", "10", "20", "30"), options={"split": "."})
_json = {f"{k}.json": json.dumps({"label": k % 2, "class": k // 2}) for k in range(4)}
add(".json", {**flat(), **_json}, refused="different labels in the columns label, class")
add(".json", {**flat(), **_json}, [0, 0, 1, 1], "01", options={"labels": "json:class"})
_json = {f"{k}.json": json.dumps({"label": k % 2} if k else {"class": 1, "label": 0}) for k in range(4)}
add(".json", {**flat(), **_json}, refused="different labels|have no label")

# a table above the folder of the split that is read
_rows = [f"train/{k}.png,{'ab'[k % 2]}" for k in range(4)]
_two = {**flat(4, "train/"), **flat(2, "test/", 8)}
for _name, _text in {
    "metadata.csv": csv("file_name,label", *_rows, "test/8.png,a", "test/9.png,c"),
    "labels.csv": csv("file,label", *(row.removeprefix("train/") for row in _rows)),
    "annotations.csv": csv("image,category", *_rows, "test/9.png,a"),
    "metadata.jsonl": csv(*(json.dumps({"file_name": f"train/{k}.png", "label": "ab"[k % 2]}) for k in range(4))),
}.items():
    add("table above a split", {**_two, _name: _text}, [0, 1, 0, 1], "ab", seeds=range(4))
_same = {**flat(2, "train/"), **flat(2, "test/")}
_text = csv("file,label", "0.png,a", "1.png,b")  # of which split?
add("table above a split", {**_same, "labels.csv": _text}, refused="test/ holds images of the same names")
add("table above a split", {**_same, "labels.csv": _text}, [0, 1], "ab", options={"labels": "labels.csv"})
add("table above a split", {**_same, "trainLabels.csv": _text}, [0, 1], "ab")
_text = csv("file,label", "train/0.png,a", "train/1.png,b")
add("table above a split", {**_same, "labels.csv": _text}, [0, 1], "ab")
_text = csv("file,label", "test/8.png,a", "test/9.png,b")
add("table above a split", {**_two, "labels.csv": _text}, [0] * 4, says="labels.csv names none of the images")
add("table above a split", {**_two, "labels.csv": csv("file,label", *_rows[:3])}, refused="no label for 1 of 4 images")
_above = {f"wrap/{name}": data for name, data in _two.items()}
add("table above a split", {**_above, "wrap/labels.csv": csv("file,label", *_rows)}, [0, 1, 0, 1], "ab")
add("table above a split", {**_above, "labels.csv": csv("file,label", *(f"wrap/{r}" for r in _rows))}, [0, 1, 0, 1], "ab")
_text = csv("file,label", *_rows, "test/8.png,b", "test/9.png,a")
add("table above a split", {**_two, "labels.csv": _text}, [1, 0], "ab", options={"split": "test"}, seeds=[8, 9])

# tables that disagree, and such that agree
_folders = pictures([f"{c}/{k}{c}.png" for c in "ab" for k in range(2)])
_mixed = csv("file,label", "0a.png,x", "1a.png,y", "0b.png,x", "1b.png,y")
_alike = csv("file,label", "0a.png,x", "1a.png,x", "0b.png,y", "1b.png,y")
add("conflicting labels", {**_folders, "labels.csv": _mixed}, refused="differ from its 2 class folders")
add("conflicting labels", {**_folders, "labels.csv": _mixed}, [0, 0, 1, 1], "ab", options={"labels": "folders"})
add("conflicting labels", {**_folders, "labels.csv": _mixed}, [0, 1, 0, 1], "xy", options={"labels": "labels.csv"})
_one = csv("file_name,label", "0.png,u", "1.png,v", "2.png,u", "3.png,v")
_other = csv("file,class", "0.png,u", "1.png,u", "2.png,v", "3.png,v")
_conflict = {**flat(), "metadata.csv": _one, "labels.csv": _other}
add("conflicting labels", _conflict, refused="different labels in labels.csv, column class and metadata.csv, column label")
add("conflicting labels", _conflict, [0, 1, 0, 1], "uv", options={"labels": "metadata.csv"})
_conflict = {**flat(4, "train/"), "train/metadata.csv": _one, "labels.csv": _other}
add("conflicting labels", _conflict, refused="different labels in labels.csv.*metadata.csv")
add("conflicting labels", _conflict, [0, 0, 1, 1], "uv", options={"labels": "labels.csv"})
add(
    "conflicting labels",
    {**flat(), **{f"{k}.cls": str(k // 2) for k in range(4)}, "labels.csv": _one},
    refused="labels in .cls",
)
_cls = {f"{k}.cls": str(k % 2) for k in range(4)}
_both = _cls | {f"{k}.json": json.dumps({"label": k // 2}) for k in range(4)}
add("conflicting labels", {**flat(), **_both}, refused="different labels in .cls files and .json files")
_text = csv("file,label,class", "0.png,x,u", "1.png,x,v")
add("conflicting labels", {**flat(2), "labels.csv": _text}, refused="different labels in the columns label, class")
add("conflicting labels", {**flat(2), "labels.csv": _text}, [0, 1], "uv", options={"labels": "labels.csv:class"})
_text = csv("file,label", "0.png,x", "0.png,y", "1.png,x")
add("conflicting labels", {**flat(2), "labels.csv": _text}, refused="gives 0.png two labels")
_text = csv("file,label", "0.png,x", "./0.png,y", "1.png,x")
add("conflicting labels", {**flat(2), "labels.csv": _text}, refused="gives ./0.png two labels, 'x' and 'y'")
_crossed = csv("file,label", "0a.png,b", "1a.png,b", "0b.png,a", "1b.png,a")  # the same classes by exchanged names
add("conflicting labels", {**_folders, "labels.csv": _crossed}, refused="differ from its 2 class folders")
_conflict = {**flat(), "metadata.csv": _one, "labels.csv": csv("file,class", "0.png,v", "1.png,u", "2.png,v", "3.png,u")}
add("conflicting labels", _conflict, refused="different labels in labels.csv.*metadata.csv")
_text = csv("file,label", "1/0.png,0", "2/1.png,1", "2/2.png,1")  # counted from 0, the folders from 1
add("agreeing labels", {**pictures(["1/0.png", "2/1.png", "2/2.png"]), "labels.csv": _text}, [0, 1, 1], "12")
_text = csv("file,label", "0/0.png,1", "1/1.png,0", "1/2.png,0")
add(
    "conflicting labels",
    {**pictures(["0/0.png", "1/1.png", "1/2.png"]), "labels.csv": _text},
    refused="differ from its 2 class",
)
add("agreeing labels", {**_folders, "labels.csv": _alike}, [0, 0, 1, 1], "ab", says="^(?!.*labels: ,)")
add("agreeing labels", {**flat(), "metadata.csv": _one, "labels.csv": _one.replace("u", "7")}, [0, 1, 0, 1], "7v")
_both = _cls | {f"{k}.json": json.dumps({"label": k % 2}) for k in range(4)}
add("agreeing labels", {**flat(), **_both}, [0, 1, 0, 1], "01")
for _labels in (["a", "b", "a"], [0, 1, 1]):  # the table calls its classes as the folders are called
    _names = [f"class_{name}/{k}.png" for k, name in enumerate(_labels)]
    _text = csv("file_name,label", *(f"{name},{name.partition('/')[0]}" for name in _names))
    _classes = sorted({f"class_{name}" for name in _labels})
    add(
        "agreeing labels", {**pictures(_names), "labels.csv": _text}, sorted(map(sorted(set(_labels)).index, _labels)), _classes
    )
add("incomplete labels", {**flat(), "labels.csv": csv("file,label", "0.png,x", "1.png,x")}, refused="no label for 2 of 4")
add("incomplete labels", {**flat(2), "labels.csv": csv("file,label", "0.png,", "1.png,3")}, refused="not a class number")
add("incomplete labels", {**flat(2), "labels.csv": csv("file,label", "0.png,a", "1.png,")}, refused="row 1.png: an empty label")
_text = csv("file,label", *(f"{k}.png,{'abc'[k // 2]}" for k in range(6)))
_says = "2 of 6 rows of labels.csv name no image that is read; no image is of class c"
add("incomplete labels", {**flat(), "labels.csv": _text}, [0, 0, 1, 1], "ab", says=_says)
add("incomplete labels", {**flat(2), "labels.csv": csv("file,label", "0.png,0.5", "1.png,1")}, refused="not a class number|two")
_files = {**_folders, "a/0a.json": '{"label": 1}', "b/0b.json": '{"label": 2}'}
add("incomplete labels", _files, refused="2 of 4 images have no label in a .json file")
_text = csv("file_name,text", "0.png,a red hat", "1.png,a blue hat")
add("labels not read", {**flat(2), "metadata.csv": _text}, [0, 0], says="known to hold labels (file_name, text)")
_labels = {"labels": "metadata.csv:text"}
add("labels not read", {**flat(2), "metadata.csv": _text}, [1, 0], ("a blue hat", "a red hat"), options=_labels)
add("labels not read", {**flat(2), "0.txt": "a hat", "1.txt": "a cat"}, [0, 0], says="2 .txt")
add("labels not read", {**flat(2), "list.txt": csv("0.png 1", "1.png 0")}, [0, 0], says="not read: list.txt")
add(
    "labels not read",
    {**flat(2, "imgs/"), "driver_list.csv": csv("img,c", "0.png,3")},
    [0, 0],
    says="not read: driver_list.csv",
)
add("labels not read", {**flat(2), "labels.csv": csv("file,label", "0.png,-1", "1.png,-1")}, [0, 0], says="no label, only")
add(
    "labels not read",
    {**flat(2), **{f"{k}.json": '{"text": "x"}' for k in range(2)}},
    [0, 0],
    says="no field known for labels (text)",
)
_beside = {**flat(2, "images/"), "annotations/classes.csv": csv("file,label", "0.png,b", "1.png,a")}
add("labels not read", _beside, [0, 0], says="not read: annotations/classes.csv")
add("labels not read", _beside, [1, 0], "ab", options={"labels": "annotations/classes.csv"})
add(
    "labels not read",
    {**flat(2), "labels.csv": ""},
    [0, 0],
    says="labels.csv has no column that is known to hold labels (it is",
)
add("damaged tables", {**flat(2), "labels.csv": csv("0.png,a", "1.png,b")}, refused="the first line is no header")
add(
    "damaged tables",
    {**flat(2), "metadata.jsonl": '{"file_name": "0.png", "label": 1}\n{"file'},
    refused="cannot be read as a table",
)
add("damaged tables", {**flat(2), "labels.csv": "file,label\n0.png,é\n".encode("latin1")}, refused="cannot be read as a table")
add("damaged tables", {**flat(2), **{f"{k}.json": "[" * 100_000 for k in range(2)}}, refused="no label that can be read")
_json = json.dumps({"0.png": "b", "1.png": "a"})
add("labels not read", {**flat(2), "labels.json": _json}, [0, 0], says="not read: labels.json")
add("labels not read", {**flat(2), "labels.json": _json}, [1, 0], "ab", options={"labels": "labels.json"})
for _values, _labels, _classes in (
    ([1, 2, 3, 1], [0, 1, 2, 0], ("1", "2", "3")),
    ([0.0, 2.0, 4.0, 2.0], [0, 1, 2, 1], ("0", "2", "4")),
    (["True", "False", "True", "True"], [1, 0, 1, 1], ("False", "True")),
    (["010", "2", "010", "10"], [0, 2, 0, 1], ("010", "10", "2")),  # names, not numbers
):
    _text = csv("file,label", *(f"{k}.png,{value}" for k, value in enumerate(_values)))
    add("numbers in tables", {**flat(), "labels.csv": _text}, _labels, _classes)
_text = csv("file,label", "0.png,Cat", "1.png,cat", "2.png,dog", "3.png,dog")
add("names alike", {**flat(), "labels.csv": _text}, [0, 1, 2, 2], ("Cat", "cat", "dog"), says="almost the same name")
add("names alike", ["red hat/1.png", "Red  Hat/2.png"], [0, 1], ("Red  Hat", "red hat"), says="almost the same", seeds=[1, 0])
_names = [f"{unicodedata.normalize(form, 'é')}/1.png" for form in ("NFC", "NFD")]
add("names alike", _names, [0, 1], sorted(Path(name).parent.name for name in _names), says="almost the same name")
_rows = ["0.png,x,train", "1.png,y,train", "2.png,x,test", "3.png,y,val"]
_split = {**flat(), "labels.csv": csv("file,label,split", *_rows)}
add("split column of a table", _split, [0, 1], "xy", says="left alone: split test (1), split val (1)", seeds=[0, 1])
add("split column of a table", _split, [1], "xy", options={"split": "val"}, seeds=[3])
add("split column of a table", _split, [0, 1, 0, 1], "xy", options={"split": "."})
add("split column of a table", _split, refused="none called extra", options={"split": "extra"})
_rows = ["0a.png,Train", "1a.png,Test", "0b.png,Train", "1b.png,Test"]
_split = {**_folders, "metadata.csv": csv("file_name,Subset", *_rows)}
add("split column of a table", _split, [0, 1], "ab", says="left alone: split Test (2)", seeds=[0, 2])
_rows = ["a/0a.png,q,test", "a/1a.png,q,test", "b/0b.png,p,test", "b/1b.png,p,test"]
add("split column of a table", {**_folders, "labels.csv": csv("file,label,split", *_rows)}, refused="none for training")

_rows = ["0.png,5,train", "1.png,7,val", "2.png,9,train", "3.png,7,val"]
_split = {**flat(), "labels.csv": csv("file,label,split", *_rows)}  # the numbers of a class are the same in every split
add("split column of a table", _split, [0, 2], "579", says="1 of 3 classes have no image in this split", seeds=[0, 2])
add("split column of a table", _split, [1, 1], "579", options={"split": "val"}, seeds=[1, 3])
_rows = ["0.png,x,train", "1.png,,test", "2.png,y,train", "3.png,,test"]  # no labels but for training
add("split column of a table", {**flat(), "labels.csv": csv("file,label,split", *_rows)}, [0, 1], "xy", seeds=[0, 2])
_rows = ["0.png,x,1", "1.png,y,0"]
add("labels not read", {**flat(2), "labels.csv": csv("file,label,is_train", *_rows)}, [0, 1], "xy", says="not read: is_train")
add("conflicting labels", {**flat(2), "labels.csv": csv("file,label,label", *_rows)}, refused="two columns are called 'label'")

# --- Parquet and Arrow


def one(**columns: Any) -> Callable[[], Files]:
    return lambda: {"0000.parquet": parquet(table(**columns))}


for _column, _labels, _classes in (
    ({"category": ["b", "a", "b", "a"]}, [1, 0, 1, 0], "ab"),
    ({"class_id": [7, 3, 7, 9]}, [1, 0, 1, 2], "379"),
    ({"label": [[1], [0], [1], [0]]}, [1, 0, 1, 0], "01"),
    ({"fine_label": [0, 1, 2, 3], "coarse_label": [0, 0, 1, 1]}, [0, 1, 2, 3], "0123"),
    ({"label": [1, 0, 1, 0], "label_name": ["x", "y", "x", "y"]}, [1, 0, 1, 0], "01"),
    ({"labels": [1, 0, 1, 0]}, [1, 0, 1, 0], "01"),
    ({"Class Name": ["x", "y", "x", "y"], "width": [1, 2, 3, 4]}, [0, 1, 0, 1], "xy"),
):
    add("parquet column names", one(**_column), _labels, _classes, seeds=range(4))
add("parquet column names", one(**_column), [0, 0, 0, 0], (), prepare={"labels": "none"})
add("parquet column names", one(kind=list("baba"), label=[0, 0, 1, 1]), [1, 0, 1, 0], "ab", prepare={"label_column": "kind"})
for _values in ([2.0, 1.0, 0.0, 1.0], [3.0, 2.0, 1.0, 2.0], np.array([2, 1, 0, 1], np.float16)):
    add("parquet floats", one(y=_values), [2, 1, 0, 1], sorted({f"{v:g}" for v in _values}))
for _name, _values in {"targets": [True, True, False, True], "label": [False, True, True, False], "y": [True] * 4}.items():
    _classes = sorted({str(int(v)) for v in _values})
    add("parquet booleans", one(**{_name: _values}), [_classes.index(str(int(v))) for v in _values], _classes)
for _values in (["ü", "a", "ü", "b"], ["10", "9", "10", "9"], ["n02", "n01", "n02", "n01"]):
    add("parquet strings", one(species=_values), [sorted(set(_values)).index(v) for v in _values], sorted(set(_values)))
for _names, _values, _labels, _says in (
    (["cat", "dog", "emu"], [2, 0, 1, 2], [2, 0, 1, 2], ""),
    (["zebra", "ant"], [0, 1, 1, 0], [0, 1, 1, 0], ""),
    (["a", "b", "c", "d"], [3, 0, 0, 3], [3, 0, 0, 3], "2 of 4 declared classes have no image"),
    (["y", "x"], ["x", "y", "x", "y"], [1, 0, 1, 0], ""),  # strings in the order that was declared
):
    _features = {"image": {"_type": "Image"}, "kind": {"_type": "ClassLabel", "names": _names}}
    add("ClassLabel", one(features=_features, kind=_values), _labels, _names, says=_says)
for _values, _labels, _says in (
    ([1, 2, 3, 1], [0, 1, 2, 0], "1 is class 0, 2 is class 1, 3 is class 2"),
    ([5, 1000000, 7, 5], [0, 2, 1, 0], "1000000 is class 2"),
    ([2, 2, 4, 4], [0, 0, 1, 1], "not numbered 0..1"),
):
    add("parquet numbers", one(label=_values), _labels, map(str, sorted(set(_values))), says=_says)
add("parquet labels not read", one(width=[1, 2, 3, 4], text=list("abcd")), [0] * 4, says="(width, text)")
add("parquet labels not read", one(width=[1, 2, 3, 4], text=list("abcd")), range(4), "abcd", prepare={"labels": "text"})
add("parquet labels not read", one(label=[-1] * 4), [0] * 4, says="no label, only empty values or -1")
add("parquet labels not read", one(label=[None] * 4), [0] * 4, says="only empty values or -1|no column is known")
add("parquet in doubt", one(label=[0, 1, 0, 1], target=[0, 0, 1, 1]), refused="different labels")
add("parquet in doubt", one(label=[0, 1, None, 1]), refused="not a class number")
for _doubled in ("label", "image"):
    _twice = table(label=[0, 1, 0, 1], note=["a", "b", "c", "d"]).rename_columns(["image", "label", _doubled])
    add("parquet in doubt", {"x.parquet": parquet(_twice)}, refused=f"x.parquet has several columns called {_doubled}: rename")
add("parquet in doubt", one(label=["a", "b", "", "a"]), refused="row 2: an empty label")
_rows = {"label": ["a", "b", "", "a"], "split": ["train", "test", "train", "train"]}
add("parquet in doubt", one(**_rows), refused="row 2: an empty label")
add("parquet in doubt", one(**_rows), [1], "ab", prepare={"split": "test"})
add("parquet in doubt", one(label=[0, 0.5, 1, 1]), refused="not a class number")
add("parquet in doubt", one(label=[[0, 1], [1], [0], [1]]), refused="not a class number")
_some = lambda: {"0.parquet": parquet(table(label=[0, 1, 0, 1])), "1.parquet": parquet(table())}  # noqa: E731
add("parquet in doubt", _some, refused="only some of its files have the column 'label'")
add("parquet in doubt", _some, [0] * 8, (), prepare={"labels": "none"})
_named = lambda names: table(label=[0, 1, 0, 1], features={"label": {"_type": "ClassLabel", "names": names}})  # noqa: E731
add(
    "parquet in doubt",
    lambda: {"0.parquet": parquet(_named(["a", "b"])), "1.parquet": parquet(_named(["b", "a"]))},
    refused="name",
)
_splits = {"label": [0, 1, 2, 0], "split": ["train", "test", "train", "test"]}
add("split column of parquet", one(**_splits), [0, 2], "012", says="left alone: split test (2)", seeds=[0, 2])
add("split column of parquet", one(**_splits), [1, 0], "012", prepare={"split": "test"}, seeds=[1, 3])
add("split column of parquet", one(**_splits), [0, 1, 2, 0], "012", prepare={"split": "."}, seeds=range(4))
add("split column of parquet", one(label=[0, 1, 2, 0]), refused="no split called test", prepare={"split": "test"})
_rows = {"label": [9, 7, 5, 7], "split": ["train", "val", "train", "val"]}
add("split column of parquet", one(**_rows), [2, 0], "579", says="1 of 3 classes have no image in this split", seeds=[0, 2])
_train = lambda: {"data/train-00000-of-00001.parquet": parquet(table(**_splits))}  # noqa: E731
add("split column of parquet", _train, [0, 2], "012", seeds=[0, 2])
_one = lambda: {"x.parquet": parquet(table(**_splits))}  # noqa: E731
add("split column of parquet", _one, [1, 0], "012", prepare={"split": "test"}, seeds=[1, 3], one_file=True)


def drift(*others: Callable[[Any, Any], dict[str, Any]]) -> Callable[[], Files]:
    """Files whose columns (pyarrow, image column -> columns) differ, the first as `table` makes it."""

    def files() -> Files:
        import pyarrow

        first = table(label=pyarrow.array([0, 1, 2, 0], pyarrow.int64()))
        tables = [first, *(pyarrow.table(other(pyarrow, first.column("image"))) for other in others)]
        return {f"{k:04d}.parquet": parquet(content) for k, content in enumerate(tables)}

    return files


_images = [picture(k) for k in range(4)]
_label = [0, 1, 2, 0]
for _change in (
    lambda pa, image: {"image": image, "label": pa.array(_label, pa.int32())},
    lambda pa, image: {"image": image, "label": pa.array(_label, pa.uint8())},
    lambda pa, image: {"label": pa.array(_label, pa.int16()), "image": image},
    lambda pa, image: {"image": [{"path": "x", "bytes": data} for data in _images], "label": _label},
    lambda pa, image: {"image": pa.array(_images, pa.binary()), "label": _label},
    lambda pa, image: {"image": pa.array(_images, pa.large_binary()), "label": pa.array([0.0, 1, 2, 0])},
    lambda pa, image: {"image": pa.array(_images, pa.binary_view()), "label": pa.array(_label).dictionary_encode()},
    lambda pa, image: {"image": pa.array(_images).dictionary_encode(), "extra": [1] * 4, "label": _label},
):
    add("schema drift", drift(_change), [0, 1, 2, 0] * 2, "012", seeds=[0, 1, 2, 3] * 2)


def text_kinds() -> Files:
    import pyarrow

    kinds = pyarrow.string(), pyarrow.large_string(), pyarrow.string_view()
    return {f"{k}.parquet": parquet(table(label=pyarrow.array(list("abca"), kind))) for k, kind in enumerate(kinds)}


add("schema drift", text_kinds, [0, 1, 2, 0] * 3, "abc")


def hub(*names: str) -> Callable[[], Files]:
    return lambda: {name: parquet(table(label=[0, 1, 2, 0], first=10 * k)) for k, name in enumerate(names)}


for _names, _count in (
    (["default/train/0000.parquet", "default/train/0001.parquet", "default/validation/0000.parquet"], 2),
    (["plain_text/train-00000-of-00001.parquet", "plain_text/test-00000-of-00001.parquet"], 1),
    (
        [
            "data/train-00000-of-00002-ab12.parquet",
            "data/train-00001-of-00002-cd34.parquet",
            "data/test-00000-of-00001-ef56.parquet",
        ],
        2,
    ),
    (["cifar10-train.parquet", "cifar10-test.parquet"], 1),
    (["mnist/Training.parquet", "mnist/Testing.parquet"], 1),
    (["0000.parquet", "0001.parquet"], 2),
):
    _seeds = [10 * k + i for k in range(_count) for i in range(4)]
    add("hub layouts", hub(*_names), [0, 1, 2, 0] * _count, "012", seeds=_seeds)
for _names in (
    ["a/train/0.parquet", "b/train/0.parquet"],
    ["test.parquet", "val.parquet"],
    ["train.parquet", "more.parquet"],
    ["a/0.parquet", "b/0.parquet"],
):
    add("hub layouts in doubt", hub(*_names), refused="--split|give one of")
    add("hub layouts in doubt", hub(*_names), [0, 1, 2, 0] * 2, "012", prepare={"split": "."})
_names = [f"data/train-{k:05d}-of-00005.parquet" for k in (0, 2, 4)]
_missing = "3 of the 5 files data/train-.-of-00005; missing: data/train-00001-of-00005, data/train-00003-of-00005;.*--split=."
add("missing shards", hub(*_names), refused=_missing)
add("missing shards", hub(*_names, "data/val-00000-of-00001.parquet"), [0, 1, 2, 0], "012", prepare={"split": "val"})
add("missing shards", hub(*_names), [0, 1, 2, 0] * 3, "012", prepare={"split": "."})
add("missing shards", hub("train-1-of-2-ab.parquet"), refused="missing: train-0-of-2;")
add("missing shards", hub("train-2-of-2.parquet"), refused="missing: train-1-of-2;")


def saved(folders: Sequence[str], content: Callable[[], Any], parts: int = 1) -> Callable[[], Files]:
    """As `datasets.save_to_disk` writes it, with a file that its cache left behind."""

    def files() -> Files:
        found: Files = {} if folders == [""] else {"dataset_dict.json": json.dumps({"splits": list(folders)})}
        for folder in folders:
            at = f"{folder}/" if folder else ""
            found |= {f"{at}dataset_info.json": "{}", f"{at}state.json": "{}", f"{at}cache-12.arrow": arrow(content())}
            found |= {f"{at}data-{k:05d}-of-{parts:05d}.arrow": arrow(content()) for k in range(parts)}
        return found

    return files


_features = {"image": {"_type": "Image"}, "label": {"_type": "ClassLabel", "names": ["cat", "dog", "emu"]}}
_content = lambda: table(features=_features, label=[2, 0, 1, 2])  # noqa: E731
add("save_to_disk", saved(["train", "test"], _content, 2), [2, 0, 1, 2] * 2, ("cat", "dog", "emu"), seeds=[0, 1, 2, 3] * 2)
add("save_to_disk", saved([""], lambda: table(label=["dog", "cat", "dog", "emu"])), [1, 0, 1, 2], ("cat", "dog", "emu"))
add("save_to_disk", saved(["train", "validation"], lambda: table(label=[3, 1, 3, 7])), [1, 0, 1, 2], "137")
add("save_to_disk", saved(["only"], lambda: table(label=[True, False, False, True])), [1, 0, 0, 1], "01")

# --- NumPy

add("npz", {"x.npz": npz(arr_0=stack(0, 3), arr_1=np.array([5, 6, 5]))}, [0, 1, 0], "56", seeds=range(3), one_file=True)
add("npz", {"x.npz": npz(arr_0=stack(0, 3), arr_1=np.array([0.0, 1, 2]))}, [0, 1, 2], "012", seeds=range(3), one_file=True)
add("npz", {"x.npz": npz(arr_0=stack(0, 3))}, [0, 0, 0], (), seeds=range(3), one_file=True)
_ids = {"x.npz": npz(images=stack(0, 3), labels=np.array([[1], [0], [1]]), ids=np.arange(3))}
add("npz", _ids, [1, 0, 1], "01", says="not read: ids", one_file=True)
add("npz", {"x.npz": npz(arr_0=stack(0, 3), ids=np.arange(3))}, [0, 0, 0], (), says="not read: ids", one_file=True)
_arrays = npz(x_train=stack(0, 3), y_train=np.array([1, 0, 1]), x_test=stack(5, 2), y_test=np.array([0, 1]))
add("npz", {"x.npz": _arrays}, [1, 0, 1], "01", seeds=range(3), one_file=True)
add("npz", {"x.npz": _arrays}, [0, 1], "01", prepare={"split": "test"}, seeds=[5, 6], one_file=True)
_short = {"x.npz": npz(arr_0=stack(0, 3), arr_1=np.array([5, 6]))}
add("npz", _short, [0, 0, 0], (), says=r"not read: arr_1 \(2,\)", one_file=True)
_grey = {"x.npz": npz(arr_0=stack(0, 3)[..., 0])}
add("npz", _grey, refused=r"no single array of .* uint8 images, but arr_0 \(3, \d+, \d+\) uint8", one_file=True)
add("npz", {"y.npz": npz(mu=np.zeros(8), sigma=np.zeros((8, 8)))}, refused="no single array", one_file=True)
_hot = {"x.npz": npz(arr_0=stack(0, 3), labels=np.eye(3)[[2, 0, 1]])}
add("npz", _hot, [2, 0, 1], "012", seeds=range(3), one_file=True)
add("npz", _hot, [2, 0, 1], "012", prepare={"labels": "labels"}, one_file=True)
_soft = {"x.npz": npz(arr_0=stack(0, 3), y=np.full((3, 4), 0.25))}
add("npz", _soft, [0, 0, 0], (), says="not read: y (3, 4)", one_file=True)
add("npz", _soft, refused=r"array y has the shape \(3, 4\); labels are \(3,\) numbers", prepare={"labels": "y"}, one_file=True)
_objects = {"x.npz": npz(arr_0=stack(0, 3), y=np.array(["a", None, "b"], dtype=object))}
add("npz", _objects, refused=r"array y holds Python objects: save y.astype\(str\) instead", one_file=True)
_columns = {"x.npz": npz(arr_0=np.asfortranarray(stack(0, 3)))}
add("npz", _columns, refused=r"array arr_0 is in column-major order: save numpy.ascontiguousarray", one_file=True)
_hot_columns = npz(arr_0=stack(0, 3), labels=np.asfortranarray(np.eye(3)[[2, 0, 1]]))
add("npz", {"x.npz": _hot_columns}, [2, 0, 1], "012", seeds=range(3), one_file=True)
add("npz", {"x.npz": npz(arr_0=stack(0, 3))}, refused="no split called val", prepare={"split": "val"}, one_file=True)

# --- archives


def samples(first: int, count: int, ending: str = "cls") -> Files:
    files: Files = {}
    for k in range(first, first + count):
        label = str(k % 3) if ending == "cls" else json.dumps({"label": k % 3, "caption": "x"})
        files |= {f"s{k:06d}.png": picture(k), f"s{k:06d}.{ending}": label}
    return files


_shards = {f"train-{k:06d}.tar": tar(samples(4 * k, 4)) for k in range(3)} | {"val-000000.tar": tar(samples(50, 4))}
add("shards", _shards, [k % 3 for k in range(12)], "012", seeds=range(12))
add("shards", _shards, [k % 3 for k in range(50, 54)], "012", prepare={"split": "val"}, seeds=range(50, 54))
_shards = {f"shard{k}.tar.gz": tar(samples(0, 4), "w:gz") for k in (0, 2)}  # the same names in each
add("shards", _shards, [0, 1, 2, 0] * 2, "012", seeds=[0, 1, 2, 3] * 2)
_shards = {f"{k:05d}.tar": tar({f"{k}{i}.png": picture(10 * k + i) for i in range(3)}) for k in range(2)}
add("shards", _shards, [0] * 6, (), seeds=[0, 1, 2, 10, 11, 12])  # no labels
_shards = {f"train-{k:05d}-of-00003.tar": tar(samples(4 * k, 4)) for k in (0, 2)}
add("missing shards", _shards, refused="2 of the 3 files train-.*; missing: train-00001-of-00003;")
add("missing shards", _shards, [k % 3 for k in (*range(4), *range(8, 12))], "012", prepare={"split": "."})
_json = {f"{k:04d}.tar": tar(samples(4 * k, 4, "json")) for k in range(2)}
add("shards", _json, [k % 3 for k in range(8)], "012", seeds=range(8))
add("shards", {"x.tar": tar(samples(0, 4) | samples(4, 4, "json"))}, refused="4 of 8 images have no label", one_file=True)
_gaps = {f"part{k:05d}.tar": tar({f"{k}{i}.png": picture(k + i) for i in range(3)}) for k in (0, 5)}
_digits = {f"{k}.tar": tar({f"{k}{i}.png": picture(k + i) for i in range(3)}) for k in range(2)}
for _tars in (_gaps, _digits):
    add("shards or classes", _tars, refused="--labels=none")
    add("shards or classes", _tars, [0] * 3 + [1] * 3, [Path(n).stem for n in _tars], prepare={"labels": "folders"})
    add("shards or classes", _tars, [0] * 6, (), prepare={"labels": "none"})
_wnids = ("n01440764", "n01443537", "n02085620")
_inner = {f"{w}.tar": tar({f"{w}_{i}.png": picture(10 * k + i) for i in range(2)}) for k, w in enumerate(_wnids)}
_seeds = [0, 1, 10, 11, 20, 21]
add("tars by class", _inner, [0, 0, 1, 1, 2, 2], _wnids, seeds=_seeds)
_cats = {f"train/{c}.tar": tar({f"{i}.png": picture(10 * k + i) for i in range(2)}) for k, c in enumerate(("cat", "dog"))}
_cats["test/cat.tar"] = tar({"9.png": PNG})
add("tars by class", _cats, [0, 0, 1, 1], ("cat", "dog"), seeds=[0, 1, 10, 11])
_cats = {f"{c}.tgz": tar({f"{c}/{i}.png": picture(10 * k + i) for i in range(2)}, "w:gz") for k, c in enumerate(("cat", "dog"))}
add("tars by class", _cats, [0, 0, 1, 1], ("cat", "dog"), seeds=[0, 1, 10, 11])
_image_net = tar(_inner)
_train = "ILSVRC2012_img_train.tar"
add("tar of tars", {_train: _image_net}, [0, 0, 1, 1, 2, 2], _wnids, seeds=_seeds, one_file=True)
_jpegs = {"cat.tar": tar({"x/1.JPEG": picture(1, "JPEG")}), "dog.tar": tar({"y/2.JPEG": picture(2, "JPEG")})}
add("tar of tars", {"set.tar.xz": tar({"README": "x", **_jpegs}, "w:xz")}, [0, 1], ("cat", "dog"), one_file=True)
_both = {"train.tar": tar(dict(zip(classes_of("", "ab"), _images, strict=True))), "val.tar": tar({"a/9.png": picture(9)})}
add("tar of tars", {"set.tar": tar(_both)}, [0, 0, 1, 1], "ab", seeds=range(4), one_file=True)
add("tar of tars", {"set.tar": tar(_both)}, [0], "a", prepare={"split": "val"}, seeds=[9], one_file=True)
_parts = {f"{k:05d}.tar": tar(samples(3 * k, 3)) for k in range(2)}
add("tar of tars", {"shards.tar": tar(_parts)}, [0, 1, 2] * 2, "012", seeds=range(6), one_file=True)
_parts = {f"{k:05d}.tar": tar({f"{i}.png": picture(3 * k + i) for i in range(3)}) for k in range(2)}
add("tar of tars", {"shards.tar": tar(_parts)}, [0] * 6, (), seeds=range(6), one_file=True)
_folder = {_train: _image_net, "ILSVRC2012_img_val.tar": tar({"ILSVRC2012_val_1.png": PNG})}
add("tar of tars", _folder, [0, 0, 1, 1, 2, 2], _wnids, seeds=_seeds)
add("tar of tars", {"bad.tar": tar({"n1.tar": _inner["n01440764.tar"][:700]})}, refused="truncated|damaged", one_file=True)
add("tar of tars", {"out.tar": tar({"n1.tar": tar({"../x.png": PNG})})}, refused="outside", one_file=True)
_val = {"train.tar": tar({"train/a/1.png": PNG}), "val.tar": tar({"val/a/2.png": picture(2), "val/b/3.png": picture(3)})}
add("split of tars", _val, [0, 1], "ab", prepare={"split": "val"}, seeds=[2, 3])
add("split of tars", _val, [0], "a", says="val (1 file)", seeds=[0])
add("split of tars", {"set.tar": tar(pictures(_names := ["train/a/0.png", "val/b/1.png"]))}, [0], "b", prepare={"split": "val"})
add("mixed containers", lambda: {"a/1.png": PNG, "x.parquet": parquet(table())}, refused="1 .parquet files.*1 image files")
add(
    "mixed containers",
    lambda: {"x.tar": tar({"a/1.png": PNG}), "x.parquet": parquet(table())},
    refused="give the folder or file",
)
add("mixed containers", {"cat/1.tar": tar({"1.png": PNG}), "dog/1.png": PNG}, refused="1 .tar files|1 image files")
_beside = {"images.tar": tar(flat(2)), "labels.csv": csv("file,label", "0.png,a", "1.png,b"), "README.md": "x"}
add("mixed containers", _beside, [0, 0], says="labels.csv beside the data files is not read", seeds=[0, 1])
add("mixed containers", {"images.tar": tar(flat(2)), "more.zip": "x"}, [0, 0], says="left alone: 1 .zip")
_zip = old_zip("ascii", ("x", "y"))
_last = {"set.tar": tar({"a/0.png": picture(0), "b/1.png": picture(1), "b/z.zip": _zip})}  # ends like a zip
add("mixed containers", _last, [0, 1], "ab", says="left alone: 1 .zip", seeds=[0, 1], one_file=True)
add("mixed containers", {"cat.zip": _zip, "dog.zip": _zip}, refused="no image in .* but 2 .zip")
_inside = {**flat(2), "labels.csv": csv("file,label", "0.png,b", "1.png,a")}
add("labels in archives", {"set.tar": tar(_inside)}, [1, 0], "ab", seeds=[0, 1], one_file=True)
add("labels in archives", {"set.tar.bz2": tar(samples(0, 3), "w:bz2")}, [0, 1, 2], "012", seeds=range(3), one_file=True)
_buckets = {"00000/img00000000.png": picture(0), "00000/img00000001.png": picture(1)}
_labels = json.dumps({"labels": [[name, 1 - k] for k, name in enumerate(_buckets)]})
add("labels in archives", {"e.tar": tar({**_buckets, "dataset.json": _labels})}, [1, 0], "01", seeds=[0, 1], one_file=True)
for _encoding, _names in {
    "utf-8": ("kočka", "пёс"),
    "gbk": ("猫", "狗"),
    "shift_jis": ("ねこ", "いぬ"),
    "cp866": ("кот", "собака"),
}.items():
    _order = sorted(range(2), key=lambda k: _names[k])
    _option = {} if _encoding == "utf-8" else {"zip_names": _encoding}
    _old = {"old.zip": old_zip(_encoding, _names)}
    add("old code pages", _old, [0, 1], sorted(_names), prepare=_option, seeds=_order, one_file=True)

# --- pixels of more than eight bits

for _kind, _ending in (("png16", "png"), ("tiff16", "tif"), ("float", "tif"), ("pgm16", "pgm")):
    for _how in ("clip", "range", "picture"):
        _files = {f"a/{k}.{_ending}": deep(_kind) for k in range(2)} | {"b/z.png": PNG}
        _says = "2 of the " if _how == "clip" else ""
        add("high depth", _files, [0, 0, 1], "ab", options={"high_depth": _how}, says=_says)

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
_WORDS = [*CLASSES[:4], *TRAIN[:4], *OTHER[:5], "images", "data", "masks", "annotations", "@eaDir", "bullet_train", ".git"]


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


def random_files(draw: random.Random) -> list[str]:
    """Files of a tree without a plan; most such trees have no one reading."""
    files = set()
    for k in range(draw.randint(1, 9)):
        parts = [draw.choice(_WORDS) for _ in range(draw.randint(0, 3))]
        files.add("/".join([*parts, f"{k}{draw.choice(['.png', '.png', '.jpg', '.txt', '.CLS'])}"]))
    return sorted(files)
