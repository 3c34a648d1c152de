"""SentenceMemory: a cache of transformers that keeps an LLM's past sentence by sentence."""

from __future__ import annotations

import copy
import functools
import inspect
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import zip_longest
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from sentcompress.contracts import Segmenter
from sentcompress.contracts.causal_lm import position_limit
from sentcompress.errors import InputError
from sentcompress.registry import get_registry
from sentcompress.sentence_memory.arguments import ARGUMENTS, check_arguments, read_settings, within_bytes
from sentcompress.sentence_memory.attachment import attach, causal_lm, check_tokenizer
from sentcompress.sentence_memory.attachment_proof import CUT, Words, check_attachment
from sentcompress.sentence_memory.block_cache import BlockCache
from sentcompress.sentence_memory.cache_figures import CacheFigures
from sentcompress.sentence_memory.next_tokens import check_call, check_prompt
from sentcompress.sentence_memory.positions import effective_position, reindex
from sentcompress.sentence_memory.retrieval_blocks import recalling_blocks
from sentcompress.sentence_memory.slow_storage import make_storage
from sentcompress.sentence_memory.stored_prefix import read_prefix, write_prefix
from sentcompress.sentence_memory.token_table import TokenTable
from sentcompress.text.boundaries import MAX_SENTENCE_TOKENS, BoundaryFinder


