#pragma once
// Kernels of integer weights, in terms of simd.h. Included by isa.cpp alone.

#include "integer.h"
#include "integer_panels.h"
#include "simd.h"

namespace pennyweight {
namespace {

static float largest_magnitude(const float *x, const float *column_scale, std::size_t cols, bool &finite) {
    // Magnitudes compare like the integers their bits are, which vectorises; NaN and infinity come out on top.
    std::uint32_t largest = 0;
    for (std::size_t k = 0; k < cols; ++k) {
        const float value = column_scale == nullptr ? x[k] : x[k] * column_scale[k];
        std::uint32_t bits;
        std::memcpy(&bits, &value, 4);
        bits &= 0x7fffffffu;
        largest = bits > largest ? bits : largest;
    }
    finite = largest < 0x7f800000u;
    float value;
    std::memcpy(&value, &largest, 4);
    return value;
}

// Sums in eight strands, so that the order of additions is the same whatever the vectors are.
static float sum_of(const float *a, const float *b, std::size_t count) {
    float strand[8] = {};
    std::size_t k = 0;
    for (; k + 8 <= count; k += 8)
        for (std::size_t i = 0; i < 8; ++i) strand[i] += b == nullptr ? a[k + i] : a[k + i] * b[k + i];
    for (std::size_t i = 0; k < count; ++k, ++i) strand[i] += b == nullptr ? a[k] : a[k] * b[k];
    return ((strand[0] + strand[4]) + (strand[1] + strand[5])) + ((strand[2] + strand[6]) + (strand[3] + strand[7]));
}

static void quantise(const Integers &w, const float *x, std::size_t first, std::size_t last, float largest, Activations &a) {
    constexpr float round = 12582912.0f;  // adding it leaves no fraction, as 2^23 <= it < 2^24
    const std::size_t padded = w.padded();
    for (std::size_t m = first; m < last; ++m) {
        const float *row = x + m * w.cols;
        std::int16_t *q = a.q + m * a.stride;
        bool finite;
        const float magnitude = largest_magnitude(row, w.column_scale, w.cols, finite);
        const bool flat = !finite || magnitude < 1e-30f;  // too small to divide by
        const float inverse = flat ? 0.0f : largest / magnitude;
        float nan;
        const std::uint32_t nan_bits = 0x7fc00000u;
        std::memcpy(&nan, &nan_bits, 4);
        a.step[m] = !finite ? nan : flat ? 0.0f : magnitude / largest;
        if (flat) {
            std::memset(q, 0, padded * sizeof(std::int16_t));
        } else {
            if (w.column_scale == nullptr)
                for (std::size_t k = 0; k < w.cols; ++k)
                    q[k] = static_cast<std::int16_t>(static_cast<std::int32_t>((row[k] * inverse + round) - round));
            else
                for (std::size_t k = 0; k < w.cols; ++k)
                    q[k] = static_cast<std::int16_t>(
                        static_cast<std::int32_t>((row[k] * w.column_scale[k] * inverse + round) - round));
            for (std::size_t k = w.cols; k < padded; ++k) q[k] = 0;
        }
        for (std::size_t g = 0; g < a.groups; ++g) {
            const std::size_t begin = g * w.group, end = smaller(begin + w.group, padded);
            std::int32_t sum = 0;  // at most 2^31 / 2^15 columns are summed exactly, more wrap around as all else does
            for (std::size_t k = begin; k < end; ++k)
                sum = static_cast<std::int32_t>(static_cast<std::uint32_t>(sum) + static_cast<std::uint32_t>(static_cast<std::int32_t>(q[k])));
            a.sum[m * a.groups + g] = static_cast<std::uint32_t>(sum);
            if (a.total != nullptr) a.total[m * a.groups + g] = sum_of(row + begin, nullptr, smaller(end, w.cols) - begin);
        }
        a.offset[m] = w.column_offset == nullptr ? 0.0f : sum_of(row, w.column_offset, w.cols);
    }
}

// A sum of four inputs lies in -512 .. 511. It is kept as two bytes below 32, `fine` and `coarse`: the sum is
// fine + 32 * coarse - 512. Eight of each add up in a byte, so only every eighth is widened. Sums carry their offset until
// the end of a group: that way they are never negative, and `span` of them fit 16 bits.
constexpr std::uint32_t table_offset = 512;
constexpr std::size_t bytewise = 4;  // column bytes, of two look-ups, whose fine and coarse parts add up in bytes
constexpr std::size_t short_span = 65535 / (3 * 2 * (2 * table_offset - 1));  // column bytes of which two planes, weighted 1 and 2, fit 16 bits

using Sums = std::int16_t __attribute__((vector_size(32)));
using Bytes = std::uint8_t __attribute__((vector_size(16)));

static void tables(const std::int16_t *q, std::size_t cols, int part, std::uint8_t *out) {
    constexpr Sums chosen[4] = {  // whether a choice takes that input
        {0, -1, 0, -1, 0, -1, 0, -1, 0, -1, 0, -1, 0, -1, 0, -1},
        {0, 0, -1, -1, 0, 0, -1, -1, 0, 0, -1, -1, 0, 0, -1, -1},
        {0, 0, 0, 0, -1, -1, -1, -1, 0, 0, 0, 0, -1, -1, -1, -1},
        {0, 0, 0, 0, 0, 0, 0, 0, -1, -1, -1, -1, -1, -1, -1, -1},
    };
    for (std::size_t k = 0; k < cols; k += 4, out += 32) {
        Sums sum = {};
        sum += static_cast<std::int16_t>(table_offset);
        for (int i = 0; i < 4; ++i) {
            const std::int16_t low = static_cast<std::int8_t>(static_cast<std::uint8_t>(q[k + i] & 255));
            const std::int16_t x = part == 0 ? q[k + i] : part == 1 ? low : static_cast<std::int16_t>((q[k + i] - low) >> 8);
            sum += chosen[i] & x;
        }
        const Bytes fine = __builtin_convertvector(sum & 31, Bytes), coarse = __builtin_convertvector(sum >> 5, Bytes);
        std::memcpy(out, &fine, 16);
        std::memcpy(out + 16, &coarse, 16);
    }
}

// What the tables add to the sums of `columns` columns, all planes together.
PENNYWEIGHT_INLINE std::uint32_t offset_of(std::size_t columns, std::size_t bits, int parts) {
    return static_cast<std::uint32_t>(columns / 4) * table_offset * ((1u << bits) - 1) * (parts == 2 ? 257 : 1);
}

// fine += , coarse += what `count` column bytes of a plane choose
PENNYWEIGHT_INLINE void choose(const std::uint8_t *codes, std::size_t stride, const std::uint8_t *tables, std::size_t count, V *fine, V *coarse) {
    for (std::size_t i = 0; i < count; ++i, codes += stride, tables += 64) {
        const V fine0 = table(tables), coarse0 = table(tables + 16), fine1 = table(tables + 32), coarse1 = table(tables + 48);
        for (std::size_t v = 0; v < vectors; ++v) {
            const V code = load(codes + v * width);
            const V choice0 = low_nibbles(code), choice1 = high_nibbles(code);
            fine[v] = settled(add8(fine[v], add8(lookup(fine0, choice0), lookup(fine1, choice1))));
            coarse[v] = settled(add8(coarse[v], add8(lookup(coarse0, choice0), lookup(coarse1, choice1))));
        }
    }
}

// low, high += what column bytes choose: 16-bit sums of the rows that join_low and join_high bring together
PENNYWEIGHT_INLINE void add_plane(const std::uint8_t *codes, std::size_t stride, const std::uint8_t *tables, std::size_t count, V *low, V *high) {
    for (std::size_t c = 0; c < count; c += bytewise) {
        V fine[vectors], coarse[vectors];
        for (std::size_t v = 0; v < vectors; ++v) fine[v] = coarse[v] = zero();
        if (c + bytewise <= count)
            choose(codes + c * stride, stride, tables + c * 64, bytewise, fine, coarse);
        else
            choose(codes + c * stride, stride, tables + c * 64, count - c, fine, coarse);
        for (std::size_t v = 0; v < vectors; ++v) {
            low[v] = add16(low[v], join_low(fine[v], coarse[v]));
            high[v] = add16(high[v], join_high(fine[v], coarse[v]));
        }
    }
}

// acc += (or, if fresh, =) (planes . q + offset) << shift for column bytes first .. last-1, by tables of one input
PENNYWEIGHT_INLINE void look_up(const std::uint8_t *block, std::size_t bits, std::size_t first, std::size_t last, const std::uint8_t *tables, std::size_t shift, bool fresh, std::uint32_t *acc) {
    const std::size_t stride = bits * block_rows;
    const std::size_t together = last - first <= short_span ? 2 : 1;  // planes that share their 16-bit sums
    for (std::size_t stop; first < last; first = stop) {
        stop = smaller(last, first + span);
        for (std::size_t plane = 0; plane < bits; plane += together) {
            const std::uint8_t *codes = block + first * stride + plane * block_rows;
            V low[vectors], high[vectors];
            for (std::size_t v = 0; v < vectors; ++v) low[v] = high[v] = zero();
            if (together == 2 && plane + 1 < bits) {
                add_plane(codes + block_rows, stride, tables + first * 64, stop - first, low, high);
                for (std::size_t v = 0; v < vectors; ++v) {
                    low[v] = add16(low[v], low[v]);
                    high[v] = add16(high[v], high[v]);
                }
            }
            add_plane(codes, stride, tables + first * 64, stop - first, low, high);
            alignas(64) std::uint16_t sums[block_rows];
            for (std::size_t v = 0; v < vectors; ++v) store_interleaved(reinterpret_cast<std::int16_t *>(sums) + v * width, low[v], high[v]);
            if (fresh)
                for (std::size_t r = 0; r < block_rows; ++r) acc[r] = static_cast<std::uint32_t>(sums[r]) << (plane + shift);
            else
                for (std::size_t r = 0; r < block_rows; ++r) acc[r] += static_cast<std::uint32_t>(sums[r]) << (plane + shift);
            fresh = false;
        }
    }
}

// acc = bytes . q for column pairs first .. last-1 of one input
PENNYWEIGHT_INLINE void dot_bytes(const std::uint8_t *block, std::size_t first, std::size_t last, const std::int16_t *q, std::uint32_t *acc) {
    constexpr std::size_t all = block_rows / lanes;
    V sum[all];
    for (std::size_t v = 0; v < all; ++v) sum[v] = zero();
    for (std::size_t k = first; k < last; ++k) {
        const std::int8_t *codes = reinterpret_cast<const std::int8_t *>(block) + k * 2 * block_rows;
        const V x = broadcast32(q + 2 * k);
        for (std::size_t v = 0; v < all; ++v) sum[v] = multiply(sum[v], widen(codes + v * width / 2), x);
    }
    for (std::size_t v = 0; v < all; ++v) store(acc + v * lanes, sum[v]);
}

// acc += (or, if fresh, =) (fours . x) << shift for columns first .. last-1 of one input, whose bytes x are
static void multiply_fours(const Integers &w, std::size_t b, std::size_t first, std::size_t last, const std::int8_t *x, int shift, bool fresh, std::uint32_t *acc) {
    constexpr std::size_t all = block_rows / lanes, at_once = all < 4 ? all : 4;
    const std::size_t steps = (last - first) / 8, together = smaller(steps, Fours::span(4) / 2);  // two sums a step
    const std::uint8_t *const block = w.block(b) + first / 8 * block_rows * 4;
    alignas(64) std::uint32_t sums[block_rows];
    for (std::size_t v = 0; v < all; v += at_once)
        for (std::size_t done = 0, stop; done < steps; done = stop) {
            stop = smaller(steps, done + together);
            V sum[at_once];
            for (std::size_t r = 0; r < at_once; ++r) sum[r] = Fours::begin(sums + (v + r) * lanes, done == 0);
            for (std::size_t s = done; s < stop; ++s) {
                const V q0 = broadcast32(x + first + s * 8), q1 = broadcast32(x + first + s * 8 + 4);
                for (std::size_t r = 0; r < at_once; ++r) {
                    const V codes = load(block + s * block_rows * 4 + (v + r) * width);
                    sum[r] = settled(Fours::add(Fours::add(sum[r], low_nibbles(codes), q0), high_nibbles(codes), q1));
                }
            }
            for (std::size_t r = 0; r < at_once; ++r) Fours::end(sum[r], sums + (v + r) * lanes, done == 0);
        }
    for (std::size_t r = 0; r < block_rows; ++r) acc[r] = fresh ? sums[r] : acc[r] + (sums[r] << shift);
}

// Totals are in units of x, all else in units of the row's step.
PENNYWEIGHT_INLINE float total_of(const Integers &w, const Activations &a, std::size_t m, std::size_t g) {
    return w.minimum == nullptr || a.step[m] == 0.0f ? 0.0f : a.total[m * a.groups + g] / a.step[m];
}

// y[64] += what acc[64] means in a group, from which factor * acc counts what is stored too high by zero_sum
PENNYWEIGHT_INLINE void add_group(const Integers &w, const Activations &a, std::size_t b, std::size_t g, std::size_t m, std::uint32_t zero_sum, const std::uint32_t *__restrict acc, float *__restrict y) {
    const std::size_t at = (b * a.groups + g) * block_rows;
    const float *__restrict const scale = w.scale + at;
    const unsigned doubled = static_cast<unsigned>(w.factor - 1);  // shifts are quicker than products
    for (std::size_t r = 0; r < block_rows; ++r)
        y[r] += scale[r] * static_cast<float>(static_cast<std::int32_t>((acc[r] << doubled) - zero_sum));
    if (w.minimum == nullptr) return;
    const float *__restrict const minimum = w.minimum + at;
    const float total = total_of(w, a, m, g);
    for (std::size_t r = 0; r < block_rows; ++r) y[r] += minimum[r] * total;
}

static void one_input(const Integers &w, std::size_t b, const Activations &a, std::size_t m, const std::uint8_t *tables, int parts, float *y) {
    const std::uint8_t *block = w.block(b);
    const std::size_t padded = w.padded();
    const std::uint32_t factor = static_cast<std::uint32_t>(w.factor), zero_code = static_cast<std::uint32_t>(w.zero);
    for (std::size_t g = 0; g < a.groups; ++g) {
        const std::size_t first = g * w.group, last = smaller(first + w.group, padded);
        std::uint32_t zero_sum = zero_code * a.sum[m * a.groups + g];
        alignas(64) std::uint32_t acc[block_rows];
        if (w.bits == 8) {
            dot_bytes(block, first / 2, last / 2, a.q + m * a.stride, acc);
        } else if (w.fours()) {
            multiply_fours(w, b, first, last, a.low + m * a.byte_stride, 0, true, acc);
            if (parts == 2) multiply_fours(w, b, first, last, a.high + m * a.byte_stride, 8, false, acc);
        } else {
            look_up(block, w.bits, first / 8, last / 8, tables, 0, true, acc);
            if (parts == 2) look_up(block, w.bits, first / 8, last / 8, tables + padded * 8, 8, false, acc);
            zero_sum += factor * offset_of(last - first, w.bits, parts);
        }
        add_group(w, a, b, g, m, zero_sum, acc, y);
    }
}

static void end_group(const Integers &w, std::size_t b, std::size_t g, std::int32_t shift, const Activations &a, std::size_t first, std::size_t last, const std::uint32_t *acc, float *y) {
    const std::uint32_t zero_code = static_cast<std::uint32_t>(w.zero + w.factor * shift);
    for (std::size_t m = first; m < last; ++m, acc += block_rows, y += block_rows)
        add_group(w, a, b, g, m, zero_code * a.sum[m * a.groups + g], acc, y);
}

PENNYWEIGHT_INLINE std::int32_t byte_at(const Integers &w, std::size_t b, std::size_t r, std::size_t k) {
    return static_cast<std::int8_t>(w.block(b)[(k / 2 * block_rows + r) * 2 + k % 2]);
}

PENNYWEIGHT_INLINE float value_of(const Integers &w, std::int32_t code, std::size_t scale_at, std::size_t k) {
    float value = static_cast<float>(code) * w.scale[scale_at];
    if (w.column_scale != nullptr) value *= w.column_scale[k];
    if (w.minimum != nullptr) value += w.minimum[scale_at];
    if (w.column_offset != nullptr) value += w.column_offset[k];
    return value;
}

static void decode(const Integers &w, std::size_t b, std::size_t first, std::size_t last, float *out, std::size_t stride) {
    const std::size_t groups = w.groups(), padded = w.padded(), near = w.fours() ? 4 : 2;  // columns whose codes lie together
    alignas(64) std::uint8_t unpacked[8 * block_rows];
    alignas(64) float values[block_rows * 8];  // [8 / near][row][near]
    for (std::size_t k0 = 0; k0 < padded; k0 += 8) {
        const std::size_t at = (b * groups + k0 / w.group) * block_rows, count = smaller(8, w.cols - k0);
        const std::uint8_t *bytes = w.bits == 8 ? w.block(b) + k0 * block_rows : unpacked;
        if (w.planes()) unpack(w.block(b), w.bits, k0 / 8, k0 / 8 + 1, unpacked);
        for (std::size_t k = 0; w.fours() && k < 8; k += 4) {
            for (std::size_t r = 0; r < block_rows; r += lanes) store(unpacked + (k * block_rows + 4 * r), four_of(w, b, k0 + k, r));
        }
        const std::int8_t *codes = reinterpret_cast<const std::int8_t *>(bytes);
        for (std::size_t i = 0; i < 8 * block_rows; ++i) values[i] = static_cast<float>(w.factor * codes[i] - w.zero);
        for (std::size_t r = first; r < last; ++r) {
            const float scale = w.scale[at + r];
            float *row = out + (r - first) * stride + k0;
            for (std::size_t k = 0; k < count; ++k) {
                float value = values[(k / near * block_rows + r) * near + k % near] * scale;
                if (w.column_scale != nullptr) value *= w.column_scale[k0 + k];
                if (w.minimum != nullptr) value += w.minimum[at + r];
                if (w.column_offset != nullptr) value += w.column_offset[k0 + k];
                row[k] = value;
            }
        }
    }
    if (w.escape_start == nullptr) return;
    for (std::int32_t e = w.escape_start[b]; e < w.escape_start[b + 1]; ++e) {
        const std::size_t r = static_cast<std::size_t>(w.escape_row[e]), k = static_cast<std::size_t>(w.escape_column[e]);
        if (r < first || r >= last) continue;
        const std::int32_t code = w.factor * byte_at(w, b, r, k) - w.zero + w.escape_extra[e];
        out[(r - first) * stride + k] = value_of(w, code, (b * groups + k / w.group) * block_rows + r, k);
    }
}

constexpr IntegerKernels integer_kernels = {quantise, split, tables, one_input, panels, end_group, decode};

}  // namespace
}  // namespace pennyweight
