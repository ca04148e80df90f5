"""The rules of what is a picture, a split and a class, by name. The same for folders, archives and Parquet files.

docs/data.md states them for users. This module only looks at names; `listing` applies it to a tree of files.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from jitjax.errors import UserError

# --- pictures ---------------------------------------------------------------------------------------------------------

# Pillow's name of each format that is read, and the endings under which its files are found. These formats have a
# signature and are decoded in process. (EPS, for one, would start Ghostscript; TGA has no signature.)
FORMATS: Mapping[str, tuple[str, ...]] = {
    "JPEG": (".jpg", ".jpeg", ".jpe", ".jfif", ".mpo"),
    "PNG": (".png", ".apng"),
    "WEBP": (".webp",),
    "BMP": (".bmp", ".dib"),
    "GIF": (".gif",),
    "TIFF": (".tif", ".tiff"),
    "PPM": (".ppm", ".pgm", ".pbm", ".pnm", ".pfm"),
    "AVIF": (".avif", ".avifs"),
}
# Read only where all formats are asked for: the official loader passes over their endings.
MORE_FORMATS: Mapping[str, tuple[str, ...]] = {
    "JPEG2000": (".jp2", ".j2k", ".j2c", ".jpc", ".jpf", ".jpx"),
    "QOI": (".qoi",),
    "TGA": (".tga", ".icb", ".vda", ".vst"),
    "PCX": (".pcx",),
    "SGI": (".sgi", ".rgb", ".rgba", ".bw"),
    "SUN": (".ras",),
    "DDS": (".dds",),
    "PSD": (".psd",),
    "ICO": (".ico",),
    "XBM": (".xbm",),
    "XPM": (".xpm",),
}
ENDINGS = tuple(ending for endings in FORMATS.values() for ending in endings)
MORE_ENDINGS = tuple(ending for endings in MORE_FORMATS.values() for ending in endings)
# Containers of pictures, which `jitjax prepare` reads.
TAR_ENDINGS = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz")
TABLE_ENDINGS = (".parquet", ".arrow")


def endings(all_formats: bool) -> tuple[str, ...]:
    """Endings of the files that are read as pictures."""
    return ENDINGS + MORE_ENDINGS if all_formats else ENDINGS


def ending(name: str) -> str:
    """ ".jpg" of "a/B.JPG"; "no ending" where there is none."""
    return os.path.splitext(name)[1].lower() or "no ending"


def stem(name: str) -> str:
    """The file name without folder and ending; ".tar.gz" and its like count as one ending."""
    base = name.rpartition("/")[2]
    for long in TAR_ENDINGS:
        if base.lower().endswith(long):
            return base[: -len(long)]
    return os.path.splitext(base)[0]


# --- files that systems and programs leave behind ---------------------------------------------------------------------

_SYSTEM_FOLDERS = frozenset(
    (
        *("__macosx", "@eadir", "@tmp", "@recycle", "@recently-snapshot", "#recycle", "#snapshot", "~snapshot"),
        *("$recycle.bin", "recycler", "recycled", "system volume information", "lost+found", "lost.dir", "found.000"),
        *("network trash folder", "temporary items", "__pycache__"),
    )
)
_SYSTEM_FILES = frozenset(("thumbs.db", "ehthumbs.db", "desktop.ini", ".ds_store", "icon\r", ".directory", ".nomedia"))


def system_folder(name: str) -> str:
    """How a folder that is never part of a data set is called in reports; empty for any other folder."""
    if name.lower() in _SYSTEM_FOLDERS:
        return name
    return "hidden folder" if name.startswith(".") else ""


def system_file(name: str) -> str:
    """How a file that is never part of a data set is called in reports; empty for any other file."""
    if name.startswith("._"):
        return "._ file"
    return name.strip() if name.lower() in _SYSTEM_FILES or name.startswith("SYNOPHOTO_") else ""


# Folders that stand beside the images of well-known data sets. Without a picture they are left alone; with pictures
# (masks, depth maps) they are asked about.
_SIDE_FOLDERS = frozenset(
    (
        *("annotation", "annotations", "label", "labels", "mask", "masks", "segmentation", "segmentations", "trimaps"),
        *("imagesets", "bbox", "bboxes", "boxes", "metadata", "meta", "lists", "devkit", "docs", "doc", "scripts"),
        *("captions", "attributes", "parts", "groundtruth", "ground_truth", "gt", "depth", "features"),
    )
)


def is_side_folder(name: str) -> bool:
    """Whether folders of this name usually stand beside a data set's images: "annotations", "masks"."""
    return name.lower() in _SIDE_FOLDERS


