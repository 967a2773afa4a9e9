#include "matrix.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <future>
#include <thread>
#include <vector>

#include "memory.h"

namespace llmasos {

namespace {

uint32_t bits_of(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, 4);
    return bits;
}

float float_of(uint32_t bits) {
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
}

// Rounded to nearest, ties to even; NaN stays NaN.
uint32_t bfloat16(float value) {
    const uint32_t bits = bits_of(value);
    if (value != value) return (bits >> 16) | 0x40u;
    return (bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16;
}

int64_t bytes_of_panel(Kind kind, int64_t k) {
    switch (kind) {
        case FLOAT32: return k * PANEL * 4;
        case BFLOAT16: return k * PANEL * 2;
        case INT8: return k * PANEL;
        case INT4: return k / GROUP * (PANEL * 4 + PANEL * GROUP / 2);
    }
    return 0;
}

constexpr int64_t GROUP_BYTES = PANEL * 4 + PANEL * GROUP / 2;  // INT4
constexpr int64_t PARALLEL = 1 << 20;  // so many weights are worth threads

// One output, column `column` of panel `panel`.
struct Place {
    uint8_t* panel;
    int column;

    float* at_float(int k) const { return reinterpret_cast<float*>(panel) + int64_t{k} * PANEL + column; }
    uint16_t* at_bfloat(int k) const {
        return reinterpret_cast<uint16_t*>(panel) + (int64_t{k / 2} * PANEL + column) * 2 + k % 2;
    }
    int8_t* at_int8(int k) const { return reinterpret_cast<int8_t*>(panel) + int64_t{k} * PANEL + column; }
    uint32_t* at_scale(int group) const { return reinterpret_cast<uint32_t*>(panel + group * GROUP_BYTES) + column; }
    uint32_t* at_int4(int k) const {  // the word that holds k
        return at_scale(k / GROUP) + PANEL + int64_t{k % GROUP / 8} * PANEL;
    }
};

void pack_int8(Place place, const float* row, int inputs, float& scale) {
    float most = 0;
    for (int k = 0; k < inputs; k++) most = std::max(most, std::fabs(row[k]));
    scale = most / 127.0f;
    const float inverse = scale > 0 ? 1.0f / scale : 0.0f;
    for (int k = 0; k < inputs; k++) {
        const float q = std::nearbyint(row[k] * inverse);
        *place.at_int8(k) = static_cast<int8_t>(std::min(127.0f, std::max(-127.0f, q)));
    }
}

// Four bits for the weights of a group: minimum + scale * (0 … 15), both in bfloat16.
struct Rounding {
    uint32_t both;  // scale, and the minimum in the upper half
    float error;    // weighted sum of squares

    float scale() const { return float_of(both << 16); }
    float minimum() const { return float_of(both & 0xFFFF0000u); }
};

// To the nearest whole number in [0, 15]. Adding 1.5 * 2^23 leaves no bits for a fraction.
inline float level(float value, float minimum, float inverse) {
    constexpr float WHOLE = 12582912.0f;
    return (std::min(15.0f, std::max(0.0f, (value - minimum) * inverse)) + WHOLE) - WHOLE;
}

// What becomes of `count` weights with that scale and minimum.
Rounding rounded(const float* w, const float* weight, int count, float scale, float minimum) {
    const uint32_t low = bfloat16(scale), high = bfloat16(minimum);
    Rounding out{low | (high << 16), 0};
    const float s = out.scale(), m = out.minimum(), inverse = s != 0 ? 1.0f / s : 0.0f;
    for (int k = 0; k < count; k++) {
        const float off = w[k] - (m + s * level(w[k], m, inverse));
        out.error += weight[k] * off * off;
    }
    return out;
}

// How many steps of the scale the range of a group is tried to be. First whole numbers: weights that have been rounded
// to four bits before, as in a GGUF file, lie on such a grid, and are found again. Then what is best for others: few
// weights at the ends may be cut so that all others are nearer.
constexpr float STEPS[] = {15, 14, 13, 12, 11, 10, 9, 8, 14.5f, 13.5f};

// For each of them, the best line through the levels (least squares). Errors count by the size of the weight, as in
// llama.cpp's K-quants: large ones are there for a reason.
Rounding best_rounding(const float* w, int count) {
    float weight[GROUP], least = w[0], most = w[0], mean = 0;
    for (int k = 0; k < count; k++) {
        least = std::min(least, w[k]), most = std::max(most, w[k]);
        mean += w[k] * w[k];
    }
    mean = std::sqrt(mean / static_cast<float>(count));
    for (int k = 0; k < count; k++) weight[k] = mean + std::fabs(w[k]);
    Rounding best = rounded(w, weight, count, (most - least) / 15.0f, least);
    if (!(most > least) || !std::isfinite(most - least)) return best;
    const float on_grid = 1e-5f * mean * mean * mean * static_cast<float>(count);
    for (const float steps : STEPS) {
        if (best.error < on_grid) break;
        const float inverse = steps / (most - least);
        float n = 0, q = 0, qq = 0, x = 0, qx = 0;
        for (int k = 0; k < count; k++) {
            const float l = level(w[k], least, inverse);
            n += weight[k];
            q += weight[k] * l;
            qq += weight[k] * l * l;
            x += weight[k] * w[k];
            qx += weight[k] * l * w[k];
        }
        const float determinant = n * qq - q * q;
        if (!(determinant > 0)) continue;
        const Rounding found = rounded(w, weight, count, (n * qx - q * x) / determinant, (qq * x - q * qx) / determinant);
        if (found.error < best.error) best = found;
    }
    return best;
}

void pack_int4(Place place, const float* row, int inputs, int group) {
    const int begin = group * GROUP, end = std::min(inputs, begin + GROUP);
    const Rounding found = best_rounding(row + begin, end - begin);
    *place.at_scale(group) = found.both;
    const float s = found.scale(), inverse = s != 0 ? 1.0f / s : 0.0f;
    for (int k = begin; k < end; k++)
        *place.at_int4(k) |= static_cast<uint32_t>(level(row[k], found.minimum(), inverse)) << (k % 8 * 4);
}

}  // namespace

Matrix make_matrix(Kind kind, int outputs, int inputs, bool with_bias) {
    Matrix m{};
    m.kind = kind;
    m.outputs = outputs;
    m.inputs = inputs;
    m.padded_inputs = static_cast<int32_t>(rounded_up(inputs, GROUP));
    m.panels = static_cast<int32_t>(rounded_up(outputs, PANEL) / PANEL);
    m.panel_bytes = bytes_of_panel(kind, m.padded_inputs);
    const size_t per_output = size_t(m.panels) * PANEL * sizeof(float);
    m.nbytes = m.panels * m.panel_bytes;
    try {
        m.data = static_cast<uint8_t*>(allocate(size_t(m.nbytes)));
        if (kind == INT8) m.scales = static_cast<float*>(allocate(per_output)), m.nbytes += int64_t(per_output);
        if (with_bias) m.bias = static_cast<float*>(allocate(per_output)), m.nbytes += int64_t(per_output);
    } catch (...) {
        free_matrix(m);
        throw;
    }
    return m;
}

void free_matrix(Matrix& m) {
    release(m.data);
    release(m.scales);
    release(m.bias);
    m.data = nullptr;
    m.scales = m.bias = nullptr;
}

namespace {

void pack_some(Matrix& m, const float* weight, const float* bias, int begin, int end) {
    for (int n = begin; n < end; n++) {
        const float* row = weight + int64_t{n} * m.inputs;
        const Place place{m.data + n / PANEL * m.panel_bytes, n % PANEL};
        if (m.bias) m.bias[n] = bias[n];
        switch (m.kind) {
            case FLOAT32:
                for (int k = 0; k < m.inputs; k++) *place.at_float(k) = row[k];
                break;
            case BFLOAT16:
                for (int k = 0; k < m.inputs; k++) *place.at_bfloat(k) = static_cast<uint16_t>(bfloat16(row[k]));
                break;
            case INT8: pack_int8(place, row, m.inputs, m.scales[n]); break;
            case INT4:
                for (int group = 0; group * GROUP < m.inputs; group++) pack_int4(place, row, m.inputs, group);
                break;
        }
    }
}

}  // namespace

void pack(Matrix& m, const float* weight, const float* bias) {
    const int64_t weights = int64_t{m.outputs} * m.inputs;
    const int parts = weights < PARALLEL ? 1 : std::max(1, int(std::thread::hardware_concurrency()));
    std::vector<std::future<void>> others;  // each waits for its part when it goes
    auto bound = [&](int part) { return int(int64_t{m.outputs} * part / parts); };
    for (int part = 1; part < parts; part++)
        others.push_back(std::async(std::launch::async,
                                    [&, part] { pack_some(m, weight, bias, bound(part), bound(part + 1)); }));
    pack_some(m, weight, bias, 0, bound(1));
}

void unpack(const Matrix& m, float* weight) {
    for (int n = 0; n < m.outputs; n++) {
        float* row = weight + int64_t{n} * m.inputs;
        const Place place{m.data + n / PANEL * m.panel_bytes, n % PANEL};
        for (int k = 0; k < m.inputs; k++) {
            switch (m.kind) {
                case FLOAT32: row[k] = *place.at_float(k); break;
                case BFLOAT16: row[k] = float_of(uint32_t{*place.at_bfloat(k)} << 16); break;
                case INT8: row[k] = m.scales[n] * static_cast<float>(*place.at_int8(k)); break;
                case INT4: {
                    const uint32_t both = *place.at_scale(k / GROUP);
                    const float q = static_cast<float>((*place.at_int4(k) >> (k % 8 * 4)) & 15u);
                    row[k] = std::fmaf(q, float_of(both << 16), float_of(both & 0xFFFF0000u));
                }
            }
        }
    }
}

}  // namespace llmasos
