import itertools

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from jmm_fast.data import BodyBatches, ClipStore, Draft, write_store
from jmm_fast.errors import UserError
from jmm_fast.ops import clip_window, motion_mask
from jmm_fast.reference import philox


@pytest.fixture
def store(make_contents):
    rng = np.random.default_rng(1)
    sizes = rng.integers(2, 200, 40).tolist()
    return ClipStore.from_contents(make_contents(sizes=sizes, bodies=[1 + (i % 3 == 0) for i in range(40)]))


def by_body(batches, epoch):
    """(clip, body) -> everything about it."""
    found = {}
    for batch in batches.epoch(epoch):
        for clip, body in zip(batch.clips, batch.clip_ids.tolist(), strict=True):
            assert body not in found
            found[body] = clip
    return found


def test_a_batch_holds_what_its_clips_hold(store):
    batch = next(BodyBatches(store, torch.arange(40), batch_size=6, window=20, train=False).epoch(0))
    assert batch.index.tolist() == [0, 1, 2, 3, 4, 5]
    assert batch.labels.tolist() == store.labels[:6].tolist()
    assert batch.clip_of_body.tolist() == [0, 0, 1, 2, 3, 3, 4, 5]
    assert batch.clip_ids.tolist() == [0, 1 << 32, 1, 2, 3, (1 << 32) + 3, 4, 5]
    assert batch.clips.dtype == torch.float32 and batch.clips.shape == (8, 20, 25, 3)
    for row, body in enumerate(batch.clip_ids.tolist()):
        clip = store.clip(body & 0xFFFFFFFF)[body >> 32]
        frames = len(clip)
        begin = int((1 - 0.95) * frames / 2)
        # In float64, because torch rounds the place of a frame in a long clip to 1e-5 of a frame in float32.
        middle = clip[begin : frames - begin].double().permute(2, 1, 0).reshape(1, 75, -1)
        expected = F.interpolate(middle, size=20, mode="linear").reshape(3, 25, 20).permute(2, 1, 0)
        torch.testing.assert_close(batch.clips[row], expected.float(), rtol=1e-6, atol=1e-6)


def test_evaluation_crop_is_the_released_one(store):
    batches = BodyBatches(store, torch.arange(40), batch_size=4, train=False)
    begin, length = batches.windows(torch.arange(40), 3)
    for clip, frames in enumerate(store.lengths.tolist()):
        assert begin[clip] == int((1 - 0.95) * frames / 2)
        assert length[clip] == frames - 2 * begin[clip]


def test_golden_crops_and_rotation(golden):
    with np.load(golden("clip_crop_resize_rotate.npz"), allow_pickle=False) as arrays:
        for case in range(9):
            frames = arrays[f"{case}/input"].shape[1]
            interval = arrays[f"{case}/p_interval"].reshape(-1).tolist()
            if len(interval) == 1:
                begin = int((1 - interval[0]) * frames / 2)
                assert (begin, frames - 2 * begin) == (arrays[f"{case}/crop_begin"], arrays[f"{case}/crop_length"])


def test_training_crop_and_rotation(store):
    index = torch.arange(40)
    batches = BodyBatches(store, index, batch_size=4, train=True, seed=5, rotation=0.2, min_length=50)
    draw = philox.uniform(5, philox.CROP, index, 9, 2).double()
    begin, length = batches.windows(index, 9)
    for clip, frames in enumerate(store.lengths.tolist()):
        share = 0.5 + 0.5 * draw[clip, 0].item()
        wanted = min(max(min(50, frames), int(np.floor(frames * share))), frames)
        assert length[clip] == wanted
        assert begin[clip] == int(draw[clip, 1].item() * (frames - wanted + 1))
        assert 0 <= begin[clip] <= frames - wanted
    angles = batches.angles(index, 9)
    torch.testing.assert_close(angles, 0.2 * (2 * philox.uniform(5, philox.ROTATION, index, 9, 3) - 1), rtol=0, atol=0)
    assert angles.abs().max() <= 0.2 and angles.std() > 0.08
    assert BodyBatches(store, index, batch_size=4, train=True, rotation=0).angles(index, 9) is None


def test_crops_cover_their_range(make_contents):
    store = ClipStore.from_contents(make_contents(sizes=[100] * 400))
    begin, length = BodyBatches(store, torch.arange(400), batch_size=4, train=True).windows(torch.arange(400), 0)
    assert length.min() == 64 and 98 <= length.max() <= 100
    assert (length == 64).float().mean() > 0.15  # shares below 0.64 are lifted to 64 frames
    spare = 100 - length
    inside = spare > 10
    assert 0.4 < (begin[inside] / spare[inside]).mean() < 0.6


