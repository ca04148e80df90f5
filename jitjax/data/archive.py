"""Images inside zip or tar files, read in place: nothing is unpacked except the outer compression of a tar.

Archives come from strangers. Names that point outside, links, devices and decompression bombs refuse the archive as a
whole.

`zipfile` and `tarfile` read the directories and decompress. Only the offsets they report are sent to the worker processes,
which seek there: a `ZipFile` of ImageNet's size takes seconds and most of a gigabyte in each process that opens it.
"""

from __future__ import annotations

import bz2
import collections
import contextlib
import dataclasses
import gzip
import lzma
import os
import posixpath
import re
import stat
import tarfile
import zipfile
import zlib
from collections.abc import Iterable, Iterator, Sequence
from typing import BinaryIO, NamedTuple

import numpy as np

from jitjax import atomic
from jitjax.data import rules
from jitjax.data.files import failure, unreadable
from jitjax.data.image import MAX_FILE_BYTES, BadImage
from jitjax.data.listing import Listing, list_images
from jitjax.data.rules import Ask, listed
from jitjax.data.tree import Scan
from jitjax.errors import UserError

# Images are compressed already: an honest archive of them expands less than tenfold, even one of bitmaps or tiny files
# in tar blocks.
MAX_EXPANSION = 100
EXPANSION_FREE_BYTES = 64 * 2**20
_PIECE = 2**20
_OUTER_COMPRESSION = ((b"\x1f\x8b", gzip.open), (b"BZh", bz2.open), (b"\xfd7zXZ\x00", lzma.open))
_NO_METHOD = -1  # of a tar's member: the data as it is
_LOCAL_HEADER_BYTES = 30
_UTF8_FLAG, _ENCRYPTED_FLAG = 0x800, 1


class Span(NamedTuple):
    """Where a member lies: for a tar the offset of the data and method -1, for a zip the offset of the local header."""

    file: int
    offset: int
    stored: int
    size: int
    method: int
    crc: int


class Archive:
    """The members of one or several archives as a tree (`tree.Tree`)."""

    def __init__(self, paths: Sequence[str], endings: tuple[str, ...]):
        self.paths = list(paths)
        self.spans: dict[str, Span] = {}
        self.notes: list[str] = []
        self._endings = endings
        self._scans: dict[str, Scan] = {"": Scan()}
        self._ignored: set[str] = set()

    def add(self, name: str, span: Span | None, where: str) -> None:
        """Adds a file, or a folder where `span` is None, with the folders above it."""
        *above, base = name.split("/")
        folder = self._folder(above if span else [*above, base])
        if folder is None or span is None:
            return
        if system := rules.system_file(base):
            self._scans[folder].system.append(system)
        elif name in self.spans:
            raise UserError(f"{where} holds {name!r} twice; which one is meant is not clear")
        else:
            self.spans[name] = span
            if base.lower().endswith(self._endings):
                self._scans[folder].pictures.append((base, span.size))
            else:
                self._scans[folder].others.append(base)

    def _folder(self, parts: list[str]) -> str | None:
        """Makes a folder and those above; None for one that a system left behind, which is counted once."""
        path = ""
        for part in parts:
            if part in ("", "."):
                continue
            below = f"{path}/{part}" if path else part
            if below not in self._scans:
                if system := rules.system_folder(part):
                    if below not in self._ignored:
                        self._ignored.add(below)
                        self._scans[path].system.append(system)
                    return None
                self._scans[below] = Scan()
                self._scans[path].folders.append(part)
            path = below
        return path

    def scan(self, folder: str) -> Scan:
        return self._scans[folder.rstrip("/")]

    def walk(self, folder: str, sizes: bool = True) -> Iterator[tuple[str, Scan]]:
        del sizes
        root, pending = folder.rstrip("/"), [""]
        while pending:
            inside = pending.pop()
            scan = self._scans[f"{root}/{inside}".strip("/")]
            yield inside, scan
            pending += [f"{inside}/{name}" if inside else name for name in scan.folders]

    def path(self, folder: str) -> str:
        return posixpath.join(self.paths[0], folder)

    def is_prepared(self, folder: str) -> bool:
        del folder
        return False

    def read(self, path: str) -> bytes:
        span = self.spans[path]
        with open(self.paths[span.file], "rb") as file:
            try:
                return _read_member(file, span)
            except BadImage as error:
                raise UserError(f"{self.paths[span.file]}: {path}: {error}") from None


