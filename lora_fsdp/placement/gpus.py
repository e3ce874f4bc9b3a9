"""GPUs that can be rented, and what a plan needs to know of them."""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Iterable
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
        flops: dense bfloat16 operations per second with float32 sums, by its maker's data sheet;
            in float32 where it has no bfloat16 arithmetic.
        bandwidth: of its memory, bytes per second.
        link: bytes per second that a rank receives in an all-gather within one machine.
        host_link: bytes per second from host memory.
        driver: the words by which its driver's name for it is known; "" = the first of its name.
        has_bfloat16: whether it has bfloat16 arithmetic, which NVIDIA's have since Ampere.
        is_cpu: whether it stands for a process's part of a CPU, whose rates were measured where
            they are used (`lora_fsdp.sizing.machine`): matmuls of the run's sizes, copies in memory
            (`bandwidth`), and gathers between processes (`link`).
    """

    name: str
    memory: int
    flops: float
    bandwidth: float
    link: float
    host_link: float
    driver: str = ""
    has_bfloat16: bool = True
    is_cpu: bool = False

    @property
    def driver_words(self) -> frozenset[str]:
        """In small letters."""
        return frozenset(_words(self.driver or self.name.split("-")[0]))


def _gpu(
    name: str,
    mebibytes: int,
    teraflops: float,
    bandwidth: float,
    link: float,
    host_link: float,
    driver: str = "",
    *,
    has_bfloat16: bool = True,
) -> Gpu:
    """A line of the table below: MiB, 10^12 operations per second, and 10^9 bytes per second."""
    return Gpu(
        name,
        mebibytes * _MEBIBYTE,
        teraflops * 1e12,
        bandwidth * 1e9,
        link * 1e9,
        host_link * 1e9,
        driver,
        has_bfloat16,
    )


#: By name. Makers' data sheets for memory, operations and bandwidth. Links: three quarters of
#: NVLink's rate in one direction, or of PCIe's for boards that lack it; GeForce boards before the
#: 50 series have no direct way to one another, so what they exchange goes through host memory
#: twice.
GPUS = {
    gpu.name: gpu
    for gpu in (
        _gpu("V100-16GB", 16160, 15.7, 900, 112, 10, has_bfloat16=False),
        _gpu("V100-32GB", 32510, 15.7, 900, 112, 10, has_bfloat16=False),
        _gpu("T4", 15360, 8.1, 320, 10, 10, has_bfloat16=False),
        _gpu("RTX3060", 12288, 25.5, 360, 10, 20, "RTX 3060"),
        _gpu("RTX3080", 10240, 59.5, 760, 10, 20, "RTX 3080"),
        _gpu("RTX3090", 24576, 71, 936, 10, 20, "RTX 3090"),
        _gpu("RTX4080", 16376, 97.5, 717, 10, 20, "RTX 4080"),
        _gpu("RTX4090", 24564, 165, 1008, 10, 20, "RTX 4090"),
        _gpu("RTX5080", 16303, 113, 960, 20, 40, "RTX 5080"),
        _gpu("RTX5090", 32607, 210, 1792, 20, 40, "RTX 5090"),
        _gpu("A4000", 16376, 76.7, 448, 20, 20, "RTX A4000"),
        _gpu("A5000", 24564, 111, 768, 20, 20, "RTX A5000"),
        _gpu("A6000", 49140, 155, 768, 20, 20, "RTX A6000"),
        _gpu("RTX6000-Ada", 49140, 364, 960, 20, 20, "RTX 6000 Ada"),
        _gpu("RTX-PRO-6000", 97887, 504, 1597, 40, 40, "RTX PRO 6000"),
        _gpu("A10", 23028, 125, 600, 20, 20),
        _gpu("A10G", 23028, 70, 600, 20, 20),
        _gpu("A40", 46068, 150, 696, 20, 20),
        _gpu("L4", 23034, 121, 300, 20, 20),
        _gpu("L40", 46068, 181, 864, 20, 20),
        _gpu("L40S", 46068, 362, 864, 20, 20),
        _gpu("A100-40GB", 40960, 312, 1555, 225, 20),
        _gpu("A100-80GB", 81920, 312, 2039, 225, 20),
        _gpu("A800-80GB", 81920, 312, 2039, 150, 20),
        _gpu("H20-96GB", 97871, 148, 4000, 337, 40),
        _gpu("H100-80GB", 81559, 989, 3350, 337, 40),
        _gpu("H100-PCIe", 81559, 756, 2000, 40, 40, "H100 PCIe"),
        _gpu("H100-NVL", 95830, 835, 3900, 225, 40, "H100 NVL"),
        _gpu("H200-141GB", 143771, 989, 4800, 337, 40),
        _gpu("GH200-96GB", 97871, 989, 4000, 337, 337),
        _gpu("B200-180GB", 183359, 2250, 8000, 675, 40),
    )
}
#: Other ways to write them, as `_plain` leaves them.
_ALIASES = {
    "v100": "V100-16GB",
    "v100sxm2": "V100-16GB",
    "rtxa4000": "A4000",
    "rtxa5000": "A5000",
    "rtxa6000": "A6000",
    "6000ada": "RTX6000-Ada",
    "rtxpro6000blackwell": "RTX-PRO-6000",
    "pro6000": "RTX-PRO-6000",
    "a100": "A100-80GB",
    "a100sxm": "A100-80GB",
    "a100sxm480gb": "A100-80GB",
    "a100sxm440gb": "A100-40GB",
    "a800": "A800-80GB",
    "h20": "H20-96GB",
    "h100": "H100-80GB",
    "h100sxm": "H100-80GB",
    "h100sxm5": "H100-80GB",
    "h200": "H200-141GB",
    "h200sxm": "H200-141GB",
    "gh200": "GH200-96GB",
    "b200": "B200-180GB",
}
#: Words of a driver's name that make another board of it.
_OTHER_BOARD = frozenset({"ti", "super", "d", "laptop", "max", "mobile", "mig"})
#: By how much of its memory a board may differ from the one that is known by its name.
_SAME_MEMORY = 0.1
_COUNTED = re.compile(r"(?:(\d+)\s*[x*]\s*)?(.+)", re.IGNORECASE)
_NUMBER = r"(\d+(?:\.\d+)?)"
_UNITS = {"M": 1e6, "G": 1e9, "T": 1e12}
_CPU = re.compile(r"(?:(\d+)\s*[x*]\s*)?CPU", re.IGNORECASE)
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
    plain |= {alias: GPUS[known] for alias, known in _ALIASES.items()}
    found = plain.get(_plain(name))
    if found is None:
        nearest = difflib.get_close_matches(_plain(name), _alike(name, plain), n=1)
        hint = f" Did you mean {plain[nearest[0]].name}?" if nearest else ""
        raise ArgumentError(
            f"--gpus {text!r}: no GPU {name!r} is known.{hint} Known: {', '.join(GPUS)}; or "
            "describe your own: NAME:48GB:200TFLOPS:900GB/s:20GB/s."
        )
    return count, found


def parse_cpu(text: str) -> int | None:
    """Processes on this machine's CPU, from words such as `2xCPU`; `None` if it is another kind.

    Raises:
        ArgumentError: none are asked for.
    """
    if (match := _CPU.fullmatch(text.strip())) is None:
        return None
    if (count := int(match[1] or 1)) < 1:
        raise ArgumentError(f"--gpus {text}: at least one process is needed.")
    return count


def parse_link(
    text: str,
    *,
    option: str = "link",
    what: str = "what a host can send to others",
    examples: str = "10Gbit, 400Gbit or 12.5GB/s",
) -> float:
    """Bytes per second of a network from words such as `10Gbit`, `400 Gbit/s` or `12.5GB/s`.

    Args:
        text: the words.
        option: whose value they are; `what` is its speed, `examples` how it is written.

    Raises:
        ArgumentError: it names no speed.
    """
    match = _LINK.fullmatch(text.strip())
    speed = 0.0 if match is None else float(match[1]) * _UNITS[match[2].upper()]
    if match is None or not 0 < speed < math.inf:
        raise ArgumentError(f"--{option} {text!r} is no speed: write {what} as {examples}.")
    return speed if match[3] == "B" else speed / 8


def known_gpu(device_name: str, *, memory: int) -> Gpu | None:
    """The GPU that a driver calls `device_name` (such as "NVIDIA H100 80GB HBM3"), if it is known.

    Its bytes of `memory` tell kinds of one name apart, and a part of a board from the whole.
    """
    words = frozenset(_words(device_name))
    family = [
        gpu
        for gpu in GPUS.values()
        if gpu.driver_words <= words
        and not words & _OTHER_BOARD
        and abs(gpu.memory - memory) <= _SAME_MEMORY * gpu.memory
    ]
    return min(
        family, key=lambda gpu: (-len(gpu.driver_words), abs(gpu.memory - memory)), default=None
    )


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


def _alike(name: str, known: Iterable[str]) -> list[str]:
    """Of the `known` names those that `name` may be a slip of the hand for.

    They begin alike and have the same digits: another letter or number is another GPU.
    """
    plain = _plain(name)
    digits = sorted(re.findall(r"\d", plain))
    return [
        one for one in known if one[0] == plain[:1] and sorted(re.findall(r"\d", one)) == digits
    ]


def _words(name: str) -> list[str]:
    return re.findall(r"[a-z0-9]+", name.lower())
