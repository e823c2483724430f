"""The cost table: multiply-accumulates against hand computation and brute force, published figures, ratios."""

from __future__ import annotations

import functools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils import parametrize

from pennyweight.cost import CostTable, cost_table
from pennyweight.errors import DataError, PlanError, WeightError
from pennyweight.formats import Integer
from pennyweight.layers.activation_quantizer import ActivationQuantizer, attach_input_quantizer
from pennyweight.layers.packed import install
from pennyweight.layers.precision import Precision
from pennyweight.models import bert_tiny, pokebnn, reactnet, resnet_cifar, vision_transformer
from pennyweight.training.prepare import prepare
from pennyweight.training.recipe import preset

FLOAT16 = Precision(16, 16)
BINARY = Precision(1, 1)


def single(layer: nn.Module, *inputs: torch.Tensor) -> int:
    (row,) = cost_table(layer, (inputs,)).layers
    return row.macs


@settings(max_examples=20, deadline=None)
@given(
    st.sampled_from([1, 2, 3]),
    st.integers(1, 3),
    st.integers(1, 2),
    st.integers(0, 1),
    st.integers(1, 2),
    st.sampled_from([1, 2]),
    st.booleans(),
)
def test_convolution_macs_are_the_taps_it_multiplies(dims, kernel, stride, padding, dilation, groups, transposed):
    name = f"Conv{'Transpose' if transposed else ''}{dims}d"
    padding = min(padding, kernel // 2)
    layer = getattr(nn, name)(4, 6, kernel, stride, padding, groups=groups, bias=False, dilation=dilation)
    x = torch.zeros(2, 4, *[7] * dims)
    out = layer(x)
    per_position = layer.weight.numel()  # each input (transposed) or output position meets every weight once
    positions = (x.numel() // 4 if transposed else out.numel() // 6) // 2
    assert single(layer, x) == positions * per_position


def test_linear_recurrent_embedding():
    assert single(nn.Linear(5, 7), torch.zeros(3, 4, 5)) == 4 * 35
    lstm = nn.LSTM(5, 6, num_layers=2, bidirectional=True, batch_first=True)
    by_hand = 2 * 4 * 6 * (5 + 6) + 2 * 4 * 6 * (12 + 6)
    assert single(lstm, torch.zeros(3, 4, 5)) == 4 * by_hand
    assert single(nn.GRUCell(5, 6), torch.zeros(3, 5)) == 3 * 6 * (5 + 6)
    assert single(nn.Embedding(11, 4), torch.zeros(3, 4, dtype=torch.long)) == 0


@pytest.mark.parametrize("sizes", [{}, {"kdim": 3, "vdim": 5}])
def test_torch_attention_counts_its_four_layers_and_two_products(sizes):
    class Attend(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = nn.MultiheadAttention(8, 2, batch_first=True, **sizes)

        def forward(self, query, key, value):
            return self.attention(query, key, value, need_weights=False)[0]

    key, value = torch.zeros(3, 6, sizes.get("kdim", 8)), torch.zeros(3, 6, sizes.get("vdim", 8))
    table = cost_table(Attend(), ((torch.zeros(3, 4, 8), key, value),))
    assert [(row.name, row.kind) for row in table.layers] == [
        ("attention", "attention"),
        ("attention.products", "product"),
    ]
    layers, products = table.layers
    assert layers.macs == 8 * (4 * 8 + 6 * key.shape[2] + 6 * value.shape[2] + 4 * 8)
    assert layers.weights == 8 * (8 + key.shape[2] + value.shape[2] + 8)
    assert products.macs == 2 * 4 * 6 * 8
    assert table.parameters == sum(p.numel() for p in Attend().parameters())


def test_fast_path_of_torch_transformers_hides_nothing():
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    table = cost_table(layer, torch.zeros(3, 5, 8))
    assert table.macs == 5 * (4 * 64 + 2 * 8 * 16) + 2 * 5 * 5 * 8
    assert torch.backends.mha.get_fastpath_enabled()


def test_own_attention_products_by_name():
    model = vision_transformer.vit_tiny()
    table = cost_table(model, torch.zeros(1, 3, 32, 32))
    products = {row.name: row.macs for row in table.layers if row.kind == "product"}
    assert len(products) == 12
    assert set(products.values()) == {65 * 65 * 96}
    layers = {row.name: row.macs for row in table.layers}
    assert layers["patches"] == 64 * 96 * 3 * 16
    assert layers["blocks.3.attention.query"] == 65 * 96 * 96
    assert layers["blocks.3.mlp.output"] == 65 * 4 * 96 * 96
    assert layers["head"] == 96 * 10


def test_macs_are_per_sample_and_do_not_depend_on_the_batch():
    model = bert_tiny.bert_tiny(vocabulary=50)
    ids = torch.zeros(6, 9, dtype=torch.long)
    one, six = cost_table(model, ids[:1]), cost_table(model, ids)
    assert one == six
    assert one.macs == 2 * (9 * 128 * 128 * (4 + 8) + 2 * 9 * 9 * 128) + 128 * 128 + 128 * 2


def test_layer_used_twice_and_layer_in_an_uncalled_list():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.parts = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])

        def forward(self, x):
            return self.parts[0](self.parts[0](x)) @ x.T

    table = cost_table(Twice(), torch.zeros(1, 4))
    assert {row.name: row.macs for row in table.layers} == {"": 4, "parts.0": 32, "parts.1": 0}


def test_tied_weights_are_one_parameter_and_two_multiplications():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.words, self.head = nn.Embedding(11, 4), nn.Linear(4, 11)
            self.head.weight = self.words.weight

        def forward(self, ids):
            return self.head(self.words(ids))

    table = cost_table(Tied(), torch.zeros(2, 3, dtype=torch.long), {"*": BINARY})
    assert table.parameters == 44 + 11
    assert [row.weights for row in table.layers] == [44, 0]
    assert [row.macs for row in table.layers] == [0, 3 * 44]


# ---------------------------------------------------------------------------------------------------- published figures


def test_reactnet_costs_what_the_papers_say():
    with torch.device("meta"):
        model, x = reactnet.reactnet(), torch.empty(1, 3, 224, 224)
    table = cost_table(model, x, {"stem": FLOAT16, "head": FLOAT16, "*": BINARY})
    binary, real = table.macs_by_precision()["1-bit x 1-bit"], table.macs_by_precision()["16-bit x 16-bit"]
    assert round(binary / 1e9, 2) == 4.82 and round(real / 1e8, 2) == 0.12  # ReActNet, table 1: BOPs and FLOPs
    assert round(table.operations / 1e8, 2) == 0.87  # the same: OPs
    assert round(table.ace / 1e9, 1) == 7.9  # PokeBNN's abstract


@pytest.mark.parametrize(
    ("variant", "giga"),
    [
        ("0.5x", 1.410),
        ("0.75x", 2.588),
        ("1.0x", 4.223),
        ("1.25x", 6.314),
        ("1.4x", 7.758),
        ("1.5x", 8.863),
        ("1.75x", 11.868),
        ("2.0x", 15.331),
    ],
)
def test_pokebnn_ace_of_every_variant(variant, giga):
    assert round(pokebnn_table(variant).ace / 1e9, 3) == giga


@functools.cache
def pokebnn_table(variant: str) -> CostTable:
    with torch.device("meta"):
        model, x = pokebnn.pokebnn(variant), torch.empty(1, 3, 224, 224)
    return cost_table(model, x, pokebnn.precision(model))


def test_pokebnn_at_width_one_to_the_last_digit():
    table = pokebnn_table("1.0x")
    head = table.layers[-1]
    assert (head.name, head.ace) == ("head", 131_072_000)
    assert table.ace - head.ace == 4_091_469_824
    assert table.weights_by_precision() == {
        "1-bit x 1-bit": 20_676_608,
        "4-bit x 4-bit": 3_632_640,
        "8-bit x 8-bit": 2_050_112,
    }
    assert table.macs_by_precision()["1-bit x 1-bit"] == 3_609_460_736
    packed = sum(row.weights * row.precision.weight for row in table.layers) / 8
    assert round(packed / 1e6, 2) == 6.45


# --------------------------------------------------------------------------------------------------- ratios and choices


def ten(bits: Precision, real: int) -> CostTable:
    """100 parameters and 100 multiplications, `real` of them real."""
    model = nn.ModuleDict({"binary": nn.Linear(1, 100 - real, bias=False), "real": nn.Linear(1, real, bias=False)})
    forward = nn.Sequential(*model.values())
    forward.forward = lambda x: [layer(x) for layer in model.values()]
    return cost_table(forward, torch.zeros(1, 1), {"0": bits})


def test_ratios_of_bibench():
    table = ten(BINARY, 10)
    assert math.isclose(table.compression, 7.804878, rel_tol=1e-6)
    assert math.isclose(table.speedup, 8.767123, rel_tol=1e-6)
    real = ten(Precision(), 10)
    assert real.compression == real.speedup == 1
    assert real.operations == real.macs == 100


@given(st.integers(1, 32), st.integers(1, 32))
@settings(max_examples=25, deadline=None)
def test_operations_are_never_more_than_real_ones(weight, inputs):
    table = cost_table(nn.Linear(3, 5, bias=False), torch.zeros(1, 3), {"*": Precision(weight, inputs)})
    assert table.ace == 15 * weight * inputs
    assert table.operations == pytest.approx(15 * min(1, weight * inputs / 64))
    assert table.nbytes == math.ceil(15 * weight / 8)


def test_first_pattern_wins_and_a_wrong_one_is_named():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    table = cost_table(model, torch.zeros(1, 2), {"1": Precision(8, 8), "*": BINARY})
    assert [row.precision for row in table.layers] == [BINARY, Precision(8, 8)]
    with pytest.raises(PlanError, match=r"'head' matches no layer; there are: 0, 1"):
        cost_table(model, torch.zeros(1, 2), {"head": BINARY})


def test_layers_say_their_own_bits():
    class FourBits(nn.Module):
        bits = 4

        def forward(self, weight):
            return weight

    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    attach_input_quantizer(model[0], ActivationQuantizer(2))
    parametrize.register_parametrization(model[1], "weight", FourBits())
    plain = cost_table(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), torch.zeros(1, 4))
    table = cost_table(model, torch.zeros(1, 4))
    assert [row.precision for row in table.layers] == [Precision(32, 2), Precision(4, 32)]
    assert [row.macs for row in table.layers] == [row.macs for row in plain.layers]
    assert [row.weights for row in table.layers] == [16, 16]
    assert table.parameters == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize(("method", "bits"), [("reste", 1), ("fda", 1), ("dorefa-2", 2)])
