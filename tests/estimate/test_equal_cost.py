"""Opponents of equal cost: computed from shapes, and counted while they run."""

from __future__ import annotations

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModelForCausalLM

from sentcompress.contracts.causal_lm import CACHE
from sentcompress.errors import InputError
from sentcompress.estimate.equal_cost import match
from sentcompress.estimate.roofline import decoding_cost, serving_cost, split_caches
from sentcompress.estimate.shapes import meta_models, random_models
from sentcompress.modeling.llm_loading import load_backbone_config
from sentcompress.modeling.pruning import WINDOWED, ends, opponent_config
from sentcompress.modeling.split import split
from sentcompress.recipe import OpponentSettings, load_recipe
from sentcompress.registry import get_registry

SENTENCE = 13.5


def with_opponent(name="strong", overrides=(), **settings):
    """A shipped recipe whose only opponent is ``x``, and the match that is found for it."""
    recipe = load_recipe(name, list(overrides)).model_copy(
        update={"opponents": {"x": OpponentSettings(**settings)}}
    )
    return recipe, match(recipe, "x", SENTENCE)


def shallow(recipe, found):
    settings = recipe.opponents["x"]
    whole = load_backbone_config(recipe.backbone, weights=False)
    kept = ends(int(whole.num_hidden_layers), found.blocks)
    return AutoModelForCausalLM.from_config(
        opponent_config(whole, settings, kept, found.feedforward, "x", found.window)
    ).eval()


@pytest.mark.parametrize("tokens", [100, 300, 500])
def test_from_nothing_the_cost_is_equal_within_5_percent_and_counted(tokens):
    recipe, found = with_opponent(text_tokens=tokens)
    opponent = shallow(recipe, found)
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
    _, found = with_opponent("paper/sllm-125m-h1")
    assert found.feedforward == {}
    shares = [with_opponent("paper/sllm-125m-h1", blocks=blocks)[1].share for blocks in range(1, 12)]
    assert shares == sorted(shares)
    assert abs(found.share - 1) == min(abs(share - 1) for share in shares)
    assert shares[found.blocks - 1] == found.share


def test_the_largest_batch_reads_weights_once_for_all_texts():
    """By hand, for the recipe ``strong``: width 192, 6 blocks, fp32; the decoder sees 64 positions and the sentence."""
    model, lm = random_models(load_recipe("strong"))
    memory, tokens = 2**30, 1000
    key_and_value = 2 * 192 * 4
    stored = tokens * 6 * key_and_value
    batch = (memory - sum(p.numel() * 4 for p in lm.parameters())) / stored
    weights = decoding_cost(lm, 0, SENTENCE)[1]
    assert serving_cost(lm, tokens, SENTENCE, memory) == pytest.approx(weights / batch + stored)

    of_decoder = (64 + 1 + SENTENCE / 2) * key_and_value
    of_backbone = tokens / SENTENCE * 6 * key_and_value
    batch = (memory - sum(p.numel() * 4 for p in model.parameters())) / (of_decoder + of_backbone)
    read = (of_decoder * (SENTENCE + 1) + of_backbone) / SENTENCE
    weights = decoding_cost(model, tokens, SENTENCE)[1] - read
    assert serving_cost(model, tokens, SENTENCE, memory) == pytest.approx(weights / batch + read)


def test_no_width_is_spoilt_where_no_shape_comes_near():
    _, found = with_opponent(cost="serving", text_tokens=4000)
    assert (found.blocks, found.feedforward, found.is_equal) == (1, {}, False)
    assert found.share > 1.1
    assert "times the sentence model's bytes read per token" in str(found)


@pytest.fixture
def mistral(tmp_path, tokenizer):
    """Overrides of a recipe that name a folder with the shape of a small Mistral."""
    shape = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4}
    ids = {"bos_token_id": 2, "eos_token_id": 2, "pad_token_id": 1}
    config = AutoConfig.for_model("mistral", vocab_size=len(tokenizer), **shape, num_key_value_heads=4, **ids)
    config.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    return [f"backbone={{model: {tmp_path}, init: random}}"]


