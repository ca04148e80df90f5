"""`jitjax prepare`: same pixels, same bytes, resumable, checked, and safe against what archives can hold."""

from __future__ import annotations

import functools
import gzip
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT
from data_files import caltech_folder, official_pixels
from PIL import Image

from jitjax import cli
from jitjax.data import open_dataset
from jitjax.data.archive import decompress
from jitjax.data.prepared import index_checksum
from jitjax.errors import UserError
from jitjax.prepare import check, main, prepare

SIZE = 32


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return caltech_folder(tmp_path_factory.mktemp("caltech") / "train", every=97)


@pytest.fixture(scope="module")
def prepared(folder, tmp_path_factory):
    output = tmp_path_factory.mktemp("prepared") / "out"
    prepare(str(folder), str(output), SIZE, shards=4, workers=1)
    return output


def contents(directory: Path) -> dict[str, bytes]:
    return {str(file.relative_to(directory)): file.read_bytes() for file in sorted(directory.rglob("*")) if file.is_file()}


def same_images(first, second) -> bool:
    assert first.class_names == second.class_names
    return len(first) == len(second) and all(
        np.array_equal(a["image"], b["image"]) and a["label"] == b["label"]
        for a, b in ((first[k], second[k]) for k in range(len(first)))
    )


@pytest.mark.parametrize(("encoding", "size"), [("raw", 32), ("png", 48), ("webp", 32), ("jpeg", 32)])
def test_prepared_pixels_are_those_of_the_folder(folder, tmp_path, encoding, size):
    index = prepare(str(folder), str(tmp_path / "out"), size, encoding=encoding, workers=1)
    stored, decoded = open_dataset(tmp_path / "out", size), open_dataset(folder, size)
    assert stored.kind == "prepared" and index["encoding"] == encoding
    if encoding != "jpeg":
        assert same_images(stored, decoded)
    else:
        difference = [np.abs(stored[k]["image"].astype(int) - decoded[k]["image"]).mean() for k in range(len(decoded))]
        assert 0 < np.mean(difference) < 3  # of 255


def test_the_bytes_do_not_depend_on_the_workers(folder, prepared, tmp_path):
    prepare(str(folder), str(tmp_path / "out"), SIZE, shards=4, workers=2)
    assert contents(tmp_path / "out") == contents(prepared)


def test_run_twice_it_does_nothing_and_other_settings_are_refused(folder, prepared, tmp_path, capsys):
    before = {file: file.stat().st_mtime_ns for file in prepared.iterdir()}
    prepare(str(folder.parent), str(prepared), SIZE, shards=4)
    assert "complete already" in capsys.readouterr().out
    assert {file: file.stat().st_mtime_ns for file in prepared.iterdir()} == before
    with pytest.raises(UserError, match="image_size 32 instead of 64"):
        prepare(str(folder), str(prepared), 64, shards=4)
    other = caltech_folder(tmp_path / "other", every=400)
    with pytest.raises(UserError, match="other input files"):
        prepare(str(other), str(prepared), SIZE, shards=4)
    with pytest.raises(UserError, match="not empty"):
        prepare(str(folder), str(other), SIZE)


def bitmaps(root: Path, classes: str, count: int = 3) -> Path:
    """Small pictures that all take the same number of bytes."""
    for k, name in enumerate(classes):
        (root / name).mkdir(parents=True)
        for number in range(count):
            Image.fromarray(np.full((8, 8, 3), 9 * k + number, np.uint8)).save(root / name / f"{number}.bmp")
    return root


def damage(file: Path) -> bytes:
    """Replaces a file by one of the same size that cannot be decoded; returns what it held."""
    before = file.read_bytes()
    file.write_bytes(b"\0" * len(before))
    return before


