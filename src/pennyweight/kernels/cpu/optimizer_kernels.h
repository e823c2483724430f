#pragma once
// Kernels of optimizers. Included by isa.cpp alone; what simd.h says of such files holds here.
//
//     multiply_add  a * b + c, rounded once where the processor can
//     lookup        table[index & 7] for each index, of the eight floats that `spread` was given

#include "optimizer.h"
#include "simd.h"

namespace pennyweight {
namespace {

#if defined(PENNYWEIGHT_AVX512)
PENNYWEIGHT_INLINE Floats multiply_add(Floats a, Floats b, Floats c) {
    return same<Floats>(_mm512_fmadd_ps(same<__m512>(a), same<__m512>(b), same<__m512>(c)));
}
PENNYWEIGHT_INLINE Floats square_root(Floats a) { return same<Floats>(_mm512_sqrt_ps(same<__m512>(a))); }
PENNYWEIGHT_INLINE Floats lookup(Floats table, Patterns index) {
    return same<Floats>(_mm512_permutexvar_ps(same<__m512i>(index), same<__m512>(table)));
}
#elif defined(PENNYWEIGHT_AVX2)
PENNYWEIGHT_INLINE Floats multiply_add(Floats a, Floats b, Floats c) {
    return same<Floats>(_mm256_fmadd_ps(same<__m256>(a), same<__m256>(b), same<__m256>(c)));
}
PENNYWEIGHT_INLINE Floats square_root(Floats a) { return same<Floats>(_mm256_sqrt_ps(same<__m256>(a))); }
PENNYWEIGHT_INLINE Floats lookup(Floats table, Patterns index) {
    return same<Floats>(_mm256_permutevar8x32_ps(same<__m256>(table), same<__m256i>(index)));
}
#elif defined(PENNYWEIGHT_NEON)
PENNYWEIGHT_INLINE Floats multiply_add(Floats a, Floats b, Floats c) { return vfmaq_f32(c, a, b); }
PENNYWEIGHT_INLINE Floats square_root(Floats a) { return vsqrtq_f32(a); }
#else
PENNYWEIGHT_INLINE Floats multiply_add(Floats a, Floats b, Floats c) { return a * b + c; }
PENNYWEIGHT_INLINE Floats square_root(Floats a) {
    for (std::size_t i = 0; i < lanes; ++i) a[i] = __builtin_sqrtf(a[i]);
    return a;
}
#endif

#if defined(PENNYWEIGHT_AVX512) || defined(PENNYWEIGHT_AVX2)
using Table = Floats;
PENNYWEIGHT_INLINE Table spread(const float *entries) {
    float wide[lanes];
    for (std::size_t i = 0; i < lanes; ++i) wide[i] = entries[i & 7];
    Table table;
    std::memcpy(&table, wide, sizeof table);
    return table;
}
#else
using Table = const float *;
PENNYWEIGHT_INLINE Table spread(const float *entries) { return entries; }
PENNYWEIGHT_INLINE Floats lookup(Table table, Patterns index) {
    Floats found;
    for (std::size_t i = 0; i < lanes; ++i) found[i] = table[index[i] & 7];
    return found;
}
#endif

PENNYWEIGHT_INLINE Floats everywhere(float value) { return Floats{} + value; }
PENNYWEIGHT_INLINE Floats floats_at(const float *from) {
    Floats v;
    std::memcpy(&v, from, sizeof v);
    return v;
}
PENNYWEIGHT_INLINE void put(float *to, Floats v) { std::memcpy(to, &v, sizeof v); }
PENNYWEIGHT_INLINE Floats magnitude(Floats v) { return same<Floats>(same<Patterns>(v) & 0x7fffffffu); }
PENNYWEIGHT_INLINE Floats larger(Floats a, Floats b) {
    const Patterns first = same<Patterns>(a > b);
    return same<Floats>((same<Patterns>(a) & first) | (same<Patterns>(b) & ~first));
}
// w, or zero where it is at most that; NaN stays.
PENNYWEIGHT_INLINE Floats beyond(Floats zero_below, Floats w) {
    return same<Floats>(same<Patterns>(w) & ~same<Patterns>(magnitude(w) <= zero_below));
}

// What the decay multiplies a weight by: first * second / under. In parts, so that a step needs no more than one division, and waits for it less.
struct Fraction {
    Floats first, second, under;
};
struct Product {
    Floats first, second;
};

template <Decay::Norm norm>
struct Factor {
    Floats strength;
    Table low, middle, high;
    Floats coefficient[5];

