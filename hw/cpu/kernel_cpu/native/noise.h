// The noise of "gumbel-fmix32/1" for W tokens at a time: fast, and to within kSlack. Whoever decides computes the noise of the few
// tokens that can win by the definition.
#pragma once
#include <cstdint>

#include "simd.h"

namespace kc {

constexpr float kSlack = 1e-3f;  // far more than the error of the noise; the logits' own rounding is added
constexpr uint32_t kGolden = 0x9E3779B9u, kSecond = 0x7F4A7C15u, kMix1 = 0x85EBCA6Bu, kMix2 = 0xC2B2AE35u;

KC_INLINE uint32_t fmix(uint32_t x) {
    x = (x ^ x >> 16) * kMix1;
    x = (x ^ x >> 13) * kMix2;
    return x ^ x >> 16;
}

struct Words {
    uint32_t a, b;
    Words(const int32_t *key, int64_t position)
        : a(fmix((uint32_t)key[0] ^ fmix((uint32_t)position + kGolden))), b(fmix((uint32_t)key[1] ^ fmix(a + kSecond))) {}
};

// Of normal positive numbers, to about 1 ulp.
KC_INLINE vf vlog(vf x) {
    vu bits = (vu)x - 0x3f3504f3u;  // so that the mantissa lies in [sqrt(1/2), sqrt(2))
    vf n = __builtin_convertvector((vi)bits >> 23, vf);
    vf r = (vf)((bits & 0x007fffffu) + 0x3f3504f3u) - 1.0f;
    vf p = splat(7.0376836292e-2f);
    for (float c : {-1.1514610310e-1f, 1.1676998740e-1f, -1.2420140846e-1f, 1.4249322787e-1f, -1.6668057665e-1f, 2.0000714765e-1f,
                    -2.4999993993e-1f, 3.3333331174e-1f})
        p = fma(p, r, splat(c));
    return fma(n, splat(0.69314718056f), fma(r * r, fma(p, r, splat(-0.5f)), r));
}

// The random bits of W tokens.
KC_INLINE vu token_bits(vu token, Words w) {
    vu x = token * kGolden + w.a;
    x = ((x ^ x >> 16) * kMix1) ^ w.b;
    x = (x ^ x >> 13) * kMix2;
    return x ^ x >> 16;
}

// Gumbel noise from random bits.
KC_INLINE vf gumbel(vu x) {
    vf high = __builtin_convertvector((vi)(x >> 16), vf), low = __builtin_convertvector((vi)(x & 0xffffu), vf);
    vf u = (high * 65536.0f + (low + 0.5f)) * 0x1p-32f;
    u = select((vi)(u < 0.99999994f), u, splat(0.99999994f));
    // -log(1 - u), where 1 - u would lose the digits of u by its series
    vf small = u * fma(u, fma(u, splat(0.33333333f), splat(0.5f)), splat(1.0f));
    return -vlog(select((vi)(u < 0x1p-9f), small, -vlog(1.0f - u)));
}

}  // namespace kc
