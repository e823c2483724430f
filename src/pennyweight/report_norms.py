"""What training has done to the weights: their norms and zeros, the scale of the logits, what gradient is left, and how
far a change of the input can go. Part of `pw.report(model, norms=True)`.

    zeros, l1, l2, power sum, largest       share of exact zeros, sum |w|, sqrt(sum w^2), sum |w|^p, max |w|
    adaptivity                              |dL/dw| / |w|: the share of itself by which a unit of learning rate moves w
    logit scale                             mean |logit|, and the spread of a sample's logits, which the softmax sees

Logit Attenuating Weight Normalization (2108.05839) calls it a loss of adaptivity when growing logits leave no gradient;
of its text the abstract could be read, and the measure is ours. L is the mean cross-entropy of the inputs' classes, or
without classes that of the model's own answers, with the gradient that its confidence leaves.
"""

from __future__ import annotations

import copy
import io
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from rich.console import Console, Group
from rich.markup import escape
from rich.table import Table
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd

from .compress.data import Call, calls, output_tensor
from .compress.folding import fold_batch_norm
from .compress.observe import evaluating
from .errors import DataError, PlanError
from .layers.chain import chain_of
from .layers.packed import packed_weights
from .layers.psilon_block import PSiLONBlock
from .layers.quantised import weight_chain
from .layers.sites import weight_sites
from .lipschitz import jacobian_norm, lipschitz_bound
from .losses.path_norm import path_norm, path_norm_by_forward
from .training.fold import plain

#: What multiplies by weights, adds up, takes the largest, or is the identity for positive numbers.
_POSITIVE = (
    *(nn.Linear, _ConvNd, nn.ReLU, nn.LeakyReLU, nn.Identity, nn.Dropout, nn.Dropout2d, nn.Flatten, nn.Unflatten),
    *(nn.MaxPool1d, nn.MaxPool2d, nn.AvgPool1d, nn.AvgPool2d, nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d),
)


@dataclass(frozen=True)
class WeightNorms:
    """One weight, as the layer uses it. zeros: share of exact ones. adaptivity: see the module; None if not measured
    or the weight is packed."""

    name: str
    shape: tuple[int, ...]
    weights: int
    zeros: float
    l1: float
    l2: float
    power_sum: float
    largest: float
    adaptivity: float | None = None


@dataclass(frozen=True)
class Norms:
    """p: of the power sums. logit_scale, logit_spread: mean |logit| and mean standard deviation over classes. gradient:
    norm over all parameters. path_norm: 1-path-norm; path_norm_is_bound: with residual sums or CReLU it is an upper
    bound. lipschitz_bound, lipschitz_estimate: upper and lower bound of L (lipschitz.py). None: not to be had."""

    p: float
    layers: list[WeightNorms]
    logit_scale: float | None = None
    logit_spread: float | None = None
    gradient: float | None = None
    path_norm: float | None = None
    path_norm_is_bound: bool = False
    lipschitz_bound: float | None = None
    lipschitz_estimate: float | None = None

    @property
    def zeros(self) -> float:
        """Share of exact zeros of all weights."""
        return sum(row.zeros * row.weights for row in self.layers) / max(sum(row.weights for row in self.layers), 1)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self) | {"zeros": self.zeros}

    def figures(self) -> list[tuple[str, str]]:
        """(what, how much) of the whole network, of what is known."""
        kind = "path norm, at most" if self.path_norm_is_bound else "path norm"
        known = [
            ("exact zeros", f"{100 * self.zeros:.4g} %"),
            ("mean |logit|", _text(self.logit_scale)),
            ("spread of a sample's logits", _text(self.logit_spread)),
            ("gradient norm", _text(self.gradient)),
            (kind, _text(self.path_norm)),
            ("Lipschitz constant, at most", _text(self.lipschitz_bound)),
            ("Lipschitz constant, at least", _text(self.lipschitz_estimate)),
        ]
        return [(what, value) for what, value in known if value]

    def cells(self) -> tuple[list[str], list[list[str]]]:
        """Heads and rows of the table of layers."""
        measured = any(row.adaptivity is not None for row in self.layers)
        heads = ["layer", "shape", "zeros, %", "l1", "l2", f"sum |w|^{self.p:g}", "largest"]
        rows = []
        for row in self.layers:
            numbers = (row.l1, row.l2, row.power_sum, row.largest)
            cells = [row.name, "x".join(map(str, row.shape)), f"{100 * row.zeros:.4g}", *map(_text, numbers)]
            rows.append([*cells, _text(row.adaptivity)] if measured else cells)
        return [*heads, "adaptivity"] if measured else heads, rows

    def table(self) -> Group:
        """For a terminal: a row a layer, then the figures of the network."""
        heads, rows = self.cells()
        layers, figures = Table(), Table(show_header=False)
        for index, head in enumerate(heads):
            layers.add_column(head, justify="right" if index > 1 else "left", overflow="fold")
        for name, *cells in rows:
            layers.add_row(escape(name), *cells)
        for what, value in self.figures():
            figures.add_row(what, value)
        return Group(layers, figures)

    def __str__(self) -> str:
        out = io.StringIO()
        Console(file=out, width=140).print(self.table())
        return out.getvalue()


