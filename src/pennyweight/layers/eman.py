"""EMAN: a teacher whose batch norm statistics are moving averages of the student's, as its weights are.

Exponential Moving Average Normalization for Self-supervised and Semi-supervised Learning, arXiv 2101.08482.

    teacher <- m teacher + (1 - m) student          parameters, running means and running variances, after every step

The teacher runs in eval mode, without gradient: what it says of a sample does not depend on the rest of the batch. A
plain moving-average teacher (`buffers="own", mode="train"`) normalises by its own batch instead.

As in the released code integer buffers are copied. So are float buffers other than running means and variances: unit
vectors of spectral norms are no longer such when averaged, and schedules go on as they are. Of a student under weight
transforms the latent weights are averaged, and quantised again by the teacher.
"""

from __future__ import annotations

import copy
import math
from typing import Any, Literal, Self

import torch
from torch import Tensor, nn

from ..errors import PlanError
from ..registry import register

Buffers = Literal["ema", "copy", "own"]
_AVERAGED = ("running_mean", "running_var")


def cosine_momentum(step: int, steps: int, start: float = 0.98) -> float:
    """BYOL's m: from `start` at step 0 to 1 at the last step, 1 - (1 - start) (cos(pi step / steps) + 1) / 2."""
    return 1 - (1 - start) * (math.cos(math.pi * step / steps) + 1) / 2


@register(
    "eman",
    acts_on="layers",
    paper="2101.08482",
    description="a teacher that averages the student's weights and batch norm statistics",
)
class EMATeacher(nn.Module):
    """A copy of the student that follows it: `teacher(x)` is what to match, `update()` comes after each step.

    student: it is not part of the teacher, whose state dict holds the averages and the number of updates. momentum: m,
    0 to 1. buffers: "ema": running means and variances are averaged; "copy": they are the student's; "own": the
    teacher's forward makes them. mode: "eval", whatever mode is asked for, or "train", which follows `train()`.
    `training.hooks.attach(optimizer, [teacher])` updates it around the steps that are carried out.
    Raises `PlanError` on other values.
    """

    updates: Tensor

    def __init__(
        self,
        student: nn.Module,
        momentum: float = 0.999,
        buffers: Buffers = "ema",
        mode: Literal["eval", "train"] = "eval",
    ) -> None:
        super().__init__()
        if not 0 <= momentum <= 1:
            raise PlanError(f"eman: momentum is {momentum}; it is the weight of the teacher as it was, 0 to 1")
        if buffers not in ("ema", "copy", "own"):
            raise PlanError(f"eman: buffers is {buffers!r}; choose 'ema', 'copy' or 'own'")
        if mode not in ("eval", "train"):
            raise PlanError(f"eman: mode is {mode!r}; choose 'eval' or 'train'")
        self.momentum, self.buffer_rule, self.mode = momentum, buffers, mode
        self._student = (student,)  # in a tuple: no submodule
        self.model = copy.deepcopy(student).requires_grad_(False)
        self.register_buffer("updates", torch.zeros((), dtype=torch.int64))
        self.train(student.training)

    def train(self, mode: bool = True) -> Self:
        return super().train(mode and self.mode == "train")

    @torch.no_grad()
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.model(*args, **kwargs)

    @torch.no_grad()
    def update(self, momentum: float | None = None) -> None:
        """Take in the student as it is now, with this momentum instead of the teacher's own, if it is given.

        Raises `PlanError` if the student's tensors are no longer those of the teacher, by name or shape.
        """
        m = self.momentum if momentum is None else momentum
        own, others = self.model.state_dict(keep_vars=True), self._student[0].state_dict(keep_vars=True)
        changed = [n for n in own.keys() | others.keys() if n not in own or n not in others]
        changed += [n for n in own if n in others and own[n].shape != others[n].shape]
        if changed:
            raise PlanError(f"eman: {min(changed)} of student and teacher do not match; make the teacher anew")
        for name, tensor in own.items():
            parameter = isinstance(tensor, nn.Parameter)
            statistic = name.rpartition(".")[2] in (*_AVERAGED, "num_batches_tracked")
            if statistic and self.buffer_rule == "own":
                continue
            averaged = parameter or (name.endswith(_AVERAGED) and self.buffer_rule == "ema")
            if averaged and tensor.is_floating_point() and m:
                tensor.lerp_(others[name].to(tensor.dtype), 1 - m)
            else:
                tensor.copy_(others[name])
        self.updates += 1

    def before_step(self) -> None:
        """Nothing: the teacher takes in what the step leaves."""

    def after_step(self) -> None:
        self.update()

    def extra_repr(self) -> str:
        return f"momentum={self.momentum:g}, buffers={self.buffer_rule}, mode={self.mode}"
