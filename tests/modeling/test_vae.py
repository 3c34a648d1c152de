"""SentenceVAE: padding, cached decoding, the one-latent identity, saving."""

import pytest
import torch
from transformers import AutoConfig, AutoModel

from sentcompress.errors import PluginError
from sentcompress.modeling import SentenceVAE
from sentcompress.modeling.losses import TokenLoss
from sentcompress.registry import get_registry
from sentcompress.testing import tiny_passages, tiny_vae

CONDITIONINGS = ["cross-attention", "add", "prefix"]
FUSIONS = ["sum-norm", "mean", "last", "weighted-sum", "attention", "pack"]


def build(conditioning="cross-attention", fusion="sum-norm", **settings):
    latents = 2 if fusion == "attention" else 1
    return tiny_vae(
        conditioning=conditioning, fusion={"name": fusion, "options": {}}, latents=latents, **settings
    )


@pytest.mark.parametrize("fusion", FUSIONS)
def test_padding_changes_nothing(fusion):
    vae, batch = build(fusion=fusion), tiny_passages()
    ids, mask = batch["input_ids"], batch["attention_mask"]
    wide = torch.nn.functional.pad(ids, (0, 9), value=7), torch.nn.functional.pad(mask, (0, 9))
    left = torch.nn.functional.pad(ids, (5, 0), value=9), torch.nn.functional.pad(mask, (5, 0))
    expected = vae.encode(ids, mask)
    assert torch.equal(vae.encode(*wide), expected)
    assert torch.equal(vae.encode(*left), expected)
    noisy = ids.masked_fill(mask == 0, 123)
    assert torch.equal(vae.encode(noisy, mask), expected)


def test_attention_pooling_is_attention_of_the_queries_to_keys_and_values():
    fusion = get_registry().create("fusion", "attention", {"latents": 2}, hidden_size=8)
    torch.nn.init.normal_(fusion.key_proj.bias)
    states, queries = torch.randn(1, 5, 8), fusion.queries
    weights = (queries @ fusion.key_proj(states[0]).T / 8**0.5).softmax(-1)
    expected = fusion.norm(weights @ fusion.value_proj(states[0]))
    torch.testing.assert_close(fusion(states, torch.ones(1, 5, dtype=torch.bool))[0], expected)


def test_a_fusion_of_a_wrong_shape_is_named():
    vae, batch = build(), tiny_passages()
    arguments = batch["input_ids"], batch["attention_mask"]
    name = r"fusion 'sum-norm' \(sentcompress.fusions.sum_norm.SumNorm, package 'sentcompress' \S+\)"
    vae.fusion.forward = lambda states, _: states.sum(1)
    with pytest.raises(PluginError, match=rf"{name} returned \[9, 32\] where .* \[9, 1, 32\] is expected"):
        vae.encode(*arguments)
    vae.fusion.forward = lambda states, _: (states,)
    with pytest.raises(PluginError, match=rf"{name} returned tuple where"):
        vae.encode(*arguments)


@pytest.mark.parametrize("fusion", FUSIONS)
def test_fusions_ignore_what_stands_at_padding(fusion):
    module = get_registry().create("fusion", fusion, {}, hidden_size=16)
    states, mask = torch.randn(3, 6, 16), torch.arange(6) < torch.tensor([6, 2, 4])[:, None]
    other = torch.where(mask[:, :, None], states, torch.randn(3, 6, 16) * 100)
    latents = module(states, mask)
    assert latents.shape == (3, module.latents, 16)
    assert torch.equal(latents, module(other, mask))
    latents.sum().backward()
    assert all(p.grad is not None for p in module.parameters())


@pytest.mark.parametrize("conditioning", CONDITIONINGS)
@pytest.mark.parametrize("fusion", ["sum-norm", "attention"])
@pytest.mark.parametrize("unpack", [0, 6])
@torch.no_grad()
def test_cached_decoding_equals_the_teacher_forced_pass(conditioning, fusion, unpack):
    vae, batch = build(conditioning, fusion, decoder_layers=2, unpack_size=unpack), tiny_passages()
    ids, lengths = batch["input_ids"], batch["attention_mask"].sum(1)
    latents = vae.encode(ids, batch["attention_mask"])
    cache = vae.decoder.allocate(len(latents), latents)
    vae.decoder.restart(cache, torch.arange(len(latents)), latents)
    for _ in range(vae.decoder.prefix):
        vae.decoder.step(latents[:, 0], cache)
    nll, current = torch.zeros(len(ids)), torch.full((len(ids),), vae.config.bos_token_id)
    for step in range(ids.shape[1] + 1):
        log_p = vae.logits(vae.decoder.step(vae.embed_targets(current), cache)).log_softmax(-1)
        token = ids[:, min(step, ids.shape[1] - 1)]
        target = torch.where(lengths > step, token, vae.config.eos_token_id)
        nll += torch.where(step <= lengths, -log_p.gather(1, target[:, None])[:, 0], 0.0)
        current = target
    expected = vae(ids, batch["attention_mask"])
    torch.testing.assert_close(nll, expected.nll, atol=1e-4, rtol=1e-5)
    assert torch.equal(expected.targets, lengths + 1)


