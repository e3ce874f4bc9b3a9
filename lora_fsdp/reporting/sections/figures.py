"""Pictures of curves, drawn once: as files on white, and inline in the colours of the page."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from lora_fsdp.evaluation.verdict import name_of

# The light palette; inline, each colour becomes the page's variable of that name, which has another
# value in dark mode (templates/style.css).
_INK, _MUTED, _LINE, _PAPER = "#1d2329", "#59636d", "#d5dade", "#fffffe"
SERIES = ("#0b5cad", "#a8480f", "#23713f", "#75429c", "#9c2440", "#40616f")
_VARIABLES = {
    _INK: "var(--ink)",
    _MUTED: "var(--muted)",
    _LINE: "var(--line)",
    _PAPER: "none",
    **{color: f"var(--series-{number})" for number, color in enumerate(SERIES, start=1)},
}
_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",  # text stays text
    "svg.hashsalt": "lora_fsdp",  # the same picture, the same file
    "font.family": "sans-serif",
    "font.size": 9.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": _MUTED,
    "axes.labelcolor": _MUTED,
    "axes.titlesize": 10.5,
    "axes.titlelocation": "left",
    "axes.titlecolor": _INK,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": _LINE,
    "grid.linewidth": 0.7,
    "xtick.color": _MUTED,
    "ytick.color": _MUTED,
    "text.color": _INK,
    "text.parse_math": False,  # a name such as "$a$" is no formula
    "legend.frameon": False,
    "figure.facecolor": _PAPER,
    "axes.facecolor": _PAPER,
    "savefig.facecolor": _PAPER,
}
_DASHES = ("-", (0, (5, 2)), (0, (1.5, 1.5)), (0, (6, 2, 1.5, 2)))
# The legend's names are cut, so that one long name does not push the curves out of the picture.
_LONGEST_NAME = 32


@dataclass(frozen=True)
class Picture:
    """A picture.

    Attributes:
        name: of its file, without the ending.
        title: what it shows, for the caption.
        description: the same for those who cannot see it, with its main figures.
        svg: on white.
    """

    name: str
    title: str
    description: str
    svg: str

    @property
    def inline(self) -> str:
        """The picture as part of an HTML page, in the page's colours."""
        svg = self.svg[self.svg.index("<svg") :]
        for color, variable in _VARIABLES.items():
            svg = svg.replace(color, variable)
        # Several pictures share a page: their ids must differ.
        svg = re.sub(r'\bid="', f'id="{self.name}-', svg)
        svg = svg.replace('href="#', f'href="#{self.name}-').replace("url(#", f"url(#{self.name}-")
        return re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)


def curve_picture(
    name: str,
    title: str,
    curves: Mapping[str, Sequence[Sequence[float]]],
    *,
    levels: Mapping[str, float] | None = None,
    logarithmic: bool = False,
) -> Picture:
    """Curves over the optimizer steps.

    Args:
        name: of the file.
        title: what is on the vertical axis.
        curves: [step, value] pairs by the name of the curve, whose place decides its colour; what
            is not finite is left out, and so is a curve without points.
        levels: horizontal lines by their name.
        logarithmic: the vertical axis.
    """
    with rc_context(_STYLE):
        figure, axes = _axes(title)
        for number, (label, points) in enumerate(curves.items()):
            if points:
                _draw(axes, points, number=number, label=label)
        for label, level in (levels or {}).items():
            axes.axhline(level, color=_MUTED, linewidth=1.2, linestyle=_DASHES[2], label=label)
        if logarithmic:
            _make_logarithmic(axes)
        axes.set_xlabel("optimizer step")
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        if len(curves) + len(levels or {}) > 1:
            # Beside and not over the curves; two long names do not fit beside each other.
            names = [*curves, *(levels or {})]
            columns = 2 if max(map(len, names)) <= _LONGEST_NAME // 2 else 1
            figure.legend(loc="outside lower left", fontsize=8.5, ncols=columns, columnspacing=1.2)
        return Picture(name, title, _described(title, curves, levels or {}), _svg(figure))


def settings_picture(name: str, title: str, settings: Sequence[Mapping[str, Any]]) -> Picture:
    """Settings of a sweep below each other: a bar for the rows, a dot for each adapter.

    Args:
        name: of the file.
        title: the score.
        settings: from the top; each with its "name", the "scores" of its adapters, their "mean"
            with "low" and "high" over other rows (`None` = not known), and "is_best".
    """
    with rc_context(_STYLE):
        figure = Figure(figsize=(5.2, 1.0 + 0.32 * len(settings)), layout="constrained")
        axes = figure.add_subplot()
        axes.set_title(title)
        for place, one in enumerate(settings):
            color = SERIES[1 if one["is_best"] else 0]
            if one["low"] is not None:
                axes.plot([one["low"], one["high"]], [place] * 2, color=color, linewidth=1.6)
            if one["mean"] is not None:
                axes.plot([one["mean"]], [place], color=color, marker="|", markersize=11)
            axes.plot(one["scores"], [place] * len(one["scores"]), "o", color=color, markersize=4)
        axes.set_yticks(range(len(settings)), [_short(str(one["name"])) for one in settings])
        axes.invert_yaxis()
        axes.grid(axis="y", visible=False)
        parts = "; ".join(
            f"{one['name']}: " + ("none" if one["mean"] is None else f"{one['mean']:.4g}")
            for one in settings
        )
        text = f"{title} by setting, the mean over its adapters. {parts}."
        return Picture(name, title, text, _svg(figure))