def test_same_clip_same_crop_for_any_batch_size_order_and_company(store):
    options = {"window": 30, "train": True, "seed": 11}
    reference = by_body(BodyBatches(store, torch.arange(40), batch_size=40, **options), 2)
    for size in (1, 7, 16):
        got = by_body(BodyBatches(store, torch.arange(40), batch_size=size, shuffle=size == 7, **options), 2)
        assert got.keys() == reference.keys()
        assert all(torch.equal(got[body], reference[body]) for body in got)
    some = by_body(BodyBatches(store, torch.tensor([9, 33, 4]), batch_size=2, **options), 2)
    assert all(torch.equal(some[body], reference[body]) for body in some)
    other = by_body(BodyBatches(store, torch.arange(40), batch_size=40, **options), 3)
    assert not any(torch.equal(other[body], reference[body]) for body in other)


def test_bodies_of_a_clip_share_crop_and_rotation(make_contents):
    contents = make_contents(sizes=[90], bodies=[2])
    contents.frames[90:] = contents.frames[:90] + 1e-3
    store = ClipStore.from_contents(contents)
    first, second = next(BodyBatches(store, torch.tensor([0]), batch_size=1, train=True).epoch(0)).clips
    torch.testing.assert_close(second - first, (second - first)[:1, :1].expand_as(first), rtol=0, atol=1e-6)


def test_order(store):
    ids = torch.arange(40)[torch.arange(40) % 4 != 1]
    batches = BodyBatches(store, ids, batch_size=7, train=True, seed=3)
    order = batches.order(4)
    assert sorted(order.tolist()) == ids.tolist()
    assert torch.equal(order, BodyBatches(store, ids, batch_size=2, train=True, seed=3, window=8).order(4))
    assert not torch.equal(order, batches.order(5))
    assert not torch.equal(order, BodyBatches(store, ids, batch_size=7, train=True, seed=4).order(4))
    assert torch.equal(torch.cat([batch.index for batch in batches.epoch(4)]), order)
    assert torch.equal(BodyBatches(store, ids, batch_size=7, train=True, shuffle=False).order(4), ids)


def test_start_skips_batches(store):
    batches = BodyBatches(store, torch.arange(40), batch_size=7, window=10, train=True)
    whole = list(batches.epoch(1))
    rest = list(batches.epoch(1, start=4))
    assert len(whole) == len(batches) == 6 and len(rest) == 2
    for one, other in zip(whole[4:], rest, strict=True):
        assert torch.equal(one.clips, other.clips) and torch.equal(one.clip_ids, other.clip_ids)
    dropping = BodyBatches(store, torch.arange(40), batch_size=7, window=10, train=True, drop_last=True)
    assert [len(batch.labels) for batch in dropping.epoch(0)] == [7] * 5 and len(dropping) == 5


def cut(*parts):
    """The bodies of some parts of a batch, one below the other, and the clips they belong to."""
    names = ("clips", "clip_ids", "labels", "index")
    joined = {name: torch.cat([getattr(part, name) for part in parts]) for name in names}
    clip_of_body = torch.cat([part.index[part.clip_of_body] for part in parts])
    return joined | {"clip_of_body": clip_of_body, "seen": torch.cat([part.seen for part in parts])}


@pytest.mark.parametrize("parts", [1, 2, 3, 5, 9])
def test_parts_make_the_whole(gappy, parts):
    options = {"batch_size": 5, "window": 8, "train": True, "seed": 2}
    whole = list(BodyBatches(gappy, torch.arange(12), **options).epoch(3))
    shares = [list(BodyBatches(gappy, torch.arange(12), part=(r, parts), **options).epoch(3)) for r in range(parts)]
    for number, batch in enumerate(whole):
        expected = cut(batch)
        for pieces in ([share[number] for share in shares], batch.split(parts)):
            sizes = [len(piece.index) for piece in pieces]
            assert len(pieces) == parts and max(sizes) - min(sizes) <= 1 and sizes == sorted(sizes, reverse=True)
            found = cut(*pieces)
            assert all(torch.equal(found[name], expected[name]) for name in expected)
    with pytest.raises(UserError, match=r"part must be \(r, n\)"):
        BodyBatches(gappy, torch.arange(12), part=(parts, parts), **options)


