"""Carry out a plan: compress the layers in order, each on the inputs that the already compressed ones produce.

The model and its reference run over the calibration data side by side (lockstep.py). When all batches stand before a
layer with weight W and bias b, x the reference's inputs and x~ the compressed model's, both centred on their means m
and m~:

    target   V = W (C + k H) (H~ + k H)^-1, the least squares solution of V x~ = W x, with
             C = sum s x x~^T,  H~ = sum s x~ x~^T,  H = sum s x x^T
    weight   V^, packed by the layer's method from V with the metric H~
    bias     b + W m - V^ m~, so that the output keeps its mean

so a layer also mends what its predecessors did (the asymmetric calibration of GPTAQ, 2504.02692, in closed form; k =
`RIDGE` keeps V near W where data is short). s are the position weights of observe.py. Zeros of a pruned weight stay
zeros; V is then found by iteration. LayerNorms are mended on leaving: weight and bias that best map the output onto the
reference's, channel by channel.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from ..formats import PackedWeight
from ..layers.activation_quantizer import ActivationQuantizer, attach_input_quantizer
from ..layers.packed import free_decoded, install
from ..layers.sites import WeightSite
from .capture import input_rows, is_observable
from .contract import LayerView
from .data import Call
from .lockstep import Halt, lockstep
from .observe import Observation, evaluating
from .packing import pack
from .plan import Choice, Plan

#: Share of the reference's second moment added on both sides of the least squares problem.
RIDGE = 0.1
#: Steps of conjugate gradients for a pruned weight, whose rows have a least squares problem each.
_MASKED_ROUNDS = 30

Progress = Callable[[str, int, int], None]


@dataclasses.dataclass
class Realised:
    """packed: by site name. installed: bytes of those that are in the model already. choices: as carried out, with real
    bytes and distortions. views: those asked for."""

    packed: dict[str, PackedWeight] = dataclasses.field(default_factory=dict)
    installed: dict[str, int] = dataclasses.field(default_factory=dict)
    choices: dict[str, Choice] = dataclasses.field(default_factory=dict)
    views: dict[str, LayerView] = dataclasses.field(default_factory=dict)

    @property
    def nbytes(self) -> dict[str, int]:
        """Bytes on disk by site name."""
        return self.installed | {name: packed.nbytes for name, packed in self.packed.items()}


@torch.no_grad()
def realise(
    model: nn.Module,
    reference: nn.Module,
    batches: Sequence[Call],
    sites: Sequence[WeightSite],
    plan: Plan,
    observation: Observation,
    *,
    sequential: bool = True,
    in_place: bool = False,
    keep: Sequence[str] = (),
    progress: Progress = lambda what, done, total: None,
) -> Realised:
    """Compress `model` and return the packed weights; its parameters get the decoded ones.

    model, reference: the same network twice. sequential=False, no batches, and layers the data never reaches: the
    layer is packed on what `observation` knows, its bias is left alone. keep: names of sites whose final views are
    wanted. in_place: most layers turn into their packed twins as they are done, so that no more than one decoded weight
    is held; not for a model that is to be trained.
    The weights at the sites may be shared with the reference, as each is replaced and never written to; `observation`
    loses its views as layers are done.
    """
    done = Realised()
    by_module: dict[str, list[WeightSite]] = {}
    for site in sites:
        by_module.setdefault(site.module_name, []).append(site)

    def finish(site: WeightSite, view: LayerView) -> Tensor:
        choice = plan.choices[site.name]
        packed, made = pack(view, choice)
        decoded = packed.decode()
        observation.views.pop(site.name)
        done.packed[site.name] = packed
        done.choices[site.name] = dataclasses.replace(made, distortion=view.distortion(decoded))
        if site.name in keep:
            done.views[site.name] = view
        site.parameter.data = site.to_parameter(decoded)
        if site.kind == "embedding":
            retire([site])  # looks up rows, and needs no decoded table at all
        progress("compress", len(done.choices), len(sites))
        return decoded

    def retire(finished: Sequence[WeightSite]) -> None:
        for site in finished:
            if not in_place or site.aliases:
                continue
            if site.name in done.packed:
                packed = done.packed.pop(site.name)
                done.installed[site.name] = packed.nbytes
                install(site.module, {site.attribute: packed}, memory="low", activation_bits=32)
                site.parameter.data = site.parameter.new_empty(0)
            else:
                free_decoded(site.module)

    if sequential and batches:
        _forget_metrics(sites, observation)
        norms = [n for n, m in model.named_modules() if isinstance(m, nn.LayerNorm) and m.elementwise_affine]
        visited: set[str] = set()
        latest: Sequence[WeightSite] = ()
        with evaluating(model), evaluating(reference):
            ours = lockstep(model, batches, list(by_module), norms)
            theirs = lockstep(reference, batches, list(by_module), norms)
            for here, there in zip(ours, theirs):
                if here.module in visited or here.module != there.module or here.batches != there.batches:
                    continue
                visited.add(here.module)
                retire(latest)
                latest = by_module.get(here.module, ())
                if here.outputs is not None:
                    _mend_norm(model.get_submodule(here.module), here, there, observation)
                    continue
                for site in latest:
                    _compress_at(site, here, there, observation, finish)
    for site in sites:
        if site.name not in done.choices:
            finish(site, _with_metric(observation.views[site.name]))
    return done


def quantise_inputs(model: nn.Module, batches: Sequence[Call], sites: Sequence[WeightSite], bits: int) -> None:
    """Give every Linear and convolution of `model` an input quantiser of `bits` bits, calibrated on the data; in place.

    A layer that reads the data itself (the first one reached, if its input is floating) keeps at least 8 bits.
    """
    names = list(
        dict.fromkeys(s.module_name for s in sites if s.kind in ("linear", "conv") and s.attribute == "weight")
    )
    attached: set[str] = set()
    with evaluating(model):
        for halt in lockstep(model, batches, names):
            if halt.module in attached:
                continue
            data = batches[halt.batches[0]].tensors()
            raw = not attached and any(halt.inputs[0][0] is tensor for tensor in data)
            quantizer = ActivationQuantizer(max(bits, 8) if raw else bits)
            quantizer.calibrate([inputs[0] for inputs in halt.inputs])
            attach_input_quantizer(model.get_submodule(halt.module), quantizer)
            attached.add(halt.module)


def _is_measured_anew(site: WeightSite, observation: Observation) -> bool:
    return site.kind != "embedding" and is_observable(site) and site.name in observation.reached


def _forget_metrics(sites: Sequence[WeightSite], observation: Observation) -> None:
    """Free the metrics that are measured anew when their layer's turn comes."""
    for site in sites:
        if _is_measured_anew(site, observation):
            view = observation.views[site.name]
            observation.views[site.name] = dataclasses.replace(view, hessian=torch.empty(view.groups, 0, 0))


