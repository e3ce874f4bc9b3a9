"""A finished adapter behind HTTP: `lora-fsdp serve`."""
