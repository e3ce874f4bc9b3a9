"""One process, two ranks under FSDP2, two without, any division into rows: the same training.

Run: python -m pytest tests/training/test_equivalence.py
"""

import numpy as np
import pytest

from tests.support.ranks import launch_environment, run_ranks
from tests.support.runs import toy_run

pytestmark = pytest.mark.distributed

FSDP = launch_environment("fsdp2_cpu.yaml")


def assert_same_training(run, reference):
    np.testing.assert_allclose(run["losses"], reference["losses"], rtol=2e-5)
    np.testing.assert_allclose(run["gradient_norms"], reference["gradient_norms"], rtol=1e-4)
    for name, tensor in reference["adapter"].items():
        # Adam divides by the root of the squared gradient, so its first steps amplify rounding.
        np.testing.assert_allclose(run["adapter"][name], tensor, atol=1e-3, err_msg=name)
    for name in ("eval_accuracy", "eval_macro_f1"):
        assert run["metrics"][name] == reference["metrics"][name]


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    [run] = run_ranks(toy_run, tmp_path_factory.mktemp("one"), world_size=1)
    assert len(run["losses"]) == 6
    assert run["losses"][-1] < run["losses"][0]
    return run


def test_two_ranks_under_fsdp2(reference, tmp_path):
    runs = run_ranks(toy_run_with_batch, tmp_path, 4, {}, environment=FSDP)
    assert runs[0]["groups"] == {
        "LlamaForCausalLM": 1,
        "LlamaDecoderLayer": 3,
        "Embedding": 1,
        "Linear": 1,
    }
    assert runs[0]["fingerprint"] == runs[1]["fingerprint"]
    assert runs[0]["metrics"] == runs[1]["metrics"]
    for run in runs:
        assert_same_training(run, reference)


def test_two_ranks_without_fsdp(reference, tmp_path):
    runs = run_ranks(toy_run_with_batch, tmp_path, 4, {})
    assert runs[0]["groups"] == {}
    assert runs[0]["fingerprint"] == runs[1]["fingerprint"]
    assert_same_training(runs[0], reference)


@pytest.mark.parametrize(
    "options",
    [
        {"gradient_accumulation_steps": 8, "per_device_train_batch_size": 1},
        {"max_tokens_per_row": 128},
        {"share_prefix": "never"},
        {"dataloader_num_workers": 1},
        {"gradient_checkpointing": True},
    ],
    ids=lambda options: next(iter(options)),
)
def test_division_into_rows_does_not_matter(reference, tmp_path, options):
    [run] = run_ranks(toy_run_with_batch, tmp_path, 8, options, world_size=1)
    assert_same_training(run, reference)


def test_ranks_with_unequal_rows(tmp_path):
    """Three examples a rank a step, a last step of odd size, and rows of one example each."""
    options = {"rows": 23, "max_tokens_per_row": 128}
    [alone] = run_ranks(toy_run_with_batch, tmp_path / "one", 6, options, world_size=1)
    runs = run_ranks(toy_run_with_batch, tmp_path / "two", 3, options, environment=FSDP)
    assert_same_training(runs[0], alone)


@pytest.mark.parametrize("kind", ["llama-tied", "qwen3", "gpt2"])
def test_other_architectures_under_fsdp2(kind, tmp_path):
    options = {"kind": kind, "num_train_epochs": 1}
    [alone] = run_ranks(toy_run_with_batch, tmp_path / "one", 8, options, world_size=1)
    runs = run_ranks(toy_run_with_batch, tmp_path / "two", 4, options, environment=FSDP)
    assert_same_training(runs[0], alone)


@pytest.mark.parametrize(
    "setting",
    [
        {"FSDP_RESHARD_AFTER_FORWARD": "true"},
        {"FSDP_ACTIVATION_CHECKPOINTING": "true"},
        {"FSDP_AUTO_WRAP_POLICY": "NO_WRAP"},
        {"FSDP_STATE_DICT_TYPE": "SHARDED_STATE_DICT"},
        {"FSDP_TRANSFORMER_CLS_TO_WRAP": "LlamaDecoderLayer"},
    ],
    ids=lambda setting: next(iter(setting)),
)
def test_fsdp_settings_change_nothing_but_placement(reference, tmp_path, setting):
    runs = run_ranks(toy_run_with_batch, tmp_path, 4, {}, environment=FSDP | setting)
    assert_same_training(runs[0], reference)
    assert "final/adapter_model.safetensors" in runs[0]["files"]


@pytest.mark.parametrize(
    "lora",
    [
        {"modules_to_save": ["embed_tokens"]},
        {"modules_to_save": ["lm_head"]},
        {"trainable_token_indices": [5, 6]},
        {"target_modules": ["embed_tokens", "q_proj"]},
        {"target_modules": ["lm_head", "q_proj"]},
    ],
    ids=str,
)
def test_a_tied_weight_that_the_adapter_trains(lora, tmp_path):
    """PEFT puts a wrapper around the one or the other of the two that share it."""
    options = {"kind": "llama-tied", "num_train_epochs": 1, "lora": lora}
    [alone] = run_ranks(toy_run_with_batch, tmp_path / "one", 8, options, world_size=1)
    runs = run_ranks(toy_run_with_batch, tmp_path / "two", 4, options, environment=FSDP)
    assert runs[0]["fingerprint"] == runs[1]["fingerprint"]
    assert_same_training(runs[0], alone)


def toy_run_with_batch(output_dir, batch_size, options):
    return toy_run(output_dir, **{"per_device_train_batch_size": batch_size, **options})
