"""AdaQuant on a whole model: weights and inputs of its layers quantised one by one, then distilled if asked.

Source and formulas: adaquant.py, which holds the problem of one layer. A layer's inputs are sampled rows, either of the
float model ("parallel": layers are independent) or of the model whose earlier layers are quantised already
("sequential": their errors are mended too); its targets are the float outputs either way.

Departure: a last, optional step distils the whole network against the float one on the same data, without labels (the
paper tunes biases only).
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
import torch.nn.utils.parametrize as parametrize
from torch import Tensor, nn

from ..errors import DataError, PlanError, UnknownNameError
from ..formats.integer import Integer
from ..layers.activation_quantizer import ActivationQuantizer, attach_input_quantizer
from ..layers.sites import WeightSite, weight_sites
from .adaquant import AffineWeight, LayerProblem
from .capture import patches
from .data import Call, calls
from .distillation import distil
from .observe import evaluating

Mode = Literal["sequential", "parallel"]

# Input rows kept of a layer; 16,384 rows of a 3x3 convolution over 64 channels are 38 MB.
SAMPLED_ROWS = 1 << 14
# Samples of a convolution's input that are unfolded at once.
SAMPLES_UNFOLDED = 32


@dataclass
class Calibrated:
    """What `adaquant` made. model: float modules holding the dequantised weights, each with an `input_quantizer`.

    packed: site name -> its integers. losses: site name -> (before, after), the layer's mean squared output error on
    its calibration rows relative to the variance of the output. distilled: the network's divergence before and after.
    """

    model: nn.Module
    packed: dict[str, Integer] = field(default_factory=dict)
    losses: dict[str, tuple[float, float]] = field(default_factory=dict)
    distilled: tuple[float, float] | None = None


def adaquant(
    model: nn.Module,
    data: Any,
    weight_bits: int | Mapping[str, int] = 8,
    activation_bits: int | Mapping[str, int] = 8,
    mode: Mode = "sequential",
    *,
    group: int = 0,
    keep_first_last: bool = False,
    input_bits: int = 8,
    iterations: int = 200,
    lr_weight: float = 1e-2,
    distil_steps: int = 0,
    distil_loss: Literal["kl", "mse"] = "mse",
    seed: int = 0,
) -> Calibrated:
    """Quantise weights and inputs of every Linear and Conv1d/2d/3d of a model, in place.

    model: batch norms already folded (`folding.fold_batch_norm`). data: batches as `calls` takes them, no labels.
    weight_bits, activation_bits: one number, or site name -> bits (layers not named stay float). group: columns that
    share a step, 0 for a whole row. keep_first_last: first and last layer at 8 bits. input_bits: of the first layer's
    input, which is the data itself (images have 8 bits).
    distil_steps: Adam steps on all weights, biases and ranges together against the float network's outputs at the end.
    Raises DataError if the data is empty, UnknownNameError if bits are given for a site that does not exist.
    """
    batches = calls(model, data)
    reference = copy.deepcopy(model).eval().requires_grad_(False)
    order = _layers_in_order(model, batches[0])
    names = [site.name for site in order]
    if not order:
        raise DataError("adaquant: the data reaches no Linear or convolution of the model")
    widths = _widths(names, weight_bits, 8 if keep_first_last else None)
    input_widths = _widths(names, activation_bits, 8 if keep_first_last else None)
    if names[0] in input_widths:
        input_widths[names[0]] = max(input_widths[names[0]], input_bits)
    result = Calibrated(model)
    originals = {site.name: site for site in weight_sites(reference)}
    grids: dict[str, AffineWeight] = {}
    quantizers: dict[str, ActivationQuantizer] = {}
    with evaluating(model):
        for i, site in enumerate(order):
            if site.name not in widths or site.name not in input_widths:
                continue
            original = originals[site.name]
            inputs = sample_rows(reference, original, batches, seed + i)
            targets = _outputs(original, inputs)
            if mode == "sequential" and grids:
                inputs = sample_rows(model, site, batches, seed + i)
            layer = LayerProblem(site, inputs, targets, widths[site.name], input_widths[site.name], group)
            result.losses[site.name] = layer.solve(iterations, lr_weight, seed + i)
            grids[site.name], quantizers[site.name] = layer.grid, layer.quantizer
            if mode == "sequential":
                _quantise(site.module, layer.grid, layer.quantizer)
        if mode == "parallel":
            for site in order:
                if site.name in grids:
                    _quantise(site.module, grids[site.name], quantizers[site.name])
        done = [site.module for site in order if site.name in grids]
        if distil_steps:
            result.distilled = _distil(model, reference, batches, done, distil_steps, distil_loss, seed)
        for site in order:
            if site.name in grids:
                result.packed[site.name] = _finish(site, grids[site.name])
    return result


def _layers_in_order(model: nn.Module, call: Call) -> list[WeightSite]:
    """Sites of Linear and (not transposed) convolution layers in the order in which they first run."""
    kinds = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
    sites: dict[nn.Module, WeightSite] = {
        site.module: site for site in weight_sites(model) if isinstance(site.module, kinds) and not site.aliases
    }
    order: dict[nn.Module, None] = {}  # a set that remembers the order

    def hook(module: nn.Module, _: Any) -> None:
        order.setdefault(module)

    handles = [module.register_forward_pre_hook(hook) for module in sites]
    try:
        with evaluating(model), torch.no_grad():
            call(model)
    finally:
        for handle in handles:
            handle.remove()
    return [sites[module] for module in order]


def _widths(names: list[str], bits: int | Mapping[str, int], ends: int | None) -> dict[str, int]:
    widths = dict.fromkeys(names, bits) if isinstance(bits, int) else dict(bits)
    for name, width in widths.items():
        if name not in names:
            raise UnknownNameError("layer", name, names)
        if not 1 <= width <= 16:
            raise PlanError(f"{name}: {width} bits asked for; adaquant takes 1 to 16")
    if ends is not None:
        widths.update({name: ends for name in (names[0], names[-1]) if name in widths})
    return widths


class _Reached(Exception):
    """Thrown from a hook once a layer's input has been seen: what comes after it need not run."""


