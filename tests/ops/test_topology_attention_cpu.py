"""The C++ kernel of topology attention against the formula in float64, for every instruction set of this machine."""

import os
import subprocess
import sys

import pytest
import torch

from jmm_fast import ops
from jmm_fast.bench.parity import results

native = pytest.importorskip("jmm_fast._C", reason="the C++ extension is not built", exc_type=ImportError)

EPS = torch.finfo(torch.float32).eps
MULTIPLIES_BFLOAT16 = {"avx512bf16"}


@pytest.fixture(params=native.isas())
def isa(request):
    before = native.isa()
    native.set_isa(request.param)
    yield request.param
    native.set_isa(before)


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def poison():
    """Every tensor that torch leaves uninitialised is full of NaN: an element the kernel forgets is seen."""
    torch.use_deterministic_algorithms(True)
    assert torch.empty(1).isnan()
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def check(attention_parity):
    def check(q, k, v, table, joints, mode="add", scale=None, grad=None):
        def ours(*x):
            return ops.topology_attention(*x, joints, mode=mode or "add", scale=scale, backend="cpu")

        return attention_parity(ours, q, k, v, table, joints, mode, scale, grad)

    return check


def problem(length, *, dim=32, bodies=2, heads=4, joints=25, joints_of="grid", mode="add", dtype=torch.float32):
    q, k, v = (torch.randn(bodies, heads, length, dim, dtype=dtype) for _ in range(3))
    if mode is None:
        return q, k, v, None, None
    table = torch.randn(heads, joints, joints) + (1 if mode == "scale" else 0)
    token_joints = torch.randint(0, joints, (bodies, length)) if joints_of == "body" else torch.arange(length) % joints
    return q, k, v, table, token_joints


