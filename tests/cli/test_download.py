"""A model from a server that speaks the Hub's API, through the real client.

Run: python -m pytest tests/cli/test_download.py
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import huggingface_hub.constants
import huggingface_hub.file_download
import pytest

from lora_fsdp.cli.main import main
from tests.support.hub import COMMIT, NAME, FakeHub, serve

ROOT = Path(__file__).resolve().parents[2]
WEIGHTS = bytes(range(256)) * 4096  # 1 MiB
WANTED = {
    "config.json": b'{"model_type": "llama"}',
    "tokenizer.json": b"{}",
    "tokenizer_config.json": b"{}",
    "LICENSE": b"free",
    "model-00001-of-00002.safetensors": WEIGHTS,
    "model-00002-of-00002.safetensors": WEIGHTS[::-1],
    "model.safetensors.index.json": b"{}",
}
UNWANTED = {
    "pytorch_model.bin": b"pickle",
    "consolidated.safetensors": b"the same again",
    "modeling_odd.py": b"print('code')",
    "onnx/model.safetensors": b"another form",
    "training_log.txt": b"...",
}
SECOND = "model-00002-of-00002.safetensors"


@pytest.fixture
def hub(monkeypatch):
    # The tests' environment forbids the network; this server is not it.
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    # Of 10 MB: what is less than a chunk is lost when a connection breaks.
    monkeypatch.setattr(huggingface_hub.constants, "DOWNLOAD_CHUNK_SIZE", 65536)
    monkeypatch.setattr(huggingface_hub.file_download.time, "sleep", lambda _: None)
    with serve(FakeHub({**WANTED, **UNWANTED})) as running:
        yield running


def download(hub, folder, *more):
    words = ["download", NAME, "--output_dir", str(folder), "--endpoint", hub.address, *more]
    return main(words)


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


class TestFiles:
    @pytest.mark.parametrize("source", ["hub", "modelscope"])
    def test_only_what_is_needed(self, hub, tmp_path, capsys, source):
        assert download(hub, tmp_path / "m", "--source", source) == 0
        assert contents(tmp_path / "m") == WANTED
        out = capsys.readouterr().out
        assert "verified 7 files" in out
        assert f"--model_name_or_path {tmp_path / 'm'}" in out

    def test_as_json(self, hub, tmp_path, capsys):
        assert download(hub, tmp_path / "m", "--json") == 0
        found = json.loads(capsys.readouterr().out)
        assert found["revision"] == COMMIT
        assert found["files"]["config.json"] == len(WANTED["config.json"])

    def test_pickles_alone_are_refused(self, hub, tmp_path, capsys):
        hub.files = {"config.json": b"{}", "pytorch_model.bin": b"pickle"}
        assert download(hub, tmp_path / "m") == 2
        assert "pickles" in capsys.readouterr().err
        assert hub.requests == []

    def test_again_costs_nothing(self, hub, tmp_path, capsys):
        assert download(hub, tmp_path / "m") == 0
        hub.requests.clear()
        assert download(hub, tmp_path / "m") == 0
        assert hub.requests == []
        assert capsys.readouterr().out.count("(was there)") == 7

    def test_a_file_that_was_changed_is_fetched_again(self, hub, tmp_path):
        assert download(hub, tmp_path / "m") == 0
        (tmp_path / "m" / "config.json").write_bytes(b'{"model_type": "LLAMA"}')  # as long
        (tmp_path / "m" / SECOND).write_bytes(WEIGHTS)  # as long
        hub.requests.clear()
        assert download(hub, tmp_path / "m") == 0
        assert contents(tmp_path / "m") == WANTED
        assert [name for name, _ in hub.requests] == ["config.json", SECOND]


class TestBrokenConnection:
    def test_goes_on_in_the_middle(self, hub, tmp_path):
        hub.cuts[SECOND] = [400_000]
        assert download(hub, tmp_path / "m") == 0
        assert contents(tmp_path / "m") == WANTED
        first, second = [asked for name, asked in hub.requests if name == SECOND]
        assert first is None
        assert 0 < int(second.removeprefix("bytes=").rstrip("-")) <= 400_000

    def test_a_later_call_goes_on_where_the_connection_broke_off_for_good(
        self, hub, tmp_path, capsys
    ):
        hub.cuts[SECOND] = [400_000, *[0] * 30]
        assert download(hub, tmp_path / "m") == 4
        error = capsys.readouterr().err.strip().splitlines()[-1]
        assert "run the same command" in error
        assert not (tmp_path / "m" / SECOND).exists()
        hub.cuts.clear()
        hub.requests.clear()
        assert download(hub, tmp_path / "m") == 0
        assert contents(tmp_path / "m") == WANTED
        [(name, asked)] = hub.requests
        assert name == SECOND
        assert int(asked.removeprefix("bytes=").rstrip("-")) > 0

    def test_damaged_on_the_way(self, hub, tmp_path, capsys):
        hub.sent_as[SECOND] = WEIGHTS
        assert download(hub, tmp_path / "m") == 4
        assert "damaged" in capsys.readouterr().err
        assert not (tmp_path / "m" / SECOND).exists()
        assert not list((tmp_path / "m").glob(".*.part"))


class TestRefusals:
    @pytest.mark.parametrize(
        ("status", "code", "words"),
        [
            ((403, "GatedRepo"), 2, "gated"),
            ((401, "GatedRepo"), 2, "gated"),
            ((401, "RepoNotFound"), 2, "private"),
            ((404, "RepoNotFound"), 2, "has no model"),
            ((503, ""), 4, "answered 503"),
        ],
    )
    def test_of_the_server(self, hub, tmp_path, capsys, status, code, words):
        hub.status = status
        assert download(hub, tmp_path / "m") == code
        error = capsys.readouterr().err
        assert words in error
        assert len(error.strip().splitlines()) == 1

    def test_no_such_revision(self, hub, tmp_path, capsys):
        assert download(hub, tmp_path / "m", "--revision", "v9") == 2
        assert "no revision 'v9'" in capsys.readouterr().err

    @pytest.mark.parametrize("source", ["hub", "modelscope"])
    def test_nobody_there(self, hub, tmp_path, capsys, source):
        hub.address = "http://127.0.0.1:9"
        assert download(hub, tmp_path / "m", "--source", source) == 4
        error = capsys.readouterr().err
        assert "cannot be reached" in error
        assert "--endpoint" in error
        assert len(error.strip().splitlines()) == 1

    def test_network_forbidden(self, hub, tmp_path, capsys, monkeypatch):
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
        assert download(hub, tmp_path / "m") == 4
        assert "HF_HUB_OFFLINE" in capsys.readouterr().err

    def test_no_room(self, hub, tmp_path, capsys):
        hub.announced[SECOND] = 10**16
        assert download(hub, tmp_path / "m") == 2
        assert "10000000.00 GB are to be downloaded" in capsys.readouterr().err
        assert hub.requests == []

    def test_no_model_named(self, capsys):
        assert main(["download"]) == 2
        assert main(["download", "no spaces/allowed here"]) == 2
        assert "owner/model" in capsys.readouterr().err


def test_endpoint_from_the_environment(hub, tmp_path):
    """Read before the client reads it, which is when Python starts."""
    environment = {key: value for key, value in os.environ.items() if key != "HF_HUB_OFFLINE"}
    done = subprocess.run(
        [sys.executable, "-m", "lora_fsdp", "download", NAME, "--output_dir", tmp_path / "m"],
        env={**environment, "HF_ENDPOINT": hub.address, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert contents(tmp_path / "m") == WANTED
    assert "\r" not in done.stderr  # no bars without a terminal
