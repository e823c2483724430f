#pragma once
// The few vector operations that the kernels are written in, for the instruction set that this file is compiled for.
//
// This header and the kernels may be compiled for instructions that the processor lacks, so nothing in them may leave a
// function that other files could link to: everything is static, and no template of the standard library is used.
//
//     V          one vector of unsigned bytes, or of int16, or of int32: what the operation says
//     width      its bytes
//     lookup     byte i of the result is table[index[i] & 15]; indices are below 16
//     all8       a byte, everywhere
//     table      sixteen bytes, as `lookup` wants them
//     interleave sixteen-bit values from low and high bytes, stored in the order of the bytes (2 * width bytes)
//     join       fine + 32 * coarse of the bytes that `interleave` would bring together, up to 32767, as int16
//     masked     of each byte the bits that a mask has
//     bits_at    each byte >> k, of which the bits of a mask are wanted that came from within the byte
//     pair_of    bytes 2k and 2k + 1 (k 0 or 1) of each int32 as two int16 that are not negative
//     or_shifted a | b << k, where no byte of b has bits that would cross into the next
//     add8       sums of bytes
//     multiply8  bytes of a times signed bytes of b. With VNNI acc + the sums of four in the int32 of acc, a unsigned; without
//                it acc + the sums of two in the int16 of acc, which must fit, a below 128
//     multiply   acc + a[2i] * b[2i] + a[2i+1] * b[2i+1] for each of the int32 of acc; wraps around
//     widen      width/2 signed bytes -> int16
//     settled    v, which the compiler must have computed by now: sums it may regroup at will do not fit the registers

#include <cstddef>
#include <cstdint>
#include <cstring>

#if defined(PENNYWEIGHT_EMULATED)
#define SIMDE_ENABLE_NATIVE_ALIASES
#include <simde/x86/avx512.h>
#undef _mm512_madd_epi16  // SIMDe 0.7.4 defines it with the arguments of its masked form
#define _mm512_madd_epi16(a, b) simde_mm512_madd_epi16(a, b)
#elif defined(PENNYWEIGHT_AVX2) || defined(PENNYWEIGHT_AVX512)
#include <immintrin.h>
#elif defined(PENNYWEIGHT_NEON)
#include <arm_neon.h>
#endif

#define PENNYWEIGHT_INLINE static inline __attribute__((always_inline))

