// Writing, copying and reading single tokens of the paged KV cache.
#include "kv.h"

#include <algorithm>
#include <type_traits>

#include "pool.h"
#include "replay.h"
#include "simd.h"

using namespace kc;

namespace {

struct Place {
    long base;  // first element of the token's strip, head 0
    int lane;
};

Place place(const Geometry &g, int64_t slot) {
    int offset = (int)(slot % g.block);
    return {slot / g.block * g.heads * g.page + offset / kStrip * g.strip, offset % kStrip};
}

// Element index inside the K or the V part of a strip.
template <class T> long k_at(int d, int lane) {
    return sizeof(T) == 2 ? ((long)(d / 2) * kStrip + lane) * 2 + d % 2 : (long)d * kStrip + lane;
}
template <class T> long v_at(int d, int lane) {
    return (long)(d / 16) * 16 * kStrip + (sizeof(T) == 2 ? (lane / 2 * 16 + d % 16) * 2 + lane % 2 : lane * 16 + d % 16);
}

template <class X> struct Tokens {
    const X *data;
    long token, head;  // strides
    const X *at(long t, int h) const { return data + t * token + h * head; }
};

void convert(bf16 *to, bf16 x) { *to = x; }
void convert(float *to, bf16 x) { *to = to_float(x); }
template <class T> void convert(T *to, float x) { from_float(to, x); }

template <class T, class X>
void write(const Geometry &g, T *kv, Tokens<X> k, Tokens<X> v, const int64_t *slots, long begin, long end) {
    for (long t = begin; t < end; ++t) {
        if (slots[t] < 0) continue;
        Place at = place(g, slots[t]);
        for (int h = 0; h < g.heads; ++h) {
            T *to = kv + at.base + h * g.page;
            const X *from = k.at(t, h);
            for (int d = 0; d < g.d; ++d) convert(to + k_at<T>(d, at.lane), from[d]);
            to += g.k_strip;
            from = v.at(t, h);
            for (int d = 0; d < g.dv; ++d) convert(to + v_at<T>(d, at.lane), from[d]);
        }
    }
}

template <class T> void copy(const Geometry &g, T *kv, const int64_t *src, const int64_t *dst, long count) {
    for (long i = 0; i < count; ++i) {
        Place a = place(g, src[i]), b = place(g, dst[i]);
        for (int h = 0; h < g.heads; ++h) {
            const T *from = kv + a.base + h * g.page;
            T *to = kv + b.base + h * g.page;
            for (int d = 0; d < g.d; ++d) to[k_at<T>(d, b.lane)] = from[k_at<T>(d, a.lane)];
            for (int d = 0; d < g.dv; ++d) to[g.k_strip + v_at<T>(d, b.lane)] = from[g.k_strip + v_at<T>(d, a.lane)];
        }
    }
}

template <class T> void read(const Geometry &g, const T *kv, const int64_t *slots, long count, T *k, T *v) {
    for (long i = 0; i < count; ++i) {
        Place at = place(g, slots[i]);
        for (int h = 0; h < g.heads; ++h) {
            const T *from = kv + at.base + h * g.page;
            for (int d = 0; d < g.d; ++d) *k++ = from[k_at<T>(d, at.lane)];
            for (int d = 0; d < g.dv; ++d) *v++ = from[g.k_strip + v_at<T>(d, at.lane)];
        }
    }
}

template <class T, class X>
void write_all(const Geometry &g, void *kv, Tokens<X> k, Tokens<X> v, const int64_t *slots, long tokens) {
    parallel_ranges(tokens, std::max<long>(16, 65536 / ((long)g.heads * (g.d + g.dv))),
                    [&](long begin, long end) { write(g, (T *)kv, k, v, slots, begin, end); });
}

bool outside(const Geometry &g, long blocks, const int64_t *slots, long n) {
    return std::any_of(slots, slots + n, [&](int64_t slot) { return slot >= blocks * g.block; });
}

}  // namespace

// Elements of one block of one head.
KC_API long kc_kv_page(int block, int d, int dv) { return Geometry(block, 1, d, dv).page; }

// The three below return 1, having done nothing, for a slot past the last block. Negative slots are for writing only: skipped.
KC_API int kc_kv_write(void *kv, int kv_bf16, long blocks, int block, int heads, int d, int dv, const void *k, long k_token, long k_head,
                        const void *v, long v_token, long v_head, int x_bf16, const int64_t *slots, long tokens) {
    Geometry g(block, heads, d, dv);
    if (outside(g, blocks, slots, tokens)) return 1;
    if (x_bf16) {
        Tokens<bf16> ks{(const bf16 *)k, k_token, k_head}, vs{(const bf16 *)v, v_token, v_head};
        if (kv_bf16) write_all<bf16>(g, kv, ks, vs, slots, tokens);
        else write_all<float>(g, kv, ks, vs, slots, tokens);
    } else {
        Tokens<float> ks{(const float *)k, k_token, k_head}, vs{(const float *)v, v_token, v_head};
        if (kv_bf16) write_all<bf16>(g, kv, ks, vs, slots, tokens);
        else write_all<float>(g, kv, ks, vs, slots, tokens);
    }
    return 0;
}
KC_REPLAYABLE(kc_kv_write)

KC_API int kc_kv_copy(void *kv, int kv_bf16, long blocks, int block, int heads, int d, int dv, const int64_t *src, const int64_t *dst, long n) {
    Geometry g(block, heads, d, dv);
    if (outside(g, blocks, src, n) || outside(g, blocks, dst, n)) return 1;
    if (kv_bf16) copy(g, (uint16_t *)kv, src, dst, n);
    else copy(g, (uint32_t *)kv, src, dst, n);
    return 0;
}

KC_API int kc_kv_read(const void *kv, int kv_bf16, long blocks, int block, int heads, int d, int dv, const int64_t *slots, long n, void *k,
                       void *v) {
    Geometry g(block, heads, d, dv);
    if (outside(g, blocks, slots, n)) return 1;
    if (kv_bf16) read(g, (const uint16_t *)kv, slots, n, (uint16_t *)k, (uint16_t *)v);
    else read(g, (const uint32_t *)kv, slots, n, (uint32_t *)k, (uint32_t *)v);
    return 0;
}