def test_input_that_was_replaced_by_files_of_the_same_size_is_noticed(tmp_path, capsys):
    root, output = bitmaps(tmp_path / "set", "ab"), tmp_path / "out"
    data = damage(root / "b" / "1.bmp")
    prepare(str(root), str(output), 8, workers=0)
    capsys.readouterr()
    prepare(str(root), str(output), 8, workers=0)
    said = capsys.readouterr().out
    assert "complete already" in said and "skipped b/1.bmp: not an image" in said and "1 skipped" in said
    with pytest.raises(UserError, match=r"was prepared with 1 skipped, the first b/1.bmp \(not an image.*--on_bad skip"):
        prepare(str(root), str(output), 8, workers=0, on_bad="fail")
    (root / "b" / "1.bmp").write_bytes(data)
    with pytest.raises(UserError, match="was prepared with input files that were modified since; give a new folder"):
        prepare(str(root), str(output), 8, workers=0)
    assert len(open_dataset(output, 8)) == 5  # it can still be read


def test_when_files_were_written_is_no_part_of_what_they_hold(tmp_path, capsys):
    """The same set from a copy of the files continues a run, and so does one prepared by a version that noted no times."""
    root, output = bitmaps(tmp_path / "set", "ab"), tmp_path / "out"
    prepare(str(root), str(output), 8, workers=0)
    prepare(str(shutil.copytree(root, tmp_path / "copy", copy_function=shutil.copyfile)), str(tmp_path / "again"), 8, workers=0)
    assert (output / "index.json").read_bytes() != (tmp_path / "again" / "index.json").read_bytes()
    assert open_dataset(output, 8).fingerprint == open_dataset(tmp_path / "again", 8).fingerprint
    index = json.loads((output / "index.json").read_text())
    del index["plan"]["input"]["modified"]
    index["checksum"] = index_checksum(index)
    (output / "index.json").write_text(json.dumps(index))
    assert open_dataset(output, 8).fingerprint == open_dataset(tmp_path / "again", 8).fingerprint
    assert open_dataset(output, 8).fingerprint["checksum"] == index["checksum"]
    prepare(str(root), str(output), 8, workers=0)
    assert "complete already" in capsys.readouterr().out