namespace {

#if defined(PENNYWEIGHT_AVX512)

using V = __m512i;
PENNYWEIGHT_INLINE V load(const void *from) { return _mm512_loadu_si512(from); }
PENNYWEIGHT_INLINE void store(void *to, V v) { _mm512_storeu_si512(to, v); }
PENNYWEIGHT_INLINE V zero() { return _mm512_setzero_si512(); }
PENNYWEIGHT_INLINE V table(const std::uint8_t *from) {
    return _mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i *>(from)));
}
PENNYWEIGHT_INLINE V lookup(V table, V index) { return _mm512_shuffle_epi8(table, index); }
PENNYWEIGHT_INLINE V masked(V v, int mask) { return _mm512_and_si512(v, _mm512_set1_epi8(static_cast<char>(mask))); }
PENNYWEIGHT_INLINE V high_nibbles(V v) { return masked(_mm512_srli_epi16(v, 4), 15); }
PENNYWEIGHT_INLINE V bits_at(V v, int k, int mask) { return masked(_mm512_srl_epi16(v, _mm_cvtsi32_si128(k)), mask); }
PENNYWEIGHT_INLINE V or_shifted(V a, V b, int k) { return _mm512_or_si512(a, _mm512_sll_epi16(b, _mm_cvtsi32_si128(k))); }
PENNYWEIGHT_INLINE V add8(V a, V b) { return _mm512_add_epi8(a, b); }
PENNYWEIGHT_INLINE V all8(int value) { return _mm512_set1_epi8(static_cast<char>(value)); }
PENNYWEIGHT_INLINE V interleave_low(V low, V high) { return _mm512_unpacklo_epi8(low, high); }
PENNYWEIGHT_INLINE V interleave_high(V low, V high) { return _mm512_unpackhi_epi8(low, high); }
PENNYWEIGHT_INLINE V interleave16_low(V low, V high) { return _mm512_unpacklo_epi16(low, high); }
PENNYWEIGHT_INLINE V interleave16_high(V low, V high) { return _mm512_unpackhi_epi16(low, high); }
PENNYWEIGHT_INLINE V add16(V a, V b) { return _mm512_add_epi16(a, b); }
PENNYWEIGHT_INLINE V join_low(V fine, V coarse) { return _mm512_maddubs_epi16(interleave_low(fine, coarse), _mm512_set1_epi16(32 << 8 | 1)); }
PENNYWEIGHT_INLINE V join_high(V fine, V coarse) { return _mm512_maddubs_epi16(interleave_high(fine, coarse), _mm512_set1_epi16(32 << 8 | 1)); }
PENNYWEIGHT_INLINE void store_interleaved(std::int16_t *to, V low, V high) {
    const V a = _mm512_permutex2var_epi64(low, _mm512_setr_epi64(0, 1, 8, 9, 2, 3, 10, 11), high);
    const V b = _mm512_permutex2var_epi64(low, _mm512_setr_epi64(4, 5, 12, 13, 6, 7, 14, 15), high);
    store(to, a);
    store(to + 32, b);
}
PENNYWEIGHT_INLINE V multiply(V acc, V a, V b) {
#if defined(PENNYWEIGHT_VNNI)
    return _mm512_dpwssd_epi32(acc, a, b);
#else
    return _mm512_add_epi32(acc, _mm512_madd_epi16(a, b));
#endif
}
PENNYWEIGHT_INLINE V multiply8(V acc, V a, V b) {
#if defined(PENNYWEIGHT_VNNI)
    return _mm512_dpbusd_epi32(acc, a, b);
#else
    return _mm512_add_epi16(acc, _mm512_maddubs_epi16(a, b));
#endif
}
PENNYWEIGHT_INLINE V all16(int value) { return _mm512_set1_epi16(static_cast<short>(value)); }
PENNYWEIGHT_INLINE V pair_of(V v, int k) {
    const __m128i places = _mm_add_epi8(_mm_setr_epi8(0, -128, 1, -128, 4, -128, 5, -128, 8, -128, 9, -128, 12, -128, 13, -128), _mm_set1_epi8(static_cast<char>(2 * k)));
    return _mm512_shuffle_epi8(v, _mm512_broadcast_i32x4(places));
}
PENNYWEIGHT_INLINE V broadcast32(const void *from) {
    std::int32_t pair;
    std::memcpy(&pair, from, 4);
    return _mm512_set1_epi32(pair);
}
PENNYWEIGHT_INLINE V widen(const std::int8_t *from) {
    return _mm512_cvtepi8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i *>(from)));
}

#elif defined(PENNYWEIGHT_AVX2)

