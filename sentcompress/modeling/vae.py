"""SentenceVAE: sentence encoder, fusion and sentence decoder (paper section 3.1)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel
from transformers.utils import ModelOutput

from sentcompress.errors import PluginError
from sentcompress.modeling.configuration import SentenceVAEConfig, check_plugins
from sentcompress.modeling.decoder import SentenceDecoder
from sentcompress.modeling.layers import EncoderBlock, Ragged
from sentcompress.modeling.llm_blocks import LLMDecoder, LLMEncoder
from sentcompress.modeling.losses import (
    Teaching,
    TokenLoss,
    distillation_loss,
    floored_kl,
    kl_to_standard_normal,
)
from sentcompress.modeling.weight_checks import WholeWeights
from sentcompress.registry import describe_component, get_registry


@dataclass
class SentenceVAEOutput(ModelOutput):
    """Result of :meth:`SentenceVAE.forward`.

    Attributes:
        loss: scalar, ``token_loss`` plus ``kl_loss``.
        token_loss: scalar, mean over the targets (tokens and one end mark per sentence).
        kl_loss: scalar, ``kl_weight`` times the KL term of a ``variational`` model in training, else 0.
        nll: ``[S]`` negative log-likelihood of each sentence with its end mark, in nats.
        targets: ``[S]`` int64, targets of each sentence.
        latents: ``[S, k, H]``.
    """

    loss: Tensor | None = None
    token_loss: Tensor | None = None
    kl_loss: Tensor | None = None
    nll: Tensor | None = None
    targets: Tensor | None = None
    latents: Tensor | None = None


class SentenceEncoder(nn.Module):
    """Learned positions and ``encoder_layers`` self-attention blocks."""

    def __init__(self, config: SentenceVAEConfig) -> None:
        super().__init__()
        self.embed_positions = nn.Embedding(config.max_sentence_tokens, config.hidden_size)
        self.dropout = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(EncoderBlock(config) for _ in range(config.encoder_layers))
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(self, embeddings: Tensor, layout: Ragged) -> Tensor:
        """``[T, H]`` token embeddings to ``[T, H]`` hidden states, for the sentences of ``layout``."""
        hidden_states = self.dropout(embeddings + self.embed_positions(layout.positions))
        for block in self.blocks:
            hidden_states = block(hidden_states, layout)
        return self.norm(hidden_states)


def pad_sentences(
    sentences: Sequence[Sequence[int]], device: torch.device, pad_token_id: int = 0
) -> tuple[Tensor, Tensor]:
    """Sentences given as token ids to ``input_ids`` and ``attention_mask [S, L]``, padded on the right."""
    lengths = torch.tensor([len(ids) for ids in sentences])
    mask = torch.arange(int(lengths.max())) < lengths[:, None]
    input_ids = torch.full(mask.shape, pad_token_id)
    input_ids[mask] = torch.tensor([token for ids in sentences for token in ids])
    return input_ids.to(device), mask.to(device)


class GaussianHead(nn.Module):
    """Optional: a log-variance for each latent, for a KL term. The published model has none."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.log_variance = nn.Linear(hidden_size, hidden_size)

    def forward(self, latents: Tensor) -> tuple[Tensor, Tensor]:
        """Means ``[S, k, H]`` to samples around them and log-variances, both ``[S, k, H]``."""
        log_variance = self.log_variance(latents).clamp(-10, 4)
        return latents + torch.randn_like(latents) * (0.5 * log_variance).exp(), log_variance


