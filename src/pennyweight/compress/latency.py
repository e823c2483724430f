"""Latency as a budget: what a model takes, as the sum of what its layers take in the forms chosen, and the rest.

    time = rest + sum over layers of the measured time of what the layer's candidate runs as

rest is what the original's forward spends outside its layers; forms and their interpolation: layers/forms.py.
The model is run on one batch, and what is predicted is the time of that batch with memory="low".
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from torch import nn

from ..errors import DataError, warn
from ..layers.forms import Form, division, interpolate
from ..timing_cache import TimingCache
from .budget import parse_latency, time_text
from .contract import Candidate
from .data import Call, resized
from .layer_times import find_layers, layer_times, packed_twin, time_calls, whole_and_rest

#: A promise missed by more than this share is told: clocks are not that steady.
TOLERANCE = 0.1


class Promise(NamedTuple):
    """A latency asked for and the time measured in the end, both in seconds."""

    asked: float
    measured: float


@dataclass
class Times:
    """Times of a model's layers, in microseconds, and the latency they are to keep.

    latency: seconds, of the whole model. rest: of what is no layer. original: of the whole model as it was. forms:
    name of a weight -> what it takes in each form, over the whole forward. batch: samples timed, None for a batch of
    the data.
    """

    latency: float
    rest: float
    original: float
    forms: dict[str, dict[Form, float]] = field(default_factory=dict)
    batch: int | None = None

    @property
    def limit(self) -> float:
        """What all layers may take together; below zero if the rest alone is too slow."""
        return 1e6 * self.latency - self.rest

    def predict(self, name: str, form: Form | None) -> float:
        """What a weight takes in a form; nothing if the forward does not reach it."""
        times = self.forms.get(name)
        return 0.0 if times is None else interpolate(times, form or Form("decoded"))

    def of(self, candidates: Mapping[str, Sequence[Candidate]]) -> list[np.ndarray]:
        """float64 [candidates] a layer."""
        return [np.array([self.predict(name, o.form) for o in offers]) for name, offers in candidates.items()]

    def division(self, name: str) -> float:
        """What dividing the weight's rows between two candidates adds."""
        return division(self.forms.get(name, {}))


def timed_call(batches: Sequence[Call], latency_batch: int | None) -> Call:
    """The call whose time counts: the first batch of the data, cut or repeated to `latency_batch` samples."""
    if not batches:
        raise DataError("a latency needs data: layers are timed on the inputs they get; give at least one batch")
    if latency_batch is not None and latency_batch < 1:
        raise DataError(f"latency_batch is {latency_batch}; give the samples of a batch, 1 or more")
    return batches[0] if latency_batch is None else resized(batches[0], latency_batch)


def measure(
    model: nn.Module,
    batches: Sequence[Call],
    latency: float | str,
    latency_batch: int | None = None,
    progress: Callable[[str, int, int], None] = lambda what, done, total: None,
) -> Times:
    """Time a model and its layers on this machine, in every form. Times of layers measured before are taken from the
    cache (`TimingCache`). Raises BudgetError on a latency that makes no sense, DataError without data."""
    wanted, call = parse_latency(latency), timed_call(batches, latency_batch)
    layers, cache = find_layers(model, call), TimingCache()
    original, rest = whole_and_rest(model, layers, call, cache)
    times = Times(wanted, rest, original, batch=latency_batch)
    for layer, count, taken in layer_times(layers, cache, progress):
        for name, share in layer.shares.items():
            known = times.forms.setdefault(name, dict.fromkeys(taken, 0.0))
            # A weight tied across layers has times in the forms that all of them have.
            times.forms[name] = {f: known[f] + count * share * t for f, t in taken.items() if f in known}
    return times


def keep_promise(small: nn.Module, batches: Sequence[Call], latency: float, latency_batch: int | None) -> Promise:
    """Measure the packed model as it runs from what is packed; warns if it is slower by more than `TOLERANCE`."""
    (taken,) = time_calls([packed_twin(small)], timed_call(batches, latency_batch))
    promise = Promise(latency, taken / 1e6)
    if promise.measured > (1 + TOLERANCE) * latency:
        warn(
            f"the model takes {time_text(promise.measured)} where {time_text(latency)} were asked for; the machine may "
            "have been busy: time it again, or ask for less"
        )
    return promise
