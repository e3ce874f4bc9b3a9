"""Every YAML that `accelerate config` writes for FSDP2 runs, or is refused for what it says.

Run: python -m pytest tests/distributed/test_accelerate_config.py
"""

from itertools import product

import pytest
import torch
import yaml
from accelerate.commands.config.config_args import ClusterConfig
from accelerate.utils.constants import FSDP2_STATE_DICT_TYPE, FSDP_AUTO_WRAP_POLICY

from lora_fsdp.arguments import FineTuningArguments
from lora_fsdp.distributed.launch import read_fsdp_settings
from lora_fsdp.distributed.launch_files import as_launched, check_can_start, read_launch
from lora_fsdp.errors import ArgumentError, Fsdp1ConfigError, FsdpSettingError, LaunchError
from tests.support.ranks import launch_environment, run_ranks
from tests.support.runs import toy_run
from tests.support.tiny import tiny_model, tiny_tokenizer

LEFT_OUT = None
YES_OR_NO = (True, False)


def written(file, kind="FSDP", *, precision="no", cpu=False, processes=2, fsdp=None):
    """As `accelerate config` writes it: by the same class, with every key it always writes."""
    config = ClusterConfig(
        compute_environment="LOCAL_MACHINE",
        distributed_type=kind,
        num_processes=processes,
        mixed_precision=precision,
        machine_rank=0,
        num_machines=1,
        main_training_function="main",
        use_cpu=cpu,
        debug=False,
        enable_cpu_affinity=False,
        fsdp_config={key: value for key, value in (fsdp or {}).items() if value is not LEFT_OUT},
    )
    config.to_yaml_file(str(file))
    return file


def sections():
    """Every answer to every question that is asked for FSDP2, and the keys one may leave out."""
    layers = (LEFT_OUT, "LlamaDecoderLayer")
    for wrap, reshard, offload, state, loading, checkpointing in product(
        FSDP_AUTO_WRAP_POLICY,
        YES_OR_NO,
        YES_OR_NO,
        (LEFT_OUT, *FSDP2_STATE_DICT_TYPE),
        (LEFT_OUT, *YES_OR_NO),
        YES_OR_NO,
    ):
        for names in layers if wrap == "TRANSFORMER_BASED_WRAP" else (LEFT_OUT,):
            yield {
                "fsdp_version": 2,
                "fsdp_reshard_after_forward": reshard,
                "fsdp_offload_params": offload,
                "fsdp_auto_wrap_policy": wrap,
                "fsdp_transformer_layer_cls_to_wrap": names,
                "fsdp_min_num_params": 100000000 if wrap == "SIZE_BASED_WRAP" else LEFT_OUT,
                "fsdp_state_dict_type": state,
                "fsdp_cpu_ram_efficient_loading": loading,
                "fsdp_activation_checkpointing": checkpointing,
            }


@pytest.mark.parametrize("wrap", FSDP_AUTO_WRAP_POLICY)
def test_every_fsdp2_yaml_is_read_as_written_or_refused_for_what_is_written(tmp_path, wrap):
    for section in sections():
        if section["fsdp_auto_wrap_policy"] != wrap:
            continue
        file = written(tmp_path / "fsdp.yaml", cpu=True, fsdp=section)
        check_can_start(file, processes=None)
        with as_launched(read_launch(file, processes=None)):
            if wrap == "SIZE_BASED_WRAP":
                with pytest.raises(FsdpSettingError, match="SIZE_BASED_WRAP"):
                    read_fsdp_settings()
                continue
            settings = read_fsdp_settings()
        names = section["fsdp_transformer_layer_cls_to_wrap"]
        assert settings.reshard_after_forward is section["fsdp_reshard_after_forward"]
        assert settings.offload is section["fsdp_offload_params"]
        assert settings.activation_checkpointing is section["fsdp_activation_checkpointing"]
        assert settings.layer_classes == (names and (names,))
        assert settings.wrap_layers is (wrap != "NO_WRAP")


def test_the_shortest_fsdp2_yaml_is_read(tmp_path):
    file = written(tmp_path / "fsdp.yaml", cpu=True, fsdp={"fsdp_version": 2})
    with as_launched(read_launch(file, processes=None)):
        assert read_fsdp_settings() is not None


@pytest.mark.parametrize("version", [1, LEFT_OUT])
def test_fsdp1_is_refused_for_its_version(tmp_path, version):
    section = {"fsdp_version": version, "fsdp_sharding_strategy": "FULL_SHARD"}
    file = written(tmp_path / "fsdp.yaml", fsdp=section)
    with as_launched(read_launch(file, processes=None)), pytest.raises(Fsdp1ConfigError):
        read_fsdp_settings()


@pytest.mark.parametrize("kind", ["NO", "MULTI_GPU", "MULTI_CPU"])
@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("precision", ["no", "bf16", "fp16"])
@pytest.mark.parametrize("cpu", YES_OR_NO)
def test_without_fsdp(tmp_path, kind, processes, precision, cpu):
    changes = {"precision": precision, "cpu": cpu, "processes": processes}
    file = written(tmp_path / "plain.yaml", kind, **changes)
    if processes == 2 and kind != "MULTI_GPU":
        with pytest.raises(LaunchError, match="2 processes were asked for"):
            check_can_start(file, processes=None)
        return
    check_can_start(file, processes=None)
    launch = read_launch(file, processes=None)
    assert (launch.processes, launch.use_cpu) == (processes, cpu)
    with as_launched(launch):
        assert read_fsdp_settings() is None
        if precision == "fp16":
            with pytest.raises(ArgumentError, match="fp16 is not supported"):
                FineTuningArguments(output_dir=str(tmp_path))
        elif processes == 1:
            assert FineTuningArguments(output_dir=str(tmp_path)).mixed_precision == precision


@pytest.mark.distributed
@pytest.mark.parametrize("files", ["safetensors", "pickle"])
@pytest.mark.slow
def test_efficient_loading_changes_nothing_of_a_run(tmp_path, files):
    """Read tensor by tensor, and loaded whole: transformers would give the weights to rank 0."""
    folder = tmp_path / "model"
    model = tiny_model()
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    if files == "pickle":
        (folder / "model.safetensors").unlink()
        torch.save(model.state_dict(), folder / "pytorch_model.bin")
    runs = []
    for efficient in ("true", "false"):
        variables = launch_environment("fsdp2_cpu.yaml", FSDP_CPU_RAM_EFFICIENT_LOADING=efficient)
        both = run_ranks(one_run, tmp_path / efficient, folder, environment=variables)
        assert both[0] == both[1]
        runs.append(both[0])
    assert runs[0] == runs[1]


def one_run(output_dir, folder):
    run = toy_run(output_dir, base=folder, streamed=True, rows=16, num_train_epochs=1)
    return run["losses"], run["fingerprint"], run["metrics"]


def test_the_yaml_is_what_accelerate_itself_reads_back(tmp_path):
    file = written(tmp_path / "fsdp.yaml", fsdp={"fsdp_version": 2})
    contents = yaml.safe_load(file.read_text())
    assert contents["distributed_type"] == "FSDP"
    assert contents["fsdp_config"] == {"fsdp_version": 2}
