// What is read from the requests' own tokens: penalties on those that occurred, bans after them, drafts from what followed them.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <utility>
#include <vector>

#include "pool.h"
#include "simd.h"

using namespace kc;

namespace {

constexpr int64_t ANY = -2;  // in the prefix of a ban

// The tokens that a logits row's request has: those in the table, then the drafts before the row.
struct Tokens {
    const int32_t *held;
    long known, prompt;
    const int32_t *ancestors;
    const int64_t *drafts;
    long width;

    template <class F> void each(F &&body) const {
        for (long i = 0; i < known; ++i) body(held[i], i >= prompt);
        for (long i = 0; i < width; ++i)
            if (ancestors[i] >= 0 && drafts[ancestors[i]] >= 0) body((int32_t)drafts[ancestors[i]], true);
    }
};

// The products are rounded before they are subtracted, as torch's are.
float penalised(float x, float times, const float *numbers) {
    volatile float frequency = numbers[1] * times, presence = numbers[0] * (times > 0 ? 1.0f : 0.0f);
    volatile float repeated = x > 0 ? x / numbers[2] : x * numbers[2];
    volatile float counted = repeated - frequency;
    return counted - presence;
}

}  // namespace

// Logits rows `index` [n] of logits [N, V] in place; `numbers` [S, 3] presence, frequency, repetition by slot; see the op `penalise`.
KC_API int kc_penalise(float *logits, long logits_stride, const int64_t *index, const int64_t *slots, const int64_t *rows,
                       const int32_t *history, long stride, const int32_t *known, const int32_t *prompt, const int32_t *ancestors,
                       const int64_t *drafts, long drafts_stride, long width, const float *numbers, long columns, long n,
                       long vocab_size) {
    parallel((int)n, [&](int i) {
        thread_local std::vector<int32_t> counts;  // all zero between two rows
        if ((long)counts.size() < vocab_size) counts.resize(vocab_size, 0);
        const long row = index[i], slot = slots[row];
        const Tokens tokens{history + slot * stride, std::min<long>(known[slot], columns), prompt[slot], ancestors + row * width,
                            drafts + rows[row] * drafts_stride, width};
        tokens.each([&](int32_t token, bool is_output) { is_output ? counts[token] += 2 : counts[token] |= 1; });
        float *x = logits + row * logits_stride;
        tokens.each([&](int32_t token, bool) {
            const int32_t count = std::exchange(counts[token], 0);
            if (count) x[token] = penalised(x[token], (float)(count >> 1), numbers + slot * 3);
        });
    });
    return 0;
}

// `bans` [n, 3 + length]: a row of logits [N, V], a token, and until how many tokens are out after which prefix it gets -inf; see
// the op `ban`.
KC_API int kc_ban(float *logits, long logits_stride, const int64_t *bans, const int64_t *slots, const int64_t *rows,
                  const int64_t *positions, const int32_t *history, long stride, const int32_t *known, const int32_t *prompt,
                  const int32_t *ancestors, const int64_t *drafts, long drafts_stride, long width, long length, long n) {
    for (const int64_t *ban = bans; n > 0; --n, ban += 3 + length) {
        const long row = ban[0], slot = slots[row];
        if (positions[row] - prompt[slot] >= ban[2]) continue;
        const int32_t *before = ancestors + row * width;
        const long count = std::count_if(before, before + width, [](int32_t draft) { return draft >= 0; });
        bool holds = true;
        for (long k = 0; k < length && holds; ++k) {
            const long back = length - k - count;  // tokens before the drafts; 0 and less: a draft
            const long place = known[slot] - back;
            int64_t token = -1;
            if (back <= 0) token = drafts[rows[row] * drafts_stride + before[-back]];
            else if (place >= prompt[slot]) token = history[slot * stride + place];
            holds = ban[3 + k] == ANY || ban[3 + k] == token;
        }
        if (holds) logits[row * logits_stride + ban[1]] = -INFINITY;
    }
    return 0;
}

// Slots [n], of which the first `known` [n] tokens count, at most `length` → out [n, number]; see the op `look_up`.
KC_API int kc_look_up(const int32_t *history, long stride, const int64_t *slots, const int64_t *known, int64_t *out, long length,
                      long least, long most, long number, long n) {
    for (long row = 0; row < n; ++row) {
        const int32_t *tokens = history + slots[row] * stride;
        const long last = known[row] - 1;
        long longest = 0, end = -1;
        for (long place = std::min(last, length) - 1; place >= 0 && longest < most; --place) {
            if (tokens[place] != tokens[last]) continue;
            long run = 1;
            while (run < most && run <= place && tokens[place - run] == tokens[last - run]) ++run;
            if (run > longest) longest = run, end = place;
        }
        const long period = std::max<long>(last - end, 1);
        for (long k = 0; k < number; ++k)
            out[row * number + k] = longest < least ? -1 : tokens[std::min(end + 1 + k % period, length - 1)];
    }
    return 0;
}