    static Factor of(const Decay &d) {
        Factor factor{everywhere(d.strength), spread(d.low), spread(d.middle), spread(d.high), {}};
        for (int i = 0; i < 5; ++i) factor.coefficient[i] = everywhere(d.coefficient[i]);
        return factor;
    }

    // |w|^|p - 2|
    Product power(Floats w) const {
        const Patterns bits = same<Patterns>(w);
        const Floats m = same<Floats>((bits & 0x7fffffu) | 0x3f800000u), squared = m * m;
        const Floats highest = multiply_add(coefficient[3], m, coefficient[2]), lowest = multiply_add(coefficient[1], m, coefficient[0]);
        const Floats of_m = multiply_add(multiply_add(coefficient[4], squared, highest), squared, lowest);
        return {lookup(low, bits >> 23) * lookup(middle, bits >> 26), lookup(high, bits >> 29) * of_m};
    }

    Fraction operator()(Floats w) const {
        const Floats one = everywhere(1.0f);
        if constexpr (norm == Decay::Norm::two) return {one, one, one + strength};
        if constexpr (norm == Decay::Norm::above) {
            const Product x = power(w);
            return {one, one, multiply_add(strength * x.first, x.second, one)};
        }
        if constexpr (norm == Decay::Norm::between) {
            const Product x = power(w);
            return {x.first, x.second, multiply_add(x.first, x.second, strength)};
        }
        Floats x = magnitude(w);
        if constexpr (norm == Decay::Norm::half) x *= square_root(x);
        if constexpr (norm == Decay::Norm::three_halves) x = square_root(x);
        return {x, one, x + strength};
    }
};

constexpr std::size_t line = 16;    // floats that are worked on at a time: those of a cache line
constexpr std::size_t ahead = 128;  // floats from there to those that are fetched

// act(arrays, first) for each line of arrays of `count`; the last line in a copy, if it is not whole. Array 1 is only read.
template <std::size_t arrays, typename Act>
PENNYWEIGHT_INLINE void line_by_line(float *const (&array)[arrays], std::size_t count, const Act &act) {
    float *at[arrays];  // its own, which no other pointer leads to, so that they stay in registers
    for (std::size_t k = 0; k < arrays; ++k) at[k] = array[k];
    std::size_t i = 0;
    for (; i + line <= count; i += line) {
        for (std::size_t k = 0; k < arrays; ++k) __builtin_prefetch(reinterpret_cast<const char *>(at[k] + i) + 4 * ahead);
        act(at, i);
    }
    if (i == count) return;
    float copy[arrays][line] = {};
    for (std::size_t k = 0; k < arrays; ++k) {
        at[k] = copy[k];
        std::memcpy(copy[k], array[k] + i, (count - i) * sizeof(float));
    }
    act(at, 0);
    for (std::size_t k = 0; k < arrays; ++k)
        if (k != 1) std::memcpy(array[k] + i, copy[k], (count - i) * sizeof(float));
}

template <Decay::Norm norm, std::size_t arrays>
static void adam_of(const Decay &d, const AdamStep &s, float *const (&array)[arrays], std::size_t count) {
    const Factor<norm> factor_of = Factor<norm>::of(d);
    const Floats zero_below = everywhere(d.zero_below), beta1 = everywhere(s.beta1), beta2 = everywhere(s.beta2);
    const Floats gradient_share = everywhere(s.gradient_share), square_share = everywhere(s.square_share);
    const Floats eps = everywhere(s.eps), rate = everywhere(-s.rate), root_scale = everywhere(s.root_scale);
    line_by_line(array, count, [=](float *const *at, std::size_t first) {
        for (std::size_t i = first; i < first + line; i += lanes) {
            const Floats w = floats_at(at[0] + i), g = floats_at(at[1] + i);
            const Floats mean = multiply_add(floats_at(at[2] + i), beta1, g * gradient_share);
            Floats square = multiply_add(floats_at(at[3] + i), beta2, g * square_share * g);
            put(at[2] + i, mean);
            put(at[3] + i, square);
            if constexpr (arrays == 5) {
                square = larger(square, floats_at(at[4] + i));
                put(at[4] + i, square);
            }
            const Fraction factor = factor_of(w);
            const Floats root = multiply_add(square_root(square), root_scale, eps);
            const Floats moved = multiply_add(w, root, mean * rate);  // times root
            put(at[0] + i, beyond(zero_below, moved * factor.first * factor.second / (root * factor.under)));
        }
    });
}

template <Decay::Norm norm, std::size_t arrays>
static void sgd_of(const Decay &d, const SgdStep &s, float *const (&array)[arrays], std::size_t count) {
    const Factor<norm> factor_of = Factor<norm>::of(d);
    const Floats zero_below = everywhere(d.zero_below), kept = everywhere(s.momentum_kept), share = everywhere(s.gradient_share);
    const Floats from_gradient = everywhere(s.from_gradient), from_momentum = everywhere(s.from_momentum);
    line_by_line(array, count, [=](float *const *at, std::size_t first) {
        for (std::size_t i = first; i < first + line; i += lanes) {
            const Floats w = floats_at(at[0] + i), g = floats_at(at[1] + i);
            Floats moved = multiply_add(g, from_gradient, w);
            if constexpr (arrays == 3) {
                const Floats momentum = multiply_add(floats_at(at[2] + i), kept, g * share);
                put(at[2] + i, momentum);
                moved = multiply_add(momentum, from_momentum, moved);
            }
            const Fraction factor = factor_of(w);
            put(at[0] + i, beyond(zero_below, moved * factor.first * factor.second / factor.under));
        }
    });
}

template <Decay::Norm norm>
static void divisors_of(const Decay &d, float *const (&array)[2], std::size_t count) {
    const Factor<norm> factor_of = Factor<norm>::of(d);
    line_by_line(array, count, [=](float *const *at, std::size_t first) {
        for (std::size_t i = first; i < first + line; i += lanes) {
            const Fraction factor = factor_of(floats_at(at[1] + i));
            put(at[0] + i, factor.under / (factor.first * factor.second));
        }
    });
}

// act(Known<norm>) of a norm that only a run tells.
template <Decay::Norm norm>
struct Known {
    static constexpr Decay::Norm value = norm;
};
template <typename Act>
PENNYWEIGHT_INLINE void with_norm(Decay::Norm norm, const Act &act) {
    switch (norm) {
        case Decay::Norm::half: return act(Known<Decay::Norm::half>{});
        case Decay::Norm::one: return act(Known<Decay::Norm::one>{});
        case Decay::Norm::three_halves: return act(Known<Decay::Norm::three_halves>{});
        case Decay::Norm::between: return act(Known<Decay::Norm::between>{});
        case Decay::Norm::two: return act(Known<Decay::Norm::two>{});
        case Decay::Norm::above: return act(Known<Decay::Norm::above>{});
    }
}

static void adam(const Decay &d, const AdamStep &s, const AdamWeight &w) {
    float *const gradient = const_cast<float *>(w.gradient);
    with_norm(d.norm, [&](auto norm) {
        if (w.largest == nullptr)
            adam_of<norm.value>(d, s, {w.weight, gradient, w.mean, w.square}, w.count);
        else
            adam_of<norm.value>(d, s, {w.weight, gradient, w.mean, w.square, w.largest}, w.count);
    });
}

static void sgd(const Decay &d, const SgdStep &s, const SgdWeight &w) {
    float *const gradient = const_cast<float *>(w.gradient);
    with_norm(d.norm, [&](auto norm) {
        if (w.momentum == nullptr)
            sgd_of<norm.value>(d, s, {w.weight, gradient}, w.count);
        else
            sgd_of<norm.value>(d, s, {w.weight, gradient, w.momentum}, w.count);
    });
}

static void divisors(const Decay &d, const float *weight, float *divisor, std::size_t count) {
    with_norm(d.norm, [&](auto norm) { divisors_of<norm.value>(d, {divisor, const_cast<float *>(weight)}, count); });
}

static void divide(float zero_below, float *weight, const float *divisor, std::size_t count) {
    float *const array[] = {weight, const_cast<float *>(divisor)};
    const Floats least = everywhere(zero_below);
    line_by_line(array, count, [=](float *const *at, std::size_t first) {
        for (std::size_t i = first; i < first + line; i += lanes) put(at[0] + i, beyond(least, floats_at(at[0] + i) / floats_at(at[1] + i)));
    });
}

constexpr OptimizerKernels optimizer_kernels = {adam, sgd, divisors, divide};

}  // namespace
}  // namespace pennyweight
