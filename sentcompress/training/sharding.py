"""Weights spread over the processes of a run (FSDP2), and files of them that any number of processes can read.

Each process holds a part of every tensor, of the gradients and of the optimizer's moments. The weights of one unit (a
block of the backbone) are gathered when its turn comes and let go after it; what is in no unit, the vocabulary above
all, is gathered for the whole step. Nothing here is pickled: the parts are safetensors files, written and read through
torch's distributed checkpoint.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup, is_initialized
from torch.distributed.checkpoint import state_dict_loader, state_dict_saver
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from sentcompress.distributed import processes
from sentcompress.errors import StorageError


def spread(model: nn.Module, units: Iterable[nn.Module], device: torch.device, processes: int) -> None:
    """Spread a model over all processes, in place; parameters become ``DTensor`` under their old names.

    Args:
        model: the same in every process, on the CPU: a unit is moved to the device and cut before the next one is.
        units: what is gathered by itself, such as the backbone's blocks.
        device: of this process.
    """
    # Nothing here writes into what a module returned, which that would be about: losses are those of one process.
    warnings.filterwarnings("ignore", message=".*returned a view tensor")
    mesh = init_device_mesh(device.type, (processes,))
    for unit in units:
        fully_shard(unit, mesh=mesh)
    fully_shard(model, mesh=mesh)


def is_spread(model: nn.Module) -> bool:
    return isinstance(model, FSDPModule)


def let_go(model: nn.Module) -> None:
    """Let go of gathered weights: a forward pass with no backward pass after it keeps those that are in no unit."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


@contextmanager
def gathered(model: nn.Module) -> Iterator[None]:
    """All weights are whole in every process within the block, for methods other than ``forward``.

    All processes must enter it. Of a model that is not spread nothing changes.
    """
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.unshard()
    try:
        yield
    finally:
        let_go(model)


def whole(tensor: Tensor) -> Tensor:
    """The whole of a tensor that may be spread. All processes must ask for it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def collected(tensor: Tensor) -> Tensor:
    """A tensor that may be spread, whole in the first process's memory and empty in the others; all must ask for it.

    So that no device has to hold a model that was spread because none can.
    """
    if not isinstance(tensor, DTensor):
        return tensor
    full = tensor.full_tensor()
    return full.cpu() if processes().is_main_process else full.new_empty(0)


def whole_state(model: nn.Module) -> dict[str, Tensor]:
    """The model's ``state_dict``, every tensor :func:`collected`, those that are shared still shared."""
    first: dict[int, str] = {}
    owners = {
        name: first.setdefault(id(parameter), name)
        for name, parameter in model.named_parameters(remove_duplicate=False)
    }
    found: dict[str, Tensor] = {}
    state = {}
    for name, value in model.state_dict().items():
        owner = owners.get(name, name)
        if owner not in found:
            found[owner] = collected(value)
        state[name] = found[owner]
    return state


def spread_like(tensor: Tensor, like: Tensor | None) -> Tensor:
    """This process's part of a whole tensor that is to take the place of ``like``, or of its moments."""
    if not isinstance(like, DTensor) or like.shape != tensor.shape:
        return tensor
    return distribute_tensor(tensor.to(like.device), like.device_mesh, like.placements)


def write_parts(folder: Path, tensors: dict[str, Tensor], group: ProcessGroup | None = None) -> None:
    """Write what this process has of each tensor; all processes write into the same folder.

    Args:
        tensors: spread ones, the same names everywhere; others are written by one of those that have them.
        group: of all processes, that nothing else uses meanwhile; None takes the one there is.

    Raises:
        StorageError: in all processes, when one cannot write.
    """
    try:
        writer = HuggingFaceStorageWriter(str(folder), save_distributed=True)
        state_dict_saver.save(tensors, storage_writer=writer, process_group=group)
    except CheckpointException as error:
        rank, (cause, _) = next(iter(error.failures.items()))
        raise StorageError(
            f"{folder.parent.parent}: process {rank} cannot write its part of a checkpoint: {cause}",
            fix="free some space there, or see who may write there",
        ) from cause


def read_parts(folder: Path, like: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Read what :func:`write_parts` wrote, in however many processes: each reads what it needs.

    Args:
        like: parameters by name. A tensor whose name ends with ``/`` and one of these names is spread as it is.
    """
    reader = HuggingFaceStorageReader(str(folder))
    targets: dict[str, Tensor] = {}
    for name, entry in reader.read_metadata().state_dict_metadata.items():
        assert isinstance(entry, TensorStorageMetadata)  # safetensors hold nothing else
        own = like.get(name.rpartition("/")[2])
        if isinstance(own, DTensor) and own.shape == entry.size:
            targets[name] = torch.zeros_like(own.detach(), dtype=entry.properties.dtype)
        else:
            targets[name] = torch.zeros(entry.size, dtype=entry.properties.dtype)
    state_dict_loader.load(targets, storage_reader=reader, no_dist=not is_initialized())
    return targets