using V = __m256i;
PENNYWEIGHT_INLINE V load(const void *from) { return _mm256_loadu_si256(static_cast<const __m256i *>(from)); }
PENNYWEIGHT_INLINE void store(void *to, V v) { _mm256_storeu_si256(static_cast<__m256i *>(to), v); }
PENNYWEIGHT_INLINE V zero() { return _mm256_setzero_si256(); }
PENNYWEIGHT_INLINE V table(const std::uint8_t *from) {
    return _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i *>(from)));
}
PENNYWEIGHT_INLINE V lookup(V table, V index) { return _mm256_shuffle_epi8(table, index); }
PENNYWEIGHT_INLINE V masked(V v, int mask) { return _mm256_and_si256(v, _mm256_set1_epi8(static_cast<char>(mask))); }
PENNYWEIGHT_INLINE V high_nibbles(V v) { return masked(_mm256_srli_epi16(v, 4), 15); }
PENNYWEIGHT_INLINE V bits_at(V v, int k, int mask) { return masked(_mm256_srl_epi16(v, _mm_cvtsi32_si128(k)), mask); }
PENNYWEIGHT_INLINE V or_shifted(V a, V b, int k) { return _mm256_or_si256(a, _mm256_sll_epi16(b, _mm_cvtsi32_si128(k))); }
PENNYWEIGHT_INLINE V add8(V a, V b) { return _mm256_add_epi8(a, b); }
PENNYWEIGHT_INLINE V all8(int value) { return _mm256_set1_epi8(static_cast<char>(value)); }
PENNYWEIGHT_INLINE V interleave_low(V low, V high) { return _mm256_unpacklo_epi8(low, high); }
PENNYWEIGHT_INLINE V interleave_high(V low, V high) { return _mm256_unpackhi_epi8(low, high); }
PENNYWEIGHT_INLINE V interleave16_low(V low, V high) { return _mm256_unpacklo_epi16(low, high); }
PENNYWEIGHT_INLINE V interleave16_high(V low, V high) { return _mm256_unpackhi_epi16(low, high); }
PENNYWEIGHT_INLINE V add16(V a, V b) { return _mm256_add_epi16(a, b); }
PENNYWEIGHT_INLINE V join_low(V fine, V coarse) { return _mm256_maddubs_epi16(interleave_low(fine, coarse), _mm256_set1_epi16(32 << 8 | 1)); }
PENNYWEIGHT_INLINE V join_high(V fine, V coarse) { return _mm256_maddubs_epi16(interleave_high(fine, coarse), _mm256_set1_epi16(32 << 8 | 1)); }
PENNYWEIGHT_INLINE void store_interleaved(std::int16_t *to, V low, V high) {
    store(to, _mm256_permute2x128_si256(low, high, 0x20));
    store(to + 16, _mm256_permute2x128_si256(low, high, 0x31));
}
PENNYWEIGHT_INLINE V multiply(V acc, V a, V b) { return _mm256_add_epi32(acc, _mm256_madd_epi16(a, b)); }
PENNYWEIGHT_INLINE V multiply8(V acc, V a, V b) { return _mm256_add_epi16(acc, _mm256_maddubs_epi16(a, b)); }
PENNYWEIGHT_INLINE V all16(int value) { return _mm256_set1_epi16(static_cast<short>(value)); }
PENNYWEIGHT_INLINE V pair_of(V v, int k) {
    const __m128i places = _mm_add_epi8(_mm_setr_epi8(0, -128, 1, -128, 4, -128, 5, -128, 8, -128, 9, -128, 12, -128, 13, -128), _mm_set1_epi8(static_cast<char>(2 * k)));
    return _mm256_shuffle_epi8(v, _mm256_broadcastsi128_si256(places));
}
PENNYWEIGHT_INLINE V broadcast32(const void *from) {
    std::int32_t pair;
    std::memcpy(&pair, from, 4);
    return _mm256_set1_epi32(pair);
}
PENNYWEIGHT_INLINE V widen(const std::int8_t *from) {
    return _mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i *>(from)));
}

#elif defined(PENNYWEIGHT_NEON)

