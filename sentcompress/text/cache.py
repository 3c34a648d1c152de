"""The token cache: the key of a corpus, and folders that are built once, checked, and published whole. No torch."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import socket
import stat
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any, TypeVar
from uuid import uuid4

from sentcompress.contracts import Dataset, Segmenter
from sentcompress.errors import InputError, SentCompressError, StorageError
from sentcompress.files import file_digest, fsync
from sentcompress.locks import open_lock_file, try_lock, wait_for_lock
from sentcompress.packages import installed_version
from sentcompress.text.lossless_tokenizer import LosslessTokenizer

FORMAT = 2
"""Raised whenever the files of a cache folder change their meaning."""
META = "meta.json"
VARIABLE = "SENTCOMPRESS_CACHE"
VERIFY_LIMIT = 4 << 30
"""Larger caches are checked by file sizes only, since reading them would take minutes."""
_MAX_BUILDS = 3
"""Another process may damage or replace a cache folder after it was published and before it is opened."""
_STALE_SECONDS = 24 * 3600.0

T = TypeVar("T")


class CacheDamage(Exception):
    """A cache folder that must be rebuilt; the text says why."""


def cache_root() -> Path:
    """``$SENTCOMPRESS_CACHE``, or ``~/.cache/sentcompress``.

    Raises:
        InputError: no folder can have this path.
    """
    value = os.environ.get(VARIABLE, "").strip()
    name = f"{VARIABLE}={value}" if value else f"~/.cache/sentcompress ({VARIABLE} is not set)"
    try:
        path = Path(value or "~/.cache/sentcompress").expanduser()
        mode = path.stat().st_mode
    except (FileNotFoundError, NotADirectoryError):  # created, or refused, when it is written
        return path
    except RuntimeError:
        raise InputError(
            f"{name}: no home folder of that user is known", fix=f"set {VARIABLE} to the path of a folder"
        ) from None
    except OSError as error:
        raise InputError(
            f"{name}: cannot be used as the token cache: {error.strerror}",
            fix=f"set {VARIABLE} to the path of a folder that you may write to",
        ) from None
    if not stat.S_ISDIR(mode):
        raise InputError(f"{name}: not a folder", fix=f"set {VARIABLE} to the path of a folder")
    return path


def digest(text: str | bytes) -> str:
    data = text.encode("utf-8", "surrogatepass") if isinstance(text, str) else text
    return hashlib.blake2b(data, digest_size=16).hexdigest()


def corpus_key(
    dataset: Dataset, segmenter: Segmenter, tokenizer: LosslessTokenizer, heldout_documents: int
) -> str:
    """The name of a corpus' folder: a digest of everything that changes its content."""
    parts = {
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
        "tokenizer": digest(tokenizer.backend.to_str() + tokenizer.prefix),
    }
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
    """A digest of the source file that defines a class: code under development changes without a new version.

    A class may name an earlier file instead; one that inherits from it is code of its own.
    """
    if same := vars(cls).get("same_results_as"):
        return str(same)
    file = getattr(sys.modules.get(cls.__module__), "__file__", None)
    try:
        return digest(Path(file).read_bytes()) if file else ""
    except OSError:
        return ""


@cache
def _version_of(module: str) -> str:
    """The version of the distribution that contains a module; empty if there is none."""
    top = module.partition(".")[0]
    if (version := installed_version(top)) is not None:
        return version
    names = metadata.packages_distributions().get(top, [])
    return ", ".join(f"{name} {installed_version(name)}" for name in sorted(set(filter(None, names))))


def open_cached(
    folder: Path,
    key: str,
    read: Callable[[dict[str, Any]], T],
    fill: Callable[[Path], dict[str, Any]],
    say: Callable[[str], None],
) -> T:
    """Open a cache folder; build it first if it is missing or damaged.

    Args:
        read: opens the folder, given its ``meta.json``.
        fill: writes the files into an empty folder and returns what ``meta.json`` should say.
        say: gets a line when there is something to wait for or to repair.

    Raises:
        StorageError: the cache cannot be written.
        InputError: no folder can have its path.
    """
    builds = 0
    while builds < _MAX_BUILDS:
        try:
            return read(read_meta(folder, key))
        except (CacheDamage, FileNotFoundError) as damage:
            with build_folder(folder, say) as temporary:
                if temporary is None:  # another process was building it
                    continue
                if folder.exists():
                    say(f"token cache {folder}: {damage}; building it again")
                _seal(temporary, {"format": FORMAT, "key": key, **fill(temporary)})
                _publish(temporary, folder, key)
                builds += 1
    raise StorageError(
        f"the token cache {folder} is damaged again as soon as it is built",
        fix=f"check that disk, or set {VARIABLE} to a folder on another one",
    )


