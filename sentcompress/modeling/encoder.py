"""SentenceEncoder: token embeddings to hidden states, one sentence at a time (paper section 3.1)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from sentcompress.modeling.configuration import SentenceVAEConfig
from sentcompress.modeling.layers import EncoderBlock
from sentcompress.modeling.ragged import Ragged


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


class GaussianHead(nn.Module):
    """Optional: a log-variance beside each latent, for a KL term. The published model has none."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.log_variance = nn.Linear(hidden_size, hidden_size)

    def forward(self, latents: Tensor) -> tuple[Tensor, Tensor]:
        """``[S, k, H]`` means to a sample around them and the log-variances, both ``[S, k, H]``."""
        log_variance = self.log_variance(latents).clamp(-10, 4)
        return latents + torch.randn_like(latents) * (0.5 * log_variance).exp(), log_variance
