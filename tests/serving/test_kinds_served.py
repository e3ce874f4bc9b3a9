"""Every kind of answer as a server gives it, beside `lora-fsdp predict`.

Run: python -m pytest tests/serving/test_kinds_served.py
"""

from __future__ import annotations

import json
from dataclasses import replace

import pandas as pd
import pytest
import torch

from lora_fsdp.cli.main import main
from lora_fsdp.data.tables import read_table
from lora_fsdp.evaluation.prediction import Predictor
from lora_fsdp.serving.batches import Batches
from lora_fsdp.serving.bodies import parse_object, parse_rows
from lora_fsdp.serving.chat import completion, parse_chat
from lora_fsdp.serving.counters import Counters
from lora_fsdp.serving.limits import Limits, RequestError
from lora_fsdp.serving.served import Served
from tests.support.built_in import RECIPES, data_arguments, save_chat_model, train_recipe

LIMITS = Limits(request_seconds=120)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return save_chat_model(tmp_path_factory.mktemp("base") / "chat")


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def rows_of(recipe):
    """Six of the recipe's own rows, as JSON has them."""
    table = read_table(data_arguments(recipe).data_file).head(6)
    table = table.astype(object).where(pd.notna(table), None)
    return json.loads(json.dumps(table.to_dict(orient="records"), default=str))


def asked_over_http(served, body):
    """As `POST /predict`, from bytes to columns."""
    asked = parse_rows(parse_object(json.dumps(body).encode()), served.task, LIMITS)
    batches = Batches(served.predictor, limits=LIMITS, counters=Counters())
    try:
        columns = batches.submit(asked.examples, coverage=None).result(120)
    finally:
        batches.stop()
    return [{k: v[i] for k, v in columns.items()} for i in range(len(asked.examples))]


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.slow
def test_each_recipe(recipe, base, tmp_path, capsys):
    train_recipe(recipe, base, tmp_path / "run")
    served = Served(Predictor.from_adapter(tmp_path / "run"), recipe)
    served.check()
    rows = rows_of(recipe)
    source, target = tmp_path / "rows.jsonl", tmp_path / "answers.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = ["predict", source, "--adapter", tmp_path / "run", "--output", target]
    code = main([*map(str, words), "--column_prefix", "new "])
    assert code == 0, capsys.readouterr().err
    found = asked_over_http(served, {"rows": rows})
    for line, one in zip(target.read_text().splitlines(), found, strict=True):
        written = json.loads(line)
        expected = {k[4:]: v for k, v in written.items() if k.startswith("new ")}
        assert one.keys() == expected.keys()
        for name, value in expected.items():
            if isinstance(value, float):
                assert one[name] == pytest.approx(value, abs=1e-5), name
            else:
                assert one[name] == value, name


def test_one_requests_fault_is_not_anothers(base, tmp_path):
    """Both are scored together; of one a choice is too long for the model."""
    train_recipe("multiple-choice", base, tmp_path / "run")
    served = Served(Predictor.from_adapter(tmp_path / "run"), "choices")
    [good, other] = (parse_rows({"rows": [row]}, served.task, LIMITS)
                     for row in rows_of("multiple-choice")[:2])  # fmt: skip
    [example] = other.examples
    long = [replace(example, choices=(*example.choices, " far too long" * 2000))]
    batches = Batches(served.predictor, limits=LIMITS, counters=Counters())
    try:
        # The first is being scored while the others gather.
        first = batches.submit(good.examples * 40, coverage=None)
        asked = [batches.submit(one, coverage=None) for one in (good.examples, long)]
        first.result(120)
        answer = asked[0].result(120)
        with pytest.raises(RequestError) as refused:
            asked[1].result(120)
    finally:
        batches.stop()
    assert answer["predicted_choice"] == first.result()["predicted_choice"][:1]
    assert refused.value.status == 400
    assert batches.waiting_rows == 0
    with pytest.raises(RequestError, match="stopping"):
        batches.submit(good.examples, coverage=None)


def test_generated_text_as_a_completion(base, tmp_path):
    """The text, without log-probabilities, and whole or not at all."""
    train_recipe("generation", base, tmp_path / "run")
    served = Served(Predictor.from_adapter(tmp_path / "run"), "writer")
    message = {"messages": [{"role": "user", "content": "Say something."}]}
    if not served.task.takes_one_text:
        with pytest.raises(RequestError, match='give "rows" to POST /predict'):
            parse_chat(message, served, LIMITS)
        return
    needed = served.longest_text
    for more in ({"max_tokens": needed - 1}, {"logprobs": True}):
        with pytest.raises(RequestError, match=next(iter(more))) as refused:
            parse_chat(message | more, served, LIMITS)
        assert refused.value.status == 400
    asked = parse_chat(message | {"max_tokens": needed}, served, LIMITS)
    columns = served.predictor.columns(asked.asked.examples)
    found = completion(asked, columns, served)
    [text] = served.predictor.write(asked.asked.examples)
    assert found["choices"][0]["message"]["content"] == text.strip()
    assert found["usage"]["completion_tokens"] > 0
