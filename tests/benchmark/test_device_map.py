"""A model sharded over devices: without a GPU these are CPU memory and disk, and the code is the same."""

from __future__ import annotations

import weakref
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM

from sentcompress.benchmark.measurements.memory import Memory
from sentcompress.benchmark.measurements.quality import Quality
from sentcompress.benchmark.measurements.speed import Speed
from sentcompress.benchmark.models import ModelFolder, Models
from sentcompress.benchmark.results import Results
from sentcompress.benchmark.runner import run_bench
from sentcompress.errors import InputError, StorageError
from sentcompress.modeling import device_map
from sentcompress.modeling.device_map import _assign, blocks_of, dispatch_blocks, memory_per_model
from sentcompress.modeling.saved_models import load_sentence_lm
from sentcompress.testing import tiny_opt

CPU = torch.device("cpu")


def size(module: torch.nn.Module) -> int:
    return sum(p.numel() * p.element_size() for p in {id(p): p for p in module.parameters()}.values())


def test_blocks_on_the_disk_compute_what_they_did(tmp_path):
    model, ids = tiny_opt().eval(), torch.randint(4, 90, (2, 7))
    blocks = blocks_of(model)
    with torch.no_grad():
        expected = model(ids).logits
        rest = size(model) - size(blocks)
        room = {"cpu": rest + 2.5 * size(blocks[0])}  # one of them for the offloaded block that computes
        devices = dispatch_blocks(model, blocks, room, tmp_path)
        assert devices == ["cpu", *["disk"] * (len(blocks) - 1)]
        assert next(blocks[-1].parameters()).device.type == "meta"
        assert torch.equal(model(ids).logits, expected)
        written = model.generate(ids, max_new_tokens=5, do_sample=False)
    assert torch.equal(written, tiny_opt().eval().generate(ids, max_new_tokens=5, do_sample=False))
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight


def test_what_is_free_now_holds_a_small_model(tmp_path):
    model = tiny_opt().eval()
    room = memory_per_model(CPU, None, model)
    assert dispatch_blocks(model, blocks_of(model), room, tmp_path) == ["cpu"] * len(blocks_of(model))
    assert not list(tmp_path.iterdir())


def scarce(model: torch.nn.Module, blocks: torch.nn.ModuleList, number: float) -> str:
    """Memory for so many of a model's three blocks, and as much for what it is compared with."""
    return f"bench.max_memory={{cpu: {2 * (size(model) - size(blocks) + int(number * size(blocks[0])))}}}"


def measure(run_folder: Path, out: Path, names: list[str], *settings: str) -> Results:
    folder = ModelFolder(run_folder)
    fast = ["bench.repeats=1", "bench.break_even=false", "bench.batch_sizes=[2]", "bench.text_prompts=1"]
    short = ["bench.prompt_tokens=8", "bench.text_new_tokens=8"]
    return run_bench(names, folder, folder.recipe([*fast, *short, *settings]), out, quiet=True)


@pytest.mark.slow
def test_all_is_measured_as_on_one_device(run_folder, tmp_path):
    names = ["quality", "text", "speed", "memory"]
    whole = measure(run_folder, tmp_path / "whole", names)
    model = load_sentence_lm(run_folder / "graft")
    # Room for one of the blocks is for the offloaded one that computes.
    memory = scarce(model, model.backbone.blocks, 2.5)
    sharded = measure(run_folder, tmp_path / "sharded", names, "bench.device_map=auto", memory)
    assert [(s.system, s.bits_per_byte) for s in Quality.of(sharded)] == [
        (s.system, s.bits_per_byte) for s in Quality.of(whole)
    ]
    assert {run.system for run in Speed.of(sharded).runs} == {run.system for run in Speed.of(whole).runs}
    assert [m.cache_bytes_per_token for m in Memory.of(sharded)] == [
        m.cache_bytes_per_token for m in Memory.of(whole)
    ]
    devices = {(row.part, row.system): row.honesty.device for row in sharded.rows}
    assert [(row.part, row.system) for row in whole.rows] == list(devices)
    for about, device in devices.items():
        modelless = about[1] in ("unigram", "human")
        assert ("blocks by device: " in device) != modelless, about
    assert "blocks by device: cpu 1, disk 2" in devices["memory", "sentence model"]


