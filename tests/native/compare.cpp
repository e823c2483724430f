// Runs the kernels of every instruction set there is on the same random weights and inputs; all must give the same bits, but for the last
// digits of optimizers' steps, where some processors round less often.
// For processors that Python does not run on here: built and started by tests/test_kernels_cross.py.

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <random>
#include <vector>

#include "binary.h"
#include "integer.h"
#include "isa.h"
#include "optimizer.h"
#include "sparse.h"

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

std::vector<std::uint64_t> signs(std::size_t rows, std::size_t cols) {
    const auto x = normal(rows * cols);
    std::vector<std::uint64_t> packed(rows * ((cols + 63) / 64));
    binary_pack(x.data(), nullptr, rows, cols, packed.data(), 1);
    return packed;
}

bool signs_agree() {
    for (int trial = 0; trial < 40; ++trial) {
        const std::size_t rows = from(1, 40), outputs = from(1, 150), cols = from(1, trial % 8 ? 700 : 70000), groups = from(1, 2);
        const auto values = normal(rows * cols), limits = normal(cols), scale = normal(outputs);
        const auto w = signs(outputs, cols), plane = signs(2 * rows, cols);
        BinaryConvolution c{from(1, 2), from(3, 7), from(3, 7), groups, 0, from(1, 200), groups * from(1, 70), {from(1, 3), from(1, 3)},
                            {from(1, 2), 1}, {from(0, 2), 1}, {1, from(1, 2)}, trial % 2 == 0};
        c.words = (c.channels + 63) / 64;
        if (c.positions(0) < 0 || c.positions(1) < 0) continue;
        const auto image = signs(c.images * c.height * c.width * groups, c.channels);
        const auto filter = signs(c.outputs * c.kernel[0] * c.kernel[1], c.channels);
        const std::size_t positions = c.images * static_cast<std::size_t>(c.positions(0)) * static_cast<std::size_t>(c.positions(1));
        const std::vector<std::int32_t> threshold(outputs, 3);
        const std::vector<std::uint8_t> flip(outputs, trial % 3 == 0);
        std::vector<std::int64_t> first;
        for (const Isa isa : available())
            for (const unsigned threads : {1u, 3u}) {
                use(isa);
                std::vector<std::uint64_t> packed(rows * ((cols + 63) / 64)), bits(rows * ((outputs + 63) / 64));
                std::vector<std::int32_t> y(rows * outputs), convolved(positions * c.outputs), distances(rows * outputs);
                std::vector<float> floats(rows * outputs);
                binary_pack(values.data(), limits.data(), rows, cols, packed.data(), threads);
                const std::size_t words = packed.size() / rows;
                BinaryOutput integers{}, scaled{}, compared{}, maps{};
                integers.integers = y.data(), maps.integers = convolved.data();
                scaled.floats = floats.data(), scaled.scale = scaled.bias = scale.data();
                compared.signs = bits.data(), compared.threshold = threshold.data(), compared.flip = flip.data();
                for (const BinaryOutput &out : {integers, scaled, compared})
                    binary_linear(packed.data(), rows, w.data(), outputs, words, cols, out, threads);
                binary_convolution(c, image.data(), filter.data(), maps, threads);
                binary_distances(plane.data(), rows, 2, w.data(), outputs, 1, words, distances.data(), threads);
                std::vector<std::int64_t> all(y.begin(), y.end());
                all.insert(all.end(), packed.begin(), packed.end());
                all.insert(all.end(), bits.begin(), bits.end());
                all.insert(all.end(), convolved.begin(), convolved.end());
                all.insert(all.end(), distances.begin(), distances.end());
                for (const float value : floats) {
                    std::int32_t pattern;
                    std::memcpy(&pattern, &value, 4);
                    all.push_back(pattern);
                }
                if (first.empty()) first = all;
                if (all != first) {
                    std::printf("signs differ: %s, trial %d, %u threads\n", name(isa), trial, threads);
                    return false;
                }
            }
    }
    return true;
}

