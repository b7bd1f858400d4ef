// The tokens that can win a draw of "gumbel-fmix32/1" over a whole row of logits. The noise is computed fast here, to within
// kSlack; whoever decides computes the noise of these few tokens by the definition.
#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "pool.h"
#include "simd.h"

using namespace kc;

namespace {

constexpr long kChunk = 2048;
constexpr float kSlack = 1e-3f;  // far more than the error of the noise; the logits' own rounding is added
constexpr uint32_t kGolden = 0x9E3779B9u, kSecond = 0x7F4A7C15u, kMix1 = 0x85EBCA6Bu, kMix2 = 0xC2B2AE35u;

uint32_t fmix(uint32_t x) {
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

// Gumbel noise of W tokens.
KC_INLINE vf noise(vu token, Words w) {
    vu x = token * kGolden + w.a;
    x = ((x ^ x >> 16) * kMix1) ^ w.b;
    x = (x ^ x >> 13) * kMix2;
    x = x ^ x >> 16;
    vf high = __builtin_convertvector((vi)(x >> 16), vf), low = __builtin_convertvector((vi)(x & 0xffffu), vf);
    vf u = (high * 65536.0f + (low + 0.5f)) * 0x1p-32f;
    u = select((vi)(u < 0.99999994f), u, splat(0.99999994f));
    // -log(1 - u), where 1 - u would lose the digits of u by its series
    vf small = u * fma(u, fma(u, splat(0.33333333f), splat(0.5f)), splat(1.0f));
    return -vlog(select((vi)(u < 0x1p-9f), small, -vlog(1.0f - u)));
}

struct Row {
    const float *logits;
    Words words;
    vf noisy(long at, long width) const {
        vf x = width - at >= W ? load(logits + at) : tail(at, width);
        return x + noise((vu)(lanes() + (int)at), words);
    }
    vf tail(long at, long width) const {
        float padded[W];
        std::fill(padded, padded + W, -std::numeric_limits<float>::infinity());
        memcpy(padded, logits + at, (width - at) * sizeof(float));
        return load(padded);
    }
};

float top_of(const Row &row, long begin, long end, long width) {
    vf top = splat(-std::numeric_limits<float>::infinity());
    for (long i = begin; i < end; i += W) top = vmax(row.noisy(i, width), top);
    return largest(top);
}

// Entered in ascending order; more than `room`: the count alone goes on.
long candidates(const Row &row, long width, const float *tops, float floor, int64_t *found, long room) {
    long count = 0;
    for (long begin = 0; begin < width; begin += kChunk) {
        if (!(tops[begin / kChunk] >= floor)) continue;
        for (long i = begin; i < std::min(width, begin + kChunk); i += W) {
            vf y = row.noisy(i, width);
            for (int lane = 0; lane < W && i + lane < width; ++lane)
                if (y[lane] >= floor && count++ < room) found[count - 1] = i + lane;
        }
    }
    return count;
}

}  // namespace

// found [n][room]: the candidates of each row, the last one repeated. Returns how many columns are used, 0 when a row has none
// (nothing allowed) or more than fit. Logits are float32 without NaN, contiguous.
KC_API int kc_draw(const float *logits, const int32_t *key, const int64_t *position, int64_t *found, long room, long n, long width) {
    long chunks = (width + kChunk - 1) / kChunk;
    std::vector<float> tops(n * chunks);
    parallel_ranges(n * chunks, 8, [&](long first, long last) {
        for (long i = first; i < last; ++i) {
            long r = i / chunks, begin = i % chunks * kChunk;
            Row row{logits + r * width, Words(key + 2 * r, position[r])};
            tops[i] = top_of(row, begin, std::min(width, begin + kChunk), width);
        }
    });
    long most = 0;
    for (long r = 0; r < n; ++r) {
        Row row{logits + r * width, Words(key + 2 * r, position[r])};
        const float *mine = tops.data() + r * chunks;
        float top = *std::max_element(mine, mine + chunks);
        long count = std::isfinite(top) ? candidates(row, width, mine, top - kSlack - std::fabs(top) * 1e-6f, found + r * room, room) : 0;
        if (count == 0 || count > room) return 0;
        std::fill(found + r * room + count, found + (r + 1) * room, found[r * room + count - 1]);
        most = std::max(most, count);
    }
    return (int)most;
}
