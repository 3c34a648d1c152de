"""check_memory: what is kept depends on the token alone and never returns; the index finds what a query looks for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor

from sentcompress.contracts import Memory, Tokens
from sentcompress.testing.checks import Subject, shown
from sentcompress.testing.texts import tiny_tokenizer

_LENGTHS = (7, 1, 12, 4, 2, 1, 30, 5, 3, 9)
"""Tokens of the sentences, the first of the text first; repeated for a longer text."""
_AGES = (1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 31, 32, 33, 64, 100, 1_000, 100_000)
_HEADS = 3
"""Key-value heads of the keys that are indexed."""
_STORED = 200
"""Keys that are indexed."""
_FOUND, _TOP = 0.5, 0.1
"""For this share of the queries, the key that equals the query must be in this top share of all keys."""
_ODD = 0.02
"""Share of the scores that may differ when keys are indexed in other parts: rounding may flip a bit of the index."""


def check_memory(
    cls: type[Memory], options: Any | None = None, *, head_size: int = 64, tokenizer: Any | None = None
) -> None:
    """Check that a memory fulfils its contract.

    ``keep`` must return booleans that broadcast to its tokens, the same ones each time, for a token alone or among
    others, and must not keep at a higher age what it drops at a lower one. With ``recall``, ``candidates`` must be at
    least as many. A key must be indexed and scored the same alone or among others. Scores must be finite, in fp32 and
    bf16, and a key that equals the query must be among the best tenth for at least half of the queries. Inputs must
    stay unchanged.

    Args:
        options: raw options or an ``Options`` instance.
        head_size: width ``D`` of keys and queries.
        tokenizer: prepares the memory; a tiny byte-level one by default.

    Raises:
        CheckFailed: says in one sentence what is wrong.
    """
    __tracebackhide__ = True
    subject = Subject("memory", cls, options)
    tokenizer = tokenizer or tiny_tokenizer()

    def build() -> Memory:
        memory: Memory = subject.build()
        subject.call("prepare(tokenizer)", lambda: memory.prepare(tokenizer))
        return memory

    memory = build()
    recalled = _counts(subject, memory)
    if not recalled and cls.keep is Memory.keep:
        subject.fail(
            "keeps no token and recalls no sentence", "it must override keep, or recall at least one"
        )
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        _keep(subject, memory, build, len(tokenizer))
        if recalled:
            _recall(subject, memory, build, head_size)


def _counts(subject: Subject, memory: Memory) -> int:
    counts = {}
    for name in ("recall", "candidates"):
        counts[name] = subject.call(name, lambda name=name: getattr(memory, name))  # type: ignore[misc]
        if isinstance(counts[name], bool) or not isinstance(counts[name], int) or counts[name] < 0:
            subject.fail(f"has {name} {shown(counts[name])}", "the property must be a number of sentences")
    if counts["candidates"] < counts["recall"]:
        subject.fail(
            f"has {counts['candidates']} candidates for {counts['recall']} recalled sentences",
            "there must be at least as many candidates as are recalled",
        )
    return int(counts["recall"])


# ---- keep


def _text(vocabulary: int, sentences: int) -> Tokens:
    """All tokens of a text of ``sentences`` sentences, as the sentence after its end sees them: ``[T]`` each."""
    lengths = [_LENGTHS[n % len(_LENGTHS)] for n in range(sentences)]
    offset = torch.cat([torch.arange(n) for n in lengths])
    return Tokens(
        ids=torch.randint(vocabulary, offset.shape),
        position=torch.arange(len(offset)),
        age=torch.cat([torch.full((n,), sentences - number) for number, n in enumerate(lengths)]),
        offset=offset,
        behind=torch.cat([torch.arange(n - 1, -1, -1) for n in lengths]),
        distance=len(offset) - torch.arange(len(offset)) + offset,
    )


def _each(tokens: Tokens, change: Callable[[Tensor], Tensor], **others: Tensor) -> Tokens:
    return Tokens(**{f.name: change(getattr(tokens, f.name)) for f in fields(Tokens)} | others)


def _kept(subject: Subject, memory: Memory, tokens: Tokens, how: str = "") -> Tensor:
    shape = torch.broadcast_shapes(*(getattr(tokens, f.name).shape for f in fields(Tokens)))
    what = f"{list(shape)} tokens{how}"
    given = _each(tokens, Tensor.clone)
    kept = subject.call(f"keep for {what}", lambda: memory.keep(given))
    promise = f"bool that broadcasts to {list(shape)} is expected"
    if not isinstance(kept, Tensor) or kept.dtype != torch.bool:
        found = kept.dtype if isinstance(kept, Tensor) else type(kept).__name__
        subject.fail(f"returns {str(found).removeprefix('torch.')} from keep for {what}", promise)
    try:
        kept = kept.broadcast_to(shape)
    except RuntimeError:
        subject.fail(f"returns the shape {list(kept.shape)} from keep for {what}", promise)
    changed = [f.name for f in fields(Tokens) if not getattr(given, f.name).equal(getattr(tokens, f.name))]
    if changed:
        subject.fail(f"changes its input tokens.{changed[0]}", "it must work on copies")
    return kept


def _keep(subject: Subject, memory: Memory, build: Callable[[], Memory], vocabulary: int) -> None:
    tokens = _text(vocabulary, 24)
    kept = _kept(subject, memory, tokens)
    order = torch.randperm(len(kept))
    reordered = kept[order]

    def same(other: Tensor, expected: Tensor, how: str, promise: str) -> None:
        wrong = (other != expected).nonzero().flatten()
        if len(wrong):
            n = order[wrong[0]] if expected is reordered else wrong[0]
            token = _each(tokens, lambda part: part[n])
            was = "keeps" if expected[wrong[0]] else "drops"
            subject.fail(f"{was} {_named(token)}, but not {how}", promise)

    equal = "equal tokens must give equal results"
    _kept(subject, memory, _text(vocabulary, 3), " of a short text")
    same(_kept(subject, memory, tokens), kept, "the second time", equal)
    same(_kept(subject, build(), tokens), kept, "by a new instance", equal)
    parts = (getattr(tokens, f.name).split(1) for f in fields(Tokens))
    alone = [_kept(subject, memory, Tokens(*each)) for each in zip(*parts, strict=True)]
    itself = "what is kept may depend only on the token itself and on its place in its sentence"
    same(torch.cat(alone), kept, "when it is asked about alone", itself)
    shuffled = _kept(subject, memory, _each(tokens, lambda part: part[order]), " in another order")
    same(shuffled, reordered, "in another order", itself)
    other = _text(vocabulary, 25)  # a batch whose texts differ
    rows = {
        f.name: torch.stack([getattr(t, f.name)[: len(kept)] for t in (tokens, other)])
        for f in fields(Tokens)
    }
    batch = _kept(
        subject, memory, Tokens(**{name: row[:, None] for name, row in rows.items()}), " (two texts)"
    )
    same(batch[0, 0], kept, "in a batch of texts", itself)
    _kept(subject, memory, _each(tokens, lambda part: part[:0]), " (no token)")
    _kept(subject, memory, _each(tokens, lambda part: part, age=1 - tokens.age), " with ages of 0 and less")

    age = torch.tensor(_AGES)[:, None]
    ages = _each(tokens, lambda part: part, age=age, distance=tokens.distance + 9 * (age - 1))
    by_age = _kept(subject, memory, ages, f" with ages up to {_AGES[-1]:,}")
    back = (by_age[1:] & ~by_age[:-1]).nonzero()
    if len(back):
        n, token = back[0].tolist()
        subject.fail(
            f"drops {_named(_each(tokens, lambda part: part[token]))} at age {_AGES[n]}, but keeps it at age "
            f"{_AGES[n + 1]}",
            "a token that was dropped cannot return",
        )
    _kept(subject, memory, _each(ages, lambda part: part, position=ages.position + 10**7), " far into a text")


def _named(token: Tokens) -> str:
    """``token 3 of a sentence of 7, position 40, age 5``."""
    length = int(token.offset) + int(token.behind) + 1
    return f"token {int(token.offset)} of a sentence of {length}, position {int(token.position)}, age {int(token.age)}"


# ---- recall


def _index(subject: Subject, memory: Memory, keys: Tensor) -> Tensor:
    given, dtype = keys.clone(), str(keys.dtype).removeprefix("torch.")
    index = subject.call(f"index of keys {list(keys.shape)} {dtype}", lambda: memory.index(given))
    what = f"from index for keys {list(keys.shape)} {dtype}"
    promise = f"[B, heads, T, C] = {[*keys.shape[:3], 'C']} is expected"
    if not isinstance(index, Tensor):
        subject.fail(f"returns {type(index).__name__} {what}", promise)
    if index.dim() != 4 or index.shape[:3] != keys.shape[:3]:
        subject.fail(f"returns the shape {list(index.shape)} {what}", promise)
    if index.nbytes > keys.nbytes:
        size = index.nbytes / keys[..., 0].numel()
        subject.fail(
            f"has an index of {size:g} bytes for a key of {keys.shape[3] * keys.element_size()} ({dtype})",
            "an index must not be larger than the keys",
        )
    if not given.equal(keys):
        subject.fail("changes its input keys", "it must work on copies")
    return index


def _scores(subject: Subject, memory: Memory, queries: Tensor, index: Tensor, how: str = "") -> Tensor:
    given, given_index, dtype = queries.clone(), index.clone(), str(queries.dtype).removeprefix("torch.")
    what = f"for queries {list(queries.shape)} {dtype} and {index.shape[2]} keys{how}"
    scores = subject.call(f"scores {what}", lambda: memory.scores(given, given_index))
    shape = [*queries.shape[:3], index.shape[2]]
    promise = f"[B, heads, Q, T] = {shape} of a floating-point type is expected"
    if not isinstance(scores, Tensor):
        subject.fail(f"returns {type(scores).__name__} from scores {what}", promise)
    if list(scores.shape) != shape:
        subject.fail(f"returns the shape {list(scores.shape)} from scores {what}", promise)
    if not scores.is_floating_point():
        subject.fail(f"returns {str(scores.dtype).removeprefix('torch.')} from scores {what}", promise)
    if not scores.isfinite().all():
        subject.fail(f"returns NaN or infinity from scores {what}", "scores must be finite")
    if not (given.equal(queries) and given_index.equal(index)):
        changed = "queries" if not given.equal(queries) else "index"
        subject.fail(f"changes its input {changed}", "it must work on copies")
    return scores.float()


def _recall(subject: Subject, memory: Memory, build: Callable[[], Memory], head_size: int) -> None:
    keys = torch.randn(2, _HEADS, _STORED, head_size)
    queries = keys[:, :, torch.randperm(_STORED)[:20]]
    index = _index(subject, memory, keys)
    scores = _scores(subject, memory, queries, index)
    equal = "equal keys and queries must give equal scores"
    _index(subject, memory, torch.randn(1, _HEADS, 9, head_size))
    for other, how in ((memory, "the second time"), (build(), "from a new instance")):
        again = _scores(subject, other, queries, _index(subject, other, keys))
        _close(subject, again, scores, f"returns different scores {how}", equal)

    # The second half has larger keys, so that a scale which all keys share shows.
    apart = torch.cat([keys[:, :, : _STORED // 2], 16 * keys[:, :, _STORED // 2 :]], 2)
    whole = _index(subject, memory, apart)
    halves = [_index(subject, memory, half) for half in apart.chunk(2, 2)]
    expected = _scores(subject, memory, queries, whole)
    own = "each row of the index may depend only on its own key"
    for name, parts in (
        ("in two parts than at once", halves),
        ("in another batch", [torch.cat([_index(subject, memory, row[None]) for row in apart])]),
    ):
        found = _scores(subject, memory, queries, torch.cat(parts, 2))
        _close(subject, found, expected, f"scores keys differently that were indexed {name}", own, _ODD)
    alone = [_scores(subject, memory, queries, part) for part in whole.chunk(2, 2)]
    what = "scores a key differently alone than among others"
    _close(
        subject, torch.cat(alone, 3), expected, what, "each score may depend only on its own key and query"
    )
    alone = [_scores(subject, memory, query, whole) for query in queries.chunk(4, 2)]
    what = "scores differently for a query alone than among others"
    _close(
        subject, torch.cat(alone, 2), expected, what, "each score may depend only on its own key and query"
    )

    _found(subject, scores, keys, queries)
    odd = torch.cat(
        [torch.zeros(2, _HEADS, 1, head_size), 100 * keys[:, :, :1], torch.ones_like(keys[:, :, :1])], 2
    )
    for dtype in (torch.float32, torch.bfloat16):
        rounded = keys.to(dtype)
        _found(
            subject,
            _scores(subject, memory, queries.to(dtype), _index(subject, memory, rounded)),
            keys,
            queries,
        )
        _scores(subject, memory, odd.to(dtype), _index(subject, memory, odd.to(dtype)), ", one of them zeros")


def _close(
    subject: Subject, found: Tensor, expected: Tensor, problem: str, promise: str, odd: float = 0.0
) -> None:
    """``odd``: share of the scores that may differ."""
    apart = (found - expected).abs()
    if (apart > 1e-3 * expected.std()).float().mean() > odd:
        subject.fail(f"{problem} (by up to {float(apart.max()):.2g})", promise)


def _found(subject: Subject, scores: Tensor, keys: Tensor, queries: Tensor) -> None:
    """A key that equals the query must be among the best of all keys."""
    own = (queries[:, :, :, None] == keys[:, :, None]).all(4)
    reached = scores.masked_fill(~own, float("-inf")).amax(3, keepdim=True)
    better = ((scores >= reached) & ~own).float().mean(3)
    share = float((better < _TOP).float().mean())
    if share < _FOUND:
        subject.fail(
            f"finds a key that equals the query for {share:.0%} of the queries (among the best {_TOP:.0%} of "
            f"{keys.shape[2]} random keys)",
            f"scores must find it for at least {_FOUND:.0%}",
        )
