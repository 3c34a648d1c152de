"""SentenceLM: a backbone LLM that reads and predicts sentence latents (paper section 3.2, "SLLM")."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import AutoConfig, PreTrainedModel
from transformers.utils import ModelOutput

from sentcompress.contracts.backbone import Backbone
from sentcompress.modeling.configuration import SentenceLMConfig, check_plugins
from sentcompress.modeling.losses import Teaching, TokenLoss, stop_loss
from sentcompress.modeling.shortlist import Shortlist
from sentcompress.modeling.vae import SentenceVAE
from sentcompress.modeling.weight_checks import WholeWeights
from sentcompress.registry import get_registry

if TYPE_CHECKING:
    from sentcompress.generation import Generation

PADDING, START = -1, -2
"""Values of ``sentence_index`` in slots without a sentence: padding, and the start of a document."""


@dataclass
class SentenceLMOutput(ModelOutput):
    """Result of :meth:`SentenceLM.forward`.

    Attributes:
        loss: scalar: ``token_loss`` plus ``stop_weight`` times ``stop_loss``.
        token_loss: scalar, mean over the targets.
        stop_loss: scalar, mean over the decisions to begin, continue or stop.
        sentence_nll: ``[S]`` nats of each predicted sentence with its end mark; 0 if it is not a target.
        targets: ``[S]`` int64, number of targets (tokens and the end mark) of each predicted sentence; 0 elsewhere.
        stop_nll: ``[S]`` nats of the decision to stop or continue after each sentence; 0 if it is not scored.
        decisions: ``[S]`` bool, whether the decision after each sentence is scored.
        start_nll: scalar, nats of the decisions to begin (after start slots).
        hidden_states: ``[R, N, k, H]`` of the backbone.
        shortlist_loss: scalar, nats per token of :class:`Shortlist`, to be minimized with ``loss``; None without a
            shortlist and outside training.
    """

    loss: Tensor | None = None
    token_loss: Tensor | None = None
    stop_loss: Tensor | None = None
    sentence_nll: Tensor | None = None
    targets: Tensor | None = None
    stop_nll: Tensor | None = None
    decisions: Tensor | None = None
    start_nll: Tensor | None = None
    hidden_states: Tensor | None = None
    shortlist_loss: Tensor | None = None


class SentenceLM(WholeWeights, PreTrainedModel):
    """Sentence encoder, the LLM's own blocks over latents, termination layer and sentence decoder.

    A row of the backbone has ``N`` slots, each with the ``k`` latents of one sentence.
    """

    config_class = SentenceLMConfig
    config: SentenceLMConfig
    base_model_prefix = "sentence_lm"
    main_input_name = "input_ids"
    supports_gradient_checkpointing = True
    _supports_sdpa = True

    def __init__(self, config: SentenceLMConfig) -> None:
        super().__init__(config)
        self.vae = SentenceVAE(config.vae_config)
        check_plugins([record for record in config.plugins if record not in self.vae.config.plugins])
        backbone_class = get_registry().get("backbone", config.backbone_name)
        options = get_registry().options(
            "backbone", config.backbone_name, config.backbone_options, "backbone"
        )
        settings = dict(config.backbone_config)
        backbone_config = AutoConfig.for_model(settings.pop("model_type"), **settings)
        backbone_config._attn_implementation = config._attn_implementation or "sdpa"
        self.backbone: Backbone = backbone_class.from_config(backbone_config, options)  # type: ignore[attr-defined]
        width = self.backbone.hidden_size
        if width != config.vae_config.hidden_size:
            raise ValueError(
                f"vae.hidden_size: {config.vae_config.hidden_size}, but the backbone's is {width}"
            )
        self.termination = nn.Linear(width * config.vae_config.latents, 2)
        if config.start_latent:
            self.start = nn.Parameter(torch.zeros(config.vae_config.latents, width))
        self.shortlist: Shortlist | None = None
        if config.shortlist_rank:
            self.shortlist = Shortlist(
                width, config.vae_config.latents, config.vae_config.vocab_size, config.shortlist_rank
            )
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        if module is self.termination:
            nn.init.zeros_(module.weight)
            nn.init.zeros_(module.bias)

    @property
    def latents(self) -> int:
        """Latents per sentence, ``k``."""
        return self.config.vae_config.latents

    def encode(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Sentences ``[S, L]`` to the backbone's inputs ``[S, k, H]``, at the scale of its token embeddings."""
        return self.vae.encode(input_ids, attention_mask) * self.config.latent_scale

    def backbone_states(
        self,
        latents: Tensor,
        valid: Tensor,
        passage_ids: Tensor,
        position_ids: Tensor,
        past_key_values: Any | None = None,
        past_passage_ids: Tensor | None = None,
        use_cache: bool = False,
    ) -> tuple[Tensor, Any | None]:
        """Run the backbone causally over rows of sentences; passages do not see each other.

        Args:
            latents: ``[R, N, k, H]``.
            valid: ``[R, N]`` bool, False at padding.
            passage_ids: ``[R, N]`` int64; a slot sees only slots of its own passage. Padding has -1.
            position_ids: ``[R, N]`` int64, index of each slot in its document.
            past_key_values: cache of ``P`` earlier slots, with ``past_passage_ids [R, P]``.
            use_cache: return the extended cache.

        Returns:
            hidden_states ``[R, N, k, H]`` and the cache.
        """
        rows, slots, k, width = latents.shape
        past = 0 if past_passage_ids is None else past_passage_ids.shape[1]
        ids = passage_ids if past_passage_ids is None else torch.cat([past_passage_ids, passage_ids], 1)
        same = (passage_ids[:, :, None] == ids[:, None, :]) & valid[:, :, None]
        order = torch.arange(past + slots, device=latents.device)
        # Padding attends to itself: an all-False row of the mask would give NaN.
        allowed = same & (order[None, :] <= order[past:, None]) | (order[None, :] == order[past:, None])
        if k > 1:
            allowed = allowed.repeat_interleave(k, 1).repeat_interleave(k, 2)
            order = torch.arange((past + slots) * k, device=latents.device)
            allowed &= order[None, :] <= order[past * k :, None]
        # Padding may exceed the backbone's positions; its values do not matter.
        positions = position_ids.masked_fill(~valid, 0)[:, :, None] * k + torch.arange(
            k, device=latents.device
        )
        hidden_states, cache = self.backbone(
            inputs_embeds=latents.reshape(rows, slots * k, width),
            attention_mask=allowed[:, None],
            position_ids=positions.flatten(1),
            past_key_values=past_key_values,
            use_cache=use_cache,
        )
        return hidden_states.view(rows, slots, k, width), cache

    def stop_logits(self, hidden_states: Tensor) -> Tensor:
        """``[..., k, H] -> [..., 2]``: continue, stop."""
        return self.termination(hidden_states.flatten(-2))

    def generate(
        self, prompts: Sequence[str], tokenizer: Any, prefix: str | None = None, **settings: Any
    ) -> list[Generation]:
        """Continue texts sentence by sentence.

        Args:
            prompts: a list of texts, not a single one.
            tokenizer: the one saved with the model.
            prefix: text before every prompt, which is read only once.
            **settings: fields of :class:`sentcompress.generation.GenerationSettings`, such as ``max_new_tokens``.

        Returns:
            one result per prompt.

        Raises:
            InputError: a prompt is empty or not text, or a setting is unknown or does not fit.
        """
        # Generation is built on the models: this method is the one arrow back (tests/test_imports.py).
        from sentcompress.generation.engine import SentenceGenerator
        from sentcompress.generation.settings import DEFAULT_SETTINGS, GenerationSettings

        generator = SentenceGenerator(self, tokenizer)
        shared = None if prefix is None else generator.read_prefix(prefix)
        chosen = GenerationSettings.checked({**DEFAULT_SETTINGS.model_dump(), **settings})
        return generator.generate(prompts, chosen, prefix=shared)

    def rows(self, latents: Tensor, sentence_index: Tensor) -> Tensor:
        """Arrange latents ``[S, k, H]`` in rows ``[R, N, k, H]``; START slots hold the start latent."""
        slots = latents[sentence_index.clamp_min(0)]
        empty = (sentence_index == PADDING)[:, :, None, None]
        slots = slots.masked_fill(empty, 0.0)
        if self.config.start_latent:
            at_start = (sentence_index == START)[:, :, None, None]
            slots = torch.where(at_start, self.start.to(slots.dtype), slots)
        return slots

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        sentence_index: Tensor,
        passage_ids: Tensor,
        scored: Tensor,
        last: Tensor,
        token_loss: TokenLoss | None = None,
        stop_weight: float = 1.0,
        teaching: Teaching | None = None,
        **kwargs: Any,
    ) -> SentenceLMOutput:
        """Predict each sentence from those before it in its document.

        Args:
            input_ids, attention_mask: all sentences of the batch, ``[S, L]``.
            sentence_index: ``[R, N]``, rows of sentence indices; -1 is padding, -2 the start of a document.
            passage_ids: ``[R, N]``, the passage of each slot; -1 at padding.
            scored: ``[S]`` bool, sentences that are targets if their passage has a slot before them.
            last: ``[S]`` bool, sentences that end their document.
            token_loss: by default focal with gamma 2; its gamma also applies to the stop decisions.
            stop_weight: weight of the stop loss.
            teaching: what a token-level LLM expects at each token of the ``S`` sentences; None: the text only.
        """
        token_loss = token_loss or TokenLoss()
        latents = self.encode(input_ids, attention_mask)
        valid = sentence_index != PADDING
        hidden_states, _ = self.backbone_states(
            self.rows(latents, sentence_index), valid, passage_ids, positions_in_passages(passage_ids)
        )

        found = predictions(sentence_index, passage_ids, scored, last)
        has_target, targets_at, ends = found.has_target, found.targets_at, found.ends
        predictors = hidden_states[:, :-1][has_target]

        size = len(input_ids)
        sentence_nll = latents.new_zeros(size, dtype=torch.float32)
        targets = torch.zeros(size, dtype=torch.long, device=latents.device)
        token_loss_mean = latents.sum() * 0.0
        if len(targets_at):
            decoded, conditioning, streams, is_scored = targets_at, predictors, None, None
            if self.vae.decoder.context:
                # All sentences in the order of their texts: those that are not targets are still read as context.
                slots = sentence_index >= 0
                rows = torch.arange(len(passage_ids), device=passage_ids.device)[:, None]
                decoded, streams = sentence_index[slots], (rows * size + passage_ids)[slots]
                all_conditioning = hidden_states.new_zeros(size, *latents.shape[1:])
                predicted = found.predicted
                conditioning = all_conditioning.index_copy(
                    0, sentence_index[:, 1:][predicted], hidden_states[:, :-1][predicted]
                )[decoded]
                is_scored = torch.zeros_like(scored).index_fill(0, targets_at, True)[decoded]
            token_losses, nll, counts = self.vae.decode_nll(
                conditioning,
                input_ids[decoded],
                attention_mask[decoded],
                token_loss,
                streams,
                is_scored,
                None if teaching is None else teaching.of(decoded),
            )
            token_loss_mean = token_losses.mean()
            sentence_nll = sentence_nll.index_copy(0, decoded, nll)
            targets = targets.index_copy(0, decoded, counts)

        deciders = torch.cat([predictors, hidden_states[ends]])
        before = torch.cat([sentence_index[:, :-1][has_target], sentence_index[ends]])
        stop = torch.cat([torch.zeros_like(targets_at), torch.ones_like(sentence_index[ends])])
        stop_losses, decision_nll = stop_loss(self.stop_logits(deciders), stop, token_loss.gamma)
        stop_loss_mean = stop_losses.mean() if len(stop) else token_loss_mean * 0.0
        shortlist_loss = None
        if self.shortlist is not None and self.training:
            shortlist_loss = token_loss_mean.detach() * 0.0
            if len(targets_at):
                shortlist_loss = self.shortlist.loss(
                    predictors, self.vae.output_weight, input_ids[targets_at], attention_mask[targets_at]
                )
        real = before >= 0
        stop_nll = latents.new_zeros(size, dtype=torch.float32).index_copy(
            0, before[real], decision_nll[real]
        )
        decisions = torch.zeros(size, dtype=torch.bool, device=latents.device)
        decisions[before[real]] = True
        return SentenceLMOutput(
            loss=token_loss_mean + stop_weight * stop_loss_mean,
            token_loss=token_loss_mean,
            stop_loss=stop_loss_mean,
            sentence_nll=sentence_nll,
            targets=targets,
            stop_nll=stop_nll,
            decisions=decisions,
            start_nll=decision_nll[~real].sum(),
            hidden_states=hidden_states,
            shortlist_loss=shortlist_loss,
        )


