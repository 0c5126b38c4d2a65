"""Reader of NTU RGB+D 60 and 120: a folder, or the owners' archive, of ``.skeleton`` text.

The cleaning is the one of this field's common preparation, value for value; each rule can be switched off.
"""

import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from jmm_fast import skeleton
from jmm_fast.data.collect import FileLog, RawClip
from jmm_fast.data.filetree import FileTree, SourceFile
from jmm_fast.data.ntu_text import NtuText, parse_ntu
from jmm_fast.data.readers import common
from jmm_fast.data.splits import matching
from jmm_fast.data.store import StoreContents
from jmm_fast.errors import UserError

CLASS_NAMES = """drink water, eat meal, brush teeth, brush hair, drop, pick up, throw, sit down, stand up, clapping,
reading, writing, tear up paper, put on jacket, take off jacket, put on a shoe, take off a shoe, put on glasses,
take off glasses, put on a hat/cap, take off a hat/cap, cheer up, hand waving, kicking something, reach into pocket,
hopping, jump up, phone call, play with phone/tablet, type on a keyboard, point to something, taking a selfie,
check time (from watch), rub two hands, nod head/bow, shake head, wipe face, salute, put palms together,
cross hands in front, sneeze/cough, staggering, falling down, headache, chest pain, back pain, neck pain,
nausea/vomiting, fan self, punch/slap, kicking, pushing, pat on back, point finger, hugging, giving object,
touch pocket, shaking hands, walking towards, walking apart, put on headphone, take off headphone, shoot at basket,
bounce ball, tennis bat swing, juggle table tennis ball, hush, flick hair, thumb up, thumb down, make OK sign,
make victory sign, staple book, counting money, cutting nails, cutting paper, snap fingers, open bottle, sniff/smell,
squat down, toss a coin, fold paper, ball up paper, play magic cube, apply cream on face, apply cream on hand,
put on bag, take off bag, put object into bag, take object out of bag, open a box, move heavy objects, shake fist,
throw up cap/hat, capitulate, cross arms, arm circles, arm swings, run on the spot, butt kicks, cross toe touch,
side kick, yawn, stretch oneself, blow nose, hit with object, wield knife, knock over, grab stuff, shoot with gun,
step on foot, high-five, cheers and drink, carry object, take a photo, follow, whisper, exchange things,
support somebody, rock-paper-scissors""".replace("\n", " ").split(", ")
"""Of A001, A002, ...: as the owners call them."""

_NAME = re.compile(r"S(\d{3})C(\d{3})P(\d{3})R(\d{3})A(\d{3})", re.IGNORECASE)
_PERFORMERS_60 = "1,2,4,5,8,9,13-19,25,27,28,31,34,35,38"
_PERFORMERS_120 = _PERFORMERS_60 + (",45,46,47,49,50,52-59,70,74,78,80-86,89,91-95,97,98,100,103")
# The joint that becomes the origin, and a body wider than this part of its height in at least that part of its frames
# is not a person: the numbers of the common preparation.
_MIDDLE = 1
_WIDE, _WIDE_FRAMES = 0.8, 0.69754


@dataclass(frozen=True, slots=True, kw_only=True)
class _Release:
    """What the owners call NTU RGB+D 60 or 120: its limits, its protocols and their published numbers of clips."""

    name: str
    setups: int
    actions: int
    splits: dict[str, str]
    published: dict[str, tuple[int, int]]


_RELEASES = {
    "ntu60": _Release(
        name="NTU RGB+D 60",
        setups=17,
        actions=60,
        splits={"xsub": f"performer in {_PERFORMERS_60}", "xview": "camera in 2,3"},
        published={"xsub": (40091, 16487), "xview": (37646, 18932)},
    ),
    "ntu120": _Release(
        name="NTU RGB+D 120",
        setups=32,
        actions=120,
        splits={
            "xsub": f"performer in {_PERFORMERS_120}",
            "xset": f"setup in {','.join(str(setup) for setup in range(2, 33, 2))}",
        },
        published={"xsub": (63026, 50919), "xset": (54468, 59477)},
    ),
}


@dataclass(kw_only=True, slots=True)
class NtuOptions(common.CommonOptions):
    """How to read NTU RGB+D; the defaults are the preparation that the field uses."""

    exclude: tuple[Path, ...] = ()
    """The owners' lists of samples with missing skeletons: a name a line. Without them files in which every frame is
    empty are left out all the same."""
    drop_empty_frames: bool = True
    """Leave out frames without a body, and, where a file has several bodies, frames whose every value sums to 0."""
    close_gaps: bool = True
    """Put a body's frames one after the other from the first in which it is seen, as the common preparation does;
    otherwise each stays where it was seen."""
    min_body_frames: int = 12
    """Where a file has several bodies, leave out those seen in fewer frames."""
    spread: bool = True
    """Where a file has several bodies, leave out those that are too wide for a person in most frames, and judge the
    motion of the others by their good frames."""
    max_bodies: int = 2
    """Bodies of a clip: the one that moves most comes first, and joins with others that are seen at other times."""
    center: bool = True
    """Move each clip so that the first body's spine_mid starts at the origin."""
    label_fractions: tuple[float, ...] = (0.01, 0.05, 0.1)
    """Label subsets to store for each split: that part of every class's training clips, by name."""


