"""Bad input through the front door: `finetune`, and the script as it is launched.

Run: python -m pytest tests/test_pipeline_errors.py
"""

import json
import os
import runpy
import shutil
import subprocess
import sys
from pathlib import Path
from typing import ClassVar

import pytest
import torch

from lora_fsdp import (
    DataArguments,
    FineTuningArguments,
    LoraArguments,
    LoraTrainer,
    ModelArguments,
    finetune,
)
from lora_fsdp.claiming import claim_output_folder
from lora_fsdp.errors import (
    ArgumentError,
    DataFileNotFoundError,
    FsdpOnOneProcessError,
    LabelCollisionError,
    LoraFsdpError,
    OutputFolderError,
    RowTooLongError,
    TargetModulesError,
    TokenizerNotFoundError,
    UnknownTaskError,
)
from lora_fsdp.training.saving.output_folder import check_output_folder
from tests.support.ranks import launch_environment
from tests.support.runs import toy_trainer
from tests.support.tiny import ToyTask, tiny_model, tiny_tokenizer, toy_table

ROOT = Path(__file__).resolve().parents[1]
OPTIONS = {"text_column": "text", "label_column": "label", "instruction": "Say how it sounds:"}


@pytest.fixture
def table(tmp_path):
    file = tmp_path / "table.csv"
    toy_table(24).to_csv(file, index=False)
    return file


def run(model_folder, output, *, task=None, lora=None, data=None, training=None):
    return finetune(
        model_args=ModelArguments(model_name_or_path=str(model_folder)),
        lora_args=LoraArguments(**(lora or {})),
        data_args=DataArguments(max_length=128, **(data or {})),
        training_args=FineTuningArguments(
            output_dir=str(output),
            max_steps=1,
            save_strategy="no",
            disable_tqdm=True,
            **(training or {}),
        ),
        task=task,
    )


