"""Models sharded over the processes of a run (FSDP2), and shard files that any number of processes can read.

Each process holds a shard of every weight, of its gradient and of the optimizer's moments. The weights of one unit (a
block of the backbone) are gathered just before it runs and released after it; weights outside the units, mainly the
vocabulary, stay gathered for the whole step. Shards are safetensors files, since nothing that is saved may be a
pickle.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed import ProcessGroup, all_gather_object, get_rank, get_world_size, is_initialized
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from sentcompress.distributed import processes
from sentcompress.errors import StorageError
from sentcompress.files import storage_errors

PLACES = "DCP_SHARDING_INFO"
"""In a shard file's metadata: where its tensors begin in the full ones, as torch's distributed checkpoint has it."""
OFFSETS = "saved_offsets"


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

    The files are like those of torch's ``HuggingFaceStorageWriter``, which torch before 2.8 does not have.

    Args:
        tensors: the same names in all processes; of a tensor that is not sharded, the first process writes its copy.
        group: of all processes, not in use for anything else meanwhile; None takes the default group.

    Raises:
        StorageError: in all processes, when one of them cannot write.
    """
    rank = get_rank(group) if is_initialized() else 0
    own, places = {}, {}
    for name, tensor in tensors.items():
        local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
        if rank == 0 or (isinstance(tensor, DTensor) and local.numel()):
            first = _rows(tensor).start if isinstance(tensor, DTensor) else 0
            own[name] = local.detach().contiguous()
            places[name] = {OFFSETS: [first, *[0] * (tensor.ndim - 1)] if tensor.ndim else []}
    refused = None
    try:
        with storage_errors(folder):
            folder.mkdir(parents=True, exist_ok=True)
            file = folder / f"shard-{rank + 1:05d}-model-00001-of-00001.safetensors"
            save_file(own, file, {PLACES: json.dumps(places), "DCP_VERSION": "1.0", "format": "pt"})
    except StorageError as error:
        refused = str(error)
    answers = [refused]
    if is_initialized():
        answers = [None] * get_world_size(group)
        all_gather_object(answers, refused, group)
    for process, answer in enumerate(answers):
        if answer is not None:
            raise StorageError(
                f"{folder.parent.parent}: process {process} cannot write its shard of a checkpoint: {answer}",
                fix="free some disk space there, or check the folder's permissions",
            )


def read_shards(folder: Path, like: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Read what :func:`write_shards` wrote, in any number of processes: each reads only what it needs.

    Args:
        like: parameters by name. A tensor whose name ends with ``/`` and one of these names is sharded the same way.
    """
    shards: dict[str, dict[int, Any]] = {}
    with ExitStack() as files:
        for path in folder.glob("*.safetensors"):
            file = files.enter_context(safe_open(path, framework="pt"))
            places = json.loads(file.metadata()[PLACES])
            for name in places:
                first = sum(places[name][OFFSETS][:1])
                shards.setdefault(name, {})[first] = file.get_slice(name)
        return {name: _joined(parts, like.get(name.rpartition("/")[2])) for name, parts in shards.items()}


def _joined(shards: Mapping[int, Any], like: Tensor | None) -> Tensor:
    """A tensor from its shards by first row: sharded as ``like`` is, if that has the same shape, else whole."""
    shape = shards[0].get_shape()
    if not shape:
        return cast(Tensor, shards[0][...])
    shape = [sum(shard.get_shape()[0] for shard in shards.values()), *shape[1:]]
    sharded = like if isinstance(like, DTensor) and list(like.shape) == shape else None
    rows = range(shape[0]) if sharded is None else _rows(sharded)
    found = [shards[i][max(rows.start - i, 0) : max(rows.stop - i, 0)] for i in sorted(shards)]
    tensor = torch.cat(found)
    if sharded is None:
        return tensor
    size, stride = sharded.shape, sharded.stride()
    local = tensor.to(sharded.device)
    return DTensor.from_local(local, sharded.device_mesh, sharded.placements, shape=size, stride=stride)


def _rows(tensor: DTensor) -> range:
    """The rows that this process holds: FSDP2 cuts the first dimension as ``torch.chunk`` does."""
    rows, mesh = tensor.shape[0], tensor.device_mesh
    each = -(-rows // mesh.size())
    return range(rows)[mesh.get_local_rank() * each :][:each]