@pytest.fixture(params=[torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def dtype(request):
    return request.param


@pytest.mark.parametrize("mode", ["add", "scale", None])
@pytest.mark.parametrize("length", [1, 63, 74, 75, 127, 250, 375, 750])
def test_parity_over_lengths(check, isa, dtype, length, mode):
    bodies, heads = (2, 4) if length < 200 else (1, 2)
    joints_of = "body" if length in (1, 74, 127, 375) else "grid"
    inputs = problem(length, bodies=bodies, heads=heads, joints_of=joints_of, mode=mode, dtype=dtype)
    check(*inputs, mode=mode or "add")


@pytest.mark.parametrize("dim", [1, 3, 8, 16, 20, 33, 64, 128])
def test_parity_over_head_widths(check, isa, dtype, dim):
    check(*problem(77, dim=dim, joints_of="body", dtype=dtype))


@pytest.mark.parametrize("rows", range(1, 60, 7))
def test_every_tail_of_the_tiles(check, isa, dtype, rows):
    check(*problem(rows, dim=12, dtype=dtype))


@pytest.mark.parametrize("joints", [1, 2, 15, 16, 17, 31, 32, 33, 60])
def test_any_number_of_joints(check, isa, joints):
    check(*problem(70, dim=8, joints=joints, joints_of="body"))
    check(*problem(70, dim=8, joints=joints, mode="scale"), mode="scale")


def test_packed_and_repeated_inputs(check, isa, dtype):
    packed = torch.randn(2, 75, 3, 4, 32, dtype=dtype)
    q, k, v = packed.permute(2, 0, 3, 1, 4)
    _, _, _, table, joints = problem(75)
    check(q, k, v, table, joints, grad=torch.randn(2, 1, 1, 32, dtype=dtype).expand_as(q))
    check(q[:1].expand_as(q), k[:, :1].expand_as(k), v[..., :1].expand_as(v), table[:1].expand_as(table), joints)
    check(
        q.transpose(2, 3).contiguous().transpose(2, 3),
        k.flip(2),
        v,
        table.transpose(1, 2),
        joints.repeat_interleave(2)[::2],
    )


def test_nothing_outside_the_inputs_is_read(check, isa, dtype):
    def ringed(x):
        ring = torch.full([n + 2 for n in x.shape], float("nan"), dtype=x.dtype)
        inner = ring[tuple(slice(1, -1) for _ in x.shape)]
        return inner.copy_(x)

    q, k, v, table, joints = problem(63, dim=20, dtype=dtype)
    around = torch.full((65,), -(2**40))
    around[1:-1] = joints
    grad_out = ringed(torch.randn_like(q))
    q, k, v, table = map(ringed, (q, k, v, table))
    check(q, k, v, table, around[1:-1], grad=grad_out)


def test_nothing_is_left_from_the_call_before(check, isa, dtype):
    q, k, v, table, joints = problem(100, dtype=dtype)
    clean = check(q, k, v, table, joints, grad=torch.ones_like(q))
    bad = torch.full((2, 4, 640, 64), float("nan"), dtype=dtype)
    out = ops.topology_attention(bad.requires_grad_(), bad, bad, backend="cpu")
    assert out.isnan().all()
    out.sum().backward()
    again = check(q, k, v, table, joints, grad=torch.ones_like(q))
    assert all(torch.equal(a, b) for a, b in zip(clean, again, strict=True))


def test_a_maximum_that_keeps_rising_over_the_key_blocks(check, isa, dtype):
    q, k, v, table, joints = problem(900, bodies=1, heads=1, dtype=dtype)
    k = k + torch.linspace(0, 3, 900, dtype=dtype)[:, None] * q.mean(2, keepdim=True).sign()
    check(q + 2 * q.mean(2, keepdim=True).sign(), k, v, table, joints)


@pytest.mark.parametrize("mode", ["add", "scale"])
def test_scores_far_below_their_bound(check, isa, dtype, mode):
    """Keys point away from the queries: no score comes near |q| |k|, and the rows need their true maxima."""
    q, k, v, table, joints = problem(100, dtype=dtype)
    k = -2.5 * q.flip(2) + 0.25 * k
    q = 2.5 * q.mean(2, keepdim=True) + 0.1 * q
    check(4 * q, k - 4 * q, v, table, joints, mode=mode)


@pytest.mark.parametrize("length", [2, 20])
def test_softmax_with_nearly_all_weight_on_one_key(check, isa, length):
    q, k, v, table, joints = problem(length)
    k = torch.cat([k[:, :, :2] + 3 * q.mean(2, keepdim=True), k[:, :, 2:]], dim=2)
    for sharpness in (0.5, 1.0, 3.0):
        check(sharpness * q, k, v, table, joints)


def test_pairs_that_are_shut_out_get_no_weight(isa, attention_formula):
    q, k, v, table, joints = problem(750, bodies=1)
    table[:, :, 3] = float("-inf")
    # A whole key block can be shut out for a query: the first block must not leave a trace in the running sums.
    joints = torch.where(torch.arange(750) < 400, 3, joints)
    out = ops.topology_attention(q, k, v, table, joints, backend="cpu")
    keep = joints != 3
    expected = attention_formula(q, k, v, table, joints)
    torch.testing.assert_close(out, expected)
    changed = ops.topology_attention(q, k, torch.where(keep[:, None], v, 1e6), table, joints, backend="cpu")
    assert torch.equal(out, changed)


def test_large_scores_do_not_overflow(isa, attention_formula):
    q, k, v, table, joints = problem(75)
    q, k = q * 40, k * 40
    out = ops.topology_attention(q, k, v, table * 100, joints, backend="cpu")
    expected = attention_formula(*(x.double() for x in (q, k, v)), table.double() * 100, joints)
    # A rounding of the score is a relative error of the weight, so scores of thousands cost digits in any float32.
    largest = 32**-0.5 * torch.einsum("bhid,bhjd->bhij", q, k).abs().max() + 100 * table.abs().max()
    assert (out - expected).abs().max() <= EPS * largest * v.abs().max()


def test_one_key_has_no_gradient_but_for_its_value(check, isa, dtype):
    q, k, v, table, joints = problem(1, dtype=dtype)
    grad_out = torch.randn_like(q)
    out, dq, dk, dv, dtable = check(q, k, v, table, joints, grad=grad_out)
    assert torch.equal(out, v) and torch.equal(dv, grad_out)
    assert not dq.any() and not dk.any() and not dtable.any()


@pytest.mark.parametrize("joints_of", ["body", "grid"])
def test_results_do_not_depend_on_the_number_of_threads(isa, dtype, threads, joints_of):
    q, k, v, table, joints = problem(130, bodies=35, heads=3, joints_of=joints_of, dtype=dtype)
    grad_out = torch.randn_like(q)

    def run(count):
        threads(count)
        return results(lambda *x: ops.topology_attention(*x, joints, backend="cpu"), (q, k, v, table), grad_out)

    first = run(1)
    for count in (1, 2, 3, 8):
        assert all(torch.equal(a, b) for a, b in zip(first, run(count), strict=True)), f"{count} threads"


def test_layout_of_the_results(isa):
    q, k, v, table, joints = problem(50, bodies=3)
    out = ops.topology_attention(q, k, v, table, joints, backend="cpu")
    joined = out.transpose(1, 2).reshape(3, 50, -1)
    assert joined.data_ptr() == out.data_ptr()


def test_empty_batches_and_lengths(isa):
    for shape in ((0, 2, 5, 8), (2, 2, 0, 8)):
        q = torch.randn(shape, requires_grad=True)
        table = torch.randn(2, 4, 4, requires_grad=True)
        out = ops.topology_attention(q, q, q, table, torch.zeros(shape[2], dtype=torch.int64), backend="cpu")
        out.sum().backward()
        assert out.shape == shape and q.grad.shape == shape
        assert torch.equal(table.grad, torch.zeros(2, 4, 4))


def test_bfloat16_inputs_are_computed_in_float32_where_nothing_multiplies_them(isa):
    if isa in MULTIPLIES_BFLOAT16:
        pytest.skip(f"{isa} multiplies bfloat16")
    q, k, v, table, joints = problem(127)
    halves = [x.bfloat16() for x in (q, k, v, torch.randn_like(q))]
    forward = torch.ops.jmm_fast.topology_attention_forward
    backward = torch.ops.jmm_fast.topology_attention_backward

    def both(tensors):
        *inputs, grad_out = tensors
        out, statistics = forward(*inputs, table, joints, False, 0.2)
        # The rounded output on both sides: the backward pass gets what the forward pass gave.
        out = out.bfloat16().to(grad_out.dtype)
        return [out, *backward(grad_out, *inputs, table, joints, out, statistics, False, 0.2)]

    ours, expected = both(halves), both([x.float() for x in halves])
    assert [x.dtype for x in ours] == [torch.bfloat16] * 4 + [torch.float32]
    assert all(torch.equal(a.float(), b.to(a.dtype).float()) for a, b in zip(ours, expected, strict=True))


def test_the_operator_refuses_what_would_read_other_memory():
    q, k, v, table, joints = problem(10)
    forward = torch.ops.jmm_fast.topology_attention_forward
    for arguments, message in (
        ((q, k[:, :, :9], v, None, None), "k must have q's shape"),
        ((q, k, v, table[:1], joints), r"table must be a float32 CPU tensor \[H,V,V\]"),
        ((q, k, v, table, joints[:9]), r"joints must be an int64 CPU tensor \[N\] or \[B,N\]"),
        ((q, k, v, table, joints + 20), r"joints must be in \[0, 25\), got 25"),
        ((q, k, v, table, joints - 1), r"joints must be in \[0, 25\), got -1"),
        ((q.double(), k.double(), v.double(), None, None), "q must be float32 or bfloat16"),
    ):
        with pytest.raises(RuntimeError, match=message):
            forward(*arguments, False, 1.0)


def test_memory_does_not_grow_with_the_square_of_the_length():
    code = """
import resource, torch
from jmm_fast import ops
q = torch.randn(1, 4, 4000, 16, requires_grad=True)
table, joints = torch.randn(4, 25, 25), torch.arange(4000) % 25
ops.topology_attention(q[:, :, :50], q[:, :, :50], q[:, :, :50], table, joints[:50], backend="cpu").sum().backward()
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
ops.topology_attention(q, q, q, table, joints, backend="cpu").sum().backward()
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
"""
    environment = {**os.environ, "OMP_NUM_THREADS": "2"}
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    assert int(result.stdout) < 60, "one head's scores alone would be 61 MiB"


def test_the_environment_chooses_the_instruction_set():
    code = "import torch, jmm_fast._C as native; print(native.isa())"

    def run(name):
        environment = {**os.environ, "JMM_FAST_ISA": name}
        return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)

    assert run("baseline").stdout.strip() == "baseline"
    unknown = run("mmx")
    assert unknown.returncode != 0 and "instruction set must be one of baseline" in unknown.stderr
    with pytest.raises(ValueError, match="got mmx"):
        native.set_isa("mmx")
