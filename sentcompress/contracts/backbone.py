"""Backbone: a decoder LLM that reads sentence latents instead of token embeddings."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor, nn

from sentcompress.contracts.options import Options as BaseOptions


class Backbone(nn.Module):
    """Feeds an LLM's own modules (positions, blocks, final norm) with latents, causally over sentences.

    A subclass wraps one family. The LLM's output head is not part of it; the token embeddings may be dropped
    with :meth:`drop_token_embeddings`, since the sentence encoder replaces them.
    """

    Options: ClassVar[type[BaseOptions]] = BaseOptions
    model_types: ClassVar[tuple[str, ...]] = ()
    """``config.model_type`` values of transformers this adapter serves."""
    aliases: ClassVar[dict[str, str]] = {}
    """Short names to hub names or ``package:`` folders, e.g. ``opt-1.3b -> facebook/opt-1.3b``."""

    published_configs: ClassVar[dict[str, dict[str, Any]]] = {}
    """Published shapes by hub name: for plans, and for speed work with random weights, without the hub."""
    tiny_configs: ClassVar[tuple[dict[str, Any], ...]] = ()
    """Configurations (``model_type`` and fields) that have every part of the family on a tiny scale: what
    ``sentcompress.testing.check_backbone`` builds and tries."""

    config: Any
    """The transformers configuration of the LLM."""

    @classmethod
    def check_config(cls, config: Any) -> None:
        """Refuse a configuration this adapter cannot serve, before weights are loaded.

        Raises:
            InputError: naming what is wrong with it.
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
        """What computes this LLM's attention right among ``sdpa`` and ``eager``; the first is used unless asked."""
        return ("sdpa", "eager")

    @property
    def hidden_size(self) -> int:
        """Width ``H`` of the vectors the blocks read and return."""
        raise NotImplementedError(f"{type(self).__name__} must implement hidden_size")

    @property
    def num_heads(self) -> int:
        """Attention heads of the blocks (the sentence encoder and decoder use as many by default)."""
        return int(self.config.num_attention_heads)

    @property
    def max_positions(self) -> int:
        """Longest sequence of latents the position encoding allows."""
        return int(self.config.max_position_embeddings)

    @property
    def blocks(self) -> nn.ModuleList:
        """The LLM's decoder blocks, first to last."""
        raise NotImplementedError(f"{type(self).__name__} must implement blocks")

    def project_out(self, hidden_states: Tensor) -> Tensor:
        """What the LLM's own output head reads: ``[..., H] -> [..., width of the head]``."""
        return hidden_states

    def token_embeddings(self, input_ids: Tensor) -> Tensor:
        """Embed tokens as :meth:`forward` takes them: ``[..., T] -> [..., T, H]``.

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
            inputs_embeds: ``[R, N, H]`` latents in place of token embeddings.
            attention_mask: ``[R, 1, N, P + N]`` bool, True where position n may attend (P cached positions).
                The caller makes it causal; it is passed explicitly so that no attention backend decides.
            position_ids: ``[R, N]`` positions, counted from 0 within each document.
            past_key_values: a transformers ``Cache`` with P positions, or None.
            use_cache: return the cache, extended by N positions.

        Returns:
            hidden_states ``[R, N, H]`` after the final norm, and the cache (None without ``use_cache``).
        """
        raise NotImplementedError(f"{type(self).__name__} must implement forward(...)")
