"""Runs a function on several real ranks (gloo), as a launcher with an accelerate YAML would."""

from __future__ import annotations

import ctypes
import gc
import multiprocessing
import os
import socket
import traceback
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import yaml

if TYPE_CHECKING:
    from tests.support.hosts import Host

CONFIGS = Path(__file__).resolve().parents[2] / "accelerate_configs"
TIMEOUT_SECONDS = 240
EXIT_SECONDS = 60

# The server imports once what every rank needs; ranks are forked from it. The later ones are what a
# run imports where it first needs it: half of a toy run's time, were it left to every rank. Nothing
# on a GPU: bitsandbytes, which PEFT imports, talks to it at once, and no process can after a fork.
_PRELOADED = [
    "lora_fsdp",
    "tests.support.runs",
    "peft.tuners.lora.bnb",
    "rich.progress",
    "sklearn.metrics",
    "sklearn.model_selection",
    "transformers.models.llama.modeling_llama",
]
_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload([] if torch.cuda.is_available() else _PRELOADED)


class RankError(AssertionError):
    """A rank raised; `kind` is the exception's class name, `text` its message."""

    def __init__(self, kind: str, text: str, trace: str) -> None:
        super().__init__(trace)
        self.kind = kind
        self.text = text


def launch_environment(config: str | None, **fsdp_overrides: str) -> dict[str, str]:
    """The variables that `accelerate launch --config_file` sets for the ranks."""
    if config is None:
        return {}
    contents = yaml.safe_load((CONFIGS / config).read_text())
    variables = {"ACCELERATE_USE_CPU": str(contents.get("use_cpu", False))}
    if contents["distributed_type"] == "FSDP":
        variables["ACCELERATE_USE_FSDP"] = "true"
        for key, value in contents["fsdp_config"].items():
            # accelerate's name for this one is shorter than its key.
            key = key.replace("transformer_layer_cls", "transformer_cls")
            variables[key.upper()] = str(value).lower() if isinstance(value, bool) else str(value)
    if sizes := contents.get("parallelism_config"):
        variables["ACCELERATE_USE_PARALLELISM_CONFIG"] = "true"
        variables |= {key.upper(): str(value) for key, value in sizes.items()}
    return variables | fsdp_overrides


def run_ranks(
    function: Callable[..., Any],
    *arguments: Any,
    world_size: int = 2,
    environment: Mapping[str, str] | list[Mapping[str, str]] | None = None,
    launched: bool | None = None,
    hosts: Sequence[Host] = (),
) -> list[Any]:
    """`function(*arguments)` on every rank; the list of what the ranks returned.

    `environment` is for all ranks, or a list with one for each. `launched` says whether the ranks
    have a rendezvous, as those of a launcher do (by default, if there are several). They are
    divided evenly between `hosts`, if there are any.
    """
    processes, pipes = start_ranks(
        function,
        *arguments,
        world_size=world_size,
        environment=environment,
        launched=launched,
        hosts=hosts,
    )
    try:
        results = _collect(pipes)
        for process in processes:
            process.join(timeout=EXIT_SECONDS)
        # A rank that hangs at its end would hang a run that has done its work.
        ends = [process.exitcode for process in processes]
        assert ends == [0] * world_size, f"ranks ended with {ends} (None: not at all)"
        return results
    finally:
        for process in processes:
            process.join(timeout=5)
            if process.is_alive():
                process.kill()
                process.join()


def start_ranks(
    function: Callable[..., Any],
    *arguments: Any,
    world_size: int,
    environment: Mapping[str, str] | list[Mapping[str, str]] | None = None,
    launched: bool | None = None,
    hosts: Sequence[Host] = (),
) -> tuple[list[BaseProcess], list[Connection]]:
    """As `run_ranks`, without waiting: the processes, and where each will say how it ended."""
    launched = world_size > 1 if launched is None else launched
    shared = environment or {}
    each = shared if isinstance(shared, list) else [shared] * world_size
    port = _free_port()
    processes: list[BaseProcess] = []
    pipes = []
    for rank in range(world_size):
        ours, theirs = _context.Pipe()
        meeting = _rendezvous(rank, world_size, port) if launched else {}
        namespace = None
        if hosts:
            meeting, namespace = _of_hosts(rank, world_size, hosts)
        variables = {**each[rank], **meeting}
        process = _context.Process(
            target=_rank_main, args=(theirs, variables, namespace, function, arguments)
        )
        process.start()
        theirs.close()
        processes.append(process)
        pipes.append(ours)
    return processes, pipes


