"""QKR: attention that quantises the product of query and key weights as one matrix.

Query-key reparameterization of Oscillation-free Quantization for Low-bit Vision Transformers, arXiv 2302.02210. Input x
[N, C], H heads of d = C / H:

    W_qk[h] = W_q[h]^T W_k[h]                    [C, C], from the latent W_q, W_k (each [d, C])
    Z[h]    = Qz(Qw(W_qk[h]) Qx(x)^T)            Qw: rows of the stacked [H C, C] matrix
    S[h]    = Qx(x) Z[h] / sqrt(d) + logit,      A = Qa(softmax(S)),      out = W_o (A v) + b_o

so that W_q and W_k learn through the product, and an error in one does not meet the quantised other. Without quantisers
it is ordinary attention: b_k adds the same to all keys of a query, which softmax does not see, and b_q adds x_j . c[h],
c[h] = W_k[h]^T b_q[h], which is kept as a parameter. The released code drops both biases and so changes the function.

The price: H C^2 weights in place of 2 C^2, projections H/2 times and scores H times as many products; quantised, W_qk
has full rank and cannot be split again. Worth it for few heads.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize, skip_init

from ..errors import PlanError
from ..estimators import through
from ..registry import register
from ..weights.base import WeightTransform
from .base import Replacement, as_entry, make_layer_transform
from .quantised import quantise


class QueryKeyProduct(WeightTransform):
    """W_q above W_k, [2 C, C] -> the stacked products of the heads, [H C, C]."""

    def __init__(self, heads: int) -> None:
        super().__init__()
        self.heads = heads
        # The quantiser that follows and the band outside of which gradients stop. In a tuple, so not a submodule here.
        self._freeze: tuple[Any, float] | None = None

    def freeze_outside(self, quantizer: Any, band: float | None) -> None:
        """Stop the gradient of products further than `band` steps from a boundary of the quantiser; None: of none."""
        self._freeze = None if band is None else (quantizer, band)

    def forward(self, weight: Tensor) -> Tensor:
        query, key = (half.unflatten(0, (self.heads, -1)) for half in weight.chunk(2))
        product = (query.transpose(1, 2) @ key).flatten(0, 1)
        if self._freeze is None:
            return product
        quantizer, band = self._freeze
        return through(product, product, (quantizer.boundary_distance(product) <= band).to(product.dtype))


@register(
    "query-key",
    acts_on="layers",
    paper="2302.02210",
    description="attention whose query and key weights are quantised as one matrix (OFQ's QKR)",
    combines_with=("statsq", "cga"),
)
class QueryKeyAttention(Replacement):
    """x [batch, tokens, C] -> the same shape, made from a self-attention that is left as it was.

    attention: a module with linear layers `query`, `key`, `value`, `output`, the number of `heads`, and the modules
    `scores`, `mix` (matrix products), `normalizer` and `dropout` (models/attention.py has one); its other layers are
    shared. weight_quantizer: Qw, fitted here. input_quantizer, product_quantizer, attention_quantizer, value_quantizer:
    Qx, Qz, Qa and one of the values, any modules. Qx sees x, Qz [batch, tokens, H C], Qa [batch, H, tokens, tokens],
    the last [batch, tokens, C].

    Raises `PlanError` for modules without these parts, and where query and key differ in size or the heads do not
    divide it.
    """

    parts: ClassVar[tuple[str, ...]] = (
        "query",
        "key",
        "value",
        "output",
        "heads",
        "scores",
        "mix",
        "normalizer",
        "dropout",
    )
    replaced: ClassVar[tuple[str, ...]] = ("query", "key")  # layers of the attention that are no more
    form: ClassVar[str] = f"a module with {', '.join(parts)}, query and key of one size that the heads divide"

    def __init__(
        self,
        attention: Any,
        weight_quantizer: WeightTransform | None = None,
        input_quantizer: nn.Module | None = None,
        product_quantizer: nn.Module | None = None,
        attention_quantizer: nn.Module | None = None,
        value_quantizer: nn.Module | None = None,
    ) -> None:
        super().__init__()
        if not self.fits(attention):
            missing = [part for part in self.parts if not hasattr(attention, part)]
            lack = f" a {type(attention).__name__} has no {', '.join(missing)};" if missing else ""
            raise PlanError(f"query-key:{lack} it needs {self.form}")
        query, key, heads = attention.query, attention.key, attention.heads
        features = query.in_features
        self.heads = heads
        self.scaling = (query.out_features // heads) ** -0.5
        self.value, self.output = attention.value, attention.output
        self.scores, self.mix = attention.scores, attention.mix
        self.normalizer, self.dropout = attention.normalizer, attention.dropout
        self.input_quantizer = input_quantizer or nn.Identity()
        self.product_quantizer = product_quantizer or nn.Identity()
        self.attention_quantizer = attention_quantizer or nn.Identity()
        self.value_quantizer = value_quantizer or nn.Identity()

        self.product: Any = nn.Linear(features, heads * features, bias=False)
        stacked = torch.cat([query.weight, key.weight]).detach()
        self.product.weight = nn.Parameter(stacked)
        quantise(self.product)
        # unsafe: the product has another shape than what it is made of.
        parametrize.register_parametrization(self.product, "weight", QueryKeyProduct(heads), unsafe=True)
        if weight_quantizer is not None:
            weight_quantizer.fit(self.product.weight.detach())
            parametrize.register_parametrization(self.product, "weight", weight_quantizer)
        by_head = key.weight.detach().unflatten(0, (heads, -1))
        bias = by_head.new_zeros(heads, by_head.shape[1]) if query.bias is None else query.bias.detach().view(heads, -1)
        self.key_logit = nn.Parameter(torch.einsum("hd,hdc->hc", bias, by_head))

    @classmethod
    def fits(cls, module: Any) -> bool:
        """Whether it can take the module's place."""
        if not all(hasattr(module, part) for part in cls.parts):
            return False
        query, key = module.query, module.key
        linear = isinstance(query, nn.Linear) and isinstance(key, nn.Linear)
        return linear and query.weight.shape == key.weight.shape and query.out_features % module.heads == 0

    @classmethod
    def of(
        cls, entry: Mapping[str, Any], attention: Any, weight_quantizer: WeightTransform | None = None
    ) -> QueryKeyAttention:
        """As a recipe's entry describes it: {method: query-key, input_quantizer: {method: lsq, bits: 2}, ...}.

        Channels of Qx, Qz and of the values are features, those of Qa heads. Raises `UnknownNameError` and `PlanError`
        on methods and options there are not.
        """
        options = {key: value for key, value in entry.items() if key != "method"}
        if not cls.fits(attention):
            return cls(attention)  # which says why not
        heads, features, values = attention.heads, attention.query.in_features, attention.value.out_features
        where = {"device": attention.query.weight.device, "dtype": attention.query.weight.dtype}
        # Stand-ins for the layer that a quantiser stands before: they say how many channels there are, and where.
        before = {
            "input_quantizer": skip_init(nn.Linear, features, 1, **where),
            "product_quantizer": skip_init(nn.Linear, heads * features, 1, **where),
            "attention_quantizer": skip_init(nn.Conv2d, heads, 1, 1, **where),
            "value_quantizer": skip_init(nn.Linear, values, 1, **where),
        }
        unknown = sorted(options.keys() - before.keys())
        if unknown:
            raise PlanError(f"'query-key' in a recipe has no option {', '.join(unknown)}; it has: {', '.join(before)}")
        quantizers = {role: make_layer_transform(as_entry(source), before[role]) for role, source in options.items()}
        made = cls(attention, weight_quantizer, **{role: q.to(where["device"]) for role, q in quantizers.items()})
        made.made_from = {"method": "query-key", **{role: q.made_from for role, q in quantizers.items()}}
        return made

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """mask: [batch, tokens], true for the tokens that may be looked at; every text has at least one."""
        quantised = self.input_quantizer(x)
        keys = self.product_quantizer(self.product(quantised)).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        queries = quantised.unsqueeze(1).expand_as(keys)  # [batch, H, tokens, C], as the keys
        logits = torch.einsum("bjc,hc->bhj", quantised, self.key_logit.to(quantised.dtype)).unsqueeze(2)
        scores = (self.scores(queries, keys.transpose(-2, -1)) + logits) * self.scaling
        if mask is not None:
            scores = scores.masked_fill(~mask.bool()[:, None, None, :], torch.finfo(scores.dtype).min)
        weights = self.attention_quantizer(self.dropout(self.normalizer(scores)))
        value = self.value_quantizer(self.value(x)).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        return self.output(self.mix(weights, value).transpose(1, 2).flatten(2))
