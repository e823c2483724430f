"""Packed convolutions: with low memory and inputs of 8 or 16 bits they multiply codes, as kernels/convolution.py does.

Others decode the weight when they run: weights the kernels do not take, inputs not on the CPU, and shapes for which
gathering patches costs more than decoding saves. Measured with one thread, a convolution multiplies from

    128 outputs   in a group of the convolution, where a row of the weight has one scale, or the kernel one position
    512 outputs   where groups of columns share scales: their patches are gathered more slowly

so depthwise and most grouped convolutions decode. The rule looks at the layer alone: what an image gives depends on
neither its size nor the other images of the batch.
"""

from __future__ import annotations

from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..formats import PackedWeight
from ..formats.running import Running, RunningIntegers
from ..kernels.convolution import Window, convolution, positions_first, weight_of
from ..kernels.integer import ActivationBits, IntegerMatrix
from .packed_module import PackedModule, twin_of

_LEAST_OUTPUTS = {True: 128, False: 512}  # by whether patches come positions first


class RunningConvolution(Running):
    """Integers that convolve. parts: the rows of each group of the convolution."""

    format: ClassVar[str] = "running convolution"

    def __init__(
        self, parts: list[IntegerMatrix], window: Window, positions_first: bool, activation_bits: ActivationBits
    ) -> None:
        self.parts = parts
        self.window = window
        self.positions_first = positions_first
        self.activation_bits: ActivationBits = activation_bits
        self.shape = (sum(part.rows for part in parts), parts[0].cols)

    @classmethod
    def of(cls, weight: PackedWeight, window: Window, groups: int, activation_bits: ActivationBits) -> PackedWeight:
        """A weight that multiplies [outputs, channels / groups * kernel]; itself if it should rather be decoded."""
        if not isinstance(weight, RunningIntegers):
            return weight
        outputs = weight.shape[0] // groups
        if outputs < min(_LEAST_OUTPUTS.values()):
            return weight
        parts = (
            [weight.matrix]
            if groups == 1
            else [weight.matrix.part(g * outputs, (g + 1) * outputs) for g in range(groups)]
        )
        reordered = [positions_first(part, window) for part in parts]
        fast = [part for part in reordered if part is not None]
        if outputs < _LEAST_OUTPUTS[bool(fast)]:
            return weight
        return cls(fast or parts, window, bool(fast), activation_bits)

    def decode(self) -> Tensor:
        return torch.cat([weight_of(part, self.window, self.positions_first).flatten(1) for part in self.parts])

    def convolve(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """x [n, channels, *size], padded already -> [n, outputs, *positions]."""
        count = len(self.parts)
        biases = [None] * count if bias is None else bias.chunk(count)
        made = [
            convolution(image, part, self.window, self.positions_first, shift, self.activation_bits)
            for image, part, shift in zip(x.chunk(count, 1), self.parts, biases)
        ]
        return made[0] if count == 1 else torch.cat(made, 1)


@twin_of(nn.Conv1d, nn.Conv2d, nn.Conv3d)
class PackedConvolution(PackedModule):
    """nn.Conv1d, nn.Conv2d, nn.Conv3d."""

    bias: Tensor | None
    in_channels: int
    groups: int
    kernel_size: tuple[int, ...]
    stride: tuple[int, ...]
    dilation: tuple[int, ...]
    padding_mode: str
    _reversed_padding_repeated_twice: list[int]

    def forward(self, input: Tensor) -> Tensor:
        if not self._multiplies or input.device.type != "cpu":
            return super().forward(input)
        weight, axes = self.running_weight(), len(self.kernel_size)
        batched = input.ndim == axes + 2
        fits = (batched or input.ndim == axes + 1) and input.shape[-axes - 1] == self.in_channels
        if not isinstance(weight, RunningConvolution) or not fits:  # torch says what does not fit
            return super().forward(input)
        x = input if batched else input.unsqueeze(0)
        if any(self._reversed_padding_repeated_twice):
            x = F.pad(
                x,
                self._reversed_padding_repeated_twice,
                "constant" if self.padding_mode == "zeros" else self.padding_mode,
            )
        y = weight.convolve(x, self.bias)
        return y if batched else y.squeeze(0)

    def _for_running(self, packed: PackedWeight) -> PackedWeight:
        window = Window(self.kernel_size, self.stride, self.dilation)
        return RunningConvolution.of(super()._for_running(packed), window, self.groups, self._packed_activation_bits)
