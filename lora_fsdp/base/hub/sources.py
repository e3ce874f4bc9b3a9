"""Where model files come from: the Hugging Face Hub or a mirror of it, or ModelScope."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from urllib.parse import quote, urlencode

from huggingface_hub import HfApi, hf_hub_url
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import (  # type: ignore[attr-defined]
    build_hf_headers,
    get_session,
    hf_raise_for_status,
)

from lora_fsdp.errors import (
    ArgumentError,
    DownloadError,
    LoraFsdpError,
    ModelAccessError,
    ModelNotFoundError,
)
from lora_fsdp.printing import without_secrets

MODELSCOPE = "https://modelscope.cn"

# What the client's transport raises. Its package depends on the client's version (httpx, httpx2);
# the client's own error derives from it.
TRANSPORT_ERRORS: tuple[type[Exception], ...] = tuple(
    base for base in HfHubHTTPError.__bases__ if issubclass(base, Exception) and base is not OSError
)

_REQUEST_ERRORS: tuple[type[Exception], ...] = (
    HfHubHTTPError, OfflineModeIsEnabled, HFValidationError, *TRANSPORT_ERRORS
)  # fmt: skip


@dataclass(frozen=True)
class RemoteFile:
    """A file of a model.

    Attributes:
        path: its name in the model's folder.
        size: in bytes.
        sha256: of its contents, or `None` where the server tells only `git_sha1`.
        git_sha1: git's hash of it as a blob, or `None`.
        url: where it is.
    """

    path: str
    size: int
    sha256: str | None
    git_sha1: str | None
    url: str


@dataclass(frozen=True)
class RemoteModel:
    """A model at one revision: its files, and the headers to ask `server` for them with."""

    name: str
    revision: str
    server: str
    files: tuple[RemoteFile, ...]
    headers: Mapping[str, str]


def list_hub_model(name: str, *, revision: str, endpoint: str | None) -> RemoteModel:
    """A model on the Hub, at the commit that `revision` stands for now.

    Args:
        name: `owner/model`.
        revision: branch, tag or commit.
        endpoint: of a mirror; `None` = `HF_ENDPOINT`, or the Hub.

    Raises:
        ModelNotFoundError, ModelAccessError, DownloadError: there is no such model or revision, it
            may not be read, or the server cannot be reached.
    """
    api = HfApi(endpoint=endpoint)
    server = str(without_secrets(api.endpoint.rstrip("/")))
    try:
        info = api.model_info(name, revision=revision, files_metadata=True)
    except _REQUEST_ERRORS as error:
        raise explain(error, name=name, revision=revision, server=server) from error
    files = tuple(
        RemoteFile(
            path=file.rfilename,
            size=int(file.size or 0),
            sha256=None if file.lfs is None else file.lfs.sha256,
            git_sha1=file.blob_id if file.lfs is None else None,
            url=hf_hub_url(name, file.rfilename, revision=info.sha, endpoint=endpoint),
        )
        for file in info.siblings or ()
    )
    return RemoteModel(name, str(info.sha), server, files, build_hf_headers())


def list_modelscope_model(name: str, *, revision: str, endpoint: str | None) -> RemoteModel:
    """A model on ModelScope, through its HTTP API; no token is sent.

    Written from the API's shape in ModelScope's own SDK (`/api/v1/models/…/repo/files`) and tested
    against a server of that shape only.

    Raises:
        as `list_hub_model`.
    """
    server = (endpoint or MODELSCOPE).rstrip("/")
    revision = "master" if revision == "main" else revision  # ModelScope's usual branch
    base = f"{server}/api/v1/models/{quote(name)}/repo"
    server = str(without_secrets(server))  # from here on it is shown only
    query = urlencode({"Revision": revision, "Recursive": "true"})
    try:
        response = get_session().get(f"{base}/files?{query}", follow_redirects=True)
        hf_raise_for_status(response)
        listed = response.json()["Data"]["Files"]
    except _REQUEST_ERRORS as error:
        raise explain(error, name=name, revision=revision, server=server) from error
    except (ValueError, KeyError, TypeError) as error:
        raise DownloadError(f"{server} does not answer as ModelScope does: {error!r}.") from error
    files = tuple(
        RemoteFile(
            path=entry["Path"],
            size=int(entry["Size"]),
            sha256=entry.get("Sha256") or None,
            git_sha1=None,
            url=f"{base}?{urlencode({'Revision': revision, 'FilePath': entry['Path']})}",
        )
        for entry in listed
        if entry["Type"] == "blob"
    )
    return RemoteModel(name, revision, server, files, {})


def explain(error: BaseException, *, name: str, revision: str, server: str) -> LoraFsdpError:
    """What the client says about a request, as one sentence and what to do."""
    status = error.response.status_code if isinstance(error, HfHubHTTPError) else None
    if isinstance(error, OfflineModeIsEnabled):
        return DownloadError(
            f"{name} cannot be downloaded: HF_HUB_OFFLINE is set, which forbids the network. "
            "Unset it."
        )
    if isinstance(error, HFValidationError):
        return ArgumentError(f"{name!r} is no model's name: give it as owner/model.")
    if isinstance(error, GatedRepoError) or status == 403:
        return ModelAccessError(
            f"{name} is gated: accept its conditions at {server}/{name}, then log in with a token "
            "of that account (`hf auth login`, or HF_TOKEN)."
        )
    if isinstance(error, RevisionNotFoundError):
        return ModelNotFoundError(f"{name} has no revision {revision!r}: check --revision.")
    if isinstance(error, RepositoryNotFoundError) or status in (401, 404):
        return ModelNotFoundError(
            f"{server} has no model {name!r}, or it is private: check the spelling; for a private "
            "model log in first (`hf auth login`, or HF_TOKEN)."
        )
    if status is not None:
        return DownloadError(f"{server} answered {status} for {name}: try again later.")
    reason = " ".join(str(error).split()) or type(error).__name__
    return DownloadError(
        f"{server} cannot be reached ({reason}): check the connection, or name a mirror with "
        "--endpoint (for example https://hf-mirror.com) or --source modelscope."
    )
