"""What tests of optimizers share: a short training, and three things that hold for every optimizer."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from pennyweight.training.checkpoint import join_optimizer, split_optimizer

Make = Callable[[nn.Module], Optimizer]


def train(model: nn.Module, optimizer: Optimizer, steps: int, start: int = 0) -> None:
    """Of a classifier of 6 numbers into 3 classes, on other data at every step."""
    dtype = next(model.parameters()).dtype
    for step in range(start, start + steps):
        x = torch.randn(8, 6, generator=torch.Generator().manual_seed(step)).to(dtype)
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), x[:, :3].argmax(1)).backward()
        optimizer.step()


def same(left: nn.Module, right: nn.Module) -> bool:
    return all(torch.equal(a, b) for a, b in zip(left.parameters(), right.parameters()))


def closure_is_the_step(network: Callable[[], nn.Module], make: Make) -> tuple[nn.Module, Optimizer]:
    """Three steps with a closure are three steps without one. The network and the optimizer that had closures."""
    left, right = network(), network()
    one, other = make(left), make(right)
    x = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))

    def closure() -> Any:
        one.zero_grad()
        loss = left(x).square().mean()
        loss.backward()
        return loss

    for _ in range(3):
        assert one.step(closure) is not None
        other.zero_grad()
        right(x).square().mean().backward()
        other.step()
    assert same(left, right)
    return left, one


def compiled_is_eager(network: Callable[[], nn.Module], make: Make) -> None:
    """A compiled step does what the step does, across three steps."""
    left, right = network(), network()
    one, other = make(left), make(right)
    step = torch.compile(one.step, backend="eager")
    for _ in range(3):
        for model in (left, right):
            model.zero_grad()
            model(torch.ones(2, 6)).square().mean().backward()
        step()
        other.step()
    for a, b in zip(left.parameters(), right.parameters()):
        assert torch.allclose(a, b, rtol=1e-5, atol=1e-7)


def resume_is_exact(network: Callable[[], nn.Module], make: Make, cut: int) -> None:
    """Ten steps are the same ten when the state goes through a checkpoint after `cut` of them."""
    whole = network()
    train(whole, make(whole), 10)
    first = network()
    optimizer = make(first)
    train(first, optimizer, cut)
    tensors, rest = split_optimizer(optimizer)
    second = network()
    second.load_state_dict(first.state_dict())
    resumed = make(second)
    join_optimizer(resumed, {k: v.clone() for k, v in tensors.items()}, json.loads(json.dumps(rest)))
    train(second, resumed, 10 - cut, start=cut)
    assert same(whole, second)
