"""Saved under FSDP2 on two ranks, verified and merged in one process.

Run: python -m pytest tests/adapter/test_proof_on_ranks.py
"""

import json

import pytest

from lora_fsdp.adapter.merging import merge_adapter
from lora_fsdp.adapter.proof import PROOF_FILE, read_proof
from lora_fsdp.adapter.verification import verify_adapter_folder
from tests.support.adapters import save_base
from tests.support.ranks import launch_environment, run_ranks
from tests.support.runs import toy_run

pytestmark = pytest.mark.distributed


def run(folder, options):
    return toy_run(folder / "run", base=folder / "base", **options)


@pytest.mark.parametrize("kind", ["llama"])
def test_sharded_run_is_proved(tmp_path, kind):
    save_base(tmp_path / "base", kind)
    options = {
        "per_device_train_batch_size": 4,
        "num_train_epochs": 1,
        "save_strategy": "steps",
        "save_steps": 2,
    }
    run_ranks(run, tmp_path, options, environment=launch_environment("fsdp2_cpu.yaml"))
    for adapter in (tmp_path / "run" / "final", tmp_path / "run" / "checkpoint-2"):
        assert read_proof(adapter).trained
        verification = verify_adapter_folder(adapter)
        assert {check.outcome for check in verification.checks} == {"passed"}, str(verification)
    alone = toy_run(tmp_path / "alone", base=tmp_path / "base", **options)
    assert alone["steps"]
    ours, theirs = (
        json.loads((tmp_path / where / "final" / PROOF_FILE).read_text())
        for where in ("run", "alone")
    )
    for key in ("base", "tokenizer_sha256", "end_token_id", "probes"):
        assert ours[key] == theirs[key]
    merge_adapter(tmp_path / "run" / "final", tmp_path / "merged")
