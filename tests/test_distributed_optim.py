"""Two processes train what one does: p-norm decay, LAWN, averaged teachers; DDP, and norms across FSDP2's shards."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

SCRIPT = """
import sys
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.optim import SGD, Adam

from pennyweight.layers.eman import EMATeacher
from pennyweight.optim import LAWN, PSGD, PAdamW, PNormDecay, final_homogeneous
from pennyweight.training.hooks import attach

def network():
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(6, 15), nn.Tanh(), nn.Linear(15, 15), nn.ReLU(), nn.Linear(15, 3, bias=False))

def batch(step):
    x = torch.randn(8, 6, generator=torch.Generator().manual_seed(step))
    return x, x[:, :3].argmax(1)

def train(model, optimizer, part=slice(None), after=lambda: None):
    for step in range(4):
        x, y = batch(step)
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x[part]), y[part]).backward()
        optimizer.step()
        after()

def close(ours, theirs, what):
    assert torch.allclose(ours, theirs, rtol=1e-4, atol=1e-5), (what, float((ours - theirs).abs().max()))

def equal_on_both(tensor, what):
    both = [torch.empty_like(tensor) for _ in range(2)]
    dist.all_gather(both, tensor.detach().contiguous())
    assert torch.equal(*both), what

MAKE = {
    "lawn": lambda m: LAWN(Adam(m.parameters(), lr=0.1), m, ["4.weight", "2.weight"], free_steps=1),
    "pwd": lambda m: PNormDecay(Adam(m.parameters(), lr=0.05), 0.05, 0.8),
    "padamw": lambda m: PAdamW(m.parameters(), lr=0.05, weight_decay=0.05, p=0.8),
    "psgd": lambda m: PSGD(m.parameters(), lr=0.05, momentum=0.9, weight_decay=0.05, p=0.8),
}
dist.init_process_group("gloo")
rank = dist.get_rank()
mine = slice(4 * rank, 4 * rank + 4)  # of the batch
mesh = init_device_mesh("cpu", (2,))
for name, make in MAKE.items():
    whole = network()
    train(whole, make(whole))

    replica = network()
    train(DistributedDataParallel(replica), make(replica), mine)
    for (key, a), b in zip(whole.named_parameters(), replica.parameters()):
        close(b, a, (name, "ddp", key))
        equal_on_both(b, (name, "ddp", key))

    sharded = network()
    assert final_homogeneous(sharded, torch.ones(1, 6)) == ["4.weight", "2.weight"]
    for layer in sharded:
        if isinstance(layer, nn.Linear):
            fully_shard(layer, mesh=mesh)
    fully_shard(sharded, mesh=mesh)
    train(sharded, make(sharded), mine)
    for (key, a), b in zip(whole.named_parameters(), sharded.parameters()):
        close(b.full_tensor(), a, (name, "fsdp2", key))

# The teacher of a replica is that of the whole, without exchange of its own.
teachers = []
for model, part in ((network(), slice(None)), (network(), mine)):
    optimizer = SGD(model.parameters(), lr=0.1)
    teachers.append(EMATeacher(model, 0.7))
    attach(optimizer, [teachers[-1]])
    train(model if part == slice(None) else DistributedDataParallel(model), optimizer, part)
for (key, a), b in zip(teachers[0].named_parameters(), teachers[1].parameters()):
    close(b, a, ("teacher", key))
    equal_on_both(b, ("teacher", key))

# EMAN: of batch norm each replica averages the statistics it has seen; parameters are equal everywhere.
torch.manual_seed(0)
student = nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Linear(5, 3))
teacher, expected = EMATeacher(student, 0.7), [torch.zeros(5)]
optimizer = SGD(student.parameters(), lr=0.1)
attach(optimizer, [teacher])
follow = lambda: expected.append(0.7 * expected[-1] + 0.3 * student[1].running_mean)
train(DistributedDataParallel(student), optimizer, mine, follow)
close(teacher.model[1].running_mean, expected[-1], "statistics")
assert int(teacher.updates) == 4
for key, b in teacher.named_parameters():
    equal_on_both(b, ("eman", key))
dist.destroy_process_group()
"""


def test_two_processes_train_what_one_does(tmp_path: Path):
    script = tmp_path / "two.py"
    script.write_text(SCRIPT)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = os.environ | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2"}
    runs = [
        subprocess.Popen(
            [sys.executable, str(script)], env=environment | {"RANK": str(rank)}, stderr=subprocess.PIPE, text=True
        )
        for rank in range(2)
    ]
    errors = [run.communicate(timeout=240)[1] for run in runs]
    assert [run.returncode for run in runs] == [0, 0], errors
