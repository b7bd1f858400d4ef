// Fixed-width vectors on GCC/Clang vector extensions: one source for AVX2, AVX-512 and everything else.
// KC_WIDTH (floats per vector) may be forced to run the wide layouts on a narrow machine.
#pragma once
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#if !defined(KC_WIDTH)
#if defined(__AVX512F__)
#define KC_WIDTH 16
#else
#define KC_WIDTH 8
#endif
#endif

// Products of bf16 pairs: the instruction, or its emulation so that the pair path can be tested anywhere.
#if (defined(__AVX512BF16__) && KC_WIDTH == 16) || defined(KC_EMULATE_DOT)
#define KC_DOT 1
#else
#define KC_DOT 0
#endif

#define KC_INLINE static inline __attribute__((always_inline))
#define KC_UNROLL _Pragma("GCC unroll 16")

namespace kc {

constexpr int W = KC_WIDTH;

struct bf16 {
    uint16_t bits;
};

typedef float vf __attribute__((vector_size(W * 4)));
typedef int32_t vi __attribute__((vector_size(W * 4)));
typedef uint32_t vu __attribute__((vector_size(W * 4)));
typedef uint16_t vh __attribute__((vector_size(W * 2)));
typedef int8_t vb __attribute__((vector_size(W)));
typedef float vf_mem __attribute__((vector_size(W * 4), aligned(4), may_alias));
typedef uint32_t vu_mem __attribute__((vector_size(W * 4), aligned(4), may_alias));
typedef uint16_t vh_mem __attribute__((vector_size(W * 2), aligned(2), may_alias));
typedef int8_t vb_mem __attribute__((vector_size(W), aligned(1), may_alias));

KC_INLINE vf splat(float x) { return x - vf{}; }
KC_INLINE vf as_float(vu x) { return (vf)x; }

KC_INLINE vf fma(vf a, vf b, vf c) {
#if KC_WIDTH == 16 && defined(__AVX512F__)
    return (vf)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif KC_WIDTH == 8 && defined(__FMA__)
    return (vf)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#elif KC_WIDTH == 16 && defined(__AVX__) && defined(__FMA__)
    __m256 x[2], y[2], z[2];
    memcpy(x, &a, 64), memcpy(y, &b, 64), memcpy(z, &c, 64);
    for (int i = 0; i < 2; ++i) z[i] = _mm256_fmadd_ps(x[i], y[i], z[i]);
    memcpy(&c, z, 64);
    return c;
#elif defined(__FMA__) || defined(__ARM_FEATURE_FMA)
    for (int i = 0; i < W; ++i) c[i] = __builtin_fmaf(a[i], b[i], c[i]);
    return c;
#else
    return a * b + c;
#endif
}

// acc += a * b in place. The compilers' own choice among the three forms of the instruction spills full register tiles.
KC_INLINE void fma_into(vf &acc, vf a, vf b) {
#if KC_WIDTH == 8 && defined(__FMA__)
    asm("vfmadd231ps %2, %1, %0" : "+x"(acc) : "x"(a), "x"(b));
#elif KC_WIDTH == 16 && defined(__AVX512F__)
    asm("vfmadd231ps %2, %1, %0" : "+v"(acc) : "v"(a), "v"(b));
#else
    acc = fma(a, b, acc);
#endif
}

// acc + a.lo * b.lo + a.hi * b.hi for the two bf16 halves of each lane.
KC_INLINE vf dot_pair(vf acc, vu a, vu b) {
#if defined(__AVX512BF16__) && KC_WIDTH == 16
    return (vf)_mm512_dpbf16_ps((__m512)acc, (__m512bh)(__m512i)a, (__m512bh)(__m512i)b);
#else
    acc = fma((vf)(a << 16), (vf)(b << 16), acc);
    return fma((vf)(a & 0xffff0000u), (vf)(b & 0xffff0000u), acc);
#endif
}

KC_INLINE vf select(vi mask, vf a, vf b) { return (vf)((mask & (vi)a) | (~mask & (vi)b)); }
KC_INLINE vf vmax(vf a, vf b) {  // a > b ? a : b
#if KC_WIDTH == 16 && defined(__AVX512F__)
    return (vf)_mm512_max_ps((__m512)a, (__m512)b);
#elif KC_WIDTH == 8 && defined(__AVX__)
    return (vf)_mm256_max_ps((__m256)a, (__m256)b);
#else
    return select((vi)(a > b), a, b);
#endif
}

KC_INLINE vi lanes() {
    vi r;
    for (int i = 0; i < W; ++i) r[i] = i;
    return r;
}

#if KC_WIDTH == 16 && defined(__AVX512F__)
template <int H> KC_INLINE __m256 half(vf v) { return _mm256_castpd_ps(_mm512_extractf64x4_pd((__m512d)v, H)); }
#endif

KC_INLINE float sum(vf v) {
#if KC_WIDTH == 8 && defined(__AVX__)
    __m128 h = _mm_add_ps(_mm256_castps256_ps128((__m256)v), _mm256_extractf128_ps((__m256)v, 1));
    h = _mm_add_ps(h, _mm_movehl_ps(h, h));
    return _mm_cvtss_f32(_mm_add_ss(h, _mm_movehdup_ps(h)));
#elif KC_WIDTH == 16 && defined(__AVX512F__)
    __m256 e = _mm256_add_ps(half<0>(v), half<1>(v));
    __m128 h = _mm_add_ps(_mm256_castps256_ps128(e), _mm256_extractf128_ps(e, 1));
    h = _mm_add_ps(h, _mm_movehl_ps(h, h));
    return _mm_cvtss_f32(_mm_add_ss(h, _mm_movehdup_ps(h)));
#else
    for (int s = W / 2; s; s /= 2)
        for (int i = 0; i < s; ++i) v[i] += v[i + s];
    return v[0];
#endif
}

KC_INLINE float largest(vf v) {
#if KC_WIDTH == 8 && defined(__AVX__)
    __m128 h = _mm_max_ps(_mm256_castps256_ps128((__m256)v), _mm256_extractf128_ps((__m256)v, 1));
    h = _mm_max_ps(h, _mm_movehl_ps(h, h));
    return _mm_cvtss_f32(_mm_max_ss(h, _mm_movehdup_ps(h)));
#elif KC_WIDTH == 16 && defined(__AVX512F__)
    __m256 e = _mm256_max_ps(half<0>(v), half<1>(v));
    __m128 h = _mm_max_ps(_mm256_castps256_ps128(e), _mm256_extractf128_ps(e, 1));
    h = _mm_max_ps(h, _mm_movehl_ps(h, h));
    return _mm_cvtss_f32(_mm_max_ss(h, _mm_movehdup_ps(h)));
#else
    for (int s = W / 2; s; s /= 2)
        for (int i = 0; i < s; ++i) v[i] = v[i] > v[i + s] ? v[i] : v[i + s];
    return v[0];
#endif
}

KC_INLINE vf load(const float *p) { return *(const vf_mem *)p; }
// The narrow integer conversions are spelt out: from the generic form the compilers make three times the instructions.
KC_INLINE vf load(const bf16 *p) {
#if KC_WIDTH == 8 && defined(__AVX2__)
    return (vf)_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)p)), 16);
