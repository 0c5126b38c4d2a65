"""The files of a data set as its owners hand it out: a folder, a ``.zip`` that need not be unpacked, or one file."""

import os
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from jmm_fast.errors import UserError

MAX_FILE_BYTES = 256 << 20
"""No recording of one scene is larger as text; a member of an archive that claims to be would only exhaust memory."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SourceFile:
    """One file: ``name`` below the root, ``/`` between folders; ``size`` in bytes; ``stamp`` changes when it does."""

    name: str
    size: int
    stamp: int

    @property
    def stem(self) -> str:
        """The name without folders and without what follows the first dot of the last part."""
        return PurePosixPath(self.name).name.partition(".")[0]

    @property
    def bare(self) -> PurePosixPath:
        """The whole name without its ending."""
        return PurePosixPath(self.name).with_suffix("")


class FileTree:
    """All files below ``path`` that end in one of ``suffixes``, in the order of their names.

    Args:
        path: a folder (searched to any depth, hidden files left out), a ``.zip`` archive, or a single file.
        suffixes: lower-case endings, such as ``.skeleton``; upper-case ones are taken too.

    Raises:
        UserError: nothing there, not a readable archive, or an archive whose member names climb out of it.

    Nothing is ever written: names of an archive's members serve as names alone.
    """

    def __init__(self, path: Path, suffixes: tuple[str, ...]) -> None:
        self.path = Path(path)
        self._archive: zipfile.ZipFile | None = None
        if self.path.is_dir():
            files = list(self._walk(suffixes))
        elif not self.path.exists():
            raise UserError(f"{path}: no such file or folder")
        elif self.path.suffix.lower() == ".zip":
            files = self._members(suffixes)
        else:
            held = self.path.stat()
            files = [SourceFile(name=self.path.name, size=held.st_size, stamp=held.st_mtime_ns)]
        self.files = sorted(files, key=lambda file: file.name)
        if not self.files:
            raise UserError(f"{path}: no {' or '.join(suffixes)} file in it")

    def _walk(self, suffixes: tuple[str, ...]):
        def refuse(error: OSError) -> None:
            raise UserError(f"{error.filename}: {error.strerror}")

        for folder, folders, names in os.walk(self.path, onerror=refuse):
            folders[:] = [name for name in folders if not name.startswith(".")]
            for name in names:
                if name.lower().endswith(suffixes) and not name.startswith("."):
                    path = Path(folder, name)
                    held = path.stat()
                    yield SourceFile(
                        name=path.relative_to(self.path).as_posix(), size=held.st_size, stamp=held.st_mtime_ns
                    )

    def _members(self, suffixes: tuple[str, ...]) -> list[SourceFile]:
        try:
            self._archive = zipfile.ZipFile(self.path)
        except (zipfile.BadZipFile, OSError, ValueError) as error:
            raise UserError(f"{self.path}: not a whole .zip archive: {error}") from error
        files = []
        for member in self._archive.infolist():
            parts = PurePosixPath(member.filename.replace("\\", "/")).parts
            if member.is_dir() or not member.filename.lower().endswith(suffixes) or parts[0] == "__MACOSX":
                continue
            if ".." in parts or parts[0] == "/":
                raise UserError(f"{self.path}: member {member.filename!r} climbs out of the archive")
            files.append(SourceFile(name=member.filename, size=member.file_size, stamp=member.CRC))
        return files

    def read(self, file: SourceFile) -> bytes:
        """The bytes of ``file``; safe to call from several threads.

        Raises:
            UserError: it is gone, damaged, encrypted, or larger than 256 MB; without the file's name.
        """
        if file.size > MAX_FILE_BYTES:
            raise UserError(f"it has {file.size} bytes, expected at most {MAX_FILE_BYTES}")
        try:
            if self._archive is None:
                path = self.path / file.name if self.path.is_dir() else self.path
                return path.read_bytes()
            with self._archive.open(file.name) as member:
                # The size that an archive states may be a lie; read no more than is sane.
                data = member.read(MAX_FILE_BYTES + 1)
        except (OSError, zipfile.BadZipFile, zlib.error, EOFError, RuntimeError, NotImplementedError) as error:
            raise UserError(f"cannot be read: {error}") from error
        if len(data) > MAX_FILE_BYTES:
            raise UserError(f"it has more than {MAX_FILE_BYTES} bytes, expected at most as many")
        return data

    def beside(self, name: str) -> Callable[[], bytes] | None:
        """Reader of the file called exactly ``name`` below the root, whatever its suffix; None where there is none."""
        if self._archive is not None:
            if name not in self._archive.namelist():
                return None
            held = self._archive.getinfo(name)
            return lambda: self.read(SourceFile(name=name, size=held.file_size, stamp=held.CRC))
        path = self.path / name
        if not path.is_file():
            return None
        held = path.stat()
        return lambda: self.read(SourceFile(name=name, size=held.st_size, stamp=held.st_mtime_ns))
