"""What training takes before anything is trained: memory of each device by part, time, and what fits where.

Weights, gradients and moments follow from shapes. Activations are counted, not guessed: a model of the same width with
one block and with two is run on a little made-up text, without memory and with a vocabulary of a few tokens, and what
autograd keeps for the backward pass is added up; it is linear in blocks and in sentences, or rows of tokens.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from sentcompress.contracts.causal_lm import position_limit
from sentcompress.errors import InputError
from sentcompress.estimate.fake_tensors import WithoutMemory
from sentcompress.modeling.device_map import blocks_of
from sentcompress.modeling.grafting import freeze_embeddings
from sentcompress.modeling.losses import TokenLoss, rows_at_once, rows_in_cache
from sentcompress.modeling.sentence_lm import SentenceLM
from sentcompress.recipe import Recipe, TrainingSettings
from sentcompress.training.jobs.token_level import TokenLM
from sentcompress.training.memory import recompute_activations
from sentcompress.training.optimization import trainable
from sentcompress.training.tuning import apply_tune

Stage = Literal["vae", "graft", "baseline"]
Shape = SentenceLM | TokenLM
"""What a stage trains, or is cut from, on the meta device."""
SENTENCES, ROWS = (16, 32), (1, 2)
"""Sentences of the two runs from which activations are extrapolated; rows of tokens of the twin."""
TOKENS_KEPT = 64
"""Vocabulary of these runs: activations do not depend on it."""


@dataclass(frozen=True)
class Sizes:
    """Parameters, in numbers, and activations of a micro-batch, in bytes.

    Attributes:
        weights, learned: of the whole model.
        root, root_learned: of these, what is in no block of the backbone.
        unit: of the largest block.
        head: of the output head, if it learns.
        loss: bytes that the loss takes while it runs, the head's gradient left out.
        blocks: of all parts.
        activations, recomputed: kept for the backward pass; with ``gradient_checkpointing``, None where there is none.
    """

    weights: int
    learned: int
    root: int
    root_learned: int
    unit: int
    head: int
    loss: int
    blocks: int
    activations: float
    recomputed: float | None


@dataclass(frozen=True)
class Footprint:
    """Bytes on each device, by part, of one way to train.

    Attributes:
        spread: ``fsdp``, else ``ddp``.
        recomputed: with ``gradient_checkpointing``.
        weights: and, spread over devices, what is gathered of them at a time.
        gradients: and, of several whole copies, what they are exchanged in.
        optimizer: two moments, and averaged weights if there are any.
        activations: of one micro-batch.
        logits: of the loss.
        peak: at the worst moment of a step, which is less than the sum: gradients come as activations go.
    """

    spread: bool
    recomputed: bool
    weights: float
    gradients: float
    optimizer: float
    activations: float
    logits: float
    peak: float

    @property
    def name(self) -> str:
        return ("fsdp" if self.spread else "ddp") + (", gradient_checkpointing" if self.recomputed else "")


def sizes(shape: Shape, recipe: Recipe, stage: Stage, sentence_tokens: float, *, bf16: bool) -> Sizes:
    """Count a stage's parameters and activations. Takes seconds, and hardly any memory.

    Args:
        shape: the recipe's model on the meta device, for ``baseline`` its twin.
        sentence_tokens: mean length of a sentence.
        bf16: products in bf16, weights in fp32.

    Raises:
        InputError: nothing of the twin learns.
    """
    model = copy.deepcopy(shape)
    with torch.device("meta"):
        part = _part(model, recipe, stage)
    blocks = [] if stage == "vae" else list(_blocks(model))
    inside = {id(p) for block in blocks for p in block.parameters()}
    learned = trainable(part).values()
    head = _head(model)
    # The twin reads and writes tokens alone, the others end each sentence with a mark.
    targets = recipe.graft.passages_per_batch * recipe.graft.max_sentences * sentence_tokens
    own = 0
    if stage != "baseline":
        targets = _sentences(recipe, stage) * (sentence_tokens + 1)
        own = recipe.vae.encoder_layers + recipe.vae.decoder_layers
    return Sizes(
        weights=_count(part.parameters()),
        learned=_count(learned),
        root=_count(p for p in part.parameters() if id(p) not in inside),
        root_learned=_count(p for p in learned if id(p) not in inside),
        unit=max((_count(block.parameters()) for block in blocks), default=0),
        head=head.numel() * head.requires_grad,
        loss=_loss_bytes(head, targets, bf16=bf16),
        blocks=len(blocks) + own,
        activations=_activations(shape, recipe, stage, sentence_tokens, bf16=bf16, recomputed=False),
        recomputed=None
        if stage == "vae"
        else _activations(shape, recipe, stage, sentence_tokens, bf16=bf16, recomputed=True),
    )


def footprints(found: Sizes, settings: TrainingSettings, devices: int) -> list[Footprint]:
    """All ways to train on so many devices, the fastest first."""
    return [
        _footprint(found, settings, devices, activations, spread=spread, recomputed=recomputed)
        for spread in ((False, True) if devices > 1 else (False,))
        for recomputed, activations in ((False, found.activations), (True, found.recomputed))
        if activations is not None
    ]


def _footprint(
    found: Sizes,
    settings: TrainingSettings,
    devices: int,
    activations: float,
    *,
    spread: bool,
    recomputed: bool,
) -> Footprint:
    share = devices if spread else 1
    weights = 4 * found.weights / share
    gradients = 4 * found.learned / share
    if spread:
        weights += 4 * (found.root + 2 * found.unit)
        gradients += 4 * (found.root_learned + found.unit)
    elif devices > 1:
        gradients *= 2  # the buckets they are exchanged in
    optimizer = (12 if settings.ema else 8) * found.learned / share
    # Activations go as gradients come; those of earlier micro-batches are there from the start.
    if settings.gradient_accumulation > 1 or devices > 1:
        # The head's gradient is there before it is added up; spread, the root's whole gradients are counted already.
        moving = activations + gradients + (0 if spread else 4 * found.head)
    else:
        moving = max(activations + 4 * found.head, gradients)
    return Footprint(
        spread=spread,
        recomputed=recomputed,
        weights=weights,
        gradients=gradients,
        optimizer=optimizer,
        activations=activations,
        logits=found.loss,
        peak=weights + optimizer + moving + found.loss,
    )


def state_bytes(found: Sizes, settings: TrainingSettings) -> int:
    """Bytes of what training must remember: weights, moments, averaged weights if there are any."""
    return 4 * found.weights + (12 if settings.ema else 8) * found.learned


def saving_bytes(found: Sizes, settings: TrainingSettings) -> float:
    """Bytes of the computer's memory that saving takes: a copy of the model, in the background of all state too."""
    return 4 * found.weights + (state_bytes(found, settings) if settings.background_saves else 0)


