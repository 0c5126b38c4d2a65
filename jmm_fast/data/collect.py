"""From many files to one set of clips: in chunks, on several threads, in bounded memory, and restartable.

A reader of a folder says which files there are and what one of them holds (:class:`ClipSource`). Here the files are
read in runs of fixed size; what a run gives is written to a work folder beside the store and dropped from memory. When
all runs are there, the store is written from them, one after the other. A run that is there already is not read again,
so a killed ``prepare`` continues; runs do not depend on the number of threads, so neither does the result.
"""

import hashlib
import json
import os
import shutil
import threading
import zipfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from jmm_fast import __version__
from jmm_fast.data.cleaning import edges
from jmm_fast.data.filetree import SourceFile
from jmm_fast.data.store import MIN_FRAMES, StoreContents
from jmm_fast.data.transform import ClipTransform
from jmm_fast.errors import UserError
from jmm_fast.files import atomic_path, atomic_write_text, exclusive
from jmm_fast.progress import Progress
from jmm_fast.skeleton import Skeleton

CHUNK_BYTES = 64 << 20
CHUNK_FILES = 512
_ENTRIES = ("file", "clip", "body", "reason")


@dataclass(kw_only=True, slots=True)
class RawClip:
    """One clip as a reader takes it from a file.

    Attributes:
        name: what the clip is called; no two clips of a data set may share it.
        frames: float32 ``[M, n, V, 3]`` metres, zero where a body is absent.
        label: class index, or the class's name where the classes are those that occur.
        columns: whatever else is known: numbers or text by name, the same names for every clip of a data set.
        confidence: float32 ``[M, n, V]`` in [0, 1]; None: every joint was seen.
    """

    name: str
    frames: np.ndarray
    label: int | str
    columns: dict[str, int | float | str] = field(default_factory=dict)
    confidence: np.ndarray | None = None


@dataclass(kw_only=True, slots=True)
class FileLog:
    """What was taken out of one file, or changed in it, and why; a line each."""

    file: str
    entries: list[tuple[str, str, str, str]] = field(default_factory=list)

    def add(self, reason: str, *, clip: str = "", body: str = "") -> None:
        """Note that ``body`` of ``clip`` was left out; without ``body`` the whole clip, without both the file."""
        self.entries.append((self.file, clip, body, reason))


class ClipSource(Protocol):
    """A folder (or archive) of recordings, as the reader of a format sees it.

    Attributes:
        where: the folder, for messages.
        files: what will be read, in the order of the result.
        skeleton: layout of the frames that :meth:`read` returns.
        class_names: name of each class index; None when :meth:`read` gives names and the classes are those that occur.
        fps: frames per second.
        identity: anything JSON that decides what :meth:`read` returns, besides the files: the reader's options.
    """

    where: str
    files: Sequence[SourceFile]
    skeleton: Skeleton
    class_names: list[str] | None
    fps: float
    identity: Any

    def read(self, file: SourceFile, log: FileLog) -> list[RawClip]:
        """The clips of one file; called from several threads.

        Raises:
            UserError: the file cannot be used; the line says where in it and why, without the file's name.
        """

    def finish(self, contents: StoreContents) -> list[str]:
        """Add splits and the like once all clips are known; returns warnings, a line each."""


class _Chunk:
    """What one run of files gave, on disk; its arrays come into memory when they are asked for."""

    def __init__(self, path: Path) -> None:
        self.path = path
        with np.load(path, allow_pickle=False) as archive:
            self.bodies, self.lengths = archive["bodies"], archive["lengths"]
            self.shape, self.has_confidence = tuple(archive["shape"].tolist()), "confidence" in archive.files
            self.head = json.loads(str(archive["head"]))

    def rows(self) -> np.ndarray:
        return self.bodies * self.lengths

    def array(self, name: str) -> np.ndarray:
        with np.load(self.path, allow_pickle=False) as archive:
            return archive[name]


