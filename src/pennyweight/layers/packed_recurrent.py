"""Packed LSTM, GRU and RNN.

With low memory and inputs of 8 or 16 bits, the inputs of all time steps meet the codes in one product, and the state
meets them step by step; the gates are computed in float32. Where that does not serve, the weights are decoded when the
forward begins, and PyTorch's own forward runs:

    gradients, dropout in training, packed sequences, graphs of torch.compile, types other than float32
    weights that the kernels do not take, or that are not packed
    a small state, [gates * hidden, hidden] below 2^18 weights (LSTM of 256), or below 2^19 and more than 64 steps: the
        calls a step needs then cost more than decoding once, measured with one thread
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..formats.running import RunningIntegers
from .packed_module import PackedModule, twin_of

_LEAST_WEIGHTS = 1 << 18  # of the state, to multiply at all
_MANY_WEIGHTS, _FEW_STEPS = 1 << 19, 64  # to multiply in sequences of any length; how long they may be otherwise

State = tuple[Tensor, ...]  # (h,), or (h, c) of an LSTM
Times = list[tuple[Tensor, Tensor]]
Product = Callable[[Tensor, Tensor], None]  # (out, state): writes what the state's codes multiply to


@twin_of(nn.RNN, nn.LSTM, nn.GRU)
class PackedRecurrent(PackedModule):
    """nn.LSTM, nn.GRU, nn.RNN: torch reads their weights from a list, which is filled while its forward runs."""

    _flat_weights_names: list[str]
    mode: str
    input_size: int
    hidden_size: int
    proj_size: int
    num_layers: int
    bias: bool
    batch_first: bool
    bidirectional: bool
    dropout: float

    def forward(self, input: Any, hx: Any = None) -> Any:
        if self._runs_on_codes(input, hx):
            return self._run(input, hx)
        self._flat_weights = [getattr(self, name) for name in self._flat_weights_names]
        try:
            return super().forward(input, hx)
        finally:
            self._init_flat_weights()

    def _init_flat_weights(self) -> None:
        self._flat_weights = [None] * len(self._flat_weights_names)
        self._flat_weight_refs = [None] * len(self._flat_weights_names)

    def _update_flat_weights(self) -> None:
        """Nothing to do: the list is made anew for every forward."""

    # ------------------------------------------------------------------------------------------ on codes

    @property
    def _state_sizes(self) -> list[int]:
        """Of h, and of c."""
        return [self.proj_size or self.hidden_size, self.hidden_size][: 2 if self.mode == "LSTM" else 1]

    def _runs_on_codes(self, x: Any, hx: Any) -> bool:
        if not self._multiplies or torch.compiler.is_compiling() or not isinstance(x, Tensor) or not x.numel():
            return False
        if self._packed_views.keys() != {name for name in self._flat_weights_names if name.startswith("weight")}:
            return False
        state = [] if hx is None else [hx] if isinstance(hx, Tensor) else list(hx)
        tensors = [x, *state, *self.parameters()]
        if any(t.dtype != torch.float32 or t.device.type != "cpu" for t in tensors):
            return False
        if torch.is_grad_enabled() and any(t.requires_grad for t in tensors):
            return False
        if (self.training and self.dropout) or not self._fits(x, state):  # torch says what does not fit
            return False
        weights = math.prod(self._packed_views["weight_hh_l0"].shape)
        steps = x.shape[1 if self.batch_first and x.ndim == 3 else 0]
        if weights < (_LEAST_WEIGHTS if steps <= _FEW_STEPS else _MANY_WEIGHTS):
            return False
        return all(isinstance(self.running_weight(name), RunningIntegers) for name in self._packed_views)

    def _fits(self, x: Tensor, state: list[Tensor]) -> bool:
        if x.ndim not in (2, 3) or x.shape[-1] != self.input_size:
            return False
        batch = [] if x.ndim == 2 else [x.shape[0 if self.batch_first else 1]]
        wanted = [[self.num_layers * (1 + self.bidirectional), *batch, size] for size in self._state_sizes]
        return not state or [list(s.shape) for s in state] == wanted

    def _run(self, x: Tensor, hx: Any) -> Any:
        """What torch's forward returns."""
        batched, turned = x.ndim == 3, x.ndim == 3 and self.batch_first
        x = x.transpose(0, 1) if turned else x if batched else x.unsqueeze(1)  # [time, batch, features]
        directions = 1 + self.bidirectional
        if hx is None:
            states = [x.new_zeros(self.num_layers * directions, x.shape[1], size) for size in self._state_sizes]
        else:
            states = [s if batched else s.unsqueeze(1) for s in ([hx] if isinstance(hx, Tensor) else hx)]
        ends: list[State] = []
        for layer in range(self.num_layers):
            found = []
            for direction in range(directions):
                start = tuple(s[layer * directions + direction].contiguous() for s in states)
                y, end = self._direction(x, start, layer, direction == 1)
                found.append(y)
                ends.append(end)
            x = found[0] if directions == 1 else torch.cat(found, -1)
        last = [torch.stack(parts) for parts in zip(*ends)]
        if not batched:
            x, last = x.squeeze(1), [part.squeeze(1) for part in last]
        return x.transpose(0, 1) if turned else x, tuple(last) if self.mode == "LSTM" else last[0]

    def _direction(self, x: Tensor, start: State, layer: int, reverse: bool) -> tuple[Tensor, State]:
        """One direction of one layer: x [time, batch, features] -> (h [time, batch, size], state at the end)."""
        end_of_name = f"_l{layer}{'_reverse' if reverse else ''}"
        of_input, of_state = (self._bias(kind + end_of_name) for kind in ("bias_ih", "bias_hh"))
        if of_input is not None and of_state is not None and self.mode != "GRU":
            of_input, of_state = of_input + of_state, None  # a GRU's reset gate acts on the state's bias
        inputs = self.running_weight(f"weight_ih{end_of_name}").linear(x, of_input)
        outputs = torch.empty(*x.shape[:2], self._state_sizes[0])
        times = list(zip(inputs.unbind(0), outputs.unbind(0)))
        if reverse:
            times.reverse()
        multiply = self._product(f"weight_hh{end_of_name}", of_state)
        if self.mode == "LSTM":
            project = self._product(f"weight_hr{end_of_name}", None) if self.proj_size else None
            return outputs, _lstm(times, multiply, project, *start)
        if self.mode == "GRU":
            return outputs, _gru(times, multiply, *start)
        return outputs, _rnn(times, multiply, torch.tanh if self.mode == "RNN_TANH" else torch.relu, *start)

    def _bias(self, name: str) -> Tensor | None:
        return getattr(self, name).detach() if self.bias else None

    def _product(self, name: str, bias: Tensor | None) -> Product:
        weight = self.running_weight(name)
        assert isinstance(weight, RunningIntegers)
        matrix, bits = weight.matrix, self._packed_activation_bits
        return lambda out, state: matrix.linear_into(out, state, bias, bits)


