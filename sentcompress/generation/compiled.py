"""The decoder's step, compiled: a CUDA graph on a GPU, fused loops on a CPU."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn

from sentcompress.errors import InputError
from sentcompress.modeling.decoder import DecoderCache, SentenceDecoder


class CompiledStep:
    """Compiles :meth:`SentenceDecoder.step_all` at its first call, and again for other batch sizes.

    On a GPU ``torch.compile`` records a CUDA graph (``reduce-overhead``), so keys and values must not move in memory
    between steps.

    Args:
        decoder: in eval mode.

    Raises:
        InputError: the decoder consists of the LLM's own blocks; or, at the first step, torch cannot compile here.
    """

    def __init__(self, decoder: nn.Module) -> None:
        if not isinstance(decoder, SentenceDecoder):
            raise InputError(
                "compile: the decoder consists of the LLM's own blocks, whose cache grows with each token",
                fix="leave compile out, or train with vae.init random or embeddings",
            )
        self.graphs = next(decoder.parameters()).device.type == "cuda"
        mode = "reduce-overhead" if self.graphs else None
        self._call = cast(Any, torch.compile(decoder.step_all, mode=mode, fullgraph=True))

    def mark_static(self, cache: DecoderCache) -> None:
        """Tell torch that keys and values will not move. Call it again when the cache is reallocated."""
        if self.graphs:
            for layer in cache.layers:
                torch._dynamo.mark_static_address(layer.keys)
                torch._dynamo.mark_static_address(layer.values)

    def step(self, embeddings: Tensor, cache: DecoderCache, rows: Tensor | None) -> Tensor:
        """Advance some texts by one position: ``[B, H] -> [B, H]``, extending ``cache``.

        Args:
            embeddings: of all texts, also of those that wait.
            rows: ``[b]`` int64, the texts that advance; None: all.
        """
        active = torch.ones_like(cache.positions, dtype=torch.bool)
        if rows is not None:
            active = torch.zeros_like(active).index_fill(0, rows, True)
        if self.graphs:
            torch.compiler.cudagraph_mark_step_begin()
        # These change at each step and would be baked into the graph.
        cache.shared_position, cache.latent_steps = None, 0
        try:
            states: Tensor = self._call(embeddings, cache, active)
        except torch._dynamo.exc.TorchDynamoException as error:
            reason = str(error).strip().splitlines()[0]
            raise InputError(
                f"compile: torch could not compile the decoder's step here: {reason}",
                fix="leave compile out; on a CPU torch needs a C++ compiler (g++)",
            ) from error
        cache.positions = cache.positions + active
        return states
