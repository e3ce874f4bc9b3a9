"""What `--push_to_hub` uploads, to a server on this machine.

Run: python -m pytest tests/training/test_pushing.py
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import huggingface_hub
import pytest
import transformers.utils.hub

from lora_fsdp import DataArguments, FineTuningArguments, LoraArguments, ModelArguments, finetune
from lora_fsdp.adapter.folder import read_adapter_tensors
from tests.support.adapters import save_base
from tests.support.hub_to_push_to import TOKEN, PushedHub, serve
from tests.support.tiny import toy_table

# Of huggingface_hub, when it uploads to storage with httpx.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[PushedHub]:
    with serve(PushedHub()) as hub:
        constants = huggingface_hub.constants
        monkeypatch.setattr(constants, "ENDPOINT", hub.address)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(transformers.utils.hub, "_hf_api", None)  # made anew, with this address
        yield hub


def run(folder: Path, **settings: object) -> Path:
    table = folder / "table.csv"
    toy_table(40).to_csv(table, index=False)
    base = folder / "base"
    save_base(base)
    finetune(
        model_args=ModelArguments(str(base)),
        lora_args=LoraArguments(lora_r=4),
        data_args=DataArguments(task="classification", data_file=str(table), max_length=128),
        training_args=FineTuningArguments(
            output_dir=str(folder / "run"),
            max_steps=2,
            disable_tqdm=True,
            push_to_hub=True,
            hub_model_id="me/tickets",
            hub_token=TOKEN,
            **settings,  # type: ignore[arg-type]
        ),
    )
    return folder / "run"


def test_a_finished_run_is_pushed_as_it_lies_in_its_folder(hub: PushedHub, tmp_path: Path) -> None:
    folder = run(tmp_path, save_strategy="no")
    assert hub.complaints == []
    assert hub.created[0]["name"] == "tickets"
    pushed = tmp_path / "pushed"
    for name, contents in hub.files.items():
        file = pushed / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(contents)
    saved, there = read_adapter_tensors(folder), read_adapter_tensors(pushed)
    assert saved.keys() == there.keys()
    assert all((saved[name] == there[name]).all() for name in saved)
    for name in ("adapter_config.json", "task.json", "proof.json", "tokenizer.json", "README.md"):
        assert hub.files[name] == (folder / name).read_bytes(), name
    assert not {"predictions.csv", "data_health.json", "run_record.json", "report.html"} & {
        *hub.files
    }
    # What is pushed is the card with the scores, not one from before they were known.
    assert b"macro_f1" in hub.files["README.md"]
    assert not any(name.endswith((".bin", ".pt", ".pkl")) for name in hub.files)
    assert not any(TOKEN.encode() in contents for contents in hub.files.values())


def test_a_push_that_fails_loses_nothing(
    hub: PushedHub, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    hub.refused = 403
    folder = run(tmp_path, save_strategy="no")
    assert "was not pushed to me/tickets" in caplog.text
    assert f"hf upload me/tickets {folder}" in caplog.text
    assert (folder / "metrics.json").is_file()
    assert (folder / "report.html").is_file()
