"""Symbol streams: a matrix of small integers, bit-packed or range coded, whichever is smaller.

Range coding is that of the library constriction (a 64-bit range coder on 32-bit words) under static frequency tables
that are stored with the stream. Rows and columns can be put into classes; symbols whose row class and column class
agree share a table, so that rows of small spread do not pay for rows of large spread. The encoder sorts rows and
columns by their mean code length under one common table and cuts them into classes of equal size; how many classes
there are is decided by the entropy they leave plus the bytes their tables cost.

The layout, the tables and the coder are specified in docs/format.md. The frequencies handed to constriction are
integers that sum to 2^24 - n, which leaves it nothing to round: every platform builds the same model.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from constriction import stream  # pyright: ignore[reportAttributeAccessIssue]  (compiled, without stubs)

from ..errors import ArtifactError
from .base import Reader, Writer
from .bits import pack, packed_size, unpack

RAW, RANGE = 0, 1
PRECISION = 24  # constriction's: frequencies of a table sum to 2^24
MAX_CLASSES = 16
MAX_CONTEXT_ALPHABET = 4096  # larger alphabets get one table, as more would cost more than they save
COUNT_CLASSES = ((16, 16), (16, 4), (8, 4), (4, 4), (16, 1), (8, 1), (4, 1), (2, 1), (1, 4), (1, 2), (1, 1))
CHUNK = 1 << 20  # symbols handled at once, which bounds the working memory
MIN_LIMIT, LIMIT_PER_BYTE = 1 << 24, 1 << 12


def symbol_limit(payload: int) -> int:
    """Most symbols a range-coded stream of that many bytes may hold, so that a small file cannot fill the memory."""
    return MIN_LIMIT + LIMIT_PER_BYTE * payload


def write_symbols(writer: Writer, codes: np.ndarray, bits: int, classes: bool = True) -> None:
    """Append the stream of `codes` [rows, cols] (unsigned, below 2^bits, bits >= 1). No codes, no stream.

    classes: whether rows and columns may be put into classes.
    """
    raw_size = packed_size(codes.size, bits)
    if raw_size == 0:
        return
    plan = _plan(codes, bits, classes)
    if plan is not None:
        coded = Writer()
        _encode(coded, codes, bits, plan)
        if len(coded.data) < raw_size and codes.size <= symbol_limit(len(coded.data)):
            writer.u8(RANGE)
            writer.raw(coded.data)
            return
    writer.u8(RAW)
    writer.raw(pack(torch.from_numpy(codes.reshape(1, -1)), bits).numpy().data)


def read_symbols(reader: Reader, rows: int, cols: int, bits: int, classes: bool = True) -> np.ndarray:
    """Inverse of `write_symbols`: [rows, cols], uint8 up to 8 bits, else int32. `ArtifactError` on damage."""
    dtype = np.uint8 if bits <= 8 else np.int32
    count = rows * cols
    if count == 0:
        return np.zeros((rows, cols), dtype)
    coding = reader.u8()
    if coding == RAW:
        payload = np.frombuffer(reader.raw(packed_size(count, bits)), np.uint8)
        return unpack(torch.from_numpy(payload.copy()), bits, count).numpy().reshape(rows, cols)
    if coding != RANGE:
        raise ArtifactError(f"unknown stream coding {coding}; the file is damaged or needs a newer pennyweight")
    if count > symbol_limit(reader.left):
        raise ArtifactError("a packed weight claims more codes than its size allows; the file is damaged")
    return _decode(reader, rows, cols, bits, dtype, classes)


# Classes and tables ---------------------------------------------------------------------------------------------------


@dataclass
class _Plan:
    """Class of every row and column, and how often each symbol occurs in each context [row classes, col classes, A]."""

    row_class: np.ndarray
    col_class: np.ndarray
    counts: np.ndarray
    symbols: np.ndarray  # the symbols counted, ascending


def _row_chunks(rows: int, cols: int) -> Iterator[slice]:
    step = max(1, CHUNK // max(cols, 1))
    return (slice(start, min(start + step, rows)) for start in range(0, rows, step))


def _bits_of(counts: np.ndarray) -> float:
    """Ideal code length, in bits, of symbols that occur `counts` [..., A] times under their contexts' own tables."""
    total = counts.sum(-1)
    return float(_xlog2(total).sum() - _xlog2(counts).sum())


def _xlog2(x: np.ndarray) -> np.ndarray:
    return x * np.log2(np.maximum(x, 1))


def _classes(spread: np.ndarray, count: int) -> np.ndarray:
    """Cut rows (or columns) into `count` classes of equal size by ascending spread."""
    rank = np.empty(len(spread), np.int64)
    rank[np.argsort(spread, kind="stable")] = np.arange(len(spread))
    return rank * count // len(spread)


