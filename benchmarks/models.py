"""What is done with every family that transformers' `AutoModelForCausalLM` knows: `docs/models.md`.

    python -m benchmarks.models llama mamba2     measures these, and prints their lines
    python -m benchmarks.models --write          measures all, and writes the page's table
    python -m benchmarks.models --write llama    writes this line anew

Each line comes from a tiny model with random weights, made here, that was really trained: four
steps by `LoraTrainer` in float32 on a CPU. Nothing is looked up by a family's name.
"""

from __future__ import annotations

import copy
import logging
import math
import signal
import sys
import tempfile
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import LoraConfig, PeftModel
from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
from torch import nn
from torch.nn import functional
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from lora_fsdp import FineTuningArguments, LoraTrainer
from lora_fsdp.adapter.ownership import trainable_parameters
from lora_fsdp.compute.packed_model import plain_logits
from lora_fsdp.data.packing import Packing
from tests.support.tiny import ToyTask, tiny_tokenizer, toy_table
from tests.support.token_mixers import FAMILIES, WINDOWED

PAGE = Path(__file__).resolve().parents[1] / "docs" / "models.md"
BEGIN, END = "<!-- measured -->", "<!-- end of what was measured -->"

#: What a model is given, where its config knows the name.
SIZES = {
    **dict.fromkeys(("hidden_size", "n_embd", "d_model"), 64),
    **dict.fromkeys(("intermediate_size", "n_inner", "ffn_dim", "decoder_ffn_dim"), 96),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "decoder_layers"), 2),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "decoder_attention_heads"), 4),
    **dict.fromkeys(("max_position_embeddings", "n_positions"), 512),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts"), 4),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size"), 32),
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank"), 32),
    **dict.fromkeys(("qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim", "head_dim"), 16),
    **dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim", "mamba_d_head"), 16),
    **dict.fromkeys(("state_size", "mamba_d_state", "num_heads", "mamba_n_heads"), 8),
    **dict.fromkeys(("n_groups", "n_group", "topk_group", "mamba_n_groups"), 1),
    **dict.fromkeys(("n_shared_experts", "first_k_dense_replace"), 1),
    "vocab_size": 400,
    "num_key_value_heads": 2,
    "rotary_dim": 8,
    "num_experts_per_tok": 2,
    "expand": 2,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "pad_token_id": 1,
    "eos_token_id": 0,
    "bos_token_id": 0,
}
#: Arguments of configs that these sizes do not fit.
OWN: Mapping[str, Mapping[str, Any]] = {
    **{family: arguments for family, (arguments, _) in (FAMILIES | WINDOWED).items()},
    "zamba": {
        "vocab_size": 400, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 4, "attention_hidden_size": 128,
        "attention_head_dim": 32, "mamba_d_state": 8, "n_mamba_heads": 2, "mamba_dt_rank": 8,
        "use_mamba_kernels": False, "layers_block_type": ["mamba", "hybrid"],
    },
    "xlstm": {
        "vocab_size": 400, "hidden_size": 64, "num_hidden_layers": 2, "num_heads": 4,
        "qk_dim_factor": 0.5, "v_dim_factor": 1.0,
    },
    "lfm2_moe": {
        "vocab_size": 400, "hidden_size": 64, "intermediate_size": 96, "moe_intermediate_size": 32,
        "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
        "num_dense_layers": 1, "num_experts": 4, "num_experts_per_tok": 2,
        "max_position_embeddings": 512, "layer_types": ["conv", "full_attention"],
    },
    "gemma3n_text": {
        "vocab_size": 400, "vocab_size_per_layer_input": 400, "hidden_size": 64, "head_dim": 16,
        "hidden_size_per_layer_input": 16, "intermediate_size": 96, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512,
        "num_kv_shared_layers": 0, "laurel_rank": 8, "activation_sparsity_pattern": [0.0, 0.0],
        "sliding_window": 512, "layer_types": ["sliding_attention", "full_attention"],
    },
    "gemma4_unified_text": WINDOWED["gemma4_text"][0],
}  # fmt: skip
_KINDS = ("layer_types", "mlp_layer_types", "layers_block_type", "block_types")
# Whose classes map to a causal LM, and are no text model that is fine-tuned for answers.
_ENCODER_DECODER = "the decoder half of an encoder-decoder: train the whole with its own library"
_BOTH_WAYS = "an encoder that reads in both directions, refused unless its config says is_decoder"
_WRAPPER = "a model of several modalities around a text model: see {} for that"
REASONS: Mapping[str, str] = {
    **dict.fromkeys(
        (
            "bart", "bigbird_pegasus", "blenderbot", "blenderbot-small", "marian", "mbart", "mvp",
            "pegasus", "plbart", "prophetnet", "trocr", "whisper", "musicgen", "musicgen_melody",
            "moshi",
        ),
        _ENCODER_DECODER,
    ),
    **dict.fromkeys(
        (
            "bert", "bert-generation", "big_bird", "camembert", "data2vec-text", "electra", "ernie",
            "megatron-bert", "rembert", "roberta", "roberta-prelayernorm", "roc_bert", "roformer",
            "xlm-roberta", "xlm-roberta-xl", "xmod", "reformer", "xlm", "xlnet",
        ),
        _BOTH_WAYS,
    ),
    **{
        family: _WRAPPER.format(text)
        for family, text in {
            "dots3_note": "dots3_note_text", "emu3": "llama", "fuyu": "persimmon",
            "gemma3": "gemma3_text", "gemma3n": "gemma3n_text", "gemma4": "gemma4_text",
            "gemma4_unified": "gemma4_unified_text", "git": "bert", "got_ocr2": "qwen2",
            "llama4": "llama4_text", "mllama": "llama", "moss_transcribe_diarize": "qwen3",
            "phi4_multimodal": "phi3", "qwen3_5": "qwen3_5_text", "qwen3_5_moe": "qwen3_5_moe_text",
            "qwen4_exp": "qwen4_exp_text",
        }.items()
    },
    "gemma4_assistant": "a drafter for speculative decoding, of no use by itself",
    "gemma4_unified_assistant": "a drafter for speculative decoding, of no use by itself",
    "dbrx": "transformers cannot build it from its own config",
    "cohere_compass_text": "an embedding model's text tower",
    "blt": "reads bytes in patches that a model of its own cuts",
}  # fmt: skip
_EXAMPLES = {
    Packing.PACKED: "packed",
    Packing.BATCHED: "apart, batched",
    Packing.SINGLE: "apart, one by one",
}
# Of the gradients' norm; rounding alone makes less than 2e-6 of it in almost all families.
_ROUNDING = 1e-5
_SECONDS = 300
#: Where what is named as usual cannot be adapted, or gets no gradient (an indexer's).
TARGETS = {
    "axk2": ["q_a_proj", "kv_b_proj"],
    "deepseek_v4": ["q_a_proj"],
    "falcon_mamba": ["in_proj", "x_proj"],
}


