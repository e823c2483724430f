"""Recovery: short label-free distillation of a compressed network against the original.

Every integer weight keeps its grid and trains a latent weight behind it (straight-through estimator, 1308.3432):

    forward   code(V) * grid,   code(V) = round(V / grid)        backward   d/dV = d/d(decoded)

The latent starts in the cell that compression chose, at the point nearest to the original weight, so training begins
from the compressed network and not from plain rounding. Norms and biases train along; weights in other formats stay.
The loss compares the model's outputs with the reference's on the same inputs, and, where the model has LayerNorms,
their outputs too (each as squared error over variance; positions count by their sensitivity):

    loss = |f - f*|^2 / var f* + FEATURES * mean_l |h_l - h*_l|^2 / var h*_l

The budget stays a promise: entropy-coded codes change size as they train, so a common factor on all free grids is
steered to hold the size, and the last word has the real encoder.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from ..bundle import halve, predict_bytes
from ..errors import DataError
from ..formats import Integer, PackedWeight
from ..layers.sites import WeightSite
from .contract import kept_of
from .data import Call, Output
from .observe import Observation, evaluating
from .realise import Realised

FEATURES = 0.3
#: Learning rates: of a latent weight, in units of its layer's grid; of norms and biases, absolute.
LATENT_RATE, AFFINE_RATE = 0.01, 3e-4
#: How far from the middle of its cell a latent weight may start, in units of the grid: error feedback leaves many
#: originals beyond their cell's edge, and at the edge (0.5) the first step would flip them all.
START = 0.25
_WARM_UP = 0.05
_STEER_EVERY, _STEER_FROM = 20, 0.005
#: The grids stop changing when this share of the steps is done.
_STEER_UNTIL = 0.8


class _Grid(nn.Module):
    """Rounds a parameter to `factor * grid` in the parameter's own shape, straight through.

    grid, offset: broadcastable to the matrix [rows, cols]; low, high: the codes there are, None where they are
    unbounded (then `factor` may move). kept: False where a pruned weight stays zero, None of others.
    """

    def __init__(self, site: WeightSite, packed: Integer, kept: Tensor | None) -> None:
        super().__init__()
        self.site, self.bits, self.group, self.kept = site, packed.bits, packed.group, kept
        self.scale = packed.scale.all()
        self.column = None if packed.column_scale is None else packed.column_scale.all()[0]
        self.minimum = None if packed.minimum is None else packed.minimum.all()
        self.grid = _spread(self.scale, packed) if self.column is None else _spread(self.scale, packed) * self.column
        self.offset = None if self.minimum is None else _spread(self.minimum, packed)
        self.free = self.minimum is None and packed.group == 0
        self.factor = 1.0

    def codes(self, matrix: Tensor) -> Tensor:
        grid = self.grid * self.factor
        steps = matrix if self.offset is None else matrix - self.offset
        code = torch.where(grid > 0, steps / grid, 0.0).round()
        if self.kept is not None and self.offset is None:
            code = code * self.kept
        if self.free:
            return code.clamp(-32767, 32767)
        low = 0 if self.offset is not None else -(2 ** (self.bits - 1))
        return code.clamp(low, low + 2**self.bits - 1)

    def decode(self, codes: Tensor) -> Tensor:
        values = codes * (self.grid * self.factor)
        return values if self.offset is None else values + self.offset

    def forward(self, weight: Tensor) -> Tensor:
        with torch.no_grad():
            matrix = self.site.view.to_matrix(weight)
            rounded = self.site.view.from_matrix(self.decode(self.codes(matrix)))
            difference = rounded - weight
        return weight + difference

    def start(self, original: Tensor, decoded: Tensor) -> Tensor:
        """The latent matrix nearest to `original` that safely decodes to `decoded`."""
        reach = START * self.grid
        return decoded + (original - decoded).clamp(-reach, reach)

    def pack(self, matrix: Tensor) -> PackedWeight:
        codes = self.codes(matrix).to(torch.int32)
        bits = self.bits
        if self.free:
            largest = max(int(codes.max()), -int(codes.min()) - 1, 0)
            bits = max(1, largest.bit_length() + 1)
        return Integer.from_codes(
            codes,
            self.scale * self.factor,
            self.minimum,
            bits=bits,
            group=self.group,
            scale_coding="log8" if self.free else "float16",
            column_scale=self.column,
        )


def _spread(values: Tensor, packed: Integer) -> Tensor:
    """Group values [rows, groups] as [rows, 1] or [rows, cols]."""
    return values if values.shape[1] == 1 else values.repeat_interleave(packed.group, 1)[:, : packed.shape[1]]


@torch.enable_grad()
def recover(
    model: nn.Module,
    reference: nn.Module,
    batches: Sequence[Call],
    sites: Sequence[WeightSite],
    done: Realised,
    budget: int | None,
    *,
    output: Output,
    steps: int,
    observation: Observation | None = None,
    seed: int = 0,
    progress: Callable[[str, int, int], None] = lambda what, done, total: None,
) -> tuple[float, float]:
    """Train `model` (parameters as decoded by realise) in place and replace `done.packed`; loss before and after.

    budget: bytes of the files, held if not None. Every tenth batch is held out: returns the relative squared error of
    the outputs on those before and after; where it did not fall, everything is put back.
    Raises DataError if there are no batches or the loss stops being finite.
    """
    if not batches:
        raise DataError("recover needs calibration data: it distils the original into the small model on your batches")
    generator = torch.Generator().manual_seed(seed)
    apart = set(range(0, len(batches), 10)) if len(batches) > 1 else set()  # judged on, not trained on
    held_out = [call for i, call in enumerate(batches) if i in apart or not apart]
    trained_on = [i for i in range(len(batches)) if i not in apart]
    before = _validation(model, reference, held_out, output)
    kept = dict(done.packed), dict(done.choices)
    untouched = copy.deepcopy(model.state_dict())
    grids = {
        s.name: _Grid(s, p, kept_of(s.view.to_matrix(reference.get_parameter(s.name))))
        for s in sites
        if isinstance(p := done.packed[s.name], Integer) and p.centroids is None and p.column_offset is None
    }
    by_name = {s.name: s for s in sites}
    wanted_grad = {p: p.requires_grad for p in model.parameters()}
    trained = {id(by_name[n].parameter) for n in grids}
    site_parameters = {id(s.parameter) for s in sites}
    affine = [p for p in model.parameters() if id(p) not in site_parameters and p.is_floating_point()]
    groups = []
    with torch.no_grad():
        for name, grid in grids.items():
            site = by_name[name]
            decoded = done.packed[name].decode()
            original = site.view.to_matrix(reference.get_parameter(name))
            site.parameter.copy_(site.to_parameter(grid.start(original, decoded)))
            groups.append({"params": [site.parameter], "lr": LATENT_RATE * float(grid.grid.mean())})
    for p in model.parameters():
        p.requires_grad_(id(p) in trained or any(p is a for a in affine))
    for name, grid in grids.items():
        site = by_name[name]
        parametrize.register_parametrization(site.module, site.attribute, grid, unsafe=True)
        for alias in site.aliases:
            module = model.get_submodule(alias.rpartition(".")[0])
            parametrize.register_parametrization(module, alias.rpartition(".")[2], grid, unsafe=True)
    groups.append({"params": affine, "lr": AFFINE_RATE})
    optimizer = torch.optim.Adam(groups, betas=(0.9, 0.98))
    warm = max(1, int(_WARM_UP * steps))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda t: min((t + 1) / warm, 0.5 * (1 + math.cos(math.pi * min(1.0, t / max(1, steps))))),
    )
    latents = {n: _latent(by_name[n]) for n in grids}
    steering = _Steering(model, done, grids, latents, budget)
    order: list[int] = []
    scale: float | None = None
    with evaluating(model), evaluating(reference), _features(model) as ours, _features(reference) as theirs:
        for step in range(steps):
            order = order or torch.randperm(len(trained_on), generator=generator).tolist()
            index = trained_on[order.pop()]
            call = batches[index]
            with torch.no_grad():
                target = output(call(reference), call)
            result = output(call(model), call)
            if scale is None:
                scale = max(float(target.float().var()), 1e-12)
            loss = (result - target).float().pow(2).mean() / scale
            if ours:
                loss = loss + FEATURES * _feature_loss(ours, theirs, observation, index)
            if not bool(torch.isfinite(loss)):
                raise DataError(f"the recovery loss is not finite at step {step}; check the calibration data")
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            schedule.step()
            if step % _STEER_EVERY == _STEER_EVERY - 1 and step < _STEER_UNTIL * steps:
                steering.steer()
            progress("recover", step + 1, steps)
    trained_matrices = {n: latent().clone() for n, latent in latents.items()}
    for name in grids:
        site = by_name[name]
        for place in (site.name, *site.aliases):
            module, attribute = model.get_submodule(place.rpartition(".")[0]), place.rpartition(".")[2]
            parametrize.remove_parametrizations(module, attribute, leave_parametrized=False)
    halve(affine)
    steering.finish(trained_matrices)
    for name in grids:
        site, packed = by_name[name], done.packed[name]
        with torch.no_grad():
            model.get_parameter(name).copy_(site.view.from_matrix(packed.decode()))
        done.choices[name] = dataclasses.replace(done.choices[name], nbytes=packed.nbytes, split=None)
    for p, wanted in wanted_grad.items():
        p.requires_grad_(wanted)
        p.grad = None
    after = _validation(model, reference, held_out, output)
    if after >= before:  # never worse on data it was not trained on
        model.load_state_dict(untouched)
        done.packed, done.choices = kept
        return before, before
    return before, after


@torch.no_grad()
def _validation(model: nn.Module, reference: nn.Module, batches: Sequence[Call], output: Output) -> float:
    """Squared error of the outputs over the variance of the reference's."""
    error = energy = 0.0
    with evaluating(model), evaluating(reference):
        for call in batches:
            target = output(call(reference), call).double()
            error += float((output(call(model), call).double() - target).pow(2).sum())
            energy += float((target - target.mean()).pow(2).sum())
    return error / max(energy, 1e-30)


