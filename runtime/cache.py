"""The cache folder: what is computed once, kept with digests, and made anew when it is damaged."""

import contextlib
import functools
import hashlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import xxhash
from filelock import FileLock, Timeout

from runtime.errors import InputError
from runtime.processes import say

SEAL = "digests.json"


class CacheError(InputError):
    """The cache cannot be used; no other file of the user is at fault."""


def cache_path() -> Path:
    """The folder that SIMPER_CACHE names; by default ~/.cache/simper, or, for a user without a
    home, as in some containers, a folder among the temporary ones."""
    try:
        return Path(os.environ.get("SIMPER_CACHE", "~/.cache/simper")).expanduser()
    except RuntimeError:
        return Path(tempfile.gettempdir()) / f"simper-{os.getuid()}"


def cache_folder(name: str = "") -> Path:
    """The folder `name` in the cache, made if it is not there. Raises CacheError if that fails."""
    folder = cache_path() / name
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CacheError(f"{error}: SIMPER_CACHE must name a folder that can be made") from error
    return folder


@contextlib.contextmanager
def hold(path: Path) -> Iterator[None]:
    """Hold the lock of a file or folder of the cache. Any number of processes may come here: they
    wait, not in a collective, whose timeout a long work would exceed. Raises CacheError if the
    cache may not be written."""
    lock = FileLock(f"{path}.lock", mode=0o666)
    try:
        with contextlib.suppress(Timeout):
            lock.acquire(timeout=5)
        if not lock.is_locked:
            say(f"waiting for another process, which holds {path}.lock")
            lock.acquire()
        yield
    except PermissionError as error:
        problem = f"{error}: the cache is another user's"
        raise CacheError(f"{problem}. Set SIMPER_CACHE to a folder of your own") from error
    finally:
        lock.release()


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[bool]:
    """hold a folder of the cache; gives whether it is there, whole and as it was sealed. One that
    is damaged is removed, with a line."""
    with hold(folder):
        intact = is_intact(folder)
        if folder.exists() and not intact:
            say(f"{folder} is damaged or was not finished: it is made anew")
            shutil.rmtree(folder)
        yield intact


def asked_once(what: tuple, ask: Callable[[], str]) -> str:
    """What ask() returns. Of the ranks that torchrun starts on a node, one asks."""
    launch = (os.getppid(), os.environ.get("TORCHELASTIC_RESTART_COUNT"))
    key = hashlib.sha256(repr((what, launch)).encode()).hexdigest()
    record = cache_folder("fetched") / key
    with hold(record):
        # Process ids are used again, but not within the hours of a start.
        recent = record.exists() and time.time() - record.stat().st_mtime < 6 * 3600
        if recent and "LOCAL_RANK" in os.environ:
            return record.read_text()
        answer = ask()
        record.write_text(answer)
        return answer


def seal(folder: Path, file: Path | None = None) -> None:
    """Keep the digests of all files of a folder, by default in it: it is whole."""
    files = [path for path in folder.rglob("*") if path.is_file() and path.suffix != ".lock"]
    found = {str(path.relative_to(folder)): file_digest(path) for path in sorted(files)}
    file = file or folder / SEAL
    scratch = file.with_name(f"{file.name}.part")
    scratch.write_text(json.dumps(found))
    os.replace(scratch, file)


def is_intact(folder: Path, file: Path | None = None) -> bool:
    """Whether a folder has been sealed, and its files are as they were then."""
    try:
        found = json.loads((file or folder / SEAL).read_text())
        intact = all(file_digest(folder / name) == digest for name, digest in found.items())
        return intact and len(found) > 0
    except (OSError, ValueError, AttributeError):  # not there, or damaged
        return False


def file_digest(path: Path, algorithm: Callable = xxhash.xxh3_128) -> str:
    """The digest of a file: by default XXH3, which is fast and finds damage, but no forgery."""
    return digest_once(path, state_of(path), algorithm)


def state_of(path: Path) -> tuple[int, ...]:
    """What changes whenever a file does. (`cp -p` may keep its size and the time of its content,
    but not that of its last change of any kind.)"""
    status = path.stat()
    return status.st_size, status.st_ino, status.st_mtime_ns, status.st_ctime_ns


@functools.cache
def digest_once(path: Path, state: tuple[int, ...], algorithm: Callable) -> str:
    """file_digest, made again only if the file changes (see state_of)."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, algorithm).hexdigest()


def files_digest(paths: list[Path]) -> str:
    """SHA-256 over the contents of files."""
    return hashlib.sha256(b"".join(map(kept_digest, paths))).hexdigest()


def kept_digest(path: Path) -> bytes:
    """SHA-256 of a large file, which the cache keeps until the file changes (see state_of): the
    ranks of a node, and later runs, do not read it again."""
    path = path.resolve()
    state = repr((str(path), *state_of(path)))
    folder = cache_folder("digests") / hashlib.sha256(state.encode()).hexdigest()
    with locked(folder) as intact:
        if not intact:
            folder.mkdir()
            (folder / "sha256").write_text(file_digest(path, hashlib.sha256))
            seal(folder)
        return bytes.fromhex((folder / "sha256").read_text())
