"""The predicted shortlist: it learns which tokens a sentence holds, and the rest of the model never notices."""

import copy

import pytest
import torch

from sentcompress.modeling.shortlist import Shortlist
from sentcompress.recipe import build_recipe
from sentcompress.testing import tiny_passages, tiny_sentence_lm

WITH = build_recipe({"name": "tiny", "graft": {"shortlist_rank": 8}}, [], "tests")


def test_the_loss_is_the_tokens_mean_surprise():
    torch.manual_seed(0)
    shortlist, weight = Shortlist(16, 2, 50, rank=4), torch.randn(50, 16)
    shortlist.start(weight, torch.arange(50))
    latents, ids = torch.randn(5, 2, 16), torch.randint(50, (5, 6))
    mask = torch.arange(6) < torch.tensor([6, 1, 3, 2, 5])[:, None]
    scores = shortlist.scores(latents, shortlist.table(weight)).log_softmax(1)
    expected = -torch.cat([scores[row, ids[row, mask[row]]] for row in range(5)]).mean()
    torch.testing.assert_close(shortlist.loss(latents, weight, ids, mask.long()), expected)


def test_before_it_has_learned_it_knows_which_tokens_are_frequent():
    weight, counts = torch.randn(50, 16), torch.randperm(1000)[:50]  # no two alike
    shortlist = Shortlist(16, 1, 50, rank=4)
    shortlist.start(weight, counts)
    shortlist.query[-1].weight.data.zero_()
    shortlist.query[-1].bias.data.zero_()
    picked = shortlist.pick(torch.randn(3, 1, 16), shortlist.table(weight), 10, always=int(counts.argmin()))
    assert (picked[:, 0] == counts.argmin()).all()  # the end mark, which no sentence may lack
    frequent = set(counts.topk(9).indices.tolist())
    assert all(set(row.tolist()) - {int(counts.argmin())} == frequent for row in picked)


def test_it_learns_the_tokens_of_each_sentence():
    model, batch = tiny_sentence_lm(recipe=WITH), tiny_passages()
    model.train()
    optimizer = torch.optim.Adam(model.shortlist.parameters(), lr=1e-2)
    for _ in range(200):
        loss = model(**batch).shortlist_loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.eval()
    out = model(**batch)
    assert out.shortlist_loss is None  # nobody asks for it outside training
    # Sentences 1 to 3 follow 0 in the first row; the cell before each predicts it.
    told = out.hidden_states[0, 1:4]
    picked = model.shortlist.pick(told, model.shortlist.table(model.vae.output_weight), 16, always=2)
    for row, sentence in enumerate((1, 2, 3)):
        tokens = batch["input_ids"][sentence][batch["attention_mask"][sentence].bool()]
        assert set(tokens.tolist()) <= set(picked[row].tolist())


@pytest.mark.parametrize("context", [0, 4])
def test_the_rest_learns_the_same(context):
    plain, batch = tiny_sentence_lm(vae={"decoder_context": context}), tiny_passages()
    model = tiny_sentence_lm(recipe=WITH, vae={"decoder_context": context})
    model.load_state_dict(plain.state_dict(), strict=False)
    for each in (plain, model):
        each.train()
        torch.manual_seed(3)  # the same dropout
        out = each(**copy.deepcopy(batch))
        (out.loss if out.shortlist_loss is None else out.loss + out.shortlist_loss).backward()
    gradients = {name: p.grad for name, p in plain.named_parameters()}
    for name, p in model.named_parameters():
        if name.startswith("shortlist."):
            assert p.grad is not None, name
        else:
            assert (p.grad is None) == (gradients[name] is None), name
            if p.grad is not None:
                torch.testing.assert_close(p.grad, gradients[name])


def test_it_is_saved_with_the_model(tmp_path):
    model = tiny_sentence_lm(recipe=WITH)
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path)
    for name, value in model.shortlist.state_dict().items():
        assert torch.equal(again.shortlist.state_dict()[name], value), name
