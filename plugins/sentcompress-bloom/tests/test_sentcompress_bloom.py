import pytest
import torch
from transformers import AutoConfig, BloomForCausalLM

from sentcompress.registry import get_registry

ADAPTER = get_registry().get("backbone", "bloom")


def causal(mask):
    """``[R, N]`` document numbers, 0 for padding, to ``[R, 1, N, N]``: the past of the same document."""
    same = (mask[:, :, None] == mask[:, None, :]) & (mask[:, :, None] > 0)
    return (same & torch.ones_like(same).tril())[:, None]


@pytest.fixture(params=ADAPTER.tiny_configs, ids=lambda shape: f"{shape['n_head']}-heads")
def model(request):
    torch.manual_seed(0)
    return BloomForCausalLM(AutoConfig.for_model(**request.param)).eval()


def hidden_states(model, documents):
    """The adapter's states for one row of document numbers, and the embeddings."""
    embeddings = torch.randn(1, len(documents), model.config.hidden_size)
    mask = causal(torch.tensor([documents]))
    unused = torch.zeros(1, len(documents), dtype=torch.long)
    with torch.no_grad():
        return ADAPTER.from_causal_lm(model)(embeddings, mask, unused)[0], embeddings


def library(model, embeddings):
    """The states of transformers, from a copy without an adapter."""
    fresh = BloomForCausalLM(model.config).eval()
    fresh.load_state_dict(model.state_dict())
    with torch.no_grad():
        return fresh.transformer(inputs_embeds=embeddings).last_hidden_state


def test_it_fulfils_the_contract_of_a_backbone(check_plugin):
    check_plugin("backbone", "bloom")


def test_a_row_of_one_document_is_as_in_the_library(model):
    got, embeddings = hidden_states(model, [1] * 9)
    torch.testing.assert_close(got, library(model, embeddings), atol=1e-5, rtol=0)


def test_packed_documents_and_gaps_are_as_if_alone(model):
    """transformers' own ALiBi gets this wrong: it counts positions along the row."""
    documents = [0, 1, 1, 1, 0, 2, 2, 0, 0, 2, 2]
    got, embeddings = hidden_states(model, documents)
    for number in (1, 2):
        own = torch.tensor(documents) == number
        torch.testing.assert_close(got[:, own], library(model, embeddings[:, own]), atol=1e-5, rtol=0)


def test_the_auto_adapter_would_not_do(model):
    """transformers cannot compute ALiBi from a four-dimensional mask; that is why this package exists."""
    fresh = BloomForCausalLM(model.config).eval()
    with pytest.raises(ValueError, match="unpack"):
        fresh.transformer(inputs_embeds=torch.randn(1, 3, 48), attention_mask=torch.zeros(1, 1, 3, 3))


@pytest.mark.parametrize(
    ("alias", "millions"), [("bloom-560m", 559), ("bloom-1.7b", 1722), ("bloom-7.1b", 7069)]
)
def test_published_shapes_have_as_many_parameters(alias, millions):
    with torch.device("meta"):
        shape = ADAPTER.published_configs[ADAPTER.aliases[alias]]
        size = BloomForCausalLM(AutoConfig.for_model(**shape)).num_parameters()
    assert round(size / 1e6) == millions


def test_aliases_are_names_on_the_hub():
    assert ADAPTER.aliases["bloom-560m"] == "bigscience/bloom-560m"
    assert set(ADAPTER.aliases.values()) == set(ADAPTER.published_configs)
