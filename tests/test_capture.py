"""Input rows: rows @ matrix^T is the layer's output, for every kind of layer."""

import pytest
import torch
from torch import nn

from pennyweight.compress.capture import input_rows
from pennyweight.layers.sites import weight_sites

CONVOLUTIONS = [
    (nn.Conv1d(4, 6, 3, stride=2, padding=1), (2, 4, 11)),
    (nn.Conv1d(4, 6, 3, dilation=2, padding="same", padding_mode="circular"), (2, 4, 9)),
    (nn.Conv2d(4, 6, (3, 2), stride=(2, 1), padding=(1, 0), groups=2), (2, 4, 7, 8)),
    (nn.Conv2d(6, 6, 3, padding=1, groups=6), (2, 6, 5, 5)),
    (nn.Conv2d(3, 4, 3, padding=2, padding_mode="reflect", dilation=(1, 2)), (1, 3, 6, 7)),
    (nn.Conv3d(2, 4, 2, stride=2), (2, 2, 4, 5, 4)),
    (nn.ConvTranspose1d(4, 6, 4, stride=2, padding=1), (2, 4, 7)),
    (nn.ConvTranspose2d(4, 6, 3, stride=2, padding=1, output_padding=1, groups=2), (2, 4, 4, 5)),
    (nn.ConvTranspose2d(4, 2, (2, 3), stride=(1, 3), dilation=(2, 1)), (2, 4, 4, 3)),
    (nn.ConvTranspose3d(2, 4, 2, stride=(1, 2, 1), groups=2), (1, 2, 3, 2, 3)),
]


@pytest.mark.parametrize("module, shape", CONVOLUTIONS, ids=lambda v: str(v)[:60])
def test_patches_times_matrix_is_the_convolution(module, shape):
    torch.manual_seed(0)
    module.bias = None
    x = torch.randn(shape)
    expected = module(x)
    (site,) = weight_sites(module)
    matrix = site.matrix().view(site.groups, -1, site.view.matrix_shape[1])
    chunks = [
        (torch.matmul(rows, matrix.transpose(1, 2)).transpose(0, 1).flatten(1), positions)
        for rows, positions in input_rows(site, (x,), expected)
    ]
    made = torch.cat([c for c, _ in chunks])
    torch.testing.assert_close(made, torch.cat([p for _, p in chunks]), rtol=1e-4, atol=1e-5)


def test_linear_rows():
    module = nn.Linear(3, 2, bias=False)
    x = torch.randn(4, 5, 3)
    ((rows, positions),) = input_rows(weight_sites(module)[0], (x,), module(x))
    torch.testing.assert_close(rows[0] @ module.weight.T, positions)


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
@pytest.mark.parametrize("batch_first", [False, True])
def test_recurrent_rows_are_inputs_and_previous_states(kind, batch_first):
    torch.manual_seed(0)
    module = kind(3, 5, num_layers=2, bidirectional=True, batch_first=batch_first)
    x = torch.randn(2, 6, 3)
    rows = {s.attribute: next(input_rows(s, (x,)))[0][0] for s in weight_sites(module)}
    one = kind(3, 5, bidirectional=True, batch_first=batch_first)
    one.load_state_dict({k: v for k, v in module.state_dict().items() if "_l0" in k})
    states = one(x)[0]
    states = states.transpose(0, 1) if batch_first else states  # [time, batch, 2 * 5]
    torch.testing.assert_close(rows["weight_ih_l1"], states.reshape(-1, 10))
    forward, backward = states.chunk(2, -1)
    batch = states.shape[1]
    torch.testing.assert_close(rows["weight_hh_l0"][batch:], forward[:-1].reshape(-1, 5))
    torch.testing.assert_close(rows["weight_hh_l0_reverse"][:-batch], backward[1:].reshape(-1, 5))
    assert not rows["weight_hh_l0"][:batch].any() and not rows["weight_hh_l0_reverse"][-batch:].any()
