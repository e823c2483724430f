#include "integer.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include "isa.h"
#include "parallel.h"

namespace pennyweight {
namespace {

constexpr std::size_t few = 4;             // inputs up to which weights are read in place, without a panel
constexpr std::size_t rows_at_once = 128;  // inputs that share a panel: their sums stay in the cache

// One block of rows against inputs first .. last-1.
class BlockProduct {
public:
    BlockProduct(const Integers &w, const Activations &a, const IntegerKernels &k, const Panels *panels, const std::uint8_t *tables, int parts)
        : w_(w), a_(a), k_(k), panels_(panels), tables_(tables), parts_(parts) {}

    void run(std::size_t b, std::size_t first, std::size_t last, const float *bias, float *y) const {
        thread_local std::vector<float> out;
        const std::size_t n = last - first;
        out.assign(n * block_rows, 0.0f);
        if (panels_ == nullptr)
            for (std::size_t m = first; m < last; ++m)
                k_.one_input(w_, b, a_, m, tables_ == nullptr ? nullptr : tables_ + m * parts_ * w_.padded() * 8, parts_, out.data() + (m - first) * block_rows);
        else
            by_panels(b, first, last, out.data());
        escapes(b, first, last, out.data());
        const std::size_t count = std::min(block_rows, w_.rows - b * block_rows);
        for (std::size_t m = 0; m < n; ++m) {
            float *to = y + (first + m) * w_.rows + b * block_rows;
            const float *from = out.data() + m * block_rows, step = a_.step[first + m], offset = a_.offset[first + m];
            for (std::size_t r = 0; r < count; ++r) {
                const float value = from[r] * step + offset;
                to[r] = bias == nullptr ? value : value + bias[b * block_rows + r];
            }
        }
    }

private:
    void by_panels(std::size_t b, std::size_t first, std::size_t last, float *out) const {
        thread_local std::vector<std::uint32_t> acc;
        alignas(64) std::uint8_t panel[Panels::most_bytes];
        acc.resize((last - first) * block_rows);
        for (std::size_t g = 0; g < a_.groups; ++g) {
            const std::size_t end = std::min((g + 1) * w_.group, w_.padded());
            for (std::size_t k = g * w_.group; k < end; k += Panels::most_columns) {
                const std::size_t stop = std::min(k + Panels::most_columns, end);
                panels_->arrange(w_, b, k, stop, panel);
                panels_->multiply(w_.bits, panel, stop - k, a_, first, last - first, k, k == g * w_.group, acc.data());
            }
            k_.end_group(w_, b, g, panels_->shift, a_, first, last, acc.data(), out);
        }
    }

    void escapes(std::size_t b, std::size_t first, std::size_t last, float *out) const {
        if (w_.escape_start == nullptr) return;
        for (std::int32_t e = w_.escape_start[b]; e < w_.escape_start[b + 1]; ++e) {
            const std::size_t r = static_cast<std::size_t>(w_.escape_row[e]), k = static_cast<std::size_t>(w_.escape_column[e]);
            const float value = w_.scale[(b * a_.groups + k / w_.group) * block_rows + r] * static_cast<float>(w_.escape_extra[e]);
            for (std::size_t m = first; m < last; ++m)
                out[(m - first) * block_rows + r] += value * static_cast<float>(a_.q[m * a_.stride + k]);
        }
    }

