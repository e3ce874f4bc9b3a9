"""What the launcher was asked for against what the ranks got.

Run: python -m pytest tests/distributed/test_launch.py
"""

import argparse
import os
from dataclasses import replace

import pytest
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import prepare_multi_gpu_env, prepare_simple_launcher_cmd_env
from peft import LoraConfig

from lora_fsdp import FineTuningArguments, LoraTrainer
from lora_fsdp.arguments.fsdp import FsdpSettings
from lora_fsdp.distributed.launch import (
    accelerate_without_fsdp,
    check_launch,
    fsdp_requested,
    read_fsdp_settings,
)
from lora_fsdp.errors import (
    ArgumentError,
    Fsdp1ConfigError,
    FsdpDroppedError,
    FsdpOnOneProcessError,
    FsdpSettingError,
    LaunchError,
)
from lora_fsdp.ranks import check_ranks_agree
from tests.support.ranks import CONFIGS, RankError, launch_environment, run_ranks
from tests.support.runs import toy_run, toy_trainer
from tests.support.tiny import ToyTask, tiny_model, tiny_tokenizer, toy_table

FSDP = launch_environment("fsdp2_cpu.yaml")
SHARDED = FsdpSettings(
    reshard_after_forward=True,
    offload=False,
    activation_checkpointing=False,
    layer_classes=None,
    wrap_layers=True,
)
EXPECTED = {
    "single.yaml": None,
    "ddp.yaml": None,
    "fsdp2.yaml": SHARDED,
    "fsdp2_cpu.yaml": replace(SHARDED, reshard_after_forward=False),
    "fsdp2_offload.yaml": FsdpSettings(True, True, False, None, True),
    "fsdp2_hosts.yaml": replace(SHARDED, replicas=2),
}


def use(monkeypatch, variables):
    for name in list(os.environ):
        if name.startswith(("FSDP_", "ACCELERATE_")):
            monkeypatch.delenv(name)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)


def launched_environment(config, monkeypatch):
    """The variables that `accelerate launch` itself makes of a YAML."""
    use(monkeypatch, {})
    parser = launch_command_parser()
    # Port 0 = any free one: the usual port may be taken by another run on this machine.
    port = ["--main_process_port", "0"]
    arguments = parser.parse_args(["--config_file", str(config), *port, "script.py"])
    arguments, _, _ = _validate_launch_command(arguments)
    assert isinstance(arguments, argparse.Namespace)
    if arguments.use_fsdp or arguments.multi_gpu:
        return prepare_multi_gpu_env(arguments)
    return prepare_simple_launcher_cmd_env(arguments)[1]


class TestShippedConfigs:
    def test_all_are_tested(self):
        assert {path.name for path in CONFIGS.glob("*.yaml")} == set(EXPECTED)

    @pytest.mark.parametrize("name", sorted(EXPECTED))
    def test_accelerate_reads_it(self, name):
        config = load_config_from_file(str(CONFIGS / name))
        assert config.mixed_precision == "no"
        assert config.num_processes == {"single.yaml": 1, "fsdp2_hosts.yaml": 4}.get(name, 2)
        assert config.use_cpu is (name == "fsdp2_cpu.yaml")

    @pytest.mark.parametrize("name", sorted(EXPECTED))
    def test_settings_that_arrive(self, name, monkeypatch):
        use(monkeypatch, launched_environment(CONFIGS / name, monkeypatch))
        assert read_fsdp_settings() == EXPECTED[name]


