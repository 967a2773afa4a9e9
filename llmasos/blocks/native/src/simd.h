// Vec: sixteen floats, and the few things that the kernels do with them.
//
// Laws:
// - A Vec has sixteen lanes on every machine: one AVX-512 register, two AVX2 registers, or an array of sixteen.
// - Every operation is one IEEE operation per lane, or a fixed tree of them, in the same order in each form. So the
//   AVX-512 and the AVX2 kernels give the same bits. The portable form gives them too where the compiler's target
//   multiplies and adds in one rounding; elsewhere `fma` rounds twice, and results agree to rounding only.
// - NaN goes through: no comparison swallows it.
//
// This file is included by kernels.cpp only, which is compiled once per form with its own flags. Everything here lies
// in an unnamed namespace and nothing of the standard library that is a template is used, so that no function
// compiled for AVX-512 can be picked by the linker for a machine without it.
#pragma once

#include <stddef.h>
#include <stdint.h>
#include <string.h>

#if defined(__AVX512F__) || defined(__AVX2__)
#include <immintrin.h>
#endif

namespace {

constexpr int LANES = 16;

#if defined(__AVX512F__) && defined(__AVX512DQ__)

struct Vec {
    __m512 v;
};
inline Vec load(const float* p) { return {_mm512_loadu_ps(p)}; }
inline void store(float* p, Vec a) { _mm512_storeu_ps(p, a.v); }
inline Vec fill(float s) { return {_mm512_set1_ps(s)}; }
inline Vec add(Vec a, Vec b) { return {_mm512_add_ps(a.v, b.v)}; }
inline Vec sub(Vec a, Vec b) { return {_mm512_sub_ps(a.v, b.v)}; }
inline Vec mul(Vec a, Vec b) { return {_mm512_mul_ps(a.v, b.v)}; }
inline Vec div(Vec a, Vec b) { return {_mm512_div_ps(a.v, b.v)}; }
inline Vec fma(Vec a, Vec b, Vec c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
// The second operand where either is NaN: put what may be NaN there.
inline Vec max(Vec a, Vec b) { return {_mm512_max_ps(a.v, b.v)}; }
inline Vec min(Vec a, Vec b) { return {_mm512_min_ps(a.v, b.v)}; }
inline Vec round(Vec a) { return {_mm512_roundscale_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)}; }
// 2^n for whole n in [-126, 127].
inline Vec power_of_two(Vec n) {
    __m512i bits = _mm512_slli_epi32(_mm512_add_epi32(_mm512_cvtps_epi32(n.v), _mm512_set1_epi32(127)), 23);
    return {_mm512_castsi512_ps(bits)};
}
// `a` where not x < limit, else zero.
inline Vec zero_below(Vec x, Vec limit, Vec a) {
    return {_mm512_maskz_mov_ps((__mmask16)~(_mm512_cmp_ps_mask(x.v, limit.v, _CMP_LT_OQ)), a.v)};
}
inline __m256 fold(Vec a) { return _mm256_add_ps(_mm512_castps512_ps256(a.v), _mm512_extractf32x8_ps(a.v, 1)); }
inline __m256 fold_max(Vec a) { return _mm256_max_ps(_mm512_castps512_ps256(a.v), _mm512_extractf32x8_ps(a.v, 1)); }

// Weights of other kinds, sixteen at a time.
struct Bits {
    __m512i v;
};
inline Bits load_bits(const void* p) { return {_mm512_loadu_si512(p)}; }
inline Vec low_half(Bits b) { return {_mm512_castsi512_ps(_mm512_slli_epi32(b.v, 16))}; }
inline Vec high_half(Bits b) { return {_mm512_castsi512_ps(_mm512_and_si512(b.v, _mm512_set1_epi32(-65536)))}; }
inline Vec from_bytes(const int8_t* p) {
    return {_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)p)))};
}
// Four bits of each of sixteen words, as 0.0 … 15.0: a look-up, which reads the low four bits of its index.
template <int SHIFT>
inline Vec nibble(Bits b) {
    const __m512 table = _mm512_setr_ps(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    return {_mm512_permutexvar_ps(_mm512_srli_epi32(b.v, SHIFT), table)};
}
inline void prefetch(const void* p) { _mm_prefetch((const char*)p, _MM_HINT_T0); }

#elif defined(__AVX2__) && defined(__FMA__)

struct Vec {
    __m256 lo, hi;
};
inline Vec load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
inline void store(float* p, Vec a) {
    _mm256_storeu_ps(p, a.lo);
    _mm256_storeu_ps(p + 8, a.hi);
}
inline Vec fill(float s) { return {_mm256_set1_ps(s), _mm256_set1_ps(s)}; }
inline Vec add(Vec a, Vec b) { return {_mm256_add_ps(a.lo, b.lo), _mm256_add_ps(a.hi, b.hi)}; }
inline Vec sub(Vec a, Vec b) { return {_mm256_sub_ps(a.lo, b.lo), _mm256_sub_ps(a.hi, b.hi)}; }
inline Vec mul(Vec a, Vec b) { return {_mm256_mul_ps(a.lo, b.lo), _mm256_mul_ps(a.hi, b.hi)}; }
inline Vec div(Vec a, Vec b) { return {_mm256_div_ps(a.lo, b.lo), _mm256_div_ps(a.hi, b.hi)}; }
inline Vec fma(Vec a, Vec b, Vec c) {
    return {_mm256_fmadd_ps(a.lo, b.lo, c.lo), _mm256_fmadd_ps(a.hi, b.hi, c.hi)};
}
inline Vec max(Vec a, Vec b) { return {_mm256_max_ps(a.lo, b.lo), _mm256_max_ps(a.hi, b.hi)}; }
inline Vec min(Vec a, Vec b) { return {_mm256_min_ps(a.lo, b.lo), _mm256_min_ps(a.hi, b.hi)}; }
inline Vec round(Vec a) {
    constexpr int nearest = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
    return {_mm256_round_ps(a.lo, nearest), _mm256_round_ps(a.hi, nearest)};
}
inline __m256 power_of_two(__m256 n) {
    __m256i bits = _mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127)), 23);
    return _mm256_castsi256_ps(bits);
}
inline Vec power_of_two(Vec n) { return {power_of_two(n.lo), power_of_two(n.hi)}; }
inline Vec zero_below(Vec x, Vec limit, Vec a) {
    return {_mm256_andnot_ps(_mm256_cmp_ps(x.lo, limit.lo, _CMP_LT_OQ), a.lo),
            _mm256_andnot_ps(_mm256_cmp_ps(x.hi, limit.hi, _CMP_LT_OQ), a.hi)};
}
inline __m256 fold(Vec a) { return _mm256_add_ps(a.lo, a.hi); }
inline __m256 fold_max(Vec a) { return _mm256_max_ps(a.lo, a.hi); }