def _latent(site: WeightSite) -> Callable[[], Tensor]:
    """The latent matrix of a parametrized site."""
    holder = site.module.parametrizations[site.attribute]  # type: ignore[index, union-attr]
    return lambda: site.view.to_matrix(holder.original)  # type: ignore[union-attr]


@contextlib.contextmanager
def _features(model: nn.Module) -> Iterator[dict[str, Tensor]]:
    """Outputs of the LayerNorms in the latest forward, by name."""
    seen: dict[str, Any] = {}
    handles = [
        module.register_forward_hook(lambda _m, _i, out, name=name: seen.__setitem__(name, out))
        for name, module in model.named_modules()
        if isinstance(module, nn.LayerNorm)
    ]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def _feature_loss(
    ours: dict[str, Tensor], theirs: dict[str, Tensor], observation: Observation | None, index: int
) -> Tensor:
    terms = []
    for name, feature in ours.items():
        target = theirs[name].float()
        error = (feature.float() - target).pow(2).mean(-1).reshape(-1)
        weight = None if observation is None else observation.position_weight.get((name, index, 0))
        weight = torch.ones_like(error) if weight is None or len(weight) != len(error) else (weight > 0).to(error)
        terms.append((error * weight).sum() / weight.sum().clamp_min(1.0) / target.var().clamp_min(1e-12))
    return torch.stack(terms).mean()


