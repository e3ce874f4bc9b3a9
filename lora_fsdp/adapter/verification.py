"""`verify`: is an adapter complete, and does it answer on its base as when it was saved?"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lora_fsdp.adapter.folder import (
    ADAPTER_FILE,
    AdapterFolder,
    attach_saved,
    load_with_peft,
    read_adapter_folder,
    zero_lora_b,
)
from lora_fsdp.adapter.manifest import MANIFEST_FILE, changed_files
from lora_fsdp.adapter.probes import probe_difference, probe_log_likelihoods, probe_tolerance
from lora_fsdp.adapter.proof import PROOF_FILE, Proof, read_proof
from lora_fsdp.adapter.saved import load_base_of
from lora_fsdp.arguments import ModelArguments
from lora_fsdp.base.fingerprints import fingerprint_base, fingerprint_tokenizer, same_vocabulary
from lora_fsdp.base.folders import read_json_object, sha256_of_file
from lora_fsdp.base.loading import LOADING_ERRORS, TOKENIZER_FILES, load_tokenizer
from lora_fsdp.base.streaming import load_on_device
from lora_fsdp.compute.packed_model import PackedModel
from lora_fsdp.compute.packing_check import keep_apart_if_needed
from lora_fsdp.data.encoding import end_of_answer
from lora_fsdp.errors import AdapterVerificationError, LoraFsdpError

Outcome = Literal["passed", "failed", "not possible"]
_NO_PROOF = f"no {PROOF_FILE}: this library did not write the folder"


@dataclass(frozen=True)
class Check:
    """One line of a verification."""

    name: str
    outcome: Outcome
    detail: str


@dataclass(frozen=True)
class AdapterVerification:
    """What was checked of an adapter's folder, and what came of it.

    Attributes:
        folder: the adapter's.
        base: the base it was checked against; empty if there was none.
        checks: in order.
    """

    folder: Path
    base: str
    checks: tuple[Check, ...]

    @property
    def passed(self) -> bool:
        """Whether no check failed (those that were not possible do not count)."""
        return all(check.outcome != "failed" for check in self.checks)

    def __str__(self) -> str:
        width = max(len(check.name) for check in self.checks)
        lines = [f"{self.folder} against {self.base or 'no base'}"]
        lines += [
            f"  {check.name:<{width}}  {check.outcome:<12}  {check.detail}" for check in self.checks
        ]
        lines.append(self.headline)
        return "\n".join(lines)

    @property
    def headline(self) -> str:
        """What came of it in one sentence, which says what was not checked."""
        outcomes = Counter(check.outcome for check in self.checks)
        counts = ", ".join(f"{outcomes[outcome]} {outcome}" for outcome in get_args(Outcome))
        unchecked = [check.name for check in self.checks if check.outcome == "not possible"]
        if not self.passed:
            return f"NOT verified: {counts}."
        if unchecked:
            return f"Verified in part: {counts}. Not checked: {', '.join(unchecked)}."
        return f"Verified: {counts}."


def verify_adapter_folder(
    folder: str | Path,
    *,
    base: str | Path | None = None,
    dtype: Literal["auto", "bfloat16", "float32"] = "auto",
    trust_remote_code: bool = False,
) -> AdapterVerification:
    """Check an adapter's folder against its base: files, base, shapes, tokenizer, answers.

    Args:
        folder: the adapter's; one that this library did not write has fewer checks.
        base: the base's folder or Hub name; `None` = the one that the adapter names.
        dtype: in which the base is loaded; auto = bfloat16 on a GPU, float32 on a CPU.
        trust_remote_code: run Python code that comes with the base.

    Returns:
        the checks; nothing wrong with the adapter raises an exception.
    """
    path = Path(folder)
    checks: list[Check] = []
    try:
        adapter = read_adapter_folder(path)
        proof = read_proof(path)
    except LoraFsdpError as error:
        checks.append(Check("files", "failed", str(error)))
        checks += _check_manifest(path)
        return AdapterVerification(path, "", tuple(checks))
    checks.append(Check("files", "passed", f"{len(adapter.tensors)} tensors, all finite"))
    checks += _check_manifest(path)
    checks += _check_weights(adapter, proof)
    try:
        arguments, model, device = load_base_of(
            adapter, proof, given=base, dtype=dtype, trust_remote_code=trust_remote_code
        )
    except LoraFsdpError as error:
        checks.append(Check("base model", "failed", str(error)))
        return AdapterVerification(path, "" if base is None else str(base), tuple(checks))
    checks += _check_base(model, proof)
    checks += _check_tokenizer(adapter, proof, arguments)
    checks += _check_answers(adapter, proof, model, device)
    return AdapterVerification(path, str(arguments.model_name_or_path), tuple(checks))


def _check_manifest(folder: Path) -> Iterator[Check]:
    """Settings, task, tokenizer and proof are as much a part of an adapter as its weights."""
    if not folder.is_dir():
        return
    try:
        changed = changed_files(folder)
    except LoraFsdpError as error:
        yield Check("manifest", "failed", str(error))
        return
    if changed is None:
        yield Check("manifest", "not possible", f"no {MANIFEST_FILE}: edits cannot be noticed")
    elif changed:
        sentences = (f"{name} {change}" for name, change in changed.items())
        yield Check("manifest", "failed", "; ".join(sentences))
    else:
        yield Check("manifest", "passed", f"every file of {MANIFEST_FILE} is as it was saved")


def check_reloads(folder: Path, proof: Proof, *, trust_remote_code: bool) -> None:
    """Load base and saved adapter afresh into host memory, and ask the proof's questions.

    For adapters whose start took a part out of the base: what is in memory is then not the base
    with the adapter that is on the disk, until that part has been taken out again in the same way.

    Raises:
        AdapterVerificationError: together they do not answer as the live model does.
    """
    adapter, device = read_adapter_folder(folder), torch.device("cpu")
    arguments = ModelArguments(
        proof.base_name,
        proof.base_commit or "main",
        "bfloat16" if proof.base_dtype == "bfloat16" else "float32",
        trust_remote_code=trust_remote_code,
    )
    base = load_on_device(arguments, device=device, adapter=adapter.config)
    for check in _check_answers(adapter, proof, base, device):
        if check.outcome != "passed":
            raise AdapterVerificationError(
                f"The adapter is not saved to {folder}: loaded again, it is not what was trained "
                f"({check.name}: {check.detail}). Its init_lora_weights takes a part out of the "
                "base that differs at each loading: leave it out."
            )


def _check_weights(adapter: AdapterFolder, proof: Proof | None) -> Iterator[Check]:
    if proof is None:
        yield Check("SHA-256", "not possible", _NO_PROOF)
    else:
        now = sha256_of_file(adapter.path / ADAPTER_FILE)
        if now == proof.adapter_sha256:
            yield Check("SHA-256", "passed", now[:16])
        else:
            yield Check("SHA-256", "failed", f"{ADAPTER_FILE} was changed after it was saved")
    zero = zero_lora_b(adapter.tensors)
    if not zero:
        yield Check("lora_B", "passed", "every lora_B has values")
    elif proof is None or not proof.trained:
        reason = "saved before any training" if proof else "perhaps not trained"
        yield Check("lora_B", "not possible", f"{len(zero)} are zero everywhere ({reason})")
    else:
        yield Check("lora_B", "failed", f"{len(zero)} are zero everywhere, such as {zero[0]}")


def _check_base(model: PreTrainedModel, proof: Proof | None) -> Iterator[Check]:
    if proof is None:
        yield Check("base model", "not possible", _NO_PROOF)
        return
    found = proof.base.differences(fingerprint_base(model))
    if found:
        yield Check("base model", "failed", f"not {proof.base_name}: {'; '.join(found)}")
    else:
        count = len(proof.base.weights)
        yield Check("base model", "passed", f"settings and samples of {count} tensors agree")


def _check_tokenizer(
    adapter: AdapterFolder, proof: Proof | None, arguments: ModelArguments
) -> Iterator[Check]:
    names = ("tokenizer", "end token")
    own = any((adapter.path / file).is_file() for file in TOKENIZER_FILES)
    try:
        of_base = load_tokenizer(arguments)
        tokenizer = load_tokenizer(ModelArguments(str(adapter.path.absolute()))) if own else of_base
        chat, chat_arguments = _chat_template_of(adapter.path) if own else (False, {})
    except LoraFsdpError as error:
        yield from (Check(name, "failed", str(error)) for name in names)
        return
    yield _compare_tokenizers(tokenizer, of_base, proof, own=own)
    if proof is None:
        yield Check(names[1], "not possible", _NO_PROOF)
        return
    try:
        now = end_of_answer(tokenizer, chat_template=chat, chat_template_kwargs=chat_arguments)
    except LoraFsdpError as error:
        yield Check(names[1], "failed", str(error))
        return
    right = now == proof.end_token_id
    text = repr(tokenizer.convert_ids_to_tokens(now))
    wrong = f"{text} ({now}), but the adapter learnt to end with {proof.end_token_id}"
    yield Check(names[1], "passed" if right else "failed", text if right else wrong)


def _compare_tokenizers(
    tokenizer: PreTrainedTokenizerBase,
    of_base: PreTrainedTokenizerBase,
    proof: Proof | None,
    *,
    own: bool,
) -> Check:
    if proof is not None and fingerprint_tokenizer(tokenizer) != proof.tokenizer_sha256:
        return Check("tokenizer", "failed", "other tokens than when the adapter was saved")
    if not same_vocabulary(of_base, tokenizer):
        return Check("tokenizer", "failed", "the base's tokenizer gives its tokens other ids")
    if not own and proof is None:
        return Check("tokenizer", "not possible", "the folder holds no tokenizer")
    return Check("tokenizer", "passed", f"{len(tokenizer)} tokens, the same ids as the base's")


def _chat_template_of(folder: Path) -> tuple[bool, dict[str, Any]]:
    """Whether the adapter was asked by a chat template, and with which arguments."""
    if not (folder / "task.json").is_file():
        return False, {}
    saved = read_json_object(folder, "task.json")
    arguments = saved.get("chat_template_kwargs")
    return saved.get("chat_template") is True, arguments if isinstance(arguments, dict) else {}


def _check_answers(
    adapter: AdapterFolder, proof: Proof | None, base: PreTrainedModel, device: torch.device
) -> Iterator[Check]:
    try:
        load_with_peft(adapter, base)
    except LoraFsdpError as error:
        yield Check("shapes", "failed", str(error))
        yield Check("answers", "not possible", "the adapter does not fit the base")
        return
    yield Check("shapes", "passed", "PEFT has a place for every tensor")
    if proof is None:
        yield Check("answers", "not possible", _NO_PROOF)
        return
    sequences = [ids for probe in proof.probes for ids in (probe.prompt_ids, *probe.answers)]
    highest = max(map(max, sequences))
    if highest >= base.config.get_text_config().vocab_size:
        yield Check("answers", "failed", f"token {highest} is outside the base's vocabulary")
        return
    dtype = str(base.dtype).removeprefix("torch.")
    try:
        model = attach_saved(adapter, base).to(device)
        packed = PackedModel(model)
        longest = max(map(len, sequences)) * 2  # a prompt with its answer
        keep_apart_if_needed(packed, device=device, longest=longest)
        now = probe_log_likelihoods(packed, proof.probes, device=device)
    except torch.OutOfMemoryError:
        raise
    except LOADING_ERRORS as error:  # a variant of LoRA with settings that make no sense
        yield Check("answers", "failed", f"the base cannot run with the adapter: {error}")
        return
    difference = probe_difference(proof.probes, proof.log_likelihoods, now)
    tolerance = probe_tolerance(dtype, proof.base_dtype)
    close = difference <= tolerance
    yield Check(
        "answers",
        "passed" if close else "failed",
        f"differ by {difference:.2g} nats a token from those at saving (tolerance {tolerance:g}; "
        f"saved in {proof.base_dtype}, now {dtype})",
    )
