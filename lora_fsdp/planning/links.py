"""Which layout is the fastest over a network of given speed between hosts, and why."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from lora_fsdp.placement.gpus import GIGABIT
from lora_fsdp.placement.timing import step_seconds
from lora_fsdp.planning.candidates import Candidate

#: Bits per second of networks that people rent: plain Ethernet, a good data centre's, a cluster's.
USUAL_LINKS = tuple(speed * GIGABIT for speed in (10, 100, 400))


@dataclass(frozen=True)
class OverLink:
    """A layout over one network.

    Attributes:
        link: bytes per second that a host can send.
        candidate: the layout.
        seconds: of an optimizer step.
        alone: of the same step if nothing crossed between hosts.
    """

    link: float
    candidate: Candidate
    seconds: float
    alone: float


def over_link(candidate: Candidate, link: float) -> OverLink:
    """A layout over a network of that speed."""

    def seconds(speed: float) -> float:
        return step_seconds(
            candidate.placement.shape,
            candidate.placement.layout,
            candidate.work,
            candidate.gpu,
            sequence_tokens=candidate.placement.largest.tokens,
            link=speed,
        )

    return OverLink(link, candidate, seconds(link), seconds(float("inf")))


def fastest(candidates: Sequence[Candidate], link: float) -> OverLink | None:
    """The fastest of those that fit."""
    fitting = [over_link(one, link) for one in candidates if one.fits]
    return min(fitting, key=lambda one: one.seconds, default=None)


def why_fastest(best: OverLink, candidates: Sequence[Candidate]) -> str:
    """Why, in words: what its step waits for, and what the next one would send and take."""
    sent = best.candidate.traffic.total
    waiting = best.seconds - best.alone
    words = f"each host sends {megabytes(sent)} a step, which adds {milliseconds(waiting)} to "
    words += milliseconds(best.alone)
    fitting = [over_link(one, best.link) for one in candidates if one.fits]
    others = [
        one
        for one in fitting
        if one.candidate.traffic != best.candidate.traffic
        and one.candidate.placement.layout.quantized == best.candidate.placement.layout.quantized
    ]
    if others:
        other = min(others, key=lambda one: one.seconds)
        words += (
            f"; {other.candidate.strategy} sends {megabytes(other.candidate.traffic.total)} and "
            f"takes {milliseconds(other.seconds)}"
        )
    return words


def megabytes(size: float) -> str:
    """In MB, or GB where it is many."""
    return f"{size / 1e9:,.1f} GB" if size >= 1e9 else f"{size / 1e6:,.1f} MB"


def milliseconds(seconds: float) -> str:
    """In ms, or s where it is many."""
    return f"{seconds:,.2f} s" if seconds >= 1 else f"{1e3 * seconds:,.1f} ms"
