"""Repair of norms and biases after compression: fold, para-normalise, correct, tune.

Source: the normalisation and bias parts of AdaQuant / CalibTIP, arXiv 2006.10518 (sections 3.4 and 4 and the released
pipelines). Compression moves the mean and spread of every layer's outputs; the functions here put them back:

    fold_batch_norm     conv -> batch norm becomes one conv with bias; gamma and beta are remembered
    para_normalise      per output channel of a folded layer with output mean mu' and standard deviation sigma':
                            W <- W |gamma| / sigma',   b <- (b - mu') |gamma| / sigma' + beta
                        so the output has mean beta and standard deviation |gamma| again. A row is only scaled, so
                        integer codes stay and only step and zero point change. Batch norms that were not folded get
                        their running statistics from the data.
    correct_bias        b <- b + mean(reference output) - mean(output), layer after layer; needs no batch norm
    bias_tune           gradient descent on the biases against the reference's outputs; no labels

Departures: statistics are cumulative, not momentum averages, so one batch restores (beta, |gamma|) exactly. All
layers are treated in one pass: within each batch, later layers see the repaired outputs of earlier ones. A channel
whose output hardly varies any more is only shifted, since scaling it up would amplify rounding noise. `bias_tune` pairs
targets with samples (the released code pairs them with class labels), takes the mean over samples of the full
divergence, uses Adam, and keeps the best step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from ..errors import PlanError
from .data import Call, calls, output_tensor
from .observe import evaluating

# Below this share of the wanted standard deviation a channel counts as constant: it is shifted, not scaled.
DEAD_CHANNEL = 1e-2
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


@dataclass(frozen=True)
class RowCorrection:
    """How para-normalisation changed a layer: every weight row times multiplier [rows]; the new bias [rows]."""

    multiplier: Tensor
    bias: Tensor


@contextmanager
def _hooks(modules: Iterable[tuple[Any, nn.Module]], make: Callable[[Any, nn.Module], Callable]) -> Iterator[None]:
    """Forward hooks `make(key, module)` on each (key, module), removed on the way out."""
    with ExitStack() as stack:
        for key, module in modules:
            stack.callback(module.register_forward_hook(make(key, module)).remove)
        yield


def _channel_axis(module: nn.Module) -> int:
    """Axis of a module's output that holds its channels, from the end where the batch axis may be missing."""
    if isinstance(module, (_ConvNd,)):
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


# ----------------------------------------------------------------------------------------------------------- folding


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
    model._pennyweight_folded = [*getattr(model, "_pennyweight_folded", []), *kept]  # pyright: ignore
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
    with _hooks(((None, m) for m in model.modules() if isinstance(m, kinds)), make):
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


# -------------------------------------------------------------------------------------------------- para-normalising


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


@torch.no_grad()
def para_normalise(model: nn.Module, data: Any) -> dict[str, RowCorrection]:
    """Give every folded layer's output its batch norm's mean and spread again, in place; formulas in the docstring.

    model: float modules, some of them folded by `fold_batch_norm`. data: batches. Returns what was done to each
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
    with evaluating(model), _hooks(layers.items(), make):
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


# --------------------------------------------------------------------------------------------------- bias correction


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
            with _hooks(((name, original) for name, (_, original) in pairs.items()), record):
                batch(reference)
            with _hooks(((name, module) for name, (module, _) in pairs.items()), repair):
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


# ------------------------------------------------------------------------------------------------------ distillation


def divergence(output: Tensor, target: Tensor, kind: Literal["kl", "mse"]) -> Tensor:
    """kl: sum over classes of p log(p / q), mean over the rest (logits on the last axis). mse: mean squared error
    relative to the targets' mean square."""
    if kind == "mse":
        return F.mse_loss(output, target) / target.square().mean().clamp_min(1e-12)
    log_q, log_p = output.log_softmax(-1), target.log_softmax(-1)
    return (log_p.exp() * (log_p - log_q)).sum(-1).mean()


def distil(
    model: nn.Module,
    reference: nn.Module,
    batches: Sequence[Call],
    groups: Sequence[dict[str, Any]],
    *,
    steps: int,
    loss: Literal["kl", "mse"] = "kl",
    after_step: Callable[[], None] | None = None,
    seed: int = 0,
) -> tuple[float, float]:
    """Adam on parameter groups against the reference's outputs; returns the loss over all batches before and after.

    The reference's outputs are kept in memory. groups: as torch.optim takes them, each with its own
    "lr"; learning rates fall to zero along a cosine. after_step: called after each step (projections). The parameters
    of the best pass over the data are kept, so the loss never rises. Batches are visited in a seeded random order.
    """
    parameters = [p for group in groups for p in group["params"]]
    wanted_grad = [(p, p.requires_grad) for p in (*model.parameters(), *parameters)]
    generator = torch.Generator().manual_seed(seed)
    with evaluating(model), evaluating(reference):
        with torch.no_grad():
            targets = [output_tensor(batch(reference)) for batch in batches]

            def total() -> float:
                losses = [divergence(output_tensor(b(model)), t, loss) for b, t in zip(batches, targets)]
                return float(torch.stack(losses).mean())

            before = best = total()
        kept = [p.detach().clone() for p in parameters]
        for p in model.parameters():
            p.requires_grad_(False)
        for p in parameters:
            p.requires_grad_(True)
        optimizer = torch.optim.Adam(groups)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(steps, 1))
        order: list[int] = []
        check = max(steps // 8, 1)
        for step in range(1, steps + 1):
            order = order or torch.randperm(len(batches), generator=generator).tolist()
            index = order.pop()
            optimizer.zero_grad()
            divergence(output_tensor(batches[index](model)), targets[index], loss).backward()
            optimizer.step()
            schedule.step()
            with torch.no_grad():
                if after_step is not None:
                    after_step()
                if step % check == 0 or step == steps:
                    now = total()
                    if now < best:
                        best, kept = now, [p.detach().clone() for p in parameters]
        with torch.no_grad():
            for p, value in zip(parameters, kept):
                p.copy_(value)
    for p, wanted in wanted_grad:
        p.requires_grad_(wanted)
        p.grad = None
    return before, best


def bias_tune(
    model: nn.Module,
    reference: nn.Module,
    data: Any,
    *,
    steps: int = 200,
    lr: float = 1e-3,
    loss: Literal["kl", "mse"] = "kl",
    skip: Sequence[str] = (),
) -> tuple[float, float]:
    """Short label-free distillation of the biases only, in place; returns the loss before and after.

    loss: "kl" where outputs are logits, "mse" for embeddings and other regressions. skip: names of modules whose bias
    stays (the paper leaves the classifier's). Raises PlanError if no bias is left, DataError if there is no batch.
    """
    biases = [
        module.bias
        for name, module in model.named_modules()
        if name not in skip and isinstance(getattr(module, "bias", None), nn.Parameter)
    ]
    if not biases:
        raise PlanError("bias_tune: the model has no bias to tune; fold its batch norms or leave fewer modules out")
    return distil(model, reference, calls(model, data), [{"params": biases, "lr": lr}], steps=steps, loss=loss)
