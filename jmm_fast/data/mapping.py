"""From one joint layout to another, by the names of the joints.

The names of each layout are read as parts of the body (:data:`PARTS`); a joint of the target then comes from the
source's joint of the same part, else from the middle of two parts, else from the nearest joint, else it is missing.
"""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import yaml

from jmm_fast.errors import UserError
from jmm_fast.skeleton import Skeleton, sides_and_stems

PARTS = """
spine_shoulder | spineshoulder shouldercenter spinechest upperchest chest4 chest3 chest2 spine5 spine4 spine3 thorax
               :   chest spine2 spine1 | left_shoulder+right_shoulder | neck spine_mid
spine_mid      | spinemid midspine spinenavel spinenaval torso chest2 chest spine2 spine1 upperback spine belly
               :   lowerback abdomen | pelvis+spine_shoulder pelvis+neck | spine_low spine_shoulder
spine_low      | lowerback spine1 spine abdomen | pelvis+spine_mid | pelvis
pelvis         | hips pelvis hipcenter midhip spinebase waist root hip | left_hip+right_hip | spine_low
neck           | neck lowerneck neckbase neck1 necknose | spine_shoulder+head | spine_shoulder
upper_neck     | upperneck neck2 neck1 | neck+head | neck head
head           | head | left_ear+right_ear left_eye+right_eye | nose head_tip neck
head_tip       | headtip headend headtop topofhead vertex | | head
nose           | nose | left_eye+right_eye | head
*_eye          | eye | | nose head
*_ear          | ear | | nose head
*_shoulder     | upperarm uparm humerus shldr arm shoulder | | *_collar
*_collar       | collar clavicle collarbone shoulder | spine_shoulder+*_shoulder | spine_shoulder
*_elbow        | elbow forearm lowerarm loarm radius | |
*_wrist        | wrist hand | | *_hand
*_hand         | hand palm fingerbase handmiddle1 middle1 handindex1 index1 | | *_wrist
*_hand_tip     | handtip fingertip fingers handend handmiddle4 handmiddle3 middle3 handindex4 handindex3 index3
               :   handindex1 | | *_hand *_wrist
*_thumb        | thumb handthumb4 handthumb3 thumb3 handthumb2 thumb2 handthumb1 thumb1 | | *_hand *_wrist
*_hip          | upleg upperleg thigh femur hip | | *_hip_root
*_hip_root     | hipjoint | | pelvis
*_knee         | knee lowerleg loleg shin calf tibia leg | |
*_ankle        | ankle foot | | *_foot
*_foot         | toebase toes toe toe0 ball bigtoe foot | | *_ankle
"""
"""The rules, a part of the body a row: names of its joint (the first that is there; a joint stands for one part, the
one further up), else the middle of two parts, else the nearest joint. Names are compared in lower case, without side,
punctuation and a rig's prefix; ``*`` is left and right; a row may go on after ``:``."""