def test_every_other_batch(store):
    batches = BodyBatches(store, torch.arange(40), batch_size=7, window=10, train=True)
    whole = list(batches.epoch(1))
    some = list(batches.epoch(1, start=1, every=3))
    assert [batch.index.tolist() for batch in some] == [whole[number].index.tolist() for number in (1, 4)]


def test_keep_gives_two_bodies_a_clip(store):
    options = {"batch_size": 9, "window": 16, "train": True}
    kept = list(BodyBatches(store, torch.arange(40), empty_bodies="keep", **options).epoch(0))
    skipped = by_body(BodyBatches(store, torch.arange(40), **options), 0)
    seen = 0
    for batch in kept:
        assert len(batch.clips) == 2 * len(batch.labels)
        assert batch.clip_of_body.tolist() == [row // 2 for row in range(len(batch.clips))]
        for clip, body in zip(batch.clips, batch.clip_ids.tolist(), strict=True):
            if body in skipped:
                assert torch.equal(clip, skipped[body])
                seen += 1
            else:
                assert not clip.any()
    assert seen == len(skipped) == store.num_bodies


def test_modalities(store):
    def clips(modality):
        batches = BodyBatches(store, torch.arange(5), batch_size=5, window=12, train=True, modality=modality)
        return next(batches.epoch(0)).clips

    joint, bone = clips("joint"), clips("bone")
    parents = torch.as_tensor(store.skeleton.bone_parents())
    torch.testing.assert_close(bone, joint - joint[:, :, parents])
    assert not bone[:, :, store.skeleton.root].any()
    for modality, base in (("motion", joint), ("bone_motion", bone)):
        moved = clips(modality)
        torch.testing.assert_close(moved[:, :-1], base[:, 1:] - base[:, :-1])
        assert not moved[:, -1].any()


def test_sent_frames_give_the_same_batches(store):
    here = BodyBatches(store, torch.arange(40), batch_size=9, window=16, train=True, empty_bodies="keep")
    sent = BodyBatches(store, torch.arange(40), batch_size=9, window=16, train=True, empty_bodies="keep")
    sent._frames = None
    for one, other in zip(here.epoch(0), sent.epoch(0), strict=True):
        assert torch.equal(one.clips, other.clips)


def test_backends_draw_the_same_crops_and_masks(store):
    pytest.importorskip("jmm_fast._C", reason="the C++ extension is not built", exc_type=ImportError)
    ours, plain = (
        BodyBatches(store, torch.arange(40), batch_size=9, train=True, backend=name) for name in ("cpu", "reference")
    )
    for one, other in zip(ours.epoch(5), plain.epoch(5), strict=True):
        assert torch.equal(one.clips, other.clips)
        for variant in ("released", "paper", "mamp"):
            draws = [
                motion_mask(batch.clips, variant=variant, seed=1, epoch=5, clip_ids=batch.clip_ids, backend=name)
                for batch, name in ((one, "cpu"), (other, "reference"))
            ]
            assert torch.equal(draws[0].mask, draws[1].mask) and torch.equal(draws[0].restore, draws[1].restore)


def test_every_batch_is_one_call_of_the_op(store, monkeypatch):
    calls = []

    def count(*args, **options):
        calls.append(options)
        return clip_window(*args, **options)

    monkeypatch.setattr("jmm_fast.data.batches.ops.clip_window", count)
    list(BodyBatches(store, torch.arange(40), batch_size=10, window=8, train=True, backend="reference").epoch(0))
    assert calls == [{"window": 8, "backend": "reference"}] * 4


@pytest.fixture
def gappy(make_contents):
    """Clips of 2 to 60 frames; five frames at a time, joints are missing (zero), doubtful (0.4) or seen."""
    rng = np.random.default_rng(2)
    sizes = rng.integers(2, 60, 12).tolist()
    contents = make_contents(sizes=sizes, bodies=[1 + (i % 3 == 0) for i in range(12)])
    seen = rng.random((len(contents.frames) // 5 + 1, 25)).repeat(5, axis=0)[: len(contents.frames)]
    contents.confidence = np.where(seen < 0.15, 0, np.where(seen < 0.5, 0.4, 1)).astype(np.float16)
    contents.frames[contents.confidence == 0] = 0
    return ClipStore.from_contents(contents)


@pytest.mark.parametrize("window", [7, 16, 60])
@pytest.mark.parametrize("modality", ["joint", "bone", "motion", "bone_motion"])
def test_seen_is_where_no_missing_number_enters(gappy, modality, window):
    """The oracle: other numbers in place of what is missing show wherever it has an influence."""
    options = {"batch_size": 12, "window": window, "train": True, "modality": modality}
    frames = gappy.frames
    for threshold in (0.0, 0.4, 0.9):
        (batch,) = BodyBatches(gappy, torch.arange(12), min_confidence=threshold, **options).epoch(3)
        missing = ~(gappy.confidence > threshold)[..., None]
        gappy.frames = torch.where(missing, 1e3 * torch.randn_like(frames), frames)
        (other,) = BodyBatches(gappy, torch.arange(12), **options).epoch(3)
        gappy.frames = frames
        same = (batch.clips == other.clips).all(-1)
        # The root's bone, the last motion and that of a row with itself are 0 whatever was seen.
        zero = same & ~batch.clips.any(-1) & (modality != "joint")
        assert torch.equal(batch.seen | zero, same)
        assert 0.05 < (same & ~zero).float().mean() < 0.95


def test_a_frame_is_seen_when_both_rows_that_it_mixes_are(make_contents):
    contents = make_contents(sizes=[4])
    contents.confidence = np.ones((4, 25), np.float16)
    contents.confidence[1, 4] = 0
    store = ClipStore.from_contents(contents)
    options = {"batch_size": 1, "train": False, "eval_crop": 1.0}

    def seen(window, **more):
        return next(BodyBatches(store, torch.tensor([0]), window=window, **options, **more).epoch(0)).seen[0].tolist()

    columns = lambda rows: [row[4] for row in rows]  # noqa: E731
    assert columns(seen(4)) == [True, False, True, True]
    # Places -0.25 (clamped to 0), 0.25, 0.75, 1.25, 1.75, 2.25, 2.75, 3.25 (row 3 alone).
    assert columns(seen(8)) == [True, False, False, False, False, True, True, True]
    assert all(all(value for joint, value in enumerate(row) if joint != 4) for row in seen(8))
    moved = seen(4, modality="motion")
    assert columns(moved) == [False, False, True, True]
    child = store.skeleton.bone_parents().tolist().index(4)
    assert [row[child] for row in seen(4, modality="bone")] == [True, False, True, True]


def test_tokens_seen_and_predictable(gappy):
    (batch,) = BodyBatches(gappy, torch.arange(12), batch_size=12, window=16, train=False).epoch(0)
    valid, known = batch.valid(4), {stride: batch.predictable(4, stride) for stride in (1, 3)}
    assert valid.shape == known[1].shape == (16, 100) and 0.2 < known[3].float().mean() < valid.float().mean() < 1
    for body in range(16):
        for token in range(100):
            step, joint = divmod(token, 25)
            seen = batch.seen[body, :, joint].tolist()
            frames = range(4 * step, 4 * step + 4)
            assert valid[body, token] == all(seen[t] for t in frames)
            for stride, tokens in known.items():
                assert tokens[body, token] == all(seen[t] and (t + stride >= 16 or seen[t + stride]) for t in frames)


def test_confidence_changes_no_clip_and_may_say_that_all_is_there(gappy, make_contents, store):
    told = list(BodyBatches(gappy, torch.arange(12), batch_size=5, window=16, train=True).epoch(1))
    confidence, gappy.confidence = gappy.confidence, None
    untold = list(BodyBatches(gappy, torch.arange(12), batch_size=5, window=16, train=True).epoch(1))
    assert all(torch.equal(a.clips, b.clips) for a, b in zip(told, untold, strict=True))
    assert all(batch.seen is batch.valid(4) is batch.predictable(4, 1) is None for batch in untold)
    gappy.confidence = torch.full_like(confidence, 0.5)
    (batch,) = BodyBatches(gappy, torch.arange(12), batch_size=12, train=True).epoch(1)
    assert batch.seen is None


def test_sent_frames_are_seen_alike_and_absent_bodies_are_not_missing(gappy):
    options = {"batch_size": 5, "window": 16, "train": True, "empty_bodies": "keep", "modality": "bone_motion"}
    here, sent = (BodyBatches(gappy, torch.arange(12), **options) for _ in range(2))
    sent._frames = None
    for one, other in zip(here.epoch(0), sent.epoch(0), strict=True):
        assert torch.equal(one.seen, other.seen)
        present = one.clips.flatten(1).any(1)
        assert one.seen[~present].all() and not one.seen[present].flatten(1).all(1).any()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"min_confidence": 1.0}, "min_confidence must be at least 0 and below 1, got 1.0"),
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"window": 0}, "window and min_length must be at least 1"),
        ({"crop": (0.8, 0.5)}, r"crop must be two shares, 0 < low <= high <= 1, got \(0.8, 0.5\)"),
        ({"eval_crop": 0.0}, "eval_crop must be above 0 and at most 1"),
        ({"rotation": -1}, "rotation must not be negative"),
        ({"modality": "bones"}, "modality must be one of joint, bone, motion, bone_motion, got 'bones'"),
        ({"empty_bodies": "pad"}, "empty_bodies must be skip or keep, got 'pad'"),
        ({"ids": torch.tensor([], dtype=torch.int64)}, "clips in memory: no clips to make batches of"),
        ({"ids": torch.tensor([40])}, r"clip ids must lie in 0\.\.39"),
        ({"prefetch": -1}, "prefetch must not be negative, got -1"),
        ({"batch_size": 41, "drop_last": True}, "40 clips do not fill one batch of 41"),
    ],
)
def test_bad_arguments(store, options, message):
    with pytest.raises(UserError, match=message):
        BodyBatches(store, **{"ids": torch.arange(40), "batch_size": 4, "train": True} | options)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_gpu_batches_equal_cpu_batches(store):
    cpu = BodyBatches(store, torch.arange(40), batch_size=9, train=True)
    for hold in (True, False):
        gpu = BodyBatches(store, torch.arange(40), batch_size=9, train=True, device="cuda", backend="reference")
        if not hold:
            gpu._frames = None
        for one, other in zip(cpu.epoch(0), gpu.epoch(0), strict=True):
            assert other.clips.is_cuda
            torch.testing.assert_close(one.clips, other.clips.cpu(), rtol=1e-5, atol=1e-6)
            assert torch.equal(one.clip_ids, other.clip_ids.cpu())


