"""Readers: one module per format; each makes the contents of a clip store of a file somebody has."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from jmm_fast.data.collect import ClipSource, collect, first_clip
from jmm_fast.data.readers import bvh, common, npz, ntu, pku, pyskl, ragged, synthetic, table, uiprmd
from jmm_fast.data.store import ClipStore, StoreContents, write_store
from jmm_fast.errors import UserError


@dataclass(frozen=True, slots=True, kw_only=True)
class Reader:
    """One input format.

    Attributes:
        name: as the command line calls it.
        help: one line.
        options: dataclass of the reader's choices, every field with a default.
        read: of a format that is one file, ``read(path, options)``; also takes the options' fields by keyword.
        open: of a format that is many files, ``open(path, options)``, which says how to read one.
        needs_input: False for a reader that makes its own data and ignores ``path``.
    """

    name: str
    help: str
    options: type
    read: Callable[..., StoreContents] | None = None
    open: Callable[[Path, Any], ClipSource] | None = None
    needs_input: bool = True


READERS = {
    reader.name: reader
    for reader in (
        Reader(
            name="ragged",
            help="ragged .npz: frames [F,V,3], offsets, labels, joint_names, parents, any columns",
            options=ragged.RaggedOptions,
            read=ragged.read,
        ),
        Reader(
            name="npz",
            help="dense .npz of MAMP, CTR-GCN, JMM-TGT: x_train, y_train, x_test, y_test, zero padded",
            options=npz.NpzOptions,
            read=npz.read,
        ),
        Reader(
            name="ntu60",
            help="NTU RGB+D 60: folder or .zip of .skeleton text",
            options=ntu.NtuOptions,
            open=partial(ntu.NtuSource, "ntu60"),
        ),
        Reader(
            name="ntu120",
            help="NTU RGB+D 120: folder or .zip of .skeleton text",
            options=ntu.NtuOptions,
            open=partial(ntu.NtuSource, "ntu120"),
        ),
        Reader(
            name="pku1",
            help="PKU-MMD phase 1: folder or .zip with skeleton/, label/ and cross_subject.txt, cross_view.txt",
            options=pku.PkuOptions,
            open=pku.open_phase1,
        ),
        Reader(
            name="pku2",
            help="PKU-MMD phase 2: the same with videos named A01N01-L and split files ..._v2.txt",
            options=pku.PkuOptions,
            open=pku.open_phase2,
        ),
        Reader(
            name="uiprmd",
            help="UI-PRMD, Kinect part: folder or .zip with mMM_sSS_eEE_positions.txt and ..._angles.txt",
            options=uiprmd.UiprmdOptions,
            open=uiprmd.UiprmdSource,
        ),
        Reader(
            name="folder",
            help="folder or .zip of one .npy or .csv file a clip, described by a small clips.yaml",
            options=table.FolderOptions,
            open=table.FolderSource,
        ),
        Reader(
            name="pyskl",
            help="pickle of pyskl and mmaction2: split, annotations with 2D or 3D keypoints",
            options=pyskl.PysklOptions,
            read=pyskl.read,
        ),
        Reader(
            name="bvh",
            help="BVH motion capture: a folder or .zip of .bvh files of one skeleton",
            options=bvh.BvhOptions,
            open=bvh.open,
        ),
        Reader(
            name="synthetic",
            help="made-up actions of an articulated NTU-25 figure; needs no input",
            options=synthetic.SyntheticOptions,
            read=synthetic.read,
            needs_input=False,
        ),
    )
}


def prepare(
    name: str,
    raw: Path | None,
    out: Path,
    options: Any = None,
    *,
    workers: int = 0,
    say: Callable[[str], None] = print,
) -> ClipStore:
    """Read ``raw`` with the reader ``name`` and write the store ``out``; returns it, opened.

    Args:
        name: one of :data:`READERS`.
        raw: file, folder or archive; None for a reader that makes its own data.
        out: clip store to write, whole or not at all.
        options: the reader's dataclass of options; None for its defaults.
        workers: threads of a reader of many files, 0 for one per core; the result does not depend on it.
        say: takes a line: warnings, and that a killed run is continued.

    Raises:
        UserError: unknown format, missing input, anything the reader refuses, an unwritable ``out``.
    """
    if name not in READERS:
        raise UserError(f"unknown format {name!r}: expected one of {', '.join(READERS)}")
    reader = READERS[name]
    if reader.needs_input and raw is None:
        raise UserError(f"prepare {name} needs an input file")
    if workers < 0:
        raise UserError(f"--workers must be 0 (one per core) or more, got {workers}")
    out = Path(out)
    options = reader.options() if options is None else options
    if reader.open is None:
        contents = reader.read(raw, options)
        if reader.needs_input:
            common.transform_contents(contents, options)
            common.add_label_subsets(contents, options)
        for warning in contents.provenance.get("warnings", ()):
            say(f"warning: {warning}")
        write_store(out, contents)
    else:
        _prepare_files(reader, Path(raw), out, options, workers, say)
    return ClipStore.open(out, check_values=False)


def _prepare_files(
    reader: Reader, raw: Path, out: Path, options: Any, workers: int, say: Callable[[str], None]
) -> None:
    source = reader.open(raw, options)

    def first():
        clip = first_clip(source)
        return clip.frames, clip.confidence

    with collect(
        source,
        out,
        transform=common.transform(options, source.skeleton, first),
        select=lambda contents: common.keep_matching(options.where, contents.table(source.where)),
        on_error=options.on_error,
        workers=workers,
        say=say,
    ) as contents:
        contents.provenance = {"reader": reader.name, "options": common.plain(options), **contents.provenance}
        common.choose_classes(contents, source.where, options)
        warnings = source.finish(contents)
        contents.splits |= common.named_splits(options.split, contents.table(source.where))
        common.add_label_subsets(contents, options)
        if warnings:
            contents.provenance["warnings"] = warnings
        for warning in warnings:
            say(f"warning: {warning}")
        write_store(out, contents)
