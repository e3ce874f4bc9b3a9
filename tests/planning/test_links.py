"""Which layout is fastest between hosts, and why.

Run: python -m pytest tests/planning/test_links.py
"""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from lora_fsdp.cli.main import main
from lora_fsdp.errors import ArgumentError
from lora_fsdp.placement.gpus import GIGABIT, parse_link

PLAN = ("plan", "--examples", "1000", "--tokens_per_example", "500")
PAGE = Path(__file__).parents[2] / "docs" / "many-machines.md"
GRADIENTS = {"7B": 15.7e6, "70B": 65e6}


def planned(capsys, *words):
    assert main([*PLAN, *words, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


@pytest.mark.parametrize(
    ("text", "speed"),
    [
        ("10Gbit", 10 * GIGABIT),
        ("400 Gbit/s", 400 * GIGABIT),
        ("100Gbps", 100 * GIGABIT),
        ("25G", 25 * GIGABIT),
        ("100Mbit", 0.1 * GIGABIT),
        ("1.2Tbit/s", 1200 * GIGABIT),
        ("12.5GB/s", 100 * GIGABIT),
    ],
)
def test_speeds(text, speed):
    assert parse_link(text) == pytest.approx(speed)


@pytest.mark.parametrize("text", ["", "fast", "10", "-1Gbit", "0Gbit", "10Gbitt", "nanGbit", "G"])
def test_no_speeds(text):
    with pytest.raises(ArgumentError, match="--link"):
        parse_link(text)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--hosts", "0"], "--hosts 0"),
        (["--hosts", "2", "--link", "fast"], "--link 'fast' is no speed"),
        (["--link", "10Gbit"], "give --hosts as well"),
    ],
)
def test_wrong_words(words, said, capsys):
    assert main([*PLAN, "--model_name_or_path", "7B", "--gpus", "1xH100", *words]) == 2
    assert said in capsys.readouterr().err


def test_every_layout_with_what_it_sends(capsys):
    """70B does not fit an H100 whole: in each host, or over both of them."""
    words = ("--model_name_or_path", "70B", "--gpus", "8xH100", "--hosts", "2", "--link", "10Gbit")
    found = planned(capsys, *words)
    bf16 = {c["strategy"]: c for c in found["candidates"] if c["weights"] == "bf16" and c["fits"]}
    hybrid, full = bf16["full shard in each host (hybrid)"], bf16["full shard over all"]
    sent = {name: one["network_bytes_a_step"] for name, one in bf16.items()}
    adapter = found["shape"]["adapter_parameters"]
    # An all-reduce over 16 ranks in a ring; nothing of the base.
    assert sent[hybrid["strategy"]]["gradients"] == pytest.approx(2 * 15 / 16 * 4 * adapter)
    assert sent[hybrid["strategy"]]["weights"] == 0
    assert sent[full["strategy"]]["weights"] > 1e11
    assert found["best"]["strategy"].endswith("(hybrid)")
    assert full["seconds"] > 20 * hybrid["seconds"]
    assert found["best"]["accelerate"]["num_machines"] == 2
    assert found["best"]["accelerate"]["parallelism_config"] == {
        "parallelism_config_dp_replicate_size": 2,
        "parallelism_config_dp_shard_size": 8,
        "parallelism_config_tp_size": 1,
        "parallelism_config_cp_size": 1,
        "parallelism_config_sp_size": 1,
    }


def test_two_rented_machines_of_one_gpu(capsys):
    """A 7B is resident: plain Ethernet carries 16 MB a step and costs little."""
    words = ("--model_name_or_path", "7B", "--gpus", "1xH100", "--hosts", "2", "--link", "10Gbit")
    two = planned(capsys, *words)
    one = planned(capsys, *words[:4])
    best = two["best"]
    assert best["strategy"] == "resident"
    assert best["network_bytes_a_step"]["weights"] == 0
    assert 0.9 < one["best"]["seconds"] / best["seconds"] / 2 < 1


def test_the_page_has_the_figures_of_the_plan(capsys):
    words = ("--model_name_or_path", "7B", "--gpus", "1xH100", "--hosts", "2", "--link", "10Gbit")
    assert main([*PLAN, *words]) == 0
    printed = capsys.readouterr().out.splitlines()
    [line] = [one for one in printed if one.startswith("10 Gbit/s: ")]
    figures = re.findall(r"\d+(?:\.\d+)? (?:[MG]B|m?s)\b", line)
    assert len(figures) == 5
    _, _, after = PAGE.read_text(encoding="utf-8").partition(
        "<!-- held: tests/planning/test_links.py -->"
    )
    section = " ".join(after.partition("\n## ")[0].split())
    assert [one for one in figures if one not in section] == []
    told = set(re.findall(r"\d+(?:\.\d+)? (?:[MG]B|m?s)\b", section))
    assert told == set(figures)


def test_the_words_name_the_fastest_for_each_link(capsys):
    words = ("--model_name_or_path", "70B", "--gpus", "8xH100", "--hosts", "2", "--link", "25Gbit")
    assert main([*PLAN, *words]) == 0
    lines = capsys.readouterr().out.splitlines()
    for speed in ("10", "25", "100", "400"):
        [line] = [one for one in lines if one.startswith(f"{speed} Gbit/s: ")]
        assert "(hybrid)" in line
        assert "each host sends" in line
        assert "over all sends" in line
