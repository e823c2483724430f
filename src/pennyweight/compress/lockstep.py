"""Run all calibration batches through a model side by side, halting at each layer.

Sequential calibration needs, for each layer in turn, its inputs as produced by the layers already compressed.
Running the whole model again for each layer costs the square of the depth. Here every batch's forward runs once, in a
greenlet of its own that is parked whenever it is about to enter one of the layers asked for; when all batches are
parked, the layer can be changed, and then they go on. Any `nn.Module` will do: nothing needs to be known of its
blocks. (Threads would do the same, but the matrix library keeps buffers for each.) Memory: one batch's live
activations a greenlet.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from greenlet import GreenletExit, getcurrent, greenlet
from torch import nn

from ..layers.packed_attention import in_parts
from .data import Call


@dataclass
class Halt:
    """All parked batches about to enter (or, for norms, having left) one module.

    module: its name. batches: indices of the batches parked here. inputs: the positional arguments of each.
    outputs: what it returned, for modules halted on leaving (None otherwise); the batches go on with what has been
    written into them. Inputs and outputs are given up when the run goes on.
    """

    module: str
    batches: list[int]
    inputs: list[tuple[Any, ...]]
    outputs: list[Any] | None = None


@dataclass
class _Batch:
    """One batch's forward. where: the module it is parked at; left: on leaving, with `output`, not on entering."""

    index: int
    forward: greenlet
    where: str = ""
    inputs: tuple[Any, ...] = ()
    output: Any = None
    left: bool = False
    result: Any = None


def lockstep(
    model: nn.Module,
    batches: Sequence[Call],
    before: Sequence[str],
    after: Sequence[str] = (),
    results: list[Any] | None = None,
) -> Iterator[Halt]:
    """Yield a `Halt` each time the batches are about to enter a module named in `before` or have left one in `after`.

    Runs without gradients, in the modes the model is in. What each batch's forward returned is put into `results`.
    An exception inside a forward is raised here. Batches that take different paths halt in separate groups.
    """
    running: list[_Batch] = []

    def park(name: str, inputs: tuple[Any, ...], output: Any = None, left: bool = False) -> None:
        forward = getcurrent()
        batch = next((b for b in running if b.forward is forward), None)
        if batch is None:  # a forward outside this run
            return
        batch.where, batch.inputs, batch.output, batch.left = name, inputs, output, left
        assert forward.parent is not None
        forward.parent.switch()

    def advance(group: Sequence[_Batch]) -> None:
        for batch in group:
            batch.forward.parent = getcurrent()
            with torch.no_grad():
                result = batch.forward.switch()
            if batch.forward.dead and results is not None:
                batch.result = result

    modules = dict(model.named_modules())
    handles = [
        modules[name].register_forward_pre_hook(
            lambda _m, args, kwargs, name=name: park(name, args or tuple(kwargs.values())), with_kwargs=True
        )
        for name in before
    ]
    handles += [
        modules[name].register_forward_hook(lambda _m, args, out, name=name: park(name, args, out, left=True))
        for name in after
    ]
    for index, call in enumerate(batches):
        running.append(_Batch(index, greenlet(lambda call=call: call(model))))
    attention = contextlib.ExitStack()
    attention.enter_context(in_parts(model))
    try:
        advance(running)
        while waiting := [b for b in running if not b.forward.dead]:
            at: dict[tuple[str, bool], list[_Batch]] = {}
            for batch in waiting:
                at.setdefault((batch.where, batch.left), []).append(batch)
            (name, left), group = max(at.items(), key=lambda item: len(item[1]))
            halt = Halt(
                name,
                [b.index for b in group],
                [b.inputs for b in group],
                [b.output for b in group] if left else None,
            )
            yield halt
            for batch in group:
                batch.inputs, batch.output = (), None
            halt.inputs, halt.outputs = [], None  # whoever still holds the halt would keep them from being freed
            advance(group)
        if results is not None:
            results.extend(b.result for b in running)
    finally:
        for handle in handles:
            handle.remove()
        for batch in running:
            batch.forward.throw(GreenletExit)
        attention.close()
