#pragma once
// Integer weights against many inputs, in terms of simd.h. Included by integer_kernels.h alone.

#include "integer.h"
#include "simd.h"
#if defined(PENNYWEIGHT_AMX)
#include "tiles.h"
#endif

namespace pennyweight {
namespace {

constexpr std::size_t vectors = block_rows / width;    // of bytes in a block
constexpr std::size_t unit = 2 * lanes;                // rows that `tile` takes at once
constexpr std::size_t units = block_rows / unit;
constexpr std::size_t tile_rows = width == 64 ? 12 : 6;  // inputs that `tile` takes at once: what the registers hold

PENNYWEIGHT_INLINE std::size_t smaller(std::size_t a, std::size_t b) { return a < b ? a : b; }

static void split(const std::int16_t *q, std::size_t count, std::int8_t *low, std::int8_t *high) {
    for (std::size_t k = 0; k < count; ++k) low[k] = static_cast<std::int8_t>(static_cast<std::uint8_t>(q[k] & 255));
    if (high == nullptr) return;
    for (std::size_t k = 0; k < count; ++k) high[k] = static_cast<std::int8_t>((q[k] - static_cast<std::int8_t>(static_cast<std::uint8_t>(q[k] & 255))) >> 8);
}

// Planes of column bytes first .. last-1 as bytes: [column pairs][64][2], the arrangement of 8 bits.
template <std::size_t Bits>
static void unpack_planes(const std::uint8_t *planes, std::size_t first, std::size_t last, std::uint8_t *out) {
    for (std::size_t c = first; c < last; ++c, out += 8 * block_rows)
        for (std::size_t v = 0; v < vectors; ++v) {
            V plane[Bits], both[4];  // codes of columns i and i + 4, in the nibbles of a byte
            for (std::size_t p = 0; p < Bits; ++p) plane[p] = load(planes + (c * Bits + p) * block_rows + v * width);
            for (int i = 0; i < 4; ++i) {
                both[i] = bits_at(plane[0], i, 17);
                for (std::size_t p = 1; p < Bits; ++p) both[i] = or_shifted(both[i], bits_at(plane[p], i, 17), static_cast<int>(p));
            }
            for (std::size_t pair = 0; pair < 4; ++pair) {
                const V left = both[pair % 2 * 2], right = both[pair % 2 * 2 + 1];
                const V even = pair < 2 ? low_nibbles(left) : high_nibbles(left), odd = pair < 2 ? low_nibbles(right) : high_nibbles(right);
                std::uint8_t *to = out + (pair * block_rows + v * width) * 2;
                store_interleaved(reinterpret_cast<std::int16_t *>(to), interleave_low(even, odd), interleave_high(even, odd));
            }
        }
}

static void unpack(const std::uint8_t *planes, std::size_t bits, std::size_t first, std::size_t last, std::uint8_t *out) {
    switch (bits) {
        case 1: return unpack_planes<1>(planes, first, last, out);
        case 2: return unpack_planes<2>(planes, first, last, out);
        default: return unpack_planes<3>(planes, first, last, out);
    }
}

// Codes of columns k .. k+3 of some rows, from row `first` on, of a block of fours.
PENNYWEIGHT_INLINE V four_of(const Integers &w, std::size_t b, std::size_t k, std::size_t first) {
    const V both = load(w.block(b) + (k / 8 * block_rows + first) * 4);
    return k % 8 == 0 ? low_nibbles(both) : high_nibbles(both);
}

// A panel is [units][steps][unit][4 bytes]: a step takes four bytes of every input, two columns as int16 or four as bytes.
// `Kind::step` makes one of some unit from the arrangement of 8 bits, `Kind::four` what takes the four columns of two vectors.
template <typename Kind>
PENNYWEIGHT_INLINE void arrange_as(const Integers &w, std::size_t b, std::size_t first, std::size_t last, std::size_t steps, std::uint8_t *out) {
    const auto to = [&](std::size_t u, std::size_t k) { return out + (u * steps + (k - first) / Kind::columns) * 2 * width; };
    if (w.fours()) {
        for (std::size_t k = first; k < last; k += 4)
            for (std::size_t u = 0; u < units; ++u) Kind::four(four_of(w, b, k, u * unit), four_of(w, b, k, u * unit + lanes), to(u, k));
        return;
    }
    constexpr std::size_t some = 32;  // columns unpacked at once
    alignas(64) std::uint8_t unpacked[some * block_rows];
    for (std::size_t k0 = first; k0 < last; k0 += some) {
        const std::size_t k1 = smaller(last, k0 + some);
        const std::uint8_t *bytes = w.block(b) + k0 * block_rows;
        if (w.bits < 8) {
            unpack(w.block(b), w.bits, k0 / 8, k1 / 8, unpacked);
            bytes = unpacked;
        }
        for (std::size_t u = 0; u < units; ++u)
            for (std::size_t k = k0; k < k1; k += Kind::columns)
                Kind::step(bytes + (k - k0) * block_rows + u * width, to(u, k));
    }
}

template <typename Kind>
static void arrange(const Integers &w, std::size_t b, std::size_t first, std::size_t last, std::uint8_t *out) {
    arrange_as<Kind>(w, b, first, last, (last - first) / Kind::columns, out);
}

// acc += (or, if fresh, =) one unit of a panel times R inputs, whose rows lie `stride` bytes apart
template <typename Kind, std::size_t R>
PENNYWEIGHT_INLINE void tile(const std::uint8_t *panel, std::size_t steps, const std::uint8_t *x, std::size_t stride, std::size_t span, bool fresh, std::uint32_t *acc) {
    for (std::size_t stop; steps > 0; steps -= stop) {
        stop = smaller(steps, span);
        V sum[R][2];
        for (std::size_t r = 0; r < R; ++r)
            for (int half = 0; half < 2; ++half) sum[r][half] = Kind::begin(acc + r * block_rows + half * lanes, fresh);
        for (std::size_t k = 0; k < stop; ++k, panel += 2 * width, x += 4) {
            const V w0 = load(panel), w1 = load(panel + width);
            for (std::size_t r = 0; r < R; ++r) {
                const V q = broadcast32(x + r * stride);
                sum[r][0] = settled(Kind::add(sum[r][0], w0, q));
                sum[r][1] = settled(Kind::add(sum[r][1], w1, q));
            }
        }
        for (std::size_t r = 0; r < R; ++r)
            for (int half = 0; half < 2; ++half) Kind::end(sum[r][half], acc + r * block_rows + half * lanes, fresh);
        fresh = false;
    }
}

template <typename Kind>
static void multiply_panel(std::size_t bits, const std::uint8_t *panel, std::size_t columns, const Activations &a, std::size_t first, std::size_t rows, std::size_t k, bool fresh, std::uint32_t *acc) {
    const std::size_t steps = columns / Kind::columns, span = Kind::span(bits), stride = Kind::stride(a);
    const std::uint8_t *x = Kind::inputs(a) + first * stride + 4 * (k / Kind::columns);
    for (std::size_t u = 0; u < units; ++u, panel += steps * 2 * width, acc += unit) {
        std::size_t m = 0;
        for (; m + tile_rows <= rows; m += tile_rows) tile<Kind, tile_rows>(panel, steps, x + m * stride, stride, span, fresh, acc + m * block_rows);
        for (; m + 4 <= rows; m += 4) tile<Kind, 4>(panel, steps, x + m * stride, stride, span, fresh, acc + m * block_rows);
        for (; m + 2 <= rows; m += 2) tile<Kind, 2>(panel, steps, x + m * stride, stride, span, fresh, acc + m * block_rows);
        if (m < rows) tile<Kind, 1>(panel, steps, x + m * stride, stride, span, fresh, acc + m * block_rows);
    }
}

// Pairs of int16, for any weight and input.
struct Pairs {
    static constexpr std::size_t columns = 2;
    static std::size_t span(std::size_t) { return Panels::most_columns; }
    static std::size_t stride(const Activations &a) { return a.stride * sizeof(std::int16_t); }
    static const std::uint8_t *inputs(const Activations &a) { return reinterpret_cast<const std::uint8_t *>(a.q); }
    PENNYWEIGHT_INLINE void step(const std::uint8_t *from, std::uint8_t *to) {
        for (std::size_t half = 0; half < 2; ++half) store(to + half * width, widen(reinterpret_cast<const std::int8_t *>(from) + half * width / 2));
    }
    PENNYWEIGHT_INLINE void four(V first, V second, std::uint8_t *to) {
        for (int pair = 0; pair < 2; ++pair, to += 2 * width) {
            store(to, pair_of(first, pair));
            store(to + width, pair_of(second, pair));
        }
    }
    PENNYWEIGHT_INLINE V begin(const std::uint32_t *acc, bool fresh) { return fresh ? zero() : load(acc); }
    PENNYWEIGHT_INLINE V add(V sum, V weight, V q) { return multiply(sum, weight, q); }
    PENNYWEIGHT_INLINE void end(V sum, std::uint32_t *acc, bool) { store(acc, sum); }
};

constexpr Panels pairs = {0, 0, arrange<Pairs>, multiply_panel<Pairs>};

// Fours of unsigned bytes times signed ones. What is stored is unsigned up to 4 bits; at 8 bits it takes a shift by 128.
struct Fours {
    static constexpr std::size_t columns = 4;
    static std::size_t stride(const Activations &a) { return a.byte_stride; }
    static const std::uint8_t *inputs(const Activations &a) { return reinterpret_cast<const std::uint8_t *>(a.low); }
    PENNYWEIGHT_INLINE void four(V first, V second, std::uint8_t *to) {
        store(to, first);
        store(to + width, second);
    }
    PENNYWEIGHT_INLINE void step(const std::uint8_t *from, std::uint8_t *to) {
        const V first = load(from), second = load(from + 2 * block_rows);
        store_interleaved(reinterpret_cast<std::int16_t *>(to), interleave16_low(first, second), interleave16_high(first, second));
    }
#if defined(PENNYWEIGHT_VNNI)
    static std::size_t span(std::size_t) { return Panels::most_columns; }
    PENNYWEIGHT_INLINE V begin(const std::uint32_t *acc, bool fresh) { return fresh ? zero() : load(acc); }
    PENNYWEIGHT_INLINE V add(V sum, V weight, V q) { return multiply8(sum, weight, q); }
    PENNYWEIGHT_INLINE void end(V sum, std::uint32_t *acc, bool) { store(acc, sum); }
#else
    // Sums of two products in 16 bits: so many of them fit, whatever the codes and inputs are.
    static std::size_t span(std::size_t bits) { return 32767 / (2 * 128 * ((std::size_t(1) << bits) - 1)); }
    PENNYWEIGHT_INLINE V begin(const std::uint32_t *, bool) { return zero(); }
    PENNYWEIGHT_INLINE V add(V sum, V weight, V q) { return multiply8(sum, weight, q); }
    PENNYWEIGHT_INLINE void end(V sum, std::uint32_t *acc, bool fresh) { store(acc, multiply(fresh ? zero() : load(acc), sum, all16(1))); }
#endif
};

constexpr Panels fours = {1, 0, arrange<Fours>, multiply_panel<Fours>};

#if defined(PENNYWEIGHT_VNNI)
struct ShiftedFours : Fours {
    PENNYWEIGHT_INLINE void step(const std::uint8_t *from, std::uint8_t *to) {
        Fours::step(from, to);
        for (std::size_t half = 0; half < 2; ++half) store(to + half * width, add8(load(to + half * width), all8(-128)));
    }
};

constexpr Panels shifted_fours = {1, 128, arrange<ShiftedFours>, multiply_panel<ShiftedFours>};
#endif

#if defined(PENNYWEIGHT_AMX)

// How many columns one tile takes. The last tile of a panel is filled up with zeros.
PENNYWEIGHT_INLINE std::size_t tile_columns(std::size_t columns) { return smaller(columns, 64); }
PENNYWEIGHT_INLINE std::size_t tile_count(std::size_t columns) { return (columns + tile_columns(columns) - 1) / tile_columns(columns); }

static void arrange_tiles(const Integers &w, std::size_t b, std::size_t first, std::size_t last, std::uint8_t *out) {
    const std::size_t steps = (last - first) / 4, filled = tile_count(last - first) * tile_columns(last - first) / 4;
    arrange_as<Fours>(w, b, first, last, filled, out);
    for (std::size_t u = 0; u < units; ++u) std::memset(out + (u * filled + steps) * 2 * width, 0, (filled - steps) * 2 * width);
}

// Tiles 0 and 1 hold sums of the inputs in tile 4 with the two halves of a unit in tiles 6 and 7; tiles 2 and 3 the same
// of the inputs in tile 5: the next 16 of them (inputs of one byte), or the high bytes of those in tile 4.
template <int Parts>
static void multiply_tiles(std::size_t, const std::uint8_t *panel, std::size_t columns, const Activations &a, std::size_t first, std::size_t rows, std::size_t k, bool fresh, std::uint32_t *acc) {
    static_assert(unit == 32, "a unit is two tiles of 16 rows");
    constexpr std::size_t at_once = Parts == 1 ? 32 : 16, row = block_rows * sizeof(std::uint32_t), step = 2 * width;
    const std::size_t depth = tile_columns(columns), count = tile_count(columns);
    alignas(64) std::uint32_t high[16][unit];
    std::size_t shaped = 0;
    for (std::size_t m = 0; m < rows; m += at_once) {
        const std::size_t now = smaller(at_once, rows - m), upper = smaller(now, 16), lower = Parts == 1 ? now - upper : upper;
        if (now != shaped) {
            TileShapes shapes;
            shapes.set(4, upper, depth);
            shapes.set(5, lower, depth);
            for (int half = 0; half < 2; ++half) {
                shapes.set(half, upper, 64);
                shapes.set(2 + half, lower, 64);
                shapes.set(6 + half, depth / 4, 64);
            }
            tiles_configure(shapes);
            shaped = now;
        }
        const std::int8_t *x = a.low + (first + m) * a.byte_stride + k;
        const std::int8_t *next = Parts == 1 ? x + 16 * a.byte_stride : a.high + (first + m) * a.byte_stride + k;
        for (std::size_t u = 0; u < units; ++u) {
            const std::uint8_t *weights = panel + u * count * depth / 4 * step;
            std::uint32_t *sums = acc + m * block_rows + u * unit, *more = Parts == 1 ? sums + 16 * block_rows : high[0];
            if (fresh) {
                tile_zero(0);
                tile_zero(1);
            } else {
                tile_load(0, sums, row);
                tile_load(1, sums + 16, row);
            }
            if (lower > 0 && (fresh || Parts == 2)) {
                tile_zero(2);
                tile_zero(3);
            } else if (lower > 0) {
                tile_load(2, more, row);
                tile_load(3, more + 16, row);
            }
            for (std::size_t c = 0; c < count; ++c) {
                tile_load(4, x + c * depth, a.byte_stride);
                tile_load(6, weights + c * depth / 4 * step, step);
                tile_load(7, weights + c * depth / 4 * step + width, step);
                tile_multiply(0, 4, 6);
                tile_multiply(1, 4, 7);
                if (lower > 0) {
                    tile_load(5, next + c * depth, a.byte_stride);
                    tile_multiply(2, 5, 6);
                    tile_multiply(3, 5, 7);
                }
            }
            tile_store(0, sums, row);
            tile_store(1, sums + 16, row);
            if (lower > 0) {
                tile_store(2, more, Parts == 1 ? row : sizeof high[0]);
                tile_store(3, more + 16, Parts == 1 ? row : sizeof high[0]);
            }
            for (std::size_t r = 0; Parts == 2 && r < now; ++r)
                for (std::size_t i = 0; i < unit; ++i) sums[r * block_rows + i] += high[r][i] << 8;
        }
    }
    tiles_release();
}

constexpr Panels tiles_of_bytes = {1, 0, arrange_tiles, multiply_tiles<1>};
constexpr Panels tiles_of_two_bytes = {2, 0, arrange_tiles, multiply_tiles<2>};

#endif

static const Panels &panels(std::size_t bits, int activation_bits) {
#if defined(PENNYWEIGHT_AMX)
    static_cast<void>(bits);
    return activation_bits == 8 ? tiles_of_bytes : tiles_of_two_bytes;
#elif defined(PENNYWEIGHT_VNNI)
    return activation_bits != 8 ? pairs : bits == 8 ? shifted_fours : fours;
#else
    return activation_bits == 8 && bits < 8 ? fours : pairs;
#endif
}

}  // namespace
}  // namespace pennyweight
