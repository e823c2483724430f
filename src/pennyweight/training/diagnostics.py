"""What quantised weights do while they train: flips, oscillation, how far the surrogate is from the step.

Measured at every estimator in a chain of weight parametrizations, whose output is the integer code c of a weight:

    flip            f_t = sign(c_t - c_(t-1)), per optimizer update                                    OFQ, 2302.02210
    oscillation     f_t * (last nonzero flip) = -1: the weight went back where it came from
    rate            mean over weights and updates since the last log. OFQ's code keeps a moving average (momentum 0.01)
                    of each weight; the mean over an interval says the same of the network without a tensor more
    estimating error        sum over layers of |F(z) - step(z)|_2, z what the estimator sees, F the function whose
                            derivative the backward pass uses, at the end of its schedule        ReSTE, 2308.06689
    gradient instability    sum over layers of Var(|dL/dw|), unbiased, over the latent weights of the layer

ReSTE's code reads the last batch of an epoch and accumulates both over epochs; here each log stands for itself.
Gradients are read before clipping. Codes are seen in the forward pass, so an update counts at the step that follows it.
Where processes divide the parameters among them, latent weights and gradients are gathered to be read: every process
calls `gradients` and `report`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import ParametrizationList

from ..estimators import Estimator
from .parallel import whole

#: Bins of a histogram of latent weights, from -3 to 3 times their root mean square; the outer ones hold all beyond.
BINS = 16


class _Layer:
    """One quantised weight."""

    def __init__(self, latent: nn.Parameter, estimator: Estimator) -> None:
        self.latent, self.estimator = latent, estimator
        self.codes: Tensor | None = None
        self.last_flip: Tensor | None = None
        self.seen: Tensor | None = None
        self.flips = self.oscillations = torch.zeros((), dtype=torch.int64, device=latent.device)
        self.updates = 0


class Diagnostics:
    """Watches the weight estimators of a prepared model. A model without any is watched at no cost."""

    def __init__(self, model: nn.Module) -> None:
        self.layers: dict[str, _Layer] = {}
        self._waiting: dict[str, bool] = {}
        self._handles = []
        for path, chain in model.named_modules():
            if not isinstance(chain, ParametrizationList):
                continue
            estimators = [module for module in chain.modules() if isinstance(module, Estimator)]
            if estimators:
                name = path.replace(".parametrizations.", ".").replace("parametrizations.", "")
                latent = chain.original if hasattr(chain, "original") else chain.original0
                self.layers[name] = _Layer(latent, estimators[-1])  # type: ignore[arg-type]
                self._handles.append(estimators[-1].register_forward_hook(self._hook(name)))

    def watch(self, updated: bool) -> None:
        """Look at the codes of the next forward pass. updated: an optimizer step was carried out since the last one."""
        self._waiting = dict.fromkeys(self.layers, updated)

    def _hook(self, name: str) -> Any:
        @torch.no_grad()
        def seen(_module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            if name not in self._waiting:
                return
            updated = self._waiting.pop(name)
            layer = self.layers[name]
            codes = output.detach().to(torch.int16)
            layer.seen = inputs[0].detach().clone()  # it may be the latent weight, which the step changes
            if layer.codes is None or layer.last_flip is None:
                layer.last_flip = torch.zeros_like(codes, dtype=torch.int8)
            elif updated:
                flip = torch.sign(codes - layer.codes).to(torch.int8)
                layer.flips = layer.flips + flip.count_nonzero()
                layer.oscillations = layer.oscillations + (flip * layer.last_flip == -1).sum()
                layer.last_flip = torch.where(flip != 0, flip, layer.last_flip)
                layer.updates += 1
            layer.codes = codes

        return seen

    @torch.no_grad()
    def gradients(self) -> dict[str, float]:
        """Var(|dL/dw|) of each layer; call it when gradients are whole and unscaled."""
        return {
            name: float(whole(layer.latent.grad).abs().float().var())
            for name, layer in self.layers.items()
            if layer.latent.grad is not None and layer.latent.numel() > 1
        }

    @torch.no_grad()
    def report(self, gradients: Mapping[str, float], histograms: bool) -> dict[str, dict[str, Any]]:
        """What is known of each layer since the last report; `reset` begins the next interval."""
        found: dict[str, dict[str, Any]] = {}
        for name, layer in self.layers.items():
            latent = {"latent": histogram(whole(layer.latent))} if histograms else {}
            if layer.seen is not None:
                found[name] = self._row(layer, gradients.get(name)) | latent
        return found

    def reset(self) -> None:
        for layer in self.layers.values():
            layer.flips = layer.oscillations = torch.zeros_like(layer.flips)
            layer.updates = 0

    def _row(self, layer: _Layer, gradient: float | None) -> dict[str, Any]:
        assert layer.seen is not None
        chances = layer.updates * layer.seen.numel()
        return {
            "weights": layer.seen.numel(),
            "updates": layer.updates,
            "flip_rate": int(layer.flips) / chances if chances else None,
            "oscillation_rate": int(layer.oscillations) / chances if chances else None,
            "estimating_error": estimating_error(layer.estimator, layer.seen),
            "gradient_instability": gradient,
        }

    def state_dict(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Tensors, and plain values by layer."""
        tensors: dict[str, Tensor] = {}
        plain: dict[str, Any] = {}
        for name, layer in self.layers.items():
            plain[name] = [int(layer.flips), int(layer.oscillations), layer.updates]
            if layer.codes is not None and layer.last_flip is not None:
                tensors |= {f"{name}.codes": layer.codes, f"{name}.last_flip": layer.last_flip}
        return tensors, plain

    def load_state_dict(self, tensors: Mapping[str, Tensor], plain: Mapping[str, Any]) -> None:
        for name, (flips, oscillations, updates) in plain.items():
            layer, device = self.layers[name], self.layers[name].latent.device
            layer.flips = torch.tensor(flips, device=device)
            layer.oscillations = torch.tensor(oscillations, device=device)
            layer.updates = updates
            if f"{name}.codes" in tensors:
                layer.codes = tensors[f"{name}.codes"].to(device)
                layer.last_flip = tensors[f"{name}.last_flip"].to(device)

    def close(self) -> None:
        """Stop watching."""
        for handle in self._handles:
            handle.remove()
        self.layers, self._waiting = {}, {}


