"""`lora-fsdp serve`: a real server process over a real tiny adapter.

Run: python -m pytest tests/serving/test_serve.py
"""

from __future__ import annotations

import json
import math
import re
import shlex
import socket
import subprocess
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from benchmarks.serving import PAGE, page_text
from benchmarks.throughput import RESULTS
from lora_fsdp import DataArguments, FineTuningArguments, LoraArguments, ModelArguments, finetune
from lora_fsdp.cli.main import main
from tests.support.documented import of_kind
from tests.support.served import serving
from tests.support.tiny import LABELS, toy_table

CHAT, PREDICT = "/v1/chat/completions", "/predict"
STORED = RESULTS / "serving.json"
LIMITS = ("--max_rows", 20, "--max_text_chars", 2000, "--body_seconds", 1)


@pytest.fixture(scope="module")
def adapter(model_folder, tmp_path_factory):
    """A run's output folder, with a calibration."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("served")
    toy_table(160).to_csv(folder / "table.csv", index=False)
    finetune(
        model_args=ModelArguments(model_name_or_path=str(model_folder)),
        lora_args=LoraArguments(lora_target_modules=["all-linear"]),
        data_args=DataArguments(
            task="classification",
            instruction="Say how it sounds:",
            text_column="text",
            label_column="label",
            data_file=str(folder / "table.csv"),
            max_length=128,
            eval_size=60,
        ),
        training_args=FineTuningArguments(
            output_dir=str(folder / "mine"),
            max_steps=3,
            save_strategy="no",
            disable_tqdm=True,
            learning_rate=1e-2,
        ),
    )
    torch.set_num_threads(threads)
    assert (folder / "mine" / "calibration.json").is_file()
    return folder / "mine"


@pytest.fixture(scope="module")
def server(adapter):
    with serving("--adapter", adapter, *LIMITS) as running:
        yield running


@pytest.fixture(scope="module")
def predicted(adapter, tmp_path_factory):
    """Rows, and what `lora-fsdp predict` adds to them."""
    folder = tmp_path_factory.mktemp("predicted")
    rows = [{"text": text} for text in toy_table(17, seed=8)["text"]]
    rows[3] = {"text": "  "}
    rows[5] = {"text": None}
    rows[7] = {"text": "naïve café 🙂 " * 20}
    source, target = folder / "rows.jsonl", folder / "answers.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = ["predict", source, "--adapter", adapter, "--output", target, "--coverage", "0.8"]
    assert main([*map(str, words)]) == 0
    answers = [json.loads(line) for line in target.read_text().splitlines()]
    return rows, [{k: v for k, v in one.items() if k != "text"} for one in answers]


def assert_same(found, expected):
    """Texts to the letter, numbers as float32 rounds them in another packing."""
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        assert one.keys() == other.keys()
        for name, value in other.items():
            if isinstance(value, float):
                assert one[name] == pytest.approx(value, abs=1e-5), name
            else:
                assert one[name] == value, name


def test_rows_are_answered_as_by_predict(server, predicted):
    rows, answers = predicted
    reply = server.ask(PREDICT, {"rows": rows, "coverage": 0.8})
    assert reply.status == 200
    assert reply.body["calibrated"] is True
    assert reply.body["model"] == "mine"
    assert_same(reply.body["answers"], answers)


def test_many_at_once_share_passes_and_get_their_own_answers(server, predicted):
    """Single rows from sixteen threads, with and without sets: each as `predict` has it."""
    rows, answers = predicted
    before = metrics(server)

    def ask(place):
        asked = {"rows": [rows[place]], **({"coverage": 0.8} if place % 2 else {})}
        reply = server.ask(PREDICT, asked)
        assert reply.status == 200
        expected = {k: v for k, v in answers[place].items() if place % 2 or k != "answer_set"}
        assert_same(reply.body["answers"], [expected])

    with ThreadPoolExecutor(16) as pool:
        list(pool.map(ask, [place % len(rows) for place in range(96)]))
    after = metrics(server)
    gained = {name: after[name] - before.get(name, 0) for name in after}
    assert gained["lora_fsdp_batched_requests_total"] == 96
    assert gained["lora_fsdp_batches_total"] < 96


def metrics(server):
    reply = server.ask("/metrics")
    assert reply.headers["content-type"].startswith("text/plain; version=0.0.4")
    lines = [line for line in reply.body.splitlines() if not line.startswith("#")]
    return {name: float(value) for name, value in (line.rsplit(" ", 1) for line in lines)}


def test_texts_and_unsure_answers(server, predicted):
    rows, answers = predicted
    texts = [row["text"] or "" for row in rows]
    found = server.ask(PREDICT, {"texts": texts, "min_probability": 0.999}).body["answers"]
    least = [dict(one) for one in answers]
    for one in least:
        del one["answer_set"]
        if one["probability"] is not None and one["probability"] < 0.999:
            one["predicted_label"] = None
    assert_same(found, least)
    assert any(one["predicted_label"] is None and one["probability"] for one in found)


def test_a_chat_completion(server, predicted):
    rows, answers = predicted
    asked = {
        "model": "mine",
        "messages": [{"role": "user", "content": rows[0]["text"]}],
        "logprobs": True,
        "top_logprobs": 2,
        "temperature": 0,
        "n": 1,
        "stream": False,
        "seed": 7,
        "max_tokens": 50,
    }
    body = server.ask(CHAT, asked).body
    [choice] = body["choices"]
    expected = answers[0]
    assert body["object"] == "chat.completion"
    assert choice["message"] == {
        "role": "assistant", "content": expected["predicted_label"], "refusal": None
    }  # fmt: skip
    assert choice["finish_reason"] == "stop"
    [token] = choice["logprobs"]["content"]
    assert math.exp(token["logprob"]) == pytest.approx(expected["probability"], abs=1e-5)
    assert bytes(token["bytes"]).decode() == token["token"] == expected["predicted_label"]
    ordered = sorted(LABELS, key=lambda label: -expected[f"probability/{label}"])
    assert [one["token"] for one in token["top_logprobs"]] == ordered[:2]
    for one in token["top_logprobs"]:
        assert math.exp(one["logprob"]) == pytest.approx(
            expected[f"probability/{one['token']}"], abs=1e-5
        )
    usage = body["usage"]
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]
    assert usage["prompt_tokens"] > 10
    parts = [{"type": "text", "text": rows[0]["text"]}]
    without = server.ask(CHAT, {"messages": [{"role": "user", "content": parts}]}).body
    assert without["choices"][0]["message"] == choice["message"]
    assert without["choices"][0]["logprobs"] is None


def user(**more):
    return {"messages": [{"role": "user", "content": "fine"}], **more}


@pytest.mark.parametrize(
    ("body", "param"),
    [
        (user(stream=True), "stream"),
        (user(n=2), "n"),
        (user(n=True), "n"),
        (user(tools=[{"type": "function"}]), "tools"),
        (user(tool_choice="auto"), "tool_choice"),
        (user(temperature=0.7), "temperature"),
        (user(stop=["x"]), "stop"),
        (user(response_format={"type": "json_object"}), "response_format"),
        (user(logit_bias={"5": 1}), "logit_bias"),
        (user(max_tokens=0), "max_tokens"),
        (user(max_completion_tokens=1.5), "max_completion_tokens"),
        (user(max_tokens="9"), "max_tokens"),
        (user(top_logprobs=3), "top_logprobs"),
        (user(logprobs=True, top_logprobs=21), "top_logprobs"),
        (user(logprobs=1), "logprobs"),
        (user(anything=1), "anything"),
        ({}, "messages"),
        ({"messages": []}, "messages"),
        ({"messages": ["hi"]}, "messages"),
        ({"messages": [{"role": "system", "content": "x"}]}, "messages"),
        ({"messages": [{"role": "user", "content": 5}]}, "messages"),
        ({"messages": [{"role": "user", "content": " "}]}, "messages"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages"),
    ],
)
def test_what_a_completion_cannot_honour_is_refused_by_name(server, body, param):
    reply = server.ask(CHAT, body)
    assert (reply.status, reply.body["error"]["param"]) == (400, param)
    assert one_sentence(reply.error)


def one_sentence(text):
    return text.endswith(".") and "\n" not in text and "Traceback" not in text


DEEP = b'{"rows": ' + b"[" * 100_000 + b"]" * 100_000 + b"}"
WRONG_BODIES = {
    "nothing": (b"", 400, "not JSON"),
    "no JSON": (b"{'rows': 1}", 400, "not JSON: line 1, column 2"),
    "not UTF-8": (b'{"texts": ["\xff"]}', 400, "not UTF-8 (byte 12)"),
    "a list": (b"[1]", 400, "must be a JSON object, not a list"),
    "deep": (DEEP, 400, ""),
    "NaN": (b'{"rows": [{"text": NaN}]}', 400, "NaN, which is no JSON"),
    "Infinity": (b'{"rows": [{"text": -Infinity}]}', 400, "-Infinity, which is no JSON"),
    "1e999": (b'{"rows": [{"text": 1e999}]}', 400, "not finite"),
    "many digits": (b'{"rows": [{"text": ' + b"9" * 5000 + b"}]}", 400, "cannot be read"),
    "half a pair": (b'{"texts": ["x\\ud83d"]}', 400, "half a surrogate pair"),
    "half a pair in a key": (b'{"rows": [{"text": "a", "\\ud83d": 1}]}', 400, "half a surrogate"),
    "twice": (b'{"texts": ["a"], "texts": ["b"]}', 400, "'texts' is there twice"),
    "both": (b'{"texts": ["a"], "rows": []}', 400, 'Give "rows"'),
    "neither": (b"{}", 400, 'Give "rows"'),
    "no rows": (b'{"rows": []}', 400, '"rows" must be a list of one entry or more'),
    "rows of another kind": (b'{"rows": "a"}', 400, '"rows" must be a list'),
    "a row of another kind": (b'{"rows": [{"text": "a"}, 5]}', 400, "Row 2 must be an object, not"),
    "a text of another kind": (b'{"texts": ["a", null]}', 400, "Row 2 must be a text, not null"),
    "another column": (b'{"rows": [{"body": "a"}]}', 400, "has no column 'text'"),
    "unknown": (b'{"texts": ["a"], "probability": 1}', 400, "no field 'probability'; known are"),
    "coverage": (b'{"texts": ["a"], "coverage": 1}', 400, '"coverage" must be a number between'),
    "least": (b'{"texts": ["a"], "min_probability": true}', 400, '"min_probability" must be'),
    "many rows": (b'{"texts": [' + b'"a",' * 20 + b'"a"]}', 413, "21 rows, and at most 20"),
    "long": (b'{"texts": ["' + b"a" * 2001 + b'"]}', 413, "Row 1 has 2,001 characters"),
    "ten megabytes": (b'{"texts": ["' + b"a" * 10_000_000 + b'"]}', 413, "larger than 1,000,000"),
}


@pytest.mark.parametrize("name", WRONG_BODIES)
def test_a_wrong_body_is_one_sentence(server, name):
    body, status, words = WRONG_BODIES[name]
    reply = server.ask(PREDICT, body)
    assert reply.status == status
    assert words in reply.error
    assert one_sentence(reply.error)
    assert server.ask("/health").status == 200


def test_a_body_without_a_length_is_counted(server):
    """One that never ends, too."""
    chunk = b"x" * 100_000
    with socket.create_connection(("127.0.0.1", server.port), timeout=20) as client:
        client.sendall(b"POST /predict HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n")
        for _ in range(30):
            client.sendall(b"%x\r\n%s\r\n" % (len(chunk), chunk))
        answer = b"".join(iter(lambda: client.recv(100_000), b""))
    assert answer.startswith(b"HTTP/1.1 413 ")
    assert b"larger than 1,000,000 bytes" in answer


def test_a_slow_body_is_given_up(server):
    began = time.monotonic()
    with socket.create_connection(("127.0.0.1", server.port), timeout=20) as client:
        client.sendall(b"POST /predict HTTP/1.1\r\nHost: a\r\nContent-Length: 50\r\n\r\n{")
        answer = b"".join(iter(lambda: client.recv(100_000), b""))
    assert answer.startswith(b"HTTP/1.1 408 ")
    assert b"did not arrive within 1 s" in answer
    assert time.monotonic() - began < 10


def test_paths_and_methods(server):
    assert server.ask("/nowhere").error.startswith("There is no path '/nowhere'; there are /pred")
    assert server.ask("/nowhere").status == 404
    reply = server.ask(PREDICT)
    assert (reply.status, reply.error) == (405, "GET is not done at '/predict'.")
    assert server.ask(CHAT, user(model="gpt-4o")).status == 404
    assert [one["id"] for one in server.ask("/v1/models").body["data"]] == ["mine"]
    health = server.ask("/health").body
    assert (health["status"], health["task"]) == ("ok", "classification")


def test_it_stays_on_this_machine_and_says_so(server):
    assert not any("Exposed" in line for line in server.lines)
    held = socket.create_connection(("127.0.0.1", server.port))
    held.close()


@pytest.mark.slow
def test_overload_is_refused_and_nothing_is_lost(adapter, predicted):
    """Few may wait: every request gets 200, 429 or 503; those refused are told when to return."""
    rows = [row for row in predicted[0] if (row["text"] or "").strip()]
    limits = ("--max_waiting_rows", 20, "--max_rows", 10, "--max_requests", 24)
    with serving("--adapter", adapter, *limits) as running:

        def ask(_):
            return running.ask(PREDICT, {"rows": rows[:10]})

        with ThreadPoolExecutor(40) as pool:
            replies = list(pool.map(ask, range(160)))
        counted = metrics(running)
    statuses = [reply.status for reply in replies]
    assert set(statuses) <= {200, 429, 503}
    assert statuses.count(200) >= 2
    assert statuses.count(429) > 0
    for reply in replies:
        if reply.status == 200:
            assert len(reply.body["answers"]) == 10
        else:
            assert int(reply.headers["retry-after"]) >= 1
            assert one_sentence(reply.error)
    told = {k: v for k, v in counted.items() if k.startswith("lora_fsdp_requests_total")}
    assert sum(v for k, v in told.items() if "/predict" in k) == 160
    assert counted["lora_fsdp_waiting_rows"] == 0


def test_a_key_is_asked_for_and_what_is_exposed_is_said(adapter, tmp_path):
    key = tmp_path / "key.txt"
    key.write_text("0123456789abcdef\n")
    options = ("--host", "0.0.0.0", "--api_key_file", key, "--served_name", "mood")
    with serving("--adapter", adapter, *options) as running:
        [line] = [line for line in running.lines if line.startswith("Exposed: ")]
        assert "whoever has the key" in line
        assert running.ask("/health").status == 200
        for headers in ({}, {"Authorization": "Bearer 0123456789abcdeF"}, {"Authorization": "x"}):
            for path, body in ((PREDICT, {"texts": ["a"]}), ("/metrics", None)):
                reply = running.ask(path, body, headers=headers)
                assert (reply.status, reply.headers["www-authenticate"]) == (401, "Bearer")
        right = {"Authorization": "Bearer 0123456789abcdef"}
        assert running.ask(PREDICT, {"texts": ["a"]}, headers=right).status == 200
        assert running.ask(CHAT, user(model="mood"), headers=right).status == 200


@pytest.mark.slow
def test_it_finishes_what_it_took(adapter, predicted):
    """SIGTERM while requests wait: each of them is answered, then it ends with 0."""
    rows = [row for row in predicted[0] if (row["text"] or "").strip()]
    with serving("--adapter", adapter, "--batch_rows", 1) as running:
        replies = []

        def ask():
            replies.append(running.ask(PREDICT, {"rows": rows * 8}))

        threads = [threading.Thread(target=ask) for _ in range(6)]
        for thread in threads:
            thread.start()
        until = time.monotonic() + 30
        while metrics(running)["lora_fsdp_waiting_rows"] < 2 and time.monotonic() < until:
            time.sleep(0.01)
        code, rest = running.stop()
        for thread in threads:
            thread.join()
    assert code == 0, rest
    assert rest.endswith("Stopped: everything that was taken has been answered.\n")
    assert [reply.status for reply in replies] == [200] * 6
    assert all(len(reply.body["answers"]) == len(rows) * 8 for reply in replies)


def test_the_page(server, tmp_path):
    """Its curl commands give what it shows, and its figures are those that are stored."""
    page = PAGE.read_text(encoding="utf-8")
    asked = [c for c in of_kind("tests/serving/test_serve.py") if c.startswith("curl ")]
    shown = json.loads(re.search(r"```json\n(.*?)```", page, re.DOTALL)[1])
    assert len(asked) == 2
    for command in asked:
        words = shlex.split(command.replace(":8000", f":{server.port}"))
        done = subprocess.run(words, capture_output=True, text=True, check=True)
        reply = json.loads(done.stdout)
        if "/predict" in command:
            assert reply.keys() == shown.keys()
            assert shown["answers"][0].keys() <= {*reply["answers"][0]}
        else:
            assert len(reply["choices"][0]["logprobs"]["content"][0]["top_logprobs"]) == 3
    assert page_text(json.loads(STORED.read_text())) in page


def refused(capsys, *words):
    code = main(["serve", *map(str, words)])
    said = capsys.readouterr().err.strip()
    assert code == 2
    assert one_sentence(said), said
    return said


def test_what_cannot_be_served_is_refused_before_a_weight_is_read(
    adapter, tmp_path, capsys, monkeypatch
):
    from lora_fsdp.cli import serve as command

    monkeypatch.setattr(command, "load_adapters", lambda *_, **__: pytest.fail("read weights"))
    assert "--adapter is missing" in refused(capsys)
    assert "task.json" in refused(capsys, "--adapter", tmp_path)
    assert "--max_rows 0" in refused(capsys, "--adapter", adapter, "--max_rows", 0)
    assert "would never be answered" in refused(capsys, "--adapter", adapter, "--max_rows", 2000)
    assert "--port 70000" in refused(capsys, "--adapter", adapter, "--port", 70000)
    assert "--api_key_file" in refused(capsys, "--adapter", adapter, "--api_key_file", "/nowhere")
    short = tmp_path / "short"
    short.write_text("abc")
    assert "16 characters" in refused(capsys, "--adapter", adapter, "--api_key_file", short)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        said = refused(capsys, "--adapter", adapter, "--port", port)
    assert f"--port {port} cannot be listened on (Address already in use)" in said
    assert "no.such.host" in refused(capsys, "--adapter", adapter, "--host", "no.such.host")
