"""Put the mean and spread of layer outputs back after compression: para-normalise, correct biases.

Source: the normalisation and bias parts of AdaQuant / CalibTIP, arXiv 2006.10518 (sections 3.4 and 4 and the released
pipelines). Compression moves the mean and spread of every layer's outputs; the functions here put them back:

    para_normalise      per output channel of a folded layer with output mean mu' and standard deviation sigma':
                            W <- W |gamma| / sigma',   b <- (b - mu') |gamma| / sigma' + beta
                        so the output has mean beta and standard deviation |gamma| again. A row is only scaled, so
                        integer codes stay and only step and zero point change. Batch norms that were not folded get
                        their running statistics from the data.
    correct_bias        b <- b + mean(reference output) - mean(output), layer after layer; needs no batch norm

Departures: statistics are cumulative, not momentum averages, so one batch restores (beta, |gamma|) exactly. All
layers are treated in one pass: within each batch, later layers see the repaired outputs of earlier ones. A channel
whose output hardly varies any more is only shifted, since scaling it up would amplify rounding noise.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd

from .data import calls
from .folding import FoldedNorm, output_hooks, scale_rows
from .observe import evaluating

# Below this share of the wanted standard deviation a channel counts as constant: it is shifted, not scaled.
DEAD_CHANNEL = 1e-2


# ------------------------------------------------------------------------------------------------------ channel moments


def _channel_axis(module: nn.Module) -> int:
    """Axis of a module's output that holds its channels, from the end where the batch axis may be missing."""
    if isinstance(module, _ConvNd):
        return -1 - len(module.kernel_size)
    return -1


def _per_channel(output: Tensor, module: nn.Module) -> Tensor:
    """The output as [positions, channels], float64."""
    return output.detach().double().movedim(_channel_axis(module), -1).flatten(0, -2)


def _on_channels(values: Tensor, output: Tensor, module: nn.Module) -> Tensor:
    """[channels] reshaped to broadcast against the output."""
    shape = [1] * output.dim()
    shape[_channel_axis(module)] = -1
    return values.to(output.dtype).view(shape)


class _Moments:
    """Cumulative mean and population standard deviation per channel."""

    def __init__(self) -> None:
        self.count, self.mean, self.squares = 0, torch.zeros(()), torch.zeros(())

    def add(self, x: Tensor) -> None:
        """x: [positions, channels]. Chan's update, which does not cancel for large means."""
        count, mean = x.shape[0], x.mean(0)
        total = self.count + count
        shift = mean - self.mean
        self.squares = self.squares + (x - mean).square().sum(0) + shift.square() * (self.count * count / total)
        self.mean = self.mean + shift * (count / total)
        self.count = total

    @property
    def std(self) -> Tensor:
        return (self.squares / max(self.count, 1)).sqrt()


def _repair(mean: Tensor, std: Tensor, wanted_mean: Tensor, wanted_std: Tensor) -> tuple[Tensor, Tensor]:
    """(multiplier, shift) with output * multiplier + shift of the wanted mean and standard deviation."""
    alive = std > DEAD_CHANNEL * wanted_std
    multiplier = torch.where(alive & (wanted_std > 0), wanted_std / std.clamp_min(1e-30), torch.ones_like(std))
    return multiplier, wanted_mean - mean * multiplier


# ----------------------------------------------------------------------------------------------------- para-normalising


@dataclass(frozen=True)
class RowCorrection:
    """How para-normalisation changed a layer: every weight row times multiplier [rows]; the new bias [rows]."""

    multiplier: Tensor
    bias: Tensor


