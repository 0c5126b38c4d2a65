"""What every reader does to clips before they become a store: refuse bad ones, drop what holds no body, centre."""

from collections import Counter
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from jmm_fast.data.scan import scan_clips
from jmm_fast.data.store import MIN_FRAMES, StoreContents, describe
from jmm_fast.errors import UserError

OnError = Literal["fail", "drop"]


@dataclass(kw_only=True, slots=True)
class Cleaner:
    """Cleans blocks of clips and counts what it took out.

    Attributes:
        where: the file, for messages.
        on_error: ``fail`` stops at the first clip that cannot be used, ``drop`` leaves it out and counts it.
        dropped: ``{"clip": ..., "reason": ...}`` of each clip left out.
        empty_frames: frames removed because no body was in them.
        empty_bodies: bodies removed because all their frames were empty.
        kept_rows: bool ``[F]``, which rows of the block cleaned last are left: for what goes along with the frames.
    """

    where: str
    on_error: OnError = "fail"
    dropped: list[dict[str, str]] = field(default_factory=list)
    empty_frames: int = 0
    empty_bodies: int = 0
    kept_rows: np.ndarray = field(default_factory=lambda: np.zeros(0, dtype=bool))

    def clean(
        self,
        frames: np.ndarray,
        offsets: np.ndarray,
        body_offsets: np.ndarray,
        names: list[str],
        problems: dict[int, str] | None = None,
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Clean one block.

        Frames in which no body of the clip has a non-zero joint go, then bodies without a non-zero frame, then clips
        that hold NaN or infinity, fewer than two frames, or a problem the reader already found.

        Args:
            frames: float32 ``[F, V, 3]``.
            offsets: int64 ``[N + 1]``, rows of each clip; body_offsets: int64 ``[M + 1]``, rows of each body, the
                bodies of a clip equally long.
            names: name of each clip.
            problems: clip -> why it cannot be used.

        Returns:
            frames, offsets, body_offsets of what is left, and the indices of the clips that are left, int64.

        Raises:
            UserError: under ``fail``, naming the file and the first bad clip.
        """
        clips = len(offsets) - 1
        body_rows = np.diff(body_offsets)
        clip_of_body = np.searchsorted(offsets, body_offsets[:-1], side="right") - 1
        nonfinite, zero_rows, _ = scan_clips(frames, body_offsets)
        bodies = np.bincount(clip_of_body, minlength=clips)
        lengths = np.diff(offsets) // np.maximum(bodies, 1)

        body_lives = zero_rows < body_rows
        keep_row = np.repeat(body_lives, body_rows)
        live_frames = lengths.copy()
        if zero_rows.any():
            row_lives = frames.reshape(len(frames), -1).any(axis=1)
            # Number the frames of all clips through, so that a frame of two bodies is one slot.
            first_slot = np.cumsum(lengths) - lengths
            slot = np.arange(len(frames)) + np.repeat(first_slot[clip_of_body] - body_offsets[:-1], body_rows)
            slot_lives = np.bincount(slot[row_lives], minlength=int(lengths.sum())) > 0
            keep_row &= slot_lives[slot]
            clip_of_slot = np.repeat(np.arange(clips), lengths)
            live_frames = np.bincount(clip_of_slot[slot_lives], minlength=clips)

        bad = dict(problems or {})
        nonfinite_of_clip = np.bincount(clip_of_body, weights=nonfinite, minlength=clips).astype(np.int64)
        for clip in np.flatnonzero((nonfinite_of_clip > 0) | (live_frames < MIN_FRAMES)).tolist():
            if nonfinite_of_clip[clip]:
                reason = f"holds {nonfinite_of_clip[clip]} NaN or infinite coordinates"
            else:
                count = live_frames[clip]
                reason = (
                    f"has {count} {'frame' if count == 1 else 'frames'} with a body, expected at least {MIN_FRAMES}"
                )
            bad.setdefault(clip, reason)
        for clip in sorted(bad):
            if self.on_error == "fail":
                raise UserError(
                    f"{self.where}: {describe(clip, names)} {bad[clip]} (--on-error drop leaves such clips out)"
                )
            self.dropped.append({"clip": describe(clip, names), "reason": bad[clip]})

        usable = np.ones(clips, dtype=bool)
        usable[list(bad)] = False
        self.empty_frames += int((lengths - live_frames)[usable].sum())
        self.empty_bodies += int((usable[clip_of_body] & ~body_lives).sum())
        keep_row &= np.repeat(usable[clip_of_body], body_rows)
        self.kept_rows = keep_row
        body_of_row = np.repeat(np.arange(len(body_rows)), body_rows)
        new_body_rows = np.bincount(body_of_row[keep_row], minlength=len(body_rows))
        new_clip_rows = np.bincount(clip_of_body, weights=new_body_rows, minlength=clips).astype(np.int64)
        return (
            frames if keep_row.all() else frames[keep_row],
            edges(new_clip_rows[usable]),
            edges(new_body_rows[new_body_rows > 0]),
            np.flatnonzero(usable),
        )

    def report(self) -> dict[str, Any]:
        """What was taken out, for the store's provenance."""
        kinds = Counter(
            " ".join(word for word in item["reason"].split() if not word.isdigit()) for item in self.dropped
        )
        return {
            "dropped": self.dropped,
            "dropped_by_reason": dict(kinds),
            "empty_frames": self.empty_frames,
            "empty_bodies": self.empty_bodies,
        }


def edges(sizes: np.ndarray) -> np.ndarray:
    """``[0, s0, s0 + s1, ...]``, int64."""
    return np.concatenate([[0], np.cumsum(sizes, dtype=np.int64)])


def center_clips(contents: StoreContents, joint: int) -> None:
    """Move each clip so that ``joint`` of its first body is at the origin in that body's first non-zero frame.

    One translation a clip, no rotation, no scaling; frames where a body is absent stay zero. In place.
    """
    frames, offsets = contents.frames, contents.offsets
    lives = frames.reshape(len(frames), -1).any(axis=1)
    # Rows of the first body come first, so a clip's first live row is its first body's.
    live_rows = np.flatnonzero(lives)
    origin_row = live_rows[np.searchsorted(live_rows, offsets[:-1])]
    shift = np.repeat(frames[origin_row, joint], np.diff(offsets), axis=0)
    shift[~lives] = 0
    frames -= shift[:, None]


def center_rows(frames: np.ndarray, offsets: np.ndarray, joints: list[int], seen: np.ndarray) -> None:
    """:func:`center_clips` where joints may be missing: the origin is the mean of ``joints`` where all are first seen.

    Joints that are missing become zero; a clip in which ``joints`` are never seen is not moved. In place.

    Args:
        frames: float32 ``[F, V, 3]``; offsets: int64 ``[N + 1]``; seen: bool ``[F, V]``.
    """
    rows = np.append(np.flatnonzero(seen[:, joints].all(axis=1)), len(frames))
    origin_row = rows[np.searchsorted(rows, offsets[:-1])]
    held = origin_row < offsets[1:]
    shift = np.zeros((len(held), 3), np.float32)
    shift[held] = frames[origin_row[held]][:, joints].mean(axis=1)
    frames -= np.repeat(shift, np.diff(offsets), axis=0)[:, None]
    frames[~seen] = 0
