"""Run models of any size without memory for their weights and states: torch computes shapes only."""

from __future__ import annotations

import copy
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter, tree_map

_GROUPED_MM = "aten._grouped_mm.default"
"""By name, since torch 2.6 does not have it."""
_NEW_EMPTY = torch.ops.aten.new_empty.default
Module = TypeVar("Module", bound=nn.Module)


class FakeExecution(TorchDispatchMode):
    """Operations on fake tensors give fake tensors; small tensors whose values models read are computed for real.

    Fake tensors claim to be on the CPU, so torch picks a CPU's kernels for them. Writing a fake tensor into a real one
    leaves the real one as it was.
    """

    def __init__(self) -> None:
        super().__init__()
        self.mode = FakeTensorMode()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        tensors = [x for x in tree_iter((args, kwargs)) if isinstance(x, Tensor)]
        if all(_needs_values(x) for x in tensors):
            return func(*args, **kwargs)
        if func is torch.ops.aten.index.Tensor:  # the number of rows depends on a mask's values
            args = (args[0], _masks_to_indices(args[1]))
        if str(func) == _GROUPED_MM:  # torch has this product of fake tensors in bf16 only
            args, kwargs, func = (args[0], (*args[0].shape[:-1], args[1].shape[-1])), {}, _NEW_EMPTY
        args, kwargs = tree_map(self._to_fake, (args, kwargs))
        with self.mode:
            return func(*args, **kwargs)

    def _to_fake(self, x: Any) -> Any:
        real = isinstance(x, Tensor) and not isinstance(x, FakeTensor)
        return self.mode.from_tensor(x) if real else x

    def fake_copy(self, model: Module) -> Module:
        """A copy of a model on the meta device whose weights are fake tensors on the CPU."""
        fakes: dict[int, Any] = {}
        for tensor in (*model.parameters(), *model.buffers()):
            with self.mode:
                empty = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu")
            trainable = tensor.requires_grad
            fakes[id(tensor)] = nn.Parameter(empty, trainable) if isinstance(tensor, nn.Parameter) else empty
        return copy.deepcopy(model, fakes)


def _needs_values(x: Tensor) -> bool:
    """Numbers, and lengths, ids and masks of tokens or positions. Attention masks have more dimensions."""
    return not isinstance(x, FakeTensor) and x.ndim <= (0 if x.is_floating_point() else 2)


def _masks_to_indices(indices: list[Tensor | None]) -> list[Tensor | None]:
    """Masks as the indices of their True elements."""
    found: list[Tensor | None] = []
    for index in indices:
        if index is None or index.dtype not in (torch.bool, torch.uint8):
            found.append(index)
        else:
            found.extend(index.nonzero().unbind(1))
    return found
