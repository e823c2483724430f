"""A model with every kind of layer that can be packed, for the tests of the artifact."""

from __future__ import annotations

import torch
from torch import nn

from pennyweight.artifact import round_to_stored
from pennyweight.compress.folding import fold_batch_norm
from pennyweight.formats import Integer
from pennyweight.layers.activation_quantizer import ActivationQuantizer, attach_input_quantizer
from pennyweight.layers.packed import install
from pennyweight.layers.sites import weight_sites


class Zoo(nn.Module):
    """Every kind of layer that can be packed, in odd sizes, tied weights, bare parameters and buffers of all sorts."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(23, 10, padding_idx=0)
        self.position = nn.Parameter(torch.randn(7, 10))
        self.bag = nn.EmbeddingBag(23, 10)
        self.conv1d = nn.Conv1d(10, 10, 3, padding=1, groups=5)
        self.conv2d = nn.Conv2d(1, 3, 3, padding=1)
        self.norm2d = nn.BatchNorm2d(3)
        self.depthwise = nn.Conv2d(3, 3, 3, padding=1, groups=3, bias=False)
        self.conv3d = nn.Conv3d(3, 2, 1)
        self.up1d = nn.ConvTranspose1d(10, 10, 3, padding=1, groups=2)
        self.up2d = nn.ConvTranspose2d(2, 1, 3, padding=1)
        self.up3d = nn.ConvTranspose3d(2, 2, 1)
        self.lstm = nn.LSTM(10, 5, bidirectional=True, batch_first=True)
        self.gru = nn.GRU(10, 10, batch_first=True)
        self.rnn = nn.RNN(10, 10, batch_first=True)
        self.cell = nn.GRUCell(10, 10)
        self.attention = nn.MultiheadAttention(10, 2, batch_first=True)
        self.norm = nn.LayerNorm(10)
        self.head = nn.Linear(10, 23)
        self.head.weight = self.embedding.weight
        self.head_again = nn.Linear(10, 23)
        self.head_again.bias = self.head.bias
        self.register_buffer("mask", torch.tensor([True, False, True]))
        self.register_buffer("big", torch.tensor([2**40, -1]))
        self.register_buffer("scale", torch.tensor(1e-6))
        self.register_buffer("scratch", torch.randn(3), persistent=False)

    def forward(self, index):
        x = self.embedding(index) + self.position[: index.shape[1]] + self.bag(index)[:, None]
        x = self.up1d(self.conv1d(x.mT)).mT
        y = self.depthwise(self.norm2d(self.conv2d(x[:, None])))
        y = self.up3d(self.conv3d(y[:, :, None]))[:, :, 0]
        x = x + self.up2d(y)[:, 0]
        x = x + self.lstm(x)[0] + self.gru(x)[0] + self.rnn(x)[0]
        x = x + self.attention(x, x, x)[0]
        x = self.norm(x + self.cell(x.flatten(0, 1)).view_as(x))
        return self.head(x) + self.head_again(x) * self.scale * self.big[1] * self.mask.sum()


def make_zoo() -> nn.Module:
    torch.manual_seed(5)
    model = Zoo()
    nn.init.uniform_(model.norm2d.running_var, 0.5, 2)
    return model.eval()


INDEX = torch.tensor([[1, 2, 22, 0, 5], [7, 7, 7, 3, 1]])


def pack(model: nn.Module, bits: int = 5):
    return {s.name: Integer.encode(s.matrix(), bits, 0) for s in weight_sites(model)}


def packed_zoo(fold: bool = False, quantise: bool = False) -> nn.Module:
    model = make_zoo()
    if fold:
        assert fold_batch_norm(model, INDEX)
    if quantise:
        attach_input_quantizer(model.conv2d, ActivationQuantizer(8, 4.0, -2.0))
        attach_input_quantizer(model.norm, ActivationQuantizer(6, 8.0, -4.0))  # not a packed layer
    install(model, pack(model))
    round_to_stored(model)
    return model
