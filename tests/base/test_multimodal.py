"""Models that also see, as they are published: their language model is trained, and nothing else.

Run: python -m pytest tests/base/test_multimodal.py
"""

import json
import logging

import pytest
import torch
from peft import PeftModel

from lora_fsdp import (
    DataArguments,
    FineTuningArguments,
    LoraArguments,
    ModelArguments,
    finetune,
)
from lora_fsdp.adapter.attach import attach_adapter, lora_config
from lora_fsdp.adapter.merging import merge_adapter
from lora_fsdp.adapter.verification import verify_adapter_folder
from lora_fsdp.base.loading import load_base
from lora_fsdp.base.stored_weights import base_skeleton
from lora_fsdp.base.streaming import StoredBase, load_on_device, open_base
from lora_fsdp.evaluation.prediction import Predictor
from lora_fsdp.planning.models import planned_config
from tests.support.adapters import logits
from tests.support.examined import ExaminedRun
from tests.support.families import MULTIMODAL, multimodal_model
from tests.support.tiny import randomise_adapter, tiny_tokenizer, toy_table

CPU = torch.device("cpu")
#: What the vision part is called, in any of them.
VISION = ("vision", "visual", "multi_modal_projector")


@pytest.fixture
def saved(tmp_path):
    def save(family):
        model = multimodal_model(family)
        model.save_pretrained(tmp_path / "base")
        tiny_tokenizer().save_pretrained(tmp_path / "base")
        return tmp_path / "base", type(model)

    return save


def adapted_names(folder, targets):
    config = lora_config(LoraArguments(4, 8, 0.0, targets))
    base = open_base(ModelArguments(str(folder)), device=CPU, peft_config=config)
    assert isinstance(base, StoredBase)
    return attach_adapter(base.model, config, stored=base).targeted_module_names


@pytest.mark.parametrize("family", MULTIMODAL)
def test_a_whole_run(family, saved, tmp_path, caplog):
    folder, published = saved(family)
    toy_table(24).to_csv(tmp_path / "rows.csv", index=False)
    with caplog.at_level(logging.WARNING, "lora_fsdp.base.multimodal"):
        finetune(
            model_args=ModelArguments(str(folder)),
            lora_args=LoraArguments(4, 8),
            data_args=DataArguments(
                task="classification", instruction="Say how it sounds:", text_column="text",
                label_column="label", data_file=str(tmp_path / "rows.csv"), eval_size=8,
                max_length=60,
            ),
            training_args=FineTuningArguments(
                output_dir=str(tmp_path / "run"), max_steps=2, per_device_train_batch_size=4,
                use_cpu=True, report_to="none", generate_examples=1, learning_rate=1e-2,
            ),
        )  # fmt: skip
    assert "Not read, because a text does not need it: " in caplog.text
    adapter = tmp_path / "run"
    written = json.loads((adapter / "adapter_config.json").read_text())
    assert written["base_model_name_or_path"] == str(folder)
    verification = verify_adapter_folder(adapter)
    assert verification.headline.startswith("Verified: "), str(verification)
    ours = Predictor.from_adapter(adapter).model
    # Plain PEFT on the published class, the vision part in place.
    plain = PeftModel.from_pretrained(published.from_pretrained(folder), adapter).eval()
    assert any(part in name for name, _ in plain.named_modules() for part in VISION)
    assert torch.equal(logits(plain), logits(ours))
    with plain.disable_adapter():
        assert (logits(plain) - logits(ours)).abs().max() > 1e-4
    merge_adapter(adapter, tmp_path / "merged")
    merged = published.from_pretrained(tmp_path / "merged").eval()
    assert (logits(merged) - logits(plain)).abs().max() < 1e-5


@pytest.mark.parametrize("family", MULTIMODAL)
def test_vision_is_not_read_and_no_target(family, saved):
    folder, published = saved(family)
    model = load_on_device(ModelArguments(str(folder)), device=CPU)
    assert type(model) is published
    whole = load_base(ModelArguments(str(folder)), device=CPU)
    assert torch.equal(logits(model), logits(whole))
    sizes = [sum(p.numel() for p in one.parameters()) for one in (model, whole)]
    assert sizes[0] < sizes[1]
    for targets in (["auto"], ["q_proj", "v_proj"], ["all-linear"]):
        names = adapted_names(folder, targets)
        assert names
        assert not [name for name in names if any(part in name for part in VISION)]


def test_a_name_says_otherwise(saved):
    folder, _ = saved("gemma3")
    names = adapted_names(folder, ["vision_tower.encoder.layers.0.self_attn.q_proj", "v_proj"])
    assert sum("vision_tower" in name for name in names) == 3
    assert sum("language_model" in name for name in names) == 2


def test_a_pattern_means_the_language_model(saved):
    folder, _ = saved("gemma3")
    config = lora_config(LoraArguments(lora_kwargs={"target_modules": r".*q_proj"}))
    model = load_base(ModelArguments(str(folder)), device=CPU)
    names = attach_adapter(model, config).targeted_module_names
    assert len(names) == 2
    assert all("language_model" in name for name in names)


def test_loaded_by_its_user_it_keeps_what_it_has(saved):
    """A model that was handed in whole is adapted in its language model as well."""
    folder, _ = saved("qwen2_5_vl")
    model = attach_adapter(
        load_base(ModelArguments(str(folder)), device=CPU), lora_config(LoraArguments())
    )
    randomise_adapter(model)
    assert not [n for n in model.targeted_module_names if "visual" in n]


@pytest.mark.parametrize("family", MULTIMODAL)
def test_doctor_and_plan(family, saved, tmp_path):
    folder, published = saved(family)
    (tmp_path / "examined").mkdir()
    run = ExaminedRun.good(tmp_path / "examined", folder)
    diagnosis = run.examine()
    assert diagnosis.findings == []
    config = planned_config(str(folder))
    assert config.get_text_config().num_hidden_layers == 2
    assert type(base_skeleton(folder)) is published
