#pragma once
#include <cstddef>
#include <cstdint>

namespace pennyweight {

// Signs are bits, 1 for + and 0 for -, 64 columns to a word, the first column in the lowest bit. Bits beyond the columns
// are zero in both operands, so that they never differ. A product of signs is columns - 2 * (bits that differ).

constexpr std::size_t binary_block = 64;  // outputs worked on together: their signs are a word of the next layer
constexpr std::size_t binary_chunk = 15;  // words worked on at once: their panel and the inputs stay in the first cache
constexpr std::size_t binary_most = 1023; // words whose counts fit 16 bits

// What becomes of the products y.
struct BinaryOutput {
    std::int32_t *integers;         // y, or
    float *floats;                  // y * scale + bias, or
    std::uint64_t *signs;           // y >= threshold, the other way round where flip is set
    const float *scale, *bias;      // [outputs], null for 1 and 0
    const std::int32_t *threshold;  // [outputs]
    const std::uint8_t *flip;       // [outputs]
};

// x [images][height][width][groups][words], w [outputs][kernel height][kernel width][words];
// `channels` of a group, outputs a multiple of groups
struct BinaryConvolution {
    std::size_t images, height, width, groups, words, channels, outputs, kernel[2], stride[2], padding[2], dilation[2];
    bool padding_is_zero;  // else it is -1

    // Positions of the output along an axis (0: height); -1 if the kernel does not fit.
    std::ptrdiff_t positions(int axis) const {
        const std::size_t padded = (axis == 0 ? height : width) + 2 * padding[axis], reach = dilation[axis] * (kernel[axis] - 1) + 1;
        return padded < reach ? -1 : static_cast<std::ptrdiff_t>((padded - reach) / stride[axis] + 1);
    }
};

// What is compiled once for each instruction set.
struct BinaryKernels {
    // Bytes that a word of x takes in `multiply`: 8 for the word itself.
    std::size_t input_bytes;
    // x >= threshold (null: 0), false for NaN, for one row
    void (*pack)(const float *x, const float *threshold, std::size_t cols, std::uint64_t *out);
    // x as `multiply` wants it; null if it takes words
    void (*expand)(const std::uint64_t *x, std::size_t words, std::uint8_t *out);
    // Arranges `words` words of up to 64 rows of w for `multiply`: 1024 bytes a word or less. Missing rows are zeros.
    void (*panel)(const std::uint64_t *w, std::size_t stride, std::size_t outputs, std::size_t words, std::uint8_t *out);
    // acc [count][64] += bits in which a panel and an input differ. Input i is `taps` pieces of `words` words, that begin
    // `offset` bytes after inputs[i * step + tap]. taps * words is at most `binary_chunk`. The order of acc is its own.
    void (*multiply)(const std::uint8_t *panel, const std::uint8_t *const *inputs, std::size_t step, std::size_t count, std::size_t taps,
                     std::size_t offset, std::size_t words, std::uint16_t *acc);
    // counts[64] += acc[64] in the order of the outputs, and acc = 0
    void (*widen)(std::uint16_t *acc, std::uint32_t *counts);
    // counts[o] += bits in which x and row o of w differ, without a panel
    void (*differences)(const std::uint64_t *x, const std::uint64_t *w, std::size_t stride, std::size_t outputs, std::size_t words, std::uint32_t *counts);
    // The outputs of one block: y[64] = columns - 2 * (acc + counts) in the order of the outputs (counts may be null), and what is made of it
    void (*products)(const std::uint16_t *acc, const std::uint32_t *counts, std::int32_t columns, std::int32_t *y);
    void (*scaled)(const std::int32_t *y, const float *scale, const float *bias, std::size_t outputs, float *out);
    std::uint64_t (*compare)(const std::int32_t *y, const std::int32_t *threshold);  // of 64
};

// x [rows][cols] -> [rows][ceil(cols / 64)]; threshold [cols] or null
void binary_pack(const float *x, const float *threshold, std::size_t rows, std::size_t cols, std::uint64_t *out, unsigned threads);

// x [rows][words], w [outputs][words], `cols` columns; out [rows][outputs], or as signs [rows][ceil(outputs / 64)]
void binary_linear(const std::uint64_t *x, std::size_t rows, const std::uint64_t *w, std::size_t outputs, std::size_t words, std::size_t cols,
                   const BinaryOutput &out, unsigned threads);

// out [images][output height][output width][outputs], or as signs [..][ceil(outputs / 64)]
void binary_convolution(const BinaryConvolution &, const std::uint64_t *x, const std::uint64_t *w, const BinaryOutput &out, unsigned threads);

// Numbers of several bits, the highest plane first: x [rows][x_planes][words], y [others][y_planes][words];
// out [rows][others] = sum over i, j of 2^(x_planes - 1 - i + y_planes - 1 - j) times the bits in which planes differ
void binary_distances(const std::uint64_t *x, std::size_t rows, std::size_t x_planes, const std::uint64_t *y, std::size_t others, std::size_t y_planes,
                      std::size_t words, std::int32_t *out, unsigned threads);

}  // namespace pennyweight