class ArchiveInput:
    """The images of archives in the order of an unpacked folder. Picklable; each process opens the files for itself."""

    def __init__(
        self,
        tree: Archive,
        ask: Ask,
        split: str,
        labels: str,
        path: str,
        left_alone: Sequence[str] = (),
        settled: bool = False,
    ):
        listing = list_images(tree, ask, split=split, labels=labels, settled=settled)
        self.labels, self.classes = listing.labels, listing.classes
        self.notes = (*tree.notes, *listing.notes)
        listing = dataclasses.replace(listing, left_alone=(*left_alone, *listing.left_alone))
        self.summary = listing.summary(posixpath.join(path, listing.root).rstrip("/"))
        self._paths = tree.paths
        self._names = listing.names
        self._listing: Listing | None = listing
        spans = (tree.spans[listing.root + listing.names[k]] for k in range(len(listing)))
        self._spans = np.array(list(spans), np.int64).reshape(-1, len(Span._fields))

    def __len__(self) -> int:
        return len(self._names)

    def name(self, index: int) -> str:
        return self._names[index]

    def fingerprint(self) -> dict[str, int | str]:
        return self._listing.fingerprint() if self._listing else {}

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_listing": None}

    def read(self, indices: Iterable[int]) -> Iterator[bytes | BadImage]:
        """The encoded bytes of each image, or why there are none."""
        with contextlib.ExitStack() as stack:
            number, file = -1, None
            for index in indices:
                span = Span(*self._spans[index].tolist())
                if span.file != number:
                    stack.close()
                    try:
                        file = stack.enter_context(open(self._paths[span.file], "rb"))
                    except OSError as error:
                        raise unreadable(error, self._paths[span.file]) from None
                    number = span.file
                try:
                    data = _read_member(file, span)
                except OSError as error:
                    data = failure(error, self._paths[span.file])
                except BadImage as error:
                    data = error
                if isinstance(data, UserError):
                    raise data
                yield data


def _read_member(file: BinaryIO, span: Span) -> bytes:
    if max(span.stored, span.size) > MAX_FILE_BYTES:
        raise BadImage(f"the file is larger than {MAX_FILE_BYTES >> 20} MiB")
    file.seek(span.offset)
    if span.method == _NO_METHOD:
        data = file.read(span.size)
        if len(data) < span.size:
            raise BadImage("damaged archive: the data ends early")
        return data
    header = file.read(_LOCAL_HEADER_BYTES)
    if len(header) < _LOCAL_HEADER_BYTES or header[:4] != b"PK\x03\x04":
        raise BadImage("damaged zip: no header at the offset the directory gives")
    file.seek(int.from_bytes(header[26:28], "little") + int.from_bytes(header[28:30], "little"), os.SEEK_CUR)
    info = zipfile.ZipInfo()
    info.compress_type, info.compress_size, info.file_size, info.CRC = span.method, span.stored, span.size, span.crc
    try:
        data = zipfile.ZipExtFile(file, "r", info).read()
    except NotImplementedError:
        raise BadImage(f"zip compression method {span.method} is not supported") from None
    except zipfile.BadZipFile:
        raise BadImage("damaged zip: wrong checksum") from None
    except (zlib.error, lzma.LZMAError, EOFError, ValueError) as error:
        raise BadImage(f"damaged zip: {' '.join(str(error).split()) or 'the data ends early'}") from None
    if len(data) != span.size:
        raise BadImage("damaged zip: the data ends early")
    return data


def is_zip(path: str) -> bool:
    """Whether a file is a zip; a tar whose last member is one ends like a zip, too."""
    with open(path, "rb") as file:
        start = file.read(2)
    return start == b"PK" or (not path.lower().endswith(rules.TAR_ENDINGS) and zipfile.is_zipfile(path))


