// What sampling asks of whole rows of logits: a draw after temperature, min_p, top_k and top_p, and the best tokens with the sum that
// makes them probabilities. A row is read once into memory of its thread; after that only blocks that can matter are looked at.
#include <algorithm>
#include <cmath>
#include <functional>
#include <limits>
#include <vector>

#include "noise.h"
#include "pool.h"

using namespace kc;

namespace {

constexpr float kNone = -std::numeric_limits<float>::infinity();
constexpr float kWeightOne = 0x1p30f;  // the likeliest token's weight: sums of integers do not depend on their order
constexpr long kLooks[] = {64, 256, 1024};

// A row of logits over a temperature, padded to whole blocks with -inf, and the largest of each block. `best` is NaN after one.
struct Row {
    float *x, *tops;
    long width, block, blocks;
    float best;

    template <class T> void read(const T *logits, long n, float temperature) {
        width = n;
        block = std::max<long>(W, n / 2048 / W * W);
        blocks = (n + block - 1) / block;
        x = (float *)scratch(4, (blocks * block + blocks) * sizeof(float));
        tops = x + blocks * block;
        best = kNone;
        for (long b = 0; b < blocks; ++b) {
            vf top = splat(kNone);
            vi broken = {};
            for (long i = b * block; i < (b + 1) * block; i += W) {
                vf v = splat(kNone);
                if (i + W <= n) v = load(logits + i) / splat(temperature);
                else for (long j = i; j < n; ++j) v[j - i] = to_float(logits[j]) / temperature;
                store(x + i, v);
                top = vmax(v, top);
                broken |= (vi)(v != v);
            }
            bool bad = false;
            for (int lane = 0; lane < W; ++lane) bad |= broken[lane] != 0;
            tops[b] = bad ? kNone : largest(top);
            best = bad ? std::numeric_limits<float>::quiet_NaN() : tops[b] > best ? tops[b] : best;
        }
    }

    // Calls body(first index, x) for the vectors of blocks that reach `floor`.
    template <class F> void each(float floor, F &&body) const {
        for (long b = 0; b < blocks; ++b) {
            if (!(tops[b] >= floor)) continue;
            for (long i = b * block; i < (b + 1) * block; i += W) body(b, i, load(x + i));
        }
    }

