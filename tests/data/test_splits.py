import numpy as np
import pytest
import torch

from jmm_fast.data import ClipStore, stratified_fraction
from jmm_fast.errors import UserError


@pytest.fixture
def store(make_contents):
    contents = make_contents(
        sizes=[3] * 12,
        splits={"xsub": {"train": [0, 1, 2], "test": [3, 4]}, "odd": {"train": [1, 3], "test": [0]}},
    )
    return ClipStore.from_contents(contents, "clips.safetensors")


SUBJECT, CAMERA = np.arange(12) % 3, np.arange(12) % 2 + 1
SPEED = np.linspace(0.5, 2, 12)


@pytest.mark.parametrize(
    ("spec", "train", "test"),
    [
        ("subject in 0,2", SUBJECT != 1, SUBJECT == 1),
        ("subject in s01, s03", SUBJECT != 1, SUBJECT == 1),
        ("subject not in s02", SUBJECT != 1, SUBJECT == 1),
        ("subject in 1-2", SUBJECT >= 1, SUBJECT < 1),
        ("camera = 2", CAMERA == 2, CAMERA == 1),
        ("camera==2 & subject != s01", (CAMERA == 2) & (SUBJECT != 0), ~((CAMERA == 2) & (SUBJECT != 0))),
        ("speed >= 1.0", SPEED >= 1, SPEED < 1),
        ("label in wave both", CAMERA == 2, CAMERA == 1),
        ("train: subject in 0; test: subject in 2 & camera in 1", SUBJECT == 0, (SUBJECT == 2) & (CAMERA == 1)),
        ("subject in 0 within camera in 1", (SUBJECT == 0) & (CAMERA == 1), (SUBJECT != 0) & (CAMERA == 1)),
        ("all", SUBJECT >= 0, SUBJECT < 0),
    ],
)
def test_expressions(store, spec, train, test):
    split = store.split(spec)
    assert split.name == spec
    assert split.train.dtype == split.test.dtype == torch.int64
    np.testing.assert_array_equal(split.train, np.flatnonzero(train))
    np.testing.assert_array_equal(split.test, np.flatnonzero(test))


def test_stored_splits(store):
    split = store.split("xsub")
    assert split.train.tolist() == [0, 1, 2] and split.test.tolist() == [3, 4]
    narrowed = store.split("xsub within camera in 2")
    assert narrowed.train.tolist() == [1] and narrowed.test.tolist() == [3]


def test_the_only_split_is_the_default(make_contents, store):
    one = ClipStore.from_contents(make_contents(splits={"xsub": {"train": [0], "test": [1]}}))
    assert one.split().name == "xsub"
    with pytest.raises(UserError, match="say which split: stored ones are xsub, odd"):
        store.split()
    with pytest.raises(UserError, match="stored ones are none"):
        ClipStore.from_contents(make_contents()).split(None)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("xview", r"unknown split 'xview': stored splits are xsub, odd; .* over label, subject, camera, speed"),
        ("person in 1", r"asks for a column 'person'; there are label, subject, camera, speed"),
        ("subject in s09", r"column subject has no value 's09'; it has s01, s02, s03"),
        ("camera in left", r"column camera has no value 'left'; it has numbers only"),
        ("subject in 7", r"leaves no clip to train"),
        ("subject in 0-2", r"leaves no clip to test"),
        ("train: subject in 0", r"expected 'train: EXPR; test: EXPR'"),
        ("train: subject in 0; test: camera in 1", r"puts clip 0 into both train and test"),
        ("subject in 0 & nonsense", r"cannot read 'subject in 0 & nonsense'"),
    ],
)
def test_bad_specs(store, spec, message):
    with pytest.raises(UserError, match=message) as caught:
        store.split(spec)
    assert str(caught.value).startswith("clips.safetensors: ")


def test_stratified_fraction():
    labels = torch.tensor([0] * 50 + [1] * 20 + [2] * 3 + [3] * 40)
    ids = torch.arange(113)[torch.arange(113) % 10 != 9]
    few = stratified_fraction(labels, ids, 0.1, 7)
    counts = torch.bincount(labels[ids], minlength=4)
    expected = [max(1, round(0.1 * count)) for count in counts.tolist()]
    assert torch.bincount(labels[few], minlength=4).tolist() == expected
    assert set(few.tolist()) <= set(ids.tolist()) and few.tolist() == sorted(few.tolist())
    assert torch.equal(few, stratified_fraction(labels, ids[torch.randperm(len(ids))], 0.1, 7))
    assert not torch.equal(few, stratified_fraction(labels, ids, 0.1, 8))
    assert torch.equal(stratified_fraction(labels, ids, 1.0, 7), ids)
    # More labels hold the clips of fewer.
    assert set(few.tolist()) <= set(stratified_fraction(labels, ids, 0.3, 7).tolist())
    assert stratified_fraction(labels, ids[:0], 0.5, 7).shape == (0,)


@pytest.mark.parametrize("fraction", [0, -0.1, 1.5, float("nan")])
def test_bad_fraction(fraction):
    with pytest.raises(UserError, match="fraction must be above 0 and at most 1"):
        stratified_fraction(torch.zeros(3, dtype=torch.int64), torch.arange(3), fraction, 0)