#elif KC_WIDTH == 16 && defined(__AVX512F__)
    return (vf)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)p)), 16);
#else
    return (vf)(__builtin_convertvector((vh) * (const vh_mem *)p, vu) << 16);
#endif
}
KC_INLINE void store(float *p, vf x) { *(vf_mem *)p = x; }

// Round to nearest even; NaN becomes the quiet NaN that torch writes.
KC_INLINE vu bf16_bits(vf x) {
    vu u = (vu)x;
    vu nan = (vu)(x != x);
    vu r = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
    return (nan & 0x7fc0u) | (~nan & r);
}

KC_INLINE void store(bf16 *p, vf x) {
    vu bits = bf16_bits(x);
#if KC_WIDTH == 8 && defined(__AVX2__)
    __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32((__m256i)bits, (__m256i)bits), 0xd8);
    _mm_storeu_si128((__m128i *)p, _mm256_castsi256_si128(packed));
#elif KC_WIDTH == 16 && defined(__AVX512F__)
    _mm256_storeu_si256((__m256i *)p, _mm512_cvtepi32_epi16((__m512i)bits));
#else
    *(vh_mem *)p = __builtin_convertvector(bits, vh);
#endif
}

// The same for a weight of a softmax, which is no denormal: rounded by the instruction where there is one.
KC_INLINE void store_weight(bf16 *p, vf x) {
#if defined(__AVX512BF16__) && KC_WIDTH == 16
    _mm256_storeu_si256((__m256i *)p, (__m256i)_mm512_cvtneps_pbh((__m512)x));
#else
    store(p, x);
#endif
}

