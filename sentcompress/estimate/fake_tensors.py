"""Models of any size run without memory for their weights and states: what is computed are shapes."""

from __future__ import annotations

import copy
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter, tree_map

_PRODUCTS_OF_EXPERTS = torch.ops.aten._grouped_mm.default
_NEW = torch.ops.aten.new_empty.default
Module = TypeVar("Module", bound=nn.Module)


class WithoutMemory(TorchDispatchMode):
    """Operations on what has no memory give what has none; what models look into is computed as ever.

    torch takes the kernels of a CPU for it, as what has no memory says that it is on one. Writing what has none into
    what has some leaves that as it was.
    """

    def __init__(self) -> None:
        super().__init__()
        self.shapes = FakeTensorMode()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        given = [x for x in tree_iter((args, kwargs)) if isinstance(x, Tensor)]
        if all(_looked_into(x) for x in given):
            return func(*args, **kwargs)
        if func is torch.ops.aten.index.Tensor:  # the number of rows follows from the values
            args = (args[0], _places(args[1]))
        if func is _PRODUCTS_OF_EXPERTS:  # without memory torch has them in bf16 alone
            args, kwargs, func = (args[0], (*args[0].shape[:-1], args[1].shape[-1])), {}, _NEW
        args, kwargs = tree_map(self._shape, (args, kwargs))
        with self.shapes:
            return func(*args, **kwargs)

    def _shape(self, x: Any) -> Any:
        real = isinstance(x, Tensor) and not isinstance(x, FakeTensor)
        return self.shapes.from_tensor(x) if real else x

    def model(self, shape: Module) -> Module:
        """A model on the meta device, as one on the CPU without memory."""
        made: dict[int, Any] = {}
        for tensor in (*shape.parameters(), *shape.buffers()):
            with self.shapes:
                empty = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu")
            learns = tensor.requires_grad
            made[id(tensor)] = nn.Parameter(empty, learns) if isinstance(tensor, nn.Parameter) else empty
        return copy.deepcopy(shape, made)


def _looked_into(x: Tensor) -> bool:
    """Lengths, ids and masks of tokens or cells. Masks of attention have more dimensions, and may be large."""
    return not isinstance(x, FakeTensor) and not x.is_floating_point() and x.ndim <= 2


def _places(indices: list[Tensor | None]) -> list[Tensor | None]:
    """Masks as the places where they are True."""
    found: list[Tensor | None] = []
    for index in indices:
        if index is None or index.dtype not in (torch.bool, torch.uint8):
            found.append(index)
        else:
            found.extend(index.nonzero().unbind(1))
    return found