def _with_metric(view: LayerView) -> LayerView:
    """The view as it is, or with the identity in place of a metric that was to be measured anew, but could not be: the
    layer's turn did not come, or its positions all weigh nothing."""
    if view.hessian.shape[-1] == view.cols:
        return view
    return dataclasses.replace(view, hessian=torch.eye(view.cols).repeat(view.groups, 1, 1))


def _compress_at(
    site: WeightSite,
    here: Halt,
    there: Halt,
    observation: Observation,
    finish: Callable[[WeightSite, LayerView], Tensor],
) -> None:
    """Pack one site of the module all batches are about to enter."""
    view = observation.views[site.name]
    moments = None
    if _is_measured_anew(site, observation):
        moments = _moments(site, here, there, observation)
    if moments is None:
        finish(site, _with_metric(view))
        return
    weight = view.weight.view(site.groups, -1, view.cols)
    kept = None if view.kept is None else view.kept.view_as(weight)
    target = moments.target(weight.double(), kept).float().reshape(view.weight.shape)
    view = dataclasses.replace(view, weight=target, hessian=moments.ours)
    our_mean, their_mean = moments.our_mean, moments.their_mean
    del moments, target  # large, and of no more use
    decoded = finish(site, view)
    bias = getattr(site.module, "bias", None)
    if isinstance(bias, nn.Parameter) and site.attribute == "weight" and bias.numel() == view.rows:
        shift = torch.einsum("gri,gi->gr", weight.double(), their_mean) - torch.einsum(
            "gri,gi->gr", decoded.double().view_as(weight), our_mean
        )
        bias += shift.reshape(-1).to(bias)


@dataclasses.dataclass
class _Pair:
    """Weighted moments of the compressed model's inputs (ours) and the reference's (theirs): [groups, ...], the second
    ones float32, the means float64.

    positions: how many there are, as counted by their weights.
    """

    ours: Tensor
    theirs: Tensor
    cross: Tensor
    our_mean: Tensor
    their_mean: Tensor
    positions: float

    def target(self, weight: Tensor, kept: Tensor | None = None) -> Tensor:
        """V [groups, rows, cols] of the module docstring; W itself where the moments are too poor to solve for it.

        kept: of the same shape, False where a pruned weight stays zero; V is then the best of those weights found.
        Gives up `theirs` and `cross`: the moments of a wide layer are large.
        """
        cols = weight.shape[-1]
        trust = RIDGE * (1 + 4 * cols / self.positions)  # the fewer positions, the less they are trusted
        floor = (1e-4 * self.ours.diagonal(dim1=-2, dim2=-1).mean(-1))[:, None, None]
        right = weight @ self.cross.add_(self.theirs, alpha=trust).double() + floor * weight
        del self.cross
        left = self.theirs.mul_(trust).add_(self.ours).double()
        del self.theirs
        left.diagonal(dim1=-2, dim2=-1).add_(floor[:, 0])
        if kept is not None:
            return _masked_solution(left, right, weight, kept)
        factor, failed = torch.linalg.cholesky_ex(left)
        del left
        if int(failed.max()):
            return weight
        return torch.cholesky_solve(right.transpose(1, 2), factor).transpose(1, 2)