# --- splits -----------------------------------------------------------------------------------------------------------

_SPLIT_WORDS = {
    "train": ("train", "training", "trn", "trainval"),
    "val": ("val", "vali", "valid", "validation", "validate", "dev", "devel", "eval", "evaluation"),
    "test": ("test", "tests", "testing", "tst", "holdout", "heldout"),
    "unlabeled": ("unlabeled", "unlabelled", "unsup", "unsupervised"),
    "extra": ("extra", "extras"),
    "pred": ("pred", "predict", "prediction"),
}
_ROLES = {word: role for role, words in _SPLIT_WORDS.items() for word in words}
_ROLES |= {word + tail: role for word, role in _ROLES.items() for tail in ("set", "data", "images", "imgs")}
# Words that may stand beside the split's without making it doubtful: seg_train, val_blurred, train_64x64, Train_Images.
_PLAIN_WORDS = frozenset(
    "set sets data dataset split splits images image imgs img pictures photos folder files file seg cls partial full all small "
    "clean raw blurred resized cropped crops crop original orig processed augmented aug balanced mini subset new final "
    "public private part jpg jpeg png of px faces shards shard labeled labelled".split()
)
_CJK_SPLITS = {
    **dict.fromkeys(("训练", "訓練", "学習"), "train"),
    **dict.fromkeys(("验证", "驗證", "検証"), "val"),
    **dict.fromkeys(("测试", "測試", "テスト"), "test"),
}
_PART_WORDS = frozenset("part fold batch chunk block disk disc volume group".split())
_WORD = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|\d+")


def words_of(name: str) -> list[str]:
    """ "train", "labels" and "2" of "trainLabels_2", in small letters."""
    return [word.lower() for word in _WORD.findall(name)]


class Split(NamedTuple):
    """role: "train", "val", "test", "unlabeled", "extra" or "pred". sure: the name can hardly mean anything else."""

    role: str
    sure: bool


def split_of(name: str) -> Split | None:
    """Which split a folder or file of this name is; None where no word of the name is a split's.

    "train", "Training", "seg_train", "trainset", "val_blurred" and "train2017" are sure; "bullet_train" and
    "cifar10-test" may be a class or a split.
    """
    for part, role in _CJK_SPLITS.items():
        if part in name:
            return Split(role, not name.replace(part, "").strip("集用数据データセット資料 _-0123456789"))
    words = words_of(name)
    roles = [_ROLES[word] for word in words if word in _ROLES]
    if not roles:
        return None
    others = [word for word in words if word not in _ROLES and word not in _PLAIN_WORDS]
    role = "unlabeled" if "unlabeled" in roles else roles[0]
    return Split(role, not any(len(word) > 1 and not word.isdigit() for word in others))


def is_split_layout(names: Iterable[str]) -> bool:
    """Whether the split names among `names` are splits rather than classes: one is sure, or there are several roles."""
    found = [split for split in map(split_of, names) if split]
    return any(split.sure for split in found) or len({split.role for split in found}) > 1


HERE = "."  # asked for as a split: the folder itself, as it is
FROM_FOLDERS, NO_LABELS = "folders", "none"  # asked for as labels


class Ask(NamedTuple):
    """What messages call the input and the two options that settle a doubtful reading."""

    where: str
    split: str
    labels: str


