"""Parallel network: a sum of many thin, deep ReLU networks, of which weight decay leaves a few.

Deep Learning meets Nonparametric Regression: Are Weight-Decayed DNNs Locally Adaptive?, arXiv 2204.09664. With M
subnetworks of L layers that all read x and share nothing,

    f(x) = sum_j f_j(x),      loss + lambda sum_j sum_l |W_j^l|_F^2,      biases not decayed

ReLU lets a factor move between layers of a subnetwork at the same function, and at the best scales

    sum_l |W_j^l|_F^2 = L (prod_l |W_j^l|_F)^(2/L),      reached where the L norms are equal

so that weight decay is an l_{2/L} penalty on the sizes of subnetworks: for L > 2 sparser than the lasso. Those that end
up constant can be taken out (`prune`).

Train with the penalty in the loss and plain Adam or SGD; decoupled decay is another objective. Their weight_decay mu is
lambda = mu / 2, on the weights alone (`decay: matrices` of a recipe). The paper gives no sizes that could be read (they
are in an appendix): defaults are ours, with kinks of the first layer spread over [0, 1] as inputs are to be, the last
layer divided by sqrt(M). slope > 0 (leaky ReLU) keeps more subnetworks alive at the start; all of the above holds with
it.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class ParallelMLP(nn.Module):
    """x [samples, inputs] -> [samples, outputs]. Raises ValueError unless there are 2 layers or more.

    weights[l]: [subnetworks, in, out]; biases[l]: [subnetworks * out], flat, so that optimizers that decay matrices
    alone leave them out; `offset` [outputs] is what pruned constants leave, a buffer.
    """

    offset: Tensor

    def __init__(
        self, inputs: int, outputs: int = 1, subnetworks: int = 100, width: int = 6, depth: int = 6, slope: float = 0.0
    ) -> None:
        super().__init__()
        if depth < 2:
            raise ValueError(f"a subnetwork has 2 layers or more, not {depth}")
        self.slope = slope
        sizes = [inputs, *[width] * (depth - 1), outputs]
        scales = [math.sqrt(2 / n) for n in sizes[:-2]] + [math.sqrt(1 / sizes[-2] / subnetworks)]
        self.weights = nn.ParameterList(
            torch.randn(subnetworks, n, m) * scale for n, m, scale in zip(sizes, sizes[1:], scales)
        )
        self.biases = nn.ParameterList(torch.zeros(subnetworks * m) for m in sizes[1:])
        with torch.no_grad():  # first-layer kinks at random points of the unit cube
            points = torch.rand(subnetworks, inputs, sizes[1])
            self.biases[0].copy_(-(self.weights[0] * points).sum(1).flatten())
        self.register_buffer("offset", torch.zeros(outputs))

    def subnetworks(self, x: Tensor) -> Tensor:
        """Outputs of each one: [subnetworks, samples, outputs]."""
        last, count = len(self.weights) - 1, len(self.weights[0])
        h = x.t().expand(count, *x.t().shape)  # samples last: thin layers multiply several times faster that way
        for index, (weight, bias) in enumerate(zip(self.weights, self.biases)):
            h = torch.baddbmm(bias.view(count, weight.shape[2], 1), weight.transpose(1, 2), h)
            h = F.leaky_relu(h, self.slope) if index < last else h
        return h.transpose(1, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.subnetworks(x).sum(0) + self.offset

    def penalty(self) -> Tensor:
        """sum |W|_F^2 over all layers: times lambda, what is added to the loss."""
        return torch.stack([weight.square().sum() for weight in self.weights]).sum()

    def norms(self) -> Tensor:
        """|W_j^l|_F: [subnetworks, layers]."""
        return torch.stack([torch.linalg.vector_norm(weight, dim=(1, 2)) for weight in self.weights], 1)

    def sparsity_norm(self) -> Tensor:
        """sum_j (prod_l |W_j^l|_F)^(2/L): L times this is the least penalty of the same function."""
        return self.norms().log().mean(1).mul(2).exp().sum()

    @torch.no_grad()
    def balance(self) -> None:
        """Give all layers of a subnetwork one norm, in place, at the same function; those with a zero layer stay."""
        norms = self.norms().double()
        alive = (norms > 0).all(1)
        norms[~alive] = 1
        factors = norms.log().mean(1, keepdim=True).exp() / norms
        reach = factors.cumprod(1)  # what the layer's output is multiplied by
        for index, (weight, bias) in enumerate(zip(self.weights, self.biases)):
            weight.mul_(factors[:, index].to(weight.dtype).view(-1, 1, 1))
            if index < len(self.weights) - 1:
                bias.view(len(weight), -1).mul_(reach[:, index, None].to(bias.dtype))

    @torch.no_grad()
    def active(self, x: Tensor, tolerance: float = 1e-3) -> Tensor:
        """Which subnetworks are not constant: [subnetworks], whether an output spreads over more than the tolerance."""
        values = self.subnetworks(x)
        return (values.amax(1) - values.amin(1) > tolerance).any(1)

    @torch.no_grad()
    def prune(self, x: Tensor, tolerance: float = 1e-3) -> int:
        """Take out subnetworks that are constant on x, in place, and return how many are left.

        The middle of their range is kept in `offset`: each one's outputs on x are off by at most half the tolerance.
        Build the optimizer anew.
        """
        keep = self.active(x, tolerance)
        values = self.subnetworks(x)[~keep]
        self.offset += ((values.amax(1) + values.amin(1)) / 2).sum(0)
        for index, (weight, bias) in enumerate(zip(self.weights, self.biases)):
            self.weights[index] = nn.Parameter(weight[keep].clone())
            self.biases[index] = nn.Parameter(bias.view(len(keep), -1)[keep].flatten())
        return int(keep.sum())


def parallel_mlp(
    inputs: int, outputs: int = 1, subnetworks: int = 100, width: int = 6, depth: int = 6, slope: float = 0.0
) -> ParallelMLP:
    """A sum of that many subnetworks, each of `depth` layers of that width; see the module."""
    return ParallelMLP(inputs, outputs, subnetworks, width, depth, slope)
