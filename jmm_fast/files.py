"""Files that are either whole or absent: everything the project writes goes through here."""

import contextlib
import fcntl
import os
import platform
import secrets
import stat
from collections.abc import Callable, Iterator
from pathlib import Path

from jmm_fast.errors import UserError


@contextlib.contextmanager
def atomic_path(path: str | os.PathLike) -> Iterator[Path]:
    """Give a temporary path beside ``path``; on success flush it to disk and rename it to ``path``.

    A crash, an exception or a full disk at any moment leaves the old file (or none) and no temporary file of a
    finished process behind. The rename and the folder entry are flushed too, so a power cut cannot lose a file that
    was reported as written.

    Raises:
        UserError: the folder cannot be written or the disk is full; the line names ``path`` and the reason.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
        mode = stat.S_IMODE(os.fstat(handle).st_mode)
        os.close(handle)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}") from error
    try:
        yield temporary
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.chmod(temporary, mode)  # Some writers put a private file in its place; ours should obey the user's umask.
        os.replace(temporary, path)
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}") from error
    finally:
        temporary.unlink(missing_ok=True)


def atomic_write_bytes(path: str | os.PathLike, data: bytes) -> None:
    """Write ``data`` to ``path``, whole or not at all."""
    with atomic_path(path) as temporary:
        temporary.write_bytes(data)


def atomic_write_text(path: str | os.PathLike, text: str) -> None:
    """Write ``text`` as UTF-8 to ``path``, whole or not at all."""
    atomic_write_bytes(path, text.encode("utf-8"))


@contextlib.contextmanager
def exclusive(
    path: str | os.PathLike, busy: Callable[[str], str], written: str | os.PathLike | None = None
) -> Iterator[None]:
    """Hold the lock file ``path``, whose folder is made if need be, for this process alone.

    The system drops the lock when the process ends, however it ends; the file stays and means nothing by itself. A
    file system that has no locks gives no protection.

    Args:
        busy: what to say when another process, which it is told, holds the lock.
        written: what a line about a folder that cannot be written names; default ``path``.

    Raises:
        UserError: another process holds the lock, or nothing can be written there.
    """
    path = Path(path)
    written = path if written is None else written
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    except OSError as error:
        raise UserError(f"cannot write {written}: {error.strerror or error}") from error
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(busy(os.read(handle, 1000).decode(errors="replace") or "another process")) from error
        except OSError:
            pass  # Not every network file system has locks: better to work without than not at all.
        try:
            os.ftruncate(handle, 0)
            os.write(handle, f"process {os.getpid()} on {platform.node()}".encode())
        except OSError as error:
            raise UserError(f"cannot write {written}: {error.strerror or error}") from error
        yield
    finally:
        os.close(handle)


@contextlib.contextmanager
def locked(folder: str | os.PathLike) -> Iterator[None]:
    """Hold the run in ``folder`` for this process alone, by its file ``.lock``; see :func:`exclusive`."""

    def busy(holder: str) -> str:
        return f"{folder} is being written by {holder}: two runs cannot share a folder"

    with exclusive(Path(folder) / ".lock", busy):
        yield