    const Integers &w_;
    const Activations &a_;
    const IntegerKernels &k_;
    const Panels *panels_;        // null for few inputs
    const std::uint8_t *tables_;  // null for weights that are bytes
    int parts_;
};

}  // namespace

void integer_linear(const Integers &w, const float *x, std::size_t n, const float *bias, float *y, int activation_bits, double limit, unsigned threads) {
    if (n == 0 || w.rows == 0) return;
    const IntegerKernels &k = kernels().integer;
    // 16-bit inputs are read as two signed bytes, of which the larger value is 127 * 256 + 127.
    const double most = activation_bits == 8 ? 127.0 : 32639.0;
    const float largest = static_cast<float>(std::floor(std::max(1.0, std::min(most, 2147483647.0 / std::max(limit, 1.0)))));
    const bool by_table = w.planes() && n <= few, by_bytes = w.fours() && n <= few;
    const Panels *const panels = n <= few ? nullptr : &k.panels(w.bits, activation_bits);
    const int parts = activation_bits == 8 ? 1 : 2;
    const std::size_t padded = w.padded(), groups = w.groups();

    // Kept between calls: fresh pages for every product would cost as much as a small one. All of it is written below.
    thread_local std::vector<std::int16_t> q;
    thread_local std::vector<float> step, offset, total;
    thread_local std::vector<std::uint32_t> sum;
    thread_local std::vector<std::uint8_t> table_bytes;
    thread_local std::vector<std::int8_t> low, high;
    const auto room = [](auto &buffer, std::size_t size) {
        if (buffer.size() < size) buffer.resize(size);
        return buffer.data();
    };
    std::uint8_t *const tables = room(table_bytes, by_table ? n * parts * padded * 8 : 0);
    Activations a{room(q, n * padded), room(step, n), room(sum, n * groups),
                  w.minimum == nullptr ? nullptr : room(total, n * groups), room(offset, n), padded, groups, nullptr, nullptr, 0};
    const int bytes_each = by_bytes ? parts : panels == nullptr ? 0 : panels->parts;
    if (bytes_each > 0) {
        // They are read in steps of up to 64 columns, which may reach beyond a row, where the weight's are zero; an odd
        // number of cache lines keeps neighbouring rows out of each other's sets.
        a.byte_stride = ((padded / 64 + 2) | 1) * 64;
        a.low = room(low, n * a.byte_stride);
        if (bytes_each > 1) a.high = room(high, n * a.byte_stride);
    }
    const std::size_t share = std::max<std::size_t>(1, 16384 / std::max<std::size_t>(padded, 1));
    parallel_for((n + share - 1) / share, n * padded < 65536 ? 1 : threads, [&](std::size_t i) {
        const std::size_t last = std::min(n, (i + 1) * share);
        k.quantise(w, x, i * share, last, largest, a);
        for (std::size_t m = i * share; a.low != nullptr && m < last; ++m)
            k.split(a.q + m * padded, padded, a.low + m * a.byte_stride, a.high == nullptr ? nullptr : a.high + m * a.byte_stride);
        for (std::size_t m = i * share; by_table && m < last; ++m)
            for (int part = 0; part < parts; ++part)
                k.tables(a.q + m * padded, padded, parts == 1 ? 0 : part + 1, tables + (m * parts + part) * padded * 8);
    });

    const BlockProduct product(w, a, k, panels, by_table ? tables : nullptr, parts);
    const std::size_t slices = (n + rows_at_once - 1) / rows_at_once, blocks = w.blocks();
    const bool small = static_cast<double>(n) * static_cast<double>(padded) * static_cast<double>(w.rows) < 200000.0;
    parallel_for(blocks * slices, small ? 1 : threads, [&](std::size_t i) {
        const std::size_t slice = i / blocks;
        product.run(i % blocks, n * slice / slices, n * (slice + 1) / slices, bias, y);
    });
}

void integer_decode(const Integers &w, std::size_t first, std::size_t last, float *out, unsigned threads) {
    if (first >= last) return;
    const IntegerKernels &k = kernels().integer;
    const std::size_t first_block = first / block_rows, blocks = (last - 1) / block_rows + 1 - first_block;
    parallel_for(blocks, threads, [&](std::size_t i) {
        const std::size_t start = (first_block + i) * block_rows;
        const std::size_t begin = std::max(start, first), end = std::min(start + block_rows, last);
        k.decode(w, first_block + i, begin - start, end - start, out + (begin - first) * w.cols, w.cols);
    });
}

void integer_arrange(const std::int16_t *codes, const Integers &w, std::uint8_t *out, unsigned threads) {
    parallel_for(w.blocks(), threads, [&](std::size_t b) {
        std::uint8_t *block = out + b * w.block_bytes();
        std::memset(block, 0, w.block_bytes());
        const std::size_t count = std::min(block_rows, w.rows - b * block_rows);
        for (std::size_t r = 0; r < count; ++r) {
            const std::int16_t *row = codes + (b * block_rows + r) * w.cols;
            for (std::size_t k = 0; k < w.cols; ++k) {
                if (w.bits == 8) {
                    block[(k / 2 * block_rows + r) * 2 + k % 2] = static_cast<std::uint8_t>(row[k]);
                    continue;
                }
                if (w.fours()) {
                    block[(k / 8 * block_rows + r) * 4 + k % 4] |= static_cast<std::uint8_t>(row[k] << k % 8 / 4 * 4);
                    continue;
                }
                for (std::size_t p = 0; p < w.bits; ++p)
                    block[(k / 8 * w.bits + p) * block_rows + r] |= static_cast<std::uint8_t>((row[k] >> p & 1) << k % 8);
            }
        }
    });
}

namespace {

template <typename T>
void unpack_row(const std::uint8_t *packed, std::size_t size, std::size_t bits, std::size_t cols, T *out) {
    const std::uint32_t mask = (1u << bits) - 1;
    for (std::size_t k = 0; k < cols; k += 8, packed += bits, size -= std::min(size, bits)) {  // eight codes fill `bits` bytes
        std::uint64_t half[2] = {0, 0};
        std::memcpy(half, packed, std::min(size, bits));
        for (std::size_t i = 0; i < std::min<std::size_t>(8, cols - k); ++i) {
            const std::size_t at = i * bits, word = at / 64, shift = at % 64;
            std::uint64_t value = half[word] >> shift;
            if (shift + bits > 64) value |= half[1] << (64 - shift);
            out[k + i] = static_cast<T>(value & mask);
        }
    }
}

}  // namespace

void unpack_rows(const std::uint8_t *packed, std::size_t size, std::size_t bits, std::size_t cols, const std::int64_t *index, std::size_t count, void *out, unsigned threads) {
    const std::size_t share = std::max<std::size_t>(1, 65536 / std::max<std::size_t>(cols, 1));
    parallel_for((count + share - 1) / share, threads, [&](std::size_t i) {
        for (std::size_t r = i * share; r < std::min(count, (i + 1) * share); ++r) {
            const std::uint8_t *row = packed + static_cast<std::size_t>(index[r]) * size;
            if (bits <= 8)
                unpack_row(row, size, bits, cols, static_cast<std::uint8_t *>(out) + r * cols);
            else
                unpack_row(row, size, bits, cols, static_cast<std::int32_t *>(out) + r * cols);
        }
    });
}

}  // namespace pennyweight
