"""Weight sites: which parameters are found, and that the matrix view means what it says."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from pennyweight.layers.sites import weight_sites

torch.manual_seed(0)


def only(module: nn.Module):
    (site,) = weight_sites(module)
    return site


@pytest.mark.parametrize(
    ("module", "shape", "kind"),
    [
        (nn.Linear(5, 3), (3, 5), "linear"),
        (nn.Embedding(7, 4), (7, 4), "embedding"),
        (nn.EmbeddingBag(7, 4), (7, 4), "embedding"),
        (nn.Conv1d(4, 6, 3, groups=2), (6, 6), "conv"),
        (nn.Conv2d(4, 6, (3, 2), padding_mode="circular"), (6, 24), "conv"),
        (nn.Conv3d(2, 3, 2), (3, 16), "conv"),
        (nn.Conv2d(4, 4, 3, groups=4), (4, 9), "conv"),
        (nn.ConvTranspose1d(6, 4, 3, groups=2), (4, 9), "conv"),
        (nn.ConvTranspose2d(2, 3, (1, 2)), (3, 4), "conv"),
        (nn.ConvTranspose3d(4, 4, 2, groups=4), (4, 8), "conv"),
        (nn.RNNCell(3, 5), None, "recurrent"),
    ],
)
def test_kind_shape_and_round_trip(module, shape, kind):
    for site in weight_sites(module):
        matrix = site.matrix()
        assert shape is None or tuple(matrix.shape) == shape
        assert site.kind == kind
        assert tuple(matrix.shape) == site.view.matrix_shape
        assert matrix.dtype == torch.float32
        assert torch.equal(site.to_parameter(matrix), site.parameter)
        matrix.zero_()  # a copy: the model keeps its weight
        assert site.parameter.abs().sum() > 0


@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize(("inputs", "outputs", "groups"), [(4, 6, 2), (3, 5, 1), (4, 4, 4), (6, 3, 3)])
def test_transposed_convolution_rows_are_outputs(dims, inputs, outputs, groups):
    """A row alone must determine one output channel: zero the other rows, and only that channel stays."""
    module = [nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d][dims - 1](
        inputs, outputs, 2, groups=groups, bias=False
    )
    x = torch.randn(1, inputs, *[3] * dims)
    full = module(x)
    site = only(module)
    for row in range(outputs):
        matrix = torch.zeros(site.view.matrix_shape)
        matrix[row] = site.matrix()[row]
        with torch.no_grad():
            saved = module.weight.clone()
            module.weight.copy_(site.to_parameter(matrix))
            y = module(x)
            module.weight.copy_(saved)
        expected = torch.zeros_like(full)
        expected[:, row] = full[:, row]
        torch.testing.assert_close(y, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize(("inputs", "outputs", "groups"), [(4, 6, 2), (3, 5, 1), (4, 4, 4)])
def test_grouped_convolution_rows_times_patches(inputs, outputs, groups):
    """Rows are split evenly over the groups in order: matrix times unfolded patches of the group is the output."""
    module = nn.Conv2d(inputs, outputs, 3, groups=groups, bias=False)
    x = torch.randn(2, inputs, 5, 5)
    matrix = only(module).matrix().view(groups, outputs // groups, -1)
    patches = F.unfold(x, 3).view(2, groups, -1, 9)
    y = torch.einsum("gok,bgkl->bgol", matrix, patches).reshape(2, outputs, 3, 3)
    torch.testing.assert_close(y, module(x), rtol=1e-5, atol=1e-5)


def test_recurrent_names():
    lstm = nn.LSTM(5, 6, num_layers=2, bidirectional=True, proj_size=3)
    names = {site.name for site in weight_sites(nn.ModuleDict({"r": lstm}))}
    expected = {
        f"r.weight_{kind}_l{layer}{direction}"
        for kind in ("ih", "hh", "hr")
        for layer in (0, 1)
        for direction in ("", "_reverse")
    }
    assert names == expected
    assert {site.name for site in weight_sites(nn.LSTMCell(3, 4))} == {"weight_ih", "weight_hh"}


def test_attention_names():
    same = {site.name for site in weight_sites(nn.MultiheadAttention(8, 2))}
    assert same == {"in_proj_weight", "out_proj.weight"}
    apart = {site.name for site in weight_sites(nn.MultiheadAttention(8, 2, kdim=5, vdim=3, add_bias_kv=True))}
    assert apart == {"q_proj_weight", "k_proj_weight", "v_proj_weight", "out_proj.weight"}


def test_tied_weights_and_shared_modules():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding = nn.Embedding(9, 4)
            self.head = nn.Linear(4, 9, bias=False)
            self.head.weight = self.embedding.weight
            self.block = nn.Linear(4, 4)
            self.again = self.block

    sites = weight_sites(Model())
    assert [(s.name, s.aliases, s.kind) for s in sites] == [
        ("embedding.weight", ("head.weight",), "embedding"),
        ("block.weight", ("again.weight",), "linear"),
    ]


def test_what_is_no_site():
    class Odd(nn.Linear):
        def __init__(self):
            super().__init__(4, 3)
            self.weight = nn.Parameter(torch.randn(3, 4, 2))

    class Bare(nn.Module):
        def __init__(self):
            super().__init__()
            self.table = nn.Parameter(torch.randn(3, 4))

    parametrized = nn.utils.parametrizations.weight_norm(nn.Linear(3, 3))
    models = [Odd(), Bare(), nn.LayerNorm(4), nn.BatchNorm2d(3), nn.LazyLinear(3), parametrized]
    with pytest.warns(UserWarning):
        models.append(nn.Linear(0, 3))
    for model in models:
        assert weight_sites(model) == [], model


def test_subclasses_are_sites():
    class Mine(nn.Conv1d):
        pass

    assert only(Mine(2, 3, 4)).name == "weight"


def test_transformers_conv1d():
    pytorch_utils = pytest.importorskip("transformers.pytorch_utils")
    module = pytorch_utils.Conv1D(5, 3)
    site = only(module)
    assert tuple(site.matrix().shape) == (5, 3)
    x = torch.randn(2, 3)
    torch.testing.assert_close(F.linear(x, site.matrix(), module.bias), module(x))
    assert torch.equal(site.to_parameter(site.matrix()), module.weight)


def test_half_precision_parameters():
    site = only(nn.Linear(3, 2).bfloat16())
    assert site.matrix().dtype == torch.float32
    assert site.to_parameter(site.matrix()).dtype == torch.bfloat16
