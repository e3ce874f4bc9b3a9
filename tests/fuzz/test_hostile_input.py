"""The fast form of the campaign, and every hole it found.

Run: python -m pytest tests/fuzz (long: python -m tests.fuzz.campaign --inputs 2000)
"""

from __future__ import annotations

import ast
import json
import logging
import os
import re
import resource
import sys
import time
from importlib.metadata import EntryPoint
from pathlib import Path

import pandas as pd
import pytest

from lora_fsdp import FineTuningArguments, get_task, list_tasks
from lora_fsdp.base.folders import contained_file
from lora_fsdp.base.loading import load_base, load_tokenizer
from lora_fsdp.data.chat.template import ChatTemplate
from lora_fsdp.data.encoding import end_of_answer
from lora_fsdp.data.tables import read_table
from lora_fsdp.distributed.launch import read_fsdp_settings
from lora_fsdp.errors import (
    ArgumentError,
    BrokenTaskError,
    Fsdp1ConfigError,
    FsdpSettingError,
    LoraFsdpError,
    MalformedRowError,
    ModelError,
    TableEncodingError,
    TokenizerNotFoundError,
    UnsafeFileError,
    UnsupportedTableError,
)
from lora_fsdp.evaluation.comparison import write_predictions
from lora_fsdp.recipes import read_recipe
from lora_fsdp.scripts import parse_arguments
from lora_fsdp.tasks import Example, Prompt, registry
from tests.data.chat_templates import PLAIN, TEMPLATES, encoder_with, tokenizer_with
from tests.fuzz import hostile_templates
from tests.fuzz.campaign import FAILED, KINDS, run_campaign, summary
from tests.fuzz.hostile_settings import BILLION_LAUGHS
from tests.support.adapters import edit_json, save_base
from tests.support.runs import toy_trainer
from tests.support.tiny import tiny_tokenizer

PACKAGE = Path(__file__).resolve().parents[2] / "lora_fsdp"
SECRET = "hf_" + "Sekret" * 5


def test_campaign(tmp_path, caplog):
    """A small one, on inputs that are the same every time."""
    caplog.set_level(logging.CRITICAL)
    outcomes = run_campaign(tmp_path, inputs=52, seed=0)
    failed = [outcome for outcome in outcomes if outcome.ended == FAILED]
    assert not failed, "\n".join(f"{o.kind} {o.seed}: {o.detail}" for o in failed)
    assert {outcome.kind for outcome in outcomes} == set(KINDS)
    assert summary(outcomes).count("\n") == len(KINDS) + 2


class TestTables:
    @pytest.mark.parametrize(
        "encoding", ["punycode", "idna", "undefined", "hex", "rot13", "\0", "nonsense"]
    )
    def test_codecs_that_are_no_encodings(self, tmp_path, encoding):
        file = tmp_path / "table.csv"
        file.write_text("text,label\nxn--80ak6aa92e.,b\n\x80,b")
        with pytest.raises(TableEncodingError):
            read_table(file, encoding=encoding)

    def test_half_surrogate_from_a_codec(self, tmp_path):
        file = tmp_path / "table.csv"
        file.write_bytes(rb"text,label" + b"\n" + rb"\ud83d alone,b")
        with pytest.raises(MalformedRowError, match="line 2: half a surrogate pair"):
            read_table(file, encoding="unicode_escape")

    @pytest.mark.parametrize("record", ['{"a": "\\ud83d"}', '{"a": ["\\ud83d"]}', '{"\\udc00": 1}'])
    def test_half_surrogate_in_json(self, tmp_path, record):
        file = tmp_path / "table.jsonl"
        file.write_text('{"a": "fine \\ud83d\\ude00"}\n' + record)
        with pytest.raises(MalformedRowError, match="line 2: half a surrogate pair"):
            read_table(file)

    @pytest.mark.parametrize(
        "text", ["[" * 200_000, '{"a":' * 100_000, '{"a": ' + "1" * 6000 + "}"]
    )
    def test_json_that_nests_or_counts_too_far(self, tmp_path, text):
        file = tmp_path / "table.jsonl"
        file.write_text(text)
        with pytest.raises(MalformedRowError):
            read_table(file)

    def test_damaged_parquet_page(self, tmp_path):
        file = tmp_path / "table.parquet"
        pd.DataFrame({"text": ["a"] * 9, "label": ["b"] * 9}).to_parquet(file)
        content = file.read_bytes()
        for place in range(4, len(content), 3):
            file.write_bytes(
                content[:place] + bytes([content[place] ^ 0xFF]) + content[place + 1 :]
            )
            try:
                read_table(file)
            except (UnsupportedTableError, MalformedRowError):
                continue

    @pytest.mark.parametrize("text", ["", "{", "[]", '"text"', '{"splits": 3}'])
    def test_folder_that_pretends_to_be_a_dataset(self, tmp_path, text):
        for name in ("dataset_dict.json", "dataset_info.json", "state.json"):
            (tmp_path / name).write_text(text)
        with pytest.raises(UnsupportedTableError, match="save_to_disk"):
            read_table(tmp_path)