class TestOutputFolder:
    @pytest.mark.parametrize("left", ["adapter_config.json", "metrics.json", "checkpoint-3/x"])
    def test_that_holds_a_run(self, tmp_path, left):
        file = tmp_path / "run" / left
        file.parent.mkdir(parents=True)
        file.write_text("{}")
        arguments = FineTuningArguments(output_dir=str(tmp_path / "run"))
        with pytest.raises(OutputFolderError, match="already holds a run") as caught:
            claim_output_folder(arguments)
        for way_out in ("--output_dir", "--resume_from_checkpoint", "--overwrite_output_dir"):
            assert way_out in str(caught.value)
        assert file.exists()

    def test_through_finetune(self, model_folder, tmp_path, table):
        data = {"task": "classification", "data_file": str(table), "eval_size": 6, **OPTIONS}
        output = tmp_path / "run"
        run(model_folder, output, data=data)
        before = (output / "adapter_model.safetensors").read_bytes()
        with pytest.raises(OutputFolderError, match="run"):
            run(model_folder, output, data=data)
        assert (output / "adapter_model.safetensors").read_bytes() == before
        run(model_folder, output, data=data, training={"overwrite_output_dir": True})

    @pytest.mark.parametrize("exists", [True, False])
    def test_empty_or_new_folder_is_fine(self, tmp_path, exists):
        folder = tmp_path / "new"
        if exists:
            folder.mkdir()
        assert claim_output_folder(FineTuningArguments(output_dir=str(folder))) == folder

    def earlier_run(self, folder):
        """What a run leaves, and what no run wrote; returns the files and their contents."""
        for name in (
            "adapter_config.json",
            "adapter_model.safetensors",
            "metrics.json",
            "predictions.csv",
            "run_record.json",
            "log_history.jsonl",
            "checkpoint-3/trainer_state.json",
            "thesis.txt",
        ):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_text("{}")
        return self.files(folder)

    def files(self, folder):
        return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}

    MISTAKES: ClassVar = {
        "data_file": ({"data_file": "tabel.csv"}, {}, {}, {}),
        "eval_file": ({"eval_file": "tabel.csv"}, {}, {}, {}),
        "task": ({"task": "clasification"}, {}, {}, {}),
        "task_file": ({"task_file": "my_tsk.py"}, {}, {}, {}),
        "column": ({"text_column": "txt"}, {}, {}, {}),
        "instruction": ({"instruction": "Say how it sounds " * 60}, {}, {}, {}),
        "model": ({}, {"model_name_or_path": "modells/tiny"}, {}, {}),
        "lora": ({}, {}, {"lora_target_modules": ["c_attn"]}, {}),
        "step": ({}, {}, {}, {"step": "graph"}),
        "residency": ({}, {}, {}, {"resident_layers": "2"}),
        "sequences": ({}, {}, {}, {"max_tokens_per_row": 16}),
    }

    @pytest.mark.parametrize("mistake", MISTAKES)
    def test_a_mistake_deletes_nothing_of_the_run_to_be_replaced(
        self, model_folder, tmp_path, table, mistake
    ):
        data, model, lora, training = self.MISTAKES[mistake]
        given = {"task": "classification", "data_file": str(table), "eval_size": 6, **OPTIONS}
        before = self.earlier_run(tmp_path / "run")
        with pytest.raises(LoraFsdpError):
            run(
                model.get("model_name_or_path", model_folder),
                tmp_path / "run",
                data=given | data,
                lora=lora,
                training={"overwrite_output_dir": True, **training},
            )
        assert self.files(tmp_path / "run") == before

    def test_without_a_tokenizer_nothing_is_deleted(self, tmp_path, table):
        tiny_model().save_pretrained(tmp_path / "model")
        before = self.earlier_run(tmp_path / "run")
        data = {"task": "classification", "data_file": str(table), "eval_size": 6, **OPTIONS}
        training = {"overwrite_output_dir": True}
        with pytest.raises(TokenizerNotFoundError):
            run(tmp_path / "model", tmp_path / "run", data=data, training=training)
        assert self.files(tmp_path / "run") == before

    def test_overwriting_leaves_no_rest_of_the_old_run_and_keeps_the_rest(
        self, model_folder, tmp_path, table
    ):
        """`--output_dir .` in a project must not delete the project."""
        before = self.earlier_run(tmp_path / "run")
        data = {"task": "classification", "data_file": str(table), "eval_size": 6, **OPTIONS}
        training = {"overwrite_output_dir": True}
        run(model_folder, tmp_path / "run", data=data, training=training)
        after = self.files(tmp_path / "run")
        kept = {path.name for path in before if after.get(path) == before[path]}
        assert kept == {"thesis.txt"}
        assert not (tmp_path / "run" / "checkpoint-3").exists()

    @pytest.mark.parametrize("name", ["checkpoint-notes", "diverged-step-why", "x.partial"])
    def test_a_folder_of_the_users_own_is_not_taken_for_the_runs(self, tmp_path, name):
        (tmp_path / name).mkdir()
        (tmp_path / name / "thesis.txt").write_text("three years of work")
        claim_output_folder(FineTuningArguments(output_dir=str(tmp_path)))
        arguments = FineTuningArguments(output_dir=str(tmp_path), overwrite_output_dir=True)
        assert check_output_folder(tmp_path, arguments) == []
        assert (tmp_path / name / "thesis.txt").exists()

    @pytest.mark.parametrize(
        ("name", "kind"),
        [
            ("checkpoint-3", "link"),
            ("checkpoint-3", "file"),
            ("report_figures", "link"),
            ("metrics.json", "folder"),
            ("metrics.json", "link"),
            ("log_history.jsonl", "folder"),
        ],
    )
    def test_what_no_run_makes_is_not_removed(self, tmp_path, name, kind):
        folder, elsewhere = tmp_path / "run", tmp_path / "elsewhere"
        folder.mkdir()
        elsewhere.mkdir()
        {
            "link": lambda path: path.symlink_to(elsewhere),
            "file": lambda path: path.write_text("mine"),
            "folder": lambda path: path.mkdir(),
        }[kind](folder / name)
        arguments = FineTuningArguments(output_dir=str(folder), overwrite_output_dir=True)
        with pytest.raises(OutputFolderError, match=f"{name} is a {kind}, which no run makes"):
            claim_output_folder(arguments)
        assert os.path.lexists(folder / name)

    @pytest.mark.parametrize("key", ["data_file", "eval_file"])
    def test_a_file_of_the_run_to_be_replaced_is_no_input(self, model_folder, tmp_path, table, key):
        before = self.earlier_run(tmp_path / "run")
        data = {"task": "classification", "data_file": str(table), "eval_size": 6, **OPTIONS}
        data[key] = str(tmp_path / "run" / "predictions.csv")
        training = {"overwrite_output_dir": True}
        with pytest.raises(OutputFolderError, match=r"predictions\.csv belongs to the run"):
            run(model_folder, tmp_path / "run", data=data, training=training)
        assert self.files(tmp_path / "run") == before

    def test_resume_without_a_checkpoint(self, model_folder, tmp_path, table):
        data = {"task": "classification", "data_file": str(table), "eval_size": 6, **OPTIONS}
        with pytest.raises(LoraFsdpError, match="checkpoint"):
            run(
                model_folder,
                tmp_path / "run",
                data=data,
                training={"resume_from_checkpoint": "true"},
            )


