"""Backbone: a decoder LLM that reads sentence latents instead of token embeddings."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor, nn

from sentcompress.contracts.components import Options as BaseOptions


class Backbone(nn.Module):
    """Runs an LLM's own modules (positions, blocks, final norm) on latents, causally over sentences.

    A subclass wraps one model family. The LLM's output head is not part of it; the token embeddings may be dropped
    with :meth:`drop_token_embeddings`, since the sentence encoder replaces them.
    """

    Options: ClassVar[type[BaseOptions]] = BaseOptions
    model_types: ClassVar[tuple[str, ...]] = ()
    """The ``config.model_type`` values of transformers that this adapter supports."""
    aliases: ClassVar[dict[str, str]] = {}
    """Short names for hub names or ``package:`` folders, e.g. ``opt-1.3b -> facebook/opt-1.3b``."""

    published_configs: ClassVar[dict[str, dict[str, Any]]] = {}
    """Published configurations by hub name, for estimates and speed runs with random weights without the hub."""
    tiny_configs: ClassVar[tuple[dict[str, Any], ...]] = ()
    """Tiny configurations (``model_type`` and fields) that cover every feature of the family;
    ``sentcompress.testing.check_backbone`` builds and tests them."""

    config: Any
    """The transformers configuration of the LLM."""

    @classmethod
    def check_config(cls, config: Any) -> None:
        """Refuse a configuration that this adapter does not support, before weights are loaded.

        Raises:
            InputError: says what is wrong with it.
        """

    @classmethod
    def from_causal_lm(cls, model: Any, options: Any | None = None) -> Backbone:
        """Wrap a loaded ``transformers`` causal LM (its modules are shared, not copied)."""
        raise NotImplementedError(f"{cls.__name__} must implement from_causal_lm(model, options)")

    @classmethod
    def from_config(cls, config: Any, options: Any | None = None) -> Backbone:
        """Build with random weights and no token embeddings, from a transformers configuration."""
        raise NotImplementedError(f"{cls.__name__} must implement from_config(config, options)")

    @classmethod
    def attention_implementations(cls, config: Any) -> tuple[str, ...]:  # noqa: ARG003
        """Those of ``sdpa`` and ``eager`` that are correct for this LLM; the first is the default."""
        return ("sdpa", "eager")

    @property
    def hidden_size(self) -> int:
        """Width ``H`` of the blocks' inputs and outputs."""
        raise NotImplementedError(f"{type(self).__name__} must implement hidden_size")

    @property
    def num_heads(self) -> int:
        """Attention heads per block, also the default of the sentence encoder and decoder."""
        return int(self.config.num_attention_heads)

    @property
    def max_positions(self) -> int:
        """Longest sequence of latents that the position encoding allows."""
        return int(self.config.max_position_embeddings)

    @property
    def blocks(self) -> nn.ModuleList:
        """The LLM's decoder blocks, first to last."""
        raise NotImplementedError(f"{type(self).__name__} must implement blocks")

    def project_out(self, hidden_states: Tensor) -> Tensor:
        """Project to what the LLM's own output head reads: ``[..., H] -> [..., width of the head]``."""
        return hidden_states

    def token_embeddings(self, input_ids: Tensor) -> Tensor:
        """Embed tokens as :meth:`forward` expects them: ``[..., T] -> [..., T, H]``.

        Raises:
            RuntimeError: the token embeddings were dropped.
        """
        raise NotImplementedError(f"{type(self).__name__} must implement token_embeddings(input_ids)")

    def drop_token_embeddings(self) -> None:
        """Free the token embeddings; the sentence encoder has its own."""
        raise NotImplementedError(f"{type(self).__name__} must implement drop_token_embeddings()")

    def forward(
        self,
        inputs_embeds: Tensor,
        attention_mask: Tensor,
        position_ids: Tensor,
        past_key_values: Any | None = None,
        use_cache: bool = False,
    ) -> tuple[Tensor, Any | None]:
        """Run the blocks.

        Args:
            inputs_embeds: ``[R, N, H]`` latents instead of token embeddings.
            attention_mask: ``[R, 1, N, P + N]`` bool, True where position n may attend (P cached positions). It is
                causal, and explicit, so that causality does not depend on the attention implementation.
            position_ids: ``[R, N]`` positions, counted from 0 within each document.
            past_key_values: a transformers ``Cache`` with P positions, or None.
            use_cache: also return the cache, extended by N positions.

        Returns:
            hidden_states ``[R, N, H]`` after the final norm, and the cache (None without ``use_cache``).
        """
        raise NotImplementedError(f"{type(self).__name__} must implement forward(...)")
