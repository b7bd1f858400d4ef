// Row-wise and element-wise ops. All arithmetic is fp32; rounding to bf16 happens where a chain of torch ops would round.
#include <algorithm>
#include <limits>

#include "pool.h"
#include "replay.h"
#include "simd.h"

using namespace kc;

namespace {

// Below this many elements a call stays on its own thread: waking another costs more.
constexpr long kParallelElements = 1 << 16;

template <class F> void rows_of(long rows, long width, F &&body) {
    if (rows * width < kParallelElements) return body(0, rows);
    parallel_ranges(rows, std::max<long>(1, 8192 / std::max<long>(1, width)), body);
}

struct Norm {
    const void *x, *weight, *bias, *residual;
    void *out, *sum;
    long ldx, ldr, rows, width;
    float eps;
    int offset;
};

// x + residual, rounded and kept as the new residual; returns the row to normalise.
template <class T> const T *add_residual(const Norm &n, long r) {
    const T *x = (const T *)n.x + r * n.ldx;
    if (!n.residual) return x;
    const T *residual = (const T *)n.residual + r * n.ldr;
    T *total = (T *)n.sum + r * n.width;
    for (long j = 0; j < n.width; j += W) {
        int left = (int)(n.width - j);
        store_n(total + j, load_n(x + j, left) + load_n(residual + j, left), left);
    }
    return total;
}

template <class T> void rms_norm(const Norm &n, long r) {
    const T *x = add_residual<T>(n, r), *weight = (const T *)n.weight;
    T *out = (T *)n.out + r * n.width;
    vf squares = {};
    for (long j = 0; j < n.width; j += W) {
        vf v = load_n(x + j, (int)(n.width - j));
        squares = fma(v, v, squares);
    }
    const float scale = 1.0f / std::sqrt(sum(squares) / n.width + n.eps);
    for (long j = 0; j < n.width; j += W) {
        int left = (int)(n.width - j);
        vf v = load_n(x + j, left) * scale;
        if (weight && n.offset) v *= load_n(weight + j, left) + (float)n.offset;
        else if (weight) v = rounded(v, x) * load_n(weight + j, left);
        store_n(out + j, v, left);
    }
}

template <class T> void layer_norm(const Norm &n, long r) {
    const T *x = add_residual<T>(n, r), *weight = (const T *)n.weight, *bias = (const T *)n.bias;
    T *out = (T *)n.out + r * n.width;
    vf total = {}, squares = {};
    for (long j = 0; j < n.width; j += W) total += load_n(x + j, (int)(n.width - j));
    const float mean = sum(total) / n.width;
    for (long j = 0; j < n.width; j += W) {
        int left = (int)(n.width - j);
        vf v = load_n(x + j, left) - mean;
        if (left < W) v = select((vi)(lanes() < left), v, vf{});
        squares = fma(v, v, squares);
    }
    const float scale = 1.0f / std::sqrt(sum(squares) / n.width + n.eps);
    for (long j = 0; j < n.width; j += W) {
        int left = (int)(n.width - j);
        vf v = (load_n(x + j, left) - mean) * scale;
        if (weight) v *= load_n(weight + j, left);
        if (bias) v += load_n(bias + j, left);
        store_n(out + j, v, left);
    }
}

// Rotates one head in place: pairs (i, i + half), or (2i, 2i + 1) when interleaved.
template <class T> void rotate(T *x, const float *cos, const float *sin, int half, bool interleaved) {
    if (interleaved) {
        for (int i = 0; i < half; ++i) {
            float a = to_float(x[2 * i]), b = to_float(x[2 * i + 1]);
            from_float(x + 2 * i, a * cos[i] - b * sin[i]);
            from_float(x + 2 * i + 1, b * cos[i] + a * sin[i]);
        }
        return;
    }
    for (int i = 0; i < half; i += W) {
        int left = half - i;
        vf a = load_n(x + i, left), b = load_n(x + half + i, left), c = load_n(cos + i, left), s = load_n(sin + i, left);
        store_n(x + i, a * c - b * s, left);
        store_n(x + half + i, b * c + a * s, left);
    }
}

struct Heads {
    void *x;
    long token, head;
    int count;
};

template <class T>
void rotary(Heads x, long t, const float *cos, const float *sin, int half, bool interleaved) {
    for (int h = 0; h < x.count; ++h) rotate((T *)x.x + t * x.token + h * x.head, cos, sin, half, interleaved);
}

enum Activation { kSilu = 0, kGeluTanh = 1, kGeluErf = 2 };

template <int A> KC_INLINE vf activate(vf x) {
    if constexpr (A == kSilu) return x * sigmoid(x);
    else if constexpr (A == kGeluTanh) return x * sigmoid(1.5957691216057308f * (x + 0.044715f * x * x * x));
    vf tail = verfc(magnitude(x) * 0.70710678118654752f) * 0.5f;
    return x * select((vi)(x < 0.0f), tail, 1.0f - tail);
}

template <class T, int A> void gate(const T *x, T *out, long width) {
    for (long j = 0; j < width; j += W) {
        int left = (int)(width - j);
        vf g = rounded(activate<A>(load_n(x + j, left)), x);
        store_n(out + j, g * load_n(x + width + j, left), left);
    }
}

template <class T> void gate_row(int activation, const T *x, T *out, long width) {
    if (activation == kSilu) gate<T, kSilu>(x, out, width);
    else if (activation == kGeluTanh) gate<T, kGeluTanh>(x, out, width);
    else gate<T, kGeluErf>(x, out, width);
}

// The first largest element; the first NaN if there is one, as torch.argmax has it.
template <class T> int64_t argmax(const T *x, long width) {
    constexpr long kBlock = 512;
    if (width < W) {
        T padded[W];
        std::fill(padded, padded + W, x[0]);  // never before the real one
        std::copy(x, x + width, padded);
        return argmax(padded, W);
    }
    float best = -std::numeric_limits<float>::infinity();
    int64_t index = 0;
    for (long b = 0; b < width; b += kBlock) {
        long end = std::min(width, b + kBlock);
        vf top = splat(best);
        vi above = {};
        for (long j = b; j < end; j += W) {
            vf v = j + W <= end ? load(x + j) : load(x + end - W);
            above |= ~(vi)(v <= top);
            top = vmax(v, top);
        }
        bool any = false;
        for (int i = 0; i < W; ++i) any |= above[i] != 0;
        if (!any) continue;
        for (long j = b; j < end; ++j) {
            float v = to_float(x[j]);
            if (v != v) return j;
            if (v > best) best = v, index = j;
        }
    }
    return index;
}

}  // namespace