def totals(rows: Mapping[str, Mapping[str, Any]]) -> dict[str, float | None]:
    """Of the whole network: rates weighted by weights and updates, error and instability summed over layers."""
    chances = sum(row["weights"] * row["updates"] for row in rows.values())
    found: dict[str, float | None] = {}
    for rate in ("flip_rate", "oscillation_rate"):
        counted = sum((row[rate] or 0.0) * row["weights"] * row["updates"] for row in rows.values())
        found[rate] = counted / chances if chances else None
    for key in ("estimating_error", "gradient_instability"):
        values = [row[key] for row in rows.values() if row[key] is not None]
        found[key] = sum(values) if values else None
    return found


@torch.no_grad()
def estimating_error(estimator: Estimator, z: Tensor) -> float:
    """|F(z) - step(z)|_2 with F as it is when training ends (ReSTE uses o_end)."""
    progress = estimator.progress.clone()
    estimator.progress.fill_(1.0)
    try:
        return float((estimator.approximation(z) - estimator.exact(z)).float().norm())
    finally:
        estimator.progress.copy_(progress)


@torch.no_grad()
def histogram(weight: Tensor) -> dict[str, Any]:
    """{"scale": root mean square, "counts": BINS numbers}."""
    values = weight.detach().float()
    scale = float(values.square().mean().sqrt())
    if scale == 0.0:
        return {"scale": 0.0, "counts": [values.numel()]}
    units = (values / scale).clamp(-3, 3)
    return {"scale": scale, "counts": units.histc(BINS, -3, 3).int().tolist()}