# Each runs over the times, (inputs to the gates [batch, gates * hidden], where the new h [batch, size] is written), and
# returns the state at the end. Memory is used over and over: at this size a step is mostly the cost of its calls.


def _lstm(times: Times, multiply: Product, project: Product | None, h: Tensor, c: Tensor) -> State:
    gates, c, out = torch.empty_like(times[0][0]), c.clone(), torch.empty_like(c)
    i, f, g, o = gates.chunk(4, 1)
    both = gates[:, : 2 * c.shape[1]]
    for inputs, new_h in times:
        multiply(gates, h)
        gates += inputs
        both.sigmoid_()
        c.mul_(f).addcmul_(i, g.tanh_())
        torch.tanh(c, out=out)
        if project is None:
            torch.mul(out, o.sigmoid_(), out=new_h)
        else:
            project(new_h, out.mul_(o.sigmoid_()))
        h = new_h
    return h, c


def _gru(times: Times, multiply: Product, h: Tensor) -> State:
    gates = torch.empty_like(times[0][0])
    reset_and_update, from_state = gates.split([2 * h.shape[1], h.shape[1]], 1)
    reset, update = reset_and_update.chunk(2, 1)
    for inputs, new_h in times:
        multiply(gates, h)
        reset_and_update += inputs[:, : 2 * h.shape[1]]
        reset_and_update.sigmoid_()
        new = torch.addcmul(inputs[:, 2 * h.shape[1] :], reset, from_state).tanh_()
        torch.lerp(new, h, update, out=new_h)
        h = new_h
    return (h,)


def _rnn(times: Times, multiply: Product, activation: Callable[..., Tensor], h: Tensor) -> State:
    product = torch.empty_like(times[0][0])
    for inputs, new_h in times:
        multiply(product, h)
        new_h.copy_(activation(product.add_(inputs)))
        h = new_h
    return (h,)
