"""Integer kernels: every instruction set, thread count and route gives the same bits, those of kernels/integer.py."""

import copy
import dataclasses
import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pennyweight.formats.binary import Binary
from pennyweight.formats.bits import pack, unpack, unpack_rows
from pennyweight.formats.integer import Integer
from pennyweight.formats.running import RunningIntegers
from pennyweight.kernels import _cpu
from pennyweight.kernels.integer import (
    IntegerMatrix,
    arrange_reference,
    codes_reference,
    decode_reference,
    linear_reference,
)

compiled = pytest.mark.skipif(_cpu is None, reason="the compiled kernels are missing")
SETS = _cpu.instruction_sets() if _cpu is not None else []


@pytest.fixture(autouse=True)
def restore():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
    if SETS:
        _cpu.use(SETS[-1])


def running(packed):
    made = packed.for_running()
    assert isinstance(made, RunningIntegers)
    return made.matrix


def error_bound(matrix, x, activation_bits):
    """[n, rows]: half a step of every input times what multiplies it, and the rounding of float32."""
    largest = 127.0 if activation_bits == 8 else max(1.0, min(32639.0, 2147483647.0 / max(matrix.limit, 1.0)) - 1.0)
    scale = torch.ones(matrix.cols) if matrix.column_scale is None else matrix.column_scale
    codes = dataclasses.replace(matrix, minimum=None, column_scale=None, column_offset=None)
    step = (x * scale).abs().amax(1, keepdim=True) / largest
    size = decode_reference(matrix).abs().double() + decode_reference(codes).abs().double() * scale.abs()
    return 0.5001 * step.double() * decode_reference(codes).abs().double().sum(1) + 1e-5 * x.abs().double() @ size.T


weights = st.builds(
    lambda seed, rows, cols, bits, group, symmetric, kind: (seed, rows, cols, bits, group, symmetric, kind),
    st.integers(0, 1000), st.integers(1, 150), st.integers(1, 300), st.integers(1, 10),
    st.sampled_from([0, 8, 16, 64, 296]), st.booleans(), st.sampled_from(["plain", "scaled", "escapes", "binary"]),
)  # fmt: skip


def make(seed, rows, cols, bits, group, symmetric, kind):
    torch.manual_seed(seed)
    weight = torch.randn(rows, cols)
    if kind == "binary":
        return Binary.encode(weight, group)
    if kind == "plain":
        return Integer.encode(weight, bits, group, symmetric)
    codes = (weight * 3).round().clamp(-100, 100).to(torch.int32)
    if kind == "escapes":
        codes[0, 0], codes[-1, -1] = 900, -700
    return Integer.from_codes(
        codes, torch.rand(rows, 1), bits=11, group=0, scale_coding="log8",
        column_scale=torch.rand(cols) + 0.5, column_offset=torch.randn(cols) if symmetric else None,
    )  # fmt: skip


@compiled
@settings(max_examples=60, deadline=None)
@given(weights, st.sampled_from([1, 2, 4, 5, 7, 20, 35]), st.sampled_from([8, 16]))
def test_linear_is_the_product(case, n, activation_bits):
    packed = make(*case)
    made = packed.for_running()
    if not isinstance(made, RunningIntegers):  # too wide a range of codes
        assert case[3] > 8 or (case[-1] == "escapes" and case[1] * case[2] < 128)
        return
    matrix = made.matrix
    assert torch.equal(made.decode(), packed.decode())
    assert torch.equal(decode_reference(matrix), packed.decode())
    x = torch.randn(n, matrix.cols)
    outputs = []
    for name, threads in itertools.product(SETS, (1, 2)):
        _cpu.use(name)
        torch.set_num_threads(threads)
        outputs.append(matrix.linear(x, None, activation_bits))
        assert torch.equal(outputs[-1], outputs[0]), (name, threads)
    exact = x.double() @ packed.decode().double().T
    assert bool(((outputs[0] - exact).abs() <= error_bound(matrix, x, activation_bits) + 1e-6).all())
    # Sums in float64 and in whole numbers agree to the rounding of the result; nothing else differs.
    size = x.abs() @ packed.decode().abs().T + x.abs().sum(1, keepdim=True)
    assert bool(((outputs[0] - linear_reference(matrix, x, activation_bits)).abs() <= 3e-6 * size + 1e-7).all())
    assert bool(((matrix.linear(x, None, 32) - exact).abs() <= 3e-6 * size + 1e-7).all())


