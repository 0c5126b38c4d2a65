"""A made-up action set: an articulated NTU-25 figure, 24 subjects, 3 cameras, noise and dropouts.

What tells the classes apart is how joints move together (:mod:`jmm_fast.data.actions`). Everything else varies freely:
proportions, tempo and habits of a subject; tempo, amplitude, start, posture, idle motion of other limbs, walking while
acting; heading and camera; sensor noise, joints that stick, lost frames. Clip ``i`` is a function of the options' seed
and of ``i`` alone.
"""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from jmm_fast import skeleton
from jmm_fast.data import figure
from jmm_fast.data.actions import ACTIONS, programs
from jmm_fast.data.cleaning import center_clips, edges
from jmm_fast.data.figure import BEND, JOINT, SPREAD, TWIST
from jmm_fast.data.store import StoreContents
from jmm_fast.errors import UserError

SUBJECTS = 24
CAMERAS = 3
FPS = 30.0
_BLOCK = 96
_DRAWS = 256
_IDLE = 12
_KNOT = 10
_IDLE_CHANNELS = np.array(
    [
        JOINT[joint] * 3 + axis
        for joint, axis in (
            ("spine_mid", SPREAD),
            ("spine_mid", TWIST),
            ("spine_shoulder", BEND),
            ("neck", TWIST),
            ("head", BEND),
            ("left_elbow", BEND),
            ("right_elbow", BEND),
            ("left_elbow", SPREAD),
            ("right_elbow", SPREAD),
            ("left_wrist", BEND),
            ("right_wrist", BEND),
            ("spine_base", SPREAD),
        )
    ]
)


@dataclass(kw_only=True, slots=True)
class SyntheticOptions:
    """What to make. The defaults are the set of the demo."""

    clips: int = 2000
    """Clips to make; classes, subjects and cameras take turns."""
    seed: int = 0
    """Fixes every clip."""
    min_frames: int = 40
    """Shortest clip."""
    max_frames: int = 160
    """Longest clip."""
    noise: float = 0.001
    """Standard deviation of the sensor's error of a trunk joint, metres: it wanders within a third of a second, with a
    tenth of it white; hands and feet have up to twice as much."""
    stuck: float = 0.05
    """Mean number of times per second that some joint of a body is tracked wrongly for a moment."""
    lost: float = 0.02
    """Share of frames in which nobody is seen; the clip closes up over them."""
    posture: float = 0.2
    """Standard deviation of what a clip adds to the angles at rest of arms, legs and trunk, radians."""
    idle: float = 0.05
    """Size of the slow motion of limbs that do not take part, radians."""
    sway: float = 0.02
    """Size of the slow motion of the whole body, metres."""
    variation: float = 0.25
    """Relative spread of tempo and amplitude within one subject's clips."""
    walking: float = 0.1
    """Share of the actions with free legs that are done while walking."""
    heading: float = 0.2
    """Largest turn of the person away from the middle camera, radians."""
    center: bool = True
    """Move each clip so that the first body's spine starts at the origin."""


