"""Error feedback: the part of GPTQ that does not care for the grid.

GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers, arXiv 2210.17323. With the metric
H and U the upper Cholesky factor of its inverse (H^-1 = U^T U), column j of a row w is rounded to q, and

    e = (w_j - q) / U_jj,    w_k <- w_k - e U_jk  for all k > j;    the row's error in the metric is then sum_j e_j^2
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import WeightError
from ..kernels import feedback_block
from .contract import LayerView

BLOCK = 128


@dataclass(frozen=True)
class Factor:
    """The metric of one group, ready for error feedback.

    upper: float32 [cols, cols], U in the order of processing. order: int64 [cols], column processed at each step.
    dead: bool [cols], inputs that are always zero.
    """

    upper: Tensor
    order: Tensor
    dead: Tensor

    @property
    def conditional_variance(self) -> Tensor:
        """[cols], original order: 1 / U_jj^2, the variance of input j that later inputs do not explain."""
        variance = torch.empty_like(self.upper.diagonal())
        variance[self.order] = self.upper.diagonal().pow(-2)
        return variance


def factorise(hessian: Tensor, damping: float = 0.01, order: bool = True) -> Factor:
    """Factor of one group's metric [cols, cols]; a singular one is damped ten times more until it can be factorised."""
    diagonal = hessian.diagonal().double()
    dead = diagonal <= 0
    diagonal = torch.where(dead, 1.0, diagonal)
    columns = torch.argsort(diagonal, descending=True, stable=True) if order else torch.arange(len(diagonal))
    diagonal, mean = diagonal[columns], float(diagonal.mean())
    while True:
        damped = hessian[columns[:, None], columns].double()
        damped.diagonal().copy_(diagonal + damping * mean)
        lower, failed = torch.linalg.cholesky_ex(damped)
        del damped  # a wide layer's matrices are large
        if not int(failed):
            inverse = torch.cholesky_inverse(lower)
            del lower
            upper, failed = torch.linalg.cholesky_ex(inverse, upper=True)
            del inverse
            if not int(failed) and bool(torch.isfinite(upper).all()):
                return Factor(upper.float().contiguous(), columns, dead)
        damping *= 10.0
        if damping > 1e6:
            raise WeightError(
                "the second moment of a layer's inputs cannot be factorised; is the calibration data finite?"
            )


def feedback(weight: Tensor, factor: Factor, quantise: Callable[[int, Tensor], Tensor]) -> None:
    """Walk the columns of `weight` [rows, cols] with error feedback.

    quantise(column, values [rows]) returns the rounded values of that column (and notes its codes); it is called once a
    column, in processing order. `weight` is not changed.
    """
    work = weight[:, factor.order].float()
    work[:, factor.dead[factor.order]] = 0.0
    upper, cols = factor.upper, work.shape[1]
    order = factor.order.tolist()
    for start in range(0, cols, BLOCK):
        stop = min(start + BLOCK, cols)
        block, u = (
            work[:, start:stop].T.contiguous(),
            upper[start:stop, start:stop],
        )  # a row per column: contiguous updates
        errors = torch.empty_like(block)
        for j in range(stop - start):
            error = (block[j] - quantise(order[start + j], block[j])) / u[j, j]
            errors[j] = error
            if j + 1 < stop - start:
                block[j + 1 :].addr_(u[j, j + 1 :], error, alpha=-1.0)
        if stop < cols:
            work[:, stop:].addmm_(errors.T, upper[start:stop, stop:], alpha=-1.0)


def feedback_uniform(weight: Tensor, factor: Factor, row: Tensor, column: Tensor, kept: Tensor | None = None) -> Tensor:
    """Codes int16 [rows, cols] of `weight` on the unbounded uniform grid row[r] * column[j]; see `feedback`.

    kept: bool [rows, cols], False where the code must be 0; other columns make up for what that loses.
    """
    if kept is not None:
        return _feedback_kept(weight, factor, row, column, kept)
    work = weight[:, factor.order].float()
    work[:, factor.dead[factor.order]] = 0.0
    ordered, cols = column[factor.order], work.shape[1]
    codes = torch.empty(work.shape, dtype=torch.int16)
    for start in range(0, cols, BLOCK):
        stop = min(start + BLOCK, cols)
        u = factor.upper[start:stop]
        codes[:, start:stop], errors = feedback_block(work[:, start:stop], u[:, start:stop], row, ordered[start:stop])
        if stop < cols:
            work[:, stop:].addmm_(errors, u[:, stop:], alpha=-1.0)
    return codes[:, torch.argsort(factor.order)]


def _feedback_kept(weight: Tensor, factor: Factor, row: Tensor, column: Tensor, kept: Tensor) -> Tensor:
    codes = torch.empty(weight.shape, dtype=torch.int16)

    def quantise(j: int, values: Tensor) -> Tensor:
        step = row * column[j]
        code = torch.where(step > 0, values / step, 0.0).round_().clamp_(-32767, 32767).mul_(kept[:, j])
        codes[:, j] = code.to(torch.int16)
        return code * step

    feedback(weight, factor, quantise)
    return codes


def by_group(layer: LayerView, damping: float, order: bool) -> Iterator[tuple[slice, Factor]]:
    """(rows of the group, its factor) for each group of a layer."""
    size = layer.rows // layer.groups
    for group in range(layer.groups):
        yield slice(group * size, (group + 1) * size), factorise(layer.hessian[group], damping, order)
