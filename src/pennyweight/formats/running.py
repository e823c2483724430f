"""What packed weights become to run: integers in the arrangement of the kernels. Has no place in a file."""

from __future__ import annotations

from typing import ClassVar, NoReturn

from torch import Tensor

from ..kernels.integer import ActivationBits, IntegerMatrix
from .base import PackedWeight


class Running(PackedWeight):
    """A weight arranged for running, which refuses to be stored."""

    runs = True

    def _write(self, writer: object) -> NoReturn:
        raise TypeError("a weight arranged for running cannot be stored; store what it was made from")

    @classmethod
    def _read(cls, reader: object, shape: tuple[int, int], options: int) -> NoReturn:
        raise TypeError("a weight arranged for running is never stored")

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.shape[0]}x{self.shape[1]})"


class RunningIntegers(Running):
    """An `int` or `binary` weight whose products the kernels of kernels/integer.py make."""

    format: ClassVar[str] = "running integers"

    def __init__(self, matrix: IntegerMatrix, activation_bits: ActivationBits = 16) -> None:
        self.matrix = matrix
        self.activation_bits: ActivationBits = activation_bits
        self.shape = (matrix.rows, matrix.cols)

    def decode(self) -> Tensor:
        return self.matrix.decode()

    def linear(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        if x.device.type != "cpu":  # these kernels are the CPU's
            return super().linear(x, bias)
        return self.matrix.linear(x, bias, self.activation_bits)
