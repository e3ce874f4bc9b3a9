"""Conversations that a chat template refuses: named by their row, or left out.

Run: python -m pytest tests/data/test_refused_conversations.py
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lora_fsdp.arguments import DataArguments
from lora_fsdp.data.encoding import Encoder
from lora_fsdp.data.rows import TaskData, load_task_data, without_refused_rows
from lora_fsdp.errors import ArgumentError, MalformedRowError, NoRowsError
from tests.data.test_encoding import chat_tokenizer

EACH = "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
START = "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
RAISES = (
    "{% for message in messages %}{% if message['role'] == 'system' %}"
    "{{ raise_exception('System role not supported') }}{% endif %}"
    f"{EACH}{{% endfor %}}{START}"
)
DROPS = (
    "{% for message in messages %}{% if message['role'] != 'system' %}"
    f"{EACH}{{% endif %}}{{% endfor %}}{START}"
)
NEVER = "{{ raise_exception('No.') }}"


def loaded(
    folder: Path, *, systems: set[int], rows: int = 10, drop: bool
) -> tuple[DataArguments, TaskData]:
    lines = []
    for number in range(1, rows + 1):
        system = [{"role": "system", "content": "Be short."}] if number in systems else []
        asked = [{"role": "user", "content": f"Question {number}"}]
        answer = [{"role": "assistant", "content": f"Answer {number}"}]
        lines.append(json.dumps({"messages": [*system, *asked, *answer]}))
    (folder / "data.jsonl").write_text("\n".join(lines))
    arguments = DataArguments(
        task="chat",
        data_file=str(folder / "data.jsonl"),
        chat_template=True,
        on_bad_rows="drop" if drop else "error",
        eval_size=3,
    )
    return arguments, load_task_data(arguments, seed=0)


@pytest.mark.parametrize(
    ("template", "words"), [(RAISES, "System role not supported"), (DROPS, "drops or repeats")]
)
def test_row_is_named(tmp_path: Path, template: str, words: str) -> None:
    _, data = loaded(tmp_path, systems={4}, drop=False)
    encoder = Encoder(chat_tokenizer(template), task=data.task, chat_template=True)
    with pytest.raises(MalformedRowError, match=rf"^Row 4: .*{words}.*--on_bad_rows drop"):
        encoder.encode([*data.train, *data.held_out])


@pytest.mark.parametrize("template", [RAISES, DROPS])
def test_rows_are_left_out_and_counted(tmp_path: Path, template: str) -> None:
    arguments, data = loaded(tmp_path, systems={2, 4, 9}, drop=True)
    tokenizer = chat_tokenizer(template)
    kept = without_refused_rows(arguments, data, lambda: tokenizer)
    assert kept.dropped == 3
    examples = [*kept.train, *kept.held_out]
    assert sorted(example.row for example in examples) == [1, 3, 5, 6, 7, 8, 10]
    Encoder(tokenizer, task=data.task, chat_template=True).encode(examples)


def test_nothing_is_left_out_unasked(tmp_path: Path) -> None:
    arguments, data = loaded(tmp_path, systems={2}, drop=False)
    assert without_refused_rows(arguments, data, lambda: chat_tokenizer(RAISES)) is data


def test_no_row_is_left(tmp_path: Path) -> None:
    arguments, data = loaded(tmp_path, systems=set(range(1, 11)), drop=True)
    with pytest.raises(NoRowsError, match=r"takes no row: Row \d+: .*System role not supported"):
        without_refused_rows(arguments, data, lambda: chat_tokenizer(RAISES))


@pytest.mark.parametrize("drop", [False, True])
def test_template_that_takes_nothing_is_no_row_s_fault(tmp_path: Path, drop: bool) -> None:
    arguments, data = loaded(tmp_path, systems={2}, drop=drop)
    tokenizer = chat_tokenizer(NEVER)

    def refuse() -> None:
        encoder = Encoder(tokenizer, task=data.task, chat_template=True)
        encoder.encode(without_refused_rows(arguments, data, lambda: tokenizer).train)

    with pytest.raises(ArgumentError, match="cannot be rendered"):
        refuse()
