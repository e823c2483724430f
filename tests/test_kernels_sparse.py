"""Products with sparse weights: to the bit their reference, on every instruction set, for any threads and any batch."""

import copy
import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pennyweight import kernels
from pennyweight.formats import Sparse
from pennyweight.kernels import _cpu, sparse  # pyright: ignore[reportAttributeAccessIssue]
from pennyweight.kernels.sparse import BLOCK, SparseMatrix, linear_reference

needs_compiled = pytest.mark.skipif(_cpu is None, reason="the kernels are not compiled")
ISAS = _cpu.instruction_sets() if _cpu else []
KINDS = (torch.float32, torch.float16, torch.int8)


@pytest.fixture(autouse=True)
def best_instruction_set():
    yield
    if ISAS:
        _cpu.use(ISAS[-1])


def made(rows: int, cols: int, density: float, kind: torch.dtype, seed: int):
    """(arranged, dense float32). Rows are of very different density, values reach to the ends of their type."""
    g = torch.Generator().manual_seed(seed)
    mask = torch.rand(rows, cols, generator=g) < density * 2 * torch.rand(rows, 1, generator=g)
    values = 30 * torch.randn(int(mask.sum()), generator=g)
    values[::3] *= 1e-7  # subnormal in float16
    values = values.clamp(-127, 127).to(kind)
    scale = torch.rand(rows, generator=g) if seed % 2 or kind == torch.int8 else None
    matrix = SparseMatrix.of(mask, values, scale)
    assert matrix is not None
    dense = torch.zeros(rows, cols)
    dense[mask] = values.float()
    return matrix, dense if scale is None else dense * scale[:, None]


@pytest.mark.parametrize("isa", ISAS or ["reference"])
@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    rows=st.one_of(st.sampled_from([0, 1, 63, 64, 65]), st.integers(0, 200)),
    cols=st.one_of(st.sampled_from([0, 1, 2]), st.integers(0, 300)),
    inputs=st.one_of(st.sampled_from([0, 1, 2, 8, 16, 17, 33, 64, 65]), st.integers(0, 140)),
    density=st.sampled_from([0.0, 0.03, 0.2, 1.0]),
    kind=st.sampled_from(KINDS),
    with_bias=st.booleans(),
    seed=st.integers(0, 10**6),
)
def test_product(isa, rows, cols, inputs, density, kind, with_bias, seed):
    if _cpu:
        _cpu.use(isa)
    matrix, dense = made(rows, cols, density, kind, seed)
    assert torch.equal(matrix.decode(), dense)
    g = torch.Generator().manual_seed(seed + 1)
    x, bias = torch.randn(inputs, cols, generator=g), torch.randn(rows, generator=g) if with_bias else None
    y = matrix.linear(x, bias)
    assert torch.equal(y, linear_reference(matrix, x, bias))
    exact = x.double() @ dense.double().T
    slack = 2.0**-23 * (cols + 4) * (x.double().abs() @ dense.double().abs().T)
    if bias is not None:
        exact += bias
        slack += 2.0**-23 * (bias.abs() + exact.abs())
    assert bool(((y - exact).abs() <= slack + 1e-30).all())


@needs_compiled
@pytest.mark.parametrize("isa", ISAS)
def test_same_bits_whatever_the_threads_and_the_batch(isa):
    _cpu.use(isa)
    threads = torch.get_num_threads()
    for kind in KINDS:
        matrix, _ = made(300, 500, 0.2, kind, 1)
        x = torch.randn(150, 500, generator=torch.Generator().manual_seed(0))
        try:
            torch.set_num_threads(1)
            expected = matrix.linear(x)
            torch.set_num_threads(3)
            assert torch.equal(matrix.linear(x), expected)
        finally:
            torch.set_num_threads(threads)
        for size in (1, 2, 7, 64):
            assert torch.equal(torch.cat([matrix.linear(rows) for rows in x.split(size)]), expected)
        assert torch.equal(matrix.linear(x.T.contiguous().T), expected)


