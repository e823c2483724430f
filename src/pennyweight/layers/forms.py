"""Forms: how packed weights run, as far as that decides their time.

A layer's time depends on its kind, its shape and on what has to be multiplied or decoded; hardly on the values. So one
made-up weight in each form tells the time of every weight of that form:

    family       what runs                                            at: the number its time grows with, in a line
    original     the layer as it was, not packed
    dense16      16-bit floats, decoded
    int1 .. int8 integers the kernels multiply, 1 to 4 bits or bytes  groups of columns with a scale of their own
    decoded      integers they do not take, decoded
    binary       signs                                                groups
    codebook     vectors of a table, decoded                          1 / weights in a vector
    lowrank      two thin products                                    rank
    sparse       weights under a mask                                 share of them that is kept
    partial      signs, and weights under a mask                      share of them that is kept
    stacked      signs, several times                                 how many times: stages, or their ranks
    split        what dividing the rows between two formats adds
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple, Self

import numpy as np
import torch

from ..formats import (
    Binary,
    Codebook,
    Dense16,
    Integer,
    LowRank,
    PackedWeight,
    Partial,
    SignedLowRank,
    Sparse,
    Split,
    Stacked,
)
from ..formats.groups import group_count
from ..formats.running import RunningIntegers

GROUP = 64
_RANK_PARTS = (32, 8)  # ranks timed, as parts of the shorter side
_KEPT = (0.1, 0.5)
_SALIENT = (0.05, 0.2)
_STAGES = (2, 8)


class Form(NamedTuple):
    """See the module. Written as text "int4@6"."""

    family: str
    at: float = 0.0

    def __str__(self) -> str:
        return f"{self.family}@{self.at:.6g}"

    @classmethod
    def of_text(cls, text: str) -> Self:
        """The inverse of `str`; raises ValueError."""
        family, separator, at = text.partition("@")
        if not separator:
            raise ValueError(f"{text!r} is no form")
        return cls(family, float(at))


ORIGINAL, SPLIT = Form("original"), Form("split")


def form_of(packed: PackedWeight) -> Form:
    """The form in which a stored weight runs when it is kept packed."""
    cols = packed.shape[1]
    if isinstance(packed, Binary):
        return Form("binary", group_count(cols, packed.group))
    if isinstance(packed, Integer):
        return _integer_form(packed)
    if isinstance(packed, Codebook):
        return Form("codebook", 1 / packed.codebook.halves.shape[1])
    if isinstance(packed, LowRank):
        return Form("lowrank", packed.rank)
    if isinstance(packed, Sparse):
        return Form("sparse", float(packed.mask.all().float().mean()))
    if isinstance(packed, Partial) and isinstance(packed.rest, Binary):
        return Form("partial", float(packed.salient.mask.all().float().mean()))
    if isinstance(packed, SignedLowRank | Stacked):
        return _signs_form(packed.parts if isinstance(packed, Stacked) else (packed,))
    return Form("dense16" if isinstance(packed, Dense16) else "decoded")


def _integer_form(packed: Integer) -> Form:
    groups = group_count(packed.shape[1], packed.group)
    if packed.centroids is not None or (packed.group % 8 and groups > 1):
        return Form("decoded")
    if packed.bits <= 8:
        return Form(f"int{packed.bits if packed.bits <= 4 else 8}", groups)
    running = packed.for_running()  # whether the codes beyond a byte are few enough
    return Form(f"int{running.matrix.bits}", groups) if isinstance(running, RunningIntegers) else Form("decoded")


def _signs_form(parts: Sequence[PackedWeight]) -> Form:
    """The form of a sum in which every part is signs with scales of groups or of low rank."""
    products = [
        part.rank if isinstance(part, SignedLowRank) else 1
        for part in parts
        if isinstance(part, Binary | SignedLowRank)
    ]
    return Form("stacked", sum(products)) if len(products) == len(parts) else Form("decoded")


def samples(rows: int, cols: int) -> dict[Form, PackedWeight]:
    """A made-up weight [rows, cols] in each form; those of a family tell its time between them (`interpolate`)."""
    generator = torch.Generator().manual_seed(0)

    def integers(bits: int, group: int, n: int = rows) -> Integer:
        lowest = -(1 << bits - 1)
        codes = torch.randint(lowest, -lowest, (n, cols), generator=generator)
        codes.view(-1)[:1], codes.view(-1)[-1:] = lowest, -lowest - 1  # the whole range, or fewer bits would do
        scale = torch.full((n, group_count(cols, group)), 0.01)
        if group:  # scales and minima, as gptq stores them
            return Integer.from_codes(codes - lowest, scale, -scale, bits=bits, group=group)
        return Integer.from_codes(  # as entropy-gptq does
            codes, scale, bits=bits, group=0, scale_coding="log8", column_scale=torch.ones(cols)
        )

    weight = 0.02 * torch.randn(rows, cols, generator=generator)
    made: list[PackedWeight] = [Dense16.encode(weight), integers(12, 0)]
    for group in (0, GROUP) if cols > GROUP else (0,):
        made += [integers(bits, group) for bits in (1, 2, 3, 4, 8)]
        made.append(Binary.from_signs(weight >= 0, torch.full((rows, group_count(cols, group)), 0.01), group))
    for d, entries in ((8, 256), (2, 64)):
        codes = torch.randint(0, entries, (rows, -(-cols // d)), generator=generator)
        table = 0.02 * torch.randn(entries, d, generator=generator)
        made.append(Codebook.from_codes(codes, table, cols=cols, row_scale=torch.ones(rows)))
    for rank in sorted({0, *(min(rows, cols) // part for part in _RANK_PARTS)}):
        factors = (Integer.encode(weight.new_ones(n, m), 4, GROUP) for n, m in ((rows, rank), (rank, cols)))
        made.append(LowRank.from_factors(*factors) if rank else LowRank.from_factors(*_nothing(rows, cols)))
    shares = torch.rand(rows, cols, generator=generator)
    made += [Sparse.encode(weight, shares < kept) for kept in _KEPT]
    made += [Partial.encode(weight, shares < kept, 0) for kept in _SALIENT]
    made += [Stacked.from_parts([Binary.encode(weight, 0)] * stages) for stages in _STAGES]
    found = {form_of(packed): packed for packed in made}
    if rows > 1:
        second = torch.arange(rows) % 2 == 1
        counts = int((~second).sum()), int(second.sum())
        parts = (integers(bits, 0, n) for bits, n in zip((3, 4), counts))
        found[SPLIT] = Split.from_parts(second, *parts)
    return found


def _nothing(rows: int, cols: int) -> tuple[Dense16, Dense16]:
    return Dense16.encode(torch.zeros(rows, 0)), Dense16.encode(torch.zeros(0, cols))


def interpolate(times: Mapping[Form, float], form: Form) -> float:
    """The time of a form, on the line through the two timed ones of its family that are nearest.

    A family that was not timed counts as decoded. Never less than half of what the fastest of the family takes.
    Raises KeyError if there is no time to go by.
    """
    points = sorted((f.at, t) for f, t in times.items() if f.family == form.family)
    if not points:
        if form.family == "decoded":
            raise KeyError(str(form))
        return interpolate(times, Form("decoded"))
    if len(points) == 1:
        return points[0][1]
    at, taken = np.array(points).T
    low = int(np.clip(np.searchsorted(at, form.at) - 1, 0, len(at) - 2))
    slope = (taken[low + 1] - taken[low]) / (at[low + 1] - at[low])
    return max(float(taken[low] + slope * (form.at - at[low])), float(taken.min()) / 2)


def division(times: Mapping[Form, float]) -> float:
    """What dividing a layer's rows between two formats adds to the time of its parts."""
    if SPLIT not in times:
        return 0.0
    parts = [interpolate(times, Form(family, 1)) for family in ("int3", "int4")]
    return max(times[SPLIT] - sum(parts) / 2, 0.0)
