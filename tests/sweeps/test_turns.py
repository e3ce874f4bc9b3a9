"""Adapters one after the other over one base. Run: python -m pytest tests/sweeps/test_turns.py"""

import json

import pytest
from safetensors.torch import load_file

import lora_fsdp.evaluation.comparison as comparison
import lora_fsdp.sweeps.kept_base as kept_base
from lora_fsdp.adapter.verification import verify_adapter_folder
from lora_fsdp.data.encoding import Encoder
from lora_fsdp.sweeps.kept_base import KeptBase
from lora_fsdp.training.scorer import RunScorer
from tests.support.sweeps import toy_sweep

SETTINGS = {
    # Whatever an adapter leaves in the base, or takes from a common stream of random numbers.
    "plain": {"seeds": 3, "adapters_at_once": 1},
    "dropout": {"seeds": 2, "lora_dropout": 0.1},
    "saving, recomputed": {
        "seeds": 2,
        "adapters_at_once": 1,
        "save_strategy": "steps",
        "save_steps": 2,
        "gradient_checkpointing": True,
    },
    "dora": {"seeds": 2, "lora_kwargs": {"use_dora": True}},
}


@pytest.mark.parametrize(
    "kind",
    [
        pytest.param(kind, marks=[] if kind == "dropout" else [pytest.mark.slow])
        for kind in SETTINGS
    ],
)
def test_each_in_its_turn_is_its_own_run_to_the_bit(kind, tmp_path):
    settings = {**SETTINGS[kind]}
    toy_sweep(tmp_path, "turns", **settings)
    settings["seed"] = 3
    for name in ("seeds", "adapters_at_once"):
        settings.pop(name, None)
    # The rows are divided by the first seed, so a later one's run alone has them as files.
    folders = sorted((tmp_path / "turns").glob("seed-*"))
    toy_sweep(tmp_path, "alone", **settings)
    one, other = (
        load_file(folder / "adapter_model.safetensors")
        for folder in (folders[0], tmp_path / "alone")
    )
    assert one.keys() == other.keys()
    assert all((one[key] == other[key]).all() for key in one)
    # The second had the base that the first gave back; it is compared with a run before which
    # nothing was trained: the same sweep, gone on with from there.
    again = tmp_path / "again"
    toy_sweep(tmp_path, "again", **SETTINGS[kind])
    for file in ("metrics.json", "stopped.json"):
        (again / folders[1].name / file).unlink(missing_ok=True)
    toy_sweep(tmp_path, "again", **SETTINGS[kind], resume_from_checkpoint="true")
    one, other = (
        load_file(folder / folders[1].name / "adapter_model.safetensors")
        for folder in (tmp_path / "turns", again)
    )
    assert all((one[key] == other[key]).all() for key in one)
    assert verify_adapter_folder(folders[1]).passed


def test_what_all_have_in_common_is_made_once(tmp_path, monkeypatch):
    calls = {"opened": 0, "baselines": 0, "untrained": 0, "tokenised": 0}

    def counting(name, original, count=lambda *a, **k: 1):
        def counted(*arguments, **named):
            calls[name] += count(*arguments, **named)
            return original(*arguments, **named)

        return counted

    monkeypatch.setattr(kept_base, "open_base", counting("opened", kept_base.open_base))
    for name, made in comparison.BASELINES.items():
        monkeypatch.setitem(comparison.BASELINES, name, counting("baselines", made))
    monkeypatch.setattr(RunScorer, "untrained", counting("untrained", RunScorer.untrained))
    monkeypatch.setattr(Encoder, "_encode_one", counting("tokenised", Encoder._encode_one))
    toy_sweep(tmp_path, "turns", seeds=3, adapters_at_once=1)
    tokenised = calls.pop("tokenised")
    assert calls == {"opened": 1, "baselines": 2, "untrained": 1}
    assert 60 <= tokenised < 120  # beside the rows: questions for the proof
    systems = [
        json.loads((tmp_path / "turns" / f"seed-{seed}" / "metrics.json").read_text())["metrics"]
        for seed in (3, 4, 5)
    ]
    assert systems[0].keys() == systems[2].keys()
    for name in systems[0].keys() - {"tuned"}:
        assert systems[0][name] == systems[2][name]


@pytest.mark.slow
def test_a_base_that_an_adapter_changes_is_opened_anew(tmp_path, monkeypatch):
    opened = []
    original = KeptBase.take

    def noting(self, adapter):
        found = original(self, adapter)
        opened.append(self.opened)
        return found

    monkeypatch.setattr(KeptBase, "take", noting)
    toy_sweep(tmp_path, "pissa", seeds=2, lora_kwargs={"init_lora_weights": "pissa"})
    assert opened[-1] == opened[-2] + 1