    // A value that at least `count` elements reach; -inf where that is all that can be said.
    float reached_by(long count) const {
        if (count > blocks) return kNone;
        std::vector<float> copy(tops, tops + blocks);
        std::nth_element(copy.begin(), copy.begin() + count - 1, copy.end(), std::greater<float>());
        return copy[count - 1];
    }
};

struct Entry {
    float value;
    int64_t token;
    bool operator<(const Entry &other) const { return value != other.value ? value > other.value : token < other.token; }
};

// At least the `count` best elements, best first, equal ones by their token.
std::vector<Entry> best_of(const Row &row, long count) {
    std::vector<Entry> found;
    const float floor = row.reached_by(count);
    row.each(floor, [&](long, long i, vf v) {
        vi mask = (vi)(v >= floor);
        for (int lane = 0; lane < W; ++lane)
            if (mask[lane] && i + lane < row.width) found.push_back({v[lane], i + lane});
    });
    std::sort(found.begin(), found.end());
    return found;
}

int32_t weight_of(float x, float best) { return (int32_t)(vexp(splat(x - best))[0] * kWeightOne); }

int64_t mass_of(const Row &row, float floor) {
    int64_t sum = 0;
    vu low = {}, high = {};
    long since = 0;
    auto flush = [&] {
        for (int lane = 0; lane < W; ++lane) sum += ((int64_t)high[lane] << 16) + low[lane];
        low = high = vu{}, since = 0;
    };
    row.each(floor, [&](long, long, vf v) {
        vf weight = vexp(v - splat(row.best)) * kWeightOne;
        vu w = (vu)__builtin_convertvector(weight, vi) & (vu)(v >= floor);
        low += w & 0xffffu, high += w >> 16;
        if (++since == 32768) flush();
    });
    flush();
    return sum;
}

// Floats as integers of the same order, and back.
uint32_t ordered(float x) {
    uint32_t u;
    memcpy(&u, &x, 4);
    return u & 0x80000000u ? ~u : u | 0x80000000u;
}
float from_ordered(uint32_t u) {
    u = u & 0x80000000u ? u & 0x7fffffffu : ~u;
    float x;
    memcpy(&x, &u, 4);
    return x;
}

// The largest value of which it is true that all that is as large weighs `wanted`: where that is too much to be put in order.
float heavy_enough(const Row &row, float floor, double wanted) {
    uint32_t low = ordered(std::max(floor, row.best - 88.0f)), high = ordered(row.best);  // below, nothing weighs anything
    while (low < high) {
        uint32_t middle = low + (high - low + 1) / 2;
        if ((double)mass_of(row, from_ordered(middle)) >= wanted) low = middle;
        else high = middle - 1;
    }
    return from_ordered(low);
}

// Where the weights of the first `count` entries, as far as they are at least `least`, add up to `wanted`; false: nowhere.
bool adds_up(const std::vector<Entry> &order, long count, float least, float best, double wanted, float &value) {
    int64_t mass = 0;
    for (long i = 0; i < count && order[i].value >= least; ++i) {
        mass += weight_of(value = order[i].value, best);
        if ((double)mass >= wanted) return true;
    }
    return false;
}

// The smallest value that top_k, then top_p keep of what is at least `floor`.
float lowest_of_best(const Row &row, float floor, long top_k, float top_p) {
    const std::vector<Entry> order = best_of(row, top_k);
    float least = std::max(floor, order[top_k - 1].value);
    if (top_p >= 1) return least;
    int64_t total = 0;
    for (long i = 0; i < top_k && order[i].value >= least; ++i) total += weight_of(order[i].value, row.best);
    adds_up(order, top_k, least, row.best, (double)top_p * (double)total, least);
    return least;
}

// The smallest value that top_p keeps of what is at least `floor`.
float lowest_of_all(const Row &row, float floor, float top_p) {
    const double wanted = (double)top_p * (double)mass_of(row, floor);
    float least = floor;
    for (long look : kLooks) {
        if (look > row.blocks) break;
        const std::vector<Entry> order = best_of(row, look);
        if (adds_up(order, (long)order.size(), floor, row.best, wanted, least)) return least;
    }
    return heavy_enough(row, floor, wanted);
}

// The tokens of at least `floor` whose noisy logits may be the largest, ascending. → how many; more than `room`: not all are entered.
long winners(const Row &row, float floor, Words words, int64_t *found, float *values, long room) {
    float top = kNone;
    long last = -1;
    uint32_t limit = 0;
    // Noise of at least t = top - (the block's largest) has u <= exp(-t), so most vectors' noise need not be made.
    auto may_win = [&](long b, vu bits, float bar) {
        if (b != last) {
            last = b;
            float t = bar - row.tops[b] - kSlack;
            limit = t <= 0 ? 0xffffffffu : (uint32_t)std::min(4294966272.0, std::exp(-(double)t) * 4294967296.0 * 1.001 + 512);
        }
        vi mask = (vi)(bits <= limit);
        int any = 0;
        for (int lane = 0; lane < W; ++lane) any |= mask[lane];
        return any != 0;
    };
    row.each(floor, [&](long b, long i, vf v) {
        vu bits = token_bits((vu)(lanes() + (int)i), words);
        if (!may_win(b, bits, top)) return;
        vf y = select((vi)(v >= floor), v + gumbel(bits), splat(kNone));
        float best = largest(y);
        if (best > top) top = best, last = -1;
    });
    if (!std::isfinite(top)) return 0;
    const float bar = top - kSlack - std::fabs(top) * 1e-6f;
    long count = 0;
    last = -1;
    row.each(floor, [&](long b, long i, vf v) {
        vu bits = token_bits((vu)(lanes() + (int)i), words);
        if (!may_win(b, bits, bar)) return;
        vf y = v + gumbel(bits);
        for (int lane = 0; lane < W && i + lane < row.width; ++lane)
            if (v[lane] >= floor && y[lane] >= bar && count++ < room) found[count - 1] = i + lane, values[count - 1] = v[lane];
    });
    return count;
}

void read_row(Row &row, int is_bf16, const void *logits, long stride, int64_t r, long width, float temperature) {
    if (is_bf16) row.read((const bf16 *)logits + r * stride, width, temperature);
    else row.read((const float *)logits + r * stride, width, temperature);
}

}  // namespace

