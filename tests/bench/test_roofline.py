"""What bounds a case: what it comes to, counted by hand, over the rates that hold for it."""

import pytest
import torch

from jmm_fast.bench import cases
from jmm_fast.bench.case import Case, Work, moved
from jmm_fast.bench.limits import UNITS
from jmm_fast.bench.roofline import CACHED, Bound, bound, rates


def work(text):
    case = Case.parse(text)
    return cases.WORKLOADS[case.op].work(case)


def test_bytes_forward_and_backward():
    assert moved("forward", read=5, written=3, gradients=4) == 8
    assert moved("forward_backward", read=5, written=3, gradients=4) == 8 + 5 + 3 + 4


def test_attention_comes_to():
    scores, one = 8 * 8 * 750**2, 8 * 8 * 750 * 32 * 2
    table, joints = 4 * 8 * 25 * 25, 8 * 750
    forward = work("topology_attention/decoder/bfloat16/forward/cpu")
    assert forward == Work(flop=2 * 2 * scores * 32, bytes=4 * one + table + joints, exps=scores)
    both = work("topology_attention/decoder/bfloat16/forward_backward/sdpa")
    # Five products of the backward pass; q, k, v and the gradient of out in, gradients of q, k, v and the table out.
    assert both.flop == 7 * 2 * scores * 32 and both.exps == 2 * scores
    assert both.bytes == 11 * one + 3 * table + 2 * joints
    own = work("topology_attention/gpu_encoder/bfloat16/forward/auto")
    assert own.bytes == 4 * 1024 * 8 * 74 * 32 * 2 + table + 8 * 1024 * 74


@pytest.mark.parametrize(
    "text, expected",
    [
        # Poses; 74 numbers of tokens; mask, place and probability of 750.
        ("motion_mask/b8/float32/forward/cpu", 8 * (120 * 75 * 4 + 74 * 8 + 750 * (1 + 8 + 4))),
        # Predictions of 676 tokens in bfloat16 and their gradient; poses and mask twice.
        (
            "motion_loss/masked/bfloat16/forward_backward/cpu",
            96 * (3 * 676 * 12 * 2 + 2 * (120 * 75 * 4 + 750)),
        ),
        ("token_grid/gather/float32/forward/cpu", 96 * 74 * (2 * 12 * 4 + 8)),
        (
            "token_grid/scatter/float32/forward_backward/cpu",
            4 * 256 * (3 * (96 * 74 + 1 + 25 + 30) + 2 * 96 * 750) + 2 * 8 * 96 * 750,
        ),
    ],
)
def test_bytes_of_what_memory_bounds(text, expected):
    assert work(text) == Work(bytes=expected)


@pytest.mark.parametrize("op", ["clip_window", "feeder"])
def test_windows_are_written_and_less_than_all_frames_read(op):
    found = work(f"{op}/ntu48/float32/forward/reference").bytes
    windows = 96 * 120 * 75 * 4
    frames = 96 * 120 * 75 * 4
    assert windows < found < windows + frames


def test_a_block_does_the_products_of_its_modules():
    counted = []
    linear = torch.nn.functional.linear

    def counting(x, weight, bias=None):
        counted.append(2 * x.numel() * weight.shape[0])
        return linear(x, weight, bias)

    case = Case.parse("block/encoder/float32/forward/reference")
    size = cases.WORKLOADS["block"].shapes["encoder"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.nn.functional, "linear", counting)
        cases.prepare(case)()
    attention = 2 * 2 * size["bodies"] * size["tokens"] ** 2 * size["width"]
    assert work(str(case)).flop == sum(counted) + attention
    assert work("block/encoder/float32/forward_backward/reference").flop == 3 * (sum(counted) + attention)


LIMITS = {
    "gemm_float32": 100.0,
    "onednn_gemm_float32": 200.0,
    "gemm_bfloat16": 400.0,
    "copy": 20.0,
    "copy_cached": 50.0,
    "exp_float32": 1.0,
    "gpu_gemm_bfloat16": 800e3,
    "gpu_copy": 4e3,
    "gpu_exp_float32": 4e3,
}


def test_what_bounds_it():
    single, half = (Case("topology_attention", "decoder", dtype, "forward", "cpu") for dtype in ("float32", "bfloat16"))
    products = Work(flop=8e9, bytes=1e8, exps=1e9)
    # Exponentials are no limit of a CPU.
    assert bound(single, products, "cpu", LIMITS) == Bound(0.04, "products")
    assert bound(half, products, "cpu", LIMITS) == Bound(0.02, "products")
    assert bound(half, products, "cuda", LIMITS) == Bound(2.5e-4, "exponentials")
    assert bound(half, Work(bytes=1e9), "cpu", LIMITS) == Bound(0.05, "memory")
    assert bound(half, Work(bytes=CACHED), "cpu", LIMITS) == Bound(CACHED / 50e9, "memory")
    # What was not measured bounds nothing.
    assert bound(single, Work(flop=1e9), "cuda", LIMITS) is None
    assert bound(single, Work(), "cpu", LIMITS) is None


def test_rates_are_limits_that_there_are():
    for case in cases.all_cases():
        found = cases.WORKLOADS[case.op].work(case)
        named = rates(case, found, cases.device(case)).values()
        assert {name for names in named for name in names} <= UNITS.keys()
        assert found.flop or found.bytes
