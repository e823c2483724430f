#pragma once
#include <cstddef>
#include <vector>

namespace pennyweight {

// Weight decay for any p norm, 0 < p <= 4 (optim/p_norm_decay.py has its meaning). A weight w that an update takes to w' becomes
//
//     w' / (1 + strength * |w|^(p - 2))
//
// and zero, if that is at most `zero_below` (negative: never). Roots and products give the power where p is 1/2, 1, 3/2 or 2.
// Elsewhere it is |w|^|p - 2| = 2^(e |p-2|) m^|p-2| with w = 2^e m: eight binary digits of e choose out of three tables, whose entries are
// multiplied, and a polynomial through five Chebyshev nodes is the rest. Its relative error is below 2^-15 (for p < 2, below 2^-16), and weights
// under 2^-63 count as zero. All of it is meant for weights far below 2^63.
struct Decay {
    enum class Norm { half, one, three_halves, between, two, above } norm;
    float strength, zero_below;
    float low[8], middle[8], high[8], coefficient[5];
};

Decay decay(double p, double strength, double zero_below);

// mean <- beta1 mean + (1 - beta1) g;  square <- beta2 square + (1 - beta2) g^2;  largest <- max(largest, square), if there is one
// w' = w - rate * mean / (root_scale * sqrt(square or largest) + eps)
struct AdamStep {
    float beta1, beta2, gradient_share, square_share, eps;  // the third with the sign of the gradient
    float rate, root_scale;                                 // with the corrections of the bias of the moments
};

struct AdamWeight {
    float *weight;
    const float *gradient;
    float *mean, *square, *largest;
    std::size_t count;
    double step;  // from 1
};

struct AdamSettings {
    double rate, beta1, beta2, eps;
    bool maximize;
};

// momentum <- momentum_kept momentum + gradient_share g, if there is one;  w' = w + from_gradient g + from_momentum momentum
struct SgdStep {
    float momentum_kept, gradient_share, from_gradient, from_momentum;
};

struct SgdWeight {
    float *weight;
    const float *gradient;
    float *momentum;
    std::size_t count;
};

struct SgdSettings {
    double rate, momentum, dampening;
    bool nesterov, maximize;
};

// What is compiled once for each instruction set. Operations on one number depend on nothing but that number. Where there are fused
// multiply-adds they are used, so that only `plain` differs from the others, in the last digit.
struct OptimizerKernels {
    void (*adam)(const Decay &, const AdamStep &, const AdamWeight &);
    void (*sgd)(const Decay &, const SgdStep &, const SgdWeight &);
    // divisor = 1 + strength * |w|^(p - 2)
    void (*divisors)(const Decay &, const float *weight, float *divisor, std::size_t count);
    // w <- w / divisor, or zero
    void (*divide)(float zero_below, float *weight, const float *divisor, std::size_t count);
};

// One step of all these weights, each number read and written once.
void adam(const std::vector<AdamWeight> &, const AdamSettings &, const Decay &, unsigned threads);
void sgd(const std::vector<SgdWeight> &, const SgdSettings &, const Decay &, unsigned threads);

// The decay alone, in two halves around the step of any optimizer.
void decay_divisors(const Decay &, const float *weight, float *divisor, std::size_t count, unsigned threads);
void divide(float zero_below, float *weight, const float *divisor, std::size_t count, unsigned threads);

}  // namespace pennyweight