def _plan(codes: np.ndarray, bits: int, classes: bool = True) -> _Plan | None:
    """The classes that promise the smallest stream, or None where bit packing is smaller anyway."""
    rows, cols = codes.shape
    histogram = np.zeros(1 << bits, np.int64)
    for part in _row_chunks(rows, cols):
        histogram += np.bincount(codes[part].ravel(), minlength=1 << bits)
    symbols = np.flatnonzero(histogram)
    common = histogram[symbols]
    most_rows = most_cols = 1
    if classes and 1 < len(symbols) <= MAX_CONTEXT_ALPHABET and codes.size >= 256:
        # A class for each symbol would cost what it saves: no classes of rows in a single column, nor the reverse.
        most_rows = min(MAX_CLASSES, rows) if cols > 1 else 1
        most_cols = min(MAX_CLASSES, cols) if rows > 1 else 1
    row_class, col_class = np.zeros(rows, np.int64), np.zeros(cols, np.int64)
    counts = common[None, None]
    if most_rows * most_cols > 1:
        # Integer costs (1/256 bit) make the sums exact, so that the classes do not depend on the order of summation.
        cost = np.zeros(1 << bits, np.int64)
        cost[symbols] = np.rint(256 * np.log2(codes.size / common)).astype(np.int64)
        row_spread, col_spread = np.zeros(rows, np.int64), np.zeros(cols, np.int64)
        for part in _row_chunks(rows, cols):
            priced = cost[codes[part]]
            row_spread[part] = priced.sum(1)
            col_spread += priced.sum(0)
        row_class, col_class = _classes(row_spread, most_rows), _classes(col_spread, most_cols)
        index_of = np.zeros(1 << bits, np.int32)
        index_of[symbols] = np.arange(len(symbols))
        counts = np.zeros(most_rows * most_cols * len(symbols), np.int64)
        for part in _row_chunks(rows, cols):
            context = row_class[part, None] * most_cols + col_class[None, :]
            cell = context * len(symbols) + index_of[codes[part]]
            counts += np.bincount(cell.ravel(), minlength=len(counts))
        counts = counts.reshape(most_rows, most_cols, len(symbols))

    best, best_bits = None, float(codes.size * bits)
    for row_count, col_count in COUNT_CLASSES:
        if row_count > most_rows or col_count > most_cols:
            continue
        row_map = np.arange(most_rows) * row_count // most_rows
        col_map = np.arange(most_cols) * col_count // most_cols
        merged = np.zeros((row_count, col_count, len(symbols)), np.int64)
        np.add.at(merged, (row_map[:, None], col_map[None, :]), counts)
        size = _bits_of(merged) + 8 * ((merged > 0).sum() + 2 * row_count * col_count)
        size += rows * np.log2(row_count) + cols * np.log2(col_count)
        if size < best_bits:
            best, best_bits = _Plan(row_map[row_class], col_map[col_class], merged, symbols), size
    return best


def _table_codes(counts: np.ndarray) -> np.ndarray:
    """Counts (1 .. 2^31 - 1) -> one byte each, 1 + k, where (8 + k%8) * 2^(k//8) / 8 is nearest to the count."""
    exponent = np.floor(np.log2(counts)).astype(np.int64)
    mantissa = np.rint(8 * counts / np.exp2(exponent)).astype(np.int64)  # 8..16, where 16 carries into the exponent
    return 1 + mantissa - 8 + 8 * exponent


