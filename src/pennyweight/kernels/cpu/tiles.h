#pragma once
// The matrix tiles of AMX. What stands for them in a test build checks what the processor would refuse.
//
// A tile has up to 16 rows of up to 64 bytes, as `TileShapes` says for each of the eight. Tiles are named by literals 0 to 7.
//     tiles_configure   gives the tiles their shapes; all become zero
//     tiles_release     afterwards there are none
//     tile_load         rows `stride` bytes apart
//     tile_multiply     c[m][n] += sum over k and i < 4 of a[m][4k + i] * b[k][4n + i], signed bytes into int32

#include <cstddef>
#include <cstdint>
#include <cstring>

#if defined(PENNYWEIGHT_EMULATED)
#include <cstdlib>
#else
#include <immintrin.h>
#endif

namespace {

// As ldtilecfg reads it.
struct alignas(64) TileShapes {
    std::uint8_t palette = 1, start = 0, reserved[14] = {};
    std::uint16_t row_bytes[16] = {};
    std::uint8_t rows[16] = {};

    void set(int tile, std::size_t rows_of_it, std::size_t bytes) {
        rows[tile] = static_cast<std::uint8_t>(bytes == 0 ? 0 : rows_of_it);
        row_bytes[tile] = static_cast<std::uint16_t>(rows_of_it == 0 ? 0 : bytes);
    }
};
static_assert(sizeof(TileShapes) == 64, "the processor reads 64 bytes");

#if defined(PENNYWEIGHT_EMULATED)

struct Tiles {
    TileShapes shapes;
    std::uint8_t data[8][16][64];
};
static thread_local Tiles tiles;

static inline void tiles_configure(const TileShapes &shapes) {
    for (int t = 0; t < 8; ++t)
        if (shapes.rows[t] > 16 || shapes.row_bytes[t] > 64 || (shapes.rows[t] == 0) != (shapes.row_bytes[t] == 0)) std::abort();
    tiles = {shapes, {}};
}
static inline void tiles_release() { tiles = {}; }
static inline void tile_must_be(int t) {
    if (tiles.shapes.rows[t] == 0) std::abort();
}
static inline void tile_zero(int t) {
    tile_must_be(t);
    std::memset(tiles.data[t], 0, sizeof tiles.data[t]);
}
static inline void tile_load(int t, const void *from, std::size_t stride) {
    tile_zero(t);
    for (std::size_t r = 0; r < tiles.shapes.rows[t]; ++r)
        std::memcpy(tiles.data[t][r], static_cast<const std::uint8_t *>(from) + r * stride, tiles.shapes.row_bytes[t]);
}
static inline void tile_store(int t, void *to, std::size_t stride) {
    tile_must_be(t);
    for (std::size_t r = 0; r < tiles.shapes.rows[t]; ++r)
        std::memcpy(static_cast<std::uint8_t *>(to) + r * stride, tiles.data[t][r], tiles.shapes.row_bytes[t]);
}
static inline void tile_multiply(int c, int a, int b) {
    const TileShapes &s = tiles.shapes;
    tile_must_be(a), tile_must_be(b), tile_must_be(c);
    if (s.rows[c] != s.rows[a] || s.row_bytes[c] != s.row_bytes[b] || s.row_bytes[a] != 4 * s.rows[b] || a == b || a == c || b == c) std::abort();
    for (std::size_t m = 0; m < s.rows[c]; ++m)
        for (std::size_t n = 0; n < s.row_bytes[c]; n += 4) {
            std::uint32_t sum;
            std::memcpy(&sum, tiles.data[c][m] + n, 4);
            for (std::size_t k = 0; k < s.row_bytes[a]; ++k)
                sum += static_cast<std::uint32_t>(static_cast<std::int8_t>(tiles.data[a][m][k]) * static_cast<std::int8_t>(tiles.data[b][k / 4][n + k % 4]));
            std::memcpy(tiles.data[c][m] + n, &sum, 4);
        }
}

#else

static inline void tiles_configure(const TileShapes &shapes) {
    asm volatile("" : : "r"(&shapes) : "memory");  // GCC 12 takes only eight bytes of the shapes to be read
    _tile_loadconfig(&shapes);
}
static inline void tiles_release() { _tile_release(); }
#define tile_zero(t) _tile_zero(t)
#define tile_load(t, from, stride) _tile_loadd(t, from, stride)
#define tile_store(t, to, stride) _tile_stored(t, to, stride)
#define tile_multiply(c, a, b) _tile_dpbssd(c, a, b)

#endif

}  // namespace
