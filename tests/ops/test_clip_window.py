import numpy as np
import pytest
import torch
from torch.nn import functional as F

from jmm_fast import ops, reference


@pytest.mark.parametrize("case", range(9))
def test_golden_windows(golden, case):
    arrays = np.load(golden("clip_crop_resize_rotate.npz"))
    bodies = torch.from_numpy(arrays[f"{case}/input"]).permute(3, 1, 2, 0)
    count = bodies.shape[1]
    start = torch.tensor([0, count]) + int(arrays[f"{case}/crop_begin"])
    length = torch.full((2,), int(arrays[f"{case}/crop_length"]))
    angles = torch.from_numpy(arrays[f"{case}/angles"]).expand(2, 3)
    clips = ops.clip_window(bodies.reshape(-1, 25, 3), start, length, angles, window=120)
    expected = torch.from_numpy(arrays[f"{case}/output"]).permute(3, 1, 2, 0)
    torch.testing.assert_close(clips, expected, rtol=1e-4, atol=2e-6)
    if f"{case}/rotation_matrix" in arrays:
        torch.testing.assert_close(
            reference.rotation_matrix(angles[0]), torch.from_numpy(arrays[f"{case}/rotation_matrix"]), rtol=0, atol=1e-6
        )


@pytest.mark.parametrize("count, window", [(1, 120), (2, 7), (63, 120), (120, 120), (300, 60)])
def test_resampling_is_half_pixel_interpolation(count, window):
    frames = torch.randn(count, 5, 3, dtype=torch.float64)
    ours = ops.clip_window(frames, torch.tensor([0]), torch.tensor([count]), window=window)[0]
    image = frames.permute(1, 2, 0).reshape(1, 1, 15, count)
    theirs = F.interpolate(image, size=(15, window), mode="bilinear", align_corners=False)
    torch.testing.assert_close(ours, theirs.view(5, 3, window).permute(2, 0, 1))


def test_each_clip_reads_its_own_rows_only():
    frames = torch.full((30, 4, 3), float("nan"))
    frames[10:20] = torch.randn(10, 4, 3)
    clips = ops.clip_window(frames, torch.tensor([10, 12]), torch.tensor([10, 0]), window=9)
    assert torch.isfinite(clips).all()
    assert (clips[1] == 0).all()


def test_an_empty_clip_may_point_past_the_end():
    clips = ops.clip_window(torch.randn(5, 4, 3), torch.tensor([0, 5]), torch.tensor([5, 0]), window=3)
    assert clips[0].abs().sum() > 0 and clips[1].abs().sum() == 0


def test_rotation_keeps_bone_lengths_and_strided_inputs_agree():
    frames = torch.randn(40, 6, 3)
    angles = torch.tensor([[0.3, -0.2, 0.1]])
    arguments = torch.tensor([3]), torch.tensor([30])
    still = ops.clip_window(frames, *arguments, window=12)
    turned = ops.clip_window(frames.transpose(0, 1).contiguous().transpose(0, 1), *arguments, angles, window=12)
    torch.testing.assert_close(turned.norm(dim=-1), still.norm(dim=-1))
    torch.testing.assert_close(turned, still @ reference.rotation_matrix(angles[0]).T)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"frames": torch.zeros(9, 4, 2)}, r"frames must be floating \[F,V,3\]"),
        ({"start": torch.zeros(2)}, r"start must be int \[B\], got float32 \[2\]"),
        ({"length": torch.ones(3, dtype=torch.long)}, r"length must be int \[2\]"),
        ({"angles": torch.zeros(2, 2)}, r"angles must be floating \[2, 3\]"),
        ({"window": 0}, "window must be a positive integer"),
        ({"length": torch.tensor([4, 10])}, "inside the 9 frames, got start 0 and length 10 for clip 1"),
        ({"length": torch.tensor([4, -1])}, "inside the 9 frames"),
    ],
)
def test_bad_arguments(change, message):
    arguments = {
        "frames": torch.zeros(9, 4, 3),
        "start": torch.zeros(2, dtype=torch.long),
        "length": torch.full((2,), 4),
    }
    with pytest.raises(ValueError, match=message):
        ops.clip_window(**arguments | change)


def test_opcheck_compile_and_export():
    arguments = torch.randn(20, 4, 3), torch.tensor([0, 5]), torch.tensor([5, 15]), torch.rand(2, 3)
    torch.library.opcheck(torch.ops.jmm_fast.clip_window.default, (*arguments, 8, "reference"))
    eager = ops.clip_window(*arguments, window=8)

    class Window(torch.nn.Module):
        def forward(self, frames, start, length, angles):
            return ops.clip_window(frames, start, length, angles, window=8)

    assert torch.equal(torch.compile(Window(), fullgraph=True)(*arguments), eager)
    assert torch.equal(torch.export.export(Window(), arguments).module()(*arguments), eager)
