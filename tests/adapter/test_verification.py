"""`verify` on folders of real runs and of plain PEFT: what passes, and what each damage fails.

Run: python -m pytest tests/adapter/test_verification.py
"""

import json
import os
import pickle
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from lora_fsdp import ModelArguments
from lora_fsdp.adapter.folder import (
    ADAPTER_FILE,
    CONFIG_FILE,
    attach_saved,
    load_with_peft,
    read_adapter_folder,
)
from lora_fsdp.adapter.merging import merge_adapter
from lora_fsdp.adapter.proof import PROOF_FILE, read_proof
from lora_fsdp.adapter.saved import save_adapter
from lora_fsdp.adapter.verification import verify_adapter_folder
from lora_fsdp.base.conversion.model_weights import ModelWeights
from lora_fsdp.base.fingerprints import fingerprint_base
from lora_fsdp.base.folders import sha256_of_file
from lora_fsdp.base.loading import load_base
from lora_fsdp.base.stored_weights import BaseWeights, base_skeleton
from lora_fsdp.errors import (
    AdapterVerificationError,
    BaseMismatchError,
    ModelError,
    ModelNotFoundError,
    UnsafeFileError,
    UnsupportedAdapterError,
)
from lora_fsdp.evaluation.prediction import Predictor
from lora_fsdp.tasks import registry
from tests.support.adapters import adapted, edit_json, save_base, save_plain_adapter, seal
from tests.support.runs import toy_trainer
from tests.support.tiny import CONFIGS, ToyTask, tiny_model, tiny_tokenizer

NAMES = [
    "files",
    "manifest",
    "SHA-256",
    "lora_B",
    "base model",
    "tokenizer",
    "end token",
    "shapes",
    "answers",
]


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    """A folder with a base and the adapter of a short run on it; not to be written to."""
    folder = tmp_path_factory.mktemp("proved")
    save_base(folder / "base")
    trainer = toy_trainer(folder / "run", rows=8, num_train_epochs=1, base=folder / "base")
    trainer.train()
    trainer.save_model(str(folder / "adapter"))
    return folder


@pytest.fixture
def run(run_folder, tmp_path):
    """A copy to be damaged; the base is found beside the adapter."""
    shutil.copytree(run_folder / "base", tmp_path / "base")
    shutil.copytree(run_folder / "adapter", tmp_path / "adapter")
    edit_json(
        tmp_path / "adapter" / CONFIG_FILE, base_model_name_or_path="/nowhere/any/longer/base"
    )
    seal(tmp_path / "adapter")
    return tmp_path


def outcomes(verification):
    return {check.name: check.outcome for check in verification.checks}


def change_tensor(file, name_part, change):
    tensors = load_file(file)
    name = next(name for name in tensors if name_part in name)
    tensors[name] = change(tensors[name])
    save_file(tensors, file, metadata={"format": "pt"})


def test_everything_passes(run_folder):
    verification = verify_adapter_folder(run_folder / "adapter")
    assert outcomes(verification) == dict.fromkeys(NAMES, "passed")
    assert verification.passed
    text = str(verification)
    assert "Verified: 9 passed, 0 failed, 0 not possible." in text
    assert all(name in text for name in NAMES)


def test_a_moved_project_is_found_again(run):
    """The base lies where it lay as seen from the adapter."""
    verification = verify_adapter_folder(run / "adapter")
    assert verification.passed
    assert verification.base == str((run / "base").resolve())


def test_base_in_bfloat16(run):
    verification = verify_adapter_folder(run / "adapter", dtype="bfloat16")
    assert verification.passed, str(verification)
    assert "saved in float32, now bfloat16" in str(verification)


@pytest.mark.parametrize(
    ("damage", "failed"),
    [
        (lambda run: change_tensor(run / "adapter" / ADAPTER_FILE, "lora_B", lambda t: t + 3),
         {"SHA-256", "answers"}),
        (lambda run: change_tensor(run / "adapter" / ADAPTER_FILE, "lora_B", torch.zeros_like),
         {"SHA-256", "lora_B"}),
        (lambda run: save_base(run / "base", "qwen3"), {"base model", "answers", "shapes"}),
        (lambda run: change_tensor(run / "base" / "model.safetensors", "norm", lambda t: t * 1.5),
         {"base model", "answers"}),
        (lambda run: edit_json(run / "base" / "config.json", rms_norm_eps=0.5), {"base model"}),
        (lambda run: edit_json(run / "adapter" / PROOF_FILE, end_token_id=7), {"end token"}),
    ],
    ids=["changed", "zeroed", "other base", "other weights", "other settings", "end token"],
)  # fmt: skip
def test_damage(run, damage, failed):
    damage(run)
    seal(run / "adapter")
    verification = verify_adapter_folder(run / "adapter")
    assert not verification.passed
    found = {name for name, outcome in outcomes(verification).items() if outcome == "failed"}
    assert found & failed
    assert found <= failed | {"answers"}
    assert "NOT verified" in str(verification)


