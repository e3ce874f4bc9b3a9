"""docs/serving.md, block by block, beside `predict`. Run: python -m pytest tests/test_serving.py"""

from __future__ import annotations

import contextlib
import io
import json
import re
import shlex
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from transformers.utils.import_utils import is_serve_available

from lora_fsdp import (
    DataArguments,
    FineTuningArguments,
    LoraArguments,
    ModelArguments,
    finetune,
)
from lora_fsdp.cli.main import main
from lora_fsdp.evaluation.file_prediction import answers_of
from lora_fsdp.evaluation.prediction import Predictor
from lora_fsdp.reporting.sections.usage import _vllm_rank
from tests.support.tiny import toy_table

ROOT = Path(__file__).resolve().parents[1]
PAGE = (ROOT / "docs" / "serving.md").read_text(encoding="utf-8")
FENCE = re.compile(r"^```(\w+)\n(.*?)^```$", flags=re.MULTILINE | re.DOTALL)
TEXTS = ["@JetBlue thanks for the quick response!", "@united you lost my bag. Again."]


def block(language: str, holding: str) -> str:
    """The one block of the page that holds a text."""
    [found] = [code for kind, code in FENCE.findall(PAGE) if kind == language and holding in code]
    return found


@pytest.fixture(scope="module")
def place(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which the page's paths exist: `runs/sentiment`, `models/sentiment`."""
    folder = tmp_path_factory.mktemp("serving")
    rows = toy_table(90).rename(columns={"label": "sentiment"})
    # What the page asks about is told apart in training: thanks is good, a lost bag is bad.
    rows.loc[rows["sentiment"] == "positive", "text"] = [f"{TEXTS[0]} {n}" for n in range(30)]
    rows.loc[rows["sentiment"] == "negative", "text"] = [f"{TEXTS[1]} {n}" for n in range(30)]
    rows.to_csv(folder / "tweets.csv", index=False)
    finetune(
        model_args=ModelArguments(model_name_or_path=str(model_folder)),
        lora_args=LoraArguments(lora_target_modules=["all-linear"]),
        data_args=DataArguments(
            task="sentiment", data_file=str(folder / "tweets.csv"), max_length=256, eval_size=12
        ),
        training_args=FineTuningArguments(
            output_dir=str(folder / "runs" / "sentiment"),
            max_steps=80,
            learning_rate=5e-3,
            save_strategy="no",
            disable_tqdm=True,
        ),
    )
    return folder


@pytest.fixture(scope="module")
def labels(place: Path) -> list[str]:
    """What `predict` says of `TEXTS`."""
    predictor = Predictor.from_adapter(place / "runs" / "sentiment")
    found = [answer["predicted_label"] for answer in answers_of(predictor, TEXTS)]
    assert len(set(found)) == 2, "one answer for all would prove nothing"
    return found


@pytest.fixture(scope="module")
def merged(place: Path) -> Path:
    """`models/sentiment`, by the page's own command."""
    command = shlex.split(block("bash", "lora-fsdp merge"))
    with contextlib.chdir(place):
        assert main(command[1:]) == 0
    return place / "models" / "sentiment"


def printed(code: str) -> list[str]:
    output = io.StringIO()
    with contextlib.redirect_stdout(output):
        exec(compile(code, "docs/serving.md", "exec"), {})
    return output.getvalue().split()


def test_peft_in_python(place: Path, labels: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place)
    assert printed(block("python", "def log_likelihood")) == labels


def test_merged_folder_in_python(
    place: Path, merged: Path, labels: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first example with the line that the page says."""
    monkeypatch.chdir(place)
    code = block("python", "def log_likelihood")
    assert 'AutoModelForCausalLM.from_pretrained("models/sentiment").eval()' in PAGE
    code, changed = re.subn(
        r"^model = AutoModel.*\nmodel = PeftModel.*$",
        'model = AutoModelForCausalLM.from_pretrained("models/sentiment").eval()',
        code,
        flags=re.MULTILINE,
    )
    assert changed == 1
    assert printed(code) == labels


@pytest.mark.parametrize("model", ["runs/sentiment", "models/sentiment"])
@pytest.mark.parametrize("text", range(len(TEXTS)))
def test_pipeline(
    place: Path,
    merged: Path,
    labels: list[str],
    monkeypatch: pytest.MonkeyPatch,
    model: str,
    text: int,
) -> None:
    monkeypatch.chdir(place)
    code = block("python", "ask = pipeline").replace("runs/sentiment", model)
    longest = "max_new_tokens=12"  # the toy tokenizer cuts words into more tokens
    code = code.replace("max_new_tokens=5", longest).replace(TEXTS[0], TEXTS[text])
    assert printed(code) == [labels[text]]


@pytest.mark.skipif(not is_serve_available(), reason='needs pip install "transformers[serving]"')
@pytest.mark.skipif(shutil.which("curl") is None, reason="needs curl")
@pytest.mark.slow
def test_transformers_serve(place: Path, merged: Path, labels: list[str]) -> None:
    command = block("bash", "transformers serve").splitlines()[1]
    request = block("bash", "curl -s").replace('"max_tokens": 5', '"max_tokens": 12')
    with served(command, place) as port:
        for text, label in zip(TEXTS, labels, strict=True):
            asked = request.replace("127.0.0.1:8000", f"127.0.0.1:{port}").replace(TEXTS[0], text)
            done = subprocess.run(
                ["bash", "-c", asked], cwd=place, capture_output=True, check=True, timeout=120
            )
            answer = json.loads(done.stdout)
            assert answer["choices"][0]["text"].strip() == label


@pytest.mark.parametrize(("rank", "limit"), [(4, 8), (8, 8), (9, 16), (200, 256), (512, 512)])
def test_vllms_limit_is_one_that_the_page_lists(rank: int, limit: int) -> None:
    assert _vllm_rank(rank) == limit
    assert f" {limit}," in PAGE or f" {limit}." in PAGE


@contextmanager
def served(command: str, place: Path) -> Iterator[int]:
    """The page's server on a free port, until it answers."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = int(probe.getsockname()[1])
    words = shlex.split(command.replace("8000", str(port)))
    assert words[0] == "transformers"
    with (place / "server.log").open("w") as log:
        server = subprocess.Popen(
            [sys.executable, "-m", "transformers.cli.transformers", *words[1:]],
            cwd=place,
            stdout=log,
            stderr=subprocess.STDOUT,
        )
    try:
        deadline = time.monotonic() + 120
        while not answers(f"http://127.0.0.1:{port}/health"):
            assert server.poll() is None, (place / "server.log").read_text()
            assert time.monotonic() < deadline, "the server does not come up"
            time.sleep(0.5)
        yield port
    finally:
        server.terminate()
        server.wait(timeout=60)


def answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=5) as answer:
            return answer.status == 200
    except (urllib.error.URLError, ConnectionError, TimeoutError):
        return False
