"""Calibration data: whatever a user's loader yields, as calls of the model's forward; and the output as one tensor."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import DataError

Output = Callable[[Any, "Call"], Tensor]

#: Fields of model outputs that hold the result proper, in order of preference.
_RESULT_FIELDS = ("logits", "sentence_embedding", "last_hidden_state", "pooler_output")


@dataclass(frozen=True)
class Call:
    """One batch as the arguments of `model(*args, **kwargs)`."""

    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] = field(default_factory=dict)

    def __call__(self, model: nn.Module) -> Any:
        return model(*self.args, **self.kwargs)

    def tensors(self) -> list[Tensor]:
        return [v for v in (*self.args, *self.kwargs.values()) if isinstance(v, Tensor)]

    @property
    def size(self) -> int:
        """Samples in the batch: the first dimension of the first tensor."""
        return next((t.shape[0] for t in self.tensors() if t.ndim), 1)


def calls(model: nn.Module, data: Any) -> list[Call]:
    """Batches as calls of `model`.

    data: a tensor (one batch), a mapping (one batch), or an iterable of tensors, mappings (passed as keyword
    arguments) or tuples (passed as positional arguments; those the forward has no required place for, such as labels,
    are left out). Raises `DataError` if there is no batch, a value is NaN or infinite, or a batch is of another kind.
    """
    if isinstance(data, Tensor | Call) or _is_mapping(data):
        data = [data]
    if not isinstance(data, Iterable):
        raise DataError(
            f"calibration data is a {type(data).__name__}; give a tensor, a dict, or an iterable of batches"
        )
    found = [_call(model, batch, i) for i, batch in enumerate(data)]
    found = [call for call in found if all(t.numel() for t in call.tensors())]
    if not found:
        raise DataError("calibration data is empty; give at least one batch, or data=None for data-free methods")
    for i, call in enumerate(found):
        for tensor in call.tensors():
            if tensor.is_floating_point() and not tensor.is_meta and not bool(torch.isfinite(tensor).all()):
                raise DataError(f"calibration batch {i} holds NaN or infinite values; clean the data")
    return found


def resized(call: Call, samples: int) -> Call:
    """The call with so many samples: the first ones, or all of them over and over."""

    def cut(value: Any) -> Any:
        if not isinstance(value, Tensor) or value.ndim == 0 or value.shape[0] != call.size:
            return value
        return value[torch.arange(samples) % call.size]

    return Call(tuple(map(cut, call.args)), {key: cut(value) for key, value in call.kwargs.items()})


def _is_mapping(value: Any) -> bool:
    return hasattr(value, "keys") and hasattr(value, "__getitem__")  # transformers' BatchEncoding is a UserDict


def _call(model: nn.Module, batch: Any, index: int) -> Call:
    if isinstance(batch, Call):
        return batch
    if isinstance(batch, Tensor):
        return Call((batch,))
    if _is_mapping(batch):
        accepted = _accepted_keywords(model)
        items = {str(k): batch[k] for k in batch.keys()}  # noqa: SIM118  (a UserDict need not iterate over keys)
        kept = {k: v for k, v in items.items() if accepted is None or k in accepted}
        if not kept:
            raise DataError(
                f"calibration batch {index} has the keys {sorted(items)}, none of which {type(model).__name__}.forward "
                f"takes; it takes {sorted(accepted or ())}"
            )
        return Call((), kept)
    if isinstance(batch, Sequence) and not isinstance(batch, str | bytes):
        return Call(tuple(batch[: _positional_limit(model)]))
    raise DataError(
        f"calibration batch {index} is a {type(batch).__name__}; give a tensor, a tuple or a dict"
        + (" (tokenise text first)" if isinstance(batch, str) else "")
    )


def _accepted_keywords(model: nn.Module) -> set[str] | None:
    parameters = inspect.signature(model.forward).parameters.values()
    if any(p.kind is p.VAR_KEYWORD for p in parameters):
        return None
    return {p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}


def _positional_limit(model: nn.Module) -> int | None:
    """How many leading items of a tuple batch the forward needs: its required positional parameters (None: all)."""
    parameters = inspect.signature(model.forward).parameters.values()
    if any(p.kind is p.VAR_POSITIONAL for p in parameters):
        return None
    positional = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    return max(1, sum(p.default is p.empty for p in positional))


def output_tensor(result: Any, call: Call | None = None) -> Tensor:
    """The tensor that matters in what a forward returned: itself, a well-known field, or the first tensor.

    Raises `DataError` when there is none; pass `output=` then.
    """
    del call
    if isinstance(result, Tensor):
        return result
    for name in _RESULT_FIELDS:
        value = result.get(name) if isinstance(result, Mapping) else getattr(result, name, None)
        if isinstance(value, Tensor):
            return value
    values = result.values() if isinstance(result, Mapping) else result if isinstance(result, Sequence) else ()
    for value in values:
        if isinstance(value, Tensor) and value.is_floating_point():
            return value
    raise DataError(f"the model returns a {type(result).__name__} without a tensor; pass output=function(result, call)")


def per_sample(output: Tensor, samples: int) -> Tensor:
    """The output as [samples, features]."""
    if output.ndim == 0 or output.shape[0] != samples:
        return output.reshape(1, -1)
    return output.reshape(samples, -1)