def test_a_batch_costs_no_copy_beyond_itself(tmp_path, make_contents):
    write_store(tmp_path / "clips", make_contents(sizes=[400] * 20, bodies=[1] * 20))
    store = ClipStore.open(tmp_path / "clips")
    batches = BodyBatches(store, torch.arange(20), batch_size=4, window=20, train=True)
    batches.batch(torch.arange(4), 0)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        batch = batches.batch(torch.arange(4, 8), 0)
    taken = sum(max(event.self_cpu_memory_usage, 0) for event in profile.events())
    # Positions, labels and draws are some hundred bytes; the four clips alone would be 25 times the batch.
    assert batch.clips.nbytes <= taken <= 1.2 * batch.clips.nbytes


def fields(batch):
    found = {name: getattr(batch, name) for name in ("clips", "clip_ids", "clip_of_body", "labels", "index", "seen")}
    return found | {"bodies": torch.from_numpy(batch.bodies)}


def assert_equal_batches(ours, others):
    for one, other in zip(ours, others, strict=True):
        for (name, a), b in zip(fields(one).items(), fields(other).values(), strict=True):
            assert (a is None and b is None) or (a.dtype == b.dtype and torch.equal(a, b)), name


@pytest.mark.parametrize("empty_bodies", ["skip", "keep"])
@pytest.mark.parametrize("data", ["store", "gappy"])
def test_batches_made_ahead_are_the_same(request, data, empty_bodies):
    store = request.getfixturevalue(data)
    options = {"batch_size": 5, "window": 16, "train": True, "seed": 4, "empty_bodies": empty_bodies}
    ids = torch.arange(store.num_clips)
    plain = BodyBatches(store, ids, prefetch=0, **options)
    for prefetch in (1, 2, 5):
        ours = BodyBatches(store, ids, prefetch=prefetch, **options)
        for where in ({}, {"start": 1}, {"start": 1, "every": 2}):
            expected = [plain.batch(index, 3) for index in plain.order(3).split(5)][where.get("start", 0) :]
            expected = expected[:: where.get("every", 1)]
            assert_equal_batches(plain.epoch(3, **where), expected)
            assert_equal_batches(ours.epoch(3, **where), expected)
            assert_equal_batches(map(ours.make, ours.drafts(3, **where)), expected)
    assert (expected[0].seen is not None) == (data == "gappy")


