"""The causality check: passes real models, catches every way of leaking we could think of."""

from __future__ import annotations

import pytest
import torch

from sentcompress.benchmark.causality_checks import attention_of, check_causality
from sentcompress.benchmark.measurements.causality import require_causal
from sentcompress.benchmark.scoring import score_sentence_model
from sentcompress.errors import CausalityError
from sentcompress.testing import OPT_TWINS, tiny_sentence_lm

ATTENTION_LATENTS = {"fusion": {"name": "attention", "options": {}}, "latents": 2}


@pytest.mark.parametrize("twin", OPT_TWINS)
def test_every_published_shape_passes_exactly(twin):
    report = check_causality(tiny_sentence_lm(**OPT_TWINS[twin]))
    assert report.passed, report.failures
    assert {check.attention for check in report.checks} == {"eager", "sdpa"}
    future = [check for check in report.checks if check.kind == "future"]
    assert len(future) == 12
    assert all(check.max_delta == 0.0 and check.tolerance == 0.0 and check.effect > 0 for check in future)
    require_causal(report)


@pytest.mark.parametrize("conditioning", ["cross-attention", "add", "prefix"])
def test_several_latents_and_every_conditioning_pass(conditioning):
    model = tiny_sentence_lm(vae={**ATTENTION_LATENTS, "conditioning": conditioning})
    assert check_causality(model).passed


@pytest.mark.parametrize("conditioning", ["cross-attention", "add", "prefix"])
@pytest.mark.parametrize("start", [True, False])
def test_a_decoder_that_sees_the_text_before_the_sentence_passes(conditioning, start):
    model = tiny_sentence_lm(
        vae={
            **ATTENTION_LATENTS,
            "conditioning": conditioning,
            "decoder_context": 9,
            "decoder_layers": 2,
            "unpack_size": 6,
        }
    )
    model.config.start_latent = start
    report = check_causality(model)
    assert report.passed, report.failures


def test_a_model_without_start_latent_and_with_few_positions_passes():
    model = tiny_sentence_lm(max_position_embeddings=9)
    model.config.start_latent = False
    assert check_causality(model).passed


class _Leak:
    """Puts itself before a backbone's forward."""

    def __init__(self, model):
        self.inner = model.backbone.forward
        model.backbone.forward = self

    def __call__(self, *, attention_mask, **inputs):
        return self.inner(attention_mask=attention_mask, **inputs)


class SeesEverything(_Leak):
    """As the reference implementation did: no mask at all."""

    def __call__(self, *, attention_mask, **inputs):
        return self.inner(attention_mask=torch.ones_like(attention_mask), **inputs)


class SeesOneAhead(_Leak):
    def __call__(self, *, attention_mask, **inputs):
        leaky = attention_mask.clone()
        if leaky.shape[2] == leaky.shape[3]:
            leaky[..., :-1, 1:] |= torch.eye(leaky.shape[2] - 1, dtype=torch.bool)
        return self.inner(attention_mask=leaky, **inputs)


class SeesOtherPassages(_Leak):
    """Causal, but packed passages and padding are seen."""

    def __call__(self, *, attention_mask, **inputs):
        rows, columns = attention_mask.shape[2:]
        causal = torch.ones(rows, columns, dtype=torch.bool).tril(columns - rows)
        return self.inner(attention_mask=causal.expand_as(attention_mask), **inputs)


class MixesRows(_Leak):
    def __call__(self, **inputs):
        states, cache = self.inner(**inputs)
        return states + 0.01 * states.mean(0, keepdim=True), cache


class WrongPositionsWithACache(_Leak):
    """Right in training, wrong when it decodes: positions begin anew."""

    def __call__(self, *, position_ids, past_key_values=None, **inputs):
        if past_key_values is not None and past_key_values.get_seq_length():
            position_ids = torch.zeros_like(position_ids)
        return self.inner(position_ids=position_ids, past_key_values=past_key_values, **inputs)


class SeesEverythingUnderSdpa(_Leak):
    def __init__(self, model):
        super().__init__(model)
        self.config = model.backbone.config

    def __call__(self, *, attention_mask, **inputs):
        if self.config._attn_implementation == "sdpa":
            attention_mask = torch.ones_like(attention_mask)
        return self.inner(attention_mask=attention_mask, **inputs)


class TinyLeak(_Leak):
    """A future of one part in a million is still the future."""

    def __call__(self, *, inputs_embeds, **inputs):
        ahead = torch.cat([inputs_embeds[:, 1:], inputs_embeds[:, -1:]], 1)
        return self.inner(inputs_embeds=inputs_embeds + 1e-5 * ahead, **inputs)


class NotANumber(_Leak):
    def __call__(self, **inputs):
        states, cache = self.inner(**inputs)
        return states * float("nan"), cache


class Deaf(_Leak):
    """Says the same whatever it is told: no difference anywhere, which proves nothing."""

    def __call__(self, *, inputs_embeds, **inputs):
        return self.inner(inputs_embeds=torch.zeros_like(inputs_embeds), **inputs)


@pytest.mark.parametrize(
    ("leak", "caught_by"),
    [
        (SeesEverything, "training forward"),
        (SeesOneAhead, "training forward"),
        (SeesOtherPassages, "packed rows"),
        (MixesRows, "prefill, left padding"),
        (WrongPositionsWithACache, "cached equals uncached"),
        (SeesEverythingUnderSdpa, "training forward"),
        (TinyLeak, "training forward"),
        (NotANumber, "training forward"),
        (Deaf, "cached decoding"),
    ],
)
def test_leaky_backbones_are_caught(leak, caught_by):
    model = tiny_sentence_lm()
    leak(model)
    report = check_causality(model)
    assert caught_by in {check.name for check in report.failures}
    with pytest.raises(CausalityError, match=caught_by):
        require_causal(report)
    if leak is SeesEverythingUnderSdpa:
        assert {check.attention for check in report.failures} == {"sdpa"}


def test_quality_refuses_a_leaky_model():
    model = tiny_sentence_lm()
    SeesEverything(model)
    with pytest.raises(CausalityError):
        score_sentence_model(model, [], None, causality=check_causality(model))


def test_the_attention_backend_is_really_switched_and_put_back():
    model = tiny_sentence_lm()
    configs = [module.config for module in model.backbone.modules() if hasattr(module, "config")]
    before = [config._attn_implementation for config in configs]
    with attention_of(model, "eager"):
        assert {config._attn_implementation for config in configs} == {"eager"}
    assert [config._attn_implementation for config in configs] == before


def test_training_mode_is_put_back():
    model = tiny_sentence_lm().train()
    assert check_causality(model).passed  # dropout off while checking
    assert model.training