def test_answers_alone_give_a_changed_adapter_away(run):
    """As if the adapter had been exchanged together with its hash."""
    file = run / "adapter" / ADAPTER_FILE
    change_tensor(file, "lora_B", lambda tensor: tensor + 0.5)
    edit_json(run / "adapter" / PROOF_FILE, adapter_sha256=sha256_of_file(file))
    seal(run / "adapter")
    found = outcomes(verify_adapter_folder(run / "adapter"))
    assert found == dict.fromkeys(NAMES, "passed") | {"answers": "failed"}


@pytest.mark.parametrize(
    ("file", "settings"),
    [
        (CONFIG_FILE, {"lora_alpha": 33}),
        (CONFIG_FILE, {"base_model_name_or_path": "another/model"}),
        ("task.json", {"max_length": 100}),
        ("training_args.json", {"seed": 4}),
        ("tokenizer_config.json", {"model_max_length": 7}),
        (PROOF_FILE, {"trained": False}),
    ],
    ids=str,
)
def test_edited_settings_are_named(run, file, settings):
    assert outcomes(verify_adapter_folder(run / "adapter"))["manifest"] == "passed"
    edit_json(run / "adapter" / file, **settings)
    verification = verify_adapter_folder(run / "adapter", base=run / "base")
    check = next(check for check in verification.checks if check.name == "manifest")
    assert (check.outcome, check.detail) == ("failed", f"{file} was changed after it was saved")
    assert not verification.passed


def test_every_file_that_was_saved_is_in_the_manifest(run):
    """And each is missed when it is gone."""
    listed = json.loads((run / "adapter" / "manifest.json").read_text())["files"]
    there = {path.name for path in (run / "adapter").iterdir()}
    assert there == {*listed, "manifest.json"}
    for name in listed:
        (run / "adapter" / name).rename(run / name)
        verification = verify_adapter_folder(run / "adapter", base=run / "base")
        check = next(check for check in verification.checks if check.name == "manifest")
        assert (check.outcome, check.detail) == ("failed", f"{name} is missing")
        (run / name).rename(run / "adapter" / name)


def test_a_folder_without_its_manifest(run):
    (run / "adapter" / "manifest.json").unlink()
    verification = verify_adapter_folder(run / "adapter")
    assert verification.passed
    assert outcomes(verification)["manifest"] == "not possible"


@pytest.mark.parametrize(
    ("manifest", "words"),
    [
        ("[]", "must hold a JSON object"),
        ("{}", "must list files"),
        ('{"files": {"a": 3}}', "'a' must have a size"),
        ('{"files": {"../a": {"bytes": 1, "sha256": ""}}}', "../a lies outside the folder"),
        ('{"files": {"/etc/passwd": {"bytes": 1, "sha256": ""}}}', "lies outside"),
        (r'{"files": {"a\u0000": {"bytes": 1, "sha256": ""}}}', "no plain file"),
        (r'{"files": {"\ud800": {"bytes": 1, "sha256": ""}}}', "no plain file"),
        ('{"files": {"": {"bytes": 1, "sha256": ""}}}', "no plain file"),
    ],
)
def test_a_manifest_of_another_shape(run, manifest, words):
    (run / "adapter" / "manifest.json").write_text(manifest)
    verification = verify_adapter_folder(run / "adapter")
    assert outcomes(verification)["manifest"] == "failed"
    assert words in str(verification)


def test_another_tokenizer(run):
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["gate", "terminal"])
    tokenizer.save_pretrained(run / "adapter")
    assert outcomes(verify_adapter_folder(run / "adapter"))["tokenizer"] == "failed"


