#pragma once
#include <cstddef>
#include <cstdint>

namespace pennyweight {

constexpr std::size_t block_rows = 64;  // rows of a weight that lie together
constexpr std::size_t span = 32;        // column bytes (8 columns each) whose sums, offset included, fit 16 bits

// An integer weight [rows, cols] as the kernels read it; kernels/integer.py says what the numbers mean.
//
// Rows come in blocks of 64, the last one filled up with zeros; columns are filled up to a multiple of 8.
//     bits 1..3   planes   [blocks][cols / 8][bits][64] bytes: bit i of a byte is column 8c + i of that plane and row
//     bits 4      fours    [blocks][cols / 8][64][4] bytes: byte j holds columns 8c + j, in its lower half, and 8c + 4 + j
//     bits 8      bytes    [blocks][cols / 2][64][2] signed bytes
// What is stored means factor * stored - zero, times the scale.
// scale, minimum: [blocks][groups][64]. A group has `group` columns, a multiple of 8; the last one may be shorter.
// Escapes are what bytes cannot hold, to be added to factor * stored - zero, sorted by block: those of block b are start[b] .. start[b+1]-1.
struct Integers {
    const std::uint8_t *codes;
    std::size_t rows, cols, bits, group;
    std::int32_t factor, zero;
    const float *scale, *minimum, *column_scale, *column_offset;  // all but scale may be null
    const std::int32_t *escape_start, *escape_row, *escape_column, *escape_extra;

    std::size_t blocks() const { return (rows + block_rows - 1) / block_rows; }
    std::size_t padded() const { return (cols + 7) / 8 * 8; }
    std::size_t groups() const { return (padded() + group - 1) / group; }
    bool planes() const { return bits < 4; }
    bool fours() const { return bits == 4; }
    std::size_t block_bytes() const { return padded() * block_rows * bits / 8; }
    const std::uint8_t *block(std::size_t b) const { return codes + b * block_bytes(); }
};

// Inputs of one call, quantised: x = q * step, row by row.
struct Activations {
    std::int16_t *q;          // [rows][stride], zeros beyond the columns
    float *step;              // [rows]; NaN where a row was not finite
    std::uint32_t *sum;       // [rows][groups] of q, modulo 2^32
    float *total;             // [rows][groups] of the unquantised x; null unless there is a minimum
    float *offset;            // [rows] x times the column offsets
    std::size_t stride, groups;
    std::int8_t *low, *high;  // q as signed bytes, low + 256 * high, rows `byte_stride` apart; null where nothing needs them
    std::size_t byte_stride;
};

// How a block meets many inputs: columns first .. last-1 (multiples of 8, at most `most_columns`) are arranged in a
// panel, of what is stored plus `shift`, and then multiplied with one input after the other.
struct Panels {
    static constexpr std::size_t most_columns = 256, most_bytes = most_columns * block_rows * 2;
    int parts;  // bytes that an input is split into; 0: int16 as they are
    std::int32_t shift;
    void (*arrange)(const Integers &, std::size_t block, std::size_t first, std::size_t last, std::uint8_t *out);
    // acc += (or, if fresh, =) panel . q for `rows` inputs from m on, whose columns from k on are meant
    void (*multiply)(std::size_t bits, const std::uint8_t *panel, std::size_t columns, const Activations &, std::size_t m, std::size_t rows, std::size_t k, bool fresh, std::uint32_t *acc);
};

// What is compiled once for each instruction set. `acc` is modulo 2^32, [rows][64].
struct IntegerKernels {
    // Quantises rows of x [.., cols] to whole numbers up to `largest`.
    void (*quantise)(const Integers &, const float *x, std::size_t first, std::size_t last, float largest, Activations &);
    // q = low + 256 * high, all of them signed; without `high`, q itself fits a byte.
    void (*split)(const std::int16_t *q, std::size_t count, std::int8_t *low, std::int8_t *high);
    // Sums of four columns for each of the 16 choices of them: [cols / 4][fine bytes 16, coarse bytes 16].
    // part 0: of q; 1: of its low byte, as a signed number; 2: of what remains, in units of 256.
    void (*tables)(const std::int16_t *q, std::size_t cols, int part, std::uint8_t *out);
    // y[64] += the block's product with input m, in units of its step: planes by its tables, of which two parts, 1 and 2,
    // lie one behind the other; fours by a.low and, with two parts, a.high; bytes by a.q.
    void (*one_input)(const Integers &, std::size_t block, const Activations &, std::size_t m, const std::uint8_t *tables, int parts, float *y);
    // The quickest way to multiply weights of so many bits with many inputs of 8 or 16 bits.
    const Panels &(*panels)(std::size_t bits, int activation_bits);
    // y[n][64] += what acc, made of panels with that shift, means in a group, for inputs first .. last-1.
    void (*end_group)(const Integers &, std::size_t block, std::size_t group, std::int32_t shift, const Activations &, std::size_t first, std::size_t last, const std::uint32_t *acc, float *y);
    // The values of rows first .. last-1 of a block, float32 [last - first][cols], rows `stride` apart.
    void (*decode)(const Integers &, std::size_t block, std::size_t first, std::size_t last, float *out, std::size_t stride);
};

// y [n][rows] = x [n][cols] W^T + bias. activation_bits: 8 or 16. limit: most that sum |factor * stored - zero| over a group
// comes to, which bounds the whole numbers x is quantised to.
void integer_linear(const Integers &, const float *x, std::size_t n, const float *bias, float *y, int activation_bits, double limit, unsigned threads);

// The decoded rows first .. last-1, float32 [last - first][cols].
void integer_decode(const Integers &, std::size_t first, std::size_t last, float *out, unsigned threads);

// Arranges codes [rows][cols] as above: 0 .. 2^bits - 1 for planes and fours, signed bytes for 8 bits.
void integer_arrange(const std::int16_t *codes, const Integers &shape, std::uint8_t *out, unsigned threads);

// Codes of 1..16 bits, packed without gaps from the start of each row, least significant bit first (formats/bits.py):
// rows `index` [count] of packed [..][size] -> out [count][cols], uint8 up to 8 bits and int32 above.
void unpack_rows(const std::uint8_t *packed, std::size_t size, std::size_t bits, std::size_t cols, const std::int64_t *index, std::size_t count, void *out, unsigned threads);

}  // namespace pennyweight
