"""Memory that training takes on each device, predicted before anything is trained.

Weights, gradients and optimizer state follow from shapes. Activations are counted, not guessed: a model of the same
width with one block and with two runs on a little made-up text, on fake tensors and with a vocabulary of a few tokens,
and the bytes that autograd saves for the backward pass are added up. They are linear in the number of blocks and in the
number of sentences, or rows of tokens.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sentcompress.contracts.causal_lm import position_limit
from sentcompress.estimate.fake_tensors import FakeExecution
from sentcompress.estimate.shapes import count_weights
from sentcompress.modeling.device_map import blocks_of
from sentcompress.modeling.grafting import freeze_embeddings
from sentcompress.modeling.losses import TokenLoss, rows_at_once, rows_in_cache
from sentcompress.modeling.sentence_lm import SentenceLM
from sentcompress.recipe import Recipe, TrainingSettings, TuneSettings
from sentcompress.training.jobs.token_level import TokenLM
from sentcompress.training.preparation import trainable
from sentcompress.training.run_folder import BASELINE, OPPONENT
from sentcompress.training.tuning import apply_tune, recompute_activations

StageName = str
"""Name of a stage that trains on the recipe's backbone: each has its own formula below."""
TrainedModel = SentenceLM | TokenLM
"""The model that a stage trains, or takes its part from."""
SENTENCES, ROWS = (16, 32), (1, 2)
"""Sizes of the two runs from which activations are extrapolated: sentences, or a token-level LLM's rows of tokens."""
SMALL_VOCABULARY = 64
"""Tokens of the vocabulary in these runs: activations do not depend on it."""
FP32_BYTES = 4
ADAMW_MOMENTS = 2


def weight_bytes(parameters: float) -> float:
    """Bytes of fp32 weights."""
    return FP32_BYTES * parameters


def gradient_bytes(trainable: float) -> float:
    """Bytes of the gradients of trainable parameters."""
    return FP32_BYTES * trainable


def optimizer_bytes(trainable: float, *, ema: bool = False) -> float:
    """Bytes of AdamW's two moments and, with ``ema``, of the averaged weights."""
    return (ADAMW_MOMENTS + ema) * FP32_BYTES * trainable


def training_bytes(parameters: float, trainable: float, *, ema: bool = False) -> float:
    """Bytes of weights, gradients and optimizer state; activations not included."""
    return weight_bytes(parameters) + gradient_bytes(trainable) + optimizer_bytes(trainable, ema=ema)


def checkpoint_bytes(parameters: float, trainable: float, *, ema: bool = False) -> float:
    """Bytes of a checkpoint's training state: weights and optimizer state. Its model file has the weights again."""
    return weight_bytes(parameters) + optimizer_bytes(trainable, ema=ema)


@dataclass(frozen=True)
class ModelSizes:
    """Parameters, in numbers of weights, and activations of a micro-batch, in bytes.

    Attributes:
        weights, trainable: of the whole model.
        root, root_trainable: of these, the weights outside the backbone's blocks.
        block: weights of the largest block.
        head: weights of the output head, 0 if it is frozen.
        loss: bytes that the loss takes while it runs, without the head's gradient.
        blocks: number of blocks in all parts.
        activations: saved for the backward pass.
        recomputed: the same with ``gradient_checkpointing``; None for stages without it.
    """

    weights: int
    trainable: int
    root: int
    root_trainable: int
    block: int
    head: int
    loss: int
    blocks: int
    activations: float
    recomputed: float | None


@dataclass(frozen=True)
class DeviceMemory:
    """Bytes on each device in one training mode.

    Attributes:
        sharded: trained with ``fsdp``, else ``ddp``.
        recomputed: trained with ``gradient_checkpointing``.
        weights: with ``fsdp``, also the weights that are gathered at a time.
        gradients: with ``ddp`` on several devices, also the buckets they are exchanged in.
        optimizer: AdamW's moments, and averaged weights if there are any.
        activations: of one micro-batch.
        logits: of the loss.
        peak: at the worst moment of a step. Less than the sum: activations are freed as gradients are computed.
    """

    sharded: bool
    recomputed: bool
    weights: float
    gradients: float
    optimizer: float
    activations: float
    logits: float
    peak: float

    @property
    def name(self) -> str:
        return ("fsdp" if self.sharded else "ddp") + (", gradient_checkpointing" if self.recomputed else "")


