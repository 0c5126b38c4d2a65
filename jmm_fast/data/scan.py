"""One pass over the frames of a data set that finds what cannot be trained on."""

import numpy as np

try:
    from jmm_fast import _host
except ImportError:
    # Built without a compiler: numpy does the same pass, slower.
    _host = None


def scan_clips(frames: np.ndarray, offsets: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Count bad values clip by clip.

    Args:
        frames: float32 ``[F, V, C]``.
        offsets: int64 ``[N + 1]``, first row of each clip and the end of the last.

    Returns:
        ``nonfinite`` int64 ``[N]``, values that are NaN or infinite; ``zero_frames`` int64 ``[N]``, rows whose every
        value is 0; ``max_abs`` float32 ``[N]``, the largest finite magnitude (0 for an empty clip).
    """
    if _host is not None:
        return _host.scan_clips(np.ascontiguousarray(frames), np.ascontiguousarray(offsets))
    return scan_clips_numpy(frames, offsets)


def scan_clips_numpy(frames: np.ndarray, offsets: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """:func:`scan_clips` in numpy, a block of rows at a time so that a memory-mapped set never lies in memory whole."""
    rows = len(frames)
    nonfinite_of_row = np.zeros(rows, dtype=np.int64)
    zero_row = np.zeros(rows, dtype=bool)
    largest_of_row = np.zeros(rows, dtype=np.float32)
    for begin in range(0, rows, 8192):
        block = np.abs(frames[begin : begin + 8192].reshape(min(8192, rows - begin), -1))
        part = slice(begin, begin + len(block))
        largest = block.max(axis=1)  # NaN and Inf survive the maximum, so finite rows need no second look
        bad = ~np.isfinite(largest)
        if bad.any():
            finite = np.isfinite(block[bad])
            nonfinite_of_row[part][bad] = (~finite).sum(axis=1)
            largest[bad] = np.where(finite, block[bad], 0).max(axis=1)
        zero_row[part] = (largest == 0) & ~bad
        largest_of_row[part] = largest

    def total(values: np.ndarray) -> np.ndarray:
        sums = np.concatenate([[0], np.cumsum(values, dtype=np.int64)])
        return sums[offsets[1:]] - sums[offsets[:-1]]

    max_abs = np.zeros(len(offsets) - 1, dtype=np.float32)
    held = offsets[1:] > offsets[:-1]
    if held.any():
        max_abs[held] = np.maximum.reduceat(largest_of_row[: offsets[-1]], offsets[:-1][held])
    return total(nonfinite_of_row), total(zero_row), max_abs
