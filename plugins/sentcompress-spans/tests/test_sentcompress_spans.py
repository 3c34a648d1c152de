import pytest
import torch

from sentcompress.errors import RecipeError
from sentcompress.registry import get_registry


def spans(latents, width=2):
    return get_registry().create("fusion", "spans", {"latents": latents}, hidden_size=width)


def pooled(latents, rows):
    """What is averaged, before the norm."""
    fusion = spans(latents, len(rows[0]))
    fusion.norm = torch.nn.Identity()
    return fusion(torch.tensor([rows]), torch.ones(1, len(rows), dtype=torch.bool))[0].tolist()


@pytest.mark.parametrize("latents", [1, 3, 8])
def test_it_fulfils_the_contract_of_a_fusion(check_plugin, latents):
    check_plugin("fusion", "spans", options={"latents": latents})


def test_each_span_is_averaged():
    rows = [[1.0, 0.0], [3.0, 0.0], [5.0, 2.0], [7.0, 4.0]]
    assert pooled(2, rows) == [[2.0, 0.0], [6.0, 3.0]]
    assert pooled(4, rows) == rows
    assert pooled(1, rows) == [[4.0, 1.5]]


def test_spans_of_a_short_sentence_overlap():
    assert pooled(4, [[1.0], [5.0]]) == [[1.0], [1.0], [5.0], [5.0]]
    assert pooled(3, [[2.0]]) == [[2.0], [2.0], [2.0]]
    assert pooled(2, [[1.0], [2.0], [6.0]]) == [[1.5], [4.0]]


def test_padding_on_either_side_changes_nothing():
    fusion, rows = spans(3, 8), torch.randn(1, 7, 8)
    alone = fusion(rows, torch.ones(1, 7, dtype=torch.bool))
    for left, right in ((0, 3), (3, 0), (2, 2)):
        noise = 1e3 * torch.randn(1, left + 7 + right, 8)
        noise[:, left : left + 7] = rows
        mask = torch.zeros(1, left + 7 + right, dtype=torch.bool)
        mask[:, left : left + 7] = True
        torch.testing.assert_close(fusion(noise, mask), alone)


def test_the_order_of_the_text_is_kept_which_a_mean_forgets():
    rows, whole = torch.randn(1, 6, 8), torch.ones(1, 6, dtype=torch.bool)
    assert torch.allclose(spans(1, 8)(rows, whole), spans(1, 8)(rows.flip(1), whole), atol=1e-6)
    assert not torch.allclose(spans(2, 8)(rows, whole), spans(2, 8)(rows.flip(1), whole), atol=1e-2)


def test_no_latents_are_refused():
    with pytest.raises(RecipeError, match=r"latents.*greater than or equal to 1"):
        spans(0)