@dataclass(slots=True, eq=False)
class _Body:
    """``joints`` float32 ``[k, 25, 3]`` of one id, in the frames ``at`` int64 ``[k]``; ``line`` of each row's text."""

    id: int
    joints: np.ndarray
    at: np.ndarray
    line: np.ndarray
    motion: float = 0.0

    @property
    def ends(self) -> tuple[int, int]:
        return int(self.at[0]), int(self.at[-1])


class NtuSource:
    """The ``.skeleton`` files below ``path`` as a :class:`jmm_fast.data.collect.ClipSource`.

    Args:
        release: ``ntu60`` or ``ntu120``; files beyond its setups or actions are left out and logged.

    Raises:
        UserError: nothing to read, an option out of range, an unreadable list of ``exclude``.
    """

    fps = 30.0

    def __init__(self, release: str, path: Path, options: NtuOptions) -> None:
        if options.max_bodies < 1:
            raise UserError(f"--max-bodies must be at least 1, got {options.max_bodies}")
        self._release, self._options = _RELEASES[release], options
        self._excluded = {name: path.name for path in options.exclude for name in _listed(path)}
        self._tree = FileTree(path, (".skeleton",))
        self.where, self.files = str(path), self._tree.files
        self.skeleton = skeleton.get("ntu25")
        self.class_names = CLASS_NAMES[: self._release.actions]
        self.identity = {
            "release": release,
            "excluded": sorted(self._excluded.items()),
            **{
                name: getattr(options, name)
                for name in ("drop_empty_frames", "close_gaps", "min_body_frames", "spread", "max_bodies", "center")
            },
        }

    def read(self, file: SourceFile, log: FileLog) -> list[RawClip]:
        """At most one clip; columns ``setup``, ``camera``, ``performer``, ``replication``, ``num_bodies``."""
        found = _NAME.fullmatch(file.stem)
        if not found:
            raise UserError("expected a name such as S001C002P003R001A010.skeleton")
        setup, camera, performer, replication, action = map(int, found.groups())
        name = file.stem.upper()
        if not 1 <= setup <= self._release.setups:
            log.add(f"setup {setup} is not one of the {self._release.setups} of {self._release.name}")
        elif not 1 <= action <= self._release.actions:
            log.add(f"action {action} is not one of the {self._release.actions} of {self._release.name}")
        elif name in self._excluded:
            log.add(f"named in {self._excluded[name]}")
        else:
            text = parse_ntu(self._tree.read(file))
            if text.rest:
                log.add(f"line {text.rest} and what follows it, after the last of {text.frames} frames", clip=name)
            frames = clean(text, self._options, name, log)
            if frames is not None:
                columns = {"setup": setup, "camera": camera, "performer": performer, "replication": replication}
                columns["num_bodies"] = len(frames)
                return [RawClip(name=name, frames=frames, label=action - 1, columns=columns)]
        return []

    def finish(self, contents: StoreContents) -> list[str]:
        warnings = []
        for split, expression in self._release.splits.items():
            train = matching(expression, contents.table(self.where))
            counts = int(train.sum()), int((~train).sum())
            if counts != self._release.published[split] and self._options.where is None:
                published = self._release.published[split]
                warnings.append(
                    f"split {split} has {counts[0]} clips to train and {counts[1]} to test, "
                    f"published for {self._release.name} are {published[0]} and {published[1]}"
                )
            if 0 in counts:
                warnings.append(f"split {split} is left out: it has no clip to {'test' if counts[0] else 'train'}")
            else:
                contents.splits[split] = {"train": np.flatnonzero(train), "test": np.flatnonzero(~train)}
        return warnings


