// Linear layers, one panel after another.
//
// Few rows: the weights come from memory, and are unpacked in registers on their way. Many rows: a panel is unpacked
// to float32 once, stays in the cache, and all rows go over it. Both see the same weights in the same order.
#pragma once

#include "tile.h"

namespace {

using llmasos::LinearJob;

constexpr int64_t GROUP_BYTES = PANEL * 4 + PANEL * GROUP / 2;  // INT4: scales and minima, then GROUP k of four bits
constexpr int64_t X_BYTES = 384 * 1024;  // rows of x that are kept in a cache of 1 MiB beside a panel
constexpr int AHEAD = 2048;              // bytes of weights that are asked for before they are needed

// Ask for `bytes` of each panel, AHEAD of `w`. Past the end of the last one it is asked for nothing.
template <int VECS>
inline void ahead(const uint8_t* w, int64_t panel_bytes, int bytes) {
    for (int panel = 0; panel < (VECS + 1) / 2; panel++)
        for (int line = 0; line < bytes; line += 64) prefetch(w + panel * panel_bytes + AHEAD + line);
}

// Calls `use(k, weights of VECS vectors)` for STEP values of k.
template <llmasos::Kind KIND>
struct Unpack;

template <>
struct Unpack<llmasos::FLOAT32> {
    static constexpr int HALF = 64;  // bytes from one vector of a panel to the other
    static constexpr int STEP = 1;
    template <int VECS, class Use>
    static void step(const uint8_t* w, int64_t panel_bytes, int k, Use use) {
        Vec row[VECS];
        ahead<VECS>(w + int64_t{k} * PANEL * 4, panel_bytes, PANEL * 4);
#pragma GCC unroll 8
        for (int v = 0; v < VECS; v++)
            row[v] = load((const float*)(w + v / 2 * panel_bytes) + int64_t{k} * PANEL + v % 2 * LANES);
        use(k, row);
    }
};

template <>
struct Unpack<llmasos::BFLOAT16> {
    static constexpr int HALF = 64;  // bytes from one vector of a panel to the other
    static constexpr int STEP = 2;
    template <int VECS, class Use>
    static void step(const uint8_t* w, int64_t panel_bytes, int k, Use use) {
        Bits both[VECS];
        Vec row[VECS];
        ahead<VECS>(w + int64_t{k} * PANEL * 2, panel_bytes, PANEL * 4);
#pragma GCC unroll 8
        for (int v = 0; v < VECS; v++) {
            both[v] = load_bits(w + v / 2 * panel_bytes + int64_t{k} * PANEL * 2 + v % 2 * 64);
            row[v] = low_half(both[v]);
        }
        use(k, row);
#pragma GCC unroll 8
        for (int v = 0; v < VECS; v++) row[v] = high_half(both[v]);
        use(k + 1, row);
    }
};

template <>
struct Unpack<llmasos::INT8> {
    static constexpr int HALF = 16;  // bytes from one vector of a panel to the other
    static constexpr int STEP = 1;
    template <int VECS, class Use>
    static void step(const uint8_t* w, int64_t panel_bytes, int k, Use use) {
        Vec row[VECS];
        if (k % 2 == 0) ahead<VECS>(w + int64_t{k} * PANEL, panel_bytes, PANEL * 2);
#pragma GCC unroll 8
        for (int v = 0; v < VECS; v++)
            row[v] = from_bytes((const int8_t*)(w + v / 2 * panel_bytes) + int64_t{k} * PANEL + v % 2 * LANES);
        use(k, row);
    }
};

template <>
struct Unpack<llmasos::INT4> {
    static constexpr int HALF = 64;  // bytes from one vector of a panel to the other
    static constexpr int STEP = GROUP;
    template <int SHIFT, int VECS, class Use>
    static void eighth(const Bits (&words)[VECS], const Vec (&scale)[VECS], const Vec (&least)[VECS], int k, Use use) {
        Vec row[VECS];
#pragma GCC unroll 8
        for (int v = 0; v < VECS; v++) row[v] = fma(nibble<SHIFT>(words[v]), scale[v], least[v]);
        use(k, row);
    }
    template <int VECS, class Use>
    static void step(const uint8_t* w, int64_t panel_bytes, int k, Use use) {
        const uint8_t* group[VECS];
        Vec scale[VECS], least[VECS];
#pragma GCC unroll 8
        for (int v = 0; v < VECS; v++) {
            group[v] = w + v / 2 * panel_bytes + k / GROUP * GROUP_BYTES + v % 2 * 64;
            const Bits both = load_bits(group[v]);
            scale[v] = low_half(both);
            least[v] = high_half(both);
        }
        for (int part = 0; part < GROUP / 8; part++) {
            Bits words[VECS];
            ahead<VECS>(w + k / GROUP * GROUP_BYTES + part * PANEL * 4, panel_bytes, GROUP_BYTES / (GROUP / 8));
#pragma GCC unroll 8
            for (int v = 0; v < VECS; v++) words[v] = load_bits(group[v] + (part + 1) * PANEL * 4);
            const int at = k + part * 8;
            eighth<0>(words, scale, least, at, use);
            eighth<4>(words, scale, least, at + 1, use);
            eighth<8>(words, scale, least, at + 2, use);
            eighth<12>(words, scale, least, at + 3, use);
            eighth<16>(words, scale, least, at + 4, use);
            eighth<20>(words, scale, least, at + 5, use);
            eighth<24>(words, scale, least, at + 6, use);
            eighth<28>(words, scale, least, at + 7, use);
        }
    }
};

// out[i][16 v …] = x[i] * the panels at `w`.
template <llmasos::Kind KIND, int ROWS, int VECS>
void packed_tile(const uint8_t* w, int64_t panel_bytes, const float* x, int64_t x_stride, int inner, float* out,
                 int64_t out_stride) {
    Vec sums[ROWS][VECS];
#pragma GCC unroll 12
    for (int i = 0; i < ROWS; i++)
#pragma GCC unroll 8
        for (int v = 0; v < VECS; v++) sums[i][v] = fill(0.0f);
    auto use = [&](int k, const Vec(&row)[VECS]) __attribute__((always_inline)) {
#pragma GCC unroll 12
        for (int i = 0; i < ROWS; i++) {
            const Vec factor = fill(x[i * x_stride + k]);
#pragma GCC unroll 8
            for (int v = 0; v < VECS; v++) sums[i][v] = fma(factor, row[v], sums[i][v]);
        }
    };
    constexpr int STEP = Unpack<KIND>::STEP;
    for (int k = 0; k < inner; k += STEP) Unpack<KIND>::template step<VECS>(w, panel_bytes, k, use);
#pragma GCC unroll 12
    for (int i = 0; i < ROWS; i++)
#pragma GCC unroll 8
        for (int v = 0; v < VECS; v++) store(out + i * out_stride + v * LANES, sums[i][v]);
}

// A panel as float32, (padded inputs, PANEL).
template <llmasos::Kind KIND>
void unpack_panel(const uint8_t* w, int inner, float* out) {
    auto use = [&](int k, const Vec(&row)[2]) __attribute__((always_inline)) {
        store(out + int64_t{k} * PANEL, row[0]);
        store(out + int64_t{k} * PANEL + LANES, row[1]);
    };
    for (int k = 0; k < inner; k += Unpack<KIND>::STEP) Unpack<KIND>::template step<2>(w, 0, k, use);
}

// Results of a tile (rows, vecs * 16) to where they belong: scaled, with bias and residual, without the padding.
void finish(const LinearJob& job, int row, int rows, int first, int vecs, const float* sums, int64_t sums_stride) {
    const Matrix& m = *job.matrix;
    const int count = first + vecs * LANES <= m.outputs ? vecs * LANES : m.outputs - first;
    for (int i = 0; i < rows; i++) {
        float* y = job.y + (row + i) * job.y_stride + first;
        const float* residual = job.residual ? job.residual + (row + i) * job.y_stride + first : nullptr;
        const float* sum = sums + i * sums_stride;
        int n = 0;
        for (; n + LANES <= count; n += LANES) {
            Vec value = load(sum + n);
            if (m.scales) value = mul(value, load(m.scales + first + n));
            if (m.bias) value = add(value, load(m.bias + first + n));
            if (residual) value = add(load(residual + n), value);
            store(y + n, value);
        }
        for (; n < count; n++) {
            float value = sum[n];
            if (m.scales) value = value * m.scales[first + n];
            if (m.bias) value = value + m.bias[first + n];
            y[n] = residual ? residual[n] + value : value;
        }
    }
}

template <int COUNT>
struct Vecs {
    static constexpr int value = COUNT;
};

// Up to FULL_ROWS rows: weights are unpacked on the way.
template <llmasos::Kind KIND, int ROWS>
void few_rows(const LinearJob& job, int begin, int end, float* scratch) {
    constexpr int best = best_vecs(ROWS);
    const Matrix& m = *job.matrix;
    int first = begin * 2;  // in vectors: two to a panel
    auto run = [&](auto vecs) {
        constexpr int VECS = decltype(vecs)::value;
        packed_tile<KIND, ROWS, VECS>(m.panel(first / 2) + first % 2 * Unpack<KIND>::HALF, m.panel_bytes, job.x,
                                      job.x_stride, m.padded_inputs, scratch, VECS * LANES);
        finish(job, 0, ROWS, first * LANES, VECS, scratch, VECS * LANES);
        first += VECS;
    };
    if constexpr (best >= 8)
        while (first + 8 <= end * 2) run(Vecs<8>{});
    if constexpr (best >= 4)
        while (first + 4 <= end * 2) run(Vecs<4>{});
    if constexpr (best >= 2)
        while (first + 2 <= end * 2) run(Vecs<2>{});
    if constexpr (best == 1)
        while (first < end * 2) run(Vecs<1>{});
}

template <llmasos::Kind KIND>
void many_rows(const LinearJob& job, int begin, int end, float* scratch) {
    const Matrix& m = *job.matrix;
    float* sums = scratch;  // (TILE_ROWS, PANEL)
    float* unpacked = scratch + TILE_ROWS * PANEL;
    const int64_t fit = X_BYTES / (int64_t{m.padded_inputs} * 4) / FULL_ROWS * FULL_ROWS;
    const int block = fit < 4 * FULL_ROWS ? 4 * FULL_ROWS : (int)fit;
    for (int first = 0; first < job.rows; first += block) {
        const int last = first + block < job.rows ? first + block : job.rows;
        for (int panel = begin; panel < end; panel++) {
            const float* w = (const float*)m.panel(panel);
            if (KIND != llmasos::FLOAT32) {
                unpack_panel<KIND>(m.panel(panel), m.padded_inputs, unpacked);
                w = unpacked;
            }
            for (int row = first; row < last;) {
                const int left = last - row, tiles = (left + FULL_ROWS - 1) / FULL_ROWS;
                const int some = (left + tiles - 1) / tiles;  // even tiles: 16 rows are 8 and 8
                memset(sums, 0, sizeof(float) * TILE_ROWS * PANEL);
                product({job.x + row * job.x_stride, job.x_stride, w, PANEL, PANEL, m.padded_inputs, sums, PANEL}, some, 2);
                finish(job, row, some, panel * PANEL, 2, sums, PANEL);
                row += some;
            }
        }
    }
}

template <llmasos::Kind KIND>
void linear_of(const LinearJob& job, int begin, int end, float* scratch) {
    switch (job.rows) {
        case 1: return few_rows<KIND, 1>(job, begin, end, scratch);
        case 2: return few_rows<KIND, 2>(job, begin, end, scratch);
        case 3: return few_rows<KIND, 3>(job, begin, end, scratch);
        case 4: return few_rows<KIND, 4>(job, begin, end, scratch);
        case 5: return few_rows<KIND, 5>(job, begin, end, scratch);
        case 6: return few_rows<KIND, 6>(job, begin, end, scratch);
#if defined(__AVX512F__)
        case 7: return few_rows<KIND, 7>(job, begin, end, scratch);
        case 8: return few_rows<KIND, 8>(job, begin, end, scratch);
        case 9: return few_rows<KIND, 9>(job, begin, end, scratch);
        case 10: return few_rows<KIND, 10>(job, begin, end, scratch);
        case 11: return few_rows<KIND, 11>(job, begin, end, scratch);
        case 12: return few_rows<KIND, 12>(job, begin, end, scratch);
#endif
        default: return many_rows<KIND>(job, begin, end, scratch);
    }
}

void linear(const LinearJob& job, int begin, int end, float* scratch) {
    switch (job.matrix->kind) {
        case llmasos::FLOAT32: return linear_of<llmasos::FLOAT32>(job, begin, end, scratch);
        case llmasos::BFLOAT16: return linear_of<llmasos::BFLOAT16>(job, begin, end, scratch);
        case llmasos::INT8: return linear_of<llmasos::INT8>(job, begin, end, scratch);
        case llmasos::INT4: return linear_of<llmasos::INT4>(job, begin, end, scratch);
    }
}

}  // namespace