class TestFormulas:
    """Cells that a spreadsheet would run are data here: written as they are, quoted if need be."""

    TEXTS = ("=cmd|'/C calc'!A0", "@SUM(1+1)*cmd|' /C calc'!A0", '=HYPERLINK("http://x","y")',
             "+1", "-1", "@united thanks", "\t=1", "a\rb", "a,b\r\n=1", 'say "=1"')  # fmt: skip

    def test_predictions_come_back_to_the_letter(self, tmp_path):
        predictions = pd.DataFrame({"text": self.TEXTS, "target": "positive"})
        write_predictions(predictions, tmp_path / "predictions.csv")
        again = read_table(tmp_path / "predictions.csv")
        assert tuple(again["text"]) == self.TEXTS
        assert [path.name for path in tmp_path.iterdir()] == ["predictions.csv"]


class TestRecipes:
    def parse(self, tmp_path, monkeypatch, text, *more):
        file = tmp_path / "recipe.yaml"
        file.write_bytes(text if isinstance(text, bytes) else text.encode())
        monkeypatch.setattr(sys, "argv", ["script.py", "--config", str(file), *more])
        monkeypatch.setattr("lora_fsdp.scripts.configure_output", lambda: None)
        return parse_arguments(task="sentiment")

    @pytest.mark.parametrize(
        "text",
        [
            "labels: !!python/object/apply:os.system ['touch exploded']",
            "labels: !!python/name:os.system",
            "labels: *undefined",
            "labels: &a [*a]",
            BILLION_LAUGHS + "\nlabels: *a8",
            "[" * 5000,
            b"\xff\xfe\x00",
            "- a\n- b",
            "",
            "7: 8",
            "lora_r: [1, {2: 3}]",
            "lora_r: three",
            "lora_r: {a: b}",
            "seed: 2020-01-01",
            "labels: !!set {a, b}",
            "lr_scheduler_type: zigzag",
            "env: {LD_PRELOAD: /tmp/x.so}",
            "no_such_option: 1",
        ],
        ids=lambda text: text[:24],
    )
    def test_refused_by_name(self, tmp_path, monkeypatch, text):
        monkeypatch.chdir(tmp_path)
        before = dict(os.environ)
        with pytest.raises(ArgumentError) as error:
            self.parse(tmp_path, monkeypatch, text)
        assert len(str(error.value)) < 2000
        assert dict(os.environ) == before
        assert not (tmp_path / "exploded").exists()

    def test_values_are_those_of_the_command_line(self, tmp_path, monkeypatch):
        text = (
            "lora_r: 4\nlora_alpha: 16\nlearning_rate: 1e-3\nlabels: [a, b, 'no']\n"
            "lora_kwargs: {use_rslora: true}\nchat_template: true\ninstruction: '--x = -1'\n"
            "eval_file: null\nlora_target_modules: all-linear\n"
        )
        parsed = self.parse(tmp_path, monkeypatch, text, "--lora_r", "2")
        lora, data = parsed["lora_args"], parsed["data_args"]
        assert (lora.lora_r, lora.lora_alpha, lora.lora_kwargs) == (2, 16, {"use_rslora": True})
        assert lora.lora_target_modules == ["all-linear"]
        assert parsed["training_args"].learning_rate == 1e-3
        assert data.labels == ["a", "b", "no"]
        assert (data.chat_template, data.instruction, data.eval_file) == (True, "--x = -1", None)

    def test_message_does_not_show_a_token(self, tmp_path, monkeypatch):
        monkeypatch.setattr(sys, "argv", ["script.py", f"--hub_tokn={SECRET}"])
        monkeypatch.setattr("lora_fsdp.scripts.configure_output", lambda: None)
        with pytest.raises(ArgumentError, match="did you mean --hub_token") as error:
            parse_arguments(task="sentiment")
        assert SECRET not in str(error.value)

    def test_the_same_without_a_file(self, tmp_path):
        with pytest.raises(ArgumentError, match="no recipe"):
            read_recipe(tmp_path / "none.yaml", options=["task"])


