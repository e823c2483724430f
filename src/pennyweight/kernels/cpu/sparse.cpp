#include "sparse.h"

#include <algorithm>
#include <cstring>
#include <vector>

#include "isa.h"
#include "parallel.h"

namespace pennyweight {
namespace {

constexpr std::size_t chunk = 32;       // steps worked on at once: their values, as floats, stay in the nearest cache
constexpr std::size_t most_vectors = 4;  // of inputs that are multiplied together
constexpr std::size_t slice_bytes = 320 << 10;  // of inputs that are multiplied together: they are to stay in the second cache

// sums [64][inputs] of one block; x: one input [cols + 1], or [cols + 1][vectors * lanes].
void block_sums(const Sparse &w, const SparseKernels &k, std::size_t b, const float *x, std::size_t vectors, float *sums) {
    alignas(64) float values[chunk * sparse_lanes];
    const std::size_t first = static_cast<std::size_t>(w.start[b]), last = static_cast<std::size_t>(w.start[b + 1]);
    for (std::size_t t = first; t < last; t += chunk) {
        const std::size_t steps = std::min(chunk, last - t), at = t * sparse_lanes, count = steps * sparse_lanes;
        const float *value = values;
        if (w.floats != nullptr)
            value = w.floats + at;
        else if (w.halves != nullptr)
            k.from_halves(w.halves + at, count, values);
        else
            k.from_bytes(w.bytes + at, count, values);
        if (vectors == 0)
            k.one_input(w.column + at, value, steps, x, sums);
        else
            k.inputs(w.column + at, value, steps, x, vectors, sums);
    }
}

}  // namespace

void sparse_linear(const Sparse &w, const float *x, std::size_t n, const float *bias, float *y, unsigned threads) {
    if (n == 0 || w.rows == 0) return;
    const SparseKernels &k = kernels().sparse;
    // Inputs lie side by side, `wide` of them in a slice, and behind the last column a zero for rows that have no more.
    const std::size_t length = w.cols + 1, fitting = slice_bytes / (length * k.lanes * sizeof(float));
    const std::size_t wide = n == 1 ? 1 : std::min(std::max<std::size_t>(fitting, 1), most_vectors) * k.lanes, slices = (n + wide - 1) / wide;
    const auto vectors_in = [&](std::size_t s) { return n == 1 ? 0 : (std::min(wide, n - s * wide) + k.lanes - 1) / k.lanes; };
    thread_local std::vector<float> kept;  // between calls: fresh pages would cost as much as a small product
    if (kept.size() < slices * wide * length) kept.resize(slices * wide * length);
    float *const arranged = kept.data();
    constexpr std::size_t part = 64;  // columns
    const std::size_t parts = (length + part - 1) / part;
    parallel_for(slices * parts, n * length < 65536 ? 1 : threads, [&](std::size_t i) {
        const std::size_t s = i / parts, begin = i % parts * part, end = std::min(begin + part, length);
        const std::size_t first = s * wide, count = std::min(wide, n - first), stride = n == 1 ? 1 : vectors_in(s) * k.lanes;
        float *to = arranged + first * length;
        std::memset(to + begin * stride, 0, (end - begin) * stride * sizeof(float));
        for (std::size_t m = 0; m < count; ++m)
            for (std::size_t c = begin; c < std::min(end, w.cols); ++c) to[c * stride + m] = x[(first + m) * w.cols + c];
    });

    const std::size_t blocks = w.blocks(), steps = static_cast<std::size_t>(w.start[blocks]);
    const bool small = static_cast<double>(steps) * sparse_lanes * static_cast<double>(n) < 50000.0;
    parallel_for(blocks * slices, small ? 1 : threads, [&](std::size_t i) {
        const std::size_t s = i / blocks, b = i % blocks, first = s * wide, count = std::min(wide, n - first);
        const std::size_t stride = n == 1 ? 1 : vectors_in(s) * k.lanes;
        thread_local std::vector<float> sums;
        sums.assign(sparse_lanes * stride, 0.0f);
        block_sums(w, k, b, arranged + first * length, vectors_in(s), sums.data());
        for (std::size_t r = 0; r < std::min(sparse_lanes, w.rows - b * sparse_lanes); ++r) {
            const std::size_t row = static_cast<std::size_t>(w.order[b * sparse_lanes + r]);
            for (std::size_t m = 0; m < count; ++m) {
                float value = sums[r * stride + m];
                if (w.scale != nullptr) value *= w.scale[row];
                y[(first + m) * w.rows + row] = bias == nullptr ? value : value + bias[row];
            }
        }
    });
}

}  // namespace pennyweight
