"""The kernels. This module imports Triton: only `launch` and `signs` import it, when a product is asked for.

All of them add up in an order that the shapes alone decide, without atomics: same input, same bits.
"""

# No `from __future__ import annotations`: Triton reads the annotations.
# pyright: reportGeneralTypeIssues=false, reportOperatorIssue=false, reportMissingImports=false

import triton
import triton.language as tl


@triton.jit
def _load_words(
    low, high, at, unit, inside, low_blocks, high_blocks, LOW: tl.constexpr, HIGH: tl.constexpr, UNIT: tl.constexpr
):
    """The units of rows `at`, low and high parts; bits of the high part lie at 0 and up. `at`, `unit` broadcast."""
    # Row lengths come in blocks of 16 bytes, from which the compiler sees that a row can be read 16 bytes at a time.
    words = tl.load(low + at * (low_blocks * (16 // UNIT)) + unit, mask=inside, other=0).to(tl.int32)
    highs = words
    if HIGH:
        ratio: tl.constexpr = LOW // HIGH  # low units to a high unit
        place = at * (high_blocks * (16 // UNIT)) + unit // ratio
        highs = tl.load(high + place, mask=inside, other=0).to(tl.int32) >> (unit % ratio) * (UNIT * 8 // ratio)
    return words, highs


@triton.jit
def _code(words, highs, j, LOW: tl.constexpr, HIGH: tl.constexpr):
    """Code j of each unit."""
    code = (words >> (j * LOW)) & ((1 << LOW) - 1)
    if HIGH:
        code = code | (((highs >> (j * HIGH)) & ((1 << HIGH) - 1)) << LOW)
    return code


@triton.jit
def few_rows(
    x, low, high, scale, minimum, column_scale, column_offset, table, bias, out,
    x_rows, rows, cols, x_stride, low_blocks, high_blocks, groups, units, units_per_split,
    scale_factor, minimum_factor, offset_factor, magnitude,
    LOW: tl.constexpr, HIGH: tl.constexpr, UNIT: tl.constexpr, PLANES: tl.constexpr, ZERO: tl.constexpr,
    GROUP_UNITS: tl.constexpr, M: tl.constexpr, BN: tl.constexpr, BU: tl.constexpr,
):  # fmt: skip
    """out [splits, x_rows, rows] = x @ values^T over each split's units; M >= x_rows. float32 throughout.

    Columns are taken unit by unit, so that a scale multiplies the sum over a unit. x is small and read with a stride,
    which the cache serves; the weight is read once.
    """
    PER: tl.constexpr = UNIT * 8 // LOW
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    m = tl.arange(0, M)
    first = tl.program_id(1) * units_per_split
    last = tl.minimum(first + units_per_split, units)
    row = n.to(tl.int64)[:, None]
    x_row = m.to(tl.int64)[:, None] * x_stride
    total = tl.zeros([M, BN, BU], tl.float32)
    shared = tl.zeros([M, BU], tl.float32)  # what the column offset adds, the same for all rows of the weight
    for start in range(first, last, BU):
        unit = start + tl.arange(0, BU)
        inside = (n < rows)[:, None] & (unit < last)[None, :]
        group = unit // GROUP_UNITS if GROUP_UNITS else unit * 0
        sums = tl.zeros([M, BU], tl.float32)  # of x over a unit: what zero or the minimum is multiplied by
        for plane in tl.static_range(PLANES):
            at = row + plane * rows
            words, highs = _load_words(low, high, at, unit[None, :], inside, low_blocks, high_blocks, LOW, HIGH, UNIT)
            part = tl.zeros([M, BN, BU], tl.float32)
            for j in range(PER):
                column = unit * PER + j
                known = (unit < last) & (column < cols)
                taken = tl.load(x + x_row + column[None, :], mask=(m < x_rows)[:, None] & known[None, :], other=0.0)
                taken = taken.to(tl.float32)
                if plane == 0:
                    if minimum is not None:
                        sums += taken
                    if column_offset is not None:
                        shared += taken * tl.load(column_offset + column, mask=known, other=0.0)[None, :]
                if column_scale is not None:
                    taken = taken * tl.load(column_scale + column, mask=known, other=0.0)[None, :]
                if plane == 0 and minimum is None:
                    sums += taken
                code = _code(words, highs, j, LOW, HIGH)
                if table is not None:
                    step = tl.load(table + code)
                else:
                    step = code.to(tl.float32)
                part += step[None, :, :] * taken[:, None, :]
            if ZERO != 0:
                part -= ZERO * sums[:, None, :]
            factor = tl.load(scale + at * groups + group[None, :], mask=inside, other=0.0).to(tl.float32) * scale_factor
            total += part * factor[None, :, :]
        if minimum is not None:
            least = tl.load(minimum + row * groups + group[None, :], mask=inside, other=0.0).to(tl.float32)
            total += (least * minimum_factor)[None, :, :] * sums[:, None, :]
    result = tl.sum(total, 2)
    if column_offset is not None:
        result += (tl.sum(shared, 1) * offset_factor)[:, None]
    result = result * magnitude
    if bias is not None:
        result += tl.load(bias + n, mask=n < rows, other=0.0).to(tl.float32)[None, :]
    place = (tl.program_id(1) * x_rows + m).to(tl.int64)[:, None] * rows + n[None, :]
    tl.store(out + place, result.to(out.dtype.element_ty), mask=(m < x_rows)[:, None] & (n < rows)[None, :])


@triton.jit
def arrange_inputs(x, out, cols, x_stride, units, out_blocks, PER: tl.constexpr, BU: tl.constexpr):
    """out [x_rows, PER, out_blocks * 16]: element (j, unit) is x[unit * PER + j], 0 beyond the columns."""
    m = tl.program_id(0).to(tl.int64)
    unit = tl.program_id(1) * BU + tl.arange(0, BU)
    j = tl.arange(0, PER)
    column = unit[:, None] * PER + j[None, :]
    taken = tl.load(x + m * x_stride + column, mask=column < cols, other=0.0)
    place = (m * PER + j[None, :]) * (out_blocks * 16) + unit[:, None]
    tl.store(out + place, taken, mask=(unit < out_blocks * 16)[:, None])


@triton.jit
def many_rows(
    x, low, high, scale, minimum, column_scale, column_offset, table, bias, out,
    x_rows, rows, cols, x_blocks, low_blocks, high_blocks, groups, units, units_per_split,
    scale_factor, minimum_factor, offset_factor, magnitude,
    LOW: tl.constexpr, HIGH: tl.constexpr, UNIT: tl.constexpr, PLANES: tl.constexpr, ZERO: tl.constexpr,
    GROUP_UNITS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BU: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """out [splits, x_rows, rows] = x @ values^T over each split's units, x as `arrange_inputs` leaves it.

    Code j of all units of a tile makes a tile of values, rounded to x's dtype, that meets slice j of x. DOT is the
    dtype tl.dot gets: x's, but for bfloat16 in the interpreter, whose dot cannot multiply that.
    """
    PER: tl.constexpr = UNIT * 8 // LOW
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    m = tl.program_id(1) * BM + tl.arange(0, BM)
    first = tl.program_id(2) * units_per_split
    last = tl.minimum(first + units_per_split, units)
    row = n.to(tl.int64)[None, :]
    x_row = m.to(tl.int64)[:, None] * PER
    total = tl.zeros([BM, BN], tl.float32)
    for start in range(first, last, BU):
        unit = start + tl.arange(0, BU)
        inside = (unit < last)[:, None] & (n < rows)[None, :]
        x_inside = (m < x_rows)[:, None] & (unit < last)[None, :]
        group = unit // GROUP_UNITS if GROUP_UNITS else unit * 0
        for plane in tl.static_range(PLANES):
            at = row + plane * rows
            words, highs = _load_words(low, high, at, unit[:, None], inside, low_blocks, high_blocks, LOW, HIGH, UNIT)
            factor = tl.load(scale + at * groups + group[:, None], mask=inside, other=0.0).to(tl.float32) * scale_factor
            if minimum is not None:
                least = tl.load(minimum + row * groups + group[:, None], mask=inside, other=0.0).to(tl.float32)
                least = least * minimum_factor
            for j in range(PER):
                column = unit * PER + j
                code = _code(words, highs, j, LOW, HIGH)
                if table is not None:
                    value = tl.load(table + code) * factor
                else:
                    value = (code.to(tl.float32) - ZERO) * factor
                if column_scale is not None:
                    value = value * tl.load(column_scale + column, mask=column < cols, other=0.0)[:, None]
                if minimum is not None:
                    value += least
                if column_offset is not None:
                    offset = tl.load(column_offset + column, mask=column < cols, other=0.0) * offset_factor
                    value += offset[:, None]
                taken = tl.load(x + (x_row + j) * (x_blocks * 16) + unit[None, :], mask=x_inside, other=0.0)
                value = value.to(x.dtype.element_ty)
                total = tl.dot(taken.to(DOT), value.to(DOT), total, input_precision="ieee")
    result = total * magnitude
    if bias is not None:
        result += tl.load(bias + n, mask=n < rows, other=0.0).to(tl.float32)[None, :]
    place = (tl.program_id(2) * x_rows + m).to(tl.int64)[:, None] * rows + n[None, :]
    tl.store(out + place, result.to(out.dtype.element_ty), mask=(m < x_rows)[:, None] & (n < rows)[None, :])


@triton.jit
def add_splits(parts, bias, out, count, rows, splits, BLOCK: tl.constexpr):
    """out [count] = the sum of parts [splits, count], first to last, plus bias [rows]."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    for split in range(0, splits):
        total += tl.load(parts + split * count + i, mask=i < count, other=0.0)
    if bias is not None:
        total += tl.load(bias + i % rows, mask=i < count, other=0.0).to(tl.float32)
    tl.store(out + i, total.to(out.dtype.element_ty), mask=i < count)


@triton.jit
def pack_signs(x, out, x_rows, cols, x_stride, words, BM: tl.constexpr, BW: tl.constexpr):
    """out int32 [words, x_rows]: bit i of word w is x[32 w + i] >= 0, 0 beyond the columns."""
    m = tl.program_id(0) * BM + tl.arange(0, BM)
    word = tl.program_id(1) * BW + tl.arange(0, BW)
    x_row = m.to(tl.int64)[:, None] * x_stride
    bits = tl.zeros([BM, BW], tl.int32)
    for i in range(32):  # not a sum over an axis: interpreters of Triton up to 3.6 widen that to 64 bits, and store so
        column = word * 32 + i
        known = (m < x_rows)[:, None] & (column < cols)[None, :]
        taken = tl.load(x + x_row + column[None, :], mask=known, other=-1.0).to(tl.float32)
        bits = bits | ((taken >= 0).to(tl.int32) << i)
    place = word.to(tl.int64)[None, :] * x_rows + m[:, None]
    tl.store(out + place, bits, mask=(m < x_rows)[:, None] & (word < words)[None, :])


@triton.jit
def _population(v, HARDWARE: tl.constexpr):
    """Bits set in each int32."""
    if HARDWARE:
        return tl.inline_asm_elementwise("popc.b32 $0, $1;", "=r,r", [v], dtype=tl.int32, is_pure=True, pack=1)
    # In pairs, fours and bytes. Shifts fill with the sign, but only into bits that the masks remove.
    v = v - ((v >> 1) & 0x55555555)
    v = (v & 0x33333333) + ((v >> 2) & 0x33333333)
    v = (v + (v >> 4)) & 0x0F0F0F0F
    return (v * 0x01010101) >> 24


@triton.jit
def xnor_product(
    left, right, out, left_rows, right_rows, cols, words,
    BM: tl.constexpr, BN: tl.constexpr, HARDWARE: tl.constexpr,
):  # fmt: skip
    """out int32 [left_rows, right_rows] = cols - 2 * (signs that differ), from words [words, rows] of both."""
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    m = tl.program_id(1) * BM + tl.arange(0, BM)
    differ = tl.zeros([BM, BN], tl.int32)
    a_at, b_at = left + m, right + n
    for _ in range(0, words):
        a = tl.load(a_at, mask=m < left_rows, other=0)
        b = tl.load(b_at, mask=n < right_rows, other=0)
        differ += _population(a[:, None] ^ b[None, :], HARDWARE)
        a_at += left_rows
        b_at += right_rows
    place = m.to(tl.int64)[:, None] * right_rows + n[None, :]
    tl.store(out + place, cols - 2 * differ, mask=(m < left_rows)[:, None] & (n < right_rows)[None, :])
