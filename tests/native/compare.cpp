// Runs the kernels of every instruction set there is on the same random weights and inputs; all must give the same bits.
// For processors that Python does not run on here: built and started by tests/test_kernels_cross.py.

#include <cstdint>
#include <cstdio>
#include <cstring>
#include <random>
#include <vector>

#include "integer.h"
#include "isa.h"

using namespace pennyweight;

namespace {

std::mt19937 generator(1);

std::size_t from(std::size_t low, std::size_t high) { return std::uniform_int_distribution<std::size_t>(low, high)(generator); }

std::vector<float> normal(std::size_t count) {
    std::normal_distribution<float> distribution;
    std::vector<float> values(count);
    for (float &value : values) value = distribution(generator);
    return values;
}

bool integers_agree() {
    const std::size_t widths[] = {1, 2, 3, 4, 8};
    for (int trial = 0; trial < 60; ++trial) {
        Integers w{};
        w.rows = from(1, 150), w.cols = from(1, 300), w.bits = widths[trial % 5], w.group = 8 * from(1, 12);
        w.factor = static_cast<std::int32_t>(from(1, 2)), w.zero = static_cast<std::int32_t>(from(0, 8));
        std::vector<std::int16_t> codes(w.rows * w.cols);
        for (std::int16_t &code : codes)
            code = static_cast<std::int16_t>(w.bits == 8 ? static_cast<int>(from(0, 255)) - 128 : static_cast<int>(from(0, (1u << w.bits) - 1)));
        std::vector<std::uint8_t> arranged(w.blocks() * w.block_bytes());
        integer_arrange(codes.data(), w, arranged.data(), 1);
        const auto scale = normal(w.blocks() * w.groups() * block_rows), minimum = normal(scale.size());
        const auto column_scale = normal(w.cols), column_offset = normal(w.cols), bias = normal(w.rows);
        w.codes = arranged.data(), w.scale = scale.data();
        if (trial % 2) w.minimum = minimum.data(), w.column_scale = column_scale.data(), w.column_offset = column_offset.data();
        const std::size_t n = from(1, 30);
        const auto x = normal(n * w.cols);
        std::vector<float> first, decoded;
        for (const Isa isa : available())
            for (const unsigned threads : {1u, 3u}) {
                use(isa);
                std::vector<float> y(n * w.rows), values(w.rows * w.cols);
                integer_linear(w, x.data(), n, bias.data(), y.data(), trial % 3 ? 16 : 8, 40000.0, threads);
                integer_decode(w, 0, w.rows, values.data(), threads);
                if (first.empty()) first = y, decoded = values;
                if (std::memcmp(y.data(), first.data(), y.size() * 4) || std::memcmp(values.data(), decoded.data(), values.size() * 4)) {
                    std::printf("integers differ: %s, trial %d, %u threads\n", name(isa), trial, threads);
                    return false;
                }
            }
    }
    return true;
}

}  // namespace

int main() {
    for (const Isa isa : available()) std::printf("%s ", name(isa));
    std::printf("\n");
    return integers_agree() ? 0 : 1;
}