@pytest.mark.parametrize(
    ("name", "value"),
    [("FSDP_AUTO_WRAP_POLICY", "nonsense"), ("FSDP_OFFLOAD_PARAMS", "maybe"),
     ("FSDP_STATE_DICT_TYPE", "🙂"), ("FSDP_RESHARD_AFTER_FORWARD", "[1]")],
)  # fmt: skip
def test_launch_values(monkeypatch, name, value):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("FSDP_VERSION", "2")
    monkeypatch.setenv(name, value)
    with pytest.raises(FsdpSettingError, match="accelerate refuses"):
        read_fsdp_settings()


@pytest.mark.parametrize(
    "options", [{"text_column": ["text"]}, {"instruction": 3}, {"label_column": {}},
                {"labels": "ab"}, {"labels": 3}, {"labels": {"a": 1}}],
)  # fmt: skip
def test_options_of_a_task_that_are_of_another_type(options):
    with pytest.raises(ArgumentError, match=next(iter(options))):
        get_task("classification", options)


@pytest.mark.parametrize("strategy", ["0", "6", "99", "²"])
def test_fsdp1_with_a_strategy_that_does_not_exist(monkeypatch, strategy):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("FSDP_VERSION", "1")
    monkeypatch.setenv("FSDP_SHARDING_STRATEGY", strategy)
    with pytest.raises(Fsdp1ConfigError, match="FSDP2 equivalent"):
        read_fsdp_settings()


class TestPlugIns:
    def install(self, monkeypatch, name, value):
        points = [EntryPoint(name, value, registry.ENTRY_POINT_GROUP)]
        monkeypatch.setattr(registry, "entry_points", lambda group: points)

    @pytest.mark.parametrize(
        "place", ["raising:Task", "exiting:Task", "strange:NotATask", "strange:FUNCTION",
                  "strange:RaisesWhenMade", "strange:ExitsWhenMade", "strange:Missing", "none:X"],
    )  # fmt: skip
    def test_broken(self, monkeypatch, place):
        self.install(monkeypatch, "fuzzed", f"tests.fuzz.plug_ins.{place}")
        assert {"fuzzed", "sentiment"} <= {info.name for info in list_tasks()}
        with pytest.raises(BrokenTaskError, match="fuzzed"):
            get_task("fuzzed")
        assert get_task("sentiment").name == "sentiment"

    def test_malformed_entry_point(self, monkeypatch):
        self.install(monkeypatch, "fuzzed", "no module at all")
        assert any(info.name == "fuzzed" and info.broken for info in list_tasks())

    def test_description_that_raises(self, monkeypatch):
        self.install(monkeypatch, "fuzzed", "tests.fuzz.plug_ins.strange:RaisesOnDescription")
        [info] = [info for info in list_tasks() if info.name == "fuzzed"]
        assert "no description" in str(info.broken)

    def test_import_that_takes_a_built_in_name(self, monkeypatch):
        self.install(monkeypatch, "fuzzed", "tests.fuzz.plug_ins.registering:Taken")
        with pytest.raises(BrokenTaskError, match="Two tasks are called 'sentiment'"):
            get_task("fuzzed")


