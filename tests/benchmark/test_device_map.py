"""A model spread over devices: without a GPU these are the computer's memory and its disk, and the same code."""

from __future__ import annotations

import pytest
import torch

from sentcompress.benchmark.parts import Folder
from sentcompress.benchmark.runner import run_bench
from sentcompress.errors import InputError
from sentcompress.modeling.device_map import _assign, blocks_of, spread_blocks
from sentcompress.modeling.loading import load_sentence_lm
from sentcompress.testing import tiny_opt


def size(module: torch.nn.Module) -> int:
    return sum(p.numel() * p.element_size() for p in {id(p): p for p in module.parameters()}.values())


def test_blocks_on_the_disk_compute_what_they_did(tmp_path):
    model, ids = tiny_opt().eval(), torch.randint(4, 90, (2, 7))
    blocks = blocks_of(model)
    with torch.no_grad():
        expected = model(ids).logits
        rest = size(model) - size(blocks)
        room = {"cpu": rest + int(1.5 * size(blocks[0]))}
        places = spread_blocks(model, blocks, torch.device("cpu"), tmp_path, room)
        assert places == ["cpu", *["disk"] * (len(blocks) - 1)]
        assert next(blocks[-1].parameters()).device.type == "meta"
        assert torch.equal(model(ids).logits, expected)
        written = model.generate(ids, max_new_tokens=5, do_sample=False)
    assert torch.equal(written, tiny_opt().eval().generate(ids, max_new_tokens=5, do_sample=False))
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight


def test_all_is_measured_as_on_one_device(run_folder, tmp_path):
    parts, place = ["quality", "speed", "memory"], Folder(run_folder)
    overrides = ["bench.repeats=1", "bench.break_even=false", "bench.batch_sizes=[2]"]
    whole = run_bench(parts, place, place.recipe(overrides), tmp_path / "whole", quiet=True)
    model = load_sentence_lm(run_folder / "graft")
    blocks = model.backbone.blocks
    room = f"bench.max_memory={{cpu: {size(model) - size(blocks) + int(1.5 * size(blocks[0]))}}}"
    recipe = place.recipe([*overrides, "bench.device_map=auto", room])
    spread = run_bench(parts, place, recipe, tmp_path / "spread", quiet=True)
    assert [(s.system, s.bits_per_byte) for s in spread.quality] == [
        (s.system, s.bits_per_byte) for s in whole.quality
    ]
    assert {run.system for run in spread.speed.runs} == {run.system for run in whole.speed.runs}
    assert all("blocks by device: " in row.honesty.device for row in spread.rows if row.part == "speed")
    assert "blocks by device: cpu 1, disk 2" in spread.rows[-1].honesty.device


def test_blocks_are_shared_out_evenly_and_in_order():
    def shares(*room):
        return _assign([10] * 6, room)

    assert shares((0, 100.0), (1, 100.0), ("cpu", 100.0)) == [0, 0, 0, 1, 1, 1]
    assert shares((0, 15.0), (1, 100.0), ("cpu", 100.0)) == [0, 1, 1, 1, 1, 1]
    assert shares((0, 25.0), (1, 15.0), ("cpu", 20.0)) == [0, 0, 1, "cpu", "cpu", "disk"]
    assert shares(("cpu", 0.0)) == ["disk"] * 6


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["bench.max_memory={cpu: much}"], "bench.max_memory"),
        (
            ["bench.max_memory={cpu: 10KB}"],
            "device 'cpu' has 10,000 bytes, what is not in the backbone's blocks",
        ),
        (["bench.quantize=[decoder]"], "8 bits cannot be spread"),
    ],
)
def test_what_cannot_be_spread_is_refused(run_folder, tmp_path, settings, message):
    place = Folder(run_folder)
    with pytest.raises(InputError, match=message):
        run_bench(
            ["quality"], place, place.recipe(["bench.device_map=auto", *settings]), tmp_path, quiet=True
        )
