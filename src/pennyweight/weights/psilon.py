"""PSiLON's L1 weight normalisation: rows of one direction each, all of one length, which is learned.

Hidden Synergy: L1 Weight Normalization and 1-Path-Norm Regularization, arXiv 2404.19112. V [outputs, inputs] is the
latent weight, g one number a layer (`shared`) or one an output; it may become negative:

    W_k = g V_k / |V_k|_1                   dL/dV_k = (g / |V_k|_1) (G_k - <G_k, W_k> / g sign(V_k)),  G = dL/dW

The gradient is orthogonal to V_k, and sign(V) draws small weights to zero from both sides. In networks of such layers
the 1-path-norm is a product of the g (losses/path_norm.py).

Exact zeros. From progress `sparsify` on, with t rising from 0 there to 1 at progress 1,

    W_k = (1 - t) g V_k / |V_k|_1 + t g P(V_k),    P(v) = sign(v) relu(|v| - tau), the nearest v with |v|_1 = 1

and at t = 1 most weights are zeros. |W_k|_1 = |g| all along.

CReLU pairs (`pairs`): inputs are [relu(z), -relu(-z)], of which one is zero everywhere, so that weights i and i + n/2
of a row are never in use together; max(|V_i|, |V_(i + n/2)|) takes the place of |V_i| in the norm and in tau.

Departures. The release counts t up at every forward, in evaluation too: here the progress says it. Its P adds weight to
rows with |V_k|_1 < 1, zeros included; such rows are taken at length 1, where P changes nothing. `sharpness` projects
sharpness V_k / |V_k|_1 instead of V_k, which then does not depend on the length of V. Rows of zeros give zeros.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..errors import PlanError, WeightError
from ..registry import register
from .base import WeightTransform, per_output, require_finite


def magnitude(rows: Tensor, pairs: bool = False) -> Tensor:
    """|V| of rows [outputs, n], or of their CReLU pairs [outputs, n/2] the larger."""
    size = rows.abs()
    return torch.maximum(*size.chunk(2, 1)) if pairs else size


def simplex_threshold(size: Tensor) -> Tensor:
    """tau [outputs, 1] with sum relu(size - tau) = 1 in each row of size [outputs, n] >= 0."""
    ordered = size.sort(1, descending=True).values
    count = torch.arange(1, size.shape[1] + 1, device=size.device, dtype=size.dtype)
    candidates = (ordered.cumsum(1) - 1) / count
    kept = (candidates < ordered).sum(1, keepdim=True)
    return candidates.gather(1, kept - 1)


def project(rows: Tensor, pairs: bool = False) -> Tensor:
    """P of rows [outputs, n]: the nearest with sum of `magnitude` 1."""
    return rows.sign() * (rows.abs() - simplex_threshold(magnitude(rows, pairs))).relu()


def near_sparsity(weight: Tensor) -> Tensor:
    """[outputs]: 0 for rows of equal magnitudes up to 1 - 1/n for rows of a single weight (n weights an output).

    1 - exp(entropy of |v| / |v|_1) / n, as released.
    """
    share = weight.flatten(1).abs()
    share = share / share.sum(1, keepdim=True)
    return 1 - torch.special.entr(share).sum(1).exp() / share.shape[1]


@register(
    "psilon",
    acts_on="weights",
    paper="2404.19112",
    description="L1-normalised rows of one learned length, exact zeros at the end; chains before low-bit weights",
)
class L1WeightNorm(WeightTransform):
    """See the module.

    shared: one length a layer, else one an output. initial: the length to start from (the paper's 1; 0 for branches
    that start closed); None keeps that of the weight, on average over outputs if shared. sparsify: progress 0 to 1 from
    which weights are led to exact zeros, None: never. sharpness: at least 1, larger is sparser; None: as released.
    pairs: of a layer behind CReLU. Raises `PlanError` on other values.
    """

    progress: Tensor
    length: nn.Parameter | None

    def __init__(
        self,
        shared: bool = True,
        initial: float | None = 1.0,
        sparsify: float | None = None,
        sharpness: float | None = None,
        pairs: bool = False,
    ) -> None:
        super().__init__()
        if sparsify is not None and not 0 <= sparsify < 1:
            raise PlanError(f"psilon: sparsify is {sparsify}; it is a share of the training, 0 to below 1")
        if sharpness is not None and not sharpness >= 1:
            raise PlanError(f"psilon: sharpness is {sharpness}; below 1 no weight would become zero")
        self.shared, self.initial, self.pairs = shared, initial, pairs
        self.sparsify, self.sharpness = sparsify, sharpness
        self.register_buffer("progress", torch.zeros(()))
        self.register_parameter("length", None)

    def fit(self, weight: Tensor) -> None:
        """Make the length. Raises `WeightError` if the weight is not finite, or has no pairs where it must."""
        require_finite(weight)
        rows = weight.detach().flatten(1)
        if self.pairs and rows.shape[1] % 2:
            raise WeightError(f"CReLU gives an even number of inputs, not {rows.shape[1]}; leave out pairs")
        sums = magnitude(rows, self.pairs).sum(1)
        sums = sums.mean() if self.shared else sums
        self.length = nn.Parameter(sums.clone() if self.initial is None else torch.full_like(sums, self.initial))

    def ramp(self) -> Tensor:
        """t: 0 while weights are dense, 1 when they are exactly sparse."""
        if self.sparsify is None:
            return torch.zeros_like(self.progress)
        return (1 - (1 - self.progress) / (1 - self.sparsify)).clamp(0, 1)  # exactly 1 at the end

    def forward(self, weight: Tensor) -> Tensor:
        if self.length is None:
            raise WeightError("psilon: there is no length yet; call fit(weight), as prepare does")
        rows = weight.flatten(1)
        norm = magnitude(rows, self.pairs).sum(1, keepdim=True)
        norm = torch.where(norm > 0, norm, 1.0)
        unit = rows / norm
        t = self.ramp().to(rows.dtype)
        if self.sparsify is not None and bool(t > 0):  # sorting costs more than waiting for the device
            scale = norm.clamp_min(1) if self.sharpness is None else self.sharpness
            unit = (1 - t) * unit + t * project(unit * scale, self.pairs)
        length = self.length.expand(len(rows))
        return (per_output(length, rows) * unit).view_as(weight)

    def extra_repr(self) -> str:
        return f"shared={self.shared}, sparsify={self.sparsify}, sharpness={self.sharpness}, pairs={self.pairs}"
