#pragma once
// Kernels of sparse weights. Included by isa.cpp alone; what simd.h says of such files holds here.
//
// Float arithmetic is the same everywhere, so the compiler's own vectors serve; only what they lack is spelt out: gathering, and halves.

#include "simd.h"
#include "sparse.h"

namespace pennyweight {
namespace {

static void from_halves(const std::uint16_t *from, std::size_t count, float *out) {
    std::size_t i = 0;
#if defined(PENNYWEIGHT_AVX2) && !defined(PENNYWEIGHT_EMULATED)
    for (; i + 8 <= count; i += 8)
        _mm256_storeu_ps(out + i, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i *>(from + i))));
#elif defined(PENNYWEIGHT_AVX512) && !defined(PENNYWEIGHT_EMULATED)
    for (; i + 16 <= count; i += 16)
        _mm512_storeu_ps(out + i, _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i *>(from + i))));
#endif
    for (; i < count; ++i) {
        const std::uint32_t sign = (from[i] & 0x8000u) << 16, rest = from[i] & 0x7fffu;
        const float small = static_cast<float>(static_cast<std::int32_t>(rest)) * 5.9604644775390625e-8f;  // 2^-24, for subnormal ones
        std::uint32_t small_bits;
        std::memcpy(&small_bits, &small, 4);
        const std::uint32_t bits = sign | (rest < 0x400u ? small_bits : (rest << 13) + (112u << 23));
        std::memcpy(out + i, &bits, 4);
    }
}

static void from_bytes(const std::int8_t *from, std::size_t count, float *out) {
    for (std::size_t i = 0; i < count; ++i) out[i] = static_cast<float>(from[i]);
}

static void one_input(const std::uint16_t *column, const float *value, std::size_t steps, const float *x, float *sum) {
#if defined(PENNYWEIGHT_AVX512) && !defined(PENNYWEIGHT_EMULATED)
    __m512 total[4];
    for (int i = 0; i < 4; ++i) total[i] = _mm512_loadu_ps(sum + 16 * i);
    for (; steps > 0; --steps, column += sparse_lanes, value += sparse_lanes)
        for (int i = 0; i < 4; ++i) {
            const __m512i at = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i *>(column + 16 * i)));
            total[i] = _mm512_add_ps(total[i], _mm512_mul_ps(_mm512_loadu_ps(value + 16 * i), _mm512_i32gather_ps(at, x, 4)));
        }
    for (int i = 0; i < 4; ++i) _mm512_storeu_ps(sum + 16 * i, total[i]);
#else
    float total[sparse_lanes];
    std::memcpy(total, sum, sizeof total);
    for (; steps > 0; --steps, column += sparse_lanes, value += sparse_lanes)
        for (std::size_t r = 0; r < sparse_lanes; ++r) total[r] += value[r] * x[column[r]];
    std::memcpy(sum, total, sizeof total);
#endif
}

// `rows` lanes at once, so that the additions of one row need not wait for each other.
template <std::size_t vectors, std::size_t rows>
static void inputs_of(const std::uint16_t *column, const float *value, std::size_t steps, const float *x, float *sum) {
    constexpr std::size_t n = vectors * lanes;
    for (std::size_t r = 0; r < sparse_lanes; r += rows) {
        Floats total[rows][vectors];
        std::memcpy(total, sum + r * n, sizeof total);
        for (std::size_t t = 0; t < steps; ++t)
            for (std::size_t i = 0; i < rows; ++i) {
                const std::size_t at = t * sparse_lanes + r + i;
                const float *from = x + column[at] * n;
                for (std::size_t v = 0; v < vectors; ++v) {
                    Floats input;
                    std::memcpy(&input, from + v * lanes, sizeof input);
                    total[i][v] += value[at] * input;
                }
            }
        std::memcpy(sum + r * n, total, sizeof total);
    }
}

static void inputs(const std::uint16_t *column, const float *value, std::size_t steps, const float *x, std::size_t vectors, float *sum) {
    constexpr std::size_t most = width == 64 ? 16 : 8;  // vectors of sums that the registers hold
    switch (vectors) {
        case 1: return inputs_of<1, 8>(column, value, steps, x, sum);
        case 2: return inputs_of<2, most / 2>(column, value, steps, x, sum);
        case 3: return inputs_of<3, most / 4>(column, value, steps, x, sum);
        default: return inputs_of<4, most / 4>(column, value, steps, x, sum);
    }
}

constexpr SparseKernels sparse_kernels = {lanes, from_halves, from_bytes, one_input, inputs};

}  // namespace
}  // namespace pennyweight