class TestTaskAndData:
    def test_unknown_task_suggests_the_nearest(self, model_folder, tmp_path, table):
        with pytest.raises(UnknownTaskError, match="Did you mean 'sentiment'"):
            run(model_folder, tmp_path / "r", data={"task": "sentimet", "data_file": str(table)})

    def test_no_task(self, model_folder, tmp_path, table):
        table.write_text("a,b\n1,2\n3,4\n")
        with pytest.raises(ArgumentError, match="do not say which: set --task"):
            run(model_folder, tmp_path / "r", data={"data_file": str(table)})
        with pytest.raises(ArgumentError, match="No task given: set --task"):
            run(model_folder, tmp_path / "r", data={})

    def test_no_data(self, model_folder, tmp_path):
        with pytest.raises(ArgumentError, match=r"'classification'.*--data_file"):
            run(model_folder, tmp_path / "r", data={"task": "classification", **OPTIONS})

    @pytest.mark.parametrize("key", ["data_file", "eval_file"])
    def test_missing_file(self, model_folder, tmp_path, table, key):
        data = {"task": "classification", "data_file": str(table), **OPTIONS}
        with pytest.raises(DataFileNotFoundError, match=r"nowhere\.csv"):
            run(model_folder, tmp_path / "r", data=data | {key: str(tmp_path / "nowhere.csv")})

    def test_options_beside_a_task_object(self, model_folder, tmp_path, table):
        with pytest.raises(ArgumentError, match=r"--instruction, --labels would be ignored"):
            run(
                model_folder,
                tmp_path / "r",
                task=ToyTask(),
                data={"data_file": str(table), "instruction": "Say:", "labels": ["a", "b"]},
            )

    def test_name_beside_a_task_object(self, model_folder, tmp_path, table):
        with pytest.raises(ArgumentError, match="--task"):
            run(
                model_folder,
                tmp_path / "r",
                task=ToyTask(),
                data={"data_file": str(table), "task": "sentiment"},
            )

    def test_instruction_too_long(self, model_folder, tmp_path, table):
        options = OPTIONS | {"instruction": "Say how it sounds " * 60}
        with pytest.raises(RowTooLongError, match=r"Row \d+: .*--max_length 128"):
            run(
                model_folder,
                tmp_path / "r",
                data={"task": "classification", "data_file": str(table), **options},
            )

    def test_labels_of_the_same_tokens(self, model_folder, tmp_path):
        rows = toy_table(24).replace({"label": {"positive": "good", "negative": "Good"}})
        folder = tmp_path / "model"
        shutil.copytree(model_folder, folder)
        tokenizer = json.loads((folder / "tokenizer.json").read_text())
        tokenizer["normalizer"] = {"type": "Lowercase"}
        (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
        rows.to_csv(tmp_path / "t.csv", index=False)
        data = {"task": "classification", "data_file": str(tmp_path / "t.csv"), **OPTIONS}
        with pytest.raises(LabelCollisionError, match="'Good' and 'good'"):
            run(folder, tmp_path / "r", data=data)

    def test_target_modules(self, model_folder, tmp_path, table):
        data = {"task": "classification", "data_file": str(table), **OPTIONS}
        with pytest.raises(TargetModulesError, match="c_attn"):
            run(model_folder, tmp_path / "r", data=data, lora={"lora_target_modules": ["c_attn"]})

    def test_no_tokenizer(self, tmp_path, table):
        tiny_model().save_pretrained(tmp_path / "model")
        data = {"task": "classification", "data_file": str(table), **OPTIONS}
        with pytest.raises(TokenizerNotFoundError, match="model"):
            run(tmp_path / "model", tmp_path / "r", data=data)


class TestArguments:
    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"fp16": True}, "fp16 is not supported"),
            ({"label_smoothing_factor": 1.5}, "--label_smoothing_factor"),
            ({"neftune_noise_alpha": 5.0}, "--neftune_noise_alpha"),
            ({"torch_compile": True}, "--torch_compile"),
            ({"auto_find_batch_size": True}, "--auto_find_batch_size"),
            ({"dataloader_drop_last": True}, "--dataloader_drop_last"),
            ({"train_sampling_strategy": "group_by_length"}, "--train_sampling_strategy"),
            ({"include_num_input_tokens_seen": "all"}, "--include_num_input_tokens_seen"),
        ],
        ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
    )
    def test_refused_and_not_ignored(self, tmp_path, options, message):
        with pytest.raises(ArgumentError, match=message):
            FineTuningArguments(output_dir=str(tmp_path), **options)

    @pytest.mark.parametrize("name", ["gradient_checkpointing", "activation_checkpointing"])
    def test_checkpointing_twice(self, tmp_path, monkeypatch, name):
        if name not in FineTuningArguments.__dataclass_fields__:
            pytest.skip("this transformers knows the switch by its old name only")
        variables = launch_environment("fsdp2_cpu.yaml", FSDP_ACTIVATION_CHECKPOINTING="true")
        for key, value in variables.items():
            monkeypatch.setenv(key, value)
        with pytest.raises(ArgumentError, match="keep one") as caught:
            toy_trainer(tmp_path, allow_fsdp_on_one_process=True, **{name: True})
        assert "--gradient_checkpointing" in str(caught.value)
        assert "fsdp_activation_checkpointing" in str(caught.value)

    def test_rows_shorter_than_an_example(self, tmp_path):
        with pytest.raises(ArgumentError, match=r"--max_tokens_per_row 64 .*--max_length 128"):
            toy_trainer(tmp_path, max_tokens_per_row=64)

    def test_fsdp_on_one_process(self, model_folder, tmp_path, table, monkeypatch):
        for key, value in launch_environment("fsdp2_cpu.yaml").items():
            monkeypatch.setenv(key, value)
        data = {"task": "classification", "data_file": str(table), **OPTIONS}
        with pytest.raises(FsdpOnOneProcessError, match="--num_processes"):
            run(model_folder, tmp_path / "r", data=data)


