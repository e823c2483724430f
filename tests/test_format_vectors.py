"""docs/format.md against the code: the conformance vectors, and a decoder of streams written from the text alone."""

from __future__ import annotations

import json
from bisect import bisect_right
from pathlib import Path

import numpy as np
import pytest
import torch

from pennyweight.formats import from_bytes
from pennyweight.formats.base import Reader, Writer
from pennyweight.formats.entropy import RANGE, RAW, read_symbols, write_symbols

VECTORS = {
    name: entry
    for path in sorted((Path(__file__).parent / "vectors").glob("*.json"))
    for name, entry in json.loads(path.read_text()).items()
}


@pytest.mark.parametrize("name", VECTORS)
def test_vector_decodes_exactly_and_encodes_to_the_same_bytes(name: str) -> None:
    entry = VECTORS[name]
    blob = bytes.fromhex(entry["blob"])
    packed = from_bytes(blob)
    expected = torch.tensor(entry["values"], dtype=torch.float64).reshape(entry["shape"])
    assert torch.equal(packed.decode().double(), expected)
    assert packed.to_bytes() == blob
    assert len(blob) < 2048


class Specification:
    """Reads streams as docs/format.md says, in plain integers; shares nothing with the package."""

    def __init__(self, data: bytes) -> None:
        self.data, self.at = data, 0

    def u8(self) -> int:
        self.at += 1
        return self.data[self.at - 1]

    def varint(self) -> int:
        value = shift = 0
        while True:
            byte = self.u8()
            value |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                return value

    def stream(self, rows: int, cols: int, b: int) -> list[list[int]]:
        n = rows * cols
        if n == 0:
            return [[] for _ in range(rows)]
        if self.u8() == 0:
            size = -(-n * b // 8)
            payload = int.from_bytes(self.data[self.at : self.at + size], "little")
            self.at += size
            flat = [payload >> i * b & (1 << b) - 1 for i in range(n)]
            return [flat[r * cols : (r + 1) * cols] for r in range(rows)]
        classes = self.u8()
        row_classes, col_classes = (classes >> 4) + 1, (classes & 15) + 1
        row_class = self.stream(1, rows, (row_classes - 1).bit_length())[0] if row_classes > 1 else [0] * rows
        col_class = self.stream(1, cols, (col_classes - 1).bit_length())[0] if col_classes > 1 else [0] * cols
        contexts = []
        for r in range(row_classes):
            for c in range(col_classes):
                places = [(i, j) for i in range(rows) for j in range(cols) if row_class[i] == r and col_class[j] == c]
                if places:
                    contexts.append((places, *self.table(b)))
        size = self.varint()
        payload = self.data[self.at : self.at + size]
        self.at += size
        out = [[-1] * cols for _ in range(rows)]
        coder = SpecificationCoder(payload)
        for places, symbols, frequencies in contexts:
            for i, j in places:
                out[i][j] = symbols[0 if len(symbols) == 1 else coder.decode(frequencies)]
        return out

    def table(self, b: int) -> tuple[list[int], list[int]]:
        symbols, k, symbol = [], [], 0
        while symbol < 1 << b:
            q = self.u8()
            if q == 0:
                symbol += self.varint() + 1
            else:
                symbols.append(symbol)
                k.append(q - 1)
                symbol += 1
        w = [(8 + x % 8) * 2 ** (x // 8) for x in k]
        f = [1 + x * (2**24 - len(w)) // sum(w) for x in w]
        f[f.index(max(f))] += 2**24 - sum(f)
        return symbols, f


class SpecificationCoder:
    def __init__(self, payload: bytes) -> None:
        self.payload, self.at = payload, 0
        self.low, self.range = 0, 2**64 - 1
        self.point = self.word() << 32 | self.word()

    def word(self) -> int:
        self.at += 4
        return int.from_bytes(self.payload[self.at - 4 : self.at].ljust(4, b"\0"), "big")

    def decode(self, frequencies: list[int]) -> int:
        cumulative = [0]
        for f in frequencies:
            cumulative.append(cumulative[-1] + f)
        unit = self.range // 2**24
        quantile = (self.point - self.low) % 2**64 // unit
        assert quantile < 2**24
        i = bisect_right(cumulative, quantile) - 1
        self.low = (self.low + unit * cumulative[i]) % 2**64
        self.range = unit * frequencies[i]
        if self.range < 2**32:
            self.low = self.low * 2**32 % 2**64
            self.range *= 2**32
            self.point = (self.point * 2**32 + self.word()) % 2**64
        return i


@pytest.mark.parametrize("name", [name for name, entry in VECTORS.items() if name.startswith("int-")])
def test_specification_reads_the_codes_of_every_int_vector(name: str) -> None:
    blob = bytes.fromhex(VECTORS[name]["blob"])
    reader = Specification(blob)
    assert (reader.u8(), reader.u8() >> 5) == (2, 0)
    rows, cols, bits, _group = reader.varint(), reader.varint(), reader.u8(), reader.varint()
    codes = reader.stream(rows, cols, bits)
    assert codes == from_bytes(blob).codes.all().tolist()  # type: ignore[attr-defined]


@pytest.mark.parametrize("bits", [1, 2, 3, 5, 8, 11, 16])
@pytest.mark.parametrize("kind", ["narrow", "rows", "both", "uniform", "sparse alphabet", "constant"])
def test_specification_agrees_with_the_streams(bits: int, kind: str) -> None:
    rng = np.random.default_rng(bits)
    top = 1 << bits
    centre = np.full((40, 50), top / 2)
    spread = {
        "narrow": np.full((40, 50), 0.4),
        "rows": 0.1 + np.arange(40)[:, None] % 4 + np.zeros((1, 50)),
        "both": (0.1 + np.arange(40)[:, None] % 3) * (0.2 + np.arange(50)[None] % 2),
        "uniform": np.full((40, 50), 1e6),
        "sparse alphabet": np.full((40, 50), 0.5),
        "constant": np.zeros((40, 50)),
    }[kind]
    codes = np.clip(np.floor(centre + spread * rng.standard_normal((40, 50))), 0, top - 1)
    if kind == "uniform":
        codes = rng.integers(0, top, (40, 50))
    if kind == "sparse alphabet":
        codes = codes // max(top // 8, 1) * max(top // 8, 1)
    codes = codes.astype(np.uint8 if bits <= 8 else np.int32)
    writer = Writer()
    write_symbols(writer, codes, bits)
    specification = Specification(bytes(writer.data))
    assert specification.stream(40, 50, bits) == codes.tolist()
    assert specification.at == len(writer.data)
    assert np.array_equal(read_symbols(Reader(bytes(writer.data)), 40, 50, bits), codes)
    if kind in ("narrow", "constant") and bits > 1:
        assert writer.data[0] == RANGE
    if kind == "uniform":
        assert writer.data[0] == RAW
