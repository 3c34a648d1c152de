"""SentenceLM: causal over sentences, packed passages apart, OPT fed as the library feeds it."""

import pytest
import torch
from transformers import AutoModel

from sentcompress.errors import InputError, PluginError
from sentcompress.modeling import SentenceLM
from sentcompress.modeling.grafting import graft, wrap_backbone
from sentcompress.modeling.saved_models import load_sentence_lm
from sentcompress.modeling.sentence_lm import positions_in_passages
from sentcompress.recipe import Recipe
from sentcompress.testing import OPT_TWINS, tiny_opt, tiny_passages, tiny_sentence_lm, tiny_vae

TWO_LATENTS = {"fusion": {"name": "attention", "options": {"latents": 2}}, "latents": 2}


def with_attention(model, implementation):
    model.backbone.decoder.set_attn_implementation(implementation)
    return model


@pytest.mark.parametrize("shape", OPT_TWINS)
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@torch.no_grad()
def test_opt_adapter_gives_the_librarys_own_hidden_states(shape, implementation):
    """Token embeddings in place of latents; with cache, left and right padding, and packed."""
    lm = tiny_opt(**OPT_TWINS[shape])
    lm.set_attn_implementation(implementation)
    ids = torch.randint(4, 500, (3, 11))
    masks = {
        "none": torch.ones(3, 11, dtype=torch.long),
        "right": (torch.arange(11) < torch.tensor([11, 6, 9])[:, None]).long(),
        "left": (torch.arange(11) >= torch.tensor([0, 5, 2])[:, None]).long(),
    }
    expected = {
        name: lm.model(input_ids=ids, attention_mask=mask).last_hidden_state for name, mask in masks.items()
    }

    backbone = wrap_backbone(Recipe(name="x").backbone, lm)
    embeddings = backbone.token_embeddings(ids)
    order = torch.arange(11)
    for name, mask in masks.items():
        allowed = (order[None, :] <= order[:, None]) & mask.bool()[:, None, :] | torch.eye(
            11, dtype=torch.bool
        )
        positions = (mask.cumsum(1) - 1).clamp_min(0)
        states, _ = backbone(embeddings, allowed[:, None], positions)
        difference = (backbone.project_out(states) - expected[name])[mask.bool()].abs().max()
        assert difference < 1e-5, (name, difference)

    cache, parts = None, []
    for begin, end in ((0, 4), (4, 5), (5, 11)):
        allowed = (order[:end][None, :] <= order[begin:end, None])[None, None].expand(3, 1, -1, -1)
        states, cache = backbone(
            embeddings[:, begin:end], allowed, order[begin:end].expand(3, -1), cache, True
        )
        parts.append(backbone.project_out(states))
    assert (torch.cat(parts, 1) - expected["none"]).abs().max() < 1e-5

    packed = embeddings[:2].reshape(1, 22, -1)
    owner = torch.arange(22) // 11
    allowed = (owner[None, :] == owner[:, None]) & (torch.arange(22)[None, :] <= torch.arange(22)[:, None])
    states, _ = backbone(packed, allowed[None, None], (torch.arange(22) % 11)[None])
    assert (backbone.project_out(states).view(2, 11, -1) - expected["none"][:2]).abs().max() < 1e-5


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("vae", [{}, TWO_LATENTS], ids=["k1", "k2"])
@torch.no_grad()
def test_a_changed_sentence_changes_nothing_before_it_or_beside_it(implementation, vae):
    model, batch = with_attention(tiny_sentence_lm(vae=vae), implementation), tiny_passages()
    before = model(**batch)
    for sentence, cells in (
        (2, [(0, 0), (0, 1), (0, 2)]),
        (4, [(1, 0), (1, 3), (1, 4), (1, 5)]),
        (8, [(1, 3), (1, 4)]),
    ):
        changed = {**batch, "input_ids": batch["input_ids"].clone()}
        changed["input_ids"][sentence] = 77
        after = model(**changed)
        for row, cell in cells:
            assert torch.equal(after.hidden_states[row, cell], before.hidden_states[row, cell])
        at = (batch["sentence_index"] == sentence).nonzero()[0]
        assert not torch.equal(after.hidden_states[tuple(at)], before.hidden_states[tuple(at)])