def test_what_an_interrupted_preparation_skipped_is_fatal_where_bad_images_are(tmp_path, monkeypatch):
    root, output = bitmaps(tmp_path / "set", "ab"), tmp_path / "out"
    damage(root / "a" / "1.bmp")

    def interrupt(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr("jitjax.prepare._index", interrupt)  # all shards are written
        prepare(str(root), str(output), 8, shards=2, workers=0)
    with pytest.raises(UserError, match="a/1.bmp cannot be used"):
        prepare(str(root), str(output), 8, shards=2, workers=0, on_bad="fail")
    assert prepare(str(root), str(output), 8, shards=2, workers=0)["count"] == 5


def test_classes_without_an_image_are_named(tmp_path, capsys, caplog):
    root, output = bitmaps(tmp_path / "set", "abc"), tmp_path / "out"
    for file in (root / "b").iterdir():
        damage(file)
    prepare(str(root), str(output), 8, workers=0)
    assert main(["--check", str(output)]) == 0
    assert capsys.readouterr().out.count("warning: no image of 1 of the 3 classes: b\n") == 2
    assert open_dataset(output, 8).class_names == ("a", "b", "c")
    assert "out: no image of 1 of the 3 classes: b" in caplog.text
    prepare(str(root), str(tmp_path / "few"), 8, limit=2, workers=0)
    assert "warning: no image of 2 of the 3 classes: b, c\n" in capsys.readouterr().out


def test_a_prepared_split_among_class_folders_is_not_trained_on(prepared, tmp_path):
    root = bitmaps(tmp_path / "set", "xyz")
    shutil.copytree(prepared, root / "val32")
    for split in ("", "."):
        dataset = open_dataset(root, SIZE, split=split)
        assert (dataset.kind, dataset.class_names) == ("folder", ("x", "y", "z")) and "val32/ (prepared)" in dataset.summary
    for split in ("val", "val32"):
        assert open_dataset(root, SIZE, split=split).kind == "prepared"
    flat = bitmaps(tmp_path / "flat", "x") / "x"
    for name in ("val32", "small"):
        shutil.copytree(prepared, flat / name)
        assert (len(open_dataset(flat, SIZE)), open_dataset(flat, SIZE).kind) == (3, "folder")
    shutil.copytree(prepared, tmp_path / "alone" / "test32")
    with pytest.raises(
        UserError, match=r"holds the splits test32 and none for training; choose one with --config.data.split=NAME"
    ):
        open_dataset(tmp_path / "alone", SIZE)
    assert open_dataset(tmp_path / "alone", SIZE, split="test").kind == "prepared"
    for name in ("set/train32", "alone/train32", "single/small"):
        shutil.copytree(prepared, tmp_path / name)
        assert open_dataset((tmp_path / name).parent, SIZE).path == str(tmp_path / name)


def test_killed_it_looks_unfinished_and_continues_to_the_same_bytes(folder, prepared, tmp_path, capsys):
    output = tmp_path / "out"
    slow = tmp_path / "slow.py"  # the real command, with a pause after every image
    slow.write_text(
        "import time\n"
        "from jitjax.data import shards\n"
        "decode = shards.decode\n"
        "shards.decode = lambda *a, **k: (time.sleep(0.03), decode(*a, **k))[1]\n"
        "from jitjax.prepare import main\n"
        f"if __name__ == '__main__':\n    main(['--data_path', {str(folder)!r}, '--output', {str(output)!r},"
        f" '--image_size', '{SIZE}', '--shards', '4', '--workers', '1'])\n"
    )
    process = subprocess.Popen([sys.executable, str(slow)], env={**os.environ, "PYTHONPATH": str(ROOT)}, start_new_session=True)
    try:
        deadline = time.monotonic() + 60
        while len(list(output.glob("partial/shard-*.json"))) < 2 and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.02)
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    done = len(list(output.glob("partial/shard-*.json")))
    assert 2 <= done < 4
    with pytest.raises(UserError, match="not completely prepared"):
        open_dataset(output, SIZE)
    with pytest.raises(UserError, match="not a finished"):
        check(str(output))
    # and the machine lost power while writing
    (output / "partial" / "shard-00000-of-00004.arrayrecord.json").write_text("{")
    prepare(str(folder), str(output), SIZE, shards=4, workers=1)
    assert f"continuing: {done - 1} of 4" in capsys.readouterr().out
    assert contents(output) == contents(prepared)


def test_an_archive_that_cannot_be_decompressed_beside_the_output_names_the_flag(tmp_path):
    with gzip.open(tmp_path / "a.tar.gz", "wb") as file:
        file.write(b"some bytes")
    with pytest.raises(UserError, match="^--data_path=a cannot be decompressed to /proc/a.tar .* name another --output"):
        decompress(str(tmp_path / "a.tar.gz"), "/proc/a.tar", "--data_path=a")