def clean(text: NtuText, options: NtuOptions, name: str, log: FileLog) -> np.ndarray | None:
    """The bodies of one file that count, float32 ``[M, n, 25, 3]``, zero where one is absent; None: the file has none.

    Raises:
        UserError: NaN or infinity in a body that counts; names the line.
    """
    seen, valid = np.unique(text.frame, return_inverse=True)
    if not len(seen):
        log.add(f"no body in any of its {text.frames} frames")
        return None
    count = text.frames
    if options.drop_empty_frames:
        if len(seen) < count:
            log.add(f"{count - len(seen)} of {count} frames without a body", clip=name)
        count = len(seen)
    at = valid.reshape(-1) if options.drop_empty_frames else text.frame
    bodies = _bodies(text, at, options.close_gaps)
    several = len(bodies) > 1
    if several:
        # Numbers that are not finite matter only in a body that stays.
        with np.errstate(invalid="ignore", over="ignore"):
            bodies = _likely(bodies, options, name, log)
    for body in bodies:
        finite = np.isfinite(body.joints)
        if not finite.all():
            row, joint, _ = np.argwhere(~finite)[0].tolist()
            raise UserError(f"line {body.line[row] + joint}: coordinates of a joint that are NaN or infinite")
    actors = _cast(bodies, options.max_bodies, name, log)
    frames = np.zeros((count, len(actors), text.joints.shape[1], 3), dtype=np.float32)
    for actor, parts in enumerate(actors):
        for body in parts:
            # An id that one frame holds twice takes more frames than there are.
            held = body.at < count
            if not held.all():
                log.add(
                    f"{(~held).sum()} rows beyond the last frame: a frame holds it twice", clip=name, body=str(body.id)
                )
            frames[body.at[held], actor] = body.joints[held]
    if several and options.drop_empty_frames:
        live = frames.reshape(count, -1).sum(axis=1) != 0
        if not live.all():
            log.add(f"{count - live.sum()} of {count} frames in which no body is left", clip=name)
            frames = frames[live]
    flat = frames.reshape(*frames.shape[:2], -1)
    shown = np.flatnonzero(flat[:, 0].any(axis=1))
    if not len(shown):
        log.add(f"every coordinate is 0 in its {text.frames} frames")
        return None
    if options.center:
        absent = flat.sum(axis=2) == 0
        frames -= frames[shown[0], 0, _MIDDLE].copy()
        frames[absent] = 0
    return np.ascontiguousarray(frames.transpose(1, 0, 2, 3))


def _bodies(text: NtuText, at: np.ndarray, close_gaps: bool) -> list[_Body]:
    """Rows by id, in the order in which the ids appear; ``at`` int64 ``[rows]`` is the frame of each row."""
    ids, first, of_row = np.unique(text.body, return_index=True, return_inverse=True)
    bodies = []
    for number in np.argsort(first).tolist():
        rows = np.flatnonzero(of_row.reshape(-1) == number)
        frames = at[rows[0]] + np.arange(len(rows)) if close_gaps else at[rows]
        bodies.append(_Body(int(ids[number]), text.joints[rows], frames, text.line[rows]))
    return bodies


def _likely(bodies: list[_Body], options: NtuOptions, name: str, log: FileLog) -> list[_Body]:
    """Bodies that may be people, the one that moves most first; at least one stays."""

    def drop(body: _Body, reason: str) -> None:
        bodies.remove(body)
        log.add(reason, clip=name, body=str(body.id))

    for body in list(bodies):
        if len(bodies) > 1 and len(body.at) < options.min_body_frames:
            drop(body, f"seen in {len(body.at)} frames, expected at least {options.min_body_frames}")
    for body in bodies:
        body.motion = _motion(body.joints)
    for body in list(bodies) if options.spread else ():
        if len(bodies) == 1:
            break
        x, y = np.ascontiguousarray(body.joints.transpose(2, 0, 1)[:2])
        good = x.max(axis=1) - x.min(axis=1) <= _WIDE * (y.max(axis=1) - y.min(axis=1))
        wide = int((~good).sum())
        if wide / len(good) >= _WIDE_FRAMES:
            drop(body, f"wider than {_WIDE} of its height in {wide} of {len(good)} frames")
        elif wide:
            body.motion = min(body.motion, _motion(body.joints[good]))
    return sorted(bodies, key=lambda body: -body.motion)


def _motion(joints: np.ndarray) -> float:
    """Sum over x, y, z of the variance over all joints and frames, square metres."""
    return float(np.var(joints.reshape(-1, 3), axis=0).sum())


def _cast(bodies: list[_Body], count: int, name: str, log: FileLog) -> list[list[_Body]]:
    """Share the bodies out among at most ``count`` actors: each goes to the first that is not there with it."""
    actors = [[bodies[0]]]
    # An actor nobody has joined yet is there in frame 0, which the common preparation then never forgets.
    spans = [bodies[0].ends] + [(0, 0)] * (count - 1)
    for body in bodies[1:]:
        first, last = body.ends
        for actor, (begin, end) in enumerate(spans):
            if min(end, last) - max(begin, first) <= 0:
                spans[actor] = min(begin, first), max(end, last)
                if actor == len(actors):
                    actors.append([])
                actors[actor].append(body)
                break
        else:
            log.add(
                f"seen together with {count} that move more (motion {body.motion:.4g})", clip=name, body=str(body.id)
            )
    return actors


def _listed(path: Path) -> list[str]:
    """Names of an exclude list."""
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError as error:
        raise UserError(f"{path}: {error.strerror or error}") from error
    names: list[str] = []
    for number, line in enumerate(lines, 1):
        text = line.strip()
        found = _NAME.match(text)
        if found and text[found.end() :] in ("", ".skeleton"):
            names.append(found[0].upper())
        elif names and text and not text.startswith("#"):
            raise UserError(f"{path}: line {number}: expected a name such as S001C002P003R001A010, got {text[:40]!r}")
    if not names:
        raise UserError(
            f"{path}: expected names such as S001C002P003R001A010, a line each, got none in {len(lines)} lines"
        )
    return names