class SentenceVAE(WholeWeights, PreTrainedModel):
    """Turns sentences into latents and latents into sentences."""

    config_class = SentenceVAEConfig
    config: SentenceVAEConfig
    base_model_prefix = "vae"
    main_input_name = "input_ids"

    def __init__(self, config: SentenceVAEConfig) -> None:
        super().__init__(config)
        check_plugins(config.plugins)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        if not config.tie_embeddings:
            self.decoder_embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.encoder = LLMEncoder(config) if config.blocks == "backbone" else SentenceEncoder(config)
        self.fusion = get_registry().create(
            "fusion", config.fusion["name"], config.fusion.get("options"), hidden_size=config.hidden_size
        )
        if config.variational:
            self.gaussian = GaussianHead(config.hidden_size)
        self.decoder = LLMDecoder(config) if config.blocks == "backbone" else SentenceDecoder(config)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=self.config.embed_init_std)
        elif isinstance(module, nn.Linear):
            # The default keeps the scale of activations at any width; with 0.02, narrow models learn to reconstruct
            # far too slowly.
            nn.init.normal_(module.weight, std=self.config.init_std or module.in_features**-0.5)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.LayerNorm):
            nn.init.ones_(module.weight)
            nn.init.zeros_(module.bias)
        elif hasattr(module, "reset_parameters") and type(module).__module__.split(".")[0] != "torch":
            cast(Any, module).reset_parameters()  # a fusion with parameters of its own

    def get_input_embeddings(self) -> nn.Module:
        return self.embed_tokens

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.embed_tokens = cast(nn.Embedding, value)

    @property
    def output_weight(self) -> Tensor:
        """``[V, H]`` of the output head."""
        return self.embed_tokens.weight if self.config.tie_embeddings else self.lm_head.weight

    def embed_targets(self, input_ids: Tensor) -> Tensor:
        """The decoder's token embeddings, times ``embedding_multiplier``: ``[...] -> [..., H]``."""
        table = self.embed_tokens if self.config.tie_embeddings else self.decoder_embed_tokens
        return table(input_ids) * self.config.embedding_multiplier

    def logits(self, hidden_states: Tensor) -> Tensor:
        """``[..., H] -> [..., V]``; for generation, not for training."""
        return F.linear(hidden_states, self.output_weight)

    def encode(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Sentences ``[S, L]`` to latents ``[S, k, H]`` (paper equation 1).

        Raises:
            ValueError: a sentence is empty, or longer than ``max_sentence_tokens``.
            PluginError: the fusion's result has a wrong shape.
        """
        layout, tokens = self._layout(input_ids, attention_mask)
        hidden_states = self.encoder(self.embed_tokens(tokens), layout)
        latents = self.fusion(layout.pad(hidden_states), layout.mask)
        expected = (layout.num_sentences, self.config.latents, self.config.hidden_size)
        if not isinstance(latents, Tensor) or latents.shape != expected:
            got = list(latents.shape) if isinstance(latents, Tensor) else type(latents).__name__
            raise PluginError(
                f"{describe_component('fusion', self.fusion)} returned {got} where [sentences, latents, width] "
                f"{list(expected)} is expected",
                fix="report this to the fusion's author, or use another fusion",
            )
        return latents

    def decode_nll(
        self,
        latents: Tensor,
        input_ids: Tensor,
        attention_mask: Tensor,
        token_loss: TokenLoss,
        streams: Tensor | None = None,
        scored: Tensor | None = None,
        teaching: Teaching | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Teacher-forced loss of decoding sentences from latents.

        Args:
            latents: ``[S, k, H]``; zeros for a sentence that is context only.
            input_ids, attention_mask: the sentences, ``[S, L]``.
            token_loss: the loss.
            streams: ``[S]`` int64, the text each sentence belongs to; those of one text are adjacent and in order, and
                see each other with ``decoder_context``. None: each is a text of its own.
            scored: ``[S]`` bool, the sentences to score; None scores all.
            teaching: what a teacher expects at the tokens of these sentences (it has no end marks).

        Returns:
            loss ``[T]`` of every scored target; NLL ``[S]`` in nats and number of targets ``[S]`` of each sentence, 0
            if it is not scored.
        """
        layout, inputs = self.decoder_inputs(input_ids, attention_mask, streams)
        first = layout.positions == 0
        ends = torch.cat([first[1:], first.new_ones(1)])
        targets = torch.full_like(inputs, self.config.eos_token_id)
        targets[~ends] = inputs[~first]
        hidden_states = self.decoder(self.embed_targets(inputs), layout, latents)
        sentence_ids, lengths = layout.sentence_ids, layout.lengths
        states = None if teaching is None else teaching.states[attention_mask.bool()]
        if scored is not None:
            is_scored = scored[sentence_ids]
            states = None if states is None else states[is_scored[~ends]]
            hidden_states, targets, ends = hidden_states[is_scored], targets[is_scored], ends[is_scored]
            sentence_ids, lengths = sentence_ids[is_scored], lengths * scored
        if teaching is None or states is None:
            loss, nll = token_loss(hidden_states, self.output_weight, targets)
        else:
            marks = token_loss(hidden_states[ends], self.output_weight, targets[ends])
            tokens = distillation_loss(
                hidden_states[~ends], self.output_weight, targets[~ends], teaching, states, token_loss.gamma
            )
            order = torch.cat([ends.nonzero(), (~ends).nonzero()]).squeeze(1).argsort()
            loss, nll = (torch.cat(parts)[order] for parts in zip(marks, tokens, strict=True))
        sums = nll.new_zeros(layout.num_sentences).index_add(0, sentence_ids, nll)
        return loss, sums, lengths

    def decoder_inputs(
        self, input_ids: Tensor, attention_mask: Tensor, streams: Tensor | None = None
    ) -> tuple[Ragged, Tensor]:
        """The decoder's inputs for sentences ``[S, L]``: the layout, and each start token and its tokens, ``[T]``."""
        layout, tokens = self._layout(input_ids, attention_mask, streams)
        longer = layout.longer_by(1)
        inputs = tokens.new_full((len(longer.index),), self.config.bos_token_id)
        inputs[longer.positions != 0] = tokens
        return longer, inputs

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        token_loss: TokenLoss | None = None,
        kl_weight: float = 0.0,
        kl_floor: float = 0.0,
        latent_noise: float = 0.0,
        step_kl: Tensor | None = None,
        **kwargs: Any,
    ) -> SentenceVAEOutput:
        """Self-reconstruction: encode each sentence and decode it again.

        Args:
            input_ids: ``[S, L]`` tokens without special ones, padded on either side.
            attention_mask: ``[S, L]``, 1 at tokens.
            token_loss: focal with gamma 2 unless given.
            kl_weight, kl_floor: weight and floor of the KL term of a ``variational`` model.
            latent_noise: standard deviation of noise on the latents, in training only.
            step_kl: ``[k, H]``, mean of :meth:`kl_nats` over the step that this batch is a part of; None if it is all.
        """
        latents = self.encode(input_ids, attention_mask)
        kl_loss = latents.new_zeros((), dtype=torch.float32)
        conditioning = latents
        if self.config.variational and self.training:
            conditioning, log_variance = self.gaussian(latents)
            kl_loss = kl_weight * floored_kl(kl_to_standard_normal(latents, log_variance), kl_floor, step_kl)
        if latent_noise and self.training:
            conditioning = conditioning + latent_noise * torch.randn_like(conditioning)
        loss, nll, targets = self.decode_nll(
            conditioning, input_ids, attention_mask, token_loss or TokenLoss()
        )
        token_loss_mean = loss.mean()
        return SentenceVAEOutput(
            loss=token_loss_mean + kl_loss,
            token_loss=token_loss_mean,
            kl_loss=kl_loss,
            nll=nll,
            targets=targets,
            latents=latents,
        )

    def kl_nats(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """KL divergence of a ``variational`` model to N(0, 1), of sentences ``[S, L]``: ``[S, k, H]`` nats."""
        latents = self.encode(input_ids, attention_mask)
        return kl_to_standard_normal(latents, self.gaussian(latents)[1])

    def _layout(
        self, input_ids: Tensor, attention_mask: Tensor, streams: Tensor | None = None
    ) -> tuple[Ragged, Tensor]:
        mask = attention_mask.bool()
        lengths = mask.sum(1)
        if len(lengths) and int(lengths.min()) == 0:
            raise ValueError("attention_mask: a sentence has no token")
        layout = Ragged(lengths, streams)
        if layout.max_length > self.config.max_sentence_tokens:
            raise ValueError(
                f"input_ids: a sentence of {layout.max_length} tokens is over max_sentence_tokens "
                f"({self.config.max_sentence_tokens}); split it first (sentcompress.text.segmentation)"
            )
        return layout, input_ids[mask]
