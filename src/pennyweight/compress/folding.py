"""Fold batch norms into the layers before them: conv -> batch norm becomes one conv with bias.

With the norm's running mean m and variance v, row by row:

    W <- W gamma / sqrt(v + eps),   b <- (b - m) gamma / sqrt(v + eps) + beta

gamma and beta are remembered: they are the spread and the mean that the layer's output had in training, to which
`norms.para_normalise` can bring it back.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from .data import Call, calls
from .observe import evaluating

# Folding must reproduce the outputs to this share of their largest magnitude (float32 rounding through a deep network).
FOLD_TOLERANCE = 1e-4


@dataclass(frozen=True)
class FoldedNorm:
    """A folded pair and what the batch norm knew: names of the layer and the norm, gamma and beta [channels], eps."""

    layer: str
    norm: str
    gamma: Tensor
    beta: Tensor
    eps: float


@torch.no_grad()
def fold_batch_norm(model: nn.Module, example: Any) -> list[FoldedNorm]:
    """Fold every batch norm that directly follows a Linear or (transposed) convolution into it, in place.

    Pairs are found by running `example` (a tensor, tuple or mapping) once in eval mode: the norm's input is the very
    tensor a layer returned. A pair whose folding changes the model's outputs (because that tensor is used elsewhere as
    well) is undone. The norm becomes nn.Identity, the layer gets a bias. The list is also kept as
    `model._pennyweight_folded`, appended to what is there.
    """
    names = {module: name for name, module in model.named_modules()}
    parents = {child: (parent, key) for parent in model.modules() for key, child in parent.named_children()}
    batch = calls(model, [example])[0]
    with evaluating(model):
        pairs, before = _observe_pairs(model, batch)
        kept: list[FoldedNorm] = []

        def fold(layer: nn.Module, norm: _BatchNorm) -> tuple[FoldedNorm, Callable[[], None]]:
            record, undo_layer = _fold_pair(layer, norm, names)
            parent, key = parents[norm]
            setattr(parent, key, nn.Identity())

            def undo() -> None:
                undo_layer()
                setattr(parent, key, norm)

            return record, undo

        folded = [fold(layer, norm) for layer, norm in pairs]
        if _same_outputs(before, batch(model)):
            kept = [record for record, _ in folded]
        else:  # somebody else reads one of the tensors: find out whose, pair by pair
            for _, undo in reversed(folded):
                undo()
            for layer, norm in pairs:
                record, undo = fold(layer, norm)
                if _same_outputs(before, batch(model)):
                    kept.append(record)
                else:
                    undo()
    model._pennyweight_folded = [*getattr(model, "_pennyweight_folded", []), *kept]  # pyright: ignore[reportArgumentType]
    return kept


def _observe_pairs(model: nn.Module, batch: Call) -> tuple[list[tuple[nn.Module, _BatchNorm]], list[Tensor]]:
    """(layer, norm) pairs joined by one tensor, each called exactly once, and the model's outputs."""
    outputs: dict[int, tuple[nn.Module, Tensor]] = {}
    count: dict[nn.Module, int] = {}
    joined: list[tuple[nn.Module, _BatchNorm]] = []

    def make(_: Any, module: nn.Module) -> Callable:
        def hook(module: nn.Module, inputs: tuple, output: Any) -> None:
            count[module] = count.get(module, 0) + 1
            if isinstance(module, _BatchNorm):
                source = outputs.get(id(inputs[0]))
                if source is not None and module.track_running_stats:
                    joined.append((source[0], module))
            elif isinstance(output, Tensor):
                outputs[id(output)] = (module, output)  # holding the tensor keeps its id from being used again

        return hook

    kinds = (nn.Linear, _ConvNd, _BatchNorm)
    with output_hooks(((None, m) for m in model.modules() if isinstance(m, kinds)), make):
        result = [t.clone() for t in _tensors(batch(model))]
    shared = {p for p, owners in _parameter_owners(model).items() if owners > 1}
    return [
        (layer, norm)
        for layer, norm in joined
        if count[layer] == count[norm] == 1 and layer.weight not in shared and not hasattr(layer, "parametrizations")
    ], result


def _parameter_owners(model: nn.Module) -> dict[Tensor, int]:
    owners: dict[Tensor, int] = {}
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            owners[parameter] = owners.get(parameter, 0) + 1
    return owners


def _fold_pair(layer: Any, norm: _BatchNorm, names: Mapping[nn.Module, str]) -> tuple[FoldedNorm, Callable[[], None]]:
    mean, variance = norm.running_mean, norm.running_var
    assert mean is not None and variance is not None  # track_running_stats was checked
    gamma = torch.ones_like(mean) if norm.weight is None else norm.weight.detach()
    beta = torch.zeros_like(mean) if norm.bias is None else norm.bias.detach()
    weight, bias = layer.weight, layer.bias
    factor = gamma.double() / (variance.double() + norm.eps).sqrt()
    old_bias = torch.zeros_like(mean) if bias is None else bias
    layer.weight = nn.Parameter(scale_rows(layer, weight, factor), requires_grad=weight.requires_grad)
    layer.bias = nn.Parameter(((old_bias.double() - mean.double()) * factor + beta.double()).to(weight.dtype))

    def undo() -> None:
        layer.weight, layer.bias = weight, bias

    return FoldedNorm(names[layer], names[norm], gamma.clone(), beta.clone(), norm.eps), undo


def scale_rows(layer: nn.Module, weight: Tensor, factor: Tensor) -> Tensor:
    """The weight with output channel i multiplied by factor[i]; knows where transposed convolutions keep it."""
    factor, wide = factor.double(), weight.detach().double()
    if isinstance(layer, _ConvTransposeNd):  # [in, out / groups, ...]: input channels are split over the groups
        groups = layer.groups
        split = wide.view(groups, wide.shape[0] // groups, *wide.shape[1:])
        scaled = split * factor.view(groups, 1, -1, *[1] * (wide.dim() - 2))
        return scaled.view_as(wide).to(weight.dtype)
    return (wide * factor.view(-1, *[1] * (wide.dim() - 1))).to(weight.dtype)


def _tensors(output: Any) -> list[Tensor]:
    """The floating-point tensors of a model's output, in order, whatever containers they are in."""
    if isinstance(output, Tensor):
        return [output] if output.is_floating_point() else []
    parts = output.values() if isinstance(output, Mapping) else output if isinstance(output, (tuple, list)) else ()
    return [tensor for part in parts for tensor in _tensors(part)]


def _same_outputs(before: Sequence[Tensor], output: Any) -> bool:
    after = _tensors(output)
    return all(
        float((a - b).abs().max()) <= FOLD_TOLERANCE * max(float(a.abs().max()), 1e-3) for a, b in zip(before, after)
    )


@contextmanager
def output_hooks(
    modules: Iterable[tuple[Any, nn.Module]], make: Callable[[Any, nn.Module], Callable]
) -> Iterator[None]:
    """Forward hooks `make(key, module)` on each (key, module), removed on the way out."""
    with ExitStack() as stack:
        for key, module in modules:
            stack.callback(module.register_forward_hook(make(key, module)).remove)
        yield
