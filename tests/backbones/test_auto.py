"""``auto``: what it takes of architectures that no adapter is made for, and what it refuses, with the reason."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers
import yaml
from packaging.version import Version
from transformers import AutoConfig, AutoModelForCausalLM

from sentcompress.errors import InputError
from sentcompress.modeling import SentenceLM
from sentcompress.modeling.grafting import graft, wrap_backbone
from sentcompress.recipe import BackboneSpec, Recipe
from sentcompress.registry import get_registry
from sentcompress.testing import tiny_passages, tiny_vae

ROOT = Path(__file__).resolve().parents[2]
TABLE = yaml.safe_load((ROOT / "tools" / "docs" / "auto_architectures.yaml").read_text(encoding="utf-8"))
SPEC = BackboneSpec(name="auto", model="tiny")


def tiny(model_type: str, settings: dict):
    torch.manual_seed(0)
    return AutoConfig.for_model(model_type, **{**TABLE["common"], **settings})


@pytest.mark.parametrize("model_type", TABLE["passes"])
def test_what_proves_right_is_grafted_saved_and_loaded(model_type, tmp_path):
    lm = AutoModelForCausalLM.from_config(tiny(model_type, TABLE["passes"][model_type])).eval()
    if Version(transformers.__version__) < Version(TABLE["since"].get(model_type, "0")):
        with pytest.raises(InputError, match="cannot be grafted"):
            wrap_backbone(SPEC, lm)
        return
    backbone = wrap_backbone(SPEC, lm)
    vae = tiny_vae(500, hidden_size=backbone.hidden_size)
    model = graft(Recipe(name="x", backbone=SPEC), vae, backbone).eval()
    model.save_pretrained(tmp_path)
    batch = tiny_passages(500)
    with torch.no_grad():
        expected = model(**batch).hidden_states
        assert torch.isfinite(expected).all()
        loaded = SentenceLM.from_pretrained(tmp_path).eval()
        assert torch.equal(loaded(**batch).hidden_states, expected)


@pytest.mark.parametrize("model_type", TABLE["refused"])
def test_what_does_not_is_refused_with_the_reason(model_type):
    case = TABLE["refused"][model_type]
    config = tiny(model_type, case["config"])

    def wrap():
        get_registry().get("backbone", "auto").check_config(config)
        return wrap_backbone(SPEC, AutoModelForCausalLM.from_config(config).eval())

    with pytest.raises(InputError, match=case["says"]):
        wrap()


def test_the_table_has_ten_more():
    assert len(TABLE["passes"]) >= 10
