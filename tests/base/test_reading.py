"""Weights read ahead, and by several threads: the same bits.

Run: python -m pytest tests/base/test_reading.py
"""

import json
import os
import threading

import pytest
import torch
from safetensors.torch import save_file

from lora_fsdp.arguments import ModelArguments
from lora_fsdp.base.loading import load_base
from lora_fsdp.base.reading import ahead, pieces
from lora_fsdp.base.reading.ahead import READ_AHEAD, read_ahead, read_ahead_once
from lora_fsdp.base.reading.pieces import Piece, pieces_of, read_pieces
from lora_fsdp.base.stored_weights import BaseWeights
from lora_fsdp.base.streaming import load_on_device, open_base
from lora_fsdp.errors import ModelNotFoundError
from tests.support.tiny import tiny_model

CPU = torch.device("cpu")


@pytest.fixture
def several_threads(monkeypatch):
    """As on a machine with cores to spare, and pieces of a few rows; the threads that copied."""
    monkeypatch.setattr(pieces, "PIECE_BYTES", 2000)
    monkeypatch.setattr(pieces, "_threads", lambda size, ranks_here: 4)
    used = set()
    copy = pieces._Copy.__call__

    def noted(self, piece):
        used.add(threading.get_ident())
        copy(self, piece)

    monkeypatch.setattr(pieces._Copy, "__call__", noted)
    return used


class TestPieces:
    @pytest.mark.parametrize("shape", [(7,), (1,), (50, 3), (3, 40, 5), (1, 9000)])
    @pytest.mark.parametrize("own", ["all", "rows", "columns"])
    def test_every_number_once(self, shape, own, several_threads):
        stored = torch.arange(torch.Size(shape).numel(), dtype=torch.float32).view(shape)
        part = [slice(0, side) for side in shape]
        if own == "rows":
            part[0] = slice(shape[0] // 3, shape[0])
        if own == "columns" and len(shape) > 1:
            part[1] = slice(1, shape[1])
        target = torch.full_like(stored[tuple(part)], -1, dtype=torch.bfloat16)
        found = [*pieces_of(target, tuple(part), lambda: stored.__getitem__)]
        read_pieces(found, ranks_here=1)
        assert torch.equal(target, stored[tuple(part)].bfloat16())
        assert all(one.target.nbytes <= max(2000, target[:1].nbytes) for one in found)

    def test_what_a_thread_raises(self, several_threads):
        """Is raised, and the threads are gone."""

        def fail():
            raise ModelNotFoundError("the file is gone")

        before = threading.active_count()
        wanted = [Piece(torch.empty(1), lambda: torch.zeros(1)) for _ in range(9)]
        with pytest.raises(ModelNotFoundError, match="the file is gone"):
            read_pieces([*wanted, Piece(torch.empty(1), fail), *wanted], ranks_here=1)
        assert threading.active_count() == before

    def test_threads_that_a_rank_may_have(self, monkeypatch):
        monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(32), raising=False)
        monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
        assert pieces._threads(10**11, ranks_here=1) == 8
        assert pieces._threads(10**11, ranks_here=8) == 4
        assert pieces._threads(10**7, ranks_here=1) == 1  # a small model's
        monkeypatch.setattr(torch, "get_num_threads", lambda: 32)
        assert pieces._threads(10**11, ranks_here=1) == 1


