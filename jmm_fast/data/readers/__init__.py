"""Readers: one module per format; each makes the contents of a clip store of a file somebody has."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jmm_fast.data.readers import npz, ragged, synthetic
from jmm_fast.data.store import StoreContents, write_store
from jmm_fast.errors import UserError


@dataclass(frozen=True, slots=True, kw_only=True)
class Reader:
    """One input format.

    Attributes:
        name: as the command line calls it.
        help: one line.
        options: dataclass of the reader's choices, every field with a default.
        read: ``read(path, options)``; also takes the options' fields by keyword.
        needs_input: False for a reader that makes its own data and ignores ``path``.
    """

    name: str
    help: str
    options: type
    read: Callable[..., StoreContents]
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
            name="synthetic",
            help="made-up actions of an articulated NTU-25 figure; needs no input",
            options=synthetic.SyntheticOptions,
            read=synthetic.read,
            needs_input=False,
        ),
    )
}


def prepare(name: str, raw: Path | None, out: Path, options: Any = None) -> StoreContents:
    """Read ``raw`` with the reader ``name`` and write the store ``out``; returns what was written.

    Raises:
        UserError: unknown format, missing input, anything the reader refuses, an unwritable ``out``.
    """
    if name not in READERS:
        raise UserError(f"unknown format {name!r}: expected one of {', '.join(READERS)}")
    reader = READERS[name]
    if reader.needs_input and raw is None:
        raise UserError(f"prepare {name} needs an input file")
    contents = reader.read(raw, reader.options() if options is None else options)
    write_store(out, contents)
    return contents
