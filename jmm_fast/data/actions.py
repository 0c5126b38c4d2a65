"""What the synthetic figure does: each action is a handful of periodic joint angles.

One term moves one angle of one joint: ``centre + swing * wave(rate * phase + lag)`` with
``wave(x) = sin(x + skew sin x)``, or ``((1 + wave) / 2) ** power`` where ``power`` is given. Actions come in groups
that use the same joints around the same mean pose and differ in which side moves, in lag between joints, in direction
of turning or in the direction of time.
"""

from dataclasses import dataclass

import numpy as np

from jmm_fast.data.figure import BEND, JOINT, SPREAD, TWIST

HALF = np.pi


@dataclass(frozen=True, slots=True, kw_only=True)
class Term:
    """One moving angle; radians."""

    joint: str
    axis: int
    centre: float = 0.0
    swing: float = 0.0
    lag: float = 0.0
    rate: float = 1.0
    skew: float = 0.0
    power: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Action:
    """A class: its name, the first person's terms, the second person's where there is one.

    Attributes:
        free_legs: whether the legs are free to walk while the action goes on.
    """

    name: str
    terms: tuple[Term, ...]
    partner: tuple[Term, ...] = ()
    free_legs: bool = True


def _arm_up(side: str) -> tuple[Term, ...]:
    return (Term(joint=f"{side}_elbow", axis=SPREAD, centre=1.0), Term(joint=f"{side}_wrist", axis=BEND, centre=1.5))


def _wave(side: str, lag: float = 0.0) -> tuple[Term, ...]:
    return (
        *_arm_up(side),
        Term(joint=f"{side}_elbow", axis=TWIST, centre=1.2, swing=0.55, lag=lag),
        Term(joint=f"{side}_hand", axis=SPREAD, swing=0.3, lag=lag - 0.6),
    )


def _circle(side: str, direction: float) -> tuple[Term, ...]:
    return (
        Term(joint=f"{side}_elbow", axis=BEND, centre=1.1, swing=0.45),
        Term(joint=f"{side}_elbow", axis=SPREAD, centre=0.3, swing=0.45, lag=direction * HALF / 2),
        Term(joint=f"{side}_wrist", axis=BEND, centre=0.7, swing=0.15, lag=1.0),
    )


def _raise(side: str, lag: float = 0.0) -> tuple[Term, ...]:
    return (
        Term(joint=f"{side}_elbow", axis=BEND, centre=0.9, swing=0.7, lag=lag),
        Term(joint=f"{side}_wrist", axis=BEND, centre=0.4, swing=0.2, lag=lag + 0.5),
    )


def _punch(side: str, lag: float) -> tuple[Term, ...]:
    return (
        Term(joint=f"{side}_elbow", axis=BEND, centre=0.4, swing=1.0, lag=lag, power=2.0),
        Term(joint=f"{side}_wrist", axis=BEND, centre=2.0, swing=-1.6, lag=lag, power=2.0),
    )


def _throw(skew: float) -> tuple[Term, ...]:
    return (
        Term(joint="right_elbow", axis=BEND, centre=1.0, swing=0.8, skew=skew),
        Term(joint="right_elbow", axis=SPREAD, centre=0.5),
        Term(joint="right_wrist", axis=BEND, centre=1.0, swing=-0.6, skew=skew),
        Term(joint="spine_mid", axis=TWIST, swing=0.25, skew=skew),
    )


def _step(side: str, lag: float, height: float = 0.45) -> tuple[Term, ...]:
    return (
        Term(joint=f"{side}_knee", axis=BEND, swing=2 * height, lag=lag, power=1.5),
        Term(joint=f"{side}_ankle", axis=BEND, centre=0.1, swing=2.2 * height, lag=lag, power=1.5),
    )


def _swing(side: str, lag: float) -> tuple[Term, ...]:
    return (
        Term(joint=f"{side}_elbow", axis=BEND, centre=0.15, swing=0.5, lag=lag),
        Term(joint=f"{side}_wrist", axis=BEND, centre=0.6, swing=0.15, lag=lag),
    )


def _kick(side: str) -> tuple[Term, ...]:
    return (
        Term(joint=f"{side}_knee", axis=BEND, centre=-0.1, swing=1.2, power=3.0),
        Term(joint=f"{side}_ankle", axis=BEND, centre=0.1, swing=1.0, lag=0.9, power=3.0),
        Term(joint="spine_mid", axis=BEND, swing=-0.2, power=3.0),
    )


def _squat() -> tuple[Term, ...]:
    legs = (
        Term(joint=f"{side}_{joint}", axis=BEND, swing=swing, power=1.0)
        for side in ("left", "right")
        for joint, swing in (("knee", 1.1), ("ankle", 1.7), ("foot", 0.6))
    )
    return (*legs, Term(joint="spine_mid", axis=BEND, centre=0.05, swing=0.35, power=1.0))


