// The tokens that can win a draw of "gumbel-fmix32/1" over a whole row of logits. The noise is computed fast here, to within
// kSlack; whoever decides computes the noise of these few tokens by the definition.
#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "noise.h"
#include "pool.h"

using namespace kc;

namespace {

constexpr long kChunk = 2048;

struct Row {
    const float *logits;
    Words words;
    vf noisy(long at, long width) const {
        vf x = width - at >= W ? load(logits + at) : tail(at, width);
        return x + gumbel(token_bits((vu)(lanes() + (int)at), words));
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