def read_meta(folder: Path, key: str) -> dict[str, Any]:
    """``meta.json`` of a whole cache folder.

    Raises:
        CacheDamage: a file is missing, or has another size or checksum than recorded.
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


def _seal(folder: Path, meta: dict[str, Any]) -> None:
    """Flush every file of a folder to the disk and record sizes and checksums in ``meta.json``."""
    files = {}
    for path in sorted(folder.iterdir()):
        files[path.name] = {"size": path.stat().st_size, "blake2b": file_digest(path)}
        fsync(path)
    path = folder / META
    path.write_text(json.dumps({**meta, "files": files}, indent=1, ensure_ascii=True), encoding="utf-8")
    fsync(path)
    fsync(folder)


def _publish(temporary: Path, final: Path, key: str) -> None:
    """Rename a sealed folder to its final name.

    Another process may be publishing the same corpus at the same time: the first whole folder stays, and a damaged one
    is moved away. Nothing is ever written into a published folder, so readers that have it open are safe.
    """
    for _ in range(10):
        try:
            os.rename(temporary, final)
        except OSError:
            if not final.exists():
                raise
            with suppress(CacheDamage):
                read_meta(final, key)
                shutil.rmtree(temporary)
                return
            damaged = final.with_name(f".{final.name}.{uuid4().hex[:8]}.old")
            try:
                os.rename(final, damaged)
            except FileNotFoundError:
                continue
            shutil.rmtree(damaged, ignore_errors=True)
        else:
            fsync(final.parent)
            return
    raise OSError(f"{final} keeps being replaced by other processes")


@contextmanager
def build_folder(final: Path, say: Callable[[str], None]) -> Iterator[Path | None]:
    """An empty folder to fill and publish as ``final``; it is deleted when the block ends, whatever happens in it.

    If another process is building the same folder, wait until it has finished or died, and yield None: look again.
    On a file system without locks nobody waits, and several processes may build the same folder at once.

    Raises:
        StorageError: the cache cannot be written.
        InputError: no folder can have its path.
    """
    temporary: Path | None = None
    with _storage_refusals(final.parent), _build_lock(final, say) as locked:
        if locked is False:
            yield None
            return
        # The name tells where a folder is built under a lock: there, without its lock, it belongs to a dead process.
        host = f"{_boot_id()}-" if locked else ""
        temporary = final.with_name(f".{final.name}.{host}{uuid4().hex[:8]}.tmp")
        try:
            temporary.mkdir(parents=True)
            _remove_leftovers(temporary, final)
            yield temporary
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


@contextmanager
def _storage_refusals(folder: Path) -> Iterator[None]:
    """Turn what the operating system refuses in the block into an error that names the cache's folder."""
    try:
        yield
    except OSError as error:
        raise _refused(folder, error) from error


def _refused(folder: Path, error: OSError) -> SentCompressError:
    message = f"cannot write the token cache {folder}: {error.strerror or error}"
    if error.errno in (errno.ENAMETOOLONG, errno.ELOOP):
        return InputError(message, fix=f"set {VARIABLE} to the path of a folder")
    return StorageError(message, fix=f"free some space there, or set {VARIABLE} to a folder with room")


@contextmanager
def _build_lock(final: Path, say: Callable[[str], None]) -> Iterator[bool | None]:
    """Hold the lock of a cache folder.

    Yields:
        False after waiting for another process that held it, None if there are no locks here.
    """
    path = _lock_file(final)
    descriptor = open_lock_file(path)
    try:
        locked = None if descriptor is None else try_lock(descriptor)
        if descriptor is not None and locked is False:
            say(f"another process is tokenizing this corpus; waiting for it (it holds {path})")
            wait_for_lock(descriptor)
        yield locked
    finally:
        if descriptor is not None:
            os.close(descriptor)


def _lock_file(final: Path) -> Path:
    # Never deleted: a process that has it open would hold another lock than the next one, which opens a new file.
    return final.parent.parent / "locks" / f"{final.parent.name}-{final.name}"


@cache
def _boot_id() -> str:
    """A name for this machine since it started: on some network file systems others do not see its locks."""
    boot = Path("/proc/sys/kernel/random/boot_id")
    text = socket.gethostname() + (boot.read_text(encoding="ascii") if boot.exists() else "")
    return hashlib.blake2b(text.encode(), digest_size=4).hexdigest()


def _remove_leftovers(own: Path, final: Path) -> None:
    """Delete what killed builds left behind: at once if the lock shows that they are dead, else after a day.

    Both times are the file system's, so nothing looks old only because a clock was changed.
    """
    now = own.stat().st_mtime
    for path in own.parent.glob(".*.tmp"):
        if path == own:
            continue
        with suppress(FileNotFoundError), _held_if_dead(path, own, final) as dead:
            if dead or now - path.stat().st_mtime > _STALE_SECONDS:
                shutil.rmtree(path, ignore_errors=True)
    for path in own.parent.glob(".*.old"):  # a damaged folder that some process was about to delete
        shutil.rmtree(path, ignore_errors=True)


@contextmanager
def _held_if_dead(path: Path, own: Path, final: Path) -> Iterator[bool]:
    """Whether a temporary folder's process is known to be dead; its lock is held meanwhile, so none can start."""
    _, key, made, _ = path.name.split(".") if path.name.count(".") == 3 else ("", "", "", "")
    if not made.startswith(f"{_boot_id()}-"):
        yield False
    elif key == final.name:
        yield own.name.startswith(f".{key}.{_boot_id()}-")  # this process holds the lock already
    else:
        descriptor = open_lock_file(_lock_file(final.with_name(key)))
        try:
            yield descriptor is not None and try_lock(descriptor) is True
        finally:
            if descriptor is not None:
                os.close(descriptor)
