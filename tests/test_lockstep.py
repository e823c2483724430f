"""Lockstep: one forward a batch, halting before each layer, gives what running layer by layer gives."""

import pytest
import torch
from torch import nn

from pennyweight.compress.data import Call
from pennyweight.compress.lockstep import lockstep


def _chain():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, 2))


def _batches(n=3):
    return [Call((torch.randn(5, 3),)) for _ in range(n)]


def test_halts_once_a_layer_with_the_layers_true_inputs():
    model, batches = _chain(), _batches()
    halts, results = [], []
    for halt in lockstep(model, batches, ["0", "2", "4"], results=results):
        halts.append((halt.module, [i[0].clone() for i in halt.inputs]))
    assert [name for name, _ in halts] == ["0", "2", "4"]
    for i, call in enumerate(batches):
        x = call.args[0]
        assert torch.equal(halts[1][1][i], model[:2](x))
        assert torch.equal(halts[2][1][i], model[:4](x))
        assert torch.equal(results[i], model(x))


def test_a_layer_changed_at_its_halt_is_used_by_the_same_forward():
    model, batches, results = _chain(), _batches(), []
    for halt in lockstep(model, batches, ["0", "2"], results=results):
        with torch.no_grad():
            model.get_submodule(halt.module).weight.mul_(2.0)
    assert all(torch.equal(r, model(c.args[0])) for r, c in zip(results, batches))


def test_batches_go_on_with_what_is_written_into_the_outputs_of_a_norm():
    model, batches, results = _chain(), _batches(), []
    for halt in lockstep(model, batches, [], ["3"], results=results):
        for output in halt.outputs:
            output.fill_(1.0)
    expected = model[4](torch.ones(5, 4))
    assert all(torch.equal(r, expected) for r in results)


def test_giving_up_half_way_leaves_no_hook_and_no_forward():
    ended = []

    class Chain(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = _chain()

        def forward(self, x):
            try:
                return self.inner(x)
            finally:
                ended.append(True)

    model = Chain()
    run = lockstep(model, _batches(), ["inner.0", "inner.2"])
    next(run)
    assert not ended
    run.close()
    assert len(ended) == 3
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in model.modules())


def test_an_error_in_a_forward_is_raised_here():
    model = _chain()
    with pytest.raises(RuntimeError):
        list(lockstep(model, [Call((torch.randn(5, 7),))], ["0"]))


def test_batches_that_take_other_paths_halt_apart():
    class Fork(nn.Module):
        def __init__(self):
            super().__init__()
            self.left, self.right = nn.Linear(2, 2), nn.Linear(2, 2)

        def forward(self, x):
            return self.left(x) if float(x.sum()) > 0 else self.right(x)

    batches = [Call((torch.ones(1, 2),)), Call((-torch.ones(1, 2),)), Call((torch.ones(1, 2),))]
    halts = [(h.module, h.batches) for h in lockstep(Fork(), batches, ["left", "right"])]
    assert sorted(halts) == [("left", [0, 2]), ("right", [1])]
