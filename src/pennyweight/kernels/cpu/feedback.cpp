#include "feedback.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "parallel.h"

// One source, several instruction sets, chosen when the library is loaded.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__) && defined(__linux__)
#define PENNYWEIGHT_CLONES __attribute__((target_clones("avx512f", "avx2", "default")))
#else
#define PENNYWEIGHT_CLONES
#endif

namespace pennyweight {
namespace {

constexpr float largest_code = 32767.0f;

PENNYWEIGHT_CLONES
void rows(const Block &b, std::size_t first, std::size_t last) {
    alignas(64) float value[max_width];
    for (std::size_t r = first; r < last; ++r) {
        std::memcpy(value, b.work + r * b.stride, b.width * sizeof(float));
        for (std::size_t j = 0; j < b.width; ++j) {
            const float *upper = b.upper + j * b.upper_stride;
            const float grid = b.row[r] * b.column[j];
            float code = grid > 0.0f ? std::nearbyint(value[j] / grid) : 0.0f;
            code = std::min(std::max(code, -largest_code), largest_code);
            const float error = (value[j] - code * grid) / upper[j];
            b.codes[r * b.width + j] = static_cast<std::int16_t>(code);
            b.errors[r * b.width + j] = error;
            for (std::size_t k = j + 1; k < b.width; ++k) value[k] -= error * upper[k];
        }
    }
}

}  // namespace

void feedback_block(const Block &block, unsigned threads) {
    // Rows are independent, so the result does not depend on how they are shared out.
    const std::size_t parts = std::clamp<std::size_t>(block.rows / 64, 1, std::max(1u, threads));
    parallel_for(parts, threads, [&](std::size_t i) { rows(block, block.rows * i / parts, block.rows * (i + 1) / parts); });
}

}  // namespace pennyweight