using V = uint8x16_t;
PENNYWEIGHT_INLINE V load(const void *from) { return vld1q_u8(static_cast<const std::uint8_t *>(from)); }
PENNYWEIGHT_INLINE void store(void *to, V v) { vst1q_u8(static_cast<std::uint8_t *>(to), v); }
PENNYWEIGHT_INLINE V zero() { return vdupq_n_u8(0); }
PENNYWEIGHT_INLINE V table(const std::uint8_t *from) { return vld1q_u8(from); }
PENNYWEIGHT_INLINE V lookup(V table, V index) { return vqtbl1q_u8(table, index); }
PENNYWEIGHT_INLINE V masked(V v, int mask) { return vandq_u8(v, vdupq_n_u8(static_cast<std::uint8_t>(mask))); }
PENNYWEIGHT_INLINE V high_nibbles(V v) { return vshrq_n_u8(v, 4); }
PENNYWEIGHT_INLINE V bits_at(V v, int k, int mask) { return masked(vshlq_u8(v, vdupq_n_s8(static_cast<std::int8_t>(-k))), mask); }
PENNYWEIGHT_INLINE V or_shifted(V a, V b, int k) { return vorrq_u8(a, vshlq_u8(b, vdupq_n_s8(static_cast<std::int8_t>(k)))); }
PENNYWEIGHT_INLINE V add8(V a, V b) { return vaddq_u8(a, b); }
PENNYWEIGHT_INLINE V all8(int value) { return vdupq_n_u8(static_cast<std::uint8_t>(value)); }
PENNYWEIGHT_INLINE V interleave_low(V low, V high) { return vzip1q_u8(low, high); }
PENNYWEIGHT_INLINE V interleave_high(V low, V high) { return vzip2q_u8(low, high); }
PENNYWEIGHT_INLINE V interleave16_low(V low, V high) { return vreinterpretq_u8_u16(vzip1q_u16(vreinterpretq_u16_u8(low), vreinterpretq_u16_u8(high))); }
PENNYWEIGHT_INLINE V interleave16_high(V low, V high) { return vreinterpretq_u8_u16(vzip2q_u16(vreinterpretq_u16_u8(low), vreinterpretq_u16_u8(high))); }
PENNYWEIGHT_INLINE V add16(V a, V b) {
    return vreinterpretq_u8_u16(vaddq_u16(vreinterpretq_u16_u8(a), vreinterpretq_u16_u8(b)));
}
PENNYWEIGHT_INLINE V join_low(V fine, V coarse) {
    return vreinterpretq_u8_u16(vaddw_u8(vshll_n_u8(vget_low_u8(coarse), 5), vget_low_u8(fine)));
}
PENNYWEIGHT_INLINE V join_high(V fine, V coarse) { return vreinterpretq_u8_u16(vaddw_high_u8(vshll_high_n_u8(coarse, 5), fine)); }
PENNYWEIGHT_INLINE void store_interleaved(std::int16_t *to, V low, V high) {
    store(to, low);
    store(to + 8, high);
}
PENNYWEIGHT_INLINE V multiply(V acc, V a, V b) {
    const int16x8_t x = vreinterpretq_s16_u8(a), y = vreinterpretq_s16_u8(b);
    const int32x4_t low = vmull_s16(vget_low_s16(x), vget_low_s16(y)), high = vmull_high_s16(x, y);
    return vreinterpretq_u8_s32(vaddq_s32(vreinterpretq_s32_u8(acc), vpaddq_s32(low, high)));
}
PENNYWEIGHT_INLINE V multiply8(V acc, V a, V b) {
    const int8x16_t x = vreinterpretq_s8_u8(a), y = vreinterpretq_s8_u8(b);
    const int16x8_t low = vmull_s8(vget_low_s8(x), vget_low_s8(y)), high = vmull_high_s8(x, y);
    return vreinterpretq_u8_s16(vaddq_s16(vreinterpretq_s16_u8(acc), vpaddq_s16(low, high)));
}
PENNYWEIGHT_INLINE V all16(int value) { return vreinterpretq_u8_s16(vdupq_n_s16(static_cast<std::int16_t>(value))); }
PENNYWEIGHT_INLINE V pair_of(V v, int k) {
    const std::uint8_t none = 128;
    const std::uint8_t places[16] = {0, none, 1, none, 4, none, 5, none, 8, none, 9, none, 12, none, 13, none};
    return vqtbl1q_u8(v, vaddq_u8(vld1q_u8(places), vdupq_n_u8(static_cast<std::uint8_t>(2 * k))));
}
PENNYWEIGHT_INLINE V broadcast32(const void *from) {
    std::uint32_t pair;
    std::memcpy(&pair, from, 4);
    return vreinterpretq_u8_u32(vdupq_n_u32(pair));
}
PENNYWEIGHT_INLINE V widen(const std::int8_t *from) { return vreinterpretq_u8_s16(vmovl_s8(vld1_s8(from))); }

