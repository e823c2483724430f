#pragma once
#include <cstddef>
#include <cstdint>

namespace pennyweight {

// One block of columns of error feedback on a uniform grid (compress/error_feedback.py has the formulas).
//
// work    [rows, width] float, row stride `stride`: read, the block's current values
// upper   [width, width] float, row stride `upper_stride`: U of the block
// row     [rows] float, column [width] float: the grid of an entry is row * column; 0 makes its code 0
// codes   [rows, width] int16: written
// errors  [rows, width] float: written, (value - code * grid) / U_jj, for the update of later blocks
struct Block {
    const float *work;
    std::size_t stride;
    const float *upper;
    std::size_t upper_stride;
    const float *row;
    const float *column;
    std::int16_t *codes;
    float *errors;
    std::size_t rows;
    std::size_t width;
};

constexpr std::size_t max_width = 256;

void feedback_block(const Block &block, unsigned threads);

}  // namespace pennyweight
