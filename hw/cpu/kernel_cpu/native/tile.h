// The register tile shared by the matrix products of linear layers and attention:
// acc[MR rows][NV vectors] += A[MR][k] * B[k][NV * W], one accumulator per output, k in ascending order.
#pragma once
#include "simd.h"

namespace kc {

// A source yields the rows of B two at a time ("a pair": k = 2p and 2p + 1). kStride is what one pair occupies, in
// units of Item; row(h) is the half h of a pair for vector v, as floats. A source with kDot yields both halves as pairs of bf16.

template <int NV> struct Bf16Source {  // u32 lanes: (k = 2p in the low half, 2p + 1 in the high half)
    using Item = uint32_t;
    static constexpr int kStride = NV * W;
    static constexpr bool kDot = false;
    template <int H> KC_INLINE vf row(const Item *b, int v) {
        vu u = *(const vu_mem *)(b + v * W);
        return H ? (vf)(u & 0xffff0000u) : (vf)(u << 16);
    }
};

template <int NV> struct Bf16DotSource : Bf16Source<NV> {  // the same bytes, multiplied pair by pair
    static constexpr bool kDot = true;
    KC_INLINE vu pair(const uint32_t *b, int v) { return *(const vu_mem *)(b + v * W); }
};

template <int NV> struct F32Source {
    using Item = float;
    static constexpr int kStride = 2 * NV * W;
    static constexpr bool kDot = false;
    template <int H> KC_INLINE vf row(const Item *b, int v) { return load(b + (H * NV + v) * W); }
};

template <int NV> struct I8Source {
    using Item = int8_t;
    static constexpr int kStride = 2 * NV * W;
    static constexpr bool kDot = false;
    template <int H> KC_INLINE vf row(const Item *b, int v) {
#if KC_WIDTH == 8 && defined(__AVX2__)
        return (vf)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *)(b + (H * NV + v) * W))));
#elif KC_WIDTH == 16 && defined(__AVX512F__)
        return (vf)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)(b + (H * NV + v) * W))));
#else
        return __builtin_convertvector((vb) * (const vb_mem *)(b + (H * NV + v) * W), vf);
#endif
    }
};

template <int NV> struct I8DotSource : I8Source<NV> {  // the same bytes as pairs of bf16, which holds every int8
    static constexpr bool kDot = true;
    KC_INLINE vu pair(const int8_t *b, int v) {
        vu low = (vu)I8Source<NV>::template row<0>(b, v), high = (vu)I8Source<NV>::template row<1>(b, v);
        return low >> 16 | high;
    }
};

// One pair of k for NP panels of NV vectors. a points at the pair: A(i, h) = a[i * RS + h * KS].
template <class Src, int MR, int NP, int NV, int RS, int KS>
KC_INLINE void tile_pair(vf (&acc)[MR][NP * NV], const float *a, const typename Src::Item *b, ptrdiff_t panel) {
    if constexpr (Src::kDot) {
        if constexpr (MR > NP * NV) {
            vu w[NP * NV];
            KC_UNROLL for (int j = 0; j < NP * NV; ++j) w[j] = Src::pair(b + (j / NV) * panel, j % NV);
            KC_UNROLL for (int i = 0; i < MR; ++i) {
                uint32_t pair;
                memcpy(&pair, a + i * RS, 4);
                vu x = pair - vu{};
                KC_UNROLL for (int j = 0; j < NP * NV; ++j) acc[i][j] = dot_pair(acc[i][j], x, w[j]);
            }
        } else {
            vu x[MR];
            KC_UNROLL for (int i = 0; i < MR; ++i) {
                uint32_t pair;
                memcpy(&pair, a + i * RS, 4);
                x[i] = pair - vu{};
            }
            KC_UNROLL for (int j = 0; j < NP * NV; ++j) {
                vu w = Src::pair(b + (j / NV) * panel, j % NV);
                KC_UNROLL for (int i = 0; i < MR; ++i) acc[i][j] = dot_pair(acc[i][j], x[i], w);
            }
        }
    } else {
        vf w[NP * NV];
        KC_UNROLL for (int j = 0; j < NP * NV; ++j) w[j] = Src::template row<0>(b + (j / NV) * panel, j % NV);
        KC_UNROLL for (int i = 0; i < MR; ++i) {
            vf x = splat(a[i * RS]);
            KC_UNROLL for (int j = 0; j < NP * NV; ++j) fma_into(acc[i][j], x, w[j]);
        }
        KC_UNROLL for (int j = 0; j < NP * NV; ++j) w[j] = Src::template row<1>(b + (j / NV) * panel, j % NV);
        KC_UNROLL for (int i = 0; i < MR; ++i) {
            vf x = splat(a[i * RS + KS]);
            KC_UNROLL for (int j = 0; j < NP * NV; ++j) fma_into(acc[i][j], x, w[j]);
        }
    }
}

// The first half of a pair alone: nothing is made of the second, whatever lies there.
template <class Src, int MR, int NP, int NV, int RS>
KC_INLINE void tile_half(vf (&acc)[MR][NP * NV], const float *a, const typename Src::Item *b, ptrdiff_t panel) {
    KC_UNROLL for (int j = 0; j < NP * NV; ++j) {
        if constexpr (Src::kDot) {
            const vu w = Src::pair(b + (j / NV) * panel, j % NV) & 0xffffu;
            KC_UNROLL for (int i = 0; i < MR; ++i) {
                uint32_t pair;
                memcpy(&pair, a + i * RS, 4);
                acc[i][j] = dot_pair(acc[i][j], (pair & 0xffffu) - vu{}, w);
            }
        } else {
            const vf w = Src::template row<0>(b + (j / NV) * panel, j % NV);
            KC_UNROLL for (int i = 0; i < MR; ++i) fma_into(acc[i][j], splat(a[i * RS]), w);
        }
    }
}

}  // namespace kc
