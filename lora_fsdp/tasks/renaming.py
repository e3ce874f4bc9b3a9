"""Other names for a table's labels: `0=negative`, and several as one: `other=a,b`."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

from lora_fsdp.errors import ArgumentError, did_you_mean


def new_names(names: Sequence[str], merges: Sequence[str]) -> dict[str, str]:
    """The new name of each label that has one.

    Args:
        names: `old=new` each; no two labels get one name.
        merges: `new=old,old` each, of the labels as `names` calls them.

    Raises:
        ArgumentError: one has no such form, or names a label twice.
    """
    found: dict[str, str] = {}
    for entry in names:
        old, new = _halves(entry, option="rename_labels", form="old=new")
        if old in found:
            raise ArgumentError(f"--rename_labels names the label {old!r} twice: keep one.")
        if new in found.values():
            raise ArgumentError(
                f"--rename_labels gives {new!r} to two labels: to make one of several, take "
                f"--merge_labels {new}=…,…"
            )
        found[old] = new
    merged: dict[str, str] = {}
    for entry in merges:
        new, listed = _halves(entry, option="merge_labels", form="new=old,old")
        for old in filter(None, map(str.strip, listed.split(","))):
            if old in merged:
                raise ArgumentError(f"--merge_labels has the label {old!r} twice: keep one.")
            merged[old] = new
    called = set(found.values())
    renamed = {old: merged.get(new, new) for old, new in found.items()}
    return renamed | {old: new for old, new in merged.items() if old not in called}


def check_known(names: Mapping[str, str], labels: Collection[str], *, column: str) -> None:
    """Refuse a new name for a label that no row has.

    Raises:
        ArgumentError: names the label, and those that there are.
    """
    for old in names:
        if old not in labels:
            shown = ", ".join(map(repr, sorted(labels)[:10]))
            raise ArgumentError(
                f"No row has the label {old!r}, which --rename_labels or --merge_labels name."
                f"{did_you_mean(old, labels)} Column {column!r} has {shown}."
            )


def _halves(entry: str, *, option: str, form: str) -> tuple[str, str]:
    left, equals, right = (part.strip() for part in entry.partition("="))
    if not (left and equals and right):
        raise ArgumentError(f"--{option} {entry}: write each as {form}.")
    return left, right
