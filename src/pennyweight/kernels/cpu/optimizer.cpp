#include "optimizer.h"

#include <algorithm>
#include <cmath>

#include "isa.h"
#include "parallel.h"

namespace pennyweight {
namespace {

constexpr std::size_t piece = 1 << 14;         // numbers of a weight that one thread works on at a time
constexpr std::size_t worth_threads = 1 << 15;  // numbers from which on several threads are woken
// A strength below this decays no weight that float32 tells from zero; above it no product of a step underflows.
constexpr double least_strength = 0x1p-80;

// task(weight, first number, how many) for all pieces of all weights.
template <typename Weight, typename Task>
void in_pieces(const std::vector<Weight> &weights, unsigned threads, const Task &task) {
    struct Piece {
        const Weight *weight;
        std::size_t first;
    };
    std::vector<Piece> pieces;
    std::size_t total = 0;
    for (const Weight &weight : weights) {
        total += weight.count;
        for (std::size_t first = 0; first < weight.count; first += piece) pieces.push_back({&weight, first});
    }
    parallel_for(pieces.size(), total < worth_threads ? 1 : threads, [&](std::size_t i) {
        const auto [weight, first] = pieces[i];
        task(*weight, first, std::min(piece, weight->count - first));
    });
}

template <typename Task>
void in_pieces(std::size_t count, unsigned threads, const Task &task) {
    parallel_for((count + piece - 1) / piece, count < worth_threads ? 1 : threads, [&](std::size_t i) { task(i * piece, std::min(piece, count - i * piece)); });
}

// Of the polynomial through m^power at the Chebyshev nodes of [1, 2], by Newton's divided differences.
void interpolate(double power, float (&coefficient)[5]) {
    constexpr int n = 5;
    const double pi = std::acos(-1.0);
    double node[n], difference[n], sum[n] = {};
    for (int i = 0; i < n; ++i) {
        node[i] = 1.5 + 0.5 * std::cos(pi * (i + 0.5) / n);
        difference[i] = std::pow(node[i], power);
    }
    for (int order = 1; order < n; ++order)
        for (int i = n - 1; i >= order; --i) difference[i] = (difference[i] - difference[i - 1]) / (node[i] - node[i - order]);
    for (int i = n - 1; i >= 0; --i) {  // sum <- sum * (m - node) + difference
        for (int k = n - 1; k > 0; --k) sum[k] = sum[k - 1] - node[i] * sum[k];
        sum[0] = difference[i] - node[i] * sum[0];
    }
    for (int i = 0; i < n; ++i) coefficient[i] = static_cast<float>(sum[i]);
}

Decay::Norm norm_of(double p) {
    if (p == 0.5) return Decay::Norm::half;
    if (p == 1.0) return Decay::Norm::one;
    if (p == 1.5) return Decay::Norm::three_halves;
    if (p == 2.0) return Decay::Norm::two;
    return p < 2.0 ? Decay::Norm::between : Decay::Norm::above;
}

}  // namespace

Decay decay(double p, double strength, double zero_below) {
    Decay d{};
    d.norm = norm_of(p);
    d.strength = static_cast<float>(std::max(strength, least_strength));
    d.zero_below = static_cast<float>(zero_below);
    const double power = std::abs(p - 2.0);
    // The exponent of a float is 127 too large, and the sign is the bit above it. Entries are as much above 1 as below it, so that no
    // product with some of them overflows.
    for (int i = 0; i < 8; ++i) {
        d.low[i] = static_cast<float>(std::exp2(power * i));
        d.middle[i] = static_cast<float>(std::exp2(power * (8 * i - 32)));
        d.high[i] = (i & 3) == 0 ? 0.0f : static_cast<float>(std::exp2(power * (64 * (i & 3) - 127 + 32)));
    }
    interpolate(power, d.coefficient);
    return d;
}

void adam(const std::vector<AdamWeight> &weights, const AdamSettings &settings, const Decay &decay, unsigned threads) {
    const OptimizerKernels &k = kernels().optimizer;
    const double share = 1.0 - settings.beta1;
    in_pieces(weights, threads, [&](const AdamWeight &weight, std::size_t first, std::size_t count) {
        AdamStep step;
        step.beta1 = static_cast<float>(settings.beta1), step.beta2 = static_cast<float>(settings.beta2);
        step.gradient_share = static_cast<float>(settings.maximize ? -share : share);
        step.square_share = static_cast<float>(1.0 - settings.beta2);
        step.eps = static_cast<float>(settings.eps);
        step.rate = static_cast<float>(settings.rate / (1.0 - std::pow(settings.beta1, weight.step)));
        step.root_scale = static_cast<float>(1.0 / std::sqrt(1.0 - std::pow(settings.beta2, weight.step)));
        float *const largest = weight.largest == nullptr ? nullptr : weight.largest + first;
        k.adam(decay, step, {weight.weight + first, weight.gradient + first, weight.mean + first, weight.square + first, largest, count, weight.step});
    });
}

void sgd(const std::vector<SgdWeight> &weights, const SgdSettings &settings, const Decay &decay, unsigned threads) {
    const OptimizerKernels &k = kernels().optimizer;
    const double sign = settings.maximize ? -1.0 : 1.0;
    const bool by_momentum_alone = settings.momentum != 0.0 && !settings.nesterov;
    SgdStep step;
    step.momentum_kept = static_cast<float>(settings.momentum);
    step.gradient_share = static_cast<float>(sign * (1.0 - settings.dampening));
    step.from_gradient = static_cast<float>(by_momentum_alone ? 0.0 : -settings.rate * sign);
    step.from_momentum = static_cast<float>(-settings.rate * (settings.nesterov ? settings.momentum : 1.0));
    in_pieces(weights, threads, [&](const SgdWeight &weight, std::size_t first, std::size_t count) {
        float *const momentum = weight.momentum == nullptr ? nullptr : weight.momentum + first;
        k.sgd(decay, step, {weight.weight + first, weight.gradient + first, momentum, count});
    });
}

void decay_divisors(const Decay &decay, const float *weight, float *divisor, std::size_t count, unsigned threads) {
    const OptimizerKernels &k = kernels().optimizer;
    in_pieces(count, threads, [&](std::size_t first, std::size_t part) { k.divisors(decay, weight + first, divisor + first, part); });
}

void divide(float zero_below, float *weight, const float *divisor, std::size_t count, unsigned threads) {
    const OptimizerKernels &k = kernels().optimizer;
    in_pieces(count, threads, [&](std::size_t first, std::size_t part) { k.divide(zero_below, weight + first, divisor + first, part); });
}

}  // namespace pennyweight
