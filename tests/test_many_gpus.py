"""`benchmarks.many_gpus`: rehearsed over gloo ranks, its bars; nothing outlives it or is lost.

Run: python -m pytest tests/test_many_gpus.py
     python -m pytest -m slow tests/test_many_gpus.py       # the whole call, minutes
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch

from benchmarks.many_gpus import Call, Measurement, main, measurements, parser, read_results
from benchmarks.many_gpus_bars import bars, bars_table
from benchmarks.processes import Started

ROOT = Path(__file__).resolve().parents[1]


def call(gpus, folder, *words):
    """The script, as a person calls it."""
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "benchmarks.many_gpus", "--gpus", str(gpus), *words]
    return subprocess.run(
        [*command, "--output", str(folder)],
        cwd=ROOT, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip


# One of each kind. All take three times as long, and 4 ranks twice as long again.
REHEARSED = [
    "tweets-resident",
    "tweets-one-gpu",
    "tweets-trl-fsdp2",
    "resume",
    "tests",
    "job",
    "experts-4bit",
]


@pytest.mark.slow
@pytest.mark.distributed
def test_the_call_is_rehearsed(tmp_path):
    """Every point leaves its results; what cannot be here says why."""
    gpus = 2
    done = call(gpus, tmp_path, "--rehearse", "--seconds", "3000", "--arms", *REHEARSED)
    every = [one for one in measurements(gpus, rehearse=True) if one.name in REHEARSED]
    assert len(every) == len(REHEARSED)
    for one in every:
        file = tmp_path / f"rehearsal-x{gpus}-{one.point}.json"
        stored = json.loads(file.read_text())[one.name]
        result = stored["result"]
        assert stored["command"].startswith("python -m ")
        assert stored["environment"]["torch"]
        if one.name == "tests":
            assert result["tests"] == result["skipped"] > 0
            assert result["reasons_for_skipping"] == [f"needs {gpus} CUDA GPUs, and 0 are here"]
        elif one.name == "resume":
            assert result["ranks"] == [gpus, 1, gpus // 2]
            assert len(result["losses"]) == 12
            assert result["loss_difference"] < 1e-4
        elif one.name == "job":
            assert result["wall_seconds"] > result["training_seconds"] > 0
        else:
            assert "failed" not in result, (done.stdout, result)
            assert result["step_ms"] > 0
            assert result["examples_per_second"] > 0
    assert "not run:" not in done.stdout
    for words in ("all resident, of", "beside trl-fsdp2", "resumed on", "article's"):
        assert words in done.stdout, words


def test_what_ended_is_kept_whatever_comes_after(tmp_path):
    """A slow arm is ended, a broken one told by its error, one too long for the time named."""
    asked = parser().parse_args(["--gpus", "2", "--rehearse", "--output", str(tmp_path / "out")])
    asked.output.mkdir()
    write = "open(r'{output}', 'w').write('{{\"x\": 1}}')"
    todo = [
        Measurement("quick", "6-tests", 1, 60, command=["-c", write]),
        Measurement("slow", "6-tests", 1, 1, command=["-c", "import time; time.sleep(60)"]),
        Measurement("broken", "3-job", 1, 60, command=["-c", f"{write}; raise ValueError('no')"]),
        Measurement("long", "3-job", 1e6, 1e6, command=["-c", write]),
    ]
    call = Call(asked, tmp_path)
    call.run(todo)
    tests = read_results(call.file("6-tests"))
    assert tests["quick"]["result"].pop("arm_seconds") < 60
    assert tests["quick"]["result"] == {"x": 1}
    assert tests["slow"]["result"]["failed"] == "not finished within 1 s"
    job = read_results(call.file("3-job"))
    assert job["broken"]["result"]["failed"] == "ValueError: no"
    assert "long" not in job
    assert call.left_out["long"].endswith("of its least 1000000")
    assert call.again(["long"]) == (
        "python -m benchmarks.many_gpus --gpus 2 --rehearse --arms long"
    )


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["--gpus", "3"], "--gpus"),
        (["--gpus", "4", "--rehearse", "--arms", "tweets"], "--arms tweets: choose from tweets-re"),
        (["--gpus", "4"], "--gpus 4, but 0 CUDA GPUs are here; --rehearse"),
    ],
)
def test_a_wrong_call_is_refused(capsys, monkeypatch, words, named):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(SystemExit):
        main(words)
    assert named in capsys.readouterr().err


def entry(**result):
    return {"workload": {"steps": 40}, "result": result}


FOUND = {
    "tweets-one-gpu": entry(examples_per_second=100.0, step_ms=80.0),
    "tweets-resident": entry(
        examples_per_second=379.9, step_ms=84.0, peak_gb=15.0,
        predicted={"peak_memory_gb": 15.44, "training_seconds": 3.9},
    ),
    "tweets-trl-ddp": entry(examples_per_second=38.0, step_ms=840.0),
    "long-resident": entry(examples_per_second=10.0, step_ms=200.0),
    "long-full-shard": entry(examples_per_second=9.6, step_ms=210.0),
    "70b-bf16": entry(
        tokens_per_second=4400, step_ms=3700.0, computed_tokens_per_step=16332, parameters=70e9
    ),
    "experts-4bit": {"workload": {"steps": 14}, "result": {"failed": "no 4 bits for experts"}},
    "tests": entry(tests=57, failures=1, errors=0, skipped=38),
    "resume": entry(ranks=[4, 1, 2], loss_difference=3e-6),
    "job": entry(wall_seconds=60.0, training_seconds=20.0, plan={"training_seconds": 18.0},
                 seconds_by_part={"start": 10.0, "train": 20.0}),
}  # fmt: skip


def test_the_bars_arithmetic():
    """Each figure by hand: one just below its bar, others at it or above."""
    found = {bar.what: (bar.measured, bar.met) for bar in bars(FOUND, gpus=4)}
    assert found == {
        "tweets, all resident, of 4 x one GPU": ("95.0%", False),  # 94.975
        "tweets, all resident, beside trl-ddp": ("10.0 x", None),
        "long, full-shard, step beside all resident": ("1.050 x", True),
        "tweets-resident, peak memory": ("15.00 GB, +2.9% predicted", True),
        "tweets-resident, step": ("84.0 ms, +16.1% predicted", False),
        "70b-bf16": ("1,100 tokens/s, 309 TFLOP/s a GPU", None),
        "the article's job, on the wall": ("60.0 s", None),
        "where its time went, seconds": ("start 10.0, train 20.0", None),
        "its training": ("20.0 s, -10.0% predicted", True),
        "tests on 4 GPUs": ("18 passed, 1 failed, 38 skipped", False),
        "resumed on 4 - 1 - 2 ranks, losses": ("3.0e-06", True),
    }
    assert "experts-4bit failed: no 4 bits for experts" in bars_table(FOUND, gpus=4)


def test_one_call_fits_into_ten_minutes():
    """What is needed at least for everything; the rest of the limits is slack."""
    assert sum(one.least for one in measurements(8, rehearse=False)) < 580


def test_no_process_outlives_its_arm(tmp_path):
    """One that was put into a session of its own neither."""
    child = "import os, time; os.setsid(); time.sleep(600)"
    code = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"
    started = Started([sys.executable, "-c", code], log=tmp_path / "log", environment=os.environ)
    until = time.monotonic() + 20
    family = []
    while not family and time.monotonic() < until:
        family = psutil.Process(started.process.pid).children(recursive=True)
        time.sleep(0.05)
    assert started.wait(0.5) == "not finished within 0 s"
    assert family
    assert not any(one.is_running() for one in family)


def test_a_failure_is_told_by_its_error(tmp_path):
    """And not by the launcher's."""
    code = "import sys; print('ValueError: no such thing'); print('later'); sys.exit(3)"
    log = tmp_path / "log"
    assert (
        Started([sys.executable, "-c", code], log=log, environment=os.environ).wait(30)
        == "ValueError: no such thing"
    )
