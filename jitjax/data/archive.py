"""Images inside a zip or tar file, read in place: nothing is unpacked except the outer compression of a tar.

Archives come from strangers. Names that point outside, links, devices and decompression bombs refuse the archive as a
whole.
"""

from __future__ import annotations

import bz2
import gzip
import lzma
import os
import posixpath
import re
import stat
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Iterable, Iterator

import numpy as np

from jitjax.data.image import MAX_FILE_BYTES, BadImage
from jitjax.data.listing import Listing, Names, arrange, is_hidden, is_image_name, train_folder
from jitjax.errors import UserError

# Images are compressed already: an honest archive of them expands less than tenfold, even one of bitmaps or tiny files
# in tar blocks.
MAX_EXPANSION = 100
EXPANSION_FREE_BYTES = 64 * 2**20
_PIECE = 2**20
_ZIP_LOCAL_HEADER = struct.Struct("<4s5H3I2H")
_OUTER_COMPRESSION = ((b"\x1f\x8b", gzip.open), (b"BZh", bz2.open), (b"\xfd7zXZ\x00", lzma.open))


class ArchiveInput:
    """The images of one archive in the order of an unpacked folder. Picklable; each process opens the file for itself.

    `_spans[k]` = (offset, stored bytes, bytes, zip method, crc32): for a tar the offset of the data and method -1, for
    a zip the offset of the local header.
    """

    def __init__(self, path: str, where: str, members: dict[str, tuple[int, int, int, int, int]], folders: set[str]):
        root = _image_root(members, folders)
        inside = {name[len(root) :]: span for name, span in members.items() if name.startswith(root)}
        tops = {name[len(root) :].partition("/")[0] for name in folders if name.startswith(root) and name != root}
        listing = arrange(((name, span[2]) for name, span in inside.items()), tops, where)
        self.path = path
        self.names: Names = listing.names
        self.labels = listing.labels
        self.classes = listing.classes
        self._listing: Listing | None = listing
        self._spans = np.array([inside[listing.names[k]] for k in range(len(listing))], np.int64)

    def __len__(self) -> int:
        return len(self.names)

    def name(self, index: int) -> str:
        return self.names[index]

    def fingerprint(self) -> dict[str, int | str]:
        return self._listing.fingerprint() if self._listing else {}

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_listing": None}

    def read(self, indices: Iterable[int]) -> Iterator[bytes | BadImage]:
        """The encoded bytes of each image, or why there are none."""
        with open(self.path, "rb") as file:
            for index in indices:
                try:
                    yield _read_member(file, *self._spans[index].tolist())
                except BadImage as error:
                    yield error


def _read_member(file, offset: int, stored: int, size: int, method: int, crc: int) -> bytes:
    if max(stored, size) > MAX_FILE_BYTES:
        raise BadImage(f"the file is larger than {MAX_FILE_BYTES >> 20} MiB")
    file.seek(offset)
    if method >= 0:
        header = file.read(_ZIP_LOCAL_HEADER.size)
        if len(header) < _ZIP_LOCAL_HEADER.size or header[:4] != b"PK\x03\x04":
            raise BadImage("damaged zip: no header at the place the directory gives")
        fields = _ZIP_LOCAL_HEADER.unpack(header)
        file.seek(fields[-2] + fields[-1], os.SEEK_CUR)
    data = file.read(stored)
    if len(data) < stored:
        raise BadImage("damaged archive: the data ends early")
    if method == zipfile.ZIP_DEFLATED:
        try:
            data = zlib.decompressobj(-zlib.MAX_WBITS).decompress(data, size + 1)
        except zlib.error as error:
            raise BadImage(f"damaged zip: {error}") from None
    elif method not in (-1, zipfile.ZIP_STORED):
        raise BadImage(f"zip compression method {method} is not supported")
    if method >= 0 and (len(data) != size or zlib.crc32(data) != crc):
        raise BadImage("damaged zip: wrong checksum")
    return data


