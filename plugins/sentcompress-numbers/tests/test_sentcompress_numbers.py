import pytest
import torch

from sentcompress import Tokens
from sentcompress.errors import RecipeError
from sentcompress.registry import get_registry
from sentcompress.testing import tiny_tokenizer


def numbers(**options):
    memory = get_registry().create("memory", "numbers", options)
    memory.prepare(tiny_tokenizer())
    return memory


def kept(memory, text, age=1):
    """The tokens of one sentence that are kept, as text."""
    ids = torch.tensor(tiny_tokenizer()(text)["input_ids"])
    place = torch.arange(len(ids))
    older = torch.full_like(ids, age)
    tokens = Tokens(ids, place, age=older, offset=place, behind=place.flip(0), distance=older * len(ids))
    return [tiny_tokenizer().decode([i]) for i in ids[memory.keep(tokens)].tolist()]


@pytest.mark.parametrize("ends", [0, 1, 3])
def test_it_fulfils_the_contract_of_a_memory(check_plugin, ends):
    check_plugin("memory", "numbers", options={"ends": ends})


def test_every_digit_is_kept_however_old():
    for age in (1, 50, 10_000):
        assert "".join(kept(numbers(ends=0), "It cost 4,731 dollars in 1862.", age)) == "47311862"
        assert kept(numbers(ends=0), "It cost nothing.", age) == []


def test_ends_are_kept_and_short_sentences_whole():
    whole = [tiny_tokenizer().decode([i]) for i in tiny_tokenizer()("So be it, always.")["input_ids"]]
    assert kept(numbers(ends=1), "So be it, always.") == [whole[0], whole[-1]]
    assert kept(numbers(ends=len(whole)), "So be it, always.") == whole


def test_bytes_and_names_of_special_tokens_are_no_numbers():
    class Vocabulary:
        def get_vocab(self):
            return {"<0x0A>": 0, "<unused7>": 1, "\u012012": 2, "3rd": 3, "\u00b2": 4, "\u2581x": 5}

    memory = get_registry().create("memory", "numbers", {})
    memory.prepare(Vocabulary())
    assert memory.digits.tolist() == [2, 3]


def test_a_negative_number_of_ends_is_refused():
    with pytest.raises(RecipeError, match=r"ends.*greater than or equal to 0"):
        numbers(ends=-1)
