"""Vector quantisation: blocks of d weights in a row share K entries, found by weighted k-means in the layer's metric.

Clustering weights goes back to Deep Compression (arXiv 1510.00149, scalars) and to product quantisation with
importance-weighted k-means (arXiv 1907.05686, blocks). Here every coordinate counts by the diagonal of the metric, and
codes that will be entropy-coded count by their length (Chou, Lookabaugh and Gray, 1989). With row weight r_i, column
weight c_j, and block b of row i holding the columns b*d .. b*d + d - 1, the clustering lowers

    sum_{i, b} ( sum_{j in b} r_i c_j (w_ij - e_{k(i,b), j})^2  +  rate * length_{k(i,b)} )

with length_k = -log2 of entry k's share of the blocks; rate = 0 is plain k-means. It does so exactly and at the price
of plain k-means: all rows share a block's column weights, so the objective for all entries is one matrix product,
(c w, c, rate / r) times (-2 E, E^2, length), and an entry's best value is a weighted mean per coordinate.

With `row_scale` each row is first divided by its weighted root mean square s_i (stored), and r_i becomes r_i s_i^2, so
the objective stays the one above. Seeding is k-means++ (Arthur and Vassilvitskii, 2007) in rounds that double the
number of entries, with a fixed seed. Entries that lose all their blocks move to the blocks served worst (rate 0) or go.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..formats import Codebook
from ..formats.scales import round_values
from ..registry import register
from .contract import Compressor, LayerView
from .groups import require_finite

_SEED = 0
_ITERATIONS = 8
_TRAINING_BLOCKS_PER_ENTRY, _TRAINING_BLOCKS = 48, 50_000
_CHUNK_OBJECTIVES = 1 << 18
_FLOOR = 1e-6  # of the mean: what a column or row that never matters still counts, so that its blocks stay sensible


@dataclass(frozen=True)
class WeightedBlocks:
    """Blocks of weights to be clustered, with how much each coordinate counts.

    values: float32 [n, d]. row_weight: float32 [n], of each block's row. column_weight: float32 [positions, d], and
    position: int64 [n], the place of each block in its row. share: float32 [n], how many blocks each one stands for.
    """

    values: Tensor
    row_weight: Tensor
    column_weight: Tensor
    position: Tensor
    share: Tensor

    def __len__(self) -> int:
        return self.values.shape[0]

    def importance(self) -> Tensor:
        """float32 [n, d]: what each coordinate's squared error counts."""
        return self.column_weight[self.position] * (self.row_weight * self.share)[:, None]

    def nearest(self, entries: Tensor, cost: Tensor | None = None) -> Tensor:
        """int64 [n]: the entry of least weighted squared distance plus cost, for entries [K, d] and cost [K]."""
        table = torch.cat([-2 * entries, entries.square()], 1)
        table = (table if cost is None else torch.cat([table, cost[:, None]], 1)).T.contiguous()  # [2 d (+ 1), K]
        rows = max(1, _CHUNK_OBJECTIVES // entries.shape[0])
        objectives = torch.empty(rows, entries.shape[0])
        codes = np.empty(len(self), np.int64)
        for start in range(0, len(self), rows):
            piece = slice(start, start + rows)
            weight = self.column_weight[self.position[piece]]
            features = [weight * self.values[piece], weight]
            if cost is not None:
                features.append(self.row_weight[piece, None].reciprocal())
            found = torch.mm(torch.cat(features, 1), table, out=objectives[: len(weight)])
            codes[piece] = found.numpy().argmin(1)  # several times faster than torch's
        return torch.from_numpy(codes)

    def distances(self, entries: Tensor, codes: Tensor) -> Tensor:
        """float64 [n]: weighted squared distance of each block to its entry, free of cancellation."""
        return ((self.values - entries[codes]).square() * self.importance()).sum(1, dtype=torch.float64)

    def means(self, codes: Tensor, entries: int) -> tuple[Tensor, Tensor]:
        """Weighted mean of each entry's blocks, float32 [K, d], and their share of all blocks, float64 [K]."""
        importance = self.importance().double()
        total = torch.zeros(entries, self.values.shape[1], dtype=torch.float64).index_add_(0, codes, importance)
        sums = torch.zeros_like(total).index_add_(0, codes, importance * self.values)
        count = torch.bincount(codes, self.share.double(), minlength=entries)
        return torch.where(total > 0, sums / total, 0.0).float(), count / count.sum()


def weighted_kmeans(
    blocks: WeightedBlocks, entries: int, rate: float = 0.0, iterations: int = _ITERATIONS
) -> tuple[Tensor, Tensor, list[float]]:
    """Cluster centres, float32 [K, d]; what choosing each costs, float32 [K]; the objective after each assignment.

    rate: what a bit costs, in the objective's units. The objective never increases. K is smaller than `entries` where
    that many distinct blocks do not exist (every block is then met exactly, if rate is 0) or entries are not worth it.
    """
    centres = _seed_entries(blocks, entries, torch.Generator().manual_seed(_SEED))
    cost = torch.zeros(len(centres))
    history = []
    for _ in range(iterations):
        codes = blocks.nearest(centres, cost if rate else None)
        loss = blocks.distances(centres, codes)
        history.append(float((loss + (cost[codes] * blocks.share).double()).sum()))
        centres, share = blocks.means(codes, len(centres))
        if rate:
            centres, share = centres[share > 0], share[share > 0]
            cost = (-rate * share.log2()).float()
        elif bool((empty := share == 0).any()):
            centres[empty] = blocks.values[loss.topk(int(empty.sum())).indices]
    return centres, cost if rate else torch.zeros(len(centres)), history


def _seed_entries(blocks: WeightedBlocks, entries: int, generator: torch.Generator) -> Tensor:
    """Distinct blocks [<= entries, d], drawn in proportion to the loss that those of earlier rounds leave."""
    importance = blocks.importance()
    loss = importance.sum(1, dtype=torch.float64)
    nothing = 1e-13 * float((importance * blocks.values.square()).sum(dtype=torch.float64))
    chosen = blocks.values[:0]
    while len(chosen) < entries and float(loss.sum()) > nothing:
        wanted = min(max(1, len(chosen)), entries - len(chosen), int((loss > 0).sum()))
        # the largest of log(p) + Gumbel noise are a draw without replacement with probabilities p
        uniform = torch.rand(len(blocks), generator=generator, dtype=torch.float64).clamp_min_(1e-300)
        index = (loss.log() - (-uniform.log()).log()).topk(wanted).indices
        new = torch.unique(blocks.values[index], dim=0)
        new_loss = blocks.distances(new, blocks.nearest(new))
        loss = torch.minimum(loss, new_loss) if len(chosen) else new_loss
        chosen = torch.cat([chosen, new])
    return chosen


def training_blocks(blocks: WeightedBlocks, count: int) -> WeightedBlocks:
    """About `count` blocks drawn in proportion to their row's weight; shares make up for the uneven draw.

    Where a few rows carry most of the weight (the frequent words of an embedding) they fill the sample, too. One draw
    from each of `count` equal slices of the cumulated weight keeps the sample close to the whole.
    """
    if len(blocks) <= count:
        return blocks
    generator = torch.Generator().manual_seed(_SEED)
    cumulated = blocks.row_weight.double().cumsum(0)
    draws = (torch.arange(count) + torch.rand(count, generator=generator, dtype=torch.float64)) / count * cumulated[-1]
    index = torch.searchsorted(cumulated, draws, right=True).clamp_max_(len(blocks) - 1)
    index, times = index.unique(return_counts=True)
    weight = blocks.row_weight[index]
    share = times * (float(cumulated[-1]) / count) / weight
    return replace(blocks, values=blocks.values[index], row_weight=weight, position=blocks.position[index], share=share)


def blocks_of(layer: LayerView, d: int, scale: Tensor | None = None) -> WeightedBlocks:
    """Blocks of d consecutive columns, rows first divided by `scale` [rows]; a short last block is padded.

    Weights are normalised: the mean row weight and the mean column weight are 1.
    """
    row_weight = _normalised(layer.row_weight)
    values = layer.weight
    if scale is not None:
        values = values / torch.where(scale > 0, scale, 1.0)[:, None]
        row_weight = _normalised(row_weight * scale.double().square())
    short = -layer.cols % d
    values = F.pad(values, (0, short)).reshape(-1, d)
    column_weight = F.pad(_normalised(layer.column_weight), (0, short)).reshape(-1, d)
    positions = column_weight.shape[0]
    return WeightedBlocks(
        values,
        row_weight.float().repeat_interleave(positions),
        column_weight.float(),
        torch.arange(positions).repeat(layer.rows),
        torch.ones(len(values)),
    )


def _normalised(weight: Tensor) -> Tensor:
    """The weights at mean 1, none below `_FLOOR`; ones if all are zero."""
    mean = weight.mean()
    return (weight / mean).clamp_min(_FLOOR) if float(mean) > 0 else torch.ones_like(weight)


def row_rms(layer: LayerView) -> Tensor:
    """Weighted root mean square of each row as it will be stored, float32 [rows]."""
    column_weight = _normalised(layer.column_weight).float()
    return round_values((layer.weight.square() @ column_weight / column_weight.sum()).sqrt())


@register(
    "codebook",
    acts_on="compress",
    paper="1907.05686",
    description="vector quantisation: weighted k-means over blocks of weights",
)
class VectorQuantizer(Compressor):
    """Blocks of d weights share a codebook of at most `entries` vectors: at most log2(entries) / d bits a weight."""

    name = "codebook"

    # (d, entries, rate) by bits per weight. A table of embeddings has no better method below two bits a weight, so it
    # gets more of them; where inputs are correlated, methods that use the whole metric win and few points will do.
    _TABLE = ((6, 512, 0.6), (8, 256, 0.35), (6, 512, 0.35), (6, 512, 0.2), (4, 1024, 0.2), (4, 256, 0.0), (2, 64, 0.0))
    _OTHER = ((8, 256, 0.35), (4, 256, 0.2), (4, 256, 0.0), (2, 64, 0.0))

    def offers(self, layer: LayerView) -> list[dict[str, Any]]:
        """Settings whose codebook takes at most a third of what its codes take."""
        found = []
        for d, entries, rate in self._TABLE if layer.kind == "embedding" else self._OTHER:
            blocks = layer.rows * math.ceil(layer.cols / d)
            if 3 * 2 * d * entries <= blocks * math.log2(entries) / 8:
                found.append({"d": d, "entries": entries, "rate": rate})
        return found

    def compress(
        self, layer: LayerView, d: int = 4, entries: int = 256, rate: float = 0.0, row_scale: bool = True
    ) -> Codebook:
        """d: weights per block, 1..8; entries: most there may be; row_scale: divide rows by their root mean square.

        rate: the price of a bit, in units of the weight's mean (weighted) square; 0 ignores the length of codes.
        Raises `WeightError` or `DataError` if the layer's numbers are not finite.
        """
        require_finite(layer)
        scale = row_rms(layer) if row_scale else None
        blocks = blocks_of(layer, d, scale)
        price = rate * float((blocks.importance() * blocks.values.square()).mean(dtype=torch.float64))
        training = training_blocks(blocks, min(_TRAINING_BLOCKS, _TRAINING_BLOCKS_PER_ENTRY * entries))
        centres, cost, _ = weighted_kmeans(training, entries, price)
        if not rate and len(centres) < entries and len(training) < len(blocks):
            centres, cost, _ = weighted_kmeans(blocks, entries)  # few distinct blocks: the sample may lack rare ones
        centres = round_values(centres)  # as stored
        codes = blocks.nearest(centres, cost if rate else None).view(layer.rows, -1)
        return Codebook.from_codes(codes, centres, cols=layer.cols, row_scale=scale)
