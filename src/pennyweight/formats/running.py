"""What packed weights become to run: arranged as the kernels want them. Has no place in a file."""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar, NoReturn

import torch
import torch.nn.functional as F
from torch import Tensor

from ..kernels.integer import ActivationBits, IntegerMatrix
from ..kernels.sparse import SparseMatrix
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
    """An `int` or `binary` weight whose products the kernels of kernels/integer.py make, or on a GPU kernels/gpu."""

    format: ClassVar[str] = "running integers"

    def __init__(self, matrix: IntegerMatrix, activation_bits: ActivationBits = 16) -> None:
        self.matrix = matrix
        self.activation_bits: ActivationBits = activation_bits
        self.shape = (matrix.rows, matrix.cols)

    def decode(self) -> Tensor:
        return self.matrix.decode()

    def linear(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        if x.device.type not in ("cpu", "cuda"):  # there are no kernels for others
            return super().linear(x, bias)
        return self.matrix.linear(x, bias, self.activation_bits)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.shape[0]}x{self.shape[1]}, {self.matrix.bits} bits)"


class RunningSparse(Running):
    """A `sparse` weight whose products the kernels of kernels/sparse.py make, in float32."""

    format: ClassVar[str] = "running sparse"

    def __init__(self, matrix: SparseMatrix) -> None:
        self.matrix = matrix
        self.shape = (matrix.rows, matrix.cols)

    def decode(self) -> Tensor:
        return self.matrix.decode()

    def linear(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        return self.matrix.linear(x, bias)


class RunningSigned(Running):
    """Signs times the product of two thin factors: y = sum_j left[:, j] * (signs @ (right[j] * x)).

    A few inputs meet the signs, once for each j; more of them are multiplied by weights decoded some rows at a time.
    """

    format: ClassVar[str] = "running signs of low rank"
    _MOST_PRODUCTS = 128  # inputs times rank, up to which the signs multiply: where decoding measured faster
    _CHUNK_ROWS = 256  # rows decoded at once

    def __init__(self, signs: IntegerMatrix, left: Tensor, right: Tensor, activation_bits: ActivationBits) -> None:
        self.signs = signs
        self.left = left  # float32 [rows, rank]
        self.right = right  # float32 [rank, cols]
        self.activation_bits: ActivationBits = activation_bits
        self.shape = (signs.rows, signs.cols)

    def decode(self) -> Tensor:
        return self.signs.decode() * (self.left @ self.right)

    def linear(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        flat = x.reshape(x.shape[:-1].numel(), self.shape[1]).to(torch.float32)
        left, right = self.left.to(x.device), self.right.to(x.device)
        rank = left.shape[1]
        few = len(flat) * rank <= self._MOST_PRODUCTS and self.activation_bits != 32
        if torch.compiler.is_compiling() or few:  # a graph holds operators, and to decode is none
            products = self.signs.linear(flat.unsqueeze(1) * right, None, self.activation_bits)  # [n, rank, rows]
            y = products[:, 0] * left[:, 0]
            for j in range(1, rank):  # in this order, whatever the threads
                y = y + products[:, j] * left[:, j]
        else:
            y = torch.cat([F.linear(flat, part.to(x.device)) for part in self._decoded_parts()], 1)
        y = y if bias is None else y + bias
        return y.view(*x.shape[:-1], self.shape[0]).to(x.dtype)

    def _decoded_parts(self) -> Iterator[Tensor]:
        for first in range(0, self.shape[0], self._CHUNK_ROWS):
            part = slice(first, min(first + self._CHUNK_ROWS, self.shape[0]))
            yield self.signs.decode(part.start, part.stop).mul_(self.left[part] @ self.right)


class RunningPartial(Running):
    """A `partial` weight: its rest as it runs, and what the salient weights add to that.

    rest + (salient - rest) is salient but for the rounding of float32.
    """

    format: ClassVar[str] = "running partial"

    def __init__(self, rest: PackedWeight, difference: PackedWeight) -> None:
        self.rest = rest
        self.difference = difference
        self.shape = rest.shape

    def decode(self) -> Tensor:
        return self.rest.decode() + self.difference.decode()

    def linear(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        exact = x.to(torch.float32)
        return (self.rest.linear(exact, bias) + self.difference.linear(exact)).to(x.dtype)