@compiled
@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("activation_bits", [8, 16])
def test_one_input_at_a_time_equals_all_at_once(bits, activation_bits):
    """Look-up, bytes in place and panels are three routes to the same bits."""
    matrix = running(Integer.encode(torch.randn(130, 515), bits, 64))
    x = torch.randn(400, 515)
    for name in SETS:
        _cpu.use(name)
        together = matrix.linear(x, None, activation_bits)
        for size in (1, 4, 193):
            parts = [matrix.linear(rows, None, activation_bits) for rows in x.split(size)]
            assert torch.equal(together, torch.cat(parts)), (name, size)


@compiled
def test_extreme_sums_do_not_overflow():
    """All codes and inputs at their ends, with the same signs: the largest sums there can be."""
    for bits, cols in ((8, 4096), (4, 4096), (1, 40000)):
        codes = torch.full((3, cols), (1 << bits) - 1)
        matrix = IntegerMatrix.of(codes, torch.ones(3, 1), 0)
        assert matrix is not None
        for sign in (1.0, -1.0):
            for n in (1, 9):
                y = matrix.linear(torch.full((n, cols), sign))
                torch.testing.assert_close(y, torch.full((n, 3), sign * cols * ((1 << bits) - 1)), rtol=1e-3, atol=0)


@compiled
@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("group", [8, 24, 64, 136, 264, 0])
@pytest.mark.parametrize("factor", [1, 2])
def test_products_of_many_rows_are_exact_at_the_ends(bits, group, factor):
    """Codes and inputs at their ends, which is where sums of 16 bits would saturate, against whole numbers."""
    rows, cols, generator = 70, 301, torch.Generator().manual_seed(bits)
    low, high = (-128, 127) if bits == 8 else (0, (1 << bits) - 1)
    zero = high if factor == 2 else 0
    codes = torch.where(torch.rand(rows, cols, generator=generator) < 0.5, low, high)
    codes[0], codes[1], codes[2, ::2], codes[2, 1::2] = high, low, high, low
    width = group if 0 < group < cols else 304
    matrix = IntegerMatrix.of(codes, torch.ones(rows, -(-cols // width)), group, factor=factor, zero=zero)
    assert matrix is not None and matrix.bits == bits
    for activation_bits in (8, 16):
        most = 127 if activation_bits == 8 else int(min(32639, 2147483647 // matrix.limit))
        x = torch.where(torch.rand(37, cols, generator=generator) < 0.5, -most, most)
        x[0], x[1], x[2, ::2], x[2, 1::2] = most, -most, most, -most
        x[20:, 1:] = torch.randint(-most, most + 1, (17, cols - 1), generator=generator)
        expected = torch.zeros(37, rows)
        for k in range(0, cols, width):  # inputs are whole numbers of which the largest is kept: steps are 1
            weight = factor * codes[:, k : k + width] - zero
            expected += (x[:, k : k + width].double() @ weight.double().T).to(torch.float32)
        for name, n in itertools.product(SETS, (5, 16, 17, 37)):
            _cpu.use(name)
            y = matrix.linear(x[:n].to(torch.float32), None, activation_bits)
            assert torch.equal(y, expected[:n]), (name, n, activation_bits)


@compiled
def test_rows_that_are_not_finite_stay_alone():
    matrix = running(Integer.encode(torch.randn(70, 40), 4, 8))
    for n in (3, 12):
        x = torch.randn(n, 40)
        clean = matrix.linear(x)
        x[0, 3], x[1, 5], x[2] = torch.nan, torch.inf, 0.0
        for activation_bits in (8, 16):
            y = matrix.linear(x, None, activation_bits)
            assert bool(y[:2].isnan().all()) and bool((y[2] == 0).all())
        assert torch.equal(matrix.linear(x)[3:], clean[3:])
        assert bool(matrix.linear(torch.full((n, 40), 1e-38)).isfinite().all())


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 140), st.integers(1, 70), st.sampled_from([1, 2, 3, 4, 8]), st.integers(0, 99))
def test_arrangement(rows, cols, bits, seed):
    torch.manual_seed(seed)
    low, high = (-128, 128) if bits == 8 else (0, 1 << bits)
    codes = torch.randint(low, high, (rows, cols))
    codes[0, 0], codes[-1, -1] = low, high - 1
    if rows * cols == 1:
        return
    matrix = IntegerMatrix.of(codes, torch.ones(rows, 1), 0)
    assert matrix is not None and matrix.bits == bits
    assert torch.equal(codes_reference(matrix), codes.to(torch.int32))
    assert torch.equal(arrange_reference(codes, bits), matrix.codes)
    assert matrix.limit == float(codes.abs().sum(1).max())


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 16), st.integers(1, 40), st.integers(1, 50), st.integers(0, 99))
def test_rows_of_packed_codes(bits, rows, cols, seed):
    torch.manual_seed(seed)
    codes = torch.randint(0, 1 << bits, (rows, cols))
    packed = pack(codes, bits)
    index = torch.randint(-rows, rows, (3, 5))
    found = unpack_rows(packed, bits, cols, index)
    assert found.dtype == unpack(packed, bits, cols).dtype
    assert torch.equal(found.to(torch.int64), codes[index])
    with pytest.raises(IndexError):
        unpack_rows(packed, bits, cols, torch.tensor([rows]))


def test_unsuitable_weights_are_left_alone():
    assert Integer.encode(torch.randn(20, 50), 4, 12).for_running().runs  # groups that are no multiple of 8
    assert not isinstance(Integer.encode(torch.randn(20, 50), 4, 12).for_running(), RunningIntegers)
    assert not isinstance(Integer.encode(torch.randn(64, 64), 12, 0).for_running(), RunningIntegers)
    centroids = Integer.from_codes(torch.zeros(4, 8), torch.ones(4, 1), bits=2, group=0, centroids=torch.rand(4))
    assert not isinstance(centroids.for_running(), RunningIntegers)
    x = torch.randn(3, 8)
    assert torch.equal(centroids.for_running().linear(x), centroids.linear(x))


@compiled
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("lead", [(), (0,), (2, 3)])
def test_shapes_and_dtypes(dtype, lead):
    packed = Integer.encode(torch.randn(33, 20), 3, 0)
    x, bias = torch.randn(*lead, 20).to(dtype), torch.randn(33)
    y = packed.for_running().linear(x, bias)
    assert y.shape == (*lead, 33) and y.dtype == dtype
    expected = x.double() @ packed.decode().double().T + bias.double()
    torch.testing.assert_close(y.double(), expected, rtol=2e-2, atol=2e-2 if dtype != torch.float32 else 1e-3)


@compiled
def test_copies_are_independent_and_equal():
    matrix = running(make(3, 70, 40, 8, 0, True, "escapes"))
    x = torch.randn(5, 40)
    expected = matrix.linear(x)
    twin = copy.deepcopy(matrix)
    matrix.codes.zero_()
    assert torch.equal(twin.linear(x), expected) and not torch.equal(matrix.linear(x), expected)


@compiled
@pytest.mark.parametrize("activation_bits", [8, 16, 32])
def test_gradient_is_that_of_the_decoded_weight(activation_bits):
    packed = make(1, 70, 40, 3, 8, False, "plain")
    matrix, x = running(packed), torch.randn(2, 6, 40, requires_grad=True)
    bias, towards = torch.randn(70, requires_grad=True), torch.randn(2, 6, 70)
    matrix.linear(x, bias, activation_bits).backward(towards)
    assert x.grad is not None and bias.grad is not None
    torch.testing.assert_close(x.grad, towards @ packed.decode(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(bias.grad, towards.sum((0, 1)))


@compiled
def test_operator_passes_torch_checks():
    for case in ((1, 70, 40, 3, 8, False, "plain"), (1, 70, 40, 3, 8, True, "escapes")):
        matrix = running(make(*case))
        x = torch.randn(3, 40, requires_grad=True)
        operator = torch.ops.pennyweight.integer_linear.default
        checks = ("test_schema", "test_autograd_registration", "test_faketensor")
        torch.library.opcheck(operator, (x, *matrix.arguments(), 16), test_utils=checks)


@compiled
def test_compile_and_export():
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(24, 40), torch.nn.ReLU(), torch.nn.Linear(40, 9)).eval()
    from pennyweight.layers.packed import arrange, install

    packed = {f"{i}.weight": Integer.encode(model[i].weight, bits, 8) for i, bits in ((0, 3), (2, 8))}
    install(model, packed, "low")
    arrange(model)
    x = torch.randn(5, 24)
    with torch.no_grad():
        expected = model(x)
        exported = torch.export.export(model, (x,), dynamic_shapes=({0: torch.export.Dim("n")},))
        assert torch.equal(exported.module()(x), expected)
        assert torch.equal(exported.module()(x[:2]), model(x[:2]))
        compiled_model = torch.compile(model, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled_model(x), expected, rtol=0, atol=0)
    assert any("pennyweight.integer_linear" in str(node.target) for node in exported.graph.nodes)


@compiled
def test_malformed_weights_are_refused():
    """Sizes and indices that do not fit are found before anything is read."""
    good = running(make(3, 70, 40, 8, 0, True, "escapes"))
    assert good.escapes is not None and good.escape_start is not None
    start, escapes = good.escape_start, good.escapes
    wrong = {
        "codes": [good.codes[:-1], torch.cat([good.codes, good.codes]), torch.zeros(0, dtype=torch.uint8)],
        "rows": [0, 1, 65, 129, 2**31, 2**40],
        "cols": [0, 1, 48, 2**31, 2**62],
        "bits": [0, 1, 5, 7, 9, 64],
        "group": [0, 4, 12, 8],
        "factor": [0, 3, -1],
        "zero": [10**6, -(10**6)],
        "scale": [good.scale[:1], good.scale[:, :, :63].contiguous(), good.scale.repeat(1, 2, 1)],
        "minimum": [good.scale[:1]],
        "column_scale": [torch.ones(39), torch.ones(0)],
        "column_offset": [torch.ones(41)],
        "escape_start": [start[:-1], start.flip(0).contiguous(), start + 1, start - 1],
        "escapes": [None, escapes[:, :1].contiguous(), escapes[:2].contiguous(), escapes + 64, -escapes - 1],
    }  # fmt: skip
    for name, values in wrong.items():
        for value in values:
            bad = dataclasses.replace(good, **{name: value})
            with pytest.raises((ValueError, TypeError, OverflowError)):
                bad.linear(torch.zeros(1, 40), torch.zeros(70))
    for x, bias in (
        (torch.zeros(1, 39), None),
        (torch.zeros(1, 40), torch.zeros(71)),
        (torch.zeros(1, 40, device="meta"), None),
    ):
        with pytest.raises(ValueError):
            good.linear(x, bias)
    with pytest.raises(ValueError):
        good.native.decode(3, 71, np.zeros((68, 40), np.float32), 1)


@compiled
@settings(max_examples=150, deadline=None)
@given(st.data())
def test_fuzzed_weights_end_in_an_error_or_a_result(data):
    """Random sizes against random buffers: whatever is accepted must run within its buffers (see `make sanitize`)."""

    def small(low, high):
        return data.draw(st.integers(low, high))

    rows, cols, bits, group = small(0, 130), small(0, 40), small(0, 9), small(0, 5) * 8
    blocks, padded = -(-rows // 64), -(-cols // 8) * 8
    exact = blocks * padded * 64 * bits // 8
    size = data.draw(st.sampled_from([exact, exact + 1, max(exact - 1, 0), small(0, 5000)]))
    groups = -(-padded // group) if group else 1
    count = small(0, 4)
    rng = np.random.default_rng(small(0, 99))
    start = np.sort(rng.integers(0, count + 1, blocks + 1)).astype(np.int32)
    if blocks and data.draw(st.booleans()):
        start[0], start[-1] = 0, count
    escapes = rng.integers(-2, 66, (3, count)).astype(np.int32)
    with_escapes = data.draw(st.booleans())
    try:
        weight = _cpu.IntegerWeight(
            rng.integers(0, 256, size).astype(np.uint8), rows, cols, bits, group, small(1, 2), small(-300, 300),
            np.ones((blocks, groups, 64), np.float32), None, None, None,
            start if with_escapes else None, escapes if with_escapes else None, float(small(0, 10**6)),
        )  # fmt: skip
    except ValueError:
        return
    n = small(0, 40)
    y = np.zeros((n, rows), np.float32)
    x = rng.standard_normal((n, cols)).astype(np.float32)
    weight.linear(x.ctypes.data, n, 0, y.ctypes.data, data.draw(st.sampled_from([8, 16])), 2)
    weight.decode(0, rows, np.zeros((rows, cols), np.float32), 2)
    assert np.isfinite(y).all()


@compiled
def test_unknown_instruction_set():
    with pytest.raises(RuntimeError, match=r"sparc.*there is: plain"):
        _cpu.use("sparc")