@needs_compiled
def test_every_half_is_read_exactly():
    halves = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(torch.float16)
    halves = halves[halves.isfinite()]
    cols = 8
    mask = torch.ones(len(halves) // cols, cols).bool()
    for isa in ISAS:
        _cpu.use(isa)
        matrix = SparseMatrix.of(mask, halves)
        assert matrix is not None
        for x in (torch.eye(cols), torch.eye(cols)[:1]):
            assert torch.equal(matrix.linear(x), halves.float().view(-1, cols).T[: len(x)])


def test_what_is_not_finite_stays_where_it_multiplies():
    matrix, dense = made(100, 40, 0.2, torch.float32, 3)
    for n in (1, 5):
        x = torch.randn(n, 40)
        x[:, 7] = 0
        expected = matrix.linear(x)
        for broken in (torch.nan, torch.inf):
            x[:, 7] = broken
            reached = dense[:, 7] != 0
            y = matrix.linear(x)
            assert not bool(y[:, reached].isfinite().any())
            assert torch.equal(y[:, ~reached], expected[:, ~reached])


def test_as_stored_and_small():
    weight = torch.randn(256, 512, generator=torch.Generator().manual_seed(0))
    mask = weight.abs() > 1.645  # a tenth
    for bits, most in ((16, 4), (8, 3), (3, 3)):
        packed = Sparse.encode(weight, mask, bits)
        running = packed.for_running()
        assert torch.equal(running.decode(), packed.decode())
        matrix = running.matrix  # type: ignore[attr-defined]
        assert matrix.nbytes < 1.1 * most * int(mask.sum()) + 256 * 8 + 100  # a sixteen-bit column and the value
        assert torch.equal(copy.deepcopy(running).decode(), packed.decode())
    wide = torch.zeros(1, 1 << 16)
    assert Sparse.encode(wide, wide.bool()).for_running().linear(wide).shape == (1, 1)  # decoded: columns need 17 bits


def test_gradients_and_operator():
    matrix, dense = made(70, 90, 0.1, torch.float16, 2)
    x = torch.randn(2, 5, 90, requires_grad=True)
    bias = torch.randn(70, requires_grad=True)
    gradient = torch.randn(2, 5, 70)
    matrix.linear(x, bias).backward(gradient)
    torch.testing.assert_close(x.grad, gradient @ dense, rtol=1e-5, atol=1e-4)
    assert bias.grad is not None
    torch.testing.assert_close(bias.grad, gradient.sum((0, 1)))
    assert torch.equal(matrix.linear(x, bias), matrix.linear(x.detach(), bias.detach()))
    assert matrix.linear(x.detach(), bias).requires_grad
    arguments = (torch.randn(3, 90, requires_grad=True), *matrix._arguments())
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(torch.ops.pennyweight.sparse_linear, arguments, test_utils=checks)
    assert matrix.linear(x.bfloat16()).dtype == torch.bfloat16


def test_compiles_and_exports():
    running = Sparse.encode(torch.randn(40, 30), torch.rand(40, 30) < 0.2).for_running()
    net = torch.nn.Module()
    net.forward = lambda x: running.linear(x).relu()  # type: ignore[method-assign]
    x = torch.randn(4, 30)
    assert torch.equal(torch.compile(net, fullgraph=True, backend="aot_eager")(x), net(x))
    assert torch.equal(torch.export.export(net, (x,), strict=False).module()(x), net(x))


def test_without_the_compiled_module(monkeypatch):
    matrix, _ = made(70, 50, 0.3, torch.int8, 1)
    x, bias = torch.randn(6, 50), torch.randn(70)
    expected = matrix.linear(x, bias)
    monkeypatch.setattr(sparse, "_cpu", None)
    monkeypatch.setattr(kernels, "_told", True)
    assert torch.equal(matrix.linear(x, bias), expected)


@needs_compiled
def test_damage_is_refused():
    matrix, _ = made(130, 50, 0.3, torch.float32, 1)
    arguments = {
        "column": matrix.column.numpy().view(np.uint16).copy(),
        "floats": matrix.values.numpy(),
        "halves": None,
        "bytes": None,
        "start": matrix.start.numpy(),
        "order": matrix.order.numpy(),
        "scale": np.ones(130, np.float32),
        "cols": 50,
    }
    weight = _cpu.SparseWeight(**arguments)
    beyond, falling, twice, outside = (arguments[k].copy() for k in ("column", "start", "order", "order"))
    beyond[5], falling[1], twice[0], outside[3] = 51, falling[2] + 1, twice[1], 130
    for change in (
        {"column": beyond},
        {"column": arguments["column"][:-BLOCK]},
        {"floats": None},
        {"halves": np.zeros(len(beyond), np.uint16)},
        {"floats": None, "bytes": np.zeros(1, np.int8)},
        {"start": falling},
        {"start": arguments["start"][:-1]},
        {"start": arguments["start"] + 1},
        {"order": twice},
        {"order": outside},
        {"order": arguments["order"][:-1]},
        {"order": -arguments["order"]},
        {"scale": np.ones(129, np.float32)},
        {"cols": 1 << 16},
    ):
        with pytest.raises(ValueError, match="sparse weight"):
            _cpu.SparseWeight(**(arguments | change))
    x, y = np.zeros((2, 50), np.float32), np.zeros((2, 130), np.float32)
    for wrong in ((x[:, :49].copy(), None, y), (x, None, y[:1]), (x, np.zeros(3, np.float32), y)):
        with pytest.raises(ValueError, match="shapes"):
            weight.linear(*wrong, 1)


DAMAGED = made(130, 50, 0.3, torch.float16, 1)[0]


@needs_compiled
@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.sampled_from(["column", "start", "order"]), st.integers(0, 10**6), st.integers(-(2**15), 2**15 - 1))
def test_a_changed_index_is_refused_or_harmless(field, place, value):
    matrix = copy.deepcopy(DAMAGED)
    values = getattr(matrix, field)
    values[place % len(values)] = value
    try:
        native = matrix.native
    except ValueError:
        return
    native.linear(np.ones((3, 50), np.float32), None, np.empty((3, 130), np.float32), 1)


def test_weights_that_share_their_columns_are_told_apart():
    mask = torch.eye(8, dtype=torch.bool)
    one = SparseMatrix.of(mask, torch.ones(8))
    assert one is not None
    two = dataclasses.replace(one, values=one.values * 2)
    x = torch.ones(1, 8, requires_grad=True)  # so that the operators run
    assert torch.equal(one.linear(x), torch.ones(1, 8))
    assert torch.equal(two.linear(x), torch.full((1, 8), 2.0))
    (towards_x,) = torch.autograd.grad(two.linear(x).sum(), x)
    assert torch.equal(towards_x, torch.full((1, 8), 2.0))
