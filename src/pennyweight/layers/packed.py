"""Packed layers: modules whose weights are kept as blobs and decoded when needed.

`install` turns a module into its packed twin in place: its class becomes a subclass `Packed<Class>` of what it was, so
`isinstance`, attributes, hooks and the module's own forward stay. Each packed parameter is replaced by

    a buffer of the parameter's own name   uint8 [nbytes], the blob; the state dict therefore equals the stored file
    a property of the same name            the decoded weight, so code that reads `module.weight` keeps working

which serves every kind of layer, those included whose weight is read by somebody else's forward (attention, tied
heads). Two layers know better than to decode first: an embedding looks up rows, and a Linear that must save memory
hands its input to the format.

memory "fast" keeps the decoded weight after its first use, in the dtype and on the device of the module. "low" never
holds more than a layer's: a Linear multiplies what is packed (kernels/integer.py, with its inputs quantised row by row
to `activation_bits`, 16 or 8); other layers, and with 32 bits all of them, decode and drop the weight when their
forward ends. Blobs stay on the CPU, where they are decoded, wherever the module goes.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import ArtifactError, UnknownNameError, WeightError
from ..formats import PackedWeight, from_bytes, operators
from ..kernels.integer import ActivationBits
from .sites import MatrixView, weight_sites

Memory = Literal["fast", "low"]


class PackedModule(nn.Module):
    """What all packed twins share. Made by `install`, never by its constructor."""

    _packed_original: ClassVar[type[nn.Module]]  # the class this module had before
    _packed_rows_first: ClassVar[bool]  # whether a row of the matrix is a row of the parameter
    _packed_views: dict[str, MatrixView]  # attribute -> how its matrix becomes the parameter
    _packed_parsed: dict[str, PackedWeight]  # blobs in the form that decodes fast, as long as that may happen again
    _packed_memory: Memory
    _packed_activation_bits: ActivationBits
    _packed_running: bool = False  # inside a forward with low memory, which may read a weight several times
    _packed_decodes_once: ClassVar[bool] = (
        True  # whether with fast memory a decoded weight needs its parsed form no more
    )

    def packed_weight(self, attribute: str) -> PackedWeight:
        """The stored form of one weight. Raises ArtifactError if the blob does not fit this layer."""
        if attribute not in self._packed_parsed:
            with torch.inference_mode(False):
                packed = from_bytes(_blob_bytes(self._blob(attribute)))
            wanted = self._packed_views[attribute].matrix_shape
            if tuple(packed.shape) != wanted:
                raise ArtifactError(
                    f"{attribute} of a {self._packed_original.__name__} needs a packed matrix {list(wanted)}, but the "
                    f"blob holds {list(packed.shape)}; load the state dict into the model it came from"
                )
            self._packed_parsed[attribute] = packed
        return self._packed_parsed[attribute]

    def decoded_weight(self, attribute: str) -> Tensor:
        """The weight in its parameter's shape, in the module's dtype and on its device."""
        kept = self._decoded(attribute)
        if torch.compiler.is_compiling():  # a graph decodes whenever it runs
            view = self._packed_views[attribute]
            return view.from_matrix(operators.decode(self._blob(attribute), *view.matrix_shape)).to(kept)
        if kept.numel():
            return kept
        # A tensor made in inference mode could never again take part in autograd: make it outside.
        with torch.inference_mode(False), torch.no_grad():
            weight = self._packed_views[attribute].from_matrix(self.packed_weight(attribute).decode()).to(kept)
        if self._packed_memory == "fast" or self._packed_running:
            self._buffers[_decoded_name(attribute)] = weight
        if self._packed_memory == "fast" and self._packed_decodes_once:
            del self._packed_parsed[attribute]
        return weight

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if self._packed_memory == "fast" or torch.compiler.is_compiling():
            return super().forward(*args, **kwargs)
        self._packed_running = True
        try:
            return super().forward(*args, **kwargs)
        finally:
            self._packed_running = False
            self._forget_decoded()

    def extra_repr(self) -> str:
        blobs = ", ".join(f"{a}={self._blob(a).numel()} bytes" for a in self._packed_views)
        return ", ".join(filter(None, [super().extra_repr(), blobs]))

    def _blob(self, attribute: str) -> Tensor:
        blob = self._buffers[attribute]
        assert blob is not None
        return blob

    def _decoded(self, attribute: str) -> Tensor:
        """The kept decoded weight, or an empty tensor that says in which dtype and on which device it is wanted."""
        decoded = self._buffers[_decoded_name(attribute)]
        assert decoded is not None
        return decoded

    def _forget_decoded(self) -> None:
        for attribute in self._packed_views:
            self._buffers[_decoded_name(attribute)] = self._decoded(attribute).new_empty(0)

    def _set_packed(self, attribute: str, packed: PackedWeight, blob: Tensor, view: MatrixView, like: Tensor) -> None:
        """Replace a parameter (or an earlier blob) by a blob; `like` gives dtype and device of the decoded weight."""
        self._packed_parsed[attribute] = packed
        self._parameters.pop(attribute, None)
        self._packed_views[attribute] = view
        self._buffers[attribute] = blob
        self._buffers[_decoded_name(attribute)] = like.detach().new_empty(0)
        self._non_persistent_buffers_set.add(_decoded_name(attribute))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        blobs = {id(self._blob(attribute)) for attribute in self._packed_views}
        dtypes = {attribute: self._decoded(attribute).dtype for attribute in self._packed_views}
        result = super()._apply(lambda tensor: tensor if id(tensor) in blobs else fn(tensor), recurse)
        if any(self._decoded(attribute).dtype != dtype for attribute, dtype in dtypes.items()):
            self._forget_decoded()  # decode again rather than keep what a narrower dtype has rounded
        return result

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        for attribute in self._packed_views:
            incoming = state_dict.get(prefix + attribute)
            if isinstance(incoming, Tensor) and incoming.dtype == torch.uint8 and incoming.ndim == 1:
                self._blob(attribute).data = torch.empty(incoming.numel(), dtype=torch.uint8)  # blobs vary in size
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
        self._forget_decoded()
        self._packed_parsed.clear()

    def __reduce_ex__(self, protocol: Any) -> Any:
        # The class is made at run time, so copies and pickles name what it is made from.
        _, _, *state = super().__reduce_ex__(protocol)
        return (
            _blank_module,
            (self._packed_original, tuple(sorted(self._packed_views)), self._packed_rows_first),
            *state,
        )


class PackedLinear(PackedModule):
    """nn.Linear; with low memory the format multiplies."""

    bias: Tensor | None

    def forward(self, input: Tensor) -> Tensor:
        exact = self._packed_activation_bits == 32
        if self._packed_memory == "fast" or (exact and torch.compiler.is_compiling()):
            return super().forward(input)
        weight = self.packed_weight("weight") if exact else self.running_weight()
        return weight.linear(input, self.bias)

    def running_weight(self) -> PackedWeight:
        """The weight as it multiplies; it replaces the stored form, which the blob can always give again."""
        packed = self._packed_parsed.get("weight")
        if packed is None or not packed.runs:
            packed = self.packed_weight("weight").for_running(self._packed_activation_bits)
            self._packed_parsed["weight"] = packed
        return packed


class _RowLookup(PackedModule):
    """Looks up the rows that occur, each once, and never decodes the table."""

    _packed_decodes_once = False

    def _lookup(self, index: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(distinct entries of index [n], their rows [n, features], position of each index among them)."""
        table = self.packed_weight("weight")
        distinct, position = index.unique(return_inverse=True)  # in rising order
        if distinct.numel() and not 0 <= distinct[0] <= distinct[-1] < table.shape[0]:
            worst = int(distinct[0] if distinct[0] < 0 else distinct[-1])
            raise IndexError(f"embedding index {worst} is outside the table of {table.shape[0]} entries")
        with torch.no_grad():
            rows = table.rows(distinct.cpu()).to(self._decoded("weight"))
        return distinct, rows, position


