"""Reading one file, and telling a bad file from a bad system."""

from __future__ import annotations

import errno
import os
import stat
import time

from jitjax.data.image import MAX_FILE_BYTES, BadImage
from jitjax.errors import UserError

_ATTEMPTS = 3  # a network disk may fail once; a file that is missing or forbidden fails at once
CANNOT_READ = "cannot be read: "  # starts the reason of a file that the system would not give, decodable or not
_TOO_MANY = (errno.EMFILE, errno.ENFILE)
_GONE = frozenset(
    getattr(errno, name)
    for name in (
        *("ESTALE", "ENOTCONN", "EHOSTDOWN", "EHOSTUNREACH", "ENETDOWN", "ENETUNREACH", "ETIMEDOUT", "ENODEV", "ENXIO"),
        *("ESHUTDOWN", "ECONNRESET", "ECONNABORTED", "EREMOTEIO"),
    )
    if hasattr(errno, name)
)


def read_file(path: str) -> bytes:
    """The bytes of a file.

    Raises:
      BadImage: this file has none, with the reason.
      UserError: the system is at fault and the next file would fail too: too many open files, a share that went away.
    """
    for attempt in range(_ATTEMPTS):
        try:
            return _read_once(path)
        except OSError as error:
            lasting = isinstance(error, FileNotFoundError | PermissionError | IsADirectoryError)
            if lasting or attempt == _ATTEMPTS - 1:
                raise failure(error, path) from None
            time.sleep(0.1 * 4**attempt)
    raise AssertionError("unreachable")


def failure(error: OSError, path: str) -> BadImage | UserError:
    """What an error of the system means: a `UserError` where it is not this file's fault."""
    reason = os.strerror(error.errno) if error.errno else type(error).__name__
    if error.errno in _TOO_MANY:
        return UserError(f"{path}: {reason}; raise the limit (ulimit -n) or lower the number of workers")
    if error.errno in _GONE:
        return UserError(f"{path}: {reason}; the disk or share does not answer: bring it back and start again")
    return BadImage(CANNOT_READ + reason)


def unreadable(error: Exception, path: str) -> UserError:
    """One line for an input file that cannot be read at all."""
    if isinstance(error, OSError) and error.errno:
        fault = failure(error, path)
        return fault if isinstance(fault, UserError) else UserError(f"{path} {fault}")
    return UserError(f"{path} is damaged: {str(error)[:200] or type(error).__name__}")


def require(path: str, where: str, wanted: str) -> None:
    """That `path` is there.

    Raises:
      UserError: it is not (`where` names it for the user, `wanted` says what to give instead), or the system does not say: no
        permission for a folder above it, a share that went away.
    """
    try:
        os.stat(path)
    except (FileNotFoundError, NotADirectoryError, ValueError):  # ValueError: a NUL in the name
        raise UserError(f"{where} does not exist; give it {wanted}") from None
    except OSError as error:
        raise unreadable(error, where) from None


def _read_once(path: str) -> bytes:
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)  # opening a pipe must not wait for a writer
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise BadImage("not a file")
        if status.st_size > MAX_FILE_BYTES:
            raise BadImage(f"the file is larger than {MAX_FILE_BYTES >> 20} MiB")
        data = os.read(descriptor, status.st_size)
        while len(data) < status.st_size and (more := os.read(descriptor, status.st_size - len(data))):
            data += more
        return data
    finally:
        os.close(descriptor)