@pytest.mark.parametrize("blocks", [None, 2])
def test_a_window_makes_the_cost_of_serving_equal_and_the_cache_is_counted(mistral, blocks):
    tokens, memory = 600, 2**26
    serving = {"cost": "serving", "text_tokens": tokens, "serving_bytes": memory, "blocks": blocks}
    recipe, found = with_opponent("strong", mistral, **serving, window="auto")
    assert found.blocks == (blocks or 4)
    assert found.share == pytest.approx(1, abs=0.05)
    assert 2 < found.window < tokens
    assert with_opponent("strong", mistral, **serving)[1].share > 1.1
    opponent = shallow(recipe, found)
    with torch.no_grad():
        cache = opponent(input_ids=torch.full((1, tokens), 5), use_cache=True)[CACHE]
    kept = sum(tensor.nbytes for layer in cache.layers for tensor in (layer.keys, layer.values))
    # Between two tokens it holds one position fewer than a token attends to.
    assert kept == found.blocks * (found.window - 1) * 2 * 64 * 4
    held = sum(p.nbytes for p in opponent.parameters())
    stored = kept * found.window / (found.window - 1)
    weights = decoding_cost(opponent, 0, SENTENCE)[1]
    counted = weights / ((memory - held) / stored) + stored
    assert counted == pytest.approx(serving_cost(meta_models(recipe)[0], tokens, SENTENCE, memory), rel=0.05)


def test_a_given_window_is_part_of_the_shape(mistral):
    _, wide = with_opponent("strong", mistral, text_tokens=900)
    recipe, found = with_opponent("strong", mistral, text_tokens=900, window=20)
    assert (found.window, found.inputs()["window"]) == (20, "20")
    assert ", a window of 20 tokens; " in str(found)
    assert found.share != wide.share
    assert shallow(recipe, found).config.sliding_window == 20


WITH_WINDOW = [
    shape
    for name in get_registry().names("backbone")
    for shape in get_registry().get("backbone", name).tiny_configs
    if "sliding_window" in AutoConfig.for_model(shape["model_type"]).to_dict()
]


def test_the_types_with_a_window_are_all_of_ours_that_have_one():
    assert {shape["model_type"] for shape in WITH_WINDOW} == set(WINDOWED)


@pytest.mark.parametrize("shape", WITH_WINDOW, ids=lambda shape: shape["model_type"])
def test_no_block_sees_past_its_window(shape):
    fields = dict(shape)
    whole = AutoConfig.for_model(fields.pop("model_type"), **fields)
    config = opponent_config(whole, OpponentSettings(), ends(whole.num_hidden_layers, 2), {}, "x", 5)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    ids = torch.arange(20)[None] + 5
    changed = ids.clone()
    changed[0, 3] = 99
    with torch.no_grad():
        difference = (model(input_ids=ids).logits - model(input_ids=changed).logits).abs().amax(-1)[0]
        cache = model(input_ids=ids, use_cache=True)[CACHE]
    affected = [place for place, change in enumerate(difference.tolist()) if change > 1e-6]
    assert affected[0] == 3
    assert affected[-1] <= 3 + 2 * (5 - 1)  # two blocks
    assert {layer.keys.shape[-2] for layer in cache.layers} == {4}


def test_gpt2_names_no_width_but_has_one():
    spec = "backbone={model: gpt2, init: random}"
    _, found = with_opponent("strong", [spec], text_tokens=300)
    assert found.is_equal


def test_the_sentence_model_is_the_one_that_is_grafted(tmp_path):
    """``graft.vae`` names a folder whose encoder and decoder are not those of the recipe."""
    _, small = with_opponent()
    deep = random_models(load_recipe("strong", ["vae.decoder_layers=4"]))[0].vae
    deep.save_pretrained(tmp_path)
    _, found = with_opponent(overrides=[f"graft.vae={tmp_path}"])
    assert (found.blocks, found.feedforward) != (small.blocks, small.feedforward)
    assert found.is_equal


