"""Opponents of equal cost: computed from shapes, and counted while they run."""

from __future__ import annotations

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM

from sentcompress.contracts.causal_lm import CACHE
from sentcompress.errors import InputError
from sentcompress.estimate.equal_cost import match
from sentcompress.estimate.roofline import decoding_cost, serving_cost
from sentcompress.estimate.shapes import meta_models, random_models
from sentcompress.modeling.llm_loading import load_backbone_config
from sentcompress.modeling.pruning import ends, opponent_config
from sentcompress.recipe import OpponentSettings, load_recipe

SENTENCE = 13.5


def shallow(recipe, settings, found):
    whole = load_backbone_config(recipe.backbone, weights=False)
    kept = ends(int(whole.num_hidden_layers), found.blocks)
    return AutoModelForCausalLM.from_config(opponent_config(whole, settings, kept, found.feedforward)).eval()


@pytest.mark.parametrize("tokens", [100, 300, 500])
def test_from_nothing_the_cost_is_equal_within_5_percent_and_counted(tokens):
    recipe, settings = load_recipe("strong"), OpponentSettings(text_tokens=tokens)
    found = match(recipe, settings, SENTENCE)
    opponent = shallow(recipe, settings, found)
    ours = decoding_cost(meta_models(recipe)[0], tokens, SENTENCE)[0]
    theirs = decoding_cost(opponent, tokens, SENTENCE)[0]
    assert found.share == pytest.approx(theirs / ours)
    assert theirs == pytest.approx(ours, rel=0.05)
    ids = torch.full((1, tokens), 5)
    with torch.no_grad():
        cache = opponent(input_ids=ids[:, :-1], use_cache=True)[CACHE]
        # The counter knows no fused attention of CPUs.
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            opponent(input_ids=ids[:, :1], use_cache=True, **{CACHE: cache})
    assert counter.get_total_flops() == pytest.approx(ours, rel=0.05)


def test_a_pretrained_llm_gets_the_closest_number_of_blocks():
    recipe = load_recipe("paper/sllm-125m-h1")
    found = match(recipe, OpponentSettings(), SENTENCE)
    assert found.feedforward == {}
    shares = [match(recipe, OpponentSettings(blocks=blocks), SENTENCE).share for blocks in range(1, 12)]
    assert shares == sorted(shares)
    assert abs(found.share - 1) == min(abs(share - 1) for share in shares)
    assert shares[found.blocks - 1] == found.share


def test_the_largest_batch_reads_weights_once_for_all_texts():
    model, lm = random_models(load_recipe("strong"))
    memory = 2**30
    held = sum(p.numel() * p.element_size() for p in lm.parameters())
    heads = 2 * lm.config.num_hidden_layers * lm.config.hidden_size * 4
    batch = (memory - held) / (1000 * heads)
    weights = decoding_cost(lm, 0, SENTENCE)[1]
    assert serving_cost(lm, 1000, SENTENCE, memory) == pytest.approx(weights / batch + 1000 * heads)
    # With no end of memory only the caches count. A sentence model reads its own once a sentence.
    ours, theirs = (serving_cost(each, 1000, SENTENCE, 1e15) for each in (model, lm))
    assert ours < theirs / SENTENCE


def test_what_has_no_opponent_is_refused():
    recipe = load_recipe("strong")
    with pytest.raises(InputError, match=r"opponents: 9 blocks, but 'opt-tiny' has 6"):
        match(recipe, OpponentSettings(blocks=9), SENTENCE)
    one = load_recipe("strong", ["backbone.config={num_hidden_layers: 1}"])
    with pytest.raises(InputError, match="fewer blocks, but 'opt-tiny' has 1"):
        match(one, OpponentSettings(), SENTENCE)
    with pytest.raises(
        InputError, match=r"serving_bytes: .* have no room for .*\n.*raise it, or lower text_tokens"
    ):
        match(recipe, OpponentSettings(cost="serving", serving_bytes=1000), SENTENCE)
    with pytest.raises(InputError, match=r"opponents\.config\.blocks: not a field of 'opt'"):
        match(recipe, OpponentSettings(config={"blocks": 1}), SENTENCE)
