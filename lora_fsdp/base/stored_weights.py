"""A base model's weights on disk, read tensor by tensor."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from transformers import AutoConfig, PreTrainedModel
from transformers.initialization import no_init_weights

from lora_fsdp.base.folders import (
    contained_file,
    files_by_tensor,
    open_safetensors,
    read_json_object,
)
from lora_fsdp.base.loading import LOADING_ERRORS, first_line
from lora_fsdp.base.multimodal import auto_class
from lora_fsdp.errors import (
    AdapterVerificationError,
    ModelNotFoundError,
    UnsafeFileError,
    UnsupportedModelError,
)

WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
_DOWNLOADED = ["*.safetensors", "*.json", "*.jinja", "*.model", "*.txt"]
_MAPPED_AT_MOST = 256_000_000
#: Dtypes that are not quantised, in safetensors' words, and the bytes of a value.
PLAIN_DTYPES = {"F64": 8, "F32": 4, "BF16": 2, "F16": 2}


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a safetensors file: shape, dtype in safetensors' words, and file."""

    shape: tuple[int, ...]
    dtype: str
    file: str


class _Opened(threading.local):
    """The file that a thread has open, how many bytes of it it has mapped, and how many it may."""

    name = ""
    file: Any = None
    mapped = 0

    def __init__(self) -> None:
        is_one_of_several = threading.current_thread() is not threading.main_thread()
        self.at_most = _MAPPED_AT_MOST // (8 if is_one_of_several else 1)


class BaseWeights:
    """The safetensors files of a model folder, which several threads may read.

    Each has one file open at a time, and opens it anew after every 256 MB (32 MB beside the main
    thread): what was read of it stays mapped until then, so that no more than that, and a tensor,
    counts as memory in use.

    Attributes:
        folder: the model's folder.
        tensors: what is stored, by name, in the order of the files.
    """

    def __init__(self, folder: Path) -> None:
        """Read the files' headers.

        Raises:
            ModelNotFoundError: there are no safetensors weights, or they are incomplete or damaged.
            UnsafeFileError: the index names a file outside the folder.
        """
        self.folder = folder
        self.tensors: dict[str, StoredTensor] = {}
        self._opened = _Opened()
        try:
            listed = _listed_tensors(folder)
            for file in sorted(set(listed.values())) or [WEIGHTS_FILE]:
                self._read_header(file, listed)
        except AdapterVerificationError as error:
            raise ModelNotFoundError(f"The base model is incomplete: {error}") from error
        if missing := sorted(listed.keys() - self.tensors.keys()):
            raise ModelNotFoundError(
                f"{folder} lacks {len(missing)} of the tensors that its {INDEX_FILE} names (for "
                f"example {missing[0]})."
            )

    def _read_header(self, file: str, listed: Mapping[str, str]) -> None:
        opened = self._file(file)
        for name in opened.keys():  # noqa: SIM118 (not a mapping)
            if listed and listed.get(name) != file:
                continue
            part = opened.get_slice(name)
            self.tensors[name] = StoredTensor(tuple(part.get_shape()), part.get_dtype(), file)

    def _file(self, name: str) -> Any:
        opened = self._opened
        if name != opened.name or opened.mapped > opened.at_most:
            opened.file = None
            opened.file = open_safetensors(self.folder, name)
            opened.name, opened.mapped = name, 0
        return opened.file

    def _noted(self, numbers: torch.Tensor) -> torch.Tensor:
        """What was read, which stays mapped for a while."""
        self._opened.mapped += numbers.nbytes
        return numbers

    def read(self, name: str) -> torch.Tensor:
        """The whole tensor, on the CPU."""
        return self._noted(self._file(self.tensors[name].file).get_tensor(name))

    def reader(self, name: str) -> Callable[[tuple[slice, ...]], torch.Tensor]:
        """Reads parts of a tensor, in the thread that asked for it."""
        stored = self._file(self.tensors[name].file).get_slice(name)
        return lambda part: self._noted(stored[part])


def _listed_tensors(folder: Path) -> dict[str, str]:
    """File by tensor name from the index; empty if there is a single file, or both."""
    _refuse_other_weights(folder)
    # Of a single file and an index, transformers and PEFT load the file.
    if (folder / WEIGHTS_FILE).is_file() or not (folder / INDEX_FILE).is_file():
        if not (folder / WEIGHTS_FILE).is_file():
            pickles = sorted(path.name for path in folder.glob("pytorch_model*.bin"))
            hint = pickles and (
                f" Its {pickles[0]} is a pickle, which is not read tensor by tensor: load the "
                "model once with transformers and save it with save_pretrained."
            )
            raise AdapterVerificationError(f"{folder} holds no {WEIGHTS_FILE}.{hint or ''}")
        return {}
    listed = files_by_tensor(folder, INDEX_FILE)
    for file in set(listed.values()):
        if not file.endswith(".safetensors"):
            raise UnsafeFileError(
                f"{folder / INDEX_FILE} names {file[:80]!r}, which is no .safetensors file: it is "
                "not opened."
            )
    return listed


def _refuse_other_weights(folder: Path) -> None:
    """Refuse a folder whose config.json has transformers load another file than is read here."""
    if not (folder / "config.json").is_file():
        return
    named = read_json_object(folder, "config.json").get("transformers_weights")
    if named not in (None, WEIGHTS_FILE):
        raise AdapterVerificationError(
            f"{folder / 'config.json'} names {str(named)[:80]!r} as the weights "
            "(transformers_weights), which is not read tensor by tensor: load the model once with "
            "transformers and save it with save_pretrained."
        )


def base_folder(name: str, *, revision: str = "main", with_weights: bool = True) -> Path:
    """The model's folder; a Hub name is downloaded, or taken from the cache.

    Args:
        name: a folder or a Hub name.
        revision: on the Hub.
        with_weights: download the weights too, and not only what describes them.

    Raises:
        ModelNotFoundError: there is no such folder or model.
    """
    folder = Path(name).expanduser()
    if folder.is_dir():
        return folder
    try:
        patterns = _DOWNLOADED if with_weights else _DOWNLOADED[1:]
        return Path(snapshot_download(name, revision=revision, allow_patterns=patterns))
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise ModelNotFoundError(
            f"There is no model folder {folder.absolute()}, and the Hub gives no model {name!r}: "
            f"{str(error).splitlines()[0]}"
        ) from error


def base_skeleton(folder: Path, *, trust_remote_code: bool = False) -> PreTrainedModel:
    """The model that a folder's config.json describes, on the meta device.

    Raises:
        ModelNotFoundError: there is no config.json.
        UnsupportedModelError: it is not a causal language model's.
    """
    if not (folder / "config.json").is_file():
        raise ModelNotFoundError(f"The folder {folder} holds no model (config.json is missing).")
    contained_file(folder, "config.json")
    try:
        config = AutoConfig.from_pretrained(str(folder), trust_remote_code=trust_remote_code)
        with torch.device("meta"), no_init_weights():
            skeleton = auto_class(config).from_config(config, trust_remote_code=trust_remote_code)
    except (OSError, *LOADING_ERRORS) as error:
        raise UnsupportedModelError(
            f"{folder / 'config.json'} describes no causal language model: {first_line(error)}"
        ) from error
    skeleton.tie_weights()
    return skeleton
