"""The shortlist head picks what the full head picks, whatever the weights look like."""

import pytest
import torch

from sentcompress.errors import InputError
from sentcompress.generation import GenerationSettings, SentenceGenerator, shortlist_head
from sentcompress.generation.output_head import MIN_WEIGHTS_FOR_SHORTLIST, OutputHead, make_head
from sentcompress.generation.shortlist_head import ShortlistExactHead
from sentcompress.recipe import build_recipe
from sentcompress.testing import tiny_sentence_lm


def weights(kind: str) -> torch.Tensor:
    torch.manual_seed(0)
    weight = torch.randn(1000, 48)
    if kind == "large rows":
        weight[::50] *= 30
    if kind == "large columns":
        weight[:, :3] *= 30
    if kind == "twins":
        weight[500:] = weight[:500]  # every token has an equal
    if kind == "nothing":
        weight.zero_()
    return weight


@pytest.mark.parametrize("kind", ["plain", "large rows", "large columns", "twins", "nothing"])
@pytest.mark.parametrize("rows", [1, 3, 40])
@pytest.mark.parametrize("many", [1024, 20])
def test_the_token_is_the_full_heads(kind, rows, many, monkeypatch):
    monkeypatch.setattr(shortlist_head, "MAX_CANDIDATES", many)
    weight = weights(kind)
    full, short = OutputHead(weight), ShortlistExactHead(weight)
    banned = torch.arange(rows) % 3 == 0
    for seed in range(20):
        torch.manual_seed(seed)
        states = torch.randn(rows, 48) * 10.0 ** (seed % 5 - 2)
        states[0, seed % 48] *= 100
        words = full.candidates(states)
        token = int(
            full.argmax(states, words, torch.zeros(rows, dtype=torch.bool), 0)[0]
        )  # ban what would win
        assert torch.equal(
            short.argmax(states, words, banned, token), full.argmax(states, words, banned, token)
        )
    assert short.picked == 20 * rows
    if many == 1024:
        assert short.fallbacks == 0
    elif kind in ("large columns", "nothing"):
        assert short.fallbacks > 0


def test_ties_are_settled_by_the_weights_and_not_by_how_they_are_summed():
    torch.manual_seed(0)
    weight = torch.randn(200, 4096)
    weight[7] = weight[3]
    weight[3, 0] = weight[3, 0].nextafter(torch.tensor(9.0))  # larger by one bit of one weight
    states = weight[7].expand(3, -1).contiguous()
    states[:, 0] = 1.0
    for head in (OutputHead(weight), ShortlistExactHead(weight)):
        none = torch.zeros(3, dtype=torch.bool)
        words = head.candidates(states)
        assert head.argmax(states, words, none, 0).tolist() == [3, 3, 3]
        assert head.argmax(states[:1], words[:1], none[:1], 0).tolist() == [3]
        assert head.argmax(states, words, ~none, 3).tolist() == [7, 7, 7]


def test_generation_writes_the_same(tokenizer):
    model = tiny_sentence_lm(len(tokenizer), vae={"max_sentence_tokens": 16})
    generator = SentenceGenerator(model, tokenizer)
    prompts = [f"Number {n} is here. The people are free and" for n in range(20)]
    written = {
        (head, size): [
            g.token_ids
            for begin in range(0, 20, size)
            for g in generator.generate(
                prompts[begin : begin + size],
                GenerationSettings(max_new_tokens=30, stop_threshold=1, head=head),
            )
        ]
        for head in ("exact", "shortlist-exact")
        for size in (1, 20)
    }
    first = written["exact", 1]
    assert all(first == other for other in written.values())
    assert generator.head("shortlist-exact").picked > 0


def test_auto_takes_the_shortlist_for_large_heads_only():
    assert type(make_head(torch.randn(64, 8), "auto")) is OutputHead
    assert type(make_head(torch.randn(MIN_WEIGHTS_FOR_SHORTLIST // 64, 64), "auto")) is ShortlistExactHead
    assert (
        type(make_head(torch.empty(MIN_WEIGHTS_FOR_SHORTLIST // 64, 64, device="meta"), "auto")) is OutputHead
    )


def predicting(tokenizer):
    """A model that predicts shortlists."""
    recipe = build_recipe({"name": "tiny", "graft": {"shortlist_rank": 8}}, [], "tests")
    return tiny_sentence_lm(len(tokenizer), recipe, vae={"max_sentence_tokens": 16})


PROMPTS = [f"Number {n} is here. The people are free and" for n in range(6)]


@pytest.mark.parametrize("sampled", [False, True])
def test_a_predicted_shortlist_of_all_tokens_writes_what_the_full_head_writes(tokenizer, sampled):
    generator = SentenceGenerator(predicting(tokenizer), tokenizer)
    ask = {"max_new_tokens": 30, "stop_threshold": 1, "do_sample": sampled, "seed": 1}
    full = generator.generate(PROMPTS, GenerationSettings(**ask, head="exact"))
    short = generator.generate(
        PROMPTS, GenerationSettings(**ask, head="shortlist", shortlist_tokens=len(tokenizer))
    )
    assert [g.token_ids for g in short] == [g.token_ids for g in full]


@pytest.mark.parametrize("sampled", [False, True])
def test_a_sentence_is_written_with_its_own_shortlist(tokenizer, sampled, monkeypatch):
    generator = SentenceGenerator(predicting(tokenizer), tokenizer)
    lists = []
    words = shortlist_head.ShortlistHead.candidates

    def noted(self, latents):
        lists.extend(found := words(self, latents))
        return found

    monkeypatch.setattr(shortlist_head.ShortlistHead, "candidates", noted)
    ask = {"max_new_sentences": 3, "stop_threshold": 1, "do_sample": sampled, "seed": 1}
    settings = GenerationSettings(**ask, head="shortlist", shortlist_tokens=12, max_sentence_tokens=9)
    contexts = [[[5, 6, 7], [8, 9]], [[40, 41, 42]]]
    written = list(generator.continue_sentences(contexts, settings))
    assert len(lists) == 6
    remaining = [set(known.tokens.tolist()) for known in lists]
    assert all(len(tokens) == 12 and generator.model.config.eos_token_id in tokens for tokens in remaining)
    for _, tokens in written:
        assert any(set(tokens) <= allowed for allowed in remaining)
    # Whether the batch is one or two makes no difference to what is written.
    if not sampled:
        alone = [s for n in (0, 1) for _, s in generator.continue_sentences([contexts[n]], settings)]
        assert alone == [s for n in (0, 1) for number, s in written if number == n]


def test_a_model_that_predicts_none_says_so(tokenizer):
    generator = SentenceGenerator(tiny_sentence_lm(len(tokenizer)), tokenizer)
    with pytest.raises(InputError, match="graft it with"):
        generator.generate(["It is."], GenerationSettings(max_new_tokens=3, head="shortlist"))