def test_attention_to_one_latent_is_a_vector_added():
    """design.md: with one key the weight is exactly 1, so attention is out_proj(v_proj(latent))."""
    attention = build().decoder.blocks[0].condition
    hidden, latents = torch.randn(4, 6, 32), torch.randn(4, 1, 32)
    keys = attention.k_proj(latents).unflatten(-1, (4, -1)).transpose(1, 2)
    values = attention.v_proj(latents).unflatten(-1, (4, -1)).transpose(1, 2)
    in_full = attention.attend(hidden, keys, values)
    (added,) = attention.prepare(latents)
    torch.testing.assert_close(in_full, added[:, None].expand_as(in_full), atol=1e-6, rtol=1e-5)


@torch.no_grad()
def test_packed_sentences_keep_the_order_of_their_words():
    """The same words in another order, and words beyond the last position, give other latents."""
    fusion = get_registry().create("fusion", "pack", {"positions": 4, "latents": 2}, hidden_size=16)
    states = torch.randn(1, 6, 16)
    everything = torch.ones(1, 6, dtype=torch.bool)
    latents = fusion(states, everything)
    assert latents.shape == (1, 2, 16)
    assert not torch.allclose(fusion(states.flip(1), everything), latents, atol=1e-3)
    changed = states.clone()
    changed[0, 5] += 1
    assert not torch.allclose(fusion(changed, everything), latents, atol=1e-3)


@pytest.mark.parametrize("tie", [True, False])
def test_save_and_load_is_an_ordinary_model_folder(tmp_path, tie):
    vae, batch = build(tie_embeddings=tie, variational=True), tiny_passages()
    vae.save_pretrained(tmp_path)
    assert {p.name for p in tmp_path.iterdir()} == {"config.json", "model.safetensors"}
    assert AutoConfig.from_pretrained(tmp_path).model_type == "sentence-vae"
    loaded = AutoModel.from_pretrained(tmp_path).eval()
    assert isinstance(loaded, SentenceVAE)
    arguments = batch["input_ids"], batch["attention_mask"]
    assert torch.equal(loaded(*arguments).nll, vae(*arguments).nll)


def test_kl_and_noise_act_in_training_only():
    vae, batch = build(variational=True), tiny_passages()
    arguments = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
    quiet = vae(**arguments).loss
    assert torch.equal(vae(**arguments, kl_weight=1.0, latent_noise=1.0).loss, quiet)
    vae.train()
    torch.manual_seed(0)
    low = vae(**arguments).loss
    torch.manual_seed(0)
    assert vae(**arguments, kl_weight=1.0).loss > low


def test_initial_weights_have_the_scale_that_is_asked_for():
    def deviations(**settings: float) -> tuple[float, float]:
        vae = tiny_vae(hidden_size=64, **settings)
        attention = vae.decoder.blocks[0].attention
        return vae.embed_tokens.weight.std().item(), attention.qkv_proj.weight.std().item()

    assert deviations(init_std=0.03, embed_init_std=0.5) == pytest.approx((0.5, 0.03), rel=0.1)
    assert deviations() == pytest.approx((0.1, 64**-0.5), rel=0.1)


@pytest.mark.parametrize("tie", [True, False])
def test_the_decoder_reads_embeddings_times_the_multiplier(tie):
    vae, batch = build(tie_embeddings=tie), tiny_passages()
    tokens = batch["input_ids"]
    plain, latents = vae.embed_targets(tokens), vae.encode(tokens, batch["attention_mask"])
    vae.config.embedding_multiplier = 4.0
    assert torch.equal(vae.embed_targets(tokens), 4 * plain)
    assert torch.equal(vae.encode(tokens, batch["attention_mask"]), latents)


def test_empty_and_overlong_sentences_are_refused():
    vae = build()
    with pytest.raises(ValueError, match="no token"):
        vae.encode(torch.zeros(2, 3, dtype=torch.long), torch.tensor([[1, 1, 0], [0, 0, 0]]))
    with pytest.raises(ValueError, match="max_sentence_tokens"):
        vae.encode(torch.zeros(1, 25, dtype=torch.long), torch.ones(1, 25, dtype=torch.long))


def test_learns_to_reconstruct_a_handful_of_sentences():
    vae = build(dropout=0.0).train()
    batch = tiny_passages()
    optimizer = torch.optim.AdamW(vae.parameters(), lr=1e-2)
    for _ in range(60):
        loss = vae(batch["input_ids"], batch["attention_mask"], token_loss=TokenLoss(gamma=0.0)).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert loss.item() < 0.5
