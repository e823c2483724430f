"""What a compressor is asked and what it answers: `LayerView` in, `Candidate`s out."""

from __future__ import annotations

import dataclasses
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from .. import registry
from ..formats import PackedWeight
from ..layers.forms import Form, form_of

#: Rows of a matrix that are compared at once, which bounds the working memory.
_CHUNK_ROWS = 4096
#: Share of exact zeros from which on a weight counts as pruned, and its zeros stay zeros.
PRUNED = 0.25


def kept_of(weight: Tensor) -> Tensor | None:
    """bool like `weight`, False at the zeros of a pruned weight; None for a weight that is not pruned."""
    kept = weight != 0
    return kept if int(kept.sum()) <= (1 - PRUNED) * weight.numel() and bool(kept.any()) else None


@dataclass
class LayerView:
    """One weight as a matrix, and what is known of its surroundings.

    name: the parameter's name in the model's state dict.
    weight: float32 [rows, cols]; a row makes one output (Linear, Conv, recurrent) or is one table entry (Embedding).
        Convolutions are [out, in/groups * kernel].
    hessian: float32 or float64 [groups, cols, cols], the metric of a row's error. For a Linear it is X^T X / n, the
        second moment of the inputs; for grouped convolutions one per group (rows are split evenly over the groups, in
        order); for an Embedding it is the second moment of the loss gradient at the layer's output (identity where
        unknown).
    row_weight: float64 [rows], how much a row's error counts: sensitivity of the loss to that output for a Linear,
        (smoothed) use frequency for an Embedding; ones where unknown.
    kind: linear, conv, embedding or recurrent.
    measure: optional, the distortion of a replaced weight measured on the model's output (rd-prune's curves).
    kept: bool [rows, cols] of a pruned weight, False where it is zero; None of others (`kept_of`). Methods with
        `keeps_zeros` leave zeros there, also of a weight that was moved to mend its predecessors.
    """

    name: str
    weight: Tensor
    hessian: Tensor
    row_weight: Tensor
    kind: str = "linear"
    measure: Callable[[Tensor], float] | None = None
    kept: Tensor | None = None

    @property
    def rows(self) -> int:
        return self.weight.shape[0]

    @property
    def cols(self) -> int:
        return self.weight.shape[1]

    @property
    def groups(self) -> int:
        return self.hessian.shape[0]

    @property
    def column_weight(self) -> Tensor:
        """float64 [cols]: the diagonal of the metric, averaged over groups. Never all zero."""
        d = self.hessian.diagonal(dim1=-2, dim2=-1).double().mean(0)
        return d if bool((d > 0).any()) else torch.ones_like(d)

    def distortion(self, decoded: Tensor) -> float:
        """sum_r row_weight[r] * e_r H e_r^T with e = decoded - weight; the same units for every kind of candidate."""
        metric, total = self.hessian.to(torch.float32), 0.0
        group_rows = self.rows // self.groups
        for group in range(self.groups):
            rows = slice(group * group_rows, (group + 1) * group_rows)
            parts = (t[rows].split(_CHUNK_ROWS) for t in (decoded, self.weight, self.row_weight))
            for made, wanted, weight in zip(*parts):
                error = made.to(torch.float32) - wanted
                total += float((((error @ metric[group]) * error).sum(1).double() * weight).sum())
        return max(total, 0.0)


@dataclass(frozen=True)
class Candidate:
    """What a compressor offers for one layer.

    method, options: enough to make it again (`compressor(method).compress(layer, **options)`); options are plain
        YAML values. nbytes: bytes of the packed weight on disk (exact, unless the layer was judged by a sample of its
        rows, see `sample_rows`). distortion: `LayerView.distortion` of the decoded weight. shared_nbytes: those of the
        bytes that do not grow with the rows (a factor, a table). form: how the packed weight runs, which tells its
        time; None counts as a weight that must be decoded.
    """

    method: str
    options: Mapping[str, Any]
    nbytes: int
    distortion: float
    shared_nbytes: int = 0
    form: Form | None = None

    def for_more_rows(self, factor: float) -> Candidate:
        """What it would be for `factor` times the rows, all of them alike."""
        own = math.ceil((self.nbytes - self.shared_nbytes) * factor)
        return dataclasses.replace(self, nbytes=self.shared_nbytes + own, distortion=self.distortion * factor)

    @property
    def label(self) -> str:
        """Short text for tables: "gptq int b=3 g=64"."""
        return " ".join([self.method, *(f"{k}={v}" for k, v in self.options.items())])


class Fit(NamedTuple):
    """A weight made towards a size.

    packed: the weight. options: what makes it again. larger: options of a finer one that did not fit, given where sizes
    come in jumps, so that a layer may be divided between the two.
    """

    packed: PackedWeight
    options: dict[str, Any]
    larger: dict[str, Any] | None = None


class Compressor(ABC):
    """Base of all post-training methods. Subclasses register under `acts_on="compress"` and define two functions."""

    name: ClassVar[str]
    keeps_zeros: ClassVar[bool] = False  # whether the zeros of a pruned weight stay zeros; see LayerView.kept

    @abstractmethod
    def offers(self, layer: LayerView) -> list[dict[str, Any]]:
        """The option sets this method proposes for the layer (cheapest settings to richest); [] if it cannot act."""

    @abstractmethod
    def compress(self, layer: LayerView, **options: Any) -> PackedWeight:
        """Make the packed weight for one option set. Deterministic. Does not change the layer."""

    def candidates(self, layer: LayerView) -> Iterator[Candidate]:
        """Every offer, carried out. Methods that can share work between offers override this."""
        for options in self.offers(layer):
            yield self.candidate(layer, options, self.compress(layer, **options))

    def candidate(self, layer: LayerView, options: Mapping[str, Any], packed: PackedWeight) -> Candidate:
        distortion = layer.distortion(packed.decode())
        return Candidate(self.name, dict(options), packed.nbytes, distortion, packed.shared_nbytes, form_of(packed))

    def fit(self, layer: LayerView, options: Mapping[str, Any], nbytes: int) -> Fit:
        """Compress towards `nbytes`. Methods with a continuous knob turn it; the others ignore the target."""
        del nbytes
        return Fit(self.compress(layer, **options), dict(options))


def compressor(name: str) -> Compressor:
    """The registered compressor of that name; raises `UnknownNameError` with the close matches."""
    return registry.get(name, "compress").target()


def sample_rows(layer: LayerView, values: int) -> tuple[LayerView, float]:
    """The layer cut down to about `values` weights, every n-th row, and how much larger the whole is.

    Offers for a big table are priced on such a sample: rows are many and alike, and the plan only needs their average.
    """
    stride = layer.weight.numel() // max(values, 1)
    if stride <= 1 or layer.groups > 1 or layer.rows // stride < 256:
        return layer, 1.0
    part = dataclasses.replace(
        layer,
        weight=layer.weight[::stride].contiguous(),
        row_weight=layer.row_weight[::stride].contiguous(),
        measure=None,
        kept=None if layer.kept is None else layer.kept[::stride],
    )
    return part, layer.rows / part.rows
