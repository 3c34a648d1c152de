"""What of the backbone learns, and that adapters are folded into a plain model."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from sentcompress.errors import InputError
from sentcompress.modeling import SentenceLM
from sentcompress.modeling.device_map import blocks_of
from sentcompress.recipe import BaselineSettings, GraftSettings
from sentcompress.testing import tiny_opt, tiny_passages, tiny_sentence_lm
from sentcompress.training.tuning import apply_tune, merged_state


def tuned(**settings):
    model = tiny_sentence_lm()
    apply_tune(model.backbone, model.backbone.blocks, GraftSettings(**settings), "graft")
    return model


@pytest.mark.parametrize(
    ("settings", "learns"),
    [
        ({"tune": "full"}, lambda _: True),
        ({"tune": "frozen"}, lambda _: False),
        ({"tune": "last-n", "last_n": 1}, lambda name: ".layers.2." in name),
        ({"tune": "lora"}, lambda name: ".lora_" in name),
    ],
    ids=lambda value: value["tune"] if isinstance(value, dict) else "",
)
def test_only_the_chosen_weights_train(settings, learns):
    model = tuned(**settings)
    backbone = {name: p for name, p in model.named_parameters() if name.startswith("backbone.")}
    assert {name for name, p in backbone.items() if p.requires_grad} == set(filter(learns, backbone))
    assert all(p.requires_grad for name, p in model.named_parameters() if not name.startswith("backbone."))


def test_adapters_are_merged_and_the_folder_is_an_ordinary_model(tmp_path):
    model = tuned(tune="lora", lora={"rank": 4})
    for name, parameter in model.named_parameters():
        if ".lora_B" in name:  # they begin at zero, which would prove nothing
            torch.nn.init.normal_(parameter, std=0.1)
    model.eval()
    model.save_pretrained(tmp_path, state_dict=merged_state(model))
    plain = SentenceLM.from_pretrained(tmp_path).eval()
    assert not any("lora" in name for name in plain.state_dict())
    batch = tiny_passages()
    torch.testing.assert_close(plain(**batch).loss, model(**batch).loss, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(plain(**batch).loss, tiny_sentence_lm()(**batch).loss, atol=1e-3)


@pytest.mark.parametrize(
    "settings", [{"tune": "last-n", "last_n": 1}, {"tune": "lora"}], ids=lambda s: s["tune"]
)
def test_the_baseline_is_tuned_the_same_way_and_saved_as_an_ordinary_model(tmp_path, settings):
    lm = tiny_opt()
    apply_tune(lm, blocks_of(lm), BaselineSettings(**settings), "baseline")
    learns = [name for name, p in lm.named_parameters() if p.requires_grad]
    assert learns
    assert all(".layers.2." in name or ".lora_" in name for name in learns)
    for name, parameter in lm.named_parameters():
        if ".lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    lm.save_pretrained(tmp_path, state_dict=merged_state(lm))
    ids = torch.arange(5)[None]
    plain = AutoModelForCausalLM.from_pretrained(tmp_path)
    torch.testing.assert_close(plain(ids).logits, lm(ids).logits, atol=1e-4, rtol=1e-4)


def test_wrong_settings_are_refused():
    with pytest.raises(InputError, match=r"graft.last_n: 9.*3 blocks"):
        tuned(tune="last-n", last_n=9)
    with pytest.raises(InputError, match=r"target_modules"):
        tuned(tune="lora", lora={"target_modules": ["no_such_layer"]})