@pytest.mark.parametrize("modality", ["joint", "bone_motion"])
def test_gathered_frames_give_the_same_batches_where_joints_are_missing(gappy, modality):
    options = {"batch_size": 5, "window": 16, "train": True, "modality": modality, "empty_bodies": "keep"}
    held, sent = (BodyBatches(gappy, torch.arange(12), **options) for _ in range(2))
    sent._frames = None
    assert_equal_batches(held.epoch(2), sent.epoch(2))
    rows = [len(draft.frames) for epoch in range(20) for draft in sent.drafts(epoch)]
    assert 0.5 * sent.most_rows() < max(rows) <= sent.most_rows() < len(gappy.frames)


def test_a_draft_can_stand_for_all_of_its_shape(gappy):
    """What a captured step does: the memory that a batch is made from is filled with one draft after the other."""
    for gathered in (False, True):
        batches = BodyBatches(gappy, torch.arange(12), batch_size=4, window=16, train=True, empty_bodies="keep")
        batches._frames = None if gathered else batches._frames
        drafts = list(batches.drafts(1))
        rows = max(len(draft.frames) for draft in drafts) if gathered else 0
        held = Draft(
            numbers=torch.zeros_like(drafts[0].numbers), shape=drafts[0].shape, turned=True, index=None, bodies=None
        )
        if gathered:
            held.frames, held.seen = torch.full((rows, 25, 3), 9.0), torch.zeros(rows, 25, dtype=torch.bool)
        for draft in drafts:
            assert draft.shape == (8, 4)
            draft.copy_into(held)
            one, other = batches.make(held), batches.make(draft)
            assert torch.equal(one.clips, other.clips) and torch.equal(one.seen, other.seen)
            assert torch.equal(one.clip_ids, other.clip_ids) and held.parts()["epoch"].item() == 1
            assert one.bodies is None