def measure_norms(model: nn.Module, inputs: Any = None, targets: Tensor | None = None, p: float = 0.5) -> Norms:
    """The norms of a model, packed or in training; it is not changed.

    inputs: data as `shrink` takes it, for logits, adaptivity and the Lipschitz estimate. targets: int64, the classes of
    all its samples in order. p: positive. Raises `PlanError` for p, `DataError` for targets that do not fit.
    """
    if not p > 0:
        raise PlanError(f"p is {p:g}; a norm needs a positive one")
    batches = [] if inputs is None else calls(model, inputs)
    logits, gradient = _gradients(model, batches, targets)
    parameters = {id(value): name for name, value in model.named_parameters()}
    rows = []
    for name, weight, latent in effective_weights(model):
        values = weight.detach().double()
        l2 = float(values.square().sum().sqrt())
        moved = gradient.get(parameters.get(id(latent), ""))
        rows.append(
            WeightNorms(
                name,
                tuple(weight.shape),
                values.numel(),
                float((values == 0).double().mean()),
                float(values.abs().sum()),
                l2,
                float(values.abs().pow(p).sum()),
                float(values.abs().max()),
                moved / l2 if moved is not None and l2 > 0 else None,
            )
        )
    bounded = any(isinstance(module, PSiLONBlock) for module in model.modules())
    total = sum(value**2 for value in gradient.values()) ** 0.5
    return Norms(
        p,
        rows,
        None if logits is None else float(logits.abs().mean()),
        None if logits is None else float(logits.std(1, correction=0).mean()),
        total if gradient else None,
        _path_norm(model, batches),
        bounded,
        _unless_refused(lambda: lipschitz_bound(model, batches[0] if batches else None)),
        jacobian_norm(model, batches[0]) if batches else None,
    )


def effective_weights(model: nn.Module) -> Iterator[tuple[str, Tensor, Tensor | None]]:
    """(name, value as the layer uses it, parameter behind it or None) of every weight, in the order of the modules."""
    sites = {site.name: site.parameter for site in weight_sites(model)}
    packed = packed_weights(model)
    for name, module in model.named_modules():
        chain = weight_chain(module)
        if chain is not None:
            yield (f"{name}.weight" if name else "weight"), cast(Tensor, module.weight), cast(Any, chain).original
        for found in [key for key in (*sites, *packed) if key.rpartition(".")[0] == name]:
            yield found, sites[found] if found in sites else packed[found].decode(), sites.get(found)


def _gradients(model: nn.Module, batches: list[Call], targets: Tensor | None) -> tuple[Tensor | None, dict[str, float]]:
    """(logits [samples, classes], parameter name -> norm of the gradient of the mean cross-entropy) in eval mode."""
    if not batches:
        return None, {}
    total, found, at = sum(call.size for call in batches), [], 0
    if targets is not None and (targets.is_floating_point() or targets.shape != (total,)):
        raise DataError(
            f"targets are {targets.dtype} {list(targets.shape)}; give one class for each of {total} samples"
        )
    trained = {name: value for name, value in model.named_parameters() if value.requires_grad}
    sums = {name: torch.zeros_like(value) for name, value in trained.items()}
    with evaluating(model), torch.enable_grad():
        for call in batches:
            logits = output_tensor(call(model)).float()
            if logits.ndim < 2 or logits.shape[-1] < 2 or len(logits) != call.size:
                return None, {}  # no logits
            own = logits.detach().argmax(-1).flatten()
            wanted = own if targets is None or logits.ndim > 2 else targets[at : at + call.size].to(logits.device)
            at += call.size
            flat = logits.flatten(0, -2)
            found.append(flat.detach())
            if trained and flat.requires_grad:
                loss = F.cross_entropy(flat, wanted) * (call.size / total)
                for name, part in zip(trained, torch.autograd.grad(loss, list(trained.values()), allow_unused=True)):
                    sums[name] += 0 if part is None else part
    return torch.cat(found), {name: float(value.double().norm()) for name, value in sums.items()}


def _path_norm(model: nn.Module, batches: list[Call]) -> float | None:
    """Of chains of linear layers, and of convolutions too if a batch tells their shape; batch norms are folded."""
    found = _unless_refused(lambda: float(path_norm(model)))
    tensors = batches[0].tensors() if batches else []
    if found is not None or len(tensors) != 1 or not tensors[0].is_floating_point() or packed_weights(model):
        return found

    def by_forward() -> float:
        folded = plain(copy.deepcopy(model))
        if any(isinstance(layer, _BatchNorm) for layer in folded.modules()):
            fold_batch_norm(folded, batches[0])
        for layer in chain_of(folded):
            if not isinstance(layer, _POSITIVE):
                raise PlanError(f"a {type(layer).__name__} is not known to add paths up")
        with evaluating(folded):
            return float(path_norm_by_forward(folded, tensors[0][:1]))

    return _unless_refused(by_forward)


def _unless_refused(measure: Any) -> float | None:
    """What it gives, None if the network is not of the kind that it takes."""
    try:
        with torch.no_grad():
            return measure()
    except PlanError:
        return None


def _text(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"
