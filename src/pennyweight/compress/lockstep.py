"""Run all calibration batches through a model side by side, halting at each layer.

Sequential calibration needs, for each layer in turn, its inputs as produced by the layers already compressed.
Running the whole model again for each layer costs the square of the depth. Here every batch's forward runs once, in a
thread of its own that is parked whenever it is about to enter one of the layers asked for; when all batches are
parked, the layer can be changed, and then they go on. Any `nn.Module` will do: nothing needs to be known of its
blocks. Only one thread runs at a time. Memory: one batch's live activations a thread.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from .data import Call


@dataclass
class Halt:
    """All parked batches about to enter (or, for norms, having left) one module.

    module: its name. batches: indices of the batches parked here. inputs: the positional arguments of each.
    outputs: what it returned, for modules halted on leaving (None otherwise); an entry may be replaced, the batch then
    goes on with the replacement.
    """

    module: str
    batches: list[int]
    inputs: list[tuple[Any, ...]]
    outputs: list[Any] | None = None


class _Stopped(Exception):
    """Unwinds a parked forward when the run is given up."""


@dataclass
class _Batch:
    index: int
    call: Call
    go: threading.Semaphore = field(default_factory=lambda: threading.Semaphore(0))
    parked: threading.Semaphore = field(default_factory=lambda: threading.Semaphore(0))
    where: str | None = None
    inputs: tuple[Any, ...] = ()
    output: Any = None
    left: bool = False
    done: bool = False
    result: Any = None
    error: BaseException | None = None


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
    current = threading.local()
    stopping = False

    def park(name: str, inputs: tuple[Any, ...], output: Any = None, left: bool = False) -> Any:
        batch: _Batch | None = getattr(current, "batch", None)
        if batch is None:  # a forward outside this run
            return output
        batch.where, batch.inputs, batch.output, batch.left = name, inputs, output, left
        batch.parked.release()
        batch.go.acquire()
        if stopping:
            raise _Stopped
        return batch.output

    def body(batch: _Batch) -> None:
        current.batch = batch
        batch.go.acquire()
        try:
            if not stopping:
                with torch.no_grad():
                    batch.result = batch.call(model)
        except _Stopped:
            pass
        except BaseException as error:
            batch.error = error
        batch.where, batch.inputs, batch.output, batch.done = None, (), None, True
        batch.parked.release()

    modules = dict(model.named_modules())
    handles = [
        modules[name].register_forward_pre_hook(
            lambda _m, args, kwargs, name=name: (park(name, args or tuple(kwargs.values())), None)[1], with_kwargs=True
        )
        for name in before
    ]
    handles += [
        modules[name].register_forward_hook(lambda _m, args, out, name=name: park(name, args, out, left=True))
        for name in after
    ]
    running = [_Batch(i, call) for i, call in enumerate(batches)]
    threads = [threading.Thread(target=body, args=(batch,), daemon=True) for batch in running]
    for thread in threads:
        thread.start()

    def advance(group: Sequence[_Batch]) -> None:
        for batch in group:
            batch.go.release()
            batch.parked.acquire()
            if batch.error is not None:
                raise batch.error

    try:
        advance(running)
        while waiting := [b for b in running if not b.done]:
            at: dict[tuple[str | None, bool], list[_Batch]] = {}
            for batch in waiting:
                at.setdefault((batch.where, batch.left), []).append(batch)
            (name, left), group = max(at.items(), key=lambda item: len(item[1]))
            halt = Halt(
                name or "",
                [b.index for b in group],
                [b.inputs for b in group],
                [b.output for b in group] if left else None,
            )
            yield halt
            for i, batch in enumerate(group):
                batch.output = halt.outputs[i] if halt.outputs is not None else None
                batch.inputs = ()
            del halt
            advance(group)
        if results is not None:
            results.extend(b.result for b in running)
    finally:
        stopping = True
        for handle in handles:
            handle.remove()
        for batch, thread in zip(running, threads):
            if not batch.done:
                batch.go.release()
            thread.join()
