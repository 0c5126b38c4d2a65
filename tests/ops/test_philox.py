"""Philox4x32-10 against the vectors its authors published (Random123, kat_vectors)."""

import pytest
import torch

from jmm_fast import reference

VECTORS = [
    ([0, 0, 0, 0], [0, 0], [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
    ([0xFFFFFFFF] * 4, [0xFFFFFFFF] * 2, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
    (
        [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
        [0xA4093822, 0x299F31D0],
        [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
    ),
]


@pytest.mark.parametrize("counter, key, expected", VECTORS)
def test_published_vectors(counter, key, expected):
    assert reference.philox4x32(torch.tensor(counter), torch.tensor(key)).tolist() == expected


def test_uniform_is_words_of_the_named_counter():
    clip_ids = torch.tensor([17, 17 + (1 << 32), 3_000_000_000])
    seed, epoch = 0x1234_5678_9ABC_DEF0, 5
    drawn = reference.uniform(seed, reference.CROP, clip_ids, epoch, 6)
    key = torch.tensor([0x9ABCDEF0, 0x12345678])
    for row, (clip, body) in enumerate([(17, 0), (17, 1), (3_000_000_000, 0)]):
        counters = torch.tensor([[block, reference.CROP + (body << 8), clip, epoch] for block in (0, 1)])
        words = reference.philox4x32(counters, key).flatten()[:6]
        assert drawn[row].tolist() == [(word >> 8) / 2**24 for word in words.tolist()]
    assert drawn.dtype == torch.float32 and drawn.min() >= 0 and drawn.max() < 1


def test_draws_do_not_depend_on_the_batch():
    ids = torch.arange(40)
    whole = reference.uniform(3, reference.MASK, ids, 2, 750)
    assert torch.equal(reference.uniform(3, reference.MASK, ids[7:9], 2, 750), whole[7:9])
    assert torch.equal(reference.uniform(3, reference.MASK, ids, 2, 13), whole[:, :13])


def test_purposes_epochs_and_seeds_draw_differently():
    ids = torch.arange(2)
    base = reference.uniform(0, reference.MASK, ids, 0, 64)
    for seed, purpose, epoch in ((1, reference.MASK, 0), (0, reference.CROP, 0), (0, reference.MASK, 1)):
        assert not torch.isclose(reference.uniform(seed, purpose, ids, epoch, 64), base).any(dim=1).all()
    draws = reference.uniform(0, reference.MASK, torch.arange(200), 0, 500)
    assert abs(draws.mean().item() - 0.5) < 0.005 and abs(draws.var().item() - 1 / 12) < 0.002
