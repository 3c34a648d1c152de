"""``decoder_context``: the decoder sees the text before the sentence, as far as it is told and no further."""

import pytest
import torch

from sentcompress.generation.conditioned_text import ConditionedText
from sentcompress.generation.sentence_writer import SentenceWriter
from sentcompress.modeling.losses import TokenLoss
from sentcompress.modeling.sentence_lm import SentenceLM
from sentcompress.testing import tiny_passages, tiny_sentence_lm, tiny_vae

CONTEXT = 6
LENGTHS = (7, 4, 6, 5, 3)


def text(seed=0):
    mask = torch.arange(max(LENGTHS)) < torch.tensor(LENGTHS)[:, None]
    ids = torch.randint(4, 490, mask.shape, generator=torch.Generator().manual_seed(seed))
    return ids.masked_fill(~mask, 1), mask.long()


@torch.no_grad()
def nats(vae, ids, mask, streams=None):
    latents = torch.randn(len(ids), 1, 32, generator=torch.Generator().manual_seed(1))
    return vae.decode_nll(latents, ids, mask, TokenLoss(0.0), streams)[1]


@pytest.mark.parametrize("conditioning", ["cross-attention", "add", "prefix"])
def test_it_sees_its_own_text_only_and_only_so_far(conditioning):
    vae = tiny_vae(decoder_context=CONTEXT, decoder_layers=1, conditioning=conditioning)
    ids, mask = text()
    together = torch.zeros(5, dtype=torch.long)
    before = nats(vae, ids, mask, together)

    last = ids.clone()
    last[2, LENGTHS[2] - 1] += 1  # the last token before sentence 3
    moved = (nats(vae, last, mask, together) - before).abs()
    assert moved[3] > 0, "the token before the sentence was not seen"
    assert moved[:2].max() == 0, "a later token was seen"

    early = ids.clone()
    early[1, 0] += 1  # further than the context from sentence 3 and its one block
    moved = (nats(vae, early, mask, together) - before).abs()
    assert moved[2] > 0
    assert moved[3:].max() == 0, "something beyond the context was seen"

    apart = torch.tensor([0, 0, 0, 1, 1])
    assert torch.equal(nats(vae, last, mask, apart)[3:], nats(vae, ids, mask, apart)[3:])
    alone = nats(vae, ids, mask)
    assert torch.allclose(alone[0], before[0], atol=1e-5)
    assert not torch.allclose(alone[1:], before[1:], atol=1e-3)


def test_blocks_reach_as_far_as_is_said():
    """A change in the first sentence that counts as read moves the next one, a change before it does not."""
    vae = tiny_vae(decoder_context=CONTEXT, decoder_layers=2, conditioning="prefix")
    ids, mask = text()
    read = vae.decoder.sentences_read(LENGTHS[:4])
    assert 1 < read < 4
    together = torch.zeros(5, dtype=torch.long)
    before = nats(vae, ids, mask, together)[4]
    for sentence in range(4):
        changed = ids.clone()
        changed[sentence, : LENGTHS[sentence]] += 1
        moved = float((nats(vae, changed, mask, together)[4] - before).abs())
        assert (moved > 0) == (sentence >= 4 - read), sentence


@pytest.mark.parametrize("start", [True, False])
@torch.no_grad()
def test_the_training_forward_charges_what_the_writer_computes(start):
    """Sentence by sentence from a carried context, with and without the cache."""
    vae = {
        "decoder_context": CONTEXT,
        "decoder_layers": 2,
        "conditioning": "prefix",
        "unpack_size": 6,
        "embedding_multiplier": 3.0,
    }
    model = tiny_sentence_lm(vae=vae)
    model.config.start_latent = start
    ids, mask = text()
    cells = ([-2] if start else []) + list(range(5))
    output = model(
        ids,
        mask,
        sentence_index=torch.tensor([cells]),
        passage_ids=torch.zeros(1, len(cells), dtype=torch.long),
        scored=torch.ones(5, dtype=torch.bool),
        last=torch.zeros(5, dtype=torch.bool),
        token_loss=TokenLoss(0.0),
    )
    states = output.hidden_states[0]
    sentences = [row[:n].tolist() for row, n in zip(ids, LENGTHS, strict=True)]
    told = states[:-1] if start else torch.cat([torch.zeros_like(states[:1]), states[:-1]])
    writer = SentenceWriter(model.vae, use_cache=False)
    for number in range(1, 5):
        writer.read([ConditionedText(sentences[:number], told[:number])])
        charged = 0.0
        for at, token in enumerate([*sentences[number], model.config.eos_token_id]):
            hidden = writer.last_hidden(told[number][None], [sentences[number][:at]])
            charged -= float(model.vae.logits(hidden)[0].log_softmax(-1)[token])
        assert charged == pytest.approx(float(output.sentence_nll[number]), abs=1e-3)


def test_sentences_carried_over_are_read_but_not_charged():
    model = tiny_sentence_lm(vae={"decoder_context": CONTEXT})
    batch = tiny_passages()
    with torch.no_grad():
        before = model(**batch)
        batch["input_ids"] = batch["input_ids"].clone()
        batch["input_ids"][6] = (batch["input_ids"][6] + 7).clamp_max(499)  # the context of a later passage
        after = model(**batch)
    assert before.targets[6] == after.targets[6] == 0
    assert not torch.equal(before.sentence_nll[7], after.sentence_nll[7])
    assert torch.equal(before.sentence_nll[:6], after.sentence_nll[:6])


def test_it_learns_saves_and_loads(tmp_path):
    model = tiny_sentence_lm(vae={"decoder_context": CONTEXT, "conditioning": "prefix"}).train()
    model(**tiny_passages()).loss.backward()
    assert all(p.grad is not None for p in model.vae.decoder.blocks.parameters())
    model.eval().save_pretrained(tmp_path)
    loaded = SentenceLM.from_pretrained(tmp_path).eval()
    assert loaded.vae.decoder.context == CONTEXT
    with torch.no_grad():
        assert torch.equal(loaded(**tiny_passages()).sentence_nll, model(**tiny_passages()).sentence_nll)
