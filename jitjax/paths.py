"""What a path on the command line means. Imports no JAX."""

from __future__ import annotations

import re
from pathlib import Path

from jitjax.errors import UserError


def local(path: str | Path, flag: str) -> Path:
    """`path` as an absolute local path; `~` is the home folder.

    Args:
      flag: named in the error, e.g. "--workdir".

    Raises:
      UserError: an address such as gs:// or s3://, or the home folder of nobody.
    """
    text = str(path)
    if match := re.match(r"([A-Za-z][A-Za-z0-9+.-]+):/", text):
        raise UserError(
            f"{flag}={text}: {match[1]}:// cannot be read or written; mount it (gcsfuse, mountpoint-s3, NFS) and name "
            "the local folder"
        )
    try:
        return Path(text).expanduser().absolute()
    except RuntimeError:
        raise UserError(f"{flag}={text}: there is no such home folder; write the path in full") from None


def workdir(path: str | Path, flag: str = "--workdir") -> Path:
    """Like `local`, for the folder of a run.

    Raises:
      UserError: `path` lies inside the checkpoints of a workdir, where a run would start afresh beside its own past.
    """
    here = local(path, flag)
    for folder in (here, *here.parents):
        step = folder.name.isdecimal() and (folder / "_CHECKPOINT_METADATA").exists()
        steps = folder.name == "checkpoints" and any(folder.glob("[0-9]*/_CHECKPOINT_METADATA"))
        if step or steps:
            owner = folder.parent.parent if step and folder.parent.name == "checkpoints" else folder.parent
            raise UserError(f"{flag}={path} lies inside the checkpoints of a run: give its workdir, {flag}={owner}")
    return here
