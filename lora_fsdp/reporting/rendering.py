"""From contents and pictures to files: a page, the same as JSON, the pictures."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jinja2
from markupsafe import Markup

from lora_fsdp.errors import DamagedRunError
from lora_fsdp.evaluation.outputs import write_json, write_text
from lora_fsdp.evaluation.verdict import NOTHING, name_of, score_text, signed_text
from lora_fsdp.printing import visible
from lora_fsdp.reporting.texts import fenced, inline, one_line

if TYPE_CHECKING:
    from lora_fsdp.reporting.sections.figures import Picture


def write_page(
    page: Path, template: str, contents: Mapping[str, Any], pictures: Sequence[Picture]
) -> None:
    """Write `page`, the JSON file beside it, and its pictures into a folder named after it.

    Each file is written atomically; the page comes last.

    Raises:
        DamagedRunError: the contents lack something that a run's files should hold.
    """
    try:
        shown = {picture.name: _shown(picture) for picture in pictures}
        html = template_of(template).render(**contents, pictures=shown)
    except jinja2.UndefinedError as error:
        raise DamagedRunError(
            f"A file beside {page} lacks something that a report shows ({error}): restore it, or "
            "take it out of the folder to report on the rest."
        ) from error
    folder = page.with_name(f"{page.stem}_figures")
    folder.mkdir(parents=True, exist_ok=True)
    for picture in pictures:
        write_text(folder / f"{picture.name}.svg", picture.svg)
    write_json(page.with_suffix(".json"), _finite(contents))
    write_text(page, html)


def _shown(picture: Picture) -> dict[str, Any]:
    # The drawing is our own: matplotlib has escaped the names in it.
    return {
        "name": picture.name,
        "title": picture.title,
        "description": picture.description,
        "svg": Markup(picture.inline),
    }


def _shown_value(value: Any) -> Any:
    """What a page shows of a value, wherever it comes from; what is markup already is our own."""
    is_text = isinstance(value, str) and not isinstance(value, Markup)
    return visible(value) if is_text else value


@cache
def template_of(name: str) -> jinja2.Template:
    """A template of the room; texts in one for HTML are escaped, others have filters for that."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("lora_fsdp.reporting"),
        autoescape=name.endswith(".html.jinja"),
        undefined=jinja2.StrictUndefined,
        finalize=_shown_value,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "score": score_text,
        "signed": signed_text,
        "count": count_text,
        "duration": duration_text,
        "moment": moment_text,
        "rate": rate_text,
        "named": name_of,
        "inline": inline,
        "fenced": fenced,
        "literal": repr,
        "comment": partial(one_line, limit=80),
    }
    return environment.get_template(name)


def count_text(value: float | None) -> str:
    """A number of things."""
    return NOTHING if value is None else f"{value:,.0f}"


def rate_text(value: float | None) -> str:
    """A speed or a size: three significant digits or whole numbers, whichever is more."""
    if value is None or not math.isfinite(value):
        return NOTHING
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def moment_text(moment: str | None) -> str | None:
    """A time of day, from its ISO form."""
    if moment is None:
        return None
    return f"{datetime.fromisoformat(moment).astimezone(UTC):%Y-%m-%d %H:%M} UTC"


def duration_text(seconds: float | None) -> str:
    """A time in the two largest units that fit."""
    if seconds is None or not math.isfinite(seconds):
        return NOTHING
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"


def _finite(value: Any) -> Any:
    """The same with `None` for what JSON has no number for."""
    if isinstance(value, Mapping):
        return {str(key): _finite(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(one) for one in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
