"""How many bits layers really multiply with: seen in a forward pass, not declared by the method.

Any method can therefore be counted, and none by what it claims: one whose noise or annealing has not ended multiplies
real numbers. `cost.cost_table` makes ratios of what is found here.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from ...layers.precision import Precision

#: More different values than 2 to this power count as real numbers.
_MOST_BITS = 8

_aten = torch.ops.aten


@torch.no_grad()
def observed_precision(model: nn.Module, inputs: Tensor) -> dict[str, Precision]:
    """Name of each Linear and convolution -> bits of its weight and its input, 32 for real numbers.

    Bits are those that tell apart the values within one output's weights and within one row of the input, so that
    scales do not matter. inputs: a batch for the model, which is run in eval mode.
    """
    watch = _Watch()
    kinds = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
    handles = []
    taken: list[str] = []
    for name, module in model.named_modules():
        inner = any(name.startswith(f"{layer}.") for layer in taken)  # of a layer's input quantiser, say
        if isinstance(module, kinds) and not inner:
            taken.append(name)
            handles.append(module.register_forward_pre_hook(lambda *_, name=name: watch.inside.append(name)))
            handles.append(module.register_forward_hook(lambda *_: watch.inside.pop() and None))
    was_training = model.training
    model.eval()
    try:
        with watch:
            model(inputs)
    finally:
        model.train(was_training)
        for handle in handles:
            handle.remove()
    return {name: Precision(max(w), max(x)) for name, (w, x) in watch.seen.items()}


def bits_of_values(slices: Tensor) -> int:
    """Bits that number the different values in any one row of [rows, columns].

    32 if there are more than 256, or so few columns that values differ by chance: fewer than two for each.
    """
    different = 1 + int((slices.sort(1).values.diff(dim=1) != 0).sum(1).max()) if slices.shape[1] else 1
    if different > 2**_MOST_BITS or 2 * different > slices.shape[1]:
        return 32
    return max(1, (different - 1).bit_length())


class _Watch(TorchDispatchMode):
    """Looks at the operands of matrix products and convolutions inside of named layers."""

    def __init__(self) -> None:
        super().__init__()
        self.inside: list[str] = []
        self.seen: dict[str, tuple[list[int], list[int]]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        operands = _operands(func, args) if self.inside else None
        if operands is not None:
            weights, inputs = self.seen.setdefault(self.inside[-1], ([], []))
            weights.append(bits_of_values(operands[1]))
            inputs.append(bits_of_values(operands[0]))
        return func(*args, **(kwargs or {}))


def _operands(func: Any, args: tuple[Any, ...]) -> tuple[Tensor, Tensor] | None:
    """(input [rows, columns], weight [outputs, columns]) of a product; None for other functions."""
    name = func.overloadpacket
    if name is _aten.mm:
        return args[0], args[1].T
    if name is _aten.addmm:
        return args[1], args[2].T
    if name is _aten.convolution:
        return args[0].flatten(1), args[1].flatten(1)
    return None
