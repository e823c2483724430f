"""A small character-level LSTM language model, trained here on tiny-shakespeare (about a minute, kept in out/)."""

from __future__ import annotations

from functools import cache

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import data
from common import OUT

LENGTH = 64  # characters in a sample
STEPS = 400
BATCH = 32
#: The first nine tenths are for training and calibration, the rest for measuring.
TRAINING_SHARE = 0.9


class CharLSTM(nn.Module):
    """ids int64 [batch, length] -> logits of the next character [batch, length, characters]."""

    def __init__(self, characters: int, width: int = 48, hidden: int = 128, layers: int = 2) -> None:
        super().__init__()
        self.embedding = nn.Embedding(characters, width)
        self.lstm = nn.LSTM(width, hidden, layers, batch_first=True)
        self.head = nn.Linear(hidden, characters)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.lstm(self.embedding(ids))[0])


@cache
def _ids() -> tuple[Tensor, int]:
    """The text as ids int64 [n] in the order of the characters, and how many characters there are."""
    text = data.sets().text("tinyshakespeare/input")
    place = {character: i for i, character in enumerate(sorted(set(text)))}
    return torch.tensor([place[character] for character in text]), len(place)


def _training_ids() -> Tensor:
    ids = _ids()[0]
    return ids[: int(TRAINING_SHARE * len(ids))]


def _samples(ids: Tensor, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Inputs and targets int64 [count, LENGTH]."""
    starts = torch.randint(len(ids) - LENGTH - 1, (count, 1), generator=generator)
    windows = ids[starts + torch.arange(LENGTH + 1)]
    return windows[:, :-1], windows[:, 1:]


def load_lstm() -> CharLSTM:
    """The trained model in eval mode; trained now if it is not in out/."""
    path = OUT / "char-lstm.safetensors"
    torch.manual_seed(0)
    model = CharLSTM(_ids()[1])
    if not path.exists():
        _train(model)
        OUT.mkdir(exist_ok=True)
        save_file(model.state_dict(), path)
    model.load_state_dict(load_file(path))
    return model.eval().requires_grad_(False)


def _train(model: CharLSTM) -> None:
    ids, generator = _training_ids(), torch.Generator().manual_seed(0)
    optimizer = torch.optim.Adam(model.parameters(), lr=4e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
    for _ in range(STEPS):
        inputs, targets = _samples(ids, BATCH, generator)
        optimizer.zero_grad()
        F.cross_entropy(model(inputs).flatten(0, 1), targets.flatten()).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()


def batches(count: int = 256) -> list[Tensor]:
    """Calibration data: `count` samples of the training text, without targets."""
    inputs, _ = _samples(_training_ids(), count, torch.Generator().manual_seed(1))
    return list(inputs.split(BATCH))


@torch.inference_mode()
def bits_per_character(model: nn.Module) -> float:
    """On text that was not trained on."""
    ids = _ids()[0][len(_training_ids()) :]
    inputs, targets = _samples(ids, 256, torch.Generator().manual_seed(2))
    return float(F.cross_entropy(model(inputs).flatten(0, 1), targets.flatten())) / float(torch.tensor(2.0).log())