bool sparse_agree() {
    for (int trial = 0; trial < 60; ++trial) {
        Sparse w{};
        w.rows = from(1, 150), w.cols = from(1, 300);
        std::vector<std::int64_t> start{0};
        std::vector<std::int32_t> order(w.rows);
        for (std::size_t r = 0; r < w.rows; ++r) order[r] = static_cast<std::int32_t>(w.rows - 1 - r);
        for (std::size_t b = 0; b < w.blocks(); ++b) start.push_back(start.back() + static_cast<std::int64_t>(from(0, 80)));
        const std::size_t count = static_cast<std::size_t>(start.back()) * sparse_lanes, n = from(1, 90);
        std::vector<std::uint16_t> column(count), halves(count);
        std::vector<std::int8_t> bytes(count);
        for (std::size_t i = 0; i < count; ++i) {
            column[i] = static_cast<std::uint16_t>(from(0, w.cols));
            halves[i] = static_cast<std::uint16_t>(from(0, 0x7bff) | from(0, 1) << 15);
            bytes[i] = static_cast<std::int8_t>(static_cast<int>(from(0, 255)) - 128);
        }
        const auto floats = normal(count), scale = normal(w.rows), bias = normal(w.rows), x = normal(n * w.cols);
        w.column = column.data(), w.start = start.data(), w.order = order.data();
        if (trial % 3 == 0) w.floats = floats.data();
        if (trial % 3 == 1) w.halves = halves.data();
        if (trial % 3 == 2) w.bytes = bytes.data(), w.scale = scale.data();
        std::vector<float> first;
        for (const Isa isa : available())
            for (const unsigned threads : {1u, 3u}) {
                use(isa);
                std::vector<float> y(n * w.rows), one(w.rows);
                sparse_linear(w, x.data(), n, bias.data(), y.data(), threads);
                sparse_linear(w, x.data(), 1, bias.data(), one.data(), threads);
                if (first.empty()) first = y;
                if (std::memcmp(y.data(), first.data(), y.size() * 4) || std::memcmp(one.data(), first.data(), one.size() * 4)) {
                    std::printf("sparse weights differ: %s, trial %d, %u threads\n", name(isa), trial, threads);
                    return false;
                }
            }
    }
    return true;
}

bool steps_agree() {
    for (const double p : {0.3, 0.5, 1.0, 1.5, 1.9, 2.0, 3.3}) {
        const std::size_t n = from(1, 200);
        const auto weight = normal(n), gradient = normal(n), moment = normal(n);
        std::vector<float> first;
        for (const Isa isa : available())
            for (const unsigned threads : {1u, 3u}) {
                use(isa);
                const Decay d = decay(p, 1e-3, 1e-13);
                auto w = weight, mean = moment, square = moment, rolling = weight, momentum = moment;
                std::vector<float> divisor(n);
                for (float &value : square) value *= value;
                adam({{w.data(), gradient.data(), mean.data(), square.data(), nullptr, n, 3.0}}, {0.01, 0.9, 0.99, 1e-8, false}, d, threads);
                sgd({{rolling.data(), gradient.data(), momentum.data(), n}}, {0.01, 0.9, 0.1, true, false}, d, threads);
                decay_divisors(d, weight.data(), divisor.data(), n, threads);
                for (const auto &more : {mean, square, rolling, momentum, divisor}) w.insert(w.end(), more.begin(), more.end());
                if (first.empty()) first = w;
                for (std::size_t i = 0; i < w.size(); ++i)
                    if (!(std::fabs(w[i] - first[i]) <= 2e-6f * std::fabs(first[i]) + 1e-7f)) {
                        std::printf("steps differ: %s, p %g, %u threads\n", name(isa), p, threads);
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
    return integers_agree() && signs_agree() && sparse_agree() && steps_agree() ? 0 : 1;
}