@torch.no_grad()
def sample_rows(model: nn.Module, site: WeightSite, batches: Sequence[Call], seed: int) -> Tensor:
    """At most SAMPLED_ROWS input rows [groups, n, cols] of a layer; the same places for the same seed and shapes."""
    generator = torch.Generator().manual_seed(seed)
    share = -(-SAMPLED_ROWS // len(batches))
    found: list[Tensor] = []
    seen: list[tuple[Any, ...]] = []

    def hook(_: nn.Module, inputs: tuple[Any, ...]) -> None:
        seen.append(inputs)
        raise _Reached

    module = site.module
    handle = module.register_forward_pre_hook(hook, prepend=True)  # before its own input quantiser, if it has one
    try:
        with evaluating(model):
            for call in batches:
                with contextlib.suppress(_Reached):
                    call(model)
                if not seen:
                    continue
                x = seen.pop()[0].float()
                for piece in x.split(SAMPLES_UNFOLDED):
                    rows = patches(module, piece) if site.kind == "conv" else piece.reshape(1, -1, piece.shape[-1])
                    places = torch.randperm(rows.shape[1], generator=generator)
                    found.append(rows[:, places[: -(-share * piece.shape[0] // x.shape[0])]])
    finally:
        handle.remove()
    return torch.cat(found, 1)


def _outputs(site: WeightSite, inputs: Tensor) -> Tensor:
    """Float outputs [groups, n, rows / groups] of a layer for input rows [groups, n, cols]."""
    weight = site.matrix().view(inputs.shape[0], -1, inputs.shape[2])
    output = torch.matmul(inputs, weight.transpose(1, 2))
    bias = getattr(site.module, "bias", None)
    return output if bias is None else output + bias.detach().float().view(inputs.shape[0], 1, -1)


def _quantise(module: nn.Module, grid: AffineWeight, quantizer: ActivationQuantizer) -> None:
    """From now on the module computes with its quantised weight and inputs; V stays behind the parametrisation."""
    parametrize.register_parametrization(module, "weight", grid, unsafe=True)
    attach_input_quantizer(module, quantizer)


def _latent(module: Any) -> nn.Parameter:
    return module.parametrizations["weight"].original


@torch.no_grad()
def _finish(site: WeightSite, grid: AffineWeight) -> Integer:
    """Take the parametrisation off, pack V, and leave the decoded weight in the module."""
    module: Any = site.module
    packed = grid.pack(_latent(module))
    parametrize.remove_parametrizations(module, "weight", leave_parametrized=False)
    module.weight.copy_(site.to_parameter(packed.decode()))
    return packed


def _distil(
    model: nn.Module,
    reference: nn.Module,
    batches: list[Call],
    layers: Sequence[Any],
    steps: int,
    loss: Literal["kl", "mse"],
    seed: int,
) -> tuple[float, float]:
    """All weights, biases, ranges and zero points of the quantised layers against the float network's outputs."""
    parameters: list[dict[str, Any]] = []
    biases = [m.bias for m in layers if isinstance(m.bias, nn.Parameter)]
    if biases:
        parameters.append({"params": biases, "lr": 1e-3})
    for module in layers:
        grid, quantizer = module.parametrizations["weight"][0], module.input_quantizer
        parameters += [
            {"params": [_latent(module)], "lr": 1e-2 * grid.mean_step()},
            {"params": [grid.log_range, grid.relative_zero], "lr": 3e-4},
            {"params": [quantizer.range, quantizer.zero], "lr": 1e-3 * float(quantizer.range.detach())},
        ]

    def project() -> None:
        for module in layers:
            module.input_quantizer.project()

    return distil(model, reference, batches, parameters, steps=steps, loss=loss, after_step=project, seed=seed)
