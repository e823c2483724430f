"""What a network costs in theory: parameters, multiply-accumulates by precision, bytes; a row a layer.

    table = cost_table(model, torch.zeros(1, 3, 224, 224), {"stem.*": Precision(8, 8), "*": Precision(1, 1)})
    table.ace, table.operations, table.macs_by_precision()

Only shapes matter, so model and inputs may live on the meta device. With n = multiply-accumulates of a layer, w and a
the bits of its weight and its input:

    ACE           sum n w a                           adders of the multipliers (PokeBNN, arXiv 2112.00133)
    operations    sum n min(1, w a / 64)              real ones and "BOPs / 64": a word does 64 one-bit products at once
    compression   32 P / sum (bits of parameters)     r_c of BiBench, arXiv 2301.11233, which knows 1 and 32 bits only
    speedup       sum n / operations                  r_s, the same

A multiply-accumulate is one multiplication and one addition (an accumulator starts from the bias). Counted are layers
with weights and products of two activations (attention); norms, activations and sums are not, as in both papers.
Embeddings multiply nothing.
"""

from __future__ import annotations

import io
import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from fnmatch import fnmatchcase
from functools import partial
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from .compress.data import Call, calls
from .compress.observe import evaluating
from .errors import PlanError, WeightError
from .layers.packed import PackedModule
from .layers.precision import Precision

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
#: Bits of a parameter that no precision speaks of: norms, biases, scales.
REAL_BITS = 32


@dataclass(frozen=True)
class LayerCost:
    """One layer. kind: linear, conv, embedding, recurrent, attention, or product (of two activations).

    parameters: all of the layer's own, tied ones at their first owner, without what only training needs. weights: those
    of them that `precision` is about. macs: multiply-accumulates a sample. For a product, precision.weight means its
    first factor.
    """

    name: str
    kind: str
    parameters: int
    weights: int
    macs: int
    precision: Precision

    @property
    def ace(self) -> int:
        return self.macs * self.precision.adders

    @property
    def operations(self) -> float:
        return self.macs * min(1.0, self.precision.adders / 64)

    @property
    def bits(self) -> int:
        """Of all parameters."""
        return self.weights * self.precision.weight + (self.parameters - self.weights) * REAL_BITS


@dataclass(frozen=True)
class CostTable:
    """See the module. other_parameters: of norms and whatever else is no layer."""

    layers: list[LayerCost]
    other_parameters: int

    @property
    def parameters(self) -> int:
        return self.other_parameters + sum(row.parameters for row in self.layers)

    @property
    def nbytes(self) -> int:
        """Of all parameters, each layer's rounded up to whole bytes; without headers and running statistics."""
        return self.other_parameters * REAL_BITS // 8 + sum(math.ceil(row.bits / 8) for row in self.layers)

    @property
    def macs(self) -> int:
        """Multiply-accumulates a sample."""
        return sum(row.macs for row in self.layers)

    @property
    def ace(self) -> int:
        """Arithmetic computation effort a sample."""
        return sum(row.ace for row in self.layers)

    @property
    def operations(self) -> float:
        """Operations a sample, binary ones as 1/64."""
        return math.fsum(row.operations for row in self.layers)

    @property
    def compression(self) -> float:
        """BiBench's r_c: how many times fewer bits than with 32 for each parameter."""
        return REAL_BITS * self.parameters / (self.other_parameters * REAL_BITS + sum(row.bits for row in self.layers))

    @property
    def speedup(self) -> float:
        """BiBench's r_s: multiply-accumulates over operations. A theory: measured speed is in `report`. 1 for none."""
        return self.macs / self.operations if self.macs else 1.0

    def macs_by_precision(self) -> dict[str, int]:
        """ "1-bit x 1-bit" -> multiply-accumulates a sample, most first."""
        return _sum_by_precision((row.precision, row.macs) for row in self.layers)

    def weights_by_precision(self) -> dict[str, int]:
        """The same for the weights."""
        return _sum_by_precision((row.precision, row.weights) for row in self.layers)

    def to_dict(self) -> dict[str, Any]:
        """As plain values that JSON can hold."""
        totals = ("parameters", "nbytes", "macs", "ace", "operations", "compression", "speedup")
        return {name: getattr(self, name) for name in totals} | {
            "other_parameters": self.other_parameters,
            "layers": [asdict(row) | {"ace": row.ace, "operations": row.operations} for row in self.layers],
        }

    def table(self) -> Table:
        """A row a layer, totals at the foot."""
        table = Table(show_footer=True)
        table.add_column("layer", f"{len(self.layers)} layers and {self.other_parameters:,} other parameters")
        table.add_column("kind")
        table.add_column("parameters", f"{self.parameters:,}", justify="right")
        table.add_column("precision")
        table.add_column("MACs", f"{self.macs:,}", justify="right")
        table.add_column("ACE", f"{self.ace:,}", justify="right")
        for row in self.layers:
            numbers = (f"{row.parameters:,}", str(row.precision), f"{row.macs:,}", f"{row.ace:,}")
            table.add_row(row.name, row.kind, *numbers)
        return table

    def __str__(self) -> str:
        out = io.StringIO()
        Console(file=out, width=140).print(self.table())
        return out.getvalue()


