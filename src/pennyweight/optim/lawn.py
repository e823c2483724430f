"""LAWN: after a free phase the norms of the last layers' weights stay what they are, so that logits cannot run away.

Logit Attenuating Weight Normalization, arXiv 2108.05839. Without well-tuned weight decay an over-parameterised
classifier lowers its loss by growing its weights; the gradient dwindles and the network can no longer move. LAWN stacks
on any optimizer (LAWN-Adam, LAWN-SGD, LAWN-LAMB). Free phase: the inner optimizer alone. At the switch c = ||w|| is
taken of every constrained weight w, and from then on, with u = w / ||w||:

    g <- g - <g, u> u               the tangent part of the gradient is all that the inner optimizer sees
    d  = what the inner step added to w
    d <- d - <d, u> u               Adam's elementwise scaling leaves the tangent space
    w <- c (w + d) / ||w + d||      back to the sphere

What could be read of the paper is its abstract and opening: fixed norms per layer, the final homogeneous sub-network,
any optimizer. Two phases, the projections and their order are the common understanding of it, not checked line by line,
and the following are our choices, each an option: which weights (`layers`), one norm per tensor rather than per row, no
biases, gains and embeddings; the inner momentum at the switch (`momentum`); the second projection (`project_update`);
the switch at a step the user gives (5 % of the training, at least one epoch, is a start). The learning rate is left to
its scheduler: warm up again after the switch and decay to 0, as the two stages of recipes/lawn.yaml do.

Weight decay of constrained weights has no effect but a little on the length of steps; 0 is best. Clip after
`project_gradients()`, or the radial part uses up the clip. Pruning masks and p-norm decay change norms: put LAWN around
them (outermost), so that each step ends on the spheres.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.distributed import all_reduce
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from ..errors import PlanError, warn
from ..registry import register
from .closure import evaluated
from .homogeneous import homogeneous_weights, logits_of
from .wrapper import OptimizerWrapper

_NORM = "lawn_norm"
#: What torch's optimizers call a running mean of gradients.
_MOMENTUM = ("exp_avg", "momentum_buffer")


def inner_products(left: Sequence[Tensor], right: Sequence[Tensor]) -> list[Tensor]:
    """<left, right> of each pair as a scalar in float32 or float64, summed over the shards of sharded tensors."""
    products = [_local(a).flatten().dot(_local(b).flatten()) for a, b in zip(map(_wide, left), map(_wide, right))]
    alike: dict[Any, list[int]] = {}
    for index, tensor in enumerate(left):
        if isinstance(tensor, DTensor):
            alike.setdefault((tensor.device_mesh, tensor.placements), []).append(index)
    for (mesh, placements), indices in alike.items():
        total = torch.stack([products[index] for index in indices])
        for dimension, placement in enumerate(placements):
            if placement.is_shard():
                all_reduce(total, group=mesh.get_group(dimension))
        for index, product in zip(indices, total.unbind()):
            products[index] = product
    return products


def tangent_(vectors: Sequence[Tensor], weights: Sequence[Tensor], norms: Sequence[Tensor]) -> None:
    """Take away from each vector its part along the weight, whose norm is given."""
    for vector, weight, norm, product in zip(vectors, weights, norms, inner_products(vectors, weights)):
        _local(vector).addcmul_(_local(weight), (product / norm**2).to(weight.dtype), value=-1)


@register(
    "lawn",
    acts_on="optim",
    paper="2108.05839",
    description="around any optimizer: after a free phase the last layers' weight norms stay constant",
)
class LAWN(OptimizerWrapper):
    """Constant weight norms around any optimizer.

    model: whose weights are constrained. layers: "final_homogeneous" finds them in the first forward pass with
    gradients after this is made; "all_matrices" takes all parameters of two dimensions or more but for tables of
    embeddings; or patterns over parameter names. A compiled or sharded model hides what the search needs: give the
    names that `final_homogeneous(model, example)` finds beforehand. free_steps: of the free phase; None: until `switch`
    is called. momentum: of the constrained weights at the switch, "clear" (all of their inner state), "project" or
    "keep". project_update: the second projection. The norms are part of the state dict, and a checkpoint decides the
    phase and the weights. Weights that are zero at the switch stay free, with a warning.
    Raises PlanError if no weight is constrained, on patterns that match nothing, and on options out of range.
    """

    own_keys = (_NORM,)

    def __init__(
        self,
        inner: Optimizer,
        model: nn.Module,
        layers: Literal["final_homogeneous", "all_matrices"] | Sequence[str] = "final_homogeneous",
        *,
        free_steps: int | None = 0,
        momentum: Literal["clear", "project", "keep"] = "clear",
        project_update: bool = True,
    ) -> None:
        if free_steps is not None and free_steps < 0:
            raise PlanError(f"lawn: free_steps {free_steps} must not be negative")
        if momentum not in ("clear", "project", "keep"):
            raise PlanError(f"lawn: momentum is {momentum!r}; it can be 'clear', 'project' or 'keep'")
        super().__init__(inner, {"lawn_free": free_steps, "lawn_step": 0})
        self.momentum, self.project_update = momentum, project_update
        self.names = {parameter: name for name, parameter in model.named_parameters()}
        self.constrained: list[nn.Parameter] | None = None
        if layers == "final_homogeneous":
            self._search = model.register_forward_hook(self._find)
        else:
            self.constrained = self._trained(_chosen(model, layers))

    @classmethod
    def around(cls, inner: Optimizer, model: nn.Module, **options: Any) -> LAWN:
        return cls(inner, model, **options)

    @property
    def switched(self) -> bool:
        """Whether the norms are constant by now."""
        return bool(self.own)

    @torch.no_grad()
    def switch(self) -> None:
        """End the free phase: take the norms as they are."""
        if self.constrained is None:
            raise PlanError(
                "lawn: no forward pass with gradients was seen, so the final homogeneous sub-network is not known; "
                "give the names that pennyweight.optim.final_homogeneous(model, example) finds as layers"
            )
        norms = [square.sqrt() for square in inner_products(self.constrained, self.constrained)]
        for weight, norm in zip(self.constrained, norms):
            if not float(norm) > 0:
                warn(f"lawn: {self.names[weight]} is zero at the switch and has no direction, so it stays free")
                continue
            self.own[weight] = {_NORM: norm}
        if not self.own:
            raise PlanError("lawn: all weights to constrain are zero at the switch; switch later or name others")
        weights = list(self.own)
        if self.momentum == "clear":
            for weight in weights:
                self.state[weight].clear()
        elif self.momentum == "project":
            for key in _MOMENTUM:
                held = [w for w in weights if isinstance(self.state[w].get(key), Tensor)]
                tangent_([self.state[w][key] for w in held], held, [self.own[w][_NORM] for w in held])

    @torch.no_grad()
    def project_gradients(self) -> None:
        """The tangent part of the constrained weights' gradients, in place: for clipping; `step` does it anyway."""
        weights = [weight for weight in self.own if weight.grad is not None]
        tangent_([w.grad for w in weights if w.grad is not None], weights, [self.own[w][_NORM] for w in weights])

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """One step of the inner optimizer, free or on the spheres. Returns what it does."""
        if not self.switched:
            first = self.param_groups[0]
            if first["lawn_free"] is not None and first["lawn_step"] >= first["lawn_free"]:
                self.switch()
            for group in self.param_groups:
                group["lawn_step"] += not self.switched
        if not self.switched:
            return self.inner.step() if closure is None else self.inner.step(closure)
        # A closure may yet make gradients.
        weights = [w for w in self.own if closure is not None or w.grad is not None]
        before = [_local(weight).clone() for weight in weights] if self.project_update else []
        if closure is None:
            self.project_gradients()
            loss = self.inner.step()
        else:
            loss = self.inner.step(self._projected(closure))
        self._return(weights, before)
        return loss

    def _projected(self, closure: Callable[[], Any]) -> Callable[[], Any]:
        def evaluate() -> Any:
            loss = evaluated(closure)
            self.project_gradients()
            return loss

        return evaluate

    def _return(self, weights: Sequence[nn.Parameter], before: Sequence[Tensor]) -> None:
        """Make the update tangent, and go back to the spheres."""
        norms = [self.own[weight][_NORM] for weight in weights]
        if self.project_update:
            starts = [_like(start, weight) for start, weight in zip(before, weights)]
            for weight, start, norm, along in zip(weights, before, norms, inner_products(weights, starts)):
                _local(weight).addcmul_(start, (along / norm**2 - 1).to(start.dtype), value=-1)
        for weight, norm, square in zip(weights, norms, inner_products(weights, weights)):
            _local(weight).mul_(norm / square.sqrt())

    def _find(self, _model: nn.Module, _inputs: Any, output: Any) -> None:
        if self.constrained is None and torch.is_grad_enabled() and not torch.compiler.is_compiling():
            found = homogeneous_weights(logits_of(output))
            self.constrained = self._trained([w for w in found if w in self.names])
            self._search.remove()

    def _trained(self, weights: Sequence[Any]) -> list[nn.Parameter]:
        """Those of the weights that the optimizer has, each once."""
        held = {parameter for group in self.param_groups for parameter in group["params"] if parameter.requires_grad}
        chosen = [weight for weight in dict.fromkeys(weights) if weight in held]
        if not chosen:
            raise PlanError(
                "lawn: none of the weights that the optimizer trains is to be constrained; "
                f"name layers out of: {', '.join(name for w, name in self.names.items() if w.ndim >= 2)}"
            )
        return chosen


def _chosen(model: nn.Module, layers: str | Sequence[str]) -> list[nn.Parameter]:
    named = {name: parameter for name, parameter in model.named_parameters() if parameter.ndim >= 2}
    if layers == "all_matrices":
        tables = {m.weight for m in model.modules() if isinstance(m, nn.Embedding | nn.EmbeddingBag)}
        return [parameter for parameter in named.values() if parameter not in tables]
    if isinstance(layers, str):
        raise PlanError(f"lawn: layers is {layers!r}; give 'final_homogeneous', 'all_matrices' or a list of names")
    for pattern in layers:
        if not fnmatch.filter(named, pattern):
            raise PlanError(f"lawn: no weight matches {pattern!r}; there are: {', '.join(named)}")
    return [named[name] for pattern in layers for name in fnmatch.filter(named, pattern)]


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _wide(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor


def _like(local: Tensor, weight: Tensor) -> Tensor:
    """A process's part of a tensor that is divided as `weight` is."""
    if isinstance(weight, DTensor):
        mesh, placements = weight.device_mesh, weight.placements
        return DTensor.from_local(local, mesh, placements, shape=weight.shape, stride=weight.stride())
    return local
