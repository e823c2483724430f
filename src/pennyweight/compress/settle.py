"""The last bytes: bring the files of a shrunk model to their budget by making a few layers anew."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence

import torch
from torch import nn

from ..bundle import predict_bytes
from ..errors import BudgetError
from ..layers.sites import WeightSite
from .entropy_gptq import STEPS
from .packing import is_adjustable, pack
from .plan import Choice, Plan
from .realise import Realised

_SETTLE_ROUNDS = 6
#: What takes up the slack of a plan in which no layer can take any size.
_FILLER = "entropy-gptq"


def knobs_of(plan: Plan, sites: Sequence[WeightSite]) -> list[WeightSite]:
    """The layers whose size is settled last, in order.

    First the one with most bytes among those that can take (nearly) any size; then, for what it cannot take, the
    largest and the smallest of those that cannot, but may be made anew by a method that can.
    """
    able, others = [], []
    for site in sites:
        choice = plan.choices[site.name]
        if is_adjustable(choice.method) or choice.split is not None:
            able.append((choice.nbytes or site.parameter.numel(), site.name, site))
        elif choice.method != "dense":
            others.append((site.parameter.numel(), site.name, site))
    chosen = [max(able)] if able else []
    if others:
        chosen += [max(others), min(others)]
    return list({name: site for _, name, site in chosen}.values())


def _turn(done: Realised, name: str, slack: int) -> bool:
    """Make one layer anew, larger by at most `slack` bytes (smaller by as many, if negative); whether that was done."""
    choice, nbytes, view = done.choices[name], done.nbytes[name], done.views[name]
    target = nbytes + slack - (8 if slack < 0 else 0)
    if target < 16:
        return False
    able = is_adjustable(choice.method) or choice.split is not None
    if not able:
        if slack < 0:
            return False
        choice = Choice(_FILLER, {"step": STEPS[0]})
    packed, made = pack(view, dataclasses.replace(choice, nbytes=target))
    distortion = view.distortion(packed.decode())
    if slack > 0 and not nbytes < packed.nbytes <= target:
        return False
    if not able and distortion > (done.choices[name].distortion or math.inf):
        return False  # more bytes, but for less
    done.packed[name] = packed
    done.choices[name] = dataclasses.replace(made, distortion=distortion)
    return True


def settle(
    small: nn.Module,
    originals: Mapping[str, nn.Parameter],
    sites: Sequence[WeightSite],
    plan: Plan,
    done: Realised,
    knobs: Sequence[WeightSite],
    trained: bool,
) -> int:
    """Bring the files to the budget: never above it, a fraction of a percent below at most. Returns their size.

    originals: parameters before they were mended, put back where that alone makes the files fit. trained: codes come
    from recovery and are only touched if the files would not fit.
    """

    def total() -> int:
        return predict_bytes(small, done.nbytes)

    budget = plan.budget
    if budget is None:
        return total()
    goal = budget  # bytes that a latency left over would cost time
    if plan.latency is not None and plan.total is not None:
        goal = min(budget, plan.total)
    for knob in knobs:
        for _ in range(_SETTLE_ROUNDS):
            slack = goal - total()
            if 0 <= slack <= max(0.001 * budget, 8) or (trained and slack >= 0) or not _turn(done, knob.name, slack):
                break
    if total() > budget:  # mended biases and norms may compress a little worse than the original ones
        packed_already = {id(s.parameter) for s in sites}
        with torch.no_grad():
            for name, parameter in small.named_parameters():
                if id(parameter) not in packed_already and name in originals:
                    parameter.copy_(originals[name])
    size = total()
    if size > budget:
        raise BudgetError(
            f"the layers came out at {size:,} bytes, over the budget of {budget:,}, and no method can be adjusted; "
            "allow entropy-gptq or raise the budget"
        )
    return size
