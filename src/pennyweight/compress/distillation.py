"""Distil a compressed network against the original one: descent on chosen parameters, without labels.

Source: the bias tuning of AdaQuant / CalibTIP, arXiv 2006.10518 (section 4 and the released pipelines), which is
`bias_tune`; `distil` is the same descent on any parameters.

Departures: targets are paired with samples (the released code pairs them with class labels), the loss is the mean over
samples of the full divergence, the optimiser is Adam, and the best step is kept.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import PlanError
from .data import Call, calls, output_tensor
from .observe import evaluating


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