@pytest.mark.parametrize("name", [name for name in get_registry().names("backbone") if name != "auto"])
def test_operations_of_every_family_are_those_counted(name):
    """Widths of heads and sliding windows included; one new token after 100, far more than the windows."""
    for shape in get_registry().get("backbone", name).tiny_configs:
        fields = dict(shape) | {"max_position_embeddings": 256}
        fields.pop("n_positions", None)
        model = AutoModelForCausalLM.from_config(
            AutoConfig.for_model(fields.pop("model_type"), **fields)
        ).eval()
        ids = torch.full((1, 101), 5)
        with torch.no_grad():
            cache = model(input_ids=ids[:, :-1], use_cache=True)[CACHE]
            with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
                model(input_ids=ids[:, -1:], use_cache=True, **{CACHE: cache})
        assert decoding_cost(model, 101, 8)[0] == pytest.approx(counter.get_total_flops(), rel=0.06), shape


def test_what_has_no_opponent_is_refused():
    for changes, settings, message in (
        ([], {"blocks": 9}, r"opponents\.x: 9 blocks, but 'opt-tiny' has 6"),
        (["backbone.config={num_hidden_layers: 1}"], {}, r"opponents\.x: fewer blocks, but 'opt-tiny' has 1"),
        (
            [],
            {"cost": "serving", "serving_bytes": 1000},
            r"serving_bytes: .* no room .*\n.*lower text_tokens",
        ),
        ([], {"config": {"blocks": 1}}, r"opponents\.x\.config\.blocks: not a field of 'opt'"),
        ([], {"window": 8}, r"opponents\.x\.window: .* 'opt' has no sliding window\n.*mistral, phi3"),
        (
            ["backbone={model: mistral-7b, init: pretrained}"],
            {"window": 8},
            r"opponents\.x\.window: the LLM is pretrained",
        ),
        (
            ["backbone={model: mistral-7b, init: random}"],
            {"window": "auto"},
            r"opponents\.x\.window: auto matches the cost of serving, and cost is operations",
        ),
        ([], {"keep": "least-similar"}, r"opponents\.x\.keep: least-similar compares trained blocks"),
        (
            ["backbone={model: opt-tiny}"],
            {"config": {"dropout": 0.1}},
            r"x\.config: the LLM is pre",
        ),
    ):
        with pytest.raises(InputError, match=message):
            with_opponent("strong", changes, **settings)


@pytest.mark.parametrize("model_type", ["llama", "mistral"])
def test_the_cost_of_a_split_llm_is_counted(model_type):
    """Token by token, and the bytes that are then in its cache."""

    class EachTenth:
        def begins(self, sentence, token):
            return len(sentence) == 10

    sizes = {"hidden_size": 48, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2}
    window = {"sliding_window": 20} if model_type == "mistral" else {}
    config = AutoConfig.for_model(model_type, vocab_size=100, num_hidden_layers=6, **sizes, **window)
    lm = AutoModelForCausalLM.from_config(config).eval()
    made = split(lm, EachTenth(), 2, 2)
    tokens, steps = 200, 10
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        cache = lm(input_ids=torch.full((1, tokens), 5), use_cache=True)[CACHE]
        with FlopCounterMode(display=False) as counter:
            for _ in range(steps):
                lm(input_ids=torch.full((1, 1), 5), use_cache=True, **{CACHE: cache})
    counted = counter.get_total_flops() / steps
    assert decoding_cost(lm, tokens + steps / 2, 10)[0] == pytest.approx(counted, rel=0.05)
    state = cache.layers[-1]
    pairs = [*state.tokens.values(), *state.entries.values()]
    pairs += [(layer.keys, layer.values) for layer in cache.layers[: made.first]]
    held = sum(key.nbytes + value.nbytes for key, value in pairs)
    assert held == pytest.approx(split_caches(lm, made, tokens + steps, 10)[0], rel=0.05)