def open_zip(path: str, ask: Ask, endings: tuple[str, ...], names: str | None = None) -> Archive:
    """Lists a zip file.

    Args:
      names: encoding of file names that are not marked as UTF-8; None takes UTF-8 where that is possible, else the code
        page 437 of the format.

    Raises:
      UserError: damaged, encrypted or unsafe.
    """
    where = ask.where
    tree, total, old = Archive([path], endings), 0, []
    try:
        with zipfile.ZipFile(path, metadata_encoding=names) as archive:
            for info in archive.infolist():
                raw = info.orig_filename
                if not (raw.isascii() or names or info.flag_bits & _UTF8_FLAG):
                    try:
                        raw = raw.encode("cp437").decode("utf-8")
                    except UnicodeError:
                        old.append(raw)
                name = _safe_name(raw, where)
                if stat.S_ISLNK(info.external_attr >> 16):
                    raise UserError(f"{where} is refused: {raw!r} is a link; pack the files themselves")
                total += info.file_size
                if info.flag_bits & _ENCRYPTED_FLAG:
                    raise UserError(f"{where} is encrypted; unpack it and give the folder")
                span = Span(0, info.header_offset, info.compress_size, info.file_size, info.compress_type, info.CRC)
                tree.add(name, None if raw.endswith(("/", "\\")) else span, where)
    except LookupError:
        raise UserError(f"--zip_names={names} is no encoding that Python knows; try gbk, shift_jis or cp866") from None
    except (zipfile.BadZipFile, NotImplementedError, UnicodeError, ValueError, EOFError) as error:
        raise UserError(f"{where} is a damaged or incomplete zip file ({error}); fetch it again") from None
    if old:
        tree.notes.append(
            f"{where}: {len(old)} names are in an old code page and were read as cp437 (such as {old[0]!r}); if they look "
            "wrong give their encoding, for instance --zip_names=gbk"
        )
    _refuse_bomb(total, os.path.getsize(path), where)
    return tree


def open_tars(paths: Sequence[str], ask: Ask, endings: tuple[str, ...], labels: str, prefixes: Sequence[str] = ()) -> Archive:
    """Lists uncompressed tar files as one tree.

    Tars are shards of one tree where their names count up (WebDataset) or files with labels lie in them; else each is a
    folder of its name. Tars inside a tar are treated alike: those of ImageNet's tar of tars are a class each.

    Args:
      prefixes: the name of each tar among several, without ending.

    Raises:
      UserError: damaged or unsafe, or whether the tars are shards or classes is not clear.
    """
    tree = Archive(paths, endings)
    parts = []
    for number, (path, prefix) in enumerate(zip(paths, prefixes or [""], strict=True)):
        where = f"{ask.where} ({os.path.basename(path)})" if prefixes else ask.where
        members = [_Member(name, size, offset, number) for name, size, offset in _tar_members(path, where)]
        inner = [m for m in members if m.size is not None and m.name.lower().endswith(".tar")]
        if inner and not any(m.name.lower().endswith(endings) for m in members):
            found = [(posixpath.join(prefix, rules.stem(m.name)), _inner_members(path, m, ask)) for m in inner]
            shards = len(found) > 1 and _are_shards([name for name, _ in found], [m for _, m in found], ask, labels)
            parts += [(prefix, _apart(found))] if shards else found
            parts.append((prefix, [m for m in members if m not in inner]))
        else:
            parts.append((prefix, members))
    outer = [part for part in parts if part[1]]
    if len(paths) > 1 and _are_shards([name for name, _ in outer], [m for _, m in outer], ask, labels):
        outer = [("", _apart(outer))]
    for prefix, members in outer:
        for name, size, offset, number in members:
            span = None if size is None else Span(number, offset, size, size, _NO_METHOD, 0)
            tree.add(posixpath.join(prefix, name), span, ask.where)
    return tree


class _Member(NamedTuple):
    """size: None for a folder. offset: of the data, in tar `number`."""

    name: str
    size: int | None
    offset: int
    number: int


def _apart(shards: list[tuple[str, list[_Member]]]) -> list[_Member]:
    """The members of all shards, with the shard's name in their own where two would have the same."""
    counts = collections.Counter(m.name for _, members in shards for m in members if m.size is not None)
    repeated = any(count > 1 for count in counts.values())
    result = []
    for shard, members in shards:
        for member in members:
            if repeated and member.size is not None:
                folder, _, base = member.name.rpartition("/")
                base = f"{shard.replace('.', '_').replace('/', '_')}_{base}"
                member = member._replace(name=posixpath.join(folder, base))
            result.append(member)
    return result


def _are_shards(names: list[str], members: list[list[_Member]], ask: Ask, labels: str) -> bool:
    """Whether several tars are parts of one data set rather than a class each."""
    if labels == "folders" and not any("/" in m.name for found in members for m in found):
        return False
    if any(m.name.lower().endswith((".cls", ".json")) for found in members for m in found):
        return True
    numbers = [re.fullmatch(r"(.*?)(\d+)(?:-of-\d+)?", name) for name in names]
    if not all(numbers) or len({match[1] for match in numbers}) > 1 or all(re.fullmatch(r"n\d{8}", n) for n in names):
        return False
    order = sorted(int(match[2]) for match in numbers)
    plain = not all(len(match[2]) >= 3 or match[1] for match in numbers)  # 0.tar, 1.tar, ... may be digits
    if labels == "none" or (order == list(range(order[0], order[0] + len(order))) and not plain):
        return True
    what = "whose names are numbers" if plain else "whose numbers have gaps"
    raise UserError(
        f"{ask.where} holds tars {what} ({listed(sorted(names), 3)}): shards or classes? choose with {ask.labels}=none (shards "
        f"without labels) or {ask.labels}=folders (each tar is a class)"
    )


