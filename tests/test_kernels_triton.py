"""The Triton kernels: against float64 over shapes, dtypes and groups, their arrangement, errors and compilation.

Where there is no GPU they run in Triton's interpreter, which has to be chosen before Triton is imported: so one test
runs this file again in a process of its own.
"""

from __future__ import annotations

import importlib.util
import inspect
import os
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pennyweight.errors import DataError, MissingExtraError, WeightError
from pennyweight.formats import Binary, Dense16, Integer, Sparse
from pennyweight.formats.running import RunningIntegers
from pennyweight.kernels.gpu import (
    GpuIntegers,
    launch,
    pack_signs,
    pack_signs_reference,
    twins,
    xnor_product,
    xnor_product_reference,
)
from pennyweight.kernels.integer import IntegerMatrix

INSTALLED = importlib.util.find_spec("triton") is not None
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
needs_triton = pytest.mark.skipif(not INSTALLED, reason="Triton is not installed (pip install 'pennyweight[gpu]')")
runs = pytest.mark.skipif(
    not INSTALLED or not (INTERPRETED or torch.cuda.is_available()),
    reason="no GPU; with Triton installed, test_in_the_interpreter runs this one",
)
once = pytest.mark.skipif(INTERPRETED, reason="for outside the interpreter")
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
SIZES = st.one_of(st.sampled_from((0, 1, 2, 31, 32, 33)), st.integers(0, 70))


@needs_triton
@once
def test_in_the_interpreter():
    triton, numpy = (tuple(map(int, metadata.version(name).split(".")[:2])) for name in ("triton", "numpy"))
    if triton < (3, 9) and numpy >= (2, 4):
        pytest.skip("the interpreters of Triton before 3.9 were not made for NumPy 2.4")
    outcome = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", __file__],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert outcome.returncode == 0, outcome.stdout[-5000:] + outcome.stderr[-2000:]
    assert " passed" in outcome.stdout