def model_sizes(
    model: TrainedModel, recipe: Recipe, stage: StageName, sentence_tokens: float, *, bf16: bool
) -> ModelSizes:
    """Count a stage's parameters and activations. Takes seconds, and hardly any memory.

    Args:
        model: the recipe's on the meta device; for the baseline and the opponents a token-level LLM.
        sentence_tokens: mean length of a sentence.
        bf16: products in bf16, weights in fp32.

    Raises:
        InputError: ``tune`` does not fit the LLM.
    """
    copied = copy.deepcopy(model)
    with torch.device("meta"):
        part = _trained_part(copied, recipe, stage, tuning(recipe, stage))
    blocks = [] if stage == "vae" else list(_blocks(copied))
    in_blocks = {id(p) for block in blocks for p in block.parameters()}
    learning = trainable(part).values()
    head = _output_weight(copied)
    # Token-level LLMs are trained on tokens only, the others on an end mark for each sentence too.
    targets = recipe.graft.passages_per_batch * recipe.graft.max_sentences * sentence_tokens
    vae_blocks = 0
    if not isinstance(model, TokenLM):
        targets = _sentences(recipe, stage) * (sentence_tokens + 1)
        vae_blocks = recipe.vae.encoder_layers + recipe.vae.decoder_layers

    def activations(recomputed: bool) -> float:
        return _activations(model, recipe, stage, sentence_tokens, bf16=bf16, recomputed=recomputed)

    return ModelSizes(
        weights=count_weights(part),
        trainable=count_weights(learning),
        root=count_weights(p for p in part.parameters() if id(p) not in in_blocks),
        root_trainable=count_weights(p for p in learning if id(p) not in in_blocks),
        block=max(map(count_weights, blocks), default=0),
        head=head.numel() * head.requires_grad,
        loss=_loss_bytes(head, targets, bf16=bf16),
        blocks=len(blocks) + vae_blocks,
        activations=activations(False),
        recomputed=None if stage == "vae" else activations(True),
    )


def device_memory(sizes: ModelSizes, settings: TrainingSettings, devices: int) -> list[DeviceMemory]:
    """Memory on each of so many devices in every training mode, the fastest mode first."""
    return [
        _device_memory(sizes, settings, devices, activations, sharded=sharded, recomputed=recomputed)
        for sharded in ((False, True) if devices > 1 else (False,))
        for recomputed, activations in ((False, sizes.activations), (True, sizes.recomputed))
        if activations is not None
    ]


def _device_memory(
    sizes: ModelSizes,
    settings: TrainingSettings,
    devices: int,
    activations: float,
    *,
    sharded: bool,
    recomputed: bool,
) -> DeviceMemory:
    share = devices if sharded else 1
    weights = weight_bytes(sizes.weights) / share
    gradients = gradient_bytes(sizes.trainable) / share
    if sharded:
        weights += weight_bytes(sizes.root + 2 * sizes.block)
        gradients += gradient_bytes(sizes.root_trainable + sizes.block)
    elif devices > 1:
        gradients *= 2  # the buckets they are exchanged in
    optimizer = optimizer_bytes(sizes.trainable, ema=bool(settings.ema)) / share
    # Activations are freed as gradients come, but gradients of earlier micro-batches are there from the start.
    if settings.gradient_accumulation > 1 or devices > 1:
        # The head's gradient exists twice while it is added up; sharded, the root's gradients contain it already.
        moving = activations + gradients + (0 if sharded else gradient_bytes(sizes.head))
    else:
        moving = max(activations + gradient_bytes(sizes.head), gradients)
    return DeviceMemory(
        sharded=sharded,
        recomputed=recomputed,
        weights=weights,
        gradients=gradients,
        optimizer=optimizer,
        activations=activations,
        logits=sizes.loss,
        peak=weights + optimizer + moving + sizes.loss,
    )


def state_bytes(sizes: ModelSizes, settings: TrainingSettings) -> float:
    """Bytes of a checkpoint's training state."""
    return checkpoint_bytes(sizes.weights, sizes.trainable, ema=bool(settings.ema))


def saving_bytes(sizes: ModelSizes, settings: TrainingSettings) -> float:
    """Bytes of main memory that saving takes: a copy of the model; in the background, of the training state too."""
    return weight_bytes(sizes.weights) + (state_bytes(sizes, settings) if settings.background_saves else 0)