@pytest.mark.parametrize("kind", ["llama-tied", "gpt2", "qwen3"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_model_read_by_several_threads(kind, dtype, tmp_path, several_threads):
    tiny_model(kind).save_pretrained(tmp_path, max_shard_size="50KB")
    asked = ModelArguments(str(tmp_path), dtype=dtype)
    found = load_on_device(asked, device=CPU)
    assert len(several_threads) > 1
    expected = dict(load_base(asked, device=CPU).named_parameters())
    for name, parameter in found.named_parameters():
        assert torch.equal(parameter, expected.pop(name)), name
    assert not expected


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_tensor_on_its_way_to_be_packed(dtype, tmp_path, several_threads):
    """Has the dtype of its file, whatever the model computes in."""
    model = tiny_model(dtype=dtype)
    model.save_pretrained(tmp_path)
    stored = open_base(ModelArguments(str(tmp_path), dtype="bfloat16"), device=CPU)
    name = "model.layers.0.mlp.up_proj.weight"
    whole = stored._read_whole(name, device=torch.device("meta"))
    assert (whole.dtype, whole.shape) == (dtype, model.get_parameter(name).shape)
    target = torch.empty_like(whole, device=CPU)
    read_pieces([*stored._pieces(target, name)], ranks_here=1)
    assert torch.equal(target, model.get_parameter(name))


def test_each_thread_has_its_own_file(tmp_path):
    """And maps no more of it than its share."""
    tensors = {f"t{place}": torch.full((300, 40), float(place)) for place in range(4)}
    for name, tensor in tensors.items():
        save_file({name: tensor}, tmp_path / f"{name}.safetensors")
    index = {"weight_map": {name: f"{name}.safetensors" for name in tensors}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    weights, opened = BaseWeights(tmp_path), {}

    def read(name):
        assert torch.equal(weights.reader(name)((slice(0, 300),)), tensors[name])
        opened[name] = (weights._opened.name, weights._opened.mapped, weights._opened.at_most)

    threads = [threading.Thread(target=read, args=(name,)) for name in tensors]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert opened == {n: (f"{n}.safetensors", t.nbytes, 32_000_000) for n, t in tensors.items()}
    assert weights._opened.at_most == 256_000_000


class TestAhead:
    @pytest.fixture
    def read(self, monkeypatch, tmp_path):
        """What of a folder's files was read, and of what the page cache is said to have nothing."""
        for place, size in enumerate((50, 9, 0)):
            (tmp_path / f"model-{place}.safetensors").write_bytes(bytes(size))
        (tmp_path / "other.bin").write_bytes(b"no")
        monkeypatch.setattr(ahead, "_CHUNK", 20)
        monkeypatch.setattr(ahead, "_is_cached", lambda *_: False)
        found, preadv = [], os.preadv

        def noted(descriptor, buffers, offset):
            count = preadv(descriptor, buffers, offset)
            file = os.path.basename(os.readlink(f"/proc/self/fd/{descriptor}"))
            found.append((file, offset, count))
            return count

        monkeypatch.setattr(os, "preadv", noted)
        return found

    def test_every_byte_once(self, read, tmp_path):
        for thread in read_ahead(str(tmp_path)):
            thread.join()
        first = [("model-0.safetensors", offset, 20) for offset in (0, 20)]
        rest = [("model-0.safetensors", 40, 10), ("model-1.safetensors", 0, 9)]
        assert sorted(read) == first + rest

    def test_no_more_than_memory_has_room_for(self, read, tmp_path, monkeypatch):
        monkeypatch.setattr(ahead, "_SHARE_OF_MEMORY", 1e-12)
        for thread in read_ahead(str(tmp_path)):
            thread.join()
        assert read == []

    @pytest.mark.parametrize("model", ["no/such-model", "not a name", "/no/such/folder"])
    def test_a_model_that_is_not_there(self, read, model, monkeypatch):
        """Is told by whoever opens it."""
        monkeypatch.setenv("HF_HUB_OFFLINE", "1")
        for thread in read_ahead(model):
            thread.join()
        assert read == []

    def test_once_a_host(self, monkeypatch):
        begun = []
        monkeypatch.setattr(ahead, "read_ahead", lambda model, revision: begun.append(model))
        monkeypatch.delenv(READ_AHEAD, raising=False)
        for local_rank in ("0", "1"):
            monkeypatch.setenv("LOCAL_RANK", local_rank)
            read_ahead_once("one", revision="main")
        monkeypatch.setenv("LOCAL_RANK", "0")
        read_ahead_once("", revision="main")
        monkeypatch.setenv(READ_AHEAD, "1")  # its launcher has begun
        read_ahead_once("two", revision="main")
        assert begun == ["one"]

    def test_what_is_cached_is_left_alone(self, tmp_path):
        file = tmp_path / "model.safetensors"
        file.write_bytes(bytes(100_000))
        with file.open("rb") as opened:
            opened.read()
            assert ahead._is_cached(opened.fileno(), 0, 100_000)