@dataclass(frozen=True)
class Line:
    """A family's line. All but `why` are cells; "yes" and "equal" are what one hopes for.

    Attributes:
        family: transformers' `model_type`.
        model_class: of the causal LM.
        examples: whether they are packed, as `--packing auto` chose.
        prefix: whether a packed sequence's common prefix is computed once.
        fused: whether fused layers compute.
        gradients: of a step, against one-by-one plain PEFT.
        trained: whether four steps ran, with finite losses, and every target moved.
        reloaded: whether PEFT alone loads the adapter on the base's folder, to the same logits.
    """

    family: str
    model_class: str
    examples: str
    prefix: str
    fused: str
    gradients: str
    trained: str
    reloaded: str

    def __str__(self) -> str:
        return "| " + " | ".join(astuple(self)) + " |"


HEADINGS = (
    "family", "class", "examples", "prefix once", "fused", "gradients", "4 steps", "in PEFT",
)  # fmt: skip


def tiny_config(family: str) -> PretrainedConfig:
    """The config of a tiny model of the family, which drops nothing."""
    own = copy.deepcopy(dict(OWN.get(family, {})))
    if own:
        ends = {name: SIZES[name] for name in ("pad_token_id", "eos_token_id", "bos_token_id")}
        config = AutoConfig.for_model(family, **{**ends, **own})
    else:
        plain = AutoConfig.for_model(family)
        known = {name: size for name, size in SIZES.items() if hasattr(plain, name)}
        kinds = {name: _two_kinds(plain, name) for name in _KINDS if _has_kinds(plain, name)}
        config = AutoConfig.for_model(family, **known, **kinds)
    if getattr(config, "kv_lora_rank", None):  # keys are made of a latent for every query head
        config.num_key_value_heads = config.num_attention_heads
    for name, value in config.to_dict().items():
        if isinstance(value, float) and ("dropout" in name or "pdrop" in name or "drop" in name):
            setattr(config, name, 0.0)
    return config


