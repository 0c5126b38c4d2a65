"""Readers of PKU-MMD as its owners hand it out: long videos of skeletons as text, and where in them each action lies.

RAW is a folder or ``.zip`` with ``NAME.txt`` in a folder called ``skeleton`` (a line a frame, 150 numbers: two bodies
of 25 Kinect joints, metres; the second is zero where there is none) and ``NAME.txt`` in one called ``label`` (a line
an action, ``class,start,end,confidence``). Both may lie deeper and have longer names (``Label_PKUMMD_v2``). Split files
may lie anywhere: ``cross_subject`` and ``cross_view``, also with ``-`` or ``_v2``.
"""

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, ClassVar

import numpy as np

from jmm_fast import skeleton
from jmm_fast.data.collect import FileLog, RawClip
from jmm_fast.data.filetree import FileTree, SourceFile
from jmm_fast.data.readers import common
from jmm_fast.data.store import StoreContents
from jmm_fast.data.text_rows import parse_rows
from jmm_fast.errors import UserError

CLASS_NAMES = (
    "bow",
    "brushing hair",
    "brushing teeth",
    "check time (from watch)",
    "cheer up",
    "clapping",
    "cross hands in front (say stop)",
    "drink water",
    "drop",
    "eat meal/snack",
    "falling",
    "giving something to other person",
    "hand waving",
    "handshaking",
    "hopping (one foot jumping)",
    "hugging other person",
    "jump up",
    "kicking other person",
    "kicking something",
    "make a phone call/answer phone",
    "pat on back of other person",
    "pickup",
    "playing with phone/tablet",
    "point finger at the other person",
    "pointing to something with finger",
    "punching/slapping other person",
    "pushing other person",
    "put on a hat/cap",
    "put something inside pocket",
    "reading",
    "rub two hands together",
    "salute",
    "sitting down",
    "standing up",
    "take off a hat/cap",
    "take off glasses",
    "take off jacket",
    "take out something from pocket",
    "taking a selfie",
    "tear up paper",
    "throw",
    "touch back (backache)",
    "touch chest (stomachache/heart pain)",
    "touch head (headache)",
    "touch neck (neckache)",
    "typing on a keyboard",
    "use a fan (with hand or paper)/feeling warm",
    "wear jacket",
    "wear on glasses",
    "wipe face",
    "writing",
)
"""Actions 1 to 51 of the label files. Phase 2 numbers its actions by the same list and leaves some out."""

_SPLITS = {"xsub": "subject", "xview": "view"}
_NAMES = {
    1: (re.compile(r"\d{4}-([LMR])"), "0002-L"),
    2: (re.compile(r"A\d+N(\d+)-([LMR])"), "A01N01-L"),
}


@dataclass(kw_only=True, slots=True)
class PkuOptions(common.CommonOptions):
    """How to read PKU-MMD."""

    label_fractions: tuple[float, ...] = (0.01, 0.05, 0.1)
    """Label subsets to store for each split: that part of every class's training clips, by name."""
    max_frames: int = 300
    """Keep at most this many frames of an action, its first; 0 keeps all."""
    drop_empty: bool = True
    """Leave out actions in which every frame is empty."""
    drop_absent: bool = True
    """Leave out the second body of an action in which it never appears."""
    center: bool = False
    """Move each clip so that the first body's spine starts at the origin."""


def open_phase1(path: Path, options: PkuOptions) -> "PkuSource":
    """Phase 1: videos named ``0002-L``."""
    return PkuSource(path, options, phase=1)


def open_phase2(path: Path, options: PkuOptions) -> "PkuSource":
    """Phase 2: videos named ``A01N01-L``, where ``N01`` is the subject."""
    return PkuSource(path, options, phase=2)