class PackedEmbedding(_RowLookup):
    """nn.Embedding."""

    max_norm: float | None
    norm_type: float

    def forward(self, input: Tensor) -> Tensor:
        if torch.compiler.is_compiling() and self.max_norm is None:
            cols = self._packed_views["weight"].matrix_shape[1]
            return operators.rows(self._blob("weight"), input, cols).to(self._decoded("weight").dtype)
        _, rows, position = self._lookup(input)
        return F.embedding(position, rows, max_norm=self.max_norm, norm_type=self.norm_type)


class PackedEmbeddingBag(_RowLookup):
    """nn.EmbeddingBag."""

    max_norm: float | None
    norm_type: float
    mode: str
    include_last_offset: bool
    padding_idx: int | None

    def forward(self, input: Tensor, offsets: Tensor | None = None, per_sample_weights: Tensor | None = None) -> Tensor:
        if input.numel() == 0:
            return super().forward(input, offsets, per_sample_weights)
        distinct, rows, position = self._lookup(input)
        padding = [] if self.padding_idx is None else (distinct == self.padding_idx).nonzero().flatten().tolist()
        return F.embedding_bag(
            position,
            rows,
            offsets,
            max_norm=self.max_norm,
            norm_type=self.norm_type,
            mode=self.mode,
            per_sample_weights=per_sample_weights,
            include_last_offset=self.include_last_offset,
            padding_idx=padding[0] if padding else None,
        )