class ChunkBlock:
    """Rows of a chunk as :func:`jmm_fast.data.store.write_store` takes them: size known, numbers read when needed."""

    def __init__(self, chunk: _Chunk, name: str, keep: np.ndarray) -> None:
        self._chunk, self._name, self._keep = chunk, name, keep
        rows = int(chunk.rows()[keep].sum())
        self.shape = (rows, *chunk.shape[1 : 3 if name == "frames" else 2])
        self.dtype = np.dtype(np.float32 if name == "frames" else np.float16)
        self.nbytes = int(np.prod(self.shape)) * self.dtype.itemsize

    def __len__(self) -> int:
        return self.shape[0]

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        if self._name == "confidence" and not self._chunk.has_confidence:
            return np.ones(self.shape, self.dtype)
        array = self._chunk.array(self._name)
        return array if self._keep.all() else array[np.repeat(self._keep, self._chunk.rows())]


@contextmanager
def collect(
    source: ClipSource,
    out: Path,
    *,
    transform: ClipTransform,
    select: Callable[[StoreContents], np.ndarray] | None = None,
    on_error: str = "fail",
    workers: int = 0,
    say: Callable[[str], None] = print,
) -> Iterator[StoreContents]:
    """Read every file of ``source``; the contents are valid inside the block, whose work folder then goes.

    Args:
        source: the files and how to read one.
        out: the store that will be made; the work folder ``.NAME.work`` lies beside it.
        transform: applied to each clip.
        select: given the contents with all columns and names, the clips to keep (int64 indices).
        on_error: ``fail`` stops at the first file, in order, that cannot be used; ``drop`` leaves out the file or clip
            and logs it.
        workers: threads; 0 is one per core. The result does not depend on it.
        say: takes a line about what is being done.

    Raises:
        UserError: an unusable file (``fail``), two clips of one name, no clip left, or another ``prepare`` at work on
            ``out``. Runs that were read stay in the work folder, so that the same command continues.
    """
    if not source.files:
        raise UserError(f"{source.where}: no file to read")
    folder = out.absolute().parent / f".{out.name}.work"
    runs = list(_runs(source.files))
    with exclusive(folder / "lock", lambda _: f"{out}: another prepare is writing it", written=out):
        try:
            key = _key(source, transform)
            if _stale(folder, key):
                for path in folder.glob("*.npz"):
                    path.unlink()
                atomic_write_text(folder / "key", key)
            chunks = _read_runs(source, runs, folder, transform, on_error, workers, say)
            yield _assemble(source, chunks, transform, select, on_error)
            shutil.rmtree(folder, ignore_errors=True)
        finally:
            # While the lock is held: the folder of another prepare must not go.
            if not any(folder.glob("*.npz")):
                shutil.rmtree(folder, ignore_errors=True)


def first_clip(source: ClipSource) -> RawClip:
    """The first usable clip in the order of the files, as :meth:`ClipSource.read` gives it."""
    for file in source.files:
        try:
            found = source.read(file, FileLog(file=file.name))
        except UserError:
            continue
        for clip in found:
            if _fault(clip, source) is None:
                return clip
    raise UserError(f"{source.where}: no usable clip in {len(source.files)} files")


def _runs(files: Sequence[SourceFile]) -> Iterator[list[SourceFile]]:
    run: list[SourceFile] = []
    size = 0
    for file in files:
        if run and (size + file.size > CHUNK_BYTES or len(run) == CHUNK_FILES):
            yield run
            run, size = [], 0
        run.append(file)
        size += file.size
    yield run