_PREFIX = re.compile(r"^(.*[:|]|mixamorig\d*_?|(bip|character)\d+[_ ]|[mf]_avg_)|[_ ](joint|jnt)$", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class _Part:
    name: str
    side: str | None
    stems: tuple[str, ...]
    middles: tuple[tuple[str, str], ...]
    nearest: tuple[str, ...]


def _parts() -> dict[str, _Part]:
    parts = {}
    for row in re.sub(r"\n\s+:", "", PARTS.strip()).splitlines():
        name, stems, middles, nearest = (cell.split() for cell in row.split("|"))
        for side in ("left", "right") if "*" in name[0] else (None,):

            def sided(text: str, side: str | None = side) -> str:
                return text.replace("*", side or "*")

            parts[sided(name[0])] = _Part(
                sided(name[0]),
                side,
                tuple(stems),
                tuple(tuple(map(sided, middle.split("+"))) for middle in middles),
                tuple(map(sided, nearest)),
            )
    return parts


_PARTS = _parts()


@dataclass(frozen=True, slots=True, kw_only=True)
class JointMapping:
    """Where each joint of ``target`` comes from.

    Attributes:
        source, target: the two layouts.
        sources: for each joint of ``target`` the joints of ``source`` whose mean it is; none: it is missing.
        rules: for each joint of ``target`` which rule says so: ``same``, ``middle``, ``nearest``, ``missing`` or
            ``given`` (by the override).
    """

    source: Skeleton
    target: Skeleton
    sources: tuple[tuple[int, ...], ...]
    rules: tuple[str, ...]

    def __call__(self, frames: np.ndarray, confidence: np.ndarray | None) -> tuple[np.ndarray, np.ndarray | None]:
        """Map ``frames`` float32 ``[M, n, V, 3]`` and ``confidence`` float32 ``[M, n, V]`` or None.

        A missing joint lies at zero with confidence 0; a mean has the least confidence of its joints and is missing
        where one of them is, that is, where it has confidence 0 and lies at zero.
        """
        first = [held[0] if held else 0 for held in self.sources]
        missing = [joint for joint, held in enumerate(self.sources) if not held]
        means = [(joint, list(held)) for joint, held in enumerate(self.sources) if len(held) > 1]
        mapped = frames[:, :, first]
        for joint, held in means:
            mapped[:, :, joint] = frames[:, :, held].mean(axis=2)
        if confidence is None and not missing:
            return mapped, None
        known = np.ones(frames.shape[:3], np.float32) if confidence is None else confidence
        result = known[:, :, first]
        for joint, held in means:
            result[:, :, joint] = known[:, :, held].min(axis=2)
            lost = (known[:, :, held] == 0) & ~frames[:, :, held].any(axis=3)
            mapped[:, :, joint][lost.any(axis=2)] = 0
        mapped[:, :, missing] = result[:, :, missing] = 0
        return mapped, result

    def table(self) -> str:
        """A line for each joint of ``target``: its name, the rule and the joints it comes from."""
        width = max(map(len, self.target.joint_names))
        lines = []
        for name, rule, held in zip(self.target.joint_names, self.rules, self.sources, strict=True):
            origin = ", ".join(dict.fromkeys(self.source.joint_names[joint] for joint in held))
            lines.append(f"{name:<{width}}  {rule:<7}  {origin}".rstrip())
        return "\n".join(lines)


def joint_parts(layout: Skeleton) -> dict[str, int]:
    """The joints of ``layout`` whose names tell which part of the body they are, by part (a row of :data:`PARTS`).

    Raises:
        UserError: two joints have the same name but for case and punctuation.
    """
    found, doubtful = _named(layout)
    if doubtful:
        part, joints = next(iter(doubtful.items()))
        raise UserError(f"{layout.name}: {part} may be {' or '.join(layout.joint_names[joint] for joint in joints)}")
    return found


def spine_joints(layout: Skeleton) -> list[int]:
    """Joints whose mean is the middle of the spine, by the rules of :data:`PARTS`; the root where no name tells."""
    return list(_surely("spine_mid", joint_parts(layout))) or [layout.root]


def joint_mapping(source: Skeleton, target: Skeleton, override: Path | None = None) -> JointMapping:
    """How ``source`` is mapped onto ``target``: see :data:`PARTS`; between layouts of the same names, by these.

    Args:
        source, target: the two layouts.
        override: YAML file of ``TARGET: SOURCE``, ``TARGET: [SOURCE, SOURCE]`` (the mean) or ``TARGET: null``
            (missing), for the joints it names.

    Raises:
        UserError: fewer than half of the target's joints are the same, the middle of two, or given; a part may be
            either of two joints; a broken override.
    """
    given = {} if override is None else _read_override(override, source, target)
    index = {name: joint for joint, name in enumerate(source.joint_names)}
    if set(target.joint_names) <= set(index):
        rows = {name: ("same", (index[name],)) for name in target.joint_names}
    else:
        held, doubtful = _named(source)
        parts = {joint: part for part, joint in joint_parts(target).items()}
        rows = {name: _come_from(parts.get(joint), held) for joint, name in enumerate(target.joint_names)}
        for joint, name in enumerate(target.joint_names):
            if parts.get(joint) in doubtful and name not in given:
                either = " or ".join(source.joint_names[one] for one in doubtful[parts[joint]])
                raise UserError(f"{source.name}: {name} may be {either}: say which with --joint-map")
    rows |= {name: ("given", joints) for name, joints in given.items()}
    lost = [name for name, (rule, _) in rows.items() if rule in ("nearest", "missing")]
    if 2 * len(lost) > target.num_joints:
        raise UserError(
            f"the joints {some(source.joint_names)} cannot be mapped onto {target.name}: {len(lost)} of its "
            f"{target.num_joints} joints were not found by name: {some(lost, 25)}; say where with --joint-map"
        )
    return JointMapping(
        source=source,
        target=target,
        sources=tuple(joints for _, joints in rows.values()),
        rules=tuple(rule for rule, _ in rows.values()),
    )


def _named(layout: Skeleton) -> tuple[dict[str, int], dict[str, list[int]]]:
    """Parts that joints of ``layout`` are called by, and parts of which two joints have the name."""
    stems: dict[tuple[str | None, str], list[int]] = {}
    plain = [_PREFIX.sub("", name) or name for name in layout.joint_names]
    for joint, (side, stem) in enumerate(sides_and_stems(plain)):
        stem = re.sub(r"(?<!\d)0+(?=\d)", "", re.sub(r"[^a-z0-9]", "", stem))
        stems.setdefault((side, stem), []).append(joint)
    found, doubtful, taken = {}, {}, set()
    for part in _PARTS.values():
        for key in ((part.side, stem) for stem in part.stems):
            if key in stems and key not in taken:
                taken.add(key)
                found[part.name], *others = stems[key]
                if others:
                    doubtful[part.name] = stems[key]
                break
    return found, doubtful


def _come_from(part: str | None, held: dict[str, int]) -> tuple[str, tuple[int, ...]]:
    """The rule by which ``part`` comes from the parts that are ``held``, and the joints."""
    if part is None:
        return "missing", ()
    found = _surely(part, held)
    if found:
        return "same" if part in held else "middle", found
    for other in _PARTS[part].nearest:
        found = _surely(other, held)
        if found:
            return "nearest", found
    return "missing", ()


def _surely(part: str, held: dict[str, int], seen: frozenset[str] = frozenset()) -> tuple[int, ...]:
    """Joints whose mean is ``part``: the one of its name, or those of the middle; none where neither is known."""
    if part in held:
        return (held[part],)
    for pair in _PARTS[part].middles:
        if seen.isdisjoint(pair):
            one, two = (_surely(other, held, seen | {part}) for other in pair)
            if one and two:
                # Both halves weigh the same, of however many joints they are the mean.
                size = math.lcm(len(one), len(two))
                return one * (size // len(one)) + two * (size // len(two))
    return ()


def _read_override(path: Path, source: Skeleton, target: Skeleton) -> dict[str, tuple[int, ...]]:
    try:
        rows = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {path}: {getattr(error, 'strerror', None) or error}") from error
    except yaml.YAMLError as error:
        raise UserError(f"{path}: not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(rows, dict):
        raise UserError(f"{path}: expected lines TARGET: SOURCE, TARGET: [SOURCE, SOURCE] or TARGET: null")
    index = {name: joint for joint, name in enumerate(source.joint_names)}
    result = {}
    for name, wanted in rows.items():
        if name not in target.joint_names:
            raise UserError(f"{path}: {target.name} has no joint {name!r}: it has {', '.join(target.joint_names)}")
        joints = [] if wanted is None else wanted if isinstance(wanted, list) and wanted else [wanted]
        for joint in joints:
            if not isinstance(joint, str) or joint not in index:
                raise UserError(f"{path}: {name}: the data has no joint {joint!r}: it has {some(index, 40)}")
        result[name] = tuple(index[joint] for joint in joints)
    return result


def some(names: Sequence[str] | dict[str, int], count: int = 6) -> str:
    """The first ``count`` names, for a message, and how many there are in all."""
    names = list(names)
    return ", ".join(names[:count]) + (f", ... ({len(names)} in all)" if len(names) > count else "")
