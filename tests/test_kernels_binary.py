"""Kernels of signs: every instruction set here against plain torch, and the folding of batch norm."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from pennyweight import kernels
from pennyweight.errors import WeightError
from pennyweight.kernels import binary
from pennyweight.kernels.binary import Scaled, Thresholds

cpu = kernels._cpu
compiled = pytest.mark.skipif(cpu is None, reason="the kernels are not compiled")
NAN = float("nan")
few = settings(max_examples=25, deadline=None)
SEEDS = st.integers(0, 10**6)
#: Both sides of what a word, a block of outputs, a chunk of columns and a tile of rows hold.
ROWS = st.sampled_from([0, 1, 2, 5, 8, 9, 13, 64, 131])
OUTPUTS = st.sampled_from([0, 1, 3, 63, 64, 65, 130])
COLUMNS = st.sampled_from([0, 1, 63, 64, 65, 127, 300, 959, 960, 961, 1984, 2100])


@pytest.fixture(autouse=True)
def _as_it_was():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
    if cpu is not None:
        cpu.use(cpu.instruction_sets()[-1])


def everywhere(function):
    """The value that every instruction set gives with 1 and 2 threads, once they have been compared to the bit."""
    values = []
    for name in cpu.instruction_sets():
        cpu.use(name)
        for threads in (1, 2):
            torch.set_num_threads(threads)
            values.append((f"{name}, {threads} threads", function()))
    for what, value in values[1:]:
        assert torch.equal(value, values[0][1]), what
    return values[0][1]


def _signs(generator, *shape):
    return 2.0 * torch.randint(2, shape, generator=generator) - 1


def _epilogues(generator, outputs, cols):
    spread = max(1, int(cols**0.5))
    threshold = torch.randint(-spread, spread + 1, (outputs,), generator=generator, dtype=torch.int32)
    flip = torch.randint(2, (outputs,), generator=generator).bool()
    scale, bias = torch.randn(2, outputs, generator=generator)
    return [None, Thresholds(threshold, flip), Scaled(scale, bias), Scaled(scale), Scaled(bias=bias), Scaled()]


# --- packing ---


@compiled
@given(ROWS, COLUMNS, SEEDS, st.booleans())
@few
def test_packed_signs_are_the_comparison(rows, cols, seed, with_threshold):
    generator = torch.Generator().manual_seed(seed)
    special = torch.tensor([0.0, -0.0, float("nan"), float("inf"), -float("inf"), 1e-45, -1e-45, 1.0, -1.0])
    x = torch.randn(rows, cols, generator=generator)
    odd = special[torch.randint(len(special), (rows, cols), generator=generator)]
    x = torch.where(torch.rand(rows, cols, generator=generator) < 0.3, odd, x)
    threshold = special[torch.randint(len(special), (cols,), generator=generator)] if with_threshold else None
    packed = everywhere(lambda: binary.pack_signs(x, threshold))
    assert packed.dtype == torch.int64 and packed.shape == (rows, binary.words(cols))
    assert torch.equal(packed, binary.pack_signs_reference(x, threshold))
    expected = x >= (0 if threshold is None else threshold)
    for r in range(min(rows, 3)):  # once more, by Python's integers
        value = sum((int(word) % 2**64) << (64 * j) for j, word in enumerate(packed[r]))
        assert value == sum(int(bit) << k for k, bit in enumerate(expected[r]))


def test_signs_of_zeros_and_of_nan():
    x = torch.tensor([0.0, -0.0, float("nan"), -1e-45, 1e-45])
    assert binary.pack_signs(x).tolist() == [0b10011]
    assert binary.unpack_signs(binary.pack_signs(x), 5).tolist() == [1, 1, -1, -1, 1]
    assert binary.pack_signs(torch.tensor([[float("nan"), 1.0]]), torch.tensor([0.0, float("nan")])).tolist() == [[0]]


def test_doubles_are_compared_before_they_are_rounded():
    x = torch.tensor([[-1e-300, 1e-300]], dtype=torch.float64)
    assert binary.pack_signs(x).tolist() == [[0b10]]
    threshold = torch.tensor([1e-300, 1e-300], dtype=torch.float64)
    assert binary.pack_signs(torch.zeros(1, 2), threshold).tolist() == [[0]]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.int8])
def test_other_types_are_packed_alike(dtype):
    x = torch.randint(-2, 3, (7, 70), generator=torch.Generator().manual_seed(0)).to(dtype)
    assert torch.equal(binary.pack_signs(x), binary.pack_signs_reference(x.float()))


@given(st.lists(st.integers(0, 4), max_size=3), COLUMNS, SEEDS)
@few
def test_unpacking_undoes_packing(shape, cols, seed):
    x = _signs(torch.Generator().manual_seed(seed), *shape, cols)
    assert torch.equal(binary.unpack_signs(binary.pack_signs(x), cols), x)


# --- linear ---


@compiled
@given(ROWS, OUTPUTS, COLUMNS, SEEDS)
@few
def test_linear(rows, outputs, cols, seed):
    generator = torch.Generator().manual_seed(seed)
    x, weight = _signs(generator, rows, cols), _signs(generator, outputs, cols)
    packed, packed_weight = binary.pack_signs(x), binary.pack_signs(weight)
    y = (x.double() @ weight.double().T).to(torch.int32)
    assert torch.equal(everywhere(lambda: binary.binary_linear(packed, packed_weight, cols)), y)
    assert torch.equal(binary.binary_linear_reference(packed, packed_weight, cols), y)
    for epilogue in _epilogues(generator, outputs, cols)[1:]:
        value = everywhere(lambda e=epilogue: binary.binary_linear(packed, packed_weight, cols, e))
        assert torch.equal(value, binary.apply_epilogue(y, epilogue)), epilogue
        assert torch.equal(value, binary.binary_linear_reference(packed, packed_weight, cols, epilogue))


@compiled
@pytest.mark.parametrize("rows", [3, 20])
def test_sums_beyond_16_bits(rows):
    """All bits differ, or none: the counts are as large as they get, in bytes, in 16 bits and beyond."""
    cols = 64 * 2100
    weight = torch.tensor([[0], [-1]]).expand(2, 2100)
    x = torch.zeros(rows, 2100, dtype=torch.int64)
    y = everywhere(lambda: binary.binary_linear(x, weight, cols))
    assert torch.equal(y, torch.tensor([cols, -cols], dtype=torch.int32).expand(rows, 2))


@compiled
def test_more_inputs_than_share_a_panel():
    generator = torch.Generator().manual_seed(0)
    x, weight = (torch.randint(-(2**63), 2**63 - 1, (n, 20), generator=generator) for n in (1100, 100))
    y = everywhere(lambda: binary.binary_linear(x, weight, 1280))
    assert torch.equal(y, binary.binary_linear_reference(x, weight, 1280))


def test_thresholds_take_every_integer():
    least, most = -(2**31), 2**31 - 1
    threshold = torch.tensor([least, most, least, most, 2, 3, 2, 3], dtype=torch.int32)
    flip = torch.tensor([False, False, True, True, False, False, True, True])
    x, weight = binary.pack_signs(torch.ones(1, 2)), binary.pack_signs(torch.ones(8, 2))  # y is 2
    packed = binary.binary_linear(x, weight, 2, Thresholds(threshold, flip))
    assert packed.tolist() == [[0b10011001]]


# --- convolution ---


@st.composite
def _convolutions(draw):
    groups = draw(st.sampled_from([1, 1, 2, 3]))
    shape = {
        "images": draw(st.integers(0, 3)),
        "channels": draw(st.sampled_from([1, 3, 64, 65, 100, 1000])),
        "per_group": draw(st.sampled_from([1, 3, 64, 70])),
        "kernel": (draw(st.integers(1, 4)), draw(st.integers(1, 4))),
        "stride": (draw(st.integers(1, 3)), draw(st.integers(1, 3))),
        "dilation": (draw(st.integers(1, 2)), draw(st.integers(1, 3))),
        "padding": (draw(st.integers(0, 3)), draw(st.integers(0, 5))),
    }
    reach = [shape["dilation"][i] * (shape["kernel"][i] - 1) + 1 - 2 * shape["padding"][i] for i in range(2)]
    shape["size"] = tuple(max(1, reach[i]) + draw(st.integers(0, 6)) for i in range(2))
    return groups, shape, draw(st.sampled_from([-1, 0])), draw(SEEDS)


@compiled
@given(_convolutions())
@settings(max_examples=60, deadline=None)
def test_convolution(drawn):
    groups, shape, padding_value, seed = drawn
    generator = torch.Generator().manual_seed(seed)
    x = _signs(generator, shape["images"], groups * shape["channels"], *shape["size"])
    weight = _signs(generator, groups * shape["per_group"], shape["channels"], *shape["kernel"])
    high, wide = shape["padding"]
    padded = F.pad(x, (wide, wide, high, high), value=float(padding_value))
    y = (
        F.conv2d(padded, weight, None, shape["stride"], 0, shape["dilation"], groups)
        .permute(0, 2, 3, 1)
        .to(torch.int32)
    )
    packed, filters = binary.pack_images(x, groups), binary.pack_filters(weight)
    arguments = (
        packed,
        filters,
        shape["channels"],
        shape["stride"],
        shape["padding"],
        shape["dilation"],
        padding_value,
    )
    assert torch.equal(everywhere(lambda: binary.binary_conv2d(*arguments)), y)
    assert torch.equal(binary.binary_conv2d_reference(*arguments), y)
    cols = shape["channels"] * shape["kernel"][0] * shape["kernel"][1]
    for epilogue in _epilogues(generator, len(weight), cols)[1:3]:
        value = everywhere(lambda e=epilogue: binary.binary_conv2d(*arguments, e))
        expected = binary.apply_epilogue(y, epilogue)
        assert torch.equal(value, expected.unsqueeze(3) if isinstance(epilogue, Thresholds) else expected)
        assert torch.equal(value, binary.binary_conv2d_reference(*arguments, epilogue))


@compiled
def test_a_larger_convolution():
    generator = torch.Generator().manual_seed(0)
    x, weight = _signs(generator, 2, 256, 28, 28), _signs(generator, 96, 256, 3, 3)
    packed, filters = binary.pack_images(x), binary.pack_filters(weight)
    y = everywhere(lambda: binary.binary_conv2d(packed, filters, 256, padding=1, padding_value=0))
    assert torch.equal(y, F.conv2d(x, weight, padding=1).permute(0, 2, 3, 1).to(torch.int32))


@compiled
def test_a_network_of_signs():
    """Two convolutions with batch norm and sign, then a linear layer: packed all the way, against float."""
    generator = torch.Generator().manual_seed(0)

    def norm(channels):
        values = [torch.randn(channels, generator=generator) for _ in range(4)]
        return [values[0], values[1].abs() + 0.1, values[2], values[3]]

    x = torch.randn(2, 3, 9, 9, generator=generator)
    first, second = _signs(generator, 70, 3, 3, 3), _signs(generator, 6, 70, 3, 3)
    last, norms = _signs(generator, 10, 6 * 25), [norm(70), norm(6)]

    def sign(z):
        return torch.where(z >= 0, 1.0, -1.0)

    y = sign(F.batch_norm(F.conv2d(sign(x), first), *norms[0]))
    y = sign(F.batch_norm(F.conv2d(y, second), *norms[1]))
    y = y.permute(0, 2, 3, 1).flatten(1) @ last.T
    folded = [binary.fold_batch_norm(None, *n) for n in norms]

    def packed():
        z = binary.binary_conv2d(binary.pack_images(x), binary.pack_filters(first), 3, epilogue=folded[0])
        z = binary.binary_conv2d(z, binary.pack_filters(second), 70, epilogue=folded[1])
        z = binary.pack_signs(binary.unpack_signs(z, 6).flatten(1))  # 6 of 64 bits in use: closed up
        return binary.binary_linear(z, binary.pack_signs(last), 150)

    assert torch.equal(everywhere(packed).float(), y)


# --- batch norm ---


def _bits(thresholds, y):
    return (y >= thresholds.threshold) != thresholds.flip


@given(SEEDS, st.booleans(), st.booleans(), st.sampled_from([1.0, 1e-3, 1e4]))
@few
def test_folded_batch_norm_is_the_sign_of_batch_norm(seed, scaled, affine, size):
    generator = torch.Generator().manual_seed(seed)
    channels, limit = 12, 300
    mean, weight, bias, scale = torch.randn(4, channels, generator=generator) * size
    var = torch.rand(channels, generator=generator) * size**2 + 1e-3
    if scaled:  # means that y reaches
        mean = mean * 30
    mean[:3] = torch.tensor([7.0, 0.0, -7.0])  # exactly at an integer
    bias[:4] = 0
    weight[3] = 0  # constant: the sign of the bias
    weight[4], bias[4], weight[5], bias[5] = 0, 1, 0, -1
    bias[6], bias[7] = 1e6, -1e6  # beyond what y reaches
    given = (scale if scaled else None, mean, var, weight if affine else None, bias if affine else None)
    thresholds = binary.fold_batch_norm(*given)
    y = torch.arange(-limit, limit + 1, dtype=torch.int32)[:, None].expand(-1, channels)
    z = y.float() * (scale if scaled else 1.0)
    for shaped in (z, z[:, :, None, None], z.T[None, :, :, None], z.contiguous()):  # torch has a path for each
        value = F.batch_norm(shaped, mean, var, *given[3:])
        value = value.squeeze(-1)[0].T if shaped.ndim == 4 and len(shaped) == 1 else value.reshape(len(y), channels)
        assert torch.equal(_bits(thresholds, y), value >= 0)


def test_folded_batch_norm_at_the_ends():
    """At all of int32: changes both ways, none at all, a negative scale under a negative weight."""
    ends = torch.tensor([-(2**31), -(2**31) + 1, -5, -4, -3, 3, 4, 5, 2**31 - 2, 2**31 - 1])
    zeros, ones = torch.zeros(8), torch.ones(8)
    mean = torch.tensor([-4.0, -4.0, -4.0, -4.0, 0.0, 0.0, 0.0, 0.0])
    weight = torch.tensor([1.0, -1.0, 1.0, -1.0, 0.0, 0.0, 0.0, -0.0])
    scale = torch.tensor([1.0, 1.0, -1.0, -1.0, 1.0, 1.0, 1.0, 1.0])
    bias = torch.tensor([0.0, 0.0, 0.0, 0.0, 1.0, -1.0, 0.0, -0.0])
    thresholds = binary.fold_batch_norm(scale, mean, ones, weight, bias)
    expected = [ends >= -4, ends <= -4, ends <= 4, ends >= 4, ends > ends - 1, ends > ends, *[ends > ends - 1] * 2]
    assert torch.equal(_bits(thresholds, ends[:, None].to(torch.int32)), torch.stack(expected, 1))
    huge = binary.fold_batch_norm(None, torch.tensor([2.0**31, -(2.0**31)]), ones[:2], ones[:2], zeros[:2])
    assert _bits(huge, torch.tensor([[-100], [100], [2**30]], dtype=torch.int32)).tolist() == [[False, True]] * 3


@pytest.mark.parametrize(
    "change",
    [{"mean": NAN}, {"bias": NAN}, {"weight": float("inf")}, {"var": -1.0}, {"var": -1e-5}, {"scale": 1e38}],
)
def test_no_thresholds_from_numbers_that_have_no_sign(change):
    numbers = {name: torch.ones(3) for name in ("scale", "mean", "var", "weight", "bias")}
    binary.fold_batch_norm(**numbers)
    for name, value in change.items():
        numbers[name][1] = value
    with pytest.raises(WeightError):
        binary.fold_batch_norm(**numbers)


# --- distances ---


def _random_words(generator, *shape):
    return torch.randint(-(2**63), 2**63 - 1, shape, generator=generator)


@compiled
@given(st.sampled_from([0, 1, 3, 9, 40]), st.sampled_from([0, 1, 64, 90]), st.sampled_from([0, 1, 5, 33]), SEEDS)
@few
def test_hamming_distances(n, m, words, seed):
    generator = torch.Generator().manual_seed(seed)
    x, y = _random_words(generator, n, words), _random_words(generator, m, words)
    differ = binary.unpack_signs(x, 64 * words)[:, None] != binary.unpack_signs(y, 64 * words)
    assert torch.equal(everywhere(lambda: binary.hamming_distances(x, y)), differ.sum(-1).to(torch.int32))


@compiled
@given(
    st.sampled_from([0, 1, 3, 20]),
    st.sampled_from([0, 2, 65]),
    st.integers(0, 4),
    st.integers(0, 4),
    st.integers(0, 3),
    SEEDS,
)
@few
def test_distances_of_several_planes(n, m, planes, others, words, seed):
    generator = torch.Generator().manual_seed(seed)
    x, y = _random_words(generator, n, planes, words), _random_words(generator, m, others, words)
    expected = torch.zeros(n, m, dtype=torch.int32)
    for i in range(planes):
        for j in range(others):
            expected += 2 ** (planes - 1 - i + others - 1 - j) * binary.hamming_distances(x[:, i], y[:, j])
    assert torch.equal(everywhere(lambda: binary.plane_distances(x, y)), expected)
    assert torch.equal(binary.plane_distances_reference(x, y), expected)


def test_distances_of_planes_are_inner_products():
    """BEBR: coordinates worth +-1 +-1/2. Columns beyond 50 are zero bits on both sides and never differ."""
    generator = torch.Generator().manual_seed(0)
    x, y = _signs(generator, 6, 2, 50), _signs(generator, 7, 2, 50)
    inner = (2 * x[:, 0] + x[:, 1]) @ (2 * y[:, 0] + y[:, 1]).T
    assert torch.equal((9 * 50 - inner) / 2, binary.plane_distances(binary.pack_signs(x), binary.pack_signs(y)).float())
