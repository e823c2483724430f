"""The calibration engine: one pass over the data gives every layer's metric and sensitivity.

For layer l with weight W, input x_t at position t and output gradient g_t, a small change E of the weight changes
the model's output by about sum_t g_t^T E x_t. With independent positions its square is, in expectation,

    D(E) = sum_r w_r e_r^T H e_r,    H = sum_t s_t x_t x_t^T / sum_t s_t,   w_r = sum_t g_tr^2 / samples,   s_t =
    mean_r g_tr^2

(a Kronecker factorisation, 1503.05671, whose output factor is kept diagonal). What g is depends on `distortion`:

    output  g = J^T v with v ~ N(0, I): then E[D] is the squared change of the model's output, a sample
    loss    g of a given loss; without one, of -log p(y|x) with y drawn from the model's own softmax (Fisher)
    layer   no gradient: s_t = 1, w_r = 1 / mean ||W x||^2, the relative error of the layer's own output

"output" is divided by the variance of the output and "layer" by the layer's, so that numbers are relative errors;
"loss" is halved, which makes it the rise of the loss to second order (without one, of the KL divergence).
Positions that cannot matter (padding behind a mask) have no gradient and so no weight. Second moments are summed in
float32, like the products that they are sums of.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import DataError
from ..layers.packed_attention import in_parts
from ..layers.sites import WeightSite
from .capture import input_rows, is_observable
from .contract import LayerView, kept_of
from .data import Call, Output, output_tensor, per_sample

DISTORTIONS = ("output", "loss", "layer")

Loss = Callable[[Tensor, Call], Tensor]

#: Rows of an embedding count as seen this many times more than they were, so that unseen ones are not given up.
EMBEDDING_PRIOR = 1.0


@dataclass
class Moments:
    """Running weighted second moment of a layer's input rows."""

    hessian: Tensor  # float32 [groups, cols, cols], a sum
    total: float = 0.0

    @classmethod
    def zeros(cls, groups: int, cols: int) -> Moments:
        return cls(torch.zeros(groups, cols, cols))

    def add(self, rows: Tensor, weight: Tensor | None) -> None:
        """rows [groups, n, cols], weight [n] or None (ones)."""
        weighted = rows if weight is None else rows * weight.to(rows)[None, :, None]
        self.hessian.baddbmm_(weighted.transpose(1, 2), rows)
        self.total += float(rows.shape[1] if weight is None else weight.sum())

    def mean(self) -> Tensor:
        return self.hessian / self.total if self.total > 0 else self.hessian


@dataclass
class Observation:
    """All that one pass over the data tells.

    views: by site name. reached: sites whose layer ran. position_weight: (module, batch, call of the module in that
    batch) -> s_t, for the sequential pass.
    """

    views: dict[str, LayerView]
    reached: set[str]
    position_weight: dict[tuple[str, int, int], Tensor] = field(default_factory=dict)


@dataclass
class _Running:
    site: WeightSite
    moments: Moments
    row_energy: Tensor  # float64 [rows]: sum of squared gradients, or of squared outputs
    reached: bool = False
    #: The metric of an embedding is that of its output, not of its input.
    counts: Tensor | None = None


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[nn.Module]:
    """Evaluation mode, and every module back in its own mode afterwards."""
    modes = {m: m.training for m in model.modules()}
    model.eval()
    try:
        yield model
    finally:
        for module, mode in modes.items():
            module.training = mode