def read(path: Path | None = None, options: SyntheticOptions | None = None, **fields: Any) -> StoreContents:
    """Make the set; ``path`` is not used.

    Columns: ``subject`` and ``camera`` (codes from 0; value names count from 1), ``replication``. Splits: ``xsub``, odd
    subjects train; ``xview``, cameras 2 and 3 train. Frames: metres, 30 per second, y up, in the camera's frame.

    Raises:
        UserError: an option out of range.
    """
    options = SyntheticOptions(**fields) if options is None else options
    _check(options)
    count = len(ACTIONS)
    clip = np.arange(options.clips)
    labels = clip % count
    subject = clip // count % SUBJECTS
    replication = clip // (count * SUBJECTS)
    camera = (labels + subject + replication) % CAMERAS
    frames, clip_rows, body_rows = [], [], []
    for begin in range(0, options.clips, _BLOCK):
        block = slice(begin, min(begin + _BLOCK, options.clips))
        made, rows, bodies = _make(options, clip[block], labels[block], subject[block], camera[block])
        frames.append(made)
        clip_rows.append(rows)
        body_rows.append(bodies)
    columns = {"subject": subject, "camera": camera, "replication": replication}
    contents = StoreContents(
        frames=np.concatenate(frames),
        offsets=edges(np.concatenate(clip_rows)),
        body_offsets=edges(np.concatenate(body_rows)),
        labels=labels,
        class_names=[action.name for action in ACTIONS],
        skeleton=skeleton.get("ntu25"),
        columns=columns,
        column_values={
            "subject": [f"s{number + 1:02d}" for number in range(SUBJECTS)],
            "camera": [f"c{number + 1}" for number in range(CAMERAS)],
        },
        names=[
            f"C{camera[i] + 1:03d}P{subject[i] + 1:03d}R{replication[i] + 1:03d}A{labels[i] + 1:03d}"
            for i in clip.tolist()
        ],
        fps=FPS,
        provenance={"reader": "synthetic", "options": asdict(options)},
    )
    for name, train in (("xsub", subject % 2 == 0), ("xview", camera != 0)):
        if train.any() and not train.all():
            contents.splits[name] = {"train": np.flatnonzero(train), "test": np.flatnonzero(~train)}
    if options.center:
        center_clips(contents, JOINT["spine_mid"])
    return contents


def _check(options: SyntheticOptions) -> None:
    if options.clips < 1:
        raise UserError(f"--clips must be at least 1, got {options.clips}")
    if not 2 <= options.min_frames <= options.max_frames:
        raise UserError(
            f"--min-frames and --max-frames must be at least 2 and in order, got {options.min_frames} and "
            f"{options.max_frames}"
        )
    for name in ("noise", "stuck", "posture", "idle", "sway", "variation", "heading"):
        if not 0 <= getattr(options, name) < np.inf:
            raise UserError(f"--{name} must not be negative, got {getattr(options, name)}")
    for name in ("lost", "walking"):
        if not 0 <= getattr(options, name) < 1:
            raise UserError(f"--{name} must be a share below 1, got {getattr(options, name)}")


@dataclass(frozen=True, slots=True, kw_only=True)
class _People:
    """Habits of the subjects, from the seed: ``bones`` ``[S, 25, 3]`` metres, ``posture`` ``[S, 75]`` radians."""

    bones: np.ndarray
    tempo: np.ndarray
    size: np.ndarray
    posture: np.ndarray


def _people(seed: int) -> _People:
    """Subjects 0..23, and 24..47 who are the second persons."""
    count = 2 * SUBJECTS
    draw = np.random.Generator(np.random.Philox(key=[seed, 2**63]))
    height = draw.uniform(0.88, 1.14, count)
    shares = draw.uniform(0.9, 1.12, (count, len(figure.GROUPS)))
    bones = figure.OFFSETS * (height[:, None] * shares[:, figure.GROUP])[..., None]
    return _People(
        bones=bones.astype(np.float32),
        tempo=np.exp(draw.uniform(-0.3, 0.3, count)).astype(np.float32),
        size=draw.uniform(0.75, 1.2, count).astype(np.float32),
        posture=draw.normal(0, 0.12, (count, 75)).astype(np.float32),
    )


class _Draws:
    """Uniform numbers of each clip, handed out column by column so that all clips' are used at once."""

    def __init__(self, seed: int, clips: np.ndarray) -> None:
        self.generators = [np.random.Generator(np.random.Philox(key=[seed, clip])) for clip in clips.tolist()]
        self._table = np.stack([generator.random(_DRAWS, dtype=np.float32) for generator in self.generators])
        self._used = 0

    def take(self, *shape: int) -> np.ndarray:
        """``[clips, *shape]`` in [0, 1)."""
        size = int(np.prod(shape, dtype=np.int64))
        self._used += size
        assert self._used <= _DRAWS
        return self._table[:, self._used - size : self._used].reshape(len(self._table), *shape)

    def between(self, low: float, high: float, *shape: int) -> np.ndarray:
        return low + (high - low) * self.take(*shape)

    def normal(self, *shape: int) -> np.ndarray:
        """About normal: twice the sum of three uniforms about its mean has variance 1."""
        return 2 * (self.take(3, *shape).sum(axis=1) - 1.5)


