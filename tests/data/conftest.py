"""Small data sets made by hand."""

import numpy as np
import pytest

from jmm_fast import skeleton
from jmm_fast.data import StoreContents


@pytest.fixture
def make_contents():
    """``make_contents(sizes, bodies)``: contents with random frames, sizes[i] frames and bodies[i] bodies in clip i."""

    def make(sizes=(5, 9, 4, 12), bodies=None, seed=0, **fields) -> StoreContents:
        bodies = [1] * len(sizes) if bodies is None else bodies
        rows = [size for size, count in zip(sizes, bodies, strict=True) for _ in range(count)]
        clip_rows = [size * count for size, count in zip(sizes, bodies, strict=True)]
        frames = np.random.default_rng(seed).normal(size=(sum(rows), 25, 3)).astype(np.float32)
        count = len(sizes)
        return StoreContents(
            **{
                "frames": frames,
                "offsets": np.cumsum([0, *clip_rows]),
                "body_offsets": np.cumsum([0, *rows]),
                "labels": np.arange(count) % 2,
                "class_names": ["walk", "wave both"],
                "skeleton": skeleton.get("ntu25"),
                "columns": {
                    "subject": np.arange(count) % 3,
                    "camera": np.arange(count) % 2 + 1,
                    "speed": np.linspace(0.5, 2, count),
                },
                "column_values": {"subject": ["s01", "s02", "s03"]},
                **fields,
            }
        )

    return make


@pytest.fixture
def ragged_arrays():
    """Arrays of a ragged file: 4 clips, 5 joints, subjects by name."""
    rng = np.random.default_rng(0)
    offsets = np.array([0, 6, 10, 17, 20])
    return {
        "frames": rng.normal(size=(20, 5, 3)).astype(np.float32),
        "offsets": offsets,
        "labels": np.array([0, 1, 2, 1]),
        "label_names": np.array(["a", "b", "c"]),
        "joint_names": np.array(["root", "left_x", "right_x", "left_y", "right_y"]),
        "parents": np.array([-1, 0, 0, 1, 2]),
        "fps": np.float32(25),
        "subject": np.array([0, 1, 0, 1]),
        "subject_names": np.array(["ann", "bob"]),
        "correct": np.array([True, False, False, True]),
        "weather": np.array(["sun", "rain", "sun", "fog"]),
        "source": np.array(["one", "two", "three", "four"]),
    }


@pytest.fixture
def ragged_file(tmp_path, ragged_arrays):
    """``ragged_file(**changes)``: the file with arrays replaced, or left out where the change is None."""

    def make(**changes):
        arrays = {name: array for name, array in (ragged_arrays | changes).items() if array is not None}
        path = tmp_path / "raw.npz"
        np.savez(path, **arrays)
        return path

    return make
