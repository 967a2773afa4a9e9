// What happens to a row between the linear layers: norms, rotary embedding, gates.
#pragma once

#include "kernels.h"
#include "simd.h"

namespace {

// One over the root of the mean square; `padded` numbers, of which those from `width` on are zero.
float inverse_rms(const float* x, float eps, int width, int padded) {
    Vec squares = fill(0.0f);
    for (int i = 0; i < padded; i += LANES) {
        const Vec part = load(x + i);
        squares = fma(part, part, squares);
    }
    return 1.0f / __builtin_sqrtf(sum(squares) / (float)width + eps);
}

void rms_norm(const float* x, const float* weight, float eps, int width, int padded, const float* residual, float* y) {
    const Vec factor = fill(inverse_rms(x, eps, width, padded));
    for (int i = 0; i < padded; i += LANES) {
        const Vec normed = mul(mul(load(x + i), factor), load(weight + i));
        store(y + i, residual ? add(load(residual + i), normed) : normed);
    }
}

void head_norm(float* head, const float* weight, float eps, int width, float* scratch) {
    const int padded = (width + LANES - 1) / LANES * LANES;
    for (int i = width; i < padded; i++) scratch[i] = 0.0f;
    memcpy(scratch, head, sizeof(float) * (size_t)width);
    rms_norm(scratch, weight, eps, width, padded, nullptr, scratch);
    memcpy(head, scratch, sizeof(float) * (size_t)width);
}

// Products are rounded before they are added, on every machine: contraction is off in this file's flags.
void rotate(float* head, const float* cos, const float* sin, int width) {
    const int half = width / 2;
    for (int i = 0; i < half; i++) {
        const float a = head[i], b = head[i + half];
        head[i] = a * cos[i] - b * sin[i];
        head[i + half] = b * cos[i + half] + a * sin[i + half];
    }
}

void gate(llmasos::Activation activation, const float* gates_and_ups, int pairs, float* out) {
    const Vec one = fill(1.0f), half = fill(0.5f);
    for (int i = 0; i < pairs; i++) {
        const Vec x = load(gates_and_ups + i * 2 * LANES), up = load(gates_and_ups + i * 2 * LANES + LANES);
        Vec active;
        if (activation == llmasos::SILU) {
            active = div(x, add(one, exp(sub(fill(0.0f), x))));
        } else {
            const Vec cubic = fma(mul(mul(x, x), x), fill(0.044715f), x);
            active = mul(mul(half, x), add(one, tanh(mul(cubic, fill(0.7978845608f)))));
        }
        store(out + i * LANES, mul(active, up));
    }
}

}  // namespace
