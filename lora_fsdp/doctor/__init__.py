"""The doctor: what would go wrong with a run, said before anything expensive is done."""

from lora_fsdp.doctor.diagnosis import RULES, Diagnosis, diagnose
from lora_fsdp.doctor.finding import Finding, Severity
from lora_fsdp.doctor.machine import Machine, MachineGpu

__all__ = ["RULES", "Diagnosis", "Finding", "Machine", "MachineGpu", "Severity", "diagnose"]
