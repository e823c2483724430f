#pragma once
// Kernels of signs. Included by isa.cpp alone.
//
// Two ways to count the bits in which 64 outputs and an input differ; neither ever adds across a vector.
//
//     by look-up    AVX2 and AVX-512 without VPOPCNTDQ. A byte of the panel holds four columns of one output. Four columns
//                   of the input choose a table of sixteen counts, so that one shuffle and one addition of bytes do
//                   4 * width multiply-adds; exclusive or, two shuffles and the arithmetic around them would do half.
//     by words      elsewhere. The panel holds a word of each output; exclusive or, population count, addition.

#include "binary.h"
#include "simd.h"

namespace pennyweight {
namespace {

#if defined(PENNYWEIGHT_AVX2) || (defined(PENNYWEIGHT_AVX512) && !defined(PENNYWEIGHT_VNNI))
#define PENNYWEIGHT_BINARY_BY_LOOKUP
#endif

constexpr std::size_t block_vectors = binary_block / width;  // of bytes

// --- exclusive or and counts of whole rows ---

#if defined(PENNYWEIGHT_AVX512)

PENNYWEIGHT_INLINE V differ(V a, V b) { return _mm512_xor_si512(a, b); }
PENNYWEIGHT_INLINE V add8(V a, V b) { return _mm512_add_epi8(a, b); }
PENNYWEIGHT_INLINE V add64(V a, V b) { return _mm512_add_epi64(a, b); }
PENNYWEIGHT_INLINE V sums_of_bytes(V v) { return _mm512_sad_epu8(v, _mm512_setzero_si512()); }
#if defined(PENNYWEIGHT_BINARY_BY_LOOKUP)
PENNYWEIGHT_INLINE V even_bytes(V v) { return _mm512_and_si512(v, _mm512_set1_epi16(255)); }
PENNYWEIGHT_INLINE V odd_bytes(V v) { return _mm512_srli_epi16(v, 8); }
#endif

#elif defined(PENNYWEIGHT_AVX2)

PENNYWEIGHT_INLINE V differ(V a, V b) { return _mm256_xor_si256(a, b); }
PENNYWEIGHT_INLINE V add8(V a, V b) { return _mm256_add_epi8(a, b); }
PENNYWEIGHT_INLINE V add64(V a, V b) { return _mm256_add_epi64(a, b); }
PENNYWEIGHT_INLINE V sums_of_bytes(V v) { return _mm256_sad_epu8(v, _mm256_setzero_si256()); }
PENNYWEIGHT_INLINE V even_bytes(V v) { return _mm256_and_si256(v, _mm256_set1_epi16(255)); }
PENNYWEIGHT_INLINE V odd_bytes(V v) { return _mm256_srli_epi16(v, 8); }

#elif defined(PENNYWEIGHT_NEON)

PENNYWEIGHT_INLINE V differ(V a, V b) { return veorq_u8(a, b); }
PENNYWEIGHT_INLINE V add8(V a, V b) { return vaddq_u8(a, b); }
PENNYWEIGHT_INLINE V add64(V a, V b) {
    return vreinterpretq_u8_u64(vaddq_u64(vreinterpretq_u64_u8(a), vreinterpretq_u64_u8(b)));
}
PENNYWEIGHT_INLINE V sums_of_bytes(V v) { return vreinterpretq_u8_u64(vpaddlq_u32(vpaddlq_u16(vpaddlq_u8(v)))); }

#endif

// The bits in which two rows differ, for `differences`: `counted` gives counts that up to `most_counted` may be added
// with `add_counted` before `count_of` makes a number of them.
#if defined(PENNYWEIGHT_VNNI)

constexpr std::size_t most_counted = std::size_t(1) << 31;
PENNYWEIGHT_INLINE V counted(V v) { return _mm512_popcnt_epi64(v); }
PENNYWEIGHT_INLINE V add_counted(V a, V b) { return add64(a, b); }
PENNYWEIGHT_INLINE V words_of(V v) { return v; }

#elif defined(PENNYWEIGHT_BINARY_BY_LOOKUP)

constexpr std::size_t most_counted = 31;
PENNYWEIGHT_INLINE V counted(V v) {
    alignas(16) static const std::uint8_t bits[16] = {0, 1, 1, 2, 1, 2, 2, 3, 1, 2, 2, 3, 2, 3, 3, 4};
    return add8(lookup(table(bits), low_nibbles(v)), lookup(table(bits), high_nibbles(v)));
}
PENNYWEIGHT_INLINE V add_counted(V a, V b) { return add8(a, b); }
PENNYWEIGHT_INLINE V words_of(V v) { return sums_of_bytes(v); }

#elif defined(PENNYWEIGHT_NEON)

constexpr std::size_t most_counted = 31;
PENNYWEIGHT_INLINE V counted(V v) { return vcntq_u8(v); }
PENNYWEIGHT_INLINE V add_counted(V a, V b) { return add8(a, b); }
PENNYWEIGHT_INLINE V words_of(V v) { return sums_of_bytes(v); }

#endif

#if defined(PENNYWEIGHT_AVX2) || defined(PENNYWEIGHT_AVX512) || defined(PENNYWEIGHT_NEON)

template <std::size_t N>
PENNYWEIGHT_INLINE void differences_of(const std::uint64_t *x, const std::uint64_t *w, std::size_t stride, std::size_t words, std::uint32_t *counts) {
    constexpr std::size_t step = width / 8;
    const std::size_t whole = words / step;
    V total[N];
    for (std::size_t n = 0; n < N; ++n) total[n] = zero();
    for (std::size_t i = 0; i < whole;) {
        const std::size_t stop = whole - i < most_counted ? whole : i + most_counted;
        V sum[N];
        for (std::size_t n = 0; n < N; ++n) sum[n] = zero();
        for (; i < stop; ++i) {
            const V a = load(x + i * step);
            for (std::size_t n = 0; n < N; ++n) sum[n] = add_counted(sum[n], counted(differ(a, load(w + n * stride + i * step))));
        }
        for (std::size_t n = 0; n < N; ++n) total[n] = add64(total[n], words_of(sum[n]));
    }
    for (std::size_t n = 0; n < N; ++n) {
        std::uint64_t lane[step], sum = 0;
        store(lane, total[n]);
        for (std::size_t i = 0; i < step; ++i) sum += lane[i];
        for (std::size_t i = whole * step; i < words; ++i) sum += static_cast<std::uint64_t>(__builtin_popcountll(x[i] ^ w[n * stride + i]));
        counts[n] += static_cast<std::uint32_t>(sum);
    }
}

#else

template <std::size_t N>
PENNYWEIGHT_INLINE void differences_of(const std::uint64_t *x, const std::uint64_t *w, std::size_t stride, std::size_t words, std::uint32_t *counts) {
    for (std::size_t n = 0; n < N; ++n)
        for (std::size_t i = 0; i < words; ++i) counts[n] += static_cast<std::uint32_t>(__builtin_popcountll(x[i] ^ w[n * stride + i]));
}

#endif

static void differences(const std::uint64_t *x, const std::uint64_t *w, std::size_t stride, std::size_t outputs, std::size_t words, std::uint32_t *counts) {
    std::size_t o = 0;
    for (; o + 4 <= outputs; o += 4) differences_of<4>(x, w + o * stride, stride, words, counts + o);
    for (; o < outputs; ++o) differences_of<1>(x, w + o * stride, stride, words, counts + o);
}

// --- products of blocks ---

#if defined(PENNYWEIGHT_BINARY_BY_LOOKUP)

constexpr std::size_t binary_input_bytes = 16;  // a byte for four columns, 16 times their bits: where their table begins
constexpr std::size_t most_added = 63;          // counts up to 4 whose sum fits a byte
constexpr std::size_t binary_rows = width == 64 ? 12 : 6;

struct Tables {
    std::uint8_t bits[16][16];
    constexpr Tables() : bits() {
        for (int a = 0; a < 16; ++a)
            for (int b = 0; b < 16; ++b)
                for (int difference = a ^ b; difference != 0; difference >>= 1) bits[a][b] = static_cast<std::uint8_t>(bits[a][b] + (difference & 1));
    }
};
alignas(64) static constexpr Tables tables_of_differences{};

static void expand_signs(const std::uint64_t *x, std::size_t words, std::uint8_t *out) {
    const std::uint8_t *bytes = reinterpret_cast<const std::uint8_t *>(x);
    for (std::size_t i = 0; i < words * 8; ++i) {
        out[2 * i] = static_cast<std::uint8_t>(bytes[i] << 4);
        out[2 * i + 1] = bytes[i] & 0xf0;
    }
}

// [four columns][64 outputs] bytes
static void sign_panel(const std::uint64_t *w, std::size_t stride, std::size_t outputs, std::size_t words, std::uint8_t *out) {
    const __m128i low = _mm_set1_epi8(15);
    for (std::size_t k = 0; k < words; ++k, out += 16 * binary_block)
        for (std::size_t o = 0; o < binary_block; o += 16) {
            __m128i a[16], b[8];
            for (std::size_t i = 0; i < 16; ++i) a[i] = o + i < outputs ? _mm_cvtsi64_si128(static_cast<long long>(w[(o + i) * stride + k])) : _mm_setzero_si128();
            // Transposes 16 rows of 8 bytes: each step puts rows side by side that are half as far apart as before.
            for (int i = 0; i < 8; ++i) b[i] = _mm_unpacklo_epi8(a[i], a[i + 8]);
            for (int i = 0; i < 4; ++i) {
                a[2 * i] = _mm_unpacklo_epi8(b[i], b[i + 4]);
                a[2 * i + 1] = _mm_unpackhi_epi8(b[i], b[i + 4]);
            }
            for (int i = 0; i < 2; ++i)
                for (int part = 0; part < 2; ++part) {
                    b[4 * i + 2 * part] = _mm_unpacklo_epi8(a[2 * i + part], a[2 * (i + 2) + part]);
                    b[4 * i + 2 * part + 1] = _mm_unpackhi_epi8(a[2 * i + part], a[2 * (i + 2) + part]);
                }
            for (int part = 0; part < 4; ++part) {
                a[2 * part] = _mm_unpacklo_epi8(b[part], b[part + 4]);
                a[2 * part + 1] = _mm_unpackhi_epi8(b[part], b[part + 4]);
            }
            for (int i = 0; i < 8; ++i) {
                _mm_storeu_si128(reinterpret_cast<__m128i *>(out + (2 * i) * binary_block + o), _mm_and_si128(a[i], low));
                _mm_storeu_si128(reinterpret_cast<__m128i *>(out + (2 * i + 1) * binary_block + o), _mm_and_si128(_mm_srli_epi16(a[i], 4), low));
            }
        }
}

// Sums of bytes are kept as 16-bit sums of the even outputs of a vector, then of the odd ones.
template <std::size_t R>
PENNYWEIGHT_INLINE void sign_tile(const std::uint8_t *panel, const std::uint8_t *const *inputs, std::size_t step, std::size_t taps, std::size_t offset,
                                  std::size_t words, std::uint16_t *acc) {
    const std::uint8_t *tables = &tables_of_differences.bits[0][0];
    V sum[R][block_vectors];
    for (std::size_t r = 0; r < R; ++r)
        for (std::size_t v = 0; v < block_vectors; ++v) sum[r][v] = zero();
    std::size_t room = most_added;
    const auto flush = [&]() __attribute__((always_inline)) {
        for (std::size_t r = 0; r < R; ++r)
            for (std::size_t v = 0; v < block_vectors; ++v) {
                std::uint16_t *to = acc + r * binary_block + v * width;
                store(to, add16(load(to), even_bytes(sum[r][v])));
                store(to + width / 2, add16(load(to + width / 2), odd_bytes(sum[r][v])));
                sum[r][v] = zero();
            }
        room = most_added;
    };
    for (std::size_t t = 0; t < taps; ++t) {
        const std::uint8_t *input[R];
        for (std::size_t r = 0; r < R; ++r) input[r] = inputs[r * step + t] + offset;
        for (std::size_t k = 0, end = words * binary_input_bytes; k < end;) {
            if (room == 0) flush();
            const std::size_t stop = end - k < room ? end : k + room;
            room -= stop - k;
            for (; k < stop; ++k, panel += binary_block) {
                V w[block_vectors];
                for (std::size_t v = 0; v < block_vectors; ++v) w[v] = load(panel + v * width);
                for (std::size_t r = 0; r < R; ++r) {
                    const V differences = table(tables + input[r][k]);
                    for (std::size_t v = 0; v < block_vectors; ++v) sum[r][v] = add8(sum[r][v], lookup(differences, w[v]));
                }
            }
        }
    }
    flush();
}

// acc in the order of the outputs
PENNYWEIGHT_INLINE const std::uint16_t *in_order(const std::uint16_t *acc, std::uint16_t *out) {
    for (std::size_t v = 0; v < binary_block; v += width) {
        const V even = load(acc + v), odd = load(acc + v + width / 2);
        store_interleaved(reinterpret_cast<std::int16_t *>(out + v), interleave16_low(even, odd), interleave16_high(even, odd));
    }
    return out;
}

#else

constexpr std::size_t binary_input_bytes = 8;
constexpr std::size_t binary_rows = 4;

// The word of an input beside the words of as many outputs as a vector holds.
#if defined(PENNYWEIGHT_VNNI) || defined(PENNYWEIGHT_NEON)

using Words = V;
PENNYWEIGHT_INLINE Words load_words(const std::uint64_t *from) { return load(from); }
PENNYWEIGHT_INLINE Words no_words() { return zero(); }
PENNYWEIGHT_INLINE Words add_differences(Words sum, Words a, Words b) { return add_counted(sum, counted(differ(a, b))); }
PENNYWEIGHT_INLINE void store_counts(std::uint64_t *to, Words sum) { store(to, words_of(sum)); }
PENNYWEIGHT_INLINE Words same_word(const std::uint8_t *from) {
    std::uint64_t word;
    std::memcpy(&word, from, 8);
#if defined(PENNYWEIGHT_VNNI)
    return _mm512_set1_epi64(static_cast<long long>(word));
#else
    return vreinterpretq_u8_u64(vdupq_n_u64(word));
#endif
}

#else

using Words = std::uint64_t;
PENNYWEIGHT_INLINE Words load_words(const std::uint64_t *from) { return *from; }
PENNYWEIGHT_INLINE Words no_words() { return 0; }
PENNYWEIGHT_INLINE Words add_differences(Words sum, Words a, Words b) { return sum + static_cast<Words>(__builtin_popcountll(a ^ b)); }
PENNYWEIGHT_INLINE void store_counts(std::uint64_t *to, Words sum) { *to = sum; }
PENNYWEIGHT_INLINE Words same_word(const std::uint8_t *from) {
    Words word;
    std::memcpy(&word, from, 8);
    return word;
}

#endif

constexpr std::size_t words_in_vector = sizeof(Words) / 8, tile_vectors = 4, tile_outputs = tile_vectors * words_in_vector;

// [outputs of a tile][words][outputs]
static void sign_panel(const std::uint64_t *w, std::size_t stride, std::size_t outputs, std::size_t words, std::uint8_t *out) {
    std::uint64_t *to = reinterpret_cast<std::uint64_t *>(out);
    for (std::size_t first = 0; first < binary_block; first += tile_outputs)
        for (std::size_t k = 0; k < words; ++k)
            for (std::size_t o = first; o < first + tile_outputs; ++o) *to++ = o < outputs ? w[o * stride + k] : 0;
}

template <std::size_t R>
PENNYWEIGHT_INLINE void sign_tile(const std::uint8_t *panel, const std::uint8_t *const *inputs, std::size_t step, std::size_t taps, std::size_t offset,
                                  std::size_t words, std::uint16_t *acc) {
    const std::uint64_t *w = reinterpret_cast<const std::uint64_t *>(panel);
    for (std::size_t first = 0; first < binary_block; first += tile_outputs) {
        Words sum[R][tile_vectors];
        for (std::size_t r = 0; r < R; ++r)
            for (std::size_t v = 0; v < tile_vectors; ++v) sum[r][v] = no_words();
        for (std::size_t t = 0; t < taps; ++t) {
            const std::uint8_t *input[R];
            for (std::size_t r = 0; r < R; ++r) input[r] = inputs[r * step + t] + offset;
            for (std::size_t k = 0; k < words; ++k, w += tile_outputs) {
                Words part[tile_vectors];
                for (std::size_t v = 0; v < tile_vectors; ++v) part[v] = load_words(w + v * words_in_vector);
                for (std::size_t r = 0; r < R; ++r) {
                    const Words x = same_word(input[r] + 8 * k);
                    for (std::size_t v = 0; v < tile_vectors; ++v) sum[r][v] = add_differences(sum[r][v], x, part[v]);
                }
            }
        }
        for (std::size_t r = 0; r < R; ++r) {
            std::uint64_t counts[tile_outputs];
            for (std::size_t v = 0; v < tile_vectors; ++v) store_counts(counts + v * words_in_vector, sum[r][v]);
            std::uint16_t *to = acc + r * binary_block + first;
            for (std::size_t o = 0; o < tile_outputs; ++o) to[o] = static_cast<std::uint16_t>(to[o] + counts[o]);
        }
    }
}

PENNYWEIGHT_INLINE const std::uint16_t *in_order(const std::uint16_t *acc, std::uint16_t *) { return acc; }

#endif

static void widen_signs(std::uint16_t *acc, std::uint32_t *counts) {
    alignas(64) std::uint16_t room[binary_block];
    const std::uint16_t *ordered = in_order(acc, room);
    for (std::size_t o = 0; o < binary_block; ++o) counts[o] += ordered[o];
    for (std::size_t o = 0; o < binary_block; ++o) acc[o] = 0;
}

static void multiply_signs(const std::uint8_t *panel, const std::uint8_t *const *inputs, std::size_t step, std::size_t count, std::size_t taps,
                           std::size_t offset, std::size_t words, std::uint16_t *acc) {
    std::size_t i = 0;
    for (; i + binary_rows <= count; i += binary_rows) sign_tile<binary_rows>(panel, inputs + i * step, step, taps, offset, words, acc + i * binary_block);
    for (; i + 2 <= count; i += 2) sign_tile<2>(panel, inputs + i * step, step, taps, offset, words, acc + i * binary_block);
    for (; i < count; ++i) sign_tile<1>(panel, inputs + i * step, step, taps, offset, words, acc + i * binary_block);
}

// --- signs of floats, and what becomes of products ---

// Bits of `lanes` comparisons, the first in the lowest. A comparison with NaN is false.
#if defined(PENNYWEIGHT_AVX512)

PENNYWEIGHT_INLINE std::uint64_t at_least(const float *x, const float *threshold) {
    const __m512 limit = threshold == nullptr ? _mm512_setzero_ps() : _mm512_loadu_ps(threshold);
    return _mm512_cmp_ps_mask(_mm512_loadu_ps(x), limit, _CMP_GE_OQ);
}
PENNYWEIGHT_INLINE std::uint64_t at_least(const std::int32_t *y, const std::int32_t *threshold) {
    return _mm512_cmpge_epi32_mask(load(y), load(threshold));
}

#elif defined(PENNYWEIGHT_AVX2)

PENNYWEIGHT_INLINE std::uint64_t at_least(const float *x, const float *threshold) {
    const __m256 limit = threshold == nullptr ? _mm256_setzero_ps() : _mm256_loadu_ps(threshold);
    return static_cast<std::uint64_t>(_mm256_movemask_ps(_mm256_cmp_ps(_mm256_loadu_ps(x), limit, _CMP_GE_OQ)));
}
PENNYWEIGHT_INLINE std::uint64_t at_least(const std::int32_t *y, const std::int32_t *threshold) {
    return static_cast<std::uint64_t>(~_mm256_movemask_ps(_mm256_castsi256_ps(_mm256_cmpgt_epi32(load(threshold), load(y)))) & 255);
}

#elif defined(PENNYWEIGHT_NEON)

PENNYWEIGHT_INLINE std::uint64_t bits_of(uint32x4_t mask) {
    static const std::uint32_t bit[4] = {1, 2, 4, 8};
    return vaddvq_u32(vandq_u32(mask, vld1q_u32(bit)));
}
PENNYWEIGHT_INLINE std::uint64_t at_least(const float *x, const float *threshold) {
    return bits_of(vcgeq_f32(vld1q_f32(x), threshold == nullptr ? vdupq_n_f32(0.0f) : vld1q_f32(threshold)));
}
PENNYWEIGHT_INLINE std::uint64_t at_least(const std::int32_t *y, const std::int32_t *threshold) {
    return bits_of(vcgeq_s32(vld1q_s32(y), vld1q_s32(threshold)));
}

#else

PENNYWEIGHT_INLINE std::uint64_t at_least(const float *x, const float *threshold) {
    std::uint64_t bits = 0;
    for (std::size_t i = 0; i < lanes; ++i) bits |= static_cast<std::uint64_t>(x[i] >= (threshold == nullptr ? 0.0f : threshold[i])) << i;
    return bits;
}
PENNYWEIGHT_INLINE std::uint64_t at_least(const std::int32_t *y, const std::int32_t *threshold) {
    std::uint64_t bits = 0;
    for (std::size_t i = 0; i < lanes; ++i) bits |= static_cast<std::uint64_t>(y[i] >= threshold[i]) << i;
    return bits;
}

#endif

template <typename T>
PENNYWEIGHT_INLINE std::uint64_t signs_of(const T *x, const T *threshold) {
    std::uint64_t word = 0;
    for (std::size_t i = 0; i < 64; i += lanes) word |= at_least(x + i, threshold == nullptr ? nullptr : threshold + i) << i;
    return word;
}

static void pack_signs(const float *x, const float *threshold, std::size_t cols, std::uint64_t *out) {
    std::size_t k = 0;
    if (threshold == nullptr)  // told apart here, so that the loop need not
        for (; k + 64 <= cols; k += 64) *out++ = signs_of<float>(x + k, nullptr);
    else
        for (; k + 64 <= cols; k += 64) *out++ = signs_of(x + k, threshold + k);
    if (k == cols) return;
    *out = 0;
    for (std::size_t i = 0; k + i < cols; ++i) *out |= static_cast<std::uint64_t>(x[k + i] >= (threshold == nullptr ? 0.0f : threshold[k + i])) << i;
}

static std::uint64_t compare_products(const std::int32_t *y, const std::int32_t *threshold) { return signs_of(y, threshold); }

static void binary_products(const std::uint16_t *acc, const std::uint32_t *counts, std::int32_t columns, std::int32_t *y) {
    alignas(64) std::uint16_t room[binary_block];
    const std::uint16_t *ordered = in_order(acc, room);
    for (std::size_t o = 0; o < binary_block; ++o) y[o] = columns - 2 * static_cast<std::int32_t>(ordered[o]);
    if (counts != nullptr)
        for (std::size_t o = 0; o < binary_block; ++o) y[o] = static_cast<std::int32_t>(static_cast<std::uint32_t>(y[o]) - 2 * counts[o]);
}

static void scaled_products(const std::int32_t *y, const float *scale, const float *bias, std::size_t outputs, float *out) {
    for (std::size_t o = 0; o < outputs; ++o) out[o] = static_cast<float>(y[o]);
    if (scale != nullptr)
        for (std::size_t o = 0; o < outputs; ++o) out[o] *= scale[o];
    if (bias != nullptr)
        for (std::size_t o = 0; o < outputs; ++o) out[o] += bias[o];
}

#if defined(PENNYWEIGHT_BINARY_BY_LOOKUP)
constexpr auto expand_signs_or_not = expand_signs;
#else
constexpr void (*expand_signs_or_not)(const std::uint64_t *, std::size_t, std::uint8_t *) = nullptr;
#endif

constexpr BinaryKernels binary_kernels = {binary_input_bytes, pack_signs,  expand_signs_or_not, sign_panel,      multiply_signs,
                                          widen_signs,        differences, binary_products,     scaled_products, compare_products};

}  // namespace
}  // namespace pennyweight
