"""``vae.init: backbone``: a sentence encoder and decoder made of the LLM's own first and last blocks."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig

from sentcompress.contracts.backbone import Backbone
from sentcompress.modeling.configuration import SentenceVAEConfig
from sentcompress.modeling.ragged import Ragged
from sentcompress.registry import get_registry


def short_backbone(config: SentenceVAEConfig, layers: int, *, last: bool) -> Backbone:
    """The LLM's adapter with only some of its blocks, weights still to be copied, no token embeddings.

    Raises:
        ValueError: the LLM has fewer blocks.
    """
    settings = dict(config.backbone["config"])
    whole = AutoConfig.for_model(settings.pop("model_type"), **settings)
    name, options = config.backbone["name"], config.backbone.get("options")
    checked = get_registry().options("backbone", name, options, "backbone.options")
    cut = cut_config(whole, layers, last=last)
    return get_registry().get("backbone", name).from_config(cut, checked)  # type: ignore[attr-defined]


def cut_config(config: Any, layers: int, *, last: bool) -> Any:
    """A configuration of the first or last ``layers`` blocks: what it lists block by block is cut likewise."""
    number = config.num_hidden_layers
    if layers > number:
        raise ValueError(f"{layers} blocks were asked for, the LLM has {number}")
    cut = copy.deepcopy(config)
    for field, value in vars(config).items():
        if isinstance(value, list | tuple) and len(value) == number and not field.startswith("_"):
            setattr(cut, field, value[-layers:] if last else value[:layers])
    cut.num_hidden_layers = layers
    return cut


@torch.no_grad()
def copy_blocks(source: Backbone, target: Backbone, *, last: bool) -> None:
    """Give ``target`` the weights of the first or last blocks of ``source``, and all that is not a block."""
    number, layers = len(source.blocks), len(target.blocks)
    first = number - layers if last else 0
    places = {name: module for name, module in source.named_modules() if module is source.blocks}
    prefix = f"{next(iter(places))}."
    weights = source.state_dict()
    for key, value in target.state_dict().items():
        if key.startswith(prefix):
            index, _, rest = key.removeprefix(prefix).partition(".")
            key = f"{prefix}{int(index) + first}.{rest}"
        value.copy_(weights[key])


def _causal(lengths: Tensor, longest: int) -> Tensor:
    """``[S, 1, L, L]`` bool. Padding is on the right, so nothing real sees it."""
    return (
        torch.ones(longest, longest, dtype=torch.bool, device=lengths.device)
        .tril()
        .expand(len(lengths), 1, -1, -1)
    )


class LLMEncoder(nn.Module):
    """The LLM's first blocks, causal within the sentence as they were trained."""

    def __init__(self, config: SentenceVAEConfig) -> None:
        super().__init__()
        self.llm = short_backbone(config, config.encoder_layers, last=False)

    def forward(self, embeddings: Tensor, layout: Ragged) -> Tensor:
        """``[T, H]`` token embeddings to ``[T, H]`` hidden states, for the sentences of ``layout``."""
        return layout.unpad(_run(self.llm, layout.pad(embeddings), layout.lengths))


def _run(llm: Backbone, inputs: Tensor, lengths: Tensor) -> Tensor:
    """``[S, L, H] -> [S, L, H]``, each sentence at positions from 0."""
    positions = torch.arange(inputs.shape[1], device=inputs.device).expand(inputs.shape[:2])
    return llm(inputs, _causal(lengths, inputs.shape[1]), positions)[0]


@dataclass
class LLMDecoderCache:
    """What is cached while a batch of sentences is written.

    Attributes:
        cache: the blocks' transformers cache.
        filled: positions in it, the same in every row.
    """

    cache: Any
    filled: int

    @property
    def layers(self) -> list[Any]:
        """Objects with ``keys`` and ``values``, one a block."""
        return list(self.cache.layers)


class LLMDecoder(nn.Module):
    """The LLM's last blocks; the latents stand before the tokens."""

    def __init__(self, config: SentenceVAEConfig) -> None:
        super().__init__()
        self.prefix = config.latents
        self.context = 0
        self.llm = short_backbone(config, config.decoder_layers, last=True)
        # Latents leave the fusion with a root mean square of 1, token embeddings have the LLM's own.
        self.latent_gain = nn.Parameter(torch.ones(()))

    def forward(self, embeddings: Tensor, layout: Ragged, latents: Tensor) -> Tensor:
        """Teacher-forced pass: as :meth:`sentcompress.modeling.decoder.SentenceDecoder.forward`."""
        told = (latents * self.latent_gain).to(embeddings.dtype)
        inputs = torch.cat([told, layout.pad(embeddings)], dim=1)
        hidden_states = _run(self.llm, inputs, layout.lengths + self.prefix)
        return layout.unpad(hidden_states[:, self.prefix :])

    def start(self, latents: Tensor, context: None = None) -> LLMDecoderCache:
        """Begin ``B`` sentences from ``latents [B, k, H]``; they see nothing before them."""
        state = LLMDecoderCache(None, 0)
        self._extend(latents * self.latent_gain, state)
        return state

    def step(self, embeddings: Tensor, cache: LLMDecoderCache) -> Tensor:
        """One more position in every row: ``[B, H] -> [B, H]``, extending ``cache``."""
        return self._extend(embeddings[:, None], cache)[:, -1]

    def _extend(self, inputs: Tensor, state: LLMDecoderCache) -> Tensor:
        rows, new = inputs.shape[:2]
        total = state.filled + new
        allowed = torch.ones(new, total, dtype=torch.bool, device=inputs.device).tril(state.filled)
        positions = torch.arange(state.filled, total, device=inputs.device).expand(rows, -1)
        states, state.cache = self.llm(
            inputs, allowed.expand(rows, 1, -1, -1), positions, past_key_values=state.cache, use_cache=True
        )
        state.filled = total
        return states