def _has_kinds(config: PretrainedConfig, name: str) -> bool:
    return isinstance(config.to_dict().get(name), list)


def _two_kinds(config: PretrainedConfig, name: str) -> list[str]:
    """Two layers, of two kinds where there are so many; one with full attention comes last."""
    kinds = list(dict.fromkeys(config.to_dict()[name]))[:2]
    return sorted((kinds * 2)[:2], key=lambda kind: kind == "full_attention")


def target_modules(model: PreTrainedModel) -> list[str] | str:
    """`q_proj` and `v_proj` where there are any; else PEFT's own for the family, or all."""
    config = model.config
    if config.model_type in TARGETS:
        return TARGETS[config.model_type]
    if config.model_type in FAMILIES:
        return FAMILIES[config.model_type][1]
    names = {name.rpartition(".")[2] for name, _ in model.named_modules()}
    for pair in (["q_proj", "v_proj"], ["q_b_proj", "kv_b_proj"], ["q_b_proj"]):
        if set(pair) <= names:
            return pair
    own = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING.get(config.model_type, [])
    return [name for name in own if name in names] or "all-linear"


def measure(family: str) -> Line:
    """Train a tiny model of the family, and say what was seen."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(tiny_config(family), dtype=torch.float32)
    name = type(model).__name__
    with tempfile.TemporaryDirectory() as folder:
        base, run = Path(folder) / "base", Path(folder) / "run"
        model.save_pretrained(base)
        try:
            model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
            trainer = _trainer(model.requires_grad_(False), run)
        except Exception as error:
            return Line(family, name, _said(error), "", "", "", "", "")
        line = [
            _EXAMPLES[trainer.packed.packing],
            _yes(trainer.placement.shares_prefix),
            _yes(trainer.packed.fusing.is_fused),
        ]
        for check in (_gradients, _trained, lambda one: _reloaded(one, base, run)):
            try:
                line.append(check(trainer))
            except Exception as error:
                line.append(_said(error))
        return Line(family, name, *line)


def _trainer(model: PreTrainedModel, folder: Path) -> LoraTrainer:
    task = ToyTask().bind(toy_table(16))
    torch.manual_seed(1)
    targets = target_modules(model)
    conv = not any(
        isinstance(module, nn.Linear) and name.rpartition(".")[2] in targets
        for name, module in model.named_modules()
    )
    return LoraTrainer(
        model=model,
        args=FineTuningArguments(
            output_dir=str(folder), use_cpu=True, max_steps=4, per_device_train_batch_size=4,
            learning_rate=1e-2, logging_steps=1, save_strategy="no", disable_tqdm=True,
        ),
        task=task,
        processing_class=tiny_tokenizer(),
        train_dataset=task.examples(toy_table(16)),
        peft_config=LoraConfig(
            r=4,
            target_modules=targets,
            fan_in_fan_out=conv and targets != "all-linear",
            init_lora_weights=False,  # so that every gradient is more than nothing
            task_type="CAUSAL_LM",
        ),
        max_length=128,
    )  # fmt: skip


def _gradients(trainer: LoraTrainer) -> str:
    """The first step's, against a loop over its examples with the model's own forward."""
    step = next(iter(trainer.get_train_dataloader()))
    trainer.model.train()
    trainer.step(step.sequences, denominator=step.denominator)
    found = {n: p.grad.clone() for n, p in trainable_parameters(trainer.model).items()}
    trainer.adapter.zero_gradients()
    for example in trainer.train_dataset:
        if example.row in step.example_rows:
            ids = torch.tensor([example.prompt_ids + example.target_ids[:-1]])
            logits = plain_logits(trainer.model, ids)[0, len(example.prompt_ids) - 1 :]
            targets = torch.tensor(example.target_ids)
            loss = functional.cross_entropy(logits.float(), targets, reduction="sum")
            (loss / step.denominator).backward()
    alone = {n: p.grad for n, p in trainable_parameters(trainer.model).items()}
    difference = math.sqrt(sum(float((found[n] - alone[n]).norm() ** 2) for n in found))
    size = math.sqrt(sum(float(gradient.norm() ** 2) for gradient in alone.values()))
    trainer.adapter.drop_gradients()
    return "equal" if size > 0 and difference < _ROUNDING * size else f"{difference / size:.0e} off"


def _trained(trainer: LoraTrainer) -> str:
    before = {n: p.detach().clone() for n, p in trainable_parameters(trainer.model).items()}
    trainer.train()
    trainer.save_model()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    still = [n for n, p in trainable_parameters(trainer.model).items() if torch.equal(p, before[n])]
    finite = len(losses) == 4 and all(map(math.isfinite, losses))
    if still:
        return f"{len(still)} of {len(before)} do not move"
    return _yes(finite)


def _reloaded(trainer: LoraTrainer, base: Path, run: Path) -> str:
    fresh = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    again = PeftModel.from_pretrained(fresh, run).eval()
    ids = torch.tensor([trainer.train_dataset[0].prompt_ids])
    trainer.model.eval()
    with torch.no_grad():
        expected, found = (plain_logits(one, ids) for one in (trainer.model, again))
    return _yes(torch.allclose(found, expected, atol=1e-5))


def _yes(value: bool) -> str:
    return "yes" if value else "no"


def _said(error: Exception) -> str:
    text = (str(error).splitlines() or [""])[0].replace("|", "/")
    return f"{type(error).__name__}: {text[:160]}"


def page_lines(page: str) -> dict[str, str]:
    """The table's lines on the page, by family."""
    _, _, rest = page.partition(BEGIN)
    table, _, _ = rest.partition(END)
    lines = [line for line in table.splitlines() if line.startswith("| ")][1:]
    return {line.split(" | ")[0].removeprefix("| "): line for line in lines}


