"""Batches of bodies: clips cropped, resampled and rotated, made where they are trained on.

The host draws a few numbers for each body (a :class:`Draft`) and sends them in one copy; the device makes the batch.
"""

import contextlib
import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from jmm_fast import ops
from jmm_fast.data.prefetch import ahead
from jmm_fast.data.store import ClipStore
from jmm_fast.errors import UserError
from jmm_fast.ops.philox import uniform
from jmm_fast.reference import patchify, philox

MODALITIES = ("joint", "bone", "motion", "bone_motion")


@dataclass(kw_only=True, slots=True)
class ClipBatch:
    """Some clips, body by body.

    Attributes:
        clips: float32 ``[Nb, T, V, 3]``, one row per body.
        clip_ids: int64 ``[Nb]``, clip index in the data set + (body << 32): the counter of the body's random draws.
        clip_of_body: int64 ``[Nb]``, position in this batch (0..N-1) of the body's clip.
        labels: int64 ``[N]``.
        index: int64 ``[N]``, clip index in the data set.
        bodies: int64 ``[N]`` in host memory, rows of each clip; None in a batch that a CUDA graph makes.
        seen: bool ``[Nb, T, V]``, False where a pose that went into the number is missing; None: all are there.
    """

    clips: Tensor
    clip_ids: Tensor
    clip_of_body: Tensor
    labels: Tensor
    index: Tensor
    bodies: np.ndarray | None
    seen: Tensor | None = None

    def valid(self, t_patch: int) -> Tensor | None:
        """Tokens seen in all of their ``t_patch`` frames, bool ``[Nb, L]``; None: all."""
        return None if self.seen is None else _whole_tokens(self.seen, t_patch)

    def predictable(self, t_patch: int, stride: int) -> Tensor | None:
        """Tokens whose motion ``x[t+s] - x[t]`` has both ends in every frame, bool ``[Nb, L]``; None: all.

        The last ``s`` frames have no motion to predict (it is 0), so there the pose itself is enough.
        """
        if self.seen is None:
            return None
        both = self.seen[:, :-stride] & self.seen[:, stride:]
        return _whole_tokens(torch.cat([both, self.seen[:, -stride:]], dim=1), t_patch)

    def split(self, parts: int) -> list["ClipBatch"]:
        """This batch as ``parts`` batches whose numbers of clips differ by one at most, in order; some may be empty."""
        made, clip, row = [], 0, 0
        for bodies in np.array_split(self.bodies, parts):
            next_clip, next_row = clip + len(bodies), row + int(bodies.sum())
            rows, clips = slice(row, next_row), slice(clip, next_clip)
            made.append(
                ClipBatch(
                    clips=self.clips[rows],
                    clip_ids=self.clip_ids[rows],
                    clip_of_body=self.clip_of_body[rows] - clip,
                    labels=self.labels[clips],
                    index=self.index[clips],
                    bodies=bodies,
                    seen=None if self.seen is None else self.seen[rows],
                )
            )
            clip, row = next_clip, next_row
        return made


@dataclass(kw_only=True, slots=True)
class Draft:
    """A batch as the host describes it: what its clips, crops and rotations are.

    Attributes:
        numbers: int64, all that the device needs to know, one part after the other (:meth:`parts`); in pinned memory
            when it is to be sent to a GPU.
        shape: number of bodies ``Nb`` and of clips ``N``: they decide the shapes of all that is made from the draft.
        index: int64 ``[N]`` in host memory, clip index in the data set; None where the draft stands for all of its
            shape.
        bodies: int64 ``[N]`` in host memory, rows that each clip will have; None as ``index``.
        turned: whether there are rotations.
        frames: float32 ``[R, V, 3]``, the rows that the windows are cut from; None: all frames lie on the device.
        seen: bool ``[R, V]``, which joints were seen in ``frames``; None: as frames, or all were.
    """

    numbers: Tensor
    shape: tuple[int, int]
    index: Tensor | None
    bodies: np.ndarray | None
    turned: bool
    frames: Tensor | None = None
    seen: Tensor | None = None

    def parts(self) -> dict[str, Tensor]:
        """Views of ``numbers``: ``epoch []``; ``start``, ``length``, ``clip_ids``, ``clip_of_body`` ``[Nb]``;
        ``labels``, ``index`` ``[N]``; ``angles``, float32 ``[Nb, 3]``, where there are any."""
        views, _ = _parts(self.numbers, *self.shape, self.turned)
        return views

    def tensors(self) -> list[Tensor | None]:
        """What lies where the batch is made, in a fixed order."""
        return [self.numbers, self.frames, self.seen]

    def copy_into(self, other: "Draft") -> None:
        """Fill the memory of ``other``, a draft of the same shape with as many rows of frames or more."""
        for source, to in zip(self.tensors(), other.tensors(), strict=True):
            if source is not None:
                to[: len(source)].copy_(source, non_blocking=True)


