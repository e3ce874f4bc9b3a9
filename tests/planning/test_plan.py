"""The plan: memory part by part, what fits, what it costs, and what wrong input is told.

Run: python -m pytest tests/planning/test_plan.py
"""

import json
import math
import re
from dataclasses import replace
from functools import cache

import pytest
import yaml
from peft import LoraConfig
from transformers import LlamaConfig

from benchmarks.planning import PAGE
from lora_fsdp.arguments import ModelArguments
from lora_fsdp.cli.configs import find_config, suggested_config
from lora_fsdp.cli.main import main
from lora_fsdp.data.workload import given_work
from lora_fsdp.errors import ArgumentError, ModelNotFoundError, UnsupportedModelError
from lora_fsdp.placement.gpus import GPUS, Gpu, known_gpu, parse_gpus
from lora_fsdp.placement.hardware import Hardware
from lora_fsdp.placement.layout import Layout, is_captured
from lora_fsdp.placement.memory import LargestSequence, device_memory
from lora_fsdp.placement.request import Request
from lora_fsdp.placement.residency import layers_that_fit, with_head_placed
from lora_fsdp.placement.sequences import largest_sequence, sequence_length
from lora_fsdp.placement.timing import step_seconds
from lora_fsdp.placement.whole_job import PARTS, RENTED, Job, job_seconds
from lora_fsdp.planning.models import dense_config, planned_config
from lora_fsdp.planning.plan import make_plan
from lora_fsdp.planning.predicted import beside_measured
from lora_fsdp.planning.question import question_of_recipe
from lora_fsdp.sizing.counting import build_on_meta, shape_of