def _inner_members(path: str, outer: _Member, ask: Ask) -> list[_Member]:
    with open(path, "rb") as file:
        found = _members(_Part(file, outer.offset, outer.size), outer.size, f"{ask.where} ({outer.name})")
        return [_Member(name, size, outer.offset + offset, outer.number) for name, size, offset in found]


class _Part:
    """A part of a file as a file for `tarfile`, which needs read, seek and tell."""

    def __init__(self, file: BinaryIO, start: int, size: int):
        self._file, self._start, self._size, self._at = file, start, size, 0

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self._at = max(0, {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._size}[whence] + offset)
        return self._at

    def tell(self) -> int:
        return self._at

    def read(self, count: int = -1) -> bytes:
        left = max(0, self._size - self._at)
        self._file.seek(self._start + self._at)
        data = self._file.read(left if count < 0 else min(count, left))
        self._at += len(data)
        return data


def _tar_members(path: str, where: str) -> Iterator[tuple[str, int | None, int]]:
    with open(path, "rb") as file:
        yield from _members(file, os.path.getsize(path), where)


def _members(file: BinaryIO | _Part, length: int, where: str) -> Iterator[tuple[str, int | None, int]]:
    """(name, bytes or None for a folder, offset of the data) of every member."""
    try:
        with tarfile.open(fileobj=file, mode="r:") as archive:
            while (info := archive.next()) is not None:
                archive.members.clear()  # tarfile saves every header otherwise
                name = _safe_name(info.name, where)
                if not (info.isdir() or info.isreg()) or info.issparse():
                    kind = "a link" if info.issym() or info.islnk() else "not a plain file"
                    raise UserError(f"{where} is refused: {info.name!r} is {kind}; pack the files themselves")
                if info.offset_data + info.size > length:
                    raise UserError(f"{where} is truncated: {info.name!r} is not complete; fetch it again")
                yield name, info.size if info.isreg() else None, info.offset_data
            archive.fileobj.seek(archive.offset)
            if archive.fileobj.read(tarfile.BLOCKSIZE).strip(b"\0") or archive.offset >= length:
                raise UserError(f"{where} is damaged or truncated at byte {archive.offset}; fetch it again")
    except tarfile.TarError as error:
        raise UserError(f"{where} is a damaged tar file: {error}") from None


def outer_compression(path: str):
    """The function that opens a compressed tar (gzip, bzip2, xz); None for a file without such compression."""
    with open(path, "rb") as file:
        start = file.read(8)
    return next((opener for magic, opener in _OUTER_COMPRESSION if start.startswith(magic)), None)


def decompress(path: str, target: str, where: str) -> None:
    """Writes the uncompressed tar of a compressed one to `target`, so that it can be read at random.

    Raises:
      UserError: damaged, a decompression bomb, or the disk is full.
    """
    packed, total = os.path.getsize(path), 0
    try:
        with (
            outer_compression(path)(path, "rb") as source,
            atomic.writing(target, alone=True) as partial,
            open(partial, "wb") as file,
        ):
            while piece := source.read(_PIECE):
                total += len(piece)
                _refuse_bomb(total, packed, where)
                file.write(piece)
    except (EOFError, zlib.error, lzma.LZMAError, gzip.BadGzipFile) as error:
        raise UserError(f"{where} is damaged: {' '.join(str(error).split())}; fetch it again") from None
    except OSError as error:
        problem = f"cannot be decompressed to {target} ({error.strerror or error})"
        raise UserError(f"{where} {problem}: free space, or name another --output") from None


def _refuse_bomb(total: int, packed: int, where: str) -> None:
    if total > EXPANSION_FREE_BYTES and total > MAX_EXPANSION * packed:
        raise UserError(
            f"{where} is refused as a decompression bomb: {packed} bytes expand to more than {MAX_EXPANSION} times that"
        )


def _safe_name(name: str, where: str) -> str:
    """The member's path with "/" between parts. Raises UserError for one that points outside."""
    plain = name.replace("\\", "/")
    if plain.startswith("/") or re.match(r"[A-Za-z]:", plain) or ".." in plain.split("/") or "\0" in plain:
        raise UserError(f"{where} is refused: the member {name!r} points outside the archive")
    return posixpath.normpath(plain)
