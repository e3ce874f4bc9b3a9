"""torchrun for machines that come and go: `python -m lora_fsdp.cli.torchrun`, torchrun's options.

It is torchrun with the rendezvous of `lora_fsdp.distributed.elastic`.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from torch.distributed.elastic.multiprocessing.errors import record
from torch.distributed.run import determine_local_world_size, parse_args, run

from lora_fsdp.distributed.elastic import BACKEND, PROCESSES, register
from lora_fsdp.errors import LaunchError
from lora_fsdp.failures import report_failure


@record
def main(words: Sequence[str] | None = None) -> None:
    """Run torchrun with our rendezvous.

    Raises:
        LaunchError: it was asked for another one.
    """
    args = parse_args(list(sys.argv[1:] if words is None else words))
    if args.rdzv_backend != "c10d" or not args.rdzv_endpoint:
        raise LaunchError(
            f"--rdzv_backend {args.rdzv_backend} with --rdzv_endpoint {args.rdzv_endpoint!r} lets "
            "no machine come or go: give --rdzv_backend c10d --rdzv_endpoint FIRST_MACHINE:29500, "
            "or start torchrun."
        )
    register()
    args.rdzv_backend = BACKEND
    processes = determine_local_world_size(args.nproc_per_node)
    given = f"{args.rdzv_conf}," if args.rdzv_conf else ""
    args.rdzv_conf = f"{given}{PROCESSES}={processes}"
    run(args)


if __name__ == "__main__":
    sys.excepthook = report_failure
    main()