class _Steering:
    """Holds the size of the files while codes train."""

    def __init__(
        self,
        model: nn.Module,
        done: Realised,
        grids: dict[str, _Grid],
        latents: dict[str, Callable[[], Tensor]],
        budget: int | None,
    ) -> None:
        self.model, self.done, self.grids, self.latents, self.budget = model, done, grids, latents, budget
        self.matrices: dict[str, Tensor] = {}
        self.free = [n for n in grids if grids[n].free]
        self.start = {n: (done.packed[n].nbytes, self._entropy(n)) for n in self.free}

    @torch.no_grad()
    def _entropy(self, name: str) -> float:
        codes = self.grids[name].codes(self.latents[name]()).flatten()
        counts = torch.bincount((codes - codes.min()).long()).double()
        share = counts[counts > 0] / counts.sum()
        return float(-(counts[counts > 0] * share.log2()).sum()) / 8

    def steer(self) -> None:
        """Coarsen (or refine) the free grids in proportion to how far the estimated size has drifted."""
        if not self.free:
            return
        planned = sum(nbytes for nbytes, _ in self.start.values())
        now = sum(nbytes * self._entropy(n) / max(h, 1.0) for n, (nbytes, h) in self.start.items())
        drift = math.log(max(now, 1.0) / max(planned, 1))
        if abs(drift) > _STEER_FROM:  # every change of the grids rounds all weights anew
            self._scale(math.exp(max(-0.05, min(0.05, 1.2 * drift))))

    def _scale(self, factor: float) -> None:
        for name in self.free:
            self.grids[name].factor *= factor

    @torch.no_grad()
    def finish(self, matrices: dict[str, Tensor]) -> None:
        """Pack the trained latents, at the finest common factor found whose files fit."""
        self.matrices = matrices
        self._pack(list(self.grids))
        if self.budget is None or not self.free:
            return
        low, high = 0.0, math.inf  # log factors: too large a file, fits
        at, best = 0.0, None
        for _ in range(8):
            total = self._total()
            if total <= self.budget:
                high, best = at, {n: (self.done.packed[n], self.grids[n].factor) for n in self.free}
                if total >= 0.998 * self.budget:
                    return
            else:
                low = at
            gap = math.log(total / (0.999 * self.budget)) * 1.3
            step = gap
            if total <= self.budget and low < at and math.isfinite(high) and low != 0.0:
                step = (low - at) / 2
            elif total > self.budget and math.isfinite(high):
                step = (high - at) / 2
            self._scale(math.exp(step))
            at += step
            self._pack(self.free)
        if self._total() > self.budget and best is not None:
            for name, (packed, factor) in best.items():
                self.done.packed[name], self.grids[name].factor = packed, factor

    def _total(self) -> int:
        return predict_bytes(self.model, {n: p.nbytes for n, p in self.done.packed.items()})

    def _pack(self, names: Sequence[str]) -> None:
        for name in names:
            self.done.packed[name] = self.grids[name].pack(self.matrices[name])
