"""Every rule of the doctor on an example that breaks it.

Run: python -m pytest tests/doctor/test_doctor.py
"""

import fcntl
import json
import os
import re
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
import yaml
from transformers import AutoTokenizer, LlamaConfig

from lora_fsdp.doctor import RULES, Machine, Severity
from lora_fsdp.doctor.rules.memory import checkpoints_on_disk
from lora_fsdp.tasks import GenerationTask, Prompt, Task
from lora_fsdp.training.saving.run_lock import LOCK_FILE
from tests.support.adapters import edit_json
from tests.support.examined import A100, GB, RTX4090, T4, ExaminedRun, machine
from tests.support.ranks import CONFIGS
from tests.support.tiny import ToyTask

ROOT = Path(__file__).resolve().parents[2]
ALL_RULES = [rule for rules in RULES.values() for rule in rules]
BY_NAME = {rule.name: rule for rule in ALL_RULES}


class SilentTask(ToyTask):
    """Its rows have no answer."""

    def examples(self, table, *, with_targets=True):
        return super().examples(table, with_targets=False)


class CurtTask(Task):
    """Free text whose answers are empty."""

    name = "curt"

    def build_prompt(self, row):
        return Prompt("Say it: ", str(row["text"]), "\nAnswer:")

    def build_target(self, row):
        return ""


def change(**fields) -> Callable[[ExaminedRun], None]:
    """Settings of the run, a dictionary each, or whole fields."""

    def apply(run):
        for name, value in fields.items():
            if isinstance(value, dict):
                getattr(run, name).update(value)
            else:
                setattr(run, name, value)

    return apply


def remove(name):
    return lambda run: (run.model / name).unlink()


def edit(name, **changes):
    return lambda run: edit_json(run.model / name, **changes)


def cut_off(run):
    weights = run.model / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])


def more_layers(run):
    edit_json(run.model / "config.json", num_hidden_layers=4, layer_types=None)


def pickle_weights(run):
    (run.model / "model.safetensors").rename(run.model / "pytorch_model.bin")


def fsdp1(run):
    section = {"fsdp_sharding_strategy": "FULL_SHARD", "fsdp_offload_params": True}
    run.launch["fsdp_config"] = section


def tokenizer_without(name):
    def apply(run):
        edit_json(run.model / "tokenizer_config.json", **{name: None})
        for extra in ("special_tokens_map.json",):
            (run.model / extra).unlink(missing_ok=True)

    return apply


def token_beyond(run):
    tokenizer = AutoTokenizer.from_pretrained(run.model)
    tokenizer.add_tokens([f"<|{number}|>" for number in range(len(tokenizer), 400)])
    tokenizer.add_special_tokens({"eos_token": "<|new|>"})
    tokenizer.save_pretrained(run.model)


def held_by_another(run):
    run.output_dir.mkdir()
    run.lock = (run.output_dir / LOCK_FILE).open("w")
    fcntl.flock(run.lock, fcntl.LOCK_EX)  # as another process would


def file_for_folder(run):
    run.output_dir.write_text("a file")
    run.output_dir.chmod(0o755)  # as a folder would be


def earlier_run(run):
    run.output_dir.mkdir()
    (run.output_dir / "metrics.json").write_text("{}")


def blind_to_case(run):
    relabel(neutral="Positive")(run)
    edit_json(run.model / "tokenizer.json", normalizer={"type": "Lowercase"})


def relabel(**names):
    def apply(run):
        run.table["label"] = run.table["label"].replace(names)

    return apply


def with_rows(change_table):
    def apply(run):
        run.table = change_table(run.table)

    return apply


def rare_label(rows):
    def apply(table):
        table.loc[table.index[:rows], "label"] = "rare"
        return table

    return with_rows(apply)


def from_the_future(run):
    ahead = time.time() + 9 * 3600
    os.utime(run.model, (ahead, ahead))


def old_packages(**versions):
    return change(machine=machine(A100, A100, packages={**machine().packages, **versions}))


