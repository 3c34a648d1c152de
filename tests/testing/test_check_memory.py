"""check_memory passes what is right and catches each way to be wrong, in one sentence."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from pydantic import Field
from torch import Tensor

from sentcompress.contracts import Memory, Options, Tokens
from sentcompress.registry import get_registry
from sentcompress.testing import CheckFailed, check_memory, check_plugin


class Right(Memory):
    """Keeps three sentences and recalls two by keys in 8 bits. Every wrong one differs in one thing."""

    class Options(Options):
        recent: int = Field(default=3, ge=0)

    recall = 2  # a class attribute will do

    def keep(self, tokens: Tokens) -> Any:
        return tokens.age <= self.options.recent

    def index(self, keys: Tensor) -> Any:
        scale = keys.abs().amax(-1, keepdim=True).clamp(min=1e-6) / 127
        return torch.round(keys / scale).to(torch.int8)

    def scores(self, queries: Tensor, index: Tensor) -> Any:
        return queries.float() @ index.float().transpose(-1, -2)


class Numbers(Right):
    def keep(self, tokens: Tokens) -> Any:
        return tokens.age.clamp(max=3) - 3


class Listed(Right):
    def keep(self, tokens: Tokens) -> Any:
        return (tokens.age <= 3).tolist()


class Once(Right):
    def keep(self, tokens: Tokens) -> Any:
        return super().keep(tokens)[..., :1].repeat_interleave(2, -1)


class Budget(Right):
    """Leaks: how many others there are decides about a token."""

    def keep(self, tokens: Tokens) -> Any:
        return tokens.position >= tokens.position.max() - 20


class Neighbour(Right):
    def keep(self, tokens: Tokens) -> Any:
        return super().keep(tokens) & (tokens.ids >= tokens.ids.roll(1, -1))


class Sampled(Right):
    def keep(self, tokens: Tokens) -> Any:
        return torch.rand(tokens.age.shape) < 0.5


class Seeded(Right):
    """Each instance draws its own tokens."""

    def __init__(self, options: Any | None = None) -> None:
        super().__init__(options)
        self.chosen = torch.rand(10_000) < 0.5

    def keep(self, tokens: Tokens) -> Any:
        return self.chosen[tokens.position % 10_000]


class Counts(Right):
    """Keeps less each time it is asked."""

    asked = 0

    def keep(self, tokens: Tokens) -> Any:
        self.asked += 1
        return tokens.age <= 4 - self.asked


class Returns(Right):
    """Forgets a sentence and has it back later."""

    def keep(self, tokens: Tokens) -> Any:
        return tokens.age % 8 < 4


class Far(Right):
    def keep(self, tokens: Tokens) -> Any:
        return (tokens.distance <= 50) | (tokens.distance > 1_000)


class Table(Right):
    def keep(self, tokens: Tokens) -> Any:
        return torch.ones(200, dtype=torch.bool)[tokens.age]


class InPlace(Right):
    def keep(self, tokens: Tokens) -> Any:
        return tokens.age.sub_(1) < 3


class Loops(Right):
    def keep(self, tokens: Tokens) -> Any:
        return torch.tensor([int(age) <= 3 for age in tokens.age])


class Nothing(Memory):
    pass


class Half(Right):
    recall: Any = 2.5


class Few(Right):
    candidates = 1


class NoIndex(Memory):
    recall = 1


class PerSentence(Right):
    """One row for all keys: which token of the sentence it was is lost."""

    def index(self, keys: Tensor) -> Any:
        return keys.mean(2, keepdim=True)


class Large(Right):
    def index(self, keys: Tensor) -> Any:
        return torch.cat([keys, keys], -1)


class SharedScale(Right):
    """Rounds to 4 bits with one scale for all keys."""

    def index(self, keys: Tensor) -> Any:
        scale = keys.abs().amax().clamp(min=1e-6) / 7
        return torch.round(keys / scale).to(torch.int8)


class Centred(Right):
    def index(self, keys: Tensor) -> Any:
        return super().index(keys - keys.mean((0, 2), keepdim=True))


class NoScale(Right):
    """Divides by the largest value, which may be 0."""

    def index(self, keys: Tensor) -> Any:
        return keys / keys.abs().amax(-1, keepdim=True)


class ChangesKeys(Right):
    def index(self, keys: Tensor) -> Any:
        return super().index(keys.div_(2))


class Softmax(Right):
    def scores(self, queries: Tensor, index: Tensor) -> Any:
        return super().scores(queries, index).softmax(-1)


class Ranks(Right):
    def scores(self, queries: Tensor, index: Tensor) -> Any:
        return super().scores(queries, index).argsort(-1).argsort(-1)


class MeanQuery(Right):
    def scores(self, queries: Tensor, index: Tensor) -> Any:
        return super().scores(queries + queries.mean(2, keepdim=True), index)


class Sums(Right):
    def scores(self, queries: Tensor, index: Tensor) -> Any:
        return super().scores(queries, index).sum(2)


class Bfloat(Right):
    def index(self, keys: Tensor) -> Any:
        return keys.bfloat16() @ torch.eye(keys.shape[-1])


class Blind(Right):
    """Finds nothing: what it scores has nothing to do with the key."""

    def index(self, keys: Tensor) -> Any:
        return torch.ones_like(keys[..., :1])

    def scores(self, queries: Tensor, index: Tensor) -> Any:
        return queries.sum(-1, keepdim=True) @ index.transpose(-1, -2)


class Backwards(Right):
    def scores(self, queries: Tensor, index: Tensor) -> Any:
        return -super().scores(queries, index)


WRONG: dict[type, str] = {
    Numbers: r"returns int64 from keep for \[\d+\] tokens; bool that broadcasts to \[\d+\] is expected",
    Listed: r"returns list from keep for",
    Once: r"returns the shape \[2\] from keep for \[\d+\] tokens",
    Budget: r"drops token 0 of a sentence of 7, position 0, age 24, but not when it is asked about alone; what is kept "
    "may depend only on the token itself",
    Neighbour: r"(keeps|drops) token \d+ of .*, but not when it is asked about alone",
    Sampled: r"(keeps|drops) token \d+ of .*, but not the second time; equal tokens must give equal results",
    Seeded: r"(keeps|drops) token \d+ of .*, but not by a new instance",
    Counts: r"keeps token \d+ of .*, but not the second time",
    Returns: r"drops token 0 of a sentence of 7, .* at age 7, but keeps it at age 8; a token that was dropped cannot",
    Far: r"drops token \d+ of a sentence of .* at age \d+, but keeps it at age",
    Table: r"keep for \[18, \d+\] tokens with ages up to 100,000 raised IndexError: .*\(test_check_memory.py:\d+\)",
    InPlace: r"changes its input tokens.age; it must work on copies",
    Loops: r"keep for \[2, 1, \d+\] tokens \(two texts\) raised (ValueError|RuntimeError)",
    Nothing: r"keeps no token and recalls no sentence; it must override keep, or recall at least one",
    Half: r"has recall 2.5; the property must be a number of sentences",
    Few: r"has 1 candidates for 2 recalled sentences; there must be at least as many candidates",
    NoIndex: r"index of keys \[2, 3, 200, 64\] float32 raised NotImplementedError: NoIndex recalls sentences, so it",
    PerSentence: r"returns the shape \[2, 3, 1, 64\] from index .*; \[B, heads, T, C\] = \[2, 3, 200, 'C'\] is",
    Large: r"has an index of 512 bytes for a key of 256 \(float32\); an index must not be larger than the keys",
    SharedScale: r"scores keys differently that were indexed in two parts than at once \(by up to .*\); each row of",
    Centred: r"scores keys differently that were indexed in two parts",
    NoScale: r"returns NaN or infinity from scores for queries .* float32 and 3 keys, one of them zeros; scores must",
    ChangesKeys: r"changes its input keys; it must work on copies",
    Softmax: r"scores a key differently alone than among others \(by up to",
    Ranks: r"returns int64 from scores for queries \[2, 3, 20, 64\] float32 and 200 keys; \[B, heads, Q, T\] = ",
    MeanQuery: r"scores differently for a query alone than among others",
    Sums: r"returns the shape \[2, 3, 200\] from scores for",
    Bfloat: r"index of keys .* float32 raised RuntimeError: .* \(test_check_memory.py:\d+\)",
    Blind: r"finds a key that equals the query for 0% of the queries \(among the best 10% of 200 random keys\)",
    Backwards: r"finds a key that equals the query for 0% of the queries",
}


@pytest.mark.parametrize("wrong", WRONG, ids=lambda cls: cls.__name__)
def test_a_wrong_memory_is_caught_in_one_sentence(wrong: type[Memory]) -> None:
    with pytest.raises(CheckFailed, match=WRONG[wrong]) as caught:
        check_memory(wrong)
    said = str(caught.value)
    assert said.startswith(f"memory {wrong.__module__}.{wrong.__qualname__}")
    assert "\n" not in said
    assert len(said) < 500


@pytest.mark.parametrize("name", get_registry().names("memory"))
def test_every_memory_that_is_installed_passes(name: str) -> None:
    check_plugin("memory", name)


def test_options_width_and_the_random_numbers_of_the_caller() -> None:
    torch.manual_seed(3)
    expected = torch.randn(4)
    torch.manual_seed(3)
    check_memory(Right, {"recent": 0}, head_size=16)
    check_plugin("memory", "window", {"recent_sentences": 0, "sinks": 0})
    check_plugin("memory", "window", {"recent_tokens": 30})
    check_plugin("memory", "window", {"recent_share": 0.2})
    assert torch.equal(torch.randn(4), expected)
    with pytest.raises(
        CheckFailed, match=r"refuses the options of this check: options.entries: .* \(got 0\)"
    ):
        check_plugin("memory", "entries", {"entries": 0})


def test_a_memory_may_use_the_tokenizer() -> None:
    class Digits(Right):
        def prepare(self, tokenizer: Any) -> None:
            self.digits = torch.tensor(
                [id_ for token, id_ in tokenizer.get_vocab().items() if token.isdigit()]
            )

        def keep(self, tokens: Tokens) -> Any:
            return torch.isin(tokens.ids, self.digits)

    check_memory(Digits)