def calibration_picture(found: Mapping[str, Any]) -> Picture:
    """Accuracy against confidence, a point a bin, its area by the bin's rows."""
    title = "accuracy by confidence"
    bins = found["bins"]
    with rc_context(_STYLE):
        figure, axes = _axes(title)
        axes.plot([0, 1], [0, 1], color=_MUTED, linewidth=1, linestyle=_DASHES[1])
        axes.annotate("perfectly calibrated", (1.0, 0.42), color=_MUTED, fontsize=8.5, ha="right")
        confidence = [one["confidence"] for one in bins]
        accuracy = [one["accuracy"] for one in bins]
        axes.plot(confidence, accuracy, color=SERIES[0], linewidth=1.4)
        sizes = [20 + 180 * one["rows"] / found["rows"] for one in bins]
        axes.scatter(confidence, accuracy, s=sizes, color=SERIES[0], zorder=3)
        axes.set(xlim=(0, 1.02), ylim=(-0.02, 1.05), xlabel="probability of the answer given")
        points = ", ".join(
            f"{one['confidence']:.2f} to {one['accuracy']:.2f} ({one['rows']} rows)" for one in bins
        )
        text = f"Calibration curve. Mean confidence to accuracy, a bin each: {points}."
        return Picture("calibration", title, text, _svg(figure))


def _axes(title: str) -> tuple[Figure, Axes]:
    # Narrow, so that the type keeps its size on a phone; without pyplot, whose state is the user's.
    figure = Figure(figsize=(3.9, 2.7), layout="constrained")
    axes = figure.add_subplot()
    axes.set_title(title)
    return figure, axes


def _draw(axes: Axes, points: Sequence[Sequence[float]], *, number: int, label: str) -> None:
    finite = [(step, value) for step, value in points if math.isfinite(value)]
    axes.plot(
        [step for step, _ in finite],
        [value for _, value in finite],
        color=SERIES[number % len(SERIES)],
        linestyle=_DASHES[number % len(_DASHES)],
        marker="o" if len(finite) < 12 else None,
        markersize=3.5,
        linewidth=1.6,
        label=_short(label),
    )


def _make_logarithmic(axes: Axes) -> None:
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5), numticks=8))
    # Plain numbers: the default labels are formulas.
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())


def _short(name: str) -> str:
    # matplotlib leaves names with a leading underscore out of a legend.
    name = name if len(name) <= _LONGEST_NAME else f"{name[: _LONGEST_NAME - 1]}…"
    return f" {name}" if name.startswith("_") else name


def _described(
    title: str,
    curves: Mapping[str, Sequence[Sequence[float]]],
    levels: Mapping[str, float],
) -> str:
    parts = []
    for name, points in ((name, points) for name, points in curves.items() if points):
        (first, start), (last, end) = points[0], points[-1]
        parts.append(f"{name}: {start:.4g} at step {first:.0f}, {end:.4g} at step {last:.0f}")
    parts += [f"{name}: {level:.4g} throughout" for name, level in levels.items()]
    return f"Curve of {title} by optimizer step. {'; '.join(parts)}."


def _svg(figure: Figure) -> str:
    file = io.StringIO()
    figure.savefig(file, format="svg", metadata={"Date": None, "Creator": None})
    return file.getvalue()


def run_pictures(contents: Mapping[str, Any]) -> list[Picture]:
    """The pictures of one run's report, as far as there is something to draw."""
    curves = contents["curves"]
    pictures = []
    losses = {"training": "loss", "held out": "eval_loss"}
    if "loss" in curves or "eval_loss" in curves:
        drawn = {name: curves[key] for name, key in losses.items() if key in curves}
        pictures.append(
            curve_picture("loss", "loss per label token", drawn, logarithmic=_positive(drawn))
        )
    measured = {
        name_of(key.removeprefix("eval_")): points
        for key, points in curves.items()
        if key.startswith("eval_") and key != "eval_loss"
    }
    if measured:
        levels = _rival_level(contents["scores"], among=measured)
        pictures.append(curve_picture("metrics", "held-out metrics", measured, levels=levels))
    for key, title in (("learning_rate", "learning rate"), ("grad_norm", "gradient norm")):
        if key in curves:
            pictures.append(curve_picture(key, title, {title: curves[key]}))
    chosen = contents["answers"] or contents["choices"]
    if chosen is not None:
        pictures.append(calibration_picture(chosen["calibration"]))
    return pictures


def _positive(curves: Mapping[str, Sequence[Sequence[float]]]) -> bool:
    """Whether a logarithmic axis can show all of it."""
    return all(value > 0 for points in curves.values() for _, value in points)


def _rival_level(scores: Mapping[str, Any] | None, *, among: Mapping[str, Any]) -> dict[str, float]:
    """The best of the other systems, where its metric is `among` those drawn."""
    if scores is None or scores["verdict"]["metric"] not in among:
        return {}
    verdict = scores["verdict"]
    return {f"{verdict['metric']}, {name_of(verdict['rival'])}": verdict["rival_score"]}
