"""Arrays that are longer than memory: written piece by piece, as ordinary ``.npy`` files. No torch."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import numpy as np


class GrowingArray:
    """A ``.npy`` file of one dimension that grows at its end; whole once it is closed.

    Args:
        path: of the file.
        dtype: of its elements.
    """

    def __init__(self, path: Path, dtype: str = "int64") -> None:
        self.dtype = np.dtype(dtype)
        self.length = 0
        self._file = path.open("wb")
        self._header()
        self._begin = self._file.tell()

    def append(self, values: np.ndarray) -> None:
        """Add ``[n]`` values."""
        np.ascontiguousarray(values, dtype=self.dtype).tofile(self._file)
        self.length += len(values)

    def close(self) -> None:
        self._file.seek(0)
        self._header()
        if self._file.tell() != self._begin:  # numpy leaves room for a length of any size
            raise RuntimeError("numpy's header has changed its size")
        self._file.close()

    def _header(self) -> None:
        np.lib.format.write_array_header_1_0(
            self._file,
            {"descr": self.dtype.str, "fortran_order": False, "shape": (self.length,)},
        )


@contextmanager
def growing_arrays(folder: Path, *names: str) -> Iterator[dict[str, GrowingArray]]:
    """int64 arrays by name, in ``folder/NAME.npy``, closed at the end of the block."""
    with ExitStack() as stack:
        arrays = {name: GrowingArray(folder / f"{name}.npy") for name in names}
        for array in arrays.values():
            stack.callback(array.close)
        yield arrays