class TestSettings:
    def settings(self, monkeypatch, **variables):
        use(monkeypatch, FSDP | variables)
        return read_fsdp_settings()

    def test_not_asked_for(self, monkeypatch):
        use(monkeypatch, {})
        assert read_fsdp_settings() is None
        assert not fsdp_requested()

    def test_layers_by_name(self, monkeypatch):
        names = {"FSDP_TRANSFORMER_CLS_TO_WRAP": "LlamaDecoderLayer,Embedding"}
        found = self.settings(monkeypatch, **names)
        assert found.layer_classes == ("LlamaDecoderLayer", "Embedding")

    def test_no_wrap(self, monkeypatch):
        assert not self.settings(monkeypatch, FSDP_AUTO_WRAP_POLICY="NO_WRAP").wrap_layers

    def test_reshard_and_checkpointing(self, monkeypatch):
        found = self.settings(
            monkeypatch,
            FSDP_RESHARD_AFTER_FORWARD="false",
            FSDP_ACTIVATION_CHECKPOINTING="true",
            FSDP_OFFLOAD_PARAMS="true",
        )
        assert (found.reshard_after_forward, found.activation_checkpointing, found.offload) == (
            False,
            True,
            True,
        )

    def test_activation_offload(self, monkeypatch):
        variables = {"FSDP_ACTIVATION_CHECKPOINTING": "true"}
        assert not self.settings(monkeypatch, **variables).activation_offload
        variables["FSDP_ACTIVATION_CHECKPOINTING_OFFLOAD"] = "true"
        assert self.settings(monkeypatch, **variables).activation_offload

    @pytest.mark.parametrize(
        ("variables", "key"),
        [
            (
                {"FSDP_AUTO_WRAP_POLICY": "SIZE_BASED_WRAP", "FSDP_MIN_NUM_PARAMS": "100"},
                "SIZE_BASED_WRAP",
            ),
            ({"FSDP_IGNORED_MODULES": ".*lm_head"}, "fsdp_ignored_modules"),
            # Nothing would be offloaded.
            (
                {
                    "FSDP_ACTIVATION_CHECKPOINTING": "false",
                    "FSDP_ACTIVATION_CHECKPOINTING_OFFLOAD": "true",
                },
                "activation_checkpointing_offload",
            ),
            (
                {
                    "ACCELERATE_USE_PARALLELISM_CONFIG": "true",
                    "PARALLELISM_CONFIG_TP_SIZE": "2",
                },
                "parallelism_config_tp_size: 2",
            ),
        ],
        ids=lambda value: value if isinstance(value, str) else "",
    )
    def test_unsupported(self, monkeypatch, variables, key):
        with pytest.raises(FsdpSettingError, match=key):
            self.settings(monkeypatch, **variables)

    def test_mixed_precision_fp16_of_the_yaml(self, monkeypatch, tmp_path):
        """It reaches the Trainer beside `--fp16` and would bring loss scaling in again."""
        use(monkeypatch, {"ACCELERATE_MIXED_PRECISION": "fp16"})
        with pytest.raises((ArgumentError, FsdpSettingError), match="fp16"):
            FineTuningArguments(output_dir=str(tmp_path))


FSDP1 = """
compute_environment: LOCAL_MACHINE
distributed_type: FSDP
num_machines: 1
num_processes: 2
use_cpu: true
mixed_precision: "no"
fsdp_config:
  fsdp_version: 1
  fsdp_sharding_strategy: {strategy}
  fsdp_auto_wrap_policy: TRANSFORMER_BASED_WRAP
  fsdp_transformer_layer_cls_to_wrap: LlamaDecoderLayer
  fsdp_state_dict_type: FULL_STATE_DICT
  fsdp_offload_params: true
  fsdp_activation_checkpointing: true
  fsdp_use_orig_params: true
  fsdp_backward_prefetch: BACKWARD_PRE
  fsdp_sync_module_states: true
  fsdp_cpu_ram_efficient_loading: true
"""


class TestFsdp1:
    @pytest.mark.parametrize(
        ("strategy", "reshards"),
        [
            ("FULL_SHARD", True),
            ("SHARD_GRAD_OP", False),
            ("NO_SHARD", None),
            ("HYBRID_SHARD", True),
            ("1", True),
            ("2", False),
        ],
    )
    def test_refused_with_an_equivalent_that_works(self, tmp_path, monkeypatch, strategy, reshards):
        old = tmp_path / "fsdp1.yaml"
        old.write_text(FSDP1.format(strategy=strategy))
        use(monkeypatch, launched_environment(old, monkeypatch))
        with pytest.raises(Fsdp1ConfigError, match="FSDP1") as caught:
            read_fsdp_settings()
        printed = yaml.safe_load(str(caught.value).split("\n\n", 1)[1])
        section = printed["fsdp_config"]
        assert section["fsdp_version"] == 2
        assert section["fsdp_cpu_ram_efficient_loading"] is False
        if reshards is not None:
            assert section["fsdp_reshard_after_forward"] is reshards
        new = yaml.safe_load(old.read_text()) | printed
        (tmp_path / "fsdp2.yaml").write_text(yaml.safe_dump(new))
        use(monkeypatch, launched_environment(tmp_path / "fsdp2.yaml", monkeypatch))
        settings = read_fsdp_settings()
        assert settings.layer_classes == ("LlamaDecoderLayer",)
        assert (settings.offload, settings.activation_checkpointing) == (True, True)

    def test_version_left_out_is_fsdp1(self, monkeypatch):
        use(monkeypatch, {"ACCELERATE_USE_FSDP": "true"})
        with pytest.raises(Fsdp1ConfigError):
            read_fsdp_settings()