@torch.no_grad()
def cost_table(model: nn.Module, inputs: Any, precision: Mapping[str, Precision] | None = None) -> CostTable:
    """The cost of a model that is not packed, trained or not, on its first batch.

    inputs: calibration data as `shrink` takes it. precision: of layers by name or glob, the first that matches; what
    none matches has the bits of its `input_quantizer` and of its weight's transform where these say them, else 32.
    Raises PlanError for a pattern that matches no layer, WeightError for a packed layer, DataError for no data.
    """
    batch = calls(model, inputs)[0]
    layers = _layers(model)
    for name, module in layers.items():
        if isinstance(module, PackedModule):
            raise WeightError(f"{name} is packed; pw.report(model, inputs=...) counts what packed weights multiply")
    macs, products = _count(model, layers, batch)
    rows = _rows(model, layers, macs, products, batch.size)
    chosen = _choose(precision or {}, [row.name for row in rows])
    rows = [replace(row, precision=chosen.get(row.name, row.precision)) for row in rows]
    return CostTable(rows, sum(p.numel() for p in _lasting(model)) - sum(row.parameters for row in rows))


def vectors_multiplied(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], result: Any) -> int:
    """How many vectors a layer multiplied its weight with in one call: positions of a convolution, tokens, samples."""
    first = (args or tuple(kwargs.values()))[0]
    seen = first.data if isinstance(first, nn.utils.rnn.PackedSequence) else first
    if isinstance(module, _TRANSPOSED):
        return seen.numel() // module.in_channels
    if isinstance(module, _CONVOLUTIONS):
        return result.numel() // module.out_channels
    return seen.numel() // seen.shape[-1]


# ------------------------------------------------------------------------------------------------------------- counting


_KINDS: dict[str, tuple[type[nn.Module], ...]] = {
    "linear": (nn.Linear,),
    "conv": (*_CONVOLUTIONS, *_TRANSPOSED),
    "embedding": (nn.Embedding, nn.EmbeddingBag),
    "recurrent": (nn.RNNBase, nn.RNNCellBase),
    "attention": (nn.MultiheadAttention,),
}


def _kind(module: nn.Module) -> str:
    return next((kind for kind, types in _KINDS.items() if isinstance(module, types)), "")


def _layers(model: nn.Module) -> dict[str, nn.Module]:
    """Layers with weights by name. Those inside others, such as parts of a weight's transform, count with them."""
    found: dict[str, nn.Module] = {}
    inside: set[int] = set()
    for name, module in model.named_modules():
        if _kind(module) and id(module) not in inside:
            found[name] = module
            inside.update(map(id, module.modules()))
    return found


def _lasting(module: nn.Module) -> list[nn.Parameter]:
    """All parameters but those of parts that conversion drops, which say so by `training_only`."""
    parts = (part for part in module.modules() if getattr(part, "training_only", False))
    dropped = {id(p) for part in parts for p in part.parameters()}
    return [p for p in module.parameters() if id(p) not in dropped]


def _weights(module: nn.Module) -> int:
    """Numbers in the layer's weights, from its sizes: a parametrized weight need not be computed."""
    if isinstance(module, nn.Linear):
        return module.in_features * module.out_features
    if isinstance(module, (*_CONVOLUTIONS, *_TRANSPOSED)):
        return module.in_channels * module.out_channels // module.groups * math.prod(module.kernel_size)
    if isinstance(module, nn.Embedding | nn.EmbeddingBag):
        return module.num_embeddings * module.embedding_dim
    if isinstance(module, nn.MultiheadAttention):
        return module.embed_dim * (2 * module.embed_dim + (module.kdim or 0) + (module.vdim or 0))
    return sum(p.numel() for name, p in module.named_parameters() if name.startswith("weight"))