def tuning(recipe: Recipe, stage: StageName) -> tuple[str, TuneSettings]:
    """Which weights of the LLM a stage trains, after the name of the recipe section that says so."""
    if stage.startswith(OPPONENT):
        name = stage.removeprefix(OPPONENT)
        return f"opponents.{name}", recipe.opponents[name]
    return (stage, recipe.baseline) if stage == BASELINE.name else ("graft", recipe.graft)


def _trained_part(
    model: TrainedModel, recipe: Recipe, stage: StageName, tuning: tuple[str, TuneSettings]
) -> nn.Module:
    """What a stage trains, with the parameters that it does not train frozen."""
    where, settings = tuning
    if isinstance(model, TokenLM):
        apply_tune(model.lm, _blocks(model), settings, where)
        return model
    if recipe.vae.freeze == "embeddings":
        freeze_embeddings(model.vae)
    if stage == "vae":
        return model.vae
    apply_tune(model.backbone, model.backbone.blocks, settings, where)
    return model


def _blocks(model: TrainedModel) -> nn.ModuleList:
    return blocks_of(model.lm) if isinstance(model, TokenLM) else model.backbone.blocks


def _output_weight(model: TrainedModel) -> Tensor:
    """``[V, H]``."""
    return model.lm.get_output_embeddings().weight if isinstance(model, TokenLM) else model.vae.output_weight


def _activations(
    model: TrainedModel,
    recipe: Recipe,
    stage: StageName,
    sentence_tokens: float,
    *,
    bf16: bool,
    recomputed: bool,
) -> float:
    """Bytes saved for the backward pass of a micro-batch, extrapolated from small runs."""
    size: float
    if isinstance(model, TokenLM):
        few, many = ROWS
        size, length = _token_rows(model, recipe, sentence_tokens)
        batches = {rows: _token_batch(rows, length) for rows in ROWS}
    else:
        few, many = SENTENCES
        size, longest = _sentences(recipe, stage), model.vae.config.max_sentence_tokens
        make_batch = _graft_batch if stage == "graft" else _vae_batch
        batches = {n: make_batch(uneven_lengths(n, sentence_tokens, longest)) for n in SENTENCES}
    where, settings = tuning(recipe, stage)
    if settings.tune == "last-n":  # as if all blocks were trained: frozen blocks below save no less
        settings = settings.model_copy(update={"tune": "full"})
    saved, depth = {}, len(_blocks(model))
    one = stage == "vae" or depth == 1
    for blocks in (1,) if one else (1, 2):
        shallow = _with_blocks(model, blocks)
        with torch.device("meta"):
            part = _trained_part(shallow, recipe, stage, (where, settings))  # adapters are made here
        _cut_vocabulary(part, len(_output_weight(shallow)))
        part = (fake := FakeExecution()).fake_copy(part).train()
        if recomputed:
            recompute_activations(part)
        for n, batch in batches.items():
            saved[blocks, n] = _saved_bytes(part, batch, fake, bf16=bf16)
    if one:
        whole = {n: saved[1, n] for n in batches}
    else:
        whole = {n: saved[1, n] + (depth - 1) * (saved[2, n] - saved[1, n]) for n in batches}
    return whole[few] + (whole[many] - whole[few]) / (many - few) * (size - few)


def _with_blocks(model: TrainedModel, number: int) -> TrainedModel:
    """A copy with only the first blocks of the backbone."""
    blocks = _blocks(model)
    few = nn.ModuleList(copy.deepcopy(block) for block in list(blocks)[:number])
    shallow = copy.deepcopy(model, {id(blocks): few})  # copying all blocks would take long
    if isinstance(shallow, TokenLM):
        stack: Any = shallow.lm
    else:
        stack = shallow.backbone
        # Which tokens mark begin and end does not matter here, and some published configurations do not say.
        shallow.vae.config.bos_token_id = shallow.vae.config.eos_token_id = 0
    stack.config.num_hidden_layers = number
    return shallow


def _sentences(recipe: Recipe, stage: StageName) -> int:
    """Sentences of a micro-batch."""
    if stage == "graft":
        return recipe.graft.passages_per_batch * recipe.graft.max_sentences
    return recipe.train_vae.sentences_per_batch