class PkuSource:
    """PKU-MMD; a clip is one action, frames ``[start, end)`` of its video, class ``class - 1``.

    Columns: ``video``; ``view`` (L, M, R); ``subject`` (phase 2); ``instance``, the action's line in the label file.
    Splits: ``xsub`` and ``xview``, those whose split file is there. Problems of one action (outside its video, a class
    outside 1 to 51) concern that action alone under ``on_error="drop"``.

    Raises:
        UserError: no skeleton file, two label or split files for one thing, a broken split file; under
            ``on_error="fail"`` also a label file without its skeletons.
    """

    skeleton = skeleton.get("ntu25")
    class_names: ClassVar = list(CLASS_NAMES)
    fps = 30.0

    def __init__(self, path: Path, options: PkuOptions, phase: int) -> None:
        if options.max_frames < 0 or options.max_frames == 1:
            raise UserError(f"--max-frames must be 0 (all) or at least 2, got {options.max_frames}")
        self.where = str(path)
        self._options, self._phase = options, phase
        self._tree = FileTree(path, (".txt",))
        kinds: dict[str, list[SourceFile]] = {"skeleton": [], "label": [], "": []}
        for file in self._tree.files:
            folder = PurePosixPath(file.name).parent.name.lower()
            kinds[next((kind for kind in ("skeleton", "label") if kind in folder), "")].append(file)
        self.files: Sequence[SourceFile] = kinds["skeleton"]
        if not self.files:
            raise UserError(f"{path}: no skeleton/NAME.txt in it")
        self._labels: dict[str, SourceFile] = {}
        for file in kinds["label"]:
            other = self._labels.setdefault(file.stem, file)
            if other is not file:
                raise UserError(f"{path}: {other.name} and {file.name} both hold the labels of {file.stem}")
        videos = {file.stem for file in self.files}
        self._warnings = []
        lonely = [file for file in kinds["label"] if file.stem not in videos]
        if lonely:
            text = f"{lonely[0].name} has no skeleton file {lonely[0].stem}.txt"
            if options.on_error == "fail":
                raise UserError(f"{path}: {text} (--on-error drop goes on without)")
            self._warnings.append(f"{text}; {len(lonely)} label files are without theirs")
        self._splits = {}
        for split, word in _SPLITS.items():
            lists = self._split_file(word, kinds[""])
            if lists is None:
                self._warnings.append(f"no split {split}: cross_{word}{'' if phase == 1 else '_v2'}.txt is not there")
            else:
                self._splits[split] = lists
        self.identity: Any = {
            "phase": phase,
            "rules": [options.on_error, options.max_frames, options.drop_empty, options.drop_absent, options.center],
            "labels": [(file.name, file.size, file.stamp) for file in self._labels.values()],
        }

    def read(self, file: SourceFile, log: FileLog) -> list[RawClip]:
        pattern, example = _NAMES[self._phase]
        found = pattern.fullmatch(file.stem)
        if not found:
            other = 3 - self._phase
            raise UserError(
                f"expected a name of phase {self._phase} such as {example}.txt (pku{other} reads the other)"
            )
        columns = {"video": file.stem, "view": found[self._phase]}
        if self._phase == 2:
            columns["subject"] = int(found[1])
        label_file = self._labels.get(file.stem)
        if label_file is None:
            raise UserError(f"there is no label file {file.stem}.txt for it")
        video = parse_rows(self._tree.read(file), 150).reshape(-1, 2, 25, 3)
        clips = []
        for line, text in self._lines(label_file):
            name = f"{file.stem}/{line}"
            try:
                label, begin, end = _action(text, len(video))
            except UserError as error:
                if self._options.on_error == "fail":
                    raise UserError(f"{label_file.name}, line {line}: {error}") from None
                log.add(f"{label_file.name}, line {line}: {error}", clip=name)
                continue
            if end > len(video):
                # As the field's preparation does, whose slices stop where the video does.
                log.add(f"the action ends at frame {end}, after the video's {len(video)}: it was cut there", clip=name)
                end = len(video)
            if self._options.max_frames:
                end = min(end, begin + self._options.max_frames)
            frames = video[begin:end].transpose(1, 0, 2, 3).copy()
            present = frames.any(axis=(1, 2, 3))
            if not present.any() and self._options.drop_empty:
                log.add("every frame is empty", clip=name)
                continue
            if self._options.drop_absent:
                frames = frames[present] if present.any() else frames[:1]
            if self._options.center:
                common.center_clip(frames, self.skeleton)
            clips.append(RawClip(name=name, frames=frames, label=label, columns={**columns, "instance": line}))
        return clips

    def finish(self, contents: StoreContents) -> list[str]:
        warnings = list(self._warnings)
        videos = {file.stem for file in self.files}
        values = contents.column_values["video"]
        for split, lists in self._splits.items():
            part = np.array([next((k for k, names in enumerate(lists) if value in names), 2) for value in values])
            part = part[contents.columns["video"]]
            contents.splits[split] = {"train": np.flatnonzero(part == 0), "test": np.flatnonzero(part == 1)}
            named = lists[0] | lists[1]
            for text, names in (
                ("are named in its file, but there is no such video", named - videos),
                ("are not named in its file: they are in neither part", videos - named),
            ):
                if names:
                    warnings.append(f"split {split}: {len(names)} videos {text}, e.g. {min(names)}")
        return warnings

    def _lines(self, file: SourceFile):
        try:
            text = self._tree.read(file).decode("utf-8-sig", "replace").rstrip()
        except UserError as error:
            raise UserError(f"{file.name} {error}") from None
        if not text:
            raise UserError(f"{file.name} is empty, expected a line class,start,end,confidence for each action")
        return enumerate(text.split("\n"), start=1)

    def _split_file(self, word: str, files: list[SourceFile]) -> tuple[frozenset[str], frozenset[str]] | None:
        """Names of the training and of the test videos."""
        found: dict[bool, list[SourceFile]] = {True: [], False: []}
        for file in files:
            match = re.fullmatch(rf"cross[_-]{word}([_-]v2)?\.txt", PurePosixPath(file.name).name.lower())
            if match:
                found[bool(match[1])].append(file)
        # Where both phases lie in one folder, each takes its own.
        candidates = found[self._phase == 2] or found[self._phase == 1]
        if not candidates:
            return None
        file = candidates[0]
        if len(candidates) > 1:
            raise UserError(f"{self.where}: {file.name} and {candidates[1].name} both are split files, expected one")
        where = f"{self.where}: {file.name}"
        try:
            lines = self._tree.read(file).decode("utf-8-sig", "replace").splitlines()
        except UserError as error:
            raise UserError(f"{where} {error}") from None
        lines = [line for line in lines if line.strip()]
        if len(lines) != 4:
            wanted = "a heading, the training videos, a heading, the test videos"
            raise UserError(f"{where}: expected 4 lines ({wanted}), got {len(lines)}")
        parts = []
        for line in (lines[1], lines[3]):
            names = [name.strip().partition(".")[0] for name in line.split(",") if name.strip()]
            twice = [name for name, count in Counter(names).items() if count > 1]
            if twice:
                raise UserError(f"{where}: video {twice[0]} is named twice in one part")
            parts.append(frozenset(names))
        both = parts[0] & parts[1]
        if both:
            raise UserError(f"{where}: video {min(both)} is named in both parts")
        return parts[0], parts[1]


def _action(text: str, frames: int) -> tuple[int, int, int]:
    """Class index, first frame and end of a line of a label file, checked."""
    fields = [field.strip() for field in text.split(",")]
    if len(fields) not in (3, 4) or not all(re.fullmatch(r"-?\d{1,9}", field, re.ASCII) for field in fields[:3]):
        raise UserError(f"expected class,start,end,confidence in whole numbers, got {text.strip()[:40]!r}")
    label, begin, end = map(int, fields[:3])
    if not 1 <= label <= len(CLASS_NAMES):
        raise UserError(f"class {label} is outside 1..{len(CLASS_NAMES)}")
    if end <= begin:
        raise UserError(f"the action ends at frame {end}, expected an end after its start {begin}")
    if not 0 <= begin < frames:
        raise UserError(f"the action lies at frames {begin} to {end}, outside the {frames} frames of its video")
    return label - 1, begin, end