def start_on(
    host: Host, function: Callable[..., Any], *arguments: Any, variables: Mapping[str, str]
) -> BaseProcess:
    """A process on a host that calls `function(*arguments)`; what it needs is imported already."""
    process = _context.Process(
        target=_main_on_host, args=(host.namespace, dict(variables), function, arguments)
    )
    process.start()
    return process


def _main_on_host(
    namespace: str, variables: Mapping[str, str], function: Callable[..., Any], arguments: Any
) -> None:
    _enter(namespace)
    os.environ.update(variables, GLOO_SOCKET_IFNAME="eth0")
    torch.set_num_threads(1)
    gc.freeze()
    function(*arguments)


def _collect(pipes: list[Connection]) -> list[Any]:
    results: dict[int, Any] = {}
    while len(results) < len(pipes):
        pending = [pipe for index, pipe in enumerate(pipes) if index not in results]
        ready = wait(pending, timeout=TIMEOUT_SECONDS)
        if not ready:
            raise TimeoutError(f"ranks hang: only {sorted(results)} answered")
        for pipe in ready:
            outcome, value = pipe.recv()
            if outcome == "error":
                raise RankError(*value)
            results[pipes.index(pipe)] = value
    return [results[index] for index in range(len(pipes))]


def _rank_main(
    pipe: Connection,
    variables: Mapping[str, str],
    namespace: str | None,
    function: Callable[..., Any],
    arguments: Any,
) -> None:
    import torch.distributed as dist

    if namespace is not None:
        _enter(namespace)
    os.environ.update(variables)
    torch.set_num_threads(1)
    gc.freeze()  # what the server imported is in no collection, as in the tests' own process
    try:
        pipe.send(("result", function(*arguments)))
        if dist.is_initialized():
            # A rank that is gone before all the others have met ends their meeting with an error.
            with suppress(RuntimeError):  # of another rank, which tells its own
                dist.barrier()
    except BaseException as error:
        pipe.send(("error", (type(error).__name__, str(error), traceback.format_exc())))
    finally:
        pipe.close()
        if dist.is_initialized():
            dist.destroy_process_group()


def _rendezvous(rank: int, world_size: int, port: int) -> dict[str, str]:
    # Ranks share what GPUs there are, as if they were on several machines of so many.
    local_size = min(world_size, torch.cuda.device_count() or world_size)
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank % local_size),
        "WORLD_SIZE": str(world_size),
        "LOCAL_WORLD_SIZE": str(local_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }


def _of_hosts(rank: int, world_size: int, hosts: Sequence[Host]) -> tuple[dict[str, str], str]:
    """The variables that torchrun sets on several hosts, and the rank's network namespace."""
    each = world_size // len(hosts)
    place, local = divmod(rank, each)
    variables = {
        **_rendezvous(rank, world_size, 29500),
        "LOCAL_RANK": str(local),
        "LOCAL_WORLD_SIZE": str(each),
        "GROUP_RANK": str(place),
        "GROUP_WORLD_SIZE": str(len(hosts)),
        "MASTER_ADDR": hosts[0].address,
        "GLOO_SOCKET_IFNAME": "eth0",  # the name of this machine is none of these hosts'
    }
    return variables, hosts[place].namespace


def _enter(namespace: str) -> None:
    """Put this process into a network namespace (setns(2))."""
    new_network = 0x40000000  # CLONE_NEWNET
    with Path("/var/run/netns", namespace).open() as opened:
        if ctypes.CDLL(None, use_errno=True).setns(opened.fileno(), new_network):
            raise OSError(ctypes.get_errno(), f"setns {namespace}")


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
