"""Fusion: a sentence's hidden states to its latents."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor, nn

from sentcompress.contracts.options import Options as BaseOptions


class Fusion(nn.Module):
    """Turns the encoder's hidden states into ``latents`` vectors a sentence (paper equation 1: one).

    Args:
        hidden_size: width ``H`` of the hidden states.
        options: an instance of ``Options``, or None for its defaults.
    """

    Options: ClassVar[type[BaseOptions]] = BaseOptions

    def __init__(self, hidden_size: int, options: Any | None = None) -> None:
        super().__init__()
        self.hidden_size = hidden_size
        self.options: Any = self.Options() if options is None else options

    @property
    def latents(self) -> int:
        """Vectors a sentence, ``k``; 1 unless a subclass says otherwise."""
        return 1

    def products(self, tokens: float) -> float:
        """Multiplications for a sentence of ``tokens`` tokens, for the computed cost of decoding.

        Every matrix once a token unless a subclass says otherwise.
        """
        tables = {id(m.weight) for m in self.modules() if isinstance(m, nn.Embedding)}
        return tokens * sum(p.numel() for p in self.parameters() if p.ndim > 1 and id(p) not in tables)

    def forward(self, hidden_states: Tensor, mask: Tensor) -> Tensor:
        """Fuse.

        Args:
            hidden_states: ``[S, L, H]``; rows of padding may hold anything finite.
            mask: ``[S, L]`` bool, True where there is a token. Padding must not change the result.

        Returns:
            latents ``[S, k, H]``.
        """
        raise NotImplementedError(f"{type(self).__name__} must implement forward(hidden_states, mask)")
