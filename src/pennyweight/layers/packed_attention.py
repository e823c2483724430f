"""nn.MultiheadAttention in parts: projections of queries, keys and values, attention, output projection.

PyTorch's own forward hands all weights to one function, so that nobody can see what the output projection reads, or
multiply without weights of floats. `forward_in_parts` computes the same with the projections as products of their own:

    PackedAttention   with low memory and inputs of 8 or 16 bits: the codes multiply. What both halves of
                      cross-attention need of one packed weight [3 * embed, embed] is cut out of its whole product.
    in_parts(model)   while it lasts, calibration sees the inputs of every projection

Nested tensors run in PyTorch's forward.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable, Iterator
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .packed_module import PackedModule, twin_of

Project = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]  # what projects queries, keys and values
_SEPARATE = ("q_proj_weight", "k_proj_weight", "v_proj_weight")


def forward_in_parts(
    module: nn.MultiheadAttention,
    project: Project,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_padding_mask: Tensor | None = None,
    need_weights: bool = True,
    attn_mask: Tensor | None = None,
    average_attn_weights: bool = True,
    is_causal: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """What nn.MultiheadAttention.forward returns for these arguments, with projections by `project` and the module
    `out_proj`. Raises RuntimeError, as it does, for is_causal without attn_mask.
    """
    if is_causal and attn_mask is None:
        raise RuntimeError("Need attn_mask if specifying the is_causal hint.")
    batched = query.ndim == 3

    def batch_first(x: Tensor) -> Tensor:
        return x.unsqueeze(0) if not batched else x if module.batch_first else x.transpose(0, 1)

    same = key is query and value is query
    query = batch_first(query)
    key, value = (query, query) if same else (batch_first(key), batch_first(value))
    q, k, v = project(query, key, value)
    batch, heads = len(q), module.num_heads
    added = 0
    if module.bias_k is not None and module.bias_v is not None:
        k, v = (torch.cat([x, b.expand(batch, 1, -1)], 1) for x, b in ((k, module.bias_k), (v, module.bias_v)))
        added += 1
    q, k, v = (x.unflatten(2, (heads, -1)).transpose(1, 2) for x in (q, k, v))  # [batch, heads, length, features]
    if module.add_zero_attn:
        k, v = F.pad(k, (0, 0, 0, 1)), F.pad(v, (0, 0, 0, 1))
        added += 1
    mask = _mask(attn_mask, key_padding_mask, batch, heads, added, q.dtype)
    dropout = module.dropout if module.training else 0.0
    weights = None
    if need_weights:
        scores = (q / math.sqrt(q.shape[-1])) @ k.transpose(2, 3)
        weights = (scores if mask is None else scores + mask).softmax(-1)
        weights = F.dropout(weights, dropout) if dropout else weights
        y = weights @ v
        weights = weights.mean(1) if average_attn_weights else weights
        weights = weights if batched else weights[0]
    else:
        y = F.scaled_dot_product_attention(q, k, v, mask, dropout)
    y = module.out_proj(y.transpose(1, 2).flatten(2))
    return (y[0] if not batched else y if module.batch_first else y.transpose(0, 1)), weights


def _mask(
    attention: Tensor | None, padding: Tensor | None, batch: int, heads: int, added: int, dtype: torch.dtype
) -> Tensor | None:
    """What is added to the scores, [batch or 1, heads or 1, queries or 1, keys]; True means left out."""

    def addend(mask: Tensor) -> Tensor:
        if mask.dtype == torch.bool:
            mask = torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(mask, -math.inf)
        return F.pad(mask.to(dtype), (0, added))

    masks = []
    if attention is not None:
        whole = addend(attention)
        masks.append(whole.view(batch, heads, *whole.shape[1:]) if whole.ndim == 3 else whole[None, None])
    if padding is not None:
        rows = addend(padding)
        masks.append((rows if rows.ndim == 2 else rows[None])[:, None, None])
    return None if not masks else masks[0] if len(masks) == 1 else masks[0] + masks[1]


def _biases(module: nn.MultiheadAttention) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    bias = module.in_proj_bias
    return (None, None, None) if bias is None else cast(Any, bias.chunk(3))


def _forward(
    module: nn.MultiheadAttention, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any
) -> Any:
    """forward_in_parts of a module that is not packed."""
    if query.is_nested or key.is_nested or value.is_nested:
        return type(module).forward(module, query, key, value, *args, **kwargs)

    def project(*inputs: Tensor) -> Any:
        whole = module.in_proj_weight
        weights = [getattr(module, name) for name in _SEPARATE] if whole is None else whole.chunk(3)
        return tuple(F.linear(x, weight, bias) for x, weight, bias in zip(inputs, weights, _biases(module)))

    return forward_in_parts(module, project, query, key, value, *args, **kwargs)


@contextlib.contextmanager
def in_parts(model: nn.Module) -> Iterator[None]:
    """Let every nn.MultiheadAttention of the model call its output projection, where hooks can see what it reads."""
    found = [m for m in model.modules() if isinstance(m, nn.MultiheadAttention) and _is_plain(m)]
    for module in found:
        vars(module)["forward"] = functools.partial(_forward, module)
    try:
        yield
    finally:
        for module in found:
            vars(module).pop("forward")


def _is_plain(module: nn.MultiheadAttention) -> bool:
    return type(module).forward is nn.MultiheadAttention.forward and "forward" not in vars(module)


@twin_of(nn.MultiheadAttention)
class PackedAttention(PackedModule):
    """nn.MultiheadAttention; with low memory and quantised inputs the format multiplies."""

    in_proj_bias: Tensor | None

    @property
    def _qkv_same_embed_dim(self) -> bool:
        """What nn.TransformerEncoderLayer asks before it takes all weights, decoded, into a function of its own."""
        return not self._multiplies and vars(self)["_qkv_same_embed_dim"]

    def forward(self, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Any:
        whole = self._packed_views.keys() in ({"in_proj_weight"}, set(_SEPARATE))
        if not (self._multiplies and whole) or query.is_nested or key.is_nested or value.is_nested:
            return super().forward(query, key, value, *args, **kwargs)
        return forward_in_parts(cast(Any, self), self._project, query, key, value, *args, **kwargs)

    def _project(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        if "in_proj_weight" not in self._packed_views:
            inputs = zip(_SEPARATE, (query, key, value), _biases(cast(Any, self)))
            return cast(Any, tuple(self.running_weight(name).linear(x, bias) for name, x, bias in inputs))
        weight, bias = self.running_weight("in_proj_weight"), self.in_proj_bias
        of_query = weight.linear(query, bias).chunk(3, -1)
        of_key = of_query if key is query else weight.linear(key, bias).chunk(3, -1)
        of_value = of_query if value is query else of_key if value is key else weight.linear(value, bias).chunk(3, -1)
        return of_query[0], of_key[1], of_value[2]