KC_API void kc_norm(int kind, int is_bf16, const void *x, long ldx, const void *weight, const void *bias, const void *residual,
                    long ldr, void *out, void *sum, long rows, long width, float eps, int offset) {
    Norm n{x, weight, bias, residual, out, sum, ldx, ldr, rows, width, eps, offset};
    rows_of(rows, width, [&](long begin, long end) {
        for (long r = begin; r < end; ++r) {
            if (kind == 0 && is_bf16) rms_norm<bf16>(n, r);
            else if (kind == 0) rms_norm<float>(n, r);
            else if (is_bf16) layer_norm<bf16>(n, r);
            else layer_norm<float>(n, r);
        }
    });
}
KC_REPLAYABLE(kc_norm)

// Rotates the first 2 * half elements of each head of q and of k (k may be null); returns 1 for a position past the table.
KC_API int kc_rotary(int is_bf16, void *q, long q_token, long q_head, int q_heads, void *k, long k_token, long k_head, int k_heads,
                      const float *cos, const float *sin, long table, const int64_t *positions, long tokens, int half,
                     int interleaved) {
    for (long t = 0; t < tokens; ++t)
        if (positions[t] < 0 || positions[t] >= table) return 1;
    Heads both[2] = {{q, q_token, q_head, q_heads}, {k, k_token, k_head, k ? k_heads : 0}};
    rows_of(tokens, 2L * half * (q_heads + both[1].count), [&](long begin, long end) {
        for (long t = begin; t < end; ++t)
            for (Heads &x : both) {
                const float *c = cos + positions[t] * half, *s = sin + positions[t] * half;
                if (is_bf16) rotary<bf16>(x, t, c, s, half, interleaved);
                else rotary<float>(x, t, c, s, half, interleaved);
            }
    });
    return 0;
}
KC_REPLAYABLE(kc_rotary)

KC_API void kc_gate(int activation, int is_bf16, const void *x, long ldx, void *out, long rows, long width) {
    rows_of(rows, 2 * width, [&](long begin, long end) {
        for (long r = begin; r < end; ++r) {
            if (is_bf16) gate_row(activation, (const bf16 *)x + r * ldx, (bf16 *)out + r * width, width);
            else gate_row(activation, (const float *)x + r * ldx, (float *)out + r * width, width);
        }
    });
}
KC_REPLAYABLE(kc_gate)

// out[i] = table[ids[i]], rows of `bytes` bytes; returns 1 when an id is out of range.
KC_API int kc_gather(const char *table, long ld, const int64_t *ids, long count, long rows, char *out, long bytes) {
    for (long i = 0; i < count; ++i)
        if (ids[i] < 0 || ids[i] >= rows) return 1;
    rows_of(count, bytes / 2, [&](long begin, long end) {
        for (long i = begin; i < end; ++i) memcpy(out + i * bytes, table + ids[i] * ld, bytes);
    });
    return 0;
}
KC_REPLAYABLE(kc_gather)

KC_API void kc_argmax(int is_bf16, const void *x, long ldx, int64_t *out, long rows, long width) {
    rows_of(rows, width, [&](long begin, long end) {
        for (long r = begin; r < end; ++r)
            out[r] = is_bf16 ? argmax((const bf16 *)x + r * ldx, width) : argmax((const float *)x + r * ldx, width);
    });
}