def open_zip(path: str, where: str) -> ArchiveInput:
    """Lists the images of a zip file. Raises UserError for a damaged, encrypted or unsafe one."""
    members: dict[str, tuple[int, int, int, int, int]] = {}
    folders: set[str] = set()
    total = 0
    try:
        with zipfile.ZipFile(path) as archive:
            for info in archive.infolist():
                name = _safe_name(info.orig_filename, where)
                if stat.S_ISLNK(info.external_attr >> 16):
                    raise UserError(f"{where} is refused: {info.orig_filename!r} is a link; pack the files themselves")
                total += info.file_size
                if info.flag_bits & 1:
                    raise UserError(f"{where} is encrypted; unpack it and give the folder")
                span = (info.header_offset, info.compress_size, info.file_size, info.compress_type, info.CRC)
                _add(members, folders, name, info.orig_filename.endswith(("/", "\\")), span, where)
    except (zipfile.BadZipFile, NotImplementedError, struct.error, UnicodeDecodeError) as error:
        raise UserError(f"{where} is a damaged zip file: {error}") from None
    _refuse_bomb(total, os.path.getsize(path), where)
    return ArchiveInput(path, where, members, folders)


def open_tar(path: str, where: str) -> ArchiveInput:
    """Lists the images of an uncompressed tar file. Raises UserError for a damaged or unsafe one."""
    members: dict[str, tuple[int, int, int, int, int]] = {}
    folders: set[str] = set()
    length = os.path.getsize(path)
    try:
        with tarfile.open(path, "r:") as archive:
            while (info := archive.next()) is not None:
                archive.members.clear()  # tarfile keeps every header otherwise
                name = _safe_name(info.name, where)
                if not (info.isdir() or info.isreg()) or info.issparse():
                    kind = "a link" if info.issym() or info.islnk() else "not a plain file"
                    raise UserError(f"{where} is refused: {info.name!r} is {kind}; pack the files themselves")
                if info.offset_data + info.size > length:
                    raise UserError(f"{where} is truncated: {info.name!r} is not complete; fetch it again")
                _add(members, folders, name, info.isdir(), (info.offset_data, info.size, info.size, -1, 0), where)
            archive.fileobj.seek(archive.offset)
            if archive.fileobj.read(tarfile.BLOCKSIZE).strip(b"\0") or archive.offset >= length:
                raise UserError(f"{where} is damaged or truncated at byte {archive.offset}; fetch it again")
    except tarfile.TarError as error:
        raise UserError(f"{where} is a damaged tar file: {error}") from None
    return ArchiveInput(path, where, members, folders)


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
        with outer_compression(path)(path, "rb") as source, open(target + ".tmp", "wb") as file:
            while piece := source.read(_PIECE):
                total += len(piece)
                _refuse_bomb(total, packed, where)
                file.write(piece)
    except (EOFError, zlib.error, lzma.LZMAError, gzip.BadGzipFile) as error:
        raise UserError(f"{where} is damaged: {' '.join(str(error).split())}; fetch it again") from None
    except OSError as error:
        raise UserError(f"{where} cannot be decompressed to {target}: {error.strerror or error}") from None
    os.replace(target + ".tmp", target)


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


def _add(members: dict, folders: set[str], name: str, is_folder: bool, span: tuple, where: str) -> None:
    parent = name if is_folder else posixpath.dirname(name)
    while parent not in ("", ".") and parent + "/" not in folders:
        if not is_hidden(parent + "/"):
            folders.add(parent + "/")
        parent = posixpath.dirname(parent)
    if is_folder or not is_image_name(name) or is_hidden(name):
        return
    if name in members:
        raise UserError(f"{where} holds {name!r} twice; which one is meant is not clear")
    members[name] = span


def _image_root(members: Iterable[str], folders: Iterable[str]) -> str:
    """The folder inside the archive that is the data set: wrappers are passed through, then `train/` is taken."""
    root = ""
    while True:
        inside = [name[len(root) :] for name in members if name.startswith(root)]
        tops = {name[len(root) :].partition("/")[0] for name in folders if name.startswith(root) and name != root}
        flat = any("/" not in name for name in inside)
        train = train_folder(tops, flat)
        if train:
            return f"{root}{train}/"
        if flat or len(tops) != 1:
            return root
        (top,) = tops
        if any(name.count("/") == 1 for name in inside) or not inside:
            return root  # images directly in it: it is a class, not a wrapper
        root = f"{root}{top}/"