# rule, what is broken, words of the sentence or the fix
BROKEN = [
    ("yaml-refused", change(launch_text="a: ["), "cannot be read"),
    ("yaml-refused", change(launch_text="num_processes: 2"), "distributed_type"),
    ("yaml-refused", change(launch={"mixed_precision": "fp12"}), "fp12"),
    ("yaml-unknown-key", change(launch={"num_procceses": 2}), "Did you mean num_processes?"),
    ("yaml-unknown-key", change(fsdp={"fsdp_reshard_after_foward": True}),
     "Did you mean fsdp_reshard_after_forward?"),
    ("yaml-refused", change(launch={"num_processes": "two"}), "two"),
    ("distributed-type", change(launch={"distributed_type": "DEEPSPEED"}), "DEEPSPEED"),
    ("distributed-type", change(launch={"distributed_type": "MULTI_GPU"}), "has a fsdp_config"),
    ("launch-setting-dropped", change(launch={"dynamo_config": {"dynamo_backend": "INDUCTOR"}}),
     "--step compiled"),
    ("processes-dropped", change(launch={"distributed_type": "MULTI_CPU", "fsdp_config": {}}),
     "accelerate starts one"),
    ("fsdp1", fsdp1, "fsdp_version: 2"),
    ("fsdp1-and-fsdp2-keys", change(fsdp={"fsdp_sharding_strategy": "FULL_SHARD"}),
     "fsdp_sharding_strategy belongs to FSDP1"),
    ("fsdp1-and-fsdp2-keys", change(fsdp={"fsdp_version": 1}), "Set fsdp_version: 2"),
    ("fsdp-value-refused", change(fsdp={"fsdp_auto_wrap_policy": "SOME_WRAP"}), "SOME_WRAP"),
    ("fsdp-cpu-ram-efficient-loading",
     change(fsdp={"fsdp_cpu_ram_efficient_loading": True}), "has no effect"),
    ("fsdp-size-based-wrap",
     change(fsdp={"fsdp_auto_wrap_policy": "SIZE_BASED_WRAP", "fsdp_min_num_params": 100}),
     "TRANSFORMER_BASED_WRAP"),
    ("fsdp-ignored-modules", change(fsdp={"fsdp_ignored_modules": "lm_head"}), "remove it"),
    ("parallelism-config",
     change(launch={"parallelism_config": {"parallelism_config_tp_size": 2}}),
     "not supported"),
    ("fsdp-on-one-process", change(num_processes=1), "single.yaml"),
    ("more-processes-than-gpus", change(num_processes=4), "4 processes for 2 GPU(s)"),
    ("use-cpu-missing", change(machine=machine()), "no GPU"),
    ("fsdp-state-dict-type", change(fsdp={"fsdp_state_dict_type": "SHARDED_STATE_DICT"}),
     "no effect"),
    ("mixed-precision-fp16", change(training={"fp16": True}), "loss scaling"),
    ("mixed-precision-fp16", change(launch={"mixed_precision": "fp16"}), "loss scaling"),
    ("mixed-precision-bf16", change(launch={"mixed_precision": "bf16"}), "autocast"),
    ("training-arguments", change(training={"torch_compile": True}), "--torch_compile"),
    ("training-arguments", change(training={"save_strategy": "sometimes"}), "sometimes"),
    ("training-numbers", change(training={"per_device_train_batch_size": 0}), "more than 0"),
    ("training-numbers", change(training={"num_train_epochs": float("nan")}), "nan"),
    ("training-numbers", change(training={"save_strategy": "steps", "save_steps": -5}), "-5"),
    ("training-numbers", change(training={"seed": -1}), "--seed -1"),
    ("checkpointing-twice",
     change(training={"gradient_checkpointing": True},
            fsdp={"fsdp_activation_checkpointing": True}), "fsdp_activation_checkpointing"),
    ("loss-does-not-fit",
     change(training={"label_smoothing_factor": 0.1}, task=GenerationTask(label_column="label")),
     "free text"),
    ("rows-too-short", change(training={"max_tokens_per_row": 100}), "--max_tokens_per_row 100"),
    ("quantized-optimizer", change(training={"optim": "paged_adamw_8bit"}), "paged_adamw_8bit"),
    ("nan-filter", change(training={"logging_nan_inf_filter": True}), "--logging_nan_inf_filter"),
    ("output-folder-taken", earlier_run, "already holds a run"),
    ("output-folder-taken", change(training={"resume_from_checkpoint": "true"}),
     "no whole checkpoint"),
    ("output-folder-in-use", held_by_another, "is in use"),
    ("output-folder-closed", file_for_folder, "written to"),
    ("output-folder-closed", change(training={"output_dir": "/dev/null/run"}), "/dev/null/run"),
    ("model-missing", change(model_options={"model_name_or_path": "/no/such/model"}), "/no/such"),
    ("model-missing", change(model_options={"model_name_or_path": ""}), "--model_name_or_path"),
    ("model-not-causal", remove("config.json"), "config.json is missing"),
    ("model-not-causal", edit("config.json", model_type="vit"), "no causal language model"),
    ("model-incomplete", cut_off, "damaged"),
    ("model-incomplete", more_layers, "layers.3"),
    ("model-incomplete", edit("config.json", intermediate_size=96), "other shapes"),
    ("model-incomplete", remove("model.safetensors"), "model.safetensors"),
    ("model-pickled", pickle_weights, "pytorch_model.bin"),
    ("architecture", edit("config.json", max_position_embeddings=16), "16 positions"),
    ("packing-impossible",
     change(training={"packing": "never", "share_prefix": "always"}), "--share_prefix always"),
    ("examples-apart", change(training={"packing": "never"}), "--packing never"),
    ("remote-code", change(model_options={"trust_remote_code": True}), "may run"),
    ("tokenizer-missing", remove("tokenizer.json"), "tokenizer"),
    ("no-end-token", tokenizer_without("eos_token"), "no end token"),
    ("token-without-embedding", token_beyond, "'<|new|>' (400), which row "),
    ("no-chat-template", change(data={"chat_template": True}), "no chat template"),
    ("pad-is-end-token", tokenizer_without("pad_token"), "This is handled"),
    ("lora-refused", change(lora={"lora_kwargs": {"rank": 8}}), "rank"),
    ("lora-refused", change(lora={"lora_kwargs": {"r": "8"}}), "must be a number"),
    ("lora-rank", change(lora={"lora_r": 0}), "--lora_r 0"),
    ("lora-dropout", change(lora={"lora_dropout": 1.5}), "1.5"),
    ("target-modules", change(lora={"lora_target_modules": ["query"]}), "'q_proj'"),
    ("target-modules", change(lora={"lora_target_modules": ["q_proj,v_proj"]}), "'v_proj'"),
    ("target-modules", change(lora={"lora_kwargs": {"target_modules": "["}}), "no regular"),
    ("target-modules-regex", change(lora={"lora_kwargs": {"target_modules": ".*[qv]_proj"}}),
     "regular expression for whole module names; it matches 6 modules"),
    ("lora-rank-too-large", change(lora={"lora_r": 64}), "32"),
    ("lora-alpha", change(lora={"lora_alpha": 0}), "--lora_alpha 0"),
    ("lora-scale", change(lora={"lora_alpha": 800}), "100"),
    ("learning-rate-diverges", change(training={"learning_rate": 0.5}), "--learning_rate 0.5"),
    ("dropout-with-shared-prefix",
     change(lora={"lora_dropout": 0.1}, training={"share_prefix": "always"}), "dropout masks"),
    ("lora-on-head", change(lora={"lora_target_modules": ["lm_head"]}), "output head"),
    ("rows-unusable", change(data={"label_column": "mood"}), "'mood'"),
    ("rows-unusable", change(data={"data_file": "no.csv"}), "no.csv"),
    ("rows-unusable", change(data={"eval_size": 1000}), "--eval_size"),
    ("labels-collide", blind_to_case, "'Positive' and 'positive'"),
    ("rows-not-encoded", change(data={"max_length": 10}), "--max_length 10"),
    ("no-supervised-tokens", change(task=SilentTask()), "has no target"),
    ("empty-answers", change(task=CurtTask()), "180 of 180 training rows"),
    ("label-without-rows",
     change(data={"labels": ["negative", "neutral", "positive", "mixed"]}), "'mixed'"),
    ("few-held-out-rows", change(data={"eval_size": 25}), "up to 20 points"),
    ("rows-dropped",
     lambda run: (change(data={"on_bad_rows": "drop"})(run),
                  run.table.loc.__setitem__((slice(1, 3), "text"), " ")), "3 of 240 rows"),
    ("rows-shortened",
     lambda run: (change(data={"max_length": 60})(run),
                  run.table.__setitem__("text", run.table["text"] * 8)), "240 of 240"),
    ("few-rows-of-a-label", rare_label(6), "'rare'"),
    ("held-out-trained-on",
     lambda run: (run.table.__setitem__("split", ["train"] * 180 + ["test"] * 60),
                  run.table.loc.__setitem__((181, "text"), run.table.loc[1, "text"])),
     "1 of 60 held-out rows"),
    ("label-not-held-out", rare_label(1), "'rare'"),
    ("labels-skewed", rare_label(2), "macro_f1"),
    ("labels-alike", relabel(neutral="Positive"), "'Positive'"),
    ("answers-contradict",
     lambda run: run.table.loc.__setitem__((slice(1, 3), "text"), "the same"), "1 texts"),
    ("disk-too-small", change(machine=machine(A100, A100, disk_free=1000)), "has 0.00 GB free"),
    ("host-memory-too-small", change(machine=machine(A100, A100, host_memory=1000)),
     "for 2 process(es)"),
    ("gpu-memory-too-small", change(machine=machine(replace(A100, free=GB // 10), A100)),
     "has 0.1 GB free"),
    ("versions", old_packages(torch="2.4.0"), "torch 2.4.0"),
    ("versions", old_packages(transformers="6.1.0"), "transformers 6.1.0"),
    ("versions", old_packages(peft="0.20.0"), "peft 0.20.0"),
    ("versions", change(machine=machine(A100, A100, python="3.9.1")), "Python 3.9.1"),
    ("bfloat16", change(machine=machine(T4, T4)), "Tesla T4"),
    ("no-peer-access", change(machine=machine(RTX4090, RTX4090, peer_access=False)),
     "NCCL_P2P_DISABLE=1"),
    ("driver", change(machine=machine(driver_gpus=2)), "built for CPUs"),
    ("driver", change(machine=machine(A100, A100, driver_cuda=(11, 8))), "up to 11.8"),
    ("driver", change(machine=machine(driver_gpus=2, torch_cuda="12.8")), "torch can use none"),
    ("clock", change(machine=machine(A100, A100, clock=0.0)), "1970"),
    ("clock", from_the_future, "9 hours ahead"),
    ("shared-memory", change(machine=machine(A100, A100, shared_memory=64 * 2**20)), "64 MiB"),
]  # fmt: skip


@pytest.fixture
def run(tmp_path, model_folder):
    run = ExaminedRun.good(tmp_path, model_folder)
    yield run
    if run.lock is not None:
        run.lock.close()


def test_a_good_run_has_no_finding(run):
    found = run.examine()
    assert list(found.findings) == []
    assert list(found.unchecked) == []
    assert len(found.checked) == len(ALL_RULES)
    assert not dist.is_initialized()


@pytest.mark.parametrize(
    ("rule", "broken", "words"), BROKEN, ids=[f"{r}-{w}"[:60] for r, _, w in BROKEN]
)
def test_rule_trips(run, rule, broken, words):
    broken(run)
    before = dict(os.environ)
    found = run.examine()
    mine = [finding for finding in found.findings if finding.rule == rule]
    assert mine, [finding.rule for finding in found.findings]
    assert any(words in f"{finding.sentence} {finding.fix}" for finding in mine), mine
    assert {finding.severity for finding in mine} == {BY_NAME[rule].severity}
    assert all(finding.fix for finding in mine)
    assert dict(os.environ) == before
    assert not dist.is_initialized()
    severities = [list(Severity).index(finding.severity) for finding in found.findings]
    assert severities == sorted(severities)


def test_every_rule_is_broken_here():
    assert {rule for rule, _, _ in BROKEN} == set(BY_NAME)
    assert len(ALL_RULES) == len(BY_NAME)
    assert all(re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*", name) for name in BY_NAME)


def test_an_error_is_reported_once_and_what_hangs_on_it_is_not_checked(run):
    (run.model / "config.json").unlink()
    found = run.examine()
    assert found.of(Severity.ERROR)[0].rule == "model-not-causal"
    assert "lora-rank-too-large" in found.unchecked
    assert "host-memory-too-small" in found.unchecked


def test_all_refused_settings_are_named_and_not_only_the_first(run):
    """A run stops at the first; the doctor says them all."""
    run.fsdp.update(
        fsdp_auto_wrap_policy="SIZE_BASED_WRAP",
        fsdp_min_num_params=100,
        fsdp_ignored_modules="lm_head",
    )
    names = {finding.rule for finding in run.examine().of(Severity.ERROR)}
    assert {"fsdp-size-based-wrap", "fsdp-ignored-modules"} <= names


def test_ranks_of_a_launch_are_not_joined(run, monkeypatch):
    """The doctor may be called where a scheduler has set these."""
    for name, value in {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    assert not run.examine().findings
    assert not dist.is_initialized()


def test_peer_access_that_is_switched_off_is_no_finding(run, monkeypatch):
    monkeypatch.setenv("NCCL_P2P_DISABLE", "1")
    run.machine = machine(RTX4090, RTX4090, peer_access=False)
    assert not run.examine().findings


def test_this_machine(tmp_path):
    here = Machine.here(output_dir=tmp_path / "not" / "yet")
    assert here.host_memory > 10**8
    assert here.disk_free > 0
    assert here.packages["torch"] == torch.__version__
    assert len(here.gpus) == torch.cuda.device_count()
    assert not (tmp_path / "not").exists()


def saving_arguments(**changes):
    """Those that say how often is saved, and on how much."""
    usual = {
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 1,
        "max_steps": -1,
        "num_train_epochs": 3.0,
        "save_strategy": "epoch",
        "save_steps": 10,
        "save_total_limit": None,
        "load_best_model_at_end": False,
    }
    return SimpleNamespace(**{**usual, **changes})


@pytest.mark.parametrize(
    ("changes", "count"),
    [
        ({}, 3),
        ({"save_strategy": "no"}, 0),
        ({"save_strategy": "steps"}, 3 * 25 // 10),
        ({"save_strategy": "steps", "save_steps": 0.1}, 75 // 8),
        ({"save_strategy": "steps", "save_total_limit": 2}, 3),
        ({"save_strategy": "steps", "save_total_limit": 2, "load_best_model_at_end": True}, 4),
        ({"max_steps": 50}, 2),
    ],
)
def test_checkpoints_on_disk(changes, count):
    """200 examples, 8 a step: 25 steps an epoch."""
    assert checkpoints_on_disk(saving_arguments(**changes), examples=200, processes=2) == count


def test_documentation_lists_the_rules():
    page = (ROOT / "docs" / "doctor.md").read_text(encoding="utf-8")
    listed = [line for line in page.splitlines() if line.startswith("| `")]
    wanted = [f"| `{r.name}` | {r.severity} | {r.meaning} | {r.fix} |" for r in ALL_RULES]
    assert listed == wanted, "docs/doctor.md should have:\n" + "\n".join(wanted)


def seven_billion(run, *, with_weights):
    """config.json, and a safetensors file that has headers and no contents on the disk."""
    config = LlamaConfig(
        hidden_size=4096,
        intermediate_size=11008,
        num_hidden_layers=30,
        num_attention_heads=32,
        vocab_size=102400,
        architectures=["LlamaForCausalLM"],
    )
    config.save_pretrained(run.model)
    (run.model / "model.safetensors").unlink()
    if with_weights:
        write_sparse_weights(run.model)


@pytest.mark.parametrize("with_weights", [False, True])
@pytest.mark.slow
def test_a_7b_folder_takes_seconds(run, with_weights):
    seven_billion(run, with_weights=with_weights)
    run.lora = {"lora_target_modules": ["all-linear"], "lora_r": 64}
    run.machine = machine(A100, A100, host_memory=GB // 2)
    before = time.process_time()  # the clock of a busy machine says little
    found = run.examine()
    assert time.process_time() - before < 15
    *others, host = found.findings
    assert [finding.rule for finding in others] == ([] if with_weights else ["model-incomplete"])
    # The largest tensor, once in each process: weights are read to where they stay.
    assert re.search(r"takes 1\.\d GB of host memory for 2 process", host.sentence)


def test_a_7b_needs_sharding_on_small_gpus(run):
    """The same GPUs hold half of it each, and not the whole of it."""
    seven_billion(run, with_weights=True)
    gpu = replace(RTX4090, free=12 * GB)
    run.machine = machine(gpu, gpu)
    assert not run.examine().findings
    run.launch = yaml.safe_load((CONFIGS / "ddp.yaml").read_text())
    [finding] = run.examine().findings
    assert finding.rule == "gpu-memory-too-small"
    assert "RTX 4090 has 12.0 GB free" in finding.sentence


def write_sparse_weights(folder):
    """A bfloat16 safetensors file in the model's shape, all of it a hole."""
    from lora_fsdp.base.stored_weights import base_skeleton

    header, end = {}, 0
    for name, parameter in base_skeleton(folder).named_parameters():
        start, end = end, end + 2 * parameter.numel()
        shape = list(parameter.shape)
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)