def test_tokens_under_other_ids(run):
    file = run / "base" / "tokenizer.json"
    contents = json.loads(file.read_text())
    vocabulary = contents["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    file.write_text(json.dumps(contents))
    assert outcomes(verify_adapter_folder(run / "adapter"))["tokenizer"] == "failed"


def test_base_that_is_nowhere(run):
    (run / "base").rename(run / "elsewhere")
    verification = verify_adapter_folder(run / "adapter")
    assert outcomes(verification)["base model"] == "failed"
    assert "nowhere/any/longer/base" in str(verification)
    assert verify_adapter_folder(run / "adapter", base=run / "elsewhere").passed


def test_plain_peft_folder(tmp_path):
    base = save_base(tmp_path / "base")
    save_plain_adapter(tmp_path / "adapter", base)
    verification = verify_adapter_folder(tmp_path / "adapter")
    assert verification.passed
    undone = {name for name, outcome in outcomes(verification).items() if outcome != "passed"}
    assert undone == {"manifest", "SHA-256", "base model", "tokenizer", "end token", "answers"}
    assert "this library did not write the folder" in str(verification)
    assert verification.headline == (
        "Verified in part: 3 passed, 0 failed, 6 not possible. Not checked: manifest, SHA-256, "
        "base model, tokenizer, end token, answers."
    )
    other = save_base(tmp_path / "gpt2", "gpt2")
    assert not verify_adapter_folder(tmp_path / "adapter", base=other).passed


def test_no_folder(tmp_path):
    verification = verify_adapter_folder(tmp_path / "nothing")
    assert not verification.passed
    assert "There is no adapter folder" in str(verification)


class TestSaving:
    def test_untrained_is_allowed(self, tmp_path):
        trainer = toy_trainer(tmp_path / "run", rows=8)
        trainer.save_model(str(tmp_path / "adapter"))
        assert read_proof(tmp_path / "adapter").trained is False

    def test_trained_and_still_zero_stops_the_run(self, tmp_path):
        trainer = toy_trainer(tmp_path / "run", rows=8, num_train_epochs=1)
        trainer.train()
        for name, parameter in trainer.adapter.parameters.items():
            if "layers.1.self_attn.q_proj.lora_B" in name:
                parameter.data.zero_()
        with pytest.raises(AdapterVerificationError, match=r"adapter.*q_proj.*gradients") as error:
            trainer.save_model(str(tmp_path / "adapter"))
        assert str(tmp_path / "adapter") in str(error.value)
        assert not (tmp_path / "adapter" / ADAPTER_FILE).exists()

    def test_what_peft_cannot_load_stops_the_run(self, tmp_path, monkeypatch):
        """As if PEFT had written its settings wrongly."""
        model = adapted(tiny_model())
        original = type(model.peft_config["default"]).to_dict
        monkeypatch.setattr(
            type(model.peft_config["default"]), "to_dict", lambda self: original(self) | {"r": 2}
        )
        with pytest.raises(AdapterVerificationError, match="PEFT cannot load") as error:
            save_adapter(model, tmp_path / "adapter")
        assert str(tmp_path / "adapter") in str(error.value)

    def test_nothing_of_the_data_is_stored(self, run_folder):
        proof = read_proof(run_folder / "adapter")
        tokenizer = tiny_tokenizer()
        prompts = [tokenizer.decode(probe.prompt_ids) for probe in proof.probes]
        assert all(prompt.startswith("Instruction: Say how it sounds:") for prompt in prompts)
        assert "I waited two hours" in prompts[0]


class TestFingerprint:
    @pytest.mark.parametrize("kind", sorted(CONFIGS))
    def test_of_the_files_is_that_of_the_model(self, tmp_path, kind):
        base = save_base(tmp_path / "base", kind, max_shard_size="100KB")
        stored = ModelWeights(base_skeleton(base), BaseWeights(base)).fingerprint()
        live = fingerprint_base(tiny_model(kind))
        assert stored.weights == live.weights
        assert live.weights
        assert not live.differences(stored)

    def test_does_not_depend_on_the_dtype(self):
        live = fingerprint_base(tiny_model())
        assert fingerprint_base(tiny_model(dtype=torch.bfloat16)).weights == live.weights

    def test_does_not_depend_on_the_adapter(self):
        model = adapted(tiny_model())
        assert fingerprint_base(model).weights == fingerprint_base(tiny_model()).weights

    def test_tells_models_apart(self):
        first, second = fingerprint_base(tiny_model()), fingerprint_base(tiny_model(seed=1))
        assert any("sampled weights differ" in text for text in first.differences(second))


class TestWrongBase:
    def test_merge_names_both(self, run):
        other = run / "other"
        tiny_model(seed=1).save_pretrained(other)
        with pytest.raises(BaseMismatchError) as error:
            merge_adapter(run / "adapter", run / "merged", base=other)
        assert str(other) in str(error.value)
        assert str(read_proof(run / "adapter").base_name) in str(error.value)

    def test_predictor(self, run, monkeypatch):
        monkeypatch.setitem(registry._registered, ToyTask.name, ToyTask)
        tiny_model(seed=1).save_pretrained(run / "other")
        with pytest.raises(BaseMismatchError, match="another model"):
            Predictor.from_adapter(run / "adapter", base=run / "other")

    def test_merge_finds_the_right_one(self, run):
        assert merge_adapter(run / "adapter", run / "merged").notes == ()

    def test_word_of_warning_after_quantised_training(self, run, caplog):
        edit_json(run / "adapter" / PROOF_FILE, base_quantization="bitsandbytes, 4 bit")
        result = merge_adapter(run / "adapter", run / "merged")
        assert "quantised base" in str(result)
        assert "quantised base" in caplog.text


class TestRelativeBase:
    def test_from_another_folder(self, tmp_path, monkeypatch):
        """Trained with a relative path, asked from elsewhere."""
        save_base(tmp_path / "models" / "base")
        monkeypatch.chdir(tmp_path)
        trainer = toy_trainer("runs/toy", rows=8, num_train_epochs=1, base="models/base")
        trainer.train()
        trainer.save_model()
        (tmp_path / "deep" / "er").mkdir(parents=True)
        monkeypatch.chdir(tmp_path / "deep" / "er")
        adapter = os.path.join("..", "..", "runs", "toy")
        assert verify_adapter_folder(adapter).passed
        edit_json(tmp_path / "runs" / "toy" / "task.json", task="classification")
        assert Predictor.from_adapter(adapter).task.name == "classification"

    def test_moved_names_path_and_way_out(self, run):
        (run / "base").rename(run / "elsewhere")
        edit_json(run / "adapter" / "task.json", task="classification")
        with pytest.raises(ModelNotFoundError, match=r"nowhere/any/longer/base.*base="):
            Predictor.from_adapter(run / "adapter")
        predictor = Predictor.from_adapter(run / "adapter", base=run / "elsewhere")
        assert predictor.task.labels == ("negative", "neutral", "positive")


class Bomb:
    def __reduce__(self):
        return (os.system, ("touch exploded",))


class TestHostileFolder:
    def test_pickle_is_never_loaded(self, run, monkeypatch):
        monkeypatch.chdir(run)
        (run / "adapter" / ADAPTER_FILE).unlink()
        with (run / "adapter" / "adapter_model.bin").open("wb") as file:
            pickle.dump(Bomb(), file)
        for call in (read_adapter_folder, lambda f: merge_adapter(f, run / "merged")):
            with pytest.raises(UnsafeFileError, match="pickle"):
                call(run / "adapter")
        assert not verify_adapter_folder(run / "adapter").passed
        assert not (run / "exploded").exists()

    @pytest.mark.parametrize("garbage", [False, True])
    def test_base_that_is_a_pickle(self, run, monkeypatch, garbage):
        """torch reads it with an unpickler that runs nothing, and what it cannot read is named."""
        monkeypatch.chdir(run)
        (run / "base" / "model.safetensors").unlink()
        content = b"." if garbage else pickle.dumps(Bomb(), protocol=2)
        (run / "base" / "pytorch_model.bin").write_bytes(content)
        with pytest.raises(ModelError):
            load_base(ModelArguments(str(run / "base")), device=torch.device("cpu"))
        assert not (run / "exploded").exists()

    def test_pickle_under_the_right_name(self, run, monkeypatch):
        monkeypatch.chdir(run)
        with (run / "adapter" / ADAPTER_FILE).open("wb") as file:
            pickle.dump(Bomb(), file)
        with pytest.raises(AdapterVerificationError, match="damaged"):
            read_adapter_folder(run / "adapter")
        assert not (run / "exploded").exists()

    @pytest.mark.parametrize("name", [ADAPTER_FILE, CONFIG_FILE, PROOF_FILE])
    def test_link_that_leads_out(self, run, name):
        shutil.move(run / "adapter" / name, run / name)
        (run / "adapter" / name).symlink_to(run / name)
        with pytest.raises(UnsafeFileError, match="link that leads out"):
            merge_adapter(run / "adapter", run / "merged")
        assert not verify_adapter_folder(run / "adapter").passed

    def test_linked_tokenizer_is_not_copied(self, run):
        """A merged folder is published: a link must not carry a private file into it."""
        (run / "secret").write_text("private key")
        (run / "adapter" / "chat_template.jinja").symlink_to(run / "secret")
        with pytest.raises(UnsafeFileError, match="link that leads out"):
            merge_adapter(run / "adapter", run / "merged")
        assert not (run / "merged").exists()

    def test_links_of_the_hubs_cache(self, run):
        snapshot = run / "models--a--b" / "snapshots" / "0123"
        blobs = run / "models--a--b" / "blobs"
        snapshot.mkdir(parents=True)
        blobs.mkdir()
        for file in list((run / "base").iterdir()):
            shutil.move(file, blobs / file.name)
            (snapshot / file.name).symlink_to(os.path.join("..", "..", "blobs", file.name))
        assert merge_adapter(run / "adapter", run / "merged", base=snapshot).merged == 21

    @pytest.mark.parametrize(
        "settings",
        [
            {"megatron_config": {"a": 1}, "megatron_core": "os"},
            {"corda_config": {"cache_file": "/etc/passwd"}, "init_lora_weights": "corda"},
            {"layer_replication": [[0, 1000000]]},
            {"peft_type": "IA3"},
            {"alpha_pattern": {"(a+)+$": 3}},
            {"brand_new_variant": {"x": 1}},
        ],
        ids=lambda settings: next(iter(settings)),
    )
    def test_settings_that_reach_out(self, run, settings):
        edit_json(run / "adapter" / CONFIG_FILE, **settings)
        with pytest.raises(UnsupportedAdapterError):
            read_adapter_folder(run / "adapter")

    def test_pattern_that_would_take_forever(self, run):
        """Read off the tensors instead, a target pattern is never matched."""
        pattern = r"((\w+\.?)+)+[qv]_projX|.*_proj"
        edit_json(run / "adapter" / CONFIG_FILE, target_modules=pattern)
        assert outcomes(verify_adapter_folder(run / "adapter"))["shapes"] == "passed"

    @pytest.mark.parametrize(
        "settings",
        [{"r": 10**9}, {"r": "8"}, {"r": -1}, {"lora_alpha": "x"}, {"target_modules": 3},
         {"rank_pattern": {"q_proj": 1e9}}, {"lora_dropout": 7}, {"use_rslora": "yes"}],
        ids=str,
    )  # fmt: skip
    def test_nonsense_settings(self, run, settings):
        edit_json(run / "adapter" / CONFIG_FILE, **settings)
        with pytest.raises(AdapterVerificationError, match=next(iter(settings))):
            read_adapter_folder(run / "adapter")

    def test_variant_that_cannot_run(self, run):
        edit_json(run / "adapter" / CONFIG_FILE, alora_invocation_tokens=[])
        assert outcomes(verify_adapter_folder(run / "adapter"))["answers"] in ("passed", "failed")
        edit_json(run / "adapter" / CONFIG_FILE, alora_invocation_tokens=[[1], "x"])
        assert outcomes(verify_adapter_folder(run / "adapter"))["files"] == "failed"

    def test_variant_whose_settings_only_a_real_base_meets(self, run):
        edit_json(run / "adapter" / CONFIG_FILE, monteclora_config=True)
        adapter = read_adapter_folder(run / "adapter")
        base = load_base(ModelArguments(str(run / "base")), device=torch.device("cpu"))
        load_with_peft(adapter, base)  # on the meta device PEFT does not look at it
        with pytest.raises(AdapterVerificationError, match="PEFT cannot load"):
            attach_saved(adapter, base)

    def test_name_that_would_fill_the_screen(self, run):
        file = run / "adapter" / ADAPTER_FILE
        save_file({"a" * 9000: torch.ones(1)}, file)
        with pytest.raises(AdapterVerificationError, match="no adapter weight") as error:
            read_adapter_folder(run / "adapter")
        assert len(str(error.value)) < 1000

    def test_proof_without_an_optional_key(self, run):
        contents = json.loads((run / "adapter" / PROOF_FILE).read_text())
        del contents["base_commit"]
        (run / "adapter" / PROOF_FILE).write_text(json.dumps(contents))
        assert read_proof(run / "adapter").base_commit is None

    def test_huge_probe(self, run):
        probe = {"prompt_ids": [1] * 10**6, "answers": [[1]]}
        edit_json(run / "adapter" / PROOF_FILE, probes=[probe], log_likelihoods=[[-1.0]])
        with pytest.raises(AdapterVerificationError, match="probes"):
            read_proof(run / "adapter")

    def test_token_outside_the_vocabulary(self, run):
        probe = {"prompt_ids": [10**6], "answers": [[1]]}
        edit_json(run / "adapter" / PROOF_FILE, probes=[probe], log_likelihoods=[[-1.0]])
        assert outcomes(verify_adapter_folder(run / "adapter"))["answers"] == "failed"