class TestTrainer:
    def parts(self, tmp_path, **changes):
        task = ToyTask()
        settings = {
            "model": tiny_model(),
            "args": FineTuningArguments(output_dir=str(tmp_path), disable_tqdm=True),
            "task": task,
            "processing_class": tiny_tokenizer(),
            "train_dataset": task.examples(toy_table(8)),
            "max_length": 128,
        }
        return settings | changes

    def test_neither_adapter_nor_config(self, tmp_path):
        with pytest.raises(ArgumentError, match="peft_config"):
            LoraTrainer(**self.parts(tmp_path))

    def test_training_row_without_target(self, tmp_path):
        examples = ToyTask().examples(toy_table(3), with_targets=False)
        with pytest.raises(ArgumentError, match="Row 1 has no target"):
            LoraTrainer(**self.parts(tmp_path, train_dataset=examples))

    def test_adapter_loaded_for_inference(self, tmp_path):
        """`PeftModel.from_pretrained` freezes the adapter unless told otherwise."""
        model = toy_trainer(tmp_path).model
        model.requires_grad_(False)
        with pytest.raises(LoraFsdpError, match=r"train"):
            LoraTrainer(**self.parts(tmp_path, model=model))

    def test_config_beside_an_adapter(self, tmp_path):
        trainer = toy_trainer(tmp_path)
        config = trainer.model.peft_config["default"]
        with pytest.raises(ArgumentError, match="peft_config"):
            LoraTrainer(**self.parts(tmp_path, model=trainer.model, peft_config=config))

    def test_nothing_to_evaluate(self, tmp_path):
        trainer = toy_trainer(tmp_path)
        trainer.eval_dataset = None
        with pytest.raises(ArgumentError, match="eval_dataset"):
            trainer.evaluate()


