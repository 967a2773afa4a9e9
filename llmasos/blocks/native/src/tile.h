// Tiles: ROWS rows of x times VECS vectors of sixteen outputs, held in registers while k runs from end to end.
//
// Laws:
// - An element of the result is its first value, plus x[k] * w[k] for k = 0, 1, 2, …, each in one fma. Nothing else:
//   no second accumulator, no cut in k. That is what makes a row's bits independent of the tile that it is in.
// - The k loop of a tile that unpacks weights sees the same weights in the same order as the float tile does with a
//   panel that was unpacked before.
//
// Weights of a tile: vector v for one k is 16 numbers at `(v / 2) * panel_stride + (v % 2) * 16` from there on.
#pragma once

#include "kernels.h"
#include "simd.h"

namespace {

using llmasos::GROUP;
using llmasos::Matrix;
using llmasos::PANEL;
using llmasos::TILE_ROWS;

// out[i][16 v …] += x[i][k] * w[k][v], all strides in floats; k counts `inner` steps of w_stride.
struct TileJob {
    const float* x;
    int64_t x_stride;
    const float* w;
    int64_t w_stride;
    int64_t panel_stride;
    int inner;
    float* out;
    int64_t out_stride;
};

template <int ROWS, int VECS>
void float_tile(const TileJob& t) {
    Vec sums[ROWS][VECS];
#pragma GCC unroll 12
    for (int i = 0; i < ROWS; i++)
#pragma GCC unroll 8
        for (int v = 0; v < VECS; v++) sums[i][v] = load(t.out + i * t.out_stride + v * LANES);
    const float* w = t.w;
    const float* x = t.x;
    for (int k = 0; k < t.inner; k++, w += t.w_stride, x++) {
        Vec row[VECS];
#pragma GCC unroll 8
        for (int v = 0; v < VECS; v++) {
            const float* vec = w + v / 2 * t.panel_stride + v % 2 * LANES;
            prefetch(vec + 512);
            row[v] = load(vec);
        }
#pragma GCC unroll 12
        for (int i = 0; i < ROWS; i++) {
            const Vec factor = fill(x[i * t.x_stride]);
#pragma GCC unroll 8
            for (int v = 0; v < VECS; v++) sums[i][v] = fma(factor, row[v], sums[i][v]);
        }
    }
#pragma GCC unroll 12
    for (int i = 0; i < ROWS; i++)
#pragma GCC unroll 8
        for (int v = 0; v < VECS; v++) store(t.out + i * t.out_stride + v * LANES, sums[i][v]);
}

using Tile = void (*)(const TileJob&);

// How many vectors a tile of so many rows should have: enough chains of fma to hide their latency, few enough
// registers. 32 registers of sixteen floats with AVX-512; 16 of eight with AVX2.
#if defined(__AVX512F__)
constexpr int FULL_ROWS = 12;
constexpr int best_vecs(int rows) { return rows == 1 ? 8 : rows <= 6 ? 4 : 2; }
#else
constexpr int FULL_ROWS = 6;
constexpr int best_vecs(int rows) { return rows == 1 ? 4 : rows == 2 ? 2 : 1; }
#endif

template <int ROWS>
Tile float_tile_of(int vecs) {
    constexpr int best = best_vecs(ROWS);
    if constexpr (best >= 8)
        if (vecs == 8) return float_tile<ROWS, 8>;
    if constexpr (best >= 4)
        if (vecs == 4) return float_tile<ROWS, 4>;
    if constexpr (best >= 2)
        if (vecs == 2) return float_tile<ROWS, 2>;
    return float_tile<ROWS, 1>;
}

// The widest tile for `rows` rows and at most `vecs` vectors. `vecs` becomes what it has.
Tile float_tile_for(int rows, int& vecs) {
    int most = best_vecs(rows);
    while (most > vecs) most /= 2;
    vecs = most;
    switch (rows) {
        case 1: return float_tile_of<1>(vecs);
        case 2: return float_tile_of<2>(vecs);
        case 3: return float_tile_of<3>(vecs);
        case 4: return float_tile_of<4>(vecs);
        case 5: return float_tile_of<5>(vecs);
        case 6: return float_tile_of<6>(vecs);
#if defined(__AVX512F__)
        case 7: return float_tile_of<7>(vecs);
        case 8: return float_tile_of<8>(vecs);
        case 9: return float_tile_of<9>(vecs);
        case 10: return float_tile_of<10>(vecs);
        case 11: return float_tile_of<11>(vecs);
        default: return float_tile_of<12>(vecs);
#else
        default: return float_tile_of<6>(vecs);
#endif
    }
}

// `rows` rows by `vecs` vectors (w_stride apart for each k), in as few tiles as the registers allow.
void product(const TileJob& job, int rows, int vecs) {
    for (int row = 0; row < rows;) {
        const int tiles = (rows - row + FULL_ROWS - 1) / FULL_ROWS, some = (rows - row + tiles - 1) / tiles;
        for (int v = 0; v < vecs;) {
            int wide = v % 2 ? 1 : vecs - v;  // only a tile of one vector begins in the middle of a panel
            const Tile tile = float_tile_for(some, wide);
            TileJob part = job;
            part.x += row * job.x_stride;
            part.w += v / 2 * job.panel_stride + v % 2 * LANES;
            part.out += row * job.out_stride + v * LANES;
            tile(part);
            v += wide;
        }
        row += some;
    }
}

}  // namespace