@torch.no_grad()
def para_normalise(model: nn.Module, data: Any) -> dict[str, RowCorrection]:
    """Give every folded layer's output its batch norm's mean and spread again, in place (formulas above).

    model: float modules, some of them folded by `folding.fold_batch_norm`. data: batches. Returns what was done to each
    folded layer, by name, so that packed weights can be rescaled alike (codes unchanged). Batch norms still present get
    their running statistics from the data. Raises DataError if there is no batch.
    """
    batches = calls(model, data)
    records: dict[str, FoldedNorm] = {r.layer: r for r in getattr(model, "_pennyweight_folded", [])}
    layers: dict[str, Any] = {name: model.get_submodule(name) for name in records}
    moments = {name: _Moments() for name in records}

    def wanted(name: str) -> tuple[Tensor, Tensor]:
        return records[name].beta.double(), records[name].gamma.double().abs()

    def make(name: str, module: nn.Module) -> Callable:
        def hook(module: nn.Module, inputs: tuple, output: Tensor) -> Tensor:
            channels = _per_channel(output, module)
            moments[name].add(channels)
            multiplier, shift = _repair(channels.mean(0), channels.std(0, correction=0), *wanted(name))
            return output * _on_channels(multiplier, output, module) + _on_channels(shift, output, module)

        return hook

    norms = [m for m in model.modules() if isinstance(m, _BatchNorm) and m.track_running_stats]
    momenta = [norm.momentum for norm in norms]
    with evaluating(model), output_hooks(layers.items(), make):
        for norm in norms:
            norm.reset_running_stats()
            norm.momentum = None  # cumulative average
            norm.train()
        for batch in batches:
            batch(model)
    for norm, momentum in zip(norms, momenta):
        norm.momentum = momentum

    corrections = {}
    for name, layer in layers.items():
        multiplier, shift = _repair(moments[name].mean, moments[name].std, *wanted(name))
        layer.weight.copy_(scale_rows(layer, layer.weight, multiplier))
        layer.bias.copy_((layer.bias.double() * multiplier + shift).to(layer.bias.dtype))
        corrections[name] = RowCorrection(multiplier.float(), layer.bias.detach().float().clone())
    return corrections


# ------------------------------------------------------------------------------------------------------ bias correction


@torch.no_grad()
def correct_bias(
    model: nn.Module, reference: nn.Module, data: Any, *, match_layer_norm: bool = False
) -> dict[str, Tensor]:
    """Shift biases so that each layer's mean output equals the reference's on the data; in place, one pass.

    model, reference: same module names; modules of the model may be packed twins, all that counts is their `bias`.
    Layers without a bias are left alone. match_layer_norm: also give LayerNorm outputs the reference's standard
    deviation per channel, through the norm's weight. Returns {module name: shift [channels]}.
    Raises DataError if there is no batch.
    """
    pairs: dict[str, tuple[Any, nn.Module]] = {}
    originals = dict(reference.named_modules())
    for name, module in model.named_modules():
        kinds = (nn.Linear, _ConvNd, nn.LayerNorm)
        original = originals.get(name)
        if isinstance(original, kinds) and isinstance(getattr(module, "bias", None), Tensor):
            pairs[name] = (module, original)
    wanted: dict[str, list[Tensor]] = {}
    seen = {name: (_Moments(), _Moments()) for name in pairs}

    def record(name: str, module: nn.Module) -> Callable:
        def hook(module: nn.Module, inputs: tuple, output: Tensor) -> None:
            wanted.setdefault(name, []).append(_per_channel(output, module))

        return hook

    def repair(name: str, module: nn.Module) -> Callable:
        original = pairs[name][1]

        def hook(module: nn.Module, inputs: tuple, output: Tensor) -> Tensor:
            channels, target = _per_channel(output, original), wanted[name].pop(0)
            seen[name][0].add(channels)
            seen[name][1].add(target)
            multiplier, shift = torch.ones_like(target[0]), target.mean(0) - channels.mean(0)
            if match_layer_norm and isinstance(original, nn.LayerNorm):
                stds = channels.std(0, correction=0), target.std(0, correction=0)
                multiplier, shift = _repair(channels.mean(0), stds[0], target.mean(0), stds[1])
            return output * _on_channels(multiplier, output, original) + _on_channels(shift, output, original)

        return hook

    with evaluating(model), evaluating(reference):
        for batch in calls(model, data):
            with output_hooks(((name, original) for name, (_, original) in pairs.items()), record):
                batch(reference)
            with output_hooks(((name, module) for name, (module, _) in pairs.items()), repair):
                batch(model)

    shifts = {}
    for name, (module, original) in pairs.items():
        now, target = seen[name]
        if not now.count:
            continue
        multiplier, shift = torch.ones_like(now.mean), target.mean - now.mean
        if match_layer_norm and isinstance(original, nn.LayerNorm):
            multiplier, shift = _repair(now.mean, now.std, target.mean, target.std)
            module.weight.copy_((module.weight.double() * multiplier).to(module.weight.dtype))
        module.bias.copy_((module.bias.double() * multiplier + shift).to(module.bias.dtype))
        shifts[name] = shift.float()
    return shifts
