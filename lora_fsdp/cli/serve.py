"""`lora-fsdp serve`: a finished adapter behind HTTP."""

from __future__ import annotations

import importlib.util
import time
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

from lora_fsdp.arguments.option import option
from lora_fsdp.cli.adapter import AdaptersOptions, load_adapters
from lora_fsdp.cli.command import Command
from lora_fsdp.errors import MissingPackageError
from lora_fsdp.printing import say
from lora_fsdp.serving.limits import Limits


@dataclass
class ServeOptions:
    """Where it listens, and who may ask."""

    _argument_group_name: ClassVar[str] = "server"

    host: str = option(
        "127.0.0.1", "Address to listen on; 0.0.0.0 = all of this machine's, for everyone."
    )
    port: int = option(8000, "Port to listen on; 0 = any free one, which is printed.")
    api_key_file: str | None = option(
        None, "File with a key that requests must bring (Authorization: Bearer KEY)."
    )
    served_name: str | None = option(
        None, "Name of the model in requests and answers; the adapter folder's when not given."
    )
    calibrated: Literal["true", "false"] = option(
        "true", "Give probabilities by the calibration that the run fitted on held-out rows."
    )
    questions: list[str] | None = option(
        None, "Ask only these of a task with several questions, by their columns."
    )


def serve(options: ServeOptions, adapter: AdaptersOptions, limits: Limits) -> int:
    """Load the adapter and answer until it is told to stop."""
    began = time.perf_counter()
    for package in ("starlette", "uvicorn"):
        if importlib.util.find_spec(package) is None:
            raise MissingPackageError(
                f"lora-fsdp serve needs the package {package}, which is not installed: "
                'pip install "lora-fsdp[serve]".'
            )
    limits.check()
    folders = adapter.folders()
    from lora_fsdp.evaluation.prediction import read_task
    from lora_fsdp.serving.served import Served
    from lora_fsdp.serving.server import BACKLOG, bound_socket, exposure, read_api_key
    from lora_fsdp.serving.server import serve as serve_on

    api_key = read_api_key(options.api_key_file)
    for folder in folders:
        read_task(folder)
    bound = bound_socket(options.host, options.port)
    with bound:
        if (line := exposure(options.host, api_key=api_key)) is not None:
            say(line)
        predictor = load_adapters(
            adapter,
            folders,
            calibrated=options.calibrated == "true",
            questions=options.questions,
        )
        name = options.served_name or Path(adapter.adapter[0]).resolve().name
        served = Served(predictor, name)
        served.check()
        bound.listen(BACKLOG)
        host, port = bound.getsockname()[:2]
        shown = f"[{host}]" if ":" in host else host
        if predictor.calibration is not None:
            say(f"Probabilities are calibrated: {predictor.calibration.described()}")
        say(
            f"Serving {name} (task {served.task.name}) on http://{shown}:{port} after "
            f"{time.perf_counter() - began:.1f} s; stop it with Ctrl-C or SIGTERM.",
            flush=True,
        )
        serve_on(served, bound, limits=limits, api_key=api_key)
    return 0


COMMANDS = (
    Command(
        name="serve",
        summary="Answer over HTTP with a finished adapter: rows, or OpenAI's chat completions.",
        examples=(
            "serve --adapter runs/mine",
            "serve --adapter runs/mine --port 9000 --max_rows 64",
            "serve --adapter runs/mine --host 0.0.0.0 --api_key_file key.txt",
        ),
        options=(ServeOptions, AdaptersOptions, Limits),
        run=serve,
    ),
)
