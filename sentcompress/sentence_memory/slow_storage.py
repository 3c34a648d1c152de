"""Where the keys and values of older sentences lie: host memory, 8 bits, or a memory-mapped file."""

from __future__ import annotations

import errno
import mmap
import os
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from sentcompress.errors import InputError, StorageError, did_you_mean

KINDS = ("host", "int8", "file")
_FIRST = 256
"""Fewest tokens that a storage has room for; it grows by a quarter, so that little is copied and little is empty."""


SCALE_BYTES = 2
"""Bytes of a scale, which stands behind its codes: a packed tensor is moved about like any other."""


def pack(full: Tensor) -> Tensor:
    """Round keys or values to 8 bits, symmetric around 0, with an fp16 scale for each token and head.

    The largest error is half a 127th of the largest number of a token's key (or value) in one head. Packing what was
    unpacked gives the same codes.

    Args:
        full: ``[..., D]``, floating point.

    Returns:
        int8 ``[..., D + 2]``.
    """
    full = full.detach().float()
    # The rounded scale is used, so its rounding adds no error; a zero scale would divide 0 by 0.
    scale = (full.abs().amax(-1, keepdim=True) / 127).clamp(2**-24, 65504).half()
    codes = (full / scale).round_().clamp_(-127, 127).to(torch.int8)
    return torch.cat([codes, scale.view(torch.int8)], -1)


def unpack(packed: Tensor, dtype: torch.dtype) -> Tensor:
    """The numbers that :func:`pack` rounded.

    Args:
        packed: int8 ``[..., D + 2]``.

    Returns:
        ``[..., D]`` of this dtype.
    """
    scale = packed[..., -SCALE_BYTES:].contiguous().view(torch.float16)
    # In float, since an fp16 product of a large scale would overflow and bf16 has 8 bits itself.
    return packed[..., :-SCALE_BYTES].float().mul_(scale.float()).to(dtype)


def rounded(full: Tensor) -> Tensor:
    """What is left of ``[..., D]`` after packing, with the same dtype."""
    return unpack(pack(full), full.dtype)


