"""The one pair of hooks around the optimizer's step.

Methods that mask a gradient, restore frozen weights exactly, project a norm or decay by division act there.
`before_step` runs when the gradients are whole: averaged over accumulated parts and processes, unscaled, clipped.
`after_step` runs when the weights have changed. Neither runs for a step that mixed precision skips, nor for the parts
of an accumulated batch.

They are PyTorch's own optimizer hooks, called from inside `optimizer.step`, which a gradient scaler does not reach when
it skips; a fused optimizer decides inside its kernel, so it is refused together with fp16.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Protocol, runtime_checkable

from torch import nn
from torch.optim import Optimizer


@runtime_checkable
class StepHook(Protocol):
    """Any object; a module of the model that has both methods is one by itself. State that must outlive a step belongs
    in the buffers of such a module, which checkpoints keep."""

    def before_step(self) -> None: ...

    def after_step(self) -> None: ...


def hooks_of(model: nn.Module) -> list[StepHook]:
    """The modules of a model that act around the step, in the order of `model.modules()`."""
    return [module for module in model.modules() if isinstance(module, StepHook)]


def attach(optimizer: Optimizer, hooks: Iterable[StepHook]) -> None:
    """Call them around every step that is carried out: before in the order given, after in reverse."""
    ordered: Sequence[StepHook] = list(hooks)

    def before(_optimizer: Optimizer, _args: Any, _kwargs: Any) -> None:
        for hook in ordered:
            hook.before_step()

    def after(_optimizer: Optimizer, _args: Any, _kwargs: Any) -> None:
        for hook in reversed(ordered):
            hook.after_step()

    optimizer.register_step_pre_hook(before)
    optimizer.register_step_post_hook(after)