def page_reasons(page: str) -> dict[str, str]:
    """Why families are not in the table, by family."""
    _, _, rest = page.partition("Not in the table:")
    lists, _, _ = rest.partition(END)
    lines = [line.removeprefix("- `") for line in lists.splitlines() if line.startswith("- `")]
    return {line.split("`: ")[0]: line.split("`: ")[1].removesuffix(".") for line in lines}


def written(lines: Mapping[str, str], reasons: Mapping[str, str]) -> str:
    """What stands between the page's marks."""
    good = sum("| equal |" in line for line in lines.values())
    table = ["| " + " | ".join(HEADINGS) + " |", "|" + "---|" * len(HEADINGS)]
    table += [lines[family] for family in sorted(lines)]
    known = sorted(set(reasons) & set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES))
    return "\n".join(
        [
            f"Measured with transformers {transformers.__version__}: {len(lines)} families, "
            f"{good} of them with equal gradients.",
            "",
            *table,
            "",
            "Not in the table:",
            "",
            *(f"- `{family}`: {reasons[family]}." for family in known),
        ]
    )


class _TooLong(Exception):
    pass


def _alarm(*_: object) -> None:
    raise _TooLong(f"took more than {_SECONDS} seconds")


def main(arguments: Sequence[str]) -> None:
    """Measure, print, and write the page if that was asked for."""
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    transformers.logging.set_verbosity_error()
    write = "--write" in arguments
    asked = [one for one in arguments if one != "--write"]
    known = sorted(set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES) - set(REASONS))
    page = PAGE.read_text(encoding="utf-8")
    lines = page_lines(page) if asked else {}
    reasons = {**(page_reasons(page) if asked else {}), **REASONS}
    signal.signal(signal.SIGALRM, _alarm)
    for family in asked or known:
        signal.alarm(_SECONDS)
        lines.pop(family, None)
        reasons.pop(family, None)
        try:
            lines[family] = str(measure(family))
        except Exception as error:
            reasons[family] = f"no tiny model could be made ({_said(error)})"
        finally:
            signal.alarm(0)
        print(lines.get(family) or f"{family}: {reasons[family]}", flush=True)
    if write:
        before, _, rest = page.partition(BEGIN)
        _, _, after = rest.partition(END)
        body = f"{BEGIN}\n\n{written(lines, reasons)}\n\n{END}"
        PAGE.write_text(before + body + after, encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