def test_a_full_disk_is_one_line_and_costs_nothing_that_was_done(folder, prepared, tmp_path):
    """A limit on the size of files stands for the disk: it fails the same writes."""
    output = tmp_path / "out"
    command = f"{sys.executable} -m jitjax.prepare --data_path {folder} --output {output} --image_size {SIZE} --shards 4"
    result = subprocess.run(["bash", "-c", f"ulimit -f 20; {command}"], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 2
    assert result.stderr.count("error: ") == 1
    assert f"error: --output: {output}/" in result.stderr and "cannot be written" in result.stderr
    with pytest.raises(UserError, match="not completely prepared"):
        open_dataset(output, SIZE)
    assert subprocess.run(["bash", "-c", command], cwd=ROOT, capture_output=True).returncode == 0
    assert contents(output) == contents(prepared)


def test_interrupted_by_the_keyboard_it_stops_soon_and_can_go_on(folder, prepared, tmp_path, monkeypatch):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("rich.progress.Progress.update", interrupt)
    arguments = [
        "--data_path",
        str(folder),
        "--output",
        str(tmp_path / "out"),
        "--image_size",
        str(SIZE),
        "--shards",
        "4",
    ]
    assert cli.guarded(lambda: main(arguments)) == 130
    monkeypatch.undo()
    assert cli.guarded(lambda: main(arguments)) == 0
    assert contents(tmp_path / "out") == contents(prepared)


def test_check_finds_every_kind_of_damage(prepared, tmp_path):
    assert check(str(prepared), workers=1) == len(open_dataset(prepared, SIZE))
    good = contents(prepared)
    shard = "shard-00001-of-00004.arrayrecord"

    def damaged(name: str, data: bytes | None, match: str):
        for file, content in good.items():
            (tmp_path / file).write_bytes(content)
        (tmp_path / name).unlink() if data is None else (tmp_path / name).write_bytes(data)
        with pytest.raises(UserError, match=match) as caught:
            check(str(tmp_path), workers=1)
        assert "\n" not in str(caught.value)

    flipped = bytearray(good[shard])
    flipped[len(flipped) // 2] ^= 1
    damaged(shard, bytes(flipped), "another checksum")
    damaged(shard, good[shard][:-1], "bytes instead of")
    damaged(shard, None, "is missing")
    damaged("index.json", good["index.json"].replace(b'"image_size": 32', b'"image_size": 48', 1), "was changed")
    damaged("index.json", good["index.json"][:-9], "is damaged")
    damaged("index.json", None, "not a finished")


def test_a_damaged_record_is_replaced_while_training(prepared, folder, tmp_path):
    from jitjax.data import make_iterator

    good = contents(prepared)
    for file, content in good.items():
        (tmp_path / file).write_bytes(content)
    shard = bytearray(good["shard-00000-of-00004.arrayrecord"])
    pixels = open_dataset(folder, SIZE)[5]["image"].tobytes()
    place = bytes(shard).index(pixels)
    shard[place : place + 100] = bytes(100)
    (tmp_path / "shard-00000-of-00004.arrayrecord").write_bytes(shard)
    dataset = open_dataset(tmp_path, SIZE)
    iterator = make_iterator(dataset, seed=0, global_batch=len(dataset), max_bad_fraction=0.2)
    labels = next(iterator)["label"]
    assert list(iterator.bad_files) == [5]
    assert len(labels) == len(dataset)


# --- inputs -----------------------------------------------------------------------------------------------------------


def files_of(folder: Path) -> dict[str, bytes]:
    return {f"wrapper/train/{name}": data for name, data in contents(folder).items()}


def write_zip(path: Path, files: dict[str, bytes], **options) -> Path:
    with zipfile.ZipFile(path, "w", **options) as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return path


def write_tar(path: Path, files: dict[str, bytes], mode: str = "w", extra: tuple[tarfile.TarInfo, ...] = ()) -> Path:
    with tarfile.open(path, mode) as archive:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
        for info in extra:
            archive.addfile(info)
    return path


def write_parquet(path: Path, folder: Path) -> Path:
    pyarrow = pytest.importorskip("pyarrow")
    pytest.importorskip("pyarrow.parquet")

    files = sorted(folder.glob("*/*.jpg"), key=lambda file: (file.parent.name, file.name))
    classes = sorted({file.parent.name for file in files})
    features = {"image": {"_type": "Image"}, "label": {"names": classes, "_type": "ClassLabel"}}
    table = pyarrow.table(
        {
            "image": [{"bytes": file.read_bytes(), "path": file.name} for file in files],
            "label": [classes.index(file.parent.name) for file in files],
        }
    ).replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    path.mkdir()
    half = len(files) // 2
    pyarrow.parquet.write_table(table[:half], path / "train-00000-of-00002.parquet", row_group_size=7)
    pyarrow.parquet.write_table(table[half:], path / "train-00001-of-00002.parquet", row_group_size=100)
    pyarrow.parquet.write_table(table[:3], path / "test-00000-of-00001.parquet")
    return path


@pytest.mark.parametrize("kind", ["zip", "zip stored", "tar", "tar.gz", "tar.xz", "parquet"])
def test_archives_and_parquet_give_what_the_folder_gives(folder, prepared, tmp_path, kind):
    files = {**files_of(folder), "wrapper/README.txt": b"no image", "__MACOSX/wrapper/train/._x.jpg": b"no image"}
    if kind.startswith("zip"):
        method = zipfile.ZIP_STORED if "stored" in kind else zipfile.ZIP_DEFLATED
        path = write_zip(tmp_path / "set.zip", files, compression=method)
    elif kind == "parquet":
        path = write_parquet(tmp_path / "hub", folder)
    else:
        path = write_tar(tmp_path / f"set.{kind}", files, "w:" + kind.partition(".")[2])
    index = prepare(str(path), str(tmp_path / "out"), SIZE, shards=4, workers=1)
    assert index["skipped"] == []
    for shard in range(4):
        name = f"shard-{shard:05d}-of-00004.arrayrecord"
        assert (tmp_path / "out" / name).read_bytes() == (prepared / name).read_bytes()
    assert open_dataset(tmp_path / "out", SIZE).class_names == open_dataset(prepared, SIZE).class_names
    assert sorted(os.listdir(tmp_path / "out")) == sorted(os.listdir(prepared))  # nothing is left behind


def link(name: str, target: str, kind: bytes) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info


def dangerous_archives(folder: Path, tmp_path: Path) -> dict[str, tuple[Path, str]]:
    """name -> (archive, what the message must say)."""
    good = dict(list(files_of(folder).items())[:4])
    name, data = next(iter(good.items()))
    zip_link = zipfile.ZipInfo("wrapper/train/a/link.jpg")
    zip_link.external_attr = 0o120777 << 16
    linked = write_zip(tmp_path / "link.zip", good)
    with zipfile.ZipFile(linked, "a") as archive:
        archive.writestr(zip_link, "/etc/passwd")
    double = write_zip(tmp_path / "twice.zip", good)
    with zipfile.ZipFile(double, "a") as archive, pytest.warns(UserWarning):
        archive.writestr(name, data)
    encrypted = write_zip(tmp_path / "encrypted.zip", good).read_bytes()
    place = encrypted.index(b"PK\x01\x02") + 8
    (tmp_path / "encrypted.zip").write_bytes(encrypted[:place] + b"\x01" + encrypted[place + 1 :])
    zeros = bytes(80 * 2**20)
    tar = write_tar(tmp_path / "whole.tar", good).read_bytes()
    (tmp_path / "cut.tar").write_bytes(tar[: len(data) // 2 + 512])
    (tmp_path / "cut-at-member.tar").write_bytes(tar[: 512 + -(-len(data) // 512) * 512])
    packed = write_tar(tmp_path / "whole.tar.gz", good, "w:gz").read_bytes()
    (tmp_path / "cut.tar.gz").write_bytes(packed[:-2000])
    (tmp_path / "cut.zip").write_bytes(write_zip(tmp_path / "whole.zip", good).read_bytes()[:-100])
    (tmp_path / "noise.tar").write_bytes(np.random.default_rng(0).bytes(4096))
    return {
        "zip ..": (write_zip(tmp_path / "up.zip", {**good, "a/../../up.jpg": data}), "outside the archive"),
        "zip absolute": (write_zip(tmp_path / "abs.zip", {**good, "/tmp/x.jpg": data}), "outside the archive"),
        "zip backslash": (write_zip(tmp_path / "back.zip", {**good, "a\\..\\..\\x.jpg": data}), "outside the archive"),
        "zip drive": (write_zip(tmp_path / "drive.zip", {**good, "C:\\x.jpg": data}), "outside the archive"),
        "zip link": (linked, "is a link"),
        "zip twice": (double, "twice"),
        "zip encrypted": (tmp_path / "encrypted.zip", "is encrypted"),
        "zip bomb": (write_zip(tmp_path / "bomb.zip", {"a/x.jpg": zeros}, compression=zipfile.ZIP_DEFLATED), "bomb"),
        "zip cut": (tmp_path / "cut.zip", "damaged or incomplete zip file"),
        "tar ..": (write_tar(tmp_path / "up.tar", {**good, "../up.jpg": data}), "outside the archive"),
        "tar absolute": (write_tar(tmp_path / "abs.tar", {**good, "/tmp/x.jpg": data}), "outside the archive"),
        "tar symlink": (
            write_tar(tmp_path / "s.tar", good, extra=(link("a/s.jpg", "/etc/passwd", tarfile.SYMTYPE),)),
            "a link",
        ),
        "tar hardlink": (
            write_tar(tmp_path / "h.tar", good, extra=(link("a/h.jpg", name, tarfile.LNKTYPE),)),
            "a link",
        ),
        "tar device": (
            write_tar(tmp_path / "d.tar", good, extra=(link("a/d.jpg", "", tarfile.CHRTYPE),)),
            "not a plain file",
        ),
        "tar.gz bomb": (write_tar(tmp_path / "bomb.tar.gz", {"a/x.jpg": zeros}, "w:gz"), "bomb"),
        "tar cut": (tmp_path / "cut.tar", "truncated"),
        "tar cut between members": (tmp_path / "cut-at-member.tar", "truncated"),
        "tar.gz cut": (tmp_path / "cut.tar.gz", "damaged"),
        "tar noise": (tmp_path / "noise.tar", "damaged"),
    }


def test_dangerous_and_damaged_archives_are_refused_and_leave_nothing(folder, tmp_path):
    for name, (path, match) in dangerous_archives(folder, tmp_path).items():
        output = tmp_path / "out"
        with pytest.raises(UserError, match=match) as caught:
            prepare(str(path), str(output), SIZE, workers=1)
        assert "--data_path=" in str(caught.value) and "\n" not in str(caught.value), name
        assert not output.exists(), name


def test_a_damaged_member_of_an_archive_is_a_bad_image(folder, tmp_path):
    good = files_of(folder)
    archive = bytearray(write_zip(tmp_path / "set.zip", good).read_bytes())
    victim = sorted(good)[2]
    place = bytes(archive).index(good[victim]) + 700
    archive[place] ^= 0xFF
    (tmp_path / "set.zip").write_bytes(archive)
    index = prepare(str(tmp_path / "set.zip"), str(tmp_path / "out"), SIZE, workers=1)
    assert index["count"] == len(good) - 1
    assert [(Path(bad["name"]).name, bad["reason"]) for bad in index["skipped"]] == [
        (Path(victim).name, "damaged zip: wrong checksum")
    ]


def test_parquet_that_cannot_be_used_is_named(folder, tmp_path, monkeypatch):
    pyarrow = pytest.importorskip("pyarrow")
    pytest.importorskip("pyarrow.parquet")

    data = next(iter(contents(folder).values()))

    def refused(match: str, columns: dict, **options):
        pyarrow.parquet.write_table(pyarrow.table(columns), tmp_path / "x.parquet")
        with pytest.raises(UserError, match=match):
            prepare(str(tmp_path / "x.parquet"), str(tmp_path / "out"), SIZE, workers=1, **options)

    refused("--image_column", {"one": [data], "two": [data]})
    refused("not image bytes", {"image": ["a.jpg"]})
    refused("row 1: -3 is not a class number", {"image": [data] * 2, "label": [0, -3]})
    refused("--label_column=kind is not a column", {"image": [data]}, label_column="kind")
    refused("none of the 1 images.*no image bytes", {"image": pyarrow.array([None], pyarrow.binary())})
    (tmp_path / "x.parquet").write_bytes(b"PAR1" + bytes(100))
    with pytest.raises(UserError, match="damaged Parquet"):
        prepare(str(tmp_path / "x.parquet"), str(tmp_path / "out2"), SIZE)
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(UserError, match=r"pip install -e '\.\[parquet\]'"):
        prepare(str(tmp_path / "x.parquet"), str(tmp_path / "out3"), SIZE)


# --- options and the command line -------------------------------------------------------------------------------------


def test_limit_takes_images_of_all_classes(folder, tmp_path):
    whole = open_dataset(folder, SIZE)
    prepare(str(folder), str(tmp_path / "out"), SIZE, limit=20, workers=1)
    part = open_dataset(tmp_path / "out", SIZE)
    assert len(part) == 20 and part.class_names == whole.class_names
    for k in range(20):
        assert np.array_equal(part[k]["image"], whole[k * len(whole) // 20]["image"])


def test_bad_images_are_listed_or_fatal(folder, tmp_path):
    (tmp_path / "set" / "a").mkdir(parents=True)
    (tmp_path / "set" / "b").mkdir()
    good = sorted(folder.glob("*/*.jpg"))[0]
    for name, data in {
        "a/1.jpg": good.read_bytes(),
        "a/2.jpg": b"",
        "b/3.png": b"not",
        "b/4.jpg": good.read_bytes()[:900],
    }.items():
        (tmp_path / "set" / name).write_bytes(data)
    (tmp_path / "set" / "b" / "5.jpg").write_bytes(good.read_bytes())
    index = prepare(str(tmp_path / "set"), str(tmp_path / "out"), SIZE, workers=1)
    assert {bad["name"]: bad["reason"] for bad in index["skipped"]} == {
        "a/2.jpg": "the file is empty",
        "b/3.png": "not an image of a known format",
        "b/4.jpg": index["skipped"][2]["reason"],
    }
    assert "truncated" in index["skipped"][2]["reason"]
    assert (index["count"], index["class_counts"], index["classes"]) == (2, [1, 1], ["a", "b"])
    assert np.array_equal(open_dataset(tmp_path / "out", SIZE)[1]["image"], official_pixels(good, SIZE))
    with pytest.raises(UserError, match=r"a/2.jpg cannot be used: the file is empty.*--on_bad skip"):
        prepare(str(tmp_path / "set"), str(tmp_path / "strict"), SIZE, on_bad="fail", workers=1)
    with pytest.raises(UserError, match="not completely prepared"):
        open_dataset(tmp_path / "strict", SIZE)


def test_flags_that_do_nothing_are_refused(prepared, tmp_path):
    with pytest.raises(UserError, match="^--output, --image_size, --exif_rotate: for preparing, but --check="):
        main(["--check", str(prepared), "--output", str(tmp_path), "--image_size", "8", "--exif_rotate"])
    with pytest.raises(UserError, match="--labels=none and --label_column=breed: give one of the two"):
        prepare(str(tmp_path), str(tmp_path / "out"), SIZE, labels="none", label_column="breed")
    with pytest.raises(UserError, match="--quality=101 must be at most 100"):
        prepare(str(tmp_path), str(tmp_path / "out"), SIZE, encoding="jpeg", quality=101)


def test_the_prepared_size_must_be_the_configured_one(prepared):
    with pytest.raises(UserError, match=r"prepared at 32 px, not at --config.data.image_size=64"):
        open_dataset(prepared, 64)
    with pytest.raises(UserError, match=r"^--reference=.* was prepared at 32 px, and 64 px are needed"):
        open_dataset(prepared, 64, flag="--reference")
    with pytest.raises(UserError, match="exif_rotate"):
        open_dataset(prepared, 32, exif_rotate=True)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data_path", "/nowhere", "--output", "OUT", "--image_size", "32"], "--data_path=/nowhere does not exist"),
        (["--output", "OUT", "--image_size", "32"], "--data_path is missing"),
        (
            ["--data_path", "FOLDER", "--output", "OUT", "--image_size", "0"],
            "argument --image_size: 0 must be 1 or more",
        ),
        (["--data_path", "FOLDER", "--output", "OUT", "--image_size", "32", "--shards", "9999"], "--shards=9999"),
        (
            ["--data_path", "FOLDER", "--output", "/proc/out", "--image_size", "32"],
            "--output=/proc/out cannot be written",
        ),
        (
            ["--data_path", "FOLDER", "--output", "OUT", "--image_size", "32", "--encoding", "tiff"],
            "--encoding: invalid choice",
        ),
        (["--data_pth", "FOLDER"], "--data_pth"),
        *(
            (["--data_path", path, "--output", "OUT", "--image_size", "32", *flags], says)
            for path, flags, says in (
                (
                    "FOLDER",
                    ("--label_column", "y"),
                    "--data_path=FOLDER is a folder of images, and --label_column is for Parquet",
                ),
                (
                    "FOLDER",
                    ("--image_column", "x"),
                    "--data_path=FOLDER is a folder of images, and --image_column is for Parquet",
                ),
                (
                    "FOLDER",
                    ("--zip_names", "gbk"),
                    "--data_path=FOLDER is a folder of images, and --zip_names is for zips; leave",
                ),
                ("ZIP", ("--label_column", "y"), "--data_path=ZIP is a zip, and --label_column is for Parquet and Arrow"),
                ("ZIP", ("--image_column", "x"), "--data_path=ZIP is a zip, and --image_column is for Parquet and Arrow"),
                ("FOLDER", ("--quality", "90"), "--quality=90 is for --encoding jpeg, and this set is stored as raw; leave"),
            )
        ),
        (["--check", "FOLDER"], "not a finished prepared directory"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(folder, tmp_path, capsys, arguments, message):
    archive = write_zip(tmp_path / "set.zip", files_of(folder))
    names = {"FOLDER": str(folder), "ZIP": str(archive), "OUT": str(tmp_path / "out")}
    *arguments, message = [functools.reduce(lambda s, name: s.replace(*name), names.items(), a) for a in (*arguments, message)]
    assert cli.guarded(lambda: main(arguments)) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and message in error
    assert not (tmp_path / "out").exists()


def test_the_command_shows_rate_and_result(folder, tmp_path):
    command = [sys.executable, "-m", "jitjax.prepare", "--data_path", str(folder), "--output", str(tmp_path / "out")]
    result = subprocess.run([*command, "--image_size", "32"], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    assert "images/s" in result.stderr and "0 skipped" in result.stdout


def test_a_lock_on_a_file_that_was_removed_keeps_nobody_out(tmp_path):
    """A preparation that ends removes its lock file; one that opened it just before must lock the new one."""
    import fcntl

    from jitjax.prepare import _locked

    output, path = str(tmp_path / "out"), tmp_path / "out" / ".prepare.lock"
    with _locked(output):
        late = os.open(path, os.O_RDWR)  # waits, as it were
        with pytest.raises(UserError, match="another preparation"), _locked(output):
            pass
    assert not path.exists()
    fcntl.flock(late, fcntl.LOCK_EX | fcntl.LOCK_NB)  # the orphan can be locked ...
    with _locked(output):  # ... which keeps nobody out
        assert not os.path.samestat(os.fstat(late), os.stat(path))
    os.close(late)


def test_a_home_directory_is_expanded(folder, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    prepare(str(folder), "~/out", SIZE, limit=2, workers=1)
    assert len(open_dataset("~/out", SIZE)) == 2