def _part(model: Shape, recipe: Recipe, stage: Stage) -> nn.Module:
    """What a stage trains, with what does not learn frozen."""
    if isinstance(model, TokenLM):
        if recipe.baseline.tune == "frozen":
            raise InputError(
                "baseline.tune: frozen leaves nothing to learn", fix="use baseline.enabled: false"
            )
        apply_tune(model.lm, _blocks(model), recipe.baseline, "baseline")
        return model
    if recipe.vae.freeze == "embeddings":
        freeze_embeddings(model.vae)
    if stage == "vae":
        return model.vae
    apply_tune(model.backbone, model.backbone.blocks, recipe.graft, "graft")
    return model


def _blocks(model: Shape) -> nn.ModuleList:
    return blocks_of(model.lm) if isinstance(model, TokenLM) else model.backbone.blocks


def _head(model: Shape) -> Tensor:
    """``[V, H]``."""
    return model.lm.get_output_embeddings().weight if isinstance(model, TokenLM) else model.vae.output_weight


def _count(parameters: object) -> int:
    return sum(p.numel() for p in {id(p): p for p in parameters}.values())  # type: ignore[attr-defined]


def _activations(
    shape: Shape, recipe: Recipe, stage: Stage, sentence_tokens: float, *, bf16: bool, recomputed: bool
) -> float:
    """Bytes kept for the backward pass of a micro-batch, extrapolated from small runs."""
    wanted: float
    if isinstance(shape, TokenLM):
        few, many = ROWS
        wanted, length = _rows(shape, recipe, sentence_tokens)
        batches = {rows: _tokens(rows, length) for rows in ROWS}
    else:
        few, many = SENTENCES
        wanted, longest = _sentences(recipe, stage), shape.vae.config.max_sentence_tokens
        lengths = {sentences: spread_lengths(sentences, sentence_tokens, longest) for sentences in SENTENCES}
        batches = {
            sentences: _cells(lengths[sentences]) if stage == "graft" else _padded(lengths[sentences])
            for sentences in SENTENCES
        }
    recipe, kept = _not_by_block(recipe), {}
    for number in (1,) if stage == "vae" else (1, 2):
        model = _shortened(shape, number)
        with torch.device("meta"):
            part = _part(model, recipe, stage)  # adapters are made here
        _cut_vocabulary(part, len(_head(model)))
        part = (without := WithoutMemory()).model(part).train()
        if recomputed:
            recompute_activations(part)
        for size, batch in batches.items():
            kept[number, size] = _kept(part, batch, without, bf16=bf16)
    full = len(_blocks(shape))
    if stage == "vae":
        whole = {size: kept[1, size] for size in batches}
    else:
        whole = {size: kept[1, size] + (full - 1) * (kept[2, size] - kept[1, size]) for size in batches}
    return whole[few] + (whole[many] - whole[few]) / (many - few) * (wanted - few)


def _not_by_block(recipe: Recipe) -> Recipe:
    """As if all blocks learned where only the last ones do: they are counted alike, those below keep no more."""
    sections = {"graft": recipe.graft, "baseline": recipe.baseline}
    changed = {
        name: section.model_copy(update={"tune": "full"})
        for name, section in sections.items()
        if section.tune == "last-n"
    }
    return recipe.model_copy(update=changed)