class SentenceMemory(CacheFigures):
    """What an LLM attends to: recent sentences as they are, older ones as the memory has them.

    An ordinary cache for the ordinary ``generate`` of transformers::

        memory = sentcompress.SentenceMemory(model, tokenizer, recent_sentences=8, recall=4)
        model.generate(**inputs, past_key_values=memory)

    The LLM itself does not change: without the memory it attends as ever.

    Args:
        model: a causal LM of transformers.
        tokenizer: its tokenizer.
        memory: names of memories, joined by ``+``; ``sentcompress plugins`` lists them.
        segmenter: cuts text into sentences; a registered name or a prepared one.
        max_sentence_tokens: longest sentence; a longer one is cut.
        storage: where older sentences are stored: ``host`` (memory of the CPU), ``int8`` (there, in 8 bits), ``file``.
        folder: of the file.
        cache_bits: 8 rounds all keys and values to 8 bits, in the cache and in storage: half the bytes of a bf16 cache.
            None keeps them as the LLM computes them.
        recall_blocks: blocks of the LLM that recall: ``auto`` finds those that look far back (all, where none does),
            ``all``, or their numbers from 0. The other blocks only have what is kept.
        full_prompts: tokens of one call attend to each other in full, as without a memory; those that follow find them
            in the memory. None: only the prompts of ``generate`` do, until positions are re-indexed.
        positions: ``original``: a text may have as many tokens as the LLM has positions. ``reindexed``: any number;
            positions move down by half of the limit whenever they reach it.
        max_positions: re-index at fewer positions than the LLM has.
        recent_bytes: ``recent_tokens`` as a budget: bytes on the device of a text's recent sentences, in all blocks.
            The first tokens, the sentence being written, room for fewer than 32 more tokens, and what is recalled come
            on top.
        prove: check once for each LLM, on a few random tokens, that it attends through the memory and nothing else.
        options: of the memories, such as ``recent_sentences`` and ``recall``.

    Attributes:
        recall_blocks: numbers of the blocks that recall; empty if the memory does not.

    Raises:
        InputError: a memory, an option or the segmenter is unknown, or the LLM cannot be used with a memory.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: Any,
        memory: str = "window+recall",
        *,
        segmenter: str | Segmenter = "regex",
        max_sentence_tokens: int = MAX_SENTENCE_TOKENS,
        storage: str = "host",
        folder: str | Path | None = None,
        cache_bits: int | None = None,
        recall_blocks: str | Sequence[int] = "auto",
        full_prompts: bool | None = None,
        positions: str = "original",
        max_positions: int | None = None,
        recent_bytes: int | None = None,
        prove: bool = True,
        **options: Any,
    ) -> None:
        model = causal_lm(model)
        self.policy = check_arguments(
            memory,
            options,
            segmenter=segmenter,
            max_sentence_tokens=max_sentence_tokens,
            storage=storage,
            folder=folder,
            cache_bits=cache_bits,
            full_prompts=full_prompts,
            positions=positions,
            max_positions=max_positions,
            recent_bytes=recent_bytes,
        )
        cutter: Any = segmenter
        if isinstance(segmenter, str):
            cutter = get_registry().create("segmenter", segmenter)
            cutter.prepare(tokenizer)
        check_tokenizer(model, tokenizer)
        finder = BoundaryFinder(cutter, tokenizer, max_sentence_tokens)
        attach(model)
        if prove:
            check_attachment(model, functools.partial(SentenceMemory, model, Words(), **CUT))
        self.model = model
        if recent_bytes is not None:
            self.policy = within_bytes(self.policy, recent_bytes, _token_bytes(model, cache_bits))
        self.policy.prepare(tokenizer)
        reindexing, rotations = reindex(
            model, positions, max_positions, self.policy.options.get("sinks", 0), max_sentence_tokens
        )
        self._table = TokenTable(self.policy, finder, reindexing, full_prompts)
        if cache_bits and storage == "int8":
            storage = "host"  # what it gets has 8 bits already
        self._storage = storage, folder
        self._packs = cache_bits is not None
        self._seen, self._incomplete = 0, False
        self._attended: list[Tensor] = []
        blocks = model.config.get_text_config(decoder=True).num_hidden_layers
        recalling = recalling_blocks(model, recall_blocks) if self.policy.recall else []
        self.recall_blocks = recalling
        new_storage = functools.partial(make_storage, storage, folder=folder)
        super().__init__(
            layers=[
                BlockCache(self._table, new_storage, rotation, packs=self._packs, recalls=n in recalling)
                for n, rotation in zip_longest(range(blocks), rotations)
            ]
        )

    @classmethod
    def check(cls, memory: str = "window+recall", **arguments: Any) -> None:
        """Refuse what is wrong whatever the LLM is, before it is loaded. The arguments are those of the class.

        Raises:
            InputError, PluginError: as for the class.
        """
        given = inspect.signature(cls).bind(None, None, memory, **arguments)
        given.apply_defaults()
        known = {name: given.arguments[name] for name in ARGUMENTS}
        check_arguments(memory, given.arguments["options"], **known)

    @classmethod
    def from_folder(
        cls,
        folder: str | Path,
        model: PreTrainedModel,
        tokenizer: Any,
        memory: str | None = None,
        **changes: Any,
    ) -> SentenceMemory:
        """The memory that an LLM was trained with, as ``memory.json`` in its folder says.

        Args:
            memory: another memory than that one; then its options are not used either.
            changes: other arguments and options than those of the file.

        Raises:
            ModelFolderError: the folder has no such file, or it is damaged.
        """
        name, arguments = read_settings(folder, tokenizer, memory)
        return cls(model, tokenizer, name, **arguments | changes)

    # ---- what transformers asks for

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens read in earlier calls, padding included, whether they are still there or not."""
        return self._seen

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        return self._seen + query_length, 0

    def get_query_offset(self, layer_idx: int = 0) -> int:
        return self._seen

    def reset(self) -> None:
        """Forget everything, for another text."""
        self._table.rows, self._attended, self._incomplete, self._seen = [], [], False, 0
        for layer in self.layers:
            layer.reset()

    def reorder_cache(self, beam_idx: Tensor) -> None:
        raise InputError(
            "a sentence memory cannot be used for beam search: the beams would share one text",
            fix="use num_beams=1, with do_sample=True for variety",
        )

    def crop(self, *_: Any) -> None:
        raise InputError(
            "a sentence memory cannot take back tokens, as assisted decoding asks of it",
            fix="leave out assistant_model and prompt_lookup_num_tokens",
        )

    def batch_repeat_interleave(self, repeats: int) -> None:
        raise InputError(
            "a sentence memory cannot be repeated for several outputs",
            fix="repeat the prompt in the batch",
        )

    # ---- a batch whose texts come and go

    def batch_select_indices(self, indices: Tensor) -> None:
        """Only keep some texts of the batch, int64 ``[n]``, such as those that have not ended."""
        rows = indices.tolist()
        if len({*rows}) < len(rows):
            raise InputError("a memory cannot hold one text twice", fix="use memory.copy(), and join")
        self._table.select(rows)
        for layer in self.layers:
            layer.select(indices)
        self._changed()

    def join(self, other: SentenceMemory) -> None:
        """Let the texts of another memory, which is empty then, join the batch as its last rows.

        Each goes on as it would alone, whatever its length: with one new token for each, ``input_ids`` are ``[B, 1]``
        without an attention mask, and ``position_ids`` say how many tokens each has.

        Raises:
            InputError: the other memory is of another LLM, or has other settings.
        """
        if other.model is not self.model or other._arguments != self._arguments:
            raise InputError(
                "memories of different LLMs or settings cannot be one batch",
                fix="use the same arguments for all",
            )
        for memory in (self, other):
            memory._check_complete()
        self._incomplete = True
        self._table.join(other._table.rows)
        for layer, more in zip(self.layers, other.layers, strict=True):
            layer.join(more)
        self._incomplete = False
        other.reset()
        self._changed()

    def _changed(self) -> None:
        self._seen = max((len(row.ids) for row in self._table.rows), default=0)
        self._attended = []

    def _check_complete(self) -> None:
        if self._incomplete:
            raise InputError(
                "the last call of the LLM failed, or a join did, so its memory is incomplete",
                fix="call memory.reset()",
            )

    # ---- a prefix: a text that was read once, for many prompts

    def save(self, folder: str | Path) -> None:
        """Save what was read, for :meth:`load` in any process.

        Args:
            folder: new, empty, or with an older prefix, which is replaced.

        Raises:
            InputError: nothing was read, or several texts; or the folder holds something else.
            StorageError: the folder cannot be written.
        """
        write_prefix(folder, self.model, self._table.finder, self._arguments, self._seen, self._state())

    @classmethod
    def load(
        cls,
        prefix: str | Path,
        model: PreTrainedModel,
        tokenizer: Any,
        *,
        rows: int = 1,
        segmenter: Segmenter | None = None,
        folder: str | Path | None = None,
    ) -> SentenceMemory:
        """A memory that has read a text already. Slow storage is memory-mapped: processes share its pages.

        Args:
            prefix: the folder that :meth:`save` has written.
            rows: prompts of a batch, which all begin with this text.
            segmenter: prepared; needed if the one that read the text is not registered.
            folder: of the file, with ``storage="file"``.

        Raises:
            InputError: there is no prefix, it is damaged, or another LLM, dtype, tokenizer or version has written it.
        """
        saved, tensors = read_prefix(prefix, model, tokenizer)
        more = {"segmenter": segmenter or saved.make_segmenter(tokenizer), "folder": folder}
        memory = cls(model, tokenizer, **saved.arguments | more)
        return memory._restored(tensors, rows, saved.tokens)

    def copy(self, rows: int = 1) -> SentenceMemory:
        """A memory of its own that has read the same text. What was stored so far is shared, not copied.

        Args:
            rows: prompts of a batch, which all begin with this text.

        Raises:
            InputError: nothing was read, or several texts.
        """
        finder = self._table.finder
        more = {"segmenter": finder.segmenter, "folder": self._storage[1], "prove": False}
        other = type(self)(self.model, finder.tokenizer, **self._arguments | more)
        return other._restored(self._state(), rows, self._seen)

    def __repr__(self) -> str:
        """The memory, what is not the default, and the tokens read; ``recall_blocks`` are left out."""
        defaults = {name: each.default for name, each in inspect.signature(type(self)).parameters.items()}
        changed = {k: v for k, v in self._arguments.items() if k in ARGUMENTS and v != defaults[k]}
        shown = (f", {name}={value!r}" for name, value in (self.policy.changed_options | changed).items())
        return f"SentenceMemory({self.policy.name}{''.join(shown)}; {self._seen:,} tokens read)"

    @property
    def _arguments(self) -> dict[str, Any]:
        """What a memory like this one is made with, as JSON values; but for the segmenter."""
        reindexing = self._table.reindexing
        return {
            "memory": self.policy.name,
            "max_sentence_tokens": self._table.finder.max_tokens,
            "storage": self._storage[0],
            "cache_bits": 8 if self._packs else None,
            "recall_blocks": self.recall_blocks or "auto",
            "full_prompts": self._table.full_prompts,
            "positions": "original" if reindexing is None else "reindexed",
            "max_positions": None if reindexing is None else reindexing.limit,
            **self.policy.options,
        }

    def _state(self) -> dict[str, Tensor]:
        if len(self._table.rows) != 1:
            raise InputError(
                f"a prefix is one text, but this memory holds {len(self._table.rows)}",
                fix="read the text in a batch of one",
            )
        blocks = {f"{i}.{n}": t for i, layer in enumerate(self.layers) for n, t in layer.state().items()}
        return {**self._table.state(), **blocks}

    def _restored(self, tensors: dict[str, Tensor], rows: int, seen: int) -> SentenceMemory:
        if not isinstance(rows, int) or rows < 1:
            raise InputError(f"rows: {rows!r}", fix="give the number of prompts, at least 1")
        self._table.load_state(tensors, rows)
        for number, layer in enumerate(self.layers):
            start = f"{number}."
            own = {name.removeprefix(start): t for name, t in tensors.items() if name.startswith(start)}
            layer.load_state(own, rows, self.model.dtype)
        self._seen = seen
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> SentenceMemory:
        """Of a batch too; the LLM, and what a loaded prefix shares, are not copied."""
        memo.update({id(part): part for part in (self.model, self.policy, self._table.finder)})
        other = memo[id(self)] = type(self).__new__(type(self))
        other.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return other

    def __reduce__(self) -> Any:
        raise InputError(
            "a sentence memory cannot be pickled", fix="use memory.save(folder) and SentenceMemory.load"
        )

    @property
    def longest_text(self) -> int:
        """Tokens that a text may have: without re-indexing, as many as the LLM has positions."""
        return sys.maxsize if self._table.reindexing else position_limit(self.model.config)

    @property
    def longest_full_prompt(self) -> int:
        """Tokens that each prompt of a call may have. If one has more, its positions move, and none is read in full."""
        reindexing = self._table.reindexing
        return self.longest_text if reindexing is None else reindexing.limit

    # ---- a call of the LLM

    def begin_call(self, input_ids: Tensor | None, attention_mask: Tensor | None) -> None:
        """Take the tokens of a call before the LLM computes. Called by the LLM (:func:`attach`).

        Args:
            input_ids: ``[B, Q]``.
            attention_mask: ``[B, tokens so far + Q]`` or None.

        Raises:
            InputError: these tokens cannot follow those read so far.
        """
        self._check_complete()
        tokens = check_call(self._table.rows, self._seen, self.longest_text, input_ids, attention_mask)
        self._incomplete = True
        self._table.read(*tokens)

    def new_positions(self) -> Tensor | None:
        """Positions of the tokens of this call, ``[B, Q]``, if they are re-indexed."""
        if self._table.reindexing is None:
            return None
        tokens = self._table.planned().position.clamp_min(0)
        return effective_position(tokens, self._table.reindexing.limit).to(self.model.device)

    def end_call(self, *, complete: bool) -> None:
        """Called by the LLM when it has computed, or has failed."""
        plan, self._table.plan = self._table.plan, None
        if complete and plan is not None:
            self._attended = plan.attended
            self._seen += plan.position.shape[1]
            self._incomplete = False

    @contextmanager
    def reading_prompt(
        self, input_ids: Tensor, attention_mask: Tensor | None, *, whole: bool, longest: int
    ) -> Iterator[None]:
        """For a block in which ``generate`` reads a prompt. Refuses a prompt that cannot follow what was read.

        Args and errors are those of :func:`check_prompt`.
        """
        check_prompt(
            self._table.rows,
            self._seen,
            self.longest_text,
            input_ids,
            attention_mask,
            whole=whole,
            longest=longest,
        )
        self._table.in_prompt = True
        try:
            yield
        finally:
            self._table.in_prompt = False


@torch.no_grad()
def _token_bytes(model: PreTrainedModel, cache_bits: int | None) -> int:
    """Bytes of one token on the device, in all blocks: measured with one."""
    memory = SentenceMemory(model, Words(), "window", cache_bits=cache_bits, **CUT)
    model(input_ids=torch.zeros(1, 1, dtype=torch.long, device=model.device), past_key_values=memory)
    return memory.device_bytes() // memory._table.capacity