def _key(source: ClipSource, transform: ClipTransform) -> str:
    """What a chunk depends on: this program, the options, and every file's name, size and time."""
    parts = {
        "version": __version__,
        "reader": source.identity,
        "transform": transform.identity,
        "files": [(file.name, file.size, file.stamp) for file in source.files],
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _stale(folder: Path, key: str) -> bool:
    try:
        return (folder / "key").read_text(encoding="utf-8") != key
    except OSError:
        return True


def _read_runs(
    source: ClipSource,
    runs: list[list[SourceFile]],
    folder: Path,
    transform: ClipTransform,
    on_error: str,
    workers: int,
    say: Callable[[str], None],
) -> list[_Chunk]:
    chunks: dict[int, _Chunk] = {}
    for number in range(len(runs)):
        chunk = _whole_chunk(folder / f"{number:06d}.npz")
        # A file dropped under --on-error drop must stop a run under fail.
        if chunk is not None and (on_error == "drop" or not chunk.head["errors"]):
            chunks[number] = chunk
    done = sum(len(runs[number]) for number in chunks)
    if done:
        say(f"continuing: {done} of {len(source.files)} files were read before")
    stop = threading.Event()
    with Progress("prepare", len(source.files), done, step="file", unit="clips") as progress:

        def work(number: int) -> None:
            if not stop.is_set():
                chunks[number] = _read_run(
                    source, runs[number], folder / f"{number:06d}.npz", transform, on_error, stop, progress
                )

        pool = ThreadPoolExecutor(max_workers=workers or os.cpu_count() or 1)
        try:
            futures = [pool.submit(work, number) for number in range(len(runs)) if number not in chunks]
            wait(futures, return_when=FIRST_EXCEPTION)
            if any(future.done() and future.exception() for future in futures):
                # The first in the order of the files is the one to report, whatever the threads' timing: runs before
                # the failed one have begun, so let them end; later ones need not.
                failed = next(i for i, future in enumerate(futures) if future.done() and future.exception())
                for future in futures[failed + 1 :]:
                    future.cancel()
                for future in futures[: failed + 1]:
                    future.result()
        finally:
            stop.set()
            pool.shutdown(wait=True, cancel_futures=True)
    return [chunks[number] for number in range(len(runs))]


def _whole_chunk(path: Path) -> _Chunk | None:
    # Chunks are renamed into place when they are whole, so one that cannot be read was damaged later: read it again.
    try:
        with zipfile.ZipFile(path) as archive:
            return _Chunk(path) if archive.testzip() is None else None
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        return None


def _read_run(
    source: ClipSource,
    run: list[SourceFile],
    path: Path,
    transform: ClipTransform,
    on_error: str,
    stop: threading.Event,
    progress: Progress,
) -> _Chunk:
    clips: list[RawClip] = []
    entries: list[tuple[str, str, str, str]] = []
    errors = 0
    for file in run:
        if stop.is_set():
            raise KeyboardInterrupt
        log = FileLog(file=file.name)
        try:
            found = source.read(file, log)
        except UserError as error:
            if on_error == "fail":
                raise UserError(
                    f"{source.where}: {file.name}: {error} (--on-error drop leaves such files out)"
                ) from error
            log.add(str(error))
            errors += 1
            found = []
        for clip in found:
            clip.frames, clip.confidence = transform(clip.frames, clip.confidence)
            reason = _fault(clip, source)
            if reason is None:
                clips.append(clip)
                continue
            if on_error == "fail":
                raise UserError(
                    f"{source.where}: {file.name}: clip {clip.name} {reason} (--on-error drop leaves such clips out)"
                )
            log.add(reason, clip=clip.name)
            errors += 1
        entries += log.entries
        progress.advance(len(found))
    _write_chunk(path, clips, entries, errors, transform.skeleton.num_joints)
    return _Chunk(path)


def _fault(clip: RawClip, source: ClipSource) -> str | None:
    """Why a clip cannot be trained on; None when it can."""
    frames, confidence = clip.frames, clip.confidence
    assert frames.dtype == np.float32
    if frames.shape[1] < MIN_FRAMES:
        return f"has {frames.shape[1]} frames with a body, expected at least {MIN_FRAMES}"
    if not np.isfinite(frames).all():
        return f"holds {int((~np.isfinite(frames)).sum())} NaN or infinite coordinates"
    if confidence is not None and not ((confidence >= 0) & (confidence <= 1)).all():
        return "holds confidences outside [0, 1]"
    if source.class_names is not None and not 0 <= int(clip.label) < len(source.class_names):
        return f"has class {int(clip.label) + 1}, outside the {len(source.class_names)} classes"
    return None


def _write_chunk(path: Path, clips: list[RawClip], entries: list, errors: int, joints: int) -> None:
    head = {
        "names": [clip.name for clip in clips],
        "labels": [clip.label for clip in clips],
        "told": [clip.confidence is not None for clip in clips],
        "columns": {name: [clip.columns[name] for clip in clips] for name in (clips[0].columns if clips else ())},
        "log": entries,
        "errors": errors,
    }
    rows = [clip.frames.reshape(-1, joints, 3) for clip in clips]
    arrays = {
        "bodies": np.array([len(clip.frames) for clip in clips], dtype=np.int64),
        "lengths": np.array([clip.frames.shape[1] for clip in clips], dtype=np.int64),
        "frames": np.concatenate([np.empty((0, joints, 3), np.float32), *rows]),
        "head": np.array(json.dumps(head, ensure_ascii=False)),
    }
    arrays["shape"] = np.array(arrays["frames"].shape, dtype=np.int64)
    if any(clip.confidence is not None for clip in clips):
        arrays["confidence"] = np.concatenate(
            [
                np.ones((len(row), joints), np.float16)
                if clip.confidence is None
                else clip.confidence.reshape(-1, joints).astype(np.float16)
                for clip, row in zip(clips, rows, strict=True)
            ]
        )
    with atomic_path(path) as temporary, open(temporary, "wb") as file:
        np.savez(file, **arrays)


def _assemble(
    source: ClipSource,
    chunks: list[_Chunk],
    transform: ClipTransform,
    select: Callable[[StoreContents], np.ndarray] | None,
    on_error: str,
) -> StoreContents:
    """The contents of all chunks, frames still on disk."""
    heads = [chunk.head for chunk in chunks]
    names = [name for head in heads for name in head["names"]]
    log = [dict(zip(_ENTRIES, entry, strict=True)) for head in heads for entry in head["log"]]
    if not names:
        first = f": {log[0]['file']}: {log[0]['reason']}" if log else ""
        raise UserError(f"{source.where}: no usable clip in {len(source.files)} files{first}")
    kept = np.ones(len(names), dtype=bool)
    if len(set(names)) < len(names):
        seen: set[str] = set()
        for clip, name in enumerate(names):
            if name not in seen:
                seen.add(name)
                continue
            reason = "another clip has the same name, expected one name a clip"
            if on_error == "fail":
                raise UserError(f"{source.where}: clip {name}: {reason} (--on-error drop keeps the first)")
            kept[clip] = False
            log.append(dict(zip(_ENTRIES, ("", name, "", reason), strict=True)))
    columns, values = {}, {}
    for name in next(head["columns"] for head in heads if head["names"]):
        columns[name], texts = _coded([value for head in heads for value in head["columns"].get(name, ())])
        if texts is not None:
            values[name] = texts
    labels = [label for head in heads for label in head["labels"]]
    if source.class_names is None:
        class_names, codes = np.unique(np.array([str(label) for label in labels]), return_inverse=True)
        labels, class_names = codes.reshape(-1).astype(np.int64), class_names.tolist()
    else:
        labels, class_names = np.array(labels, dtype=np.int64), list(source.class_names)
    bodies, lengths = (np.concatenate([getattr(chunk, name) for chunk in chunks]) for name in ("bodies", "lengths"))
    contents = StoreContents(
        frames=[],
        offsets=edges(bodies * lengths),
        labels=labels,
        class_names=class_names,
        skeleton=transform.skeleton,
        columns=columns,
        column_values=values,
        names=names,
        fps=source.fps,
    )
    if select is not None:
        chosen = np.zeros(len(names), dtype=bool)
        chosen[select(contents)] = True
        kept &= chosen
    firsts = edges(np.array([len(chunk.lengths) for chunk in chunks]))
    parts = [(chunk, kept[begin:end]) for chunk, begin, end in zip(chunks, firsts[:-1], firsts[1:], strict=True)]
    parts = [(chunk, part) for chunk, part in parts if part.any()]
    contents.frames = [ChunkBlock(chunk, "frames", part) for chunk, part in parts]
    if any(told for told, keep in zip((told for head in heads for told in head["told"]), kept, strict=True) if keep):
        contents.confidence = [ChunkBlock(chunk, "confidence", part) for chunk, part in parts]
    contents.offsets = edges((bodies * lengths)[kept])
    contents.body_offsets = edges(np.repeat(lengths[kept], bodies[kept]))
    contents.labels = labels[kept]
    contents.columns = {name: column[kept] for name, column in columns.items()}
    contents.names = [names[clip] for clip in np.flatnonzero(kept)]
    contents.provenance = {
        "files": len(source.files),
        "bytes": sum(file.size for file in source.files),
        "log": log,
    }
    return contents


def _coded(column: list) -> tuple[np.ndarray, list[str] | None]:
    """A column's numbers and, for text, the names of its codes."""
    if any(isinstance(value, str) for value in column):
        texts, codes = np.unique(np.array([str(value) for value in column]), return_inverse=True)
        return codes.reshape(-1).astype(np.int64), texts.tolist()
    return np.array(column, dtype=np.float64 if any(isinstance(value, float) for value in column) else np.int64), None
