"""GPUs that can be rented, and what a plan needs to know of them."""

from __future__ import annotations

import difflib
import math
import re
from dataclasses import dataclass

from lora_fsdp.errors import ArgumentError

_MEBIBYTE = 2**20
#: Bytes per second of a network of 1 Gbit/s.
GIGABIT = 1e9 / 8


@dataclass(frozen=True)
class Gpu:
    """One kind of GPU.

    Attributes:
        name: as people write it.
        memory: bytes, as its driver reports them.
        flops: dense bfloat16 operations per second with float32 sums, by its maker's data sheet.
        bandwidth: of its memory, bytes per second.
        link: bytes per second that a rank receives in an all-gather within one machine.
        host_link: bytes per second from host memory.
    """

    name: str
    memory: int
    flops: float
    bandwidth: float
    link: float
    host_link: float


#: By name. Makers' data sheets for memory, operations and bandwidth. Links: three quarters of
#: NVLink's rate in one direction, or of PCIe's for boards that lack it; RTX 4090s have no direct
#: way to one another, so what they exchange goes through host memory twice.
GPUS = {
    gpu.name: gpu
    for gpu in (
        Gpu("RTX3090", 24576 * _MEBIBYTE, 71e12, 936e9, 10e9, 20e9),
        Gpu("RTX4090", 24564 * _MEBIBYTE, 165e12, 1008e9, 10e9, 20e9),
        Gpu("RTX5090", 32607 * _MEBIBYTE, 210e12, 1792e9, 20e9, 40e9),
        Gpu("L40S", 46068 * _MEBIBYTE, 362e12, 864e9, 20e9, 20e9),
        Gpu("A100-40GB", 40960 * _MEBIBYTE, 312e12, 1555e9, 225e9, 20e9),
        Gpu("A100-80GB", 81920 * _MEBIBYTE, 312e12, 2039e9, 225e9, 20e9),
        Gpu("A800-80GB", 81920 * _MEBIBYTE, 312e12, 2039e9, 150e9, 20e9),
        Gpu("H100-80GB", 81559 * _MEBIBYTE, 989e12, 3350e9, 337e9, 40e9),
        Gpu("H200-141GB", 143771 * _MEBIBYTE, 989e12, 4800e9, 337e9, 40e9),
    )
}
_ALIASES = {"A100": "A100-80GB", "A800": "A800-80GB", "H100": "H100-80GB", "H200": "H200-141GB"}
_COUNTED = re.compile(r"(?:(\d+)\s*[x*]\s*)?(.+)", re.IGNORECASE)
_NUMBER = r"(\d+(?:\.\d+)?)"
_UNITS = {"M": 1e6, "G": 1e9, "T": 1e12}
_LINK = re.compile(rf"{_NUMBER}\s*([MGTmgt])(B|b|bit|bits)?(?:/s|ps)?")
_OWN = re.compile(
    rf"([\w.-]+):{_NUMBER}GB:{_NUMBER}TFLOPS(?::{_NUMBER}GB/s)?(?::{_NUMBER}GB/s)?", re.IGNORECASE
)


def parse_gpus(text: str) -> tuple[int, Gpu]:
    """Number and kind of GPUs from words such as `2xRTX4090`.

    An own kind is written `NAME:48GB:200TFLOPS:900GB/s:20GB/s`: memory, bfloat16 operations per
    second, memory bandwidth, and what a rank receives from the others (the last two may be left
    out).

    Raises:
        ArgumentError: no such GPU; the message suggests the nearest and lists those known.
    """
    match = _COUNTED.fullmatch(text.strip())
    if match is None:
        raise ArgumentError(f"--gpus is empty: name GPUs such as 2x{next(iter(GPUS))}.")
    count, name = int(match[1] or 1), match[2].strip()
    if count < 1:
        raise ArgumentError(f"--gpus {text}: at least one GPU is needed.")
    if ":" in name:
        return count, _own(name)
    plain = {_plain(known): gpu for known, gpu in GPUS.items()}
    plain |= {_plain(alias): GPUS[known] for alias, known in _ALIASES.items()}
    found = plain.get(_plain(name))
    if found is None:
        nearest = difflib.get_close_matches(_plain(name), plain, n=1)
        hint = f" Did you mean {plain[nearest[0]].name}?" if nearest else ""
        raise ArgumentError(
            f"--gpus {text!r}: no GPU {name!r} is known.{hint} Known: {', '.join(GPUS)}; or "
            "describe your own: NAME:48GB:200TFLOPS:900GB/s:20GB/s."
        )
    return count, found


def parse_link(text: str) -> float:
    """Bytes per second of a network from words such as `10Gbit`, `400 Gbit/s` or `12.5GB/s`.

    Raises:
        ArgumentError: it names no speed.
    """
    match = _LINK.fullmatch(text.strip())
    speed = 0.0 if match is None else float(match[1]) * _UNITS[match[2].upper()]
    if match is None or not 0 < speed < math.inf:
        raise ArgumentError(
            f"--link {text!r} is no speed: write what a host can send to others as 10Gbit, "
            "400Gbit or 12.5GB/s."
        )
    return speed if match[3] == "B" else speed / 8


def known_gpu(device_name: str, *, memory: int) -> Gpu | None:
    """The GPU that a driver calls `device_name` (such as "NVIDIA H100 80GB HBM3"), if it is known.

    Its bytes of `memory` tell kinds of one name apart.
    """
    plain = _plain(device_name)
    family = [gpu for gpu in GPUS.values() if _plain(gpu.name.split("-")[0]) in plain]
    return min(family, key=lambda gpu: abs(gpu.memory - memory), default=None)


def _own(text: str) -> Gpu:
    match = _OWN.fullmatch(text)
    if match is None:
        raise ArgumentError(
            f"--gpus {text!r}: write an own GPU as NAME:48GB:200TFLOPS:900GB/s:20GB/s (memory, "
            "bfloat16 operations, memory bandwidth, link)."
        )
    name = match[1]
    memory, flops = float(match[2]), float(match[3])
    # As a 4090 has them, where they are not given.
    bandwidth, link = (float(match[4] or 1000), float(match[5] or 10))
    if not all(value > 0 and math.isfinite(value) for value in (memory, flops, bandwidth, link)):
        raise ArgumentError(f"--gpus {text!r}: every number must be more than 0.")
    return Gpu(name, int(memory * 1e9), flops * 1e12, bandwidth * 1e9, link * 1e9, 20e9)


def _plain(name: str) -> str:
    """For comparison: without spaces, dashes, makers' names and case."""
    letters = re.sub(r"[^a-z0-9]", "", name.lower())
    return re.sub(r"^(nvidia)?(geforce|tesla)?", "", letters)
