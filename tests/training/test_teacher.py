"""A token-level teacher: its predictions are aligned with the tokens, and the graft moves towards them."""

import pytest
import torch

from sentcompress.errors import InputError
from sentcompress.modeling.losses import TokenLoss
from sentcompress.testing import tiny_opt, tiny_passages, tiny_sentence_lm
from sentcompress.training.teacher import Teacher

PASSAGES = [(0, 1, 2, 3), (4, 5), (6, 7, 8)]
BOS = 2


def texts(batch):
    ids, mask = batch["input_ids"], batch["attention_mask"].bool()
    return [(sentences, torch.cat([ids[s][mask[s]] for s in sentences])) for sentences in PASSAGES]


@pytest.mark.parametrize("positions", [512, 8], ids=["whole passages", "cut where the teacher ends"])
@torch.no_grad()
def test_it_predicts_what_the_llm_predicts(positions):
    lm, batch = tiny_opt(max_position_embeddings=positions), tiny_passages()
    teaching = Teacher(lm, 500, BOS, share=0.5).teach(batch)
    mask = batch["attention_mask"].bool()
    for sentences, tokens in texts(batch):
        predicted = torch.cat([teaching.states[s][mask[s]] for s in sentences]) @ teaching.weight.t()
        expected = []
        for piece in tokens.split(positions):
            read = torch.cat([torch.tensor([BOS]), piece[:-1]])[None]
            expected.append(lm(input_ids=read).logits[0])
        torch.testing.assert_close(predicted, torch.cat(expected), atol=1e-4, rtol=1e-4)


def test_the_loss_moves_towards_the_teacher_and_the_nll_does_not():
    """With all of the share the loss is the cross-entropy to its distribution; NLL stays that of the text."""
    model, batch = tiny_sentence_lm(vae={"decoder_context": 4}), tiny_passages()
    loss = TokenLoss(0.0)
    plain = model(**batch, token_loss=loss)
    lm = tiny_opt(seed=3)
    half, whole = (Teacher(lm, 500, BOS, share).teach(batch) for share in (0.5, 1.0))
    taught = model(**batch, token_loss=loss, teaching=whole)
    torch.testing.assert_close(taught.sentence_nll, plain.sentence_nll, atol=1e-4, rtol=1e-4)
    assert torch.equal(taught.targets, plain.targets)
    between = model(**batch, token_loss=loss, teaching=half).loss
    assert between.item() == pytest.approx((taught.loss.item() + plain.loss.item()) / 2, abs=1e-4)

    # Learning from a teacher that is sure of one token teaches that token.
    sure = Teacher(tiny_opt(), 500, BOS, 1.0).teach(batch)
    sure.states.zero_()
    sure.states[..., 0] = 1
    sure.weight.data.zero_()
    sure.weight.data[7, 0] = 50
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(40):
        last = model(**batch, token_loss=loss, teaching=sure).loss
        optimizer.zero_grad()
        last.backward()
        optimizer.step()
    assert last.item() < 1.0


def test_a_teacher_that_does_not_fit_is_refused():
    with pytest.raises(
        InputError, match=r"graft\.teacher: it has 500 tokens, but the model that it teaches has 600"
    ):
        Teacher(tiny_opt(), 600, BOS, 0.5)
    scaled = tiny_opt()
    scaled.register_forward_hook(lambda _, __, output: setattr(output, "logits", output.logits * 2))
    with pytest.raises(InputError, match=r"graft\.teacher: the logits of opt are not"):
        Teacher(scaled, 500, BOS, 0.5)