def packed_weight(kind: str, rows: int, cols: int, bits: int, group: int, seed: int, size: float = 1.0):
    """A weight of that kind in its stored format. kind: binary, or what an int weight has beyond symmetric scales."""
    g = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, cols, generator=g) * size
    if kind == "binary":
        return Binary.encode(weight, group)
    if kind in ("symmetric", "asymmetric"):
        return Integer.encode(weight, bits, group, symmetric=kind == "symmetric")
    groups = -(-cols // group) if group else min(cols, 1)
    scale = torch.rand(rows, groups, generator=g) * size
    column = torch.rand(cols, generator=g)
    codes = torch.randint(0, 1 << bits, (rows, cols), generator=g)
    if kind == "all":
        return Integer.from_codes(
            codes, scale, -scale, bits=bits, group=group, column_offset=-column * size, column_scale=0.5 + column
        )
    symmetric = {"codes": codes - (1 << bits - 1), "bits": bits, "group": group, "scale_coding": "log8"}
    if kind == "columns":
        return Integer.from_codes(scale=scale, column_scale=0.5 + column, **symmetric)
    assert kind == "centroids"
    return Integer.from_codes(scale=scale, centroids=torch.randn(1 << bits, generator=g), **symmetric)


KINDS = ("binary", "symmetric", "asymmetric", "all", "columns", "centroids")


def check_product(weight: GpuIntegers, values: Tensor, x: Tensor, bias: Tensor | None) -> None:
    """Against float64.

    Sums of float32 err by at most cols + some roundings of 2^-24 of what is summed, which magnitude bounds; the result
    is rounded to x's dtype, and with many rows the weight is as well (float16 holds magnitude * 2^-25 beside that).
    """
    out = weight.linear(x.to(DEVICE), None if bias is None else bias.to(DEVICE)).cpu()
    assert out.dtype == x.dtype and out.shape == (*x.shape[:-1], values.shape[0])
    exact = x.double() @ values.double().T
    size = x.double().abs().sum(-1, keepdim=True)
    slack = 2.0**-24 * 4 * (weight.cols + 16) * weight.magnitude * size
    if x.shape[:-1].numel() > launch.FEW_ROWS and x.dtype != torch.float32:
        slack = slack + torch.finfo(x.dtype).eps * (x.double().abs() @ values.double().abs().T)
        slack = slack + 2.0**-24 * weight.magnitude * size
    if bias is not None:
        exact = exact + bias.double()
    slack = slack + torch.finfo(x.dtype).eps * exact.abs() + torch.finfo(x.dtype).smallest_normal
    assert bool(((out.double() - exact).abs() <= slack).all())


@once
@given(
    st.sampled_from(KINDS),
    SIZES,
    SIZES,
    st.integers(1, 8),
    st.sampled_from((0, 8, 24, 32, 64, 200)),
    st.integers(0, 1000),
    st.sampled_from((1e-6, 0.1, 1e4)),
)
@settings(max_examples=100, deadline=None)
def test_arranging_changes_no_value(kind, rows, cols, bits, group, seed, size):
    packed = packed_weight(kind, rows, cols, bits, group, seed, size)
    weight = GpuIntegers.from_format(packed)
    values = packed.decode()
    assert weight.shape == packed.shape
    assert torch.equal(weight.decode(), values)
    assert not values.numel() or float(values.abs().max()) <= weight.magnitude


@runs
@given(
    st.sampled_from(KINDS),
    SIZES,
    SIZES,
    st.sampled_from((0, 1, 2, 3, 8, 9, 17)),
    st.sampled_from((1, 2, 3, 4, 4, 5, 6, 8)),
    st.sampled_from((0, 8, 24, 32, 64)),
    st.sampled_from(DTYPES),
    st.booleans(),
    st.integers(0, 1000),
)
@settings(max_examples=40, deadline=None)
def test_linear_is_the_product(kind, rows, cols, x_rows, bits, group, dtype, with_bias, seed):
    packed = packed_weight(kind, rows, cols, bits, group, seed)
    g = torch.Generator().manual_seed(seed + 1)
    x = torch.randn(x_rows, cols, generator=g).to(dtype)
    bias = torch.randn(rows, generator=g) if with_bias else None
    check_product(GpuIntegers.from_format(packed).to(DEVICE), packed.decode(), x, bias)


@runs
@pytest.mark.parametrize("programs", [1, 1024], ids=["one split", "many splits"])
@pytest.mark.parametrize(("bits", "x_rows"), [(1, 1), (3, 2), (8, 4), (1, 11), (3, 11), (4, 11)])
def test_long_rows_in_several_steps(bits, x_rows, programs, monkeypatch):
    monkeypatch.setattr(launch, "FEW_PROGRAMS", programs)
    monkeypatch.setattr(launch, "MANY_PROGRAMS", programs)
    monkeypatch.setattr(launch, "FEW_UNITS", 16)
    monkeypatch.setattr(launch, "MANY_UNITS", 16)
    packed = packed_weight("all", 3, 32 * 16 * 3 // bits + 5, bits, 64, bits)
    x = torch.randn(x_rows, packed.shape[1], generator=torch.Generator().manual_seed(0))
    check_product(GpuIntegers.from_format(packed).to(DEVICE), packed.decode(), x, torch.ones(3))


@runs
@pytest.mark.parametrize("x_rows", [2, 20])
@pytest.mark.parametrize("group", [0, 8, 64])
def test_stacked_is_the_sum_of_its_planes(x_rows, group):
    planes = [packed_weight("binary", 9, 150, 1, group, seed, 0.1**seed) for seed in range(3)]
    weight = GpuIntegers.from_planes(planes).to(DEVICE)
    values = planes[0].decode() + planes[1].decode() + planes[2].decode()
    assert torch.equal(weight.decode().cpu(), values)
    check_product(weight, values, torch.randn(x_rows, 150, generator=torch.Generator().manual_seed(0)), None)


@runs
@pytest.mark.parametrize("size", [1e-6, 1e5])
@pytest.mark.parametrize("x_rows", [1, 10])
def test_weights_beyond_float16_meet_inputs_of_float16(size, x_rows):
    packed = packed_weight("asymmetric", 5, 40, 4, 8, 0, size)
    x = (torch.randn(x_rows, 40, generator=torch.Generator().manual_seed(0)) / max(size, 1)).half()
    check_product(GpuIntegers.from_format(packed).to(DEVICE), packed.decode(), x, None)


@runs
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("x_rows", [3, 12])
def test_same_input_same_bits_whatever_the_strides(dtype, x_rows):
    weight = GpuIntegers.from_format(packed_weight("all", 7, 90, 3, 8, 0)).to(DEVICE)
    x = torch.randn(x_rows, 2, 90, generator=torch.Generator().manual_seed(0)).to(DEVICE, dtype)
    out = weight.linear(x)
    assert out.shape == (x_rows, 2, 7)
    assert torch.equal(out, weight.linear(x.clone()))
    assert torch.equal(out, weight.linear(x.transpose(0, 2).contiguous().transpose(0, 2)))
    reference = weight.linear_reference(x)
    assert torch.allclose(out.float(), reference.float(), rtol=0, atol=64 * torch.finfo(dtype).eps)


@once
def test_codes_lie_as_documented():
    codes = torch.arange(8).repeat(2, 5)[:, :37]
    packed = Integer.from_codes(codes, torch.ones(2, 1), torch.zeros(2, 1), bits=3, group=0)
    weight = GpuIntegers.from_format(packed)
    assert weight.low.shape == (1, 2, 16) and weight.high is not None and weight.high.shape == (1, 2, 16)
    low, high = weight.low[0, 1].tolist(), weight.high[0, 1].tolist()
    for k, code in enumerate(codes[1].tolist()):
        assert low[k // 4] >> 2 * (k % 4) & 3 == code & 3
        assert high[k // 8] >> k % 8 & 1 == code >> 2
    assert low[10:] == [0] * 6 and high[5:] == [0] * 11
    assert weight.nbytes == 2 * 2 * 16 + 2 * 2 + 2 * 2  # codes, scales, minima


@once
def test_unit_is_a_byte_only_where_a_group_ends_within_a_word():
    for bits, group, unit in (
        (1, 32, 4),
        (1, 40, 1),
        (2, 16, 4),
        (2, 8, 1),
        (3, 16, 4),
        (4, 8, 4),
        (8, 8, 4),
        (1, 0, 4),
    ):
        packed = packed_weight("symmetric", 2, 64, bits, group, 0)
        assert GpuIntegers.from_format(packed).unit_bytes == unit, (bits, group)


@once
def test_refuses_what_the_kernels_cannot_hold():
    with pytest.raises(WeightError, match="'dense16'"):
        GpuIntegers.from_format(Dense16.encode(torch.ones(2, 2)))  # pyright: ignore[reportArgumentType]
    with pytest.raises(WeightError, match="8 bits, not 9"):
        GpuIntegers.from_format(packed_weight("symmetric", 2, 16, 9, 8, 0))
    with pytest.raises(WeightError, match="multiple of 8 columns, not 12"):
        GpuIntegers.from_format(packed_weight("symmetric", 2, 16, 4, 12, 0))
    planes = [packed_weight("binary", 2, 16, 1, group, 0) for group in (8, 16)]
    for wrong, message in (
        ([], "at least one"),
        (planes, "must agree"),
        ([packed_weight("all", 2, 16, 1, 8, 0)], "must be binary"),
    ):
        with pytest.raises(WeightError, match=message):
            GpuIntegers.from_planes(wrong)


@runs
def test_refuses_inputs_that_do_not_fit():
    weight = GpuIntegers.from_format(packed_weight("symmetric", 3, 16, 4, 8, 0)).to(DEVICE)
    x = torch.ones(2, 16, device=DEVICE)
    for wrong, message in (
        (x[:, :15], "takes 16 inputs"),
        (x[0, 0], "takes 16 inputs"),
        (x.double(), "float64"),
        (x.int(), "int32"),
        (x.to("meta"), "lies on meta"),
    ):
        with pytest.raises(DataError, match=message):
            weight.linear(wrong)
    for bias in (torch.ones(4, device=DEVICE), torch.ones(3, 1, device=DEVICE), torch.ones(3, device=DEVICE).int()):
        with pytest.raises(WeightError, match="bias"):
            weight.linear(x, bias)
    with pytest.raises(DataError, match=r"int32 \[1, rows\]"):
        xnor_product(torch.ones(2, 3, device=DEVICE, dtype=torch.int32), pack_signs(x), 16)
    with pytest.raises(DataError, match="matrix"):
        pack_signs(x[0])


@needs_triton
@once
def test_refuses_the_cpu():
    weight = GpuIntegers.from_format(packed_weight("symmetric", 3, 16, 4, 8, 0))
    with pytest.raises(DataError, match="need tensors on cuda"):
        weight.linear(torch.ones(1, 16))
    with pytest.raises(DataError, match="need tensors on cuda"):
        pack_signs(torch.ones(1, 16))


@runs
@given(SIZES, SIZES, st.one_of(SIZES, st.just(300)), st.sampled_from(DTYPES), st.integers(0, 1000))
@settings(max_examples=12, deadline=None)
def test_product_of_signs_is_exact(left_rows, right_rows, cols, dtype, seed):
    g = torch.Generator().manual_seed(seed)
    matrices = [torch.randn(rows, cols, generator=g).round().to(DEVICE, dtype) for rows in (left_rows, right_rows)]
    left, right = (pack_signs(matrix) for matrix in matrices)
    assert torch.equal(left, pack_signs_reference(matrices[0]))
    product = xnor_product(left, right, cols)
    assert torch.equal(product, xnor_product_reference(left, right, cols))
    signs = [torch.where(matrix.cpu() >= 0, 1, -1) for matrix in matrices]
    assert torch.equal(product.cpu(), (signs[0].double() @ signs[1].double().T).int())


@once
def test_triton_is_imported_only_when_used(monkeypatch):
    code = "import sys, pennyweight, pennyweight.kernels.gpu; sys.exit('triton' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
    monkeypatch.setitem(sys.modules, "triton", None)  # as if it were not installed
    weight = GpuIntegers.from_format(packed_weight("symmetric", 3, 16, 4, 8, 0))
    with pytest.raises(MissingExtraError, match=r"pennyweight\[gpu\]"):
        weight.linear(torch.ones(1, 16))


class Recorder:
    """Stands in for a kernel: compiles it for a GPU as the launch would have it, without one."""

    def __init__(self, kernel, capability: int) -> None:
        self.kernel, self.capability, self.compiled = kernel, capability, []

    def __getitem__(self, grid):
        assert all(size >= 1 for size in grid)
        return self.launch

    def launch(self, *args, **kwargs):
        import triton
        from triton.backends.compiler import GPUTarget
        from triton.compiler import ASTSource

        names = self.kernel.arg_names
        options = {name: kwargs.pop(name) for name in list(kwargs) if name not in names}
        given = {**dict(zip(names, args, strict=False)), **kwargs}
        assert set(given) == set(names)
        signature, constants, attributes = {}, {}, {}
        kinds = {torch.float32: "*fp32", torch.float16: "*fp16", torch.bfloat16: "*bf16"}
        kinds |= {torch.int32: "*i32", torch.uint8: "*u8"}
        for i, name in enumerate(names):
            value = given[name]
            if name in kwargs or value is None or (isinstance(value, int) and value == 1):
                signature[name], constants[(i,)] = "constexpr", value
                continue
            is_tensor = isinstance(value, Tensor)
            signature[name] = kinds[value.dtype] if is_tensor else "fp32" if isinstance(value, float) else "i32"
            if is_tensor or (isinstance(value, int) and value % 16 == 0):
                attributes[(i,)] = [["tt.divisibility", 16]]
        if "constexprs" not in inspect.signature(ASTSource).parameters:
            pytest.skip("this Triton is compiled with in another way")
        source = ASTSource(fn=self.kernel, signature=signature, constexprs=constants, attrs=attributes)
        target = GPUTarget("cuda", self.capability, 32)
        self.compiled.append(triton.compile(source, target=target, options=options))


@needs_triton
@once
@pytest.mark.parametrize(
    ("kind", "bits", "x_rows", "rows", "cols", "group", "dtype", "capability"),
    [
        ("symmetric", 4, 1, 64, 4096, 64, torch.float16, 80),
        ("all", 3, 8, 3, 4093, 64, torch.float32, 90),
        ("centroids", 2, 3, 1, 1, 0, torch.float16, 80),
        ("symmetric", 4, 128, 64, 4096, 64, torch.float16, 90),
        ("all", 3, 9, 3, 4093, 8, torch.bfloat16, 80),
        ("binary", 1, 64, 64, 1024, 128, torch.float32, 90),
    ],
)
def test_compiles_for_a_gpu(kind, bits, x_rows, rows, cols, group, dtype, capability, monkeypatch):
    if importlib.util.find_spec("triton.backends.nvidia") is None:
        pytest.skip("this Triton cannot compile for NVIDIA")
    kernels = launch.kernels()
    monkeypatch.setattr(launch, "interpreted", lambda: False)
    monkeypatch.setattr(launch, "check_input", lambda *_: None)
    used = {}
    for name in ("few_rows", "many_rows", "arrange_inputs", "add_splits"):
        used[name] = Recorder(getattr(kernels, name), capability)
        monkeypatch.setattr(kernels, name, used[name])
    weight = GpuIntegers.from_format(packed_weight(kind, rows, cols, bits, group, 0))
    weight.linear(torch.zeros(x_rows, cols, dtype=dtype), torch.zeros(rows))
    assert used["few_rows" if x_rows <= 8 else "many_rows"].compiled
    for recorder in used.values():
        for compiled in recorder.compiled:
            assert ".atom" not in compiled.asm["ptx"] and ".red." not in compiled.asm["ptx"]


@needs_triton
@once
@pytest.mark.parametrize("hardware", [True, False])
def test_kernels_of_signs_compile_for_a_gpu(hardware):
    if importlib.util.find_spec("triton.backends.nvidia") is None:
        pytest.skip("this Triton cannot compile for NVIDIA")
    kernels = launch.kernels()
    pack, product = Recorder(kernels.pack_signs, 80), Recorder(kernels.xnor_product, 80)
    words, out = torch.zeros(2, 3, dtype=torch.int32), torch.zeros(3, 3, dtype=torch.int32)
    pack[(1,)](torch.zeros(3, 40), words, 3, 40, 40, 2, BM=16, BW=8, **launch.OPTIONS)
    product[(1,)](words, words, out, 3, 3, 40, 2, BM=64, BN=64, HARDWARE=hardware, **launch.OPTIONS)
    assert ("popc.b32" in product.compiled[0].asm["ptx"]) == hardware


def running(kind: str, rows: int, cols: int, bits: int, group: int, seed: int) -> RunningIntegers:
    weight = packed_weight(kind, rows, cols, bits, group, seed).for_running()
    assert isinstance(weight, RunningIntegers)
    return weight


@once
@pytest.mark.parametrize("kind", ["binary", "symmetric", "asymmetric", "all", "columns"])
@pytest.mark.parametrize("group", [0, 8, 64])
def test_a_running_weight_has_a_twin_of_the_same_values(kind, group):
    for bits in range(1, 9):
        weight = running(kind, 70, 150, bits, group, bits)
        twin = GpuIntegers.from_matrix(weight.matrix)
        assert twin is not None and twin.bits <= bits
        assert torch.equal(twin.decode(), weight.decode())
    assert torch.finfo(twin.scale.dtype).bits == (32 if kind == "columns" else 16)  # log8 is not exact in float16


@once
def test_a_twin_keeps_scales_beyond_float16_and_refuses_what_it_cannot_hold():
    weight = packed_weight("asymmetric", 5, 64, 4, 8, 0, 1e-7).for_running()
    twin = GpuIntegers.from_matrix(weight.matrix)  # type: ignore[union-attr]
    assert twin is not None and twin.scale.dtype == torch.float16
    assert torch.equal(twin.decode(), weight.decode())
    codes = torch.zeros(8, 128, dtype=torch.int64)
    codes[0, 0] = 1000  # more than a byte holds
    escaping = Integer.from_codes(codes, torch.ones(8, 1), bits=11, group=0).for_running()
    assert GpuIntegers.from_matrix(escaping.matrix) is None  # type: ignore[union-attr]
    offset = torch.randint(300, 310, (8, 128))
    both = IntegerMatrix.of(offset, torch.ones(8, 1), 0, minimum=torch.ones(8, 1), column_scale=torch.ones(128))
    assert both is not None and GpuIntegers.from_matrix(both) is None
    one = IntegerMatrix.of(offset, torch.ones(8, 1), 0, minimum=torch.ones(8, 1))
    assert one is not None
    twin = GpuIntegers.from_matrix(one)
    assert twin is not None and torch.equal(twin.decode(), offset + 1.0)


@runs
@pytest.mark.parametrize("kind", ["binary", "asymmetric", "all"])
@pytest.mark.parametrize("x_rows", [2, 12])
@pytest.mark.parametrize("dtype", DTYPES)
def test_running_weights_multiply_by_their_twin(kind, x_rows, dtype, monkeypatch):
    if INTERPRETED:
        monkeypatch.setattr(twins, "takes", lambda x: x.dtype in DTYPES)
    weight = running(kind, 9, 72, 3, 8, 0)
    x = torch.randn(x_rows, 72, generator=torch.Generator().manual_seed(0)).to(DEVICE, dtype)
    bias = torch.randn(9, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    twin = twins.twin(weight.matrix, x.device)
    assert twin is not None and twin is twins.twin(weight.matrix, x.device)
    y = weight.linear(x, bias)
    assert torch.equal(y, twin.linear(x, bias))
    check_product(twin, weight.decode(), x.cpu(), bias.cpu())
    with_gradient = x.clone().requires_grad_()
    product = weight.linear(with_gradient)
    assert torch.equal(product.detach(), weight.linear(x))
    product.float().sum().backward()
    assert with_gradient.grad is not None and with_gradient.grad.dtype == dtype
    expected = weight.decode().sum(0).expand(x_rows, 72)
    assert torch.allclose(with_gradient.grad.float().cpu(), expected, rtol=2e-2, atol=2e-2)


@once
def test_gpu_kernels_take_only_what_lies_on_a_gpu():
    assert not twins.takes(torch.ones(1))
    assert not twins.takes(torch.ones(1, device="meta"))


@once
def test_other_devices_decode():
    weight = running("all", 9, 72, 3, 8, 0)
    assert weight.linear(torch.empty(3, 72, device="meta", dtype=torch.float64)).shape == (3, 9)
    sparse = Sparse.encode(torch.ones(9, 72), torch.eye(9, 72).bool()).for_running()
    assert sparse.linear(torch.empty(3, 72, device="meta")).device.type == "meta"
