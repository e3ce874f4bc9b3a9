"""Runs in which each example has a sequence of its own.

Run: python -m pytest tests/training/test_examples_apart.py
"""

import numpy as np
import pytest
import torch
from torch.nn import functional

from lora_fsdp.adapter.ownership import trainable_parameters
from lora_fsdp.adapter.verification import verify_adapter_folder
from lora_fsdp.evaluation.prediction import Predictor
from lora_fsdp.tasks import register_task, registry
from tests.support.ranks import launch_environment, run_ranks
from tests.support.runs import toy_run, toy_trainer
from tests.support.tiny import ToyTask, tiny_tokenizer
from tests.support.token_mixers import family_model

FSDP = launch_environment("fsdp2_cpu.yaml")


def run_with_batch(folder, batch, options):
    return toy_run(folder, per_device_train_batch_size=batch, **options)


def test_never_trains_as_packed_sequences_do(tmp_path):
    packed = toy_run(tmp_path / "packed")
    apart = toy_run(tmp_path / "apart", packing="never")
    assert (packed["packing"], apart["packing"]) == ("packed", "batched")
    np.testing.assert_allclose(apart["losses"], packed["losses"], rtol=2e-5)
    np.testing.assert_allclose(apart["gradient_norms"], packed["gradient_norms"], rtol=1e-4)
    assert apart["metrics"] == pytest.approx(packed["metrics"], rel=1e-5)


@pytest.mark.distributed
@pytest.mark.parametrize(("kind", "packing"), [("mamba2", "batched"), ("qwen3_next", "packed")])
def test_recurrent_models_on_two_ranks_under_fsdp2(tmp_path, kind, packing):
    """With rows that fall unequally on the ranks, and batches of a few."""
    options = {"kind": kind, "rows": 23, "max_tokens_per_row": 128}
    [alone] = run_ranks(run_with_batch, tmp_path / "one", 6, options, world_size=1)
    runs = run_ranks(run_with_batch, tmp_path / "two", 3, options, environment=FSDP)
    assert runs[0]["packing"] == packing
    assert runs[0]["fingerprint"] == runs[1]["fingerprint"]
    assert len(runs[0]["groups"]) > 1  # it is sharded
    np.testing.assert_allclose(runs[0]["losses"], alone["losses"], rtol=2e-5)
    np.testing.assert_allclose(runs[0]["gradient_norms"], alone["gradient_norms"], rtol=1e-4)
    for name, tensor in alone["adapter"].items():
        np.testing.assert_allclose(runs[0]["adapter"][name], tensor, atol=1e-3, err_msg=name)


def test_a_step_s_gradients_are_those_of_plain_peft(tmp_path):
    """The first step of a trainer, against a loop over its examples with the model's forward."""
    trainer = toy_trainer(tmp_path, kind="qwen3_next")
    [step, *_] = trainer.get_train_dataloader()
    trainer.model.train()
    loss = trainer.step(step.sequences, denominator=step.denominator)
    found = {n: p.grad.clone() for n, p in trainable_parameters(trainer.model).items()}
    trainer.adapter.zero_gradients()
    chosen = [one for one in trainer.train_dataset if one.row in step.example_rows]
    total = 0.0
    for example in chosen:
        ids = torch.tensor([example.prompt_ids + example.target_ids])
        logits = trainer.model(input_ids=ids, use_cache=False).logits[0]
        predicting = logits[len(example.prompt_ids) - 1 : -1]
        targets = torch.tensor(example.target_ids)
        part = functional.cross_entropy(predicting, targets, reduction="sum") / step.denominator
        part.backward()
        total += part.item()
    assert loss.item() == pytest.approx(total, rel=2e-6)
    expected = {n: p.grad for n, p in trainable_parameters(trainer.model).items()}
    difference = sum((found[n] - expected[n]).norm() ** 2 for n in found).sqrt()
    assert difference < 2e-6 * sum(g.norm() ** 2 for g in expected.values()).sqrt()


@pytest.mark.parametrize("kind", ["mamba2", "lfm2", "bloom"])
def test_a_saved_adapter_answers_as_it_did(tmp_path, monkeypatch, kind):
    """It is proved, verified, scored and asked for generated text on the same path."""
    monkeypatch.setattr(registry, "_registered", dict(registry._registered))
    register_task(ToyTask)
    base = tmp_path / "base"
    family_model(kind).save_pretrained(base)
    tiny_tokenizer().save_pretrained(base)
    trainer = toy_trainer(tmp_path / "run", kind=kind, base=base, num_train_epochs=1)
    trainer.train()
    trainer.save_model()
    verification = verify_adapter_folder(tmp_path / "run")
    assert verification.passed, str(verification)
    predictor = Predictor.from_adapter(tmp_path / "run")
    assert predictor.packed.packing is trainer.packed.packing
    examples = trainer.eval_dataset
    scores, again = trainer.score(examples), predictor.score(examples)
    torch.testing.assert_close(again.log_likelihoods, scores.log_likelihoods, rtol=1e-5, atol=1e-5)
    alone = []
    for example in examples[:3]:
        for answer in example.candidate_ids:
            ids = torch.tensor([[*example.prompt_ids, *answer]])
            with torch.no_grad():
                logits = predictor.model(input_ids=ids, use_cache=False).logits[0]
            table = logits[len(example.prompt_ids) - 1 : -1].log_softmax(-1)
            alone.append(table.gather(1, torch.tensor([answer]).T).sum())
    found = scores.log_likelihoods[:3].flatten()
    torch.testing.assert_close(found, torch.stack(alone), rtol=1e-5, atol=1e-5)
    texts = predictor.write(examples[:5], max_new_tokens=6)
    for example, text in zip(examples[:5], texts, strict=True):
        ids = torch.tensor([example.prompt_ids])
        for _ in range(6):
            with torch.no_grad():
                token = predictor.model(input_ids=ids, use_cache=False).logits[0, -1].argmax()
            if token == predictor.encoder.end_token_id:
                break
            ids = torch.cat([ids, token.view(1, 1)], dim=1)
        own = ids[0, len(example.prompt_ids) :]
        assert text == tiny_tokenizer().decode(own, skip_special_tokens=True)
