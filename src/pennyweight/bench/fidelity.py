"""How far a small model has moved from the original, and how long either takes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from scipy.stats import spearmanr
from torch import Tensor, nn

from ..clock import median_seconds
from ..compress.data import Output, calls, output_tensor
from ..compress.observe import evaluating
from ..errors import DataError


def embedding_fidelity(original: Tensor, small: Tensor) -> dict[str, float]:
    """Of embeddings float [n, features] of the same n >= 3 texts.

    cosine: mean cosine between the two embeddings of a text. spearman: rank correlation between the cosine similarities
    of all n (n - 1) / 2 pairs of texts, before and after. Raises DataError on fewer than 3 texts.
    """
    if original.shape[0] < 3:
        raise DataError(f"{original.shape[0]} texts are too few to compare rankings; give at least 3")
    a, b = F.normalize(original.double(), dim=-1), F.normalize(small.double(), dim=-1)
    upper = torch.triu_indices(a.shape[0], a.shape[0], offset=1)
    correlation: Any = spearmanr((a @ a.T)[*upper].numpy(), (b @ b.T)[*upper].numpy())
    return {"cosine": float((a * b).sum(-1).mean()), "spearman": float(correlation.statistic)}


@torch.no_grad()
def output_fidelity(
    original: nn.Module, small: nn.Module, data: Any, output: Output = output_tensor
) -> dict[str, float]:
    """Of the outputs for the same data (see `calls`).

    relative_error: sqrt(sum of squared differences / sum of squared deviations of the original's outputs from their
    mean). top1_agreement: share of positions where both rank the same class first; only for logits, that is for a field
    of that name or a plain matrix [samples, classes].
    """
    batches = calls(original, data)
    squared, same, positions = 0.0, 0, 0
    outputs: list[Tensor] = []
    classifies = True
    with evaluating(original), evaluating(small):
        for batch in batches:
            result, other = batch(original), batch(small)
            a, b = output(result, batch).double(), output(other, batch).double()
            squared += float((a - b).square().sum())
            outputs.append(a.reshape(batch.size, -1) if a.numel() % batch.size == 0 else a.reshape(1, -1))
            logits = hasattr(result, "logits") or (isinstance(result, Tensor) and result.ndim == 2)
            classifies &= logits and a.shape[-1] > 1
            same += int((a.argmax(-1) == b.argmax(-1)).sum())
            positions += a.shape[:-1].numel()
    found = {"relative_error": (squared / max(_deviations(outputs), 1e-300)) ** 0.5}
    return found | {"top1_agreement": same / positions} if classifies else found


def _deviations(outputs: Sequence[Tensor]) -> float:
    """Sum of squared deviations from the mean over samples; from zero where batches differ in shape."""
    if len({o.shape[1] for o in outputs}) > 1 or sum(o.shape[0] for o in outputs) < 2:
        return float(sum(o.square().sum() for o in outputs))
    together = torch.cat(list(outputs))
    return float((together - together.mean(0)).square().sum())


def median_milliseconds(runs: Sequence[Callable[[], Any]], repeats: int, warm_up: int = 2) -> list[float]:
    """`median_seconds` in milliseconds."""
    return [1000 * seconds for seconds in median_seconds(runs, repeats, warm_up)]