class PackedRecurrent(PackedModule):
    """nn.LSTM, nn.GRU, nn.RNN: torch reads their weights from a list, which is filled while the forward runs."""

    _flat_weights_names: list[str]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        self._flat_weights = [getattr(self, name) for name in self._flat_weights_names]
        try:
            return super().forward(*args, **kwargs)
        finally:
            self._init_flat_weights()

    def _init_flat_weights(self) -> None:
        self._flat_weights = [None] * len(self._flat_weights_names)
        self._flat_weight_refs = [None] * len(self._flat_weights_names)

    def _update_flat_weights(self) -> None:
        """Nothing to do: the list is made anew for every forward."""


# ------------------------------------------------------------------------------------------------------- installation


def install(
    model: nn.Module,
    packed: Mapping[str, PackedWeight],
    memory: Memory = "fast",
    activation_bits: ActivationBits = 16,
) -> nn.Module:
    """Replace weights by packed ones, in place, and return the model.

    packed: name of a weight site, or of an already packed weight -> packed weight of its matrix shape. Tied weights
    follow under any of their names. Names given with one and the same object share one blob.
    Raises UnknownNameError for a name that is no weight, WeightError for a shape that does not fit; the model is then
    as it was.
    """
    blobs = {id(weight): weight.to_bytes() for weight in packed.values()}
    both = {name: (weight, blobs[id(weight)]) for name, weight in packed.items()}
    return install_blobs(model, both, memory, activation_bits)


def install_blobs(
    model: nn.Module,
    packed: Mapping[str, tuple[PackedWeight, bytes]],
    memory: Memory = "fast",
    activation_bits: ActivationBits = 16,
) -> nn.Module:
    """`install` for packed weights whose bytes are at hand."""
    check_memory(memory, activation_bits)
    places = {name: place for place in _places(model) for name in place.names}
    for name, (weight, _) in packed.items():
        if name not in places:
            raise UnknownNameError("weight", name, places)
        wanted = places[name].view.matrix_shape
        if tuple(weight.shape) != wanted:
            raise WeightError(f"{name}: the packed weight is {list(weight.shape)}, the layer needs {list(wanted)}")
    blobs: dict[int, Tensor] = {}
    for name, (weight, data) in packed.items():
        if id(weight) not in blobs:
            blobs[id(weight)] = torch.frombuffer(bytearray(data), dtype=torch.uint8)
        place = places[name]
        for module, attribute in place.holders:
            twin = _make_packed(module, attribute, place.view)
            twin._packed_memory, twin._packed_activation_bits = memory, activation_bits
            twin._set_packed(attribute, weight, blobs[id(weight)], place.view, place.like)
    return model


def set_memory(model: nn.Module, memory: Memory, activation_bits: ActivationBits = 16) -> None:
    """Change what packed layers keep in memory; see the module docstring.

    Raises ValueError for a memory other than "fast" and "low" and activation bits other than 8, 16 and 32.
    """
    check_memory(memory, activation_bits)
    for module in model.modules():
        if isinstance(module, PackedModule):
            module._packed_memory = memory
            module._packed_activation_bits = activation_bits
            module._forget_decoded()
            module._packed_parsed.clear()


def check_memory(memory: Memory, activation_bits: ActivationBits) -> None:
    """Raise ValueError unless these are ways in which packed layers can run."""
    if memory not in ("fast", "low"):
        raise ValueError(f"memory must be 'fast' or 'low', not {memory!r}")
    if activation_bits not in (8, 16, 32):
        raise ValueError(f"activation_bits must be 8, 16 or 32, not {activation_bits!r}")


def arrange(model: nn.Module) -> nn.Module:
    """Have the packed layers that multiply make ready now, rather than when they first run; returns the model."""
    for module in model.modules():
        if not isinstance(module, PackedLinear) or module._packed_memory != "low":
            continue
        if module._packed_activation_bits != 32:
            module.running_weight()
    return model