template <class T> KC_INLINE vf load_n(const T *p, int n) {
    if (n >= W) return load(p);
    T part[W] = {};
    memcpy(part, p, n * sizeof(T));
    return load(part);
}

template <class T> KC_INLINE void store_n(T *p, vf x, int n) {
    if (n >= W) return store(p, x);
    T part[W];
    store(part, x);
    memcpy(p, part, n * sizeof(T));
}

// The value after rounding to T and back: what a chain of torch ops in T would carry on with.
KC_INLINE vf rounded(vf x, const float *) { return x; }
KC_INLINE vf rounded(vf x, const bf16 *) { return (vf)(bf16_bits(x) << 16); }

KC_INLINE float to_float(float x) { return x; }
KC_INLINE float to_float(bf16 x) {
    uint32_t u = (uint32_t)x.bits << 16;
    float f;
    memcpy(&f, &u, 4);
    return f;
}
KC_INLINE void from_float(float *p, float x) { *p = x; }
KC_INLINE void from_float(bf16 *p, float x) {
    uint32_t u;
    memcpy(&u, &x, 4);
    p->bits = x != x ? 0x7fc0 : (uint16_t)((u + 0x7fffu + ((u >> 16) & 1u)) >> 16);
}

// exp for x <= 0, to about 1 ulp; exactly 0 below the smallest normal result, hence for -inf.
KC_INLINE vf vexp(vf x) {
    const vf magic = splat(12582912.0f);
    vf t = fma(x, splat(1.44269504088896341f), magic), n = t - magic;
    vf r = fma(n, splat(-0.693359375f), x);
    r = fma(n, splat(2.12194440e-4f), r);
    vf p = splat(1.9875691500e-4f);
    p = fma(p, r, splat(1.3981999507e-3f));
    p = fma(p, r, splat(8.3334519073e-3f));
    p = fma(p, r, splat(4.1665795894e-2f));
    p = fma(p, r, splat(1.6666665459e-1f));
    p = fma(p, r, splat(5.0000001201e-1f));
    p = fma(p, r * r, r) + 1.0f;
    // The low bits of t hold n: adding them to the exponent multiplies by 2^n.
    const vu scaled = (vu)p + ((vu)t << 23);
#if KC_WIDTH == 16 && defined(__AVX512F__)
    return (vf)_mm512_maskz_mov_epi32(_mm512_cmp_ps_mask((__m512)x, _mm512_set1_ps(-87.3f), _CMP_NLT_UQ), (__m512i)scaled);
#else
    return (vf)(~(vu)(x < -87.3f) & scaled);
#endif
}

KC_INLINE vf magnitude(vf x) { return (vf)((vu)x & 0x7fffffffu); }
KC_INLINE vf with_sign_of(vf x, vf sign) { return (vf)((vu)x | ((vu)sign & 0x80000000u)); }

KC_INLINE vf vtanh(vf x) {
    vf e = vexp(magnitude(x) * -2.0f);
    return with_sign_of((1.0f - e) / (1.0f + e), x);
}

KC_INLINE vf sigmoid(vf x) {
    vf e = vexp(-magnitude(x));
    return select((vi)(x < 0.0f), e, splat(1.0f)) / (1.0f + e);
}

// erfc(a) for a >= 0, relative error below 3e-7 where a * a is exact: exp(a * a) * erfc(a) is a polynomial in
// 1 / (1 + 0.4 a), fitted on 0 <= a <= 9.4. The far side of gelu is such a tail, where 1 - erf has no digits left.
KC_INLINE vf verfc(vf a) {
    vf t = 1.0f / fma(a, splat(0.4f), splat(1.0f));
    vf p = splat(0.04005287f);
    p = fma(p, t, splat(-0.13441319f));
    p = fma(p, t, splat(0.07162261f));
    p = fma(p, t, splat(0.10231225f));
    p = fma(p, t, splat(0.06968998f));
    p = fma(p, t, splat(0.19775416f));
    p = fma(p, t, splat(0.20075137f));
    p = fma(p, t, splat(0.22660551f));
    p = fma(p, t, splat(0.22562450f));
    return p * t * vexp(-a * a);
}

}  // namespace kc