class _Products(TorchDispatchMode):
    """Multiply-accumulates of all products, by the name of the innermost module that runs.

    A layer's are its own count's business, but for nn.MultiheadAttention, where they are charged with the layer's.
    """

    def __init__(self, silent: set[str]) -> None:
        super().__init__()
        self.running: list[str] = []
        self.silent = silent
        self.macs: Counter[str] = Counter()

    def enter(self, name: str, *_: Any) -> None:
        self.running.append(name)

    def leave(self, *_: Any) -> None:
        self.running.pop()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        formula = flop_registry.get(func.overloadpacket)
        if formula is not None and not self.silent & set(self.running):
            self.macs[self.running[-1]] += formula(*args, **(kwargs or {}), out_val=result) // 2
        return result


def _count(model: nn.Module, layers: Mapping[str, nn.Module], batch: Call) -> tuple[Counter[str], dict[str, int]]:
    """Multiply-accumulates of the batch: of layers with their weights, and of other products by module."""
    counted: Counter[str] = Counter()
    attention = {name for name, module in layers.items() if isinstance(module, nn.MultiheadAttention)}
    products = _Products(layers.keys() - attention)
    hooks = []
    for name, module in model.named_modules():
        if name in layers:
            hooks.append(module.register_forward_hook(_count_into(counted, name), with_kwargs=True))
        hooks.append(module.register_forward_pre_hook(partial(products.enter, name)))
        hooks.append(module.register_forward_hook(products.leave))
    fast_path = torch.backends.mha.get_fastpath_enabled()  # it would pass by the layers within
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        # attention as plain products: there is no formula for every fused kernel
        with evaluating(model), sdpa_kernel(SDPBackend.MATH), products:
            batch(model)
    finally:
        torch.backends.mha.set_fastpath_enabled(fast_path)
        for hook in hooks:
            hook.remove()
    own = {name: n - counted[name] if name in attention else n for name, n in products.macs.items()}
    return counted, {name: n for name, n in own.items() if n > 0}


def _count_into(counted: Counter[str], name: str) -> Callable[..., None]:
    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> None:
        if isinstance(module, nn.MultiheadAttention):
            query, key, value = (*args, *(kwargs[n] for n in ("query", "key", "value")[len(args) :]))[:3]
            tokens = [x.numel() // x.shape[-1] for x in (query, query, key, value)]
            widths = (module.embed_dim, module.embed_dim, module.kdim, module.vdim)
            counted[name] += module.embed_dim * sum(n * width for n, width in zip(tokens, widths))
        elif not isinstance(module, nn.Embedding | nn.EmbeddingBag):
            counted[name] += vectors_multiplied(module, args, kwargs, result) * _weights(module)

    return hook


def _rows(
    model: nn.Module,
    layers: Mapping[str, nn.Module],
    macs: Mapping[str, int],
    products: Mapping[str, int],
    samples: int,
) -> list[LayerCost]:
    """In the order of the modules."""
    rows, seen = [], set()
    for name, module in model.named_modules():
        if name in layers:
            own = {id(p): p.numel() for p in _lasting(module) if id(p) not in seen}
            seen.update(own)
            parameters = sum(own.values())
            weights = _weights(module) if parameters >= _weights(module) else 0  # tied to an earlier layer's
            rows.append(
                LayerCost(name, _kind(module), parameters, weights, macs.get(name, 0) // samples, _said_by(module))
            )
        if name in products:
            inside = f"{name}.products" if name in layers else name
            rows.append(LayerCost(inside, "product", 0, 0, products[name] // samples, Precision()))
    return rows


def _said_by(module: nn.Module) -> Precision:
    """What a prepared layer says of itself: `bits` of its input quantiser and of the last transform of its weight."""
    chain = getattr(getattr(module, "parametrizations", None), "weight", None)
    weight_bits = getattr(chain[-1], "bits", None) if chain is not None else None
    input_bits = getattr(getattr(module, "input_quantizer", None), "bits", None)
    return Precision(weight_bits or REAL_BITS, input_bits or REAL_BITS)


def _choose(patterns: Mapping[str, Precision], names: list[str]) -> dict[str, Precision]:
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise PlanError(f"precision: {pattern!r} matches no layer; there are: {', '.join(names)}")
    return {
        name: next(bits for pattern, bits in patterns.items() if fnmatchcase(name, pattern))
        for name in names
        if any(fnmatchcase(name, pattern) for pattern in patterns)
    }


def _sum_by_precision(counts: Iterable[tuple[Precision, int]]) -> dict[str, int]:
    total: Counter[str] = Counter()
    for precision, n in counts:
        total[str(precision)] += n
    return {key: n for key, n in total.most_common() if n}