@torch.no_grad()
def test_packed_passages_score_as_they_do_alone():
    model, batch = tiny_sentence_lm(), tiny_passages()
    packed = model(**batch)
    alone = {
        **batch,
        "sentence_index": torch.tensor([[-2, 0, 1, 2, 3], [-2, 4, 5, -1, -1], [-1, -1, 6, 7, 8]]),
        "passage_ids": torch.tensor([[0, 0, 0, 0, 0], [1, 1, 1, -1, -1], [-1, -1, 2, 2, 2]]),
    }
    apart = model(**alone)
    torch.testing.assert_close(apart.sentence_nll, packed.sentence_nll, atol=1e-4, rtol=1e-5)
    torch.testing.assert_close(apart.stop_nll, packed.stop_nll, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(apart.loss, packed.loss, atol=1e-5, rtol=1e-5)


def test_every_sentence_and_decision_is_charged_once():
    out = tiny_sentence_lm()(**tiny_passages())
    lengths = tiny_passages()["attention_mask"].sum(1) + 1
    lengths[6] = 0  # the first of a passage that does not begin its document is no target
    assert torch.equal(out.targets, lengths)
    assert out.decisions.all()
    assert (out.sentence_nll > 0).tolist() == (lengths > 0).tolist()


def test_without_a_start_latent_the_first_sentence_is_no_target():
    recipe = Recipe(name="x", graft={"start_latent": False, "match_scale": False})
    model = tiny_sentence_lm(recipe=recipe)
    assert model.config.latent_scale == 1.0
    out = model(**tiny_passages(start=False))
    assert out.targets[[0, 4]].tolist() == [0, 0]
    assert out.start_nll == 0


def test_gradients_reach_every_part():
    model = tiny_sentence_lm(vae=TWO_LATENTS).train()
    model(**tiny_passages()).loss.backward()
    assert [name for name, p in model.named_parameters() if p.grad is None] == []


def test_positions_restart_with_each_passage():
    ids = torch.tensor([[0, 0, 0, 1, 1, -1], [-1, -1, 3, 3, 4, 4]])
    assert positions_in_passages(ids).tolist() == [[0, 1, 2, 0, 1, 0], [0, 1, 0, 1, 0, 1]]


@pytest.mark.parametrize("shape", OPT_TWINS)
def test_save_and_load(tmp_path, shape):
    model, batch = tiny_sentence_lm(**OPT_TWINS[shape]), tiny_passages()
    model.save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors").is_file()
    for loaded in (AutoModel.from_pretrained(tmp_path).eval(), load_sentence_lm(tmp_path, "eager")):
        assert isinstance(loaded, SentenceLM)
        torch.testing.assert_close(loaded(**batch).loss, model(**batch).loss)
        assert loaded.config.latent_scale == model.config.latent_scale


def test_graft_keeps_the_weights_of_both_and_measures_the_scale():
    lm, vae = tiny_opt(), tiny_vae()
    expected = {k: v.clone() for k, v in lm.model.decoder.layers.state_dict().items()}
    table = lm.model.decoder.embed_tokens.weight.clone()
    recipe = Recipe(name="x")
    model = graft(recipe, vae, wrap_backbone(recipe.backbone, lm))
    assert all(torch.equal(v, model.backbone.blocks.state_dict()[k]) for k, v in expected.items())
    assert all(torch.equal(v, model.vae.state_dict()[k]) for k, v in vae.state_dict().items())
    assert model.config.latent_scale == pytest.approx(table.square().mean().sqrt().item())
    assert not any("embed_tokens" in name for name in model.backbone.state_dict())


def test_a_vae_of_another_width_is_refused():
    recipe = Recipe(name="x")
    with pytest.raises(InputError, match=r"hidden size 16.*32"):
        graft(recipe, tiny_vae(hidden_size=16), wrap_backbone(recipe.backbone, tiny_opt()))


LOADERS = pytest.mark.parametrize("load", [load_sentence_lm, SentenceLM.from_pretrained])


@LOADERS
def test_a_missing_plugin_is_named_when_loading(load, tmp_path):
    model = tiny_sentence_lm()
    model.config.plugins = [
        {"kind": "fusion", "name": "gone", "package": "sentcompress-gone", "version": "1.2"}
    ]
    model.save_pretrained(tmp_path)
    with pytest.raises(PluginError, match="sentcompress-gone") as error:
        load(tmp_path)
    assert "pip install sentcompress-gone==1.2" in str(error.value)


@LOADERS
def test_another_version_of_a_plugin_is_warned_about(load, tmp_path):
    model = tiny_sentence_lm()
    model.config.plugins = [
        {"kind": "fusion", "name": "sum-norm", "package": "sentcompress-sums", "version": "1.2"}
    ]
    model.save_pretrained(tmp_path)
    with pytest.warns(
        UserWarning, match=r"fusion 'sum-norm' of sentcompress-sums 1.2, but this is sentcompress"
    ):
        load(tmp_path)
