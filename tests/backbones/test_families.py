"""Every built-in adapter against the library's own forward, on each of its tiny configurations."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from sentcompress.contracts.causal_lm import UNLIMITED_POSITIONS, position_limit
from sentcompress.errors import InputError
from sentcompress.modeling.grafting import wrap_backbone
from sentcompress.recipe import BackboneSpec
from sentcompress.registry import get_registry
from sentcompress.testing import check_plugin

FAMILIES = [name for name in get_registry().names("backbone") if name != "auto"]


def cases():
    for name in FAMILIES:
        cls = get_registry().get("backbone", name)
        for number, shape in enumerate(cls.tiny_configs):
            settings = dict(shape)
            config = AutoConfig.for_model(settings.pop("model_type"), **settings)
            for attention in cls.attention_implementations(config):
                label = f"{name}-{config.model_type}-{number}-{attention}"
                yield pytest.param(name, config, attention, id=label)


@pytest.mark.parametrize("name", FAMILIES)
def test_the_kit_finds_nothing(name):
    check_plugin("backbone", name)


@pytest.mark.parametrize(("name", "config", "attention"), list(cases()))
@torch.no_grad()
def test_token_embeddings_give_the_librarys_own_hidden_states(name, config, attention):
    """In place of latents: with no padding, right and left padding, packed, and with a cache."""
    torch.manual_seed(0)
    lm = AutoModelForCausalLM.from_config(copy.deepcopy(config), attn_implementation=attention).eval()
    ids = torch.randint(4, 500, (3, 11))
    masks = {
        "none": torch.ones(3, 11, dtype=torch.long),
        "right": (torch.arange(11) < torch.tensor([11, 6, 9])[:, None]).long(),
        "left": (torch.arange(11) >= torch.tensor([0, 5, 2])[:, None]).long(),
    }
    positions = {side: (mask.cumsum(1) - 1).clamp_min(0) for side, mask in masks.items()}
    expected = {
        side: lm.base_model(
            input_ids=ids, attention_mask=mask, position_ids=positions[side], use_cache=False
        ).last_hidden_state
        for side, mask in masks.items()
    }
    alone = lm.base_model(input_ids=ids[:, 5:], use_cache=False).last_hidden_state

    backbone = wrap_backbone(BackboneSpec(name=name, model="tiny"), lm)
    embeddings = backbone.token_embeddings(ids)
    order = torch.arange(11)
    causal = order[None, :] <= order[:, None]

    def states(allowed, places, begin=0, end=11, **more):
        hidden, cache = backbone(embeddings[:, begin:end], allowed, places, **more)
        return backbone.project_out(hidden), cache

    for side, mask in masks.items():
        real = mask.bool()
        allowed = causal & real[:, None, :] | torch.eye(11, dtype=torch.bool)
        difference = (states(allowed[:, None], positions[side])[0] - expected[side])[real].abs().max()
        assert difference < 1e-5, (side, difference)

    passage = (order >= 5).long()
    packed = (causal & (passage[:, None] == passage[None, :])).expand(3, 1, -1, -1)
    difference = (states(packed, (order - 5 * passage).expand(3, -1))[0][:, 5:] - alone).abs().max()
    assert difference < 1e-5, ("packed", difference)

    cache, parts = None, []
    for begin, end in ((0, 4), (4, 5), (5, 11)):
        allowed = causal[begin:end, :end].expand(3, 1, -1, -1)
        part, cache = states(
            allowed, order[begin:end].expand(3, -1), begin, end, past_key_values=cache, use_cache=True
        )
        parts.append(part)
    assert (torch.cat(parts, 1) - expected["none"]).abs().max() < 1e-5


class TestALeakIsRefused:
    """An adapter that does not pass the mask on is found when the LLM is wrapped, before anything is trained."""

    def test_by_graft(self, monkeypatch):
        cls = get_registry().get("backbone", "llama")
        monkeypatch.setattr(cls, "_masks", lambda _, allowed, dtype: torch.zeros(allowed.shape, dtype=dtype))
        lm = AutoModelForCausalLM.from_config(
            AutoConfig.for_model(**cls.tiny_configs[0]), attn_implementation="eager"
        )
        with pytest.raises(
            InputError, match=r"(?s)cannot be grafted with the adapter 'llama'.*leaks the future"
        ):
            wrap_backbone(BackboneSpec(name="llama", model="tiny"), lm)


def test_soft_capping_is_never_computed_by_sdpa():
    cls = get_registry().get("backbone", "gemma")
    capped = AutoConfig.for_model("gemma2")
    assert cls.attention_implementations(capped) == ("eager",)
    assert cls.attention_implementations(AutoConfig.for_model("gemma")) == ("sdpa", "eager")
    shape = next(shape for shape in cls.tiny_configs if shape["model_type"] == "gemma2")
    bare = cls.from_config(AutoConfig.for_model(**shape))
    assert bare.config._attn_implementation == "eager"


def test_every_published_shape_has_an_alias_or_is_a_size_of_one():
    for name in FAMILIES:
        cls = get_registry().get("backbone", name)
        for hub, shape in cls.published_configs.items():
            assert shape["model_type"] in cls.model_types
            config = AutoConfig.for_model(**shape)
            assert config.hidden_size % config.num_attention_heads == 0 or config.head_dim, hub


@pytest.mark.parametrize(
    ("model_type", "field", "limit"),
    [
        ("opt", "max_position_embeddings", 77),
        ("gpt2", "n_positions", 77),
        ("mpt", "max_seq_len", 77),
        ("bloom", None, UNLIMITED_POSITIONS),
    ],
)
def test_the_position_limit_is_found_whatever_it_is_called(model_type, field, limit):
    config = AutoConfig.for_model(model_type, **({field: limit} if field else {}))
    assert position_limit(config) == limit