class SlowStorage:
    """Keys and values of one text in one block of an LLM that no longer lie in its cache, in host memory.

    Tokens lie one behind the other, each with all heads and its key beside its value: what is read for one head of a
    token is one contiguous piece. Heads, sizes, dtype and device are those of the first tokens.

    Args:
        folder: where the file of :class:`FileStorage` lies.

    Attributes:
        length: tokens that are stored.
    """

    def __init__(self, folder: str | Path | None = None) -> None:
        self.length = 0
        self._folder = folder
        self._own: Tensor | None = None
        """``[capacity, heads, C]``."""
        self._shared: Tensor | None = None
        """``[tokens, heads, C]``: the first tokens, which other texts have too; they are only read."""
        self._empty_key = torch.empty(0)
        """``[heads, 0, D]``: the size of keys, their dtype and their device."""

    is_lossy: ClassVar[bool] = False
    """What is read differs from what was stored."""

    def as_stored(self, full: Tensor) -> Tensor:
        """What would be read of keys or values ``[..., D]`` if they were stored."""
        return full

    def __deepcopy__(self, _: Any) -> SlowStorage:
        other = type(self)(self._folder)
        other.length, other._shared, other._empty_key = self.length, self._shared, self._empty_key
        if self._own is not None:
            other._own = other._grown(None, self._own, len(self._own)).copy_(self._own)
        return other

    def append(self, keys: Tensor, values: Tensor) -> None:
        """Store the next tokens.

        Args:
            keys: ``[heads, L, D]``.
            values: ``[heads, L, D]``; their size may differ from that of the keys.

        Raises:
            StorageError: the disk is full.
        """
        start = self.length - self._shared_length
        stop = start + keys.shape[1]
        if self._own is None:
            self._empty_key = keys[:, :0].detach().clone()
        encoded = self._encode(keys.transpose(0, 1), values.transpose(0, 1))
        if self._own is None:
            self._own = self._grown(None, encoded, max(_FIRST, stop))
        elif stop > (capacity := len(self._own)):
            self._own = self._grown(self._own, encoded, max(stop, capacity + capacity // 4))
        self._own[start:stop].copy_(encoded)
        self.length += keys.shape[1]

    def gather(self, heads: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Single tokens, as a step of decoding recalls them.

        Args:
            heads, tokens: int64 ``[n]`` each.

        Returns:
            Keys ``[n, D]`` and values ``[n, D]`` with the dtype and on the device of the cache.
        """
        count, shared = self._empty_key.shape[0], self._shared_length
        flat = torch.add(heads, tokens, alpha=count).cpu()
        if self._own is None or self._shared is None:
            part = self._shared if self._own is None else self._own
            assert part is not None, "nothing is stored"
            return self._decode(self._select(part, flat))
        own = flat >= shared * count
        first = self._select(self._shared, flat.masked_fill(own, 0))
        more = self._select(self._own, (flat - shared * count).clamp_min_(0))
        return self._decode(torch.where(own[:, None], more, first))

    def read(self) -> tuple[Tensor, Tensor]:
        """Keys and values ``[heads, T, D]`` of all tokens; at least one must be stored."""
        keys, values = self._decode(self.stored())
        return keys.transpose(0, 1), values.transpose(0, 1)

    def stored(self) -> Tensor:
        """All tokens as they are stored, ``[tokens, heads, C]``; another storage of this kind can share them."""
        own = [] if self._own is None else [self._own[: self.length - self._shared_length]]
        parts = own if self._shared is None else [self._shared, *own]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def share(self, stored: Tensor, like: Tensor) -> None:
        """Begin with tokens that stay where they are.

        Args:
            stored: from :meth:`stored`.
            like: keys ``[heads, any, D]`` with the dtype and device of the cache.
        """
        self._shared, self._empty_key = stored, like[:, :0]
        self.length = len(stored)

    @property
    def nbytes(self) -> int:
        """Bytes of the tokens, without the room to grow."""
        part = self._shared if self._own is None else self._own
        return 0 if part is None else self.length * part[0].nbytes

    def to(self, device: torch.device) -> None:
        """Return what is read on another device."""
        self._empty_key = self._empty_key.to(device)

    @property
    def _shared_length(self) -> int:
        return 0 if self._shared is None else len(self._shared)

    def _encode(self, keys: Tensor, values: Tensor) -> Tensor:
        """What is stored of keys and values ``[L, heads, D]``: ``[L, heads, C]``."""
        return torch.cat([keys.detach(), values.detach()], -1)

    def _decode(self, stored: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values ``[..., D]`` of what is stored, ``[..., C]``."""
        both = stored.to(self._empty_key.device, non_blocking=True)
        size = self._empty_key.shape[-1]
        return both[..., :size], both[..., size:]

    def _grown(self, old: Tensor | None, like: Tensor, capacity: int) -> Tensor:
        """``old`` with room for ``capacity`` tokens of the size of ``like [L, heads, C]``."""
        shape = (capacity, *like.shape[1:])
        new = torch.zeros(shape, dtype=like.dtype, pin_memory=self._pinned, device="cpu")
        if old is not None:
            new[: len(old)] = old
        return new

    def _select(self, part: Tensor, flat: Tensor) -> Tensor:
        part = part.flatten(0, 1)
        if not self._pinned:
            return part.index_select(0, flat)
        pinned = torch.empty((len(flat), part.shape[1]), dtype=part.dtype, pin_memory=True)
        return torch.index_select(part, 0, flat, out=pinned)

    @property
    def _pinned(self) -> bool:
        return self._empty_key.is_cuda


class Int8Storage(SlowStorage):
    """Keys and values in 8 bits (:func:`pack`)."""

    is_lossy = True

    def as_stored(self, full: Tensor) -> Tensor:
        return rounded(full)

    def _encode(self, keys: Tensor, values: Tensor) -> Tensor:
        return torch.cat([pack(keys), pack(values)], -1)

    def _decode(self, stored: Tensor) -> tuple[Tensor, Tensor]:
        both = stored.to(self._empty_key.device, non_blocking=True)
        size = self._empty_key.shape[-1] + SCALE_BYTES
        dtype = self._empty_key.dtype
        return unpack(both[..., :size], dtype), unpack(both[..., size:], dtype)


class FileStorage(SlowStorage):
    """Keys and values in a memory-mapped file: they take page cache, which the system frees when it needs memory.

    The file has no name in its folder where the system allows it (Linux, macOS), so nobody else can change or truncate
    it, and it disappears with the memory even if the process is killed. The default folder is the system's temporary
    one; where that lies in memory (tmpfs), name a folder on a disk.
    """

    def __init__(self, folder: str | Path | None = None) -> None:
        super().__init__(folder or tempfile.gettempdir())
        self._file: Any = None

    def _grown(self, old: Tensor | None, like: Tensor, capacity: int) -> Tensor:
        shape = (capacity, *like.shape[1:])
        needed = torch.Size(shape).numel() * like.dtype.itemsize
        try:
            if self._file is None:
                self._file = tempfile.TemporaryFile(dir=self._folder, prefix="sentence-memory-")  # noqa: SIM115
            _reserve(self._file.fileno(), needed)
            mapped = mmap.mmap(self._file.fileno(), needed)
        except OSError as error:
            reason, fix = _REASONS.get(
                error.errno or 0,
                (
                    f"cannot hold a file: {error.strerror or error}",
                    "name a folder that you may write to",
                ),
            )
            raise StorageError(
                f"{self._folder}: {reason}; the sentence memory needs a file of {needed / 2**20:.1f} MiB for each "
                "block of the LLM",
                fix=fix,
            ) from error
        return torch.frombuffer(mapped, dtype=like.dtype).view(shape)


_FULL = "the disk is full", "free some space, or name another folder"
_TOO_MANY = (
    "too many files are open",
    "raise the limit (ulimit -n): each text has two descriptors for each block that recalls",
)
_REASONS = {
    errno.ENOSPC: _FULL,
    errno.EDQUOT: _FULL,
    errno.EMFILE: _TOO_MANY,
    errno.ENFILE: _TOO_MANY,
}
"""What failed and how to fix it, for errors of the system."""


def _reserve(descriptor: int, size: int) -> None:
    """Make a file ``size`` bytes long, and take the space now: a full disk would kill the process at a later write."""
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(descriptor, 0, size)
        return
    start = os.fstat(descriptor).st_size
    os.lseek(descriptor, start, os.SEEK_SET)
    while start < size:
        start += os.write(descriptor, bytes(min(size - start, 2**20)))


def make_storage(kind: str, folder: str | Path | None = None) -> SlowStorage:
    """The storage of one text in one block.

    Args:
        kind: ``host`` (host memory, same dtype, pinned for CUDA), ``int8`` (host memory, 8 bits) or ``file``.
        folder: where the file lies; only for ``file``.

    Raises:
        InputError: an unknown kind, or a folder for a kind that has none.
    """
    if kind not in KINDS:
        raise InputError(
            f"storage={kind!r} is unknown.{did_you_mean(str(kind), KINDS)}", fix=f"one of {', '.join(KINDS)}"
        )
    if folder is not None and kind != "file":
        raise InputError(f"storage={kind!r} has no folder, but {folder} is given", fix="use storage='file'")
    return {"host": SlowStorage, "int8": Int8Storage, "file": FileStorage}[kind](folder)


def gather(
    storages: Sequence[SlowStorage], rows: Tensor, heads: Tensor, tokens: Tensor
) -> tuple[Tensor, Tensor]:
    """As :meth:`SlowStorage.gather`, of the texts of a batch.

    Args:
        storages: of each row; at least one holds something.
        rows, heads, tokens: int64 ``[n]`` each; rows in ascending order.
    """
    if len(storages) == 1:
        return storages[0].gather(heads, tokens)
    counts = torch.bincount(rows, minlength=len(storages)).tolist()
    each = zip(storages, heads.split(counts), tokens.split(counts), strict=True)
    parts = [storage.gather(*where) for storage, *where in each if storage.length]
    keys, values = (torch.cat(part) for part in zip(*parts, strict=True))
    return keys, values


def stored_bytes(storages: Iterable[SlowStorage]) -> int:
    """Bytes of host memory or of files, with the room to grow; what texts share counts once."""
    parts = (part for storage in storages for part in (storage._shared, storage._own) if part is not None)
    return sum({part.data_ptr(): part.nbytes for part in parts}.values())
