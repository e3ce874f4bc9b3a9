"""Reports on runs, drawn from the files in their folders alone, at any time."""

from lora_fsdp.reporting.report import write_report
from lora_fsdp.reporting.side_by_side import write_comparison

__all__ = ["write_comparison", "write_report"]