class TestCheckLaunch:
    def arguments(self, tmp_path, monkeypatch):
        use(monkeypatch, {})
        return FineTuningArguments(output_dir=str(tmp_path))

    def test_fsdp_on_one_process(self, tmp_path, monkeypatch):
        arguments = self.arguments(tmp_path, monkeypatch)
        with pytest.raises(FsdpOnOneProcessError, match=r"single\.yaml.*allow_fsdp_on_one_process"):
            check_launch(arguments, SHARDED, allow_one_process=False)
        check_launch(arguments, SHARDED, allow_one_process=True)
        check_launch(arguments, None, allow_one_process=False)

    def test_ranks_that_are_not_joined(self, tmp_path, monkeypatch):
        arguments = self.arguments(tmp_path, monkeypatch)
        assert arguments.world_size == 1
        monkeypatch.setenv("WORLD_SIZE", "2")
        with pytest.raises(FsdpDroppedError, match=r"2 processes were started.*fsdp2_cpu\.yaml"):
            check_launch(arguments, None, allow_one_process=True)

    def test_names_are_launch_errors(self):
        for error in (Fsdp1ConfigError, FsdpDroppedError, FsdpOnOneProcessError, FsdpSettingError):
            assert issubclass(error, LaunchError)
            assert issubclass(error, RuntimeError)


def test_variables_come_back(monkeypatch):
    use(monkeypatch, FSDP)
    with accelerate_without_fsdp():
        assert not fsdp_requested()
    assert fsdp_requested()
    with pytest.raises(ZeroDivisionError), accelerate_without_fsdp():
        raise ZeroDivisionError
    assert fsdp_requested()


def test_one_process_agrees_with_itself():
    check_ranks_agree({"anything": "at all"})


# ---- on real ranks ------------------------------------------------------------------------------


def train_on_one_process(folder, allow):
    run = toy_run(folder, num_train_epochs=1, allow_fsdp_on_one_process=allow)
    return run["groups"]


def train_differently(folder, by_rank):
    """A trainer whose options differ by rank."""
    trainer = toy_trainer(folder, **by_rank[int(os.environ["RANK"])])
    return trainer.args.world_size


@pytest.fixture
def short_timeout(monkeypatch):
    """A hang is told from a refusal in less time than a real run may take."""
    monkeypatch.setattr("tests.support.ranks.TIMEOUT_SECONDS", 40)


def refused_with(kind, function, *arguments, **options):
    with pytest.raises(RankError) as caught:
        run_ranks(function, *arguments, **options)
    assert caught.value.kind == kind, str(caught.value)
    return caught.value.text