def _masked_solution(left: Tensor, right: Tensor, weight: Tensor, kept: Tensor) -> Tensor:
    """V near the minimum of tr(V left V^T) / 2 - tr(V right^T) among the weights that are zero where not `kept`.

    Conjugate gradients with the diagonal as preconditioner, all rows at once, from `weight`: never worse than that.
    left: [groups, cols, cols]; right, weight, kept: [groups, rows, cols].
    """
    diagonal = left.diagonal(dim1=-2, dim2=-1)[:, None, :]
    solution = weight * kept
    residual = (right - solution @ left) * kept
    direction = scaled = residual / diagonal
    product = (residual * scaled).sum(-1, keepdim=True)
    for _ in range(_MASKED_ROUNDS):
        pushed = (direction @ left) * kept
        step = product / (direction * pushed).sum(-1, keepdim=True).clamp_min(torch.finfo(left.dtype).tiny)
        solution = solution + step * direction
        residual = residual - step * pushed
        scaled = residual / diagonal
        before, product = product, (residual * scaled).sum(-1, keepdim=True)
        direction = scaled + direction * (product / before.clamp_min(torch.finfo(left.dtype).tiny))
    return solution


def _moments(site: WeightSite, here: Halt, there: Halt, observation: Observation) -> _Pair | None:
    cols, groups = site.view.matrix_shape[1], site.groups
    square = [torch.zeros(groups, cols, cols) for _ in range(3)]
    sums = [torch.zeros(groups, cols, dtype=torch.float64) for _ in range(2)]
    total = squares = 0.0
    for batch, ours, theirs in zip(here.batches, here.inputs, there.inputs):
        weight = observation.position_weight.get((site.module_name, batch, 0))
        at = 0
        for (x, _), (y, _) in zip(input_rows(site, ours), input_rows(site, theirs)):
            n = x.shape[1]
            s = torch.ones(n) if weight is None else weight[at : at + n].float()
            at += n
            weighted_x, weighted_y = x * s[None, :, None], y * s[None, :, None]
            square[0].baddbmm_(weighted_x.transpose(1, 2), x)
            square[1].baddbmm_(weighted_y.transpose(1, 2), y)
            square[2].baddbmm_(weighted_y.transpose(1, 2), x)
            sums[0] += weighted_x.sum(1)
            sums[1] += weighted_y.sum(1)
            total += float(s.sum())
            squares += float(s.pow(2).sum())
    if total <= 0:
        return None
    mine, their = sums[0] / total, sums[1] / total
    if not isinstance(getattr(site.module, "bias", None), nn.Parameter) or site.attribute != "weight":
        mine, their = torch.zeros_like(mine), torch.zeros_like(their)  # no bias can take up the means
    for moment, left, right in zip(square, (mine, their, their), (mine, their, mine)):
        moment.div_(total).baddbmm_(left[:, :, None].float(), right[:, None, :].float(), alpha=-1.0)
    ours, theirs, cross = square
    return _Pair(ours, theirs, cross, mine, their, total**2 / squares)


def _mend_norm(norm: nn.Module, here: Halt, there: Halt, observation: Observation) -> None:
    """Channel by channel, the weight and bias with which the norm's output is nearest to the reference's; in place.

    Sums are weighted by the sensitivity of each position; the parked batches go on with the mended outputs.
    """
    assert isinstance(norm, nn.LayerNorm) and here.outputs is not None and there.outputs is not None
    sums = torch.zeros(5, norm.weight.numel(), dtype=torch.float64)
    for batch, ours, theirs in zip(here.batches, here.outputs, there.outputs):
        x, y = (t.reshape(-1, norm.weight.numel()).double() for t in (ours, theirs))
        s = observation.position_weight.get((here.module, batch, 0))
        s = torch.ones(len(x), 1, dtype=torch.float64) if s is None else s.double()[:, None]
        sums += torch.stack(
            [s.sum().expand(x.shape[1]), (s * x).sum(0), (s * y).sum(0), (s * x * x).sum(0), (s * x * y).sum(0)]
        )
    total, x, y, xx, xy = sums
    if float(total[0]) <= 0:
        return
    x, y = x / total, y / total
    variance, covariance = xx / total - x * x, xy / total - x * y
    slope = torch.where(variance > 1e-12, covariance / variance.clamp_min(1e-12), 1.0).clamp(0.5, 2.0)
    shift = (y - slope * x).view_as(norm.weight)
    slope = slope.view_as(norm.weight)
    norm.weight.mul_(slope.to(norm.weight))
    if norm.bias is not None:
        norm.bias.copy_(norm.bias.double() * slope + shift)
    else:
        shift = 0.0
    for output in here.outputs:
        output.copy_(output.double() * slope + shift)
