"""What all packed twins share: a weight kept as a blob, decoded when it is read; see packed.py.

A twin is a class made at run time, `Packed<Original>`, of the class a module had and of a base that knows how to run
it: `PackedModule`, or one that `@twin_of` names for the originals it serves.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Literal, TypeVar, cast

import torch
from torch import Tensor, nn

from ..errors import ArtifactError
from ..formats import PackedWeight, from_bytes, operators
from ..kernels.integer import ActivationBits
from .sites import MatrixView

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
    _packed_looks_up: ClassVar[bool] = False  # whether rows are looked up: the stored form is needed all the time

    def packed_weight(self, attribute: str) -> PackedWeight:
        """The stored form of one weight. Raises ArtifactError if the blob does not fit this layer."""
        if attribute not in self._packed_parsed:
            with torch.inference_mode(False):
                packed = from_bytes(blob_bytes(self._blob(attribute)))
            wanted = self._packed_views[attribute].matrix_shape
            if tuple(packed.shape) != wanted:
                raise ArtifactError(
                    f"{attribute} of a {self._packed_original.__name__} needs a packed matrix {list(wanted)}, but the "
                    f"blob holds {list(packed.shape)}; load the state dict into the model it came from"
                )
            self._packed_parsed[attribute] = packed
        return self._packed_parsed[attribute]

    def running_weight(self, attribute: str = "weight") -> PackedWeight:
        """A weight as it multiplies; it replaces the stored form, which the blob can always give again."""
        packed = self._packed_parsed.get(attribute)
        if packed is None or not packed.runs:
            packed = self._for_running(self.packed_weight(attribute))
            self._packed_parsed[attribute] = packed
        return packed

    @property
    def _multiplies(self) -> bool:
        """Whether weights are wanted as they multiply: with low memory, and inputs that may be quantised."""
        return self._packed_memory == "low" and self._packed_activation_bits != 32 and not self._packed_looks_up

    def arrange(self) -> None:
        """Make ready what multiplies, rather than at the first forward."""
        if self._multiplies:
            for attribute in self._packed_views:
                self.running_weight(attribute)

    def _for_running(self, packed: PackedWeight) -> PackedWeight:
        return packed.for_running(self._packed_activation_bits)

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
            packed = self.running_weight(attribute) if self._multiplies else self.packed_weight(attribute)
            weight = self._packed_views[attribute].from_matrix(packed.decode()).to(kept)
        if self._packed_memory == "fast" or self._packed_running:
            self._buffers[_decoded_name(attribute)] = weight
        if self._packed_memory == "fast" and not self._packed_looks_up:
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


_TWINS: dict[type[nn.Module], type[PackedModule]] = {}
T = TypeVar("T", bound=type[PackedModule])


def twin_of(*originals: type[nn.Module]) -> Callable[[T], T]:
    """Class decorator: the base of the packed twins of these classes, and of subclasses that keep their forward."""

    def enter(cls: T) -> T:
        _TWINS.update(dict.fromkeys(originals, cls))
        return cls

    return enter


@functools.cache
def packed_class(original: type[nn.Module], attributes: tuple[str, ...], row_first: bool) -> type[PackedModule]:
    """The class `Packed<Original>` with a property for each packed attribute."""
    base = PackedModule
    if row_first:  # a subclass with a forward of its own keeps that forward
        for kind, twin in _TWINS.items():
            if issubclass(original, kind) and original.forward is kind.forward:
                base = twin
    members: dict[str, Any] = {attribute: property(_reader(attribute)) for attribute in attributes}
    members |= {"_packed_original": original, "_packed_rows_first": row_first, "__module__": original.__module__}
    return cast(type[PackedModule], type(f"Packed{original.__name__}", (base, original), members))


def _reader(attribute: str) -> Callable[[PackedModule], Tensor]:
    return lambda module: module.decoded_weight(attribute)


def _blank_module(original: type[nn.Module], attributes: tuple[str, ...], row_first: bool) -> nn.Module:
    twin = packed_class(original, attributes, row_first)
    return twin.__new__(twin)


def _decoded_name(attribute: str) -> str:
    return f"{attribute}_decoded"


def blob_bytes(blob: Tensor) -> bytes:
    return blob.cpu().numpy().tobytes()
