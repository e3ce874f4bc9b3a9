"""Several adapters trained at once over one frozen base, each as if it were alone.

Every optimizer step lays each adapter's share into packed sequences of its own; sequences of
different adapters form one batch, which the base computes in one pass (`SharedPass`). Gradients lie
in one block and are summed over ranks in one all-reduce. Everything else is each adapter's own:
order of examples, optimizer, schedule, norm, clipping, number of steps. An adapter that is finished
leaves the batch, and so does one whose loss or gradient is not finite.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import cast

import torch
from peft import PeftModel
from transformers import PreTrainedModel
from transformers.trainer_utils import SaveStrategy

from lora_fsdp.adapter.adapter_set import AdapterSet
from lora_fsdp.adapter.attach import attach_adapters
from lora_fsdp.arguments import FineTuningArguments
from lora_fsdp.base.streaming import OpenBase, StoredBase, WholeBase, model_of
from lora_fsdp.compute.architectures import check_token_ids
from lora_fsdp.compute.attention import avoid_kernels_planned_by_shape
from lora_fsdp.compute.grouped.grouped_pass import GroupedPass
from lora_fsdp.compute.packing_check import check_packing, sample_of, why_not_shared
from lora_fsdp.compute.shared_pass import SharedPass, why_apart
from lora_fsdp.data.encoding import EncodedExample, Encoder
from lora_fsdp.data.packing import PackedSequence
from lora_fsdp.data.sampling import TrainingStep, TrainingSteps
from lora_fsdp.data.workload import measure_work
from lora_fsdp.distributed.drift import check_no_drift
from lora_fsdp.distributed.launch import accelerate_without_fsdp, read_fsdp_settings
from lora_fsdp.distributed.orphans import end_with_launcher
from lora_fsdp.distributed.sharding import release_gathered
from lora_fsdp.errors import ArgumentError, TrainingInterrupted, UnsupportedModelError
from lora_fsdp.ranks import check_ranks_agree, rank, sum_over_ranks
from lora_fsdp.training.checks import check_arguments, check_targets
from lora_fsdp.training.placing import place_for_training, request_of_run
from lora_fsdp.training.prepared import checked_base
from lora_fsdp.training.run_fingerprints import run_fingerprints
from lora_fsdp.training.step.objectives.objective import Objective
from lora_fsdp.training.step.objectives.supervised import Supervised
from lora_fsdp.training.together.grouped_step import GroupedStep
from lora_fsdp.training.together.members import Member, MemberPlan, make_member
from lora_fsdp.training.together.state import CommonState, facts_of
from lora_fsdp.training.watching.heartbeat import Heartbeat
from lora_fsdp.training.watching.interruption import StopRequests

logger = logging.getLogger(__name__)


class AdaptersTogether:
    """Trains several adapters at once. Every method is a collective call.

    Args:
        model: the frozen base, loaded or yet to be read (`open_base`).
        args: of all together: the output folder for checkpoints, how often to save and to log.
        plans: one for each adapter; the same on every rank.
        encoder: which encoded the examples.
        held_out: examples that will be scored.
        objective: what is minimised; `None` = supervised learning of the targets.
        grouped: whether the parts are computed as batches of one size, on a GPU as CUDA graphs;
            `None` = on a GPU, unless `--step eager` is asked for or the base is sharded.

    Attributes:
        members: the adapters, in the order of `plans`.
        shared: computes a batch, each part with its own adapter.
        grouped: makes steps of parts of one size; `None` = each part is computed by itself.
        adapters: parameters and gradients of all.

    Raises:
        ArgumentError, UnsupportedModelError: the data or the model cannot be trained with.
    """

    def __init__(
        self,
        model: OpenBase,
        args: FineTuningArguments,
        *,
        plans: Sequence[MemberPlan],
        encoder: Encoder,
        held_out: Sequence[EncodedExample] = (),
        objective: Objective | None = None,
        grouped: bool | None = None,
    ) -> None:
        self.args, self.encoder, self.plans = args, encoder, list(plans)
        self.objective = objective or Supervised()
        self.settings = read_fsdp_settings()
        with accelerate_without_fsdp():
            self.device = args.device
        check_arguments(args, self.settings, max_length=encoder.max_length)
        if not plans or not all(plan.train for plan in plans):
            raise ArgumentError("There are no training examples: give every adapter some.")
        for plan in plans:
            if (reason := why_apart(plan.config)) is not None:
                raise ArgumentError(
                    f"The adapter {plan.name} cannot share a pass over the base: {reason}."
                )
        self.held_out = list(held_out)
        stored = self._attach(model)
        self._check_ranks(stored)
        self._place(stored)
        self.members = self._members()
        self.grouped = self._grouped(grouped)
        self._passes = self.step = self._logged = 0

    @property
    def passes(self) -> int:
        """How often the base was run forward and backward so far."""
        return self._passes if self.grouped is None else self.grouped.passes

    # ---- before training ------------------------------------------------------------------------

    def _attach(self, model: OpenBase) -> StoredBase | None:
        """Attach every adapter; where the base's weights are, if they have not been read."""
        everything = [*(one for plan in self.plans for one in plan.train), *self.held_out]
        for plan in self.plans:
            check_targets(list(plan.train))
        if isinstance(model, WholeBase):
            model = model.load()
        check_token_ids(model_of(model), everything, self.encoder.tokenizer)
        base, stored, self.base_fingerprint = checked_base(model, longest=self.encoder.max_length)
        names = ["default", *(f"member{place}" for place in range(1, len(self.plans)))]
        self.names = names
        self.model: PeftModel = attach_adapters(
            base,
            {name: plan.config for name, plan in zip(names, self.plans, strict=True)},
            seeds=[int(plan.args.seed) for plan in self.plans],
            stored=stored,
        )
        return stored

    def _check_ranks(self, stored: StoredBase | None) -> None:
        first = self.plans[0]
        own = run_fingerprints(
            self.args, self.model, train=first.train, held_out=self.held_out, stored=stored
        )
        self.facts = facts_of(self.args, self.plans, fingerprints=own)
        check_ranks_agree({**own, **self.facts["must_stay"]})

    def _place(self, stored: StoredBase | None) -> None:
        avoid_kernels_planned_by_shape()
        request = request_of_run(self.model, self.args, settings=self.settings)
        # Fused layers have one adapter each.
        self.request = replace(request, step="eager")
        longest = max(self.plans, key=lambda plan: sum(one.tokens for one in plan.train))
        work = measure_work(
            vars(longest.args),
            list(longest.train),
            self.held_out,
            ranks=self.args.world_size,
            share_prefix=self.request.shares_prefix,
            tree_of=self.objective.tree,
        )
        self.placement, self.packed = place_for_training(
            self.model,
            request=self.request,
            device=self.device,
            work=work,
            longest=self.encoder.max_length,
            stored=stored,
        )
        if self.placement.layout.recomputed:
            # Recomputing runs a layer's forward outside of the pass that says whose each part is.
            raise ArgumentError(
                f"{len(self.plans)} adapters at once need recomputed activations, which a shared "
                "pass does not have: lower --adapters_at_once (1 = one after the other)."
            )
        self.shared = SharedPass(self.packed)
        self.adapters = AdapterSet.of(self.model)
        self.adapters.broadcast()
        self.adapters.check_equal()
        sample = sample_of(longest.train, self.objective.tree, tokens=self.placement.largest_tokens)
        with self.shared.only(self.names[0]):
            check_packing(self.packed, device=self.device, sample=sample)
        if (reason := why_not_shared(self.shared, device=self.device, sample=sample)) is not None:
            raise UnsupportedModelError(
                f"{reason}: train them one after the other (--adapters_at_once 1)."
            )
        release_gathered(self.model)

    def _grouped(self, asked: bool | None) -> GroupedStep | None:
        on_gpu = self.device.type == "cuda"
        chosen = on_gpu and self.args.step != "eager" if asked is None else asked
        possible = self.placement.is_whole and not self.objective.needs_reference
        if asked and not possible:
            raise ValueError("A grouped pass needs a whole base on every rank, and no reference.")
        if not (chosen and possible):
            return None
        return GroupedStep(
            GroupedPass(self.shared, captured=on_gpu),
            objective=self.objective,
            adapters=self.adapters,
            device=self.device,
            captured=on_gpu,
        )

    def _members(self) -> list[Member]:
        return [
            make_member(
                plan,
                adapter_name=name,
                adapter=self.adapters.adapters[name],
                steps=TrainingSteps(
                    list(plan.train),
                    examples_per_step=self.examples_per_step(plan),
                    rank=self.args.process_index,
                    world_size=self.args.world_size,
                    seed=plan.order_seed,
                    share_prefix=self.placement.shares_prefix,
                    max_tokens=self.placement.sequence_length,
                    tree_of=self.objective.tree,
                    count_of=self.objective.count,
                ),
                model=self.model,
            )
            for name, plan in zip(self.names, self.plans, strict=True)
        ]

    def examples_per_step(self, plan: MemberPlan) -> int:
        """Of an adapter, over all ranks."""
        own = plan.args
        return int(
            own.per_device_train_batch_size * own.gradient_accumulation_steps * own.world_size
        )

    # ---- training -------------------------------------------------------------------------------

    def train(self, *, resume: bool = False) -> None:
        """Train every adapter to its end, from the beginning or from the newest whole checkpoint.

        Raises:
            DamagedCheckpointError, ResumeMismatchError: a checkpoint cannot be gone on from.
            TrainingInterrupted: stopped by SIGTERM or `max_hours`, with a checkpoint.
        """
        end_with_launcher()
        folder = Path(str(self.args.output_dir))
        state = CommonState(folder, self.facts, limit=self.args.save_total_limit)
        self.step = state.put_back(self.members) if resume else 0
        self._logged = max(member.step for member in self.members)
        place = {"rank": self.args.process_index, "world_size": self.args.world_size}
        stops = StopRequests(**place, max_hours=self.args.max_hours)
        heart = Heartbeat(**place, stall_seconds=self.args.stall_seconds, run_folder=folder)
        stops.begin(self.step + 1)
        self.model.train()
        with ExitStack() as held:
            held.enter_context(stops.watching())
            held.enter_context(heart.watching())
            if self.grouped is not None:
                held.callback(self.grouped.release)
            while live := [member for member in self.members if member.is_live]:
                heart.beat(self.step + 1, "forward and backward")
                if not self.make_step(live):
                    continue
                heart.armed()
                self._after_step()
                stopping = stops.is_last(self.step)
                if stopping or self._saves_now(live):
                    self.settle()
                    with heart.away("saving a checkpoint"):
                        self.adapters.check_equal()
                        state.save(self.members, step=self.step)
                if stopping:
                    raise TrainingInterrupted(
                        f"Training of {len(self.members)} adapters stopped after step {self.step} "
                        f"({stops.reason}), with a checkpoint. Continue with "
                        "--resume_from_checkpoint true."
                    )
            self.settle()
            self._log_losses()
        self.adapters.drop_gradients()
        self.adapters.check_equal()

    def make_step(self, live: Sequence[Member]) -> bool:
        """One optimizer step of each of `live`; whether any was left to make one."""
        if self.grouped is not None:
            made = self.grouped.make_step(live)
            self.step += made
            return made
        losses = self.gradients(live)
        self.adapters.sum_gradients()
        sum_over_ranks(losses)
        norms = torch.stack([member.clip() for member in live])
        for member, loss, norm in zip(live, losses.tolist(), norms.tolist(), strict=True):
            member.update(loss, norm)
        self.step += 1
        return True

    def settle(self) -> None:
        """Wait for steps that are under way, and take in what they came to."""
        if self.grouped is not None:
            self.grouped.settle()

    def gradients(self, live: Sequence[Member]) -> torch.Tensor:
        """Gradients of this rank's shares into the adapters' block; each one's loss, [live]."""
        self.adapters.zero_gradients()
        shares = [member.share() for member in live]
        losses = torch.zeros(len(live), device=self.device)
        for turn in range(max(len(share.sequences) for share in shares)):
            places = [i for i, share in enumerate(shares) if turn < len(share.sequences)]
            sequences = [shares[i].sequences[turn].to(self.device) for i in places]
            log_probs = self.shared.label_log_probs(
                sequences, [live[i].adapter_name for i in places]
            )
            parts = [
                self._loss(sequence, found, shares[i])
                for i, sequence, found in zip(places, sequences, log_probs, strict=True)
            ]
            torch.stack(parts).sum().backward()
            for i, part in zip(places, parts, strict=True):
                losses[i] += part.detach()
            self._passes += 1
        return losses

    def _loss(
        self, sequence: PackedSequence, log_probs: torch.Tensor, share: TrainingStep
    ) -> torch.Tensor:
        return self.objective.loss(sequence, log_probs, None) * (1.0 / share.denominator)

    def _after_step(self) -> None:
        every = self.args.drift_check_steps
        if every and self.step % every == 0:
            check_no_drift(self.adapters, step=self.step, last_equal=self.step - every or None)
        self._log_losses()

    def _log_losses(self) -> None:
        """Say those of the newest step that is known and was not said."""
        newest = max((one.log[-1]["step"] for one in self.members if one.log), default=0)
        if newest <= self._logged:
            return
        self._logged = newest
        noted = [one for one in self.members if one.log and one.log[-1]["step"] == newest]
        if rank() == 0:
            last = max(member.last for member in self.members)
            losses = " · ".join(f"{one.plan.name} {one.log[-1]['loss']:.4f}" for one in noted)
            logger.info("step %d/%d  loss %s", newest, last, losses)

    def _saves_now(self, live: Sequence[Member]) -> bool:
        strategy = str(SaveStrategy(self.args.save_strategy).value)
        every = {
            "steps": max(1, int(self.args.save_steps)),
            "epoch": len(live[0].steps),
        }.get(strategy)
        return every is not None and self.step % every == 0

    # ---- afterwards -----------------------------------------------------------------------------

    @contextmanager
    def only(self, member: Member | None) -> Iterator[None]:
        """Within the block the model computes with one adapter alone; `None` = the base."""
        with self.shared.only(None if member is None else member.adapter_name):
            yield

    def release(self) -> PreTrainedModel:
        """The base as it was, without adapters and patches; for a base that is not sharded."""
        self.packed.undo()
        return cast(PreTrainedModel, self.model.unload())
