"""Clips on disk and in batches: the clip store, its readers, splits, batches of bodies, the synthetic set."""

from jmm_fast.data.batches import BodyBatches, ClipBatch, Draft
from jmm_fast.data.readers import READERS, Reader, prepare
from jmm_fast.data.splits import Split, stratified_fraction
from jmm_fast.data.store import ClipStore, StoreContents, write_store

__all__ = [
    "READERS",
    "BodyBatches",
    "ClipBatch",
    "ClipStore",
    "Draft",
    "Reader",
    "Split",
    "StoreContents",
    "prepare",
    "stratified_fraction",
    "write_store",
]