def _clap(side: str) -> tuple[Term, ...]:
    return (
        Term(joint=f"{side}_elbow", axis=BEND, centre=0.8),
        Term(joint=f"{side}_elbow", axis=TWIST, centre=-0.25, swing=0.4),
        Term(joint=f"{side}_wrist", axis=BEND, centre=1.1),
    )


def _push(side: str) -> tuple[Term, ...]:
    return (
        Term(joint=f"{side}_elbow", axis=BEND, centre=0.5, swing=0.9, power=2.0),
        Term(joint=f"{side}_wrist", axis=BEND, centre=1.6, swing=-1.3, power=2.0),
    )


def _shake() -> tuple[Term, ...]:
    return (
        Term(joint="right_elbow", axis=BEND, centre=0.75, swing=0.12),
        Term(joint="right_wrist", axis=BEND, centre=0.8, swing=0.3),
        Term(joint="spine_mid", axis=BEND, centre=0.08),
    )


ACTIONS = (
    Action(name="wave right hand", terms=_wave("right")),
    Action(name="wave left hand", terms=_wave("left")),
    Action(name="wave both hands together", terms=_wave("left") + _wave("right")),
    Action(name="wave both hands in turn", terms=_wave("left") + _wave("right", HALF)),
    Action(name="circle right arm inward", terms=_circle("right", 1.0)),
    Action(name="circle right arm outward", terms=_circle("right", -1.0)),
    Action(name="raise both arms together", terms=_raise("left") + _raise("right")),
    Action(name="raise both arms in turn", terms=_raise("left") + _raise("right", HALF)),
    Action(name="throw", terms=_throw(-0.8)),
    Action(name="pull", terms=_throw(0.8)),
    Action(name="punch in turn", terms=_punch("left", 0.0) + _punch("right", HALF)),
    Action(name="clap", terms=_clap("left") + _clap("right")),
    Action(
        name="march",
        terms=_step("left", 0.0) + _step("right", HALF) + _swing("left", HALF) + _swing("right", 0.0),
        free_legs=False,
    ),
    Action(
        name="march same side",
        terms=_step("left", 0.0) + _step("right", HALF) + _swing("left", 0.0) + _swing("right", HALF),
        free_legs=False,
    ),
    Action(name="kick right", terms=_kick("right"), free_legs=False),
    Action(name="kick left", terms=_kick("left"), free_legs=False),
    Action(name="squat", terms=_squat(), free_legs=False),
    Action(
        name="bow",
        terms=(
            Term(joint="spine_mid", axis=BEND, swing=0.7, power=1.0),
            Term(joint="spine_shoulder", axis=BEND, swing=0.35, power=1.0),
            Term(joint="neck", axis=BEND, swing=0.3, power=1.0),
        ),
    ),
    Action(
        name="twist trunk",
        terms=(
            Term(joint="spine_mid", axis=TWIST, swing=0.45),
            Term(joint="spine_shoulder", axis=TWIST, swing=0.3),
            Term(joint="left_elbow", axis=SPREAD, centre=0.5),
            Term(joint="right_elbow", axis=SPREAD, centre=0.5),
        ),
    ),
    Action(name="shake hands", terms=_shake(), partner=_shake(), free_legs=False),
    Action(
        name="push",
        terms=(
            *_push("left"),
            *_push("right"),
            Term(joint="spine_mid", axis=BEND, swing=0.25, power=2.0),
        ),
        partner=(
            Term(joint="spine_mid", axis=BEND, swing=-0.35, lag=-0.7, power=2.0),
            Term(joint="left_elbow", axis=BEND, swing=0.5, lag=-0.7, power=2.0),
            Term(joint="right_elbow", axis=BEND, swing=0.5, lag=-0.7, power=2.0),
            Term(joint="left_knee", axis=BEND, swing=-0.25, lag=-0.7, power=2.0),
        ),
        free_legs=False,
    ),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Programs:
    """All actions' terms as arrays ``[P, K]``; row ``2 a`` is action ``a``, row ``2 a + 1`` its second person."""

    channel: np.ndarray
    centre: np.ndarray
    swing: np.ndarray
    lag: np.ndarray
    rate: np.ndarray
    skew: np.ndarray
    power: np.ndarray
    held: np.ndarray


def programs() -> Programs:
    """The table of :data:`ACTIONS`, padded with terms that move nothing."""
    rows = [terms for action in ACTIONS for terms in (action.terms, action.partner)]
    width = max(map(len, rows))

    def table(value, dtype=np.float32) -> np.ndarray:
        return np.array([[*map(value, row), *[0] * (width - len(row))] for row in rows], dtype=dtype)

    return Programs(
        channel=table(lambda term: JOINT[term.joint] * 3 + term.axis, np.int64),
        held=table(lambda term: 1, bool),
        **{
            name: table(lambda term, name=name: getattr(term, name))
            for name in ("centre", "swing", "lag", "rate", "skew", "power")
        },
    )
