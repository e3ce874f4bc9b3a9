"""`lora-fsdp download`: a model into a folder, from the Hub, a mirror of it, or ModelScope."""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from lora_fsdp.arguments.option import option
from lora_fsdp.cli.command import Command, print_json, required
from lora_fsdp.cli.terminal import is_live, write

if TYPE_CHECKING:
    from lora_fsdp.base.hub.sources import RemoteFile


@dataclass
class DownloadOptions:
    """What, from where, and where to."""

    model: str = option("", "The model: owner/name.")
    output_dir: str | None = option(None, "Folder to fill; models/<name> when not given.")
    revision: str = option("main", "Branch, tag or commit.")
    source: Literal["hub", "modelscope"] = option(
        "hub", "Hugging Face Hub (or a mirror of it), or ModelScope."
    )
    endpoint: str | None = option(
        None, "Address of a mirror; HF_ENDPOINT, or the source's own, if not given."
    )
    json: bool = option(False, "Print the result as JSON.")


def download(options: DownloadOptions) -> int:
    """List, check, download, verify."""
    name = required(options.model, "MODEL", "a model, as owner/name")
    # Files come by plain HTTP, which a mirror also speaks, and which can be resumed.
    os.environ.setdefault("HF_HUB_DISABLE_XET", "1")
    from lora_fsdp.base.hub.download import download_files
    from lora_fsdp.base.hub.sources import list_hub_model, list_modelscope_model

    # It warns at every retry; of what comes of them there is one sentence.
    logging.getLogger("huggingface_hub.file_download").setLevel(logging.ERROR)
    listing = list_modelscope_model if options.source == "modelscope" else list_hub_model
    model = listing(name, revision=options.revision, endpoint=options.endpoint)
    folder = Path(options.output_dir or Path("models") / name.rpartition("/")[2])
    if not options.json:
        write(f"{name} at {model.revision[:12]} from {model.server} into {folder}")

    def report(file: RemoteFile, was_there: bool) -> None:
        if not options.json:
            size = f"{file.size / 1e6:>10.1f} MB"
            write(f"{size}  {file.path}{'  (was there)' if was_there else ''}")

    files = download_files(model, folder, progress_class=_bar_class(), on_file=report)
    if options.json:
        sizes = {file.path: file.size for file in files}
        print_json({"folder": str(folder), "revision": model.revision, "files": sizes})
        return 0
    write(f"verified {len(files)} files, {sum(file.size for file in files) / 1e9:.2f} GB")
    write(f"use it with --model_name_or_path {folder}")
    return 0


def _bar_class() -> type:
    from tqdm.auto import tqdm

    class Bar(tqdm):
        """A bar for a file, on a terminal only."""

        def __init__(self, *args: object, **options: object) -> None:
            options["disable"] = not is_live()
            options.pop("name", None)  # the client's own, for switching groups of bars off
            super().__init__(*args, **options)

    return Bar


COMMANDS = (
    Command(
        name="download",
        summary="Download a model's safetensors, configuration and tokenizer, and verify them.",
        examples=(
            "download HuggingFaceTB/SmolLM2-135M-Instruct",
            "download deepseek-ai/deepseek-llm-7b-base --endpoint https://hf-mirror.com",
            "download deepseek-ai/deepseek-llm-7b-base --source modelscope --output_dir models/7b",
        ),
        options=(DownloadOptions,),
        run=download,
        positional="model",
    ),
)
