"""Warm starts: an encoder and decoder made of the LLM's own first and last blocks, for every family."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from sentcompress.errors import InputError
from sentcompress.generation.compiled import CompiledStep
from sentcompress.generation.conditioned_text import ConditionedText
from sentcompress.generation.sentence_writer import SentencePlan, SentenceWriter
from sentcompress.modeling import SentenceVAE
from sentcompress.modeling.grafting import start_from_backbone, vae_config
from sentcompress.recipe import Recipe
from sentcompress.registry import get_registry
from sentcompress.testing import tiny_opt


class Tokens:
    """What the configuration asks of a tokenizer."""

    bos_token_id = eos_token_id = 2
    pad_token_id = 1

    def get_vocab(self) -> dict[str, int]:
        return {"last": 499}


def warm(name: str, lm, **vae) -> SentenceVAE:
    """A SentenceVAE with the weights of ``lm``, in eval mode; the LLM itself is left whole."""
    lm = copy.deepcopy(lm)
    vae = {"init": "backbone", "conditioning": "prefix", **vae}
    recipe = Recipe(name="x", backbone={"name": name, "model": "tiny"}, vae=vae)
    segmenter = get_registry().create("segmenter", "regex", {"max_tokens": 20})
    model = SentenceVAE(vae_config(recipe, lm.config.hidden_size, 4, Tokens(), segmenter, lm.config)).eval()
    start_from_backbone(model, lm, recipe.backbone)
    return model


def llms():
    registry = get_registry()
    for name in registry.names("backbone"):
        for number, shape in enumerate(registry.get("backbone", name).tiny_configs):
            if "word_embed_proj_dim" not in shape or shape["word_embed_proj_dim"] == shape["hidden_size"]:
                yield pytest.param(name, shape, id=f"{shape['model_type']}-{number}")


def sentences():
    ids = torch.randint(3, 500, (2, 6), generator=torch.Generator().manual_seed(0))
    mask = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0]])
    return ids, mask


@pytest.mark.parametrize(("name", "shape"), list(llms()))
@torch.no_grad()
def test_with_all_blocks_the_encoder_is_the_llm(name, shape, tmp_path):
    torch.manual_seed(0)
    config = AutoConfig.for_model(**shape)
    attention = get_registry().get("backbone", name).attention_implementations(config)[0]
    lm = AutoModelForCausalLM.from_config(config, attn_implementation=attention).eval()
    vae = warm(name, lm, encoder_layers=config.num_hidden_layers, decoder_layers=2)
    ids, mask = sentences()
    layout, tokens = vae._layout(ids, mask)
    states = layout.pad(vae.encoder(vae.embed_tokens(tokens), layout))
    expected = lm.base_model(input_ids=ids).last_hidden_state
    assert (states - expected)[mask.bool()].abs().max() < 1e-5

    latents = vae.encode(ids, mask)
    plans = [SentencePlan(max_tokens=8), SentencePlan(max_tokens=6, prefix=[5, 6])]
    plain = SentenceWriter(vae, use_cache=False).write(latents, plans)
    assert SentenceWriter(vae).write(latents, plans) == plain
    vae.save_pretrained(tmp_path)
    loaded = SentenceVAE.from_pretrained(tmp_path).eval()
    assert torch.equal(loaded(ids, mask).nll, vae(ids, mask).nll)


def test_a_sentence_that_joins_later_is_written_as_alone():
    vae = warm("opt", tiny_opt(), encoder_layers=1, decoder_layers=2)
    latents = vae.encode(*sentences())
    plans = [SentencePlan(max_tokens=20), SentencePlan(max_tokens=9, prefix=[5, 6])]
    alone = [SentenceWriter(vae).write(latents[n : n + 1], [plans[n]])[0].tokens for n in (0, 1)]
    writers = [SentenceWriter(vae), SentenceWriter(vae)]
    for writer in writers:
        writer.read([ConditionedText([], latents[:0])])
    first = writers[0]
    first.begin([0], latents[:1], plans[:1])
    finished = [each for _ in range(4) for each in first.step()]
    assert not finished
    first.join(writers[1])
    first.begin([1], latents[1:], plans[1:])
    while first.busy:
        finished += first.step()
    assert [each.tokens for each in sorted(finished, key=lambda each: each.row)] == alone


def test_the_decoder_has_the_last_blocks_and_the_head():
    lm = tiny_opt(tie_word_embeddings=False)
    vae = warm("opt", lm, encoder_layers=1, decoder_layers=2)
    own, llm = vae.state_dict(), lm.state_dict()
    part = "self_attn.q_proj.weight"
    assert torch.equal(own[f"decoder.llm.decoder.layers.0.{part}"], llm[f"model.decoder.layers.1.{part}"])
    assert torch.equal(own[f"decoder.llm.decoder.layers.1.{part}"], llm[f"model.decoder.layers.2.{part}"])
    assert torch.equal(own[f"encoder.llm.decoder.layers.0.{part}"], llm[f"model.decoder.layers.0.{part}"])
    assert torch.equal(own["lm_head.weight"], llm["lm_head.weight"])
    assert torch.equal(own["embed_tokens.weight"], llm["model.decoder.embed_tokens.weight"])
    assert not any("embed_tokens" in name for name in own if ".llm." in name)


def test_gradients_reach_both_ends():
    vae = warm("opt", tiny_opt(), encoder_layers=1, decoder_layers=1).train()
    vae(*sentences()).loss.backward()
    without = [n for n, p in vae.named_parameters() if p.grad is None or not p.grad.abs().sum()]
    # A sentence is never as long as the LLM's positions, and keys' biases change no softmax.
    assert [n for n in without if "k_proj.bias" not in n] == []


def test_wrong_settings_are_refused():
    with pytest.raises(InputError, match=r"vae.encoder_layers: 9.*3 blocks"):
        warm("opt", tiny_opt(), encoder_layers=9)
    with pytest.raises(ValueError, match="conditioning: prefix"):
        Recipe(name="x", vae={"init": "backbone", "conditioning": "add"})


def test_heads_that_do_not_divide_the_width_are_refused_or_chosen():
    recipe = Recipe(name="x", vae={"num_heads": 5})
    segmenter = get_registry().create("segmenter", "regex", {})
    with pytest.raises(InputError, match=r"vae.num_heads: 5 does not divide .* 32"):
        vae_config(recipe, 32, 4, Tokens(), segmenter)
    assert vae_config(Recipe(name="x"), 32, 5, Tokens(), segmenter).num_heads == 4


def test_its_steps_cannot_be_compiled():
    with pytest.raises(InputError, match="the LLM's own blocks"):
        CompiledStep(warm("opt", tiny_opt(500)).decoder)
