"""From one joint layout to another, by the names of the joints."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from jmm_fast.errors import UserError
from jmm_fast.skeleton import Skeleton


@dataclass(frozen=True, slots=True, kw_only=True)
class JointMapping:
    """Where each joint of ``target`` comes from.

    Attributes:
        source, target: the two layouts.
        sources: for each joint of ``target`` the joints of ``source`` whose mean it is; none: it is missing.
    """

    source: Skeleton
    target: Skeleton
    sources: tuple[tuple[int, ...], ...]

    def __call__(self, frames: np.ndarray, confidence: np.ndarray | None) -> tuple[np.ndarray, np.ndarray | None]:
        """Map ``frames`` float32 ``[M, n, V, 3]`` and ``confidence`` float32 ``[M, n, V]`` or None.

        A missing joint lies at zero with confidence 0; a mean has the least confidence of its joints.
        """
        raise NotImplementedError


def joint_mapping(source: Skeleton, target: Skeleton, override: Path | None = None) -> JointMapping:
    raise UserError(f"{source.name} cannot be mapped onto {target.name}")
