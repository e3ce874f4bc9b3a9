"""Rules over the task and its rows."""

from __future__ import annotations

import math
from collections.abc import Iterator

from lora_fsdp.doctor.case import Case
from lora_fsdp.doctor.finding import Problem, Rules
from lora_fsdp.errors import LabelCollisionError
from lora_fsdp.training.checks import check_targets

# Fewer answers leave a share uncertain by more than 14 points either way.
_FEW_HELD_OUT = 50


RULES = Rules()


@RULES.error(
    "rows-unusable",
    "The task or its rows cannot be used: no such file, column or label, bad rows, no split.",
    "Change what is named; lora-fsdp tasks check shows the rows.",
)
def _rows(case: Case) -> None:
    case.rows.check()


@RULES.error(
    "labels-collide",
    "To this tokenizer two labels have the same tokens.",
    "Rename one of them.",
)
def _labels_collide(case: Case) -> Iterator[Problem]:
    if isinstance(error := case.encoded.error, LabelCollisionError):
        yield Problem(str(error))


@RULES.error(
    "rows-not-encoded",
    "A row that cannot be turned into tokens: no room for its text, or no tokens.",
    "Raise --max_length, or change the row that is named.",
)
def _not_encoded(case: Case) -> Iterator[Problem]:
    error = case.encoded.error
    if error is not None and not isinstance(error, LabelCollisionError):
        yield Problem(str(error))


@RULES.error(
    "no-supervised-tokens",
    "A training row without a supervised token.",
    "Give every training row an answer (build_target).",
)
def _no_supervised_tokens(case: Case) -> None:
    check_targets(case.encoded.value[: len(case.sample.value.train)])


@RULES.warning(
    "empty-answers",
    "Training rows whose only supervised token is the end token.",
    "Give them an answer, or leave them out.",
)
def _empty_answers(case: Case) -> Iterator[Problem]:
    train = case.encoded.value[: len(case.sample.value.train)]
    curt = [one for one in train if len(one.target_ids) == 1]
    # A task may count saying nothing as right, as SQuAD 2.0 does.
    if empty := [one.row for one in curt if "" not in one.example.references]:
        yield Problem(
            f"{len(empty)} of {len(train)} training rows have an answer of one supervised token, "
            f"the end token (for example row {empty[0]}): they teach the model to say nothing."
        )


@RULES.warning(
    "label-without-rows",
    "A label of the task that no training row has.",
    "Add rows, or leave the label out of --labels.",
)
def _without_rows(case: Case) -> Iterator[Problem]:
    balance = case.task_check.value.balance
    if absent := [label for label, (train, _) in balance.items() if train == 0]:
        yield Problem(f"No training row has the label {', '.join(map(repr, absent))}.")


@RULES.warning(
    "few-held-out-rows",
    f"Fewer than {_FEW_HELD_OUT} held-out rows: scores are uncertain.",
    "Raise --eval_size, or give --eval_file.",
)
def _few_held_out(case: Case) -> Iterator[Problem]:
    rows = len(case.rows.value.reported)
    if 0 < rows < _FEW_HELD_OUT:
        points = min(50, round(98 / math.sqrt(rows)))  # 1.96 * sqrt(0.25 / rows)
        yield Problem(
            f"{rows} rows are held out: a score on them is uncertain by up to {points} points "
            "either way (95 %)."
        )


@RULES.warning(
    "rows-dropped",
    "Rows without text or label, dropped by `--on_bad_rows drop`.",
    "Look at them with --on_bad_rows error.",
)
def _dropped(case: Case) -> Iterator[Problem]:
    if dropped := case.rows.value.dropped:
        kept = len(case.rows.value.train) + len(case.rows.value.scored)
        yield Problem(f"{dropped} of {dropped + kept} rows are dropped as unusable.")


def _concern(name: str, meaning: str, fix: str, *, of_tokens: bool = False) -> None:
    """A rule for what `lora-fsdp tasks check` warns of."""

    @RULES.warning(name, meaning, fix)
    def check(case: Case) -> Iterator[Problem]:
        found = case.sample_check.value if of_tokens else case.task_check.value
        if name in found.concerns:
            looked_at, there = found.training_rows, len(case.rows.value.train)
            part = "" if looked_at == there else f" ({looked_at} training rows were looked at.)"
            yield Problem(found.concerns[name] + part)


_concern(
    "rows-shortened",
    "More than one row in twenty is shortened to `--max_length`.",
    "Raise --max_length if the end of a text matters.",
    of_tokens=True,
)
_concern(
    "few-rows-of-a-label",
    "A label with fewer than 10 training rows.",
    "Add rows, or join rare labels.",
)
_concern(
    "held-out-trained-on",
    "Rows that are held out by the user's own splits, and trained on as well.",
    "Take them out of one of the two, or let the rows be split (--split_column none).",
)
_concern(
    "label-not-held-out",
    "A label without a held-out row.",
    "Raise --eval_size, or give --eval_file.",
)
_concern(
    "labels-skewed",
    "The commonest label has more than 20 times the rows of the rarest.",
    "Judge by macro_f1 (--metric_for_best_model macro_f1).",
)
_concern("labels-alike", "Labels that differ in case or blanks only.", "Write them alike.")
_concern(
    "answers-contradict",
    "Texts that occur with more than one answer.",
    "Look at them with lora-fsdp tasks check.",
)
