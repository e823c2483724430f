#include "binary.h"

#include <algorithm>
#include <cstring>
#include <vector>

#include "isa.h"
#include "parallel.h"

namespace pennyweight {
namespace {

constexpr std::size_t few = 8;              // inputs up to which arranging the weights would cost more than it saves
constexpr std::size_t inputs_at_once = 512;  // that share a panel: their sums stay in the second cache
constexpr std::size_t largest_panel = binary_chunk * binary_block * 16;

std::size_t words_of(std::size_t columns) { return (columns + 63) / 64; }

std::size_t parts(std::size_t count, std::size_t size) { return (count + size - 1) / size; }

// Work too small to wake another thread for.
unsigned worth(double steps, unsigned threads) { return steps < 3e6 ? 1 : threads; }

// Inputs as `multiply` takes them: found through pointers, one for each input and tap.
class Inputs {
public:
    // x [pixels][words]
    Inputs(const std::uint64_t *x, std::size_t pixels, std::size_t words, const BinaryKernels &k, unsigned threads)
        : data_(reinterpret_cast<const std::uint8_t *>(x)), pixel_bytes_(words * k.input_bytes) {
        if (k.expand == nullptr) return;
        expanded_.resize(pixels * pixel_bytes_);
        const std::size_t share = std::max<std::size_t>(1, 4096 / std::max<std::size_t>(1, words));
        parallel_for(parts(pixels, share), worth(100.0 * static_cast<double>(pixels * words), threads), [&](std::size_t i) {
            const std::size_t first = i * share, count = std::min(pixels, first + share) - first;
            k.expand(x + first * words, count * words, expanded_.data() + first * pixel_bytes_);
        });
        data_ = expanded_.data();
    }

    const std::uint8_t *pixel(std::size_t i) const { return data_ + i * pixel_bytes_; }

private:
    const std::uint8_t *data_;
    std::size_t pixel_bytes_;
    std::vector<std::uint8_t> expanded_;
};

// Bits in which rows of weights and inputs differ.
struct Differences {
    const BinaryKernels &k;
    const std::uint8_t *const *inputs;  // [inputs][step]
    std::size_t step, taps, offset, words;

    // take(i, y) with the products of `outputs` rows of w, `stride` apart, and input first + i, for all i below `count`. y has room for 64.
    template <typename Take>
    void products(const std::uint64_t *w, std::size_t stride, std::size_t outputs, std::size_t first, std::size_t count, std::int32_t columns, Take take) const {
        thread_local std::vector<std::uint16_t> acc;
        thread_local std::vector<std::uint32_t> counts;
        add(w, stride, outputs, first, count, acc, counts);
        for (std::size_t i = 0; i < count; ++i) {
            alignas(64) std::int32_t y[binary_block];
            k.products(acc.data() + i * binary_block, counts.empty() ? nullptr : counts.data() + i * binary_block, columns, y);
            take(i, y);
        }
    }

    // counts [count][64] of the bits themselves
    void count(const std::uint64_t *w, std::size_t stride, std::size_t outputs, std::size_t first, std::size_t count, std::vector<std::uint32_t> &counts) const {
        thread_local std::vector<std::uint16_t> acc;
        add(w, stride, outputs, first, count, acc, counts);
        widen(count, acc, counts);
    }

private:
    // acc: what was counted last; counts: what it did not hold, empty if it holds all
    void add(const std::uint64_t *w, std::size_t stride, std::size_t outputs, std::size_t first, std::size_t count, std::vector<std::uint16_t> &acc,
             std::vector<std::uint32_t> &counts) const {
        alignas(64) std::uint8_t panel[largest_panel];
        acc.assign(count * binary_block, 0);
        counts.clear();
        if (words == 0) return;
        // As many whole taps as fit a chunk, or chunks of one tap.
        const std::size_t taps_at_once = std::max<std::size_t>(1, binary_chunk / words), words_at_once = std::min(words, binary_chunk);
        std::size_t added = 0;
        for (std::size_t t = 0; t < taps; t += taps_at_once) {
            const std::size_t some = std::min(taps - t, taps_at_once);
            for (std::size_t begin = 0; begin < words; begin += words_at_once) {
                const std::size_t length = std::min(words - begin, words_at_once);
                if (added + some * length > binary_most) {
                    widen(count, acc, counts);
                    added = 0;
                }
                added += some * length;
                k.panel(w + t * words + begin, stride, outputs, some * length, panel);
                k.multiply(panel, inputs + first * step + t, step, count, some, offset + begin * k.input_bytes, length, acc.data());
            }
        }
    }