ADAPTER = LoraConfig(r=8, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
DEEPSEEK_7B = LlamaConfig(
    vocab_size=102400,
    hidden_size=4096,
    intermediate_size=11008,
    num_hidden_layers=30,
    num_attention_heads=32,
    num_key_value_heads=32,
)
TRAINING = {
    "step": "auto",
    "resident_layers": "auto",
    "share_prefix": "auto",
    "packing": "auto",
    "max_tokens_per_row": None,
    "gradient_checkpointing": False,
    "gradient_checkpointing_kwargs": None,
    "per_device_train_batch_size": 8,
    "gradient_accumulation_steps": 1,
    "num_train_epochs": 3,
    "max_steps": -1,
    "bf16": False,
    "fp16": False,
}


def tweets(ranks):
    return given_work(
        TRAINING, examples=4500, tokens_per_example=36.2, label_tokens_per_example=2, ranks=ranks
    )


TWEETS = tweets(1)
ROWS = largest_sequence(TWEETS, 2048)


@pytest.fixture(scope="module")
def seven_billion():
    return shape_of(build_on_meta(DEEPSEEK_7B), ADAPTER)


@cache
def plan(model, gpus, in_4bit=False):
    config = DEEPSEEK_7B if model == "deepseek" else planned_config(model)
    question = question_of_recipe(
        config,
        model_args=ModelArguments(model, load_in_4bit=in_4bit),
        adapter=ADAPTER,
        training=TRAINING,
        work=lambda ranks, request: tweets(ranks),
        yaml_for=lambda gpus: find_config(suggested_config(gpus)),
        shipped={},
        is_open=True,
    )
    return make_plan(question, gpus=[gpus])


class TestMemory:
    def test_as_measured_on_an_h100(self, seven_billion):
        """15.32 GB allocated at 8 tweets a step (benchmarks/results)."""
        placement = Layout(ranks=1, resident_layers=30)
        assert device_memory(seven_billion, placement, ROWS).allocated == pytest.approx(
            15.32e9, rel=0.04
        )

    def test_nothing_is_sharded_where_all_is_resident(self, seven_billion):
        memory = device_memory(seven_billion, Layout(ranks=4, resident_layers=30), ROWS)
        assert memory.resident == 2 * seven_billion.parameters
        assert (memory.base_shard, memory.in_flight, memory.communication) == (0, 0, 0)

    def test_shards_and_residents_make_the_base(self, seven_billion):
        for layers in (0, 7, 29):
            memory = device_memory(seven_billion, Layout(ranks=4, resident_layers=layers), ROWS)
            base = 2 * seven_billion.parameters
            assert 4 * memory.base_shard + memory.resident == pytest.approx(base, abs=8)

    def test_more_ranks_need_less_each(self, seven_billion):
        totals = [
            device_memory(seven_billion, Layout(ranks=n, resident_layers=0), ROWS).total
            for n in (1, 2, 4, 8)
        ]
        assert totals == sorted(totals, reverse=True)

    def test_offloaded_shards_are_not_on_the_gpu(self, seven_billion):
        kept = device_memory(seven_billion, Layout(2, 0), ROWS)
        away = device_memory(seven_billion, Layout(2, 0, offloaded=True), ROWS)
        assert kept.total - away.total == kept.base_shard

    def test_recomputing_keeps_the_layers_inputs(self, seven_billion):
        rows = LargestSequence(tokens=4096, labels=4096)
        kept = device_memory(seven_billion, Layout(1, 30), rows)
        again = device_memory(seven_billion, Layout(1, 30, recomputed=True), rows)
        assert again.activations < kept.activations / 8

    def test_captured_is_what_gathers_nothing_within_a_step(self, seven_billion):
        assert is_captured(seven_billion, Layout(2, 30), tokens=4096)
        assert not is_captured(seven_billion, Layout(2, 30), tokens=4097)
        assert not is_captured(seven_billion, Layout(2, 30, captured=False), tokens=300)
        assert not is_captured(seven_billion, Layout(2, 29), tokens=300)
        assert not is_captured(seven_billion, Layout(2, 30, offloaded=True), tokens=300)

    def test_captured_rows_are_padded(self, seven_billion):
        placement, eager = Layout(1, 30), Layout(1, 30, captured=False)
        rows, padded = LargestSequence(tokens=522, labels=8), LargestSequence(tokens=640, labels=32)
        captured = device_memory(seven_billion, placement, rows)
        assert captured == device_memory(seven_billion, placement, padded)
        assert (
            captured.activations - device_memory(seven_billion, eager, rows).activations
            >= 118 * seven_billion.saved_per_token
        )

    def test_the_head_is_there_twice_while_it_computes(self, seven_billion):
        """Gathered, and in the buffer that it was gathered into."""
        memory = device_memory(seven_billion, Layout(2, 0, quantized=True), ROWS)
        assert memory.communication == 2 * seven_billion.head_parameters

    def test_layers_that_fit_do_and_one_more_does_not(self, seven_billion):
        free = int(12e9)
        layers = layers_that_fit(seven_billion, Layout(2, 0), ROWS, free=free)
        assert 0 < layers < 30
        fits, too_many = (
            device_memory(
                seven_billion,
                with_head_placed(seven_billion, Layout(2, layers + more), ROWS),
                ROWS,
            ).allocated
            for more in (0, 1)
        )
        assert fits <= free < too_many

    @pytest.mark.parametrize(
        ("placement", "whole"),
        [
            (Layout(2, 0), True),
            (Layout(2, 0, quantized=True), True),
            (Layout(2, 15), True),
            (Layout(2, 0, offloaded=True), False),
            (Layout(2, 30), False),
        ],
    )
    def test_the_head_is_whole_where_that_takes_less(self, seven_billion, placement, whole):
        """A gathered one is there twice, on few ranks beside a large shard of it."""
        found = with_head_placed(seven_billion, placement, ROWS)
        assert found == replace(placement, whole_head=whole)
        least = device_memory(seven_billion, found, ROWS).allocated
        assert not whole or least < device_memory(seven_billion, placement, ROWS).allocated

    def test_embeddings_are_gathered_before_there_are_activations(self, seven_billion):
        """There twice then; what a step needs at its peak is the larger of both moments."""
        short = LargestSequence(tokens=40, labels=2)
        placement = Layout(2, 0, quantized=True, whole_head=True)
        memory = device_memory(seven_billion, placement, short)
        embeddings = 2 * seven_billion.embedding_parameters
        assert memory.in_flight == memory.communication == embeddings
        assert memory.activations == memory.logits == 0
        longer = device_memory(seven_billion, placement, replace(short, tokens=2000))
        assert longer.activations > 0
        assert longer.total > memory.total

    def test_one_group_is_gathered_at_once(self, seven_billion):
        placement = Layout(2, 0, one_group=True)
        memory = device_memory(seven_billion, placement, ROWS)
        assert memory.in_flight == memory.communication == 2 * seven_billion.parameters
        assert with_head_placed(seven_billion, placement, ROWS) == placement

    def test_a_small_head_is_sharded(self):
        config = LlamaConfig(**{**DEEPSEEK_7B.to_dict(), "vocab_size": 8192})
        shape = shape_of(build_on_meta(config), ADAPTER)
        assert with_head_placed(shape, Layout(2, 0), ROWS) == Layout(2, 0)

    def test_a_tied_head_stays_with_the_embeddings(self):
        config = LlamaConfig(**{**DEEPSEEK_7B.to_dict(), "tie_word_embeddings": True})
        shape = shape_of(build_on_meta(config), ADAPTER)
        assert with_head_placed(shape, Layout(2, 0), ROWS) == Layout(2, 0)

    def test_none_fits_where_all_is_gathered_till_backward_anyway(self, seven_billion):
        till_backward = Layout(2, 0, kept_until_backward=True)
        assert layers_that_fit(seven_billion, till_backward, ROWS, free=int(12e9)) == 0

    def test_a_sequence_fits_half_of_what_is_free(self, seven_billion):
        def length(free, longest, shape=seven_billion):
            work = replace(TWEETS, longest_example=longest, largest_step=10**6)
            hardware = Hardware(ranks=1, has_gpu=True, free=free)
            return sequence_length(shape, Layout(1, 30), work, hardware, Request())

        free = int(55e9)
        left = free - 2 * seven_billion.parameters
        assert 2048 < length(free, 60) <= 8192
        assert seven_billion.saved_bytes(length(free, 60), recomputed=False) <= left / 2
        assert length(0, 60) == 60
        assert length(0, 9000) == 9000
        plain = replace(seven_billion, is_fused=False)
        assert length(free, 60, plain) == 2048
        assert length(int(20e9), 60, plain) < 2048


class TestTime:
    def test_as_measured_on_an_h100(self, seven_billion):
        """20.49 ms a step of 8 tweets (benchmarks/results)."""
        placement = Layout(ranks=1, resident_layers=30)
        seconds = step_seconds(
            seven_billion, placement, TWEETS, GPUS["H100-80GB"], sequence_tokens=2048
        )
        assert seconds == pytest.approx(20.49e-3, rel=0.2)

    def test_what_is_gathered_costs(self, seven_billion):
        gpu = GPUS["RTX4090"]
        resident, half, till_backward, sharded = (
            step_seconds(seven_billion, placement, TWEETS, gpu, sequence_tokens=2048)
            for placement in (
                Layout(2, 30),
                Layout(2, 15),
                Layout(2, 0, kept_until_backward=True),
                Layout(2, 0),
            )
        )
        assert resident < till_backward < sharded
        assert resident < half < sharded


class TestClaims:
    """What the article says of large models."""

    def test_7b_fits_two_24_gb_gpus(self):
        found = plan("deepseek", "2xRTX4090")
        assert found.best.strategy == "resident"

    def test_600_gb_of_weights_do_not_fit_8x80_gb_without_help(self):
        found = plan("300B", "8xH100")
        assert 2 * found.shape.parameters == pytest.approx(600e9, rel=0.1)
        fitting = {
            (one.strategy, one.placement.layout.quantized) for one in found.candidates if one.fits
        }
        assert ("full shard, recomputing", False) not in fitting
        assert ("full shard", True) in fitting
        assert ("offload", False) in fitting

    def test_70b_on_two_24_gb_gpus(self):
        """In 4 bits a little is missing if sharded, when the head is gathered; by offload, not."""
        found = plan("70B", "2xRTX4090")
        assert not [c for c in found.candidates if c.fits and not c.placement.layout.offloaded]
        [sharded] = [
            c
            for c in found.candidates
            if c.strategy == "full shard, recomputing" and c.placement.layout.quantized
        ]
        assert -1e9 < sharded.spare < 0
        assert sharded.memory.communication == 2 * found.shape.head_parameters
        assert found.best.placement.layout.offloaded
        assert found.best.placement.layout.quantized

    @pytest.mark.parametrize(
        ("claim", "model", "gpus", "strategy", "quantized"),
        [
            ("7B on two GPUs", "deepseek", "2xRTX4090", "resident", False),
            ("7B on two GPUs", "deepseek", "2xRTX4090", "full shard", False),
            ("600 GB of bfloat16", "300B", "8xH100", "full shard, recomputing", False),
            ("The same in 4 bits", "300B", "8xH100", "full shard", True),
            ("70B in 4 bits", "70B", "2xRTX4090", "full shard, recomputing", True),
            ("70B in 4 bits", "70B", "2xRTX4090", "offload", True),
        ],
    )
    def test_the_documentation_has_its_numbers(self, claim, model, gpus, strategy, quantized):
        _, _, claims = PAGE.read_text(encoding="utf-8").partition("## The article's claims")
        [answer] = [text for text in claims.split("\n\n") if text.startswith(f"**{claim}")]
        said = set(re.findall(r"([\d.]+)\s+GB", answer))
        [one] = [
            c
            for c in plan(model, gpus).candidates
            if (c.strategy, c.placement.layout.quantized) == (strategy, quantized)
        ]
        assert f"{one.memory.total / 1e9:.1f}" in said
        if not one.fits:
            assert f"{-one.spare / 1e9:.1f}" in said
        if model == "300B" and not quantized:
            assert f"{one.memory.base_shard / 1e9:.1f}" in said
        if strategy == "offload":
            assert f"{one.host_bytes / 1e9:.0f}" in said

    def test_what_would_hold_it(self):
        found = plan("70B", "1xSmall:4GB:100TFLOPS")
        assert found.best is None
        assert found.notes[0] == "nothing fits 1 x Small; 1 x RTX3080 would hold it"

    def test_how_many_would(self):
        notes = plan("300B", "8xH100").notes
        assert "8 x H100-80GB hold it only in 4 bits or by offload; 16 would in bfloat16" in notes


class TestGpus:
    @pytest.mark.parametrize(
        ("text", "count", "name"),
        [
            ("2xRTX4090", 2, "RTX4090"),
            ("2x RTX 4090", 2, "RTX4090"),
            ("h100", 1, "H100-80GB"),
            ("8 x A800", 8, "A800-80GB"),
            ("nvidia-a100-40gb", 1, "A100-40GB"),
            ("V100", 1, "V100-16GB"),
            ("v100 32GB", 1, "V100-32GB"),
            ("T4", 1, "T4"),
            ("4xA10", 4, "A10"),
            ("A10G", 1, "A10G"),
            ("L4", 1, "L4"),
            ("rtx a6000", 1, "A6000"),
            ("RTX 6000 Ada", 1, "RTX6000-Ada"),
            ("8xH20", 8, "H20-96GB"),
            ("8xB200", 8, "B200-180GB"),
            ("H100 SXM", 1, "H100-80GB"),
            ("h100 pcie", 1, "H100-PCIe"),
        ],
    )
    def test_names(self, text, count, name):
        found = parse_gpus(text)
        assert (found[0], found[1].name) == (count, name)

    def test_own(self):
        count, gpu = parse_gpus("4xMyCard:48GB:200TFLOPS:900GB/s:20GB/s")
        assert (count, gpu.name, gpu.memory) == (4, "MyCard", 48_000_000_000)
        assert (gpu.flops, gpu.bandwidth, gpu.link) == (200e12, 900e9, 20e9)

    @pytest.mark.parametrize(
        ("text", "words"),
        [
            ("RTX4900", "Did you mean RTX4090"),
            ("banana", "no GPU 'banana' is known"),
            ("P100", r"no GPU 'P100' is known\. Known:"),  # and not "did you mean H100"
            ("MI300X", r"no GPU 'MI300X' is known\. Known:"),
            ("0xH100", "at least one GPU"),
            ("", "is empty"),
            ("Mine:48GB", "write an own GPU as"),
            ("Mine:0GB:1TFLOPS", "more than 0"),
        ],
    )
    def test_nonsense(self, text, words):
        with pytest.raises(ArgumentError, match=words):
            parse_gpus(text)

    @pytest.mark.parametrize(
        ("driver", "memory", "name"),
        [
            ("NVIDIA H100 80GB HBM3", 85e9, "H100-80GB"),
            ("NVIDIA GeForce RTX 4090", 25.7e9, "RTX4090"),
            ("NVIDIA A100-SXM4-40GB", 42e9, "A100-40GB"),
            ("NVIDIA A100-SXM4-80GB", 85e9, "A100-80GB"),
            ("NVIDIA H100 PCIe", 85e9, "H100-PCIe"),
            ("NVIDIA H100 NVL", 100e9, "H100-NVL"),
            ("NVIDIA H200", 150e9, "H200-141GB"),
            ("NVIDIA H20", 102e9, "H20-96GB"),
            ("Tesla T4", 15.8e9, "T4"),
            ("Tesla V100-SXM2-32GB", 34e9, "V100-32GB"),
            ("NVIDIA A10", 24e9, "A10"),
            ("NVIDIA A10G", 24e9, "A10G"),
            ("NVIDIA L4", 24e9, "L4"),
            ("NVIDIA L40S", 48e9, "L40S"),
            ("NVIDIA RTX A6000", 51e9, "A6000"),
            ("NVIDIA RTX 6000 Ada Generation", 51e9, "RTX6000-Ada"),
            ("NVIDIA RTX PRO 6000 Blackwell Server Edition", 102e9, "RTX-PRO-6000"),
            ("NVIDIA B200", 192e9, "B200-180GB"),
        ],
    )
    def test_as_drivers_call_them(self, driver, memory, name):
        assert known_gpu(driver, memory=int(memory)).name == name

    @pytest.mark.parametrize(
        ("driver", "memory"),
        [
            ("Tesla P100-PCIE-16GB", 17e9),
            ("NVIDIA GeForce RTX 3080 Ti", 12.6e9),
            ("NVIDIA GeForce RTX 4090 D", 25.3e9),
            ("NVIDIA GeForce RTX 4090 Laptop GPU", 17e9),
            ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", 10e9),
            ("AMD Instinct MI300X", 206e9),
        ],
    )
    def test_unknown_to_us(self, driver, memory):
        assert known_gpu(driver, memory=int(memory)) is None

    def test_without_bfloat16(self):
        notes = plan("7B", "1xV100-32GB").notes
        assert any("V100-32GB: no bfloat16 arithmetic" in note for note in notes)
        assert not any("bfloat16 arithmetic" in note for note in plan("7B", "1xL4").notes)

    def test_the_best_leaves_a_margin(self):
        """What is predicted to leave next to nothing is no plan where another way leaves more."""
        passed_over = 0
        for tenths in (156, 164, 166, 174):
            found = plan("7B", f"1xCard:{tenths / 10}GB:100TFLOPS")
            fitting = [c for c in found.candidates if c.fits]
            if any(c.leaves_a_margin for c in fitting):
                assert found.best.spare >= 0.03 * found.best.memory.total
            passed_over += found.best.seconds > min(c.seconds for c in fitting)
        assert passed_over


class TestModels:
    def test_config_without_sizes(self, tmp_path):
        (tmp_path / "config.json").write_text('{"model_type": "llama", "hidden_size": 64}')
        with pytest.raises(UnsupportedModelError, match="lacks num_hidden_layers, vocab_size"):
            planned_config(str(tmp_path))

    def test_gpt2_has_other_names_for_them(self, tmp_path):
        (tmp_path / "config.json").write_text(
            '{"model_type": "gpt2", "n_embd": 64, "n_layer": 2, "n_head": 2, "vocab_size": 99}'
        )
        assert planned_config(str(tmp_path)).hidden_size == 64

    def test_no_such_model(self, monkeypatch):
        monkeypatch.setenv("HF_HUB_OFFLINE", "1")
        with pytest.raises(ModelNotFoundError, match="no size such as 70B"):
            planned_config("no/such-model")

    @pytest.mark.parametrize("billions", [1, 7, 70, 300])
    def test_sizes(self, billions):
        model = build_on_meta(dense_config(billions * 1e9))
        assert model.num_parameters() == pytest.approx(billions * 1e9, rel=0.1)


class TestWholeJob:
    def parts(self, shape, *, gpu="H200", job=13.8e9, work=TWEETS, **machine):
        return job_seconds(
            shape, Layout(1, 30), work, parse_gpus(gpu)[1] if isinstance(gpu, str) else gpu,
            machine=replace(RENTED, **machine), job=Job(job), sequence_tokens=2048,
        )  # fmt: skip

    def test_before_the_first_line_on_an_h200(self, seven_billion):
        """40.8 s, with 13.8 GB of weights."""
        parts = self.parts(seven_billion)
        assert list(parts) == list(PARTS)
        assert parts["start"] + parts["read"] == pytest.approx(40.8, rel=0.2)

    def test_each_part_by_what_it_depends_on(self, seven_billion):
        before = self.parts(seven_billion)
        more = {
            "read": self.parts(seven_billion, read_rate=1e8),
            "start": self.parts(seven_billion, start=60.0),
            "save": self.parts(seven_billion, checkpoint=3.0),
            "report": self.parts(seven_billion, report=9.0),
            "score": self.parts(seven_billion, work=replace(TWEETS, rows=5000, scored_once=9e4)),
            "evaluate": self.parts(
                seven_billion, work=replace(TWEETS, evaluations=3, scored_once=9e4)
            ),
        }
        for part, after in more.items():
            assert after[part] > before[part], part
            others = {name for name in PARTS if after[name] != before[name]} - {"score"}
            assert others <= {part}, part
        assert more["read"]["read"] - before["read"] == pytest.approx(9 * 13.8)

    def test_a_cpus_step_is_its_operations(self, seven_billion):
        """Where memory and links take no time: 4 a weight and token, the head, all pairs."""
        shape, tokens = seven_billion, TWEETS.step_tokens
        cpu = Gpu("CPU", 2**40, 1e11, math.inf, math.inf, math.inf, is_cpu=True)
        weights = 4 * shape.active_parameters * tokens
        head = 6 * shape.hidden_size * shape.vocabulary_size * TWEETS.step_labels
        pairs = 14 * tokens**2 * shape.hidden_size * shape.layers
        expected = TWEETS.steps * (weights + head + pairs) / 1e11
        assert self.parts(shape, gpu=cpu)["train"] == pytest.approx(expected)
        slower = replace(cpu, bandwidth=1e10)
        assert self.parts(shape, gpu=slower)["train"] > expected

    def test_beside_what_was_measured(self):
        line = beside_measured({"start": 2.0, "capture": 0.0, "train": 9.0}, {
            "start": 2.0, "train": 10.04, "other": 0.5,
        })  # fmt: skip
        assert line == (
            "Predicted / measured: start 2.0 / 2.0, train 9.0 / 10.0; the whole job 11.0 / 12.5 s"
        )


class TestCommand:
    NUMBERS = ("--examples", "4500", "--tokens_per_example", "59")

    def test_json_and_yaml(self, tmp_path, capsys):
        file = tmp_path / "plan.yaml"
        code = main(
            ["plan", "--model_name_or_path", "7B", *self.NUMBERS, "--gpus", "2xRTX4090",
             "--price_per_hour", "0.5", "--json", "true", "--output", str(file)]
        )  # fmt: skip
        assert code == 0
        found = json.loads(capsys.readouterr().out)
        assert found["best"]["fits"]
        assert found["best"]["cost"] == pytest.approx(found["best"]["seconds"] / 3600)
        parts = found["best"]["seconds_by_part"]
        assert list(parts) == list(PARTS)
        assert found["best"]["job_seconds"] == pytest.approx(sum(parts.values()))
        assert (parts["start"], parts["report"]) == (RENTED.start, RENTED.report)
        assert parts["train"] + parts["score"] == pytest.approx(found["best"]["seconds"])
        assert parts["read"] == pytest.approx(found["shape"]["parameters"] * 2 / 1e9, rel=0.05)
        assert sum(found["best"]["bytes"].values()) == 2 * found["best"]["bytes"]["total"]
        written = yaml.safe_load(file.read_text())
        assert written["num_processes"] == 2
        assert written["fsdp_config"]["fsdp_version"] == 2

    def test_from_rows(self, tmp_path, capsys, model_folder):
        table = tmp_path / "tweets.csv"
        lines = (f"flight {n} was late,{'negative' if n % 2 else 'positive'}" for n in range(40))
        table.write_text("text,sentiment\n" + "\n".join(lines) + "\n")
        code = main(
            ["plan", "--model_name_or_path", str(model_folder),
             "--task", "sentiment", "--data_file", str(table), "--gpus", "1xRTX4090"]
        )  # fmt: skip
        assert code == 0
        printed = capsys.readouterr().out
        assert "LlamaForCausalLM" in printed
        assert "108 examples" in printed  # 36 rows, 3 epochs
        assert "Fastest that fits" in printed
        words = " ".join(printed.split())
        assert re.search(r"the whole job: start 25 s, read .*, score .*, together .*; its", words)
        assert "machine is assumed: it starts in 25 s and reads 1 GB/s (--read_rate)" in words
        files = sum(file.stat().st_size for file in model_folder.glob("*.safetensors"))
        code = main(
            ["plan", "--model_name_or_path", str(model_folder), "--task", "sentiment",
             "--data_file", str(table), "--gpus", "2xCPU", "--read_rate", f"{files / 1e7}MB/s",
             "--probe_rows", "30", "--json", "true"]
        )  # fmt: skip
        assert code == 0
        found = json.loads(capsys.readouterr().out)
        [one] = found["candidates"]
        assert (one["gpu"], one["count"], one["fits"], one["weights"]) == ("CPU", 2, True, "fp32")
        assert one["seconds_by_part"]["read"] == pytest.approx(10, rel=0.2)  # as it was said
        assert one["seconds_by_part"]["train"] > 0
        work = found["work"]
        assert work["rows"] == 40
        assert work["probed_tokens"] > work["scored_once"] > 0

    @pytest.mark.parametrize(
        ("options", "words"),
        [
            (["--gpus", "2xRTX4090"], "Nothing says how much is trained"),
            (["--examples", "5"], "needs --tokens_per_example"),
            ([*NUMBERS, "--price_per_hour", "-1"], "must be 0 or more"),
            ([*NUMBERS, "--num_train_epochs", "0"], "must be more than 0"),
            ([*NUMBERS, "--gpus", "2xRTX4900"], "Did you mean RTX4090"),
            ([*NUMBERS, "--gpus", "2xCPU", "H100"], "plan for it alone"),
            ([*NUMBERS, "--gpus", "0xCPU"], "at least one process"),
            ([*NUMBERS, "--read_rate", "fast"], "write how fast files are read as 500MB/s"),
        ],
    )
    def test_wrong_input(self, options, words, capsys):
        assert main(["plan", "--model_name_or_path", "7B", *options]) == 2
        assert words in capsys.readouterr().err
