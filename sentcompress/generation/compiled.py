"""The decoder's step, compiled: a CUDA graph on a GPU, fused loops on a CPU, not a call for each small operation."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn

from sentcompress.errors import InputError
from sentcompress.modeling.decoder import DecoderCache, SentenceDecoder


class CompiledStep:
    """Calls :meth:`SentenceDecoder.step_all`, compiled when it is first called and again for other numbers of texts.

    On a GPU ``torch.compile`` records it as a CUDA graph (``reduce-overhead``), for which the keys and values stay
    where they are from step to step.

    Args:
        decoder: in eval mode.

    Raises:
        InputError: the decoder is made of the LLM's own blocks; at the first step: torch cannot compile here.
    """

    def __init__(self, decoder: nn.Module) -> None:
        if not isinstance(decoder, SentenceDecoder):
            raise InputError(
                "compile: the decoder is made of the LLM's own blocks, whose cache grows with each token",
                fix="leave compile out, or train with vae.init random or embeddings",
            )
        self.graphs = next(decoder.parameters()).device.type == "cuda"
        mode = "reduce-overhead" if self.graphs else None
        self._call = cast(Any, torch.compile(decoder.step_all, mode=mode, fullgraph=True))

    def settle(self, cache: DecoderCache) -> None:
        """Promise that keys and values stay where they are, until the cache is made anew."""
        if self.graphs:
            for layer in cache.layers:
                torch._dynamo.mark_static_address(layer.keys)
                torch._dynamo.mark_static_address(layer.values)

    def step(self, embeddings: Tensor, cache: DecoderCache, rows: Tensor | None) -> Tensor:
        """One more position in some rows: ``[B, H] -> [B, H]``, extending ``cache``.

        Args:
            embeddings: of all rows, those that wait too.
            rows: ``[b]`` int64, those that go on; None: all.
        """
        going = torch.ones_like(cache.positions, dtype=torch.bool)
        if rows is not None:
            going = torch.zeros_like(going).index_fill(0, rows, True)
        if self.graphs:
            torch.compiler.cudagraph_mark_step_begin()
        cache.even, cache.reading = None, 0  # they change at each step, and would be compiled in
        try:
            states: Tensor = self._call(embeddings, cache, going)
        except torch._dynamo.exc.TorchDynamoException as error:
            reason = str(error).strip().splitlines()[0]
            raise InputError(
                f"compile: torch could not compile the decoder's step here: {reason}",
                fix="leave compile out; on a CPU torch needs a C++ compiler (g++)",
            ) from error
        cache.positions = cache.positions + going
        return states
