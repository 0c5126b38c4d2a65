"""The peers of clip preparation: one sample after another with numpy and ``torch.nn.functional.interpolate``.

They work the way the feeders of skeleton data sets do: samples are dense, zero-padded arrays
``[3, frames, joints, bodies]``; each is cut to its valid frames, cropped, resampled along time and turned by itself,
then they are stacked. ``usual`` does each part as those feeders do, bilinear resampling of an image of one row a
coordinate and a rotation matrix for each frame; ``lean`` is the quickest form of it that we found.
"""

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from jmm_fast.reference import rotation_matrix

PADDED = 300
"""Frames of a dense sample: the longest clip of NTU RGB+D."""

Feeder = Callable[[np.ndarray, float, float, Tensor, int], Tensor]


def _crop(sample: np.ndarray, valid: int, share: float, place: float) -> np.ndarray:
    """``share`` of the valid frames, at least 64 of them where there are as many, from ``place`` in [0, 1) on."""
    length = max(min(64, valid), int(valid * share))
    begin = int(place * (valid - length + 1))
    return sample[:, begin : begin + length]


def usual(sample: np.ndarray, share: float, place: float, angles: Tensor, window: int) -> Tensor:
    """Crop, resample and turn one dense sample.

    Args:
        sample: float32 ``[3, frames, joints, bodies]``, zero after its last valid frame.
        share: part of the valid frames that is kept.
        place: in [0, 1): where the crop begins.
        angles: float32 ``[3]``, radians.
        window: frames of the result.

    Returns:
        float32 ``[bodies, window, joints, 3]``.
    """
    channels, _, joints, bodies = sample.shape
    valid = int((np.abs(sample).sum(0).sum(-1).sum(-1) != 0).sum())
    crop = torch.tensor(_crop(sample, valid, share, place))
    rows = crop.permute(0, 2, 3, 1).contiguous().view(channels * joints * bodies, -1)
    rows = F.interpolate(rows[None, None], size=(len(rows), window), mode="bilinear", align_corners=False)[0, 0]
    frames = rows.view(channels, joints, bodies, window).permute(3, 0, 1, 2).contiguous()
    turns = rotation_matrix(angles.expand(window, -1))
    turned = torch.matmul(turns, frames.view(window, channels, -1)).view(window, channels, joints, bodies)
    return turned.permute(3, 0, 2, 1).contiguous()


def lean(sample: np.ndarray, share: float, place: float, angles: Tensor, window: int) -> Tensor:
    """As ``usual``, with one-dimensional resampling and one rotation of the whole sample."""
    channels, _, joints, bodies = sample.shape
    valid = int(sample.any(axis=(0, 2, 3)).sum())
    crop = torch.from_numpy(_crop(sample, valid, share, place))
    rows = crop.permute(3, 2, 0, 1).reshape(1, bodies * joints * channels, -1)
    resampled = F.interpolate(rows, size=window, mode="linear", align_corners=False)
    poses = resampled.view(bodies, joints, channels, window).permute(0, 3, 1, 2)
    return poses.reshape(-1, channels).mm(rotation_matrix(angles).T).view(bodies, window, joints, channels)


FEEDERS: dict[str, Feeder] = {"numpy": usual, "numpy_lean": lean}


def feed(samples: Sequence[np.ndarray], feeder: str, window: int, draws: np.random.Generator) -> Tensor:
    """Random crops and rotations of ``samples``, ``[samples * bodies, window, joints, 3]``, as training takes them."""
    one = FEEDERS[feeder]
    return torch.cat(
        [
            one(sample, draws.uniform(0.5, 1), draws.random(), torch.empty(3).uniform_(-0.3, 0.3), window)
            for sample in samples
        ]
    )


class _Endless(IterableDataset):
    """Batch after batch of a feeder."""

    def __init__(self, samples: Sequence[np.ndarray], feeder: str, window: int) -> None:
        self.samples, self.feeder, self.window = samples, feeder, window

    def __iter__(self) -> Iterator[Tensor]:
        worker = get_worker_info()
        draws = np.random.default_rng(worker.id if worker else 0)
        while True:
            yield feed(self.samples, self.feeder, self.window, draws)


def fed_by_workers(
    samples: Sequence[np.ndarray], feeder: str, window: int, workers: int, *, pin_memory: bool
) -> Iterator[Tensor]:
    """What :func:`feed` gives, in turn from so many processes that work ahead; in pinned memory for a GPU."""
    return iter(
        DataLoader(_Endless(samples, feeder, window), batch_size=None, num_workers=workers, pin_memory=pin_memory)
    )


def dense_sample(frames: np.ndarray) -> np.ndarray:
    """``[bodies, frames, joints, 3]`` as a zero-padded sample ``[3, PADDED, joints, bodies]``."""
    bodies, count, joints, channels = frames.shape
    sample = np.zeros((channels, PADDED, joints, bodies), dtype=np.float32)
    sample[:, :count] = frames.transpose(3, 1, 2, 0)
    return sample
