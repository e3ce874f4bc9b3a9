"""docs/rented-gpu.md, as far as no GPU is needed. Run: python -m pytest tests/test_rented_gpu.py"""

from __future__ import annotations

import contextlib
import hashlib
import io
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

from lora_fsdp import (
    DataArguments,
    FineTuningArguments,
    LoraArguments,
    ModelArguments,
    finetune,
)
from lora_fsdp.cli.main import main
from tests.support.tiny import toy_table

ROOT = Path(__file__).resolve().parents[1]
PAGE = (ROOT / "docs" / "rented-gpu.md").read_text(encoding="utf-8")
RUN = Path("runs") / "deepseek-7b-sentiment"


def commands(beginning: str) -> list[str]:
    """The page's shell commands that begin so, with continued lines joined."""
    lines = "\n".join(re.findall(r"^```bash\n(.*?)^```$", PAGE, flags=re.MULTILINE | re.DOTALL))
    joined = lines.replace("\\\n", " ").splitlines()
    return [line for line in joined if line.startswith(beginning)]


def run_in(place: Path, command: str) -> str:
    """What a command of the page prints; `lora-fsdp` runs in this process."""
    if command.startswith("lora-fsdp "):
        with contextlib.chdir(place), contextlib.redirect_stdout(io.StringIO()) as printed:
            assert main(shlex.split(command, comments=True)[1:]) == 0
        return printed.getvalue()
    done = subprocess.run(
        ["bash", "-c", command], cwd=place, capture_output=True, text=True, check=False, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def place(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the page's table and a toy run in the place of its run."""
    folder = tmp_path_factory.mktemp("rented")
    rows = toy_table(60).rename(columns={"label": "sentiment"})
    rows.to_csv(folder / "tweets.csv", index=False)
    finetune(
        model_args=ModelArguments(model_name_or_path=str(model_folder)),
        lora_args=LoraArguments(),
        data_args=DataArguments(
            task="sentiment", data_file=str(folder / "tweets.csv"), max_length=256, eval_size=12
        ),
        training_args=FineTuningArguments(
            output_dir=str(folder / RUN),
            max_steps=4,
            save_strategy="steps",
            save_steps=2,
            disable_tqdm=True,
        ),
    )
    return folder


def test_before_renting(place: Path) -> None:
    check, *_ = commands("lora-fsdp tasks check")
    assert "sentiment" in run_in(place, check)
    plan, *_ = commands("lora-fsdp plan --model_name_or_path 7B")
    assert "costs" in run_in(place, plan)


@pytest.mark.skipif(shutil.which("nvidia-smi") is None, reason="needs a GPU's driver")
def test_the_driver_answers(tmp_path: Path) -> None:
    [look] = commands("nvidia-smi")
    assert "CUDA Version" in run_in(tmp_path, look)


def test_the_log_is_watched_while_it_grows(tmp_path: Path) -> None:
    [watch] = commands("tail -f")
    log = tmp_path / "train.log"
    log.write_text("step 1\n")
    with subprocess.Popen(
        ["timeout", "60", *watch.split()], cwd=tmp_path, stdout=subprocess.PIPE, text=True
    ) as shown:
        assert shown.stdout is not None
        try:
            assert shown.stdout.readline() == "step 1\n"
            with log.open("a") as file:
                file.write("step 2\n")
            assert shown.stdout.readline() == "step 2\n"
        finally:
            shown.terminate()


def test_what_is_kept_is_what_the_page_lists_and_all_of_it(place: Path, tmp_path: Path) -> None:
    [pack] = commands("tar -czf adapter.tar.gz")
    run_in(place, pack)
    [compare] = commands("sha256sum")
    digest = hashlib.sha256((place / "adapter.tar.gz").read_bytes()).hexdigest()
    assert run_in(place, compare).split() == [digest, "adapter.tar.gz"]
    names = run_in(place, "tar -tzf adapter.tar.gz").split()
    kept = {Path(name).relative_to(RUN.name).parts[0] for name in names if name != f"{RUN.name}/"}
    table, _, _ = PAGE.partition("What is in it")[2].partition("hold texts of your rows")
    first_cells = re.findall(r"^\| (`.*?) \|", table, flags=re.MULTILINE)
    listed = {name for cell in first_cells for name in re.findall(r"`([\w.]+)/?`", cell)}
    assert kept == listed - {"chat_template.jinja"}  # the toy model has none
    # At home: unpacked by the page's commands, verified and asked.
    shutil.copy(place / "adapter.tar.gz", tmp_path)
    [folder] = commands("mkdir -p runs")
    [unpack] = commands("tar -xzf adapter.tar.gz")
    run_in(tmp_path, f"{folder} && {unpack}")
    [verify, *_] = commands("lora-fsdp verify")
    assert "0 failed" in run_in(tmp_path, verify)
    [predict] = commands("lora-fsdp predict")
    assert "predicted_label" in run_in(tmp_path, predict)


def test_the_newest_checkpoint_is_packed(place: Path) -> None:
    [newest] = commands("newest=")
    [pack] = commands("tar -czf checkpoint.tar.gz")
    run_in(place, f"{newest} && {pack}")
    names = run_in(place, "tar -tzf checkpoint.tar.gz").split()
    assert "tweets.csv" in names
    assert f"{RUN}/checkpoint-4/manifest.json" in names
    assert not [name for name in names if "checkpoint-2" in name]


def test_resuming_repeats_the_command(place: Path) -> None:
    """But for the option that makes it one, and the log that is added to."""
    [first, second] = commands("nohup lora-fsdp train")
    assert second.replace("--resume_from_checkpoint true >>", ">").split() == first.split()
