"""The formats: exact on their grids, closed forms, round trips over all shapes, honest sizes, damage."""

from __future__ import annotations

import contextlib
import copy
import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pennyweight.errors import ArtifactError, WeightError
from pennyweight.formats import (
    Binary,
    Codebook,
    Dense16,
    Integer,
    LowRank,
    PackedWeight,
    Partial,
    SignedLowRank,
    Sparse,
    Split,
    Stacked,
    from_bytes,
)
from pennyweight.formats.base import Reader, Writer
from pennyweight.formats.bits import gather, pack, packed_size, unpack
from pennyweight.formats.entropy import RANGE, RAW, read_symbols, write_symbols
from pennyweight.formats.scales import round_values

KINDS = ("dense16", "int", "int-asymmetric", "int-all", "centroids", "binary", "sparse", "codebook", "lowrank", "split",
         "partial", "stacked", "signed-lowrank")  # fmt: skip


def make(kind: str, rows: int, cols: int, seed: int) -> PackedWeight:
    """A packed weight of that kind with parameters that the seed chooses."""
    g = torch.Generator().manual_seed(seed)

    def integers(low: int, high: int, *shape: int) -> Tensor:
        return torch.randint(low, high, shape, generator=g)

    def pick(*choices):
        return choices[int(integers(0, len(choices), 1))]

    weight = torch.randn(rows, cols, generator=g) * 10.0 ** pick(-6, -1, 0, 3)
    group = pick(0, 1, 3, 8)
    groups = -(-cols // group) if group else min(cols, 1)
    bits = int(integers(1, 17, 1))
    coding = pick("float16", "log8")
    if kind == "dense16":
        return Dense16.encode(weight, pick("float16", "bfloat16"))
    if kind == "int":
        return Integer.encode(weight, bits, group, symmetric=True)
    if kind == "int-asymmetric":
        return Integer.encode(weight, bits, group)
    if kind == "int-all":
        codes, scale = integers(0, 1 << bits, rows, cols), torch.rand(rows, groups, generator=g)
        column = torch.rand(cols, generator=g)
        return Integer.from_codes(codes, scale, -scale, bits=bits, group=group, column_offset=-column,
                                  column_scale=column, scale_coding=coding)  # fmt: skip
    if kind == "centroids":
        codes, scale = integers(-(1 << bits - 1), 1 << bits - 1, rows, cols), torch.rand(rows, groups, generator=g)
        table = torch.randn(1 << bits, generator=g)
        return Integer.from_codes(codes, scale, bits=bits, group=group, centroids=table, scale_coding=coding)
    if kind == "binary":
        return Binary.encode(weight, group)
    if kind == "sparse":
        return Sparse.encode(weight, weight.abs() > weight.abs().mean() * pick(0, 1, 2.5, 99), pick(16, 32, 2, 5, 8))
    if kind == "codebook":
        d, entries = pick(1, 2, 3, 8), pick(1, 2, 7, 300)
        scale = pick(None, torch.rand(rows, generator=g))
        codes = integers(0, entries, rows, -(-cols // d))
        table = torch.randn(entries, d, generator=g)
        return Codebook.from_codes(codes, table, cols=cols, row_scale=scale, scale_coding=coding)
    if kind == "lowrank":
        rank = pick(0, 1, 3)
        return LowRank.from_factors(make("int", rows, rank, seed + 1), make("dense16", rank, cols, seed + 2))
    if kind == "partial":
        salient = weight.abs() > weight.abs().mean() * pick(0, 1.5, 99)
        if pick(True, False):
            return Partial.encode(weight, salient, group, pick(16, 2, 8))
        return Partial.from_parts(make(pick("int", "lowrank"), rows, cols, seed + 1), Sparse.encode(weight, salient))
    if kind == "signed-lowrank":
        rank = pick(0, 1, 2, 5)
        left, right = torch.randn(rows, rank, generator=g), torch.randn(rank, cols, generator=g)
        return SignedLowRank.from_factors(weight, left, right * 10.0 ** pick(-6, 0, 3))
    if kind == "stacked":
        inner = pick("binary", "signed-lowrank", "int-asymmetric", "partial")
        return Stacked.from_parts([make(inner, rows, cols, seed + 1 + i) for i in range(pick(1, 2, 4))])
    take = torch.rand(rows, generator=g) < 0.4
    second = int(take.sum())
    inner = pick("lowrank", "sparse", "int-asymmetric")
    return Split.from_parts(take, make("binary", rows - second, cols, seed + 1), make(inner, second, cols, seed + 2))


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=12, deadline=None, derandomize=True)
@given(rows=st.integers(0, 20), cols=st.integers(0, 40), seed=st.integers(0, 10**6))
def test_contract(kind: str, rows: int, cols: int, seed: int) -> None:
    packed = make(kind, rows, cols, seed)
    matrix = packed.decode()
    assert packed.shape == (rows, cols) == tuple(matrix.shape)
    assert matrix.dtype == torch.float32

    blob = packed.to_bytes()
    assert packed.nbytes == len(blob) and packed.to_bytes() == blob
    for other in (from_bytes(blob), copy.deepcopy(packed), packed.to("cpu")):
        assert type(other) is type(packed) and other.nbytes == len(blob)
        assert torch.equal(other.decode(), matrix)
        assert other.to_bytes() == blob

    # A product may be summed in another order when fewer rows take part; running, salient weights come as a difference.
    inexact = kind in ("lowrank", "split", "partial", "stacked", "signed-lowrank") and matrix.numel()
    slack = 1e-5 * max(1.0, float(matrix.abs().max())) if inexact else 0.0
    if rows:
        index = torch.tensor([[0, rows - 1], [rows // 2, 0]])
        torch.testing.assert_close(packed.rows(index), matrix[index], rtol=0, atol=slack)
        assert packed.rows(torch.tensor(rows - 1)).shape == (cols,)
    assert packed.rows(torch.zeros(0, dtype=torch.int64)).shape == (0, cols)

    x = torch.ones(2, 3, cols)
    bias = torch.arange(rows, dtype=torch.float32)
    torch.testing.assert_close(packed.linear(x, bias), x @ matrix.T + bias, rtol=1e-4, atol=slack + 1e-4)
    assert packed.linear(x.bfloat16()).dtype == torch.bfloat16

    for bits, error in ((32, 1e-5), (16, 1e-3)):
        running = packed.for_running(bits)
        assert running.runs and not packed.runs and running.shape == packed.shape
        torch.testing.assert_close(running.decode(), matrix, rtol=0, atol=slack)
        size = x.abs() @ matrix.abs().T + bias.abs() + 1e-4  # what may cancel in a sum
        assert bool(((running.linear(x, bias) - (x @ matrix.T + bias)).abs() <= error * size + slack).all())
    assert packed.to_bytes() == blob


# Bits and streams -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", range(1, 17))
def test_packing_is_lsb_first_without_gaps(bits: int) -> None:
    for n in (0, 1, 7, 8, 9, 31):
        codes = (torch.arange(2 * n).view(2, n) * 40503) % (1 << bits)
        packed = pack(codes, bits)
        assert packed.shape == (2, packed_size(n, bits))
        for row in range(2):
            number = sum(int(c) << i * bits for i, c in enumerate(codes[row]))
            assert bytes(packed[row].tolist()) == number.to_bytes(packed_size(n, bits), "little")
        assert torch.equal(unpack(packed, bits, n).long(), codes)
        if bits <= 8 and n:
            assert torch.equal(gather(packed[0], bits, torch.arange(n)).long(), codes[0])


def stream(codes: np.ndarray, bits: int) -> bytes:
    writer = Writer()
    write_symbols(writer, codes, bits)
    return bytes(writer.data)


def entropy_bytes(codes: np.ndarray) -> float:
    counts = np.bincount(codes.ravel())
    p = counts[counts > 0] / codes.size
    return float(-(p * np.log2(p)).sum()) * codes.size / 8


def test_skewed_stream_is_near_its_entropy() -> None:
    rng = np.random.default_rng(0)
    for bits, spread in ((2, 0.3), (4, 0.8), (8, 6.0), (12, 30.0)):
        codes = np.rint(rng.standard_normal((500, 400)) * spread + (1 << bits - 1))
        codes = codes.clip(0, (1 << bits) - 1).astype(np.uint8 if bits <= 8 else np.int32)
        data = stream(codes, bits)
        assert data[0] == RANGE
        assert len(data) <= 1.01 * entropy_bytes(codes) + 64 + len(np.unique(codes))


def test_rows_of_unequal_spread_cost_less_than_their_common_entropy() -> None:
    rng = np.random.default_rng(0)
    wide = np.exp2(rng.uniform(-2, 2, (400, 1)))
    codes = np.rint(rng.standard_normal((400, 300)) * wide + 32).clip(0, 63).astype(np.uint8)
    assert len(stream(codes, 6)) < 0.93 * entropy_bytes(codes)
    assert len(stream(np.ascontiguousarray(codes.T), 6)) < 0.93 * entropy_bytes(codes)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    bits=st.integers(1, 16), rows=st.integers(0, 30), cols=st.integers(0, 30), skew=st.sampled_from([0.0, 0.5, 3.0, 50])
)
def test_stream_round_trip_never_larger_than_raw(bits: int, rows: int, cols: int, skew: float) -> None:
    rng = np.random.default_rng(bits * 1000 + rows * 31 + cols)
    codes = (rng.random((rows, cols)) ** (1 + skew) * (1 << bits)).astype(np.uint8 if bits <= 8 else np.int32)
    data = stream(codes, bits)
    raw = packed_size(codes.size, bits)
    assert len(data) <= raw + (codes.size > 0)
    if codes.size and data[0] == RANGE:
        assert len(data) - 1 < raw
    assert np.array_equal(read_symbols(Reader(data), rows, cols, bits), codes)


def test_constant_matrix_takes_a_few_bytes() -> None:
    packed = Integer.from_codes(torch.ones(300, 300).int(), torch.ones(300, 1), bits=8, group=0)
    assert packed.nbytes < 40


def test_uniform_codes_stay_raw() -> None:
    codes = np.random.default_rng(0).integers(0, 16, (64, 64)).astype(np.uint8)
    assert stream(codes, 4)[0] == RAW and len(stream(codes, 4)) == 1 + 64 * 64 // 2


# Scales ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("coding", ["float16", "log8"])
@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    values=st.lists(st.floats(0, 2.0**100, width=32), min_size=1, max_size=12),
    power=st.sampled_from([0, -30, -60, -90, 25]),
)
def test_rounding_scales_twice_changes_nothing(coding, values: list[float], power: int) -> None:
    once = round_values(torch.tensor(values)[None] * 2.0**power, coding)
    assert torch.equal(round_values(once, coding), once)


@pytest.mark.parametrize(("coding", "error"), [("float16", 2.0**-11), ("log8", 2.0 ** (1 / 32) - 1)])
@pytest.mark.parametrize("unit", [1e-25, 1e-8, 1.0, 1e9, 1e30])
def test_scales_keep_their_precision_at_any_magnitude(coding, error: float, unit: float) -> None:
    scale = torch.logspace(-3, 0, 50).double() * unit
    stored = round_values(scale[None].float(), coding)[0].double()
    assert float(((stored - scale).abs() / scale).max()) <= error * 1.0001
    zeroed = scale.clone()
    zeroed[7] = 0
    assert float(round_values(zeroed[None].float(), coding)[0, 7]) == 0.0


def test_log8_steps_are_sixteenths_of_an_octave() -> None:
    scale = 0.3 * 2.0 ** (torch.arange(100).double() / 16)
    torch.testing.assert_close(round_values(scale[None].float(), "log8")[0].double(), scale, rtol=1e-6, atol=0)


# Each format by its closed form ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", range(1, 17))
def test_integer_returns_its_grid_exactly(bits: int) -> None:
    levels = torch.arange(1 << bits, dtype=torch.float32)
    for group in (0, 1 << bits):
        asymmetric = (levels * 0.25 - 3).repeat(3, 1)
        assert torch.equal(Integer.encode(asymmetric, bits, group).decode(), asymmetric)
        signed = (levels - (1 << bits - 1)) * torch.tensor([[0.5], [2.0]])
        codes = (levels - (1 << bits - 1)).int().repeat(2, 1)
        packed = Integer.from_codes(codes, torch.tensor([[0.5], [2.0]]), bits=bits, group=0)
        assert torch.equal(packed.decode(), signed)
    if bits > 1:
        symmetric = signed[:, 1:]
        assert torch.equal(Integer.encode(symmetric, bits, 0, symmetric=True).decode(), symmetric)


def test_integer_formula_group_by_group() -> None:
    torch.manual_seed(0)
    codes, group = torch.randint(0, 8, (4, 10)), 4
    scale, minimum = round_values(torch.rand(4, 3)), round_values(-torch.rand(4, 3))
    offset, column = round_values(torch.rand(1, 10))[0], round_values(torch.rand(1, 10), "log8")[0]
    packed = Integer.from_codes(codes, scale, minimum, bits=3, group=group, column_offset=offset, column_scale=column)
    for r in range(4):
        for c in range(10):
            g = c // group
            expected = float(codes[r, c] * scale[r, g] * column[c] + minimum[r, g] + offset[c])
            assert float(packed.decode()[r, c]) == pytest.approx(expected, rel=1e-6)


def test_integer_centroids_replace_the_codes() -> None:
    codes = torch.tensor([[-2, -1, 0, 1, 0], [1, 1, 0, 0, -2]])
    table = torch.tensor([-1.75, -0.75, 0.0, 1.25])
    packed = Integer.from_codes(codes, torch.tensor([[2.0], [0.5]]), bits=2, group=0, centroids=table)
    assert torch.equal(packed.decode(), table[codes + 2] * torch.tensor([[2.0], [0.5]]))
    fewer = Integer.from_codes(codes.clamp_min(0), torch.tensor([[2.0], [0.5]]), bits=2, group=0, centroids=table)
    assert torch.equal(from_bytes(fewer.to_bytes()).decode(), fewer.decode())


def test_round_to_nearest_errs_by_half_a_step() -> None:
    torch.manual_seed(0)
    weight = torch.randn(16, 70)
    packed = Integer.encode(weight, 4, 32)
    step = packed.scale.all().repeat_interleave(32, 1)[:, :70]
    assert bool(((packed.decode() - weight).abs() <= step * 0.51).all())


def test_binary_scale_is_the_best_one() -> None:
    torch.manual_seed(0)
    weight = torch.randn(6, 22)
    packed = Binary.encode(weight, 8)
    for start in (0, 8, 16):
        mean = weight[:, start : start + 8].abs().mean(1)
        torch.testing.assert_close(packed.decode()[:, start].abs(), mean, rtol=2.0**-11, atol=0)
    error = (packed.decode() - weight).square().sum()
    for factor in (0.98, 1.02):
        assert (Binary.from_signs(weight >= 0, packed.scale.all() * factor, 8).decode() - weight).square().sum() > error
    assert bool((Binary.encode(torch.tensor([[0.0, -1.0]]), 0).decode() == torch.tensor([[0.5, -0.5]])).all())
    assert torch.equal(Binary.from_signs(weight.sign(), packed.scale.all(), 8).decode(), packed.decode())


def test_binary_takes_a_bit_a_weight() -> None:
    torch.manual_seed(0)
    assert Binary.encode(torch.randn(64, 256), 0).nbytes <= 64 * 256 // 8 + 64 * 2 + 16


def test_sparse_keeps_what_the_mask_keeps() -> None:
    torch.manual_seed(0)
    weight = torch.randn(9, 33)
    mask = weight.abs() > 1
    assert torch.equal(Sparse.encode(weight, mask).decode(), (weight * mask).half().float())
    assert torch.equal(Sparse.encode(weight, mask, 32).decode(), weight * mask)
    for bits in (2, 4, 8):
        decoded = Sparse.encode(weight, mask, bits).decode()
        step = (weight * mask).abs().amax(1, keepdim=True) / ((1 << bits - 1) - 1)
        assert bool((decoded[~mask] == 0).all())
        assert bool(((decoded - weight * mask).abs() <= 0.501 * step).all())
    broken = torch.where(mask, weight, torch.nan)
    assert torch.equal(Sparse.encode(broken, mask).decode(), Sparse.encode(weight, mask).decode())


def test_sparse_mask_costs_its_entropy_or_less_if_regular() -> None:
    torch.manual_seed(0)
    mask = torch.rand(200, 500) < 0.1
    entropy = -(0.1 * math.log2(0.1) + 0.9 * math.log2(0.9)) * 1e5 / 8
    values = 2 * int(mask.sum()) / 8
    assert Sparse.encode(torch.ones(200, 500), mask, 2).nbytes < 1.03 * entropy + 0.2 * values + 100
    regular = (torch.arange(100_000) % 10 == 3).view(200, 500)
    assert Sparse.encode(torch.ones(200, 500), regular, 2).nbytes < 100


def test_codebook_lays_entries_side_by_side() -> None:
    table = torch.tensor([[1.0, 2.0, 3.0], [-1.0, -2.0, -3.0]])
    packed = Codebook.from_codes(torch.tensor([[0, 1, 0], [1, 1, 1]]), table, cols=7, row_scale=torch.tensor([1.0, 2]))
    assert packed.decode().tolist() == [[1, 2, 3, -1, -2, -3, 1], [-2, -4, -6, -2, -4, -6, -2]]


def test_lowrank_multiplies_through_its_factors() -> None:
    left, right = torch.arange(6.0).view(3, 2), torch.arange(8.0).view(2, 4)
    packed = LowRank.from_factors(Dense16.encode(left), Dense16.encode(right))
    assert torch.equal(packed.decode(), left @ right)
    assert packed.linear(torch.ones(4)).tolist() == (left @ right).sum(1).tolist()


def test_signed_lowrank_leaves_the_other_singular_values_of_the_magnitudes() -> None:
    torch.manual_seed(0)
    weight = torch.randn(24, 40)
    values = torch.linalg.svdvals(weight.abs().double())
    for rank in (0, 1, 5, 24, 99):
        packed = SignedLowRank.encode(weight, rank)
        assert packed.rank == min(rank, 24)
        error = (packed.decode() - weight).double().square().sum()
        torch.testing.assert_close(error, values[rank:].square().sum(), rtol=2e-3, atol=1e-3)
    scales = SignedLowRank.encode(weight, 1)  # of rows and columns
    assert bool((scales.left.all() >= 0).all() and (scales.right.all() >= 0).all())
    example = SignedLowRank.encode(torch.tensor([[3.0, -1.0], [1.0, 2.0]]), 1)  # worked by hand
    golden = torch.tensor([[2.618, -1.618], [1.618, 1.0]])
    torch.testing.assert_close(example.decode(), golden, rtol=2e-3, atol=0)
    one = torch.tensor([[1.0, -2.0], [-3.0, 6.0]])  # whose magnitudes have rank 1
    torch.testing.assert_close(SignedLowRank.encode(one, 1).decode(), one, rtol=2e-3, atol=0)
    assert SignedLowRank.encode(torch.zeros(3, 9), 1).decode().abs().max() == 0


def test_stacked_adds_up_and_its_first_stages_are_a_weight() -> None:
    torch.manual_seed(0)
    weight = torch.randn(32, 48)
    for encode in (lambda rest: Binary.encode(rest, 16), lambda rest: SignedLowRank.encode(rest, 2)):
        whole = Stacked.encode(weight, 5, encode)
        assert isinstance(whole.parts[0], PackedWeight) and len(whole.parts) == 5
        left = weight
        for count in range(1, 6):
            some = whole.stages(count)
            left = left - whole.parts[count - 1].decode()
            torch.testing.assert_close(weight - some.decode(), left, rtol=0, atol=1e-5)
            assert some.to_bytes() == Stacked.encode(weight, count, encode).to_bytes()
        errors = [float((weight - whole.stages(n).decode()).square().sum()) for n in range(1, 6)]
        assert all(later < 0.75 * earlier for earlier, later in pairwise(errors))
    assert torch.equal(Stacked.encode(weight, 1).decode(), Binary.encode(weight).decode())


def test_partial_keeps_the_salient_and_scales_by_the_rest() -> None:
    weight = torch.tensor([[0.5, -1.0, 0.1, -0.2]])  # the example of PB-LLM's card
    none, one = torch.zeros(1, 4).bool(), torch.tensor([[False, True, False, False]])
    assert torch.equal(Partial.encode(weight, none, 0).decode(), Binary.encode(weight, 0).decode())
    kept = Partial.encode(weight, one, 0, 16).decode()
    assert float(kept[0, 1]) == -1.0
    assert float((kept - weight).square().sum()) == pytest.approx(0.08667, rel=1e-3)
    torch.manual_seed(0)
    weight = torch.randn(16, 100)
    salient = weight.abs() > 1.5
    packed = Partial.encode(weight, salient, 32, 8)
    assert torch.equal(packed.decode()[salient], Sparse.encode(weight, salient, 8).decode()[salient])
    assert bool((packed.decode()[~salient].sign() == weight[~salient].sign()).all())
    every = torch.ones(16, 100).bool()
    assert torch.equal(Partial.encode(weight, every, 32, 16).decode(), weight.half().float())


def test_partial_costs_a_sign_a_mask_and_the_values() -> None:
    torch.manual_seed(0)
    weight = torch.randn(256, 512)
    salient = torch.rand(256, 512) < 0.1
    mask = -(0.1 * math.log2(0.1) + 0.9 * math.log2(0.9))
    bits = 8 * Partial.encode(weight, salient, 0, 8).nbytes / weight.numel()
    assert bits < 1 + 1.02 * mask + 8 * float(salient.float().mean()) + 2 * 16 / 512 + 0.01


@settings(max_examples=30, deadline=None, derandomize=True)
@given(
    st.sampled_from(["binary", "signed-lowrank"]),
    st.tuples(st.integers(1, 150), st.integers(1, 200)),
    st.integers(0, 20),
    st.integers(0, 10**6),
)
def test_running_stacks_and_parts_never_decode_what_kernels_multiply(kind, shape, inputs, seed) -> None:
    parts = [make(kind, *shape, seed + i) for i in range(2)]
    packed = Stacked.from_parts(parts)
    matrix, x = packed.decode().double(), torch.randn(inputs, shape[1], generator=torch.Generator().manual_seed(seed))
    y = packed.for_running(16).linear(x)
    scale = sum(x.double().abs() @ part.decode().double().abs().T for part in parts)
    assert bool(((y.double() - x.double() @ matrix.T).abs() <= 2e-4 * scale + 1e-30).all())


@pytest.mark.parametrize("kind", ["sparse", "partial", "stacked", "signed-lowrank"])
def test_running_forms_compile_and_have_gradients(kind) -> None:
    torch.manual_seed(0)
    weight = torch.randn(24, 40)
    packed: PackedWeight = {
        "sparse": lambda: Sparse.encode(weight, weight.abs() > 1),
        "partial": lambda: Partial.encode(weight, weight.abs() > 1, 8),
        "stacked": lambda: Stacked.encode(weight, 3, lambda rest: Binary.encode(rest, 8)),
        "signed-lowrank": lambda: SignedLowRank.encode(weight, 3),
    }[kind]()
    running = packed.for_running()
    bias = torch.randn(24)
    for inputs in (3, 50):  # few, and too many for the signs of low rank
        x = torch.randn(inputs, 40, requires_grad=True)
        y = running.linear(x, bias)
        y.sum().backward()
        assert x.grad is not None
        torch.testing.assert_close(x.grad, packed.decode().sum(0).expand(inputs, 40), rtol=1e-4, atol=1e-4)
        compiled = torch.compile(lambda x: running.linear(x, bias), fullgraph=True, backend="aot_eager", dynamic=False)
        torch.testing.assert_close(compiled(x.detach()), y.detach(), rtol=1e-4, atol=1e-3)


def test_split_puts_rows_back_in_order() -> None:
    weight = torch.arange(12.0).view(6, 2)
    take = torch.tensor([True, False, False, True, False, True])
    packed = Split.from_parts(take, Dense16.encode(weight[~take]), Dense16.encode(weight[take]))
    assert torch.equal(packed.decode(), weight)
    assert torch.equal(packed.rows(torch.tensor([-1, 3, 4])), weight[[-1, 3, 4]])


def test_dense16_is_the_dtype_and_range_coding_gains_on_trained_like_weights() -> None:
    torch.manual_seed(0)
    weight = torch.randn(200, 100) * 0.03
    assert torch.equal(Dense16.encode(weight).decode(), weight.half().float())
    packed = Dense16.encode(weight, "bfloat16")
    assert torch.equal(packed.decode(), weight.bfloat16().float())
    assert packed.nbytes < 0.8 * 2 * weight.numel()


# Bad input ------------------------------------------------------------------------------------------------------------

ONES = torch.ones(2, 4)


@pytest.mark.parametrize(
    "attempt",
    [
        lambda: Dense16.encode(torch.tensor([[math.nan]])),
        lambda: Dense16.encode(torch.ones(3)),
        lambda: Dense16.encode(torch.tensor([[1e6]])),
        lambda: Dense16.encode(ONES, "float8"),  # type: ignore[arg-type]
        lambda: Integer.encode(torch.tensor([[math.inf]]), 4),
        lambda: Integer.encode(ONES, 17),
        lambda: Integer.encode(ONES, 4, -1),
        lambda: Integer.from_codes(ONES.int() * 8, torch.ones(2, 1), bits=4, group=0),
        lambda: Integer.from_codes(ONES.int() * 16, torch.ones(2, 1), torch.ones(2, 1), bits=4, group=0),
        lambda: Integer.from_codes(ONES.int(), torch.ones(2, 1), bits=4, group=2),
        lambda: Integer.from_codes(ONES.int(), torch.full((2, 1), math.nan), bits=4, group=0),
        lambda: Integer.from_codes(ONES.int(), -torch.ones(2, 1), bits=4, group=0, scale_coding="log8"),
        lambda: Integer.from_codes(ONES.int(), torch.ones(2, 1), bits=4, group=0, column_offset=torch.ones(3)),
        lambda: Integer.from_codes(ONES.int(), torch.ones(2, 1), bits=4, group=0, centroids=torch.ones(8)),
        lambda: Integer.round_scale(ONES, "float8"),  # type: ignore[arg-type]
        lambda: Binary.from_signs(ONES, torch.ones(2, 2), 0),
        lambda: Sparse.encode(ONES, torch.ones(2, 3).bool()),
        lambda: Sparse.encode(ONES, ONES.bool(), 9),
        lambda: Sparse.encode(ONES * math.nan, ONES.bool()),
        lambda: Codebook.from_codes(ONES.int(), torch.ones(1, 2), cols=8),
        lambda: Codebook.from_codes(ONES.int(), torch.ones(2, 2), cols=9),
        lambda: Codebook.from_codes(ONES.int(), torch.ones(2, 9), cols=36),
        lambda: LowRank.from_factors(Dense16.encode(ONES), Dense16.encode(ONES)),
        lambda: Partial.encode(ONES, torch.ones(2, 3).bool()),
        lambda: Partial.encode(ONES, ONES.bool(), 0, 9),
        lambda: Partial.encode(ONES * math.nan, ONES.bool()),
        lambda: Partial.from_parts(Dense16.encode(ONES), Sparse.encode(torch.ones(2, 3), torch.ones(2, 3))),
        lambda: SignedLowRank.encode(ONES, -1),
        lambda: SignedLowRank.encode(ONES * math.nan),
        lambda: SignedLowRank.from_factors(ONES, torch.ones(3, 1), torch.ones(1, 4)),
        lambda: SignedLowRank.from_factors(ONES, torch.ones(2, 1), torch.ones(2, 4)),
        lambda: SignedLowRank.from_factors(ONES, torch.ones(2, 1) * math.inf, torch.ones(1, 4)),
        lambda: Stacked.from_parts([]),
        lambda: Stacked.from_parts([Dense16.encode(ONES), Dense16.encode(ONES[:1])]),
        lambda: Stacked.encode(ONES, 0),
        lambda: Stacked.encode(ONES * math.nan, 1),
        lambda: Stacked.encode(ONES, 3).stages(0),
        lambda: Stacked.encode(ONES, 3).stages(4),
        lambda: Split.from_parts(torch.tensor([True, False]), Dense16.encode(ONES), Dense16.encode(ONES)),
    ],
)
def test_bad_input_is_refused_in_one_line(attempt) -> None:
    with pytest.raises(WeightError) as caught:
        attempt()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", KINDS)
def test_truncated_and_lengthened_blobs_are_refused(kind: str) -> None:
    for seed in range(3):
        blob = make(kind, 5, 9, seed).to_bytes()
        for length in range(len(blob)):
            with pytest.raises(ArtifactError):
                from_bytes(blob[:length])
        with pytest.raises(ArtifactError):
            from_bytes(blob + b"\0")


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 50), damage=st.lists(st.tuples(st.floats(0, 1), st.integers(1, 255)), min_size=1, max_size=3)
)
def test_damaged_blobs_decode_or_are_refused(kind: str, seed: int, damage: list[tuple[float, int]]) -> None:
    blob = bytearray(make(kind, 11, 23, seed).to_bytes())
    for place, flip in damage:
        blob[min(int(place * place * len(blob)), len(blob) - 1)] ^= flip  # headers, at the front, are hit more often
    try:
        packed = from_bytes(blob)
    except ArtifactError:
        return
    if packed.shape[0] * packed.shape[1] < 1 << 20:
        assert packed.decode().shape == packed.shape


@settings(max_examples=150, deadline=None, derandomize=True)
@given(st.binary(max_size=60), st.integers(1, 10))
def test_noise_is_refused_or_decodes(noise: bytes, number: int) -> None:
    with contextlib.suppress(ArtifactError):
        from_bytes(bytes([number]) + noise)


def test_newer_versions_and_formats_are_refused_by_name() -> None:
    blob = bytearray(Dense16.encode(ONES).to_bytes())
    blob[1] |= 1 << 5
    with pytest.raises(ArtifactError, match=r"dense16.*version 1.*newer"):
        from_bytes(blob)
    with pytest.raises(ArtifactError, match="unknown weight format 99"):
        from_bytes(b"\x63" + bytes(blob[1:]))


def test_a_small_file_cannot_ask_for_much_memory() -> None:
    writer = Writer()
    for byte in (2, 0):
        writer.u8(byte)
    writer.varint(1 << 20)
    writer.varint(1 << 20)
    writer.raw(bytes([4, 0, 1, 0, 9, 0, 14, 0, 0]))  # four bits, range coded, a single symbol in 2^40 places
    with pytest.raises(ArtifactError, match="more codes than its size allows"):
        from_bytes(bytes(writer.data))


def test_nesting_is_bounded() -> None:
    packed: PackedWeight = Dense16.encode(torch.eye(2))
    for _ in range(9):
        packed = LowRank.from_factors(packed, Dense16.encode(torch.eye(2)))
    with pytest.raises(ArtifactError, match="nested"):
        from_bytes(packed.to_bytes())