def _token_rows(model: TokenLM, recipe: Recipe, sentence_tokens: float) -> tuple[float, int]:
    """Rows in a micro-batch of a token-level LLM, and tokens in each, start token included.

    As in training, a passage longer than the LLM has positions becomes several rows.
    """
    tokens = recipe.graft.max_sentences * sentence_tokens
    length = max(2, min(math.ceil(tokens) + 1, position_limit(model.lm.config)))
    return recipe.graft.passages_per_batch * tokens / (length - 1), length


def _loss_bytes(head: Tensor, targets: float, *, bf16: bool) -> int:
    """A block of logits and the states' gradient; in bf16 also fp32 logits, and the head and its gradient again."""
    vocab, width = head.shape
    rows = round(targets)
    dtype = torch.bfloat16 if bf16 else torch.float32
    block = vocab * min(rows_at_once(vocab, dtype, learning=True), rows)
    size = dtype.itemsize * (block + rows * width)
    if not bf16:
        return size
    fp32_logits = FP32_BYTES * vocab * min(rows_in_cache(vocab), rows)
    return size + fp32_logits + (4 if head.requires_grad else 2) * head.numel()


def _cut_vocabulary(model: nn.Module, vocab_size: int) -> None:
    """Keep the first few tokens of every embedding table."""
    for parameter in model.parameters():
        index = tuple(slice(SMALL_VOCABULARY if size == vocab_size else None) for size in parameter.shape)
        parameter.data = parameter.data[index]


def uneven_lengths(sentences: int, mean: float, longest: int) -> Tensor:
    """Made-up sentence lengths ``[S]``, as uneven as in text: some activations are padded to the longest sentence.

    They are the quantiles of an exponential distribution, cut at ``longest`` and stretched to the right mean.
    """
    shape = -torch.log1p(-(torch.arange(sentences) + 0.5) / sentences)
    mean = min(max(mean, 1.0), float(longest))
    stretch = mean
    for _ in range(20):
        lengths = (stretch * shape).clamp(1, longest)
        stretch *= mean / float(lengths.mean())
    return lengths.round().long()


def _vae_batch(lengths: Tensor) -> dict[str, Tensor]:
    """Sentences of so many tokens each."""
    mask = (torch.arange(int(lengths.max())) < lengths[:, None]).long()
    return {"input_ids": torch.ones_like(mask), "attention_mask": mask}


def _graft_batch(lengths: Tensor) -> dict[str, Tensor]:
    """A passage of sentences of so many tokens each."""
    sentences = len(lengths)
    return _vae_batch(lengths) | {
        "sentence_index": torch.arange(sentences)[None],
        "passage_ids": torch.zeros(1, sentences, dtype=torch.long),
        "scored": torch.ones(sentences, dtype=torch.bool),
        "last": torch.zeros(sentences, dtype=torch.bool),
    }


def _token_batch(rows: int, length: int) -> dict[str, Tensor]:
    """Rows of so many tokens each."""
    ids = torch.ones(rows, length, dtype=torch.long)
    return {"input_ids": ids, "attention_mask": ids, "labels": ids}


def _saved_bytes(model: nn.Module, batch: dict[str, Tensor], fake: FakeExecution, *, bf16: bool) -> int:
    """Bytes that one forward pass saves for the backward pass, weights left out."""
    precision: AbstractContextManager[object] = (
        torch.autocast("cpu", torch.bfloat16) if bf16 else nullcontext()
    )
    weights = {storage_address(p.untyped_storage()) for p in model.parameters()}

    def step() -> Tensor:
        if isinstance(model, TokenLM):
            return model(**batch)[0].mean()
        return model(**batch, token_loss=TokenLoss(gamma=0.0)).loss

    with fake, precision:
        return count_saved(step, weights)[1]


def count_saved(step: Callable[[], Tensor], weights: set[int]) -> tuple[Tensor, int]:
    """Run a forward pass; its loss, and the bytes that autograd saves for the backward pass.

    Args:
        weights: addresses of storages that exist anyway.
    """
    saved: dict[int, torch.UntypedStorage] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if (address := storage_address(storage)) not in weights:
            saved[address] = storage  # held, or its address might be given to another
        return tensor.detach()  # the tensor itself would hold the graph that holds it, and never be freed

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        loss = step()
    return loss, sum(storage.nbytes() for storage in saved.values())


def storage_address(storage: torch.UntypedStorage) -> int:
    """Address of a storage's memory; of the storage object itself where there is no memory."""
    return storage._cdata if storage.device.type == "meta" else storage.data_ptr()
