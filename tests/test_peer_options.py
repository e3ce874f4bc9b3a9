"""Names that other programs have for our options are understood in the error.

Run: python -m pytest tests/test_peer_options.py
"""

from collections import Counter
from dataclasses import fields

import pytest
from trl import ModelConfig, ScriptArguments, SFTConfig

from lora_fsdp import DataArguments, FineTuningArguments, LoraArguments, ModelArguments
from lora_fsdp.arguments.peers import NAMES, REASONS, about_unknown
from lora_fsdp.cli.train import LaunchOptions
from lora_fsdp.errors import ArgumentError
from lora_fsdp.options import OptionParser
from lora_fsdp.recipes import read_recipe

RUN = (ModelArguments, LoraArguments, DataArguments, FineTuningArguments)
KNOWN = [field.name for kind in RUN for field in fields(kind)]
LAUNCH = [field.name for field in fields(LaunchOptions)]
ALIASES = {theirs: ours for ours, names in NAMES.items() for theirs in names.split()}


@pytest.fixture(scope="module")
def parser():
    return OptionParser(RUN)


def test_every_name_here_is_an_option():
    assert set(NAMES) <= {*KNOWN, *LAUNCH}


def test_no_name_there_is_an_option_or_stands_for_two():
    listed = [*REASONS, *(name for names in NAMES.values() for name in names.split())]
    assert {name: count for name, count in Counter(listed).items() if count > 1} == {}
    assert set(listed).isdisjoint({*KNOWN, *LAUNCH})


@pytest.mark.parametrize("theirs", sorted({"lr", "epochs", "batch_size", "rank", "num_gpus"}))
def test_the_command_line_says_the_name_here(parser, theirs):
    with pytest.raises(ArgumentError, match=rf"--{theirs} \(is called --{ALIASES[theirs]} here\)"):
        parser.parse([f"--{theirs}", "1"])
    with pytest.raises(ArgumentError, match=rf"\(is called --{ALIASES[theirs]} here\)"):
        parser.parse([f"--{theirs.replace('_', '-').upper()}=1"])


def test_a_recipe_of_another_program_is_told_the_name_here(tmp_path):
    file = tmp_path / "axolotl.yaml"
    for theirs, ours in ALIASES.items():
        file.write_text(f"{theirs}: 1\n")
        with pytest.raises(ArgumentError, match=rf"'{theirs}' \(is called --{ours} here\)"):
            read_recipe(file, options=KNOWN)


@pytest.mark.parametrize("theirs", REASONS)
def test_what_nothing_here_does_has_a_reason(theirs):
    assert about_unknown(theirs, KNOWN).startswith("is ")


def test_another_commands_options_are_not_named():
    assert about_unknown("lr", ["adapter", "data_file", "output"]) == ""
    assert about_unknown("dataset", ["adapter", "data_file"]) == "is called --data_file here"


@pytest.mark.parametrize(
    ("given", "nearest"),
    [
        ("learning_rat", "learning_rate"),
        ("lerning-rate", "learning_rate"),
        ("text_colum", "text_column"),
        ("eval_stpes", "eval_steps"),
        ("num_train_epoch", "num_train_epochs"),
        ("max_row", "max_rows"),
        ("lora_dropot", "lora_dropout"),
        ("resume_from_checkpoints", "resume_from_checkpoint"),
        ("load_in_4_bit", "load_in_4bit"),
    ],
)
def test_what_is_misspelt_is_found(given, nearest):
    assert about_unknown(given, KNOWN) == f"did you mean --{nearest}?"


@pytest.mark.parametrize(
    "given",
    [
        "min_length", "train_steps_only", "load_in_2bit", "adam_beta3", "fp8", "bf8", "label_text",
        "eval_epochs_max", "min_rows", "last_rows", "train_size", "top_k", "lora_plus", "lora_b",
        "fp8_full_eval",
    ],
)  # fmt: skip
def test_what_means_another_thing_is_not_suggested(given):
    assert "did you mean" not in about_unknown(given, KNOWN)


def test_trls_own_options_are_never_taken_for_others():
    """Each is an option here, has its name or reason said, or nothing is guessed."""
    theirs = {field.name for kind in (SFTConfig, ModelConfig, ScriptArguments)
              for field in fields(kind)} - set(KNOWN)  # fmt: skip
    guessed = {name: about_unknown(name, KNOWN) for name in theirs}
    assert not [name for name, said in guessed.items() if "did you mean" in said]
