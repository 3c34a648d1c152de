"""The computed cost of a token, against operations counted while the models run."""

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from sentcompress.contracts.causal_lm import CACHE
from sentcompress.estimate.roofline import decoding_cost
from sentcompress.generation import GenerationSettings, SentenceGenerator
from sentcompress.testing import tiny_opt, tiny_sentence_lm


def counted(call):
    # The counter knows no fused attention of CPUs.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()


def test_the_backbones_operations_are_those_counted():
    model = tiny_opt()
    ids = torch.full((1, 40), 5)
    with torch.no_grad():
        cache = model(input_ids=ids, use_cache=True)[CACHE]
        step = counted(lambda: model(input_ids=ids[:, :1], use_cache=True, **{CACHE: cache}))
    assert decoding_cost(model, 41, 8)[0] == pytest.approx(step, rel=0.05)


@pytest.mark.parametrize(
    "vae",
    [
        {},
        {"conditioning": "add"},
        {"conditioning": "prefix", "decoder_context": 16, "decoder_layers": 2},
        {"fusion": {"name": "attention", "options": {}}, "latents": 2, "conditioning": "cross-attention"},
        {
            "fusion": {"name": "pack", "options": {"slot_size": 8, "latents": 2}},
            "latents": 2,
            "conditioning": "prefix",
            "unpack_size": 8,
        },
    ],
    ids=["paper", "add", "context", "two-latents", "pack"],
)
def test_the_sentence_models_operations_are_those_counted(vae):
    """Ten more sentences of 8 tokens, after 20: the difference of two runs is what they cost."""
    model = tiny_sentence_lm(vae=vae)
    sentences = [[5] * 8] * 20

    def write(number):
        settings = GenerationSettings(
            max_new_sentences=number, stop_threshold=1, sentence_lengths=(8,), max_sentence_tokens=8
        )
        return counted(lambda: list(SentenceGenerator(model, None).continue_sentences([sentences], settings)))

    each = (write(12) - write(2)) / 10 / 8
    assert decoding_cost(model, 27 * 8, 8)[0] == pytest.approx(each, rel=0.1)


def test_bytes_are_the_weights_a_step_reads():
    opt, model = tiny_opt(), tiny_sentence_lm(vae={"conditioning": "prefix", "tie_embeddings": True})
    weights = sum(p.numel() for p in opt.parameters()) - opt.model.decoder.embed_positions.weight.numel()
    assert decoding_cost(opt, 0, 8)[1] == pytest.approx(4 * weights)
    vae = model.vae
    blocks = sum(p.numel() for p in vae.decoder.parameters()) - vae.decoder.embed_positions.weight.numel()
    at_least = 4 * (blocks + vae.embed_tokens.weight.numel()) * 9 / 8
    assert at_least < decoding_cost(model, 0, 8)[1] < 2 * at_least
