"""`python -m lora_fsdp` is `lora-fsdp`."""

from lora_fsdp.cli.main import main

raise SystemExit(main())