def test_a_prepared_network_costs_what_its_recipe_makes_of_it(method, bits):
    make = functools.partial(resnet_cifar.resnet20, width=8, activation="hardtanh")
    model = prepare(make(), preset(method))
    by_hand = {"conv1": Precision(), "linear": Precision(), "*": Precision(bits, bits)}
    table, expected = (cost_table(m, torch.zeros(1, 3, 8, 8), p) for m, p in ((model, None), (make(), by_hand)))
    assert [(row.name, row.macs, row.weights, row.precision) for row in table.layers] == [
        (row.name, row.macs, row.weights, row.precision) for row in expected.layers
    ]
    assert method == "dorefa-2" or table.parameters == expected.parameters  # FDA's noise goes when training has ended


def test_refusals_and_what_is_left_as_it_was():
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    model[0].eval()
    with pytest.raises(DataError):
        cost_table(model, torch.full((1, 4), torch.nan))
    cost_table(model, torch.ones(3, 4))
    assert model.training and not model[0].training and not model[0]._forward_hooks
    assert model[1].num_batches_tracked == 0
    install(model, {"0.weight": Integer.encode(model[0].weight.detach(), 4, 4)})
    with pytest.raises(WeightError, match="0 is packed"):
        cost_table(model, torch.ones(3, 4))
    with pytest.raises(ValueError, match="weight bits"):
        Precision(0, 1)


def test_table_prints_and_goes_to_json():
    table = cost_table(nn.Sequential(nn.Linear(2, 3)), torch.zeros(1, 2))
    assert "32-bit x 32-bit" in str(table)
    values = table.to_dict()
    assert values["macs"] == 6 and values["nbytes"] == 36 and values["layers"][0]["ace"] == 6 * 1024