class TestScript:
    """As it is started: one line per error, no traceback, an exit code."""

    def script(self, *arguments, **variables):
        keep = {k: v for k, v in os.environ.items() if not k.startswith(("FSDP_", "ACCELERATE_"))}
        return subprocess.run(
            [sys.executable, "examples/sentiment.py", *map(str, arguments)],
            cwd=ROOT,
            env={**keep, "HF_HUB_OFFLINE": "1", **variables},
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )

    def test_error_in_one_line(self, model_folder, tmp_path):
        done = self.script(
            "--model_name_or_path",
            model_folder,
            "--data_file",
            tmp_path / "nowhere.csv",
            "--output_dir",
            tmp_path / "r",
        )
        assert done.returncode == 2
        assert "Traceback" not in done.stderr
        last = done.stderr.strip().splitlines()[-1]
        assert last.startswith("DataFileNotFoundError: ")
        assert "nowhere.csv" in last

    def test_unknown_option(self, tmp_path, monkeypatch):
        """What `test_error_in_one_line` shows of a started script holds of every such error."""
        script = str(ROOT / "examples" / "sentiment.py")
        words = [script, "--lerning_rate", "1e-3", "--output_dir", str(tmp_path)]
        monkeypatch.setattr(sys, "argv", words)
        monkeypatch.setattr(sys, "excepthook", sys.excepthook)
        with pytest.raises(ArgumentError, match=r"did you mean --learning_rate\?"):
            runpy.run_path(script, run_name="__main__")


@pytest.mark.parametrize("files", ["safetensors", "pickle"])
@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"step": "graph"}, "CUDA graphs need a GPU"),
        ({"resident_layers": "2"}, "needs an accelerate YAML with FSDP"),
        ({"max_tokens_per_row": 16}, "must hold the longest example"),
    ],
)
def test_what_cannot_be_is_refused_before_a_weight_is_read(
    tmp_path, monkeypatch, tokenizer, files, options, words
):
    """Of a base that is read tensor by tensor, and of one that transformers loads whole."""
    folder = tmp_path / "model"
    model = tiny_model()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    if files == "pickle":
        (folder / "model.safetensors").unlink()
        torch.save(model.state_dict(), folder / "pytorch_model.bin")

    def read(*arguments, **options):
        raise AssertionError("weights are read")

    monkeypatch.setattr("lora_fsdp.base.stored_weights.BaseWeights.read", read)
    monkeypatch.setattr("lora_fsdp.base.streaming.load_base", read)
    table = tmp_path / "tweets.csv"
    lines = (f"flight {n} was late,{'negative' if n % 2 else 'positive'}" for n in range(40))
    table.write_text("text,sentiment\n" + "\n".join(lines) + "\n")
    with pytest.raises(ArgumentError, match=words):
        finetune(
            model_args=ModelArguments(str(folder)),
            lora_args=LoraArguments(lora_target_modules=["q_proj"]),
            data_args=DataArguments(task="sentiment", data_file=str(table)),
            training_args=FineTuningArguments(output_dir=str(tmp_path / "run"), **options),
        )
