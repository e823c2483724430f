"""Write the conformance vectors of docs/format.md: a JSON file a format, by name a blob and the matrix it decodes to.

    python tests/vectors/make.py

Vectors of a published version must never change: this script adds new ones and refuses to alter those there are.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from torch import Tensor

from pennyweight.formats import (
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

HERE = Path(__file__).parent


def ramp(rows: int, cols: int, modulus: int) -> Tensor:
    """Integers [rows, cols] that look irregular but need no random generator."""
    i = torch.arange(rows * cols)
    return ((i * i * 7 + i * 13 + i // 5) % modulus).view(rows, cols)


def skewed(rows: int, cols: int, bits: int) -> Tensor:
    """Codes [rows, cols] of `bits` bits, most of them near the middle; so that range coding pays."""
    i = torch.arange(rows * cols)
    noise = ((i * 2654435761) % 4294967296 >> 20) % 64  # 0..63
    spread = torch.where(noise < 40, 0, torch.where(noise < 52, 1, torch.where(noise < 60, -1, noise - 62)))
    return (spread + (1 << bits - 1)).clamp(0, (1 << bits) - 1).view(rows, cols)


def vectors() -> dict[str, PackedWeight]:
    """One packed weight for every format and option."""
    weight = (ramp(5, 7, 97) - 48).float() / 32
    scale = (ramp(5, 2, 13) + 1).float() / 16
    row_scale = scale[:, :1]
    out: dict[str, PackedWeight] = {
        "dense16-float16": Dense16.encode(weight),
        "dense16-bfloat16": Dense16.encode(weight, "bfloat16"),
        "dense16-range": Dense16.encode(weight.repeat(3, 6)),
        "dense16-no-rows": Dense16.encode(torch.zeros(0, 3)),
        "dense16-no-cols": Dense16.encode(torch.zeros(3, 0)),
    }
    for bits in range(1, 17):
        codes = ramp(5, 7, 1 << bits)
        out[f"int-{bits}"] = Integer.from_codes(codes - (1 << bits - 1), scale, bits=bits, group=4)
        out[f"int-{bits}-asymmetric"] = Integer.from_codes(codes, scale, -scale, bits=bits, group=4)
    codes = ramp(5, 7, 16)
    signed = codes - 8
    extremes = torch.tensor([[1e-20], [3.0], [0.0], [1e-9], [65000.0]])
    columns = (ramp(1, 7, 5) + 1)[0].float()
    table = torch.linspace(-2, 2, 16)
    out |= {
        "int-row": Integer.from_codes(signed, row_scale, bits=4, group=0),
        "int-log8": Integer.from_codes(signed, scale, bits=4, group=4, scale_coding="log8"),
        "int-log8-zero": Integer.from_codes(
            signed, torch.tensor([[0.0], [1.0], [1.5], [0.0], [100.0]]), bits=4, group=0, scale_coding="log8"
        ),
        "int-exponent": Integer.from_codes(signed, extremes, bits=4, group=0),
        "int-column-offset": Integer.from_codes(codes, scale, -scale, bits=4, group=4, column_offset=columns / 8),
        "int-column-scale": Integer.from_codes(codes, scale, -scale, bits=4, group=4, column_scale=columns),
        "int-column-both": Integer.from_codes(
            signed, scale, bits=4, group=4, column_offset=columns / 8, column_scale=columns
        ),
        "int-centroids": Integer.from_codes((codes // 2) * 2 - 8, row_scale, bits=4, group=0, centroids=table),
        "int-constant": Integer.from_codes(torch.ones(20, 30).int(), torch.ones(20, 1), bits=8, group=0),
        "int-no-rows": Integer.from_codes(torch.zeros(0, 3).int(), torch.zeros(0, 1), bits=3, group=0),
        "int-no-cols": Integer.from_codes(torch.zeros(3, 0).int(), torch.zeros(3, 0), bits=3, group=0),
    }
    for bits in (1, 3, 4, 8, 12):
        out[f"int-{bits}-range"] = Integer.from_codes(
            skewed(12, 40, bits) - (1 << bits - 1), torch.ones(12, 1), bits=bits, group=0
        )
    flat = torch.full((32, 40), 8) + skewed(32, 40, 1) % 2
    wide = ramp(32, 40, 16)
    by_row = torch.where((torch.arange(32) % 4 == 1)[:, None], wide, flat)
    by_column = torch.where((torch.arange(40) % 3 == 0)[None], wide, flat)
    by_both = torch.where((torch.arange(32) % 2 == 1)[:, None], by_column, torch.full((32, 40), 8))
    for name, mixed in (("row", by_row), ("column", by_column), ("both", by_both)):
        out[f"int-{name}-classes"] = Integer.from_codes(mixed - 8, torch.ones(32, 1), bits=4, group=0)
    spots = ramp(5, 7, 11) > 6
    regular = (torch.arange(24 * 30) % 6 == 1).view(24, 30)
    lonely = torch.zeros(20, 60).bool()
    lonely[3, 5] = lonely[19, 59] = True
    out |= {
        "binary": Binary.from_signs(spots, scale, 4),
        "binary-row-log8": Binary.from_signs(spots, row_scale, 0, "log8"),
        "binary-range": Binary.from_signs(regular, torch.ones(24, 1), 0),
        "sparse": Sparse.encode(weight, spots),
        "sparse-float32": Sparse.encode(weight / 3, spots, 32),
        "sparse-3bit": Sparse.encode(weight, spots, 3),
        "sparse-8bit": Sparse.encode(weight, spots, 8),
        "sparse-bitmap-range": Sparse.encode(torch.ones(12, 40), skewed(12, 40, 4) == 9, 2),
        "sparse-index-regular": Sparse.encode(torch.ones(24, 30), regular),
        "sparse-index-far": Sparse.encode(torch.ones(20, 60) * 3, lonely, 5),
        "sparse-empty": Sparse.encode(weight, torch.zeros(5, 7).bool()),
        "codebook-row-scale": Codebook.from_codes(
            ramp(5, 3, 9), weight[:3].reshape(7, 3).repeat(2, 1), cols=7, row_scale=row_scale[:, 0]
        ),
        "codebook-row-log8": Codebook.from_codes(
            ramp(5, 4, 3), weight[:3, :2], cols=7, row_scale=row_scale[:, 0], scale_coding="log8"
        ),
        "codebook-one": Codebook.from_codes(torch.zeros(5, 4).int(), weight[:1, :2], cols=8),
        "codebook-range": Codebook.from_codes(skewed(12, 40, 5), weight.reshape(35, 1)[:32], cols=40),
    }
    for d in range(1, 9):
        blocks = -(-7 // d)
        out[f"codebook-{d}"] = Codebook.from_codes(ramp(5, blocks, 5), ramp(5, d, 64).float() / 8, cols=7)
    left, right = ramp(5, 2, 8).float(), ramp(2, 7, 8).float()
    out |= {
        "lowrank": LowRank.from_factors(Dense16.encode(left), Integer.encode(right * 2, 4, 0)),
        "lowrank-0": LowRank.from_factors(Dense16.encode(left[:, :0]), Dense16.encode(right[:0])),
        "split": Split.from_parts(
            spots[:, 0], Dense16.encode(weight[~spots[:, 0]]), Binary.encode(weight[spots[:, 0]], 0)
        ),
        "split-nested": Split.from_parts(
            spots[:, 1],
            LowRank.from_factors(Dense16.encode(left[~spots[:, 1]]), Dense16.encode(right)),
            Sparse.encode(weight, spots)
            if bool(spots[:, 1].all())
            else Sparse.encode(weight[spots[:, 1]], spots[spots[:, 1]]),
        ),
    }
    # Factors of whole numbers, whose products are exact in whatever order they are added up.
    signed = SignedLowRank.from_factors(spots, left, right)
    out |= {
        "signed-lowrank": signed,
        "signed-lowrank-1": SignedLowRank.from_factors(spots, row_scale, columns[None]),
        "signed-lowrank-0": SignedLowRank.from_factors(spots, left[:, :0], right[:0]),
        "signed-lowrank-range": SignedLowRank.from_factors(regular, torch.ones(24, 1), torch.ones(1, 30)),
        "partial": Partial.from_parts(Binary.from_signs(spots, scale, 4), Sparse.encode(weight, ramp(5, 7, 6) > 3)),
        "partial-4bit": Partial.encode(weight, weight.abs() > 1, 4, 4),
        "partial-none": Partial.encode(weight, torch.zeros(5, 7).bool(), 0),
        "partial-int-rest": Partial.from_parts(
            Integer.from_codes(spots.int(), row_scale, -row_scale / 2, bits=1, group=0), Sparse.encode(weight, spots, 8)
        ),
        "stacked-1": Stacked.encode(weight, 1),
        "stacked-binary": Stacked.encode(weight, 3, lambda rest: Binary.encode(rest, 4)),
        "stacked-signed": Stacked.from_parts([signed, SignedLowRank.from_factors(~spots, row_scale, columns[None])]),
        "stacked-nested": Stacked.from_parts([Dense16.encode(weight), Stacked.from_parts([signed, signed])]),
    }
    return out


def main() -> None:
    by_format: dict[str, dict[str, dict]] = {}
    for name, packed in vectors().items():
        by_format.setdefault(packed.format, {})[name] = {
            "blob": packed.to_bytes().hex(),
            "shape": list(packed.shape),
            "values": [[float(x) for x in row] for row in packed.decode()],
        }
    for name, entries in by_format.items():
        path = HERE / f"{name}.json"
        for old, entry in json.loads(path.read_text()).items() if path.exists() else ():
            if entries.get(old) != entry:
                raise SystemExit(f"{path}: {old} would change; a published vector must not")
        lines = (f"{json.dumps(key)}: {json.dumps(entry)}" for key, entry in entries.items())
        path.write_text("{\n" + ",\n".join(lines) + "\n}\n")


if __name__ == "__main__":
    main()