def pick_split(names: Iterable[str], wanted: str, ask: Ask) -> str:
    """The one split of a split layout that is read.

    Args:
      names: of folders or groups of files, all of them splits. wanted: a name or role, "" for the training split.

    Raises:
      UserError: none of them is the wanted split, or several are.
    """
    names = sorted(names)
    found = [name for name in names if name == wanted] or [name for name in names if name.lower() == wanted.lower()]
    if not found:
        known = split_of(wanted)
        role = "train" if not wanted else known.role if known else None
        found = [name for name in names if (split := split_of(name)) and split.role == role]
    if len(found) == 1:
        return found[0]
    what = f"several splits that may be meant ({listed(found)})" if found else f"the splits {listed(names)}"
    missing = "" if found else f" and none called {wanted}" if wanted else " and none for training"
    raise UserError(f"{ask.where} holds {what}{missing}; choose one with {ask.split}=NAME")


def listed(names: Iterable[str], most: int = 5) -> str:
    """ "a, b, c and 7 more"."""
    names = list(names)
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


# --- labels -----------------------------------------------------------------------------------------------------------

# Columns of tables and fields of JSON files, the most usual first; compared by letters and digits alone (`column_key`).
LABEL_COLUMNS = (
    *("label", "labels", "finelabel", "class", "cls", "target", "targets", "category", "classid", "labelid", "classidx"),
    *("labelidx", "classlabel", "classindex", "categoryid", "y", "classname", "labelname", "categoryname", "breed", "species"),
)
FILE_COLUMNS = (
    *("filename", "file", "filepath", "path", "imagepath", "imgpath", "imagename", "imgname", "imagefile", "filenames"),
    *("filepaths", "image", "img", "imageid", "id", "name"),
)
SPLIT_COLUMNS = ("split", "subset", "partition", "set", "dataset", "usage", "phase")
TABLE_FILES = (".csv", ".tsv", ".jsonl")  # of labels; JSON is one where it is dataset.json
_LABEL_WORDS = frozenset(("metadata", "label", "labels", "annotation", "annotations", "classes"))


def column_key(name: str) -> str:
    """ "classname" of "Class Name", "class_name" and "className"."""
    return re.sub(r"[\W_]", "", name.lower())


def usual(columns: Iterable[str], known: Sequence[str]) -> list[str]:
    """The columns whose name is one of `known`, in the order of that list."""
    keys = {name: column_key(name) for name in columns}
    return [name for key in known for name in keys if keys[name] == key]


def is_label_file(name: str, role: str) -> bool:
    """Whether a file of this name usually holds the labels of images: "metadata.csv", "trainLabels.csv", "train.csv".

    role: the split that is read; files of another split's name do not count.
    """
    if name.lower() == "dataset.json":
        return True
    if not name.lower().endswith(TABLE_FILES):
        return False
    split = split_of(stem(name))
    if split and (split.sure or split.role != role):
        return split.role == role
    return bool(_LABEL_WORDS.intersection(words_of(name)))


def may_be_a_table(name: str, role: str) -> bool:
    """Whether a file of this name may hold labels in a form that is not read, or under a name that says nothing."""
    lower, split = name.lower(), split_of(stem(name))
    if lower.startswith(("readme", "licen", "notes", "changelog", "requirements")) or (split and split.role != role):
        return False
    return lower.endswith((*TABLE_FILES, ".json", ".txt", ".xml", ".xlsx", ".mat", ".pkl", ".npy", ".h5", ".lst"))


def is_plain_name(name: str) -> bool:
    """Whether a folder's name says nothing about what its images show: "images", "data", "full_set"."""
    words = words_of(name)
    return bool(words) and all(word in _PLAIN_WORDS for word in words)


def are_parts(names: Sequence[str]) -> bool:
    """Whether folders of these names are numbered parts of one set, which say nothing about what the images show:
    "images_001" and "images_002", "fold1" to "fold5".
    """
    found = [re.fullmatch(r"(.*?)[-_ .]*\d+", name) for name in names]
    if len(found) < 2 or not all(found) or len({match[1] for match in found}) > 1:
        return False
    words = words_of(found[0][1])
    return bool(words) and (words[-1] in _PART_WORDS or words[-1] in _PLAIN_WORDS)