def _make(
    options: SyntheticOptions, clips: np.ndarray, labels: np.ndarray, subject: np.ndarray, camera: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Frames of some clips, and the rows of each clip and body."""
    people, draws = _people(options.seed), _Draws(options.seed, clips)
    second = np.array([bool(action.partner) for action in ACTIONS])[labels]
    free_legs = np.array([action.free_legs for action in ACTIONS])[labels]

    # When: about one execution at this person's tempo, cut out from about its beginning as annotators do.
    tempo = 0.5 * people.tempo[subject] * np.exp(options.variation * draws.between(-1, 1))
    cycles = draws.between(0.9, 1.2)
    length = np.clip(np.rint(cycles / tempo * FPS), options.min_frames, options.max_frames).astype(np.int64)
    seen = [generator.random(count) >= options.lost for generator, count in zip(draws.generators, length, strict=True)]
    for mask in seen:
        mask[:2] = True
    times = [np.flatnonzero(mask).astype(np.float32) / np.float32(FPS) for mask in seen]
    length = np.array([len(time) for time in times])
    warp_rate, warp_start = draws.between(0.2, 0.5), draws.between(0, 2 * np.pi)
    start = draws.between(-0.4, 0.4)

    # Who: a row of all that follows is one body of one clip.
    clip_of_body = np.repeat(np.arange(len(clips)), 1 + second)
    role = (np.arange(len(clip_of_body)) - np.searchsorted(clip_of_body, clip_of_body)).astype(np.int64)
    partner = (draws.take() * SUBJECTS).astype(np.int64) + SUBJECTS
    person = np.where(role == 0, subject[clip_of_body], partner[clip_of_body])
    program = 2 * labels[clip_of_body] + role

    frame_of_body = length[clip_of_body]
    body = np.repeat(np.arange(len(clip_of_body)), frame_of_body)
    clip = clip_of_body[body]
    time = np.concatenate([times[index] for index in clip_of_body.tolist()])

    # How: the action's angles, idle ones, a posture, perhaps a walk.
    phase = (
        2
        * np.pi
        * tempo[clip]
        * (time + 0.2 / warp_rate[clip] / (2 * np.pi) * np.sin(2 * np.pi * warp_rate[clip] * time + warp_start[clip]))
    )
    phase += start[clip]
    table = programs()
    width = table.channel.shape[1]
    amount = (people.size[subject][:, None] * np.exp(options.variation * draws.between(-1, 1, width)))[clip_of_body]
    lag = (0.25 * draws.between(-1, 1, width))[clip_of_body] + table.lag[program]
    wave = table.rate[program][body] * phase[:, None] + lag[body]
    wave = np.sin(wave + table.skew[program][body] * np.sin(wave))
    power = table.power[program][body]
    wave = np.where(power > 0, ((1 + wave) * 0.5) ** power, wave)
    angles = _posture(options, people, draws, clip_of_body, role, person)[body]
    value = table.centre[program][body] + (amount * table.swing[program])[body] * wave
    rows = np.arange(len(angles))
    for term in range(width):
        # Padding terms add zero to channel 0.
        angles[rows, table.channel[program, term][body]] += value[:, term]
    rate, begin = draws.between(0.15, 0.9, _IDLE), draws.between(0, 2 * np.pi, _IDLE)
    swing = options.idle * draws.between(0.2, 1.4, _IDLE)
    idle = swing[clip] * np.sin(2 * np.pi * rate[clip] * time[:, None] + begin[clip] + role[body][:, None])
    angles[:, _IDLE_CHANNELS] += idle
    walks = free_legs & (draws.take() < options.walking)
    pace, stride = draws.between(0.55, 0.8), draws.between(0.2, 0.32)
    step = 2 * np.pi * pace[clip] * time + start[clip] * 1.7
    for side, sign in (("left", 1.0), ("right", -1.0)):
        leg = walks[clip] * stride[clip]
        angles[:, JOINT[f"{side}_knee"] * 3 + BEND] += leg * sign * np.sin(step)
        angles[:, JOINT[f"{side}_ankle"] * 3 + BEND] += leg * (1 + sign * np.cos(step))

    places = figure.pose(
        angles.reshape(-1, 25, 3).astype(np.float32), people.bones[person][body], np.zeros(len(body), dtype=np.float32)
    )
    places = _in_room(options, draws, places, body, clip, role[body], time, walks, pace, stride, camera)
    places += _sensor(options, draws, frame_of_body, clip_of_body, places)
    sizes = np.bincount(clip_of_body, weights=frame_of_body).astype(np.int64)
    return places.astype(np.float32), sizes, frame_of_body


def _posture(
    options: SyntheticOptions,
    people: _People,
    draws: _Draws,
    clip_of_body: np.ndarray,
    role: np.ndarray,
    person: np.ndarray,
) -> np.ndarray:
    """Angles at rest of each body, float32 ``[bodies, 75]``."""
    joints = ("left_elbow", "right_elbow", "left_wrist", "right_wrist", "left_knee", "right_knee", "spine_mid")
    clip_part = np.zeros((len(clip_of_body), 25, 3), dtype=np.float32)
    weight = np.array(
        [(1, 1, 0.7), (1, 1, 0.7), (1, 0, 0), (1, 0, 0), (0.3, 0.3, 0.3), (0.3, 0.3, 0.3), (0.3, 0.3, 0.3)]
    )
    own = options.posture * draws.normal(len(joints), 3) * weight
    for number, joint in enumerate(joints):
        # The second person stands in the mirror image of the first's posture, which is as good as another draw.
        clip_part[:, JOINT[joint]] = np.where(role[:, None] == 0, 1, -1) * own[clip_of_body, number]
    rest = people.posture[person] + clip_part.reshape(-1, 75)
    for side in ("left", "right"):
        rest[:, JOINT[f"{side}_elbow"] * 3 + SPREAD] += 0.15
        rest[:, JOINT[f"{side}_wrist"] * 3 + BEND] = np.abs(rest[:, JOINT[f"{side}_wrist"] * 3 + BEND] + 0.3)
        rest[:, JOINT[f"{side}_knee"] * 3 + SPREAD] = np.abs(rest[:, JOINT[f"{side}_knee"] * 3 + SPREAD]) * 0.5 + 0.05
        rest[:, JOINT[f"{side}_knee"] * 3 + BEND] *= 0.5
        rest[:, JOINT[f"{side}_ankle"] * 3 + BEND] = np.abs(rest[:, JOINT[f"{side}_ankle"] * 3 + BEND])
    rest[:, JOINT["spine_base"] * 3 : JOINT["spine_base"] * 3 + 3] *= 0.3
    return rest


def _in_room(
    options: SyntheticOptions,
    draws: _Draws,
    places: np.ndarray,
    body: np.ndarray,
    clip: np.ndarray,
    role: np.ndarray,
    time: np.ndarray,
    walks: np.ndarray,
    pace: np.ndarray,
    stride: np.ndarray,
    camera: np.ndarray,
) -> np.ndarray:
    """Turn and place the bodies as the camera sees them."""
    heading, turning = options.heading * draws.between(-1, 1), 0.25 * draws.between(-1, 1)
    speed = np.where(walks, 2.6 * pace * stride, 0.06 * draws.take())
    distance = draws.between(0.65, 0.95)
    aside = 0.12 * draws.between(-1, 1)
    rates, starts = draws.between(0.25, 0.6, 3), draws.between(0, 2 * np.pi, 3)
    swing = options.sway * draws.between(0.5, 1.5, 3) * (1, 1, 3)
    # Along x and z in metres, about the vertical in radians; the second person sways in his own time.
    sway = swing[clip] * np.sin(2 * np.pi * rates[clip] * time[:, None] + starts[clip] + 1.3 * role[:, None])
    yaw = heading[clip] + turning[clip] * walks[clip] * time + sway[:, 2]
    # Along an arc of constant turning; straight on where it hardly turns.
    bend = turning[clip] * walks[clip] * time
    chord = speed[clip] * time * np.sinc(bend / (2 * np.pi))
    along = heading[clip] + bend / 2
    where = np.stack(
        [chord * np.sin(along) + sway[:, 0], np.zeros_like(chord), chord * np.cos(along) + sway[:, 1]], axis=1
    )
    # Half of the way is done when the person is before the camera.
    half = np.array([speed[number] * time[clip == number].max() / 2 for number in range(len(speed))])
    where -= (half[:, None] * np.stack([np.sin(heading), np.zeros_like(heading), np.cos(heading)], axis=1))[clip]
    # The second person stands in front of the first and faces him.
    other = role == 1
    where[other, 0] += (distance[clip] * np.sin(heading[clip]) + aside[clip])[other]
    where[other, 2] += (distance[clip] * np.cos(heading[clip]))[other]
    places = _turn(places, yaw + np.pi * other) + where[:, None]
    # Cameras stand at +45, 0 and -45 degrees before the person, a little apart from day to day.
    view = (1 - camera) * (np.pi / 4) + 0.08 * draws.between(-1, 1)
    places = _turn(places, np.pi + view[clip])
    sight = np.stack([draws.between(-0.4, 0.4), draws.between(-1.2, -0.7), draws.between(2.3, 3.8)], axis=1)
    return places + sight[clip][:, None].astype(np.float32)


def _turn(places: np.ndarray, yaw: np.ndarray) -> np.ndarray:
    """Turn poses ``[F, 25, 3]`` about the vertical."""
    cosine, sine = np.cos(yaw)[:, None].astype(np.float32), np.sin(yaw)[:, None].astype(np.float32)
    x, y, z = np.moveaxis(places, -1, 0)
    return np.stack([cosine * x + sine * z, y, cosine * z - sine * x], axis=-1)


_NOISE_OF_JOINT = np.ones(25, dtype=np.float32)
for _name, _joint in JOINT.items():
    if any(part in _name for part in ("hand", "thumb", "foot")):
        _NOISE_OF_JOINT[_joint] = 2.0
    elif any(part in _name for part in ("wrist", "ankle")):
        _NOISE_OF_JOINT[_joint] = 1.5


def _wander(generator: np.random.Generator, count: int) -> np.ndarray:
    """Errors ``[count, 25, 3]`` of variance about 1 that are drawn every tenth frame and go straight between."""
    knots = generator.standard_normal((count // _KNOT + 3, 25, 3), dtype=np.float32)
    at = (np.arange(count) + generator.integers(_KNOT)) / _KNOT
    low = np.minimum(at.astype(np.int64), len(knots) - 2)
    weight = (at - low).astype(np.float32)[:, None, None]
    return (knots[low] * (1 - weight) + knots[low + 1] * weight) * np.float32(1.2)


def _sensor(
    options: SyntheticOptions,
    draws: _Draws,
    frame_of_body: np.ndarray,
    clip_of_body: np.ndarray,
    places: np.ndarray,
) -> np.ndarray:
    """What the sensor adds: an error that grows with the distance, and joints that lag behind for some frames."""
    parts = []
    ends = np.cumsum(frame_of_body)
    for number, (clip, count) in enumerate(zip(clip_of_body.tolist(), frame_of_body.tolist(), strict=True)):
        generator = draws.generators[clip]
        error = generator.standard_normal((count, 25, 3), dtype=np.float32) * np.float32(0.1)
        error += _wander(generator, count)
        own = places[ends[number] - count : ends[number]]
        error *= np.float32(options.noise / 3) * _NOISE_OF_JOINT[:, None] * own[:, :1, 2:]
        events = generator.poisson(options.stuck * count / FPS)
        for begin, joint, duration in generator.random((events, 3)).tolist():
            first = int(begin * count)
            last = min(count, first + 2 + int(duration * 9))
            joint = int(joint * 25)
            error[first:last, joint] += own[first, joint] - own[first:last, joint]
            error[first:last, joint] += generator.normal(0, 0.05, 3).astype(np.float32)
        parts.append(error)
    return np.concatenate(parts)