def _shortened(shape: Shape, number: int) -> Shape:
    """A copy with only the first blocks of the backbone."""
    blocks = _blocks(shape)
    few = nn.ModuleList(copy.deepcopy(block) for block in list(blocks)[:number])
    model = copy.deepcopy(shape, {id(blocks): few})  # many blocks take long to copy
    if isinstance(model, TokenLM):
        stack: Any = model.lm
    else:
        stack = model.backbone
        # Which tokens mark begin and end does not matter, and published shapes do not say it.
        model.vae.config.bos_token_id = model.vae.config.eos_token_id = 0
    stack.config.num_hidden_layers = number
    return model


def _sentences(recipe: Recipe, stage: Stage) -> int:
    """Of a micro-batch."""
    if stage == "graft":
        return recipe.graft.passages_per_batch * recipe.graft.max_sentences
    return recipe.train_vae.sentences_per_batch


def _rows(shape: TokenLM, recipe: Recipe, sentence_tokens: float) -> tuple[float, int]:
    """Rows of tokens in a micro-batch of the twin, and tokens in each, with the one that all begin with.

    A passage that is longer than the LLM has positions becomes several rows, as in training.
    """
    tokens = recipe.graft.max_sentences * sentence_tokens
    length = max(2, min(math.ceil(tokens) + 1, position_limit(shape.lm.config)))
    return recipe.graft.passages_per_batch * tokens / (length - 1), length


def _loss_bytes(head: Tensor, targets: float, *, bf16: bool) -> int:
    """A block's logits and the states' gradient; in bf16 some logits in fp32 too, the head and its gradient again."""
    vocab, width = head.shape
    rows = round(targets)
    dtype = torch.bfloat16 if bf16 else torch.float32
    block = vocab * min(rows_at_once(vocab, dtype, learning=True), rows)
    size = dtype.itemsize * (block + rows * width)
    if not bf16:
        return size
    return (
        size + 4 * vocab * min(rows_in_cache(vocab), rows) + (4 if head.requires_grad else 2) * head.numel()
    )


def _cut_vocabulary(model: nn.Module, vocab_size: int) -> None:
    """Keep the first few tokens of every table."""
    for parameter in model.parameters():
        index = tuple(slice(TOKENS_KEPT if size == vocab_size else None) for size in parameter.shape)
        parameter.data = parameter.data[index]


def spread_lengths(sentences: int, mean: float, longest: int) -> Tensor:
    """Made-up lengths ``[S]``, as uneven as those of text: some of what is kept is as long as the longest of them.

    They are the quantiles of an exponential distribution, cut at ``longest`` and stretched until their mean is right.
    """
    shape = -torch.log1p(-(torch.arange(sentences) + 0.5) / sentences)
    mean = min(max(mean, 1.0), float(longest))
    stretch = mean
    for _ in range(20):
        lengths = (stretch * shape).clamp(1, longest)
        stretch *= mean / float(lengths.mean())
    return lengths.round().long()


def _padded(lengths: Tensor) -> dict[str, Tensor]:
    """Sentences of so many tokens each."""
    mask = (torch.arange(int(lengths.max())) < lengths[:, None]).long()
    return {"input_ids": torch.ones_like(mask), "attention_mask": mask}


def _cells(lengths: Tensor) -> dict[str, Tensor]:
    """The same as a passage."""
    sentences = len(lengths)
    return _padded(lengths) | {
        "sentence_index": torch.arange(sentences)[None],
        "passage_ids": torch.zeros(1, sentences, dtype=torch.long),
        "scored": torch.ones(sentences, dtype=torch.bool),
        "last": torch.zeros(sentences, dtype=torch.bool),
    }


def _tokens(rows: int, length: int) -> dict[str, Tensor]:
    """Rows of so many tokens each."""
    ids = torch.ones(rows, length, dtype=torch.long)
    return {"input_ids": ids, "attention_mask": ids, "labels": ids}


def _kept(model: nn.Module, batch: dict[str, Tensor], without: WithoutMemory, *, bf16: bool) -> int:
    """Bytes that one forward pass keeps, weights left out."""
    around: AbstractContextManager[object] = torch.autocast("cpu", torch.bfloat16) if bf16 else nullcontext()
    weights = {address(p.untyped_storage()) for p in model.parameters()}

    def step() -> Tensor:
        if isinstance(model, TokenLM):
            return model(**batch)[0].mean()
        return model(**batch, token_loss=TokenLoss(gamma=0.0)).loss

    with without, around:
        _, kept = count_kept(step, weights)
    return kept


def count_kept(step: Callable[[], Tensor], weights: set[int]) -> tuple[Tensor, int]:
    """Run a forward pass; its loss, and the bytes that are kept for the backward pass.

    Args:
        weights: addresses of what is there anyway.
    """
    kept: dict[int, torch.UntypedStorage] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if (where := address(storage)) not in weights:
            kept[where] = storage  # held, or its address might be given to another
        return tensor.detach()  # itself, it would hold the graph that holds it, for ever

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        loss = step()
    return loss, sum(storage.nbytes() for storage in kept.values())


def address(storage: torch.UntypedStorage) -> int:
    """Where a storage is; without memory, of the storage itself."""
    return storage._cdata if storage.device.type == "meta" else storage.data_ptr()
