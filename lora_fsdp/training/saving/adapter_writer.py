"""An adapter's folder with all that goes with it: tokenizer, task, arguments, and its proof."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

from peft import PeftModel

from lora_fsdp.adapter.folder import ADAPTER_FILE
from lora_fsdp.adapter.probes import Probe, probe_log_likelihoods
from lora_fsdp.adapter.proof import PROOF_FILE, Proof, beside
from lora_fsdp.adapter.saved import save_adapter
from lora_fsdp.adapter.settings import STARTS_FROM_BASE
from lora_fsdp.adapter.verification import check_reloads
from lora_fsdp.arguments import FineTuningArguments
from lora_fsdp.base.fingerprints import BaseFingerprint, fingerprint_tokenizer
from lora_fsdp.base.folders import sha256_of_file
from lora_fsdp.base.layers import base_model
from lora_fsdp.compute.packed_model import PackedModel
from lora_fsdp.data.encoding import Encoder
from lora_fsdp.distributed.sharding import release_gathered
from lora_fsdp.evaluation.outputs import write_json
from lora_fsdp.evaluation.prediction import save_task


@dataclass(frozen=True, kw_only=True)
class AdapterWriter:
    """Writes the live adapter, and what it can later be checked against.

    Attributes:
        model: placed, with its adapter.
        args: the run's.
        encoder: how examples are prompted.
        max_new_tokens: longest text that is generated.
        base_fingerprint: of the base before the adapter was attached.
        probes: the questions of the proof.
        packed: the model as it computes packed sequences.
        autocast: the context of the forward.
        adapter: which of several that are trained together; `None` = there is one.
    """

    model: PeftModel
    args: FineTuningArguments
    encoder: Encoder
    max_new_tokens: int
    base_fingerprint: BaseFingerprint
    probes: list[Probe]
    packed: PackedModel
    autocast: Callable[[], AbstractContextManager[object]]
    adapter: str | None = None

    def answer_probes(self) -> list[list[float]]:
        """The live adapter's answers to the probes; a collective call."""
        with self.autocast():
            answers = probe_log_likelihoods(self.packed, self.probes, device=self.args.device)
        release_gathered(self.model)
        return answers

    def write(
        self, folder: Path, answers: list[list[float]], *, goes_to: Path, trained: bool
    ) -> None:
        """Write into `folder`, whose path will be `goes_to`. Rank 0 can do it alone.

        Args:
            answers: of `answer_probes`.
            trained: whether a step with a learning rate has moved the adapter.

        Raises:
            AdapterVerificationError: what was written is not what is in memory, or does not answer
                like it when it is loaded again.
        """
        save_adapter(self.model, folder, trained=trained, adapter=self.adapter)
        # PEFT's form with nothing filled in, which would take the place of a card with contents.
        (folder / "README.md").unlink(missing_ok=True)
        self.encoder.tokenizer.save_pretrained(folder)
        save_task(
            self.encoder,
            folder,
            max_new_tokens=self.max_new_tokens,
            packing=self.packed.packing,
        )
        proof = self._proof(folder, answers, goes_to=goes_to, trained=trained)
        write_json(folder / PROOF_FILE, proof.to_json())
        config = self.model.peft_config[self.adapter or str(self.model.active_adapter)]
        if getattr(config, "init_lora_weights", True) in STARTS_FROM_BASE:
            code = not type(base_model(self.model)).__module__.startswith("transformers.")
            check_reloads(folder, proof, trust_remote_code=code)
        # As JSON: a pickle would have to be trusted by whoever reads it.
        arguments = json.dumps(self.args.to_dict(), indent=2, default=str)
        (folder / "training_args.json").write_text(arguments, encoding="utf-8")

    def _proof(
        self, folder: Path, answers: list[list[float]], *, goes_to: Path, trained: bool
    ) -> Proof:
        config = base_model(self.model).config
        name, quantization = str(config.name_or_path), getattr(config, "quantization_config", None)
        return Proof(
            adapter_sha256=sha256_of_file(folder / ADAPTER_FILE),
            trained=trained,
            base=self.base_fingerprint,
            base_name=name,
            base_beside=beside(name, goes_to),
            base_commit=getattr(config, "_commit_hash", None),
            base_dtype=str(self.packed.dtype).removeprefix("torch."),
            base_quantization=None if quantization is None else str(quantization),
            tokenizer_sha256=fingerprint_tokenizer(self.encoder.tokenizer),
            end_token_id=self.encoder.end_token_id,
            probes=self.probes,
            log_likelihoods=answers,
        )
