"""`proof.json`: what a saved adapter can later be checked against."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lora_fsdp.adapter.probes import Probe
from lora_fsdp.base.fingerprints import BaseFingerprint
from lora_fsdp.base.folders import read_json_object
from lora_fsdp.base.quantized_layers import QUANTIZED_WHILE_READ
from lora_fsdp.errors import AdapterVerificationError, BaseMismatchError

PROOF_FILE = "proof.json"
_FORMAT = 1
# A probe's attention takes memory with the square of its length.
_MOST_PROBES = 16
_LONGEST_PROBE = 32_768


@dataclass(frozen=True)
class Proof:
    """What was true of an adapter when it was saved.

    Attributes:
        adapter_sha256: of the adapter's weights file.
        trained: whether an optimizer step with a learning rate above 0 came before.
        base: fingerprint of the base.
        base_name: how the base was named.
        base_beside: where its folder lay as seen from the adapter's folder; `None` = a Hub name.
        base_commit: the Hub's commit, if it came from there.
        base_dtype: the dtype it was computed in.
        base_quantization: how the base was quantised, or `None`.
        tokenizer_sha256: see `fingerprint_tokenizer`.
        end_token_id: the token that ends an answer.
        probes: fixed prompts and answers.
        log_likelihoods: of the probes' answers, as the adapter scored them.
    """

    adapter_sha256: str
    trained: bool
    base: BaseFingerprint
    base_name: str
    base_beside: str | None
    base_commit: str | None
    base_dtype: str
    base_quantization: str | None
    tokenizer_sha256: str
    end_token_id: int
    probes: Sequence[Probe]
    log_likelihoods: Sequence[Sequence[float]]

    @property
    def base_in_4bit(self) -> bool:
        """Whether the base's files are not quantised and it was trained with `--load_in_4bit`."""
        return QUANTIZED_WHILE_READ in (self.base_quantization or "")

    def to_json(self) -> dict[str, Any]:
        """As it is written."""
        return {"format": _FORMAT, **asdict(self)}


def beside(base_name: str, folder: str | Path) -> str | None:
    """Where a base's folder lies as seen from an adapter's folder; `None` for a Hub name."""
    base = Path(base_name).expanduser()
    if not base_name or not base.is_dir():
        return None
    return os.path.relpath(base.resolve(), Path(folder).resolve())


def check_base(proof: Proof, found: BaseFingerprint, *, adapter: Path, base: str) -> None:
    """Refuse a base that is not the one the adapter was trained on.

    Raises:
        BaseMismatchError: names both, and what differs.
    """
    if differences := proof.base.differences(found):
        raise BaseMismatchError(
            f"The adapter {adapter} was trained on {proof.base_name}, and {base} is another model: "
            f"{'; '.join(differences)}."
        )


def read_proof(folder: str | Path) -> Proof | None:
    """The proof in an adapter's folder; `None` if it holds none (a plain PEFT folder).

    Raises:
        AdapterVerificationError: it is damaged; the message names the key.
        UnsafeFileError: it does not lie in the folder.
    """
    path = Path(folder)
    if not (path / PROOF_FILE).exists() and not (path / PROOF_FILE).is_symlink():
        return None
    contents = read_json_object(path, PROOF_FILE)
    where = path / PROOF_FILE
    if contents.get("format") != _FORMAT:
        raise AdapterVerificationError(
            f"{where}: format {str(contents.get('format'))[:40]!r} is not known; this version of "
            f"lora-fsdp reads format {_FORMAT}."
        )
    for key, (check, wanted) in _CHECKS.items():
        if not check(contents.get(key)):
            raise AdapterVerificationError(f"{where} is damaged: {key} must be {wanted}.")
    probes = [Probe(one["prompt_ids"], one["answers"]) for one in contents["probes"]]
    likelihoods = contents["log_likelihoods"]
    if [len(probe.answers) for probe in probes] != [len(values) for values in likelihoods]:
        raise AdapterVerificationError(
            f"{where} is damaged: log_likelihoods must have a number for every probe's answer."
        )
    values: dict[str, Any] = {key: contents.get(key) for key in _CHECKS}
    values["base"] = BaseFingerprint(**{key: contents["base"][key] for key in _BASE_KEYS})
    values["probes"] = probes
    return Proof(**values)


# ---- the form of the file -----------------------------------------------------------------------

_BASE_KEYS = ("model_class", "config", "weights")


def _is_text(value: object) -> bool:
    return isinstance(value, str) and "\0" not in value


def _is_text_or_null(value: object) -> bool:
    return value is None or _is_text(value)


def _is_sha256(value: object) -> bool:
    return isinstance(value, str) and len(value) == 64


def _is_token(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**31


def _is_tokens(value: object) -> bool:
    filled = isinstance(value, list) and 0 < len(value) <= _LONGEST_PROBE
    return filled and all(map(_is_token, value))  # type: ignore[call-overload]


def _is_base(value: object) -> bool:
    return (
        isinstance(value, Mapping)
        and _is_text(value.get("model_class"))
        and isinstance(value.get("config"), dict)
        and isinstance(value.get("weights"), dict)
        and all(map(_is_text, value["weights"].values()))
    )


def _is_probe(value: object) -> bool:
    return (
        isinstance(value, dict)
        and _is_tokens(value.get("prompt_ids"))
        and isinstance(value.get("answers"), list)
        and 0 < len(value["answers"]) <= _LONGEST_PROBE
        and all(map(_is_tokens, value["answers"]))
        and len(value["prompt_ids"]) + sum(map(len, value["answers"])) <= _LONGEST_PROBE
    )


def _is_probes(value: object) -> bool:
    filled = isinstance(value, list) and 0 < len(value) <= _MOST_PROBES
    return filled and all(map(_is_probe, value))  # type: ignore[call-overload]


def _is_likelihoods(value: object) -> bool:
    return isinstance(value, list) and all(
        isinstance(of_probe, list)
        and all(isinstance(number, float | int) and math.isfinite(number) for number in of_probe)
        for of_probe in value
    )


_CHECKS = {
    "adapter_sha256": (_is_sha256, "a SHA-256"),
    "trained": (lambda value: isinstance(value, bool), "true or false"),
    "base": (_is_base, "a fingerprint (model_class, config, weights)"),
    "base_name": (_is_text, "a text"),
    "base_beside": (_is_text_or_null, "a text or null"),
    "base_commit": (_is_text_or_null, "a text or null"),
    "base_dtype": (_is_text, "a text"),
    "base_quantization": (_is_text_or_null, "a text or null"),
    "tokenizer_sha256": (_is_sha256, "a SHA-256"),
    "end_token_id": (_is_token, "a token id"),
    "probes": (_is_probes, "a list of probes (prompt_ids, answers)"),
    "log_likelihoods": (_is_likelihoods, "lists of numbers"),
}