@pytest.mark.parametrize("bodies", [1, 2, 7])
@pytest.mark.parametrize("rotation", [0.3, 0.0])
def test_parts_of_a_draft_begin_at_16_bytes_and_do_not_overlap(make_contents, bodies, rotation):
    store = ClipStore.from_contents(make_contents(sizes=[9] * bodies))
    batches = BodyBatches(store, torch.arange(bodies), batch_size=bodies, train=True, rotation=rotation)
    draft = batches.draft(torch.arange(bodies), 6)
    parts = draft.parts()
    assert ("angles" in parts) == (rotation > 0)
    begin = draft.numbers.data_ptr()
    places = sorted((part.data_ptr() - begin, part.nbytes) for part in parts.values())
    assert all(at % 16 == 0 for at, _ in places)
    assert all(at + size <= after for (at, size), (after, _) in itertools.pairwise(places))
    assert places[-1][0] + places[-1][1] <= draft.numbers.nbytes


class Calls(TorchDispatchMode):
    """The operators that run."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("modality", ["joint", "bone_motion"])
def test_making_a_batch_asks_the_device_for_nothing(gappy, modality):
    """No number comes back, no size depends on one, nothing is sent: so it can run on a GPU while the host goes on."""
    batches = BodyBatches(gappy, torch.arange(12), batch_size=12, window=16, train=True, modality=modality)
    (draft,) = batches.drafts(0)
    with Calls() as calls:
        batches.make(draft)
    assert "clip_window" in calls.names
    assert not {"_local_scalar_dense", "nonzero", "_to_copy", "lift_fresh", "lift_fresh_copy"} & set(calls.names)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("hold", [True, False])
@pytest.mark.parametrize("prefetch", [0, 3])
def test_no_gpu_batch_waits_for_the_gpu(gappy, hold, prefetch):
    options = {"batch_size": 5, "window": 16, "train": True}
    batches = BodyBatches(gappy, torch.arange(12), device="cuda", prefetch=prefetch, **options)
    if not hold:
        batches._frames, batches._seen = None, batches._seen.cpu()
    list(batches.epoch(0))
    torch.cuda.set_sync_debug_mode("error")
    try:
        ours = list(batches.epoch(1))
        drafts = list(batches.drafts(1))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(draft.numbers.is_cuda and not draft.index.is_cuda for draft in drafts)
    plain = BodyBatches(gappy, torch.arange(12), **options)
    for one, other in zip(plain.epoch(1), ours, strict=True):
        torch.testing.assert_close(one.clips, other.clips.cpu(), rtol=1e-5, atol=1e-6)
        assert torch.equal(one.clip_ids, other.clip_ids.cpu()) and torch.equal(one.seen, other.seen.cpu())
