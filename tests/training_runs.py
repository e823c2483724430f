"""What tests of training share: small networks and data that recipes name, and runs of them."""

from __future__ import annotations

import pytest

from pennyweight.training import loop
from pennyweight.training.loop import train
from pennyweight.training.metrics import read_metrics
from pennyweight.training.settings import TrainingRecipe

ZOO = """
import os, signal
import torch
from torch import nn

class Killer(nn.Module):
    def __init__(self, at):
        super().__init__()
        self.at = at
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))
    def forward(self, x): return x
    def before_step(self): pass
    def after_step(self):
        self.steps += 1
        if int(self.steps) == self.at and "KILL" in os.environ:
            os.kill(os.getpid(), signal.SIGKILL)

def mlp(kill_at=0, dropout=0.2, classes=3):
    first = [nn.Linear(6, 16), nn.LayerNorm(16), nn.GELU(), nn.Dropout(dropout)]
    return nn.Sequential(*first, Killer(kill_at), nn.Linear(16, classes))

class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.norm, self.layer = nn.LayerNorm(width), nn.Linear(width, width)
        self.gain = nn.Parameter(torch.tensor(0.7))
    def forward(self, x): return x + self.gain * torch.nn.functional.gelu(self.layer(self.norm(x)))

def blocks(width=15):
    return nn.Sequential(nn.Linear(6, width), Block(width), Block(width), nn.Linear(width, 3))

def images_net():
    return nn.Sequential(nn.Flatten(), nn.Linear(48, 3))

def points(n=100, poison=False):
    g = torch.Generator().manual_seed(5)
    x = torch.randn(n, 6, generator=g)
    y = (x[:, :3] + 0.3 * x[:, 3:]).argmax(1)
    return {"train": (x * (1e30 if poison else 1), y), "test": (x[:20], y[:20])}

def images():
    g = torch.Generator().manual_seed(6)
    return {"train": (torch.randint(256, (64, 3, 4, 4), dtype=torch.uint8, generator=g), torch.arange(64) % 3)}
"""


def import_zoo():
    return __import__("training_zoo")


def recipe(**changes) -> dict:
    base = {
        "model": {"name": "training_zoo:mlp"},
        "data": {"name": "training_zoo:points", "validation": 20},
        "batch": 16,
        "steps": 12,
        "optimizer": {"name": "adamw", "lr": 0.02, "weight_decay": 0.1},
        "schedule": {"warmup": 0.25},
        "log_every": 2,
        "checkpoint_every": 5,
        "output": "run",
    }
    return base | changes


def run(**changes):
    return train(TrainingRecipe.from_dict(recipe(**changes)))


def curve(directory) -> list[dict]:
    return [{k: v for k, v in row.items() if k != "seconds"} for row in read_metrics(directory)]


def stop_and_resume(monkeypatch, stops, changes, rows):
    """Interrupt after the checkpoint at each of these steps; the resumed curve must be `rows`."""
    saved = loop.save_checkpoint
    for stop in stops:

        def stopping(path, tensors, state, stop=stop):
            saved(path, tensors, state)
            if state["step"] == stop:
                raise KeyboardInterrupt

        monkeypatch.setattr(loop, "save_checkpoint", stopping)
        settings = TrainingRecipe.from_dict(recipe(**changes | {"output": f"stop{stop}"}))
        with pytest.raises(KeyboardInterrupt):
            train(settings)
        monkeypatch.setattr(loop, "save_checkpoint", saved)
        train(settings, resume=True)
        assert curve(f"stop{stop}") == rows