#else  // plain C++

struct V {
    std::uint8_t byte[16];
};
PENNYWEIGHT_INLINE V load(const void *from) {
    V v;
    std::memcpy(v.byte, from, 16);
    return v;
}
PENNYWEIGHT_INLINE void store(void *to, V v) { std::memcpy(to, v.byte, 16); }
PENNYWEIGHT_INLINE V zero() { return V{}; }
PENNYWEIGHT_INLINE V table(const std::uint8_t *from) { return load(from); }
PENNYWEIGHT_INLINE V lookup(V table, V index) {
    V v;
    for (int i = 0; i < 16; ++i) v.byte[i] = table.byte[index.byte[i] & 15];
    return v;
}
PENNYWEIGHT_INLINE V masked(V v, int mask) {
    for (int i = 0; i < 16; ++i) v.byte[i] = static_cast<std::uint8_t>(v.byte[i] & mask);
    return v;
}
PENNYWEIGHT_INLINE V high_nibbles(V v) {
    for (int i = 0; i < 16; ++i) v.byte[i] >>= 4;
    return v;
}
PENNYWEIGHT_INLINE V bits_at(V v, int k, int mask) {
    for (int i = 0; i < 16; ++i) v.byte[i] = static_cast<std::uint8_t>(v.byte[i] >> k & mask);
    return v;
}
PENNYWEIGHT_INLINE V or_shifted(V a, V b, int k) {
    for (int i = 0; i < 16; ++i) a.byte[i] = static_cast<std::uint8_t>(a.byte[i] | b.byte[i] << k);
    return a;
}
PENNYWEIGHT_INLINE V add8(V a, V b) {
    for (int i = 0; i < 16; ++i) a.byte[i] = static_cast<std::uint8_t>(a.byte[i] + b.byte[i]);
    return a;
}
PENNYWEIGHT_INLINE V all8(int value) {
    V v;
    for (int i = 0; i < 16; ++i) v.byte[i] = static_cast<std::uint8_t>(value);
    return v;
}
PENNYWEIGHT_INLINE V interleave(const std::uint8_t *low, const std::uint8_t *high) {
    V v;
    for (int i = 0; i < 8; ++i) {
        const std::uint16_t value = static_cast<std::uint16_t>(low[i] | high[i] << 8);
        std::memcpy(v.byte + 2 * i, &value, 2);
    }
    return v;
}
PENNYWEIGHT_INLINE V interleave_low(V low, V high) { return interleave(low.byte, high.byte); }
PENNYWEIGHT_INLINE V interleave_high(V low, V high) { return interleave(low.byte + 8, high.byte + 8); }
PENNYWEIGHT_INLINE V interleave16(const std::uint8_t *low, const std::uint8_t *high) {
    V v;
    for (int i = 0; i < 4; ++i) {
        std::memcpy(v.byte + 4 * i, low + 2 * i, 2);
        std::memcpy(v.byte + 4 * i + 2, high + 2 * i, 2);
    }
    return v;
}
PENNYWEIGHT_INLINE V interleave16_low(V low, V high) { return interleave16(low.byte, high.byte); }
PENNYWEIGHT_INLINE V interleave16_high(V low, V high) { return interleave16(low.byte + 8, high.byte + 8); }
PENNYWEIGHT_INLINE V add16(V a, V b) {
    for (int i = 0; i < 8; ++i) {
        std::uint16_t x, y;
        std::memcpy(&x, a.byte + 2 * i, 2);
        std::memcpy(&y, b.byte + 2 * i, 2);
        x = static_cast<std::uint16_t>(x + y);
        std::memcpy(a.byte + 2 * i, &x, 2);
    }
    return a;
}
PENNYWEIGHT_INLINE V join(const std::uint8_t *fine, const std::uint8_t *coarse) {
    V v;
    for (int i = 0; i < 8; ++i) {
        const std::uint16_t value = static_cast<std::uint16_t>(fine[i] + 32 * coarse[i]);
        std::memcpy(v.byte + 2 * i, &value, 2);
    }
    return v;
}
PENNYWEIGHT_INLINE V join_low(V fine, V coarse) { return join(fine.byte, coarse.byte); }
PENNYWEIGHT_INLINE V join_high(V fine, V coarse) { return join(fine.byte + 8, coarse.byte + 8); }
PENNYWEIGHT_INLINE void store_interleaved(std::int16_t *to, V low, V high) {
    store(to, low);
    store(to + 8, high);
}
PENNYWEIGHT_INLINE V multiply(V acc, V a, V b) {
    for (int i = 0; i < 4; ++i) {
        std::uint32_t sum;
        std::int16_t x[2], y[2];
        std::memcpy(&sum, acc.byte + 4 * i, 4);
        std::memcpy(x, a.byte + 4 * i, 4);
        std::memcpy(y, b.byte + 4 * i, 4);
        sum += static_cast<std::uint32_t>(x[0] * y[0]) + static_cast<std::uint32_t>(x[1] * y[1]);
        std::memcpy(acc.byte + 4 * i, &sum, 4);
    }
    return acc;
}
PENNYWEIGHT_INLINE V multiply8(V acc, V a, V b) {
    for (int i = 0; i < 8; ++i) {
        std::int16_t sum;
        std::memcpy(&sum, acc.byte + 2 * i, 2);
        for (int j = 2 * i; j < 2 * i + 2; ++j) sum = static_cast<std::int16_t>(sum + a.byte[j] * static_cast<std::int8_t>(b.byte[j]));
        std::memcpy(acc.byte + 2 * i, &sum, 2);
    }
    return acc;
}
PENNYWEIGHT_INLINE V all16(int value) {
    V v;
    const std::int16_t each = static_cast<std::int16_t>(value);
    for (int i = 0; i < 8; ++i) std::memcpy(v.byte + 2 * i, &each, 2);
    return v;
}
PENNYWEIGHT_INLINE V pair_of(V v, int k) {
    V pair{};
    for (int i = 0; i < 16; i += 4) {
        pair.byte[i] = v.byte[i + 2 * k];
        pair.byte[i + 2] = v.byte[i + 2 * k + 1];
    }
    return pair;
}
PENNYWEIGHT_INLINE V broadcast32(const void *from) {
    V v;
    for (int i = 0; i < 4; ++i) std::memcpy(v.byte + 4 * i, from, 4);
    return v;
}
PENNYWEIGHT_INLINE V widen(const std::int8_t *from) {
    V v;
    for (int i = 0; i < 8; ++i) {
        const std::int16_t value = from[i];
        std::memcpy(v.byte + 2 * i, &value, 2);
    }
    return v;
}

#endif

#if defined(PENNYWEIGHT_EMULATED) || !(defined(PENNYWEIGHT_AVX2) || defined(PENNYWEIGHT_AVX512))
PENNYWEIGHT_INLINE V settled(V v) { return v; }
#else
PENNYWEIGHT_INLINE V settled(V v) {
    asm volatile("" : "+v"(v));
    return v;
}
#endif

PENNYWEIGHT_INLINE V low_nibbles(V v) { return masked(v, 15); }

constexpr std::size_t width = sizeof(V);
constexpr std::size_t lanes = width / 4;  // int32 in a vector

// The compiler's own vectors, of floats and of their bits: float arithmetic needs no more where it is the same everywhere.
typedef float Floats __attribute__((vector_size(width)));
typedef std::uint32_t Patterns __attribute__((vector_size(width)));

// The same bits as another type.
template <typename To, typename From>
PENNYWEIGHT_INLINE To same(From from) {
    static_assert(sizeof(To) == sizeof(From), "bits would be lost");
    To to;
    std::memcpy(&to, &from, sizeof to);
    return to;
}

}  // namespace