def test_a_model_that_is_not_compared_any_more_is_let_go(run_folder, tmp_path):
    folder = ModelFolder(run_folder)
    baseline = AutoModelForCausalLM.from_pretrained(run_folder / "baseline")
    memory = scarce(baseline, blocks_of(baseline), 1.5)
    models = Models(folder.recipe(["bench.device_map=auto", memory]), folder, tmp_path)
    gone = weakref.ref(models.baseline)
    assert "disk" in models.describe(gone())[1]
    assert len(list(tmp_path.glob("blocks-*/*"))) == 1
    backbone = models.backbone
    assert gone() is None
    assert len(list(tmp_path.glob("blocks-*/*"))) == 1
    assert models.backbone is backbone


def test_half_of_each_device_that_is_named(monkeypatch):
    model = tiny_opt()
    free = {0: 100.0, 1: 60.0, "cpu": 40.0}
    monkeypatch.setattr(device_map, "get_max_memory", lambda asked=None: asked or dict(free))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    second = torch.device("cuda", 1)
    assert memory_per_model(second, {0: 80, 1: 20}, model) == {1: 10, 0: 40, "cpu": 0}
    assert memory_per_model(second, {0: 80}, model) == {1: 0, 0: 40, "cpu": 0}
    assert memory_per_model(second, None, model) == pytest.approx(
        {1: 27, 0: 45, "cpu": 0.45 * (40 + size(model))}
    )
    free.pop("cpu")
    assert memory_per_model(CPU, None, model)["cpu"] > 2**20


def test_the_disk_must_hold_what_no_memory_does(monkeypatch, tmp_path):
    model = tiny_opt()
    blocks = blocks_of(model)
    monkeypatch.setattr(device_map.shutil, "disk_usage", lambda _: SimpleNamespace(free=10))
    with pytest.raises(StorageError, match="must go to disk, which has 10 bytes free"):
        dispatch_blocks(model, blocks, {"cpu": size(model) - size(blocks) + size(blocks[0])}, tmp_path)
    with pytest.raises(InputError, match="an offloaded block takes"):
        dispatch_blocks(model, blocks, {"cpu": size(model) - size(blocks)}, tmp_path)


def test_rows_tell_the_dtype_of_their_own_model(run_folder, tmp_path):
    asked = ["bench.device_map=auto", "bench.dtype=bf16"]
    rows = measure(run_folder, tmp_path, ["reconstruct", "speed", "data"], *asked).rows
    dtypes = {row.part: row.honesty.dtype for row in rows}
    assert dtypes == {"reconstruct": "float32", "speed": "bfloat16", "data": "float32"}
    assert {row.part for row in rows if "blocks by device" in row.honesty.device} == {"speed"}


def test_an_llm_without_memory_is_an_error_not_something_missing(run_folder, tmp_path):
    folder = ModelFolder(run_folder)
    recipe = folder.recipe(["bench.device_map=auto", "bench.max_memory={cpu: 10KB}"])
    with pytest.raises(InputError, match=r"bench\.max_memory"):
        Models(recipe, folder, tmp_path).backbone  # noqa: B018


def test_blocks_are_shared_out_evenly_and_in_order():
    def shares(**room):
        return _assign([10] * 6, {int(k[1:]) if k[1:].isdigit() else k: v for k, v in room.items()})

    assert shares(d0=100.0, d1=100.0, cpu=100.0) == [0, 0, 0, 1, 1, 1]
    assert shares(d0=15.0, d1=100.0, cpu=100.0) == [0, 1, 1, 1, 1, 1]
    # Blocks in the computer's memory come to the first device when it is their turn.
    assert shares(d0=35.0, d1=15.0, cpu=20.0) == [0, 0, 1, "cpu", "cpu", "disk"]
    assert shares(d0=5.0, d1=15.0, cpu=90.0) == [1, *["cpu"] * 5]
    assert shares(cpu=35.0) == ["cpu"] * 2 + ["disk"] * 4
    assert shares(cpu=60.0) == ["cpu"] * 6
    assert shares(cpu=0.0) == ["disk"] * 6


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["bench.max_memory={cpu: much}"], "bench.max_memory"),
        (
            ["bench.max_memory={cpu: 10KB}"],
            "device 'cpu' has 5,000 bytes for each of two models, but everything outside the backbone's blocks",
        ),
        (["bench.max_memory={99: 1GB, cpu: 1GB}", "bench.device=cpu"], "there is no device 99"),
        (["bench.quantize=[decoder]"], "8-bit weights cannot be sharded"),
    ],
)
def test_what_cannot_be_sharded_is_refused(run_folder, tmp_path, settings, message):
    folder = ModelFolder(run_folder)
    with pytest.raises(InputError, match=message):
        run_bench(
            ["quality"], folder, folder.recipe(["bench.device_map=auto", *settings]), tmp_path, quiet=True
        )
