"""A-FAN: a network learns from the worst feature maps near its own, as well as from its own.

Adversarial Feature Augmentation and Normalization for Visual Recognition, arXiv 2103.12171. Of a network
tail(head(x)) with f = head(x):

    attack       f_a <- f_a + gamma sign(dL(tail(f_a), y) / df_a), `steps` times from f; no gradient to any weight
    points       f_i = f + i/(k-1) (f_a - f), i = 0 .. k-1; i = 0 is the clean map
    mixing       s_i (f - m) / s + m_i for some of them: the clean map with the attacked one's mean and deviation
                 (unbiased variance + 1e-5 within the root)
    loss         (L(tail(f), y) + weight sum_{i>=1} L(tail(f_i), y)) / (1 + weight (k - 1))

Augmented maps are detached: they train the tail alone, and the head learns from the clean loss only. A batch costs one
pass of the head and `steps` + k of the tail (forward and backward); inference costs what it did.

Departures. Released recipes give gamma in feature units (0.5/255 and the like), which do not carry over from layer to
layer: here it counts root mean squares of the batch's features, unless `units` is "absolute". The abstract takes the
statistics of mixing from batch norms; the released code from the channels at each position ("channel", default here);
"spatial" takes them from the positions of each channel, "batch" from samples and positions. The released code lets all
passes update running statistics of batch norms (`update_statistics="all"`); by default only the clean pass does. The
sum of losses is divided by the sum of its weights. Learned weights of several cuts are left out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..errors import PlanError
from ..registry import register

Statistics = Literal["channel", "spatial", "batch"]
Loss = Callable[[Tensor, Tensor], Tensor]


def mix(clean: Tensor, attacked: Tensor, statistics: Statistics = "channel") -> Tensor:
    """`clean` with mean and deviation of `attacked`, both [samples, channels, ...]."""
    axes = {"channel": (1,), "spatial": tuple(range(2, clean.ndim)), "batch": (0, *range(2, clean.ndim))}[statistics]

    def moments(f: Tensor) -> tuple[Tensor, Tensor]:
        return f.mean(axes, keepdim=True), (f.var(axes, keepdim=True) + 1e-5).sqrt()

    (mean, deviation), (new_mean, new_deviation) = moments(clean), moments(attacked)
    return new_deviation * (clean - mean) / deviation + new_mean


@register(
    "a-fan",
    acts_on="layers",
    paper="2103.12171",
    description="trains on adversarial feature maps between a network's head and tail",
)
class AdversarialFeatures(nn.Module):
    """head and tail: the network cut in two at one tensor [samples, channels, ...]; forward(x) is tail(head(x)).

    gamma: size of a step, see `units`. points: k, 2 or more. mixed: which of the points 1 to k - 1 are mixed. weight:
    of each augmented map beside the clean one. reach: largest change of a feature, in units, or None. random_start:
    begin anywhere within the reach. loss: mean over samples of (outputs, targets). Raises `PlanError` on other values.
    """

    def __init__(
        self,
        head: nn.Module,
        tail: nn.Module,
        *,
        steps: int = 1,
        gamma: float = 0.1,
        points: int = 2,
        mixed: Sequence[int] = (),
        weight: float = 1.0,
        statistics: Statistics = "channel",
        units: Literal["rms", "absolute"] = "rms",
        reach: float | None = None,
        random_start: bool = False,
        update_statistics: Literal["clean", "all"] = "clean",
        loss: Loss = F.cross_entropy,
    ) -> None:
        super().__init__()
        if steps < 0 or points < 2:
            raise PlanError(f"a-fan: {steps} steps and {points} points; there are 0 or more steps and 2 or more points")
        if any(not 1 <= index < points for index in mixed):
            raise PlanError(f"a-fan: mixed is {list(mixed)}; of {points} points 1 to {points - 1} can be mixed")
        for option, value, allowed in (
            ("statistics", statistics, ("channel", "spatial", "batch")),
            ("units", units, ("rms", "absolute")),
            ("update_statistics", update_statistics, ("clean", "all")),
        ):
            if value not in allowed:
                raise PlanError(f"a-fan: {option} is {value!r}; choose one of {', '.join(allowed)}")
        if random_start and reach is None:
            raise PlanError("a-fan: a random start needs a reach to lie in")
        self.head, self.tail, self.criterion = head, tail, loss
        self.steps, self.gamma, self.points, self.mixed = steps, gamma, points, frozenset(mixed)
        self.weight, self.units = weight, units
        self.statistics: Statistics = statistics
        self.reach, self.random_start, self.update_statistics = reach, random_start, update_statistics

    @property
    def passes(self) -> tuple[int, int]:
        """Forward and backward passes that `training_loss` makes through (head, tail); plain training makes (1, 1)."""
        return 1, self.steps + self.points

    def forward(self, x: Tensor) -> Tensor:
        return self.tail(self.head(x))

    def attack(self, features: Tensor, targets: Tensor) -> Tensor:
        """The attacked features, detached, of the same shape. No parameter gets a gradient."""
        clean = features.detach()
        unit = clean.float().square().mean().sqrt().to(clean.dtype) if self.units == "rms" else clean.new_ones(())
        attacked = clean
        if self.random_start and self.reach is not None:
            attacked = clean + torch.empty_like(clean).uniform_(-1, 1) * self.reach * unit
        for _ in range(self.steps):
            with torch.enable_grad():
                attacked = attacked.detach().requires_grad_()
                (gradient,) = torch.autograd.grad(self.criterion(self.tail(attacked), targets), attacked)
            attacked = attacked.detach() + self.gamma * unit * gradient.sign()
            if self.reach is not None:
                attacked = clean + (attacked - clean).clamp(-self.reach * unit, self.reach * unit)
        return attacked.detach()

    def training_loss(self, x: Tensor, targets: Tensor) -> Tensor:
        """The scalar to train on, of inputs x as the head takes them and targets as the loss does.

        `pennyweight train` minimises it, by this name.
        """
        features = self.head(x)
        total = self.criterion(self.tail(features), targets)
        clean = features.detach()
        with _statistics_kept(self.tail) if self.update_statistics == "clean" else nullcontext():
            attacked = self.attack(clean, targets)
            for index in range(1, self.points):
                point = torch.lerp(clean, attacked, index / (self.points - 1))
                if index in self.mixed:
                    point = mix(clean, point, self.statistics)
                total = total + self.weight * self.criterion(self.tail(point), targets)
        return total / (1 + self.weight * (self.points - 1))

    def extra_repr(self) -> str:
        return (
            f"steps={self.steps}, gamma={self.gamma:g} {self.units}, points={self.points}, mixed={sorted(self.mixed)}"
        )


@contextmanager
def _statistics_kept(module: nn.Module) -> Iterator[None]:
    """Batch norms in training normalise by the batch as ever, but leave their running statistics alone."""
    norms = [m for m in module.modules() if isinstance(m, _BatchNorm) and m.training and m.track_running_stats]
    for norm in norms:
        norm.track_running_stats = False
    try:
        yield
    finally:
        for norm in norms:
            norm.track_running_stats = True
