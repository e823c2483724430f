"""Batch-channel normalisation: a batch norm, then a group norm of each sample; for batches of any size.

Micro-Batch Training with Batch-Channel Normalization and Weight Standardization, arXiv 1903.10520 (with 1911.09738):

    BCN(x) = weight_g GN(BN(x)) + bias_g                 one pair (weight, bias) for each of the G groups
    BN       large batches: torch's BatchNorm. Micro-batches: EstimatedBatchNorm
    GN       of each sample and group: (y - mean) / sqrt(var + 1e-5), over channels of the group and positions

EstimatedBatchNorm normalises by running estimates in training, too, which go on from micro-batch to micro-batch:

    v_b = mean (x - mean)^2 around the estimate before the update; m_b = mean x
    mean <- (1 - rate) mean + rate m_b,    var <- (1 - rate) var + rate v_b             without gradient
    y = weight (x - mean) / sqrt(var + eps) + bias                                       the new estimates

Departures. `rate` is 0 in the released code until its trainer sets it; with 0 for ever the layer is a plain affine map.
Here it is 0.1, as re-implementations have it, in a buffer that a schedule may write. Estimates belong to a process:
DistributedDataParallel sends those of the first to all.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import PlanError
from ..registry import register


class EstimatedBatchNorm(nn.Module):
    """x [samples, channels, ...] -> the same shape, normalised by estimates also in training; see the module.

    rate: weight of each micro-batch in the estimates, 0 to 1, else `PlanError`.
    """

    running_mean: Tensor
    running_var: Tensor
    rate: Tensor

    def __init__(self, channels: int, rate: float = 0.1, eps: float = 1e-5) -> None:
        super().__init__()
        if not 0 <= rate <= 1:
            raise PlanError(f"batch-channel-norm: rate is {rate}; it is the weight of a micro-batch, 0 to 1")
        self.eps = eps
        self.weight, self.bias = nn.Parameter(torch.ones(channels)), nn.Parameter(torch.zeros(channels))
        self.register_buffer("running_mean", torch.zeros(channels))
        self.register_buffer("running_var", torch.ones(channels))
        self.register_buffer("rate", torch.tensor(float(rate)))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self._update(x.detach())
        # Copies: the next micro-batch changes the estimates before this one's backward may have run.
        mean, var = self.running_mean.clone(), self.running_var.clone()
        return F.batch_norm(x, mean, var, self.weight, self.bias, training=False, eps=self.eps)

    @torch.no_grad()
    def _update(self, x: Tensor) -> None:
        values = x.to(self.running_mean.dtype).transpose(0, 1).flatten(1)
        spread = (values - self.running_mean[:, None]).square().mean(1)
        self.running_mean.lerp_(values.mean(1), self.rate)
        self.running_var.lerp_(spread, self.rate)

    def extra_repr(self) -> str:
        return f"{len(self.weight)}, rate={float(self.rate):g}, eps={self.eps:g}"


@register(
    "batch-channel-norm",
    acts_on="layers",
    paper="1903.10520",
    description="batch norm (or its running estimates) and group norm in one, for batches of any size",
    combines_with=("weight-standardization",),
)
class BatchChannelNorm(nn.Module):
    """x [samples, channels, ...] -> the same shape; see the module.

    estimate: micro-batch form, with `rate`; else the batch form. groups: must divide the channels, else `PlanError`;
    1 makes the second norm a layer norm, `channels` an instance norm. Learns 2 channels + 2 groups numbers.
    """

    def __init__(self, channels: int, groups: int = 32, estimate: bool = True, rate: float = 0.1) -> None:
        super().__init__()
        if groups < 1 or channels % groups:
            raise PlanError(f"batch-channel-norm: {channels} channels do not divide into {groups} groups")
        self.groups, self.eps = groups, 1e-5
        self.batch_norm = EstimatedBatchNorm(channels, rate) if estimate else _AnyBatchNorm(channels)
        self.weight, self.bias = nn.Parameter(torch.ones(groups)), nn.Parameter(torch.zeros(groups))

    def forward(self, x: Tensor) -> Tensor:
        y = self.batch_norm(x)
        each = y.shape[1] // self.groups
        return F.group_norm(
            y, self.groups, self.weight.repeat_interleave(each), self.bias.repeat_interleave(each), self.eps
        )

    def extra_repr(self) -> str:
        return f"groups={self.groups}"


class _AnyBatchNorm(nn.modules.batchnorm._BatchNorm):
    """torch's batch norm for any number of positions."""

    def _check_input_dim(self, input: Tensor) -> None:
        if input.ndim < 2:
            raise ValueError(f"batch norm takes [samples, channels, ...], not {list(input.shape)}")


def use_batch_channel_norm(model: nn.Module, groups: int = 32, estimate: bool = True, rate: float = 0.1) -> nn.Module:
    """Put a `BatchChannelNorm` in the place of every batch norm, in place, and return the model.

    It takes over the batch norm's weight, bias and statistics. Where the channels do not divide into `groups`, there
    are as many as divide both. Raises `PlanError` if the model has no batch norm.
    """
    norms = {n: m for n, m in model.named_modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)}
    if not norms:
        raise PlanError(f"this {type(model).__name__} has no batch norm that a batch-channel norm could take over from")
    for name, norm in norms.items():
        made = BatchChannelNorm(norm.num_features, math.gcd(groups, norm.num_features), estimate, rate)
        state = {key: value for key, value in norm.state_dict().items() if key in made.batch_norm.state_dict()}
        made.batch_norm.load_state_dict(state, strict=False)
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, made.to(next(norm.buffers(), made.weight)).train(norm.training))
    return model