struct Bits {
    __m256i lo, hi;
};
inline Bits load_bits(const void* p) {
    return {_mm256_loadu_si256((const __m256i*)p), _mm256_loadu_si256((const __m256i*)p + 1)};
}
inline Vec low_half(Bits b) {
    return {_mm256_castsi256_ps(_mm256_slli_epi32(b.lo, 16)), _mm256_castsi256_ps(_mm256_slli_epi32(b.hi, 16))};
}
inline Vec high_half(Bits b) {
    const __m256i mask = _mm256_set1_epi32(-65536);
    return {_mm256_castsi256_ps(_mm256_and_si256(b.lo, mask)), _mm256_castsi256_ps(_mm256_and_si256(b.hi, mask))};
}
inline Vec from_bytes(const int8_t* p) {
    return {_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)p))),
            _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)(p + 8))))};
}
template <int SHIFT>
inline Vec nibble(Bits b) {
    const __m256i mask = _mm256_set1_epi32(15);
    return {_mm256_cvtepi32_ps(_mm256_and_si256(_mm256_srli_epi32(b.lo, SHIFT), mask)),
            _mm256_cvtepi32_ps(_mm256_and_si256(_mm256_srli_epi32(b.hi, SHIFT), mask))};
}
inline void prefetch(const void* p) { _mm_prefetch((const char*)p, _MM_HINT_T0); }

#else

struct Vec {
    float v[LANES];
};
#define LLMASOS_EACH(expression)                       \
    Vec out;                                           \
    for (int i = 0; i < LANES; i++) out.v[i] = (expression); \
    return out