def observe(
    model: nn.Module,
    batches: Sequence[Call],
    sites: Sequence[WeightSite],
    *,
    distortion: str = "output",
    loss: Loss | None = None,
    output: Output = output_tensor,
    seed: int = 0,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Observation:
    """Run the model over the data once, forward (and backward unless distortion="layer"), and return its layer views.

    Raises `DataError` where outputs or the loss are not finite. The model is not changed.
    """
    if distortion not in DISTORTIONS:
        raise DataError(f"unknown distortion {distortion!r}; choose one of {', '.join(DISTORTIONS)}")
    generator = torch.Generator().manual_seed(seed)
    running = {site.name: _start(site) for site in sites}
    observation = Observation({}, set())
    backward = distortion != "layer"
    by_module: dict[str, list[_Running]] = {}
    for state in running.values():
        by_module.setdefault(state.site.module_name, []).append(state)

    samples = 0
    energy = 0.0
    mean_output: Tensor | float = 0.0
    with evaluating(model), _all_gradients(model, backward, sites), in_parts(model):
        calls_seen: dict[str, int] = {}
        index = 0
        handles = [
            states[0].site.module.register_forward_hook(
                _hook(states, backward, observation, calls_seen, lambda: index), with_kwargs=True
            )
            for states in by_module.values()
        ]
        if backward:
            handles += [
                module.register_forward_hook(_norm_hook(name, observation, lambda: index))
                for name, module in model.named_modules()
                if isinstance(module, nn.LayerNorm)
            ]
        try:
            for index, call in enumerate(batches):
                calls_seen.clear()
                with torch.set_grad_enabled(backward):
                    result = output(call(model), call)
                    if not bool(torch.isfinite(result).all()):
                        raise DataError(
                            f"the model's output is not finite on calibration batch {index}; check weights and data"
                        )
                    flat = per_sample(result, call.size)
                    if backward:
                        _scalar(flat, result, call, distortion, loss, generator, index).backward()
                _fold_parameter_gradients(running, backward)
                flat = flat.detach()
                samples += flat.shape[0]
                energy += float(flat.double().pow(2).sum())
                mean_output = mean_output + flat.double().sum(0) if flat.shape[0] and _same(mean_output, flat) else 0.0
                progress(index + 1, len(batches))
        finally:
            for handle in handles:
                handle.remove()
    scale = 2.0 if distortion == "loss" else 1.0
    if distortion == "output":
        mean = mean_output / samples if isinstance(mean_output, Tensor) else torch.zeros(1)
        variance = energy / samples - float(mean.pow(2).sum())
        scale = variance if variance > 1e-12 * energy / samples else max(energy / samples, 1e-30)
    for name, state in running.items():
        observation.views[name] = _finish(state, samples, scale, distortion)
        if state.reached:
            observation.reached.add(name)
    return observation


def weight_only_view(site: WeightSite) -> LayerView:
    """The view without data: every input counts the same, each layer's relative error counts the same."""
    weight = site.view.to_matrix(site.parameter)
    cols = weight.shape[1]
    hessian = torch.eye(cols).expand(site.groups, cols, cols).clone()
    size = float(torch.linalg.vector_norm(weight, dtype=torch.float64)) ** 2
    row_weight = torch.full((weight.shape[0],), 1.0 / max(size, 1e-30), dtype=torch.float64)
    return LayerView(site.name, weight, hessian, row_weight, site.kind, kept=kept_of(weight))


def _start(site: WeightSite) -> _Running:
    rows, cols = site.view.matrix_shape
    counts = torch.zeros(rows, dtype=torch.float64) if site.kind == "embedding" else None
    groups = 1 if site.kind == "embedding" else site.groups
    return _Running(site, Moments.zeros(groups, cols), torch.zeros(rows, dtype=torch.float64), counts=counts)


def _needs_parameter_gradient(site: WeightSite) -> bool:
    """Layers whose output is not weight times input: their row sensitivity is read off the weight's own gradient."""
    return site.kind == "recurrent" or site.attribute != "weight" or not is_observable(site)


@contextlib.contextmanager
def _all_gradients(model: nn.Module, backward: bool, sites: Sequence[WeightSite]) -> Iterator[None]:
    """Let gradients reach every layer's output while no parameter collects any that is not needed."""
    before = {p: (p.requires_grad, p.grad) for p in model.parameters()}
    wanted = {s.parameter for s in sites if backward and _needs_parameter_gradient(s)}
    for p in before:
        p.requires_grad_(p in wanted)
        p.grad = None
    try:
        yield
    finally:
        for p, (requires_grad, grad) in before.items():
            p.requires_grad_(requires_grad)
            p.grad = grad


def _hook(
    states: list[_Running],
    backward: bool,
    observation: Observation,
    calls_seen: dict[str, int],
    batch: Callable[[], int],
) -> Callable[..., Any]:
    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> Any:
        inputs = args or tuple(kwargs.values())
        name = states[0].site.module_name
        key = (name, batch(), calls_seen.get(name, 0))
        calls_seen[name] = key[2] + 1
        for state in states:
            state.reached = True
        direct = [s for s in states if not _needs_parameter_gradient(s.site)]
        for state in states:
            if state not in direct and is_observable(state.site):
                for rows, _ in input_rows(state.site, inputs):
                    state.moments.add(rows, None)
        if not direct or not isinstance(result, Tensor):
            return None
        state = direct[0]
        if not backward:
            _accumulate(state, inputs, result.detach(), None, observation, key)
            return None
        if not result.requires_grad:  # nothing before this layer is differentiable: start the graph here
            result = result.detach().requires_grad_(True)
        result.register_hook(lambda grad: _accumulate(state, inputs, None, grad.detach(), observation, key))
        return result

    return hook


def _norm_hook(name: str, observation: Observation, batch: Callable[[], int]) -> Callable[..., None]:
    """Notes how much each position of a norm's output matters."""

    def hook(module: nn.Module, args: tuple[Any, ...], result: Tensor) -> None:
        key, width = (name, batch(), 0), result.shape[-1]
        if result.requires_grad:
            result.register_hook(
                lambda grad: observation.position_weight.update(
                    {key: grad.detach().reshape(-1, width).float().pow(2).mean(1)}
                )
            )

    return hook


def _accumulate(
    state: _Running,
    inputs: tuple[Any, ...],
    result: Tensor | None,
    grad: Tensor | None,
    observation: Observation,
    key: tuple[str, int, int],
) -> None:
    seen = grad if grad is not None else result
    assert seen is not None
    if state.counts is not None:
        ids = inputs[0].reshape(-1)
        seen = (
            seen.reshape(ids.numel(), -1).float()
            if seen.numel() == ids.numel() * state.site.view.matrix_shape[1]
            else None
        )
        if seen is None:  # an EmbeddingBag: its outputs are sums over rows
            state.counts.index_add_(0, ids, torch.ones_like(ids, dtype=torch.float64))
            return
        mattering = (seen != 0).any(-1) if grad is not None else torch.ones_like(ids, dtype=torch.bool)
        state.counts.index_add_(0, ids, mattering.double())
        if grad is not None:
            state.moments.add(seen[None], None)
        return
    weights = []
    for rows, positions in input_rows(state.site, inputs, seen):
        energy = positions.float().pow(2)
        state.row_energy += energy.sum(0).double()
        weight = energy.mean(1) if grad is not None else None
        state.moments.add(rows, weight)
        if weight is not None:
            weights.append(weight)
    if weights:
        observation.position_weight[key] = torch.cat(weights)


def _scalar(
    flat: Tensor, result: Tensor, call: Call, distortion: str, loss: Loss | None, generator: torch.Generator, index: int
) -> Tensor:
    """The scalar whose gradient is the probe."""
    if distortion == "output":
        return (flat * torch.randn(flat.shape, generator=generator).to(flat)).sum()
    if loss is not None:
        value = loss(result, call) * call.size
    else:
        log_probability = torch.log_softmax(result.reshape(-1, result.shape[-1]), dim=-1)
        drawn = torch.multinomial(log_probability.detach().exp(), 1, generator=generator)
        value = -log_probability.gather(1, drawn).sum()
    if not bool(torch.isfinite(value)):
        raise DataError(f"the loss is not finite on calibration batch {index}; check the loss function and the data")
    return value


def _fold_parameter_gradients(running: dict[str, _Running], backward: bool) -> None:
    """Row energies of layers read off dL/dW: row r of it is sum_t g_tr x_t, so E||.||^2 = sum_t g_tr^2 * trace(H)."""
    for state in running.values():
        if not _needs_parameter_gradient(state.site) or not backward or state.site.parameter.grad is None:
            continue
        state.reached = True
        gradient = state.site.view.to_matrix(state.site.parameter.grad)
        state.row_energy += gradient.double().pow(2).sum(1)
        state.site.parameter.grad = None


def _finish(state: _Running, samples: int, scale: float, distortion: str) -> LayerView:
    site = state.site
    weight = site.view.to_matrix(site.parameter)  # the parameter's own memory where it can be
    if not state.reached:
        return weight_only_view(site)
    hessian = state.moments.mean()
    cols = weight.shape[1]
    if state.moments.total == 0:
        hessian = torch.eye(cols).expand(hessian.shape).clone()
    if state.counts is not None:
        return _embedding_view(state, weight, hessian, samples, scale, distortion)
    row_weight = state.row_energy / (samples * scale)
    if _needs_parameter_gradient(site):
        trace = float(hessian.diagonal(dim1=-2, dim2=-1).sum(-1).mean())
        row_weight = row_weight / max(trace, 1e-30)
    if distortion == "layer":
        per_group = weight.view(hessian.shape[0], -1, cols)
        size = float((torch.matmul(per_group, hessian) * per_group).sum(dtype=torch.float64))
        row_weight = torch.full_like(row_weight, 1.0 / max(size, 1e-30))
    return LayerView(site.name, weight, hessian, row_weight, site.kind, kept=kept_of(weight))


def _embedding_view(
    state: _Running, weight: Tensor, hessian: Tensor, samples: int, scale: float, distortion: str
) -> LayerView:
    assert state.counts is not None
    used = float(state.counts.sum())
    frequency = (state.counts + EMBEDDING_PRIOR) / (used + EMBEDDING_PRIOR * len(state.counts))
    if distortion == "layer":
        hessian = torch.eye(weight.shape[1])[None]
        size = float(frequency @ torch.linalg.vector_norm(weight, dim=1, dtype=torch.float64).square())
        row_weight = frequency / max(size, 1e-30)
    else:
        row_weight = frequency * used / (samples * scale)  # expected uses of the row in a sample
        if used == 0:
            row_weight = torch.zeros_like(row_weight)
    return LayerView(state.site.name, weight, hessian, row_weight, state.site.kind, kept=kept_of(weight))


def _same(mean: Tensor | float, flat: Tensor) -> bool:
    return not isinstance(mean, Tensor) or mean.shape[-1] == flat.shape[-1]
