import pytest
import torch

from jmm_fast import ops


def grid_inputs(dtype=torch.float32):
    clips = torch.randn(2, 8, 5, 3, dtype=dtype)
    drawn = ops.motion_mask(clips, mask_ratio=0.6)
    tokens = torch.randn(2, drawn.visible.shape[1], 6, dtype=dtype)
    return clips, drawn, tokens, [torch.randn(*shape, dtype=dtype) for shape in ((6,), (5, 6), (2, 6))]


def test_gather_takes_the_patch_of_each_visible_token():
    clips, drawn, _, _ = grid_inputs()
    patches = ops.token_grid_gather(clips, drawn.visible)
    for body in range(2):
        for place, token in enumerate(drawn.visible[body].tolist()):
            step, joint = divmod(token, 5)
            assert torch.equal(patches[body, place], clips[body, 4 * step : 4 * step + 4, joint].flatten())


def test_scatter_is_the_formula():
    _, drawn, tokens, (mask_token, joint, time) = grid_inputs()
    grid = ops.token_grid_scatter(tokens, drawn.restore, mask_token, joint, time)
    for body in range(2):
        place = 0
        for token in range(10):
            inner = mask_token if drawn.mask[body, token] else tokens[body, place]
            place += int(not drawn.mask[body, token])
            torch.testing.assert_close(grid[body, token], inner + joint[token % 5] + time[token // 5])


def test_gradients():
    clips, drawn, tokens, others = grid_inputs(torch.float64)
    clips.requires_grad_()
    assert torch.autograd.gradcheck(lambda c: ops.token_grid_gather(c, drawn.visible), (clips,))
    inputs = [x.requires_grad_() for x in (tokens, *others)]
    assert torch.autograd.gradcheck(lambda t, *rest: ops.token_grid_scatter(t, drawn.restore, *rest), inputs)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"restore": torch.zeros(2, 10)}, r"restore must be int64 \[2,L\] with L >= 4"),
        ({"mask_token": torch.zeros(5)}, "mask_token must be of width 6"),
        ({"time_embedding": torch.zeros(3, 6)}, r"T' \* 5 joints = 10 tokens"),
    ],
)
def test_bad_arguments(change, message):
    _, drawn, tokens, (mask_token, joint, time) = grid_inputs()
    arguments = {
        "tokens": tokens,
        "restore": drawn.restore,
        "mask_token": mask_token,
        "joint_embedding": joint,
        "time_embedding": time,
    }
    with pytest.raises(ValueError, match=message):
        ops.token_grid_scatter(**arguments | change)
    with pytest.raises(ValueError, match=r"visible must be int64 \[B,K\], got float32 \[2, 3\]"):
        ops.token_grid_gather(torch.zeros(2, 8, 5, 3), torch.zeros(2, 3))


def test_opcheck_compile_and_export():
    clips, drawn, tokens, others = grid_inputs()
    gather = (clips.requires_grad_(), drawn.visible, 4)
    scatter = (tokens.requires_grad_(), drawn.restore, *(x.requires_grad_() for x in others))
    torch.library.opcheck(torch.ops.jmm_fast.token_grid_gather.default, gather)
    torch.library.opcheck(torch.ops.jmm_fast.token_grid_scatter.default, scatter)

    class Both(torch.nn.Module):
        def forward(self, clips, visible, tokens, restore, mask_token, joint, time):
            patches = ops.token_grid_gather(clips, visible)
            return patches, ops.token_grid_scatter(tokens, restore, mask_token, joint, time)

    arguments = (clips, drawn.visible, *scatter)
    eager = Both()(*arguments)
    compiled = torch.compile(Both(), fullgraph=True)(*arguments)
    exported = torch.export.export(Both(), arguments).module()(*arguments)
    for result in (compiled, exported):
        for a, b in zip(result, eager, strict=True):
            torch.testing.assert_close(a, b)
    sum(x.square().sum() for x in compiled).backward()
    assert all(x.grad is not None for x in (clips, tokens, *others))
