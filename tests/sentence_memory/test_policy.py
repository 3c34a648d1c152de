"""Combinations of memories, and memories of strangers that break their contract, stopped before text is wrong."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from sentcompress.contracts import Memory, Tokens
from sentcompress.errors import InputError, PluginError
from sentcompress.sentence_memory.policy import Policy


class Leaky(Memory):
    """How many others there are decides about a token."""

    def keep(self, tokens: Tokens) -> Tensor:
        return tokens.position >= tokens.position.max() - 20


class Forgetful(Memory):
    """Drops sentences and has them back later."""

    def keep(self, tokens: Tokens) -> Tensor:
        return tokens.age % 16 < 8


class Numbers(Memory):
    def keep(self, tokens: Tokens) -> Any:
        return tokens.age


class Fails(Memory):
    def keep(self, tokens: Tokens) -> Any:
        return self.table[tokens.ids]


class Unprepared(Memory):
    def prepare(self, tokenizer: Any) -> None:
        self.digits = tokenizer.digits


class Pooled(Memory):
    recall = 2

    def index(self, keys: Tensor) -> Any:
        return keys.mean(2)

    def scores(self, queries: Tensor, index: Tensor) -> Any:
        return queries.sum(-1)


@pytest.mark.parametrize(
    ("wrong", "reason"),
    [
        (Leaky, r"keeps a token or drops it depending on what else it is asked about"),
        (Forgetful, r"keeps a token again that it has dropped"),
        (Numbers, r"returned torch.int64 \[60\] from keep where booleans are expected"),
        (Fails, r"failed in keep: AttributeError: 'Fails' object has no attribute 'table'"),
        (Unprepared, r"failed in prepare: AttributeError"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_memory_that_breaks_its_contract_is_stopped(wrong: type[Memory], reason: str):
    with pytest.raises(
        PluginError, match=rf"^memory {wrong.__module__}\.{wrong.__name__} {reason}"
    ) as caught:
        Policy({"mine": wrong()}).prepare(None)
    assert "check_memory" in caught.value.fix


def test_an_index_and_scores_of_another_shape_are_stopped():
    policy = Policy({"mine": Pooled()})
    policy.prepare(None)
    with pytest.raises(
        PluginError, match=r"returned torch.float32 \[1, 2, 8\] from index where \[1, 2, 5, 'C'\]"
    ):
        policy.index(torch.randn(1, 2, 5, 8))
    with pytest.raises(PluginError, match=r"returned .* from scores where \[1, 2, 3, 5\] is expected"):
        policy.scores(torch.randn(1, 2, 3, 8), torch.randn(1, 2, 5, 8))


def test_what_any_of_them_keeps_is_kept():
    tokens = Tokens(*torch.tensor([[5, 6, 7], [0, 1, 9], [4, 4, 2], [0, 1, 0], [1, 0, 3], [30, 30, 9]]))
    parts = Policy.parse("window + entries", {"recent_sentences": 2, "sinks": 0, "entries": 1})
    assert parts.name == "window+entries"
    assert parts.keep(tokens).tolist() == [False, True, True]
    assert parts.recall == 0
    again = Policy.parse(parts.name, parts.options)
    assert again.options == parts.options
    assert Policy.parse("window+recall", {"recall": 3}).recall == 3


def test_combinations_that_cannot_be():
    for name in ("", "window+", "+", "window+window"):
        with pytest.raises(InputError, match="not a list of different memories"):
            Policy.parse(name)
    with pytest.raises(InputError, match=r"has no option 'entris'\. Did you mean 'entries'\?"):
        Policy.parse("window+entries", {"entris": 2})