// One draw for each of the n rows `rows` of logits: over their temperature, what log_min_p (-inf: off), top_k (0: off) and top_p (1: off)
// keep. found, values [n][room]: the tokens that can win and their logits, the last one repeated; counts [n]: how many, 0 where
// nothing can be drawn, more than `room` where too many are equal.
KC_API int kc_sample(int is_bf16, const void *logits, long stride, const int64_t *rows, const float *temperature, const float *log_min_p,
                     const int32_t *top_k, const float *top_p, const int32_t *key, const int64_t *position, int64_t *found,
                     float *values, int64_t *counts, long room, long n, long width) {
    parallel((int)n, [&](int i) {
        Row row;
        read_row(row, is_bf16, logits, stride, rows[i], width, temperature[i]);
        counts[i] = 0;
        if (!std::isfinite(row.best)) return;
        float floor = row.best + log_min_p[i];
        if (top_k[i] > 0) floor = lowest_of_best(row, floor, std::min<long>(top_k[i], width), top_p[i]);
        else if (top_p[i] < 1) floor = lowest_of_all(row, floor, top_p[i]);
        floor = std::max(floor, std::numeric_limits<float>::lowest());
        int64_t *ids = found + i * room;
        float *own = values + i * room;
        long count = winners(row, floor, Words(key + 2 * i, position[i]), ids, own, room);
        counts[i] = count;
        if (count == 0 || count > room) return;
        std::fill(ids + count, ids + room, ids[count - 1]);
        std::fill(own + count, own + room, own[count - 1]);
    });
    return 0;
}

// Of each of n rows: the k best tokens and their logits, best first; how many logits are larger than that of the token `chosen`; and
// the logarithm of the sum of all exponentials. Logits are fp32, contiguous.
KC_API int kc_rank(const float *logits, const int64_t *chosen, int64_t *tokens, float *values, int64_t *larger, float *log_sum, long k,
                   long n, long width) {
    parallel((int)n, [&](int r) {
        Row row;
        row.read(logits + r * width, width, 1.0f);
        const float own = logits[r * width + chosen[r]];
        long above = 0;
        row.each(own, [&](long, long, vf v) {
            vi mask = (vi)(v > own);
            for (int lane = 0; lane < W; ++lane) above -= mask[lane];
        });
        larger[r] = above;
        double sum = 0;
        vf part = {};
        long block = 0;
        row.each(row.best - 90.0f, [&](long b, long, vf v) {
            if (b != block) sum += kc::sum(part), part = vf{}, block = b;
            part += vexp(v - splat(row.best));
        });
        log_sum[r] = row.best + (float)std::log(sum + kc::sum(part));
        if (k == 0) return;
        std::vector<Entry> order = best_of(row, k);
        order.resize(k, Entry{kNone, 0});
        for (long i = 0; i < k; ++i) tokens[r * k + i] = order[i].token, values[r * k + i] = order[i].value;
    });
    return 0;
}

// -inf into the rows `rows` of logits where the words of each, a bit a token, have none.
KC_API int kc_mask(float *logits, long stride, const int64_t *rows, const uint32_t *words, long n, long width) {
    const long each = (width + 31) / 32;
    parallel((int)n, [&](int r) {
        float *x = logits + rows[r] * stride;
        const uint32_t *own = words + r * each;
        for (long i = 0; i < width; i += W) {
            const uint32_t bits = own[i / 32] >> i % 32;
            vi allowed = -(vi)((vu{} + bits) >> (vu)lanes() & 1u);
            int count = (int)std::min<long>(W, width - i);
            store_n(x + i, select(allowed, load_n(x + i, count), splat(kNone)), count);
        }
    });
    return 0;
}