inline Vec load(const float* p) { LLMASOS_EACH(p[i]); }
inline void store(float* p, Vec a) { memcpy(p, a.v, sizeof a.v); }
inline Vec fill(float s) { LLMASOS_EACH(s); }
inline Vec add(Vec a, Vec b) { LLMASOS_EACH(a.v[i] + b.v[i]); }
inline Vec sub(Vec a, Vec b) { LLMASOS_EACH(a.v[i] - b.v[i]); }
inline Vec mul(Vec a, Vec b) { LLMASOS_EACH(a.v[i] * b.v[i]); }
inline Vec div(Vec a, Vec b) { LLMASOS_EACH(a.v[i] / b.v[i]); }
#if defined(__FP_FAST_FMAF)
inline Vec fma(Vec a, Vec b, Vec c) { LLMASOS_EACH(__builtin_fmaf(a.v[i], b.v[i], c.v[i])); }
#else
inline Vec fma(Vec a, Vec b, Vec c) { LLMASOS_EACH(a.v[i] * b.v[i] + c.v[i]); }
#endif
inline Vec max(Vec a, Vec b) { LLMASOS_EACH(a.v[i] > b.v[i] ? a.v[i] : b.v[i]); }
inline Vec min(Vec a, Vec b) { LLMASOS_EACH(a.v[i] < b.v[i] ? a.v[i] : b.v[i]); }
// Adding 1.5 * 2^23 leaves no place for a fraction; right for |a| < 2^22.
inline Vec round(Vec a) { LLMASOS_EACH((a.v[i] + 12582912.0f) - 12582912.0f); }
inline Vec power_of_two(Vec n) {
    Vec out;
    for (int i = 0; i < LANES; i++) {
        float whole = n.v[i] >= -126.0f && n.v[i] <= 127.0f ? n.v[i] : 0.0f;  // NaN must not become an integer
        uint32_t bits = (uint32_t)((int32_t)whole + 127) << 23;
        memcpy(&out.v[i], &bits, 4);
    }
    return out;
}
inline Vec zero_below(Vec x, Vec limit, Vec a) { LLMASOS_EACH(x.v[i] < limit.v[i] ? 0.0f : a.v[i]); }

struct Bits {
    uint32_t v[LANES];
};
inline float as_float(uint32_t bits) {
    float out;
    memcpy(&out, &bits, 4);
    return out;
}
inline Bits load_bits(const void* p) {
    Bits out;
    memcpy(out.v, p, sizeof out.v);
    return out;
}
inline Vec low_half(Bits b) { LLMASOS_EACH(as_float(b.v[i] << 16)); }
inline Vec high_half(Bits b) { LLMASOS_EACH(as_float(b.v[i] & 0xFFFF0000u)); }
inline Vec from_bytes(const int8_t* p) { LLMASOS_EACH((float)p[i]); }
template <int SHIFT>
inline Vec nibble(Bits b) {
    LLMASOS_EACH((float)((b.v[i] >> SHIFT) & 15u));
}
inline void prefetch(const void* p) { __builtin_prefetch(p); }
#undef LLMASOS_EACH

#endif

// --- built from the above ---------------------------------------------------------------------------------------------

#if defined(__AVX2__) && defined(__FMA__)
// ((0+8)+(4+12)) + ((2+10)+(6+14)), and the same of the odd lanes.
inline float sum(Vec a) {
    __m256 eight = fold(a);
    __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
    __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(two, _mm_shuffle_ps(two, two, 1)));
}
inline float largest(Vec a) {
    __m256 eight = fold_max(a);
    __m128 four = _mm_max_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
    __m128 two = _mm_max_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_max_ss(two, _mm_shuffle_ps(two, two, 1)));
}
#else
inline float sum(Vec a) {
    for (int width = LANES / 2; width > 0; width /= 2)
        for (int i = 0; i < width; i++) a.v[i] = a.v[i] + a.v[i + width];
    return a.v[0];
}
inline float largest(Vec a) {
    for (int width = LANES / 2; width > 0; width /= 2)
        for (int i = 0; i < width; i++) a.v[i] = a.v[i] > a.v[i + width] ? a.v[i] : a.v[i + width];
    return a.v[0];
}
#endif

// e^x: within 2 units in the last place for |x| < 87; zero below, 1.7e38 above.
inline Vec exp(Vec x) {
    const Vec low = fill(-87.0f), one = fill(1.0f);
    Vec bounded = min(fill(88.0f), max(low, x));
    Vec n = round(mul(bounded, fill(1.44269504f)));
    Vec r = fma(n, fill(-0.693359375f), bounded);
    r = fma(n, fill(2.12194440e-4f), r);
    Vec y = fill(1.9875691500e-4f);  // the polynomial of Cephes' expf
    y = fma(y, r, fill(1.3981999507e-3f));
    y = fma(y, r, fill(8.3334519073e-3f));
    y = fma(y, r, fill(4.1665795894e-2f));
    y = fma(y, r, fill(1.6666665459e-1f));
    y = fma(y, r, fill(5.0000001201e-1f));
    y = fma(y, mul(r, r), add(r, one));
    return zero_below(x, low, mul(y, power_of_two(n)));
}

inline Vec tanh(Vec x) {
    const Vec one = fill(1.0f);
    return sub(one, div(fill(2.0f), add(exp(add(x, x)), one)));
}

}  // namespace
