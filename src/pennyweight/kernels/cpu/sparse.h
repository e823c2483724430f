#pragma once
#include <cstddef>
#include <cstdint>

namespace pennyweight {

constexpr std::size_t sparse_lanes = 64;  // rows of a sparse weight that lie together

// A weight [rows, cols] with few non-zeros as the kernels read it; kernels/sparse.py says how it is made.
//
// Rows are sorted by their number of non-zeros, and come in blocks of 64 lanes: lane r of block b is row order[64b + r].
// A block has start[b+1] - start[b] steps, as many as its longest row has non-zeros, and a step is one non-zero of each
// lane: column [steps][64], value [steps][64]. Within a row columns ascend. Where a row has no more, the column is `cols`.
// One of the values is not null. What is stored means value * scale[row], or value where there is no scale.
struct Sparse {
    const std::uint16_t *column;
    const float *floats;
    const std::uint16_t *halves;  // binary16
    const std::int8_t *bytes;
    const std::int64_t *start;  // [blocks + 1]
    const std::int32_t *order;  // [rows]
    const float *scale;         // [rows], may be null
    std::size_t rows, cols;

    std::size_t blocks() const { return (rows + sparse_lanes - 1) / sparse_lanes; }
};

// What is compiled once for each instruction set. All of them add up a row's products in the order of its columns, each
// product and each sum rounded by itself.
struct SparseKernels {
    std::size_t lanes;  // inputs that come in one vector
    // Stored values to floats.
    void (*from_halves)(const std::uint16_t *, std::size_t count, float *out);
    void (*from_bytes)(const std::int8_t *, std::size_t count, float *out);
    // sum[64] += value[t][64] * x[column[t][64]], step by step
    void (*one_input)(const std::uint16_t *column, const float *value, std::size_t steps, const float *x, float *sum);
    // sum[64][n] += value[t][64] * x[column[t][64]][n], where n is `vectors` times `lanes`; vectors: 1 to 4
    void (*inputs)(const std::uint16_t *column, const float *value, std::size_t steps, const float *x, std::size_t vectors, float *sum);
};

// y [n][rows] = x [n][cols] W^T + bias
void sparse_linear(const Sparse &, const float *x, std::size_t n, const float *bias, float *y, unsigned threads);

}  // namespace pennyweight
