"""Packed twins with low memory multiply codes: convolutions, recurrent layers, look-ups, large dense weights."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import pennyweight.formats.dense16
import pennyweight.kernels.convolution
from pennyweight.formats import Binary, Codebook, Dense16, Integer
from pennyweight.kernels.convolution import _chunks
from pennyweight.layers import packed_convolution, packed_recurrent
from pennyweight.layers.packed import arrange, install
from pennyweight.layers.packed_convolution import RunningConvolution
from pennyweight.layers.sites import weight_sites

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


@pytest.fixture(autouse=True)
def small_layers_multiply(monkeypatch):
    """The rules that have small layers decode are about time; here everything that can multiply does."""
    monkeypatch.setattr(packed_convolution, "_LEAST_OUTPUTS", {True: 1, False: 1})
    monkeypatch.setattr(packed_recurrent, "_LEAST_WEIGHTS", 0)


def pack(module, group=0, bits=4):
    return {s.name: Integer.encode(s.matrix(), bits, group) for s in weight_sites(module)}


def twins(module, packed, activation_bits=16):
    """(the decoded weights in a plain module, the packed twin)"""
    plain = copy.deepcopy(module)
    for site in weight_sites(plain):
        site.parameter.data = site.to_parameter(packed[site.name].decode())
    return plain.eval(), install(copy.deepcopy(module), packed, "low", activation_bits).eval()


def close(found, expected, error=1e-4):
    """Within `error` of the largest value, which is what quantising to 16 bits bounds."""
    torch.testing.assert_close(found, expected, rtol=0, atol=error * max(float(expected.abs().max()), 1e-6))


@st.composite
def convolutions(draw):
    """(a convolution, an input of a size it takes)"""
    axes, groups = draw(st.integers(1, 3)), draw(st.sampled_from([1, 1, 2, 3]))
    kernel, stride, dilation = (tuple(draw(st.integers(1, most)) for _ in range(axes)) for most in (3, 2, 2))
    same = max(stride) == 1 and draw(st.booleans())
    padding = "same" if same else tuple(draw(st.integers(0, 2)) for _ in range(axes))
    mode = draw(st.sampled_from(["zeros", "zeros", "reflect", "replicate", "circular"]))
    size = [d * (k - 1) + 1 + draw(st.integers(2, 4)) for k, d in zip(kernel, dilation)]
    inputs, outputs = groups * draw(st.integers(1, 5)), groups * draw(st.integers(1, 5))
    torch.manual_seed(draw(st.integers(0, 9)))
    module = CONVOLUTIONS[axes - 1](
        inputs, outputs, kernel, stride, padding, dilation, groups, draw(st.booleans()), padding_mode=mode
    )
    batch = draw(st.sampled_from([[], [1], [3]]))
    return module, torch.randn(*batch, inputs, *size)


@settings(max_examples=60, deadline=None)
@given(convolutions(), st.sampled_from([0, 8, 16]), st.sampled_from([1, 40, 1 << 18]), st.booleans())
def test_convolutions_multiply_codes(case, group, floats_at_once, channels_last):
    module, x = case
    plain, low = twins(module, pack(module, group))
    if channels_last and x.ndim == 4:
        x = x.contiguous(memory_format=torch.channels_last)
    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr(pennyweight.kernels.convolution, "_PATCH_FLOATS", floats_at_once)
        patch.setattr(pennyweight.kernels.convolution, "_LEAST_PATCHES", 1)
        found, expected = low(x), plain(x)
    assert isinstance(low.running_weight(), RunningConvolution)
    close(found, expected)
    assert torch.equal(low.weight, plain.weight)  # decoded from what runs, bit for bit


def test_convolutions_of_signs_and_column_scales():
    module, x = nn.Conv2d(5, 6, 3), torch.randn(2, 5, 6, 6)
    codes = torch.randint(-300, 300, (6, 45)) // torch.where(torch.rand(6, 45) < 0.01, 1, 100)  # few beyond a byte
    uniform = {"scale_coding": "log8", "column_scale": torch.rand(45) + 0.1, "column_offset": torch.randn(45)}
    for weight in (
        Binary.encode(module.weight.detach().flatten(1), 0),
        Integer.from_codes(codes, torch.rand(6, 1), bits=10, group=0, **uniform),
    ):
        plain, low = twins(module, {"weight": weight})
        with torch.no_grad():
            close(low(x), plain(x))
        assert low.running_weight().positions_first
        assert torch.equal(low.weight, plain.weight)


@pytest.mark.parametrize("channels_last", [False, True])
def test_convolution_keeps_the_memory_format(channels_last):
    module, x = nn.Conv2d(4, 6, 3), torch.randn(2, 4, 7, 7)
    if channels_last:
        x = x.contiguous(memory_format=torch.channels_last)
    plain, low = twins(module, pack(module))
    with torch.no_grad():
        assert low(x).stride() == plain(x).stride()
        assert low(x[:0]).shape == (0, 6, 5, 5)
    assert low.bfloat16()(x.bfloat16()).dtype == torch.bfloat16


def test_one_by_one_kernels_copy_no_patches(monkeypatch):
    module, x = nn.Conv2d(8, 16, 1), torch.randn(2, 8, 5, 5).contiguous(memory_format=torch.channels_last)
    seen = []
    matrix = type(arrange(install(copy.deepcopy(module), pack(module), "low")).running_weight().parts[0])
    original = matrix.linear_into
    monkeypatch.setattr(matrix, "linear_into", lambda self, y, x, *rest: seen.append(x) or original(self, y, x, *rest))
    _, low = twins(module, pack(module))
    with torch.no_grad():
        low(x)
    assert [s.data_ptr() for s in seen] == [x.data_ptr()]


def test_working_memory_of_a_convolution_is_bounded(monkeypatch):
    monkeypatch.setattr(pennyweight.kernels.convolution, "_PATCH_FLOATS", 1000)
    module, x = nn.Conv2d(4, 6, 3), torch.randn(2, 4, 40, 40)
    _, low = twins(module, pack(module))
    seen = []
    matrix = type(arrange(low).running_weight().parts[0])
    original = matrix.linear_into
    monkeypatch.setattr(
        matrix, "linear_into", lambda self, y, x, *rest: seen.append(len(x)) or original(self, y, x, *rest)
    )
    with torch.no_grad():
        low(x)
    assert sum(seen) == 2 * 38 * 38 and max(seen) <= 96


def test_products_refuse_memory_that_does_not_fit():
    matrix = Integer.encode(torch.randn(6, 8), 4, 0).for_running().matrix
    x, y = torch.randn(2, 8), torch.empty(2, 6)
    for into, inputs, bias in (
        (y[:1], x, None),
        (y, x[:, :7], None),
        (y.T.contiguous().T, x, None),
        (y, x.double(), None),
        (y, x, torch.zeros(5)),
    ):
        with pytest.raises(ValueError, match=r"\[6, 8\]"):
            matrix.linear_into(into, inputs, bias, 16)


@given(st.lists(st.integers(1, 6), min_size=1, max_size=4), st.integers(1, 60))
def test_chunks_cover_every_position_once(sizes, most):
    count = torch.zeros(sizes, dtype=torch.int64)
    for chunk in _chunks(sizes, most):
        assert count[chunk].numel() <= most
        count[chunk] += 1
    assert bool((count == 1).all())


@pytest.mark.parametrize("group", [0, 8])
def test_gradient_crosses_a_convolution(group):
    module, x = nn.Conv2d(4, 6, 3, 2, 1, groups=2, padding_mode="circular"), torch.randn(2, 4, 7, 8)
    plain, low = twins(module, pack(module, group))
    towards = torch.randn(2, 6, 4, 4)
    found, expected = [], []
    for twin, gradients in ((low, found), (plain, expected)):
        leaf = x.clone().requires_grad_()
        (twin(leaf) * towards).sum().backward()
        gradients += [leaf.grad, twin.bias.grad]
    for one, other in zip(found, expected):
        close(one, other, 1e-5)


def test_rules_by_which_convolutions_decode(monkeypatch):
    monkeypatch.undo()
    for module, group, multiplies in (
        (nn.Conv2d(16, 128, 3), 0, True),
        (nn.Conv2d(16, 127, 3), 0, False),
        (nn.Conv2d(16, 511, 3), 16, False),
        (nn.Conv2d(16, 512, 3), 16, True),
        (nn.Conv2d(32, 128, 1), 16, True),  # one position: in order whatever shares scales
        (nn.Conv2d(128, 128, 3, groups=128), 0, False),
        (nn.Conv2d(8, 256, 3, groups=2), 0, True),
    ):
        _, low = twins(module, pack(module, group))
        assert isinstance(low.running_weight(), RunningConvolution) == multiplies, module


def test_inputs_of_32_bits_are_multiplied_exactly():
    module, x = nn.Conv2d(4, 6, 3), torch.randn(1, 4, 5, 5)
    plain, low = twins(module, pack(module), 32)
    arrange(low)
    with torch.no_grad():
        assert torch.equal(low(x), plain(x))
    assert not low._packed_parsed["weight"].runs


def test_convolutions_compile_and_export(tmp_path):
    module = nn.Sequential(nn.Conv2d(4, 6, 3, padding=1), nn.ReLU(), nn.Conv2d(6, 8, 2)).eval()
    x, packed = torch.randn(2, 4, 6, 6), pack(module)
    packed["2.weight"] = Integer.encode(module[2].weight.detach().flatten(1), 4, 8)
    _, low = twins(module, packed)
    arrange(low)
    with torch.no_grad():
        expected = low(x)
        torch.testing.assert_close(torch.compile(low, fullgraph=True, backend="aot_eager")(x), expected)
        sizes = ({0: torch.export.Dim("n", min=2)},)
        torch.export.save(torch.export.export(low, (x,), dynamic_shapes=sizes), tmp_path / "model.pt2")
        exported = torch.export.load(tmp_path / "model.pt2")
        torch.testing.assert_close(exported.module()(x[[0, 1, 0]]), expected[[0, 1, 0]])
    assert "pennyweight.integer_convolution" in " ".join(str(node.target) for node in exported.graph.nodes)


@pytest.mark.parametrize("group", [0, 8])
def test_operator_of_a_convolution_is_sound(group):
    module = nn.Conv2d(4, 6, (2, 3), 2, dilation=(2, 1))
    _, low = twins(module, pack(module, group))
    running = low.running_weight()
    window, (part,) = running.window, running.parts
    x = torch.randn(2, 4, 7, 8, requires_grad=True)
    sizes = (list(window.kernel), list(window.stride), list(window.dilation))
    torch.library.opcheck(
        torch.ops.pennyweight.integer_convolution.default, (x, *part.arguments(), *sizes, running.positions_first, 16)
    )


def recurrent_layers():
    yield "lstm", nn.LSTM(9, 12)
    yield "lstm of two layers, both ways", nn.LSTM(9, 12, 2, bidirectional=True, dropout=0.5)
    yield "lstm with projections", nn.LSTM(9, 12, 2, proj_size=5, bidirectional=True, batch_first=True)
    yield "lstm without biases", nn.LSTM(9, 12, bias=False)
    yield "gru", nn.GRU(9, 12, 2, bidirectional=True)
    yield "gru without biases", nn.GRU(9, 12, bias=False, batch_first=True)
    yield "rnn", nn.RNN(9, 12, 2)
    yield "rnn of relu", nn.RNN(9, 12, nonlinearity="relu", bidirectional=True, batch_first=True)


RECURRENT = [pytest.param(module, id=name) for name, module in recurrent_layers()]


@pytest.mark.parametrize("activation_bits", [16, 8])
@pytest.mark.parametrize("shape", [(5, 3), (5,), (1, 1)])
@pytest.mark.parametrize("module", RECURRENT)
def test_recurrent_layers_multiply_codes(module, shape, activation_bits):
    plain, low = twins(module, pack(module, 8), activation_bits)
    x = torch.randn(*shape, 9)
    count = module.num_layers * (1 + module.bidirectional)
    batch = [] if len(shape) == 1 else [shape[0 if module.batch_first else 1]]
    state = [torch.randn(count, *batch, size) for size in low._state_sizes]
    for start in (None, tuple(state) if len(state) == 2 else state[0]):
        with torch.no_grad():
            assert low._runs_on_codes(x, start)
            (found, found_end), (expected, expected_end) = low(x, start), plain(x, start)
        error = 1e-3 if activation_bits == 16 else 0.1
        ends = [(found_end, expected_end)] if len(state) == 1 else list(zip(found_end, expected_end))
        for one, other in [(found, expected), *ends]:
            close(one, other, error)
            assert one.shape == other.shape


def test_recurrent_layers_decode_where_codes_do_not_serve():
    module, x = nn.LSTM(9, 12, 2, dropout=0.5), torch.randn(5, 3, 9)
    plain, low = twins(module, pack(module))
    with torch.no_grad():
        assert low._runs_on_codes(x, None)
        sequence = nn.utils.rnn.pack_sequence([x[:, 0], x[:3, 1]])
        torch.testing.assert_close(low(sequence)[0].data, plain(sequence)[0].data)
        assert low.train()(x)[0].shape == (5, 3, 12) and not low._runs_on_codes(x, None)
        assert low.eval().double()(x.double())[0].dtype == torch.float64
        with pytest.raises(RuntimeError, match=r"input.size"):
            low.float()(x[..., :8])
        with pytest.raises(RuntimeError, match="Expected hidden"):
            low(x, (torch.zeros(2, 2, 12), torch.zeros(2, 2, 12)))
    leaf, other = x.clone().requires_grad_(), x.clone().requires_grad_()
    low(leaf)[0].sum().backward()
    plain(other)[0].sum().backward()
    torch.testing.assert_close(leaf.grad, other.grad)
    torch.testing.assert_close(low.bias_hh_l0.grad, plain.bias_hh_l0.grad)


def test_small_states_and_long_sequences_decode(monkeypatch):
    monkeypatch.undo()
    for hidden, steps, multiplies in ((255, 1, False), (256, 64, True), (256, 65, False), (512, 65, True)):
        module = nn.LSTM(4, hidden)
        low = install(module, pack(module), "low").eval()
        with torch.no_grad():
            assert low._runs_on_codes(torch.randn(steps, 1, 4), None) == multiplies


def tables():
    table = torch.randn(30, 24)
    for bits in (2, 3, 8, 12):
        for group in (0, 8, 10):
            yield f"int{bits} {group}", Integer.encode(table, bits, group)
    yield "symmetric", Integer.encode(table, 4, 8, symmetric=True)
    yield "binary", Binary.encode(table, 8)
    yield "dense16", Dense16.encode(table)
    yield "codebook", Codebook.from_codes(torch.randint(4, (30, 12)), torch.randn(4, 2), cols=24)


@pytest.mark.parametrize("count", [1, 5, 400])
@pytest.mark.parametrize("weight", [pytest.param(weight, id=name) for name, weight in tables()])
def test_look_ups_are_the_decoded_rows(weight, count, monkeypatch):
    index = torch.randint(30, (count, 2))
    layer = install(nn.Embedding(30, 24), {"weight": weight}, "low")
    expected = weight.decode()[index]
    monkeypatch.setattr(type(weight), "decode", lambda self: pytest.fail("the table was decoded"))
    assert torch.equal(layer(index), expected)
    assert torch.equal(layer(index.int()), expected)
    assert torch.equal(weight.rows(index - 30), expected)  # from the end, as torch counts


def test_large_dense_weights_are_never_widened_as_a_whole(monkeypatch):
    monkeypatch.setattr(pennyweight.formats.dense16, "_LARGE", 100)
    monkeypatch.setattr(pennyweight.formats.dense16, "_CHUNK", 100)
    monkeypatch.setattr(pennyweight.formats.dense16, "_LEAST_ROWS", 3)
    weight, bias, x = torch.randn(20, 30), torch.randn(20), torch.randn(2, 5, 30, requires_grad=True)
    packed = Dense16.encode(weight)
    sizes = []
    monkeypatch.setattr(F, "linear", lambda x, w, b=None, original=F.linear: sizes.append(len(w)) or original(x, w, b))
    y = packed.linear(x, bias)
    torch.testing.assert_close(y, x @ packed.decode().T + bias)
    assert max(sizes) == 3 and sum(sizes) == 20
    torch.testing.assert_close(torch.autograd.grad(y.sum(), x)[0], packed.decode().sum(0).expand(2, 5, 30))
