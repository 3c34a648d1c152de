"""Fusion: from the hidden states of a sentence to its latents."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor, nn

from sentcompress.contracts.components import Options as BaseOptions


class Fusion(nn.Module):
    """Turns the encoder's hidden states into ``latents`` vectors per sentence (paper, equation 1: one vector).

    Args:
        hidden_size: width ``H`` of the hidden states.
        options: an instance of ``Options``; None uses its defaults.
    """

    Options: ClassVar[type[BaseOptions]] = BaseOptions

    def __init__(self, hidden_size: int, options: Any | None = None) -> None:
        super().__init__()
        self.hidden_size = hidden_size
        self.options: Any = self.Options() if options is None else options

    @property
    def latents(self) -> int:
        """Vectors per sentence, ``k``; 1 unless overridden."""
        return 1

    def products(self, tokens: float) -> float:
        """Multiplications for a sentence of ``tokens`` tokens, to estimate the cost of decoding.

        Unless overridden, every matrix is counted once per token.
        """
        tables = {id(m.weight) for m in self.modules() if isinstance(m, nn.Embedding)}
        return tokens * sum(p.numel() for p in self.parameters() if p.ndim > 1 and id(p) not in tables)

    def forward(self, hidden_states: Tensor, mask: Tensor) -> Tensor:
        """Fuse the hidden states of each sentence.

        Args:
            hidden_states: ``[S, L, H]``; any finite values at padding, which must not change the result.
            mask: ``[S, L]`` bool, True at tokens, False at padding.

        Returns:
            latents ``[S, k, H]``.
        """
        raise NotImplementedError(f"{type(self).__name__} must implement forward(hidden_states, mask)")