    void widen(std::size_t count, std::vector<std::uint16_t> &acc, std::vector<std::uint32_t> &counts) const {
        if (counts.empty()) counts.assign(count * binary_block, 0);
        for (std::size_t i = 0; i < count; ++i) k.widen(acc.data() + i * binary_block, counts.data() + i * binary_block);
    }
};

// What is made of the products of one block of outputs, input by input.
class BlockOutput {
public:
    BlockOutput(const BinaryKernels &k, const BinaryOutput &out, std::size_t outputs, std::size_t first, std::size_t count)
        : k_(k), out_(out), outputs_(outputs), first_(first), count_(count) {
        if (out.signs == nullptr) return;
        for (std::size_t o = 0; o < count; ++o) {
            threshold_[o] = out.threshold[first + o];
            flip_ |= static_cast<std::uint64_t>(out.flip[first + o] != 0) << o;
        }
        mask_ = count == 64 ? ~std::uint64_t(0) : (std::uint64_t(1) << count) - 1;
    }

    // `y` has room for 64
    void write(std::size_t input, std::int32_t *y) const {
        const std::size_t at = input * outputs_ + first_;
        if (out_.integers != nullptr)
            std::memcpy(out_.integers + at, y, count_ * sizeof(std::int32_t));
        else if (out_.floats != nullptr)
            k_.scaled(y, out_.scale == nullptr ? nullptr : out_.scale + first_, out_.bias == nullptr ? nullptr : out_.bias + first_, count_,
                      out_.floats + at);
        else
            out_.signs[input * words_of(outputs_) + first_ / 64] = (k_.compare(y, threshold_) ^ flip_) & mask_;
    }

private:
    const BinaryKernels &k_;
    const BinaryOutput &out_;
    std::size_t outputs_, first_, count_;
    std::int32_t threshold_[binary_block] = {};
    std::uint64_t flip_ = 0, mask_ = 0;
};

// Inputs to give one task: as many as share a panel well, but so few that all threads get work.
std::size_t slices_of(std::size_t inputs, std::size_t blocks, unsigned threads) {
    const std::size_t wanted = threads < 2 ? 1 : parts(4 * threads, std::max<std::size_t>(1, blocks));
    return std::max(parts(inputs, inputs_at_once), std::min(wanted, parts(inputs, 64)));
}

}  // namespace

void binary_pack(const float *x, const float *threshold, std::size_t rows, std::size_t cols, std::uint64_t *out, unsigned threads) {
    const BinaryKernels &k = kernels().binary;
    const std::size_t share = std::max<std::size_t>(1, 65536 / std::max<std::size_t>(1, cols));
    parallel_for(parts(rows, share), worth(10.0 * static_cast<double>(rows) * static_cast<double>(cols), threads), [&](std::size_t i) {
        for (std::size_t r = i * share; r < std::min(rows, (i + 1) * share); ++r) k.pack(x + r * cols, threshold, cols, out + r * words_of(cols));
    });
}

void binary_linear(const std::uint64_t *x, std::size_t rows, const std::uint64_t *w, std::size_t outputs, std::size_t words, std::size_t cols,
                   const BinaryOutput &out, unsigned threads) {
    if (rows == 0 || outputs == 0) return;
    const BinaryKernels &k = kernels().binary;
    const std::size_t blocks = parts(outputs, binary_block);
    const auto columns = static_cast<std::int32_t>(cols);
    const double steps = static_cast<double>(rows) * static_cast<double>(outputs) * static_cast<double>(cols);
    if (rows <= few) {
        parallel_for(blocks, worth(2 * steps, threads), [&](std::size_t b) {
            const std::size_t first = b * binary_block, count = std::min(outputs - first, binary_block);
            const BlockOutput block(k, out, outputs, first, count);
            for (std::size_t r = 0; r < rows; ++r) {
                std::uint32_t counts[binary_block] = {};
                std::int32_t y[binary_block];
                k.differences(x + r * words, w + first * words, words, count, words, counts);
                for (std::size_t o = 0; o < binary_block; ++o) y[o] = static_cast<std::int32_t>(static_cast<std::uint32_t>(columns) - 2 * counts[o]);
                block.write(r, y);
            }
        });
        return;
    }
    const Inputs inputs(x, rows, words, k, threads);
    std::vector<const std::uint8_t *> pointers(rows);
    for (std::size_t r = 0; r < rows; ++r) pointers[r] = inputs.pixel(r);
    const Differences differences{k, pointers.data(), 1, 1, 0, words};
    const std::size_t slices = slices_of(rows, blocks, threads);
    parallel_for(blocks * slices, worth(steps, threads), [&](std::size_t i) {
        const std::size_t slice = i / blocks, begin = rows * slice / slices, end = rows * (slice + 1) / slices;
        const std::size_t first = i % blocks * binary_block, count = std::min(outputs - first, binary_block);
        const BlockOutput block(k, out, outputs, first, count);
        differences.products(w + first * words, words, count, begin, end - begin, columns,
                             [&](std::size_t r, std::int32_t *y) { block.write(begin + r, y); });
    });
}

void binary_convolution(const BinaryConvolution &c, const std::uint64_t *x, const std::uint64_t *w, const BinaryOutput &out, unsigned threads) {
    const std::size_t out_height = static_cast<std::size_t>(c.positions(0)), out_width = static_cast<std::size_t>(c.positions(1));
    const std::size_t each = out_height * out_width, count = c.images * each, per_group = c.groups == 0 ? 0 : c.outputs / c.groups;
    if (count == 0 || per_group == 0) return;
    if (out.signs != nullptr && c.groups > 1 && per_group % binary_block != 0) {
        // A word of signs has outputs of several groups: by way of the integers.
        std::vector<std::int32_t> y(count * c.outputs);
        BinaryOutput integers{};
        integers.integers = y.data();
        binary_convolution(c, x, w, integers, threads);
        const BinaryKernels &k = kernels().binary;
        for (std::size_t first = 0; first < c.outputs; first += binary_block) {
            const std::size_t some = std::min(c.outputs - first, binary_block);
            const BlockOutput block(k, out, c.outputs, first, some);
            for (std::size_t i = 0; i < count; ++i) {
                std::int32_t part[binary_block] = {};
                std::memcpy(part, y.data() + i * c.outputs + first, some * sizeof(std::int32_t));
                block.write(i, part);
            }
        }
        return;
    }
    const BinaryKernels &k = kernels().binary;
    const std::size_t taps = c.kernel[0] * c.kernel[1], pixel = c.groups * c.words, row_words = taps * c.words;
    const std::size_t blocks = parts(per_group, binary_block), slices = slices_of(count, c.groups * blocks, threads);
    const Inputs inputs(x, c.images * c.height * c.width, pixel, k, threads);
    const std::vector<std::uint8_t> nothing(pixel * k.input_bytes, 0);  // a pixel of -1, in both forms of inputs

    // Where each output finds its taps. This is what im2col would copy, by reference: 8 bytes a tap, whatever the channels.
    std::vector<const std::uint8_t *> pointers(count * taps);
    std::vector<std::uint8_t> at_border(count, 0);
    parallel_for(c.images * out_height, worth(100.0 * static_cast<double>(count * taps), threads), [&](std::size_t line) {
        const std::size_t image = line / out_height, top = line % out_height * c.stride[0];
        for (std::size_t i = 0; i < out_width; ++i) {
            const std::size_t at = line * out_width + i, left = i * c.stride[1];
            const std::uint8_t **to = pointers.data() + at * taps;
            for (std::size_t a = 0; a < c.kernel[0]; ++a)
                for (std::size_t b = 0; b < c.kernel[1]; ++b) {
                    // wraps around, and so is too large, where it would be negative
                    const std::size_t row = top + a * c.dilation[0] - c.padding[0], column = left + b * c.dilation[1] - c.padding[1];
                    const bool inside = row < c.height && column < c.width;
                    *to++ = inside ? inputs.pixel((image * c.height + row) * c.width + column) : nothing.data();
                    if (!inside) at_border[at] = 1;
                }
        }
    });

    const auto columns = static_cast<std::int32_t>(taps * c.channels);
    const double steps = static_cast<double>(count) * static_cast<double>(c.outputs) * static_cast<double>(row_words) * 64;
    parallel_for(c.groups * blocks * slices, worth(steps, threads), [&](std::size_t i) {
        thread_local std::vector<std::int32_t> padded;
        const std::size_t slice = i / (c.groups * blocks), group = i / blocks % c.groups, b = i % blocks;
        const std::size_t begin = count * slice / slices, end = count * (slice + 1) / slices;
        const std::size_t first = group * per_group + b * binary_block, some = std::min(per_group - b * binary_block, binary_block);
        const std::uint64_t *rows = w + first * row_words;
        const Differences differences{k, pointers.data(), taps, taps, group * c.words * k.input_bytes, c.words};
        const BlockOutput block(k, out, c.outputs, first, some);
        if (c.padding_is_zero) {
            // What each tap adds to the products where it meets padding: channels - 2 * bits of the weight.
            padded.assign(taps * binary_block, 0);
            for (std::size_t o = 0; o < some; ++o)
                for (std::size_t t = 0; t < taps; ++t) {
                    std::int32_t bits = 0;
                    for (std::size_t n = 0; n < c.words; ++n) bits += __builtin_popcountll(rows[o * row_words + t * c.words + n]);
                    padded[t * binary_block + o] = static_cast<std::int32_t>(c.channels) - 2 * bits;
                }
        }
        differences.products(rows, row_words, some, begin, end - begin, columns, [&](std::size_t i, std::int32_t *y) {
            const std::size_t p = begin + i;
            if (c.padding_is_zero && at_border[p] != 0)
                for (std::size_t t = 0; t < taps; ++t)
                    if (pointers[p * taps + t] == nothing.data())
                        for (std::size_t o = 0; o < binary_block; ++o) y[o] -= padded[t * binary_block + o];
            block.write(p, y);
        });
    });
}

void binary_distances(const std::uint64_t *x, std::size_t rows, std::size_t x_planes, const std::uint64_t *y, std::size_t others, std::size_t y_planes,
                      std::size_t words, std::int32_t *out, unsigned threads) {
    if (rows == 0 || others == 0) return;
    const BinaryKernels &k = kernels().binary;
    const std::size_t blocks = parts(others, binary_block), stride = y_planes * words;
    const double steps = static_cast<double>(rows * x_planes) * static_cast<double>(others * stride) * 64;
    const bool direct = rows * x_planes <= few;
    const std::size_t slices = direct ? 1 : slices_of(rows, blocks, threads);
    const Inputs inputs(x, direct ? 0 : rows * x_planes, words, k, threads);
    std::vector<const std::uint8_t *> pointers(direct ? 0 : rows * x_planes);
    for (std::size_t i = 0; i < pointers.size(); ++i) pointers[i] = inputs.pixel(i);
    parallel_for(blocks * slices, worth(steps, threads), [&](std::size_t task) {
        thread_local std::vector<std::uint32_t> counts, sums;
        const std::size_t slice = task / blocks, begin = rows * slice / slices, end = rows * (slice + 1) / slices, n = end - begin;
        const std::size_t first = task % blocks * binary_block, some = std::min(others - first, binary_block);
        sums.assign(n * binary_block, 0);
        for (std::size_t i = 0; i < x_planes; ++i)
            for (std::size_t j = 0; j < y_planes; ++j) {
                const std::uint64_t *w = y + first * stride + j * words;
                if (direct) {
                    counts.assign(n * binary_block, 0);
                    for (std::size_t r = 0; r < n; ++r)
                        k.differences(x + ((begin + r) * x_planes + i) * words, w, stride, some, words, counts.data() + r * binary_block);
                } else {
                    const Differences differences{k, pointers.data() + i, x_planes, 1, 0, words};
                    differences.count(w, stride, some, begin, n, counts);
                }
                const std::size_t weight = x_planes - 1 - i + y_planes - 1 - j;
                for (std::size_t s = 0; s < counts.size(); ++s) sums[s] += counts[s] << weight;
            }
        for (std::size_t r = 0; r < n; ++r)
            std::memcpy(out + (begin + r) * others + first, sums.data() + r * binary_block, some * sizeof(std::int32_t));
    });
}

}  // namespace pennyweight
