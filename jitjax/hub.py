"""Models on the Hugging Face Hub, by name: hf://OWNER/NAME, hf://OWNER/NAME@REVISION, and with /FOLDER or /FILE inside.

Needs the huggingface_hub package, whose settings apply: HF_TOKEN, HF_HOME (the cache), HF_HUB_OFFLINE, HF_ENDPOINT. Imports
no JAX.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from jitjax.errors import UserError

PREFIX = "hf://"
NAME = re.compile(r"hf://(?P<repo>[\w.-]+/[\w.-]+)(?:@(?P<revision>[^/]+))?(?:/(?P<inside>.+?))?/?")
CARD, PICTURE = "README.md", "samples.png"


def is_name(path: Any) -> bool:
    """Whether a model is named on the hub, not a path."""
    return str(path).startswith(PREFIX)


def download(name: str) -> Path:
    """The local copy of a model's files, downloaded where the cache has no newer ones: a folder, or the file that is named.

    Of a folder the weights in safetensors are taken, and what describes them.

    Raises:
      UserError: no such name, no access, no network and nothing in the cache, or no weights there.
    """
    from jitjax.interop.sources import WEIGHT_ENDINGS, WEIGHT_FILES

    repo, revision, inside = _parse(name)
    is_file = inside.endswith(WEIGHT_ENDINGS)
    folder = str(Path(inside).parent if is_file else inside)
    prefix = "" if folder in ("", ".") else f"{folder}/"
    wanted = [f"{prefix}config.json", f"{prefix}model_index.json"]
    if is_file:
        wanted.append(inside)
    else:
        weights = [file for file in WEIGHT_FILES if ".safetensors" in file]
        weights += [f"{file.split('.')[0]}-*-of-*.safetensors" for file in weights if not file.endswith(".json")]
        wanted += [prefix + part + file for part in ("", "transformer/") for file in (*weights, "config.json")]
    with _one_line(name):
        local = Path(_library().snapshot_download(repo, revision=revision, allow_patterns=wanted)) / inside
    if not (local.is_file() if is_file else any(local.glob("**/*.safetensors"))):
        hint = "" if is_file else f" as safetensors; name another file of weights: {PREFIX}{repo}/FILE.pth"
        raise UserError(f"{name}: there are no such weights{hint}")
    return local


def push(folder: Path, name: str, *, private: bool | None, message: str) -> tuple[str, list[str]]:
    """Uploads a folder as one commit to a repository, which is made if there is none.

    A model card that the repository has already may have been edited there: it stays, and so does its picture.

    Returns:
      the address, and lines to print.

    Raises:
      UserError: no such owner, no token that may write, or no network.
    """
    repo, revision, inside = _parse(name)
    if inside:
        raise UserError(f"{name}: name a repository, {PREFIX}{repo}, without {inside}")
    with _one_line(name):
        hub = _library()
        api, notes, ignored = hub.HfApi(), [], []
        api.create_repo(repo, private=private, exist_ok=True)
        if revision:
            api.create_branch(repo, branch=revision, exist_ok=True)
        if api.file_exists(repo, CARD, revision=revision):
            ignored = [CARD, PICTURE]
            notes.append(f"{CARD} and {PICTURE} of {repo} stay as they are; delete {CARD} there to have them written again")
        api.upload_folder(
            repo_id=repo, folder_path=folder, revision=revision, commit_message=message, ignore_patterns=ignored or None
        )
        return f"{api.endpoint}/{repo}" + (f"/tree/{revision}" if revision else ""), notes


def _parse(name: str) -> tuple[str, str | None, str]:
    match = NAME.fullmatch(name)
    if not match:
        raise UserError(f"{name}: a model on the hub is hf://OWNER/NAME or hf://OWNER/NAME@REVISION, e.g. hf://me/jit-b4")
    return match["repo"], match["revision"], match["inside"] or ""


def _library() -> Any:
    try:
        import huggingface_hub
    except ImportError:
        raise UserError("models on the Hugging Face Hub need its package: pip install -e '.[hub]' in jitjax's folder") from None
    return huggingface_hub


@contextlib.contextmanager
def _one_line(name: str) -> Iterator[None]:
    """Whatever the hub's package raises (of its own, of its HTTP library, of the system) as one line."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        raise UserError(f"{name}: {lines[0] if lines else ''} ({type(error).__name__})") from error