@pytest.mark.distributed
@pytest.mark.usefixtures("short_timeout")
class TestRanks:
    def test_fsdp_on_one_process(self, tmp_path):
        options = {"world_size": 1, "environment": FSDP, "launched": True}
        message = refused_with(
            "FsdpOnOneProcessError", train_on_one_process, tmp_path, False, **options
        )
        assert "single.yaml" in message
        [groups] = run_ranks(train_on_one_process, tmp_path, True, **options)
        assert groups["LlamaDecoderLayer"] == 3

    @pytest.mark.parametrize(
        ("variable", "value"),
        [
            ("FSDP_RESHARD_AFTER_FORWARD", "true"),
            ("FSDP_TRANSFORMER_CLS_TO_WRAP", "LlamaMLP"),
            ("FSDP_ACTIVATION_CHECKPOINTING", "true"),
        ],
    )
    def test_ranks_with_different_yaml(self, tmp_path, variable, value):
        message = refused_with(
            "RankMismatchError",
            train_differently,
            tmp_path,
            [{}, {}],
            environment=[FSDP, FSDP | {variable: value}],
        )
        assert "the accelerate YAML's FSDP settings" in message
        assert "rank 0: " in message
        assert f"('{variable}', '{value}')" in message.partition("rank 1: ")[2]

    def test_one_rank_without_fsdp(self, tmp_path):
        message = refused_with(
            "RankMismatchError", train_differently, tmp_path, [{}, {}], environment=[FSDP, {}]
        )
        assert "the accelerate YAML's FSDP settings" in message

    @pytest.mark.parametrize(
        ("by_rank", "name", "values"),
        [
            ([{"rows": 24}, {"rows": 23}], "the number of training examples", ("24", "23")),
            ([{"seed": 3}, {"seed": 4}], "--seed", ("3", "4")),
            ([{"data_seed": 3}, {"data_seed": 4}], "--data_seed", ("3", "4")),
            (
                [{"per_device_train_batch_size": 8}, {"per_device_train_batch_size": 4}],
                "--per_device_train_batch_size",
                ("8", "4"),
            ),
        ],
        ids=["rows", "seed", "data seed", "batch"],
    )
    def test_ranks_with_different_settings(self, tmp_path, by_rank, name, values):
        message = refused_with(
            "RankMismatchError", train_differently, tmp_path, by_rank, environment=FSDP
        )
        assert name in message
        assert f"rank 0: {values[0]}" in message
        assert f"rank 1: {values[1]}" in message

    def test_ranks_with_different_rows_of_one_number(self, tmp_path):
        message = refused_with("RankMismatchError", train_on_other_rows, tmp_path, environment=FSDP)
        assert "the training examples" in message

    @pytest.mark.parametrize(
        "by_rank",
        [
            [{"max_tokens_per_row": 2048}, {"max_tokens_per_row": 128}],
            [{"share_prefix": "always"}, {"share_prefix": "never"}],
            [{"learning_rate": 1e-2}, {"learning_rate": 1e-3}],
            [{"num_train_epochs": 1}, {"num_train_epochs": 2}],
            [{"max_grad_norm": 1.0}, {"max_grad_norm": 0.1}],
        ],
        ids=lambda by_rank: next(iter(by_rank[0])),
    )
    def test_settings_that_would_hang_or_drift(self, tmp_path, by_rank):
        refused_with("RankMismatchError", train_differently, tmp_path, by_rank, environment=FSDP)

    def test_ranks_with_different_held_out_rows(self, tmp_path):
        """Ranks that score unequal numbers of rows wait for each other for ever."""
        refused_with("RankMismatchError", evaluate_on_other_rows, tmp_path, environment=FSDP)

    @pytest.mark.parametrize("what", ["r", "lora_alpha", "lora_dropout", "target_modules"])
    def test_ranks_with_different_adapters(self, tmp_path, what):
        refused_with("RankMismatchError", train_other_adapters, tmp_path, what, environment=FSDP)

    def test_ranks_with_different_bases(self, tmp_path):
        """Each rank would shard its own: a patchwork of two models."""
        refused_with("RankMismatchError", train_other_bases, tmp_path, environment=FSDP)


def build(folder, **changes):
    """A trainer from parts, some of which differ by rank."""
    task = ToyTask()
    lora = {"r": 4, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"}
    return LoraTrainer(
        model=tiny_model(seed=changes.get("base", 0)),
        args=FineTuningArguments(output_dir=str(folder), disable_tqdm=True),
        task=task,
        processing_class=tiny_tokenizer(),
        train_dataset=task.examples(toy_table(24, seed=changes.get("train", 0))),
        eval_dataset=task.examples(toy_table(changes.get("held_out", 12), seed=9)),
        peft_config=LoraConfig(**{**lora, **changes.get("lora", {})}),
        max_length=128,
    ).args.world_size


def is_second():
    return os.environ["RANK"] == "1"


def train_on_other_rows(folder):
    return build(folder, train=5 if is_second() else 0)


def evaluate_on_other_rows(folder):
    return build(folder, held_out=2 if is_second() else 30)


def train_other_adapters(folder, what):
    other = {"r": 8, "lora_alpha": 99, "lora_dropout": 0.5, "target_modules": ["q_proj"]}
    return build(folder, lora={what: other[what]} if is_second() else {})


def train_other_bases(folder):
    return build(folder, base=1 if is_second() else 0)
