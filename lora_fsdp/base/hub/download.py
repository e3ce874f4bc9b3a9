"""A model's files onto the disk: only those needed, resumed after a break, each verified.

The client's `snapshot_download` discards a partial file when its process ends; on a slow line that
may be an hour's work. So each file goes through the client's `http_get` into a `.part` file, which
stays until it is complete and its hash is right.
"""

from __future__ import annotations

import errno
import hashlib
import logging
import re
import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub.errors import HfHubHTTPError
from huggingface_hub.file_download import http_get

from lora_fsdp.base.hub.sources import TRANSPORT_ERRORS, RemoteFile, RemoteModel, explain
from lora_fsdp.errors import DiskSpaceError, DownloadError, UnsupportedModelError

logger = logging.getLogger(__name__)

_ATTEMPTS = 3
_WEIGHTS = re.compile(r"model(-\d+-of-\d+)?\.safetensors")
_WANTED = re.compile(
    r"config\.json|generation_config\.json|model\.safetensors\.index\.json"
    r"|tokenizer.*\.(json|model)|.*\.tiktoken|special_tokens_map\.json|added_tokens\.json"
    r"|vocab\.(json|txt)|merges\.txt|chat_template\.(jinja|json)|LICENSE.*|README\.md"
)


def needed_files(model: RemoteModel) -> list[RemoteFile]:
    """Weights as safetensors, configuration, tokenizer, licence; small files first.

    Raises:
        UnsupportedModelError: it has no safetensors.
    """
    top = [file for file in model.files if "/" not in file.path]
    weights = [file for file in top if _WEIGHTS.fullmatch(file.path)]
    weights = weights or [file for file in top if file.path.endswith(".safetensors")]
    if not weights:
        raise UnsupportedModelError(
            f"{model.name} has no safetensors weights at this revision, and pickles (.bin, .pth) "
            "can run code when they are loaded: choose another --revision or model."
        )
    others = [file for file in top if _WANTED.fullmatch(file.path)]
    return sorted([*others, *weights], key=lambda file: (file in weights, file.path))


def download_files(
    model: RemoteModel,
    folder: Path,
    *,
    progress_class: Any = None,
    on_file: Callable[[RemoteFile, bool], None] | None = None,
) -> list[RemoteFile]:
    """Download what `needed_files` names into `folder`; the model itself is never loaded.

    Args:
        model: where from.
        folder: where to. Complete files that are there and right are kept.
        progress_class: a `tqdm` class for the bars of single files.
        on_file: called for each finished file, with whether it was there before.

    Raises:
        DiskSpaceError: they do not fit; found before the first byte, as far as it can be known.
        DownloadError: the connection broke off for good, or a file came out damaged.
    """
    files = needed_files(model)
    folder.mkdir(parents=True, exist_ok=True)
    there = {file.path for file in files if _is_right(folder / file.path, file)}
    _check_space(folder, [file for file in files if file.path not in there])
    for file in files:
        if file.path not in there:
            _download(file, folder, model=model, progress_class=progress_class)
        if on_file is not None:
            on_file(file, file.path in there)
    return files


def _check_space(folder: Path, files: Sequence[RemoteFile]) -> None:
    begun = sum(part.stat().st_size for part in (_part(folder, f) for f in files) if part.is_file())
    missing = sum(file.size for file in files) - begun
    free = shutil.disk_usage(folder).free
    if missing > free:
        raise DiskSpaceError(
            f"{missing / 1e9:.2f} GB are to be downloaded, but the disk of {folder} has "
            f"{free / 1e9:.2f} GB left: make room, or name another --output_dir."
        )


def _part(folder: Path, file: RemoteFile) -> Path:
    """The partial file; each version of the file has its own."""
    version = (file.sha256 or file.git_sha1 or "")[:12]
    return folder / f".{file.path}.{version}.part"


def _download(file: RemoteFile, folder: Path, *, model: RemoteModel, progress_class: Any) -> None:
    part = _part(folder, file)
    try:
        _fetch(file, part, model=model, progress_class=progress_class)
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        raise DiskSpaceError(
            f"The disk of {folder} is full, at {file.path}: make room and run the same command; "
            "what is there is kept."
        ) from error
    if not _is_right(part, file):
        part.unlink()
        raise DownloadError(
            f"{file.path} came out damaged (its size or hash is not what {model.server} says) and "
            "was removed: run the same command again."
        )
    part.replace(folder / file.path)


def _fetch(file: RemoteFile, part: Path, *, model: RemoteModel, progress_class: Any) -> None:
    """Fill `part` up; after a break go on, until several attempts bring nothing."""
    attempts = 0
    while True:
        before = part.stat().st_size if part.is_file() else 0
        try:
            with part.open("ab") as opened:
                http_get(
                    file.url,
                    opened,
                    resume_size=before,
                    headers=dict(model.headers),
                    expected_size=file.size,
                    displayed_filename=file.path,
                    tqdm_class=progress_class,
                )
            return
        except HfHubHTTPError as error:
            raise explain(
                error, name=model.name, revision=model.revision, server=model.server
            ) from error
        except TRANSPORT_ERRORS as error:
            got = part.stat().st_size
            attempts = 0 if got > before else attempts + 1
            if attempts >= _ATTEMPTS:
                raise DownloadError(
                    f"The connection to {model.server} broke off at {got} of {file.size} bytes of "
                    f"{file.path}: run the same command to go on from there."
                ) from error
            logger.warning("The connection broke off in %s; going on.", file.path)
            time.sleep(min(2**attempts, 10))
        except OSError as error:
            if error.errno is None:  # the client found another length than was told
                return
            raise


def _is_right(path: Path, file: RemoteFile) -> bool:
    """Whether the file is there, with the size and hash that the server says."""
    if not path.is_file() or path.stat().st_size != file.size:
        return False
    blob = f"blob {file.size}\0".encode()
    digest = hashlib.sha256() if file.sha256 else hashlib.sha1(blob, usedforsecurity=False)
    expected = file.sha256 or file.git_sha1
    with path.open("rb") as opened:
        return not expected or hashlib.file_digest(opened, lambda: digest).hexdigest() == expected