def _frequencies(k: np.ndarray) -> np.ndarray:
    """Table codes k of the symbols present -> integer frequencies >= 1 that sum to 2^24."""
    weight = (8 + (k & 7).astype(np.uint64)) << (k >> 3).astype(np.uint64)
    share = np.uint64((1 << PRECISION) - len(k))
    frequency = (weight * share // weight.sum()).astype(np.int64) + 1
    frequency[np.argmax(frequency)] += (1 << PRECISION) - frequency.sum()
    return frequency


def _model(k: np.ndarray) -> stream.model.Categorical:
    # constriction gives symbol i the frequency 1 + p_i when the p_i are integers that sum to 2^24 - n.
    return stream.model.Categorical((_frequencies(k) - 1).astype(np.float64), perfect=False, lazy=False)


def _write_table(writer: Writer, symbols: np.ndarray, table: np.ndarray, alphabet: int) -> None:
    """`table` (1 + k) of the `symbols` present, ascending; runs of absent symbols in between."""
    described = 0
    for symbol, code in zip([*symbols.tolist(), alphabet], [*table.tolist(), None], strict=True):
        if symbol > described:
            writer.u8(0)
            writer.varint(symbol - described - 1)
        if code is not None:
            writer.u8(code)
        described = symbol + 1


def _read_table(reader: Reader, alphabet: int) -> tuple[np.ndarray, np.ndarray]:
    """The symbols present, ascending, and their table codes k."""
    symbols, codes, symbol = [], [], 0
    while symbol < alphabet:
        code = reader.u8()
        if code == 0:
            symbol += 1 + reader.varint(alphabet)
        else:
            symbols.append(symbol)
            codes.append(code - 1)
            symbol += 1
    if symbol != alphabet or not symbols:
        raise ArtifactError("a frequency table does not fit its alphabet; the file is damaged")
    return np.array(symbols, np.int64), np.array(codes, np.int64)


# Coding ---------------------------------------------------------------------------------------------------------------


def _contexts(row_class: np.ndarray, col_class: np.ndarray) -> Iterator[tuple[int, int, np.ndarray, np.ndarray]]:
    """Row class, column class, their rows and columns; contexts without symbols are skipped."""
    members = [np.flatnonzero(col_class == c) for c in range(int(col_class.max()) + 1)]
    for r in range(int(row_class.max()) + 1):
        rows = np.flatnonzero(row_class == r)
        for c, cols in enumerate(members):
            if len(rows) and len(cols):
                yield r, c, rows, cols


def _write_classes(writer: Writer, classes: np.ndarray, count: int) -> None:
    if count > 1:
        write_symbols(writer, classes.astype(np.uint8)[None], (count - 1).bit_length(), classes=False)


def _read_classes(reader: Reader, length: int, count: int) -> np.ndarray:
    if count == 1:
        return np.zeros(length, np.uint8)
    classes = read_symbols(reader, 1, length, (count - 1).bit_length(), classes=False)[0]
    if length and int(classes.max()) >= count:
        raise ArtifactError("a stream names a class beyond its count; the file is damaged")
    return classes


def _encode(writer: Writer, codes: np.ndarray, bits: int, plan: _Plan) -> None:
    row_count, col_count, _ = plan.counts.shape
    writer.u8(row_count - 1 << 4 | col_count - 1)
    _write_classes(writer, plan.row_class, row_count)
    _write_classes(writer, plan.col_class, col_count)
    encoder = stream.queue.RangeEncoder()
    for r, c, rows, cols in _contexts(plan.row_class, plan.col_class):
        counts = plan.counts[r, c]
        present = plan.symbols[counts > 0]
        table = _table_codes(counts[counts > 0])
        _write_table(writer, present, table, 1 << bits)
        if len(present) == 1:
            continue
        model = _model(table - 1)
        index_of = np.zeros(1 << bits, np.int32)
        index_of[present] = np.arange(len(present))
        for part in _row_chunks(len(rows), len(cols)):
            block = codes[rows[part]] if len(cols) == codes.shape[1] else codes[rows[part, None], cols]
            encoder.encode(index_of[block.ravel()], model)
    payload = encoder.get_compressed().astype(">u4").tobytes().rstrip(b"\0")  # the decoder reads zeros past the end
    writer.varint(len(payload))
    writer.raw(payload)


def _decode(reader: Reader, rows: int, cols: int, bits: int, dtype: type, classes: bool) -> np.ndarray:
    counts = reader.u8()
    if counts and not classes:
        raise ArtifactError("a stream of classes has classes itself; the file is damaged")
    row_count, col_count = (counts >> 4) + 1, (counts & 15) + 1
    row_class = _read_classes(reader, rows, row_count)
    col_class = _read_classes(reader, cols, col_count)
    tables = [
        (members, others, *_read_table(reader, 1 << bits)) for _, _, members, others in _contexts(row_class, col_class)
    ]
    payload = bytes(reader.raw(reader.varint(1 << 62)))
    if rows * cols > symbol_limit(len(payload)):
        raise ArtifactError("a packed weight claims more codes than its size allows; the file is damaged")
    words = np.frombuffer(payload + bytes(-len(payload) % 4), ">u4").astype(np.uint32)
    decoder = stream.queue.RangeDecoder(words)
    codes = np.empty((rows, cols), dtype)
    for members, others, symbols, k in tables:
        model = _model(k) if len(k) > 1 else None
        values = symbols.astype(dtype)
        for part in _row_chunks(len(members), len(others)):
            chosen = members[part]
            if model is None:
                block = np.full((len(chosen), len(others)), values[0], dtype)
            else:
                try:
                    drawn = decoder.decode(model, len(chosen) * len(others))
                except AssertionError as error:  # how constriction reports data its encoder cannot have written
                    raise ArtifactError("a range-coded stream is not decodable; the file is damaged") from error
                block = values[drawn].reshape(len(chosen), len(others))
            if len(others) == cols:
                codes[chosen] = block
            else:
                codes[chosen[:, None], others] = block
    return codes
