"""A run before its model is placed: data as tokens, the adapter attached, the ranks compared."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

from peft import LoraConfig, PeftModel
from transformers import PreTrainedModel

from lora_fsdp.adapter.attach import attach_adapter
from lora_fsdp.adapter.continuing import check_base_of_start, load_start
from lora_fsdp.adapter.folder import ADAPTER_FILE, AdapterFolder
from lora_fsdp.adapter.probes import Probe, build_probes
from lora_fsdp.adapter.settings import check_settings
from lora_fsdp.arguments import FineTuningArguments
from lora_fsdp.arguments.fsdp import FsdpSettings
from lora_fsdp.base.fingerprints import BaseFingerprint, fingerprint_base
from lora_fsdp.base.folders import sha256_of_file
from lora_fsdp.base.layers import base_model
from lora_fsdp.base.streaming import StoredBase, WholeBase, model_of
from lora_fsdp.compute.architectures import check_architecture, check_token_ids
from lora_fsdp.data.encoding import EncodedExample, Encoder
from lora_fsdp.data.few_shot import check_room
from lora_fsdp.data.packing import Packing
from lora_fsdp.data.schedule import Schedule
from lora_fsdp.data.workload import Work, measure_work, probed_rows
from lora_fsdp.errors import ArgumentError, UnsupportedModelError
from lora_fsdp.evaluation.generation import LEAST_NEW_TOKENS
from lora_fsdp.placement.request import Request
from lora_fsdp.ranks import check_ranks_agree
from lora_fsdp.training.checks import check_reference, check_targets
from lora_fsdp.training.given import Base, GivenData
from lora_fsdp.training.placing import check_can_be_placed, request_of_run
from lora_fsdp.training.run_fingerprints import run_fingerprints
from lora_fsdp.training.saving.resume import run_facts
from lora_fsdp.training.step.objectives.objective import Objective

_BEGAN = "the adapter that it began with (SHA-256)"


@dataclass(frozen=True)
class PreparedRun:
    """What a trainer settles before its model is placed, the same on every rank.

    Attributes:
        model: the base with its adapter, not yet where it stays.
        stored: where the base's weights are, if the model has not got them yet.
        train, held_out, test: the examples as tokens.
        base_fingerprint: of the base before the adapter was attached.
        probes: fixed questions for the saved adapter's proof.
        request: what the run asks for of its placement.
        schedule: its optimizer steps.
        work: what training will compute on each rank.
        work_as: the same with examples laid otherwise into sequences.
        facts: what a checkpoint says of the run.
    """

    model: PeftModel
    stored: StoredBase | None
    train: list[EncodedExample]
    held_out: list[EncodedExample]
    test: list[EncodedExample]
    base_fingerprint: BaseFingerprint
    probes: list[Probe]
    request: Request
    schedule: Schedule
    work: Work
    work_as: Callable[[Packing], Work]
    facts: dict[str, Any]

    @property
    def shortened(self) -> int:
        """How many examples had their text shortened."""
        return sum(example.shortened for example in (*self.train, *self.held_out, *self.test))


def prepare_run(
    model: Base,
    args: FineTuningArguments,
    *,
    settings: FsdpSettings | None,
    objective: Objective,
    encoder: Encoder,
    data: GivenData,
    peft_config: LoraConfig | None,
    start: AdapterFolder | None = None,
) -> PreparedRun:
    """Tokenise, attach the adapter, and compare the ranks: a collective call.

    Raises:
        ArgumentError, UnsupportedModelError: the data or the model cannot be trained with.
        RankMismatchError: the ranks were given different things.
    """
    _check_adapters(model, peft_config, start=start)
    to_train, to_score = encoder.encode(data.train), encoder.encode([*data.held_out, *data.test])
    held_out, test = to_score[: len(data.held_out)], to_score[len(data.held_out) :]
    check_targets(to_train)
    check_room(encoder, [*to_train, *to_score], option="few_shot")
    if (base := _empty(model)) is not None:
        check_token_ids(base, [*to_train, *to_score], encoder.tokenizer)
    if isinstance(model, WholeBase):
        model = _loaded(model, args, settings=settings, adapter=peft_config)
    adapted, stored, base_fingerprint = _with_adapter(
        model, peft_config, longest=encoder.max_length, start=start
    )
    check_reference(objective, adapted)
    request = request_of_run(adapted, args, settings=settings)
    fingerprints = run_fingerprints(args, adapted, train=to_train, held_out=to_score, stored=stored)
    began = {} if start is None else {_BEGAN: sha256_of_file(start.path / ADAPTER_FILE)}
    check_ranks_agree({**fingerprints, **began})
    facts = run_facts(args, adapted, fingerprints=fingerprints)
    facts["must_stay"] |= began

    def work_as(packing: Packing) -> Work:
        return measure_work(
            vars(args),
            to_train,
            to_score,
            ranks=args.world_size,
            share_prefix=request.shares_prefix and not packing.is_apart,
            tree_of=objective.tree,
            packing=packing,
            probed=probed_rows(encoder.task, args.probe_rows, len(to_train)),
        )

    return PreparedRun(
        model=adapted,
        stored=stored,
        train=to_train,
        held_out=held_out,
        test=test,
        base_fingerprint=base_fingerprint,
        probes=build_probes(encoder, [one.example for one in [*to_train, *held_out]]),
        request=request,
        schedule=Schedule.of(vars(args), rows=len(to_train), ranks=args.world_size),
        work=work_as(request.packing_choice.packing),
        work_as=work_as,
        facts=facts,
    )


def _empty(model: Base) -> PreTrainedModel | None:
    """The base, whose weights need not be there; `None` if loading it will say what is wrong."""
    if isinstance(model, PeftModel):
        return base_model(model)
    try:
        return model_of(model)
    except UnsupportedModelError:
        return None


def _check_adapters(
    model: object, config: LoraConfig | None, *, start: AdapterFolder | None
) -> None:
    """Refuse settings of an adapter that a run cannot carry out: of the one that is given, or of
    those that the model already has."""
    if config is not None:
        check_settings(config)
    elif isinstance(model, PeftModel):
        for own in model.peft_config.values():
            check_settings(own)
    if start is not None and isinstance(model, PeftModel):
        raise ArgumentError("Give adapter_name_or_path, or a model that already has an adapter.")


def _loaded(
    base: WholeBase,
    args: FineTuningArguments,
    *,
    settings: FsdpSettings | None,
    adapter: LoraConfig | None,
) -> PreTrainedModel:
    """The base, loaded once it is known that the run can be placed."""
    if adapter is not None:
        try:
            skeleton = base.skeleton()
        except UnsupportedModelError:
            return base.load()  # which says what is wrong with it
        check_can_be_placed(skeleton, adapter, args, settings=settings)
    return base.load()


def _with_adapter(
    model: PreTrainedModel | PeftModel | StoredBase,
    config: LoraConfig | None,
    *,
    longest: int,
    start: AdapterFolder | None,
) -> tuple[PeftModel, StoredBase | None, BaseFingerprint]:
    """The model with its adapter, where its weights are, and which base it is."""
    if isinstance(model, PeftModel) == (config is not None):
        raise ArgumentError("Give a peft_config, or a model that already has an adapter.")
    if isinstance(model, PeftModel):
        check_architecture(base_model(model), longest=longest)
        return model, None, fingerprint_base(model)
    base, stored, fingerprint = checked_base(model, longest=longest)
    if start is not None:
        check_base_of_start(start, fingerprint, base=base.name_or_path or type(base).__name__)
    adapted = attach_adapter(base, cast(LoraConfig, config), stored=stored)
    if start is not None:
        load_start(adapted, start)
    return adapted, stored, fingerprint


def checked_base(
    base: PreTrainedModel | StoredBase, *, longest: int
) -> tuple[PreTrainedModel, StoredBase | None, BaseFingerprint]:
    """The model, where its weights are if it has not got them, and which base it is.

    To be asked before an adapter is attached, which may change the base (PiSSA), and before it is
    sharded.

    Raises:
        UnsupportedModelError: it cannot be trained with examples as long as the `longest`.
    """
    model = model_of(base)
    check_architecture(model, longest=longest)
    if isinstance(base, StoredBase):
        return model, base, base.fingerprint()
    return model, None, fingerprint_base(model)


def fold_accumulation(args: FineTuningArguments) -> FineTuningArguments:
    """A copy with accumulation folded into the batch, which packed sequences make needless."""
    folded = copy.copy(args)
    folded.per_device_train_batch_size *= args.gradient_accumulation_steps
    folded.gradient_accumulation_steps = 1
    folded._n_gpu = min(args.n_gpu, 1)  # several GPUs are used by several processes
    return folded


def longest_answer(args: FineTuningArguments, examples: Sequence[EncodedExample]) -> int:
    """How many tokens a generated text may have: what was asked for, or the longest target."""
    if args.max_new_tokens is not None:
        return args.max_new_tokens
    longest = max((len(example.target_ids) for example in examples), default=0)
    return max(LEAST_NEW_TOKENS, longest)