def _parts(numbers: Tensor | None, bodies: int, clips: int, turned: bool) -> tuple[dict[str, Tensor], int]:
    """The views of ``Draft.parts`` (none without ``numbers``), and how long ``numbers`` is."""
    counts = {"epoch": 1}
    counts |= dict.fromkeys(("start", "length", "clip_ids", "clip_of_body"), bodies)
    counts |= dict.fromkeys(("labels", "index"), clips)
    # Two float32 in an int64.
    counts |= {"angles": (3 * bodies + 1) // 2} if turned else {}
    views, at = {}, 0
    for name, count in counts.items():
        if numbers is not None:
            views[name] = numbers[at : at + count]
        # Each part begins at 16 bytes, for which kernels of any body count are compiled alike.
        at += count + count % 2
    if views:
        views["epoch"] = views["epoch"][0]
    if views and turned:
        views["angles"] = views["angles"].view(torch.float32)[: 3 * bodies].view(bodies, 3)
    return views, at


def _whole_tokens(seen: Tensor, t_patch: int) -> Tensor:
    return patchify(seen[..., None], t_patch).all(-1).flatten(1)


def to_modality(clips: Tensor, modality: str, bone_parents: Tensor) -> Tensor:
    """Joint positions ``[..., T, V, 3]`` as ``modality`` shows them, see :class:`BodyBatches`.

    Args:
        bone_parents: int64 ``[V]``, where each joint's bone starts (``Skeleton.bone_parents``).
    """
    if modality in ("bone", "bone_motion"):
        clips = clips - clips[..., bone_parents, :]
    if modality in ("motion", "bone_motion"):
        moved = torch.zeros_like(clips)
        torch.sub(clips[..., 1:, :, :], clips[..., :-1, :, :], out=moved[..., :-1, :, :])
        clips = moved
    return clips


class BodyBatches:
    """The batches of an epoch over some clips of a store.

    Training: keep a share ``p ~ U[crop]`` of the clip, ``max(min(min_length, n), floor(n p))`` of its ``n`` frames,
    from a random start; one rotation ``Rz(c) Ry(b) Rx(a)``, angles ``U[-rotation, rotation]`` radians. Evaluation: the
    middle ``eval_crop`` of the clip, ``begin = int((1 - eval_crop) n / 2)``, no rotation. Both resample to ``window``
    frames.
    Where the store holds confidences, a joint is seen in a frame of the store when its confidence is above
    ``min_confidence``; in a resampled frame when it is seen in both frames that are mixed there; and as a bone or a
    motion when both ends of that are seen. ``ClipBatch.seen`` says so. Coordinates are left as they are.
    Bodies of a clip share crop and rotation. Order, crop and rotation are Philox draws of (seed, epoch, clip index):
    independent of batch size, of the other clips, of ``start`` and of the device.

    Args:
        store: where the clips are.
        ids: int64, clips to use, in evaluation in this order.
        batch_size: clips a batch; the last may be smaller unless ``drop_last``.
        part: ``(r, n)``: of each batch only the ``r``-th of ``n`` parts in order, whose numbers of clips differ by one
            at most. Draws and order are those of the whole batch; a part of a small batch may be empty.
        window: frames ``T`` of the result.
        train: crop and rotate at random, or evaluate.
        seed: of all draws.
        shuffle: permute the clips each epoch; default: as ``train``.
        crop, eval_crop, min_length, rotation: see above.
        modality: ``joint``; ``bone``, joint minus the start of its bone (root 0); ``motion``, difference to the next
            frame (last frame 0); ``bone_motion``, both.
        min_confidence: in [0, 1); the default counts every joint that is not missing.
        empty_bodies: ``skip`` makes rows for bodies that are there; ``keep`` makes two rows of every clip, zeros for a
            missing body, as the released code does.
        device: where batches are made and held. On a GPU the frames move there once when they fill less than half of
            its free memory; otherwise each batch's frames are sent from pinned memory.
        prefetch: batches that a thread is ahead of the one in use; 0 makes each when it is asked for. On the CPU the
            thread makes them, for a GPU it gathers and sends what they are made from.
        backend: of ``ops.clip_window``.

    Raises:
        UserError: an argument out of range, or no clip.

    Deterministic.
    """

    def __init__(
        self,
        store: ClipStore,
        ids: Tensor,
        *,
        batch_size: int,
        part: tuple[int, int] = (0, 1),
        window: int = 120,
        train: bool,
        seed: int = 0,
        shuffle: bool | None = None,
        drop_last: bool = False,
        crop: tuple[float, float] = (0.5, 1.0),
        eval_crop: float = 0.95,
        min_length: int = 64,
        rotation: float = 0.3,
        modality: Literal["joint", "bone", "motion", "bone_motion"] = "joint",
        min_confidence: float = 0.0,
        empty_bodies: Literal["skip", "keep"] = "skip",
        device: str | torch.device = "cpu",
        prefetch: int = 2,
        backend: str = "auto",
    ) -> None:
        if batch_size < 1:
            raise UserError(f"batch_size must be at least 1, got {batch_size}")
        if not 0 <= part[0] < part[1]:
            raise UserError(f"part must be (r, n) with 0 <= r < n, got {part}")
        if window < 1 or min_length < 1:
            raise UserError(f"window and min_length must be at least 1, got {window} and {min_length}")
        if not (len(crop) == 2 and 0 < crop[0] <= crop[1] <= 1):
            raise UserError(f"crop must be two shares, 0 < low <= high <= 1, got {crop}")
        if not 0 < eval_crop <= 1:
            raise UserError(f"eval_crop must be above 0 and at most 1, got {eval_crop}")
        if rotation < 0:
            raise UserError(f"rotation must not be negative, got {rotation}")
        if modality not in MODALITIES:
            raise UserError(f"modality must be one of {', '.join(MODALITIES)}, got {modality!r}")
        if not 0 <= min_confidence < 1:
            raise UserError(f"min_confidence must be at least 0 and below 1, got {min_confidence}")
        if prefetch < 0:
            raise UserError(f"prefetch must not be negative, got {prefetch}")
        if empty_bodies not in ("skip", "keep"):
            raise UserError(f"empty_bodies must be skip or keep, got {empty_bodies!r}")
        self.ids = torch.as_tensor(ids, dtype=torch.int64, device="cpu")
        if not len(self.ids):
            raise UserError(f"{store.path}: no clips to make batches of")
        if self.ids.min() < 0 or self.ids.max() >= store.num_clips:
            raise UserError(f"{store.path}: clip ids must lie in 0..{store.num_clips - 1}")
        if drop_last and len(self.ids) < batch_size:
            raise UserError(f"{store.path}: {len(self.ids)} clips do not fill one batch of {batch_size}")
        self.store = store
        self.batch_size, self.window, self.train, self.seed = batch_size, window, train, seed
        self.part = part
        self.shuffle = train if shuffle is None else shuffle
        self.drop_last = drop_last
        self.crop, self.eval_crop, self.min_length, self.rotation = crop, eval_crop, min_length, rotation
        self.modality, self.empty_bodies, self.backend = modality, empty_bodies, backend
        self.device = torch.device(device)
        self.prefetch = prefetch
        self._pinned = self.device.type == "cuda"
        self._lengths, self._clip_bodies = store.lengths.numpy(), store.clip_bodies.numpy()
        self._body_offsets, self._max_bodies = store.body_offsets.numpy(), max(2, store.max_bodies)
        self._labels = store.labels.numpy()
        self._bone_parents = torch.as_tensor(store.skeleton.bone_parents(), device=self.device)
        self._frames = self._held_frames()
        self._seen = None
        if store.confidence is not None:
            seen = store.confidence > min_confidence
            if not seen.all():
                self._seen = seen if self._frames is None else seen.to(self.device)

    def _held_frames(self) -> Tensor | None:
        """The frames on the device, or None when they must be sent batch by batch."""
        frames = self.store.frames
        if self.device.type == "cuda":
            free, _ = torch.cuda.mem_get_info(self.device)
            if frames.numel() * frames.element_size() > free // 2:
                return None
        return frames.to(self.device)

    def __len__(self) -> int:
        """Batches in an epoch."""
        whole, rest = divmod(len(self.ids), self.batch_size)
        return whole + (1 if rest and not self.drop_last else 0)

    def order(self, epoch: int) -> Tensor:
        """Clip indices in the order of this epoch, int64."""
        if not self.shuffle:
            return self.ids
        draw = uniform(self.seed, philox.ORDER, self.ids, epoch, 2)
        # Two words break the ties that 24 bits alone would leave in big sets.
        key = draw[:, 0].double() + draw[:, 1].double() * 2.0**-24
        return self.ids[torch.argsort(key, stable=True)]

    def windows(self, index: Tensor, epoch: int) -> tuple[Tensor, Tensor]:
        """First frame and number of frames of each clip's crop, int64 ``[N]`` each."""
        begin, length = self._windows(index, epoch)
        return torch.from_numpy(begin), torch.from_numpy(length)

    # A batch needs a few numbers for each of some dozens of clips: numpy does such in a third of torch's time.
    def _windows(self, index: Tensor, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        frames = self._lengths[index.numpy()]
        if not self.train:
            begin = ((1 - self.eval_crop) * frames / 2).astype(np.int64)
            return begin, frames - 2 * begin
        draw = uniform(self.seed, philox.CROP, index, epoch, 2).numpy().astype(np.float64)
        share = self.crop[0] + draw[:, 0] * (self.crop[1] - self.crop[0])
        length = np.maximum((frames * share).astype(np.int64), np.minimum(frames, self.min_length))
        spare = frames - length
        return np.minimum((draw[:, 1] * (spare + 1)).astype(np.int64), spare), length

    def angles(self, index: Tensor, epoch: int) -> Tensor | None:
        """Rotation angles of each clip, float32 ``[N, 3]`` radians, or None without rotation."""
        if not self.train or self.rotation == 0:
            return None
        return (2 * uniform(self.seed, philox.ROTATION, index, epoch, 3) - 1) * self.rotation

    def batch(self, index: Tensor, epoch: int) -> ClipBatch:
        """The batch of the clips ``index``, int64 ``[N]``, as ``epoch`` crops and rotates them."""
        return self.make(self._send(self.draft(index, epoch)))

    def draft(self, index: Tensor, epoch: int) -> Draft:
        """The draft, in host memory, of the batch of the clips ``index``."""
        store = self.store
        begin, length = self._windows(index, epoch)
        angles = self.angles(index, epoch)
        clips = index.numpy()
        first, present = self._clip_bodies[clips].T
        bodies = np.full_like(present, self._max_bodies) if self.empty_bodies == "keep" else present
        clip_of_body = np.repeat(np.arange(len(clips)), bodies)
        body = np.arange(len(clip_of_body)) - (np.cumsum(bodies) - bodies)[clip_of_body]
        row = self._body_offsets[np.minimum(first[clip_of_body] + body, store.num_bodies - 1)]
        there = body < present[clip_of_body]
        start, length = (row + begin[clip_of_body]) * there, length[clip_of_body] * there
        frames = seen = None
        if self._frames is None:
            start, frames, seen = self._gather(start, length)

        turned = angles is not None
        _, count = _parts(None, len(clip_of_body), len(clips), turned)
        # Pinned memory comes from torch's store of it, which gives a piece out again when the copy from it is done.
        draft = Draft(
            numbers=torch.empty(count, dtype=torch.int64, pin_memory=self._pinned),
            shape=(len(clip_of_body), len(clips)),
            index=index,
            bodies=bodies,
            turned=turned,
            frames=frames,
            seen=seen,
        )
        parts = {name: part.numpy() for name, part in draft.parts().items()}
        parts["epoch"][()], parts["start"][:], parts["length"][:] = epoch, start, length
        parts["clip_ids"][:], parts["clip_of_body"][:] = clips[clip_of_body] + (body << 32), clip_of_body
        parts["labels"][:], parts["index"][:] = self._labels[clips], clips
        if turned:
            parts["angles"][:] = angles.numpy()[clip_of_body]
        return draft

    def make(self, draft: Draft) -> ClipBatch:
        """The batch of a draft that lies on the device. Waits for nothing; a CUDA graph can hold it."""
        parts = draft.parts()
        start, length = parts["start"], parts["length"]
        held = draft.frames is None
        seen = self._seen if held else draft.seen
        windows = ops.clip_window(
            self._frames if held else draft.frames,
            start,
            length,
            parts.get("angles"),
            window=self.window,
            backend=self.backend,
        )
        return ClipBatch(
            clips=to_modality(windows, self.modality, self._bone_parents),
            clip_ids=parts["clip_ids"],
            clip_of_body=parts["clip_of_body"],
            labels=parts["labels"],
            index=parts["index"],
            bodies=draft.bodies,
            seen=None if seen is None else self._window_seen(seen, start, length),
        )

    def _window_seen(self, seen: Tensor, start: Tensor, length: Tensor) -> Tensor:
        """``ClipBatch.seen`` of the windows; a body that is not there is zeros to be learned, not a missing one."""
        window = self.window
        # The rows that ops.clip_window mixes, by its formula.
        source = ((2 * torch.arange(window, device=seen.device) + 1) * length[:, None] - window).clamp(min=0)
        last = (length[:, None] - 1).clamp(min=0)
        low, high = (torch.minimum(row, last) for row in (source // (2 * window), -(-source // (2 * window))))
        low, high = (seen[start[:, None] + row] for row in (low, high))
        seen = low & high | (length == 0)[:, None, None]
        if self.modality in ("bone", "bone_motion"):
            seen = seen & seen[:, :, self._bone_parents]
        if self.modality in ("motion", "bone_motion"):
            seen = torch.cat([seen[:, :-1] & seen[:, 1:], seen[:, -1:]], dim=1)
        return seen

    def most_rows(self) -> int:
        """The most frames that the windows of a batch can cover."""
        clips = self.ids.numpy()
        rows = np.sort(self._lengths[clips] * self._clip_bodies[clips, 1])
        return max(1, int(rows[-self.batch_size :].sum()))

    def _gather(self, start: np.ndarray, length: np.ndarray) -> tuple[np.ndarray, Tensor, Tensor | None]:
        """Where each window starts among the rows of these windows alone; those rows, and where they were seen."""
        ends = np.cumsum(length)
        rows = torch.from_numpy(np.repeat(start - (ends - length), length) + np.arange(length.sum()))

        def gathered(table: Tensor) -> Tensor:
            # Never empty: a window without frames still looks at a row.
            found = table.new_empty(max(len(rows), 1), *table.shape[1:], pin_memory=self._pinned)
            torch.index_select(table, 0, rows, out=found[: len(rows)])
            return found

        frames = gathered(self.store.frames)
        return (ends - length) * (length > 0), frames, None if self._seen is None else gathered(self._seen)

    def _send(self, draft: Draft) -> Draft:
        """The draft on the device; the host does not wait for the copies."""
        if not self._pinned:
            return draft
        numbers, frames, seen = (
            None if tensor is None else tensor.to(self.device, non_blocking=True) for tensor in draft.tensors()
        )
        return dataclasses.replace(draft, numbers=numbers, frames=frames, seen=seen)

    def _indices(self, epoch: int, start: int, every: int) -> Iterator[Tensor]:
        order = self.order(epoch)
        part, parts = self.part
        for number in range(start, len(self), every):
            yield order[number * self.batch_size : (number + 1) * self.batch_size].tensor_split(parts)[part]

    def drafts(self, epoch: int, start: int = 0, every: int = 1) -> Iterator[Draft]:
        """The drafts, on the device, of each ``every``-th batch of ``epoch`` from batch ``start`` on."""
        if not self._pinned:
            yield from ahead((self.draft(index, epoch) for index in self._indices(epoch, start, every)), self.prefetch)
            return
        copies = torch.cuda.Stream(self.device)

        def sent() -> Iterator[tuple[Draft, torch.cuda.Event]]:
            for index in self._indices(epoch, start, every):
                # Which device and stream are current is a matter of the thread.
                with torch.cuda.stream(copies):
                    draft = self._send(self.draft(index, epoch))
                yield draft, copies.record_event()

        with contextlib.closing(ahead(sent(), self.prefetch)) as found:
            for draft, arrived in found:
                now = torch.cuda.current_stream(self.device)
                now.wait_event(arrived)
                for tensor in draft.tensors():
                    if tensor is not None:
                        tensor.record_stream(now)
                yield draft

    def epoch(self, epoch: int, start: int = 0, every: int = 1) -> Iterator[ClipBatch]:
        """Each ``every``-th batch of ``epoch`` from batch ``start`` on; skipping costs nothing."""
        if self._pinned:
            with contextlib.closing(self.drafts(epoch, start, every)) as drafts:
                for draft in drafts:
                    yield self.make(draft)
        else:
            made = (self.batch(index, epoch) for index in self._indices(epoch, start, every))
            yield from ahead(made, self.prefetch)