def free_decoded(model: nn.Module) -> None:
    """Have packed layers hold no more than their blobs, until they run again."""
    for module in model.modules():
        if isinstance(module, PackedModule):
            module._forget_decoded()
            module._packed_parsed.clear()


def packed_blobs(model: nn.Module) -> dict[tuple[str, ...], bytes]:
    """The blobs of a packed model, in the order of its modules: all names of the weight (first its own) -> bytes."""
    return {
        tuple(place.names): _blob_bytes(cast(PackedModule, module)._blob(attribute))
        for place in _places(model)
        for module, attribute in place.holders[:1]
        if place.packed
    }


def packed_weights(model: nn.Module) -> dict[str, PackedWeight]:
    """The packed weights of a model by name, tied ones once."""
    return {names[0]: from_bytes(blob) for names, blob in packed_blobs(model).items()}


@dataclass
class _Place:
    """A weight, packed or not: all its names, the layers that hold it, and a tensor of the dtype and device it has."""

    names: list[str]
    holders: list[tuple[nn.Module, str]]
    view: MatrixView
    like: Tensor
    packed: bool


def _places(model: nn.Module) -> list[_Place]:
    """Weight sites and packed weights, tied ones once, in the order of the modules."""
    by_tensor: dict[int, _Place] = {}
    sites = {name: site for site in weight_sites(model) for name in (site.name, *site.aliases)}
    for module_name, module in model.named_modules(remove_duplicate=False):
        views = module._packed_views if isinstance(module, PackedModule) else {}
        for attribute in [*module._parameters, *views]:
            name = f"{module_name}.{attribute}" if module_name else attribute
            if attribute in views:
                packed = cast(PackedModule, module)
                tensor, view, like = packed._blob(attribute), views[attribute], packed._decoded(attribute)
            elif name in sites:
                tensor, view, like = sites[name].parameter, sites[name].view, sites[name].parameter
            else:
                continue
            place = by_tensor.setdefault(id(tensor), _Place([], [], view, like, attribute in views))
            place.names.append(name)
            place.holders.append((module, attribute))
    return list(by_tensor.values())


def _make_packed(module: nn.Module, attribute: str, view: MatrixView) -> PackedModule:
    """Change the class of a module to the packed twin that has this attribute packed, too."""
    if isinstance(module, PackedModule):
        original, views, parsed = module._packed_original, module._packed_views, module._packed_parsed
    else:
        original, views, parsed = type(module), {}, {}
    vars(module).update(_packed_views=views, _packed_parsed=parsed)
    module.__class__ = _twin(original, tuple(sorted({*views, attribute})), view.order == "rows first")
    twin = cast(PackedModule, module)
    if isinstance(twin, PackedRecurrent):
        twin._init_flat_weights()
    return twin


@functools.cache
def _twin(original: type[nn.Module], attributes: tuple[str, ...], row_first: bool) -> type[PackedModule]:
    """The class `Packed<Original>` with a property for each packed attribute."""
    base = PackedModule
    if row_first:  # a subclass with a forward of its own keeps that forward
        for kind, twin in _TWINS.items():
            if issubclass(original, kind) and original.forward is kind.forward:
                base = twin
    members: dict[str, Any] = {attribute: property(_reader(attribute)) for attribute in attributes}
    members |= {"_packed_original": original, "_packed_rows_first": row_first, "__module__": original.__module__}
    return cast(type[PackedModule], type(f"Packed{original.__name__}", (base, original), members))


_TWINS: dict[type[nn.Module], type[PackedModule]] = {
    nn.Linear: PackedLinear,
    nn.Embedding: PackedEmbedding,
    nn.EmbeddingBag: PackedEmbeddingBag,
    nn.RNN: PackedRecurrent,
    nn.LSTM: PackedRecurrent,
    nn.GRU: PackedRecurrent,
}


def _reader(attribute: str) -> Callable[[PackedModule], Tensor]:
    return lambda module: module.decoded_weight(attribute)


def _blank_module(original: type[nn.Module], attributes: tuple[str, ...], row_first: bool) -> nn.Module:
    twin = _twin(original, attributes, row_first)
    return twin.__new__(twin)


def _decoded_name(attribute: str) -> str:
    return f"{attribute}_decoded"


def _blob_bytes(blob: Tensor) -> bytes:
    return blob.cpu().numpy().tobytes()
