"""Models sharded over the processes of a run (FSDP2), and shard files that any number of processes can read.

Each process holds a shard of every weight, of its gradient and of the optimizer's moments. The weights of one unit (a
block of the backbone) are gathered just before it runs and released after it; weights outside the units, mainly the
vocabulary, stay gathered for the whole step. Nothing here is pickled: shards are safetensors files, written and read
through torch's distributed checkpoint.
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


def shard_model(model: nn.Module, units: Iterable[nn.Module], device: torch.device, processes: int) -> None:
    """Shard a model over all processes, in place; parameters become ``DTensor`` under their old names.

    Args:
        model: the same in every process, on the CPU: each unit is moved to the device and sharded in turn.
        units: modules that are gathered one at a time, such as the backbone's blocks.
        device: of this process.
    """
    # The warning is about writing into a module's outputs, which nothing here does.
    warnings.filterwarnings("ignore", message=".*returned a view tensor")
    mesh = init_device_mesh(device.type, (processes,))
    for unit in units:
        fully_shard(unit, mesh=mesh)
    fully_shard(model, mesh=mesh)


def is_sharded(model: nn.Module) -> bool:
    return isinstance(model, FSDPModule)


def reshard(model: nn.Module) -> None:
    """Release gathered weights: after a forward pass without a backward pass, those outside the units remain."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


@contextmanager
def gathered(model: nn.Module) -> Iterator[None]:
    """Within the block every process has the full weights, for methods other than ``forward``.

    All processes must enter it. A model that is not sharded does not change.
    """
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.unshard()
    try:
        yield
    finally:
        reshard(model)


def whole(tensor: Tensor) -> Tensor:
    """The full tensor, where it may be sharded. All processes must call this."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def collected(tensor: Tensor) -> Tensor:
    """The full tensor in the first process's memory; an empty one in the others if it is sharded.

    So no device has to hold a model that was sharded because it is too large for one. All processes must call this.
    """
    if not isinstance(tensor, DTensor):
        return tensor
    full = tensor.full_tensor()
    return full.cpu() if processes().is_main_process else full.new_empty(0)


def whole_state(model: nn.Module) -> dict[str, Tensor]:
    """The model's ``state_dict`` with every tensor :func:`collected`; shared tensors stay shared."""
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


def shard_like(tensor: Tensor, like: Tensor | None) -> Tensor:
    """This process's shard of a full tensor that replaces ``like`` or one of its moments."""
    if not isinstance(like, DTensor) or like.shape != tensor.shape:
        return tensor
    return distribute_tensor(tensor.to(like.device), like.device_mesh, like.placements)


def write_shards(folder: Path, tensors: dict[str, Tensor], group: ProcessGroup | None = None) -> None:
    """Write this process's shard of each tensor; all processes write into the same folder.

    Args:
        tensors: the same names in all processes; of a tensor that is not sharded, one process writes its copy.
        group: of all processes, not in use for anything else meanwhile; None takes the default group.

    Raises:
        StorageError: in all processes, when one of them cannot write.
    """
    try:
        writer = HuggingFaceStorageWriter(str(folder), save_distributed=True)
        state_dict_saver.save(tensors, storage_writer=writer, process_group=group)
    except CheckpointException as error:
        rank, (cause, _) = next(iter(error.failures.items()))
        raise StorageError(
            f"{folder.parent.parent}: process {rank} cannot write its shard of a checkpoint: {cause}",
            fix="free some disk space there, or check the folder's permissions",
        ) from cause


def read_shards(folder: Path, like: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Read what :func:`write_shards` wrote, in any number of processes: each reads only what it needs.

    Args:
        like: parameters by name. A tensor whose name ends with ``/`` and one of these names is sharded the same way.
    """
    reader = HuggingFaceStorageReader(str(folder))
    targets: dict[str, Tensor] = {}
    for name, entry in reader.read_metadata().state_dict_metadata.items():
        assert isinstance(entry, TensorStorageMetadata)  # safetensors hold tensors only
        own = like.get(name.rpartition("/")[2])
        if isinstance(own, DTensor) and own.shape == entry.size:
            targets[name] = torch.zeros_like(own.detach(), dtype=entry.properties.dtype)
        else:
            targets[name] = torch.zeros(entry.size, dtype=entry.properties.dtype)
    state_dict_loader.load(targets, storage_reader=reader, no_dist=not is_initialized())
    return targets
