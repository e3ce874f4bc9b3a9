"""The article's recipe on a real GPU in bf16: DeepSeek-7B's shape with random weights, and SmolLM2.

Prints examples per second and peak memory. Needs a CUDA GPU and the prepared default (its tokenizer
and tweets; its model for the second test).

Run: python -m pytest -s tests/gpu/test_recipe_on_gpu.py
"""

import time
from pathlib import Path
from statistics import median

import pytest
import torch
from peft import LoraConfig, PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, TrainerCallback

from lora_fsdp import FineTuningArguments, LoraTrainer, get_task
from lora_fsdp.compute.packed_model import PackedModel
from lora_fsdp.data.tables import read_table, sample_rows
from lora_fsdp.evaluation.scoring import score_examples
from tests.support.ranks import launch_environment, run_ranks

DEFAULT = Path(__file__).resolve().parents[2] / ".cache" / "default"
MODEL = DEFAULT / "smollm2-135m-instruct"
TWEETS = DEFAULT / "airline_tweets.csv"

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
    pytest.mark.skipif(
        not (MODEL / "tokenizer.json").exists() or not TWEETS.exists(),
        reason="needs the prepared default: lora-fsdp demo --prepare_only",
    ),
]

# By which two computations in bfloat16 may differ in a log-likelihood; training moves them by ten.
ROUNDING = 0.3
DEEPSEEK_7B = {
    "vocab_size": 102400,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 30,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": False,
}


class StepTimes(TrainerCallback):
    def __init__(self):
        self.seconds = []

    def on_step_begin(self, args, state, control, **kwargs):
        torch.cuda.synchronize()
        self.start = time.perf_counter()

    def on_step_end(self, args, state, control, **kwargs):
        torch.cuda.synchronize()
        self.seconds.append(time.perf_counter() - self.start)


def base_model(name):
    if name == "smollm2":
        return AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.bfloat16)
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("cuda"):
        model = AutoModelForCausalLM.from_config(LlamaConfig(**DEEPSEEK_7B))
    torch.set_default_dtype(torch.float32)
    return model


def recipe_run(name, output_dir, dropout, steps):
    """The recipe's shape: r=8, alpha=32, q_proj and v_proj, 2 x 4 examples a step."""
    table = sample_rows(read_table(TWEETS), max_rows=1000, head=None, seed=0)
    task = get_task("sentiment").bind(table)
    examples = task.examples(table)
    times = StepTimes()
    torch.cuda.reset_peak_memory_stats()
    trainer = LoraTrainer(
        model=base_model(name).requires_grad_(False),
        args=FineTuningArguments(
            output_dir=str(output_dir),
            per_device_train_batch_size=2,
            gradient_accumulation_steps=4,
            max_steps=steps,
            learning_rate=2e-4 if name == "smollm2" else 1e-3,
            lr_scheduler_type="constant",
            logging_steps=1,
            save_strategy="no",
            allow_fsdp_on_one_process=True,
            disable_tqdm=True,
        ),
        task=task,
        processing_class=AutoTokenizer.from_pretrained(MODEL),
        train_dataset=examples[200:],
        eval_dataset=examples[:200],
        peft_config=LoraConfig(
            r=8,
            lora_alpha=32,
            lora_dropout=dropout,
            target_modules=["q_proj", "v_proj"],
            task_type="CAUSAL_LM",
        ),
        callbacks=[times],
    )
    trainer.train()
    peak = torch.cuda.max_memory_allocated() / 1e9
    trainer.save_model(str(output_dir))
    scores = trainer.score(examples[:24])
    encoded = trainer.encoder.encode(examples[:24])
    sharded = trainer.fsdp_settings is not None
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    rate = 8 / median(times.seconds[3:])
    del trainer
    reloaded = PeftModel.from_pretrained(base_model(name).cuda(), str(output_dir)).eval()
    again = score_examples(PackedModel(reloaded), encoded, device=torch.device("cuda"))
    return {
        "losses": losses,
        "examples_per_second": rate,
        "peak_gb": peak,
        "sharded": sharded,
        "same_answers": sum(a == b for a, b in zip(scores.best, again.best, strict=True)),
        "largest_difference": (scores.log_likelihoods - again.log_likelihoods).abs().max().item(),
    }


@pytest.mark.parametrize("dropout", [0.1, 0.0])
@pytest.mark.parametrize("config", ["fsdp2.yaml", None], ids=["fsdp2", "single"])
@pytest.mark.parametrize("name", ["deepseek-7b-shape", "smollm2"])
def test_recipe(name, config, dropout, tmp_path):
    if name == "smollm2" and not (MODEL / "model.safetensors").exists():
        pytest.skip("the prepared default has no model")
    [run] = run_ranks(
        recipe_run,
        name,
        tmp_path,
        dropout,
        40,
        world_size=1,
        launched=config is not None,
        environment=launch_environment(config),
    )
    print(
        f"\n{torch.cuda.get_device_name()}, torch {torch.__version__}: {name}, "
        f"{config or 'no FSDP'}, dropout {dropout}: {run['examples_per_second']:.1f} examples/s, "
        f"peak {run['peak_gb']:.2f} GB, loss {run['losses'][0]:.3f} -> {run['losses'][-1]:.3f}, "
        f"{run['same_answers']} of 24 answers equal after reloading in PEFT, "
        f"log-likelihoods within {run['largest_difference']:.3f}"
    )
    assert run["sharded"] == (config is not None)
    assert sum(run["losses"][-5:]) < sum(run["losses"][:5])
    assert run["largest_difference"] < ROUNDING
    # Rounding decides where two labels are as good as equally likely.
    assert run["same_answers"] >= 22
