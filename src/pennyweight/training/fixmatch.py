"""FixMatch: a student learns from few labels, and from what a teacher is sure of (arXiv 2001.07685, with 2101.08482).

    p_u     softmax(teacher(weak(u)))                                                      unlabelled samples u
    loss    CE(student(weak(x)), y) + weight * mean over u of [max p_u >= threshold] CE(student(strong(u)), argmax p_u)

One forward pass of the student takes labelled and strong samples together. The mean counts samples whose label is not
sure as zeros. The teacher is an `EMATeacher` (layers/eman.py), which follows the student after every step.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import PlanError
from ..layers.eman import EMATeacher

Distortion = Callable[[Tensor], Tensor]


class FixMatch(nn.Module):
    """A model for `pennyweight train`, which minimises its `training_loss`. What is evaluated, packed and loaded for
    `shrink` is `deployed`, the student or the teacher's averages, as `deploy` has it.

    unlabelled: [samples, ...] as the student takes them; they are no part of the state dict, which holds student and
    teacher. weak, strong: distorted copies, drawn from torch's global generator, as the loop seeds it for every step.
    ratio: unlabelled samples to a labelled one; 0: labels alone. rows(count): which of the unlabelled come next, of all
    of them at random unless given. threshold, weight: as above. teacher: options of `EMATeacher`.
    Raises `PlanError` on values out of range.
    """

    unlabelled: Tensor

    def __init__(
        self,
        student: nn.Module,
        unlabelled: Tensor,
        *,
        weak: Distortion,
        strong: Distortion,
        ratio: int = 5,
        threshold: float = 0.7,
        weight: float = 10.0,
        rows: Callable[[int], Tensor] | None = None,
        deploy: Literal["student", "teacher"] = "student",
        **teacher: Any,
    ) -> None:
        super().__init__()
        if not len(unlabelled):
            raise PlanError("fixmatch: there are no unlabelled samples")
        if ratio < 0 or not 0 <= threshold <= 1 or weight < 0:
            raise PlanError(
                f"fixmatch: ratio {ratio} and weight {weight} must not be negative, threshold {threshold} is 0 to 1"
            )
        if deploy not in ("student", "teacher"):
            raise PlanError(f"fixmatch: deploy is {deploy!r}; choose 'student' or 'teacher'")
        self.deploy = deploy
        self.student = student
        self.teacher = EMATeacher(student, **teacher)
        self.register_buffer("unlabelled", unlabelled, persistent=False)
        self.weak, self.strong, self.ratio, self.threshold, self.weight = weak, strong, ratio, threshold, weight
        self.rows = rows or (lambda count: torch.randint(len(unlabelled), (count,)))
        #: Rows of the unlabelled samples of the latest step, and the teacher's classes of them, sure or not.
        self.guesses: tuple[Tensor, Tensor] = (torch.empty(0, dtype=torch.int64), torch.empty(0, dtype=torch.int64))

    @property
    def deployed(self) -> nn.Module:
        return self.student if self.deploy == "student" else self.teacher.model

    def forward(self, x: Tensor) -> Tensor:
        """In training the student's."""
        return self.student(x) if self.training else self.deployed(x)

    def training_loss(self, x: Tensor, targets: Tensor) -> Tensor:
        """The scalar to train on, of labelled samples and their classes, int64 [samples]."""
        labelled = self.weak(x)
        if not self.ratio:
            return F.cross_entropy(self.student(labelled), targets)
        rows = self.rows(self.ratio * len(x)).to(self.unlabelled.device)
        plain = self.unlabelled[rows]
        sure, classes = self.teacher(self.weak(plain)).softmax(1).max(1)
        self.guesses = (rows, classes)
        logits = self.student(torch.cat([labelled, self.strong(plain)]))
        each = F.cross_entropy(logits[len(x) :], classes, reduction="none")
        return F.cross_entropy(logits[: len(x)], targets) + self.weight * (each * (sure >= self.threshold)).mean()
