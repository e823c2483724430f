"""Packed twins: same outputs as the module with decoded weights, and the life of a module around them."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from pennyweight.errors import UnknownNameError, WeightError
from pennyweight.formats import Dense16, Integer, LowRank
from pennyweight.layers.packed import PackedModule, arrange, install, packed_blobs, packed_weights
from pennyweight.layers.sites import weight_sites

torch.manual_seed(0)


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(11, 6, padding_idx=0)
        self.block = nn.Linear(6, 6)
        self.head = nn.Linear(6, 11)
        self.head.weight = self.embedding.weight

    def forward(self, x):
        return self.head(torch.tanh(self.block(self.embedding(x))))


class Attention(nn.Module):
    def __init__(self, **options):
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True, **options)

    def forward(self, x):
        k = x[..., : self.attention.kdim]
        return self.attention(x, k, x[..., : self.attention.vdim])[0]


class Cells(nn.Module):
    def __init__(self):
        super().__init__()
        self.lstm, self.gru, self.rnn = nn.LSTMCell(4, 5), nn.GRUCell(4, 5), nn.RNNCell(4, 5)

    def forward(self, x):
        return torch.cat([*self.lstm(x), self.gru(x), self.rnn(x)], -1)


class Scaled(nn.Linear):
    def forward(self, x):
        return F.linear(x, self.weight * 2, self.bias)


class FirstOutput(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return self.inner(x)[0]


def cases():
    yield "linear", nn.Linear(7, 5), torch.randn(3, 7)
    yield "scaled", Scaled(7, 5, bias=False), torch.randn(3, 7)
    yield "embedding", nn.Embedding(13, 5), torch.tensor([[1, 12, 0], [1, 1, 3]])
    yield "embedding max_norm", nn.Embedding(13, 5, max_norm=0.5), torch.tensor([[1, 12, 0], [1, 1, 3]])
    yield "bag", nn.EmbeddingBag(13, 5, mode="mean", padding_idx=1), torch.tensor([[1, 12, 0], [2, 1, 3]])
    yield "conv1d", nn.Conv1d(4, 6, 3, groups=2, padding_mode="reflect", padding=1), torch.randn(2, 4, 9)
    yield "conv2d", nn.Conv2d(4, 4, (3, 2), groups=4), torch.randn(2, 4, 7, 6)
    yield "conv3d", nn.Conv3d(2, 3, 2, bias=False), torch.randn(1, 2, 4, 4, 4)
    yield "convt1d", nn.ConvTranspose1d(4, 6, 3, groups=2), torch.randn(2, 4, 5)
    yield "convt2d", nn.ConvTranspose2d(3, 5, 3, stride=2), torch.randn(2, 3, 4, 4)
    yield "convt3d", nn.ConvTranspose3d(4, 4, 2, groups=4), torch.randn(1, 4, 3, 3, 3)
    yield "lstm", FirstOutput(nn.LSTM(4, 6, 2, bidirectional=True, proj_size=3)), torch.randn(5, 2, 4)
    yield "gru", FirstOutput(nn.GRU(4, 6, 2, batch_first=True)), torch.randn(5, 2, 4)
    yield "rnn", FirstOutput(nn.RNN(4, 6, bias=False)), torch.randn(5, 2, 4)
    yield "cells", Cells(), torch.randn(2, 4)
    yield "attention", Attention(), torch.randn(2, 3, 8)
    yield "cross", Attention(kdim=5, vdim=3), torch.randn(2, 3, 8)
    yield "encoder", nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), torch.randn(2, 3, 8)
    yield "tied", Tied(), torch.tensor([[1, 2, 10]])


CASES = [pytest.param(module, x, id=name) for name, module, x in cases()]


def pack(model):
    """A packed weight for every site: coarse integers, so that a forgotten replacement shows."""
    return {s.name: Integer.encode(s.matrix(), 4, 0) for s in weight_sites(model)}


def with_decoded(model, packed):
    """The reference: the plain model holding the decoded values."""
    model = copy.deepcopy(model)
    for site in weight_sites(model):
        site.parameter.data = site.to_parameter(packed[site.name].decode())
    return model.eval()


@pytest.mark.parametrize(
    ("memory", "activation_bits", "error"), [("fast", 16, 1e-6), ("low", 32, 1e-6), ("low", 16, 1e-4)]
)
@pytest.mark.parametrize(("module", "x"), CASES)
def test_same_output_as_decoded(module, x, memory, activation_bits, error):
    packed = pack(module)
    expected = with_decoded(module, packed)(x)
    assert not torch.allclose(expected, copy.deepcopy(module).eval()(x))
    model = install(copy.deepcopy(module), packed, memory, activation_bits).eval()
    for _ in range(2):  # before and after the decoded weight is kept
        torch.testing.assert_close(model(x), expected, rtol=error, atol=error)
    torch.testing.assert_close(copy.deepcopy(model)(x), expected, rtol=error, atol=error)
    assert packed_weights(model).keys() == packed.keys()
    assert weight_sites(model) == []


@pytest.mark.parametrize(("module", "x"), CASES)
def test_state_dict_is_original_names_and_blobs(module, x):
    packed = pack(module)
    model = install(copy.deepcopy(module), packed)
    model(x)
    state = model.state_dict()
    assert state.keys() == module.state_dict().keys()
    for name, weight in packed.items():
        assert state[name].dtype == torch.uint8
        assert bytes(state[name].numpy()) == weight.to_bytes()
    other = install(copy.deepcopy(module), {n: Dense16.encode(torch.zeros(w.shape)) for n, w in packed.items()})
    other(x)  # keeps decoded zeros, which loading must drop
    other.load_state_dict(state)
    torch.testing.assert_close(other.eval()(x), model.eval()(x), rtol=0, atol=0)


def test_looks_like_the_original():
    linear = install(nn.Linear(7, 5), {"weight": Integer.encode(torch.randn(5, 7), 3, 4)})
    assert isinstance(linear, nn.Linear) and isinstance(linear, PackedModule)
    assert (linear.in_features, linear.weight.dtype, tuple(linear.weight.shape)) == (7, torch.float32, (5, 7))
    assert type(linear).__name__ == "PackedLinear"
    assert [name for name, _ in linear.named_parameters()] == ["bias"]
    assert "weight=" in repr(linear)


@pytest.mark.parametrize("memory", ["fast", "low"])
def test_gradient_flows_to_input_only(memory):
    weight = Integer.encode(torch.randn(5, 7), 3, 4)
    linear = install(nn.Linear(7, 5), {"weight": weight}, memory)
    x = torch.randn(2, 7, requires_grad=True)
    linear(x).sum().backward()
    torch.testing.assert_close(x.grad, weight.decode().sum(0).expand(2, 7))
    assert not linear.weight.requires_grad


def test_inference_mode_first_then_training():
    """A weight decoded in inference mode must not poison later backward passes."""
    linear = install(nn.Linear(7, 5), {"weight": Dense16.encode(torch.randn(5, 7))})
    with torch.inference_mode():
        linear(torch.randn(2, 7))
    x = torch.randn(2, 7, requires_grad=True)
    linear(x).sum().backward()
    assert x.grad is not None


@pytest.mark.parametrize(("module", "x"), CASES)
def test_dtype_moves_leave_blobs_alone(module, x):
    packed = pack(module)
    model = install(copy.deepcopy(module), packed).eval()
    before = model(x)
    model.bfloat16()
    y = model(x.bfloat16() if x.is_floating_point() else x)
    assert y.dtype == torch.bfloat16
    assert {n[0]: b for n, b in packed_blobs(model).items()} == {n: w.to_bytes() for n, w in packed.items()}
    model.float()
    for name, parameter in copy.deepcopy(module).named_parameters():  # bf16 has rounded biases: put them back
        if name in dict(model.named_parameters()):
            dict(model.named_parameters())[name].data.copy_(parameter)
    torch.testing.assert_close(model(x), before, rtol=0, atol=0)  # weights were decoded anew, not widened


def test_fast_memory_decodes_once_and_drops_the_parsed_form():
    layer = install(nn.Linear(7, 5), {"weight": Integer.encode(torch.randn(5, 7), 3, 4)})
    layer(torch.randn(1, 7))
    assert layer._packed_parsed == {}
    kept = layer.weight_decoded
    layer(torch.randn(1, 7))
    assert layer.weight.data_ptr() == kept.data_ptr()


def test_low_memory_keeps_nothing_decoded():
    for _, module, x in cases():
        model = install(copy.deepcopy(module), pack(module), "low").eval()
        model(x)
        for name, buffer in model.named_buffers():
            assert not name.endswith("_decoded") or buffer.numel() == 0, name


def test_embedding_never_decodes_the_table():
    class Watched(Dense16):
        def decode(self):
            raise AssertionError("decoded")

    for layer in (nn.Embedding(9, 4), nn.EmbeddingBag(9, 4)):
        install(layer, {"weight": Dense16.encode(torch.randn(9, 4))})
        layer.packed_weight("weight").__class__ = Watched
        assert layer(torch.tensor([[3, 8]])).shape[-1] == 4
        assert layer.weight_decoded.numel() == 0


def test_embedding_index_out_of_range():
    layer = install(nn.Embedding(9, 4), {"weight": Integer.encode(torch.randn(9, 4), 4)})
    for index in (9, -1):
        with pytest.raises(IndexError):
            layer(torch.tensor([index]))


def test_empty_bag():
    layer = install(nn.EmbeddingBag(9, 4), {"weight": Dense16.encode(torch.randn(9, 4))})
    assert layer(torch.tensor([], dtype=torch.long), torch.tensor([0])).tolist() == [[0.0] * 4]


def test_tied_weights_share_one_blob():
    model = Tied()
    packed = Integer.encode(model.embedding.weight.detach(), 4, 0)
    for name in ("embedding.weight", "head.weight"):  # either name will do
        tied = install(copy.deepcopy(model), {name: packed})
        assert tied.embedding._buffers["weight"] is tied.head._buffers["weight"]
        moved = copy.deepcopy(tied).double().float()
        assert moved.embedding._buffers["weight"] is moved.head._buffers["weight"]
        assert list(packed_blobs(moved)) == [("embedding.weight", "head.weight")]
        moved.load_state_dict(tied.state_dict())
        assert list(packed_blobs(moved)) == [("embedding.weight", "head.weight")]
        assert list(packed_weights(tied)) == ["embedding.weight"]


def test_replacing_a_packed_weight():
    model = install(Tied(), {"embedding.weight": Dense16.encode(torch.zeros(11, 6))})
    x = torch.tensor([[1, 2]])
    model(x)
    weight = torch.randn(11, 6).half().float()
    install(model, {"head.weight": Dense16.encode(weight)})
    assert torch.equal(model.embedding(x), weight[x])
    assert torch.equal(model.head.weight, weight)


def test_pickles_within_python():
    model = install(nn.LSTM(3, 4), {"weight_ih_l0": Dense16.encode(torch.randn(16, 3))})
    again = pickle.loads(pickle.dumps(model))
    x = torch.randn(5, 1, 3)
    torch.testing.assert_close(again(x)[0], model(x)[0], rtol=0, atol=0)


def test_partial_packing_and_train_mode():
    model = install(Tied(), {"block.weight": Dense16.encode(torch.randn(6, 6))}).train()
    assert model.block.training
    loss = model(torch.tensor([[1, 2]])).sum()
    loss.backward()
    assert model.head.weight.grad is not None
    assert [site.name for site in weight_sites(model)] == ["embedding.weight"]


def test_low_memory_linear_multiplies_in_the_format():
    left, right = torch.randn(5, 2), torch.randn(2, 7)
    packed = LowRank.from_factors(Dense16.encode(left), Dense16.encode(right))
    linear = install(nn.Linear(7, 5), {"weight": packed}, "low")
    x = torch.randn(3, 7)
    torch.testing.assert_close(linear(x), F.linear(x, packed.decode(), linear.bias), rtol=1e-5, atol=1e-5)


def test_errors_leave_the_model_alone():
    model = Tied()
    good = Dense16.encode(torch.zeros(6, 6))
    with pytest.raises(UnknownNameError, match=r"blok\.weight"):
        install(model, {"block.weight": good, "blok.weight": good})
    with pytest.raises(WeightError, match=r"head.weight: .*\[6, 6\].*\[11, 6\]"):
        install(model, {"block.weight": good, "head.weight": good})
    with pytest.raises(ValueError, match="memory"):
        install(model, {"block.weight": good}, "huge")  # type: ignore[arg-type]
    assert packed_weights(model) == {}


def test_foreign_state_dict_is_refused():
    model = install(nn.Linear(7, 5), {"weight": Dense16.encode(torch.zeros(5, 7))})
    with pytest.raises(RuntimeError, match="size mismatch for weight"):
        model.load_state_dict(nn.Linear(7, 5).state_dict())


class Mixed(nn.Module):
    """A layer of each kind that decodes, looks up or multiplies."""

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(30, 12)
        self.convolution = nn.Conv1d(12, 8, 3, padding=1)
        self.head = nn.Linear(8, 5)

    def forward(self, index):
        x = self.convolution(self.table(index).transpose(1, 2)).relu()
        return self.head(x.transpose(1, 2))


@pytest.mark.parametrize("memory", ["fast", "low"])
def test_compile_and_export_without_a_break(memory, tmp_path):
    module, index = Mixed().eval(), torch.randint(30, (3, 7))
    model = arrange(install(copy.deepcopy(module), pack(module), memory))
    with torch.no_grad():
        expected = model(index)
        torch.testing.assert_close(torch.compile(model, fullgraph=True, backend="aot_eager")(index), expected)
        sizes = ({0: torch.export.Dim("n", min=2)},)
        torch.export.save(torch.export.export(model, (index,), dynamic_shapes=sizes), tmp_path / "model.pt2")
    exported = torch.export.load(tmp_path / "model.pt2")
    torch.testing.assert_close(exported.module()(index), expected)
    torch.testing.assert_close(exported.module()(index[:2]), expected[:2])
    called = " ".join(str(node.target) for node in exported.graph.nodes)
    assert "pennyweight.rows" in called and "pennyweight.decode" in called
    assert ("pennyweight.integer_linear" in called) == (memory == "low")
    assert exported.state_dict["table.weight"].dtype == torch.uint8
    with pytest.raises(IndexError, match="30"):
        exported.module()(torch.full((2, 7), 30))


def test_recurrent_layers_compile():
    module, x = nn.LSTM(6, 5, batch_first=True).eval(), torch.randn(2, 4, 6)
    model = install(copy.deepcopy(module), pack(module), "low")
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(model, backend="aot_eager")(x)[0], model(x)[0])
