"""The GPU check, in its small form on the CPU: what it finds, what it says of a part that is cut, its exit code."""

from __future__ import annotations

import copy
import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from sentcompress.testing import tiny_sentence_lm

TOOL = Path(__file__).resolve().parents[1] / "tools" / "measure" / "gpu_check.py"


def check(*words: str, folder: Path) -> tuple[subprocess.CompletedProcess[str], list[dict[str, Any]]]:
    out = folder / "found.json"
    command = [sys.executable, str(TOOL), "--device", "cpu", "--small", "--out", str(out), *words]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=850, check=False)
    return done, json.loads(out.read_text())["parts"]


@pytest.mark.slow
def test_the_small_form_runs_whole(tmp_path):
    done, parts = check(folder=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    names = ["environment", "fsdp", "causality", "greedy", "offloaded", "speed", "tests"]
    assert [part["part"] for part in parts] == names
    assert all(part["ok"] and part["rows"] for part in parts)
    assert all(name in done.stdout for name in names)


@pytest.mark.slow
def test_a_part_that_is_cut_is_named_and_the_others_go_on(tmp_path):
    done, parts = check("--parts", "causality", "environment", "--seconds", "0.5", folder=tmp_path)
    assert done.returncode == 1
    assert [part["part"] for part in parts] == ["causality", "environment"]
    assert all("stopped after" in part["reason"] for part in parts)
    assert "FAILED: stopped after" in " ".join(done.stdout.split())


def test_only_a_tie_excuses_another_token():
    """A tie is two tokens whose order bf16 cannot know; a token that is far from the best is another one."""
    spec = importlib.util.spec_from_file_location("gpu_check", TOOL)
    tool = importlib.util.module_from_spec(spec)
    sys.modules["gpu_check"] = tool
    spec.loader.exec_module(tool)
    exact = tiny_sentence_lm()
    prompt, expected = [[5, 6, 7], [8, 9]], [[11, 12, 13], [14]]
    model = copy.deepcopy(exact).to(torch.bfloat16)
    assert tool.compared(model, exact, [prompt], [expected], [expected]) == (1, 0, 0)
    other = [[11, 12, 15], [14]]
    assert tool.compared(model, exact, [prompt], [expected], [other]) == (0, 0, 1)
    assert tool.compared(model, exact, [prompt], [expected], [[[11, 12, 13]]]) == (0, 0, 1)
    with torch.no_grad():  # both tokens get the same logits but for a thousandth
        exact.vae.output_weight[15] = exact.vae.output_weight[13] * 1.001
    model = copy.deepcopy(exact).to(torch.bfloat16)
    assert tool.compared(model, exact, [prompt], [expected], [other]) == (0, 1, 0)