class Predictions(NamedTuple):
    """What a batch of passages predicts.

    Attributes:
        predicted: ``[R, N - 1]`` bool, slots after which a sentence of the same passage follows.
        has_target: ``[R, N - 1]`` bool, those of them whose following sentence is scored.
        targets_at: ``[T]`` int64, the scored sentences, in the order of ``has_target``.
        ends: ``[R, N]`` bool, slots of sentences that end their document.
    """

    predicted: Tensor
    has_target: Tensor
    targets_at: Tensor
    ends: Tensor


def predictions(sentence_index: Tensor, passage_ids: Tensor, scored: Tensor, last: Tensor) -> Predictions:
    """What :meth:`SentenceLM.forward` predicts of a batch; the arguments are described there."""
    following = sentence_index[:, 1:]
    predicted = (following >= 0) & (passage_ids[:, 1:] == passage_ids[:, :-1])
    has_target = predicted & scored[following.clamp_min(0)]
    ends = (sentence_index >= 0) & last[sentence_index.clamp_min(0)]
    return Predictions(predicted, has_target, following[has_target], ends)


def positions_in_passages(passage_ids: Tensor) -> Tensor:
    """``[R, N]`` passage ids to the position of each slot in its passage, from 0."""
    columns = torch.arange(passage_ids.shape[1], device=passage_ids.device).expand_as(passage_ids)
    begins = torch.ones_like(passage_ids, dtype=torch.bool)
    begins[:, 1:] = passage_ids[:, 1:] != passage_ids[:, :-1]
    return columns - torch.where(begins, columns, 0).cummax(1).values