class TestFiles:
    @pytest.mark.parametrize("name", ["", ".", "..", "../x", "a/b", "/etc/passwd", "a\\b", "a\0b"])
    def test_names_that_lead_out(self, tmp_path, name):
        with pytest.raises(UnsafeFileError):
            contained_file(tmp_path, name)

    def test_link_to_itself(self, tmp_path):
        (tmp_path / "x").symlink_to(tmp_path / "x")
        with pytest.raises(UnsafeFileError, match="itself"):
            contained_file(tmp_path, "x")

    def test_damaged_tokenizer(self, tmp_path):
        from lora_fsdp import ModelArguments

        for text in ("", "{", "null", '{"model": 3}'):
            (tmp_path / "tokenizer.json").write_text(text)
            (tmp_path / "config.json").write_text("{}")
            with pytest.raises(TokenizerNotFoundError):
                load_tokenizer(ModelArguments(str(tmp_path)))

    @pytest.mark.parametrize(
        "settings", [{"num_attention_heads": "x"}, {"eos_token_id": "x"}, {"hidden_size": -1},
                     {"model_type": "t5"}, {"model_type": 3}, {"vocab_size": 7}],
    )  # fmt: skip
    def test_base_with_nonsense_settings(self, tmp_path, settings):
        import torch

        from lora_fsdp import ModelArguments

        save_base(tmp_path)
        edit_json(tmp_path / "config.json", **settings)
        with pytest.raises(ModelError):
            load_base(ModelArguments(str(tmp_path)), device=torch.device("cpu"))

    @pytest.mark.parametrize(
        "template", ["{{ raise_exception('no') }}", "{% for %}", "{{ x.y.z }}"]
    )
    def test_chat_template_that_fails(self, template):
        tokenizer = tiny_tokenizer()
        tokenizer.chat_template = template
        with pytest.raises(ArgumentError, match="chat template"):
            end_of_answer(tokenizer, chat_template=True)

    @pytest.mark.parametrize("name", hostile_templates.ENDLESS)
    @pytest.mark.slow
    def test_chat_template_that_does_not_end(self, name):
        """Refused in a sentence, wherever a conversation reaches it."""
        began = time.monotonic()
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        with pytest.raises(UnsafeFileError, match=r"not rendered: it .*no chat template needs"):
            end_of_answer(tokenizer_with(hostile_templates.ENDLESS[name]), chat_template=True)
        assert time.monotonic() - began < 15
        assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory < 700_000  # KiB

    def test_chat_template_that_waits_for_a_row(self):
        """It is no row's fault: with `--on_bad_rows drop` each would take as long."""
        bomb = "{% if 'zzz' in messages[0].content %}{{ 'x' * 10**9 }}{% endif %}"
        encoder = encoder_with(bomb + PLAIN, get_task("chat"))
        with pytest.raises(UnsafeFileError, match="no chat template needs"):
            encoder.refusal(Example(1, Prompt("", "zzz", ""), "a"))

    @pytest.mark.parametrize("template", hostile_templates.OTHER)
    def test_chat_template_that_fails_otherwise(self, template):
        said = ""
        try:
            end_of_answer(tokenizer_with(template), chat_template=True)
        except LoraFsdpError as error:
            said = str(error)
        assert len(said) < 500

    def test_long_conversations_are_within_the_limits(self):
        turns = [{"role": ("user", "assistant")[n % 2], "content": "so it is " * 300}
                 for n in range(1001)]  # fmt: skip
        chat = ChatTemplate(tokenizer_with(TEMPLATES["qwen3"]))
        assert len(chat.render(turns)) > 2_700_000

    def test_no_end_token(self):
        tokenizer = tiny_tokenizer()
        tokenizer.eos_token = None
        with pytest.raises(ArgumentError, match="no end token"):
            end_of_answer(tokenizer, chat_template=False)

    def test_tokenizer_that_loads_and_cannot_be_used(self, tmp_path):
        from lora_fsdp import ModelArguments

        save_base(tmp_path)
        edit_json(tmp_path / "tokenizer_config.json", model_max_length={"x": 1})
        with pytest.raises(TokenizerNotFoundError):
            load_tokenizer(ModelArguments(str(tmp_path)))

    def test_no_pickle_is_loaded_anywhere(self):
        """Of the ways to read one; `weights_only=True` is how a base's .bin is read."""
        for source in PACKAGE.rglob("*.py"):
            for node in ast.walk(ast.parse(source.read_text(encoding="utf-8"))):
                name = ast.unparse(node.func) if isinstance(node, ast.Call) else ""
                assert name not in ("torch.load", "pickle.load", "pickle.loads", "joblib.load"), (
                    f"{source}: {name}"
                )
                if isinstance(node, ast.keyword) and node.arg in ("allow_pickle", "weights_only"):
                    safe = node.arg == "weights_only"
                    assert ast.literal_eval(node.value) is safe, f"{source}: {node.arg}"


def test_word_when_foreign_code_may_run(model_folder, caplog):
    import torch

    from lora_fsdp import ModelArguments

    caplog.set_level(logging.WARNING, logger="lora_fsdp")
    load_base(ModelArguments(str(model_folder)), device=torch.device("cpu"))
    assert "trust_remote_code" not in caplog.text
    load_base(ModelArguments(str(model_folder), trust_remote_code=True), device=torch.device("cpu"))
    assert "trust_remote_code is on" in caplog.text


def test_secrets_are_nowhere(tmp_path, monkeypatch, capsys, caplog):
    """Neither those of the arguments nor those of the environment."""
    caplog.set_level(logging.DEBUG)
    monkeypatch.setenv("HF_TOKEN", SECRET)
    monkeypatch.setenv("WANDB_API_KEY", SECRET)
    trainer = toy_trainer(
        tmp_path / "run", rows=8, num_train_epochs=1, hub_token=SECRET, save_strategy="epoch"
    )
    trainer.train()
    trainer.save_model(str(tmp_path / "adapter"))
    assert not {"training_args.json", "proof.json"} - {p.name for p in tmp_path.rglob("*")}
    for file in tmp_path.rglob("*"):
        assert not file.is_file() or SECRET.encode() not in file.read_bytes(), file
    output = capsys.readouterr()
    assert SECRET not in output.out + output.err + caplog.text
    saved = json.loads((tmp_path / "adapter" / "training_args.json").read_text())
    assert saved["hub_token"] == "<HUB_TOKEN>"
    assert not re.search(SECRET, str(FineTuningArguments(hub_token=SECRET)))
