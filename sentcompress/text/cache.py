"""The token cache's folders: their key, their proof of wholeness, and their atomic publication. No torch."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import stat
import sys
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any
from uuid import uuid4

from tokenizers import Tokenizer

from sentcompress.contracts import Dataset, Segmenter
from sentcompress.errors import InputError

FORMAT = 2
"""Raised whenever the files of a cache folder change their meaning."""
META = "meta.json"
VARIABLE = "SENTCOMPRESS_CACHE"
VERIFY_LIMIT = 4 << 30
"""Larger caches are checked by file sizes only, since reading them whole would take minutes."""


class CacheDamage(Exception):
    """A cache folder that must be rebuilt; the text says why."""


def cache_root() -> Path:
    """``$SENTCOMPRESS_CACHE``, or ``~/.cache/sentcompress``.

    Raises:
        InputError: it is no path that a folder can have.
    """
    value = os.environ.get(VARIABLE)
    name = f"{VARIABLE}={value}" if value else f"~/.cache/sentcompress, where {VARIABLE} is not set"
    try:
        path = Path(value or "~/.cache/sentcompress").expanduser()
        mode = path.stat().st_mode
    except (FileNotFoundError, NotADirectoryError):  # it is made, or refused, when it is written
        return path
    except RuntimeError:
        raise InputError(
            f"{name}: no home folder of that user is known", fix=f"write the path of a folder in {VARIABLE}"
        ) from None
    except OSError as error:
        raise InputError(
            f"{name}: cannot be used as token cache: {error.strerror}",
            fix=f"set {VARIABLE} to the path of a folder that you may write to",
        ) from None
    if not stat.S_ISDIR(mode):
        raise InputError(f"{name}: not a folder", fix=f"set {VARIABLE} to the path of a folder")
    return path


def digest(text: str | bytes) -> str:
    data = text.encode("utf-8", "surrogatepass") if isinstance(text, str) else text
    return hashlib.blake2b(data, digest_size=16).hexdigest()


def key_parts(
    dataset: Dataset, segmenter: Segmenter, backend: Tokenizer, heldout_documents: int
) -> dict[str, Any]:
    """Everything that changes the content of a corpus, as JSON values."""
    return {
        "format": FORMAT,
        "dataset": {
            **_component(dataset),
            "fingerprint": dataset.fingerprint(),
            "heldout_documents": heldout_documents,
        },
        "segmenter": {
            **_component(segmenter),
            "state": digest(json.dumps(segmenter.state(), sort_keys=True)),
            "max_tokens": segmenter.max_tokens,
        },
        "tokenizer": digest(backend.to_str()),
    }


def key_of(parts: dict[str, Any]) -> str:
    """The folder's name."""
    return digest(json.dumps(parts, sort_keys=True))[:24]


def _component(component: Dataset | Segmenter) -> dict[str, Any]:
    cls = type(component)
    return {
        "class": f"{cls.__module__}.{cls.__qualname__}",
        "code": _code_of(cls),
        "version": _version_of(cls.__module__),
        "options": component.options.model_dump(mode="json"),
    }


def _code_of(cls: type) -> str:
    """A digest of the source file that defines a class: one being written changes without a new version."""
    file = getattr(sys.modules.get(cls.__module__), "__file__", None)
    try:
        return digest(Path(file).read_bytes()) if file else ""
    except OSError:
        return ""


@cache
def _version_of(module: str) -> str:
    """Version of the distribution that has a module; empty when it is in none."""
    top = module.partition(".")[0]
    try:
        return metadata.version(top)
    except metadata.PackageNotFoundError:
        pass
    names = metadata.packages_distributions().get(top, [])
    return ", ".join(f"{name} {metadata.version(name)}" for name in sorted(set(names)))


def file_digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()


def read_meta(folder: Path, key: str) -> dict[str, Any]:
    """``meta.json`` of a whole cache folder.

    Raises:
        CacheDamage: a file is missing, of another size, or does not have its recorded checksum.
    """
    try:
        meta = json.loads((folder / META).read_text(encoding="utf-8"))
        files = meta["files"]
        if meta["key"] != key or meta["format"] != FORMAT:
            raise CacheDamage(f"{META} is of another corpus")
        for name, expected in files.items():
            if (size := (folder / name).stat().st_size) != expected["size"]:
                raise CacheDamage(f"{name} has {size} bytes instead of {expected['size']}")
        if sum(expected["size"] for expected in files.values()) <= VERIFY_LIMIT:
            for name, expected in files.items():
                if file_digest(folder / name) != expected["blake2b"]:
                    raise CacheDamage(f"{name} has been changed")
    except FileNotFoundError as error:
        raise CacheDamage(f"{Path(error.filename).name} is missing") from None
    except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
        raise CacheDamage(f"{META} cannot be read: {type(error).__name__}: {error}") from None
    return meta


def is_whole(folder: Path, key: str) -> bool:
    """Whether :func:`read_meta` finds nothing wrong."""
    try:
        read_meta(folder, key)
    except CacheDamage:
        return False
    return True


def seal(folder: Path, meta: dict[str, Any]) -> None:
    """Flush every file of a folder to the disk and record sizes and checksums in ``meta.json``."""
    files = {}
    for path in sorted(folder.iterdir()):
        files[path.name] = {"size": path.stat().st_size, "blake2b": file_digest(path)}
        _flush(path)
    path = folder / META
    path.write_text(json.dumps({**meta, "files": files}, indent=1, ensure_ascii=True), encoding="utf-8")
    _flush(path)
    _flush(folder)


def publish(temporary: Path, final: Path, key: str) -> None:
    """Rename a sealed folder to its final name.

    Another process may be publishing the same corpus at the same time; the first whole one stays, and a
    damaged one is moved away. Nothing is ever written into a published
    folder, so readers that have it open are safe.
    """
    for _ in range(10):
        try:
            os.rename(temporary, final)
        except OSError:
            if not final.exists():
                raise
            if is_whole(final, key):
                shutil.rmtree(temporary)
                return
            rubbish = final.with_name(f".{final.name}.{uuid4().hex[:8]}.old")
            try:
                os.rename(final, rubbish)
            except FileNotFoundError:
                continue
            shutil.rmtree(rubbish, ignore_errors=True)
        else:
            _flush(final.parent)
            return
    raise OSError(f"{final} keeps being replaced by other processes")


def _flush(path: Path) -> None:
    if path.is_dir() and os.name == "nt":  # Windows cannot open folders
        return
    handle = os.open(path, os.O_RDONLY if os.name != "nt" else os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
